"""Latency: where a user's turn ends, where a reply begins, when that is an answer, and the ledger.

Times are in seconds unless a name says otherwise; audio is 24 kHz mono float32 in [-1, 1], `T`
samples; loudness is in dBFS, a value for every 5 ms.
"""

from collections import Counter, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from audio import SAMPLE_RATE
from command import UserError, needed

LEVEL_SECONDS = 0.005
ONSET_DB = -40.0  # where a reply begins, relative to its peak
QUIET_DBFS = -45.0  # a reply that never rises above this is silence with codec noise
MERGE_SECONDS = 0.2  # shorter silences are pauses inside one utterance
MIN_SPEECH_SECONDS = 0.06  # shorter sounds are clicks
TAKEOVER_SECONDS, UNANSWERED_SECONDS = -0.2, 2.0
VAD_RATE, VAD_SAMPLES = 16000, 512
VAD_ON, VAD_OFF = 0.5, 0.35  # Silero's own defaults for entering and leaving speech
VAD_TURN_SILENCE = 0.5
# Seconds one tick took, stage by stage; `total` ends when the samples are on the host.
StageTimes = namedtuple("StageTimes", "encode temporal depth decode total")  # noqa: PYI024
_COUNTED = ("dropped_patches", "not_finite_samples", "late_ticks", "output_underruns",
            "inserted_samples", "removed_samples", "input_overflows")  # fmt: skip


def frame_levels(audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Loudness of every 5 ms of audio [T]; what is left over at its end is not counted."""
    hop = round(LEVEL_SECONDS * sample_rate)
    frames = np.asarray(audio, np.float64)[: len(audio) // hop * hop].reshape(-1, hop)
    return 10.0 * np.log10(np.mean(frames**2, axis=1) + 1e-12)


def utterances(levels: np.ndarray, threshold_db: float,
               pause: float = MERGE_SECONDS) -> list[tuple[int, int]]:  # fmt: skip
    """(first, last) indices of loudness above the threshold, short pauses and clicks left out."""
    above = np.flatnonzero(levels > threshold_db)
    breaks = np.flatnonzero(np.diff(above) * LEVEL_SECONDS > pause + LEVEL_SECONDS)
    found = [(part[0], part[-1]) for part in np.split(above, breaks + 1) if len(part)]
    return [(a, b) for a, b in found if (b + 1 - a) * LEVEL_SECONDS >= MIN_SPEECH_SECONDS]


class StreamResampler:
    """Chunks at one rate in, the same stretch of time at another rate out: soxr in its variable-
    ratio mode, which holds back a constant 5 to 10 ms. That lag is filled with silence first, so
    every chunk comes out whole at once, `delay_seconds` late in content."""

    def __init__(self, in_rate: int, out_rate: int):
        self.delay_seconds, self._stream = 0.0, None
        if in_rate == out_rate:
            return
        # Not at the top: a laptop whose sound card takes 24 kHz does without.
        soxr = needed("soxr", f"{in_rate} to {out_rate} Hz needs soxr: pip install soxr")
        kind = {"num_channels": 1, "dtype": "float32", "vr": True}
        probe, self._stream = (soxr.ResampleStream(in_rate, out_rate, **kind) for _ in range(2))
        chunk = np.zeros(in_rate // 100, np.float32)
        given = np.cumsum([len(probe.resample_chunk(chunk)) for _ in range(20)]) / out_rate
        self.delay_seconds = max(np.arange(1, 21) * len(chunk) / in_rate - given)
        self._stream.resample_chunk(np.zeros(int(np.ceil(self.delay_seconds * in_rate)), "f"))

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """[T] at `in_rate` -> [T * out_rate / in_rate] at `out_rate`."""
        audio = np.ascontiguousarray(audio, np.float32)
        return audio if self._stream is None else self._stream.resample_chunk(audio)


class UserTurn(NamedTuple):
    """When the user spoke, in seconds of the input stream; `source` says who found it."""

    start: float
    end: float
    source: str = "manifest"


class VoiceDetector:
    """Silero VAD beside a live call: 512 samples at 16 kHz a decision. A turn is over once half a
    second is unvoiced. Silero goes on for 30 to 80 ms after the last sound, which would flatter the
    response latency: a turn's end is the last 5 ms of it within 40 dB of its peak."""

    def __init__(self, probability: Callable[[np.ndarray], float] | None = None):
        self._probability = probability or _silero()
        self._resample = StreamResampler(SAMPLE_RATE, VAD_RATE)
        self._rest, self._speaking = np.zeros(0, np.float32), False
        self._decided = 0  # samples at 16 kHz
        self._turn: list[np.ndarray] = []  # windows of the turn under way, its beginning,
        self._start, self._voiced = 0.0, 0  # and how many of them are up to the last voice
        self._turns: list[UserTurn] = []

    def push(self, audio: np.ndarray) -> bool:
        """24 kHz samples [T] → the latest decision."""
        audio = np.nan_to_num(np.asarray(audio, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        samples = np.concatenate([self._rest, self._resample(audio)])
        windows, self._rest = np.split(samples, [len(samples) - len(samples) % VAD_SAMPLES])
        for window in windows.reshape(-1, VAD_SAMPLES):
            self._decide(window)
        return self._speaking

    def turns(self) -> list[UserTurn]:
        """The turns so far; one under way ends with its last voice."""
        return self._turns + ([self._finished()] if self._turn else [])

    def _decide(self, window: np.ndarray) -> None:
        self._speaking = self._probability(window) >= (VAD_OFF if self._speaking else VAD_ON)
        if self._speaking and not self._turn:
            self._start = self._decided / VAD_RATE - self._resample.delay_seconds
        self._decided += VAD_SAMPLES
        if self._speaking or self._turn:
            self._turn.append(window)
        if self._speaking:
            self._voiced = len(self._turn)
        elif (len(self._turn) - self._voiced) * VAD_SAMPLES >= VAD_TURN_SILENCE * VAD_RATE:
            self._turns.append(self._finished())
            self._turn = []

    def _finished(self) -> UserTurn:
        levels = frame_levels(np.concatenate(self._turn[: self._voiced]), VAD_RATE)
        last = int(np.flatnonzero(levels > levels.max() + ONSET_DB)[-1])
        return UserTurn(self._start, self._start + (last + 1) * LEVEL_SECONDS, "silero")


def _silero() -> Callable[[np.ndarray], float]:
    missing = "voice detection needs Silero VAD: pip install silero-vad"
    torch = needed("torch", missing)  # not at the top: a call to a server needs none
    threads = torch.get_num_threads()
    model = torch.inference_mode()(needed("silero_vad", missing).load_silero_vad().forward)
    torch.set_num_threads(threads)  # importing silero_vad sets it to 1
    return lambda samples: float(model(torch.from_numpy(samples), VAD_RATE))


def find_speech(audio: np.ndarray) -> UserTurn | None:
    """The stretch of a recording [T] from its first to its last voice, or None in silence: by
    energy, which is exact, where the background lies below -40 dB of the peak; else by Silero."""
    levels = frame_levels(audio)
    if not len(levels) or levels.max() < QUIET_DBFS:
        return None
    found = utterances(levels, levels.max() + ONSET_DB)
    if found and np.percentile(levels, 5) < levels.max() + ONSET_DB:
        return UserTurn(found[0][0] * LEVEL_SECONDS, (found[-1][1] + 1) * LEVEL_SECONDS, "energy")
    try:
        detector = VoiceDetector()
        detector.push(np.concatenate([audio, np.zeros(SAMPLE_RATE, np.float32)]))
        turns = detector.turns()
    except UserError:  # without Silero
        turns = energy_turns(levels)
    return UserTurn(turns[0].start, turns[-1].end, turns[0].source) if turns else None


def energy_turns(levels: np.ndarray) -> list[UserTurn]:
    """A user's turns in a whole call by loudness alone, for want of Silero: what stands 15 dB above
    the background (the quietest tenth) and within 40 dB of the peak."""
    if not len(levels) or levels.max() < QUIET_DBFS:
        return []
    threshold = max(np.percentile(levels, 10) + 15.0, levels.max() + ONSET_DB)
    found = utterances(levels, threshold, VAD_TURN_SILENCE)
    return [UserTurn(a * LEVEL_SECONDS, (b + 1) * LEVEL_SECONDS, "loudness") for a, b in found]


def kind_of(latency: float | None) -> str:
    """What followed a user turn: "answered", "takeover" or "unanswered"."""
    if latency is None:
        return "unanswered"
    return "takeover" if latency < TAKEOVER_SECONDS else "answered"


def response_latencies(levels: np.ndarray, turns: Sequence[UserTurn],
                       times: np.ndarray) -> list[float | None]:  # fmt: skip
    """From the end of each user turn to the reply's onset, by the agent's loudness [n]
    (`frame_levels`) and the times on the input's clock [n] at which it reaches the ear. An onset is
    the first utterance to begin after the turn began and before the next one, at -40 dB of the peak
    in that stretch. None where it is later than 2 s, or never."""
    latencies = []
    for turn, until in zip(turns, [*(turn.start for turn in turns[1:]), np.inf], strict=False):
        inside = (times > turn.start) & (times < until)
        loudest = levels[inside].max(initial=-np.inf)
        onsets = [i for i, _ in utterances(levels, loudest + ONSET_DB) if inside[i]]
        latency = float(times[onsets[0]] - turn.end) if onsets and loudest >= QUIET_DBFS else np.inf
        latencies.append(latency if latency <= UNANSWERED_SECONDS else None)
    return latencies


def barge_in_latencies(levels: np.ndarray, turns: Sequence[UserTurn],
                       times: np.ndarray) -> list[float]:  # fmt: skip
    """For each turn that begins while the agent is audible: seconds until the agent is silent."""
    if (loudest := levels.max(initial=-np.inf)) < QUIET_DBFS:
        return []
    found = utterances(levels, loudest + ONSET_DB)
    spoken = [(times[first], times[last] + LEVEL_SECONDS) for first, last in found]
    return [float(end - t.start) for t in turns for begin, end in spoken if begin < t.start < end]


class Delay(NamedTuple):
    """Seconds that a patch of the reply came late, beside its own length."""

    gpu: float = 0.0  # the queue before the model and the tick
    network: float = 0.0
    buffers: float = 0.0  # sound devices, resamplers, what waits to be played


class Reply(NamedTuple):
    """The agent's audio [T] in answer to input patch `index`."""

    audio: np.ndarray
    index: int
    delay: Delay = Delay()


@dataclass
class CallRecord:
    """Loudness and delay of every output patch of a call, half a kilobyte a second."""

    patch_seconds: float
    levels: list[np.ndarray] = field(default_factory=list)
    delays: list[Delay] = field(default_factory=list)
    index: list[int] = field(default_factory=list)  # the input patch that each answers
    stopped: BaseException | None = None  # what ended the call early

    def add(self, reply: Reply, buffers: float = 0.0) -> None:
        self.levels.append(frame_levels(reply.audio))
        self.delays.append(reply.delay._replace(buffers=buffers))
        self.index.append(reply.index)

    def times(self) -> np.ndarray:
        """When each 5 ms of the reply reaches the ear, on the input's clock:
        (patch + 1) x patch length + that patch's delay + offset in the patch."""
        late = np.array(self.delays).reshape(-1, len(Delay._fields)).sum(1)
        begins = (np.array(self.index) + 1) * self.patch_seconds + late
        offsets = np.arange(0.0, self.patch_seconds - 1e-6, LEVEL_SECONDS)
        return (begins[:, None] + offsets).ravel()


@dataclass
class LatencyLedger:
    """p50/p95/p99 of everything that delays a reply, in milliseconds, but the warm-up. `tick` and
    `call` collect, `table` is for the terminal, `summary` for the last line of stdout."""

    patch_seconds: float
    acoustic_seconds: float = 0.0  # the LM's acoustic delay
    warmup_ticks: int = 0
    device_seconds: float = 0.0
    resampler_seconds: float = 0.0
    times: list[StageTimes] = field(default_factory=list)
    latencies: list[float | None] = field(default_factory=list)  # a user turn each
    onsets: list[Delay] = field(default_factory=list)  # an answered turn each: at its onset
    loopback_seconds: float | None = None  # from speaker to microphone, measured
    mouth_to_ear: list[float] = field(default_factory=list)  # a patch each, after a loopback
    barge_ins: list[float] = field(default_factory=list)
    turn_end_sources: set[str] = field(default_factory=set)
    counts: Counter = field(default_factory=lambda: Counter(dict.fromkeys(_COUNTED, 0)))

    def tick(self, result: Any) -> None:
        """Count a `duplex.TickResult`: late when it took longer than its own length."""
        self.times.append(result.times)
        self.counts["late_ticks"] += int(result.times.total > self.patch_seconds)
        self.counts["dropped_patches"] += int(np.sum(result.dropped))
        self.counts["not_finite_samples"] += int(result.not_finite.sum())

    def call(self, record: CallRecord, turns: Sequence[UserTurn]) -> list[float | None]:
        """Judge a finished call by its user's turns; returns the latency of each."""
        levels, times = np.concatenate([np.zeros(0), *record.levels]), record.times()
        latencies = response_latencies(levels, turns, times)
        self.latencies += latencies
        for latency, turn in zip(latencies, turns, strict=True):
            if kind_of(latency) == "answered":
                onset = np.abs(times - turn.end - latency).argmin()
                self.onsets.append(record.delays[onset // len(record.levels[0])])
        if self.loopback_seconds is not None:
            fixed = self.patch_seconds + self.acoustic_seconds
            self.mouth_to_ear += [fixed + sum(delay) for delay in record.delays]
        self.barge_ins += barge_in_latencies(levels, turns, times)
        self.turn_end_sources |= {turn.source for turn in turns}
        return latencies

    def summary(self) -> dict:
        """All of it as plain numbers (ms), None where nothing was measured."""
        kinds = [kind_of(latency) for latency in self.latencies]
        answered = [latency for latency in self.latencies if kind_of(latency) == "answered"]
        return {
            "patch_ms": _ms(self.patch_seconds),
            "algorithmic_ms": _ms(self.patch_seconds + self.acoustic_seconds),
            "tick_ms": _by_field(StageTimes, self.times), "response_ms": percentiles(answered),
            "response_parts_ms": _by_field(Delay, self.onsets),
            "turns": len(kinds), "answered": len(answered),
            "takeovers": kinds.count("takeover"), "unanswered": kinds.count("unanswered"),
            "answered_share": round(len(answered) / len(kinds), 4) if kinds else None,
            "turn_end_source": "+".join(sorted(self.turn_end_sources)) or None,
            "barge_in_ms": percentiles(self.barge_ins), "device_ms": _ms(self.device_seconds),
            "resampler_ms": _ms(self.resampler_seconds),
            "loopback_ms": None if self.loopback_seconds is None else _ms(self.loopback_seconds),
            "mouth_to_ear_ms": percentiles(self.mouth_to_ear),
            **self.counts, "warmup_ticks": self.warmup_ticks}  # fmt: skip

    def table(self) -> str:
        """A small table for the terminal, 80 columns."""
        s = self.summary()
        share = f"   answered {s['answered']}/{s['turns']}" if s["turns"] else ""
        loopback = "" if self.mouth_to_ear else "   give --loopback to measure it"
        rows = [
            f"{'latency, ms':<16}{'p50':>8}{'p95':>8}{'p99':>8}{'n':>7}",
            f"{'algorithmic':<16}{s['algorithmic_ms']:>8.1f}   patch + acoustic delay",
            *(_row(f"tick {stage}", values) for stage, values in s["tick_ms"].items()),
            _row("response", s["response_ms"]) + share,
            *(_row(f"  {name}", values) for name, values in s["response_parts_ms"].items()),
            _row("barge-in", s["barge_in_ms"]),
            _row("mouth-to-ear", s["mouth_to_ear_ms"]) + loopback,
            f"a tick has {s['patch_ms']:.0f} ms: {s['late_ticks']} late, {s['dropped_patches']}"
            f" patches dropped; {s['takeovers']} takeovers, {s['unanswered']} unanswered",
            f"device {s['device_ms']:.1f}, resamplers {s['resampler_ms']:.1f}; end of turn by"
            f" {s['turn_end_source'] or 'nothing'}; {s['warmup_ticks']} warm-up ticks left out",
            f"speaker: {s['output_underruns']} underruns, {s['inserted_samples']} samples inserted,"
            f" {s['removed_samples']} removed"]  # fmt: skip
        if s["not_finite_samples"]:
            rows.append(f"{s['not_finite_samples']} samples were not numbers and became silence")
        return "\n".join(rows)


def _by_field(kind: Any, rows: Sequence) -> dict[str, dict | None]:
    return {name: percentiles([getattr(row, name) for row in rows]) for name in kind._fields}


def percentiles(seconds: Sequence[float]) -> dict | None:
    """{"p50", "p95", "p99"} in ms and "n"; None for an empty list."""
    points = {f"p{q}": _ms(np.percentile(seconds, q)) for q in (50, 95, 99) if len(seconds)}
    return {**points, "n": len(seconds)} if points else None


def _ms(seconds: float) -> float:
    return round(float(seconds) * 1000.0, 2)


def _row(name: str, values: dict | None) -> str:
    if values is None:
        return f"{name:<16}{'-':>8}{'-':>8}{'-':>8}{0:>7}"
    return "{:<16}{p50:>8.1f}{p95:>8.1f}{p99:>8.1f}{n:>7}".format(name, **values)
