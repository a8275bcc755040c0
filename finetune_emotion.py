#!/usr/bin/env python3
"""Phase 4: teach a dialogue LM to tell the user's emotion, to answer it, and to show one itself.

    python finetune_emotion.py --data_dirs data/emotion --codec models/codec \
        --conversations data/conversations/scripted --init_from checkpoints_s2s \
        --checkpoint_dir checkpoints_emotion

The first `--detection_share` of the steps trains the emotion branch alone on emotional speech as
the user's side of a call, the LM frozen. Then all of it learns from conversations whose turns carry
emotions, `--replay` of them others, so that it forgets nothing; the branch goes on with speech. The
same command goes on from the last complete checkpoint.
"""

import argparse
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

import checkpoints
import command
import emotions
import train_s2s
import training
from codec import Codec
from command import UserError, number, share, whole
from data import EMOTIONS, Clip, training_batches
from s2s import IGNORE, S2S, Batch, S2SConfig
from train_s2s import Conversations, batch_losses, collate, turn_fields
from training import setting

SHOWN = {"loss": "loss", "speech": "emotion", "speech_accuracy": "hit", "text": "text",
         "text_accuracy": "words"}  # fmt: skip
CHANGEABLE = ("lr", "branch_lr", "codec", "replay", "conversations")
WITHOUT_EMOTION = ("neutral", "calm", None)
LABELS_RATE = 5.0  # of the LM's: what is added to an input many times as long has far to grow


@dataclasses.dataclass(frozen=True)
class Settings(train_s2s.WindowSettings):
    """What seldom changes; `--set` changes it."""

    emotion_dim: int = setting(0, whole(0), "of the emotion branch, 0: as inherited or half the LM")
    emotion_noise: float = setting(0.25, share, "share of codes replaced that the branch reads")
    speech_weight: float = setting(1.0, number(0), "of emotional speech beside conversations")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, plan, more = training.run_parser(
        "Phase 4: emotion recognised, answered and shown.", Settings, data_dirs=["data/emotion"],
        num_epochs=20, checkpoint_dir="checkpoints_emotion", warmup_steps=100)  # fmt: skip
    add = plan.add_argument
    add("--conversations", nargs="+", default=["data/conversations/scripted"], help="encoded")
    add("--codec", default="checkpoints/tiny/codec", help="that encoded the conversations")
    add("--lr", type=number(0), default=1e-4, help="of the LM")
    add("--replay", type=share, default=0.3, help="of conversations without emotion")
    add = more.add_argument
    add("--branch_lr", type=number(0), default=2e-3, help="of the emotion branch")
    add("--detection_share", type=share, default=0.4, help="of the steps, the LM frozen")
    add("--commercial_only", action="store_true", help="leave out speech that may not be sold")
    # More without a label than in phase 3: as a rule the model is to choose by itself.
    train_s2s.window_flags(add)
    parser.set_defaults(emotion_drop=0.4)
    args = parser.parse_args(argv)
    args.given = parser.given(argv)
    return args


class EmotionalSpeech(Conversations):
    """Windows of a user's emotional speech: each emotion as likely, one speaker a window."""

    def __init__(self, rows, *how, **more) -> None:
        super().__init__(rows, train_s2s.row_frames(rows), *how, **more)
        self.places: dict[str, dict[str, list[int]]] = {}  # by speaker and emotion
        labels = np.concatenate([found for _, found in turn_fields(rows, "emotion")])
        speakers = rows.with_format(None)["source"][:]
        for i, (speaker, label) in enumerate(zip(speakers, labels, strict=True)):
            self.places.setdefault(speaker, {}).setdefault(label, []).append(i)
        shown = sorted({label for own in self.places.values() for label in own})
        places = self.places.items()
        self.speakers = {label: [name for name, own in places if label in own] for label in shown}

    def disturb(self, window: dict, speaking: Tensor, rng: np.random.Generator) -> None:
        """Corrupts what the branch alone reads: it learns a speaker's codes by heart otherwise."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = self.near, self.settings.emotion_noise, generator
        window["emotion_codes"] = train_s2s.replace_codes(window["emotion_codes"], *noise)

    def first(self, rng: np.random.Generator) -> tuple[int, int]:
        """Any emotion, any speaker who shows it, any clip of it."""
        emotion = _any(rng, list(self.speakers))
        return _any(rng, self.places[_any(rng, self.speakers[emotion])][emotion]), 0

    def following(self, rng: np.random.Generator, row: dict) -> int:
        """The same speaker's, any emotion of theirs."""
        own = self.places[row["source"]]
        return _any(rng, own[_any(rng, list(own))])


class EmotionalConversations(Conversations):
    """Windows of which a share of `1 - replay` begins with a conversation whose user shows an
    emotion, each as likely; the others anywhere in those without."""

    def __init__(self, rows, frames: np.ndarray, *how, **more) -> None:
        super().__init__(rows, frames, *how, **more)
        self.shown, self.plain = emotional_rows(rows)

    def first(self, rng: np.random.Generator) -> tuple[int, int]:
        replays = rng.random() < self.args.replay
        if replays and len(self.plain):
            return int(_any(rng, self.plain)), 0
        if replays or not self.shown:
            return super().first(rng)
        return int(_any(rng, self.shown[_any(rng, sorted(self.shown))])), 0


def emotional_rows(rows) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Places of conversations whose user shows an emotion, by emotion, and those of the others."""
    shown: dict[str, list[np.ndarray]] = {}
    plain = np.ones(len(rows), bool)
    for at, who, emotion in turn_fields(rows, "who", "emotion"):
        for name in set(emotion[who == "user"]).difference(WITHOUT_EMOTION):
            places = np.unique(at[(who == "user") & (emotion == name)])
            shown.setdefault(name, []).append(places)
            plain[places] = False
    return {name: np.concatenate(found) for name, found in shown.items()}, np.flatnonzero(plain)


def _any(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.integers(len(choices)))]


class Pairs(Dataset):
    """Items of two datasets, side by side. Before sample `talk_from`, counted from the first epoch
    on, any item stands for the second's: no step uses it."""

    def __init__(self, speech: EmotionalSpeech, talk: EmotionalConversations) -> None:
        self.speech, self.talk, self.spare, self.talk_from = speech, talk, talk[(0, 0)], 0

    def __len__(self) -> int:
        return len(self.talk)

    def __getitem__(self, key: tuple[int, int]) -> tuple[dict, dict]:
        needed = key[0] * len(self) + key[1] >= self.talk_from
        return self.speech[key], self.talk[key] if needed else self.spare


def collate_pairs(items: list[tuple[dict, dict]]) -> tuple[Batch, Batch]:
    return tuple(collate(list(part))[0] for part in zip(*items, strict=True))


def encoded(clips: Sequence[Clip], split: str, codec: Codec, run: training.Run):
    """The code dataset of clips, made once in the run's folder, on the main rank."""
    what = [emotions.GAIN_DB, emotions.MICROPHONES, *((str(c.path), c.emotion) for c in clips)]
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:12]
    folder = Path(run.args.checkpoint_dir) / f"codes_{split}_{name}"
    if run.is_main:
        emotions.encode_clips(clips, codec, folder, 64 if run.device.type == "cuda" else 16)
    training.from_main_rank(0)  # all wait for it
    return emotions.encode_clips(clips, codec, folder)


def inherited_config(args, settings: Settings, codec: Codec) -> tuple[S2SConfig, Tokenizer]:
    """Config and tokenizer of `--init_from`, with an emotion branch; UserError without one."""
    if not args.init_from:
        raise UserError("--init_from: give the dialogue LM to fine-tune, as checkpoints_s2s")
    theirs = checkpoints.load_checkpoint(args.init_from, with_trainer=False)
    config = train_s2s.s2s_config(theirs)
    width = max(book.embedding.shape[1] for book in codec.quantizer.codebooks[:8])
    dim = settings.emotion_dim or config.emotion_dim or config.dim // 2
    config = dataclasses.replace(config, emotion_dim=dim, codebook_dim=width)
    return config, Tokenizer.from_str(theirs.tokenizer)


def speech_losses(model: S2S, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the emotion branch on emotional speech."""
    _, losses, metrics = model.emotion_losses(batch)
    row = {"speech": losses["user_emotion"], "speech_accuracy": metrics["user_emotion_accuracy"]}
    return losses["user_emotion"] + 0.2 * losses["user_voice"], row


@torch.no_grad()
def validate_speech(model: S2S, batches: Sequence[Batch], device) -> dict[str, float]:
    """Cross-entropy, and unweighted accuracy of utterances, of held-out speakers: an utterance is
    what the mean of its patches' log-probabilities says."""
    model.eval()
    hits, losses = np.zeros((len(EMOTIONS), 2)), []
    for batch in batches:
        logits, found, _ = model.emotion_losses(batch.to(device))
        losses.append(float(found["user_emotion"]))
        for row, labels in zip(logits.log_softmax(-1).cpu(), batch.user_emotion, strict=True):
            values, lengths = labels.unique_consecutive(return_counts=True)
            for label, span in zip(values.tolist(), row.split(lengths.tolist()), strict=True):
                if label != IGNORE:
                    hits[label] += (int(span.mean(0).argmax()) == label, 1)
    model.train()
    seen = hits[:, 1] > 0
    accuracy = float((hits[seen, 0] / hits[seen, 1]).mean())
    return {"validation_speech": float(np.mean(losses)), "validation_speech_ua": accuracy}


def train(args, run: training.Run) -> None:
    process, device, settings, checkpoint = run.process, run.device, run.settings, run.checkpoint

    # Data: emotional speech as codes, and conversations that the same codec encoded.
    codec = Codec.from_checkpoint(args.codec, device=device)
    if checkpoint is None:
        config, tokenizer = inherited_config(args, settings, codec)
    else:
        config = train_s2s.s2s_config(checkpoint)
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
    train_s2s.check_codec(config, codec, args.init_from)
    (rows, frames), held_out, hours = train_s2s.load_rows(args.conversations, codec.fingerprint)
    log = Path(args.checkpoint_dir) / "unreadable.txt"
    clips = emotions.load_emotional(args.data_dirs, args.commercial_only, log)
    parts = emotions.hold_out_speakers(clips)
    named = zip(("train", "validation"), parts, strict=True)
    speech = [encoded(part, split, codec, run) for split, part in named]
    args.window_seconds = train_s2s.fitting_window(args, config)
    # First the emotion branch alone, then all of it.
    begins = {"detection": 0}
    items = run.plan(hours, lambda total: {**begins, "dialogue": int(args.detection_share * total)})
    codebooks = [book.embedding for book in codec.quantizer.codebooks[:8]]
    reading = config, tokenizer, args, settings
    drawn = *reading, items, train_s2s.near_codes(codebooks).cpu()
    talk = EmotionalConversations(rows, frames, *drawn)
    dataset = Pairs(EmotionalSpeech(speech[0], *drawn), talk)
    validation = train_s2s.validation_batches(*held_out, *reading)
    held_out_speech = EmotionalSpeech(speech[1], *reading, 64)
    spoken = [collate([held_out_speech[(0, 16 * i + j)] for j in range(16)])[0] for i in range(4)]

    # Model and optimizers: the LM's and its emotion branch's, inherited or the run's own.
    model = S2S(config).to(device).train()
    if checkpoint is None:
        model.emotion.start_from(codebooks)
        checkpoints.inherit_weights(model, args.init_from)
    else:
        checkpoints.fill(model, checkpoint.tensors, checkpoint.path)
    labels = [model.emotion_embedding, model.emotion_projection, model.depth_emotion]
    rest = [module for module in model.children() if module not in (model.emotion, *labels)]
    learning = {"detection": ("branch",), "dialogue": ("branch", "labels", "lm")}
    rates = {"branch": args.branch_lr, "labels": LABELS_RATE * args.lr, "lm": args.lr}
    parts_of = {"branch": [model.emotion], "labels": labels, "lm": rest}
    optimizers, weights = training.optimizers(parts_of, rates, (0.9, 0.95), weight_decay=0.05)
    guard = training.StepGuard()
    run.parts |= {**optimizers, "guard": guard}
    del checkpoint
    run.restore()
    training.start_equal([model])

    def step(batch: tuple[Batch, Batch], phase: str) -> dict[str, Tensor]:
        """Forward, losses, backward, step; gives what there is to log."""
        speech, talk = (part.to(device) for part in batch)
        generator = training.keyed_generator(args.seed, run.step, process.rank)
        torch.manual_seed(generator.initial_seed())  # dropout: a resumed run draws the same
        loss, row = speech_losses(model, speech)
        if phase == "dialogue":
            with run.cast:
                whole_loss, losses, metrics = batch_losses(model, talk, speak=True)
            loss = settings.speech_weight * loss + whole_loss
            row |= {**losses, **metrics}
        model.zero_grad(set_to_none=True)
        loss.backward()
        row |= {"loss": loss}
        # Clipped apart: the LM's gradient is the larger by far.
        for name in learning[phase]:
            own = optimizers[name], weights[name]
            row[f"grad_norm_{name}"] = guard.step(*own, loss, settings.grad_clip)
        return {name: value.detach() for name, value in row.items()}

    stored = {"config": checkpoints.stored_config("s2s", config), "tokenizer": tokenizer.to_str()}
    run.stored = lambda: {**stored, "tensors": model.state_dict()}
    on_talk = functools.partial(train_s2s.validate, model, validation, device, run.cast)
    run.validate = lambda: {**validate_speech(model, spoken, device), **on_talk()}
    run.best_by, run.shown = "validation_speech", SHOWN
    first = collate_pairs([dataset[(0, i)] for i in range(args.batch_size // process.world_size)])
    run.estimate(lambda phase: step(first, phase), [model])
    lacking = train_s2s.unspelled(tokenizer, train_s2s.all_texts(rows))
    run.begin(description(run, model, parts, rows, hours, lacking))

    if args.budget_usd is None:  # which may move the phase while workers are ahead
        ahead = args.batch_size * (run.schedule.starts["dialogue"] - run.step)
        dataset.talk_from = items * run.epoch + run.consumed + ahead
    for batch in run.steps(functools.partial(training_batches, dataset, collate=collate_pairs)):
        rate = run.schedule.rate(run.step, final_ratio=0.05)
        for name, optimizer in optimizers.items():
            training.set_learning_rate(optimizer, rates[name] * rate)
        row = step(batch, run.phase)
        run.step_done(lambda: {**row, "lr": args.lr * rate})  # noqa: B023


def description(run: training.Run, model: S2S, parts, rows, hours: float, lacking) -> str:
    """What is read before step 1. `parts`: clips learnt, held out; `lacking`: unspelled texts."""
    clips = [clip for part in parts for clip in part]
    counts = Counter(clip.emotion for clip in clips)
    shown = ", ".join(f"{name} {counts[name]}" for name in EMOTIONS if counts[name])
    spoken, speakers = sum(c.duration for c in clips) / 3600, len({c.speaker for c in clips})
    about = train_s2s.description(run, model, rows, hours)
    lines = [f"{about}, {run.args.replay:.0%} of them replay"]
    lines += [f"speech: {len(clips)} clips, {spoken:.1f} h, {speakers} speakers; {shown}"]
    for language in sorted({clip.language for clip in clips}):
        learnt, held = (len({c.speaker for c in part if c.language == language}) for part in parts)
        unknown = "" if held else ": no figure tells how it hears others"
        lines.append(f"  {language}: {learnt} speakers to learn from, {held} held out{unknown}")
    if lacking:
        lines.append(f"{len(lacking)} different turns hold what the inherited tokenizer cannot "
                     f"spell, learnt as <unk>; first: {lacking[0]!r}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    if args.export:
        return train_s2s.export(args)
    with training.open_training("s2s", args, Settings, CHANGEABLE) as run:
        run.meter.stage = "emotion"
        train(args, run)


if __name__ == "__main__":
    command.run(main)
