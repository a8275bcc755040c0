"""Definitions of latency, voice detection and the ledger, against signals known exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_duplex import PATCH, RATE, fake_engine, patch, run_all, silence, tone

from ledger import (
    LEVEL_SECONDS,
    QUIET_DBFS,
    CallRecord,
    Delay,
    LatencyLedger,
    Reply,
    StreamResampler,
    UserTurn,
    VoiceDetector,
    barge_in_latencies,
    find_speech,
    frame_levels,
    kind_of,
    response_latencies,
)

# ------------------------------------------------------------------------------- latencies


def responses(reply: np.ndarray, *turns: UserTurn, times: np.ndarray | None = None) -> list:
    levels = frame_levels(reply)
    return response_latencies(levels, turns, in_order(levels) if times is None else times)


def in_order(levels: np.ndarray) -> np.ndarray:
    """The times of a reply that is a patch late and nothing more."""
    return np.arange(len(levels)) * LEVEL_SECONDS + PATCH


def test_response_is_the_ledger_s_formula():
    """(onset patch + 1) x patch + that patch's delay + offset inside the patch - turn end."""
    onset = 1.31  # patch 32, 30 ms into it
    reply = np.concatenate([silence(onset), tone(0.6), silence(0.5)])
    delays = [Delay()] * 60
    delays[32] = Delay(0.0025, 0.004, 0.006)
    record = CallRecord(PATCH, delays=delays, index=list(range(60)))
    (got,) = responses(reply[: 60 * 960], UserTurn(0.1, 1.2), times=record.times())
    assert kind_of(got) == "answered"
    assert got == pytest.approx((32 + 1) * PATCH + 0.0125 + 0.03 - 1.2, abs=1e-6)


def test_onset_is_40_db_below_the_peak_and_clicks_are_none():
    reply = np.concatenate([silence(2.0), tone(0.5, 0.02), tone(0.5, 0.5), silence(0.5)])
    reply[RATE] = 0.9  # one sample of click at 1 s
    (got,) = responses(reply, UserTurn(0.0, 1.5))
    assert got == pytest.approx(2.0 + PATCH - 1.5, abs=1e-6)  # -28 dB counts
    quieter = np.concatenate([silence(2.0), tone(0.5, 0.004), tone(0.5, 0.5), silence(0.5)])
    (got,) = responses(quieter, UserTurn(0.0, 1.5))
    assert got == pytest.approx(2.5 + PATCH - 1.5, abs=1e-6)  # -42 dB does not


@pytest.mark.parametrize(
    ("start", "kind"),
    [(0.75, "takeover"), (0.8, "answered"), (2.9, "answered"), (3.0, "unanswered")],
)
def test_takeover_and_unanswered(start, kind):
    reply = np.concatenate([silence(start), tone(0.5), silence(1.0)])
    (got,) = responses(reply, UserTurn(0.2, 1.0))
    assert kind_of(got) == kind
    assert (got is None) == (kind == "unanswered")


def test_silence_with_codec_noise_is_unanswered():
    noise = np.random.default_rng(0).normal(0, 1e-3, 3 * RATE)
    (got,) = responses(noise, UserTurn(0, 1.0))
    assert got is None


def test_each_turn_has_its_own_reply_and_old_speech_is_no_onset():
    reply = np.concatenate([silence(1.2), tone(1.0), silence(1.2), tone(0.5), silence(0.5)])
    turns = [UserTurn(0.0, 1.0), UserTurn(2.0, 3.0)]  # the second begins over the first reply
    first, second = responses(reply, *turns)
    assert first == pytest.approx(1.24 - 1.0)
    assert second == pytest.approx(3.44 - 3.0)
    levels = frame_levels(reply)
    barge = barge_in_latencies(levels, turns, in_order(levels))
    assert barge == [pytest.approx(2.24 - 2.0)]


def test_lost_patches_move_the_reply_on_the_clock():
    record = CallRecord(PATCH, delays=[Delay()] * 55, index=[*range(25), *range(30, 60)])
    reply = np.concatenate([silence(1.2), tone(0.5), silence(0.5)])
    (got,) = responses(reply, UserTurn(0, 1.0), times=record.times())
    assert got == pytest.approx(1.2 + PATCH + 5 * PATCH - 1.0)


def test_find_speech_by_energy_is_exact_on_a_clean_recording():
    audio = np.concatenate([silence(0.3), tone(0.5), silence(0.4), tone(0.3), silence(0.6)])
    turn = find_speech(audio)
    assert (turn.start, turn.end) == (pytest.approx(0.3), pytest.approx(1.5))
    assert turn.source == "energy"
    assert find_speech(silence(1.0)) is None


# ------------------------------------------------------------------------------ resampling


@pytest.mark.parametrize("rates", [(48000, 24000), (44100, 24000), (24000, 48000), (16000, 24000)])
def test_resampled_chunks_come_whole_and_late_by_the_stated_delay(rates):
    source, target = rates
    resampler = StreamResampler(source, target)
    t = np.arange(source) / source
    audio = np.sin(2 * np.pi * 440 * t).astype("f") * np.hanning(source).astype("f")
    chunk = source // 100
    chunks = [resampler(audio[i : i + chunk]) for i in range(0, source, chunk)]
    given = np.cumsum([len(c) for c in chunks]) / target
    wanted = np.arange(1, 101) / 100
    assert (given >= wanted - 1 / target).all() and (given <= wanted + 1e-3).all()
    out = np.concatenate(chunks)
    offsets = np.arange(-3e-4, 3e-4, 1e-5)
    errors = [_shifted_error(out, target, t, audio, resampler.delay_seconds + o) for o in offsets]
    assert min(errors) < 0.02
    assert abs(offsets[int(np.argmin(errors))]) <= 1.5e-4
    assert resampler.delay_seconds <= 0.016


def _shifted_error(out, rate, t, audio, delay):
    expected = np.interp(np.arange(len(out)) / rate - delay, t, audio, left=0.0)
    return np.abs(out - expected).max()


def test_equal_rates_pass_through():
    resampler = StreamResampler(RATE, RATE)
    assert resampler.delay_seconds == 0.0
    audio = tone(0.1)
    np.testing.assert_array_equal(resampler(audio), audio)


# -------------------------------------------------------------------------------------- vad


def test_detector_marks_turns_and_bridges_pauses():
    pattern = [0] * 10 + [1] * 20 + [0] * 10 + [1] * 10 + [0] * 30  # windows of 32 ms
    answers = iter(pattern)
    detector = VoiceDetector(probability=lambda samples: next(answers))
    spoken = []
    for _ in range(len(pattern)):
        spoken.append(detector.push(np.zeros(768, np.float32)))
    (turn,) = detector.turns()
    assert turn.start == pytest.approx(10 * 0.032, abs=0.011)
    assert turn.end == pytest.approx(50 * 0.032, abs=0.011)
    assert not spoken[5] and spoken[20] and not spoken[-1]


def test_detector_closes_an_open_turn_when_asked():
    answers = iter([1] * 10)
    detector = VoiceDetector(probability=lambda samples: next(answers))
    detector.push(np.zeros(768 * 10, np.float32))
    assert len(detector.turns()) == 1 and not detector._turns


def test_a_turn_ends_with_its_last_sound_not_with_silero_s_hangover():
    answers = iter([0] * 20 + [1] * 35 + [0] * 200)
    detector = VoiceDetector(probability=lambda samples: next(answers))
    audio = np.concatenate([silence(0.7), tone(1.0), silence(3.0)])
    for start in range(0, len(audio), 241):
        detector.push(audio[start : start + 241])
    (turn,) = detector.turns()
    assert turn.end == pytest.approx(1.7, abs=0.0051)


def test_silero_finds_no_voice_in_silence_and_leaves_the_thread_count():
    pytest.importorskip("silero_vad")
    threads = torch.get_num_threads()
    detector = VoiceDetector()
    detector.push(silence(1.0))
    assert detector.turns() == []
    assert torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------ ledger


def test_ledger_gives_percentiles_of_what_was_measured():
    engine = fake_engine()
    ledger = LatencyLedger(engine.patch_seconds, warmup_ticks=engine.warm_up())
    record = CallRecord(engine.patch_seconds)
    question = np.concatenate([silence(1.2), patch(0.5), patch(0.5), silence(0.4)])
    engine.feed(0, question, bounded=False)
    for result in run_all(engine):
        ledger.tick(result)
        late = Delay(result.waited[0] + result.times.total)
        record.add(Reply(result.audio[0], int(result.index[0]), late), buffers=0.1)
    ledger.call(record, [UserTurn(0.2, 1.0)])
    summary = json.loads(json.dumps(ledger.summary(), allow_nan=False))
    assert summary["tick_ms"]["total"] == {"p50": 10.0, "p95": 10.0, "p99": 10.0, "n": 42}
    assert summary["algorithmic_ms"] == 40.0
    waited = 0.01 * 30  # everything was fed at once: the 31st patch waited for 30 ticks
    expected = (1.24 + waited + 0.01 + 0.1 - 1.0) * 1000
    assert summary["response_ms"]["p50"] == pytest.approx(expected, abs=0.1)
    parts = {name: row["p50"] for name, row in summary["response_parts_ms"].items()}
    assert parts == {"gpu": pytest.approx(1000 * waited + 10), "network": 0.0, "buffers": 100.0}
    assert (summary["turns"], summary["answered_share"]) == (1, 1.0)
    assert summary["barge_in_ms"] is None and summary["warmup_ticks"] == 8
    assert summary["turn_end_source"] == "manifest"


def test_ledger_counts_late_ticks_and_drops():
    engine = fake_engine()
    engine.lm.costs = (0.03, 0.02)
    ledger = LatencyLedger(engine.patch_seconds)
    for _ in range(5):
        engine.feed(0, patch(0.1))
    for result in run_all(engine):
        ledger.tick(result)
    summary = ledger.summary()
    assert (summary["late_ticks"], summary["dropped_patches"]) == (3, 3)


def test_table_fits_80_columns_even_when_empty():
    table = LatencyLedger(PATCH).table()
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "p95" in table and "response" in table


def test_quiet_floor_is_below_speech():
    assert frame_levels(tone(0.1, 0.1)).max() > QUIET_DBFS
