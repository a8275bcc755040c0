"""A linear probe: what a codec's codebook 0 says of phones, on speakers the probe never heard.

Logistic regression from the frozen vector of one code to the phone of its frame (the linear probe
of Alain & Bengio 2017). A code cannot know the phone that begins with it, so the labels are also
moved by 0 to 8 frames: the delay with the fewest errors is how late the code speaks. The probe
sees no more than which code came with which phone how often, so that any number of frames costs
the same; `table` is the phone that came most often with the code, the best that one code can say
without vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from audio import FRAME_SECONDS, SAMPLE_RATE, AudioError, read_audio  # noqa: E402
from codec import Codec  # noqa: E402
from command import UserError  # noqa: E402
from data import Clip, frame_labels  # noqa: E402
from phones import PHONES, SILENCE  # noqa: E402

MAX_DELAY = 8  # frames


def probe_clips(
    fit: Sequence[Clip], scored: Sequence[Clip], where: str
) -> tuple[list[Clip], list[Clip]]:
    """The clips with phone labels to fit and to score on, no speaker in both.

    A clip whose speaker is unknown counts as a speaker of its own. Raises UserError where either
    is empty.
    """
    scored = [clip for clip in scored if clip.phones]
    heard = {clip.speaker or clip.path for clip in scored}
    fit = [clip for clip in fit if clip.phones and (clip.speaker or clip.path) not in heard]
    if not scored:
        raise UserError(f"{where}: no clip with phone labels; choose another --split")
    if not fit:
        raise UserError(f"{where}: no labelled clip of other speakers in split train")
    return fit, scored


@torch.no_grad()
def codes_and_phones(
    codec: Codec, clips: Sequence[Clip], max_seconds: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each readable clip codes of codebook 0 and phone ids (-100: unknown), both `[F]`.

    How many could not be read is the number of `clips` less that of the rows.
    """
    device = next(codec.parameters()).device
    ids = {phone: i for i, phone in enumerate(PHONES)}
    rows = []
    for clip in clips:
        try:
            audio = read_audio(clip.path, 0.0, max_seconds)
        except AudioError:
            continue
        if not len(audio):
            continue
        codes = (
            codec.forward_semantic(torch.from_numpy(audio).to(device)[None, None])
            .codes[0, 0]
            .cpu()
            .numpy()
        )
        labels = frame_labels(clip.phones, ids, len(codes), end=len(audio) / SAMPLE_RATE)
        rows.append((codes, labels))
    return rows


def count_pairs(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], delay: int, num_codes: int, num_phones: int
) -> np.ndarray:
    """How often code `c` came `delay` frames after phone `p`: `[num_codes, num_phones]`.

    The last MAX_DELAY labels of a clip are left out, so that every delay counts the same ones.
    """
    counts = np.zeros((num_codes, num_phones))
    for codes, labels in rows:
        length = max(0, len(codes) - MAX_DELAY)
        labels, codes = labels[:length], codes[delay : delay + length]
        known = labels >= 0
        np.add.at(counts, (codes[known], labels[known]), 1)
    return counts


def fit_logistic(vectors: Tensor, counts: np.ndarray, decay: float = 1e-5) -> np.ndarray:
    """The likeliest phone of each code, `[num_codes]`, by multinomial logistic regression.

    Args:
        vectors: `[num_codes, d]` of the codes, standardised inside over the frames counted.
        counts: `[num_codes, num_phones]` of the frames to fit.
        decay: weight of the squared norm, which keeps separable data from diverging.
    """
    share = torch.from_numpy(counts / counts.sum())
    frames = share.sum(1, keepdim=True)
    x = vectors.double().cpu()
    mean = (frames * x).sum(0)
    x = (x - mean) / ((frames * (x - mean).square()).sum(0) + 1e-8).sqrt()
    weight = torch.zeros(x.shape[1], share.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(share.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(share * F.log_softmax(x @ weight + bias, -1)).sum()
        loss = loss + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x @ weight + bias).argmax(-1).numpy()


def error(counts: np.ndarray, guess: np.ndarray, but: int | None = None) -> float:
    """The share of frames counted whose phone is not its code's guess; phone `but` left out."""
    counts = counts.copy()
    if but is not None:
        counts[:, but] = 0
    right = counts[np.arange(len(counts)), guess].sum()
    return 1 - float(right / max(1.0, counts.sum()))


def probe(
    fit: Sequence[tuple[np.ndarray, np.ndarray]],
    scored: Sequence[tuple[np.ndarray, np.ndarray]],
    vectors: Tensor,
    phones: Sequence[str] = PHONES,
) -> dict:
    """Errors of codes and phones as `codes_and_phones` gives them; `vectors` `[num_codes, d]`.

    The delay is chosen on the fitted speakers, everything else is measured on the others:
    `errors` at each delay, and at the chosen one `error`, `speech_error` (without the frames of
    silence) and `table_error`; `chance_error` always guesses the commonest phone. Shares of
    frames: silence as labelled and as guessed, and the most frequent code, which is what a
    "blank" would be.
    """
    size = len(vectors), len(phones)
    silence = phones.index(SILENCE)
    seen = [count_pairs(fit, delay, *size) for delay in range(MAX_DELAY + 1)]
    new = [count_pairs(scored, delay, *size) for delay in range(MAX_DELAY + 1)]
    if not (seen[0].sum() and new[0].sum()):
        raise UserError(f"every labelled clip is shorter than {MAX_DELAY + 1} frames")
    guesses = [fit_logistic(vectors, counts) for counts in seen]
    best = int(np.argmin([error(c, g) for c, g in zip(seen, guesses, strict=True)]))
    counts, guess = new[best], guesses[best]
    frames = counts.sum()
    commonest = int(seen[best].sum(0).argmax())
    # A code that the fitted speakers never gave stands for the commonest phone.
    table = np.where(seen[best].sum(1) > 0, seen[best].argmax(1), commonest)
    return {
        "frames_fitted": int(seen[best].sum()),
        "frames_scored": int(frames),
        "errors": [round(error(c, g), 4) for c, g in zip(new, guesses, strict=True)],
        "delay_frames": best,
        "delay_ms": round(1000 * best * FRAME_SECONDS),
        "error": round(error(counts, guess), 4),
        "speech_error": round(error(counts, guess, silence), 4),
        "table_error": round(error(counts, table), 4),
        "chance_error": round(error(counts, np.full(len(guess), commonest)), 4),
        "silence_labelled": round(float(counts[:, silence].sum() / frames), 4),
        "silence_guessed": round(float(counts[guess == silence].sum() / frames), 4),
        "commonest_code": round(float(counts.sum(1).max() / frames), 4),
    }


def probe_codec(
    codec: Codec, fit: Sequence[Clip], scored: Sequence[Clip], max_seconds: float
) -> dict:
    """`probe` of a codec's codebook 0 on clips with phone labels."""
    rows = [codes_and_phones(codec, clips, max_seconds) for clips in (fit, scored)]
    found = probe(*rows, codec.quantizer.codebooks[0].embedding)
    return {**found, "unreadable_clips": len(fit) + len(scored) - sum(map(len, rows))}


def probe_table(results: dict[str, dict], fitted: str, scored: str) -> str:
    """A line a codec: errors in per cent of frames, the delay, and shares of frames."""
    first = next(iter(results.values()))
    lines = [
        f"linear probe of codebook 0: % phone errors on {first['frames_scored']} frames of "
        f"{scored},",
        f"fitted on {first['frames_fitted']} of {fitted}; the commonest phone alone: "
        f"{100 * first['chance_error']:.1f}",
        f"{'':<26}{'delay 0':>8}{'best':>7}{'at ms':>6}{'speech':>7}{'table':>7}"
        f"{'silence':>11}{'top':>5}",
    ]
    for name, row in results.items():
        percents = [100 * row[key] for key in ("error", "speech_error", "table_error")]
        best, speech, table = percents
        silences = f"{row['silence_guessed']:.0%}/{row['silence_labelled']:.0%}"
        lines.append(
            f"{name[-25:]:<26}{100 * row['errors'][0]:>8.1f}{best:>7.1f}{row['delay_ms']:>6}"
            f"{speech:>7.1f}{table:>7.1f}{silences:>11}{row['commonest_code']:>5.0%}"
        )
    if unreadable := first.get("unreadable_clips"):
        lines.append(f"{unreadable} labelled clips could not be read, and are not among them")
    return "\n".join(lines)
