"""How well Samvad converses: questions worded as it never heard them, in an unheard voice.

    python evaluate_s2s.py --codec checkpoints/tiny/codec --lm checkpoints/tiny/s2s
    python evaluate_s2s.py --split train              # the bound: wordings and voices of training
    python evaluate_s2s.py --whisper whisper-base     # English replies judged by their words

Held-out wordings of the dialogue scripts are spoken by the test voices, played to many slots of
one `DuplexEngine` at once, not paced, and what the agent said and wrote is judged on the audio
clock, a language at a time:

    answered    the reply begins between 200 ms before and 2 s after the end of the user's turn
    right text  the written reply is nearer to the right one than to any other reply it was
                taught, and within a character error rate of 0.3 of it
    right audio the same by ear: what a judge hears in the reply is nearest to what it hears in
                the right one, and near

Judges of the audio, by `--judge auto` the first of them that can be trusted: a word recogniser
(Whisper, English, given by `--whisper`), a phone recogniser (`hama`), and templates (`dtw`), which
tell whole replies apart by their sound but do not understand a word. Each is judged first, on the
taught replies as the agent's own voice says them at another speed than it learnt them by, `clean`
and through the codec (`coded`), by the very rule it judges by. One that finds fewer than 80 % of
either cannot be trusted; with none, the text's figure stands alone. A recogniser that is deaf to
coded replies says as much about the codec as about itself.

The last line of stdout is the summary as JSON; `--output` also holds every turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from tqdm import tqdm

import hold_out
import speech
from audio import SAMPLE_RATE, AudioError, write_audio
from codec import Codec
from command import (
    ArgumentParser,
    UserError,
    number,
    run,
    whole,
    writable_file,
    writable_folder,
    write_text,
)
from data import SPLITS
from dialogues import SPOKEN, Exchange, choose_exchanges, load_scripts
from duplex import DuplexEngine, load_models
from ledger import (
    QUIET_DBFS,
    ReplyClock,
    Response,
    UserTurn,
    frame_levels,
    percentiles,
    response_latencies,
)
from make_conversations import (
    MAX_PITCH_RANGE,
    Take,
    cut_take,
    draw_voice,
    insert_pause,
    say_what_can_be_said,
    user_voices,
)
from phones import JOINERS, SILENCE, phonemize
from s2s import PAD, S2S, Sampling
from training import setup_distributed

HERE = Path(__file__).resolve().parent
LEAD_IN_SECONDS = 0.5
TAIL_SECONDS = 4.0
AFTER_REPLY_SECONDS = 2.0  # from the end of a reply to the next question, or to the call's end
SPEED = (0.95, 1.05)
HEAD_SECONDS = 0.3  # of the end of a turn over which the heads' opinions are averaged
MAX_TEXT_ERROR = 0.3
MAX_HEARD_ERROR = 0.6  # of a right reply: beyond it, what is nearest is not near
TRUSTED = 0.8  # a judge's least accuracy
JUDGED_REPLIES = 40  # a language at most on which the judge itself is judged
CHECK_SPEED = 0.93
TARGETS = {"english": 0.7, "hindi": 0.5, "telugu": 0.5}
JUDGE_RATE = 16000
HAMA_HINT = "pip install hama"


# ---------------------------------------------------------------------------------- distances


def edit_distance(one: Sequence, two: Sequence) -> int:
    """Levenshtein distance between two sequences of comparable symbols."""
    symbols = {symbol: i for i, symbol in enumerate(dict.fromkeys([*one, *two]))}
    columns = np.array([symbols[s] for s in two], dtype=np.int64)
    steps = np.arange(len(columns) + 1)
    row = steps.copy()
    for i, symbol in enumerate(one, start=1):
        new = np.minimum(row[1:] + 1, row[:-1] + (columns != symbols[symbol]))
        new = np.concatenate([[i], new])
        row = np.minimum.accumulate(new - steps) + steps  # insertions, all at once
    return int(row[-1])


def relative_distance(one: Sequence, two: Sequence) -> float:
    """Edit distance as a share of the longer one, 0 to 1; 0 where both are empty."""
    return edit_distance(one, two) / max(len(one), len(two), 1)


def nearest(
    heard: Sequence, candidates: dict[str, Sequence], distance: Callable = relative_distance
) -> str | None:
    """The key of the candidate nearest to what was heard; None where nothing was."""
    if not len(heard):
        return None
    return min(candidates, key=lambda key: distance(heard, candidates[key]))


def warped_distance(one: np.ndarray, two: np.ndarray) -> float:
    """Dynamic time warping of features `[F, D]` and `[F', D]`: mean distance along the best path.

    Sakoe & Chiba 1978, symmetric steps of weight one, divided by both lengths.
    """
    cost = np.sqrt(((one[:, None] - two[None]) ** 2).mean(-1))  # [F, F']
    row = np.cumsum(cost[0])
    for line in cost[1:]:
        came = np.minimum(row, np.concatenate([[np.inf], row[:-1]]))
        total = np.cumsum(line)
        row = np.minimum.accumulate(came - (total - line)) + total  # steps along the row at once
    return float(row[-1] / sum(cost.shape))


def cepstra(audio: np.ndarray) -> np.ndarray:
    """24 kHz `[T]` → 12 mel cepstra every 20 ms, each to mean 0 and deviation 1, `[F, 12]`."""
    window, hop, size, bands = 600, 480, 1024, 26
    count = max(1, 1 + (len(audio) - window) // hop)
    audio = np.pad(audio, (0, max(0, window - len(audio))))
    frames = np.lib.stride_tricks.sliding_window_view(audio, window)[: count * hop : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), size)) ** 2
    edges = 700 * (10 ** (np.linspace(*2595 * np.log10(1 + np.array([80, 7600]) / 700), bands + 2)
                          / 2595) - 1)  # fmt: skip
    bins = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    levels = np.log(power @ np.maximum(0, np.minimum(rising, falling)).T + 1e-5)  # [F, bands]
    turns = np.pi / bands * np.outer(np.arange(bands) + 0.5, np.arange(1, 13))
    found = levels @ np.cos(turns)
    return (found - found.mean(0)) / (found.std(0) + 1e-6)


def normalise(text: str) -> str:
    """Lower case, composed, letters, vowel signs and digits only, single spaces.

    Apostrophes and joiners (ZWJ, ZWNJ) are within words.
    """
    text = re.sub(f"['’{JOINERS}]", "", unicodedata.normalize("NFC", text).lower())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(kept.split())


def right_text(said: str, reply: str, taught: Sequence[str]) -> bool:
    """Whether `said` is nearer to `reply` than to all others taught, and nearly the same."""
    texts = {normalise(text): normalise(text) for text in (*taught, reply)}
    said, wanted = normalise(said), normalise(reply)
    if edit_distance(said, wanted) > MAX_TEXT_ERROR * len(wanted):
        return False
    return nearest(said, texts) == wanted


def phone_error(heard: Sequence[str], said: Sequence[str]) -> tuple[int, int]:
    """(errors, phones said), repeats of a phone folded in both: frames cannot tell them apart."""
    heard, said = ([p for p, _ in itertools.groupby(phones)] for phones in (heard, said))
    return edit_distance(heard, said), len(said)


# ---------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class AskedTurn:
    """A question inside a call: heard from `start` to `end` (s). `phones` as they were said."""

    start: float
    end: float
    text: str
    emotion: str
    reply: str
    phones: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """The user's side of a call: `audio` `[T]` at 24 kHz and the turns in it."""

    id: str
    language: str
    voice: str
    audio: np.ndarray
    turns: tuple[AskedTurn, ...]


@dataclass(frozen=True)
class Asking:
    """Which questions are asked, and how."""

    split: str = "test"
    intents: tuple[str, ...] = ()
    archetypes: bool = True
    questions_per_exchange: int = 3
    emotions: str = "neutral"
    pause_seconds: float = 0.0
    seed: int = 0


def ask(
    exchanges: Sequence[Exchange],
    language: str,
    asking: Asking,
    say: Callable | None = None,
    left_out: list[str] | None = None,
) -> list[Call]:
    """Speaks every exchange of the language with up to `questions_per_exchange` wordings.

    `say` replaces `Synthesizer().synthesize` in tests. Calls with a question that could not be
    spoken are named in `left_out`. UserError without a voice for the split, or without any call.
    """
    rng = np.random.default_rng([asking.seed, SPOKEN.index(language), SPLITS.index(asking.split)])
    voices = user_voices(language, asking.split)
    plans = []
    chosen = choose_exchanges(exchanges, language, asking.split, asking.intents, asking.archetypes)
    for exchange in chosen:
        wordings = exchange.lines[0].texts
        for first in rng.permutation(len(wordings))[: asking.questions_per_exchange]:
            plans.append((exchange, _requests(exchange, int(first), voices, asking, rng)))
    requests, dropped = [r for _, row in plans for r in row], []
    said = say_what_can_be_said(say or speech.Synthesizer().synthesize, requests, dropped)
    if dropped:
        print(f"{language}: {len(dropped)} questions not spoken, first: {dropped[0]}")
    takes = iter(None if utterance is None else cut_take(utterance) for utterance in said)
    calls = []
    for place, (exchange, requests) in enumerate(plans):
        row = [next(takes) for _ in requests]
        if asking.pause_seconds:
            row = [t and insert_pause(t, 0.5, asking.pause_seconds) for t in row]
        name = f"{exchange.id}-{place}"
        if all(row):
            calls.append(_call(name, exchange, requests, row))
        elif left_out is not None:
            left_out.append(name)
    if not calls:
        raise UserError(f"no {language} question could be spoken in the {asking.split} voices")
    return calls


def _requests(exchange: Exchange, first: int, voices, asking: Asking, rng) -> list[speech.Request]:
    """The user's lines of an exchange in one voice, in ranges of pitch that Praat is safe in."""
    voice = draw_voice(voices, rng)
    speed = float(rng.uniform(*SPEED))
    requests = []
    for place, line in enumerate(exchange.lines[::2]):
        choice = first if place == 0 else int(rng.integers(len(line.texts)))
        emotion = line.emotion if asking.emotions == "scripted" else "neutral"
        limit = MAX_PITCH_RANGE["user"] / speech.STYLES[emotion].pitch_range
        safe = replace(voice, pitch_range=min(voice.pitch_range, limit))
        seed = int(rng.integers(2**31))
        requests.append(
            speech.Request(line.texts[choice], exchange.language, safe, speed, emotion, seed)
        )
    return requests


def _call(name: str, exchange: Exchange, requests, takes: Sequence[Take]) -> Call:
    """Lays the questions out, each after the time that the reply before it needs."""
    pieces, turns, now = [], [], LEAD_IN_SECONDS
    for request, take, answer in zip(requests, takes, exchange.lines[1::2], strict=True):
        reply = answer.texts[0]
        phones = tuple(p for p, _, _ in take.phones or () if p != SILENCE)
        turns.append(
            AskedTurn(
                now + take.onset, now + take.offset, request.text, request.emotion, reply, phones
            )
        )
        pieces.append((now, take.audio))
        wait = _reply_seconds(reply, exchange.language) + AFTER_REPLY_SECONDS
        now += len(take.audio) / SAMPLE_RATE + max(TAIL_SECONDS, wait)
    audio = np.zeros(round(now * SAMPLE_RATE), np.float32)
    for start, piece in pieces:
        first = round(start * SAMPLE_RATE)
        audio[first : first + len(piece)] += piece
    return Call(name, exchange.language, requests[0].voice.id, audio, tuple(turns))


def _reply_seconds(text: str, language: str) -> float:
    """About how long the agent takes to say it: it speaks some twelve phones a second."""
    return 0.3 + len(phonemize(text, language)) / 11.0


def taught_replies(
    exchanges: Sequence[Exchange], language: str, intents: Sequence[str], archetypes: bool
) -> dict[str, str]:
    """Reply → the emotion it is said with, of all exchanges in question; the first one counts."""
    replies: dict[str, str] = {}
    for exchange in choose_exchanges(exchanges, language, "train", intents, archetypes):
        for line in exchange.lines[1::2]:
            replies.setdefault(line.texts[0], line.emotion)
    return replies


# ---------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class Heard:
    """The agent's side of a call, on the input's ticks (`P` patches).

    reply `[T]` float32, text `[P]` token ids, emotion `[P, 8]` and language `[P, 3]`
    probabilities of what the user sounds like, phones `[F]` phone ids of the user, of the frame
    itself (the listening delay is taken out).
    """

    reply: np.ndarray
    text: np.ndarray
    emotion: np.ndarray
    language: np.ndarray
    phones: np.ndarray


class ListeningTap:
    """The LM as the engine wants it, keeping the phones that its listening head hears."""

    def __init__(self, lm: S2S):
        self._lm = lm
        self.phones: np.ndarray | None = None  # [B, p] ids of the last step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def step(self, *arguments, **options):
        out = self._lm.step(*arguments, **options)
        self.phones = out.user_phones.argmax(-1).cpu().numpy()
        return out


def hold_calls(
    codec: Codec,
    lm: S2S,
    calls: Sequence[Call],
    slots: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
    tell_language: bool = False,
) -> list[Heard]:
    """Plays every call to a slot of one engine, as fast as the machine goes; in order of `calls`.

    Calls of like length share a round, so that few slots wait for the longest.
    """
    tap = ListeningTap(lm)
    engine = DuplexEngine(codec, tap, min(slots, len(calls)), sampling, seed)
    order = sorted(range(len(calls)), key=lambda i: len(calls[i].audio))
    rounds = [order[i : i + engine.slots] for i in range(0, len(order), engine.slots)]
    heard: dict[int, Heard] = {}
    patches = [-(-len(call.audio) // engine.patch_samples) for call in calls]
    total = sum(max(patches[i] for i in batch) for batch in rounds)
    with tqdm(total=total, unit="tick", desc="calls", disable=None) as bar:
        for batch in rounds:
            engine.reset()
            for slot, i in enumerate(batch):
                engine.set_voice(slot, language=calls[i].language if tell_language else None)
            got = _hold_round(engine, tap, [calls[i].audio for i in batch], bar)
            heard |= dict(zip(batch, got, strict=True))
    return [heard[i] for i in range(len(calls))]


def _hold_round(engine: DuplexEngine, tap: ListeningTap, audios, bar) -> list[Heard]:
    length = engine.patch_samples
    counts = np.zeros(engine.slots, np.int64)
    counts[: len(audios)] = [-(-len(audio) // length) for audio in audios]
    frames = np.zeros((engine.slots, int(counts.max()), length), np.float32)
    for slot, audio in enumerate(audios):
        frames[slot].reshape(-1)[: len(audio)] = audio
    results, phones = [], []
    for tick in range(frames.shape[1]):
        results.append(engine.tick(frames[:, tick], active=tick < counts))
        phones.append(tap.phones)
        bar.update()
    late = engine.lm.config.listen_delay * engine.frames_per_step
    return [
        Heard(
            reply=np.concatenate([r.audio[slot] for r in results[:count]]),
            text=np.array([r.text[slot] for r in results[:count]]),
            emotion=np.stack([r.user_emotion[slot] for r in results[:count]]),
            language=np.stack([r.language[slot] for r in results[:count]]),
            phones=np.concatenate([p[slot] for p in phones[:count]])[late:],
        )
        for slot, count in enumerate(counts[: len(audios)])
    ]


# ---------------------------------------------------------------------------------- judges


class HamaJudge:
    """Hears phones: the recogniser of the `hama` package. It knows English and Korean; other
    languages come out as the same wrong phones each time, which is enough to tell replies apart.
    """

    name = "hama"
    distance = staticmethod(relative_distance)

    def __init__(self) -> None:
        try:
            from hama import ASRModel
        except ImportError as error:
            raise UserError(f"the phone recogniser is not installed: {HAMA_HINT}") from error
        self._model = ASRModel()

    def hear(self, audio: np.ndarray) -> tuple[str, ...]:
        """24 kHz `[T]` → phones; () for silence."""
        audio = _voiced_part(audio)
        if len(audio) < SAMPLE_RATE // 10:
            return ()
        audio = soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE)
        return tuple(self._model.transcribe_waveform(audio, JUDGE_RATE).phonemes)

    def expects(self, text: str, audio: np.ndarray) -> Sequence[str]:
        """What a reply should sound like, from the agent's own voice `[T]`."""
        return self.hear(audio)


class WhisperJudge:
    """Hears English words: a Whisper folder through faster-whisper; compared letter by letter."""

    name = "whisper"
    distance = staticmethod(relative_distance)

    def __init__(self, folder: Path, threads: int = 1) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise UserError("--whisper needs faster-whisper: pip install faster-whisper") from error
        if not (Path(folder) / "model.bin").is_file():
            raise UserError(f"{folder}: no faster-whisper model (model.bin) there; check --whisper")
        try:
            self._model = WhisperModel(
                str(folder), device="cpu", compute_type="int8", cpu_threads=threads
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{folder}: faster-whisper cannot load it ({error})") from error

    def hear(self, audio: np.ndarray) -> str:
        audio = _voiced_part(audio)
        if len(audio) < SAMPLE_RATE // 10:
            return ""
        audio = soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE)
        segments, _ = self._model.transcribe(audio, language="en", beam_size=1)
        return normalise(" ".join(segment.text for segment in segments))

    def expects(self, text: str, audio: np.ndarray) -> str:
        return normalise(text)


class TemplateJudge:
    """Hears only sounds: the cepstra of a reply, warped onto those of the taught ones, coded."""

    name = "dtw"
    distance = staticmethod(warped_distance)

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def hear(self, audio: np.ndarray) -> np.ndarray:
        """24 kHz `[T]` → `[F, 12]`; no rows for silence."""
        audio = _voiced_part(audio)
        return cepstra(audio) if len(audio) >= SAMPLE_RATE // 10 else np.zeros((0, 12))

    def expects(self, text: str, audio: np.ndarray) -> np.ndarray:
        return self.hear(_through(self._codec, audio))


Judge = HamaJudge | WhisperJudge | TemplateJudge


def _voiced_part(audio: np.ndarray) -> np.ndarray:
    """The stretch that is not quiet, with 0.1 s around it; recognisers invent words in silence."""
    loud = np.flatnonzero(frame_levels(audio) > QUIET_DBFS)
    if not len(loud):
        return audio[:0]
    step, margin = SAMPLE_RATE // 200, SAMPLE_RATE // 10
    return audio[max(0, loud[0] * step - margin) : (loud[-1] + 1) * step + margin]


@dataclass(frozen=True)
class Ear:
    """A judge that has learnt a language's replies, and how far it can be trusted."""

    judge: Judge
    templates: dict[str, Sequence]
    clean: float
    coded: float

    @property
    def trusted(self) -> bool:
        return min(self.clean, self.coded) >= TRUSTED

    def right(self, audio: np.ndarray, reply: str) -> bool | None:
        """Whether what is heard in audio `[T]` is nearest to `reply`, and near.

        None where the agent's own voice could not say the reply, so that nobody knows its sound.
        """
        if reply not in self.templates:
            return None
        return finds(self.judge, self.templates, audio, reply)


def finds(judge: Judge, templates: dict[str, Sequence], audio: np.ndarray, reply: str) -> bool:
    """The rule by which a reply is right by ear, and by which the judge itself is examined."""
    heard = judge.hear(audio)
    if nearest(heard, templates, judge.distance) != reply:
        return False
    return judge.distance(heard, templates[reply]) < MAX_HEARD_ERROR


def choose_judges(
    name: str, language: str, codec: Codec, whisper: Path | None = None, threads: int = 1
) -> list[Judge]:
    """The judges to try in a language, best first; `auto` leaves out what is not installed."""
    if name == "whisper" and whisper is None:
        raise UserError("--judge whisper needs --whisper, the folder of a faster-whisper model")
    judges: list[Judge] = []
    if whisper is not None and language == "english" and name in ("auto", "whisper"):
        judges.append(WhisperJudge(whisper, threads))
    if name in ("auto", "hama"):
        try:
            judges.append(HamaJudge())
        except UserError as error:
            if name == "hama":
                raise
            print(f"{language}: {error}", file=sys.stderr)
    if name in ("auto", "dtw"):
        judges.append(TemplateJudge(codec))
    return judges


def train_ears(
    judges: Sequence[Judge], replies: dict[str, str], language: str, codec: Codec, seed: int = 0
) -> list[Ear]:
    """Lets one judge after the other hear every taught reply in the agent's voice and examines
    it, up to the first that can be trusted, which comes last. Replies that no engine can say are
    told on stderr and known to none."""
    if not judges:
        return []
    taught = _spoken(replies, list(replies), language, 1.0)
    texts, audio = list(taught), list(taught.values())
    chosen = np.sort(np.random.default_rng(seed).permutation(len(texts))[:JUDGED_REPLIES])
    examined = _spoken(replies, [texts[i] for i in chosen], language, CHECK_SPEED)
    asked, clean = list(examined), list(examined.values())
    if len(taught) < len(replies):
        print(f"{language}: {len(replies) - len(taught)} replies could not be spoken for the judge",
              file=sys.stderr)  # fmt: skip
    if not asked:
        return []
    coded = [_through(codec, a) for a in clean]
    ears: list[Ear] = []
    for judge in judges:
        if ears and ears[-1].trusted:
            break
        templates = {t: judge.expects(t, a) for t, a in zip(texts, audio, strict=True)}
        shares = []
        for sounds in (clean, coded):
            found = [finds(judge, templates, a, t) for a, t in zip(sounds, asked, strict=True)]
            shares.append(float(np.mean(found)))
        ears.append(Ear(judge, templates, *shares))
    return ears


def _spoken(replies: dict[str, str], texts: Sequence[str], language: str, speed: float) -> dict:
    """Text → audio `[T]` in the agent's voice, of those that it can say."""
    said = _say_replies(replies, texts, language, speed)
    return {t: audio for t, audio in zip(texts, said, strict=True) if audio is not None}


def _say_replies(replies: dict[str, str], texts, language: str, speed: float) -> list:
    agent = speech.voices(language, "agent")[0]
    requests = [speech.Request(text, language, agent, speed, replies[text]) for text in texts]
    said = say_what_can_be_said(speech.Synthesizer().synthesize, requests, [])
    return [utterance and utterance.audio for utterance in said]


@torch.inference_mode()
def _through(codec: Codec, audio: np.ndarray) -> np.ndarray:
    device = next(codec.parameters()).device
    codes = codec.encode(torch.from_numpy(audio)[None, None].to(device), num_codebooks=8)
    return codec.decode(codes)[0, 0].float().cpu().numpy()


# ---------------------------------------------------------------------------------- judgement


@dataclass(frozen=True)
class Judged:
    """One turn as it went. `text` and `audio`: right or not; None where there was no judge."""

    call: str
    asked: str
    wanted: str
    said: str
    kind: str
    latency: float | None
    text: bool
    audio: bool | None
    emotion: tuple[str, str]  # of the user, as heard and as said
    language: tuple[str, str]
    phone_errors: int
    phones: int


def judge_call(
    call: Call, heard: Heard, lm: S2S, patch_seconds: float, taught: Sequence[str], ear: Ear | None
) -> list[Judged]:
    """Every turn of a call; a reply's share of the call ends where the next question begins."""
    turns = [UserTurn(t.start, t.end, "manifest") for t in call.turns]
    responses = response_latencies(frame_levels(heard.reply), turns, ReplyClock(patch_seconds))
    ends = [*(turn.start for turn in call.turns[1:]), len(heard.text) * patch_seconds]
    return [
        _judge_turn(call, turn, response, end, heard, lm, patch_seconds, taught, ear)
        for turn, response, end in zip(call.turns, responses, ends, strict=True)
    ]


def _judge_turn(
    call: Call,
    turn: AskedTurn,
    response: Response,
    until: float,
    heard: Heard,
    lm: S2S,
    patch_seconds: float,
    taught: Sequence[str],
    ear: Ear | None,
) -> Judged:
    config = lm.config
    first, turn_end, last = (int(s / patch_seconds) for s in (turn.start, turn.end, until))
    ids = [int(i) for i in heard.text[first:last] if i != PAD]
    said = lm.tokenizer.decode(ids).strip() if ids else ""
    # A takeover is heard from its own beginning; otherwise what came earlier is no reply.
    begin = min(turn.end - 0.2, response.onset or np.inf)
    audio = heard.reply[int(begin * SAMPLE_RATE) : int(until * SAMPLE_RATE)]
    span = slice(max(first, turn_end - round(HEAD_SECONDS / patch_seconds)), turn_end + 1)
    emotion = config.emotions[int(heard.emotion[span].mean(0).argmax())]
    language = config.languages[int(heard.language[span].mean(0).argmax())]
    errors, phones = _listening_errors(turn, heard, config)
    return Judged(
        call.id,
        turn.text,
        turn.reply,
        said,
        response.kind,
        response.latency,
        right_text(said, turn.reply, taught),
        ear.right(audio, turn.reply) if ear else None,
        (emotion, turn.emotion),
        (language, call.language),
        errors,
        phones,
    )


def _listening_errors(turn: AskedTurn, heard: Heard, config) -> tuple[int, int]:
    if not config.phones or not turn.phones:
        return 0, 0
    first, last = (int(s * config.frame_rate) for s in (turn.start, turn.end))
    ids = heard.phones[first : last + 1]
    return phone_error(_heard_phones(ids, config.phones), turn.phones)


def _heard_phones(ids: np.ndarray, phones: Sequence[str]) -> list[str]:
    """Frame labels → phones, one a run; silences (id 0) and runs of one frame are dropped."""
    runs = [(i, len(list(run))) for i, run in itertools.groupby(ids.tolist())]
    return [phones[i] for i, length in runs if i != 0 and length > 1]


def _share(values: Sequence[bool]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


@dataclass
class Report:
    """What is said of one language; shares in [0, 1], times in ms, None where unknown."""

    turns: list[Judged] = field(default_factory=list)
    paused: list[Judged] = field(default_factory=list)
    ear: Ear | None = None
    deaf: list[Ear] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # calls that could not be spoken

    def summary(self) -> dict:
        turns = self.turns
        kinds = Counter(t.kind for t in turns)
        times = percentiles([t.latency for t in turns if t.kind == "answered"]) or {}
        trusted = self.ear is not None and self.ear.trusted
        phones = sum(t.phones for t in turns)
        most = Counter(normalise(t.wanted) for t in turns).most_common(1)
        heard = [t.audio for t in turns if t.audio is not None]
        right = [t.text and (t.audio is not False or not trusted) for t in turns]
        in_time = [r and t.kind == "answered" for r, t in zip(right, turns, strict=True)]
        return {
            "turns": len(turns),
            "calls_not_spoken": len(self.left_out),
            "answered": _share([t.kind == "answered" for t in turns]),
            "takeovers": kinds["takeover"],
            "unanswered": kinds["unanswered"],
            "response_p50_ms": times.get("p50"),
            "response_p95_ms": times.get("p95"),
            "right_text": _share([t.text for t in turns]),
            "right_audio": _share(heard) if trusted else None,
            "right_both": _share(right) if trusted else None,
            "right_and_in_time": _share(in_time),
            "majority_answer": round(most[0][1] / len(turns), 4) if turns else None,
            "judge": self.ear.judge.name if self.ear else None,
            "judge_clean": self.ear and round(self.ear.clean, 4),
            "judge_coded": self.ear and round(self.ear.coded, 4),
            "judge_trusted": trusted,
            "judges_not_trusted": {
                e.judge.name: {"clean": round(e.clean, 4), "coded": round(e.coded, 4)}
                for e in (*self.deaf, *([self.ear] if self.ear and not trusted else []))
            },
            "user_emotion": _share([t.emotion[0] == t.emotion[1] for t in turns]),
            "user_language": _share([t.language[0] == t.language[1] for t in turns]),
            "phone_error": round(sum(t.phone_errors for t in turns) / phones, 4)
            if phones
            else None,
            "pause_turns": len(self.paused),
            "pause_takeovers": _share([t.kind == "takeover" for t in self.paused]),
        }


_ROWS = (  # key, label, target
    ("turns", "turns", ""),
    ("calls_not_spoken", "calls that could not be spoken", ""),
    ("answered", "answered, -0.2 to 2 s after the turn", ">= 95 %"),
    ("takeovers", "takeovers", ""),
    ("unanswered", "unanswered", ""),
    ("response_p50_ms", "response p50, ms on the audio clock", ""),
    ("response_p95_ms", "response p95", "< 400"),
    ("right_text", "right reply in text", ""),
    ("right_audio", "right reply in audio", ""),
    ("right_both", "right in both", "70/50/50 %"),
    ("right_and_in_time", "right, and answered in time", ""),
    ("majority_answer", "  majority answer would be right", ""),
    ("judge", "judge of the audio", ""),
    ("judge_clean", "  finds clean replies", ">= 80 %"),
    ("judge_coded", "  finds coded replies", ">= 80 %"),
    ("user_emotion", "user emotion heard", ""),
    ("user_language", "user language heard", ""),
    ("phone_error", "user phone error", ""),
    ("pause_takeovers", "takeovers in a pause of 0.5 s", ""),
)
_PLAIN = (
    "turns", "calls_not_spoken", "takeovers", "unanswered", "response_p50_ms", "response_p95_ms",
    "judge",
)  # fmt: skip


def table(summaries: dict[str, dict]) -> str:
    """Languages side by side, at most 80 columns wide."""
    lines = [f"{'':<36}" + "".join(f"{name:>11}" for name in summaries) + f"{'goal':>11}"]
    for key, label, target in _ROWS:
        cells = "".join(f"{_cell(key, s[key]):>11}" for s in summaries.values())
        lines.append(f"{label:<36}{cells}{target:>11}".rstrip())
    for language, s in summaries.items():
        for name, found in s["judges_not_trusted"].items():
            lines.append(
                f"{language}: {name} is not trusted, it finds {found['clean']:.0%} of clean and"
                f" {found['coded']:.0%} of coded replies"
            )
        if not s["judge_trusted"]:
            lines.append(f"{language}: not judged by ear, the text's figure stands alone")
        elif s["judge"] == TemplateJudge.name:
            lines.append(f"{language}: dtw tells sounds apart, not whether words are understood")
    return "\n".join(lines)


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if key not in _PLAIN:
        return f"{value:.1%}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def goals(language: str, summary: dict) -> dict[str, bool | None]:
    """The project's three criteria of a reply, met or not; None where nothing was measured."""
    right = summary["right_both"] if summary["judge_trusted"] else summary["right_text"]
    p95 = summary["response_p95_ms"]
    return {
        "answered": summary["answered"] is not None and summary["answered"] >= 0.95,
        "response": None if p95 is None else p95 < 400,
        "right": right is not None and right >= TARGETS[language],
    }


# ---------------------------------------------------------------------------------- hold-out


def check_speakers(languages: Sequence[str], split: str = "test", sentences: int = 2) -> dict:
    """How much the held-out voices resemble those of training, by Resemblyzer's embedding.

    Returns per language: the largest cosine between a voice of `split` and a training voice, that
    voice, and for scale the median cosine of one training voice with itself, other sentences said.
    """
    try:
        embed = hold_out.VoiceEmbedder()
    except ImportError as error:
        raise UserError("--check_speakers needs resemblyzer: pip install resemblyzer") from error
    found = {}
    for language in languages:
        held_out, known = user_voices(language, split), user_voices(language, "train")
        voices = [*held_out, *known]
        halves = _speaker_samples(voices, language, sentences)
        vectors = np.stack([[embed(audio, SAMPLE_RATE) for audio in pair] for pair in halves])
        compared = hold_out.compare_voices(*np.split(vectors, [len(held_out)]))
        found[language] = {
            "max_cosine": compared["max_cosine"],
            "nearest_voice": known[compared["nearest"]].id,
            "same_voice_cosine": compared["same_voice_cosine"],
            "training_voices": len(known),
        }
    return found


def _speaker_samples(voices, language: str, sentences: int) -> list[list[np.ndarray]]:
    """Two halves of other sentences a voice, joined: [voices][2] audio `[T]`."""
    scripts = choose_exchanges(load_scripts(HERE / "conversations"), language, "train")
    texts = [max(e.lines[0].texts, key=len) for e in scripts]
    texts = sorted(texts, key=len)[-2 * sentences :]
    limit = MAX_PITCH_RANGE["user"]
    requests = [
        speech.Request(t, language, replace(v, pitch_range=min(v.pitch_range, limit)), seed=i)
        for v in voices
        for i, t in enumerate(texts)
    ]
    said = [u.audio for u in speech.Synthesizer().synthesize(requests)]
    rows = [said[i : i + len(texts)] for i in range(0, len(said), len(texts))]
    return [[np.concatenate(row[half::2]) for half in (0, 1)] for row in rows]


# ---------------------------------------------------------------------------------- running


def evaluate_language(
    codec: Codec,
    lm: S2S,
    exchanges: Sequence[Exchange],
    language: str,
    judges: Sequence[Judge],
    args: argparse.Namespace,
) -> Report:
    """Asks, listens and judges in one language."""
    asking = Asking(
        args.split, args.intents, args.exchanges == "archetypes",
        args.questions_per_exchange, args.emotions, 0.0, args.seed,
    )  # fmt: skip
    report = Report()
    replies = taught_replies(exchanges, language, args.intents, asking.archetypes)
    calls = ask(exchanges, language, asking, left_out=report.left_out)
    seconds = sum(len(call.audio) for call in calls) / SAMPLE_RATE
    print(
        f"{language}: {len(calls)} calls, {seconds:.0f} s, {len(replies)} replies taught, voices "
        f"{', '.join(sorted({call.voice for call in calls})[:3])}",
        flush=True,
    )
    sampling = Sampling(
        args.temperature, Sampling.top_k, args.text_temperature, eagerness=args.eagerness
    )
    patch_seconds = lm.config.frames_per_step / lm.config.frame_rate

    def converse(calls: Sequence[Call], ear: Ear | None) -> list[Judged]:
        heard = hold_calls(codec, lm, calls, args.slots, sampling, args.seed, args.tell_language)
        pairs = tqdm(zip(calls, heard, strict=True), "judging", len(calls), disable=None)
        judged = [
            turn
            for call, one in pairs
            for turn in judge_call(call, one, lm, patch_seconds, list(replies), ear)
        ]
        if args.save_audio:
            save_calls(args.save_audio, calls, heard)
        return judged

    *deaf, ear = train_ears(judges, replies, language, codec, args.seed) or [None]
    trusted = ear if ear and ear.trusted else None  # the others need not listen
    report.ear, report.deaf = ear, deaf
    report.turns = converse(calls, trusted)
    if args.pauses:
        asking = replace(asking, pause_seconds=0.5, questions_per_exchange=1)
        paused = ask(exchanges, language, asking, left_out=report.left_out)
        paused = [replace(call, id=f"{call.id}-pause") for call in paused]
        report.paused = converse(paused, None)
    return report


def save_calls(folder: Path, calls: Sequence[Call], heard: Sequence[Heard]) -> None:
    """Two-channel files, the user left and the agent right, as they were heard.

    What cannot be written is told on stderr: it must not cost the figures.
    """
    for call, one in zip(calls, heard, strict=True):
        both = np.zeros((len(one.reply), 2), np.float32)
        both[: len(call.audio), 0] = call.audio[: len(both)]
        both[:, 1] = one.reply
        try:
            write_audio(folder / f"{call.id.replace('/', '_')}.wav", both)
        except (AudioError, OSError) as error:
            print(f"warning: no more calls are saved: {error}", file=sys.stderr)
            return


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny = HERE / "checkpoints" / "tiny"
    add = parser.add_argument
    add("--codec", type=Path, default=tiny / "codec", help="checkpoint folder [the tiny one]")
    add("--lm", type=Path, default=tiny / "s2s", help="checkpoint folder [the tiny one]")
    add("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN))
    add(
        "--exchanges",
        choices=("archetypes", "all"),
        default="archetypes",
        help="archetypes: the first of each intent (*-001), which the tiny model was taught",
    )
    add("--intents", default="", help="only these, comma-separated")
    add(
        "--split",
        choices=SPLITS,
        default="test",
        help="test: held-out wordings and voice; train: the upper bound",
    )
    add("--questions_per_exchange", type=whole(1), default=3, help="wordings of each [3]")
    add(
        "--judge",
        choices=("auto", "none", "hama", "whisper", "dtw"),
        default="auto",
        help="of replies by ear",
    )
    add("--whisper", type=Path, help="folder of a faster-whisper model, for English")
    add("--output", type=Path, help="file for the summary and every turn, as JSON")
    more = parser.add_argument_group("advanced")
    add = more.add_argument
    add("--scripts", type=Path, default=HERE / "conversations")
    add(
        "--emotions",
        choices=("neutral", "scripted"),
        default="neutral",
        help="how the user sounds; scripted: as in training",
    )
    add("--pauses", action="store_true", help="also ask with a pause of 0.5 s inside the turn")
    add("--tell_language", action="store_true", help="tell the model the call's language")
    add("--check_speakers", action="store_true", help="compare test and training voices, too")
    add("--save_audio", type=Path, help="folder for the calls as two-channel WAV")
    add("--temperature", type=number(0, 100), default=Sampling.temperature, help="of the codes")
    add("--text_temperature", type=number(0, 100), default=Sampling.text_temperature)
    add("--eagerness", type=number(-100, 100), help="dB on its odds of speaking [the model's own]")
    add("--slots", type=whole(1, 4096), default=32, help="calls held at once [32]")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--threads", type=whole(1, 1024), default=1, help="CPU threads [1]")
    args = parser.parse_args(arguments)
    args.intents = tuple(sorted(filter(None, args.intents.split(","))))
    if args.output:
        writable_file(args.output, "--output")
    if args.save_audio:
        writable_folder(args.save_audio, "--save_audio")
    return args


def check_languages(exchanges: Sequence[Exchange], args: argparse.Namespace) -> None:
    """Raises UserError, before an hour of work, for a language that cannot be asked or judged."""
    archetypes = args.exchanges == "archetypes"
    for language in args.languages:
        for split in (args.split, "train"):
            choose_exchanges(exchanges, language, split, args.intents, archetypes)
        user_voices(language, args.split)
        if args.judge != "none":
            speech.voices(language, "agent")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.languages = list(dict.fromkeys(args.languages))
    torch.set_num_threads(args.threads)
    device = setup_distributed(args.device).device
    exchanges = load_scripts(args.scripts)
    check_languages(exchanges, args)
    codec, lm = load_models(args.codec, args.lm, str(device))
    judges = {
        language: choose_judges(args.judge, language, codec, args.whisper, args.threads)
        for language in args.languages
    }
    speakers = check_speakers(args.languages, args.split) if args.check_speakers else {}
    summaries, turns, failed = {}, {}, []
    for language in args.languages:
        try:
            report = evaluate_language(codec, lm, exchanges, language, judges[language], args)
        except UserError as error:  # the others' figures are worth an hour
            failed.append(f"{language}: {error}")
            continue
        summaries[language] = report.summary()
        turns[language] = [vars(t) for t in (*report.turns, *report.paused)]
    if not summaries:
        raise UserError("; ".join(failed))
    print(f"\n{args.split} wordings and voices, {args.exchanges}, {args.emotions} users, "
          f"seed {args.seed}\n{table(summaries)}")  # fmt: skip
    for language, found in speakers.items():
        print(
            f"{language}: {args.split} voices are at most {found['max_cosine']:.2f} like one of "
            f"{found['training_voices']}\n  training voices ({found['nearest_voice']}); one voice "
            f"is {found['same_voice_cosine']:.2f} like itself"
        )
    met = {language: goals(language, s) for language, s in summaries.items()}
    for language, goal in met.items():
        words = {True: "met", False: "not met", None: "not measured"}
        print(f"{language}: " + ", ".join(f"{name} {words[value]}" for name, value in goal.items()))
    settings = {
        "codec": str(args.codec), "lm": str(args.lm), "split": args.split, "seed": args.seed,
        "exchanges": args.exchanges, "intents": list(args.intents), "emotions": args.emotions,
        "eagerness_db": args.eagerness,
    }  # fmt: skip
    result = {**settings, "languages": summaries, "goals": met, "speakers": speakers}
    result["failed"] = failed
    try:
        if args.output:
            text = json.dumps({**result, "turns": turns}, ensure_ascii=False, indent=1)
            write_text(args.output, text)
    finally:  # a full disk must not cost the figures
        print(json.dumps(result, ensure_ascii=False))
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    run(main, resumes=False)
