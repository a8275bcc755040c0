"""How the codec sounds and what it costs, per bitrate and language.

    python evaluate_codec.py --data_dirs data/english data/hindi data/telugu --split test
    python evaluate_codec.py --data_dirs data/english --plot rate.png --output codec.json

Clips are drawn evenly over the speakers of a language, encoded once and decoded at each of
`--codebooks`.

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

The last line of stdout is the summary as JSON; `--output` also holds every clip.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import operator
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from tqdm import tqdm

import command
import training
from audio import SAMPLE_RATE, AudioError, read_audio
from codec import Codec, CodecConfig
from command import ArgumentParser, UserError, first_line, number, whole, writable_file
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
Point = tuple[str, float]  # a codec and the rate that it is asked for, kbit/s


# ---------------------------------------------------------------------------------- judges
#
# A judge is made once, imports its package then, and is called with the coded and the uncoded
# audio, float32 `[T]` of one length at 16 kHz. It answers with a number, or None where it cannot
# measure that clip. Those of NO_REFERENCE hear the coded audio alone.

Judge = Callable[[np.ndarray, "np.ndarray | None"], "float | None"]
NO_REFERENCE = ("mos", "dnsmos")


def pesq_judge() -> Judge:
    """PESQ wideband, ITU-T P.862.2."""
    from pesq import PesqError, pesq

    def score(audio, reference):
        if not (audio.any() and reference.any()):
            return None
        # Negative where there is no utterance, or too short a one.
        value = pesq(JUDGE_RATE, reference, audio, "wb", on_error=PesqError.RETURN_VALUES)
        return float(value) if value > 0 else None

    return score


def stoi_judge() -> Judge:
    """STOI (Taal et al. 2011); None for less than 0.4 s of speech, where it is undefined."""
    from pystoi import stoi

    def score(audio, reference):
        if len(reference) < 0.4 * JUDGE_RATE:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                value = float(stoi(reference, audio, JUDGE_RATE))
            except RuntimeWarning:  # too few frames are left without the silent ones
                return None
        return value if math.isfinite(value) else None

    return score


def distill_mos_judge() -> Judge:
    """MOS predicted by DistillMOS (Stahl & Gamper 2025); silence scores about 2."""
    from distillmos import ConvTransformerSQAModel

    # It prints where its weights lie; the last line of stdout is JSON for programs.
    with contextlib.redirect_stdout(sys.stderr):
        model = ConvTransformerSQAModel().eval()

    @torch.no_grad()
    def score(audio, reference=None):
        return float(model(torch.from_numpy(audio)[None]))

    return score


def dnsmos_judge() -> Judge:
    """Overall quality after ITU-T P.835, predicted by DNSMOS (Reddy et al. 2022)."""
    import onnxruntime
    from speechmos import dnsmos

    folder = Path(dnsmos.__file__).parent / "dnsmos_models"
    paths = [str(folder / name) for name in ("sig_bak_ovr.onnx", "model_v8.onnx")]
    model = dnsmos.DNSMOS(*paths)
    # Its own sessions take every core, and beside other work become four times slower.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model.onnx_sess, model.p808_onnx_sess = (
        onnxruntime.InferenceSession(path, options) for path in paths
    )

    def score(audio, reference=None):
        if len(audio) < 0.02 * JUDGE_RATE:
            return None
        return float(model(audio.clip(-1, 1), JUDGE_RATE, False)["ovrl_mos"])

    return score


class VoiceEmbedder:
    """Resemblyzer's speaker embedding (Wan et al. 2018). Raises ImportError without the package."""

    least = 0.5  # s of voice

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from resemblyzer import VoiceEncoder, preprocess_wav, sampling_rate
        self.encoder = VoiceEncoder("cpu", verbose=False)
        self._prepare, self._rate = preprocess_wav, sampling_rate

    def __call__(self, audio: np.ndarray, sample_rate: int) -> np.ndarray | None:
        """`[T]` → a unit vector `[256]` of its voiced parts, None where they are short."""
        if len(audio) < self.least * sample_rate or not audio.any():
            return None
        voiced = self._prepare(audio, source_sr=sample_rate)
        long_enough = len(voiced) >= self.least * self._rate
        return self.encoder.embed_utterance(voiced) if long_enough else None


def speaker_judge() -> Judge:
    """Cosine of Resemblyzer's embeddings; None where the reference has under 0.5 s of voice."""
    embed = VoiceEmbedder()

    def score(audio, reference):
        known = embed(reference, JUDGE_RATE)
        if known is None:
            return None
        coded = embed(audio, JUDGE_RATE)
        if coded is None:  # no voice found in it: judged as it is, silences and all
            coded = embed.encoder.embed_utterance(audio)
        return float(known @ coded)

    return score


JUDGES = {  # name: (maker, how to get it)
    "pesq": (pesq_judge, "pip install pesq"),
    "stoi": (stoi_judge, "pip install pystoi"),
    "mos": (distill_mos_judge, "pip install distillmos xls-r-sqa"),
    "dnsmos": (dnsmos_judge, "pip install speechmos librosa onnxruntime requests"),
    "speaker": (speaker_judge, "pip install resemblyzer"),
}


def load_judge(name: str) -> Judge:
    """One judge of JUDGES. Raises UserError with the line that installs it."""
    make, hint = JUDGES[name]
    try:
        return make()
    except ImportError as error:
        raise UserError(f"the judge {name} needs a package ({error}): {hint}") from error


def load_judges(names: Sequence[str]) -> dict[str, Judge]:
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
    judges: dict[str, Judge], audio: np.ndarray, reference: np.ndarray | None = None
) -> dict[str, float | None]:
    """What each judge says of audio `[T]` at 16 kHz; without a reference, those that need none.

    A judge that fails on one clip cannot measure it: that must not cost all others.
    """
    found = {}
    for name, ask in judges.items():
        if reference is None and name not in NO_REFERENCE:
            continue
        try:
            found[name] = ask(audio, reference)
        except Exception as error:
            print(f"warning: {name} failed on a clip: {first_line(error)}", file=sys.stderr)
            found[name] = None
    return found


def for_judges(audio: np.ndarray) -> np.ndarray:
    """24 kHz `[T]` → the judges' 16 kHz, float32."""
    return soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE).astype(np.float32, copy=False)


def waveform_scores(audio: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """SNR, at most 100 so that it stays a number, and SI-SDR in dB, of `[T]` twice."""
    audio, reference = (x.astype(np.float64) for x in (audio, reference))
    signal = float(np.square(reference).sum())
    noise = float(np.square(reference - audio).sum())
    snr = 10 * math.log10(max(signal, 1e-20) / max(noise, 1e-10 * signal, 1e-30))
    both = (torch.from_numpy(x)[None] for x in (audio, reference))
    return {"snr": snr, "si_sdr": float(si_sdr(*both))}


# ---------------------------------------------------------------------------------- clips


class Skipped(Exception):
    """A clip that cannot be evaluated; the message says why."""


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
        turns = itertools.chain.from_iterable(itertools.zip_longest(*order))
        drawn += [clip for clip in turns if clip is not None][:max_clips]
    return drawn


def read_clip(clip: Clip, max_seconds: float, least: int) -> tuple[np.ndarray, list[str]]:
    """Audio `[T]` at 24 kHz and remarks on it. Raises Skipped."""
    try:
        audio = read_audio(clip.path, 0.0, max_seconds)
    except AudioError as error:
        raise Skipped("unreadable") from error
    if len(audio) < least:
        raise Skipped("too short")
    if np.abs(audio).max() < SILENT_PEAK:
        raise Skipped("silent")
    remarks = []
    if (np.abs(audio) >= CLIPPED_LEVEL).mean() > CLIPPED_SHARE:
        remarks.append("clipped")
    if clip.sample_rate < JUDGE_RATE:
        remarks.append(f"recorded at {clip.sample_rate / 1000:g} kHz")
    return audio, remarks


# ---------------------------------------------------------------------------------- coding


@dataclass(frozen=True)
class Coded:
    """Audio `[T]` at 24 kHz as a codec gave it back, and the bits it was sent in."""

    audio: np.ndarray
    net_bits: int
    file_bits: int


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


def kbps_of(config: CodecConfig, codebooks: int) -> float:
    """What the first `codebooks` take, in kbit/s."""
    return sum(map(math.log2, config.codebook_sizes[:codebooks])) * config.frame_rate / 1000


def code_samvad(
    codec: Codec, audio: np.ndarray, counts: Sequence[int]
) -> tuple[dict[Point, Coded], np.ndarray]:
    """Audio `[T]` at each number of codebooks, and the codes of all codebooks `[K, F]`.

    Encoded once: the first codes of a residual quantizer do not depend on how many follow.
    Raises UserError where a checkpoint's output is not finite.
    """
    config, device = codec.config, next(codec.parameters()).device
    codes = codec.encode(torch.from_numpy(audio).to(device)[None, None], config.num_codebooks)
    coded = {}
    for count in counts:
        decoded = codec.decode(codes[:, :count])[0, 0, : len(audio)].float().cpu().numpy()
        if not np.isfinite(decoded).all():
            raise UserError("the codec's output is not finite: a damaged or diverged checkpoint")
        bits = math.ceil(codes.shape[-1] * sum(map(math.log2, config.codebook_sizes[:count])))
        # Clipped as every player does.
        coded["samvad", kbps_of(config, count)] = Coded(
            decoded.clip(-1, 1), bits, 8 * math.ceil(bits / 8)
        )
    return coded, codes[0].cpu().numpy()


def speech_frames(audio: np.ndarray, hop: int) -> np.ndarray:
    """`[T]` → `[ceil(T / hop)]` bool: frames within 40 dB of the loudest one."""
    padded = np.pad(audio.astype(np.float64), (0, -len(audio) % hop))
    power = np.square(padded).reshape(-1, hop).mean(1)
    return power > power.max() * 10 ** (-SPEECH_RANGE_DB / 10)


def codebook_use(counts: Sequence[np.ndarray]) -> dict:
    """Frames counted; per codebook perplexity exp(-Σ p ln p), its share, and codes used.

    `counts`: how often each code occurs in speech, `[size]` a codebook.
    """
    rows = []
    for count in counts:
        shares = count[count > 0] / max(1, count.sum())
        perplexity = math.exp(-float((shares * np.log(shares)).sum()))
        row = {"size": len(count), "used": round(len(shares) / len(count), 4)}
        row["perplexity"] = round(perplexity, 2)
        row["perplexity_share"] = round(perplexity / len(count), 4)
        rows.append(row)
    frames = int(counts[0].sum())
    few = frames < FRAMES_A_CODE * max(map(len, counts))
    return {"speech_frames": frames, "too_few_frames": few, "codebooks": rows}


# ---------------------------------------------------------------------------------- time


def stepper(codec: Codec, frames: int, codebooks: int, graph: bool = False) -> Callable:
    """A function that encodes and decodes `[1, 1, T]` in steps of `frames`; its state goes on.

    With `graph` each step is one captured CUDA graph, so that the GPU need not wait for Python;
    for a CUDA stream that is not the default one.
    """
    encoder, decoder = codec.init_encoder_state(1), codec.init_decoder_state(1)

    def step(mode: None, audio: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = codec.encode_step(audio, encoder, codebooks)
        return {"audio": codec.decode_step(codes, decoder)}

    take = training.StepGraph(step, warmup=3) if graph else step

    def run(audio: torch.Tensor) -> torch.Tensor:
        chunks = audio.split(frames * codec.config.hop, dim=-1)
        return torch.cat([take(None, audio=chunk)["audio"].clone() for chunk in chunks], dim=-1)

    return run


@torch.no_grad()
def real_time_factors(
    codec: Codec, others: dict[str, Callable] | None = None, rounds: int = TIMED_ROUNDS
) -> dict:
    """Seconds of encoding and decoding a second of audio, on one CPU thread or the codec's GPU.

    Each round times every candidate (`others` take audio `[1, 1, T]`, too) on the same audio in
    turn, so that what else the machine does meets them alike. Medians of the wall clock, and of
    the process' own CPU time.
    """
    device = next(codec.parameters()).device
    codebooks = min(LM_CODEBOOKS, codec.config.num_codebooks)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, round(TIMED_SECONDS * SAMPLE_RATE), generator=generator)
    audio = 0.1 * noise.to(device)
    runs = {"offline": lambda x: codec.decode(codec.encode(x, codebooks))}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        for ms in STEP_MS:
            frames = max(1, round(ms / 1000 * codec.config.frame_rate))
            runs[f"stream_{ms}ms"] = stepper(codec, frames, codebooks)
            if device.type == "cuda":
                runs[f"graph_{ms}ms"] = stepper(codec, frames, codebooks, graph=True)
        runs |= others or {}
        times = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, code in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                code(audio)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    found = {"device": str(device), "threads": 1, "num_codebooks": codebooks}
    for name, taken in times.items():
        wall, cpu = np.median(taken[1:], axis=0) / TIMED_SECONDS
        found[name] = {"wall": round(float(wall), 5), "cpu": round(float(cpu), 5)}
    return found


# ---------------------------------------------------------------------------------- summaries


def summarise(rows: Sequence[Row], points: Sequence[Point]) -> dict:
    """Means of one group of clips: the recordings, and each point."""
    by_point = defaultdict(list)
    for row in rows:
        by_point[row.codec, row.asked_kbps].append(row)
    uncoded = by_point["uncoded", 0.0]
    seconds = sum(row.seconds for row in uncoded)
    means = []
    for name, kbps in points:
        own = by_point[name, kbps]
        rates = {
            f"{kind}_kbps": round(sum(getattr(r, f"{kind}_bits") for r in own) / seconds / 1000, 3)
            for kind in ("net", "file")
        }
        means.append({"codec": name, "asked_kbps": round(kbps, 3), **rates, **_means(own)})
    recordings = {"clips": len(uncoded), "seconds": round(seconds, 1), "uncoded": _means(uncoded)}
    return recordings | {"points": means}


def _means(rows: Sequence[Row]) -> dict:
    """Mean of each measure over the clips that have it, and on how many clips that is."""
    names = [name for name in MEASURES if any(name in row.scores for row in rows)]
    known = {name: [s for r in rows if (s := r.scores.get(name)) is not None] for name in names}
    means = {name: round(statistics.fmean(v), 4) if v else None for name, v in known.items()}
    return {"scores": means, "measured": {name: len(values) for name, values in known.items()}}


def criterion(
    name: str, value: float | None, sign: str, goal: float, unit: str = "", beside: str = ""
) -> dict:
    """Whether `value` is on the right side of `goal`; `met` is None where it was not measured."""
    compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt}[sign]
    target = f"{sign} ${goal:,g}" if unit == "$" else f"{sign} {goal:g}{unit}"
    met = None if value is None else compare(value, goal)
    value = value if value is None else round(value, 4)
    return {"criterion": name, "target": target, "value": value, "met": met, "beside": beside}


def criteria(groups: dict, times: dict, config: CodecConfig, spent: float | None) -> list[dict]:
    """The plan's success criteria, then the project's own for a codec."""
    pooled = groups["all"]
    lm = kbps_of(config, min(LM_CODEBOOKS, config.num_codebooks))
    full = kbps_of(config, config.num_codebooks)
    scores = {p["asked_kbps"]: p["scores"] for p in pooled["points"] if p["codec"] == "samvad"}
    at_lm, at_full = (scores.get(round(kbps, 3), {}) for kbps in (lm, full))
    mos = "mos" if at_lm.get("mos") is not None else "dnsmos"
    label = "predicted MOS" if mos == "mos" else "DNSMOS"
    own = pooled["uncoded"]["scores"].get(mos)
    uncoded = "" if own is None else f"uncoded {own:.2f}"
    spoken, use = sum(language in groups for language in SPOKEN), pooled["codebooks"]
    share = min(row["perplexity_share"] for row in use["codebooks"][1:])
    used = min(row["used"] for row in use["codebooks"])
    of_codebooks = [
        criterion("perplexity/size, least acoustic one", share, ">", 0.35),
        criterion("codes in use, least used level", used, ">=", 1),
    ]
    for row in of_codebooks:
        # More frames can only find more codes: too few prove success, never failure.
        if use["too_few_frames"] and not row["met"]:
            row |= {"met": None, "beside": "few frames"}
    # On a CPU the core's own time, which other programs on the machine do not lengthen.
    clock = "cpu" if times["device"] == "cpu" else "wall"
    cost = times["stream_40ms"][clock]
    return [
        criterion(f"SNR at the full rate, {full:g} kbit/s", at_full.get("snr"), ">", 20, " dB",
                  "~22 dB"),
        criterion(f"SI-SDR at {lm:g} kbit/s", at_lm.get("si_sdr"), ">=", 8, " dB", "8-9 dB"),
        criterion(f"{label} at {lm:g} kbit/s", at_lm.get(mos), ">", 4, beside=uncoded),
        criterion("end-to-end latency (evaluate_s2s.py)", None, "<", 400, " ms"),
        criterion("languages evaluated here", spoken, ">=", 3, beside="1"),
        criterion("training cost so far (costs.jsonl)", spent, "<", PLAN_BUDGET_USD, "$"),
        criterion(f"PESQ-WB at {lm:g} kbit/s", at_lm.get("pesq"), ">=", 2.2),
        criterion(f"STOI at {lm:g} kbit/s", at_lm.get("stoi"), ">=", 0.90),
        *of_codebooks,
        criterion("real-time factor, 40 ms steps", cost, "<", 0.25, beside=f"{clock} time"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- printing


def cells(scores: dict, columns: Sequence[str], percent: bool = False) -> str:
    """A value a column, each in its width."""
    text = ""
    for name in columns:
        _, decimals, width = MEASURES[name]
        value = scores.get(name)
        shown = "-" if value is None else f"{value:.0%}" if percent else f"{value:.{decimals}f}"
        text += f"{shown:>{width}}"
    return text


def table(name: str, group: dict) -> str:
    """A language's codecs and rates, at most 80 columns wide."""
    columns = [m for m in MEASURES if any(m in point["scores"] for point in group["points"])]
    unknown = group["clips_of_unknown_speakers"]
    heads = "".join(f"{MEASURES[m][0]:>{MEASURES[m][2]}}" for m in columns)
    lines = [
        f"{name}: {group['clips']} clips, {group['seconds']:.0f} s, {group['speakers']} speakers"
        + (f", {unknown} clips of unknown ones" if unknown else ""),
        f"{'kbit/s:':<9}{'asked':>6}{'net':>7}{'file':>7}{heads}",
        f"{'uncoded':<29}{cells(group['uncoded']['scores'], columns)}",
    ]
    for p in group["points"]:
        rates = f"{p['asked_kbps']:>6.4g}{p['net_kbps']:>7.2f}{p['file_kbps']:>7.2f}"
        lines.append(f"{p['codec']:<9}{rates}{cells(p['scores'], columns)}")
    least = {m: min(p["measured"].get(m, 0) for p in group["points"]) for m in columns}
    partly = [f"{MEASURES[m][0]} {n}" for m, n in least.items() if n < group["clips"]]
    if partly:
        lines.append(f"clips that a judge could measure: {', '.join(partly)}")
    return "\n".join(line.rstrip() for line in lines)


def codebook_table(use: dict) -> str:
    """Perplexity, its share of the size and the share of codes in use, three codebooks a line."""
    parts = [
        f"{k:>3}:{row['perplexity']:>7.0f} {row['perplexity_share']:>4.2f} {row['used']:>5.0%}"
        for k, row in enumerate(use["codebooks"])
    ]
    frames = use["speech_frames"]
    lines = [f"codebooks, {frames} speech frames: perplexity, share of the size, codes in use"]
    lines += ["".join(parts[i : i + 3]) for i in range(0, len(parts), 3)]
    if use["too_few_frames"]:
        lines.append(f"too few frames to judge: {FRAMES_A_CODE} a code are needed (--max_clips)")
    return "\n".join(lines)


def time_table(times: dict) -> str:
    """Real-time factors; lower is cheaper."""
    lines = [
        f"encode + decode, s a second of audio, {times['device']}, one thread, "
        f"{times['num_codebooks']} codebooks"
    ]
    for name, found in times.items():
        if isinstance(found, dict):
            label = name.replace("graph_", "stream, CUDA graph, ").replace("_", ", ")
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
    """Each measure against the measured rate: a line a language, and one for each other codec."""
    from matplotlib.figure import Figure

    measures = [m for m in MEASURES if any(m in p["scores"] for p in groups["all"]["points"])]
    codecs = dict.fromkeys(p["codec"] for p in groups["all"]["points"])
    curves = [(name, "samvad", "o-") for name in groups if name != "all"]
    curves += [("all", codec, "s:") for codec in codecs if codec != "samvad"]
    width, height = min(3, len(measures)), math.ceil(len(measures) / 3)
    figure = Figure(figsize=(4 * width, 3.2 * height))
    for place, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(height, width, place)
        for group, codec, style in curves:
            found = [
                (p["file_kbps"], p["scores"][measure])
                for p in groups[group]["points"]
                if p["codec"] == codec and p["scores"].get(measure) is not None
            ]
            label = group if codec == "samvad" else codec
            axes.plot([x for x, _ in found], [y for _, y in found], style, label=label)
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


# ---------------------------------------------------------------------------------- running


def parser_of(description: str) -> ArgumentParser:
    """The flags of an evaluation."""
    parser = ArgumentParser(description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--codec", type=Path, default=HERE / "checkpoints" / "tiny" / "codec",
        help="checkpoint folder [the tiny one]")  # fmt: skip
    add("--data_dirs", nargs="+", default=[f"data/{language}" for language in SPOKEN])
    add("--split", choices=SPLITS, default="test")
    add("--max_clips", type=whole(1), default=20, help="a language [20]")
    add("--output", type=Path, help="file for the summary and every clip, as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="rate-distortion curves")
    add = parser.add_argument_group("advanced").add_argument
    add("--codebooks", type=whole(1), nargs="+",
        help="how many to decode [2 4 8 16 32 64, and all]")  # fmt: skip
    add("--judges", nargs="+", choices=("auto", *JUDGES), default=["auto"],
        help="auto: all but dnsmos, which is slow")  # fmt: skip
    add("--min_seconds", type=number(0), default=1.0, help="shorter clips are skipped [1]")
    add("--max_seconds", type=number(0, 3600), default=10.0, help="of a clip, from its start [10]")
    add("--commercial_only", action="store_true")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--threads", type=whole(1, 1024), default=1,
        help="CPU threads; times are always of one [1]")  # fmt: skip
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused before an hour of work. Raises UserError."""
    if not args.min_seconds < args.max_seconds:
        raise UserError("--min_seconds must be below --max_seconds")
    if args.output:
        writable_file(args.output, "--output")
    if not args.plot:
        return
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


def load_codec(args: argparse.Namespace) -> tuple[Codec, list[int]]:
    """The codec on its device, and the numbers of codebooks to decode, ascending."""
    torch.set_num_threads(args.threads)
    codec = Codec.from_checkpoint(args.codec, training.setup_distributed(args.device).device)
    config, total = codec.config, codec.config.num_codebooks
    if config.sample_rate != SAMPLE_RATE:
        raise UserError(f"{args.codec}: a codec of {config.sample_rate} Hz; audio is read at 24000")
    counts = sorted({*(args.codebooks or (*(k for k in RATES if k < total), total))})
    if counts[-1] > total:
        raise UserError(f"--codebooks must be from 1 to {total}, which is what the codec has")
    return codec, counts


def evaluate(
    args: argparse.Namespace,
    codec: Codec,
    counts: Sequence[int],
    peers: dict[Point, Callable[[np.ndarray], Coded]] | None = None,
    timed: dict[str, Callable] | None = None,
) -> tuple[dict, list[Row]]:
    """What goes into the JSON, and a row for every recording and point.

    `peers` are other codecs' points, each from audio `[T]`; they raise Skipped for a clip that
    they cannot code. `timed` as in `real_time_factors`. Raises UserError where no clip is left.
    """
    config, peers = codec.config, peers or {}
    least = max(config.hop, round(args.min_seconds * SAMPLE_RATE))
    found = load_clips(args.data_dirs, args.split, args.commercial_only)
    where = f"{' '.join(map(str, args.data_dirs))}: split {args.split}"
    if not found:
        raise UserError(f"{where}: no clips; choose another --split")
    # What the manifest calls too short is left out of the draw.
    long_enough = [clip for clip in found if clip.duration * SAMPLE_RATE >= least - 1]
    skipped, remarks = Counter({"too short": len(found) - len(long_enough)}), Counter()
    drawn = draw_clips(long_enough, args.max_clips, args.seed)
    times = real_time_factors(codec, timed)
    judges = load_judges(args.judges)
    print(f"{len(drawn)} clips, codebooks {' '.join(map(str, counts))}, judges: "
          f"{', '.join(judges) or 'none'}", flush=True)  # fmt: skip

    rows, evaluated = [], []
    used = defaultdict(lambda: [np.zeros(size, np.int64) for size in config.codebook_sizes])
    for clip in tqdm(drawn, unit="clip", disable=None):
        try:
            audio, of_clip = read_clip(clip, args.max_seconds, least)
            coded, codes = code_samvad(codec, audio, counts)
            coded |= {point: code(audio) for point, code in peers.items()}
        except Skipped as reason:
            skipped[str(reason)] += 1
            continue
        remarks.update(of_clip)
        evaluated.append(clip)
        speech = speech_frames(audio, config.hop)
        for level, row in enumerate(codes[:, speech]):
            count = np.bincount(row, minlength=config.codebook_sizes[level])
            for name in (clip.language, "all"):
                used[name][level] += count
        reference = for_judges(audio)
        about = str(clip.path), clip.language, len(audio) / SAMPLE_RATE
        rows.append(Row(*about, "uncoded", 0.0, 0, 0, judge(judges, reference)))
        for point, got in coded.items():
            scores = waveform_scores(got.audio, audio)
            scores |= judge(judges, for_judges(got.audio), reference)
            rows.append(Row(*about, *point, got.net_bits, got.file_bits, scores))
    skipped += Counter()  # drops zeros
    if not evaluated:
        reasons = ", ".join(f"{n} {why}" for why, n in skipped.items())
        raise UserError(f"{where}: no clip could be evaluated ({reasons})")

    # Each language, and all clips together.
    groups, points = {}, [*(("samvad", kbps_of(config, count)) for count in counts), *peers]
    for name in (*dict.fromkeys(clip.language for clip in evaluated), "all"):
        inside = [clip for clip in evaluated if name in ("all", clip.language)]
        groups[name] = summarise([r for r in rows if name in ("all", r.language)], points)
        groups[name]["speakers"] = count_speakers(inside)
        groups[name]["clips_of_unknown_speakers"] = sum(c.speaker is None for c in inside)
        groups[name]["codebooks"] = codebook_use(used[name])
    meter = training.CostMeter("evaluation", enabled=False)
    spent = meter.spent_usd() if meter.ledger.exists() else None
    result = {
        "codec": str(args.codec),
        "fingerprint": codec.fingerprint,
        "split": args.split,
        "seed": args.seed,
        "num_codebooks": list(counts),
        "groups": groups,
        "skipped": dict(skipped),
        "noted": dict(remarks),
        "real_time": times,
        "criteria": criteria(groups, times, config, spent),
    }
    return result, rows


def report(args: argparse.Namespace, result: dict, rows: Sequence[Row], more: str = "") -> None:
    """Prints tables, `more` and the JSON; writes --output and --plot."""
    groups = result["groups"]
    shown = [name for name in groups if name != "all" or len(groups) > 2]
    print(f"\n{args.codec}, {' '.join(map(str, args.data_dirs))}: split {args.split}, "
          f"seed {args.seed}")  # fmt: skip
    print("\n\n".join(table(name, groups[name]) for name in shown))
    for title in ("skipped", "noted"):
        if counts := result[title]:
            print(f"{title}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    print(f"\n{codebook_table(groups['all']['codebooks'])}\n\n{time_table(result['real_time'])}\n")
    print(more + criteria_table(result["criteria"]))
    if absent := [language for language in SPOKEN if language not in groups]:
        print(f"not measured, for want of clips: {', '.join(absent)}")
    try:
        if args.output:
            text = json.dumps({**result, "rows": [vars(row) for row in rows]}, indent=1)
            command.write_text(args.output, text)
        if args.plot:
            plot(args.plot, groups)
    finally:  # a full disk must not cost the figures
        print(json.dumps(result))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser_of(__doc__).parse_args(arguments)
    check_arguments(args)
    codec, counts = load_codec(args)
    report(args, *evaluate(args, codec, counts))


if __name__ == "__main__":
    command.run(main, resumes=False)
