"""What every script shares: flags, one-line errors, folders, JSON lines, cores, processes.

Needs the standard library alone, so that a wrong flag is refused at once.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TextIO

LANGUAGES = ("english", "hindi", "telugu", "other")
EMOTIONS = ("neutral", "happy", "sad", "angry", "fear", "disgust", "surprise", "calm")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_CGROUP = Path("/sys/fs/cgroup")


class UserError(Exception):
    """A mistake or a shortage the user can mend. One line: what, where, what to do."""


def run(main: Callable[[], int | None], resumes: bool = True) -> None:
    """Run a script's `main`: what the user can mend, and what the system refuses, ends in one line
    on stderr and exit code 1. Ctrl-C exits 130; `resumes`: the same command then goes on. Bugs keep
    their traceback. Printing never fails: not for an encoding, nor where nobody reads on."""
    sys.stdout, sys.stderr = _unfailing(sys.stdout), _unfailing(sys.stderr)
    try:
        code, message = main(), ""
    except UserError as error:
        code, message = 1, f"error: {error}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, message = 1, f"error: {where}{why(error)}"
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if resumes else ""
        code, message = 130, f"interrupted{goes_on}"
    if message:
        print(message, file=sys.stderr)
    if code:
        sys.exit(code)


def why(error: BaseException) -> str:
    """What the system refused, as a part of one line."""
    if getattr(error, "errno", None) in DISK_FULL:
        return "the disk is full; free some space and run again"
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: BaseException, most: int = 160) -> str:
    """An exception as a part of one line."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)[:most]


class _Drain(io.FileIO):
    """A raw stream that drops what is refused (`| head`, a full disk) and all that follows."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return len(data)


def _unfailing(stream: TextIO | None) -> TextIO:
    """A stream whose writes never fail; one that a caller put in its place stays."""
    if stream is None:  # closed by the shell: `>&-`
        return open(os.devnull, "w", encoding="utf-8")
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Drain(stream.fileno(), "w", closefd=False))
    lines = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=lines)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = (action.help or "").endswith("]")  # in brackets, as of a secret from the environment
        shown = action.default is not None and action.default is not False and not told
        return super()._get_help_string(action) if shown else action.help


class ArgumentParser(argparse.ArgumentParser):
    """With defaults in its help, one line for a wrong flag, and no abbreviated ones."""

    def __init__(self, description: str, formatter_class: type = _Help, **settings) -> None:
        settings |= {"formatter_class": formatter_class, "allow_abbrev": False}
        super().__init__(description=description, **settings)

    def given(self, argv: list[str] | None = None) -> frozenset[str]:
        """The names of the flags that the command line holds, whatever their values."""
        unset = argparse.Namespace(**{action.dest: None for action in self._actions})
        values = vars(self.parse_args(argv, unset))
        return frozenset(name for name, value in values.items() if value is not None)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def number(low: float = -math.inf, high: float = math.inf, above: float = -math.inf,
           kind: type = float) -> Callable[[str], float]:  # fmt: skip
    """A flag's `type`: a finite number of at least `low`, at most `high`, more than `above`."""
    bounds = {"at least": low, "more than": above, "at most": high}
    named = [f"{name} {bound:g}" for name, bound in bounds.items() if abs(bound) < math.inf]
    wanted = " and ".join(named) or "finite"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
        if not (abs(value) < math.inf and low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {wanted}")
        return value

    return parse


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """A flag's `type`: a whole number from `low` to `high`."""
    return number(low, high, kind=int)


share = number(0.0, 1.0)  # a flag's `type`


def default_workers(most: int = 16) -> int:
    """Processes to start where the user names no number: one a core that this one may use, by its
    affinity and the cgroup's quota. A rented pod shows all cores of its host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(most, math.floor(min(cores or 1, _cgroup_quota()) + 0.5)))


def _cgroup_quota() -> float:  # in cores, by cgroup v2, then v1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((_CGROUP / file).read_text() for file in files).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    return math.inf


def run_parts(work: Callable, parts: Sequence, num_workers: int, total: int) -> Iterator:
    """`work(part)` of each part, in their order, by `num_workers` processes, or (0) in this one.
    `total`: with those made before, for the progress bar. Raises UserError where one dies."""
    from tqdm import tqdm

    bar = tqdm(total=total, initial=total - len(parts), unit="part", disable=None, smoothing=0.1)
    printed = time.monotonic()
    with contextlib.closing(_results(work, parts, num_workers)) as results, bar:
        for done, result in enumerate(results, total - len(parts) + 1):
            bar.update()
            if bar.disable and (time.monotonic() - printed > 30 or done == total):  # in a log
                printed = time.monotonic()
                print(f"{done}/{total} parts", file=sys.stderr)
            yield result


def _results(work: Callable, parts: Sequence, num_workers: int) -> Iterator:
    if num_workers == 0 or len(parts) < 2:
        yield from map(work, parts)
        return
    workers = min(num_workers, len(parts))
    # spawn: forked copies of a process that has used torch's or onnxruntime's threads hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    waiting, ahead = iter(parts), deque()
    try:
        # Four each, so that results that nobody has taken do not fill the memory.
        ahead.extend(pool.submit(work, part) for part in itertools.islice(waiting, 4 * workers))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(work, part) for part in itertools.islice(waiting, 1))
            yield result
    except BrokenExecutor as error:
        died = "a worker process ended without an answer (out of memory?)"
        raise UserError(f"{died}; the same command goes on: give it fewer --num_workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """Ends at Ctrl-C, without a traceback, and with its parent; torch uses one thread."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def existing_folder(path: str | Path, flag: str, remedy: str = "") -> Path:
    """`path` as the absolute path of a folder that is there. Raises UserError naming `flag`."""
    if not Path(path).is_dir():
        raise UserError(f"{flag} {path}: no such folder{remedy}")
    return Path(path).resolve()


def writable_folder(path: str | Path, flag: str) -> Path:
    """`path` as a folder that can be written, made where it is missing. UserError names `flag`."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {folder}: cannot be written ({why(error)})") from None
    return folder


def writable_file(path: str | Path, flag: str) -> Path:
    """`path` as a file that can be written; what it holds stays. Raises UserError naming `flag`."""
    file = Path(path)
    writable_folder(file.parent, flag)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(file, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot be written ({why(error)})") from None
    return file


def needed(module: str, lacking: str) -> Any:
    """An optional module; UserError, which says what is `lacking`, where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(lacking) from error


@contextlib.contextmanager
def atomic_write(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Where to write a file that takes the name `path` where the block ends without an exception.
    Links are followed; a device or a pipe is written itself. `sync`: on the disk before it takes
    the name. A kill leaves a hidden `.part` file behind."""
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        yield real
        return
    # Short, as the name may be as long as the system allows; this process's own.
    digest = hashlib.sha256(os.fsencode(real.name)).hexdigest()[:16]
    part = real.with_name(f".{digest}.{os.getpid()}.part")
    try:
        yield part
        if sync:
            sync_to_disk(part)
        os.replace(part, real)
        if sync:
            sync_to_disk(real.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, atomically."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def sync_to_disk(path: str | Path) -> None:
    """Returns once what was written to a file, or the names in a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_name(name: str, most: int = 200) -> str:
    """`name` where it is UTF-8 of at most `most` bytes; else cut to that, with a hash of it."""
    raw, valid = name.encode("utf-8", "surrogatepass"), name.encode("utf-8", "ignore")
    if raw == valid and len(raw) <= most:
        return name
    stem, suffix = os.path.splitext(valid.decode())
    if len(suffix.encode()) > 8:
        stem, suffix = stem + suffix, ""
    suffix = f"-{hashlib.sha256(raw).hexdigest()[:8]}{suffix}"
    return stem.encode()[: most - len(suffix.encode())].decode("utf-8", "ignore") + suffix


@contextlib.contextmanager
def only_one(folder: str | Path) -> Iterator[None]:
    """Holds `folder/.lock` while this process lives: a second one there is refused (UserError)."""
    import fcntl  # Windows has none: the demo runs there, training does not

    with open(Path(folder) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = "another process is at work in this folder; wait for it, or choose another"
            raise UserError(f"{folder}: {said}") from None
        except OSError:  # a network volume without locks
            pass
        yield


def json_lines(path: str | Path, skip_damaged: bool = False) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank; UserError as of `json_line`. Lines end
    at a line feed alone: U+2028, U+2029 and U+0085 are legal within a JSON string. `skip_damaged`:
    passes over a bad line, as in a log whose last one a kill cut short."""
    with open(path, "rb") as file:
        for at, line in enumerate(file, start=1):
            if not line.strip():
                continue
            with contextlib.suppress(UserError) if skip_damaged else contextlib.nullcontext():
                yield at, json_line(line, f"{path}, line {at}")


def append_json_line(path: str | Path, row: dict) -> None:
    """Add a line to a log; one before it that a kill cut short does not swallow it."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(as_json_line(row).encode())


def finite_or_none(value: float | int | str | None) -> float | int | str | None:
    """What JSON can hold: a float, or a tensor of one, is a finite float or None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return float(value) if math.isfinite(value) else None


def read_json(path: str | Path, remedy: str = "remove it") -> dict:
    """The object that a file holds; UserError with the `remedy` where it is damaged."""
    try:
        return json_line(Path(path).read_bytes(), str(path))
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def json_line(line: bytes, where: str) -> dict:
    """The object in one line, a byte order mark aside; UserError that names `where` for another."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def printable(text: str) -> str:
    """Text that UTF-8 can write: a file's name may hold other bytes."""
    return text.encode(errors="backslashreplace").decode()


def as_json_line(row: dict) -> str:
    """A line of JSON. Escaped: what is not UTF-8, or a line's end to others than `json_lines`."""
    line = json.dumps(row, ensure_ascii=False)
    odd = re.search("[\u2028\u2029\x85\ud800-\udfff]", line)
    return f"{json.dumps(row) if odd else line}\n"


def text_lines(path: str | Path, errors: str = "strict") -> list[str]:
    """The lines of a text file in UTF-8, which a line feed alone ends; `errors` as of `decode`.
    Raises UserError that names a file that is not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def check_fields(row: dict, kinds: dict[str, str | tuple], where: str) -> None:
    """Raises UserError that names place and field unless the fields of `row` are of these kinds:
    name → one of _KINDS, or `list of` one, with `?` where the field may be missing or null; or a
    tuple of the values that it may have (None: missing or null). Other fields pass."""
    for name, kind in kinds.items():
        value = row.get(name)
        if not _matches(value, kind):
            shown = json.dumps(value, ensure_ascii=False, default=str) if name in row else "missing"
            wanted = kind if isinstance(kind, str) else f"one of {', '.join(filter(None, kind))}"
            wanted = wanted.removesuffix("?")
            raise UserError(f"{where}: {name} is {shown[:40]}, where {wanted} is needed")


def _matches(value: object, kind: str | tuple) -> bool:
    if isinstance(kind, tuple):
        return value in kind if isinstance(value, str) else value is None and None in kind
    name = kind.removesuffix("?")
    if value is None:
        return name != kind
    if name.startswith("list of "):
        return isinstance(value, list) and all(map(_KINDS[name.removeprefix("list of ")], value))
    return _KINDS[name](value)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # no true or false


def _is_span(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        return False
    return all(map(_is_number, value[1:])) and 0 <= value[1] <= value[2]


_KINDS: dict[str, Callable[[object], bool]] = {
    # JSON may hold half of a surrogate pair, which nothing that is printed or written can.
    "text": lambda value: isinstance(value, str) and not re.search("[\ud800-\udfff]", value),
    "path": lambda v: isinstance(v, str) and re.fullmatch("[^\0\ud800-\udc7f\udd00-\udfff]+", v),
    "number": _is_number,
    "number or NaN": lambda value: type(value) in (int, float),
    "whole number": lambda value: type(value) is int and _is_number(value),
    "true or false": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "[text, start, end]": _is_span,  # in seconds, 0 <= start <= end
}
