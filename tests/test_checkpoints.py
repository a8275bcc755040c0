"""checkpoints.py: folders under kills and full disks, damaged ones, fingerprints, exports."""

import argparse
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import command
from checkpoints import find_checkpoint, fingerprint, load_checkpoint, save_checkpoint
from command import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
FORK = (
    multiprocessing.get_context("fork")
    if "fork" in multiprocessing.get_all_start_methods()
    else None
)
needs_fork = pytest.mark.skipif(FORK is None, reason="needs fork")


def save(run_dir, step, **extra):
    value = torch.full((1000,), float(step))
    extra = {"trainer": {"step": step, "moment": value.clone()}, **extra}
    return save_checkpoint(run_dir, step, {"width": 8}, {"weight": value}, **extra)


def names(run_dir):
    return sorted(path.name for path in Path(run_dir).iterdir())


def test_round_trip_with_shared_half_and_odd_tensors(tmp_path):
    weight = torch.randn(4, 6)
    tensors = {
        "weight": weight,
        "tied": weight,
        "turned": weight.t(),
        "slice": weight[1:],
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(7),
    }
    trainer = {"optimizer": {"state": {0: {"exp_avg": weight}}, "betas": (0.8, 0.9)}, "seen": 12}
    config = {"name": "नमस्ते", "sizes": [1, 2]}
    path = save_checkpoint(tmp_path, 1000, config, tensors, trainer, tokenizer='{"a": "తె"}')
    assert path == tmp_path / "step_00001000"
    loaded = load_checkpoint(tmp_path)
    assert (loaded.path, loaded.step, loaded.config) == (path, 1000, config)
    assert loaded.tokenizer == '{"a": "తె"}'
    assert loaded.trainer["optimizer"]["betas"] == (0.8, 0.9) and loaded.trainer["seen"] == 12
    assert torch.equal(loaded.trainer["optimizer"]["state"][0]["exp_avg"], weight)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name
    assert load_checkpoint(path, with_trainer=False).trainer is None
    assert fingerprint(loaded.config, loaded.tensors) == fingerprint(config, tensors)


def test_a_shipped_folder_loads_under_any_name(tmp_path):
    path = save(tmp_path / "run", 5, trainer=None)
    shipped = tmp_path / "codec"
    shutil.copytree(path, shipped)
    loaded = load_checkpoint(shipped)
    assert (loaded.step, loaded.trainer, loaded.tokenizer) == (5, None, None)


def test_keeps_the_last_ones_and_the_best(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, best=step in (1, 3))
    assert names(tmp_path) == ["best.json", "step_00000003", "step_00000006", "step_00000007"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 4)
    save_checkpoint(tmp_path, 4, {"new": True}, {"weight": torch.ones(2)})
    assert names(tmp_path) == ["step_00000004"]
    assert load_checkpoint(tmp_path).config == {"new": True}


def test_passes_over_temporary_and_broken_folders(tmp_path):
    good = save(tmp_path, 10)
    for step in (20, 30, 40, 50):
        shutil.copytree(good, tmp_path / f"step_{step:08d}")
    (tmp_path / "step_00000020" / "config.json").unlink()
    (tmp_path / "step_00000030" / "model.safetensors").write_bytes(b"\x00\x01")
    for name, step in (("model.safetensors", 40), ("trainer.pt", 50)):
        file = tmp_path / f"step_{step:08d}" / name
        file.write_bytes(file.read_bytes()[:-100])
    shutil.copytree(good, tmp_path / ".tmp-step_00000060")
    assert find_checkpoint(tmp_path) == good
    save(tmp_path, 70)
    assert not any(name.startswith(".tmp-") for name in names(tmp_path))


def test_missing_and_damaged_checkpoints_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="incomplete"):
        load_checkpoint(path)
    (path / "model.safetensors").write_bytes(whole)
    trainer = bytearray((path / "trainer.pt").read_bytes())
    trainer[40:400] = bytes(360)
    (path / "trainer.pt").write_bytes(trainer)
    with pytest.raises(UserError, match="damaged|incomplete") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


class _Bomb:
    def __reduce__(self):
        return (os.system, ("true",))


def test_pickled_code_is_refused_on_both_sides(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"bomb": _Bomb()}, path / "trainer.pt")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    with pytest.raises(TypeError, match="trainer holds .*numpy.*scalar"):
        save(tmp_path, 2, trainer={"lr": np.float64(1)})
    assert names(tmp_path) == ["step_00000001"]


def _die_at_call(run_dir, number):
    """Save twice over step 3; the process dies at its `number`-th touch of the disk."""
    count = 0

    def deadly(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapped

    checkpoints.sync_to_disk = deadly(checkpoints.sync_to_disk)
    command.sync_to_disk = checkpoints.sync_to_disk
    checkpoints.save_file = deadly(checkpoints.save_file)
    Path.rename = deadly(Path.rename)
    os.replace = deadly(os.replace)
    shutil.rmtree = deadly(shutil.rmtree)
    save(run_dir, 3, keep_last=1, best=True)
    save(run_dir, 3, keep_last=1)
    os._exit(0)


@needs_fork
def test_death_at_every_disk_operation_leaves_a_complete_checkpoint(tmp_path):
    deaths = 0
    for number in range(1, 100):
        run_dir = tmp_path / str(number)
        save(run_dir, 1)
        save(run_dir, 2)
        child = FORK.Process(target=_die_at_call, args=(run_dir, number))
        child.start()
        child.join()
        loaded = load_checkpoint(run_dir)
        assert loaded.step in (2, 3)
        assert float(loaded.tensors["weight"].mean()) == loaded.step == loaded.trainer["step"]
        save(run_dir, 4)
        assert load_checkpoint(run_dir).step == 4
        assert not [n for n in names(run_dir) if n.startswith(".tmp-") or "replaced" in n]
        if child.exitcode == 0:
            break
        deaths += 1
    assert child.exitcode == 0 and deaths >= 20


def _save_for_ever(run_dir, first, pipe):
    torch.set_num_threads(1)
    for step in range(first, first + 10**6):
        value = torch.full((200_000,), float(step))
        trainer = {"step": step, "moment": value}
        save_checkpoint(run_dir, step, {}, {"weight": value}, trainer, "{}", 2, step % 3 == 0)
        pipe.send(step)


@needs_fork
def test_kill_9_at_random_moments_loses_nothing_saved(tmp_path):
    dice = random.Random(0)
    step = 0
    for _ in range(25):
        receiver, sender = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_save_for_ever, args=(tmp_path, step + 1, sender))
        child.start()
        sender.close()
        receiver.recv()
        time.sleep(dice.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reported = step + 1
        try:
            while True:
                reported = receiver.recv()
        except EOFError:
            pass
        loaded = load_checkpoint(tmp_path)
        assert loaded.step >= reported > step
        assert loaded.trainer["step"] == loaded.step
        assert bool((loaded.tensors["weight"] == loaded.step).all())
        step = loaded.step


@pytest.mark.parametrize("where", ["save_file", "sync_to_disk", "torch.save"])
def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, where):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = (torch, "save") if where == "torch.save" else (checkpoints, where)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UserError, match=r"step_00000002: the disk is full.*step_00000001, is kept"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000001"]
    assert load_checkpoint(tmp_path).step == 1


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if not mount or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.parametrize("part", ["tensors", "trainer", "tokenizer"])
def test_a_really_full_disk(small_disk, part):
    run_dir = small_disk / "run"
    save(run_dir, 1)
    big = {
        "tensors": {"weight": torch.zeros(600_000)},
        "trainer": {"moment": torch.zeros(600_000)},
        "tokenizer": "x" * 3_000_000,
    }
    arguments = {"tensors": {"weight": torch.zeros(3)}, part: big[part]}
    with pytest.raises(UserError, match="the disk is full.*is kept"):
        save_checkpoint(run_dir, 2, {}, **arguments)
    assert names(run_dir) == ["step_00000001"]
    save(run_dir, 3)
    assert load_checkpoint(run_dir).step == 3


def test_fingerprint_sees_every_change():
    config, tensors = {"a": 1, "b": (2, 3)}, {"x": torch.arange(4.0), "y": torch.zeros(2, 3)}
    same = fingerprint({"b": [2, 3], "a": 1}, {"y": torch.zeros(2, 3), "x": torch.arange(4.0)})
    first = fingerprint(config, tensors)
    assert first == same and len(first) == 64
    changed = [
        ({**config, "a": 2}, tensors),
        (config, {**tensors, "x": tensors["x"] + 1}),
        (config, {**tensors, "y": torch.zeros(3, 2)}),
        (config, {**tensors, "y": torch.zeros(2, 3).half()}),
        (config, {"x": tensors["x"], "z": tensors["y"]}),
    ]
    assert len({first, *(fingerprint(c, t) for c, t in changed)}) == 6


def test_an_export_into_a_run_is_refused(tmp_path):
    save(tmp_path / "run", 1)
    for export in ("run", "run/step_00000001", "run/new", "run/../run"):
        args = argparse.Namespace(export=tmp_path / export, checkpoint_dir=tmp_path / "run")
        with pytest.raises(UserError, match="is a run's folder"):
            checkpoints.to_export(args)
    assert names(tmp_path / "run") == ["step_00000001"]
    args.export = tmp_path / "out"
    checkpoints.to_export(args)
