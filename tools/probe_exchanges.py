"""How well a question is told from a codec's codes, in voices never heard: minutes, and no LM.

    python tools/probe_exchanges.py --codecs checkpoints/tiny/codec runs/codec
    python tools/probe_exchanges.py --teacher whisper   # and the ceiling: k-means of its features

A small classifier learns which exchange of the dialogue scripts an utterance opens, from training
wordings in training voices, and is asked held-out wordings in the voices of `--split` (`--engines`:
of these alone). For each codec it reads codebook 0 alone and the first eight. Shares right by
language; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import speech  # noqa: E402
import teachers  # noqa: E402
import training  # noqa: E402
from codec import Codec  # noqa: E402
from command import ArgumentParser, UserError, number, run, whole  # noqa: E402
from data import SPLITS  # noqa: E402
from dialogues import SPOKEN, choose_exchanges, load_scripts  # noqa: E402
from quantizer import Codebook, half_norms, k_means  # noqa: E402
from takes import draw_voice, make_takes, user_voices  # noqa: E402

TOY = "greeting,name,weather,capitals,colours,counting,small_talk,goodbye"
CLUSTERS, CLUSTER_ROUNDS, CLUSTER_FRAMES = 1024, 20, 200_000


class Classifier(nn.Module):
    """Codes `[B, F, K]` (-1: none) → logits `[B, n]`: embeddings, two strided convolutions, a GRU
    both ways (Cho et al. 2014), the largest of its outputs."""

    def __init__(self, sizes: Sequence[int], classes: int, width: int = 128) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in sizes)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 5, 2, 2) for _ in range(2))
        self.memory = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, codes: Tensor) -> Tensor:
        x = sum(table(codes[..., k] + 1) for k, table in enumerate(self.tables)).transpose(1, 2)
        for layer in self.convolutions:
            x = F.gelu(layer(x))
        out, _ = self.memory(F.dropout(x.transpose(1, 2), 0.2, self.training))
        return self.head(out.amax(1))


def utterances(exchanges, languages, split: str, count: int, args, rng) -> list[tuple]:
    """(audio `[T]` at 24 kHz, exchange, language) of `count` questions a language, each exchange
    as often."""
    requests, labels = [], []
    for language in languages:
        voices = user_voices(language, split, args.engines if split != "train" else None)
        chosen = choose_exchanges(exchanges, language, split, args.intents.split(","), True)
        for i in range(count):
            one = chosen[i % len(chosen)]
            text = one.lines[0].texts[int(rng.integers(len(one.lines[0].texts)))]
            speed, seed = float(rng.uniform(0.9, 1.1)), int(rng.integers(2**31))
            said = text, language, draw_voice(voices, rng), speed, one.lines[0].emotion, seed
            requests.append(speech.Request(*said))
            labels.append((one.id.removesuffix("-h"), language))
    said = zip(make_takes(requests), labels, strict=True)
    found = [(take.audio, *label) for take, label in said if not isinstance(take, UserError)]
    if not found:
        raise UserError(f"no question of split {split} could be spoken")
    return found


def codec_codes(path: Path, device) -> Callable[[np.ndarray], Tensor]:
    """Audio `[T]` → codes `[F, 8]` of a codec."""
    codec = Codec.from_checkpoint(path, device)

    def encode(audio: np.ndarray) -> Tensor:
        with torch.inference_mode():
            padded = torch.from_numpy(audio)[None, None].to(device)
            return codec.encode(padded, num_codebooks=8)[0].T.cpu()

    return encode


def teacher_codes(name: str, audios: Sequence, known: int, device, seed: int) -> list[Tensor]:
    """One code a frame `[F, 1]` of each audio: k-means of the teacher's target over the first
    `known`, those of training."""
    teacher = teachers.load_teacher(name, device)
    with torch.inference_mode():
        found = [teacher.target(teacher(torch.from_numpy(a)[None, None].to(device)))[0]
                 for a in tqdm(audios, "teacher", disable=None)]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    frames = torch.cat(found[:known])
    frames = frames[torch.randperm(len(frames), generator=generator)[:CLUSTER_FRAMES].to(device)]
    centres = k_means(frames, frames[:CLUSTERS], CLUSTER_ROUNDS)
    book = Codebook(centres, half_norms(centres))
    return [book.nearest(each)[:, None].cpu() for each in found]


def classify(codes: Sequence[Tensor], labels: Tensor, tested: int, args) -> tuple[float, Tensor]:
    """Training loss at the end, and which of the last `tested` were told right."""
    torch.manual_seed(args.seed)
    sizes = [int(max(c[:, k].max() for c in codes)) + 1 for k in range(codes[0].shape[1])]
    model = Classifier(sizes, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    known, losses = len(codes) - tested, []

    def padded(places) -> Tensor:
        return nn.utils.rnn.pad_sequence([codes[i] for i in places], True, -1)

    for step in tqdm(range(args.steps), "classifier", disable=None):
        places = torch.randint(known, (args.batch_size,))
        batch = padded(places.tolist())
        lost = torch.rand(batch.shape[:2]) < args.drop  # of the frames
        loss = F.cross_entropy(model(batch.masked_fill(lost[..., None], -1)), labels[places])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step + 1 == args.steps // 2:
            optimizer.param_groups[0]["lr"] /= 3
    model.eval()
    with torch.inference_mode():
        asked = torch.arange(known, len(codes)).split(args.batch_size)  # filled up as in training
        found = [model(padded(places.tolist())).argmax(-1) for places in asked]
    return float(np.mean(losses[-50:])), torch.cat(found) == labels[known:]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--codecs", nargs="*", type=Path, default=[ROOT / "checkpoints" / "tiny" / "codec"],
        help="checkpoint folders [the tiny one]")  # fmt: skip
    add("--teacher", default="none", help="whisper, wavlm, or a folder: its k-means, the ceiling")
    add("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN))
    add("--intents", default=TOY, help="whose first exchange is asked, comma-separated")
    add("--split", choices=SPLITS[1:], default="validation", help="whose voices are asked")
    add("--engines", nargs="+", help="whose voices are asked, of the split [all]")
    add("--train", type=whole(8), default=1600, help="utterances a language")
    add("--test", type=whole(1), default=64, help="utterances a language")
    add("--steps", type=whole(1), default=500)
    add("--batch_size", type=whole(1), default=32)
    add("--lr", type=number(above=0), default=2e-3)
    add("--drop", type=number(0, 1), default=0.1, help="share of frames masked in training")
    add("--scripts", type=Path, default=ROOT / "conversations")
    add("--seed", type=whole(0, 2**63 - 1), default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = training.setup_distributed(args.device).device
    encoders = {str(path): codec_codes(path, device) for path in dict.fromkeys(args.codecs)}
    exchanges, rng = load_scripts(args.scripts), np.random.default_rng(args.seed)
    known = utterances(exchanges, args.languages, "train", args.train, args, rng)
    asked = utterances(exchanges, args.languages, args.split, args.test, args, rng)
    spoken = [*known, *asked]
    names = {name: i for i, name in enumerate(sorted({one[1] for one in spoken}))}
    labels = torch.tensor([names[one[1]] for one in spoken])
    audios, languages = [one[0] for one in spoken], np.array([one[2] for one in asked])
    read: dict[str, list[Tensor]] = {}
    for path, encode in encoders.items():
        codes = [encode(audio) for audio in tqdm(audios, path, disable=None)]
        read |= {f"{path}, codebook 0": [each[:, :1] for each in codes], f"{path}, 8": codes}
    if args.teacher != "none":
        name = f"{args.teacher}, k-means"
        read[name] = teacher_codes(args.teacher, audios, len(known), device, args.seed)
    results, width = {}, max(map(len, read))
    print(f"{len(known)} utterances learnt, {len(asked)} asked, {len(names)} exchanges")
    print(f"{'':<{width}}" + "".join(f"{one:>9}" for one in [*args.languages, "loss"]))
    for name, codes in read.items():
        loss, right = classify(codes, labels, len(asked), args)
        shares = {one: float(right.numpy()[languages == one].mean()) for one in args.languages}
        results[name] = {**shares, "training_loss": round(loss, 4)}
        shown = "".join(f"{value:>9.1%}" for value in shares.values())
        print(f"{name:<{width}}{shown}{loss:>9.2f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    run(main, resumes=False)
