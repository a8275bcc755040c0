"""What surrounds the steps of a training: ranks, schedule, metrics, money, saving and resuming."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoints import Checkpoint, open_run, save_checkpoint
from command import (
    ArgumentParser,
    UserError,
    append_json_line,
    default_workers,
    finite_or_none,
    first_line,
    json_lines,
    number,
    only_one,
    whole,
    writable_file,
    writable_folder,
    write_text,
)

T = TypeVar("T")
PLAN_BUDGET_USD = 1500.0


# ------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Distributed:
    """This process' place among those that `torchrun` started; rank 0 of 1 without it."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0


def setup_distributed(device: str = "auto") -> Distributed:
    """Read torchrun's environment, join the process group (gloo on CPU, nccl on CUDA).

    `device`: auto (CUDA where there is one), cpu, cuda or cuda:N. Raises UserError for a device
    that this machine lacks, or whose arithmetic does not serve (mps has no float64).
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _resolve_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # windows have one length: the fastest kernels pay
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(cleanup_distributed)
    return Distributed(rank, world_size, local_rank, chosen)


def _resolve_device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: not a device; use auto, cpu or cuda") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise UserError(f"--device {device}: not supported; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no CUDA GPU here; use --device cpu")
    index = local_rank if chosen.index is None or world_size > 1 else chosen.index
    if index >= torch.cuda.device_count():
        raise UserError(
            f"GPU {index} asked for, this machine has {torch.cuda.device_count()}: "
            "lower --nproc_per_node or --device"
        )
    return torch.device("cuda", index)


def loader_workers(asked: int | None) -> int:
    """Worker processes of this rank's loader: those asked for, or its share of the cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, default_workers() // ranks_here) if asked is None else asked


def cleanup_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all ranks, as a new tensor; `tensor` itself on one process."""
    if _num_ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / _num_ranks()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Call after a backward pass: each gradient becomes its mean over the ranks.

    Every rank must have gradients for the same parameters. Nothing on one process.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if _num_ranks() == 1 or not gradients:
        return
    means = all_reduce_mean(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, means.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def start_equal(modules: Iterable[torch.nn.Module | None]) -> None:
    """Parameters and buffers as rank 0 has them, on every rank; nothing on one process."""
    if _num_ranks() == 1:
        return
    for module in filter(None, modules):
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def from_main_rank(value: int) -> int:
    """Rank 0's `value`, on every rank."""
    if _num_ranks() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return int(shared)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def item_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator for one sample: the same draw whichever worker, rank or resumed run asks."""
    return np.random.default_rng((seed % 2**32, epoch, index))


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone: a resumed run draws the same."""
    return torch.Generator().manual_seed(int(item_rng(*key).integers(2**62)))


# ----------------------------------------------------------------------- flags and settings


def setting(default: object, parse: Callable[[str], object], meaning: str) -> object:
    """A field of `Settings`: its default, what reads its value from `--set`, and what it means."""
    return dataclasses.field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """What a preset fixes of a training, and `--set NAME=VALUE` changes. Trainers add their own."""

    grad_clip: float = setting(1.0, number(above=0), "largest norm of the gradient")
    save_minutes: float = setting(15.0, number(0), "between two checkpoints, at most")

    @classmethod
    def parse(cls, text: str) -> tuple[str, object]:
        """`--set`'s type: NAME=VALUE as (name, value)."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        name, equals, value = text.partition("=")
        if not equals or name not in fields:
            names = ", ".join(fields)
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a name of {names}")
        try:
            return name, fields[name].metadata["parse"](value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None

    @classmethod
    def help(cls) -> str:
        """The settings and what they mean, a line each."""
        lines = [
            f"  {field.name:<20}{field.metadata['meaning']} ({field.default})"
            for field in dataclasses.fields(cls)
        ]
        return "\n".join(["settings of the preset, for --set:", *lines])

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


class _Merge(argparse.Action):
    """Collects `--set NAME=VALUE ...`, however often it is given, in one dict."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (before if isinstance(before, dict) else {}) | dict(values))


def one_of(*values: str | int) -> Callable[[str], object]:
    """A setting's type: one of `values`, all of one type."""

    def parse(text: str) -> object:
        if text not in map(str, values):
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, values))}")
        return type(values[0])(text)

    return parse


def run_parser(
    description: str, settings: type[Settings], **defaults: object
) -> tuple[ArgumentParser, argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """A parser with the flags that all trainers share, its group of the plan's flags, and the rest.

    defaults: those of data_dirs, num_epochs, checkpoint_dir and warmup_steps.
    """
    parser = ArgumentParser(description, epilog=settings.help())
    plan = parser.add_argument_group("the plan's flags")
    plan.add_argument("--data_dirs", nargs="+")
    plan.add_argument("--batch_size", type=whole(1), default=32, help="windows a step, all ranks")
    plan.add_argument("--num_epochs", type=whole(1))
    plan.add_argument("--checkpoint_dir")
    plan.add_argument("--num_workers", type=whole(0), help="by default one a core")
    more = parser.add_argument_group("advanced")
    add = more.add_argument
    add("--preset", choices=("auto", "tiny", "base"), default="auto", help="auto: base on CUDA")
    add("--set", nargs="+", action=_Merge, type=settings.parse, default={}, metavar="NAME=VALUE",
        help="settings of the preset, see below")  # fmt: skip
    add("--epoch_hours", type=number(above=0), help="audio drawn an epoch; else all, at most 60")
    add("--warmup_steps", type=whole(0))
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=whole(1), help="CPU threads")
    add("--seed", type=whole(-(2**63), 2**63 - 1), default=0)
    add("--fresh", action="store_true", help="start over, in an empty folder")
    add("--init_from", help="checkpoint whose weights to start from")
    add("--save_every_epochs", type=whole(1), default=5)
    add("--keep_last", type=whole(1), default=3, help="checkpoints, and the best")
    add("--log_every", type=whole(1), default=50, help="steps a line of metrics")
    add("--max_steps", type=whole(1), help="stop here, though the schedule goes on")
    add("--usd_per_hour", type=number(above=0), default=3.39)
    add("--budget_usd", type=number(above=0), help="the run ends within it")
    add("--tensorboard", action="store_true")
    add("--export", metavar="FOLDER", help="write the newest checkpoint as shipped")
    parser.set_defaults(**defaults)
    return parser, plan, more


# How and where a run works, not what it learns: free to differ whenever it is resumed.
LOCAL = frozenset({
    "device", "threads", "num_workers", "checkpoint_dir", "fresh", "save_every_epochs",
    "save_minutes", "keep_last", "log_every", "max_steps", "usd_per_hour", "tensorboard", "export",
    "given", "set",
})  # fmt: skip
# What a resumed run can take up in its middle.
CHANGEABLE = frozenset({
    "num_epochs", "batch_size", "data_dirs", "commercial_only", "grad_clip", "budget_usd",
})  # fmt: skip


def spell_flag(name: str, value: object) -> str:
    """A flag as the command line has it."""
    if isinstance(value, bool) or value is None:
        return f"--{name}" if value else f"no --{name}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *map(str, values)])


def spell_setting(name: str, value: object) -> str:
    """A setting as the command line has it."""
    return f"--set {name}={value}"


def take_stored(
    values: dict,
    stored: dict,
    given: Iterable[str],
    changeable: frozenset[str],
    where: str | Path,
    spell: Callable[[str, object], str],
) -> list[str]:
    """Makes `values` those that a resumed run has stored, but for what the command line changes.

    `given` names what stands on the command line. Returns lines to print. Raises UserError for a
    change that is not among `changeable`.
    """
    lines = []
    for name, before in stored.items():
        now = values.get(name, before)
        if now == before or name in LOCAL:
            continue
        if name not in given or now == "auto":
            values[name] = before
            # A value that the run worked out itself is no news.
            if now not in (None, "auto") or name == "budget_usd":
                lines.append(f"as the run was started: {spell(name, before)}")
        elif name in changeable:
            lines.append(f"from here on {spell(name, now)} (until now {before})")
        else:
            raise UserError(
                f"{spell(name, now)}: the run in {where} was started with {spell(name, before)}; "
                "give that, or start in a new --checkpoint_dir with --init_from"
            )
    return lines


# --------------------------------------------------------------------------- schedule, steps


class Schedule:
    """How many steps there are, in which phases, and the learning rate's course over them.

    `starts(total)` names the phases in their order, each with its first step. A change of the total
    moves what lies ahead: phases that began stay where they are, and the learning rate goes on from
    where it is, slower or faster, so that it neither jumps nor rises. `extend` is the exception.
    """

    def __init__(
        self,
        total: int,
        starts: Callable[[int], dict[str, int]] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        self._starts = starts or (lambda total: {"": 0})
        self.total, self.starts = total, self._starts(total)
        self.warmup_steps = warmup_steps
        self._turn = (warmup_steps, 0.0)  # the last change: its step, and how far the cosine was

    def phase(self, step: int) -> str:
        """The phase of the step that comes after `step` steps."""
        return [name for name, start in self.starts.items() if start <= step][-1]

    def ahead(self, step: int, total: int | None = None) -> dict[str, int]:
        """How many steps of each phase come after `step` steps, if there were `total` in all."""
        total = self.total if total is None else total
        starts = self._moved(step, total)
        ends = [*list(starts.values())[1:], total]
        spans = zip(starts.items(), ends, strict=True)
        return {name: max(0, min(end, total) - max(start, step)) for (name, start), end in spans}

    def resize(self, step: int, total: int) -> None:
        """From `step` on the run has `total` steps in all."""
        self.starts = self._moved(step, total)
        if step > self.warmup_steps:
            self._turn = (step, self._progress(step))
        self.total = total

    def extend(self, step: int, total: int) -> None:
        """As `resize`, but on the curve of a run that had so many steps from the beginning."""
        self.resize(step, total)
        self._turn = (self.warmup_steps, 0.0)

    def rate(self, step: int, phase: str | None = None, *, final_ratio: float = 0.1) -> float:
        """The learning rate at `step`, as a share of its peak; where `phase` is named, that of what
        joins with it, which has a warm-up of its own.

        Linear warm-up, then a cosine to `final_ratio` at the last step. Steps count from 0; the
        first one already learns (1 / warmup_steps).
        """
        if step < self.warmup_steps:
            rate = (step + 1) / self.warmup_steps
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
            rate = final_ratio + (1 - final_ratio) * cosine
        return rate if phase is None else min(rate, self.ramp(step, phase))

    def ramp(self, step: int, phase: str) -> float:
        """How far the warm-up of what joins with `phase` is, from above 0 to 1."""
        return min(1.0, max(1, step + 1 - self.starts[phase]) / max(1, self.warmup_steps))

    def _progress(self, step: int) -> float:
        turned, done = self._turn
        return min(1.0, done + (1 - done) * (step - turned) / max(1, self.total - turned))

    def _moved(self, step: int, total: int) -> dict[str, int]:
        planned = self._starts(total)
        return {
            name: start if start < step else max(step, planned[name])
            for name, start in self.starts.items()
        }

    def state_dict(self) -> dict:
        return {"total": self.total, "starts": dict(self.starts), "turn": list(self._turn)}

    def load_state_dict(self, state: dict) -> None:
        self.total, self.starts = state["total"], dict(state["starts"])
        self._turn = tuple(state["turn"])


class StepGuard:
    """Tells which steps to skip: those whose loss or gradient norm is not finite on any rank.

    `watch` gives the answer on the device, where optimizer and codebooks can heed it without a wait
    (and within a CUDA graph); `settle` brings the counts to the host.
    """

    def __init__(self, max_consecutive: int = 5) -> None:
        self.max_consecutive = max_consecutive
        self.skipped = self.consecutive = 0
        self._counts: Tensor | None = None  # skipped since the last settling, in a row by now
        self._last: Tensor | None = None  # loss and gradient norm

    def watch(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 where this step must be skipped, else 0.0: a scalar, the same on all ranks."""
        last = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        skip = (all_reduce_mean((~last.isfinite()).any().float()) > 0).float()
        if self._counts is None or self._counts.device != last.device:
            self._counts = torch.tensor([0.0, self.consecutive], device=last.device)
            self._last = torch.zeros_like(last)
        self._last.copy_(last)
        # Skipped, one more in each count; else the run of skipped ones ends.
        self._counts.mul_(torch.stack([torch.ones_like(skip), skip])).add_(skip)
        return skip

    def settle(self) -> None:
        """Waits for the device and counts. Raises UserError after `max_consecutive` skipped steps
        in a row."""
        if self._counts is None:
            return
        skipped, consecutive = self._counts.tolist()
        self._counts[0] = 0
        self.skipped += int(skipped)
        self.consecutive = int(consecutive)
        if self.consecutive >= self.max_consecutive:
            loss, grad_norm = self._last.tolist()
            raise UserError(
                f"{self.consecutive} steps in a row were not finite (loss {loss:g}, gradient norm "
                f"{grad_norm:g}): lower the learning rate, then run the same command again; "
                "it goes on from the last complete checkpoint"
            )

    def state_dict(self) -> dict:
        self.settle()
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.consecutive = state["skipped"], state["consecutive"]
        self._counts = None


def parameter_groups(
    modules: Iterable[torch.nn.Module | None], weight_decay: float
) -> list[dict[str, object]]:
    """What AdamW is to move: matrices with decay; norms, biases, scales and embeddings without."""
    decayed, others = {}, {}
    for module in filter(None, modules):
        embeddings = {
            id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)
        }
        for name, parameter in module.named_parameters():
            plain = parameter.ndim < 2 or id(parameter) in embeddings or "embedding" in name
            if parameter.requires_grad:
                (others if plain else decayed)[id(parameter)] = parameter
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": [*g.values()], "weight_decay": decay} for g, decay in groups if g]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every group, in place where a CUDA graph reads it (see `make_capturable`)."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_capturable(
    optimizer: torch.optim.Optimizer, capturable: bool, device: torch.device
) -> None:
    """Lets a CUDA graph hold `optimizer.step()`, its learning rate a tensor; or the reverse.

    Call it after loading state too: that brings the flags of the run which saved it.
    """
    for group in optimizer.param_groups:
        group["capturable"] = capturable
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate


class StepGraph:
    """Replays a training step as one CUDA graph: Python is met once, not at every kernel.

    `function(mode, **inputs)` takes tensors of fixed shapes and gives a dict of tensors. It must
    read and write the same memory at every call, draw nothing at random and never wait for the
    device. Each mode is called as it is `warmup` times (optimizers make their state then, libraries
    choose their kernels), then captured. Results are overwritten by the next call. Everything, the
    models' making included, belongs on one stream that is not the default one.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], warmup: int = 5) -> None:
        self.function, self.warmup = function, warmup
        self._mode: object = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    @property
    def warming(self) -> bool:
        """Whether the last call was of those that say nothing of the pace: eager, or captured."""
        return self._calls <= self.warmup + 1

    def __call__(self, mode: object, **inputs: Tensor) -> dict[str, Tensor]:
        if mode != self._mode:
            self._mode, self._calls, self._graph = mode, 0, None
        self._calls += 1
        if self._calls <= self.warmup:
            return self.function(mode, **inputs)
        if self._graph is None:
            self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            self._results = {}
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Thread-local: the loader's thread goes on pinning memory meanwhile.
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = self.function(mode, **self._inputs)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._results


# ---------------------------------------------------------------------------- loss balance


class Balancer:
    """Gradient balancer (Défossez et al. 2022, "High Fidelity Neural Audio Compression", 3.4).

    Each loss `i` reaches the model as  R * w_i / sum(w) * g_i / <|g_i|>,  where g_i is its
    gradient at the model's output and <|g_i|> a running mean of its norm per clip, averaged over
    ranks. So weights are shares of the gradient, whatever the scale of each loss.
    Unlike the paper's code, the sum is divided by the batch size, so that neither the batch size
    nor the number of ranks changes the gradient's scale: R (`total_norm`) is the norm per clip.
    """

    def __init__(
        self, weights: dict[str, float], decay: float = 0.999, total_norm: float = 1.0
    ) -> None:
        self.weights = dict(weights)
        self.decay = decay
        self.total_norm = total_norm
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}  # removes the bias of starting the means at zero

    def backward(
        self,
        losses: dict[str, Tensor],
        output: Tensor,
        others: Tensor | None = None,
        ramps: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Send balanced gradients through the model in one backward pass.

        `losses`: scalars computed from `output` `[B, 1, T]`, names known to `weights` (any
        subset; the shares of those present add up to 1). `others`: a scalar to add as it is
        (commitment, teacher, phones). `ramps`: scalars above 0 by which the weights of some losses
        are multiplied, as of one that joins. Nothing but the model gets gradients (discriminators
        do not). A non-finite gradient is passed on for StepGuard to see and leaves the means alone.
        Returns each loss' share of the output gradient's norm in this step, as scalars. Nothing
        waits for the device.
        """
        gradients = self._gradients(losses, output)
        names = list(gradients)
        local = torch.stack([g.flatten(1).norm(dim=1).mean() for g in gradients.values()])
        norms = dict(zip(names, local.unbind(), strict=True))
        self._update(dict(zip(names, all_reduce_mean(local).unbind(), strict=True)))
        scales = self._scales(names, ramps or {})
        total = torch.zeros_like(output, dtype=torch.float32)
        for name in names:
            total.addcmul_(gradients[name], scales[name] / output.shape[0])
        tensors, seeds = [output], [total.to(output.dtype)]
        if others is not None and others.requires_grad:
            tensors, seeds = [output, others], [seeds[0], torch.ones_like(others)]
        torch.autograd.backward(tensors, seeds)
        parts = {name: norms[name] * scales[name] for name in names}
        joint = torch.stack(list(parts.values())).sum()
        joint = torch.where(joint == 0, 1.0, joint)
        return {name: part / joint for name, part in parts.items()}

    def _gradients(self, losses: dict[str, Tensor], output: Tensor) -> dict[str, Tensor]:
        unknown = set(losses) - set(self.weights)
        if unknown or not losses:
            raise ValueError(f"losses without a weight: {sorted(unknown)}; given: {list(losses)}")
        gradients = {}
        for name, loss in losses.items():
            gradient = None
            if loss.requires_grad:
                # Losses may share their graph (one discriminator pass), so it is kept.
                (gradient,) = torch.autograd.grad(
                    loss, output, retain_graph=True, allow_unused=True
                )
            gradients[name] = (torch.zeros_like(output) if gradient is None else gradient).float()
        return gradients

    def _update(self, norms: dict[str, Tensor]) -> None:
        finite = torch.stack(list(norms.values())).isfinite().all()
        for name, norm in norms.items():
            for store in (self._sums, self._counts):
                there = store.get(name)
                if there is None or there.device != norm.device:
                    store[name] = torch.full_like(norm, 0.0 if there is None else float(there))
            sums, counts = self._sums[name], self._counts[name]
            # A loss at exactly zero (not yet started) would pull its mean down, and its first
            # real gradient would arrive many times too large.
            counts_in = finite & (norm > 0)
            sums.copy_(torch.where(counts_in, self.decay * sums + norm, sums))
            counts.copy_(torch.where(counts_in, self.decay * counts + 1.0, counts))

    def _scales(self, names: list[str], ramps: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: self.weights[name] for name in names}
        joint = sum(weights.values()) or 1.0
        if any(name in ramps for name in names):  # tensors, which the host must not read
            weights = {name: w * ramps[name] if name in ramps else w for name, w in weights.items()}
            joint = sum(weights.values())
        scales = {}
        for name in names:
            sums, counts = self._sums[name], self._counts[name]
            scale = self.total_norm * weights[name] / joint * counts / sums
            scales[name] = torch.where(sums > 0, scale, 1.0)
        return scales

    def state_dict(self) -> dict:
        sums, counts = ({n: float(v) for n, v in d.items()} for d in (self._sums, self._counts))
        return {"sums": sums, "counts": counts}

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._counts = (
            {name: torch.tensor(value) for name, value in state[kind].items()}
            for kind in ("sums", "counts")
        )


# --------------------------------------------------------------------------------- metrics


class Metrics:
    """One JSON object a step in `run_dir/metrics.jsonl`, and TensorBoard curves where asked.

    Opening it drops lines after `resume_step` and a last line cut short by a kill, so that the
    file of a resumed run reads like an uninterrupted one. Open it on the main rank only.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0, tensorboard: bool = False):
        self.path = Path(run_dir) / "metrics.jsonl"
        if self.path.exists():
            rows = (row for _, row in json_lines(self.path, skip_damaged=True))
            kept = [row for row in rows if row.get("step", 0) <= resume_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = _tensorboard(self.path.parent, resume_step) if tensorboard else None

    def log(self, step: int, **values: float | int | str | Tensor) -> None:
        """Append one line; a value that is not finite is written as null."""
        row = {name: finite_or_none(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def log_audio(self, step: int, name: str, audio: Tensor, sample_rate: int) -> None:
        """Add a clip `[1, T]` in [-1, 1] to TensorBoard; nothing without it."""
        if self._board is not None:
            self._board.add_audio(name, audio.detach().cpu().float(), step, sample_rate)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(run_dir: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)


# ----------------------------------------------------------------------------------- money


def format_hours(hours: float) -> str:
    """41 h, 1.2 h, 12 min, 18 s."""
    if not math.isfinite(hours):
        return "? h"
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 0.995:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 9.95 else f"{hours:,.0f} h"


def format_dollars(dollars: float) -> str:
    """$1,500, $139, $1.25."""
    if not math.isfinite(dollars):
        return "$?"
    return f"${dollars:,.2f}" if dollars < 9.995 else f"${dollars:,.0f}"


class CostMeter:
    """Measures a command's pace; projects its hours and dollars; keeps the shared ledger.

    Phases of a schedule have a pace each: measured where the phase has run, else expected (see
    `Run.estimate`), corrected by what came of the other expectations. Each run appends what it
    spent to `ledger` at least once a minute, so that a killed pod's time counts too. Disabled
    (default without CUDA) it projects hours only and writes nothing. `budget_usd` is for this run,
    its earlier, resumed parts included. Enable on the main rank only.
    """

    flush_seconds = 60.0
    warmup_ticks = 3  # the first steps of a phase compile, fill caches and start workers

    def __init__(
        self,
        stage: str,
        ledger: str | Path = Path("costs.jsonl"),
        usd_per_hour: float = 3.39,
        budget_usd: float | None = None,
        enabled: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self.ledger = Path(ledger)
        self.usd_per_hour = usd_per_hour
        self.budget_usd = budget_usd
        self.enabled = torch.cuda.is_available() if enabled is None else enabled
        self.expected: dict[str, float] = {}  # phase → seconds a step
        self.machine = ""  # on which that holds
        self.news = False  # a pace has just become known
        self._clock = clock
        self._run = uuid.uuid4().hex[:12]
        self._earlier_hours = 0.0
        self._measured: dict[str, list[float]] = {}  # phase → seconds, steps
        self._schedule, self._planned, self._done, self._ticks = Schedule(0), 0, 0, 0
        self._started = self._flushed = self._latest = None

    def start(self, schedule: Schedule, done_steps: int = 0, planned: int | None = None) -> None:
        """Start the clock; `done_steps` were done before (resume), `planned` were asked for,
        where a budget has already shortened the schedule."""
        self._schedule, self._planned = schedule, planned or schedule.total
        self._done = done_steps
        self._started = self._flushed = self._latest = self._clock()
        self.measure_anew()

    def tick(self) -> None:
        """Count a finished step."""
        now = self._clock()
        phase = self._schedule.phase(self._done)
        if phase != self._phase:
            self._phase, self._ticks = phase, 0
        self._ticks += 1
        if self._ticks > self.warmup_ticks:
            pace = self._measured.setdefault(phase, [0.0, 0])
            pace[0] += now - self._latest
            pace[1] += 1
            self.news |= self._ticks == self.warmup_ticks + 1
        self._latest = now
        self._done += 1
        if now - self._flushed >= self.flush_seconds:
            self.flush()

    def measure_anew(self) -> None:
        """Forget this phase's pace so far: what was measured is not what is to come."""
        self._phase, self._ticks = self._schedule.phase(self._done), 0
        self._measured.pop(self._phase, None)

    def elapsed_hours(self) -> float:
        """Hours of this run so far, its earlier parts included."""
        here = 0.0 if self._started is None else (self._clock() - self._started) / 3600
        return self._earlier_hours + here

    def hours_ahead(self, total: int | None = None) -> float:
        """What is left of the run, or would be if it had `total` steps; nan until known."""
        spans = self._schedule.ahead(self._done, total)
        return sum(steps * self._pace(phase) for phase, steps in spans.items() if steps) / 3600

    def projected_hours(self) -> float:
        """Of this run from its first to its last step; nan until known."""
        return self.elapsed_hours() + self.hours_ahead()

    def fitted_steps(self) -> int:
        """The total with which the schedule ends within the budget, on every rank the same.

        It shrinks whenever it must. It grows back towards what was asked for only in its first
        tenth and when a phase has just been measured. One hour in fifty is held back for the last
        validation and checkpoint, and so that a pace that varies by less changes nothing.
        Call on all ranks, though one alone measures.
        """
        return from_main_rank(self._fitted_steps())

    def _fitted_steps(self) -> int:
        total, done = self._schedule.total, self._done
        early, self.news = self.news or done < 0.1 * self._planned, False
        if self.budget_usd is None or not self.enabled:
            return total
        left = self.budget_usd / self.usd_per_hour - self.elapsed_hours()
        if math.isnan(self.hours_ahead(self._planned)):
            return total
        fits = self.hours_ahead() <= left
        if fits and not early:
            return total
        few = max(done, 1)
        many = max(few, self._planned if early else total)
        while few < many:
            middle = (few + many + 1) // 2
            if self.hours_ahead(middle) <= 0.98 * left:
                few = middle
            else:
                many = middle - 1
        if fits:
            return few if few > 1.02 * total else total
        return min(few, total)

    def line(self) -> str:
        """`projected 41 h = $139 (spent $212 of $1,500)`; hours alone where disabled."""
        hours = self.projected_hours()
        if not self.enabled:
            return f"projected {format_hours(hours)}"
        dollars = format_dollars(hours * self.usd_per_hour)
        spent = f"spent {format_dollars(self.spent_usd())} of {format_dollars(PLAN_BUDGET_USD)}"
        return f"projected {format_hours(hours)} = {dollars} ({spent})"

    def spent_usd(self) -> float:
        """Dollars spent on all stages, by the ledger, with what is not yet in it."""
        spent = sum(_number(row, "dollars") for row in self._ledger_rows())
        if self._started is None or not self.enabled:
            return spent
        return spent + (self._clock() - self._flushed) / 3600 * self.usd_per_hour

    def flush(self) -> None:
        """Append what was spent since the last time to the ledger; call at the end too."""
        if self._started is None:
            return
        now = self._clock()
        hours, self._flushed = (now - self._flushed) / 3600, now
        if not self.enabled or hours <= 0:
            return
        row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "stage": self.stage,
            "run": self._run,
            "hours": hours,
            "dollars": hours * self.usd_per_hour,
        }
        append_json_line(self.ledger, row)

    def state_dict(self) -> dict:
        expected = {**self.expected, **self._known()}
        paces = {"expected": expected, "machine": self.machine}
        return {"run": self._run, "hours": self.elapsed_hours(), **paces}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting a resumed run, what it spent after its last checkpoint included."""
        self._run = state["run"]
        rows = [row for row in self._ledger_rows() if row.get("run") == self._run]
        self._earlier_hours = max(state["hours"], sum(_number(row, "hours") for row in rows))
        self.expected, self.machine = dict(state["expected"]), state["machine"]

    def _known(self) -> dict[str, float]:
        """Seconds a step of each phase that was measured."""
        return {phase: seconds / n for phase, (seconds, n) in self._measured.items() if n}

    def _pace(self, phase: str) -> float:
        """Seconds a step; nan where nothing is known."""
        known = self._known()
        if phase in known:
            return known[phase]
        if phase not in self.expected:
            return list(known.values())[-1] if known else math.nan
        both = known.keys() & self.expected.keys()
        expected = sum(self.expected[name] for name in both)
        correction = sum(known[name] for name in both) / expected if expected > 0 else 1.0
        return self.expected[phase] * correction

    def _ledger_rows(self) -> list[dict]:
        if not self.ledger.exists():
            return []
        return [row for _, row in json_lines(self.ledger, skip_damaged=True)]


def _number(row: dict, name: str) -> float:
    """A field of the ledger; 0 for what is none, as another program may have written it."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


# -------------------------------------------------------------------------- around the loop


class Run:
    """What surrounds the steps of a training: folder, flags, schedule, budget, log and checkpoints.

    In this order: `open_training` gives one; `plan` fixes the schedule; the trainer makes its
    models and fills `parts` (name → what has a `state_dict`) and `stored`; `restore`; `estimate`;
    `begin`; then `for batch in run.steps(...)` with `run.step_done` as the last line of each step.

    args: the flags, on a resumed run those it was started with but for what was changed.
    settings: what the preset fixes, likewise.
    checkpoint: where it goes on from, on the CPU; None for a new run, and once it is restored.
    step, epoch, consumed: steps done, the epoch, and samples consumed in it.
    stored: gives config, tensors, further trainer state and tokenizer of a checkpoint.
    validate: gives scores by name; the lowest `best_by` is the best checkpoint's.
    shown: metrics on the terminal's lines → under which name.
    """

    def __init__(
        self,
        stage: str,
        args: argparse.Namespace,
        settings: Settings,
        process: Distributed,
        checkpoint: Checkpoint | None,
        news: list[str],
    ) -> None:
        self.args, self.settings = args, settings
        self.process, self.checkpoint = process, checkpoint
        self.resumed = checkpoint is not None
        self.is_main, self.device = process.is_main, process.device
        self.workers = loader_workers(args.num_workers)
        self.meter = CostMeter(
            stage,
            usd_per_hour=args.usd_per_hour,
            budget_usd=args.budget_usd,
            enabled=process.is_main and keeps_costs(args, process.device),
        )
        self.parts: dict[str, object] = {"meter": self.meter}
        self.stored: Callable[[], dict] = dict
        self.validate: Callable[[], dict[str, float]] | None = None
        self.best_by = ""
        self.shown: dict[str, str] = {}
        self.step = self.epoch = self.consumed = 0
        self.best = math.inf
        self.metrics: Metrics | None = None
        self._bar: tqdm | None = None
        self._news, self._refit = news, True
        self._saved_step = -1

    # -- before the first step -------------------------------------------------------------------

    def plan(self, data_hours: float, starts: Callable[[int], dict[str, int]]) -> int:
        """Fixes schedule and place; returns how many windows an epoch has.

        An epoch is `--epoch_hours`, by default all of the data, 60 h at most; the number is kept
        when a run is resumed, though the data have grown.
        """
        args = self.args
        args.epoch_hours = args.epoch_hours or min(60.0, data_hours)
        batch_hours = args.batch_size * args.window_seconds / 3600
        self.steps_per_epoch = max(1, round(args.epoch_hours / batch_hours))
        self.planned = args.num_epochs * self.steps_per_epoch
        self.schedule = Schedule(self.planned, starts, args.warmup_steps)
        if self.checkpoint is not None:
            self._go_on(self.checkpoint.trainer)
        return self.steps_per_epoch * args.batch_size

    def _go_on(self, trainer: dict) -> None:
        """The place and schedule of a checkpoint, with what flags have changed."""
        args, before = self.args, trainer["flags"]
        self.step, self.epoch, self.consumed = (trainer[k] for k in ("step", "epoch", "consumed"))
        self.best = trainer["best"]
        self.schedule.load_state_dict(trainer["schedule"])
        total = self.schedule.total
        epochs = args.num_epochs - self.epoch - 1
        left = max(0, self.steps_per_epoch - math.ceil(self.consumed / args.batch_size))
        self.planned = self.step + max(0, left + epochs * self.steps_per_epoch)
        self._refit = before["budget_usd"] != args.budget_usd
        if before["batch_size"] != args.batch_size or self.planned < total:
            self.schedule.resize(self.step, self.planned)
        elif self.planned > trainer["planned_steps"]:
            self.schedule.extend(self.step, self.planned)
        if self.schedule.total != total:
            self._news.append(f"the schedule had {total} steps, now {self.schedule.total}")
            self._refit = True

    def restore(self) -> None:
        """Gives each of `parts` its state, and lets go of the checkpoint."""
        if self.checkpoint is not None:
            trainer, where = self.checkpoint.trainer, self.checkpoint.path
            for name, part in self.parts.items():
                try:
                    part.load_state_dict(trainer[name])
                except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"{where}: its {name} does not fit this version or these flags "
                        f"({first_line(error)}); start in a new --checkpoint_dir with --init_from"
                    ) from error
        self._saved_step = self.step
        self.checkpoint = None

    def estimate(self, take: Callable[[str], object], modules: Iterable[torch.nn.Module]) -> None:
        """Times real steps of each phase ahead, then puts `modules` and `parts` back as they were.

        `take(phase)` makes a step of that phase, at the real batch; on all ranks, as it is meant.
        A resumed run on the same kind of machine knows its paces from its checkpoint.
        """
        name = self.device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self.device)
        machine = f"{name}, {self.process.world_size} ranks, batch {self.args.batch_size}"
        expected = self.meter.expected if machine == self.meter.machine else {}
        phases = [phase for phase, steps in self.schedule.ahead(self.step).items() if steps]
        unknown = [phase for phase in phases if phase not in expected]
        self.meter.expected, self.meter.machine = expected, machine
        if unknown:
            with _put_back([*modules, *(p for p in self.parts.values() if p is not self.meter)]):
                for phase in unknown:
                    expected[phase] = min(self._seconds(take, phase) for _ in range(2))
        self.meter.start(self.schedule, self.step, self.planned)

    def _seconds(self, take: Callable[[str], object], phase: str) -> float:
        start = time.perf_counter()
        take(phase)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def forecast(self) -> str:
        """`an epoch is 60.0 h of audio; 100 epochs = 56,250 steps = 41 h = $139`."""
        args, hours = self.args, self.meter.projected_hours()
        price = ""
        if self.device.type == "cuda":
            price = f" = {format_dollars(hours * args.usd_per_hour)}"
        return (
            f"an epoch is {args.epoch_hours:.1f} h of audio; {args.num_epochs} epochs = "
            f"{self.planned} steps = {format_hours(hours)}{price}"
        )

    def begin(self, description: str) -> None:
        """Prints what the run is and what changed, meets the budget, opens the log."""
        args = self.args
        if self.is_main:
            print(f"{description}\nsettings: {self.settings}\n{self.forecast()} (estimate)")
            if self.resumed:
                place = f"at step {self.step} of {self.schedule.total}"
                print("\n".join([f"resuming {args.checkpoint_dir} {place}", *self._news]))
            print(end="", flush=True)
        if self._refit:
            self.meter.news = True
            self._fit(print)
        if self.is_main:
            self.metrics = Metrics(args.checkpoint_dir, self.step, args.tensorboard)

    # -- the steps ---------------------------------------------------------------------------------

    @property
    def stop_at(self) -> int:
        return min(self.schedule.total, self.args.max_steps or self.schedule.total)

    @property
    def phase(self) -> str:
        """The phase of the step that is being made."""
        return self.schedule.phase(self.step)

    def steps(self, batches: Iterable[tuple[int, int, T]]) -> Iterator[T]:
        """The batches of the steps to make; `batches` as `data.training_batches` gives them."""
        total = self.schedule.total
        self._bar = tqdm(total=total, initial=self.step, disable=None if self.is_main else True)
        self._last_save = self._last_log = time.perf_counter()
        self._samples, self._waited = 0, 0.0
        source = iter(batches)
        while self.step < self.stop_at:
            asked = time.perf_counter()
            place = next(source, None)
            self._waited += time.perf_counter() - asked
            if place is None:
                break
            self.epoch, self.consumed, batch = place
            yield batch
        self._bar.close()
        if self.is_main and self.step != self._saved_step:
            self.save()
        if self.is_main:
            more = "more --num_epochs" if self.step >= self.schedule.total else "the line again"
            print(f"done: step {self.step}; export with --export, or go on with {more}")

    def step_done(self, row: Callable[[], dict]) -> None:
        """Counts a step, fits the schedule, and logs, validates and saves where that is due.

        `row` gives the step's metrics, as numbers or tensors; it is asked for where they are read.
        """
        args = self.args
        self.step += 1
        self._samples += args.batch_size
        self.meter.tick()
        self._bar.update()
        due = self.step % args.log_every == 0
        if due or self.device.type != "cuda":  # a GPU would be waited for
            for guard in self._guards:
                guard.settle()
        if due and args.budget_usd is not None and self.step < self.stop_at:
            self._fit(tqdm.write)
        if self.is_main and (due or self.step == self.stop_at):
            self._log(row())
        ended = self.consumed > (self.steps_per_epoch - 1) * args.batch_size
        best = bool(ended and self.is_main and self.validate and self._validated())
        due = ended and (self.epoch + 1) % args.save_every_epochs == 0
        due |= time.perf_counter() - self._last_save > 60 * self.settings.save_minutes
        if self.is_main and (due or best or self.step >= self.stop_at):
            self.save(best)

    def save(self, best: bool = False) -> None:
        """Writes a checkpoint of the step that was made; on the main rank only."""
        trainer = {name: part.state_dict() for name, part in self.parts.items()}
        trainer |= {"step": self.step, "epoch": self.epoch, "consumed": self.consumed}
        trainer |= {"best": self.best, "schedule": self.schedule.state_dict()}
        trainer |= {"total_steps": self.schedule.total, "planned_steps": self.planned}
        trainer["flags"] = {k: v for k, v in vars(self.args).items() if k not in LOCAL}
        trainer["settings"] = dataclasses.asdict(self.settings)
        stored = self.stored()
        trainer |= stored.pop("trainer", {})
        save_checkpoint(
            self.args.checkpoint_dir,
            self.step,
            trainer=trainer,
            keep_last=self.args.keep_last,
            best=best,
            **stored,
        )
        self._last_save, self._saved_step = time.perf_counter(), self.step

    @property
    def _guards(self) -> list[StepGuard]:
        return [part for part in self.parts.values() if isinstance(part, StepGuard)]

    def _fit(self, say: Callable[[str], object]) -> None:
        """Makes the schedule end within the budget."""
        total = self.meter.fitted_steps()
        if total == self.schedule.total:
            return
        self.schedule.resize(self.step, total)
        if self.is_main:
            budget = format_dollars(self.args.budget_usd)
            say(
                f"budget {budget}: {total} of {self.planned} steps, "
                "and the learning rate ends with them"
            )
        if self._bar is not None:
            self._bar.total = total

    def _log(self, row: dict) -> None:
        now = time.perf_counter()
        seconds = now - self._last_log
        pace = self._samples * self.args.window_seconds / seconds
        row = {name: finite_or_none(value) for name, value in row.items()}
        row |= {"skipped": sum(guard.skipped for guard in self._guards), "epoch": self.epoch}
        row |= {"audio_seconds_per_second": pace, "data_wait": self._waited / seconds}
        self.metrics.log(self.step, **row)
        shown = [(label, row.get(name)) for name, label in self.shown.items()]
        learnt = "".join(f"{label} {value:.3f} " for label, value in shown if value is not None)
        tqdm.write(
            f"step {self.step}/{self.schedule.total} {learnt}{pace:.0f}x real time, "
            f"{row['data_wait']:.0%} of it waiting for data, {self.meter.line()}"
        )
        self._last_log, self._samples, self._waited = now, 0, 0.0

    def _validated(self) -> bool:
        """Validates; whether this is the best so far."""
        scores = self.validate()
        self.metrics.log(self.step, **scores)
        summary = ", ".join(f"{name[11:]} {value:.3f}" for name, value in scores.items())
        tqdm.write(f"epoch {self.epoch}: {summary}")
        score, before = scores.get(self.best_by, math.inf), self.best
        self.best = min(score, before)
        return score < before

    def close(self) -> None:
        """What must not be lost, however the run ends."""
        self.meter.flush()
        if self.metrics is not None:
            self.metrics.close()


def keeps_costs(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether a run writes what it spends to the ledger."""
    return device.type == "cuda" or args.budget_usd is not None


@contextlib.contextmanager
def open_training(
    stage: str,
    args: argparse.Namespace,
    presets: dict[str, Settings],
    changeable: Iterable[str] = (),
) -> Iterator[Run]:
    """A run in `--checkpoint_dir`, new or resumed, for the time of this process.

    First of all: what would stop it hours later stops it here. `changeable`: flags and settings of
    this trainer that a resumed run can take up, beside `CHANGEABLE`. Raises UserError where the
    device is not there, the folder cannot be written or is at work, or the checkpoint does not fit.
    """
    process = setup_distributed(args.device)
    if args.batch_size % process.world_size:
        raise UserError(f"--batch_size {args.batch_size} must divide by {process.world_size} ranks")
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        folder = Path(args.checkpoint_dir)
        if process.is_main:
            stack.callback(_remove_unused, folder)
            stack.enter_context(only_one(writable_folder(folder, "--checkpoint_dir")))
            if keeps_costs(args, process.device):
                writable_file("costs.jsonl", "the ledger of costs")
        # Tensors on the CPU: the parts take copies to where they live.
        checkpoint = open_run(folder, stage, args.fresh and process.is_main, "cpu")
        settings, news = _as_started(args, presets, checkpoint, process, changeable)
        seed_everything(args.seed)
        run = Run(stage, args, settings, process, checkpoint, news)
        stack.callback(run.close)
        yield run


def _as_started(
    args: argparse.Namespace,
    presets: dict[str, Settings],
    checkpoint: Checkpoint | None,
    process: Distributed,
    changeable: Iterable[str],
) -> tuple[Settings, list[str]]:
    """Flags (in place) and settings as a checkpoint has them, changed by the command line; with
    lines on what changed."""
    news, changeable = [], CHANGEABLE.union(changeable)
    if checkpoint is not None:
        trainer, where = checkpoint.trainer, checkpoint.path
        if trainer is None:
            raise UserError(f"{where}: an export has no trainer state; use --init_from")
        needed = ("step", "epoch", "consumed", "best", "schedule", "planned_steps", "flags",
                  "settings")  # fmt: skip
        for name in needed:
            if name not in trainer:
                raise UserError(
                    f"{where}: no {name} in its trainer state, as another version wrote it; start "
                    "in a new --checkpoint_dir with --init_from"
                )
        news = take_stored(vars(args), trainer["flags"], args.given, changeable, where, spell_flag)
    if args.preset == "auto":
        args.preset = "base" if process.device.type == "cuda" else "tiny"
    values = {**dataclasses.asdict(presets[args.preset]), **args.set}
    if checkpoint is not None:
        stored = trainer["settings"]
        news += take_stored(values, stored, args.set, changeable, where, spell_setting)
    return dataclasses.replace(presets[args.preset], **values), news


def _remove_unused(folder: Path) -> None:
    """A folder that a refused run has made goes with it."""
    with contextlib.suppress(OSError):
        if {file.name for file in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


@contextlib.contextmanager
def _put_back(parts: list) -> Iterator[None]:
    """Whatever happens within: `parts` and the random generators are afterwards as before."""
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
