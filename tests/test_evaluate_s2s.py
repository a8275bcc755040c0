"""The evaluation over fakes whose answers are known, then over small real models."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_duplex import FakeClock, FakeCodec, FakeLM, save_pair, small_pair, tone

import evaluate_s2s as e
import speech
import takes
from command import UserError
from dialogues import Exchange, Line, load_scripts
from evaluate_s2s import (
    AskedTurn,
    Call,
    Judge,
    ask,
    edit_distance,
    goals,
    hold_calls,
    judge_call,
    main,
    nearest,
    normalise,
    right_text,
    summarise,
    table,
    training_replies,
)

RATE = 24000
SCRIPTS = e.HERE / "conversations"
VOICE = speech.Voice("english/fake/0", "flite", "english", "rms", "rms", split="test")


def slow_distance(one, two) -> int:
    """Wagner and Fischer's table, cell by cell."""
    cells = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(two) + 1)}
    for i, a in enumerate(one, 1):
        for j, b in enumerate(two, 1):
            cells[i, j] = min(
                cells[i - 1, j] + 1, cells[i, j - 1] + 1, cells[i - 1, j - 1] + (a != b)
            )
    return cells[len(one), len(two)]


def exchange(name="en-name-001", replies=("My name is Samvad.",), held_out=False, wordings=2):
    lines = []
    for number, reply in enumerate(replies):
        texts = tuple(f"question {number} wording {w}" for w in range(wordings))
        lines += [Line("user", texts, "happy"), Line("agent", (reply,), "calm")]
    return Exchange(name, "english", "name", tuple(lines), held_out)


def fake_say(requests):
    """A second of tone for every request, with words and phones."""
    phones = [("_", 0.0, 0.1), ("k", 0.1, 0.6), ("a", 0.6, 1.0)]
    words = [("one", 0.1, 0.6), ("two", 0.6, 1.0)]
    return [speech.Utterance(tone(1.0, 0.3), phones, words) for _ in requests]


def asking(**changes):
    """The script's flags."""
    return SimpleNamespace(**{**vars(e.parse_arguments([])), **changes})


@pytest.fixture
def fake_voices(monkeypatch):
    monkeypatch.setattr(e, "user_voices", lambda language, split, engines: [VOICE])
    monkeypatch.setattr("evaluate_s2s.phonemize", lambda text, language: text.split())
    monkeypatch.setattr(speech, "synthesize", fake_say)


def judged(**changes) -> dict:
    fields = {
        "call": "c", "asked": "q", "wanted": "Yes.", "said": "Yes.", "kind": "answered",
        "latency": 0.2, "text": True, "audio": True, "emotion": ("neutral", "neutral"),
        "language": ("english", "english"),
    }  # fmt: skip
    return {**fields, **changes}


# ---------------------------------------------------------------------------------- distances


def test_edit_distance_is_wagner_and_fischer_s():
    rng = np.random.default_rng(0)
    for _ in range(60):
        one, two = (rng.integers(0, 4, rng.integers(0, 9)).tolist() for _ in range(2))
        assert edit_distance(one, two) == slow_distance(one, two)
    assert edit_distance("kitten", "sitting") == 3


def test_text_is_compared_by_letters_and_vowel_signs_alone():
    assert normalise("Hello,  I'm Samvad!") == "hello im samvad"
    assert normalise("मेरा नाम संवाद है।") == "मेरा नाम संवाद है"
    assert normalise("నా పేరు సంవాద్ అండి.") == "నా పేరు సంవాద్ అండి"


class EchoCodec(torch.nn.Module):
    """A codec that changes nothing, or keeps silent."""

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain), requires_grad=False)

    def encode(self, audio, num_codebooks=8):
        return audio * self.gain

    def decode(self, codes):
        return codes


def loudness_judge() -> Judge:
    """Transcribes each 40 ms of sound as a phone: its level in tenths."""

    def recognise(audio):
        levels = np.abs(audio[: len(audio) // 640 * 640].reshape(-1, 640)).max(1)
        return tuple(int(round(10 * x)) for x in levels if x > 0.01)

    return Judge(recognise)


DEAF = Judge(lambda audio: ())


def test_a_judge_is_trusted_that_finds_clean_and_coded_replies(monkeypatch):
    rng = np.random.default_rng(0)
    replies = {f"reply {i}": "neutral" for i in range(5)}
    sounds = {t: np.repeat(rng.integers(1, 10, 20) / 10, 960).astype("f") for t in replies}

    def say(replies, language, speed):
        return {text: sounds[text][: round(19200 * min(1, speed))] for text in replies}

    monkeypatch.setattr(e, "_in_the_agents_voice", say)
    deaf = e.examine(DEAF, replies, "english", EchoCodec())
    assert (deaf.clean, deaf.coded, deaf.trusted) == (0.0, 0.0, False)
    assert e.examine(loudness_judge(), replies, "english", EchoCodec()).trusted
    judge = e.examine(loudness_judge(), replies, "english", EchoCodec(0.0))
    assert judge.clean >= 0.8 and judge.coded == 0.0 and not judge.trusted
    monkeypatch.setattr(e, "_in_the_agents_voice", lambda *_: {})
    assert not e.examine(loudness_judge(), replies, "english", EchoCodec()).trusted


def test_a_right_text_is_near_and_nearest():
    taught = ["My name is Samvad.", "It is two.", "It is ten."]
    assert right_text("my name is samvat", "My name is Samvad.", taught)
    assert not right_text("My name", "My name is Samvad.", taught)  # nearest, but half is missing
    assert not right_text("It is ten.", "It is two.", taught)  # near, but another is nearer
    assert not right_text("", "It is two.", taught)
    assert not right_text("My name is Samvad. It is two.", "It is two.", taught)


def test_nothing_heard_is_nearest_to_nothing():
    assert nearest("", {"a": "", "b": "xy"}) == (None, 1.0)
    assert nearest("xz", {"a": "", "b": "xy"}) == ("b", 0.5)


# ---------------------------------------------------------------------------------- questions


def test_questions_lie_on_the_clock_with_their_lead_in_and_tail(fake_voices):
    calls, _ = ask([exchange(held_out=True)], "english", asking(questions_per_exchange=5))
    assert len(calls) == 2  # there are no more wordings than two
    assert {c.turns[0].text for c in calls} == {f"question 0 wording {w}" for w in (0, 1)}
    turn = calls[0].turns[0]
    loud = np.flatnonzero(np.abs(calls[0].audio) > 0.01) / RATE
    assert turn.start == pytest.approx(loud[0], abs=0.011)
    assert turn.end == pytest.approx(loud[-1], abs=0.011)
    assert loud[0] >= 0.5 and len(calls[0].audio) / RATE - turn.end >= 4.0
    assert turn.emotion == "neutral"


def test_later_questions_wait_for_the_reply_before(fake_voices):
    long_reply = " ".join(["word"] * 66)  # six seconds
    scripts = [exchange(replies=(long_reply, "Yes."), held_out=True)]
    (call,), _ = ask(scripts, "english", asking(questions_per_exchange=1))
    first, second = call.turns
    assert first.reply == long_reply and second.reply == "Yes."
    assert 8.0 < second.start - first.end < 9.0


def test_emotions_and_ranges_of_pitch_are_those_praat_is_safe_in(fake_voices, monkeypatch):
    wide = replace(VOICE, pitch_range=2.0)
    monkeypatch.setattr(e, "user_voices", lambda language, split, engines: [wide])
    seen = []

    def say(requests):
        seen.extend(requests)
        return fake_say(requests)

    monkeypatch.setattr(speech, "synthesize", say)
    for emotions in ("neutral", "scripted"):
        ask([exchange(held_out=True)], "english", asking(emotions=emotions))
    assert {r.emotion for r in seen} == {"neutral", "happy"}
    for request in seen:
        style = speech.STYLES[request.emotion]
        assert request.voice.pitch_range <= takes.MAX_PITCH_RANGE["user"]
        assert request.voice.pitch_range * style.pitch_range <= takes.MAX_WITH_EMOTION + 1e-9
        assert 0.95 <= request.speed <= 1.05


def test_a_question_that_no_engine_can_say_is_left_out(fake_voices, monkeypatch, capsys):
    scripts = [exchange(held_out=True, wordings=3)]
    silent = scripts[0].lines[0].texts[1]

    def say(requests):
        if any(r.text == silent for r in requests):
            raise UserError("festival failed")
        return fake_say(requests)

    monkeypatch.setattr(speech, "synthesize", say)
    calls, left_out = ask(scripts, "english", asking())
    assert len(calls) == 2 and silent not in [c.turns[0].text for c in calls]
    assert len(left_out) == 1 and "festival failed" in left_out[0]
    assert "1 calls not spoken, first: english/fake/0: festival" in capsys.readouterr().out


def test_the_same_seed_asks_the_same(fake_voices):
    scripts = [exchange(held_out=True, wordings=9)]
    texts = [
        [c.turns[0].text for c in ask(scripts, "english", asking(seed=s))[0]]
        for s in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_voices_asked_are_those_of_the_engines_named(fake_voices, monkeypatch):
    named = []
    monkeypatch.setattr(
        e, "user_voices", lambda language, split, engines: named.append(engines) or [VOICE]
    )
    for flags in ([], ["--engines", "mbrola", "pico"]):
        ask([exchange(held_out=True)], "english", asking(engines=e.parse_arguments(flags).engines))
    assert named == [None, ["mbrola", "pico"]]


def test_the_taught_are_the_training_replies_of_the_chosen_exchanges():
    scripts = load_scripts(SCRIPTS)
    few = training_replies(scripts, "english", asking(intents=("name",)))
    assert few == {"My name is Samvad.": "happy"} or list(few) == ["My name is Samvad."]
    assert len(training_replies(scripts, "telugu", asking(archetypes=False))) > 150


# ---------------------------------------------------------------------------------- calls


def call_of(audio, *turns, name="c") -> Call:
    return Call(name, "english", audio, turns)


def test_every_call_gets_its_own_reply_whatever_the_slots():
    audios = [np.full(960 * n, 0.01 * (n + 1), np.float32) for n in (3, 9, 5, 7, 1)]
    calls = [call_of(audio, name=str(i)) for i, audio in enumerate(audios)]
    for slots in (1, 2, 8):
        clock = FakeClock()
        heard = hold_calls(FakeCodec(clock), FakeLM(clock), calls, asking(slots=slots))
        for audio, one in zip(audios, heard, strict=True):
            np.testing.assert_allclose(one["audio"].reshape(-1), audio, atol=1e-6)
            assert one["text"].tolist() == list(range(1, len(audio) // 960 + 1))
            assert one["user_emotion"].shape == (len(one["text"]), 8)


# ---------------------------------------------------------------------------------- judging


def amplitude(audio) -> tuple[str, ...]:
    """As many phones as the amplitude has tenths."""
    return ("x",) * int(round(10 * np.abs(audio).max()))


def converse(onset: float, text_at: float, level: float = 0.5, second_turn: bool = False):
    """A call with a question from 1.0 to 2.0 s, answered at `onset` by one token and a tone."""
    reply = np.zeros(8 * RATE, np.float32)
    first = round((onset - 0.04) * RATE)  # the engine's patch comes on top
    reply[first : first + RATE] = tone(1.0, level)
    text = np.zeros(200, np.int64)
    text[round(text_at / 0.04)] = 5
    emotion, language = np.zeros((200, 8)), np.zeros((200, 3))
    emotion[:, 1], language[:, 0] = 1.0, 1.0
    emotion[45:51] = 0.0
    emotion[45:51, 2] = 1.0  # what counts is the end of the turn
    agent = {"audio": reply.reshape(-1, 960), "text": text}
    agent |= {"user_emotion": emotion, "language": language}
    turns = [AskedTurn(1.0, 2.0, "q", "sad", "five")]
    if second_turn:
        turns.append(AskedTurn(5.0, 6.0, "q2", "sad", "six"))
    return call_of(np.zeros(8 * RATE, np.float32), *turns), agent


LM = SimpleNamespace(
    config=SimpleNamespace(
        emotions=("neutral", "happy", "sad", "angry", "fear", "disgust", "surprise", "calm"),
        languages=("english", "hindi", "telugu"),
        patch_rate=25.0,
    ),
    tokenizer=SimpleNamespace(decode=lambda ids: {5: "five", 6: "six"}[ids[-1]] if ids else ""),
)
REPLIES = {"five": ("x",) * 5, "six": ("x",) * 9}
JUDGE = Judge(amplitude, REPLIES, 1.0, 1.0)


def test_an_answer_is_timed_read_and_heard():
    call, agent = converse(onset=2.25, text_at=2.2)
    (turn,) = judge_call(call, agent, LM, ["five", "six"], JUDGE)
    assert turn["kind"] == "answered" and turn["latency"] == pytest.approx(0.25, abs=0.011)
    assert turn["said"] == "five" and turn["text"] and turn["audio"]
    assert turn["emotion"] == ("sad", "sad") and turn["language"] == ("english", "english")


@pytest.mark.parametrize("onset,kind", [(1.5, "takeover"), (1.9, "answered"), (4.3, "unanswered")])
def test_early_and_late_replies_are_told_apart(onset, kind):
    (turn,) = judge_call(*converse(onset, onset), LM, ["five"], None)
    assert turn["kind"] == kind and turn["audio"] is None


def test_a_reply_of_the_next_turn_is_not_this_one_s():
    call, agent = converse(onset=6.2, text_at=6.2, second_turn=True)
    first, second = judge_call(call, agent, LM, ["five", "six"], JUDGE)
    assert first["kind"] == "unanswered" and first["said"] == "" and not first["audio"]
    assert second["kind"] == "answered" and second["said"] == "five" and not second["text"]


def test_a_loud_reply_of_other_sounds_is_wrong_by_ear():
    (turn,) = judge_call(*converse(2.2, 2.2, level=0.9), LM, ["five", "six"], JUDGE)
    assert turn["text"] and not turn["audio"]


def test_nothing_heard_is_never_right():
    assert not JUDGE.right(np.zeros(RATE, np.float32), "five")


# ---------------------------------------------------------------------------------- the report


def test_shares_are_over_all_turns_and_the_baseline_is_the_commonest_reply():
    turns = [
        judged(),
        judged(kind="takeover", latency=-0.5),
        judged(kind="unanswered", latency=None, text=False, audio=False, wanted="No."),
        judged(audio=False, wanted="Perhaps.", latency=0.4, emotion=("sad", "neutral")),
    ]
    s = summarise(turns, judge=JUDGE)
    assert (s["turns"], s["answered"], s["takeovers"], s["unanswered"]) == (4, 0.5, 1, 1)
    assert (s["right_text"], s["right_audio"], s["right_both"]) == (0.75, 0.5, 0.5)
    assert s["right_and_in_time"] == 0.25 and s["majority_answer"] == 0.5
    assert s["response_p50_ms"] == 300 and s["user_emotion"] == 0.75


def test_a_judge_that_cannot_be_trusted_is_not_asked_for_a_figure():
    s = summarise([judged(audio=False)], judge=replace(JUDGE, clean=0.5))
    assert s["right_audio"] is None and s["right_both"] is None and s["right_and_in_time"] == 1.0
    text = table({"telugu": s}, {"telugu": goals("telugu", s)})
    assert "50.0%" in text and "stands alone" in text
    assert goals("telugu", s)["right"]


def test_goals_are_met_or_not():
    s = summarise([judged()], judge=JUDGE)
    assert goals("english", s) == {"answered": True, "response": True, "right": True}
    s = summarise([judged(kind="unanswered", latency=None, text=False)], judge=JUDGE)
    assert goals("english", s) == {"answered": False, "response": None, "right": False}


def test_the_table_fits_80_columns():
    s = summarise([judged()], judge=JUDGE)
    empty = summarise([])
    deaf = summarise([judged()], judge=replace(JUDGE, coded=0.06))
    found = {"english": s, "hindi": deaf, "telugu": empty}
    text = table(found, {language: goals(language, one) for language, one in found.items()})
    assert max(map(len, text.splitlines())) <= 80


# ---------------------------------------------------------------------------------- the script


def test_main_over_small_real_models(tmp_path, monkeypatch, capsys, fake_voices):
    save_pair(*small_pair(), tmp_path)
    output = tmp_path / "out.json"
    main([
        "--codec", str(tmp_path / "codec"), "--lm", str(tmp_path / "s2s"), "--judge", "none",
        "--languages", "english", "--intents", "name,capitals", "--questions_per_exchange", "1",
        "--output", str(output),
    ])  # fmt: skip
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["languages"]["english"]["turns"] == 2
    assert last["languages"]["english"]["judge_trusted"] is False
    turns = json.loads(output.read_text(encoding="utf-8"))["turns"]["english"]
    assert {t["wanted"] for t in turns} >= {"My name is Samvad."}


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        main(["--codec", str(tmp_path / "nowhere"), "--lm", str(tmp_path / "nowhere")])
    codec, lm = small_pair()
    save_pair(codec, lm, tmp_path, replace(lm.config, codec_fingerprint="of another"))
    with pytest.raises(UserError, match="of another"):
        main(["--codec", str(tmp_path / "codec"), "--lm", str(tmp_path / "s2s")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", "/proc/nowhere/x.json"], "--output /proc/nowhere: cannot be written"),
        (["--intents", "nonsense"], "no english script has intent nonsense"),
        (["--scripts", "/nowhere"], "/nowhere"),
        (["--device", "cuda:7"], "--device"),
        (["--judge", "hama"], "pip install hama"),
    ],
)
def test_what_cannot_work_is_told_before_the_work(flags, said, tmp_path, fake_voices, monkeypatch):
    monkeypatch.setattr(e, "load_models", lambda *_: (None, None))
    monkeypatch.setattr(e, "evaluate_language", lambda *_: pytest.fail("it began"))
    monkeypatch.setitem(sys.modules, "hama", None)
    monkeypatch.setattr(speech, "voices", lambda *_: [VOICE])
    with pytest.raises((UserError, OSError), match=said) as caught:
        main(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flag",
    ["--questions_per_exchange 0", "--slots 0", "--threads 0", "--seed -1", "--temperature nan",
     "--text_temperature -1", "--languages french", "--sp test"],
)  # fmt: skip
def test_flags_out_of_range_end_in_one_line(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        main(flag.split())
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.count("\n") == 1 and flag.split()[0] in told


def test_one_language_that_fails_and_a_full_disk_cost_no_figures(
    tmp_path, monkeypatch, capsys, fake_voices
):
    def evaluate(codec, lm, exchanges, language, *_):
        if language != "hindi":
            raise UserError("festival failed")
        return [(summarise([judged()]), [judged()])]

    monkeypatch.setattr(e, "load_models", lambda *_: (None, None))
    monkeypatch.setattr(e, "evaluate_language", evaluate)
    flags = ["--judge", "none", "--languages", "english", "hindi", "english"]
    with pytest.raises(UserError, match="^english: festival failed$"):
        main(flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["languages"]) == ["hindi"] and result["failed"]
    with pytest.raises(UserError, match="^english: festival failed$"):
        main(flags[:4])
    with pytest.raises(OSError, match="No space left"):
        main([*flags[:3], "hindi", "--output", "/dev/full"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["languages"]["hindi"]["turns"] == 1


def test_a_reply_that_the_agent_cannot_say_is_not_judged_by_ear(monkeypatch, capsys):
    def say(requests):
        if any(r.text == "Hm." for r in requests):
            raise UserError("nothing to say")
        return fake_say(requests)

    monkeypatch.setattr(speech, "synthesize", say)
    monkeypatch.setattr(speech, "voices", lambda *_: [VOICE])
    monkeypatch.setattr(e, "_through", lambda codec, audio: audio)
    replies = {"Yes.": "neutral", "Hm.": "neutral"}
    judge = e.examine(loudness_judge(), replies, "english", None)
    assert list(judge.expected) == ["Yes."] and judge.right(tone(1.0), "Hm.") is None
    assert "1 replies could not be spoken" in capsys.readouterr().err
    report = summarise([judged(audio=None), judged(audio=False)], judge=judge)
    assert (report["right_audio"], report["right_both"]) == (0.0, 0.5)


def test_no_voice_names_what_to_install(monkeypatch):
    monkeypatch.setattr("tools.toy_voices._installed", lambda engine, name: False)
    monkeypatch.setattr("tools.held_out_voices.HeldOutEngine._is_here", lambda self, name: False)
    with pytest.raises(UserError, match="flite"):
        ask([exchange(held_out=True)], "english", asking())


def test_a_judge_that_is_missing_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hama", None)
    assert e.load_judge("auto") is e.load_judge("none") is None
    told = capsys.readouterr().err
    assert "pip install hama" in told and told.count("\n") == 1
    with pytest.raises(UserError, match="pip install hama"):
        e.load_judge("hama")


def test_hama_hears_which_reply_the_agent_says():
    pytest.importorskip("hama", reason="pip install hama")
    try:
        agent = speech.voices("english", "agent")[0]
    except UserError as error:
        pytest.skip(str(error))
    judge = e.load_judge("hama")
    texts = ["My name is Samvad.", "You are welcome."]
    say = speech.synthesize
    known, again = (
        say([speech.Request(t, "english", agent, speed) for t in texts]) for speed in (1.0, 0.93)
    )
    templates = {t: judge.transcribe(u.audio) for t, u in zip(texts, known, strict=True)}
    assert [nearest(judge.transcribe(u.audio), templates)[0] for u in again] == texts
    assert judge.transcribe(np.zeros(RATE, np.float32)) == ()
