"""The dialogue LM's trainer: interrupted runs against uninterrupted ones, labels, refusals."""

import argparse
import contextlib
import functools
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

import codec as codec_module
import command
import train_s2s
import training
from codec import Codec, CodecConfig
from s2s import IGNORE, PAD, S2S, S2SConfig

pytest.importorskip("datasets", reason="code datasets: pip install datasets")

from make_conversations import save_code_dataset  # noqa: E402

ROOT = Path(__file__).parent.parent
FRAMES = 150
TEXTS = {
    "english": ("how are you", "fine thank you"),
    "hindi": ("आप कैसे हैं", "मैं ठीक हूँ"),
    "telugu": ("మీరు ఎలా ఉన్నారు", "నేను బాగున్నాను"),
}
# Four steps of two windows of 1.2 s an epoch; codes are learnt from the third step on.
SMALL = {
    "preset": "tiny",
    "device": "cpu",
    "batch_size": 2,
    "window_seconds": 1.2,
    "epoch_hours": 4 * 2 * 1.2 / 3600,
    "num_epochs": 2,
    "num_workers": 0,
    "threads": 1,
    "warmup_steps": 2,
    "listen_share": 0.25,
    "save_every_epochs": 1,
    "log_every": 1,
}


def make_codec(folder: Path, seed: int) -> Codec:
    torch.manual_seed(seed)
    config = CodecConfig(
        front_dim=16, encoder_dim=16, semantic_width=16, decoder_front_dim=16,
        decoder_front_blocks=1, decoder_dim=16, num_heads=2, context=6, semantic_dim=8,
        acoustic_dim=8, codebook_sizes=(16,) * 8,
    )  # fmt: skip
    model = Codec(config)
    training.save_export(folder, 1, codec_module.stored_config(config), model.export_tensors())
    return Codec.from_checkpoint(folder)


def conversation(index: int, language: str, split: str) -> dict:
    rng = np.random.default_rng(index)
    question, answer = TEXTS[language]
    words = answer.split()
    return {
        "id": f"{language}-{index}-{split}",
        "language": language,
        "source": "scripted",
        "split": split,
        "agent_codes": rng.integers(0, 16, (FRAMES, 8)).astype(np.uint16),
        "user_codes": rng.integers(0, 16, (FRAMES, 8)).astype(np.uint16),
        "turns": [
            {
                "who": "user", "start": 0.2, "end": 1.0, "text": question, "emotion": "sad",
                "phones": [["a", 0.2, 0.6], ["i", 0.6, 1.0]], "words": None,
            },
            {
                "who": "agent", "start": 1.2, "end": 2.2, "text": answer, "emotion": "calm",
                "phones": None,
                "words": [[w, 1.2 + 0.3 * i, 1.4 + 0.3 * i] for i, w in enumerate(words)],
            },
        ],
    }  # fmt: skip


def make_dataset(folder: Path, codec: Codec, rows=None) -> Path:
    if rows is None:
        rows = [conversation(i, lang, "train") for i in range(3) for lang in TEXTS]
        rows += [conversation(9, language, "validation") for language in TEXTS]
    info = {
        "codec_fingerprint": codec.fingerprint,
        "frame_rate": 50.0,
        "codebook_sizes": list(codec.config.codebook_sizes),
    }
    save_code_dataset(folder, rows, info)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A codec and conversations encoded with it, another codec and its own."""
    base = tmp_path_factory.mktemp("world")
    for name, seed in (("mine", 0), ("other", 1)):
        make_dataset(base / name / "data", make_codec(base / name / "codec", seed))
    return base


def flags(world, folder, *switches, data="mine/data", codec="mine/codec", **changes) -> list[str]:
    values = {**SMALL, "codec": world / codec, "checkpoint_dir": folder, **changes}
    pairs = [[f"--{name}", str(value)] for name, value in values.items()]
    return ["--data_dirs", str(world / data), *sum(pairs, []), *switches]


def train(world, folder, *switches, **changes) -> None:
    """The script's main, in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_s2s.py", *flags(world, folder, *switches, **changes)])
        try:
            train_s2s.main()
        finally:
            torch.set_num_threads(threads)


def refused(world, folder, capsys, *switches, **changes) -> str:
    """The one line that a run ends in."""
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: train(world, folder, *switches, **changes))
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
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
    """Weights, tokenizer and optimizer, bit for bit."""
    a, b = training.load_checkpoint(one), training.load_checkpoint(other)
    assert (a.step, a.config, a.tokenizer) == (b.step, b.config, b.tokenizer)
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
def whole_run(world, tmp_path_factory):
    """Eight steps without a break; its printed lines."""
    folder = tmp_path_factory.mktemp("whole")
    printed = (folder.parent / "whole_s2s.txt").open("w+")
    with contextlib.redirect_stdout(printed):
        train(world, folder)
    printed.seek(0)
    return folder, printed.read()


# -- runs --------------------------------------------------------------------------------------


def test_a_run_says_what_it_will_do_and_logs_what_it_did(world, whole_run):
    folder, printed = whole_run
    fingerprint = Codec.from_checkpoint(world / "mine" / "codec").fingerprint
    before = printed.split("step 1/")[0]
    for said in ("preset tiny", fingerprint[:16], "conversations", "an epoch is", "8 steps = "):
        assert said in before, said
    rows = metrics(folder)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert ["semantic" in row for row in steps] == [False] * 2 + [True] * 6
    assert all(row["skipped"] == 0 and row["text"] > 0 for row in steps)
    assert steps[-1]["text"] < steps[0]["text"]
    assert [row["step"] for row in rows if "validation_text" in row] == [4, 8]
    config = training.load_checkpoint(folder).config
    assert config["codec_fingerprint"] == fingerprint
    assert config["codebook_sizes"] == [16] * 8 and config["frame_rate"] == 50.0


def test_a_stopped_run_goes_on_as_if_it_had_not(world, whole_run, tmp_path, capsys):
    """Stopped in mid-epoch, while it learnt to listen, and again when it spoke."""
    folder = tmp_path / "run"
    for stop in (1, 6):
        train(world, folder, max_steps=stop)
        assert training.find_checkpoint(folder).name == f"step_{stop:08d}"
    train(world, folder)
    assert "resuming" in capsys.readouterr().out
    assert metrics(folder) == metrics(whole_run[0])
    assert_same_state(folder, whole_run[0])


def test_a_killed_run_goes_on(world, whole_run, tmp_path):
    """SIGKILL in mid-run: the same curve to the last bit."""
    folder = tmp_path / "killed"
    command = [sys.executable, "train_s2s.py", *flags(world, folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
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
    train(world, folder)
    assert metrics(folder) == metrics(whole_run[0])
    assert_same_state(folder, whole_run[0])


def test_exports_and_inherits(world, whole_run, tmp_path, capsys):
    shipped = tmp_path / "shipped"
    train(world, whole_run[0], export=shipped)
    model = S2S.from_checkpoint(shipped)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(f.name for f in shipped.iterdir()) == names
    for text in (text for pair in TEXTS.values() for text in pair):
        assert model.tokenizer.decode(model.tokenizer.encode(text).ids) == text

    train(world, tmp_path / "heir", init_from=shipped, lr=1e-9, max_steps=1)
    assert f"init_from {shipped}: inherited " in capsys.readouterr().out
    heir = training.load_checkpoint(tmp_path / "heir").tensors
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(heir[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_run_ends_with_its_budget_and_its_learning_rate_with_it(
    world, tmp_path, capsys, monkeypatch
):
    """On a clock where a step costs a dollar: first by the estimate, then by what it measures."""
    now, tick = [0.0], training.CostMeter.tick

    def slow(self, steps=1):
        now[0] += 3600
        tick(self, steps)

    monkeypatch.setattr(training.CostMeter, "tick", slow)
    meter = functools.partial(training.CostMeter, clock=lambda: now[0])
    monkeypatch.setattr(training, "CostMeter", meter)
    monkeypatch.setattr(train_s2s, "estimated_hours", lambda *args: args[-1] / 2)
    monkeypatch.chdir(tmp_path)
    changes = {"num_epochs": 10, "budget_usd": 12, "usd_per_hour": 1}  # 40 steps, thought $20
    train(world, tmp_path / "run", **changes)
    said = capsys.readouterr().out
    assert "budget $12: 24 of 40 steps" in said
    rows = [row for row in metrics(tmp_path / "run") if "lr" in row]
    last = rows[-1]["step"]
    assert 8 <= last <= 12 and f"{last} of 24 steps" in said, said
    assert training.load_checkpoint(tmp_path / "run").trainer["total_steps"] == last
    assert rows[-1]["lr"] < 0.2 * max(row["lr"] for row in rows)
    train(world, tmp_path / "run", **changes)  # pasted again: there is no more
    assert training.find_checkpoint(tmp_path / "run").name == f"step_{last:08d}"


def test_a_tokenizer_goes_on_where_it_can_spell_the_new_texts(world, whole_run, tmp_path, capsys):
    train(world, whole_run[0], export=tmp_path)
    theirs = S2S.from_checkpoint(tmp_path).tokenizer.get_vocab()
    tokenizer, same = train_s2s.starting_tokenizer(["you are fine"], 300, str(tmp_path))
    assert same and tokenizer.get_vocab() == theirs
    tokenizer, same = train_s2s.starting_tokenizer(["fine", "¿qué?"], 300, str(tmp_path))
    assert not same and "cannot spell '¿qué?'" in capsys.readouterr().out
    assert tokenizer.decode(tokenizer.encode("¿qué?").ids) == "¿qué?"


# -- refusals ----------------------------------------------------------------------------------


def test_codes_of_another_codec_are_refused(world, whole_run, tmp_path, capsys):
    prints = {n: Codec.from_checkpoint(world / n / "codec").fingerprint for n in ("mine", "other")}
    assert prints["mine"] != prints["other"]
    line = refused(world, tmp_path / "a", capsys, codec="other/codec")
    assert all(p[:16] in line for p in prints.values())
    assert not (tmp_path / "a").exists()
    line = refused(world, whole_run[0], capsys, data="other/data", codec="other/codec")
    assert all(p[:16] in line for p in prints.values())


def test_bad_input_ends_in_one_line(world, whole_run, tmp_path, capsys):
    new = tmp_path / "new"
    codec = Codec.from_checkpoint(world / "mine" / "codec")
    assert "no code dataset" in refused(world, new, capsys, data="nowhere")
    assert "not a complete" in refused(world, new, capsys, data="mine")
    make_dataset(world / "mine" / "empty", codec, rows=[])
    assert "no conversations" in refused(world, new, capsys, data="mine/empty")
    held_out = [conversation(0, "english", "validation")]
    make_dataset(world / "mine" / "held_out", codec, held_out)
    assert "no conversations" in refused(world, new, capsys, data="mine/held_out")
    assert "not a codec" in refused(world, new, capsys, codec=whole_run[0])
    assert "nowhere" in refused(world, new, capsys, codec="nowhere")
    assert "not empty" in refused(world, whole_run[0], capsys, "--fresh")
    assert "no tensor fits" in refused(world, new, capsys, init_from=world / "mine" / "codec")

    other = tmp_path / "other"
    tensors = {"x": torch.zeros(2)}
    training.save_checkpoint(other, 3, {"model": "codec"}, tensors, {"step": 3})
    assert "another model" in refused(world, other, capsys)


# -- what the LM reads -------------------------------------------------------------------------


def reader(window_seconds=3.0, **changes) -> train_s2s.Conversations:
    texts = [text for pair in TEXTS.values() for text in pair]
    config = S2SConfig(
        codebook_sizes=(16,) * 8, vocab_size=200, phones=("_", "a", "i"), listen_delay=1, **changes
    )
    args = argparse.Namespace(
        seed=0, window_seconds=window_seconds, emotion_drop=0.0, language_drop=0.0
    )
    rows = [conversation(i, language, "train") for i, language in enumerate(TEXTS)]
    tokenizer = train_s2s.train_tokenizer(texts, 200)
    return train_s2s.Conversations(rows, config, tokenizer, args, 100)


def test_words_are_encoded_alone_as_in_the_sentence():
    tokenizer = reader().tokenizer
    assert tokenizer.token_to_id("<pad>") == PAD
    for text in (text for pair in TEXTS.values() for text in pair):
        words = text.split()
        parts = [w if i == 0 else f" {w}" for i, w in enumerate(words)]
        alone = [token for part in parts for token in tokenizer.encode(part).ids]
        assert alone == tokenizer.encode(text).ids
        assert tokenizer.decode(alone) == text and PAD not in alone


def test_words_without_times_lie_at_the_start_of_their_turn():
    """The user's, 0.2 to 1.0 s, with the patch by which the head is late; not where too many."""
    conversations = reader()
    row = conversations.rows[0]
    whole = conversations.whole(row)
    at = torch.arange(75)
    assert torch.equal(whole["user_turn"], torch.where((at >= 5) & (at < 26), 1, 0))
    tokens = whole["user_text"][whole["user_text"] != PAD].tolist()
    words = [word.strip("?.,").lower() for word in row["turns"][0]["text"].split()]
    assert conversations.tokenizer.decode(tokens).split() == words
    assert torch.equal(whole["user_text"][5 : 5 + len(tokens)], torch.tensor(tokens))
    assert (whole["user_words"][5:26] == IGNORE).all()
    row["turns"][0]["text"] = " ".join(["word"] * 30)
    assert not conversations.whole(row)["user_turn"].any()


def test_labels_say_what_holds_at_each_patch():
    """User 0.2 to 1.0 s, agent 1.2 to 2.2 s; patches of 40 ms."""
    conversations = reader()
    whole = conversations.whole(conversations.rows[0])
    at = torch.arange(75)
    user = (at >= 5) & (at < 25)
    assert torch.equal(whole["user_speaking"].bool(), user)
    assert torch.equal(whole["turn_end"].bool(), (at >= 25) & (at < 30))
    assert torch.equal(whole["user_emotion"], torch.where(user, 2, IGNORE))  # sad
    assert torch.equal(whole["language_label"], torch.where(user, 0, IGNORE))
    # Told before the agent speaks, until the end of its turn.
    assert torch.equal(whole["agent_emotion"], torch.where(at < 55, 1 + 7, 0))  # calm
    assert int(whole["language"]) == 1 and int(whole["overflow"]) == 0

    phones = whole["user_phones"].flatten()  # [F], one patch = two frames late
    expected = torch.zeros(FRAMES, dtype=torch.long)
    expected[10:30], expected[30:50] = 1, 2
    assert torch.equal(phones[2:], expected[:-2]) and (phones[:2] == IGNORE).all()

    tokens = conversations.tokenizer.encode("fine thank you").ids
    assert whole["text"][whole["text"] != PAD].tolist() == tokens
    first = int(whole["text"].nonzero()[0])
    assert first == 30  # 1.2 s, by the word's own time
    agent = conversations.rows[0]["agent_codes"].astype(np.int64)
    assert torch.equal(whole["agent_codes"].flatten(0, 1), torch.from_numpy(agent))


def test_unknown_words_and_phones_are_not_labelled():
    conversations = reader()
    row = conversation(0, "english", "train")
    row["turns"][0].update(phones=None, emotion=None)
    row["turns"][1].update(words=None, emotion=None)
    row["language"] = "other"
    whole = conversations.whole(row)
    assert (whole["user_emotion"] == IGNORE).all() and (whole["agent_emotion"] == 0).all()
    assert (whole["language_label"] == IGNORE).all() and int(whole["language"]) == 0
    phones = whole["user_phones"].flatten()
    assert (phones[12:52] == IGNORE).all() and (phones[52:] == 0).all()
    assert (whole["text"] != PAD).sum() > 0


def test_an_interrupted_agent_owes_no_answer():
    conversations = reader()
    row = conversation(0, "english", "train")
    row["turns"][1]["start"] = 0.8  # the agent begins before the user has finished
    assert conversations.whole(row)["turn_end"].sum() == 0
    row["turns"].pop()
    assert conversations.whole(row)["turn_end"].sum() == 0


def test_acoustic_levels_are_delayed():
    conversations = reader(acoustic_delay=1)
    row = conversations.rows[0]
    agent = torch.from_numpy(row["agent_codes"].astype(np.int64))
    frames = conversations.whole(row)["agent_codes"].flatten(0, 1)
    assert torch.equal(frames[:, 0], agent[:, 0])
    assert torch.equal(frames[1:, 1:], agent[:-1, 1:]) and (frames[0, 1:] == IGNORE).all()


def test_windows_are_parts_of_the_whole_or_padded():
    conversations = reader(window_seconds=1.2)
    row = conversations.rows[1]
    whole, firsts = conversations.whole(row), set()
    for place in (0.0, 0.3, 0.999):
        window = conversations.window(row, place)
        first = int(place * (75 - 30 + 1))
        firsts.add(first)
        for name in ("user_codes", "agent_codes", "text", "user_speaking", "user_phones"):
            assert torch.equal(window[name], whole[name][first : first + 30]), name
        assert window["valid"].all()
    assert firsts == {0, 13, 45}

    window = reader(window_seconds=4.0).window(row, 0.5)
    assert window["valid"].tolist() == [True] * 75 + [False] * 25
    assert (window["user_codes"][75:] == IGNORE).all() and (window["text"][75:] == PAD).all()
    assert (window["user_speaking"][75:] == IGNORE).all()


def test_draws_depend_on_seed_epoch_and_index_alone():
    one, two = reader(window_seconds=1.2), reader(window_seconds=1.2)
    for key in ((0, 3), (1, 3), (1, 9)):
        a, b = one[key], two[key]
        assert all(torch.equal(a[name], b[name]) for name in a)
    drawn = torch.stack([one[(0, i)]["user_codes"] for i in range(8)])
    assert len(torch.unique(drawn, dim=0)) > 4


def test_short_conversations_train_too(world, tmp_path):
    """Nothing but windows longer than their conversations, and turns without text."""
    rows = [conversation(i, "english", "train") for i in range(4)]
    for row in rows:
        row["agent_codes"], row["user_codes"] = row["agent_codes"][:45], row["user_codes"][:45]
        row["turns"] = row["turns"][:1]
    codec = Codec.from_checkpoint(world / "mine" / "codec")
    make_dataset(world / "mine" / "short", codec, rows)
    folder = tmp_path / "run"
    train(
        world, folder, data="mine/short", max_steps=3, listen_share=0, epoch_hours=1, num_epochs=4
    )
    rows = [row for row in metrics(folder) if "loss" in row]
    assert len(rows) == 3 and all(row["loss"] is not None for row in rows)
    assert rows[-1]["skipped"] == 0


WRONG = [
    "--batch_size 0", "--num_epochs 0", "--lr -1", "--num_workers -1", "--epoch_hours inf",
    "--window_seconds 0", "--frames_per_step 3", "--acoustic_delay -1", "--vocab_size 0",
    "--listen_share 2", "--depth_fraction -1", "--text_weight 0", "--acoustic_drop nan",
    "--agent_deaf 1.01", "--warmup_steps -1", "--budget_usd nan", "--log_every 0",
]  # fmt: skip


def test_flags_out_of_range_are_told_before_anything_is_loaded(capsys):
    for wrong in WRONG:
        with pytest.raises(SystemExit) as stop:
            train_s2s.parse_args(wrong.split())
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and shown.count("\n") == 1 and wrong.split()[0] in shown, wrong
