"""What is said about latency is defined here: where a user's turn ends, where a reply begins, when
that counts as an answer, and the ledger that all scripts print.

Times are in seconds unless a name says otherwise; audio is 24 kHz mono float32 in [-1, 1], `T`
samples.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soxr
import torch

from audio import SAMPLE_RATE
from command import UserError

LEVEL_SECONDS = 0.005

# Where a reply begins, and what counts as one.
ONSET_DB = -40.0  # relative to the reply's peak
QUIET_DBFS = -45.0  # a reply that never rises above this is silence with codec noise
MERGE_SECONDS = 0.2  # shorter silences are pauses inside one utterance
MIN_SPEECH_SECONDS = 0.06  # shorter sounds are clicks
TAKEOVER_SECONDS = -0.2
UNANSWERED_SECONDS = 2.0

VAD_RATE = 16000
VAD_SAMPLES = 512
VAD_ON, VAD_OFF = 0.5, 0.35  # Silero's own defaults for entering and leaving speech
VAD_TURN_SILENCE = 0.5


# --------------------------------------------------------------------------------- loudness


def frame_levels(audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Loudness in dBFS of every whole 5 ms of audio [T]."""
    hop = int(round(LEVEL_SECONDS * sample_rate))
    frames = np.asarray(audio, np.float64)[: len(audio) // hop * hop].reshape(-1, hop)
    return 10.0 * np.log10(np.mean(frames**2, axis=1) + 1e-12)


def voiced_segments(levels: np.ndarray, threshold_db: float) -> list[tuple[float, float]]:
    """Utterances as (start, end) seconds: frames above the threshold, pauses under 0.2 s bridged,
    clicks under 60 ms left out."""
    above = np.flatnonzero(levels > threshold_db)
    if not len(above):
        return []
    breaks = np.flatnonzero(np.diff(above) * LEVEL_SECONDS > MERGE_SECONDS + LEVEL_SECONDS)
    firsts = above[np.r_[0, breaks + 1]] * LEVEL_SECONDS
    lasts = (above[np.r_[breaks, len(above) - 1]] + 1) * LEVEL_SECONDS
    return [(a, b) for a, b in zip(firsts, lasts, strict=True) if b - a >= MIN_SPEECH_SECONDS]


# ------------------------------------------------------------------------------ the user's turns


class StreamResampler:
    """Chunks at one rate in, the same stretch of time at another rate out.

    soxr in its variable-ratio mode, which holds back a constant 5 to 10 ms. That lag is filled with
    silence first, so every chunk comes out whole at once, `delay_seconds` late in content.
    """

    def __init__(self, in_rate: int, out_rate: int):
        self.in_rate, self.out_rate = int(in_rate), int(out_rate)
        self.delay_seconds = 0.0
        self._stream = None
        if self.in_rate != self.out_rate:
            self.delay_seconds = self._measured_lag()
            self._stream = self._open()
            primer = int(np.ceil(self.delay_seconds * self.in_rate))
            self._stream.resample_chunk(np.zeros(primer, np.float32))

    def _open(self) -> soxr.ResampleStream:
        return soxr.ResampleStream(self.in_rate, self.out_rate, 1, dtype="float32", vr=True)

    def _measured_lag(self) -> float:
        stream, chunk = self._open(), np.zeros(self.in_rate // 100, np.float32)
        given = np.cumsum([len(stream.resample_chunk(chunk)) for _ in range(20)])
        return max(np.arange(1, 21) * len(chunk) / self.in_rate - given / self.out_rate)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """[T] at `in_rate` -> [T * out_rate / in_rate] at `out_rate`."""
        audio = np.ascontiguousarray(audio, np.float32)
        return audio if self._stream is None else self._stream.resample_chunk(audio)


@dataclass(frozen=True)
class UserTurn:
    """When the user spoke, in seconds of the input stream; `source` says who found it."""

    start: float
    end: float
    source: str = "manifest"


class VoiceDetector:
    """Silero VAD beside a live call: 512 samples at 16 kHz a decision.

    `push` takes 24 kHz samples of any length; `speaking` is the latest decision and `turns()`
    the finished ones. A turn is over once half a second is unvoiced. Silero goes on for 30 to
    80 ms after the last sound, which would flatter the response latency: a turn's end is the
    last 5 ms of it within 40 dB of its peak.
    """

    def __init__(self, probability: Callable[[np.ndarray], float] | None = None):
        self._probability = probability or _silero()
        self._resample = StreamResampler(SAMPLE_RATE, VAD_RATE)
        self._rest_16k = self._rest_24k = np.zeros(0, np.float32)
        self._levels = array("f")  # of the whole call, 800 bytes a second
        self._decided = 0  # samples at 16 kHz
        self._start: float | None = None
        self._last_voice = 0.0
        self._turns: list[UserTurn] = []
        self.speaking = False

    def push(self, audio: np.ndarray) -> bool:
        audio = np.asarray(audio, np.float32)
        audio = np.where(np.isfinite(audio), audio, np.float32(0))
        levels = np.concatenate([self._rest_24k, audio])
        hop = int(LEVEL_SECONDS * SAMPLE_RATE)
        self._rest_24k = levels[len(levels) // hop * hop :]
        self._levels.extend(frame_levels(levels))
        samples = np.concatenate([self._rest_16k, self._resample(audio)])
        whole = len(samples) // VAD_SAMPLES * VAD_SAMPLES
        self._rest_16k = samples[whole:]
        for start in range(0, whole, VAD_SAMPLES):
            self._decide(self._probability(samples[start : start + VAD_SAMPLES]))
        return self.speaking

    def turns(self, ended: bool = False) -> list[UserTurn]:
        """The finished turns; with `ended`, one still open closes at its last voice."""
        return self._turns + ([self._turn()] if ended and self._start is not None else [])

    def _decide(self, probability: float) -> None:
        begins = self._decided / VAD_RATE - self._resample.delay_seconds
        self._decided += VAD_SAMPLES
        ends = begins + VAD_SAMPLES / VAD_RATE
        self.speaking = probability >= (VAD_OFF if self.speaking else VAD_ON)
        if self.speaking:
            self._start = begins if self._start is None else self._start
            self._last_voice = ends
        elif self._start is not None and ends - self._last_voice >= VAD_TURN_SILENCE:
            self._turns.append(self._turn())
            self._start = None

    def _turn(self) -> UserTurn:
        first, last = (max(0, round(s / LEVEL_SECONDS)) for s in (self._start, self._last_voice))
        levels = np.asarray(self._levels[first:last])
        if not len(levels):
            return UserTurn(self._start, self._last_voice, "silero")
        loud = np.flatnonzero(levels > levels.max() + ONSET_DB)
        return UserTurn(self._start, (first + int(loud[-1]) + 1) * LEVEL_SECONDS, "silero")


def _silero() -> Callable[[np.ndarray], float]:
    threads = torch.get_num_threads()
    try:
        import silero_vad
    except ImportError as error:
        raise UserError("voice detection needs Silero VAD: pip install silero-vad") from error
    model = silero_vad.load_silero_vad()
    torch.set_num_threads(threads)  # importing silero_vad sets it to 1

    def probability(samples: np.ndarray) -> float:
        with torch.inference_mode():
            return float(model(torch.from_numpy(np.ascontiguousarray(samples)), VAD_RATE))

    return probability


def find_speech(audio: np.ndarray) -> UserTurn | None:
    """The stretch of a recording [T] from its first to its last voice, or None in silence.

    By energy (-40 dB of the peak) where the recording's background lies below that, which is
    exact; else by Silero VAD.
    """
    levels = frame_levels(audio)
    if not len(levels) or levels.max() < QUIET_DBFS:
        return None
    if np.percentile(levels, 5) < levels.max() + ONSET_DB:
        segments = voiced_segments(levels, levels.max() + ONSET_DB)
        if segments:
            return UserTurn(segments[0][0], segments[-1][1], "energy")
    detector = VoiceDetector()
    detector.push(np.concatenate([audio, np.zeros(SAMPLE_RATE, np.float32)]))
    turns = detector.turns(ended=True)
    return UserTurn(turns[0].start, turns[-1].end, "silero") if turns else None


# ------------------------------------------------------------------------------ response latency


@dataclass(frozen=True)
class Response:
    """What followed one user turn; `kind`: "answered", "takeover" or "unanswered".

    onset: when the reply reached the ear, on the input's clock, or None; latency: onset - turn
    end, or None when unanswered.
    """

    turn_end: float
    onset: float | None
    latency: float | None
    kind: str


@dataclass(frozen=True)
class ReplyClock:
    """Where a reply's own seconds fall on the clock of the input.

    Section "response" of the ledger: (patch + 1) x patch length + that patch's delay + offset in
    the patch. delays [patches]: measured tick (with its wait in the queue), device and resampler;
    zeros give the audio clock. index [patches]: the input patch each answers; None = in order.
    """

    patch_seconds: float
    delays: np.ndarray | None = None
    index: np.ndarray | None = None

    def ear(self, seconds: float) -> float:
        """When the user hears what is `seconds` into the reply."""
        patch = answered = int(seconds / self.patch_seconds + 1e-6)
        delay = 0.0
        if self.index is not None and len(self.index):
            answered = int(self.index[min(patch, len(self.index) - 1)])
        if self.delays is not None and len(self.delays):
            delay = float(self.delays[min(patch, len(self.delays) - 1)])
        offset = seconds - patch * self.patch_seconds
        return (answered + 1) * self.patch_seconds + delay + offset


def response_latencies(
    levels: np.ndarray, turns: Sequence[UserTurn], clock: ReplyClock
) -> list[Response]:
    """One `Response` for each user turn, from the agent's loudness (`frame_levels`).

    A reply's onset is the first utterance to begin after the turn began and before the next one,
    at -40 dB of the peak in that stretch. Before -200 ms it is a takeover; later than 2 s after
    the turn's end, or never, it is unanswered.
    """
    ear = np.array([clock.ear(i * LEVEL_SECONDS) for i in range(len(levels))])
    responses = []
    for turn, following in zip(turns, [*turns[1:], None], strict=False):
        until = following.start if following else np.inf
        inside = levels[(ear > turn.start) & (ear < until)]
        onset = None
        if len(inside) and inside.max() >= QUIET_DBFS:
            onsets = [
                clock.ear(start) for start, _ in voiced_segments(levels, inside.max() + ONSET_DB)
            ]
            onset = next((o for o in onsets if turn.start < o < until), None)
        if onset is None or onset - turn.end > UNANSWERED_SECONDS:
            responses.append(Response(turn.end, None, None, "unanswered"))
        else:
            kind = "takeover" if onset - turn.end < TAKEOVER_SECONDS else "answered"
            responses.append(Response(turn.end, onset, onset - turn.end, kind))
    return responses


def barge_in_latencies(
    levels: np.ndarray, turns: Sequence[UserTurn], clock: ReplyClock
) -> list[float]:
    """For each turn that begins while the agent is audible: seconds until the agent is silent."""
    if not len(levels) or levels.max() < QUIET_DBFS:
        return []
    audible = [
        (clock.ear(start), clock.ear(end - LEVEL_SECONDS) + LEVEL_SECONDS)
        for start, end in voiced_segments(levels, levels.max() + ONSET_DB)
    ]
    return [end - t.start for t in turns for start, end in audible if start < t.start < end]


@dataclass
class CallRecord:
    """What the ledger needs of one caller's call: loudness and delay of every output patch.

    Half a kilobyte a second, so that a call of hours can be judged at its end.
    """

    patch_seconds: float
    slot: int = 0
    levels: list[np.ndarray] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    stopped: BaseException | None = None  # what ended the call early

    def add(self, result: Any, extra_seconds: float = 0.0) -> None:
        """Note a `duplex.TickResult`; `extra_seconds`: device, buffers and resamplers."""
        self.levels.append(frame_levels(result.audio[self.slot]))
        waited = float(result.waited[self.slot])
        self.delays.append(waited + result.times.total + extra_seconds)
        self.index.append(int(result.index[self.slot]))

    def judge(self, turns: Sequence[UserTurn]) -> tuple[list[Response], list[float]]:
        """The responses and barge-in latencies of a finished call."""
        levels = np.concatenate(self.levels) if self.levels else np.zeros(0)
        clock = ReplyClock(self.patch_seconds, np.array(self.delays), np.array(self.index))
        return response_latencies(levels, turns, clock), barge_in_latencies(levels, turns, clock)


# ---------------------------------------------------------------------------------------- ledger


@dataclass(frozen=True)
class StageTimes:
    """Seconds one tick took, stage by stage; `total` ends when the samples are on the host."""

    encode: float
    temporal: float
    depth: float
    decode: float
    total: float

    @classmethod
    def from_marks(cls, start, encoded, temporal, depth, stepped, decoded) -> StageTimes:
        """From the clock at the start and at the end of each stage."""
        return cls(
            encoded - start,
            temporal - encoded,
            depth - temporal,
            decoded - stepped,
            decoded - start,
        )


class LatencyLedger:
    """p50/p95/p99 of everything that delays a reply; the warm-up is not in it.

    `tick` and `call` collect, `table` is for the terminal, `json_line` for the last line of
    stdout. Milliseconds in both.
    """

    def __init__(
        self, patch_seconds: float, algorithmic_seconds: float | None = None, warmup_ticks: int = 0
    ):
        self.patch_seconds = patch_seconds
        self.algorithmic_seconds = algorithmic_seconds or patch_seconds
        self.warmup_ticks = warmup_ticks
        self.times: list[StageTimes] = []
        self.responses: list[Response] = []
        self.barge_ins: list[float] = []
        self.mouth_to_ear: list[float] = []
        self.turn_end_sources: set[str] = set()
        self.device_seconds = 0.0
        self.resampler_seconds = 0.0
        self.dropped_patches = 0
        self.not_finite_samples = 0
        self.late_ticks = 0
        self.output_underruns = 0
        self.output_overflows = 0
        self.input_overflows = 0

    def tick(self, result: Any) -> None:
        """Count a `duplex.TickResult`: late when it took longer than its own length."""
        self.times.append(result.times)
        self.late_ticks += result.times.total > self.patch_seconds
        self.dropped_patches += int(result.dropped.sum())
        self.not_finite_samples += int(result.not_finite.sum())

    def call(self, record: CallRecord, turns: Sequence[UserTurn]) -> list[Response]:
        """Judge a finished call by its user's turns; returns its responses."""
        responses, barge_ins = record.judge(turns)
        self.responses += responses
        self.barge_ins += barge_ins
        self.turn_end_sources |= {turn.source for turn in turns}
        return responses

    def summary(self) -> dict:
        """All of it as plain numbers (ms), None where nothing was measured."""
        kinds = [response.kind for response in self.responses]
        answered = [r.latency for r in self.responses if r.kind == "answered"]
        stages = StageTimes.__dataclass_fields__
        ticks = {stage: [getattr(times, stage) for times in self.times] for stage in stages}
        return {
            "patch_ms": _ms(self.patch_seconds),
            "algorithmic_ms": _ms(self.algorithmic_seconds),
            "tick_ms": {stage: percentiles(values) for stage, values in ticks.items()},
            "response_ms": percentiles(answered),
            "turns": len(kinds),
            "answered": kinds.count("answered"),
            "takeovers": kinds.count("takeover"),
            "unanswered": kinds.count("unanswered"),
            "answered_share": round(kinds.count("answered") / len(kinds), 4) if kinds else None,
            "turn_end_source": "+".join(sorted(self.turn_end_sources)) or None,
            "barge_in_ms": percentiles(self.barge_ins),
            "mouth_to_ear_ms": percentiles(self.mouth_to_ear),
            "device_ms": _ms(self.device_seconds),
            "resampler_ms": _ms(self.resampler_seconds),
            "dropped_patches": self.dropped_patches,
            "not_finite_samples": self.not_finite_samples,
            "late_ticks": self.late_ticks,
            "output_underruns": self.output_underruns,
            "output_overflows": self.output_overflows,
            "input_overflows": self.input_overflows,
            "warmup_ticks": self.warmup_ticks,
        }

    def json_line(self) -> str:
        return json.dumps(self.summary(), allow_nan=False)

    def table(self) -> str:
        """A small table for the terminal, 80 columns."""
        s = self.summary()
        rows = [f"{'latency, ms':<16}{'p50':>8}{'p95':>8}{'p99':>8}{'n':>7}"]
        rows.append(f"{'algorithmic':<16}{s['algorithmic_ms']:>8.1f}   patch + acoustic delay")
        for stage, values in s["tick_ms"].items():
            note = f"   of {s['patch_ms']:.0f}" if stage == "total" else ""
            rows.append(_row(f"tick {stage}", values, note))
        share = f"   answered {s['answered']}/{s['turns']}" if s["turns"] else ""
        rows.append(_row("response", s["response_ms"], share))
        rows.append(_row("barge-in", s["barge_in_ms"]))
        rows.append(_row("mouth-to-ear", s["mouth_to_ear_ms"]))
        rows.append(
            f"dropped patches {s['dropped_patches']}, late ticks {s['late_ticks']}, underruns"
            f" {s['output_underruns']}, takeovers {s['takeovers']}, unanswered {s['unanswered']}"
        )
        rows.append(
            f"device {s['device_ms']:.1f}, resamplers {s['resampler_ms']:.1f}; end of turn by"
            f" {s['turn_end_source'] or 'nothing'}; {s['warmup_ticks']} warm-up ticks left out"
        )
        if s["not_finite_samples"]:
            rows.append(f"{s['not_finite_samples']} samples were not numbers and became silence")
        return "\n".join(rows)


def percentiles(seconds: Sequence[float]) -> dict | None:
    """{"p50", "p95", "p99"} in ms and "n"; None for an empty list."""
    if not len(seconds):
        return None
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99))
    return {"p50": _ms(p50), "p95": _ms(p95), "p99": _ms(p99), "n": len(seconds)}


def _ms(seconds: float) -> float:
    return round(float(seconds) * 1000.0, 2)


def _row(name: str, values: dict | None, note: str = "") -> str:
    if values is None:
        return f"{name:<16}{'-':>8}{'-':>8}{'-':>8}{0:>7}{note}"
    figures = "".join(f"{values[key]:>8.1f}" for key in ("p50", "p95", "p99"))
    return f"{name:<16}{figures}{values['n']:>7}{note}"
