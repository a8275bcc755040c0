"""Fetching for download_data.py: HTTP that goes on where it was cut, archives unpacked safely,
shards of the Hugging Face Hub, packages of Debian, several corpora side by side; and, in the second
half, each kind of corpus from its address to a manifest.

Nothing here is left half-done under its final name: bytes land in `.part` files and are renamed.
"""

from __future__ import annotations

import csv
import errno
import fnmatch
import gzip
import hashlib
import json
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import requests
import soundfile
import urllib3
from tqdm import tqdm

import data
from training import UserError

# Seconds to wait before try 2, 3, …, counted from the last byte that arrived: half an hour in all.
BACK_OFF_S = (1, 2, 4, 8, 15, 30) + (60,) * 29
TIMEOUT_S = (15, 60)  # to connect, between two reads
CHUNK = 1 << 20  # bytes
PLAIN_LINE_S = 60.0  # between two lines of progress in a log file
GIGABYTE = 1e9
FILE_THREADS = 4  # per corpus, for writing, packing and probing
RECORD = "corpus.json"
UNREADABLE = "unreadable.txt"
SPHERE_MAGIC = b"NIST_1A"
G722_RATE = 16000
G722_PACKET = 160  # bytes: 20 ms at 64 kbit/s
RAW_RATE = 16000  # pocketsphinx's headerless files: 16-bit little-endian mono
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_GONE_FOR_GOOD = {401: "access denied", 403: "access denied", 404: "not there", 410: "gone"}


class Stopped(Exception):
    """The run was interrupted; raised in a worker so that it ends at its next byte."""


class Damaged(UserError):
    """An archive or shard whose bytes cannot be right."""


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

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()


def side_by_side(
    tasks: dict[str, Callable[[], Any]], jobs: int, stopped: threading.Event
) -> dict[str, Any]:
    """Run named tasks on `jobs` threads; each one's result, or the UserError that ended it.

    One that fails does not stop the others. Ctrl-C sets `stopped`, waits for the workers to end
    at their next byte, and goes on as KeyboardInterrupt.
    """
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(task): name for name, task in tasks.items()}
        try:
            for future in as_completed(futures):
                results[futures[future]] = _result_or_error(future)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _result_or_error(future: Any) -> Any:
    try:
        return future.result()
    except UserError as error:
        return error


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
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
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
    if code == 429 or code >= 500:
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
            return _unpack_zip(archive, folder, wanted, bar)
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
    count = 0
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = _safe_path(member.name, label)
            if member.isdir() or not wanted(str(path)):
                continue
            if not member.isreg():
                raise UserError(f"{label}: '{member.name}' is a link or device; not unpacked")
            _place(archive.extractfile(member), folder / path, member.size)
            count += 1
            if bar is not None and count % 100 == 0:
                bar.stage(f"unpacking {count}")
    return count


def _unpack_zip(
    archive: Path, folder: Path, wanted: Callable[[str], bool], bar: Bar | None
) -> int:
    count = 0
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            path = _safe_path(member.filename, archive.name)
            if member.is_dir() or not wanted(str(path)):
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise UserError(
                    f"{archive.name}: '{member.filename}' is a link or device; not unpacked"
                )
            with opened.open(member) as source:
                _place(source, folder / path, member.file_size)
            count += 1
            if bar is not None and count % 100 == 0:
                bar.stage(f"unpacking {count}")
    return count


def _safe_path(name: str, label: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{label}: '{name}' points outside its folder; not unpacked")
    return path


def _place(source: IO[bytes], target: Path, size: int) -> None:
    """Write one member, unless a killed run did so before. Raises EOFError where it is short."""
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with open(part, "wb") as file:
        shutil.copyfileobj(source, file, CHUNK)
    if part.stat().st_size != size:
        raise EOFError(f"{target.name} ends early")
    os.replace(part, target)


# --------------------------------------------------------------------------------------- audio


def audio_suffix(coded: bytes) -> str:
    """The file suffix that these bytes call for. Raises AudioError on an unknown format."""
    if coded[:4] in (b"RIFF", b"RF64") and coded[8:12] == b"WAVE":
        return ".wav"
    if coded[:4] == b"fLaC":
        return ".flac"
    if coded[:4] == b"OggS":
        return ".opus" if b"OpusHead" in coded[:64] else ".ogg"
    if coded[:3] == b"ID3" or (coded[:1] == b"\xff" and len(coded) > 1 and coded[1] >= 0xE0):
        return ".mp3"
    if coded[4:8] == b"ftyp":
        return ".m4a"
    raise data.AudioError(f"{len(coded)} bytes of an unknown audio format")


def write_bytes(path: Path, coded: bytes) -> None:
    """Write a file under its final name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(coded)
    os.replace(part, path)


def make_readable(path: Path, keep_wav: bool) -> Path:
    """The file that training reads in place of `path`, which is replaced where they differ.

    Compressed audio stays as it is, byte for byte. 16 and 24 bit WAV becomes FLAC with the very
    same samples at about half the size, unless `keep_wav`. AAC (.m4a), which libsndfile cannot
    read, is decoded to FLAC. Raises AudioError.
    """
    if path.suffix == ".m4a":
        return _replace_by_flac(path, *decode_aac(path))
    if path.suffix.lower() != ".wav" or keep_wav:
        return path
    try:
        with soundfile.SoundFile(path) as file:
            if file.subtype not in ("PCM_16", "PCM_24") or file.frames == 0:
                return path
            samples, subtype, rate = file.read(dtype="int32"), file.subtype, file.samplerate
    except (soundfile.LibsndfileError, ValueError) as error:
        raise data.AudioError(f"{path}: cannot be read as audio ({error})") from error
    return _replace_by_flac(path, samples, rate, subtype)


def _replace_by_flac(
    path: Path, samples: np.ndarray, rate: int, subtype: str = "PCM_16"
) -> Path:
    target = path.with_suffix(".flac")
    part = path.with_name(f".{target.name}.part")
    try:
        soundfile.write(part, samples, rate, subtype, format="FLAC")
        again, _ = soundfile.read(part, dtype=samples.dtype.name)
    except (soundfile.LibsndfileError, AssertionError) as error:
        # libsndfile does not say why, and what it could decode it can encode: the disk is full.
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(part)) from error
    same = np.array_equal(again, samples) if samples.dtype == np.int32 else len(again)
    if not same:
        raise OSError(errno.ENOSPC, "reads back otherwise than it was written", str(part))
    os.replace(part, target)
    path.unlink()
    return target


def decode_aac(path: Path) -> tuple[np.ndarray, int]:
    """(float32 `[T]` or `[T, C]`, sample rate) of a file that FFmpeg reads and libsndfile not."""
    av = _pyav("AAC recordings")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            plan = av.AudioResampler("fltp", layout=stream.layout, rate=stream.rate)
            frames = [out for frame in container.decode(stream) for out in plan.resample(frame)]
    except (av.FFmpegError, IndexError) as error:
        raise data.AudioError(f"{path}: cannot be read as audio ({error})") from error
    if not frames:
        raise data.AudioError(f"{path}: holds no samples")
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    return (samples[0] if len(samples) == 1 else samples.T), frames[0].sample_rate


def _pyav(what: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{what} need PyAV: pip install av") from error
    return av


def decode_g722(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 16000) of a headerless G.722 file, packet by packet of 20 ms."""
    av = _pyav("G.722 recordings")
    context = av.CodecContext.create("g722", "r")
    coded = path.read_bytes()
    packets = [coded[at : at + G722_PACKET] for at in range(0, len(coded), G722_PACKET)]
    frames = [frame for packet in packets for frame in context.decode(av.Packet(packet))]
    samples = [frame.to_ndarray().reshape(-1) for frame in frames]
    if not samples:
        raise data.AudioError(f"{path}: holds no samples")
    return np.concatenate(samples).astype(np.float32) / 32768, G722_RATE


def decode_gsm(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 8000) of a headerless GSM 06.10 file."""
    return data.read_audio(path, sample_rate=8000), 8000


def decode_raw(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 16000) of a headerless 16-bit file."""
    coded = path.read_bytes()
    return np.frombuffer(coded[: len(coded) // 2 * 2], "<i2").astype(np.float32) / 32768, RAW_RATE


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
    start = int(coded[8:16].split()[0])
    channels, rate = int(fields["channel_count"]), int(fields["sample_rate"])
    if "ulaw" in fields.get("sample_coding", ""):
        samples = _mu_law_table()[np.frombuffer(coded[start:], np.uint8)]
    else:
        order = ">i2" if fields.get("sample_byte_format") == "10" else "<i2"
        body = coded[start:]
        samples = np.frombuffer(body[: len(body) // 2 * 2], order).astype(np.int16)
    frames = min(len(samples) // channels, int(fields.get("sample_count", len(samples))))
    if frames == 0:
        raise data.AudioError(f"{path}: holds no samples")
    return samples[: frames * channels].reshape(frames, channels), rate


def _sphere_header(path: Path, coded: bytes) -> dict[str, str]:
    if coded[:7] != SPHERE_MAGIC:
        raise data.AudioError(f"{path}: not a NIST SPHERE file")
    size = int(coded[8:16].split()[0])
    lines = coded[16:size].decode("latin-1").split("end_head")[0].splitlines()
    words = [line.split(None, 2) for line in lines]
    fields = {word[0]: word[2].strip() for word in words if len(word) == 3}
    if not {"channel_count", "sample_rate"} <= fields.keys():
        raise data.AudioError(f"{path}: its header lacks channels or sample rate")
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
        raise UserError(f"{repo}: Hugging Face cannot be reached ({_short(error)})") from error
    return ""


def hub_shards(
    repo: str, revision: str, folders: tuple[str, ...], suffix: str, source: str | None
) -> list[Shard]:
    """The data files of some folders of a dataset, in order.

    `source` is None for the Hub, another endpoint's address, or a local folder laid out like
    the dataset. Raises UserError where a folder is not there, naming those that are.
    """
    if source is not None and not source.startswith(("http://", "https://")):
        return _local_shards(Path(source), folders, suffix)
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError

    api = HfApi(endpoint=source)
    found = []
    for folder in folders:
        try:
            files = api.list_repo_tree(
                repo, folder or None, recursive=True, revision=revision, repo_type="dataset"
            )
            named = [file for file in files if file.path.endswith(suffix)]
        except EntryNotFoundError as error:
            raise UserError(f"{repo}: no folder '{folder}' there{_others(api, repo)}") from error
        except HfHubHTTPError as error:
            raise UserError(f"{repo}: cannot be listed ({_short(error)})") from error
        except Exception as error:  # see hub_access_problem
            reason = f"{repo}: cannot be listed ({_short(error)}); is there a network?"
            raise UserError(reason) from error
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


# -------------------------------------------------------------------------------------- Debian


def download_deb(package: str, folder: Path) -> Path:
    """The package's .deb in `folder`, downloaded there by apt unless it is complete already."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"{package}: needs {tool}, on Debian or Ubuntu; copy data/ from there")
    done = sorted(folder.glob(f"{package}_*.deb"))
    if done:
        return done[0]
    part = folder / f".{package}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    result = subprocess.run(
        ["apt-get", "-q", "download", package], cwd=part, capture_output=True, text=True
    )
    found = sorted(part.glob("*.deb"))
    if result.returncode != 0 or not found:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = errors[0].removeprefix("E: ") if errors else f"exit {result.returncode}"
        raise UserError(
            f"{package}: apt cannot download it ({reason}); its lists may be stale: run "
            "`apt-get update` as root, then this again"
        )
    target = folder / found[0].name
    found[0].replace(target)
    part.rmdir()
    return target


def unpack_deb(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Unpack the files of a .deb that `wanted(name)` chooses. Raises UserError on a bad one."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            unpack_tar(process.stdout, folder, wanted, archive.name)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{archive}: damaged ({error}); delete it and run again") from error
        finally:
            process.stdout.close()
        if process.wait() != 0:
            raise UserError(f"{archive}: damaged; delete it and run again")


# ---------------------------------------------------------------------------- kinds of corpora


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One row of the table; each subclass is one way of getting it.

    `hours` and `gigabytes` are what lies on disk in the end, `download_gb` what comes over the
    network (where it differs), `transient_gb` what is needed beside it for a while. `exact` says
    that `hours` was counted by its authors; else --verify trusts what was fetched. `split` puts
    all of a corpus of one or two voices into one split. `note` says why it is in the default
    set or not, `plan` which of the plan's lines it stands for.
    """

    name: str
    language: str
    license: str
    hours: float
    kilohertz: str
    gigabytes: float = 0.1
    download_gb: float = 0.0
    transient_gb: float = 0.0
    commercial_ok: bool = True
    default: bool = False
    exact: bool = True
    gated: bool = False
    group: str = ""
    split: str = ""
    plan: str = ""
    note: str = ""

    @property
    def place(self) -> str:
        """The folder below --data_dir that holds this corpus' folder."""
        return self.group if self.group in ("emotion", "conversations") else self.language

    @property
    def section(self) -> str:
        """Where --list shows it."""
        return self.group or self.language

    @property
    def marks(self) -> str:
        """One letter a property, for --list."""
        pairs = (("d", self.default), ("g", self.gated), ("n", not self.commercial_ok))
        return " ".join(mark for mark, holds in pairs if holds)


@dataclass(frozen=True, kw_only=True)
class Packages(Corpus):
    """Recordings inside Debian packages, fetched by apt without root.

    `include` and `exclude` are globs below `root`, a folder inside the package. Who speaks: one
    person (`speaker`), or whoever group 1 of `speaker_pattern` names in the path; those names
    ("*" for all) are what `validation` and `test` hold out. With `speakers_known` false the
    names are groups that share no speaker (languages), and the speaker stays unknown.
    """

    packages: tuple[str, ...]
    root: str
    include: tuple[str, ...]
    speaker: str | None = None
    speaker_pattern: str = ""
    speakers_known: bool = True
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    transcripts: str = ""
    group: str = "packages"

    @property
    def marks(self) -> str:
        if "*" in self.test:
            return "test only"
        return "dev only" if "*" in self.validation else ""


@dataclass(frozen=True)
class Archive:
    """A tar or zip: name, hours inside, size in GB, checksum where its authors publish one."""

    name: str
    hours: float
    gigabytes: float
    checksum: str = ""

    @property
    def stem(self) -> str:
        """The folder it is unpacked into."""
        return re.sub(r"\.(tar\.gz|tgz|tar|zip)$", "", self.name)


@dataclass(frozen=True, kw_only=True)
class Archives(Corpus):
    """Archives on the web below one of `bases`, tried in turn; `layout` names a reader."""

    bases: tuple[str, ...]
    archives: tuple[Archive, ...]
    layout: str


@dataclass(frozen=True, kw_only=True)
class Hub(Corpus):
    """Parquet shards on the Hugging Face Hub, in `folders` (a config each) of `repo`.

    `audio` holds the coded bytes, alone or as {bytes, path}. `speakers` and `keys` are columns:
    the first of `speakers` that a row fills names the speaker, where there is none the split
    hangs on all of `keys`, or on group 1 of `recording` in the audio's path. `keep` is (column,
    value) of the rows to take. `tagged` text loses its <noise>, [marks] and {glosses}.
    """

    repo: str
    folders: tuple[str, ...]
    audio: str = "audio_filepath"
    text: str = "text"
    speakers: tuple[str, ...] = ("speaker_id",)
    keys: tuple[str, ...] = ()
    recording: str = ""
    style: str = ""
    keep: tuple[str, str] | None = None
    tagged: bool = False
    official_splits: bool = False
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class HubTars(Corpus):
    """Two-channel conversations on the Hub: tars of <id>.flac and <id>.json."""

    repo: str
    folders: tuple[str, ...]
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class Files(Corpus):
    """Single files on the web: `listing` is a CSV whose column `column` names them."""

    base: str
    listing: str
    column: str
    pattern: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class DataCollective(Corpus):
    """Common Voice at the Mozilla Data Collective, by the id of one release."""


@dataclass(frozen=True, kw_only=True)
class Fisher(Corpus):
    """Fisher as the LDC ships it; read from --fisher_dir, never downloaded."""


@dataclass(frozen=True, kw_only=True)
class Absent(Corpus):
    """A corpus of the plan that does not exist; `note` says so."""

    @property
    def marks(self) -> str:
        return "none"


# ------------------------------------------------------------------------- a corpus on its way


@dataclass(frozen=True)
class Options:
    """What the flags say about how to fetch. `max_hours` is per corpus, 0 for no limit."""

    max_hours: float = 0.0
    mirrors: dict[str, str] = field(default_factory=dict)
    keep_wav: bool = False
    cv_dataset_ids: dict[str, str] = field(default_factory=dict)
    fisher_dir: Path | None = None


@dataclass(frozen=True)
class Job:
    """One corpus on its way: `part` becomes its folder, `archives` is removed in the end."""

    corpus: Corpus
    part: Path
    archives: Path
    bar: Bar
    options: Options

    @property
    def audio(self) -> Path:
        """Where its recordings go."""
        return self.part / "audio"

    @property
    def mirror(self) -> str | None:
        """What --mirror says in place of the table's address."""
        return self.options.mirrors.get(self.corpus.name)

    def enough(self, hours: float) -> bool:
        """Whether --max_hours is reached."""
        return bool(self.options.max_hours) and hours >= self.options.max_hours


@dataclass(frozen=True)
class Fetched:
    """What a fetcher brings: clips or conversations, and files or rows that cannot be read."""

    lines: list[data.Clip] | list[dict]
    unreadable: list[str] = field(default_factory=list)
    whole: bool = True


def fetch(
    corpus: Corpus,
    data_dir: Path,
    options: Options | None = None,
    stopped: threading.Event | None = None,
) -> bool:
    """Bring one corpus into place; False where it was there already. Raises UserError.

    A corpus that an earlier --max_hours had cut short goes on where this call allows more.
    """
    options = options or Options()
    folder = data_dir / corpus.place / corpus.name
    # Hidden, so that no trainer scans it while it grows.
    part = folder.with_name(f".{corpus.name}.part")
    if (folder / data.MANIFEST).exists():
        if not _wants_more(folder, options):
            return False
        shutil.rmtree(part, ignore_errors=True)
        folder.rename(part)
    elif folder.exists():
        raise UserError(f"{folder}: there without {data.MANIFEST}; move it away and run again")
    part.mkdir(parents=True, exist_ok=True)
    archives = data_dir / ".archives" / corpus.name
    size = 0 if options.max_hours else (corpus.download_gb or corpus.gigabytes) * GIGABYTE
    bar = Bar(corpus.name, round(size), stopped)
    try:
        found = FETCHERS[type(corpus)](Job(corpus, part, archives, bar, options))
        if not found.lines:
            raise UserError(f"{corpus.name}: no audio in {_origin(corpus)}; new layout?")
        _write_folder(corpus, part, found, options)
        part.rename(folder)
        shutil.rmtree(archives, ignore_errors=True)
    except OSError as error:
        if not disk_full(error):
            raise
        free = free_bytes(part) / GIGABYTE
        raise UserError(
            f"{corpus.name}: the disk of {data_dir} is full ({free:.2f} GB free); free some space "
            "and run again: it goes on where it was"
        ) from error
    finally:
        bar.close()
    return True


def _origin(corpus: Corpus) -> str:
    if isinstance(corpus, Packages):
        return ", ".join(corpus.packages)
    if isinstance(corpus, Archives):
        return corpus.bases[0]
    return getattr(corpus, "repo", "") or getattr(corpus, "base", "") or corpus.name


def needs_fetching(corpus: Corpus, data_dir: Path, options: Options) -> bool:
    """Whether `fetch` would do anything."""
    folder = data_dir / corpus.place / corpus.name
    return not (folder / data.MANIFEST).exists() or _wants_more(folder, options)


def _wants_more(folder: Path, options: Options) -> bool:
    record = read_record(folder)
    if record.get("whole", True):
        return False
    return not options.max_hours or options.max_hours > record.get("max_hours", 0)


def read_record(folder: Path) -> dict:
    """What `corpus.json` says of how the folder was fetched; empty where there is none."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_folder(corpus: Corpus, part: Path, found: Fetched, options: Options) -> None:
    """The manifest, the list of what could not be read, and how the folder came to be."""
    seconds = sum(
        line["duration"] if isinstance(line, dict) else line.duration for line in found.lines
    )
    record = {
        "name": corpus.name,
        "source": _origin(corpus),
        "license": corpus.license,
        "commercial_ok": corpus.commercial_ok,
        "hours": seconds / 3600,
        "files": len(found.lines),
        "unreadable": len(found.unreadable),
        "whole": found.whole,
        "max_hours": options.max_hours,
    }
    if found.unreadable:
        write_bytes(part / UNREADABLE, ("\n".join(found.unreadable) + "\n").encode())
        tqdm.write(
            f"{corpus.name}: {len(found.unreadable)} files left out, unreadable or listed but "
            f"not there: see {UNREADABLE} in its folder",
            file=sys.stderr,
        )
    write_bytes(part / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    if isinstance(found.lines[0], dict):
        lines = [json.dumps(line, ensure_ascii=False) for line in found.lines]
        write_bytes(part / data.MANIFEST, ("\n".join(lines) + "\n").encode())
    else:
        data.write_manifest(part / data.MANIFEST, found.lines)


# ---------------------------------------------------------------------------- Debian's packages


def fetch_packages(job: Job) -> Fetched:
    """Audio of Debian packages, without installing them: no root, nothing outside the folder."""
    corpus, raw = job.corpus, job.part / ".raw"
    shutil.rmtree(job.part)
    for package in corpus.packages:
        archive = download_deb(package, job.archives)
        unpack_deb(archive, raw, lambda name: _wanted(corpus, name))
    texts = _read_transcripts(raw / corpus.transcripts) if corpus.transcripts else {}
    files = sorted(path for path in (raw / corpus.root).rglob("*") if path.is_file())
    clips, unreadable, seen = [], [], set()
    for source in files:
        digest = hashlib.sha256(source.read_bytes()).digest()
        name = source.relative_to(raw / corpus.root)
        if digest in seen:
            continue
        seen.add(digest)
        job.bar.advance(source.stat().st_size)
        text = texts.get(name.with_suffix("").as_posix())
        clip = _take_recording(corpus, source, job.audio / name, name.as_posix(), text)
        (unreadable if isinstance(clip, str) else clips).append(clip)
    for package in corpus.packages:
        notice = raw / f"usr/share/doc/{package}/copyright"
        if notice.exists():
            notice.replace(job.part / f"copyright.{package}")
    shutil.rmtree(raw)
    return Fetched(clips, unreadable)


def _wanted(corpus: Packages, name: str) -> bool:
    if name == corpus.transcripts or name in {
        f"usr/share/doc/{package}/copyright" for package in corpus.packages
    }:
        return True
    if not name.startswith(f"{corpus.root}/"):
        return False
    below = name.removeprefix(f"{corpus.root}/")
    return _matches(below, corpus.include) and not _matches(below, corpus.exclude)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _read_transcripts(path: Path) -> dict[str, str]:
    """`name: text` lines; a text in brackets tells of a sound, not of words."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pairs = [line.strip().split(":", 1) for line in file if ":" in line and line[0] != ";"]
    texts = {name.strip(): " ".join(text.split()) for name, text in pairs}
    return {name: text for name, text in texts.items() if text and text[0] not in "[(<"}


def _take_recording(
    corpus: Packages, source: Path, target: Path, name: str, text: str | None
) -> data.Clip | str:
    """Move or decode one file into place; the reason where it cannot be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.suffix in DECODERS:
            target = target.with_suffix(".flac")
            data.write_audio(target, *DECODERS[source.suffix](source))
        else:
            source.replace(target)
        duration, sample_rate = data.probe(target)
    except data.AudioError as error:
        target.unlink(missing_ok=True)
        return str(error)
    speaker, split = speaker_and_split(corpus, name)
    return replace(
        _clip(corpus, target, duration, sample_rate, ""), speaker=speaker, text=text, split=split
    )


def speaker_and_split(corpus: Packages, name: str) -> tuple[str | None, str]:
    """Who speaks in the file `name` (below the corpus's root), and the split that follows."""
    match = re.search(corpus.speaker_pattern, name) if corpus.speaker_pattern else None
    group = match.group(1) if match else None
    split = "train"
    for held_out, groups in (("validation", corpus.validation), ("test", corpus.test)):
        if "*" in groups or group in groups:
            split = held_out
    named = f"{corpus.name}-{group}" if group is not None and corpus.speakers_known else None
    return corpus.speaker or named, split


DECODERS: dict[str, Callable] = {
    ".g722": decode_g722,
    ".gsm": decode_gsm,
    ".raw": decode_raw,
}


def _clip(corpus: Corpus, path: Path, duration: float, sample_rate: int, key: str) -> data.Clip:
    """A clip with what its corpus says of it, its split hanging on `key`."""
    return data.Clip(
        path=path,
        duration=duration,
        sample_rate=sample_rate,
        language=corpus.language,
        license=corpus.license,
        commercial_ok=corpus.commercial_ok,
        split=corpus.split or data.split_for(key),
    )


# ------------------------------------------------------------------------------ archives, files


@dataclass(frozen=True)
class About:
    """What a layout knows of one file. `key` is what the split hangs on, else the speaker."""

    speaker: str | None = None
    text: str | None = None
    emotion: str | None = None
    key: str = ""


def fetch_archives(job: Job) -> Fetched:
    """Each archive: downloaded, checked, unpacked into a folder of its own, removed."""
    hours, whole = 0.0, True
    for archive in job.corpus.archives:
        if job.enough(hours):
            whole = False
            break
        file, target = job.archives / archive.name, job.audio / archive.stem
        if not target.exists():
            _download_from_any(job, archive, file)
            _unpack_apart(file, target, job.bar)
        file.unlink(missing_ok=True)
        hours += archive.hours
    return _clips_of(job, job.corpus.layout, whole)


def _download_from_any(job: Job, archive: Archive, file: Path) -> None:
    bases = (job.mirror,) if job.mirror else job.corpus.bases
    for number, base in enumerate(bases, start=1):
        url = f"{base.rstrip('/')}/{archive.name}"
        try:
            download(url, file, job.bar, checksum=archive.checksum)
            return
        except UserError as error:
            if number == len(bases):
                raise
            tqdm.write(f"{error}; trying {bases[number]}", file=sys.stderr)


def _unpack_apart(file: Path, target: Path, bar: Bar) -> None:
    """Unpack beside `target`, then rename: what has the final name is complete and checked."""
    staging = target.with_name(f".{target.name}")
    try:
        unpack(file, staging, bar)
    except Damaged as error:
        # Without a checksum this is how a bad copy shows: the next run fetches it anew.
        file.unlink()
        raise UserError(f"{error}; removed: run again to fetch it anew") from error
    except UserError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    staging.rename(target)


def fetch_files(job: Job) -> Fetched:
    """Every file that a CSV names, a few at a time. One that is not there is listed."""
    base = (job.mirror or job.corpus.base).rstrip("/")
    listing = job.archives / job.corpus.listing
    download(f"{base}/{job.corpus.listing}", listing, job.bar)
    with open(listing, encoding="utf-8", newline="") as file:
        names = [row[job.corpus.column] for row in csv.DictReader(file)]

    def take(name: str) -> str:
        below = job.corpus.pattern.format(name)
        target = job.audio / Path(below).name
        if target.with_suffix(".flac").exists():
            return ""
        try:
            download(f"{base}/{below}", target, job.bar)
        except UserError as error:
            if "HTTP 404" not in str(error):
                raise
            return str(error)
        return ""

    with ThreadPoolExecutor(FILE_THREADS) as pool:
        missing = [problem for problem in pool.map(take, names) if problem]
    found = _clips_of(job, job.corpus.layout, whole=True)
    return replace(found, unreadable=missing + found.unreadable)


def fetch_common_voice(job: Job) -> Fetched:
    """One release, by Mozilla's own client, then unpacked like any archive."""
    dataset = job.options.cv_dataset_ids.get(job.corpus.language)
    if not dataset:
        raise UserError(f"{job.corpus.name}: {job.corpus.note}")
    if not os.environ.get("MDC_API_KEY"):
        raise UserError(f"{job.corpus.name}: set MDC_API_KEY, from your Data Collective account")
    try:
        import datacollective
    except ImportError as error:
        raise UserError(f"{job.corpus.name}: pip install datacollective") from error
    target = job.audio / "clips"
    if not target.exists():
        job.archives.mkdir(parents=True, exist_ok=True)
        # The call was renamed in 0.4.2.
        call = getattr(datacollective, "download_dataset", None)
        call = call or datacollective.save_dataset_to_disk
        try:
            file = Path(call(dataset, download_directory=str(job.archives)))
        except Exception as error:  # whatever its HTTP client raises
            raise UserError(f"{job.corpus.name}: the Data Collective says: {error}") from error
        _unpack_apart(file, target, job.bar)
    return _clips_of(job, "common_voice", whole=True)


def _clips_of(job: Job, layout: str, whole: bool) -> Fetched:
    """Clips of everything below the audio folder that the layout knows."""
    load, describe = LAYOUTS[layout]
    texts = load(job.audio)
    suffixes = data.AUDIO_SUFFIXES
    paths = sorted(path for path in job.audio.rglob("*") if path.suffix.lower() in suffixes)

    def take(path: Path) -> data.Clip | str | None:
        about = describe(path, texts)
        job.bar.advance(0)
        return None if about is None else _clip_of_file(job, path, about)

    with ThreadPoolExecutor(FILE_THREADS) as pool:
        taken = [found for found in pool.map(take, paths) if found is not None]
    unreadable = [found for found in taken if isinstance(found, str)]
    # By path: a kill between packing a WAV and removing it leaves both.
    clips = {found.path: found for found in taken if not isinstance(found, str)}
    return Fetched(list(clips.values()), unreadable, whole)


def _clip_of_file(job: Job, path: Path, about: About) -> data.Clip | str:
    try:
        path = make_readable(path, job.options.keep_wav)
        duration, sample_rate = data.probe(path)
    except data.AudioError as error:
        return str(error)
    key = about.speaker or about.key or path.relative_to(job.audio).as_posix()
    clip = _clip(job.corpus, path, duration, sample_rate, key)
    return replace(clip, speaker=about.speaker, text=about.text or None, emotion=about.emotion)


def _spaced_lines(root: Path, name: str) -> dict[str, str]:
    """`id text` lines of every file of that name (a glob) below `root`."""
    texts = {}
    for path in sorted(root.rglob(name)):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, text = line.strip().partition(" ")
            texts[key] = text.strip()
    return texts


def _tab_lines(root: Path) -> dict[str, str]:
    """`id<tab>text` lines of every line_index.tsv below `root`."""
    texts = {}
    for path in sorted(root.rglob("line_index.tsv")):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, text = line.partition("\t")
            texts[key.strip()] = text.strip()
    return texts


def _validated(root: Path) -> dict[str, dict[str, str]]:
    """Rows of Common Voice's validated.tsv by file name."""
    rows = {}
    for path in sorted(root.rglob("validated.tsv")):
        with open(path, encoding="utf-8", newline="") as file:
            rows |= {row["path"]: row for row in csv.DictReader(file, delimiter="\t", quoting=3)}
    return rows


def _librispeech(path: Path, texts: dict) -> About:
    # Readers are numbered alike in all three LibriVox corpora: one name keeps each in one split.
    return About(f"librivox-{path.stem.split('-')[0]}", texts.get(path.stem, "").lower())


def _libritts(path: Path, _: dict) -> About:
    text = path.with_suffix(".normalized.txt")
    said = text.read_text(encoding="utf-8").strip() if text.exists() else None
    return About(f"librivox-{path.stem.split('_')[0]}", said)


def _librilight(path: Path, _: dict) -> About:
    return About(f"librivox-{path.parts[-3]}")


def _line_index(path: Path, texts: dict) -> About:
    return About("-".join(path.stem.split("_")[:2]), texts.get(path.stem))


def _transcription(path: Path, texts: dict) -> About:
    return About(f"openslr-103-{path.stem.split('_')[0]}", texts.get(path.stem))


def _kaldi(path: Path, texts: dict) -> About:
    # Callers are not named: the parts of a call, <call>-<part>, stay together.
    return About(text=texts.get(path.stem), key=path.stem.rpartition("-")[0] or path.stem)


def _common_voice_clip(path: Path, rows: dict) -> About | None:
    row = rows.get(path.name)
    return About(f"common-voice-{row['client_id'][:16]}", row["sentence"]) if row else None


CREMA_D_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
CREMA_D_SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
RAVDESS_SENTENCES = ("Kids are talking by the door.", "Dogs are sitting by the door.")
# Rasa's other styles (commands, conversation, news, books) are no emotion: they stay unlabelled.
RASA_EMOTIONS = {
    "happy": "happy",
    "happiness": "happy",
    "sad": "sad",
    "sadness": "sad",
    "anger": "angry",
    "angry": "angry",
    "fear": "fear",
    "disgust": "disgust",
    "surprise": "surprise",
    "neutral": "neutral",
    "wiki": "neutral",
    "indic": "neutral",
}


def _crema_d(path: Path, _: dict) -> About | None:
    parts = path.stem.split("_")
    if len(parts) != 4 or parts[2] not in CREMA_D_EMOTIONS:
        return None
    said = CREMA_D_SENTENCES.get(parts[1])
    return About(f"crema-d-{parts[0]}", said, CREMA_D_EMOTIONS[parts[2]])


def _ravdess(path: Path, _: dict) -> About | None:
    parts = path.stem.split("-")
    if len(parts) != 7 or not all(part.isdigit() for part in parts):
        return None
    emotion, sentence = int(parts[2]), int(parts[4])
    said, felt = RAVDESS_SENTENCES[sentence - 1], RAVDESS_EMOTIONS[emotion - 1]
    return About(f"ravdess-{parts[6]}", said, felt)


def _no_texts(_: Path) -> dict:
    return {}


# Name of a layout -> (texts of a folder, what is known of a file; None where it is no clip).
LAYOUTS: dict[str, tuple[Callable[[Path], dict], Callable[[Path, dict], About | None]]] = {
    "librispeech": (lambda root: _spaced_lines(root, "*.trans.txt"), _librispeech),
    "libritts": (_no_texts, _libritts),
    "librilight": (_no_texts, _librilight),
    "line_index": (_tab_lines, _line_index),
    "transcription": (lambda root: _spaced_lines(root, "transcription.txt"), _transcription),
    "kaldi": (lambda root: _spaced_lines(root, "text"), _kaldi),
    "common_voice": (_validated, _common_voice_clip),
    "crema_d": (_no_texts, _crema_d),
    "ravdess": (_no_texts, _ravdess),
}


# ------------------------------------------------------------------------- Hugging Face datasets


def fetch_hub(job: Job) -> Fetched:
    """Parquet shards one after another; what each row became is written down as it happens."""
    corpus = job.corpus
    shards = hub_shards(
        corpus.repo, corpus.revision, corpus.folders, ".parquet", job.mirror
    )
    records: list[dict] = []
    hours, whole = 0.0, True
    for shard in shards:
        if job.enough(hours):
            whole = False
            break
        taken, finished = _take_shard(job, shard, hours)
        records += taken
        whole &= finished
        hours += sum(record.get("duration", 0.0) for record in taken) / 3600
    lines = [_clip_of_record(job, record) for record in records if "path" in record]
    bad = [record["unreadable"] for record in records if "unreadable" in record]
    return Fetched(lines, bad, whole)


def _take_shard(job: Job, shard: Shard, hours: float) -> tuple[list[dict], bool]:
    """(records of the rows, whether all of them are there). Goes on at the first missing row."""
    journal = job.part / ".rows" / f"{shard.path.replace('/', '__')}.rows"
    records, finished = _read_journal(journal, job.part)
    if finished:
        job.bar.advance(shard.size)
        return records, True
    path = fetch_shard(shard, job.archives, job.bar)
    coming = _new_records(job, shard, path, len(records))
    try:
        with open(journal, "a", encoding="utf-8") as file:
            for record in coming:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                records.append(record)
                hours += record.get("duration", 0.0) / 3600
                if job.enough(hours):
                    coming.close()
                    _remove_later_rows(job, shard, len(records))
                    return records, False
            file.write(json.dumps({"end": len(records)}) + "\n")
    except Damaged as error:
        if shard.local is None:
            path.unlink()
        raise UserError(f"{error}; run again to fetch it anew") from error
    if shard.local is None:
        path.unlink()
    return records, True


def _folder_of(job: Job, shard: Shard) -> Path:
    return job.audio / re.sub(r"\.parquet$", "", shard.path)


def _remove_later_rows(job: Job, shard: Shard, count: int) -> None:
    """Recordings that were written ahead of --max_hours' end."""
    for path in _folder_of(job, shard).iterdir():
        if not path.stem.isdigit() or int(path.stem) >= count:
            path.unlink()


def _read_journal(journal: Path, part: Path) -> tuple[list[dict], bool]:
    """(records of a shard's rows so far, whether it is finished).

    Cut off at the first line that a kill tore, or whose recording is not on the disk in full:
    a lost machine may have written the word down and not yet the recording.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not journal.exists():
        return [], False
    records, good = [], 0
    with open(journal, "rb") as file:
        for line in file:
            record = _parsed(line)
            if record is None:
                break
            if "end" in record:
                return records, True
            if "path" in record and not _has_size(part / record["path"], record["bytes"]):
                break
            records.append(record)
            good += len(line)
    os.truncate(journal, good)
    return records, False


def _parsed(line: bytes) -> dict | None:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _new_records(job: Job, shard: Shard, path: Path, first: int) -> Iterator[dict]:
    """Write the audio of every row from `first` on and tell what became of it, in order."""
    columns = _columns_of(job.corpus, path)
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        for rows in parquet_rows(path, columns, first):
            job.bar.stage(f"unpacking row {rows[-1][0]}" if rows else "")
            yield from pool.map(lambda row: _record_of_row(job, shard, *row), rows)
    job.bar.stage("")


def _columns_of(corpus: Hub, path: Path) -> list[str]:
    """The columns to read. Raises UserError where the one with the audio is not there."""
    there = parquet_columns(path)
    needed = [corpus.audio] + ([corpus.keep[0]] if corpus.keep else [])
    missing = [name for name in needed if name not in there]
    if missing:
        raise UserError(
            f"{corpus.name}: no column {', '.join(missing)}; it has changed and now has "
            f"{', '.join(there)}"
        )
    useful = {*needed, corpus.text, corpus.style, *corpus.speakers, *corpus.keys}
    return [name for name in there if name in useful]


def _record_of_row(job: Job, shard: Shard, number: int, row: dict) -> dict:
    """What becomes of one row, its audio written: {path, bytes, duration, …}, or why not."""
    corpus = job.corpus
    if corpus.keep and row[corpus.keep[0]] != corpus.keep[1]:
        return {"row": number, "other": row[corpus.keep[0]]}
    cell = row[corpus.audio]
    coded, named = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
    where = f"{shard.path} row {number}"
    if not coded:
        return {"row": number, "unreadable": f"{where}: no audio"}
    target = _folder_of(job, shard) / f"{number:06d}"
    try:
        target = target.with_suffix(audio_suffix(coded))
        write_bytes(target, coded)
        target = make_readable(target, job.options.keep_wav)
        duration, sample_rate = data.probe(target)
    except data.AudioError as error:
        target.unlink(missing_ok=True)
        return {"row": number, "unreadable": f"{where}: {error}"}
    speaker, key = _speaker_and_key(corpus, row, named or "", shard)
    return {
        "row": number,
        "path": target.relative_to(job.part).as_posix(),
        "bytes": target.stat().st_size,
        "duration": duration,
        "sample_rate": sample_rate,
        "speaker": speaker,
        "text": _clean(row.get(corpus.text), corpus.tagged),
        "emotion": RASA_EMOTIONS.get(str(row.get(corpus.style)).lower()),
        "split": _official_split(shard.path) if corpus.official_splits else data.split_for(key),
    }


def _speaker_and_key(corpus: Hub, row: dict, named: str, shard: Shard) -> tuple[str | None, str]:
    """(speaker or None, what the split hangs on)."""
    for column in corpus.speakers:
        if row.get(column) not in (None, ""):
            speaker = f"{corpus.name}-{str(row[column]).lower()}"
            return speaker, speaker
    if corpus.keys and any(row.get(column) not in (None, "") for column in corpus.keys):
        return None, "-".join(str(row.get(column)) for column in corpus.keys)
    match = re.search(corpus.recording, named) if corpus.recording and named else None
    # Rows of one shard lie side by side in the corpus, and so may share a voice.
    return None, match.group(1) if match else shard.path


def _clean(text: str | None, tagged: bool) -> str | None:
    if text and tagged:
        text = re.sub(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}|--+", " ", text)
    return " ".join(text.split()) or None if text else None


def _official_split(path: str) -> str:
    match = re.search(r"(train|valid|dev|test)", path.rsplit("/", 2)[-2] + path.rsplit("/")[-1])
    found = match.group(1) if match else "train"
    return "validation" if found in ("valid", "dev") else found


def _clip_of_record(job: Job, record: dict) -> data.Clip:
    path = job.part / record["path"]
    clip = _clip(job.corpus, path, record["duration"], record["sample_rate"], "")
    return replace(
        clip,
        speaker=record["speaker"],
        text=record["text"],
        emotion=record["emotion"],
        split=job.corpus.split or record["split"],
    )


# -------------------------------------------------------------------------------- conversations


def fetch_hub_tars(job: Job) -> Fetched:
    """Tars of two-channel dialogues with their annotations, unpacked one by one."""
    corpus = job.corpus
    shards = hub_shards(corpus.repo, corpus.revision, corpus.folders, ".tar", job.mirror)
    lines, bad, whole, hours = [], [], True, 0.0
    for shard in shards:
        if job.enough(hours):
            whole = False
            break
        target = job.audio / re.sub(r"\.tar$", "", shard.path)
        if target.exists():
            job.bar.advance(shard.size)
        else:
            file = fetch_shard(shard, job.archives, job.bar)
            _unpack_apart(file, target, job.bar)
            if shard.local is None:
                file.unlink()
        for path in sorted(target.rglob("*.flac")):
            line = _dialogue(corpus, path, _official_split(shard.path))
            (bad if isinstance(line, str) else lines).append(line)
        hours = sum(line["duration"] for line in lines) / 3600
    return Fetched(lines, bad, whole)


def _dialogue(corpus: Corpus, path: Path, split: str) -> dict | str:
    """A manifest line of Behavior-SD: channel k is speaker k, listeners' sounds are turns too."""
    try:
        duration, sample_rate = data.probe(path)
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        turns = []
        for said in about["utterances"]:
            turns.append(_turn(said["speaker_idx"], said))
            sounds = said.get("backchannels") or []
            turns += [_turn(1 - said["speaker_idx"], sound) for sound in sounds]
    except (data.AudioError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: {error}"
    turns.sort(key=lambda turn: turn["start"])
    return _conversation(corpus, path, duration, sample_rate, turns, split)


def _turn(channel: int, said: dict) -> dict:
    return {
        "who": "user" if channel else "agent",
        "start": float(said["start_time"]),
        "end": max(float(said["end_time"]), float(said["start_time"])),
        "text": said.get("tts_text") or "",
    }


def _conversation(
    corpus: Corpus, path: Path, duration: float, rate: int, turns: list[dict], split: str
) -> dict:
    """A line of a manifest of conversations; its path is relative to the corpus' folder."""
    root = next(parent for parent in path.parents if parent.name == "audio").parent
    return {
        "id": f"{corpus.name}-{path.stem}",
        "path": path.relative_to(root).as_posix(),
        "agent_channel": 0,
        "user_channel": 1,
        "language": corpus.language,
        "source": corpus.name,
        "license": corpus.license,
        "commercial_ok": corpus.commercial_ok,
        "split": split,
        "duration": round(duration, 4),
        "sample_rate": rate,
        "turns": turns,
    }


def fetch_fisher(job: Job) -> Fetched:
    """The LDC's folders as they are: SPHERE files become two-channel FLAC, side A the agent."""
    folder = job.options.fisher_dir
    if folder is None:
        raise UserError(f"fisher: {job.corpus.note}")
    if not folder.is_dir():
        raise UserError(f"--fisher_dir {folder}: no such folder")
    calls = sorted(folder.rglob("*.sph"))
    scripts = {path.stem: path for path in folder.rglob("fe_*.txt")}
    if not calls:
        raise UserError(f"--fisher_dir {folder}: no .sph files there; give the LDC's own folders")
    lines, bad, hours = [], [], 0.0
    for call in calls:
        if job.enough(hours):
            return Fetched(lines, bad, whole=False)
        job.bar.advance(call.stat().st_size)
        line = _call(job, call, scripts.get(call.stem))
        (bad if isinstance(line, str) else lines).append(line)
        hours += 0 if isinstance(line, str) else line["duration"] / 3600
    return Fetched(lines, bad)


def _call(job: Job, call: Path, script: Path | None) -> dict | str:
    target = job.audio / call.parent.name / f"{call.stem}.flac"
    try:
        if not target.exists():
            samples, rate = read_sphere(call)
            if samples.shape[1] != 2:
                raise data.AudioError(f"{call}: {samples.shape[1]} channels, not 2")
            target.parent.mkdir(parents=True, exist_ok=True)
            data.write_audio(target, samples.astype("float32") / 32768, rate)
        duration, rate = data.probe(target)
    except data.AudioError as error:
        return str(error)
    turns = _fisher_turns(script) if script else []
    split = data.split_for(call.stem)
    return _conversation(job.corpus, target, duration, rate, turns, split)


def _fisher_turns(script: Path) -> list[dict]:
    """`start end A: words` lines; side A is the agent."""
    turns = []
    for line in script.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"\s*([\d.]+)\s+([\d.]+)\s+([AB])\d*:\s*(.*)", line)
        if match and float(match[1]) <= float(match[2]):
            who = "agent" if match[3] == "A" else "user"
            turns.append(
                {"who": who, "start": float(match[1]), "end": float(match[2]), "text": match[4]}
            )
    return turns


def fetch_nothing(job: Job) -> Fetched:
    """For rows that say why there is nothing to fetch."""
    raise UserError(f"{job.corpus.name}: {job.corpus.note}")


FETCHERS: dict[type[Corpus], Callable[[Job], Fetched]] = {
    Packages: fetch_packages,
    Archives: fetch_archives,
    Files: fetch_files,
    DataCollective: fetch_common_voice,
    Hub: fetch_hub,
    HubTars: fetch_hub_tars,
    Fisher: fetch_fisher,
    Absent: fetch_nothing,
}
