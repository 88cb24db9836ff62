"""What a person has to do to a prediction until it is the truth: the arithmetic of the replay. Pure functions.

A point must be *moved* if it lies farther than the tolerance from its true place, in units of max(w, h) of the object's box. It
is *missing* if it was not drawn, *wrong* if it was drawn where the object has no such point. Each costs one action, and so does
every point of an image that is labelled by hand. So labelling everything by hand is an effort of 1.0, and a share may exceed
1.0: a prediction can cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kptllm_core.geometry import box_of_points
from kptllm_core.keypoints import KeypointSet
from kptllm_core.metrics import normalised_distance


@dataclass(frozen=True)
class Corrections:
    """Counts of points, on one image or on many."""

    points: int = 0  # that the truth has
    moved: int = 0
    missing: int = 0
    wrong: int = 0

    def __add__(self, other: Corrections) -> Corrections:
        return Corrections(
            self.points + other.points,
            self.moved + other.moved,
            self.missing + other.missing,
            self.wrong + other.wrong,
        )

    @property
    def actions(self) -> int:
        return self.moved + self.missing + self.wrong

    @property
    def share(self) -> float | None:
        """Actions per point of the truth; None without points."""
        return self.actions / self.points if self.points else None

    def to_json(self) -> dict[str, Any]:
        """With `moved_share`, under the names of the report."""
        return {"moved_share": None if self.share is None else round(self.share, 4), **asdict(self)}


def by_hand(truth: KeypointSet) -> Corrections:
    """Every point is placed by a person."""
    return corrections(truth, None, 0.0)


def corrections(truth: KeypointSet, predicted: KeypointSet | None, tolerance: float) -> Corrections:
    """truth, predicted: one object, pixels, the same names in the same order; None: nothing was drawn."""
    there = truth.placed
    if predicted is None:
        return Corrections(int(there.sum()), missing=int(there.sum()))
    box = truth.box if truth.box is not None else box_of_points(truth.xy[there])
    far = normalised_distance(predicted.xy, truth.xy, box) > tolerance
    drawn = predicted.placed
    return Corrections(
        int(there.sum()),
        moved=int((there & drawn & far).sum()),
        missing=int((there & ~drawn).sum()),
        wrong=int((~there & drawn).sum()),
    )


def total(counts: Iterable[Corrections]) -> Corrections:
    return sum(counts, Corrections())


def running_effort(counts: Sequence[Corrections]) -> list[float]:
    """(n,) after each image: the actions so far, per point so far. The last one is the effort of it all."""
    actions, points = (np.cumsum([getattr(c, name) for c in counts]) for name in ("actions", "points"))
    return [float(a) / max(int(p), 1) for a, p in zip(actions, points, strict=True)]


def stretches(examples: int, rounds: Sequence[int], images: int) -> list[tuple[int, int]]:
    """(first, end) of the images that are predicted alike: after the examples, and after each round; the last ends with the set."""
    starts = [examples, *rounds]
    return list(zip(starts, [*rounds, images], strict=True))
