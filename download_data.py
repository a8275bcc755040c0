"""Phase 1: fetch speech corpora into data/<language>/<corpus>/ and verify them.

    python download_data.py --list      what there is: hours, disk, licences
    python download_data.py             the default set: 2,000 real h a language
    python download_data.py --verify    what is on disk; exit 1 on a gap

Every corpus ends in a folder of audio with a `manifest.jsonl`. A folder is
renamed into place only when it is complete; the same command goes on where a
killed one stopped, by byte in an archive, by row in a shard. Emotional speech
goes to data/emotion/, two-channel conversations to data/conversations/. What
is read from each kind of corpus is in corpora.py, how bytes arrive and are
unpacked in fetching.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import tarfile
import textwrap
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import data
import fetching
from audio import AudioError, probe
from command import (
    ArgumentParser,
    UserError,
    existing_folder,
    first_line,
    number,
    only_one,
    run,
    whole,
    why,
    writable_file,
    writable_folder,
    write_text,
)
from corpora import (
    Absent,
    Archive,
    Archives,
    Corpus,
    DataCollective,
    FetchOptions,
    Files,
    Fisher,
    Hub,
    HubTars,
    OnHub,
    fetch,
    needs_fetching,
    read_record,
    shards_of,
)
from fetching import FILE_THREADS, GIGABYTE

GOAL_HOURS = 2000  # the plan's, a language
PLAN_DISK_GB = 500  # the plan's network volume
ERRORS = "download_errors.log"  # in --data_dir: the tracebacks of what was not foreseen
HOURS_TOLERANCE = 0.02  # share of the expected hours that may be absent
DIGEST_BYTES = 1 << 16  # read at each end of a file to tell copies
GROUPS = ("default", "emotion", "conversations")
# What a stored hour of mono speech takes, in MB. FLAC as measured over LibriSpeech (59.3 GB).
MEGABYTES_AN_HOUR = {
    "WAV 24 kHz": 172.8, "WAV 16 kHz": 115.2, "FLAC 16 kHz": 62.0, "MP3 64 kbit/s": 28.8,
    "Opus 24 kbit/s": 10.8, "codes 4 kbit/s": 1.8,
}  # fmt: skip
CPU_POD_USD = 0.12  # an hour; RunPod's smallest CPU pods, 2025
H200_USD = 3.39


# ----------------------------------------------------------------------------------- the table

_OPENSLR = ("https://www.openslr.org", "https://us.openslr.org", "https://openslr.trmal.net")
# For rows whose licence differs from place to place.
_DISPUTED = {
    "commercial_ok": False,
    "license": "CC-BY-4.0 (?)",
    "note": "its licence differs from place to place, so it counts as not for commercial use: name "
    "it in --corpora, with --allow_noncommercial, after reading them",
}


def _openslr(number: int) -> tuple[str, ...]:
    return tuple(f"{base}/resources/{number}" for base in _OPENSLR)


def _ai4bharat(repo: str, language: str, hours: float, gigabytes: float, **more: object) -> Hub:
    """A row for one language of a corpus of AI4Bharat: gated, a folder a language."""
    common = {"kilohertz": "16", "license": "CC-BY-4.0", "default": True, "folders": (language,)}
    return Hub(
        f"{repo.lower()}-{language}", language, hours, gigabytes, gated=True,
        repo=f"ai4bharat/{repo}", **{**common, **more},
    )  # fmt: skip


# The speaker's number in the path, where the column should be gone.
_KATHBATH = {"license": "CC0-1.0", "recording": r"-(\d+)-[mf]\."}
_INDICVOICES = {
    "note": "still growing, far past its first 225 h: ~ is what a model's card says it used of "
    "it; counted from its shards as they land",
}
# Split by bulletin: who reads it is not said.
_SHRUTILIPI = {"speakers": (), "recording": r"([^/]*?)[_-]+sent"}
_RASA = {
    "download_gb": 14.0, "kilohertz": "48", "default": False, "group": "emotion", "audio": "audio",
    "style": "style", "speakers": ("speaker_id", "gender"), "split": "train",
    "note": "emotional speech for phase 4: --corpora emotion",
}  # fmt: skip


def _common_voice(language: str, hours: float, gigabytes: float) -> DataCollective:
    return DataCollective(
        f"common-voice-{language}", language, hours, gigabytes, "48", "CC0-1.0", exact=False,
        transient_gb=gigabytes, plan=f"Common Voice ({language})",
        note=f"left Hugging Face in October 2025: needs a Mozilla Data Collective account, "
        f"MDC_API_KEY and --cv_dataset_id {language}=ID; about {hours:,.0f} h",
    )


# Name, language, hours, GB, kHz and licence, then the rest by name.
CORPORA: tuple[Corpus, ...] = (
    Archives(
        "librispeech", "english", 960.9, 60, "16", "CC-BY-4.0", transient_gb=30.6, default=True,
        plan="LibriSpeech", layout="librispeech", bases=_openslr(12),
        archives=(
            Archive("train-clean-100.tar.gz", 100.6, 6.4, "md5:2a93770f6d5c6c964bc36631d331a522"),
            Archive("train-clean-360.tar.gz", 363.6, 23.0, "md5:c0e676e450a7ff2f54aeade5171606fa"),
            Archive("train-other-500.tar.gz", 496.7, 30.6, "md5:d1a0fd59409feb2c614ce4d30c387708"),
        ),
    ),
    # Chapters without transcripts: training reads windows of them.
    Archives(
        "librilight-small", "english", 577.2, 35, "16", "public domain", transient_gb=35,
        default=True, plan="LibriLight (small)", layout="librilight",
        note="from its authors' archive: facebook/libri-light is no Hugging Face id",
        bases=("https://dl.fbaipublicfiles.com/librilight/data",),
        archives=(Archive("small.tar", 577.2, 35.0, "md5:c49207eb86a8e8ac895561c37232041e"),),
    ),
    Archives(
        "libritts-r", "english", 555.2, 55, "24", "CC-BY-4.0", download_gb=84, transient_gb=88,
        default=True, plan="Common Voice (english)", layout="libritts", bases=_openslr(141),
        note="in place of the plan's 500 h of Common Voice: 24 kHz, no account needed. These are "
        "recordings of LibriSpeech, restored: more bandwidth, no new voices or words",
        archives=(
            Archive("train_clean_100.tar.gz", 53.8, 8.1, "md5:6df668d8f5f33e70876bfa33862ad02b"),
            Archive("train_clean_360.tar.gz", 191.3, 29.0, "md5:382eb3e64394b3da6a559f864339b22c"),
            Archive("train_other_500.tar.gz", 310.1, 47.0, "md5:a37a8e9f4fe79d20601639bf23d1add8"),
        ),
    ),
    _common_voice("english", 2700, 90.0),
    _ai4bharat(
        "Shrutilipi", "hindi", 1620, 100.0, plan="Gramvaani", **_SHRUTILIPI,
        note="news bulletins, in place of Gramvaani's 1,111 h of 8 kHz telephone speech",
    ),
    _ai4bharat("Kathbath", "hindi", 150, 9.5, plan="Kathbath Hindi", **_KATHBATH),
    _ai4bharat("IndicVoices", "hindi", 535, 33.0, plan="IndicVoices Hindi", **_INDICVOICES),
    Archives(
        "openslr-103", "hindi", 100.6, 4.0, "8", download_gb=4.7, transient_gb=6.5, exact=False,
        plan="OpenSLR 103", **_DISPUTED, layout="transcription", bases=_openslr(103),
        archives=(
            Archive("Hindi_train.tar.gz", 95.05, 4.4), Archive("Hindi_test.tar.gz", 5.55, 0.3),
        ),
    ),
    Archives(
        "gramvaani", "hindi", 1108, 32, "8", "academic", transient_gb=8, commercial_ok=False,
        exact=False, plan="Gramvaani", layout="kaldi", bases=_openslr(118),
        note="licensed for academic use only, and mostly 8 kHz MP3: "
        "--corpora gramvaani --allow_noncommercial. The plan's GV_* addresses are gone",
        archives=(
            Archive("GV_Train_100h.tar.gz", 100, 3.0),
            Archive("GV_Dev_5h.tar.gz", 5, 0.15),
            Archive("GV_Eval_3h.tar.gz", 3, 0.1),
            *(Archive(f"Gramvaani_1000hrData_Part{n}.tar.gz", 200, 6.0) for n in range(1, 6)),
        ),
    ),
    _common_voice("hindi", 27, 0.6),
    # Image descriptions by tens of thousands of people, one in twenty transcribed. Where a row
    # names no speaker, the split hangs on the district and postal code.
    Hub(
        "vaani-telugu", "telugu", 1486, 97, "16", "CC-BY-4.0", download_gb=208, default=True,
        gated=True, plan="SPRING-INX Telugu",
        note="in place of SPRING-INX; closes the plan's gap of 1,200 h with real speech, mostly "
        "untranscribed; districts are added: all that the dataset has now are taken",
        repo="ARTPARK-IISc/Vaani", folders=("audio/AndhraPradesh", "audio/Telangana"),
        audio="audio", text="transcript", speakers=("speakerID", "speaker_id"),
        keys=("district", "pincode"), keep=("language", "Telugu"), tagged=True,
    ),
    _ai4bharat(
        "Shrutilipi", "telugu", 390, 24.0, plan="SPRING-INX Telugu", **_SHRUTILIPI,
        note="news bulletins, in place of SPRING-INX",
    ),
    _ai4bharat("Kathbath", "telugu", 155, 10.0, plan="Kathbath Telugu", **_KATHBATH),
    _ai4bharat("IndicVoices", "telugu", 296, 33.0, plan="IndicVoices Telugu", **_INDICVOICES),
    # Both archives hold a line_index.tsv: they are unpacked apart.
    Archives(
        "openslr-66", "telugu", 10.0, 1.0, "48", "CC-BY-SA-4.0", download_gb=1.1, transient_gb=1.0,
        default=True, exact=False, plan="OpenSLR 66", layout="line_index", bases=_openslr(66),
        archives=(Archive("te_in_female.zip", 5.0, 0.53), Archive("te_in_male.zip", 5.0, 0.55)),
    ),
    Hub(
        "indictts-telugu", "telugu", 9.0, 1.8, "48", download_gb=3.0, split="train",
        plan="IndicTTS Telugu", **_DISPUTED, repo="SPRINGLab/IndicTTS_Telugu", folders=("data",),
        audio="audio", speakers=("speaker_id", "gender"),
    ),
    # Its loading script no longer runs: the Hub's own parquet conversion. Several people read
    # each sentence and are not named: its own splits, which share no sentence.
    Hub(
        "fleurs-telugu", "telugu", 8.0, 1.0, "16", "CC-BY-4.0", download_gb=1.6, default=True,
        repo="google/fleurs", folders=("te_in",), revision="refs/convert/parquet", audio="audio",
        text="transcription", speakers=(), official_splits=True,
    ),
    _common_voice("telugu", 3, 0.1),
    Absent(
        "spring-inx", "telugu", 0, 0, "16", "CC-BY-4.0", plan="SPRING-INX Telugu",
        note="has no Telugu release; vaani-telugu and shrutilipi-telugu stand in",
    ),
    Files(
        "crema-d", "english", 5.26, 0.4, "16", "ODbL-1.0", download_gb=0.6, group="emotion",
        note="emotional speech for phase 4: --corpora emotion", layout="crema_d",
        bases=("https://github.com/CheyneyComputerScience/CREMA-D/raw/master",),
        listing="SentenceFilenames.csv", column="Filename", pattern="AudioWAV/{}.wav",
    ),
    Archives(
        "ravdess", "english", 1.48, 0.3, "48", "CC-BY-NC-SA-4.0", download_gb=0.2,
        transient_gb=0.6, commercial_ok=False, group="emotion", layout="ravdess",
        note="emotional speech for phase 4: --corpora emotion --allow_noncommercial",
        bases=("https://zenodo.org/records/1188976/files",),
        archives=(Archive("Audio_Speech_Actors_01-24.zip", 1.48, 0.2,
                          "md5:bc696df654c87fed845eb13823edef8a"),),
    ),
    _ai4bharat("Rasa", "hindi", 40, 8.0, folders=("Hindi",), **_RASA),
    _ai4bharat("Rasa", "telugu", 40, 8.0, folders=("Telugu",), **_RASA),
    HubTars(
        "behavior-sd", "english", 2164, 188, "22", "CC-BY-4.0", transient_gb=1.5, exact=True,
        group="conversations", repo="yhytoto12/behavior-sd",
        folders=("train", "validation", "test"),
        note="two-channel dialogues for phase 3, made by TTS: --corpora behavior-sd "
        "[--max_hours 100]",
    ),
    Fisher(
        "fisher", "english", 984, 40, "8", "LDC", exact=False, commercial_ok=False,
        group="conversations", plan="Fisher",
        note="sold by the LDC (LDC2004S13 + LDC2004T19): give your copy with --fisher_dir",
    ),
)  # fmt: skip


# ----------------------------------------------------------------------------------------- list


def print_list(corpora: Iterable[Corpus]) -> None:
    """The table, 80 columns wide, with totals."""
    corpora = list(corpora)
    form = "{:<27}{:<8} {:>6} {:>5} {:>3}  {:<16} {}"
    print(form.format("corpus", "language", "hours", "GB", "kHz", "licence", "marks"))
    sections: dict[str, list[Corpus]] = defaultdict(list)
    for row in corpora:
        sections[row.group or row.language].append(row)
    for section, rows in sections.items():
        print(f"-- {section} ".ljust(79, "-"))
        for row in rows:
            hours = f"{'' if row.exact else '~'}{_figure(row.hours)}"
            fields = (row.name, row.language, hours, _figure(row.gigabytes), row.kilohertz)
            print(form.format(*fields, row.license, row.marks).rstrip())
    print("-" * 79)
    print("marks: d default set, g gated (accept its licence on Hugging Face), n not for")
    print("commercial use; hours with ~ are estimates. GB: on disk, WAV packed as FLAC.")
    chosen = [row for row in corpora if row.default]
    for language in (*data.LANGUAGES, "together"):
        rows = [row for row in chosen if language in (row.language, "together")]
        if rows:
            hours, size = sum(row.hours for row in rows), sum(row.gigabytes for row in rows)
            goal = "" if language == "together" else f" of {GOAL_HOURS:,}"
            print(f"default set, {language:<10} {hours:>7,.0f} h{goal:<9} {size:>7,.0f} GB")
    licences: Counter[str] = Counter()
    for row in corpora:
        licences[row.license + ("" if row.commercial_ok else " (not commercial)")] += row.hours
    parts = [f"{name} {hours:,.0f} h" for name, hours in licences.most_common() if hours >= 0.5]
    print(_wrapped("by licence, all rows: " + ", ".join(parts)))
    print_reasons(corpora)


def _figure(number: float) -> str:
    """Hours or gigabytes with about three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.{1 if number >= 20 else 2}f}"


def print_reasons(corpora: Iterable[Corpus]) -> None:
    """For each of the plan's corpora that is left out, replaced or moved, why."""
    print("\nwhat became of the plan's corpora:")
    for row in corpora:
        if row.note:
            left_out = row.plan and not row.default
            name = f"{row.plan}, not in the default set" if left_out else row.name
            print(_wrapped(f"- {name}: {row.note}"))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 79, subsequent_indent="  ", break_on_hyphens=False)


def peak_gigabytes(corpora: list[Corpus], jobs: int) -> float:
    """The most that lies on disk at any time, archives included, where `jobs` run side by side."""
    landed, peak = 0.0, 0.0
    for at, corpus in enumerate(corpora):
        window = corpora[at : at + jobs]
        peak = max(peak, landed + sum(row.gigabytes + row.transient_gb for row in window))
        landed += corpus.gigabytes
    return peak


def print_costs(corpora: list[Corpus], free_gb: float, jobs: int) -> None:
    """Disk, time and money of a fetch, before anything moves."""
    hours, final = sum(r.hours for r in corpora), sum(r.gigabytes for r in corpora)
    network = sum(row.download_gb or row.gigabytes for row in corpora)
    print(
        f"to fetch: {len(corpora)} corpora, {_figure(hours)} h; network: {network:,.1f} GB\n"
        f"disk: {final:,.1f} GB in the end, {peak_gigabytes(corpora, jobs):,.1f} at the most, "
        f"archives included; {free_gb:,.0f} free\n(the plan's volume: {PLAN_DISK_GB} GB)"
    )
    formats = [f"{name} {6000 * mb / 1e3:,.0f}" for name, mb in MEGABYTES_AN_HOUR.items()]
    print(_wrapped(f"6,000 h take, in GB: {', '.join(formats)}"))
    for rate in (25, 100):
        took = network * 1e3 / rate / 3600
        print(
            f"at {rate} MB/s: {took:,.1f} h, about ${took * CPU_POD_USD:,.2f} on a CPU pod, "
            f"${took * H200_USD:,.2f} on an idle H200"
        )


# --------------------------------------------------------------------------------------- verify

VERIFY_FORM = "{:<26} {:>7} {:>7} {:>7} {:>6} {:>3} {:>4}  {}"


@dataclass(frozen=True)
class Verified:
    """What `--verify` found of one corpus. `rates`: Hz -> hours; `expected` in hours.

    `fault` is what is wrong with all of it; `small`: less than nine tenths of the table's hours,
    where --max_hours did not ask for less.
    """

    corpus: Corpus
    expected: float
    files: int = 0
    hours: float = 0.0
    speakers: frozenset[str] = frozenset()
    rates: tuple[tuple[int, float], ...] = ()
    unreadable: tuple[str, ...] = ()
    duplicates: int = 0
    small: bool = False
    fault: str = ""

    @property
    def problem(self) -> str:
        """What is missing, in words, or an empty string."""
        if self.fault or self.unreadable:
            return self.fault or f"{len(self.unreadable)} unreadable"
        # The table's figures are rounded to two places.
        missing = self.hours < self.expected * (1 - HOURS_TOLERANCE) - 0.005
        return "hours missing" if missing else ""

    @property
    def state(self) -> str:
        """The problem, or "ok"; complete shards may still hold less than the table estimates."""
        return self.problem or ("ok, small" if self.small else "ok")

    def as_json(self) -> dict:
        """For `--json`."""
        return {
            "corpus": self.corpus.name,
            "language": self.corpus.language,
            "license": self.corpus.license,
            "commercial_ok": self.corpus.commercial_ok,
            "files": self.files,
            "hours": round(self.hours, 4),
            "expected_hours": round(self.expected, 4),
            "speakers": len(self.speakers),
            "hours_by_sample_rate": {str(rate): round(hours, 4) for rate, hours in self.rates},
            "unreadable": list(self.unreadable),
            "duplicates": self.duplicates,
            "state": self.state,
        }


def verify(corpus: Corpus, data_dir: Path, every_file: bool = True) -> Verified:
    """Hold a corpus against its manifest and the table; with `every_file`, probe and compare all.

    Expected are the table's hours where they are exact, else those that were fetched. Copies are
    found by size and both ends of a file: as good as a hash of all of it for coded speech, and it
    spares reading half a terabyte.
    """
    folder = corpus.folder(data_dir)
    record = read_record(folder)
    exact = "hours" not in record or (corpus.exact and record["whole"])
    expected = corpus.hours if exact else record["hours"]
    if not (folder / data.MANIFEST).exists():
        return Verified(corpus, expected, fault="not there")
    try:
        clips = data.read_manifest(folder / data.MANIFEST)
    except UserError as error:  # this corpus' fault alone
        reason = first_line(error, 400)
        return Verified(corpus, expected, unreadable=(reason,), fault="cannot be read")
    bad, duplicates = [], 0
    if every_file:
        hidden = not sys.stderr.isatty()
        with ThreadPoolExecutor(FILE_THREADS) as pool:
            checks = pool.map(_check_file, clips)
            shown = tqdm(checks, corpus.name, len(clips), leave=False, unit="file", disable=hidden)
            checked = list(shown)
        bad = [found for found in checked if isinstance(found, str)]
        readable = [found for found in checked if not isinstance(found, str)]
        clips = [clip for clip, _ in readable]
        duplicates = len(clips) - len({digest for _, digest in readable})
    rates: Counter[int] = Counter()
    for clip in clips:
        rates[clip.sample_rate] += clip.duration / 3600
    hours = sum(rates.values())
    return Verified(
        corpus=corpus,
        expected=expected,
        files=len(clips) + len(bad),
        hours=hours,
        speakers=frozenset(clip.speaker for clip in clips if clip.speaker),
        rates=tuple(sorted(rates.items())),
        unreadable=tuple(bad),
        duplicates=duplicates,
        small=bool(record.get("whole")) and hours < 0.9 * corpus.hours,
    )


def _check_file(clip: data.Clip) -> tuple[data.Clip, bytes] | str:
    """(the clip as its file is, a digest of the file); its path where it cannot be read."""
    try:
        with open(clip.path, "rb") as file:  # once: on a network volume that is what takes time
            size = os.fstat(file.fileno()).st_size
            ends = file.read(DIGEST_BYTES)
            file.seek(max(size - DIGEST_BYTES, 0))
            ends += file.read(DIGEST_BYTES)
            file.seek(0)
            duration, sample_rate = probe(clip.path, file)
    except (AudioError, OSError):
        return str(clip.path)
    digest = hashlib.sha256(size.to_bytes(8, "big") + ends).digest()
    return replace(clip, duration=duration, sample_rate=sample_rate), digest


def print_verified(found: list[Verified], data_dir: Path) -> bool:
    """The table of what is on disk; True where nothing is missing."""
    print(VERIFY_FORM.format("corpus", "files", "hours", "of", "spk", "bad", "dup", "state"))
    print("-" * 79)
    for row in found:
        _print_counts(row.corpus.name, [row], row.state)
    print("-" * 79)
    for language in data.LANGUAGES:
        rows = [row for row in found if row.corpus.language == language]
        # Emotion and conversations are other stages' data: they count for no language's goal.
        speech = sum(row.hours for row in rows if row.corpus.place == language)
        if rows:
            _print_counts(language, rows, f"{speech / GOAL_HOURS:.0%} of goal")
    by_rate: Counter[tuple[str, int]] = Counter()
    for row in found:
        by_rate += {(row.corpus.language, rate): hours for rate, hours in row.rates}
    most = max(by_rate.values(), default=0)
    for (language, rate), hours in sorted(by_rate.items()):
        bar = "#" * max(1, round(36 * hours / most))
        print(f"{language:<10} {rate:>6} Hz {_figure(hours):>9} h  {bar}")
    for what in [what for row in found for what in row.unreadable][:20]:
        print(f"unreadable: {what}")
    missing = [row.corpus.name for row in found if row.problem]
    if missing:
        print(_wrapped(f"missing in {data_dir}: {', '.join(missing)}"))
        print("To fetch it: delete a damaged corpus's folder, then run this without --verify.")
    return not missing


def _print_counts(name: str, rows: list[Verified], state: str) -> None:
    """A line of the table: one corpus, or all of a language."""
    files, hours, expected, duplicates = (
        sum(getattr(row, field) for row in rows)
        for field in ("files", "hours", "expected", "duplicates")
    )
    speakers = len(frozenset().union(*(row.speakers for row in rows))) or "?"
    bad = sum(len(row.unreadable) for row in rows)
    figures = (files, _figure(hours), _figure(expected), speakers, bad, duplicates)
    print(VERIFY_FORM.format(name, *figures, state))


def report(corpora: list[Corpus], arguments: argparse.Namespace) -> int:
    """Print what is on disk, and write it as JSON where asked; 1 where something is missing."""
    found = [verify(corpus, arguments.data_dir, arguments.verify) for corpus in corpora]
    complete = print_verified(found, arguments.data_dir)
    if not arguments.verify:
        print("Counted from the manifests; --verify reads every file.")
    if arguments.json:
        rows = [row.as_json() for row in found]
        write_text(arguments.json, json.dumps(rows, indent=2) + "\n")
    return 0 if complete else 1


# ------------------------------------------------------------------------- before anything moves


def choose(
    names: list[str] | None, languages: list[str] | None, options: FetchOptions | None = None
) -> list[Corpus]:
    """The rows asked for: those of --fisher_dir and --cv_dataset_id, and of --corpora; without any
    of these the default set. Raises UserError on an unknown name."""
    options = options or FetchOptions()
    unknown = set(names or []) - {row.name for row in CORPORA} - set(GROUPS)
    if unknown:
        raise UserError(
            f"no corpus '{min(unknown)}'; --list shows them; groups: {', '.join(GROUPS)}; Debian's "
            "packages: tools/package_recordings.py"
        )
    own = {f"common-voice-{language}" for language in options.cv_dataset_ids}
    own |= {"fisher"} if options.fisher_dir else set()
    wanted = own | set(names or ()) or {"default"}
    chosen = [
        row for row in CORPORA
        if row.language in (languages or data.LANGUAGES)
        and (row.name in wanted or row.group in wanted or (row.default and "default" in wanted))
    ]  # fmt: skip
    if not chosen:
        raise UserError("no corpus of that language in the table; see --list")
    return chosen


def without_forbidden(
    corpora: list[Corpus], allow_noncommercial: bool, fisher_dir: Path | None
) -> list[Corpus]:
    """The rows that may and can be fetched, a line for each other; UserError if none is left."""
    left = []
    for row in corpora:
        reason = ""
        if isinstance(row, Absent) or (isinstance(row, Fisher) and not fisher_dir):
            reason = row.note
        elif not (row.commercial_ok or allow_noncommercial or isinstance(row, Fisher)):
            reason = f"{row.license} does not surely allow commercial use: add "
            reason += "--allow_noncommercial to take it"
        if reason:
            print(_wrapped(f"skipped: {row.name}: {reason}"))
        else:
            left.append(row)
    if not left:
        raise UserError("nothing left to fetch; see the lines above, and --list")
    return left


def check_access(corpora: list[Corpus], mirrors: dict[str, str]) -> None:
    """Ask the Hub for every gated dataset before the night begins. UserError names all at once."""
    gated = {
        (row.repo, mirrors.get(row.name)) for row in corpora
        if row.gated and not fetching.is_local(mirrors.get(row.name))
    }  # fmt: skip
    to_accept = sorted({fetching.licence_page(*place) for place in gated} - {""})
    if to_accept:
        raise UserError(
            f"accept the licence at {' and at '.join(to_accept)}, then `hf auth login` (or set "
            "HF_TOKEN) and run again; or leave them out with --corpora"
        )


def check_disk(corpora: list[Corpus], data_dir: Path, options: FetchOptions, jobs: int) -> None:
    """Print what the fetch takes; UserError where the disk cannot hold it."""
    free = fetching.free_bytes(data_dir) / GIGABYTE
    scaled = [_scaled(row, options.max_hours) for row in corpora]
    print_costs(scaled, free, jobs)
    begun = 0
    for row in corpora:
        begun += fetching.folder_bytes(data_dir / row.place / f".{row.name}.part")
        begun += fetching.folder_bytes(data_dir / ".archives" / row.name)
    needed = peak_gigabytes(scaled, jobs) - begun / GIGABYTE
    if needed > free:
        raise UserError(
            f"{data_dir}: {needed:,.0f} GB needed, {free:,.0f} GB free; free some, or take fewer "
            "with --languages, --corpora or --max_hours"
        )


def as_listed(row: Corpus, options: FetchOptions) -> Corpus:
    """The row with the size of the shards that the dataset has now, hours and disk in proportion;
    as the table says where it cannot be asked."""
    if not isinstance(row, OnHub) or row.exact:
        return row
    try:
        listed = sum(shard.size for shard in shards_of(row, options.mirrors.get(row.name)))
    except (UserError, OSError):
        return row  # the fetch itself will say why
    grown = listed / GIGABYTE / (row.download_gb or row.gigabytes)
    return replace(_share_of(row, grown), download_gb=listed / GIGABYTE)


def _share_of(row: Corpus, share: float) -> Corpus:
    """The row with a share of its hours and bytes."""
    names = ("hours", "gigabytes", "download_gb")
    return replace(row, **{name: getattr(row, name) * share for name in names})


def _scaled(row: Corpus, max_hours: float) -> Corpus:
    """The row as --max_hours leaves it; archives are not cut, nor some corpora."""
    if not max_hours or row.hours <= max_hours or isinstance(row, (Files, DataCollective)):
        return row
    hours, transient = max_hours, row.transient_gb
    if isinstance(row, Archives):
        before = itertools.accumulate((a.hours for a in row.archives), initial=0.0)
        taken = [a for a, begin in zip(row.archives, before, strict=False) if begin < max_hours]
        hours = sum(archive.hours for archive in taken)
        transient *= max(a.gigabytes for a in taken) / max(a.gigabytes for a in row.archives)
    return replace(_share_of(row, hours / row.hours), transient_gb=transient)


def as_counted(row: Corpus, data_dir: Path) -> Corpus:
    """The row with the hours that were counted where it lies on the disk complete."""
    record = read_record(row.folder(data_dir))
    return replace(row, hours=record["hours"], exact=True) if record.get("whole") else row


# ---------------------------------------------------------------------------------------- fetch


def fetch_missing(
    corpora: list[Corpus], arguments: argparse.Namespace, options: FetchOptions
) -> int:
    """Fetch what is not there yet and report; the exit code."""
    data_dir, jobs = arguments.data_dir, arguments.jobs
    absent = [row for row in corpora if needs_fetching(row, data_dir, options)]
    # The largest archives first, while the disk is empty.
    absent.sort(key=lambda row: -row.transient_gb)
    if absent:
        if not hasattr(tarfile, "data_filter"):
            version = sys.version.split()[0]
            raise UserError(f"Python {version} cannot unpack tar safely: take 3.10.12 or 3.11.4")
        if all(row.default for row in corpora):
            print_reasons(row for row in CORPORA if row in corpora or row.plan)
        check_access(absent, options.mirrors)
        check_disk([as_listed(row, options) for row in absent], data_dir, options, jobs)
    for row in corpora:
        if row not in absent:
            print(f"{row.name}: already there")
    failed = fetch_all(absent, data_dir, options, jobs)
    if len(failed) == len(corpora) == 1:
        raise UserError(next(iter(failed.values())))
    code = report(corpora, arguments)
    if failed:
        lines = [f"  {name:<26} {reason}" for name, reason in failed.items()]
        print(
            f"error: {len(failed)} of {len(corpora)} corpora failed; the same command tries them "
            "again:", *lines, sep="\n", file=sys.stderr,
        )  # fmt: skip
    return 1 if failed else code


def fetch_all(
    corpora: list[Corpus], data_dir: Path, options: FetchOptions, jobs: int
) -> dict[str, str]:
    """Fetch side by side; why the others failed, in a line each, by name."""
    stopped = threading.Event()

    def task(corpus: Corpus) -> None:
        began = time.monotonic()
        fetch(corpus, data_dir, options, stopped)
        line = f"{corpus.name}: fetched in {(time.monotonic() - began) / 60:,.1f} min"
        record = read_record(corpus.folder(data_dir))
        hours, seconds = record["hours"], record.get("unpack_seconds")
        if seconds:  # unpacked, packed as FLAC and probed; 0 where a killed run began it
            pace = f"{_figure(hours)} h in {seconds:,.1f} s ({hours * 3600 / seconds:,.0f}x real"
            line += f"; unpacked {pace} time)"
        tqdm.write(_wrapped(line))

    tasks = {corpus.name: functools.partial(task, corpus) for corpus in corpora}
    results = fetching.side_by_side(tasks, jobs, stopped)
    return {
        name: _reason(name, error, data_dir / ERRORS)
        for name, error in results.items()
        if isinstance(error, Exception)
    }


def _reason(name: str, error: Exception, log: Path) -> str:
    """What ended a fetch, in a line; what was not foreseen leaves its traceback in `log`."""
    if isinstance(error, UserError):
        return str(error)
    with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%F %T')} {name}\n")
        file.writelines(traceback.format_exception(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{why(error)}; the same command goes on"
    return f"{type(error).__name__}: {first_line(error)}; this is a bug: see {log}"


# ----------------------------------------------------------------------------------------- main


def _pairs(flag: str, values: list[str] | None, names: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE arguments as a dict. Raises UserError on others, and on an unknown NAME."""
    known, found = set(names), {}
    for value in values or []:
        name, _, rest = value.partition("=")
        if not rest or name not in known:
            raise UserError(f"{flag} {value}: give NAME=VALUE, NAME one of {', '.join(known)}")
        found[name] = rest
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--languages", nargs="+", choices=data.LANGUAGES, metavar="LANGUAGE",
        help=f"only these of {', '.join(data.LANGUAGES)}")  # fmt: skip
    add("--corpora", nargs="+", metavar="NAME", help=f"rows of --list, or {', '.join(GROUPS)}")
    add("--data_dir", type=Path, default=Path("data"), help="where everything goes")
    add("--max_hours", type=number(0), default=0.0,
        help="of each corpus, 0 for all; archives are not cut")  # fmt: skip
    add("--list", action="store_true", help="show the table and stop")
    add("--verify", action="store_true", help="check every file on disk and stop")
    add("--json", type=Path, metavar="FILE", help="write what is on disk there too")
    more = parser.add_argument_group("advanced").add_argument
    more("--mirror", nargs="+", metavar="NAME=BASE_URL", help="another address of a corpus; for "
         "Hugging Face ones an endpoint, or a local folder laid out like the dataset")
    more("--cv_dataset_id", nargs="+", metavar="LANGUAGE=ID", help="Common Voice release, at the "
         "Mozilla Data Collective; fetches it alone, unless --corpora names more")
    more("--fisher_dir", type=Path, help="your copy of LDC2004S13 and LDC2004T19; takes it alone, "
         "unless --corpora names more")
    more("--allow_noncommercial", action="store_true", help="take what forbids commercial use, or "
         "may forbid it, too")
    more("--keep_wav", action="store_true", help="leave WAV as it comes, at twice the disk")
    more("--jobs", type=whole(1, 64), default=4, help="corpora side by side")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_args()
    folder = arguments.fisher_dir
    options = FetchOptions(
        max_hours=arguments.max_hours,
        mirrors=_pairs("--mirror", arguments.mirror, (row.name for row in CORPORA)),
        keep_wav=arguments.keep_wav,
        cv_dataset_ids=_pairs("--cv_dataset_id", arguments.cv_dataset_id, data.LANGUAGES),
        fisher_dir=folder and existing_folder(folder, "--fisher_dir"),
    )
    data_dir, names, languages = arguments.data_dir, arguments.corpora, arguments.languages
    chosen = choose(names, languages, options)
    if arguments.list:
        rows = chosen if names or languages else CORPORA
        print_list(as_counted(row, data_dir) for row in rows)
        return 0
    if arguments.json:
        writable_file(arguments.json, "--json")
    if arguments.verify:
        # Without --corpora all else that is there, too.
        there = [
            row for row in CORPORA
            if not names and row.language in (languages or data.LANGUAGES)
            and (row.folder(data_dir) / data.MANIFEST).exists()
        ]  # fmt: skip
        return report([row for row in CORPORA if row in chosen or row in there], arguments)
    chosen = without_forbidden(chosen, arguments.allow_noncommercial, options.fisher_dir)
    with only_one(writable_folder(data_dir, "--data_dir")):
        return fetch_missing(chosen, arguments, options)


if __name__ == "__main__":
    run(main)
