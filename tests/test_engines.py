"""The engines behind fakes of their packages, and a VITS of random weights."""

# ruff: noqa: F811
import importlib.machinery
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_augment_telugu import (  # noqa: F401 (fixtures)
    SENTENCES,
    empty_root,
    pitch_of,
    synthesize,
    texts,
    voiced,
)

import augment_telugu as at
import command
import data
import engines
import speech


def line(voice="female", rate=1.0, semitones=0.0, seed=3):
    pitch = 2 ** (semitones / 12)
    return speech.Order(SENTENCES[0], "telugu", voice, pitch=pitch, rate=rate, seed=seed)


@pytest.fixture
def installed(monkeypatch):
    """Puts a folder in the place of an engine's model; hands back the engine."""

    def at_folder(name, folder):
        engine = replace(speech.find_engine(name), model=str(folder))
        monkeypatch.setattr(speech, "all_engines", lambda: {name: engine})
        at.own_voices.cache_clear()
        return engine

    yield at_folder
    at.own_voices.cache_clear()


def package(monkeypatch, name, **members):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def small_vits(tmp_path):
    """A random VITS of MMS' shape, small, with a tokenizer of Telugu letters."""
    transformers = pytest.importorskip("transformers")
    letters = sorted(set("".join(SENTENCES)) - set(" .,!?"))
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", " ", *letters, "<unk>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.VitsTokenizer(
        str(tmp_path / "vocab.json"), language="tel", phonemize=False, is_uroman=False
    )
    torch.manual_seed(0)
    config = transformers.VitsConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, ffn_dim=16, flow_size=16,
        spectrogram_bins=17, upsample_initial_channel=32, upsample_rates=[8, 8, 4],
        upsample_kernel_sizes=[16, 16, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1, duration_predictor_num_flows=1,
        duration_predictor_filter_channels=16, sampling_rate=16000,
    )  # fmt: skip
    folder = tmp_path / "vits"
    transformers.VitsModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_mms_speaks_through_transformers(small_vits, installed, empty_root, texts, monkeypatch):
    engine = installed("mms", small_vits)
    plain, again, fast = engine.say([line(), line(), line(rate=1.6)])
    assert plain.rate == 16000 and np.array_equal(plain.audio, again.audio)
    assert len(fast.audio) < 0.85 * len(plain.audio)
    (other,) = engine.say([line(seed=4)])
    assert not np.array_equal(other.audio[:100], plain.audio[:100])
    monkeypatch.setattr(at, "PHONE_SECONDS", (0.0, 100.0))  # it babbles
    arguments = ("--engine", "mms", "--text_file", str(texts))
    synthesize(empty_root, *arguments, "--synthesize_hours", "0.001")
    clips = data.read_manifest(empty_root / "synthetic_mms" / data.MANIFEST)
    assert clips and not any(clip.commercial_ok for clip in clips)
    assert {clip.speaker for clip in clips} == {"mms/mms"}


@pytest.fixture
def indictts(tmp_path, monkeypatch):
    """te.zip's folders, and coqui-tts' Synthesizer as far as the engine uses it."""
    folder = tmp_path / "te"
    for part in ("fastpitch", "hifigan"):
        (folder / part).mkdir(parents=True)
        (folder / part / "best_model.pth").write_bytes(b"")
        config = {"speakers_file": "/training/host/speakers.pth", "model_args": {"num_chars": 3}}
        config["model_args"]["speakers_file"] = "/training/host/speakers.pth"
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "fastpitch" / "speakers.pth").write_bytes(b"")

    class Synthesizer:
        output_sample_rate = 22050

        def __init__(self, *, tts_checkpoint, tts_config_path, vocoder_checkpoint,
                     vocoder_config, use_cuda):  # fmt: skip
            self.config = json.loads(Path(tts_config_path).read_text())
            self.files = (tts_checkpoint, vocoder_checkpoint, vocoder_config, use_cuda)
            manager = types.SimpleNamespace(speaker_names=["female", "male"])
            self.tts_model = types.SimpleNamespace(speaker_manager=manager, length_scale=1.0)

        def tts(self, text, speaker_name, split_sentences):
            assert text and speaker_name in ("female", "male") and not split_sentences
            hertz = 200 if speaker_name == "female" else 110
            said = voiced(hertz, 1.5 * self.tts_model.length_scale, 22050)
            return [*said, *([0] * 10000)]

    for name in ("TTS", "TTS.utils"):
        package(monkeypatch, name)
    package(monkeypatch, "TTS.utils.synthesizer", Synthesizer=Synthesizer)
    return folder


def test_indictts_is_handed_its_own_files(indictts, installed, empty_root, texts):
    engine = installed("indictts", indictts)
    model = engines._loaded(engine, "telugu")._model
    speakers = str((indictts / "fastpitch" / "speakers.pth").resolve())
    assert model.config["speakers_file"] == speakers
    assert model.config["model_args"] == {"num_chars": 3, "speakers_file": speakers}
    assert model.files == (
        str(indictts / "fastpitch" / "best_model.pth"),
        str(indictts / "hifigan" / "best_model.pth"),
        str(indictts / "hifigan" / "config.json"),
        torch.cuda.is_available(),
    )
    orders = [line(), line(rate=1.15), line(semitones=2.0), line(voice="male")]
    raws = engine.say(orders)
    assert {raw.rate for raw in raws} == {22050}
    plain, fast, high, man = (
        speech._finish(*pair).audio for pair in zip(raws, orders, strict=True)
    )
    assert 1.3 < len(plain) / 24000 < 1.7  # the second of silence behind it is cut
    assert len(fast) == pytest.approx(len(plain) / 1.15, rel=0.05)
    ratio = pitch_of(high, 24000) / pitch_of(plain, 24000)
    assert 12 * np.log2(ratio) == pytest.approx(2.0, abs=0.1)
    assert pitch_of(man, 24000) < 130
    synthesize(empty_root, "--text_file", str(texts))
    clips = data.read_manifest(empty_root / "synthetic_indictts" / data.MANIFEST)
    assert {clip.speaker for clip in clips} == {"indictts/female", "indictts/male"}
    assert {clip.license for clip in clips} == {"MIT (AI4Bharat Indic-TTS)"}
    engines._loaded.cache_clear()
    (indictts / "fastpitch" / "config.json").write_text("{")
    with pytest.raises(command.UserError, match=r"cannot be loaded .* wget -c .*/te.zip"):
        engine.say(orders)
    (indictts / "fastpitch" / "config.json").unlink()
    with pytest.raises(command.UserError, match="unzip -o te.zip"):
        engine.voices("telugu")


def test_parler_is_asked_in_words_and_cut_to_length(tmp_path, installed, monkeypatch):
    asked = {}

    class Tokens(dict):
        input_ids = attention_mask = "tokens"

        def to(self, device):
            return self

    class Model:
        config = types.SimpleNamespace(
            sampling_rate=44100, text_encoder=types.SimpleNamespace(_name_or_path="flan")
        )

        def to(self, device, dtype):
            assert dtype == torch.float32
            return self

        def eval(self):
            return self

        def generate(self, **more):
            asked.update(more)
            sound = torch.from_numpy(np.stack([voiced(150, 2.0, 44100)] * 2))
            return types.SimpleNamespace(sequences=sound, audios_length=[88200, 44100])

    def tokenizer(name, **more):
        def tokens(texts, return_tensors, padding):
            asked[name] = texts
            return Tokens()

        return tokens

    pretrained = types.SimpleNamespace(from_pretrained=lambda model: Model())
    package(monkeypatch, "parler_tts", ParlerTTSForConditionalGeneration=pretrained)
    tokenizers = types.SimpleNamespace(from_pretrained=tokenizer)
    package(monkeypatch, "transformers", AutoTokenizer=tokenizers)
    engine = installed("parler", tmp_path)
    orders = [line("Lalitha", 0.9, semitones=1.5), line("Kiran", 1.1)]
    raws = engine.say(orders)
    assert asked[str(tmp_path)] == [SENTENCES[0]] * 2 and asked["do_sample"]
    assert "Lalitha speaks with a high pitch at a slow pace" in asked["flan"][0]
    assert "Kiran speaks with a moderate pitch at a fast pace" in asked["flan"][1]
    assert not raws[0].remaining  # asked for in words
    for raw, order, seconds in zip(raws, orders, (2.0, 1.0), strict=True):
        audio = speech._finish(raw, order).audio
        assert len(audio) / 24000 == pytest.approx(seconds, abs=0.1)


def test_piper_reads_a_folder_of_voices(tmp_path, installed, monkeypatch):
    class Voice:
        @staticmethod
        def load(path, use_cuda):
            assert path.endswith(".onnx") and not use_cuda
            return Voice()

        def synthesize(self, text, syn_config):
            said = voiced(150, 1.2 * syn_config.length_scale, 22050)
            sound = (said * 32767).astype(np.int16).tobytes()
            return iter([types.SimpleNamespace(audio_int16_bytes=sound, sample_rate=22050)])

    def config(length_scale):
        return types.SimpleNamespace(length_scale=length_scale)

    engine = installed("piper", tmp_path)
    package(monkeypatch, "piper", PiperVoice=Voice, SynthesisConfig=config)
    with pytest.raises(command.UserError, match="download_voices te_IN-maya-medium"):
        engine.voices("telugu")
    for name in ("te_IN-maya-medium", "en_US-lessac-medium"):
        (tmp_path / f"{name}.onnx").touch()
    assert {voice.name for voice in engine.voices("telugu")} == {"te_IN-maya-medium"}
    slow, plain = engine.say([line("te_IN-maya-medium", 0.8), line("te_IN-maya-medium")])
    assert len(slow.audio) == pytest.approx(len(plain.audio) / 0.8, rel=0.05)
    assert np.abs(plain.audio).max() == pytest.approx(0.4, abs=0.02)


def test_voices_are_listed_without_loading_or_fetching(small_vits, installed, monkeypatch):
    monkeypatch.setattr(engines, "_loaded", None)
    engine = installed("mms", small_vits)
    assert {voice.role for voice in engine.voices("hindi")} == {"agent", "user"}
    away = replace(engine, model="facebook/not-in-the-cache-{code}")
    with pytest.raises(command.UserError, match="hf download facebook/mms-tts-hin"):
        away.voices("hindi")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(command.UserError, match="pip install transformers"):
        engine.voices("hindi")


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path, installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "parler_tts", None)
    with pytest.raises(command.UserError, match="pip install parler-tts"):
        installed("parler", tmp_path).say([line("Kiran")])
    monkeypatch.undo()
    with pytest.raises(command.UserError, match="cannot be loaded .* hf download"):
        installed("mms", tmp_path / "no").say([line("mms")])
