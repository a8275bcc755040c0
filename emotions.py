"""Emotional speech: one table of labels, the folders of four corpora, and their clips as codes.

Folders as their owners ship them: CREMA-D (Cao et al. 2014), RAVDESS (Livingstone and Russo 2018),
EmoV-DB (Adigwe et al. 2018) and ESD (Zhou et al. 2021); and every folder with a speech manifest
whose lines have an `emotion`, as `download_data.py --corpora emotion` makes them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import data
from codec import Codec, silence_codes
from command import UserError
from data import Clip, split_for
from dialogues import load_code_dataset, save_code_dataset

# What corpora call an emotion, in lower case, and ours. A label that is not here is no clip's.
LABELS = {
    **{name: name for name in data.EMOTIONS},
    "neu": "neutral", "wiki": "neutral", "indic": "neutral", "01": "neutral",
    "02": "calm",
    "hap": "happy", "happiness": "happy", "amused": "happy", "joy": "happy", "03": "happy",
    "sadness": "sad", "04": "sad",
    "ang": "angry", "anger": "angry", "05": "angry",
    "fea": "fear", "fearful": "fear", "06": "fear",
    "dis": "disgust", "disgusted": "disgust", "07": "disgust",
    "surprised": "surprise", "08": "surprise",
}  # fmt: skip
MAX_SECONDS = 15.0  # of a clip; what is longer is cut there
EDGE_SECONDS = 0.2  # of silence on both sides of a clip
GAIN_DB = (-9.0, 3.0)  # of microphones, of which each speaker has
MICROPHONES = 4


@dataclass(frozen=True)
class Naming:
    """How a corpus names its files: a pattern for the end of a path without its suffix, with the
    groups `speaker` and `emotion`; and what its licence is."""

    corpus: str
    pattern: str
    license: str
    commercial_ok: bool = False

    def language(self, speaker: str) -> str:
        """ESD's first ten speakers are Chinese; all else is English."""
        return "other" if self.corpus == "esd" and int(speaker) <= 10 else "english"


NAMINGS = (
    Naming(
        "crema-d", r"(?P<speaker>\d{4})_[A-Z]{3}_(?P<emotion>[A-Z]{3})_[A-Z]{1,2}", "ODbL-1.0", True
    ),
    Naming(
        "ravdess", r"03-0[12]-(?P<emotion>\d\d)-\d\d-\d\d-\d\d-(?P<speaker>\d\d)", "CC BY-NC-SA 4.0"
    ),
    Naming(
        "emov-db", r"(?P<speaker>bea|jenie|josh|sam)_(?P<emotion>[A-Za-z]+)/[^/]+",
        "EmoV-DB licence (research)",
    ),
    Naming(
        "esd", r"(?P<speaker>\d{4})/(?P<emotion>[A-Za-z]+)/(?:[a-z]+/)?\d{4}_\d{6}",
        "ESD research licence",
    ),
)  # fmt: skip


def load_emotional(
    folders: Sequence[str | Path], commercial_only: bool = False, log: str | Path | None = None
) -> list[Clip]:
    """The clips with an emotion below the folders, by their manifests or by their files' names.

    Splits are disjoint in speakers. What is left out is counted on stdout, unreadable files on
    stderr and in `log`. Raises UserError on a missing folder, and where nothing is left.
    """
    found, left_out = [], Counter()
    for part in data.load_splits(folders, data.SPLITS, commercial_only=False, unreadable_log=log):
        for clip in part:
            named = clip if clip.emotion else _by_name(clip)
            if named.emotion in LABELS:
                found.append(replace(named, emotion=LABELS[named.emotion]))
            else:
                label = named.emotion and f"no emotion of ours is called {named.emotion!r}"
                left_out[label or "neither manifest nor name tells an emotion"] += 1
    for reason, count in left_out.most_common():
        print(f"{count} clips left out: {reason}")
    if commercial_only:
        found = [clip for clip in found if clip.commercial_ok]
    if not found:
        where = ", ".join(map(str, folders))
        raise UserError(f"{where}: no clip with an emotion; run download_data.py --corpora emotion")
    return found


def _by_name(clip: Clip) -> Clip:
    """The clip with what its file's name tells of it, in one of the `NAMINGS`."""
    path = clip.path.with_suffix("").as_posix()
    for naming in NAMINGS:
        match = re.search(f"(?:^|/){naming.pattern}$", path)
        if match:
            speaker = f"{naming.corpus}-{match['speaker']}"
            return replace(
                clip, speaker=speaker, emotion=match["emotion"].lower(), split=split_for(speaker),
                language=naming.language(match["speaker"]), license=naming.license,
                commercial_ok=naming.commercial_ok,
            )  # fmt: skip
    return clip


def hold_out_speakers(clips: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """(training, validation) clips without a speaker in both; test clips in neither.

    Where no clip is of split validation, one speaker in six is held out, at least one; a clip
    without a speaker is a speaker of its own. Raises UserError where one of the two has none.
    """
    train = [clip for clip in clips if clip.split == "train"]
    validation = [clip for clip in clips if clip.split == "validation"]
    speakers = sorted({_speaker(clip) for clip in train})
    if len(speakers) + bool(validation) < 2 or not train:
        raise UserError("emotional speech of two speakers is needed, one of them to validate")
    if validation:
        return train, validation
    chosen = set(random.Random(0).sample(speakers, max(1, len(speakers) // 6)))
    return (
        [clip for clip in train if _speaker(clip) not in chosen],
        [clip for clip in train if _speaker(clip) in chosen],
    )


def _speaker(clip: Clip) -> str:
    return clip.speaker or str(clip.path)


# ------------------------------------------------------------------------------------ as codes


def encode_clips(clips: Sequence[Clip], codec: Codec, folder: str | Path, batch: int = 16):
    """The code dataset of clips as the user's side of calls, made in `folder` unless it is there.

    A row is a clip between two short silences, its agent silent, its one turn of the user with the
    emotion; `source` is the speaker at one of MICROPHONES, whose gain is drawn: that somebody is
    loud says little by itself. Clips are encoded `batch` at once, on the codec's device; those that
    cannot be read are counted and left out. Returns the dataset.
    """
    folder = Path(folder)
    if not (folder / "state.json").exists():
        info = {
            "codec_fingerprint": codec.fingerprint,
            "frame_rate": codec.config.frame_rate,
            "codebook_sizes": list(codec.config.codebook_sizes[:8]),
        }
        save_code_dataset(folder, _rows(clips, codec, batch), info)
    return load_code_dataset(folder, codec.fingerprint)[0]


def _rows(clips: Sequence[Clip], codec: Codec, batch: int) -> Iterator[dict]:
    device, hop = next(codec.parameters()).device, codec.config.hop
    silent, failed = silence_codes(codec, device)[0, :, -1].cpu().numpy().astype(np.uint16), 0
    ordered = sorted(clips, key=lambda clip: clip.duration)  # little padding
    for first in tqdm(range(0, len(ordered), batch), desc="encoding", disable=None):
        read = []
        for clip in ordered[first : first + batch]:
            try:
                samples = audio.read_audio(clip.path, duration=MAX_SECONDS)
            except audio.AudioError:
                failed += 1
                continue
            source = f"{_speaker(clip)} at {random.Random(str(clip.path)).randrange(MICROPHONES)}"
            gain = 10 ** (random.Random(source).uniform(*GAIN_DB) / 20)
            read.append((clip, source, (samples * gain).clip(-1.0, 1.0)))
        if not read:
            continue
        edge = round(EDGE_SECONDS * audio.SAMPLE_RATE)
        longest = max(len(samples) for *_, samples in read) + 2 * edge
        sound = torch.zeros(len(read), 1, longest)
        for row, (*_, samples) in zip(sound, read, strict=True):
            row[0, edge : edge + len(samples)] = torch.from_numpy(samples)
        with torch.inference_mode():
            codes = codec.encode(sound.to(device), 8).cpu().numpy().astype(np.uint16)
        for row, (clip, source, samples) in zip(codes, read, strict=True):
            frames = -(-(len(samples) + 2 * edge) // hop)
            end = EDGE_SECONDS + len(samples) / audio.SAMPLE_RATE
            turn = {"who": "user", "start": EDGE_SECONDS, "end": end, "text": "",
                    "emotion": clip.emotion}  # fmt: skip
            yield {
                "id": str(clip.path), "language": clip.language, "source": source,
                "split": clip.split, "user_codes": row.T[:frames],
                "agent_codes": np.tile(silent, (frames, 1)), "turns": [turn],
            }  # fmt: skip
    if failed:
        print(f"{failed} clips left out: unreadable")
