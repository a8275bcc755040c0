"""The kinds of corpora: each from what was fetched to a folder of audio with a manifest.

A row of download_data.py's table is one of the classes below; a fetcher a class turns its files
into clips or conversations, and `fetch` renames the folder into place when it is complete.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

import command
import data
import fetching
from audio import AUDIO_SUFFIXES, AudioError, probe, write_audio
from command import UserError, check_fields, file_name, first_line, text_lines, write_text
from fetching import FILE_THREADS, GIGABYTE, Bar, Damaged, Shard

RECORD, UNREADABLE = "corpus.json", "unreadable.txt"


@dataclass(frozen=True)
class Corpus:
    """One row of the table; each subclass is one way of getting it. `hours` and `gigabytes` are on
    disk in the end, `download_gb` over the network where that differs, `transient_gb` beside it for
    a while. `exact`: its authors counted `hours`; else --verify trusts what was fetched. `split`:
    of it all. `layout`: of LAYOUTS. `note`: why it is a default or not, and what it stands for."""

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
    layout: str = ""
    note: str = ""

    def folder(self, data_dir: Path) -> Path:
        return data_dir / self.place / self.name

    @property
    def place(self) -> str:
        return self.group if self.group in ("emotion", "conversations") else self.language

    @property
    def origin(self) -> str:
        return getattr(self, "repo", "") or getattr(self, "bases", [self.name])[0]


@dataclass(frozen=True)
class Archive:
    """A tar or zip: name, hours inside, size in GB, checksum where its authors publish one."""

    name: str
    hours: float
    gigabytes: float
    checksum: str = ""


@dataclass(frozen=True, kw_only=True)
class Archives(Corpus):
    """Archives on the web below one of `bases`, tried in turn."""

    bases: tuple[str, ...]
    archives: tuple[Archive, ...]


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
    """Parquet shards. `audio` holds the coded bytes, alone or as {bytes, path}; `file` names them,
    else that path. `speakers` and `keys` are columns: the first of `speakers` that a row fills
    names the speaker; without one the split hangs on all of `keys`, or on the file's name. `keep`:
    (column, value) of the rows to take. `tagged` text loses its <noise>, [marks], {glosses}."""

    audio: str = "audio_filepath"
    file: str = ""
    text: str = "text"
    speakers: tuple[str, ...] = ("speaker_id",)
    keys: tuple[str, ...] = ()
    style: str = ""
    keep: tuple[str, str] | None = None
    tagged: bool = False
    official_splits: bool = False


class HubTars(OnHub):
    """Two-channel conversations: tars of <id>.flac and <id>.json."""


class DataCollective(Corpus):
    """Common Voice at the Mozilla Data Collective, by the id of one release."""


class Fisher(Corpus):
    """Fisher as the LDC ships it; read from --fisher_dir, never downloaded."""


@dataclass(frozen=True)
class FetchOptions:
    max_hours: float = 0.0  # per corpus, 0 for no limit
    mirrors: dict[str, str] = field(default_factory=dict)
    keep_wav: bool = False
    cv_dataset_ids: dict[str, str] = field(default_factory=dict)
    fisher_dir: Path | None = None


@dataclass
class Job:
    """One corpus on its way: `part` becomes its folder, `archives` goes in the end. `lines`: its
    clips or conversations; `unreadable`: what is left out, why; `complete`: no --max_hours cut."""

    corpus: Corpus
    part: Path
    archives: Path
    bar: Bar
    options: FetchOptions
    lines: list[data.Clip] | list[dict] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    hours: float = 0.0
    complete: bool = True

    def __post_init__(self) -> None:
        self.audio = self.part / "audio"  # where its recordings go
        self.mirror = self.options.mirrors.get(self.corpus.name)

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

    def until_full(self, items: Iterable) -> Iterator:
        """The items, up to where the corpus stops."""
        return itertools.takewhile(lambda _: not self.stops_here(), items)


def fetch(corpus: Corpus, data_dir: Path, options: FetchOptions = FetchOptions(),
          stopped: threading.Event | None = None) -> bool:  # fmt: skip
    """Bring one corpus into place; False where it was there already. Raises UserError."""
    if not needs_fetching(corpus, data_dir, options):
        return False
    folder = corpus.folder(data_dir)
    part = folder.with_name(f".{corpus.name}.part")  # hidden: no trainer scans it while it grows
    if (folder / data.MANIFEST).exists():
        shutil.rmtree(part, ignore_errors=True)
        folder.rename(part)
    elif folder.exists():
        raise UserError(f"{folder}: there without {data.MANIFEST}; move it away and run again")
    part.mkdir(parents=True, exist_ok=True)
    size = 0 if options.max_hours else (corpus.download_gb or corpus.gigabytes) * GIGABYTE
    bar = Bar(corpus.name, round(size), stopped)
    job = Job(corpus, part, data_dir / ".archives" / corpus.name, bar, options)
    if (part / UNREADABLE).exists():  # of shards that are not read again
        job.unreadable += text_lines(part / UNREADABLE)
    with contextlib.closing(bar):
        FETCHERS[type(corpus)](job)
        if not job.lines:
            raise UserError(f"{corpus.name}: no audio in {corpus.origin}; new layout?")
        _write_folder(job)
        part.rename(folder)
        shutil.rmtree(job.archives, ignore_errors=True)
    return True


def needs_fetching(corpus: Corpus, data_dir: Path, options: FetchOptions) -> bool:
    """Whether it is not there, or was cut short by a --max_hours and may now grow."""
    folder = corpus.folder(data_dir)
    record = read_record(folder)
    more = not options.max_hours or options.max_hours > record.get("max_hours", 0)
    return not (folder / data.MANIFEST).exists() or (more and not record.get("whole", True))


def read_record(folder: Path) -> dict:
    """What `corpus.json` says of how the folder was fetched; empty where there is none."""
    with contextlib.suppress(OSError, UserError):
        record = command.read_json(folder / RECORD)
        kinds = {"hours": "number", "whole": "true or false", "max_hours": "number"}
        check_fields(record, kinds, RECORD)
        return record
    return {}


def _write_folder(job: Job) -> None:
    corpus, part = job.corpus, job.part
    _write_unreadable(job)
    if job.unreadable:
        left_out = f"{len(job.unreadable)} files left out, see {UNREADABLE} in its folder"
        reasons = Counter(line.rpartition(": ")[2] for line in job.unreadable).most_common(8)
        often = "".join(f"; {count}: {reason}" for reason, count in reasons if count > 1)
        tqdm.write(f"{corpus.name}: {left_out}{often}", file=sys.stderr)
    record = {"source": corpus.origin, "license": corpus.license, "hours": job.hours,
              "whole": job.complete, "max_hours": job.options.max_hours}  # fmt: skip
    write_text(part / RECORD, json.dumps(record, indent=2) + "\n")
    if isinstance(job.lines[0], dict):
        write_text(part / data.MANIFEST, "".join(map(command.as_json_line, job.lines)))
    else:
        data.write_manifest(part / data.MANIFEST, job.lines)


def _write_unreadable(job: Job) -> None:
    job.unreadable = list(dict.fromkeys(job.unreadable))
    if job.unreadable:
        write_text(job.part / UNREADABLE, command.printable("\n".join(job.unreadable) + "\n"))


def clip_of(corpus: Corpus, path: Path, duration: float, sample_rate: int, split: str,
            label: str | None = None, **more: str | None) -> data.Clip:  # fmt: skip
    """A clip with what its corpus says of it; a corpus of one split has the last word on it."""
    more |= {"split": corpus.split or split, "emotion": label and LABELS[label.lower()]}
    more |= {"license": corpus.license, "commercial_ok": corpus.commercial_ok}
    return data.Clip(path, duration, sample_rate, corpus.language, **more)


def fetch_archives(job: Job) -> None:
    """Each archive: downloaded, checked, unpacked into a folder of its own, removed."""
    for archive in job.until_full(job.corpus.archives):
        target = job.audio / archive.name.partition(".")[0]
        if not target.exists():
            file = job.archives / archive.name
            _download_from_any(job, archive, file)
            _unpack_apart(job, file, target)
        job.hours += archive.hours  # as the table has it, until they are counted
    _take_clips(job)


def _download_from_any(job: Job, archive: Archive, file: Path) -> None:
    errors = []
    for base in (job.mirror,) if job.mirror else job.corpus.bases:
        url = f"{base.rstrip('/')}/{archive.name}"
        try:
            return fetching.download(url, file, job.bar, archive.checksum)
        except UserError as error:
            errors.append(error)
    raise max(errors, key=lambda error: isinstance(error, fetching.Busy))  # one that may pass


@contextlib.contextmanager
def _used_up(file: Path) -> Iterator[None]:
    """Removes an archive or shard after the block, and where the block finds it damaged."""
    try:
        yield
    except Damaged as error:
        file.unlink()
        raise UserError(f"{error}; removed: run again to fetch it anew") from error
    file.unlink(missing_ok=True)


def _unpack_apart(job: Job, file: Path, target: Path) -> None:
    """Unpack beside `target`, then rename: what has the final name is complete and checked."""
    staging = target.with_name(f".{target.name}")
    with _used_up(file):
        try:
            fetching.unpack(file, staging, job.bar)
        except UserError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        staging.rename(target)


def fetch_common_voice(job: Job) -> None:
    """One release, by Mozilla's own client, then unpacked like any archive."""
    name, dataset = job.corpus.name, job.options.cv_dataset_ids.get(job.corpus.language)
    if not dataset or not os.environ.get("MDC_API_KEY"):
        raise UserError(f"{name}: {job.corpus.note}")
    datacollective = command.needed("datacollective", f"{name}: pip install datacollective")
    target = job.audio / "clips"
    if not target.exists():
        job.archives.mkdir(parents=True, exist_ok=True)
        try:
            file = datacollective.download_dataset(dataset, download_directory=str(job.archives))
        except Exception as error:  # whatever its HTTP client raises
            raise UserError(f"{name}: the Data Collective says: {first_line(error)}") from error
        _unpack_apart(job, Path(file), target)
    _take_clips(job)


Listed = dict[str, tuple[str, str | None]]  # stem of a file: text and speaker


@dataclass(frozen=True)
class Layout:
    """How a corpus names its files, and where it says more of them. `named`: a pattern for the end
    of a path without its suffix. Its groups: `speaker`, called so after `prefix`; `key`, what the
    split hangs on where nobody is named; `sentence`, a key of `sentences`; `emotion`, one of
    LABELS. `lists`: reads what is listed in a folder. `beside`: the suffix of a file with the text
    of one. `strict`: what is not named or listed so is no clip."""

    named: str = "(?!)"
    prefix: str = ""
    lists: Callable[[Path], Listed] | None = None
    beside: str = ""
    sentences: dict[str, str] = field(default_factory=dict)
    strict: bool = False

    def said_by(self, path: str) -> dict[str, str | None]:
        """{speaker, key, text, label} by a path without its suffix; empty if named otherwise."""
        if not (match := re.search(f"(?:^|/)(?:{self.named})$", path)):
            return {}
        found = match.groupdict().get
        speaker = found("speaker") and self.prefix + found("speaker").replace("_", "-")
        return {"speaker": speaker, "key": found("key"), "label": found("emotion"),
                "text": self.sentences.get(found("sentence"))}  # fmt: skip


def no_emotion(label: str | None) -> str:
    """Why a clip of that label is left out; empty where it has none, or one of LABELS."""
    known = label is None or label.lower() in LABELS
    return "" if known else f"no emotion of ours is called {label.lower()!r}"


def _take_clips(job: Job) -> None:
    """Take all below the audio folder that the layout knows; what is left out is reported."""
    layout = LAYOUTS[job.corpus.layout]
    listed = layout.lists(job.audio) if layout.lists else {}
    paths = sorted(p for p in job.audio.rglob("*.*") if p.suffix.lower() in AUDIO_SUFFIXES)
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        taken = list(pool.map(lambda path: _clip_of_file(job, path, layout, listed), paths))
    if unknown := [path.name for path, found in zip(paths, taken, strict=True) if found is None]:
        left_out = f"{len(unknown)} files left out, in no list, or named otherwise than its clips"
        tqdm.write(f"{job.corpus.name}: {left_out}; first: {unknown[0]}")
    # By path: a kill between packing a WAV and removing it leaves both.
    found = {getattr(one, "path", one): one for one in taken if one is not None}
    job.hours = 0.0
    for one in found.values():
        job.take(one)


def _clip_of_file(job: Job, path: Path, layout: Layout, listed: Listed) -> data.Clip | str | None:
    """The file as a clip, why it cannot be read, or None where it is none."""
    job.bar.advance(0)
    said = layout.said_by(path.relative_to(job.audio).with_suffix("").as_posix())
    if layout.strict and not said and path.stem not in listed:
        return None
    label = said.get("label")
    if reason := no_emotion(label):
        return f"{path}: {reason}"
    text, speaker = listed.get(path.stem, (said.get("text"), None))
    speaker = said.get("speaker") or speaker
    if layout.beside:
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            text = path.with_suffix(layout.beside).read_text(encoding="utf-8").strip()
    try:
        path, *probed = fetching.make_readable(path, job.options.keep_wav)
    except AudioError as error:
        return str(error)
    split = data.split_for(speaker or said.get("key") or path.relative_to(job.audio).as_posix())
    return clip_of(job.corpus, path, *probed, split, label, speaker=speaker, text=text or None)


def _texts(name: str, between: str, root: Path, in_capitals: bool = False) -> Listed:
    """Of the `stem text` lines of every file of that name (a glob), but what is no UTF-8."""
    lines = (line for path in sorted(root.rglob(name)) for line in text_lines(path, "replace"))
    parts = (map(str.strip, line.strip().partition(between)) for line in lines)
    return {stem: (text.lower() if in_capitals else text, None)
            for stem, _, text in parts if "\ufffd" not in text}  # fmt: skip


def _validated(root: Path) -> Listed:  # Common Voice's validated.tsv
    listed = {}
    for path in sorted(root.rglob("validated.tsv")):
        names, *rows = (line.split("\t") for line in text_lines(path, "replace"))
        for row in rows:
            fields = dict(zip(names, row, strict=False))
            if all(map(fields.get, ("client_id", "path", "sentence"))):
                speaker = f"common-voice-{fields['client_id'][:16]}"
                listed[Path(fields["path"]).stem] = (fields["sentence"], speaker)
    return listed


# What corpora call an emotion, in lower case (RAVDESS: by number), and ours. Readings by Rasa are
# neutral; its commands, conversations, news and books are no emotion.
LABELS = {**{name: name for name in data.EMOTIONS},
    **dict.fromkeys(("neu", "wiki", "indic", "proper noun", "01"), "neutral"),
    **dict.fromkeys(("hap", "happiness", "amused", "joy", "03"), "happy"),
    **dict.fromkeys(("sadness", "04"), "sad"), **dict.fromkeys(("ang", "anger", "05"), "angry"),
    **dict.fromkeys(("fea", "fearful", "06"), "fear"), "02": "calm",
    **dict.fromkeys(("dis", "disgusted", "07"), "disgust"),
    **dict.fromkeys(("surprised", "08"), "surprise")}  # fmt: skip
CREMA_D_SENTENCES = {"IEO": "It's eleven o'clock.", "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.", "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.", "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.", "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.", "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.", "WSI": "We'll stop in a couple of minutes."}  # fmt: skip
RAVDESS_SENTENCES = {"1": "Kids are talking by the door.", "2": "Dogs are sitting by the door."}
LAYOUTS = {
    # Readers are numbered alike in all three LibriVox corpora: one name keeps each in one split.
    "librispeech": Layout(r"(?P<speaker>\d+)-\d+-\d+", "librivox-",
                          partial(_texts, "*.trans.txt", " ", in_capitals=True)),
    "libritts": Layout(r"(?P<speaker>\d+)_\d+_\d+_\d+", "librivox-", beside=".normalized.txt"),
    "librilight": Layout(r"(?P<speaker>\d+)/[^/]+/[^/]+", "librivox-"),
    "line_index": Layout(r"(?P<speaker>te[fm]_\d+)_\d+",
                         lists=partial(_texts, "line_index.tsv", "\t")),
    "transcription": Layout(r"(?P<speaker>\d+)_\d+", "openslr-103-",
                            partial(_texts, "transcription.txt", " ")),
    # Callers are not named: the parts of a call, <call>-<part>, stay together.
    "kaldi": Layout(r"(?P<key>[^/]+)-[^/-]*", lists=partial(_texts, "text", " ")),
    "common_voice": Layout(lists=_validated, strict=True),
    "kathbath": Layout(r"[^/]*-(?P<key>\d+)-[mf]"),
    # Split by bulletin: who reads it is not said.
    "shrutilipi": Layout(r"(?P<key>[^/]*?)[_-]+sent[^/]*"),
    "crema_d": Layout(r"(?P<speaker>\d{4})_(?P<sentence>[A-Z]{3})_(?P<emotion>[A-Z]{3})_[^/_]*",
                      "crema-d-", sentences=CREMA_D_SENTENCES, strict=True),
    "ravdess": Layout(
        r"03-0[12]-(?P<emotion>\d\d)-0[12]-0(?P<sentence>[12])-0[12]-(?P<speaker>\d\d)",
        "ravdess-", sentences=RAVDESS_SENTENCES, strict=True),
    # bea_Amused/<any>, bea/Amused/<any> or bea/amused_1-15_0001.
    "emov_db": Layout(
        r"(?P<speaker>bea|jenie|josh|sam)[_/](?P<emotion>[A-Za-z]+)(?:/[^/]+|_\d+-\d+_\d+[^/]*)",
        "emov-db-"),
    "esd": Layout(r"(?P<speaker>\d{4})/(?P<emotion>[A-Za-z]+)/(?:[a-z]+/)?\d{4}_\d{6}", "esd-"),
}  # fmt: skip


def shards_of(corpus: OnHub, mirror: str | None) -> list[Shard]:
    suffix = ".parquet" if isinstance(corpus, Hub) else ".tar"
    return fetching.hub_shards(corpus.repo, corpus.revision, corpus.folders, suffix, mirror)


def fetch_hub(job: Job) -> None:
    """Parquet shards one after another; a manifest of its own says that one is done."""
    for shard in job.until_full(shards_of(job.corpus, job.mirror)):
        done = job.part / ".shards" / f"{shard.path.replace('/', '__')}.jsonl"
        try:
            clips = data.read_manifest(done)
        except UserError:  # not there yet
            begun = len(job.lines)
            path = fetching.fetch_shard(shard, job.archives, job.bar)
            with _used_up(path):
                _take_rows(job, shard, path)
            if job.complete:
                _write_unreadable(job)
                os.sync()  # after a power cut the manifest is not ahead of its recordings
                data.write_manifest(done, job.lines[begun:])
        else:
            job.bar.advance(shard.size)
            for clip in clips:
                job.take(clip)


def _take_rows(job: Job, shard: Shard, path: Path) -> None:
    folder = job.audio / shard.path.removesuffix(".parquet")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run, or --max_hours, left of it
    folder.mkdir(parents=True)
    corpus = job.corpus
    needed = [corpus.audio, *(corpus.keep or ())[:1], *filter(None, [corpus.style])]
    more = (corpus.text, corpus.file, *corpus.speakers, *corpus.keys)
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        for rows in fetching.parquet_rows(path, needed, more):
            job.bar.advance(0, f"unpacking row {rows[0][0]}")
            found = pool.map(lambda row: _clip_of_shard_row(job, shard, folder, *row), rows)
            for one in filter(None, found):
                job.take(one)
            if job.stops_here():
                break
    job.bar.advance(0, "")


def _clip_of_shard_row(job: Job, shard: Shard, folder: Path, number: int,
                       row: dict) -> data.Clip | str | None:  # fmt: skip
    """The row as a clip, its audio written; why it is none; None where it is of no interest."""
    corpus = job.corpus
    if corpus.keep and row[corpus.keep[0]] != corpus.keep[1]:
        return None
    cell = row[corpus.audio]
    coded, named = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, "")
    stem, suffix = os.path.splitext(str(row.get(corpus.file) or named or ""))
    where = f"{shard.path} row {number}"
    if not coded or not isinstance(coded, bytes):
        return f"{where}: no audio"
    layout = LAYOUTS.get(corpus.layout, Layout())
    said = layout.said_by(stem)
    if layout.strict and not said:
        return f"{where}: '{stem}' is named otherwise than the corpus names its clips"
    label = str(row[corpus.style]) if corpus.style else said.get("label")
    speaker, key = _speaker_and_key(corpus, row, said)
    if reason := no_emotion(label) or (corpus.style and not speaker and "nobody is named"):
        return f"{where}: {reason}"
    as_flac, known = fetching.packed(io.BytesIO(coded), job.options.keep_wav)
    coded, suffix = as_flac or coded, known or suffix.lower()
    target = folder / f"{number:06d}{suffix if suffix in AUDIO_SUFFIXES else '.m4a'}"
    try:
        duration, sample_rate = probe(target, io.BytesIO(coded))
    except AudioError as error:
        return f"{where}: {error}"
    target.write_bytes(coded)
    # Rows of one shard lie side by side in the corpus, and so may share a voice.
    split = data.split_for(key or shard.path)
    split = _official_split(shard.path) if corpus.official_splits else split
    text = _clean(row.get(corpus.text), corpus.tagged) or said.get("text")
    return clip_of(corpus, target, duration, sample_rate, split, label, speaker=speaker, text=text)


def _speaker_and_key(corpus: Hub, row: dict, said: dict) -> tuple[str | None, str | None]:
    """(speaker, what the split hangs on), as far as they are known."""
    # With a text, a number or a truth: no null, list or NaN.
    plain = {name: value for name, value in row.items() if isinstance(value, (str, int, float))}
    filled = {name for name, value in plain.items() if value != "" and value == value}
    for column in filter(filled.__contains__, corpus.speakers):
        speaker = f"{corpus.name}-{str(row[column]).lower()}"
        return speaker, speaker
    if not said.get("speaker") and filled.intersection(corpus.keys):
        return None, "-".join(str(row.get(column)) for column in corpus.keys)
    return said.get("speaker"), said.get("speaker") or said.get("key")


def _clean(text: object, tagged: bool) -> str | None:
    """Text in one line. ZWJ and ZWNJ stay: they are no spaces, and part of words."""
    if not isinstance(text, str):
        return None
    if tagged:
        text = re.sub(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}|--+", " ", text)
    return " ".join(text.split()) or None


def _official_split(path: str) -> str:
    match = re.search("train|valid|dev|test", "".join(path.split("/")[-2:]))
    found = match[0] if match else "train"
    return "validation" if found in ("valid", "dev") else found


def fetch_hub_tars(job: Job) -> None:
    """Tars of two-channel dialogues with their annotations."""
    for shard in job.until_full(shards_of(job.corpus, job.mirror)):
        target = job.audio / shard.path.removesuffix(".tar")
        if target.exists():
            job.bar.advance(shard.size)
        else:
            _unpack_apart(job, fetching.fetch_shard(shard, job.archives, job.bar), target)
        for path in sorted(target.rglob("*.flac")):
            job.take(_dialogue(job, path, _official_split(shard.path)))


def _dialogue(job: Job, path: Path, split: str) -> dict | str:
    """A manifest line of Behavior-SD: channel k is speaker k, backchannels are turns too."""
    try:
        turns = []
        for utterance in command.read_json(path.with_suffix(".json"))["utterances"]:
            speaker = utterance["speaker_idx"]
            turns.append(_turn(speaker, utterance))
            turns += [_turn(1 - speaker, sound) for sound in utterance.get("backchannels") or []]
        return _conversation(job, path, turns, split)
    except (UserError, FileNotFoundError, ValueError, LookupError, TypeError) as error:
        return f"{path}: {first_line(error)}"


def _turn(channel: int, utterance: dict) -> dict:
    """Raises ValueError, LookupError, TypeError or UserError where a field is none of a turn."""
    start, end = max(float(utterance["start_time"]), 0.0), float(utterance["end_time"])
    turn = {"who": {0: "agent", 1: "user"}[channel], "start": start, "end": max(end, start)}
    turn["text"] = utterance.get("tts_text") or ""
    check_fields(turn, {"start": "number", "end": "number", "text": "text"}, "utterance")
    return turn


def _conversation(job: Job, path: Path, turns: list[dict], split: str) -> dict:
    """A line of a manifest of conversations. Raises AudioError where the audio is none."""
    corpus, (duration, rate) = job.corpus, probe(path)
    # With its folder: archives of a corpus may count their files alike.
    below = path.relative_to(job.audio).with_suffix("").as_posix()
    return {"id": f"{corpus.name}/{below}", "path": path.relative_to(job.part).as_posix(),
            "agent_channel": 0, "user_channel": 1, "language": corpus.language,
            "source": corpus.name, "license": corpus.license, "commercial_ok": corpus.commercial_ok,
            "split": split, "duration": round(duration, 4), "sample_rate": rate,
            "turns": sorted(turns, key=lambda turn: turn["start"])}  # fmt: skip


def fetch_fisher(job: Job) -> None:
    """The LDC's folders as they are: SPHERE files become two-channel FLAC, side A the agent."""
    if (folder := job.options.fisher_dir) is None:
        raise UserError(f"fisher: {job.corpus.note}")
    if not (calls := sorted(folder.rglob("*.sph"))):
        raise UserError(f"--fisher_dir {folder}: no .sph files there; give the LDC's own folders")
    scripts = {path.stem: path for path in folder.rglob("fe_*.txt")}
    for call in job.until_full(calls):
        job.bar.advance(call.stat().st_size)
        target = job.audio / file_name(call.parent.name) / f"{file_name(call.stem)}.flac"
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_audio(target, *fetching.read_sphere(call))
            turns = _fisher_turns(scripts[call.stem]) if call.stem in scripts else []
            job.take(_conversation(job, target, turns, data.split_for(call.stem)))
        except AudioError as error:
            job.take(str(error))


def _fisher_turns(script: Path) -> list[dict]:  # of lines `start end A: words`
    pattern = r"\s*(\d*\.?\d+)\s+(\d*\.?\d+)\s+([AB])\d*:\s*(.*)"
    found = filter(None, (re.match(pattern, line) for line in text_lines(script, "replace")))
    turns = [{"who": "agent" if m[3] == "A" else "user", "text": m[4],
              "start": float(m[1]), "end": float(m[2])} for m in found]  # fmt: skip
    return [turn for turn in turns if turn["start"] <= turn["end"]]


FETCHERS = {Archives: fetch_archives, DataCollective: fetch_common_voice, Hub: fetch_hub,
            HubTars: fetch_hub_tars, Fisher: fetch_fisher}  # fmt: skip
