"""What gathers a GPU's results: a part that fails is a row, what was measured stays."""

import json
import sys
import time

import numpy as np
import pytest

from command import UserError
from tools import gpu_check


def run_of(pace, steps=(5, 10), mel=1.0, **changes):
    rows = [{"step": step, "mel": mel, "audio_seconds_per_second": pace} for step in steps]
    return {"audio_seconds_per_second": pace, "peak_gib": 12.0, "data_wait": 0.1, "rows": rows,
            "estimate": "an epoch is 60.0 h; 100 epochs = 9 steps = 2 h", **changes}  # fmt: skip


def test_a_part_that_fails_is_a_row_and_the_others_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPU_CHECK_SMOKE", "1")
    monkeypatch.setattr(gpu_check, "PARTS", {
        "train_s2s": lambda place: {"listening": run_of(100.0), "full": run_of(50.0), "plan":
            gpu_check.plan_of(1200, 0.5, run_of(100.0), run_of(50.0))},
        "tick": lambda place: 1 / 0,
    })  # fmt: skip
    output = ["--output", str(tmp_path / "new" / "out.json")]
    assert gpu_check.main([*output, "tick"]) == 1
    assert gpu_check.main([*output, "train_s2s"]) == 0
    parts = json.loads((tmp_path / "new" / "out.json").read_text())["parts"]
    assert parts["tick"]["failed"] == "ZeroDivisionError: division by zero"
    assert parts["train_s2s"]["plan"] == {"measured_hours": 18.0, "measured_usd": 61.02}
    printed = capsys.readouterr().out
    assert "failed                ZeroDivisionError" in printed
    assert "50 audio s/s, 12.0 GiB, 10% of it" in printed and "18.0 h = $61" in printed


def test_a_run_without_a_pace_gives_no_hours():
    nothing = run_of(None, steps=(), estimate=None)
    plan = gpu_check.plan_of(10, 0.1, run_of(9.0), nothing)
    assert plan["measured_hours"] is None
    cut = {"listening": {**nothing, "failed": "cut off"}, "full": run_of(9.0), "plan": plan}
    assert "no pace, 12.0 GiB, 10% of it waiting for data; cut off" in gpu_check.table({"a": cut})


def test_losses_are_compared_at_the_steps_of_both():
    eager, graph = run_of(1.0, mel=2.0), run_of(1.0, steps=(10, 15), mel=2.02)
    assert gpu_check.agreement(eager, graph) == {"mel": 0.01}
    assert gpu_check.agreement(eager, run_of(1.0, steps=(20,))) == {}


def test_a_program_is_cut_off_and_what_it_printed_stays(tmp_path):
    script = "import time; print('begun', flush=True); time.sleep(60)"
    started = time.monotonic()
    code, log = gpu_check.call([sys.executable, "-c", script], tmp_path, 1.0)
    assert (code, log) == (124, "begun\n") and time.monotonic() - started < 10


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("GPU_CHECK_SMOKE", raising=False)
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here"):
        gpu_check.main([])
    with pytest.raises(SystemExit):
        gpu_check.main(["nonsense"])
    assert "no part nonsense" in capsys.readouterr().err


def tick_part(tmp_path, monkeypatch, capsys, seconds: str) -> tuple[dict, str]:
    monkeypatch.setenv("GPU_CHECK_SMOKE", "1")
    output = tmp_path / "r.json"
    assert gpu_check.main(["tick", "--output", str(output), "--seconds", seconds]) == 0
    return json.loads(output.read_text())["parts"]["tick"], capsys.readouterr().out


def test_moshi_is_timed_beside_the_engine(tmp_path, monkeypatch, capsys):
    pytest.importorskip("moshi")
    found, printed = tick_part(tmp_path, monkeypatch, capsys, "1")
    for slots in (1, 2):
        stages = found[f"{slots} slots, moshi"]
        assert list(stages) == ["encode", "lm", "decode", "total"] and stages["lm"]["n"] >= 2
        whole = sum(stages[name]["p50"] for name in ("encode", "lm", "decode"))
        assert stages["total"]["p50"] == pytest.approx(whole, rel=0.5) and whole > 0
    assert "2 slots, 1 s of audio" in printed


def test_how_far_two_engines_are_apart_is_told_from_its_first_tick():
    said = [np.zeros((1, 2, 2), int) for _ in range(4)]
    assert gpu_check.apart(said, said[:3]) == "0.00% of the codes, in none of 3"
    others = [*said[:2], said[2] + [[1], [0]], said[3] + 1]
    assert gpu_check.apart(said, others) == "37.50% of the codes, first in tick 2 of 4"


def test_without_moshi_one_line_says_so(tmp_path, monkeypatch, capsys):
    for name in ("moshi", "moshi.models"):
        monkeypatch.setitem(sys.modules, name, None)
    found, printed = tick_part(tmp_path, monkeypatch, capsys, "1")
    assert "its package is not here" in found["moshi"]
    assert sum("moshi " in line for line in printed.splitlines()) == 1


def test_ticks_of_unequal_lengths_are_compared_by_the_second():
    total = {"total": {"p50": 4.0, "p95": 5.0}}
    found = {"8 slots, graphs": total, "8 slots, moshi": total}
    found["8 slots, graphs apart"] = "0.00% of the codes, in none"
    assert gpu_check.a_second(found) == {"8 slots, 1 s of audio": "graphs 100, moshi 50 ms"}
