"""Every kind of corpus, small, from its address to a manifest."""

import io
import json
import re
import shutil
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from test_fetching import (
    Server,
    asked_of,
    coded,
    dies_at,
    killed,
    md5,
    noise,
    server,
    small_disk,
    sphere,
    tar_of,
    zip_of,
)

import corpora
import data
import download_data
from audio import probe
from command import DISK_FULL, UserError
from corpora import FetchOptions

__all__ = ["Server", "server", "small_disk"]  # fixtures, found by name

ROOT = Path(__file__).resolve().parent.parent
ROWS = {row.name: row for row in download_data.CORPORA}


def manifest(folder, row):
    """{path below audio/: clip} of a fetched corpus; every file is there and readable."""
    root = folder / row.place / row.name
    clips = data.read_manifest(root / data.MANIFEST)
    for clip in clips:
        assert probe(clip.path) == (pytest.approx(clip.duration, abs=1e-3), clip.sample_rate)
        assert (clip.language, clip.license) == (row.language, row.license)
        assert clip.commercial_ok == row.commercial_ok
    assert not list((folder / row.place).glob(".*"))
    assert not (folder / ".archives" / row.name).exists()
    return {clip.path.relative_to(root / "audio").as_posix(): clip for clip in clips}


def disjoint(clips):
    """No speaker in two splits."""
    splits = {}
    for clip in clips:
        if clip.speaker:
            assert splits.setdefault(clip.speaker, clip.split) == clip.split
    return True


# ------------------------------------------------------------------------------------- archives


def stem(archive):
    return re.sub(r"\.(tar\.gz|tar|zip)$", "", archive.name)


def archive_files(row):
    """{archive name: {member: bytes}} of a small corpus laid out like the real one."""
    wav, flac, mp3 = coded(".wav"), coded(".flac"), coded(".mp3", rate=8000)
    if row.layout == "librispeech":
        return {
            a.name: {
                f"LibriSpeech/{stem(a)}/{n}/7/{n}-7-0000.flac": flac,
                f"LibriSpeech/{stem(a)}/{n}/7/{n}-7.trans.txt": f"{n}-7-0000 HELLO YOU\n".encode(),
            }
            for n, a in enumerate(row.archives, start=100)
        }
    if row.layout == "libritts":
        return {
            a.name: {
                f"LibriTTS_R/{stem(a)}/{n}/7/{n}_7_000001_000000.wav": coded(".wav", rate=24000),
                f"LibriTTS_R/{stem(a)}/{n}/7/{n}_7_000001_000000.normalized.txt": b"Hello, you.\n",
                f"LibriTTS_R/{stem(a)}/{n}/7/{n}_7_000001_000000.original.txt": b"Hello, you.\n",
            }
            for n, a in enumerate(row.archives, start=100)
        }
    if row.layout == "librilight":
        book = "small/100/a_book"
        return {"small.tar": {f"{book}/ch_01.flac": coded(".flac", 2), f"{book}/x.json": b"{}"}}
    if row.layout == "transcription":
        return {
            a.name: {
                f"{part}/audio/{n}_001.wav": coded(".wav", rate=8000),
                f"{part}/transcription.txt": f"{n}_001 नमस्ते जी\n".encode(),
            }
            for a, part, n in zip(row.archives, ("train", "test"), ("0116", "0200"), strict=True)
        }
    if row.layout == "kaldi":
        return {
            a.name: {
                f"{stem(a)}/Audio/02-1718{n}-01.mp3": mp3,
                f"{stem(a)}/text": f"02-1718{n}-01 हेलो\n".encode(),
            }
            for n, a in enumerate(row.archives)
        }
    if row.layout == "line_index":
        return {
            a.name: {
                f"{sex}_0043{n}_0011.wav": coded(".wav", rate=48000),
                "line_index.tsv": f"{sex}_0043{n}_0011\tనమస్కారం\n".encode(),
            }
            for n, (a, sex) in enumerate(zip(row.archives, ("tef", "tem"), strict=True))
        }
    return {
        row.archives[0].name: {
            f"Actor_{actor}/03-01-0{felt}-01-02-01-{actor}.wav": wav
            for actor, felt in (("01", 5), ("02", 2))
        }
    }


def served(server, row, files=None):
    """The row, its small archives on the server, each with its true checksum."""
    files = files or archive_files(row)
    archives = []
    for archive in row.archives:
        body = files[archive.name]
        if isinstance(body, dict):
            body = zip_of(body) if archive.name.endswith(".zip") else tar_of(
                body, archive.name.endswith("gz")
            )
        server.files[f"/{archive.name}"] = body
        archives.append(replace(archive, checksum=md5(body) if archive.checksum else ""))
    return replace(row, archives=tuple(archives), bases=(f"{server.url}/gone", server.url))


ARCHIVE_ROWS = [row for row in ROWS.values() if isinstance(row, corpora.Archives)]
EXPECTED = {
    "librispeech": ({"librivox-100", "librivox-101", "librivox-102"}, "hello you", ".flac"),
    "librilight-small": ({"librivox-100"}, None, ".flac"),
    "libritts-r": ({"librivox-100", "librivox-101", "librivox-102"}, "Hello, you.", ".flac"),
    "openslr-103": ({"openslr-103-0116", "openslr-103-0200"}, "नमस्ते जी", ".flac"),
    "gramvaani": ({None}, "हेलो", ".mp3"),
    "openslr-66": ({"tef-00430", "tem-00431"}, "నమస్కారం", ".flac"),
    "ravdess": ({"ravdess-01", "ravdess-02"}, "Dogs are sitting by the door.", ".flac"),
}


@pytest.mark.parametrize("row", ARCHIVE_ROWS, ids=lambda row: row.name)
def test_every_corpus_of_archives(server, tmp_path, row):
    small = served(server, row)
    assert corpora.fetch(small, tmp_path)
    found = manifest(tmp_path, small)
    speakers, text, suffix = EXPECTED[row.name]
    assert {clip.speaker for clip in found.values()} == speakers
    assert {clip.text for clip in found.values()} == {text}
    assert {clip.path.suffix for clip in found.values()} == {suffix}
    assert {name.split("/")[0] for name in found} == {stem(a) for a in row.archives}
    assert disjoint(found.values())
    if row.name == "ravdess":
        assert {clip.emotion for clip in found.values()} == {"angry", "calm"}
    assert not corpora.fetch(small, tmp_path)
    asked = len(server.log)
    assert not corpora.needs_fetching(small, tmp_path, FetchOptions()) and len(server.log) == asked


def test_crema_d_as_its_authors_ship_it(server, tmp_path):
    files = {f"CREMA-D/AudioWAV/{n}_DFA_ANG_XX.wav": coded(".wav") for n in (1001, 1002)}
    files["CREMA-D/AudioWAV/other.wav"] = coded(".wav")
    row = replace(ROWS["ravdess"], name="crema-d", layout="crema_d")
    row = served(server, row, {row.archives[0].name: files})
    corpora.fetch(row, tmp_path)
    found = {(c.speaker, c.text, c.emotion) for c in manifest(tmp_path, row).values()}
    assert found == {(f"crema-d-{n}", "Don't forget a jacket.", "angry") for n in (1001, 1002)}


def test_the_same_libri_reader_is_in_one_split_everywhere(server, tmp_path):
    clips = []
    for name in ("librispeech", "librilight-small", "libritts-r"):
        row = served(server, ROWS[name])
        corpora.fetch(row, tmp_path)
        clips += manifest(tmp_path, row).values()
    assert disjoint(clips) and len({clip.speaker for clip in clips}) == 3


def test_wav_stays_where_it_is_wanted(server, tmp_path):
    row = served(server, ROWS["openslr-66"])
    corpora.fetch(row, tmp_path, FetchOptions(keep_wav=True))
    paths = [clip.path for clip in manifest(tmp_path, row).values()]
    assert {path.read_bytes() for path in paths} == {coded(".wav", rate=48000)}


def test_archives_are_taken_whole_up_to_max_hours_and_go_on_later(server, tmp_path):
    row = served(server, ROWS["librispeech"])
    corpora.fetch(row, tmp_path, FetchOptions(max_hours=100))
    assert len(manifest(tmp_path, row)) == 1
    record = corpora.read_record(tmp_path / "english/librispeech")
    assert not record["whole"] and record["max_hours"] == 100
    assert not corpora.fetch(row, tmp_path, FetchOptions(max_hours=50))
    assert corpora.fetch(row, tmp_path)
    assert len(manifest(tmp_path, row)) == 3
    assert sum(path == "/train-clean-100.tar.gz" for path, _ in server.log) == 1


def test_a_process_killed_in_mid_archive_goes_on(server, tmp_path):
    files = {f"LibriSpeech/a/{n}/1/{n}-1-0.flac": coded(".flac", hertz=200 + n) for n in range(9)}
    row = replace(ROWS["librispeech"], archives=ROWS["librispeech"].archives[:1])
    row = served(server, row, {row.archives[0].name: files})
    server.cuts = [1000]

    def fetch():
        dies_at(shutil, "copyfileobj", 6)
        corpora.fetch(row, tmp_path)

    killed(fetch)
    assert not (tmp_path / "english/librispeech").exists()
    # What the killed run left is hidden from a scan, and the archive is still there.
    with pytest.raises(UserError, match="no readable audio"):
        data.load_clips([tmp_path / "english"], "train")
    assert (tmp_path / ".archives/librispeech/train-clean-100.tar.gz").exists()
    asked = len(server.log)
    corpora.fetch(row, tmp_path)
    found = manifest(tmp_path, row)
    assert len(found) == 9 and len(server.log) == asked
    written = {p.name: p.read_bytes() for p in (tmp_path / "english").rglob("*.flac")}
    assert written == {Path(name).name: body for name, body in files.items()}


def test_a_damaged_archive_without_checksum_is_fetched_anew(server, tmp_path):
    row = served(server, ROWS["openslr-103"])
    whole = server.files["/Hindi_train.tar.gz"]
    server.files["/Hindi_train.tar.gz"] = whole[:-30]
    with pytest.raises(UserError, match="damaged.*removed: run again to fetch it anew"):
        corpora.fetch(row, tmp_path)
    server.files["/Hindi_train.tar.gz"] = whole
    assert corpora.fetch(row, tmp_path)
    assert len(manifest(tmp_path, row)) == 2


@pytest.mark.parametrize("member", ["../../out.wav", "/tmp/out.wav"])
def test_an_archive_that_would_escape_is_one_line(server, tmp_path, member):
    body = tar_of({"fine.wav": coded(".wav"), member: b"x"})
    row = replace(ROWS["openslr-103"], archives=ROWS["openslr-103"].archives[:1])
    row = served(server, row, {row.archives[0].name: body})
    with pytest.raises(UserError, match="points outside its folder") as caught:
        corpora.fetch(row, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("out.wav")) and not list(tmp_path.rglob("fine.wav"))


def test_unreadable_files_are_counted_and_listed(server, tmp_path, capsys):
    files = archive_files(ROWS["openslr-103"])
    files["Hindi_train.tar.gz"]["train/audio/0116_002.wav"] = b"no audio"
    row = served(server, ROWS["openslr-103"], files)
    corpora.fetch(row, tmp_path)
    assert len(data.read_manifest(tmp_path / "hindi/openslr-103/manifest.jsonl")) == 2
    assert "0116_002" in (tmp_path / "hindi/openslr-103/unreadable.txt").read_text()
    assert "1 files left out" in capsys.readouterr().err


def test_words_keep_their_joiners_and_lines_end_at_line_feeds_alone(server, tmp_path):
    said = "సాఫ్ట్\u200cవేర్ बिल्\u200dकुल"
    files = archive_files(ROWS["openslr-103"])
    for members in files.values():
        path = next(path for path in members if path.endswith(".txt"))
        key = members[path].split(b" ")[0].decode()
        members[path] = f"{key} {said}\u2028next\x85\r\n".encode() + b"0999_001 \xff\xfe\n"
    row = served(server, ROWS["openslr-103"], files)
    corpora.fetch(row, tmp_path)
    assert {clip.text for clip in manifest(tmp_path, row).values()} == {f"{said}\u2028next"}
    tagged = corpora._clean(f"<noise> {said} [x] {{gloss}}", True)
    assert tagged == said and corpora._clean(7, True) is None


def test_files_named_otherwise_give_no_speaker_and_are_told(server, tmp_path, capsys):
    flac, wav = coded(".flac"), coded(".wav")
    files = {f"LibriSpeech/a/7/8/{n}.flac": flac for n in ("7-8-0000", "2026-03-11_call", "2026")}
    row = replace(ROWS["librispeech"], archives=ROWS["librispeech"].archives[:1])
    row = served(server, row, {row.archives[0].name: files})
    corpora.fetch(row, tmp_path)
    speakers = {clip.path.stem: clip.speaker for clip in manifest(tmp_path, row).values()}
    assert speakers == {"7-8-0000": "librivox-7", "2026-03-11_call": None, "2026": None}
    row = ROWS["ravdess"]
    files = {f"Actor_01/{n}.wav": wav for n in ("03-01-05-01-02-01-01", "03-01-09-01-07-01-01")}
    row = served(server, row, {row.archives[0].name: files})
    corpora.fetch(row, tmp_path)
    (clip,) = manifest(tmp_path, row).values()
    assert (clip.speaker, clip.emotion) == ("ravdess-01", "angry")
    assert "1 files left out, in no list, or named otherwise" in capsys.readouterr().out


def test_aiff_in_an_archive_is_a_clip(server, tmp_path):
    files = archive_files(ROWS["openslr-103"])
    files["Hindi_train.tar.gz"]["train/audio/0116_002.AIF"] = coded(".aiff")
    row = served(server, ROWS["openslr-103"], files)
    corpora.fetch(row, tmp_path)
    assert {path.rpartition("/")[2] for path in manifest(tmp_path, row)} == {
        "0116_001.flac", "0116_002.flac", "0200_001.flac",
    }  # fmt: skip


def test_a_full_disk_is_one_line_and_no_loss(server, small_disk):
    folder = small_disk(260)
    files = {f"a/{n}-1-0.flac": coded(".flac", hertz=200 + n) + noise(30_000, n) for n in range(5)}
    row = replace(ROWS["librispeech"], archives=ROWS["librispeech"].archives[:1])
    row = served(server, row, {row.archives[0].name: files})
    with pytest.raises(OSError) as caught:
        corpora.fetch(row, folder / "data")
    line = download_data._reason(row.name, caught.value, folder / "log")
    assert line.endswith("disk is full; free some space and run again; the same command goes on")
    small_disk(4000)
    corpora.fetch(row, folder / "data")
    written = {p.name: p.read_bytes() for p in (folder / "data").rglob("*.flac")}
    assert written == {Path(name).name: body for name, body in files.items()}


def test_common_voice_by_mozillas_client(tmp_path, monkeypatch):
    row = ROWS["common-voice-telugu"]
    header = "client_id\tpath\tsentence\tup_votes\n"
    rows = "ann0123456789abcdefgh\tcv_1.mp3\tఒక \"మాట\n\t2\n".replace("\n\t", "\t")
    body = tar_of(
        {
            "cv-corpus-23.0/te/clips/cv_1.mp3": coded(".mp3", rate=48000),
            "cv-corpus-23.0/te/clips/cv_2.mp3": coded(".mp3", rate=48000),
            "cv-corpus-23.0/te/validated.tsv": (header + rows).encode(),
        }
    )

    def download_dataset(dataset, download_directory):
        assert dataset == "cmabc"
        path = Path(download_directory) / "te.tar.gz"
        path.write_bytes(body)
        return str(path)

    options = FetchOptions(cv_dataset_ids={"telugu": "cmabc"})
    monkeypatch.delenv("MDC_API_KEY", raising=False)
    with pytest.raises(UserError, match="MDC_API_KEY"):
        corpora.fetch(row, tmp_path, options)
    monkeypatch.setenv("MDC_API_KEY", "key")
    monkeypatch.setitem(sys.modules, "datacollective", None)
    with pytest.raises(UserError, match="pip install datacollective"):
        corpora.fetch(row, tmp_path, options)
    module = types.SimpleNamespace(download_dataset=download_dataset)
    monkeypatch.setitem(sys.modules, "datacollective", module)
    assert corpora.fetch(row, tmp_path, options)
    (clip,) = manifest(tmp_path, row).values()
    assert (clip.speaker, clip.text) == ("common-voice-ann0123456789abc", 'ఒక "మాట')
    with pytest.raises(UserError, match="--cv_dataset_id hindi=ID"):
        corpora.fetch(ROWS["common-voice-hindi"], tmp_path, options)


# ------------------------------------------------------------------------- Hugging Face datasets

HUB_ROWS = [row for row in ROWS.values() if isinstance(row, corpora.Hub)]


def hub_rows(row, count=6, suffix=".flac", seconds=0.3):
    """Rows with the columns of the real corpus."""
    rows = []
    for n in range(count):
        body = coded(suffix, seconds, hertz=200 + 10 * n)
        name, audio = row.name.rsplit("-", 1)[0], {"bytes": body, "path": f"a{n}{suffix}"}
        if name == "shrutilipi":
            audio["path"] = f"newsonair_{n // 3}_sent_{n}.wav"
            rows.append({"audio_filepath": audio, "text": f"text {n}", "duration": 0.3})
        elif name in ("indicvoices", "kathbath"):
            more = {"lang": "x", "duration": 0.3, "gender": "F", "speaker_id": f"S{n // 2}"}
            rows.append({"audio_filepath": audio, "text": f"text {n}", **more})
        elif name == "vaani":
            rows.append(
                {
                    "audio": audio,
                    "language": "Telugu" if n else "Urdu",
                    "gender": "Male",
                    "state": "AndhraPradesh",
                    "district": "Guntur",
                    "pincode": 522000 + n // 3,
                    "isTranscriptionAvailable": "Yes" if n == 1 else "No",
                    "transcript": "<noise> text  {one} 1 --" if n == 1 else None,
                    "referenceImage": "i.jpg",
                }
            )
        elif name == "rasa":
            style = ("HAPPY", "ANGER", "SURPRISE", "WIKI", "NEWS", "SAD")[n % 6]
            rows.append(
                {"filename": f"f{n}", "text": f"text {n}", "gender": "Female", "style": style,
                 "duration": 0.3, "audio": audio}
            )
        elif name == "crema":
            files = "1001_IEO_NEU_XX", "1001_DFA_ANG_HI", "1002_TSI_FEA_XX", "1003_ITS_SAD_XX"
            rows.append({"file": f"{files[n % 4]}.wav", "audio": audio, "transcription": "text"})
        elif name == "indictts":
            rows.append({"audio": audio, "text": f"text {n}", "gender": n % 2})
        else:
            rows.append(
                {"id": n, "num_samples": 4800, "path": "p", "audio": audio, "gender": 1,
                 "transcription": f"text {n}", "raw_transcription": "T", "lang_id": 1}
            )
    return rows


def parquet(rows, group=2):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


def dataset(row, **more):
    """{path: bytes} of a small dataset laid out like the real one."""
    files = {}
    for folder in row.folders:
        if row.official_splits:
            names = [f"{folder}/{split}/0000.parquet" for split in ("train", "validation", "test")]
        else:
            names = [f"{folder}/train-0000{n}-of-00002.parquet" for n in range(2)]
        files |= {name: parquet(hub_rows(row, **more)) for name in names}
    return files


@pytest.mark.parametrize("row", HUB_ROWS, ids=lambda row: row.name)
def test_every_corpus_of_the_hub(server, tmp_path, row):
    files = dataset(row)
    server.add_dataset(row.repo, files, row.revision)
    assert corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    found = manifest(tmp_path, row)
    vaani = row.keep is not None
    assert len(found) == len(files) * (5 if vaani or row.style else 6)  # one row is no emotion
    assert disjoint(found.values())
    for name, clip in found.items():
        shard, number = re.sub(r"/\d+\.flac$", ".parquet", name), int(clip.path.stem)
        source = hub_rows(row)[number]
        assert shard in files and clip.path.read_bytes() == source[row.audio]["bytes"]
        if not vaani and row.text in source:
            assert clip.text == source[row.text]
    texts = {clip.text for clip in found.values()}
    speakers = {clip.speaker for clip in found.values()}
    if vaani:
        assert texts == {"text 1", None} and speakers == {None}
        assert len({clip.split for clip in found.values() if int(clip.path.stem) >= 3}) == 1
    elif row.name.startswith("rasa"):
        assert {c.emotion for c in found.values()} == {
            "happy", "angry", "surprise", "neutral", "sad",
        }
        assert speakers == {f"{row.name}-female"}
        assert {clip.split for clip in found.values()} == {"train"}
    elif row.name == "crema-d":
        assert {(c.speaker, c.emotion, c.text) for c in found.values()} == {
            ("crema-d-1001", "neutral", "It's eleven o'clock."),
            ("crema-d-1001", "angry", "Don't forget a jacket."),
            ("crema-d-1002", "fear", "The surface is slick."),
            ("crema-d-1003", "sad", "I think I've seen this before."),
        }
    elif row.official_splits:
        assert {name.split("/")[1]: c.split for name, c in found.items()} == {
            "train": "train", "validation": "validation", "test": "test",
        }
    elif row.speakers == ("speaker_id",):
        assert speakers == {f"{row.name}-s{n}" for n in range(3)}


STYLES = {"HAPPY": "happy", "SAD": "sad", "ANGER": "angry", "FEAR": "fear", "DISGUST": "disgust",
          "SURPRISE": "surprise", "WIKI": "neutral", "INDIC": "neutral",
          "PROPER NOUN": "neutral"}  # fmt: skip


def rasa_rows(sexes="FM", styles=STYLES, language="TEL"):
    """Rows as Rasa has them: a voice a sex, named by it."""
    rows = []
    for n, (sex, style) in enumerate((sex, style) for sex in sexes for style in styles):
        body = coded(".wav", rate=48000, hertz=200 + 10 * n)
        rows.append({
            "filename": f"{language}_{sex}_{style}_{n:05d}", "text": f"text {n}", "language": "te",
            "gender": {"F": "Female", "M": "Male"}[sex], "style": style, "duration": "0.30",
            "audio": {"bytes": body, "path": f"{language}_{sex}_{style}_{n:05d}.wav"},
        })  # fmt: skip
    return rows


def test_rasa_as_its_owners_ship_it(server, tmp_path, capsys):
    row = ROWS["rasa-telugu"]
    odd = rasa_rows("F", [*("ALEXA", "NEWS", "CONV") * 2, "BOOK", "HAPPY", "SAD", "FEAR", "ANGER"])
    odd += rasa_rows("M", ["SAD", "FEAR", "DISGUST", "HAPPY"])
    cut = coded(".flac")[:1000]
    stereo = io.BytesIO()
    soundfile.write(stereo, np.full((4800, 2), 0.1), 16000, format="WAV")
    odd[7]["audio"]["bytes"], odd[8]["audio"]["bytes"] = None, b"RIFF no sound"
    odd[9]["text"], odd[10]["audio"]["bytes"] = "", stereo.getvalue()
    odd[11]["gender"], odd[12]["style"], odd[13]["audio"]["bytes"] = "", None, cut
    server.add_dataset(row.repo, {
        "Telugu/train-00000-of-00001.parquet": parquet(rasa_rows()),
        "Telugu/test-00000-of-00001.parquet": parquet(odd),
        "Hindi/train-00000-of-00001.parquet": parquet(rasa_rows("M", language="HIN")),
    })  # fmt: skip
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    told = capsys.readouterr().err
    for label in ("alexa", "conv", "news"):
        assert f"2: no emotion of ours is called '{label}'" in told
    listed = (tmp_path / "emotion/rasa-telugu/unreadable.txt").read_text()
    for row_number, reason in enumerate(
        ["no audio", "", None, None, "nobody is named", "called 'none'", "", None], start=7
    ):
        assert (reason is not None) == (f"row {row_number}: " in listed)
        assert reason is None or re.search(f"row {row_number}: .*{reason}", listed)
    found = manifest(tmp_path, row)
    counts = Counter((clip.speaker, clip.emotion) for clip in found.values())
    for sex in ("female", "male"):
        for emotion in set(STYLES.values()):
            counts[f"rasa-telugu-{sex}", emotion] -= list(STYLES.values()).count(emotion)
    assert {key: n for key, n in counts.items() if n} == {
        ("rasa-telugu-female", "fear"): 1, ("rasa-telugu-female", "angry"): 1,
        ("rasa-telugu-male", "happy"): 1,
    }  # fmt: skip
    extra = [clip for name, clip in found.items() if "/test-" in name]
    said = {(clip.text, clip.sample_rate) for clip in extra}
    assert said == {(None, 48000), ("text 10", 16000), ("text 3", 48000)}
    # A shard without the column of styles is another layout, and no shard of neutral speech.
    rows = [{k: v for k, v in one.items() if k != "style"} for one in rasa_rows("F")]
    server.add_dataset(row.repo, {"Telugu/0.parquet": parquet(rows)})
    with pytest.raises(UserError, match="no column style; now has"):
        corpora.fetch(row, tmp_path / "b", FetchOptions(mirrors={row.name: server.url}))


def test_rasa_that_is_not_opened_to_one_is_a_line(server, tmp_path):
    row = ROWS["rasa-telugu"]
    server.add_dataset(row.repo, {"Telugu/train-00000-of-00001.parquet": parquet(rasa_rows("F"))})
    server.gated = {row.repo}
    for fetch in (
        lambda: download_data.check_access([row], {row.name: server.url}),
        lambda: corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url})),
    ):
        with pytest.raises(UserError, match="licence at https://.*ai4bharat/Rasa") as caught:
            fetch()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "emotion/rasa-telugu").exists()


def test_a_local_folder_laid_out_like_the_dataset(tmp_path):
    row = ROWS["kathbath-hindi"]
    for name, body in dataset(row).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(body)
    options = FetchOptions(mirrors={row.name: str(tmp_path / "copy")})
    assert corpora.fetch(row, tmp_path / "data", options)
    assert len(manifest(tmp_path / "data", row)) == 12
    assert len(list((tmp_path / "copy/hindi").iterdir())) == 2
    with pytest.raises(UserError, match="copy: no .parquet files in 'telugu'"):
        corpora.fetch(
            ROWS["kathbath-telugu"], tmp_path / "data",
            FetchOptions(mirrors={"kathbath-telugu": str(tmp_path / "copy")}),
        )


def test_a_process_killed_in_mid_shard_goes_on_with_that_shard(server, tmp_path):
    row = ROWS["indicvoices-telugu"]
    rows = hub_rows(row, count=90, suffix=".wav")
    files = {f"telugu/{n}.parquet": parquet(rows[n * 45 : (n + 1) * 45]) for n in range(2)}
    server.add_dataset(row.repo, files)
    options = FetchOptions(mirrors={row.name: server.url})
    server.cuts = [5000]

    def fetch():
        dies_at(corpora, "probe", 80)
        corpora.fetch(row, tmp_path, options)

    killed(fetch)
    part = tmp_path / "telugu/.indicvoices-telugu.part"
    assert [path.name for path in (part / ".shards").iterdir()] == ["telugu__0.parquet.jsonl"]
    first = {path: path.stat().st_mtime_ns for path in part.rglob("telugu/0/*")}
    (part / "audio/telugu/1/000099.flac").write_bytes(b"torn")
    asked = len(server.log)
    corpora.fetch(row, tmp_path, options)
    found = manifest(tmp_path, row)
    assert len(first) == 45 and len(found) == 90
    assert len(list((tmp_path / "telugu").rglob("*.flac"))) == 90
    for name, clip in found.items():
        _, shard, number = name.removesuffix(".flac").split("/")
        source = rows[int(shard) * 45 + int(number)]
        assert (clip.text, clip.speaker) == (
            source["text"], f"{row.name}-{source['speaker_id'].lower()}",
        )
        audio, _ = soundfile.read(clip.path, dtype="int16")
        wav, _ = soundfile.read(io.BytesIO(source[row.audio]["bytes"]), dtype="int16")
        np.testing.assert_array_equal(audio, wav)
    # What was finished was not written again, and no shard was fetched again.
    folder = tmp_path / "telugu/indicvoices-telugu"
    now = {path: (folder / path.relative_to(part)).stat().st_mtime_ns for path in first}
    assert now == first and not any("resolve" in path for path, _ in server.log[asked:])


def test_a_disk_that_fills_in_mid_shard_is_one_line_and_no_loss(server, small_disk):
    folder = small_disk(200)
    row = ROWS["kathbath-hindi"]
    rows = hub_rows(row, count=20)
    for n, one in enumerate(rows):
        one["audio_filepath"]["bytes"] += noise(10_000, n)
    copy = folder.parent / "copy/hindi"
    copy.mkdir(parents=True)
    (copy / "train-0.parquet").write_bytes(parquet(rows))
    options = FetchOptions(mirrors={row.name: str(copy.parent)})
    with pytest.raises(OSError) as caught:
        corpora.fetch(row, folder / "data", options)
    assert caught.value.errno in DISK_FULL
    small_disk(4000)
    corpora.fetch(row, folder / "data", options)
    found = manifest(folder / "data", row).values()
    assert {int(clip.path.stem): clip.path.read_bytes() for clip in found} == {
        n: one["audio_filepath"]["bytes"] for n, one in enumerate(rows)
    }


def test_max_hours_ends_within_a_shard_and_goes_on_later(server, tmp_path):
    row = ROWS["shrutilipi-telugu"]
    server.add_dataset(row.repo, dataset(row, count=40))
    mirrors = {row.name: server.url}
    few = FetchOptions(mirrors=mirrors, max_hours=0.3 * 3.5 / 3600)
    corpora.fetch(row, tmp_path, few)
    # Rows come 32 at a time.
    assert len(manifest(tmp_path, row)) == 32
    assert len(list((tmp_path / "telugu").rglob("*.flac"))) == 32
    assert download_data.verify(row, tmp_path)["state"] == "ok"
    assert not corpora.fetch(row, tmp_path, few)
    assert corpora.fetch(row, tmp_path, FetchOptions(mirrors=mirrors))
    found = manifest(tmp_path, row)
    assert len(found) == 80
    # Bulletins stay together.
    splits = {}
    for clip in found.values():
        assert splits.setdefault(int(clip.path.stem) // 3, clip.split) == clip.split


def test_a_damaged_shard_and_changed_columns_are_one_line(server, tmp_path):
    row = ROWS["kathbath-hindi"]
    options = FetchOptions(mirrors={row.name: server.url})
    good = parquet(hub_rows(row))
    server.add_dataset(row.repo, {"hindi/train-0.parquet": good[:-100]})
    with pytest.raises(UserError, match="damaged.*run again to fetch it anew"):
        corpora.fetch(row, tmp_path, options)
    other = parquet([{"audio": {"bytes": b"x", "path": "p"}, "sentence": "s"}])
    server.add_dataset(row.repo, {"hindi/train-0.parquet": other})
    with pytest.raises(UserError, match="no column audio_filepath.*now has audio, sentence"):
        corpora.fetch(row, tmp_path, options)
    server.add_dataset(row.repo, {"hindi/train-0.parquet": good})
    shutil.rmtree(tmp_path / ".archives")
    assert corpora.fetch(row, tmp_path, options)
    server.add_dataset(row.repo, {"elsewhere/train-0.parquet": good})
    with pytest.raises(UserError, match="ai4bharat/Kathbath: it has changed"):
        corpora.fetch(
            ROWS["kathbath-telugu"], tmp_path, FetchOptions(mirrors={"kathbath-telugu": server.url})
        )


def test_rows_without_readable_audio_are_left_out_and_listed(server, tmp_path):
    row = ROWS["kathbath-hindi"]
    rows = hub_rows(row)
    rows[1]["audio_filepath"]["bytes"] = None
    rows[2]["audio_filepath"]["bytes"] = b"no audio at all"
    rows[3]["audio_filepath"]["bytes"] = rows[3]["audio_filepath"]["bytes"][:60]
    server.add_dataset(row.repo, {"hindi/train-0.parquet": parquet(rows)})
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    numbers = [int(clip.path.stem) for clip in manifest(tmp_path, row).values()]
    assert sorted(numbers) == [0, 4, 5]
    listed = (tmp_path / "hindi/kathbath-hindi/unreadable.txt").read_text().splitlines()
    assert len(listed) == 3 and "row 1: no audio" in listed[0]


def test_columns_of_another_type_are_no_traceback(server, tmp_path):
    row = ROWS["kathbath-hindi"]
    body = coded(".flac")
    odd = [
        {"audio_filepath": body, "text": 5, "speaker_id": 1.5},
        {"audio_filepath": body, "text": 6, "speaker_id": float("nan")},
    ]
    files = {"hindi/a.parquet": parquet(odd)}
    files["hindi/b.parquet"] = parquet([{"audio_filepath": "a path", "text": ["x"]}])
    files["hindi/c.parquet"] = parquet([{"audio_filepath": {"bytes": "text", "path": 3}}])
    server.add_dataset(row.repo, files)
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    found = manifest(tmp_path, row).values()
    assert [(clip.speaker, clip.text) for clip in found] == [
        ("kathbath-hindi-1.5", None), (None, None),
    ]
    listed = (tmp_path / "hindi/kathbath-hindi/unreadable.txt").read_text()
    assert listed.count("no audio") == 2


@pytest.mark.parametrize("line", ["[1]", "3", '{"path": 3}', '{"path": "audio/x", "dur'])
def test_a_shard_whose_manifest_is_damaged_is_fetched_anew(server, tmp_path, line):
    row = ROWS["kathbath-hindi"]
    server.add_dataset(row.repo, {"hindi/a.parquet": parquet(hub_rows(row, 2))})
    done = tmp_path / "hindi/.kathbath-hindi.part/.shards/hindi__a.parquet.jsonl"
    done.parent.mkdir(parents=True)
    done.write_text(f"{line}\n")
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    assert len(manifest(tmp_path, row)) == 2


def test_a_shard_without_a_row_of_interest_and_one_that_is_named_otherwise(server, tmp_path):
    row = ROWS["vaani-telugu"]
    rows = hub_rows(row)
    files = {"audio/Telangana/0.parquet": parquet(rows[:1])}
    files |= {f"audio/AndhraPradesh/{n}.parquet": parquet(rows[1:]) for n in range(2)}
    server.add_dataset(row.repo, files)
    options = FetchOptions(mirrors={row.name: server.url}, max_hours=0.3 * 9 / 3600)
    assert corpora.fetch(row, tmp_path, options) and len(manifest(tmp_path, row)) == 10
    options = FetchOptions(mirrors={row.name: server.url})
    assert corpora.fetch(row, tmp_path, options) and len(manifest(tmp_path, row)) == 10
    row = ROWS["crema-d"]
    rows = hub_rows(row)
    rows[2]["file"] = "other.wav"
    server.add_dataset(row.repo, {"data/0.parquet": parquet(rows)})
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    assert len(manifest(tmp_path, row)) == 5
    assert "row 2: 'other' is named" in (tmp_path / "emotion/crema-d/unreadable.txt").read_text()


def test_vaani_is_whatever_districts_the_dataset_has_now(server, tmp_path):
    row = ROWS["vaani-telugu"]
    body = parquet(hub_rows(row))
    new = {
        "audio/Telangana/Hyderabad/0.parquet": body,
        "audio/AndhraPradesh/Guntur/0.parquet": body,
        "audio/Karnataka/Kolar/0.parquet": body,
    }
    server.add_dataset(row.repo, new)
    assert corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    districts = {path.split("/")[2] for path in manifest(tmp_path, row)}
    assert districts == {"Hyderabad", "Guntur"}
    for name, content in new.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True)
        (tmp_path / "copy" / name).write_bytes(content)
    found = corpora.shards_of(row, str(tmp_path / "copy"))
    assert {shard.path for shard in found} == set(list(new)[:2])
    # A state that is not there under that name.
    server.add_dataset(row.repo, {name: body for name in list(new)[:1]})
    with pytest.raises(UserError, match="ARTPARK-IISc/Vaani: it has changed"):
        corpora.shards_of(row, server.url)


def test_rows_land_with_few_questions_to_the_disk(server, tmp_path, monkeypatch):
    row = ROWS["kathbath-hindi"]
    server.add_dataset(row.repo, {"hindi/a.parquet": parquet(hub_rows(row, 40, ".wav", 0.1))})
    asked = asked_of(monkeypatch)
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    # A clip is opened to be written, and to be probed: nothing else.
    assert not [one for one in asked if ".flac" in one or ".wav" in one]


def test_bytes_alone_are_taken_too(server, tmp_path):
    row = ROWS["shrutilipi-hindi"]
    rows = [{**one, "audio_filepath": one["audio_filepath"]["bytes"]} for one in hub_rows(row)]
    server.add_dataset(row.repo, {"hindi/train-0.parquet": parquet(rows)})
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    assert len(manifest(tmp_path, row)) == 6


# -------------------------------------------------------------------------------- conversations


def test_behavior_sd_becomes_conversations(server, tmp_path):
    row = ROWS["behavior-sd"]
    stereo = io.BytesIO()
    soundfile.write(stereo, np.zeros((22050, 2)), 22050, format="FLAC")
    about = {
        "utterances": [
            {"speaker_idx": 0, "tts_text": "Hi.", "start_time": 0.0, "end_time": 0.4,
             "backchannels": [{"tts_text": "yeah", "start_time": 0.2, "end_time": 0.3}]},
            {"speaker_idx": 1, "tts_text": "Hello.", "start_time": 0.5, "end_time": 0.9},
        ]
    }
    said = {"speaker_idx": 0, "start_time": 0, "end_time": 1}
    spoilt = [3], [{**said, "speaker_idx": "0"}], [{**said, "end_time": float("nan")}]
    odd = [[], *({"utterances": utterances} for utterances in spoilt)]
    bodies = {"0000000004.flac": stereo.getvalue(), "0000000004.json": json.dumps(about).encode()}
    for at, one in enumerate(odd):
        bodies |= {f"{at}.flac": stereo.getvalue(), f"{at}.json": json.dumps(one).encode()}
    splits = ("train", "validation", "test")
    server.add_dataset(row.repo, {f"{split}/0001.tar": tar_of(bodies, False) for split in splits})
    options = FetchOptions(mirrors={row.name: server.url})
    assert corpora.fetch(row, tmp_path, options)
    folder = tmp_path / "conversations/behavior-sd"
    listed = (folder / corpora.UNREADABLE).read_text().splitlines()
    names = [f"{split}/0001/{at}.flac: " for split in splits for at in range(len(odd))]
    assert all(name in line for name, line in zip(names, listed, strict=True))
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == list(splits)
    assert len({line["id"] for line in lines}) == 3
    assert [(t["who"], t["text"]) for t in lines[0]["turns"]] == [
        ("agent", "Hi."), ("user", "yeah"), ("user", "Hello."),
    ]
    assert all((folder / line["path"]).exists() for line in lines)
    import dialogues

    recordings = dialogues.read_recordings(folder)
    assert len(recordings) == 3 and recordings[0].source == "behavior-sd"
    found = download_data.verify(replace(row, hours=3 / 3600), tmp_path)
    assert (found["state"], found["files"]) == ("ok", 3)
    assert found["hours_by_sample_rate"] == {"22050": pytest.approx(3 / 3600, abs=1e-4)}


def test_fisher_as_the_ldc_ships_it(tmp_path):
    row, ldc = ROWS["fisher"], tmp_path / "ldc"
    calls = ldc / "fisher_eng_tr_sp_d1/audio/000"
    calls.mkdir(parents=True)
    tone = (np.arange(8000) % 100 * 50).astype("<i2")
    (calls / "fe_03_00001.sph").write_bytes(sphere(np.stack([tone, -tone], axis=1)))
    (calls / "fe_03_00002.sph").write_bytes(b"damaged")
    (calls / "fe_03_00003.sph").write_bytes(b"NIST_1A\n  many\nchannel_count -i two\nend_head\n")
    texts = ldc / "fe_03_p1_tran/data/trans/000"
    texts.mkdir(parents=True)
    (texts / "fe_03_00001.txt").write_text(
        "# fe_03_00001.sph\n\n1.2.3 4 A: no time\n"
        "0.10 0.50 A: hello\u2028there\n0.60 0.90 B: hi ((you))\n"
    )
    assert corpora.fetch(row, tmp_path / "data", FetchOptions(fisher_dir=ldc))
    folder = tmp_path / "data/conversations/fisher"
    (line,) = [json.loads(text) for text in (folder / "manifest.jsonl").read_text().splitlines()]
    audio, rate = soundfile.read(folder / line["path"], dtype="int16")
    assert rate == 8000
    np.testing.assert_allclose(audio, np.stack([tone, -tone], axis=1), atol=1)
    assert [(t["who"], t["start"], t["text"]) for t in line["turns"]] == [
        ("agent", 0.1, "hello\u2028there"), ("user", 0.6, "hi ((you))"),
    ]
    assert (line["commercial_ok"], line["sample_rate"]) == (False, 8000)
    assert "fe_03_00002" in (folder / "unreadable.txt").read_text()
    with pytest.raises(UserError, match="--fisher_dir"):
        corpora.fetch(row, tmp_path / "other")
    with pytest.raises(UserError, match="no .sph files"):
        corpora.fetch(row, tmp_path / "other", FetchOptions(fisher_dir=texts))


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "telugu/openslr-66").mkdir(parents=True)
    with pytest.raises(UserError, match="move it away"):
        corpora.fetch(ROWS["openslr-66"], tmp_path)
