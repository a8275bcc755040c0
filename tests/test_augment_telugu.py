"""Copies of speech against plain measurements, runs that are cut off, and voices behind fakes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_fetching import asked_of

import augment_telugu as at
import command
import data
import praat
import speech

parselmouth = pytest.importorskip("parselmouth")
ROOT = Path(__file__).resolve().parent.parent
SENTENCES = [
    "తెలుగు తియ్యని భాష.", "నాకు చాలా బాధగా ఉంది.", "మీకు నచ్చిన రంగు ఏది?",
    "కర్ణాటకకి రాజధాని ఏమిటి?", "నేను మొదటిసారి మీతో మాట్లాడుతున్నాను.",
    "అందులోంచి రెండు పోతే ఎంత మిగులుతుంది?", "నిన్న మాకు పాప పుట్టిందండి!",
    "పర్వాలేదండి, మీకు సాయపడటం నాకిష్టం.", "ఆరు నుంచి పది దాకా లెక్కపెట్టండి.",
]  # fmt: skip


def voiced(hertz, seconds, rate, amplitude=0.4):
    """A buzz whose pitch falls by a tenth, in syllables of 0.2 s: what Praat finds a pitch in."""
    clock = np.arange(round(seconds * rate)) / rate
    pitch = hertz * (1.05 - 0.1 * clock / seconds)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    top = int(0.4 * rate / hertz)
    buzz = sum(np.sin(k * phase) / k for k in range(1, top))
    syllables = 0.55 - 0.45 * np.cos(2 * np.pi * clock / 0.2)
    return (amplitude * buzz / np.abs(buzz).max() * syllables).astype(np.float32)


def pitch_of(audio, rate):
    """Median fundamental in Hz by Praat's autocorrelation, at a finer step than the script's."""
    found = parselmouth.Sound(audio.astype(np.float64), rate).to_pitch_ac(0.005, 70.0)
    hertz = found.selected_array["frequency"]
    return float(np.median(hertz[hertz > 0]))


def peak_hertz(audio, rate):
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return spectrum.argmax() * rate / len(audio)


@pytest.fixture
def corpus(tmp_path):
    """data/telugu: a manifest of three splits, an unreadable file in it, loose files below."""
    root = tmp_path / "data" / "telugu"
    listed = root / "kathbath"
    listed.mkdir(parents=True)
    clips = []
    for number, split in enumerate(["train", "train", "validation", "test", "train"]):
        path, rate = listed / f"{number}.flac", (16000, 48000)[number % 2]
        data.write_audio(path, voiced(110 + 10 * number, 2.0, rate), rate)
        clips.append(
            data.Clip(
                path, 2.0, rate, "telugu", f"speaker-{number}", SENTENCES[number], "happy",
                number == 4, "CC0", True, split, [["_", 0.0, 0.5], ["a", 0.5, 2.0]],
            )
        )  # fmt: skip
    (listed / "bad.flac").write_text("no audio")
    clips.append(replace(clips[0], path=listed / "bad.flac", augmented=False))
    data.write_manifest(listed / data.MANIFEST, clips)
    for number in range(6):
        path = root / "loose" / "deep" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_audio(path, voiced(150, 1.0, 16000), 16000)
    return root


SLOW, PITCHED, NOISY = ("speed", 0.9), ("pitch", 2.0), ("noise", 0.0)


@pytest.fixture
def changes(monkeypatch):
    """Sets which copies are made."""
    return lambda *wanted: monkeypatch.setattr(at, "CHANGES", wanted)


def augment(root, *more, workers=0):
    output = root / "augmented"
    arguments = ["--input_dir", str(root), "--output_dir", str(output), "--hours", "all"]
    at.main([*arguments, "--num_workers", str(workers), *more])
    return read_copies(output)


def read_copies(folder):
    """The copies of a folder, with where they came from."""
    rows = [row for _, row in command.json_lines(folder / data.MANIFEST)]
    clips = data.read_manifest(folder / data.MANIFEST)
    names = ("source", "start", "change", "amount", "seed")
    own = [{name: row[name] for name in names} for row in rows]
    return [at.CopiedClip(**vars(clip), **more) for clip, more in zip(clips, own, strict=True)]


def digests(folder, suffixes=(".wav", ".flac", ".jsonl")):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in suffixes and at.RECORDS not in path.parts
    }


# ------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize("speed", [0.9, 1.1])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_speed_moves_length_and_pitch(speed, rate):
    audio = voiced(120, 3.0, rate)
    fast = data.change_speed(audio, rate, speed)
    assert len(fast) == pytest.approx(len(audio) / speed, abs=1)
    assert pitch_of(fast, rate) == pytest.approx(pitch_of(audio, rate) * speed, rel=0.005)
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    assert peak_hertz(data.change_speed(tone, rate, speed), rate) == pytest.approx(
        1000 * speed, abs=1.5
    )


@pytest.mark.parametrize("semitones", [-2.0, 2.0, 5.0])
@pytest.mark.parametrize("hertz", [95, 210])
def test_pitch_moves_by_semitones_and_nothing_else(semitones, hertz):
    audio = voiced(hertz, 2.0, 16000)
    shifted = praat.shift_pitch(audio, 16000, semitones)
    moved = 12 * np.log2(pitch_of(shifted, 16000) / pitch_of(audio, 16000))
    assert moved == pytest.approx(semitones, abs=0.1)
    assert len(shifted) == len(audio) and shifted.dtype == np.float32
    # Syllables stay in their place: the loudness over time is the same.
    levels = [np.sqrt(np.mean(a.reshape(-1, 320) ** 2, axis=1)) for a in (audio, shifted)]
    assert np.corrcoef(*levels)[0, 1] > 0.97
    np.testing.assert_array_equal(shifted, praat.shift_pitch(audio, 16000, semitones))


def test_pitch_of_real_words_moves_and_formants_stay():
    voice = speech.voices("telugu", "user", "train")
    voice = next(v for v in voice if v.engine == "espeak")
    said = speech.synthesize([speech.Request(SENTENCES[4], "telugu", voice)])[0]
    shifted = praat.shift_pitch(said.audio, data.SAMPLE_RATE, 2.0)
    ratio = pitch_of(shifted, data.SAMPLE_RATE) / pitch_of(said.audio, data.SAMPLE_RATE)
    assert 12 * np.log2(ratio) == pytest.approx(2.0, abs=0.25)
    tracks = [_first_formants(audio) for audio in (said.audio, shifted)]
    both = np.isfinite(tracks).all(axis=0)
    # Played 2 semitones faster every formant would rise by 12 %.
    assert np.median(tracks[1][both] / tracks[0][both]) == pytest.approx(1.0, abs=0.03)


def _first_formants(audio):
    sound = parselmouth.Sound(audio.astype(np.float64), data.SAMPLE_RATE)
    formants = sound.to_formant_burg()
    moments = np.arange(0.1, sound.duration - 0.1, 0.01)
    return np.array([formants.get_value_at_time(2, moment) for moment in moments])


def test_silence_and_scraps_have_no_pitch_to_move():
    silence = np.zeros(16000, np.float32)
    np.testing.assert_array_equal(praat.shift_pitch(silence, 16000, 2.0), silence)
    with pytest.raises(praat.TooShort):
        praat.shift_pitch(silence[:100], 16000, 2.0)


def _snr(audio, noisy):
    """In dB, whatever gain was applied to the sum."""
    gain = np.dot(audio, noisy) / np.dot(audio, audio)
    rest = noisy - gain * audio
    return 10 * np.log10(np.sum((gain * audio) ** 2) / np.sum(rest**2))


# --------------------------------------------------------------------------------------- copies


def test_every_training_clip_is_copied_and_nobody_else(corpus, capsys):
    before = digests(corpus)
    held_out = {split: data.load_clips([corpus], split) for split in ("validation", "test")}
    train = data.load_clips([corpus], "train")
    copies = augment(corpus)
    printed = capsys.readouterr().out

    assert {k: v for k, v in digests(corpus).items() if not k.startswith("augmented/")} == before
    for split, clips in held_out.items():
        assert data.load_clips([corpus], split) == clips
    sources = {at.source_name(c, corpus) for c in train if not c.augmented}
    sources.discard("kathbath/bad.flac")
    assert {copy.source for copy in copies} == sources and len(copies) == 5 * len(sources)
    assert "loose/deep/0.wav" in sources or "loose/deep/1.wav" in sources
    assert all(copy.augmented and copy.split == "train" for copy in copies)
    assert "5 left out" not in printed and "1 left out" in printed and "bad.flac" in printed
    assert "h of copies" in printed and "2,000 h" in printed
    assert printed.index("to make:") < printed.index("clips,")
    now = data.load_clips([corpus], "train")
    assert len(now) == len(train) + len(copies)
    for copy in copies:
        assert data.probe(copy.path) == (pytest.approx(copy.duration, abs=0.01), copy.sample_rate)


def test_a_copy_says_where_it_came_from_and_is_what_it_says(corpus):
    copies = {
        c.path.relative_to(corpus / "augmented").with_suffix("").as_posix(): c
        for c in augment(corpus, "--format", "flac")
    }
    original = data.read_audio(corpus / "kathbath" / "0.flac", sample_rate=16000)
    slow, high = copies["kathbath/0_speed0.9"], copies["kathbath/0_pitch+2"]
    noisy = copies["kathbath/0_noise0"]
    for copy in (slow, high, noisy):
        assert (copy.speaker, copy.text, copy.emotion) == ("speaker-0", SENTENCES[0], "happy")
        assert (copy.license, copy.commercial_ok, copy.language) == ("CC0", True, "telugu")
        assert (copy.source, copy.start, copy.seed) == ("kathbath/0.flac", 0.0, 0)
    assert (slow.change, slow.amount) == ("speed", 0.9)
    assert slow.duration == pytest.approx(2.0 / 0.9, abs=0.001)
    assert slow.phones == [["_", 0.0, 0.5556], ["a", 0.5556, 2.2222]]
    assert (high.change, high.amount, high.duration) == ("pitch", 2.0, 2.0)
    assert high.phones == [["_", 0.0, 0.5], ["a", 0.5, 2.0]]
    moved = pitch_of(data.read_audio(high.path, sample_rate=16000), 16000)
    assert 12 * np.log2(moved / pitch_of(original, 16000)) == pytest.approx(2.0, abs=0.1)
    assert noisy.change == "noise" and 10 <= noisy.amount <= 30
    found = _snr(original, data.read_audio(noisy.path, sample_rate=16000))
    assert found == pytest.approx(noisy.amount, abs=0.1)
    # The codec works at 24 kHz: a copy of 48 kHz would only be larger.
    assert copies["kathbath/1_speed0.9"].sample_rate == 24000


def test_the_seed_decides_and_processes_do_not(corpus, tmp_path, monkeypatch):
    shutil.rmtree(corpus / "loose")
    other, third = tmp_path / "b" / "telugu", tmp_path / "c" / "telugu"
    for copy in (other, third):
        shutil.copytree(corpus, copy)
    few = ("--format", "flac")
    augment(corpus, *few)
    monkeypatch.setattr(at, "PART_COPIES", 2)
    augment(other, *few, workers=2)
    assert digests(other / "augmented") == digests(corpus / "augmented")
    augment(third, *few, "--seed", "1")
    first, second = digests(corpus / "augmented"), digests(third / "augmented")
    assert {k.split("_")[1] for k in first if first[k] != second[k] and "_" in k} == {"noise0.flac"}


def test_ogg_repeats_sample_by_sample(corpus, tmp_path):
    other = tmp_path / "b" / "telugu"
    shutil.copytree(corpus, other)
    for one, two in zip(augment(corpus), augment(other), strict=True):
        assert one.path.name == two.path.name
        np.testing.assert_array_equal(data.read_audio(one.path), data.read_audio(two.path))


def test_the_same_command_again_makes_nothing(corpus, capsys, monkeypatch):
    augment(corpus)
    first = digests(corpus / "augmented", (".ogg", ".jsonl"))
    (corpus / "kathbath" / "bad.flac").unlink()
    monkeypatch.setattr(at, "write_audio", None)
    capsys.readouterr()
    copies = augment(corpus)
    assert digests(corpus / "augmented", (".ogg", ".jsonl")) == first and len(copies) > 20
    # A copy whose data were lost is not taken for made.
    monkeypatch.undo()
    copies[0].path.write_bytes(b"")
    copies[1].path.unlink()
    again = augment(corpus)
    assert again == copies and all(copy.path.stat().st_size for copy in again)


def test_more_corpora_and_more_hours_add_to_what_is_there(corpus, monkeypatch):
    monkeypatch.setattr(at, "PART_COPIES", 3)
    manifest = corpus / "kathbath" / data.MANIFEST
    good = [clip for clip in data.read_manifest(manifest) if clip.path.name != "bad.flac"]
    data.write_manifest(manifest, good)
    arguments = ["--input_dir", str(corpus), "--output_dir", str(corpus / "augmented")]
    arguments += ["--num_workers", "0"]
    at.main([*arguments, "--hours", str(10 / 3600)])
    few = read_copies(corpus / "augmented")
    assert 10 <= sum(copy.duration for copy in few) < 14
    at.main([*arguments, "--hours", str(20 / 3600)])
    more = read_copies(corpus / "augmented")
    assert {copy.path for copy in few} < {copy.path for copy in more}
    at.main([*arguments, "--hours", str(10 / 3600)])
    assert read_copies(corpus / "augmented") == more
    (corpus / "new").mkdir()
    data.write_audio(corpus / "new" / "1-1-1.wav", voiced(130, 1, 16000), 16000)
    at.main([*arguments, "--hours", "all"])
    last = {copy.source for copy in read_copies(corpus / "augmented")}
    assert "new/1-1-1.wav" in last and {copy.source for copy in more} < last


def test_the_gap_is_what_the_goal_lacks(corpus, capsys):
    seconds = sum(c.duration for c in data.load_clips([corpus], "train") if not c.augmented)
    arguments = ["--input_dir", str(corpus), "--output_dir", str(corpus / "augmented")]
    arguments += ["--num_workers", "0", "--goal_hours"]
    at.main([*arguments, str(seconds / 3600)])
    assert "nothing to make" in capsys.readouterr().out
    assert not (corpus / "augmented").exists()
    at.main([*arguments, str((seconds + 12) / 3600)])
    copies = read_copies(corpus / "augmented")
    assert 10 <= sum(copy.duration for copy in copies) <= 15
    assert len({copy.change.split(":")[0] for copy in copies}) > 1


def test_long_recordings_are_copied_in_pieces(tmp_path, monkeypatch, changes):
    changes(NOISY)
    monkeypatch.setattr(at, "SNR_DB", (60, 60))
    monkeypatch.setattr(at, "PIECE_SECONDS", 2.0)
    root = tmp_path / "telugu"
    (root / "a").mkdir(parents=True)
    audio = voiced(120, 5.0, 16000)
    data.write_audio(root / "a" / "x.wav", audio, 16000)
    long = data.Clip(root / "a" / "x.wav", 5.0, 16000, "telugu", "one", "a text")
    data.write_manifest(root / "a" / data.MANIFEST, [long])
    copies = augment(root, "--format", "flac")
    assert [copy.start for copy in copies] == [0.0, 2.0, 3.0]
    joined = np.concatenate([data.read_audio(copy.path, sample_rate=16000) for copy in copies])
    assert len(joined) == pytest.approx(len(audio), abs=2)
    np.testing.assert_allclose(joined[: len(audio)], audio[: len(joined)], atol=0.01)
    assert all(copy.text is None for copy in copies)


def test_files_that_differ_in_their_suffix_alone_stay_two(tmp_path, changes):
    changes(SLOW)
    root = tmp_path / "telugu"
    root.mkdir()
    for suffix, hertz in ((".wav", 110), (".flac", 170)):
        data.write_audio(root / f"1-1-1{suffix}", voiced(hertz, 1.0, 16000), 16000)
    copies = augment(root)
    assert [copy.path.name for copy in copies] == [
        "1-1-1_flac_speed0.9.ogg",
        "1-1-1_wav_speed0.9.ogg",
    ]


# ------------------------------------------------------------------------- what may go wrong


def test_a_killed_run_goes_on(corpus, tmp_path, capsys):
    other = tmp_path / "b" / "telugu"
    shutil.copytree(corpus, other)
    augment(other, "--format", "flac")
    code = (
        "import sys, time, augment_telugu as at; at.PART_COPIES = 2; write = at.write_audio\n"
        "at.write_audio = lambda *a: (write(*a), time.sleep(0.05))\n"
        "at.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "--input_dir", str(corpus), "--hours", "all"]
    command += ["--output_dir", str(corpus / "augmented"), "--num_workers", "0"]
    process = subprocess.Popen(
        [*command, "--format", "flac"], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    records = corpus / ".augmented.part" / at.RECORDS
    deadline = time.monotonic() + 300  # a busy machine
    while len(list(records.glob("*.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(records.glob("*.jsonl")) and not (corpus / "augmented").exists()
    # What a trainer would take for recordings of their own is out of its sight.
    assert not any(".augmented" in str(c.path) for c in data.load_clips([corpus], "train"))
    (corpus / ".augmented.part" / "kathbath" / "0_pitch+2.flac.1.part").write_bytes(b"half")
    augment(corpus, "--format", "flac")
    assert digests(corpus / "augmented") == digests(other / "augmented")
    assert not list(corpus.rglob("*.part"))


def test_a_full_disk_is_seen_before_and_during(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(corpus)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(command.UserError, match="fewer hours") as caught:
        augment(corpus)
    assert "\n" not in str(caught.value) and not list(corpus.glob("*augmented*"))
    monkeypatch.undo()
    write, count = at.write_audio, []

    def full(path, *more):
        count.append(path)
        if len(count) > 7:
            raise data.AudioError(f"{path}: cannot be written; is the disk full?")
        write(path, *more)

    monkeypatch.setattr(at, "write_audio", full)
    monkeypatch.setattr(at, "PART_COPIES", 3)
    with pytest.raises(command.UserError, match="disk full"):
        augment(corpus)
    monkeypatch.setattr(at, "write_audio", write)
    assert len(augment(corpus)) % 5 == 0


def test_a_really_full_disk(corpus, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    mounting = [mount or "mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(small)]
    if mount is None or os.geteuid() or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        output = ["--output_dir", str(small / "out" / "augmented"), "--format", "flac"]
        arguments = ["--input_dir", str(corpus), "--hours", "all", "--num_workers", "0"]
        at.check_room, check = lambda *more: None, at.check_room
        try:
            with pytest.raises((command.UserError, OSError)) as caught:
                at.main([*arguments, *output])
        finally:
            at.check_room = check
        assert "disk" in str(caught.value) or "space" in str(caught.value)
        leftovers = [p for p in small.rglob("*.flac") if soundfile.info(p).frames < 8000]
        assert not leftovers
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_bad_input_is_one_line(tmp_path, corpus, monkeypatch):
    def refused(*arguments):
        with pytest.raises(command.UserError) as caught:
            at.main([*arguments, "--num_workers", "0"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    empty, root = tmp_path / "empty", str(corpus)
    empty.mkdir()
    assert "--input_dir" in refused("--input_dir", str(tmp_path / "nowhere"))
    assert "no readable audio" in refused("--input_dir", str(empty))
    shutil.move(corpus / "kathbath", tmp_path)
    (corpus / "loose").rename(corpus / "synthetic_loose")
    assert "but synthetic" in refused("--input_dir", root, "--hours", "all")
    (corpus / "synthetic_loose").rename(corpus / "loose")
    shutil.move(tmp_path / "kathbath", corpus)
    strange = refused("--input_dir", root, "--output_dir", str(corpus / "kathbath"))
    assert "--output_dir" in strange
    (tmp_path / "file").write_text("x")
    output = ("--output_dir", str(tmp_path / "file/x"))
    assert "--output_dir" in refused("--input_dir", root, *output)
    speech_flags = ("--synthesize_hours", "1", "--engine", "espeak")
    (corpus / "synthetic_espeak").write_text("x")
    assert "--input_dir" in refused("--input_dir", root, *speech_flags)
    (corpus / "synthetic_espeak").unlink()
    (corpus / ".synthetic_espeak.part").mkdir()
    with command.only_one(corpus / ".synthetic_espeak.part"):
        assert "another process" in refused("--input_dir", root, *speech_flags)
    for clip in corpus.rglob("*"):
        if clip.suffix in (".flac", ".wav"):
            clip.write_text("no audio")
    data.write_manifest(
        corpus / "loose" / data.MANIFEST,
        [data.Clip(corpus / "loose" / "deep" / "0.wav", 1.0, 16000, "telugu")],
    )
    assert "no clip" in refused("--input_dir", root, "--hours", "all")
    assert not list(corpus.glob("*augmented*/"))
    monkeypatch.setitem(sys.modules, "parselmouth", None)
    assert "pip install praat-parselmouth" in refused("--input_dir", root)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--hours", "nan"], "--hours"),
     (["--hours", "0"], "more than 0"), (["--synthesize_hours", "0"], "more than 0"),
     (["--synthesize_hours", "1e300"], "--synthesize_hours"), (["--num_workers", "-1"], "least 0"),
     (["--goal_hours", "-1"], "--goal_hours"), (["--seed", "-1"], "--seed"),
     (["--engine", "none"], "--engine"), (["--seed", "1.5"], "not a whole number")],
)  # fmt: skip
def test_flags_out_of_range_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        at.main(flags)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and message in printed and printed.count("\n") == 1


def test_odd_names_and_odd_letters_are_copied_like_all_others(tmp_path, capsys, changes):
    changes(SLOW, ("speed", 1.1), NOISY)
    root, text = tmp_path / "telugu", "one\u2028two\x85 సాఫ్ట్\u200cవేర్ बिल्\u200dकुल"
    names = ["న" * 82 + "abc.wav", "న" * 82 + "abd.wav", "caf\udce9.wav", "2026-03-11_call.wav"]
    (root / "mine").mkdir(parents=True)
    for name in names:
        data.write_audio(tmp_path / "a.wav", voiced(150, 0.5, 16000), 16000)
        os.replace(tmp_path / "a.wav", root / "mine" / name)
    clips = [data.Clip(root / "mine" / name, 0.5, 16000, "telugu", text=text) for name in names]
    data.write_manifest(root / "mine" / data.MANIFEST, clips)
    copies = augment(root, "--format", "flac")
    assert len(copies) == 4 * 3 and {copy.text for copy in copies} == {text}
    assert {copy.source for copy in copies} == {f"mine/{name}" for name in names}
    assert all(data.probe(copy.path) for copy in copies)
    assert all(str(copy.path).isprintable() for copy in copies)
    assert command.file_name("caf\udce9.wav").isprintable() and at.hashed("caf\udce9.wav")
    assert (
        augment(root, "--format", "flac") == copies and "nothing to make" in capsys.readouterr().out
    )


def test_copies_are_counted_by_one_look_a_folder(corpus, monkeypatch, changes):
    changes(SLOW, NOISY)
    made = len(augment(corpus, "--format", "flac"))
    asked = asked_of(monkeypatch)
    assert len(at.made_rows(corpus / "augmented")) == made
    assert not [one for one in asked if ".flac" in one]


# ------------------------------------------------------------------------------------ synthesis


def synthesize(root, *more):
    arguments = ["--input_dir", str(root), "--synthesize_hours", "0.005", "--num_workers", "0"]
    at.main([*arguments, *more])


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*SENTENCES, "నాకు 5 రూపాయలు", "hello there", "అ"]), "utf-8")
    return path


@pytest.fixture
def empty_root(tmp_path):
    root = tmp_path / "data" / "telugu"
    root.mkdir(parents=True)
    return root


def test_espeak_says_sentences_and_goes_on(empty_root, texts, capsys, monkeypatch):
    monkeypatch.setattr(at, "SYNTHETIC_PART_SECONDS", 9.0)
    arguments = ("--engine", "espeak", "--text_file", str(texts), "--format", "flac")
    synthesize(empty_root, *arguments)
    printed = capsys.readouterr().out
    assert "texts: 9; 3 left out" in printed and "synthetic_espeak" in printed
    folder = empty_root / "synthetic_espeak"
    clips = data.read_manifest(folder / data.MANIFEST)
    assert sum(clip.duration for clip in clips) >= 18 and not list(folder.rglob("*.part"))
    for clip in clips:
        assert clip.text in SENTENCES and clip.split == "train" and not clip.augmented
        assert data.probe(clip.path) == (pytest.approx(clip.duration, abs=1e-3), 24000)
        assert clip.phones[-1][2] == pytest.approx(clip.duration, abs=0.01)
    assert len({clip.speaker for clip in clips}) > 5
    line = json.loads((folder / data.MANIFEST).read_text("utf-8").splitlines()[0])
    assert line["engine"] == "espeak" and 0.87 <= line["rate"] <= 1.15
    assert -2 <= line["semitones"] <= 2 and line["commercial_ok"]
    assert sorted(data.load_clips([empty_root], "train"), key=str) == sorted(clips, key=str)
    # A part that is lost, and one of which a file is, are made again as they were.
    before = digests(folder)
    assert len(list((folder / at.RECORDS).glob("*.jsonl"))) == 2
    for lost in (folder / "00001", next((folder / "00000").glob("*.flac"))):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
        synthesize(empty_root, *arguments)
        assert digests(folder) == before


def test_sentences_of_held_out_speakers_are_not_said(corpus, changes):
    synthesize(corpus, "--engine", "espeak")
    clips = data.read_manifest(corpus / "synthetic_espeak" / data.MANIFEST)
    assert {clip.text for clip in clips} <= {SENTENCES[0], SENTENCES[1], SENTENCES[4]}
    changes(SLOW)
    copies = augment(corpus)
    assert copies and not any("synthetic" in copy.source for copy in copies)


def test_held_out_voices_of_the_toy_do_not_speak():
    if shutil.which("festival") is None:
        pytest.skip("no festival")
    names = [voice.name for voice in at.own_voices("festival")]
    assert "telugu_NSK_diphone" in names and "ked_diphone" not in names


def test_synthesis_says_what_is_missing(tmp_path, empty_root, texts, monkeypatch):
    def refused(*arguments):
        with pytest.raises(command.UserError) as caught:
            synthesize(empty_root, *arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file = ("--text_file", str(texts))
    with pytest.raises(FileNotFoundError):  # in one line, by command.run
        synthesize(empty_root, "--text_file", str(tmp_path / "no.txt"))
    (tmp_path / "latin.txt").write_text("hello there my friend")
    assert "no Telugu sentence" in refused("--text_file", str(tmp_path / "latin.txt"))
    for name in ("indictts", "parler", "mms", "piper"):
        said = refused(*file, "--engine", name)
        engine = speech.find_engine(name)
        assert engine.install in said and engine._of(engine.fetch, "telugu") in said
    assert "v1-checkpoints-release/te.zip" in refused(*file)
    assert not list(empty_root.iterdir())


def test_an_engine_that_says_nothing_useful_ends(empty_root, texts, monkeypatch):
    class Mute:
        name, install, license, commercial_ok = "espeak", "", "", True

        def voices(self, language):
            return [speech.Voice("m", "espeak", language, "mute", "mute")]

        def say(self, orders):
            return [speech.Raw(np.zeros(9000, np.float32), 24000) for _ in orders]

    monkeypatch.setattr(speech, "all_engines", lambda: {"espeak": Mute()})
    at.own_voices.cache_clear()
    with pytest.raises(command.UserError, match="in a row dropped"):
        synthesize(empty_root, "--engine", "espeak", "--text_file", str(texts))
    at.own_voices.cache_clear()


# --------------------------------------------------------------------------------------- checks


def said_by_espeak(text):
    voice = next(v for v in speech.voices("telugu", "user", "train") if v.engine == "espeak")
    made = speech.synthesize([speech.Request(text, "telugu", voice)])[0]
    return made.audio


def test_the_plausible_check_finds_what_has_the_wrong_length():
    for text in SENTENCES:
        said = said_by_espeak(text)
        assert at.length_fault(said, text) is None
        assert "s a phone" in at.length_fault(said[: len(said) // 5], text)
        assert "s a phone" in at.length_fault(np.tile(said, 5), text)
        assert at.length_fault(0 * said, text)
    assert at.length_fault(said, "...") == "no phones in the text"


def test_texts_are_telugu_alone():
    joined = "సాఫ్ట్\u200cవేర్ పని\u200dచేస్తుంది"
    texts = (joined, SENTENCES[0], f" {SENTENCES[0]} ", "2 రోజులు పట్టింది", "ok అన్నాడు రాజు", None)
    clips = [data.Clip(Path("a"), 1.0, 16000, "telugu", text=text) for text in texts]
    assert at.choose_texts(clips, None) == (sorted([joined, SENTENCES[0]]), 2)


def test_a_file_of_texts_ends_its_lines_at_line_feeds(tmp_path):
    lines = [f"{SENTENCES[0]}\u2028{SENTENCES[1]}", SENTENCES[2]]
    (tmp_path / "t.txt").write_bytes("\r\n".join(lines).encode())
    assert at.choose_texts([], str(tmp_path / "t.txt"))[0] == sorted(
        [f"{SENTENCES[0]} {SENTENCES[1]}", SENTENCES[2]]
    )


def test_the_table_of_engines_is_printed(capsys):
    at.main(["--list_engines"])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    joined = " ".join(printed.replace("\\\n", "").split())
    assert all(
        name in joined and row.install in joined for name, row in speech.all_engines().items()
    )
    assert "no commercial use" in printed


def test_every_flag_is_read():
    source = (ROOT / "augment_telugu.py").read_text(encoding="utf-8")
    for name in vars(at.parse_arguments([])):
        assert f"args.{name}" in source
