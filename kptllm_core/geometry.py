"""The only place where coordinates change. numpy only.

    per cent of the image  ↔  pixels of the original image  ↔  pixels of a square crop  ↔  cells of a heatmap

One convention throughout: positions are continuous, (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its centre.
So an image of width W spans 0…W, 100 per cent is W, and a cell j of size c has its centre at (j + 0.5)·c.
To undo a prediction: cell → crop pixels (`cells_to_crop`) → image pixels (`Crop.to_image`) → per cent (`to_percent`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CROP_FACTOR = 1.25  # MP-100 protocol: box → square → × 1.25


def to_percent(xy: np.ndarray, width: int, height: int) -> np.ndarray:
    """(…, 2) pixels → per cent of the image."""
    return np.asarray(xy, np.float64) * (100.0 / np.array([width, height], np.float64))


def from_percent(percent: np.ndarray, width: int, height: int) -> np.ndarray:
    """(…, 2) per cent of the image → pixels."""
    return np.asarray(percent, np.float64) * (np.array([width, height], np.float64) / 100.0)


def clip_to_image(xy: np.ndarray, width: int, height: int) -> np.ndarray:
    """(…, 2) pixels, moved onto the image."""
    return np.clip(xy, 0.0, np.array([width, height], np.float64))


@dataclass(frozen=True, eq=False)
class Crop:
    """A square window on an image, perhaps rotated.

    matrix: (2, 3) float64, maps (x, y, 1) in image pixels to crop pixels.
    size: side of the crop, pixels.
    """

    matrix: np.ndarray
    size: int

    def to_crop(self, xy: np.ndarray) -> np.ndarray:
        """(…, 2) image pixels → crop pixels."""
        return np.asarray(xy, np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def to_image(self, xy: np.ndarray) -> np.ndarray:
        """(…, 2) crop pixels → image pixels."""
        return (np.asarray(xy, np.float64) - self.matrix[:, 2]) @ np.linalg.inv(self.matrix[:, :2]).T

    @property
    def scale(self) -> float:
        """Crop pixels per image pixel."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))


def crop_of_box(box: np.ndarray, size: int, factor: float = CROP_FACTOR, degrees: float = 0.0) -> Crop:
    """The square around a box (x, y, w, h), enlarged by `factor` and turned by `degrees` clockwise, as a crop of side `size`."""
    x, y, w, h = (float(v) for v in box)
    side = max(w, h, 1.0) * factor
    return similarity_crop(np.array([x + w / 2, y + h / 2]), side, size, degrees)


def crop_of_image(width: int, height: int, size: int, degrees: float = 0.0) -> Crop:
    """The whole image, letterboxed into a square crop."""
    return similarity_crop(np.array([width / 2, height / 2]), float(max(width, height)), size, degrees)


def similarity_crop(centre: np.ndarray, side: float, size: int, degrees: float = 0.0) -> Crop:
    """The window of `side` image pixels around `centre`, as a crop of `size` pixels, content turned by `degrees`."""
    angle = np.deg2rad(degrees)
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (size / side)
    shift = np.array([size / 2, size / 2]) - linear @ np.asarray(centre, np.float64)
    return Crop(np.concatenate([linear, shift[:, None]], 1), size)


def crop_to_cells(xy: np.ndarray, stride: float) -> np.ndarray:
    """(…, 2) crop pixels → position in a heatmap, where the centre of cell (i, j) is exactly (i, j)."""
    return np.asarray(xy, np.float64) / stride - 0.5


def cells_to_crop(cells: np.ndarray, stride: float) -> np.ndarray:
    """(…, 2) heatmap position → crop pixels; the inverse of `crop_to_cells`."""
    return (np.asarray(cells, np.float64) + 0.5) * stride


def box_of_points(xy: np.ndarray, pad: float = 0.0) -> np.ndarray:
    """Hull of points (N ≥ 1, 2), each side moved out by `pad` × the longer side. (4,) x, y, w, h."""
    low, high = np.min(xy, 0), np.max(xy, 0)
    grow = pad * max(float((high - low).max()), 1.0)
    return np.concatenate([low - grow, high - low + 2 * grow])


def clip_box(box: np.ndarray, width: int, height: int) -> np.ndarray:
    """The part of a box (x, y, w, h) that lies on the image."""
    x, y, w, h = (float(v) for v in box)
    x0, y0 = min(max(x, 0.0), width), min(max(y, 0.0), height)
    x1, y1 = min(max(x + w, 0.0), width), min(max(y + h, 0.0), height)
    return np.array([x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)])
