"""command.py: one line for what the user can mend, flags in range, folders, JSON lines, cores."""

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import command
from command import UserError

ROOT = Path(command.__file__).parent


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("data: empty; add audio"), 1, "error: data: empty; add audio"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left", "a.wav"), 1, "a.wav: the disk is full; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), 1, "b: Permission denied"),
        (OSError("stale handle"), 1, "stale handle"),
    ],
)
def test_run_ends_in_one_line(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    assert caught.value.code == code
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_run_passes_success_codes_and_bugs_through():
    assert command.run(lambda: None) is None
    with pytest.raises(SystemExit) as caught:
        command.run(lambda: 3)
    assert caught.value.code == 3
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 / 0)


def test_what_is_printed_does_not_fail_for_the_terminals_encoding():
    script = "import command\ncommand.run(lambda: print('తెలుగు'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0 and b"\\u0c24" in done.stdout, done.stderr


@pytest.mark.parametrize("shell", ["{} | head -c 3", "{} > /dev/full", "{} >&-", "{} >&- 2>&-"])
def test_what_nobody_reads_does_not_cost_the_work(tmp_path, shell):
    body = "[print('x' * 9999, flush=True) for _ in range(99)], open('done', 'w')"
    script = f'"{sys.executable}" -c "import command; command.run(lambda: ({body}) and None)"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command_line = shell.format(script)
    done = subprocess.run(
        command_line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr and (tmp_path / "done").exists()


def test_numbers_wholes_and_shares():
    assert command.number(0, 2)("1.5") == 1.5 and command.whole(1)("7") == 7
    assert command.share("1") == 1.0
    wrong = [
        (command.number(), "nan", "must be finite"),
        (command.number(0), "inf", "at least 0"),
        (command.number(above=0), "0", "more than 0"),
        (command.number(0, 1), "1.1", "at least 0 and at most 1"),
        (command.number(), "ten", "'ten' is not a number"),
        (command.whole(1), "1.5", "is not a whole number"),
        (command.whole(1, 4), "5", "at most 4"),
        (command.whole(1), "9" * 5000, "not a whole number"),
        (command.whole(1, 9), "9" * 400, "at most 9"),
        (command.number(), "9" * 400, "must be finite"),
        (command.share, "-0.1", "out of range"),
    ]
    for parse, text, told in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=told):
            parse(text)


def test_a_wrong_flag_is_one_line_and_abbreviations_are_wrong(capsys):
    parser = command.ArgumentParser("A test.")
    parser.add_argument("--batch_size", type=command.whole(1), default=2)
    parser.add_argument("--names", nargs="+", default=["a"])
    parser.add_argument("--all", action="store_true")
    assert parser.parse_args([]).batch_size == 2 and parser.given([]) == set()
    assert parser.given(["--batch_size", "2", "--names", "a", "b"]) == {"batch_size", "names"}
    for argv in (["--batch_size", "0"], ["--batch", "3"], ["--unknown"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(argv)
        shown = capsys.readouterr().err
        assert stop.value.code == 2 and shown.count("\n") == 1 and argv[0] in shown


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 96),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 96),
        ({"cpu.max": "nonsense"}, 96),
        ({}, 96),
    ],
)
def test_cores_are_this_process_own(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    monkeypatch.setattr(command, "_CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert command.default_workers(96) == cores and command.default_workers() == min(cores, 16)


def test_folders_and_files_that_cannot_be_written(tmp_path):
    assert command.writable_folder(tmp_path / "new" / "deep", "--out").is_dir()
    file = tmp_path / "file"
    file.write_text("kept")
    assert command.writable_file(file, "--out") == file and file.read_text() == "kept"
    for wrong in (file, file / "below", "/sys/new", "a\0b"):
        with pytest.raises(UserError, match="^--out .*cannot be written") as caught:
            command.writable_folder(wrong, "--out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="Is a directory"):
        command.writable_file(tmp_path, "--out")
    with pytest.raises(UserError, match="^--out .*cannot be written"):
        command.writable_file(tmp_path / ("n" * 300), "--out")


def test_a_result_is_written_whole_or_what_stood_there_stays(tmp_path):
    file = tmp_path / "result.json"
    command.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        command.write_text(file, "\udcff")
    command.write_text("/dev/null", "new")
    assert os.listdir(tmp_path) == [file.name]
    assert file.read_text() == "old" and Path("/dev/null").is_char_device()


def test_what_a_block_writes_takes_its_name_only_where_the_block_ends(tmp_path):
    file, link = tmp_path / "a.bin", tmp_path / "link.bin"
    link.symlink_to(file)
    with command.atomic_write(link) as part:
        part.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), command.atomic_write(file, sync=False) as part:
        part.write_bytes(b"new")
        raise ZeroDivisionError
    assert file.read_bytes() == b"old" and link.is_symlink() and len(os.listdir(tmp_path)) == 2


def test_one_process_a_folder_and_the_lock_goes_with_it(tmp_path):
    second = command.only_one(tmp_path)
    with (
        command.only_one(tmp_path),
        pytest.raises(UserError, match="another process is at work"),
    ):
        second.__enter__()
    script = f"import command\nwith command.only_one({str(tmp_path)!r}): command.os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 9
    with command.only_one(tmp_path):
        pass


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        ("text", ["", "न\u2028ा"], [1, None, ["a"], True, "\ud83d"]),
        ("text?", ["a", None], [0, []]),
        ("path", ["../a.wav", "/b", "\udcff.wav"], ["", None, 3, "a\0"]),
        ("number", [0, -1.5], [float("nan"), float("inf"), 10**400, "1", True, None]),
        ("whole number", [3], [3.0, False, "3"]),
        ("true or false", [True, False], ["false", 0, 1, None]),
        ("list of text", [[], ["a"]], ["ab", [1], None]),
        ("list of [text, start, end]?", [None, [["a", 0, 0.5]]],
         ["ab", [["a", 0.5, 0]], [["a", -1, 0]], [[1, 0, 1]], [["a", 0, None]], [["a", 0]]]),
        (("hindi", "english"), ["hindi"], ["urdu", 0, None, ["hindi"]]),
        (("happy", None), ["happy", None], ["", "glad", 1]),
    ],
)  # fmt: skip
def test_a_field_is_of_its_kind_or_named(kind, right, wrong):
    for value in right:
        command.check_fields({"field": value}, {"field": kind}, "x.jsonl, line 7")
    for value in wrong:
        with pytest.raises(command.UserError, match="x.jsonl, line 7: field is"):
            command.check_fields({"field": value}, {"field": kind}, "x.jsonl, line 7")


@pytest.mark.parametrize(
    "line", [b"{", b"\xff\xfe{}", b"[1]", b"null", b'{"a": "\n', b"[" * 100000, b"{} {}"]
)
def test_a_bad_json_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"a": "\u2028\u2029\x85"}\r\n\n'.encode() + line)
    rows = command.json_lines(tmp_path / "a.jsonl")
    assert next(rows) == (1, {"a": "\u2028\u2029\x85"})
    with pytest.raises(command.UserError, match=r"a\.jsonl, line 3: not") as caught:
        next(rows)
    assert "\n" not in str(caught.value)


def test_a_log_goes_on_after_a_line_that_was_cut_short(tmp_path):
    log = tmp_path / "log.jsonl"
    command.append_json_line(log, {"step": 1, "text": "न"})
    log.write_bytes(log.read_bytes() + b'{"step": 2, "te')
    for step in (3, 4):
        command.append_json_line(log, {"step": step})
    rows = command.json_lines(log, skip_damaged=True)
    assert [(number, row["step"]) for number, row in rows] == [(1, 1), (3, 3), (4, 4)]


def test_json_is_read_or_named_and_holds_no_nan(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert command.read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="a.json: not JSON .*; make it anew$"):
        command.read_json(tmp_path / "a.json", "make it anew")
    values = [1.5, float("nan"), float("-inf"), 3, True, "a", None]
    wanted = [1.5, None, None, 3, True, "a", None]
    assert [command.finite_or_none(value) for value in values] == wanted


def test_a_file_in_the_making_has_a_short_name_of_its_own(tmp_path):
    parts = set()
    for name in ("न" * 80 + "abc.wav.textgr1", "న" * 80 + "abd.wav.textgr1", "\udcff.wav"):
        with command.atomic_write(tmp_path / name) as part:
            part.touch()
            parts.add(part)
        assert name in os.listdir(tmp_path)
    assert len(parts) == 3 and all(len(os.fsencode(part.name)) < 50 for part in parts)


def _part(part):
    if part == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return part, os.getpid()


def test_parts_come_in_order_from_processes_or_here(capsys):
    here = list(command.run_parts(_part, [1, 2], 0, 3))
    assert here == [(1, os.getpid()), (2, os.getpid())]
    assert "3/3 parts" in capsys.readouterr().err
    there = list(command.run_parts(_part, range(9), 2, 9))
    assert [part for part, _ in there] == list(range(9))
    assert os.getpid() not in {process for _, process in there}
    with pytest.raises(UserError, match="fewer --num_workers"):
        list(command.run_parts(_part, [1, "dies", 3], 2, 3))


def _sleep(part):
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece, beside the other worker's
    time.sleep(60)


def test_workers_end_with_a_parent_that_is_killed():
    code = "import command, tests.test_command as t; [*command.run_parts(t._sleep, [1, 2], 2, 2)]"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(_lives, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(_lives, workers))


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("script", ["stream_demo", "load_test", "serve"])
def test_help_keeps_a_token_of_the_environment_to_itself(script, monkeypatch, capsys):
    monkeypatch.setenv("SAMVAD_TOKEN", "not-for-the-terminal")
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    said = capsys.readouterr().out
    assert "[$SAMVAD_TOKEN]" in said and "not-for-the-terminal" not in said
