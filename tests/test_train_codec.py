"""The codec trainer: interrupted runs against uninterrupted ones, two ranks, what it refuses."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import checkpoints
import command
import data
import train_codec
import training
from audio import write_audio
from codec import Codec, CodecConfig
from data import Clip, write_manifest
from phones import PHONES
from tools.launches import Launches, counting

ROOT = Path(__file__).parent.parent
SECONDS = 3.0
# Four steps of two half-second windows an epoch.
SMALL = {
    "preset": "tiny",
    "device": "cpu",
    "batch_size": 2,
    "window_seconds": 0.48,
    "epoch_hours": 4 * 2 * 0.48 / 3600,
    "num_epochs": 2,
    "num_workers": 0,
    "threads": 1,
    "warmup_steps": 2,
    "quantizer_start": 2,
    "semantic_share": 0.25,
    "save_every_epochs": 1,
    "log_every": 1,
    "disc_start": 1,
    "gen_lr": 1e-3,
}


# What `tiny` is here, in this process and in those that a test starts.
TINY = {
    "front_dim": 16, "encoder_dim": 32, "encoder_layers": 1, "semantic_width": 32,
    "semantic_layers": 1, "decoder_front_dim": 16, "decoder_front_blocks": 1, "decoder_dim": 32,
    "decoder_layers": 1, "num_heads": 2, "semantic_dim": 16, "acoustic_dim": 8,
    "codebook_sizes": (64,) * 8,
}  # fmt: skip


def make_corpus(folder: Path, splits=("train", "train", "validation")) -> Path:
    """A few seconds a speaker: gliding harmonics in noise, phones all along."""
    clips = []
    for i, split in enumerate(splits):
        rng = np.random.default_rng(i)
        t = np.arange(int(SECONDS * 24_000)) / 24_000
        phase = 2 * np.pi * (110 + 40 * i) * (t + 0.1 * t**2)
        audio = sum(np.sin(k * phase) / k for k in (1, 2, 3, 5)) * 0.15
        audio = (audio + 0.02 * rng.standard_normal(len(t))).astype(np.float32)
        path = folder / f"speaker{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio)
        edges = np.arange(0, SECONDS + 0.01, 0.25)
        spans = zip(edges[:-1], edges[1:], strict=True)
        phones = [[PHONES[1 + j % 7], float(a), float(b)] for j, (a, b) in enumerate(spans)]
        clips.append(
            Clip(
                path,
                SECONDS,
                24_000,
                ("english", "hindi", "telugu")[i % 3],
                f"speaker{i}",
                split=split,
                phones=phones,
                license="CC0-1.0",
                commercial_ok=True,
            )
        )
    write_manifest(folder / "manifest.jsonl", clips)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


SETTINGS = [field.name for field in dataclasses.fields(train_codec.Settings)]


def flags(corpus, folder, *switches, **changes) -> list[str]:
    """Flags by name; what is a setting goes to `--set`."""
    values = {**SMALL, "checkpoint_dir": folder, "ema_decay": 0.5, **changes}
    settings = [f"{name}={values.pop(name)}" for name in SETTINGS if name in values]
    pairs = [[f"--{name}", str(value)] for name, value in values.items()]
    return ["--data_dirs", str(corpus), *sum(pairs, []), "--set", *settings, *switches]


def main() -> None:
    """The script, with a far smaller codec and fewer windows to validate."""
    tiny = CodecConfig.tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodecConfig, "tiny", lambda: dataclasses.replace(tiny(), **TINY))
        patch.setattr(train_codec, "VALIDATION_WINDOWS", 4)
        train_codec.main()


def train(corpus, folder, *switches, **changes) -> None:
    """The script in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_codec.py", *flags(corpus, folder, *switches, **changes)])
        try:
            main()
        finally:
            torch.set_num_threads(threads)


def refused(corpus, folder, capsys, *switches, **changes) -> str:
    """The one line that a run ends in."""
    main = lambda: train(corpus, folder, *switches, **changes)  # noqa: E731
    with pytest.raises(SystemExit) as stop:
        command.run(main)
    assert stop.value.code == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def metrics(folder: Path) -> list[dict]:
    """Every row but for what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocked = ("audio_seconds_per_second", "data_wait")
    return [{k: v for k, v in row.items() if k not in clocked} for row in rows]


def flat(value, name=""):
    """(name, leaf) of nested containers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat(item, f"{name}.{i}")
    else:
        yield name, value


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, discriminator, optimizers and balancer, bit for bit."""
    a, b = checkpoints.load_checkpoint(one), checkpoints.load_checkpoint(other)
    assert a.step == b.step and a.config == b.config
    states = []
    for checkpoint in (a, b):
        trainer = {k: v for k, v in checkpoint.trainer.items() if k != "meter"}
        states.append(dict(flat({"model": checkpoint.tensors, **trainer})))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name
        else:
            assert value == states[1][name], name


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """Eight steps without a break, no GAN; its printed lines."""
    folder = tmp_path_factory.mktemp("whole")
    printed = (folder.parent / "whole.txt").open("w+")
    with contextlib.redirect_stdout(printed):
        train(corpus, folder)
    printed.seek(0)
    return folder, printed.read()


def test_a_run_says_what_it_will_do_and_logs_what_it_did(whole_run):
    folder, printed = whole_run
    before = printed.split("step 1/")[0]
    for said in ("preset tiny", "teacher", "2 speakers", "english", "an epoch is", "8 steps = "):
        assert said in before, said
    rows = metrics(folder)
    steps = [row for row in rows if "phones" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(row["phones"] > 0 and row["skipped"] == 0 for row in steps)
    # A quarter of the steps is the semantic branch alone; two steps later the codebooks start.
    assert ["mel" in row and row["waveform"] > 0 for row in steps] == [False] * 2 + [True] * 6
    assert [row["commitment"] > 0 for row in steps] == [False] * 5 + [True] * 3
    assert steps[-1]["phones"] < steps[0]["phones"]
    # Of the same windows: those of two steps differ by more than six steps teach.
    held_out = [row for row in rows if "validation_mel_8" in row]
    assert [row["step"] for row in held_out] == [4, 8]
    for name in ("validation_mel_8", "validation_spectral_8"):
        assert held_out[1][name] < held_out[0][name]
    assert all("adversarial" not in row for row in steps)
    assert 0 < steps[-1]["share_spectral"] < 1


def test_a_stopped_run_goes_on_as_if_it_had_not(corpus, whole_run, tmp_path, capsys):
    """Stopped in mid-epoch, before the codebooks were started, and again after."""
    folder = tmp_path / "run"
    for stop in (2, 5):
        train(corpus, folder, max_steps=stop)
        assert checkpoints.find_checkpoint(folder).name == f"step_{stop:08d}"
    train(corpus, folder)
    assert "resuming" in capsys.readouterr().out
    assert metrics(folder) == metrics(whole_run[0])
    assert_same_state(folder, whole_run[0])


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}


def test_a_killed_run_goes_on_with_its_gan(corpus, tmp_path):
    """SIGKILL in mid-run, discriminators training from step 0: the same curve to the last bit."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(corpus, whole, disc_start=0)
    command = [sys.executable, "-m", "test_train_codec", *flags(corpus, folder, disc_start=0)]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
        for _ in range(60_000):
            saved = (folder / "step_00000004").is_dir()
            lines = (folder / "metrics.jsonl").read_text().count("\n") if saved else 0
            if lines > 5 or process.poll() is not None:
                break
            time.sleep(0.01)
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log.txt").read_text()[-2000:]
    assert checkpoints.find_checkpoint(folder).name == "step_00000004"
    train(corpus, folder, disc_start=0)
    rows = metrics(folder)
    assert rows == metrics(whole)
    assert all(row["discriminator"] > 0 for row in rows if "mel" in row)
    assert all(0 <= row["disc_accuracy"] <= 1 for row in rows if "mel" in row)
    assert_same_state(folder, whole)


def test_a_step_that_is_not_finite_moves_nothing(corpus, tmp_path, monkeypatch):
    """No weight, code, statistic or average; the discriminators' guard counts for itself."""
    before, after = tmp_path / "before", tmp_path / "after"
    train(corpus, before, max_steps=6, disc_start=0)
    shutil.copytree(before, after)

    def broken(estimate, target, weights):
        return estimate.sum() * float("nan")

    monkeypatch.setattr(train_codec, "waveform_loss", broken)
    train(corpus, after, max_steps=7, disc_start=0)
    row = metrics(after)[-1]
    assert row["step"] == 7 and row["skipped"] == 1 and row["waveform"] is None
    a, b = (checkpoints.load_checkpoint(folder) for folder in (before, after))
    assert a.tensors.keys() == b.tensors.keys() and b.step == 7
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name
    kept = ("trained_weights", "optimizer", "average", "head", "balancer")
    one, other = (dict(flat({k: c.trainer[k] for k in kept})) for c in (a, b))
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same or name.endswith(".lr"), name
    skipped = [b.trainer[k]["skipped"] for k in ("guard", "disc_guard")]
    assert skipped == [1, 0]
    moved = dict(flat(b.trainer["disc"]))
    assert any(not torch.equal(v, moved[k]) for k, v in flat(a.trainer["disc"]))


def test_the_average_ships_and_the_weights_go_on(corpus, whole_run, tmp_path, capsys):
    checkpoint = checkpoints.load_checkpoint(whole_run[0])
    shown, trained = checkpoint.tensors, checkpoint.trainer["trained_weights"]
    assert checkpoint.trainer["average"] == {"steps": 8, "decay": 0.5}
    names = ("decoder.0.norm.weight", "quantizer.codebooks.3.embedding")
    assert not any(torch.equal(shown[name], trained[name]) for name in names)
    assert Codec.from_checkpoint(whole_run[0]).state_dict().keys() == trained.keys()

    # A checkpoint of an older version, whose flags had other names, ends in one line.
    trainer = {k: v for k, v in checkpoint.trainer.items() if k != "settings"}
    checkpoints.save_checkpoint(tmp_path / "old", 8, checkpoint.config, trained, trainer)
    line = refused(corpus, tmp_path / "old", capsys)
    assert "no settings in its trainer state" in line and "--init_from" in line

    train(corpus, tmp_path / "off", max_steps=1, ema_decay=0)
    assert not {"average", "trained_weights"} & set(
        checkpoints.load_checkpoint(tmp_path / "off").trainer
    )


def test_a_run_ends_with_its_budget_and_its_learning_rate_with_it(
    corpus, tmp_path, capsys, monkeypatch
):
    """On a clock where a step costs a dollar: first by the estimate, then by what it measures."""
    now = [0.0]
    meter = functools.partial(training.CostMeter, clock=lambda: now[0])
    monkeypatch.setattr(training, "CostMeter", meter)
    tick = training.CostMeter.func.tick

    def slow(self):
        now[0] += 3600
        tick(self)

    monkeypatch.setattr(meter.func, "tick", slow)
    monkeypatch.setattr(training.Run, "_seconds", lambda *_: 1800.0)
    monkeypatch.chdir(tmp_path)
    changes = {"num_epochs": 10, "budget_usd": 12, "usd_per_hour": 1}  # 40 steps, thought $20
    train(corpus, tmp_path / "run", semantic_share=0, **changes)
    said = capsys.readouterr().out
    assert "budget $12: 23 of 40 steps" in said
    rows = [row for row in metrics(tmp_path / "run") if "lr" in row]
    last = rows[-1]["step"]
    assert 10 <= last <= 12 and f"{last} of 40 steps" in said, said
    assert checkpoints.load_checkpoint(tmp_path / "run").trainer["schedule"]["total"] == last
    rates = [row["lr"] for row in rows]
    falls = [one - other for one, other in zip(rates[2:], rates[3:], strict=False)]
    assert max(falls) < 0.2 * max(rates)  # smoothly, though the schedule was cut to a half
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.2 * max(rates)
    spent = [json.loads(x)["dollars"] for x in (tmp_path / "costs.jsonl").read_text().splitlines()]
    assert sum(spent) == pytest.approx(last)
    train(corpus, tmp_path / "run", semantic_share=0, **changes)  # pasted again: there is no more
    assert checkpoints.find_checkpoint(tmp_path / "run").name == f"step_{last:08d}"


def test_held_out_windows_are_in_tensorboard(corpus, tmp_path, monkeypatch):
    """The recordings once, what became of them at each validation; also after a resume."""
    logged = []

    def log(self, step, name, audio, sample_rate):
        # Three times a context of 12 frames, which is half of the training window.
        assert audio.shape == (1, 3 * 12 * 480) and sample_rate == 24_000
        logged.append((step, name, float(audio.abs().max())))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.MagicMock())
    monkeypatch.setattr(training.Metrics, "log_audio", log)
    for stop in (4, 8):
        train(corpus, tmp_path, "--tensorboard", max_steps=stop)
    assert [row[:2] for row in logged] == [
        (step, f"held_out_{i}/{name}")
        for step, name in ((0, "reference"), (4, "8_codebooks"), (8, "8_codebooks"))
        for i in range(4)
    ]
    assert all(0 < loudest <= 1 for _, _, loudest in logged)


def test_quantizer_dropout_favours_the_rate_that_is_spoken():
    draws = torch.cat(
        [train_codec.draw_num_codebooks(64, 64, 0.5, 0.2, (0, i, 0)) for i in range(200)]
    )
    shares = draws.bincount(minlength=65) / len(draws)
    assert float(shares[8]) == pytest.approx(0.5 + 0.3 / 64, abs=0.02)
    assert float(shares[64]) == pytest.approx(0.2 + 0.3 / 64, abs=0.02)
    others = shares[[k for k in range(1, 65) if k not in (8, 64)]]
    assert (
        shares[0] == 0
        and others.min() > 0
        and float(others.sum()) == pytest.approx(0.3 * 62 / 64, abs=0.02)
    )
    # With eight codebooks in all the two rates are one.
    draws = torch.cat(
        [train_codec.draw_num_codebooks(64, 8, 0.5, 0.2, (0, i, 0)) for i in range(200)]
    )
    assert float((draws == 8).float().mean()) == pytest.approx(0.7 + 0.3 / 8, abs=0.02)


def test_the_judged_part_moves_and_stays_within():
    parts = [train_codec.judged_part(48_000, 1.0, (0, step, 1)) for step in range(50)]
    starts = [int(part[0]) for part in parts]
    for part, start in zip(parts, starts, strict=True):
        assert torch.equal(part, torch.arange(start, start + 24_000)) and 0 <= start <= 24_000
    assert len(set(starts)) > 40
    again = [train_codec.judged_part(48_000, 1.0, (0, step, 1)) for step in range(50)]
    assert [int(part[0]) for part in again] == starts
    assert torch.equal(train_codec.judged_part(11_520, 1.0, (0, 0, 1)), torch.arange(11_520))


def test_the_average_spans_a_fiftieth_of_the_run_or_what_is_asked():
    assert train_codec.average_decay(None, 10_000) == 1 - 1 / 200
    assert train_codec.average_decay(None, 10_000_000) == 0.9999
    assert train_codec.average_decay(None, 20) == 0 == train_codec.average_decay(0.0, 10_000)
    assert train_codec.average_decay(0.99, 20) == 0.99


def test_the_semantic_branch_first_leaves_the_rest_as_it_was(corpus, tmp_path):
    train(corpus, tmp_path / "start", gen_lr=0, max_steps=1, semantic_share=1)
    train(corpus, tmp_path / "run", num_epochs=1, semantic_share=1)
    start, run = (checkpoints.load_checkpoint(tmp_path / f).tensors for f in ("start", "run"))
    semantic = ("encoder.0.", "quantizer.semantic_in", "quantizer.codebooks.0.")
    for name, tensor in start.items():
        assert name.startswith(semantic) or torch.equal(tensor, run[name]), name
    assert not torch.equal(start["encoder.0.1.linear.weight"], run["encoder.0.1.linear.weight"])
    sizes = [float(run[f"quantizer.codebooks.{k}.cluster_size"].sum()) for k in (0, 1)]
    assert sizes[0] > 0 and sizes[1] == 0  # by k-means, and not yet
    train(corpus, tmp_path / "heir", num_epochs=1, semantic_share=0, init_from=tmp_path / "run")
    heir = checkpoints.load_checkpoint(tmp_path / "heir").tensors
    assert float(heir["quantizer.codebooks.7.cluster_size"].sum()) > 0


def test_a_decoder_learns_alone_and_no_code_changes(corpus, whole_run, tmp_path, capsys):
    assert "--init_from" in refused(corpus, tmp_path / "none", capsys, "--decoder_only")
    train(corpus, tmp_path / "run", "--decoder_only", num_epochs=1, init_from=whole_run[0])
    start, run = (checkpoints.load_checkpoint(f).tensors for f in (whole_run[0], tmp_path / "run"))
    frozen = ("encoder.", "quantizer.")
    for name, tensor in start.items():
        assert torch.equal(tensor, run[name]) == name.startswith(frozen), name
    before, after = (Codec.from_checkpoint(f) for f in (whole_run[0], tmp_path / "run"))
    assert before.fingerprint == after.fingerprint


def test_the_agents_decoder_is_exported_into_its_codecs_folder(corpus, whole_run, tmp_path, capsys):
    """`--decoder_only` from the shipped codec, then with `--export`: a file beside the codec."""
    shipped = tmp_path / "shipped"
    train(corpus, whole_run[0], export=shipped)
    before = {file.name: file.read_bytes() for file in shipped.iterdir()}
    run, own = tmp_path / "run", {"num_epochs": 1, "disc_start": 0}
    train(corpus, run, "--decoder_only", **own, init_from=shipped)
    capsys.readouterr()
    train(corpus, run, "--decoder_only", export=shipped)
    assert f"wrote {shipped / 'agent.safetensors'}: the agent's decoder" in capsys.readouterr().out
    after = {file.name: file.read_bytes() for file in shipped.iterdir()}
    assert len(after.pop("agent.safetensors")) and after == before
    general, agents = (Codec.from_checkpoint(shipped, decoder=d) for d in ("general", "agent"))
    audio = 0.1 * torch.randn(1, 1, 24_000, generator=torch.Generator().manual_seed(0))
    codes = general.encode(audio)
    assert torch.equal(agents.encode(audio), codes) and general.fingerprint == agents.fingerprint
    assert not torch.equal(agents.decode(codes), general.decode(codes))
    trained = checkpoints.load_checkpoint(run).tensors
    for name, tensor in agents.state_dict().items():
        if name.startswith("decoder."):
            assert torch.equal(tensor, trained[name].half().float()), name

    # Another codec's, and one whose encoder went on learning.
    train(corpus, tmp_path / "other", max_steps=1, seed=5)
    train(corpus, tmp_path / "other", export=tmp_path / "others")
    for folder in (tmp_path / "others", tmp_path / "run"):
        line = refused(corpus, run, capsys, "--decoder_only", export=folder)
        assert "another codec" in line or "is a run's folder" in line
    train(corpus, tmp_path / "more", init_from=shipped, max_steps=1)
    line = refused(corpus, tmp_path / "more", capsys, "--decoder_only", export=shipped)
    assert "another codec" in line
    assert {file.name for file in shipped.iterdir()} == {*before, "agent.safetensors"}


def test_frozen_codes_are_of_one_codec(whole_run, corpus, tmp_path, capsys):
    """A decoder alone takes the sizes of its codec, and a frozen semantic branch keeps its own;
    one that hears other spectra than the preset's is refused."""
    small = CodecConfig(**{**TINY, "semantic_width": 48, "context": 12})
    model = Codec(small)
    config = checkpoints.stored_config("codec", small)
    checkpoints.save_export(tmp_path / "small", 1, config, model.export_tensors())
    train(corpus, tmp_path / "run", "--decoder_only", max_steps=1, init_from=tmp_path / "small")
    heir = Codec.from_checkpoint(tmp_path / "run")
    assert heir.config == small
    for name, tensor in Codec.from_checkpoint(tmp_path / "small").encoder.state_dict().items():
        assert torch.equal(heir.encoder.state_dict()[name], tensor), name
    # A frozen semantic branch has the sizes that it was made with, the rest those of the preset.
    start = {"init_from": tmp_path / "small", "max_steps": 1}
    train(corpus, tmp_path / "other", "--freeze_semantic", **start)
    assert Codec.from_checkpoint(tmp_path / "other").config == small
    odd = dataclasses.replace(small, num_mels=small.num_mels + 8)
    config, tensors = checkpoints.stored_config("codec", odd), Codec(odd).export_tensors()
    checkpoints.save_export(tmp_path / "odd", 1, config, tensors)
    start = {"init_from": tmp_path / "odd"}
    said = refused(corpus, tmp_path / "no", capsys, "--freeze_semantic", **start)
    assert "encoder.0" in said and "to be frozen" in said


def test_acoustic_codebooks_learn_beside_a_frozen_semantic_branch(corpus, tmp_path, capsys):
    assert "--init_from" in refused(corpus, tmp_path / "none", capsys, "--freeze_semantic")
    train(corpus, tmp_path / "semantic", num_epochs=1, semantic_share=1)
    changes = {"num_epochs": 1, "init_from": tmp_path / "semantic", "precision": "bf16"}
    train(corpus, tmp_path / "run", "--freeze_semantic", **changes)
    start, run = (checkpoints.load_checkpoint(tmp_path / f).tensors for f in ("semantic", "run"))
    frozen = ("encoder.0.", "quantizer.semantic_in", "quantizer.codebooks.0.")
    for name, tensor in start.items():
        assert torch.equal(tensor, run[name]) == name.startswith(frozen), name
    assert all(tensor.dtype == torch.float32 for tensor in run.values())
    assert not any("phone" in name for row in metrics(tmp_path / "run") for name in row)


def test_two_ranks_learn_as_one_process(corpus, tmp_path):
    """torchrun on two gloo ranks, each half of the batch, against the joint batch.

    Before the codebooks start: their first draw is in another order on two ranks.
    """
    same = {"num_epochs": 1, "full_rate": 1, "quantizer_start": 100}
    start, one, two = tmp_path / "start", tmp_path / "one", tmp_path / "two"
    train(corpus, start, augment_share=0, **same, gen_lr=0, max_steps=1)
    train(corpus, one, augment_share=0, **same)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "test_train_codec"]
    command += flags(corpus, two, augment_share=0, **same)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("an epoch is") == 1  # the first rank alone speaks
    runs = [checkpoints.load_checkpoint(f).tensors for f in (start, one, two)]
    names = [name for name, _ in Codec.from_checkpoint(one).named_parameters()]
    first, single, ranks = (torch.cat([run[n].flatten() for n in names]) for run in runs)
    moved, apart = (single - first).norm(), (ranks - single).norm()
    assert moved > 0 and apart < 0.02 * moved, (float(apart), float(moved))


def test_exports_and_inherits(corpus, whole_run, tmp_path, capsys):
    folder = tmp_path / "shipped"
    train(corpus, whole_run[0], export=folder)
    codec = Codec.from_checkpoint(folder)
    assert codec.fingerprint[:16] in capsys.readouterr().out
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    size = (folder / "model.safetensors").stat().st_size
    assert size < 2.1 * sum(p.numel() for p in codec.state_dict().values())

    train(corpus, tmp_path / "heir", init_from=folder, gen_lr=1e-9, max_steps=1)
    said = capsys.readouterr().out
    assert f"init_from {folder}: inherited " in said
    heir = checkpoints.load_checkpoint(tmp_path / "heir").tensors
    for name, tensor in codec.named_parameters():
        torch.testing.assert_close(heir[name], tensor, atol=1e-5, rtol=1e-5)
    assert heir["quantizer.codebooks.7.cluster_size"].min() > 0  # goes on from the codes it got


def test_fresh_refuses_a_used_folder(corpus, whole_run, tmp_path, capsys):
    assert "not empty" in refused(corpus, whole_run[0], capsys, "--fresh")
    assert len(metrics(whole_run[0])) == 10  # and leaves it as it was
    make_corpus(tmp_path / "mixed" / "corpus")
    (tmp_path / "mixed" / "loose").mkdir()
    (tmp_path / "mixed" / "loose" / "text.wav").write_text("no audio")
    train(tmp_path / "mixed", tmp_path / "new", "--fresh", max_steps=1)
    assert (tmp_path / "new" / "unreadable.txt").read_text().count("text.wav") == 1


def test_bad_input_ends_in_one_line(corpus, whole_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no readable audio" in refused(tmp_path / "empty", tmp_path / "a", capsys)
    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path / "a", capsys)

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "speech.wav").write_text("This is not audio.")
    assert "no readable audio" in refused(tmp_path / "text", tmp_path / "a", capsys)

    other = tmp_path / "other"
    tensors = {"x": torch.zeros(2)}
    checkpoints.save_checkpoint(other, 3, {"model": "s2s"}, tensors, {"step": 3})
    assert "another model" in refused(corpus, other, capsys)
    assert "no tensor fits" in refused(corpus, tmp_path / "b", capsys, init_from=other)
    assert "nothing" in refused(corpus, tmp_path / "b", capsys, init_from=tmp_path / "nothing")

    cut = tmp_path / "cut" / "step_00000008"
    cut.mkdir(parents=True)
    for file in checkpoints.find_checkpoint(whole_run[0]).iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[:5000])
    assert "cut" in refused(corpus, tmp_path / "cut", capsys)


def test_speakers_need_not_be_held_out_nor_windows_be_whole_frames(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", ("train", "train"))
    train(corpus, tmp_path / "run", num_epochs=1, window_seconds=0.333)
    assert "no clips in the validation split" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 6 + 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_steps_replayed_as_a_cuda_graph_learn_what_eager_ones_do(corpus, tmp_path):
    """Through the start of the codebooks and of the discriminators, and a resumption."""
    changes = {"teacher": "none", "device": "cuda", "precision": "fp32", "disc_start": 0.5}
    changes |= {"num_epochs": 10, "semantic_share": 0, "disc_preset": "tiny"}
    rows = {}
    for name, switches in (("eager", ()), ("graph", ("--cuda_graph",))):
        for stop in (30, 40):
            train(corpus, tmp_path / name, *switches, max_steps=stop, **changes)
        rows[name] = [row for row in metrics(tmp_path / name) if "mel" in row]
    assert [row["step"] for row in rows["graph"]] == list(range(1, 41))
    for eager, graph in zip(rows["eager"], rows["graph"], strict=True):
        # Sums in another order grow apart step by step.
        near = 1e-3 if eager["step"] < 20 else 0.1
        assert graph["skipped"] == 0 and graph.keys() == eager.keys()
        assert graph["mel"] == pytest.approx(eager["mel"], rel=near), eager["step"]


def test_a_cuda_graph_without_a_gpu_is_refused(corpus, tmp_path, capsys):
    assert "needs a CUDA GPU" in refused(corpus, tmp_path / "run", capsys, "--cuda_graph")
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_what_it_trains(corpus, whole_run, tmp_path, capsys):
    folder = Path(shutil.copytree(whole_run[0], tmp_path / "run"))
    for switch in ("--decoder_only", "--freeze_semantic"):
        line = refused(corpus, folder, capsys, switch, num_epochs=4)
        assert f"{switch}: the run in" in line and f"no {switch}" in line
    assert "--preset base" in refused(corpus, folder, capsys, preset="base")
    assert "--set disc_preset=base" in refused(corpus, folder, capsys, disc_preset="base")
    assert "is a run's folder" in refused(corpus, folder, capsys, export=folder / "shipped")
    train(corpus, folder)  # there is nothing left
    assert "done: step 8" in capsys.readouterr().out
    assert metrics(folder) == metrics(whole_run[0])


def test_discriminators_and_the_balance_are_set_and_kept(corpus, whole_run, tmp_path, capsys):
    """What `--set` gives; and a run from before they could be set goes on with what it had."""
    config, bands = CodecConfig.tiny(), train_codec.window_bands("512:40,256:20")
    changes = {"disc_bands": bands, "disc_channels": 4}
    judges = train_codec.discriminator_config(
        train_codec.Settings(**changes), config, torch.device("cpu")
    )
    found = judges.mel_sizes, judges.mel_bands, judges.mel_channels
    assert found == ((512, 256), (40, 20), 4)
    args = train_codec.parse_args([])
    shares = train_codec.balance(args, train_codec.Settings(), config)
    shown = {"waveform": 0.25, "mel": 0.5, "spectral": 0.25, "adversarial": 2, "features": 4}
    assert shares == {**shown, "ssl": 1.0}
    assert train_codec.balance(args, train_codec.Settings(), CodecConfig.base())["waveform"] == 1
    given = train_codec.Settings(waveform_weight=3.0, adversarial_weight=0.0, features_weight=5.0)
    shares = train_codec.balance(args, given, CodecConfig.base())
    assert [shares[n] for n in ("waveform", "adversarial", "features")] == [3, 0, 5]

    # Such a run: its settings had no such names, and its discriminators stand in the checkpoint.
    changes = {"disc_start": 0, "disc_bands": "256:20", "disc_channels": 2}
    train(corpus, tmp_path / "new", **changes, max_steps=6)
    checkpoint = checkpoints.load_checkpoint(tmp_path / "new")
    assert checkpoint.trainer["judges"]["mel_bands"] == (20,)
    before = train_codec.Settings.BEFORE
    for name in before:
        del checkpoint.trainer["settings"][name]
    checkpoint.trainer["settings"]["mel_weight"] = 1.0
    checkpoint.trainer["flags"]["spectral_weight"] = 1.0
    stored = checkpoint.config, checkpoint.tensors, checkpoint.trainer
    checkpoints.save_checkpoint(tmp_path / "old", 6, *stored)
    capsys.readouterr()
    train(corpus, tmp_path / "old", disc_start=0)
    said = capsys.readouterr().out
    assert "as the run was started: --set mel_weight=1.0" in said
    assert "as the run was started: --spectral_weight 1.0" in said
    trainer = checkpoints.load_checkpoint(tmp_path / "old").trainer
    assert trainer["judges"] == checkpoint.trainer["judges"]
    assert {name: trainer["settings"][name] for name in before} == before
    row = [row for row in metrics(tmp_path / "old") if "share_mel" in row][-1]
    assert row["share_adversarial"] + row["share_features"] == pytest.approx(3 / 6, abs=0.1)
    line = refused(corpus, tmp_path / "old", capsys, disc_start=0, features_weight=3)
    assert "--set features_weight=3.0" in line and "--set features_weight=2.0" in line


WRONG = [
    "--batch_size 0", "--batch_size 1.5", "--num_epochs 0", "--gen_lr -1", "--disc_lr nan",
    "--num_workers -1", "--epoch_hours nan", "--epoch_hours 0", "--window_seconds 0.02",
    "--window_seconds nan", "--language_temperature 0", "--semantic_share -0.1",
    "--disc_start 1.5", "--quantizer_start -1", "--warmup_steps -1",
    "--threads 0", "--save_every_epochs 0", "--keep_last 0", "--preset huge",
    "--log_every 0", "--max_steps 0", "--usd_per_hour 0", "--budget_usd -3", "--seed 1e3",
    "--set augment_share=2", "--set disc_seconds=0", "--set mel_weight=-1", "--set lm_rate=x",
    "--set ema_decay=1", "--set grad_clip=0", "--set mel_weight",
    "--set save_minutes=-1", "--set disc_preset=huge", "--set gen_lr=1", "--set",
    "--set waveform_weight=0", "--set disc_bands=512", "--set disc_bands=510:40",
    "--set disc_bands=512:40,", "--set disc_bands=512:0", "--set BEFORE=1",
]  # fmt: skip


def test_flags_out_of_range_are_refused_before_anything_is_loaded(capsys):
    for wrong in WRONG:
        with pytest.raises(SystemExit) as stop:
            train_codec.parse_args(wrong.split())
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and shown.count("\n") == 1 and wrong.split()[0] in shown, wrong


# -- windows and context -----------------------------------------------------------------------


def sizes(checkpoint=None, **flags) -> tuple[CodecConfig, float]:
    args = train_codec.parse_args([x for k, v in flags.items() for x in (f"--{k}", str(v))])
    args.decoder_only, args.freeze_semantic = (
        flags.get(k) == "" for k in ("decoder_only", "freeze_semantic")
    )
    config = train_codec.sizes(args, checkpoint, prints=True)
    return config, args.window_seconds


def test_a_window_is_at_least_twice_the_context(tmp_path, capsys):
    """So that what runs was trained: by default; base refuses less, a new tiny sees less."""
    config, seconds = sizes(preset="base")
    assert config == CodecConfig.base() and (config.context, seconds) == (100, 4.0)
    with pytest.raises(command.UserError, match="199 frames .* context of 100.* at least 4"):
        sizes(preset="base", window_seconds=3.98)
    config, seconds = sizes(preset="tiny")
    assert config == CodecConfig.tiny() and seconds == 2 * config.context / 50
    assert capsys.readouterr().out == ""
    config, seconds = sizes(preset="tiny", window_seconds=0.5)
    assert (config.context, seconds) == (12, 0.5)
    assert "25 frames" in (said := capsys.readouterr().out) and "one of 12" in said
    cuda = torch.device("cuda")
    auto = train_codec.discriminator_config(train_codec.Settings(), CodecConfig.base(), cuda)
    assert auto.periods

    # Frozen codes have the context that they were made with, and the window follows it.
    shipped = ROOT / "checkpoints" / "tiny" / "codec"
    own = Codec.from_checkpoint(shipped).config
    checkpoint = checkpoints.load_checkpoint(shipped, with_trainer=False)
    assert sizes(checkpoint, preset="tiny", window_seconds=2.56) == (own, 2.56)
    assert capsys.readouterr().out == "" and own.context == 64
    assert sizes(checkpoint, preset="tiny", window_seconds=1.5)[0] == own
    said = capsys.readouterr().out
    assert said.startswith("warning") and "75 frames" in said and "64" in said
    for flag in ("--decoder_only", "--freeze_semantic"):
        args = train_codec.parse_args([flag, "--preset", "tiny", "--init_from", str(shipped)])
        assert train_codec.sizes(args, None, True).context == 64 and args.window_seconds == 2.56
    args = train_codec.parse_args(["--preset", "tiny", "--init_from", str(shipped)])
    assert train_codec.sizes(args, None, True) == CodecConfig.tiny()


def test_validation_shows_a_break_past_the_context(corpus, whole_run, monkeypatch):
    """It goes to three times the context, filled with sound, and tells the error by place."""
    rows = [row for row in metrics(whole_run[0]) if "validation_mel_8" in row]
    for row in rows:
        within, past = (row[f"validation_mel_8_{place}"] for place in ("within", "past"))
        assert 0.5 < past / within < 2 and min(within, past) <= row["validation_mel_8"] * 1.2
    model = Codec.from_checkpoint(whole_run[0])
    context = model.config.context
    assert context == 12  # half of the windows
    held_out = data.load_splits([str(corpus)], ("validation",), False, None)[0]
    batches = train_codec.validation_batches(held_out, model.config, {})
    assert all(b["audio"].shape[-1] == 3 * context * 480 for b in batches)
    spectra = torch.nn.ModuleDict({"mel": train_codec.MelLoss()})
    cast = torch.autocast("cpu", enabled=False)

    def ratio() -> float:
        scores = train_codec.validate(model, None, spectra, batches[:1], torch.device("cpu"), cast)
        return scores["validation_mel_8_past"] / scores["validation_mel_8_within"]

    healthy, forward = ratio(), Codec.forward

    def broken(self, audio, counts):
        """What attention gives that was never trained beyond so many frames."""
        estimate, info = forward(self, audio, counts)
        noise = torch.randn(estimate.shape, generator=torch.Generator().manual_seed(0))
        edge = context * 480
        return torch.cat((estimate[..., :edge], noise[..., edge:]), -1), info

    monkeypatch.setattr(Codec, "forward", broken)
    assert 0.5 < healthy < 2 < 1.5 * ratio() / healthy


def test_a_short_clip_is_laid_end_to_end():
    audio = torch.zeros(1, 5 * 480)
    audio[0, :900] = torch.arange(1, 901)
    item = train_codec.filled({"audio": audio, "phones": torch.tensor([3, 4, 0, 0, 0])})
    assert item["phones"].tolist() == [3, 4, 3, 4, 3]
    assert torch.equal(item["audio"][0, 960:1860], audio[0, :900])
    silent = {"audio": torch.zeros(1, 960), "phones": torch.tensor([1, 2])}
    assert train_codec.filled(silent)["phones"].tolist() == [1, 2]


# -- the step ----------------------------------------------------------------------------------


def test_what_joins_late_warms_up_first(corpus, tmp_path):
    """The discriminators' share of the gradient and their rate, and the codec's at first."""
    changes = {"disc_start": 0.5, "warmup_steps": 3, "num_epochs": 2, "spectral_weight": 0}
    rates, rate = [], training.set_learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "set_learning_rate", lambda o, value: (rates.append(value), rate(o, value))
        )
        train(corpus, tmp_path, **changes, gen_lr=1e-3, disc_lr=1e-3)
    rows = [row for row in metrics(tmp_path) if "lr" in row]
    joined = [row for row in rows if "adversarial" in row]
    assert [row["step"] for row in joined] == [5, 6, 7, 8]
    shares = [row["share_adversarial"] + row["share_features"] for row in joined]
    # Of 0.75 for waveform and mel: 1/3, 2/3 and then all of 6.
    assert shares[0] == pytest.approx(2 / 2.75, abs=0.05) and shares[0] < shares[1] < shares[2]
    schedule = training.Schedule(8, lambda _: {"codec": 2, "adversarial": 4}, 3)
    expected = [schedule.rate(i) for i in range(8)]
    judges = [value / 1e-3 for value in rates[-16:][1::2]][4:]
    assert judges == pytest.approx([1 / 3, *(min(expected[i], (i - 3) / 3) for i in (5, 6, 7))])
    # The semantic branch takes two steps; then the rest begins, and its rate anew.
    assert [row["lr"] / 1e-3 for row in rows][:4] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])


def launches_of_steps(corpus, folder, books=8, **changes) -> list[Launches]:
    """What each of eight steps of a very small codec launches: 2 semantic, 4 plain, 2 with GAN."""
    config = CodecConfig(
        front_dim=16, encoder_dim=16, encoder_layers=1, semantic_width=16, semantic_layers=1,
        decoder_front_dim=16, decoder_front_blocks=1, decoder_dim=16, decoder_layers=1,
        num_heads=2, context=12, semantic_dim=8, acoustic_dim=8, codebook_sizes=(8,) * books,
    )  # fmt: skip
    found, steps, done = [], training.Run.steps, training.Run.step_done

    def counted(self, batches):
        for batch in steps(self, batches):
            self.open = contextlib.ExitStack()
            found.append(self.open.enter_context(counting()))
            self.random = torch.get_rng_state()
            yield batch

    def closed(self, row):
        self.open.close()
        assert torch.equal(self.random, torch.get_rng_state())  # a CUDA graph would not draw anew
        done(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_codec, "sizes", lambda *_: config)
        patch.setattr(training.Run, "steps", counted)
        patch.setattr(training.Run, "step_done", closed)
        train(corpus, folder, disc_start=0.75, quantizer_start=0, log_every=100, **changes)
    return found


def test_a_step_waits_for_the_device_nowhere(corpus, tmp_path):
    """But where codebooks start; and 64 of them cost little more than 8 do."""
    few, many = (launches_of_steps(corpus, tmp_path / str(n), n) for n in (8, 64))
    for steps in (few, many):
        waits = [launches.waits for launches in steps]
        assert waits[1:2] + waits[3:] == [0] * 6, [launches.reads for launches in steps]
    # Beside the search through one level after another everything is done for all at once.
    assert many[-1].total - few[-1].total <= 56 * 6 + 10
    assert many[-1].total < 1.2 * few[-1].total


if __name__ == "__main__":
    main()
