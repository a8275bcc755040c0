"""Engines that nothing here learns from: MBROLA's diphones and SVOX Pico, for the test split alone.

    engine   languages                packages (Debian's contrib and non-free)
    mbrola   English, Hindi, Telugu   espeak-ng mbrola mbrola-us1 …-us2 …-in1 …-in2 …-tl1
    pico     English                  libttspico-utils

Whether a model hears speech or the engines of its training is asked in voices of a whole engine
that it has not met: `--engines mbrola` of `tools/probe_exchanges.py` and `evaluate_s2s.py`. They
are never training voices, of anything.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile as sf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import UserError  # noqa: E402
from speech import CHANGES, Order, Raw, Voice  # noqa: E402

NORMAL_WPM = 160
MBROLA_DATA = Path("/usr/share/mbrola")
VOICES = {
    "mbrola": {"english": ("us1", "us2"), "hindi": ("in1", "in2"), "telugu": ("tl1",)},
    "pico": {"english": ("en-US", "en-GB")},
}
PROGRAMS = {"mbrola": ("espeak-ng", "mbrola"), "pico": ("pico2wave",)}


@dataclass(frozen=True)
class HeldOutEngine:
    """An engine of the test split, as `speech.Engine` describes them."""

    name: str
    install: str
    license: str
    note: str
    commercial_ok: bool = False  # MBROLA's voices are free for non-commercial use

    def voices(self, language: str) -> list[Voice]:
        """Its own voices and changes of them by Praat; UserError where it is not installed."""
        names = [name for name in VOICES[self.name].get(language, ()) if self._is_here(name)]
        if not names:
            raise UserError(f"{self.name} has no {language} voice here: {self.install}")
        return [Voice(f"{language}/{self.name}/{name}/{i}", self.name, language,
                      f"{self.name}-{name}", name, *change, split="test")
                for name in names for i, change in enumerate(CHANGES)]  # fmt: skip

    def say(self, orders: Sequence[Order]) -> list[Raw]:
        """Each by one call of the program: both are quick to start."""
        return [self._one(order) for order in orders]

    def _is_here(self, name: str) -> bool:
        programs = all(map(shutil.which, PROGRAMS[self.name]))
        return programs and (self.name != "mbrola" or (MBROLA_DATA / name / name).exists())

    def _one(self, order: Order) -> Raw:
        remaining = {
            "formant": order.formant,
            "pitch": order.pitch,
            "pitch_range": order.pitch_range,
        }
        with tempfile.TemporaryDirectory() as folder:
            wave = str(Path(folder) / "said.wav")
            if self.name == "mbrola":
                pace = str(round(NORMAL_WPM * order.rate))
                said = ["espeak-ng", "-v", f"mb-{order.name}", "-s", pace, "-w", wave, "--stdin"]
            else:
                remaining["duration"] = 1 / order.rate
                said = ["pico2wave", "-l", order.name, "-w", wave, "--", order.text]
            done = subprocess.run(said, input=order.text, capture_output=True, text=True)
            if done.returncode or not Path(wave).exists():
                raise UserError(
                    f"{self.name} cannot say {order.text!r}: {done.stderr.strip()[:80]}"
                )
            audio, rate = sf.read(wave, dtype="float32")
        return Raw(audio, rate, remaining=remaining)


SPEECH_ENGINES = (
    HeldOutEngine("mbrola", "apt-get install espeak-ng mbrola mbrola-us1 mbrola-us2 mbrola-in1 "
                  "mbrola-in2 mbrola-tl1 (contrib, non-free)", "MBROLA's voices: not commercial",
                  "diphone voices, for the test split alone"),
    HeldOutEngine("pico", "apt-get install libttspico-utils (non-free)", "Apache-2.0 (SVOX Pico)",
                  "English, for the test split alone", commercial_ok=True),
)  # fmt: skip
