"""The probe of codebook 0 on codes whose answer is known, and in its command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate_codec import checkpoint, codec, corpus, speech  # noqa: F401

from audio import write_audio
from command import UserError
from data import Clip, read_manifest, write_manifest
from tools import phone_probe, probe_codec
from tools.phone_probe import codes_and_phones, count_pairs, fit_logistic, probe, probe_clips

PHONES = ("_", "a", "b", "c", "d")


def spoken(clips: int, seed: int, hold: int = 5) -> list[np.ndarray]:
    """Phone ids `[F]` a clip, each phone `hold` frames long."""
    rng = np.random.default_rng(seed)
    return [np.repeat(rng.integers(0, len(PHONES), 60), hold) for _ in range(clips)]


def one_hot(size: int = len(PHONES)) -> torch.Tensor:
    return torch.eye(size) + 0.3


def late(labels: np.ndarray, frames: int) -> np.ndarray:
    return np.concatenate([np.zeros(frames, np.int64), labels[: len(labels) - frames]])


def test_codes_that_are_the_phones_make_no_errors():
    fit, scored = ([(x, x) for x in spoken(4, seed)] for seed in (0, 1))
    found = probe(fit, scored, one_hot(), PHONES)
    assert found["error"] == found["speech_error"] == found["table_error"] == 0
    assert found["delay_frames"] == 0 and found["errors"][0] == 0
    # Held for 5 frames, a phone moved by one is wrong in a fifth of the frames, but for repeats.
    assert found["errors"][1] == pytest.approx(0.2 * 0.8, abs=0.03)
    silence = np.mean(np.concatenate([x[:-8] for x, _ in scored]) == 0)
    assert found["silence_labelled"] == found["silence_guessed"] == pytest.approx(silence, abs=1e-4)


@pytest.mark.parametrize("delay", [1, 3, 8])
def test_codes_that_speak_late_are_heard_late(delay):
    fit, scored = ([(late(x, delay), x) for x in spoken(4, seed)] for seed in (0, 1))
    found = probe(fit, scored, one_hot(), PHONES)
    assert found["delay_frames"] == delay and found["delay_ms"] == 20 * delay
    assert found["error"] == 0 == found["errors"][delay]
    assert min(e for k, e in enumerate(found["errors"]) if k != delay) > 0.1


def test_codes_that_know_nothing_do_no_better_than_chance():
    rng = np.random.default_rng(0)
    fit, scored = ([(rng.integers(0, 16, len(x)), x) for x in spoken(20, s)] for s in (0, 1))
    found = probe(fit, scored, torch.randn(16, 8), PHONES)
    assert found["error"] > 0.72 and found["chance_error"] == pytest.approx(0.8, abs=0.04)
    assert found["commonest_code"] == pytest.approx(1 / 16, abs=0.02)


def test_a_blank_that_most_frames_turn_into_is_seen():
    """As CTC makes them: one code a phone, the blank in between."""
    rows = []
    for x in spoken(6, 0):
        codes = np.full(len(x), 5)
        codes[2::5] = x[2::5]
        rows.append((codes, x))
    found = probe(rows[:3], rows[3:], one_hot(6), PHONES)
    assert found["commonest_code"] == pytest.approx(0.8, abs=0.01)


def test_counts_are_the_slow_ones():
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 4, n), rng.integers(-1, 3, n)) for n in (30, 12, 5)]
    rows = [(codes, np.where(labels < 0, -100, labels)) for codes, labels in rows]
    for delay in (0, 3, 8):
        slow = np.zeros((4, 3))
        for codes, labels in rows:
            for f in range(len(codes) - 8):
                if labels[f] >= 0:
                    slow[codes[f + delay], labels[f]] += 1
        assert np.array_equal(count_pairs(rows, delay, 4, 3), slow)


def test_logistic_regression_finds_the_optimum():
    """Against plain descent on every frame; scale and offset of the vectors play no part."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, (12, 4)).astype(float)
    vectors = torch.from_numpy(rng.normal(size=(12, 3)))
    guess = fit_logistic(vectors, counts)
    assert np.array_equal(guess, fit_logistic(100 * vectors + 7, counts))
    codes, labels = (np.repeat(i.ravel(), counts.astype(int).ravel()) for i in np.indices((12, 4)))
    x, y = vectors[codes], torch.from_numpy(labels)
    model = torch.nn.Linear(3, 4).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(600):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert np.array_equal(guess, model(vectors).argmax(-1).numpy())


def clip(speaker: str | None, labelled: bool = True, name: str = "x") -> Clip:
    phones = [["a", 0.0, 1.0]] if labelled else None
    return Clip(Path(f"/{name}.wav"), 1.0, 24000, "english", speaker, phones=phones)


def test_no_speaker_is_both_fitted_and_scored():
    fit = [
        clip("a"),
        clip("b"),
        clip("c", labelled=False),
        clip(None, name="p"),
        clip(None, name="q"),
    ]
    scored = [clip("b"), clip("d"), clip("e", labelled=False), clip(None, name="q")]
    chosen = probe_clips(fit, scored, "data")
    assert [c.speaker or c.path.name for c in chosen[0]] == ["a", "p.wav"]
    assert [c.speaker or c.path.name for c in chosen[1]] == ["b", "d", "q.wav"]
    with pytest.raises(UserError, match="another --split"):
        probe_clips(fit, [clip("e", labelled=False)], "data")
    with pytest.raises(UserError, match="other speakers"):
        probe_clips([clip("b")], scored, "data")
    short = [(np.zeros(4, np.int64), np.zeros(4, np.int64))]
    with pytest.raises(UserError, match="shorter than 9 frames"):
        probe(short, short, one_hot(), PHONES)


def test_codes_are_those_that_ship_and_labels_lie_on_their_frames(codec, speech, tmp_path):  # noqa: F811
    write_audio(tmp_path / "a.wav", speech[:24000])
    phones = [["a", 0.0, 0.5], ["b", 0.5, 0.8]]
    one = Clip(tmp_path / "a.wav", 1.0, 24000, "english", "s", phones=phones)
    missing = Clip(tmp_path / "none.wav", 1.0, 24000, "english", "s", phones=phones)
    ((codes, labels),) = codes_and_phones(codec, [missing, one], 10.0)
    audio = torch.from_numpy(phone_probe.read_audio(one.path))
    assert np.array_equal(codes, codec.encode(audio[None, None], 1)[0, 0].numpy())
    ids = [phone_probe.PHONES.index(p) for p in "ab"]
    assert labels.tolist() == [ids[0]] * 25 + [ids[1]] * 15 + [-100] * 10


def test_the_command_probes(checkpoint, corpus, capsys, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(phone_probe, "MAX_DELAY", 1)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    flags = ["--codecs", str(checkpoint), str(other), "--data_dirs"]
    with pytest.raises(UserError, match="none in the train split|no clip"):
        probe_codec.main([*flags, str(corpus)])

    # The same recordings, labelled, the first half of the speakers for training.
    folder = tmp_path / "data"
    clips = [c for c in read_manifest(corpus / "manifest.jsonl") if c.duration >= 1]
    phones = [[p, 0.2 * i, 0.2 * (i + 1)] for i, p in enumerate("_kat_man_a")]
    splits = ("train", "test", "train", "test", "test", "test")
    labelled = [
        replace(c, phones=phones, split=split) for c, split in zip(clips, splits, strict=False)
    ]
    write_manifest(folder / "manifest.jsonl", labelled)
    probe_codec.main([*flags, str(folder), "--split", "test"])
    printed = capsys.readouterr().out
    assert "linear probe of codebook 0" in printed and "2 speakers" in printed
    table = printed[printed.index("linear probe") :].splitlines()[:5]
    assert len(table[3].split()) == len(table[4].split()) and max(map(len, table)) <= 80
    result = json.loads(printed.splitlines()[-1])
    own, beside = result[str(checkpoint)], result[str(other)]
    assert own == beside and 0 <= own["error"] <= 1 and len(own["errors"]) == 2
