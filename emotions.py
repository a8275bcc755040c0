"""Emotional speech: the folders of four corpora, speakers held out, and clips as codes.

Folders as their owners ship them: CREMA-D (Cao et al. 2014), RAVDESS (Livingstone and Russo 2018),
EmoV-DB (Adigwe et al. 2018) and ESD (Zhou et al. 2021); and every folder with a speech manifest
whose lines have an `emotion`, as `download_data.py --corpora emotion` makes them.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import audio
import corpora
from codec import Codec, silence_codes
from command import UserError, default_workers, run_parts
from data import SPLITS, Clip, load_splits, split_for
from dialogues import finish_dataset, load_code_dataset, write_arrow

# Corpora as their owners ship them, by their layout: the licence, and whether it lets one sell.
SHIPPED = {"crema_d": ("ODbL-1.0", True), "ravdess": ("CC-BY-NC-SA-4.0", False),
           "emov_db": ("EmoV-DB licence (research)", False),
           "esd": ("ESD research licence", False)}  # fmt: skip
MAX_SECONDS = 15.0  # of a clip; what is longer is cut there
PART_CLIPS = 500  # in a file of codes
EDGE_SECONDS = 0.2  # of silence on both sides of a clip
MICROPHONES, GAIN_DB = 4, (-9.0, 3.0)  # that each speaker has, and of each


def load_emotional(folders: Sequence[str | Path], commercial_only: bool = False,
                   log: str | Path | None = None) -> list[Clip]:  # fmt: skip
    """The clips with an emotion below the folders, by their manifests or by their files' names.
    Splits are disjoint in speakers. What is left out is counted on stdout, unreadable files on
    stderr and in a file `log`. Raises UserError on a missing folder, and where nothing is left."""
    found, left_out = {}, Counter()
    there = load_splits(folders, SPLITS, unreadable_log=log)
    # WAV first: CREMA-D ships each clip as MP3 too.
    for clip in sorted(itertools.chain(*there), key=lambda c: c.path.suffix.lower() != ".wav"):
        named, label, same = (clip, clip.emotion, clip.path) if clip.emotion else _by_name(clip)
        reason = "neither manifest nor name tells an emotion"
        if label:
            twice = same in found and "there already, by speaker and name"
            reason = corpora.no_emotion(label) or twice
        if reason:
            left_out[reason] += 1
        else:
            found[same] = replace(named, emotion=corpora.LABELS[label.lower()])
    for reason, count in left_out.most_common():
        print(f"{count} clips left out: {reason}")
    clips = [clip for clip in found.values() if clip.commercial_ok or not commercial_only]
    if not clips:
        where = ", ".join(map(str, folders))
        raise UserError(f"{where}: no clip with an emotion; run download_data.py --corpora emotion")
    return clips


def _by_name(clip: Clip) -> tuple[Clip, str | None, tuple]:
    """(the clip with what its name tells in a SHIPPED layout, its label, what its copies share)."""
    for layout, (licence, commercial_ok) in SHIPPED.items():
        if said := corpora.LAYOUTS[layout].said_by(clip.path.with_suffix("").as_posix()):
            speaker = said["speaker"]
            # ESD's first ten speakers are Chinese; all else is English.
            chinese = layout == "esd" and int(speaker[-4:]) <= 10
            clip = replace(clip, speaker=speaker, text=said["text"], split=split_for(speaker),
                           license=licence, language="other" if chinese else "english",
                           commercial_ok=commercial_ok)  # fmt: skip
            return clip, said["label"], (speaker, said["label"], clip.path.stem)
    return clip, None, ()


def hold_out_speakers(clips: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """(training, validation) clips without a speaker in both; test clips in neither. In a language
    without validation clips one speaker in six is held out, at least one, but never its only one. A
    clip without a speaker is one of its own. UserError: nobody to train on, or to validate on."""
    train, validation = ([c for c in clips if c.split == s] for s in ("train", "validation"))
    held_out = {clip.language for clip in validation}
    speakers: dict[str, set[str]] = {}
    for clip in train:
        speakers.setdefault(clip.language, set()).add(_speaker(clip))
    everyone = set().union(*speakers.values())
    if len(everyone) + bool(validation) < 2 or not train:
        raise UserError("emotional speech of two speakers is needed, one of them to validate")
    groups = [own for name, own in speakers.items() if name not in held_out and len(own) > 1]
    chosen = set()
    for own in groups or ([] if validation else [everyone]):
        chosen.update(random.Random(0).sample(sorted(own), max(1, len(own) // 6)))
    validation += [clip for clip in train if _speaker(clip) in chosen]
    return [clip for clip in train if _speaker(clip) not in chosen], validation


def _speaker(clip: Clip) -> str:
    return clip.speaker or str(clip.path)


def encode_clips(clips: Sequence[Clip], codec: Codec, folder: str | Path, batch: int = 16):
    """The code dataset of clips as the user's side of calls, made in `folder` unless it is there. A
    row is a clip between two short silences, its agent silent, its one turn of the user with the
    emotion; `source` is the speaker at one of MICROPHONES, whose gain is drawn: that somebody is
    loud says little by itself. Clips are encoded `batch` at once, on the codec's device; those that
    cannot be read are counted and left out. Files of PART_CLIPS each: a killed run goes on with the
    next. Returns the dataset. Raises UserError where no clip can be read."""
    folder = Path(folder)
    made = (folder / "state.json").exists()
    if not made:
        info = {"codec_fingerprint": codec.fingerprint, "frame_rate": codec.config.frame_rate,
                "codebook_sizes": list(codec.config.codebook_sizes[:8])}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(clips, key=lambda clip: clip.duration)  # little padding
        cut = [ordered[i : i + PART_CLIPS] for i in range(0, len(ordered), PART_CLIPS)]
        files = {folder / f"data-{i:05d}.arrow": part for i, part in enumerate(cut)}
        missing = [file for file in files if not file.exists()]
        work = lambda file: write_arrow(file, _rows(files[file], codec, batch))  # noqa: E731
        list(run_parts(work, missing, 0, len(files)))
        finish_dataset(folder, [file.name for file in files], info)
    dataset = load_code_dataset(folder, codec.fingerprint)[0]
    if not len(dataset):
        raise UserError(f"{folder}: no clip of it can be read; remove it when the clips are there")
    if not made and len(dataset) < len(clips):
        print(f"{len(clips) - len(dataset)} clips left out: unreadable")
    return dataset


def _rows(clips: Sequence[Clip], codec: Codec, batch: int) -> Iterator[dict]:
    device, hop = next(codec.parameters()).device, codec.config.hop
    silent = silence_codes(codec, device)[0, :, -1].cpu().numpy().astype(np.uint16)
    with ThreadPoolExecutor(default_workers()) as pool:
        for first in range(0, len(clips), batch):
            read = list(filter(None, pool.map(_heard, clips[first : first + batch])))
            if not read:
                continue
            sound = nn.utils.rnn.pad_sequence([samples for *_, samples in read], batch_first=True)
            with torch.inference_mode():
                codes = codec.encode(sound[:, None].to(device), 8).cpu().numpy().astype(np.uint16)
            for row, (clip, source, samples) in zip(codes, read, strict=True):
                frames = -(-len(samples) // hop)
                turn = {"who": "user", "text": "", "emotion": clip.emotion, "start": EDGE_SECONDS,
                        "end": len(samples) / audio.SAMPLE_RATE - EDGE_SECONDS}  # fmt: skip
                yield {"id": str(clip.path), "language": clip.language, "source": source,
                       "split": clip.split, "user_codes": row.T[:frames],
                       "agent_codes": np.tile(silent, (frames, 1)), "turns": [turn]}  # fmt: skip


def _heard(clip: Clip) -> tuple[Clip, str, Tensor] | None:
    """(clip, speaker at a microphone, samples `[T]` through it); None where it cannot be read."""
    try:
        samples = audio.read_audio(clip.path, duration=MAX_SECONDS)
    except audio.AudioError:
        return None
    source = f"{_speaker(clip)} at {random.Random(str(clip.path)).randrange(MICROPHONES)}"
    gain = 10 ** (random.Random(source).uniform(*GAIN_DB) / 20)
    edge = round(EDGE_SECONDS * audio.SAMPLE_RATE)
    return clip, source, torch.from_numpy(np.pad((samples * gain).clip(-1.0, 1.0), edge))
