"""What surrounds the steps of a training: ranks, schedule, metrics, money, saving and resuming."""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import re
import sys
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import command
from checkpoints import open_run, save_checkpoint
from command import ArgumentParser, UserError, finite_or_none, number, whole

PLAN_BUDGET_USD = 1500.0


@dataclass(frozen=True)
class Distributed:
    """This process' place among those that `torchrun` started; rank 0 of 1 without it."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:  # which prints, logs and saves
        return self.rank == 0


def setup_distributed(device: str = "auto") -> Distributed:
    """Read torchrun's environment, join the process group (gloo on CPU, nccl on CUDA). `device`:
    auto, cpu, cuda or cuda:N; UserError for others, and for one that this machine lacks."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, world_size, local_rank = (int(os.environ.get(*name)) for name in names)
    chosen = _resolve_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # windows have one length
    if world_size > 1 and not dist.is_initialized():
        # One rank may prepare data for hours while the others wait.
        more = {"timeout": timedelta(days=2)}
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", **more)
        atexit.register(dist.destroy_process_group)
    return Distributed(rank, world_size, chosen)


def _resolve_device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if (named := re.fullmatch(r"cpu|cuda(?::(\d+))?", device)) is None:
        raise UserError(f"--device {device}: not supported; use auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return torch.device("cpu")
    index = int(named[1]) if named[1] and world_size == 1 else local_rank
    if index >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {device}: PyTorch sees {count or 'no'} CUDA GPU here; use "
                        "--device cpu, or lower --nproc_per_node or --device")  # fmt: skip
    return torch.device("cuda", index)


def loader_workers(asked: int | None) -> int:
    """Worker processes of this rank's loader: those asked for, or its share of the cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, command.default_workers() // ranks_here) if asked is None else asked


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all ranks, as a new tensor; `tensor` itself on one process."""
    if _num_ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / _num_ranks()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """After a backward pass: gradients, of the same parameters on all ranks, become their means."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if _num_ranks() > 1 and gradients:
        means = all_reduce_mean(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(means, gradients)


def start_equal(modules: Iterable[nn.Module | None]) -> None:
    """Gives every rank the parameters and buffers of rank 0."""
    for module in filter(None, modules if _num_ranks() > 1 else ()):
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def from_main_rank(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    values = [value]
    if _num_ranks() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def item_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator for one sample: the same draw whichever worker, rank or resumed run asks."""
    return np.random.default_rng((seed % 2**32, epoch, index))


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone: a resumed run draws the same."""
    return torch.Generator().manual_seed(int(item_rng(*key).integers(2**62)))


def setting(default: object, parse: Callable[[str], object], meaning: str) -> object:
    """A field of `Settings`: its default, what reads its value, and what it means."""
    return dataclasses.field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """What is seldom turned of a training, by `--set NAME=VALUE`. Trainers add their own."""

    grad_clip: float = setting(1.0, number(above=0), "largest norm of the gradient")
    save_minutes: float = setting(15.0, number(0), "between two checkpoints, at most")
    BEFORE: ClassVar[dict] = {}  # by name, what runs had that began before it could be set

    @classmethod
    def parse(cls, text: str) -> tuple[str, object]:
        """`--set`'s type: NAME=VALUE as (name, value)."""
        parsers = {field.name: field.metadata["parse"] for field in dataclasses.fields(cls)}
        name, equals, value = text.partition("=")
        if not equals or name not in parsers:
            names = ", ".join(parsers)
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a name of {names}")
        try:
            return name, parsers[name](value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None

    @classmethod
    def help(cls) -> str:
        fields = dataclasses.fields(cls)
        lines = [f"\n  {f.name:<20}{f.metadata['meaning']} ({f.default})" for f in fields]
        return "".join(["settings, for --set:", *lines])

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


def one_of(*values: str | int) -> Callable[[str], object]:  # a setting's type
    named = {str(value): value for value in values}

    def parse(text: str) -> object:
        if text not in named:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(named)}")
        return named[text]

    return parse


def run_parser(description: str, settings: type[Settings], **defaults: object) -> tuple:
    """A parser with the flags that all trainers share, its group of the plan's, and of the rest."""
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
    add("--set", nargs="+", action="extend", type=settings.parse, metavar="NAME=VALUE")
    add("--epoch_hours", type=number(above=0), help="audio drawn an epoch; else all, at most 60")
    add("--warmup_steps", type=whole(0))
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=whole(1), help="CPU threads")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
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
LOCAL = ("device", "threads", "num_workers", "checkpoint_dir", "fresh", "save_every_epochs",
         "save_minutes", "keep_last", "log_every", "max_steps", "usd_per_hour", "tensorboard",
         "export", "given", "set")  # fmt: skip
# Where a run stands: steps done, the epoch, samples consumed in it, and the best score so far.
PLACE = ("step", "epoch", "consumed", "best")
# What a resumed run can take up in its middle.
CHANGEABLE = ("num_epochs", "batch_size", "data_dirs", "commercial_only", "grad_clip", "budget_usd",
              "precision")  # fmt: skip


def take_stored(values: dict, stored: dict, given, changeable, where, settings=()) -> list[str]:
    """Makes `values` those that a resumed run has stored, but for what is `given` on the command
    line (`settings` by `--set`) and `changeable`: else UserError. Returns lines to print."""

    def spell(name: str, value: object) -> str:
        if name in settings:
            return f"--set {name}={value}"
        if isinstance(value, bool) or value is None:
            return f"--{name}" if value else f"no --{name}"
        return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])

    lines = []
    for name, before in stored.items():
        now = values.get(name, before)
        if now == before or name in LOCAL:
            continue
        if name not in given or now == "auto":
            values[name] = before
            if now not in (None, "auto") or name == "budget_usd":  # else it was worked out
                lines.append(f"as the run was started: {spell(name, before)}")
        elif name in changeable:
            lines.append(f"from here on {spell(name, now)} (until now {before})")
        else:
            raise UserError(f"{spell(name, now)}: the run in {where} was started with "
                            f"{spell(name, before)}; give that, or start in a new --checkpoint_dir "
                            "with --init_from")  # fmt: skip
    return lines


class Schedule:
    """How many steps there are, in which phases, and the learning rate's course over them.

    `starts(total)` gives the first step of each phase, in their order. A change of the total moves
    what lies ahead: phases that began stay, and the learning rate goes on from where it is, so that
    it neither jumps nor rises. `planned` steps were asked for; a budget allows less."""

    def __init__(self, total: int, starts=lambda total: {"": 0}, warmup_steps: int = 0) -> None:
        self.total = self.planned = total
        self._starts, self.starts = starts, starts(total)
        self.warmup_steps = warmup_steps
        self._turn = warmup_steps, 0.0  # the last change: its step, and how far the cosine was

    def phase(self, step: int) -> str:
        """The phase of the step that comes after `step` steps."""
        return [name for name, start in self.starts.items() if start <= step][-1]

    def ahead(self, step: int, total: int | None = None) -> dict[str, int]:
        """How many steps of each phase come after `step` steps, if there were `total` in all."""
        total = self.total if total is None else total
        starts = self._moved(step, total)
        spans = zip(starts.items(), [*list(starts.values())[1:], total], strict=True)
        return {name: max(0, min(end, total) - max(start, step)) for (name, start), end in spans}

    def resize(self, step: int, total: int) -> None:
        self.starts = self._moved(step, total)
        if step > self.warmup_steps:
            self._turn = (step, self._progress(step))
        self.total = total

    def extend(self, step: int, total: int) -> None:
        """As `resize`, but on the curve of a run that had so many steps from the beginning."""
        self.resize(step, total)
        self._turn = (self.warmup_steps, 0.0)

    def rate(self, step: int, phase: str | None = None, *, final_ratio: float = 0.1) -> float:
        """The learning rate at `step` (from 0), as a share of its peak: a linear warm-up, then a
        cosine to `final_ratio`. What joins with a `phase` has a warm-up of its own."""
        cosine = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
        rate = final_ratio + (1 - final_ratio) * cosine
        if step < self.warmup_steps:
            rate = (step + 1) / self.warmup_steps
        return rate if phase is None else min(rate, self.ramp(step, phase))

    def ramp(self, step: int, phase: str) -> float:
        """How far the warm-up of what joins with `phase` is, from above 0 to 1."""
        return min(1.0, max(1, step + 1 - self.starts[phase]) / max(1, self.warmup_steps))

    def _progress(self, step: int) -> float:
        turned, done = self._turn
        return min(1.0, done + (1 - done) * (step - turned) / max(1, self.total - turned))

    def _moved(self, step: int, total: int) -> dict[str, int]:
        starts, planned = self.starts.items(), self._starts(total)
        return {name: old if old < step else max(step, planned[name]) for name, old in starts}

    def state_dict(self) -> dict:
        return {"total": self.total, "starts": dict(self.starts), "turn": list(self._turn)}

    def load_state_dict(self, state: dict) -> None:
        self.total, self.starts = state["total"], dict(state["starts"])
        self._turn = tuple(state["turn"])


class StepGuard:
    """Which steps to skip: those whose loss or gradient norm is not finite on any rank. It answers
    on the device, where optimizer and codebooks heed it without a wait and within a CUDA graph."""

    def __init__(self, max_consecutive: int = 5) -> None:
        self.max_consecutive = max_consecutive
        self.skipped = self.consecutive = 0
        self._seen: Tensor | None = None  # [4]: both counts, the last loss and gradient norm

    def watch(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 where this step must be skipped, else 0.0: a scalar, the same on all ranks."""
        last = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        skip = (all_reduce_mean((~last.isfinite()).any().float()) > 0).float()
        if self._seen is None:
            self._seen = torch.cat([last.new_tensor([self.skipped, self.consecutive]), last])
        self._seen[1].mul_(skip)  # a step that is not skipped ends the row
        self._seen[:2].add_(skip)
        self._seen[2:].copy_(last)
        return skip

    def step(self, optimizer, weights: Iterable[Tensor], loss: Tensor, clip: float) -> Tensor:
        """What follows a backward pass: gradients averaged over the ranks, then clipped to the norm
        `clip`; a step, unless it must be skipped. Returns the norm before clipping."""
        weights = list(weights)
        average_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, clip)
        optimizer.found_inf = self.watch(loss, norm)  # a fused optimizer stands still where it is 1
        optimizer.step()
        return norm

    def settle(self) -> None:
        """Counts, waiting for the device. UserError after `max_consecutive` skipped in a row."""
        if self._seen is None:
            return
        *counts, loss, grad_norm = self._seen.tolist()
        self.skipped, self.consecutive = map(int, counts)
        if self.consecutive >= self.max_consecutive:
            raise UserError(f"{self.consecutive} steps in a row were not finite (loss {loss:g}, "
                f"gradient norm {grad_norm:g}): lower the learning rate and run again")  # fmt: skip

    def state_dict(self) -> dict:
        self.settle()
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.consecutive = state["skipped"], state["consecutive"]
        self._seen = None


def adamw(modules: Iterable[nn.Module | None], rate: float, betas: tuple, weight_decay: float):
    """AdamW of what learns: matrices with decay; norms, biases, scales and embeddings without."""
    decayed, others = {}, {}
    for module in filter(None, modules):
        parts = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        embeddings = {id(part.weight) for part in parts}
        for name, parameter in module.named_parameters():
            plain = parameter.ndim < 2 or id(parameter) in embeddings or "embedding" in name
            if parameter.requires_grad:
                (others if plain else decayed)[id(parameter)] = parameter
    groups = ((decayed, weight_decay), (others, 0.0))
    groups = [{"params": [*g.values()], "weight_decay": decay} for g, decay in groups if g]
    return torch.optim.AdamW(groups, rate, betas, fused=True)


def optimizers(parts: Mapping[str, Sequence[nn.Module]], rates: Mapping[str, float], betas: tuple,
               weight_decay: float) -> tuple[dict, dict[str, list[nn.Parameter]]]:  # fmt: skip
    """An `adamw` for each of `parts` but the empty, at its rate, and the weights of each, to be
    clipped apart."""
    made, weights = {}, {}
    for name, modules in parts.items():
        if not modules:
            continue
        made[name] = adamw(modules, rates[name], betas, weight_decay)
        weights[name] = [weight for module in modules for weight in module.parameters()]
    return made, weights


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every group, in place where a CUDA graph reads it (see `make_capturable`)."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_capturable(optimizer: torch.optim.Optimizer, capturable: bool, device) -> None:
    """Lets a CUDA graph hold `optimizer.step()`, its learning rate a tensor; or the reverse. Call
    it after loading state, which brings the flags of the run that saved it."""
    for group in optimizer.param_groups:
        group["capturable"] = capturable
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if capturable else rate


class StepGraph:
    """Replays a step as one CUDA graph: Python is met once, not at every kernel.

    `function(mode, **inputs)` takes tensors of fixed shapes and gives a dict of tensors, which the
    next call overwrites. It must use the same memory at every call, draw from no generator and
    never wait for the device. Each mode is called `warmup` times as it is (always where that is
    infinite, as on a CPU), for optimizers make their state and libraries choose kernels. All of it
    belongs on one stream that is not the default one; with gradients, the making of models too.

    The function may call `split` where a stage ends: each is then a graph of its own, and `between`
    is called after each but the last, in replays as in plain calls."""

    def __init__(self, function: Callable, warmup: float = 5, between=lambda: None) -> None:
        self.function, self.warmup, self.between = function, warmup, between
        self._mode, self._calls, self._graphs, self._recording = None, 0, [], None

    @property
    def warming(self) -> bool:  # the last call says nothing of the pace: eager, or captured
        return self._calls <= self.warmup + 1

    def __call__(self, mode: object = None, **inputs: Tensor) -> dict[str, Tensor]:
        if mode != self._mode:
            self._mode, self._calls, self._graphs, self._results = mode, 0, [], {}
        self._calls += 1
        if self._calls <= self.warmup:
            return self.function(mode, **inputs)
        if not self._graphs:
            self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            with contextlib.ExitStack() as self._recording:
                self.split()
                self._results = self.function(mode, **self._inputs)
            self._recording = None
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        for graph in self._graphs[:-1]:
            graph.replay()
            self.between()
        self._graphs[-1].replay()
        return self._results

    def split(self) -> None:
        """Ends a stage of the function that calls it."""
        if self._recording is None:
            self.between()
            return
        self._recording.close()
        self._recording.enter_context(self._capture())

    def _capture(self) -> contextlib.AbstractContextManager:
        """Adds a graph; what is done within the block becomes it."""
        pool = self._graphs[0].pool() if self._graphs else None  # replays keep their order
        self._graphs.append(torch.cuda.CUDAGraph())
        # Thread-local: the loader's thread goes on pinning memory meanwhile.
        mode, stream = {"capture_error_mode": "thread_local"}, torch.cuda.current_stream()
        return torch.cuda.graph(self._graphs[-1], pool, stream, **mode)


class Balancer:
    """Gradient balancer (Défossez et al. 2022, "High Fidelity Neural Audio Compression", 3.4).

    Each loss `i` reaches the model as  w_i / sum(w) * g_i / <|g_i|>,  where g_i is its gradient at
    the model's output and <|g_i|> a running mean of its norm per clip, over all ranks: weights are
    shares of the gradient. Unlike in the paper's code the sum is divided by the batch size."""

    def __init__(self, weights: dict[str, float], decay: float = 0.999) -> None:
        self.weights, self.decay = dict(weights), decay
        # By name [2]: a sum of norms, and a count, which removes the bias of starting at zero.
        self._means: dict[str, Tensor] = {}

    def backward(self, losses: dict[str, Tensor], output: Tensor, others=0.0, ramps=None) -> dict:
        """Send balanced gradients through the model in one backward pass.

        `losses`: scalars computed from `output` `[B, 1, T]`, some of those that `weights` names.
        `others`: a scalar to add as it is. `ramps`: by name, scalars above 0 that multiply weights
        of losses which join late. A gradient that is not finite is passed on, and leaves the means
        alone. Returns each loss' share of the output gradient's norm. Nothing waits."""
        gradients = {}
        for name, loss in losses.items():  # which may share a graph (one discriminator pass)
            gradients[name] = torch.autograd.grad(loss, output, retain_graph=True)[0].float()
        norms = torch.stack([g.flatten(1).norm(dim=1).mean() for g in gradients.values()])
        self._update(losses, all_reduce_mean(norms))
        weights = {name: self.weights[name] * (ramps or {}).get(name, 1.0) for name in losses}
        joint = sum(weights.values())
        scales, total = [], torch.zeros_like(output, dtype=torch.float32)
        for name, gradient in gradients.items():
            sums, counts = self._means[name]
            scales.append(torch.where(sums > 0, weights[name] / joint * counts / sums, 1.0))
            total.addcmul_(gradient, scales[-1] / output.shape[0])
        ((output * total).sum() + others).backward()
        parts = norms * torch.stack(scales)
        return dict(zip(losses, (parts / parts.sum()).unbind(), strict=True))

    def _update(self, names: Iterable[str], norms: Tensor) -> None:
        finite = norms.isfinite().all()
        for name, norm in zip(names, norms.unbind(), strict=True):
            if name not in self._means:
                self._means[name] = torch.zeros(2)
            mean = self._means[name] = self._means[name].to(norm)
            # Zeros, of a loss not yet started, would have its first gradient arrive too large.
            moved = self.decay * mean + torch.stack([norm, torch.ones_like(norm)])
            mean.copy_(torch.where(finite & (norm > 0), moved, mean))

    def state_dict(self) -> dict:
        means = [(name, mean.tolist()) for name, mean in self._means.items()]
        return {"sums": {n: m[0] for n, m in means}, "counts": {n: m[1] for n, m in means}}

    def load_state_dict(self, state: dict) -> None:
        self._means = {n: torch.tensor([s, state["counts"][n]]) for n, s in state["sums"].items()}


class Metrics:
    """One JSON object a step in `run_dir/metrics.jsonl`, and TensorBoard curves; on the main rank.
    A resumed run's reads like an uninterrupted one's: lines after `resume_step` are dropped."""

    def __init__(self, run_dir: str | Path, resume_step: int = 0, tensorboard: bool = False):
        self.path = Path(run_dir) / "metrics.jsonl"
        if self.path.exists():
            rows = [row for _, row in command.json_lines(self.path, skip_damaged=True)]
            lines = [json.dumps(row) + "\n" for row in rows if row.get("step", 0) <= resume_step]
            command.write_text(self.path, "".join(lines))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = None
        if tensorboard:
            missing = "--tensorboard needs a package: pip install tensorboard"
            writer = command.needed("torch.utils.tensorboard", missing).SummaryWriter
            board = str(self.path.parent / "tensorboard")
            self._board = writer(board, purge_step=resume_step + 1)

    def log(self, step: int, **values: float | int | str | Tensor) -> dict:
        """Append a line, and return it as numbers; a value that is not finite is None."""
        row = {name: finite_or_none(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items() if self._board else ():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)
        return row

    def log_audio(self, step: int, name: str, audio: Tensor, sample_rate: int) -> None:
        """Add a clip `[1, T]` in [-1, 1] to TensorBoard; nothing without it."""
        if self._board is not None:
            self._board.add_audio(name, audio.detach().cpu().float(), step, sample_rate)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def format_hours(hours: float) -> str:  # 41 h, 1.2 h, 12 min, 18 s
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 0.995:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 9.95 else f"{hours:,.0f} h"


def format_dollars(dollars: float) -> str:  # $1,500, $139, $1.25
    return f"${dollars:,.2f}" if dollars < 9.995 else f"${dollars:,.0f}"


class CostMeter:
    """Measures a command's pace; projects its hours and dollars; writes the shared ledger.

    Each phase of a schedule has a pace: measured where it has run, else expected (`Run.estimate`),
    corrected by what came of the other expectations. What a run spends goes to `ledger` once a
    minute; unless `enabled` (on the main rank only) nothing is written, and no dollars projected.
    `budget_usd` holds for all parts of a resumed run."""

    flush_seconds = 60.0
    warmup_ticks = 3  # the first steps of a phase compile, fill caches and start workers

    def __init__(self, stage: str, usd_per_hour: float = 3.39, budget_usd: float | None = None,
                 enabled=False, ledger="costs.jsonl", clock=time.monotonic) -> None:  # fmt: skip
        self.stage, self.ledger, self.enabled = stage, Path(ledger), enabled
        self.usd_per_hour, self.budget_usd = usd_per_hour, budget_usd
        self.expected: dict[str, float] = {}  # phase → seconds a step
        self.machine = ""  # on which that holds
        self._clock, self._run = clock, uuid.uuid4().hex[:12]
        self._measured: dict[str, list[float]] = {}  # phase → ticks, seconds past the warm-up
        self._hours = 0.0  # of this run, its earlier parts included, until `_flushed`
        self._flushed: float | None = None  # None before the start

    def start(self, schedule: Schedule, done_steps: int = 0) -> None:
        self._schedule, self._done = schedule, done_steps
        self._flushed = self._latest = self._clock()

    def tick(self) -> None:  # a step is done
        now = self._clock()
        pace = self._measured.setdefault(self._schedule.phase(self._done), [0, 0.0])
        pace[0] += 1
        if pace[0] > self.warmup_ticks:
            pace[1] += now - self._latest
        self._latest = now
        self._done += 1
        if now - self._flushed >= self.flush_seconds:
            self.flush()

    def measure_anew(self) -> None:
        """Forget this phase's pace so far: what was measured is not what is to come."""
        self._measured.pop(self._schedule.phase(self._done), None)

    def elapsed_hours(self) -> float:
        return self._hours + self._since_flush()

    def hours_ahead(self, total: int | None = None) -> float:
        """What is left of the run, or would be if it had `total` steps; nan until known."""
        spans = self._schedule.ahead(self._done, total)
        return sum(steps * self._pace(phase) for phase, steps in spans.items() if steps) / 3600

    def projected_hours(self) -> float:  # from the first to the last step; nan until known
        return self.elapsed_hours() + self.hours_ahead()

    def fitted_steps(self) -> int:
        """The total with which the schedule ends within the budget, towards what was asked for. One
        hour in fifty is left for the last checkpoint, and so that small changes change nothing."""
        total, first = self._schedule.total, max(self._done, 1)
        if self.budget_usd is None or not self.enabled:
            return total
        left = self.budget_usd / self.usd_per_hour - self.elapsed_hours()
        totals = range(first, max(first, self._schedule.planned) + 1)
        most = totals[max(1, bisect_right(totals, 0.98 * left, key=self.hours_ahead)) - 1]
        return total if self.hours_ahead() <= left and most <= 1.02 * total else most

    def line(self) -> str:
        """`projected 41 h = $139 (spent $212 of $1,500)`; hours alone where disabled."""
        hours = self.projected_hours()
        if not self.enabled:
            return f"projected {format_hours(hours)}"
        dollars = hours * self.usd_per_hour, self.spent_usd(), PLAN_BUDGET_USD
        cost, spent, plan = map(format_dollars, dollars)
        return f"projected {format_hours(hours)} = {cost} (spent {spent} of {plan})"

    def spent_usd(self) -> float:  # on all stages, what is not yet in the ledger included
        return self._in_ledger("dollars") + self.enabled * self._since_flush() * self.usd_per_hour

    def flush(self) -> None:
        """Append what was spent since the last time to the ledger; call at the end too."""
        if (hours := self._since_flush()) <= 0:
            return
        self._hours += hours
        self._flushed += 3600 * hours
        if self.enabled:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            row = {"time": now, "stage": self.stage, "run": self._run}
            row |= {"hours": hours, "dollars": hours * self.usd_per_hour}
            command.append_json_line(self.ledger, row)

    def state_dict(self) -> dict:
        paces = {"expected": {**self.expected, **self._known()}, "machine": self.machine}
        return {"run": self._run, "hours": self.elapsed_hours(), **paces}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting a resumed run, what it spent after its last checkpoint included."""
        self._run = state["run"]
        self._hours = max(state["hours"], self._in_ledger("hours", self._run))
        self.expected, self.machine = dict(state["expected"]), state["machine"]

    def _known(self) -> dict[str, float]:  # seconds a step of each phase that was measured
        warm = self.warmup_ticks
        return {phase: s / (n - warm) for phase, (n, s) in self._measured.items() if n > warm}

    def _pace(self, phase: str) -> float:  # seconds a step; nan where nothing is known
        known = self._known()
        expected = sum(self.expected.get(name, seconds) for name, seconds in known.items())
        correction = sum(known.values()) / expected if known else 1.0
        return known.get(phase, self.expected.get(phase, math.nan) * correction)

    def _since_flush(self) -> float:  # hours
        return 0.0 if self._flushed is None else (self._clock() - self._flushed) / 3600

    def _in_ledger(self, name: str, run: str | None = None) -> float:
        """The sum of a field over the ledger, which other programs may write too."""
        lines = command.json_lines(self.ledger, skip_damaged=True) if self.ledger.exists() else ()
        values = [row.get(name) for _, row in lines if run is None or row.get("run") == run]
        return sum(x for x in values if isinstance(x, (int, float)) and math.isfinite(x))


class Run:
    """What surrounds the steps of a training: folder, flags, schedule, budget, log and checkpoints.

    In this order: `open_training` gives one; `plan` fixes the schedule; the trainer makes its
    models and fills `parts` (name → what has a `state_dict`) and `stored`; `restore`; `estimate`;
    `begin`; then `for batch in run.steps(...)` with `run.step_done` as the last line of each step.

    args, settings: on a resumed run those it was started with, but for what was changed.
    checkpoint: where it goes on from; None for a new run, and once it is restored.
    stored: gives config, tensors, further trainer state and tokenizer of a checkpoint.
    validate: gives scores by name, the lowest `best_by` for the best checkpoint.
    shown: metrics on the terminal's lines, and under which name.
    cast: the context of what may run in bf16, by `--precision`."""

    def __init__(self, stage: str, args, settings: type, process: Distributed, changeable):
        self.args, self.process = args, process
        self.is_main, self.device = process.is_main, process.device
        self.workers = loader_workers(args.num_workers)
        self.checkpoint = open_run(args.checkpoint_dir, stage, args.fresh and self.is_main)
        self.resumed = self.checkpoint is not None
        self._take_flags(settings, changeable)
        if args.preset == "auto":
            args.preset = "base" if self.device.type == "cuda" else "tiny"
        kind = self.device.type
        bf16 = kind == "cuda" if args.precision == "auto" else args.precision == "bf16"
        self.cast = torch.autocast(kind, torch.bfloat16, enabled=bf16)
        costs = self.is_main and (kind == "cuda" or args.budget_usd is not None)
        self.meter = CostMeter(stage, args.usd_per_hour, args.budget_usd, costs)
        if costs:
            command.writable_file(self.meter.ledger, "the ledger of costs")
        self.parts: dict[str, object] = {"meter": self.meter}
        self.stored: Callable[[], dict] = dict
        self.validate: Callable[[], dict[str, float]] | None = None
        self.best_by, self.shown, self.metrics = "", {}, None
        self.step = self.epoch = self.consumed = 0
        self.best = math.inf

    def _take_flags(self, kind: type[Settings], changeable: Collection[str]) -> None:
        flags, given = vars(self.args), dict(self.args.set or ())
        self.settings, self._news = kind(**given), []
        if self.checkpoint is None:
            return
        trainer, where = self.checkpoint.trainer or {}, self.checkpoint.path
        needed = {"settings", "flags", "planned_steps", "schedule", *PLACE}
        for name in sorted(needed - trainer.keys()):
            raise UserError(f"{where}: no {name} in its trainer state, as an export or another "
                "version wrote it; start in a new --checkpoint_dir with --init_from")  # fmt: skip
        settings = dataclasses.asdict(self.settings)
        values = {**flags, **settings}
        stored = {**kind.BEFORE, **trainer["flags"], **trainer["settings"]}
        given = self.args.given.union(given)
        self._news = take_stored(values, stored, given, changeable, where, settings)
        flags.update({name: values[name] for name in flags})
        self.settings = kind(**{name: values[name] for name in settings})

    def plan(self, data_hours: float, starts: Callable[[int], dict[str, int]]) -> int:
        """Fixes schedule and place; returns how many windows an epoch has: of `--epoch_hours`, by
        default all of the data, 60 h at most; as many on a resumed run, though there is more."""
        args = self.args
        args.epoch_hours = args.epoch_hours or min(60.0, data_hours)
        batch_hours = args.batch_size * args.window_seconds / 3600
        self.steps_per_epoch = max(1, round(args.epoch_hours / batch_hours))
        self.schedule = Schedule(args.num_epochs * self.steps_per_epoch, starts, args.warmup_steps)
        if self.checkpoint is not None:
            self._go_on(self.checkpoint.trainer)
        return self.steps_per_epoch * args.batch_size

    def _go_on(self, trainer: dict) -> None:
        args, schedule = self.args, self.schedule
        vars(self).update({name: trainer[name] for name in PLACE})
        schedule.load_state_dict(trainer["schedule"])
        total, epochs = schedule.total, args.num_epochs - self.epoch - 1
        left = max(0, self.steps_per_epoch - math.ceil(self.consumed / args.batch_size))
        schedule.planned = self.step + max(0, left + epochs * self.steps_per_epoch)
        if trainer["flags"]["batch_size"] != args.batch_size or schedule.planned < total:
            schedule.resize(self.step, schedule.planned)
        elif schedule.planned > trainer["planned_steps"]:
            schedule.extend(self.step, schedule.planned)
        if schedule.total != total:
            self._news.append(f"the schedule had {total} steps, now {schedule.total}")

    def restore(self) -> None:
        """Gives each of `parts` its state, and lets go of the checkpoint."""
        checkpoint, self.checkpoint, self._saved_step = self.checkpoint, None, self.step
        self._guards = [part for part in self.parts.values() if isinstance(part, StepGuard)]
        for name, part in self.parts.items() if checkpoint else ():
            try:
                part.load_state_dict(checkpoint.trainer[name])
            except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
                raise UserError(f"{checkpoint.path}: its {name} does not fit this version or these "
                    f"flags ({command.first_line(error)}); start in a new --checkpoint_dir with "
                    "--init_from") from error  # fmt: skip

    def estimate(self, take: Callable[[str], object], modules: Iterable[nn.Module]) -> None:
        """Times real steps `take(phase)` of each phase ahead, then puts `modules` and `parts` back
        as they were; on all ranks. A run resumed on the same kind of machine knows its paces."""
        cuda, meter = self.device.type == "cuda", self.meter
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        machine = f"{name}, {self.process.world_size} ranks, batch {self.args.batch_size}"
        if machine != meter.machine:
            meter.expected, meter.machine = {}, machine
        ahead = self.schedule.ahead(self.step, self.schedule.planned)
        if unknown := [phase for phase, n in ahead.items() if n and phase not in meter.expected]:
            parts = [*modules, *(part for part in self.parts.values() if part is not meter)]
            states = [copy.deepcopy(part.state_dict()) for part in parts]
            with torch.random.fork_rng([self.device] if cuda else []):
                for phase in unknown:
                    meter.expected[phase] = min(self._seconds(take, phase) for _ in range(2))
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        meter.start(self.schedule, self.step)

    def _seconds(self, take: Callable[[str], object], phase: str) -> float:
        start = time.perf_counter()
        take(phase)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def begin(self, description: str) -> None:
        args, schedule, hours = self.args, self.schedule, self.meter.projected_hours()
        dollars = f" = {format_dollars(hours * args.usd_per_hour)}"
        cost = format_hours(hours) + (dollars if self.device.type == "cuda" else "")
        lines = [description, f"settings: {self.settings}",
                 f"an epoch is {args.epoch_hours:.1f} h of audio; {args.num_epochs} epochs = "
                 f"{schedule.planned} steps = {cost} (estimate)"]  # fmt: skip
        if self.resumed:
            lines += [f"resuming {args.checkpoint_dir} at step {self.step} of {schedule.total}"]
        if self.is_main:
            self.metrics = Metrics(args.checkpoint_dir, self.step, args.tensorboard)
            print("\n".join(lines + self._news), flush=True)
        self._fit()

    @property
    def stop_at(self) -> int:
        return min(self.schedule.total, self.args.max_steps or self.schedule.total)

    @property
    def phase(self) -> str:  # of the step that is being made
        return self.schedule.phase(self.step)

    def steps(self, batches: Callable[..., Iterable[tuple[int, int, Any]]]) -> Iterator[Any]:
        """The batches of the steps to make; `batches` is `data.training_batches` of a dataset."""
        total = self.schedule.total
        self._bar = tqdm(total=total, initial=self.step, disable=None if self.is_main else True)
        self._last_save = self._last_log = time.perf_counter()
        self._samples, self._waited = 0, 0.0
        place = sys.maxsize, self.epoch, self.consumed
        source = iter(batches(self.args.batch_size, self.workers, self.process, *place))
        while self.step < self.stop_at:
            asked = time.perf_counter()
            self.epoch, self.consumed, batch = next(source)
            self._waited += time.perf_counter() - asked
            yield batch
        self._bar.close()
        if self.is_main:
            if self.step != self._saved_step:
                self.save()
            more = "more --num_epochs" if self.step >= self.schedule.total else "the line again"
            print(f"done: step {self.step}; export with --export, or go on with {more}")

    def step_done(self, row: Callable[[], dict]) -> None:
        """Counts a step; logs its `row`, fits, validates and saves where that is due."""
        args = self.args
        self.step += 1
        self._samples += args.batch_size
        self.meter.tick()
        self._bar.update()
        due = self.step % args.log_every == 0
        if due or self.device.type != "cuda":  # a GPU would be waited for
            for guard in self._guards:
                guard.settle()
        if due and self.step < self.stop_at:
            self._fit()
            self._bar.total = self.schedule.total
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
        stored, parts = self.stored(), {"schedule": self.schedule, **self.parts}
        trainer = {name: part.state_dict() for name, part in parts.items()}
        trainer |= {name: getattr(self, name) for name in PLACE} | stored.pop("trainer", {})
        trainer["flags"] = {k: v for k, v in vars(self.args).items() if k not in LOCAL}
        trainer["settings"] = dataclasses.asdict(self.settings)
        trainer["planned_steps"] = self.schedule.planned
        keep = {"keep_last": self.args.keep_last, "best": best}
        save_checkpoint(self.args.checkpoint_dir, self.step, trainer=trainer, **keep, **stored)
        self._last_save, self._saved_step = time.perf_counter(), self.step

    def _fit(self) -> None:  # the schedule to the budget
        if self.args.budget_usd is None:
            return
        total = from_main_rank(self.meter.fitted_steps())  # one alone measures
        if total != self.schedule.total:
            self.schedule.resize(self.step, total)
            if self.is_main:
                steps = f"{total} of {self.schedule.planned} steps"
                budget = format_dollars(self.args.budget_usd)
                tqdm.write(f"budget {budget}: {steps}, and the learning rate ends with them")

    def _log(self, row: dict) -> None:
        now = time.perf_counter()
        seconds = now - self._last_log
        pace, waited = self._samples * self.args.window_seconds / seconds, self._waited / seconds
        skipped = sum(guard.skipped for guard in self._guards)
        row |= {"skipped": skipped, "epoch": self.epoch, "audio_seconds_per_second": pace}
        row = self.metrics.log(self.step, **row, data_wait=waited)
        shown = [(label, row.get(name)) for name, label in self.shown.items()]
        learnt = "".join(f"{label} {value:.3f} " for label, value in shown if value is not None)
        tqdm.write(f"step {self.step}/{self.schedule.total} {learnt}{pace:.0f}x real time, "
                   f"{waited:.0%} of it waiting for data, {self.meter.line()}")  # fmt: skip
        self._last_log, self._samples, self._waited = now, 0, 0.0

    def _validated(self) -> bool:  # whether this is the best so far
        scores = self.validate()
        self.metrics.log(self.step, **scores)
        shown = (f"{name.removeprefix('validation_')} {x:.3f}" for name, x in scores.items())
        tqdm.write(f"epoch {self.epoch}: {', '.join(shown)}")
        score, before = scores.get(self.best_by, math.inf), self.best
        self.best = min(score, before)
        return score < before

    def close(self) -> None:
        self.meter.flush()
        if self.metrics is not None:
            self.metrics.close()


@contextlib.contextmanager
def open_training(stage: str, args, kind: type[Settings], changeable=()) -> Iterator[Run]:
    """A run in `--checkpoint_dir`, new or resumed, which can take up what is `changeable` beside
    `CHANGEABLE`. UserError for a device, a folder or a checkpoint that it cannot use."""
    process = setup_distributed(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        if process.is_main:
            folder = Path(args.checkpoint_dir)
            stack.callback(_remove_unused, folder)
            command.writable_folder(folder, "--checkpoint_dir")
            stack.enter_context(command.only_one(folder))
        run = Run(stage, args, kind, process, (*CHANGEABLE, *changeable))
        stack.callback(run.close)
        seed_everything(args.seed)
        yield run


def _remove_unused(folder: Path) -> None:  # which a refused run has made
    with contextlib.suppress(OSError):
        if {file.name for file in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()
