"""The codec trainer: interrupted runs against uninterrupted ones, two ranks, what it refuses."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_codec
import training
from codec import Codec
from data import Clip, write_audio, write_manifest
from speech import PHONES

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
    "listen_share": 0.25,
    "save_every_epochs": 1,
    "log_every": 1,
    "disc_start": 1,
}


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


def flags(corpus, folder, *switches, **changes) -> list[str]:
    values = {**SMALL, "checkpoint_dir": folder, **changes}
    pairs = [[f"--{name}", str(value)] for name, value in values.items()]
    return ["--data_dirs", str(corpus), *sum(pairs, []), *switches]


def train(corpus, folder, *switches, **changes) -> None:
    """The script's main, in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_codec.py", *flags(corpus, folder, *switches, **changes)])
        try:
            train_codec.main()
        finally:
            torch.set_num_threads(threads)


def refused(corpus, folder, capsys, *switches, **changes) -> str:
    """The one line that a run ends in."""
    main = lambda: train(corpus, folder, *switches, **changes)  # noqa: E731
    with pytest.raises(SystemExit) as stop:
        training.run(main)
    assert stop.value.code == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def metrics(folder: Path) -> list[dict]:
    """Every row but for what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "audio_seconds_per_second"} for row in rows]


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
    a, b = training.load_checkpoint(one), training.load_checkpoint(other)
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
    # A quarter of the steps listens only; two steps later the codebooks start.
    assert ["mel" in row and row["waveform"] > 0 for row in steps] == [False] * 2 + [True] * 6
    assert [row["commitment"] > 0 for row in steps] == [False] * 5 + [True] * 3
    assert steps[-1]["mel"] < steps[2]["mel"] and steps[-1]["phones"] < steps[0]["phones"]
    assert [row["step"] for row in rows if "validation_mel_8" in row] == [4, 8]
    assert all("adversarial" not in row for row in steps)


def test_a_stopped_run_goes_on_as_if_it_had_not(corpus, whole_run, tmp_path, capsys):
    """Stopped in mid-epoch, before the codebooks were started, and again after."""
    folder = tmp_path / "run"
    for stop in (2, 5):
        train(corpus, folder, max_steps=stop)
        assert training.find_checkpoint(folder).name == f"step_{stop:08d}"
    train(corpus, folder)
    assert "resuming" in capsys.readouterr().out
    assert metrics(folder) == metrics(whole_run[0])
    assert_same_state(folder, whole_run[0])


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_a_killed_run_goes_on_with_its_gan(corpus, tmp_path):
    """SIGKILL in mid-run, discriminators training from step 0: the same curve to the last bit."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(corpus, whole, disc_start=0)
    command = [sys.executable, "train_codec.py", *flags(corpus, folder, disc_start=0)]
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
    assert training.find_checkpoint(folder).name == "step_00000004"
    train(corpus, folder, disc_start=0)
    rows = metrics(folder)
    assert rows == metrics(whole)
    assert all(row["discriminator"] > 0 for row in rows if "mel" in row)
    assert_same_state(folder, whole)


def test_listening_first_leaves_the_rest_as_it_was(corpus, tmp_path):
    train(corpus, tmp_path / "start", gen_lr=0, max_steps=1, listen_share=1)
    train(corpus, tmp_path / "run", num_epochs=1, listen_share=1)
    start, run = (training.load_checkpoint(tmp_path / f).tensors for f in ("start", "run"))
    heard = ("encoder.0.", "quantizer.semantic_in", "quantizer.codebooks.0.")
    for name, tensor in start.items():
        assert name.startswith(heard) or torch.equal(tensor, run[name]), name
    assert not torch.equal(start["encoder.0.1.linear.weight"], run["encoder.0.1.linear.weight"])
    sizes = [float(run[f"quantizer.codebooks.{k}.cluster_size"].sum()) for k in (0, 1)]
    assert sizes[0] > 0 and sizes[1] == 0  # by k-means, and not yet
    train(corpus, tmp_path / "heir", num_epochs=1, listen_share=0, init_from=tmp_path / "run")
    heir = training.load_checkpoint(tmp_path / "heir").tensors
    assert float(heir["quantizer.codebooks.7.cluster_size"].sum()) > 0


def test_a_decoder_learns_alone_and_keeps_every_code(corpus, whole_run, tmp_path, capsys):
    assert "--init_from" in refused(corpus, tmp_path / "none", capsys, "--decoder_only")
    train(corpus, tmp_path / "run", "--decoder_only", num_epochs=1, init_from=whole_run[0])
    start, run = (training.load_checkpoint(f).tensors for f in (whole_run[0], tmp_path / "run"))
    kept = ("encoder.", "quantizer.")
    for name, tensor in start.items():
        assert torch.equal(tensor, run[name]) == name.startswith(kept), name
    before, after = (Codec.from_checkpoint(f) for f in (whole_run[0], tmp_path / "run"))
    assert before.fingerprint == after.fingerprint


def test_two_ranks_learn_as_one_process(corpus, tmp_path):
    """torchrun on two gloo ranks, each half of the batch, against the joint batch.

    Before the codebooks start: their first draw is in another order on two ranks.
    """
    same = {"num_epochs": 1, "full_rate": 1, "quantizer_start": 100}
    start, one, two = tmp_path / "start", tmp_path / "one", tmp_path / "two"
    train(corpus, start, "--no_augment", **same, gen_lr=0, max_steps=1)
    train(corpus, one, "--no_augment", **same)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "train_codec.py"]
    command += flags(corpus, two, "--no_augment", **same)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("an epoch is") == 1  # the first rank alone speaks
    runs = [training.load_checkpoint(f).tensors for f in (start, one, two)]
    names = [n for n, p in Codec(train_codec.CodecConfig.tiny()).named_parameters()]
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
    heir = training.load_checkpoint(tmp_path / "heir").tensors
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
    training.save_checkpoint(other, 3, {"model": "s2s"}, tensors, {"step": 3})
    assert "another model" in refused(corpus, other, capsys)
    assert "no tensor fits" in refused(corpus, tmp_path / "b", capsys, init_from=other)
    assert "nothing" in refused(corpus, tmp_path / "b", capsys, init_from=tmp_path / "nothing")

    cut = tmp_path / "cut" / "step_00000008"
    cut.mkdir(parents=True)
    for file in training.find_checkpoint(whole_run[0]).iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[:5000])
    assert "cut" in refused(corpus, tmp_path / "cut", capsys)


def test_speakers_need_not_be_held_out_nor_windows_be_whole_frames(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", ("train", "train"))
    train(corpus, tmp_path / "run", num_epochs=1, window_seconds=0.333)
    assert "no clips in the validation split" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 6 + 1))
