"""What is said about latency is defined here: where a user's turn ends, where a reply begins, when
that counts as an answer, and the ledger that all scripts print.

Times are in seconds unless a name says otherwise; audio is 24 kHz mono float32 in [-1, 1], `T`
samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import soxr
import torch

from audio import SAMPLE_RATE
from command import UserError

LEVEL_SECONDS = 0.005
STAGES = ("encode", "temporal", "depth", "decode", "total")

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


# ----------------------------------------------------------------------------------- resampling


class StreamResampler:
    """Chunks at one rate in, the same stretch of time at another rate out.

    soxr's fixed-ratio modes work in blocks and hold back a varying 0 to 20 ms (LQ) or 40 ms (HQ),
    measured in 10 ms chunks; its variable-ratio mode holds back a constant 5 ms at 48 -> 24 kHz
    and 10 ms at 24 -> 48 kHz. That lag is filled with silence first, so every chunk comes out
    whole at once, `delay_seconds` late in content.
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
        stream, chunk = self._open(), self.in_rate // 100
        lags, taken, given = [], 0, 0
        for _ in range(20):
            taken += chunk
            given += len(stream.resample_chunk(np.zeros(chunk, np.float32)))
            lags.append(taken / self.in_rate - given / self.out_rate)
        return max(lags)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """[T] at `in_rate` -> [T * out_rate / in_rate] at `out_rate`."""
        audio = np.ascontiguousarray(audio, np.float32)
        return audio if self._stream is None else self._stream.resample_chunk(audio)


# ------------------------------------------------------------------------------ voice detection


@dataclass(frozen=True)
class UserTurn:
    """When the user spoke, in seconds of the input stream; `source` says who found it."""

    start: float
    end: float
    source: str = "manifest"


class VoiceDetector:
    """Silero VAD beside a live call: 512 samples at 16 kHz a decision, loaded on first use.

    `push` takes 24 kHz samples of any length; `speaking` is the latest decision and `turns()`
    the finished ones. A turn is over once half a second is unvoiced. Silero goes on for 30 to
    80 ms after the last sound, which would flatter the response latency: a turn's end is the
    last 5 ms of it within 40 dB of its peak.
    """

    def __init__(self, probability: Callable[[np.ndarray], float] | None = None):
        self._probability = probability or _silero()
        self._resample = StreamResampler(SAMPLE_RATE, VAD_RATE)
        self._rest = np.zeros(0, np.float32)
        self._levels = LevelHistory()
        self._decided = 0  # samples at 16 kHz
        self._start: float | None = None
        self._last_voice = 0.0
        self._turns: list[UserTurn] = []
        self.speaking = False

    def push(self, audio: np.ndarray) -> bool:
        audio = np.asarray(audio, np.float32)
        audio = np.where(np.isfinite(audio), audio, np.float32(0))
        self._levels.push(audio)
        samples = np.concatenate([self._rest, self._resample(audio)])
        whole = len(samples) // VAD_SAMPLES * VAD_SAMPLES
        self._rest = samples[whole:]
        for start in range(0, whole, VAD_SAMPLES):
            self._decide(self._probability(samples[start : start + VAD_SAMPLES]))
        if self._start is None:
            self._levels.forget()
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
        end = self._levels.last_loud(self._start, self._last_voice)
        return UserTurn(self._start, end, "silero")


class LevelHistory:
    """Loudness of the recent past of a stream, every 5 ms."""

    KEEP = int(2 / LEVEL_SECONDS)

    def __init__(self):
        self._levels = np.zeros(0)
        self._forgotten = 0
        self._rest = np.zeros(0, np.float32)

    def push(self, audio: np.ndarray) -> None:
        audio = np.concatenate([self._rest, audio])
        hop = int(LEVEL_SECONDS * SAMPLE_RATE)
        self._rest = audio[len(audio) // hop * hop :]
        self._levels = np.concatenate([self._levels, frame_levels(audio)])

    def forget(self) -> None:
        """Keep the last two seconds only."""
        surplus = max(0, len(self._levels) - self.KEEP)
        self._levels = self._levels[surplus:]
        self._forgotten += surplus

    def last_loud(self, start: float, end: float) -> float:
        """End of the last 5 ms in [start, end) within 40 dB of the loudest there; `end` if none."""
        first, last = (int(round(s / LEVEL_SECONDS)) - self._forgotten for s in (start, end))
        levels = self._levels[max(0, first) : max(0, last)]
        if not len(levels):
            return end
        loud = np.flatnonzero(levels > levels.max() + ONSET_DB)
        return (self._forgotten + max(0, first) + int(loud[-1]) + 1) * LEVEL_SECONDS


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


def find_speech(audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> UserTurn | None:
    """The stretch of a recording [T] from its first to its last voice, or None in silence.

    By energy (-40 dB of the peak) where the recording's background lies below that, which is
    exact; else by Silero VAD.
    """
    levels = frame_levels(audio, sample_rate)
    if not len(levels) or levels.max() < QUIET_DBFS:
        return None
    if np.percentile(levels, 5) < levels.max() + ONSET_DB:
        segments = voiced_segments(levels, levels.max() + ONSET_DB)
        if segments:
            return UserTurn(segments[0][0], segments[-1][1], "energy")
    detector = VoiceDetector()
    detector.push(_at_24k(audio, sample_rate))
    detector.push(np.zeros(SAMPLE_RATE, np.float32))
    turns = detector.turns(ended=True)
    return UserTurn(turns[0].start, turns[-1].end, "silero") if turns else None


def _at_24k(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    return audio if sample_rate == SAMPLE_RATE else soxr.resample(audio, sample_rate, SAMPLE_RATE)


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
        patch = int(seconds / self.patch_seconds + 1e-6)
        heard, delay = patch, 0.0
        if self.index is not None and len(self.index):
            heard = int(self.index[min(patch, len(self.index) - 1)])
        if self.delays is not None and len(self.delays):
            delay = float(self.delays[min(patch, len(self.delays) - 1)])
        offset = seconds - patch * self.patch_seconds
        return (heard + 1) * self.patch_seconds + delay + offset


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
    for number, turn in enumerate(turns):
        until = turns[number + 1].start if number + 1 < len(turns) else np.inf
        inside = (ear > turn.start) & (ear < until)
        onset = _first_onset(levels, inside, clock, turn.start, until)
        responses.append(_classify(turn.end, onset))
    return responses


def _first_onset(
    levels: np.ndarray, inside: np.ndarray, clock: ReplyClock, after: float, until: float
) -> float | None:
    if not inside.any() or levels[inside].max() < QUIET_DBFS:
        return None
    for start, _ in voiced_segments(levels, levels[inside].max() + ONSET_DB):
        if after < clock.ear(start) < until:
            return clock.ear(start)
    return None


def _classify(turn_end: float, onset: float | None) -> Response:
    if onset is None or onset - turn_end > UNANSWERED_SECONDS:
        return Response(turn_end, None, None, "unanswered")
    latency = onset - turn_end
    kind = "takeover" if latency < TAKEOVER_SECONDS else "answered"
    return Response(turn_end, onset, latency, kind)


def barge_in_latencies(
    levels: np.ndarray, turns: Sequence[UserTurn], clock: ReplyClock
) -> list[float]:
    """For each turn that begins while the agent is heard: seconds until the agent is silent."""
    if not len(levels) or levels.max() < QUIET_DBFS:
        return []
    heard = [
        (clock.ear(start), clock.ear(end - LEVEL_SECONDS) + LEVEL_SECONDS)
        for start, end in voiced_segments(levels, levels.max() + ONSET_DB)
    ]
    return [end - t.start for t in turns for start, end in heard if start < t.start < end]


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
        """Note a tick (`duplex.TickResult`); `extra_seconds`: device, buffers, resamplers."""
        self.levels.append(frame_levels(result.audio[self.slot]))
        waited = float(result.waited[self.slot])
        self.delays.append(waited + result.times.total + extra_seconds)
        self.index.append(int(result.index[self.slot]))

    def responses(self, turns: Sequence[UserTurn]) -> list[Response]:
        return response_latencies(self._levels(), turns, self._clock())

    def barge_ins(self, turns: Sequence[UserTurn]) -> list[float]:
        return barge_in_latencies(self._levels(), turns, self._clock())

    def _levels(self) -> np.ndarray:
        return np.concatenate(self.levels) if self.levels else np.zeros(0)

    def _clock(self) -> ReplyClock:
        return ReplyClock(self.patch_seconds, np.array(self.delays), np.array(self.index))


# ---------------------------------------------------------------------------------------- ledger


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
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
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
        """Count one tick: late when it took longer than its own length, drops as it reports."""
        for stage, seconds in asdict(result.times).items():
            self.stages[stage].append(seconds)
        self.late_ticks += result.times.total > self.patch_seconds
        self.dropped_patches += int(result.dropped.sum())
        self.not_finite_samples += int(result.not_finite.sum())

    def call(self, record: CallRecord, turns: Sequence[UserTurn]) -> list[Response]:
        """Judge a finished call by its user's turns; returns its responses."""
        responses = record.responses(turns)
        self.responses += responses
        self.barge_ins += record.barge_ins(turns)
        self.turn_end_sources |= {turn.source for turn in turns}
        return responses

    def summary(self) -> dict:
        """All of it as plain numbers (ms), None where nothing was measured."""
        kinds = [response.kind for response in self.responses]
        answered = [r.latency for r in self.responses if r.kind == "answered"]
        return {
            "patch_ms": _ms(self.patch_seconds),
            "algorithmic_ms": _ms(self.algorithmic_seconds),
            "tick_ms": {stage: percentiles(values) for stage, values in self.stages.items()},
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
        for stage in STAGES:
            note = f"   of {s['patch_ms']:.0f}" if stage == "total" else ""
            rows.append(_row(f"tick {stage}", s["tick_ms"][stage], note))
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
