"""Audio reading, manifests, augmentation, windows and sampling, each against a plain reference."""

import itertools
import json
import os
import pickle
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import soundfile
import torch

import command
import data
import training


def sine(hertz, seconds, rate, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def clip(path, seconds, rate=data.SAMPLE_RATE, language="english", **more):
    return data.Clip(path=path, duration=seconds, sample_rate=rate, language=language, **more)


@pytest.fixture
def bad_folder(tmp_path):
    """One good file among a text file, a cut FLAC, an empty WAV; and a stereo 8 kHz MP3."""
    folder = tmp_path / "english"
    folder.mkdir()
    rng = np.random.default_rng(0)
    data.write_audio(folder / "good.wav", sine(440, 2, 16000), 16000)
    (folder / "text.wav").write_text("this is no audio\n")
    noise = rng.uniform(-0.5, 0.5, 48000).astype(np.float32)
    data.write_audio(folder / "cut.flac", noise, 24000)
    whole = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), 24000)
    data.write_audio(folder / "stereo.mp3", np.stack([sine(300, 2, 8000)] * 2, axis=1), 8000)
    return folder


# ---------------------------------------------------------------------------------- audio files


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_a_read_sine_is_the_analytic_one(tmp_path, suffix, rate):
    data.write_audio(tmp_path / f"a{suffix}", sine(440, 1.5, rate), rate)
    audio = data.read_audio(tmp_path / f"a{suffix}")
    assert audio.dtype == np.float32 and abs(len(audio) / data.SAMPLE_RATE - 1.5) < 0.15
    middle = audio[4800:-9600]
    # Codecs may shift the wave, so the fit is free in phase, not in frequency or amplitude.
    at = 2 * np.pi * 440 * np.arange(len(middle)) / data.SAMPLE_RATE
    basis = np.stack([np.sin(at), np.cos(at)], axis=1)
    fit, *_ = np.linalg.lstsq(basis, middle, rcond=None)
    assert np.hypot(*fit) == pytest.approx(0.5, abs=0.02)
    assert np.abs(middle - basis @ fit).max() < (0.002 if suffix in (".wav", ".flac") else 0.1)


@pytest.mark.parametrize(
    "suffix, rate", [(".wav", 24000), (".wav", 48000), (".flac", 16000), (".ogg", 48000)]
)
def test_a_window_equals_the_slice_of_the_whole(tmp_path, suffix, rate):
    noise = np.random.default_rng(1).normal(0, 0.1, 4 * rate).astype(np.float32)
    data.write_audio(tmp_path / f"a{suffix}", noise, rate)
    whole = data.read_audio(tmp_path / f"a{suffix}")
    for start in (0.0, 1.25, 3.5):
        window = data.read_audio(tmp_path / f"a{suffix}", start, 0.5)
        first = round(start * data.SAMPLE_RATE)
        assert len(window) == 12000
        np.testing.assert_allclose(window, whole[first : first + 12000], atol=2e-4)


def test_a_window_of_a_long_file_costs_the_window_alone(tmp_path):
    noise = np.random.default_rng(1).normal(0, 0.1, 120 * 16000).astype(np.float32)
    data.write_audio(tmp_path / "long.flac", noise, 16000)

    def seconds(start, duration):
        began = time.perf_counter()
        data.read_audio(tmp_path / "long.flac", start, duration)
        return time.perf_counter() - began

    assert min(seconds(110, 1) for _ in range(3)) < min(seconds(0, None) for _ in range(3)) / 10


def test_reading_past_the_end_gives_what_there_is(tmp_path):
    data.write_audio(tmp_path / "a.wav", sine(440, 1, 24000))
    assert len(data.read_audio(tmp_path / "a.wav", 0.75, 2.0)) == 6000
    assert len(data.read_audio(tmp_path / "a.wav", 3.0, 2.0)) == 0


def test_channels_are_averaged_unless_they_cancel(tmp_path):
    left, right = sine(440, 1, 24000), sine(700, 1, 24000)
    data.write_audio(tmp_path / "a.wav", np.stack([left, right], axis=1))
    mixed = data.read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(mixed, (left + right) / 2, atol=1e-4)
    data.write_audio(tmp_path / "b.wav", np.stack([0.9 * left, -left], axis=1))
    np.testing.assert_allclose(data.read_audio(tmp_path / "b.wav"), -left, atol=1e-4)


def test_values_beyond_full_scale_are_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", 60 * sine(440, 1, 48000), 48000, subtype="FLOAT")
    assert np.abs(data.read_audio(tmp_path / "a.wav")).max() <= 1.0


@pytest.mark.parametrize("name", ["text.wav", "cut.flac", "empty.wav", "missing.wav"])
def test_bad_audio_is_one_line_that_names_the_file(bad_folder, name):
    with pytest.raises(data.AudioError) as caught:
        data.read_audio(bad_folder / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, command.UserError)


def test_a_stereo_8_khz_mp3_is_read(bad_folder):
    audio = data.read_audio(bad_folder / "stereo.mp3")
    assert audio.ndim == 1 and abs(len(audio) - 48000) < 4800


def written_by_pyav(path, codec, audio):
    """`audio` at 24 kHz in the container of the suffix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=data.SAMPLE_RATE, layout="mono")
        whole = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        whole.sample_rate = data.SAMPLE_RATE
        context = stream.codec_context
        fitted = av.AudioResampler(context.format, "mono", data.SAMPLE_RATE, context.frame_size)
        for frame in [*fitted.resample(whole), *fitted.resample(None), None]:
            container.mux(stream.encode(frame))


def odd_file(path, audio):
    """A file that libsndfile does not read, or not in the middle, or not at its scale."""
    rate = data.SAMPLE_RATE
    if path.suffix in (".m4a", ".aac", ".webm"):
        written_by_pyav(path, "libopus" if path.suffix == ".webm" else "aac", audio)
    elif path.stem == "gsm":
        soundfile.write(path, audio[::3], rate // 3, subtype="GSM610")
    elif path.stem == "integers":
        soundfile.write(path, audio * 32000, rate, subtype="FLOAT")
    else:
        data.write_audio(path, audio)
        coded = path.read_bytes()
        size_at = coded.index(b"data") + 4
        path.write_bytes(coded[:size_at] + bytes(4) + coded[size_at + 4 :])


def test_a_chained_ogg_is_refused_not_cut(tmp_path):
    parts = []
    for hertz in (300, 500):
        data.write_audio(tmp_path / "part.ogg", sine(hertz, 1.0, 24000))
        parts.append((tmp_path / "part.ogg").read_bytes())
    (tmp_path / "chained.ogg").write_bytes(b"".join(parts))
    with pytest.raises(data.AudioError, match="several recordings in one Ogg"):
        data.read_audio(tmp_path / "chained.ogg")
    assert len(data.read_audio(tmp_path / "part.ogg")) == 24000


@pytest.mark.parametrize(
    "name", ["a.m4a", "a.aac", "a.webm", "gsm.wav", "integers.wav", "streamed.wav"]
)
def test_odd_formats_are_read_whole_and_by_window(tmp_path, name):
    audio = np.concatenate([np.zeros(2400, np.float32), sine(300, 3.9, 24000)])
    odd_file(tmp_path / name, audio)
    seconds, _ = data.probe(tmp_path / name)
    whole = data.read_audio(tmp_path / name)
    assert seconds == pytest.approx(4, abs=0.1) and len(whole) == pytest.approx(96000, abs=2400)
    assert np.sqrt(np.mean(whole[4800:-4800] ** 2)) == pytest.approx(0.5 / np.sqrt(2), abs=0.02)
    assert np.abs(whole[:1200]).max() < 0.02
    for start in (0.0, 1.5, 3.2):
        window = data.read_audio(tmp_path / name, start, 0.5)[100:-100]
        at = round(start * 24000) + 100
        # Matroska's times are whole milliseconds.
        moved = range(-24, 25) if name == "a.webm" and start else [0]
        assert min(np.abs(window - whole[at + i :][: len(window)]).max() for i in moved) < 0.05


def test_a_recording_shorter_than_a_frame_and_one_cut_short_are_no_audio(tmp_path):
    data.write_audio(tmp_path / "short.wav", np.zeros(479))
    with pytest.raises(data.AudioError, match="shorter than one frame"):
        data.probe(tmp_path / "short.wav")
    written_by_pyav(tmp_path / "cut.webm", "libopus", sine(300, 4, 24000))
    whole = (tmp_path / "cut.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.AudioError, match="truncated"):
        data.probe(tmp_path / "cut.webm")


def test_writing_leaves_nothing_half_done(tmp_path):
    with pytest.raises(data.AudioError, match="cannot write"):
        data.write_audio(tmp_path / "a.xyz", np.zeros(10))
    with pytest.raises(data.AudioError, match="cannot be written"):
        data.write_audio(tmp_path / "no" / "a.wav", np.zeros(10))
    data.write_audio(tmp_path / "a.wav", np.full(10, 3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert data.read_audio(tmp_path / "a.wav").max() == pytest.approx(1.0, abs=1e-3)


# ------------------------------------------------------------------------------------ manifests


def test_a_manifest_comes_back_as_it_was(tmp_path):
    clips = [
        clip(tmp_path / "a" / "x.wav", 1.5, speaker="one", text="नमस्ते", emotion="happy"),
        clip(tmp_path / "a" / "y.wav", 2.0, augmented=True, phones=[["_", 0.0, 0.1]]),
    ]
    data.write_manifest(tmp_path / "a" / data.MANIFEST, clips)
    assert data.read_manifest(tmp_path / "a" / data.MANIFEST) == clips
    lines = (tmp_path / "a" / data.MANIFEST).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["path"] == "x.wav" and "नमस्ते" in lines[0]
    (tmp_path / "a").rename(tmp_path / "b")
    assert data.read_manifest(tmp_path / "b" / data.MANIFEST)[0].path == tmp_path / "b" / "x.wav"


@pytest.mark.parametrize(
    "line, word",
    [
        ("{broken", "not JSON"),
        ("[]", "object"),
        ('{"path": "a.wav"}', "duration"),
        ('{"path":"a","duration":1,"sample_rate":1,"language":"klingon"}', "klingon"),
        ('{"path":"a","duration":"x","sample_rate":1,"language":"hindi"}', "x"),
        ('{"path":"a","duration":1,"sample_rate":1,"language":"hindi","split":"dev"}', "dev"),
    ],
)
def test_a_bad_manifest_line_is_named(tmp_path, line, word):
    good = '{"path":"a.wav","duration":1,"sample_rate":16000,"language":"hindi"}'
    (tmp_path / data.MANIFEST).write_text(f"{good}\n{line}\n")
    with pytest.raises(command.UserError, match="line 2") as caught:
        data.read_manifest(tmp_path / data.MANIFEST)
    assert word in str(caught.value)


LINE = {"path": "a.wav", "duration": 1.0, "sample_rate": 16000, "language": "hindi"}


def listing(folder, *changes):
    """A manifest whose lines are LINE with these changes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(command.as_json_line({**LINE, **change}) for change in changes)
    (folder / data.MANIFEST).write_text(lines, encoding="utf-8")
    return folder / data.MANIFEST


@pytest.mark.parametrize(
    "field, values",
    [
        ("path", [None, "", 3, ["a"], "a\0", "\ud83d"]),
        ("duration", [None, "1.5", True]),
        ("sample_rate", [None, "16000"]),
        ("language", [None, "urdu", 0, ["hindi"]]),
        ("speaker", [7, ["a"], True]),
        ("text", [12, ["न"], "\ud83d"]),
        ("emotion", ["bored", 1, ["happy"]]),
        ("augmented", ["no", 0]),
        ("license", [4.0]),
        ("commercial_ok", ["false", "true", 1, [True]]),
        ("split", ["dev", 1, True]),
        ("phones", ["a", [["a", 1]], [["a", 0.5, 0.1]], [["a", None, 1]], [[1, 0, 1]]]),
    ],
)
def test_a_field_of_a_wrong_type_is_named(tmp_path, field, values):
    for value in values:
        path = listing(tmp_path, {}, {field: value})
        with pytest.raises(command.UserError, match=f"line 2: {field} is") as caught:
            data.read_manifest(path)
        assert "\n" not in str(caught.value)


def test_nulls_and_odd_letters_are_read(tmp_path):
    odd = "స\u200cా\u2028\u2029\x85"
    path = listing(tmp_path, {"text": odd, "speaker": None}, {"commercial_ok": None}, {"note": 1})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    clips = data.read_manifest(path)
    assert [one.text for one in clips] == [odd, None, None]
    assert not any(one.commercial_ok for one in clips)


def test_clips_are_a_list_in_columns(tmp_path):
    listed = [
        clip(tmp_path / f"{i % 2}" / f"{i}.wav", i + 1.0, speaker=f"{i % 3}" if i % 3 else None)
        for i in range(7)
    ]
    listed[3] = replace(listed[3], phones=[["a", 0.0, 0.5]], text="न", language="telugu")
    clips = data.Clips.of(listed)
    assert list(clips) == listed and clips == listed and clips[3] == listed[3]
    assert clips[-1] == listed[-1] and clips[1:6:2] == listed[1:6:2]
    assert data.Clips(clips[:2].table, clips[2:4].table, clips[4:].table) == listed
    assert clips[:3] + listed[3:] == listed
    with pytest.raises(IndexError):
        clips[7]
    assert pickle.loads(pickle.dumps(clips)) == listed and data.Clips.of(clips) is clips
    assert data.count_speakers(clips) == 2 and clips.hours("phones") == 4 / 3600
    assert data.hours_by_language(clips) == {"english": 24 / 3600, "telugu": 4 / 3600}
    assert clips.where(clips.column("duration") > 5) == listed[5:] and data.Clips.of([]) == []


def test_a_manifest_of_many_clips_is_read_in_blocks_and_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BLOCK_ROWS", 30)
    lines = [{"path": f"wavs/{i}.wav", "speaker": f"{i // 50}"} for i in range(500)]
    path = listing(tmp_path, *lines)
    clips = data.read_manifest(path)
    assert [one.path.name for one in clips] == [f"{i}.wav" for i in range(500)]
    assert clips.table.nbytes < 100 * len(clips) and clips.table["name"].num_chunks == 1
    with open(path, "a") as file:
        file.write("{}\n")
    with pytest.raises(command.UserError, match="line 501: path is missing"):
        data.read_manifest(path)


def test_each_file_counts_once_and_held_out_wins(tmp_path, capsys):
    wavs = tmp_path / "hindi" / "wavs"
    wavs.mkdir(parents=True)
    for i in range(4):
        data.write_audio(wavs / f"{i}.wav", np.zeros(2400))
    (wavs / "again.wav").symlink_to("3.wav")
    (tmp_path / "linked").symlink_to("hindi/wavs")
    free = {"commercial_ok": True}
    listing(tmp_path / "one", *({"path": f"../hindi/wavs/{i}.wav", **free} for i in range(3)))
    held = {"path": "../linked/1.wav", "split": "test", **free}
    listing(tmp_path / "two", held, {"path": "../linked/./2.wav"}, held)
    train, test = data.load_splits([tmp_path / "two", wavs, tmp_path], ("train", "test"))
    assert sorted(one.path.name for one in train) == ["0.wav", "2.wav", "3.wav"]
    assert [one.path.name for one in test] == ["1.wav"]
    assert "1 files are held out by one manifest" in capsys.readouterr().err
    free = data.load_clips([tmp_path], "train", commercial_only=True)
    assert [one.path.name for one in free] == ["0.wav"]


def test_what_cannot_be_is_measured_or_counted(tmp_path, capsys):
    values = [1.0, "NaN", "Infinity", 0, -3, 1e9, 0.001, "1" + "0" * 400]
    for i in range(len(values)):
        data.write_audio(tmp_path / f"{i}.wav", np.zeros(24000 + i))
    lines = [{**LINE, "path": f"{i}.wav", "duration": -9} for i in range(len(values))]
    lines += [{**LINE, "path": "0.wav", "sample_rate": -9}, {**LINE, "duration": -9}]
    text = "\n".join(map(json.dumps, lines))
    for value in values:
        text = text.replace('"duration": -9', f'"duration": {value}', 1)
    (tmp_path / data.MANIFEST).write_text(text)
    clips = data.load_clips([tmp_path], "train")
    assert [round(one.duration * 24000) for one in clips] == [24000 + i for i in range(8)]
    told = capsys.readouterr().err
    assert "1 unreadable audio files" in told and "a.wav: no such" in told
    assert "7 clips whose manifest has no possible duration were measured" in told


def test_names_that_are_no_utf_8_and_what_a_scan_passes_over(tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9.wav")
    data.write_audio(tmp_path / odd, np.zeros(2400))
    data.write_audio(tmp_path / ("న" * 83 + "ab.wav"), np.zeros(2400))
    (tmp_path / os.fsdecode(b"bad\xe9.wav")).write_bytes(b"none")
    (tmp_path / "notes.SPH").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    clips = data.load_splits([tmp_path], ["train"], False, tmp_path / "log" / "bad.txt")[0]
    told = capsys.readouterr().err
    assert len(clips) == 2 and "1 unreadable" in told and "1 files of .sph passed over" in told
    assert b"bad\xe9.wav" in (tmp_path / "log" / "bad.txt").read_bytes()
    data.write_manifest(tmp_path / data.MANIFEST, clips)
    again = data.read_manifest(tmp_path / data.MANIFEST)
    assert again == clips and odd in {one.path.name for one in again}
    assert len(data.WindowDataset(again, 0.05)[0]["path"]) > 0


@pytest.mark.parametrize(
    "name, speaker",
    [
        ("84/121123/84-121123-0000.flac", "84"),
        ("84/121123/84_121123_000007_000001.wav", "84"),
        ("84/84-1-0001.wav", "84"),
        ("2026-03-11_call.wav", None),
        ("2026/03/2026-03-11.wav", None),
        ("2026-1103-1530.wav", None),
        ("11-03-2026.wav", None),
        ("20260311-153000-0001.wav", None),
        ("11-03-0001.wav", None),
        ("11/11-03-2026_call.wav", None),
    ],
)
def test_a_speaker_is_read_from_sure_names_alone(tmp_path, name, speaker):
    assert data._speaker_from_name(tmp_path / name) == speaker


def test_a_small_folder_has_training_clips_in_each_language(tmp_path):
    names = [f"{i}.wav" for i in range(200) if data.split_for(f"hindi/{i}.wav") == "test"][:3]
    (tmp_path / "hindi").mkdir()
    for name in [*names, "../1.wav"]:
        data.write_audio(tmp_path / "hindi" / name, np.zeros(2400))
    train, test = data.load_splits([tmp_path], ("train", "test"))
    assert {one.language for one in train} == {"hindi", "other"} and len(test) == 2


def test_links_that_loop_are_walked_once(tmp_path):
    folder = tmp_path / "english" / "a"
    folder.mkdir(parents=True)
    data.write_audio(folder / "q.wav", np.zeros(2400))
    for target in ("..", "../..", "."):
        (folder / f"to{len(target)}").symlink_to(target)
    clips = data.load_clips([tmp_path], "train")
    assert [one.path for one in clips] == [folder / "q.wav"]


def test_a_scan_lists_what_cannot_be_read(bad_folder, tmp_path):
    log = tmp_path / "unreadable.txt"
    splits = data.load_splits([bad_folder], data.SPLITS, unreadable_log=log)
    clips = [found for split in splits for found in split]
    assert sorted(found.path.name for found in clips) == ["good.wav", "stereo.mp3"]
    bad = [os.path.basename(line) for line in log.read_text().splitlines()]
    assert bad == ["cut.flac", "empty.wav", "text.wav"]
    assert {found.language for found in clips} == {"english"}
    good = next(found for found in clips if found.path.name == "good.wav")
    assert (good.duration, good.sample_rate) == (2.0, 16000)


def test_load_clips_joins_manifests_and_loose_audio(tmp_path, bad_folder, capsys):
    corpus = tmp_path / "english" / "corpus"
    corpus.mkdir()
    data.write_audio(corpus / "a.wav", sine(440, 1, 24000))
    data.write_audio(corpus / "unlisted.wav", sine(440, 1, 24000))
    listed = [clip(corpus / "a.wav", 1.0, commercial_ok=True)]
    data.write_manifest(corpus / data.MANIFEST, listed)
    log = tmp_path / "logs" / "unreadable.txt"
    found = itertools.chain(*data.load_splits([bad_folder], data.SPLITS, False, log))
    assert sorted(one.path.name for one in found) == ["a.wav", "good.wav", "stereo.mp3"]
    assert len(log.read_text().splitlines()) == 3
    assert "3 unreadable audio files" in capsys.readouterr().err
    twice = data.load_clips([bad_folder, corpus], "train", commercial_only=True)
    assert [one.path.name for one in twice] == ["a.wav"]


def test_load_clips_says_what_is_missing(tmp_path):
    with pytest.raises(command.UserError, match="no such folder"):
        data.load_clips([tmp_path / "nowhere"], "train")
    with pytest.raises(command.UserError, match="no readable audio"):
        data.load_clips([tmp_path], "train")
    (tmp_path / data.MANIFEST).touch()
    with pytest.raises(command.UserError, match="empty manifest"):
        data.load_clips([tmp_path], "train")
    data.write_manifest(tmp_path / data.MANIFEST, [clip(tmp_path / "a.wav", 1.0, split="test")])
    with pytest.raises(command.UserError, match="none in the train split"):
        data.load_clips([tmp_path], "train")
    assert data.load_clips([tmp_path], "validation") == []
    with pytest.raises(command.UserError, match="commercial_only"):
        data.load_clips([tmp_path], "test", commercial_only=True)


def test_scanned_splits_keep_a_speaker_together(tmp_path):
    for speaker, number in itertools.product(range(40), range(3)):
        name = tmp_path / str(speaker) / f"{speaker}-1-{number:04}.wav"
        name.parent.mkdir(exist_ok=True)
        data.write_audio(name, np.zeros(2400))
    clips = [one for split in data.load_splits([tmp_path], data.SPLITS) for one in split]
    assert data.count_speakers(clips) == 40
    splits = {one.speaker: set() for one in clips}
    for one in clips:
        splits[one.speaker].add(one.split)
    assert all(len(found) == 1 for found in splits.values())
    assert len(set.union(*splits.values())) > 1


def test_split_shares():
    found = [data.split_for(f"speaker {number}") for number in range(4000)]
    assert found.count("validation") / 4000 == pytest.approx(0.05, abs=0.015)
    assert found.count("test") / 4000 == pytest.approx(0.05, abs=0.015)


# --------------------------------------------------------------------------------- augmentation


def test_another_microphone_changes_octaves_and_nothing_else():
    rng = np.random.default_rng(1)
    for hertz in (120, 440, 1000, 5000):
        audio = sine(hertz, 1, 24000)
        heard = data.colour(audio, np.random.default_rng(1))
        gain = np.std(heard) / np.std(audio)
        assert 10 ** (-8 / 20) <= gain <= 10 ** (8 / 20) and abs(gain - 1) > 0.01
        np.testing.assert_allclose(heard, gain * audio, atol=0.02)  # no delay, no other tone
    gains = [np.std(data.colour(sine(hertz, 1, 24000), rng)) for hertz in (200, 200, 200)]
    assert len({round(float(gain), 3) for gain in gains}) == 3


def test_distortion_repeats_and_stays_in_range():
    audio = sine(440, 1, 24000)
    first = data.distort(audio, np.random.default_rng(3), 1.0)
    np.testing.assert_array_equal(first, data.distort(audio, np.random.default_rng(3), 1.0))
    assert first.dtype == np.float32 and len(first) == 24000 and 0.01 < np.abs(first).max() <= 1.0
    np.testing.assert_array_equal(data.distort(audio, np.random.default_rng(3), 0.0), audio)
    assert data.distort(np.zeros(0, np.float32), np.random.default_rng(3), 1.0).size == 0
    assert not data.distort(np.zeros(100, np.float32), np.random.default_rng(3), 1.0).any()


def test_speed_is_chosen_three_times_in_ten_and_moves_pitch_and_length(tmp_path):
    rng = np.random.default_rng(0)
    speeds = np.array([data.draw_speed(rng) for _ in range(4000)])
    assert np.mean(speeds != 1) == pytest.approx(0.3, abs=0.03)
    assert speeds.min() >= 0.85 and speeds.max() <= 1.18
    audio = sine(1000, 2, 24000)
    data.write_audio(tmp_path / "a.wav", audio)
    for speed in (0.9, 1.03, 1.1):
        fast = data.change_speed(audio, 24000, speed)
        assert len(fast) == pytest.approx(48000 / speed, abs=2)
        peak = np.abs(np.fft.rfft(fast * np.hanning(len(fast)))).argmax() * 24000 / len(fast)
        assert peak == pytest.approx(1000 * speed, abs=2)
        read = data.read_audio(tmp_path / "a.wav", speed=speed)
        np.testing.assert_allclose(read[100:40000], fast[100:40000], atol=1e-3)


def test_noise_meets_its_snr():
    audio = sine(440, 1, 24000)
    found = []
    for asked in range(5, 25):
        noise = data.coloured_noise(len(audio), np.random.default_rng(asked))
        noisy = data.add_noise(audio, noise, asked)
        found.append(10 * np.log10(np.sum(audio**2) / np.sum((noisy - audio) ** 2)) - asked)
    np.testing.assert_allclose(found, 0, atol=0.01)
    np.testing.assert_array_equal(data.add_noise(audio, 0 * noise, 5.0), audio)


def test_band_limit_removes_the_top_and_keeps_the_voice():
    high, voice = sine(11500, 1, 24000), sine(1000, 1, 24000)
    for seed in range(10):
        assert np.abs(data.band_limit(high, np.random.default_rng(seed))).max() < 0.05
        kept = data.band_limit(voice, np.random.default_rng(seed))
        np.testing.assert_allclose(kept[1000:-1000], voice[1000:-1000], atol=0.01)


# -------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("start, speed", [(0.0, 1.0), (0.137, 1.0), (0.2, 0.9), (0.01, 1.1)])
def test_frame_labels_match_a_plain_search(start, speed):
    phones = [["_", 0.0, 0.3], ["a", 0.3, 0.42], ["?", 0.42, 0.5], ["b", 0.55, 0.9]]
    ids = {"_": 0, "a": 1, "b": 2}
    labels = data.frame_labels(phones, ids, 60, start, speed, end=1.0)
    for frame, label in enumerate(labels):
        middle = start + (frame + 0.5) * 0.02 * speed
        named = [name for name, first, last in phones if first <= middle < last]
        expected = ids.get(named[0], -100) if named else -100
        assert label == (0 if middle >= 1.0 else expected)


def test_frame_labels_are_unknown_without_phones():
    assert (data.frame_labels(None, {"_": 0}, 5) == -100).all()
    assert (data.frame_labels([["_", 0, 1]], None, 5) == -100).all()


@pytest.mark.parametrize("augmented", [False, True])
def test_labels_stay_on_the_sound_in_any_window(tmp_path, augmented):
    """A tone is the phone `a`, silence is `_`: energy and label agree frame by frame."""
    rate, rng = 16000, np.random.default_rng(5)
    ends = np.cumsum(rng.uniform(0.08, 0.3, 60))
    phones, audio = [], np.zeros(round(ends[-1] * rate), np.float32)
    for number, (first, last) in enumerate(zip([0.0, *ends[:-1]], ends, strict=True)):
        phones.append(["a" if number % 2 else "_", first, last])
        if number % 2:
            at = slice(round(first * rate), round(last * rate))
            audio[at] = sine(800, 20, rate)[: at.stop - at.start]
    data.write_audio(tmp_path / "a.flac", audio, rate)
    one = clip(tmp_path / "a.flac", len(audio) / rate, rate, phones=phones)
    windows = data.WindowDataset(
        [one], 1.0, seed=1, epoch_items=60, augment=augmented, phone_ids={"_": 0, "a": 1}
    )
    agree = total = 0
    for item in (windows[index] for index in range(60)):
        energy = item["audio"].view(50, 480).pow(2).mean(1).sqrt()
        loud = energy > 0.35 * energy.max()
        agree += int((loud == (item["phones"] == 1)).sum())
        total += 50
    # Frames cut by a border may fall to either side.
    assert agree / total > (0.93 if not augmented else 0.9)


def test_short_clips_are_padded_with_zeros_and_silence(tmp_path):
    data.write_audio(tmp_path / "a.wav", sine(440, 0.5, 24000))
    one = clip(tmp_path / "a.wav", 0.5, phones=[["a", 0.0, 0.5]], speaker=None)
    item = data.WindowDataset([one], 1.0, phone_ids={"_": 0, "a": 1})[0]
    assert item["audio"].shape == (1, 24000) and item["audio"].dtype == torch.float32
    assert not item["audio"][0, 12000:].any() and item["audio"][0, :12000].any()
    assert item["phones"].tolist() == [1] * 25 + [0] * 25
    assert item["speaker"] == "" and item["language"] == "english"


def test_windows_are_keyed_by_seed_epoch_and_index(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * 24000)
    data.write_audio(tmp_path / "a.wav", noise)
    clips = [clip(tmp_path / "a.wav", 5.0)]

    def item(index, seed=0, epoch=0):
        windows = data.WindowDataset(clips, 0.5, seed, epoch_items=10, augment=True)
        return windows[epoch, index]["audio"]

    assert torch.equal(item(3), item(3))
    for other in (item(4), item(3, seed=1), item(3, epoch=1)):
        assert not torch.equal(item(3), other)
    with pytest.raises(IndexError):
        item(10)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 100.0])
def test_languages_and_lengths_are_balanced(temperature):
    hours = {"english": 8.0, "hindi": 2.0, "telugu": 0.5}
    clips = []
    for language, total in hours.items():
        for part in (0.75, 0.25):
            clips.append(clip(f"{language}{part}", total * part * 3600, language=language))
    windows = data.WindowDataset(clips, 1.0, language_temperature=temperature)
    rng = np.random.default_rng(0)
    drawn = np.bincount([windows._draw_clip(rng, False) for _ in range(20000)], minlength=6) / 20000
    weights = np.array([total ** (1 / temperature) for total in hours.values()])
    expected = np.outer(weights / weights.sum(), (0.75, 0.25)).ravel()
    np.testing.assert_allclose(drawn, expected, atol=0.015)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_counted_and_listed_and_never_replaced(tmp_path, bad_folder, workers):
    names = ("good.wav", "text.wav", "cut.flac", "empty.wav", "gone.wav")
    clips = [clip(bad_folder / name, 2.0) for name in names]
    log = tmp_path / "unreadable.txt"
    windows = data.WindowDataset(clips, 1.9, epoch_items=40, unreadable_log=log)
    loader = torch.utils.data.DataLoader(windows, 8, num_workers=workers)
    batches = list(loader)
    assert windows.unreadable == 4
    assert {line.split(":")[0].split("/")[-1] for line in log.read_text().splitlines()} == set(
        names[1:]
    )
    # Every window is the good file's sine: its power is that of amplitude 0.5.
    power = torch.cat([batch["audio"] for batch in batches])[..., 2400:-2400].pow(2).mean(-1)
    torch.testing.assert_close(power, torch.full_like(power, 0.125), atol=0.003, rtol=0)
    again = torch.cat([batch["audio"] for batch in torch.utils.data.DataLoader(windows, 8)])
    assert torch.equal(torch.cat([batch["audio"] for batch in batches]), again)


def test_nothing_but_bad_files_ends_in_one_line(bad_folder):
    windows = data.WindowDataset([clip(bad_folder / "text.wav", 2.0)], 1.0)
    with pytest.raises(command.UserError, match="100 unreadable"):
        windows[0]
    alone = training.Distributed(0, 1, torch.device("cpu"))
    with pytest.raises(command.UserError) as caught:
        list(data.training_batches(windows, 8, 1, alone, 1))
    assert str(caught.value).startswith("100 unreadable") and "\n" not in str(caught.value)
    with pytest.raises(command.UserError, match="no clips"):
        data.WindowDataset([], 1.0)
    with pytest.raises(command.UserError, match="durations are zero"):
        data.WindowDataset([clip(bad_folder / "good.wav", 0.0)], 1.0)


@pytest.mark.parametrize("good", [True, False])
def test_a_wrong_duration_stops_nothing_while_others_are_good(tmp_path, good):
    """As it was drawn 5,000 times as often as all others, its end was no window 100 times."""
    rng = np.random.default_rng(0)
    for name in ("wrong.wav", "good.wav"):
        data.write_audio(tmp_path / name, rng.normal(0, 0.1, 24000))
    clips = [clip(tmp_path / "wrong.wav" if good else tmp_path / "gone.wav", 10000.0)]
    clips += [clip(tmp_path / "good.wav", 1.0)]
    log = tmp_path / "log.txt"
    windows = data.WindowDataset(clips, 0.5, epoch_items=12, unreadable_log=log)
    items = [windows[i] for i in range(12)]
    assert all(item["audio"].std() > 0.05 and item["start"] <= 0.5 for item in items)
    assert any("good.wav" in item["path"] for item in items)
    assert windows.unreadable == (not good) and len(log.read_text().splitlines()) == 1
    again = data.WindowDataset(clips, 0.5, epoch_items=12)
    assert torch.equal(again[11]["audio"], items[11]["audio"])


def test_augmented_copies_are_not_augmented_again(tmp_path):
    data.write_audio(tmp_path / "a.wav", sine(440, 1, 24000))
    one = clip(tmp_path / "a.wav", 1.0, augmented=True)
    windows = data.WindowDataset([one], 1.0, epoch_items=20, augment=True)
    first = windows[0]["audio"]
    assert all(torch.equal(windows[index]["audio"], first) for index in range(20))
    windows = data.WindowDataset([replace(one, augmented=False)], 1.0, epoch_items=20, augment=True)
    assert not all(torch.equal(windows[index]["audio"], first) for index in range(20))


def test_a_window_comes_clean_beside_distorted(tmp_path):
    """Both at the same speed and place: a teacher hears what the codec hears, undisturbed."""
    data.write_audio(tmp_path / "a.wav", sine(440, 3, 24000))
    one = clip(tmp_path / "a.wav", 3.0)
    windows = data.WindowDataset([one], 1.0, epoch_items=20, augment=1.0, clean=True)
    for item in (windows[index] for index in range(20)):
        asked = item["start"], item["speed"]
        known = data.read_audio(one.path, asked[0], 1.0 * asked[1], speed=asked[1])[:24000]
        assert torch.equal(item["clean"][0, : len(known)], torch.from_numpy(known))
        assert not torch.equal(item["audio"], item["clean"])
    plain = data.WindowDataset([one], 1.0, clean=True)[0]
    assert torch.equal(plain["audio"], plain["clean"])
    assert "clean" not in data.WindowDataset([one], 1.0)[0]


# ------------------------------------------------------------------------------------- sampling


def test_ranks_see_together_what_one_would():
    alone = list(data.epochs_of_batches(50, 8, 2))
    ranks = [list(data.epochs_of_batches(50, 8, 2, rank=rank, world_size=2)) for rank in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) == 12
    for joint, *parts in zip(alone, *ranks, strict=True):
        assert all(len(part) == 4 for part in parts)
        assert sorted(itertools.chain(*parts)) == joint


@pytest.mark.parametrize("consumed", [0, 8, 24, 48])
def test_sampling_goes_on_after_what_was_consumed(consumed):
    whole = list(itertools.chain(*data.epochs_of_batches(50, 8, 2, epoch=1)))
    rest = list(itertools.chain(*data.epochs_of_batches(50, 8, 2, 1, consumed)))
    assert rest == whole[consumed:] and whole == [(1, i) for i in range(48)]


def test_windows_are_loaded_on_from_any_place_by_workers(tmp_path):
    data.write_audio(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 5 * 24000))
    windows = data.WindowDataset([clip(tmp_path / "a.wav", 5.0)], 0.2, epoch_items=12)
    alone = training.Distributed(0, 1, torch.device("cpu"))

    def batches(workers, *place):
        found = data.training_batches(windows, 4, workers, alone, 2, *place)
        return [batch["audio"] for _, _, batch in found]

    whole, resumed = batches(0), batches(2, 0, 8)
    assert len(whole) == 6 and len(resumed) == 4
    for expected, found in zip(whole[2:], resumed, strict=True):
        assert torch.equal(expected, found)


def test_a_batch_that_no_epoch_holds_or_ranks_cannot_share_is_refused():
    three = training.Distributed(0, 3, torch.device("cpu"))
    for batch_size, word in ((12, "smaller than one batch"), (4, "divide by 3")):
        with pytest.raises(command.UserError, match=word):
            next(data.training_batches(Numbers(), batch_size, 0, three, 1))


class Numbers(torch.utils.data.Dataset):
    """Items that say which they are."""

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return torch.tensor(key)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_over_epochs_from_any_place(workers):
    """One loader for all epochs: what a run that stopped anywhere has still to come."""

    def batches(*start):
        alone = training.Distributed(0, 1, torch.device("cpu"))
        found = data.training_batches(Numbers(), 4, workers, alone, 3, *start)
        return [(epoch, consumed, batch.tolist()) for epoch, consumed, batch in found]

    whole = batches()
    assert [(epoch, consumed) for epoch, consumed, _ in whole] == [
        (0, 4), (0, 8), (1, 4), (1, 8), (2, 4), (2, 8)
    ]  # fmt: skip
    for epoch, consumed, batch in whole:
        assert batch == [[epoch, index] for index in range(consumed - 4, consumed)]
    for done in [3] if workers else range(1, 7):
        epoch, consumed, _ = whole[done - 1]
        assert batches(epoch, consumed) == whole[done:]


class Failing(Numbers):
    """Whose worker fails, or ends without a word."""

    def __init__(self, dies):
        self.dies = dies

    def __getitem__(self, key):
        if self.dies:
            os._exit(3)
        raise command.UserError("folder/a.wav: no such file")


@pytest.mark.parametrize("dies, word", [(True, "--num_workers"), (False, "folder/a.wav: no such")])
def test_a_worker_that_ends_is_one_line(dies, word):
    alone = training.Distributed(0, 1, torch.device("cpu"))
    with pytest.raises(command.UserError, match=word) as caught:
        list(data.training_batches(Failing(dies), 4, 1, alone, 1))
    assert "\n" not in str(caught.value)
