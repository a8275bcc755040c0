#!/usr/bin/env python3
"""Phase 3: train the dialogue LM on conversations encoded by make_conversations.py.

    python train_s2s.py --data_dirs data/conversations/scripted --codec checkpoints/tiny/codec \
        --checkpoint_dir checkpoints_s2s

The same command goes on from the last complete checkpoint. The first `--asr_share` of the steps
trains speech recognition and the replies' text alone, without codes, which costs half as much;
then it learns to speak.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import statistics
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset

import backbone as backbones
import checkpoints
import command
import training
from codec import Codec
from command import UserError, number, share, whole
from data import frame_labels, split_for, training_batches
from dialogues import ANY_EMOTION, load_code_dataset
from phones import PHONES
from s2s import IGNORE, MAX_TURN_PATCHES, PAD, S2S, Batch, S2SConfig
from training import one_of, setting
from transformer import TransformerConfig

WEIGHTS = {"text": 1.0, "semantic": 1.0, "acoustic": 1.0,
           "user_phones": 1.0, "user_words": 1.0, "user_text": 1.0, "user_speaking": 0.2,
           "turn_end": 0.2, "user_emotion": 0.1, "user_voice": 0.1, "language": 0.1}  # fmt: skip
SHOWN = {"loss": "loss", "text": "text", "text_accuracy": "hit",
         "user_phones_accuracy": "phones", "user_words_accuracy": "words"}  # fmt: skip
CHANGEABLE = ("lr", "backbone_lr", "codec", "eagerness")
SILENT_SHARE = 0.25  # odds of a patch in which the agent is silent to have its codes learnt
FROM_THE_START = 0.25  # of the windows begin where a conversation does, the others anywhere
WINDOW_CONTEXTS, VALIDATION_CONTEXTS = 1.5, 3  # lengths, in attention contexts
LEAD_PATCHES = 250  # of a long conversation before its window
SHORTEST = 4  # frames of a conversation: the longest patch
MIN_TURN_PATCHES = 50  # turns without word times: a window has room for one in as many patches
MAX_TURN_TOKENS = 128  # of one of them; longer ones are not learnt from


@dataclass(frozen=True)
class WindowSettings(training.Settings):
    """What is done to windows of calls."""

    code_noise: float = setting(0.1, share, "share of user codes replaced by near ones")
    frame_drop: float = setting(0.05, share, "share of user frames masked")
    agent_drop: float = setting(0.3, share, "share of the agent's past levels and frames masked")
    language_drop: float = setting(0.5, share, "share of windows without the language's label")


@dataclass(frozen=True)
class Settings(WindowSettings):
    """What `--set` changes of the LM's training."""

    BEFORE = {"backbone": "none"}
    frames_per_step: int = setting(2, one_of(1, 2, 4), "codec frames in a patch")
    depth_order: str = setting("level", one_of("level", "frame"), "in which codes are written")
    acoustic_delay: int = setting(0, whole(0, 100), "frames")
    text_weight: float = setting(10.0, number(above=0), "of a token against PAD, in the loss")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, plan, more = training.run_parser(
        "Phase 3: train the dialogue LM.", Settings, data_dirs=["data/conversations/scripted"],
        num_epochs=20, checkpoint_dir="checkpoints_s2s", warmup_steps=300)  # fmt: skip
    plan.add_argument("--codec", default="checkpoints/tiny/codec", help="that encoded the data")
    plan.add_argument("--lr", type=number(0), default=3e-4)
    add = more.add_argument
    window_flags(add)
    add("--backbone", default="auto", help="Hugging Face id, folder or GGUF file of a Gemma 3, "
        f"Qwen 3 or Llama; none; auto: {backbones.RECOMMENDED} for base on CUDA")  # fmt: skip
    add("--backbone_lr", type=number(0), default=5e-5, help="of its layers and tokens")
    add("--trim_vocab", type=whole(0), default=64_000, help="most tokens of it that stay; 0: all")
    add("--vocab_size", type=whole(3), default=2048, help="of a new tokenizer")
    add("--context_seconds", type=number(0.1, 4000), help="attended to; by default the preset's")
    add("--asr_share", type=share, default=0.3, help="of the steps, without codes")
    add("--eagerness", type=number(-100, 100), default=5.0, help="dB on its odds of speaking")
    args = parser.parse_args(argv)
    args.given = parser.given(argv)
    return args


def window_flags(add: Callable) -> None:
    """The flags of windows of calls, beside WindowSettings."""
    add("--window_seconds", type=number(0.1, 6000), help="by default 1.5 times the context")
    add("--depth_fraction", type=share, default=0.15, help="of a window's patches spoken")
    add("--acoustic_drop", type=share, default=0.6, help="windows losing user levels; 1: all but 0")
    add("--agent_window_drop", type=share, default=0.5,
        help="windows without the agent's own past codes; 1: none ever")  # fmt: skip
    add("--emotion_drop", type=share, default=0.1, help="windows without the emotion's label")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer (Sennrich et al. 2016) with PAD as id 0; spaces belong to the next word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = {"special_tokens": ["<pad>", "<unk>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **special)
    # Every word also with its space before it: words are encoded one by one.
    tokenizer.train_from_iterator(itertools.chain(texts, (f" {text}" for text in texts)), trainer)
    return tokenizer


class Conversations(Dataset):
    """Windows of calls as the LM reads them, drawn by (seed, epoch, index) alone. A call is made of
    conversations of one language, laid end to end, each drawn at random; every patch of the data is
    as likely to be in a window. Items are dicts of `s2s.Batch`'s tensors, without its batch axis.

    frames: of each row. near: `near_codes`; None: codes stay as they are, all of them learnt."""

    def __init__(self, rows, frames, config: S2SConfig, tokenizer: Tokenizer, args,
                 settings: Settings, items: int, near: Tensor | None = None) -> None:  # fmt: skip
        self.rows, self.config, self.tokenizer = rows, config, tokenizer
        self.args, self.settings, self.items, self.near = args, settings, items, near
        self.patches = round(args.window_seconds * config.patch_rate)
        self.depth_patches = max(1, round(args.depth_fraction * self.patches))
        self.phone_ids = {phone: i for i, phone in enumerate(config.phones)}
        self.ends = np.cumsum(np.asarray(frames, np.int64) // config.frames_per_step)
        languages = np.array(rows.with_format(None)["language"][:])
        self.alike = {name: np.flatnonzero(languages == name) for name in set(languages)}

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        rng = training.item_rng(self.args.seed, *key)
        window = self.window(rng)
        window |= {"agent_past": window["agent_codes"], "depth_patches": torch.arange(self.patches)}
        speaking = window.pop("agent_speaking")
        if self.config.emotion_dim:
            window["emotion_codes"] = window["user_codes"]
        if self.near is not None:
            self.disturb(window, speaking, rng)
        steered = window.pop("steered")
        if rng.random() < self.args.emotion_drop and not steered:
            window["agent_emotion"].zero_()
        if rng.random() < self.settings.language_drop:
            window["language"].zero_()
        return window

    def disturb(self, window: dict, speaking: Tensor, rng: np.random.Generator) -> None:
        """Corrupts the codes that the LM reads, and draws the patches whose codes are learnt."""
        args, settings = self.args, self.settings
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        user = replace_codes(window["user_codes"], self.near, settings.code_noise, generator)
        window["user_codes"] = drop_codes(user, generator, args.acoustic_drop, settings.frame_drop)
        # The agent's past codes too: in a call the text must not follow a slip of the voice.
        drops = settings.agent_drop, settings.agent_drop, args.agent_window_drop
        window["agent_past"] = drop_codes(window["agent_past"], generator, *drops)
        odds = torch.where(speaking, 1.0, SILENT_SHARE)
        drawn = torch.rand(self.patches, generator=generator) ** (1 / odds)  # weighted, each once
        window["depth_patches"] = drawn.topk(self.depth_patches).indices.sort().values

    def window(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """`self.patches` patches of a call, from a place in its first conversation on."""
        first, begins = self.first(rng)
        row, begins = trimmed(self.rows[first], begins, self.patches, self.config)
        rows, end = [row], begins + self.patches
        room = end - self.length(row)
        while room > 0:
            rows.append(self.rows[self.following(rng, row)])
            room -= self.length(rows[-1])
        emotions = rng.integers(len(self.config.emotions) + 1, size=2).tolist()
        drawn = list(zip((0, int(rng.integers(end))), emotions, strict=True))
        row = joined(rows, self.config)
        call = self.labelled(row, drawn)
        window = {name: v[begins:end].clone() if v.dim() else v for name, v in call.items()}
        # Without its label such speech would be any emotion's, frame by frame.
        window["steered"] = any(row["source"] == ANY_EMOTION for row in rows)
        return window | self.untimed(row, begins)

    def first(self, rng: np.random.Generator) -> tuple[int, int]:
        """The row that a window begins in, and the patch of it."""
        place = int(rng.integers(self.ends[-1]))
        row = int(np.searchsorted(self.ends, place, side="right"))
        begins = place - int(self.ends[row - 1] if row else 0)
        return row, 0 if rng.random() < FROM_THE_START else begins

    def following(self, rng: np.random.Generator, row: dict) -> int:
        """A row to lay behind `row` in one call."""
        alike = self.alike[row["language"]]
        return int(alike[rng.integers(len(alike))])

    def length(self, row: dict) -> int:  # in whole patches
        return len(row["user_codes"]) // self.config.frames_per_step

    def labelled(self, row: dict, emotions: Sequence[tuple[int, int]] = ()) -> dict[str, Tensor]:
        """Codes, text and labels of all patches of a conversation, and `agent_speaking`. A patch is
        labelled by what holds at its end. `emotions` (0: none), each from a patch on in
        which the agent is silent until its next turn: drawn at random they say nothing about the
        reply, and one that a caller sets in mid-call is nothing new."""
        c, p, count = self.config, self.config.frames_per_step, self.length(row)
        window = turn_labels(row, count, c, self.phone_ids)
        window["user_words"] = self.user_words(row, count)
        for name, delay in (("user_codes", 0), ("agent_codes", c.acoustic_delay)):
            codes = torch.from_numpy(row[name].astype(np.int64))
            late = nn.functional.pad(codes[:, 1:], (0, 0, delay, 0), value=IGNORE)[: len(codes)]
            codes = torch.cat((codes[:, :1], late), dim=1)  # acoustic levels `delay` frames later
            window[name] = codes[: count * p].unflatten(0, (count, p))
        turns = [turn for turn in row["turns"] if turn["who"] == "agent"]
        words = [self.agent_words(turn) if turn["text"] else [] for turn in turns]
        text, starts, overflow = place_tokens(sum(words, []), count, c.patch_rate)
        emotion, begins = torch.zeros(count, dtype=torch.long), []
        starts = iter(starts)
        for turn, spoken in zip(turns, words, strict=True):
            patches = [next(starts) for _ in spoken]
            begun = max([int(turn["start"] * c.patch_rate + 1e-6), *patches[:1]])
            # From a turn's begin to the next's: how to speak, never that it is time to, nor what.
            known = turn["emotion"] in c.emotions
            emotion[begun + 1 :] = c.emotions.index(turn["emotion"]) + 1 if known else 0
            begins.append(begun + 1)
        for patch, value in emotions:
            if not window["agent_speaking"][patch]:
                emotion[patch : min((b for b in begins if b > patch), default=count)] = value
        known = row["language"] in c.languages
        language = torch.tensor(c.languages.index(row["language"]) + 1 if known else 0)
        window |= {"agent_emotion": emotion, "text": text, "language": language}
        return window | {"overflow": torch.tensor(overflow)}

    def agent_words(self, turn: dict) -> list[tuple[list[int], float]]:
        """Tokens and start of each word; without word times, spread evenly over the turn."""
        words = turn["words"]
        if not words:
            texts = turn["text"].split()
            length = (turn["end"] - turn["start"]) / max(1, len(texts))
            words = [(word, turn["start"] + i * length, None) for i, word in enumerate(texts)]
        # A leading space gives a word the same tokens wherever it stands in the sentence.
        encode = self.tokenizer.encode
        spaced = (word if i == 0 else f" {word}" for i, (word, _, _) in enumerate(words))
        return [(encode(x).ids, start) for x, (_, start, _) in zip(spaced, words, strict=True)]

    def user_words(self, row: dict, count: int) -> Tensor:
        """The user's words as tokens `[count]`, `listen_delay` late; unknown in untimed turns."""
        rate, late = self.config.patch_rate, self.config.listen_delay
        turns = [turn for turn in row["turns"] if turn["who"] == "user"]
        words = [word for turn in turns for word in turn["words"] or ()]
        timed = [(self.word_tokens(word), end + late / rate) for word, _, end in words]
        tokens = place_tokens(timed, count, rate)[0]
        for turn in turns:
            if not turn["words"]:
                tokens[self.patches_of(turn)] = IGNORE
        return tokens

    def patches_of(self, turn: dict) -> slice:
        """The patches in which a turn's words are recognised, `listen_delay` late at its end."""
        start, end = (round(turn[side] * self.config.patch_rate) for side in ("start", "end"))
        return slice(start, end + self.config.listen_delay)

    def word_tokens(self, word: str) -> list[int]:
        plain = spoken_form(word)
        return self.tokenizer.encode(f" {plain}").ids if plain else []

    def untimed(self, row: dict, begins: int) -> dict[str, Tensor]:
        """The fields `untimed_*` of `s2s.Batch` of the window from patch `begins` on, of one shape.
        Left out are turns that touch an edge of the window, and may be cut, or are too long."""
        room = max(1, self.patches // MIN_TURN_PATCHES)
        first, counts = torch.zeros(2, room, dtype=torch.long)
        patches, found = torch.ones_like(first), 0
        tokens, labels = torch.zeros(2, room, MAX_TURN_TOKENS, dtype=torch.long)
        for turn in row["turns"]:
            if turn["who"] != "user" or not turn["text"] or turn["words"] or found == room:
                continue
            said = [t for word in turn["text"].split() for t in self.word_tokens(word)]
            at = range(self.length(row))[self.patches_of(turn)]
            fits = 0 < len(said) <= min(len(at), MAX_TURN_TOKENS) and len(at) <= MAX_TURN_PATCHES
            if fits and begins < at.start and at.stop < begins + self.patches:
                first[found], patches[found], counts[found] = at.start - begins, len(at), len(said)
                tokens[found, : len(said)] = torch.tensor(said)
                # Equal tokens have equal labels: CTC needs a blank between neighbours that are.
                labels[found, : len(said)] = torch.tensor([said.index(t) + 1 for t in said])
                found += 1
        return {"untimed_first": first, "untimed_patches": patches, "untimed_counts": counts,
                "untimed_tokens": tokens, "untimed_labels": labels}  # fmt: skip


def spoken_form(word: str) -> str:
    """Without capitals and full stops, which speech does not tell."""
    return word.strip(string.punctuation + "।…—").lower()


def place_tokens(words: Sequence[tuple[list[int], float]], count: int, rate: float) -> tuple:
    """Words (tokens, seconds) as at most one token a patch, each from its time on, behind those
    that wait: tokens `[count]`, the patch of each word's first, and how many found no place."""
    text, starts, free, overflow = [PAD] * count, [], 0, 0
    for tokens, seconds in words:
        free = max(free, int(seconds * rate + 1e-6))
        starts.append(free)
        placed = tokens[: max(0, count - free)]
        text[free : free + len(placed)] = placed
        free += len(placed)
        overflow += len(tokens) - len(placed)
    return torch.tensor(text), starts, overflow


def turn_labels(row: dict, count: int, config: S2SConfig, phone_ids: dict) -> dict[str, Tensor]:
    """What heads recognise, but words (phones `listen_delay` late), and `agent_speaking`."""
    c, turns, frames = config, row["turns"], count * config.frames_per_step
    speaking, turn_end = torch.zeros(2, count, dtype=torch.long)
    emotion, language = torch.full((2, count), IGNORE)
    agent_speaking = torch.zeros(count, dtype=torch.bool)
    phones = np.zeros(frames, np.int64)
    for turn, following in itertools.zip_longest(turns, turns[1:]):
        start, end = (round(turn[side] * c.patch_rate) for side in ("start", "end"))
        if turn["who"] == "agent":
            agent_speaking[start : end + 1] = True
            continue
        speaking[start:end] = 1
        if turn["emotion"] in c.emotions:
            emotion[start:end] = c.emotions.index(turn["emotion"])
        if row["language"] in c.languages:
            language[start:end] = c.languages.index(row["language"])
        if following and following["who"] == "agent" and following.get("part") == turn.get("part"):
            turn_end[end : round(following["start"] * c.patch_rate)] = 1
        first = int(turn["start"] * c.frame_rate + 1e-6)
        last = min(frames, int(np.ceil(turn["end"] * c.frame_rate - 1e-6)))
        if last > first:  # unknown where the turn has no phones
            labels = frame_labels(turn["phones"], phone_ids, last - first, first / c.frame_rate)
            phones[first:last] = labels
    late = c.listen_delay * c.frames_per_step
    phones = np.roll(phones, late)
    phones[:late] = IGNORE
    phones = torch.from_numpy(phones).unflatten(0, (count, c.frames_per_step))
    window = {"user_speaking": speaking, "turn_end": turn_end, "agent_speaking": agent_speaking}
    return window | {"user_emotion": emotion, "language_label": language, "user_phones": phones}


def trimmed(row: dict, begins: int, patches: int, config: S2SConfig) -> tuple[dict, int]:
    """A long conversation without most of what a window of `patches` from patch `begins` on does
    not see, and where the window then begins. It is cut between two turns, and well before the
    window: words that wait for a patch come from there."""
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
    p, now, turns, codes = config.frames_per_step, 0.0, [], {"user_codes": [], "agent_codes": []}
    for part, row in enumerate(rows):
        frames = len(row["user_codes"]) // p * p
        for name, parts in codes.items():
            parts.append(row[name][:frames])
        turns += [{**moved(turn, now), "part": part} for turn in row["turns"]]
        now += frames / config.frame_rate
    return {**rows[0], "turns": turns, **{n: np.concatenate(parts) for n, parts in codes.items()}}


def moved(turn: dict, seconds: float) -> dict:  # so much later
    later = {**turn, "start": turn["start"] + seconds, "end": turn["end"] + seconds}
    for name in ("words", "phones"):
        if turn[name]:
            later[name] = [[text, a + seconds, b + seconds] for text, a, b in turn[name]]
    return later


def near_codes(codebooks: Sequence[Tensor], count: int = 8) -> Tensor:
    """The nearest other codes of each, of codebooks `[n, d]`: `[K, n, count]`, filled up with 0."""
    tables = []
    for book in codebooks:
        distances = torch.cdist(book.float(), book.float()).fill_diagonal_(float("inf"))
        near = distances.topk(min(count, len(book) - 1), largest=False).indices
        tables.append(near[:, torch.arange(count) % near.shape[1]])
    return nn.utils.rnn.pad_sequence(tables, batch_first=True)


def replace_codes(codes: Tensor, near: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Codes `[P, p, K]` of which a `share` is replaced by one of its `near_codes`."""
    replaced = torch.rand(codes.shape, generator=generator) < share
    which = torch.randint(near.shape[-1], codes.shape, generator=generator)
    return torch.where(replaced, near[torch.arange(codes.shape[-1]), codes, which], codes)


def drop_codes(codes: Tensor, generator, levels: float, frames: float, window=0.0) -> Tensor:
    """Dropout of codes `[P, p, K]`, as new voices and rooms ask for: with probability `levels` only
    the first few levels stay (at least the semantic one), with probability `window` none; each
    frame loses all its codes with probability `frames`."""
    count = codes.shape[-1]
    few = int(torch.randint(1, count + 1, (1,), generator=generator))
    some, none = torch.rand(2, generator=generator).tolist()
    stay = 0 if none < window else few if some < levels else count
    lost = torch.rand(codes.shape[:2], generator=generator) < frames
    return codes.masked_fill(lost[..., None] | (torch.arange(count) >= stay), IGNORE)


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


def load_rows(folders: Sequence[str], fingerprint: str):
    """(training rows, validation rows, hours of training) of all `folders`: rows with their
    frames; those shorter than a patch are left out, and counted."""
    from datasets import concatenate_datasets

    parts = [load_code_dataset(folder, fingerprint)[0] for folder in folders]
    frames = np.concatenate([row_frames(part) for part in parts])
    # Concatenating drops the transform that decodes rows; it is the same for every part.
    rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    rows = rows.with_transform(parts[0].format["format_kwargs"]["transform"])
    plain = rows.select_columns(["id", "split"]).with_format(None)[:]
    places = {"train": [], "validation": [], "test": []}
    for i, (name, named) in enumerate(zip(plain["id"], plain["split"], strict=True)):
        held_out = named == "train" and split_for(name, 0.02, 0.0) != "train"
        if frames[i] >= SHORTEST:
            places["validation" if held_out else named].append(i)
    if short := int((frames < SHORTEST).sum()):
        too = f"shorter than {SHORTEST} codec frames"
        print(f"{short} of {len(frames)} conversations left out: {too}")
    train, where = places["train"], ", ".join(map(str, folders))
    if not train:
        raise UserError(f"{where}: no conversations of split train; run make_conversations.py")
    chosen = train, places["validation"] or train[:8]
    return *((rows.select(part), frames[part]) for part in chosen), frames[train].sum() / 50 / 3600


def all_texts(rows) -> list[str]:
    """The words of up to 20,000 conversations, for the tokenizer."""
    first = rows.select(range(min(len(rows), 20_000)))
    return sorted({text for _, texts in turn_fields(first, "text") for text in texts if text})


def turn_fields(rows, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
    """(row of each turn, a field of each turn…) of a thousand rows at a time, read as columns: the
    phones of a large dataset do not fit into memory as Python's objects."""
    batches = rows.select_columns("turns").with_format("arrow").iter(batch_size=1000)
    for batch, table in enumerate(batches):
        turns = table["turns"].combine_chunks()
        counts = turns.value_lengths().to_numpy()
        fields = turns.flatten()
        found = (fields.field(name).to_numpy(zero_copy_only=False) for name in names)
        yield np.repeat(1000 * batch + np.arange(len(counts)), counts), *found


def batch_losses(model: S2S, batch: Batch, speak: bool, split: int | None = None):
    """(whole loss, losses, metrics) of a batch."""
    losses, metrics = model.losses(batch, speak, split)
    return sum(WEIGHTS[name] * loss for name, loss in losses.items()), losses, metrics


@torch.no_grad()
def validate(model: S2S, batches: list[Batch], device, cast=None) -> dict[str, float]:
    """Mean losses and accuracies over held-out calls, all codes of them. The text's and the phones'
    also apart within and past the attention context, where the window slides as in a call."""
    model.eval()
    rows = []
    for batch in batches:
        with cast or contextlib.nullcontext():
            _, losses, metrics = batch_losses(model, batch.to(device), True, model.config.context)
        rows.append({name: float(value) for name, value in {**losses, **metrics}.items()})
    model.train()
    return {f"validation_{name}": statistics.fmean(row[name] for row in rows) for name in rows[0]}


def validation_batches(rows, frames, config, tokenizer, args, settings, count=4) -> list[Batch]:
    """`count` batches of four held-out calls, three times the attention context long."""
    seconds = VALIDATION_CONTEXTS * config.context / config.patch_rate
    args = argparse.Namespace(**{**vars(args), "emotion_drop": 1.0, "window_seconds": seconds})
    settings = dataclasses.replace(settings, language_drop=1.0)
    calls = Conversations(rows, frames, config, tokenizer, args, settings, 4 * count)
    return [collate([calls[(0, 4 * i + j)] for j in range(4)])[0] for i in range(count)]


def fitting_window(args, config: S2SConfig) -> float:
    """`--window_seconds`, by default 1.5 attention contexts. Raises UserError for less: positions
    past the window would run in a call, and never be trained."""
    context = config.context / config.patch_rate
    least = WINDOW_CONTEXTS * context
    seconds = least if args.window_seconds is None else args.window_seconds
    if round(seconds * config.patch_rate) < round(least * config.patch_rate):
        raise UserError(f"--window_seconds {seconds:g}: shorter than {WINDOW_CONTEXTS:g} times the "
                        f"{context:g} s of context that run in a call; give {least:g} or more, or "
                        "a smaller --context_seconds")  # fmt: skip
    return seconds


def starting_tokenizer(texts: list[str], size: int, init_from: checkpoints.Checkpoint | None):
    """The tokenizer of `init_from`, where there is one that can spell all of `texts`, or a new one;
    and whether it is inherited, so that its embeddings fit."""
    if init_from and init_from.tokenizer:
        tokenizer = Tokenizer.from_str(init_from.tokenizer)
        if not (lacking := unspelled(tokenizer, texts)):
            return tokenizer, True
        print(f"init_from {init_from.path}: its tokenizer cannot spell {lacking[0]!r}: a new one")
    return train_tokenizer(texts, size), False


def unspelled(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts that hold what the tokenizer cannot spell: it would be learnt as <unk>."""
    unknown = tokenizer.token_to_id("<unk>")
    return [text for text in texts if unknown in tokenizer.encode(f" {text}").ids]


def description(run: training.Run, model: S2S, rows, hours: float) -> str:
    """What the user reads before step 1, beside the settings and the forecast."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    theirs = run.args.init_from
    source = f"inherited from {theirs}" if theirs else f"backbone: {run.args.backbone}"
    return (f"preset {run.args.preset}: dialogue LM {parameters:.1f}M parameters, vocabulary "
            f"{c.vocab_size}, patch {1000 / c.patch_rate:.0f} ms, depth order {c.depth_order}, "
            f"device {run.device}\n{source}; codec {c.codec_fingerprint[:16]}\n"
            f"data: {len(rows)} conversations, {hours:.1f} h")  # fmt: skip


def spellings(texts: Sequence[str]) -> Iterator[str]:
    """Every word of `texts` in the ways in which `Conversations` spells it."""
    for text in texts:
        words = text.split()
        yield from words[:1]
        yield from (f" {form}" for word in words for form in (word, spoken_form(word)))


def chosen_backbone(args, device: torch.device, texts: list[str]) -> backbones.Backbone | None:
    """That of a new LM, with the tokens that `texts` need; None without, or with `--init_from`."""
    if args.backbone == "auto":
        wanted = args.preset == "base" and device.type == "cuda" and not args.init_from
        args.backbone = backbones.RECOMMENDED if wanted else "none"
    if args.backbone == "none":
        return None
    if args.init_from:
        raise UserError("--backbone and --init_from: give one; an LM keeps the backbone it has")
    return backbones.trimmed(
        backbones.load_backbone(args.backbone), spellings(texts), args.trim_vocab)  # fmt: skip


def new_config(args, settings: Settings, codec: Codec, tokenizer: Tokenizer,
               temporal: TransformerConfig | None = None) -> S2SConfig:  # fmt: skip
    """The sizes of a new LM: the preset's, with what flags, settings and a backbone say."""
    make = S2SConfig.base if args.preset == "base" else S2SConfig.tiny
    if temporal:
        sizes = "dim", "num_layers", "num_heads"
        given = {name: getattr(temporal, name) for name in sizes}
        make = functools.partial(make, temporal=temporal, **given)
    rate = codec.config.frame_rate / settings.frames_per_step
    seconds = args.context_seconds or make().context / make().patch_rate
    shared = ("text_weight", "frames_per_step", "depth_order", "acoustic_delay")
    return make(
        **{name: getattr(settings, name) for name in shared}, phones=PHONES,
        context=max(1, round(seconds * rate)), eagerness=args.eagerness,
        codebook_sizes=codec.config.codebook_sizes[:8], codec_fingerprint=codec.fingerprint,
        frame_rate=codec.config.frame_rate, vocab_size=tokenizer.get_vocab_size(),
        hear_self=args.agent_window_drop < 1,
        user_levels=1 if args.acoustic_drop == 1 else None)  # fmt: skip


def s2s_config(checkpoint: checkpoints.Checkpoint) -> S2SConfig:
    return checkpoints.config_of(S2SConfig, "s2s", checkpoint.config, checkpoint.path)


def export(args) -> None:
    """Writes the newest checkpoint in half precision, as the demo takes it."""
    checkpoint = checkpoints.to_export(args)
    s2s_config(checkpoint)  # refuses another model's folder
    tensors = {name: tensor.half() for name, tensor in checkpoint.tensors.items()}
    made = checkpoint.step, checkpoint.config, tensors, checkpoint.tokenizer
    folder = checkpoints.save_export(args.export, *made)
    print(f"wrote {folder}: dialogue LM of step {checkpoint.step}")


def check_codec(config: S2SConfig, codec: Codec, path: str | Path) -> None:
    """Raises UserError where the LM at `path` was trained on another codec's codes."""
    if config.codec_fingerprint != codec.fingerprint:
        theirs, given = (x[:16] for x in (config.codec_fingerprint, codec.fingerprint))
        raise UserError(f"{path}: trained on codes of codec {theirs}, --codec is {given}; give the "
                        "codec it was trained with")  # fmt: skip


def resumed_config(args, checkpoint: checkpoints.Checkpoint, codec: Codec):
    """Config and tokenizer of the run that goes on."""
    config = dataclasses.replace(s2s_config(checkpoint), eagerness=args.eagerness)
    check_codec(config, codec, checkpoint.path)
    return config, Tokenizer.from_str(checkpoint.tokenizer)


def new_lm(args, settings: Settings, codec: Codec, rows, device: torch.device):
    """Config, tokenizer, backbone or None, and whether the tokenizer is `--init_from`'s."""
    texts, inherited = all_texts(rows), False
    if backbone := chosen_backbone(args, device, texts):
        tokenizer, temporal = Tokenizer.from_str(backbone.tokenizer), backbone.layers
    else:
        theirs = args.init_from and checkpoints.load_checkpoint(args.init_from, with_trainer=False)
        tokenizer, inherited = starting_tokenizer(texts, args.vocab_size, theirs)
        temporal = s2s_config(theirs).temporal if theirs else None
    config = new_config(args, settings, codec, tokenizer, temporal)
    return config, tokenizer, backbone, inherited


def train(args, run: training.Run) -> None:
    process, device, settings, checkpoint = run.process, run.device, run.settings, run.checkpoint

    # Data: windows of calls, encoded with the codec that names the codes.
    codec = Codec.from_checkpoint(args.codec)
    (rows, frames), held_out, hours = load_rows(args.data_dirs, codec.fingerprint)
    if checkpoint is None:
        config, tokenizer, backbone, same_tokens = new_lm(args, settings, codec, rows, device)
    else:
        config, tokenizer = resumed_config(args, checkpoint, codec)
    args.window_seconds = fitting_window(args, config)
    codebooks = [book.embedding for book in codec.quantizer.codebooks[:8]]
    # First ASR and the replies' text alone, then with the agent's codes.
    items = run.plan(hours, lambda total: {"asr": 0, "dialogue": int(args.asr_share * total)})
    reading = config, tokenizer, args, settings
    dataset = Conversations(rows, frames, *reading, items, near_codes(codebooks))
    validation = validation_batches(*held_out, *reading)

    # Model and optimizers: new, inherited or those of the run's checkpoint.
    model = S2S(config).to(device).train()
    if checkpoint is None:
        model.code_tables.start_from(codebooks)
        if args.init_from:
            # Weights of tokens only with the same tokenizer.
            tied = () if same_tokens else ("text_embedding", "text_head", "depth_text")
            checkpoints.inherit_weights(model, args.init_from, tied)
        if backbone:
            backbones.start_from(model, backbone)
        del backbone
    else:
        checkpoints.fill(model, checkpoint.tensors, checkpoint.path)
    pretrained = [model.temporal, model.text_embedding, model.text_head] if config.temporal else []
    others = [part for part in model.children() if part not in pretrained]
    parts = {"optimizer": others, "backbone": pretrained}
    rates = {"optimizer": args.lr, "backbone": args.backbone_lr}
    optimizers, weights = training.optimizers(parts, rates, (0.9, 0.95), weight_decay=0.05)
    guard = training.StepGuard()
    run.parts |= {**optimizers, "guard": guard}
    del checkpoint
    run.restore()
    training.start_equal([model])

    def step(batch: Batch, phase: str) -> dict[str, Tensor]:
        """Forward, losses, backward, step; gives what there is to log."""
        batch = batch.to(device)
        generator = training.keyed_generator(args.seed, run.step, process.rank)
        torch.manual_seed(generator.initial_seed())  # dropout: a resumed run draws the same
        with run.cast:
            loss, losses, metrics = batch_losses(model, batch, speak=phase == "dialogue")
        model.zero_grad(set_to_none=True)
        loss.backward()
        row = {**losses, **metrics, "loss": loss}
        for name, optimizer in optimizers.items():
            norm = guard.step(optimizer, weights[name], loss, settings.grad_clip)
            row["grad_norm_backbone" if name == "backbone" else "grad_norm"] = norm
        return {name: value.detach() for name, value in row.items()}

    stored = {"config": checkpoints.stored_config("s2s", config), "tokenizer": tokenizer.to_str()}
    run.stored = lambda: {**stored, "tensors": model.state_dict()}
    run.validate = lambda: validate(model, validation, device, run.cast)
    run.best_by, run.shown = "validation_text", SHOWN
    first = collate([dataset[(0, i)] for i in range(args.batch_size // process.world_size)])[0]
    run.estimate(lambda phase: step(first, phase), [model])
    run.begin(description(run, model, rows, hours))

    batches = functools.partial(training_batches, dataset, collate=collate)
    for batch, overflow in run.steps(batches):
        rate = run.schedule.rate(run.step, final_ratio=0.05)
        for name, optimizer in optimizers.items():
            training.set_learning_rate(optimizer, rates[name] * rate)
        row = step(batch, run.phase)
        run.step_done(
            lambda: {**row, "lr": args.lr * rate, "text_overflow": overflow})  # noqa: B023


def main() -> None:
    args = parse_args()
    if args.export:
        return export(args)
    with training.open_training("s2s", args, Settings, CHANGEABLE) as run:
        train(args, run)


if __name__ == "__main__":
    command.run(main)
