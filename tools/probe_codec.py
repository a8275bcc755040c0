"""How well phones can be read off codebook 0: a linear probe, fitted on training speakers.

    python tools/probe_codec.py --codecs checkpoints_codec checkpoints/tiny/codec \
        --data_dirs data/english data/hindi data/telugu --split validation

For clips with phone labels. The last line of stdout is the results as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import training  # noqa: E402
from codec import Codec  # noqa: E402
from command import ArgumentParser, number, run, whole  # noqa: E402
from data import SPLITS, count_speakers, load_clips  # noqa: E402
from evaluate_codec import SPOKEN, draw_clips  # noqa: E402
from tools.phone_probe import probe_clips, probe_codec, probe_table  # noqa: E402


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--codecs", nargs="+", type=Path, default=[ROOT / "checkpoints" / "tiny" / "codec"],
        help="checkpoint folders [the tiny one]")  # fmt: skip
    add("--data_dirs", nargs="+", default=[f"data/{language}" for language in SPOKEN])
    add("--split", choices=SPLITS, default="validation", help="to score on [validation]")
    add("--max_clips", type=whole(1), default=200, help="a language, to fit and to score [200]")
    add("--max_seconds", type=number(0, 3600), default=10.0, help="of a clip, from its start [10]")
    add("--commercial_only", action="store_true")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = training.setup_distributed(args.device).device
    paths = list(dict.fromkeys(args.codecs))
    for path in paths:
        checkpoints.find_checkpoint(path)  # before the first is probed
    where = " ".join(map(str, args.data_dirs))
    splits = [load_clips(args.data_dirs, s, args.commercial_only) for s in ("train", args.split)]
    chosen = probe_clips(*splits, where)
    fit, scored = (draw_clips(clips, args.max_clips, args.seed) for clips in chosen)
    results = {
        str(path): probe_codec(Codec.from_checkpoint(path, device), fit, scored, args.max_seconds)
        for path in paths
    }
    names = (f"{count_speakers(clips)} speakers" for clips in (fit, scored))
    print(probe_table(results, *names))
    print(json.dumps(results))


if __name__ == "__main__":
    run(main, resumes=False)
