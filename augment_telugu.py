"""Phase 1: fill the Telugu gap: augmented copies of real speech, synthetic speech.

    python augment_telugu.py                         copies, up to 2,000 h
    python augment_telugu.py --hours all             every copy of every clip
    python augment_telugu.py --synthesize_hours 500  voices read the transcripts
    python augment_telugu.py --list_engines          what each engine needs

Copies (the plan's strategy 1): each training clip played 0.9 and 1.1 times as
fast (pitch and length move), 2 semitones lower and higher (length and vocal
tract stay), and with noise at a drawn SNR: five copies. Only the train split
is copied and copies stay in it, so nobody who is held out is heard in training;
copies are never copied again; originals are only read. Which copies are made,
where fewer than all are wanted, is drawn evenly over corpora and changes from
(seed, name).

Synthetic speech (strategy 2): Telugu sentences, from the transcripts of the
training clips or --text_file, in the voices of an engine, at a rate and a pitch
drawn per sentence. A clip is dropped and counted where --check cannot find its
sentence in it again.

Both can be stopped at any moment: the same command goes on. What is made
depends on the seed, the corpora and the flags alone, not on the number of
processes: samples repeat bit for bit (an Ogg file's serial number, four bytes,
does not; nor do the sounds of piper, whose noise has no seed).

Why Ogg/Vorbis: a copy is made once and read many times, and a gap of 1,200 h
(16 kHz) takes about 28 GB where FLAC takes 90 (noise does not compress). Opus
would take 17, but libsndfile encodes it at some 30 times real time a core, a
tenth of Vorbis' speed, and at five sample rates only.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr

import praat
from audio import SAMPLE_RATE, AudioError, read_audio, write_audio
from command import (
    ArgumentParser,
    LongHelp,
    UserError,
    as_json_line,
    check_fields,
    default_workers,
    file_name,
    json_lines,
    number,
    only_one,
    run,
    run_parts,
    text_lines,
    whole,
    writable_folder,
)
from data import MANIFEST, Clip, load_clips, read_manifest, scan_folder, write_manifest
from engines import ENGINES, PACKAGED, Line, Said, trimmed
from make_conversations import Made, draw_noise
from phones import phonemize
from training import setup_distributed

GOAL_HOURS = 2000.0
SPEEDS = (0.9, 1.1)
SEMITONES = (-2.0, 2.0)
SNR_DB = (10.0, 30.0)
NOISES = ("white", "pink")
PART_SECONDS = 600.0  # of copies: what a kill may cost is a few seconds of work
PIECE_SECONDS = 300.0  # longer recordings are copied in pieces of this, to bound memory
SYNTHETIC_PART_SECONDS = 120.0
BATCH = 16  # sentences an engine is handed at once
MAX_DROPS = 200  # in a row: then the engine, or the check, is at fault
RATE_RANGE = (0.87, 1.15)
SEMITONE_RANGE = (-2.0, 2.0)
RECORDS = ".parts"  # in the folder of copies: what each finished part made
# Bytes a sample and a file (half a disk block included), fitted to the five copies of 16 and 24 kHz
# speech of 2 and 8 s, and a tenth more for the noise of real rooms.
FORMATS = {"ogg": (0.36, 5800), "flac": (1.3, 2500), "opus": (0.22, 2700)}
OPUS_RATES = (8000, 12000, 16000, 24000)
TELUGU_TEXT = re.compile(
    r"[\u0c00-\u0c65\s.,!?;:'\"()\u2013\u2014\u2018-\u201d\u0964\u200c\u200d-]+"
)
# A phone of read Telugu lasts 0.06 to 0.1 s; outside of these, words are missing or it babbles.
PHONE_SECONDS = (0.03, 0.22)
DECOYS = 15


# ------------------------------------------------------------------------------------- changes


def change_speed(audio: np.ndarray, sample_rate: int, speed: float) -> np.ndarray:
    """Audio `[T]` played `speed` times as fast, pitch moving with it: `[T / speed]`."""
    return soxr.resample(audio, sample_rate * speed, sample_rate)


def shift_pitch(audio: np.ndarray, sample_rate: int, semitones: float) -> np.ndarray:
    """`praat.shift_pitch`; AudioError on audio that is too short to have a pitch, or that Praat
    comes to no end with: that copy alone is left out."""
    praat.check_installed()
    try:
        return praat.shift_pitch(audio, sample_rate, semitones)
    except (praat.TooShort, UserError) as error:
        raise AudioError(f"its pitch cannot be moved ({error})") from error


def add_noise(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """`audio + noise`, both `[T]`, at an SNR of mean powers; scaled down where it would clip."""
    power, noise_power = np.mean(audio**2), np.mean(noise**2)
    if power == 0 or noise_power == 0:
        return audio
    noisy = audio + noise * np.sqrt(power / noise_power / 10 ** (snr_db / 10))
    return _unclipped(noisy)


def _unclipped(audio: np.ndarray) -> np.ndarray:
    peak = float(np.abs(audio).max()) if len(audio) else 0.0
    return (audio / peak if peak > 1 else audio).astype(np.float32, copy=False)


def _key(*parts: object) -> int:
    """64 bits that depend on the parts alone, the same on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


# --------------------------------------------------------------------------------------- copies


@dataclass(frozen=True)
class Copy(Clip):
    """A manifest line with where it came from. `amount`: a factor, semitones, or dB of SNR.

    `source` is the original's path below the input folder, `start` the second where a piece of a
    long recording begins.
    """

    source: str = ""
    start: float = 0.0
    change: str = ""
    amount: float = 0.0
    seed: int = 0


COPY_FIELDS = {
    "source": "path?", "start": "number?", "change": "text?", "amount": "number?", "seed": "whole?",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One copy to make: `seconds` of `clip` from `start`, under `name` (no suffix)."""

    clip: Clip
    source: str
    start: float
    seconds: float
    change: str
    amount: float
    name: str


@dataclass(frozen=True)
class Part:
    """Copies that one worker makes in one go."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Options:
    """What decides the bytes of copies, and where they go."""

    folder: str
    seed: int
    format: str
    snr_db: tuple[float, float]
    noises: tuple[Clip, ...] = ()


def list_changes(
    speeds: Sequence[float], semitones: Sequence[float], noise_copies: int
) -> list[tuple[str, float]]:
    """(change, amount) of every copy of a clip; a noise copy's amount is its number."""
    amounts = {"speed": speeds, "pitch": semitones, "noise": range(noise_copies)}
    # By how a copy's name tells the amount: one given twice is one copy.
    told = {(change, f"{a:g}"): float(a) for change, given in amounts.items() for a in given}
    return [(change, amount) for (change, _), amount in told.items()]


def output_seconds(seconds: float, change: str, amount: float) -> float:
    """How long a copy of `seconds` is."""
    return seconds / amount if change == "speed" else seconds


def pieces(duration: float) -> list[tuple[float, float]]:
    """(start, seconds) of about equal pieces of PIECE_SECONDS at most (and half a second).

    They meet at whole seconds, which are whole samples at any rate.
    """
    count = max(1, math.ceil(duration / PIECE_SECONDS))
    edges = [*(float(round(i * duration / count)) for i in range(count)), duration]
    return [(start, end - start) for start, end in itertools.pairwise(edges)]


def source_name(clip: Clip, root: Path) -> str:
    """The clip's path below the input folder; for one outside of it, a name with a hash."""
    relative = Path(os.path.relpath(clip.path, root))
    if relative.parts[0] == "..":
        parent = hashlib.sha256(os.fsencode(clip.path.parent)).hexdigest()[:8]
        return f"elsewhere/{parent}/{clip.path.name}"
    return relative.as_posix()


def choose_tasks(
    clips: Sequence[Clip],
    root: Path,
    changes: Sequence[tuple[str, float]],
    made: dict[str, float],
    hours: float,
    seed: int,
) -> list[Task]:
    """The copies still to make so that there are `hours` of them, those of `made` included.

    `made`: seconds by name. Copies are taken in an order drawn from (seed, name): a prefix of the
    order is a fair sample, more hours later only add to it, and a run that was killed chooses
    what it had chosen. Counted in whole milliseconds, so that no rounding moves the border.
    """
    if hours <= 0:
        return []
    sources = [source_name(clip, root) for clip in clips]
    stems = Counter(str(Path(source).with_suffix("")) for source in sources)
    order = []
    for i, (clip, source) in enumerate(zip(clips, sources, strict=True)):
        # Two files that differ in their suffix alone must not become one.
        stem = str(Path(source).with_suffix(""))
        base = stem if stems[stem] == 1 else source.replace(".", "_")
        # What the change and the format add must still be a name.
        base = "/".join(map(file_name, base.split("/")))
        parts = pieces(clip.duration)
        for p, (change, amount) in itertools.product(range(len(parts)), changes):
            name = f"{base}_{p:04d}" if len(parts) > 1 else base
            name += f"_{change}{amount:g}" if change != "pitch" else f"_pitch{amount:+g}"
            order.append((_key(seed, name), name, i, p, change, amount))
    order.sort()
    planned = {name: i for i, (_, name, *_) in enumerate(order)}
    limit = hours * 3.6e6
    total = sum(round(1000 * seconds) for name, seconds in made.items() if name not in planned)

    def milliseconds(entry) -> int:
        _, _, i, p, change, amount = entry
        return round(1000 * output_seconds(pieces(clips[i].duration)[p][1], change, amount))

    total += sum(milliseconds(order[planned[name]]) for name in made if name in planned)
    chosen = []
    for entry in order:
        if entry[1] in made:
            continue
        if total >= limit:
            break
        total += milliseconds(entry)
        _, name, i, p, change, amount = entry
        start, seconds = pieces(clips[i].duration)[p]
        chosen.append(Task(clips[i], sources[i], start, seconds, change, amount, name))
    return chosen


def split_into_parts(tasks: Sequence[Task]) -> list[Part]:
    """Parts of about PART_SECONDS; copies of one clip lie together, so that it is read once."""
    parts: list[Part] = []
    mine: list[Task] = []
    seconds = 0.0
    by_source = sorted(tasks, key=lambda task: (task.source, task.start, task.name))
    for task in by_source:
        mine.append(task)
        seconds += output_seconds(task.seconds, task.change, task.amount)
        if seconds >= PART_SECONDS or task is by_source[-1]:
            digest = _key(*(task.name for task in mine))
            parts.append(Part(f"{digest:016x}", tuple(mine)))
            mine, seconds = [], 0.0
    return parts


def make_part(options: Options, part: Part) -> Made:
    """Make the copies of a part, then its record. Unreadable originals are left out and told.

    Raises UserError where nothing can be written (a full disk): all records stay true.
    """
    copies: list[Copy] = []
    dropped: list[str] = []
    for folder in {(Path(options.folder) / task.name).parent for task in part.tasks}:
        folder.mkdir(parents=True, exist_ok=True)

    def piece(task: Task) -> tuple[Path, float]:
        return task.clip.path, task.start

    for _, group in itertools.groupby(part.tasks, piece):
        tasks = list(group)
        try:
            audio, rate = _read_piece(options, tasks[0])
        except AudioError as error:
            dropped.append(str(error))
            continue
        for task in tasks:
            try:
                sound, change, amount = _changed(options, task, audio, rate)
            except AudioError as error:
                dropped.append(f"{task.clip.path}: {error}")
                continue
            copies.append(_write_copy(options, task, sound, rate, change, amount))
    write_manifest(Path(options.folder) / RECORDS / f"{part.name}.jsonl", copies)
    seconds = sum(copy.duration for copy in copies)
    return Made(part, seconds, len(copies), tuple(dropped))


def _read_piece(options: Options, task: Task) -> tuple[np.ndarray, int]:
    """The piece as mono `[T]` and its rate: the original's, at most 24 kHz (the codec's)."""
    rate = copy_rate(task.clip.sample_rate, options.format)
    whole = task.seconds >= task.clip.duration
    audio = read_audio(task.clip.path, task.start, None if whole else task.seconds, rate)
    if not len(audio):
        raise AudioError(f"{task.clip.path}: shorter than its manifest says; fetch it again")
    return audio, rate


def copy_rate(sample_rate: int, suffix: str) -> int:
    """The sample rate of a copy: upsampling would only cost disk, and Opus takes five rates."""
    rate = min(sample_rate, SAMPLE_RATE)
    return rate if suffix != "opus" else min(r for r in OPUS_RATES if r >= rate)


def _changed(
    options: Options, task: Task, audio: np.ndarray, rate: int
) -> tuple[np.ndarray, str, float]:
    """(copy `[T]`, what was done, how much)."""
    if task.change == "speed":
        return _unclipped(change_speed(audio, rate, task.amount)), "speed", task.amount
    if task.change == "pitch":
        return _unclipped(shift_pitch(audio, rate, task.amount)), "pitch", task.amount
    rng = np.random.default_rng([options.seed, _key(task.name)])
    snr_db = round(float(rng.uniform(*options.snr_db)), 3)
    kind, noise = _noise(options, rng, len(audio), rate)
    return add_noise(audio, noise, snr_db), f"noise: {kind}", snr_db


def _noise(
    options: Options, rng: np.random.Generator, length: int, rate: int
) -> tuple[str, np.ndarray]:
    """(what it is, noise `[length]`): of the recordings where there are some, else drawn."""
    if not options.noises:
        kind = str(rng.choice(NOISES))
        return kind, draw_noise(kind, length, (), rng)
    clip = options.noises[int(rng.integers(len(options.noises)))]
    start = float(rng.uniform(0, max(clip.duration - length / rate, 0)))
    noise = read_audio(clip.path, start, length / rate, rate)
    return clip.path.name, np.resize(noise, length) if len(noise) else np.zeros(length, np.float32)


def _write_copy(
    options: Options, task: Task, audio: np.ndarray, rate: int, change: str, amount: float
) -> Copy:
    path = Path(options.folder) / f"{task.name}.{options.format}"
    write_audio(path, audio, rate)
    # The text and the phones of a piece of a recording are not known.
    whole, speed = task.seconds >= task.clip.duration, amount if change == "speed" else 1.0
    phones = task.clip.phones if whole else None
    return Copy(
        **{
            **vars(task.clip),
            "path": path,
            "duration": len(audio) / rate,
            "sample_rate": rate,
            "text": task.clip.text if whole else None,
            "phones": phones and _scaled(phones, 1 / speed),
            "augmented": True,
            "split": "train",
        },
        source=task.source,
        start=round(task.start, 3),
        change=change,
        amount=amount,
        seed=options.seed,
    )


def _scaled(phones: Sequence[Sequence], factor: float = 1.0) -> list[list]:
    """[[phone, start, end]] with times multiplied, rounded to 0.1 ms."""
    return [[p, round(float(s) * factor, 4), round(float(e) * factor, 4)] for p, s, e in phones]


def read_copies(manifest: Path) -> list[Copy]:
    """The copies of a record or a manifest, with where they came from."""
    copies = []
    for clip, (at, row) in zip(read_manifest(manifest), json_lines(manifest), strict=True):
        check_fields(row, COPY_FIELDS, f"{manifest}, line {at}")
        extra = {key: row[key] for key in COPY_FIELDS if row.get(key) is not None}
        copies.append(Copy(**vars(clip), **extra))
    return copies


def made_copies(folder: Path) -> list[Copy]:
    """What finished parts recorded and is still there; half-written files are removed.

    The disk is asked once a folder: on a network volume each question about a file takes time.
    """
    there: dict[str, int] = {}
    for parent, _, _ in os.walk(folder):
        with os.scandir(parent) as entries:
            for entry in entries:
                there[entry.path] = entry.stat(follow_symlinks=False).st_size
    for path in there:
        if path.endswith(".part") and os.path.isfile(path):
            os.unlink(path)
    copies: dict[Path, Copy] = {}
    for record in sorted((folder / RECORDS).glob("*.jsonl")):
        for copy in read_copies(record):
            path = os.path.normpath(copy.path)
            # A pod that was lost may leave names without their data.
            if there.get(path):
                copies[Path(path)] = replace(copy, path=Path(path))
    return [copies[path] for path in sorted(copies)]


def copy_name(copy: Copy, folder: Path) -> str:
    """The name that `choose_tasks` gave a copy, whatever format it was written in."""
    return copy.path.relative_to(folder).as_posix().rpartition(".")[0]


def augment(args: argparse.Namespace) -> None:
    """Job 1: copies of the training clips below --input_dir, into --output_dir."""
    root, final = _input_folder(args.input_dir), Path(args.output_dir).resolve()
    if args.semitones:
        praat.check_installed()
    writable_folder(final.parent, "--output_dir")
    # Until it is whole the first time, the folder is hidden: its files have no manifest yet, and
    # a trainer would take them for recordings of their own, validation split included.
    hidden = final.with_name(file_name(f".{final.name}.part"))
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    folder = final if final.exists() else hidden
    if folder == final and not (final / RECORDS).is_dir():
        raise UserError(f"{final}: not made by this script; give another --output_dir")
    with _held(folder, "--output_dir"):
        _copy_into(folder, final, root, args)


@contextlib.contextmanager
def _held(folder: Path, flag: str) -> Iterator[None]:
    """The folder for this run alone, made where it is missing, gone where nothing came into it."""
    with only_one(writable_folder(folder, flag)):
        try:
            yield
        finally:
            if folder.is_dir() and not any(entry.name != ".lock" for entry in folder.iterdir()):
                shutil.rmtree(folder)


def _copy_into(folder: Path, final: Path, root: Path, args: argparse.Namespace) -> None:
    """Make what is missing in `folder`, which gets the name `final` when it is whole."""
    clips = load_clips([root], "train")
    real = [clip for clip in clips if not clip.augmented and final not in clip.path.parents]
    sources = [clip for clip in real if not _skipped(clip, root, args.skip)]
    made = made_copies(folder)
    hours_real, hours_made = _hours(real), _hours(made)
    wanted = {"all": math.inf, "gap": max(args.goal_hours - hours_real, 0.0)}
    wanted_hours = wanted[args.hours] if args.hours in wanted else float(args.hours)
    print_hours("before", [*real, *made], root, args.goal_hours)
    if not sources and wanted_hours > hours_made:
        raise UserError(
            f"{root}: nothing to copy, every training clip is in a folder of --skip "
            f"{' '.join(args.skip)}; add recordings or give another --skip"
        )
    changes = list_changes(args.speeds, args.semitones, args.noise_copies)
    names = {copy_name(copy, folder): copy.duration for copy in made}
    tasks = choose_tasks(sources, root, changes, names, wanted_hours, args.seed)
    if not tasks:
        print("nothing to make: the hours asked for are there (--hours all makes every copy)")
    else:
        _print_skipped(real, sources, args.skip)
        check_disk(final.parent, copy_bytes(tasks, args.format), _task_hours(tasks), args.format)
    if folder != final and not (tasks or made):
        return
    noises = _noise_clips(args.noise_dir)
    options = Options(str(folder), args.seed, args.format, tuple(args.snr_db), noises)
    parts, started = split_into_parts(tasks), os.times()
    if parts:
        work = functools.partial(make_part, options)
        results = list(run_parts(work, parts, args.num_workers, len(parts)))
        _report(results, final.parent, started)
    print_hours("after", [*real, *_publish_copies(folder, final)], root, args.goal_hours)


def _publish_copies(folder: Path, final: Path) -> list[Copy]:
    copies = made_copies(folder)
    if not copies:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{final}: no copy could be made; see the files named above")
    write_manifest(folder / MANIFEST, copies)
    if folder != final:
        folder.rename(final)
    return copies


def _input_folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; run download_data.py or check --input_dir")
    return Path(path).resolve()


def _skipped(clip: Clip, root: Path, globs: Sequence[str]) -> bool:
    corpus = source_name(clip, root).partition("/")[0]
    return any(fnmatch.fnmatchcase(corpus, glob) for glob in globs)


def _print_skipped(real: Sequence[Clip], sources: Sequence[Clip], globs: Sequence[str]) -> None:
    left_out = _hours(real) - _hours(sources)
    if left_out > 0:
        print(f"{left_out:,.1f} h in folders of --skip {' '.join(globs)} are not copied")


def _noise_clips(folder: str | None) -> tuple[Clip, ...]:
    if folder is None:
        return ()
    if not Path(folder).is_dir():
        raise UserError(f"--noise_dir {folder}: no such folder")
    clips, _ = scan_folder(folder)
    if not clips:
        raise UserError(f"--noise_dir {folder}: no readable audio there")
    return tuple(sorted(clips, key=lambda clip: str(clip.path)))


# ------------------------------------------------------------------------------- hours and disk


def _hours(clips: Sequence[Clip]) -> float:
    return sum(clip.duration for clip in clips) / 3600


def _task_hours(tasks: Sequence[Task]) -> float:
    return sum(output_seconds(t.seconds, t.change, t.amount) for t in tasks) / 3600


def copy_bytes(tasks: Sequence[Task], suffix: str) -> float:
    """About how many bytes the copies will take."""
    per_sample, per_file = FORMATS[suffix]
    samples = sum(
        output_seconds(t.seconds, t.change, t.amount) * copy_rate(t.clip.sample_rate, suffix)
        for t in tasks
    )
    return samples * per_sample + per_file * len(tasks)


def check_disk(folder: Path, needed: float, hours: float, suffix: str) -> None:
    """Say what is about to be made and what it takes. UserError where the disk is too small."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    print(f"to make: {hours:,.2f} h of {suffix}, about {_bytes(needed)}; {_bytes(free)} are free")
    if needed > free:
        fewer = math.ceil(hours * (1 - free / needed))
        raise UserError(
            f"{folder}: {_bytes(needed)} needed, {_bytes(free)} free; free some space, or ask for "
            f"{fewer:,} h less (--hours, --synthesize_hours)"
        )


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def print_hours(title: str, clips: Sequence[Clip], root: Path, goal: float) -> None:
    """The table of training hours, a row a corpus and one for all copies, against the goal."""
    hours: Counter[str] = Counter()
    for clip in clips:
        corpus, _, below = source_name(clip, root).partition("/")
        corpus = "augmented copies" if clip.augmented else corpus if below else "."
        hours[corpus] += clip.duration / 3600
    rows = sorted(hours.items(), key=lambda row: (row[0] == "augmented copies", row[0]))
    total = sum(hours.values())
    print(f"{'training split, ' + title:<40} {'hours':>10}")
    print("-" * 51)
    for name, amount in rows:
        print(f"{name[:40]:<40} {amount:>10,.2f}")
    print("-" * 51)
    share = f"{100 * total / goal:,.1f} % of {goal:,.0f} h" if goal > 0 else "no goal"
    print(f"{'total':<40} {total:>10,.2f}  {share}", flush=True)


def _report(made: Sequence[Made], folder: Path, started: os.times_result) -> None:
    """What was made since `started`, and how fast: by the clock, and by CPU time of all processes,
    which is the rate of one core whatever else the machine does."""
    dropped = [reason for m in made for reason in m.dropped]
    if dropped:
        log = folder / "augment_dropped.txt"
        listed = "".join(f"{reason}\n" for reason in dropped)
        log.write_text(listed, encoding="utf-8", errors="backslashreplace")
        print(f"{len(dropped)} left out, see {log}; first: {dropped[0]}")
    audio, now = sum(m.seconds for m in made), os.times()
    seconds, cpu = now.elapsed - started.elapsed, sum(now[:4]) - sum(started[:4])
    print(
        f"{sum(m.count for m in made)} clips, {audio / 3600:,.2f} h in {seconds:,.0f} s "
        f"({audio / max(seconds, 1e-3):,.0f}x real time, {audio / max(cpu, 1e-3):,.0f}x a core)"
    )


# --------------------------------------------------------------------------------------- checks

# Broad classes of phones: a recogniser that never heard Telugu mishears places and voicing, not
# whether it heard a stop, a nasal or a vowel.
_CLASSES = {
    "V": "i ɪ e ɛ æ a aː ɑ ɔ o ʊ u ʌ ə ɚ ɝ eɪ aɪ ɔɪ aʊ oʊ ɜ ɒ ɐ",
    "P": "p b f v ʋ w pʰ bʰ", "T": "t d ʈ ɖ θ ð tʰ dʰ ʈʰ ɖʰ ɾ", "K": "k g ɡ h kʰ ɡʰ x",
    "C": "tʃ dʒ t͡ʃ d͡ʒ tʃʰ dʒʰ ʃ ʒ s z", "N": "m n ŋ ɳ ɲ", "R": "r ɹ ɽ ɽʰ l ɭ j",
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def _class_of() -> dict[str, str]:
    return {phone: name for name, phones in _CLASSES.items() for phone in phones.split()}


def broad(phones: Sequence[str]) -> str:
    """Phones as a string of broad classes, runs joined (geminates and long vowels)."""
    known = (_class_of().get(phone, "") for phone in phones)
    return "".join(name for name, _ in itertools.groupby("".join(known)))


class Plausible:
    """`--check plausible`: does the length fit the sentence? Catches silence, sentences cut off and
    babble, by seconds a phone (phones by espeak's rules). It hears no word: a clip that says
    something else in the right time passes."""

    def fault(self, said: Said, text: str, others: Sequence[str]) -> str | None:
        """Why the clip is to be dropped, or None."""
        count = len(phonemize(text, "telugu"))
        if not count:
            return "no phones in the text"
        seconds = len(trimmed(said.audio, said.sample_rate)) / said.sample_rate / count
        low, high = PHONE_SECONDS
        return None if low <= seconds <= high else f"{seconds:.3f} s a phone"


class Hama(Plausible):
    """`--check hama`: as plausible, and a phone recogniser must find the sentence again.

    The recogniser (package hama) knows English and Korean. What it hears, in broad classes, is
    compared with the sentence and with DECOYS others of the same engine's batch; the clip is kept
    where no other sentence is nearer. That finds wrong, missing and unintelligible words; it does
    not judge accent, and costs some 20 times real time a core.
    """

    def __init__(self) -> None:
        from evaluate_s2s import HamaJudge, relative_distance

        self._judge, self._distance = HamaJudge(), relative_distance

    def fault(self, said: Said, text: str, others: Sequence[str]) -> str | None:
        fault = super().fault(said, text, others)
        if fault:
            return fault
        audio = said.audio
        if said.sample_rate != SAMPLE_RATE:
            audio = soxr.resample(audio, said.sample_rate, SAMPLE_RATE)
        heard = broad(self._judge.hear(audio))
        own = self._distance(heard, broad(phonemize(text, "telugu")))
        for other in others:
            if self._distance(heard, broad(phonemize(other, "telugu"))) < own:
                return f"its phones are not found again (distance {own:.2f})"
        return None


class Unchecked:
    """`--check none`."""

    def fault(self, said: Said, text: str, others: Sequence[str]) -> str | None:
        return None


CHECKS = {"plausible": Plausible, "hama": Hama, "none": Unchecked}


# ------------------------------------------------------------------------------------ synthesis


@dataclass(frozen=True)
class Synthetic(Clip):
    """A manifest line with how it was made."""

    engine: str = ""
    model: str = ""
    rate: float = 1.0
    semitones: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class SynthesisOptions:
    """What decides the speech that is made, and where it goes."""

    folder: str
    engine: str
    model: str
    device: str
    seed: int
    format: str
    check: str
    texts: str
    part_seconds: float


@functools.lru_cache(maxsize=1)
def _engine(name: str, model: str, device: str):
    return ENGINES[name].make(model, device)


@functools.lru_cache(maxsize=1)
def _check(name: str):
    return CHECKS[name]()


@functools.lru_cache(maxsize=1)
def _texts(path: str) -> tuple[str, ...]:
    return tuple(text_lines(path))


def choose_texts(clips: Sequence[Clip], text_file: str | None) -> tuple[list[str], int]:
    """(sentences, how many were left out): in Telugu script alone, of 8 to 250 letters, each once.

    Digits and Latin letters are left out because no engine here is sure to read them as a
    Telugu speaker would.
    """
    if text_file is not None:
        try:
            found = text_lines(text_file)
        except (OSError, UserError) as error:
            raise UserError(f"--text_file {text_file}: cannot be read ({error})") from error
    else:
        found = [clip.text for clip in clips if clip.text and clip.language == "telugu"]
    texts = {" ".join(text.split()) for text in found} - {""}
    kept = sorted(t for t in texts if 8 <= len(t) <= 250 and TELUGU_TEXT.fullmatch(t))
    return kept, len(texts) - len(kept)


def draw_lines(texts: Sequence[str], voices: Sequence[str], rng: np.random.Generator) -> list[Line]:
    """A batch: sentence, voice, rate and pitch of each drawn evenly."""
    return [
        Line(
            text=texts[int(rng.integers(len(texts)))],
            voice=voices[int(rng.integers(len(voices)))],
            rate=round(float(rng.uniform(*RATE_RANGE)), 3),
            semitones=round(float(rng.uniform(*SEMITONE_RANGE)), 2),
            seed=int(rng.integers(2**31)),
        )
        for _ in range(BATCH)
    ]


def make_synthetic_part(options: SynthesisOptions, index: int) -> Made:
    """Make one folder of at least `part_seconds` of speech with its own manifest."""
    engine, check = _engine(options.engine, options.model, options.device), _check(options.check)
    texts, rng = _texts(options.texts), np.random.default_rng([options.seed, index])
    folder = Path(options.folder) / f"{index:05d}"
    building = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    clips: list[Synthetic] = []
    dropped: list[str] = []
    seconds, in_a_row = 0.0, 0
    while seconds < options.part_seconds:
        lines = draw_lines(texts, engine.voices, rng)
        for line, said in zip(lines, engine.say(lines), strict=True):
            others = [texts[int(i)] for i in rng.integers(len(texts), size=DECOYS)]
            fault = "said nothing" if said is None else check.fault(said, line.text, others)
            if fault:
                dropped.append(f"{line.voice}: {fault}: {line.text}")
                in_a_row += 1
                continue
            in_a_row = 0
            path = building / f"{index:05d}-{len(clips):03d}.{options.format}"
            clips.append(_write_synthetic(options, line, said, path))
            seconds += clips[-1].duration
        if in_a_row >= MAX_DROPS:
            raise UserError(
                f"{options.engine}: {in_a_row} sentences in a row dropped by --check "
                f"{options.check}; last: {dropped[-1]}"
            )
    write_manifest(building / MANIFEST, clips)
    os.replace(building, folder)
    return Made(index, seconds, len(clips), tuple(dropped))


def _write_synthetic(options: SynthesisOptions, line: Line, said: Said, path: Path) -> Synthetic:
    info = ENGINES[options.engine]
    audio, rate = said.audio, copy_rate(said.sample_rate, options.format)
    if rate != said.sample_rate:
        audio = soxr.resample(audio, said.sample_rate, rate)
    write_audio(path, audio, rate)
    return Synthetic(
        path=path,
        duration=len(audio) / rate,
        sample_rate=rate,
        language="telugu",
        speaker=line.voice if "/" in line.voice else f"{options.engine}/{line.voice}",
        text=line.text,
        license=info.license,
        commercial_ok=info.commercial_ok,
        phones=said.phones,
        engine=options.engine,
        model=options.model,
        rate=line.rate,
        semitones=line.semitones,
        seed=line.seed,
    )


def synthesize(args: argparse.Namespace) -> None:
    """Job 2: --synthesize_hours of Telugu speech into --synthetic_dir."""
    root = _input_folder(args.input_dir)
    info = ENGINES[args.engine]
    # Engines that are programs leave a GPU alone, and are spread over the processes.
    device = "cpu" if args.engine in PACKAGED else str(setup_distributed(args.device).device)
    model = args.model or info.model
    folder = Path(args.synthetic_dir or root / f"synthetic_{args.engine}")
    with _held(folder, "--synthetic_dir"):
        _speak_into(folder, root, model, device, args)


def _speak_into(
    folder: Path, root: Path, model: str, device: str, args: argparse.Namespace
) -> None:
    """Make the parts that are missing in `folder`, and one manifest of all."""
    clips = _training_clips(root, args.text_file is not None)
    texts, left_out = choose_texts(clips, args.text_file)
    if not texts:
        where = f"--text_file {args.text_file}" if args.text_file else f"the manifests of {root}"
        raise UserError(f"{where}: no Telugu sentence there; give a --text_file, one a line")
    print_hours("before", clips, root, args.goal_hours)
    print(f"texts: {len(texts):,}; {left_out:,} left out (digits, Latin letters, length)")
    engine = _engine(args.engine, model, device)  # says what is missing before anything is made
    _check(args.check)
    licence = ENGINES[args.engine].license
    print(f"engine {args.engine}: {len(engine.voices)} voices on {device}, {licence}")
    size = min(SYNTHETIC_PART_SECONDS, args.synthesize_hours * 3600)
    count = math.ceil(args.synthesize_hours * 3600 / size - 1e-9)
    missing = [i for i in range(count) if not (folder / f"{i:05d}" / MANIFEST).exists()]
    hours = len(missing) * size / 3600
    check_disk(folder, _synthetic_bytes(hours, args.format), hours, args.format)
    for leftover in folder.glob(".*.part"):
        shutil.rmtree(leftover)
    text_file = folder / ".texts"
    text_file.write_text("\n".join(texts), encoding="utf-8")
    options = SynthesisOptions(
        str(folder), args.engine, model, device, args.seed, args.format, args.check,
        str(text_file), size,
    )  # fmt: skip
    # A GPU is fed by one process.
    workers, started = 0 if device != "cpu" else args.num_workers, os.times()
    if missing:
        work = functools.partial(make_synthetic_part, options)
        made = list(run_parts(work, missing, workers, count))
        _report(made, folder, started)
    _publish_synthetic(folder)
    print_hours("after", _training_clips(root, True), root, args.goal_hours)


def _training_clips(root: Path, may_be_empty: bool) -> list[Clip]:
    """The training clips. With sentences from a file there need not be any yet: they are needed
    for the table alone, and what is wrong with them is only told."""
    try:
        return load_clips([root], "train")
    except UserError as error:
        if not may_be_empty:
            raise
        print(f"note: {error}")
        return []


def _synthetic_bytes(hours: float, suffix: str) -> float:
    per_sample, per_file = FORMATS[suffix]
    return hours * 3600 * (SAMPLE_RATE * per_sample + per_file / 5)


def _publish_synthetic(folder: Path) -> None:
    """One manifest for all parts, with everything their own say of how clips were made."""
    lines = []
    for manifest in sorted(folder.glob(f"[0-9]*/{MANIFEST}")):
        for at, fields in json_lines(manifest):
            check_fields(fields, {"path": "path"}, f"{manifest}, line {at}")
            fields["path"] = f"{manifest.parent.name}/{fields['path']}"
            lines.append(as_json_line(fields))
    part = folder / f"{MANIFEST}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / MANIFEST)


# ----------------------------------------------------------------------------------------- main


def print_engines() -> None:
    """The table of engines, 80 columns wide; a command goes on behind a backslash, to be pasted."""
    for name, row in ENGINES.items():
        use = "commercial use" if row.commercial_ok else "no commercial use"
        lines = textwrap.wrap(row.pip, 67, break_long_words=False, break_on_hyphens=False)
        for begin, text in ((f"{name:<9} ", f"{row.license}, {use}"), (" " * 10, row.note)):
            print(textwrap.fill(text, 79, initial_indent=begin, subsequent_indent=" " * 10))
        print(textwrap.indent(" \\\n".join(lines), " " * 10))


def _hours_flag(value: str) -> str | float:
    return value if value in ("gap", "all") else number(above=0, high=1e6)(value)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=LongHelp)
    add = parser.add_argument
    add("--input_dir", default="data/telugu", help="corpora to copy, sub-folders included")
    add("--output_dir", default="data/telugu/augmented", help="of the copies")
    add("--hours", type=_hours_flag, default="gap", metavar="H",
        help="of copies: a number, all, or gap: what --goal_hours lacks")  # fmt: skip
    add("--synthesize_hours", type=number(above=0, high=1e6),
        help="make so much synthetic speech instead")  # fmt: skip
    add("--engine", choices=ENGINES, default="indictts", help="that speaks; see --list_engines")
    add("--text_file", help="sentences to say, one a line, in place of the transcripts")
    add("--list_engines", action="store_true", help="show the table of engines and stop")
    add = parser.add_argument_group("advanced").add_argument
    add("--goal_hours", type=number(0), default=GOAL_HOURS, help="of training speech, copies too")
    add("--speeds", type=number(0.5, 2), nargs="*", default=list(SPEEDS), help="copies played so")
    add("--semitones", type=number(-12, 12), nargs="*", default=list(SEMITONES),
        help="copies with their pitch moved so")  # fmt: skip
    add("--noise_copies", type=whole(0, 100), default=1, help="noisy copies of each clip")
    add("--snr_db", type=number(-100, 100), nargs=2, default=list(SNR_DB), metavar=("LOW", "HIGH"),
        help="of noisy copies")  # fmt: skip
    add("--noise_dir", help="recordings of noise, in place of white and pink noise")
    add("--skip", nargs="*", default=["synthetic*"], help="corpora not to copy (globs)")
    add("--format", choices=FORMATS, default="ogg", help="of the files made")
    add("--model", help="folder or Hugging Face id of the engine's voice")
    add("--synthetic_dir", help="of synthetic speech, in place of INPUT_DIR/synthetic_ENGINE")
    add("--check", choices=CHECKS, default="plausible", help="of synthetic clips")
    add("--device", default="auto", help="of engines that are neural")
    add("--seed", type=whole(0), default=0, help="of everything that is drawn")
    add("--num_workers", type=whole(0, 256), default=default_workers(), help="processes; 0: none")
    args = parser.parse_args(arguments)
    if args.snr_db[0] > args.snr_db[1]:
        parser.error(f"--snr_db {args.snr_db[0]:g} {args.snr_db[1]:g}: the lower one first")
    if not (args.speeds or args.semitones or args.noise_copies):
        parser.error("no change is left: give --speeds, --semitones or --noise_copies")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.list_engines:
        print_engines()
    elif args.synthesize_hours is not None:
        synthesize(args)
    else:
        augment(args)


if __name__ == "__main__":
    run(main)
