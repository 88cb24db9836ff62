"""Keypoints of the model ↔ regions of Label Studio, both ways, exactly.

Written here: `to_regions` (one control), `to_prediction` (a task's whole answer). What people drew is read in annotations.py:
`read_result`, `from_result`, `boxes_in`. Positions on the wire are per cent of the EXIF-oriented image, in KeypointSets pixels
of the same image.

One object with a box control is a rectangle region and its points, which name it in `parentID`; without a box control an image
holds one object, whose points have no parent. A hidden point carries a second result of the same id: its per-region choice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import clip_box, clip_to_image, to_percent
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.annotations import boxes_in as boxes_in
from label_config.annotations import from_result as from_result
from label_config.annotations import read_result as read_result
from label_config.checks import check_prediction as check_prediction
from label_config.schema import KeypointControl, LabelConfig

POINT_WIDTH = 0.5  # per cent of the image's width
Region = dict[str, Any]


def random_id() -> str:
    """A region id as Label Studio makes them: ten characters, new at every call (two answers may meet in one annotation)."""
    return uuid.uuid4().hex[:10]


def to_regions(
    control: KeypointControl,
    keypoints: KeypointSet | Sequence[KeypointSet],
    width: int,
    height: int,
    new_id: Callable[[], str] = random_id,
    box_labels: Sequence[str | None] | None = None,
    scores: Sequence[float | None] | None = None,
) -> list[Region]:
    """Regions of one control for the objects of one image.

    width, height: of the EXIF-oriented image, pixels. box_labels: per object, the label its box has already (a person's box).
    scores: per object, 0…1, that it is there (its instance score); None: the mean of its points'.
    Not drawn: objects below `score_threshold`; points that are absent, not labelled or below `point_threshold`; without a box
    control all objects but the best, since their points could not be told apart. Points outside are moved to the image's edge.
    """
    objects = [keypoints] if isinstance(keypoints, KeypointSet) else list(keypoints)
    labels = list(box_labels) if box_labels is not None else [None] * len(objects)
    given = list(scores) if scores is not None else [None] * len(objects)
    sure = [o.object_score if score is None else score for o, score in zip(objects, given, strict=True)]
    chosen = [c for c in zip(objects, labels, sure, strict=True) if drawn(control, c[0], c[2]).any()]
    if control.box is None and len(chosen) > 1:
        chosen = [max(chosen, key=lambda one: one[2])]
    regions: list[Region] = []
    for points, label, score in chosen:
        box = box_region(control, points, label, score, width, height, new_id) if control.box and control.add_bboxes else None
        regions += [box] if box else []
        regions += _point_regions(control, points, score, box["id"] if box else None, width, height, new_id)
    return regions


def drawn(control: KeypointControl, points: KeypointSet, score: float | None = None) -> np.ndarray:
    """(K,) bool, in the order of `points`: which of them `to_regions` draws. score: of the object; None: the mean of its points'."""
    if (points.object_score if score is None else score) < control.score_threshold:
        return np.zeros(len(points), bool)
    return points.placed & (points.score >= np.float32(control.point_threshold))


def to_prediction(
    config: LabelConfig,
    per_control: Iterable[tuple[KeypointControl, KeypointSet | Sequence[KeypointSet]]],
    width: int,
    height: int,
    model_version: str,
) -> dict[str, Any]:
    """One task's entry of /predict. `score`: mean score of the drawn points, 0 when nothing is drawn."""
    result: list[Region] = []
    for control, keypoints in per_control:
        if control not in config.controls:
            raise InvalidInput(f"The control '{control.from_name}' is not in this label config.")
        result += to_regions(control, keypoints, width, height)
    scores = [r["score"] for r in result if r["type"] == "keypointlabels"]
    return {
        "result": result,
        "score": round(sum(scores) / len(scores), 4) if scores else 0.0,
        "model_version": model_version,
    }


def _common(region_id: str, from_name: str, to_name: str, kind: str, width: int, height: int, score: float) -> Region:
    return {"id": region_id, "from_name": from_name, "to_name": to_name, "type": kind, "original_width": int(width),
            "original_height": int(height), "image_rotation": 0, "score": round(min(max(float(score), 0.0), 1.0), 4)}  # fmt: skip


def _point_regions(control: KeypointControl, points: KeypointSet, score: float, parent: str | None, width: int, height: int,
                   new_id: Callable[[], str]) -> list[Region]:  # fmt: skip
    size = POINT_WIDTH if control.point_size is None else min(control.point_size * 100.0 / width, 100.0)
    percent = np.clip(to_percent(clip_to_image(points.xy.astype(np.float64), width, height), width, height), 0.0, 100.0)
    regions: list[Region] = []
    for i in np.flatnonzero(drawn(control, points, score)):
        region = _common(new_id(), control.from_name, control.to_name, "keypointlabels", width, height, points.score[i])
        place = {"x": float(percent[i, 0]), "y": float(percent[i, 1]), "width": size}
        region["value"] = {**place, "keypointlabels": [control.label_of(points.names[i])]}
        if parent is not None:
            region["parentID"] = parent
        regions.append(region)
        if control.occluded and points.visibility[i] == Visibility.OCCLUDED:
            regions.append({**region, "from_name": control.occluded, "type": "choices",
                            "value": {**place, "choices": [control.occluded_choice]}})  # fmt: skip
    return regions


def box_region(control: KeypointControl, points: KeypointSet, label: str | None, score: float, width: int, height: int,
               new_id: Callable[[], str]) -> Region | None:  # fmt: skip
    """The object's rectangle, also of one without points; None if nothing of it lies on the image. See `to_regions`."""
    assert control.box is not None
    whole = points.object_box()
    if whole is None:
        return None
    x, y, w, h = clip_box(whole, width, height)
    if w <= 0 or h <= 0:
        return None
    (x0, y0), (x1, y1) = np.clip(to_percent(np.array([[x, y], [x + w, y + h]]), width, height), 0.0, 100.0)
    region = _common(new_id(), control.box.from_name, control.to_name, control.box.type, width, height, score)
    region["value"] = {"x": float(x0), "y": float(y0), "width": float(x1 - x0), "height": float(y1 - y0), "rotation": 0}
    if control.box.type == "rectanglelabels":
        region["value"]["rectanglelabels"] = [label if label in control.box.labels else control.box.labels[0]]
    return region
