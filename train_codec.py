#!/usr/bin/env python3
"""Phase 2: train the codec, with a GAN, from folders of audio.

    python train_codec.py --data_dirs data/english data/hindi data/telugu --batch_size 32 \
        --num_epochs 100 --gen_lr 1e-4 --disc_lr 1e-4 --checkpoint_dir checkpoints_codec \
        --num_workers 12

The same command goes on from the last complete checkpoint. An epoch is `--epoch_hours` of audio
drawn at random. Under `torchrun` the ranks share the batch. The first `--semantic_share` of the
steps trains the encoder's semantic branch alone, which costs a fifth as much; then the rest joins.
Checkpoints show the average of the last weights: it validates, ships and is inherited. The weights
that go on learning are in `trainer.pt`.
"""

import argparse
import collections
import dataclasses
import functools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

import checkpoints
import command
import data
import discriminator
import teachers
import training
from audio import HOP, SAMPLE_RATE
from codec import CODES, AveragedCodec, Codec, CodecConfig
from command import UserError, number, share, whole
from data import Clips, WindowDataset
from losses import MelLoss, PhoneHead, SpectralLoss, si_sdr, waveform_loss
from phones import PHONES
from training import one_of, setting

LM_CODEBOOKS = 8
SEMANTIC = "encoder.0.", "quantizer.semantic_in.", "quantizer.codebooks.0.embedding"  # tensors
VALIDATION_WINDOWS = 48
CHANGEABLE = "gen_lr", "disc_lr", "teacher", "cuda_graph", "compile"
UNIT_FRAMES = 50  # for each unit, from which the teachers' units are found
KINDS = "semantic_only adversarial codebooks_move codebooks_started"
Mode = collections.namedtuple("Mode", KINDS)  # of step: a CUDA graph holds one kind


def window_bands(text: str) -> dict[str, tuple[int, ...]]:
    """A setting's type: WINDOW:BANDS,… in samples and bands of mels."""
    sizes, bands = zip(*(map(int, pair.split(":")) for pair in text.split(",")), strict=True)
    fields = {"mel_sizes": sizes, "mel_bands": bands}
    discriminator.DiscriminatorConfig(**fields)  # which checks them
    return fields


@dataclass(frozen=True)
class Settings(training.Settings):
    """What `--set` changes of the codec's training."""

    BEFORE = {"waveform_weight": 1.0, "adversarial_weight": 1.0, "features_weight": 2.0,
              "disc_bands": None, "disc_channels": None, "phone_weight": 1.0}  # fmt: skip
    adversarial_weight: float = setting(2.0, number(0), "share in the balance")
    augment_share: float = setting(0.3, share, "chance of each change of the audio; 0: none")
    commitment_weight: float = setting(0.03, number(0), "for each codebook in use")
    disc_bands: dict | None = setting(None, window_bands, "WINDOW:BANDS,… of log-mels; or preset's")
    disc_channels: int | None = setting(None, whole(1), "of their first layer; or preset's")
    disc_preset: str = setting("auto", one_of("auto", "tiny", "small", "base"),
                               "auto: base for base, tiny on a CPU, small between")  # fmt: skip
    disc_seconds: float = setting(1.0, number(0.1), "of a window that discriminators see")
    ema_decay: float | None = setting(None, number(0, 0.999999),
        "of the weights that ship; 0: none; else over 2 % of the steps")  # fmt: skip
    features_weight: float = setting(4.0, number(0), "share in the balance")
    full_rate: float = setting(0.2, share, "share of windows that use all codebooks")
    lm_rate: float = setting(0.5, share, "share of windows that use the LM's 8")
    mel_weight: float = setting(0.5, number(0), "share in the balance")
    phone_weight: float | None = setting(None, number(0),
        "of phone labels on codebook 0; 0: they but measure; or 1, with a teacher 0")  # fmt: skip
    teacher_delay: int = setting(2, whole(0), "frames until codebook 0 tells a frame's unit")
    teacher_weight: float = setting(1.0, number(0), "of the teachers' units on codebook 0")
    waveform_weight: float | None = setting(None, number(above=0), "share; or 0.25, for base 1")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, plan, more = training.run_parser(
        "Phase 2: train the codec.", Settings, num_epochs=100, checkpoint_dir="checkpoints_codec",
        data_dirs=["data/english", "data/hindi", "data/telugu"], warmup_steps=500)  # fmt: skip
    plan.add_argument("--gen_lr", type=number(0), default=1e-4)
    plan.add_argument("--disc_lr", type=number(0), default=1e-4)
    add = more.add_argument
    add("--window_seconds", type=whole_frames, help="of a clip; by default twice the context")
    add("--language_temperature", type=number(above=0), default=2.0, help="1: by hours")
    add("--commercial_only", action="store_true", help="skip non-commercial audio")
    add("--semantic_share", type=share, default=0.1, help="of the steps: semantic branch alone")
    add("--freeze_semantic", action="store_true", help="codebook 0 as --init_from has it")
    add("--decoder_only", action="store_true",
        help="freeze encoder and quantizer; with --export: write the agent's decoder alone")
    add("--disc_start", type=share, default=0.1, help="share of the steps; 1: no GAN")
    add("--spectral_weight", type=number(0), default=0.25, help="share of the bins one by one")
    add("--teacher", nargs="+", default=["auto"], metavar="T",
        help="none, or wavlm, whisper, such models' folders or ids; auto: whisper on CUDA")
    add("--ssl_loss_weight", type=number(0), default=1.0, help="share of the teachers' view")
    add("--cuda_graph", action="store_true", help="replay the step as a CUDA graph: on one GPU")
    add("--compile", action="store_true", help="torch.compile encoder and decoder")
    add("--quantizer_start", type=whole(0), default=200, help="steps before k-means")
    args = parser.parse_args(argv)
    args.given = parser.given(argv)
    return args


def whole_frames(seconds: str) -> float:
    """Seconds as whole 20 ms frames; the longest spectrum that is compared needs 0.1 s."""
    return round(number(0.1, 600)(seconds) * 50) / 50


def draw_num_codebooks(batch: int, total: int, lm_rate: float, full_rate: float, key) -> Tensor:
    """How many codebooks each sample uses, `[B]`: the LM's 8 with `lm_rate`, all with `full_rate`,
    else 1 … total evenly. Quantizer dropout (Zeghidour et al. 2021, section III-C)."""
    generator = training.keyed_generator(*key)
    kind = torch.rand(batch, generator=generator)
    drawn = torch.randint(1, total + 1, (batch,), generator=generator)
    drawn = torch.where(kind < full_rate + lm_rate, min(LM_CODEBOOKS, total), drawn)
    return torch.where(kind < full_rate, total, drawn)


def average_decay(asked: float | None, total_steps: int) -> float:
    """The decay of the weights' average: over the last 2 % of the run, 10,000 steps at most."""
    return min(0.9999, max(0.0, 1 - 50 / total_steps)) if asked is None else asked


def judged_part(samples: int, seconds: float, key: tuple[int, ...]) -> Tensor:
    """Which samples `[n]` of the windows the discriminators see in this step, alike on all ranks:
    they cost more than the codec, and a part drawn anew each step teaches as much."""
    length = min(samples, int(seconds * SAMPLE_RATE))
    start = torch.randint(samples - length + 1, (1,), generator=training.keyed_generator(*key))
    return start + torch.arange(length)


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy over the frames whose label is known; zeros without any."""
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    known = (labels != data.UNKNOWN_PHONE).sum().clamp(min=1)
    total = F.cross_entropy(logits, labels, ignore_index=data.UNKNOWN_PHONE, reduction="sum")
    return total / known, (logits.argmax(-1) == labels).sum() / known


def training_losses(spectra: nn.ModuleDict, estimate: Tensor, audio: Tensor, counts: Tensor):
    estimate = estimate.float()
    losses = {name: loss(estimate, audio) for name, loss in spectra.items()}
    # At high rates the goal is SNR, at the LM's it is how it sounds.
    losses["waveform"] = waveform_loss(estimate, audio, (counts / LM_CODEBOOKS).clamp(min=1).sqrt())
    return estimate, losses


def semantic_learns(args) -> bool:  # codebook 0 and its branch
    return not (args.decoder_only or args.freeze_semantic)


def sizes(args, checkpoint: checkpoints.Checkpoint | None, prints: bool) -> CodecConfig:
    """The codec's sizes: those of the preset, or of the codec that goes on or is frozen. Sets
    `args.window_seconds` where it is open. A window has at least twice the frames that attention
    sees: to a shorter one the context of a new `tiny` gives way; `base` raises UserError."""
    config = CodecConfig.base() if args.preset == "base" else CodecConfig.tiny()
    source = checkpoint
    if source is None and args.init_from and not semantic_learns(args):
        source = checkpoints.load_checkpoint(args.init_from, with_trainer=False)
    if source is not None:
        stored = checkpoints.config_of(CodecConfig, "codec", source.config, source.path)
        same = checkpoint is not None or args.decoder_only  # else the semantic branch alone
        frozen = "context", "semantic_width", "semantic_layers", "semantic_dim"
        changes = {name: getattr(stored, name) for name in frozen}
        config = stored if same else dataclasses.replace(config, **changes)
    needed = 2 * config.context / config.frame_rate
    args.window_seconds = args.window_seconds or needed
    frames = round(args.window_seconds * config.frame_rate)
    if frames >= 2 * config.context:
        return config
    note = f"--window_seconds {args.window_seconds:g}: windows of {frames} frames are under twice "
    note += f"the attention's context of {config.context}"
    if source is not None:
        note = f"warning: {note}, which {source.path} has: what lies past a window is not trained"
    elif args.preset == "base":
        raise UserError(f"{note}, and would run as it was never trained: give at least {needed:g}")
    else:
        config = dataclasses.replace(config, context=frames // 2)
        note = f"{note} that the preset has: this codec gets one of {config.context}"
    if prints:
        print(note, flush=True)
    return config


def discriminator_config(settings: Settings, config: CodecConfig, device: torch.device):
    """The discriminators' sizes: those asked for, or what fits the codec and the device."""
    asked = settings.disc_preset
    if asked == "auto":
        small = "tiny" if device.type == "cpu" else "small"
        base = CodecConfig.base()
        asked = "base" if dataclasses.replace(config, context=base.context) == base else small
    preset = getattr(discriminator.DiscriminatorConfig, asked)()
    changes = {"mel_channels": settings.disc_channels or preset.mel_channels}
    return dataclasses.replace(preset, **changes, **(settings.disc_bands or {}))


def balance(args, settings: Settings, config: CodecConfig) -> dict[str, float]:
    """The losses' shares of the gradient at the codec's output: most is the discriminators', as in
    EnCodec (85 %) and audiocraft (79 %), whose balancer this is; halves left voices without their
    harmonics. Rates beyond the LM's have SNR as their goal: there the waveform keeps its share."""
    waveform = settings.waveform_weight or (1.0 if config.num_codebooks > LM_CODEBOOKS else 0.25)
    return {"waveform": waveform, "mel": settings.mel_weight, "spectral": args.spectral_weight,
            "ssl": args.ssl_loss_weight, "adversarial": settings.adversarial_weight,
            "features": settings.features_weight}  # fmt: skip


def phases(args, total: int) -> dict[str, int]:
    """First steps of the semantic branch alone, of all of the codec and of the discriminators."""
    semantic_steps = int(args.semantic_share * total) if semantic_learns(args) else 0
    joined = max(semantic_steps, int(args.disc_start * total))
    return {"semantic": 0, "codec": semantic_steps, "adversarial": joined}


def validated_rates(config: CodecConfig) -> list[int]:  # the LM's number of codebooks, and all
    return sorted({min(LM_CODEBOOKS, config.num_codebooks), config.num_codebooks})


@torch.no_grad()
def log_audio(metrics: training.Metrics, step: int, model: Codec, batches: list[dict], device):
    """Four held-out windows to TensorBoard: the recordings before step 1, then at each rate."""
    audio, config = batches[0]["audio"][:4].to(device), model.config
    sounds = {"reference": audio}
    if step > 0:
        rates = validated_rates(config)
        sounds = {f"{k}_codebooks": model.decode(model.encode(audio, k)) for k in rates}
    for name, clips in sounds.items():
        for i, clip in enumerate(clips.clamp(-1, 1)):
            metrics.log_audio(step, f"held_out_{i}/{name}", clip, config.sample_rate)


@torch.no_grad()
def validate(model: Codec, head, spectra, batches: list[dict], device, cast, told=None) -> dict:
    """Held out: mean losses and SI-SDR (dB) at the full and at the LM's rate, phone accuracy with a
    `head` and of units with what `told` gives of scores and audio; `mel_…_within` the first context
    of frames, `mel_…_past` it, where attention slides."""
    model.eval()
    scores = collections.defaultdict(list)
    edge = model.config.hop * max(3, model.config.context)  # the longest spectrum needs 1,024
    for batch in batches:
        audio, labels = batch["audio"].to(device), batch["phones"].to(device)
        for rate in validated_rates(model.config):
            counts = torch.full((len(audio),), rate, device=device)
            with cast:
                estimate, info = model(audio, counts)
                logits = head(info.semantic) if head is not None else None
            estimate, losses = training_losses(spectra, estimate, audio, counts)
            row = {f"{name}_{rate}": loss for name, loss in losses.items()}
            for place, part in (("within", slice(edge)), ("past", slice(edge, None))):
                row[f"mel_{rate}_{place}"] = spectra["mel"](estimate[..., part], audio[..., part])
            row[f"si_sdr_{rate}"] = si_sdr(estimate, audio).mean()
            if head is not None:
                row["phone_accuracy"] = label_loss(logits, labels)[1]
            for name, score in row.items():
                scores[f"validation_{name}"].append(float(score))
        if told is not None:  # once: codebook 0 is the same at every rate, and teachers are dear
            loss, accuracy = told(info.scores, audio)
            scores["validation_units"].append(float(loss))
            scores["validation_unit_accuracy"].append(float(accuracy))
    model.train()
    return {name: statistics.fmean(values) for name, values in sorted(scores.items())}


def validation_batches(clips: Clips, config: CodecConfig, phone_ids: dict[str, int]) -> list[dict]:
    """The same windows of held-out speakers every time, three times the context long; or none."""
    if not clips:
        print("warning: no clips in the validation split: nothing tells when to stop")
        return []
    seconds = 3 * config.context / config.frame_rate
    dataset = WindowDataset(clips, seconds, 1, VALIDATION_WINDOWS, phone_ids=phone_ids)
    items = [filled(dataset[i]) for i in range(len(dataset))]
    return [default_collate(items[i : i + 16]) for i in range(0, len(items), 16)]


def filled(item: dict) -> dict:
    """A window whose clip was shorter, laid end to end: silence would pass for easy speech."""
    frames = item["audio"].view(len(item["phones"]), -1)
    loud = frames.any(1).nonzero()
    last = int(loud[-1]) + 1 if len(loud) else len(frames)
    places = torch.arange(len(frames)) % last
    return {**item, "audio": frames[places].view(1, -1), "phones": item["phones"][places]}


def codebook_metrics(all_codes: Tensor) -> dict[str, float]:
    """Perplexity (in codes) of the semantic and the acoustic codebooks of a batch `[B, K, F]`."""
    codes = all_codes.transpose(0, 1).flatten(1)  # [K, B * F]
    counts = torch.zeros(len(codes), int(codes.max()) + 1, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=counts.dtype))
    perplexities = torch.special.entr(counts / codes.shape[1]).sum(1).exp().tolist()
    values = {"perplexity_semantic": perplexities[0]}
    if len(perplexities) > 1:  # else the semantic branch is alone
        values["perplexity_acoustic"] = statistics.fmean(perplexities[1:])
    return values


def description(run: training.Run, model: Codec, found: list, clips: Clips) -> str:
    args, config = run.args, model.config
    context = config.context / config.frame_rate
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    hours = ", ".join(f"{name} {h:.1f} h" for name, h in data.hours_by_language(clips).items())
    taught = "".join(f"{teacher.source} ({teacher.name}), " for teacher in found)
    made = f"codec {parameters:.1f}M parameters, {config.num_codebooks} codebooks"
    return "\n".join([
        f"preset {args.preset}: {made}, device {run.device}",
        f"teacher: {taught}phone labels, {clips.hours('phones'):.1f} h",
        f"windows of {args.window_seconds:g} s, attention over {context:g} s",
        f"data: {len(clips)} clips, {data.count_speakers(clips)} speakers; {hours}"])  # fmt: skip


def export(args) -> None:
    """Writes the newest checkpoint in half precision, as the demo and the LM's data take it; of
    `--decoder_only` the decoder, as the agent's, beside the codec that is there."""
    checkpoint = checkpoints.to_export(args)
    model = Codec(checkpoints.config_of(CodecConfig, "codec", checkpoint.config, checkpoint.path))
    model.load_tensors(checkpoint.tensors, args.checkpoint_dir)
    if args.decoder_only:
        said = f"the agent's decoder of step {checkpoint.step}"
        return print(f"wrote {model.export_decoder(args.export)}: {said}")
    made = checkpoint.step, checkpoint.config, model.export_tensors()
    folder = checkpoints.save_export(args.export, *made)
    prints = Codec.from_checkpoint(folder).fingerprint[:16]
    print(f"wrote {folder}: codec of step {checkpoint.step}, fingerprint {prints}")


class Learner:
    """What learns, from what, and what moves it: new, inherited or from the run's checkpoint."""

    def __init__(self, run: training.Run, config: CodecConfig, found: list) -> None:
        self.args, self.settings, self.teachers = run.args, run.settings, found
        args, settings, device, checkpoint = run.args, run.settings, run.device, run.checkpoint
        self.device = device
        self.model = model = Codec(config).to(device).train()
        self.head = PhoneHead(config.semantic_dim, len(PHONES)).to(device)
        judges = discriminator_config(settings, config, device)
        if checkpoint is not None:
            judges = discriminator.DiscriminatorConfig(**checkpoint.trainer["judges"])
        self.disc = discriminator.Discriminator(judges).to(device)
        self.phone_weight = settings.phone_weight
        if self.phone_weight is None:
            self.phone_weight = 0.0 if found else 1.0
        self.units = None  # what codebook 0 learns of the teachers
        if found and semantic_learns(args):
            widths = (teacher.width for teacher in found)
            self.units = teachers.Units(config.codebook_sizes[0], sum(widths)).to(device)
        spectra = {"mel": MelLoss(config.sample_rate), "spectral": SpectralLoss()}
        used = spectra if args.spectral_weight else {"mel": spectra["mel"]}
        self.spectra = nn.ModuleDict(used).to(device)
        self.cast = run.cast  # quantizer, STFT and losses go on in fp32 within it
        self.frozen = CODES if args.decoder_only else SEMANTIC if args.freeze_semantic else ()
        if args.init_from and checkpoint is None:
            self.inherit()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen))
        self.head.requires_grad_(semantic_learns(args))
        if checkpoint is not None:
            teachers.check_same_teachers(checkpoint.trainer["teacher"], found, checkpoint.path)
            # Where weights are averaged, the model that a checkpoint shows is their average.
            trained = checkpoint.trainer.get("trained_weights", checkpoint.tensors)
            model.load_tensors(trained, checkpoint.path)
        modules = [model, self.head]
        training.start_equal([*modules, self.disc])
        how = {"betas": (0.8, 0.99), "weight_decay": 0.01}
        self.optimizer = training.adamw(modules, args.gen_lr, **how)
        self.disc_optimizer = training.adamw([self.disc], args.disc_lr, **how)
        self.balancer = training.Balancer(balance(args, settings, config))
        # One guard each: healthy steps of the one must not hide that the other stands still.
        self.guard, self.disc_guard = training.StepGuard(), training.StepGuard()
        names = ["head", "disc", "optimizer", "disc_optimizer", "balancer", "guard", "disc_guard"]
        names += ["units"] if self.units is not None else []
        run.parts |= {name: getattr(self, name) for name in names}
        run.restore()
        self.average, decay = None, average_decay(settings.ema_decay, run.schedule.total)
        if decay > 0:
            self.average = run.parts["average"] = AveragedCodec(model, decay)
            if checkpoint is not None and "average" in checkpoint.trainer:  # else it was shorter
                self.average.model.load_tensors(checkpoint.tensors, checkpoint.path)
                self.average.load_state_dict(checkpoint.trainer["average"])
        for each in (self.optimizer, self.disc_optimizer):
            training.make_capturable(each, args.cuda_graph, device)
        if args.compile:  # the forward passes alone; a stream goes step by step
            for part in (*model.encoder, model.decoder):
                part.compile()

    def inherit(self) -> None:
        """The weights of `--init_from`; UserError where it lacks some that are to be frozen."""
        source = self.args.init_from
        inherited = checkpoints.inherit_weights(self.model, source)
        needed = {name for name in self.model.export_tensors() if name.startswith(self.frozen)}
        if lacking := sorted(needed - set(inherited)):
            raise UserError(f"--init_from {source}: {lacking[0]} is not there or of "
                            "another size, and it was to be frozen")  # fmt: skip

    def heard(self, audio: Tensor) -> list:
        """What the teachers hear in `[B, 1, T]`: each its features of all layers."""
        with self.cast:
            return [teacher(audio) for teacher in self.teachers]

    @torch.no_grad()
    def find_units(self, dataset: WindowDataset) -> None:
        """The teachers' units, in windows of the first epoch, become the codes of codebook 0."""
        count = -(-UNIT_FRAMES * len(self.units.centres) * HOP // dataset.samples)
        windows = (dataset[0, i % len(dataset)]["clean"] for i in range(count))
        heard = (self.heard(audio[None].to(self.device)) for audio in windows)
        self.units.find(teachers.joint_target(self.teachers, layers) for layers in heard)
        training.start_equal([self.units])
        for model in {self.model, self.shown}:
            model.quantizer.set_semantic(self.units.codes(model.config.semantic_dim))

    def unit_loss(self, scores: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of codebook 0, from its scores, as the teachers' units some
        frames ago: what they know of a frame they know from what follows it too. They hear the
        audio `[B, 1, T]` before it was distorted."""
        with torch.no_grad():
            units = self.units(teachers.joint_target(self.teachers, self.heard(clean)))
        late = min(self.settings.teacher_delay, scores.shape[1] - 1)
        return label_loss(scores[:, late:], units[:, : scores.shape[1] - late])

    @property
    def shown(self) -> Codec:  # what validates and ships
        return self.average.model if self.average else self.model

    def step(self, mode: Mode, audio, labels, counts, draws, part, ramp, clean=None) -> dict:
        """What the device does in a step: forward, losses, backward, step, for the codec and then
        for the discriminators. Gives what there is to log, as tensors.

        audio `[B, 1, T]`, labels `[B, F]`; `counts` `[B]` of codebooks, `draws` `[K, n]` for the
        quantizer, `part` `[n]` that discriminators see, `ramp`, the part of their share that they
        have by now, and for teachers `clean`. The start of the codebooks alone waits for a GPU."""
        args, settings, model = self.args, self.settings, self.model
        phones_learn, row = semantic_learns(args), {}

        # The codec's forward pass: reconstruction, and codebook 0 as phones and as teachers' units.
        with self.cast:
            if mode.semantic_only:
                info = model.forward_semantic(audio)
            else:
                estimate, info = model(audio, counts)
            semantic = info.semantic if self.phone_weight else info.semantic.detach()
            phone_logits = self.head(semantic) if phones_learn else None

        # Losses on the waveform, which are balanced.
        losses = {}
        if not mode.semantic_only:
            estimate, losses = training_losses(self.spectra, estimate, audio, counts)
            if self.teachers and args.ssl_loss_weight:
                with torch.no_grad():
                    heard = self.heard(audio)
                pairs = zip(self.heard(estimate), heard, strict=True)
                losses["ssl"] = torch.stack([teachers.ssl_loss(*pair) for pair in pairs]).mean()
        if mode.adversarial:
            # One pass serves both sides: nothing changes the discriminators before their step.
            with self.cast:
                real_logits, real_features = self.disc(audio.index_select(-1, part))
                fake_logits, fake_features = self.disc(estimate.index_select(-1, part))
            losses["adversarial"] = discriminator.generator_loss(fake_logits)
            losses["features"] = discriminator.feature_matching_loss(real_features, fake_features)
            row |= discriminator.verdict(real_logits, fake_logits)

        # Losses beside them. Alone, codebook 0 is held to its codes as the LM's eight are together.
        levels = LM_CODEBOOKS if mode.semantic_only else 1
        commitment = info.commitment if self.units is None else info.commitments[1]
        others = levels * settings.commitment_weight * commitment
        if phones_learn:
            row["phones"], row["phone_accuracy"] = label_loss(phone_logits, labels)
            others = others + (self.phone_weight or 1.0) * row["phones"]
        if self.units is not None:
            row["units"], row["unit_accuracy"] = self.unit_loss(info.scores, clean)
            others = others + settings.teacher_weight * row["units"]

        # The codec's backward pass and step; where found_inf is 1, all of it stands still.
        self.optimizer.zero_grad(set_to_none=True)
        if mode.semantic_only:
            others.backward()
        else:
            joining = {"adversarial": ramp, "features": ramp}
            shares = self.balancer.backward(losses, estimate, others, joining)
            row |= {f"share_{name}": value for name, value in shares.items()}
        total = sum(losses.values()) + others
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        row["grad_norm"] = self.guard.step(self.optimizer, parameters, total, settings.grad_clip)
        found_inf, restarted = self.optimizer.found_inf, []
        if mode.codebooks_move:
            stays = args.freeze_semantic or self.units is not None
            restarted = model.quantizer.update(info, draws, stays, found_inf)
        if self.average:
            self.average.update(model, restarted, found_inf)

        # The discriminators' step, on the same reconstruction, and not through the codec.
        if mode.adversarial:
            parameters = list(self.disc.parameters())
            loss = discriminator.discriminator_loss(real_logits, fake_logits)
            self.disc_optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=parameters)
            self.disc_guard.step(self.disc_optimizer, parameters, loss, settings.grad_clip)
            row["discriminator"] = loss
        row |= {**losses, "commitment": commitment}
        return {name: value.detach() for name, value in row.items()} | {"codes": info.codes}


def run_teachers(args: argparse.Namespace, run: training.Run) -> list:
    """The run's teachers; UserError for flags that do not fit."""
    if args.cuda_graph and (run.device.type != "cuda" or run.process.world_size > 1):
        raise UserError("--cuda_graph needs a CUDA GPU, and one alone")
    if not (semantic_learns(args) or run.resumed or args.init_from):
        flag = "--decoder_only" if args.decoder_only else "--freeze_semantic"
        raise UserError(f"{flag} needs --init_from, the codec whose codes are frozen")
    if isinstance(args.teacher, str):  # of a run that began when there could be one alone
        args.teacher = [args.teacher]
    if args.teacher == ["auto"]:
        args.teacher = ["whisper" if run.device.type == "cuda" else "none"]
    needed = semantic_learns(args) or args.ssl_loss_weight > 0
    found = [teachers.load_teacher(name, run.device) for name in args.teacher if needed]
    return list(filter(None, found))


def train(args: argparse.Namespace, run: training.Run) -> None:
    process, device, settings = run.process, run.device, run.settings
    found = run_teachers(args, run)
    training.seed_everything(args.seed)  # the same weights, whichever teacher there is
    if args.cuda_graph:  # what it holds must live on a stream of its own from the start
        torch.cuda.set_stream(torch.cuda.Stream(device))
    config = sizes(args, run.checkpoint, run.is_main)

    # Data: windows drawn at random from the training speakers.
    phone_ids = {phone: i for i, phone in enumerate(PHONES)}
    unreadable = Path(args.checkpoint_dir) / "unreadable.txt"
    splits = ("train", "validation"), args.commercial_only, unreadable
    clips, held_out = data.load_splits(args.data_dirs, *splits)
    items = run.plan(clips.hours(), functools.partial(phases, args))
    drawn = args.window_seconds, args.seed, items, args.language_temperature
    heard = settings.augment_share, phone_ids, unreadable, bool(found) and semantic_learns(args)
    dataset = WindowDataset(clips, *drawn, *heard)
    # On every rank, though one validates: reading it draws from the generator of the weights.
    validation = validation_batches(held_out, config, phone_ids)

    learner = Learner(run, config, found)
    model = learner.model
    if learner.units is not None and not run.resumed:
        if run.is_main:
            print("finding the units of what the teacher hears …", flush=True)
        learner.find_units(dataset)
    replayed = training.StepGraph(learner.step) if args.cuda_graph else None

    def take_step(batch: dict, phase: str, probe: bool = False) -> dict[str, Tensor]:
        """One step of that phase, from the batch on; as a `probe`, with all that it comes to do."""
        semantic_only = phase == "semantic"
        # Each part is quantized once its vectors have settled a little.
        settled = run.step - (0 if semantic_only else run.schedule.starts["codec"])
        moves = (probe or settled >= args.quantizer_start) and not args.decoder_only
        audio, key, books = batch["audio"], (args.seed, run.step), config.num_codebooks
        rates = settings.lm_rate, settings.full_rate
        generator = training.keyed_generator(*key, 1 << 20)
        inputs = {
            "audio": audio, "labels": batch["phones"],
            "counts": draw_num_codebooks(len(audio), books, *rates, (*key, process.rank)),
            "draws": torch.rand(books, max(config.codebook_sizes), generator=generator),
            "part": judged_part(audio.shape[-1], settings.disc_seconds, (*key, 1 << 21)),
            "ramp": torch.tensor(run.schedule.ramp(run.step, "adversarial"))}  # fmt: skip
        inputs |= {"clean": batch["clean"]} if "clean" in batch else {}
        if device.type == "cuda":  # of memory that is not pinned a copy would wait for the device
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        started = model.quantizer.is_initialised
        take = learner.step if probe or not replayed else replayed
        return take(Mode(semantic_only, phase == "adversarial", moves, started), **inputs)

    def stored() -> dict:
        trainer = {"teacher": teachers.described(found)}
        trainer |= {"judges": dataclasses.asdict(learner.disc.config)}
        if learner.average:
            trainer["trained_weights"] = model.state_dict()
        fields = checkpoints.stored_config("codec", config)
        return {"config": fields, "tensors": learner.shown.state_dict(), "trainer": trainer}

    def validated() -> dict[str, float]:
        if args.tensorboard:
            log_audio(run.metrics, run.step, learner.shown, validation, device)
        head = learner.head if semantic_learns(args) else None
        told = None if learner.units is None else learner.unit_loss
        given = learner.spectra, validation, device, learner.cast, told
        return validate(learner.shown, head, *given)

    run.stored, run.validate = stored, validated if validation else None
    run.best_by = f"validation_mel_{config.num_codebooks}"
    run.shown = {"mel": "mel", "waveform": "waveform", "phone_accuracy": "phones",
                 "unit_accuracy": "units"}  # fmt: skip

    first = default_collate([dataset[(0, i)] for i in range(args.batch_size // process.world_size)])
    averaged = [learner.average.model] if learner.average else []
    run.estimate(lambda phase: take_step(first, phase, probe=True), [model, *averaged])
    run.begin(description(run, model, found, clips))
    if run.metrics and args.tensorboard and validation and not run.resumed:
        log_audio(run.metrics, 0, model, validation, device)

    for batch in run.steps(functools.partial(data.training_batches, dataset)):
        rate = run.schedule.rate(run.step, None if run.phase == "semantic" else "codec")
        training.set_learning_rate(learner.optimizer, rate * args.gen_lr)
        disc_rate = run.schedule.rate(run.step, "adversarial") * args.disc_lr
        training.set_learning_rate(learner.disc_optimizer, disc_rate)
        row = take_step(batch, run.phase) | {"lr": rate * args.gen_lr}
        if replayed and replayed.warming:
            run.meter.measure_anew()

        codes = row.pop("codes")
        run.step_done(lambda: {**row, **codebook_metrics(codes),  # noqa: B023
                               "unreadable": dataset.unreadable})  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.export:
        return export(args)
    with training.open_training("codec", args, Settings, CHANGEABLE) as run:
        train(args, run)


if __name__ == "__main__":
    command.run(main)
