"""How far apart are two people who label the same image? The floor below which no model can be measured.

Pure functions; see `disagreement`. Each pair of people on an image is compared point by point, in shares of the object's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.matching import distances, pair_up, size_of
from kptllm_core.keypoints import KeypointSet

THRESHOLDS = (0.02, 0.05, 0.1)


@dataclass(frozen=True, eq=False)
class Reading:
    """What one person labelled on one image. size: (width, height) of the image, pixels."""

    task: int
    annotator: str
    objects: tuple[KeypointSet, ...]
    size: tuple[int, int] | None = None


def disagreement(readings: Sequence[Reading], names: Sequence[str]) -> dict[str, Any]:
    """Per keypoint and over all: how far apart people are (shares of the object's size), and how often only one placed it.

    `pck` is the share of points on which two people agree within a threshold: what a model that is as good as a person scores.
    Two annotations by the same person do not count. Everything is None or 0 without an image that two people labelled.
    """
    apart: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, int] = dict.fromkeys(names, 0)
    tasks: dict[int, list[Reading]] = {}
    for reading in readings:
        tasks.setdefault(reading.task, []).append(reading)
    compared, people = set(), set()
    for task, found in tasks.items():
        for one, other in itertools.combinations(found, 2):
            if one.annotator == other.annotator:
                continue
            compared.add(task)
            people |= {one.annotator, other.annotator}
            _compare(one, other, apart, alone)
    points = {name: _figures(apart[name], alone[name]) for name in names}
    everything = _figures([d for found in apart.values() for d in found], sum(alone.values()))
    return {"images": len(compared), "annotators": len(people), "all": everything, "points": points}


def _compare(one: Reading, other: Reading, apart: dict[str, list[float]], alone: dict[str, int]) -> None:
    for i, j in pair_up(one.objects, other.objects, one.size):
        if i is None or j is None:
            lonely = one.objects[i] if i is not None else other.objects[j or 0]
            for name, placed in zip(lonely.names, lonely.placed, strict=True):
                if name in alone:
                    alone[name] += int(placed)
            continue
        a, b = one.objects[i], other.objects[j].reorder(one.objects[i].names)
        size = (size_of(a, one.size) + size_of(b, other.size)) / 2
        for name, gap, left, right in zip(a.names, distances(a, b, size), a.placed, b.placed, strict=True):
            if name in apart and left and right:
                apart[name].append(float(gap))
            elif name in alone and left != right:
                alone[name] += 1


def _figures(apart: Sequence[float], alone: int) -> dict[str, Any]:
    values = np.array(apart)
    if not len(values):
        return {"pairs": 0, "mean": None, "median": None, "p90": None, "pck": None, "one_only": alone}
    return {
        "pairs": len(values),
        "mean": round(float(values.mean()), 4),
        "median": round(float(np.median(values)), 4),
        "p90": round(float(np.quantile(values, 0.9)), 4),
        "pck": {f"{t:g}": round(float((values < t).mean()), 4) for t in THRESHOLDS},
        "one_only": alone,
    }
