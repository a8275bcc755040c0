"""Speech on disk: manifests, folders without one, augmentation, random windows, resumable sampling.

Letters in shapes: `T` samples, `F` codec frames (50 a second, hop 480 at 24 kHz).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow
import soxr
import torch

import command
from audio import AUDIO_SUFFIXES, FRAME_SECONDS, HOP, SAMPLE_RATE, AudioError, probe, read_audio
from audio import write_audio as write_audio  # for those that read and write
from command import UserError, as_json_line, atomic_write, check_fields, default_workers
from phones import SILENCE
from training import Distributed, item_rng

LANGUAGES, EMOTIONS = command.LANGUAGES, command.EMOTIONS
SPLITS = ("train", "validation", "test")
# Audio that a scan counts and names, and leaves where it is.
_PASSED_OVER = (".raw", ".pcm", ".sph", ".sw", ".shn", ".ra", ".rm", ".g722", ".g729", ".vox",
                ".dss", ".ds2", ".mid", ".midi", ".mpc", ".aa", ".aax", ".dsf", ".alac", ".qcp",
                ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".mpeg4", ".m4v", ".ts", ".part", ".zip",
                ".tar", ".gz", ".tgz")  # fmt: skip
MANIFEST = "manifest.jsonl"
UNKNOWN_PHONE = -100  # ignored by torch's cross entropy

# What a line of a speech manifest may hold.
_FIELDS = {"path": "path", "duration": "number or NaN", "sample_rate": "number or NaN",
           "language": LANGUAGES, "speaker": "text?", "text": "text?", "emotion": (*EMOTIONS, None),
           "augmented": "true or false?", "license": "text?", "commercial_ok": "true or false?",
           "split": (*SPLITS, None), "phones": "list of [text, start, end]?"}  # fmt: skip
_BLOCK_ROWS = 10000  # of a manifest, until they are columns

# A clip that says it is longer (s), or of a rate beyond these, is measured before it is used.
LONGEST, _RATES_HZ = 4 * 3600.0, (1000, 768000)


@dataclass(frozen=True)
class Clip:
    """One line of a speech manifest. `path` is absolute once loaded; times are in seconds. `phones`
    is a list of `[phone, start, end]`, where an engine or an aligner gave them."""

    path: Path
    duration: float
    sample_rate: int
    language: str
    speaker: str | None = None
    text: str | None = None
    emotion: str | None = None
    augmented: bool = False
    license: str = ""
    commercial_ok: bool = False
    split: str = "train"
    phones: list | None = field(default=None, hash=False)


class Clips(Sequence[Clip]):
    """Clips as columns: millions in some hundred bytes each, which forked workers share. Reads as a
    list of Clip; `column` and `codes` give a field of all at once."""

    def __init__(self, *tables: pyarrow.Table) -> None:
        # Several dictionaries a column, and many chunks, would make each look-up slow.
        self.table = pyarrow.concat_tables(tables).unify_dictionaries().combine_chunks()

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> Clips:
        if isinstance(clips, Clips):
            return clips
        return cls(_table([{**vars(clip), "path": os.fspath(clip.path)} for clip in clips], ""))

    def __len__(self) -> int:
        return len(self.table)

    def __add__(self, other: Iterable[Clip]) -> Clips:
        return Clips(self.table, Clips.of(other).table)

    def __getitem__(self, index: int | slice) -> Clip | Clips:
        if isinstance(index, slice):
            return Clips(self.table.take(np.arange(len(self))[index]))
        row = range(len(self))[index]  # raises IndexError
        return _clip_of_row(self.table.slice(row, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Clip]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from map(_clip_of_row, batch.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def column(self, name: str) -> np.ndarray:
        """A number or flag of every clip, in their order."""
        return self.table[name].to_numpy()

    def codes(self, name: str) -> tuple[np.ndarray, list]:
        """A field of names of every clip: indices `[N]`, -1 where unknown, into the names."""
        column = pyarrow.concat_arrays(self.table[name].chunks or [pyarrow.nulls(0, _NAMES)])
        return column.indices.fill_null(-1).to_numpy(), column.dictionary.to_pylist()

    def hours(self, known: str | None = None) -> float:
        """Hours of all clips, or of those whose field `known` is known."""
        seconds = self.column("duration")
        if known is not None:
            seconds = seconds[self.table[known].is_valid().to_numpy()]
        return float(seconds.sum()) / 3600

    def with_columns(self, **columns: Sequence) -> Clips:
        new = {n: pyarrow.array(v, _COLUMNS.field(n).type) for n, v in columns.items()}
        return Clips(pyarrow.table({n: new.get(n, self.table[n]) for n in _COLUMNS.names}))

    def where(self, chosen: np.ndarray) -> Clips:  # bool [N]
        return Clips(self.table.filter(pyarrow.array(chosen, pyarrow.bool_())))


_NAMES = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
# Fields as they are stored; `folder` and `name` are the path's bytes, `phones` JSON.
_COLUMNS = pyarrow.schema({
    "folder": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()), "name": pyarrow.large_binary(),
    "duration": pyarrow.float64(), "sample_rate": pyarrow.int32(),
    **dict.fromkeys(("language", "speaker", "emotion", "license", "split"), _NAMES),
    **dict.fromkeys(("text", "phones"), pyarrow.large_string()),
    **dict.fromkeys(("augmented", "commercial_ok"), pyarrow.bool_())})  # fmt: skip
_DEFAULTS = {"augmented": False, "license": "", "commercial_ok": False, "split": "train"}


def _clip_of_row(row: dict) -> Clip:
    path = Path(os.fsdecode(os.path.join(row.pop("folder"), row.pop("name"))))
    row["phones"] = row["phones"] and json.loads(row["phones"])
    return Clip(path, **row)


def _table(rows: list[dict], folder: str | Path) -> pyarrow.Table:
    """Columns of checked rows, whose paths are relative to `folder`."""
    columns = {name: [_DEFAULTS.get(name) if row.get(name) is None else row[name] for row in rows]
               for name in _FIELDS}  # fmt: skip
    paths = [os.path.split(path) for path in columns.pop("path")]
    folders = {head: os.fsencode(os.path.normpath(os.path.join(folder, head)) if folder else head)
               for head in {head for head, _ in paths}}  # fmt: skip
    columns["folder"] = [folders[head] for head, _ in paths]
    columns["name"] = [os.fsencode(name) for _, name in paths]
    columns["duration"] = [s if 0 <= s <= 1e9 else 0.0 for s in columns["duration"]]
    low, high = _RATES_HZ
    columns["sample_rate"] = [round(r) if low <= r <= high else 0 for r in columns["sample_rate"]]
    columns["phones"] = [found and json.dumps(found) for found in columns["phones"]]
    return pyarrow.table({f.name: pyarrow.array(columns[f.name], f.type) for f in _COLUMNS})


def read_manifest(path: str | Path) -> Clips:
    """Clips of a manifest; an impossible duration or sample rate is 0. UserError on a bad file."""
    path = Path(os.path.abspath(path))
    tables, rows = [], []
    try:
        for at, row in command.json_lines(path):
            check_fields(row, _FIELDS, f"{path}, line {at}")
            rows.append(row)
            if len(rows) == _BLOCK_ROWS:
                tables.append(_table(rows, path.parent))
                rows = []
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error.strerror})") from error
    return Clips(*tables, _table(rows, path.parent))


def write_manifest(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write clips one a line, atomically, with paths relative to the manifest."""
    folder = os.path.abspath(Path(path).parent)
    os.makedirs(folder, exist_ok=True)
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        for clip in clips:
            path = Path(os.path.relpath(clip.path, folder)).as_posix()
            row = asdict(clip) | {"path": path, "duration": round(clip.duration, 4)}
            optional = ("text", "emotion", "phones", "augmented")
            row = {k: v for k, v in row.items() if k not in optional or v not in (None, False)}
            file.write(as_json_line(row))


def split_for(key: str, validation: float = 0.05, test: float = 0.05) -> str:
    """The split of a speaker or recording, by a hash of its name: stable as a corpus grows."""
    point = hashed(key) / 2**64
    return "validation" if point < validation else "test" if point < validation + test else "train"


def hashed(*parts: object) -> int:
    """64 bits, the same on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8], "big")


class _Scan:
    """What a look through folders met besides clips, for the user to know."""

    def __init__(self) -> None:
        self.bad: dict[Path, str] = {}  # unreadable files, and why
        self.notes: Counter[str] = Counter()  # how many of what

    def probe_all(self, files: Iterable[Path]) -> list[tuple[float, int] | None]:
        """`probe` of each; None for the bad."""

        def probed(file: Path) -> tuple[float, int] | None:
            try:
                return probe(file)
            except AudioError as error:
                self.bad[file] = str(error)

        with ThreadPoolExecutor(4 * default_workers(8)) as pool:
            return list(pool.map(probed, files))

    def report(self, log: str | Path | None) -> None:
        """Warnings on stderr; the unreadable files are listed in `log`."""
        if self.bad:
            files = sorted(self.bad)
            listed = f"first: {self.bad[files[0]]}"
            if log is not None:
                Path(log).parent.mkdir(parents=True, exist_ok=True)
                Path(log).write_bytes(os.fsencode("".join(f"{file}\n" for file in files)))
                listed = f"listed in {log}; {listed}"
            self.notes[f"unreadable audio files skipped, {command.printable(listed)}"] = len(files)
        for what, count in (+self.notes).items():  # without zeros
            print(f"warning: {count} {what}", file=sys.stderr)


def _walk(roots: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, sorted names of its files), each folder once, whatever links lead to it: they are
    followed last, so that a folder goes by its own name where it has one."""
    seen: set[str] = set()
    waiting, links = [*reversed(roots)], []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        # What is neither file nor folder, a pipe say, would be waited for; a broken link is named.
        names = [e.name for e in entries if e.is_file() or (e.is_symlink() and not e.is_dir())]
        yield folder, names
        # A manifest lists everything below its folder.
        if MANIFEST not in names:
            below = [entry for entry in entries if entry.is_dir()]
            waiting += [Path(e.path) for e in reversed(below) if not e.is_symlink()]
            links += [Path(e.path) for e in below if e.is_symlink()]


def _scan_files(files: list[Path], data_dir: str | Path, scan: _Scan) -> list[Clip]:
    """Clips of files without a manifest. The language is the nearest folder name that is one, also
    `data_dir`'s, else "other". Splits keep a speaker together; each language has training clips."""
    root = Path(data_dir).resolve()
    default = _language_in(Path(os.path.abspath(data_dir))) or _language_in(root) or "other"
    found: list[tuple[int, Clip]] = []  # with the hash that the split hangs on
    for file, probed in zip(files, scan.probe_all(files), strict=True):
        if probed is None:
            continue
        below, speaker = file.relative_to(root), _speaker_from_name(file)
        key, language = speaker or below.as_posix(), _language_in(below.parent) or default
        found.append((hashed(key), Clip(file, *probed, language, speaker, split=split_for(key))))
    nearest: dict[str, int] = {}  # to training, or in it: at least these are trained on
    for place, clip in found:
        nearest[clip.language] = max(place, nearest.get(clip.language, 0))
    return [replace(clip, split="train") if place == nearest[clip.language] else clip
            for place, clip in found]  # fmt: skip


def _language_in(path: Path) -> str | None:
    return next((p.lower() for p in reversed(path.parts) if p.lower() in LANGUAGES), None)


def _speaker_from_name(path: Path) -> str | None:
    """Of LibriSpeech's and LibriTTS' layout, `speaker/chapter/speaker-chapter-0001`; never a date,
    for all recordings of a year would count as one voice."""
    match = re.fullmatch(r"(?!(?:19|20)\d\d[-_])(\d{1,5})([-_])\d+\2\d+(_\d+)?", path.stem)
    return match[1] if match and match[1] in (path.parent.name, path.parent.parent.name) else None


def load_splits(data_dirs: Sequence[str | Path], splits: Sequence[str],
                commercial_only: bool = False,
                unreadable_log: str | Path | None = None) -> list[Clips]:  # fmt: skip
    """The clips of each split below `data_dirs`: from manifests, and by scanning what has none. A
    file counts once: as a manifest lists it, rather than as a scan finds it. What cannot be read is
    counted on stderr and listed in `unreadable_log`. Raises UserError on a missing folder, an empty
    manifest, folders without audio and an empty train split; other splits may be empty."""
    scan = _Scan()
    clips = _load_all(data_dirs, scan)
    scan.report(unreadable_log)
    where = " ".join(map(str, data_dirs))
    if not len(clips):
        raise UserError(f"{where}: no readable audio there; run download_data.py or check the path")
    if commercial_only:
        clips = clips.where(clips.column("commercial_ok"))
        if not len(clips):
            raise UserError(f"{where}: nothing left under --commercial_only; add other corpora")
    at, names = clips.codes("split")
    chosen = [clips.where(at == names.index(s) if s in names else at < 0) for s in splits]
    if any(split == "train" and not len(own) for split, own in zip(splits, chosen, strict=True)):
        raise UserError(f"{where}: {len(clips)} clips, none in the train split; add more")
    return chosen


def load_clips(dirs: Sequence[str | Path], split: str, commercial_only: bool = False) -> Clips:
    return load_splits(dirs, [split], commercial_only)[0]


def _load_all(data_dirs: Sequence[str | Path], scan: _Scan) -> Clips:
    remedy = "; run download_data.py"
    roots = [command.existing_folder(path, "--data_dirs", remedy) for path in data_dirs]
    tables, loose = [_COLUMNS.empty_table()], []
    for folder, names in _walk(roots):
        if MANIFEST not in names:
            loose += [folder / name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
            suffixes = (os.path.splitext(name)[1].lower() for name in names)
            for suffix in filter(_PASSED_OVER.__contains__, suffixes):
                scan.notes[f"files of {suffix} passed over: convert them to be trained on"] += 1
            continue
        tables.append(read_manifest(folder / MANIFEST).table)
        if not len(tables[-1]):
            raise UserError(f"{folder / MANIFEST}: an empty manifest; fetch the corpus again")
    clips = _measured(_each_once(Clips(*tables), scan), scan)
    loose, scanned = _unlisted(loose, clips), []
    for data_dir, root in zip(data_dirs, roots, strict=True):
        scanned += _scan_files([f for f in loose if f.is_relative_to(root)], data_dir, scan)
        loose = [file for file in loose if not file.is_relative_to(root)]
    return Clips(clips.table, Clips.of(scanned).table)


def _each_once(clips: Clips, scan: _Scan) -> Clips:
    """Each file once, by its first line; held out if any line says so, commercial if all do."""
    # Folders are few; clips by the million are not asked for one by one on a network volume.
    at, names = clips.codes("folder")
    real = [os.path.realpath(os.fsdecode(name)) for name in names]
    same = np.unique(real, return_inverse=True)[1]
    split, splits = clips.codes("split")
    lines = {"folder": same[at], "name": clips.table["name"], "line": np.arange(len(clips)),
             "split": np.array([SPLITS.index(name) for name in splits], np.int8)[split],
             "free": clips.column("commercial_ok").astype(np.int8)}  # fmt: skip
    wanted = [("line", "min"), ("split", "min"), ("split", "max"), ("free", "min")]
    files = pyarrow.table(lines).group_by(["folder", "name"]).aggregate(wanted)
    if len(files) == len(clips):
        return clips
    files = files.sort_by("line_min")
    least, most = files["split_min"].to_numpy(), files["split_max"].to_numpy()
    said = "files are held out by one manifest and not by another: kept out of training"
    scan.notes[said] = int(((least == 0) & (most > 0)).sum())
    free, chosen = files["free_min"].to_numpy() == 1, Clips(clips.table.take(files["line_min"]))
    return chosen.with_columns(split=[SPLITS[i] for i in most], commercial_ok=free)


def _measured(clips: Clips, scan: _Scan) -> Clips:
    """With a file's own length and rate where the manifest's cannot be, or without the clip."""
    seconds, rates = clips.column("duration").copy(), clips.column("sample_rate").copy()
    odd = np.flatnonzero((seconds < FRAME_SECONDS) | (seconds > LONGEST) | (rates == 0))
    for i, probed in zip(odd, scan.probe_all(clips[int(i)].path for i in odd), strict=True):
        seconds[i], rates[i] = probed or (0.0, 0)
    readable = rates > 0
    said = "clips whose manifest has no possible duration were measured"
    scan.notes[said] = int(readable[odd].sum())
    return clips.with_columns(duration=seconds, sample_rate=rates).where(readable)


def _unlisted(files: list[Path], clips: Clips) -> list[Path]:
    """Those of `files` that no manifest lists; one of those that are the same file by links."""
    own: dict[str, Path] = {}
    for file in files:
        real = os.path.realpath(file)
        if real not in own or not file.is_symlink():
            own[real] = file
    near = {os.path.dirname(real) for real in own}
    at, names = clips.codes("folder")
    folders = [os.path.realpath(os.fsdecode(name)) for name in names] if own else []
    for i, folder in enumerate(folders):
        if folder in near:
            for name in clips.table["name"].filter(pyarrow.array(at == i)).to_pylist():
                own.pop(os.path.join(folder, os.fsdecode(name)), None)
    return list(own.values())


def count_speakers(clips: Iterable[Clip]) -> int:  # known ones alone
    return len(Clips.of(clips).table["speaker"].drop_null().unique())


def hours_by_language(clips: Iterable[Clip]) -> dict[str, float]:
    """Hours a language, in the order of LANGUAGES, languages without audio left out."""
    sums = Clips.of(clips).table.group_by("language").aggregate([("duration", "sum")])
    hours = {row["language"]: row["duration_sum"] / 3600 for row in sums.to_pylist()}
    return {language: hours[language] for language in LANGUAGES if hours.get(language)}


def draw_speed(rng: np.random.Generator, probability: float = 0.3) -> float:
    """A playback speed of 0.85 to 1.18 with `probability`, else 1.0; pitch and formants follow."""
    chosen, speed = rng.random() < probability, rng.uniform(0.85, 1.18)
    return float(speed) if chosen else 1.0


def distort(audio: np.ndarray, rng: np.random.Generator, probability: float = 0.3) -> np.ndarray:
    """Noise, band limit, gain, a room and a microphone, each with `probability`, on 24 kHz mono
    float32 `[T]`; every phone stays in its place."""
    noise, band, gain, room, microphone = rng.random(5) < probability
    if not len(audio):
        return audio
    if microphone:
        audio = colour(audio, rng)
    if room:
        tail = rng.uniform(0.1, 0.45), rng.uniform(-18.0, -6.0)
        audio = reverberate(audio, room_response(*tail, rng))[: len(audio)]
    if noise:
        snr_db = rng.uniform(5.0, 30.0)  # drawn before the noise
        audio = add_noise(audio, coloured_noise(len(audio), rng), snr_db)
    if band:
        audio = band_limit(audio, rng)
    if gain:
        audio = audio * 10 ** (rng.uniform(-12.0, 6.0) / 20)
    return unclipped(audio)


def room_response(seconds: float, tail_db: float, rng: np.random.Generator) -> np.ndarray:
    """Impulse response: the direct sound, then noise that falls by 60 dB in `seconds` (RT60)."""
    n = round(seconds * SAMPLE_RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    tail *= 10 ** (tail_db / 20) / np.sqrt(np.sum(tail**2))
    early = round(rng.uniform(0.002, 0.01) * SAMPLE_RATE)  # the first wall
    return np.concatenate([[1.0], np.zeros(early), tail]).astype(np.float32)


def reverberate(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Audio `[T]` in a room of an impulse response `[n]`: `[T + n - 1]`."""
    n = len(audio) + len(response) - 1
    size = 1 << (n - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(response, size), size)[:n]


def change_speed(audio: np.ndarray, sample_rate: int, speed: float) -> np.ndarray:
    """Audio `[T]` played `speed` times as fast, pitch moving with it: `[T / speed]`."""
    return soxr.resample(audio, sample_rate * speed, sample_rate)


def coloured_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise `[length]` with power as 1/f^slope, slope drawn from 0 (white) to 2 (brown)."""
    slope = rng.uniform(0.0, 2.0)
    spectrum = np.fft.rfft(rng.standard_normal(length, dtype=np.float32))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (slope / 2)
    return np.fft.irfft(spectrum, length)


def add_noise(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """`audio + noise`, both `[T]`, at an SNR of mean powers; `audio` where either is silent."""
    power, noise_power = np.mean(audio**2), np.mean(noise**2)
    if power == 0 or noise_power == 0:
        return audio
    return audio + noise * np.sqrt(power / noise_power / 10 ** (snr_db / 10))


def unclipped(audio: np.ndarray) -> np.ndarray:
    """Audio `[T]` as float32, scaled down where it passes full scale: clipping would distort it."""
    peak = float(np.abs(audio).max(initial=0.0))
    return (audio / peak if peak > 1 else audio).astype(np.float32, copy=False)


def colour(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio `[T]` as another microphone hears it: up to 8 dB more or less at each octave."""
    hertz = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    octaves = np.log2(np.maximum(hertz, 1.0) / 93.75)  # 94 Hz to 12 kHz
    gain_db = np.interp(octaves, np.arange(8), rng.uniform(-8.0, 8.0, 8))
    return np.fft.irfft(np.fft.rfft(audio) * 10 ** (gain_db / 20), len(audio))


def band_limit(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """24 kHz audio `[T]` below 3.4 to 10 kHz, half of the time above 200 to 300 Hz: a telephone."""
    low_pass = rng.uniform(3400.0, 10000.0)
    telephone, high_pass = rng.random() < 0.5, rng.uniform(200.0, 300.0)
    hertz = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    response = np.clip(1 - (hertz - low_pass) / (0.1 * low_pass), 0, 1)
    if telephone:
        response *= np.clip((hertz - 0.5 * high_pass) / (0.5 * high_pass), 0, 1)
    return np.fft.irfft(np.fft.rfft(audio) * response, len(audio))


def frame_labels(phones: list | None, phone_ids: dict[str, int] | None, frames: int,
                 start: float = 0.0, speed: float = 1.0,
                 end: float | None = None) -> np.ndarray:  # fmt: skip
    """Phone ids `[F]` int64 at the frames' middles of a window from `start` s, `speed` times as
    fast: silence behind `end` s (padding); -100 where there is none, or `phone_ids` lacks it."""
    labels = np.full(frames, UNKNOWN_PHONE, np.int64)
    if not phones or phone_ids is None:
        return labels
    middles = start + (np.arange(frames) + 0.5) * FRAME_SECONDS * speed
    names, starts, ends = zip(*phones, strict=True)
    starts, ends = np.array(starts, np.float64), np.array(ends, np.float64)
    ids = np.array([phone_ids.get(name, UNKNOWN_PHONE) for name in names])
    at = np.searchsorted(starts, middles, side="right") - 1
    inside = (at >= 0) & (middles < ends[np.maximum(at, 0)])
    labels[inside] = ids[at[inside]]
    if end is not None:
        labels[middles >= end] = phone_ids.get(SILENCE, UNKNOWN_PHONE)
    return labels


class WindowDataset(torch.utils.data.Dataset):
    """Random windows, one an item, drawn by (seed, epoch, index) alone: `dataset[epoch, index]`. A
    language is drawn with p ~ hours ** (1 / language_temperature), a clip by its length, a place in
    it evenly. Clips shorter than the window are padded with zeros at the end. Items: `audio`
    float32 `[1, T]`, where asked `clean`, it before `distort`, `language`, `speaker` ("": unknown),
    `phones` int64 `[F]` (-100 where unknown), and where it lies: `path`, `start` in seconds,
    `speed`. `augment` is the chance of a change of speed and of each change of `distort`. An
    unreadable file is counted in `unreadable`, listed in `unreadable_log`, and another window is
    drawn, as where one lies behind the end of a file shorter than its manifest says. After 50 in a
    row clips are drawn evenly (a wrong duration may outweigh all others), after 100: UserError."""

    def __init__(self, clips: Sequence[Clip], window_seconds: float, seed: int = 0,
                 epoch_items: int = 1000, language_temperature: float = 1.0, augment: float = 0.0,
                 phone_ids: dict[str, int] | None = None,
                 unreadable_log: str | Path | None = None, clean=False) -> None:  # fmt: skip
        if not len(clips):
            raise UserError("no clips to draw windows from; check --data_dirs")
        self.clips = Clips.of(clips)
        self.samples = round(window_seconds * SAMPLE_RATE)
        self.seed, self.epoch_items, self.augment = seed, epoch_items, augment
        self.phone_ids, self.unreadable_log, self.clean = phone_ids, unreadable_log, clean
        self._groups = _language_groups(self.clips, language_temperature)
        # Shared memory, so that worker processes report bad files.
        self._bad = torch.zeros(len(self.clips), dtype=torch.bool).share_memory_()
        self._logged: set[int] = set()

    def __len__(self) -> int:
        return self.epoch_items

    @property
    def unreadable(self) -> int:
        """Files found unreadable so far, in all worker processes of this one."""
        return int(self._bad.sum())

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < self.epoch_items:
            raise IndexError(index)
        rng, last = item_rng(self.seed, epoch, index), "windows behind the end of their files"
        for tried in range(100):
            # Every try draws from the same generator: bad files stay part of what is repeatable.
            which = self._draw_clip(rng, evenly=tried >= 50)
            place, speed = rng.random(), draw_speed(rng, self.augment)
            if self._bad[which]:
                continue
            try:
                window = self._window(which, place, speed, rng)
            except AudioError as error:
                last = str(error)
                self._bad[which] = True
                self._log(which, last)
                continue
            if window is not None:
                return window
        found = f"100 unreadable audio files in a row ({self.unreadable} clips so far)"
        raise AudioError(f"{found}; do paths and durations fit the files? The last: {last}")

    def _draw_clip(self, rng: np.random.Generator, evenly: bool) -> int:
        point, within = rng.random(2)
        if evenly:
            return int(within * len(self.clips))
        ends, groups = self._groups
        members, seconds = groups[min(np.searchsorted(ends, point, "right"), len(groups) - 1)]
        at = np.searchsorted(seconds, within * seconds[-1], side="right")
        return int(members[min(at, len(members) - 1)])

    def _window(self, which: int, place: float, speed: float, rng: np.random.Generator):
        """The window at `place` (0 to 1) in the clip; None where its file ends before that."""
        clip = self.clips[which]
        augmented = self.augment > 0 and not clip.augmented
        speed = speed if augmented else 1.0
        seconds = self.samples / SAMPLE_RATE * speed
        start = place * max(clip.duration - seconds, 0.0)
        audio = read_audio(clip.path, start, seconds, speed=speed)[: self.samples]
        if not len(audio):
            self._log(which, f"{clip.path}: shorter than the {clip.duration:g} s of its manifest")
            return None
        heard = {"clean": audio} if self.clean else {}
        if augmented:
            audio = distort(audio, rng, self.augment)
        frames = math.ceil(self.samples / HOP)
        end = start + len(audio) / SAMPLE_RATE * speed if len(audio) < self.samples else None
        labels = frame_labels(clip.phones, self.phone_ids, frames, start, speed, end)
        sounds = {name: torch.from_numpy(np.pad(sound, (0, self.samples - len(sound)))[None])
                  for name, sound in {"audio": audio, **heard}.items()}  # fmt: skip
        return {**sounds, "phones": torch.from_numpy(labels), "language": clip.language,
                "speaker": clip.speaker or "", "path": str(clip.path),
                "start": start, "speed": speed}  # fmt: skip

    def _log(self, which: int, text: str) -> None:
        if self.unreadable_log is not None and which not in self._logged:
            self._logged.add(which)
            Path(self.unreadable_log).parent.mkdir(parents=True, exist_ok=True)
            with open(self.unreadable_log, "ab") as file:
                file.write(os.fsencode(f"{text}\n"))


def _language_groups(clips: Clips, temperature: float) -> tuple[np.ndarray, list[tuple]]:
    """(upper ends of the languages' shares of [0, 1], per language (clip indices, running s))."""
    weights, groups = [], []
    at, names = clips.codes("language")
    for language in filter(names.__contains__, LANGUAGES):
        members = np.flatnonzero(at == names.index(language))
        seconds = np.cumsum(clips.column("duration")[members])
        if len(members) and seconds[-1] > 0:
            weights.append(seconds[-1] ** (1 / temperature))
            groups.append((members, seconds))
    if not groups:
        raise UserError("the clips hold no audio: all durations are zero; fetch the corpus again")
    return np.cumsum(weights) / np.sum(weights), groups


def epochs_of_batches(items: int, batch_size: int, num_epochs: int, epoch: int = 0,
                      consumed: int = 0, rank: int = 0,
                      world_size: int = 1) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """One rank's batches of (epoch, index), from `consumed` samples into `epoch` to the last epoch.
    `batch_size` and `consumed` count the samples of all ranks, which see together what one would.
    The last, incomplete batch of an epoch is dropped."""
    for current in range(epoch, num_epochs):
        for first in range(consumed if current == epoch else 0, items - batch_size + 1, batch_size):
            yield [(current, i) for i in range(first + rank, first + batch_size, world_size)]


def training_batches(dataset: torch.utils.data.Dataset, batch_size: int, num_workers: int,
                     process: Distributed, num_epochs: int, epoch: int = 0, consumed: int = 0,
                     collate: Callable | None = None) -> Iterator[tuple]:  # fmt: skip
    """(epoch, samples consumed in it once this batch is done, batch), to the last epoch's end, from
    `epoch` and `consumed`: what workers have fetched ahead is not consumed. `batch_size`: of all
    ranks. Raises UserError where an epoch holds no batch or it cannot be shared evenly."""
    if batch_size % process.world_size:
        raise UserError(f"--batch_size {batch_size} must divide by {process.world_size} ranks")
    if len(dataset) < batch_size:
        small = f"an epoch of {len(dataset)} windows is smaller than one batch of {batch_size}"
        raise UserError(f"{small}; lower --batch_size or add audio")
    place = (num_epochs, epoch, consumed, process.rank, process.world_size)
    # One loader for all epochs: its workers, started anew, would leave a GPU waiting each time.
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=epochs_of_batches(len(dataset), batch_size, *place),
        num_workers=num_workers, collate_fn=collate, prefetch_factor=4 if num_workers else None,
        pin_memory=process.device.type == "cuda")  # fmt: skip
    for batch in _errors_in_one_line(loader):
        if consumed > len(dataset) - batch_size:  # at the epoch's end
            epoch, consumed = epoch + 1, 0
        consumed += batch_size
        yield epoch, consumed, batch


def _errors_in_one_line(loader: torch.utils.data.DataLoader) -> Iterator:
    """The loader's batches; a worker's UserError or its end without a word is one line."""
    try:
        yield from loader
    except UserError as error:
        if not str(error).startswith("Caught "):
            raise
        raise UserError(str(error).strip().splitlines()[-1].split("Error: ", 1)[-1]) from None
    except RuntimeError as error:
        ended = str(error).startswith("DataLoader worker (pid")
        if not ended and "shared memory" not in str(error):
            raise
        how = "ended" if ended else "got no shared memory"
        mend = "lower --num_workers, or give the machine more (/dev/shm too)"
        said = f"a process that loads data {how}, as a rule for want of memory: {mend}"
        raise UserError(said) from error
