"""Speech engines that a user installs to make speech: AI4Bharat's Indic-TTS and Indic Parler-TTS,
Meta's MMS and Piper; and the table of how each is had and what its speech may be used for.

An engine is made for a language, a model and a device. It has `voices`, and `say` hands back raw
audio for sentences, with the times of phones where the engine knows them. SPEECH_ENGINES are those
that conversations are made with (`speech.Engine`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import speech
from audio import SAMPLE_RATE
from command import UserError, first_line


@dataclass(frozen=True)
class Sentence:
    """What to say. `rate` and `semitones` are relative to the engine's own voice."""

    text: str
    voice: str
    rate: float = 1.0
    semitones: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class RawSpeech:
    """Mono audio `[T]` at the engine's rate, `[phone, start, end]` where it gives their times, and
    by how many semitones its pitch is still to be moved."""

    audio: np.ndarray
    sample_rate: int
    phones: list | None = None
    semitones: float = 0.0


class IndicTts:
    """FastPitch and HiFi-GAN (Kumar et al. 2023), 22,050 Hz, a man and a woman, run by coqui-tts.

    `model` is the folder that te.zip (hi.zip, en.zip) unpacks to: fastpitch/ and hifigan/, each
    with config.json and best_model.pth. The rate is FastPitch's own length scale.
    """

    def __init__(self, language: str, model: str, device: str) -> None:
        folder = Path(model)
        files = [folder / part / name for part in ("fastpitch", "hifigan")
                 for name in ("best_model.pth", "config.json")]  # fmt: skip
        for missing in (path for path in files if not path.is_file()):
            archive = f"{CODES[language][:2]}.zip"
            raise UserError(
                f"{missing}: not there; fetch the voices: mkdir -p {folder.parent} && (cd "
                f"{folder.parent} && wget -c {INDICTTS_URL}/{archive} && unzip -o {archive})"
            )
        coqui = _import("TTS.utils.synthesizer", "indictts")
        acoustic, config, vocoder, vocoder_config = files
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / "config.json"
            local.write_text(json.dumps(_local_paths(config)), encoding="utf-8")
            self._model = coqui.Synthesizer(
                tts_checkpoint=str(acoustic),
                tts_config_path=str(local),
                vocoder_checkpoint=str(vocoder),
                vocoder_config=str(vocoder_config),
                use_cuda=device.startswith("cuda"),
            )
        self.voices = tuple(self._model.tts_model.speaker_manager.speaker_names)

    def say(self, sentences: Sequence[Sentence]) -> Iterator[RawSpeech]:
        for one in sentences:
            torch.manual_seed(one.seed)
            self._model.tts_model.length_scale = 1 / one.rate
            audio = self._model.tts(one.text, speaker_name=one.voice, split_sentences=False)
            rate = int(self._model.output_sample_rate)
            yield RawSpeech(np.asarray(audio, np.float32), rate, None, one.semitones)


def _local_paths(config: Path) -> dict:
    """The config of a voice with the speakers' file where it is here, not where it was trained."""
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: not a voice's config ({error}); unzip it again") from error
    for where in (fields, fields.get("model_args") or {}):
        for key in ("speakers_file", "speaker_file"):
            if where.get(key):
                where[key] = str((config.parent / Path(where[key]).name).resolve())
    return fields


class Parler:
    """Indic Parler-TTS, 44.1 kHz: voice, pitch and pace are described in words (`parler_style`) and
    not changed afterwards.

    parler-tts pins an old transformers, so this engine runs in an environment of its own. A batch
    is generated at once, so its noise depends on all of its sentences.
    """

    def __init__(self, language: str, model: str, device: str) -> None:
        parler, transformers = _import("parler_tts", "parler"), _import("transformers", "parler")
        self.voices = PARLER_VOICES[language]
        with _loading(model):
            self._model = parler.ParlerTTSForConditionalGeneration.from_pretrained(model)
            described = self._model.config.text_encoder._name_or_path
            self._prompts = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
            self._styles = transformers.AutoTokenizer.from_pretrained(described)
        half = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._model = self._model.to(device, dtype=half).eval()
        self._device = device

    def say(self, sentences: Sequence[Sentence]) -> Iterator[RawSpeech]:
        styles = self._tokens(self._styles, [parler_style(one) for one in sentences])
        prompts = self._tokens(self._prompts, [one.text for one in sentences])
        torch.manual_seed(sentences[0].seed)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=styles.input_ids,
                attention_mask=styles.attention_mask,
                prompt_input_ids=prompts.input_ids,
                prompt_attention_mask=prompts.attention_mask,
                do_sample=True,
                return_dict_in_generate=True,
            )
        for audio, length in zip(made.sequences, made.audios_length, strict=True):
            audio = audio[: int(length)].float().cpu().numpy()
            yield RawSpeech(audio, int(self._model.config.sampling_rate))

    def _tokens(self, tokenizer, texts: list[str]):
        return tokenizer(texts, return_tensors="pt", padding=True).to(self._device)


def parler_style(sentence: Sentence) -> str:
    """The description of voice, pitch and pace that Parler is given."""
    semitones, rate = sentence.semitones, sentence.rate
    pitch = "low" if semitones < -0.7 else "high" if semitones > 0.7 else "moderate"
    pace = "slow" if rate < 0.96 else "fast" if rate > 1.06 else "moderate"
    return (
        f"{sentence.voice} speaks with a {pitch} pitch at a {pace} pace, in an expressive voice. "
        "The recording is of very high quality, close up, with no background noise."
    )


class Mms:
    """Meta's MMS (VITS, 16 kHz, one speaker a language; Pratap et al. 2023)."""

    voices = ("mms",)

    def __init__(self, language: str, model: str, device: str) -> None:
        transformers = _import("transformers", "mms")
        with _loading(model):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            self._model = transformers.VitsModel.from_pretrained(model).to(device).eval()
        self._rate = float(self._model.config.speaking_rate)

    def say(self, sentences: Sequence[Sentence]) -> Iterator[RawSpeech | None]:
        for one in sentences:
            tokens = self._tokenizer(one.text, return_tensors="pt").to(self._model.device)
            if not tokens["input_ids"].shape[-1]:
                yield None
                continue
            self._model.speaking_rate = self._rate * one.rate
            torch.manual_seed(one.seed)
            with torch.inference_mode():
                audio = self._model(**tokens).waveform[0].float().cpu().numpy()
            yield RawSpeech(audio, int(self._model.config.sampling_rate), None, one.semitones)


class Piper:
    """Piper's voices (VITS by onnxruntime). `model` is a folder of .onnx voices.

    Its noise cannot be seeded: the same command says the same, in other samples.
    """

    def __init__(self, language: str, model: str, device: str) -> None:
        piper = _import("piper", "piper")
        found = sorted(Path(model).glob(f"{CODES[language][:2]}_*.onnx"))
        if not found:
            raise UserError(
                f"{model}: no {language} voice there; fetch some: mkdir -p {model} && python -m "
                f"piper.download_voices {PIPER_VOICES[language]} --data-dir {model}"
            )
        cuda = device.startswith("cuda")
        self._voices = {p.stem: piper.PiperVoice.load(str(p), use_cuda=cuda) for p in found}
        self._config = piper.SynthesisConfig
        self.voices = tuple(self._voices)

    def say(self, sentences: Sequence[Sentence]) -> Iterator[RawSpeech | None]:
        for one in sentences:
            config = self._config(length_scale=1 / one.rate)
            chunks = list(self._voices[one.voice].synthesize(one.text, syn_config=config))
            data = b"".join(chunk.audio_int16_bytes for chunk in chunks)
            audio = np.frombuffer(data, np.int16).astype(np.float32) / 32768
            rate = chunks[0].sample_rate if chunks else SAMPLE_RATE
            yield RawSpeech(audio, rate, None, one.semitones)


class Packaged:
    """The training voices of espeak or Festival (`model`), for tests and tiny models: their speech
    comes with the times of the phones, its edges cut."""

    def __init__(self, language: str, model: str, device: str) -> None:
        found = [v for v in speech.voices(language, "user", "train") if v.engine == model]
        if not found:
            raise UserError(f"{model} is not installed: {ENGINES[model].install}")
        self._language = language
        self._voices = {voice.id: voice for voice in found}
        self.voices = tuple(self._voices)

    def say(self, sentences: Sequence[Sentence]) -> list[RawSpeech | None]:
        requests = []
        for one in sentences:
            voice = self._voices[one.voice]
            voice = replace(voice, pitch=voice.pitch * 2 ** (one.semitones / 12))
            requests.append(
                speech.Request(one.text, self._language, voice, one.rate, seed=one.seed)
            )
        try:
            made = speech.Synthesizer().synthesize(requests)
        except UserError:  # a sentence that it cannot say is left out alone
            if len(sentences) == 1:
                return [None]
            return [raw for one in sentences for raw in self.say([one])]
        return [RawSpeech(utterance.audio, SAMPLE_RATE, utterance.phones) for utterance in made]


def _import(module: str, engine: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(f"{name} is not installed ({error}): {ENGINES[engine].install}") from error


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Turns what a hub or a folder answers to `from_pretrained` into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model}: cannot be loaded ({first_line(error)}); accept its licence on Hugging Face "
            "and `hf auth login` where it is gated, or give a folder by --model"
        ) from error


@dataclass(frozen=True)
class Engine:
    """How an engine is had, and what its speech may be used for. `model`: with {code}, of a
    language's own code of three letters, or {two} of them."""

    make: Callable[[str, str, str], object]
    model: str
    install: str
    license: str
    commercial_ok: bool
    note: str
    hub: bool = False  # the model is on Hugging Face, and fetched by its first use

    def model_of(self, language: str) -> str:
        code = CODES[language]
        return self.model.format(code=code, two=code[:2])


CODES = {"english": "eng", "hindi": "hin", "telugu": "tel"}
INDICTTS_URL = "https://github.com/AI4Bharat/Indic-TTS/releases/download/v1-checkpoints-release"
PARLER_VOICES = {
    "english": ("Thoma", "Mary"),
    "hindi": ("Rohit", "Divya", "Aman", "Rani"),
    "telugu": ("Prakash", "Lalitha", "Kiran"),
}
PIPER_VOICES = {
    "english": "en_US-lessac-medium en_US-ryan-medium en_GB-alan-medium",
    "hindi": "hi_IN-pratham-medium hi_IN-priyamvada-medium hi_IN-rohan-medium",
    "telugu": "te_IN-maya-medium te_IN-padmavathi-medium te_IN-venkatesh-medium",
}
ENGINES = {
    "indictts": Engine(
        IndicTts, "voices/{two}",
        "pip install coqui-tts torchcodec six",  # the last two it needs and does not ask for
        "MIT (AI4Bharat Indic-TTS)", True,
        "FastPitch + HiFi-GAN, a man and a woman; without its voices it says how to fetch them",
    ),
    "parler": Engine(
        Parler, "ai4bharat/indic-parler-tts",
        "python -m venv .venv-parler && .venv-parler/bin/pip install parler-tts torchaudio soxr "
        "soundfile tqdm pyarrow praat-parselmouth espeakng-loader && .venv-parler/bin/python "
        "augment_telugu.py --engine parler --synthesize_hours 500",
        "Apache-2.0 (AI4Bharat Indic Parler-TTS)", True,
        "voices and styles described in words; gated; slow without a GPU", hub=True,
    ),
    "mms": Engine(
        Mms, "facebook/mms-tts-{code}", "pip install transformers",
        "CC BY-NC 4.0 (Meta MMS)", False, "one voice, not for commercial use", hub=True,
    ),
    "piper": Engine(
        Piper, "voices/piper", "pip install piper-tts",
        "as the voice's MODEL_CARD says (Piper)", False, "three voices; samples do not repeat",
    ),
    "espeak": Engine(
        Packaged, "espeak", "pip install espeakng-loader (or apt-get install espeak-ng)",
        "output of espeak-ng (GPL-3.0+)", True, "formant voices: tests and tiny models",
    ),
    "festival": Engine(
        Packaged, "festival",
        "apt-get install festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts "
        "festvox-hi-nsk festival-hi festvox-te-nsk festival-te festvox-czech-dita "
        "festvox-czech-krb festvox-czech-machac festvox-czech-ph festvox-italp16k "
        "festvox-itapc16k festvox-suopuhe-lj festvox-suopuhe-mv",
        "free (Festival voices of Debian; NSK, Czech, Italian: GPL; Finnish: LGPL-2+)", True,
        "diphone voices: tests and tiny models",
    ),
}  # fmt: skip


ENGINE_BATCH = 16


class Plugged:
    """A row of the table as a `speech.Engine`: its own voices, and others made of them by Praat."""

    def __init__(self, name: str) -> None:
        self.name, self.install = name, ENGINES[name].install
        self._made: dict[str, object] = {}  # by language

    def voices(self, language: str) -> list[speech.Voice]:
        """[] where it cannot speak; `install` then says what is missing."""
        row, model = ENGINES[self.name], ENGINES[self.name].model_of(language)
        if language not in self._made and row.hub and not _is_cached(model):
            self.install = f"{row.install}; hf download {model}"
            return []
        try:
            return speech.own_and_changed(self.name, language, self._engine(language).voices)
        except UserError as error:
            self.install = str(error)
            return []

    def say(self, orders: Sequence[speech.Order]) -> list[speech.Raw]:
        """As `speech.Engine`; a text without words is 0.3 s of silence."""
        sentences = [
            Sentence(o.text, o.name, o.rate, 12 * math.log2(o.pitch), o.seed) for o in orders
        ]
        engine = self._engine(orders[0].language)
        said = [  # Parler holds a batch in the GPU's memory at once
            raw
            for first in range(0, len(sentences), ENGINE_BATCH)
            for raw in engine.say(sentences[first : first + ENGINE_BATCH])
        ]
        return [_to_change(raw, order) for raw, order in zip(said, orders, strict=True)]

    def _engine(self, language: str):
        if language not in self._made:
            row, device = ENGINES[self.name], "cuda" if torch.cuda.is_available() else "cpu"
            self._made[language] = row.make(language, row.model_of(language), device)
        return self._made[language]


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def _to_change(raw: RawSpeech | None, order: speech.Order) -> speech.Raw:
    """With what Praat is still to change: none of these engines moves formants or ranges."""
    if raw is None or not len(raw.audio):
        return speech.Raw(np.zeros(SAMPLE_RATE * 3 // 10, np.float32), SAMPLE_RATE)
    pitch = 2 ** (raw.semitones / 12)
    changes = {"formant": order.formant, "pitch": pitch, "pitch_range": order.pitch_range}
    if max(abs(x - 1) for x in changes.values()) < 0.015:
        changes = {}
    return speech.Raw(raw.audio, raw.sample_rate, raw.phones, None, changes)


SPEECH_ENGINES = tuple(Plugged(name) for name in ("indictts", "parler", "piper", "mms"))
