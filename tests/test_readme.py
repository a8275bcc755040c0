"""The README is true: its lines run in order, from a clone to an answer; its map is the code's."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from test_corpora import ROWS, dataset, served
from test_fetching import Server, coded, server, tar_of

import checkpoints
import data
from codec import Codec

__all__ = ["Server", "server"]  # fixtures, found by name

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
NOTES = (REPOSITORY / "PLAN_NOTES.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
NOT_YET = "(not yet here)"
PLAN_URL = "https://github.com/devasphn/NewProject.git"


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def lines() -> list[str]:
    """Every line of the README's blocks of shell commands, in order, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if line and not line.startswith("#")]


# ---- the map
def map_rows() -> list[tuple[str, bool, list[str]]]:
    """(file, whether it is said to exist, what it imports) for every row of the map's tables."""
    row = r"^\| `([^`]+)`(.*?) \|.*\|([^|]*)\|$"
    rows = re.findall(row, section("The file map"), re.MULTILINE)
    return [(name, NOT_YET not in rest, re.findall(r"`(\w+)`", to)) for name, rest, to in rows]


def imported(path: Path) -> set[str]:
    """Modules of the root that a file imports anywhere, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if (REPOSITORY / f"{name}.py").exists()}


def test_the_map_names_every_file() -> None:
    assert {name for name, exists, _ in map_rows() if exists} >= {
        path.name for path in REPOSITORY.glob("*.py")
    }
    for name, exists, _ in map_rows():
        assert (REPOSITORY / name).exists() == exists, name
    for name in re.findall(r"`([^`]+)`", section("The file map").split("Beside them:")[1]):
        assert list(REPOSITORY.glob(name.rstrip("/"))), f"{name} is named but not here"


def test_imports_are_those_of_the_map_and_point_downwards() -> None:
    """Downwards in the tables; among the scripts, a later phase's may use an earlier one's."""
    order = [name for name, *_ in map_rows()]
    count = order.index("load_test.py") + 1
    order = order[:count][::-1] + order[count:]
    for name, exists, said in map_rows():
        if not (exists and name.endswith(".py")) or "/" in name:
            continue
        found = imported(REPOSITORY / name)
        assert found == set(said), f"{name} imports {' '.join(sorted(found))}"
        above = [to for to in found if order.index(f"{to}.py") < order.index(name)]
        assert not above, f"{name} imports {above}, which stand above it"


# ---- single commands
def commands() -> list[tuple[str, frozenset[str]]]:
    """(script, its flags) for every `python script.py --flag …` that a user or a builder pastes.

    The plan's own lines, in the first column of PLAN_NOTES.md, name scripts that never were here.
    """
    recipe = (REPOSITORY / "tools/make_tiny.sh").read_text(encoding="utf-8")
    notes = re.sub(r"^\| [^|]*\|", "|", NOTES, flags=re.MULTILINE)
    text = "\n".join([README, notes, MAKEFILE, recipe]).replace("\\\n", " ")
    found: dict[str, set[str]] = {}
    for script, rest in re.findall(r"python\"? ((?:tools/)?\w+\.py)([^\n`|]*)", text):
        found.setdefault(script, set()).update(re.findall(r"(?<!\S)--\w+", rest))
    return sorted((script, frozenset(flags)) for script, flags in found.items())


@functools.cache
def help_text(script: str) -> str:
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("script", "flags"), commands(), ids=[name for name, _ in commands()])
def test_pasted_flags_are_known(script: str, flags: frozenset[str]) -> None:
    assert (REPOSITORY / script).exists(), f"{script} is to be pasted but is not here"
    for flag in flags:
        assert re.search(rf"{flag}\b", help_text(script)), f"{script} does not know {flag}"


def test_no_figure_is_missing() -> None:
    results = (REPOSITORY / "RESULTS.md").read_text(encoding="utf-8")
    assert re.findall(r"TODO-FIGURE\((\w+)\)", README + NOTES + results) == []


def test_make_targets_exist() -> None:
    for target in re.findall(r"make (\w+)", README):
        if target in ("demo", "test", "lint", "tiny"):
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:checkpoints|samples|tools)/[\w./]+\.\w+)`", README + NOTES):
        assert (REPOSITORY / name).exists(), f"{name} is named but not here"


# ---- the whole chain
# What makes each line small, put behind its own flags: the last one given counts.
SMALL = {
    "augment_telugu.py": "--num_workers 0",
    "train_codec.py": "--preset tiny --teacher none --batch_size 2 --num_epochs 1 --num_workers 0 "
    "--epoch_hours 0.01 --window_seconds 0.5 --max_steps 3 --threads 1",
    "evaluate_codec.py": "--codebooks 8 --max_clips 1 --max_seconds 2 --judges stoi",
    "tools/make_clips.py": "--hours 0.05 --languages english --num_workers 0",
    "make_conversations.py": "--num_conversations 2 --intents greeting --languages english "
    "--num_workers 0",
    "train_s2s.py": "--preset tiny --batch_size 2 --num_epochs 1 --num_workers 0 "
    "--epoch_hours 0.01 --context_seconds 2 --window_seconds 3 --max_steps 3 --threads 1",
    "finetune_emotion.py": "--preset tiny --batch_size 2 --num_epochs 1 --num_workers 0 "
    "--epoch_hours 0.01 --max_steps 3 --threads 1 --set emotion_dim=16",
    "evaluate_s2s.py": "--languages english --intents greeting --questions_per_exchange 1 "
    "--judge none",
    "serve.py": "--slots 1",
    "load_test.py": "--callers 1 --seconds 4 --answer_seconds 1",
    "stream_demo.py": "--fast --tail_seconds 0.5 --wav samples/question_english.wav "
    "--out reply_english.wav",
}
PORT = 20000 + os.getpid() % 20000  # of the server that the chain starts
# Mozilla's client, as far as the script uses it: a release that lies there already.
CLIENT = """
import shutil

def download_dataset(dataset, download_directory):
    return shutil.copy(dataset, download_directory)
"""


@pytest.fixture
def sources(server, tmp_path) -> str:
    """Flags that lead to small corpora, by archive, by parquet folder and by Mozilla's client."""
    served(server, ROWS["openslr-66"])
    corpora = {"kathbath-hindi": "hindi", "kathbath-telugu": "telugu"}
    for name in corpora:
        for path, body in dataset(ROWS[name], count=24, seconds=4).items():
            (tmp_path / "kathbath" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "kathbath" / path).write_bytes(body)
    rows = "".join(f"reader{n}\tcv_{n}.mp3\ta sentence\n" for n in range(6))
    release = {"cv/te/validated.tsv": f"client_id\tpath\tsentence\n{rows}".encode()}
    for n in range(6):
        release[f"cv/te/clips/cv_{n}.mp3"] = coded(".mp3", seconds=2, rate=48000, hertz=200 + n)
    (tmp_path / "release.tar.gz").write_bytes(tar_of(release))
    for n in range(12):  # recordings of one's own
        (tmp_path / f"own/speaker{n}").mkdir(parents=True)
        body = coded(".wav", seconds=2, rate=24000, hertz=150 + 10 * n)
        (tmp_path / f"own/speaker{n}/a.wav").write_bytes(body)
    for n in range(8):  # CREMA-D as its owners ship it
        path = tmp_path / f"AudioWAV/100{n}_DFA_{('SAD', 'HAP')[n % 2]}_XX.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(coded(".wav", seconds=2, rate=16000, hertz=150 + 10 * n))
    (tmp_path / "client").mkdir()
    (tmp_path / "client/datacollective.py").write_text(CLIENT)
    mirrors = " ".join(f"{name}={tmp_path / 'kathbath'}" for name in corpora)
    return (  # --max_hours: else a small disk is refused, the table's hours are the real ones
        f"--corpora {' '.join(corpora)} openslr-66 common-voice-telugu --max_hours 1 "
        f"--cv_dataset_id telugu={tmp_path / 'release.tar.gz'} "
        f"--mirror openslr-66={server.url} {mirrors}"
    )


def small(line: str, root: Path, sources: str) -> str:
    """A line of the README as it runs here: in `root`, without the network, within seconds. The
    server stays behind, to be ended after the last line."""
    line = line.replace("/workspace", str(root / "workspace"))
    line = re.sub(r"^make demo.*", "make demo FLAGS=--fast", line)
    line = re.sub(r"^source runpod_setup.sh$", "source runpod_setup.sh --cpu", line)
    script = re.match(r"python ((?:tools/)?\w+\.py)", line)
    if not script or "--export" in line:
        return line
    if script[1] == "serve.py":
        up = f"until curl -fso /dev/null 127.0.0.1:{PORT}/ping; do kill -0 $served; sleep 0.2; done"
        return f"{line} {SMALL[script[1]]} --port {PORT} > serve.log 2>&1 & served=$!; {up}"
    if "--emotion --output" in line:
        few = "grep -E 'en-(greeting|comfort-001|empathy-.01)' conversations/english.jsonl"
        few = f"mkdir few && {few} > few/english.jsonl"
        return f"{few}; {line} {SMALL[script[1]]} --styled 1 --judge_examples 8 --scripts few"
    if "--server" in line:
        line = re.sub(r"wss?://\S+", f"ws://127.0.0.1:{PORT}", line)
        call = "--wav samples/question_english.wav"
        return f"{line} {SMALL['load_test.py'] if script[1] == 'load_test.py' else call}"
    if script[1] == "finetune_emotion.py":
        line = f"mkdir -p data/emotion && cp -r {root / 'AudioWAV'} data/emotion/ && {line}"
    if script[1] == "augment_telugu.py":
        line = f"mkdir -p data/english && cp -r {root / 'own'} data/english/ && {line}"
    return f"{line} {sources if script[1] == 'download_data.py' else SMALL[script[1]]}"


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def machine(root: Path) -> dict[str, str]:
    """The environment of a pod: a volume, an image that has the libraries, no network."""
    stubs = root / "stubs"
    for name in ("apt-get", "tmux", "ffmpeg"):
        stub(stubs, name, "exit 0")
    stub(stubs, "dpkg-query", "echo install ok installed")
    # git clone of the README's address takes this checkout, uncommitted changes and all.
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, names.split("\0")):
        (root / "origin" / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, root / "origin" / name)
    clone = f"cp -r {root / 'origin'} NewProject && ln -s {sys.prefix} NewProject/.venv"
    stub(stubs, "git", f'[[ "$*" == "clone {PLAN_URL}" ]] || exit 1\n{clone}')
    (root / "home").mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(root / "client"), "PIP_NO_INDEX": "1", "HOME": str(root / "home"),
        "HF_ENDPOINT": "http://127.0.0.1:9", "MDC_API_KEY": "key", "SAMVAD_ENV": str(root / "venv"),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def test_every_line_runs_from_a_clone_to_an_answer(sources, tmp_path) -> None:
    """One shell, as a user's: the pages of the README from top to bottom, each line once."""
    pytest.importorskip("parselmouth")
    script = ["set -eo pipefail", f"cd {tmp_path}", "mkdir workspace", "pip() { echo pip $*; }"]
    for line in dict.fromkeys(lines()):
        script += [f"echo {shlex.quote('+ ' + line)} >&2", small(line, tmp_path, sources)]
    script += ["kill $served", "wait $served"]
    made = subprocess.run(
        ["bash", "-c", "\n".join(script)], env=machine(tmp_path), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]

    folder = tmp_path / "workspace/NewProject"
    for run in ("checkpoints_codec", "checkpoints_s2s"):
        checkpoint = checkpoints.load_checkpoint(folder / run)
        assert checkpoint.step == 3 and checkpoint.trainer is not None
    model = Codec.from_checkpoint(folder / "models/codec")
    assert model.decode(model.encode(torch.zeros(1, 1, 4800))).shape == (1, 1, 4800)
    agents = Codec.from_checkpoint(folder / "models/codec", decoder="agent")
    assert agents.fingerprint == model.fingerprint
    assert made.stdout.count("models/codec, agent decoder, dialogue model") == 1  # of the demo
    assert soundfile.info(folder / "reply_english.wav").duration > 1
    found = [json.loads(row) for row in made.stdout.splitlines() if row.startswith("{")]
    assert [row["turns"] for row in found if "tick_ms" in row][-2:] == [1, 1]  # here, then served
    assert (folder / "call.wav").stat().st_size > 1000 and found[-1]["rows"][0]["callers"] == 1
    assert set(json.loads((folder / "emotion.json").read_text())["emotion"]) == {"english"}
    assert (folder / "rates.png").stat().st_size > 1000 and (folder / "codec.json").exists()

    # The hours that training starts with: all of Telugu, and more with the copies than without.
    assert {path.name for path in (folder / "data/telugu").iterdir()} >= {"augmented"}
    clips = data.load_clips([folder / "data/telugu"], "train")
    real = [clip for clip in clips if not clip.augmented]
    assert len(clips) == 6 * len(real)
    hours, without = (data.hours_by_language(some)["telugu"] for some in (clips, real))
    said = re.search(r"^data: .*telugu ([\d.]+) h", made.stdout, re.MULTILINE)
    assert said and said.group(1) == f"{hours:.1f}" != f"{without:.1f}"
