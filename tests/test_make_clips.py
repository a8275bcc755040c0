"""Single sentences for the codec: their shares, splits and phones, and a run that goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

import speech
from audio import SAMPLE_RATE
from command import UserError
from data import load_clips, read_manifest
from dialogues import load_scripts
from phones import PHONES
from tools import make_clips

SCRIPTS = Path(__file__).resolve().parent.parent / "conversations"
ALL_VOICES = speech.voices


def espeak_role(language, role="user", split="train", engines=None):
    """A few quick voices in place of all that are installed."""
    mine = ALL_VOICES(language, "user", "train", ("espeak",))
    part = {"train": mine[1:5], "validation": mine[5:6], "test": mine[6:7]}[split]
    chosen = mine[:1] if role == "agent" else part
    return [replace(voice, role=role, split=split) for voice in chosen]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    pytest.importorskip("espeakng_loader", reason="speech for this test: espeakng-loader")
    monkeypatch.setattr(speech, "voices", espeak_role)
    monkeypatch.setattr(make_clips, "PART_SECONDS", 15.0)


def command(folder: Path, language: str) -> list[str]:
    return [
        "--data_dir", str(folder), "--hours", "0.01", "--languages", language, "--num_workers", "0",
    ]  # fmt: skip


def test_clips(tmp_path):
    make_clips.main(command(tmp_path, "telugu"))
    manifest = tmp_path / "telugu" / "synthetic" / "manifest.jsonl"
    clips = read_manifest(manifest)
    assert 36 <= sum(c.duration for c in clips) < 150
    agent = espeak_role("telugu", "agent")[0].id
    share = sum(c.duration for c in clips if c.speaker == agent) / sum(c.duration for c in clips)
    assert 0.15 < share < 0.6
    splits = {v.id: s for s in ("train", "validation") for v in espeak_role("telugu", "user", s)}
    scripts = load_scripts(SCRIPTS / "telugu.jsonl")
    held_out = {
        t for e in scripts if e.held_out for n in e.lines if n.who == "user" for t in n.texts
    }
    for clip in clips:
        assert clip.split == ("train" if clip.speaker == agent else splits[clip.speaker])
        assert clip.text not in held_out and clip.license and clip.commercial_ok
        info = soundfile.info(clip.path)
        assert info.samplerate == clip.sample_rate == SAMPLE_RATE
        assert info.duration == pytest.approx(clip.duration, abs=1e-3)
        assert clip.phones[0][1] == 0
        assert clip.phones[-1][2] == pytest.approx(clip.duration, abs=1e-3)
        assert all(p in PHONES and s < e for p, s, e in clip.phones)
    assert len(load_clips([tmp_path / "telugu"], "train")) > 0
    # The same command again, after a part was lost, makes that part again, byte for byte.
    text, lost = manifest.read_text(), sorted(manifest.parent.glob("0*"))[1]
    for file in lost.iterdir():
        file.unlink()
    lost.rmdir()
    make_clips.main(command(tmp_path, "telugu"))
    assert manifest.read_text() == text


def test_the_agents_own_sentences_some_kept_apart(tmp_path):
    """`--role agent`: nobody else's; a sentence is in one split, however often it is said."""
    make_clips.main([*command(tmp_path, "english"), "--role", "agent", "--hours", "0.05"])
    clips = read_manifest(tmp_path / "english" / "synthetic" / "manifest.jsonl")
    assert {clip.speaker for clip in clips} == {espeak_role("english", "agent")[0].id}
    places = {(clip.text, clip.split) for clip in clips}
    assert len(places) == len({text for text, _ in places})
    assert {split for _, split in places} == {"train", "validation", "test"}
    assert sum(split == "train" for _, split in places) > 0.7 * len(places)
    with pytest.raises(UserError, match="made with role 'agent'"):
        make_clips.main(command(tmp_path, "english"))
    with pytest.raises(UserError, match="--any_emotion"):
        make_clips.main(["--role", "agent", "--any_emotion"])


def test_a_part_that_another_run_finished_first_stands(tmp_path, monkeypatch):
    write = make_clips.write_manifest

    def beaten(path, clips):
        write(path, clips)
        if path.parent.suffix == ".part":
            shutil.copytree(path.parent, path.parent.with_name(path.parent.name.split(".")[1]))

    monkeypatch.setattr(make_clips, "write_manifest", beaten)
    make_clips.main(command(tmp_path, "telugu"))
    assert read_manifest(tmp_path / "telugu" / "synthetic" / "manifest.jsonl")
    assert not list(tmp_path.rglob("*.part"))


def test_a_voice_that_fails_is_counted_not_fatal(tmp_path, monkeypatch):
    def failing(language, role="user", split="train", engines=None):
        voices = espeak_role(language, role, split)
        return voices if role == "agent" else [replace(voices[0], name="nobody"), *voices[1:]]

    monkeypatch.setattr(speech, "voices", failing)
    make_clips.main(command(tmp_path, "english"))
    assert "nobody" in (tmp_path / "dropped.txt").read_text()
    assert read_manifest(tmp_path / "english" / "synthetic" / "manifest.jsonl")


def test_bad_flags_and_folders_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_clips.main(["--hours", "0"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--hours" in said
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--data_dir .*cannot be written"):
        make_clips.main(["--data_dir", str(tmp_path / "file")])
