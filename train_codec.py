#!/usr/bin/env python3
"""Phase 2: train the codec, with a GAN, from folders of audio.

    python train_codec.py --data_dirs data/english data/hindi data/telugu --batch_size 32 \
        --num_epochs 100 --gen_lr 1e-4 --disc_lr 1e-4 --checkpoint_dir checkpoints_codec \
        --num_workers 12

The same command goes on from the last complete checkpoint. An epoch is `--epoch_hours` of audio
drawn at random. Under `torchrun` the ranks share the batch. The first `--listen_share` of the steps
teaches the encoder's branch for words alone, which costs a fifth as much; then the rest joins.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import discriminator
import training
from codec import (
    Codec,
    CodecConfig,
    MelLoss,
    PhoneHead,
    codec_config,
    si_sdr,
    stored_config,
    waveform_loss,
)
from data import (
    SAMPLE_RATE,
    Clip,
    WindowDataset,
    count_speakers,
    hours_by_language,
    load_clips,
    training_batches,
)
from speech import PHONES
from training import UserError

UNKNOWN_PHONE = -100
BALANCE = {"mel": 1.0, "waveform": 1.0, "adversarial": 1.0, "features": 2.0}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Phase 2: train the codec.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan = parser.add_argument_group("the plan's flags")
    plan.add_argument(
        "--data_dirs", nargs="+", default=["data/english", "data/hindi", "data/telugu"]
    )
    plan.add_argument("--batch_size", type=int, default=32, help="windows a step, over all ranks")
    plan.add_argument("--num_epochs", type=int, default=100)
    plan.add_argument("--gen_lr", type=float, default=1e-4)
    plan.add_argument("--disc_lr", type=float, default=1e-4)
    plan.add_argument("--checkpoint_dir", default="checkpoints_codec")
    plan.add_argument("--num_workers", type=int, default=4)
    more = parser.add_argument_group("advanced")
    more.add_argument("--preset", choices=("auto", "tiny", "base"), default="auto")
    more.add_argument("--epoch_hours", type=float, default=60.0, help="audio drawn an epoch")
    more.add_argument("--window_seconds", type=whole_frames, default=2.0, help="length of a clip")
    more.add_argument("--language_temperature", type=float, default=2.0, help="1: by hours")
    more.add_argument("--commercial_only", action="store_true", help="skip non-commercial audio")
    more.add_argument("--augment_share", type=float, default=0.3, help="chance of each change")
    more.add_argument("--no_augment", action="store_true", help="train on the audio as it is")
    more.add_argument("--listen_share", type=float, default=0.1, help="of the steps: phones alone")
    more.add_argument("--decoder_only", action="store_true", help="keep every code as it is")
    more.add_argument("--disc_start", type=float, default=0.1, help="share of the steps; 1: no GAN")
    more.add_argument("--full_rate", type=float, default=0.7, help="share that uses all codebooks")
    more.add_argument("--commitment_weight", type=float, default=0.25)
    more.add_argument("--phone_weight", type=float, default=1.0)
    more.add_argument("--quantizer_start", type=int, default=200, help="steps before k-means")
    more.add_argument("--warmup_steps", type=int, default=500)
    training.add_run_flags(more)
    return parser.parse_args(argv)


def whole_frames(seconds: str) -> float:
    """A length in seconds as the nearest whole number of 20 ms frames, one or more."""
    return max(1, round(float(seconds) * 50)) / 50


def draw_num_codebooks(batch: int, total: int, full_rate: float, seed: tuple[int, ...]) -> Tensor:
    """How many codebooks each sample uses, `[B]`: all with `full_rate`, else 1 … total evenly.

    Quantizer dropout (Zeghidour et al. 2021, section III-C): one model serves every bitrate.
    """
    generator = training.keyed_generator(*seed)
    full = torch.rand(batch, generator=generator) < full_rate
    drawn = torch.randint(1, total + 1, (batch,), generator=generator)
    return torch.where(full, total, drawn)


def phone_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the frames whose phone is known; zeros without any."""
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    known = labels != UNKNOWN_PHONE
    if not known.any():
        return logits.sum() * 0.0, logits.new_zeros(())
    accuracy = (logits[known].argmax(-1) == labels[known]).float().mean()
    return F.cross_entropy(logits[known], labels[known]), accuracy


def training_losses(model: Codec, mel: MelLoss, audio: Tensor, counts: Tensor):
    """The reconstruction, its losses and what the quantizer did."""
    with torch.autocast(audio.device.type, torch.bfloat16, enabled=audio.is_cuda):
        estimate, info = model(audio, counts)
    return estimate, info, {"mel": mel(estimate, audio), "waveform": waveform_loss(estimate, audio)}


def seconds_per_step(
    model: Codec, mel: MelLoss, args, device: torch.device, listening: bool
) -> float:
    """The median of three steps on noise, without any update: the estimate before step 1."""
    samples = int(args.window_seconds * SAMPLE_RATE) // model.config.hop * model.config.hop
    audio = 0.05 * torch.randn(args.batch_size, 1, samples, device=device)
    counts = torch.full((args.batch_size,), model.config.num_codebooks, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        if listening:
            info = model.hear(audio)
            info.semantic.square().mean().backward()
        else:
            _, info, losses = training_losses(model, mel, audio, counts)
            (sum(losses.values()) + info.commitment).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return statistics.median(times)


@torch.no_grad()
def validate(model: Codec, head: PhoneHead, mel: MelLoss, batches: list[dict], device) -> dict:
    """Mean losses, SI-SDR (dB) at the full and at the LM's rate and phone accuracy, held out."""
    model.eval()
    rows = []
    for batch in batches:
        audio, labels = batch["audio"].to(device), batch["phones"].to(device)
        for rate in sorted({min(8, model.config.num_codebooks), model.config.num_codebooks}):
            counts = torch.full((len(audio),), rate, device=device)
            estimate, info, losses = training_losses(model, mel, audio, counts)
            row = {f"{name}_{rate}": float(loss) for name, loss in losses.items()}
            row[f"si_sdr_{rate}"] = float(si_sdr(estimate, audio).mean())
            row["phone_accuracy"] = float(phone_loss(head(info.semantic), labels)[1])
            rows.append(row)
    model.train()
    names = {name for row in rows for name in row}
    return {
        f"validation_{name}": statistics.fmean(row[name] for row in rows if name in row)
        for name in sorted(names)
    }


def validation_batches(clips: list[Clip], args, phone_ids: dict[str, int]) -> list[dict]:
    """The same 48 windows of held-out speakers every time; none where nobody is held out."""
    if not clips:
        print("warning: no clips in the validation split: nothing tells when to stop")
        return []
    dataset = WindowDataset(clips, args.window_seconds, seed=1, epoch_items=48, phone_ids=phone_ids)
    return list(DataLoader(dataset, batch_size=16))


def codebook_metrics(info) -> dict[str, float]:
    """Perplexity (in codes) of the semantic and the acoustic codebooks in this batch."""
    values = {}
    for name, codes in (("semantic", info.codes[:, :1]), ("acoustic", info.codes[:, 1:])):
        if not codes.numel():
            continue
        shares = [c.flatten().bincount().float() / c.numel() for c in codes.unbind(1)]
        entropies = [-(s[s > 0] * s[s > 0].log()).sum() for s in shares]
        values[f"perplexity_{name}"] = float(torch.stack(entropies).exp().mean())
    return values


def describe(args, model: Codec, clips: list[Clip], total: float, steps: int) -> None:
    """What the user reads before step 1; `total` is the estimate in hours."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    hours = ", ".join(f"{name} {h:.1f} h" for name, h in hours_by_language(clips).items())
    labelled = sum(c.duration for c in clips if c.phones) / 3600
    price = ""
    if next(model.parameters()).is_cuda:
        price = f" = {training.format_dollars(total * args.usd_per_hour)}"
    epoch_hours = steps / args.num_epochs * args.batch_size * args.window_seconds / 3600
    rate = args.num_epochs * epoch_hours / total
    print(
        f"preset {args.preset}: codec {parameters:.1f}M parameters, "
        f"{config.num_codebooks} codebooks, device {next(model.parameters()).device}\n"
        f"teacher: phone labels, {labelled:.1f} h\n"
        f"data: {len(clips)} clips, {count_speakers(clips)} speakers; {hours}\n"
        f"an epoch is {epoch_hours:.1f} h of audio; {args.num_epochs} epochs = {steps} steps = "
        f"{training.format_hours(total)}{price} at {rate:.0f} audio seconds a second (estimate)",
        flush=True,
    )


def export(args) -> None:
    """Writes the newest checkpoint in half precision, as the demo and the LM's data take it."""
    checkpoint = training.load_checkpoint(args.checkpoint_dir, with_trainer=False)
    model = Codec(codec_config(checkpoint.config, checkpoint.path))
    model.load_tensors(checkpoint.tensors, args.checkpoint_dir)
    folder = training.save_export(
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
    if args.threads:
        torch.set_num_threads(args.threads)
    process = training.setup_distributed(args.device)
    device = process.device
    training.seed_everything(args.seed)
    args.preset = training.choose_preset(args.preset, device)

    # First of all: listing unreadable files would make a new run's folder look used.
    checkpoint = training.open_run(args.checkpoint_dir, "codec", args.fresh, device)

    # Data: windows drawn at random from the training speakers.
    phone_ids = {phone: i for i, phone in enumerate(PHONES)}
    unreadable = Path(args.checkpoint_dir) / "unreadable.txt"
    clips = load_clips(args.data_dirs, "train", args.commercial_only, unreadable)
    held_out = load_clips(args.data_dirs, "validation", args.commercial_only, unreadable)
    hours = min(args.epoch_hours, sum(clip.duration for clip in clips) / 3600)
    steps_per_epoch = max(1, round(hours * 3600 / args.window_seconds / args.batch_size))
    dataset = WindowDataset(
        clips,
        args.window_seconds,
        args.seed,
        steps_per_epoch * args.batch_size,
        args.language_temperature,
        0.0 if args.no_augment else args.augment_share,
        phone_ids,
        unreadable,
    )
    # On every rank, though one validates: reading it draws from the generator of the weights.
    validation = validation_batches(held_out, args, phone_ids)

    # Models and optimizers; the same seed gives every rank the same weights.
    preset = CodecConfig.base() if args.preset == "base" else CodecConfig.tiny()
    config = codec_config(checkpoint.config, checkpoint.path) if checkpoint else preset
    model = Codec(config).to(device).train()
    head = PhoneHead(config.semantic_dim, len(PHONES)).to(device)
    sizes = discriminator.DiscriminatorConfig
    disc = discriminator.Discriminator(
        sizes.base() if config == CodecConfig.base() else sizes.tiny()
    ).to(device)
    mel = MelLoss(config.sample_rate).to(device)
    if args.init_from and checkpoint is None:
        inherited = training.inherit_weights(model, args.init_from)
        prefix = "quantizer."
        model.quantizer.resume_from_codes(
            [name.removeprefix(prefix) for name in inherited if name.startswith(prefix)]
        )
    if args.decoder_only:  # a better voice for an LM that was trained on these codes
        if checkpoint is None and not args.init_from:
            raise UserError("--decoder_only needs --init_from, the codec whose codes are kept")
        for part in (model.encoder, model.quantizer, head):
            part.requires_grad_(False)
    generator_parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(
        generator_parameters, args.gen_lr, (0.8, 0.99), fused=True, weight_decay=0.01
    )
    disc_optimizer = torch.optim.AdamW(disc.parameters(), args.disc_lr, (0.8, 0.99), fused=True)
    balancer = training.Balancer(BALANCE)
    guard, meter = (
        training.StepGuard(),
        training.CostMeter(
            "codec",
            usd_per_hour=args.usd_per_hour,
            budget_usd=args.budget_usd,
            enabled=device.type == "cuda" and process.is_main,
        ),
    )
    total_steps = args.num_epochs * steps_per_epoch
    step, epoch, consumed, best = 0, 0, 0, float("inf")

    stateful = {
        "head": head,
        "disc": disc,
        "optimizer": optimizer,
        "disc_optimizer": disc_optimizer,
        "balancer": balancer,
        "guard": guard,
        "meter": meter,
    }
    if checkpoint is not None:
        if checkpoint.trainer is None:
            raise UserError(f"{checkpoint.path}: an export has no trainer state; use --init_from")
        model.load_tensors(checkpoint.tensors, checkpoint.path)
        for name, part in stateful.items():
            part.load_state_dict(checkpoint.trainer[name])
        step, epoch, consumed = (checkpoint.trainer[k] for k in ("step", "epoch", "consumed"))
        best, total_steps = checkpoint.trainer["best"], checkpoint.trainer["total_steps"]

    listen_steps = 0 if args.decoder_only else int(args.listen_share * total_steps)
    if process.is_main:
        total = (total_steps - listen_steps) * seconds_per_step(model, mel, args, device, False)
        if listen_steps:
            total += listen_steps * seconds_per_step(model, mel, args, device, True)
        describe(args, model, clips, total / 3600, total_steps)
        if checkpoint is not None:
            print(f"resuming {checkpoint.path} at step {step}", flush=True)
    metrics = None
    if process.is_main:
        metrics = training.Metrics(args.checkpoint_dir, step, args.tensorboard)
    meter.start(total_steps, step)
    disc_start = int(args.disc_start * total_steps)

    def save(is_best: bool = False) -> None:
        trainer = {name: part.state_dict() for name, part in stateful.items()}
        trainer |= {"step": step, "epoch": epoch, "consumed": consumed}
        trainer |= {"best": best, "total_steps": total_steps}
        training.save_checkpoint(
            args.checkpoint_dir,
            step,
            stored_config(config),
            model.state_dict(),
            trainer,
            keep_last=args.keep_last,
            best=is_best,
        )

    bar = tqdm(total=total_steps, initial=step, disable=None if process.is_main else True)
    last_save = last_log = time.monotonic()
    samples_logged = 0
    stop_at = min(total_steps, args.max_steps or total_steps)
    batches = training_batches(
        dataset, args.batch_size, args.num_workers, process, args.num_epochs, epoch, consumed
    )
    for epoch, consumed, batch in itertools.islice(batches, max(0, stop_at - step)):
        audio, labels = batch["audio"].to(device), batch["phones"].to(device)
        rate = training.learning_rate(step, total_steps, 1.0, args.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate * args.gen_lr
        disc_optimizer.param_groups[0]["lr"] = rate * args.disc_lr
        counts = draw_num_codebooks(
            len(audio), config.num_codebooks, args.full_rate, (args.seed, step, process.rank)
        ).to(device)

        # Generator: balanced losses on the waveform, the rest beside them.
        listening = step < listen_steps
        adversarial = not listening and step >= disc_start
        if listening:
            info, losses = model.hear(audio), {}
        else:
            estimate, info, losses = training_losses(model, mel, audio, counts)
        if adversarial:
            fake_logits, fake_features = disc(estimate)
            with torch.no_grad():
                _, real_features = disc(audio)
            losses["adversarial"] = discriminator.generator_loss(fake_logits)
            losses["features"] = discriminator.feature_matching_loss(real_features, fake_features)
        phones, phone_accuracy = phone_loss(head(info.semantic), labels)
        others = args.commitment_weight * info.commitment + args.phone_weight * phones
        optimizer.zero_grad(set_to_none=True)
        shares = {}
        if listening:
            others.backward()
        else:
            shares = balancer.backward(losses, estimate, others)
        training.average_gradients(generator_parameters)
        norm = nn.utils.clip_grad_norm_(generator_parameters, args.grad_clip)
        if guard.check((sum(losses.values()) + others).detach(), norm):
            optimizer.step()
            # Each part is quantized once its vectors have settled a little.
            settled = step - (0 if listening else listen_steps) >= args.quantizer_start
            if settled and not args.decoder_only:
                model.quantizer.update(info, training.keyed_generator(args.seed, step, 1 << 20))

        # Discriminator, on the same reconstruction.
        if adversarial:
            real_logits, _ = disc(audio)
            fake_logits, _ = disc(estimate.detach())
            disc_loss = discriminator.discriminator_loss(real_logits, fake_logits)
            disc_optimizer.zero_grad(set_to_none=True)
            disc_loss.backward()
            training.average_gradients(disc.parameters())
            disc_norm = nn.utils.clip_grad_norm_(disc.parameters(), args.grad_clip)
            if guard.check(disc_loss.detach(), disc_norm):
                disc_optimizer.step()
            losses["discriminator"] = disc_loss

        step += 1
        samples_logged += args.batch_size
        meter.tick()
        bar.update()
        if metrics and (step % args.log_every == 0 or step == stop_at):
            now = time.monotonic()
            throughput = samples_logged * args.window_seconds / (now - last_log)
            row = {name: float(loss.detach()) for name, loss in losses.items()}
            row |= {f"share_{name}": share for name, share in shares.items()}
            row |= {"commitment": float(info.commitment.detach()), "phones": float(phones.detach())}
            row |= {"phone_accuracy": float(phone_accuracy), "grad_norm": float(norm)}
            row |= {"lr": rate * args.gen_lr, "skipped": guard.skipped, "epoch": epoch}
            row |= {"unreadable": dataset.unreadable, "audio_seconds_per_second": throughput}
            row |= codebook_metrics(info)
            metrics.log(step, **row)
            sound = "".join(f"{n} {row[n]:.4f} " for n in ("mel", "waveform") if n in row)
            tqdm.write(
                f"step {step}/{total_steps} {sound}"
                f"phones {row['phone_accuracy']:.2f} {throughput:.0f}x real time, {meter.line()}"
            )
            last_log, samples_logged = now, 0

        end_of_epoch = consumed >= steps_per_epoch * args.batch_size
        is_best = False
        if end_of_epoch and process.is_main and validation:
            scores = validate(model, head, mel, validation, device)
            metrics.log(step, **scores)
            summary = ", ".join(f"{name[11:]} {value:.3f}" for name, value in scores.items())
            tqdm.write(f"epoch {epoch}: {summary}")
            loss = scores[f"validation_mel_{config.num_codebooks}"]
            is_best, best = loss < best, min(loss, best)
        due = (epoch + 1) % args.save_every_epochs == 0 and end_of_epoch
        due = due or time.monotonic() - last_save > 60 * args.save_minutes or step == stop_at
        if process.is_main and (due or is_best):
            save(is_best)
            last_save = time.monotonic()
        if meter.remaining_steps_within_budget() == 0:
            print("the budget is spent: stopping here, with a checkpoint")
            save()
            break
    bar.close()
    meter.flush()
    if metrics:
        metrics.close()
        print(f"done: step {step}; export with --export, or paste the line again to go on")


if __name__ == "__main__":
    training.run(main)
