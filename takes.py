"""What is said in a conversation, or to a model: voices, what engines say, and takes of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import speech
from audio import SAMPLE_RATE
from command import UserError
from phones import SILENCE

# How often each engine is drawn: by how natural it sounds and how unlike the others.
ENGINE_WEIGHTS = {"festival": 0.35, "flite": 0.25, "hibari": 0.2, "joe": 0.2, "espeak": 0.2}
# How far pitch is spread at most, and with an emotion's; further sounds sung.
MAX_PITCH_RANGE, MAX_WITH_EMOTION = {"agent": 1.4, "user": 1.1}, 1.6
agent_takes = {}  # by request a `Take`, or why there is none: made once a process
MARGIN_BEFORE, MARGIN_AFTER, FADE = 0.03, 0.06, 0.005  # seconds, around what is audible


def user_voices(language: str, split: str, engines: Sequence[str] | None = None) -> list:
    """The user voices of a split. Validation falls back on training voices, test never does."""
    try:
        return speech.voices(language, "user", split, engines)
    except UserError:
        if split != "validation":
            raise
        return speech.voices(language, "user", "train", engines)


def draw_voice(voices: Sequence[speech.Voice], rng: np.random.Generator) -> speech.Voice:
    """An engine by ENGINE_WEIGHTS, then one of its voices."""
    engines = sorted({voice.engine for voice in voices})
    weights = np.array([ENGINE_WEIGHTS.get(engine, 0.1) for engine in engines])
    engine = rng.choice(engines, p=weights / weights.sum())
    mine = [voice for voice in voices if voice.engine == engine]
    return mine[int(rng.integers(len(mine)))]


def speak(requests: Sequence[speech.Request]) -> list[speech.Utterance | UserError]:
    """Utterances in ranges of pitch that sound spoken; for what its engine cannot say, why."""
    try:
        return speech.synthesize([_limit_pitch_range(r) for r in requests])
    except UserError as error:
        if len(requests) == 1:
            return [UserError(f"{requests[0].voice.id}: {error}")]
        return [said for request in requests for said in speak([request])]


def _limit_pitch_range(request: speech.Request) -> speech.Request:
    voice, wider = request.voice, max(1.0, speech.STYLES[request.emotion].pitch_range)
    limit = min(MAX_PITCH_RANGE[voice.role], MAX_WITH_EMOTION / wider)
    if voice.engine == "espeak" or voice.pitch_range <= limit:  # espeak spreads it itself
        return request
    return replace(request, voice=replace(voice, pitch_range=limit))


@dataclass(frozen=True)
class Take:
    """An utterance cut close to its sound: `audio` `[T]`, audible from `onset` to `offset` (s)."""

    audio: np.ndarray
    onset: float
    offset: float
    phones: list | None
    words: list | None

    @property
    def length(self) -> float:
        return self.offset - self.onset


def make_takes(requests: Sequence[speech.Request]) -> list[Take | UserError]:
    """As `speak`, cut to their sound."""
    new = [request for request in dict.fromkeys(requests) if request not in agent_takes]
    made = dict(agent_takes)
    for request, said in zip(new, speak(new), strict=True):
        take = said if isinstance(said, UserError) else cut_take(said)
        made[request] = take or UserError(f"{request.voice.id}: no sound")
    agent_takes.update({r: take for r, take in made.items() if r.voice.role == "agent"})
    return [made[request] for request in requests]


def cut_take(utterance: speech.Utterance) -> Take | None:
    """The utterance without its silent edges; None where all of it is silent.

    Edges are by energy (10 ms frames above −40 dB of the loudest), as in the latency ledger: the
    engines' labels disagree on where a stop or a breath begins."""
    audio, step = utterance.audio, SAMPLE_RATE // 100
    frames = audio[: len(audio) // step * step].reshape(-1, step)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    if not len(power) or power.max() < 1e-8:
        return None
    loud = np.flatnonzero(power > power.max() * 1e-4)
    onset, offset = loud[0] * 0.01, (loud[-1] + 1) * 0.01
    first = max(0, round((onset - MARGIN_BEFORE) * SAMPLE_RATE))
    last = min(len(audio), round((offset + MARGIN_AFTER) * SAMPLE_RATE))
    cut, shift = faded(audio[first:last]), first / SAMPLE_RATE
    spans = (shift_spans(one, -shift, 0.0, len(cut) / SAMPLE_RATE)
             for one in (utterance.phones, utterance.words))  # fmt: skip
    return Take(cut, onset - shift, offset - shift, *spans)


def faded(audio: np.ndarray, tail: float = FADE) -> np.ndarray:
    """A copy that rises from zero within FADE and falls to zero in its last `tail` seconds."""
    audio = np.array(audio, dtype=np.float32)
    for part, seconds in ((audio, FADE), (audio[::-1], tail)):
        n = min(round(seconds * SAMPLE_RATE), len(audio))
        part[:n] *= np.linspace(0.0, 1.0, n, dtype=np.float32)
    return audio


def shift_spans(spans, by: float, low: float, high: float) -> list | None:
    """Spans `by` seconds later, clipped to [low, high]; those that fall outside are dropped."""
    if spans is None:
        return None
    moved = ((n, max(low, float(s) + by), min(high, float(e) + by)) for n, s, e in spans)
    return [[n, round(s, 4), round(e, 4)] for n, s, e in moved if e > s]


def insert_pause(take: Take, place: float, seconds: float) -> Take:
    """Silence of `seconds` at the word boundary nearest to the share `place` of the take."""
    words, phones = take.words or [], take.phones
    if not (boundaries := [(a[2] + b[1]) / 2 for a, b in itertools.pairwise(words)]):
        return take
    at = min(boundaries, key=lambda t: abs(t - place * len(take.audio) / SAMPLE_RATE))
    before, after = (faded(part) for part in np.split(take.audio, [round(at * SAMPLE_RATE)]))
    audio = np.concatenate([before, np.zeros(round(seconds * SAMPLE_RATE), np.float32), after])
    if phones is not None:
        early = [[n, s, min(e, at)] for n, s, e in phones if s < at]
        late = [[n, max(s, at) + seconds, e + seconds] for n, s, e in phones if e > at]
        late = [span for span in late if span[2] - span[1] > 1e-3]
        phones = [*early, [SILENCE, at, at + seconds], *late]
    delays = [seconds if (start + end) / 2 > at else 0.0 for _, start, end in words]
    words = [[n, s + d, e + d] for (n, s, e), d in zip(words, delays, strict=True)]
    return Take(audio, take.onset, take.offset + seconds, phones, words)
