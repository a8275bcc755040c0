"""Emotional corpora as their owners ship them, and their clips as codes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import corpora
import data
import emotions
from codec import Codec
from command import UserError
from data import EMOTIONS

SHIPPED = {
    "CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav": ("angry", "crema-d-1001", True),
    "CREMA-D/AudioWAV/1002_IEO_SAD_HI.wav": ("sad", "crema-d-1002", True),
    "RAVDESS/Actor_01/03-01-02-01-01-01-01.wav": ("calm", "ravdess-01", False),
    "RAVDESS/Actor_24/03-02-08-02-02-01-24.wav": ("surprise", "ravdess-24", False),
    "EmoV-DB/bea_Amused/amused_1-15_0001.wav": ("happy", "emov-db-bea", False),
    "EmoV-DB/josh_Neutral/neutral_1-28_0007.wav": ("neutral", "emov-db-josh", False),
    "EmoV-DB/sam/anger_1-28_0001.wav": ("angry", "emov-db-sam", False),
    "EmoV-DB/jenie/Disgusted/disgust_1-28_0001.wav": ("disgust", "emov-db-jenie", False),
    "ESD/0011/Angry/0011_000351.wav": ("angry", "esd-0011", False),
    "ESD/0012/Surprise/train/0012_001401.wav": ("surprise", "esd-0012", False),
    "ESD/0003/Happy/0003_000701.wav": ("happy", "esd-0003", False),
}


def sound(path, seconds=0.5, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    soundfile.write(path, 0.1 * rng.standard_normal((round(seconds * rate), channels)), rate)
    return path


@pytest.fixture
def shipped(tmp_path):
    for i, name in enumerate(SHIPPED):
        sound(tmp_path / name, rate=(16000, 44100, 48000)[i % 3], channels=1 + i % 2)
    return tmp_path


def test_every_label_is_one_of_the_eight():
    assert set(corpora.LABELS.values()) == set(EMOTIONS)


def test_folders_as_their_owners_ship_them(shipped):
    clips = emotions.load_emotional([shipped])
    found = {c.path.relative_to(shipped).as_posix(): c for c in clips}
    assert {n: (c.emotion, c.speaker, c.commercial_ok) for n, c in found.items()} == SHIPPED
    assert found["ESD/0003/Happy/0003_000701.wav"].language == "other"  # Mandarin
    assert found["ESD/0011/Angry/0011_000351.wav"].language == "english"


def test_what_has_no_emotion_is_counted(shipped, capsys):
    sound(shipped / "EmoV-DB/sam_Sleepy/sleepiness_1-28_0001.wav")
    sound(shipped / "EmoV-DB/sam/sleepiness_1-28_0001.wav")
    sound(shipped / "CREMA-D/AudioWAV/1003_DFA_XXX_XX.wav")
    sound(shipped / "RAVDESS/Actor_01/03-01-09-01-01-01-01.wav")
    # What lies beside: the same clips as MP3, films, texts, and files that were cut or are gone.
    sound(shipped / "CREMA-D/AudioMP3/1001_DFA_ANG_XX.mp3")
    sound(shipped / "CREMA-D/AudioMP3/1004_DFA_FEA_XX.mp3")
    for name in ("CREMA-D/VideoFlash/1001_DFA_ANG_XX.flv", "ESD/0011/0011.txt",
                 "RAVDESS/Actor_01/01-01-02-01-01-01-01.mp4"):  # fmt: skip
        (shipped / name).parent.mkdir(exist_ok=True)
        (shipped / name).write_bytes(b"no sound")
    whole = (shipped / "ESD/0011/Angry/0011_000351.wav").read_bytes()
    (shipped / "ESD/0011/Angry/0011_000353.wav").write_bytes(whole[:30])
    (shipped / "ESD/0011/Angry/0011_000354.wav").symlink_to("gone.wav")
    (shipped / "ESD/0011/Angry/0011_000355.wav").touch()
    sound(shipped / "notes/thunder.wav")
    (shipped / "ESD/0011/Angry/0011_000352.wav").write_bytes(b"RIFF no sound")
    clips = emotions.load_emotional([shipped])
    assert len(clips) == len(SHIPPED) + 1
    crema = {(c.path.name, c.text) for c in clips if c.speaker in ("crema-d-1001", "crema-d-1004")}
    forgets = "Don't forget a jacket."
    assert crema == {("1001_DFA_ANG_XX.wav", forgets), ("1004_DFA_FEA_XX.mp3", forgets)}
    told = capsys.readouterr()
    for label in ("'sleepy'", "'sleepiness'", "'xxx'", "'09'"):
        assert f"1 clips left out: no emotion of ours is called {label}" in told.out
    assert "1 clips left out: neither manifest nor name tells an emotion" in told.out
    assert "1 clips left out: there already, by speaker and name" in told.out
    assert "5 unreadable audio files" in told.err and "1 files of .flv passed over" in told.err


def test_a_manifest_says_more_than_a_name(tmp_path):
    sound(tmp_path / "a.wav")
    sound(tmp_path / "b.wav")
    line = {"path": "a.wav", "duration": 0.5, "sample_rate": 16000, "language": "telugu",
            "speaker": "rasa-1", "emotion": "fear", "license": "CC-BY-4.0", "commercial_ok": True,
            "split": "validation"}  # fmt: skip
    other = {**line, "path": "b.wav", "speaker": "rasa-2", "split": "train"}
    rows = json.dumps(line), json.dumps(other)
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    clip = next(c for c in emotions.load_emotional([tmp_path]) if c.path.name == "a.wav")
    assert (clip.emotion, clip.speaker, clip.split) == ("fear", "rasa-1", "validation")


def test_commercial_only(shipped):
    clips = emotions.load_emotional([shipped], commercial_only=True)
    assert {clip.speaker for clip in clips} == {"crema-d-1001", "crema-d-1002"}
    with pytest.raises(UserError, match="no clip with an emotion"):
        emotions.load_emotional([shipped / "ESD"], commercial_only=True)


def test_no_emotions_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        emotions.load_emotional([tmp_path / "nowhere"])
    sound(tmp_path / "some.wav")
    with pytest.raises(UserError, match="no clip with an emotion"):
        emotions.load_emotional([tmp_path])


def test_speakers_are_held_out_whole(shipped):
    clips = emotions.load_emotional([shipped])
    clips = [emotions.replace(clip, split="train") for clip in clips]
    train, validation = emotions.hold_out_speakers(clips)
    assert train and validation and len(train) + len(validation) == len(clips)
    assert not {c.speaker for c in train} & {c.speaker for c in validation}
    with pytest.raises(UserError, match="two speakers"):
        emotions.hold_out_speakers(clips[:1])


def test_speakers_are_held_out_in_each_language_that_can_spare_one():
    def clips(language, speakers, split="train"):
        return [
            data.Clip(Path(f"{name}{n}"), 1.0, 48000, language, name, emotion="sad", split=split)
            for name in speakers
            for n in range(3)
        ]

    alone, two = clips("hindi", ["raj"]), clips("telugu", ["lata", "ravi"])
    english = clips("english", ["ann", "bob"]) + clips("english", ["eve"], "validation")
    train, validation = emotions.hold_out_speakers([*alone, *two, *english])
    assert {c.speaker for c in train} >= {"raj", "ann", "bob"} and len(train) == 12
    assert {c.language for c in validation} == {"telugu", "english"} and len(validation) == 6
    train, validation = emotions.hold_out_speakers([*alone, *clips("telugu", ["lata"])])
    assert len(train) == len(validation) == 3


def test_clips_become_the_users_side_of_calls(shipped, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(emotions, "GAIN_DB", (0.0, 0.0))
    codec = Codec.from_checkpoint("checkpoints/tiny/codec")
    clips = emotions.load_emotional([shipped])
    lost = emotions.replace(clips[0], path=shipped / "gone.wav")
    rows = emotions.encode_clips([*clips, lost], codec, tmp_path / "codes", batch=4)
    assert "1 clips left out: unreadable" in capsys.readouterr().out
    assert Counter(row["turns"][0]["emotion"] for row in rows) == Counter(c.emotion for c in clips)
    row = next(row for row in rows if row["id"].endswith("1001_DFA_ANG_XX.wav"))
    audio = np.zeros(21600, np.float32)
    audio[4800:16800] = emotions.audio.read_audio(shipped / "CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav")
    alone = codec.encode(emotions.torch.from_numpy(audio)[None, None], 8)[0].T.numpy()
    assert (row["user_codes"] == alone).all()  # batched equals alone
    assert (row["agent_codes"] == emotions.silence_codes(codec, "cpu")[0, :, -1].numpy()).all()
    # Made once: the files may be gone then.
    again = emotions.encode_clips(clips, codec, tmp_path / "codes")
    assert len(again) == len(clips)


def test_a_speaker_has_several_microphones_each_of_one_gain(tmp_path):
    codec = Codec.from_checkpoint("checkpoints/tiny/codec")
    for i in range(24):
        sound(tmp_path / f"CREMA-D/AudioWAV/1001_DFA_ANG_X{i}.wav".replace("_X", "_H"))
    clips = [
        data.Clip(path, 0.5, 16000, "english", "ann", emotion="sad")
        for path in sorted(tmp_path.rglob("*.wav"))
    ]
    rows = emotions.encode_clips(clips, codec, tmp_path / "codes")
    levels = {}
    for row in rows:
        codes = emotions.torch.from_numpy(row["user_codes"].astype(np.int64)).T[None]
        heard = codec.decode(codes)[0, 0, 4800:16800]
        levels.setdefault(row["source"], []).append(20 * np.log10(float(heard.std())))
    assert len(levels) == emotions.MICROPHONES
    assert max(np.ptp(one) for one in levels.values()) < 1.5 < np.ptp(sum(levels.values(), []))
