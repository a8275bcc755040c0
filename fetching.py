"""How bytes arrive: HTTP that goes on where it was cut, shards of the Hugging Face Hub, archives
unpacked safely, audio made readable, several fetches side by side. What the bytes mean, corpus by
corpus, is in corpora.py. Nothing is left half-done under its final name: it is renamed in the end.
"""

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet
import requests
import soundfile
import urllib3
from huggingface_hub import HfApi, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from audio import AudioError, probe
from command import UserError, atomic_write, file_name, first_line

# Seconds before each further try of a corpus that met a passing fault: half an hour in all.
RETRY_S = (5.0, 60.0, 300.0, 600.0, 900.0)
QUIET_S = 900.0  # after so long without a fault, faults are counted anew
TIMEOUT_S = (15, 60)  # to connect, between two reads
PLAIN_LINE_S = 60.0  # between two lines of progress in a log file
CHUNK, GIGABYTE = 1 << 20, 1e9  # bytes
FILE_THREADS = 4  # per corpus, for packing and probing
# What libsndfile calls a format -> the suffix of its files.
SUFFIXES = {"WAVEX": ".wav", "RF64": ".wav", "MPEG": ".mp3"}
SUFFIXES |= {name: f".{name.lower()}" for name in ("WAV", "AIFF", "OGG", "FLAC", "MP3")}
# What a network volume says for a while, beside refused and timed out connections.
_PASSING = (errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN,
            errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)  # fmt: skip
_BUSY = (408, 429, *range(500, 600))


class Stopped(Exception):
    """The run was interrupted; raised in a worker so that it ends at its next byte."""


class Damaged(UserError):
    """An archive or shard whose bytes cannot be right."""


class Busy(UserError):
    """A server that does not answer now."""


class Bar:
    """The progress of one corpus in bytes: a bar on a terminal, else a plain line a minute."""

    def __init__(self, name: str, total: int = 0, stopped: threading.Event | None = None) -> None:
        self.stopped = stopped or threading.Event()
        self.count = 0  # bytes so far
        self._name, self._total = name, total
        self._shown = tqdm(total=total or None, desc=f"{name:<20.20}", unit="B", unit_scale=True,
                           leave=False, dynamic_ncols=True, disable=None)  # fmt: skip
        self.close = self._shown.close
        self._last_line = time.monotonic()

    def advance(self, count: int, stage: str | None = None) -> None:
        """Count bytes (negative where a file starts over), say what is being done; Stopped."""
        if self.stopped.is_set():
            raise Stopped
        self.count += count
        self._shown.update(count)
        if stage is not None:
            self._shown.set_postfix_str(stage[:28])
        if self._shown.disable and time.monotonic() - self._last_line > PLAIN_LINE_S:
            self._last_line = time.monotonic()
            of = f" of {self._total / GIGABYTE:,.2f}" if self._total else ""
            print(f"{self._name}: {self.count / GIGABYTE:,.2f}{of} GB", flush=True)


def side_by_side(tasks: dict[str, Callable[[], Any]], jobs: int,
                 stopped: threading.Event) -> dict[str, Any]:  # fmt: skip
    """Run named tasks on `jobs` threads; each one's result, or the exception that ended it. Passing
    faults are waited out, and the task called again. Ctrl-C sets `stopped`, waits for the workers
    to end at their next byte, and goes on as KeyboardInterrupt."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_patiently, name, tasks[name], stopped): name for name in tasks}
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


def folder_bytes(folder: Path) -> int:
    """Bytes of all that lies below `folder`; 0 where it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def download(url: str, target: Path, bar: Bar, checksum: str = "",
             headers: dict[str, str] | None = None,
             remedy: str = "try another --mirror") -> None:  # fmt: skip
    """Fetch `url` into `target`, going on from `target.part`; `checksum`: "md5:…" or "sha256:…".
    Raises Busy where the server is silent; UserError with `remedy`: refused, or wrong checksum."""
    if target.exists():
        bar.advance(target.stat().st_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    bar.advance(_size(part))
    while not _receive(url, part, bar, headers or {}, remedy):
        pass
    kind, _, expected = checksum.partition(":")
    found = _digest(part, kind, bar) if kind else ""
    if found != expected:
        part.unlink()
        raise UserError(f"{url}: {kind} {found}, not {expected}; run again, or {remedy}")
    os.replace(part, target)


def _receive(url: str, part: Path, bar: Bar, headers: dict[str, str], remedy: str) -> bool:
    """One request: append what it brings to `part`. Whether the file is then complete."""
    have = _size(part)
    headers = {**headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            status, length = response.status_code, response.headers.get("Content-Length", "")
            if status in _BUSY:
                raise Busy(f"{url}: HTTP {status}")
            if status == 416 and have:
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return True
                bar.advance(-have)
                part.unlink()  # of another file
                return False
            if status not in (200, 206):
                raise UserError(f"{url}: HTTP {status} {response.reason}; {remedy}")
            if status == 200:  # from its first byte: a server may ignore Range
                bar.advance(-have)
            # requests' own iterator loses the beginning of a chunk that is cut; read1: urllib3 2.1.
            read = getattr(response.raw, "read1", response.raw.read)
            received = 0
            with open(part, "ab" if status == 206 else "wb") as file:
                while piece := read(1 << 16):
                    file.write(piece)
                    received += len(piece)
                    bar.advance(len(piece))
            return not length.isdigit() or received == int(length)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        if _size(part) > have:  # cut, and soon gone on with
            return False
        # The last, telling part of a chain of network errors.
        reason = first_line(error, 1000).rpartition(": ")[2]
        raise Busy(f"{url}: {re.sub(r'[^A-Za-z0-9]+$', '', reason)[-120:]}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path, kind: str, bar: Bar) -> str:
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.advance(0, f"checking {kind}")
    bar.advance(0, "")
    return digest.hexdigest()


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turns what libraries raise over bytes that cannot be right into Damaged."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, pyarrow.ArrowException,
            OSError) as error:  # fmt: skip
        if getattr(error, "errno", None) is not None:  # of this disk
            raise
        raise Damaged(f"{path}: damaged ({first_line(error)})") from error


def unpack(archive: Path, folder: Path, bar: Bar) -> None:
    """Unpack a tar, tar.gz or zip into `folder`, its names such as every disk takes. Refuses
    (UserError) a path outside the folder, a link or a device. Raises Damaged, and OSError."""
    made = set()
    with _undamaged(archive):
        for name, source in _members(archive):
            bar.advance(0, "unpacking")
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{archive.name}: {name!r} points outside its folder; not unpacked")
            if source is None:
                raise UserError(f"{archive.name}: '{name}' is a link or device; not unpacked")
            target = folder.joinpath(*(file_name(part, 240) for part in path.parts))
            if target.parent not in made:  # a network volume answers each question in its own time
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            with source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
    bar.advance(0, "")


def _members(archive: Path) -> Iterator[tuple[str, BinaryIO | None]]:
    """(name, opened) of every member that is no folder; None in place of a link or device."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
                if not member.is_dir():
                    yield member.filename, opened.open(member) if plain else None
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if not member.isdir():
                    yield member.name, opened.extractfile(member) if member.isreg() else None
            while opened.fileobj.read(CHUNK):  # to the end, where gzip has its checksum
                pass


def make_readable(path: Path, keep_wav: bool) -> tuple[Path, float, int]:
    """(what replaces `path` on the disk, by `packed`, or itself; seconds; Hz). AudioError."""
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
    """(FLAC, its suffix) of AIFF and (unless `keep_wav`) WAV of 16 or 24 bit: about half the size;
    (None, suffix) of what stays as it is, the suffix empty where libsndfile knows no format."""
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
    """(audio `[T, 2]`, sample rate) of a call, a NIST SPHERE file as the LDC ships it; those packed
    with "shorten" take `sph2pipe`. Raises UserError where that is missing, AudioError."""
    coded = path.read_bytes()
    if b"shorten" in coded[:1024]:
        if shutil.which("sph2pipe") is None:
            raise UserError(f"{path}: packed with shorten: put LDC's sph2pipe on the PATH")
        coded = subprocess.run(["sph2pipe", "-f", "sph", str(path)], capture_output=True).stdout
    try:
        audio, rate = soundfile.read(io.BytesIO(coded), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read as NIST SPHERE ({error})") from error
    if audio.shape[1] != 2:
        raise AudioError(f"{path}: {audio.shape[1]} channels, not 2")
    return audio, rate

LICENCE = "accept its licence at https://huggingface.co/datasets/{}, then `hf auth login` (or set "
LICENCE += "HF_TOKEN) and run again"


@dataclass(frozen=True)
class Shard:
    """One data file of a dataset; `url` is its path where --mirror names a local copy."""

    repo: str
    path: str
    size: int
    url: str
    checksum: str = ""


def is_local(source: str | None) -> bool:
    """Whether a --mirror is a folder, not an address; None is the Hub itself."""
    return source is not None and not source.startswith(("http://", "https://"))


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line: UserError, or Busy where it may pass."""
    try:
        yield
    except errors.EntryNotFoundError as error:
        raise UserError(f"{repo}: it has changed ({first_line(error)})") from error
    except errors.RepositoryNotFoundError as error:  # one that is gated and not yet opened too
        raise UserError(f"{repo}: {LICENCE.format(repo)}") from error
    except Exception as error:  # the HTTP library under huggingface_hub differs by version
        status = getattr(getattr(error, "response", None), "status_code", _BUSY[0])
        kind = Busy if status in _BUSY else UserError
        raise kind(f"{repo}: no answer from Hugging Face ({first_line(error)})") from error


def licence_page(repo: str, endpoint: str | None) -> str:
    """Where to accept the licence of this dataset; an empty string where it can be read."""
    with _hub_errors(repo):
        try:
            HfApi(endpoint=endpoint).auth_check(repo, repo_type="dataset")
        except errors.RepositoryNotFoundError:
            return f"https://huggingface.co/datasets/{repo}"
    return ""


def hub_shards(repo: str, revision: str, folders: tuple[str, ...], suffix: str,
               source: str | None) -> list[Shard]:  # fmt: skip
    """The data files of some folders of a dataset as it is now, sub-folders included, in order.
    `source`: None for the Hub, another endpoint's address, or a local folder laid out like the
    dataset. Raises UserError where a folder is not there, or none of the files."""
    found = []
    for folder in folders:
        if is_local(source):
            paths = [(p, p.relative_to(source)) for p in Path(source, folder).rglob("*.*")]
            files = [Shard(repo, b.as_posix(), _size(p), str(p.resolve())) for p, b in paths]
        else:
            files = _hub_files(repo, revision, folder, source)
        if not (files := [file for file in files if file.path.endswith(suffix)]):
            raise UserError(f"{source or repo}: no {suffix} files in '{folder}'; has it changed?")
        found += sorted(files, key=lambda file: file.path)
    return found


def _hub_files(repo: str, revision: str, folder: str, endpoint: str | None) -> Iterator[Shard]:
    about = {"revision": revision, "repo_type": "dataset"}
    with _hub_errors(repo):
        entries = HfApi(endpoint=endpoint).list_repo_tree(repo, folder, recursive=True, **about)
        for file in (entry for entry in entries if hasattr(entry, "size")):
            url = hf_hub_url(repo, file.path, endpoint=endpoint, **about)
            checksum = f"sha256:{file.lfs.sha256}" if file.lfs else ""
            yield Shard(repo, file.path, file.size, url, checksum)


def fetch_shard(shard: Shard, folder: Path, bar: Bar) -> Path:
    """The shard in `folder`: downloaded, or a link to where it lies already."""
    target = folder / shard.path.replace("/", "__")
    if is_local(shard.url) and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        target.symlink_to(shard.url)
    remedy = LICENCE.format(shard.repo)
    download(shard.url, target, bar, shard.checksum, headers=build_hf_headers(), remedy=remedy)
    return target


def parquet_rows(path: Path, needed: Sequence[str], more: Sequence[str]) -> Iterator[list[tuple]]:
    """Batches of (row number, {column: value}) of `needed` (else UserError), `more` if there."""
    row = 0
    with _undamaged(path), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if missing := [name for name in needed if name not in names]:
            raise UserError(f"{path}: no column {', '.join(missing)}; now has {', '.join(names)}")
        wanted = [name for name in names if name in {*needed, *more}]
        for batch in file.iter_batches(32, columns=wanted):
            yield list(enumerate(batch.to_pylist(), row))
            row += len(batch)
