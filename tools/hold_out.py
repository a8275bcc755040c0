"""Whether held-out voices are truly others: speaker embeddings of theirs and of training voices.

    python tools/hold_out.py --data_dirs data/english data/hindi --split validation
    python tools/hold_out.py --voices english hindi telugu --split test    # of the speech engines

Names tell speakers apart only as far as corpora name them; two corpora may hold one person. The
last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

import speech  # noqa: E402
from audio import SAMPLE_RATE, AudioError, read_audio  # noqa: E402
from command import ArgumentParser, UserError, run, whole  # noqa: E402
from data import SPLITS, Clip, load_clips  # noqa: E402
from dialogues import choose_exchanges, load_scripts  # noqa: E402
from evaluate_codec import SPOKEN, draw_clips  # noqa: E402
from takes import MAX_PITCH_RANGE, user_voices  # noqa: E402


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


def compare_voices(held_out: np.ndarray, known: np.ndarray) -> dict:
    """How much voices resemble `known` ones, by unit vectors of two halves of each: `[V, 2, d]`.

    Returns `max_cosine` between a held-out and a known voice, `held_out` and `nearest`, their
    indices, and for scale `same_voice_cosine`, the median between the halves of one known voice.
    """
    means = [voices.sum(1) for voices in (held_out, known)]
    means = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in means]
    cosines = means[0] @ means[1].T
    one, other = np.unravel_index(int(cosines.argmax()), cosines.shape)
    same = (known[:, 0] * known[:, 1]).sum(1)
    return {
        "max_cosine": round(float(cosines.max()), 4),
        "held_out": int(one),
        "nearest": int(other),
        "same_voice_cosine": round(float(np.median(same)), 4),
    }


def check_clips(held_out: Sequence[Clip], known: Sequence[Clip], seconds: float = 15.0) -> dict:
    """`compare_voices` of the named speakers of two lists of clips, two halves of `seconds` each.

    Returns its figures, with names for indices, how many voices were compared, and how many clips
    could not be read; speakers with less audio than three seconds a half are left out. `max_cosine`
    is None where nobody is left.
    """
    embed, unreadable = VoiceEmbedder(), []
    names, halves = [], []
    for clips in (held_out, known):
        voices = {
            name: pair
            for name, own in tqdm(_by_speaker(clips).items(), unit="voice", disable=None)
            if (pair := _halves(own, embed, seconds, unreadable)) is not None
        }
        names.append(list(voices))
        halves.append(np.array(list(voices.values())))
    found = {"voices": len(names[0]), "known_voices": len(names[1]), "max_cosine": None}
    found["unreadable_clips"] = len(unreadable)
    if all(names):
        compared = compare_voices(*halves)
        one, other = names[0][compared["held_out"]], names[1][compared["nearest"]]
        found |= {**compared, "held_out": one, "nearest": other}
    return found


def described(found: dict) -> str:
    """`check_clips`' figures as a line."""
    if found["max_cosine"] is None:
        return "speakers: too little audio of named ones to compare them with training's"
    return (
        f"speakers: {found['held_out']} is nearest to a training voice, cosine "
        f"{found['max_cosine']:.2f} to {found['nearest']} ({found['known_voices']} compared); "
        f"a training voice has {found['same_voice_cosine']:.2f} with itself"
    )


def check_voices(language: str, split: str, sentences: int = 2) -> dict:
    """`compare_voices` of the speech engines' voices that ask in `split` and in training.

    Two halves of `sentences` sentences of the scripts each; names of voices in place of indices.
    """
    voices = [user_voices(language, which) for which in (split, "train")]
    scripts = choose_exchanges(load_scripts(ROOT / "conversations"), language, "train")
    texts = sorted((max(e.lines[0].texts, key=len) for e in scripts), key=len)[-2 * sentences :]
    requests = [
        speech.Request(
            text,
            language,
            replace(voice, pitch_range=min(voice.pitch_range, MAX_PITCH_RANGE["user"])),
            seed=i,
        )
        for voice in itertools.chain(*voices)
        for i, text in enumerate(texts)
    ]
    embed = VoiceEmbedder()
    said = [u.audio for u in speech.synthesize(requests)]
    rows = [said[i : i + len(texts)] for i in range(0, len(said), len(texts))]
    halves = [[embed(np.concatenate(row[h::2]), SAMPLE_RATE) for h in (0, 1)] for row in rows]
    compared = compare_voices(*np.split(np.array(halves), [len(voices[0])]))
    one, other = voices[0][compared["held_out"]].id, voices[1][compared["nearest"]].id
    counts = {"voices": len(voices[0]), "known_voices": len(voices[1])}
    return {**counts, **compared, "held_out": one, "nearest": other}


def _by_speaker(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    groups = defaultdict(list)
    for clip in clips:
        if clip.speaker and not clip.augmented:  # copies at another pitch are nobody
            groups[clip.speaker].append(clip)
    return groups


def _halves(
    clips: Sequence[Clip], embed: VoiceEmbedder, seconds: float, unreadable: list[Clip]
) -> np.ndarray | None:
    """Unit vectors `[2, d]` of every other clip of one speaker, None where there is too little.

    Appends the clips that could not be read to `unreadable`.
    """
    vectors = []
    for half in (clips[::2], clips[1::2]):
        parts, length = [], 0
        for clip in half:
            if length >= seconds * SAMPLE_RATE:
                break
            try:
                parts.append(read_audio(clip.path, 0.0, seconds))
            except AudioError:
                unreadable.append(clip)
                continue
            length += len(parts[-1])
        vector = embed(np.concatenate(parts), SAMPLE_RATE) if length >= 3 * SAMPLE_RATE else None
        if vector is None:
            return None
        vectors.append(vector)
    return np.stack(vectors)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dirs", nargs="+", type=Path, default=[f"data/{name}" for name in SPOKEN],
        help="folders whose held-out speakers are looked at")  # fmt: skip
    add("--voices", nargs="+", choices=SPOKEN, metavar="LANGUAGE",
        help="compare the speech engines' voices of these languages, not clips")  # fmt: skip
    add("--split", choices=SPLITS, default="validation", help="held-out one [validation]")
    add("--train_dirs", nargs="+", type=Path, metavar="FOLDER",
        help="folders whose training speakers they are compared with [--data_dirs]")  # fmt: skip
    add("--max_clips", type=whole(1), default=200, help="held-out clips a language [200]")
    add("--commercial_only", action="store_true")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    return parser.parse_args(arguments)


def sentence(found: dict) -> str:
    return (
        f"{found['voices']} held-out voices against {found['known_voices']} training ones: "
        f"nearest are {found['held_out']} and {found['nearest']}, cosine "
        f"{found['max_cosine']:.3f} (two halves of one training voice: "
        f"{found['same_voice_cosine']:.3f})"
    )


def check_folders(args: argparse.Namespace) -> dict:
    held_out = load_clips(args.data_dirs, args.split, args.commercial_only)
    held_out = draw_clips(held_out, args.max_clips, args.seed)
    known = load_clips(args.train_dirs or args.data_dirs, "train", args.commercial_only)
    found = check_clips(held_out, known)
    if found["max_cosine"] is None:
        print(f"no named speaker with enough audio among {len(held_out)} held-out or training ones")
    else:
        print(sentence(found))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        if args.voices:
            found = {language: check_voices(language, args.split) for language in args.voices}
            for language, each in found.items():
                print(f"{language}: {sentence(each)}")
        else:
            found = check_folders(args)
    except ImportError as error:
        raise UserError(f"this needs a package ({error}): pip install resemblyzer") from error
    print(json.dumps(found))


if __name__ == "__main__":
    run(main, resumes=False)
