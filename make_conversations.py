"""Written scripts + speech engines → two-channel conversations → the code dataset of train_s2s.py.

    python make_conversations.py --hours 4 --codec checkpoints/tiny/codec \\
        --output_dir data/conversations/scripted                  # agent and user, as codes
    python make_conversations.py --conversations DIR --codec …    # real two-channel recordings

Everything is drawn from (seed, split, language, part, number): the same command makes the same
bytes, in any number of processes, and goes on where it was stopped.

Training has the scripts' training wordings in training voices; validation the held-out wordings in
validation voices (in training voices where none is installed); test the held-out wordings in test
voices. The agent has one voice a language, in every split.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch

import command
import dialogues
import speech
from audio import HOP, SAMPLE_RATE, read_channels, write_audio
from codec import Codec
from command import ArgumentParser, UserError, number, run, whole
from data import EMOTIONS, LANGUAGES, SPLITS, colour, reverberate, room_response
from dialogues import CODEBOOKS, SPOKEN, Exchange, Recording, choose_exchanges, digest
from dialogues import load_code_dataset as load_code_dataset  # what reads the datasets made here
from takes import Take, draw_voice, faded, insert_pause, make_takes, shift_spans, user_voices
from training import setup_distributed

PART_SECONDS, PART_CONVERSATIONS = 300.0, 16
FILE_SECONDS = 3600.0  # of audio in an Arrow file, which a GPU encodes at a time
WRITE_SECONDS = 120.0  # of work, after which what is made is written: a kill loses no more
TURN_SLACK = 0.5  # seconds by which a written turn may pass the end of its recording

# Timing in seconds, chances in [0, 1].
LEAD_IN, EXCHANGE_GAP, ANSWER_GAP, TAIL = (0.2, 1.5), (0.3, 1.5), (0.08, 0.24), (0.4, 1.5)
AGENT_TICK = 0.04  # a patch of train_s2s.py
IDLE_SECONDS, IDLE_CHANCE = (5.0, 15.0), 0.04  # nobody speaks: the agent must not either
LONG_GAP, LONG_GAP_CHANCE = (3.0, 8.0), 0.08
OVERLAP, OVERLAP_CHANCE = (0.05, 0.2), 0.08  # the user starts on the agent's last syllable
BARGE_IN_CHANCE, BARGE_IN_MIN_REPLY, AGENT_STOPS_AFTER = 0.1, 1.0, (0.1, 0.2)
INNER_PAUSE, PAUSE_CHANCE = (0.3, 0.8), 0.15
BACKCHANNEL_CHANCE = 0.1
# The sound at the user's microphone.
GAIN_DB, SPEED = (-12.0, 4.0), (0.88, 1.14)
SNR_DB, CLEAN_CHANCE = (10.0, 40.0), 0.2
BABBLE_SNR_DB = (15.0, 40.0)  # speech in the noise hides phones more than hiss does
ROOM_CHANCE, BAND_LIMIT_CHANCE, COLOUR_CHANCE = 0.4, 0.2, 0.5
ECHO_DELAY, ECHO_DB, ECHO_CHANCE = (0.05, 0.25), (-45.0, -20.0), 1 / 3
NOISES = ("white", "pink", "hum", "babble")
BACKCHANNELS = {"english": ("Mm-hmm.", "Okay.", "Right.", "I see.", "Yeah."),
                "hindi": ("अच्छा।", "हाँ।", "ठीक है।", "हम्म।"),
                "telugu": ("సరే.", "అలాగా.", "ఊఁ.", "అవునా.")}  # fmt: skip
BACKCHANNEL = "backchannel"  # the intent of such a turn: it asks for no answer


@dataclass(frozen=True)
class PlannedTurn:
    who: str
    request: speech.Request
    intent: str
    exchange: str | None
    gap: float = 0.0  # seconds after the turn before it has ended
    barge_in: float | None = None  # the share of the agent's reply after which the user speaks,
    stops_after: float = 0.15  # and the seconds that the agent then takes to fall silent
    pause: tuple[float, float] | None = None  # place, seconds
    inside: float | None = None  # a back-channel: at this share of the agent's turn


@dataclass(frozen=True)
class Microphone:
    """What the user's channel goes through; times in seconds, levels in dB, None where absent."""

    gain_db: float
    noise: str | None
    snr_db: float
    room_seconds: float | None  # RT60
    room_db: float  # the tail against the direct sound
    coloured: bool  # of another frequency response (`data.colour`)
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
    snr = rng.uniform(*(BABBLE_SNR_DB if noise == "babble" else SNR_DB))
    clean, room, band, echo, coloured = rng.random(5)
    return Microphone(
        gain_db=rng.uniform(*GAIN_DB), noise=None if clean < CLEAN_CHANCE else noise, snr_db=snr,
        room_seconds=rng.uniform(0.1, 0.45) if room < ROOM_CHANCE else None,
        room_db=rng.uniform(-18.0, -6.0), coloured=bool(coloured < COLOUR_CHANCE),
        band_hz=int(rng.choice((8000, 12000, 16000))) if band < BAND_LIMIT_CHANCE else None,
        echo=(rng.uniform(*ECHO_DELAY), rng.uniform(*ECHO_DB)) if echo < ECHO_CHANCE else None,
        seed=int(rng.integers(2**31)))  # fmt: skip


def plan_conversation(exchanges: Sequence[Exchange], users: Sequence[speech.Voice],
                      agent: speech.Voice, rng: np.random.Generator,
                      any_emotion: bool = False) -> Plan:  # fmt: skip
    """Two to four exchanges in one user voice, or (IDLE_CHANCE) a call in which nobody speaks.
    `any_emotion`: each turn in one drawn at random, in place of the script's."""
    voice, speed, microphone = draw_voice(users, rng), rng.uniform(*SPEED), draw_microphone(rng)
    if rng.random() < IDLE_CHANCE:
        return Plan((), rng.uniform(*IDLE_SECONDS), microphone)
    count = min(int(rng.integers(2, 5)), len(exchanges))
    chosen = [exchanges[i] for i in rng.choice(len(exchanges), size=count, replace=False)]
    turns: list[PlannedTurn] = []
    for line, *what in [(line, e.intent, e.id) for e in chosen for line in e.lines]:
        text = line.texts[int(rng.integers(len(line.texts)))]
        emotion = str(rng.choice(EMOTIONS)) if any_emotion else line.emotion
        if line.who == "agent":
            request = speech.Request(text, agent.language, agent, 1.0, emotion)
            turns.append(PlannedTurn("agent", request, *what, rng.uniform(*ANSWER_GAP)))
            turns += _backchannel(voice, speed, rng)
        else:
            seed = int(rng.integers(2**31))
            request = speech.Request(text, voice.language, voice, speed, emotion, seed)
            turns.append(PlannedTurn("user", request, *what, **_timing(rng, first=not turns)))
    return Plan(tuple(turns), rng.uniform(*TAIL), microphone)


def _timing(rng: np.random.Generator, first: bool) -> dict:
    """When a user's turn comes, and the pause in it."""
    long_gap, overlap, barge, pause = rng.random(4)
    gap, barge_in, inner = rng.uniform(*(LEAD_IN if first else EXCHANGE_GAP)), None, None
    if not first and overlap < OVERLAP_CHANCE:
        gap = -rng.uniform(*OVERLAP)
    elif long_gap < LONG_GAP_CHANCE:
        gap = rng.uniform(*LONG_GAP)
    if not first and barge < BARGE_IN_CHANCE:
        barge_in = rng.uniform(0.25, 0.8)
    stops_after = rng.uniform(*AGENT_STOPS_AFTER)
    if pause < PAUSE_CHANCE:
        inner = (rng.uniform(0.2, 0.8), rng.uniform(*INNER_PAUSE))
    return {"gap": gap, "barge_in": barge_in, "stops_after": stops_after, "pause": inner}


def _backchannel(voice: speech.Voice, speed: float, rng: np.random.Generator) -> list[PlannedTurn]:
    drawn, which, place = rng.random(), rng.random(), rng.uniform(0.2, 0.6)
    seed, texts = int(rng.integers(2**31)), BACKCHANNELS[voice.language]
    if drawn >= BACKCHANNEL_CHANCE:
        return []
    text = texts[int(which * len(texts))]
    request = speech.Request(text, voice.language, voice, speed, "neutral", seed)
    return [PlannedTurn("user", request, BACKCHANNEL, None, inside=float(place))]


@dataclass
class _Placed:
    """A take on the clock: its sound lasts from `start` to `end`; an agent may be `cut` (s)."""

    turn: PlannedTurn
    take: Take
    start: float
    cut: float | None = None

    @property
    def end(self) -> float:
        return self.start + self.take.length if self.cut is None else self.cut


def lay_out(turns: Sequence[PlannedTurn], takes: Sequence[Take]) -> list[_Placed]:
    """Places the takes: gaps, overlaps, barge-ins that stop the agent, back-channels."""
    placed: list[_Placed] = []
    clock, last = 0.0, None  # the end of the last turn, back-channels apart
    for turn, take, after in zip(turns, takes, (*turns, None)[1:], strict=True):
        if turn.inside is not None:
            # Well inside the agent's turn, and not where the user speaks before its end.
            start = last.start + turn.inside * last.take.length
            free = after is None or (after.gap > 0 and not _barges_in(after, last))
            if free and start + take.length + 0.2 < last.end:
                placed.append(_Placed(turn, take, start))
            continue
        start = clock + turn.gap
        if last is not None and last.turn.who == "agent":
            if _barges_in(turn, last):
                start = last.start + turn.barge_in * last.take.length
                if last.end - start > turn.stops_after + 0.05:
                    last.cut = start + turn.stops_after
            start = max(start, last.start + 0.1)
        if turn.who == "agent":
            start = _on_the_tick(take, start, clock + ANSWER_GAP[0])
        if turn.pause is not None:
            take = insert_pause(take, *turn.pause)
        last = _Placed(turn, take, start)
        placed.append(last)
        clock = last.end
    return sorted(placed, key=lambda p: p.start)


def _barges_in(turn: PlannedTurn, reply: _Placed) -> bool:
    return turn.barge_in is not None and reply.take.length >= BARGE_IN_MIN_REPLY


def _on_the_tick(take: Take, start: float, earliest: float) -> float:
    """Where a reply's sound starts (s) if the take begins on the agent's tick before `start`, not
    before `earliest`: the same reply is then the same codes each time, as it is in a call."""
    latest = math.floor((start - take.onset) / AGENT_TICK + 1e-6)
    tick = max(latest, math.ceil((earliest - take.onset) / AGENT_TICK - 1e-6))
    return take.onset + AGENT_TICK * tick


def _turn_fields(placed: _Placed) -> dict:
    turn, take, cut, text = placed.turn, placed.take, placed.cut, placed.turn.request.text
    shift = placed.start - take.onset
    high = shift + len(take.audio) / SAMPLE_RATE if cut is None else cut
    words = shift_spans(take.words, shift, 0.0, math.inf)
    if cut is not None:  # what was said in full
        tokens = text.split()
        if words is None:
            said = tokens[: int(len(tokens) * ((cut - placed.start) / take.length))]
        else:
            aligned = len(words) == len(tokens)
            words = [word for word in words if word[2] <= cut]
            said = tokens[: len(words)] if aligned else [word[0] for word in words]
        text = " ".join(said)
    return {"who": turn.who, "start": round(placed.start, 4), "end": round(placed.end, 4),
            "text": text, "emotion": turn.request.emotion, "intent": turn.intent,
            "exchange": turn.exchange, "voice": turn.request.voice.id,
            "interrupted": cut is not None, "phones": shift_spans(take.phones, shift, 0.0, high),
            "words": words}  # fmt: skip


def mix(name: str, language: str, plan: Plan, takes: Sequence[Take], babble: Sequence) -> dict:
    """A row of the dataset, with audio: `agent` (exactly zero where silent) and `user`, float32
    `[T]` of whole frames. `babble`: other people's utterances, `[T]` each."""
    placed = lay_out(plan.turns, takes)
    seconds = max((p.end for p in placed), default=0.0) + plan.tail
    length = math.ceil(seconds * SAMPLE_RATE / HOP) * HOP
    agent, user = np.zeros(length, np.float32), np.zeros(length, np.float32)
    rng = np.random.default_rng(plan.microphone.seed)
    room = plan.microphone.room_seconds
    response = room and room_response(room, plan.microphone.room_db, rng)
    for p in placed:
        audio = p.take.audio
        first = round((p.start - p.take.onset) * SAMPLE_RATE)
        if p.cut is not None:
            audio = faded(audio[: round(p.cut * SAMPLE_RATE) - first], tail=0.02)
        if p.turn.who == "user" and response is not None:
            audio = reverberate(audio, response)
        _add(agent if p.turn.who == "agent" else user, audio, first)
    user = _through(plan.microphone, user, agent, babble, rng)
    turns = [_turn_fields(p) for p in placed]
    return {"id": name, "language": language, "agent": agent, "user": user, "turns": turns}


def _add(channel: np.ndarray, audio: np.ndarray, first: int) -> None:
    audio, first = audio[max(0, -first) :], max(0, first)
    if (n := min(len(audio), len(channel) - first)) > 0:
        channel[first : first + n] += audio[:n]


def _through(microphone: Microphone, user, agent, babble, rng: np.random.Generator) -> np.ndarray:
    """Gain, the agent's echo, noise at an SNR against the speech, a colour, and a narrow line."""
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
    if microphone.coloured:
        user = colour(user, rng)
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
        hertz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
        white = np.fft.irfft(np.fft.rfft(white) / np.sqrt(np.maximum(hertz, 20.0)), n)
    return (white / np.sqrt(np.mean(white**2))).astype(np.float32)


def draw_noise(kind: str, length: int, babble, rng: np.random.Generator) -> np.ndarray:
    """Noise `[length]` float32 of unit power."""
    if kind == "hum":
        mains = rng.choice((50.0, 60.0)) * np.arange(1, 9)
        levels, phases = rng.uniform(0.1, 1.0, 8) / np.arange(1, 9), rng.uniform(0, 2 * np.pi, 8)
        clock = np.arange(SAMPLE_RATE) / SAMPLE_RATE  # every harmonic repeats after a second
        waves = zip(mains, levels, phases, strict=True)
        noise = np.resize(sum(a * np.sin(2 * np.pi * f * clock + p) for f, a, p in waves), length)
    elif kind == "babble" and babble:
        noise = np.zeros(length)
        for i in rng.integers(len(babble), size=6):
            first = int(rng.integers(len(babble[i])))
            noise += np.resize(np.roll(babble[i], -first), length)
    else:
        bank = _noise_bank("white" if kind == "white" else "pink")
        noise = np.resize(np.roll(bank, int(rng.integers(len(bank)))), length)
    return (noise / max(math.sqrt(float(np.mean(noise**2))), 1e-6)).astype(np.float32)


_CHUNK_FRAMES = 250
_codec = functools.lru_cache(maxsize=2)(Codec.from_checkpoint)
scripts = functools.lru_cache(maxsize=1)(dialogues.load_scripts)


@torch.no_grad()
def encode_channels(codec: Codec, channels: Sequence[np.ndarray], batch: int = 16,
                    device: str = "cpu") -> list[np.ndarray]:  # fmt: skip
    """Codes uint16 `[F, 8]` of each channel `[T]`, `F = ceil(T / 480)`. Padding changes no code of
    a causal codec. Chunks that stay in the cache are a third faster than one piece."""
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
        made = made.transpose(1, 2).cpu().numpy().astype(np.uint16)  # [B, F, 8]
        for row, i in enumerate(rows):
            codes[i] = made[row, : frames[row]].copy()
    return codes


def encode_rows(rows: list[dict], args: argparse.Namespace) -> list[dict]:
    """The rows with codes in place of audio `[T]`, if they have not got them already."""
    if not rows or "agent_codes" in rows[0]:
        return rows
    batch, codec = 16 if args.device == "cpu" else 64, _codec(args.codec, args.device)
    channels = [row.pop(who) for row in rows for who in ("agent", "user")]
    codes = iter(encode_channels(codec, channels, batch, args.device))
    return [{**row, "agent_codes": next(codes), "user_codes": next(codes)} for row in rows]


@dataclass(frozen=True)
class ScriptedPart:
    """A unit of work: at least `seconds` of audio, or `count` conversations."""

    language: str
    index: int
    seconds: float = math.inf
    count: int = sys.maxsize


def part_rng(args: argparse.Namespace, part: ScriptedPart, *numbers: int) -> np.random.Generator:
    where = (SPLITS.index(args.split), LANGUAGES.index(part.language), part.index)
    return np.random.default_rng([args.seed, *where, *numbers])


def _cast(args: argparse.Namespace, language: str) -> tuple[list[Exchange], list, speech.Voice]:
    """(exchanges, user voices, the agent's). UserError where there are none."""
    chosen = (args.split, args.intents, args.exchanges == "archetypes")
    exchanges = choose_exchanges(scripts(args.scripts), language, *chosen)
    users = user_voices(language, args.split, args.engines)
    return exchanges, users, speech.voices(language, "agent", engines=args.engines)[0]


def make_scripted(args: argparse.Namespace, part: ScriptedPart) -> tuple[list[dict], list[str]]:
    """(rows of the part with the audio of both channels, why something was left out)."""
    language, cast = part.language, _cast(args, part.language)
    made, dropped, seconds, first = [], [], 0.0, 0
    while first < part.count and seconds < part.seconds:
        size = min(PART_CONVERSATIONS, part.count - first)  # by the dozen, which is faster
        if part.seconds < math.inf:  # about 20 s each: do not make many too many
            size = min(size, max(1, round((part.seconds - seconds) / 18)))
        numbers = range(first, first + size)
        rngs = [part_rng(args, part, n) for n in numbers]
        plans = [plan_conversation(*cast, rng, args.any_emotion) for rng in rngs]
        turns = [turn for plan in plans for turn in plan.turns]
        spoken = list(zip(turns, make_takes([turn.request for turn in turns]), strict=True))
        babble = [t.audio for turn, t in spoken if turn.who == "user" and isinstance(t, Take)]
        rest = iter(spoken)
        for n, plan in zip(numbers, plans, strict=True):
            name = f"{args.split}-{language}-{part.index:05d}-{n:03d}"
            mine = [next(rest) for _ in plan.turns]
            if faults := [(take, turn) for turn, take in mine if isinstance(take, UserError)]:
                error, turn = faults[0]
                dropped.append(f"{name}: {error} (line {turn.request.text!r})")
                continue
            row = mix(name, language, plan, [take for _, take in mine], babble)
            source = dialogues.ANY_EMOTION if args.any_emotion else "scripts"
            made.append({**row, "source": source, "split": args.split})
            seconds += len(row["agent"]) / SAMPLE_RATE
        first += size
        if first > 100 * PART_CONVERSATIONS:
            raise UserError(f"no {language} voice works: {dropped[-1]}")
    for row in made[: args.save_audio if part.index == 0 else 0]:
        path = Path(args.output_dir) / "audio" / f"{row['id']}.wav"
        path.parent.mkdir(exist_ok=True)
        write_audio(path, np.stack([row["agent"], row["user"]], axis=1))
    return made, dropped


def _read_recording(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """(agent, user) float32 `[T]` at 24 kHz. UserError on a file that cannot be used."""
    audio, rate = read_channels(recording.path)
    channels = [recording.agent_channel, recording.user_channel]
    if audio.shape[1] <= max(channels) or not len(audio):
        raise UserError(f"{recording.path}: {audio.shape[1]} channels, {len(audio)} samples")
    audio = audio[:, channels]
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    if (seconds := len(audio) / SAMPLE_RATE) < AGENT_TICK:
        raise UserError(f"{recording.path}: {seconds * 1000:.1f} ms, shorter than a patch")
    last = max((turn["end"] for turn in recording.turns), default=0.0)
    if last > seconds + TURN_SLACK:
        raise UserError(f"{recording.path}: a turn ends at {last:g} s, the file at {seconds:g} s")
    return tuple(np.ascontiguousarray(audio.T))


@functools.lru_cache(maxsize=1)
def _voice_detector() -> Callable:
    import silero_vad  # which sets torch to one thread

    find, model = silero_vad.get_speech_timestamps, silero_vad.load_silero_vad()
    return functools.partial(find, model=model, min_silence_duration_ms=600)


def _detected_turns(user: np.ndarray) -> list[dict]:
    """Turns without text, of a user whom nobody has transcribed."""
    spans = _voice_detector()(torch.from_numpy(soxr.resample(user, SAMPLE_RATE, 16000)))
    times = [{name: span[name] / 16000 for name in ("start", "end")} for span in spans]
    return [{"who": "user", "text": None, **time} for time in times]


def make_recording(args, recording: Recording) -> tuple[list[dict], list[str]]:
    """As `make_scripted`, of one recording; no row where its file cannot be used."""
    try:
        agent, user = _read_recording(recording)
    except UserError as error:
        return [], [str(error)]
    turns, seconds = list(recording.turns), len(agent) / SAMPLE_RATE
    if not any(turn["who"] == "user" for turn in turns):
        turns += _detected_turns(user)
    turns = [{**turn, "end": min(turn["end"], seconds)} for turn in turns]
    turns.sort(key=lambda turn: turn["start"])
    row = {name: getattr(recording, name) for name in ("id", "language", "source", "split")}
    return [{**row, "agent": agent, "user": user, "turns": turns}], []


def _version(part: ScriptedPart | Recording) -> str:
    """Changes with the recording's file; empty where there is none."""
    path = getattr(part, "path", None)
    found = path.stat() if path and path.is_file() else None
    return digest(found.st_size, found.st_mtime_ns) if found else ""


class DatasetFiles:
    """The Arrow files of a dataset, and the list of the parts that each holds (`parts.json`). Known
    by what they are made of, parts come, go and change between runs; lost audio's codes stay."""

    def __init__(self, args: argparse.Namespace, parts: Sequence) -> None:
        self._folder, self._args = Path(args.output_dir), args
        self._places = {digest(part): place for place, part in enumerate(parts)}
        self._versions = {digest(part): _version(part) for part in parts}
        self._files: dict[str, dict] = {}  # name → key of a part → {version, rows, dropped}
        self._list = self._folder / "parts.json"
        listed = command.read_json(self._list, "remove its folder") if self._list.exists() else {}
        for name, held in listed.items():
            wanted = {key: entry for key, entry in held.items() if self._is_wanted(key, entry)}
            if wanted == held:
                self._files[name] = held
                continue
            chosen = [key in wanted for key, entry in held.items() for _ in range(entry["rows"])]
            source = self._folder / name
            self._put(wanted, functools.partial(dialogues.filter_arrow, source, chosen=chosen))
        dialogues.write_json(self._list, self._files)
        for name in listed.keys() - self._files.keys():
            (self._folder / name).unlink(missing_ok=True)
        self.missing = [part for part in parts if digest(part) not in self.done()]
        self._begin()

    def _begin(self) -> None:
        self._new: dict[str, dict] = {}  # parts made and not yet written
        self._rows: list[dict] = []
        self._seconds, self._since = 0.0, time.monotonic()

    def _is_wanted(self, key: str, entry: dict) -> bool:
        version = self._versions.get(key)
        # Without a file, what gave nothing is tried again.
        return entry["rows"] > 0 if version == "" else version == entry["version"]

    def _put(self, parts: dict[str, dict], write: Callable[[Path], None]) -> None:
        name = f"part-{digest(parts)}.arrow"
        if any(entry["rows"] for entry in parts.values()):
            write(self._folder / name)
        if parts:
            self._files[name] = parts

    def add(self, part, rows: list[dict], dropped: list[str], seconds: float) -> None:
        """Takes the rows of a part; writes a file when it is full, or long waited for."""
        key = digest(part)
        self._new[key] = {"version": self._versions[key], "rows": len(rows), "dropped": dropped}
        self._rows += rows
        self._seconds += seconds
        if self._seconds > FILE_SECONDS or time.monotonic() - self._since > WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is there as one file."""
        rows = encode_rows(self._rows, self._args)
        self._put(self._new, lambda path: dialogues.write_arrow(path, rows))
        dialogues.write_json(self._list, self._files)
        self._begin()

    def done(self) -> dict[str, dict]:
        """The parts that are in a file: key → {version, rows, dropped}."""
        return {key: entry for parts in self._files.values() for key, entry in parts.items()}

    def names(self) -> list[str]:
        """The Arrow files, in the order of their first parts."""
        full = [n for n, parts in self._files.items() if any(p["rows"] for p in parts.values())]
        return sorted(full, key=lambda name: min(map(self._places.get, self._files[name])))


def claim(folder: Path, name: str, settings: dict) -> None:
    """Marks a folder as made with these settings; UserError where it was made with others."""
    if not (folder / name).exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder}: holds other files; give an empty or a new folder")
        dialogues.write_json(folder / name, settings)
    known = command.read_json(folder / name, "remove its folder")
    for key, value in json.loads(json.dumps(settings)).items():
        if known.get(key) != value:
            made = f"made with {key} {known.get(key)!r}, not {value!r}"
            raise UserError(f"{folder}: {made}; give another folder or remove this one")


def _work(make: Callable, args: argparse.Namespace, part) -> tuple[list[dict], list[str], float]:
    """(rows, what was left out, seconds of audio) of a part; only a GPU encodes in one process."""
    rows, dropped = make(args, part)
    seconds = sum(len(row["agent"]) for row in rows) / SAMPLE_RATE
    return encode_rows(rows, args) if args.device == "cpu" else rows, dropped, seconds


def make_dataset(args: argparse.Namespace) -> None:
    """Scripted conversations, or those of --conversations, as codes in --output_dir."""
    folder, codec, dropped = Path(args.output_dir), _codec(args.codec, args.device), []
    config, started = codec.config, time.monotonic()
    if config.hop != HOP or config.num_codebooks < CODEBOOKS:
        raise UserError(f"{args.codec}: needs hop {HOP} and {CODEBOOKS} codebooks for the LM")
    if args.conversations:
        make = make_recording
        parts = dialogues.read_recordings(args.conversations, args.languages[0], dropped)
        source = {"source": args.conversations, "split": None}
    else:
        make, parts = make_scripted, _scripted_parts(args)
        named = ("split", "intents", "exchanges", "engines")
        source = {"source": "scripts", **{name: getattr(args, name) for name in named}}
        source["any_emotion"] = args.any_emotion or None
    info = {"codec_fingerprint": codec.fingerprint, "frame_rate": config.frame_rate,
            "codebook_sizes": list(config.codebook_sizes[:CODEBOOKS]), "languages": args.languages,
            "seed": args.seed, **source}  # fmt: skip
    claim(folder, dialogues.INFO_FILE, info)
    files = DatasetFiles(args, parts)
    (folder / "state.json").unlink(missing_ok=True)
    count, audio = 0, 0.0
    try:
        work = functools.partial(_work, make, args)
        results = command.run_parts(work, files.missing, args.num_workers, len(parts))
        for part, (rows, faults, seconds) in zip(files.missing, results, strict=True):
            files.add(part, rows, faults, seconds)
            count, audio = count + len(rows), audio + seconds
    finally:
        files.flush()
    dropped += [why for entry in files.done().values() for why in entry["dropped"]]
    log = "".join(f"{reason}\n" for reason in dropped)
    (folder / "dropped.txt").write_text(log, encoding="utf-8", errors="backslashreplace")
    left_out = f"{len(dropped)} left out; first: {dropped[0]}" if dropped else "none left out"
    if not files.names():
        raise UserError(f"{folder}: nothing could be made, {left_out}")
    dialogues.finish_dataset(folder, files.names(), info)
    if dropped:
        print(f"{left_out}; all in {folder / 'dropped.txt'}")
    took = max(time.monotonic() - started, 1e-3)
    print(f"{count} made, {audio / 3600:.2f} h of audio in {took:.0f} s "
          f"({audio / took:.0f}x real time)")  # fmt: skip
    dataset, _ = dialogues.load_code_dataset(folder, codec.fingerprint)
    print(f"{folder}: {len(dataset)} conversations, codec {codec.fingerprint[:16]}…")


def _scripted_parts(args: argparse.Namespace) -> list[ScriptedPart]:
    """The parts of all languages. UserError where a language has no script or no voice."""
    parts = []
    for language in args.languages:
        _cast(args, language)
        if args.num_conversations:
            firsts = range(0, args.num_conversations, PART_CONVERSATIONS)
            sizes = [{"count": min(PART_CONVERSATIONS, args.num_conversations - n)} for n in firsts]
        else:
            seconds = min(PART_SECONDS, args.hours * 3600)
            sizes = [{"seconds": seconds}] * math.ceil(args.hours * 3600 / seconds - 1e-9)
        parts += [ScriptedPart(language, i, **size) for i, size in enumerate(sizes)]
    return parts


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--output_dir", default="data/conversations/scripted", help="folder of the code dataset")
    add("--hours", type=number(above=0, high=1e5), help="of conversation, for each language")
    add("--num_conversations", type=whole(1, 10**7), help="for each language, in place of --hours")
    add("--codec", default="checkpoints/tiny/codec", help="codec checkpoint that encodes")
    add("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN))
    add("--conversations", help="folder of real two-channel recordings to encode instead")
    add = parser.add_argument_group("advanced").add_argument
    add("--scripts", default=str(Path(__file__).resolve().parent / "conversations"))
    add("--intents", default="", help="only these, comma-separated")
    add("--exchanges", choices=("archetypes", "all"), default="all", help="archetypes: *-001")
    add("--engines", nargs="+", metavar="NAME", help="of speech, the agent's first; default: all")
    add("--any_emotion", action="store_true", help="turns in any, in place of the scripts' own")
    add("--split", choices=SPLITS, default="train")
    add("--save_audio", type=whole(0), default=0, help="write this many a language as WAV as well, "
        "of its first part (a dozen)")  # fmt: skip
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--num_workers", type=whole(0, 512), default=command.default_workers(), help="0: none")
    add("--device", default="auto", help="that the codec encodes on")
    args = parser.parse_args(arguments)
    args.intents = tuple(sorted(filter(None, args.intents.split(","))))
    args.languages = list(dict.fromkeys(args.languages))
    if not (args.conversations or args.hours or args.num_conversations):
        parser.error("say how much: --hours or --num_conversations")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.device = str(setup_distributed(args.device).device)
    with command.only_one(command.writable_folder(args.output_dir, "--output_dir")):
        make_dataset(args)


if __name__ == "__main__":
    run(main)
