"""training.py: balancer, schedule, metrics, money."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import command
import training
from command import json_lines
from training import (
    Balancer,
    CostMeter,
    Metrics,
    Schedule,
    StepGuard,
    UserError,
)

# ------------------------------------------------------------------------------- processes


def test_one_process_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    here = training.setup_distributed("cpu")
    assert (here.rank, here.world_size, here.is_main) == (0, 1, True)
    assert here.device == torch.device("cpu")
    value = torch.ones(2)
    assert training.all_reduce_mean(value) is value
    for device in ("gpu", "mps", "meta", "cuda:", "cuda:-1"):
        with pytest.raises(UserError, match=f"{device}: not supported"):
            training.setup_distributed(device)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            training.setup_distributed("cuda")


def test_workers_default_to_this_rank_s_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(command, "default_workers", lambda: 6)
    for ranks, workers in ((None, 6), ("2", 3), ("8", 1)):
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert training.loader_workers(None) == workers and training.loader_workers(0) == 0


RANK_SCRIPT = """
import atexit, sys, torch, training
import torch.distributed as dist
here = training.setup_distributed("cpu")
value = torch.tensor([1.0, 10.0]) * (here.rank + 1)
mean = training.all_reduce_mean(value)
assert mean.tolist() == [1.5, 15.0] and value[0] == here.rank + 1

# Two ranks with half the batch each must give the gradient of one process with the full batch.
torch.manual_seed(0)
audio, weight = torch.randn(4, 1, 32), torch.randn(32, 32)
def gradient(audio):
    w = weight.clone().requires_grad_()
    output = audio @ w
    losses = {"a": output.pow(2).mean(), "b": 1e4 * (output - 1).abs().mean()}
    shares = balancer.backward(losses, output)
    return w.grad
balancer = training.Balancer({"a": 1.0, "b": 3.0})
half = audio[here.rank * 2 : here.rank * 2 + 2]
joint = training.all_reduce_mean(gradient(half))
state = balancer.state_dict()

assert training.from_main_rank(7 + here.rank) == 7

# Ranks that drew their weights apart start equal; their mean gradient is that of the full batch.
torch.manual_seed(here.rank)
layer, idle = torch.nn.Linear(32, 4), torch.nn.Linear(2, 2)
training.start_equal([layer, idle, None])
def squared(audio): return layer(audio).square().mean()
parameters = [*layer.parameters(), *idle.parameters()]
squared(audio[here.rank * 2 : here.rank * 2 + 2]).backward()
training.average_gradients(parameters)
whole = torch.autograd.grad(squared(audio), list(layer.parameters()))
for parameter, expected in zip(layer.parameters(), whole):
    assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-6)
assert idle.weight.grad is None
guard, good = training.StepGuard(), torch.tensor(1.0)
assert guard.watch(good, good) == 0
assert guard.watch(torch.tensor(float("nan")) if here.rank else good, good) == 1

atexit.unregister(dist.destroy_process_group)
dist.destroy_process_group()
balancer = training.Balancer({"a": 1.0, "b": 3.0})
alone = gradient(audio)
assert torch.allclose(joint, alone, rtol=1e-5, atol=1e-8), (joint - alone).abs().max()
open(sys.argv[1] + str(here.rank), "w").write("ok")
"""


def test_two_gloo_ranks_agree_with_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(training.__file__).parent),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "done")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def test_item_rng_depends_on_its_key_alone():
    def draw(*key):
        return training.item_rng(*key).random(3).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_seed_everything_repeats_all_three_generators():
    def draw():
        training.seed_everything(7)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    assert draw() == draw()


# -------------------------------------------------------------------------------- schedule


def test_learning_rate_by_hand():
    schedule = Schedule(110, warmup_steps=10)

    def rate(step):
        return 2.0 * schedule.rate(step, final_ratio=0.1)

    assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert rate(60) == pytest.approx(1.1)  # half way: the mean of 2.0 and 0.2
    assert rate(35) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert rate(110) == pytest.approx(0.2) and rate(500) == pytest.approx(0.2)
    assert Schedule(10).rate(0) == 1.0


def test_a_learning_rate_never_jumps_where_a_schedule_changes():
    plans = ((1000, {100: 400, 250: 300}), (300, {20: 1000}), (400, {30: 900, 500: 600}))
    for total, changes in plans:
        schedule = training.Schedule(total, two_phases, warmup_steps=10)
        rates, step = [], 0
        while step < schedule.total:
            if step in changes:
                before = schedule.rate(step)
                schedule.resize(step, changes[step])
                assert schedule.rate(step) == pytest.approx(before)
            rates.append(schedule.rate(step))
            step += 1
        assert step == list(changes.values())[-1] and rates[-1] < 0.11
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert max(a - b for a, b in zip(rates[10:], rates[11:], strict=False)) < 0.02


def test_a_schedule_moves_what_is_ahead_alone_and_comes_back_from_its_state():
    schedule = training.Schedule(100, two_phases, warmup_steps=10)
    assert [schedule.phase(step) for step in (0, 49, 50, 99)] == ["plain"] * 2 + ["dear"] * 2
    assert schedule.ahead(30) == {"plain": 20, "dear": 50}
    schedule.resize(30, 40)  # the second phase would have begun at 20
    assert schedule.starts["dear"] == 30 and schedule.ahead(30) == {"plain": 0, "dear": 10}
    schedule.resize(35, 200)
    assert schedule.starts["dear"] == 30
    again = training.Schedule(200, two_phases, warmup_steps=10)
    again.load_state_dict(schedule.state_dict())
    assert [again.rate(s) for s in range(35, 200)] == [schedule.rate(s) for s in range(35, 200)]
    assert again.starts == schedule.starts
    # A run that is extended goes on as one that was as long from the beginning.
    again.extend(200, 400)
    whole = training.Schedule(400, two_phases, warmup_steps=10)
    assert again.rate(200) == whole.rate(200) and again.starts["dear"] == 30


def test_matrices_alone_decay():
    model = torch.nn.ModuleDict({
        "embedding": torch.nn.Embedding(5, 4), "linear": torch.nn.Linear(4, 3),
        "norm": torch.nn.LayerNorm(3), "frozen": torch.nn.Linear(2, 2).requires_grad_(False),
    })  # fmt: skip
    decayed, others = training.adamw([model, None], 1e-3, (0.9, 0.95), 0.05).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 4)] and decayed["weight_decay"] == 0.05
    assert len(others["params"]) == 4 and others["weight_decay"] == 0


# -- runs --------------------------------------------------------------------------------------


def test_flags_of_a_resumed_run_are_restored_applied_or_refused():
    stored = {"lr": 2e-3, "layers": 4, "keep": True, "preset": "tiny"}

    def take(stored, **given):
        values = {"lr": 1e-3, "layers": 2, **given}
        changeable = frozenset({"lr"})
        return values, training.take_stored(values, stored, given, changeable, "run", {"layers"})

    values, lines = take(stored)
    assert values == {"lr": 2e-3, "layers": 4}  # what nobody knows any more is not looked at
    assert lines == [f"as the run was started: --{x}" for x in ("lr 0.002", "set layers=4")]
    values, lines = take({**stored, "log_every": 1}, lr=5e-4, preset="auto", layers=4, log_every=3)
    assert (values["lr"], values["preset"], values["log_every"]) == (5e-4, "tiny", 3)
    assert lines == ["from here on --lr 0.0005 (until now 0.002)"]
    for flags, line in (({"layers": 3}, "layers=3.*--set layers=4"), ({"preset": "base"}, "tiny")):
        with pytest.raises(UserError, match=line):
            take(stored, **flags)


def test_settings_are_read_and_checked_by_name():
    parser, _, _ = training.run_parser("", training.Settings, warmup_steps=9)
    args = parser.parse_args(["--set", "grad_clip=2", "save_minutes=5", "--set", "grad_clip=3"])
    assert dict(args.set) == {"grad_clip": 3.0, "save_minutes": 5.0} and args.warmup_steps == 9
    assert parser.parse_args([]).set is None and parser.given(["--set", "grad_clip=1"]) == {"set"}
    assert str(training.Settings(**dict(args.set))) == "grad_clip=3.0 save_minutes=5.0"
    assert "grad_clip" in training.Settings.help()


def test_step_guard_skips_counts_and_stops():
    def healthy(guard, loss, norm=1.0):
        skip = guard.watch(torch.tensor(loss), torch.tensor(norm))
        guard.settle()
        return not skip

    guard = StepGuard(max_consecutive=3)
    assert healthy(guard, 1.0, 2.0)
    assert not healthy(guard, math.nan) and not healthy(guard, 1.0, math.inf)
    assert healthy(guard, 1.0) and (guard.skipped, guard.consecutive) == (2, 0)
    assert not healthy(guard, math.nan)
    restored = StepGuard(max_consecutive=3)
    restored.load_state_dict(guard.state_dict())
    assert not healthy(restored, math.nan)
    with pytest.raises(UserError, match="3 steps in a row were not finite"):
        healthy(restored, math.nan)


# ---------------------------------------------------------------------------- loss balance


def orthogonal_losses(output, scales):
    """Losses whose gradients touch disjoint samples, so that their parts can be separated."""
    parts = output.chunk(len(scales), dim=-1)
    pairs = zip(scales.items(), parts, strict=True)
    return {name: scale * (part**2).mean() for (name, scale), part in pairs}


def test_step_guard_watches_without_the_host_and_settles_later():
    guard, good, bad = StepGuard(max_consecutive=3), torch.tensor(1.0), torch.tensor(math.nan)
    answers = [float(guard.watch(loss, good)) for loss in (good, bad, bad, good, bad)]
    assert answers == [0, 1, 1, 0, 1] and guard.skipped == 0
    guard.settle()
    assert (guard.skipped, guard.consecutive) == (3, 1)
    guard.settle()
    assert guard.skipped == 3
    guard.watch(good, bad)
    assert guard.state_dict() == {"skipped": 4, "consecutive": 2}
    guard.watch(bad, good)
    with pytest.raises(UserError, match="3 steps in a row were not finite"):
        guard.settle()


def test_a_fused_optimizer_stands_still_where_a_step_is_to_be_skipped():
    """What train_codec.py builds on: `found_inf`, which GradScaler uses, within the kernel."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], 0.1, fused=True, weight_decay=0.01)
    weight.grad = torch.full((3,), math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight.data, torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    torch.optim.AdamW([plain], 0.1, weight_decay=0.01).step()
    assert torch.allclose(weight, plain)  # the first step, though one was skipped before it


def test_a_learning_rate_is_set_in_place_where_a_graph_reads_it():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], 0.1)
    training.set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == 0.2
    training.make_capturable(optimizer, True, torch.device("cpu"))
    rate = optimizer.param_groups[0]["lr"]
    training.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25
    training.make_capturable(optimizer, False, torch.device("cpu"))
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.25 and not group["capturable"] and isinstance(group["lr"], float)


def test_balancer_shares_follow_the_weights_whatever_the_scales():
    torch.manual_seed(0)
    balancer = Balancer({"a": 1.0, "b": 3.0})
    for _ in range(3):
        output = torch.randn(5, 1, 40, requires_grad=True)
        losses = orthogonal_losses(output, {"a": 1e6, "b": 1e-6})
        shares = {n: float(v) for n, v in balancer.backward(losses, output).items()}
    norm_a, norm_b = (
        part.flatten(1).norm(dim=1).mean() * 5 for part in output.grad.chunk(2, dim=-1)
    )
    # The running means make this step's parts differ a little from their long-run ratio.
    assert float(norm_b / norm_a) == pytest.approx(3.0, rel=0.25)
    assert float(norm_a) == pytest.approx(0.25, rel=0.25)
    assert float(norm_b) == pytest.approx(0.75, rel=0.25)
    assert shares["b"] == pytest.approx(float(norm_b / (norm_a + norm_b)), rel=1e-5)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_balancer_against_the_papers_formula():
    torch.manual_seed(1)
    weights, decay = {"a": 2.0, "b": 0.5}, 0.9
    balancer = Balancer(weights, decay=decay)
    history = {"a": [], "b": []}
    for _ in range(4):
        output = torch.randn(3, 1, 16, requires_grad=True)
        losses = {"a": output.abs().mean(), "b": 100 * (output.cos() ** 2).mean()}
        expected = torch.zeros_like(output)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            history[name].append(float(gradient.flatten(1).norm(dim=1).mean()))
            powers = [decay**age for age in reversed(range(len(history[name])))]
            mean = np.dot(powers, history[name]) / sum(powers)
            expected += weights[name] / 2.5 * gradient / mean / 3
        balancer.backward(losses, output)
        assert torch.allclose(output.grad, expected, rtol=1e-5, atol=1e-9)


def test_balancer_goes_through_the_model_once_and_spares_the_discriminator():
    model, judge = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    passes = []
    audio = torch.randn(2, 1, 8)
    output = model(audio)
    model.weight.register_hook(lambda gradient: passes.append(1))
    judged = judge(output)
    losses = {"adv": judged.mean(), "match": (judged**2).mean(), "wave": output.abs().mean()}
    commitment = (model.weight**2).mean()
    balancer = Balancer({"adv": 1, "match": 1, "wave": 1, "absent": 5})
    balancer.backward(losses, output, others=commitment)
    assert passes == [1]
    assert judge.weight.grad is None
    with_others = model.weight.grad.clone()
    model.weight.grad = None
    again = Balancer({"adv": 1, "match": 1, "wave": 1})
    output = model(audio)
    judged = judge(output)
    losses = {"adv": judged.mean(), "match": (judged**2).mean(), "wave": output.abs().mean()}
    again.backward(losses, output)
    expected = model.weight.grad + 2 * model.weight.detach() / model.weight.numel()
    assert torch.allclose(with_others, expected, atol=1e-6)


def test_balancer_takes_losses_of_zero_and_their_late_start():
    balancer = Balancer({"a": 1.0, "late": 1.0})
    for step in range(60):
        output = torch.randn(2, 1, 30, requires_grad=True)
        first, second = output.chunk(2, dim=-1)
        late = (second**2).mean() * (0.0 if step < 50 else 1.0)
        shares = balancer.backward({"a": (first**2).mean(), "late": late}, output)
        assert torch.isfinite(output.grad).all()
        if step < 50:
            assert shares["late"] == 0.0
        else:
            assert 0.25 < shares["late"] < 0.75
            assert float(output.grad.norm()) < 2
    with pytest.raises(KeyError, match="unknown"):
        balancer.backward({"unknown": output.sum()}, output)


def test_balancer_state_survives_exactly_and_ignores_steps_that_are_not_finite():
    balancer = Balancer({"a": 1.0, "b": 2.0})

    def step(which, seed, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        output = torch.randn(2, 1, 20, generator=generator).requires_grad_()
        losses = {"a": scale * output.abs().mean(), "b": (output**2).sum()}
        which.backward(losses, output)
        return output.grad

    for seed in range(5):
        step(balancer, seed)
    before = balancer.state_dict()
    assert not torch.isfinite(step(balancer, 9, scale=math.nan)).all()
    assert balancer.state_dict() == before
    restored = Balancer({"a": 1.0, "b": 2.0})
    restored.load_state_dict(json.loads(json.dumps(before)))
    for seed in range(5, 9):
        assert torch.equal(step(balancer, seed), step(restored, seed))
    assert balancer.state_dict() == restored.state_dict()


# --------------------------------------------------------------------------------- metrics


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_resume_drops_later_and_cut_lines(tmp_path):
    metrics = Metrics(tmp_path, resume_step=0)
    for step in range(1, 6):
        metrics.log(step, loss=torch.tensor(step / 2), lr=1e-4)
    metrics.log(6, loss=math.nan)
    metrics.close()
    assert rows(metrics.path)[-1] == {"step": 6, "loss": None}
    with open(metrics.path, "a") as file:
        file.write('{"step": 7, "lo')
    again = Metrics(tmp_path, resume_step=3)
    again.log(4, loss=9.0)
    again.close()
    assert [(row["step"], row["loss"]) for row in rows(metrics.path)] == [
        (1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0),
    ]  # fmt: skip


def test_metrics_tensorboard_or_the_line_to_install_it(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install tensorboard"):
            Metrics(tmp_path, 0, tensorboard=True)
        return
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.log(1, loss=1.0)
    metrics.log_audio(1, "reply", torch.zeros(1, 2400), 24000)
    metrics.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0)]
    (sound,) = events.Audio("reply")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (1, 24000, 2400)


# ----------------------------------------------------------------------------------- money


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def meter(tmp_path, clock, **extra):
    extra = {"enabled": True, "clock": clock, "usd_per_hour": 3.6, **extra}
    return CostMeter("codec", ledger=tmp_path / "costs.jsonl", **extra)


def test_cost_meter_projects_spends_and_resumes(tmp_path):
    (tmp_path / "costs.jsonl").write_text('{"stage": "data", "dollars": 100.0}\n{"stage": "co')
    clock = Clock()
    cost = meter(tmp_path, clock, budget_usd=1.0)
    cost.start(Schedule(1000))
    assert math.isnan(cost.projected_hours()) and "nan h" in cost.line()
    for seconds in [30, 5, 5] + [2] * 100:  # a slow start is not taken for the pace
        clock.now += seconds
        cost.tick()
    assert cost.projected_hours() == pytest.approx((240 + 897 * 2) / 3600)
    assert cost.fitted_steps() == 103 + int(0.98 * (1.0 - 0.24) / 0.002)
    assert cost.spent_usd() == pytest.approx(100.24)
    assert cost.line() == "projected 34 min = $2.03 (spent $100 of $1,500)"
    state = cost.state_dict()
    clock.now += 60  # after the checkpoint, then killed: only the ledger knows of these
    cost.tick()
    written = [row for _, row in json_lines(cost.ledger, skip_damaged=True)]
    assert written[-1]["stage"] == "codec" and written[0]["stage"] == "data"

    later = Clock()
    resumed = meter(tmp_path, later, budget_usd=1.0)
    resumed.load_state_dict(state)
    assert resumed.elapsed_hours() == pytest.approx(300 / 3600)
    resumed.start(Schedule(1000), done_steps=103)
    for _ in range(10):
        later.now += 2
        resumed.tick()
    resumed.flush()
    assert resumed.projected_hours() == pytest.approx((300 + 20 + 887 * 2) / 3600)
    assert resumed.spent_usd() == pytest.approx(100.32)


def two_phases(total):
    return {"plain": 0, "dear": total // 2}


def spend(cost, clock, steps, seconds):
    for _ in range(steps):
        clock.now += seconds
        cost.tick()


def test_a_dearer_phase_ahead_binds_from_the_first_minutes(tmp_path):
    """$1 a second, as expected, and $3 in the second half: 200 of 400 fit, whatever is measured."""
    clock = Clock()
    cost = meter(tmp_path, clock, budget_usd=400, usd_per_hour=3600)
    cost.expected = {"plain": 1.0, "dear": 3.0}
    schedule = training.Schedule(400, two_phases)
    cost.start(schedule)
    total = cost.fitted_steps()
    assert total == 196 and cost.hours_ahead(total) * 3600 == pytest.approx(392)
    schedule.resize(0, total)
    for steps, seconds in ((98, 1.0), (90, 3.0)):
        spend(cost, clock, steps, seconds)
        assert cost.fitted_steps() == total
    assert 3600 * cost.projected_hours() == pytest.approx(392)


def test_what_is_measured_corrects_an_estimate_both_ways(tmp_path):
    clock = Clock()
    cost = meter(tmp_path, clock, budget_usd=400, usd_per_hour=3600)
    cost.expected = {"plain": 4.0, "dear": 12.0}  # four times too dear
    schedule = training.Schedule(400, two_phases)
    cost.start(schedule)
    schedule.resize(0, cost.fitted_steps())
    assert schedule.total in (48, 49)
    spend(cost, clock, 10, 1.0)
    schedule.resize(10, cost.fitted_steps())
    assert schedule.total == pytest.approx(196, abs=2) and schedule.starts["dear"] == 98
    spend(cost, clock, 88, 1.0)
    assert cost.fitted_steps() == schedule.total
    spend(cost, clock, 10, 1.0)  # the second phase is cheaper than all thought
    schedule.resize(108, cost.fitted_steps())
    assert schedule.total > 300
    spend(cost, clock, 50, 0.1)
    schedule.resize(158, cost.fitted_steps())
    assert 390 < schedule.total <= 400
    spend(cost, clock, 50, 3.0)  # and dearer after all
    schedule.resize(208, cost.fitted_steps())
    assert 208 < schedule.total < 400
    clock.now += 1000
    assert cost.fitted_steps() == 208  # spent: where it stands


def test_a_resumed_meter_knows_its_paces(tmp_path):
    clock = Clock()
    cost = meter(tmp_path, clock)
    cost.expected, cost.machine = {"plain": 9.0, "dear": 18.0}, "H200"
    cost.start(training.Schedule(100, two_phases))
    spend(cost, clock, 20, 2.0)
    again = meter(tmp_path, clock)
    again.load_state_dict(cost.state_dict())
    assert (again.expected, again.machine) == ({"plain": 2.0, "dear": 18.0}, "H200")
    assert cost.hours_ahead() * 3600 == pytest.approx(30 * 2 + 50 * 4)  # corrected by the first


def test_the_ledger_may_hold_what_is_no_number(tmp_path):
    cost = meter(tmp_path, Clock())
    cost.ledger.write_text('{"dollars": "ten"}\n{"dollars": null}\n{"dollars": 2}\n[1]\n')
    assert cost.spent_usd() == 2


def test_cost_meter_disabled_writes_nothing(tmp_path):
    clock = Clock()
    cost = meter(tmp_path, clock, enabled=False, budget_usd=5.0)
    cost.start(Schedule(10))
    for _ in range(5):
        clock.now += 3600
        cost.tick()
    cost.flush()
    assert cost.line() == "projected 10 h"
    assert cost.fitted_steps() == 10
    assert not cost.ledger.exists()


def test_formats():
    hours = [41.2, 1.24, 0.2, 0.005]
    assert [training.format_hours(h) for h in hours] == ["41 h", "1.2 h", "12 min", "18 s"]
    dollars = [1500, 139.4, 1.25]
    assert [training.format_dollars(d) for d in dollars] == ["$1,500", "$139", "$1.25"]
