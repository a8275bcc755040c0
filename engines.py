"""Speech engines to install: AI4Bharat's Indic-TTS and Indic Parler-TTS, Meta's MMS, Piper.

A model class is made with a folder or a Hugging Face id and yields (audio `[T]`, sample rate) for
each order, at the order's rate. Its `names` are those of its voices, () where its files are not
here. Pitch, range and formants are Praat's work, afterwards.
"""

import functools
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from audio import SAMPLE_RATE, from_pcm16
from command import UserError, first_line
from speech import Order, Raw, Voice, own_and_changed

CODES = {"english": "eng", "hindi": "hin", "telugu": "tel"}
INDICTTS_URL = "https://github.com/AI4Bharat/Indic-TTS/releases/download/v1-checkpoints-release"
PARLER_VOICES = {"english": ("Thoma", "Mary"), "hindi": ("Rohit", "Divya", "Aman", "Rani"),
                 "telugu": ("Prakash", "Lalitha", "Kiran")}  # fmt: skip
PIPER_VOICES = {"english": "en_US-lessac-medium en_US-ryan-medium en_GB-alan-medium",
                "hindi": "hi_IN-pratham-medium hi_IN-priyamvada-medium hi_IN-rohan-medium",
                "telugu": "te_IN-maya-medium te_IN-padmavathi-medium te_IN-venkatesh-medium"}
BATCH = 16  # orders: Parler has all of them in the GPU's memory at once
Sound = tuple[np.ndarray, int]


class IndicTts:
    """FastPitch and HiFi-GAN (Kumar et al. 2023), 22,050 Hz, a woman and a man, run by coqui-tts.
    Its folder is what te.zip (hi.zip, en.zip) unpacks to: fastpitch/ and hifigan/, each with
    config.json and best_model.pth. The rate is FastPitch's own length scale."""

    def __init__(self, language: str, model: str, device: str) -> None:
        from TTS.utils.synthesizer import Synthesizer

        acoustic, config, vocoder, vocoder_config = map(str, self._files(model))
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary) / "config.json"
            local.write_text(json.dumps(_local_paths(Path(config))), encoding="utf-8")
            self._model = Synthesizer(tts_checkpoint=acoustic, tts_config_path=str(local),
                                      vocoder_checkpoint=vocoder, vocoder_config=vocoder_config,
                                      use_cuda=device == "cuda")  # fmt: skip

    @staticmethod
    def _files(model: str) -> list[Path]:
        names = ("best_model.pth", "config.json")
        return [Path(model, part, name) for part in ("fastpitch", "hifigan") for name in names]

    @classmethod
    def names(cls, language: str, model: str) -> Sequence[str]:
        return ("female", "male") if all(path.is_file() for path in cls._files(model)) else ()

    def say(self, orders: Sequence[Order]) -> Iterator[Sound]:
        for order in orders:
            torch.manual_seed(order.seed)
            self._model.tts_model.length_scale = 1 / order.rate
            audio = self._model.tts(order.text, speaker_name=order.name, split_sentences=False)
            yield np.asarray(audio, np.float32), int(self._model.output_sample_rate)


def _local_paths(config: Path) -> dict:
    """The config of a voice with the speakers' file where it is here, not where it was trained."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    for where in (fields, fields.get("model_args") or {}):
        for key in ("speakers_file", "speaker_file"):
            if where.get(key):
                where[key] = str((config.parent / Path(where[key]).name).resolve())
    return fields


class Parler:
    """Indic Parler-TTS, 44.1 kHz: voice, pitch and pace are described in words (`parler_style`). It
    runs in an environment of its own, as parler-tts pins an old transformers. A batch is generated
    at once, so its noise depends on all of its sentences."""

    def __init__(self, language: str, model: str, device: str) -> None:
        from parler_tts import ParlerTTSForConditionalGeneration
        from transformers import AutoTokenizer

        kind = torch.bfloat16 if device == "cuda" else torch.float32
        loaded = ParlerTTSForConditionalGeneration.from_pretrained(model)
        self._model, self._device = loaded.to(device, dtype=kind).eval(), device
        self._prompts = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._styles = AutoTokenizer.from_pretrained(self._model.config.text_encoder._name_or_path)

    @staticmethod
    def names(language: str, model: str) -> Sequence[str]:
        return PARLER_VOICES[language] if _is_here(model) else ()

    def say(self, orders: Sequence[Order]) -> Iterator[Sound]:
        said, options = [order.text for order in orders], {"return_tensors": "pt", "padding": True}
        styles = self._styles(list(map(parler_style, orders)), **options).to(self._device)
        prompts = self._prompts(said, **options).to(self._device)
        torch.manual_seed(orders[0].seed)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=styles.input_ids, attention_mask=styles.attention_mask,
                prompt_input_ids=prompts.input_ids, prompt_attention_mask=prompts.attention_mask,
                do_sample=True, return_dict_in_generate=True)  # fmt: skip
        rate = int(self._model.config.sampling_rate)
        for audio, length in zip(made.sequences, made.audios_length, strict=True):
            yield audio[: int(length)].float().cpu().numpy(), rate


def parler_style(order: Order) -> str:
    """Voice, pitch and pace in words."""
    semitones = 12 * math.log2(order.pitch)
    pitch = "low" if semitones < -0.7 else "high" if semitones > 0.7 else "moderate"
    pace = "slow" if order.rate < 0.96 else "fast" if order.rate > 1.06 else "moderate"
    return (f"{order.name} speaks with a {pitch} pitch at a {pace} pace, in an expressive voice. "
            "The recording is of very high quality, close up, with no background noise.")


class Mms:
    """Meta's MMS (VITS, 16 kHz, one speaker a language; Pratap et al. 2023)."""

    def __init__(self, language: str, model: str, device: str) -> None:
        from transformers import AutoTokenizer, VitsModel

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = VitsModel.from_pretrained(model).to(device).eval()
        self._rate = float(self._model.config.speaking_rate)

    @staticmethod
    def names(language: str, model: str) -> Sequence[str]:
        return ("mms",) if _is_here(model) else ()

    def say(self, orders: Sequence[Order]) -> Iterator[Sound]:
        for order in orders:
            tokens = self._tokenizer(order.text, return_tensors="pt").to(self._model.device)
            if not tokens["input_ids"].shape[-1]:
                yield np.zeros(0, np.float32), SAMPLE_RATE
                continue
            self._model.speaking_rate = self._rate * order.rate
            torch.manual_seed(order.seed)
            with torch.inference_mode():
                audio = self._model(**tokens).waveform[0].float().cpu().numpy()
            yield audio, int(self._model.config.sampling_rate)


class Piper:
    """Piper's voices (VITS by onnxruntime), a folder of .onnx files. Their noise has no seed."""

    def __init__(self, language: str, model: str, device: str) -> None:
        from piper import PiperVoice, SynthesisConfig

        self._config, self._voices = SynthesisConfig, {}
        for name in self.names(language, model):
            self._voices[name] = PiperVoice.load(f"{model}/{name}.onnx", use_cuda=device == "cuda")

    @staticmethod
    def names(language: str, model: str) -> Sequence[str]:
        return sorted(path.stem for path in Path(model).glob(f"{CODES[language][:2]}_*.onnx"))

    def say(self, orders: Sequence[Order]) -> Iterator[Sound]:
        for order in orders:
            config = self._config(length_scale=1 / order.rate)
            chunks = list(self._voices[order.name].synthesize(order.text, syn_config=config))
            data = b"".join(chunk.audio_int16_bytes for chunk in chunks)
            yield from_pcm16(data), chunks[0].sample_rate if chunks else SAMPLE_RATE


def _is_here(model: str) -> bool:
    """Whether a folder, or a model of Hugging Face's hub, needs no fetching."""
    from huggingface_hub import try_to_load_from_cache

    return Path(model).is_dir() or isinstance(try_to_load_from_cache(model, "config.json"), str)


@dataclass(frozen=True)
class InstalledEngine:
    """A `speech.Engine`. In `model` and `fetch`, {code} is a language's, {two} its beginning."""

    name: str
    model_class: type
    model: str
    package: str  # its Python module
    install: str
    fetch: str
    license: str
    commercial_ok: bool
    note: str

    def voices(self, language: str) -> list[Voice]:
        """As `speech.Engine`, without loading or fetching anything."""
        names = self.model_class.names(language, self._of(self.model, language))
        if not names or importlib.util.find_spec(self.package) is None:
            fetch = self._of(self.fetch, language)
            raise UserError(f"{self.name} is not installed: {self.install}; then: {fetch}")
        return own_and_changed(self.name, language, names)

    def say(self, orders: Sequence[Order]) -> list[Raw]:
        model, sounds = _loaded(self, orders[0].language), []
        for first in range(0, len(orders), BATCH):
            sounds += model.say(orders[first : first + BATCH])
        return [self._raw(*sound, order) for sound, order in zip(sounds, orders, strict=True)]

    def _raw(self, audio: np.ndarray, rate: int, order: Order) -> Raw:
        if not len(audio):
            return Raw(np.zeros(SAMPLE_RATE * 3 // 10, np.float32), SAMPLE_RATE)
        pitch = 1.0 if self.model_class is Parler else order.pitch  # there it is asked for in words
        changes = {"formant": order.formant, "pitch": pitch, "pitch_range": order.pitch_range}
        nothing = max(abs(factor - 1) for factor in changes.values()) < 0.015
        return Raw(audio, rate, remaining={} if nothing else changes)

    def _of(self, template: str, language: str) -> str:
        code = CODES[language]
        return template.format(code=code, two=code[:2], piper=PIPER_VOICES[language])


@functools.cache
def _loaded(engine: InstalledEngine, language: str):
    """The engine's model for a language, on the GPU where there is one."""
    model = engine._of(engine.model, language)
    try:
        return engine.model_class(language, model, "cuda" if torch.cuda.is_available() else "cpu")
    except ImportError as error:
        raise UserError(f"{engine.name} is not installed ({error}): {engine.install}") from error
    except (OSError, ValueError) as error:
        fetch = engine._of(engine.fetch, language)
        raise UserError(f"{model}: cannot be loaded ({first_line(error)}): {fetch}") from error


SPEECH_ENGINES = (
    InstalledEngine("indictts", IndicTts, "voices/{two}", "TTS",
        "pip install coqui-tts torchcodec six",  # the last two it needs and does not ask for
        f"mkdir -p voices && (cd voices && wget -c {INDICTTS_URL}/{{two}}.zip && "
        "unzip -o {two}.zip)",
        "MIT (AI4Bharat Indic-TTS)", True, "FastPitch + HiFi-GAN, a man and a woman"),
    InstalledEngine("parler", Parler, "ai4bharat/indic-parler-tts", "parler_tts",
        "python -m venv .venv-parler && .venv-parler/bin/pip install parler-tts torchaudio soxr "
        "soundfile tqdm pyarrow praat-parselmouth espeakng-loader && .venv-parler/bin/python "
        "augment_telugu.py --engine parler --synthesize_hours 500",
        "accept its licence on Hugging Face, hf auth login, hf download ai4bharat/indic-parler-tts",
        "Apache-2.0 (AI4Bharat Indic Parler-TTS)", True,
        "voices and styles described in words; gated; slow without a GPU"),
    InstalledEngine("piper", Piper, "voices/piper", "piper", "pip install piper-tts",
        "mkdir -p voices/piper && python -m piper.download_voices {piper} --data-dir voices/piper",
        "as the voice's MODEL_CARD says (Piper)", False, "three voices; samples do not repeat"),
    InstalledEngine("mms", Mms, "facebook/mms-tts-{code}", "transformers",
        "pip install transformers", "hf download facebook/mms-tts-{code}",
        "CC BY-NC 4.0 (Meta MMS)", False, "one voice, not for commercial use"))  # fmt: skip
