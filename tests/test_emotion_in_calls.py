"""Emotion in a call: what is recognised of the user, and how the agent's is set."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_duplex import save_pair, small_pair, tone
from test_evaluate_s2s import VOICE, fake_voices

import emotion_figures
import evaluate_s2s
import speech
from audio import read_audio
from command import UserError
from data import EMOTIONS
from dialogues import Exchange, Line, load_scripts
from duplex import QUIET_TICKS, DuplexEngine, EmotionEstimate, load_models
from emotion_figures import Told
from prosody import ProsodyJudge, prosody
from s2s import guided

__all__ = ["fake_voices"]  # a fixture, found by name

NAMES = ("neutral", "happy", "sad")
TICK = 0.04
LM = SimpleNamespace(
    config=SimpleNamespace(
        emotions=EMOTIONS, languages=("english", "hindi", "telugu"), patch_rate=25.0
    ),
    tokenizer=SimpleNamespace(decode=lambda ids: "".join(map(chr, ids))),
)


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


def test_a_new_turn_is_not_sure_until_it_has_heard_enough():
    before = [(2, 0.9, 1.0)] * 100
    assert estimate(*before, *[(1, 0.9, 0.0)] * 20).name(0) == "sad"  # the turn that was
    assert estimate(*before, *[(1, 0.9, 0.0)] * 20, *[(1, 0.9, 1.0)] * 5).name(0) is None
    short = estimate(*before, *[(1, 0.9, 0.0)] * 10, *[(1, 0.9, 1.0)] * 5)  # a breath, no end
    assert short.name(0) == "sad"


def test_two_users_are_told_as_each_would_be_alone():
    rng = np.random.default_rng(0)
    shown = rng.dirichlet(np.ones(3) / 3, (2, 80))  # two slots
    speaking, active = rng.random((2, 80)) > 0.3, rng.random((2, 80)) > 0.2
    both = EmotionEstimate(2, NAMES, TICK)
    for tick in range(80):
        both.update(shown[:, tick], speaking[:, tick] * 0.9, active[:, tick])
    for slot in range(2):
        alone = EmotionEstimate(1, NAMES, TICK)
        for tick in np.flatnonzero(active[slot]):
            one = shown[slot, tick, None], speaking[slot, tick, None] * 0.9
            alone.update(*one, np.ones(1, bool))
        np.testing.assert_allclose(both.posterior[slot], alone.posterior[0])
        assert both.name(slot) == alone.name(0)


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


def test_an_utterance_is_told_at_its_end_and_stable_from_the_last_change_on():
    happy, sad = EMOTIONS.index("happy"), EMOTIONS.index("sad")
    config = LM.config
    one = evaluate_s2s.told_emotion(call("happy"), side((0, happy)), config)
    assert (one.asked, one.told) == ("happy", "happy") and one.sure > 0.9
    assert one.seconds == pytest.approx(0.48, abs=0.05)  # twelve ticks, the memory fades
    turned = evaluate_s2s.told_emotion(call("sad"), side((0, happy), (20, sad)), config)
    assert turned.told == "sad" and turned.seconds > 0.7
    mixed = side((0, EMOTIONS.index("fear")))
    mixed["user_emotion"][:, sad] = 0.05
    told = evaluate_s2s.told_emotion(call("sad"), mixed, config)
    assert (told.told, told.likely) == ("fear", "sad")  # fear is not asked for
    unsure = side((0, happy))
    unsure["user_emotion"][:] = 1 / 8
    assert evaluate_s2s.told_emotion(call("sad"), unsure, config).seconds is None


@pytest.mark.parametrize("gains", [False, True])
def test_after_a_neutral_sentence_the_styled_one_counts_at_a_drawn_gain(
    gains, monkeypatch, fake_voices
):
    args = evaluate_s2s.parse_arguments(["--styled", "1", *["--gains"] * gains])
    plain, later = (
        evaluate_s2s.styled_calls(SCRIPTS, "english", args, np.random.default_rng(0), **after)
        for after in ({}, {"after_neutral": True})
    )
    for one, two in zip(plain, later, strict=True):
        [before], [after] = one.turns, two.turns
        assert (before.text, before.emotion) == (after.text, after.emotion)
        second = round((after.start - before.start) * 24_000)  # where the sentence is in the later
        first = two.audio[: second + 12_000]
        assert not two.audio[second - 12_000 : second + 12_000].any() and first.any()
        peaks = [np.abs(part).max() for part in (one.audio, first, two.audio[second:])]
        assert peaks[1] == pytest.approx(peaks[2], rel=0.01)  # one microphone
        bounds = (10 ** (-9 / 20), 10 ** (3 / 20)) if gains else (0.999, 1.001)
        assert bounds[0] <= peaks[0] / 0.3 <= bounds[1]
    levels = {round(float(np.abs(one.audio).max()), 4) for one in (*plain, *later)}
    assert (len(levels) > 5) == gains


def told(asked: str, name: str, speaker="a", sure=0.8, seconds=1.0) -> Told:
    return Told(asked, name, speaker, sure, seconds, asked)


def test_accuracies_confusion_and_calibration_by_hand():
    found = emotion_figures.detection([
        told("happy", "happy", sure=1.0), told("happy", "sad", "b", sure=1.0),
        told("sad", "sad", sure=0.7, seconds=2.0), told("happy", "happy", "b", 0.7, None),
    ])  # fmt: skip
    assert found["unweighted_accuracy"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-4)
    assert found["unweighted_accuracy_of_asked"] == 1.0
    assert found["weighted_accuracy"] == 0.75 and found["sure"] == 0.75
    assert found["confusion"] == {"happy": {"happy": 2, "sad": 1}, "sad": {"sad": 1}}
    assert found["speakers"]["a"]["unweighted_accuracy"] == 1.0
    assert found["speakers"]["b"] == {
        "utterances": 2, "unweighted_accuracy": 0.5, "weighted_accuracy": 0.5,
    }  # fmt: skip
    assert (found["stable_p50_s"], found["stable_p95_s"]) == (1.0, 1.9)
    assert found["calibration_error"] == pytest.approx((0.5 + 0.3) / 2)


def test_accuracies_are_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    asked, names = rng.choice(EMOTIONS[:5], (2, 200))
    found = emotion_figures.accuracies(asked, names)
    balanced = metrics.balanced_accuracy_score(asked, names)
    assert found["unweighted_accuracy"] == pytest.approx(balanced, abs=1e-4)


def figures(accuracy=0.8, p95=1.4, different=0.75, control=0.7, effect=None) -> dict:
    return {
        "detection": {
            "unweighted_accuracy": 0.5, "unweighted_accuracy_of_asked": accuracy,
            "stable_p50_s": 0.9, "stable_p95_s": p95,
            "confusion": {"happy": {"happy": 3, "fear": 1}, "sad": {"sad": 2}},
        },
        "empathy": None if different is None else {"different": different},
        "control": {"accuracy": control}, "effect": effect or {},
    }  # fmt: skip


def test_goals_of_emotion():
    assert set(emotion_figures.goals(figures()).values()) == {True}
    missed = emotion_figures.goals(figures(0.74, 1.6, 0.69, 0.5))
    assert [name for name, met in missed.items() if met] == ["stable_p50"]
    assert emotion_figures.goals(figures(different=None))["different"] is None
    before = {"answered": 0.9, "right": 0.6, "response_p95_ms": 100.0}
    same = emotion_figures.compare(before, {**before, "right": 0.58, "response_p95_ms": 120.0})
    met = emotion_figures.goals(figures(effect=same))
    assert met["answered_kept"] and met["right_kept"] and met["response_kept"]
    worse = emotion_figures.compare(before, {**before, "right": 0.57, "response_p95_ms": None})
    met = emotion_figures.goals(figures(effect=worse))
    assert (met["right_kept"], met["response_kept"]) == (False, None)
    better = emotion_figures.compare(before, {**before, "right": 1.0, "response_p95_ms": 0.0})
    assert set(emotion_figures.goals(figures(effect=better)).values()) == {True}


def test_the_picture_has_a_panel_a_language(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, savefig = [], figure.Figure.savefig

    def save(self, path, **options):
        drawn.append(self)
        savefig(self, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", save)
        found = {language: figures()["detection"] for language in ("english", "hindi")}
        emotion_figures.draw(tmp_path / "x.png", found, EMOTIONS)
    panels = drawn[0].axes
    assert [panel.get_title().split(":")[0] for panel in panels] == ["english", "hindi"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["happy", "sad"]
    assert sorted(text.get_text() for text in panels[0].texts if text.get_text() != "0") == [
        "1", "2", "3",
    ]  # fmt: skip
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------- fakes


class Ear:
    """Stands for the engine: what is held of a call is made from the call by `answer`."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, codec, lm, calls, args):
        self.calls += calls
        return [self.answer(one) for one in calls]


def spoken(text: str, patches: int = 150) -> dict:
    """A reply in words (token ids are characters of `LM`'s tokenizer) a second into the call."""
    ids = np.zeros(patches, np.int64)
    ids[25 : 25 + len(text)] = [ord(letter) for letter in text]
    flat = np.full((patches, 8), 1 / 8), np.full((patches, 3), 1 / 3)
    return {"audio": np.zeros((patches, 960), np.float32), "text": ids, "user_emotion": flat[0],
            "language": flat[1], "user_speaking": np.ones(patches)}  # fmt: skip


def pair_of(number: int, words: str, held_out: bool) -> list[Exchange]:
    replies = {"sad": f"I am sorry {number}", "happy": f"How wonderful {number}"}
    return [
        Exchange(f"en-empathy-{i}{number:02}", "english", "empathy",
                 (Line("user", (words,), mood), Line("agent", (reply,), "calm")), held_out)
        for i, (mood, reply) in enumerate(replies.items(), start=1)
    ]  # fmt: skip


SCRIPTS = [
    exchange for number in (3, 7) for held_out in (False, True)
    for exchange in pair_of(number, f"Words {number} {'again' * held_out}.", held_out)
]  # fmt: skip


def test_empathy_counts_pairs_readings_and_very_replies(monkeypatch, fake_voices):
    args = evaluate_s2s.parse_arguments([])
    replies = {
        ("Words 3 again.", "sad"): "I am sorry 3", ("Words 3 again.", "happy"): "How wonderfull 7",
        ("Words 7 again.", "sad"): "How wonderful 7", ("Words 7 again.", "happy"): "",
    }  # fmt: skip
    ear = Ear(lambda one: spoken(replies[one.turns[0].text, one.turns[0].emotion]))
    monkeypatch.setattr(evaluate_s2s, "hold_calls", ear)
    found = evaluate_s2s.empathy(None, LM, SCRIPTS, "english", args, np.random.default_rng(0))
    assert found == {
        "pairs": 2, "both_answered": 0.5, "different": 0.5, "fitting": 0.5, "exact": 0.25,
    }  # fmt: skip
    assert {one.turns[0].text for one in ear.calls} == {"Words 3 again.", "Words 7 again."}
    without = [one for one in SCRIPTS if one.intent != "empathy"]
    rng = np.random.default_rng(0)
    assert evaluate_s2s.empathy(None, LM, without, "english", args, rng) is None


def test_the_same_reply_and_babble_are_neither_different_nor_fitting(monkeypatch, fake_voices):
    args, rng = evaluate_s2s.parse_arguments([]), np.random.default_rng(0)
    for said in ("I am sorry 3", "zzzz xxxx"):
        monkeypatch.setattr(evaluate_s2s, "hold_calls", Ear(lambda one, said=said: spoken(said)))
        found = evaluate_s2s.empathy(None, LM, SCRIPTS, "english", args, rng)
        assert (found["both_answered"], found["different"]) == (1.0, 0.0)
        assert found["fitting"] == (0.5 if said.startswith("I") else 0.0)


def test_words_that_are_sad_by_themselves_are_said_neutrally(monkeypatch, fake_voices):
    lines = [Line("user", ("I feel low.", "I am so low."), "sad"),
             Line("agent", ("I am sorry 9",), "calm"), Line("user", ("Thanks.",), "happy"),
             Line("agent", ("Any time.",), "calm")]  # fmt: skip
    sad = Exchange("en-comfort-001", "english", "comfort", tuple(lines))
    others = replace(lines[0], emotion="angry"), *lines[1:]
    angry = replace(sad, id="en-comfort-002", lines=others)
    scripts = [*SCRIPTS, sad, replace(sad, held_out=True), replace(angry, held_out=True)]
    ear = Ear(lambda one: spoken("I am sorry 3"))
    monkeypatch.setattr(evaluate_s2s, "hold_calls", ear)
    args = evaluate_s2s.parse_arguments(["--intents", "empathy", "--emotions", "scripted"])
    found = evaluate_s2s.words_alone(None, LM, scripts, "english", args)
    assert found == {"sentences": 2, "fitting": 1.0, "exact": 0.0}
    assert [(len(one.turns), one.turns[0].emotion) for one in ear.calls] == [(1, "neutral")] * 2
    assert evaluate_s2s.words_alone(None, LM, SCRIPTS, "english", args) is None


def pitch_of(audio: np.ndarray) -> float:
    """Its median pitch in Hz."""
    import parselmouth

    sound = parselmouth.Sound(audio.astype(np.float64), 24_000)
    hertz = sound.to_pitch(0.01, 60, 500).selected_array["frequency"]
    return float(np.median(hertz[hertz > 0]))


def hum(requests) -> list[speech.Utterance]:
    """A second of a voice at 150 Hz for each."""
    time = np.arange(24_000) / 24_000
    audio = sum(np.sin(2 * np.pi * 150 * k * time) / k for k in range(1, 20))
    return [speech.Utterance((0.1 * audio).astype("f"), [("a", 0.0, 1.0)]) for _ in requests]


@pytest.mark.parametrize("listener", ["fooled", "not fooled"])
def test_the_octave_shows_who_takes_a_high_voice_for_a_happy_one(
    listener, monkeypatch, fake_voices
):
    pytest.importorskip("parselmouth")
    heard = []

    def answer(one):
        heard.append(pitch_of(one.audio))
        high = listener == "fooled" and heard[-1] > 160
        return side((0, EMOTIONS.index("happy" if high else "neutral")), patches=60)

    monkeypatch.setattr(speech, "synthesize", hum)
    monkeypatch.setattr(evaluate_s2s, "hold_calls", Ear(answer))
    args = evaluate_s2s.parse_arguments(["--styled", "2"])
    rng = np.random.default_rng(0)
    found = evaluate_s2s.octave(None, LM, SCRIPTS, "english", args, rng)
    assert heard == pytest.approx([110, 110, 220, 220], rel=0.05)
    happy = float(listener == "fooled")
    assert found == {"low_neutral": 1.0, "low_excited": 0.0, "high_neutral": 1.0 - happy,
                     "high_excited": happy}  # fmt: skip


def loudness(audio: np.ndarray) -> np.ndarray:
    """In place of prosody's features: fast, and styles of `loud_styles` show in it."""
    return np.array([np.abs(audio).max(), float(len(audio) > 30_000)])


LEVELS = {style: 0.1 + 0.15 * i for i, style in enumerate(evaluate_s2s.STYLES_ASKED)}


@pytest.fixture
def loud_styles(monkeypatch, fake_voices):
    """Engines that say a style by its level alone, and a judge that hears it."""
    pytest.importorskip("sklearn")

    def say(requests):
        rng = np.random.default_rng(len(requests[0].text))
        return [speech.Utterance(tone(1.0, LEVELS[r.emotion] * rng.uniform(0.97, 1.03)),
                                 [("a", 0.0, 1.0)]) for r in requests]  # fmt: skip

    monkeypatch.setattr(speech, "synthesize", say)
    monkeypatch.setattr(speech, "voices", lambda *_: [replace(VOICE, role="agent")])
    monkeypatch.setattr("prosody.prosody", loudness)
    monkeypatch.setattr(evaluate_s2s, "_through", lambda codec, audio: audio)


@pytest.mark.parametrize("obeys", [True, False])
def test_control_is_judged_after_the_agents_own_voice_in_other_words(
    obeys, monkeypatch, loud_styles
):
    def answer(one):
        level = LEVELS[one.agent_emotion if obeys else "sad"]
        sound = np.zeros(150 * 960, np.float32)
        sound[60 * 960 : 90 * 960] = tone(1.2, level)
        return {"audio": sound.reshape(150, 960)}

    others = [Exchange(f"en-name-{i:03}", "english", "name",
                       (Line("user", (f"q{i}",), "neutral"), Line("agent", (f"r{i}",), "calm")))
              for i in range(2, 12)]  # fmt: skip
    asked = replace(others[0], id="en-name-001", held_out=True)
    taught, spoken_texts = [*others, replace(asked, held_out=False), asked], []
    make = evaluate_s2s._in_the_agents_voice
    monkeypatch.setattr(evaluate_s2s, "_in_the_agents_voice", lambda replies, *rest: (
        spoken_texts.extend(replies), make(replies, *rest))[1])  # fmt: skip
    monkeypatch.setattr(evaluate_s2s, "hold_calls", Ear(answer))
    args, rng = evaluate_s2s.parse_arguments([]), np.random.default_rng(0)
    found = evaluate_s2s.control(None, LM, taught, "english", args, rng)
    assert "r2" not in spoken_texts and len(set(spoken_texts)) == 9  # r2 is asked for
    assert found["replies"] == 5 and found["judge_on_the_agents_voice"] == 1.0
    assert found["accuracy"] == (1.0 if obeys else 0.2)


def test_the_prosody_judge_learns_from_training_voices_alone(monkeypatch, loud_styles):
    asked = []
    monkeypatch.setattr(evaluate_s2s, "user_voices", lambda *of: asked.append(of[1:]) or [VOICE])
    flags = ["--styled", "2", "--engines", "mbrola"]
    args, rng = evaluate_s2s.parse_arguments(flags), np.random.default_rng(0)
    calls = evaluate_s2s.styled_calls(SCRIPTS, "english", args, rng)
    assert {one.speaker for one in calls} == {VOICE.speaker} and len(calls) == 10
    found = evaluate_s2s.by_prosody(calls, SCRIPTS, "english", args, rng)
    # The engines named are those of who is asked; the judge learns from all that training has.
    assert asked == [("test", ["mbrola"]), ("train", None)] and found["unweighted_accuracy"] == 1.0


# ---------------------------------------------------------------------------------- the script


def test_main_with_emotion_over_small_real_models(tmp_path, capsys, loud_styles, monkeypatch):
    pytest.importorskip("matplotlib")
    save_pair(*small_pair(), tmp_path)
    output, scripts = tmp_path / "emotion.json", tmp_path / "scripts"
    scripts.mkdir()
    lines = Path("conversations/english.jsonl").read_text(encoding="utf-8").splitlines(True)
    ids = ("name-00", "empathy-101", "empathy-201", "comfort-001")
    few = [line for line in lines if any(f"en-{one}" in line for one in ids)]
    (scripts / "english.jsonl").write_text("".join(few), encoding="utf-8")
    monkeypatch.setattr("praat.change_voice", lambda audio, *_: audio)
    for wait in ("TAIL_SECONDS", "AFTER_REPLY_SECONDS"):  # fewer ticks
        monkeypatch.setattr(evaluate_s2s, wait, 0.2)
    evaluate_s2s.main([
        "--emotion", "--codec", str(tmp_path / "codec"), "--lm", str(tmp_path / "s2s"),
        "--before", str(tmp_path / "s2s"), "--languages", "english", "--intents", "name",
        "--questions_per_exchange", "1", "--styled", "1", "--judge_examples", "8",
        "--judge", "none", "--output", str(output), "--scripts", str(scripts),
    ])  # fmt: skip
    told = capsys.readouterr().out.strip().splitlines()
    last = json.loads(told[-1])
    found = last["emotion"]["english"]
    assert found["detection"]["utterances"] == 5 and found["empathy"]["pairs"] == 1
    assert set(found["detection"]["after_neutral"]) == set(evaluate_s2s.ACCURACIES)
    assert found["effect"]["change"]["answered"] == 0.0  # one and the same model
    assert last["goals"]["english"]["answered_kept"] is True
    assert found["words"]["sentences"] == 1 and "not people" in last["note"]
    shown = "\n".join(told[:-1])
    assert "control accuracy" in shown and "octave high_excited" in shown
    table = shown[shown.index("seed 0\n") + 7 : shown.index("\n\nThese are")]
    assert "not people" in shown and max(map(len, table.splitlines())) <= 80
    assert json.loads(output.read_text(encoding="utf-8"))["emotion"] == last["emotion"]
    assert (tmp_path / "emotion.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--before", "x"], "--before goes with --emotion"),
        (["--emotion", "--output", "/tmp/x.png"], "end it in .json"),
        (["--emotion"], "pip install scikit-learn"),
        (["--emotion", "--output", "/tmp/x.json"], "pip install scikit-learn matplotlib"),
    ],
)
def test_what_emotion_lacks_is_told_before_the_work(flags, said, monkeypatch):
    for package in ("sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=said):
        evaluate_s2s.main(flags)


def test_neutral_voices_an_octave_apart_are_both_neutral_to_the_shipped_model(pair):
    """Where the shipped LM has a branch for emotions: a voice's height alone is no excitement."""
    if not pair[1].config.emotion_dim:
        pytest.skip("the shipped LM has no emotion branch")
    exchanges = load_scripts("conversations")
    args = evaluate_s2s.parse_arguments(["--styled", "10"])
    try:
        rng = np.random.default_rng(0)
        found = evaluate_s2s.octave(*pair, exchanges, "english", args, rng)
    except UserError as error:
        pytest.skip(str(error))
    assert found["high_excited"] <= 0.3 and found["low_excited"] <= 0.3


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
