"""Hold-out by voice: halves, means and the nearest pair against a slow search."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from audio import SAMPLE_RATE, write_audio
from data import Clip, write_manifest
from tools import hold_out


def unit(rng, *shape):
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_the_nearest_pair_is_that_of_a_slow_search():
    rng = np.random.default_rng(0)
    held_out, known = unit(rng, 3, 2, 5), unit(rng, 4, 2, 5)
    found = hold_out.compare_voices(held_out, known)

    def cosine(i, j):
        a, b = held_out[i].mean(0), known[j].mean(0)
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    best = max(itertools.product(range(3), range(4)), key=lambda pair: cosine(*pair))
    assert (found["held_out"], found["nearest"]) == best
    assert found["max_cosine"] == pytest.approx(cosine(*best), abs=1e-4)
    same = np.median([one @ other for one, other in known])
    assert found["same_voice_cosine"] == pytest.approx(same, abs=1e-4)


class ByLoudness:
    """Stands for Resemblyzer: a voice is how loud it is."""

    def __call__(self, audio, sample_rate):
        assert sample_rate == SAMPLE_RATE
        angle = 10 * float(np.abs(audio).mean())
        return np.array([np.cos(angle), np.sin(angle)])


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.setattr(hold_out, "VoiceEmbedder", ByLoudness)

    def make(speaker, level, count=2, seconds=3.5, **fields):
        made = []
        for i in range(count):
            path = tmp_path / f"{speaker}-{level}-{i}.wav"
            write_audio(path, np.full(int(seconds * SAMPLE_RATE), level, np.float32))
            made.append(Clip(path, seconds, SAMPLE_RATE, "english", speaker, **fields))
        return made

    return make


def test_clips_of_a_speaker_in_two_corpora_are_found(clips):
    known = clips("ann", 0.1) + clips("ben", 0.05) + clips("carl", 0.01)
    found = hold_out.check_clips(clips("dora", 0.08) + clips("ben again", 0.0501), known)
    assert (found["held_out"], found["nearest"]) == ("ben again", "ben")
    assert found["voices"] == 2 and found["known_voices"] == 3
    assert found["max_cosine"] > 0.99 and found["same_voice_cosine"] > 0.99


def test_speakers_without_name_or_audio_are_left_out(clips, tmp_path):
    broken = clips("zoe", 0.02)
    broken[0].path.write_bytes(b"no audio")
    held_out = [*broken, *clips(None, 0.1), *clips("brief", 0.1, seconds=1.0)]
    held_out += clips("pitched", 0.1, augmented=True)
    found = hold_out.check_clips(held_out, clips("ann", 0.1))
    assert found == {"voices": 0, "known_voices": 1, "max_cosine": None, "unreadable_clips": 1}


def test_the_command_compares_a_split_with_the_training_speakers(clips, tmp_path, capsys):
    known = [dataclasses.replace(c, split="train") for c in clips("ann", 0.1) + clips("ben", 0.02)]
    others = [dataclasses.replace(c, split="test") for c in clips("dora", 0.09)]
    write_manifest(tmp_path / "manifest.jsonl", known + others)
    hold_out.main(["--data_dirs", str(tmp_path), "--split", "test"])
    line, result = capsys.readouterr().out.splitlines()[-2:]
    assert "nearest are dora and ann" in line
    assert json.loads(result)["known_voices"] == 2
    hold_out.main(["--data_dirs", str(tmp_path), "--split", "train", "--max_clips", "1"])
    assert "no named speaker" in capsys.readouterr().out


def test_the_real_embedding_refuses_silence_and_brevity():
    pytest.importorskip("resemblyzer")
    embed = hold_out.VoiceEmbedder()
    assert embed(np.zeros(SAMPLE_RATE), SAMPLE_RATE) is None
    assert embed(np.ones(100, np.float32), SAMPLE_RATE) is None


@pytest.mark.parametrize("known", [0, 3])
def test_what_was_found_is_said_in_a_line(known):
    found = {"voices": 1, "known_voices": known, "max_cosine": None}
    if known:
        found |= {"max_cosine": 0.71, "same_voice_cosine": 0.9, "held_out": "a", "nearest": "b"}
    line = hold_out.described(found)
    assert "\n" not in line
    assert "0.71 to b (3 compared)" in line if known else "too little audio" in line
