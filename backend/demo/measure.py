"""How near predictions in Label Studio lie to the truth. Reads them back as Label Studio stores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from backend.demo.samples import Picture
from kptllm_core.geometry import box_of_points
from kptllm_core.metrics import MISSED, mean_pck, normalised_distance
from label_config.regions import from_result
from label_config.schema import KeypointControl

THRESHOLDS = (0.05, 0.1, 0.2)


def pck(control: KeypointControl, pairs: Iterable[tuple[Picture, list[dict[str, Any]]]]) -> dict[str, float]:
    """Pictures with truth, each with the result of its prediction → PCK at each threshold, mean over the pictures.

    Distances are in units of max(w, h) of the object's true box. A point that was not drawn counts as missed.
    """
    distances = [_distances(control, picture, result) for picture, result in pairs]
    return {str(threshold): round(mean_pck(distances, threshold), 4) for threshold in THRESHOLDS}


def _distances(control: KeypointControl, picture: Picture, result: list[dict[str, Any]]) -> np.ndarray:
    """(n,) for the n points that the truth places, visible or hidden."""
    truth = picture.truth
    assert truth is not None
    found = from_result(control, result, picture.width, picture.height)
    if not found:
        return np.full(int(truth.placed.sum()), MISSED)
    best = max(found, key=lambda points: int(points.placed.sum()))
    box = truth.box if truth.box is not None else box_of_points(truth.xy[truth.placed])
    near = normalised_distance(best.xy[truth.placed], truth.xy[truth.placed], box)
    return np.where(best.placed[truth.placed], near, MISSED)
