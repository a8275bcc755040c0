"""An emotion by its prosody alone: Praat's measurements and scikit-learn, nothing of our models.

What judges a reply's emotion must not share code with what made it. Measured are pitch, loudness,
tempo and voice quality, much as in the eGeMAPS set (Eyben et al. 2016); linear discriminant
analysis (Fisher 1936), its covariance shrunk (Ledoit and Wolf 2004), tells the styles apart.
"""

from collections.abc import Sequence

import numpy as np

from audio import SAMPLE_RATE

FEATURES = ("pitch_median", "pitch_range", "pitch_deviation", "pitch_slope", "level_mean",
            "level_deviation", "voiced_share", "voiced_seconds", "bursts_a_second", "harmonicity",
            "tilt_low", "tilt_high")  # fmt: skip
PITCH_FLOOR, PITCH_CEILING = 65.0, 600.0  # Hz


def prosody(audio: np.ndarray) -> np.ndarray:
    """`FEATURES` `[12]` of speech `[T]` at 24 kHz: semitones, dB, seconds; zeros of silence.

    Pitch by autocorrelation (Boersma 1993), every 10 ms; tilts are levels of 1 to 3 and of 3 to
    8 kHz against those below 1 kHz. A burst is a rise of 3 dB within 50 ms: about a syllable."""
    import parselmouth

    sound = parselmouth.Sound(np.asarray(audio, np.float64), SAMPLE_RATE)
    if sound.duration < 0.2 or not np.abs(audio).max() > 1e-4:
        return np.zeros(len(FEATURES))
    hertz = sound.to_pitch(0.01, PITCH_FLOOR, PITCH_CEILING).selected_array["frequency"]
    voiced = hertz > 0
    pitch = 12 * np.log2(hertz[voiced] / 100.0) if voiced.sum() > 4 else np.zeros(5)
    slope = np.polyfit(np.linspace(0, 1, len(pitch)), pitch, 1)[0]
    level = sound.to_intensity(PITCH_FLOOR, 0.01).values[0]
    level = level[level > level.max() - 40]
    rises = np.diff(level[::5]) > 3.0
    harmonicity = sound.to_harmonicity_cc(0.01, PITCH_FLOOR).values[0]
    harmonicity = harmonicity[harmonicity > -100]
    edges = np.diff(np.flatnonzero(np.diff(np.r_[0, voiced, 0]) != 0))[::2]
    power = np.abs(np.fft.rfft(sound.values[0])) ** 2
    bins = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    bands = ((bins >= start) & (bins < end) for start, end in ((60, 1e3), (1e3, 3e3), (3e3, 8e3)))
    below, middle, above = (10 * np.log10(power[band].sum() + 1e-9) for band in bands)
    return np.array([np.median(pitch), np.ptp(np.percentile(pitch, (10, 90))), pitch.std(), slope,
        level.mean(), level.std(), voiced.mean(), 0.01 * edges.mean() if len(edges) else 0.0,
        rises.sum() / (0.01 * max(1, len(level))), harmonicity.mean() if len(harmonicity) else 0.0,
        middle - below, above - below])  # fmt: skip


class ProsodyJudge:
    """Tells styles apart after seeing examples (audio `[T]` at 24 kHz)."""

    def __init__(self, examples: Sequence[np.ndarray], styles: Sequence[str]):
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        self._classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        self._classifier.fit(np.stack([prosody(audio) for audio in examples]), list(styles))

    def judge(self, audios: Sequence[np.ndarray]) -> list[str]:
        """The style of each utterance `[T]` at 24 kHz."""
        return [str(x) for x in self._classifier.predict(np.stack([prosody(a) for a in audios]))]
