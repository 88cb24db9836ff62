"""Objects that lie on each other: whose point is it? Pure functions of what was predicted for each object by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kptllm_core.instances import box_iou
from kptllm_core.keypoints import KeypointSet, Visibility

SAME_POINT = 0.04  # of the smaller object's longer side: closer than that, two points of one name are the same place

Taken = dict[int, list[tuple[float, float, float]]]
"""Point → places (x, y) that are another object's, and how far around them, pixels."""


def claims(objects: Sequence[KeypointSet], rank: Sequence[int]) -> list[Taken]:
    """For each object of an image the points that it must look for elsewhere: the object of the higher rank keeps its own, among equals
    the one whose point is surer."""
    taken: list[Taken] = [{} for _ in objects]
    for point, keeper, other, reach in _conflicts(objects, rank):
        x, y = objects[keeper].xy[point]
        taken[other].setdefault(point, []).append((float(x), float(y), reach))
    return taken


def yielded(objects: Sequence[KeypointSet], rank: Sequence[int]) -> list[KeypointSet]:
    """The objects without the points that are still another one's: there is no such point to be seen on them."""
    found = list(objects)
    for point, keeper, other, _ in _conflicts(objects, rank):
        if found[keeper].visibility[point] == Visibility.ABSENT:  # it has lost this point itself
            continue
        visibility = found[other].visibility.copy()
        visibility[point] = Visibility.ABSENT
        found[other] = replace(found[other], visibility=visibility)
    return found


def _conflicts(objects: Sequence[KeypointSet], rank: Sequence[int]) -> Iterator[tuple[int, int, int, float]]:
    """(point, object that keeps it, object that does not, reach in pixels) of all pairs of objects whose boxes meet; the surest keepers
    first."""
    boxes = np.array([o.object_box() if o.placed.any() else np.zeros(4) for o in objects], np.float64).reshape(-1, 4)
    found = []
    for one, other in np.argwhere(np.triu(box_iou(boxes, boxes) > 0, 1)):
        a, b = objects[one], objects[other]
        reach = SAME_POINT * float(min(boxes[one, 2:].max(), boxes[other, 2:].max()))
        near = (np.linalg.norm(a.xy - b.xy, axis=1) < reach) & a.placed & b.placed
        for point in np.flatnonzero(near):
            sure = [(rank[i], float(objects[i].score[point])) for i in (one, other)]
            keeper, loser = (one, other) if sure[0] >= sure[1] else (other, one)
            found.append((max(sure), int(point), int(keeper), int(loser), reach))
    found.sort(key=lambda item: item[0], reverse=True)
    yield from (item[1:] for item in found)
