"""Speech engines that a user installs to make speech for training: AI4Bharat's Indic-TTS and Indic
Parler-TTS, Meta's MMS and Piper; and the table of how each is had and what its speech may be for.

Each loads its model where it is made, and is handed sentences with a voice, a rate and a pitch.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr
import torch

import praat
import speech
from audio import SAMPLE_RATE
from command import UserError


def _import(module: str, pip: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(f"{name} is not installed ({error}): {pip}") from error


@dataclass(frozen=True)
class Line:
    """A sentence to say. `rate` and `semitones` are relative to the engine's own voice."""

    text: str
    voice: str
    rate: float
    semitones: float
    seed: int


@dataclass(frozen=True)
class Said:
    """Mono audio `[T]` in [-1, 1] at its rate; `phones` where the engine gives their times."""

    audio: np.ndarray
    sample_rate: int
    phones: list | None = None


class IndicTts:
    """AI4Bharat's FastPitch and HiFi-GAN for Telugu (Kumar et al. 2023), 22,050 Hz, a man and a
    woman, run by coqui-tts.

    `model` is the folder that te.zip unpacks to: fastpitch/ and hifigan/, each with config.json
    and best_model.pth. The rate is FastPitch's own length scale.
    """

    def __init__(self, model: str, device: str) -> None:
        folder = Path(model)
        needed = [folder / part / name for part in ("fastpitch", "hifigan")
                  for name in ("best_model.pth", "config.json")]  # fmt: skip
        missing = [path for path in needed if not path.is_file()]
        if missing:
            raise UserError(
                f"{missing[0]}: not there; fetch the voices: mkdir -p {folder.parent} && "
                f"(cd {folder.parent} && wget -c {INDICTTS_URL}/te.zip && unzip -o te.zip)"
            )
        coqui = _import("TTS.utils.synthesizer", ENGINES["indictts"].pip)
        acoustic, config, vocoder, vocoder_config = needed
        with tempfile.TemporaryDirectory() as temporary:
            own = Path(temporary) / "config.json"
            own.write_text(json.dumps(_local_paths(config, acoustic.parent)), encoding="utf-8")
            self._model = coqui.Synthesizer(
                tts_checkpoint=str(acoustic),
                tts_config_path=str(own),
                vocoder_checkpoint=str(vocoder),
                vocoder_config=str(vocoder_config),
                use_cuda=device.startswith("cuda"),
            )
        self.voices = tuple(self._model.tts_model.speaker_manager.speaker_names)

    def say(self, lines: Sequence[Line]) -> list[Said | None]:
        return [self._say(line) for line in lines]

    def _say(self, line: Line) -> Said | None:
        torch.manual_seed(line.seed)
        self._model.tts_model.length_scale = 1 / line.rate
        audio = self._model.tts(line.text, speaker_name=line.voice, split_sentences=False)
        return _finished(np.asarray(audio), int(self._model.output_sample_rate), line)


def _local_paths(config: Path, folder: Path) -> dict:
    """The config of a voice with the speakers' file where it is here, not where it was trained."""
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: not a voice's config ({error}); unzip it again") from error
    for where in (fields, fields.get("model_args") or {}):
        for key in ("speakers_file", "speaker_file"):
            if where.get(key):
                where[key] = str((folder / Path(where[key]).name).resolve())
    return fields


class Parler:
    """AI4Bharat's Indic Parler-TTS (Apache-2.0, gated): voices and styles told in words, 44.1 kHz.

    parler-tts pins an old transformers, so this engine runs in an environment of its own. Rate and
    pitch are asked for in words (`parler_style`) and not changed afterwards: the manifest has what
    was drawn. A batch is generated at once, so its noise depends on all of its sentences.
    """

    voices = ("Prakash", "Lalitha", "Kiran")

    def __init__(self, model: str, device: str) -> None:
        parler = _import("parler_tts", ENGINES["parler"].pip)
        transformers = _import("transformers", ENGINES["parler"].pip)
        with _Loading(model):
            self._model = parler.ParlerTTSForConditionalGeneration.from_pretrained(model)
            described = self._model.config.text_encoder._name_or_path
            self._prompts = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
            self._styles = transformers.AutoTokenizer.from_pretrained(described)
        half = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._model = self._model.to(device, dtype=half).eval()
        self._device = device

    def say(self, lines: Sequence[Line]) -> list[Said | None]:
        styles = self._tokens(self._styles, [parler_style(line) for line in lines])
        prompts = self._tokens(self._prompts, [line.text for line in lines])
        torch.manual_seed(lines[0].seed)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=styles.input_ids,
                attention_mask=styles.attention_mask,
                prompt_input_ids=prompts.input_ids,
                prompt_attention_mask=prompts.attention_mask,
                do_sample=True,
                return_dict_in_generate=True,
            )
        rate = int(self._model.config.sampling_rate)
        return [
            _finished(audio[: int(length)].float().cpu().numpy(), rate, replace(line, semitones=0))
            for audio, length, line in zip(made.sequences, made.audios_length, lines, strict=True)
        ]

    def _tokens(self, tokenizer, texts: list[str]):
        return tokenizer(texts, return_tensors="pt", padding=True).to(self._device)


def parler_style(line: Line) -> str:
    """What Parler is told about voice, pitch and pace."""
    pitch = "low" if line.semitones < -0.7 else "high" if line.semitones > 0.7 else "moderate"
    pace = "slow" if line.rate < 0.96 else "fast" if line.rate > 1.06 else "moderate"
    return (
        f"{line.voice} speaks with a {pitch} pitch at a {pace} pace, in an expressive voice. "
        "The recording is of very high quality, close up, with no background noise."
    )


class Mms:
    """Meta's MMS voice for Telugu (VITS, 16 kHz, one speaker; Pratap et al. 2023). Not for
    commercial use (CC BY-NC 4.0)."""

    voices = ("mms",)

    def __init__(self, model: str, device: str) -> None:
        transformers = _import("transformers", ENGINES["mms"].pip)
        with _Loading(model):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            self._model = transformers.VitsModel.from_pretrained(model).to(device).eval()
        self._rate = float(self._model.config.speaking_rate)

    def say(self, lines: Sequence[Line]) -> list[Said | None]:
        return [self._say(line) for line in lines]

    def _say(self, line: Line) -> Said | None:
        tokens = self._tokenizer(line.text, return_tensors="pt").to(self._model.device)
        if not tokens["input_ids"].shape[-1]:
            return None
        self._model.speaking_rate = self._rate * line.rate
        torch.manual_seed(line.seed)
        with torch.inference_mode():
            audio = self._model(**tokens).waveform[0].float().cpu().numpy()
        return _finished(audio, int(self._model.config.sampling_rate), line)


class Piper:
    """Piper's Telugu voices (VITS by onnxruntime). `model` is a folder of .onnx voices.

    Its noise cannot be seeded: the same command says the same, in other samples.
    """

    def __init__(self, model: str, device: str) -> None:
        piper = _import("piper", ENGINES["piper"].pip)
        found = sorted(Path(model).glob("*.onnx"))
        if not found:
            raise UserError(
                f"{model}: no voice there; fetch some: mkdir -p {model} && python -m "
                f"piper.download_voices {' '.join(PIPER_VOICES)} --data-dir {model}"
            )
        cuda = device.startswith("cuda")
        self._voices = {p.stem: piper.PiperVoice.load(str(p), use_cuda=cuda) for p in found}
        self._config = piper.SynthesisConfig
        self.voices = tuple(self._voices)

    def say(self, lines: Sequence[Line]) -> list[Said | None]:
        return [self._say(line) for line in lines]

    def _say(self, line: Line) -> Said | None:
        voice = self._voices[line.voice]
        config = self._config(length_scale=1 / line.rate)
        chunks = list(voice.synthesize(line.text, syn_config=config))
        data = b"".join(chunk.audio_int16_bytes for chunk in chunks)
        audio = np.frombuffer(data, np.int16).astype(np.float32) / 32768
        return _finished(audio, chunks[0].sample_rate, line) if chunks else None


class Packaged:
    """espeak's and Festival's training voices through speech.Synthesizer: for tests and tiny
    models. They give the times of the phones, which the manifest keeps."""

    def __init__(self, name: str) -> None:
        found = [v for v in speech.voices("telugu", "user", "train") if v.engine == name]
        if not found:
            raise UserError(f"{name} is not installed: {speech.INSTALL[name]}")
        self._voices = {voice.id: voice for voice in found}
        self._synthesizer = speech.Synthesizer()
        self.voices = tuple(self._voices)

    def say(self, lines: Sequence[Line]) -> list[Said | None]:
        try:
            return self._say(lines)
        except UserError:
            if len(lines) == 1:
                return [None]
            return [said for line in lines for said in self.say([line])]

    def _say(self, lines: Sequence[Line]) -> list[Said | None]:
        requests = []
        for line in lines:
            voice = self._voices[line.voice]
            voice = replace(voice, pitch=voice.pitch * 2 ** (line.semitones / 12))
            requests.append(speech.Request(line.text, "telugu", voice, line.rate, seed=line.seed))
        return [
            Said(
                made.audio,
                SAMPLE_RATE,
                made.phones and [[p, round(s, 4), round(e, 4)] for p, s, e in made.phones],
            )
            for made in self._synthesizer.synthesize(requests)
        ]


class _Loading:
    """Turns what a hub or a folder answers to `from_pretrained` into one line."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (OSError, ValueError)):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
            raise UserError(
                f"{self.model}: cannot be loaded ({reason}); accept its licence on Hugging Face "
                "and `hf auth login` where it is gated, or give a folder by --model"
            ) from error


def _finished(audio: np.ndarray, sample_rate: int, line: Line) -> Said | None:
    """At most 24 kHz, silent edges cut to 0.1 s, pitch moved; None for silence."""
    audio = audio.astype(np.float32).reshape(-1)
    if sample_rate > SAMPLE_RATE and len(audio):
        audio, sample_rate = soxr.resample(audio, sample_rate, SAMPLE_RATE), SAMPLE_RATE
    audio = trimmed(audio, sample_rate)
    if len(audio) < sample_rate // 10:
        return None
    if abs(line.semitones) > 0.05:
        try:
            audio = praat.shift_pitch(audio, sample_rate, line.semitones)
        except (praat.TooShort, UserError):
            return None
    return Said(audio / max(float(np.abs(audio).max()), 1.0), sample_rate)


def trimmed(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Without the silence at both ends but 0.1 s; empty where nothing is loud or a number."""
    if not len(audio) or not np.isfinite(audio).all():
        return audio[:0]
    loud = np.flatnonzero(np.abs(audio) > max(0.02 * float(np.abs(audio).max()), 1e-3))
    if not len(loud):
        return audio[:0]
    margin = sample_rate // 10
    return audio[max(loud[0] - margin, 0) : loud[-1] + margin]


@dataclass(frozen=True)
class Engine:
    """A row of the table of engines: how it is had, and what its speech may be used for."""

    make: Callable[[str, str], object]
    model: str
    pip: str
    license: str
    commercial_ok: bool
    note: str


PACKAGED = ("espeak", "festival")
INDICTTS_URL = "https://github.com/AI4Bharat/Indic-TTS/releases/download/v1-checkpoints-release"
PIPER_VOICES = ("te_IN-maya-medium", "te_IN-padmavathi-medium", "te_IN-venkatesh-medium")
ENGINES = {
    "indictts": Engine(
        IndicTts, "voices/te",
        "pip install coqui-tts torchcodec six",  # the last two it needs and does not ask for
        "MIT (AI4Bharat Indic-TTS)", True,
        "FastPitch + HiFi-GAN, a man and a woman; without its voices it says how to fetch them",
    ),
    "parler": Engine(
        Parler, "ai4bharat/indic-parler-tts",
        "python -m venv .venv-parler && .venv-parler/bin/pip install parler-tts torchaudio soxr "
        "soundfile tqdm praat-parselmouth espeakng-loader && .venv-parler/bin/python "
        "augment_telugu.py --engine parler --synthesize_hours 500",
        "Apache-2.0 (AI4Bharat Indic Parler-TTS)", True,
        "voices and styles told in words; gated; slow without a GPU",
    ),
    "mms": Engine(
        Mms, "facebook/mms-tts-tel", "pip install transformers",
        "CC BY-NC 4.0 (Meta MMS)", False, "one voice, not for commercial use",
    ),
    "piper": Engine(
        Piper, "voices/piper", "pip install piper-tts",
        "as the voice's MODEL_CARD says (Piper)", False, "three voices; samples do not repeat",
    ),
    "espeak": Engine(
        lambda model, device: Packaged("espeak"), "", speech.INSTALL["espeak"],
        "output of espeak-ng (GPL-3.0+)", True, "formant voices: tests and tiny models",
    ),
    "festival": Engine(
        lambda model, device: Packaged("festival"), "", speech.INSTALL["festival"],
        "free (Festival voices of Debian; NSK, Czech, Italian: GPL; Finnish: LGPL-2+)", True,
        "diphone voices: tests and tiny models",
    ),
}  # fmt: skip
