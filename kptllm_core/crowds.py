"""How well are objects found in whole images? The `--task instances` of `evaluate`: boxes, and the points that come with them.

Each image is asked once for all its objects of a category, with support objects of other images (and other groups, where there are
enough). What the annotations do not hold counts as wrong: sets in which only some objects are labelled flatter nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kptllm_core import metrics
from kptllm_core.dataset import Sample
from kptllm_core.errors import DataError
from kptllm_core.finder import COUNTED, FAINT
from kptllm_core.instances import box_iou
from kptllm_core.keypoints import SHOWN, KeypointSet
from kptllm_core.predictor import Instance
from kptllm_core.protocol import identity
from kptllm_core.report import INSTANCES

SIGMA = 0.05  # of every point in OKS: categories that nobody measured the annotators' spread on


@dataclass(frozen=True, eq=False)
class Scene:
    """One image of a category: its objects with boxes and points, and what was found in it."""

    category: str
    truth: Sequence[KeypointSet]
    found: Sequence[Instance]


def figures(scenes: Sequence[Scene]) -> dict[str, Any]:
    """{"box_ap50", "box_ap", "recall50", "oks_ap", "extra", "calibration", "images", "objects"}; None where there is no true object.

    Average precision reads the ranking of up to `COUNTED` boxes an image. recall50: share of the true objects that a *shown* box
    (score of at least `SHOWN`) is right about, by `hits`; extra: shown boxes per image that are right about none. calibration: expected
    calibration error of the scores, over the boxes that have at least `FAINT`.
    """
    boxes, points, sure, hit, total, extra = [], [], [], 0, 0, 0
    for scene in scenes:
        scores = np.array([i.score for i in scene.found])
        true = np.array([t.object_box() for t in scene.truth], np.float64).reshape(-1, 4)
        mine = np.array([i.keypoints.box for i in scene.found], np.float64).reshape(-1, 4)
        iou = box_iou(mine, true)
        boxes.append((scores, iou))
        right, shown = hits(scores, iou), scores >= SHOWN
        sure += list(zip(scores[scores >= FAINT], right[scores >= FAINT], strict=True))
        points.append((scores, _oks(scene)))
        total, hit, extra = total + len(true), hit + int(right[shown].sum()), extra + int((~right[shown]).sum())
    return {
        "box_ap50": metrics.average_precision(boxes, 0.5, COUNTED),
        "box_ap": metrics.mean_ap(boxes, COUNTED),
        "recall50": hit / total if total else None,
        "oks_ap": metrics.mean_ap(points, COUNTED),
        "extra": extra / len(scenes),
        "calibration": metrics.calibration_error(np.array([s for s, _ in sure]), np.array([r for _, r in sure])),
        "images": len(scenes),
        "objects": total,
    }


def hits(scores: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """(D,) bool: which found boxes are right. The surest that overlaps a true one by half has it; iou: (D, G)."""
    right, free = np.zeros(len(scores), bool), np.ones(iou.shape[1], bool)
    for row in np.argsort(-scores, kind="stable"):
        overlap = np.where(free, iou[row], 0.0)
        if overlap.max(initial=0) >= 0.5:
            right[row], free[overlap.argmax()] = True, False
    return right


def summary(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The figures of each category, and their means over the categories that have objects."""
    names = dict.fromkeys(s.category for s in scenes)
    each = {name: figures([s for s in scenes if s.category == name]) for name in names}
    values = {k: [f[k] for f in each.values() if f[k] is not None] for k in INSTANCES}
    return {**{k: float(np.mean(v)) if v else None for k, v in values.items()}, "per_category": each}


def images_of(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The objects of each image."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(str(sample.image_path), []).append(sample)
    return list(found.values())


def draw_support(pool: Sequence[Sample], asked: Sequence[Sequence[Sample]], shots: int, rng: np.random.Generator,
                 same_pool: bool = True) -> list[Sample]:  # fmt: skip
    """`shots` objects that stand in none of the asked images, of other groups where there are enough. DataError if there are too few.

    same_pool: False for a folder of supports, whose groups mean nothing beside those of the images.
    """
    images = {identity(s.image_path) for samples in asked for s in samples}
    groups = {s.group for samples in asked for s in samples} if same_pool else set()
    others = [s for s in pool if identity(s.image_path) not in images]
    apart = [s for s in others if s.group not in groups]
    free = apart if len(apart) >= shots else others
    if len(free) < shots:
        raise DataError(f"{len(free)} objects are left to show beside the images that are asked; {shots} are needed. Lower --shots, --queries "
                        "or add labelled images.")  # fmt: skip
    return [free[i] for i in rng.choice(len(free), shots, replace=False)]


def _oks(scene: Scene) -> np.ndarray:
    """(found, true) similarity of the points."""
    similarity = np.zeros((len(scene.found), len(scene.truth)))
    for column, truth in enumerate(scene.truth):
        box = truth.object_box()
        area = float(box[2] * box[3]) if box is not None else 0.0
        sigmas = np.full(len(truth), SIGMA)
        for row, instance in enumerate(scene.found):
            points = instance.keypoints.reorder(truth.names)
            similarity[row, column] = metrics.oks(points.xy, truth.xy, truth.placed, area, sigmas)
    return similarity
