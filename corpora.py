"""The kinds of corpora: each from what was fetched to a folder of audio with a manifest.

A row of download_data.py's table is one of the classes below; a fetcher a class turns its files
into clips or conversations, and `fetch` renames the folder into place when it is complete. How the
bytes arrive is in fetching.py.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from tqdm import tqdm

import data
import fetching
from audio import AUDIO_SUFFIXES, AudioError, probe, write_audio
from command import (
    DISK_FULL,
    UserError,
    as_json_line,
    check_fields,
    file_name,
    first_line,
    json_lines,
    printable,
    read_json,
    text_lines,
    write_text,
)
from fetching import FILE_THREADS, GIGABYTE, Bar, Damaged, Shard

RECORD = "corpus.json"
UNREADABLE = "unreadable.txt"
RECORD_OF_ROW = {
    "path": "path", "bytes": "whole number", "duration": "number", "sample_rate": "whole number",
    "speaker": "text?", "text": "text?", "emotion": "text?", "split": "text",
}  # fmt: skip
RECORD_FIELDS = {
    "hours": "number", "whole": "true or false", "max_hours": "number",
    "unpack_seconds": "number?",
}  # fmt: skip
# Audio that nothing here reads: reported, so that no hour is lost in silence.
NOT_READ = {".sph", ".raw", ".pcm", ".shn", ".ra", ".rm", ".g722", ".dsf", ".mpc", ".vox"}


# ---------------------------------------------------------------------------- kinds of corpora


@dataclass(frozen=True)
class Corpus:
    """One row of the table; each subclass is one way of getting it.

    `hours` and `gigabytes` are on disk in the end, `download_gb` over the network where that
    differs, `transient_gb` beside it for a while. `exact`: its authors counted `hours`; else
    --verify trusts what was fetched. `split`: all of it, for one or two voices. `note`: why it is
    in the default set or not; `plan`: which of the plan's lines it stands for.
    """

    name: str
    language: str
    hours: float
    gigabytes: float
    kilohertz: str
    license: str
    _: KW_ONLY
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

    def folder(self, data_dir: Path) -> Path:
        """Where it lies in the end."""
        return data_dir / self.place / self.name

    @property
    def place(self) -> str:
        """The folder below --data_dir that holds this corpus' folder."""
        return self.group if self.group in ("emotion", "conversations") else self.language

    @property
    def origin(self) -> str:
        """Where it comes from, for its record."""
        return getattr(self, "repo", "") or getattr(self, "bases", [self.name])[0]

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
    """Archives on the web below one of `bases`, tried in turn; `layout` is one of LAYOUTS."""

    bases: tuple[str, ...]
    archives: tuple[Archive, ...]
    layout: str


@dataclass(frozen=True, kw_only=True)
class OnHub(Corpus):
    """Files on the Hugging Face Hub, in `folders` of `repo` and below them."""

    repo: str
    folders: tuple[str, ...]
    revision: str = "main"
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


class HubTars(OnHub):
    """Two-channel conversations: tars of <id>.flac and <id>.json."""


@dataclass(frozen=True, kw_only=True)
class Files(Corpus):
    """Single files below `bases`: `listing` is a CSV whose column `column` names them."""

    bases: tuple[str, ...]
    listing: str
    column: str
    pattern: str
    layout: str


class DataCollective(Corpus):
    """Common Voice at the Mozilla Data Collective, by the id of one release."""


class Fisher(Corpus):
    """Fisher as the LDC ships it; read from --fisher_dir, never downloaded."""


class Absent(Corpus):
    """A corpus of the plan that does not exist; `note` says so."""

    marks = "none"


# ------------------------------------------------------------------------- a corpus on its way


@dataclass(frozen=True)
class FetchOptions:
    """What the flags say about how to fetch. `max_hours` is per corpus, 0 for no limit."""

    max_hours: float = 0.0
    mirrors: dict[str, str] = field(default_factory=dict)
    keep_wav: bool = False
    cv_dataset_ids: dict[str, str] = field(default_factory=dict)
    fisher_dir: Path | None = None


@dataclass
class Job:
    """One corpus on its way: `part` becomes its folder, `archives` is removed in the end.

    `lines` are its clips or conversations so far, `unreadable` the files or rows that are left
    out and why; `complete` is False where --max_hours cut it short.
    """

    corpus: Corpus
    part: Path
    archives: Path
    bar: Bar
    options: FetchOptions
    lines: list[data.Clip] | list[dict] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    hours: float = 0.0
    complete: bool = True

    @property
    def audio(self) -> Path:
        """Where its recordings go."""
        return self.part / "audio"

    @property
    def mirror(self) -> str | None:
        """What --mirror says in place of the table's address."""
        return self.options.mirrors.get(self.corpus.name)

    def take(self, found: data.Clip | dict | str) -> None:
        """Add a clip or a conversation, or why a file or row is none."""
        if isinstance(found, str):
            self.unreadable.append(found)
        else:
            self.lines.append(found)
            self.hours += (found["duration"] if isinstance(found, dict) else found.duration) / 3600

    def stops_here(self) -> bool:
        """Whether --max_hours is reached, and the corpus ends before its end."""
        reached = bool(self.options.max_hours) and self.hours >= self.options.max_hours
        self.complete &= not reached
        return reached


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
    if not needs_fetching(corpus, data_dir, options):
        return False
    folder = corpus.folder(data_dir)
    # Hidden, so that no trainer scans it while it grows.
    part = folder.with_name(f".{corpus.name}.part")
    if (folder / data.MANIFEST).exists():
        shutil.rmtree(part, ignore_errors=True)
        folder.rename(part)
    elif folder.exists():
        raise UserError(f"{folder}: there without {data.MANIFEST}; move it away and run again")
    from_nothing = not part.exists()
    part.mkdir(parents=True, exist_ok=True)
    size = 0 if options.max_hours else (corpus.download_gb or corpus.gigabytes) * GIGABYTE
    bar = Bar(corpus.name, round(size), stopped)
    job = Job(corpus, part, data_dir / ".archives" / corpus.name, bar, options)
    try:
        FETCHERS[type(corpus)](job)
        if not job.lines:
            raise UserError(f"{corpus.name}: no audio in {corpus.origin}; new layout?")
        # What an earlier run unpacked is in the hours and not in the seconds.
        _write_folder(job, bar.unpack_seconds if from_nothing else 0.0)
        part.rename(folder)
        shutil.rmtree(job.archives, ignore_errors=True)
    except OSError as error:
        if error.errno not in DISK_FULL:
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
    record = read_record(folder)
    more = not options.max_hours or options.max_hours > record.get("max_hours", 0)
    return not (folder / data.MANIFEST).exists() or (more and not record.get("whole", True))


def read_record(folder: Path) -> dict:
    """What `corpus.json` says of how the folder was fetched; empty where there is none."""
    try:
        record = read_json(folder / RECORD)
        check_fields(record, RECORD_FIELDS, RECORD)
    except (OSError, UserError):
        return {}
    return record


def _write_folder(job: Job, unpack_seconds: float) -> None:
    """The manifest, the list of what could not be read, and how the folder came to be."""
    corpus, part = job.corpus, job.part
    record = {
        "name": corpus.name,
        "source": corpus.origin,
        "license": corpus.license,
        "commercial_ok": corpus.commercial_ok,
        "hours": job.hours,
        "files": len(job.lines),
        "unreadable": len(job.unreadable),
        "whole": job.complete,
        "max_hours": job.options.max_hours,
        "unpack_seconds": round(unpack_seconds, 3),
    }
    if job.unreadable:
        listed = "".join(f"{line}\n" for line in job.unreadable)
        write_text(part / UNREADABLE, printable(listed))
        tqdm.write(
            f"{corpus.name}: {len(job.unreadable)} files left out, unreadable or listed but "
            f"not there: see {UNREADABLE} in its folder",
            file=sys.stderr,
        )
    write_text(part / RECORD, json.dumps(record, indent=2) + "\n")
    if isinstance(job.lines[0], dict):
        write_text(part / data.MANIFEST, "".join(map(as_json_line, job.lines)))
    else:
        data.write_manifest(part / data.MANIFEST, job.lines)


def clip_of(
    corpus: Corpus, path: Path, duration: float, sample_rate: int, split: str, **more: str | None
) -> data.Clip:
    """A clip with what its corpus says of it; a corpus of one split has the last word on it."""
    return data.Clip(
        path, duration, sample_rate, corpus.language, license=corpus.license,
        commercial_ok=corpus.commercial_ok, split=corpus.split or split, **more,
    )  # fmt: skip


# ------------------------------------------------------------------------------ archives, files


def fetch_archives(job: Job) -> None:
    """Each archive: downloaded, checked, unpacked into a folder of its own, removed."""
    for archive in job.corpus.archives:
        if job.stops_here():
            break
        target = job.audio / archive.stem
        if not target.exists():
            file = job.archives / archive.name
            _download_from_any(job, archive, file)
            _unpack_apart(file, target, job.bar)
        job.hours += archive.hours  # as the table has it, until they are counted
    _take_clips(job, job.corpus.layout)


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


@contextlib.contextmanager
def _used_up(file: Path, own: bool = True) -> Iterator[None]:
    """Removes an archive or shard after the block, and where the block finds it damaged: without
    a checksum this is how a bad copy shows. One that is not our `own` download stays."""
    try:
        yield
    except Damaged as error:
        if not own:
            raise
        file.unlink()
        raise UserError(f"{error}; removed: run again to fetch it anew") from error
    if own:
        file.unlink(missing_ok=True)


def _unpack_apart(file: Path, target: Path, bar: Bar, own: bool = True) -> None:
    """Unpack beside `target`, then rename: what has the final name is complete and checked."""
    staging = target.with_name(f".{target.name}")
    with _used_up(file, own), bar.unpacking():
        try:
            fetching.unpack(file, staging, bar)
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        staging.rename(target)


def fetch_files(job: Job) -> None:
    """Every file that a CSV names, a few at a time. One that is not there is listed."""
    base = (job.mirror or job.corpus.bases[0]).rstrip("/")
    listing = job.archives / job.corpus.listing
    fetching.download(f"{base}/{job.corpus.listing}", listing, job.bar)
    names = [row[job.corpus.column] for row in _table(listing, ",", (job.corpus.column,))]
    there = fetching.sizes(job.audio)

    def download(name: str) -> str:
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
        job.unreadable += filter(None, pool.map(download, names))
    _take_clips(job, job.corpus.layout)


def fetch_common_voice(job: Job) -> None:
    """One release, by Mozilla's own client, then unpacked like any archive."""
    name, dataset = job.corpus.name, job.options.cv_dataset_ids.get(job.corpus.language)
    if not dataset:
        raise UserError(f"{name}: {job.corpus.note}")
    if not os.environ.get("MDC_API_KEY"):
        raise UserError(f"{name}: set MDC_API_KEY, from your Data Collective account")
    try:
        import datacollective
    except ImportError as error:
        raise UserError(f"{name}: pip install datacollective") from error
    target = job.audio / "clips"
    if not target.exists():
        job.archives.mkdir(parents=True, exist_ok=True)
        try:
            file = datacollective.download_dataset(dataset, download_directory=str(job.archives))
        except Exception as error:  # whatever its HTTP client raises
            raise UserError(f"{name}: the Data Collective says: {first_line(error)}") from error
        _unpack_apart(Path(file), target, job.bar)
    _take_clips(job, "common_voice")


# ------------------------------------------------------------------ how corpora name their files

# {stem of a file: (text, speaker)}, of what a corpus lists.
Listed = dict[str, tuple[str, str | None]]


@dataclass(frozen=True)
class Layout:
    """How a corpus names its files, and where it says more of them.

    `named`: a pattern for the end of a path without its suffix. Its groups: `speaker`, called so
    after `prefix`; `key`, what the split hangs on where nobody is named; `sentence` and
    `emotion`, keys of these tables. `lists`: reads what is listed in a folder. `beside`: the
    suffix of a file with the text of one. `strict`: what is not named or listed so is no clip.
    """

    named: str = "(?!)"
    prefix: str = ""
    lists: Callable[[Path], Listed] | None = None
    beside: str = ""
    sentences: dict[str, str] = field(default_factory=dict)
    emotions: dict[str, str] = field(default_factory=dict)
    strict: bool = False


def _take_clips(job: Job, layout_name: str) -> None:
    """Take all below the audio folder that the layout knows; what is left out is reported."""
    layout = LAYOUTS[layout_name]
    listed = layout.lists(job.audio) if layout.lists else {}
    files = sorted(job.audio.rglob("*.*"))
    paths = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    with job.bar.unpacking(), ThreadPoolExecutor(FILE_THREADS) as pool:
        taken = list(pool.map(lambda path: _clip_of_file(job, path, layout, listed), paths))
    unknown = [path for path, found in zip(paths, taken, strict=True) if found is None]
    not_read = [path for path in files if path.suffix.lower() in NOT_READ]
    for left_out, why in (
        (unknown, "in no list, or named otherwise than the corpus names its clips"),
        (not_read, "of a format that is not read"),
    ):
        if left_out:
            first = left_out[0].relative_to(job.part)
            tqdm.write(f"{job.corpus.name}: {len(left_out)} files left out, {why}; first: {first}")
    # By path: a kill between packing a WAV and removing it leaves both.
    found = {getattr(one, "path", one): one for one in taken if one is not None}
    job.hours = 0.0
    for one in found.values():
        job.take(one)


def _clip_of_file(job: Job, path: Path, layout: Layout, listed: Listed) -> data.Clip | str | None:
    """The file as a clip, why it cannot be read, or None where it is none."""
    job.bar.advance(0)
    below = path.relative_to(job.audio).with_suffix("").as_posix()
    match = re.search(f"(?:^|/)(?:{layout.named})$", below)
    if layout.strict and not match and path.stem not in listed:
        return None
    groups = match.groupdict() if match else {}
    text, speaker = listed.get(path.stem, (layout.sentences.get(groups.get("sentence")), None))
    if "speaker" in groups:
        speaker = layout.prefix + groups["speaker"].replace("_", "-")
    if layout.beside:
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            text = path.with_suffix(layout.beside).read_text(encoding="utf-8").strip()
    try:
        path, duration, sample_rate = fetching.make_readable(path, job.options.keep_wav)
    except AudioError as error:
        return str(error)
    key = speaker or groups.get("key") or path.relative_to(job.audio).as_posix()
    return clip_of(
        job.corpus, path, duration, sample_rate, data.split_for(key), speaker=speaker,
        text=text or None, emotion=layout.emotions.get(groups.get("emotion")),
    )  # fmt: skip


def _texts(name: str, between: str, in_capitals: bool = False) -> Callable[[Path], Listed]:
    """Reads the `stem text` lines of every file of that name (a glob), but what is no UTF-8."""

    def read(root: Path) -> Listed:
        listed = {}
        for path in sorted(root.rglob(name)):
            for line in text_lines(path, "replace"):
                stem, _, text = map(str.strip, line.strip().partition(between))
                if "\ufffd" not in text:
                    listed[stem] = (text.lower() if in_capitals else text, None)
        return listed

    return read


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


def _validated(root: Path) -> Listed:
    """What Common Voice's validated.tsv lists."""
    return {
        Path(row["path"]).stem: (row["sentence"], f"common-voice-{row['client_id'][:16]}")
        for path in sorted(root.rglob("validated.tsv"))
        for row in _table(path, "\t", ("client_id", "path", "sentence"))
    }


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
RAVDESS_SENTENCES = {"1": "Kids are talking by the door.", "2": "Dogs are sitting by the door."}
LAYOUTS = {
    # Readers are numbered alike in all three LibriVox corpora: one name keeps each in one split.
    "librispeech": Layout(
        r"(?P<speaker>\d+)-\d+-\d+", "librivox-", _texts("*.trans.txt", " ", in_capitals=True)
    ),
    "libritts": Layout(r"(?P<speaker>\d+)_\d+_\d+_\d+", "librivox-", beside=".normalized.txt"),
    "librilight": Layout(r"(?P<speaker>\d+)/[^/]+/[^/]+", "librivox-"),
    "line_index": Layout(r"(?P<speaker>te[fm]_\d+)_\d+", lists=_texts("line_index.tsv", "\t")),
    "transcription": Layout(
        r"(?P<speaker>\d+)_\d+", "openslr-103-", _texts("transcription.txt", " ")
    ),
    # Callers are not named: the parts of a call, <call>-<part>, stay together.
    "kaldi": Layout(r"(?P<key>[^/]+)-[^/-]*", lists=_texts("text", " ")),
    "common_voice": Layout(lists=_validated, strict=True),
    "crema_d": Layout(
        r"(?P<speaker>[^/_]+)_(?P<sentence>[A-Z]+)_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_[^/_]*",
        "crema-d-", sentences=CREMA_D_SENTENCES, emotions=CREMA_D_EMOTIONS, strict=True,
    ),
    "ravdess": Layout(
        r"03-0[12]-0(?P<emotion>[1-8])-0[12]-0(?P<sentence>[12])-0[12]-(?P<speaker>\d\d)",
        "ravdess-", sentences=RAVDESS_SENTENCES,
        emotions={str(n): emotion for n, emotion in enumerate(RAVDESS_EMOTIONS, start=1)},
        strict=True,
    ),
}  # fmt: skip

# Rasa's other styles (commands, conversation, news, books) are no emotion: they stay unlabelled.
RASA_EMOTIONS = {name: name for name in ("happy", "sad", "angry", "fear", "disgust", "surprise")}
RASA_EMOTIONS |= {"happiness": "happy", "sadness": "sad", "anger": "angry"}
RASA_EMOTIONS |= {name: "neutral" for name in ("neutral", "wiki", "indic")}


# ------------------------------------------------------------------------- Hugging Face datasets


def shards_of(corpus: OnHub, mirror: str | None) -> list[Shard]:
    """The shards of a corpus as the dataset has them now."""
    suffix = ".parquet" if isinstance(corpus, Hub) else ".tar"
    return fetching.hub_shards(corpus.repo, corpus.revision, corpus.folders, suffix, mirror)


def fetch_hub(job: Job) -> None:
    """Parquet shards one after another; what each row became is written down as it happens.

    Goes on at the first row that is not written down.
    """
    for shard in shards_of(job.corpus, job.mirror):
        if job.stops_here():
            return
        journal = job.part / ".rows" / f"{shard.path.replace('/', '__')}.rows"
        records, finished = _read_journal(journal, job.part)
        for record in records:
            _take_record(job, record)
        if finished:
            job.bar.advance(shard.size)
            continue
        path = fetching.fetch_shard(shard, job.archives, job.bar)
        folder = job.audio / shard.path.removesuffix(".parquet")
        with (
            _used_up(path, own=not fetching.is_local(shard.source)),
            job.bar.unpacking(),
            contextlib.closing(_new_records(job, shard, path, folder, len(records))) as coming,
            open(journal, "a", encoding="utf-8") as file,
        ):
            for record in coming:
                file.write(as_json_line(record))
                file.flush()
                _take_record(job, record)
                if job.stops_here():
                    coming.close()
                    for ahead in folder.iterdir():  # written beyond --max_hours' end
                        if not ahead.stem.isdigit() or int(ahead.stem) > record["row"]:
                            ahead.unlink()
                    return
            file.write(as_json_line({"end": True}))


def _take_record(job: Job, record: dict) -> None:
    """Take what a row became: a clip, or why it is none; rows of other languages are neither."""
    if "unreadable" in record:
        job.take(record["unreadable"])
    elif "path" in record:
        job.take(clip_of(
            job.corpus, job.part / record["path"], record["duration"], record["sample_rate"],
            **{name: record[name] for name in ("split", "speaker", "text", "emotion")},
        ))  # fmt: skip


def _read_journal(journal: Path, part: Path) -> tuple[list[dict], bool]:
    """(records of a shard's rows so far, whether it is finished).

    Cut off at the first line that a kill tore, or whose recording is not on the disk in full:
    after a power cut the journal may be ahead of the recordings.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    records, there = [], {}
    with contextlib.suppress(FileNotFoundError, UserError):
        for _, record in json_lines(journal):
            if "end" in record:
                return records, True
            if "path" in record:
                check_fields(record, RECORD_OF_ROW, "row")
                path = part / record["path"]
                if path.parent not in there:
                    there[path.parent] = fetching.sizes(path.parent)
                if there[path.parent].get(path.name) != record["bytes"]:
                    break
            records.append(record)
    journal.write_text("".join(map(as_json_line, records)), encoding="utf-8")
    return records, False


def _new_records(job: Job, shard: Shard, path: Path, folder: Path, first: int) -> Iterator[dict]:
    """Write the audio of every row from `first` on; what became of each, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = functools.partial(_columns_of, job.corpus)
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        for rows in fetching.parquet_rows(path, columns, first):
            job.bar.advance(0, f"unpacking row {rows[-1][0]}")
            yield from pool.map(lambda row: _record_of_row(job, shard, folder, *row), rows)
    job.bar.advance(0, "")


def _columns_of(corpus: Hub, there: list[str]) -> list[str]:
    """The columns to read. Raises UserError where the one with the audio is not there."""
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
    as_flac, suffix = fetching.packed(io.BytesIO(coded), job.options.keep_wav)
    coded, suffix = as_flac or coded, suffix or Path(named).suffix.lower()
    target = folder / f"{number:06d}{suffix if suffix in AUDIO_SUFFIXES else '.m4a'}"
    try:
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

    def is_filled(column: str) -> bool:  # with a text, a number or a truth: no null, list or NaN
        value = row.get(column)
        return isinstance(value, (str, int, float)) and value != "" and value == value

    for column in filter(is_filled, corpus.speakers):
        speaker = f"{corpus.name}-{str(row[column]).lower()}"
        return speaker, speaker
    if any(map(is_filled, corpus.keys)):
        return None, "-".join(str(row.get(column)) for column in corpus.keys)
    match = re.search(corpus.recording, named) if corpus.recording and named else None
    # Rows of one shard lie side by side in the corpus, and so may share a voice.
    return None, match.group(1) if match else shard.path


def _clean(text: object, tagged: bool) -> str | None:
    """Text in one line. ZWJ and ZWNJ stay: they are no spaces, and part of words."""
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


def fetch_hub_tars(job: Job) -> None:
    """Tars of two-channel dialogues with their annotations, unpacked one by one."""
    for shard in shards_of(job.corpus, job.mirror):
        if job.stops_here():
            return
        target = job.audio / shard.path.removesuffix(".tar")
        if target.exists():
            job.bar.advance(shard.size)
        else:
            file = fetching.fetch_shard(shard, job.archives, job.bar)
            _unpack_apart(file, target, job.bar, own=not fetching.is_local(shard.source))
        with job.bar.unpacking():
            for path in sorted(target.rglob("*.flac")):
                job.take(_dialogue(job, path, _official_split(shard.path)))


def _dialogue(job: Job, path: Path, split: str) -> dict | str:
    """A manifest line of Behavior-SD: channel k is speaker k, backchannels are turns too."""
    try:
        turns = []
        for utterance in read_json(path.with_suffix(".json"))["utterances"]:
            speaker = utterance["speaker_idx"]
            turns.append(_turn(speaker, utterance))
            turns += [_turn(1 - speaker, sound) for sound in utterance.get("backchannels") or []]
        return _conversation(job, path, turns, split)
    except (UserError, FileNotFoundError, ValueError, LookupError, TypeError) as error:
        return f"{path}: {first_line(error)}"


def _turn(channel: int, utterance: dict) -> dict:
    """Raises ValueError, LookupError, TypeError or UserError where a field is none of a turn."""
    start, end = float(utterance["start_time"]), float(utterance["end_time"])
    turn = {
        "who": {0: "agent", 1: "user"}[channel],
        "start": max(start, 0.0),
        "end": max(end, start, 0.0),
        "text": utterance.get("tts_text") or "",
    }
    check_fields(turn, {"start": "number", "end": "number", "text": "text"}, "utterance")
    return turn


def _conversation(job: Job, path: Path, turns: list[dict], split: str) -> dict:
    """A line of a manifest of conversations. Raises AudioError where the audio is none."""
    corpus, (duration, rate) = job.corpus, probe(path)
    # With its folder: archives of a corpus may count their files alike.
    below = path.relative_to(job.audio).with_suffix("").as_posix()
    return {
        "id": f"{corpus.name}/{below}",
        "path": path.relative_to(job.part).as_posix(),
        "agent_channel": 0,
        "user_channel": 1,
        "language": corpus.language,
        "source": corpus.name,
        "license": corpus.license,
        "commercial_ok": corpus.commercial_ok,
        "split": split,
        "duration": round(duration, 4),
        "sample_rate": rate,
        "turns": sorted(turns, key=lambda turn: turn["start"]),
    }


def fetch_fisher(job: Job) -> None:
    """The LDC's folders as they are: SPHERE files become two-channel FLAC, side A the agent."""
    folder = job.options.fisher_dir
    if folder is None:
        raise UserError(f"fisher: {job.corpus.note}")
    calls = sorted(folder.rglob("*.sph"))
    if not calls:
        raise UserError(f"--fisher_dir {folder}: no .sph files there; give the LDC's own folders")
    scripts = {path.stem: path for path in folder.rglob("fe_*.txt")}
    for call in calls:
        if job.stops_here():
            return
        job.bar.advance(call.stat().st_size)
        with job.bar.unpacking():
            job.take(_call(job, call, scripts.get(call.stem)))


def _call(job: Job, call: Path, script: Path | None) -> dict | str:
    """A manifest line of a call, written as FLAC where it is not yet; why it cannot be read."""
    target = job.audio / file_name(call.parent.name) / f"{file_name(call.stem)}.flac"
    try:
        if not target.exists():
            samples, rate = fetching.read_sphere(call)
            if samples.shape[1] != 2:
                raise AudioError(f"{call}: {samples.shape[1]} channels, not 2")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_audio(target, samples.astype("float32") / 32768, rate)
        turns = _fisher_turns(script) if script else []
        return _conversation(job, target, turns, data.split_for(call.stem))
    except AudioError as error:
        return str(error)


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


FETCHERS: dict[type[Corpus], Callable[[Job], None]] = {
    Archives: fetch_archives,
    Files: fetch_files,
    DataCollective: fetch_common_voice,
    Hub: fetch_hub,
    HubTars: fetch_hub_tars,
    Fisher: fetch_fisher,
}
