"""How bytes arrive: HTTP that goes on where it was cut, shards of the Hugging Face Hub, archives
unpacked safely, audio made readable, several fetches side by side. What the bytes mean, corpus by
corpus, is in corpora.py.

Nothing here is left half-done under its final name: it lands beside it and is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
import requests
import soundfile
import urllib3
from tqdm import tqdm

from audio import AudioError, probe
from command import UserError, atomic_write, file_name, first_line

# Seconds to wait before try 2, 3, … of a request, counted from the last byte that arrived, and
# before a corpus that met a passing fault goes on: half an hour in all.
BACK_OFF_S = (1, 2, 4, 8, 15, 30) + (60,) * 29
RETRY_S = (5.0, 60.0, 300.0, 600.0, 900.0)
QUIET_S = 900.0  # after so long without a fault, faults are counted anew
TIMEOUT_S = (15, 60)  # to connect, between two reads
CHUNK = 1 << 20  # bytes
PLAIN_LINE_S = 60.0  # between two lines of progress in a log file
GIGABYTE = 1e9
FILE_THREADS = 4  # per corpus, for writing, packing and probing
# What libsndfile calls a format -> the suffix of its files.
SUFFIXES = {"WAVEX": ".wav", "RF64": ".wav", "MPEG": ".mp3"}
SUFFIXES |= {name: f".{name.lower()}" for name in ("WAV", "AIFF", "OGG", "FLAC", "MP3")}
# What a network volume says for a while, beside refused and timed out connections.
_PASSING = (
    errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
)  # fmt: skip
_BUSY = (408, 429, *range(500, 600))
_REFUSED = {401: "access denied", 403: "access denied", 404: "not there", 410: "gone"}


class Stopped(Exception):
    """The run was interrupted; raised in a worker so that it ends at its next byte."""


class Damaged(UserError):
    """An archive or shard whose bytes cannot be right."""


class Busy(UserError):
    """A server that does not answer now."""


# ------------------------------------------------------------------------------------ progress


class Bar:
    """The progress of one corpus in bytes: a bar on a terminal, else a plain line a minute."""

    def __init__(self, name: str, total: int = 0, stopped: threading.Event | None = None) -> None:
        self.stopped = stopped or threading.Event()
        self.unpack_seconds = 0.0
        self.count = 0  # bytes so far
        self._name, self._total = name, total or None
        self._shown = tqdm(
            total=self._total, desc=f"{name:<20.20}", unit="B", unit_scale=True, leave=False,
            dynamic_ncols=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.close = self._shown.close
        self._began = self._last_line = time.monotonic()

    def advance(self, count: int, stage: str | None = None) -> None:
        """Count bytes (negative ones where a file starts over) and say what is being done.

        Raises Stopped.
        """
        if self.stopped.is_set():
            raise Stopped
        self.count += count
        self._shown.update(count)
        if stage is not None:
            self._shown.set_postfix_str(stage[:28])
        now = time.monotonic()
        if self._shown.disable and now - self._last_line > PLAIN_LINE_S:
            self._last_line = now
            line = tqdm.format_meter(
                self.count, self._total, now - self._began, prefix=self._name, unit="B",
                unit_scale=True, ncols=79, ascii=True,
            )  # fmt: skip
            print(line, flush=True)

    @contextlib.contextmanager
    def unpacking(self) -> Iterator[None]:
        """Count the time inside as unpacking, apart from the waiting for the network."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.unpack_seconds += time.monotonic() - began


def side_by_side(
    tasks: dict[str, Callable[[], Any]], jobs: int, stopped: threading.Event
) -> dict[str, Any]:
    """Run named tasks on `jobs` threads; each one's result, or the exception that ended it.

    One that fails, whatever by, does not stop the others; passing faults are waited out, and the
    task called again. Ctrl-C sets `stopped`, waits for the workers to end at their next byte, and
    goes on as KeyboardInterrupt.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(_patiently, name, task, stopped): name for name, task in tasks.items()
        }
        try:
            return {futures[future]: future.result() for future in as_completed(futures)}
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _patiently(name: str, task: Callable[[], Any], stopped: threading.Event) -> Any:
    """The task's result or its exception, after as many tries as RETRY_S allows."""
    failures = 0
    while True:
        began = time.monotonic()
        try:
            return task()
        except Exception as error:
            failures = 1 if time.monotonic() - began > QUIET_S else failures + 1
            passing = isinstance(error, (Busy, ConnectionError, TimeoutError))
            passing |= isinstance(error, OSError) and error.errno in _PASSING
            if failures > len(RETRY_S) or not passing:
                return error
            wait = RETRY_S[failures - 1]
            tqdm.write(f"{name}: {first_line(error)}; going on in {wait:.0f} s", file=sys.stderr)
            if stopped.wait(wait):
                return Stopped()


# ---------------------------------------------------------------------------------------- disk


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Bytes of all that lies below `folder`; 0 where it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of a folder's files, by one look at it; it is made where it is missing.

    A network volume answers each question about a file in its own time: ask about folders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


# ---------------------------------------------------------------------------------------- HTTP


def download(url: str, target: Path, bar: Bar, *, checksum: str = "") -> None:
    """Fetch `url` into `target`, going on from `target.part` where there is one.

    `checksum` ("md5:…" or "sha256:…") is verified before the rename; a file that fails is fetched
    once more from its first byte. Raises UserError where the address refuses, nothing arrives for
    half an hour, the disk is too small, or the second copy is wrong too.
    """
    if target.exists():
        bar.advance(target.stat().st_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    for _ in range(2):
        _fill(url, part, bar)
        problem = _wrong_checksum(part, checksum, bar)
        if not problem:
            os.replace(part, target)
            part.with_suffix(".etag").unlink(missing_ok=True)
            return
        _start_over(part, bar)
    raise UserError(f"{url}: {problem}, fetched twice; try another --mirror, or later")


def _fill(url: str, part: Path, bar: Bar) -> None:
    """Bring `part` to the file's full length, through any number of cut connections."""
    have = _size(part)
    bar.advance(have)
    failures = 0
    with requests.Session() as session:
        while True:
            before = have
            try:
                if _receive(session, url, part, bar):
                    return
                reason = "the connection closed early"
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                # The last, telling part of a chain of network errors.
                reason = first_line(error, 1000).rpartition(": ")[2]
                reason = re.sub(r"[\"'>]+\)*$", "", reason)[-120:]
            have = _size(part)
            failures = 1 if have > before else failures + 1
            if failures > len(BACK_OFF_S):
                raise UserError(f"{url}: {reason}; the same command goes on from {have} bytes")
            bar.advance(0, f"waiting: {reason}")
            bar.stopped.wait(BACK_OFF_S[failures - 1])
            bar.advance(0, "")


def _receive(session: requests.Session, url: str, part: Path, bar: Bar) -> bool:
    """One request: append what it brings to `part`. True where the file is then complete.

    Raises requests' or urllib3's errors for what a later try may mend, UserError for the rest.
    """
    have, stored_etag = _size(part), part.with_suffix(".etag")
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if stored_etag.exists():  # the rest only of the very file that `part` is the beginning of
            headers["If-Range"] = stored_etag.read_text()
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        header = response.headers.get("Content-Range", "")
        start, total = re.match(r"(?:bytes (\d+|\*))?.*?(\d*)$", header).groups()
        if response.status_code == 416:
            return total == str(have) or _start_over(part, bar)
        if response.status_code in _BUSY:
            raise requests.HTTPError(f"HTTP {response.status_code}")
        if response.status_code not in (200, 206):
            why = _REFUSED.get(response.status_code, "unexpected answer")
            raise UserError(f"{url}: {why} (HTTP {response.status_code}); try another --mirror")
        # A server may ignore Range, or hold a new file.
        if have and (response.status_code != 206 or start != str(have)):
            have = int(_start_over(part, bar))
        length = response.headers.get("Content-Length", "")
        total = int(total) if total else have + int(length) if length.isdigit() else None
        more, free = ((total or 0) - have) / GIGABYTE, free_bytes(part.parent) / GIGABYTE
        if more > free:
            raise UserError(
                f"{url}: needs {more:.2f} GB more, {free:.2f} GB are free in {part.parent}; free "
                "some and run again: it goes on there"
            )
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            stored_etag.write_text(etag)
        # requests' own iterator loses the beginning of a chunk that is cut; read1: urllib3 2.1.
        read = getattr(response.raw, "read1", response.raw.read)
        with open(part, "ab") as file:
            while piece := read(1 << 16):
                file.write(piece)
                have += len(piece)
                bar.advance(len(piece))
    return total is None or have == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _start_over(part: Path, bar: Bar) -> bool:
    """Drop what is there; False, for nothing is complete."""
    bar.advance(-_size(part))
    part.unlink(missing_ok=True)
    return False


def _wrong_checksum(path: Path, checksum: str, bar: Bar) -> str:
    """What differs from "kind:digest", or an empty string."""
    if not checksum:
        return ""
    kind, _, expected = checksum.partition(":")
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.advance(0, f"checking {kind}")
    bar.advance(0, "")
    return "" if digest.hexdigest() == expected else f"{kind} {digest.hexdigest()}, not {expected}"


# ------------------------------------------------------------------------------------ archives


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turns what libraries raise over bytes that cannot be right into Damaged."""
    try:
        yield
    except (
        tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, pyarrow.ArrowException, OSError,
    ) as error:  # fmt: skip
        if getattr(error, "errno", None) is not None:  # of this disk
            raise
        raise Damaged(f"{path}: damaged ({first_line(error)})") from error


def unpack(archive: Path, folder: Path, bar: Bar) -> int:
    """Unpack a tar, tar.gz or zip into `folder`; how many files there are.

    Refuses (UserError) a path outside the folder, a link or a device. Files that an earlier,
    killed run has written in full are not written again. Raises Damaged where the archive's own
    checks fail, and OSError on a full disk.
    """
    count, there = 0, {}

    def place(name: str, size: int, plain: bool) -> str:
        """Where a file goes, its names such as every disk takes; nowhere if it is there."""
        nonlocal count
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{archive.name}: {name!r} points outside its folder; not unpacked")
        if not plain:
            raise UserError(f"{archive.name}: '{name}' is a link or device; not unpacked")
        path = PurePosixPath(*(file_name(part, 240) for part in path.parts))
        count += 1
        bar.advance(0, f"unpacking {count}" if count % 100 == 0 else None)
        parent = folder / path.parent
        if parent not in there:
            there[parent] = sizes(parent)
        return "" if there[parent].get(path.name) == size else str(path)

    def choose(member: tarfile.TarInfo, into: str) -> tarfile.TarInfo | None:
        """tarfile's filter: its own, for plain files under `place`'s names."""
        target = "" if member.isdir() else place(member.name, member.size, member.isreg())
        if not target:
            return None
        # Without mode and time, which a network volume sets in its own time.
        member = member.replace(name=target, mode=None, mtime=None, deep=False)
        return tarfile.data_filter(member, into)

    with _undamaged(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
                    if member.is_dir():
                        continue
                    member.filename = place(member.filename, member.file_size, plain)
                    if member.filename:
                        opened.extract(member, folder)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter=choose)
                while opened.fileobj.read(CHUNK):  # to the end, where gzip keeps its checksum
                    pass
    return count


# --------------------------------------------------------------------------------------- audio


def make_readable(path: Path, keep_wav: bool) -> tuple[Path, float, int]:
    """(file that training reads in place of `path`, its seconds, its sample rate).

    `path` is replaced where they differ: see `packed`. Raises AudioError.
    """
    with open(path, "rb") as file:
        coded, _ = packed(file, keep_wav)
        if coded is None:
            file.seek(0)
            return path, *probe(path, file)
    target = path.with_suffix(".flac")
    probed = probe(target, io.BytesIO(coded))
    with atomic_write(target, sync=False) as part:
        part.write_bytes(coded)
    path.unlink()
    return target, *probed


def packed(source: BinaryIO, keep_wav: bool) -> tuple[bytes | None, str]:
    """(a recording as FLAC, its suffix); (None, suffix) where it stays as it is, byte for byte.

    16 and 24 bit WAV and AIFF keep their very samples, at about half the size (`keep_wav` leaves
    WAV alone). The suffix is empty where libsndfile does not know the format.
    """
    suffix, made = "", io.BytesIO()
    try:
        with soundfile.SoundFile(source) as file:
            suffix = ".opus" if file.subtype == "OPUS" else SUFFIXES.get(file.format, "")
            lossless = suffix == ".aiff" or (suffix == ".wav" and not keep_wav)
            if not lossless or file.subtype not in ("PCM_16", "PCM_24") or file.frames == 0:
                return None, suffix
            samples = file.read(dtype="int32")
            soundfile.write(made, samples, file.samplerate, file.subtype, format="FLAC")
    except (soundfile.LibsndfileError, ValueError):  # FLAC has no more than 8 channels
        return None, suffix
    return made.getvalue(), ".flac"


def read_sphere(path: Path) -> tuple[np.ndarray, int]:
    """(int16 `[T, C]`, sample rate) of a NIST SPHERE file as the LDC ships it.

    Those packed with "shorten" take `sph2pipe` on the PATH. Raises UserError where that is
    missing, AudioError on a damaged file.
    """
    coded = path.read_bytes()
    if b"shorten" in coded[:1024]:
        if shutil.which("sph2pipe") is None:
            raise UserError(
                f"{path}: packed with shorten; build LDC's sph2pipe, put it on the PATH, run again"
            )
        command = ["sph2pipe", "-f", "sph", str(path)]
        coded = subprocess.run(command, capture_output=True).stdout
    try:
        return soundfile.read(io.BytesIO(coded), dtype="int16", always_2d=True)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read as NIST SPHERE ({error})") from error


# ------------------------------------------------------------------------- Hugging Face datasets


@dataclass(frozen=True)
class Shard:
    """One data file of a dataset, on the Hub or in a local copy of it: `source` as --mirror says.

    `sha256` is empty where it is not listed.
    """

    repo: str
    revision: str
    source: str | None
    path: str
    size: int
    sha256: str = ""


def is_local(source: str | None) -> bool:
    """Whether a --mirror is a folder, not an address; None is the Hub itself."""
    return source is not None and not source.startswith(("http://", "https://"))


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line: UserError, or Busy where it may pass."""
    from huggingface_hub import errors

    try:
        yield
    except (UserError, Stopped):
        raise
    except errors.RepositoryNotFoundError as error:  # one that is gated and not yet opened too
        raise UserError(
            f"{repo}: accept its licence at https://huggingface.co/datasets/{repo}, then `hf auth "
            "login` (or set HF_TOKEN) and run again"
        ) from error
    except errors.HfHubHTTPError as error:
        kind = Busy if getattr(error.response, "status_code", 0) in _BUSY else UserError
        raise kind(f"{repo}: Hugging Face answers: {first_line(error)}") from error
    except Exception as error:  # the HTTP library under huggingface_hub differs by version
        if getattr(error, "errno", None) is not None:  # of this disk
            raise
        cause = error.__cause__ or error
        raise Busy(f"{repo}: Hugging Face cannot be reached ({first_line(cause)})") from error


def licence_page(repo: str, endpoint: str | None) -> str:
    """Where to accept the licence of this dataset; an empty string where it can be read.

    Raises UserError where the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _hub_errors(repo):
        try:
            HfApi(endpoint=endpoint).auth_check(repo, repo_type="dataset")
        except RepositoryNotFoundError:
            return f"https://huggingface.co/datasets/{repo}"
    return ""


def hub_shards(
    repo: str, revision: str, folders: tuple[str, ...], suffix: str, source: str | None
) -> list[Shard]:
    """The data files of some folders of a dataset as it is now, sub-folders included, in order.

    `source` is None for the Hub, another endpoint's address, or a local folder laid out like
    the dataset. Raises UserError where a folder is not there.
    """
    found = []
    for folder in folders:
        if is_local(source):
            root = Path(source)
            if not (root / folder).is_dir():
                raise UserError(f"{root}: no folder '{folder}' there")
            files = [
                (path.relative_to(root).as_posix(), path.stat().st_size)
                for path in (root / folder).rglob(f"*{suffix}")
            ]
        else:
            files = _hub_files(repo, revision, folder, source)
        listed = (Shard(repo, revision, source, *file) for file in sorted(files))
        found += [shard for shard in listed if shard.path.endswith(suffix)]
    if not found:
        raise UserError(f"{repo}: no {suffix} files in {', '.join(folders)}; has it changed?")
    return found


def _hub_files(
    repo: str, revision: str, folder: str, endpoint: str | None
) -> list[tuple[str, int, str]]:
    """(path, bytes, sha256) of every file below a folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api, about = HfApi(endpoint=endpoint), {"revision": revision, "repo_type": "dataset"}
    with _hub_errors(repo):
        try:
            entries = list(api.list_repo_tree(repo, folder, recursive=True, **about))
        except EntryNotFoundError as error:
            names = ", ".join(entry.path for entry in api.list_repo_tree(repo, **about))
            raise UserError(f"{repo}: no folder '{folder}' there; it has {names}") from error
    files = [entry for entry in entries if hasattr(entry, "size")]
    return [(file.path, file.size, file.lfs.sha256 if file.lfs else "") for file in files]


def fetch_shard(shard: Shard, folder: Path, bar: Bar) -> Path:
    """The shard as a local file: downloaded into `folder`, or where it lies already.

    Raises UserError (Busy where a later try may mend it).
    """
    local = is_local(shard.source)
    target = Path(shard.source) / shard.path if local else folder / shard.path.replace("/", "__")
    if local or target.exists():
        bar.advance(shard.size)
        return target
    from huggingface_hub import hf_hub_download

    class IntoBar(tqdm):
        """What huggingface_hub reports its progress to."""

        def __init__(self, *args, **more) -> None:
            super().__init__(*args, **{**more, "disable": True})

        def update(self, count: float = 1) -> None:
            bar.advance(int(count))

        def update_transfer(self, count: float) -> None:  # bytes that `update` counts too
            pass

    with _hub_errors(shard.repo):
        made = Path(hf_hub_download(
            shard.repo, shard.path, repo_type="dataset", revision=shard.revision,
            endpoint=shard.source, local_dir=folder / "hub", tqdm_class=IntoBar,
        ))  # fmt: skip
        problem = _wrong_checksum(made, shard.sha256 and f"sha256:{shard.sha256}", bar)
        if problem:
            made.unlink()
            raise Busy(f"{shard.repo}: {shard.path}: {problem}")
    os.replace(made, target)
    return target


def parquet_rows(
    path: Path, columns: Callable[[list[str]], list[str]], first: int = 0
) -> Iterator[list[tuple]]:
    """Batches of (row number, {column: value}) from row `first` on; audio stays the bytes it was.

    `columns`: from the names that the file has, those to read. Raises Damaged.
    """
    row = 0
    with _undamaged(path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(32, columns=columns(file.schema_arrow.names)):
            begin, row = row, row + len(batch)
            if row > first:
                numbered = enumerate(batch.to_pylist(), begin)
                yield [(number, values) for number, values in numbered if number >= first]
