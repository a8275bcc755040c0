"""How bytes arrive: HTTP that goes on where it was cut, archives unpacked safely, audio made
readable, shards of the Hugging Face Hub, several fetches side by side. What the bytes mean, corpus
by corpus, is in corpora.py.

Nothing here is left half-done under its final name: bytes land in `.part` files and are renamed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
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
from typing import IO, Any, BinaryIO

import numpy as np
import requests
import soundfile
import urllib3
from tqdm import tqdm

import data
from command import UserError, file_name, first_line

# Seconds to wait before try 2, 3, …, counted from the last byte that arrived: half an hour in all.
BACK_OFF_S = (1, 2, 4, 8, 15, 30) + (60,) * 29
RETRY_S = (5.0, 60.0, 300.0)  # before a corpus that met a passing fault goes on
QUIET_S = 900.0  # after so long without one, faults are counted anew
TIMEOUT_S = (15, 60)  # to connect, between two reads
CHUNK = 1 << 20  # bytes
PLAIN_LINE_S = 60.0  # between two lines of progress in a log file
GIGABYTE = 1e9
FILE_THREADS = 4  # per corpus, for writing, packing and probing
# What libsndfile cannot read: FLAC takes its place.
FFMPEG_SUFFIXES = (
    ".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".mov", ".wma", ".amr", ".3gp", ".ac3",
    ".wv", ".ape", ".tta", ".gsm", ".spx",
)  # fmt: skip
LOSSLESS_SUFFIXES = (".wav", ".aif", ".aiff", ".aifc")
SPHERE_MAGIC = b"NIST_1A"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a network volume or a network says for a while: the same again may work.
_PASSING = (
    errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY,
    errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
)  # fmt: skip
_BUSY = (408, 429, *range(500, 600))
_GONE_FOR_GOOD = {401: "access denied", 403: "access denied", 404: "not there", 410: "gone"}


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
        self.name = name
        self.stopped = stopped or threading.Event()
        self._bar = tqdm(
            total=total or None,
            desc=f"{name:<20.20}",
            unit="B",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._plain = not sys.stderr.isatty()
        self._done, self._total = 0, total
        self._started = self._last_line = time.monotonic()
        self.unpack_seconds = 0.0

    def advance(self, count: int) -> None:
        """Count bytes (negative ones where a file starts over). Raises Stopped."""
        if self.stopped.is_set():
            raise Stopped
        self._done += count
        self._bar.update(count)
        if self._plain and time.monotonic() - self._last_line > PLAIN_LINE_S:
            self._last_line = time.monotonic()
            rate = self._done / max(self._last_line - self._started, 1e-9) / 1e6
            of = f" of {self._total / GIGABYTE:.1f}" if self._total else ""
            print(f"{self.name}: {self._done / GIGABYTE:.1f}{of} GB, {rate:.1f} MB/s", flush=True)

    def stage(self, text: str) -> None:
        """Say what is being done, behind the bar. Raises Stopped."""
        if self.stopped.is_set():
            raise Stopped
        self._bar.set_postfix_str(text[:28])

    @contextlib.contextmanager
    def unpacking(self) -> Iterator[None]:
        """Count the time inside as unpacking, apart from the waiting for the network."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.unpack_seconds += time.monotonic() - began

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()


def side_by_side(
    tasks: dict[str, Callable[[], Any]], jobs: int, stopped: threading.Event
) -> dict[str, Any]:
    """Run named tasks on `jobs` threads; each one's result, or the exception that ended it.

    One that fails, whatever by, does not stop the others; passing faults are waited out, and the
    task called again. Ctrl-C sets `stopped`, waits for the workers to end at their next byte, and
    goes on as KeyboardInterrupt.
    """
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(_patiently, name, task, stopped): name for name, task in tasks.items()
        }
        try:
            for future in as_completed(futures):
                try:
                    results[futures[future]] = future.result()
                except Exception as error:
                    results[futures[future]] = error
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _patiently(name: str, task: Callable[[], Any], stopped: threading.Event) -> Any:
    failures = 0
    while True:
        began = time.monotonic()
        try:
            return task()
        except Exception as error:
            failures = 1 if time.monotonic() - began > QUIET_S else failures + 1
            if failures > len(RETRY_S) or not _passes(error):
                raise
            wait = RETRY_S[failures - 1]
            tqdm.write(f"{name}: {first_line(error)}; going on in {wait:.0f} s", file=sys.stderr)
            if stopped.wait(wait):
                raise Stopped from error


def _passes(error: Exception) -> bool:
    return isinstance(error, (Busy, TimeoutError, requests.ConnectionError, requests.Timeout)) or (
        isinstance(error, OSError) and error.errno in _PASSING
    )


def disk_full(error: OSError) -> bool:
    """Whether this is a full disk or a full quota."""
    return error.errno in _DISK_FULL


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 where it does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


# ---------------------------------------------------------------------------------------- HTTP


def download(
    url: str,
    target: Path,
    bar: Bar,
    *,
    size: int | None = None,
    checksum: str = "",
    headers: dict[str, str] | None = None,
) -> None:
    """Fetch `url` into `target`, going on from `target.part` where there is one.

    `size` in bytes and `checksum` ("md5:…" or "sha256:…") are verified before the rename; a file
    that fails is fetched once more from its first byte. Raises UserError where the address
    refuses, nothing arrives for half an hour, the disk is too small, or the second copy is wrong.
    """
    if target.exists():
        bar.advance(target.stat().st_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    for attempt in (1, 2):
        _fill(url, part, bar, size, headers or {})
        problem = _problem_of(part, size, checksum, bar)
        if not problem:
            break
        bar.advance(-part.stat().st_size)
        part.unlink()
        if attempt == 2:
            raise UserError(f"{url}: {problem}, fetched twice; try another --mirror, or later")
    os.replace(part, target)
    _etag_file(part).unlink(missing_ok=True)


def _fill(url: str, part: Path, bar: Bar, size: int | None, headers: dict[str, str]) -> None:
    """Bring `part` to the file's whole length, through any number of cut connections."""
    have = part.stat().st_size if part.exists() else 0
    bar.advance(have)
    failures = 0
    with requests.Session() as session:
        while size is None or have != size:
            before = have
            try:
                if _receive(session, url, part, bar, headers):
                    return
                reason = "the connection closed early"
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                reason = _short(error)
            have = part.stat().st_size if part.exists() else 0
            failures = 1 if have > before else failures + 1
            if failures > len(BACK_OFF_S):
                raise UserError(f"{url}: {reason}; the same command goes on from {have} bytes")
            bar.stage(f"waiting: {reason}")
            if bar.stopped.wait(BACK_OFF_S[failures - 1]):
                raise Stopped
            bar.stage("")


def _receive(
    session: requests.Session, url: str, part: Path, bar: Bar, headers: dict[str, str]
) -> bool:
    """One request: append what it brings to `part`. True where the file is then whole.

    Raises requests' or urllib3's errors for what a later try may mend, UserError for the rest.
    """
    have = part.stat().st_size if part.exists() else 0
    asked = {**headers, "Accept-Encoding": "identity"}
    if have:
        asked |= {"Range": f"bytes={have}-", **_if_range(part)}
    with session.get(url, headers=asked, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 416:
            if _total(response, 0) == have:
                return True
            return _start_over(part, bar, have)
        _check_status(response, url)
        if have and not _continues(response, have):
            _start_over(part, bar, have)
            have = 0
        total = _total(response, have)
        _check_room(part, url, (total or 0) - have)
        _remember_etag(part, response)
        with open(part, "ab") as file:
            for chunk in _pieces(response):
                file.write(chunk)
                have += len(chunk)
                bar.advance(len(chunk))
    return total is None or have == total


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives: requests' own iterator loses the beginning of a chunk that is cut."""
    read = getattr(response.raw, "read1", None)  # since urllib3 2.1
    while piece := read(CHUNK) if read else response.raw.read(1 << 14):
        yield piece


def _continues(response: requests.Response, have: int) -> bool:
    """Whether the answer starts at byte `have`: a server may ignore Range, or hold a new file."""
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and start is not None and int(start.group(1)) == have


def _start_over(part: Path, bar: Bar, have: int) -> bool:
    bar.advance(-have)
    part.unlink(missing_ok=True)
    return False


def _total(response: requests.Response, have: int) -> int | None:
    """The file's whole length in bytes, None where the server does not say."""
    ranged = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    if ranged:
        return int(ranged.group(1))
    length = response.headers.get("Content-Length", "")
    return have + int(length) if length.isdigit() else None


def _check_status(response: requests.Response, url: str) -> None:
    code = response.status_code
    if code in _GONE_FOR_GOOD:
        raise UserError(f"{url}: {_GONE_FOR_GOOD[code]} (HTTP {code}); try another --mirror")
    if code in _BUSY:
        raise requests.HTTPError(f"HTTP {code}", response=response)
    if code not in (200, 206):
        raise UserError(f"{url}: unexpected answer (HTTP {code}); try another --mirror")


def _check_room(part: Path, url: str, more: int) -> None:
    free = free_bytes(part.parent)
    if more > free:
        raise UserError(
            f"{url}: needs {more / GIGABYTE:.2f} GB more, {free / GIGABYTE:.2f} GB are free in "
            f"{part.parent}; free some and run again: it goes on there"
        )


def _etag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _remember_etag(part: Path, response: requests.Response) -> None:
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        _etag_file(part).write_text(etag)


def _if_range(part: Path) -> dict[str, str]:
    """Asks for the rest only of the very file that `part` is the beginning of."""
    stored = _etag_file(part)
    return {"If-Range": stored.read_text()} if stored.exists() else {}


def _problem_of(part: Path, size: int | None, checksum: str, bar: Bar) -> str:
    """What is wrong with a fetched file, or an empty string."""
    found = part.stat().st_size if part.exists() else 0
    if not part.exists():
        part.touch()  # an empty file on the server
    if size is not None and found != size:
        return f"{found} bytes in place of {size}"
    if not checksum:
        return ""
    kind, _, expected = checksum.partition(":")
    bar.stage(f"checking {kind}")
    digest = hashlib.new(kind)
    with open(part, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.advance(0)
    bar.stage("")
    return "" if digest.hexdigest() == expected else f"{kind} {digest.hexdigest()}, not {expected}"


def _short(error: Exception) -> str:
    """The last, telling part of a chain of network errors."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    for known in ("Name or service not known", "Temporary failure in name resolution"):
        if known in text:
            return "no such host, or no network"
    for known in ("Connection refused", "timed out", "reset by peer", "IncompleteRead", "HTTP "):
        if known in text:
            return known.replace("IncompleteRead", "the connection closed early") + (
                text.split("HTTP ")[1][:3] if known == "HTTP " else ""
            )
    return f"{type(error).__name__}: {text[:120]}"


# ------------------------------------------------------------------------------------ archives


def unpack(
    archive: Path,
    folder: Path,
    bar: Bar | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> int:
    """Unpack the wanted files of a tar, tar.gz or zip into `folder`; how many there are.

    Refuses (UserError) a path outside the folder, a link or a device. Files that an earlier,
    killed run has left whole are not written again. Raises Damaged where the archive's own
    checks fail, and OSError on a full disk.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return _unpack_members(_zip_members(opened), folder, wanted, archive.name, bar)
        with _decompressed(archive) as stream:
            count = unpack_tar(stream, folder, wanted, archive.name, bar)
            # To the very end, where gzip keeps its checksum.
            while stream.read(CHUNK):
                pass
            return count
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Damaged(f"{archive}: damaged ({error})") from error


def _decompressed(archive: Path) -> IO[bytes]:
    with open(archive, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(archive, "rb") if packed else open(archive, "rb")


def unpack_tar(
    stream: IO[bytes],
    folder: Path,
    wanted: Callable[[str], bool],
    label: str,
    bar: Bar | None = None,
) -> int:
    """Unpack chosen regular files of a tar stream; refuses links among them and any escape."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        return _unpack_members(_tar_members(archive), folder, wanted, label, bar)


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple]:
    """(name, bytes, whether a folder, whether a plain file, function that opens it) of each."""
    for member in archive:
        opened = functools.partial(archive.extractfile, member)
        yield member.name, member.size, member.isdir(), member.isreg(), opened


def _zip_members(archive: zipfile.ZipFile) -> Iterator[tuple]:
    for member in archive.infolist():
        plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
        opened = functools.partial(archive.open, member)
        yield member.filename, member.file_size, member.is_dir(), plain, opened


def _unpack_members(
    members: Iterator[tuple],
    folder: Path,
    wanted: Callable[[str], bool],
    label: str,
    bar: Bar | None,
) -> int:
    count, there = 0, {}
    for name, size, is_folder, plain, opened in members:
        path = _safe_path(name, label)
        if is_folder or not wanted(str(path)):
            continue
        if not plain:
            raise UserError(f"{label}: '{name}' is a link or device; not unpacked")
        target = folder / path
        if target.parent not in there:
            there[target.parent] = sizes(target.parent)
        if there[target.parent].get(target.name) != size:  # else a killed run wrote it
            _place(opened(), target, size)
        count += 1
        if bar is not None and count % 100 == 0:
            bar.stage(f"unpacking {count}")
    return count


def _safe_path(name: str, label: str) -> PurePosixPath:
    """Where a member goes, its names such as every disk takes."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{label}: {name!r} points outside its folder; not unpacked")
    return PurePosixPath(*(file_name(part, 240) for part in path.parts))


def sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of a folder's files, by one look at it; it is made where it is missing.

    A network volume answers each question about a file in its own time: ask about folders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _place(source: IO[bytes], target: Path, size: int) -> None:
    """Write one member under its own name: the folder gets its own when all are there.

    A file that a kill cuts is told by its size. Raises EOFError where the archive is short.
    """
    with source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, CHUNK)
        if file.tell() != size:
            raise EOFError(f"{target.name} ends early")


# --------------------------------------------------------------------------------------- audio


def audio_suffix(coded: bytes) -> str:
    """The file suffix that these bytes call for. Raises AudioError on an unknown format."""
    if coded[:4] in (b"RIFF", b"RF64") and coded[8:12] == b"WAVE":
        return ".wav"
    if coded[:4] == b"fLaC":
        return ".flac"
    if coded[:4] == b"OggS":
        return ".opus" if b"OpusHead" in coded[:64] else ".ogg"
    if coded[:4] == b"FORM" and coded[8:12] in (b"AIFF", b"AIFC"):
        return ".aiff"
    if coded[:4] == b"\x1aE\xdf\xa3":
        return ".webm"
    if len(coded) > 1 and coded[0] == 0xFF and coded[1] & 0xF6 == 0xF0:
        return ".aac"
    if coded[:3] == b"ID3" or (coded[:1] == b"\xff" and len(coded) > 1 and coded[1] >= 0xE0):
        return ".mp3"
    if coded[4:8] == b"ftyp":
        return ".m4a"
    raise data.AudioError(f"{len(coded)} bytes of an unknown audio format")


def write_bytes(path: Path, coded: bytes) -> None:
    """Write a file under its final name only once it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(coded)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(coded)
    os.replace(part, path)


def make_readable(path: Path, keep_wav: bool) -> tuple[Path, float, int]:
    """(file that training reads in place of `path`, its seconds, its sample rate).

    `path` is replaced where they differ: see `packed`. Raises AudioError.
    """
    with open(path, "rb") as file:
        coded = packed(file, path.suffix.lower(), keep_wav, path)
        if coded is None:
            file.seek(0)
            return path, *data.probe(path, file)
    target = path.with_suffix(".flac")
    probed = data.probe(target, io.BytesIO(coded))
    write_bytes(target, coded)
    path.unlink()
    return target, *probed


def packed(source: BinaryIO, suffix: str, keep_wav: bool, where: object) -> bytes | None:
    """The recording as FLAC; None where it stays as it is, byte for byte.

    16 and 24 bit WAV and AIFF keep their very samples, at about half the size (`keep_wav` leaves
    WAV alone). What libsndfile cannot read (FFMPEG_SUFFIXES) is decoded. Raises AudioError that
    names `where`.
    """
    if suffix in FFMPEG_SUFFIXES:
        samples, rate, subtype = *decode_by_ffmpeg(source, where), "PCM_16"
    elif suffix in LOSSLESS_SUFFIXES and not (keep_wav and suffix == ".wav"):
        try:
            with soundfile.SoundFile(source) as file:
                if file.subtype not in ("PCM_16", "PCM_24") or file.frames == 0:
                    return None
                samples, subtype, rate = file.read(dtype="int32"), file.subtype, file.samplerate
        except (soundfile.LibsndfileError, ValueError) as error:
            raise data.AudioError(f"{where}: cannot be read as audio ({error})") from error
    else:
        return None
    made = io.BytesIO()
    try:
        soundfile.write(made, samples, rate, subtype, format="FLAC")
        made.seek(0)
        again, _ = soundfile.read(made, dtype=samples.dtype.name)
    except (soundfile.LibsndfileError, AssertionError, ValueError) as error:
        raise data.AudioError(f"{where}: cannot be packed as FLAC ({error})") from error
    same = np.array_equal(again, samples) if samples.dtype == np.int32 else len(again)
    return made.getvalue() if same else None


def decode_by_ffmpeg(source: BinaryIO, where: object) -> tuple[np.ndarray, int]:
    """(float32 `[T]` or `[T, C]`, sample rate) of a file that FFmpeg reads and libsndfile not."""
    av = _pyav("AAC and other recordings that libsndfile cannot read")
    try:
        with av.open(str(where) if isinstance(where, Path) else source) as container:
            stream = container.streams.audio[0]
            plan = av.AudioResampler("fltp", layout=stream.layout, rate=stream.rate)
            frames = [out for frame in container.decode(stream) for out in plan.resample(frame)]
    except (av.FFmpegError, IndexError) as error:
        raise data.AudioError(f"{where}: cannot be read as audio ({error})") from error
    if not frames:
        raise data.AudioError(f"{where}: holds no samples")
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    return (samples[0] if len(samples) == 1 else samples.T), frames[0].sample_rate


def _pyav(what: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{what} need PyAV: pip install av") from error
    return av


def read_sphere(path: Path) -> tuple[np.ndarray, int]:
    """(int16 `[T, C]`, sample rate) of a NIST SPHERE file as LDC ships it: PCM or mu-law.

    LDC packs most of them with "shorten", which takes `sph2pipe` on the PATH. Raises UserError
    where that is missing, AudioError on a damaged file.
    """
    coded = path.read_bytes()
    fields = _sphere_header(path, coded)
    if "shorten" in fields.get("sample_coding", ""):
        coded = _without_shorten(path)
        fields = _sphere_header(path, coded)
    start, channels, rate = (int(fields[name]) for name in ("", "channel_count", "sample_rate"))
    if "ulaw" in fields.get("sample_coding", ""):
        samples = _mu_law_table()[np.frombuffer(coded[start:], np.uint8)]
    else:
        order = ">i2" if fields.get("sample_byte_format") == "10" else "<i2"
        body = coded[start:]
        samples = np.frombuffer(body[: len(body) // 2 * 2], order).astype(np.int16)
    frames = min(len(samples) // channels, int(fields.get("sample_count", len(samples))))
    if frames <= 0:
        raise data.AudioError(f"{path}: holds no samples")
    return samples[: frames * channels].reshape(frames, channels), rate


def _sphere_header(path: Path, coded: bytes) -> dict[str, str]:
    if coded[:7] != SPHERE_MAGIC:
        raise data.AudioError(f"{path}: not a NIST SPHERE file")
    size = coded[8:16].decode("latin-1").strip()
    lines = coded[16 : int(size)] if size.isdecimal() else b""
    words = [line.split(None, 2) for line in lines.split(b"end_head")[0].split(b"\n")]
    fields = {
        name.decode("latin-1"): value.strip().decode("latin-1")
        for name, _, value in (word for word in words if len(word) == 3)
    }
    fields[""] = size  # where the samples begin
    numbers = [fields.get(name, "") for name in ("channel_count", "sample_rate")]
    numbers += [fields[name] for name in ("sample_count",) if name in fields]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise data.AudioError(f"{path}: its header lacks channels, sample rate or length")
    return fields


def _without_shorten(path: Path) -> bytes:
    if shutil.which("sph2pipe") is None:
        raise UserError(
            f"{path}: packed with shorten; build LDC's sph2pipe, put it on the PATH, run again"
        )
    result = subprocess.run(["sph2pipe", "-f", "sph", str(path)], capture_output=True)
    if result.returncode != 0:
        raise data.AudioError(f"{path}: sph2pipe cannot read it")
    return result.stdout


def _mu_law_table() -> np.ndarray:
    """16-bit value of each of the 256 mu-law bytes (ITU-T G.711)."""
    inverted = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (inverted >> 4) & 7, inverted & 15
    size = ((mantissa.astype(np.int32) << 3) + 132 << exponent) - 132
    return np.where(inverted & 128, -size, size).astype(np.int16)


# ------------------------------------------------------------------------- Hugging Face datasets


@dataclass(frozen=True)
class Shard:
    """One data file of a dataset: on the Hub (`url`), or in a local copy of it (`local`)."""

    path: str
    size: int
    sha256: str = ""
    url: str = ""
    local: Path | None = None


def hub_access_problem(repo: str, endpoint: str | None) -> str:
    """Where to accept the licence of this dataset; an empty string where it can be read.

    Raises UserError where the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi(endpoint=endpoint).auth_check(repo, repo_type="dataset")
    except (GatedRepoError, RepositoryNotFoundError):
        return f"https://huggingface.co/datasets/{repo}"
    except HfHubHTTPError as error:
        raise UserError(f"{repo}: Hugging Face answers: {_short(error)}") from error
    except Exception as error:  # the HTTP library under huggingface_hub differs by version
        raise Busy(f"{repo}: Hugging Face cannot be reached ({_short(error)})") from error
    return ""


@contextlib.contextmanager
def _listing(repo: str) -> Iterator[None]:
    """Turns what listing a dataset raises into one line; a folder that is not there stays."""
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError

    try:
        yield
    except EntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        busy = error.response is not None and error.response.status_code in _BUSY
        kind = Busy if busy else UserError
        raise kind(f"{repo}: cannot be listed ({_short(error)})") from error
    except Exception as error:  # see hub_access_problem
        raise Busy(f"{repo}: cannot be listed ({_short(error)}); is there a network?") from error


def _is_local(source: str | None) -> bool:
    return source is not None and not source.startswith(("http://", "https://"))


def hub_folders(repo: str, revision: str, parent: str, source: str | None) -> list[str]:
    """The folders below `parent` that the dataset has now; none where `parent` is not there."""
    if _is_local(source):
        found = (Path(source) / parent).glob("*/")
        return sorted(path.relative_to(source).as_posix() for path in found)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import EntryNotFoundError

    folders, at = set(), parent.count("/") + 2
    with contextlib.suppress(EntryNotFoundError), _listing(repo):
        tree = HfApi(endpoint=source).list_repo_tree(
            repo, parent, revision=revision, repo_type="dataset"
        )
        for entry in tree:
            parts = entry.path.split("/")
            if len(parts) > at or not hasattr(entry, "size"):
                folders.add("/".join(parts[:at]))
    return sorted(folders)


def hub_shards(
    repo: str, revision: str, folders: tuple[str, ...], suffix: str, source: str | None
) -> list[Shard]:
    """The data files of some folders of a dataset, in order.

    `source` is None for the Hub, another endpoint's address, or a local folder laid out like
    the dataset. Raises UserError where a folder is not there, naming those that are.
    """
    if _is_local(source):
        return _local_shards(Path(source), folders, suffix)
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import EntryNotFoundError

    api = HfApi(endpoint=source)
    found = []
    for folder in folders:
        try:
            with _listing(repo):
                files = api.list_repo_tree(
                    repo, folder or None, recursive=True, revision=revision, repo_type="dataset"
                )
                named = [file for file in files if file.path.endswith(suffix)]
        except EntryNotFoundError as error:
            raise UserError(f"{repo}: no folder '{folder}' there{_others(api, repo)}") from error
        for file in sorted(named, key=lambda file: file.path):
            url = hf_hub_url(
                repo, file.path, repo_type="dataset", revision=revision, endpoint=source
            )
            sha256 = file.lfs.sha256 if file.lfs else ""
            found.append(Shard(file.path, file.size, sha256, url))
    if not found:
        raise UserError(f"{repo}: no {suffix} files in {', '.join(folders)}; has it changed?")
    return found


def _others(api: Any, repo: str) -> str:
    try:
        names = [entry.path for entry in api.list_repo_tree(repo, repo_type="dataset")]
    except Exception:  # only an addition to an error message
        return ""
    return f"; it has {', '.join(names[:12])}"


def _local_shards(root: Path, folders: tuple[str, ...], suffix: str) -> list[Shard]:
    found = []
    for folder in folders:
        if not (root / folder).is_dir():
            raise UserError(f"{root}: no folder '{folder}' there")
        for path in sorted((root / folder).rglob(f"*{suffix}")):
            name = path.relative_to(root).as_posix()
            found.append(Shard(name, path.stat().st_size, local=path))
    if not found:
        raise UserError(f"{root}: no {suffix} files in {', '.join(folders)}")
    return found


def fetch_shard(shard: Shard, folder: Path, bar: Bar) -> Path:
    """The shard as a local file: downloaded into `folder`, or where it lies already."""
    if shard.local is not None:
        bar.advance(shard.size)
        return shard.local
    from huggingface_hub.utils import build_hf_headers

    target = folder / shard.path.replace("/", "__")
    checksum = f"sha256:{shard.sha256}" if shard.sha256 else ""
    download(
        shard.url, target, bar, size=shard.size, checksum=checksum, headers=build_hf_headers()
    )
    return target


def parquet_columns(path: Path) -> list[str]:
    """The top-level columns of a parquet file. Raises Damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise Damaged(f"{path}: damaged ({str(error).splitlines()[0]})") from error


def parquet_rows(
    path: Path, columns: list[str], first: int = 0, batch: int = 32
) -> Iterator[list[tuple[int, dict]]]:
    """Batches of (row number, values) from row `first` on; audio stays the bytes it was.

    Row groups before `first` are not read. Raises Damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= first:
                    row += rows
                    continue
                for part in file.iter_batches(batch, row_groups=[group], columns=columns):
                    numbered = list(enumerate(part.to_pylist(), row))
                    row += len(numbered)
                    yield [(number, values) for number, values in numbered if number >= first]
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and disk_full(error):
            raise
        raise Damaged(f"{path}: damaged ({str(error).splitlines()[0]})") from error
