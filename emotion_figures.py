"""How well emotions are told: accuracies, confusion and its picture, calibration, and the goals."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

STABLE_SECONDS = 1.5  # of speech, after which a name should stand
NOTE = """\
These are rendered styles, not people: speech engines say each emotion by fixed
changes of pitch, range, rate, level and tilt. How well people's are told, the
figures do not say."""


class Told(NamedTuple):
    """The emotion of an utterance as asked for, and as told at its end with a posterior of `sure`.
    `seconds` of speech until the name last changed, None where no name was said. `likely`: the
    likeliest of the styles that are asked for."""

    asked: str
    told: str
    speaker: str
    sure: float
    seconds: float | None
    likely: str


def share(values: Sequence[bool]) -> float | None:
    """The mean in four digits, None of nothing."""
    return round(float(np.mean(values)), 4) if len(values) else None


def accuracies(asked: Sequence[str], told: Sequence[str]) -> dict:
    """Unweighted: the mean of the emotions' own accuracies; weighted: over all utterances."""
    hits = np.array([a == t for a, t in zip(asked, told, strict=True)])
    own = [hits[[a == emotion for a in asked]].mean() for emotion in set(asked)]
    return {"unweighted_accuracy": share(own), "weighted_accuracy": share(hits)}


def detection(found: Sequence[Told]) -> dict:
    """Accuracies, also by speaker; the share that got a name, and when it was stable; the expected
    calibration error of the posterior in ten bins (Guo et al. 2017); confusion, asked → told."""
    hits, sure = np.array([(t.asked == t.told, t.sure) for t in found]).T
    bins = np.minimum((sure * 10).astype(int), 9)
    errors = np.abs(np.bincount(bins, hits - sure))
    seconds = [t.seconds for t in found if t.seconds is not None]
    asked = dict.fromkeys(t.asked for t in found)
    confusion = {a: dict(Counter(t.told for t in found if t.asked == a)) for a in asked}
    of_asked = accuracies([t.asked for t in found], [t.likely for t in found])

    def of(speaker: str | None = None) -> dict:
        mine = [(t.asked, t.told) for t in found if speaker in (None, t.speaker)]
        return {"utterances": len(mine), **accuracies(*zip(*mine, strict=True))}

    p50, p95 = np.percentile(seconds, (50, 95)).round(2).tolist() if seconds else (None, None)
    return {**of(), "unweighted_accuracy_of_asked": of_asked["unweighted_accuracy"],
        "sure": round(len(seconds) / len(found), 4), "stable_p50_s": p50, "stable_p95_s": p95,
        "calibration_error": round(float(errors.sum()) / len(found), 4),
        "speakers": {speaker: of(speaker) for speaker in sorted({t.speaker for t in found})},
        "confusion": confusion}  # fmt: skip


def draw(path: Path, detections: dict[str, dict], emotions: Sequence[str]) -> None:
    """The confusions of each language's `detection` as a panel: counts, and shares as shades."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.2 * len(detections), 3.8), layout="tight")
    for place, (language, found) in enumerate(detections.items(), start=1):
        axes = figure.add_subplot(1, len(detections), place)
        asked = [emotion for emotion in emotions if emotion in found["confusion"]]
        counts = np.array([[found["confusion"][a].get(e, 0) for e in emotions] for a in asked])
        axes.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            dark = count > counts[row].sum() / 2
            axes.text(column, row, count, ha="center", va="center", color="w" if dark else "k")
        axes.set_xticks(range(len(emotions)), emotions, rotation=45, ha="right")
        axes.set_yticks(range(len(asked)), asked)
        axes.set(xlabel="told", ylabel="rendered")
        axes.set_title(f"{language}: unweighted {found['unweighted_accuracy']:.2f}")
    figure.savefig(path, dpi=120)


def compare(before: dict, after: dict) -> dict:
    """`answered`, `right` and `response_p95_ms` of two models and what changed."""
    change = {key: None if None in (old, after[key]) else round(after[key] - old, 4)
              for key, old in before.items()}  # fmt: skip
    return {"before": before, "after": after, "change": change}


def goals(found: dict) -> dict[str, bool | None]:
    """Of a language's figures: the goals met or not, None where nothing was measured. A model may
    lose two points and 20 ms on the one before it; what it gains is no fault."""
    told, pairs, change = found["detection"], found["empathy"] or {}, found["effect"].get("change")
    at_least = {"detection": (told["unweighted_accuracy_of_asked"], 0.75),
                "different": (pairs.get("different"), 0.7),
                "control": (found["control"]["accuracy"], 0.7)}  # fmt: skip
    at_most = {f"stable_{p}": (told[f"stable_{p}_s"], STABLE_SECONDS) for p in ("p50", "p95")}
    if change:
        at_least |= {f"{key}_kept": (change[key], -0.02) for key in ("answered", "right")}
        at_most["response_kept"] = (change["response_p95_ms"], 20.0)
    met = {key: None if value is None else value >= goal for key, (value, goal) in at_least.items()}
    return met | {key: None if x is None else x <= most for key, (x, most) in at_most.items()}
