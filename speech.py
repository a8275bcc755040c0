"""Text to speech behind one interface: engines say a text, and what follows them is done here.

Two modules bring engines (`Engine`), as SPEECH_ENGINES: `engines` those that a user installs,
`tools.toy_voices` those whose speech the shipped toy learnt from. More speakers come from changes
of formants, pitch, range and rate: the engine's own where it has them, else Praat's.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import soxr

import praat
from audio import SAMPLE_RATE
from command import UserError
from phones import SILENCE, clean_text, espeak_language

ENGINE_MODULES = ("engines", "tools.toy_voices", "tools.held_out_voices")
# (formant, pitch, pitch range) by which a voice becomes others.
CHANGES = ((1.0, 1.0, 1.0), (1.0, 0.88, 1.2), (1.0, 1.14, 1.1), (1.09, 1.2, 1.2), (0.92, 0.86, 1.1),
           (1.16, 1.55, 1.2), (0.87, 0.72, 1.2), (1.05, 0.95, 1.4))  # fmt: skip
Span = tuple[str, float, float]  # symbol or word, start and end in seconds


@dataclass(frozen=True)
class Voice:
    """A speaker of one engine; `speaker`: whose voice is beneath. Factors relate to `name`."""

    id: str
    engine: str
    language: str
    speaker: str
    name: str  # the engine's own name of the voice
    formant: float = 1.0  # spectral envelope, > 1 is a smaller head
    pitch: float = 1.0  # median fundamental frequency
    pitch_range: float = 1.0
    rate: float = 1.0
    split: str = "train"
    role: str = "user"


@dataclass(frozen=True)
class Request:
    """What to say. `seed` draws small variations of pitch, range and rate (users only)."""

    text: str
    language: str
    voice: Voice
    speed: float = 1.0
    emotion: str = "neutral"
    seed: int = 0


@dataclass(frozen=True)
class Utterance:
    """`audio` float32 `[T]`, 24 kHz; `phones` tile it, silences too. None: times are not known."""

    audio: np.ndarray
    phones: list[Span] | None = None
    words: list[Span] | None = None


class Style(NamedTuple):
    """An emotion as multipliers of median pitch, pitch range and rate, a gain in dB, and a tilt of
    the spectrum in dB an octave above TILT_HZ: vocal effort brightens a voice."""

    pitch: float = 1.0
    pitch_range: float = 1.0
    rate: float = 1.0
    gain_db: float = 0.0
    tilt_db: float = 0.0


# Directions as actors' portrayals have them (Banse and Scherer 1996, table 5; Juslin and Laukka
# 2003, table 7), sizes such that the speech stays natural.
STYLES = {"neutral": Style(), "happy": Style(1.2, 1.45, 1.08, 2.0, 0.8),
    "sad": Style(0.88, 0.5, 0.8, -4.0, -2.0), "angry": Style(1.08, 1.25, 1.15, 5.0, 2.2),
    "fear": Style(1.32, 0.8, 1.2, -1.0, 0.3), "disgust": Style(0.84, 1.1, 0.86, 1.0, 0.0),
    "surprise": Style(1.4, 1.6, 0.95, 2.0, 0.3), "calm": Style(0.97, 0.85, 0.87, -3.0, -1.0),
}  # fmt: skip
STRENGTH = (0.7, 1.2)  # of the style in what users say, as a power of it
TILT_HZ = (500.0, 8000.0)  # between which a tilt works; above, its gain stays
TILT_SPREAD = 0.3  # dB an octave, of users: of speakers and of their microphones
SPEECH_RMS = 0.07  # of what is said, silences apart, before the style's gain
LOUD_DB = -36.0  # below the loudest tenth: what still counts as sound at the edge of a silence
EDGE_SECONDS, PAUSE_SECONDS = 0.04, 0.30  # silence left at each end, at most inside


@dataclass(frozen=True)
class Order:
    """A request with voice, style and jitter multiplied out, as an engine gets it."""

    text: str
    language: str
    name: str  # the engine's own name of the voice, to which the factors are relative
    formant: float = 1.0
    pitch: float = 1.0
    pitch_range: float = 1.0
    rate: float = 1.0
    gain_db: float = 0.0
    tilt_db: float = 0.0
    seed: int = 0


@dataclass
class Raw:
    """An engine's own output, mono in [-1, 1] at `rate` Hz, and times where it knows them.
    `remaining`: the arguments of `praat.change_voice` for what was asked and is not yet done."""

    audio: np.ndarray
    rate: int
    phones: list[Span] | None = None
    words: list[Span] | None = None
    remaining: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """What an entry of SPEECH_ENGINES is. It loads its model on first use."""

    name: str  # what `--engines` and `Voice.engine` call it
    install: str  # the line that installs its package
    license: str  # of its speech
    commercial_ok: bool
    note: str

    def voices(self, language: str) -> list[Voice]:
        """Those that can speak here and now; UserError with what to do where none can. At most one
        has the role agent. The users' speakers are disjoint between splits."""

    def say(self, orders: Sequence[Order]) -> list[Raw]:
        """What is said, in order; all orders have one language. The same orders give the same
        bytes, a text without words a short silence. UserError where the engine fails."""


@functools.lru_cache(maxsize=1)
def all_engines() -> dict[str, Engine]:
    """Every engine there is by its name, whether or not it is installed."""
    find = importlib.util.find_spec
    there = [name for name in ENGINE_MODULES if find(name.partition(".")[0]) and find(name)]
    modules = map(importlib.import_module, there)
    return {engine.name: engine for module in modules for engine in module.SPEECH_ENGINES}


def find_engine(name: str) -> Engine:
    """The engine of a name, or UserError with those that there are."""
    if name not in all_engines():
        known = ", ".join(all_engines()) or "none (tools/toy_voices.py has the toy's)"
        raise UserError(f"no speech engine {name!r}: engines are {known}")
    return all_engines()[name]


def synthesize(items: Sequence[Request]) -> list[Utterance]:
    """Utterances in the order of `items`, a batch an engine and language; the same requests give
    the same bytes. UserError: no such engine, language or emotion, or an engine that fails."""
    orders = [_order(item) for item in items]
    batches: dict[tuple[str, str], list[int]] = {}
    for i, item in enumerate(items):
        batches.setdefault((item.voice.engine, item.language), []).append(i)
    made: dict[int, Utterance] = {}
    for (engine, _), indices in batches.items():
        raws = find_engine(engine).say([orders[i] for i in indices])
        made |= {i: _finish(raw, orders[i]) for i, raw in zip(indices, raws, strict=True)}
    return [made[i] for i in range(len(items))]


def _order(item: Request) -> Order:
    if item.emotion not in STYLES:
        raise UserError(f"no emotion {item.emotion!r}: emotions are {', '.join(STYLES)}")
    espeak_language(item.language)
    voice, jitter, tilt, strength = item.voice, np.ones(4), 0.0, 1.0
    if voice.role == "user":
        rng = np.random.default_rng([item.seed & 0xFFFFFFFF, len(item.text)])
        jitter = np.exp(rng.normal(0.0, (0.05, 0.12, 0.08, 0.06)).clip(-0.25, 0.25))
        tilt, strength = TILT_SPREAD * rng.normal(), rng.uniform(*STRENGTH)
    style = STYLES[item.emotion]
    pitch, pitch_range, rate = (factor**strength for factor in style[:3])
    return Order(clean_text(item.text), item.language, voice.name,
        # Held-out speakers have their own head; more heads than there are voices help to train.
        formant=float(voice.formant * (jitter[3] if voice.split == "train" else 1.0)),
        pitch=float(voice.pitch * pitch * jitter[0]),
        pitch_range=float(voice.pitch_range * pitch_range * jitter[1]),
        rate=float(np.clip(voice.rate * rate * item.speed * jitter[2], 0.5, 2.0)),
        gain_db=style.gain_db * strength, tilt_db=style.tilt_db * strength + tilt,
        seed=item.seed)  # fmt: skip


def _finish(raw: Raw, order: Order) -> Utterance:
    """24 kHz, remaining voice changes, tilt, edges trimmed, pauses shortened, level set."""
    audio, phones, words = raw.audio.astype(np.float32), raw.phones, raw.words
    if raw.rate != SAMPLE_RATE and len(audio):
        audio = soxr.resample(audio, raw.rate, SAMPLE_RATE).astype(np.float32)
    factor = 1.0
    if raw.remaining and len(audio) > SAMPLE_RATE // 10:
        with contextlib.suppress(praat.TooShort):
            changed = praat.change_voice(audio, SAMPLE_RATE, **raw.remaining)
            audio, factor = changed, len(changed) / len(audio)
    audio = _tilted(audio, order.tilt_db)
    timed = phones is not None
    # Silence at both ends, so that there is always some to keep.
    phones = _moved(phones, factor) if timed else _moved(_loud_spans(audio), 1.0)
    words = words and _moved(words, factor)
    audio = np.pad(audio, round(EDGE_SECONDS * SAMPLE_RATE))
    phones = _place_silences(audio, tile(phones, len(audio) / SAMPLE_RATE))
    audio, phones, words = _cut_silences(audio, phones, words)
    return Utterance(_set_level(audio, phones, order.gain_db), phones if timed else None, words)


def _tilted(audio: np.ndarray, tilt_db: float) -> np.ndarray:
    """With a gain of `tilt_db` an octave between the TILT_HZ, of no phase."""
    if not tilt_db or not len(audio):
        return audio
    hertz = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    gain = 10 ** (tilt_db * np.log2(hertz.clip(*TILT_HZ) / TILT_HZ[0]) / 20)
    return np.fft.irfft(np.fft.rfft(audio) * gain, len(audio)).astype(np.float32)


def _moved(spans: list[Span], factor: float) -> list[Span]:
    """After a change of length by `factor`, and the silence before."""
    return [(x, s * factor + EDGE_SECONDS, e * factor + EDGE_SECONDS) for x, s, e in spans]


def _loud(audio: np.ndarray, frames_a_second: int, least: float = 0.0) -> np.ndarray:
    """Whether each frame is louder than LOUD_DB below the loudest tenth, and than `least`."""
    hop = SAMPLE_RATE // frames_a_second
    frames = len(audio) // hop
    power = np.mean(audio[: frames * hop].reshape(frames, hop) ** 2, axis=1)
    return power > max(np.percentile(power, 90) * 10 ** (LOUD_DB / 10), least)


def _loud_spans(audio: np.ndarray) -> list[Span]:
    """Where there is sound, for engines that know no phones; a gap of a stop is no silence."""
    if len(audio) < SAMPLE_RATE // 100 or not np.isfinite(audio).all():
        return []
    loud = np.flatnonzero(_loud(audio, 100, least=1e-9))
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > 100 * PAUSE_SECONDS / 2) + 1)
    return [("sound", run[0] / 100, (run[-1] + 1) / 100) for run in runs if len(run)]


def tile(phones: list[Span], duration: float) -> list[Span]:
    """Spans that follow each other without gaps over [0, duration], silences joined."""
    tiled, edge = [], 0.0
    for phone, start, end in phones:
        start, end = max(edge, min(start, duration)), min(end, duration)
        if start - edge > 1e-4:
            tiled.append((SILENCE, edge, start))
        if end > start:
            tiled.append((phone, start, end))
        edge = max(start, end)
    if duration - edge > 1e-4 or not tiled:
        tiled.append((SILENCE, edge, duration))
    for i in range(len(tiled) - 1, 0, -1):
        if tiled[i][0] == SILENCE == tiled[i - 1][0]:
            tiled[i - 1 : i + 1] = [(SILENCE, tiled[i - 1][1], tiled[i][2])]
    return tiled


def _place_silences(audio: np.ndarray, phones: list[Span]) -> list[Span]:
    """Moves the borders of silences to where the sound ends and begins: engines give a pause to
    the phone before it, or the last echo of a phone to the pause."""
    if len(audio) < SAMPLE_RATE // 100:
        return phones
    loud = _loud(audio, 200)

    def moments(start: float, end: float) -> np.ndarray:
        first, last = round(start * 200), min(round(end * 200), len(loud))
        return first + np.flatnonzero(loud[first:last])

    spans = [list(span) for span in phones]
    for i, (phone, start, end) in enumerate(phones):
        if phone != SILENCE:
            continue
        before, after = i > 0, i + 1 < len(phones)
        middle = (start + end) / 2 if before and after else end if before else start
        if before:
            floor = min(start, spans[i - 1][1] + 0.04)
            sounding = moments(floor, middle)
            edge = (sounding[-1] + 2) / 200 if len(sounding) else floor + 0.01
            spans[i - 1][2] = spans[i][1] = min(max(edge, floor), middle)
        if after:
            ceiling = max(end, min(phones[i + 1][2] - 0.03, (end + phones[i + 1][2]) / 2))
            sounding = moments(middle, ceiling)
            edge = (sounding[0] - 1) / 200 if len(sounding) else ceiling
            spans[i][2] = spans[i + 1][1] = max(min(edge, ceiling), middle)
    return [(p, s, e) for p, s, e in spans if e > s]


def _cut_silences(audio: np.ndarray, phones: list[Span], words: list[Span] | None) -> tuple:
    """(audio, phones, words), silences that are longer than wanted cut; times follow."""
    pieces, spans, cuts, clock = [], [], [], 0.0  # cuts: (time, seconds removed at that time)
    for i, (phone, start, end) in enumerate(phones):
        piece = audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        at_start, at_end = i == 0, i == len(phones) - 1
        keep = round((EDGE_SECONDS if at_start or at_end else PAUSE_SECONDS) * SAMPLE_RATE)
        if phone == SILENCE and len(piece) > keep and len(phones) > 1:
            head = 0 if at_start else keep if at_end else keep // 2
            cuts.append((start + head / SAMPLE_RATE, (len(piece) - keep) / SAMPLE_RATE))
            piece = np.concatenate([piece[:head], piece[len(piece) - (keep - head) :]])
        if (seconds := len(piece) / SAMPLE_RATE) > 0:
            pieces.append(piece)
            spans.append((phone, clock, clock + seconds))
            clock += seconds
    audio = np.concatenate(pieces) if pieces else audio[:0]

    def moved(t: float) -> float:
        return t - sum(min(removed, t - at) for at, removed in cuts if t > at)

    return audio, spans, words and [(w, moved(s), min(moved(e), clock)) for w, s, e in words]


def _set_level(audio: np.ndarray, phones: list[Span], gain_db: float) -> np.ndarray:
    spans = [(s, e) for phone, s, e in phones if phone != SILENCE]
    said = [audio[round(s * SAMPLE_RATE) : round(e * SAMPLE_RATE)] for s, e in spans]
    power = float(np.mean(np.concatenate(said) ** 2)) if said else 0.0
    if power <= 0.0:
        return audio.astype(np.float32)
    gain = SPEECH_RMS / math.sqrt(power) * 10 ** (gain_db / 20)
    return (audio * min(gain, 0.97 / float(np.max(np.abs(audio))))).astype(np.float32)


def voices(language: str, role: str = "user", split: str = "train",
           engines: Sequence[str] | None = None) -> list[Voice]:  # fmt: skip
    """Voices of the installed engines. `role` agent: the one voice of a language, for any split.
    `engines` are those asked for, best first; None: every one installed. Users are split by
    speaker: those held out are in no training voice, however changed. UserError where none is."""
    espeak_language(language)
    found, missing = [], []
    for engine in [find_engine(name) for name in (all_engines() if engines is None else engines)]:
        try:
            found += [v for v in engine.voices(language) if v.role == role]
        except UserError as error:
            missing.append(str(error))
    found = found[:1] if role == "agent" else [v for v in found if v.split == split]
    if not found:
        which = "agent's" if role == "agent" else split
        how = "; ".join(missing) or "these engines have none"
        raise UserError(f"no {which} voice for {language}: {how}")
    return found


def own_and_changed(engine: str, language: str, names: Sequence[str]) -> list[Voice]:
    """The agent, who is the first of an engine's own voices, and users: all of them, changed. Of
    three voices and more the last two are held out, for validation and test. With fewer the last
    two changes are: then a held-out voice is another only as far as Praat makes it one."""
    by_name = len(names) > 2
    last = len(names if by_name else CHANGES) - 1
    splits = {last: "test", last - 1: "validation"}
    made = [Voice(f"{language}/{engine}/agent", engine, language, f"{engine}-{names[0]}",
                  names[0], role="agent")]  # fmt: skip
    for n, name in enumerate(names):
        for i in range(0 if n else 3, len(CHANGES)):  # its first three are too near the agent
            speaker = f"{engine}-{name}" if by_name else f"{engine}-{name}-{i}"
            id, split = f"{language}/{engine}/{name}/{i}", splits.get(n if by_name else i, "train")
            made.append(Voice(id, engine, language, speaker, name, *CHANGES[i], split=split))
    return made
