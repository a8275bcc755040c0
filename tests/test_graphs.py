"""The engine as a GPU keeps it: a tick recorded once and replayed in the same buffers, the number
of its kernels, and callers who neither hear nor delay one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_duplex import noise_patches, small_pair
from torch.utils._python_dispatch import TorchDispatchMode

import training
from codec import Codec
from duplex import DuplexEngine, load_models
from s2s import S2S, Sampling

WARM = Sampling(0.8, 25, 0.7, 10, 0.5)


@pytest.fixture(scope="module")
def shipped() -> tuple[Codec, S2S]:
    return load_models("checkpoints/tiny/codec", "checkpoints/tiny/s2s")


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations met while recording, done again on the very
    same tensors, without the Python that called them. Recording changes nothing in the end: `undo`
    has what was there before every change."""

    def __init__(self, undo: list) -> None:
        super().__init__()
        self.calls, self.undo = [], undo

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs[argument.name]
                self.undo.append((written, written.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        while self.undo:
            written, before = self.undo.pop()
            written.copy_(before)
        for func, args, kwargs, kept in self.calls:
            new = func(*args, **kwargs)
            pairs = zip(new, kept, strict=True) if isinstance(new, (list, tuple)) else [(new, kept)]
            for one, two in pairs:
                if isinstance(one, torch.Tensor) and one.data_ptr() != two.data_ptr():
                    two.copy_(one)


class CpuGraph(training.StepGraph):
    undo: list = []  # noqa: RUF012

    def _capture(self):
        self._graphs.append(Recorded(self.undo))
        return self._graphs[-1]


def graphed(engine: DuplexEngine, warmup: int = 2) -> DuplexEngine:
    step = engine._step
    engine._step = CpuGraph(step.function, warmup, step.between)
    return engine


def rows(results: list, slot: int = 0) -> dict[str, np.ndarray]:
    names = ("audio", "codes", "text", "user_words", "user_emotion", "user_phones")
    return {name: np.stack([getattr(r, name)[slot] for r in results]) for name in names}


def assert_same(one: dict, two: dict, exact=("codes", "text", "user_words", "user_phones")) -> None:
    for name in one:
        if name in exact:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
        else:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4, err_msg=name)


# -- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_replayed_tick_says_what_an_eager_one_says(strength):
    """Callers come, go, are muted, reset and set anew; nothing of it is frozen in the recording."""
    codec, lm = small_pair()
    options = {"sampling": WARM, "vad_flush": True, "emotion_strength": strength}
    eager, replayed = (DuplexEngine(codec, lm, 3, **options) for _ in range(2))
    graphed(replayed)
    spoken = np.stack([noise_patches(24, seed).reshape(24, 960) for seed in range(3)], axis=1)
    spoken *= 8
    active = np.random.default_rng(1).random((24, 3)) < 0.8
    for number in range(24):
        results = []
        for engine in (eager, replayed):
            if number == 9:
                engine.reset(1, seed=5)
                engine.set_voice(0, "sad", "hindi")
                engine.set_sampling(2, Sampling(0.1, 3, 0.0, 1, eagerness=20.0))
            if number == 12:
                engine.suspend(1)
            if number == 15:
                engine.resume(1)
            engine._flush.muted[2] = 16 <= number < 18
            engine._flush.voice[2] = number >= 16
            engine._quiet_ticks[0] = 20
            results.append(engine.tick(spoken[number], active[number]))
        one, two = results
        for slot in range(3):
            assert_same(rows([one], slot), rows([two], slot), exact=rows([one]))
    graph = replayed._step
    assert len(graph._graphs) == 4 and all(len(part.calls) > 10 for part in graph._graphs)
    times = one.times
    assert min(times) > 0 and sum(times[:4]) <= times.total


def test_a_step_of_one_stage_is_one_graph():
    memory, between = torch.zeros(2), []

    def step(mode, x):
        memory.add_(x)
        return {"sum": memory * mode}

    graph = CpuGraph(step, 2, lambda: between.append(1))
    seen = [graph(10, x=torch.full((2,), float(i)))["sum"].tolist() for i in range(5)]
    assert [s[0] for s in seen] == [0, 10, 30, 60, 100]
    assert not between and len(graph._graphs) == 1
    assert graph(2, x=torch.ones(2))["sum"][0] == 22 and not graph._graphs
