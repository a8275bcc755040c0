"""The demo over fake models, fake clocks and a fake sound card; then over small real models."""

from __future__ import annotations

import builtins
import dataclasses
import json
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
    fake_engine,
    patch,
    save_pair,
    silence,
    small_pair,
    tone,
)

import stream_demo
from audio import AudioError
from command import UserError
from duplex import DuplexEngine
from ledger import LatencyLedger, VoiceDetector
from stream_demo import (
    MicrophoneCall,
    SoundBridge,
    Transcript,
    answer_recording,
    device_rate,
    import_sounddevice,
    main,
    parse_args,
)

RATE = 24000
SHORT = np.concatenate([silence(0.2), tone(0.2)])  # its speech is found by energy


def transcript(engine, said: list[str]) -> Transcript:
    return Transcript(engine.lm, engine.patch_seconds, said.append)


def answer(engine, audio, said=None, **options):
    ledger = LatencyLedger(engine.patch_seconds)
    words = transcript(engine, [] if said is None else said)
    reply, record = answer_recording(engine, audio, ledger, words, **options)
    return reply, record, ledger, words


# -------------------------------------------------------------------------------- recordings


def test_a_fast_answer_takes_all_input_and_a_tail():
    engine = fake_engine()
    audio = np.concatenate([silence(0.4), patch(0.5), patch(0.5)[:300]])
    reply, record, ledger, _ = answer(engine, audio, tail_seconds=1.0, paced=False)
    assert len(reply) == (12 + 25) * 960
    np.testing.assert_allclose(reply[10 * 960 : 11 * 960], 0.5, atol=1e-6)
    assert ledger.summary()["dropped_patches"] == 0
    assert record.index == list(range(37))


def test_paced_answer_waits_for_the_clock_and_keeps_up():
    engine = fake_engine()
    clock = engine.clock

    def sleep(seconds):
        clock.now += seconds

    started = clock.now
    reply, record, ledger, _ = answer(
        engine, silence(1.0), tail_seconds=0.5, paced=True, sleep=sleep
    )
    assert clock.now - started == pytest.approx(38 * 0.04 + 0.01, abs=1e-6)
    assert ledger.summary()["dropped_patches"] == 0
    assert max(record.delays) == pytest.approx(0.01, abs=1e-6)
    assert len(reply) == 38 * 960


def test_a_machine_too_slow_drops_counts_and_stays_on_the_clock():
    engine = fake_engine()
    engine.lm.costs = (0.05, 0.03)  # 83 ms a tick: half of real time
    clock = engine.clock

    def sleep(seconds):
        clock.now += seconds

    reply, record, ledger, _ = answer(
        engine, silence(4.0), tail_seconds=0.0, paced=True, sleep=sleep
    )
    summary = ledger.summary()
    assert len(reply) == 100 * 960
    assert summary["dropped_patches"] > 30 and summary["late_ticks"] > 30
    assert max(record.delays) < 5 * 0.083  # latency never grows beyond the queue
    assert record.index == sorted(set(record.index))


def test_a_reply_under_way_is_not_cut_off():
    class Talker(FakeLM):
        """Talks for three seconds whatever it hears."""

        def step(self, codes, state, **options):
            out = super().step(codes, state, **options)
            out.agent_codes[:] = 562 if int(state.frames[0]) <= 75 else 512
            return out

    clock = FakeClock()
    engine = DuplexEngine(FakeCodec(clock), Talker(clock), clock=clock)
    reply, *_ = answer(engine, silence(0.4), tail_seconds=0.4, paced=False)
    assert 3.0 < len(reply) / RATE < 3.7
    assert np.abs(reply[: 3 * RATE]).min() > 0.4


def test_reply_text_is_printed_as_it_comes_and_the_user_described():
    engine = fake_engine()
    said: list[str] = []
    _, _, _, words = answer(engine, silence(0.12), said, tail_seconds=0.0, paced=False)
    assert said[:3] == ["samvad: w1", " w2", " w3"] and said[-1] == "\n"
    assert words.user_line() == "you: sounded happy (100%), spoke english (100%)"


def test_vad_flush_silences_the_agent_in_a_recording(monkeypatch):
    engine = fake_engine(vad_flush=True)
    windows = iter([0.0] * 20 + [1.0] * 1000)
    audio = np.full(2 * RATE, 0.5, np.float32)
    detector = VoiceDetector(probability=lambda samples: next(windows))
    monkeypatch.setattr(stream_demo, "VoiceDetector", lambda: detector)
    reply, *_ = answer(engine, audio, tail_seconds=0.0, paced=False)
    assert np.abs(reply[: RATE // 2]).min() > 0.4 and not reply[RATE : 2 * RATE].any()


# -------------------------------------------------------------------------------- microphone


class FakePortAudioError(Exception):
    pass


class FakeStream:
    """Calls back from a thread of its own, as PortAudio does, ten times as fast."""

    def __init__(self, card, samplerate, blocksize, callback, **options):
        self.card, self.blocksize, self.callback = card, blocksize, callback
        self.latency = (0.01, 0.02)
        card.opened = {"samplerate": samplerate, "blocksize": blocksize, **options}
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
            out = bytearray(self.blocksize * 2)
            block = pcm[start : start + self.blocksize].tobytes()
            self.callback(block, memoryview(out), self.blocksize, None, None)
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

    def query_devices(self, kind):
        if not self.devices:
            raise FakePortAudioError("Error querying device -1")
        return {"default_samplerate": self.default}

    def check_input_settings(self, samplerate, **_):
        if samplerate not in self.rates:
            raise FakePortAudioError("Invalid sample rate")

    check_output_settings = check_input_settings

    def RawStream(self, **options):  # noqa: N802
        return FakeStream(self, **options)

    def played(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.speaker), np.int16) / 32767.0


def microphone_call(card, engine=None, probability=lambda samples: 0.0, seconds=1.0):
    engine = engine or fake_engine()
    engine.clock = time.perf_counter
    ledger = LatencyLedger(engine.patch_seconds)
    call = MicrophoneCall(
        engine, card, ledger, transcript(engine, []), VoiceDetector(probability=probability)
    )
    call.run(stop=lambda: len(call.record.index) * engine.patch_seconds >= seconds)
    return call, ledger


def test_microphone_reaches_the_speaker():
    audio = np.concatenate([silence(0.2), np.full(RATE, 0.5, np.float32), silence(0.4)])
    card = FakeCard(audio)
    call, ledger = microphone_call(card, seconds=1.4)
    assert card.opened == {
        "samplerate": 24000,
        "blocksize": 240,
        "channels": 1,
        "dtype": "int16",
        "latency": "low",
    }
    assert (np.abs(card.played() - 0.5) < 0.01).sum() > 0.5 * RATE
    summary = ledger.summary()
    assert summary["device_ms"] == 30.0 and summary["resampler_ms"] == 0.0
    assert summary["tick_ms"]["total"]["n"] == len(call.record.index) >= 35


def test_a_48_khz_card_is_resampled_and_its_delay_is_in_the_ledger():
    t = np.arange(2 * 48000) / 48000
    card = FakeCard(0.5 * np.sign(np.sin(2 * np.pi * 2 * t)), rates=(48000,))
    _, ledger = microphone_call(card, seconds=1.2)
    assert card.opened["samplerate"] == 48000 and card.opened["blocksize"] == 480
    assert ledger.summary()["resampler_ms"] == pytest.approx(15.0, abs=0.1)
    assert (np.abs(np.abs(card.played()) - 0.5) < 0.05).sum() > 0.3 * 48000


def test_live_turns_come_from_the_detector():
    windows = iter([1.0] * 20 + [0.0] * 1000)
    _, ledger = microphone_call(
        FakeCard(silence(3.0)), probability=lambda samples: next(windows), seconds=2.0
    )
    summary = ledger.summary()
    assert (summary["turns"], summary["unanswered"]) == (1, 1)
    assert summary["turn_end_source"] == "silero"


def test_a_microphone_that_falls_silent_is_reported(monkeypatch):
    monkeypatch.setattr(stream_demo, "SILENT_CARD_SECONDS", 0.05)
    with pytest.raises(UserError, match="unplugged"):
        microphone_call(FakeCard(silence(0.1)), seconds=5.0)


@pytest.mark.parametrize("lost", ["while open", "when closed"])
def test_a_card_unplugged_in_mid_call_is_one_line_after_the_ledger(monkeypatch, capsys, lost):
    class Unplugged(FakeStream):
        def __exit__(self, *_):
            super().__exit__()
            raise FakePortAudioError("Device unavailable")

    monkeypatch.setattr(stream_demo, "SILENT_CARD_SECONDS", 0.05)
    card, clock = FakeCard(silence(0.5)), FakeClock()
    if lost == "when closed":
        monkeypatch.setattr(card, "RawStream", lambda **o: Unplugged(card, **o))
    monkeypatch.setattr(stream_demo, "import_sounddevice", lambda: card)
    monkeypatch.setattr(stream_demo, "load_models", lambda *_: (FakeCodec(clock), FakeLM(clock)))
    monkeypatch.setattr(stream_demo, "VoiceDetector", lambda: VoiceDetector(lambda samples: 1.0))
    with pytest.raises(UserError, match="is it unplugged") as caught:
        main([])
    ledger = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "\n" not in str(caught.value)
    assert ledger["turns"] == 1 and ledger["tick_ms"]["total"]["n"] >= 10


def test_ctrl_c_ends_the_call_with_its_ledger():
    engine = fake_engine()
    ledger = LatencyLedger(engine.patch_seconds)
    call = MicrophoneCall(
        engine, FakeCard(silence(1.0)), ledger, transcript(engine, []), VoiceDetector(lambda s: 0)
    )

    def interrupt():
        raise KeyboardInterrupt

    call.run(stop=interrupt)
    assert json.loads(ledger.json_line())["turns"] == 0


def test_bridge_counts_underruns_only_once_it_plays():
    bridge = SoundBridge(4)
    out = bytearray(4)
    bridge.callback(b"aaaa", memoryview(out), 2, None, None)
    assert bridge.underruns == 0 and bytes(out) == bytes(4)
    bridge.play(b"abcd")
    bridge.callback(b"aaaa", memoryview(out), 2, None, None)
    assert bytes(out) == b"abcd"
    bridge.callback(b"aaaa", memoryview(out), 2, None, None)
    assert bridge.underruns == 1 and bytes(out) == bytes(4)


def test_bridge_queues_are_bounded_both_ways():
    bridge = SoundBridge(2)
    out = bytearray(2)
    for _ in range(stream_demo.MAX_INPUT_BLOCKS + 3):
        bridge.callback(b"aa", memoryview(out), 1, None, None)
    assert bridge.overflows == 3
    for number in range(stream_demo.MAX_OUTPUT_BLOCKS + 2):
        bridge.play(bytes([number, 0]))
    assert bridge.skipped == 2
    bridge.callback(b"aa", memoryview(out), 1, None, None)
    assert out[0] == 2  # the oldest were given up


def test_no_sound_card_says_what_to_do():
    with pytest.raises(UserError, match="--wav question.wav"):
        device_rate(FakeCard(devices=False))


def test_a_card_without_24_khz_keeps_its_own_rate():
    assert device_rate(FakeCard(rates=(24000,))) == 24000
    assert device_rate(FakeCard(rates=(44100,), default=44100.0)) == 44100


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
    def load(codec_path, lm_path, device):
        clock = FakeClock()
        return FakeCodec(clock), FakeLM(clock)

    monkeypatch.setattr(stream_demo, "load_models", load)


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
        (["--wav", "x"], "no such file"),
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
    monkeypatch.setattr(stream_demo, "load_models", lambda *_: (FakeCodec(clock), Ending(clock)))
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


def test_sampling_flags_reach_the_model():
    sampling = stream_demo.lm_sampling(parse_args(["--temperature", "0.5", "--top_k", "7"]))
    assert (sampling.temperature, sampling.top_k) == (0.5, 7)


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
