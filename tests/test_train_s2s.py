"""The dialogue LM's trainer: interrupted runs against uninterrupted ones, labels, refusals."""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import backbone as backbones
import checkpoints
import command
import train_s2s
import training
from codec import Codec, CodecConfig
from s2s import IGNORE, PAD, S2S, S2SConfig

pytest.importorskip("datasets", reason="code datasets: pip install datasets")

from dialogues import ANY_EMOTION, finish_dataset, write_arrow  # noqa: E402
from tools.launches import counting  # noqa: E402

ROOT = Path(__file__).parent.parent
FRAMES = 150
TEXTS = {
    "english": ("how are you", "fine thank you"),
    "hindi": ("आप कैसे हैं", "मैं ठीक हूँ"),
    "telugu": ("మీరు ఎలా ఉన్నారు", "నేను బాగున్నాను"),
}
# Four steps of two windows of 1.2 s an epoch; codes are learnt from the third step on.
SETTINGS = train_s2s.Settings()
SMALL = {
    "preset": "tiny",
    "device": "cpu",
    "batch_size": 2,
    "window_seconds": 1.2,
    "context_seconds": 0.8,
    "epoch_hours": 4 * 2 * 1.2 / 3600,
    "num_epochs": 2,
    "num_workers": 0,
    "threads": 1,
    "warmup_steps": 2,
    "asr_share": 0.25,
    "save_every_epochs": 1,
    "log_every": 1,
}


# What `tiny` is here, in this process and in those that a test starts.
TINY = {"dim": 64, "num_layers": 2, "num_heads": 2, "depth_dim": 32, "depth_layers": 1,
        "depth_heads": 2, "code_dim": 16}  # fmt: skip


def make_codec(folder: Path, seed: int) -> Codec:
    torch.manual_seed(seed)
    config = CodecConfig(
        front_dim=16, encoder_dim=16, semantic_width=16, decoder_front_dim=16,
        decoder_front_blocks=1, decoder_dim=16, num_heads=2, context=6, semantic_dim=8,
        acoustic_dim=8, codebook_sizes=(16,) * 8,
    )  # fmt: skip
    model = Codec(config)
    stored = checkpoints.stored_config("codec", config)
    checkpoints.save_export(folder, 1, stored, model.export_tensors())
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
    folder.mkdir(parents=True, exist_ok=True)
    write_arrow(folder / "data-00000.arrow", rows)
    finish_dataset(folder, ["data-00000.arrow"], info)
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


@contextlib.contextmanager
def small_models(**changes):
    """Within, `S2SConfig.tiny` is far smaller."""
    tiny = S2SConfig.tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S2SConfig, "tiny", lambda **given: tiny(**{**TINY, **changes, **given}))
        yield patch


def train(world, folder, *switches, dropout=0.1, **changes) -> None:
    """The script in this process."""
    threads = torch.get_num_threads()
    with small_models(dropout=dropout) as patch:
        patch.setattr(sys, "argv", ["train_s2s.py", *flags(world, folder, *switches, **changes)])
        try:
            train_s2s.main()
        finally:
            torch.set_num_threads(threads)


def environment(dropout: float = 0.1) -> dict[str, str]:
    """Of `python -m test_train_s2s`, which is the script."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths,
            "TEST_DROPOUT": str(dropout)}  # fmt: skip


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
    a, b = checkpoints.load_checkpoint(one), checkpoints.load_checkpoint(other)
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
    heard = [row["validation_text"] for row in rows if "validation_text" in row]
    assert heard[-1] < heard[0]  # of the same windows; a step's loss is as its windows are
    assert [row["step"] for row in rows if "validation_text" in row] == [4, 8]
    config = checkpoints.load_checkpoint(folder).config
    assert config["codec_fingerprint"] == fingerprint
    assert config["codebook_sizes"] == [16] * 8 and config["frame_rate"] == 50.0


def test_a_stopped_run_goes_on_as_if_it_had_not(world, whole_run, tmp_path, capsys):
    """Stopped in mid-epoch, in its ASR phase, and again when it spoke."""
    folder = tmp_path / "run"
    for stop in (1, 6):
        train(world, folder, max_steps=stop)
        assert checkpoints.find_checkpoint(folder).name == f"step_{stop:08d}"
    train(world, folder)
    assert "resuming" in capsys.readouterr().out
    assert metrics(folder) == metrics(whole_run[0])
    assert_same_state(folder, whole_run[0])


def test_a_killed_run_goes_on(world, whole_run, tmp_path):
    """SIGKILL in mid-run: the same curve to the last bit."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "test_train_s2s", *flags(world, folder)]
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
    heir = checkpoints.load_checkpoint(tmp_path / "heir").tensors
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(heir[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The folder of a random Qwen 3 whose tokenizer is of bytes, with one merge."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("qwen3")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*letters, "ar", "zz"])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("a", "r"), ("z", "z")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(ids), hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_lm_begins_from_a_backbone(world, language_model, tmp_path, capsys):
    """Trained, stopped and resumed, it is what it would have been; exported, it is an LM; another
    begins from it; and a learning rate of zero leaves the backbone as it was."""
    flags = {"backbone": language_model, "backbone_lr": 1e-3}
    train(world, tmp_path / "whole", **flags)
    assert f"backbone: {language_model}" in capsys.readouterr().out
    train(world, tmp_path / "run", max_steps=3, **flags)
    train(world, tmp_path / "run", **flags)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    steps = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert all(row["grad_norm"] > 0 and row["grad_norm_backbone"] > 0 for row in steps)

    train(world, tmp_path / "run", export=tmp_path / "shipped")
    model = S2S.from_checkpoint(tmp_path / "shipped")
    assert model.config.temporal.query_key_norm and model.config.dim == 48
    assert "ar" in model.tokenizer.get_vocab() and "zz" not in model.tokenizer.get_vocab()
    codes = torch.zeros(1, 8, model.config.frames_per_step, dtype=torch.long)
    assert model.step(codes, model.init_state(1)).agent_codes.shape == codes.shape
    train(world, tmp_path / "heir", init_from=tmp_path / "shipped", max_steps=1)
    count = len(model.state_dict())
    assert f"inherited {count} of {count} tensors" in capsys.readouterr().out

    still = {**flags, "backbone_lr": 0, "max_steps": 2}
    train(world, tmp_path / "still", **still)
    given = backbones.load_backbone(str(language_model)).tensors
    kept = checkpoints.load_checkpoint(tmp_path / "still").tensors
    assert all(torch.equal(kept[f"temporal.{name}"], tensor) for name, tensor in given.items())


def test_a_run_from_before_there_were_backbones_has_none(world, whole_run, tmp_path, capsys):
    checkpoint = checkpoints.load_checkpoint(whole_run[0])
    del checkpoint.trainer["flags"]["backbone"]
    stored = checkpoint.config, checkpoint.tensors, checkpoint.trainer, checkpoint.tokenizer
    checkpoints.save_checkpoint(tmp_path / "old", 8, *stored)
    train(world, tmp_path / "old", num_epochs=3, max_steps=9)
    assert "backbone: none" in capsys.readouterr().out
    said = refused(world, tmp_path / "old", capsys, num_epochs=3, backbone="google/gemma-3-1b-pt")
    assert "--backbone google/gemma-3-1b-pt" in said and "--backbone none" in said


def test_a_backbone_that_cannot_be_had_stops_the_run(world, language_model, tmp_path, capsys):
    both = {"backbone": language_model, "init_from": ROOT / "checkpoints" / "tiny" / "s2s"}
    assert "--backbone and --init_from: give one" in refused(world, tmp_path, capsys, **both)
    said = refused(world, tmp_path, capsys, backbone="/no/such")
    assert "--backbone /no/such cannot be had: no such folder; or --backbone none" in said
    args = argparse.Namespace(backbone="auto", preset="base", init_from=None)
    assert train_s2s.chosen_backbone(args, torch.device("cpu"), []) is None
    assert args.backbone == "none"


def test_a_run_ends_with_its_budget_and_its_learning_rate_with_it(
    world, tmp_path, capsys, monkeypatch
):
    """On a clock where a step costs a dollar: first by the estimate, then by what it measures."""
    now, tick = [0.0], training.CostMeter.tick

    def slow(self):
        now[0] += 3600
        tick(self)

    monkeypatch.setattr(training.CostMeter, "tick", slow)
    meter = functools.partial(training.CostMeter, clock=lambda: now[0])
    monkeypatch.setattr(training, "CostMeter", meter)
    monkeypatch.setattr(training.Run, "_seconds", lambda *_: 1800.0)
    monkeypatch.chdir(tmp_path)
    changes = {"num_epochs": 10, "budget_usd": 12, "usd_per_hour": 1}  # 40 steps, thought $20
    train(world, tmp_path / "run", **changes)
    said = capsys.readouterr().out
    assert "budget $12: 23 of 40 steps" in said
    rows = [row for row in metrics(tmp_path / "run") if "lr" in row]
    last = rows[-1]["step"]
    assert 8 <= last <= 12 and f"{last} of 40 steps" in said, said
    assert checkpoints.load_checkpoint(tmp_path / "run").trainer["schedule"]["total"] == last
    assert rows[-1]["lr"] < 0.2 * max(row["lr"] for row in rows)
    train(world, tmp_path / "run", **changes)  # pasted again: there is no more
    assert checkpoints.find_checkpoint(tmp_path / "run").name == f"step_{last:08d}"


def test_a_tokenizer_goes_on_where_it_can_spell_the_new_texts(world, whole_run, tmp_path, capsys):
    train(world, whole_run[0], export=tmp_path)
    theirs = S2S.from_checkpoint(tmp_path).tokenizer.get_vocab()
    checkpoint = checkpoints.load_checkpoint(tmp_path)
    tokenizer, same = train_s2s.starting_tokenizer(["you are fine"], 300, checkpoint)
    assert same and tokenizer.get_vocab() == theirs
    tokenizer, same = train_s2s.starting_tokenizer(["fine", "¿qué?"], 300, checkpoint)
    assert not same and "cannot spell '¿qué?'" in capsys.readouterr().out
    assert tokenizer.decode(tokenizer.encode("¿qué?").ids) == "¿qué?"


def untrained(world) -> tuple[S2S, train_s2s.Conversations, argparse.Namespace]:
    """A tiny LM, the calls that it would be taught, and the flags of `SMALL`."""
    args = train_s2s.parse_args(flags(world, "unused"))
    codec = Codec.from_checkpoint(world / "mine" / "codec")
    (rows, frames), _, _ = train_s2s.load_rows(args.data_dirs, codec.fingerprint)
    tokenizer = train_s2s.train_tokenizer(train_s2s.all_texts(rows), 200)
    with small_models():
        config = train_s2s.new_config(args, SETTINGS, codec, tokenizer)
    near = train_s2s.near_codes([book.embedding for book in codec.quantizer.codebooks])
    torch.manual_seed(0)
    calls = train_s2s.Conversations(rows, frames, config, tokenizer, args, SETTINGS, 100, near)
    return S2S(config), calls, args


def test_a_step_waits_for_the_device_nowhere(world):
    """ASR alone and dialogue, with turns whose words have no times."""
    model, calls, _ = untrained(world)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    guard, device = training.StepGuard(), torch.device("cpu")
    windows = [calls[(0, i)] for i in range(40)]
    windows = [window for window in windows if window["untimed_counts"].any()]
    batch = train_s2s.collate(windows[:4])[0]

    def step(speak):
        loss, _, _ = train_s2s.batch_losses(model, batch.to(device), speak)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = guard.watch(loss, norm)
        optimizer.step()

    for speak in (False, True):
        step(speak)  # the optimizer makes its state
        with counting() as counts:
            step(speak)
        assert counts.waits == 0, counts.reads
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.text_head.bias.grad.fill_(torch.nan)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.found_inf = guard.watch(norm, norm)
    optimizer.step()  # skipped, and nobody has asked
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    guard.settle()
    assert guard.skipped == 1


def test_validation_shows_what_breaks_past_the_context(world, monkeypatch):
    """States past the 20 patches that attention sees, as if their positions were never trained."""
    model, calls, args = untrained(world)
    frames = np.full(len(calls.rows), FRAMES)
    batches = train_s2s.validation_batches(
        calls.rows, frames, model.config, calls.tokenizer, args, SETTINGS, count=1
    )
    assert batches[0].text.shape == (4, 60)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(12):
        loss = train_s2s.batch_losses(model, batches[0], speak=False)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = train_s2s.validate(model, batches, torch.device("cpu"))
    plain = S2S.hidden

    def broken(self, batch, recognised):
        hidden = plain(self, batch, recognised)
        return torch.cat((hidden[:, :20], hidden[:, 20:].flip(-1)), dim=1)

    monkeypatch.setattr(S2S, "hidden", broken)
    wrong = train_s2s.validate(model, batches, torch.device("cpu"))
    for name in ("text", "user_phones"):
        within, past = f"validation_{name}_within", f"validation_{name}_past"
        assert wrong[within] == right[within]
        assert wrong[past] > right[past] + 0.5


# -- refusals ----------------------------------------------------------------------------------


def test_a_window_must_let_the_attention_slide(world, tmp_path, capsys):
    """The tiny preset attends to 8 s: by default it learns windows of 12, and none shorter."""
    config = S2SConfig.tiny()
    args = argparse.Namespace(window_seconds=None)
    assert train_s2s.fitting_window(args, config) == 12.0
    assert train_s2s.fitting_window(args, S2SConfig.base()) == 45.0
    line = refused(world, tmp_path / "a", capsys, context_seconds=8, window_seconds=11.9)
    assert "--window_seconds 11.9" in line and "give 12 or more" in line
    assert not (tmp_path / "a").exists()


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
    assert "no complete" in refused(world, new, capsys, data="nowhere")
    assert "no complete" in refused(world, new, capsys, data="mine")
    make_dataset(world / "mine" / "empty", codec, rows=[])
    assert "no conversations" in refused(world, new, capsys, data="mine/empty")
    held_out = [conversation(0, "english", "validation")]
    make_dataset(world / "mine" / "held_out", codec, held_out)
    assert "no conversations" in refused(world, new, capsys, data="mine/held_out")
    assert "not a codec" in refused(world, new, capsys, codec=whole_run[0])
    assert "nowhere" in refused(world, new, capsys, codec="nowhere")
    assert "not empty" in refused(world, whole_run[0], capsys, "--fresh")
    assert "not a s2s" in refused(world, new, capsys, init_from=world / "mine" / "codec")

    other = tmp_path / "other"
    tensors = {"x": torch.zeros(2)}
    checkpoints.save_checkpoint(other, 3, {"model": "codec"}, tensors, {"step": 3})
    assert "another model" in refused(world, other, capsys)


# -- what the LM reads -------------------------------------------------------------------------


class Rows(list):
    """Conversations as a data set has them."""

    def with_format(self, _):
        return {"language": [row["language"] for row in self]}


def reader(window_seconds=3.0, rows=None, disturbed=False, **changes) -> train_s2s.Conversations:
    texts = [text for pair in TEXTS.values() for text in pair]
    config = S2SConfig(
        codebook_sizes=(16,) * 8, vocab_size=200, phones=("_", "a", "i"), listen_delay=1, **changes
    )
    args = argparse.Namespace(
        seed=0, window_seconds=window_seconds, emotion_drop=0.0, depth_fraction=0.2,
        acoustic_drop=0.6, agent_window_drop=0.5,
    )  # fmt: skip
    settings = train_s2s.Settings(language_drop=0.0)
    rows = Rows(rows or [conversation(i, lang, "train") for i, lang in enumerate(TEXTS)])
    frames = [len(row["user_codes"]) for row in rows]
    tokenizer = train_s2s.train_tokenizer(texts, 200)
    near = torch.arange(16).roll(1).view(1, 16, 1).expand(8, -1, -1) if disturbed else None
    return train_s2s.Conversations(rows, frames, config, tokenizer, args, settings, 100, near)


def test_words_are_encoded_alone_as_in_the_sentence():
    tokenizer = reader().tokenizer
    assert tokenizer.token_to_id("<pad>") == PAD
    for text in (text for pair in TEXTS.values() for text in pair):
        words = text.split()
        parts = [w if i == 0 else f" {w}" for i, w in enumerate(words)]
        alone = [token for part in parts for token in tokenizer.encode(part).ids]
        assert alone == tokenizer.encode(text).ids
        assert tokenizer.decode(alone) == text and PAD not in alone


def test_where_words_tell_no_emotion_the_label_stays():
    """`--any_emotion`: without it the agent's codes would be any emotion's, patch by patch."""
    rows = [conversation(0, "english", "train")]
    for source, kept in (("scripts", False), (ANY_EMOTION, True)):
        conversations = reader(rows=[{**rows[0], "source": source}])
        conversations.args.emotion_drop = 1.0
        windows = [conversations[(0, i)] for i in range(8)]
        assert any(bool(window["agent_emotion"].any()) for window in windows) == kept


def test_words_without_times_lie_at_the_start_of_their_turn():
    """The user's, 0.2 to 1.0 s, with the patch by which the head is late; not where too many."""
    conversations = reader()
    row = conversations.rows[0]
    words = [word.strip("?.,").lower() for word in row["turns"][0]["text"].split()]
    for begins in (0, 4):
        found = conversations.untimed(row, begins)
        assert (found["untimed_first"][0], found["untimed_patches"][0]) == (5 - begins, 21)
        tokens = found["untimed_tokens"][0, : found["untimed_counts"][0]].tolist()
        assert conversations.tokenizer.decode(tokens).split() == words
        assert not found["untimed_tokens"][0, len(tokens) :].any()
        labels = found["untimed_labels"][0].tolist()
        assert labels[: len(tokens)] == [tokens.index(token) + 1 for token in tokens]
        assert not any(labels[len(tokens) :])
    assert (conversations.labelled(row)["user_words"][5:26] == IGNORE).all()
    for edge in (5, 26 - conversations.patches):  # it may be cut there
        assert not conversations.untimed(row, edge)["untimed_counts"].any()
    row["turns"][0]["text"] = " ".join(["word"] * 30)
    assert not conversations.untimed(row, 0)["untimed_counts"].any()


def test_labels_say_what_holds_at_each_patch():
    """User 0.2 to 1.0 s, agent 1.2 to 2.2 s; patches of 40 ms."""
    conversations = reader()
    whole = conversations.labelled(conversations.rows[0])
    at = torch.arange(75)
    user = (at >= 5) & (at < 25)
    assert torch.equal(whole["user_speaking"].bool(), user)
    assert torch.equal(whole["turn_end"].bool(), (at >= 25) & (at < 30))
    assert torch.equal(whole["user_emotion"], torch.where(user, 2, IGNORE))  # sad
    assert torch.equal(whole["language_label"], torch.where(user, 0, IGNORE))
    # Given once the agent has begun to speak, and from then on.
    assert torch.equal(whole["agent_emotion"], torch.where(at > 30, 1 + 7, 0))  # calm
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
    whole = conversations.labelled(row)
    assert (whole["user_emotion"] == IGNORE).all() and (whole["agent_emotion"] == 0).all()
    assert (whole["language_label"] == IGNORE).all() and int(whole["language"]) == 0
    phones = whole["user_phones"].flatten()
    assert (phones[12:52] == IGNORE).all() and (phones[52:] == 0).all()
    assert (whole["text"] != PAD).sum() > 0


def test_an_interrupted_agent_owes_no_answer():
    conversations = reader()
    row = conversation(0, "english", "train")
    row["turns"][1]["start"] = 0.8  # the agent begins before the user has finished
    assert conversations.labelled(row)["turn_end"].sum() == 0
    row["turns"].pop()
    assert conversations.labelled(row)["turn_end"].sum() == 0


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_acoustic_levels_are_delayed(delay):
    conversations = reader(acoustic_delay=delay)
    row = conversations.rows[0]
    agent = torch.from_numpy(row["agent_codes"].astype(np.int64))
    frames = conversations.labelled(row)["agent_codes"].flatten(0, 1)
    assert torch.equal(frames[:, 0], agent[:, 0])
    assert torch.equal(frames[delay:, 1:], agent[: FRAMES - delay, 1:])
    assert (frames[:delay, 1:] == IGNORE).all()


def call_rows() -> list[dict]:
    """Conversations whose frames tell whose they are: the number in one codebook, the place in two;
    with turns at random, some of them beyond each other."""
    rng, rows = np.random.default_rng(0), []
    for i, language in enumerate(["english", "hindi", "english", "english", "hindi"]):
        row = conversation(i, language, "train")
        frames = 30 + 23 * i
        place = np.arange(frames)
        codes = np.stack([np.full(frames, i), place // 16, place % 16, *[place * 0] * 5], axis=1)
        row["user_codes"] = codes.astype(np.uint16)
        row["agent_codes"] = codes.astype(np.uint16)
        times = np.sort(rng.uniform(0, frames / 50, 8)).tolist()
        row["turns"] = [
            {
                "who": "agent" if k % 2 else "user", "start": times[2 * k], "end": times[2 * k + 1],
                "text": TEXTS[language][k % 2], "phones": None, "words": None,
                "emotion": None if k == 3 and i else str(rng.choice(["happy", "sad", "angry"])),
            }
            for k in range(4)
        ]  # fmt: skip
        rows.append(row)
    return rows


def test_windows_are_calls_of_one_language_laid_end_to_end():
    rows = call_rows()
    conversations, starts, joins = reader(window_seconds=4.0, rows=rows), 0, set()
    for index in range(200):
        window = conversations[(0, index)]
        shapes = {name: tuple(v.shape) for name, v in window.items()}
        assert shapes["text"] == (100,) and shapes["user_codes"] == (100, 2, 8)
        frames = window["user_codes"].flatten(0, 1)
        which, place = frames[:, 0].tolist(), (16 * frames[:, 1] + frames[:, 2]).tolist()
        assert {rows[w]["language"] for w in which} in ({"english"}, {"hindi"})
        assert torch.equal(window["agent_codes"].flatten(0, 1), frames)
        starts += place[0] == 0
        for before, now in zip(range(199), range(1, 200), strict=True):
            same = which[now] == which[before] and place[now] == place[before] + 1
            ended = place[before] == len(rows[which[before]]["user_codes"]) // 2 * 2 - 1
            assert same or (ended and place[now] == 0)
            if not same:
                joins.add((which[before], which[now]))
    assert 40 < starts < 90 and len(joins) >= 9  # any with any other of its language
    drawn = [int(conversations[(1, i)]["user_codes"][-1, 0, 0]) for i in range(400)]
    assert abs(drawn.count(4) / drawn.count(1) - 122 / 52) < 0.8  # by their lengths


def test_a_join_loses_no_text_and_carries_the_emotion():
    """Tokens that find no patch before the end of their conversation come in the next one."""
    rows = call_rows()[::2]
    conversations = reader(rows=rows)
    parts = [conversations.labelled(row) for row in rows]
    call = train_s2s.joined(rows, conversations.config)
    whole = conversations.labelled(call, ((0, 3),))
    lengths = [len(part["text"]) for part in parts]
    turns = [turn for row in rows for turn in row["turns"] if turn["who"] == "agent"]
    said = [t for turn in turns for t in conversations.tokenizer.encode(turn["text"]).ids]
    tokens = whole["text"][whole["text"] != PAD].tolist()
    assert sum(int(part["overflow"]) for part in parts[:2]) > 0
    assert tokens == said[: len(said) - int(whole["overflow"])]
    ends = np.cumsum(lengths)
    for part, first, last in zip(parts, [0, *ends[:-1]], ends, strict=True):
        for name in ("user_speaking", "user_emotion", "turn_end"):
            assert torch.equal(whole[name][first:last], part[name]), name
        known = part["agent_emotion"] > 0
        given = whole["agent_emotion"][first:last][known]
        assert torch.equal(given, part["agent_emotion"][known])
    carried = whole["agent_emotion"][ends[0]]
    assert carried == parts[0]["agent_emotion"][-1] and carried > 0
    assert (whole["agent_emotion"][:3] == 3).all()


def test_what_a_window_does_not_see_is_not_read():
    """A window from the middle of a minute: the same labels, though but a part is labelled."""
    conversations, row = reader(), conversation(0, "english", "train")
    for name in ("agent_codes", "user_codes"):
        row[name] = np.random.default_rng(1).integers(0, 16, (3000, 8)).astype(np.uint16)
    spans = [(0.3 + 3 * k, 2.5 + 3 * k, k) for k in range(19)] + [(24.0, 32.0, 1)]
    row["turns"] = [
        {
            **row["turns"][k % 2], "start": start, "end": end, "phones": None,
            "words": None if k % 3 else [["fine", start, start + 0.4], ["you", start + 1, end]],
        }
        for start, end, k in sorted(spans)
    ]  # fmt: skip
    whole = conversations.labelled(row)
    part, begins = train_s2s.trimmed(row, 900, 75, conversations.config)
    assert 10 * 25 <= begins < 900 - 550 and len(part["turns"]) < 12
    trimmed = conversations.labelled(part)
    for name in whole:
        if whole[name].dim():
            window = trimmed[name][begins : begins + 75]
            assert torch.equal(window, whole[name][900:975]), name


def test_the_emotion_tells_neither_reply_nor_moment():
    """What is given up to a patch is the same without the turns and the words to come; nor does a
    turn's begin with it: its first token comes before."""
    conversations = reader()
    set_anew = 0
    for row in call_rows():
        agent = [turn for turn in row["turns"] if turn["who"] == "agent"]
        count = len(row["user_codes"]) // 2
        for middle in range(3, count, 7):
            given = ((0, 5), (middle, 6))
            whole = conversations.labelled(row, given)
            emotion, text = whole["agent_emotion"], whole["text"]
            assert emotion[0] == 5
            silent = not whole["agent_speaking"][middle]
            set_anew += silent
            assert emotion[middle] == 6 or not silent
            for patch in range(1, count):
                if emotion[patch] != emotion[patch - 1]:
                    assert text[patch - 1] != PAD or patch == middle
            past = [t for t in agent if int(t["start"] * 25) < middle]
            so_far = conversations.labelled({**row, "turns": past}, given)["agent_emotion"]
            assert torch.equal(so_far[: middle + 1], emotion[: middle + 1])
    assert set_anew > 10


def test_what_was_disturbed_is_drawn_with_the_window():
    clean, other = reader(window_seconds=1.2), reader(window_seconds=1.2, disturbed=True)
    for index in range(60):
        a, b = clean[(0, index)], other[(0, index)]
        for name in ("text", "agent_codes", "user_words"):
            assert torch.equal(a[name], b[name]), name
        assert torch.equal(a["agent_past"], a["agent_codes"])
        assert torch.equal(a["depth_patches"], torch.arange(30))
        same = (b["agent_past"] == IGNORE) | (b["agent_past"] == a["agent_past"])
        assert same.all() and b["depth_patches"].shape == (6,)
        assert len(set(b["depth_patches"].tolist())) == 6
    gone = torch.stack([other[(0, i)]["agent_past"] == IGNORE for i in range(60)]).flatten(1)
    assert 15 < int(gone.all(1).sum()) < 45  # a half of them sees nothing of its own codes
    read = torch.stack([other[(0, i)]["user_codes"] for i in range(60)])
    plain = torch.stack([clean[(0, i)]["user_codes"] for i in range(60)])
    changed = (read != plain) & (read != IGNORE)
    assert 0.07 < float(changed.float().sum() / (read != IGNORE).sum()) < 0.13


def test_draws_depend_on_seed_epoch_and_index_alone():
    one, two = reader(window_seconds=1.2), reader(window_seconds=1.2)
    for key in ((0, 3), (1, 3), (1, 9)):
        a, b = one[key], two[key]
        assert all(torch.equal(a[name], b[name]) for name in a)
    drawn = torch.stack([one[(0, i)]["user_codes"] for i in range(8)])
    assert len(torch.unique(drawn, dim=0)) > 4


def test_text_tokens_queue_and_never_vanish():
    words = [([5, 6, 7], 0.08), ([8], 0.08), ([9], 0.32), ([10, 11, 12], 0.32), ([13], 60.0)]
    tokens, starts, overflow = train_s2s.place_tokens(words, 10, 25.0)
    assert tokens.tolist() == [0, 0, 5, 6, 7, 8, 0, 0, 9, 10]
    assert starts == [2, 5, 8, 9, 1500] and overflow == 3


def test_turns_follow_their_word_times():
    conversations = reader()
    encode = conversations.tokenizer.encode
    turn = {"start": 0.3, "end": 0.9, "text": "how are you"}
    words = [["how", 0.04, 0.1], ["are", 0.2, 0.3], ["you", 0.36, 0.4]]
    spelt = [encode(word).ids for word in ("how", " are", " you")]
    timed = conversations.agent_words({**turn, "words": words})
    assert timed == list(zip(spelt, (0.04, 0.2, 0.36), strict=True))
    spread = conversations.agent_words({**turn, "words": None})  # no times: over [0.3, 0.9)
    assert [tokens for tokens, _ in spread] == spelt
    assert [start for _, start in spread] == pytest.approx([0.3, 0.5, 0.7])


def test_corruption_keeps_the_semantic_level():
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(16, (3, 2, 8), generator=g)

    def gone(*odds) -> torch.Tensor:
        """Of 300 windows; what is left is as it was."""
        dropped = torch.stack([train_s2s.drop_codes(clean, g, *odds) for _ in range(300)])
        assert torch.equal(dropped, clean.expand(300, -1, -1, -1).where(dropped >= 0, IGNORE))
        return dropped == IGNORE

    levels = gone(1.0, 0.0)
    assert not levels[..., 0].any()
    assert (levels[..., 1:].int().diff(dim=-1) >= 0).all()  # a level goes with those above it
    assert (levels == levels[:, :1, :1]).all()  # all along a window
    assert set((~levels[:, 0, 0]).sum(-1).tolist()) == set(range(1, 9))
    frames = gone(0.0, 0.25)
    assert (frames.all(-1) == frames.any(-1)).all()  # all codes of a frame
    assert abs(float(frames.float().mean()) - 0.25) < 0.05
    assert not gone(0.0, 0.0).any()
    windows = gone(0.0, 0.0, 0.5).flatten(1)
    assert 0.4 < float(windows.float().mean()) < 0.6
    assert (windows.all(1) | ~windows.any(1)).all()


def test_codes_are_exchanged_for_their_neighbours():
    g = torch.Generator().manual_seed(0)
    books = [torch.randn(n, 4, generator=g) for n in (12, 6)]
    near = train_s2s.near_codes(books, 3)
    for book, table in zip(books, near, strict=True):
        for code in range(len(book)):
            distances = [float((book[code] - other).norm()) for other in book]
            order = sorted(range(len(book)), key=distances.__getitem__)
            assert table[code].tolist() == order[1:4]
    codes = torch.randint(6, (1000, 2, 2), generator=g)
    replaced = train_s2s.replace_codes(codes, near, 0.3, g)
    changed = replaced != codes
    assert 0.25 < float(changed.float().mean()) < 0.35
    for level in (0, 1):
        pairs = (each[..., level][changed[..., level]].tolist() for each in (codes, replaced))
        assert all(new in near[level, old].tolist() for old, new in zip(*pairs, strict=True))
    assert torch.equal(train_s2s.replace_codes(codes, near, 0.0, g), codes)


def test_short_conversations_train_too(world, tmp_path, capsys):
    """Nothing but windows longer than their conversations, and turns without text; recordings
    shorter than a patch are left out, and counted."""
    rows = [conversation(i, "english", "train") for i in range(4)]
    for row in rows:
        row["agent_codes"], row["user_codes"] = row["agent_codes"][:45], row["user_codes"][:45]
        row["turns"] = row["turns"][:1]
    rows += [conversation(i, "english", "train") for i in (5, 6)]
    for row, frames in zip(rows[4:], (0, 1), strict=True):
        row |= {name: row[name][:frames] for name in ("agent_codes", "user_codes")}
        row["turns"] = []
    codec = Codec.from_checkpoint(world / "mine" / "codec")
    make_dataset(world / "mine" / "short", codec, rows)
    folder = tmp_path / "run"
    train(world, folder, data="mine/short", max_steps=3, asr_share=0, epoch_hours=1, num_epochs=4)
    assert "2 of 6 conversations left out" in capsys.readouterr().out
    rows = [row for row in metrics(folder) if "loss" in row]
    assert len(rows) == 3 and all(row["loss"] is not None for row in rows)
    assert rows[-1]["skipped"] == 0


WRONG = [
    "--batch_size 0", "--num_epochs 0", "--lr -1", "--num_workers -1", "--epoch_hours inf",
    "--window_seconds 0", "--set frames_per_step=3", "--set acoustic_delay=-1", "--vocab_size 0",
    "--asr_share 2", "--depth_fraction -1", "--set text_weight=0", "--acoustic_drop nan",
    "--set depth_order=up", "--set lr=1",
    "--agent_window_drop 1.01", "--warmup_steps -1", "--budget_usd nan", "--log_every 0",
]  # fmt: skip


def test_flags_out_of_range_are_refused_before_anything_is_loaded(capsys):
    for wrong in WRONG:
        with pytest.raises(SystemExit) as stop:
            train_s2s.parse_args(wrong.split())
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and shown.count("\n") == 1 and wrong.split()[0] in shown, wrong


# -- a run that is resumed ---------------------------------------------------------------------


@pytest.fixture
def finished(whole_run, tmp_path):
    """A copy of a finished run of eight steps."""
    return Path(shutil.copytree(whole_run[0], tmp_path / "finished"))


def last(folder: Path) -> checkpoints.Checkpoint:
    return checkpoints.load_checkpoint(folder)


def test_a_finished_run_is_extended(world, finished, capsys):
    train(world, finished, num_epochs=3)
    said = capsys.readouterr().out
    assert "from here on --num_epochs 3 (until now 2)" in said and "had 8 steps, now 12" in said
    trainer = last(finished).trainer
    places = trainer["step"], trainer["planned_steps"], trainer["flags"]["num_epochs"]
    assert places == (12, 12, 3)
    assert trainer["schedule"]["starts"]["dialogue"] == 2  # no ASR phase again
    rates = [row["lr"] for row in metrics(finished) if "lr" in row]
    expected = training.Schedule(12, warmup_steps=2).rate(11, final_ratio=0.05)
    assert rates[11] == pytest.approx(3e-4 * expected)
    train(world, finished, num_epochs=3)
    assert "done: step 12" in capsys.readouterr().out and last(finished).step == 12


def test_another_batch_and_rate_are_applied_and_every_step_is_saved(world, tmp_path, capsys):
    folder = tmp_path / "run"
    train(world, folder, max_steps=3)
    train(world, folder, batch_size=4, lr=1e-5)
    said = capsys.readouterr().out
    assert "from here on --batch_size 4 (until now 2)" in said and "--lr 1e-05" in said
    # Six of eight samples of the first epoch, then two steps of four.
    trainer = last(folder).trainer
    assert (trainer["step"], trainer["epoch"], trainer["consumed"]) == (5, 1, 8)
    assert max(row["lr"] for row in metrics(folder)[4:] if "lr" in row) <= 1e-5
    train(world, folder)  # pasted without: as it was
    assert last(folder).trainer["flags"]["batch_size"] == 4


def test_changes_that_a_run_cannot_take_are_refused(world, finished, capsys):
    changes = {"preset": "base", "window_seconds": 2.4, "seed": 1, "agent_window_drop": 1}
    for change in ({name: value} for name, value in changes.items()):
        flag = f"--{next(iter(change))} "
        assert flag in refused(world, finished, capsys, **change)
    assert last(finished).step == 8
    with command.only_one(finished):
        assert "another process" in refused(world, finished, capsys)
    assert "is a run's folder" in refused(world, finished, capsys, export=finished)


@pytest.mark.parametrize("lacking", ["flags", "settings", "epoch", "guard", "optimizer"])
def test_trainer_state_of_another_version_is_refused(world, whole_run, tmp_path, capsys, lacking):
    old, folder = last(whole_run[0]), tmp_path / "old"
    trainer = {k: v for k, v in old.trainer.items() if k != lacking}
    checkpoints.save_checkpoint(folder, 8, old.config, old.tensors, trainer, old.tokenizer)
    line = refused(world, folder, capsys, num_epochs=3)
    assert lacking in line and "--init_from" in line


def test_settings_of_a_run_stay(world, finished, capsys):
    settings = ("--set", "agent_drop=0.4", "--set", "grad_clip=2")
    line = refused(world, finished, capsys, *settings, num_epochs=3)
    assert "--set agent_drop=0.4: the run in" in line
    assert "started with --set agent_drop=0.3" in line
    train(world, finished, "--set", "grad_clip=2", num_epochs=3, max_steps=9)
    assert "from here on --set grad_clip=2.0 (until now 1.0)" in capsys.readouterr().out
    train(world, finished, num_epochs=3, max_steps=10)
    said = capsys.readouterr().out
    assert "grad_clip=2.0" in said and "as the run was started: --set grad_clip=2.0" in said


def test_a_folder_that_cannot_be_used_is_refused_first(world, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(world, tmp_path / "file", capsys)
    with command.only_one(tmp_path):  # its lock does not make a folder used
        pass
    (tmp_path / "file").unlink()
    train(world, tmp_path, "--fresh", max_steps=1)
    assert last(tmp_path).step == 1


def test_two_ranks_learn_what_one_process_does(world, tmp_path):
    """torchrun on two gloo ranks, each half of the batch, in both phases, against the joint one.

    Without dropout, which each rank draws for itself.
    """
    same = {"num_epochs": 1, "asr_share": 0.5, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0}
    same |= {"epoch_hours": 4 * 4 * 1.2 / 3600}
    start, one, two = tmp_path / "start", tmp_path / "one", tmp_path / "two"
    train(world, start, dropout=0.0, **{**same, "lr": 0}, max_steps=1)
    train(world, one, dropout=0.0, **same)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, "test_train_s2s", *flags(world, two, **same)],
        cwd=ROOT,
        env=environment(dropout=0.0),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("an epoch is") == 1  # the first rank alone speaks
    names = [name for name, _ in S2S(S2S.from_checkpoint(one).config).named_parameters()]
    first, single, ranks = (
        torch.cat([last(f).tensors[n].flatten() for n in names]) for f in (start, one, two)
    )
    moved, apart = (single - first).norm(), (ranks - single).norm()
    assert moved > 0 and apart < 0.02 * moved, (float(apart), float(moved))


if __name__ == "__main__":
    with small_models(dropout=float(os.environ["TEST_DROPOUT"])):
        train_s2s.main()
