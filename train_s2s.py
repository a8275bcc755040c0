#!/usr/bin/env python3
"""Phase 3: train the dialogue LM on conversations encoded by make_conversations.py.

    python train_s2s.py --data_dirs data/conversations/scripted --codec checkpoints/tiny/codec \
        --checkpoint_dir checkpoints_s2s

The same command goes on from the last complete checkpoint. The first `--asr_share` of the steps
trains speech recognition and the replies' text alone, without codes, which costs half as much;
then it learns to speak.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset

import checkpoints
import command
import s2s
import training
from codec import Codec
from command import UserError, number, share, whole
from data import frame_labels, split_for, training_batches
from dialogues import load_code_dataset
from phones import PHONES
from s2s import IGNORE, PAD, S2S, Batch, S2SConfig, TextStream
from training import one_of, setting

WEIGHTS = {
    "text": 1.0,
    "semantic": 1.0,
    "acoustic": 1.0,
    "user_phones": 1.0,
    "user_words": 1.0,
    "user_text": 1.0,
    "user_speaking": 0.2,
    "turn_end": 0.2,
    "user_emotion": 0.1,
    "language": 0.1,
}


# Metrics on the terminal's lines, and their names there.
SHOWN = {
    "loss": "loss",
    "text": "text",
    "text_accuracy": "hit",
    "user_phones_accuracy": "phones",
    "user_words_accuracy": "words",
}
# Flags and settings that a resumed run can take up, beside those of all trainers.
CHANGEABLE = ("lr", "codec", "eagerness")
# Patches in which the agent is silent are soon learnt: fewer of them are spoken in training.
SILENT_SHARE = 0.25
# Windows that begin where a conversation does, as every call; the others begin anywhere.
FROM_THE_START = 0.25
WINDOW_CONTEXTS, VALIDATION_CONTEXTS = 1.5, 3  # lengths, in attention contexts
LEAD_PATCHES = 250  # of a long conversation before its window
SHORTEST = 4  # frames: the longest patch; a conversation below that says nothing


@dataclass(frozen=True)
class Settings(training.Settings):
    """What a preset fixes of the LM's training; `--set` changes it."""

    frames_per_step: int = setting(2, one_of(1, 2, 4), "codec frames in a patch")
    depth_order: str = setting("level", one_of("level", "frame"), "in which codes are written")
    acoustic_delay: int = setting(0, whole(0, 100), "frames")
    text_weight: float = setting(10.0, number(above=0), "of a token against PAD, in the loss")
    code_noise: float = setting(0.1, share, "share of user codes replaced by near ones")
    frame_drop: float = setting(0.05, share, "share of user frames masked")
    agent_drop: float = setting(0.3, share, "share of the agent's past levels and frames masked")
    language_drop: float = setting(0.5, share, "share of windows without the language's label")


PRESETS = {"tiny": Settings(), "base": Settings()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, plan, more = training.run_parser(
        "Phase 3: train the dialogue LM.", Settings, data_dirs=["data/conversations/scripted"],
        num_epochs=20, checkpoint_dir="checkpoints_s2s", warmup_steps=300,
    )  # fmt: skip
    plan.add_argument("--codec", default="checkpoints/tiny/codec", help="that encoded the data")
    plan.add_argument("--lr", type=number(0), default=3e-4)
    add = more.add_argument
    add("--vocab_size", type=whole(3), default=2048, help="of a new tokenizer")
    add("--window_seconds", type=number(0.1, 6000), help="by default 1.5 times the context")
    add("--context_seconds", type=number(0.1, 4000), help="attended to; by default the preset's")
    add("--asr_share", type=share, default=0.3, help="of the steps, without codes")
    add("--depth_fraction", type=share, default=0.15, help="of a window's patches spoken")
    add("--eagerness", type=number(-100, 100), default=10.0, help="dB on its odds of speaking")
    add("--acoustic_drop", type=share, default=0.6, help="windows that lose user codebooks")
    add("--agent_window_drop", type=share, default=0.5,
        help="windows without the agent's own past codes; 1: none ever")  # fmt: skip
    add("--emotion_drop", type=share, default=0.1, help="windows without the emotion's label")
    args = parser.parse_args(argv)
    args.given = parser.given(argv)
    return args


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer (Sennrich et al. 2016) with PAD as id 0; spaces belong to the next word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<unk>"], show_progress=False
    )
    # Every word also with its space before it: add_turn encodes words one by one.
    tokenizer.train_from_iterator(itertools.chain(texts, (f" {text}" for text in texts)), trainer)
    return tokenizer


class Conversations(Dataset):
    """Windows of calls as the LM reads them, drawn by (seed, epoch, index) alone.

    A call is made of conversations of one language, laid end to end, each drawn at random; every
    patch of the data is as likely to be in a window. Items are dicts of tensors without the batch
    axis, as in `s2s.Batch`, all of one shape.

    frames: of each row, where they are known without reading it. neighbours: of the user's codes,
    `[K, n, count]`, some of which replace them in training; None: codes stay as they are.
    """

    def __init__(
        self,
        rows,
        config: S2SConfig,
        tokenizer: Tokenizer,
        args: argparse.Namespace,
        settings: Settings,
        items: int,
        frames: np.ndarray | None = None,
        neighbours: Tensor | None = None,
    ) -> None:
        self.rows, self.config, self.tokenizer = rows, config, tokenizer
        self.args, self.settings = args, settings
        self.items, self.neighbours = items, neighbours
        self.patches = round(args.window_seconds * config.patch_rate)
        self.depth_patches = max(1, round(args.depth_fraction * self.patches))
        self.phone_ids = {phone: i for i, phone in enumerate(config.phones)}
        if frames is None:
            frames = [len(row["user_codes"]) for row in rows]
        self.ends = np.cumsum(np.asarray(frames, np.int64) // config.frames_per_step)
        plain = rows.with_format(None) if hasattr(rows, "with_format") else None
        languages = list(plain["language"]) if plain else [row["language"] for row in rows]
        by_language: dict[str, list[int]] = {}
        for place, language in enumerate(languages):
            by_language.setdefault(language, []).append(place)
        self.alike = {name: np.array(places) for name, places in by_language.items()}

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        rng = training.item_rng(self.args.seed, *key)
        window = self.window(rng)
        turns = window.pop("user_turn"), window.pop("user_text")
        window |= s2s.untimed_turns(*turns)
        window |= {"agent_past": window["agent_codes"], "depth_patches": torch.arange(self.patches)}
        if self.neighbours is not None:
            self.disturb(window, rng)
        if rng.random() < self.args.emotion_drop:
            window["agent_emotion"].zero_()
        if rng.random() < self.settings.language_drop:
            window["language"].zero_()
        window.pop("agent_speaking")
        return window

    def disturb(self, window: dict[str, Tensor], rng: np.random.Generator) -> None:
        """Corrupts the codes that the LM reads, and draws the patches whose codes are learnt."""
        args, settings = self.args, self.settings
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        user = s2s.blur(window["user_codes"][None], self.neighbours, settings.code_noise, generator)
        user = s2s.corrupt(user, generator, args.acoustic_drop, settings.frame_drop)
        # Its own past codes too: what it says in a call is not what it was taught, and the text
        # must not follow a slip of the voice.
        drops = settings.agent_drop, settings.agent_drop, args.agent_window_drop
        past = s2s.corrupt(window["agent_past"][None], generator, *drops)
        window |= {"user_codes": user[0], "agent_past": past[0]}
        odds = torch.where(window["agent_speaking"], 1.0, SILENT_SHARE)
        drawn = torch.rand(self.patches, generator=generator) ** (1 / odds)  # weighted, each once
        window["depth_patches"] = drawn.topk(self.depth_patches).indices.sort().values

    def window(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """`self.patches` patches of a call, from a place in its first conversation on."""
        place = int(rng.integers(self.ends[-1]))
        first = int(np.searchsorted(self.ends, place, side="right"))
        begins = place - int(self.ends[first - 1] if first else 0)
        if rng.random() < FROM_THE_START:
            begins = 0
        row, begins = trimmed(self.rows[first], begins, self.patches, self.config)
        rows, room = [row], begins + self.patches - self.length(row)
        alike = self.alike[row["language"]]
        while room > 0:
            rows.append(self.rows[int(alike[rng.integers(len(alike))])])
            room -= self.length(rows[-1])
        emotions = rng.integers(len(self.config.emotions) + 1, size=2).tolist()
        set_by_hand = zip((0, int(rng.integers(begins + self.patches))), emotions, strict=True)
        call = self.labelled(joined(rows, self.config), tuple(set_by_hand))
        part = slice(begins, begins + self.patches)
        return {name: v[part].clone() if v.dim() else v for name, v in call.items()}

    def length(self, row: dict) -> int:
        """In whole patches."""
        return len(row["user_codes"]) // self.config.frames_per_step

    def labelled(self, row: dict, set_by_hand: Sequence[tuple[int, int]] = ()) -> dict[str, Tensor]:
        """The whole conversation, patch by patch.

        set_by_hand: emotions (0: none), each from a patch on in which the agent is
        silent until its next turn. Drawn at random they say nothing about the reply, and a call in
        which one is set beforehand, or while the user speaks, is nothing new.
        """
        c, p = self.config, self.config.frames_per_step
        count = self.length(row)
        agent = torch.from_numpy(row["agent_codes"].astype(np.int64))
        codes = {
            "user_codes": torch.from_numpy(row["user_codes"].astype(np.int64)),
            "agent_codes": s2s.delay_acoustic(agent, c.acoustic_delay),
        }
        patches = {n: v[: count * p].unflatten(0, (count, p)) for n, v in codes.items()}
        language = c.languages.index(row["language"]) if row["language"] in c.languages else None
        labels = turn_labels(row["turns"], count, c, language, self.phone_ids)
        labels["user_words"] = self.user_words(row["turns"], count)
        labels |= self.untimed_words(row["turns"], count)
        stream = TextStream(count, c.patch_rate)
        emotion, begins = torch.zeros(count, dtype=torch.long), []
        for turn in row["turns"]:
            if turn["who"] == "agent":
                begun = int(turn["start"] * c.patch_rate + 1e-6)
                if turn["text"]:
                    begun = max(begun, s2s.add_turn(stream, self.tokenizer, turn))
                # Set once it has begun, and held until the next turn has: it says how to speak,
                # and never that it is time to, nor what to say.
                known = turn["emotion"] in c.emotions
                emotion[begun + 1 :] = c.emotions.index(turn["emotion"]) + 1 if known else 0
                begins.append(begun + 1)
        for patch, value in set_by_hand:
            if not labels["agent_speaking"][patch]:
                emotion[patch : min((b for b in begins if b > patch), default=count)] = value
        return {
            **patches,
            **labels,
            "agent_emotion": emotion,
            "text": torch.tensor(stream.tokens),
            "language": torch.tensor(0 if language is None else language + 1),
            "overflow": torch.tensor(stream.overflow),
        }

    def user_words(self, turns: list[dict], count: int) -> Tensor:
        """Tokens `[count]` of the user's words, each from `listen_delay` patches after its end on;
        unknown during a turn whose words have no times."""
        c = self.config
        stream = TextStream(count, c.patch_rate)
        spoken = [turn for turn in turns if turn["who"] == "user"]
        for word, _, end in (word for turn in spoken for word in turn["words"] or ()):
            stream.add(self.word_tokens(word), end + c.listen_delay / c.patch_rate)
        tokens = torch.tensor(stream.tokens)
        for turn in spoken:
            if not turn["words"]:
                tokens[self.patches_of(turn)] = IGNORE
        return tokens

    def patches_of(self, turn: dict) -> slice:
        """The patches in which a turn's words are recognised, `listen_delay` late at its end."""
        c = self.config
        last = round(turn["end"] * c.patch_rate) + c.listen_delay
        return slice(round(turn["start"] * c.patch_rate), last)

    def word_tokens(self, word: str) -> list[int]:
        """Without capitals and full stops, which speech does not tell."""
        plain = word.strip(string.punctuation + "।…—").lower()
        return self.tokenizer.encode(f" {plain}").ids if plain else []

    def untimed_words(self, turns: list[dict], count: int) -> dict[str, Tensor]:
        """`user_turn` and `user_text` `[count]` of `Batch`, for the user's turns without times."""
        number, text = torch.zeros(2, count, dtype=torch.long)
        for i, turn in enumerate(turns, start=1):
            if turn["who"] == "user" and turn["text"] and not turn["words"]:
                tokens = [t for word in turn["text"].split() for t in self.word_tokens(word)]
                place = self.patches_of(turn)
                room = len(number[place])
                if 0 < len(tokens) <= room:
                    number[place] = i
                    text[place] = torch.tensor(tokens + [PAD] * (room - len(tokens)))
        return {"user_turn": number, "user_text": text}


def turn_labels(
    turns: list[dict], count: int, config: S2SConfig, language: int | None, phone_ids: dict
) -> dict[str, Tensor]:
    """What the heads are to tell at each patch, and where the agent speaks.

    A patch is labelled by what holds at its end. Phones are those of `listen_delay` patches ago.
    """
    c = config
    frames = count * c.frames_per_step
    speaking, turn_end = torch.zeros(2, count, dtype=torch.long)
    user_emotion, spoken_language = torch.full((2, count), IGNORE)
    agent_speaking = torch.zeros(count, dtype=torch.bool)
    phones = np.zeros(frames, np.int64)
    for i, turn in enumerate(turns):
        start, end = (round(turn[side] * c.patch_rate) for side in ("start", "end"))
        emotion = c.emotions.index(turn["emotion"]) if turn["emotion"] in c.emotions else None
        if turn["who"] == "agent":
            agent_speaking[start : end + 1] = True
            continue
        speaking[start:end] = 1
        if emotion is not None:
            user_emotion[start:end] = emotion
        if language is not None:
            spoken_language[start:end] = language
        following = turns[i + 1] if i + 1 < len(turns) else turn
        if following["who"] == "agent" and following.get("part") == turn.get("part"):
            turn_end[end : round(following["start"] * c.patch_rate)] = 1
        first = int(turn["start"] * c.frame_rate + 1e-6)
        last = min(frames, int(np.ceil(turn["end"] * c.frame_rate - 1e-6)))
        if last > first:  # unknown where the turn has no phones
            labels = frame_labels(turn["phones"], phone_ids, last - first, first / c.frame_rate)
            phones[first:last] = labels
    late = np.roll(phones, c.listen_delay * c.frames_per_step)
    late[: c.listen_delay * c.frames_per_step] = IGNORE
    return {
        "user_speaking": speaking,
        "turn_end": turn_end,
        "user_emotion": user_emotion,
        "language_label": spoken_language,
        "agent_speaking": agent_speaking,
        "user_phones": torch.from_numpy(late).unflatten(0, (count, c.frames_per_step)),
    }


def trimmed(row: dict, begins: int, patches: int, config: S2SConfig) -> tuple[dict, int]:
    """A long conversation without most of what a window of `patches` from patch `begins` on does
    not see, and where it then begins: a recording of an hour costs no more than a minute of it.

    It then begins between two turns, so that none is cut, and well before the window: words
    that wait for a patch come from there.
    """
    first = begins - LEAD_PATCHES
    for turn in sorted(row["turns"], key=lambda turn: turn["start"], reverse=True):
        starts, ends = (turn[side] * config.patch_rate for side in ("start", "end"))
        if starts < first + 1 and ends > first:
            first = int(starts)
    first = max(0, first)
    start, end = (x / config.patch_rate for x in (first, begins + patches + LEAD_PATCHES))
    turns = [moved(turn, -start) for turn in row["turns"] if start <= turn["start"] < end]
    frames = first * config.frames_per_step
    codes = {name: row[name][frames:] for name in ("user_codes", "agent_codes")}
    return {**row, **codes, "turns": turns}, begins - first


def joined(rows: Sequence[dict], config: S2SConfig) -> dict:
    """One row of conversations laid end to end, each of whole patches."""
    if len(rows) == 1:
        return rows[0]
    p, now = config.frames_per_step, 0.0
    turns, codes = [], {"user_codes": [], "agent_codes": []}
    for part, row in enumerate(rows):
        frames = len(row["user_codes"]) // p * p
        for name, parts in codes.items():
            parts.append(row[name][:frames])
        turns += [{**moved(turn, now), "part": part} for turn in row["turns"]]
        now += frames / config.frame_rate
    return {**rows[0], "turns": turns, **{n: np.concatenate(parts) for n, parts in codes.items()}}


def moved(turn: dict, seconds: float) -> dict:
    """The turn so much later."""
    later = {**turn, "start": turn["start"] + seconds, "end": turn["end"] + seconds}
    for name in ("words", "phones"):
        if turn[name]:
            later[name] = [[said, a + seconds, b + seconds] for said, a, b in turn[name]]
    return later


def collate(items: list[dict[str, Tensor]]) -> tuple[Batch, int]:
    """A batch, and how many tokens of its conversations found no patch."""
    fields = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    overflow = int(fields.pop("overflow").sum())
    lengths = fields["untimed_patches"], fields.pop("untimed_counts")
    fields["untimed_lengths"] = tuple(tuple(each.flatten().tolist()) for each in lengths)
    return Batch(**fields), overflow


def row_frames(part) -> np.ndarray:
    """Codec frames of each row of a code dataset; the codes themselves are not read."""
    import pyarrow.compute as pc

    chunks = part.data.column("user_codes").chunks
    counts = [pc.list_value_length(chunk.storage).to_numpy() for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int64), *counts])


def load_rows(args, fingerprint: str):
    """(training rows, validation rows, hours of training) of all `--data_dirs`.

    Rows with their frames; those shorter than a patch are left out, and counted.
    """
    from datasets import concatenate_datasets

    parts = [load_code_dataset(folder, fingerprint)[0] for folder in args.data_dirs]
    frames = np.concatenate([row_frames(part) for part in parts])
    # Concatenating drops the transform that decodes rows; it is the same for every part.
    rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    rows = rows.with_transform(parts[0].format["format_kwargs"]["transform"])
    plain = rows.with_format(None)
    splits = [split_for(name, 0.02, 0.0) for name in plain["id"]]
    named = list(plain["split"])
    long_enough = np.flatnonzero(frames >= SHORTEST)
    if len(long_enough) < len(frames):
        print(f"{len(frames) - len(long_enough)} of {len(frames)} conversations left out: shorter "
              f"than {SHORTEST} codec frames")  # fmt: skip
    held_out = [i for i in long_enough if named[i] == "validation" or splits[i] != "train"]
    held_out = [i for i in held_out if named[i] != "test"]
    train = [i for i in long_enough if named[i] == "train" and splits[i] == "train"]
    if not train:
        folders = ", ".join(args.data_dirs)
        raise UserError(f"{folders}: no conversations of split train; run make_conversations.py")
    held_out = held_out or train[:8]
    chosen = [(rows.select(places), frames[places]) for places in (train, held_out)]
    return *chosen, frames[train].sum() / 50 / 3600


def all_texts(rows) -> list[str]:
    """The words of up to 20,000 conversations, for the tokenizer."""
    turns = rows.with_format(None)["turns"][:20_000]
    return sorted({turn["text"] for conversation in turns for turn in conversation if turn["text"]})


def batch_losses(model: S2S, batch: Batch, speak: bool, split: int | None = None):
    """(whole loss, losses, metrics) of a batch, in bf16 on CUDA."""
    device = batch.text.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        losses, metrics = model.losses(batch, speak, split)
    return sum(WEIGHTS[name] * loss for name, loss in losses.items()), losses, metrics


@torch.no_grad()
def validate(model: S2S, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Mean losses and accuracies over held-out calls, every code of them.

    The text's and the phones' also apart within and past the attention context: past it, the window
    slides as it does in a call, and the loss must not rise.
    """
    model.eval()
    rows = []
    for batch in batches:
        _, losses, metrics = batch_losses(model, batch.to(device), True, model.config.context)
        rows.append({name: float(value) for name, value in {**losses, **metrics}.items()})
    model.train()
    return {f"validation_{name}": statistics.fmean(row[name] for row in rows) for name in rows[0]}


def validation_batches(rows, frames, config, tokenizer, args, settings, count=4) -> list[Batch]:
    """`count` batches of four held-out calls, three times the attention context long."""
    seconds = VALIDATION_CONTEXTS * config.context / config.patch_rate
    changes = {"emotion_drop": 1.0, "window_seconds": seconds}
    unlabelled = argparse.Namespace(**{**vars(args), **changes})
    settings = dataclasses.replace(settings, language_drop=1.0)
    calls = Conversations(rows, config, tokenizer, unlabelled, settings, 4 * count, frames)
    return [collate([calls[(0, 4 * i + j)] for j in range(4)])[0] for i in range(count)]


def fitting_window(args, config: S2SConfig) -> float:
    """`--window_seconds`, by default 1.5 attention contexts.

    Raises UserError for less: positions past the window would run in a call, and never be trained.
    """
    context = config.context / config.patch_rate
    least = WINDOW_CONTEXTS * context
    if args.window_seconds is None:
        return least
    if round(args.window_seconds * config.patch_rate) < round(least * config.patch_rate):
        raise UserError(
            f"--window_seconds {args.window_seconds:g}: shorter than {WINDOW_CONTEXTS:g} times the "
            f"{context:g} s of context that run in a call; give {least:g} or more, or a smaller "
            "--context_seconds"
        )
    return args.window_seconds


def starting_tokenizer(
    texts: Sequence[str], vocab_size: int, init_from: str | None
) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it is that of `init_from`, so that its embeddings fit.

    A new one is trained where none is there to inherit, or it cannot spell all of `texts`.
    """
    theirs = None
    if init_from:
        theirs = checkpoints.load_checkpoint(init_from, with_trainer=False).tokenizer
    if theirs is not None:
        tokenizer = Tokenizer.from_str(theirs)
        unknown = tokenizer.token_to_id("<unk>")
        lacking = [text for text in texts if unknown in tokenizer.encode(f" {text}").ids]
        if not lacking:
            return tokenizer, True
        print(f"init_from {init_from}: its tokenizer cannot spell {lacking[0]!r}: a new one")
    return train_tokenizer(texts, vocab_size), False


def description(run: training.Run, model: S2S, rows, hours: float) -> str:
    """What the user reads before step 1, beside the settings and the forecast."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"preset {run.args.preset}: dialogue LM {parameters:.1f}M parameters, "
        f"vocabulary {c.vocab_size}, patch {1000 / c.patch_rate:.0f} ms, "
        f"depth order {c.depth_order}, device {run.device}\n"
        f"backbone: none (random weights); codec {c.codec_fingerprint[:16]}\n"
        f"data: {len(rows)} conversations, {hours:.1f} h"
    )


def new_config(args, settings: Settings, codec: Codec, tokenizer: Tokenizer) -> S2SConfig:
    """The sizes of a new LM: the preset's, with what flags and settings say."""
    make = S2SConfig.base if args.preset == "base" else S2SConfig.tiny
    rate = codec.config.frame_rate / settings.frames_per_step
    seconds = args.context_seconds or make().context / make().patch_rate
    return make(
        context=max(1, round(seconds * rate)),
        text_weight=settings.text_weight,
        eagerness=args.eagerness,
        codebook_sizes=codec.config.codebook_sizes[:8],
        codec_fingerprint=codec.fingerprint,
        frame_rate=codec.config.frame_rate,
        frames_per_step=settings.frames_per_step,
        depth_order=settings.depth_order,
        acoustic_delay=settings.acoustic_delay,
        vocab_size=tokenizer.get_vocab_size(),
        hear_self=args.agent_window_drop < 1,
        phones=PHONES,
    )


def export(args) -> None:
    """Writes the newest checkpoint in half precision, as the demo takes it."""
    checkpoints.check_export(args)
    checkpoint = checkpoints.load_checkpoint(args.checkpoint_dir, with_trainer=False)
    s2s.s2s_config(checkpoint.config, args.checkpoint_dir)  # refuses another model's folder
    tensors = {name: tensor.half() for name, tensor in checkpoint.tensors.items()}
    folder = checkpoints.save_export(
        args.export, checkpoint.step, checkpoint.config, tensors, checkpoint.tokenizer
    )
    print(f"wrote {folder}: dialogue LM of step {checkpoint.step}")


def config_and_tokenizer(
    args, settings: Settings, checkpoint: checkpoints.Checkpoint | None, codec: Codec, rows
) -> tuple[S2SConfig, Tokenizer, bool]:
    """Those of the run that goes on, or new ones; and whether the tokenizer is `--init_from`'s.

    Raises UserError where the run was trained on another codec's codes.
    """
    if checkpoint is None:
        texts = all_texts(rows)
        tokenizer, inherited = starting_tokenizer(texts, args.vocab_size, args.init_from)
        return new_config(args, settings, codec, tokenizer), tokenizer, inherited
    config = s2s.s2s_config(checkpoint.config, checkpoint.path)
    config = dataclasses.replace(config, eagerness=args.eagerness)
    if config.codec_fingerprint != codec.fingerprint:
        raise UserError(
            f"{checkpoint.path}: trained on codes of codec {config.codec_fingerprint[:16]}, "
            f"--codec is {codec.fingerprint[:16]}; give the codec it was trained with"
        )
    return config, Tokenizer.from_str(checkpoint.tokenizer), False


def train(args, run: training.Run) -> None:
    """The training itself, within its run."""
    process, device, settings, checkpoint = run.process, run.device, run.settings, run.checkpoint

    # Data: windows of calls, encoded with the codec that names the codes.
    codec = Codec.from_checkpoint(args.codec)
    (rows, frames), held_out, hours = load_rows(args, codec.fingerprint)
    config, tokenizer, same_tokens = config_and_tokenizer(args, settings, checkpoint, codec, rows)
    args.window_seconds = fitting_window(args, config)
    codebooks = [book.embedding for book in codec.quantizer.codebooks[:8]]
    # First the transcripts and replies alone, then with the agent's codes.
    items = run.plan(hours, lambda total: {"asr": 0, "dialogue": int(args.asr_share * total)})
    near = s2s.code_neighbours(codebooks)
    dataset = Conversations(rows, config, tokenizer, args, settings, items, frames, near)
    validation = validation_batches(*held_out, config, tokenizer, args, settings)

    # Model and optimizer: new, inherited or those of the run's checkpoint.
    model = S2S(config).to(device).train()
    if checkpoint is None:
        model.code_tables.start_from(codebooks)
        if args.init_from:
            # Weights tied to token ids only with the same tokenizer.
            tied = () if same_tokens else ("text_embedding", "text_head", "depth_text")
            checkpoints.inherit_weights(model, args.init_from, tied)
    else:
        model.load_tensors(checkpoint.tensors, checkpoint.path)
    groups = training.parameter_groups([model], weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=True)
    guard = training.StepGuard()
    run.parts |= {"optimizer": optimizer, "guard": guard}
    del checkpoint
    run.restore()
    training.start_equal([model])

    def step(batch: Batch, phase: str) -> dict[str, Tensor]:
        """Forward, losses, backward, step; gives what there is to log."""
        batch = batch.to(device)
        generator = training.keyed_generator(args.seed, run.step, process.rank)
        torch.manual_seed(generator.initial_seed())  # dropout: a resumed run draws the same
        loss, losses, metrics = batch_losses(model, batch, speak=phase == "dialogue")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training.average_gradients(model.parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.found_inf = guard.watch(loss, norm)  # 1: the fused optimizer stands still
        optimizer.step()
        row = {**losses, **metrics, "loss": loss, "grad_norm": norm}
        return {name: value.detach() for name, value in row.items()}

    run.stored = lambda: {
        "config": s2s.stored_config(config),
        "tensors": model.state_dict(),
        "tokenizer": tokenizer.to_str(),
    }
    run.validate = lambda: validate(model, validation, device)
    run.best_by, run.shown = "validation_text", SHOWN
    first = collate([dataset[(0, i)] for i in range(args.batch_size // process.world_size)])[0]
    run.estimate(lambda phase: step(first, phase), [model])
    run.begin(description(run, model, rows, hours))

    place = (sys.maxsize, run.epoch, run.consumed)
    batches = training_batches(dataset, args.batch_size, run.workers, process, *place, collate)
    for batch, overflow in run.steps(batches):
        rate = args.lr * run.schedule.rate(run.step, final_ratio=0.05)
        training.set_learning_rate(optimizer, rate)
        row = step(batch, run.phase)
        run.step_done(lambda: {**row, "lr": rate, "text_overflow": overflow})  # noqa: B023


def main() -> None:
    args = parse_args()
    if args.export:
        return export(args)
    with training.open_training("s2s", args, PRESETS, CHANGEABLE) as run:
        train(args, run)


if __name__ == "__main__":
    command.run(main)
