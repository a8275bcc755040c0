"""How the codec sounds and what it costs, per bitrate and language, beside other codecs.

    python evaluate_codec.py --data_dirs data/english data/hindi data/telugu --split test
    python evaluate_codec.py --data_dirs data/english --against opus,codec2,speex --plot rate.png
    python evaluate_codec.py --data_dirs data/english --against mimi     # times Mimi beside it
    python evaluate_codec.py --split validation --probe --probe_against untaught/  # hears words?

Clips are drawn evenly over the speakers of a language, coded once and decoded at each of
`--codebooks`; codecs named by `--against` code the same clips at the nearest rates they have.

    SNR       10 log10(|x|² / |x - y|²) in dB, per clip, at most 100
    SI-SDR    the same against the best-scaled reference (Le Roux et al. 2019)
    PESQ      wideband, ITU-T P.862.2, of 1 to 4.64
    STOI      intelligibility (Taal et al. 2011), of 0 to 1
    MOS       predicted by DistillMOS (Stahl & Gamper 2025), 1 to 5, no reference needed
    DNSMOS    predicted overall quality, P.835 (Reddy et al. 2022), 1 to 5
    spk       cosine of Resemblyzer's speaker embeddings (Wan et al. 2018) of coded and uncoded

Means over clips; the line `uncoded` is what the judges say of the recordings themselves. A judge
whose package is missing is left out, and so is a clip that a judge cannot measure, for it alone.
Rates are measured: `net` is what the codes take, `file` the whole file with its container.
`--probe` reads phones off codebook 0 by a linear classifier fitted on the training speakers.

The last line of stdout is the summary as JSON; `--output` also holds every clip.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from tqdm import tqdm

import checkpoints
import hold_out
import phone_probe
import training
from audio import SAMPLE_RATE, AudioError, read_audio, write_audio
from codec import Codec, CodecConfig
from command import (
    ArgumentParser,
    UserError,
    first_line,
    number,
    run,
    whole,
    writable_file,
    write_text,
)
from data import LANGUAGES, SPLITS, Clip, count_speakers, load_clips
from losses import si_sdr
from training import PLAN_BUDGET_USD

HERE = Path(__file__).resolve().parent
SPOKEN = tuple(language for language in LANGUAGES if language != "other")
JUDGE_RATE = 16000
MEASURES = {  # name: (column, decimals, width)
    "snr": ("SNR", 2, 7),
    "si_sdr": ("SI-SDR", 2, 7),
    "pesq": ("PESQ", 2, 6),
    "stoi": ("STOI", 3, 6),
    "mos": ("MOS", 2, 6),
    "dnsmos": ("DNSMOS", 2, 7),
    "speaker": ("spk", 3, 6),
}
RATES = (2, 4, 8, 16, 32, 64)  # codebooks: 1, 2, 4, 8, 16, 32 kbit/s
LM_CODEBOOKS = 8
STEP_MS = (40, 80)
TIMED_ROUNDS = 7  # and one before them to warm up
TIMED_SECONDS = 1.6  # of audio a round: whole steps of 40 and of 80 ms
SILENT_PEAK = 1e-4  # -80 dBFS
CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 1e-3
SPEECH_RANGE_DB = 40.0  # frames within this of the clip's loudest one count as speech
FRAMES_A_CODE = 10  # fewer speech frames than this a code say little about a codebook
GOALS = {  # the project's own, beside the plan's
    "pesq": 2.2, "stoi": 0.90, "perplexity": 0.35, "real_time": 0.25, "wins": 0.8,
    "mimi_80ms": 8.0, "mimi_40ms": 5.0,
}  # fmt: skip
MUST_BEAT = (("codec2", 3.2), ("speex", 3.95))  # on GOALS["wins"] of the clips


# ---------------------------------------------------------------------------------- judges
#
# A judge is built once, imports its package then, and is called with the coded and the uncoded
# audio, float32 `[T]` of one length at 16 kHz. It answers with a number or None, where it cannot
# measure that clip. `needs_reference` False: it hears the coded audio alone.


class PesqJudge:
    """PESQ wideband, ITU-T P.862.2."""

    needs_reference = True

    def __init__(self) -> None:
        from pesq import PesqError, pesq

        self._pesq, self._values = pesq, PesqError.RETURN_VALUES

    def __call__(self, audio: np.ndarray, reference: np.ndarray) -> float | None:
        if not (audio.any() and reference.any()):
            return None
        # The mode that returns a negative number where there is no utterance, or too short a one.
        value = self._pesq(JUDGE_RATE, reference, audio, "wb", on_error=self._values)
        return float(value) if value > 0 else None


class StoiJudge:
    """STOI (Taal et al. 2011); None for less than 0.4 s of speech, where it is undefined."""

    needs_reference = True

    def __init__(self) -> None:
        from pystoi import stoi

        self._stoi = stoi

    def __call__(self, audio: np.ndarray, reference: np.ndarray) -> float | None:
        if len(reference) < 0.4 * JUDGE_RATE:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                value = float(self._stoi(reference, audio, JUDGE_RATE))
            except RuntimeWarning:  # too few frames are left without the silent ones
                return None
        return value if math.isfinite(value) else None


class DistillMosJudge:
    """MOS predicted by DistillMOS (Stahl & Gamper 2025); silence scores about 2."""

    needs_reference = False

    def __init__(self) -> None:
        from distillmos import ConvTransformerSQAModel

        with _silent_stdout():  # it prints where its weights lie
            self._model = ConvTransformerSQAModel().eval()

    @torch.no_grad()
    def __call__(self, audio: np.ndarray, reference: np.ndarray | None = None) -> float:
        return float(self._model(torch.from_numpy(audio)[None]))


class DnsMosJudge:
    """Overall quality after ITU-T P.835, predicted by DNSMOS (Reddy et al. 2022)."""

    needs_reference = False

    def __init__(self) -> None:
        import onnxruntime
        from speechmos import dnsmos

        folder = Path(dnsmos.__file__).parent / "dnsmos_models"
        paths = [str(folder / name) for name in ("sig_bak_ovr.onnx", "model_v8.onnx")]
        self._model = dnsmos.DNSMOS(*paths)
        # Its own sessions take every core, and beside other work become four times slower.
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._model.onnx_sess, self._model.p808_onnx_sess = (
            onnxruntime.InferenceSession(path, options) for path in paths
        )

    def __call__(self, audio: np.ndarray, reference: np.ndarray | None = None) -> float | None:
        if len(audio) < 0.02 * JUDGE_RATE:
            return None
        return float(self._model(audio.clip(-1, 1), JUDGE_RATE, False)["ovrl_mos"])


class SpeakerJudge:
    """Cosine of Resemblyzer's embeddings (Wan et al. 2018); None below 0.5 s of voice."""

    needs_reference = True

    def __init__(self) -> None:
        self._embed = hold_out.VoiceEmbedder()
        self._last: tuple[np.ndarray, np.ndarray | None] | None = None

    def __call__(self, audio: np.ndarray, reference: np.ndarray) -> float | None:
        if self._last is None or self._last[0] is not reference:
            self._last = reference, self._embed(reference, JUDGE_RATE)
        known = self._last[1]
        if known is None:
            return None
        coded = self._embed(audio, JUDGE_RATE)
        if coded is None:  # no voice found in it: judged as it is, silences and all
            coded = self._embed.encoder.embed_utterance(audio)
        return float(known @ coded)


JUDGES = {  # name: (class, how to get it)
    "pesq": (PesqJudge, "pip install pesq"),
    "stoi": (StoiJudge, "pip install pystoi"),
    "mos": (DistillMosJudge, "pip install distillmos xls-r-sqa"),
    "dnsmos": (DnsMosJudge, "pip install speechmos librosa onnxruntime requests"),
    "speaker": (SpeakerJudge, "pip install resemblyzer"),
}


def load_judge(name: str) -> Callable:
    """One judge of JUDGES. Raises UserError with the line that installs it."""
    kind, hint = JUDGES[name]
    try:
        return kind()
    except ImportError as error:
        raise UserError(f"the judge {name} needs a package ({error}): {hint}") from error


def load_judges(names: Sequence[str]) -> dict[str, Callable]:
    """Those of `names` that are installed; a line on stderr for each of the others.

    `auto` stands for all but `dnsmos`, which takes three times as long as the rest together and
    is taken only where `mos` is missing.
    """
    automatic = "auto" in names
    wanted = [n for n in JUDGES if n in names or (automatic and n != "dnsmos")]
    judges = {}
    for name in wanted:
        try:
            judges[name] = load_judge(name)
        except UserError as error:
            print(f"warning: no column {name}: {error}", file=sys.stderr)
    if automatic and "mos" not in judges and "dnsmos" not in wanted:
        judges |= load_judges(["dnsmos"])
    return judges


def judge(
    judges: dict[str, Callable], audio: np.ndarray, reference: np.ndarray
) -> dict[str, float | None]:
    """What each judge says of coded audio `[T]` beside its reference `[T]`, both at 16 kHz."""
    return {name: _opinion(name, ask, audio, reference) for name, ask in judges.items()}


def judge_uncoded(judges: dict[str, Callable], reference: np.ndarray) -> dict[str, float | None]:
    """What those judges that need no reference say of the recording `[T]` itself, at 16 kHz."""
    names = [name for name, ask in judges.items() if not ask.needs_reference]
    return {name: _opinion(name, judges[name], reference) for name in names}


def _opinion(name: str, ask: Callable, *audio: np.ndarray) -> float | None:
    """A judge that stumbles over one clip cannot measure it: that must not cost all others."""
    try:
        return ask(*audio)
    except Exception as error:
        print(f"warning: {name} failed on a clip: {first_line(error)}", file=sys.stderr)
        return None


def for_judges(audio: np.ndarray) -> np.ndarray:
    """24 kHz `[T]` → the judges' 16 kHz, float32."""
    return soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE).astype(np.float32, copy=False)


def snr(audio: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(|x|² / |x - y|²) in dB, of `[T]` twice; at most 100, so that it stays a number."""
    reference = reference.astype(np.float64)
    signal = float(np.square(reference).sum())
    noise = float(np.square(reference - audio).sum())
    return 10 * math.log10(max(signal, 1e-20) / max(noise, 1e-10 * signal, 1e-30))


def waveform_scores(audio: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """SNR and SI-SDR in dB, of `[T]` twice."""
    both = (torch.from_numpy(x.astype(np.float64))[None] for x in (audio, reference))
    return {"snr": snr(audio, reference), "si_sdr": float(si_sdr(*both))}


@contextmanager
def _silent_stdout() -> Iterator[None]:
    # The last line of stdout is JSON for programs: packages may not write there.
    kept, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept


# ---------------------------------------------------------------------------------- peers


class PeerError(UserError):
    """Another codec's program failed, on one clip at least."""


@dataclass(frozen=True)
class Coded:
    """Audio `[T]` at 24 kHz as a codec gave it back, and the bits it was sent in."""

    audio: np.ndarray
    net_bits: int
    file_bits: int


def code_opus(audio: np.ndarray, kbps: float, folder: Path) -> Coded:
    """libopus in 20 ms frames, variable rate; its tools take the codec's delay out."""
    source, coded, heard = (folder / name for name in ("in.wav", "coded.opus", "out.wav"))
    write_audio(source, audio)
    _tool("opusenc", "--quiet", "--padding", "0", "--bitrate", kbps, source, coded)
    _tool("opusdec", "--quiet", "--rate", SAMPLE_RATE, coded, heard)
    data = coded.read_bytes()
    return Coded(_place(read_audio(heard), 0.0, len(audio)), ogg_bits(data), 8 * len(data))


def code_speex(audio: np.ndarray, kbps: float, folder: Path) -> Coded:
    """Speex: narrowband up to 8 kbit/s, where it beats its own wideband in PESQ-WB and STOI."""
    # Delays that its tools leave in: about these by the highest STOI, 3 ms more or less by clip.
    mode, rate, delay = ("-n", 8000, 10.0) if kbps <= 8 else ("-w", 16000, 12.0)
    source, coded, heard = (folder / name for name in ("in.wav", "coded.spx", "out.wav"))
    write_audio(source, soxr.resample(audio, SAMPLE_RATE, rate), rate)
    # "This rate or lower": a little above, so that rounding does not choose the next mode down.
    _tool("speexenc", mode, "--comp", 10, "--bitrate", round(1000 * kbps) + 20, source, coded)
    _tool("speexdec", coded, heard)
    data, back = coded.read_bytes(), read_audio(heard)
    delay = _delay_near(back, audio, delay)
    return Coded(_place(back, delay, len(audio)), ogg_bits(data), 8 * len(data))


def code_codec2(audio: np.ndarray, kbps: float, folder: Path) -> Coded:
    """Codec2, narrowband and parametric: SNR and SI-SDR say nothing of it. Files are bare codes."""
    mode, delay = ("700C", 30.0) if kbps < 1 else (str(round(1000 * kbps)), 20.0)
    source, coded, heard = (folder / name for name in ("in.raw", "coded.bit", "out.raw"))
    narrow = soxr.resample(audio, SAMPLE_RATE, 8000)
    source.write_bytes((narrow.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    _tool("c2enc", mode, source, coded)
    _tool("c2dec", mode, coded, heard)
    samples = np.frombuffer(heard.read_bytes(), "<i2").astype(np.float32) / 32768
    bits = 8 * coded.stat().st_size
    wide = soxr.resample(samples, 8000, SAMPLE_RATE)
    return Coded(_place(wide, delay, len(audio)), bits, bits)


@dataclass(frozen=True)
class Peer:
    """Another codec: the rates it can be asked for in kbit/s, and the programs that do it."""

    code: Callable[[np.ndarray, float, Path], Coded]
    rates: tuple[float, ...]
    programs: tuple[str, ...]
    package: str

    def nearest(self, kbps: float) -> float:
        """The rate nearest to `kbps`; the higher of two that are as near, in the peer's favour."""
        return min(self.rates, key=lambda rate: (round(abs(rate - kbps), 6), -rate))


PEERS = {
    "opus": Peer(code_opus, (6, 8, 12, 16, 24, 32), ("opusenc", "opusdec"), "opus-tools"),
    "codec2": Peer(code_codec2, (0.7, 1.2, 1.3, 1.6, 2.4, 3.2), ("c2enc", "c2dec"), "codec2"),
    "speex": Peer(
        code_speex,
        (2.15, 3.95, 5.95, 8.0, 9.8, 12.8, 16.8, 20.6, 23.8, 27.8, 34.2),
        ("speexenc", "speexdec"),
        "speex",
    ),
}
MIMI_HINT = "pip install --no-deps moshi, then pip install einops sentencepiece"


def check_tools(peers: Iterable[str]) -> None:
    """Raises UserError for a peer whose programs are not installed."""
    for name in peers:
        missing = [program for program in PEERS[name].programs if not shutil.which(program)]
        if missing:
            raise UserError(
                f"--against {name}: no {missing[0]} on this machine: "
                f"apt-get install {PEERS[name].package}"
            )


def _tool(*command) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise PeerError(f"{words[0]} failed ({said[-1]}); install it again or leave it out")


def _place(audio: np.ndarray, delay_ms: float, length: int) -> np.ndarray:
    """Takes a codec's delay out and cuts or fills `[T]` to `length` samples at 24 kHz."""
    audio = audio[round(delay_ms / 1000 * SAMPLE_RATE) :][:length]
    return np.pad(audio, (0, length - len(audio))).astype(np.float32, copy=False)


def _delay_near(audio: np.ndarray, reference: np.ndarray, guess_ms: float) -> float:
    """The delay in ms, within 4 of the guess, at which two waveforms `[T]` fit each other best."""
    around = round(0.004 * SAMPLE_RATE)
    guess = round(guess_ms / 1000 * SAMPLE_RATE)
    lags = range(max(0, guess - around), guess + around + 1)
    fits = [float(_place(audio, 1000 * n / SAMPLE_RATE, len(reference)) @ reference) for n in lags]
    return 1000 * lags[int(np.argmax(fits))] / SAMPLE_RATE


def ogg_bits(data: bytes) -> int:
    """Bits of the audio packets in an Ogg file (RFC 3533), without pages and the two headers."""
    sizes, at = [], 0
    while data[at : at + 4] == b"OggS":
        segments = data[at + 27 : at + 27 + data[at + 26]]
        sizes.append(sum(segments))
        at += 27 + len(segments) + sizes[-1]
    return 8 * sum(sizes[2:])  # each header has a page of its own


# ---------------------------------------------------------------------------------- clips


def draw_clips(clips: Sequence[Clip], max_clips: int, seed: int) -> list[Clip]:
    """Up to `max_clips` a language, one of each speaker in turn, in an order that `seed` draws.

    Clips of unknown speakers stand by their folder.
    """
    drawn = []
    for place, language in enumerate(LANGUAGES):
        rng = np.random.default_rng([seed, place])
        groups = defaultdict(list)
        for clip in sorted((c for c in clips if c.language == language), key=lambda c: c.path):
            groups[clip.speaker or f"{clip.path.parent}/"].append(clip)
        order = [groups[name] for name in rng.permutation(sorted(groups))]
        order = [[group[i] for i in rng.permutation(len(group))] for group in order]
        longest = max(map(len, order), default=0)
        turns = [group[turn] for turn in range(longest) for group in order if turn < len(group)]
        drawn += turns[:max_clips]
    return drawn


def read_clip(clip: Clip, max_seconds: float, least: int) -> tuple[np.ndarray | None, list[str]]:
    """(audio `[T]` at 24 kHz, what is to be known of it); (None, [why]) where it is skipped."""
    try:
        audio = read_audio(clip.path, 0.0, max_seconds)
    except AudioError:
        return None, ["unreadable"]
    if len(audio) < least:
        return None, ["too short"]
    if np.abs(audio).max() < SILENT_PEAK:
        return None, ["silent"]
    notes = []
    if (np.abs(audio) >= CLIPPED_LEVEL).mean() > CLIPPED_SHARE:
        notes.append("clipped")
    if clip.sample_rate < JUDGE_RATE:
        notes.append(f"recorded at {clip.sample_rate / 1000:g} kHz")
    return audio, notes


# ---------------------------------------------------------------------------------- coding


def kbps_of(config: CodecConfig, codebooks: int) -> float:
    """What the first `codebooks` take, in kbit/s."""
    return sum(map(math.log2, config.codebook_sizes[:codebooks])) * config.frame_rate / 1000


def code_samvad(
    codec: Codec, audio: np.ndarray, counts: Sequence[int]
) -> tuple[dict[int, Coded], np.ndarray]:
    """Audio `[T]` at each number of codebooks, and the codes of all codebooks `[K, F]`.

    Coded once: the first codes of a residual quantizer do not depend on how many follow.
    Raises UserError where a checkpoint's output is not finite.
    """
    device = next(codec.parameters()).device
    codes = codec.encode(torch.from_numpy(audio).to(device)[None, None], codec.config.num_codebooks)
    coded = {}
    for count in counts:
        heard = codec.decode(codes[:, :count])[0, 0, : len(audio)].float().cpu().numpy()
        if not np.isfinite(heard).all():
            raise UserError("the codec's output is not finite: a damaged or diverged checkpoint")
        sizes = codec.config.codebook_sizes[:count]
        bits = codes.shape[-1] * sum(map(math.log2, sizes))
        # Clipped as every player does.
        coded[count] = Coded(heard.clip(-1, 1), math.ceil(bits), 8 * math.ceil(bits / 8))
    return coded, codes[0].cpu().numpy()


@dataclass(frozen=True)
class Row:
    """One clip through one codec at one rate. `codec` is `uncoded` for the recording itself."""

    clip: str
    language: str
    seconds: float
    codec: str
    asked_kbps: float
    net_bits: int
    file_bits: int
    scores: dict[str, float | None]


def points_of(
    config: CodecConfig, counts: Sequence[int], peers: Sequence[str]
) -> list[tuple[str, float]]:
    """(codec, rate to ask for): Samvad's rates, then those of each peer nearest to them."""
    rates = [kbps_of(config, count) for count in counts]
    points = [("samvad", rate) for rate in rates]
    for name in peers:
        points += [(name, rate) for rate in sorted({PEERS[name].nearest(r) for r in rates})]
    return points


def evaluate_clip(
    codec: Codec,
    clip: Clip,
    audio: np.ndarray,
    counts: Sequence[int],
    points: Sequence[tuple[str, float]],
    judges: dict[str, Callable],
    folder: Path,
) -> tuple[list[Row], np.ndarray]:
    """A row for the recording and for every point, and the codes `[K, F]`."""
    reference = for_judges(audio)
    seconds = len(audio) / SAMPLE_RATE
    own, codes = code_samvad(codec, audio, counts)
    outcomes = dict(zip((p for p in points if p[0] == "samvad"), own.values(), strict=True))
    for name, kbps in points:
        if name != "samvad":
            outcomes[name, kbps] = PEERS[name].code(audio, kbps, folder)
    uncoded = judge_uncoded(judges, reference)
    rows = [Row(str(clip.path), clip.language, seconds, "uncoded", 0.0, 0, 0, uncoded)]
    for (name, kbps), coded in outcomes.items():
        scores = waveform_scores(coded.audio, audio)
        scores |= judge(judges, for_judges(coded.audio), reference)
        bits = coded.net_bits, coded.file_bits
        rows.append(Row(str(clip.path), clip.language, seconds, name, kbps, *bits, scores))
    return rows, codes


# ---------------------------------------------------------------------------------- codebooks


def speech_frames(audio: np.ndarray, hop: int) -> np.ndarray:
    """`[T]` → `[ceil(T / hop)]` bool: frames within 40 dB of the loudest one."""
    padded = np.pad(audio.astype(np.float64), (0, -len(audio) % hop))
    power = np.square(padded).reshape(-1, hop).mean(1)
    return power > power.max() * 10 ** (-SPEECH_RANGE_DB / 10)


class CodebookUse:
    """How often each code occurs in speech, per codebook."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.counts = [np.zeros(size, np.int64) for size in sizes]

    def add(self, codes: np.ndarray, speech: np.ndarray) -> None:
        """Codes `[K, F]` of a clip, `speech` `[F]` bool."""
        for counts, row in zip(self.counts, codes, strict=True):
            counts += np.bincount(row[speech], minlength=len(counts))

    def __add__(self, other: CodebookUse) -> CodebookUse:
        both = CodebookUse([len(counts) for counts in self.counts])
        both.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return both

    def summary(self) -> dict:
        """Frames counted; per codebook perplexity exp(-Σ p ln p), its share, and codes used."""
        rows = []
        for counts in self.counts:
            shares = counts[counts > 0] / max(1, counts.sum())
            perplexity = math.exp(-float((shares * np.log(shares)).sum()))
            rows.append(
                {
                    "size": len(counts),
                    "used": round(len(shares) / len(counts), 4),
                    "perplexity": round(perplexity, 2),
                    "perplexity_share": round(perplexity / len(counts), 4),
                }
            )
        frames = int(self.counts[0].sum())
        few = frames < FRAMES_A_CODE * max(len(counts) for counts in self.counts)
        return {"speech_frames": frames, "too_few_frames": few, "codebooks": rows}


# ---------------------------------------------------------------------------------- time


def load_mimi(device: torch.device, codebooks: int = 8):
    """Mimi (Défossez et al. 2024) with random weights: for timing alone. UserError without it."""
    try:
        from moshi.models import loaders
        from moshi.utils.compile import no_compile
    except ImportError as error:
        raise UserError(f"--against mimi needs a package ({error}): {MIMI_HINT}") from error
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, device=device, num_codebooks=codebooks)
    for module in mimi.modules():
        # All zeros otherwise, so that every vector would find the same code.
        if hasattr(module, "embedding_sum"):
            module.embedding_sum.normal_()
            module._embedding = None
    return mimi, no_compile


def _own_stepper(codec: Codec, frames: int, codebooks: int) -> Callable[[torch.Tensor], None]:
    """A function that encodes and decodes `[1, 1, T]` in steps of `frames`, its state kept."""
    size = frames * codec.config.hop
    ear, mouth = codec.init_encoder_state(1), codec.init_decoder_state(1)

    def run(audio: torch.Tensor) -> None:
        for chunk in audio.split(size, dim=-1):
            codec.decode_step(codec.encode_step(chunk, ear, codebooks), mouth)

    return run


class GraphedStep:
    """As `_own_stepper`, on a CUDA GPU: each step one captured graph, so that the GPU need not wait
    for Python. Called with `[1, 1, T]`, whole steps, it gives the decoded `[1, 1, T]`."""

    def __init__(self, codec: Codec, frames: int, codebooks: int) -> None:
        self.codec, self.codebooks = codec, codebooks
        # The graph knows their memory alone: they must live as long as it does.
        self.ear, self.mouth = codec.init_encoder_state(1), codec.init_decoder_state(1)
        device = next(codec.parameters()).device
        self.heard = torch.zeros(1, 1, frames * codec.config.hop, device=device)
        # Libraries settle their workspaces in a few steps on a side stream, as PyTorch asks for.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.spoken = self._step()
        self.reset()

    def _step(self) -> torch.Tensor:
        codes = self.codec.encode_step(self.heard, self.ear, self.codebooks)
        return self.codec.decode_step(codes, self.mouth)

    def reset(self) -> None:
        """Starts anew."""
        self.ear.reset()
        self.mouth.reset()

    def __call__(self, audio: torch.Tensor) -> torch.Tensor:
        parts = []
        for chunk in audio.split(self.heard.shape[-1], dim=-1):
            self.heard.copy_(chunk)
            self.graph.replay()
            parts.append(self.spoken.clone())
        return torch.cat(parts, dim=-1)


def _mimi_stepper(mimi) -> Callable[[torch.Tensor], None]:
    def run(audio: torch.Tensor) -> None:
        for chunk in audio.split(mimi.frame_size, dim=-1):
            mimi.decode(mimi.encode(chunk))

    return run


@torch.no_grad()
def real_time_factors(codec: Codec, against_mimi: bool = False, rounds: int = TIMED_ROUNDS) -> dict:
    """Seconds of encoding and decoding a second of audio, on one CPU thread or the codec's GPU.

    Each round times every candidate on the same audio in turn, so that what else the machine does
    meets them alike. Medians of the wall clock, and of the process' own CPU time.
    """
    device = next(codec.parameters()).device
    codebooks = min(LM_CODEBOOKS, codec.config.num_codebooks)
    noise = torch.randn(1, 1, round(TIMED_SECONDS * SAMPLE_RATE), generator=_generator())
    audio = 0.1 * noise.to(device)
    runs = {"offline": lambda x: codec.decode(codec.encode(x, codebooks))}
    for ms in STEP_MS:
        frames = max(1, round(ms / 1000 * codec.config.frame_rate))
        runs[f"stream_{ms}ms"] = _own_stepper(codec, frames, codebooks)
        if device.type == "cuda":
            runs[f"graph_{ms}ms"] = GraphedStep(codec, frames, codebooks)
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if against_mimi:
            mimi, no_compile = load_mimi(device)
            stack.enter_context(no_compile())
            stack.enter_context(mimi.streaming(1))
            runs["mimi_80ms"] = _mimi_stepper(mimi)
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        times = [_timed(runs, audio) for _ in range(rounds + 1)][1:]
    found = {"device": str(device), "threads": 1, "num_codebooks": codebooks}
    for name in runs:
        wall, cpu = (statistics.median(t[name][i] for t in times) / TIMED_SECONDS for i in (0, 1))
        found[name] = {"wall": round(wall, 5), "cpu": round(cpu, 5)}
    return found


def _timed(runs: dict[str, Callable], audio: torch.Tensor) -> dict[str, tuple[float, float]]:
    times = {}
    for name, encode in runs.items():
        wall, cpu = time.perf_counter(), time.process_time()
        encode(audio)
        if audio.is_cuda:
            torch.cuda.synchronize(audio.device)
        times[name] = time.perf_counter() - wall, time.process_time() - cpu
    return times


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---------------------------------------------------------------------------------- summaries


def summarise(rows: Sequence[Row], points: Sequence[tuple[str, float]]) -> dict:
    """Means of one group of clips: the recordings, each point, and who is better how often."""
    by_point = defaultdict(list)
    for row in rows:
        by_point[row.codec, row.asked_kbps].append(row)
    uncoded = by_point["uncoded", 0.0]
    return {
        "clips": len(uncoded),
        "seconds": round(sum(row.seconds for row in uncoded), 1),
        "uncoded": _means(uncoded),
        "points": [_point(name, kbps, by_point[name, kbps]) for name, kbps in points],
        "better_than": [_wins(by_point, own, peer) for own, peer in pairs(points)],
    }


def _point(name: str, kbps: float, rows: Sequence[Row]) -> dict:
    seconds = sum(row.seconds for row in rows)
    return {
        "codec": name,
        "asked_kbps": round(kbps, 3),
        "net_kbps": round(sum(row.net_bits for row in rows) / seconds / 1000, 3),
        "file_kbps": round(sum(row.file_bits for row in rows) / seconds / 1000, 3),
        **_means(rows),
    }


def _means(rows: Sequence[Row]) -> dict:
    """Mean of each measure over the clips that have it, and on how many clips that is."""
    names = [name for name in MEASURES if any(name in row.scores for row in rows)]
    known = {name: [s for r in rows if (s := r.scores.get(name)) is not None] for name in names}
    means = {name: round(statistics.fmean(v), 4) if v else None for name, v in known.items()}
    return {"scores": means, "measured": {name: len(values) for name, values in known.items()}}


def pairs(points: Sequence[tuple[str, float]]) -> list[tuple[tuple, tuple]]:
    """(Samvad's point, peer's point) for each point of a peer: that of the nearest rate."""
    own = [point for point in points if point[0] == "samvad"]
    peers = [point for point in points if point[0] != "samvad"]
    return [(min(own, key=lambda o: abs(o[1] - peer[1])), peer) for peer in peers]


def _wins(by_point: dict, own: tuple, peer: tuple) -> dict:
    """On which share of the clips Samvad scores higher, per measure; a tie is no win."""
    shares, counted = {}, {}
    for name in MEASURES:
        both = [
            (a.scores.get(name), b.scores.get(name))
            for a, b in zip(by_point[own], by_point[peer], strict=True)
        ]
        known = [a > b for a, b in both if a is not None and b is not None]
        if known:
            shares[name], counted[name] = round(sum(known) / len(known), 4), len(known)
    kbps = {"samvad_kbps": round(own[1], 3), "asked_kbps": round(peer[1], 3)}
    return {"codec": peer[0], **kbps, "share": shares, "measured": counted}


def criteria(groups: dict, times: dict, config: CodecConfig, spent: float | None) -> list[dict]:
    """The plan's success criteria, then the project's own for a codec, each met or not.

    `met` is None where nothing was measured, or too little to say no.
    """
    pooled = groups["all"]
    lm = kbps_of(config, min(LM_CODEBOOKS, config.num_codebooks))
    full = kbps_of(config, config.num_codebooks)
    at_lm, at_full = (_scores_at(pooled, kbps) for kbps in (lm, full))
    mos = "mos" if at_lm.get("mos") is not None else "dnsmos"
    label = "predicted MOS" if mos == "mos" else "DNSMOS"
    own = pooled["uncoded"]["scores"].get(mos)
    spoken = sum(language in groups for language in SPOKEN)
    return [
        _over(f"SNR at the full rate, {full:g} kbit/s", at_full.get("snr"), 20, " dB", "~22 dB"),
        _at_least(f"SI-SDR at {lm:g} kbit/s", at_lm.get("si_sdr"), 8, " dB", "8-9 dB"),
        _over(f"{label} at {lm:g} kbit/s", at_lm.get(mos), 4,
              beside="" if own is None else f"uncoded {own:.2f}"),
        _criterion("end-to-end latency (evaluate_s2s.py)", "< 400 ms", None, None),
        _at_least("languages evaluated here", spoken, 3, beside="1"),
        _criterion("training cost so far (costs.jsonl)", "< $1,500", spent,
                   None if spent is None else spent < PLAN_BUDGET_USD),
        _at_least(f"PESQ-WB at {lm:g} kbit/s", at_lm.get("pesq"), GOALS["pesq"]),
        _at_least(f"STOI at {lm:g} kbit/s", at_lm.get("stoi"), GOALS["stoi"]),
        *_codebook_criteria(pooled["codebooks"]),
        *_time_criteria(times),
        *_win_criteria(pooled),
    ]  # fmt: skip


def _criterion(name: str, target: str, value, met: bool | None, beside: str = "") -> dict:
    value = value if value is None else round(value, 4)
    return {"criterion": name, "target": target, "value": value, "met": met, "beside": beside}


def _over(name: str, value, goal: float, unit: str = "", beside: str = "") -> dict:
    met = None if value is None else value > goal
    return _criterion(name, f"> {goal:g}{unit}", value, met, beside)


def _at_least(name: str, value, goal: float, unit: str = "", beside: str = "") -> dict:
    met = None if value is None else value >= goal
    return _criterion(name, f">= {goal:g}{unit}", value, met, beside)


def _scores_at(group: dict, kbps: float) -> dict:
    """Samvad's scores at that rate; none where it was not evaluated."""
    for point in group["points"]:
        if point["codec"] == "samvad" and math.isclose(point["asked_kbps"], kbps, abs_tol=1e-3):
            return point["scores"]
    return {}


def _codebook_criteria(use: dict) -> list[dict]:
    share = min(row["perplexity_share"] for row in use["codebooks"][1:])
    used = min(row["used"] for row in use["codebooks"])
    rows = [
        _over("perplexity/size, least acoustic one", share, GOALS["perplexity"]),
        _at_least("codes in use, least used level", used, 1),
    ]
    for row in rows:
        # More frames can only find more codes: too few prove success, never failure.
        if use["too_few_frames"] and not row["met"]:
            row |= {"met": None, "beside": "few frames"}
    return rows


def _time_criteria(times: dict) -> list[dict]:
    # On a CPU the core's own time, which other programs on the machine do not lengthen.
    clock = "cpu" if times["device"] == "cpu" else "wall"
    name = "real-time factor, 40 ms steps"
    cost, goal = times["stream_40ms"][clock], GOALS["real_time"]
    rows = [_criterion(name, f"< {goal:g}", cost, cost < goal, f"{clock} time")]
    if "mimi_80ms" in times:
        for ms in STEP_MS:
            ratio = times["mimi_80ms"][clock] / times[f"stream_{ms}ms"][clock]
            goal, name = GOALS[f"mimi_{ms}ms"], f"times cheaper than Mimi, {ms} ms steps"
            rows.append(_at_least(name, ratio, goal, beside=f"{clock} time"))
    return rows


def _win_criteria(group: dict) -> list[dict]:
    """The share of clips won from each that must be beaten, in the measure where it is least."""
    rows = []
    for pair in group["better_than"]:
        if (pair["codec"], pair["asked_kbps"]) not in MUST_BEAT:
            continue
        shares = {n: s for n, s in pair["share"].items() if n in ("pesq", "stoi", "mos", "dnsmos")}
        least = min(shares, key=shares.get, default="pesq")
        name = f"clips won from {pair['codec']} at {pair['asked_kbps']:g} kbit/s"
        beside = f"in {MEASURES[least][0]}"
        rows.append(_at_least(name, shares.get(least), GOALS["wins"], beside=beside))
    return rows


def spent_usd() -> float | None:
    """What all stages have cost by the ledger in this folder; None where there is none."""
    meter = training.CostMeter("evaluation", enabled=False)
    return meter.spent_usd() if meter.ledger.exists() else None


# ---------------------------------------------------------------------------------- printing


def _cells(scores: dict, columns: Sequence[str], percent: bool = False) -> str:
    cells = ""
    for name in columns:
        _, decimals, width = MEASURES[name]
        value = scores.get(name)
        text = "-" if value is None else f"{value:.0%}" if percent else f"{value:.{decimals}f}"
        cells += f"{text:>{width}}"
    return cells


def table(name: str, group: dict) -> str:
    """A language's codecs and rates, then the shares of clips won, at most 80 columns wide."""
    columns = [m for m in MEASURES if any(m in point["scores"] for point in group["points"])]
    unknown = group["clips_of_unknown_speakers"]
    heads = "".join(f"{MEASURES[m][0]:>{MEASURES[m][2]}}" for m in columns)
    lines = [
        f"{name}: {group['clips']} clips, {group['seconds']:.0f} s, {group['speakers']} speakers"
        + (f", {unknown} clips of unknown ones" if unknown else ""),
        f"{'kbit/s:':<9}{'asked':>6}{'net':>7}{'file':>7}{heads}",
        f"{'uncoded':<29}{_cells(group['uncoded']['scores'], columns)}",
    ]
    for p in group["points"]:
        rates = f"{p['asked_kbps']:>6.4g}{p['net_kbps']:>7.2f}{p['file_kbps']:>7.2f}"
        lines.append(f"{p['codec']:<9}{rates}{_cells(p['scores'], columns)}")
    if group["better_than"]:
        lines.append("clips on which samvad is better:")
    for pair in group["better_than"]:
        label = f" {pair['samvad_kbps']:g} than {pair['codec']} {pair['asked_kbps']:g}"
        lines.append(f"{label:<29}{_cells(pair['share'], columns, percent=True)}")
    least = {m: min(p["measured"].get(m, 0) for p in group["points"]) for m in columns}
    partly = [f"{MEASURES[m][0]} {n}" for m, n in least.items() if n < group["clips"]]
    if partly:
        lines.append(f"clips that a judge could measure: {', '.join(partly)}")
    return "\n".join(line.rstrip() for line in lines)


def codebook_table(use: dict) -> str:
    """Perplexity, its share of the size and the share of codes in use, three codebooks a line."""
    cells = [
        f"{k:>3}:{row['perplexity']:>7.0f} {row['perplexity_share']:>4.2f} {row['used']:>5.0%}"
        for k, row in enumerate(use["codebooks"])
    ]
    frames = use["speech_frames"]
    lines = [f"codebooks, {frames} speech frames: perplexity, share of the size, codes in use"]
    lines += ["".join(cells[i : i + 3]) for i in range(0, len(cells), 3)]
    if use["too_few_frames"]:
        lines.append(f"too few frames to judge: {FRAMES_A_CODE} a code are needed (--max_clips)")
    return "\n".join(lines)


def time_table(times: dict) -> str:
    """Real-time factors; lower is cheaper."""
    names = {"offline": "offline"} | {f"stream_{ms}ms": f"streaming, {ms} ms" for ms in STEP_MS}
    names |= {f"graph_{ms}ms": f"streaming, {ms} ms, a CUDA graph" for ms in STEP_MS}
    names["mimi_80ms"] = "Mimi, random weights, 80 ms"
    lines = [
        f"encode + decode, s a second of audio, {times['device']}, one thread, "
        f"{times['num_codebooks']} codebooks"
    ]
    for name, label in names.items():
        if name in times:
            found = times[name]
            lines.append(f"  {label:<30}wall {found['wall']:.4f}  CPU {found['cpu']:.4f}")
    return "\n".join(lines)


def criteria_table(rows: Sequence[dict]) -> str:
    """What is asked, what was found, met or not, and what others reached."""
    lines = [f"{'criterion':<36}{'target':>9}{'here':>8}  {'':<13}beside it"]
    for row in rows:
        value, met = row["value"], row["met"]
        here = "-" if value is None else f"{value:.4g}"
        unknown = "not measured" if value is None else "undecided"
        verdict = unknown if met is None else "met" if met else "not met"
        line = f"{row['criterion']:<36}{row['target']:>9}{here:>8}  {verdict:<13}{row['beside']}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def plot(path: Path, groups: dict) -> None:
    """Each measure against the measured rate: a line a language for Samvad, one a peer."""
    from matplotlib.figure import Figure

    measures = [m for m in MEASURES if any(m in p["scores"] for p in groups["all"]["points"])]
    figure = Figure(figsize=(4 * min(3, len(measures)), 3.2 * math.ceil(len(measures) / 3)))
    languages = [name for name in groups if name != "all"]
    peers = dict.fromkeys(p["codec"] for p in groups["all"]["points"] if p["codec"] != "samvad")
    for place, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(math.ceil(len(measures) / 3), min(3, len(measures)), place)
        for language in languages:
            axes.plot(*_curve(groups[language], "samvad", measure), "o-", label=language)
        for peer in peers:
            axes.plot(*_curve(groups["all"], peer, measure), "s:", label=peer)
        own = groups["all"]["uncoded"]["scores"].get(measure)
        if own is not None:
            axes.axhline(own, color="grey", linestyle="--", label="uncoded")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("kbit/s, measured, with container")
        axes.set_ylabel(MEASURES[measure][0])
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _curve(group: dict, codec: str, measure: str) -> tuple[list[float], list[float]]:
    found = [
        (p["file_kbps"], p["scores"][measure])
        for p in group["points"]
        if p["codec"] == codec and p["scores"].get(measure) is not None
    ]
    return [rate for rate, _ in found], [score for _, score in found]


# ---------------------------------------------------------------------------------- running


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--codec", type=Path, default=HERE / "checkpoints" / "tiny" / "codec",
        help="checkpoint folder [the tiny one]")  # fmt: skip
    add("--data_dirs", nargs="+", default=[f"data/{language}" for language in SPOKEN])
    add("--split", choices=SPLITS, default="test")
    add("--max_clips", type=whole(1), default=20, help="a language [20]")
    add("--against", default="", help="opus, codec2, speex, mimi; comma-separated")
    add("--output", type=Path, help="file for the summary and every clip, as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="rate-distortion curves")
    add("--probe", action="store_true", help="phone errors of a linear probe on codebook 0")
    add("--probe_against", nargs="+", type=Path, default=[], metavar="CHECKPOINT",
        help="codecs to probe beside it")  # fmt: skip
    add("--check_speakers", nargs="+", type=Path, default=[], metavar="FOLDER",
        help="trained on: is any of their voices among the evaluated ones?")  # fmt: skip
    add = parser.add_argument_group("advanced").add_argument
    add("--codebooks", type=whole(1), nargs="+",
        help="how many to decode [2 4 8 16 32 64, and all]")  # fmt: skip
    add("--judges", nargs="+", choices=("auto", *JUDGES), default=["auto"],
        help="auto: all but dnsmos, which is slow")  # fmt: skip
    add("--min_seconds", type=number(0), default=1.0, help="shorter clips are skipped [1]")
    add("--max_seconds", type=number(0, 3600), default=10.0, help="of a clip, from its start [10]")
    add("--probe_clips", type=whole(1), default=200, help="a language, to fit and to score [200]")
    add("--commercial_only", action="store_true")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--threads", type=whole(1, 1024), default=1,
        help="CPU threads; times are always of one [1]")  # fmt: skip
    args = parser.parse_args(arguments)
    args.against = list(dict.fromkeys(filter(None, args.against.split(","))))
    return _checked(args)


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """Everything that can be refused before an hour of work. Raises UserError."""
    known = (*PEERS, "mimi")
    unknown = [name for name in args.against if name not in known]
    if unknown:
        raise UserError(f"--against {unknown[0]}: not one of {', '.join(known)}")
    if args.probe_against and not args.probe:
        raise UserError("--probe_against needs --probe")
    if not args.min_seconds < args.max_seconds:
        raise UserError("--min_seconds must be below --max_seconds")
    check_tools(name for name in args.against if name in PEERS)
    if args.output:
        writable_file(args.output, "--output")
    if args.plot:
        _check_plot(args)
    return args


def _check_plot(args: argparse.Namespace) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot needs a package ({error}): pip install matplotlib") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if args.plot.suffix.lower().lstrip(".") not in kinds:
        raise UserError(f"--plot {args.plot}: end the name in one of .{', .'.join(kinds)}")
    writable_file(args.plot, "--plot")
    if args.output and args.plot.resolve() == args.output.resolve():
        raise UserError(f"--plot {args.plot}: is --output too; give it another name")


def choose_counts(asked: Sequence[int] | None, config: CodecConfig) -> list[int]:
    """The numbers of codebooks to decode, ascending. Raises UserError for more than there are."""
    total = config.num_codebooks
    counts = sorted({*(asked or (*(k for k in RATES if k < total), total))})
    if counts[0] < 1 or counts[-1] > total:
        raise UserError(f"--codebooks must be from 1 to {total}, which is what the codec has")
    return counts


def probe_codecs(args: argparse.Namespace, codec: Codec, found: Sequence[Clip]) -> dict:
    """Results and table of a linear probe on codebook 0 of the codec and of --probe_against.

    Fitted on the training split, scored on the clips `found`. Raises UserError without labels.
    """
    fit = load_clips(args.data_dirs, "train", args.commercial_only)
    chosen = phone_probe.probe_clips(fit, found, " ".join(map(str, args.data_dirs)))
    fit, scored = (draw_clips(clips, args.probe_clips, args.seed) for clips in chosen)
    device = next(codec.parameters()).device
    paths = dict.fromkeys((args.codec, *args.probe_against))
    for path in paths:
        checkpoints.find_checkpoint(path)  # before the first is probed
    results = {}
    for path in paths:
        probed = codec if path == args.codec else Codec.from_checkpoint(path, device)
        results[str(path)] = phone_probe.probe_codec(probed, fit, scored, args.max_seconds)
    names = (f"{count_speakers(clips)} speakers" for clips in (fit, scored))
    return {"codecs": results, "table": phone_probe.probe_table(results, *names)}


def check_speakers(args: argparse.Namespace, heard: Sequence[Clip]) -> tuple[dict, str]:
    """How near the evaluated speakers come to the training ones of --check_speakers, and a line.

    Raises UserError without Resemblyzer.
    """
    known = load_clips(args.check_speakers, "train", args.commercial_only)
    try:
        found = hold_out.check_clips(heard, known)
    except ImportError as error:
        hint = JUDGES["speaker"][1]
        raise UserError(f"--check_speakers needs a package ({error}): {hint}") from error
    if found["max_cosine"] is None:
        return found, "speakers: too little audio of named ones to compare them with training's"
    line = (
        f"speakers: {found['held_out']} is nearest to a training voice, cosine "
        f"{found['max_cosine']:.2f} to {found['nearest']} ({found['known_voices']} compared); "
        f"a training voice has {found['same_voice_cosine']:.2f} with itself"
    )
    return found, line


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    device = training.setup_distributed(args.device).device
    codec = Codec.from_checkpoint(args.codec, device)
    config = codec.config
    if config.sample_rate != SAMPLE_RATE:
        raise UserError(f"{args.codec}: a codec of {config.sample_rate} Hz; audio is read at 24000")
    counts = choose_counts(args.codebooks, config)
    peers = [name for name in args.against if name in PEERS]
    points = points_of(config, counts, peers)

    # Clips: what the manifest calls too short is left out of the draw.
    least = max(config.hop, round(args.min_seconds * SAMPLE_RATE))
    found = load_clips(args.data_dirs, args.split, args.commercial_only)
    where = f"{' '.join(map(str, args.data_dirs))}: split {args.split}"
    if not found:
        raise UserError(f"{where}: no clips; choose another --split")
    long_enough = [clip for clip in found if clip.duration * SAMPLE_RATE >= least - 1]
    skipped, noted = Counter({"too short": len(found) - len(long_enough)}), Counter()
    drawn = draw_clips(long_enough, args.max_clips, args.seed)
    probed = probe_codecs(args, codec, found) if args.probe else None
    voices, voices_line = check_speakers(args, found) if args.check_speakers else (None, "")

    times = real_time_factors(codec, "mimi" in args.against)
    judges = load_judges(args.judges)
    names = ", ".join(judges) or "none"
    print(f"{len(drawn)} clips, codebooks {' '.join(map(str, counts))}, judges: {names}",
          flush=True)  # fmt: skip

    rows, heard = [], []
    uses = defaultdict(lambda: CodebookUse(config.codebook_sizes))
    with tempfile.TemporaryDirectory() as folder:
        for clip in tqdm(drawn, unit="clip", disable=None):
            audio, notes = read_clip(clip, args.max_seconds, least)
            if audio is None:
                skipped.update(notes)
                continue
            try:
                got, codes = evaluate_clip(codec, clip, audio, counts, points, judges, Path(folder))
            except PeerError as error:
                skipped[str(error)] += 1
                continue
            noted.update(notes)
            rows += got
            heard.append(clip)
            uses[clip.language].add(codes, speech_frames(audio, config.hop))
    skipped += Counter()  # drops zeros
    if not heard:
        reasons = ", ".join(f"{n} {why}" for why, n in skipped.items())
        raise UserError(f"{where}: no clip could be evaluated ({reasons})")

    # Summaries: each language, and all clips together.
    groups = {}
    for name in (*dict.fromkeys(clip.language for clip in heard), "all"):
        inside = [clip for clip in heard if name in ("all", clip.language)]
        groups[name] = summarise([r for r in rows if name in ("all", r.language)], points)
        groups[name]["speakers"] = count_speakers(inside)
        groups[name]["clips_of_unknown_speakers"] = sum(c.speaker is None for c in inside)
        own = [use for language, use in uses.items() if name in ("all", language)]
        groups[name]["codebooks"] = sum(own[1:], own[0]).summary()
    verdicts = criteria(groups, times, config, spent_usd())

    shown = [name for name in groups if name != "all" or len(groups) > 2]
    print(f"\n{args.codec}, {where}, seed {args.seed}")
    print("\n\n".join(table(name, groups[name]) for name in shown))
    for title, counter in (("skipped", skipped), ("kept", noted)):
        if counter:
            print(f"{title}: " + ", ".join(f"{n} {what}" for what, n in sorted(counter.items())))
    print(f"\n{codebook_table(groups['all']['codebooks'])}\n\n{time_table(times)}\n")
    print(criteria_table(verdicts))
    if probed:
        print(f"\n{probed['table']}\n")
    if voices:
        print(voices_line)
    absent = [language for language in SPOKEN if language not in groups]
    if absent:
        print(f"not measured, for want of clips: {', '.join(absent)}")
    result = {
        "codec": str(args.codec),
        "fingerprint": codec.fingerprint,
        "split": args.split,
        "seed": args.seed,
        "num_codebooks": counts,
        "groups": groups,
        "skipped": dict(skipped),
        "noted": dict(noted),
        "real_time": times,
        "criteria": verdicts,
    }
    if probed:
        result["probe"] = probed["codecs"]
    if voices:
        result["speakers"] = voices
    try:
        if args.output:
            text = json.dumps({**result, "rows": [vars(row) for row in rows]}, indent=1)
            write_text(args.output, text)
        if args.plot:
            plot(args.plot, groups)
    finally:  # a full disk must not cost the figures
        print(json.dumps(result))


if __name__ == "__main__":
    run(main, resumes=False)
