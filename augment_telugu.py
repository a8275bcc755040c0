"""Phase 1: fill the Telugu gap: augmented copies of real speech, synthetic speech.

    python augment_telugu.py                         copies, up to 2,000 h
    python augment_telugu.py --hours all             every copy of every clip
    python augment_telugu.py --synthesize_hours 500  voices read the transcripts
    python augment_telugu.py --list_engines          what each engine needs

Copies (the plan's strategy 1): each training clip 0.9 and 1.1 times as fast (its pitch moves too),
2 semitones lower and higher (its length stays), and with noise. Copies and synthetic speech are not
copied again; originals are only read.

Synthetic speech (strategy 2): Telugu sentences, from the transcripts of the training clips or
--text_file, in an engine's own voices, at drawn rates and pitches. A clip of an implausible length
is dropped and counted. Both can be stopped at any moment: the same command goes on. The same seed,
corpora and flags make the same samples (but for piper's, whose noise has no seed).
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import command
import data
import praat
import speech
from audio import SAMPLE_RATE, AudioError, read_audio, write_audio
from command import ArgumentParser, UserError, json_lines, number, run, text_lines, whole
from data import Clip, add_noise, change_speed, coloured_noise, hashed, unclipped
from engines import InstalledEngine
from phones import phonemize
from takes import speak

PART_COPIES = 100  # what a kill may cost is a few seconds of work
PIECE_SECONDS = 300.0  # longer recordings are copied in pieces of this, to bound memory
SYNTHETIC_PART_SECONDS = 120.0
BATCH = 16  # sentences an engine is handed at once
MAX_DROPS = 200  # in a row: then the engine is at fault
RATE_RANGE, SEMITONE_RANGE = (0.87, 1.15), (-2.0, 2.0)
CHANGES = (("speed", 0.9), ("speed", 1.1), ("pitch", -2.0), ("pitch", 2.0), ("noise", 0.0))
SNR_DB = (10.0, 30.0)  # of the noise copy
SYNTHETIC = "synthetic"  # so folders of synthetic speech begin
TEXTS = ".texts"  # in the folder of synthetic speech: its sentences
RECORDS = ".parts"  # in an output folder: a manifest of what each finished part made
FORMATS = {"ogg": 0.0233, "flac": 0.076}  # GB an hour of 16 kHz speech
TELUGU_TEXT = re.compile(r"[\u0c00-\u0c65\s.,!?;:'\"()–—\u2018-\u201d।\u200c\u200d-]+")
# A phone of read Telugu lasts 0.06 to 0.1 s; outside of these, words are missing or it babbles.
PHONE_SECONDS = (0.03, 0.22)


@dataclass(frozen=True)
class CopiedClip(Clip):
    source: str = ""  # the original's path below the input folder
    start: float = 0.0  # in seconds, of a piece of a long recording
    change: str = ""
    amount: float = 0.0  # a factor, semitones, or dB of SNR
    seed: int = 0


class CopyPlan(NamedTuple):
    """A copy to make of `seconds` of `clip` from `start`, under `name` (no suffix)."""

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


def pieces(duration: float) -> list[tuple[float, float]]:
    """(start, seconds) of about equal pieces, cut at whole seconds: whole samples at any rate."""
    count = max(1, math.ceil(duration / PIECE_SECONDS))
    edges = [*(float(round(i * duration / count)) for i in range(count)), duration]
    return [(start, end - start) for start, end in itertools.pairwise(edges)]


def source_name(clip: Clip, root: Path) -> str:
    """The clip's path below the input folder; for one outside of it, a name with a hash."""
    if clip.path.is_relative_to(root):
        return clip.path.relative_to(root).as_posix()
    parent = f"{hashed(clip.path.parent):016x}"[:8]
    return f"elsewhere/{parent}/{clip.path.name}"


def plan_copies(clips: Sequence[Clip], root: Path, seed: int) -> list[CopyPlan]:
    """Every copy of every clip, by (seed, name): a prefix is a fair sample, more hours only add."""
    sources = [source_name(clip, root) for clip in clips]
    stems = Counter(os.path.splitext(source)[0] for source in sources)
    plans = []
    for clip, source in zip(clips, sources, strict=True):
        stem = os.path.splitext(source)[0]
        if stems[stem] > 1:  # two files that differ in their suffix alone must not become one
            stem = source.replace(".", "_")
        stem = "/".join(map(command.file_name, stem.split("/")))  # room for what is added
        cut = pieces(clip.duration)
        for (i, (start, seconds)), (change, amount) in itertools.product(enumerate(cut), CHANGES):
            name = f"{stem}_{i:04d}" if len(cut) > 1 else stem
            name += f"_pitch{amount:+g}" if change == "pitch" else f"_{change}{amount:g}"
            plans.append(CopyPlan(name, clip, source, start, seconds, change, amount))
    return sorted(plans, key=lambda plan: hashed(seed, plan.name))


def choose_plans(plans: Sequence[CopyPlan], made: dict[str, float], hours: float) -> list[CopyPlan]:
    """The first plans that make `hours` of copies, less those `made` (seconds by name); counted in
    milliseconds, so that no rounding moves the border."""
    planned = {plan.name: round(1000 * plan.copy_seconds) for plan in plans}
    total = sum(planned.get(name, round(1000 * seconds)) for name, seconds in made.items())
    new = [plan for plan in plans if plan.name not in made]
    before = itertools.accumulate((planned[plan.name] for plan in new), initial=total)
    return [plan for plan, done in zip(new, before, strict=False) if done < hours * 3.6e6]


def make_copies(folder: Path, args: argparse.Namespace,
                plans: Sequence[CopyPlan]) -> tuple[list[Clip], list[str]]:  # fmt: skip
    """Make the copies of a part, then its record: (copies, why others were left out)."""
    copies, dropped = [], {}  # in order; a file's fault is the same for all of its copies
    for plan in plans:
        path = folder / f"{plan.name}.{args.format}"
        try:
            audio, copy = _changed(plan, path, args.seed)
        except AudioError as error:
            dropped[str(error)] = None
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_audio(path, audio, copy.sample_rate)
        copies.append(copy)
    record = f"{hashed(*(plan.name for plan in plans)):016x}.jsonl"
    data.write_manifest(folder / RECORDS / record, copies)
    return copies, [*dropped]


@functools.lru_cache(maxsize=1)  # copies of one recording follow each other
def _read_piece(path: Path, start: float, seconds: float | None, rate: int) -> np.ndarray:
    audio = read_audio(path, start, seconds, rate)
    if not len(audio):
        raise AudioError(f"{path}: shorter than its manifest says; fetch it again")
    return audio


def _changed(plan: CopyPlan, path: Path, seed: int) -> tuple[np.ndarray, CopiedClip]:
    """(copy `[T]`, its line of the manifest); AudioError where it is to be left out."""
    is_piece, amount = plan.seconds < plan.clip.duration, plan.amount
    rate = min(plan.clip.sample_rate, SAMPLE_RATE)  # the codec has no more
    audio = _read_piece(plan.clip.path, plan.start, plan.seconds if is_piece else None, rate)
    if plan.change == "speed":
        audio = change_speed(audio, rate, amount)
    elif plan.change == "pitch":
        try:
            audio = praat.shift_pitch(audio, rate, amount)
        except (praat.TooShort, UserError) as error:
            raise AudioError(f"{plan.clip.path}: its pitch cannot be moved ({error})") from error
    else:
        rng = np.random.default_rng([seed, hashed(plan.name)])
        amount = round(float(rng.uniform(*SNR_DB)), 3)
        audio = add_noise(audio, coloured_noise(len(audio), rng), amount)
    fields = vars(plan.clip) | {"path": path, "duration": len(audio) / rate, "sample_rate": rate}
    fields |= {"augmented": True, "split": "train"}
    if is_piece:  # what is said in it is not known
        fields |= {"text": None, "phones": None}
    elif plan.change == "speed" and plan.clip.phones:
        factor = 1 / amount
        fields["phones"] = _rounded([(p, s * factor, e * factor) for p, s, e in plan.clip.phones])
    about = {"start": round(plan.start, 3), "change": plan.change, "amount": amount, "seed": seed}
    return unclipped(audio), CopiedClip(**fields, source=plan.source, **about)


def _rounded(phones: list | None) -> list | None:
    return phones and [[phone, round(start, 4), round(end, 4)] for phone, start, end in phones]


def augment(args: argparse.Namespace) -> None:
    """Job 1: copies of the training clips below --input_dir, into --output_dir."""
    root = command.existing_folder(args.input_dir, "--input_dir")
    praat.check_installed()
    with output_folder(args.output_dir, "--output_dir") as (folder, final):
        clips = data.load_clips([root], "train")
        real = [clip for clip in clips if not clip.augmented and final not in clip.path.parents]
        made = made_rows(folder)
        hours_real, hours_made = hours_of(map(vars, real)), hours_of(made)
        print_hours("before", hours_real, hours_made, args.goal_hours)
        gap = max(args.goal_hours - hours_real, 0.0)
        wanted = {"all": math.inf, "gap": gap}.get(args.hours, args.hours)
        plans = []
        if wanted > hours_made:
            sources = [c for c in real if not source_name(c, root).startswith(SYNTHETIC)]
            if not sources:
                raise UserError(f"{root}: nothing to copy but synthetic speech; add recordings")
            names = {os.path.splitext(row["path"])[0]: row["duration"] for row in made}
            plans = choose_plans(plan_copies(sources, root, args.seed), names, wanted)
        if plans:
            check_room(final.parent, args.format, sum(plan.copy_seconds for plan in plans) / 3600)
        else:
            print("nothing to make: the hours asked for are there (--hours all makes every copy)")
            if not made:
                return
        plans.sort(key=lambda plan: (plan.source, plan.start, plan.name))
        parts = [plans[i : i + PART_COPIES] for i in range(0, len(plans), PART_COPIES)]
        work = functools.partial(make_copies, folder, args)
        rows = make_parts(work, parts, len(parts), args.num_workers, folder, final)
        print_hours("after", hours_real, hours_of(rows), args.goal_hours)


@contextlib.contextmanager
def output_folder(path: str | Path, flag: str) -> Iterator[tuple[Path, Path]]:
    """(where to work, the folder's name in the end), for this run alone. Hidden until it has its
    manifest: a trainer would take its files for recordings. It goes again where it is empty."""
    final = Path(path).resolve()
    with contextlib.suppress(OSError):
        final.rmdir()  # an empty one
    folder = final if final.exists() else final.with_name(command.file_name(f".{final.name}.part"))
    if folder is final and not (final / RECORDS).is_dir():
        raise UserError(f"{flag} {final}: not made by this script; give another folder")
    with command.only_one(command.writable_folder(folder, flag)):
        try:
            yield folder, final
        finally:
            if folder.is_dir() and not any(entry.name != ".lock" for entry in folder.iterdir()):
                shutil.rmtree(folder)


def made_rows(folder: Path) -> list[dict]:
    """Manifest rows of what finished parts recorded and is still there; half-written files go. A
    question a folder, not a file: a network volume takes its time for each."""
    sizes: dict[str, int] = {}
    for parent, _, _ in os.walk(folder):
        with os.scandir(parent) as entries:
            for entry in entries:
                sizes[entry.path] = entry.stat(follow_symlinks=False).st_size
                if entry.name.endswith(".part") and entry.is_file():
                    os.unlink(entry)
    rows, fields = {}, {"path": "path", "duration": "number"}
    for record in sorted((folder / RECORDS).glob("*.jsonl")):
        for at, row in json_lines(record):
            command.check_fields(row, fields, f"{record}, line {at}")
            path = os.path.normpath(os.path.join(RECORDS, row["path"]))
            if sizes.get(os.path.join(folder, path)):  # a lost pod may leave names without data
                rows[path] = row | {"path": path}
    return [row for _, row in sorted(rows.items())]


def make_parts(work: Callable, parts: Sequence, total: int, num_workers: int, folder: Path,
               final: Path) -> list[dict]:  # fmt: skip
    """Make what is missing in `folder`, then its manifest; it gets its name `final`. The rows."""
    started = os.times()  # processor time of all processes in four parts, then the clock's
    results = list(command.run_parts(work, parts, num_workers, total))
    took = [max(now - then, 1e-3) for now, then in zip(os.times(), started, strict=True)]
    if dropped := [reason for _, reasons in results for reason in reasons]:
        log = final.parent / "augment_dropped.txt"
        log.write_bytes("".join(f"{one}\n" for one in dropped).encode(errors="backslashreplace"))
        print(f"{len(dropped)} left out, see {log}; first: {dropped[0]}")
    clips = [clip for made, _ in results for clip in made]
    seconds = sum(clip.duration for clip in clips)
    speed, a_core = (f"{seconds / spent:,.0f}x" for spent in (took[4], sum(took[:4])))
    print(f"{final}: {len(clips)} clips, {seconds / 3600:,.2f} h in {took[4]:,.0f} s "
          f"({speed} real time, {a_core} a core)")  # fmt: skip
    if not (rows := made_rows(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{final}: no clip could be made; see the files named above")
    command.write_text(folder / data.MANIFEST, "".join(map(command.as_json_line, rows)))
    if folder != final:
        folder.rename(final)
    return rows


def hours_of(rows: Iterable[dict]) -> float:
    return sum(row["duration"] for row in rows) / 3600


def check_room(folder: Path, suffix: str, hours: float) -> None:
    """Say what is about to be made; UserError where the disk is too small."""
    needed, free = hours * FORMATS[suffix], shutil.disk_usage(folder).free / 1e9
    said = f"{hours:,.2f} h of {suffix}, about {needed:,.2f} GB; {free:,.2f} GB are free"
    print(f"to make: {said}")
    if needed > free:
        raise UserError(f"{folder}: {said}; free some, or ask for fewer hours (--hours)")


def print_hours(when: str, real: float, copies: float, goal: float) -> None:
    share = f", {100 * (real + copies) / goal:,.1f} % of {goal:,.0f} h" if goal else ""
    print(f"training split {when}: {real:,.2f} h and {copies:,.2f} h of copies{share}", flush=True)


@dataclass(frozen=True)
class SyntheticClip(Clip):
    engine: str = ""
    rate: float = 1.0
    semitones: float = 0.0
    seed: int = 0


@functools.lru_cache(maxsize=1)
def own_voices(name: str) -> list[speech.Voice]:
    """An engine's own Telugu voices, without the toy's that are held out."""
    found = speech.find_engine(name).voices("telugu")
    installed = isinstance(speech.find_engine(name), InstalledEngine)
    names = dict.fromkeys(voice.name for voice in found if installed or voice.split == "train")
    return [speech.Voice(f"{name}/{own}", name, "telugu", own, own, role="agent") for own in names]


_texts = functools.lru_cache(maxsize=1)(text_lines)


def choose_texts(clips: Iterable[Clip], text_file: str | None) -> tuple[list[str], int]:
    """(sentences, how many were left out): in Telugu script alone, of 8 to 250 letters, each once.
    No engine here is sure to read digits and Latin letters as a Telugu speaker would."""
    said = (clip.text for clip in clips if clip.text and clip.language == "telugu")
    texts = {" ".join(text.split()) for text in (text_lines(text_file) if text_file else said)}
    fit = sorted(t for t in texts if 8 <= len(t) <= 250 and TELUGU_TEXT.fullmatch(t))
    return fit, len(texts - {""}) - len(fit)


def draw_request(texts: Sequence[str], voices: Sequence[speech.Voice],
                 rng: np.random.Generator) -> speech.Request:  # fmt: skip
    text, voice = texts[int(rng.integers(len(texts)))], voices[int(rng.integers(len(voices)))]
    rate = round(float(rng.uniform(*RATE_RANGE)), 3)
    semitones = round(float(rng.uniform(*SEMITONE_RANGE)), 2)
    voice = replace(voice, pitch=2 ** (semitones / 12))
    return speech.Request(text, "telugu", voice, rate, seed=int(rng.integers(2**31)))


def make_speech(folder: Path, args: argparse.Namespace, part_seconds: float,
                index: int) -> tuple[list[Clip], list[str]]:  # fmt: skip
    """Make a folder of at least `part_seconds` of speech, then its record: (clips, drops)."""
    voices, texts = own_voices(args.engine), _texts(folder / TEXTS)
    engine = speech.find_engine(args.engine)
    rng = np.random.default_rng([args.seed, index])
    within = folder / f"{index:05d}"
    shutil.rmtree(within, ignore_errors=True)
    within.mkdir()
    clips, dropped, seconds, in_a_row = [], [], 0.0, 0
    while seconds < part_seconds:
        requests = [draw_request(texts, voices, rng) for _ in range(BATCH)]
        for request, said in zip(requests, speak(requests), strict=True):
            failed = isinstance(said, UserError)
            fault = str(said) if failed else length_fault(said.audio, request.text)
            in_a_row = in_a_row + 1 if fault else 0
            if fault:
                dropped.append(f"{request.voice.id}: {fault}: {request.text}")
                continue
            path, voice = within / f"{index:05d}-{len(clips):03d}.{args.format}", request.voice
            write_audio(path, said.audio, SAMPLE_RATE)
            clips.append(SyntheticClip(
                path, len(said.audio) / SAMPLE_RATE, SAMPLE_RATE, "telugu", voice.id, request.text,
                license=engine.license, commercial_ok=engine.commercial_ok, engine=engine.name,
                phones=_rounded(said.phones), rate=request.speed, seed=request.seed,
                semitones=round(12 * math.log2(voice.pitch), 2)))  # fmt: skip
            seconds += clips[-1].duration
        if in_a_row >= MAX_DROPS:
            last = f"{in_a_row} sentences in a row dropped; last: {dropped[-1]}"
            raise UserError(f"{args.engine}: {last}")
    data.write_manifest(folder / RECORDS / f"{index:05d}.jsonl", clips)
    return clips, dropped


def length_fault(audio: np.ndarray, text: str) -> str | None:
    """Why a clip `[T]` at 24 kHz is to be dropped: silence, or too short or long for its text."""
    if not np.abs(audio).max(initial=0.0) > 1e-3:  # NaN too
        return "no audio"
    if not (count := len(phonemize(text, "telugu"))):
        return "no phones in the text"
    (low, high), seconds = PHONE_SECONDS, len(audio) / SAMPLE_RATE / count
    return None if low <= seconds <= high else f"{seconds:.3f} s a phone"


def speak_texts(args: argparse.Namespace) -> None:
    """Job 2: --synthesize_hours of Telugu speech into synthetic_ENGINE below --input_dir."""
    root = command.existing_folder(args.input_dir, "--input_dir")
    with output_folder(root / f"{SYNTHETIC}_{args.engine}", "--input_dir") as (folder, final):
        try:
            clips = data.load_clips([root], "train")
        except UserError as error:  # there need not be any yet
            print(f"note: {error}")
            clips = []
        texts, left_out = choose_texts(clips, args.text_file)
        if not texts:
            where = f"--text_file {args.text_file}" if args.text_file else f"manifests of {root}"
            raise UserError(f"{where}: no Telugu sentence there; give a --text_file, one a line")
        print(f"texts: {len(texts):,}; {left_out:,} left out (digits, Latin letters, length)")
        voices, engine = own_voices(args.engine), speech.find_engine(args.engine)
        print(f"engine {args.engine}: {len(voices)} voices, {engine.license}")
        trial = speech.Request(texts[0], "telugu", replace(voices[0], pitch=1.1))
        speech.synthesize([trial])  # what is missing is said before the work
        size = min(SYNTHETIC_PART_SECONDS, args.synthesize_hours * 3600)
        count = math.ceil(args.synthesize_hours * 3600 / size - 1e-9)
        missing = missing_parts(folder, count)
        check_room(final.parent, args.format, len(missing) * size / 3600)
        command.write_text(folder / TEXTS, "\n".join(texts))
        work = functools.partial(make_speech, folder, args, size)
        # A GPU is fed by one process.
        on_gpu = torch.cuda.is_available() and isinstance(engine, InstalledEngine)
        make_parts(work, missing, count, 0 if on_gpu else args.num_workers, folder, final)


def missing_parts(folder: Path, count: int) -> list[int]:
    """The parts, of `count`, without a record or without a file that it lists."""
    there = Counter(row["path"].partition("/")[0] for row in made_rows(folder))
    records = (folder / RECORDS).glob("*.jsonl")
    complete = {file.stem for file in records if there[file.stem] == len([*json_lines(file)])}
    return [i for i in range(count) if f"{i:05d}" not in complete]


def print_engines() -> None:
    """80 columns wide; a command goes on behind a backslash, to be pasted."""
    for name, row in speech.all_engines().items():
        use = "commercial use" if row.commercial_ok else "no commercial use"
        lines = textwrap.wrap(row.install, 67, break_long_words=False, break_on_hyphens=False)
        for begin, text in ((f"{name:<9} ", f"{row.license}, {use}"), (" " * 10, row.note)):
            print(textwrap.fill(text, 79, initial_indent=begin, subsequent_indent=" " * 10))
        print(textwrap.indent(" \\\n".join(lines), " " * 10))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def hours(value: str) -> str | float:
        return value if value in ("gap", "all") else number(above=0, high=1e6)(value)

    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--input_dir", default="data/telugu", help="corpora to copy, sub-folders included")
    add("--output_dir", default="data/telugu/augmented", help="of the copies")
    add("--hours", type=hours, default="gap", metavar="H",
        help="of copies: a number, all, or gap: what --goal_hours lacks")  # fmt: skip
    add("--synthesize_hours", type=number(above=0, high=1e6), help="of synthetic speech instead")
    add("--engine", choices=speech.all_engines(), default="indictts", help="see --list_engines")
    add("--text_file", help="sentences to say, one a line, in place of the transcripts")
    add("--list_engines", action="store_true", help="show the table of engines and stop")
    add = parser.add_argument_group("advanced").add_argument
    add("--goal_hours", type=number(0), default=2000.0, help="of training speech, copies too")
    add("--format", choices=FORMATS, default="ogg", help="of the files made")
    add("--seed", type=whole(0), default=0, help="of everything that is drawn")
    add("--num_workers", type=whole(0, 256), default=command.default_workers(), help="0: none")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.list_engines:
        print_engines()
    elif args.synthesize_hours is not None:
        speak_texts(args)
    else:
        augment(args)


if __name__ == "__main__":
    run(main)
