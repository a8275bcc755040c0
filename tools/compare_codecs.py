"""The codec beside other codecs: Opus, Codec2 and Speex by their tools, and Mimi's time.

    python tools/compare_codecs.py --data_dirs data/english --against opus,codec2,speex,mimi

As `evaluate_codec.py`, with its flags. Codecs named by `--against` code the same clips at the
nearest rates they have; Mimi (Défossez et al. 2024), with random weights, is timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import soxr  # noqa: E402
import torch  # noqa: E402

import evaluate_codec  # noqa: E402
from audio import SAMPLE_RATE, read_audio, write_audio  # noqa: E402
from command import UserError, run  # noqa: E402
from evaluate_codec import (  # noqa: E402
    MEASURES,
    Coded,
    Point,
    Row,
    Skipped,
    cells,
    columns_of,
    criterion,
)

MUST_BEAT = (("codec2", 3.2), ("speex", 3.95))  # on the share WINS of the clips
WINS = 0.8
TIMES_CHEAPER = {40: 5.0, 80: 8.0}  # than Mimi, by the milliseconds of a step


def code_opus(audio: np.ndarray, kbps: float, folder: Path) -> Coded:
    """libopus in 20 ms frames, variable rate; its tools take the codec's delay out."""
    source, coded, heard = (folder / name for name in ("in.wav", "coded.opus", "out.wav"))
    write_audio(source, audio)
    _tool("opusenc", "--quiet", "--padding", "0", "--bitrate", kbps, source, coded)
    _tool("opusdec", "--quiet", "--rate", SAMPLE_RATE, coded, heard)
    return Coded(_place(read_audio(heard), 0.0, len(audio)), ogg_bits(coded.read_bytes()))


def code_speex(audio: np.ndarray, kbps: float, folder: Path) -> Coded:
    """Speex: narrowband up to 8 kbit/s, where it beats its own wideband in PESQ-WB and STOI."""
    # Delays that its tools leave in: about these by the highest STOI, 3 ms more or less by clip.
    mode, rate, delay = ("-n", 8000, 10.0) if kbps <= 8 else ("-w", 16000, 12.0)
    source, coded, heard = (folder / name for name in ("in.wav", "coded.spx", "out.wav"))
    write_audio(source, soxr.resample(audio, SAMPLE_RATE, rate), rate)
    # "This rate or lower": a little above, so that rounding does not choose the next mode down.
    _tool("speexenc", mode, "--comp", 10, "--bitrate", round(1000 * kbps) + 20, source, coded)
    _tool("speexdec", coded, heard)
    back = read_audio(heard)
    delay = _delay_near(back, audio, delay)
    return Coded(_place(back, delay, len(audio)), ogg_bits(coded.read_bytes()))


def code_codec2(audio: np.ndarray, kbps: float, folder: Path) -> Coded:
    """Codec2, narrowband and parametric: SNR and SI-SDR say nothing of it. Files are bare codes."""
    mode, delay = ("700C", 30.0) if kbps < 1 else (str(round(1000 * kbps)), 20.0)
    source, coded, heard = (folder / name for name in ("in.raw", "coded.bit", "out.raw"))
    narrow = soxr.resample(audio, SAMPLE_RATE, 8000)
    source.write_bytes((narrow.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    _tool("c2enc", mode, source, coded)
    _tool("c2dec", mode, coded, heard)
    samples = np.frombuffer(heard.read_bytes(), "<i2").astype(np.float32) / 32768
    wide = soxr.resample(samples, 8000, SAMPLE_RATE)
    return Coded(_place(wide, delay, len(audio)), 8 * coded.stat().st_size)


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
        raise Skipped(f"{words[0]} failed ({said[-1]}); install it again or leave it out")


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


@contextlib.contextmanager
def timed_mimi(device: torch.device) -> Iterator[dict[str, Callable]]:
    """What `evaluate_codec.real_time_factors` times beside the codec: Mimi in its 80 ms frames."""
    mimi, no_compile = load_mimi(device)

    @torch.no_grad()
    def code(audio: torch.Tensor) -> None:
        for chunk in audio.split(mimi.frame_size, dim=-1):
            mimi.decode(mimi.encode(chunk))

    with no_compile(), mimi.streaming(1):
        yield {"mimi_80ms": code}


# ---------------------------------------------------------------------------------- comparison


def peer_points(
    names: Iterable[str], rates: Sequence[float], folder: Path
) -> dict[Point, Callable[[np.ndarray], Coded]]:
    """Each peer at those of its rates that are nearest to `rates`; files are made in `folder`."""
    return {
        (name, rate): functools.partial(PEERS[name].code, kbps=rate, folder=folder)
        for name in names
        for rate in sorted({PEERS[name].nearest(r) for r in rates})
    }


def pairs(points: Iterable[Point]) -> list[tuple[Point, Point]]:
    """(Samvad's point, peer's point) for each point of a peer: that of the nearest rate."""
    own = [point for point in points if point[0] == "samvad"]
    peers = [point for point in points if point[0] != "samvad"]
    return [(min(own, key=lambda o: abs(o[1] - peer[1])), peer) for peer in peers]


def comparisons(rows: Sequence[Row]) -> list[dict]:
    """On which share of the clips Samvad scores higher, per measure; a tie is no win."""
    by_point = defaultdict(list)
    for row in rows:
        if row.codec != "uncoded":
            by_point[row.codec, row.asked_kbps].append(row)
    return [_wins(by_point, own, peer) for own, peer in pairs(by_point)]


def _wins(by_point: dict, own: Point, peer: Point) -> dict:
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


def wins_table(name: str, group: dict) -> str:
    """The shares of a group's clips on which Samvad is better, at most 80 columns wide."""
    columns = columns_of(group)
    heads = "".join(f"{MEASURES[m][0]:>{MEASURES[m][2]}}" for m in columns)
    lines = [f"{name}: clips on which samvad is better".ljust(29), " " * 29 + heads]
    for pair in group["better_than"]:
        label = f" {pair['samvad_kbps']:g} than {pair['codec']} {pair['asked_kbps']:g}"
        lines.append(f"{label:<29}{cells(pair['share'], columns, percent=True)}")
    return "\n".join(line.rstrip() for line in lines)


def criteria(group: dict, factors: dict) -> list[dict]:
    """How many times cheaper than Mimi, and the share of clips won from each that must be beaten,
    in the measure where it is least."""
    rows = []
    for ms, goal in TIMES_CHEAPER.items():
        if "mimi_80ms" in factors:
            ratio = factors["mimi_80ms"] / factors[f"stream_{ms}ms"]
            rows.append(criterion(f"times cheaper than Mimi, {ms} ms steps", ratio, ">=", goal))
    for pair in group["better_than"]:
        if (pair["codec"], pair["asked_kbps"]) not in MUST_BEAT:
            continue
        shares = {n: s for n, s in pair["share"].items() if n in ("pesq", "stoi", "mos")}
        least = min(shares, key=shares.get, default="pesq")
        name = f"clips won from {pair['codec']} at {pair['asked_kbps']:g} kbit/s"
        beside = f"in {MEASURES[least][0]}"
        rows.append(criterion(name, shares.get(least), ">=", WINS, beside=beside))
    return rows


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = evaluate_codec.parser_of(__doc__)
    parser.add_argument(
        "--against", default="opus,codec2,speex", help="of opus, codec2, speex, mimi [all but mimi]"
    )
    args = parser.parse_args(arguments)
    args.against = list(dict.fromkeys(filter(None, args.against.split(","))))
    known = (*PEERS, "mimi")
    unknown = [name for name in args.against if name not in known]
    if unknown:
        raise UserError(f"--against {unknown[0]}: not one of {', '.join(known)}")
    check_tools(name for name in args.against if name in PEERS)
    evaluate_codec.check_arguments(args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    codec, counts = evaluate_codec.load_codec(args)
    rates = [evaluate_codec.kbps_of(codec.config, count) for count in counts]
    names = [name for name in args.against if name in PEERS]
    with contextlib.ExitStack() as stack:
        timed = {}
        if "mimi" in args.against:
            timed = stack.enter_context(timed_mimi(next(codec.parameters()).device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = peer_points(names, rates, folder)
        result, rows = evaluate_codec.evaluate(args, codec, counts, peers, timed)
    groups = result["groups"]
    for name, group in groups.items():
        group["better_than"] = comparisons([r for r in rows if name in ("all", r.language)])
    result["criteria"] += criteria(groups["all"], result["real_time"]["factors"])
    shown = [name for name in groups if name != "all" or len(groups) > 2]
    wins = "".join(f"{wins_table(name, groups[name])}\n\n" for name in shown) if names else ""
    evaluate_codec.report(args, result, rows, wins)


if __name__ == "__main__":
    run(main, resumes=False)
