"""The engines held out whole: never a training voice, and one line where they are not installed."""

import numpy as np
import pytest
import soundfile as sf

import speech
from command import UserError
from dialogues import SPOKEN
from tools import held_out_voices


def test_they_speak_for_the_test_split_alone(monkeypatch):
    monkeypatch.setattr(held_out_voices.HeldOutEngine, "_is_here", lambda self, name: True)
    for name in ("mbrola", "pico"):
        assert {v.split for v in speech.find_engine(name).voices("english")} == {"test"}
    for language in SPOKEN:
        held_out = speech.voices(language, "user", "test", ["mbrola"])
        assert len(held_out) == 8 * len(held_out_voices.VOICES["mbrola"][language])
        for split, role in (("train", "user"), ("validation", "user"), ("train", "agent")):
            with pytest.raises(UserError, match="these engines have none"):
                speech.voices(language, role, split, ["mbrola"])


def test_without_the_package_one_line_says_how(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(UserError, match="apt-get install espeak-ng mbrola"):
        speech.voices("telugu", "user", "test", ["mbrola"])


def test_a_program_is_handed_text_voice_and_pace(monkeypatch, tmp_path):
    """By stand-ins that write a tone, as long as the text they were handed."""
    tone = np.sin(np.arange(16_000) / 16_000 * 2 * np.pi * 120).astype(np.float32)
    asked = []

    def program(command, input, **_):
        asked.append((command, input))
        sf.write(command[command.index("-w") + 1], tone[: 1000 * len(input)], 16_000)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(held_out_voices.subprocess, "run", program)
    mbrola, pico = held_out_voices.SPEECH_ENGINES
    order = speech.Order("-w four", "english", "us1", formant=1.1, rate=1.25)
    said = mbrola.say([order])[0]
    command, text = asked[0]
    assert text == order.text and command[1:5] == ["-v", "mb-us1", "-s", "200"]
    assert (len(said.audio), said.rate) == (7000, 16_000)
    assert said.remaining == {"formant": 1.1, "pitch": 1.0, "pitch_range": 1.0}
    assert pico.say([order])[0].remaining["duration"] == 1 / 1.25
    assert asked[1][0][-2:] == ["--", "-w four"]  # a text is no flag

    monkeypatch.setattr(held_out_voices.subprocess, "run",
        lambda *_, **__: type("Done", (), {"returncode": 1, "stderr": "no voice"}))  # fmt: skip
    with pytest.raises(UserError, match="mbrola cannot say '-w four': no voice"):
        mbrola.say([order])
