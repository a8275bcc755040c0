"""The parts of `gpu_check.sh`: each in processes of its own, under a timeout, a row a result.

Data are made on the spot (tones and noise, random codes) and the teacher has the size of Whisper
large-v3-turbo and random weights: what is measured is pace, memory and whether it runs, not what is
learnt. A part that fails or is cut off is a row too, and the JSON is written after each part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import command  # noqa: E402
from command import UserError  # noqa: E402
from ledger import percentiles  # noqa: E402

SECONDS = 460  # for all parts, so that the script ends within eight minutes
USD_PER_HOUR = 3.39
CODEC_PLAN_HOURS, CODEC_LISTENS = 100 * 60, 0.1  # of audio; share of steps for phones alone
LM_PLAN_HOURS, LM_LISTENS = 20 * 60, 0.3
RATE, FRAME_RATE = 24000, 50
MOSHI_STAGES = "encode", "lm", "decode", "total"


@dataclass
class Place:
    """Where a run takes place: `folder` for what it makes, `smoke`: tiny, on whatever is there."""

    folder: Path
    smoke: bool
    deadline: float
    cuda: bool = field(default_factory=torch.cuda.is_available)

    def seconds(self, most: float) -> float:
        """What a step may take: `most`, or what is left."""
        return max(1.0, min(most, self.deadline - time.monotonic()))


# ---------------------------------------------------------------------------------- data


def make_speech(folder: Path, smoke: bool) -> Path:
    """A corpus of modulated tones over noise, with phone labels, as `--data_dirs` takes it."""
    from audio import write_audio
    from data import Clip, write_manifest
    from phones import PHONES

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    seconds, count = (6.0, 6) if smoke else (20.0, 64)
    t = np.arange(round(seconds * RATE)) / RATE
    clips = []
    for i in range(count):
        pitch = rng.uniform(90, 250)
        voice = sum(np.sin(2 * np.pi * pitch * h * t + h) / h for h in range(1, 20))
        syllables = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(3, 5) * t)
        audio = 0.1 * voice * syllables + 0.003 * rng.standard_normal(len(t))
        path = folder / f"{i:03d}.wav"
        write_audio(path, audio.astype(np.float32))
        starts = np.arange(0, seconds, 0.08)
        names = rng.choice(list(PHONES)[1:], len(starts))
        phones = [[str(p), float(s), float(s) + 0.08] for p, s in zip(names, starts, strict=True)]
        split = "train" if i < count - 2 else "validation"
        clips.append(Clip(path, seconds, RATE, "english", f"s{i}", split=split, phones=phones))
    write_manifest(folder / "manifest.jsonl", clips)
    return folder


def make_backbone(folder: Path, smoke: bool) -> Path:
    """A Gemma 3 of the recommended one's sizes, with random weights and a tokenizer of bytes."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [f"<unused{i}>" for i in range(10 if smoke else 16_000)]
    tokens = {token: i for i, token in enumerate([*letters, *others])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16}
    if not smoke:
        sizes = {"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912}
    config = transformers.Gemma3TextConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=1, sliding_window=512,
        vocab_size=len(tokens))  # fmt: skip
    transformers.Gemma3ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def make_codes(folder: Path, smoke: bool) -> Path:
    """A code dataset of random codes, a turn of each side every eight seconds."""
    from codec import Codec
    from dialogues import finish_dataset, load_scripts, write_arrow

    codec = Codec.from_checkpoint(ROOT / "checkpoints" / "tiny" / "codec")
    exchanges = load_scripts(ROOT / "conversations")
    rng = np.random.default_rng(0)
    seconds, count = (24, 12) if smoke else (64, 200)
    sizes = np.array(codec.config.codebook_sizes[:8])

    def codes() -> np.ndarray:
        return rng.integers(0, sizes, (seconds * FRAME_RATE, 8)).astype(np.uint16)

    def turn(who: str, start: float, text: str) -> dict:
        words = text.split()
        step = 2.5 / len(words)
        spans = [[w, start + step * i, start + step * (i + 1)] for i, w in enumerate(words)]
        return {"who": who, "start": start, "end": start + 2.5, "text": text,
                "emotion": "neutral", "words": spans}  # fmt: skip

    rows = []
    for i in range(count):
        turns = []
        for start in range(1, seconds - 7, 8):
            asked, answered = exchanges[int(rng.integers(len(exchanges)))].lines[:2]
            turns.append(turn("user", start, asked.texts[0]))
            turns.append(turn("agent", start + 3.0, answered.texts[0]))
        rows.append({
            "id": f"r{i}", "language": "english", "source": "random",
            "split": "validation" if i < 4 else "train",
            "agent_codes": codes(), "user_codes": codes(), "turns": turns,
        })  # fmt: skip
    info = {"codec_fingerprint": codec.fingerprint, "frame_rate": float(FRAME_RATE),
            "codebook_sizes": list(codec.config.codebook_sizes)}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_arrow(folder / "data-00000.arrow", rows)
    finish_dataset(folder, ["data-00000.arrow"], info)
    return folder


def make_teacher(folder: Path, smoke: bool) -> Path:
    """Whisper large-v3-turbo's sizes, which is the default teacher, with random weights."""
    from transformers import WhisperConfig, WhisperModel

    sizes = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
             "encoder_ffn_dim": 5120, "num_mel_bins": 128}  # fmt: skip
    if smoke:
        sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
                 "encoder_ffn_dim": 64, "num_mel_bins": 20}  # fmt: skip
    unused = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
    small = {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = WhisperConfig(**sizes, **unused, **small, decoder_start_token_id=0)
    WhisperModel(config).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------- runs


def run_script(place: Place, script: str, name: str, most: float, flags: list[str]) -> dict:
    """A trainer as a user pastes it, for some steps: pace, memory, losses and the estimate.

    Returns also where it failed or was cut off: what it had measured till then counts.
    """
    folder = place.folder / f"{script}-{name}"
    folder.mkdir()
    run = folder / "run"
    argv = [sys.executable, __file__, "--child", script, str(folder / "child.json"), *flags,
            "--checkpoint_dir", str(run), "--keep_last", "1"]  # fmt: skip
    code, log = call(argv, folder, place.seconds(most))
    rows = [row for row in lines_of(run / "metrics.jsonl") if "audio_seconds_per_second" in row]
    paces = [row["audio_seconds_per_second"] for row in rows[1:] or rows]
    noted = folder / "child.json"
    estimates = [" ".join(line.split()) for line in log.splitlines() if " epochs = " in line]
    found = {
        "audio_seconds_per_second": round(statistics.median(paces), 1) if paces else None,
        "peak_gib": json.loads(noted.read_text())["peak_gib"] if noted.exists() else None,
        "data_wait": rows[-1].get("data_wait") if rows else None,
        "estimate": estimates[0] if estimates else None,
        "steps": rows[-1]["step"] if rows else 0,
        "rows": rows,
    }
    if code:
        last = ([f"exit code {code}"] + [line for line in log.splitlines() if line.strip()])[-1]
        found["failed"] = "cut off" if code == 124 else last[:200]
    return found


def call(argv: list[str], folder: Path, seconds: float) -> tuple[int, str]:
    """(exit code, what it printed) of a program in `folder`; 124 where it took longer."""
    log = folder / "log.txt"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            argv, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
        finally:  # workers too; only what this process started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, log.read_text(errors="replace")


def lines_of(path: Path) -> list[dict]:
    return [row for _, row in command.json_lines(path)] if path.exists() else []


def child(script: str, result: Path, argv: list[str]) -> None:
    """Runs a script's `main` in this process and keeps noting the GPU memory that it took."""

    def note() -> None:
        while torch.cuda.is_available():
            if torch.cuda.is_initialized():
                peak = torch.cuda.max_memory_allocated() / 2**30
                command.write_text(result, json.dumps({"peak_gib": round(peak, 2)}))
            time.sleep(1)

    threading.Thread(target=note, daemon=True).start()
    sys.argv = [f"{script}.py", *argv]
    command.run(importlib.import_module(script).main)
    if torch.cuda.is_available():
        time.sleep(1.1)


def plan_of(hours: float, listens: float, listening: dict, full: dict) -> dict:
    """Hours and dollars of the plan from the measured paces, `listens` of its audio at one."""
    paces = (listening["audio_seconds_per_second"], full["audio_seconds_per_second"])
    if None in paces:
        return {"measured_hours": None, "measured_usd": None}
    took = hours * (listens / paces[0] + (1 - listens) / paces[1])
    return {"measured_hours": round(took, 2), "measured_usd": round(took * USD_PER_HOUR, 2)}


def agreement(eager: dict, graph: dict) -> dict:
    """The largest relative difference of each loss, step by step, where both runs logged it."""
    others = {row["step"]: row for row in graph["rows"]}
    pairs = [(row, others[row["step"]]) for row in eager["rows"] if row["step"] in others]
    losses = ("mel", "waveform", "spectral", "ssl", "distillation", "phones", "loss")
    return {
        name: round(max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-9) for a, b in pairs), 6)
        for name in losses
        if pairs and all(isinstance(row.get(name), float) for pair in pairs for row in pair)
    }


# ---------------------------------------------------------------------------------- parts


def part_tests(place: Place) -> dict:
    """The tests that need CUDA."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(file) for file in files if "cuda.is_available()" in file.read_text()]
    folder = place.folder / "tests"
    folder.mkdir()
    argv = [sys.executable, "-m", "pytest", "-q", "-k", "cuda or gpu", "-p", "no:cacheprovider",
            "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *files]  # fmt: skip
    code, log = call(argv, folder, place.seconds(120))
    counted = re.compile(r"\d+ (passed|failed|error|skipped|deselected)")
    said = [line for line in log.splitlines() if counted.search(line)]
    failed = {} if code == 0 else {"failed": "cut off" if code == 124 else f"exit code {code}"}
    return {"result": (said or ["nothing ran"])[-1].strip("= "), "log": log[-3000:], **failed}


def part_train_codec(place: Place) -> dict:
    """Phase 2 at the plan's batch, with a teacher: phones alone, everything, and as a graph."""
    speech = make_speech(place.folder / "speech", place.smoke)
    teacher = make_teacher(place.folder / "teacher", place.smoke)
    flags = ["--data_dirs", str(speech), "--teacher", str(teacher), "--epoch_hours", "60",
             "--log_every", "5", "--max_steps", "30"]  # fmt: skip
    if place.smoke:
        flags += ["--preset", "tiny", "--device", "cpu", "--batch_size", "2", "--threads", "1",
                  "--num_workers", "0", "--max_steps", "4", "--log_every", "1",
                  "--set", "disc_preset=tiny"]  # fmt: skip
    else:
        flags += ["--preset", "base"]
    full = ["--semantic_share", "0", "--disc_start", "0", "--quantizer_start", "5"]
    found = {
        "listening": run_script(place, "train_codec", "listening", 90, flags),
        "full": run_script(place, "train_codec", "full", 100, [*flags, *full]),
    }
    if place.cuda and not place.smoke:
        graph = [*flags, *full, "--cuda_graph"]
        found["graph"] = run_script(place, "train_codec", "graph", 100, graph)
        found["graph_against_eager"] = agreement(found["full"], found["graph"])
    plan = plan_of(CODEC_PLAN_HOURS, CODEC_LISTENS, found["listening"], found["full"])
    return found | {"plan": plan}


def part_train_s2s(place: Place) -> dict:
    """Phase 3 at the plan's batch: ASR alone, then everything; the latter with a backbone too."""
    codes = make_codes(place.folder / "codes", place.smoke)
    flags = ["--data_dirs", str(codes), "--codec", str(ROOT / "checkpoints" / "tiny" / "codec"),
             "--epoch_hours", "60", "--log_every", "5", "--max_steps", "30"]  # fmt: skip
    if place.smoke:
        flags += ["--preset", "tiny", "--device", "cpu", "--batch_size", "2", "--threads", "1",
                  "--num_workers", "0", "--max_steps", "4", "--log_every", "1",
                  "--context_seconds", "4", "--window_seconds", "8"]  # fmt: skip
    else:
        flags += ["--preset", "base"]
    full, none = [*flags, "--asr_share", "0"], ["--backbone", "none"]
    found = {
        "listening": run_script(place, "train_s2s", "listening", 80, [*flags, *none]),
        "full": run_script(place, "train_s2s", "full", 80, [*full, *none]),
    }
    backbone = make_backbone(place.folder / "backbone", place.smoke)
    theirs = ["--backbone", str(backbone), "--trim_vocab", "0"]
    found["backbone"] = run_script(place, "train_s2s", "backbone", 100, [*full, *theirs])
    return found | {"plan": plan_of(LM_PLAN_HOURS, LM_LISTENS, found["listening"], found["full"])}


def part_tick(place: Place) -> dict:
    """The engine's tick by stage, p50 and p95 in ms, at several numbers of callers, eager and as
    graphs; what share of the codes the two say differently in the same calls; and `moshi`'s."""
    from codec import Codec, CodecConfig
    from duplex import halve
    from s2s import S2S, S2SConfig
    from transformer import TransformerConfig

    torch.manual_seed(0)
    torch.set_num_threads(1 if place.smoke else torch.get_num_threads())
    device = "cuda" if place.cuda else "cpu"
    size = "tiny" if place.smoke else "base"
    codec = Codec(getattr(CodecConfig, size)()).to(device).eval().requires_grad_(False)
    config = getattr(S2SConfig, size)(
        codec_fingerprint=codec.fingerprint, codebook_sizes=codec.config.codebook_sizes[:8]
    )

    def made(config: S2SConfig) -> S2S:
        lm = S2S(config).to(device).eval().requires_grad_(False)
        if place.cuda:
            halve(lm)
        return lm

    lm, found = made(config), {}
    for slots in (1, 2) if place.smoke else (1, 8, 32):
        calls = functools.partial(noisy_calls, place, codec, lm, slots)
        eager, said = calls(graphs=False)
        graphs, replayed = calls(graphs=True)
        # Where eager differs from itself already, a graph that does shows nothing.
        again = calls(graphs=False, most=50)[1]
        found |= {f"{slots} slots, eager": eager, f"{slots} slots, graphs": graphs,
                  f"{slots} slots, graphs apart": apart(said, replayed),
                  f"{slots} slots, eager apart": apart(said, again)}  # fmt: skip
    dim, layers, ffn, head = (64, 2, 96, 16) if place.smoke else (1152, 26, 6912, 256)
    gemma = TransformerConfig(dim, layers, 4, 32_768, num_kv_heads=1, ffn_dim=ffn, head_width=head,
        norms_after=True, activation="gelu_tanh", query_key_norm=True)  # fmt: skip
    lm = made(dataclasses.replace(config, temporal=gemma, dim=dim, vocab_size=16_000))
    for slots in (1,) if place.smoke else (1, 32):
        ticks, _ = noisy_calls(place, codec, lm, slots, graphs=True, most=100)
        found[f"{slots} slots, Gemma 3 1B"] = ticks  # its sizes
    try:
        found.update(moshi_ticks(place, (1, 2) if place.smoke else (1, 8, 32)))
    except ImportError as error:
        found["moshi"] = f"not measured, its package is not here: {command.first_line(error)}"
    except Exception as error:  # a row, as a part is
        found["moshi"] = f"{type(error).__name__}: {command.first_line(error)}"
    return found


def noisy_calls(place: Place, codec, lm, slots: int, graphs: bool, most: int = 200) -> tuple:
    """Tick times of an engine whose callers make noise, and the codes of each tick."""
    from duplex import DuplexEngine
    from ledger import LatencyLedger

    engine = DuplexEngine(codec, lm, slots, graphs=graphs)
    ledger = LatencyLedger(engine.patch_seconds, warmup_ticks=engine.warm_up())
    until = time.monotonic() + place.seconds(2 if place.smoke else 12)
    noise, said = np.random.default_rng(0), []
    while len(said) < most and time.monotonic() < until:
        frames = noise.normal(0, 0.05, (slots, engine.patch_samples)).astype(np.float32)
        result = engine.tick(frames)
        ledger.tick(result)
        said.append(result.codes)
    return ledger.summary()["tick_ms"], said


def apart(said: Sequence, others: Sequence) -> str:
    """What share of the codes two engines said differently, and from which tick on."""
    shares = [float(np.mean(one != two)) for one, two in zip(said, others, strict=False)]
    first = next((i for i, share in enumerate(shares) if share), None)
    since = "in none" if first is None else f"first in tick {first}"
    return f"{np.mean(shares):.2%} of the codes, {since} of {len(shares)}"


def moshi_ticks(place: Place, crowds: Sequence[int]) -> Iterator[tuple[str, dict]]:
    """The same of the `moshi` package: a frame of 80 ms through its own LMGen and Mimi at their
    published sizes, with random weights and the package's own compiling and CUDA graphs."""
    from moshi.models import LMGen, loaders

    from tools.compare_codecs import load_mimi

    device = torch.device("cuda" if place.cuda else "cpu")
    small = {"dim": 64, "num_heads": 4, "num_layers": 2, "context": 64, "depformer_dim": 32,
             "depformer_num_heads": 2, "depformer_num_layers": 1,
             "depformer_dim_feedforward": 64} if place.smoke else {}  # fmt: skip
    mimi, no_compile = load_mimi(device)
    lm = loaders.get_moshi_lm(None, loaders._lm_kwargs | small, device)
    for slots in crowds:
        gen, until = LMGen(lm), time.monotonic() + place.seconds(4 if place.smoke else 30)
        noise, spans = torch.Generator().manual_seed(0), []
        with contextlib.ExitStack() as opened:
            for one in (torch.no_grad(), mimi.streaming(slots), gen.streaming(slots)):
                opened.enter_context(one)
            if not place.cuda:
                opened.enter_context(no_compile())
            while len(spans) < 110 and (len(spans) < 12 or time.monotonic() < until):
                frame, marks = 0.05 * torch.randn(slots, 1, 1920, generator=noise), []
                for stage in (lambda x: mimi.encode(x.to(device)), gen.step,
                              lambda x: None if x is None else mimi.decode(x[:, 1:]).cpu()):
                    marks.append(time.perf_counter())
                    frame = stage(frame)
                    if place.cuda:
                        torch.cuda.synchronize()
                marks.append(time.perf_counter())
                spans.append([*np.diff(marks), marks[-1] - marks[0]])
        rows = np.array(spans[10:])  # the first compile, capture and wait for the delayed codes
        stages = {name: percentiles(row) for name, row in zip(MOSHI_STAGES, rows.T, strict=True)}
        yield f"{slots} slots, moshi", stages


def a_second(found: dict) -> dict[str, str]:
    """For each number of slots, ms of work for a second of everybody's audio, as the medians go."""
    rates = {"eager": 25, "graphs": 25, "moshi": 12.5}  # ticks a second
    said: dict[str, list[str]] = {}
    for name, value in found.items():
        slots, _, kind = name.partition(", ")
        if kind in rates:
            said.setdefault(slots, []).append(f"{kind} {value['total']['p50'] * rates[kind]:.0f}")
    return {f"{slots}, 1 s of audio": f"{', '.join(row)} ms" for slots, row in said.items()}


PARTS: dict[str, Callable[[Place], dict]] = {
    "train_codec": part_train_codec,
    "train_s2s": part_train_s2s,
    "tick": part_tick,
    "tests": part_tests,
}


# ---------------------------------------------------------------------------------- telling


def table(parts: dict[str, dict]) -> str:
    lines = [f"{'part':<24}{'what':<22}result"]
    for part, found in parts.items():
        lines += [f"{part:<24}{what:<22}{value}" for what, value in _rows(part, found)]
    return "\n".join(lines)


def _rows(part: str, found: dict) -> list[tuple[str, str]]:
    if "failed" in found and part != "tests":
        return [("failed", found["failed"])]
    if part == "tests":
        return [("", found["result"] + (f" ({found['failed']})" if "failed" in found else ""))]
    if part == "tick":
        ticks = {name: value for name, value in found.items() if name != "seconds"}
        ticks |= a_second(ticks)
        return [(name, _tick_line(value)) for name, value in ticks.items()]
    rows = [(name, _run_line(run)) for name, run in found.items() if "rows" in run]
    # The first run has the plan's own flags, but for where it stops.
    rows.append(("plan, as estimated", found["listening"]["estimate"] or "-"))
    plan = found["plan"]
    if plan["measured_hours"] is not None:
        hours, usd = plan["measured_hours"], plan["measured_usd"]
        rows.append(("plan, as measured", f"{hours:.1f} h = ${usd:.0f}"))
    if "graph_against_eager" in found:
        apart = found["graph_against_eager"]
        said = ", ".join(f"{k} {v:.1e}" for k, v in apart.items()) or "no step in both"
        rows.append(("graph beside eager", said))
    return rows


def _tick_line(value: dict | str) -> str:
    if isinstance(value, str):
        return value
    return ", ".join(f"{s} {v['p50']:.1f}/{v['p95']:.1f}" for s, v in value.items()) + " ms"


def _run_line(run: dict) -> str:
    pace, memory = run["audio_seconds_per_second"], run["peak_gib"]
    said = f"{pace:.0f} audio s/s" if pace else "no pace"
    said += f", {memory:.1f} GiB" if memory else ""
    said += f", {run['data_wait']:.0%} of it waiting for data" if run["data_wait"] else ""
    return said + (f"; {run['failed']}" if "failed" in run else "")


def main(argv: list[str] | None = None) -> int:
    parser = command.ArgumentParser("What only a GPU can show; see gpu_check.sh.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; else all")
    output = Path(os.environ.get("OUT", ".")) / "gpu_check.json"
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--seconds", type=command.number(above=0), default=SECONDS, help="for all")
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}: there are {', '.join(PARTS)}")
    smoke = os.environ.get("GPU_CHECK_SMOKE", "0") not in ("", "0")
    if not (smoke or torch.cuda.is_available()):
        raise UserError("no CUDA GPU here; GPU_CHECK_SMOKE=1 tries the parts without one")
    command.writable_file(args.output, "--output")
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "smoke": smoke,
        "usd_per_hour": USD_PER_HOUR,
        "parts": known.get("parts", {}) if known.get("smoke") == smoke else {},
    }
    deadline = time.monotonic() + args.seconds
    chosen = {}
    for name in args.parts or PARTS:
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                chosen[name] = PARTS[name](Place(Path(folder), smoke, deadline))
        except Exception as error:  # a row, not the end
            chosen[name] = {"failed": f"{type(error).__name__}: {command.first_line(error)}"}
        seconds = time.monotonic() - started
        print(f"{name}: {seconds:.0f} s", flush=True)
        result["parts"][name] = {**chosen[name], "seconds": round(seconds, 1)}
        command.write_text(args.output, json.dumps(result, indent=1))
    print(f"\n{result['device']}, torch {result['torch']}{', smoke' if smoke else ''}")
    print(table(chosen))
    print(f"written to {args.output}")
    return int(any(_failed(found) for found in chosen.values()))


def _failed(found: dict) -> bool:
    return "failed" in found or any(isinstance(v, dict) and "failed" in v for v in found.values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        command.run(main, resumes=False)
