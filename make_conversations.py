"""Written scripts + speech engines → two-channel conversations → the code dataset of train_s2s.py.

    python make_conversations.py --hours 4 --codec checkpoints/tiny/codec \\
        --output_dir data/conversations/scripted                  # agent and user, as codes
    python make_conversations.py --clips_dir data --clips_hours 1 # single sentences, for the codec
    python make_conversations.py --conversations DIR --codec …    # real two-channel recordings

Everything is drawn from (seed, split, language, part, number): the same command makes the same
bytes, in any number of processes, and goes on where it was stopped. Work is cut into parts of a
few minutes of audio; a part is written under a temporary name and renamed when it is whole.

Who may be heard where: training uses the scripts' training wordings in training voices; validation
the held-out wordings in validation voices (in training voices where none is installed); test the
held-out wordings in test voices. The agent has one voice a language, in every split.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr
import torch

import speech
from audio import HOP, SAMPLE_RATE, read_channels, write_audio
from codec import Codec
from command import (
    ArgumentParser,
    UserError,
    default_workers,
    number,
    only_one,
    run,
    run_parts,
    whole,
    writable_folder,
    write_text,
)
from data import (
    EMOTIONS,
    LANGUAGES,
    MANIFEST,
    SPLITS,
    Clip,
    read_manifest,
    write_manifest,
)
from dialogues import (
    CODEBOOKS,
    INFO_FILE,
    SPOKEN,
    Exchange,
    Recording,
    choose_exchanges,
    digest,
    finish_dataset,
    join_arrow,
    load_code_dataset,
    load_scripts,
    printable,
    read_json,
    read_recordings,
    write_arrow,
    write_json,
)
from phones import SILENCE
from training import setup_distributed

PART_SECONDS = 300.0
PART_CONVERSATIONS = 16
CLIP_PART_SECONDS = 120.0
# Every file of a dataset is opened, and mapped into memory, whenever it is loaded.
FILE_PARTS = 32  # parts of scripted conversations in a file
FILE_RECORDINGS = 256
FILE_SECONDS = 600.0  # of work, after which the recordings that are done get a file of their own
BATCH_SECONDS = 3600.0  # of recordings that a GPU encodes at a time
AGENT_SHARE = 1 / 3  # of the seconds of clips
VALIDATION_SHARE = 0.06  # of the user clips
# How often each engine is drawn: by how natural it sounds and how unlike the others, not by the
# number of its voices. espeak is cheap and varied, but no person sounds like it.
ENGINE_WEIGHTS = {"festival": 0.35, "flite": 0.25, "hibari": 0.2, "espeak": 0.2}
LICENSES = {
    "hibari": "Apache-2.0 (hibari-tts)",
    "flite": "BSD-like (CMU Flite)",
    "festival": "free (Festival voices of Debian; NSK, Czech, Italian: GPL; Finnish: LGPL-2+)",
    "espeak": "output of espeak-ng (GPL-3.0+)",
}

# How far a voice's pitch is spread at most; further sounds sung, and praat.py may narrow it. Users'
# ranges are drawn up to 1.28 times as large. espeak spreads its pitch itself.
MAX_PITCH_RANGE = {"agent": 1.4, "user": 1.1}

# Timing in seconds, chances in [0, 1].
LEAD_IN = (0.2, 1.5)
ANSWER_GAP = (0.08, 0.24)
AGENT_TICK = 0.04  # seconds: a patch of train_s2s.py
TURN_SLACK = 0.5  # seconds by which a written turn may pass the end of its recording
EXCHANGE_GAP = (0.3, 1.5)
LONG_GAP = (3.0, 8.0)
OVERLAP = (0.05, 0.2)  # the user starts on the agent's last syllable
AGENT_STOPS_AFTER = (0.1, 0.2)
INNER_PAUSE = (0.3, 0.8)
TAIL = (0.4, 1.5)
IDLE_SECONDS = (5.0, 15.0)
IDLE_CHANCE = 0.04  # nobody speaks: the agent must not either
LONG_GAP_CHANCE = 0.08
OVERLAP_CHANCE = 0.08
BARGE_IN_CHANCE = 0.1
PAUSE_CHANCE = 0.15
BACKCHANNEL_CHANCE = 0.1
BARGE_IN_MIN_REPLY = 1.0
# The sound at the user's microphone.
GAIN_DB = (-12.0, 4.0)
SPEED = (0.88, 1.14)
SNR_DB = (10.0, 40.0)
BABBLE_SNR_DB = (15.0, 40.0)  # speech in the noise hides phones more than hiss does
CLEAN_CHANCE = 0.2
ROOM_CHANCE = 0.4
BAND_LIMIT_CHANCE = 0.2
ECHO_CHANCE = 1 / 3
ECHO_DELAY = (0.05, 0.25)
ECHO_DB = (-45.0, -20.0)
NOISES = ("white", "pink", "hum", "babble")
BACKCHANNELS = {
    "english": ("Mm-hmm.", "Okay.", "Right.", "I see.", "Yeah."),
    "hindi": ("अच्छा।", "हाँ।", "ठीक है।", "हम्म।"),
    "telugu": ("సరే.", "అలాగా.", "ఊఁ.", "అవునా."),
}
BACKCHANNEL = "backchannel"  # the intent of such a turn: it asks for no answer


# ---------------------------------------------------------------------------------- small things


def _write_dropped(folder: Path, dropped: Sequence[str]) -> None:
    write_text(folder / "dropped.txt", printable("".join(f"{reason}\n" for reason in dropped)))


def _uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(rng.uniform(*bounds))


def draw_voice(voices: Sequence[speech.Voice], rng: np.random.Generator) -> speech.Voice:
    """An engine by ENGINE_WEIGHTS, then one of its voices."""
    engines = sorted({voice.engine for voice in voices})
    weights = np.array([ENGINE_WEIGHTS.get(engine, 0.1) for engine in engines])
    engine = rng.choice(engines, p=weights / weights.sum())
    mine = [voice for voice in voices if voice.engine == engine]
    return mine[int(rng.integers(len(mine)))]


# ---------------------------------------------------------------------------------- takes


@dataclass(frozen=True)
class Take:
    """An utterance cut close to its sound: `audio` `[T]`, heard from `onset` to `offset` (s)."""

    audio: np.ndarray
    onset: float
    offset: float
    phones: list | None
    words: list | None

    @property
    def length(self) -> float:
        return self.offset - self.onset


_MARGIN_BEFORE, _MARGIN_AFTER, _FADE = 0.03, 0.06, 0.005


def cut_take(utterance: speech.Utterance) -> Take | None:
    """The utterance without its silent edges; None where nothing is to be heard.

    Edges are by energy (10 ms frames above −40 dB of the loudest), as the latency ledger hears
    them, not by the engines' labels, which disagree on where a stop or a breath begins.
    """
    audio = utterance.audio
    step = SAMPLE_RATE // 100
    frames = audio[: len(audio) // step * step].reshape(-1, step)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    if not len(power) or power.max() < 1e-8:
        return None
    heard = np.flatnonzero(power > power.max() * 1e-4)
    onset, offset = heard[0] * 0.01, (heard[-1] + 1) * 0.01
    first = max(0, round((onset - _MARGIN_BEFORE) * SAMPLE_RATE))
    last = min(len(audio), round((offset + _MARGIN_AFTER) * SAMPLE_RATE))
    cut = _faded(audio[first:last])
    shift = first / SAMPLE_RATE
    seconds = len(cut) / SAMPLE_RATE
    return Take(
        cut,
        onset - shift,
        offset - shift,
        _moved(utterance.phones, -shift, 0.0, seconds),
        _moved(utterance.words, -shift, 0.0, seconds),
    )


def _faded(audio: np.ndarray, head: float = _FADE, tail: float = _FADE) -> np.ndarray:
    audio = np.array(audio, dtype=np.float32)
    for seconds, backwards in ((head, False), (tail, True)):
        n = min(round(seconds * SAMPLE_RATE), len(audio))
        ramp = np.linspace(0.0, 1.0, n, dtype=np.float32)
        if backwards:
            audio[len(audio) - n :] *= ramp[::-1]
        else:
            audio[:n] *= ramp
    return audio


def _moved(spans, by: float, low: float, high: float) -> list | None:
    """Spans `by` seconds later, clipped to [low, high]; those that fall outside are dropped."""
    if spans is None:
        return None
    moved = []
    for name, start, end in spans:
        start, end = max(low, float(start) + by), min(high, float(end) + by)
        if end > start:
            moved.append([name, round(start, 4), round(end, 4)])
    return moved


def insert_pause(take: Take, place: float, seconds: float) -> Take:
    """Silence of `seconds` at the word boundary nearest to the share `place` of the take."""
    boundaries = [
        (a[2] + b[1]) / 2 for a, b in zip(take.words or [], (take.words or [])[1:], strict=False)
    ]
    if not boundaries:
        return take
    at = min(boundaries, key=lambda t: abs(t - place * len(take.audio) / SAMPLE_RATE))
    sample = round(at * SAMPLE_RATE)
    silence = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    before, after = _faded(take.audio[:sample]), _faded(take.audio[sample:])

    def opened(spans, silent: bool):
        if spans is None:
            return None
        early = [[n, s, min(e, at)] for n, s, e in spans if s < at]
        late = [[n, max(s, at) + seconds, e + seconds] for n, s, e in spans if e > at]
        late = [span for span in late if span[2] - span[1] > 1e-3]
        return early + ([[SILENCE, at, at + seconds]] if silent else []) + late

    late = [seconds if (start + end) / 2 > at else 0.0 for _, start, end in take.words]
    words = [[n, s + d, e + d] for (n, s, e), d in zip(take.words, late, strict=True)]
    audio = np.concatenate([before, silence, after])
    return Take(audio, take.onset, take.offset + seconds, opened(take.phones, True), words)


# ---------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class PlannedTurn:
    """What is said, and when: `gap` seconds after the turn before it has ended.

    `barge_in` (user) is the share of the agent's reply after which the user speaks instead, and
    `stops_after` how long the agent then takes to fall silent; `pause` is (place, seconds);
    `inside` marks a back-channel, `place` the share of the agent's turn at which it is heard.
    """

    who: str
    request: speech.Request
    intent: str
    exchange: str | None
    gap: float = 0.0
    barge_in: float | None = None
    stops_after: float = 0.15
    pause: tuple[float, float] | None = None
    inside: float | None = None


@dataclass(frozen=True)
class Microphone:
    """What the user's channel goes through; times in seconds, levels in dB, None where absent."""

    gain_db: float
    noise: str | None
    snr_db: float
    room_seconds: float | None  # RT60
    room_db: float  # the tail against the direct sound
    band_hz: int | None  # sample rate of a narrow line
    echo: tuple[float, float] | None  # delay, level
    seed: int


@dataclass(frozen=True)
class Plan:
    turns: tuple[PlannedTurn, ...]
    tail: float
    microphone: Microphone


def draw_microphone(rng: np.random.Generator) -> Microphone:
    noise = str(rng.choice(NOISES))
    snr = _uniform(rng, BABBLE_SNR_DB if noise == "babble" else SNR_DB)
    clean, room, band, echo = rng.random(4)
    return Microphone(
        gain_db=_uniform(rng, GAIN_DB),
        noise=None if clean < CLEAN_CHANCE else noise,
        snr_db=snr,
        room_seconds=_uniform(rng, (0.1, 0.45)) if room < ROOM_CHANCE else None,
        room_db=_uniform(rng, (-18.0, -6.0)),
        band_hz=int(rng.choice((8000, 12000, 16000))) if band < BAND_LIMIT_CHANCE else None,
        echo=(_uniform(rng, ECHO_DELAY), _uniform(rng, ECHO_DB)) if echo < ECHO_CHANCE else None,
        seed=int(rng.integers(2**31)),
    )


def plan_conversation(
    exchanges: Sequence[Exchange],
    users: Sequence[speech.Voice],
    agent: speech.Voice,
    rng: np.random.Generator,
) -> Plan:
    """Two to four exchanges in one user voice, or (IDLE_CHANCE) a call in which nobody speaks."""
    voice, speed, microphone = draw_voice(users, rng), _uniform(rng, SPEED), draw_microphone(rng)
    if rng.random() < IDLE_CHANCE:
        return Plan((), _uniform(rng, IDLE_SECONDS), microphone)
    count = min(int(rng.integers(2, 5)), len(exchanges))
    chosen = [exchanges[i] for i in rng.choice(len(exchanges), size=count, replace=False)]
    turns: list[PlannedTurn] = []
    for exchange in chosen:
        for line in exchange.lines:
            text = line.texts[int(rng.integers(len(line.texts)))]
            if line.who == "agent":
                request = speech.Request(text, agent.language, agent, 1.0, line.emotion)
                gap = _uniform(rng, ANSWER_GAP)
                turns.append(PlannedTurn("agent", request, exchange.intent, exchange.id, gap))
                _add_backchannel(turns, voice, speed, rng)
            else:
                seed = int(rng.integers(2**31))
                request = speech.Request(text, voice.language, voice, speed, line.emotion, seed)
                turn = PlannedTurn("user", request, exchange.intent, exchange.id)
                turns.append(_timed(turn, first=not turns, rng=rng))
    return Plan(tuple(turns), _uniform(rng, TAIL), microphone)


def _timed(turn: PlannedTurn, first: bool, rng: np.random.Generator) -> PlannedTurn:
    long_gap, overlap, barge, pause = rng.random(4)
    gap = _uniform(rng, LEAD_IN if first else EXCHANGE_GAP)
    if not first and overlap < OVERLAP_CHANCE:
        gap = -_uniform(rng, OVERLAP)
    elif long_gap < LONG_GAP_CHANCE:
        gap = _uniform(rng, LONG_GAP)
    return replace(
        turn,
        gap=gap,
        barge_in=_uniform(rng, (0.25, 0.8)) if not first and barge < BARGE_IN_CHANCE else None,
        stops_after=_uniform(rng, AGENT_STOPS_AFTER),
        pause=(_uniform(rng, (0.2, 0.8)), _uniform(rng, INNER_PAUSE))
        if pause < PAUSE_CHANCE
        else None,
    )


def _add_backchannel(turns: list[PlannedTurn], voice, speed, rng: np.random.Generator) -> None:
    drawn, which, place = rng.random(), rng.random(), rng.uniform(0.2, 0.6)
    seed = rng.integers(2**31)
    if drawn < BACKCHANNEL_CHANCE:
        texts = BACKCHANNELS[voice.language]
        text = texts[int(which * len(texts))]
        request = speech.Request(text, voice.language, voice, speed, "neutral", int(seed))
        turns.append(PlannedTurn("user", request, BACKCHANNEL, None, inside=float(place)))


# ---------------------------------------------------------------------------------- mixing


@dataclass(frozen=True)
class Conversation:
    """`agent` and `user` float32 `[T]` of one length (whole frames), turns in order of `start`."""

    id: str
    language: str
    agent: np.ndarray
    user: np.ndarray
    turns: list[dict]


@dataclass
class _Placed:
    """A take on the clock: its sound is heard from `start` to `end`, agents may be `cut` at s."""

    turn: PlannedTurn
    take: Take
    start: float
    cut: float | None = None

    @property
    def end(self) -> float:
        return self.start + self.take.length if self.cut is None else self.cut


def lay_out(turns: Sequence[PlannedTurn], takes: Sequence[Take]) -> list[_Placed]:
    """Places the takes in time: gaps, overlaps, barge-ins that stop the agent, back-channels."""
    placed: list[_Placed] = []
    clock, last = 0.0, None  # the end of the last turn, back-channels apart
    pending: tuple[PlannedTurn, Take] | None = None
    for turn, take in zip(turns, takes, strict=True):
        if turn.inside is not None:
            pending = (turn, take)
            continue
        start = clock + turn.gap
        if last is not None and last.turn.who == "agent":
            at = turn.barge_in
            if at is not None and last.take.length >= BARGE_IN_MIN_REPLY:
                start = last.start + at * last.take.length
                if last.end - start > turn.stops_after + 0.05:
                    last.cut = start + turn.stops_after
            elif pending is not None and turn.gap > 0:
                _place_inside(placed, last, *pending)
            start = max(start, last.start + 0.1)
        pending = None
        if turn.who == "agent":
            earliest = clock + ANSWER_GAP[0]
            start = take.onset + _on_the_tick(start - take.onset, earliest - take.onset)
        if turn.pause is not None:
            take = insert_pause(take, *turn.pause)
        last = _Placed(turn, take, start)
        placed.append(last)
        clock = last.end
    if pending is not None and last is not None:
        _place_inside(placed, last, *pending)
    return sorted(placed, key=lambda p: p.start)


def _on_the_tick(start: float, earliest: float) -> float:
    """The agent's tick at or before `start` (s), but none before `earliest`.

    The same reply is then the same codes each time, as the agent begins on a tick in a call too.
    """
    ticks = math.floor(start / AGENT_TICK + 1e-6)
    return AGENT_TICK * max(ticks, math.ceil(earliest / AGENT_TICK - 1e-6))


def _place_inside(placed: list[_Placed], agent: _Placed, turn: PlannedTurn, take: Take) -> None:
    """A back-channel only where it begins and ends well inside the agent's turn."""
    start = agent.start + turn.inside * agent.take.length
    if start + take.length + 0.2 < agent.end:
        placed.append(_Placed(turn, take, start))


def _turn_fields(placed: _Placed) -> dict:
    turn, take = placed.turn, placed.take
    shift = placed.start - take.onset
    high = shift + len(take.audio) / SAMPLE_RATE if placed.cut is None else placed.cut
    phones = _moved(take.phones, shift, 0.0, high)
    words = _moved(take.words, shift, 0.0, math.inf)
    text = turn.request.text
    if placed.cut is not None:
        text, words = _cut_text(text, words, placed)
    return {
        "who": turn.who,
        "start": round(placed.start, 4),
        "end": round(placed.end, 4),
        "text": text,
        "emotion": turn.request.emotion,
        "intent": turn.intent,
        "exchange": turn.exchange,
        "voice": turn.request.voice.id,
        "interrupted": placed.cut is not None,
        "phones": phones,
        "words": words,
    }


def _cut_text(text: str, words: list | None, placed: _Placed) -> tuple[str, list | None]:
    """The words that were said in full before the agent stopped."""
    tokens = text.split()
    if words is None:
        share = (placed.cut - placed.start) / placed.take.length
        return " ".join(tokens[: int(len(tokens) * share)]), None
    said = [word for word in words if word[2] <= placed.cut]
    if len(words) == len(tokens):
        return " ".join(tokens[: len(said)]), said
    return " ".join(word[0] for word in said), said


def mix(
    name: str, language: str, plan: Plan, takes: Sequence[Take], babble: Sequence[np.ndarray]
) -> Conversation:
    """Audio of both channels. `babble` are other people's utterances, for the noise of that name.

    The agent's channel is exactly zero wherever it does not speak.
    """
    placed = lay_out(plan.turns, takes)
    seconds = max((p.end for p in placed), default=0.0) + plan.tail
    length = math.ceil(seconds * SAMPLE_RATE / HOP) * HOP
    agent, user = np.zeros(length, np.float32), np.zeros(length, np.float32)
    rng = np.random.default_rng(plan.microphone.seed)
    response = _room(plan.microphone, rng)
    for p in placed:
        audio = p.take.audio
        first = round((p.start - p.take.onset) * SAMPLE_RATE)
        if p.cut is not None:
            audio = _faded(audio[: round(p.cut * SAMPLE_RATE) - first], tail=0.02)
        if p.turn.who == "user" and response is not None:
            audio = _convolve(audio, response)
        _add(agent if p.turn.who == "agent" else user, audio, first)
    user = _through(plan.microphone, user, agent, babble, rng)
    return Conversation(name, language, agent, user, [_turn_fields(p) for p in placed])


def _add(channel: np.ndarray, audio: np.ndarray, first: int) -> None:
    if first < 0:
        audio, first = audio[-first:], 0
    n = min(len(audio), len(channel) - first)
    if n > 0:
        channel[first : first + n] += audio[:n]


def _room(microphone: Microphone, rng: np.random.Generator) -> np.ndarray | None:
    """Impulse response: the direct sound, then noise that falls by 60 dB in `room_seconds`."""
    if microphone.room_seconds is None:
        return None
    n = round(microphone.room_seconds * SAMPLE_RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    tail *= 10 ** (microphone.room_db / 20) / np.sqrt(np.sum(tail**2))
    early = round(rng.uniform(0.002, 0.01) * SAMPLE_RATE)  # the first wall
    return np.concatenate([[1.0], np.zeros(early), tail]).astype(np.float32)


def _convolve(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    n = len(audio) + len(response) - 1
    size = 1 << (n - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(response, size), size)[:n]


def _through(
    microphone: Microphone,
    user: np.ndarray,
    agent: np.ndarray,
    babble: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """Gain, then the agent's echo, then noise at an SNR against the speech, then a narrow line."""
    gain = 10 ** (microphone.gain_db / 20)
    user = user * gain
    loud = np.abs(user) > 1e-4
    level = math.sqrt(float(np.mean(user[loud] ** 2))) if loud.any() else speech.SPEECH_RMS * gain
    if microphone.echo is not None:
        delay, decibels = microphone.echo
        _add(user, agent * 10 ** (decibels / 20), round(delay * SAMPLE_RATE))
    if microphone.noise is not None:
        noise = draw_noise(microphone.noise, len(user), babble, rng)
        user = user + noise * (level * 10 ** (-microphone.snr_db / 20))
    if microphone.band_hz is not None:
        narrow = soxr.resample(user, SAMPLE_RATE, microphone.band_hz)
        wide = soxr.resample(narrow, microphone.band_hz, SAMPLE_RATE)[: len(user)]
        user = np.pad(wide, (0, len(user) - len(wide)))
    peak = float(np.abs(user).max())
    return (user * (0.99 / peak) if peak > 0.99 else user).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _noise_bank(kind: str) -> np.ndarray:
    """A minute of white or pink noise of unit power: drawn once a process, windows of it after."""
    n = 60 * SAMPLE_RATE
    white = np.random.default_rng(0).standard_normal(n)
    if kind == "pink":  # power 1/f, flat below 20 Hz
        spectrum = np.fft.rfft(white)
        hertz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
        white = np.fft.irfft(spectrum / np.sqrt(np.maximum(hertz, 20.0)), n)
    return (white / np.sqrt(np.mean(white**2))).astype(np.float32)


def draw_noise(
    kind: str, length: int, babble: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Noise `[length]` float32 of unit power."""
    if kind == "hum":
        mains = rng.choice((50.0, 60.0)) * np.arange(1, 9)
        levels, phases = rng.uniform(0.1, 1.0, 8) / np.arange(1, 9), rng.uniform(0, 2 * np.pi, 8)
        clock = np.arange(SAMPLE_RATE) / SAMPLE_RATE  # every harmonic repeats after a second
        noise = sum(
            a * np.sin(2 * np.pi * f * clock + p)
            for f, a, p in zip(mains, levels, phases, strict=True)
        )
        noise = np.resize(noise, length)
    elif kind == "babble" and babble:
        noise = np.zeros(length)
        for i in rng.integers(len(babble), size=6):
            voice = np.resize(babble[i], length + len(babble[i]))
            first = int(rng.integers(len(babble[i])))
            noise += voice[first : first + length]
    else:
        bank = _noise_bank("white" if kind == "white" else "pink")
        noise = np.resize(np.roll(bank, int(rng.integers(len(bank)))), length)
    return (noise / max(math.sqrt(float(np.mean(noise**2))), 1e-6)).astype(np.float32)


# ---------------------------------------------------------------------------------- encoding


_CHUNK_FRAMES = 250


@torch.no_grad()
def encode_channels(
    codec: Codec, channels: Sequence[np.ndarray], batch: int = 16, device: str = "cpu"
) -> list[np.ndarray]:
    """Codes uint16 `[F, 8]` of each channel `[T]`, T of any lengths, `F = ceil(T / 480)`.

    Channels of like length go in one batch; a causal codec does not hear the padding behind
    them. Streamed in chunks that stay in the cache: a third faster than in one piece.
    """
    codes: list[np.ndarray] = [np.empty(0)] * len(channels)
    order = sorted(range(len(channels)), key=lambda i: len(channels[i]))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        frames = [math.ceil(len(channels[i]) / HOP) for i in rows]
        audio = torch.zeros(len(rows), 1, frames[-1] * HOP)
        for row, i in enumerate(rows):
            audio[row, 0, : len(channels[i])] = torch.from_numpy(channels[i])
        state = codec.init_encoder_state(len(rows))
        chunks = [chunk.to(device) for chunk in audio.split(_CHUNK_FRAMES * HOP, dim=-1)]
        made = torch.cat([codec.encode_step(c, state, CODEBOOKS) for c in chunks], dim=-1)
        made = made.transpose(1, 2).cpu().numpy().astype(np.uint16)
        for row, i in enumerate(rows):
            codes[i] = made[row, : frames[row]].copy()
    return codes


def encode_rows(rows: Sequence[dict], codec: Codec, device: str = "cpu") -> list[dict]:
    """Rows of a code dataset from those whose `agent` and `user` are audio `[T]`."""
    channels = [row[who] for row in rows for who in ("agent", "user")]
    codes = encode_channels(codec, channels, 16 if device == "cpu" else 64, device)
    return [
        {name: value for name, value in row.items() if name not in ("agent", "user")}
        | {"agent_codes": codes[2 * i], "user_codes": codes[2 * i + 1]}
        for i, row in enumerate(rows)
    ]


# ---------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class Options:
    """What decides the bytes that are made, and where they go.

    On a CPU every worker encodes what it makes; a GPU has one process that encodes for all.
    """

    output_dir: str
    scripts: str
    split: str
    seed: int
    intents: tuple[str, ...] = ()
    archetypes: bool = False
    codec: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Part:
    """A unit of work: at least `seconds` of audio, or `count` conversations."""

    language: str
    index: int
    seconds: float | None = None
    count: int | None = None
    save_audio: int = 0
    cut_short: bool = False  # the last one, of fewer conversations than a part holds

    @property
    def name(self) -> str:
        return f"{self.language}-{self.index:05d}"

    @property
    def file(self) -> str:
        """Its Arrow file, until parts are joined."""
        return f"{self.name}-of-{self.count}.arrow" if self.cut_short else f"{self.name}.arrow"

    @property
    def joined_file(self) -> str:
        first = self.index // FILE_PARTS * FILE_PARTS
        return f"{self.language}-{first:05d}-{first + FILE_PARTS - 1:05d}.arrow"


@dataclass(frozen=True)
class Made:
    """What came of a part; `dropped` says why something was left out.

    `rows` are still to be written: of codes, or of audio that is to be encoded (`encode_rows`).
    """

    part: object
    seconds: float
    count: int
    dropped: tuple[str, ...] = ()
    rows: tuple[dict, ...] = ()


def _within_range(request: speech.Request) -> speech.Request:
    voice, style = request.voice, speech.STYLES[request.emotion]
    limit = MAX_PITCH_RANGE[voice.role] / style.pitch_range
    if voice.engine == "espeak" or voice.pitch_range <= limit:
        return request
    return replace(request, voice=replace(voice, pitch_range=limit))


def say_what_can_be_said(
    synthesize: Callable, requests: Sequence[speech.Request], dropped: list[str]
) -> list[speech.Utterance | None]:
    """Utterances, or None for what an engine could not say, with the reason in `dropped`."""
    try:
        return synthesize(requests)
    except UserError:
        said = []
        for request in requests:
            try:
                said += synthesize([request])
            except UserError as error:
                dropped.append(f"{request.voice.id}: {error}")
                said.append(None)
        return said


class Studio:
    """The engines, the codec and the agent's replies that one process holds."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.synthesizer = speech.Synthesizer()
        self.exchanges = load_scripts(options.scripts)
        self.codec = None
        if options.codec and options.device == "cpu":
            self.codec = Codec.from_checkpoint(options.codec)
        self._replies: dict[tuple[str, str, str], Take | None] = {}
        self._faults: list[str] = []

    def finished(self, rows: Sequence[dict]) -> tuple[dict, ...]:
        """Rows as codes where this process encodes, else as they are."""
        return tuple(encode_rows(rows, self.codec) if self.codec and rows else rows)

    def fault(self, plan: Plan, takes: Sequence[Take | None]) -> str | None:
        """Why a conversation cannot be made; None where all of it was said."""
        for turn, take in zip(plan.turns, takes, strict=True):
            if take is None:
                voice = turn.request.voice.id
                why = (f for f in reversed(self._faults) if f.startswith(f"{voice}: "))
                reason = next(why, f"{voice}: nothing is heard")
                return f"{reason} (line {turn.request.text!r})"
        return None

    def rng(self, part: Part, *numbers: int) -> np.random.Generator:
        where = (SPLITS.index(self.options.split), LANGUAGES.index(part.language), part.index)
        return np.random.default_rng([self.options.seed, *where, *numbers])

    def say(self, requests: Sequence[speech.Request], dropped: list[str]):
        """Utterances, or None for what an engine could not say, with the reason in `dropped`."""
        requests = [_within_range(request) for request in requests]
        return say_what_can_be_said(self.synthesizer.synthesize, requests, dropped)

    def takes(self, requests: Sequence[speech.Request], dropped: list[str]) -> list[Take | None]:
        """Takes of any requests; the agent's are made once."""

        def key(r: speech.Request):
            return (r.voice.id, r.text, r.emotion)

        replies = {key(r): r for r in requests if r.voice.role == "agent"}
        new = {k: r for k, r in replies.items() if k not in self._replies}
        users = [r for r in requests if r.voice.role != "agent"]
        said = self.say([*new.values(), *users], dropped)
        made = [None if utterance is None else cut_take(utterance) for utterance in said]
        self._replies.update(zip(new, made, strict=False))
        mine = iter(made[len(new) :])
        return [self._replies[key(r)] if r.voice.role == "agent" else next(mine) for r in requests]

    def conversations(self, part: Part, dropped: list[str]) -> Iterator[Conversation]:
        """The conversations of a part, synthesised by the dozen."""
        o = self.options
        exchanges = choose_exchanges(
            self.exchanges, part.language, o.split, o.intents, o.archetypes
        )
        users, agent = user_voices(part.language, o.split), speech.voices(part.language, "agent")[0]
        seconds, number = 0.0, 0
        while (part.count is None or number < part.count) and (
            part.seconds is None or seconds < part.seconds
        ):
            size = min(PART_CONVERSATIONS, (part.count or math.inf) - number)
            if part.seconds is not None:  # about 20 s each: do not make many too many
                size = min(size, max(1, round((part.seconds - seconds) / 18)))
            numbers = range(number, number + int(size))
            plans = [plan_conversation(exchanges, users, agent, self.rng(part, n)) for n in numbers]
            takes = iter(self.takes([t.request for p in plans for t in p.turns], self._faults))
            mine = [[next(takes) for _ in plan.turns] for plan in plans]
            others = [
                take.audio
                for plan, row in zip(plans, mine, strict=True)
                for turn, take in zip(plan.turns, row, strict=True)
                if turn.who == "user" and take is not None
            ]
            for n, plan, row in zip(numbers, plans, mine, strict=True):
                name = f"{o.split}-{part.name}-{n:03d}"
                fault = self.fault(plan, row)
                if fault is not None:
                    dropped.append(f"{name}: {fault}")
                    continue
                conversation = mix(name, part.language, plan, row, others)
                seconds += len(conversation.agent) / SAMPLE_RATE
                yield conversation
            number += int(size)
            if number > 100 * PART_CONVERSATIONS:
                raise UserError(f"no {part.language} voice works: {dropped[-1]}")


@functools.lru_cache(maxsize=1)
def _studio(options: Options) -> Studio:
    return Studio(options)


def user_voices(language: str, split: str) -> list[speech.Voice]:
    """The user voices of a split. Validation falls back on training voices, test never does."""
    if split == "validation":
        try:
            return speech.voices(language, "user", "validation")
        except UserError:
            split = "train"
    return speech.voices(language, "user", split)


def make_conversation_part(options: Options, part: Part) -> Made:
    """Makes the conversations of one Arrow file, and keeps the audio of some."""
    studio, dropped = _studio(options), []
    made = list(studio.conversations(part, dropped))
    if part.save_audio:
        _save_audio(Path(options.output_dir), part, made[: part.save_audio])
    rows = [
        {
            "id": c.id,
            "language": c.language,
            "source": "scripts",
            "split": options.split,
            "agent": c.agent,
            "user": c.user,
            "turns": c.turns,
        }
        for c in made
    ]
    seconds = sum(len(c.agent) for c in made) / SAMPLE_RATE
    return Made(part, seconds, len(made), tuple(dropped), studio.finished(rows))


def _save_audio(folder: Path, part: Part, conversations: Sequence[Conversation]) -> None:
    audio = folder / "audio"
    audio.mkdir(exist_ok=True)
    lines = []
    for c in conversations:
        write_audio(audio / f"{c.id}.wav", np.stack([c.agent, c.user], axis=1))
        line = {"id": c.id, "path": f"{c.id}.wav", "agent_channel": 0, "user_channel": 1}
        line |= {"language": c.language, "source": "scripts", "license": "synthetic"}
        lines.append(json.dumps({**line, "turns": c.turns}, ensure_ascii=False))
    write_text(audio / f"{part.name}.lines", "".join(f"{line}\n" for line in lines))


def make_clip_part(options: Options, part: Part) -> Made:
    """Makes and writes one folder of single sentences with its own manifest."""
    studio, dropped = _studio(options), []
    folder = Path(options.output_dir) / part.language / "synthetic" / f"{part.index:05d}"
    building = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    rng, clips, seconds = studio.rng(part, 1), [], 0.0
    draw = _clip_drawer(studio, part.language)
    spoken = {"agent": 0.0, "user": 0.0}
    while seconds < part.seconds:
        # Whoever is behind its share speaks next, a few sentences at a time.
        agent = spoken["agent"] < AGENT_SHARE * (sum(spoken.values()) + 1e-9)
        requests = [draw(agent, rng) for _ in range(6 if agent else 12)]
        for request, said in zip(requests, studio.say(requests, dropped), strict=True):
            length = 0.0 if said is None else len(said.audio) / SAMPLE_RATE
            if length < 0.3:
                continue
            path = building / f"{part.index:05d}-{len(clips):03d}.flac"
            write_audio(path, said.audio)
            clips.append(_clip(path, length, request, said))
            spoken[request.voice.role] += length
            seconds += length
        if not clips and len(dropped) > 200:
            raise UserError(f"no {part.language} voice works: {dropped[-1]}")
    write_manifest(building / MANIFEST, clips)
    try:
        os.replace(building, folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise
        shutil.rmtree(building)  # the same command, run twice at once, made the same bytes first
    return Made(part, seconds, len(clips), tuple(dropped))


def _clip(path: Path, seconds: float, request: speech.Request, said: speech.Utterance) -> Clip:
    phones = None
    if said.phones is not None:
        phones = [[p, round(float(s), 4), round(float(e), 4)] for p, s, e in said.phones]
    voice = request.voice
    return Clip(
        path=path,
        duration=seconds,
        sample_rate=SAMPLE_RATE,
        language=request.language,
        speaker=voice.id,
        text=request.text,
        emotion=request.emotion,
        license=LICENSES.get(voice.engine, voice.engine),
        commercial_ok=True,
        split="train" if voice.role == "agent" else voice.split,
        phones=phones,
    )


def _clip_drawer(studio: Studio, language: str) -> Callable:
    """A function that draws a request: the agent's replies and wordings, or a user's wordings."""
    exchanges = choose_exchanges(studio.exchanges, language, "train")
    everything = [line for exchange in exchanges for line in exchange.lines]
    lines = {who: [n for n in everything if n.who == who] for who in ("user", "agent")}
    agent, users = speech.voices(language, "agent")[0], speech.voices(language, "user", "train")
    try:
        others = speech.voices(language, "user", "validation")
    except UserError:
        others = []

    def draw(is_agent: bool, rng: np.random.Generator) -> speech.Request:
        # Half of the agent's clips are other sentences in its voice, for more of its phones.
        who = "agent" if is_agent and rng.random() < 0.5 else "user"
        line = lines[who][int(rng.integers(len(lines[who])))]
        text = line.texts[int(rng.integers(len(line.texts)))]
        seed, held_out = int(rng.integers(2**31)), rng.random() < VALIDATION_SHARE
        if is_agent:
            emotion = line.emotion if who == "agent" else str(rng.choice(EMOTIONS))
            return speech.Request(text, language, agent, 1.0, emotion, seed)
        voice = draw_voice(others if others and held_out else users, rng)
        return speech.Request(text, language, voice, _uniform(rng, SPEED), line.emotion, seed)

    return draw


def _read_channels(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """(agent, user) float32 `[T]` at 24 kHz. UserError on a file that cannot be used."""
    audio, rate = read_channels(recording.path)
    needed = max(recording.agent_channel, recording.user_channel) + 1
    if audio.shape[1] < needed or not len(audio):
        raise UserError(f"{recording.path}: {audio.shape[1]} channels, {len(audio)} samples")
    audio = audio[:, [recording.agent_channel, recording.user_channel]]
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    seconds = len(audio) / SAMPLE_RATE
    if seconds < AGENT_TICK:
        raise UserError(f"{recording.path}: {seconds * 1000:.1f} ms, shorter than a patch")
    last = max((turn["end"] for turn in recording.turns), default=0.0)
    if last > seconds + TURN_SLACK:
        raise UserError(f"{recording.path}: a turn ends at {last:g} s, the file at {seconds:g} s")
    agent, user = audio.T
    return np.ascontiguousarray(agent), np.ascontiguousarray(user)


@functools.lru_cache(maxsize=1)
def _voice_detector():
    """(function, model) of Silero VAD."""
    try:
        from silero_vad import get_speech_timestamps, load_silero_vad
    except ImportError as error:
        raise UserError("silero-vad is not installed: pip install silero-vad") from error
    return get_speech_timestamps, load_silero_vad()


def _heard_turns(user: np.ndarray) -> list[dict]:
    """Turns without words where a voice detector hears the user: nobody wrote them down."""
    find, detector = _voice_detector()
    audio = torch.from_numpy(soxr.resample(user, SAMPLE_RATE, 16000))
    spans = find(audio, detector, min_silence_duration_ms=600)
    return [
        {"who": "user", "start": s["start"] / 16000, "end": s["end"] / 16000, "text": None}
        for s in spans
    ]


def make_recording(options: Options, recording: Recording) -> Made:
    """The row of one recording; Made without rows where its file cannot be used."""
    try:
        agent, user = _read_channels(recording)
    except UserError as error:
        return Made(recording, 0.0, 0, (str(error),))
    turns = list(recording.turns)
    if not any(turn["who"] == "user" for turn in turns):
        turns += _heard_turns(user)
    seconds = len(agent) / SAMPLE_RATE
    row = {
        "id": recording.id,
        "language": recording.language,
        "source": recording.source,
        "split": recording.split,
        "agent": agent,
        "user": user,
        "turns": [
            {**turn, "end": min(turn["end"], seconds)}
            for turn in sorted(turns, key=lambda turn: turn["start"])
        ],
    }
    return Made(recording, seconds, 1, (), _studio(options).finished([row]))


class RecordingFiles:
    """Arrow files of recordings, each beside a list (`.json`) of what it was made of.

    What is known by id and content, not by place, may grow, shrink and change between two runs.
    Audio that was removed after it was encoded is not missed.
    """

    def __init__(self, folder: Path, recordings: Sequence[Recording], codec: Codec, device: str):
        self._folder, self._codec, self._device = folder, codec, device
        self._pending: list[Made] = []
        self._to_encode: list[dict] = []
        self._rows: list[dict] = []
        self._last = time.monotonic()
        self._files: list[tuple[int, Path]] = []
        self.done: dict[str, str | None] = {}  # key → why it was left out
        lists = {path: read_json(path) for path in sorted(folder.glob("recordings-*.json"))}
        encoded = {
            key.partition(":")[0]: key
            for listed in lists.values()
            for key, reason in listed.items()
            if reason is None
        }
        recordings = [
            replace(r, key=encoded.get(r.key[:-1], r.key)) if r.key.endswith(":") else r
            for r in recordings
        ]
        self._places = {recording.key: i for i, recording in enumerate(recordings)}
        for path in sorted(folder.glob("recording*.arrow")):
            if path.with_suffix(".json") not in lists:  # cut off while it was published
                path.unlink()
        for path, listed in lists.items():
            self._take_over(path.with_suffix(".arrow"), listed)
        self.missing = [r for r in recordings if r.key not in self.done]

    def _take_over(self, arrow: Path, listed: dict[str, str | None]) -> None:
        """Keeps of a file of an earlier run what is still asked for and nowhere else."""
        wanted = {k: r for k, r in listed.items() if k in self._places and k not in self.done}
        if not arrow.exists():
            wanted = {k: reason for k, reason in wanted.items() if reason is not None}
        if wanted != listed:
            new = self._folder / f"recordings-{digest(wanted)}.arrow"
            if None in wanted.values():
                join_arrow(new, [arrow], [k in wanted for k, r in listed.items() if r is None])
            if wanted:
                write_json(new.with_suffix(".json"), wanted)
            for old in (arrow, arrow.with_suffix(".json")):
                old.unlink(missing_ok=True)
            arrow = new
        self._keep(wanted, arrow)

    def _keep(self, listed: dict[str, str | None], arrow: Path) -> None:
        self.done |= listed
        if None in listed.values():
            self._files.append((min(map(self._places.get, listed)), arrow))

    def add(self, made: Made) -> Made:
        """Takes a recording's rows; writes a file when it is full, or long waited for."""
        self._pending.append(replace(made, rows=()))
        self._to_encode += made.rows
        waiting = sum(len(row.get("agent", ())) for row in self._to_encode) / SAMPLE_RATE
        if self._device == "cpu" or waiting >= BATCH_SECONDS:
            self._encode()
        late = time.monotonic() - self._last > FILE_SECONDS
        if late or len(self._pending) >= FILE_RECORDINGS:
            self.flush()
        return replace(made, rows=())

    def _encode(self) -> None:
        heard = self._to_encode and "agent" in self._to_encode[0]
        self._rows += (
            encode_rows(self._to_encode, self._codec, self._device) if heard else self._to_encode
        )
        self._to_encode = []

    def flush(self) -> None:
        """Writes what is there as one file and its list."""
        self._last = time.monotonic()
        if not self._pending:
            return
        self._encode()
        listed = {m.part.key: next(iter(m.dropped), None) for m in self._pending}
        arrow = self._folder / f"recordings-{digest(listed)}.arrow"
        if self._rows:
            write_arrow(arrow, self._rows)
        write_json(arrow.with_suffix(".json"), listed)
        self._keep(listed, arrow)
        self._pending, self._rows = [], []

    @property
    def names(self) -> list[str]:
        return [path.name for _, path in sorted(self._files)]


# ---------------------------------------------------------------------------------- running


def _claim(folder: Path, name: str, settings: dict) -> None:
    """Marks a folder as made with these settings; UserError where it was made with others."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if file.exists():
        known = read_json(file)
        for key, value in json.loads(json.dumps(settings)).items():
            if known.get(key) != value:
                raise UserError(
                    f"{folder}: made with {key} {known.get(key)!r}, not {value!r}; "
                    "give another folder or remove this one"
                )
    else:
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder}: holds other files; give an empty or a new folder")
        write_json(file, settings)


def _report(
    made: Sequence[Made], folder: Path, seconds: float, dropped: Sequence[str] | None = None
) -> None:
    if dropped is None:
        dropped = [reason for m in made for reason in m.dropped]
    if dropped:
        _write_dropped(folder, dropped)
        print(f"{len(dropped)} left out, see {folder / 'dropped.txt'}; first: {dropped[0]}")
    audio = sum(m.seconds for m in made)
    print(
        f"{sum(m.count for m in made)} made, {audio / 3600:.2f} h of audio in {seconds:.0f} s "
        f"({audio / max(seconds, 1e-3):.0f}x real time)"
    )


def make_clips(args: argparse.Namespace) -> None:
    """Job of --clips_dir: single sentences of every language, with a manifest for each."""
    root = Path(args.clips_dir)
    options = Options(str(root), str(args.scripts), "train", args.seed)
    parts, missing = [], []
    size = min(CLIP_PART_SECONDS, args.clips_hours * 3600)
    for language in args.languages:
        folder = root / language / "synthetic"
        _claim(folder, "settings.json", {"seed": args.seed, "part_seconds": size})
        for index in range(math.ceil(args.clips_hours * 3600 / size - 1e-9)):
            parts.append(Part(language, index, seconds=size))
            if not (folder / f"{index:05d}").is_dir():
                missing.append(parts[-1])
    started = time.monotonic()
    work = functools.partial(make_clip_part, options)
    made = list(run_parts(work, missing, args.num_workers, len(parts)))
    for language in args.languages:
        folder = root / language / "synthetic"
        mine = [p for p in parts if p.language == language]
        clips = [c for p in mine for c in read_manifest(folder / f"{p.index:05d}" / MANIFEST)]
        write_manifest(folder / MANIFEST, clips)
        hours, speakers = sum(c.duration for c in clips) / 3600, len({c.speaker for c in clips})
        print(f"{folder}: {len(clips)} clips, {hours:.2f} h, {speakers} voices")
    _report(made, root, time.monotonic() - started)


def make_dataset(args: argparse.Namespace, device: str) -> None:
    """Job of --output_dir: scripted conversations, or those of --conversations, as codes."""
    folder = Path(args.output_dir)
    codec = Codec.from_checkpoint(args.codec)
    config = codec.config
    if config.hop != HOP or config.num_codebooks < CODEBOOKS:
        raise UserError(f"{args.codec}: needs hop {HOP} and {CODEBOOKS} codebooks for the LM")
    if device != "cpu":
        codec = Codec.from_checkpoint(args.codec, device)
    info = {
        "codec_fingerprint": codec.fingerprint,
        "frame_rate": config.frame_rate,
        "codebook_sizes": list(config.codebook_sizes[:CODEBOOKS]),
        "languages": list(args.languages),
        "seed": args.seed,
        "split": args.split,
    }
    options = Options(
        str(folder), str(args.scripts), args.split, args.seed, args.intents,
        args.exchanges == "archetypes", str(args.codec), device,
    )  # fmt: skip
    job = _encode_recordings if args.conversations else _make_scripted
    started = time.monotonic()
    files, made, dropped = job(args, options, codec, info)
    if not files:
        _write_dropped(folder, dropped)
        first = f"; first: {dropped[0]}" if dropped else ""
        raise UserError(f"{folder}: nothing could be made, {len(dropped)} left out{first}")
    finish_dataset(folder, files, info)
    _report(made, folder, time.monotonic() - started, dropped)
    dataset, _ = load_code_dataset(folder, info["codec_fingerprint"])
    print(f"{folder}: {len(dataset)} conversations, codec {info['codec_fingerprint'][:16]}…")


def _encode_recordings(args, options: Options, codec: Codec, info: dict):
    """(files, what was made now, why what is left out is) of --conversations."""
    folder, doubles = Path(options.output_dir), []
    info |= {"source": str(args.conversations), "split": None}
    recordings = read_recordings(args.conversations, args.languages[0], doubles)
    _claim(folder, INFO_FILE, info)
    files = RecordingFiles(folder, recordings, codec, options.device)
    (folder / "state.json").unlink(missing_ok=True)
    try:
        work = functools.partial(make_recording, options)
        results = run_parts(work, files.missing, args.num_workers, len(recordings))
        made = [files.add(result) for result in results]
    finally:
        files.flush()
    return files.names, made, doubles + [reason for reason in files.done.values() if reason]


def _make_scripted(args, options: Options, codec: Codec, info: dict):
    """(files, what was made now, why what is left out is) of scripted conversations."""
    folder, parts = Path(options.output_dir), _conversation_parts(args)
    info |= {"source": "scripts", "intents": list(args.intents), "exchanges": args.exchanges}
    info["part"] = [parts[0].seconds, parts[0].count]
    scripts = load_scripts(args.scripts)
    for language in args.languages:  # say what is wrong before anything is made
        choose_exchanges(scripts, language, args.split, args.intents, options.archetypes)
        user_voices(language, args.split)
        speech.voices(language, "agent")
    _claim(folder, INFO_FILE, info)
    missing = [part for part in parts if not _is_made(folder, part)]
    (folder / "state.json").unlink(missing_ok=True)

    def finish(made: Made) -> Made:
        rows = made.rows
        if rows and "agent" in rows[0]:
            rows = encode_rows(rows, codec, options.device)
        if rows:
            write_arrow(folder / made.part.file, rows)
        return replace(made, rows=())

    work = functools.partial(make_conversation_part, options)
    made = [finish(part) for part in run_parts(work, missing, args.num_workers, len(parts))]
    if (folder / "audio").is_dir():
        lines = sorted((folder / "audio").glob("*.lines"))
        text = "".join(file.read_text(encoding="utf-8") for file in lines)
        write_text(folder / "audio" / MANIFEST, text)
    return _joined(folder, parts), made, [reason for m in made for reason in m.dropped]


def _joined(folder: Path, parts: Sequence[Part]) -> list[str]:
    """Names of the files of these parts, after every FILE_PARTS of them became one."""
    for name, group in itertools.groupby(parts, lambda part: part.joined_file):
        files = [folder / part.file for part in group if not part.cut_short]
        if len(files) == FILE_PARTS and all(file.exists() for file in files):
            join_arrow(folder / name, files)
    names = (
        part.joined_file if (folder / part.joined_file).exists() else part.file for part in parts
    )
    return [name for name in dict.fromkeys(names) if (folder / name).exists()]


def _conversation_parts(args: argparse.Namespace) -> list[Part]:
    parts = []
    for language in args.languages:
        if args.num_conversations:
            total, size = args.num_conversations, min(PART_CONVERSATIONS, args.num_conversations)
            counts = [min(size, total - first) for first in range(0, total, size)]
            mine = [
                Part(language, i, count=count, cut_short=count < size)
                for i, count in enumerate(counts)
            ]
        else:
            size = min(PART_SECONDS, args.hours * 3600)
            count = math.ceil(args.hours * 3600 / size - 1e-9)
            mine = [Part(language, i, seconds=size) for i in range(count)]
        share, more = divmod(args.save_audio, len(mine))
        parts += [replace(p, save_audio=share + (p.index < more)) for p in mine]
    return parts


def _is_made(folder: Path, part: Part) -> bool:
    saved = not part.save_audio or (folder / "audio" / f"{part.name}.lines").exists()
    return saved and any((folder / name).exists() for name in (part.file, part.joined_file))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    hours = number(above=0, high=1e5)
    add("--output_dir", default="data/conversations/scripted", help="folder of the code dataset")
    add("--hours", type=hours, help="of conversation, for each language")
    add("--num_conversations", type=whole(1, 10**7), help="for each language, in place of --hours")
    add("--codec", default="checkpoints/tiny/codec", help="codec checkpoint that encodes")
    add("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN))
    add("--clips_dir", help="make single sentences below this folder instead (data)")
    add("--clips_hours", type=hours, default=1.0, help="of clips, for each language")
    add("--conversations", help="folder of real two-channel recordings to encode instead")
    more = parser.add_argument_group("advanced")
    add = more.add_argument
    add("--scripts", default=str(Path(__file__).resolve().parent / "conversations"))
    add("--intents", default="", help="only these, comma-separated")
    add("--exchanges", choices=("archetypes", "all"), default="all", help="archetypes: *-001")
    add("--split", choices=SPLITS, default="train")
    add("--save_audio", type=whole(0), default=0, help="conversations a language to keep as WAV")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--num_workers", type=whole(0, 512), default=default_workers(), help="processes; 0: none")
    add("--device", default="auto", help="that the codec encodes on")
    args = parser.parse_args(arguments)
    args.intents = tuple(sorted(filter(None, args.intents.split(","))))
    args.languages = list(dict.fromkeys(args.languages))
    if not (args.clips_dir or args.conversations or args.hours or args.num_conversations):
        parser.error("say how much: --hours or --num_conversations")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with contextlib.ExitStack() as held:
        if args.clips_dir:
            for language in args.languages:
                folder = Path(args.clips_dir) / language / "synthetic"
                held.enter_context(only_one(writable_folder(folder, "--clips_dir")))
            make_clips(args)
        else:
            device = str(setup_distributed(args.device).device)
            held.enter_context(only_one(writable_folder(args.output_dir, "--output_dir")))
            make_dataset(args, device)


if __name__ == "__main__":
    run(main)
