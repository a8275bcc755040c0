"""Phase 1: fill the Telugu gap: augmented copies of real speech, synthetic speech.

    python augment_telugu.py                         copies, up to 2,000 h
    python augment_telugu.py --hours all             every copy of every clip
    python augment_telugu.py --synthesize_hours 500  voices read the transcripts
    python augment_telugu.py --list_engines          what each engine needs

Copies (the plan's strategy 1): each training clip played 0.9 and 1.1 times as
fast (pitch and length move), 2 semitones lower and higher (length and vocal
tract stay), and with noise at a drawn SNR: five copies. Only the train split
is copied and copies stay in it; copies are never copied again; originals are
only read. Which copies are made, where fewer than all are wanted, is drawn
evenly over corpora from (seed, name).

Synthetic speech (strategy 2): Telugu sentences, from the transcripts of the
training clips or --text_file, in the voices of an engine, at a rate and a pitch
drawn per sentence. A clip that fails --check is dropped and counted.

Both can be stopped at any moment: the same command goes on. What is made
depends on the seed, the corpora and the flags alone, not on the number of
processes: samples repeat bit for bit (but for piper's, whose noise has no seed).
Written as Ogg/Vorbis: 1,200 h take 28 GB, as FLAC 90 (noise does not compress).
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

import praat
from audio import SAMPLE_RATE, AudioError, read_audio, write_audio
from command import (
    ArgumentParser,
    UserError,
    as_json_line,
    check_fields,
    default_workers,
    existing_folder,
    file_name,
    json_lines,
    number,
    only_one,
    run,
    run_parts,
    text_lines,
    whole,
    writable_folder,
    write_text,
)
from data import (
    MANIFEST,
    Clip,
    add_noise,
    change_speed,
    coloured_noise,
    load_clips,
    scan_folder,
    unclipped,
    write_manifest,
)
from engines import ENGINES, Packaged, RawSpeech, Sentence
from phones import phonemize
from training import setup_distributed

PART_SECONDS = 600.0  # of copies: what a kill may cost is a few seconds of work
PIECE_SECONDS = 300.0  # longer recordings are copied in pieces of this, to bound memory
SYNTHETIC_PART_SECONDS = 120.0
BATCH = 16  # sentences an engine is handed at once
MAX_DROPS = 200  # in a row: then the engine, or the check, is at fault
RATE_RANGE = (0.87, 1.15)
SEMITONE_RANGE = (-2.0, 2.0)
COPIES = "augmented copies"
TEXTS = ".texts"  # in the folder of synthetic speech: its sentences
RECORDS = ".parts"  # in an output folder: a manifest of what each finished part made
# Bytes a sample and a file (half a disk block included), fitted to the five copies of 16 and 24 kHz
# speech of 2 and 8 s, and a tenth more for the noise of real rooms.
FORMATS = {"ogg": (0.36, 5800), "flac": (1.3, 2500)}
TELUGU_TEXT = re.compile(
    r"[\u0c00-\u0c65\s.,!?;:'\"()\u2013\u2014\u2018-\u201d\u0964\u200c\u200d-]+"
)
# A phone of read Telugu lasts 0.06 to 0.1 s; outside of these, words are missing or it babbles.
PHONE_SECONDS = (0.03, 0.22)
CHECKS = ("plausible", "hama", "none")
DECOYS = 15  # other sentences that a clip must not sound more like
# Broad classes of phones: a recogniser that never heard Telugu mishears places and voicing, not
# whether it heard a stop, a nasal or a vowel.
PHONE_CLASSES = {
    "V": "i ɪ e ɛ æ a aː ɑ ɔ o ʊ u ʌ ə ɚ ɝ eɪ aɪ ɔɪ aʊ oʊ ɜ ɒ ɐ",
    "P": "p b f v ʋ w pʰ bʰ", "T": "t d ʈ ɖ θ ð tʰ dʰ ʈʰ ɖʰ ɾ", "K": "k g ɡ h kʰ ɡʰ x",
    "C": "tʃ dʒ t͡ʃ d͡ʒ tʃʰ dʒʰ ʃ ʒ s z", "N": "m n ŋ ɳ ɲ", "R": "r ɹ ɽ ɽʰ l ɭ j",
}  # fmt: skip
CLASS_OF = {phone: name for name, phones in PHONE_CLASSES.items() for phone in phones.split()}


# ------------------------------------------------------------------------------ choosing copies


@dataclass(frozen=True)
class CopiedClip(Clip):
    """A manifest line with where it came from. `amount`: a factor, semitones, or dB of SNR.

    `source` is the original's path below the input folder, `start` the second where a piece of a
    long recording begins.
    """

    source: str = ""
    start: float = 0.0
    change: str = ""
    amount: float = 0.0
    seed: int = 0


class CopyPlan(NamedTuple):
    """A copy to make of `seconds` of `clip` from `start`, under `name` (no suffix).

    `order` is drawn from (seed, name): plans are sorted by it.
    """

    order: int
    name: str
    clip: Clip
    source: str
    start: float
    seconds: float
    change: str
    amount: float

    @property
    def copy_seconds(self) -> float:
        return self.seconds / self.amount if self.change == "speed" else self.seconds

    @property
    def whole_clip(self) -> bool:
        return self.seconds >= self.clip.duration


def hashed(*parts: object) -> int:
    """64 bits that depend on the parts alone, the same on every machine."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def list_changes(
    speeds: Sequence[float], semitones: Sequence[float], noise_copies: int
) -> list[tuple[str, float]]:
    """(change, amount) of every copy of a clip; a noise copy's amount is its number."""
    amounts = {"speed": speeds, "pitch": semitones, "noise": range(noise_copies)}
    # By the amount as a copy's name has it: one given twice is one copy.
    named = {(change, f"{a:g}"): float(a) for change, given in amounts.items() for a in given}
    return [(change, amount) for (change, _), amount in named.items()]


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


def plan_copies(
    clips: Sequence[Clip], root: Path, changes: Sequence[tuple[str, float]], seed: int
) -> list[CopyPlan]:
    """Every copy of every clip, in an order drawn from (seed, name): a prefix of it is a fair
    sample, more hours later only add to it, and a run that was killed chooses what it had chosen.
    """
    sources = [source_name(clip, root) for clip in clips]
    stems = Counter(os.path.splitext(source)[0] for source in sources)
    plans = []
    for clip, source in zip(clips, sources, strict=True):
        # Two files that differ in their suffix alone must not become one.
        stem = os.path.splitext(source)[0]
        stem = stem if stems[stem] == 1 else source.replace(".", "_")
        # What the change and the format add must still be a name.
        stem = "/".join(map(file_name, stem.split("/")))
        cut = pieces(clip.duration)
        for (piece, (start, seconds)), (change, amount) in itertools.product(
            enumerate(cut), changes
        ):
            name = f"{stem}_{piece:04d}" if len(cut) > 1 else stem
            name += f"_pitch{amount:+g}" if change == "pitch" else f"_{change}{amount:g}"
            order = hashed(seed, name)
            plans.append(CopyPlan(order, name, clip, source, start, seconds, change, amount))
    return sorted(plans)


def choose_plans(plans: Sequence[CopyPlan], made: dict[str, float], hours: float) -> list[CopyPlan]:
    """The first of the plans that make `hours` of copies, less those that are made.

    `made`: seconds by name. Counted in whole milliseconds, so that no rounding moves the border.
    """
    planned = {plan.name: round(1000 * plan.copy_seconds) for plan in plans}
    total = sum(planned.get(name, round(1000 * seconds)) for name, seconds in made.items())
    chosen = []
    for plan in plans:
        if total >= hours * 3.6e6:
            break
        if plan.name not in made:
            total += planned[plan.name]
            chosen.append(plan)
    return chosen


def split_into_parts(plans: Sequence[CopyPlan]) -> list[list[CopyPlan]]:
    """Parts of about PART_SECONDS; copies of one clip lie together, so that it is read once."""
    parts: list[list[CopyPlan]] = []
    seconds = PART_SECONDS
    for plan in sorted(plans, key=lambda plan: (plan.source, plan.start, plan.name)):
        if seconds >= PART_SECONDS:
            parts.append([])
            seconds = 0.0
        parts[-1].append(plan)
        seconds += plan.copy_seconds
    return parts


# ------------------------------------------------------------------------------- making copies


class PartResult(NamedTuple):
    """What came of a part: audio in seconds, files, and why something was left out."""

    seconds: float
    count: int
    dropped: list[str]


def make_copies(
    folder: Path, args: argparse.Namespace, noises: Sequence[Clip], plans: Sequence[CopyPlan]
) -> PartResult:
    """Make the copies of a part, then its record. Unreadable originals are left out and listed.

    Raises UserError where nothing can be written (a full disk): all records stay true.
    """
    copies: list[CopiedClip] = []
    dropped: list[str] = []
    for parent in {(folder / plan.name).parent for plan in plans}:
        parent.mkdir(parents=True, exist_ok=True)
    for _, group in itertools.groupby(plans, lambda plan: (plan.clip.path, plan.start)):
        group = list(group)
        try:
            audio, rate = _read_piece(group[0])
        except AudioError as error:
            dropped.append(str(error))
            continue
        for plan in group:
            try:
                changed, change, amount = _changed(plan, audio, rate, args, noises)
            except AudioError as error:
                dropped.append(f"{plan.clip.path}: {error}")
                continue
            path = folder / f"{plan.name}.{args.format}"
            write_audio(path, changed, rate)
            seconds = len(changed) / rate
            copies.append(_copied_clip(plan, path, seconds, rate, change, amount, args.seed))
    record = f"{hashed(*(plan.name for plan in plans)):016x}.jsonl"
    write_manifest(folder / RECORDS / record, copies)
    return PartResult(sum(copy.duration for copy in copies), len(copies), dropped)


def _read_piece(plan: CopyPlan) -> tuple[np.ndarray, int]:
    """The piece as mono `[T]` and its rate: the original's, at most 24 kHz (the codec's)."""
    rate = min(plan.clip.sample_rate, SAMPLE_RATE)
    seconds = None if plan.whole_clip else plan.seconds
    audio = read_audio(plan.clip.path, plan.start, seconds, rate)
    if not len(audio):
        raise AudioError(f"{plan.clip.path}: shorter than its manifest says; fetch it again")
    return audio, rate


def _changed(
    plan: CopyPlan, audio: np.ndarray, rate: int, args: argparse.Namespace, noises: Sequence[Clip]
) -> tuple[np.ndarray, str, float]:
    """(copy `[T]`, what was done, how much); AudioError where that copy alone is to be left out."""
    if plan.change == "speed":
        return unclipped(change_speed(audio, rate, plan.amount)), "speed", plan.amount
    if plan.change == "pitch":
        try:
            return unclipped(praat.shift_pitch(audio, rate, plan.amount)), "pitch", plan.amount
        except (praat.TooShort, UserError) as error:
            raise AudioError(f"its pitch cannot be moved ({error})") from error
    rng = np.random.default_rng([args.seed, hashed(plan.name)])
    snr_db = round(float(rng.uniform(*args.snr_db)), 3)
    if not noises:
        return unclipped(add_noise(audio, coloured_noise(len(audio), rng), snr_db)), "noise", snr_db
    clip = noises[int(rng.integers(len(noises)))]
    seconds = len(audio) / rate
    start = float(rng.uniform(0, max(clip.duration - seconds, 0)))
    noise = np.resize(read_audio(clip.path, start, seconds, rate), len(audio))
    return unclipped(add_noise(audio, noise, snr_db)), f"noise: {clip.path.name}", snr_db


def _copied_clip(
    plan: CopyPlan, path: Path, seconds: float, rate: int, change: str, amount: float, seed: int
) -> CopiedClip:
    """The copy's line. The text and the phones of a piece of a recording are not known."""
    clip, factor = plan.clip, 1 / amount if change == "speed" else 1.0
    text, phones = (clip.text, clip.phones) if plan.whole_clip else (None, None)
    if phones:
        phones = [[p, round(s * factor, 4), round(e * factor, 4)] for p, s, e in phones]
    own = {"path": path, "duration": seconds, "sample_rate": rate, "text": text, "phones": phones}
    return CopiedClip(
        **(vars(clip) | own | {"augmented": True, "split": "train"}),
        source=plan.source,
        start=round(plan.start, 3),
        change=change,
        amount=amount,
        seed=seed,
    )


def augment(args: argparse.Namespace) -> None:
    """Job 1: copies of the training clips below --input_dir, into --output_dir."""
    root = existing_folder(args.input_dir, "--input_dir")
    if args.semitones:
        praat.check_installed()
    with output_folder(args.output_dir, "--output_dir") as (folder, final):
        clips = load_clips([root], "train")
        real = [clip for clip in clips if not clip.augmented and final not in clip.path.parents]
        skipped = {clip.path for clip in real if _skipped(clip, root, args.skip)}
        sources = [clip for clip in real if clip.path not in skipped]
        made = made_rows(folder)
        hours_real, hours_made = hours_of(clip.duration for clip in real), row_hours(made)
        print_hours("before", real, root, args.goal_hours, hours_made)
        wanted = {"all": math.inf, "gap": max(args.goal_hours - hours_real, 0.0)}
        wanted_hours = wanted.get(args.hours, args.hours)
        if not sources and wanted_hours > hours_made:
            raise UserError(
                f"{root}: nothing to copy, every training clip is in a folder of --skip "
                f"{' '.join(args.skip)}; add recordings or give another --skip"
            )
        plans = []
        if wanted_hours > hours_made:
            changes = list_changes(args.speeds, args.semitones, args.noise_copies)
            plans = plan_copies(sources, root, changes, args.seed)
            names = {os.path.splitext(path)[0]: row["duration"] for path, row in made.items()}
            plans = choose_plans(plans, names, wanted_hours)
        if plans:
            if left_out := hours_real - hours_of(clip.duration for clip in sources):
                print(f"{left_out:,.1f} h are not copied: --skip {' '.join(args.skip)}")
            hours = hours_of(plan.copy_seconds for plan in plans)
            check_disk(final.parent, copy_bytes(plans, args.format), hours, args.format)
        else:
            print("nothing to make: the hours asked for are there (--hours all makes every copy)")
            if not made:
                return
        work = functools.partial(make_copies, folder, args, noise_clips(args.noise_dir))
        parts = split_into_parts(plans)
        rows = make_parts(work, parts, len(parts), args.num_workers, folder, final)
        print_hours("after", real, root, args.goal_hours, row_hours(rows))


def _skipped(clip: Clip, root: Path, globs: Sequence[str]) -> bool:
    corpus = source_name(clip, root).partition("/")[0]
    return any(fnmatch.fnmatchcase(corpus, glob) for glob in globs)


def noise_clips(folder: str | None) -> list[Clip]:
    """The recordings of --noise_dir."""
    if folder is None:
        return []
    clips, _ = scan_folder(existing_folder(folder, "--noise_dir"))
    if not clips:
        raise UserError(f"--noise_dir {folder}: no readable audio there")
    return sorted(clips, key=lambda clip: str(clip.path))


# ------------------------------------------------------------------- output folder, hours, disk


@contextlib.contextmanager
def output_folder(path: str | Path, flag: str) -> Iterator[tuple[Path, Path]]:
    """(where to work, the folder's name in the end), for this run alone.

    Until it has its manifest the folder is hidden: a trainer would take its files for recordings
    of their own, validation split included. It goes again where nothing came into it.
    """
    final = Path(path).resolve()
    writable_folder(final.parent, flag)
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    folder = final if final.exists() else final.with_name(file_name(f".{final.name}.part"))
    if folder == final and not (final / RECORDS).is_dir():
        raise UserError(f"{flag} {final}: not made by this script; give another folder")
    with only_one(writable_folder(folder, flag)):
        try:
            yield folder, final
        finally:
            if folder.is_dir() and not any(entry.name != ".lock" for entry in folder.iterdir()):
                shutil.rmtree(folder)


def made_rows(folder: Path) -> dict[str, dict]:
    """Manifest rows of what finished parts recorded and is still there, by path below `folder`;
    half-written files are removed.

    The disk is asked once a folder: on a network volume each question about a file takes time.
    """
    sizes: dict[str, int] = {}
    for parent, _, _ in os.walk(folder):
        with os.scandir(parent) as entries:
            for entry in entries:
                sizes[entry.path] = entry.stat(follow_symlinks=False).st_size
    for path in sizes:
        if path.endswith(".part") and os.path.isfile(path):
            os.unlink(path)
    rows = {}
    for record in sorted((folder / RECORDS).glob("*.jsonl")):
        for at, row in json_lines(record):
            check_fields(row, {"path": "path", "duration": "number"}, f"{record}, line {at}")
            path = os.path.normpath(os.path.join(RECORDS, row["path"]))
            # A pod that was lost may leave names without their data.
            if sizes.get(os.path.join(folder, path)):
                rows[path] = row | {"path": path}
    return dict(sorted(rows.items()))


def make_parts(
    work: Callable, parts: Sequence, total: int, num_workers: int, folder: Path, final: Path
) -> dict[str, dict]:
    """Make what is missing in `folder`, then its manifest; it gets its name `final`. The rows."""
    started = os.times()
    if parts:
        report(list(run_parts(work, parts, num_workers, total)), final.parent, started)
    rows = made_rows(folder)
    if not rows:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{final}: no clip could be made; see the files named above")
    write_text(folder / MANIFEST, "".join(map(as_json_line, rows.values())))
    if folder != final:
        folder.rename(final)
    return rows


def report(results: Sequence[PartResult], folder: Path, started: os.times_result) -> None:
    """What was made since `started`, and how fast: by the clock, and by CPU time of all processes,
    which is the rate of one core whatever else the machine does."""
    dropped = [reason for result in results for reason in result.dropped]
    if dropped:
        log = folder / "augment_dropped.txt"
        lines = "".join(f"{reason}\n" for reason in dropped)
        log.write_text(lines, encoding="utf-8", errors="backslashreplace")
        print(f"{len(dropped)} left out, see {log}; first: {dropped[0]}")
    audio, now = sum(result.seconds for result in results), os.times()
    seconds, cpu = now.elapsed - started.elapsed, sum(now[:4]) - sum(started[:4])
    print(
        f"{sum(result.count for result in results)} clips, {audio / 3600:,.2f} h in "
        f"{seconds:,.0f} s ({audio / max(seconds, 1e-3):,.0f}x real time, "
        f"{audio / max(cpu, 1e-3):,.0f}x a core)"
    )


def hours_of(seconds: Iterable[float]) -> float:
    return sum(seconds) / 3600


def row_hours(rows: dict[str, dict]) -> float:
    return hours_of(row["duration"] for row in rows.values())


def copy_bytes(plans: Sequence[CopyPlan], suffix: str) -> float:
    """About how many bytes the copies will take."""
    per_sample, per_file = FORMATS[suffix]
    samples = sum(plan.copy_seconds * min(plan.clip.sample_rate, SAMPLE_RATE) for plan in plans)
    return samples * per_sample + per_file * len(plans)


def check_disk(folder: Path, needed: float, hours: float, suffix: str) -> None:
    """Say what is about to be made and what it takes. UserError where the disk is too small."""
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


def print_hours(
    title: str, clips: Iterable[Clip], root: Path, goal: float, copy_hours: float = 0.0
) -> None:
    """The table of training hours, a row a corpus and one for all copies, against the goal."""
    hours: Counter[str] = Counter()
    for clip in clips:
        corpus, _, below = source_name(clip, root).partition("/")
        hours[COPIES if clip.augmented else corpus if below else "."] += clip.duration / 3600
    hours[COPIES] += copy_hours
    print(f"{'training split, ' + title:<40} {'hours':>10}")
    print("-" * 51)
    for name in sorted(hours, key=lambda name: (name == COPIES, name)):
        if hours[name]:
            print(f"{name[:40]:<40} {hours[name]:>10,.2f}")
    print("-" * 51)
    total = hours.total()
    share = f"{100 * total / goal:,.1f} % of {goal:,.0f} h" if goal > 0 else "no goal"
    print(f"{'total':<40} {total:>10,.2f}  {share}", flush=True)


# ------------------------------------------------------------------------- checks of synthesis


def length_fault(audio: np.ndarray, sample_rate: int, text: str) -> str | None:
    """`--check plausible`: why the length does not fit the sentence, in seconds a phone.

    Finds silence, sentences cut off and babble; another sentence of the right length passes.
    """
    count = len(phonemize(text, "telugu"))
    if not count:
        return "no phones in the text"
    seconds = len(_trimmed(audio, sample_rate)) / sample_rate / count
    low, high = PHONE_SECONDS
    return None if low <= seconds <= high else f"{seconds:.3f} s a phone"


def recogniser_fault(
    audio: np.ndarray, sample_rate: int, text: str, others: Sequence[str]
) -> str | None:
    """`--check hama`: whether a phone recogniser takes the clip for one of the `others` instead.

    Package hama knows English and Korean: compared in broad classes. Finds wrong, missing and
    unintelligible words; does not judge accent. Some 20 times real time a core.
    """
    audio = soxr.resample(audio, sample_rate, 16000)
    found = broad_classes(_recogniser().transcribe_waveform(audio, 16000).phonemes)

    def likeness(sentence: str) -> float:
        phones = broad_classes(phonemize(sentence, "telugu"))
        return SequenceMatcher(None, found, phones, autojunk=False).ratio()

    own = likeness(text)
    if any(likeness(other) > own for other in others):
        return f"its phones are not found again (likeness {own:.2f})"
    return None


@functools.lru_cache(maxsize=1)
def _recogniser():
    try:
        from hama import ASRModel
    except ImportError as error:
        raise UserError("--check hama needs the phone recogniser: pip install hama") from error
    return ASRModel()


def broad_classes(phones: Sequence[str]) -> str:
    """Phones as a string of PHONE_CLASSES, runs joined (geminates and long vowels)."""
    classes = "".join(CLASS_OF.get(phone, "") for phone in phones)
    return "".join(name for name, _ in itertools.groupby(classes))


# ------------------------------------------------------------------------------------ synthesis


@dataclass(frozen=True)
class SyntheticClip(Clip):
    """A manifest line with how it was made."""

    engine: str = ""
    model: str = ""
    rate: float = 1.0
    semitones: float = 0.0
    seed: int = 0


@functools.lru_cache(maxsize=1)
def _engine(name: str, model: str, device: str):
    return ENGINES[name].make("telugu", model, device)


@functools.lru_cache(maxsize=1)
def _texts(path: Path) -> list[str]:
    return text_lines(path)


def choose_texts(clips: Iterable[Clip], text_file: str | None) -> tuple[list[str], int]:
    """(sentences, how many were left out): in Telugu script alone, of 8 to 250 letters, each once.

    Digits and Latin letters are left out because no engine here is sure to read them as a
    Telugu speaker would.
    """
    if text_file is None:
        found = [clip.text for clip in clips if clip.text and clip.language == "telugu"]
    else:
        try:
            found = text_lines(text_file)
        except (OSError, UserError) as error:
            raise UserError(f"--text_file {text_file}: cannot be read ({error})") from error
    texts = {" ".join(text.split()) for text in found} - {""}
    fit = sorted(t for t in texts if 8 <= len(t) <= 250 and TELUGU_TEXT.fullmatch(t))
    return fit, len(texts) - len(fit)


def draw_sentences(
    texts: Sequence[str], voices: Sequence[str], rng: np.random.Generator
) -> list[Sentence]:
    """A batch: sentence, voice, rate and pitch of each drawn evenly."""
    return [
        Sentence(
            text=texts[int(rng.integers(len(texts)))],
            voice=voices[int(rng.integers(len(voices)))],
            rate=round(float(rng.uniform(*RATE_RANGE)), 3),
            semitones=round(float(rng.uniform(*SEMITONE_RANGE)), 2),
            seed=int(rng.integers(2**31)),
        )
        for _ in range(BATCH)
    ]


def make_speech(
    folder: Path, args: argparse.Namespace, part_seconds: float, index: int
) -> PartResult:
    """Make one folder of at least `part_seconds` of speech, then its record."""
    engine, texts = _engine(args.engine, args.model, args.device), _texts(folder / TEXTS)
    rng = np.random.default_rng([args.seed, index])
    within = folder / f"{index:05d}"
    shutil.rmtree(within, ignore_errors=True)
    within.mkdir()
    clips: list[SyntheticClip] = []
    dropped: list[str] = []
    seconds, in_a_row = 0.0, 0
    while seconds < part_seconds:
        sentences = draw_sentences(texts, engine.voices, rng)
        for sentence, raw in zip(sentences, engine.say(sentences), strict=True):
            others = [texts[int(i)] for i in rng.integers(len(texts), size=DECOYS)]
            audio, rate = _finished(raw)
            if reason := _fault(audio, rate, sentence.text, others, args.check):
                dropped.append(f"{sentence.voice}: {reason}: {sentence.text}")
                in_a_row += 1
                continue
            in_a_row = 0
            path = within / f"{index:05d}-{len(clips):03d}.{args.format}"
            write_audio(path, audio, rate)
            clips.append(_synthetic_clip(path, len(audio) / rate, rate, sentence, raw.phones, args))
            seconds += clips[-1].duration
        if in_a_row >= MAX_DROPS:
            raise UserError(
                f"{args.engine}: {in_a_row} sentences in a row dropped by --check {args.check}; "
                f"last: {dropped[-1]}"
            )
    write_manifest(folder / RECORDS / f"{index:05d}.jsonl", clips)
    return PartResult(seconds, len(clips), dropped)


def _finished(raw: RawSpeech | None) -> tuple[np.ndarray, int]:
    """(audio `[T]`, rate): at most 24 kHz, silent edges cut, pitch moved; `[0]` where it cannot."""
    if raw is None:
        return np.zeros(0, np.float32), SAMPLE_RATE
    audio, rate = raw.audio.reshape(-1), min(raw.sample_rate, SAMPLE_RATE)
    if rate != raw.sample_rate and len(audio):
        audio = soxr.resample(audio, raw.sample_rate, rate)
    if raw.phones is None:
        audio = _trimmed(audio, rate)
    if abs(raw.semitones) > 0.05 and len(audio):
        try:
            audio = praat.shift_pitch(audio, rate, raw.semitones)
        except (praat.TooShort, UserError):
            audio = audio[:0]
    return unclipped(audio), rate


def _trimmed(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Without the silence at both ends but 0.1 s; empty where nothing is loud or a number."""
    if not np.isfinite(audio).all():
        return audio[:0]
    threshold = max(0.02 * float(np.abs(audio).max(initial=0.0)), 1e-3)
    loud = np.flatnonzero(np.abs(audio) > threshold)
    if not len(loud):
        return audio[:0]
    margin = sample_rate // 10
    return audio[max(loud[0] - margin, 0) : loud[-1] + margin]


def _fault(
    audio: np.ndarray, sample_rate: int, text: str, others: Sequence[str], check: str
) -> str | None:
    """Why a clip is to be dropped, or None."""
    if len(audio) < sample_rate // 10:
        return "no audio"
    fault = None if check == "none" else length_fault(audio, sample_rate, text)
    if fault or check != "hama":
        return fault
    return recogniser_fault(audio, sample_rate, text, others)


def _synthetic_clip(
    path: Path, seconds: float, rate: int, sentence: Sentence, phones: list | None, args
) -> SyntheticClip:
    """The clip's line."""
    row, voice = ENGINES[args.engine], sentence.voice
    voice = voice if "/" in voice else f"{args.engine}/{voice}"
    return SyntheticClip(
        path, seconds, rate, "telugu", voice, sentence.text,
        license=row.license,
        commercial_ok=row.commercial_ok,
        phones=phones and [[p, round(s, 4), round(e, 4)] for p, s, e in phones],
        engine=args.engine,
        model=args.model,
        rate=sentence.rate,
        semitones=sentence.semitones,
        seed=sentence.seed,
    )  # fmt: skip


def synthesize(args: argparse.Namespace) -> None:
    """Job 2: --synthesize_hours of Telugu speech into --synthetic_dir."""
    root = existing_folder(args.input_dir, "--input_dir")
    row = ENGINES[args.engine]
    args.model = args.model or row.model_of("telugu")
    # Engines that are programs leave a GPU alone, and are spread over the processes.
    args.device = "cpu" if row.make is Packaged else str(setup_distributed(args.device).device)
    workers = args.num_workers if args.device == "cpu" else 0  # a GPU is fed by one process
    output = args.synthetic_dir or root / f"synthetic_{args.engine}"
    with output_folder(output, "--synthetic_dir") as (folder, final):
        clips = _clips_if_any(root) if args.text_file else load_clips([root], "train")
        texts, left_out = choose_texts(clips, args.text_file)
        if not texts:
            where = f"--text_file {args.text_file}" if args.text_file else f"manifests of {root}"
            raise UserError(f"{where}: no Telugu sentence there; give a --text_file, one a line")
        print_hours("before", clips, root, args.goal_hours)
        print(f"texts: {len(texts):,}; {left_out:,} left out (digits, Latin letters, length)")
        # What is missing is said before anything is made.
        praat.check_installed()
        voices = _engine(args.engine, args.model, args.device).voices
        if args.check == "hama":
            _recogniser()
        print(f"engine {args.engine}: {len(voices)} voices on {args.device}, {row.license}")
        size = min(SYNTHETIC_PART_SECONDS, args.synthesize_hours * 3600)
        count = math.ceil(args.synthesize_hours * 3600 / size - 1e-9)
        missing = missing_parts(folder, count)
        hours = len(missing) * size / 3600
        per_sample, per_file = FORMATS[args.format]
        needed = hours * 3600 * (SAMPLE_RATE * per_sample + per_file / 5)  # clips of 5 s
        check_disk(final.parent, needed, hours, args.format)
        write_text(folder / TEXTS, "\n".join(texts))
        work = functools.partial(make_speech, folder, args, size)
        make_parts(work, missing, count, workers, folder, final)
        print_hours("after", _clips_if_any(root), root, args.goal_hours)


def missing_parts(folder: Path, count: int) -> list[int]:
    """The parts, of `count`, without a record or without a file that it lists."""
    there = Counter(path.partition("/")[0] for path in made_rows(folder))
    records = (folder / RECORDS).glob("*.jsonl")
    complete = {file.stem for file in records if there[file.stem] == len([*json_lines(file)])}
    return [i for i in range(count) if f"{i:05d}" not in complete]


def _clips_if_any(root: Path) -> Sequence[Clip]:
    """The training clips; what is wrong with them is a note, as there need not be any yet."""
    try:
        return load_clips([root], "train")
    except UserError as error:
        print(f"note: {error}")
        return []


# ----------------------------------------------------------------------------------------- main


def print_engines() -> None:
    """The table of engines, 80 columns wide; a command goes on behind a backslash, to be pasted."""
    for name, row in ENGINES.items():
        use = "commercial use" if row.commercial_ok else "no commercial use"
        lines = textwrap.wrap(row.install, 67, break_long_words=False, break_on_hyphens=False)
        for begin, text in ((f"{name:<9} ", f"{row.license}, {use}"), (" " * 10, row.note)):
            print(textwrap.fill(text, 79, initial_indent=begin, subsequent_indent=" " * 10))
        print(textwrap.indent(" \\\n".join(lines), " " * 10))


def _hours_flag(value: str) -> str | float:
    return value if value in ("gap", "all") else number(above=0, high=1e6)(value)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
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
    add("--goal_hours", type=number(0), default=2000.0, help="of training speech, copies too")
    add("--speeds", type=number(0.5, 2), nargs="*", default=[0.9, 1.1], help="copies played so")
    add("--semitones", type=number(-12, 12), nargs="*", default=[-2.0, 2.0],
        help="copies with their pitch moved so")  # fmt: skip
    add("--noise_copies", type=whole(0, 100), default=1, help="noisy copies of each clip")
    add("--snr_db", type=number(-100, 100), nargs=2, default=[10.0, 30.0], metavar=("LOW", "HIGH"),
        help="of noisy copies")  # fmt: skip
    add("--noise_dir", help="recordings of noise, in place of drawn noise")
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
