"""How well Samvad converses: questions in wordings and a voice that training did not have.

    python evaluate_s2s.py --codec checkpoints/tiny/codec --lm checkpoints/tiny/s2s
    python evaluate_s2s.py --split train              # the bound: wordings and voices of training

Held-out wordings of the dialogue scripts are spoken by the test voices and played to many slots of
one `DuplexEngine` at once, not paced. Replies are judged on the audio clock, a language at a time:

    answered     the reply begins between 200 ms before and 2 s after the end of the user's turn
    right_text   the written reply is nearer to the right one than to any other reply of the
                 training scripts, and within a character error rate of 0.3 of it
    right_audio  the same of the phones that a recogniser (hama) finds in the sound, against those
                 that it finds in the right reply in the agent's own voice

A recogniser that finds less than 80 % of replies of the training scripts by the same rule, in the
agent's voice at another speed, clean or through the codec, is not trusted: the text's figure stands
alone. The goals: 95 % answered, 95 % of responses within 400 ms, and right 70 % in English, 50 % in
Hindi and Telugu. The last line of stdout is the summary as JSON; `--output` also holds every turn.

`--emotion` measures instead, with `--output x.json` a picture x.png of the confusions:

    detection  the emotion told at the end of utterances in STYLES_ASKED, of all eight and of these
               alone (of_asked); the same after_neutral, a neutral sentence of the caller; what a
               judge of prosody tells; and of neutral utterances by voices an octave apart the
               shares told neutral, and told happy or surprised (excited)
    empathy    sad and glad readings of the same words: pairs; both answered in words; different:
               the nearest written replies are two; fitting: a reading's nearest reply is one
               written for its emotion, within an error rate of 0.3; exact: the pair's very reply
    words      fitting and exact, of words that are sad or glad by themselves in a neutral voice
    control    replies sound as they were told to, says a judge of prosody; its own accuracy
    effect     with `--before LM`: answered, right and response p95 of both on the same calls
"""

import argparse
import importlib.util
import itertools
import json
import re
import sys
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soxr
import torch
from torchaudio.functional import edit_distance
from tqdm import tqdm

import emotion_figures
import ledger
import praat
import speech
from audio import SAMPLE_RATE
from codec import Codec
from command import ArgumentParser, UserError, needed, number, run, whole, writable_file, write_text
from data import SPLITS
from dialogues import SPOKEN, Exchange, choose_exchanges, load_scripts
from duplex import DuplexEngine, EmotionEstimate, load_models
from emotion_figures import Told, accuracies, share
from emotions import GAIN_DB
from phones import JOINERS, phonemize
from prosody import ProsodyJudge
from s2s import PAD, S2S, Sampling
from takes import Take, draw_voice, make_takes, speak, user_voices
from training import setup_distributed

HERE = Path(__file__).resolve().parent
LEAD_IN_SECONDS, TAIL_SECONDS = 0.5, 4.0
AFTER_REPLY_SECONDS = 2.0  # from the end of a reply to the next question, or to the call's end
SPEED = (0.95, 1.05)
HEAD_SECONDS = 0.3  # of the end of a turn over which the heads' outputs are averaged
MAX_TEXT_ERROR, MAX_AUDIO_ERROR = 0.3, 0.6  # of a right reply: letters, the judge's phones
TRUSTED = 0.8  # a judge's least accuracy
JUDGE_REPLIES = 40  # a language at most on which a judge is examined
JUDGE_SPEED, JUDGE_RATE = 0.93, 16000
OCTAVE = {"low": (1.0, 110.0), "high": (1.15, 220.0)}  # size of the head and median pitch (Hz)
WORDS_ALONE = ("comfort", "good_news")  # intents whose words say what is felt
STYLES_ASKED = ("neutral", "happy", "sad", "angry", "calm")  # of users and of the agent
ACCURACIES = ("unweighted_accuracy", "unweighted_accuracy_of_asked")
TARGETS = {"english": 0.7, "hindi": 0.5, "telugu": 0.5}


def nearest(found: Sequence, candidates: dict[str, Sequence]) -> tuple[str | None, float]:
    """(key of the nearest candidate, edit distance as a share of the longer); (None, 1) if none."""

    def distance(key: str) -> float:
        return edit_distance(found, candidates[key]) / max(len(found), len(candidates[key]))

    best = min(candidates, key=distance) if len(found) else None
    return best, 1.0 if best is None else distance(best)


def normalise(text: str) -> str:
    """Lower case, composed; letters, marks and digits alone; ', ZWJ and ZWNJ are within words."""
    text = re.sub(f"['’{JOINERS}]", "", unicodedata.normalize("NFC", text).lower())
    letters = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(letters.split())


def right_text(said: str, reply: str, replies: Sequence[str]) -> bool:
    """Whether `said` is nearer to `reply` than to all other replies, and nearly the same."""
    said, wanted, *others = map(normalise, (said, reply, *replies))
    near = edit_distance(said, wanted) <= MAX_TEXT_ERROR * len(wanted)
    return near and nearest(said, {text: text for text in (*others, wanted)})[0] == wanted


@dataclass(frozen=True)
class AskedTurn:
    """A question from `start` to `end` (s) of a call, and the reply it wants."""

    start: float
    end: float
    text: str
    emotion: str
    reply: str


@dataclass(frozen=True)
class Call:
    """The user's side of a call: `audio` `[T]` at 24 kHz and the turns in it."""

    id: str
    language: str
    audio: np.ndarray
    turns: tuple[AskedTurn, ...]
    agent_emotion: str | None = None
    speaker: str = ""


def ask(exchanges: Sequence[Exchange], language: str, args) -> tuple[list[Call], list[str]]:
    """A call for each of up to `--questions_per_exchange` wordings of an exchange, and why others
    could not be spoken. UserError without a voice for the split, or without any call."""
    rng = np.random.default_rng([args.seed, SPOKEN.index(language), SPLITS.index(args.split)])
    voices, plans = user_voices(language, args.split, args.engines), []
    for one in choose_exchanges(exchanges, language, args.split, args.intents, args.archetypes):
        for first in rng.permutation(len(one.lines[0].texts))[: args.questions_per_exchange]:
            plans.append((one, _questions(one, first, draw_voice(voices, rng), args.emotions, rng)))
    takes = iter(make_takes([request for _, requests in plans for request in requests]))
    calls, left_out = [], []
    for place, (exchange, requests) in enumerate(plans):
        mine = list(itertools.islice(takes, len(requests)))
        if faults := [str(take) for take in mine if isinstance(take, UserError)]:
            left_out.append(faults[0])
        else:
            calls.append(_lay_out(f"{exchange.id}-{place}", exchange, requests, mine))
    if left_out:
        print(f"{language}: {len(left_out)} calls not spoken, first: {left_out[0]}")
    if not calls:
        raise UserError(f"no {language} question could be spoken in the {args.split} voices")
    return calls, left_out


def _questions(exchange: Exchange, first: int, voice, emotions: str, rng) -> list[speech.Request]:
    """The user's lines of an exchange, the first one in wording `first`."""
    speed, requests = float(rng.uniform(*SPEED)), []
    for line in exchange.lines[::2]:
        text = line.texts[int(rng.integers(len(line.texts))) if requests else first]
        emotion = line.emotion if emotions == "scripted" else "neutral"
        seed = int(rng.integers(2**31))
        requests.append(speech.Request(text, exchange.language, voice, speed, emotion, seed))
    return requests


def _lay_out(name: str, exchange: Exchange, requests, takes: Sequence[Take]) -> Call:
    """The questions one after another, each after the time that the reply before it needs."""
    pieces, turns, now = [], [], LEAD_IN_SECONDS
    for request, take, answer in zip(requests, takes, exchange.lines[1::2], strict=True):
        reply, span = answer.texts[0], (now + take.onset, now + take.offset)
        turns.append(AskedTurn(*span, request.text, request.emotion, reply))
        pieces.append((round(now * SAMPLE_RATE), take.audio))
        # The agent speaks some twelve phones a second.
        reply_seconds = 0.3 + len(phonemize(reply, exchange.language)) / 11.0
        wait = max(TAIL_SECONDS, reply_seconds + AFTER_REPLY_SECONDS)
        now += len(take.audio) / SAMPLE_RATE + wait
    audio = np.zeros(round(now * SAMPLE_RATE), np.float32)
    for first, piece in pieces:
        audio[first : first + len(piece)] += piece
    return Call(name, exchange.language, audio, tuple(turns))


def training_replies(exchanges: Sequence[Exchange], language: str, args) -> dict[str, str]:
    """Reply → the emotion it is said with, of all exchanges in question; the first one counts."""
    chosen = choose_exchanges(exchanges, language, "train", args.intents, args.archetypes)
    lines = [(line.texts[0], line.emotion) for e in chosen for line in e.lines[1::2]]
    return dict(lines) | dict(reversed(lines))


def hold_calls(codec: Codec, lm: S2S, calls: Sequence[Call], args) -> list[dict[str, np.ndarray]]:
    """Plays every call to a slot of one engine, as fast as the machine goes; those of like length
    share a round. Of each, in order of `calls`, the slot's rows of `TickResult`, one a patch of the
    input: audio `[P, T]`, text, user_speaking `[P]`, user_emotion `[P, 8]`, language `[P, 3]`."""
    drawn = args.temperature, Sampling.top_k, args.text_temperature
    sampling = Sampling(*drawn, eagerness=args.eagerness)
    engine = DuplexEngine(codec, lm, min(args.slots, len(calls)), sampling, args.seed)
    length = engine.patch_samples
    patches = np.array([-(-len(call.audio) // length) for call in calls])
    order = np.argsort([len(call.audio) for call in calls], kind="stable")
    replies: dict[int, dict[str, np.ndarray]] = {}
    for first in range(0, len(order), engine.slots):
        batch = order[first : first + engine.slots]
        counts = np.pad(patches[batch], (0, engine.slots - len(batch)))
        frames = np.zeros((engine.slots, counts.max(), length), np.float32)
        for slot, i in enumerate(batch):
            engine.reset(slot, 1000 * args.seed + int(i))
            frames[slot].reshape(-1)[: len(calls[i].audio)] = calls[i].audio
            language = calls[i].language if args.tell_language else None
            engine.set_voice(slot, calls[i].agent_emotion, language)
        numbers = tqdm(range(counts.max()), "calls", unit="tick", disable=None)
        ticks = [engine.tick(frames[:, tick], active=tick < counts) for tick in numbers]
        for slot, i in enumerate(batch):
            rows = {name: [getattr(tick, name)[slot] for tick in ticks[: patches[i]]]
                    for name in ("audio", "text", "user_speaking", "user_emotion", "language")}
            replies[i] = {name: np.stack(found) for name, found in rows.items()}
    return [replies[i] for i in range(len(calls))]


@dataclass(frozen=True)
class Judge:
    """`recognise`: audio `[T]` at 16 kHz → phones. Its transcriptions of the replies in the agent's
    own voice are what it `expected`; `clean` and `coded` are the shares of them that it finds."""

    recognise: Callable[[np.ndarray], Sequence[str]]
    expected: dict[str, Sequence[str]] = field(default_factory=dict)
    clean: float | None = None
    coded: float | None = None

    @property
    def trusted(self) -> bool:
        return bool(self.expected) and min(self.clean, self.coded) >= TRUSTED

    def transcribe(self, audio: np.ndarray) -> Sequence[str]:
        """24 kHz `[T]` → phones; of what is not quiet, as recognisers invent words in silence."""
        loud = np.flatnonzero(ledger.frame_levels(audio) > ledger.QUIET_DBFS)
        step, margin = SAMPLE_RATE // 200, SAMPLE_RATE // 10
        if not len(loud) or len(audio) < margin:
            return ()
        audio = audio[max(0, loud[0] * step - margin) : (loud[-1] + 1) * step + margin]
        return self.recognise(soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE))

    def right(self, audio: np.ndarray, reply: str) -> bool | None:
        """Whether audio `[T]` is transcribed nearest to `reply`, and near. None where the agent's
        own voice could not say the reply: nobody knows its transcription."""
        if reply not in self.expected:
            return None
        found, distance = nearest(self.transcribe(audio), self.expected)
        return found == reply and distance < MAX_AUDIO_ERROR


def load_judge(name: str) -> Judge | None:
    """hama. It knows English and Korean; others come out as the same wrong phones each time, which
    is enough to tell replies apart. `auto` does without where it is not installed."""
    if name == "none":
        return None
    try:
        hama = needed("hama", "no recogniser to judge the replies' audio: pip install hama")
    except UserError as error:
        if name == "hama":
            raise
        print(error, file=sys.stderr)
        return None
    model = hama.ASRModel()
    return Judge(lambda audio: tuple(model.transcribe_waveform(audio, JUDGE_RATE).phonemes))


def examine(judge: Judge, replies: dict, language: str, codec: Codec, seed: int = 0) -> Judge:
    """The judge, with what it makes of replies (text → emotion) in the agent's voice."""
    known = _in_the_agents_voice(replies, language, 1.0)
    if left_out := len(replies) - len(known):
        print(f"{language}: {left_out} replies could not be spoken for the judge", file=sys.stderr)
    order, texts = np.random.default_rng(seed).permutation(len(known)), list(known)
    chosen = {texts[i]: replies[texts[i]] for i in np.sort(order[:JUDGE_REPLIES])}
    clean = _in_the_agents_voice(chosen, language, JUDGE_SPEED)
    judge = replace(judge, expected={t: judge.transcribe(audio) for t, audio in known.items()})
    found = [judge.right(audio, text) for text, audio in clean.items()]
    coded = [judge.right(_through(codec, audio), text) for text, audio in clean.items()]
    return replace(judge, clean=share(found) or 0.0, coded=share(coded) or 0.0)


def _in_the_agents_voice(replies: dict[str, str], language: str, speed: float) -> dict:
    """Text → audio `[T]`, of those replies (text → emotion) that it can say."""
    agent = speech.voices(language, "agent")[0]
    requests = [speech.Request(text, language, agent, speed, replies[text]) for text in replies]
    pairs = zip(replies, speak(requests), strict=True)
    return {text: said.audio for text, said in pairs if not isinstance(said, UserError)}


@torch.inference_mode()
def _through(codec: Codec, audio: np.ndarray) -> np.ndarray:
    device = next(codec.parameters()).device
    codes = codec.encode(torch.from_numpy(audio)[None, None].to(device), num_codebooks=8)
    return codec.decode(codes)[0, 0].float().cpu().numpy()


def judge_call(call: Call, agent: dict, lm: S2S, replies, judge: Judge | None) -> list[dict]:
    """Every turn as it went; a reply's share of the call ends at the next question. `text` and
    `audio`: right or not, None without a judge; `emotion`, `language`: as recognised, as said."""
    c, reply = lm.config, agent["audio"].reshape(-1)
    levels = ledger.frame_levels(reply)
    times = np.arange(len(levels)) * ledger.LEVEL_SECONDS + 1 / c.patch_rate  # it is a patch late
    latencies = ledger.response_latencies(levels, call.turns, times)
    ends = [*(turn.start for turn in call.turns[1:]), len(agent["text"]) / c.patch_rate]
    heads = ((agent["user_emotion"], c.emotions), (agent["language"], c.languages))
    judged = []
    for turn, latency, until in zip(call.turns, latencies, ends, strict=True):
        first, turn_end, last = (int(s * c.patch_rate) for s in (turn.start, turn.end, until))
        said = lm.tokenizer.decode([int(i) for i in agent["text"][first:last] if i != PAD]).strip()
        # A takeover is judged from its own beginning; otherwise what came earlier is no reply.
        begin = turn.end + min(ledger.TAKEOVER_SECONDS, latency or 0.0)
        audio = reply[int(begin * SAMPLE_RATE) : int(until * SAMPLE_RATE)]
        span = slice(max(first, turn_end - round(HEAD_SECONDS * c.patch_rate)), turn_end + 1)
        emotion, language = (names[int(p[span].mean(0).argmax())] for p, names in heads)
        judged.append({"call": call.id, "asked": turn.text, "wanted": turn.reply, "said": said,
            "kind": ledger.kind_of(latency), "latency": latency,
            "text": right_text(said, turn.reply, replies),
            "audio": judge.right(audio, turn.reply) if judge else None,
            "emotion": (emotion, turn.emotion), "language": (language, call.language)})  # fmt: skip
    return judged


def summarise(turns: Sequence[dict], judge: Judge | None = None, not_spoken: int = 0) -> dict:
    """The figures of one language: shares in [0, 1], times in ms, None where unknown."""
    kinds, trusted = Counter(turn["kind"] for turn in turns), bool(judge and judge.trusted)
    times = ledger.percentiles([t["latency"] for t in turns if t["kind"] == "answered"]) or {}
    right = [t["text"] and (t["audio"] is not False or not trusted) for t in turns]
    in_time = [r and t["kind"] == "answered" for r, t in zip(right, turns, strict=True)]
    by_audio = [t["audio"] for t in turns if t["audio"] is not None]
    commonest = Counter(normalise(t["wanted"]) for t in turns).most_common(1)
    return {"turns": len(turns), "calls_not_spoken": not_spoken,
        "answered": share([t["kind"] == "answered" for t in turns]),
        "takeovers": kinds["takeover"], "unanswered": kinds["unanswered"],
        "response_p50_ms": times.get("p50"), "response_p95_ms": times.get("p95"),
        "right_text": share([t["text"] for t in turns]),
        "right_audio": share(by_audio) if trusted else None,
        "right_both": share(right) if trusted else None, "right_and_in_time": share(in_time),
        "majority_answer": round(commonest[0][1] / len(turns), 4) if turns else None,
        "judge_clean": judge and judge.clean, "judge_coded": judge and judge.coded,
        "judge_trusted": trusted,
        "user_emotion": share([t["emotion"][0] == t["emotion"][1] for t in turns]),
        "user_language": share([t["language"][0] == t["language"][1] for t in turns])}  # fmt: skip


def table(summaries: dict[str, dict], met: dict[str, dict]) -> str:
    """Languages side by side, at most 80 columns wide, and the goals that are `met`."""
    flat = {language: _flat(summary) for language, summary in summaries.items()}
    keys = list(dict.fromkeys(key for figures in flat.values() for key in figures))
    width = max(20, *map(len, keys))
    lines = [f"{'':<{width}}" + "".join(f"{name:>9}" for name in summaries)]
    words = {True: "met", False: "not met", None: "not measured"}
    lines += [f"{key:<{width}}" + "".join(_cell(key, figures.get(key)) for figures in flat.values())
              for key in keys]  # fmt: skip
    for language, summary in summaries.items():
        if not summary.get("judge_trusted", True):
            lines.append(f"{language}: no trusted judge of the audio, the text stands alone")
        told = ", ".join(f"{name} {words[value]}" for name, value in met[language].items())
        lines.append(textwrap.fill(f"{language}: {told}", 80))
    return "\n".join(lines)


def _flat(figures: dict, outer: str = "") -> dict:
    """Figures within figures as `outer inner`; confusions are for the picture."""
    found = {}
    for key, value in figures.items():
        if key != "confusion":
            inner = _flat(value, f"{outer}{key} ") if isinstance(value, dict) else None
            found |= {f"{outer}{key}": value} if inner is None else inner
    return found


def _cell(key: str, value: float | None) -> str:
    form = ".0f" if key.endswith("_ms") else ".2f" if key.endswith("_s") else ".1%"
    text = "-" if value is None else str(value) if isinstance(value, int) else format(value, form)
    return f"{text:>9}"


def goals(language: str, summary: dict) -> dict[str, bool | None]:
    """The project's three criteria of a reply, met or not; None where nothing was measured."""
    answered, right, p95 = _criteria(summary).values()
    return {"answered": (answered or 0) >= 0.95, "response": None if p95 is None else p95 < 400,
            "right": (right or 0) >= TARGETS[language]}  # fmt: skip


def _criteria(summary: dict) -> dict:
    right = summary["right_both"] if summary["judge_trusted"] else summary["right_text"]
    p95 = summary["response_p95_ms"]
    return {"answered": summary["answered"], "right": right, "response_p95_ms": p95}


def _changed(args: argparse.Namespace, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


def styled_calls(exchanges, language: str, args, rng, styles=STYLES_ASKED,
                 after_neutral: bool = False) -> list[Call]:  # fmt: skip
    """`--styled` calls a style of one utterance each, in wordings and voices of the split, with
    `--gains` at a microphone's; `after_neutral`: a neutral one of the caller's a second before."""
    more = rng.spawn(1)[0]  # leaves the draws of `rng` as they are without
    voices, calls = user_voices(language, args.split, args.engines), []
    chosen = choose_exchanges(exchanges, language, args.split, args.intents)
    texts = sorted({text for e in chosen for line in e.lines[::2] for text in line.texts})
    requests = []
    for style in styles * args.styled:
        text, voice = texts[int(rng.integers(len(texts)))], draw_voice(voices, rng)
        seed, speed = int(rng.integers(2**31)), float(rng.uniform(*SPEED))
        requests.append(speech.Request(text, language, voice, speed, style, seed))
    takes, befores = make_takes(requests), [None] * len(requests)
    if after_neutral:
        befores = make_takes([replace(r, text=str(more.choice(texts)), emotion="neutral")
                              for r in requests])  # fmt: skip
    for i, (request, take, before) in enumerate(zip(requests, takes, befores, strict=True)):
        gain = 10 ** (more.uniform(*GAIN_DB) / 20) if args.gains else 1.0
        if not isinstance(take, UserError) and not isinstance(before, UserError):
            call = _one_turn(f"{language}-{i}", request, take, "", before=before)
            calls.append(replace(call, audio=call.audio * np.float32(gain)))
    if not calls:
        raise UserError(f"no {language} utterance could be spoken in the {args.split} voices")
    return calls


def _one_turn(name: str, request, take: Take, reply: str, tail: float = 0.5, before=None) -> Call:
    """A call of one utterance; `tail` seconds of silence behind it, a take a second `before` it."""
    start, tail = (round(s * SAMPLE_RATE) for s in (LEAD_IN_SECONDS, tail))
    audio = np.pad(take.audio, (start, tail))
    if before:
        audio = np.concatenate([np.pad(before.audio, (start, SAMPLE_RATE - start)), audio])
    shift = (len(audio) - tail - len(take.audio)) / SAMPLE_RATE
    turn = AskedTurn(shift + take.onset, shift + take.offset, request.text, request.emotion, reply)
    return Call(name, request.language, audio, (turn,), speaker=request.voice.speaker)


def told_emotions(codec: Codec, lm: S2S, calls: Sequence[Call], args) -> list[Told]:
    sides = zip(calls, hold_calls(codec, lm, calls, args), strict=True)
    return [told_emotion(*pair, lm.config) for pair in sides]


def told_emotion(call: Call, agent: dict, config) -> Told:
    """The user's emotion at the end of a call of one turn, as `EmotionEstimate` tells it."""
    rate, names, [turn] = config.patch_rate, [], call.turns
    first, last = (int(s * rate) for s in (turn.start, turn.end))
    estimate = EmotionEstimate(1, config.emotions, 1 / rate)
    for tick in range(last + 1):
        heard = (agent[head][tick, None] for head in ("user_emotion", "user_speaking"))
        estimate.update(*heard, np.ones(1, bool))
        names.append(estimate.name(0))
    changes = [t for t in range(first + 1, last + 1) if names[t] != names[t - 1]]
    seconds = (max(changes, default=first) + 1) / rate - turn.start if names[last] else None
    sure = dict(zip(config.emotions, estimate.posterior[0].tolist(), strict=True))
    told, likely = (max(names, key=sure.get) for names in (sure, STYLES_ASKED))
    return Told(turn.emotion, told, call.speaker, sure[told], seconds, likely)


def by_prosody(calls: Sequence[Call], exchanges, language: str, args, rng) -> dict:
    """Accuracies of the prosody judge on the same utterances, after `--judge_examples` a style of
    the training split: what the styles give away without any model."""
    train = _changed(args, split="train", engines=None, styled=args.judge_examples)
    known = styled_calls(exchanges, language, train, rng)
    judge = ProsodyJudge([c.audio for c in known], [c.turns[0].emotion for c in known])
    return accuracies([c.turns[0].emotion for c in calls], judge.judge([c.audio for c in calls]))


def octave(codec: Codec, lm: S2S, exchanges, language: str, args, rng) -> dict:
    """Shares of neutral utterances told neutral, and told happy or surprised, by each of OCTAVE."""
    calls, found = styled_calls(exchanges, language, args, rng, ("neutral",)), {}
    for name, voice in OCTAVE.items():
        moved = [replace(c, audio=praat.change_voice(c.audio, SAMPLE_RATE, *voice)) for c in calls]
        told = [one.told for one in told_emotions(codec, lm, moved, args)]
        found[f"{name}_neutral"] = share([emotion == "neutral" for emotion in told])
        found[f"{name}_excited"] = share([emotion in ("happy", "surprise") for emotion in told])
    return found


def fitting(codec: Codec, lm: S2S, calls, exchanges, args) -> tuple[dict, list[str | None]]:
    """Shares of calls of one turn whose written reply is nearest to one for the same emotion of the
    user as the one wanted, and is the wanted one; and the nearest of all training scripts' replies
    to each, None where nothing was said."""
    taught = choose_exchanges(exchanges, calls[0].language, "train")
    lines = [pair for e in taught for pair in zip(e.lines[::2], e.lines[1::2], strict=True)]
    written = {normalise(answer.texts[0]): line.emotion for line, answer in lines}
    near, fits, exact = [], [], []
    for call, side in zip(calls, hold_calls(codec, lm, calls, args), strict=True):
        [turn] = judge_call(call, side, lm, list(written), None)
        reply, error = nearest(normalise(turn["said"]), {text: text for text in written})
        wanted = written.get(normalise(turn["wanted"]), "")
        near.append(reply)
        fits.append(error <= MAX_TEXT_ERROR and written[reply] == wanted)
        exact.append(turn["text"])
    return {"fitting": share(fits), "exact": share(exact)}, near


def empathy(codec: Codec, lm: S2S, exchanges, language: str, args, rng) -> dict | None:
    """The sad and the glad reading of the same words by the same voice: shares of all pairs that
    are answered twice and that get different replies, and of all readings (`fitting`)."""
    voices, calls, twins = user_voices(language, args.split, args.engines), [], {}
    for one in exchanges:
        if (one.language, one.intent, one.held_out) == (language, "empathy", args.split != "train"):
            twins.setdefault(one.lines[0].texts[0], []).append(one)
    for text, pair in twins.items():
        plain = text, language, draw_voice(voices, rng), 1.0
        seed = int(rng.integers(2**31))
        asked = [speech.Request(*plain, one.lines[0].emotion, seed) for one in pair]
        takes = make_takes(asked)
        if len(pair) == 2 and not any(isinstance(take, UserError) for take in takes):
            calls += [_one_turn(one.id, *said, one.lines[1].texts[0], TAIL_SECONDS)
                      for one, *said in zip(pair, asked, takes, strict=True)]  # fmt: skip
    if not calls:
        return None
    shares, near = fitting(codec, lm, calls, exchanges, args)
    pairs = list(zip(near[::2], near[1::2], strict=True))
    different = share([None not in pair and len(set(pair)) == 2 for pair in pairs])
    answered = share([None not in pair for pair in pairs])
    return {"pairs": len(pairs), "both_answered": answered, "different": different, **shares}


def words_alone(codec: Codec, lm: S2S, exchanges, language: str, args) -> dict | None:
    """`fitting` of the replies to words that are sad or glad, in a neutral voice."""
    mine = [replace(e, lines=e.lines[:2]) for e in exchanges
            if (e.language, e.held_out) == (language, args.split != "train")
            and e.intent in WORDS_ALONE and e.lines[0].emotion in ("sad", "happy")]  # fmt: skip
    if not mine:
        return None
    calls, _ = ask(mine, language, _changed(args, emotions="neutral", intents=(), archetypes=False))
    return {"sentences": len(calls), **fitting(codec, lm, calls, exchanges, args)[0]}


def control(codec: Codec, lm: S2S, exchanges, language: str, args, rng) -> dict:
    """Whether replies sound as they were told to, by a prosody judge who learnt from the agent's
    voice, through the codec, at two speeds, in other words where the scripts have some; and how
    often it is right on a fifth of these words, kept for that."""
    asked, _ = ask(exchanges, language, _changed(args, emotions="neutral"))
    wanted = {turn.reply for call in asked for turn in call.turns}
    taught = list(training_replies(exchanges, language, _changed(args, intents=(), archetypes=0)))
    others = [reply for reply in taught if reply not in wanted] or taught
    chosen = rng.permutation(len(others))[: -(-args.judge_examples * 5 // 8)]
    texts, learnt, kept = [others[i] for i in chosen], [], []
    for speed, style in itertools.product((1.0, JUDGE_SPEED), STYLES_ASKED):
        said = _in_the_agents_voice(dict.fromkeys(texts, style), language, speed)
        for text, audio in said.items():
            (kept if text in texts[::5] else learnt).append((_through(codec, audio), style))
    if not kept or not learnt:
        raise UserError(f"{language}: the agent can speak too few replies to judge control by")
    judge = ProsodyJudge(*zip(*learnt, strict=True))
    audios, styles = zip(*kept, strict=True)
    own = accuracies(styles, judge.judge(audios))["unweighted_accuracy"]
    calls, told = [replace(c, agent_emotion=style) for c in asked for style in STYLES_ASKED], []
    for call, side in zip(calls, hold_calls(codec, lm, calls, args), strict=True):
        ends = [call.turns[0].end, *(turn.start for turn in call.turns[1:2])]
        audio = side["audio"].reshape(-1)[slice(*(int(s * SAMPLE_RATE) for s in ends), None)]
        if ledger.frame_levels(audio).max() > ledger.QUIET_DBFS:
            told.append((call.agent_emotion, judge.judge([audio])[0]))
    accuracy = accuracies(*zip(*told, strict=True))["unweighted_accuracy"] if told else None
    return {"replies": len(told), "accuracy": accuracy, "judge_on_the_agents_voice": own}


def evaluate_emotion(codec: Codec, lm: S2S, exchanges, language: str, args) -> dict:
    """`--emotion`: the figures of one language."""
    rng = np.random.default_rng([args.seed, SPOKEN.index(language), 7])
    asked, models = (exchanges, language, args), (codec, lm)
    calls = styled_calls(*asked, rng)
    found = emotion_figures.detection(told_emotions(*models, calls, args))
    again = styled_calls(*asked, rng.spawn(1)[0], after_neutral=True)
    later = emotion_figures.detection(told_emotions(*models, again, args))
    found["after_neutral"] = {key: later[key] for key in ACCURACIES}
    found["prosody"] = by_prosody(calls, *asked, rng)
    found["octave"] = octave(*models, *asked, rng)
    print(f"{language}: {json.dumps({'detection': found})}", flush=True)
    return {"detection": found, "empathy": empathy(*models, *asked, rng),
            "words": words_alone(*models, *asked),
            "control": control(*models, *asked, rng)}  # fmt: skip


def evaluate_language(codec: Codec, lms: Sequence[S2S], exchanges, language: str, replies,
                      judge: Judge | None, args) -> list[tuple[dict, list[dict]]]:  # fmt: skip
    """Asks once, holds the calls with each LM and judges them: figures and turns of each."""
    calls, left_out = ask(exchanges, language, args)
    seconds = sum(len(call.audio) for call in calls) / SAMPLE_RATE
    print(f"{language}: {len(calls)} calls, {seconds:.0f} s, {len(replies)} replies in training",
          flush=True)  # fmt: skip
    judge = judge and examine(judge, replies, language, codec, args.seed)
    trusted, found = judge if judge and judge.trusted else None, []
    for lm in lms:
        pairs = zip(calls, hold_calls(codec, lm, calls, args), strict=True)
        pairs = tqdm(pairs, "judging", len(calls), disable=None)
        turns = [t for pair in pairs for t in judge_call(*pair, lm, list(replies), trusted)]
        found.append((summarise(turns, judge, len(left_out)), turns))
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--codec", type=Path, default=HERE / "checkpoints/tiny/codec", help="checkpoint folder")
    add("--lm", type=Path, default=HERE / "checkpoints/tiny/s2s", help="checkpoint folder")
    add("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN))
    add("--exchanges", choices=("archetypes", "all"), default="archetypes", help="*-001 or all")
    add("--intents", default="", help="only these, comma-separated")
    add("--split", choices=SPLITS, default="test", help="train: the upper bound")
    add("--questions_per_exchange", type=whole(1), default=3, help="wordings of each")
    add("--judge", choices=("auto", "none", "hama"), default="auto", help="of the replies' audio")
    add("--output", type=Path, help="file for the summary and every turn, as JSON")
    add = parser.add_argument_group("advanced").add_argument
    add("--emotion", action="store_true", help="detection, empathy and control in its place")
    add("--before", type=Path, help="with --emotion: the LM before it, to compare the replies of")
    add("--styled", type=whole(1), default=24, help="with --emotion: utterances a style")
    add("--gains", action="store_true", help="with --emotion: a microphone's gain drawn a call")
    add("--judge_examples", type=whole(8), default=80, help="with --emotion: utterances a style "
        "from which each judge of prosody learns: minutes a language")  # fmt: skip
    add("--scripts", type=Path, default=HERE / "conversations")
    add("--engines", nargs="+", help="whose voices ask, of the split [all]")
    add("--emotions", choices=("neutral", "scripted"), default="neutral", help="of the user")
    add("--tell_language", action="store_true", help="tell the model the call's language")
    add("--temperature", type=number(0, 100), default=Sampling.temperature, help="of the codes")
    add("--text_temperature", type=number(0, 100), default=Sampling.text_temperature)
    add("--eagerness", type=number(-100, 100), help="dB on its odds of speaking [the model's own]")
    add("--slots", type=whole(1, 4096), default=32, help="calls held at once")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=whole(1, 1024), default=1, help="CPU threads")
    args = parser.parse_args(arguments)
    args.languages = list(dict.fromkeys(args.languages))
    args.intents = tuple(sorted(filter(None, args.intents.split(","))))
    args.archetypes = args.exchanges == "archetypes"
    if args.before and not args.emotion:
        raise UserError("--before goes with --emotion")
    if args.output:
        writable_file(args.output, "--output")
    if args.emotion:  # before an hour of work
        args.picture = args.output and args.output.with_suffix(".png")
        if args.output and args.picture == args.output:
            raise UserError(f"--output {args.output}: the picture's name; end it in .json")
        packages = {"sklearn": "scikit-learn"}
        packages |= {"matplotlib": "matplotlib"} if args.output else {}
        if missing := [p for module, p in packages.items() if not importlib.util.find_spec(module)]:
            raise UserError(f"--emotion needs packages: pip install {' '.join(missing)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    device = setup_distributed(args.device).device
    exchanges = load_scripts(args.scripts)
    replies = {}
    for language in args.languages:  # what cannot be asked or judged, before an hour of work
        replies[language] = training_replies(exchanges, language, args)
        choose_exchanges(exchanges, language, args.split, args.intents, args.archetypes)
        user_voices(language, args.split, args.engines)
        if args.judge != "none" or args.emotion:
            speech.voices(language, "agent")
    codec, lm = load_models(args.codec, args.lm, str(device))
    lms = [lm]  # whose replies are evaluated
    if args.emotion:
        lms = [load_models(args.codec, args.before, str(device))[1], lm] if args.before else []
    judge = load_judge(args.judge) if lms else None
    summaries, turns, failed = {}, {}, []
    for language in args.languages:
        try:
            asked = exchanges, language, replies[language]
            held = evaluate_language(codec, lms, *asked, judge, args) if lms else []
            if args.emotion:
                found = evaluate_emotion(codec, lm, exchanges, language, args)
                effect = emotion_figures.compare(*(_criteria(s) for s, _ in held)) if held else {}
                summaries[language] = found | {"effect": effect}
            else:
                [(summaries[language], turns[language])] = held
        except UserError as error:  # the others' figures are worth an hour
            failed.append(f"{language}: {error}")
    if not summaries:
        raise UserError("; ".join(failed))
    met = {language: emotion_figures.goals(s) if args.emotion else goals(language, s)
           for language, s in summaries.items()}  # fmt: skip
    print(f"\n{args.split} wordings and voices, {args.exchanges}, {args.emotions} users, "
          f"seed {args.seed}\n{table(summaries, met)}")  # fmt: skip
    result = {"codec": str(args.codec), "lm": str(args.lm), "split": args.split, "seed": args.seed,
        "exchanges": args.exchanges, "intents": list(args.intents), "emotions": args.emotions,
        "eagerness_db": args.eagerness, "failed": failed, "goals": met,
        "emotion" if args.emotion else "languages": summaries}  # fmt: skip
    if args.emotion:
        print(f"\n{emotion_figures.NOTE}")
        result |= {"before": args.before and str(args.before), "styled": args.styled,
                   "gains": args.gains, "note": emotion_figures.NOTE}  # fmt: skip
    try:
        if args.output:
            every = result | {"turns": turns}
            write_text(args.output, json.dumps(every, ensure_ascii=False, indent=1))
        if args.output and args.emotion:
            told = {language: found["detection"] for language, found in summaries.items()}
            emotion_figures.draw(args.picture, told, lm.config.emotions)
    finally:  # a full disk must not cost the figures
        print(json.dumps(result, ensure_ascii=False))
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    run(main, resumes=False)
