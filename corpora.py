"""The kinds of corpora: each from what was fetched to a folder of audio with a manifest.

A row of download_data.py's table is one of the classes below; a fetcher a class turns its files
into clips or conversations, and `fetch` renames the folder into place when it is complete. How the
bytes arrive is in fetching.py.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

import data
import fetching
from audio import AUDIO_SUFFIXES, AudioError, probe, write_audio
from command import (
    UserError,
    as_json_line,
    check_fields,
    file_name,
    first_line,
    text_lines,
    write_text,
)
from fetching import FILE_THREADS, GIGABYTE, Bar, Damaged, Shard

RECORD = "corpus.json"
UNREADABLE = "unreadable.txt"
RECORD_OF_ROW = {
    "path": "path", "bytes": "whole", "duration": "number", "sample_rate": "whole",
    "speaker": "text?", "text": "text?", "emotion": "text?", "split": "text",
}  # fmt: skip
RECORD_FIELDS = {
    "hours": "number", "whole": "flag", "max_hours": "number", "unpack_seconds": "number?",
}  # fmt: skip
# Audio that nothing here reads: reported, so that no hour is lost in silence.
NOT_READ = {".sph", ".raw", ".pcm", ".shn", ".ra", ".rm", ".g722", ".dsf", ".mpc", ".vox"}


# ---------------------------------------------------------------------------- kinds of corpora


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One row of the table; each subclass is one way of getting it.

    `hours` and `gigabytes` are on disk in the end, `download_gb` over the network where that
    differs, `transient_gb` beside it for a while. `exact`: its authors counted `hours`; else
    --verify trusts what was fetched. `split`: all of it, for one or two voices. `note`: why it is
    in the default set or not; `plan`: which of the plan's lines it stands for.
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

    def folder(self, data_dir: Path) -> Path:
        """Where it lies in the end."""
        return data_dir / self.place / self.name

    @property
    def origin(self) -> str:
        """Where it comes from, for its record."""
        return getattr(self, "repo", "") or getattr(self, "base", "") or self.name

    @property
    def marks(self) -> str:
        """One letter a property, for --list."""
        pairs = (("d", self.default), ("g", self.gated), ("n", not self.commercial_ok))
        return " ".join(mark for mark, holds in pairs if holds)


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

    @property
    def origin(self) -> str:
        return self.bases[0]


@dataclass(frozen=True, kw_only=True)
class OnHub(Corpus):
    """Files on the Hugging Face Hub, in `folders` of `repo` and below them."""

    repo: str
    folders: tuple[str, ...]
    revision: str = "main"
    kilohertz: str = "16"
    transient_gb: float = 0.7
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Hub(OnHub):
    """Parquet shards.

    `audio` holds the coded bytes, alone or as {bytes, path}. `speakers` and `keys` are columns:
    the first of `speakers` that a row fills names the speaker; without one the split hangs on all
    of `keys`, or on group 1 of `recording` in the audio's path. `keep`: (column, value) of the
    rows to take. `tagged` text loses its <noise>, [marks] and {glosses}.
    """

    audio: str = "audio_filepath"
    text: str = "text"
    speakers: tuple[str, ...] = ("speaker_id",)
    keys: tuple[str, ...] = ()
    recording: str = ""
    style: str = ""
    keep: tuple[str, str] | None = None
    tagged: bool = False
    official_splits: bool = False


@dataclass(frozen=True, kw_only=True)
class HubTars(OnHub):
    """Two-channel conversations: tars of <id>.flac and <id>.json."""


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
class FetchOptions:
    """What the flags say about how to fetch. `max_hours` is per corpus, 0 for no limit."""

    max_hours: float = 0.0
    mirrors: dict[str, str] = field(default_factory=dict)
    keep_wav: bool = False
    cv_dataset_ids: dict[str, str] = field(default_factory=dict)
    fisher_dir: Path | None = None

    @property
    def own(self) -> bool:
        """Whether corpora are named by the user's own copies or releases of them."""
        return self.fisher_dir is not None or bool(self.cv_dataset_ids)


@dataclass(frozen=True)
class Job:
    """One corpus on its way: `part` becomes its folder, `archives` is removed in the end."""

    corpus: Corpus
    part: Path
    archives: Path
    bar: Bar
    options: FetchOptions

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
    """What a fetcher brings: clips or conversations, and files or rows that cannot be read.

    `complete` is False where --max_hours cut it short.
    """

    lines: list[data.Clip] | list[dict]
    unreadable: list[str] = field(default_factory=list)
    complete: bool = True


def fetch(
    corpus: Corpus,
    data_dir: Path,
    options: FetchOptions | None = None,
    stopped: threading.Event | None = None,
) -> bool:
    """Bring one corpus into place; False where it was there already. Raises UserError.

    A corpus that an earlier --max_hours had cut short goes on where this call allows more.
    """
    options = options or FetchOptions()
    folder = corpus.folder(data_dir)
    # Hidden, so that no trainer scans it while it grows.
    part = folder.with_name(f".{corpus.name}.part")
    if not needs_fetching(corpus, data_dir, options):
        return False
    if (folder / data.MANIFEST).exists():
        shutil.rmtree(part, ignore_errors=True)
        folder.rename(part)
    elif folder.exists():
        raise UserError(f"{folder}: there without {data.MANIFEST}; move it away and run again")
    from_nothing = not part.exists()
    part.mkdir(parents=True, exist_ok=True)
    archives = data_dir / ".archives" / corpus.name
    size = 0 if options.max_hours else (corpus.download_gb or corpus.gigabytes) * GIGABYTE
    bar = Bar(corpus.name, round(size), stopped)
    try:
        found = FETCHERS[type(corpus)](Job(corpus, part, archives, bar, options))
        if not found.lines:
            raise UserError(f"{corpus.name}: no audio in {corpus.origin}; new layout?")
        # What an earlier run unpacked is in the hours and not in the seconds.
        seconds = bar.unpack_seconds if from_nothing else 0.0
        _write_folder(corpus, part, found, options, seconds)
        part.rename(folder)
        shutil.rmtree(archives, ignore_errors=True)
    except OSError as error:
        if not fetching.disk_full(error):
            raise
        free = fetching.free_bytes(part) / GIGABYTE
        raise UserError(
            f"{corpus.name}: the disk of {data_dir} is full ({free:.2f} GB free); free some space "
            "and run again: it goes on where it was"
        ) from error
    finally:
        bar.close()
    return True


def needs_fetching(corpus: Corpus, data_dir: Path, options: FetchOptions) -> bool:
    """Whether `fetch` would do anything."""
    folder = corpus.folder(data_dir)
    if not (folder / data.MANIFEST).exists():
        return True
    record = read_record(folder)
    more = not options.max_hours or options.max_hours > record.get("max_hours", 0)
    return more and not record.get("whole", True)


def read_record(folder: Path) -> dict:
    """What `corpus.json` says of how the folder was fetched; empty where there is none."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        check_fields(record, RECORD_FIELDS, RECORD)
    except (OSError, ValueError, AttributeError, UserError):
        return {}
    return record


def _write_folder(
    corpus: Corpus, part: Path, found: Fetched, options: FetchOptions, unpack_seconds: float
) -> None:
    """The manifest, the list of what could not be read, and how the folder came to be."""
    conversations = isinstance(found.lines[0], dict)
    durations = (line["duration"] if conversations else line.duration for line in found.lines)
    record = {
        "name": corpus.name,
        "source": corpus.origin,
        "license": corpus.license,
        "commercial_ok": corpus.commercial_ok,
        "hours": sum(durations) / 3600,
        "files": len(found.lines),
        "unreadable": len(found.unreadable),
        "whole": found.complete,
        "max_hours": options.max_hours,
        "unpack_seconds": round(unpack_seconds, 3),
    }
    if found.unreadable:
        listed = "".join(f"{line}\n" for line in found.unreadable)
        write_text(part / UNREADABLE, listed.encode(errors="backslashreplace").decode())
        tqdm.write(
            f"{corpus.name}: {len(found.unreadable)} files left out, unreadable or listed but "
            f"not there: see {UNREADABLE} in its folder",
            file=sys.stderr,
        )
    write_text(part / RECORD, json.dumps(record, indent=2) + "\n")
    if conversations:
        write_text(part / data.MANIFEST, "".join(map(as_json_line, found.lines)))
    else:
        data.write_manifest(part / data.MANIFEST, found.lines)


def clip_of(
    corpus: Corpus, path: Path, duration: float, sample_rate: int, split: str, **more: str | None
) -> data.Clip:
    """A clip with what its corpus says of it; a corpus of one split has the last word on it."""
    return data.Clip(
        path, duration, sample_rate, corpus.language, license=corpus.license,
        commercial_ok=corpus.commercial_ok, split=corpus.split or split, **more,
    )  # fmt: skip


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
    hours, complete = 0.0, True
    for archive in job.corpus.archives:
        if job.enough(hours):
            complete = False
            break
        file, target = job.archives / archive.name, job.audio / archive.stem
        if not target.exists():
            _download_from_any(job, archive, file)
            _unpack_apart(file, target, job.bar)
        file.unlink(missing_ok=True)
        hours += archive.hours
    return _clips_of(job, job.corpus.layout, complete)


def _download_from_any(job: Job, archive: Archive, file: Path) -> None:
    bases = (job.mirror,) if job.mirror else job.corpus.bases
    for number, base in enumerate(bases, start=1):
        url = f"{base.rstrip('/')}/{archive.name}"
        try:
            return fetching.download(url, file, job.bar, checksum=archive.checksum)
        except UserError as error:
            if number == len(bases):
                raise
            tqdm.write(f"{error}; trying {bases[number]}", file=sys.stderr)


def _unpack_apart(file: Path, target: Path, bar: Bar) -> None:
    """Unpack beside `target`, then rename: what has the final name is complete and checked."""
    staging = target.with_name(f".{target.name}")
    try:
        with bar.unpacking():
            fetching.unpack(file, staging, bar)
    except UserError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not isinstance(error, Damaged):
            raise
        # Without a checksum this is how a bad copy shows: the next run fetches it anew.
        file.unlink()
        raise UserError(f"{error}; removed: run again to fetch it anew") from error
    staging.rename(target)


def fetch_files(job: Job) -> Fetched:
    """Every file that a CSV names, a few at a time. One that is not there is listed."""
    base = (job.mirror or job.corpus.base).rstrip("/")
    listing = job.archives / job.corpus.listing
    fetching.download(f"{base}/{job.corpus.listing}", listing, job.bar)
    names = [row[job.corpus.column] for row in _table(listing, ",", (job.corpus.column,))]
    there = fetching.sizes(job.audio)

    def take(name: str) -> str:
        below = job.corpus.pattern.format(name)
        target = job.audio / file_name(Path(below).name)
        try:
            if target.with_suffix(".flac").name not in there:
                fetching.download(f"{base}/{below}", target, job.bar)
        except UserError as error:
            if "HTTP 404" not in str(error):
                raise
            return str(error)
        return ""

    with ThreadPoolExecutor(FILE_THREADS) as pool:
        missing = [problem for problem in pool.map(take, names) if problem]
    found = _clips_of(job, job.corpus.layout, complete=True)
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
    return _clips_of(job, "common_voice", complete=True)


def _clips_of(job: Job, layout: str, complete: bool) -> Fetched:
    """Clips of all below the audio folder that the layout knows; what is left out is reported."""
    load, describe = LAYOUTS[layout]
    texts = load(job.audio)
    files = sorted(job.audio.rglob("*.*"))
    paths = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]

    def take(path: Path) -> data.Clip | str | None:
        about = describe(path, texts)
        job.bar.advance(0)
        return None if about is None else _clip_of_file(job, path, about)

    with job.bar.unpacking(), ThreadPoolExecutor(FILE_THREADS) as pool:
        taken = list(pool.map(take, paths))
    unknown = [path for path, found in zip(paths, taken, strict=True) if found is None]
    not_read = [path for path in files if path.suffix.lower() in NOT_READ]
    for left_out, why in (
        (unknown, "in no list, or named otherwise than the corpus names its clips"),
        (not_read, "of a format that is not read"),
    ):
        if left_out:
            first = left_out[0].relative_to(job.part)
            tqdm.write(f"{job.corpus.name}: {len(left_out)} files left out, {why}; first: {first}")
    unreadable = [found for found in taken if isinstance(found, str)]
    # By path: a kill between packing a WAV and removing it leaves both.
    clips = {found.path: found for found in taken if isinstance(found, data.Clip)}
    return Fetched(list(clips.values()), unreadable, complete)


def _clip_of_file(job: Job, path: Path, about: About) -> data.Clip | str:
    try:
        path, duration, sample_rate = fetching.make_readable(path, job.options.keep_wav)
    except AudioError as error:
        return str(error)
    split = data.split_for(about.speaker or about.key or path.relative_to(job.audio).as_posix())
    known = {"speaker": about.speaker, "text": about.text or None, "emotion": about.emotion}
    return clip_of(job.corpus, path, duration, sample_rate, split, **known)


def _texts(root: Path, name: str, between: str) -> dict[str, str]:
    """`id text` lines of every file of that name (a glob) below `root`, but what is no UTF-8."""
    texts = {}
    for path in sorted(root.rglob(name)):
        for line in text_lines(path, "replace"):
            key, _, text = line.strip().partition(between)
            if "\ufffd" not in text:
                texts[key.strip()] = text.strip()
    return texts


def _table(path: Path, delimiter: str, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows that fill the `needed` columns. Raises UserError where a column is not there."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
        missing = [name for name in needed if name not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)}; has the corpus changed?")
        try:
            yield from (row for row in rows if all(row[name] for name in needed))
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: {error}") from error


def _validated(root: Path) -> dict[str, dict[str, str]]:
    """Rows of Common Voice's validated.tsv by file name."""
    needed = ("client_id", "path", "sentence")
    paths = sorted(root.rglob("validated.tsv"))
    return {row["path"]: row for path in paths for row in _table(path, "\t", needed)}


def _named(prefix: str, pattern: str, path: Path) -> str | None:
    """The speaker in a file's name, where the corpus names its own files so: a name that only
    begins with a number (a date) names no speaker."""
    match = re.fullmatch(pattern, path.stem)
    return f"{prefix}-{match[1]}" if match else None


# Readers are numbered alike in all three LibriVox corpora: one name keeps each in one split.
def _librispeech(path: Path, texts: dict) -> About:
    return About(_named("librivox", r"(\d+)-\d+-\d+", path), texts.get(path.stem, "").lower())


def _libritts(path: Path, _: dict) -> About:
    text = None
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        text = path.with_suffix(".normalized.txt").read_text(encoding="utf-8").strip()
    return About(_named("librivox", r"(\d+)_\d+_\d+_\d+", path), text)


def _librilight(path: Path, _: dict) -> About:
    return About(f"librivox-{path.parts[-3]}" if path.parts[-3].isdecimal() else None)


def _line_index(path: Path, texts: dict) -> About:
    match = re.fullmatch(r"(te[fm]_\d+)_\d+", path.stem)
    return About(match and match[1].replace("_", "-"), texts.get(path.stem))


def _transcription(path: Path, texts: dict) -> About:
    return About(_named("openslr-103", r"(\d+)_\d+", path), texts.get(path.stem))


def _kaldi(path: Path, texts: dict) -> About:
    # Callers are not named: the parts of a call, <call>-<part>, stay together.
    return About(text=texts.get(path.stem), key=path.stem.rpartition("-")[0] or path.stem)


def _common_voice(path: Path, rows: dict) -> About | None:
    row = rows.get(path.name)
    return About(f"common-voice-{row['client_id'][:16]}", row["sentence"]) if row else None


CREMA_D_EMOTIONS = {
    "ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad",
}  # fmt: skip
CREMA_D_SENTENCES = {
    "IEO": "It's eleven o'clock.", "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.", "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.", "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.", "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.", "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.", "WSI": "We'll stop in a couple of minutes.",
}  # fmt: skip
RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
RAVDESS_SENTENCES = ("Kids are talking by the door.", "Dogs are sitting by the door.")
# Rasa's other styles (commands, conversation, news, books) are no emotion: they stay unlabelled.
RASA_EMOTIONS = {name: name for name in ("happy", "sad", "angry", "fear", "disgust", "surprise")}
RASA_EMOTIONS |= {"happiness": "happy", "sadness": "sad", "anger": "angry"}
RASA_EMOTIONS |= {name: "neutral" for name in ("neutral", "wiki", "indic")}


def _crema_d(path: Path, _: dict) -> About | None:
    parts = path.stem.split("_")
    if len(parts) != 4 or parts[2] not in CREMA_D_EMOTIONS:
        return None
    text, emotion = CREMA_D_SENTENCES.get(parts[1]), CREMA_D_EMOTIONS[parts[2]]
    return About(f"crema-d-{parts[0]}", text, emotion)


def _ravdess(path: Path, _: dict) -> About | None:
    match = re.fullmatch(r"03-0[12]-0([1-8])-0[12]-0([12])-0[12]-(\d\d)", path.stem)
    if not match:
        return None
    text, emotion = RAVDESS_SENTENCES[int(match[2]) - 1], RAVDESS_EMOTIONS[int(match[1]) - 1]
    return About(f"ravdess-{match[3]}", text, emotion)


# Name of a layout -> (texts of a folder, what is known of a file; None where it is no clip).
LAYOUTS: dict[str, tuple[Callable[[Path], dict], Callable[[Path, dict], About | None]]] = {
    "librispeech": (lambda root: _texts(root, "*.trans.txt", " "), _librispeech),
    "libritts": (lambda _: {}, _libritts),
    "librilight": (lambda _: {}, _librilight),
    "line_index": (lambda root: _texts(root, "line_index.tsv", "\t"), _line_index),
    "transcription": (lambda root: _texts(root, "transcription.txt", " "), _transcription),
    "kaldi": (lambda root: _texts(root, "text", " "), _kaldi),
    "common_voice": (_validated, _common_voice),
    "crema_d": (lambda _: {}, _crema_d),
    "ravdess": (lambda _: {}, _ravdess),
}


# ------------------------------------------------------------------------- Hugging Face datasets


def shards_of(corpus: OnHub, mirror: str | None) -> list[Shard]:
    """The shards of a corpus as the dataset has them now."""
    suffix = ".parquet" if isinstance(corpus, Hub) else ".tar"
    return fetching.hub_shards(corpus.repo, corpus.revision, corpus.folders, suffix, mirror)


def fetch_hub(job: Job) -> Fetched:
    """Parquet shards one after another; what each row became is written down as it happens."""
    corpus, records, hours, complete = job.corpus, [], 0.0, True
    for shard in shards_of(corpus, job.mirror):
        if job.enough(hours):
            complete = False
            break
        taken, finished = _take_shard(job, shard, hours)
        records += taken
        complete &= finished
        hours += sum(record.get("duration", 0.0) for record in taken) / 3600
    lines = [
        clip_of(
            corpus, job.part / record["path"], record["duration"], record["sample_rate"],
            **{name: record[name] for name in ("split", "speaker", "text", "emotion")},
        )
        for record in records
        if "path" in record
    ]  # fmt: skip
    bad = [record["unreadable"] for record in records if "unreadable" in record]
    return Fetched(lines, bad, complete)


def _take_shard(job: Job, shard: Shard, hours: float) -> tuple[list[dict], bool]:
    """(records of the rows, whether all of them are there). Goes on at the first missing row."""
    journal = job.part / ".rows" / f"{shard.path.replace('/', '__')}.rows"
    records, finished = _read_journal(journal, job.part)
    if finished:
        job.bar.advance(shard.size)
        return records, True
    path = fetching.fetch_shard(shard, job.archives, job.bar)
    folder = job.audio / shard.path.removesuffix(".parquet")
    coming = _new_records(job, shard, path, folder, len(records))
    try:
        with job.bar.unpacking(), open(journal, "a", encoding="utf-8") as file:
            for record in coming:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                records.append(record)
                hours += record.get("duration", 0.0) / 3600
                if job.enough(hours):
                    coming.close()
                    for ahead in folder.iterdir():  # written beyond --max_hours' end
                        if not ahead.stem.isdigit() or int(ahead.stem) >= len(records):
                            ahead.unlink()
                    return records, False
            file.write(json.dumps({"end": len(records)}) + "\n")
    except Damaged as error:
        shard.discard(path)
        raise UserError(f"{error}; run again to fetch it anew") from error
    shard.discard(path)
    return records, True


def _read_journal(journal: Path, part: Path) -> tuple[list[dict], bool]:
    """(records of a shard's rows so far, whether it is finished).

    Cut off at the first line that a kill tore, or whose recording is not on the disk in full:
    after a power cut the journal may be ahead of the recordings.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not journal.exists():
        return [], False
    records, good = [], 0
    there: dict[Path, dict[str, int]] = {}
    with open(journal, "rb") as file:
        for line in file:
            record = _parsed(line)
            if record is None:
                break
            if "end" in record:
                return records, True
            if "path" in record:
                path = part / record["path"]
                if path.parent not in there:
                    there[path.parent] = fetching.sizes(path.parent)
                if there[path.parent].get(path.name) != record["bytes"]:
                    break
            records.append(record)
            good += len(line)
    os.truncate(journal, good)
    return records, False


def _parsed(line: bytes) -> dict | None:
    """The record in a line of a journal; None where it is torn or damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
        if "path" in record:
            check_fields(record, RECORD_OF_ROW, "row")
        return record if isinstance(record, dict) else None
    except (ValueError, TypeError, UserError):
        return None


def _new_records(job: Job, shard: Shard, path: Path, folder: Path, first: int) -> Iterator[dict]:
    """Write the audio of every row from `first` on; what became of each, in order."""
    columns = _columns_of(job.corpus, path)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        for rows in fetching.parquet_rows(path, columns, first):
            job.bar.stage(f"unpacking row {rows[-1][0]}")
            yield from pool.map(lambda row: _record_of_row(job, shard, folder, *row), rows)
    job.bar.stage("")


def _columns_of(corpus: Hub, path: Path) -> list[str]:
    """The columns to read. Raises UserError where the one with the audio is not there."""
    there = fetching.parquet_columns(path)
    needed = [corpus.audio] + ([corpus.keep[0]] if corpus.keep else [])
    missing = [name for name in needed if name not in there]
    if missing:
        raise UserError(
            f"{corpus.name}: no column {', '.join(missing)}; it has changed and now has "
            f"{', '.join(there)}"
        )
    useful = {*needed, corpus.text, corpus.style, *corpus.speakers, *corpus.keys}
    return [name for name in there if name in useful]


def _record_of_row(job: Job, shard: Shard, folder: Path, number: int, row: dict) -> dict:
    """What becomes of one row, its audio written: {path, bytes, duration, …}, or why not."""
    corpus = job.corpus
    if corpus.keep and row[corpus.keep[0]] != corpus.keep[1]:
        return {"row": number, "other": row[corpus.keep[0]]}
    cell = row[corpus.audio]
    coded, named = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
    named = named if isinstance(named, str) else ""
    where = f"{shard.path} row {number}"
    if not coded or not isinstance(coded, bytes):
        return {"row": number, "unreadable": f"{where}: no audio"}
    try:
        as_flac, suffix = fetching.packed(io.BytesIO(coded), job.options.keep_wav, where)
        coded = as_flac or coded
        suffix = suffix or Path(named).suffix.lower()
        target = folder / f"{number:06d}{suffix if suffix in AUDIO_SUFFIXES else '.m4a'}"
        duration, sample_rate = probe(target, io.BytesIO(coded))
    except AudioError as error:
        return {"row": number, "unreadable": f"{where}: {error}"}
    # Under its own name at once: the journal names it only when it is complete.
    target.write_bytes(coded)
    speaker, key = _speaker_and_key(corpus, row, named, shard)
    return {
        "row": number,
        "path": target.relative_to(job.part).as_posix(),
        "bytes": len(coded),
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
        if _is_filled(row.get(column)):
            speaker = f"{corpus.name}-{str(row[column]).lower()}"
            return speaker, speaker
    if any(_is_filled(row.get(column)) for column in corpus.keys):
        return None, "-".join(str(row.get(column)) for column in corpus.keys)
    match = re.search(corpus.recording, named) if corpus.recording and named else None
    # Rows of one shard lie side by side in the corpus, and so may share a voice.
    return None, match.group(1) if match else shard.path


def _is_filled(value: object) -> bool:
    """Whether a column holds a text, a number or a truth: no null, list or NaN."""
    return isinstance(value, (str, int, float)) and value != "" and value == value


def _clean(text: object, tagged: bool) -> str | None:
    """One line of words. ZWJ and ZWNJ stay: they are no spaces, and part of words."""
    if not isinstance(text, str):
        return None
    if tagged:
        text = re.sub(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}|--+", " ", text)
    return " ".join(text.split()) or None


def _official_split(path: str) -> str:
    match = re.search(r"(train|valid|dev|test)", "".join(path.split("/")[-2:]))
    found = match.group(1) if match else "train"
    return "validation" if found in ("valid", "dev") else found


# -------------------------------------------------------------------------------- conversations


def fetch_hub_tars(job: Job) -> Fetched:
    """Tars of two-channel dialogues with their annotations, unpacked one by one."""
    lines, bad, hours = [], [], 0.0
    for shard in shards_of(job.corpus, job.mirror):
        if job.enough(hours):
            return Fetched(lines, bad, complete=False)
        target = job.audio / shard.path.removesuffix(".tar")
        if target.exists():
            job.bar.advance(shard.size)
        else:
            file = fetching.fetch_shard(shard, job.archives, job.bar)
            _unpack_apart(file, target, job.bar)
            shard.discard(file)
        with job.bar.unpacking():
            for path in sorted(target.rglob("*.flac")):
                line = _dialogue(job.corpus, path, _official_split(shard.path))
                (bad if isinstance(line, str) else lines).append(line)
        hours = sum(line["duration"] for line in lines) / 3600
    return Fetched(lines, bad)


def _dialogue(corpus: Corpus, path: Path, split: str) -> dict | str:
    """A manifest line of Behavior-SD: channel k is speaker k, backchannels are turns too."""
    try:
        duration, sample_rate = probe(path)
        turns = []
        for utterance in json.loads(path.with_suffix(".json").read_bytes())["utterances"]:
            speaker = utterance["speaker_idx"]
            turns.append(_turn(speaker, utterance))
            turns += [_turn(1 - speaker, sound) for sound in utterance.get("backchannels") or []]
    except (UserError, FileNotFoundError, ValueError, LookupError, TypeError) as error:
        return f"{path}: {first_line(error)}"
    turns.sort(key=lambda turn: turn["start"])
    return _conversation(corpus, path, duration, sample_rate, turns, split)


def _turn(channel: int, utterance: dict) -> dict:
    """Raises ValueError, KeyError, TypeError or UserError where a field is none of a turn."""
    start, end = max(float(utterance["start_time"]), 0.0), float(utterance["end_time"])
    text = utterance.get("tts_text") or ""
    check_fields({"text": text}, {"text": "text"}, "utterance")
    if channel not in (0, 1) or not math.isfinite(start + end):
        raise ValueError(f"an utterance that is none: {utterance}")
    who = "user" if channel else "agent"
    return {"who": who, "start": start, "end": max(end, start), "text": text}


def _conversation(
    corpus: Corpus, path: Path, duration: float, rate: int, turns: list[dict], split: str
) -> dict:
    """A line of a manifest of conversations; its path is relative to the corpus' folder."""
    root = next(parent for parent in path.parents if parent.name == "audio").parent
    # The folder too: archives of a corpus may count their files alike.
    below = path.relative_to(root / "audio").with_suffix("").as_posix()
    return {
        "id": f"{corpus.name}/{below}",
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
            return Fetched(lines, bad, complete=False)
        job.bar.advance(call.stat().st_size)
        with job.bar.unpacking():
            line = _call(job, call, scripts.get(call.stem))
        (bad if isinstance(line, str) else lines).append(line)
        hours += 0 if isinstance(line, str) else line["duration"] / 3600
    return Fetched(lines, bad)


def _call(job: Job, call: Path, script: Path | None) -> dict | str:
    target = job.audio / file_name(call.parent.name) / f"{file_name(call.stem)}.flac"
    try:
        if not target.exists():
            samples, rate = fetching.read_sphere(call)
            if samples.shape[1] != 2:
                raise AudioError(f"{call}: {samples.shape[1]} channels, not 2")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_audio(target, samples.astype("float32") / 32768, rate)
        duration, rate = probe(target)
    except AudioError as error:
        return str(error)
    turns = _fisher_turns(script) if script else []
    return _conversation(job.corpus, target, duration, rate, turns, data.split_for(call.stem))


def _fisher_turns(script: Path) -> list[dict]:
    """`start end A: words` lines; side A is the agent."""
    turns = []
    for line in text_lines(script, "replace"):
        match = re.match(r"\s*(\d*\.?\d+)\s+(\d*\.?\d+)\s+([AB])\d*:\s*(.*)", line)
        if match and float(match[1]) <= float(match[2]):
            who = "agent" if match[3] == "A" else "user"
            start, end = float(match[1]), float(match[2])
            turns.append({"who": who, "start": start, "end": end, "text": match[4]})
    return turns


FETCHERS: dict[type[Corpus], Callable[[Job], Fetched]] = {
    Archives: fetch_archives,
    Files: fetch_files,
    DataCollective: fetch_common_voice,
    Hub: fetch_hub,
    HubTars: fetch_hub_tars,
    Fisher: fetch_fisher,
}
