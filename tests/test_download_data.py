"""Fetching from packages: what lands, what is refused, what a killed run leaves."""

import gzip
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data
import download_data
from training import UserError

ROOT = Path(__file__).resolve().parent.parent
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="needs PyAV: pip install av"
)

CORPUS = download_data.Corpus(
    name="voices",
    language="other",
    packages=("voices-pkg",),
    root="usr/share/voices",
    include=("*.wav", "*.raw"),
    exclude=("beep.*",),
    license="GPL-2",
    hours=4 / 3600,
    kilohertz="16",
    speaker_pattern=r"^([^/]+)/",
    validation=("bo",),
    test=("cy",),
)


@pytest.fixture
def package(tmp_path):
    """A .deb of six recordings: two of Ann, one of Bo, one of Cy, a copy and a beep."""
    tree = tmp_path / "tree"
    voices = tree / "usr/share/voices"
    for number, name in enumerate(("ann/1", "ann/2", "bo/1")):
        (voices / name).parent.mkdir(parents=True, exist_ok=True)
        data.write_audio(voices / f"{name}.wav", np.full(16000, 0.1 * (number + 1)), 16000)
    (voices / "cy").mkdir()
    (voices / "cy/1.raw").write_bytes(np.full(16000, 1000, "<i2").tobytes())
    shutil.copy(voices / "ann/1.wav", voices / "ann/copy.wav")
    shutil.copy(voices / "ann/1.wav", voices / "beep.wav")
    (voices / "ann/3.wav").write_text("no audio")
    (voices / "readme.txt").write_text("not wanted")
    (tree / "usr/share/doc/voices-pkg").mkdir(parents=True)
    (tree / "usr/share/doc/voices-pkg/copyright").write_text("GPL-2")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: voices-pkg\nVersion: 1\nArchitecture: all\nMaintainer: T <t@t>\nDescription: t\n"
    )
    archives = tmp_path / "data/.archives/voices"
    archives.mkdir(parents=True)
    command = ["dpkg-deb", "--build", "--root-owner-group", tree, archives / "voices-pkg_1_all.deb"]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "data"


@needs_dpkg
def test_a_corpus_lands_whole_with_speakers_splits_and_licence(package, capsys):
    assert download_data.fetch(CORPUS, package)
    folder = package / "other/voices"
    clips = data.read_manifest(folder / data.MANIFEST)
    found = {str(one.path.relative_to(folder / "audio")): one for one in clips}
    assert sorted(found) == ["ann/1.wav", "ann/2.wav", "bo/1.wav", "cy/1.flac"]
    assert {name: (one.speaker, one.split) for name, one in found.items()} == {
        "ann/1.wav": ("voices-ann", "train"),
        "ann/2.wav": ("voices-ann", "train"),
        "bo/1.wav": ("voices-bo", "validation"),
        "cy/1.flac": ("voices-cy", "test"),
    }
    assert all((one.duration, one.sample_rate, one.license) == (1, 16000, "GPL-2") for one in clips)
    cy = data.read_audio(found["cy/1.flac"].path, sample_rate=16000)
    np.testing.assert_allclose(cy, 1000 / 32768, atol=1e-4)
    assert (folder / "copyright.voices-pkg").read_text() == "GPL-2"
    assert "3.wav" in capsys.readouterr().err
    assert sorted(path.name for path in (package / "other").iterdir()) == ["voices"]
    assert not (package / ".archives/voices").exists()
    assert not download_data.fetch(CORPUS, package)


@needs_dpkg
def test_a_killed_run_leaves_nothing_half_done_and_the_next_completes(package, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "probe", die)
        with pytest.raises(KeyboardInterrupt):
            download_data.fetch(CORPUS, package)
    assert not (package / "other/voices").exists()
    # What the killed run left is hidden from a scan.
    assert data.scan_folder(package / "other") == ([], [])
    assert download_data.fetch(CORPUS, package)
    assert len(data.read_manifest(package / "other/voices" / data.MANIFEST)) == 4


@needs_dpkg
def test_a_damaged_package_is_one_line(package):
    archive = next((package / ".archives/voices").iterdir())
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        download_data.fetch(CORPUS, package)
    assert not (package / "other/voices").exists()


@needs_dpkg
def test_a_package_without_the_audio_is_told(package):
    with pytest.raises(UserError, match="no audio in voices-pkg"):
        download_data.fetch(replace(CORPUS, root="usr/share/elsewhere"), package)


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "other/voices").mkdir(parents=True)
    with pytest.raises(UserError, match="move it away"):
        download_data.fetch(CORPUS, tmp_path)


@pytest.mark.parametrize("name", ["../out.wav", "/etc/out.wav", "a/../../out.wav"])
def test_archive_paths_that_escape_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="outside its folder"):
        unpack(tmp_path / "in", tarfile.TarInfo(name))
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("a.wav")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match="link or device"):
        unpack(tmp_path, member)
    assert not list(tmp_path.iterdir())


def unpack(folder, member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member)
    buffer.seek(0)
    download_data.unpack_tar(buffer, folder, lambda name: True, "test.deb")


def test_stale_package_lists_are_named(tmp_path, monkeypatch):
    for tool in ("apt-get", "dpkg-deb"):
        message = "E: Unable to locate package x"
        (tmp_path / tool).write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="Unable to locate package x.*apt-get update"):
        download_data.download_deb("x", tmp_path / "archives")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="needs apt-get"):
        download_data.download_deb("x", tmp_path / "archives")


@needs_av
def test_g722_comes_back_as_it_was_coded(tmp_path):
    import av

    audio = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    context = av.CodecContext.create("g722", "w")
    context.sample_rate, context.format, context.layout = 16000, "s16", "mono"
    frame = av.AudioFrame.from_ndarray(
        (audio * 32767).astype(np.int16)[None], format="s16", layout="mono"
    )
    frame.sample_rate = 16000
    packets = [*context.encode(frame), *context.encode(None)]
    (tmp_path / "a.g722").write_bytes(b"".join(bytes(packet) for packet in packets))
    decoded, rate = download_data.decode_g722(tmp_path / "a.g722")
    assert rate == 16000 and len(decoded) == 16000
    at = 2 * np.pi * 440 * np.arange(15000) / 16000
    basis = np.stack([np.sin(at), np.cos(at)], axis=1)
    fit, *_ = np.linalg.lstsq(basis, decoded[1000:], rcond=None)
    error = decoded[1000:] - basis @ fit
    assert np.hypot(*fit) == pytest.approx(0.5, abs=0.01)
    assert 10 * np.log10(np.mean((basis @ fit) ** 2) / np.mean(error**2)) > 25
    (tmp_path / "empty.g722").touch()
    with pytest.raises(data.AudioError):
        download_data.decode_g722(tmp_path / "empty.g722")


def test_transcripts_leave_sounds_out(tmp_path):
    with gzip.open(tmp_path / "t.gz", "wt") as file:
        file.write("; title: x\n\nhello: Hello:  you.\nbeep: [a tone]\ndigits/1: one\nnone:\n")
    texts = download_data._read_transcripts(tmp_path / "t.gz")
    assert texts == {"hello": "Hello: you.", "digits/1": "one"}


@needs_dpkg
def test_verify_finds_what_is_missing(package, capsys):
    missing = download_data.verify(CORPUS, package)
    assert missing.problem == "not there"
    download_data.fetch(CORPUS, package)
    good = download_data.verify(CORPUS, package)
    assert (good.problem, good.files, good.duplicates) == ("", 4, 0)
    assert good.speakers == {"voices-ann", "voices-bo", "voices-cy"}
    assert good.rates == ((16000, 4),) and good.hours == pytest.approx(4 / 3600)
    assert download_data.print_verified([good], package)
    more = replace(CORPUS, hours=1.0)
    assert download_data.verify(more, package).problem == "hours missing"
    folder = package / "other/voices/audio"
    shutil.copy(folder / "ann/1.wav", folder / "ann/2.wav")
    assert download_data.verify(CORPUS, package).duplicates == 1
    (folder / "bo/1.wav").unlink()
    (folder / "ann/1.wav").write_text("spoilt")
    bad = download_data.verify(CORPUS, package)
    assert bad.problem == "2 unreadable"
    assert not download_data.print_verified([good, bad, missing], package)
    printed = capsys.readouterr().out
    assert "bo/1.wav" in printed
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 80


def test_the_table_holds_what_the_design_demands(capsys):
    names = [row.name for row in download_data.CORPORA]
    assert len(names) == len(set(names))
    for row in download_data.CORPORA:
        assert row.language in data.LANGUAGES and row.kind in download_data.FETCHERS
        assert row.hours > 0 and row.license
        assert row.speaker or row.speaker_pattern
        # One actress speaks both evaluation sets, and nothing else.
        evaluation = row.name in ("asterisk-core-en", "asterisk-core-es")
        assert (row.speaker == "allison-smith") == evaluation == (row.test == ("*",))
        assert not set(row.validation) & set(row.test)
    download_data.print_list(download_data.CORPORA)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


@pytest.mark.parametrize(
    "corpus, name, expected",
    [
        ("tuxpaint-stamps", "animals/birds/robin_desc_fr.ogg", (None, "train")),
        ("tuxpaint-stamps", "animals/birds/robin_desc_da.ogg", (None, "validation")),
        ("tuxpaint-stamps", "animals/birds/robin_desc.ogg", (None, "test")),
        ("klettres", "ml/syllab/a.ogg", ("klettres-ml", "train")),
        ("klettres", "uk/syllab/a.ogg", ("klettres-uk", "test")),
        ("fillets-cs", "gods/cs/lod-m-pravda1.ogg", ("fillets-cs-m", "train")),
        ("fillets-cs", "keys/cs/init-0-6.ogg", (None, "train")),
        ("pocketsphinx-testdata", "goforward.raw", (None, "validation")),
        ("asterisk-core-en", "digits/1.g722", ("allison-smith", "test")),
    ],
)
def test_speakers_and_splits_of_the_table(corpus, name, expected):
    row = next(row for row in download_data.CORPORA if row.name == corpus)
    assert download_data.speaker_and_split(row, name) == expected


def test_the_script_itself(tmp_path):
    def script(*flags):
        return subprocess.run(
            [sys.executable, ROOT / "download_data.py", "--data_dir", tmp_path, *flags],
            capture_output=True,
            text=True,
        )

    listed = script("--list")
    assert listed.returncode == 0 and "tuxpaint-stamps" in listed.stdout
    absent = script("--verify", "--corpora", "klettres")
    assert absent.returncode == 1 and "not there" in absent.stdout
    refused = script("--corpora", "nope")
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="no corpus of that language"):
        download_data.choose(None, ["telugu"])
