"""Frozen support examples on their images as these are: an annotation that a program made may be wrong about its image's size.

An example is frozen as soon as it is labelled, when nobody may have fetched its image yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kptllm_core.keypoints import KeypointSet
from label_config.annotations import is_turned, told_size
from label_config.schema import KeypointControl


def frozen(control: KeypointControl, url: str, points: KeypointSet, result: list[Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What versions.support_entries keeps of one control. facts: of the image (`Task.files`), as far as they are known."""
    size = (facts["width"], facts["height"]) if "width" in facts else told_size(control, result)
    return {"image": url, "keypoints": points.to_json(), "size": size and list(size)}


def on_image(example: Mapping[str, Any], facts: Mapping[str, Any]) -> KeypointSet | None:
    """Its points in pixels of the image; None if it was labelled on an image that is turned by 90°, so that their places are not known."""
    points, said = KeypointSet.from_json(example["keypoints"]), example.get("size")
    if not said or "width" not in facts or list(said) == [facts["width"], facts["height"]]:
        return points
    size = (int(facts["width"]), int(facts["height"]))
    if is_turned((said[0], said[1]), size):
        return None
    scale = np.array(size) / said
    box = None if points.box is None else points.box * np.tile(scale, 2)
    return KeypointSet(points.names, points.xy * scale, points.visibility, points.score, box)
