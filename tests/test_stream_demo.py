"""The demo over fake models, fake clocks and a fake sound card; then over small real models."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_duplex import (
    FakeClock,
    FakeCodec,
    FakeLM,
    patch,
    save_pair,
    silence,
    small_pair,
    tone,
)

import duplex
import stream_demo
from audio import AudioError
from command import UserError
from ledger import CallRecord, VoiceDetector
from stream_demo import (
    LocalLine,
    Playout,
    Recorder,
    Recording,
    Screen,
    SoundCard,
    converse,
    device_rate,
    import_sounddevice,
    main,
    measure_loopback,
    parse_args,
)

RATE = 24000
SAMPLE = str(Path(stream_demo.__file__).parent / "samples" / "question_english.wav")
SHORT = np.concatenate([silence(0.2), tone(0.2)])  # its speech is found by energy


def local_line(monkeypatch, *flags: str, lm=None) -> LocalLine:
    """A call to the fake models, on their clock."""
    clock = FakeClock()
    models = FakeCodec(clock), lm or FakeLM(clock)
    models[1].clock = clock
    make = functools.partial(duplex.DuplexEngine, clock=clock)
    monkeypatch.setattr(duplex, "load_models", lambda *_: models)
    monkeypatch.setattr(duplex, "DuplexEngine", make)
    return LocalLine(parse_args(list(flags)))


def answer(line, audio, said=None, **options):
    line._live = False
    screen = Screen([].append if said is None else said.append)

    def sleep(seconds):
        line.clock.now += seconds

    sound = Recording(audio, line, sleep=sleep, **options)
    record, _ = converse(line, sound, screen)
    if record.stopped:
        raise record.stopped
    return sound.reply, record, line.ledger, screen


# -------------------------------------------------------------------------------- recordings


def test_a_fast_answer_takes_all_input_and_a_tail(monkeypatch):
    audio = np.concatenate([silence(0.4), patch(0.5), patch(0.5)[:300]])
    line = local_line(monkeypatch)
    reply, record, ledger, _ = answer(line, audio, tail_seconds=1.0, paced=False)
    assert len(reply) == (12 + 25) * 960
    np.testing.assert_allclose(reply[10 * 960 : 11 * 960], 0.5, atol=1e-6)
    assert ledger.summary()["dropped_patches"] == 0
    assert record.index == list(range(37))


def test_paced_answer_waits_for_the_clock_and_keeps_up(monkeypatch):
    line = local_line(monkeypatch)
    started = line.clock.now
    reply, record, ledger, _ = answer(line, silence(1.0), tail_seconds=0.5)
    assert line.clock.now - started == pytest.approx(38 * 0.04 + 0.01, abs=1e-5)
    assert ledger.summary()["dropped_patches"] == 0
    assert max(delay.gpu for delay in record.delays) == pytest.approx(0.01, abs=1e-5)
    assert len(reply) == 38 * 960


def test_a_machine_too_slow_drops_counts_and_stays_on_the_clock(monkeypatch):
    line = local_line(monkeypatch)
    line.engine.lm.costs = (0.05, 0.03)  # 83 ms a tick: half of real time
    reply, record, ledger, _ = answer(line, silence(4.0), tail_seconds=0.0)
    summary = ledger.summary()
    assert len(reply) == 100 * 960
    assert summary["dropped_patches"] > 30 and summary["late_ticks"] > 30
    assert max(map(sum, record.delays)) < 5 * 0.083  # latency never grows beyond the queue
    assert record.index == sorted(set(record.index))


def test_a_reply_under_way_is_not_cut_off(monkeypatch):
    class Talker(FakeLM):
        """Talks for three seconds whatever it hears."""

        def step(self, codes, state, **options):
            out = super().step(codes, state, **options)
            out.agent_codes[:] = 562 if int(state.frames[0]) <= 75 else 512
            return out

    line = local_line(monkeypatch, lm=Talker(None))
    reply, *_ = answer(line, silence(0.4), tail_seconds=0.4, paced=False)
    assert 3.0 < len(reply) / RATE < 3.7
    assert np.abs(reply[: 3 * RATE]).min() > 0.4


def test_words_are_printed_as_they_come_and_the_user_described(monkeypatch):
    said: list[str] = []
    line = local_line(monkeypatch)
    *_, screen = answer(line, np.full(RATE, 0.5, "f"), said, tail_seconds=0.0, paced=False)
    assert said[0].startswith("samvad: w1") and "samvad: w1 w2 w3" in "".join(said)
    assert said[-1] == "\n"
    assert screen.user_line() == "you: sounded happy (100%), spoke english (100%)"


def test_each_turn_has_a_line_and_who_talks_over_the_agent_waits():
    said: list[str] = []
    screen = Screen(said.append)

    def word(who, text, turn=1):
        screen.event({"type": "text", "who": who, "text": text, "turn": turn})

    word("user", " how")
    word("user", " are")
    screen.event({"type": "speech", "who": "agent", "speaking": True})
    word("agent", " I")
    word("user", " you")
    word("agent", " am")
    screen.event({"type": "speech", "who": "agent", "speaking": False})
    screen.event({"type": "emotion", "name": "sad", "posterior": {"sad": 0.9}, "language": "hindi"})
    word("agent", " Yes", 2)
    screen.close()
    lines = "you: how are", "samvad: I am", "you: you", "(you sound sad)", "samvad: Yes", ""
    assert "".join(said) == "\n".join(lines)
    assert screen.user_line() == "you: sounded sad (100%), spoke hindi (100%)"


def test_the_panel_is_renewed_below_what_scrolls(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: (60, 20))
    said: list[str] = []
    screen = Screen(said.append, panel=True)
    late, loud = stream_demo.Delay(0.012, 0.031, 0.04), [np.zeros(8) - 6]
    for now in (1.0, 1.1, 1.3):  # the second is too soon
        screen.renew(loud, CallRecord(0.04, [np.zeros(8) - 33], [late], [0]), 2, now)
    row = "you #####  samvad ##     gpu 12 network 31 buffers 40 ms, 2 dropped"
    assert len(said) == 2 and row[:60] in said[1] and row[:61] not in said[1]
    assert "\n" not in "".join(said)  # the line under way goes on where it is
    screen.event({"type": "text", "who": "user", "text": "how", "turn": 1})
    assert said[-1] == "\x1b[Jyou: how"  # over the panel
    screen.close()
    assert said[-1] == "\x1b[J\n"


def test_vad_flush_silences_the_agent_in_a_recording(monkeypatch):
    windows = iter([0.0] * 20 + [1.0] * 1000)
    audio = np.full(2 * RATE, 0.5, np.float32)
    detector = VoiceDetector(probability=lambda samples: next(windows))
    monkeypatch.setattr(stream_demo.ledger, "VoiceDetector", lambda: detector)
    line = local_line(monkeypatch, "--vad_flush")
    reply, *_ = answer(line, audio, tail_seconds=0.0, paced=False)
    assert np.abs(reply[: RATE // 2]).min() > 0.4 and not reply[RATE : 2 * RATE].any()


# -------------------------------------------------------------------------------- microphone


class FakePortAudioError(Exception):
    pass


class FakeStream:
    """Calls back from a thread of its own, as PortAudio does, three times as fast."""

    latency = 0.015

    def __init__(self, card, kind, samplerate, blocksize, callback, **options):
        self.card, self.kind, self.blocksize, self.callback = card, kind, blocksize, callback
        card.opened[kind] = {"samplerate": samplerate, "blocksize": blocksize, **options}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        pcm = (self.card.microphone * 32767).astype(np.int16)
        for start in range(0, len(pcm) - self.blocksize + 1, self.blocksize):
            if self._stop.is_set():
                return
            if self.kind == "idle":
                return
            if self.kind == "input":
                block = pcm[start : start + self.blocksize].tobytes()
                self.callback(self.card.heard(block), self.blocksize, None, None)
            else:
                out = bytearray(self.blocksize * 2)
                self.callback(memoryview(out), self.blocksize, None, None)
                self.card.speaker.append(bytes(out))
            time.sleep(0.003)


class FakeCard:
    """Stands in for the sounddevice module."""

    PortAudioError = FakePortAudioError

    def __init__(self, microphone=None, rates=(24000,), default=48000.0, devices=True):
        self.microphone = np.zeros(0) if microphone is None else microphone
        self.rates, self.default, self.devices = rates, default, devices
        self.speaker: list[bytes] = []
        self.opened: dict = {}

    def heard(self, block):
        return block

    def query_devices(self, device=None, kind=None):
        if not self.devices:
            raise FakePortAudioError("Error querying device -1")
        return {"default_samplerate": self.default}

    def check_input_settings(self, samplerate, **_):
        if samplerate not in self.rates:
            raise FakePortAudioError("Invalid sample rate")

    check_output_settings = check_input_settings

    def RawInputStream(self, **options):  # noqa: N802
        return FakeStream(self, "input", **options)

    def RawOutputStream(self, **options):  # noqa: N802
        return FakeStream(self, "output", **options)

    def played(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.speaker), np.int16) / 32767.0


def microphone_call(monkeypatch, card, *flags, probability=lambda samples: 0.0, seconds=1.0):
    detector = VoiceDetector(probability=probability)
    monkeypatch.setattr(stream_demo.ledger, "VoiceDetector", lambda: detector)
    line = local_line(monkeypatch)
    line.clock = line.engine.clock = time.perf_counter
    sound = SoundCard(card, parse_args(list(flags)))
    sound.ledger = line.ledger
    sound.over = lambda record: len(record.index) * line.patch_seconds >= seconds
    record, levels = converse(line, sound, Screen([].append))
    line.ledger.call(record, line.turns(levels))
    return record, line.ledger


def test_microphone_reaches_the_speaker(monkeypatch):
    audio = np.concatenate([silence(0.2), np.full(RATE, 0.5, np.float32), silence(0.4)])
    card = FakeCard(audio)
    record, ledger = microphone_call(
        monkeypatch, card, "--input_device", "3", "--output_device", "head", seconds=1.4
    )
    same = {"samplerate": 24000, "blocksize": 240, "channels": 1, "dtype": "int16"}
    assert card.opened == {
        "input": {**same, "latency": "low", "device": 3},
        "output": {**same, "latency": "low", "device": "head"},
    }
    assert (np.abs(card.played() - 0.5) < 0.01).sum() > 0.5 * RATE
    summary = ledger.summary()
    assert summary["device_ms"] == 30.0 and summary["resampler_ms"] == 0.0
    assert summary["tick_ms"]["total"]["n"] == len(record.index) >= 35
    assert min(delay.buffers for delay in record.delays) >= 0.03


def test_a_48_khz_card_is_resampled_and_its_delay_is_in_the_ledger(monkeypatch):
    t = np.arange(2 * 48000) / 48000
    card = FakeCard(0.5 * np.sign(np.sin(2 * np.pi * 2 * t)), rates=(48000,))
    _, ledger = microphone_call(monkeypatch, card, seconds=1.2)
    assert card.opened["input"]["samplerate"] == 48000
    assert card.opened["output"]["blocksize"] == 480
    assert ledger.summary()["resampler_ms"] == pytest.approx(15.0, abs=0.1)
    assert (np.abs(np.abs(card.played()) - 0.5) < 0.05).sum() > 0.3 * 48000


def test_live_turns_come_from_the_detector(monkeypatch):
    windows = iter([1.0] * 20 + [0.0] * 1000)
    _, ledger = microphone_call(
        monkeypatch, FakeCard(silence(3.0)), probability=lambda samples: next(windows), seconds=2.0
    )
    summary = ledger.summary()
    assert (summary["turns"], summary["unanswered"]) == (1, 1)
    assert summary["turn_end_source"] == "silero"


@pytest.mark.parametrize("lost", ["while open", "when closed"])
def test_a_card_unplugged_in_mid_call_is_one_line_after_the_ledger(monkeypatch, capsys, lost):
    class Unplugged(FakeStream):
        def __exit__(self, *_):
            super().__exit__()
            raise FakePortAudioError("Device unavailable")

    monkeypatch.setattr(stream_demo, "SILENT_SECONDS", 0.5)
    card, clock = FakeCard(silence(0.5)), FakeClock()
    if lost == "when closed":
        monkeypatch.setattr(card, "RawInputStream", lambda **o: Unplugged(card, "input", **o))
    monkeypatch.setattr(stream_demo, "import_sounddevice", lambda: card)
    monkeypatch.setattr(duplex, "load_models", lambda *_: (FakeCodec(clock), FakeLM(clock)))
    monkeypatch.setattr(
        stream_demo.ledger, "VoiceDetector", lambda: VoiceDetector(lambda samples: 1.0)
    )
    with pytest.raises(UserError, match="is it unplugged") as caught:
        main([])
    ledger = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "\n" not in str(caught.value)
    assert ledger["turns"] == 1 and ledger["tick_ms"]["total"]["n"] >= 3


def test_a_card_that_refuses_is_one_line(monkeypatch):
    card = FakeCard(silence(1.0))

    def refuse(**options):
        raise FakePortAudioError("Device busy")

    monkeypatch.setattr(card, "RawOutputStream", refuse)
    line = local_line(monkeypatch)
    record, _ = converse(line, SoundCard(card, parse_args([])), Screen([].append))
    assert isinstance(record.stopped, UserError) and "Device busy" in str(record.stopped)


def test_ctrl_c_ends_the_call_with_its_ledger(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    clock = FakeClock()
    monkeypatch.setattr(stream_demo, "import_sounddevice", lambda: FakeCard(silence(1.0)))
    monkeypatch.setattr(duplex, "load_models", lambda *_: (FakeCodec(clock), FakeLM(clock)))
    monkeypatch.setattr(
        stream_demo.ledger, "VoiceDetector", lambda: VoiceDetector(lambda samples: 0.0)
    )
    monkeypatch.setattr(SoundCard, "over", interrupt)
    main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["turns"] == 0


def test_underruns_count_only_once_it_plays():
    playout = Playout(RATE)
    assert not playout.pull(240).any() and playout.underruns == playout.inserted == 0
    playout.push(np.ones(240, np.float32))
    assert playout.pull(240).all() and playout.underruns == 0
    assert not playout.pull(240).any() and (playout.underruns, playout.inserted) == (1, 240)


def test_what_waits_to_be_played_is_bounded_and_the_oldest_given_up():
    playout = Playout(RATE)
    for number in range(8):
        waits = playout.push(np.full(960, number, np.float32))
    assert playout.removed == 3 * 960 and waits == pytest.approx(0.2)
    assert playout.pull(960)[0] == 3


@pytest.mark.parametrize("parts_per_million", [-150, 150])
def test_an_hour_of_two_clocks_that_disagree(parts_per_million):
    """The speaker's clock is off: waiting stays bounded, without gaps, and every sample counts."""
    playout, pulled, due, waits, tail = Playout(RATE), 0, 0.0, [], np.zeros(960, np.float32)
    for _ in range(90_000):
        waits.append(playout.push(tail))
        due += 960 * (1 + parts_per_million / 1e6)
        while pulled + 240 <= due:  # 10 ms, as the card is asked for
            playout.pull(240)
            pulled += 240
    drift = 90_000 * 960 * parts_per_million / 1e6
    assert max(waits) < 0.06
    assert playout.underruns * 0.01 < 0.2  # all of them before it had settled
    assert playout.inserted - playout.removed == pytest.approx(drift, abs=0.06 * RATE)


def test_a_loud_tone_is_not_torn_when_it_is_stretched():
    playout, t = Playout(RATE), np.arange(10 * RATE) / RATE
    tone_in = np.sin(2 * np.pi * 200 * t).astype("f")
    played = []
    for start in range(0, len(t), 960):
        playout.push(tone_in[start : start + 960])
        played += [playout.pull(240) for _ in range(4)]
    played = np.concatenate(played)[RATE:]
    assert playout.inserted > 0 and np.abs(np.diff(played)).max() < 0.06


def test_no_sound_card_says_what_to_do():
    with pytest.raises(UserError, match="--wav question.wav"):
        device_rate(FakeCard(devices=False), "input")


def test_a_card_without_24_khz_keeps_its_own_rate():
    assert device_rate(FakeCard(rates=(24000,)), "input") == 24000
    assert device_rate(FakeCard(rates=(44100,), default=44100.0), "output") == 44100


def test_a_loopback_is_measured_and_in_the_ledger():
    class Cable(FakeCard):
        """Speaker and microphone in step; what is played comes back 37 blocks later."""

        def play(self, out, *_):
            """Before the speaker is open."""

        def RawOutputStream(self, callback, **options):  # noqa: N802
            self.play = callback
            return FakeStream(self, "idle", callback=None, **options)

        def heard(self, block):
            out = bytearray(480)
            self.play(memoryview(out), 240, None, None)
            self.speaker.append(bytes(out))
            return self.speaker[-38] if len(self.speaker) >= 38 else block

    card = SoundCard(Cable(silence(8.0)), parse_args([]))
    found = measure_loopback(card)
    assert found == pytest.approx(0.37, abs=0.02)
    late = stream_demo.Delay(0.01, 0.02, found)
    card.ledger.call(CallRecord(0.04, [np.zeros(8)], [late], [0]), [])
    row = card.ledger.summary()["mouth_to_ear_ms"]
    assert row["p50"] == pytest.approx(1000 * found + 30, abs=1)


def test_a_loopback_without_a_way_back_is_one_line():
    with pytest.raises(UserError, match="no chirp came back"):
        measure_loopback(SoundCard(FakeCard(silence(8.0)), parse_args([])))


def test_the_echo_canceller_takes_out_what_the_speaker_plays():
    pytest.importorskip("livekit")
    rng = np.random.default_rng(0)
    played = rng.normal(0, 0.1, 4 * RATE) * (1.1 + np.sin(np.arange(4 * RATE) / 1500)) / 2
    card = SoundCard(FakeCard(), parse_args(["--echo_cancel"]))
    card._heard_at, blocks, left = time.perf_counter() + 60, played.reshape(-1, 240), []
    for number, block in enumerate(blocks):
        card.playout.push(block)
        card._played(memoryview(bytearray(480)), 240, None, None)
        echo = 0.4 * blocks[max(0, number - 5)]  # 50 ms later
        card._heard((echo * 32767).astype("<i2").tobytes(), 240, None, None)
        left += [audio for audio, _ in card.heard(0.0)]
    heard, left = 0.4 * played[2 * RATE :], np.concatenate(left)[2 * RATE :]
    assert 10 * np.log10((heard**2).mean() / ((left**2).mean() + 1e-12)) > 20


def test_a_missing_echo_canceller_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "livekit", None)
    with pytest.raises(UserError, match="pip install livekit"):
        SoundCard(FakeCard(), parse_args(["--echo_cancel"]))


PULSE = """
import sys, sounddevice
sys.path.insert(0, sys.argv[1])
from stream_demo import SoundCard, measure_loopback, parse_args
print(measure_loopback(SoundCard(sounddevice, parse_args(sys.argv[2:]))))
"""


def test_a_loopback_through_virtual_devices(tmp_path):
    """What is played to a null sink comes back from its monitor; how late, nobody promises."""
    if not (shutil.which("pulseaudio") and shutil.which("pactl")):
        pytest.skip("needs Debian's pulseaudio and pulseaudio-utils")
    pytest.importorskip("sounddevice")
    environment = os.environ | {
        "PULSE_RUNTIME_PATH": str(tmp_path / "p"), "PULSE_STATE_PATH": str(tmp_path / "s"),
        "HOME": str(tmp_path), "PULSE_SERVER": f"unix:{tmp_path}/p/native",
    }  # fmt: skip
    rules = "pcm.!default { type pulse }\nctl.!default { type pulse }\n"
    (tmp_path / ".asoundrc").write_text(rules)
    modules = ["-n", "-L", f"module-native-protocol-unix socket={tmp_path}/p/native",
               "-L", "module-null-sink sink_name=ear", "-L", "module-always-sink"]  # fmt: skip
    flags = ["--daemonize=no", "--exit-idle-time=-1", "--disable-shm=yes"]
    (tmp_path / "p").mkdir()
    daemon = subprocess.Popen(
        ["pulseaudio", *flags, *modules], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            if subprocess.run(["pactl", "set-default-source", "ear.monitor"], env=environment,
                              capture_output=True).returncode == 0:  # fmt: skip
                break
            time.sleep(0.1)
        root = str(Path(stream_demo.__file__).parent)
        done = subprocess.run([sys.executable, "-c", PULSE, root], env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
    finally:
        daemon.terminate()
        daemon.wait(10)
    if "no input device" in done.stderr:
        pytest.skip("needs Debian's libasound2-plugins")
    assert done.returncode == 0, done.stderr
    assert 0.0 < float(done.stdout.split()[-1]) < 2.5


def test_a_recording_of_a_call_has_both_sides_in_time(tmp_path):
    recorder = Recorder(tmp_path / "call.wav")
    for number in range(50):
        recorder.add(0, np.full(960, 0.25, np.float32))
        if not 20 <= number < 30:  # ten patches of the agent are lost
            recorder.add(1, np.full(960, number / 100, np.float32))
        if number == 40:  # what is written stands, whatever happens
            assert len(soundfile.read(tmp_path / "call.wav")[0]) >= 40 * 960
    recorder.close()
    audio, rate = soundfile.read(tmp_path / "call.wav")
    assert rate == RATE and audio.shape[1] == 2
    np.testing.assert_allclose(audio[: 50 * 960, 0], 0.25, atol=1e-3)
    np.testing.assert_allclose(audio[10 * 960 : 11 * 960, 1], 0.09, atol=1e-3)
    assert not audio[22 * 960 : 30 * 960, 1].any()
    np.testing.assert_allclose(audio[45 * 960 : 46 * 960, 1], 0.44, atol=1e-3)


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError("PortAudio library not found"), "libportaudio2"), (ImportError(), "pip install")],
)
def test_missing_sound_libraries_are_named(monkeypatch, error, message):
    imported = builtins.__import__

    def refuse(name, *rest, **options):
        if name == "sounddevice":
            raise error
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=message):
        import_sounddevice()


# ------------------------------------------------------------------------------ command line


def question(path: Path, audio: np.ndarray) -> Path:
    soundfile.write(path, audio, RATE)
    return path


@pytest.fixture
def fake_models(monkeypatch):
    def load(codec_path, lm_path, device, decoder):
        clock = FakeClock()
        return FakeCodec(clock), FakeLM(clock)

    monkeypatch.setattr(duplex, "load_models", load)


def test_several_recordings_share_one_ledger(fake_models, tmp_path, capsys):
    spoken = np.concatenate([silence(0.2), np.full(RATE // 2, 0.5), silence(0.3)])
    wavs = [question(tmp_path / f"{name}.wav", spoken) for name in "ab"]
    outs = [tmp_path / f"reply_{name}.wav" for name in "ab"]
    main(["--fast", "--tail_seconds", "1", "--wav", *map(str, wavs), "--out", *map(str, outs)])
    printed = capsys.readouterr().out
    ledger = json.loads(printed.splitlines()[-1])
    assert ledger["turns"] == 2 and ledger["turn_end_source"] == "energy"
    assert printed.count("samvad: w1") == 2 and "spoke english" in printed
    assert "speech ends at 0.70 s, by energy" in printed
    audio, rate = soundfile.read(outs[0])
    assert rate == RATE and audio.ndim == 1 and len(audio) == 50 * 960
    np.testing.assert_allclose(audio[RATE // 4 : RATE // 2], 0.5, atol=1e-3)


def test_reply_files_are_named_after_the_questions():
    args = parse_args(["--wav", "x/hello.wav", "name.wav"])
    assert args.out == [Path("reply_hello.wav"), Path("reply_name.wav")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "a.wav"], "needs --wav"),
        (["--fast"], "needs --wav"),
        (["--wav", "a.wav", "b.wav", "--out", "c.wav"], "2 --wav files but 1 --out"),
        (["--wav", "x/a.wav", "y/a.wav"], "two replies"),
        (["--wav", "a.wav", "--out", "a.wav"], "is a question too"),
        (["--wav", "a.wav", "--out", "a.wav/b.wav"], "cannot be written"),
        (["--wav", "a.wav", "--out", "./x/"], "x: cannot be written .Is a directory"),
        (["--wav", "a.wav", "--out", "b.txt"], r"cannot write '.txt' audio; .*end the name in"),
        (["--wav", "a.wav", "--out", "b.oga"], "cannot write '.oga'"),
        (["--wav", "a.wav", "--out", "b" * 300 + ".wav"], "cannot be written"),
        (["--wav", "a.wav", "--device", "cuda:9"], "--device"),
        (["--wav", "a.wav", "--device", "nonsense"], "nonsense: not supported"),
        (["--wav", "x"], "x: cannot be read"),
    ],
)
def test_contradictory_flags_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "x/a", "y/a"):
        Path(name).parent.mkdir(exist_ok=True)
        question(Path(f"{name}.wav"), SHORT)
    with pytest.raises(UserError, match=message) as caught:
        main(argv)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "b.wav", "x", "y"}


@pytest.mark.parametrize(
    "flag",
    ["--tail_seconds nan", "--tail_seconds -1", "--tail_seconds 1e9", "--threads 0", "--seed -1",
     "--seed 1.5", "--top_k 0", "--temperature -1", "--temperature inf", "--emotion bored",
     "--language french", "--tail 1", "--nonsense"],
)  # fmt: skip
def test_a_flag_out_of_range_is_one_line(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--wav", "a.wav", *flag.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and flag.split()[0] in error


def test_bad_recordings_are_one_line(tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("not audio")
    empty = question(tmp_path / "empty.wav", np.zeros(0))
    for path in (text, empty, tmp_path / "missing.wav"):
        with pytest.raises(UserError, match=path.name) as caught:
            main(["--wav", str(path)])
        assert "\n" not in str(caught.value)


def test_a_question_shorter_than_a_frame_is_answered(fake_models, tmp_path, capsys):
    wav = question(tmp_path / "click.wav", tone(0.001))
    main(["--fast", "--tail_seconds", "0", "--wav", str(wav), "--out", str(tmp_path / "r.wav")])
    assert "no speech found" in capsys.readouterr().out and (tmp_path / "r.wav").exists()


def reply_of(stopped_by, tmp_path, monkeypatch, capsys):
    """What is left of a call that ends after ten patches: reply, ledger."""

    class Ending(FakeLM):
        def step(self, codes, state, **options):
            if int(state.frames[0]) == 10:
                raise stopped_by
            return super().step(codes, state, **options)

    clock = FakeClock()
    monkeypatch.setattr(duplex, "load_models", lambda *_: (FakeCodec(clock), Ending(clock)))
    wavs = [str(question(tmp_path / name, SHORT)) for name in ("a.wav", "b.wav")]
    with pytest.raises(type(stopped_by)):
        main(["--fast", "--wav", *wavs, "--out", *(str(tmp_path / f"r{i}.wav") for i in (1, 2))])
    assert not (tmp_path / "r2.wav").exists()
    ledger = json.loads(capsys.readouterr().out.splitlines()[-1])
    return soundfile.read(tmp_path / "r1.wav")[0], ledger


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_ends_a_call_costs_neither_reply_nor_ledger(error, tmp_path, monkeypatch, capsys):
    reply, ledger = reply_of(error, tmp_path, monkeypatch, capsys)
    assert len(reply) == 10 * 960 and ledger["tick_ms"]["total"]["n"] == 10


def test_a_reply_that_cannot_be_put_in_its_place_is_kept_elsewhere(
    fake_models, tmp_path, monkeypatch, capsys
):
    write = stream_demo.write_audio

    def full(path, audio, *rest):
        if path.name.startswith("full") or path.suffix == ".mp3":
            raise AudioError(f"{path}: cannot be written (No space left)")
        write(path, audio, *rest)

    monkeypatch.setattr(stream_demo, "REPLY_OVERTIME_SECONDS", 0.0)
    monkeypatch.setattr(stream_demo, "write_audio", full)
    monkeypatch.setattr(stream_demo, "check_outputs", lambda *_: None)
    monkeypatch.setattr(stream_demo.tempfile, "gettempdir", lambda: str(tmp_path / "spare"))
    (tmp_path / "spare").mkdir()
    wavs = [str(question(tmp_path / name, SHORT)) for name in ("a.wav", "b.wav", "c.wav")]
    outs = [str(tmp_path / name) for name in ("x.mp3", "full.wav", "r.wav")]
    with pytest.raises(UserError) as caught:
        main(["--fast", "--tail_seconds", "0", "--wav", *wavs, "--out", *outs])
    error = str(caught.value)
    assert error.count("is in") == 1 and error.count("is lost") == 1 and "\n" not in error
    assert len(list(tmp_path.glob("spare/x-*.wav"))) == 1 and (tmp_path / "r.wav").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tick_ms"]["total"]["n"] == 3 * 10


def test_missing_checkpoint_is_one_line(tmp_path):
    wav = question(tmp_path / "q.wav", tone(0.2))
    with pytest.raises(UserError, match="nowhere"):
        main(["--wav", str(wav), "--codec", str(tmp_path / "nowhere")])


def test_sampling_flags_reach_the_model(monkeypatch):
    line = local_line(monkeypatch, "--temperature", "0.5", "--top_k", "7")
    assert (line.engine.sampling.temperature, line.engine.sampling.top_k) == (0.5, 7)


def test_a_recording_without_speech_is_answered_without_a_turn(fake_models, tmp_path, capsys):
    wav = question(tmp_path / "quiet.wav", silence(0.5))
    out = str(tmp_path / "r.wav")
    main(["--fast", "--tail_seconds", "0", "--wav", str(wav), "--out", out])
    printed = capsys.readouterr().out
    assert "no speech found" in printed
    assert json.loads(printed.splitlines()[-1])["answered_share"] is None


# --------------------------------------------------------------------------------- real models


def test_the_script_answers_with_small_real_models(tmp_path):
    """The command as a user pastes it, paced in real time, in a process of its own."""
    codec, lm = small_pair()
    for parameter in codec.decoder[-1].parameters():
        torch.nn.init.zeros_(parameter)  # a silent reply ends with its tail
    save_pair(codec, lm, tmp_path)
    wav = question(tmp_path / "question.wav", np.concatenate([tone(0.4), silence(0.2)]))
    script = Path(stream_demo.__file__)
    command = [sys.executable, str(script), "--wav", str(wav), "--out", str(tmp_path / "reply.wav")]
    command += ["--codec", str(tmp_path / "codec"), "--lm", str(tmp_path / "s2s")]
    command += ["--tail_seconds", "0.5", "--temperature", "0.5", "--language", "telugu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout.splitlines()[-1])
    assert ledger["turns"] == 1 and ledger["tick_ms"]["depth"]["n"] >= 5
    audio, rate = soundfile.read(tmp_path / "reply.wav")
    assert rate == RATE and len(audio) >= 27 * 960


def test_another_codec_is_refused_by_the_script(tmp_path):
    codec, lm = small_pair()
    other = dataclasses.replace(lm.config, codec_fingerprint="f00")
    save_pair(codec, lm, tmp_path, lm_config=other)
    wav = question(tmp_path / "question.wav", tone(0.2))
    argv = ["--wav", str(wav), "--out", str(tmp_path / "r.wav")]
    argv += ["--codec", str(tmp_path / "codec"), "--lm", str(tmp_path / "s2s")]
    with pytest.raises(UserError, match=f"f00.*{codec.fingerprint}"):
        main(argv)


# ------------------------------------------------------------------------------------ a server

WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "soundfile", "soxr", "silero_vad", "tokenizers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
del sys.argv[1]
import stream_demo
from command import run
run(stream_demo.main)
"""


def without_torch(*argv) -> subprocess.CompletedProcess:
    """The script where numpy, sounddevice and websockets alone are installed."""
    root = str(Path(stream_demo.__file__).parent)
    command = [sys.executable, "-c", WITHOUT, root, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_needs_no_torch():
    done = without_torch("--help")
    assert done.returncode == 0 and "--server" in done.stdout, done.stderr


@pytest.fixture
def server():
    """serve.py over the fake models, whose agents repeat what they hear."""
    pytest.importorskip("fastapi")
    pytest.importorskip("websockets")
    pytest.importorskip("prometheus_client")
    import test_serve

    with test_serve.serving("--rejoin_seconds", "5", "--token", "s e") as running:
        yield running


def test_a_server_answers_a_recording_on_a_machine_without_torch(server, tmp_path):
    wav = question(tmp_path / "q.wav", np.concatenate([silence(0.4), np.full(RATE // 2, 0.5)]))
    out, call = tmp_path / "r.wav", tmp_path / "call.wav"
    done = without_torch(
        "--server", f"http://{server.address}", "--token", "s e", "--wav", wav, "--out", out,
        "--tail_seconds", "0.5", "--record", call,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout.splitlines()[-1])
    assert ledger["turns"] == 1 and ledger["dropped_patches"] == 0 and ledger["takeovers"] == 1
    assert "samvad: w" in done.stdout and "you: w" in done.stdout
    reply, _ = soundfile.read(out)
    np.testing.assert_allclose(reply[11 * 960 : 22 * 960], 0.5, atol=1e-2)
    assert len(reply) >= 35 * 960
    sides, _ = soundfile.read(call)
    begins = [int(np.flatnonzero(side > 0.4)[0]) for side in sides.T]
    assert begins[0] == pytest.approx(0.4 * RATE, abs=1)
    assert 960 <= begins[1] - begins[0] < RATE // 2  # a patch later, and what the network takes


def test_a_server_s_delay_is_told_apart_and_its_words_shown(server, monkeypatch):
    flags = ["--server", f"ws://{server.address}", "--token", "s e", "--emotion", "sad"]
    line = stream_demo.RemoteLine(parse_args(flags))
    said: list[str] = []
    audio = np.concatenate([np.full(RATE, 0.5, "f"), silence(0.6)])
    for _ in range(2):  # a call each
        sound = Recording(audio, line, tail_seconds=0.0)
        record, heard = converse(line, sound, Screen(said.append))
        assert record.stopped is None and record.index[-1] == 39
    (turn,) = line.turns(heard)
    assert (turn.source, turn.end) == ("loudness", pytest.approx(1.0, abs=0.01))
    line.close()
    assert all(delay.network >= 0 and delay.gpu >= 0 and sum(delay) for delay in record.delays)
    assert record.delays[0].network > 0 == record.delays[0].gpu  # before the server's first word
    assert line.ledger.summary()["tick_ms"]["total"]["n"] == 2
    assert "".join(said).count("samvad: w1 ") == 2


def remote_call(server, audio, after: float, act, recorder=None) -> tuple:
    """A call on which `act(line)` is done after so long, with all that is shown of it."""
    line = stream_demo.RemoteLine(parse_args(["--server", server.address, "--token", "s e"]))
    sound, said = Recording(audio, line, tail_seconds=0.4), []
    timer = threading.Timer(after, act, (line,))
    timer.start()
    record, _ = converse(line, sound, Screen(said.append), recorder)
    timer.join()
    line.close()
    return line, record, sound.reply, "".join(said)


def cut(line) -> None:
    line._ready["socket"].socket.shutdown(2)


def test_a_lost_network_is_come_back_over_into_the_same_call(server, tmp_path):
    ramp = np.repeat(np.linspace(0.1, 0.9, 100), 960).astype("f")  # a level a patch
    recorder = Recorder(tmp_path / "call.wav")
    line, record, reply, said = remote_call(server, ramp, 1.02, cut, recorder)
    recorder.close()
    assert record.stopped is None
    assert said.count("(cut off; going back into the call)") == said.count("(back in the call") == 1
    # What it answers is what was said at that moment, before and after.
    answered = np.array([index for index in record.index if index < 100])
    gaps = np.flatnonzero(np.diff(answered) > 1)
    assert len(gaps) == 1 and 5 < answered[gaps[0]] < 50 and answered[-1] == 99
    heard = reply.reshape(-1, 960)[answered].mean(1)
    np.testing.assert_allclose(heard, ramp.reshape(-1, 960)[answered, 0], atol=1e-2)
    assert line.ledger.counts["dropped_patches"] == np.diff(answered).max() - 1
    sides, _ = soundfile.read(tmp_path / "call.wav")
    np.testing.assert_allclose(sides[: len(ramp), 0], ramp, atol=1e-3)
    assert sides[:, 1].max() == pytest.approx(0.9, abs=1e-2)
    assert server.server.metrics.calls.labels("rejoined")._value.get() == 1


@pytest.mark.parametrize("how", ["refused", "gone", "another call"])
def test_who_cannot_come_back_ends_in_one_line_with_what_was_said(server, how, monkeypatch):
    monkeypatch.setattr(stream_demo.RemoteLine, "RETRY_SECONDS", 0.1)

    def act(line) -> None:
        if how == "refused":
            line._args.token = "wrong"
        elif how == "gone":
            line._ready["rejoin_seconds"], line._args.server = 0.5, "ws://127.0.0.1:9"
        else:
            line._ready["call"] = "x"
        cut(line)

    line, record, reply, said = remote_call(server, np.full(3 * RATE, 0.5, "f"), 0.8, act)
    assert isinstance(record.stopped, UserError) and "\n" not in str(record.stopped)
    reason = {"refused": "a wrong token", "gone": "no way back within 0 s",
              "another call": "did not keep it"}[how]  # fmt: skip
    assert reason in str(record.stopped) and "going back into the call" in said
    assert 5 < len(record.index) < 60 and len(reply) >= 6 * 960


@contextlib.contextmanager
def cutting(address: str, after: float, takes: int):
    """A way to a server that takes so many connections, the first of which is cut after so long."""
    listener, open_now = socket.create_server(("127.0.0.1", 0)), []

    def pipe(one, other) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)

    def take() -> None:
        host, port = address.split(":")
        for _ in range(takes):
            ends = listener.accept()[0], socket.create_connection((host, int(port)))
            open_now.extend(ends)
            for one, other in (ends, ends[::-1]):
                threading.Thread(target=pipe, args=(one, other), daemon=True).start()
            if len(open_now) == 2:
                threading.Timer(after, lambda: [end.shutdown(2) for end in open_now[:2]]).start()
        listener.close()

    threading.Thread(target=take, daemon=True).start()
    yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
    for end in open_now:
        end.close()


@pytest.mark.parametrize("takes", [1, 2])
def test_a_line_that_is_cut_on_a_machine_without_torch(server, takes, tmp_path):
    wav = question(tmp_path / "q.wav", np.concatenate([silence(0.4), np.full(3 * RATE, 0.5)]))
    out, call = tmp_path / "r.wav", tmp_path / "call.wav"
    with cutting(server.address, 1.5, takes) as way:
        done = without_torch(
            "--server", way, "--token", "s e", "--wav", wav, "--out", out, "--record", call,
            "--tail_seconds", "0.5",
        )  # fmt: skip
    ledger = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("(cut off; going back into the call)") == 1
    assert done.stdout.count("(back in the call after") == takes - 1
    assert ledger["turns"] == 1 and len(soundfile.read(call)[0]) > RATE
    assert len(soundfile.read(out)[0]) > RATE // 4
    if takes == 2:
        assert done.returncode == 0 and ledger["dropped_patches"] > 0, done.stderr
    else:
        assert done.returncode == 1 and "no way back within 5 s" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_that_falls_silent_is_asked_once_more(server, monkeypatch):
    monkeypatch.setattr(stream_demo.RemoteLine, "ANSWER_SECONDS", 0.7)
    engine = server.engine

    def hold(line) -> None:
        monkeypatch.setattr(engine, "run_once", lambda: time.sleep(3.0))

    line, record, reply, said = remote_call(server, np.full(5 * RATE, 0.5, "f"), 0.8, hold)
    assert isinstance(record.stopped, UserError) and "silent" in str(record.stopped)
    assert said.count("back in the call after") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--server", "ws://127.0.0.1:9"], "does serve.py run"),
        (["--server", "ftp://x"], "give an address like"),
        (["--server", "ws://x", "--codec", "c"], "--codec is for models here"),
        (["--server", "ws://x", "--fast", "--wav", "a.wav"], "--fast is for models here"),
        (["--record", "call.mp3"], "end the name in .wav"),
    ],
)
def test_what_a_server_cannot_do_is_one_line(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        main(
            flags
            if "--record" in flags
            else [*flags, *(["--wav", SAMPLE] if "--fast" not in flags else [])]
        )
    assert "\n" not in str(caught.value)


def test_a_wrong_token_and_a_full_server_say_so(server):
    with pytest.raises(UserError, match="token"):
        stream_demo.RemoteLine(parse_args(["--server", server.address]))
    lines = [stream_demo.RemoteLine(parse_args(["--server", server.address, "--token", "s e"]))
             for _ in range(2)]  # fmt: skip
    with pytest.raises(UserError, match="busy"):
        stream_demo.RemoteLine(parse_args(["--server", server.address, "--token", "s e"]))
    for line in lines:
        line.close()
