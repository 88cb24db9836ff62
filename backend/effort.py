"""What the predictions are worth to people: points accepted, moved, added, deleted, seconds, and clicks saved.

From Label Studio's own records: each region's `origin`, the annotation's parent prediction and lead time, and the prediction
as it was served, which the ids of the regions lead back to. Pure functions; effort_report.py reads the journal.

A point is *accepted* when it ends within the tolerance (a share of the object's size) of where the model put it, *moved* when
it ends farther away, *added* where the model drew none, *deleted* where the model drew one and the person left none. By hand
each point is one click. With predictions each point that was touched is one: moved (also within the tolerance), added, deleted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from backend.matching import distances, pair_up, size_of
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.annotations import LabelledObject

TOLERANCE = 0.05
PREDICTED = ("prediction", "prediction-changed")  # origins of regions that began as a prediction


@dataclass(frozen=True)
class Work:
    """What one person did on one image. Counts are points; `deleted` is None where the prediction is not known any more."""

    accepted: int = 0
    nudged: int = 0  # of the accepted ones: moved by a person, but not beyond the tolerance
    moved: int = 0
    added: int = 0
    deleted: int | None = 0

    @property
    def points(self) -> int:
        """Points of the annotation as it is."""
        return self.accepted + self.moved + self.added

    @property
    def clicks(self) -> int:
        return self.nudged + self.moved + self.added + (self.deleted or 0)

    def __add__(self, other: Work) -> Work:
        gone = None if self.deleted is None or other.deleted is None else self.deleted + other.deleted
        return Work(
            self.accepted + other.accepted,
            self.nudged + other.nudged,
            self.moved + other.moved,
            self.added + other.added,
            gone,
        )


@dataclass(frozen=True, eq=False)
class Drawn:
    """An object as it was predicted, and the region ids of its points: {name: id}. Only these points were drawn."""

    keypoints: KeypointSet
    regions: dict[str, str]

    def visible(self) -> KeypointSet:
        """The same with only the drawn points."""
        points = self.keypoints
        drawn = np.array([name in self.regions for name in points.names], bool)
        seen = np.where(drawn, points.visibility, Visibility.NOT_LABELLED)
        return KeypointSet(points.names, points.xy, seen, points.score, points.box)


def started_from(predicted: Sequence[Drawn], labelled: Sequence[LabelledObject]) -> bool:
    """Whether an annotation carries regions of this very prediction."""
    ids = {region for o in predicted for region in o.regions.values()}
    return any(region in ids for o in labelled for region in o.region_ids if region)


def work_on(
    predicted: Sequence[Drawn],
    labelled: Sequence[LabelledObject],
    tolerance: float = TOLERANCE,
    image: Sequence[int] | None = None,
) -> Work:
    """What a person who started from `predicted` did to reach `labelled`. image: (width, height) in pixels."""
    total = Work()
    for i, j in _partners(predicted, labelled, image):
        if j is None:
            total += Work(deleted=len(predicted[i].regions) if i is not None else 0)
        elif i is None:
            total += Work(added=int(labelled[j].keypoints.placed.sum()))
        else:
            total += _one_object(predicted[i], labelled[j], tolerance, image)
    return total


def work_by_origin(labelled: Sequence[LabelledObject]) -> Work:
    """The same from the origins alone: every changed point counts as moved, and what was deleted is not known."""
    origins = [o for item in labelled for o, placed in zip(item.origins, item.keypoints.placed, strict=True) if placed]
    accepted, moved = origins.count(PREDICTED[0]), origins.count(PREDICTED[1])
    assisted = bool(accepted or moved)
    return Work(accepted, 0, moved, len(origins) - accepted - moved, None if assisted else 0)


def assisted(labelled: Iterable[LabelledObject]) -> bool:
    """Whether any of its points began as a prediction."""
    return any(origin in PREDICTED for item in labelled for origin in item.origins)


def _one_object(predicted: Drawn, labelled: LabelledObject, tolerance: float, image: Sequence[int] | None) -> Work:
    truth, shown = labelled.keypoints, predicted.visible()
    apart = distances(truth, shown, size_of(truth, image))
    there = dict(zip(shown.names, shown.placed, strict=True))
    work = Work()
    for name, placed, gap, origin in zip(truth.names, truth.placed, apart, labelled.origins, strict=True):
        if placed and there.get(name):
            inside = bool(gap <= tolerance) or origin == "prediction"
            work += Work(accepted=int(inside), nudged=int(inside and origin != "prediction"), moved=int(not inside))
        elif placed:
            work += Work(added=1)
        elif there.get(name):
            work += Work(deleted=1)
    return work


def _partners(
    predicted: Sequence[Drawn], labelled: Sequence[LabelledObject], image: Sequence[int] | None
) -> list[tuple[int | None, int | None]]:
    """Objects that share regions are the same, wherever they are now; the others are matched by their place."""
    pairs: list[tuple[int | None, int | None]] = []
    left, right = list(range(len(predicted))), list(range(len(labelled)))
    for i, drawn in enumerate(predicted):
        ids = set(drawn.regions.values())
        shared = [(sum(r in ids for r in labelled[j].region_ids if r), -j) for j in right]
        if shared and max(shared)[0]:
            j = -max(shared)[1]
            pairs.append((i, j))
            left.remove(i)
            right.remove(j)
    rest = pair_up([labelled[j].keypoints for j in right], [predicted[i].keypoints for i in left], image)
    return pairs + [(None if i is None else left[i], None if j is None else right[j]) for j, i in rest]


# ---------------------------------------------------------------- many images


@dataclass(frozen=True)
class Image:
    """One annotation of one image, measured."""

    task: int
    annotation: int
    work: Work
    assisted: bool  # it began as a prediction
    version: str | None = None  # the prediction's, where it is known
    round: int | None = None
    seconds: float | None = None  # Label Studio's lead time
    at: float = 0.0  # when the journal received it, seconds since 1970

    def to_json(self) -> dict[str, Any]:
        work = asdict(self.work) | {"points": self.work.points, "clicks": self.work.clicks}
        return {**asdict(replace(self, work=Work())), "work": work}


def summary(images: Sequence[Image]) -> dict[str, Any]:
    """The effort on some images: totals, per image, and what was saved against one click per point."""
    total = sum((i.work for i in images), Work(deleted=0))
    known = [i.work.deleted for i in images if i.work.deleted is not None]
    by_hand, clicks, count = total.points, sum(i.work.clicks for i in images), max(len(images), 1)
    offered = total.accepted + total.moved
    seconds = [i.seconds for i in images if i.seconds is not None and i.seconds > 0]
    per_point = [i.seconds / i.work.points for i in images if i.seconds and i.seconds > 0 and i.work.points]
    figures = {
        "images": len(images),
        "points": total.points,
        "accepted": total.accepted,
        "nudged": total.nudged,
        "moved": total.moved,
        "added": total.added,
        "deleted": sum(known) if known or not images else None,
        "moved_share": total.moved / offered if offered else None,
        "changed_share": (total.moved + total.added) / total.points if total.points else None,
        "clicks": clicks,
        "clicks_by_hand": by_hand,
        "clicks_saved": by_hand - clicks,
        "saved_share": (by_hand - clicks) / by_hand if by_hand else None,
        "seconds_per_image": statistics.median(seconds) if seconds else None,
        "seconds_per_point": statistics.median(per_point) if per_point else None,
    }
    kept: dict[str, Any] = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    shown = {key: kept[key] for key in ("accepted", "moved", "added", "deleted", "clicks", "points")}
    kept["per_image"] = {k: None if v is None or not images else round(v / count, 2) for k, v in shown.items()}
    return kept


def table(images: Sequence[Image], key: str) -> list[dict[str, Any]]:
    """`summary` of the assisted images of each round or version (`key`), in the order of their first image."""
    groups: dict[Any, list[Image]] = {}
    for image in sorted(images, key=lambda i: (i.at, i.annotation)):
        value = getattr(image, key)
        if image.assisted and value is not None:
            groups.setdefault(value, []).append(image)
    return [{key: value, **summary(found)} for value, found in groups.items()]
