"""Phase 4's trainer: the emotion branch, resumed against uninterrupted runs, refusals."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from test_train_s2s import SMALL, make_codec, make_dataset

import finetune_emotion
import train_s2s
from command import UserError
from s2s import S2S, EmotionBranch, S2SConfig

EMOTIONS = ("neutral", "happy", "sad")
SPEAKERS = ("ann", "bob", "eve", "raj")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A codec, conversations, a dialogue LM trained for two steps, and emotional speech."""
    root = tmp_path_factory.mktemp("emotion")
    codec = make_codec(root / "codec", 0)
    make_dataset(root / "conversations", codec)
    speech, rng = root / "speech", np.random.default_rng(0)
    speech.mkdir()
    lines = []
    for speaker in SPEAKERS:
        for i in range(6):
            emotion, name = EMOTIONS[i % 3], f"{speaker}_{i}.wav"
            loud = {"neutral": 0.1, "happy": 0.3, "sad": 0.03}[emotion]
            soundfile.write(speech / name, loud * rng.standard_normal(12_000), 24_000)
            lines.append({
                "path": name, "duration": 0.5, "sample_rate": 24_000, "language": "hindi",
                "speaker": speaker, "emotion": emotion, "license": "mine", "commercial_ok": True,
                "split": "validation" if speaker == "raj" else "train",
            })  # fmt: skip
    (speech / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = SMALL | {"data_dirs": root / "conversations", "codec": root / "codec"}
    run(train_s2s, root / "lm", **flags, max_steps=2)
    return root


def run(script, folder, *switches, **flags) -> None:
    words = [script.__name__, "--checkpoint_dir", str(folder), *switches]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    before, sys.argv = sys.argv, words
    try:
        script.main()
    finally:
        sys.argv = before


def flags(world, **changes) -> dict:
    taken = ("preset", "device", "batch_size", "epoch_hours", "num_epochs", "num_workers",
             "threads", "warmup_steps", "save_every_epochs", "log_every")  # fmt: skip
    return {
        **{name: SMALL[name] for name in taken},
        "data_dirs": world / "speech", "conversations": world / "conversations",
        "codec": world / "codec", "init_from": world / "lm", "set": "emotion_dim=16", **changes,
    }  # fmt: skip


def rows(folder) -> list[dict]:
    """The metrics of training steps, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("audio_seconds_per_second", "data_wait", "dollars")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "loss" in line]


def small_config(**changes) -> S2SConfig:
    sizes = {"codebook_sizes": (16,) * 4, "codebook_dim": 8, "emotion_dim": 16, "dim": 32,
             "num_layers": 1, "num_heads": 2, "context": 8, "depth_dim": 16, "depth_heads": 2,
             "depth_layers": 1, "code_dim": 8, "vocab_size": 16}  # fmt: skip
    return S2SConfig(**{**sizes, **changes})


def test_the_branch_streams_as_it_reads_offline():
    torch.manual_seed(0)
    branch = EmotionBranch(small_config()).eval()
    branch.codebooks.normal_()
    codes = torch.randint(-1, 16, (3, 20, 2, 4))
    offline, _ = branch(codes)
    state = branch.init_state(3)
    streamed = torch.cat([branch(codes[:, i : i + 1], state)[0] for i in range(20)], dim=1)
    torch.testing.assert_close(streamed, offline, atol=1e-5, rtol=1e-5)


def test_a_slot_that_rests_keeps_its_state_and_a_reset_forgets_it():
    torch.manual_seed(0)
    model = S2S(small_config()).eval()
    model.emotion.codebooks.normal_()
    codes = torch.randint(16, (2, 6, 4, 2))
    state = model.init_state(2)
    for i in range(3):
        model.step(codes[:, i], state)
    before = [tensor.clone() for tensor in state.emotion]
    model.step(codes[:, 3], state, active=torch.tensor([True, False]))
    for old, new in zip(before, state.emotion, strict=True):
        assert (old[1] == new[1]).all() and not (old[0] == new[0]).all()
    state.reset(torch.tensor([True, False]))
    for old, new in zip(before, state.emotion, strict=True):
        assert (old[1] == new[1]).all() and not new[0].any()


def test_a_new_branch_changes_nothing_that_the_model_says():
    torch.manual_seed(0)
    plain = S2S(small_config(emotion_dim=0)).eval()
    taught = S2S(small_config()).eval()
    taught.load_state_dict(plain.state_dict(), strict=False)
    codes = torch.randint(16, (1, 10, 4, 2))
    states = plain.init_state(1, seed=3), taught.init_state(1, seed=3)
    for i in range(10):
        one, two = (m.step(codes[:, i], s) for m, s in zip((plain, taught), states, strict=True))
        assert (one.agent_codes == two.agent_codes).all() and (one.text == two.text).all()


def test_resumed_equals_uninterrupted(world, tmp_path, capsys):
    run(finetune_emotion, tmp_path / "once", **flags(world))
    run(finetune_emotion, tmp_path / "twice", **flags(world, max_steps=3))
    run(finetune_emotion, tmp_path / "twice", **flags(world))
    once, twice = rows(tmp_path / "once"), rows(tmp_path / "twice")
    assert len(once) == 8 and once == twice
    # First the branch alone; then all.
    assert "text" not in once[2] and "text" in once[3]
    told = capsys.readouterr().out
    assert "neutral 8, happy 8, sad 8" in told and "4 speakers" in told
    assert "resuming" in told
    model = S2S.from_checkpoint(tmp_path / "twice")
    assert model.config.emotion_dim == 16 and model.emotion.codebooks.any()


def test_the_language_model_is_frozen_first(world, tmp_path):
    run(finetune_emotion, tmp_path / "run", **flags(world, max_steps=2, save_every_epochs=1))
    before = S2S.from_checkpoint(world / "lm").state_dict()
    after = S2S.from_checkpoint(tmp_path / "run").state_dict()
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert after["emotion.head.weight"].any()


def test_exported_and_inherited_again(world, tmp_path):
    run(finetune_emotion, tmp_path / "run", **flags(world, max_steps=4))
    run(finetune_emotion, tmp_path / "run", export=tmp_path / "shipped")
    again = flags(world, init_from=tmp_path / "shipped", max_steps=1, set="emotion_dim=32")
    run(finetune_emotion, tmp_path / "more", **again)
    assert S2S.from_checkpoint(tmp_path / "more").config.emotion_dim == 16  # theirs stays


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"init_from": None}, "--init_from"),
        ({"data_dirs": "nowhere"}, "no such folder"),
        ({"codec": "other"}, "codec"),
        ({"conversations": "nowhere"}, "code dataset"),
    ],
    ids=["no model", "no speech", "another codec", "no conversations"],
)
def test_refusals_are_one_line_and_leave_nothing(world, tmp_path, changes, said):
    make_codec(tmp_path / "other", 1)
    taken = {n: v for n, v in flags(world, **changes).items() if v is not None}
    for name, value in changes.items():
        if value is not None:
            taken[name] = tmp_path / value
    with pytest.raises(UserError, match=said) as caught:
        run(finetune_emotion, tmp_path / "run", **taken)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
