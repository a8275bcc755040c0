"""Recordings of people in Debian's packages: what the tiny codec learns real voices from.

    python tools/package_recordings.py --data_dir data      8 h of French, Russian, Czech and more
    python tools/package_recordings.py --list
    python tools/package_recordings.py --verify

Each corpus ends in a folder of audio with a manifest, as those of download_data.py do. Needs
apt-get and dpkg-deb, and no root: the packages are downloaded and unpacked, not installed.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import corpora  # noqa: E402
import data  # noqa: E402
import download_data  # noqa: E402
from audio import AudioError, probe, read_audio, write_audio  # noqa: E402
from command import (  # noqa: E402
    ArgumentParser,
    UserError,
    only_one,
    run,
    whole,
    writable_file,
    writable_folder,
)
from corpora import Corpus, FetchOptions, Job  # noqa: E402

G722_RATE = 16000
G722_PACKET = 160  # bytes: 20 ms at 64 kbit/s
RAW_RATE = 16000  # pocketsphinx's headerless files: 16-bit little-endian mono


@dataclass(frozen=True, kw_only=True)
class Packages(Corpus):
    """Recordings inside Debian packages, fetched by apt without root.

    `include` and `exclude` are globs below `root`, a folder inside the package. Who speaks: one
    person (`speaker`), or whoever group 1 of `speaker_pattern` names in the path; those names
    ("*" for all) are what `validation` and `test` hold out. With `speakers_known` false the
    names are groups that share no speaker (languages), and the speaker stays unknown.
    """

    packages: tuple[str, ...]
    root: str
    include: tuple[str, ...]
    speaker: str | None = None
    speaker_pattern: str = ""
    speakers_known: bool = True
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    transcripts: str = ""
    group: str = "packages"
    gigabytes: float = 0.1

    @property
    def origin(self) -> str:
        return ", ".join(self.packages)

    @property
    def marks(self) -> str:
        if "*" in self.test:
            return "test only"
        return "dev only" if "*" in self.validation else ""


# ---------------------------------------------------------------------------------------- the table

# Tones, jingles and recorded silence among the prompts.
_NOT_SPEECH = (
    "silence/*", "beep.*", "beeperr.*", "*-2tone.*", "confbridge-join.*", "confbridge-leave.*",
    "tt-monkeys.*",
)


def _asterisk(
    code: str, folder: str, speaker: str, license: str, hours: float, **more: object
) -> Packages:
    """A row for one of Asterisk's own prompt sets: G.722, one professional voice."""
    package = f"asterisk-core-sounds-{code}-g722"
    fields = {"language": "other", "packages": (package,), **more}
    return Packages(
        name=f"asterisk-core-{code}", root=f"usr/share/asterisk/sounds/{folder}",
        include=("*.g722",), exclude=_NOT_SPEECH, license=license, hours=hours, kilohertz="16",
        speaker=speaker, **fields,
    )


# The real human recordings that Debian's packages carry. Every row was counted after duplicates
# were dropped. No package carries human Hindi or Telugu speech.
PACKAGES: tuple[Packages, ...] = (
    _asterisk("fr", "fr_CA_f_June", "june-wallack", "CC-BY-SA-3.0", 0.41),
    _asterisk("it", "it_IT_m_Carlo", "carlo-flora", "CC-BY-3.0", 0.38),
    _asterisk("ru", "ru_RU_f_IvrvoiceRU", "ivrvoice-ru", "CC-BY-3.0", 0.39),
    Packages(
        name="asterisk-prompt-es-co", language="other", packages=("asterisk-prompt-es-co",),
        root="usr/share/asterisk/sounds/es", include=("*.gsm",), exclude=_NOT_SPEECH,
        license="GPL-2", hours=0.17, kilohertz="8", speaker="july-jimenez",
    ),
    Packages(
        name="asterisk-prompt-fr-armelle", language="other",
        packages=("asterisk-prompt-fr-armelle",), root="usr/share/asterisk/sounds/fr",
        include=("*.gsm",), exclude=_NOT_SPEECH, license="GPL-2+", hours=0.25, kilohertz="8",
        speaker="armelle-desjardins",
    ),
    Packages(
        name="asterisk-prompt-it-menardi", language="other",
        packages=("asterisk-prompt-it-menardi-wav",),
        root="usr/share/asterisk/sounds/it_IT_f_Menardi", include=("*.wav",), exclude=_NOT_SPEECH,
        license="CC-BY-SA-3.0", hours=0.39, kilohertz="8", speaker="paola-dal-zot",
    ),
    # Spoken names of pictures by volunteers of 13 languages, nobody named: languages, not
    # speakers, are held out. Names without a language code are English.
    Packages(
        name="tuxpaint-stamps", language="other", packages=("tuxpaint-stamps-default",),
        root="usr/share/tuxpaint/stamps", include=("*_desc*.ogg",), license="GPL-2", hours=2.62,
        kilohertz="44", speaker_pattern=r"_desc_?([A-Za-z]*)\.ogg$", speakers_known=False,
        validation=("da", "ml"), test=("", "lt", "nl"),
    ),
    # Letters and syllables, one volunteer a language; the Tswana ones are clipped to noise.
    Packages(
        name="klettres", language="other", packages=("klettres-data",), root="usr/share/klettres",
        include=("*.ogg",), exclude=("tn/*",), license="GPL-2+", hours=0.84, kilohertz="44",
        speaker_pattern=r"^([^/]+)/", validation=("hu", "nl"), test=("en_GB", "lt", "uk"),
    ),
    # A game's dialogues: two main actors (m, v), the rest of the cast known by part alone.
    Packages(
        name="fillets-cs", language="other", packages=("fillets-ng-data-cs",),
        root="usr/share/games/fillets-ng/sound", include=("*.ogg",), license="GPL-2+", hours=1.76,
        kilohertz="22", speaker_pattern=r"/[^/-]+-([mv])-[^/]*$",
    ),
    Packages(
        name="pocketsphinx-testdata", language="other", packages=("pocketsphinx-testdata",),
        root="usr/share/pocketsphinx/test/data", include=("librivox/*.wav", "cards/*.wav", "*.raw"),
        license="BSD-2-Clause", hours=0.01, kilohertz="16", speaker_pattern=r"^(librivox|cards)/",
        validation=("*",),
    ),
    # One actress, for evaluation alone: training on either would make it meaningless.
    _asterisk(
        "en", "en_US_f_Allison",
        "allison-smith", "CC-BY-SA-3.0",
        0.40, language="english",
        packages=("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en"),
        transcripts="usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", test=("*",),
    ),
    _asterisk("es", "es_MX_f_Allison", "allison-smith", "CC-BY-SA-3.0", 0.50, test=("*",)),
)


# ----------------------------------------------------------------------------------------- packages


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


def unpack_deb(archive: Path, folder: Path) -> None:
    """Unpack a .deb into `folder`. Raises UserError on a bad one."""
    command = ["dpkg-deb", "--extract", str(archive), str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        raise UserError(f"{archive}: damaged; delete it and run again")


def fetch_packages(job: Job) -> None:
    """Audio of Debian packages, without installing them: no root, nothing outside the folder."""
    shutil.rmtree(job.part)
    archives = [download_deb(package, job.archives) for package in job.corpus.packages]
    _unpack_packages(job, archives, job.part / ".raw")


corpora.FETCHERS[Packages] = fetch_packages


def _unpack_packages(job: Job, archives: list[Path], raw: Path) -> None:
    corpus = job.corpus
    raw.mkdir(parents=True)
    for archive in archives:
        unpack_deb(archive, raw)
    texts = _read_transcripts(raw / corpus.transcripts) if corpus.transcripts else {}
    seen = set()
    for source in sorted((raw / corpus.root).rglob("*")):
        name = source.relative_to(raw / corpus.root)
        if source.is_symlink() or not source.is_file() or not _wanted(corpus, name.as_posix()):
            continue
        digest = hashlib.sha256(source.read_bytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        job.bar.advance(source.stat().st_size)
        text = texts.get(name.with_suffix("").as_posix())
        job.take(_take_recording(corpus, source, job.audio / name, name.as_posix(), text))
    for package in corpus.packages:
        notice = raw / f"usr/share/doc/{package}/copyright"
        if notice.exists():
            notice.replace(job.part / f"copyright.{package}")
    shutil.rmtree(raw)


def _wanted(corpus: Packages, name: str) -> bool:
    return _matches(name, corpus.include) and not _matches(name, corpus.exclude)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _read_transcripts(path: Path) -> dict[str, str]:
    """`name: text` lines; a text in brackets tells of a sound, not of words."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        pairs = [line.strip().split(":", 1) for line in file if ":" in line and line[0] != ";"]
    texts = {name.strip(): " ".join(text.split()) for name, text in pairs}
    return {name: text for name, text in texts.items() if text and text[0] not in "[(<"}


def _take_recording(
    corpus: Packages, source: Path, target: Path, name: str, text: str | None
) -> data.Clip | str:
    """Move or decode one file into place; the reason where it cannot be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.suffix in DECODERS:
            target = target.with_suffix(".flac")
            write_audio(target, *DECODERS[source.suffix](source))
        else:
            source.replace(target)
        duration, sample_rate = probe(target)
    except AudioError as error:
        target.unlink(missing_ok=True)
        return str(error)
    speaker, split = speaker_and_split(corpus, name)
    return corpora.clip_of(
        corpus, target, duration, sample_rate, split, speaker=speaker, text=text
    )


def speaker_and_split(corpus: Packages, name: str) -> tuple[str | None, str]:
    """Who speaks in the file `name` (below the corpus's root), and the split that follows."""
    match = re.search(corpus.speaker_pattern, name) if corpus.speaker_pattern else None
    group = match.group(1) if match else None
    split = "train"
    for held_out, groups in (("validation", corpus.validation), ("test", corpus.test)):
        if "*" in groups or group in groups:
            split = held_out
    named = f"{corpus.name}-{group}" if group is not None and corpus.speakers_known else None
    return corpus.speaker or named, split


# ----------------------------------------------------------------------------------------- decoders


def decode_g722(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 16000) of a headerless G.722 file, packet by packet of 20 ms."""
    import av

    context = av.CodecContext.create("g722", "r")
    coded = path.read_bytes()
    packets = [coded[at : at + G722_PACKET] for at in range(0, len(coded), G722_PACKET)]
    frames = [frame for packet in packets for frame in context.decode(av.Packet(packet))]
    samples = [frame.to_ndarray().reshape(-1) for frame in frames]
    if not samples:
        raise AudioError(f"{path}: holds no samples")
    return np.concatenate(samples).astype(np.float32) / 32768, G722_RATE


def decode_gsm(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 8000) of a headerless GSM 06.10 file."""
    return read_audio(path, sample_rate=8000), 8000


def decode_raw(path: Path) -> tuple[np.ndarray, int]:
    """(audio `[T]`, 16000) of a headerless 16-bit file."""
    coded = path.read_bytes()
    return np.frombuffer(coded[: len(coded) // 2 * 2], "<i2").astype(np.float32) / 32768, RAW_RATE


DECODERS: dict[str, Callable] = {
    ".g722": decode_g722,
    ".gsm": decode_gsm,
    ".raw": decode_raw,
}


# ----------------------------------------------------------------------------------------- main


def choose(names: list[str] | None) -> list[Packages]:
    """The rows of these names, all without any. Raises UserError on an unknown one."""
    known = {row.name: row for row in PACKAGES}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise UserError(f"no corpus '{unknown[0]}'; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--corpora", nargs="+", metavar="NAME", help="rows of --list; all by default")
    add("--data_dir", type=Path, default=Path("data"), help="where everything goes")
    add("--list", action="store_true", help="show the table and stop")
    add("--verify", action="store_true", help="check every file on disk and stop")
    add("--json", type=Path, metavar="FILE", help="write what is on disk there too")
    add("--jobs", type=whole(1, 64), default=4, help="corpora side by side")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_args()
    chosen = choose(arguments.corpora)
    if arguments.list:
        download_data.print_list(chosen)
        return 0
    if arguments.json:
        writable_file(arguments.json, "--json")
    if arguments.verify:
        return download_data.report(chosen, arguments)
    arguments.corpora = [row.name for row in chosen]
    with only_one(writable_folder(arguments.data_dir, "--data_dir")):
        return download_data.fetch_missing(chosen, arguments, FetchOptions())


if __name__ == "__main__":
    run(main)
