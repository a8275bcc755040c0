"""The README says what is true: files exist, commands are accepted, no figure is a placeholder."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
NOT_YET = "(not yet here)"


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def map_rows() -> list[tuple[str, bool]]:
    """File names of the file map's tables, each with whether it is said to exist."""
    rows = re.findall(r"^\| `([^`]+)`(.*?) \|", section("The file map"), flags=re.MULTILINE)
    return [(name, NOT_YET not in rest) for name, rest in rows]


def commands() -> list[tuple[str, str]]:
    """(script, flag) for every `python script.py --flag …` in code blocks and in the Makefile."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    text = "\n".join([*blocks, MAKEFILE]).replace("\\\n", " ")
    found = set()
    for script, rest in re.findall(r"python (\w+\.py)([^\n]*)", text):
        for flag in re.findall(r"(?<!\S)--\w+", rest) or ["--help"]:
            found.add((script, flag))
    return sorted(found)


@functools.cache
def help_text(script: str) -> str:
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("name", "exists"), map_rows())
def test_file_map_is_true(name: str, exists: bool) -> None:
    assert (REPOSITORY / name).exists() == exists


def test_every_python_file_is_in_the_map() -> None:
    named = {name for name, _ in map_rows()}
    assert {path.name for path in REPOSITORY.glob("*.py")} <= named


def test_files_beside_the_map_exist() -> None:
    beside = section("The file map").split("Beside them:")[1]
    for name in re.findall(r"`([^`]+)`", beside):
        assert list(REPOSITORY.glob(name.rstrip("/"))), f"{name} is named but not here"


@pytest.mark.parametrize(("script", "flag"), commands())
def test_pasted_commands_are_accepted(script: str, flag: str) -> None:
    assert (REPOSITORY / script).exists(), f"{script} stands in a code block but is not here"
    assert re.search(rf"{flag}\b", help_text(script)), f"{script} does not know {flag}"


def test_links_to_files_are_not_broken() -> None:
    for name in re.findall(r"`(checkpoints/[^`]+\.md|samples/[^`]+\.wav)`", README):
        assert (REPOSITORY / name).exists(), f"{name} is named but not here"


def test_no_figure_is_missing() -> None:
    assert re.findall(r"TODO-FIGURE\((\w+)\)", README) == []


def test_make_targets_exist() -> None:
    for target in re.findall(r"make (\w+)", README):
        if target in ("demo", "test", "lint", "tiny"):
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)
