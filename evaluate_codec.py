"""How the codec sounds and what it costs, per bitrate and language.

    python evaluate_codec.py --data_dirs data/english data/hindi data/telugu --split test
    python evaluate_codec.py --data_dirs data/english --plot rate.png --output codec.json

Clips are drawn evenly over the speakers of a language, encoded once and decoded at each of
`--codebooks`. Means over clips of:

    SNR       10 log10(|x|² / |x - y|²) in dB, per clip, at most 100
    SI-SDR    the same against the best-scaled reference (Le Roux et al. 2019)
    PESQ      wideband, ITU-T P.862.2, of 1 to 4.64
    STOI      intelligibility (Taal et al. 2011), of 0 to 1
    MOS       predicted by DistillMOS (Stahl & Gamper 2025), 1 to 5, no reference needed

`uncoded` is what the judges say of the recordings themselves. A judge whose package is missing is
left out, and so is a clip that a judge cannot measure, for it alone. The last line of stdout is the
summary as JSON; `--output` also holds every clip.
"""

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

HERE = Path(__file__).resolve().parent
SPOKEN = tuple(language for language in LANGUAGES if language != "other")
JUDGE_RATE = 16000
# name: (column, decimals, width)
MEASURES = {"snr": ("SNR", 2, 7), "si_sdr": ("SI-SDR", 2, 7), "pesq": ("PESQ", 2, 6),
            "stoi": ("STOI", 3, 6), "mos": ("MOS", 2, 6)}  # fmt: skip
RATES = (2, 4, 8, 16, 32, 64)  # codebooks: 1, 2, 4, 8, 16, 32 kbit/s
LM_CODEBOOKS, STEP_MS = 8, (40, 80)
TIMED_ROUNDS = 7  # and one before them to warm up
TIMED_SECONDS = 1.6  # of audio a round: whole steps of 40 and of 80 ms
SILENT_PEAK = 1e-4  # -80 dBFS
SPEECH_RANGE_DB = 40.0  # frames within this of the clip's loudest one count as speech
FRAMES_A_CODE = 10  # fewer speech frames than this a code say little about a codebook
Point = tuple[str, float]  # a codec and the rate that it is asked for, kbit/s


# (coded, uncoded audio `[T]` at 16 kHz) → a number; raises, or is not finite, where it can't tell.
AudioJudge = Callable[[np.ndarray, "np.ndarray | None"], float]


def pesq_judge() -> AudioJudge:
    from pesq import pesq

    return lambda audio, reference: pesq(JUDGE_RATE, reference, audio, "wb")


def stoi_judge() -> AudioJudge:
    from pystoi import stoi

    def score(audio, reference):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # too little speech: undefined
            return stoi(reference, audio, JUDGE_RATE)

    return score


def mos_judge() -> AudioJudge:
    from distillmos import ConvTransformerSQAModel

    # It prints where its weights lie; the last line of stdout is JSON for programs.
    with contextlib.redirect_stdout(sys.stderr):
        model = ConvTransformerSQAModel().eval().requires_grad_(False)
    return lambda audio, reference: model(torch.from_numpy(audio)[None])


# name: (maker, its packages)
JUDGES = {"pesq": (pesq_judge, "pesq"), "stoi": (stoi_judge, "pystoi"),
          "mos": (mos_judge, "distillmos xls-r-sqa")}  # fmt: skip


def load_judges(names: Sequence[str]) -> dict[str, AudioJudge]:
    """Those of `names` that are installed; a line on stderr for each of the others."""
    judges = {}
    for name in names:
        make, found = JUDGES[name]
        try:
            judges[name] = make()
        except ImportError as error:
            print(f"warning: no column {name} ({error}): pip install {found}", file=sys.stderr)
    return judges


def judge(judges: dict[str, AudioJudge], audio: np.ndarray, reference=None) -> dict:
    """Score by judge; None where it cannot measure it. Without a reference, MOS alone."""
    found = {}
    for name in judges if reference is not None else judges.keys() & {"mos"}:
        try:
            value = float(judges[name](audio, reference))
            found[name] = value if math.isfinite(value) else None
        except Exception as error:  # one clip must not cost all others
            print(f"warning: {name} failed on a clip: {first_line(error)}", file=sys.stderr)
            found[name] = None
    return found


def for_judges(audio: np.ndarray) -> np.ndarray:  # 24 kHz [T] → 16 kHz, float32
    return soxr.resample(audio, SAMPLE_RATE, JUDGE_RATE).astype(np.float32, copy=False)


def waveform_scores(audio: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """SNR, at most 100 so that it stays a number, and SI-SDR in dB, of `[T]` twice."""
    audio, reference = (x.astype(np.float64) for x in (audio, reference))
    signal = float(np.square(reference).sum())
    noise = float(np.square(reference - audio).sum())
    snr = 10 * math.log10(max(signal, 1e-20) / max(noise, 1e-10 * signal, 1e-30))
    both = (torch.from_numpy(x)[None] for x in (audio, reference))
    return {"snr": snr, "si_sdr": float(si_sdr(*both))}


class Skipped(Exception):
    """Why a clip cannot be evaluated."""


def draw_clips(clips: Sequence[Clip], max_clips: int, seed: int) -> list[Clip]:
    """Up to `max_clips` a language, each speaker's (if unknown, folder's) in turn, by `seed`."""
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


def read_clip(clip: Clip, max_seconds: float, least: int) -> np.ndarray:
    """Audio `[T]` at 24 kHz. Raises Skipped."""
    try:
        audio = read_audio(clip.path, 0.0, max_seconds)
    except AudioError as error:
        raise Skipped("unreadable") from error
    if len(audio) < least:
        raise Skipped("too short")
    if np.abs(audio).max() < SILENT_PEAK:
        raise Skipped("silent")
    return audio


@dataclass(frozen=True)
class Coded:
    """Audio `[T]` at 24 kHz as a codec gave it back, and the bits that its codes take."""

    audio: np.ndarray
    bits: int


@dataclass(frozen=True)
class Row:
    """One clip through one codec (`uncoded`: the recording itself) at one rate."""

    clip: str
    language: str
    seconds: float
    codec: str
    asked_kbps: float
    bits: int
    scores: dict[str, float | None]


def kbps_of(config: CodecConfig, codebooks: int) -> float:  # of the first ones
    return sum(map(math.log2, config.codebook_sizes[:codebooks])) * config.frame_rate / 1000


def code_samvad(codec: Codec, audio: np.ndarray, counts: Sequence[int]) -> tuple:
    """Audio `[T]`: by Point, as Coded, and all codes `[K, F]`. UserError where it is not finite."""
    config, device = codec.config, next(codec.parameters()).device
    # Once: the first codes of a residual quantizer do not depend on how many follow.
    codes = codec.encode(torch.from_numpy(audio).to(device)[None, None], config.num_codebooks)
    coded = {}
    for count in counts:
        decoded = codec.decode(codes[:, :count])[0, 0, : len(audio)].float().cpu().numpy()
        if not np.isfinite(decoded).all():
            raise UserError("the codec's output is not finite: a damaged or diverged checkpoint")
        bits = math.ceil(codes.shape[-1] * sum(map(math.log2, config.codebook_sizes[:count])))
        coded["samvad", kbps_of(config, count)] = Coded(decoded.clip(-1, 1), bits)  # as players do
    return coded, codes[0].cpu().numpy()


def speech_frames(audio: np.ndarray, hop: int) -> np.ndarray:
    """`[T]` → `[ceil(T / hop)]` bool: frames within 40 dB of the loudest one."""
    padded = np.pad(audio.astype(np.float64), (0, -len(audio) % hop))
    power = np.square(padded).reshape(-1, hop).mean(1)
    return power > power.max() * 10 ** (-SPEECH_RANGE_DB / 10)


def codebook_use(counts: Sequence[np.ndarray]) -> dict:
    """Frames counted; per codebook perplexity exp(-Σ p ln p), its share, and codes used. `counts`:
    how often each code occurs in speech, `[size]` a codebook."""
    rows = []
    for count in counts:
        shares = count[count > 0] / max(1, count.sum())
        perplexity = math.exp(-float((shares * np.log(shares)).sum()))
        row = {"perplexity": round(perplexity, 2), "used": round(len(shares) / len(count), 4)}
        rows.append(row | {"perplexity_share": round(perplexity / len(count), 4)})
    frames = int(counts[0].sum())
    few = frames < FRAMES_A_CODE * max(map(len, counts))
    return {"speech_frames": frames, "too_few_frames": few, "codebooks": rows}


def stepper(codec: Codec, frames: int, codebooks: int, graph: bool = False) -> Callable:
    """A function that encodes and decodes `[1, 1, T]` in steps of `frames`; its state goes on. With
    `graph` each step is one captured CUDA graph, for a CUDA stream that is not the default one."""
    encoder, decoder = codec.init_encoder_state(1), codec.init_decoder_state(1)

    def step(mode: None, audio: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"audio": codec.decode_step(codec.encode_step(audio, encoder, codebooks), decoder)}

    take = training.StepGraph(step, warmup=3) if graph else step

    def run(audio: torch.Tensor) -> torch.Tensor:
        chunks = audio.split(frames * codec.config.hop, dim=-1)
        return torch.cat([take(None, audio=chunk)["audio"].clone() for chunk in chunks], dim=-1)

    return run


@torch.no_grad()
def real_time_factors(codec: Codec, others: dict[str, Callable] | None = None) -> dict:
    """Seconds of encoding and decoding a second of audio, on one CPU thread or the codec's GPU.

    Each round times every candidate in turn (`others`, from audio `[1, 1, T]`, too), so that what
    else the machine does meets them alike. Medians, on a CPU of the process' own time."""
    device = next(codec.parameters()).device
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    codebooks = min(LM_CODEBOOKS, codec.config.num_codebooks)
    audio = 0.1 * torch.randn(1, 1, round(TIMED_SECONDS * SAMPLE_RATE), device=device)
    runs = {"offline": lambda x: codec.decode(codec.encode(x, codebooks)), **(others or {})}
    if on_gpu:
        torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device) if on_gpu else None):
        for ms in STEP_MS:
            frames = round(ms / 1000 * codec.config.frame_rate)
            runs[f"stream_{ms}ms"] = stepper(codec, frames, codebooks)
            if on_gpu:
                runs[f"graph_{ms}ms"] = stepper(codec, frames, codebooks, graph=True)
        times = {name: [] for name in runs}
        for _ in range(1 + TIMED_ROUNDS):
            for name, code in runs.items():
                started = clock()
                code(audio)
                if on_gpu:
                    torch.cuda.synchronize(device)
                times[name].append(clock() - started)
    factors = {n: round(statistics.median(t[1:]) / TIMED_SECONDS, 5) for n, t in times.items()}
    return {"device": str(device), "num_codebooks": codebooks, "factors": factors}


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
        net = round(sum(row.bits for row in own) / seconds / 1000, 3)
        means.append({"codec": name, "asked_kbps": round(kbps, 3), "net_kbps": net, **_means(own)})
    recordings = {"clips": len(uncoded), "seconds": round(seconds, 1), "uncoded": _means(uncoded)}
    return recordings | {"points": means}


def _means(rows: Sequence[Row]) -> dict:
    """Of each measure, over the clips that have it, and how many these are."""
    names = [name for name in MEASURES if any(name in row.scores for row in rows)]
    known = {name: [s for r in rows if (s := r.scores.get(name)) is not None] for name in names}
    means = {name: round(statistics.fmean(v), 4) if v else None for name, v in known.items()}
    return {"scores": means, "measured": {name: len(values) for name, values in known.items()}}


def criterion(name: str, value: float | None, sign: str, goal: float, unit="", beside="") -> dict:
    """Whether `value` is on the right side of `goal`; `met` is None where it was not measured."""
    compare = {">": operator.gt, ">=": operator.ge, "<": operator.lt}[sign]
    met, value = (None, None) if value is None else (compare(value, goal), round(value, 4))
    target = f"{sign} {goal:,g}{unit}"
    return {"criterion": name, "target": target, "value": value, "met": met, "beside": beside}


def criteria(groups: dict, times: dict, config: CodecConfig, spent: float | None) -> list[dict]:
    """The plan's success criteria, then the project's own for a codec."""
    pooled = groups["all"]
    lm = kbps_of(config, min(LM_CODEBOOKS, config.num_codebooks))
    full = kbps_of(config, config.num_codebooks)
    scores = {p["asked_kbps"]: p["scores"] for p in pooled["points"] if p["codec"] == "samvad"}
    at_lm, at_full = (scores.get(round(kbps, 3), {}) for kbps in (lm, full))
    own = pooled["uncoded"]["scores"].get("mos")
    uncoded = "" if own is None else f"uncoded {own:.2f}"
    spoken, books = sum(name in groups for name in SPOKEN), pooled["codebooks"]["codebooks"]
    least, used = min(row["perplexity_share"] for row in books[1:]), min(b["used"] for b in books)
    rows = [criterion("perplexity/size, least acoustic one", least, ">", 0.35),
            criterion("codes in use, least used level", used, ">=", 1)]  # fmt: skip
    for row in rows:
        # More frames can only find more codes: too few prove success, never failure.
        if pooled["codebooks"]["too_few_frames"] and not row["met"]:
            row |= {"met": None, "beside": "few frames"}
    snr, budget = at_full.get("snr"), training.PLAN_BUDGET_USD
    return [
        criterion(f"SNR at the full rate, {full:g} kbit/s", snr, ">", 20, " dB", "~22 dB"),
        criterion(f"SI-SDR at {lm:g} kbit/s", at_lm.get("si_sdr"), ">=", 8, " dB", "8-9 dB"),
        criterion(f"predicted MOS at {lm:g} kbit/s", at_lm.get("mos"), ">", 4, beside=uncoded),
        criterion("end-to-end latency (evaluate_s2s.py)", None, "<", 400, " ms"),
        criterion("languages evaluated here", spoken, ">=", 3, beside="1"),
        criterion("training cost so far (costs.jsonl)", spent, "<", budget, " $"),
        criterion(f"PESQ-WB at {lm:g} kbit/s", at_lm.get("pesq"), ">=", 2.2),
        criterion(f"STOI at {lm:g} kbit/s", at_lm.get("stoi"), ">=", 0.90),
        *rows,
        criterion("real-time factor, 40 ms steps", times["factors"]["stream_40ms"], "<", 0.25)]


def columns_of(group: dict) -> list[str]:
    return [name for name in MEASURES if any(name in p["scores"] for p in group["points"])]


def cells(scores: dict, columns: Sequence[str], percent: bool = False) -> str:
    """A value a column, each in its width."""
    text = ""
    for name in columns:
        (_, decimals, width), value = MEASURES[name], scores.get(name)
        shown = "-" if value is None else f"{value:.0%}" if percent else f"{value:.{decimals}f}"
        text += f"{shown:>{width}}"
    return text


def table(name: str, group: dict) -> str:
    """A language's codecs and rates, at most 80 columns wide."""
    columns, speakers = columns_of(group), group["speakers"] or "unknown"
    heads = "".join(f"{MEASURES[m][0]:>{MEASURES[m][2]}}" for m in columns)
    lines = [f"{name}: {group['clips']} clips, {group['seconds']:.0f} s, {speakers} speakers",
             f"{'kbit/s:':<9}{'asked':>6}{'net':>7}{heads}",
             f"{'uncoded':<22}{cells(group['uncoded']['scores'], columns)}"]  # fmt: skip
    for p in group["points"]:
        rates = f"{p['asked_kbps']:>6.4g}{p['net_kbps']:>7.2f}"
        lines.append(f"{p['codec']:<9}{rates}{cells(p['scores'], columns)}")
    least = {m: min(p["measured"].get(m, 0) for p in group["points"]) for m in columns}
    if partly := [f"{MEASURES[m][0]} {n}" for m, n in least.items() if n < group["clips"]]:
        lines.append(f"clips that a judge could measure: {', '.join(partly)}")
    return "\n".join(line.rstrip() for line in lines)


def codebook_line(use: dict) -> str:
    semantic, *others = (row["perplexity_share"] for row in use["codebooks"])
    shares = f"{semantic:.2f}, acoustic {min(others):.2f} to {max(others):.2f}"
    return f"codebooks ({use['speech_frames']} speech frames): perplexity/size {shares}"


def criteria_table(rows: Sequence[dict]) -> str:
    lines = [f"{'criterion':<36}{'target':>9}{'here':>8}  {'':<13}beside it"]
    for row in rows:
        value, words = row["value"], {True: "met", False: "not met", None: "undecided"}
        verdict = "not measured" if value is None else words[row["met"]]
        here = "-" if value is None else f"{value:.4g}"
        line = f"{row['criterion']:<36}{row['target']:>9}{here:>8}  {verdict:<13}{row['beside']}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def plot(path: Path, groups: dict) -> None:
    """Each measure against the measured rate: a line a language, and one for each other codec."""
    from matplotlib.figure import Figure

    pooled, measures = groups["all"], columns_of(groups["all"])
    codecs = dict.fromkeys(p["codec"] for p in pooled["points"])
    curves = [(name, "samvad", name, "o-") for name in groups if name != "all"]
    curves += [("all", codec, codec, "s:") for codec in codecs if codec != "samvad"]
    width, height = min(3, len(measures)), math.ceil(len(measures) / 3)
    figure = Figure(figsize=(4 * width, 3.2 * height), layout="tight")
    for place, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(height, width, place)
        for group, codec, label, style in curves:
            points = [p for p in groups[group]["points"] if p["codec"] == codec]
            values = np.array([p["scores"].get(measure) for p in points], float)  # None: NaN
            axes.plot([p["net_kbps"] for p in points], values, style, label=label)
        if (own := pooled["uncoded"]["scores"].get(measure)) is not None:
            axes.axhline(own, color="grey", linestyle="--", label="uncoded")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="kbit/s", ylabel=MEASURES[measure][0])
        axes.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def parser_of(description: str) -> ArgumentParser:
    parser = ArgumentParser(description)
    add = parser.add_argument
    add("--codec", type=Path, default=HERE / "checkpoints/tiny/codec", help="checkpoint folder")
    add("--data_dirs", nargs="+", default=[f"data/{language}" for language in SPOKEN], help="clips")
    add("--split", choices=SPLITS, default="test", help="of the clips")
    add("--max_clips", type=whole(1), default=20, help="a language")
    add("--output", type=Path, help="file for the summary and every clip, as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="rate-distortion curves")
    add = parser.add_argument_group("advanced").add_argument
    add("--decoder", choices=("general", "agent"), default="general", help="of the codec")
    add("--codebooks", type=whole(1), nargs="+", help="how many to decode [2 4 8 16 32 64, all]")
    add("--judges", nargs="+", choices=JUDGES, default=list(JUDGES), help="beside SNR and SI-SDR")
    add("--min_seconds", type=number(0), default=1.0, help="shorter clips are skipped")
    add("--max_seconds", type=number(0, 3600), default=10.0, help="of a clip, from its start")
    add("--commercial_only", action="store_true")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of the draw of clips")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be refused before an hour of work. Raises UserError."""
    if args.output:
        writable_file(args.output, "--output")
    if not args.plot:
        return
    drawing = command.needed("matplotlib.figure", "--plot needs a package: pip install matplotlib")
    kinds = drawing.Figure().canvas.get_supported_filetypes()
    if args.plot.suffix.lower().lstrip(".") not in kinds:
        raise UserError(f"--plot {args.plot}: end the name in one of .{', .'.join(kinds)}")
    writable_file(args.plot, "--plot")
    if args.output and args.plot.resolve() == args.output.resolve():
        raise UserError(f"--plot {args.plot}: is --output too; give it another name")


def load_codec(args: argparse.Namespace) -> tuple[Codec, list[int]]:
    """The codec on its device, and the numbers of codebooks to decode, ascending."""
    torch.set_num_threads(1)  # what is timed is one core
    device = training.setup_distributed(args.device).device
    codec = Codec.from_checkpoint(args.codec, device, args.decoder)
    total = codec.config.num_codebooks
    counts = sorted(set(args.codebooks or (*(k for k in RATES if k < total), total)))
    if counts[-1] > total:
        raise UserError(f"--codebooks must be from 1 to {total}, which is what the codec has")
    return codec, counts


def evaluate(args: argparse.Namespace, codec: Codec, counts: Sequence[int],
             peers: dict[Point, Callable] | None = None, timed=None) -> tuple:  # fmt: skip
    """What goes into the JSON, and a Row for every recording and point. UserError where no clip is
    left. `peers` are other codecs' points, each from audio `[T]`, or Skipped for a clip that one
    cannot code; `timed` as in `real_time_factors`."""
    config, peers = codec.config, peers or {}
    least = max(config.hop, round(args.min_seconds * SAMPLE_RATE))
    found = load_clips(args.data_dirs, args.split, args.commercial_only)
    long_enough = [clip for clip in found if clip.duration * SAMPLE_RATE >= least - 1]
    skipped = Counter(["too short"] * (len(found) - len(long_enough)))
    drawn = draw_clips(long_enough, args.max_clips, args.seed)
    times, judges = real_time_factors(codec, timed), load_judges(args.judges)
    names = ", ".join(judges) or "none"
    print(f"{len(drawn)} clips, codebooks {counts}, judges: {names}", flush=True)

    rows, evaluated = [], []
    used = defaultdict(lambda: [np.zeros(size, np.int64) for size in config.codebook_sizes])
    for clip in tqdm(drawn, unit="clip", disable=None):
        try:
            audio = read_clip(clip, args.max_seconds, least)
            coded, codes = code_samvad(codec, audio, counts)
            coded |= {point: code(audio) for point, code in peers.items()}
        except Skipped as reason:
            skipped[str(reason)] += 1
            continue
        evaluated.append(clip)
        for level, row in enumerate(codes[:, speech_frames(audio, config.hop)]):
            count = np.bincount(row, minlength=config.codebook_sizes[level])
            for name in (clip.language, "all"):
                used[name][level] += count
        reference = for_judges(audio)
        about = str(clip.path), clip.language, len(audio) / SAMPLE_RATE
        rows.append(Row(*about, "uncoded", 0.0, 0, judge(judges, reference)))
        for point, got in coded.items():
            scores = waveform_scores(got.audio, audio)
            scores |= judge(judges, for_judges(got.audio), reference)
            rows.append(Row(*about, *point, got.bits, scores))
    if not evaluated:
        reasons = ", ".join(f"{n} {why}" for why, n in skipped.items()) or "choose another --split"
        where = " ".join(map(str, args.data_dirs))
        raise UserError(f"{where}: split {args.split}: no clip could be evaluated ({reasons})")

    groups, points = {}, [*(("samvad", kbps_of(config, count)) for count in counts), *peers]
    for name in (*dict.fromkeys(clip.language for clip in evaluated), "all"):
        inside = [clip for clip in evaluated if name in ("all", clip.language)]
        groups[name] = summarise([r for r in rows if name in ("all", r.language)], points)
        groups[name]["speakers"] = count_speakers(inside)
        groups[name]["codebooks"] = codebook_use(used[name])
    meter = training.CostMeter("evaluation", enabled=False)
    spent = meter.spent_usd() if meter.ledger.exists() else None
    return {"codec": str(args.codec), "fingerprint": codec.fingerprint, "decoder": args.decoder,
        "split": args.split, "seed": args.seed, "num_codebooks": list(counts), "groups": groups,
        "skipped": dict(skipped), "real_time": times,
        "criteria": criteria(groups, times, config, spent)}, rows  # fmt: skip


def report(args: argparse.Namespace, result: dict, rows: Sequence[Row], more: str = "") -> None:
    """Prints tables, `more` and the JSON; writes --output and --plot."""
    groups, where = result["groups"], " ".join(map(str, args.data_dirs))
    shown = [name for name in groups if name != "all" or len(groups) > 2]
    print(f"\n{args.codec}, {args.decoder} decoder, {where}: split {args.split}, seed {args.seed}")
    print("\n\n".join(table(name, groups[name]) for name in shown))
    if result["skipped"]:
        skipped = sorted(result["skipped"].items())
        print("skipped: " + ", ".join(f"{n} {why}" for why, n in skipped))
    times = result["real_time"]
    print(f"\n{codebook_line(groups['all']['codebooks'])}\nencode + decode, s a second of audio, "
          f"{times['device']}, one thread, {times['num_codebooks']} codebooks")  # fmt: skip
    print(*(f"  {name:<12}{factor:.4f}\n" for name, factor in times["factors"].items()), sep="")
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
