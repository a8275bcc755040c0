"""The codec trainer with a teacher: both kinds learn, stop and go on, and are named."""

from __future__ import annotations

import pytest
import torch
from test_teachers import folders  # noqa: F401 (a fixture)
from test_train_codec import (  # noqa: F401
    assert_same_state,
    corpus,
    launches_of_steps,
    metrics,
    refused,
    train,
)

import checkpoints
import teachers
from codec import Codec


@pytest.mark.parametrize("kind", ["wavlm", "whisper"])
def test_a_taught_run_stops_and_goes_on(corpus, folders, kind, tmp_path, capsys):  # noqa: F811
    """Two steps of each kind: the semantic branch alone, then all; the same in two parts."""
    same = {"teacher": folders[kind], "semantic_share": 0.5, "num_epochs": 1, "quantizer_start": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(corpus, whole, **same)
    name = {"wavlm": "3 layers of 32", "whisper": "2 layers of 32"}[kind]
    said = capsys.readouterr().out
    assert f"teacher: {folders[kind]} ({kind}, {name}), phone labels" in said.split("step 1/")[0]
    rows = [row for row in metrics(whole) if "phones" in row]
    assert all(0 <= row["unit_accuracy"] <= 1 for row in rows)
    assert (
        ["ssl" in row for row in rows] == ["mel" in row for row in rows] == [False] * 2 + [True] * 2
    )
    # A share of the gradient of its own, as much as mel, spectral and waveform have together:
    # exactly so in the first step, whose norms are the running means.
    assert rows[2]["share_ssl"] == pytest.approx(1 / 2, abs=1e-3)

    for stop in (1, 3):
        train(corpus, parts, **same, max_steps=stop)
    train(corpus, parts, **same)
    assert metrics(parts) == metrics(whole)
    assert_same_state(parts, whole)
    trainer = checkpoints.load_checkpoint(whole).trainer
    centres = trainer["units"]["centres"]
    # Codebook 0 stands for the units, and stays.
    units = teachers.Units(*centres.shape)
    units.load_state_dict({"centres": centres})
    first = checkpoints.load_checkpoint(whole).tensors["quantizer.codebooks.0.embedding"]
    torch.testing.assert_close(first, units.codes(first.shape[1]))

    # Nothing of the teacher is in what ships.
    shipped = checkpoints.load_checkpoint(whole).tensors
    assert shipped.keys() == Codec(Codec.from_checkpoint(whole).config).state_dict().keys()
    capsys.readouterr()  # the bars of the teachers that were loaded
    other = {**same, "teacher": "none"}
    assert "give the same --teacher" in refused(corpus, parts, capsys, **other)


def test_the_branch_of_codebook_0_learns_from_a_teacher_alone(corpus, folders, tmp_path):  # noqa: F811
    """Without phones its gradient is all that codebook 0 gets."""
    same = {"num_epochs": 1, "semantic_share": 1, "phone_weight": 0, "quantizer_start": 100}
    train(corpus, tmp_path / "none", **same, teacher="none", max_steps=2)
    train(corpus, tmp_path / "taught", **same, teacher=folders["wavlm"], max_steps=2)
    train(corpus, tmp_path / "start", **same, teacher=folders["wavlm"], max_steps=1, gen_lr=0)
    none, taught, start = (
        checkpoints.load_checkpoint(tmp_path / f) for f in ("none", "taught", "start")
    )
    layer = "quantizer.semantic_in.weight"
    moved = (taught.tensors[layer] - start.tensors[layer]).norm()
    assert moved > 10 * (none.tensors[layer] - start.tensors[layer]).norm()


def test_two_teachers_teach_at_once(corpus, folders, tmp_path, capsys):  # noqa: F811
    """Units of both side by side; a run goes on with both alone."""
    both = "--teacher", str(folders["wavlm"]), str(folders["whisper"])
    same = {"num_epochs": 1, "semantic_share": 0.5, "quantizer_start": 1}
    for max_steps in (3, 4):  # stopped, and on
        train(corpus, tmp_path / "both", *both, **same, max_steps=max_steps)
    assert "(wavlm, 3 layers of 32), " in (said := capsys.readouterr().out)
    assert "(whisper, 2 layers of 32), phone labels" in said
    trainer = checkpoints.load_checkpoint(tmp_path / "both").trainer
    assert trainer["teacher"] == "wavlm, 3 layers of 32 + whisper, 2 layers of 32"
    assert trainer["units"]["centres"].shape[1] == 64
    capsys.readouterr()  # the bars of the teachers that were loaded
    line = refused(corpus, tmp_path / "both", capsys, **same, teacher="none")
    assert "this run's teacher is wavlm, 3 layers of 32 + whisper" in line


def test_a_teacher_out_of_reach_ends_in_one_line(corpus, tmp_path, capsys):  # noqa: F811
    line = refused(corpus, tmp_path / "run", capsys, teacher=tmp_path / "nothing")
    assert "no such folder" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["wavlm", "whisper"])
def test_a_step_with_a_teacher_waits_nowhere(corpus, folders, kind, tmp_path):  # noqa: F811
    """Nor does it draw: the teacher runs within what a CUDA graph may hold."""
    steps = launches_of_steps(corpus, tmp_path, teacher=folders[kind])
    waits = [launches.waits for launches in steps]
    assert waits[1:2] + waits[3:] == [0] * 6, [launches.reads for launches in steps]
