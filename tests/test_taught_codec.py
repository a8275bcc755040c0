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
    assert all(0 < row["distillation"] < 2 for row in rows)
    assert rows[-1]["distillation"] < rows[0]["distillation"]
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
    assert trainer["projection"]["weight"].shape == (32, 16)

    # Nothing of the teacher is in what ships.
    shipped = checkpoints.load_checkpoint(whole).tensors
    assert shipped.keys() == Codec(Codec.from_checkpoint(whole).config).state_dict().keys()
    capsys.readouterr()  # the bars of the teachers that were loaded
    other = {**same, "teacher": "none"}
    assert "give the same --teacher" in refused(corpus, parts, capsys, **other)


def test_the_projection_learns_and_codebook_0_with_it(corpus, folders, tmp_path):  # noqa: F811
    """The teacher's gradient reaches both; without phones it is all that codebook 0 gets."""
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
    weights = [c.trainer["projection"]["weight"] for c in (taught, start)]
    assert not torch.equal(*weights)


def test_a_teacher_out_of_reach_ends_in_one_line(corpus, tmp_path, capsys):  # noqa: F811
    line = refused(corpus, tmp_path / "run", capsys, teacher=tmp_path / "nothing")
    assert "no such folder" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["wavlm", "whisper"])
def test_a_step_with_a_teacher_waits_nowhere(corpus, folders, kind, tmp_path):  # noqa: F811
    """Nor does it draw: the teacher runs within what a CUDA graph may hold."""
    steps = launches_of_steps(corpus, tmp_path, teacher=folders[kind])
    waits = [launches.waits for launches in steps]
    assert waits[1:2] + waits[3:] == [0] * 6, [launches.reads for launches in steps]
