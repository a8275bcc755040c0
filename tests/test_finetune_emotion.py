"""Phase 4's trainer: the emotion branch, resumed against uninterrupted runs, refusals."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_corpora import ROWS, hub_rows, parquet, rasa_rows
from test_fetching import coded, dies_at, killed
from test_train_s2s import (
    ROOT,
    SMALL,
    conversation,
    environment,
    last,
    make_codec,
    make_dataset,
    small_models,
)

import checkpoints
import download_data
import emotions
import finetune_emotion
import train_s2s
from command import UserError
from s2s import S2S, EmotionBranch, S2SConfig, Sampling

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
    with small_models():
        run(train_s2s, root / "lm", **flags, max_steps=2)
    return root


@pytest.fixture(scope="module")
def once(world):
    """The folder of an uninterrupted run."""
    run(finetune_emotion, world / "once", **flags(world))
    return world / "once"


def words_of(folder, **flags) -> list[str]:
    pairs = [[f"--{name}", str(value)] for name, value in flags.items()]
    return ["--checkpoint_dir", str(folder), *sum(pairs, [])]


def run(script, folder, *switches, **flags) -> None:
    before, sys.argv = sys.argv, [script.__name__, *switches, *words_of(folder, **flags)]
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


@pytest.mark.parametrize("strength", [None, 1.0, 2.5])
def test_the_emotion_given_is_the_one_spoken_in(strength):
    """The likeliest codes, step by step, are the teacher-forced ones; guided, those of the logits
    without + strength · (with − without), here by one pass each."""
    torch.manual_seed(0)
    model = S2S(small_config()).eval()
    model.emotion.codebooks.normal_()
    for weight in (model.depth_emotion.weight, model.emotion_embedding.weight):
        torch.nn.init.normal_(weight, std=2.0)
    user, emotion = torch.randint(16, (2, 12, 4, 2)), torch.tensor([3, 5])
    how = {"strength": None if strength is None else torch.full((2,), strength)}
    state = model.init_state(2 if strength is None else 4)
    likeliest = Sampling(temperature=0, text_temperature=0)
    outs = [model.step(user[:, i], state, emotion=emotion, sampling=likeliest, **how)
            for i in range(12)]  # fmt: skip
    text, said = torch.stack([out.text for out in outs], dim=1), emotion[:, None].expand(-1, 12)
    codes = torch.stack([out.agent_codes for out in outs], dim=1).transpose(2, 3)
    batch = types.SimpleNamespace(
        text=text, agent_past=codes, user_codes=user.transpose(2, 3), language=torch.zeros(2).long()
    )
    found = []
    for given in (said, torch.zeros_like(said)):
        batch.agent_emotion = given
        recognised = model.emotion(batch.user_codes)[0]
        hidden = model.hidden(batch, recognised).flatten(0, 1)
        rows = text.flatten(), codes.flatten(0, 1), given.flatten()
        found.append([s for step in model.depth_logits(hidden, *rows) for s in step])
    for step, places in enumerate(itertools.chain(*model.schedule)):
        (frame, level), (given, free) = places, (found[0][step], found[1][step])
        logits = free + (strength or 1.0) * (given - free)
        assert (logits.argmax(-1).view(2, 12) == codes[:, :, frame, level]).all()
        if strength and level:
            assert (given.argmax(-1) != free.argmax(-1)).any()


def test_resumed_equals_uninterrupted(world, once, tmp_path, capsys):
    run(finetune_emotion, tmp_path / "twice", **flags(world, max_steps=3))
    run(finetune_emotion, tmp_path / "twice", **flags(world))
    rows_once, twice = rows(once), rows(tmp_path / "twice")
    assert len(twice) == 8 and rows_once == twice
    # First the branch alone; then all.
    assert "text" not in twice[2] and "text" in twice[3]
    told = capsys.readouterr().out
    assert "neutral 8, happy 8, sad 8" in told and "4 speakers" in told
    assert "resuming" in told
    model = S2S.from_checkpoint(tmp_path / "twice")
    assert model.config.emotion_dim == 16 and model.emotion.codebooks.any()


def test_no_conversation_is_read_that_no_step_uses(world, once, tmp_path, monkeypatch):
    read = []
    own = finetune_emotion.EmotionalConversations.__getitem__
    item = lambda self, key: read.append(key) or own(self, key)  # noqa: E731
    monkeypatch.setattr(finetune_emotion.EmotionalConversations, "__getitem__", item)
    run(finetune_emotion, tmp_path / "run", **flags(world))
    # One that stands for the others, two to time a step with, then those of five of eight steps.
    used = [(0, 6), (0, 7), *((1, i) for i in range(8))]
    assert read == [(0, 0), (0, 0), (0, 1), *used] and rows(tmp_path / "run") == rows(once)
    read.clear()
    monkeypatch.chdir(tmp_path)  # for the ledger
    run(finetune_emotion, tmp_path / "paid", **flags(world, budget_usd=9, max_steps=1))
    assert read[3:] == [(0, 0), (0, 1)]  # the phase may be moved


def test_what_the_inherited_tokenizer_cannot_spell_is_told(world, tmp_path, capsys):
    strange = conversation(0, "english", "train")
    strange["turns"][1]["text"] = "¿fine?"
    made = [strange, strange | {"id": "b"}, conversation(1, "hindi", "train")]
    make_dataset(tmp_path / "data", train_s2s.Codec.from_checkpoint(world / "codec"), made)
    run(finetune_emotion, tmp_path / "run",
        **flags(world, conversations=tmp_path / "data", max_steps=1))  # fmt: skip
    told = "1 different turns hold what the inherited tokenizer cannot spell, learnt as <unk>"
    assert f"{told}; first: '¿fine?'\n" in capsys.readouterr().out


def test_columns_of_turns_are_what_their_rows_say(world):
    part = train_s2s.load_code_dataset(world / "conversations")[0]
    chosen = part.select([3, 0, 7])
    found = [(int(i), who, text) for columns in train_s2s.turn_fields(chosen, "who", "text")
             for i, who, text in zip(*columns, strict=True)]  # fmt: skip
    assert found == [
        (i, turn["who"], turn["text"]) for i in range(3) for turn in chosen[i]["turns"]
    ]
    shown, plain = finetune_emotion.emotional_rows(chosen)
    assert {name: list(at) for name, at in shown.items()} == {"sad": [0, 1, 2]} and not len(plain)


def test_from_the_download_to_the_first_step(world, tmp_path, monkeypatch, capsys):
    """Rasa and CREMA-D as the Hub has them, and EmoV-DB as its owners ship it beside them."""
    words = ["--data_dir", str(tmp_path / "data"), "--mirror"]
    shards = {
        "rasa-telugu": ("Telugu/train-00000-of-00001", rasa_rows()),
        "rasa-hindi": ("Hindi/train-00000-of-00001", rasa_rows("M", language="HIN")),
        "crema-d": ("data/train-00000-of-00001", hub_rows(ROWS["crema-d"])),
    }
    for name, (shard, found) in shards.items():
        file = tmp_path / "hub" / f"{shard}.parquet"
        file.parent.mkdir(parents=True)
        file.write_bytes(parquet(found))
        words.append(f"{name}={tmp_path / 'hub'}")
    monkeypatch.setattr(sys, "argv", ["download_data.py", "--corpora", *shards, *words])
    assert download_data.main() == 1  # CREMA-D's hours are known, and these are not all of them
    for speaker in ("bea", "sam"):
        folder = tmp_path / f"data/emotion/EmoV-DB/{speaker}_Amused"
        folder.mkdir(parents=True)
        (folder / "amused_1-15_0001.wav").write_bytes(coded(".wav"))
    capsys.readouterr()
    speech = {"data_dirs": tmp_path / "data/emotion"}
    run(finetune_emotion, tmp_path / "run", **flags(world, **speech, max_steps=1))
    told = capsys.readouterr().out
    assert "speech: 35 clips, 0.0 h, 8 speakers; neutral 11, happy 5, sad 4, angry 5" in told
    assert "telugu: 1 speakers to learn from, 1 held out\n" in told
    assert "hindi: 1 speakers to learn from, 0 held out: no figure tells how" in told
    commercial = flags(world, **speech, max_steps=1)
    run(finetune_emotion, tmp_path / "sold", "--commercial_only", **commercial)
    assert "speech: 33 clips, 0.0 h, 6 speakers" in capsys.readouterr().out


def test_the_language_model_is_frozen_first(world, tmp_path):
    run(finetune_emotion, tmp_path / "run", **flags(world, max_steps=2, save_every_epochs=1))
    before = S2S.from_checkpoint(world / "lm").state_dict()
    after = S2S.from_checkpoint(tmp_path / "run").state_dict()
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert after["emotion.head.weight"].any()


def test_exported_and_inherited_again(world, tmp_path):
    run(finetune_emotion, tmp_path / "run", **flags(world, max_steps=4))
    run(finetune_emotion, tmp_path / "run", export=tmp_path / "shipped")
    for name, asked, dim in (("more", "speech_weight=1", 16), ("wider", "emotion_dim=32", 32)):
        again = flags(world, init_from=tmp_path / "shipped", max_steps=1, set=asked)
        run(finetune_emotion, tmp_path / name, **again)
        assert S2S.from_checkpoint(tmp_path / name).config.emotion_dim == dim


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


def killed_runs(world: Path, folder: Path) -> None:
    """The same line again and again: killed in the middle of encoding speech, in both phases and in
    mid-save, then run to its end. In a process that has not used torch: it forks."""
    emotions.PART_CLIPS = 4
    codes = lambda: sorted(file.name for file in folder.glob("codes_train_*/*"))  # noqa: E731

    def killed_at(module, name: str, call: int) -> None:
        def action() -> None:
            dies_at(module, name, call)
            run(finetune_emotion, folder, **flags(world))

        killed(action)

    killed_at(emotions.audio, "read_audio", 15)
    parts = [name for name in codes() if name.endswith(".arrow")]
    assert 0 < len(parts) < 4 and "state.json" not in codes()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("codes_train_*/data-*.arrow")}
    # Twice for each phase ahead before the first step.
    killed_at(finetune_emotion, "speech_losses", 4 + 2)
    assert "state.json" in codes() and not list(folder.glob("step_*"))
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    killed_at(finetune_emotion, "speech_losses", 4 + 6)
    assert [step.name for step in folder.glob("step_*")] == ["step_00000004"]
    killed_at(checkpoints, "_publish", 1)
    assert [step.name for step in folder.glob("step_*")] == ["step_00000004"]
    run(finetune_emotion, folder, **flags(world))


def test_killed_at_any_moment_the_same_line_goes_on(world, once, tmp_path):
    words = ["-m", "test_finetune_emotion", "killed", str(world), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), timeout=300,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows(tmp_path / "run") == rows(once)


def test_two_ranks_learn_what_one_process_does(world, tmp_path):
    """torchrun on two gloo ranks, each half of the batch, in both phases, against the joint one.
    Without dropout, which each rank draws for itself."""
    same = {"num_epochs": 1, "warmup_steps": 0, "lr": 1e-3}
    words = ["ranks", *words_of(tmp_path / "two", **flags(world, **same))]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [sys.executable, "-m", *launcher, "test_finetune_emotion", *words]
    two = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", lambda x, *_: x)
        run(finetune_emotion, tmp_path / "one", **flags(world, **same))
    told = two.communicate(timeout=300)[1]
    assert two.returncode == 0, told[-2000:]
    one, both, start = last(tmp_path / "one"), last(tmp_path / "two"), last(world / "lm")
    for names, before in (
        ([name for name in start.tensors if "emotion" not in name], start.tensors),
        (["emotion.head.weight"], {"emotion.head.weight": torch.zeros(1)}),
    ):
        moved = sum(float((one.tensors[n] - before[n]).float().norm()) for n in names)
        apart = sum(float((one.tensors[n] - both.tensors[n]).float().norm()) for n in names)
        assert moved > 0 and apart < 0.02 * moved, (apart, moved)


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed_runs(*map(Path, sys.argv[2:]))
    else:
        torch.nn.functional.dropout = lambda x, *_: x
        sys.argv[1:] = sys.argv[2:]
        finetune_emotion.main()
