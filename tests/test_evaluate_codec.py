"""The codec's evaluation: formulas against slow ones, rates against file sizes, odd clips."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import command
import evaluate_codec as e
from audio import SAMPLE_RATE, read_audio, write_audio
from codec import Codec, CodecConfig
from command import UserError
from data import Clip, write_manifest
from evaluate_codec import Row

SPOKEN = e.HERE / "samples" / "question_english.wav"


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Two seconds of a spoken question `[T]`."""
    return read_audio(SPOKEN)[: 2 * SAMPLE_RATE]


@pytest.fixture(scope="module")
def codec() -> Codec:
    """Random weights, eight codebooks, heard at the level of speech."""
    torch.manual_seed(0)
    model = Codec(CodecConfig.tiny()).eval().requires_grad_(False)
    model.decoder[-1].linear.weight.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(codec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    config = checkpoints.stored_config("codec", codec.config)
    checkpoints.save_export(folder, 7, config, codec.export_tensors())
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Timing that takes no time."""
    monkeypatch.setattr(e, "TIMED_SECONDS", 0.16)
    monkeypatch.setattr(e, "TIMED_ROUNDS", 2)


@pytest.fixture(scope="module")
def corpus(speech, tmp_path_factory) -> Path:
    """English and Hindi clips, and one of every kind that must not end the run."""
    folder = tmp_path_factory.mktemp("data")
    broken = folder / "broken.flac"
    files = {
        "plain": (speech, SAMPLE_RATE, "english"),
        "plain_hindi": (speech[::-1].copy(), SAMPLE_RATE, "hindi"),
        "short": (speech[:6000], SAMPLE_RATE, "english"),
        "silent": (np.zeros(SAMPLE_RATE * 2, np.float32), SAMPLE_RATE, "english"),
        "loud": (np.clip(60 * speech, -1, 1), SAMPLE_RATE, "english"),
        "narrow": (speech[::3].copy(), 8000, "english"),
    }
    clips = []
    for name, (audio, rate, language) in files.items():
        path = folder / f"{name}.wav"
        write_audio(path, audio, rate)
        clips.append(Clip(path, len(audio) / rate, rate, language, name, split="test"))
    write_audio(broken, speech)
    broken.write_bytes(broken.read_bytes()[:900])
    clips.append(Clip(broken, 2.0, SAMPLE_RATE, "english", "broken", split="test"))
    write_manifest(folder / "manifest.jsonl", clips)
    return folder


def row(codec="samvad", kbps=4.0, clip="a", seconds=2.0, bits=8000, language="english", **scores):
    return Row(clip, language, seconds, codec, kbps, bits, scores)


def likeness():
    """Makes a judge that needs no package: the cosine of two waveforms."""
    return lambda x, y: float(x @ y / max(1e-9, np.linalg.norm(x) * np.linalg.norm(y)))


def refused(capsys, *flags, code: int = 1) -> str:
    """The one line that a run ends in."""
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: e.main([str(flag) for flag in flags]))
    assert stop.value.code == code
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------------------------- formulas


def test_snr_and_si_sdr_are_the_slow_formulas():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.1, 400)
    y = 0.7 * x + rng.normal(0, 0.02, 400) + 0.05
    signal = noise = 0.0
    for a, b in zip(x, y, strict=True):
        signal, noise = signal + a * a, noise + (a - b) ** 2
    centred_x, centred_y = x - sum(x) / 400, y - sum(y) / 400
    scale = sum(centred_x * centred_y) / sum(centred_x * centred_x)
    along, across = scale * centred_x, centred_y - scale * centred_x
    scores = e.waveform_scores(y, x)
    assert scores["snr"] == pytest.approx(10 * math.log10(signal / noise))
    ratio = sum(along * along) / sum(across * across)
    assert scores["si_sdr"] == pytest.approx(10 * math.log10(ratio))
    assert e.waveform_scores(x, x)["snr"] == pytest.approx(100)
    assert e.waveform_scores(0 * x, x)["snr"] == pytest.approx(0)


def test_perplexity_is_the_exponential_of_the_entropy():
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 12, 500), rng.integers(0, 8, 500)])
    counts = [np.bincount(row[:400], minlength=n) for row, n in zip(codes, (16, 8), strict=True)]
    found = e.codebook_use(counts)
    for k, (size, shown) in enumerate(zip((16, 8), found["codebooks"], strict=True)):
        shares = [np.mean(codes[k, :400] == code) for code in range(size)]
        entropy = -sum(p * math.log(p) for p in shares if p)
        assert shown["perplexity"] == pytest.approx(math.exp(entropy), abs=0.01)
        assert shown["perplexity_share"] == pytest.approx(math.exp(entropy) / size, abs=1e-3)
        assert shown["used"] == pytest.approx(sum(p > 0 for p in shares) / size, abs=1e-3)
    assert found["speech_frames"] == 400 and not found["too_few_frames"]


def test_speech_is_within_forty_decibels_of_the_loudest_frame():
    audio = np.concatenate([np.full(480, level) for level in (1.0, 0.02, 0.005, 0.0)] + [[0.5] * 9])
    assert e.speech_frames(audio, 480).tolist() == [True, True, False, False, True]


def test_rates_are_half_a_kilobit_a_codebook_and_codes_do_not_depend_on_how_many(codec, speech):
    assert e.kbps_of(CodecConfig.tiny(), 8) == pytest.approx(4.0)
    uneven = replace(CodecConfig.tiny(), codebook_sizes=(512, 1024))
    assert e.kbps_of(uneven, 2) == pytest.approx(19 * 50 / 1000)
    audio = speech[:24100]  # 51 frames, the last one filled up
    coded, codes = e.code_samvad(codec, audio, [1, 4, 8])
    assert codes.shape == (8, 51)
    assert list(coded) == [("samvad", 0.5), ("samvad", 2.0), ("samvad", 4.0)]
    for count, got in zip((1, 4, 8), coded.values(), strict=True):
        batch = torch.from_numpy(audio)[None, None]
        alone = codec.decode(codec.encode(batch, count))[0, 0, :24100].clamp(-1, 1)
        np.testing.assert_allclose(got.audio, alone.numpy(), atol=1e-5)
        assert got.bits == 51 * 10 * count


def test_a_diverged_codec_is_told_in_one_line(codec, speech):
    diverged = Codec(codec.config).eval()
    diverged.decoder[-1].linear.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        e.code_samvad(diverged, speech, [8])


# ---------------------------------------------------------------------------------- clips


def test_clips_are_drawn_evenly_over_speakers():
    clips = [
        Clip(Path(f"/d/{s}/{i}.wav"), 2.0, 24000, language, s if s != "none" else None)
        for language, counts in {"english": {"a": 50, "b": 3, "none": 2}, "hindi": {"c": 4}}.items()
        for s, n in counts.items()
        for i in range(n)
    ]
    drawn = e.draw_clips(clips, 8, seed=3)
    assert [c.language for c in drawn] == ["english"] * 8 + ["hindi"] * 4
    speakers = [c.speaker for c in drawn[:8]]
    assert [speakers.count(s) for s in ("a", "b", None)] == [3, 3, 2]
    assert len(set(drawn)) == len(drawn)
    assert drawn == e.draw_clips(clips[::-1], 8, seed=3) != e.draw_clips(clips, 8, seed=4)


def test_each_odd_clip_is_skipped_for_a_reason(corpus):
    kinds = {}
    for name in ("plain", "short", "silent", "loud", "broken"):
        clip = Clip(next(corpus.glob(f"{name}.*")), 2.0, 24000, "english")
        try:
            kinds[name] = len(e.read_clip(clip, 1.5, 12000))
        except e.Skipped as reason:
            kinds[name] = str(reason)
    assert kinds == {
        "plain": 36000, "short": "too short", "silent": "silent", "loud": 36000,
        "broken": "unreadable",
    }  # fmt: skip


# ---------------------------------------------------------------------------------- judges


def ask(name, *audio):
    """What that judge says."""
    judges = e.load_judges([name])
    if not judges:
        pytest.skip(e.JUDGES[name][1])
    return e.judge(judges, *audio)[name]


@pytest.mark.parametrize(("name", "perfect"), [("pesq", 4.64), ("stoi", 1.0)])
def test_judges_that_compare(name, perfect, speech):
    reference = e.for_judges(speech)
    noisy = reference + 0.1 * np.random.default_rng(0).standard_normal(len(reference), np.float32)
    assert ask(name, reference.copy(), reference) == pytest.approx(perfect, abs=0.01)
    assert ask(name, noisy, reference) < 0.95 * perfect
    assert ask(name, noisy[:200], reference[:200]) is None
    silence = ask(name, np.zeros_like(reference), reference)
    assert silence is None or silence < 0.9


def test_the_judge_of_mos_needs_no_reference(speech, capsys):
    reference = e.for_judges(speech)
    noisy = reference + 0.1 * np.random.default_rng(0).standard_normal(len(reference), np.float32)
    assert 1 <= ask("mos", noisy) < ask("mos", reference) <= 5
    assert capsys.readouterr().out == ""


def test_a_missing_judge_costs_its_column_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pesq", None)
    monkeypatch.setitem(e.JUDGES, "stoi", (likeness, ""))
    assert list(e.load_judges(["pesq", "stoi"])) == ["stoi"]
    assert "pip install pesq" in capsys.readouterr().err


def test_what_a_judge_cannot_measure_is_none(capsys):
    def stumbling(audio, reference):
        raise ZeroDivisionError("no frames")

    judges = {"pesq": stumbling, "stoi": lambda *_: math.nan, "mos": lambda *_: np.float32(3)}
    audio = np.ones(5, np.float32)
    assert e.judge(judges, audio, audio) == {"pesq": None, "stoi": None, "mos": 3.0}
    assert e.judge(judges, audio) == {"mos": 3.0}
    assert capsys.readouterr().err.count("pesq failed on a clip: no frames") == 1


# ---------------------------------------------------------------------------------- summaries


def two_clips():
    points = [("samvad", 4.0), ("speex", 3.95)]
    rows = [
        Row("a", "english", 2.0, "uncoded", 0.0, 0, {"mos": 4.0}),
        row(clip="a", snr=8.0, pesq=2.0, mos=3.0),
        row("speex", 3.95, "a", snr=6.0, pesq=2.0, mos=3.5),
        Row("b", "english", 6.0, "uncoded", 0.0, 0, {"mos": 5.0}),
        row(clip="b", seconds=6.0, bits=24800, snr=10.0, pesq=None, mos=2.0),
        row("speex", 3.95, "b", 6.0, snr=7.0, pesq=1.0, mos=1.0),
    ]
    return rows, points


def test_means_and_rates():
    rows, points = two_clips()
    found = e.summarise(rows, points)
    assert found["clips"] == 2 and found["seconds"] == 8.0
    assert found["uncoded"]["scores"] == {"mos": 4.5}
    own = found["points"][0]
    assert own["scores"] == {"snr": 9.0, "pesq": 2.0, "mos": 2.5}
    assert own["measured"] == {"snr": 2, "pesq": 1, "mos": 2}
    assert own["net_kbps"] == pytest.approx(32800 / 8000)


def a_group(**scores) -> dict:
    rows, points = two_clips()
    group = e.summarise(rows, points)
    group["points"][0]["scores"] |= scores
    books = [{"size": 8, "used": 1.0, "perplexity": 4.0, "perplexity_share": 0.5}] * 3
    group["codebooks"] = {"speech_frames": 90, "too_few_frames": False, "codebooks": books}
    return group | {"speakers": 0}


def some_times(step=0.1) -> dict:
    factors = {"offline": 0.02, "stream_40ms": step, "stream_80ms": 0.05}
    return {"device": "cpu", "num_codebooks": 8, "factors": factors}


def verdicts(group, times, spent=None) -> dict:
    groups = {"english": group, "all": group}
    return {r["criterion"]: r for r in e.criteria(groups, times, CodecConfig.tiny(), spent)}


def test_criteria_are_met_not_met_or_not_measured():
    found = verdicts(a_group(snr=20.5, si_sdr=7.9, stoi=0.9), some_times())
    met = {name: r["met"] for name, r in found.items()}
    assert met == {
        "SNR at the full rate, 4 kbit/s": True,
        "SI-SDR at 4 kbit/s": False,
        "predicted MOS at 4 kbit/s": False,
        "end-to-end latency (evaluate_s2s.py)": None,
        "languages evaluated here": False,
        "training cost so far (costs.jsonl)": None,
        "PESQ-WB at 4 kbit/s": False,
        "STOI at 4 kbit/s": True,
        "perplexity/size, least acoustic one": True,
        "codes in use, least used level": True,
        "real-time factor, 40 ms steps": True,
    }
    assert found["predicted MOS at 4 kbit/s"]["beside"] == "uncoded 4.50"
    found = verdicts(a_group(), some_times(0.3), spent=1600.0)
    assert not found["training cost so far (costs.jsonl)"]["met"]
    assert not found["real-time factor, 40 ms steps"]["met"]


def test_few_frames_never_prove_a_codebook_bad():
    group = a_group()
    poor = {"size": 8, "used": 0.5, "perplexity": 2.0, "perplexity_share": 0.25}
    group["codebooks"] = {"speech_frames": 9, "too_few_frames": True, "codebooks": [poor] * 2}
    found = verdicts(group, some_times())
    assert found["perplexity/size, least acoustic one"]["met"] is None
    group["codebooks"]["too_few_frames"] = False
    assert verdicts(group, some_times())["codes in use, least used level"]["met"] is False


def test_tables_fit_eighty_columns():
    group = a_group(si_sdr=-31.25, stoi=0.9, pesq=None)
    rows = e.criteria({"all": group}, some_times(), CodecConfig.tiny(), None)
    books = e.codebook_line(group["codebooks"])
    text = "\n".join([e.table("english", group), books, e.criteria_table(rows)])
    assert max(map(len, text.splitlines())) <= 80
    assert "clips that a judge could measure: " in text and "PESQ 1" in text
    assert "not measured" in text and "unknown speakers" in text


# ---------------------------------------------------------------------------------- time


def test_every_way_is_timed(codec, quick):
    factors = e.real_time_factors(codec)["factors"]
    assert all(factors[name] > 0 for name in ("offline", "stream_40ms", "stream_80ms"))


# ---------------------------------------------------------------------------------- the script


def test_the_whole_run(checkpoint, corpus, tmp_path, quick, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    monkeypatch.setitem(e.JUDGES, "stoi", (likeness, ""))
    monkeypatch.chdir(tmp_path)
    output, picture = tmp_path / "out.json", tmp_path / "rates.png"
    e.main([
        "--codec", str(checkpoint), "--data_dirs", str(corpus), "--judges", "stoi",
        "--output", str(output), "--plot", str(picture), "--device", "cpu",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    whole = json.loads(output.read_text())
    rows = whole.pop("rows")
    assert whole == summary and picture.stat().st_size > 10_000
    assert summary["skipped"] == {"too short": 1, "silent": 1, "unreadable": 1}
    assert list(summary["groups"]) == ["english", "hindi", "all"]
    assert summary["num_codebooks"] == [2, 4, 8]
    assert summary["fingerprint"] == Codec.from_checkpoint(checkpoint).fingerprint

    pooled = summary["groups"]["all"]
    assert pooled["clips"] == 4 and pooled["speakers"] == 4
    assert len(rows) == 4 * (1 + 3)
    assert [p["net_kbps"] for p in pooled["points"]] == pytest.approx([1, 2, 4], rel=0.01)
    mean = np.mean([r["scores"]["snr"] for r in rows if r["asked_kbps"] == 2])
    assert pooled["points"][1]["scores"]["snr"] == pytest.approx(mean, abs=1e-3)
    assert max(map(len, printed.splitlines()[4:-1])) <= 80
    assert "skipped: 1 silent, 1 too short, 1 unreadable" in printed
    assert "not measured, for want of clips: telugu" in printed


def test_the_agents_decoder_is_reported_apart(checkpoint, corpus, tmp_path, quick, capsys):
    """`--decoder agent`: other sound from the same codes; without one of its own, one line."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "codec"))
    flags = ["--codec", str(folder), "--data_dirs", str(corpus), "--judges", "stoi",
             "--max_clips", "1", "--codebooks", "8", "--device", "cpu"]  # fmt: skip
    assert "agent.safetensors" in refused(capsys, *flags, "--decoder", "agent")
    other = Codec.from_checkpoint(folder)
    other.decoder[-1].linear.bias += 1
    other.export_decoder(folder)
    found = {}
    for decoder in ("general", "agent"):
        e.main([*flags, "--decoder", decoder])
        printed = capsys.readouterr().out
        assert f", {decoder} decoder, " in printed
        found[decoder] = json.loads(printed.splitlines()[-1])
        assert found[decoder]["decoder"] == decoder
    assert found["agent"]["fingerprint"] == found["general"]["fingerprint"]
    of_all = [found[d]["groups"]["all"]["points"][0]["scores"]["snr"] for d in ("general", "agent")]
    assert of_all[0] != of_all[1]


def test_nothing_left_to_evaluate_says_why(checkpoint, tmp_path, quick, capsys):
    silence = tmp_path / "silent.wav"
    write_audio(silence, np.zeros(2 * SAMPLE_RATE, np.float32))
    clips = [Clip(silence, 2.0, SAMPLE_RATE, "telugu", "x", split="test")]
    write_manifest(tmp_path / "manifest.jsonl", clips)
    flags = ("--codec", checkpoint, "--data_dirs", tmp_path, "--device", "cpu", "--judges", "stoi")
    assert "no clip could be evaluated (1 silent)" in refused(capsys, *flags)
    assert "(choose another --split)" in refused(capsys, *flags, "--split", "validation")
    assert "(1 too short)" in refused(capsys, *flags, "--min_seconds", 3, "--max_seconds", 2)
    assert "from 1 to 8" in refused(capsys, *flags, "--codebooks", 9)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", "/proc/nowhere/all.json"], "--output /proc/nowhere: cannot be written"),
        (["--output", "/tmp"], "--output /tmp: cannot be written (Is a directory)"),
        (["--device", "cuda:7"], "--device"),
        (["--codec", "/nowhere"], "/nowhere: no such checkpoint folder"),
    ],
)
def test_bad_flags_end_in_one_line(flags, said, capsys):
    assert said in refused(capsys, "--device", "cpu", *flags)


@pytest.mark.parametrize(
    "flag",
    ["--max_clips 0", "--seed -1", "--min_seconds nan", "--max_seconds inf",
     "--codebooks 0 4", "--split all", "--max 3", "--judges ear"],
)  # fmt: skip
def test_flags_out_of_range_end_in_one_line(flag, capsys):
    assert flag.split()[0] in refused(capsys, *flag.split(), code=2)


@pytest.mark.parametrize(("name", "said"), [("x.mp4x", "end the name in"), ("same.png", "too")])
def test_a_plot_that_cannot_be_drawn_is_refused_at_once(name, said, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, "--plot", name, "--output", "same.png")


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(capsys, "--plot", "rates.png")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_captured_as_a_cuda_graph_says_what_the_eager_one_does(codec):
    own = Codec(codec.config).eval().requires_grad_(False)
    own.load_state_dict(codec.state_dict())
    own.cuda()
    audio = 0.1 * torch.randn(1, 1, 20 * SAMPLE_RATE // 25, device="cuda")
    encoder, decoder = own.init_encoder_state(1), own.init_decoder_state(1)
    steps = audio.split(2 * own.config.hop, dim=-1)
    eager = [own.decode_step(own.encode_step(x, encoder), decoder) for x in steps]
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        graphed = e.stepper(own, 2, 8, graph=True)(audio)
        torch.cuda.synchronize()
    torch.testing.assert_close(graphed, torch.cat(eager, dim=-1), rtol=0, atol=1e-4)
