"""Whole images in, boxes of objects out: windows at the sizes at which objects may appear, one answer for each object.

A window is as wide as a few objects of the support; without support, or where these are large, the whole image is enough. The
number of windows is bounded, whatever the image's size: beyond it windows grow, and the smallest objects are missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kptllm_core.geometry import Crop, clip_box, crop_of_image, similarity_crop
from kptllm_core.instances import MOST, distinct
from kptllm_core.keypoints import SHOWN

WINDOW = 2.4  # side of a search window, in sides of the support's objects
LARGE = 0.9  # side of a search window over side of the image, from which on the whole image is enough
MAX_WINDOWS = 512  # of one image: a bee of 20 pixels in 4000 × 3000 is then 18 of a crop of 160, which is about the least that is found
FAINT = 0.05  # least score of a box whose points are looked for
COUNTED = 20  # objects of an image in a figure, however faint: average precision reads the ranking, as COCO does of people with keypoints
BORDER = 0.01  # of a window: a box that ends there, inside the image, is a part of an object that another window holds whole


class Found(NamedTuple):
    """boxes: (N, 4) x, y, w, h in pixels, the surest first; score: (N,) expected overlap with a true box, 0…1."""

    boxes: np.ndarray
    score: np.ndarray


Detect = Callable[[Sequence[Crop]], tuple[np.ndarray, np.ndarray]]
"""Crops of one image → boxes (C, N, 4) left, top, right, bottom in 0…1 of each crop, and scores (C, N)."""


def find(detect: Detect, width: int, height: int, share: float | None, size: int, least: float = SHOWN,
         most: int = MOST) -> Found:  # fmt: skip
    """Up to `most` boxes with a score of at least `least`.

    share: of the support's objects in their images, longer sides, or None without support. size: side of the crops, pixels.
    """
    crops = [crop_of_image(width, height, size)]
    if needs_windows(share):
        assert share is not None
        crops += windows(width, height, share * max(width, height) * WINDOW, size)
    raw, score = detect(crops)
    boxes, scores = [], []
    for crop, its, sure in zip(crops, raw, score, strict=True):
        low, high = crop.to_image(its[:, :2] * size), crop.to_image(its[:, 2:] * size)
        cut = np.zeros(len(its), bool)
        for axis, extent in ((0, width), (1, height)):
            cut |= (its[:, axis] < BORDER) & (low[:, axis] > 0.01 * extent)
            cut |= (its[:, axis + 2] > 1 - BORDER) & (high[:, axis] < 0.99 * extent)
        kept = (sure >= least) & ~cut
        boxes += [clip_box(np.concatenate([a, b - a]), width, height) for a, b in zip(low[kept], high[kept], strict=True)]
        scores += sure[kept].tolist()
    found, sure = np.array(boxes, np.float64).reshape(-1, 4), np.array(scores)
    real = np.flatnonzero((found[:, 2:] > 1).all(1))
    index = real[distinct(found[real], sure[real], most=most)] if len(real) else real
    return Found(found[index], sure[index])


def needs_windows(share: float | None) -> bool:
    """Whether objects that take this share of the support's images are too small to be found in a whole image."""
    return share is not None and share * WINDOW < LARGE


def windows(width: int, height: int, side: float, size: int, most: int = MAX_WINDOWS) -> list[Crop]:
    """Square windows over an image that overlap by half. Where that were more than `most`, they grow, and overlap by as many pixels as before:
    any object still lies whole in one of them."""
    overlap = side * 0.5
    while True:
        columns, rows = (max(int(np.ceil((extent - side) / (side - overlap))) + 1, 1) for extent in (width, height))
        if columns * rows <= most:
            break
        side *= 1.05
    xs = np.linspace(min(side, width) / 2, width - min(side, width) / 2, columns)
    ys = np.linspace(min(side, height) / 2, height - min(side, height) / 2, rows)
    return [similarity_crop(np.array([x, y]), side, size) for y in ys for x in xs]
