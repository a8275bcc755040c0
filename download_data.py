"""Phase 1: fetch speech corpora into data/<language>/<corpus>/ and verify them.

    python download_data.py --list      what there is: hours, licences, use
    python download_data.py             fetch everything in the table (minutes, 0.5 GB, no root)
    python download_data.py --verify    what is on disk, against the table; exit 1 on a gap

Every corpus ends in a folder of audio with a `manifest.jsonl`. A folder is renamed into place
only when it is complete, so a killed run leaves nothing half-done and the same command goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from tqdm import tqdm

import data
import training
from training import UserError

G722_RATE = 16000
G722_PACKET = 160  # bytes: 20 ms at 64 kbit/s
RAW_RATE = 16000  # pocketsphinx's headerless files: 16-bit little-endian mono
HOURS_TOLERANCE = 0.02  # share of the expected hours that may be absent


@dataclass(frozen=True)
class Corpus:
    """One row of the table. `kind` names the way it is fetched (see FETCHERS).

    `include` and `exclude` are globs below `root`, a folder inside the package. Who speaks: one
    person (`speaker`), or whoever group 1 of `speaker_pattern` names in the path; those names
    ("*" for all) are what `validation` and `test` hold out. With `speakers_known` false the
    names are groups that share no speaker (languages), and the speaker stays unknown.
    """

    name: str
    language: str
    packages: tuple[str, ...]
    root: str
    include: tuple[str, ...]
    license: str
    hours: float
    kilohertz: str
    commercial_ok: bool = True
    speaker: str | None = None
    speaker_pattern: str = ""
    speakers_known: bool = True
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    transcripts: str = ""
    kind: str = "debian"

    @property
    def use(self) -> str:
        """What the corpus is for: "train" (with held-out speakers) or one split only."""
        if "*" in self.test:
            return "test only"
        return "dev only" if "*" in self.validation else "train"


# Tones, jingles and recorded silence among the prompts.
_NOT_SPEECH = (
    "silence/*",
    "beep.*",
    "beeperr.*",
    "*-2tone.*",
    "confbridge-join.*",
    "confbridge-leave.*",
    "tt-monkeys.*",
)


def _asterisk(
    code: str, folder: str, speaker: str, license: str, hours: float, **more: object
) -> Corpus:
    """A row for one of Asterisk's own prompt sets: G.722, one professional voice."""
    package = f"asterisk-core-sounds-{code}-g722"
    fields = {"language": "other", "packages": (package,), **more}
    return Corpus(
        name=f"asterisk-core-{code}",
        root=f"usr/share/asterisk/sounds/{folder}",
        include=("*.g722",),
        exclude=_NOT_SPEECH,
        license=license,
        hours=hours,
        kilohertz="16",
        speaker=speaker,
        **fields,
    )


# The real human recordings that Debian's packages carry. Every row was counted after duplicates
# were dropped. No package carries human Hindi or Telugu speech.
CORPORA: tuple[Corpus, ...] = (
    _asterisk("fr", "fr_CA_f_June", "june-wallack", "CC-BY-SA-3.0", 0.41),
    _asterisk("it", "it_IT_m_Carlo", "carlo-flora", "CC-BY-3.0", 0.38),
    _asterisk("ru", "ru_RU_f_IvrvoiceRU", "ivrvoice-ru", "CC-BY-3.0", 0.39),
    Corpus(
        name="asterisk-prompt-es-co",
        language="other",
        packages=("asterisk-prompt-es-co",),
        root="usr/share/asterisk/sounds/es",
        include=("*.gsm",),
        exclude=_NOT_SPEECH,
        license="GPL-2",
        hours=0.17,
        kilohertz="8",
        speaker="july-jimenez",
    ),
    Corpus(
        name="asterisk-prompt-fr-armelle",
        language="other",
        packages=("asterisk-prompt-fr-armelle",),
        root="usr/share/asterisk/sounds/fr",
        include=("*.gsm",),
        exclude=_NOT_SPEECH,
        license="GPL-2+",
        hours=0.25,
        kilohertz="8",
        speaker="armelle-desjardins",
    ),
    Corpus(
        name="asterisk-prompt-it-menardi",
        language="other",
        packages=("asterisk-prompt-it-menardi-wav",),
        root="usr/share/asterisk/sounds/it_IT_f_Menardi",
        include=("*.wav",),
        exclude=_NOT_SPEECH,
        license="CC-BY-SA-3.0",
        hours=0.39,
        kilohertz="8",
        speaker="paola-dal-zot",
    ),
    # Spoken names of pictures by volunteers of 13 languages, nobody named: languages, not
    # speakers, are held out. Names without a language code are English.
    Corpus(
        name="tuxpaint-stamps",
        language="other",
        packages=("tuxpaint-stamps-default",),
        root="usr/share/tuxpaint/stamps",
        include=("*_desc*.ogg",),
        license="GPL-2",
        hours=2.62,
        kilohertz="44",
        speaker_pattern=r"_desc_?([A-Za-z]*)\.ogg$",
        speakers_known=False,
        validation=("da", "ml"),
        test=("", "lt", "nl"),
    ),
    # Letters and syllables, one volunteer a language; the Tswana ones are clipped to noise.
    Corpus(
        name="klettres",
        language="other",
        packages=("klettres-data",),
        root="usr/share/klettres",
        include=("*.ogg",),
        exclude=("tn/*",),
        license="GPL-2+",
        hours=0.84,
        kilohertz="44",
        speaker_pattern=r"^([^/]+)/",
        validation=("hu", "nl"),
        test=("en_GB", "lt", "uk"),
    ),
    # A game's dialogues: two main actors (m, v), the rest of the cast known by part alone.
    Corpus(
        name="fillets-cs",
        language="other",
        packages=("fillets-ng-data-cs",),
        root="usr/share/games/fillets-ng/sound",
        include=("*.ogg",),
        license="GPL-2+",
        hours=1.76,
        kilohertz="22",
        speaker_pattern=r"/[^/-]+-([mv])-[^/]*$",
    ),
    Corpus(
        name="pocketsphinx-testdata",
        language="other",
        packages=("pocketsphinx-testdata",),
        root="usr/share/pocketsphinx/test/data",
        include=("librivox/*.wav", "cards/*.wav", "*.raw"),
        license="BSD-2-Clause",
        hours=0.01,
        kilohertz="16",
        speaker_pattern=r"^(librivox|cards)/",
        validation=("*",),
    ),
    # One actress, for evaluation alone: training on either would make it meaningless.
    _asterisk(
        "en",
        "en_US_f_Allison",
        "allison-smith",
        "CC-BY-SA-3.0",
        0.40,
        language="english",
        packages=("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en"),
        transcripts="usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
        test=("*",),
    ),
    _asterisk("es", "es_MX_f_Allison", "allison-smith", "CC-BY-SA-3.0", 0.50, test=("*",)),
)


# ------------------------------------------------------------------------------------- fetching


def fetch(corpus: Corpus, data_dir: Path) -> bool:
    """Bring one corpus into place; False where it was there already. Raises UserError."""
    folder = data_dir / corpus.language / corpus.name
    if (folder / data.MANIFEST).exists():
        return False
    if folder.exists():
        raise UserError(f"{folder}: there without {data.MANIFEST}; move it away and run again")
    # Hidden, so that no trainer scans it while it grows.
    part = folder.with_name(f".{corpus.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    archives = data_dir / ".archives" / corpus.name
    clips = FETCHERS[corpus.kind](corpus, part, archives)
    if not clips:
        raise UserError(f"{corpus.name}: no audio in {', '.join(corpus.packages)}; new layout?")
    data.write_manifest(part / data.MANIFEST, clips)
    part.rename(folder)
    shutil.rmtree(archives, ignore_errors=True)
    return True


def fetch_debian(corpus: Corpus, part: Path, archives: Path) -> list[data.Clip]:
    """Audio of Debian packages, without installing them: no root, nothing outside `part`."""
    raw = part / ".raw"
    for package in corpus.packages:
        unpack_deb(download_deb(package, archives), raw, lambda name: _wanted(corpus, name))
    texts = _read_transcripts(raw / corpus.transcripts) if corpus.transcripts else {}
    files = sorted(path for path in (raw / corpus.root).rglob("*") if path.is_file())
    clips, seen = [], set()
    for source in tqdm(files, desc=corpus.name, unit="file", disable=not sys.stderr.isatty()):
        digest = hashlib.sha256(source.read_bytes()).digest()
        name = source.relative_to(raw / corpus.root)
        text = texts.get(name.with_suffix("").as_posix())
        if digest in seen:
            continue
        seen.add(digest)
        clip = _take(corpus, source, part / "audio" / name, name.as_posix(), text)
        clips += [clip] if clip else []
    for package in corpus.packages:
        notice = raw / f"usr/share/doc/{package}/copyright"
        if notice.exists():
            notice.replace(part / f"copyright.{package}")
    shutil.rmtree(raw)
    return clips


FETCHERS: dict[str, Callable[[Corpus, Path, Path], list[data.Clip]]] = {"debian": fetch_debian}


def _wanted(corpus: Corpus, name: str) -> bool:
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
        except tarfile.TarError as error:
            raise UserError(f"{archive}: damaged ({error}); delete it and run again") from error
        finally:
            process.stdout.close()
        if process.wait() != 0:
            raise UserError(f"{archive}: damaged; delete it and run again")


def unpack_tar(
    stream: IO[bytes], folder: Path, wanted: Callable[[str], bool], label: str
) -> None:
    """Unpack chosen regular files of a tar stream; refuses links among them and any escape."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{label}: '{member.name}' points outside its folder; not unpacked")
            if member.isdir() or not wanted(str(path)):
                continue
            if not member.isreg():
                raise UserError(f"{label}: '{member.name}' is a link or device; not unpacked")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                shutil.copyfileobj(archive.extractfile(member), file)


def _read_transcripts(path: Path) -> dict[str, str]:
    """`name: text` lines; a text in brackets tells of a sound, not of words."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pairs = [line.strip().split(":", 1) for line in file if ":" in line and line[0] != ";"]
    texts = {name.strip(): " ".join(text.split()) for name, text in pairs}
    return {name: text for name, text in texts.items() if text and text[0] not in "[(<"}


def _take(
    corpus: Corpus, source: Path, target: Path, name: str, text: str | None
) -> data.Clip | None:
    """Move or decode one file into place; None, and one line, where it cannot be read."""
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
        tqdm.write(f"skipped: {error}", file=sys.stderr)
        return None
    speaker, split = speaker_and_split(corpus, name)
    return data.Clip(
        path=target,
        duration=duration,
        sample_rate=sample_rate,
        language=corpus.language,
        speaker=speaker,
        text=text,
        license=corpus.license,
        commercial_ok=corpus.commercial_ok,
        split=split,
    )


def speaker_and_split(corpus: Corpus, name: str) -> tuple[str | None, str]:
    """Who speaks in the file `name` (below the corpus's root), and the split that follows."""
    match = re.search(corpus.speaker_pattern, name) if corpus.speaker_pattern else None
    group = match.group(1) if match else None
    split = "train"
    for held_out, groups in (("validation", corpus.validation), ("test", corpus.test)):
        if "*" in groups or group in groups:
            split = held_out
    named = f"{corpus.name}-{group}" if group is not None and corpus.speakers_known else None
    return corpus.speaker or named, split


def decode_g722(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 16000) of a headerless G.722 file, packet by packet of 20 ms."""
    try:
        import av
    except ImportError as error:
        raise UserError("G.722 recordings need PyAV: pip install av") from error
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


DECODERS: dict[str, Callable[[Path], tuple[np.ndarray, int]]] = {
    ".g722": decode_g722,
    ".gsm": decode_gsm,
    ".raw": decode_raw,
}


# ------------------------------------------------------------------------------- list and verify


def print_list(corpora: Iterable[Corpus]) -> None:
    """The table, 80 columns wide, with totals."""
    corpora = list(corpora)
    form = "{:<27} {:<8} {:>6} {:>4}  {:<12} {:<4} {}"
    print(form.format("corpus", "language", "hours", "kHz", "licence", "com.", "use"))
    print("-" * 79)
    for row in corpora:
        commercial = "yes" if row.commercial_ok else "no"
        fields = (row.name, row.language, f"{row.hours:.2f}", row.kilohertz, row.license)
        print(form.format(*fields, commercial, row.use))
    print("-" * 79)
    for use in ("train", "dev only", "test only"):
        hours = sum(row.hours for row in corpora if row.use == use)
        if hours:
            print(form.format("total", "", f"{hours:.2f}", "", "", "", use))
    print("com.: commercial use allowed; share-alike and GPL terms bind what is passed on.")
    print("train: with held-out speakers inside. No row holds human Hindi or Telugu speech.")


@dataclass(frozen=True)
class Verified:
    """What `--verify` found of one corpus."""

    corpus: Corpus
    files: int = 0
    hours: float = 0.0
    speakers: frozenset[str] = frozenset()
    rates: tuple[tuple[int, int], ...] = ()
    unreadable: tuple[str, ...] = ()
    duplicates: int = 0
    present: bool = True

    @property
    def problem(self) -> str:
        """What is missing, in words, or an empty string."""
        if not self.present:
            return "not there"
        if self.unreadable:
            return f"{len(self.unreadable)} unreadable"
        expected = self.corpus.hours
        # The table's figures are rounded to two places.
        return "hours missing" if self.hours < expected * (1 - HOURS_TOLERANCE) - 0.005 else ""


def verify(corpus: Corpus, data_dir: Path) -> Verified:
    """Probe and hash every file of a corpus against its manifest."""
    manifest = data_dir / corpus.language / corpus.name / data.MANIFEST
    if not manifest.exists():
        return Verified(corpus, present=False)
    clips = data.read_manifest(manifest)
    with ThreadPoolExecutor(4) as pool:
        checked = list(pool.map(_check_file, (clip.path for clip in clips)))
    good = [
        replace(clip, duration=found[0], sample_rate=found[1])
        for clip, found in zip(clips, checked, strict=True)
        if found
    ]
    bad = [str(clip.path) for clip, found in zip(clips, checked, strict=True) if not found]
    return Verified(
        corpus=corpus,
        files=len(clips),
        hours=sum(clip.duration for clip in good) / 3600,
        speakers=frozenset(clip.speaker for clip in good if clip.speaker),
        rates=tuple(sorted(Counter(clip.sample_rate for clip in good).items())),
        unreadable=tuple(bad),
        duplicates=len(good) - len({found[2] for found in checked if found}),
    )


def _check_file(path: Path) -> tuple[float, int, bytes] | None:
    try:
        return *data.probe(path), hashlib.sha256(path.read_bytes()).digest()
    except (data.AudioError, OSError):
        return None


def print_verified(found: list[Verified], data_dir: Path) -> bool:
    """The table of what is on disk; True where nothing is missing."""
    form = "{:<26} {:>6} {:>6} {:>6} {:>4} {:>4} {:>4}  {}"
    print(form.format("corpus", "files", "hours", "of", "spk", "bad", "dup", "state"))
    print("-" * 79)
    for row in found:
        hours, expected = f"{row.hours:.2f}", f"{row.corpus.hours:.2f}"
        counts = (len(row.speakers) or "?", len(row.unreadable), row.duplicates)
        state = row.problem or "ok"
        print(form.format(row.corpus.name, row.files, hours, expected, *counts, state))
    print("-" * 79)
    files, hours = sum(row.files for row in found), sum(row.hours for row in found)
    expected = sum(row.corpus.hours for row in found)
    speakers = len(frozenset().union(*(row.speakers for row in found)))
    bad = sum(len(row.unreadable) for row in found)
    dup = sum(row.duplicates for row in found)
    print(form.format("total", files, f"{hours:.2f}", f"{expected:.2f}", speakers, bad, dup, ""))
    rates: Counter[int] = Counter()
    for row in found:
        rates.update(dict(row.rates))
    if rates:
        counts = ", ".join(f"{count} at {rate} Hz" for rate, count in sorted(rates.items()))
        print(textwrap.fill(f"files: {counts}", 79))
    for path in [path for row in found for path in row.unreadable][:20]:
        print(f"unreadable: {path}")
    missing = [row.corpus.name for row in found if row.problem]
    if missing:
        print(textwrap.fill(f"missing in {data_dir}: {', '.join(missing)}", 79))
        print("To fetch it: delete a damaged corpus's folder, then run this without --verify.")
    return not missing


# ------------------------------------------------------------------------------------------ main


def choose(names: list[str] | None, languages: list[str] | None) -> list[Corpus]:
    """The rows asked for; all of them without flags. Raises UserError on an unknown name."""
    known = {row.name: row for row in CORPORA}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise UserError(f"no corpus '{unknown[0]}'; --list shows them: {', '.join(known)}")
    chosen = [row for row in CORPORA if not names or row.name in names]
    chosen = [row for row in chosen if not languages or row.language in languages]
    if not chosen:
        raise UserError("no corpus of that language in the table; see --list")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--languages", nargs="+", choices=data.LANGUAGES, help="only these")
    parser.add_argument("--corpora", nargs="+", metavar="NAME", help="only these rows of --list")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--list", action="store_true", help="show the table and stop")
    parser.add_argument("--verify", action="store_true", help="check what is on disk and stop")
    arguments = parser.parse_args()
    corpora = choose(arguments.corpora, arguments.languages)
    if arguments.list:
        print_list(corpora)
        return 0
    if not arguments.verify:
        for corpus in corpora:
            state = "fetched" if fetch(corpus, arguments.data_dir) else "already there"
            print(f"{corpus.name}: {state}", flush=True)
    found = [verify(corpus, arguments.data_dir) for corpus in corpora]
    return 0 if print_verified(found, arguments.data_dir) else 1


if __name__ == "__main__":
    training.run(main)
