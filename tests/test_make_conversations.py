"""Conversations: their timing, their channels, who may be heard where, and the dataset on disk."""

from __future__ import annotations

import json
import os
import shutil
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

import make_conversations as mc
import speech
from codec import Codec, CodecConfig, stored_config
from command import UserError
from data import HOP, SAMPLE_RATE, load_clips, read_manifest
from training import save_checkpoint

SCRIPTS = Path(__file__).resolve().parent.parent / "conversations"
CODES = ("agent_codes", "user_codes")


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


def fake_conversations(count: int) -> list[tuple[mc.Plan, mc.Conversation, list]]:
    exchanges = mc.choose_exchanges(mc.load_scripts(SCRIPTS / "english.jsonl"), "english", "train")
    users, agent = [fake_voice("user")], fake_voice("agent", name="agent")
    made = []
    for i in range(count):
        rng = np.random.default_rng([7, i])
        plan = mc.plan_conversation(exchanges, users, agent, rng)
        takes = []
        for turn in plan.turns:
            seconds = 0.4 if turn.inside is not None else round(float(rng.uniform(0.8, 3.0)), 1)
            takes.append(mc.cut_take(tone(seconds, 220.0 if turn.who == "agent" else 130.0)))
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
    clean = mc.Microphone(0.0, None, 30.0, None, -12.0, None, None, 0)
    return replace(clean, **changes)


def user_texts(exchange: mc.Exchange) -> set[str]:
    return {text for line in exchange.lines if line.who == "user" for text in line.texts}


def answers(turns: list[dict]) -> list[tuple[dict, dict]]:
    """(user's turn, agent's turn after it), back-channels left out."""
    turns = [turn for turn in turns if turn["intent"] != mc.BACKCHANNEL]
    return [(a, b) for a, b in zip(turns, turns[1:], strict=False) if b["who"] == "agent"]


# ---------------------------------------------------------------------------------- scripts


def test_scripts_of_a_split():
    exchanges = mc.load_scripts(SCRIPTS)
    for language in mc.SPOKEN:
        train = mc.choose_exchanges(exchanges, language, "train")
        test = mc.choose_exchanges(exchanges, language, "test")
        wordings = [{t for e in chosen for t in user_texts(e)} for chosen in (train, test)]
        assert not wordings[0] & wordings[1]
        replies = {e.id: [n.texts for n in e.lines if n.who == "agent"] for e in train}
        assert all(replies[e.id] == [n.texts for n in e.lines if n.who == "agent"] for e in test)
        simple = mc.choose_exchanges(exchanges, language, "train", (), True)
        assert all(e.is_archetype for e in simple) and len({e.intent for e in simple}) == len(
            simple
        )
    weather = mc.choose_exchanges(exchanges, "english", "train", ("weather",), True)
    assert [e.id for e in weather] == ["en-weather-001"]
    with pytest.raises(UserError, match="intent cooking"):
        mc.choose_exchanges(exchanges, "english", "train", ("cooking",))


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
    ],
)
def test_bad_scripts_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="a.jsonl, line 1"):
        mc.load_scripts(tmp_path)


# ---------------------------------------------------------------------------------- timing


def test_a_reply_begins_on_a_tick_so_that_its_codes_are_the_same_each_time(mixed):
    replies = {}
    for plan, conversation, takes in mixed:
        onsets = {t.request.text: k.onset for t, k in zip(plan.turns, takes, strict=True)}
        for turn in conversation.turns:
            if turn["who"] == "agent" and not turn["interrupted"]:
                first = round((turn["start"] - onsets[turn["text"]]) * SAMPLE_RATE)
                assert first % 960 <= 2 or first % 960 >= 958
                replies[turn["text"]] = replies.get(turn["text"], 0) + 1
    assert max(replies.values()) > 1


def test_answers_come_after_80_to_240_ms(mixed):
    gaps = [b["start"] - a["end"] for _, c, _ in mixed for a, b in answers(c.turns)]
    assert len(gaps) > 300
    assert min(gaps) >= 0.08 - 2e-4 and max(gaps) <= 0.24 + 2e-4
    assert np.ptp(gaps) > 0.14


def test_the_audio_begins_and_ends_where_the_turns_say(mixed):
    for plan, c, _ in mixed:
        spoken = np.zeros(len(c.agent), bool)
        for turn in (t for t in c.turns if t["who"] == "agent"):
            first, last = round(turn["start"] * SAMPLE_RATE), round(turn["end"] * SAMPLE_RATE)
            spoken[max(0, first - 720) : last + 1440] = True
            assert np.abs(c.agent[first : first + 480]).max() > 0.01
            if turn["interrupted"]:
                assert not c.agent[last : last + 240].any()
        assert not c.agent[~spoken].any()  # exact digital silence
        assert len(c.agent) == len(c.user) and len(c.agent) % HOP == 0
        assert plan.turns or not c.agent.any()


def test_barge_ins_stop_the_agent(mixed):
    cut = delays = 0
    replies = [t for _, c, _ in mixed for t in c.turns if t["who"] == "agent"]
    for _, c, _ in mixed:
        turns = [t for t in c.turns if t["intent"] != mc.BACKCHANNEL]
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
        for turn in (t for t in c.turns if t["intent"] == mc.BACKCHANNEL):
            agents = [t for t in c.turns if t["who"] == "agent"]
            assert any(t["start"] < turn["start"] and turn["end"] + 0.19 < t["end"] for t in agents)
            found += 1
    assert found > 5


def test_some_calls_hold_no_speech():
    exchanges = mc.choose_exchanges(mc.load_scripts(SCRIPTS / "english.jsonl"), "english", "train")
    users, agent = [fake_voice("user")], fake_voice("agent")
    draws = [np.random.default_rng(i) for i in range(500)]
    plans = [mc.plan_conversation(exchanges, users, agent, rng) for rng in draws]
    idle = [plan for plan in plans if not plan.turns]
    assert 0.02 < len(idle) / len(plans) < 0.07
    silent = mc.mix("c", "english", replace(idle[0], microphone=quiet_microphone()), [], [])
    assert not silent.turns and len(silent.agent) >= 5 * SAMPLE_RATE
    assert not silent.agent.any() and not silent.user.any()


def test_a_pause_inside_a_turn():
    take = mc.cut_take(tone(2.0))
    paused = mc.insert_pause(take, 0.5, 0.5)
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
    assert mc.insert_pause(wordless, 0.5, 0.5) is wordless


def test_a_take_is_cut_to_what_is_heard():
    said = tone(1.0)
    padded = replace(said, audio=np.pad(said.audio, SAMPLE_RATE))
    take = mc.cut_take(padded)
    assert take.length == pytest.approx(1.0, abs=0.021)
    assert take.onset <= mc._MARGIN_BEFORE + 1e-9
    assert len(take.audio) / SAMPLE_RATE <= 1.02 + mc._MARGIN_BEFORE + mc._MARGIN_AFTER
    assert take.audio[0] == take.audio[-1] == 0
    assert mc.cut_take(speech.Utterance(np.zeros(SAMPLE_RATE, np.float32))) is None


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
    response = mc._room(quiet_microphone(room_seconds=0.3), rng)
    assert response[0] == 1 and np.argmax(np.abs(response)) == 0
    assert 10 * np.log10(np.sum(response[1:] ** 2)) == pytest.approx(-12.0, abs=0.01)
    user = np.pad(tone(1.0).audio, 4000)
    narrow = mc._through(quiet_microphone(band_hz=8000), user, np.zeros_like(user), [], rng)
    lags = np.correlate(narrow[10000:16000], user[9990:16010], "valid")
    assert np.argmax(lags) == 10
    spectrum = np.abs(np.fft.rfft(narrow))
    assert spectrum[len(spectrum) // 2 :].max() < 1e-2 * spectrum.max()


# ---------------------------------------------------------------------------------- the dataset


def espeak_voices(language, role="user", split="train"):
    """A few quick voices in place of all that are installed."""
    if role == "agent":
        return [v for v in ALL_VOICES(language, "user", "train") if v.engine == "espeak"][:1]
    mine = [v for v in ALL_VOICES(language, "user", "train") if v.engine == "espeak"]
    part = {"train": mine[1:5], "validation": mine[5:6], "test": mine[6:7]}[split]
    return [replace(voice, split=split) for voice in part]


def espeak_role(language, role="user", split="train"):
    return [replace(voice, role=role) for voice in espeak_voices(language, role, split)]


ALL_VOICES = speech.voices


@pytest.fixture
def quick(monkeypatch):
    pytest.importorskip("espeakng_loader", reason="speech for this test: espeakng-loader")
    monkeypatch.setattr(speech, "voices", espeak_role)
    monkeypatch.setattr(mc, "CLIP_PART_SECONDS", 15.0)
    monkeypatch.setattr(mc, "PART_CONVERSATIONS", 2)
    mc._studio.cache_clear()


@pytest.fixture(scope="module")
def codec_path(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = CodecConfig(
        front_dim=24, encoder_dim=32, semantic_width=32, encoder_layers=1, decoder_front_dim=24,
        decoder_dim=32, decoder_layers=1, num_heads=2, context=16, semantic_dim=8, acoustic_dim=8,
        codebook_sizes=(64,) * 8,
    )  # fmt: skip
    codec, folder = Codec(config), tmp_path_factory.mktemp("codec")
    save_checkpoint(folder, 1, stored_config(config), codec.export_tensors())
    return folder


def command(folder: Path, codec: Path, *more: str) -> list[str]:
    return [
        "--output_dir", str(folder), "--codec", str(codec), "--languages", "english",
        "--num_conversations", "4", "--num_workers", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    return list(mc.load_code_dataset(folder)[0])


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
    dataset, info = mc.load_code_dataset(made, codec.fingerprint)
    assert len(dataset) == 4 and set(dataset.column_names) == {
        "id", "language", "source", "split", "agent_codes", "user_codes", "turns",
    }  # fmt: skip
    assert info["frame_rate"] == 50.0 and info["codebook_sizes"] == [64] * 8
    lines = [json.loads(n) for n in (made / "audio" / "manifest.jsonl").read_text().splitlines()]
    rows = {row["id"]: row for row in dataset}
    assert len(lines) == 2
    for line in lines:
        row = rows[line["id"]]
        audio, rate = soundfile.read(made / "audio" / line["path"], dtype="float32")
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
            assert phone in speech.PHONES and turn["start"] - 0.1 < start < end < turn["end"] + 0.1
            assert turn["words"] is None or all(len(word) == 3 for word in turn["words"])


def test_the_same_command_makes_the_same_bytes_and_another_seed_others(made, codec_path, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    mc._studio.cache_clear()
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


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_wordings_and_voices_stay_apart(split, made, codec_path, tmp_path):
    def user_turns(folder):
        turns = [t for row in rows_of(folder) for t in row["turns"]]
        return [t for t in turns if t["who"] == "user" and t["exchange"]]

    scripts = mc.load_scripts(SCRIPTS / "english.jsonl")
    held_out = {t for e in scripts if e.held_out for t in user_texts(e)}
    mc.main(command(tmp_path / "held", codec_path, "--split", split))
    train, held = user_turns(made), user_turns(tmp_path / "held")
    assert train and not {t["text"] for t in train} & held_out
    assert held and {t["text"] for t in held} <= held_out
    assert not {t["voice"] for t in train} & {t["voice"] for t in held}
    assert {row["split"] for row in rows_of(tmp_path / "held")} == {split}


def test_a_killed_run_goes_on(codec_path, tmp_path, quick):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = command(killed, codec_path)[2:]
    root = str(Path(mc.__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.Popen(
        [sys.executable, __file__, "--output_dir", str(killed), *arguments], env=environment
    )
    while process.poll() is None and not list(killed.glob("english-*.arrow")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = killed / "english-00000.arrow"
    assert first.exists() and not (killed / "state.json").exists()
    stamp = first.stat().st_mtime_ns
    with pytest.raises(UserError, match="not a complete"):
        mc.load_code_dataset(killed)
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
    mc.save_code_dataset(tmp_path / "d", rows, info)
    dataset, read = mc.load_code_dataset(tmp_path / "d", "f" * 64)
    assert read == info and np.array_equal(dataset[0]["user_codes"], codes + 1)
    assert dataset[0]["turns"][0]["phones"] == [["a", 0.0, 0.5]]
    assert dataset[0]["turns"][0]["words"] is None
    with pytest.raises(UserError, match="ffffffff.*eeeeeeee"):
        mc.load_code_dataset(tmp_path / "d", "e" * 64)
    with pytest.raises(UserError, match="no code dataset"):
        mc.load_code_dataset(tmp_path / "nothing")
    (tmp_path / "d" / "data-00000.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        mc.load_code_dataset(tmp_path / "d")


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


def test_bad_conversation_manifests_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        mc.read_recordings(tmp_path / "none")
    with pytest.raises(UserError, match="no conversation manifest"):
        mc.read_recordings(tmp_path)
    (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "turns": [{"who": "bob"}]}\n')
    with pytest.raises(UserError, match="m.jsonl, line 1"):
        mc.read_recordings(tmp_path)


# ---------------------------------------------------------------------------------- clips


def test_clips(tmp_path, quick):
    arguments = ["--clips_dir", str(tmp_path), "--clips_hours", "0.01", "--languages", "telugu"]
    mc.main([*arguments, "--num_workers", "0"])
    manifest = tmp_path / "telugu" / "synthetic" / "manifest.jsonl"
    clips = read_manifest(manifest)
    assert 36 <= sum(c.duration for c in clips) < 150
    agent = espeak_role("telugu", "agent")[0].id
    share = sum(c.duration for c in clips if c.speaker == agent) / sum(c.duration for c in clips)
    assert 0.15 < share < 0.6
    splits = {v.id: s for s in ("train", "validation") for v in espeak_role("telugu", "user", s)}
    scripts = mc.load_scripts(SCRIPTS / "telugu.jsonl")
    held_out = {t for e in scripts if e.held_out for t in user_texts(e)}
    for clip in clips:
        assert clip.split == ("train" if clip.speaker == agent else splits[clip.speaker])
        assert clip.text not in held_out and clip.license and clip.commercial_ok
        info = soundfile.info(clip.path)
        assert info.samplerate == clip.sample_rate == SAMPLE_RATE
        assert info.duration == pytest.approx(clip.duration, abs=1e-3)
        assert clip.phones[0][1] == 0
        assert clip.phones[-1][2] == pytest.approx(clip.duration, abs=1e-3)
        assert all(p in speech.PHONES and s < e for p, s, e in clip.phones)
    assert len(load_clips([tmp_path / "telugu"], "train")) > 0
    # The same command again, after a part was lost, makes that part again, byte for byte.
    text, lost = manifest.read_text(), sorted(manifest.parent.glob("0*"))[1]
    for file in lost.iterdir():
        file.unlink()
    lost.rmdir()
    mc._studio.cache_clear()
    mc.main([*arguments, "--num_workers", "0"])
    assert manifest.read_text() == text


def test_a_part_that_another_run_finished_first_stands(tmp_path, quick, monkeypatch):
    write = mc.write_manifest

    def beaten(path, clips):
        write(path, clips)
        if path.parent.suffix == ".part":
            shutil.copytree(path.parent, path.parent.with_name(path.parent.name.split(".")[1]))

    monkeypatch.setattr(mc, "write_manifest", beaten)
    mc.main(["--clips_dir", str(tmp_path), "--clips_hours", "0.01", "--languages", "telugu",
             "--num_workers", "0"])  # fmt: skip
    assert read_manifest(tmp_path / "telugu" / "synthetic" / "manifest.jsonl")
    assert not list(tmp_path.rglob("*.part"))


def test_a_voice_that_fails_is_counted_not_fatal(quick, tmp_path, monkeypatch):
    def failing(language, role="user", split="train"):
        voices = espeak_role(language, role, split)
        return voices if role == "agent" else [replace(voices[0], name="nobody"), *voices[1:]]

    monkeypatch.setattr(speech, "voices", failing)
    mc.main(["--clips_dir", str(tmp_path), "--clips_hours", "0.01", "--languages", "english",
             "--num_workers", "0"])  # fmt: skip
    assert "nobody" in (tmp_path / "dropped.txt").read_text()
    assert read_manifest(tmp_path / "english" / "synthetic" / "manifest.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "x"], "say how much"),
        (["--output_dir", "x", "--hours", "-1"], "say how much"),
        (["--clips_dir", "x", "--clips_hours", "0"], "clips_hours"),
        (["--output_dir", "x", "--hours", "1", "--seed", "-3"], "negative"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        mc.main(arguments)


if __name__ == "__main__":  # the process that test_a_killed_run_goes_on kills
    speech.voices = espeak_role
    mc.PART_CONVERSATIONS = 2
    mc.main(sys.argv[1:])
