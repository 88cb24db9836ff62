"""Which object here is which object there, and how large is it: what comparing two people, or a person and a model, needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kptllm_core.geometry import box_of_points
from kptllm_core.keypoints import KeypointSet

PAD = 0.1  # of the hull of an object's points, where it has no box; as when versions are judged
ALONE = 0.1  # of the image's longer side: the size of an object that is a single point without a box
APART = 0.5  # of an object's size: objects whose points are farther apart on average are not the same one


def size_of(points: KeypointSet, image: Sequence[int] | None = None) -> float:
    """The longer side of an object's box, in pixels: its own box, else the padded hull of its points.

    image: (width, height), for an object without any extent.
    """
    if points.box is not None and min(points.box[2:]) > 0:
        return float(max(points.box[2:]))
    placed = points.xy[points.placed]
    side = float(max(box_of_points(placed, PAD)[2:])) if len(placed) else 0.0
    return side if side > 2 else max(ALONE * max(image), 1.0) if image else 1.0


def distances(one: KeypointSet, other: KeypointSet, size: float) -> np.ndarray:
    """(K,) distance of each point of `one` to the same name in `other`, in shares of `size`; NaN where one has no position."""
    other = other.reorder(one.names)
    both = one.placed & other.placed
    apart = np.linalg.norm(one.xy.astype(np.float64) - other.xy.astype(np.float64), axis=1) / size
    return np.where(both, apart, np.nan)


def pair_up(
    one: Sequence[KeypointSet], other: Sequence[KeypointSet], image: Sequence[int] | None = None
) -> list[tuple[int | None, int | None]]:
    """Indices of the same objects: (i, j), with None for what has no partner. The nearest pairs first, each object once.

    Objects are the same when their common points lie within APART of the size of `one` on average; where they have no common
    point, their boxes' centres count.
    """
    apart = []
    for i, a in enumerate(one):
        size = size_of(a, image)
        for j, b in enumerate(other):
            found = distances(a, b, size)
            common = found[np.isfinite(found)]
            gap = float(common.mean()) if len(common) else _centres(a, b) / size
            apart.append((gap, i, j))
    pairs: list[tuple[int | None, int | None]] = []
    left, right = set(range(len(one))), set(range(len(other)))
    for gap, i, j in sorted(apart):
        if i in left and j in right and gap <= APART:
            pairs.append((i, j))
            left.discard(i)
            right.discard(j)
    if len(one) == len(other) == 1 and not pairs:  # one object on each side: far off, but the same
        return [(0, 0)]
    return pairs + [(i, None) for i in sorted(left)] + [(None, j) for j in sorted(right)]


def _centres(one: KeypointSet, other: KeypointSet) -> float:
    boxes = one.object_box(), other.object_box()
    if boxes[0] is None or boxes[1] is None:
        return float("inf")
    a, b = (np.asarray(box, np.float64) for box in boxes if box is not None)
    return float(np.linalg.norm(a[:2] + a[2:] / 2 - b[:2] - b[2:] / 2))
