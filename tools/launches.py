"""How many kernels a piece of work launches, and how often it waits for the device; on a CPU.

Counted are the operations that reach PyTorch's dispatcher and are not views, which on a GPU are a
launch each (some are several), and those that bring a value to the host.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parent.parent
# Their result's size, or their value, is known only once the device has worked it out.
_READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::is_nonzero", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
_BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_PYTHON_READS = ("tolist", "numpy", "cpu")  # on a CPU they pass the dispatcher by


@dataclass
class Launches:
    """kernels: operations by name; reads: waits for the device by the project's line."""

    kernels: Counter = field(default_factory=Counter)
    reads: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.kernels.values())

    @property
    def waits(self) -> int:
        return sum(self.reads.values())


class _Mode(TorchDispatchMode):
    def __init__(self, counts: Launches) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masked = name in _BY_MASK and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 else ())
        )
        if masked or name in _READS or f"{name}.{func._overloadname}" in _READS:
            self.counts.reads[_place()] += 1
        if not (func.is_view or name == "aten::_local_scalar_dense"):
            self.counts.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of the project's own that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == _ROOT:
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def counting() -> Iterator[Launches]:
    """Counts what happens within the block."""
    counts = Launches()
    with contextlib.ExitStack() as stack:
        for name in _PYTHON_READS:
            original = getattr(torch.Tensor, name)

            def read(self, *args, _original=original, **kwargs):
                counts.reads[_place()] += 1
                return _original(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, read))
        stack.enter_context(_Mode(counts))
        yield counts
