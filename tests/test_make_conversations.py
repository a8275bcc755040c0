"""Conversations: their timing, their channels, who may be heard where, and the dataset on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import dialogues
import make_conversations as mc
import speech
from audio import HOP, SAMPLE_RATE
from checkpoints import save_checkpoint, stored_config
from codec import Codec, CodecConfig
from command import UserError, only_one
from phones import PHONES
from takes import MARGIN_AFTER, MARGIN_BEFORE, agent_takes, cut_take, insert_pause

SCRIPTS = Path(__file__).resolve().parent.parent / "conversations"
CODES = ("agent_codes", "user_codes")


def fresh_process() -> None:
    """Nothing that an earlier test in this process has left behind."""
    mc.scripts.cache_clear()
    agent_takes.clear()


# ---------------------------------------------------------------------------------- helpers


@cache
def tone(seconds: float, hertz: float = 150.0) -> speech.Utterance:
    """A buzz with 40 ms of silence at both ends, ten phones and five words."""
    n, edge = round(seconds * SAMPLE_RATE), round(0.04 * SAMPLE_RATE)
    clock = np.arange(n) / SAMPLE_RATE
    buzz = sum(np.sin(2 * np.pi * hertz * k * clock) / k for k in range(1, 9)) * 0.05
    audio = np.pad(buzz, edge).astype(np.float32)
    ends = 0.04 + np.arange(11) * seconds / 10
    phones = [("a", ends[i], ends[i + 1]) for i in range(10)]
    words = [(f"w{i}", ends[2 * i], ends[2 * i + 2]) for i in range(5)]
    tail = len(audio) / SAMPLE_RATE
    return speech.Utterance(audio, [("_", 0.0, 0.04), *phones, ("_", ends[-1], tail)], words)


def fake_voice(role: str, split: str = "train", name: str = "v") -> speech.Voice:
    return speech.Voice(f"english/{name}", "espeak", "english", name, name, split=split, role=role)


def fake_conversations(count: int) -> list[tuple[mc.Plan, dict, list]]:
    exchanges = mc.choose_exchanges(mc.scripts(SCRIPTS / "english.jsonl"), "english", "train")
    users, agent = [fake_voice("user")], fake_voice("agent", name="agent")
    made = []
    for i in range(count):
        rng = np.random.default_rng([7, i])
        plan = mc.plan_conversation(exchanges, users, agent, rng)
        takes = []
        for turn in plan.turns:
            seconds = 0.4 if turn.inside is not None else round(float(rng.uniform(0.8, 3.0)), 1)
            takes.append(cut_take(tone(seconds, 220.0 if turn.who == "agent" else 130.0)))
        # Five words to a text, as the tones have.
        plan = replace(
            plan,
            turns=tuple(
                replace(t, request=replace(t.request, text="w0 w1 w2 w3 w4")) for t in plan.turns
            ),
        )
        babble = [tone(1.0).audio]
        made.append((plan, mc.mix(f"c{i}", "english", plan, takes, babble), takes))
    return made


@pytest.fixture(scope="module")
def mixed():
    return fake_conversations(120)


def quiet_microphone(**changes) -> mc.Microphone:
    clean = mc.Microphone(0.0, None, 30.0, None, -12.0, False, None, None, 0)
    return replace(clean, **changes)


def user_texts(exchange: mc.Exchange) -> set[str]:
    return {text for line in exchange.lines if line.who == "user" for text in line.texts}


def answers(turns: list[dict]) -> list[tuple[dict, dict]]:
    """(user's turn, agent's turn after it), back-channels left out."""
    turns = [turn for turn in turns if turn["intent"] != mc.BACKCHANNEL]
    return [(a, b) for a, b in zip(turns, turns[1:], strict=False) if b["who"] == "agent"]


# ---------------------------------------------------------------------------------- scripts


def test_scripts_of_a_split():
    exchanges = dialogues.load_scripts(SCRIPTS)
    for language in mc.SPOKEN:
        train = mc.choose_exchanges(exchanges, language, "train")
        test = mc.choose_exchanges(exchanges, language, "test")
        wordings = [{t for e in chosen for t in user_texts(e)} for chosen in (train, test)]
        assert not wordings[0] & wordings[1]
        replies = {e.id: [n.texts for n in e.lines if n.who == "agent"] for e in train}
        assert all(replies[e.id] == [n.texts for n in e.lines if n.who == "agent"] for e in test)
        simple = mc.choose_exchanges(exchanges, language, "train", (), True)
        assert all(e.id.endswith("-001") for e in simple)
        assert len({e.intent for e in simple}) == len(simple)
    weather = mc.choose_exchanges(exchanges, "english", "train", ("weather",), True)
    assert [e.id for e in weather] == ["en-weather-001"]
    with pytest.raises(UserError, match="intent cooking"):
        mc.choose_exchanges(exchanges, "english", "train", ("cooking",))


SCRIPT = (
    '{"id": "a", "language": "english", "intent": "x", "held_out": false, "turns": '
    '[{"who": "user", %s}, {"who": "agent", "text": "b"}]}'
)


def test_scripts_are_read_by_line_feeds_and_an_id_is_there_once(tmp_path):
    (tmp_path / "a.jsonl").write_text((SCRIPT % '"text": "a\u2028b\x85c"') + "\n")
    assert dialogues.load_scripts(tmp_path)[0].lines[0].texts == ("a\u2028b\x85c",)
    (tmp_path / "b.jsonl").write_text((SCRIPT % '"text": "other"') + "\n")
    with pytest.raises(UserError, match="b.jsonl: the id 'a' is there twice"):
        dialogues.load_scripts(tmp_path)


PAIR = '[{"who": "user", "texts": ["a"]}, {"who": "agent", "text": "a"}]'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"id": "a", "language": "english", "intent": "x", "turns": []}',
        '{"id": "a", "language": "english", "turns": ' + PAIR + "}",
        '{"id": "a", "language": "english", "intent": "x", "turns": ' + PAIR[:30] + "]}",
        '{"id": "a", "language": "french", "intent": "x", "turns": ' + PAIR + "}",
        SCRIPT % '"texts": "a b"',
        SCRIPT % '"texts": []',
        SCRIPT % '"texts": ["a", 1]',
        SCRIPT % '"text": null',
        SCRIPT % '"text": "..."',
        SCRIPT % '"text": "a", "emotion": "joyful"',
        SCRIPT % '"text": "a", "emotion": true',
        (SCRIPT % '"text": "a"').replace("[{", "{").replace("}]", "}"),
        (SCRIPT % '"text": "a"').replace('"held_out": false', '"held_out": "no"'),
        (SCRIPT % '"text": "a"').replace('"id": "a"', '"id": 7'),
        (SCRIPT % '"text": "a"').replace('"user"', '"User"'),
    ],
)
def test_bad_scripts_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="a.jsonl, line 1"):
        dialogues.load_scripts(tmp_path)


# ---------------------------------------------------------------------------------- timing


def test_a_reply_begins_on_a_tick_so_that_its_codes_are_the_same_each_time(mixed):
    replies = {}
    for plan, conversation, takes in mixed:
        onsets = {t.request.text: k.onset for t, k in zip(plan.turns, takes, strict=True)}
        for turn in conversation["turns"]:
            if turn["who"] == "agent" and not turn["interrupted"]:
                first = round((turn["start"] - onsets[turn["text"]]) * SAMPLE_RATE)
                assert first % 960 <= 2 or first % 960 >= 958
                replies[turn["text"]] = replies.get(turn["text"], 0) + 1
    assert max(replies.values()) > 1


def test_answers_come_after_80_to_240_ms(mixed):
    gaps = [b["start"] - a["end"] for _, c, _ in mixed for a, b in answers(c["turns"])]
    assert len(gaps) > 300
    assert min(gaps) >= 0.08 - 2e-4 and max(gaps) <= 0.24 + 2e-4
    assert np.ptp(gaps) > 0.14


def test_the_audio_begins_and_ends_where_the_turns_say(mixed):
    for plan, c, _ in mixed:
        spoken = np.zeros(len(c["agent"]), bool)
        for turn in (t for t in c["turns"] if t["who"] == "agent"):
            first, last = round(turn["start"] * SAMPLE_RATE), round(turn["end"] * SAMPLE_RATE)
            spoken[max(0, first - 720) : last + 1440] = True
            assert np.abs(c["agent"][first : first + 480]).max() > 0.01
            if turn["interrupted"]:
                assert not c["agent"][last : last + 240].any()
        assert not c["agent"][~spoken].any()  # exact digital silence
        assert len(c["agent"]) == len(c["user"]) and len(c["agent"]) % HOP == 0
        assert plan.turns or not c["agent"].any()


def test_barge_ins_stop_the_agent(mixed):
    cut = delays = 0
    replies = [t for _, c, _ in mixed for t in c["turns"] if t["who"] == "agent"]
    for _, c, _ in mixed:
        turns = [t for t in c["turns"] if t["intent"] != mc.BACKCHANNEL]
        for agent, user in zip(turns, turns[1:], strict=False):
            if agent["who"] != "agent":
                continue
            late = agent["end"] - user["start"]
            if agent["interrupted"]:
                assert user["who"] == "user" and 0.1 - 2e-4 <= late <= 0.2 + 2e-4
                said = agent["text"].split()
                assert said == ["w0", "w1", "w2", "w3", "w4"][: len(said)] and len(said) < 5
                assert len(agent["words"]) == len(said)
                assert all(w[2] <= agent["end"] + 1e-3 for w in agent["words"])
                assert agent["phones"][-1][2] <= agent["end"] + 1e-3
                cut += 1
            else:
                assert late <= 0.25 + 2e-4  # an overlap: the agent ends by itself
                assert agent["text"] == "w0 w1 w2 w3 w4"
                delays += late > 0
    assert 0.03 < cut / len(replies) < 0.15
    assert delays > 3


def test_back_channels_lie_inside_the_agents_turns(mixed):
    found = 0
    for _, c, _ in mixed:
        for turn in (t for t in c["turns"] if t["intent"] == mc.BACKCHANNEL):
            agents = [t for t in c["turns"] if t["who"] == "agent"]
            assert any(t["start"] < turn["start"] and turn["end"] + 0.19 < t["end"] for t in agents)
            found += 1
    assert found > 5


def test_some_calls_hold_no_speech():
    exchanges = mc.choose_exchanges(mc.scripts(SCRIPTS / "english.jsonl"), "english", "train")
    users, agent = [fake_voice("user")], fake_voice("agent")
    draws = [np.random.default_rng(i) for i in range(500)]
    plans = [mc.plan_conversation(exchanges, users, agent, rng) for rng in draws]
    idle = [plan for plan in plans if not plan.turns]
    assert 0.02 < len(idle) / len(plans) < 0.07
    silent = mc.mix("c", "english", replace(idle[0], microphone=quiet_microphone()), [], [])
    assert not silent["turns"] and len(silent["agent"]) >= 5 * SAMPLE_RATE
    assert not silent["agent"].any() and not silent["user"].any()


def test_a_pause_inside_a_turn():
    take = cut_take(tone(2.0))
    paused = insert_pause(take, 0.5, 0.5)
    assert paused.length == pytest.approx(take.length + 0.5)
    assert len(paused.audio) == len(take.audio) + SAMPLE_RATE // 2
    start, end = max(((s, e) for p, s, e in paused.phones if p == "_"), key=lambda t: t[1] - t[0])
    assert not paused.audio[round(start * SAMPLE_RATE) + 1 : round(end * SAMPLE_RATE) - 1].any()
    assert [w[0] for w in paused.words] == ["w0", "w1", "w2", "w3", "w4"]
    gaps = [b[1] - a[2] for a, b in zip(paused.words, paused.words[1:], strict=False)]
    assert sorted(gaps)[-1] == pytest.approx(0.5, abs=1e-6) and sorted(gaps)[-2] < 1e-6
    for spans in (paused.phones, paused.words):
        assert all(a[2] <= b[1] + 1e-6 for a, b in zip(spans, spans[1:], strict=False))
    wordless = replace(take, words=None)
    assert insert_pause(wordless, 0.5, 0.5) is wordless


def test_a_take_is_cut_to_what_is_heard():
    said = tone(1.0)
    padded = replace(said, audio=np.pad(said.audio, SAMPLE_RATE))
    take = cut_take(padded)
    assert take.length == pytest.approx(1.0, abs=0.021)
    assert take.onset <= MARGIN_BEFORE + 1e-9
    assert len(take.audio) / SAMPLE_RATE <= 1.02 + MARGIN_BEFORE + MARGIN_AFTER
    assert take.audio[0] == take.audio[-1] == 0
    assert cut_take(speech.Utterance(np.zeros(SAMPLE_RATE, np.float32))) is None


# ---------------------------------------------------------------------------------- microphone


def test_echo_is_the_agents_delayed_and_quieter_voice():
    rng = np.random.default_rng(0)
    agent = np.zeros(4 * SAMPLE_RATE, np.float32)
    agent[SAMPLE_RATE : 2 * SAMPLE_RATE] = 0.1 * rng.standard_normal(SAMPLE_RATE)
    user = mc._through(quiet_microphone(echo=(0.1, -30.0)), np.zeros_like(agent), agent, [], rng)
    delayed = np.roll(agent, round(0.1 * SAMPLE_RATE)) * 10 ** (-30 / 20)
    assert np.abs(user - delayed).max() < 1e-6


def test_a_third_of_conversations_have_echo():
    drawn = [mc.draw_microphone(np.random.default_rng(i)) for i in range(2000)]
    echoes = [m.echo for m in drawn if m.echo]
    assert 0.29 < len(echoes) / len(drawn) < 0.38
    assert all(0.05 <= delay <= 0.25 and -45 <= level <= -20 for delay, level in echoes)
    assert all(10 <= m.snr_db <= 40 for m in drawn)
    assert {m.noise for m in drawn} == {None, *mc.NOISES}


@pytest.mark.parametrize("kind", mc.NOISES)
def test_noise_has_the_drawn_level(kind):
    speech_audio = tone(3.0).audio
    user = np.zeros(5 * SAMPLE_RATE, np.float32)
    user[: len(speech_audio)] = speech_audio
    rng = np.random.default_rng(1)
    microphone = quiet_microphone(noise=kind, snr_db=15.0)
    noisy = mc._through(microphone, user, np.zeros_like(user), [tone(0.7).audio], rng)
    level = np.sqrt(np.mean(user[np.abs(user) > 1e-4] ** 2))
    ratio = 20 * np.log10(level / np.sqrt(np.mean((noisy - user) ** 2)))
    assert ratio == pytest.approx(15.0, abs=0.3)


def test_rooms_and_narrow_lines_keep_the_time():
    rng = np.random.default_rng(2)
    response = data.room_response(0.3, -12.0, rng)
    assert response[0] == 1 and np.argmax(np.abs(response)) == 0
    assert 10 * np.log10(np.sum(response[1:] ** 2)) == pytest.approx(-12.0, abs=0.01)
    user = np.pad(tone(1.0).audio, 4000)
    narrow = mc._through(quiet_microphone(band_hz=8000), user, np.zeros_like(user), [], rng)
    lags = np.correlate(narrow[10000:16000], user[9990:16010], "valid")
    assert np.argmax(lags) == 10
    spectrum = np.abs(np.fft.rfft(narrow))
    assert spectrum[len(spectrum) // 2 :].max() < 1e-2 * spectrum.max()


def test_another_microphone_colours_by_at_most_8_db_and_keeps_the_time():
    user = np.zeros(SAMPLE_RATE, np.float32)
    user[SAMPLE_RATE // 2] = 0.5
    rng = np.random.default_rng(3)
    heard = mc._through(quiet_microphone(coloured=True), user, 0 * user, [], rng)
    gains_db = 20 * np.log10(np.abs(np.fft.rfft(heard)) / 0.5)
    assert np.argmax(np.abs(heard)) == SAMPLE_RATE // 2
    assert np.abs(gains_db).max() < 8.01 and np.ptp(gains_db) > 4
    drawn = [mc.draw_microphone(np.random.default_rng(i)).coloured for i in range(2000)]
    assert 0.46 < np.mean(drawn) < 0.54


# ---------------------------------------------------------------------------------- the dataset


def espeak_role(language, role="user", split="train", engines=None):
    """A few quick voices in place of all that are installed."""
    mine = ALL_VOICES(language, "user", "train", ("espeak",))
    part = {"train": mine[1:5], "validation": mine[5:6], "test": mine[6:7]}[split]
    chosen = mine[:1] if role == "agent" else part
    return [replace(voice, role=role, split=split) for voice in chosen]


ALL_VOICES = speech.voices


def test_turns_in_any_emotion_say_and_do_the_same_otherwise():
    exchanges = mc.choose_exchanges(mc.scripts(SCRIPTS / "english.jsonl"), "english", "train")
    cast = exchanges, [fake_voice("user")], fake_voice("agent", name="agent")
    plans = [mc.plan_conversation(*cast, np.random.default_rng(i), True) for i in range(40)]
    turns = [t for plan in plans for t in plan.turns if t.inside is None]
    for who in ("user", "agent"):
        assert {t.request.emotion for t in turns if t.who == who} == set(speech.STYLES)
    lines = {line.texts: line for e in exchanges for line in e.lines}
    assert any(t.request.emotion != line.emotion for t in turns
               for texts, line in lines.items() if t.request.text in texts)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    pytest.importorskip("espeakng_loader", reason="speech for this test: espeakng-loader")
    monkeypatch.setattr(speech, "voices", espeak_role)
    monkeypatch.setattr(mc, "PART_CONVERSATIONS", 2)
    fresh_process()


@pytest.fixture(scope="module")
def codec_path(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = CodecConfig(
        front_dim=24, encoder_dim=32, semantic_width=32, encoder_layers=1, decoder_front_dim=24,
        decoder_dim=32, decoder_layers=1, num_heads=2, context=16, semantic_dim=8, acoustic_dim=8,
        codebook_sizes=(64,) * 8,
    )  # fmt: skip
    codec, folder = Codec(config), tmp_path_factory.mktemp("codec")
    save_checkpoint(folder, 1, stored_config("codec", config), codec.export_tensors())
    return folder


def command(folder: Path, codec: Path, *more: str) -> list[str]:
    return [
        "--output_dir", str(folder), "--codec", str(codec), "--languages", "english",
        "--num_conversations", "4", "--num_workers", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return list(dialogues.load_code_dataset(folder)[0])


def assert_same(a: list[dict], b: list[dict]) -> None:
    assert [row["id"] for row in a] == [row["id"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert x["turns"] == y["turns"]
        assert all(np.array_equal(x[c], y[c]) for c in CODES)


@pytest.fixture
def made(tmp_path, codec_path, quick) -> Path:
    mc.main(command(tmp_path / "set", codec_path, "--save_audio", "2"))
    return tmp_path / "set"


def test_dataset_holds_codes_of_its_audio(made, codec_path):
    codec = Codec.from_checkpoint(codec_path)
    dataset, info = dialogues.load_code_dataset(made, codec.fingerprint)
    assert len(dataset) == 4 and set(dataset.column_names) == {
        "id", "language", "source", "split", "agent_codes", "user_codes", "turns",
    }  # fmt: skip
    assert info["frame_rate"] == 50.0 and info["codebook_sizes"] == [64] * 8
    rows = {row["id"]: row for row in dataset}
    saved = list((made / "audio").iterdir())
    assert len(saved) == 2
    for path in saved:
        row = rows[path.stem]
        audio, rate = soundfile.read(path, dtype="float32")
        assert rate == SAMPLE_RATE and audio.shape == (len(row["agent_codes"]) * HOP, 2)
        silent = codec.encode(torch.from_numpy(audio[:, 0])[None, None])[0].T.numpy()
        assert row["agent_codes"].dtype == np.uint16 and row["agent_codes"].shape[1] == 8
        # The file has 16 bits, the codes came from the floats: a few codes flip.
        assert (silent == row["agent_codes"]).mean() > 0.95
    for row in rows.values():
        assert row["agent_codes"].shape == row["user_codes"].shape
        for turn in row["turns"]:
            assert turn["text"] and turn["voice"].startswith("english/espeak")
            phone, start, end = turn["phones"][len(turn["phones"]) // 2]
            assert phone in PHONES and turn["start"] - 0.1 < start < end < turn["end"] + 0.1
            assert turn["words"] is None or all(len(word) == 3 for word in turn["words"])


def test_the_same_command_makes_the_same_bytes_and_another_seed_others(made, codec_path, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    fresh_process()
    mc.main(command(again, codec_path))
    assert_same(rows_of(made), rows_of(again))
    mc.main(command(other, codec_path, "--seed", "1"))
    assert rows_of(other)[0]["turns"] != rows_of(made)[0]["turns"]
    # Finished: nothing is made anew. Other settings are refused. More is added to what is there.
    before = {p.name: p.stat().st_mtime_ns for p in again.glob("*.arrow")}
    mc.main(command(again, codec_path))
    assert before == {p.name: p.stat().st_mtime_ns for p in again.glob("*.arrow")}
    with pytest.raises(UserError, match="made with seed 0, not 2"):
        mc.main(command(again, codec_path, "--seed", "2"))
    mc.main(command(again, codec_path, "--num_conversations", "6"))
    assert_same(rows_of(again)[:4], rows_of(made))


def test_parts_become_few_files_and_a_part_cut_short_is_made_anew(
    codec_path, tmp_path, quick, monkeypatch
):
    def tones(requests):
        return [tone(0.5) for _ in requests]

    def made(count: int, part: int, folder: str) -> list[str]:
        monkeypatch.setattr(mc, "PART_CONVERSATIONS", part)
        mc.main(command(tmp_path / folder, codec_path, "--num_conversations", str(count)))
        return [row["id"][-9:] for row in rows_of(tmp_path / folder)]

    def files() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("*.arrow")}

    monkeypatch.setattr(speech, "synthesize", tones)
    monkeypatch.setattr(mc, "WRITE_SECONDS", 0.0)  # a file a part
    assert made(3, 1, "set") == ["00000-000", "00001-000", "00002-000"]
    first = files()
    assert len(first) == 3
    assert made(4, 1, "set") == ["00000-000", "00001-000", "00002-000", "00003-000"]
    assert first.items() <= files().items() and len(files()) == 4
    assert made(3, 2, "whole") == ["00000-000", "00000-001", "00001-000"]
    assert made(4, 2, "whole") == ["00000-000", "00000-001", "00001-000", "00001-001"]


def test_conversations_that_cannot_be_spoken_are_counted(
    codec_path, tmp_path, quick, monkeypatch, capsys
):
    say = speech.synthesize

    def fails(requests):
        if any(r.text == "ghost" for r in requests):
            raise UserError("no such sound")
        return say(requests)

    monkeypatch.setattr(speech, "synthesize", fails)
    scripts = tmp_path / "s"
    scripts.mkdir()
    lines = [(SCRIPT % f'"text": "{t}"').replace('"id": "a"', f'"id": "{t}"') for t in ("ghost",)]
    (scripts / "english.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(mc, "IDLE_CHANCE", 0.0)
    arguments = command(tmp_path / "none", codec_path, "--scripts", str(scripts))
    for _ in range(2):
        with pytest.raises(UserError, match="nothing could be made, 4 left out; first: .*ghost"):
            mc.main(arguments)
    lines += [(SCRIPT % '"text": "hello"').replace('"id": "a"', f'"id": "{i}"') for i in range(9)]
    (scripts / "english.jsonl").write_text("\n".join(lines) + "\n")
    fresh_process()
    mc.main(command(tmp_path / "some", codec_path, "--scripts", str(scripts)))
    said, count = capsys.readouterr().out, len(rows_of(tmp_path / "some"))
    assert f"{count} made" in said and (count == 4 or f"{4 - count} left out" in said)


class Hummer:
    """A speech engine that knows no times of phones, as most natural ones."""

    name, install = "hummer", "pip install hummer"

    def voices(self, language: str) -> list[speech.Voice]:
        return [
            speech.Voice(f"{language}/{name}", self.name, language, name, name, role=role)
            for name, role in (("hal", "agent"), ("una", "user"))
        ]

    def say(self, orders) -> list[speech.Raw]:
        said = [tone(round(0.1 + 0.05 * len(order.text), 2)) for order in orders]
        return [speech.Raw(utterance.audio, SAMPLE_RATE) for utterance in said]


def test_an_engine_is_picked_by_name(codec_path, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "all_engines", lambda: {"hummer": Hummer()})
    monkeypatch.setattr(mc, "BARGE_IN_CHANCE", 1.0)
    fresh_process()
    arguments = command(tmp_path / "set", codec_path, "--engines", "hummer")
    mc.main(arguments)
    turns = [turn for row in rows_of(tmp_path / "set") for turn in row["turns"]]
    assert {turn["voice"] for turn in turns} == {"english/hal", "english/una"}
    assert all(turn["phones"] is turn["words"] is None for turn in turns)
    assert all(turn["text"] for turn in turns) and any(turn["interrupted"] for turn in turns)
    with pytest.raises(UserError, match=r"made with engines \['hummer'\], not None"):
        mc.main(arguments[:-2])
    with pytest.raises(UserError, match="no speech engine 'nobody': engines are hummer"):
        mc.main(command(tmp_path / "none", codec_path, "--engines", "nobody"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_wordings_and_voices_stay_apart(split, made, codec_path, tmp_path):
    def user_turns(folder):
        turns = [t for row in rows_of(folder) for t in row["turns"]]
        return [t for t in turns if t["who"] == "user" and t["exchange"]]

    scripts = dialogues.load_scripts(SCRIPTS / "english.jsonl")
    held_out = {t for e in scripts if e.held_out for t in user_texts(e)}
    mc.main(command(tmp_path / "held", codec_path, "--split", split))
    train, held = user_turns(made), user_turns(tmp_path / "held")
    assert train and not {t["text"] for t in train} & held_out
    assert held and {t["text"] for t in held} <= held_out
    assert not {t["voice"] for t in train} & {t["voice"] for t in held}
    assert {row["split"] for row in rows_of(tmp_path / "held")} == {split}


def listed(folder: Path) -> list[str]:
    """The files that a run can go on from."""
    path = folder / "parts.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def test_a_killed_run_goes_on(codec_path, tmp_path, quick):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = command(killed, codec_path)[2:]
    root = str(Path(mc.__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.Popen(
        [sys.executable, __file__, "--output_dir", str(killed), *arguments], env=environment
    )
    while process.poll() is None and not listed(killed):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = killed / listed(killed)[0]
    assert not (killed / "state.json").exists()
    stamp = first.stat().st_mtime_ns
    with pytest.raises(UserError, match="no complete"):
        dialogues.load_code_dataset(killed)
    mc.main(command(killed, codec_path))
    mc.main(command(whole, codec_path))
    assert first.stat().st_mtime_ns == stamp
    assert_same(rows_of(killed), rows_of(whole))


def test_encoding_in_batches_equals_one_by_one(codec_path):
    codec, rng = Codec.from_checkpoint(codec_path), np.random.default_rng(0)
    lengths = (HOP, 10 * HOP, 700 * HOP, 333 * HOP, 2 * HOP + 7)
    channels = [0.1 * rng.standard_normal(n).astype(np.float32) for n in lengths]
    for channel, codes in zip(channels, mc.encode_channels(codec, channels, batch=3), strict=True):
        alone = codec.encode(torch.from_numpy(channel)[None, None], 8)[0].T.numpy()
        assert alone.shape == codes.shape
        # Sums of another order: a code on the border between two may fall to the other side.
        assert (alone == codes).all(axis=1).mean() > 0.99


def test_datasets_are_checked(tmp_path):
    row = {"id": "a", "language": "english", "source": "x", "split": "train"}
    turn = {"who": "user", "start": 0.0, "end": 1.0, "text": None, "phones": [["a", 0.0, 0.5]]}
    codes = np.arange(24, dtype=np.uint16).reshape(3, 8)
    rows = [{**row, "agent_codes": codes, "user_codes": codes + 1, "turns": [turn]}]
    info = {"codec_fingerprint": "f" * 64, "frame_rate": 50.0, "codebook_sizes": [1024] * 8}
    (tmp_path / "d").mkdir()
    dialogues.write_arrow(tmp_path / "d" / "data-00000.arrow", rows)
    dialogues.finish_dataset(tmp_path / "d", ["data-00000.arrow"], info)
    dataset, read = dialogues.load_code_dataset(tmp_path / "d", "f" * 64)
    assert read == info and np.array_equal(dataset[0]["user_codes"], codes + 1)
    assert dataset[0]["turns"][0]["phones"] == [["a", 0.0, 0.5]]
    assert dataset[0]["turns"][0]["words"] is None
    with pytest.raises(UserError, match="ffffffff.*eeeeeeee"):
        dialogues.load_code_dataset(tmp_path / "d", "e" * 64)
    with pytest.raises(UserError, match="no complete code dataset"):
        dialogues.load_code_dataset(tmp_path / "nothing")
    (tmp_path / "d" / "data-00000.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        dialogues.load_code_dataset(tmp_path / "d")


# ---------------------------------------------------------------------------------- recordings


def test_real_recordings_are_encoded(tmp_path, codec_path):
    folder, out = tmp_path / "real", tmp_path / "set"
    folder.mkdir()
    audio = np.zeros((2 * 16000, 2), np.float32)
    audio[8000:16000, 1] = 0.1 * np.random.default_rng(0).standard_normal(8000)
    for name in ("a", "b", "mono"):
        soundfile.write(folder / f"{name}.wav", audio[:, 0] if name == "mono" else audio, 16000)
    (folder / "broken.wav").write_text("no audio")
    turns = [
        {"who": "user", "start": 0.5, "end": 1.0, "text": "hi", "emotion": "happy"},
        {"who": "agent", "start": 1.2, "end": 1.9, "text": "hello", "words": [["hello", 1.2, 1.9]]},
    ]
    own = {"path": "a.wav", "agent_channel": 0, "user_channel": 1, "language": "english"}
    lines = [{"id": "own", **own, "source": "studio", "turns": turns}]
    for name in ("mono", "broken"):
        lines.append({"id": name, **own, "path": f"{name}.wav", "turns": turns})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    (folder / "moshi.jsonl").write_text('{"path": "b.wav", "duration": 2.0}\n')
    alignments = [["Hel", [0.2, 0.4], "SPEAKER_MAIN"], ["lo", [0.4, 0.6], "SPEAKER_MAIN"]]
    alignments += [["yes", [0.9, 1.0], "SPEAKER_USER"], ["Bye", [1.7, 1.9], "SPEAKER_MAIN"]]
    (folder / "b.json").write_text(json.dumps({"alignments": alignments}))
    mc.main(command(out, codec_path, "--conversations", str(folder)))
    rows = {row["id"]: row for row in rows_of(out)}
    assert set(rows) == {"own", "b"}
    assert rows["own"]["agent_codes"].shape == rows["own"]["user_codes"].shape == (100, 8)
    assert rows["own"]["turns"][0]["emotion"] == "happy" and rows["own"]["source"] == "studio"
    assert [t["text"] for t in rows["b"]["turns"]] == ["Hel lo", "yes", "Bye"]
    assert [t["who"] for t in rows["b"]["turns"]] == ["agent", "user", "agent"]
    assert len((out / "dropped.txt").read_text().splitlines()) == 2


TURN = {"who": "user", "start": 0.1, "end": 0.9, "text": "hi"}


@pytest.mark.parametrize(
    ("changes", "turn"),
    [
        ({"path": 5}, {}),
        ({"path": None}, {}),
        ({"id": 5}, {}),
        ({"agent_channel": "left"}, {}),
        ({"agent_channel": True}, {}),
        ({"agent_channel": -1}, {}),
        ({"agent_channel": 1}, {}),
        ({"language": "french"}, {}),
        ({"split": "dev"}, {}),
        ({"source": 3}, {}),
        ({"turns": "hi"}, {}),
        ({"turns": ["hi"]}, {}),
        ({}, {"who": "bob"}),
        ({}, {"start": None}),
        ({}, {"start": "0.1"}),
        ({}, {"start": 1.0, "end": 0.5}),
        ({}, {"start": -1}),
        ({}, {"end": float("nan")}),
        ({}, {"text": ["hi"]}),
        ({}, {"emotion": "joyful"}),
        ({}, {"interrupted": "no"}),
        ({}, {"words": "hi"}),
        ({}, {"words": ["hi"]}),
        ({}, {"words": [["hi", 0.9, 0.1]]}),
        ({}, {"phones": [["a", "0.1", 0.9]]}),
        ({}, {"phones": [["AA1", 0.1, 0.9]]}),
    ],
)
def test_malformed_conversation_lines_are_named(tmp_path, changes, turn):
    good = json.dumps({"path": "a.wav", "turns": [TURN]})
    bad = json.dumps({"path": "b.wav", "turns": [{**TURN, **turn}], **changes})
    (tmp_path / "m.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(UserError, match="m.jsonl, line 2") as told:
        dialogues.read_recordings(tmp_path)
    field = next(iter({**changes, **turn}))
    assert field in str(told.value) or "goes from" in str(told.value) or "phone" in str(told.value)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"alignments": null}',
        '{"alignments": {"a": 1}}',
        '{"alignments": [["a", 0.1, 0.2, "SPEAKER_MAIN"]]}',
        '{"alignments": [["a", [0.2, 0.1], "SPEAKER_MAIN"]]}',
        '{"alignments": [["a", [0.1, NaN], "SPEAKER_MAIN"]]}',
        '{"alignments": [["a", ["0", "1"], "SPEAKER_MAIN"]]}',
        '{"alignments": [[null, [0.1, 0.2], "SPEAKER_MAIN"]]}',
        '{"alignments": [["a", [0.1, 0.2], 0]]}',
    ],
)
def test_malformed_alignments_are_named(tmp_path, text):
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "duration": 2.0}\n')
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json: .*alignments"):
        dialogues.read_recordings(tmp_path)


def test_bad_conversation_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        dialogues.read_recordings(tmp_path / "none")
    with pytest.raises(UserError, match="no conversation manifest"):
        dialogues.read_recordings(tmp_path)


def recordings_of(folder: Path, **sounds: np.ndarray) -> None:
    """Two-channel float files at 24 kHz and a manifest of one turn each."""
    folder.mkdir(exist_ok=True)
    for name, audio in sounds.items():
        soundfile.write(folder / f"{name}.wav", audio, SAMPLE_RATE, "FLOAT")
    lines = [json.dumps({"id": n, "path": f"{n}.wav", "turns": []}) for n in sorted(sounds)]
    (folder / "m.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def no_detector(monkeypatch):
    monkeypatch.setattr(mc, "_detected_turns", lambda user: [{**TURN, "end": 0.5}])


def test_odd_recordings_are_left_out_and_counted(tmp_path, codec_path, no_detector, capsys):
    rng = np.random.default_rng(0)
    good = 0.1 * rng.standard_normal((SAMPLE_RATE, 2)).astype(np.float32)
    nan, inf, three = good.copy(), good.copy(), np.pad(good, ((0, 0), (0, 1)))
    nan[500, 0], inf[500, 1] = np.nan, np.inf
    recordings_of(
        tmp_path / "in", good=good, nan=nan, inf=inf, short=good[:900], mono=good[:, 0],
        three=three, none=good[:0], turned=good * [1, -1], whole=good * 32768, piped=good,
    )  # fmt: skip
    piped = bytearray((tmp_path / "in" / "piped.wav").read_bytes())
    size = piped.index(b"data") + 4
    piped[size : size + 4] = bytes(4)  # a header written before its sound
    (tmp_path / "in" / "piped.wav").write_bytes(piped)
    with open(tmp_path / "in" / "m.jsonl", "a", encoding="utf-8") as file:
        late = {"id": "late", "path": "good.wav", "turns": [{**TURN, "end": 9.0}]}
        named = ({"path": "gone.wav"}, {"path": "not-\udcff-utf8.wav"})
        for line in (late, {"id": "good", "path": "good.wav"}, *named):
            file.write(json.dumps(line) + "\n")
    arguments = command(tmp_path / "out", codec_path, "--conversations", str(tmp_path / "in"))
    for _ in range(2):  # pasted again: nothing is made, and the count is the same
        mc.main(arguments)
        kept = {"good", "three", "turned", "whole", "piped"}
        assert {row["id"] for row in rows_of(tmp_path / "out")} == kept
        reasons = (tmp_path / "out" / "dropped.txt").read_text()
        assert "9 left out" in capsys.readouterr().out and len(reasons.splitlines()) == 9
        for word in (
            "no numbers",
            "shorter than a patch",
            "1 channels",
            "was there before",
            "9 s",
        ):
            assert word in reasons
    (tmp_path / "in" / "m.jsonl").write_text('{"id": "nan", "path": "nan.wav"}\n')
    with pytest.raises(UserError, match="nothing could be made, 1 left out; first: .*no numbers"):
        mc.main(command(tmp_path / "bad", codec_path, "--conversations", str(tmp_path / "in")))


def test_recordings_may_be_added_changed_and_taken_away(
    tmp_path, codec_path, no_detector, monkeypatch
):
    rng = np.random.default_rng(0)
    sounds = {n: 0.1 * rng.standard_normal((4800, 2)).astype(np.float32) for n in "bcdefg"}
    arguments = command(tmp_path / "out", codec_path, "--conversations", str(tmp_path / "in"))
    monkeypatch.setattr(mc, "FILE_SECONDS", 0.7)

    def made(**changes) -> dict[str, dict]:
        for name, sound in changes.items():
            sounds.pop(name) if sound is None else sounds.update({name: sound})
        files = {n: s for n, s in sounds.items() if changes.get(n) is s or not changes}
        lines = [json.dumps({"id": n, "path": f"{n}.wav", "turns": []}) for n in sorted(sounds)]
        recordings_of(tmp_path / "in", **files)
        (tmp_path / "in" / "m.jsonl").write_text("\n".join(lines) + "\n")
        mc.main(arguments)
        rows = rows_of(tmp_path / "out")
        assert sorted(row["id"] for row in rows) == sorted(sounds)
        return {row["id"]: row for row in rows}

    first = made()
    names = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.arrow")}
    assert len(names) == 2  # six recordings, four a file
    grown = made(a=sounds["b"], z=sounds["c"][:2400])
    assert (
        names.items()
        <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.arrow")}.items()
    )
    assert np.array_equal(grown["a"]["user_codes"], first["b"]["user_codes"])
    assert np.array_equal(grown["g"]["user_codes"], first["g"]["user_codes"])
    changed = made(b=sounds["g"][::-1].copy())
    assert not np.array_equal(changed["b"]["user_codes"], first["b"]["user_codes"])
    (tmp_path / "in" / "d.wav").unlink()  # encoded: it may go
    assert np.array_equal(made(c=None)["d"]["user_codes"], first["d"]["user_codes"])


def test_workers_encode_on_a_cpu_and_one_process_for_another_device(tmp_path, codec_path):
    """`cpu:0` stands for a GPU: workers then hold no codec, and codes are the same."""
    rng = np.random.default_rng(0)
    sounds = {n: 0.1 * rng.standard_normal((SAMPLE_RATE, 2)).astype(np.float32) for n in "abc"}
    recordings_of(tmp_path / "in", **sounds)
    lines = [json.dumps({"id": n, "path": f"{n}.wav", "turns": [TURN]}) for n in "abc"]
    (tmp_path / "in" / "m.jsonl").write_text("\n".join(lines))
    (first, *_), made = dialogues.read_recordings(tmp_path / "in"), {}
    for device, workers in (("cpu", "0"), ("cpu:0", "2")):
        folder = tmp_path / device.replace(":", "")
        more = ("--conversations", str(tmp_path / "in"), "--num_workers", workers)
        folder.mkdir()
        args = mc.parse_arguments(command(folder, codec_path, *more))
        args.device = device
        ((row,), _, _) = mc._work(mc.make_recording, args, first)
        assert ("agent" in row, "agent_codes" in row) == (device != "cpu", device == "cpu")
        mc.make_dataset(args)
        made[device] = rows_of(folder)
    assert [row["id"] for row in made["cpu"]] == [row["id"] for row in made["cpu:0"]] == [*"abc"]
    for x, y in zip(*made.values(), strict=True):
        assert x["turns"] == y["turns"]
        # Batches of another size: a code on the border between two may fall to the other side.
        assert all((x[c] == y[c]).mean() > 0.99 for c in CODES)


# ---------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "say how much"),
        ("--hours -1", "--hours"),
        ("--hours nan", "--hours"),
        ("--num_conversations 0", "--num_conversations"),
        ("--hours 1 --seed -3", "--seed"),
        ("--hours 1 --num_workers -1", "--num_workers"),
        ("--hours 1 --save_audio -1", "--save_audio"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        mc.main(arguments.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said


def test_a_device_and_a_folder_that_cannot_be_used_are_told_before_anything(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--output_dir .*cannot be written"):
        mc.main(["--hours", "1", "--output_dir", str(tmp_path / "file"), "--codec", "none"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU here"):
            mc.main(["--hours", "1", "--device", "cuda", "--output_dir", str(tmp_path / "o")])
    arguments = ["--hours", "1", "--output_dir", str(tmp_path / "o"), "--codec", "none"]
    (tmp_path / "o").mkdir()
    with only_one(tmp_path / "o"), pytest.raises(UserError, match="another process"):
        mc.main(arguments)


if __name__ == "__main__":  # the process that test_a_killed_run_goes_on kills
    speech.voices = espeak_role
    mc.PART_CONVERSATIONS, mc.WRITE_SECONDS = 2, 0.0
    mc.main(sys.argv[1:])
