"""Emotion in a call: what is recognised of the user, and how the agent's is set."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate_s2s
from audio import read_audio
from data import EMOTIONS
from duplex import QUIET_TICKS, DuplexEngine, EmotionEstimate, load_models
from prosody import ProsodyJudge, prosody
from s2s import guided

NAMES = ("neutral", "happy", "sad")
TICK = 0.04


def estimate(*shown: tuple[int, float, float], slots: int = 1) -> EmotionEstimate:
    """After stretches of (emotion, its probability, speaking) a tick each, in slot 0."""
    found = EmotionEstimate(slots, NAMES, TICK)
    for emotion, probability, speaking in shown:
        row = np.full((slots, 3), (1 - probability) / 2)
        row[:, emotion] = probability
        found.update(row, np.full(slots, speaking), np.arange(slots) == 0)
    return found


def test_it_is_not_sure_at_once_nor_where_the_model_wavers():
    assert estimate(*[(2, 0.8, 1.0)] * 5).name(0) is None  # 0.2 s
    assert estimate(*[(2, 0.8, 1.0)] * 15).name(0) == "sad"
    assert estimate(*[(2, 0.4, 1.0)] * 50).name(0) is None
    assert estimate(*[(2, 0.8, 1.0), (1, 0.8, 1.0)] * 25).name(0) is None


def test_one_odd_tick_changes_nothing_and_silence_is_no_speech():
    steady = [(2, 0.8, 1.0)] * 20
    assert estimate(*steady, (1, 0.99, 1.0)).name(0) == "sad"
    assert estimate(*steady, *[(1, 0.99, 0.1)] * 100).name(0) == "sad"


def test_a_turn_after_a_pause_begins_anew():
    found = estimate(*[(2, 0.9, 1.0)] * 100, *[(0, 0.5, 0.0)] * 20, *[(1, 0.9, 1.0)] * 15)
    assert found.name(0) == "happy"


def test_slots_are_apart():
    found = estimate(*[(2, 0.9, 1.0)] * 20, slots=2)
    assert found.name(0) == "sad" and found.name(1) is None
    np.testing.assert_allclose(found.posterior[1], 1 / 3)
    found.reset(np.array([True, False]))
    assert found.name(0) is None


def test_guidance_by_its_formula():
    torch.manual_seed(0)
    given, free = torch.randn(2, 3, 5)
    strength = torch.tensor([0.0, 1.0, 2.0])
    mixed = guided(torch.cat((given, free)), strength)
    torch.testing.assert_close(mixed[0], free[0])
    torch.testing.assert_close(mixed[1], given[1])
    torch.testing.assert_close(mixed[2], 2 * given[2] - free[2])
    assert guided(given, None) is given


@pytest.fixture(scope="module")
def pair():
    return load_models("checkpoints/tiny/codec", "checkpoints/tiny/s2s")


def reply(pair, emotion, strength, seconds=4.0) -> np.ndarray:
    engine = DuplexEngine(*pair, emotion_strength=strength)
    engine.set_voice(0, emotion)
    audio = np.zeros(round(seconds * 24_000), np.float32)
    question = read_audio("samples/question_english.wav")[: len(audio)]
    audio[: len(question)] = question
    frames = audio[: len(audio) // 960 * 960].reshape(-1, 1, 960)
    return np.concatenate([engine.tick(frame).audio[0] for frame in frames])


def test_strength_says_nothing_where_no_emotion_is_set_and_something_where_one_is(pair):
    plain = reply(pair, None, 1.0)
    np.testing.assert_allclose(reply(pair, None, 3.0), plain, atol=1e-4)
    assert np.abs(reply(pair, "sad", 3.0) - reply(pair, "sad", 1.0)).max() > 0.01


def test_an_emotion_set_in_mid_reply_waits_for_its_end(pair):
    engine = DuplexEngine(*pair)
    engine._quiet_ticks[0] = 0  # the agent speaks
    engine.set_voice(0, "sad")
    silence = np.zeros((1, engine.patch_samples), np.float32)
    applied = []
    for _ in range(QUIET_TICKS + 2):
        engine.tick(silence)
        applied.append(int(engine._emotion[0]))
    assert applied[:QUIET_TICKS] == [0] * QUIET_TICKS and applied[-1] > 0


def test_unknown_emotion_is_named(pair):
    with pytest.raises(Exception, match="gleeful"):
        DuplexEngine(*pair).set_voice(0, "gleeful")


def call(emotion: str, seconds: float = 1.0) -> evaluate_s2s.Call:
    turn = evaluate_s2s.AskedTurn(0.4, 0.4 + seconds, "words", emotion, "")
    audio = np.zeros(round((0.8 + seconds) * 24_000), np.float32)
    return evaluate_s2s.Call("id", "english", audio, (turn,))


def side(*told: tuple[int, int], patches: int = 45) -> dict:
    """What an LM makes of a call: from patch to patch, another emotion."""
    user_emotion = np.full((patches, 8), 0.01)
    for first, emotion in told:
        user_emotion[first:] = 0.01
        user_emotion[first:, emotion] = 0.93
    speaking = np.zeros(patches)
    speaking[10:35] = 1.0
    return {"user_emotion": user_emotion, "user_speaking": speaking}


def test_detection_counts_what_is_told_at_the_end_and_when_it_settles():
    lm = SimpleNamespace(config=SimpleNamespace(emotions=EMOTIONS, patch_rate=25.0))
    happy, sad = EMOTIONS.index("happy"), EMOTIONS.index("sad")
    calls = [call("happy"), call("happy"), call("sad")]
    agents = [side((0, happy)), side((0, sad)), side((0, sad))]
    found = evaluate_s2s.detection(calls, agents, lm)
    assert found["confusion"]["happy"] == {"happy": 1, "sad": 1}
    assert found["weighted_accuracy"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["unweighted_accuracy"] == pytest.approx((0.5 + 1) / 2, abs=1e-3)
    assert found["sure"] == 1.0 and found["stable_p50_s"] == pytest.approx(0.44, abs=0.05)
    assert found["calibration_error"] > 0.2


def test_the_prosody_judge_tells_high_and_loud_from_low_and_soft():
    pytest.importorskip("sklearn")
    rng, time = np.random.default_rng(0), np.arange(24_000) / 24_000

    def voice(hertz: float, level: float) -> np.ndarray:
        pulses = sum(np.sin(2 * np.pi * hertz * rng.uniform(0.97, 1.03) * k * time) / k
                     for k in range(1, 12))  # fmt: skip
        return (level * pulses * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)

    made = {"happy": (260, 0.2), "sad": (120, 0.04)}
    examples = [(voice(*how), name) for name, how in made.items() for _ in range(8)]
    judge = ProsodyJudge(*map(list, zip(*examples, strict=True)))
    assert judge.judge([voice(250, 0.18), voice(125, 0.05)]) == ["happy", "sad"]
    assert not prosody(np.zeros(24_000, np.float32)).any()
