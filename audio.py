"""Audio files: reading any window of any format, writing, and what a file says of itself.

Letters in shapes: `T` samples, `C` channels. 24 kHz; a codec's frame is 480 samples (50 a second).
"""

import contextlib
import math
import os
import wave
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from command import UserError, atomic_write, first_line

try:
    import soundfile
    import soxr
except (ImportError, OSError):  # as on a laptop that only talks to a server: plain WAV then
    soundfile = None

SAMPLE_RATE, HOP = 24000, 480
FRAME_SECONDS = HOP / SAMPLE_RATE
# What `write_audio` makes: libsndfile's format and subtype.
WRITABLE = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", None),
            ".opus": ("OGG", "OPUS"), ".mp3": ("MP3", None)}  # fmt: skip
# What a scan takes: libsndfile reads the first line, PyAV the others.
AUDIO_SUFFIXES = (*WRITABLE, ".oga", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64",
                  ".rf64", ".wave", ".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".mov",
                  ".wma", ".amr", ".3gp", ".ac3", ".wv", ".ape", ".tta", ".gsm", ".mp2", ".mpga",
                  ".spx")  # fmt: skip

_MARGIN = 0.05  # s read on either side of a window, so that the resampler has settled inside it
_SLACK = 0.12  # s that an MP3 or Ogg header may promise and the stream lack, without damage
_LOUDEST_FLOAT = 128.0  # floats that pass it (+42 dB) are no recording at the scale of floats
_READ_ERRORS = (RuntimeError, OSError, ValueError, TypeError)
_File = "soundfile.SoundFile | _Decoded"  # what is open, for annotations


class AudioError(UserError):
    """An audio file that is missing, empty, damaged or of an unknown format."""


def read_audio(path: str | Path, start: float = 0.0, duration: float | None = None,
               sample_rate: int = SAMPLE_RATE, speed: float = 1.0) -> np.ndarray:  # fmt: skip
    """Read `duration` seconds from `start`, at most to the end, as mono float32 `[T]` at
    `sample_rate`, played `speed` times as fast. A window costs itself alone. AudioError."""
    if soundfile is None:
        return _read_plain(path, sample_rate)
    with _opened(path) as file:
        rate, total = file.samplerate, file.frames
        first = min(max(round(start * rate), 0), total)
        last = total if duration is None else min(first + round(duration * rate), total)
        if first == last:
            return np.zeros(0, np.float32)
        in_rate = rate * speed
        margin = 0 if in_rate == sample_rate else math.ceil(_MARGIN * rate)
        before, after = max(first - margin, 0), min(last + margin, total)
        if before:
            file.seek(before)
        # As every player does: float formats and Vorbis may pass full scale.
        mono = np.clip(_mono(_read_samples(file, path, after - before)), -1.0, 1.0)
    if in_rate == sample_rate:
        return mono
    resampled = soxr.resample(mono, in_rate, sample_rate)
    skip = round((first - before) * sample_rate / in_rate)
    length = round((last - first) * sample_rate / in_rate)
    return np.clip(resampled[skip : skip + length], -1.0, 1.0)


def read_channels(path: str | Path) -> tuple[np.ndarray, int]:
    """A file with its channels apart: float32 `[T, C]` at its own rate, and that. AudioError."""
    with _opened(path) as file:
        return _read_samples(file, path, file.frames), file.samplerate


def probe(path: str | Path, coded: BinaryIO | None = None) -> tuple[float, int]:
    """(seconds, Hz) of an audio file; raises AudioError on a bad one. `coded`: the file where it is
    open, or in memory. The end of compressed files is read: a cut file has an intact header."""
    with _opened(path, coded) as file:
        frames, rate = file.frames, file.samplerate
        if file.format not in ("WAV", "WAVEX"):
            tail = min(frames, math.ceil(0.2 * rate))
            file.seek(frames - tail)
            if len(file.read(tail, dtype="float32")) < tail - _SLACK * rate:
                raise AudioError(f"{path}: truncated; fetch it again")
    if frames < FRAME_SECONDS * rate:
        raise AudioError(f"{path}: shorter than one frame of {FRAME_SECONDS * 1000:.0f} ms")
    return frames / rate, rate


def from_pcm16(data: bytes) -> np.ndarray:
    """16-bit little-endian samples as float32 `[T]`; ValueError for half a sample."""
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0


def to_pcm16(audio: np.ndarray) -> bytes:
    """Samples in [-1, 1], what is beyond clipped, as 16-bit little-endian."""
    return (np.clip(audio, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


def write_audio(path: str | Path, audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write `[T]` or `[T, C]` in [-1, 1], in the suffix' format, 16 bit, atomically. AudioError."""
    if (suffix := Path(path).suffix.lower()) not in WRITABLE:
        raise AudioError(f"{path}: cannot write '{suffix}' audio; use one of {', '.join(WRITABLE)}")
    kind, subtype = WRITABLE[suffix]
    samples = np.clip(np.asarray(audio, dtype=np.float32), -1.0, 1.0)
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if soundfile is None and kind != "WAV":
        raise AudioError(f"{path}: needs soundfile (pip install soundfile); or name it .wav")
    try:
        if soundfile is None:
            with atomic_write(path, sync=False) as part, wave.open(os.fspath(part), "wb") as plain:
                plain.setparams((channels, 2, sample_rate, 0, "NONE", ""))
                plain.writeframes(to_pcm16(samples))
            return
        with atomic_write(path, sync=False) as part, soundfile.SoundFile(
            os.fsencode(part), "w", sample_rate, channels, subtype, format=kind
        ) as file:
            # In blocks: libsndfile's Vorbis writer overflows its stack on a long file at once.
            for first in range(0, len(samples), 65536):
                file.write(samples[first : first + 65536])
    except _READ_ERRORS as error:
        raise AudioError(f"{path}: cannot be written ({error}); is the disk full?") from error


def _read_plain(path: str | Path, sample_rate: int) -> np.ndarray:
    """A whole 16-bit WAV as `read_audio` gives it, by the standard library and numpy alone."""
    try:
        with wave.open(os.fspath(path)) as file:
            channels, width, rate, frames, *_ = file.getparams()
            samples = from_pcm16(file.readframes(frames)).reshape(-1, channels)
        if width != 2 or not len(samples):
            raise wave.Error(f"{8 * width} bits, {frames} samples")
    except (wave.Error, EOFError, ValueError) as error:
        said = f"cannot be read without soundfile ({first_line(error)}); pip install soundfile soxr"
        raise AudioError(f"{path}: {said}") from error
    mono = _mono(samples)
    length = round(len(mono) * sample_rate / rate)
    spectrum = np.fft.rfft(mono)[: length // 2 + 1] * (length / len(mono))
    return np.fft.irfft(spectrum, length).astype(np.float32).clip(-1.0, 1.0)


def _read_samples(file: _File, path: str | Path, count: int) -> np.ndarray:
    """The next `count` samples `[T, C]`; raises AudioError where they are missing or no numbers."""
    samples = file.read(count, dtype="float32", always_2d=True)
    missing = (count - len(samples)) / file.samplerate
    if missing > (0 if file.format in ("WAV", "WAVEX", "FLAC") else _SLACK):
        raise AudioError(f"{path}: truncated, {missing:.2f} s missing; fetch it again")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds samples that are no numbers (NaN or infinite); remove it")
    if file.subtype in ("FLOAT", "DOUBLE"):
        samples = samples / _full_scale(path)
        if np.abs(samples).max(initial=0.0) > _LOUDEST_FLOAT:
            raise AudioError(f"{path}: floats far beyond full scale; scale them to [-1, 1]")
    return samples


def _mono(samples: np.ndarray) -> np.ndarray:
    """`[T, C]` → the mean of the channels `[T]`; the loudest where they cancel each other out."""
    if samples.shape[1] == 1 or not len(samples):
        return samples[:, 0]
    mixed = samples.mean(axis=1)
    powers = np.square(samples).mean(axis=0)
    cancelled = np.square(mixed).mean() < 0.01 * powers.mean()
    return samples[:, powers.argmax()] if cancelled else mixed


@lru_cache(maxsize=4096)
def _full_scale(path: str | Path) -> float:
    """What stands for 1.0 in a file of floats: some hold whole numbers of 16, 24 or 32 bits. By
    places all over the file, so that its windows are scaled alike."""
    with soundfile.SoundFile(os.fsencode(path)) as file:
        peak = 0.0
        for place in np.linspace(0, max(file.frames - 1024, 0), 64).astype(int):
            file.seek(place)
            block = np.abs(file.read(1024, dtype="float32"))
            peak = max(peak, block[np.isfinite(block)].max(initial=0.0))
    if peak <= _LOUDEST_FLOAT:
        return 1.0
    return next((float(scale) for scale in (2**15, 2**23) if peak <= scale), 2.0**31)


@contextlib.contextmanager
def _opened(path: str | Path, coded: BinaryIO | None = None) -> Iterator[_File]:
    """An audio file that can be read from anywhere; what fails within is an AudioError."""
    try:
        with contextlib.closing(_open(path, coded)) as file:
            yield file
    except AudioError:
        raise
    except _READ_ERRORS as error:
        said = "no such audio file; check the manifest or download it again"
        if os.path.exists(path):
            reason = first_line(error).split(": ")[-1].rstrip(".")
            said = f"cannot be read as audio ({reason}); remove it or fetch it again"
        raise AudioError(f"{path}: {said}") from error


def _open(path: str | Path, coded: BinaryIO | None) -> _File:
    """By libsndfile, else by PyAV: libsndfile knows no AAC nor Matroska, cannot seek in GSM, trusts
    WAV headers older than their sound. A chained Ogg is refused: both read its first part alone."""
    error: Exception = AudioError(f"{path}: holds no samples; remove it or record it again")
    try:
        file = soundfile.SoundFile(coded or os.fsencode(path))
        if file.format == "OGG" and _is_chained(path, coded):
            raise AudioError(f"{path}: several recordings in one Ogg; convert it by ffmpeg")
        if file.frames > 0 and file.seekable():
            return file
        file.close()
    except _READ_ERRORS as failure:
        error = failure
    try:
        if coded is not None:
            coded.seek(0)
        return _Decoded(path, coded)
    except (ImportError, EOFError, *_READ_ERRORS):
        raise error from None


def _is_chained(path: str | Path, coded: BinaryIO | None) -> bool:
    """Whether an Ogg file's last page is of another stream than its first."""
    with contextlib.nullcontext(coded) if coded else open(path, "rb") as file:
        place = file.tell()
        file.seek(0)
        stream = file.read(18)[14:]  # its number, in each of its pages
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))  # a page is no longer
        tail = file.read()
        file.seek(place)
    last = tail.rfind(b"OggS\0")
    return last >= 0 and tail[last + 14 : last + 18] != stream


class _Decoded:
    """An audio file as PyAV decodes it, used like a SoundFile."""

    format = subtype = ""
    # Where a place is found by its time; in others what comes before is decoded too.
    _indexed = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "wav", "asf")  # wav: PCM alone
    _settling = 0.2  # s decoded before what is wanted: decoders remember

    def __init__(self, path: str | Path, coded: BinaryIO | None) -> None:
        import av

        self._at, closing = 0, contextlib.ExitStack()
        self.close = closing.close
        if coded is None and not str(path).isprintable():  # libav takes names that are UTF-8 alone
            coded = closing.enter_context(open(path, "rb"))  # noqa: SIM115
        self._container = closing.enter_context(av.open(coded or str(path)))
        self._stream = next(iter(self._container.streams.audio), None)
        frame = self._stream and next(self._container.decode(self._stream), None)
        if frame is None:
            raise AudioError(f"{path}: holds no samples; remove it or record it again")
        self._resampler = av.AudioResampler
        self.samplerate, self._first = frame.sample_rate, frame.pts or 0
        kind, codec = self._container.format.name, self._stream.codec_context.name
        self._seeks = kind in self._indexed and (kind != "wav" or codec.startswith("pcm"))
        self._base = float(self._stream.time_base)
        self._container.seek(0)
        if self._seeks:
            seconds = (self._stream.duration or 0) * self._base
            seconds = seconds or (self._container.duration or 0) / 1e6
        else:  # the header has an estimate by the bit rate, if any
            seconds = sum(p.duration or 0 for p in self._container.demux(self._stream)) * self._base
            self._container.seek(0)
        self.frames = round(seconds * self.samplerate)

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """`[T, C]` from the current place on, as far as the file goes."""
        start = self._at / self.samplerate - self._settling
        if self._seeks and start > 0:
            self._container.seek(self._first + int(start / self._base), stream=self._stream)
        resampler = self._resampler(format="fltp")
        parts, at, skip = [], None, 0
        for frame in self._container.decode(self._stream):
            if at is None:
                pts = self._first if frame.pts is None or not self._seeks else frame.pts
                at = max(0, round((pts - self._first) * self._base * self.samplerate))
                skip = max(self._at - at, 0)
            parts += [plain.to_ndarray().T for plain in resampler.resample(frame)]
            at += frame.samples
            if at >= self._at + frames:
                break
        self._at += frames
        samples = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        return samples[skip : skip + frames].astype(dtype, copy=False)
