"""Recordings in Debian's packages: unpacked, decoded, told apart by speaker, held out by split."""

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from test_fetching import sine

import corpora
import data
import download_data
from audio import AudioError, read_audio, write_audio
from command import UserError
from tools import package_recordings
from tools.package_recordings import PACKAGES, Packages

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")

CORPUS = Packages(
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
        write_audio(voices / f"{name}.wav", np.full(16000, 0.1 * (number + 1)), 16000)
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
    assert corpora.fetch(CORPUS, package)
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
    cy = read_audio(found["cy/1.flac"].path, sample_rate=16000)
    np.testing.assert_allclose(cy, 1000 / 32768, atol=1e-4)
    assert (folder / "copyright.voices-pkg").read_text() == "GPL-2"
    assert "3.wav" in (folder / "unreadable.txt").read_text()
    assert "1 files left out" in capsys.readouterr().err
    assert sorted(path.name for path in (package / "other").iterdir()) == ["voices"]
    assert not (package / ".archives/voices").exists()
    assert not corpora.fetch(CORPUS, package)


@needs_dpkg
def test_a_killed_run_leaves_nothing_half_done_and_the_next_completes(package, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(package_recordings, "probe", die)
        with pytest.raises(KeyboardInterrupt):
            corpora.fetch(CORPUS, package)
    assert not (package / "other/voices").exists()
    # What the killed run left is hidden from a scan.
    with pytest.raises(UserError, match="no readable audio"):
        data.load_clips([package / "other"], "train")
    assert corpora.fetch(CORPUS, package)
    assert len(data.read_manifest(package / "other/voices" / data.MANIFEST)) == 4


@needs_dpkg
def test_a_damaged_package_is_one_line(package):
    archive = next((package / ".archives/voices").iterdir())
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        corpora.fetch(CORPUS, package)
    assert not (package / "other/voices").exists()


@needs_dpkg
def test_a_package_without_the_audio_is_told(package):
    with pytest.raises(UserError, match="no audio in voices-pkg"):
        corpora.fetch(replace(CORPUS, root="usr/share/elsewhere"), package)


def test_transcripts_leave_sounds_out(tmp_path):
    with gzip.open(tmp_path / "t.gz", "wt") as file:
        file.write("; title: x\n\nhello: Hello:  you.\nbeep: [a tone]\ndigits/1: one\nnone:\n")
    texts = package_recordings._read_transcripts(tmp_path / "t.gz")
    assert texts == {"hello": "Hello: you.", "digits/1": "one"}


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
def test_speakers_and_splits_of_the_packages(corpus, name, expected):
    rows = {row.name: row for row in PACKAGES}
    assert package_recordings.speaker_and_split(rows[corpus], name) == expected


@needs_dpkg
def test_verify_finds_what_is_missing(package, capsys):
    missing = download_data.verify(CORPUS, package)
    assert missing["state"] == "not there"
    corpora.fetch(CORPUS, package)
    good = download_data.verify(CORPUS, package)
    assert (good["state"], good["files"], good["speakers"]) == ("ok", 4, 3)
    assert good["hours_by_sample_rate"] == {"16000": good["hours"]}
    assert good["hours"] == pytest.approx(4 / 3600, abs=1e-4)
    assert download_data.print_verified([good], package)
    more = replace(CORPUS, hours=1.0)
    assert download_data.verify(more, package)["state"] == "hours missing"
    # Where the table's hours are an estimate, what was fetched counts.
    assert download_data.verify(replace(more, exact=False), package)["state"] == "ok, small"
    folder = package / "other/voices/audio"
    shutil.copy(folder / "ann/1.wav", folder / "ann/2.wav")
    assert download_data.verify(CORPUS, package)["duplicates"] == 1
    (folder / "bo/1.wav").unlink()
    (folder / "ann/1.wav").write_text("spoilt")
    bad = download_data.verify(CORPUS, package)
    assert bad["state"] == "2 unreadable" and len(bad["unreadable"]) == 2
    assert not download_data.print_verified([good, bad, missing], package)
    printed = capsys.readouterr().out
    assert "bo/1.wav" in printed and "16000 Hz" in printed
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 80
    assert json.dumps(bad) and set(bad["hours_by_sample_rate"]) == {"16000"}


def test_stale_package_lists_are_named(tmp_path, monkeypatch):
    for tool in ("apt-get", "dpkg-deb"):
        message = "E: Unable to locate package x"
        (tmp_path / tool).write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="Unable to locate package x.*apt-get update"):
        package_recordings.download_deb("x", tmp_path / "archives")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="needs apt-get"):
        package_recordings.download_deb("x", tmp_path / "archives")


def test_g722_comes_back_as_it_was_coded(tmp_path):
    av = pytest.importorskip("av")
    audio = sine(1.0)
    context = av.CodecContext.create("g722", "w")
    context.sample_rate, context.format, context.layout = 16000, "s16", "mono"
    frame = av.AudioFrame.from_ndarray(
        (audio * 32767).astype(np.int16)[None], format="s16", layout="mono"
    )
    frame.sample_rate = 16000
    packets = [*context.encode(frame), *context.encode(None)]
    (tmp_path / "a.g722").write_bytes(b"".join(bytes(packet) for packet in packets))
    decoded, rate = package_recordings.decode_g722(tmp_path / "a.g722")
    assert rate == 16000 and len(decoded) == 16000
    at = 2 * np.pi * 440 * np.arange(15000) / 16000
    basis = np.stack([np.sin(at), np.cos(at)], axis=1)
    fit, *_ = np.linalg.lstsq(basis, decoded[1000:], rcond=None)
    error = decoded[1000:] - basis @ fit
    assert np.hypot(*fit) == pytest.approx(0.5, abs=0.01)
    assert 10 * np.log10(np.mean((basis @ fit) ** 2) / np.mean(error**2)) > 25
    (tmp_path / "empty.g722").touch()
    with pytest.raises(AudioError):
        package_recordings.decode_g722(tmp_path / "empty.g722")


def test_the_table_holds_what_the_design_demands():
    for row in PACKAGES:
        assert row.language in data.LANGUAGES and row.license and row.hours > 0
        assert row.speaker or row.speaker_pattern
        # One actress speaks both evaluation sets, and nothing else.
        evaluation = row.name in ("asterisk-core-en", "asterisk-core-es")
        assert (row.speaker == "allison-smith") == evaluation == (row.test == ("*",))
        assert not set(row.validation) & set(row.test)


@needs_dpkg
def test_the_script_lists_fetches_and_verifies(package, monkeypatch, capsys):
    def script(*flags):
        flags = ["package_recordings.py", "--data_dir", str(package), *flags]
        monkeypatch.setattr(sys, "argv", flags)
        return package_recordings.main()

    monkeypatch.setattr(package_recordings, "PACKAGES", (CORPUS,))
    assert script("--list") == 0 and "voices" in capsys.readouterr().out
    assert script("--verify") == 1
    assert script() == 0
    assert "voices: fetched" in capsys.readouterr().out
    assert script("--verify", "--corpora", "voices") == 0
    with pytest.raises(UserError, match="no corpus 'nope'; there are voices"):
        script("--corpora", "nope")
