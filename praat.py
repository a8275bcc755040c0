"""What Praat does to a voice, in a process of its own, as it can loop for ever.

Praat: Boersma & Weenink (package praat-parselmouth, GPL-3: used, not shipped). The process imports
NumPy and parselmouth alone, serves one caller, and is started again after a call it did not end.
"""

import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import warnings
from multiprocessing.connection import Connection, Pipe

import numpy as np

from command import UserError

INSTALL = "pip install praat-parselmouth"
PITCH_HZ = (60.0, 500.0)  # where a voice's pitch is looked for
LOWEST_HZ = 30.0  # a stretched contour stays above: a deep creak
LIMIT_SECONDS = (10.0, 1.0)  # of processor time: fixed, and for each second of audio
_LOCK, _RUNNING = threading.Lock(), {}  # one other process for each: a fork has its own


class TooShort(ValueError):
    """The audio is too short, or too odd, to have a pitch."""


def check_installed() -> None:  # else UserError
    if importlib.util.find_spec("parselmouth") is None:
        raise UserError(f"praat is not installed: {INSTALL}")


def elsewhere(function):
    """The function, run in the other process. Raises TooShort; UserError where it does not end."""

    @functools.wraps(function)
    def call(audio: np.ndarray, sample_rate: int, *values: float, **named: float) -> np.ndarray:
        check_installed()
        limit = LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * len(audio) / sample_rate
        answer = _ask(os.getpid(), limit, function.__name__, (audio, sample_rate, *values), named)
        if answer is None:
            raise UserError(f"Praat did not come to an end with a voice's pitch in {limit:.0f} s")
        if isinstance(answer, str):
            raise TooShort(answer.strip().splitlines()[0])
        return answer

    return call


@elsewhere
def change_voice(audio, sample_rate, formant=1.0, median_hz=0.0, pitch_range=1.0, duration=1.0,
                 pitch=1.0):  # fmt: skip
    """Praat's "Change gender" on audio `[T]`: all are factors but the median pitch, `median_hz`; 0
    stands for the voice's own times `pitch`. The range is narrowed to what the contour bears."""
    import parselmouth

    call, sound = parselmouth.praat.call, parselmouth.Sound(audio.astype(np.float64), sample_rate)
    parselmouth.praat.run("random_initializeWithSeedUnsafelyButPredictably (1)")
    contour = call(sound, "To Pitch", 0.8 / PITCH_HZ[0], *PITCH_HZ)
    hertz = contour.selected_array["frequency"]
    if not median_hz and pitch != 1 and hertz.any():
        median_hz = pitch * float(np.median(hertz[hertz > 0]))
    bounded = _bounded_range(hertz, median_hz, pitch_range)
    return call([sound, contour], "Change gender", formant, median_hz, bounded, duration).values[0]


def _bounded_range(hertz: np.ndarray, median_hz: float, pitch_range: float) -> float:
    """The factor of the range of a contour `[frames]` (0 where unvoiced), or the largest that keeps
    all of it above LOWEST_HZ: Praat counts periods, and near 0 Hz there is no next one."""
    voiced = hertz[hertz > 0]
    if pitch_range <= 1 or not len(voiced):
        return pitch_range
    middle = median_hz or float(np.median(voiced))
    depth = middle * (1 - float(voiced.min() / np.median(voiced)))  # Hz below the middle
    return min(pitch_range, max(1.0, (middle - LOWEST_HZ) / max(depth, 1e-3)))


@elsewhere
def shift_pitch(audio, sample_rate, semitones):
    """Audio `[T]` with its fundamental moved by Praat's PSOLA (Moulines & Charpentier 1990);
    length, timing, formants and sounds without pitch stay."""
    import parselmouth

    call, sound = parselmouth.praat.call, parselmouth.Sound(audio.astype(np.float64), sample_rate)
    voice = call(sound, "To Manipulation", 0.01, *PITCH_HZ)
    tier = call(voice, "Extract pitch tier")
    call(tier, "Multiply frequencies", sound.xmin, sound.xmax, 2 ** (semitones / 12))
    call([tier, voice], "Replace pitch tier")
    out = call(voice, "Get resynthesis (overlap-add)").values[0]
    return np.pad(out, (0, max(len(audio) - len(out), 0)))[: len(audio)]


def _ask(pid: int, *request) -> np.ndarray | str | None:
    """The answer: audio, or what went wrong; None where the process ended over it."""
    with _LOCK:
        if pid not in _RUNNING:
            ours, its = Pipe()
            # A session of its own, as Ctrl-C is for the caller; what libraries print is no answer.
            options = {"start_new_session": True, "pass_fds": [its.fileno()], "stdout": 2}
            line = [sys.executable, os.path.abspath(__file__), str(its.fileno())]
            _RUNNING[pid] = ours, subprocess.Popen(line, **options)
            its.close()
        pipe, other = _RUNNING[pid]
        try:
            pipe.send(request)
            return pipe.recv()
        except BaseException as error:  # Ctrl-C too: the next call would get this one's answer
            del _RUNNING[pid]
            pipe.close()
            other.kill()
            other.wait()
            if not isinstance(error, (EOFError, OSError)):
                raise
            return None


def _serve() -> None:
    """Answers calls on its pipe, one at a time, until that ends. The system ends a process whose
    processor time is used up, also within Praat's own code."""
    functions = {f.__name__: f.__wrapped__ for f in (change_voice, shift_pitch)}
    pipe = Connection(int(sys.argv[1]))
    warnings.simplefilter("ignore")  # "no voiced segments": then only lengths change
    with contextlib.suppress(EOFError, OSError):  # nobody asks on
        while True:
            limit, name, values, named = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, limit)
            try:
                answer = functions[name](*values, **named).astype(np.float32)
            except Exception as error:  # PraatError, and what parselmouth raises on odd input
                answer = str(error) or type(error).__name__
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send(answer)


if __name__ == "__main__":
    _serve()
