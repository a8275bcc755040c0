"""The engines behind fakes of their packages, and a VITS of random weights."""

# ruff: noqa: F811
import json
import sys
import types
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


def line(text=SENTENCES[0], voice="female", rate=1.0, semitones=0.0, seed=3):
    return engines.Sentence(text, voice, rate, semitones, seed)


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


def test_mms_speaks_through_transformers(small_vits, empty_root, texts, monkeypatch):
    engine = engines.Mms("telugu", str(small_vits), "cpu")
    plain, again, fast = engine.say([line(), line(), line(rate=1.6)])
    assert plain.sample_rate == 16000 and np.array_equal(plain.audio, again.audio)
    assert len(fast.audio) < 0.85 * len(plain.audio)
    (other,) = engine.say([line(seed=4)])
    assert not np.array_equal(other.audio[:100], plain.audio[:100])
    arguments = ("--engine", "mms", "--model", str(small_vits), "--text_file", str(texts))
    synthesize(empty_root, *arguments, "--check", "none", "--synthesize_hours", "0.001")
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

    module = types.ModuleType("TTS.utils.synthesizer")
    module.Synthesizer = Synthesizer
    monkeypatch.setitem(sys.modules, "TTS", types.ModuleType("TTS"))
    monkeypatch.setitem(sys.modules, "TTS.utils", types.ModuleType("TTS.utils"))
    monkeypatch.setitem(sys.modules, "TTS.utils.synthesizer", module)
    at._engine.cache_clear()
    return folder


def test_indictts_is_handed_its_own_files(indictts, empty_root, texts):
    engine = engines.IndicTts("telugu", str(indictts), "cpu")
    assert engine.voices == ("female", "male")
    speakers = str((indictts / "fastpitch" / "speakers.pth").resolve())
    assert engine._model.config["speakers_file"] == speakers
    assert engine._model.config["model_args"] == {"num_chars": 3, "speakers_file": speakers}
    assert engine._model.files == (
        str(indictts / "fastpitch" / "best_model.pth"),
        str(indictts / "hifigan" / "best_model.pth"),
        str(indictts / "hifigan" / "config.json"),
        False,
    )
    plain, fast, high, man = engine.say(
        [line(), line(rate=1.15), line(semitones=2.0), line(voice="male")]
    )
    assert {raw.sample_rate for raw in (plain, fast, high, man)} == {22050}
    (plain, _), (fast, _), (high, _), (man, _) = map(at._finished, (plain, fast, high, man))
    assert 1.3 < len(plain) / 22050 < 1.7  # the second of silence behind it is cut
    assert len(fast) == pytest.approx(len(plain) / 1.15, rel=0.05)
    ratio = pitch_of(high, 22050) / pitch_of(plain, 22050)
    assert 12 * np.log2(ratio) == pytest.approx(2.0, abs=0.1)
    assert pitch_of(man, 22050) < 130
    synthesize(empty_root, "--model", str(indictts), "--text_file", str(texts), "--device", "cpu")
    clips = data.read_manifest(empty_root / "synthetic_indictts" / data.MANIFEST)
    assert {clip.speaker for clip in clips} == {"indictts/female", "indictts/male"}
    assert {clip.license for clip in clips} == {"MIT (AI4Bharat Indic-TTS)"}


def test_parler_is_told_in_words_and_cut_to_length(monkeypatch):
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

    fake = types.ModuleType("parler_tts")
    fake.ParlerTTSForConditionalGeneration = types.SimpleNamespace(
        from_pretrained=lambda model: Model()
    )
    others = types.ModuleType("transformers")
    others.AutoTokenizer = types.SimpleNamespace(from_pretrained=tokenizer)
    monkeypatch.setitem(sys.modules, "parler_tts", fake)
    monkeypatch.setitem(sys.modules, "transformers", others)
    engine = engines.Parler("telugu", "indic", "cpu")
    first, second = engine.say(
        [line(voice="Lalitha", rate=0.9, semitones=1.5), line(voice="Kiran", rate=1.1)]
    )
    assert asked["indic"] == [SENTENCES[0]] * 2 and asked["do_sample"]
    assert "Lalitha speaks with a high pitch at a slow pace" in asked["flan"][0]
    assert "Kiran speaks with a moderate pitch at a fast pace" in asked["flan"][1]
    assert first.semitones == 0.0  # asked for in words
    for raw, seconds in ((first, 2.0), (second, 1.0)):
        audio, rate = at._finished(raw)
        assert rate == 24000 and len(audio) / rate == pytest.approx(seconds, abs=0.1)


def test_piper_reads_a_folder_of_voices(tmp_path, monkeypatch):
    class Voice:
        @staticmethod
        def load(path, use_cuda):
            assert path.endswith(".onnx") and not use_cuda
            return Voice()

        def synthesize(self, text, syn_config):
            said = voiced(150, 1.2 * syn_config.length_scale, 22050)
            sound = (said * 32767).astype(np.int16).tobytes()
            return iter([types.SimpleNamespace(audio_int16_bytes=sound, sample_rate=22050)])

    module = types.ModuleType("piper")
    module.PiperVoice = Voice
    module.SynthesisConfig = lambda length_scale: types.SimpleNamespace(length_scale=length_scale)
    monkeypatch.setitem(sys.modules, "piper", module)
    with pytest.raises(command.UserError, match="download_voices te_IN-maya-medium"):
        engines.Piper("telugu", str(tmp_path), "cpu")
    (tmp_path / "te_IN-maya-medium.onnx").touch()
    engine = engines.Piper("telugu", str(tmp_path), "cpu")
    assert engine.voices == ("te_IN-maya-medium",)
    slow, plain = engine.say(
        [line(voice="te_IN-maya-medium", rate=0.8), line(voice="te_IN-maya-medium")]
    )
    assert len(slow.audio) == pytest.approx(len(plain.audio) / 0.8, rel=0.05)
    assert np.abs(plain.audio).max() == pytest.approx(0.4, abs=0.02)
