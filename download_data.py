"""Phase 1: fetch speech corpora into data/<language>/<corpus>/ and verify them.

    python download_data.py --list      what there is: hours, disk, licences
    python download_data.py             the default set: 2,000 real h a language
    python download_data.py --verify    what is on disk; exit 1 on a gap

Every corpus ends in a folder of audio with a `manifest.jsonl`, renamed into place when it is
complete; the same command goes on where a killed one stopped. Emotional speech goes to
data/emotion/, two-channel conversations to data/conversations/.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import command
import corpora
import data
import fetching
from audio import AudioError, probe
from command import ArgumentParser, UserError, number, only_one, run, whole, why
from corpora import Archive, Archives, Corpus, DataCollective, FetchOptions, Fisher, Hub, HubTars
from fetching import FILE_THREADS, GIGABYTE

GOAL_HOURS = 2000  # the plan's, a language
ERRORS = "download_errors.log"  # in --data_dir: the tracebacks of what was not foreseen
HOURS_TOLERANCE = 0.02  # share of the expected hours that may be absent
DIGEST_BYTES = 1 << 16  # read at each end of a file to find duplicates
GROUPS = ("default", "emotion", "conversations")
# Mono speech; FLAC as measured over LibriSpeech (59.3 GB).
GIGABYTES_OF_6000_H = "WAV 16 kHz 691, FLAC 372, MP3 64k 173, Opus 24k 65, codes 11"
CPU_POD_USD, H200_USD = 0.12, 3.39  # an hour; RunPod's smallest CPU pods, 2025

_OPENSLR = ("https://www.openslr.org", "https://us.openslr.org", "https://openslr.trmal.net")
_DISPUTED = {"commercial_ok": False, "license": "CC-BY-4.0 (?)",
    "note": "its licence differs from place to place, so it counts as not for commercial use: name "
    "it in --corpora, with --allow_noncommercial, after reading them"}  # fmt: skip


def _openslr(number: int) -> tuple[str, ...]:
    return tuple(f"{base}/resources/{number}" for base in _OPENSLR)


def _ai4bharat(repo: str, language: str, hours: float, gigabytes: float, **more: object) -> Hub:
    """A row for one language of a corpus of AI4Bharat: gated, a folder a language."""
    common = {"kilohertz": "16", "license": "CC-BY-4.0", "default": True, "folders": (language,)}
    common |= {"gated": True, "repo": f"ai4bharat/{repo}"}
    return Hub(f"{repo.lower()}-{language}", language, hours, gigabytes, **{**common, **more})


_KATHBATH = {"license": "CC0-1.0", "layout": "kathbath"}
_INDICVOICES = {"note": "still growing: ~ is what a model's card says it used of it"}
_SHRUTILIPI = {"speakers": (), "layout": "shrutilipi"}
_RASA = {"kilohertz": "48", "default": False, "group": "emotion", "audio": "audio",
    "style": "style", "speakers": ("speaker_id", "gender"), "split": "train",
    "note": "emotional speech for phase 4: --corpora emotion"}  # fmt: skip


def _common_voice(language: str, hours: float, gigabytes: float) -> DataCollective:
    account = "needs a Mozilla Data Collective account, MDC_API_KEY"
    return DataCollective(f"common-voice-{language}", language, hours, gigabytes, "48", "CC0-1.0",
        exact=False, transient_gb=gigabytes, layout="common_voice",
        note=f"left Hugging Face in 2025: {account} and --cv_dataset_id {language}=ID")


# Name, language, hours, GB, kHz and licence, then the rest by name.
CORPORA: tuple[Corpus, ...] = (
    Archives("librispeech", "english", 960.9, 60, "16", "CC-BY-4.0", transient_gb=30.6,
        default=True, layout="librispeech", bases=_openslr(12), archives=(
            Archive("train-clean-100.tar.gz", 100.6, 6.4, "md5:2a93770f6d5c6c964bc36631d331a522"),
            Archive("train-clean-360.tar.gz", 363.6, 23.0, "md5:c0e676e450a7ff2f54aeade5171606fa"),
            Archive("train-other-500.tar.gz", 496.7, 30.6,
                    "md5:d1a0fd59409feb2c614ce4d30c387708"))),
    # Chapters without transcripts: training reads windows of them.
    Archives("librilight-small", "english", 577.2, 35, "16", "public domain", transient_gb=35,
        default=True, layout="librilight",
        note="from its authors' archive: facebook/libri-light is no Hugging Face id",
        bases=("https://dl.fbaipublicfiles.com/librilight/data",),
        archives=(Archive("small.tar", 577.2, 35.0, "md5:c49207eb86a8e8ac895561c37232041e"),)),
    Archives("libritts-r", "english", 555.2, 55, "24", "CC-BY-4.0", download_gb=84,
        transient_gb=88, default=True, layout="libritts", bases=_openslr(141),
        note="in place of the plan's 500 h of Common Voice: 24 kHz, no account needed. These are "
        "recordings of LibriSpeech, restored: more bandwidth, no new voices or words",
        archives=(
            Archive("train_clean_100.tar.gz", 53.8, 8.1, "md5:6df668d8f5f33e70876bfa33862ad02b"),
            Archive("train_clean_360.tar.gz", 191.3, 29.0, "md5:382eb3e64394b3da6a559f864339b22c"),
            Archive("train_other_500.tar.gz", 310.1, 47.0,
                    "md5:a37a8e9f4fe79d20601639bf23d1add8"))),
    _common_voice("english", 2700, 90.0),
    _ai4bharat("Shrutilipi", "hindi", 1620, 100.0, **_SHRUTILIPI,
        note="news bulletins, in place of Gramvaani's 1,111 h of 8 kHz telephone speech"),
    _ai4bharat("Kathbath", "hindi", 150, 9.5, **_KATHBATH),
    _ai4bharat("IndicVoices", "hindi", 535, 33.0, **_INDICVOICES),
    Archives("openslr-103", "hindi", 100.6, 4.0, "8", download_gb=4.7, transient_gb=6.5,
        exact=False, **_DISPUTED, layout="transcription", bases=_openslr(103), archives=(
            Archive("Hindi_train.tar.gz", 95.05, 4.4), Archive("Hindi_test.tar.gz", 5.55, 0.3))),
    Archives("gramvaani", "hindi", 1108, 32, "8", "academic", transient_gb=8, commercial_ok=False,
        exact=False, layout="kaldi", bases=_openslr(118),
        note="licensed for academic use only, and mostly 8 kHz MP3: "
        "--corpora gramvaani --allow_noncommercial. The plan's GV_* addresses are gone",
        archives=(
            Archive("GV_Train_100h.tar.gz", 100, 3.0), Archive("GV_Dev_5h.tar.gz", 5, 0.15),
            Archive("GV_Eval_3h.tar.gz", 3, 0.1),
            *(Archive(f"Gramvaani_1000hrData_Part{n}.tar.gz", 200, 6.0) for n in range(1, 6)))),
    _common_voice("hindi", 27, 0.6),
    # Image descriptions by tens of thousands of people, one in twenty transcribed. Where a row
    # names no speaker, the split hangs on the district and postal code.
    Hub("vaani-telugu", "telugu", 1486, 97, "16", "CC-BY-4.0", download_gb=208, default=True,
        gated=True,
        note="in place of SPRING-INX, which has no Telugu release; closes the plan's gap of "
        "1,200 h with real speech, mostly untranscribed; all districts that it has now are taken",
        repo="ARTPARK-IISc/Vaani", folders=("audio/AndhraPradesh", "audio/Telangana"),
        audio="audio", text="transcript", speakers=("speakerID", "speaker_id"),
        keys=("district", "pincode"), keep=("language", "Telugu"), tagged=True),
    _ai4bharat("Shrutilipi", "telugu", 390, 24.0, **_SHRUTILIPI,
        note="news bulletins, in place of SPRING-INX"),
    _ai4bharat("Kathbath", "telugu", 155, 10.0, **_KATHBATH),
    _ai4bharat("IndicVoices", "telugu", 296, 33.0, **_INDICVOICES),
    # Both archives hold a line_index.tsv: they are unpacked apart.
    Archives("openslr-66", "telugu", 10.0, 1.0, "48", "CC-BY-SA-4.0", download_gb=1.1,
        transient_gb=1.0, default=True, exact=False, layout="line_index", bases=_openslr(66),
        archives=(Archive("te_in_female.zip", 5.0, 0.53), Archive("te_in_male.zip", 5.0, 0.55))),
    Hub("indictts-telugu", "telugu", 9.0, 1.8, "48", download_gb=3.0, split="train",
        **_DISPUTED, repo="SPRINGLab/IndicTTS_Telugu", folders=("data",),
        audio="audio", speakers=("speaker_id", "gender")),
    # Its loading script no longer runs: the Hub's own parquet conversion. Several people read
    # each sentence and are not named: its own splits, which share no sentence.
    Hub("fleurs-telugu", "telugu", 8.0, 1.0, "16", "CC-BY-4.0", download_gb=1.6, default=True,
        repo="google/fleurs", folders=("te_in",), revision="refs/convert/parquet", audio="audio",
        text="transcription", speakers=(), official_splits=True),
    _common_voice("telugu", 3, 0.1),
    # A copy with the authors' own file names; theirs are single files behind a quota.
    Hub("crema-d", "english", 5.26, 0.4, "16", "ODbL-1.0", download_gb=0.6, group="emotion",
        exact=True, note="emotional speech for phase 4: --corpora emotion", layout="crema_d",
        repo="AbstractTTS/CREMA-D", folders=("data",), audio="audio", file="file", speakers=()),
    Archives("ravdess", "english", 1.48, 0.3, "48", "CC-BY-NC-SA-4.0", download_gb=0.2,
        transient_gb=0.6, commercial_ok=False, group="emotion", layout="ravdess",
        note="emotional speech for phase 4: --corpora emotion --allow_noncommercial",
        bases=("https://zenodo.org/records/1188976/files",),
        archives=(Archive("Audio_Speech_Actors_01-24.zip", 1.48, 0.2,
                          "md5:bc696df654c87fed845eb13823edef8a"),)),
    # Two thirds of it: six emotions and neutral readings; in Hindi of one man alone.
    _ai4bharat("Rasa", "hindi", 17, 3.2, folders=("Hindi",), download_gb=9.0, **_RASA),
    _ai4bharat("Rasa", "telugu", 34, 6.4, folders=("Telugu",), download_gb=18.0, **_RASA),
    HubTars("behavior-sd", "english", 2164, 188, "22", "CC-BY-4.0", transient_gb=1.5, exact=True,
        group="conversations", repo="yhytoto12/behavior-sd",
        folders=("train", "validation", "test"), note="two-channel dialogues for phase 3, made by "
        "TTS: --corpora behavior-sd [--max_hours 100]"),
    Fisher("fisher", "english", 984, 40, "8", "LDC", exact=False, commercial_ok=False,
        group="conversations",
        note="sold by the LDC (LDC2004S13 + LDC2004T19): give your copy with --fisher_dir"),
)  # fmt: skip


def print_list(table: Sequence[Corpus]) -> None:
    """The table, 80 columns wide, with totals."""
    form = "{:<27}{:<8} {:>6} {:>5} {:>3}  {:<16} {}"
    print(form.format("corpus", "language", "hours", "GB", "kHz", "licence", "marks"))
    for section, rows in itertools.groupby(table, lambda row: row.group or row.language):
        print(f"-- {section} ".ljust(79, "-"))
        for row in rows:
            hours = f"{'' if row.exact else '~'}{_figure(row.hours)}"
            fields = (row.name, row.language, hours, _figure(row.gigabytes), row.kilohertz)
            marks = {"d": row.default, "g": row.gated, "n": not row.commercial_ok}
            print(form.format(*fields, row.license, " ".join(filter(marks.get, marks))).rstrip())
    print("-" * 79)
    print("marks: d default set, g gated (accept its licence on Hugging Face), n not for")
    print("commercial use; hours with ~ are estimates. GB: on disk, WAV packed as FLAC.")
    for language in data.LANGUAGES:
        rows = [row for row in table if row.default and row.language == language]
        hours, size = sum(row.hours for row in rows), sum(row.gigabytes for row in rows)
        if rows:
            print(f"default set, {language}: {hours:,.0f} h of {GOAL_HOURS:,}, {size:,.0f} GB")
    print_notes(table)


def print_notes(rows: Iterable[Corpus]) -> None:
    """What stands for which of the plan's corpora, or is left out, and why."""
    print("\nwhat became of the plan's corpora:")
    for row in rows:
        if row.note:
            print(_wrapped(f"- {row.name}: {row.note}"))


def _figure(number: float) -> str:
    """Hours or gigabytes with about three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.{1 if number >= 20 else 2}f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 79, subsequent_indent="  ", break_on_hyphens=False)


def peak_gigabytes(rows: list[Corpus], jobs: int) -> float:
    """The most that lies on disk at any time, archives included, where `jobs` run side by side."""
    landed = itertools.accumulate((row.gigabytes for row in rows), initial=0.0)
    sizes = [row.gigabytes + row.transient_gb for row in rows]
    coming = [sum(sizes[at : at + jobs]) for at in range(len(rows))]
    return max(map(sum, zip(landed, coming, strict=False)), default=0.0)


def verify(corpus: Corpus, data_dir: Path, every_file: bool = True) -> dict:
    """What is on disk of a corpus, as `--json` has it; with `every_file`, each one is probed.
    Expected are the table's hours where they are exact, else those that were fetched. The state is
    "ok", "ok, small" (less than nine tenths of an estimate), or what is missing. Duplicates are
    those alike in size and at both ends: as good as a hash of all for coded speech, and faster."""
    folder = corpus.folder(data_dir)
    record = corpora.read_record(folder)
    exact = "hours" not in record or (corpus.exact and record["whole"])
    expected = corpus.hours if exact else record["hours"]
    found = {"corpus": corpus.name, "language": corpus.language, "folder": corpus.place,
             "license": corpus.license, "commercial_ok": corpus.commercial_ok, "files": 0,
             "hours": 0.0, "expected_hours": round(expected, 4), "speakers": 0,
             "hours_by_sample_rate": {}, "unreadable": [], "duplicates": 0,
             "state": "not there"}  # fmt: skip
    if not (folder / data.MANIFEST).exists():
        return found
    try:
        clips = data.read_manifest(folder / data.MANIFEST)
    except UserError as error:  # this corpus' fault alone
        return found | {"unreadable": [command.first_line(error, 400)], "state": "cannot be read"}
    found["files"], found["speakers"] = len(clips), data.count_speakers(clips)
    good = [(clip.duration, clip.sample_rate) for clip in clips]
    if every_file:
        with ThreadPoolExecutor(FILE_THREADS) as pool:
            probed = pool.map(_check_file, clips)
            shown = tqdm(probed, corpus.name, len(clips), leave=False, unit="file", disable=None)
            checked = list(shown)
        found["unreadable"] = [one for one in checked if isinstance(one, str)]
        good = [one for one in checked if not isinstance(one, str)]
        found["duplicates"] = len(good) - len({digest for _, _, digest in good})
    rates: Counter[int] = Counter()
    for duration, rate, *_ in good:
        rates[rate] += duration / 3600
    hours = sum(rates.values())
    found["hours"] = round(hours, 4)
    found["hours_by_sample_rate"] = {str(rate): round(rates[rate], 4) for rate in sorted(rates)}
    if found["unreadable"]:
        found["state"] = f"{len(found['unreadable'])} unreadable"
    elif hours < expected * (1 - HOURS_TOLERANCE) - 0.005:  # the table has two places
        found["state"] = "hours missing"
    else:
        found["state"] = "ok, small" if record.get("whole") and hours < 0.9 * corpus.hours else "ok"
    return found


def _check_file(clip: data.Clip) -> tuple[float, int, bytes] | str:
    """(seconds, Hz, a digest of the file); its path where it cannot be read."""
    try:
        with open(clip.path, "rb") as file:  # once: on a network volume that is what takes time
            digest = hashlib.sha256(file.read(DIGEST_BYTES))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - DIGEST_BYTES, 0))
            digest.update(file.read() + size.to_bytes(8, "big"))
            file.seek(0)
            return *probe(clip.path, file), digest.digest()
    except (AudioError, OSError):
        return str(clip.path)


def print_verified(found: list[dict], data_dir: Path) -> bool:
    """The table of what is on disk; True where nothing is missing."""
    form = "{:<26} {:>7} {:>7} {:>7} {:>6} {:>3} {:>4}  {}"
    print(form.format("corpus", "files", "hours", "of", "spk", "bad", "dup", "state"))
    print("-" * 79)
    rates: dict[str, Counter[str]] = defaultdict(Counter)
    for row in found:
        rates[row["folder"]] += row["hours_by_sample_rate"]
        figures = (row["files"], _figure(row["hours"]), _figure(row["expected_hours"]))
        figures += (row["speakers"] or "?", len(row["unreadable"]), row["duplicates"])
        print(form.format(row["corpus"], *figures, row["state"]))
    print("-" * 79)
    for folder, by_rate in rates.items():
        total = sum(by_rate.values())
        goal = f", {total / GOAL_HOURS:.0%} of goal" if folder in data.LANGUAGES else ""
        parts = [f"{rate} Hz {_figure(hours)}" for rate, hours in by_rate.items()]
        print(_wrapped(f"{folder}: {_figure(total)} h{goal}: {', '.join(parts)}"))
    for what in [what for row in found for what in row["unreadable"]][:20]:
        print(f"unreadable: {what}")
    if missing := [row["corpus"] for row in found if not row["state"].startswith("ok")]:
        print(_wrapped(f"missing in {data_dir}: {', '.join(missing)}"))
        print("To fetch it: delete a damaged corpus's folder, then run this without --verify.")
    return not missing


def report(rows: list[Corpus], arguments: argparse.Namespace) -> int:
    """Print what is on disk, and write it as JSON where asked; 1 where something is missing."""
    found = [verify(corpus, arguments.data_dir, arguments.verify) for corpus in rows]
    complete = print_verified(found, arguments.data_dir)
    if not arguments.verify:
        print("Counted from the manifests; --verify reads every file.")
    if arguments.json:
        command.write_text(arguments.json, json.dumps(found, indent=2) + "\n")
    return 0 if complete else 1


def choose(names: list[str] | None, languages: list[str] | None,
           options: FetchOptions | None = None) -> list[Corpus]:  # fmt: skip
    """The rows asked for: those of --fisher_dir and --cv_dataset_id, and of --corpora; without any
    of these the default set. Raises UserError on an unknown name."""
    options = options or FetchOptions()
    if unknown := set(names or []) - {row.name for row in CORPORA} - set(GROUPS):
        there = f"--list shows them; groups: {', '.join(GROUPS)}"
        more = "Debian's packages: tools/package_recordings.py"
        raise UserError(f"no corpus '{min(unknown)}'; {there}; {more}")
    own = {f"common-voice-{language}" for language in options.cv_dataset_ids}
    own |= {"fisher"} if options.fisher_dir else set()
    wanted = own | set(names or ()) or {"default"}
    spoken = [row for row in CORPORA if row.language in (languages or data.LANGUAGES)]
    chosen = [row for row in spoken if wanted & {row.name, row.group, row.default and "default"}]
    if not chosen:
        raise UserError("no corpus of that language in the table; see --list")
    return chosen


def without_forbidden(rows: list[Corpus], allow_noncommercial: bool,
                      fisher_dir: Path | None) -> list[Corpus]:  # fmt: skip
    """The rows that may and can be fetched, a line for each other; UserError if none is left."""
    left = []
    for row in rows:
        taken = row.commercial_ok or allow_noncommercial
        reason = f"{row.license} does not surely allow commercial use: --allow_noncommercial"
        if isinstance(row, Fisher):
            taken, reason = fisher_dir, row.note
        if taken:
            left.append(row)
        else:
            print(_wrapped(f"skipped: {row.name}: {reason}"))
    if not left:
        raise UserError("nothing left to fetch; see the lines above, and --list")
    return left


def check_access(rows: list[Corpus], mirrors: dict[str, str]) -> None:
    """Ask the Hub for every gated dataset before the night begins. UserError names all at once."""
    places = {(row.repo, mirrors.get(row.name)) for row in rows if row.gated}
    asked = [place for place in places if not fetching.is_local(place[1])]
    if to_accept := sorted({fetching.licence_page(*place) for place in asked} - {""}):
        accept = f"accept the licence at {' and at '.join(to_accept)}, then `hf auth login` (or "
        raise UserError(f"{accept}set HF_TOKEN) and run again; or leave them out with --corpora")


def check_disk(rows: list[Corpus], data_dir: Path, options: FetchOptions, jobs: int) -> None:
    """Print the disk, time and money of a fetch; UserError where the disk cannot hold it."""
    begun = [data_dir / row.place / f".{row.name}.part" for row in rows]
    begun += [data_dir / ".archives" / row.name for row in rows]
    free = shutil.disk_usage(data_dir).free / GIGABYTE
    rows = [_scaled(row, options.max_hours) for row in rows]
    hours, final = sum(row.hours for row in rows), sum(row.gigabytes for row in rows)
    network, peak = sum(r.download_gb or r.gigabytes for r in rows), peak_gigabytes(rows, jobs)
    print(f"to fetch: {len(rows)} corpora, {_figure(hours)} h; network: {network:,.1f} GB\n"
          f"disk: {final:,.1f} GB in the end, {peak:,.1f} at the most, archives included; "
          f"{free:,.0f} free\n6,000 h in GB: {GIGABYTES_OF_6000_H}")  # fmt: skip
    for rate in (25, 100):
        took = network * 1e3 / rate / 3600
        print(f"at {rate} MB/s: {took:,.1f} h, about ${took * CPU_POD_USD:,.2f} on a CPU pod, "
              f"${took * H200_USD:,.2f} on an idle H200")  # fmt: skip
    needed = peak - sum(map(fetching.folder_bytes, begun)) / GIGABYTE
    if needed > free:
        said = f"{needed:,.0f} GB needed, {free:,.0f} GB free; free some, or take fewer"
        raise UserError(f"{data_dir}: {said} with --languages, --corpora or --max_hours")


def as_listed(row: Corpus, options: FetchOptions) -> Corpus:
    """The row at the size of the shards that there are now; as it is, where nobody can be asked."""
    if not isinstance(row, corpora.OnHub) or row.exact:
        return row
    try:
        listed = sum(shard.size for shard in corpora.shards_of(row, options.mirrors.get(row.name)))
    except (UserError, OSError):
        return row  # the fetch itself will say why
    return _share_of(row, listed / GIGABYTE / (row.download_gb or row.gigabytes))


def _share_of(row: Corpus, share: float) -> Corpus:
    sizes = {name: getattr(row, name) * share for name in ("hours", "gigabytes", "download_gb")}
    return replace(row, **sizes)


def _scaled(row: Corpus, max_hours: float) -> Corpus:
    """The row as --max_hours leaves it; archives and releases are not cut."""
    if not max_hours or row.hours <= max_hours or isinstance(row, DataCollective):
        return row
    if not isinstance(row, Archives):
        return _share_of(row, max_hours / row.hours)
    before = itertools.accumulate((a.hours for a in row.archives), initial=0.0)
    taken = [a for a, begin in zip(row.archives, before, strict=False) if begin < max_hours]
    largest = max(a.gigabytes for a in taken) / max(a.gigabytes for a in row.archives)
    row = replace(row, transient_gb=row.transient_gb * largest)
    return _share_of(row, sum(a.hours for a in taken) / row.hours)


def fetch_missing(rows: list[Corpus], arguments: argparse.Namespace, options: FetchOptions):
    """Fetch what is not there yet and report; the exit code."""
    data_dir, jobs = arguments.data_dir, arguments.jobs
    absent = [row for row in rows if corpora.needs_fetching(row, data_dir, options)]
    absent.sort(key=lambda row: -row.transient_gb)  # large archives while the disk is empty
    if absent:
        if all(row.default for row in rows):
            print_notes(CORPORA)
        check_access(absent, options.mirrors)
        check_disk([as_listed(row, options) for row in absent], data_dir, options, jobs)
    for row in rows:
        if row not in absent:
            print(f"{row.name}: already there")
    failed = fetch_all(absent, data_dir, options, jobs)
    if len(failed) == len(rows) == 1:
        raise UserError(next(iter(failed.values())))
    code = report(rows, arguments)
    if failed:
        count = f"{len(failed)} of {len(rows)} corpora"
        print(f"error: {count} failed; the same command tries them again:", file=sys.stderr)
    for name, reason in failed.items():
        print(f"  {name:<26} {reason}", file=sys.stderr)
    return 1 if failed else code


def fetch_all(rows: list[Corpus], data_dir: Path, options: FetchOptions, jobs: int) -> dict:
    """Fetch side by side; why the others failed, in a line each, by name."""
    stopped = threading.Event()

    def task(corpus: Corpus) -> None:
        began = time.monotonic()
        corpora.fetch(corpus, data_dir, options, stopped)
        tqdm.write(f"{corpus.name}: fetched in {(time.monotonic() - began) / 60:,.1f} min")

    tasks = {corpus.name: functools.partial(task, corpus) for corpus in rows}
    results = fetching.side_by_side(tasks, jobs, stopped)
    return {n: _reason(n, error, data_dir / ERRORS) for n, error in results.items() if error}


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
    return f"{type(error).__name__}: {command.first_line(error)}; this is a bug: see {log}"


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
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--languages", nargs="+", choices=data.LANGUAGES, help="only these")
    add("--corpora", nargs="+", metavar="NAME", help=f"rows of --list, or {', '.join(GROUPS)}")
    add("--data_dir", type=Path, default=Path("data"), help="where everything goes")
    add("--max_hours", type=number(0), default=0.0, help="of a corpus, 0: all; archives aren't cut")
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
    more("--allow_noncommercial", action="store_true", help="also what may forbid commercial use")
    more("--keep_wav", action="store_true", help="leave WAV as it comes, at twice the disk")
    more("--jobs", type=whole(1, 64), default=4, help="corpora side by side")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_args()
    folder = arguments.fisher_dir
    options = FetchOptions(max_hours=arguments.max_hours, keep_wav=arguments.keep_wav,
        mirrors=_pairs("--mirror", arguments.mirror, (row.name for row in CORPORA)),
        cv_dataset_ids=_pairs("--cv_dataset_id", arguments.cv_dataset_id, data.LANGUAGES),
        fisher_dir=folder and command.existing_folder(folder, "--fisher_dir"))  # fmt: skip
    data_dir, names, languages = arguments.data_dir, arguments.corpora, arguments.languages
    chosen = choose(names, languages, options)
    if arguments.list:
        print_list(chosen if names or languages else CORPORA)
        return 0
    if arguments.json:
        command.writable_file(arguments.json, "--json")
    if arguments.verify:
        if not names:  # all else that is there, too
            mine = [row for row in CORPORA if row.language in (languages or data.LANGUAGES)]
            chosen += [row for row in mine if (row.folder(data_dir) / data.MANIFEST).exists()]
        return report([row for row in CORPORA if row in chosen], arguments)
    chosen = without_forbidden(chosen, arguments.allow_noncommercial, options.fisher_dir)
    with only_one(command.writable_folder(data_dir, "--data_dir")):
        return fetch_missing(chosen, arguments, options)


if __name__ == "__main__":
    run(main)
