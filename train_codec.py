#!/usr/bin/env python3
"""Phase 2: train the codec, with a GAN, from folders of audio.

    python train_codec.py --data_dirs data/english data/hindi data/telugu --batch_size 32 \
        --num_epochs 100 --gen_lr 1e-4 --disc_lr 1e-4 --checkpoint_dir checkpoints_codec \
        --num_workers 12

The same command goes on from the last complete checkpoint. An epoch is `--epoch_hours` of audio
drawn at random. Under `torchrun` the ranks share the batch. The first `--listen_share` of the steps
teaches the encoder's branch for words alone, which costs a fifth as much; then the rest joins.

Checkpoints show the average of the weights over the last steps, with codebooks that fit it; it is
what validates, ships and is inherited. The weights that go on learning are in `trainer.pt`.
bf16 is for the layers: quantizer, codebook statistics, STFTs and losses stay in fp32.

The sizes of `base`, among what else would make 60 to 70M parameters (ConvNeXt blocks of encoder +
decoder x their widths; transformer layers of encoder + decoder; of the arithmetic, in millions of
multiplications a 20 ms frame, what the blocks take; CPU ms a 40 ms step, one x86 core; mel error of
held-out speech after 300 steps at a quarter of the width, two seeds):

    blocks x widths      layers  parameters  decoder  M / frame  blocks   ms   mel
    2 + 4 x 384, 512     6 + 8      66.5M     51 %       91       36 %    52   .222 .224  <- base
    4 + 6 x 384, 512     4 + 8      68.2M     54 %      107       48 %    59   .223 .224
    1 + 2 x 384, 512     6 + 8      62.4M     49 %       75       22 %    50   .224 .217
    2 + 4 x 256, 384     6 + 8      61.6M     50 %       75       23 %    48   .236 .226
    4 + 8 x 256, 384     6 + 8      66.0M     52 %       92       38 %    56   .232 .223
    4 + 8 x 384, 512     4 + 6      61.9M     55 %      110       59 %    55   .225 .228

So short a training tells narrow fronts from wide ones and hardly more than that: seeds differ by
.01. Blocks at 200 Hz cost four times what a layer of as many parameters does at 50 Hz.

That was with a waveform in and patches of samples out. What `tiny` hears and how it speaks made a
greater difference (mel error, STOI and PESQ-WB of held-out speech at 4 kbit/s, after 4 minutes from
nothing on two cores, words kept; both cost 1 % more parameters):

    in                      out                   mel   STOI  PESQ
    waveform                patches              .183   .662  1.14
    waveform                spectra, overlapped  .188   .635  1.13
    waveform, log-mels      patches              .151   .725  1.24
    waveform, log-mels      spectra, overlapped  .144   .729  1.24  <- tiny and base

Bands of mels are wider than the distance of two harmonics from about 2 kHz on: --spectral_weight
compares single bins, too. It pays late: 400 steps of the decoder alone from the shipped codec,
without discriminators, gave PESQ-WB 2.17 with a share of 2 and 2.13 with 0 on 40 held-out clips
(--mel_weight 2; STOI .905, predicted MOS 1.4 either way). The first 500 steps of the sound's
branch, where the waveform's share matters most, gave STOI .753 with a share of 1 and .759 with 0
(one seed). On two cores a step took a tenth to a fifth longer.

On a CPU `tiny` has discriminators of its own, which see log-mel spectrograms: those of `base`,
narrow enough for two cores, told real from decoded no better than chance after 360 steps (--disc_lr
1e-4; after 46 with 1e-3), these in 60 % of cases after 75 steps and about 80 % after 1,000. On CUDA
they are twice as wide (--disc_preset small): 66 % after 2,300 steps, of a far better codec.

A step of `tiny` is some thousand small kernels: an H200 waits for Python. With --cuda_graph the
whole step is one launch, and nothing in it waits for the host: skipped steps, balancer, codebooks
and average are decided on the device. There, at batch 32 x 1.5 s without discriminators, 919 audio
seconds a second became 4,700 to 5,000, the mel error of the first 30 steps the same to 3 digits.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

import checkpoints
import command
import discriminator
import teachers
import training
from audio import SAMPLE_RATE
from codec import (
    AveragedCodec,
    Codec,
    CodecConfig,
    PhoneHead,
    codec_config,
    count_parameters,
    stored_config,
)
from command import ArgumentParser, UserError, number, share, whole
from data import (
    Clips,
    WindowDataset,
    count_speakers,
    hours_by_language,
    load_splits,
    training_batches,
)
from losses import MelLoss, SpectralLoss, si_sdr, waveform_loss
from phones import PHONES

UNKNOWN_PHONE = -100
LM_CODEBOOKS = 8
LISTENED = 4  # held-out windows whose sound goes to TensorBoard
# Flags that a resumed run can take up, beside those of all trainers.
APPLIED = ("gen_lr", "disc_lr", "teacher", "precision", "teacher_cache", "teacher_cache_gib",
           "cuda_graph", "compile")  # fmt: skip
BALANCE = {"waveform": 1.0, "adversarial": 1.0, "features": 2.0}


class Mode(NamedTuple):
    """What kind of step: a CUDA graph holds one kind."""

    listening: bool  # the words' branch alone
    adversarial: bool
    codebooks_move: bool
    codebooks_started: bool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser("Phase 2: train the codec.")
    plan = parser.add_argument_group("the plan's flags")
    plan.add_argument(
        "--data_dirs", nargs="+", default=["data/english", "data/hindi", "data/telugu"]
    )
    plan.add_argument("--batch_size", type=whole(1), default=32, help="windows a step, all ranks")
    plan.add_argument("--num_epochs", type=whole(1), default=100)
    plan.add_argument("--gen_lr", type=number(0), default=1e-4)
    plan.add_argument("--disc_lr", type=number(0), default=1e-4)
    plan.add_argument("--checkpoint_dir", default="checkpoints_codec")
    plan.add_argument("--num_workers", type=whole(0), help="by default one a core")
    more = parser.add_argument_group("advanced")
    more.add_argument("--preset", choices=("auto", "tiny", "base"), default="auto")
    more.add_argument(
        "--epoch_hours", type=number(above=0), help="audio drawn an epoch; else all, at most 60"
    )
    more.add_argument(
        "--window_seconds", type=whole_frames, help="of a clip; by default twice the attention's"
    )
    more.add_argument("--language_temperature", type=number(above=0), default=2.0, help="1: hours")
    more.add_argument("--commercial_only", action="store_true", help="skip non-commercial audio")
    more.add_argument("--augment_share", type=share, default=0.3, help="chance of each change")
    more.add_argument("--no_augment", action="store_true", help="train on the audio as it is")
    more.add_argument("--listen_share", type=share, default=0.1, help="of the steps: phones alone")
    more.add_argument("--keep_words", action="store_true", help="codebook 0 as --init_from has it")
    more.add_argument("--decoder_only", action="store_true", help="keep every code as it is")
    more.add_argument("--disc_start", type=share, default=0.1, help="share of the steps; 1: no GAN")
    more.add_argument(
        "--disc_preset",
        choices=("auto", "tiny", "small", "base"),
        default="auto",
        help="their sizes; auto: base for base, tiny on a CPU, small between",
    )
    more.add_argument("--disc_seconds", type=number(0.1), default=1.0, help="of a window, judged")
    more.add_argument("--mel_weight", type=number(0), default=1.0, help="the waveform has 1")
    more.add_argument(
        "--spectral_weight", type=number(0), default=1.0, help="share of the bins one by one"
    )
    more.add_argument("--lm_rate", type=share, default=0.5, help="share that uses the LM's 8")
    more.add_argument("--full_rate", type=share, default=0.2, help="share that uses all codebooks")
    more.add_argument(
        "--commitment_weight", type=number(0), default=0.03, help="for each codebook in use"
    )
    more.add_argument("--phone_weight", type=number(0), default=1.0)
    more.add_argument(
        "--teacher",
        default="auto",
        help="none, wavlm, whisper, or the folder or id of such a model; auto: WavLM-large on CUDA",
    )
    more.add_argument("--teacher_weight", type=number(0), default=1.0, help="cosine on codebook 0")
    more.add_argument(
        "--ssl_loss_weight",
        type=number(0),
        default=1.0,
        help="share, in the balance, of the teacher's view of the output; mel has 1",
    )
    more.add_argument("--teacher_cache", metavar="FOLDER", help="keep the targets of whole clips")
    more.add_argument("--teacher_cache_gib", type=number(0), default=100.0, help="at most")
    more.add_argument(
        "--ema_decay",
        type=number(0, 0.999999),
        help="of the weights that validate and ship; 0: none; by default over 2%% of the steps",
    )
    more.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA"
    )
    more.add_argument(
        "--cuda_graph",
        action="store_true",
        help="replay the step as a CUDA graph: on one GPU; pays where models are small",
    )
    more.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    more.add_argument("--quantizer_start", type=whole(0), default=200, help="steps before k-means")
    more.add_argument("--warmup_steps", type=whole(0), default=500)
    training.add_run_flags(more)
    args = parser.parse_args(argv)
    args.given = parser.given(argv)
    return args


def whole_frames(seconds: str) -> float:
    """A length in seconds as the nearest whole number of 20 ms frames; the longest spectrum that
    is compared needs 0.1 s."""
    return round(number(0.1, 600)(seconds) * 50) / 50


def draw_num_codebooks(
    batch: int, total: int, lm_rate: float, full_rate: float, seed: tuple[int, ...]
) -> Tensor:
    """How many codebooks each sample uses, `[B]`: the LM's 8 with `lm_rate`, all with `full_rate`,
    else 1 … total evenly.

    Quantizer dropout (Zeghidour et al. 2021, section III-C): one model serves every bitrate. Drawn
    evenly, 64 codebooks would leave the rate that is spoken a 64th of the training.
    """
    generator = training.keyed_generator(*seed)
    kind = torch.rand(batch, generator=generator)
    drawn = torch.randint(1, total + 1, (batch,), generator=generator)
    drawn = torch.where(kind < full_rate + lm_rate, min(LM_CODEBOOKS, total), drawn)
    return torch.where(kind < full_rate, total, drawn)


def average_decay(asked: float | None, total_steps: int) -> float:
    """The decay of the weights' average: over the last 2 % of the run, 10,000 steps at most."""
    return min(0.9999, max(0.0, 1 - 50 / total_steps)) if asked is None else asked


def judged_part(samples: int, seconds: float, seed: tuple[int, ...]) -> Tensor:
    """Which samples of the windows the discriminators hear in this step, `[n]`, on every rank the
    same.

    They cost more than the codec, and a part drawn anew each step teaches the same.
    """
    length = min(samples, int(seconds * SAMPLE_RATE))
    start = torch.randint(samples - length + 1, (1,), generator=training.keyed_generator(*seed))
    return start + torch.arange(length)


def precision(device: torch.device, asked: str) -> torch.autocast:
    """bf16 on CUDA or where asked for; quantizer, STFT and losses go on in fp32 within it."""
    enabled = device.type == "cuda" if asked == "auto" else asked == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def phone_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the frames whose phone is known; zeros without any."""
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    known = (labels != UNKNOWN_PHONE).sum().clamp(min=1)
    total = F.cross_entropy(logits, labels, ignore_index=UNKNOWN_PHONE, reduction="sum")
    return total / known, (logits.argmax(-1) == labels).sum() / known


def training_losses(spectra: nn.ModuleDict, estimate: Tensor, audio: Tensor, counts: Tensor):
    """The reconstruction in fp32, and its losses."""
    estimate = estimate.float()
    # At high rates the goal is SNR, at the LM's it is how it sounds.
    weights = (counts / LM_CODEBOOKS).clamp(min=1).sqrt()
    losses = {name: loss(estimate, audio) for name, loss in spectra.items()}
    losses["waveform"] = waveform_loss(estimate, audio, weights)
    return estimate, losses


def words_learn(args) -> bool:
    """Whether codebook 0 and its branch move."""
    return not (args.decoder_only or args.keep_words)


def check_kept(args, model: Codec, inherited: list[str]) -> None:
    """Raises UserError where codes that are to stay would come from weights drawn at random."""
    if words_learn(args):
        return
    kept = ("encoder.0.", "quantizer.semantic_in.", "quantizer.codebooks.0.embedding")
    if args.decoder_only:
        kept = ("encoder.", "quantizer.")
    there = {name for name in model.export_tensors() if name.startswith(kept)}
    lacking = sorted(there - set(inherited))
    if lacking:
        raise UserError(f"--init_from {args.init_from}: {lacking[0]} is not there or of another "
                        f"size, and codes that depend on it were to be kept")  # fmt: skip


def sizes(args, checkpoint: checkpoints.Checkpoint | None, speaks: bool) -> CodecConfig:
    """The codec's sizes: those of the preset, or of the codec that goes on or whose codes are kept.

    Sets `args.window_seconds` where it was left open. What runs is what was trained: a window has
    at least twice the frames that attention sees, so that it slides and all of a call is met.
    The context of a new `tiny` gives way to a shorter window.
    Raises UserError where that of `base` would have to.
    """
    config = CodecConfig.base() if args.preset == "base" else CodecConfig.tiny()
    source = checkpoint
    if source is None and args.init_from and not words_learn(args):
        source = checkpoints.load_checkpoint(args.init_from, with_trainer=False)
    if source is not None:
        stored = codec_config(source.config, source.path)
        whole = checkpoint is not None or args.decoder_only  # else it is the words that stay
        config = stored if whole else dataclasses.replace(config, context=stored.context)
    needed = 2 * config.context / config.frame_rate
    if args.window_seconds is None:  # runs of older versions had 2 s
        args.window_seconds = needed if checkpoint is None else 2.0
    frames = round(args.window_seconds * config.frame_rate)
    if frames >= 2 * config.context:
        return config
    short = f"--window_seconds {args.window_seconds:g}: windows of {frames} frames are under twice "
    short += f"the attention's context of {config.context}"
    if source is None and args.preset == "base":
        raise UserError(f"{short}, so that it would run as it was never trained: "
                        f"give at least {needed:g}")  # fmt: skip
    if source is not None:
        told = f"warning: {short}, which {source.path} has: what lies past a window is not trained"
    else:
        config = dataclasses.replace(config, context=frames // 2)
        told = f"{short} that the preset has: this codec gets one of {config.context}"
    if speaks:
        print(told, flush=True)
    return config


def discriminator_config(
    asked: str, config: CodecConfig, device: torch.device
) -> discriminator.DiscriminatorConfig:
    """The discriminators' sizes: those asked for, or what fits the codec and the device."""
    if asked == "auto":
        small = "tiny" if device.type == "cpu" else "small"
        base = CodecConfig.base()
        asked = "base" if dataclasses.replace(config, context=base.context) == base else small
    return getattr(discriminator.DiscriminatorConfig, asked)()


def phases(args) -> Callable[[int], dict[str, int]]:
    """First steps of listening, of the whole codec and of the discriminators, for so many steps."""

    def starts(total: int) -> dict[str, int]:
        listen_steps = int(args.listen_share * total) if words_learn(args) else 0
        joined = max(listen_steps, int(args.disc_start * total))
        return {"listening": 0, "plain": listen_steps, "adversarial": joined}

    return starts


def validated_rates(config: CodecConfig) -> list[int]:
    """The LM's number of codebooks and all of them."""
    return sorted({min(LM_CODEBOOKS, config.num_codebooks), config.num_codebooks})


@torch.no_grad()
def log_audio(metrics: training.Metrics, step: int, model: Codec, batches: list[dict], device):
    """The first held-out windows to TensorBoard: the recordings before step 1, then what became of
    them at each rate."""
    audio = batches[0]["audio"][:LISTENED].to(device)
    sounds = {"reference": audio}
    if step > 0:
        rates = validated_rates(model.config)
        sounds = {f"{k}_codebooks": model.decode(model.encode(audio, k)) for k in rates}
    for name, clips in sounds.items():
        for i, clip in enumerate(clips):
            clip = clip.clamp(-1, 1)
            metrics.log_audio(step, f"held_out_{i}/{name}", clip, model.config.sample_rate)


@torch.no_grad()
def validate(
    model: Codec,
    head: PhoneHead | None,
    spectra: nn.ModuleDict,
    batches: list[dict],
    device: torch.device,
    cast: torch.autocast,
) -> dict[str, float]:
    """Held out: mean losses and SI-SDR (dB) at the full and at the LM's rate, and, with a `head`,
    phone accuracy.

    `mel_…_within` is the mel error in the first context of frames, `mel_…_past` behind it: were
    attention not to slide as it was trained to, the second would stand out.
    """
    model.eval()
    rows = []
    edge = model.config.hop * max(3, model.config.context)  # the longest spectrum needs 1,024
    for batch in batches:
        audio, labels = batch["audio"].to(device), batch["phones"].to(device)
        for rate in validated_rates(model.config):
            counts = torch.full((len(audio),), rate, device=device)
            with cast:
                estimate, info = model(audio, counts)
            estimate, losses = training_losses(spectra, estimate, audio, counts)
            row = {f"{name}_{rate}": loss for name, loss in losses.items()}
            for place, part in (("within", slice(edge)), ("past", slice(edge, None))):
                loss = spectra["mel"](estimate[..., part], audio[..., part])
                row[f"mel_{rate}_{place}"] = loss
            row[f"si_sdr_{rate}"] = si_sdr(estimate, audio).mean()
            if head is not None:
                with cast:
                    logits = head(info.semantic)
                row["phone_accuracy"] = phone_loss(logits, labels)[1]
            rows.append(row)
    model.train()
    names = {name for row in rows for name in row}
    return {
        f"validation_{name}": statistics.fmean(float(row[name]) for row in rows if name in row)
        for name in sorted(names)
    }


def validation_batches(clips: Clips, config: CodecConfig, phone_ids: dict[str, int]) -> list[dict]:
    """The same 48 windows of held-out speakers every time, three times the context long, so that
    a call is judged past its beginning; none where nobody is held out."""
    if not clips:
        print("warning: no clips in the validation split: nothing tells when to stop")
        return []
    seconds = 3 * config.context / config.frame_rate
    dataset = WindowDataset(clips, seconds, seed=1, epoch_items=48, phone_ids=phone_ids)
    items = [filled(dataset[i]) for i in range(len(dataset))]
    return [default_collate(items[i : i + 16]) for i in range(0, len(items), 16)]


def filled(item: dict) -> dict:
    """A window whose clip was shorter, laid end to end: silence would pass for easy speech."""
    frames = item["audio"].view(len(item["phones"]), -1)
    heard = frames.any(1).nonzero()
    last = int(heard[-1]) + 1 if len(heard) else len(frames)
    places = torch.arange(len(frames)) % last
    return {**item, "audio": frames[places].view(1, -1), "phones": item["phones"][places]}


def step_draws(args, config: CodecConfig, audio: Tensor, step: int, rank: int) -> dict[str, Tensor]:
    """What a step draws at random: by (seed, step) alone, and for `counts` by rank."""
    counts = draw_num_codebooks(
        len(audio), config.num_codebooks, args.lm_rate, args.full_rate, (args.seed, step, rank)
    )
    generator = training.keyed_generator(args.seed, step, 1 << 20)
    draws = torch.rand(config.num_codebooks, max(config.codebook_sizes), generator=generator)
    part = judged_part(audio.shape[-1], args.disc_seconds, (args.seed, step, 1 << 21))
    return {"counts": counts, "draws": draws, "part": part}


def codebook_metrics(all_codes: Tensor) -> dict[str, float]:
    """Perplexity (in codes) of the semantic and the acoustic codebooks of a batch `[B, K, F]`."""
    codes = all_codes.transpose(0, 1).flatten(1)  # [K, B * F]
    counts = torch.zeros(len(codes), int(codes.max()) + 1, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=counts.dtype))
    perplexities = torch.special.entr(counts / codes.shape[1]).sum(1).exp().tolist()
    values = {"perplexity_semantic": perplexities[0]}
    if len(perplexities) > 1:
        values["perplexity_acoustic"] = statistics.fmean(perplexities[1:])
    return values


def describe(
    run: training.Run, model: Codec, teacher: teachers.Teacher | None, clips: Clips
) -> None:
    """What the user reads before step 1."""
    args, total, steps = run.args, run.hours(), run.planned
    config = model.config
    context = config.context / config.frame_rate
    counts = count_parameters(model)
    codes = counts.pop("codebooks")
    parts = ", ".join(f"{name} {count:.1f}" for name, count in counts.items())
    hours = ", ".join(f"{name} {h:.1f} h" for name, h in hours_by_language(clips).items())
    taught = f"{teacher.source} ({teacher.name}), " if teacher else ""
    price = ""
    if run.device.type == "cuda":
        price = f" = {training.format_dollars(total * args.usd_per_hour)}"
    rate = args.num_epochs * args.epoch_hours / max(total, 1e-9)
    print(
        f"preset {args.preset}: codec {sum(counts.values()):.1f}M parameters ({parts}), "
        f"{config.num_codebooks} codebooks ({codes:.1f}), device {run.device}\n"
        f"teacher: {taught}phone labels, {clips.hours('phones'):.1f} h\n"
        f"windows of {args.window_seconds:g} s, attention over {context:g} s\n"
        f"data: {len(clips)} clips, {count_speakers(clips)} speakers; {hours}\n"
        f"an epoch is {args.epoch_hours:.1f} h of audio; {args.num_epochs} epochs = "
        f"{steps} steps = {training.format_hours(total)}{price} at {rate:.0f} audio seconds "
        f"a second ({'at most' if args.cuda_graph else 'estimate'})",
        flush=True,
    )


def export(args) -> None:
    """Writes the newest checkpoint in half precision, as the demo and the LM's data take it."""
    checkpoints.check_export(args)
    checkpoint = checkpoints.load_checkpoint(args.checkpoint_dir, with_trainer=False)
    model = Codec(codec_config(checkpoint.config, checkpoint.path))
    model.load_tensors(checkpoint.tensors, args.checkpoint_dir)
    folder = checkpoints.save_export(
        args.export, checkpoint.step, stored_config(model.config), model.export_tensors()
    )
    exported = Codec.from_checkpoint(folder)
    print(
        f"wrote {folder}: codec of step {checkpoint.step}, fingerprint {exported.fingerprint[:16]}"
    )


def main() -> None:
    args = parse_args()
    if args.export:
        return export(args)
    if args.teacher_cache and args.ssl_loss_weight:
        raise UserError("--teacher_cache saves nothing while the output is heard as well: "
                        "add --ssl_loss_weight 0")  # fmt: skip
    with training.open_training("codec", args, APPLIED) as run:
        train(args, run)


def train(args, run: training.Run) -> None:
    """The training itself, within its run."""
    process, device, checkpoint = run.process, run.device, run.checkpoint
    if args.cuda_graph and (device.type != "cuda" or process.world_size > 1):
        raise UserError("--cuda_graph needs a CUDA GPU, and one alone")
    taught = words_learn(args) or args.ssl_loss_weight > 0  # else nobody listens to a teacher
    if args.teacher == "auto":
        args.teacher = "wavlm" if device.type == "cuda" else "none"
    teacher = teachers.load_teacher(args.teacher, device) if taught else None
    if args.teacher_cache and teacher is None:
        raise UserError("--teacher_cache needs a --teacher")
    training.seed_everything(args.seed)  # whichever teacher there is, the same weights
    if args.cuda_graph:  # what it holds must live on a stream of its own from the start
        torch.cuda.set_stream(torch.cuda.Stream(device))

    config = sizes(args, checkpoint, run.is_main)

    # Data: windows drawn at random from the training speakers.
    phone_ids = {phone: i for i, phone in enumerate(PHONES)}
    unreadable = Path(args.checkpoint_dir) / "unreadable.txt"
    clips, held_out = load_splits(
        args.data_dirs, ("train", "validation"), args.commercial_only, unreadable
    )
    dataset = WindowDataset(
        clips,
        args.window_seconds,
        args.seed,
        run.plan(clips.hours(), phases(args)),
        args.language_temperature,
        0.0 if args.no_augment else args.augment_share,
        phone_ids,
        unreadable,
    )
    # On every rank, though one validates: reading it draws from the generator of the weights.
    validation = validation_batches(held_out, config, phone_ids)

    # Models and optimizers; the same seed gives every rank the same weights.
    model = Codec(config).to(device).train()
    head = PhoneHead(config.semantic_dim, len(PHONES)).to(device)
    judges = discriminator_config(args.disc_preset, config, device)
    if checkpoint is not None and "judges" in checkpoint.trainer:
        judges = discriminator.DiscriminatorConfig.stored(checkpoint.trainer["judges"])
    disc = discriminator.Discriminator(judges).to(device)
    spectra = nn.ModuleDict({"mel": MelLoss(config.sample_rate)})
    if args.spectral_weight:
        spectra["spectral"] = SpectralLoss()
    spectra.to(device)
    cast = precision(device, args.precision)
    projection, cache = None, None  # beside the head, as training only: codebook 0 to the teacher
    if teacher is not None:
        projection = nn.Linear(config.semantic_dim, teacher.width).to(device)
    if args.teacher_cache:
        cache = teachers.FeatureCache(args.teacher_cache, teacher, args.teacher_cache_gib)
    if args.init_from and checkpoint is None:
        inherited = checkpoints.inherit_weights(model, args.init_from)
        check_kept(args, model, inherited)
        prefix = "quantizer."
        model.quantizer.resume_from_codes(
            [name.removeprefix(prefix) for name in inherited if name.startswith(prefix)]
        )
    if not words_learn(args) and checkpoint is None and not args.init_from:
        flag = "--decoder_only" if args.decoder_only else "--keep_words"
        raise UserError(f"{flag} needs --init_from, the codec whose codes are kept")
    kept = []
    if args.keep_words:  # sound of its own beside words that were taught first
        kept = [model.encoder[0], model.quantizer.semantic_in, head, projection]
    if args.decoder_only:  # a better voice for an LM that was trained on these codes
        kept = [model.encoder, model.quantizer, head, projection]
    for part in filter(None, kept):
        part.requires_grad_(False)
    groups = training.parameter_groups([model, head, projection], weight_decay=0.01)
    generator_parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, args.gen_lr, (0.8, 0.99), fused=True)
    disc_groups = training.parameter_groups([disc], weight_decay=0.01)
    disc_optimizer = torch.optim.AdamW(disc_groups, args.disc_lr, (0.8, 0.99), fused=True)
    balance = {"mel": args.mel_weight, "spectral": args.spectral_weight}
    balancer = training.Balancer({**BALANCE, **balance, "ssl": args.ssl_loss_weight})
    # One guard each: healthy steps of the one must not hide that the other stands still.
    guard, disc_guard = training.StepGuard(), training.StepGuard()
    run.parts |= {
        "head": head,
        "disc": disc,
        "optimizer": optimizer,
        "disc_optimizer": disc_optimizer,
        "balancer": balancer,
        "guard": guard,
        "disc_guard": disc_guard,
    }
    if projection is not None:
        run.parts["projection"] = projection
    average, decay = None, average_decay(args.ema_decay, run.schedule.total)
    if checkpoint is not None:
        stored_teacher = checkpoint.trainer.get("teacher", "none")
        teachers.check_same_teacher(stored_teacher, teacher, checkpoint.path)
        # Where weights are averaged, the model that a checkpoint shows is their average.
        trained = checkpoint.trainer.get("trained_weights", checkpoint.tensors)
        model.load_tensors(trained, checkpoint.path)
    training.start_equal([model, head, disc, projection])
    if decay > 0:
        average = AveragedCodec(model, decay)
        if checkpoint is not None and "average" in checkpoint.trainer:
            average.model.load_tensors(checkpoint.tensors, checkpoint.path)
            average.load_state_dict(checkpoint.trainer["average"])
    del checkpoint
    run.restore()
    for each in (optimizer, disc_optimizer):
        training.make_capturable(each, args.cuda_graph, device)
    if args.compile:  # the forward passes alone; a stream goes step by step
        for part in (*model.encoder, model.decoder):
            part.compile()

    def stored() -> dict:
        trainer = {"teacher": teacher.name if teacher else "none"}
        trainer |= {"judges": dataclasses.asdict(judges)}
        if average:
            trainer["trained_weights"] = model.state_dict()
        shown = (average.model if average else model).state_dict()
        return {"config": stored_config(config), "tensors": shown, "trainer": trainer}

    def validated() -> dict[str, float]:
        shown = average.model if average else model
        phone_head = head if words_learn(args) else None
        if args.tensorboard:
            log_audio(run.metrics, run.step, shown, validation, device)
        return validate(shown, phone_head, spectra, validation, device, cast)

    def speak(listening: bool, audio: Tensor, counts: Tensor):
        """Reconstruction, what the quantizer did, and codebook 0 as phones and to the teacher."""
        words = words_learn(args)
        with cast:
            estimate, info = (None, model.hear(audio)) if listening else model(audio, counts)
            phones = head(info.semantic) if words else None
            view = projection(info.semantic) if words and projection is not None else None
        return estimate, info, phones, view

    def judge(audio: Tensor, estimate: Tensor):
        with cast:
            return disc(audio), disc(estimate)

    # On several ranks gradients are averaged while the backward pass goes on.
    speak = training.Parallel(process, [model, head, projection], speak)
    judge = training.Parallel(process, [disc], judge)

    def learn(
        mode: Mode,
        audio: Tensor,
        labels: Tensor,
        counts: Tensor,
        draws: Tensor,
        part: Tensor,
        ramp: Tensor,
        target: Tensor | None = None,
        known: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One step: everything that the device does; gives what there is to log, as tensors.

        `ramp`, a scalar, is the part of their share that the discriminators have by now; `target`
        and `known` are what a cache holds of the teacher, who otherwise listens here.
        Nothing waits for the device, but for the start of the codebooks.
        """
        # Generator: balanced losses on the waveform, the rest beside them.
        estimate, info, phone_logits, view = speak(
            mode.listening, audio, counts, partly=mode.listening
        )
        reference, losses = None, {}
        if teacher is not None and target is None:
            with torch.no_grad():
                reference = teacher(audio)
                target = teacher.target(reference)
        if not mode.listening:
            estimate, losses = training_losses(spectra, estimate, audio, counts)
            if reference is not None and args.ssl_loss_weight:
                losses["ssl"] = teachers.ssl_loss(teacher(estimate), reference)
        row = {}
        if mode.adversarial:
            # One pass serves both sides: nothing changes the judges before their own step below.
            judged = (sound.index_select(-1, part) for sound in (audio, estimate))
            (real_logits, real_features), (fake_logits, fake_features) = judge(*judged)
            losses["adversarial"] = discriminator.generator_loss(fake_logits)
            losses["features"] = discriminator.feature_matching_loss(real_features, fake_features)
            row |= discriminator.verdict(real_logits, fake_logits)
        # Alone, codebook 0 is held to its codes as the LM's eight are together.
        levels = LM_CODEBOOKS if mode.listening else 1
        others = levels * args.commitment_weight * info.commitment
        if words_learn(args):
            phones, row["phone_accuracy"] = phone_loss(phone_logits, labels)
            others = others + args.phone_weight * phones
            row["phones"] = phones
        if view is not None:
            distillation = teachers.distillation_loss(view, target, known)
            others = others + args.teacher_weight * distillation
            row["distillation"] = distillation
        optimizer.zero_grad(set_to_none=True)
        if mode.listening:
            others.backward()
        else:
            joining = {"adversarial": ramp, "features": ramp}
            shares = balancer.backward(losses, estimate, others, joining)
            row |= {f"share_{name}": share for name, share in shares.items()}
        norm = nn.utils.clip_grad_norm_(generator_parameters, args.grad_clip)
        # Fused optimizers, codebooks and average stand still where this is 1.
        optimizer.found_inf = guard.watch(sum(losses.values()) + others, norm)
        optimizer.step()
        restarted = []
        if mode.codebooks_move:
            restarted = model.quantizer.update(info, draws, args.keep_words, optimizer.found_inf)
        if average:
            average.update(model, restarted, optimizer.found_inf)

        # Discriminator, on the same reconstruction.
        if mode.adversarial:
            disc_loss = discriminator.discriminator_loss(real_logits, fake_logits)
            disc_optimizer.zero_grad(set_to_none=True)
            disc_loss.backward(inputs=list(disc.parameters()))  # and not through the codec
            disc_norm = nn.utils.clip_grad_norm_(disc.parameters(), args.grad_clip)
            disc_optimizer.found_inf = disc_guard.watch(disc_loss, disc_norm)
            disc_optimizer.step()
            losses["discriminator"] = disc_loss
        row |= {**losses, "commitment": info.commitment, "grad_norm": norm}
        return {name: value.detach() for name, value in row.items()} | {"codes": info.codes}

    replayed = training.StepGraph(learn) if args.cuda_graph else None

    def take_step(batch: dict, phase: str, probe: bool = False) -> dict[str, Tensor]:
        """One step of that phase, from the batch on; as a `probe`, with all that it comes to do."""
        listening = phase == "listening"
        # Each part is quantized once its vectors have settled a little.
        settled = run.step - (0 if listening else run.schedule.starts["plain"])
        moves = (probe or settled >= args.quantizer_start) and not args.decoder_only
        chosen = step_draws(args, config, batch["audio"], run.step, process.rank)
        chosen["ramp"] = torch.tensor(run.schedule.ramp(run.step, "adversarial"))
        inputs = {"audio": batch["audio"], "labels": batch["phones"], **chosen}
        if device.type == "cuda":  # of memory that is not pinned a copy would wait for the device
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        if cache is not None:
            inputs["target"], inputs["known"] = cache(batch, inputs["audio"])
        started = model.quantizer.is_initialised
        take = learn if probe or not replayed else replayed
        return take(Mode(listening, phase == "adversarial", moves, started), **inputs)

    mine = range(args.batch_size // process.world_size)
    first = default_collate([dataset[(0, i)] for i in mine])
    others = [average.model] if average else []
    if average:
        run.parts["average"] = average
    run.estimate(lambda phase: take_step(first, phase, probe=True), [model, *others])
    run.stored, run.validate = stored, validated if validation else None
    run.best_by = f"validation_mel_{config.num_codebooks}"
    run.told = {"mel": "mel", "waveform": "waveform", "phone_accuracy": "phones"}
    if run.is_main:
        describe(run, model, teacher, clips)
    run.begin()
    if run.metrics and args.tensorboard and validation and not run.resumed:
        log_audio(run.metrics, 0, model, validation, device)

    place = (sys.maxsize, run.epoch, run.consumed)
    batches = training_batches(dataset, args.batch_size, run.workers, process, *place)
    for batch in run.steps(batches):
        rates = {phase: run.schedule.rate(run.step, phase) for phase in ("plain", "adversarial")}
        rate = run.schedule.rate(run.step) if run.phase == "listening" else rates["plain"]
        training.set_learning_rate(optimizer, rate * args.gen_lr)
        training.set_learning_rate(disc_optimizer, rates["adversarial"] * args.disc_lr)
        row = take_step(batch, run.phase)
        if replayed and replayed.warming:
            run.meter.measure_anew()
        row |= {"lr": rate * args.gen_lr}

        def logged(row: dict = row) -> dict:
            used = codebook_metrics(row.pop("codes"))
            return row | used | {"unreadable": dataset.unreadable}

        run.step_done(logged)


if __name__ == "__main__":
    command.run(main)
