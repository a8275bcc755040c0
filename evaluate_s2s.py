"""How well Samvad converses: questions worded as it never heard them, in an unheard voice.

    python evaluate_s2s.py --codec checkpoints/tiny/codec --lm checkpoints/tiny/s2s
    python evaluate_s2s.py --split train              # the bound: wordings and voices of training
    python evaluate_s2s.py --whisper whisper-base     # English replies judged by their words

Held-out wordings of the dialogue scripts are spoken by the test voices and played to many slots of
one `DuplexEngine` at once, not paced. The agent's sound and text are judged on the audio clock, a
language at a time:

    answered    the reply begins between 200 ms before and 2 s after the end of the user's turn
    right text  the written reply is nearer to the right one than to any other reply of the training
                scripts, and within a character error rate of 0.3 of it
    right audio the same of what a recogniser makes of the sound, against what it makes of the right
                reply in the agent's own voice

Recognisers, by `--judge auto` the first that can be trusted: of words (Whisper, English, given by
`--whisper`), of phones (`hama`). Each is examined first by the same rule, on the replies of the
training scripts in the agent's voice at another speed, `clean` and through the codec (`coded`):
with less than 80 % of either it is not trusted, and the text's figure stands alone. A recogniser
that fails on coded replies says as much about the codec as about itself.

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

import numpy as np
import soxr
import torch
from tqdm import tqdm

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
    UserTurn,
    frame_levels,
    percentiles,
    response_latencies,
)
from phones import JOINERS, SILENCE, phonemize
from s2s import PAD, S2S, Sampling
from takes import (
    MAX_PITCH_RANGE,
    Take,
    cut_take,
    draw_voice,
    insert_pause,
    synthesize_or_skip,
    user_voices,
)
from training import setup_distributed

HERE = Path(__file__).resolve().parent
LEAD_IN_SECONDS = 0.5
TAIL_SECONDS = 4.0
AFTER_REPLY_SECONDS = 2.0  # from the end of a reply to the next question, or to the call's end
PAUSE_SECONDS = 0.5  # of `--pauses`
SPEED = (0.95, 1.05)
HEAD_SECONDS = 0.3  # of the end of a turn over which the heads' outputs are averaged
MAX_TEXT_ERROR = 0.3
MAX_AUDIO_ERROR = 0.6  # of a right reply, of the judge's phones or letters
TRUSTED = 0.8  # a judge's least accuracy
JUDGE_REPLIES = 40  # a language at most on which a judge is examined
JUDGE_SPEED = 0.93
TARGETS = {"english": 0.7, "hindi": 0.5, "telugu": 0.5}
JUDGE_RATE = 16000


# ---------------------------------------------------------------------------------- comparisons


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


def nearest(found: Sequence, candidates: dict[str, Sequence]) -> str | None:
    """The key of the candidate nearest to what was found; None where nothing was."""
    if not len(found):
        return None
    return min(candidates, key=lambda key: relative_distance(found, candidates[key]))


def normalise(text: str) -> str:
    """Lower case, composed, letters, vowel signs and digits only, single spaces.

    Apostrophes and joiners (ZWJ, ZWNJ) are within words.
    """
    text = re.sub(f"['’{JOINERS}]", "", unicodedata.normalize("NFC", text).lower())
    letters = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(letters.split())


def right_text(said: str, reply: str, replies: Sequence[str]) -> bool:
    """Whether `said` is nearer to `reply` than to all other replies, and nearly the same."""
    texts = {normalise(text): normalise(text) for text in (*replies, reply)}
    said, wanted = normalise(said), normalise(reply)
    if edit_distance(said, wanted) > MAX_TEXT_ERROR * len(wanted):
        return False
    return nearest(said, texts) == wanted


def phone_error(found: Sequence[str], said: Sequence[str]) -> tuple[int, int]:
    """(errors, phones said), repeats of a phone folded in both: frames cannot tell them apart."""
    found, said = ([p for p, _ in itertools.groupby(phones)] for phones in (found, said))
    return edit_distance(found, said), len(said)


# ---------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class AskedTurn:
    """A question from `start` to `end` (s) of a call, and the reply it wants; its `phones`."""

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


def ask(
    exchanges: Sequence[Exchange],
    language: str,
    args: argparse.Namespace,
    pause_seconds: float = 0.0,
    say: Callable | None = None,
) -> tuple[list[Call], list[str]]:
    """Speaks every exchange of the language with up to `--questions_per_exchange` wordings.

    pause_seconds: inside each question. say: instead of `Synthesizer().synthesize`. Returns the
    calls and the names of those with a question that could not be spoken. UserError without a voice
    for the split, or without any call.
    """
    rng = np.random.default_rng([args.seed, SPOKEN.index(language), SPLITS.index(args.split)])
    voices = user_voices(language, args.split)
    archetypes = args.exchanges == "archetypes"
    plans = []
    for exchange in choose_exchanges(exchanges, language, args.split, args.intents, archetypes):
        wordings = exchange.lines[0].texts
        for first in rng.permutation(len(wordings))[: args.questions_per_exchange]:
            plans.append((exchange, _requests(exchange, int(first), voices, args.emotions, rng)))
    requests = [r for _, row in plans for r in row]
    said = synthesize_or_skip(say or speech.Synthesizer().synthesize, requests)
    dropped = [error for error in said if isinstance(error, UserError)]
    if dropped:
        print(f"{language}: {len(dropped)} questions not spoken, first: {dropped[0]}")
    takes = iter(None if isinstance(u, UserError) else cut_take(u) for u in said)
    calls, left_out = [], []
    for place, (exchange, requests) in enumerate(plans):
        row = [next(takes) for _ in requests]
        if pause_seconds:
            row = [take and insert_pause(take, 0.5, pause_seconds) for take in row]
        name = f"{exchange.id}-{place}" + ("-pause" if pause_seconds else "")
        if all(row):
            calls.append(_lay_out(name, exchange, requests, row))
        else:
            left_out.append(name)
    if not calls:
        raise UserError(f"no {language} question could be spoken in the {args.split} voices")
    return calls, left_out


def _requests(exchange: Exchange, first: int, voices, emotions: str, rng) -> list[speech.Request]:
    """The user's lines of an exchange in one voice, in ranges of pitch that Praat is safe in."""
    voice = draw_voice(voices, rng)
    speed = float(rng.uniform(*SPEED))
    requests = []
    for place, line in enumerate(exchange.lines[::2]):
        choice = first if place == 0 else int(rng.integers(len(line.texts)))
        emotion = line.emotion if emotions == "scripted" else "neutral"
        limit = MAX_PITCH_RANGE["user"] / speech.STYLES[emotion].pitch_range
        safe = replace(voice, pitch_range=min(voice.pitch_range, limit))
        seed = int(rng.integers(2**31))
        text = line.texts[choice]
        requests.append(speech.Request(text, exchange.language, safe, speed, emotion, seed))
    return requests


def _lay_out(name: str, exchange: Exchange, requests, takes: Sequence[Take]) -> Call:
    """The questions one after another, each after the time that the reply before it needs."""
    pieces, turns, now = [], [], LEAD_IN_SECONDS
    for request, take, answer in zip(requests, takes, exchange.lines[1::2], strict=True):
        reply = answer.texts[0]
        phones = tuple(p for p, _, _ in take.phones or () if p != SILENCE)
        span = now + take.onset, now + take.offset
        turns.append(AskedTurn(*span, request.text, request.emotion, reply, phones))
        pieces.append((now, take.audio))
        # The agent speaks some twelve phones a second.
        reply_seconds = 0.3 + len(phonemize(reply, exchange.language)) / 11.0
        wait = max(TAIL_SECONDS, reply_seconds + AFTER_REPLY_SECONDS)
        now += len(take.audio) / SAMPLE_RATE + wait
    audio = np.zeros(round(now * SAMPLE_RATE), np.float32)
    for start, piece in pieces:
        first = round(start * SAMPLE_RATE)
        audio[first : first + len(piece)] += piece
    return Call(name, exchange.language, requests[0].voice.id, audio, tuple(turns))


def training_replies(
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
class AgentSide:
    """The agent's side of a call, on the input's ticks (`P` patches).

    audio `[T]` float32, text `[P]` token ids; recognised of the user: emotion `[P, 8]` and language
    `[P, 3]` probabilities, phones `[F]` ids, of the frame itself (the heads' delay is taken out).
    """

    audio: np.ndarray
    text: np.ndarray
    emotion: np.ndarray
    language: np.ndarray
    phones: np.ndarray


def hold_calls(
    codec: Codec,
    lm: S2S,
    calls: Sequence[Call],
    slots: int = 32,
    sampling: Sampling | None = None,
    seed: int = 0,
    tell_language: bool = False,
) -> list[AgentSide]:
    """Plays every call to a slot of one engine, as fast as the machine goes; in order of `calls`.

    Calls of like length share a round, so that few slots wait for the longest.
    """
    engine = DuplexEngine(codec, lm, min(slots, len(calls)), sampling, seed)
    length = engine.patch_samples
    patches = np.array([-(-len(call.audio) // length) for call in calls])
    order = np.argsort([len(call.audio) for call in calls], kind="stable")
    rounds = [order[i : i + engine.slots] for i in range(0, len(order), engine.slots)]
    replies: dict[int, AgentSide] = {}
    total = sum(int(patches[batch].max()) for batch in rounds)
    with tqdm(total=total, unit="tick", desc="calls", disable=None) as bar:
        for batch in rounds:
            engine.reset()
            counts = np.zeros(engine.slots, np.int64)
            counts[: len(batch)] = patches[batch]
            frames = np.zeros((engine.slots, counts.max(), length), np.float32)
            for slot, i in enumerate(batch):
                frames[slot].reshape(-1)[: len(calls[i].audio)] = calls[i].audio
                engine.set_voice(slot, language=calls[i].language if tell_language else None)
            results = []
            for tick in range(counts.max()):
                results.append(engine.tick(frames[:, tick], active=tick < counts))
                bar.update()
            late = lm.config.listen_delay * engine.frames_per_step
            for slot, i in enumerate(batch):
                replies[i] = _agent_side(results[: patches[i]], slot, late)
    return [replies[i] for i in range(len(calls))]


def _agent_side(results, slot: int, late: int) -> AgentSide:
    return AgentSide(
        audio=np.concatenate([r.audio[slot] for r in results]),
        text=np.array([r.text[slot] for r in results]),
        emotion=np.stack([r.user_emotion[slot] for r in results]),
        language=np.stack([r.language[slot] for r in results]),
        phones=np.concatenate([r.user_phones[slot] for r in results])[late:],
    )


# ---------------------------------------------------------------------------------- judges


@dataclass(frozen=True)
class Judge:
    """A recogniser: audio `[T]` at 16 kHz → phones, or letters; () or "" where there are none.

    `letters`: a right reply is transcribed as its text; else as the agent's own voice saying it.
    """

    name: str
    recognise: Callable[[np.ndarray], Sequence[str]]
    letters: bool

    def transcribe(self, audio: np.ndarray) -> Sequence[str]:
        """24 kHz `[T]` → symbols, of the stretch that is not quiet, with 0.1 s around it.

        Recognisers invent words in silence.
        """
        loud = np.flatnonzero(frame_levels(audio) > QUIET_DBFS)
        if not len(loud):
            return ()
        step, margin = SAMPLE_RATE // 200, SAMPLE_RATE // 10
        audio = audio[max(0, loud[0] * step - margin) : (loud[-1] + 1) * step + margin]
        if len(audio) < margin:
            return ()
        return self.recognise(soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE))


def hama_judge() -> Judge:
    """Phones, by `hama`. It knows English and Korean; other languages come out as the same wrong
    phones each time, which is enough to tell replies apart."""
    try:
        from hama import ASRModel
    except ImportError as error:
        raise UserError("no recogniser to judge the replies' audio: pip install hama") from error
    model = ASRModel()

    def recognise(audio: np.ndarray) -> tuple[str, ...]:
        return tuple(model.transcribe_waveform(audio, JUDGE_RATE).phonemes)

    return Judge("hama", recognise, letters=False)


def whisper_judge(folder: Path, threads: int = 1) -> Judge:
    """English words, by a Whisper folder through faster-whisper; compared letter by letter."""
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise UserError("--whisper needs faster-whisper: pip install faster-whisper") from error
    if not (Path(folder) / "model.bin").is_file():
        raise UserError(f"{folder}: no faster-whisper model (model.bin) there; check --whisper")
    options = {"device": "cpu", "compute_type": "int8", "cpu_threads": threads}
    try:
        model = WhisperModel(str(folder), **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{folder}: faster-whisper cannot load it ({error})") from error

    def recognise(audio: np.ndarray) -> str:
        segments, _ = model.transcribe(audio, language="en", beam_size=1)
        return normalise(" ".join(segment.text for segment in segments))

    return Judge("whisper", recognise, letters=True)


@dataclass(frozen=True)
class ExaminedJudge:
    """A judge that knows a language's replies, and the shares that it finds of them."""

    judge: Judge
    expected: dict[str, Sequence]  # reply → its transcription
    clean: float
    coded: float

    @property
    def trusted(self) -> bool:
        return min(self.clean, self.coded) >= TRUSTED

    @property
    def shares(self) -> dict[str, float]:
        return {"clean": round(self.clean, 4), "coded": round(self.coded, 4)}

    def right(self, audio: np.ndarray, reply: str) -> bool | None:
        """Whether audio `[T]` is transcribed nearest to `reply`, and near.

        None where the agent's own voice could not say the reply: nobody knows its transcription.
        """
        return _finds(self.judge, self.expected, audio, reply) if reply in self.expected else None


def _finds(judge: Judge, expected: dict[str, Sequence], audio: np.ndarray, reply: str) -> bool:
    """The rule by which a reply's audio is right, and by which a judge is examined."""
    found = judge.transcribe(audio)
    if nearest(found, expected) != reply:
        return False
    return relative_distance(found, expected[reply]) < MAX_AUDIO_ERROR


def choose_judges(
    name: str, language: str, whisper: Path | None = None, threads: int = 1
) -> list[Judge]:
    """The judges to try in a language, best first; `auto` leaves out what is not installed."""
    if name == "whisper" and whisper is None:
        raise UserError("--judge whisper needs --whisper, the folder of a faster-whisper model")
    judges: list[Judge] = []
    if whisper is not None and language == "english" and name in ("auto", "whisper"):
        judges.append(whisper_judge(whisper, threads))
    if name in ("auto", "hama"):
        try:
            judges.append(hama_judge())
        except UserError as error:
            if name == "hama":
                raise
            print(f"{language}: {error}", file=sys.stderr)
    return judges


def examine_judges(
    judges: Sequence[Judge], replies: dict[str, str], language: str, codec: Codec, seed: int = 0
) -> list[ExaminedJudge]:
    """Examines one judge after the other, up to the first that can be trusted, which comes last.

    On replies (text → emotion) in the agent's voice; those that no engine can say are counted on
    stderr and known to none.
    """
    known = _in_the_agents_voice(replies, list(replies), language, 1.0) if judges else {}
    chosen = np.sort(np.random.default_rng(seed).permutation(len(known))[:JUDGE_REPLIES])
    texts = [list(known)[i] for i in chosen]
    clean = _in_the_agents_voice(replies, texts, language, JUDGE_SPEED) if texts else {}
    if judges and len(known) < len(replies):
        left_out = len(replies) - len(known)
        print(f"{language}: {left_out} replies could not be spoken for the judge", file=sys.stderr)
    if not clean:
        return []
    coded = {text: _through(codec, audio) for text, audio in clean.items()}
    examined: list[ExaminedJudge] = []
    for judge in judges:
        expected = {
            text: normalise(text) if judge.letters else judge.transcribe(audio)
            for text, audio in known.items()
        }
        found = [
            [_finds(judge, expected, audio, text) for text, audio in sounds.items()]
            for sounds in (clean, coded)
        ]
        examined.append(ExaminedJudge(judge, expected, *(float(np.mean(hits)) for hits in found)))
        if examined[-1].trusted:
            break
    return examined


def _in_the_agents_voice(replies, texts, language: str, speed: float) -> dict[str, np.ndarray]:
    """Text → audio `[T]`, of those `texts` that it can say."""
    agent = speech.voices(language, "agent")[0]
    requests = [speech.Request(text, language, agent, speed, replies[text]) for text in texts]
    said = synthesize_or_skip(speech.Synthesizer().synthesize, requests)
    pairs = zip(texts, said, strict=True)
    return {text: u.audio for text, u in pairs if not isinstance(u, UserError)}


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
    emotion: tuple[str, str]  # of the user, as recognised and as said
    language: tuple[str, str]
    phone_errors: int
    phones: int


def judge_call(
    call: Call, agent: AgentSide, lm: S2S, replies: Sequence[str], judge: ExaminedJudge | None
) -> list[Judged]:
    """Every turn of a call; a reply's share of the call ends where the next question begins."""
    c = lm.config
    turns = [UserTurn(t.start, t.end, "manifest") for t in call.turns]
    clock = ReplyClock(1.0 / c.patch_rate)
    responses = response_latencies(frame_levels(agent.audio), turns, clock)
    ends = [*(turn.start for turn in call.turns[1:]), len(agent.text) / c.patch_rate]
    judged = []
    for turn, response, until in zip(call.turns, responses, ends, strict=True):
        first, turn_end, last = (int(s * c.patch_rate) for s in (turn.start, turn.end, until))
        ids = [int(i) for i in agent.text[first:last] if i != PAD]
        said = lm.tokenizer.decode(ids).strip() if ids else ""
        # A takeover is judged from its own beginning; otherwise what came earlier is no reply.
        begin = min(turn.end - 0.2, response.onset or np.inf)
        audio = agent.audio[int(begin * SAMPLE_RATE) : int(until * SAMPLE_RATE)]
        span = slice(max(first, turn_end - round(HEAD_SECONDS * c.patch_rate)), turn_end + 1)
        errors, phones = 0, 0
        if c.phones and turn.phones:
            frames = slice(int(turn.start * c.frame_rate), int(turn.end * c.frame_rate) + 1)
            errors, phones = phone_error(_phone_runs(agent.phones[frames], c.phones), turn.phones)
        judged.append(
            Judged(
                call=call.id,
                asked=turn.text,
                wanted=turn.reply,
                said=said,
                kind=response.kind,
                latency=response.latency,
                text=right_text(said, turn.reply, replies),
                audio=judge.right(audio, turn.reply) if judge else None,
                emotion=(c.emotions[int(agent.emotion[span].mean(0).argmax())], turn.emotion),
                language=(c.languages[int(agent.language[span].mean(0).argmax())], call.language),
                phone_errors=errors,
                phones=phones,
            )
        )
    return judged


def _phone_runs(ids: np.ndarray, phones: Sequence[str]) -> list[str]:
    """Frame labels → phones, one a run; silences (id 0) and runs of one frame are dropped."""
    runs = [(i, len(list(run))) for i, run in itertools.groupby(ids.tolist())]
    return [phones[i] for i, length in runs if i != 0 and length > 1]


def _share(values: Sequence[bool]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


@dataclass
class Report:
    """What is found of one language; shares in [0, 1], times in ms, None where unknown."""

    turns: list[Judged] = field(default_factory=list)
    paused: list[Judged] = field(default_factory=list)
    judges: list[ExaminedJudge] = field(default_factory=list)  # only the last may be trusted
    left_out: list[str] = field(default_factory=list)  # calls that could not be spoken

    @property
    def judge(self) -> ExaminedJudge | None:
        """The trusted one."""
        return self.judges[-1] if self.judges and self.judges[-1].trusted else None

    def summary(self) -> dict:
        turns, last = self.turns, self.judges[-1] if self.judges else None
        shares = last.shares if last else {}
        kinds = Counter(t.kind for t in turns)
        times = percentiles([t.latency for t in turns if t.kind == "answered"]) or {}
        trusted = self.judge is not None
        errors, phones = sum(t.phone_errors for t in turns), sum(t.phones for t in turns)
        most = Counter(normalise(t.wanted) for t in turns).most_common(1)
        by_audio = [t.audio for t in turns if t.audio is not None]
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
            "right_audio": _share(by_audio) if trusted else None,
            "right_both": _share(right) if trusted else None,
            "right_and_in_time": _share(in_time),
            "majority_answer": round(most[0][1] / len(turns), 4) if turns else None,
            "judge": last and last.judge.name,
            "judge_clean": shares.get("clean"),
            "judge_coded": shares.get("coded"),
            "judge_trusted": trusted,
            "judges_not_trusted": {
                one.judge.name: one.shares for one in self.judges if one is not self.judge
            },
            "user_emotion": _share([t.emotion[0] == t.emotion[1] for t in turns]),
            "user_language": _share([t.language[0] == t.language[1] for t in turns]),
            "phone_error": round(errors / phones, 4) if phones else None,
            "pause_turns": len(self.paused),
            "pause_takeovers": _share([t.kind == "takeover" for t in self.paused]),
        }


_ROWS = (  # key, label, goal
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
    ("user_emotion", "user emotion recognised", ""),
    ("user_language", "user language recognised", ""),
    ("phone_error", "user phone error", ""),
    ("pause_takeovers", "takeovers in a pause of 0.5 s", ""),
)


def table(summaries: dict[str, dict]) -> str:
    """Languages side by side, at most 80 columns wide."""
    lines = [f"{'':<36}" + "".join(f"{name:>11}" for name in summaries) + f"{'goal':>11}"]
    for key, label, goal in _ROWS:
        cells = "".join(f"{_cell(key, s[key]):>11}" for s in summaries.values())
        lines.append(f"{label:<36}{cells}{goal:>11}".rstrip())
    for language, s in summaries.items():
        for name, found in s["judges_not_trusted"].items():
            lines.append(
                f"{language}: {name} is not trusted, it finds {found['clean']:.0%} of clean and"
                f" {found['coded']:.0%} of coded replies"
            )
        if not s["judge_trusted"]:
            lines.append(f"{language}: no judge of the audio, the text's figure stands alone")
    return "\n".join(lines)


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, (str, int)):
        return str(value)
    return f"{value:.0f}" if key.endswith("_ms") else f"{value:.1%}"


def goals(language: str, summary: dict) -> dict[str, bool | None]:
    """The project's three criteria of a reply, met or not; None where nothing was measured."""
    right = summary["right_both"] if summary["judge_trusted"] else summary["right_text"]
    p95 = summary["response_p95_ms"]
    return {
        "answered": summary["answered"] is not None and summary["answered"] >= 0.95,
        "response": None if p95 is None else p95 < 400,
        "right": right is not None and right >= TARGETS[language],
    }


# ---------------------------------------------------------------------------------- running


def evaluate_language(
    codec: Codec,
    lm: S2S,
    exchanges: Sequence[Exchange],
    language: str,
    judges: Sequence[Judge],
    args: argparse.Namespace,
) -> Report:
    """Asks, holds the calls and judges them, in one language."""
    archetypes = args.exchanges == "archetypes"
    replies = training_replies(exchanges, language, args.intents, archetypes)
    calls, left_out = ask(exchanges, language, args)
    seconds = sum(len(call.audio) for call in calls) / SAMPLE_RATE
    print(
        f"{language}: {len(calls)} calls, {seconds:.0f} s, {len(replies)} replies in training,"
        f" voices {', '.join(sorted({call.voice for call in calls})[:3])}",
        flush=True,
    )
    sampling = Sampling(
        args.temperature, Sampling.top_k, args.text_temperature, eagerness=args.eagerness
    )

    def converse(calls: Sequence[Call], judge: ExaminedJudge | None) -> list[Judged]:
        agents = hold_calls(codec, lm, calls, args.slots, sampling, args.seed, args.tell_language)
        pairs = tqdm(zip(calls, agents, strict=True), "judging", len(calls), disable=None)
        judged = [t for pair in pairs for t in judge_call(*pair, lm, list(replies), judge)]
        if args.save_audio:
            save_calls(args.save_audio, calls, agents)
        return judged

    report = Report(left_out=left_out)
    report.judges = examine_judges(judges, replies, language, codec, args.seed)
    report.turns = converse(calls, report.judge)
    if args.pauses:
        once = argparse.Namespace(**{**vars(args), "questions_per_exchange": 1})
        paused, left_out = ask(exchanges, language, once, PAUSE_SECONDS)
        report.left_out += left_out
        report.paused = converse(paused, None)
    return report


def save_calls(folder: Path, calls: Sequence[Call], agents: Sequence[AgentSide]) -> None:
    """Two-channel files, the user left and the agent right.

    What cannot be written is a warning on stderr: it must not cost the figures.
    """
    for call, agent in zip(calls, agents, strict=True):
        both = np.zeros((len(agent.audio), 2), np.float32)
        both[: len(call.audio), 0] = call.audio[: len(both)]
        both[:, 1] = agent.audio
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
    add("--exchanges", choices=("archetypes", "all"), default="archetypes",
        help="archetypes: the first of each intent (*-001), those of the tiny model")  # fmt: skip
    add("--intents", default="", help="only these, comma-separated")
    add("--split", choices=SPLITS, default="test",
        help="test: held-out wordings and voice; train: the upper bound")  # fmt: skip
    add("--questions_per_exchange", type=whole(1), default=3, help="wordings of each [3]")
    add("--judge", choices=("auto", "none", "hama", "whisper"), default="auto",
        help="of the replies' audio")  # fmt: skip
    add("--whisper", type=Path, help="folder of a faster-whisper model, for English")
    add("--output", type=Path, help="file for the summary and every turn, as JSON")
    add = parser.add_argument_group("advanced").add_argument
    add("--scripts", type=Path, default=HERE / "conversations")
    add("--emotions", choices=("neutral", "scripted"), default="neutral",
        help="how the user sounds; scripted: as in training")  # fmt: skip
    add("--pauses", action="store_true", help="also ask with a pause of 0.5 s inside the turn")
    add("--tell_language", action="store_true", help="tell the model the call's language")
    add("--save_audio", type=Path, help="folder for the calls as two-channel WAV")
    add("--temperature", type=number(0, 100), default=Sampling.temperature, help="of the codes")
    add("--text_temperature", type=number(0, 100), default=Sampling.text_temperature)
    add("--eagerness", type=number(-100, 100), help="dB on its odds of speaking [the model's own]")
    add("--slots", type=whole(1, 4096), default=32, help="calls held at once [32]")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--threads", type=whole(1, 1024), default=1, help="CPU threads [1]")
    args = parser.parse_args(arguments)
    args.languages = list(dict.fromkeys(args.languages))
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
    torch.set_num_threads(args.threads)
    device = setup_distributed(args.device).device
    exchanges = load_scripts(args.scripts)
    check_languages(exchanges, args)
    codec, lm = load_models(args.codec, args.lm, str(device))
    judges = {
        language: choose_judges(args.judge, language, args.whisper, args.threads)
        for language in args.languages
    }
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
    met = {language: goals(language, s) for language, s in summaries.items()}
    for language, goal in met.items():
        words = {True: "met", False: "not met", None: "not measured"}
        print(f"{language}: " + ", ".join(f"{name} {words[value]}" for name, value in goal.items()))
    result = {
        "codec": str(args.codec), "lm": str(args.lm), "split": args.split, "seed": args.seed,
        "exchanges": args.exchanges, "intents": list(args.intents), "emotions": args.emotions,
        "eagerness_db": args.eagerness, "languages": summaries, "goals": met, "failed": failed,
    }  # fmt: skip
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
