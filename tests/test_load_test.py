"""Paced callers against the server over fake models, and what they make of what comes back."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import load_test
from command import UserError
from load_test import find_capacity, holds, main

pytest.importorskip("fastapi")
pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")
import test_serve  # noqa: E402

RATE = 24000


@pytest.fixture
def wav(tmp_path) -> str:
    path = tmp_path / "q.wav"  # so low that a frame's mean, all that the fake codec keeps, has it
    tone = 0.5 * np.sin(2 * np.pi * 12 * np.arange(RATE // 2) / RATE)
    soundfile.write(path, np.pad(tone, RATE // 5), RATE)
    return str(path)


def rows_of(capsys, *argv: str) -> tuple[dict, str]:
    main(["--seconds", "2", "--ramp_seconds", "0.5", "--answer_seconds", "1", *argv])
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


def test_a_ramp_of_callers_who_are_answered(wav, capsys, monkeypatch):
    monkeypatch.setattr(load_test, "kind_of", lambda latency: "answered" if latency else "no")
    with test_serve.serving("--token", "abc", engine=test_serve.echo_engine(3)) as running:
        flags = ["--server", running.address, "--token", "abc", "--wav", wav]
        result, printed = rows_of(capsys, *flags, "--callers", "1", "3")
    one, three = result["rows"]
    assert (one["callers"], three["callers"]) == (1, 3)
    assert three["turns"] == 3 * one["turns"] >= 6 and three["answered"] == three["turns"]
    # Who repeats what it hears begins a patch, and what the network takes, after the question did.
    assert -470 < one["response_ms"]["p50"] < 300
    assert one["refused"] == one["cut_off"] == one["dropped_patches"] == 0
    assert one["tick_ms"]["n"] >= 2 and one["memory_mb"] > 0 and one["cpu_cores"] > 0
    assert printed.count("answered") >= 1 and "3/3" not in printed.splitlines()[0]
    assert "GPU" not in printed and one["gpu_percent"] is one["gpu_memory_mb"] is None


@pytest.mark.parametrize(("said", "percent"), [("37", 37), ("[N/A]", None)])
def test_the_load_of_a_gpu_is_shown(said, percent, wav, capsys, monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\ntest "$4" = GPU-ab-12 && echo "{said}"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    card = SimpleNamespace(uuid="ab-12")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    engine = test_serve.echo_engine()
    engine.device = torch.device("cuda")
    with test_serve.serving(engine=engine) as running:
        engine.device = torch.device("cpu")
        flags = ["--server", running.address, "--wav", wav, "--callers", "1"]
        result, printed = rows_of(capsys, *flags)
    (row,) = result["rows"]
    assert (row["gpu_percent"], row["gpu_memory_mb"]) == (percent, 3072)
    assert ("GPU %" in printed, "GPU MB" in printed) == (percent is not None, True)


def test_a_caller_s_ear_is_on_time_again_after_a_stall(wav, capsys, monkeypatch):
    """Half a second in which nothing comes delays an answer, not all that follow."""
    monkeypatch.setattr(load_test, "kind_of", lambda latency: "answered" if latency else "no")
    engine = test_serve.echo_engine()
    run_once, waits = engine.run_once, iter([0.5])
    monkeypatch.setattr(engine, "run_once", lambda: (time.sleep(next(waits, 0)), run_once())[1])
    with test_serve.serving(engine=engine) as running:
        flags = ["--server", running.address, "--wav", wav, "--callers", "1", "--seconds", "6"]
        result, _ = rows_of(capsys, *flags)
    (row,) = result["rows"]
    assert row["turns"] == row["answered"] == 4 and row["dropped_patches"] == 0
    assert row["response_ms"]["p95"] - row["response_ms"]["p50"] > 200


def test_who_is_refused_counts_and_a_server_that_takes_none_is_one_line(wav, capsys):
    with test_serve.serving(engine=test_serve.echo_engine(1)) as running:
        result, _ = rows_of(capsys, "--server", running.address, "--wav", wav, "--callers", "3")
        assert result["rows"][0]["refused"] == 2 and not holds(result["rows"][0])
    with pytest.raises(UserError, match="took no caller"):
        rows_of(capsys, "--server", running.address, "--wav", wav, "--callers", "2")


def test_a_server_that_dies_in_mid_call_is_a_count_alone(wav, capsys, caplog):
    engine = test_serve.echo_engine(1)
    run_once, ticks = engine.run_once, list(range(20))
    engine.run_once = lambda: (ticks.pop(), run_once())[1]  # IndexError, once they are over
    with test_serve.serving(engine=engine) as running:
        result, _ = rows_of(capsys, "--server", running.address, "--wav", wav, "--callers", "1")
    gc.collect()
    assert result["rows"][0]["cut_off"] == 1 and "never retrieved" not in caplog.text


@pytest.mark.parametrize("protocol", ["moshi", "openai", "twilio"])
def test_the_other_protocols_carry_a_question_and_its_answer(protocol, wav, capsys, monkeypatch):
    import protocols

    if load_test.PATHS[protocol] not in protocols.PROTOCOLS:
        pytest.skip("the server does not speak it yet")
    if protocol == "moshi":
        pytest.importorskip("sphn")
    monkeypatch.setattr(load_test, "kind_of", lambda latency: "answered" if latency else "no")
    with test_serve.serving() as running:
        flags = ["--server", running.address, "--wav", wav, "--callers", "1"]
        result, _ = rows_of(capsys, *flags, "--protocol", protocol)
    (row,) = result["rows"]
    assert row["turns"] == row["answered"] >= 2 and row["refused"] == row["cut_off"] == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 8, 13, 100])
@pytest.mark.parametrize("most", [1, 8, 13, 64])
def test_capacity_is_found_to_the_caller(limit, most):
    asked = []

    def measured(callers: int) -> dict:
        asked.append(callers)
        p95 = 399.0 if callers <= limit else 401.0
        return {"response_ms": {"p95": p95}, "dropped_patches": 0, "refused": 0, "cut_off": 0}

    assert find_capacity(measured, most) == min(limit, most)
    assert len(asked) == len(set(asked)) and len(asked) < 14


@pytest.mark.parametrize(("tick", "told"), [(52.0, True), (20.0, False)])
def test_a_server_with_too_many_slots_is_told_of_them(tick, told, wav, monkeypatch, capsys):
    async def measure(args, questions, callers):
        row = {**dict.fromkeys(load_test.COLUMNS, 0), "caller_late_ms": 0.0, "callers": callers}
        return {**row, "response_ms": {"p95": 800.0}, "tick_ms": {"p95": tick}}

    monkeypatch.setattr(load_test, "measure", measure)
    main(["--find_capacity", "--most_callers", "4", "--wav", wav])
    assert ("give the server fewer --slots" in capsys.readouterr().out) == told


def test_what_holds():
    fine = {"response_ms": {"p95": 399.9}, "dropped_patches": 0, "refused": 0, "cut_off": 0}
    assert holds(fine)
    for worse in ({"response_ms": None}, {"response_ms": {"p95": 400.0}}, {"dropped_patches": 1},
                  {"refused": 1}, {"cut_off": 1}):  # fmt: skip
        assert not holds({**fine, **worse})


def test_the_load_of_a_server_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import load_test"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(load_test.__file__).parent)
