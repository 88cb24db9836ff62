"""Do people leave points where the model put them because they are right, or because they are there?

A small share of tasks (UNAIDED_SHARE), chosen by a hash, is served without the prediction that was made for it. How far people end
from the prediction that they did not see says how far they would end from any; how much nearer they end to one that they
see is the anchoring. The two kinds of images differ by chance only.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.effort import Drawn
from backend.matching import distances, pair_up, size_of
from label_config.annotations import LabelledObject

SAMPLES = 2000  # of the bootstrap
ENOUGH = 5  # groups of a kind below which no difference is told


def is_unaided(project: str, task: int, share: float) -> bool:
    """Whether a task belongs to the share that is served without predictions: the same for ever, and for a larger share, too."""
    number = int.from_bytes(hashlib.sha256(f"unaided/{project}/{task}".encode()).digest()[:8], "big")
    return number / 2**64 < share


@dataclass(frozen=True, eq=False)
class Look:
    """How far an annotation lies from the prediction that was made before. gaps: of its points, in shares of the object's size."""

    task: int
    withheld: bool
    gaps: np.ndarray
    seconds: float | None

    @classmethod
    def of(
        cls,
        task: int,
        withheld: bool,
        objects: Sequence[tuple[Sequence[Drawn], Sequence[LabelledObject], tuple[int, int]]],
        seconds: float | None,
    ) -> Look | None:
        """None for an annotation that has no point in common with the prediction."""
        gaps: list[float] = []
        for predicted, labelled, size in objects:
            shown, truth = [d.visible() for d in predicted], [o.keypoints for o in labelled]
            for i, j in pair_up(truth, shown, size):
                if i is not None and j is not None:
                    apart = distances(truth[i], shown[j], size_of(truth[i], size))
                    gaps += [float(g) for g in apart[np.isfinite(apart)]]
        return cls(task, withheld, np.array(gaps), seconds) if gaps else None


def anchoring(looks: Sequence[Look], tolerance: float, groups: Mapping[int, str]) -> dict[str, Any]:
    """Both kinds of images, and what they differ in, with 95 % intervals (bootstrap over groups: images of one video or subject are
    no independent samples). groups: task → its group (`Task.group`).

    `difference` is withheld minus shown: positive when people stay nearer to a prediction that they see. `near` is the share of
    points within the tolerance. None where one kind has fewer than ENOUGH groups.
    """
    shown, withheld = [x for x in looks if not x.withheld], [x for x in looks if x.withheld]
    difference = None
    if min(len({groups[x.task] for x in kind}) for kind in (shown, withheld)) >= ENOUGH:
        difference = {
            "distance": _difference(withheld, shown, lambda x: float(x.gaps.mean()), groups),
            "near": _difference(withheld, shown, lambda x: float((x.gaps <= tolerance).mean()), groups),
        }
    return {
        "tolerance": tolerance,
        "shown": _figures(shown, tolerance),
        "withheld": _figures(withheld, tolerance),
        "difference": difference,
        "said": _said(difference, len(withheld)),
    }


def _figures(looks: Sequence[Look], tolerance: float) -> dict[str, Any]:
    seconds = [x.seconds for x in looks if x.seconds is not None and x.seconds > 0]
    gaps = np.concatenate([x.gaps for x in looks]) if looks else np.zeros(0)
    return {
        "images": len(looks),
        "points": len(gaps),
        "distance": round(float(np.mean([x.gaps.mean() for x in looks])), 4) if looks else None,
        "median": round(float(np.median(gaps)), 4) if len(gaps) else None,
        "near": round(float(np.mean([(x.gaps <= tolerance).mean() for x in looks])), 4) if looks else None,
        "seconds_per_image": round(statistics.median(seconds), 2) if seconds else None,
    }


def _difference(one: Sequence[Look], other: Sequence[Look], figure: Callable[[Look], float], groups: Mapping[int, str]) -> dict[str, float]:
    """Mean of a figure over `one` minus that over `other`, with its 95 % interval."""
    rng = np.random.default_rng(0)

    def means(looks: Sequence[Look]) -> np.ndarray:
        """(1 + SAMPLES,) over the images of all groups, then over those of as many groups, drawn anew each time."""
        group = np.unique([groups[x.task] for x in looks], return_inverse=True)[1]
        total, images = np.bincount(group, [figure(x) for x in looks]), np.bincount(group)
        drawn = np.vstack([np.arange(len(images)), rng.integers(0, len(images), (SAMPLES, len(images)))])
        found: np.ndarray = total[drawn].sum(1) / images[drawn].sum(1)
        return found

    difference = means(one) - means(other)
    low, high = np.quantile(difference[1:], [0.025, 0.975])
    return {key: round(float(value), 4) for key, value in {"mean": difference[0], "low": low, "high": high}.items()}


def _said(difference: dict[str, dict[str, float]] | None, withheld: int) -> str:
    if difference is None:
        return (
            f"{withheld} images were labelled without a prediction to see; {ENOUGH} of each kind, of different videos or subjects, "
            "are needed to tell a difference."
        )
    gap = difference["distance"]
    if gap["low"] > 0:
        return (
            f"People end {gap['mean']:.1%} of the object's size nearer to a prediction that they see than to one that they do not "
            f"({gap['low']:.1%} to {gap['high']:.1%}): they are anchored by so much."
        )
    return (
        f"No anchoring is seen: the difference is {gap['mean']:.1%} of the object's size "
        f"({gap['low']:.1%} to {gap['high']:.1%})."
    )
