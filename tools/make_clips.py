"""Single sentences for the codec, in the toy's voices: scripts + speech engines → clips.

    python tools/make_clips.py --data_dir data --hours 1.8
    python tools/make_clips.py --data_dir data/emotion --hours 0.8 --any_emotion
    python tools/make_clips.py --data_dir data/agent --hours 1.3 --role agent

Makes data/<language>/synthetic, a manifest and FLAC files, of every language. Of the agent alone a
twentieth of the sentences are kept apart for validation, and as many for test. The same command
makes the same bytes, in any number of processes, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import make_conversations as mc  # noqa: E402
import speech  # noqa: E402
from audio import SAMPLE_RATE, write_audio  # noqa: E402
from command import (  # noqa: E402
    ArgumentParser,
    UserError,
    default_workers,
    number,
    only_one,
    run,
    run_parts,
    whole,
    writable_folder,
)
from data import EMOTIONS, MANIFEST, Clip, read_manifest, split_for, write_manifest  # noqa: E402
from dialogues import SPOKEN, choose_exchanges  # noqa: E402
from takes import draw_voice, speak  # noqa: E402

PART_SECONDS = 120.0
AGENT_SHARE = 1 / 3  # of the seconds of clips
VALIDATION_SHARE = 0.06  # of the user clips
LICENSES = {
    "hibari": "Apache-2.0 (hibari-tts)",
    "joe": "CC0 (Piper's en_US-joe)",
    "flite": "BSD-like (CMU Flite)",
    "festival": "free (Festival voices of Debian; NSK, Czech, Italian: GPL; Finnish: LGPL-2+)",
    "espeak": "output of espeak-ng (GPL-3.0+)",
}


def make_part(args: argparse.Namespace, part: mc.ScriptedPart) -> tuple[float, int, list[str]]:
    """Makes and writes one folder of clips with its own manifest.

    Returns seconds and number of clips, and what was left out.
    """
    dropped: list[str] = []
    folder = Path(args.data_dir) / part.language / "synthetic" / f"{part.index:05d}"
    building = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    rng, clips, seconds = mc.part_rng(args, part, 1), [], 0.0
    draw = _clip_drawer(args, part.language)
    share = 1.0 if args.role == "agent" else 0.0 if args.any_emotion else AGENT_SHARE
    spoken = {"agent": 0.0, "user": 0.0}
    while seconds < part.seconds:
        # Whoever is behind its share speaks next, a few sentences at a time.
        agent = spoken["agent"] < share * (sum(spoken.values()) + 1e-9)
        requests = [draw(agent, rng) for _ in range(6 if agent else 12)]
        for request, said in zip(requests, speak(requests), strict=True):
            if isinstance(said, UserError):
                dropped.append(str(said))
                continue
            length = len(said.audio) / SAMPLE_RATE
            if length < 0.3:
                continue
            path = building / f"{part.index:05d}-{len(clips):03d}.flac"
            write_audio(path, said.audio)
            clip = _clip(path, length, request, said)
            clips.append(replace(clip, split=split_for(request.text)) if share == 1.0 else clip)
            spoken[request.voice.role] += length
            seconds += length
        if not clips and len(dropped) > 200:
            raise UserError(f"no {part.language} voice works: {dropped[-1]}")
    write_manifest(building / MANIFEST, clips)
    try:
        os.replace(building, folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise
        shutil.rmtree(building)  # the same command, run twice at once, made the same bytes first
    return seconds, len(clips), dropped


def _clip(path: Path, seconds: float, request: speech.Request, said: speech.Utterance) -> Clip:
    phones = None
    if said.phones is not None:
        phones = [[p, round(float(s), 4), round(float(e), 4)] for p, s, e in said.phones]
    voice = request.voice
    return Clip(
        path=path,
        duration=seconds,
        sample_rate=SAMPLE_RATE,
        language=request.language,
        speaker=voice.id,
        text=request.text,
        emotion=request.emotion,
        license=LICENSES.get(voice.engine, voice.engine),
        commercial_ok=True,
        split="train" if voice.role == "agent" else voice.split,
        phones=phones,
    )


def _clip_drawer(args: argparse.Namespace, language: str) -> Callable:
    """A function that draws a request: the agent's replies and wordings, or a user's wordings, in
    the emotion that the script gives them or in any."""
    exchanges = choose_exchanges(mc.scripts(args.scripts), language, "train")
    everything = [line for exchange in exchanges for line in exchange.lines]
    lines = {who: [n for n in everything if n.who == who] for who in ("user", "agent")}
    agent = users = others = None
    if not args.any_emotion:
        agent = speech.voices(language, "agent", engines=args.engines)[0]
    if args.role != "agent":
        users = speech.voices(language, "user", "train", args.engines)
        with contextlib.suppress(UserError):
            others = speech.voices(language, "user", "validation", args.engines)

    def draw(is_agent: bool, rng: np.random.Generator) -> speech.Request:
        # Half of the agent's clips are other sentences in its voice, for more of its phones.
        who = "agent" if is_agent and rng.random() < 0.5 else "user"
        line = lines[who][int(rng.integers(len(lines[who])))]
        text = line.texts[int(rng.integers(len(line.texts)))]
        seed, held_out = int(rng.integers(2**31)), rng.random() < VALIDATION_SHARE
        if is_agent:
            emotion = line.emotion if who == "agent" else str(rng.choice(EMOTIONS))
            return speech.Request(text, language, agent, 1.0, emotion, seed)
        voice = draw_voice(others if others and held_out else users, rng)
        speed = float(rng.uniform(*mc.SPEED))
        emotion = str(rng.choice(EMOTIONS)) if args.any_emotion else line.emotion
        return speech.Request(text, language, voice, speed, emotion, seed)

    return draw


def make_clips(args: argparse.Namespace) -> None:
    root, parts, missing = Path(args.data_dir), [], []
    size = min(PART_SECONDS, args.hours * 3600)
    for language in args.languages:
        folder = root / language / "synthetic"
        settings = {"seed": args.seed, "part_seconds": size, "role": args.role}
        settings |= {"any_emotion": args.any_emotion or None, "engines": args.engines}
        mc.claim(folder, "settings.json", settings)
        for index in range(math.ceil(args.hours * 3600 / size - 1e-9)):
            parts.append(mc.ScriptedPart(language, index, seconds=size))
            if not (folder / f"{index:05d}").is_dir():
                missing.append(parts[-1])
    started, audio, count, dropped = time.monotonic(), 0.0, 0, []
    work = functools.partial(make_part, args)
    for seconds, clips, faults in run_parts(work, missing, args.num_workers, len(parts)):
        audio, count, dropped = audio + seconds, count + clips, dropped + faults
    for language in args.languages:
        folder = root / language / "synthetic"
        mine = [p for p in parts if p.language == language]
        clips = [c for p in mine for c in read_manifest(folder / f"{p.index:05d}" / MANIFEST)]
        write_manifest(folder / MANIFEST, clips)
        hours, speakers = sum(c.duration for c in clips) / 3600, len({c.speaker for c in clips})
        print(f"{folder}: {len(clips)} clips, {hours:.2f} h, {speakers} voices")
    if dropped:
        log = "".join(f"{reason}\n" for reason in dropped)
        (root / "dropped.txt").write_text(log, encoding="utf-8", errors="backslashreplace")
        print(f"{len(dropped)} left out, see {root / 'dropped.txt'}; first: {dropped[0]}")
    seconds = max(time.monotonic() - started, 1e-3)
    speed = f"{audio / seconds:.0f}x real time"
    print(f"{count} made, {audio / 3600:.2f} h in {seconds:.0f} s ({speed})")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_dir", default="data", help="the clips go to DATA_DIR/<language>/synthetic")
    add("--hours", type=number(above=0, high=1e5), default=1.0, help="of clips, for each language")
    add("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN))
    add("--scripts", default=str(Path(mc.__file__).resolve().parent / "conversations"))
    add("--role", choices=("agent",), help="the agent's sentences alone, without users'")
    add("--engines", nargs="+", help="as make_conversations.py has, the agent's first [all]")
    add("--any_emotion", action="store_true", help="users alone, in an emotion drawn at random")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--num_workers", type=whole(0, 512), default=default_workers(), help="processes; 0: none")
    args = parser.parse_args(arguments)
    args.languages, args.split = list(dict.fromkeys(args.languages)), "train"
    if args.any_emotion and args.role:
        raise UserError("--any_emotion is of users alone; leave --role agent out")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with contextlib.ExitStack() as held:
        for language in args.languages:
            folder = Path(args.data_dir) / language / "synthetic"
            held.enter_context(only_one(writable_folder(folder, "--data_dir")))
        make_clips(args)


if __name__ == "__main__":
    run(main)
