"""Matching without the model's decoder and LLM: what plain correlation and classical descriptors reach on the same crops.

Each baseline sees the crops that the model sees, looks for what lies under each support point at every place of the
query's crop, and answers with the best place. Several supports: the best of them for each point. Names mean nothing to it.
The classical ones do not know how an object is turned, so they try some rotations and scales and keep, for each support,
the one that fits the object as a whole best. OpenCV is loaded only when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import cells_to_crop, crop_of_box, crop_of_image, similarity_crop
from kptllm_core.imaging import warp
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.predictor import Example, Predictor
from kptllm_core.prompts import sample
from kptllm_core.protocol import true_box, with_box
from kptllm_core.vision import Features

BASELINES = ("correlation", "sift", "template")
ROTATIONS = tuple(range(0, 360, 30))  # degrees that the classical baselines try …
SCALES = (0.8, 1.0, 1.25)  # … with each of these sizes


def build_baseline(name: str, predictor: Predictor) -> Matcher:
    """The baseline `name` on the crops of `predictor`'s model. InvalidInput if it needs OpenCV and that is missing."""
    if name == "correlation":
        return Correlation(predictor)
    kinds: dict[str, type[Sift] | type[Template]] = {"sift": Sift, "template": Template}
    if name not in kinds:
        raise InvalidInput(f"--baseline {name} is not known. Expected one of: {', '.join(BASELINES)}.")
    return kinds[name](predictor.size)


class Matcher:
    """A `scoring.PointPredictor` that compares places of two crops; kinds of it say how.

    size: side of the crops, pixels.
    """

    base: str

    def __init__(self, size: int) -> None:
        self.size = size

    def remember(self, pixels: np.ndarray, xy: np.ndarray) -> list[Any]:
        """What lies at xy (K, 2) of a support crop (S, S, 3): one item for each way in which the query may be turned."""
        raise NotImplementedError

    def look(self, pixels: np.ndarray) -> Any:
        """A query crop (S, S, 3), made ready to compare."""
        raise NotImplementedError

    def compare(self, memory: Any, seen: Any) -> np.ndarray:
        """(K, H, W) similarity, at most 1, of remembered points with the cells of the query crop."""
        raise NotImplementedError

    def predict(
        self,
        images: list[np.ndarray],
        schema: KeypointSchema,
        support: Sequence[Example] = (),
        boxes: Sequence[np.ndarray | None] | None = None,
        prompt: str = "auto",
        asked: list[str] | None = None,
    ) -> list[KeypointSet]:
        """One KeypointSet for each image; its score is the similarity found. Points that no support shows are not labelled."""
        if not support or prompt == "text":
            raise InvalidInput(
                f"The baseline {self.base} matches images. It needs support examples, and cannot be asked by text."
            )
        names = tuple(asked) if asked is not None else schema.names
        memories, placed = [], []
        for example in support:
            points = example.keypoints.reorder(names)
            crop = crop_of_box(true_box(with_box(example.keypoints, example.image)), self.size)
            memories.append(self.remember(warp(example.image, crop), np.clip(crop.to_crop(points.xy), 0, self.size)))
            placed.append(points.placed)
        known = np.array(placed)  # (shots, K)
        visibility = np.where(known.any(0), Visibility.VISIBLE, Visibility.NOT_LABELLED)
        results = []
        for image, box in zip(images, boxes or [None] * len(images), strict=True):
            height, width = image.shape[:2]
            crop = crop_of_image(width, height, self.size) if box is None else crop_of_box(box, self.size)
            seen = self.look(warp(image, crop))
            maps = np.stack([self._best_turn(m, seen, k) for m, k in zip(memories, known, strict=True)])
            best = np.where(known[:, :, None, None], maps, -np.inf).max(0)
            cells, score = peaks(np.where(np.isfinite(best), best, 0.0))
            xy = crop.to_image(cells_to_crop(cells, self.size / maps.shape[-1]))
            results.append(KeypointSet(names, xy, visibility, np.clip(score, 0, 1) * known.any(0), box))
        return results

    def _best_turn(self, memories: list[Any], seen: Any, known: np.ndarray) -> np.ndarray:
        """(K, H, W) of the rotation and scale at which the known points fit best altogether."""
        maps = [self.compare(m, seen) for m in memories]
        fit = [m.reshape(len(m), -1).max(1)[known].sum() for m in maps]
        return maps[int(np.argmax(fit))]


def peaks(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, H, W) → the highest cells (K, 2), x then y, between cells by a parabola on each axis, and their values (K,)."""
    count, height, width = maps.shape
    rows, columns = np.divmod(maps.reshape(count, -1).argmax(1), width)
    which = np.arange(count)
    top = maps[which, rows, columns]

    def between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        bend = before - 2 * top + after
        step = np.divide(before - after, 2 * bend, out=np.zeros(count), where=bend < -1e-9)
        return np.clip(step, -0.5, 0.5)

    x = between(maps[which, rows, np.maximum(columns - 1, 0)], maps[which, rows, np.minimum(columns + 1, width - 1)])
    y = between(maps[which, np.maximum(rows - 1, 0), columns], maps[which, np.minimum(rows + 1, height - 1), columns])
    return np.stack([columns + x, rows + y], 1), top


class Correlation(Matcher):
    """Cosine of the encoder's features under the point with those of every place, mean over the three scales."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor.size)
        self.base = f"correlation of {predictor.base}"
        self._model, self._device = predictor.model, predictor.device

    def remember(self, pixels: np.ndarray, xy: np.ndarray) -> list[Any]:
        places = torch.from_numpy(xy / self.size).float()[None].to(self._device)
        with torch.inference_mode():
            return [[F.normalize(sample(m, places)[0].float(), dim=-1) for m in self._features(pixels)]]

    def look(self, pixels: np.ndarray) -> Any:
        with torch.inference_mode():
            return [F.normalize(m[0].float(), dim=0) for m in self._features(pixels)]

    def compare(self, memory: Any, seen: Any) -> np.ndarray:
        with torch.inference_mode():
            planes = [torch.einsum("kc,chw->khw", point, field) for point, field in zip(memory, seen, strict=True)]
            finest = planes[0].shape[-2:]
            same = [F.interpolate(p[None], finest, mode="bilinear", align_corners=False)[0] for p in planes]
            return torch.stack(same).mean(0).cpu().numpy()

    def _features(self, pixels: np.ndarray) -> Features:
        return self._model.encode(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].to(self._device))


class Sift(Matcher):
    """SIFT descriptors (Lowe, IJCV 2004) at the support points against a dense grid of them, mean over three window sizes.

    Descriptors are compared as RootSIFT (Arandjelović and Zisserman, CVPR 2012). The grid's are upright; those of the
    support are taken at each rotation and scale.
    """

    base = "sift"
    GRID = 32  # descriptors on each side of the crop
    WINDOWS = (0.1, 0.2, 0.4)  # side of a descriptor's window, of the crop's

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._cv2 = opencv(self.base)
        self._sift = self._cv2.SIFT_create()
        centres = (np.arange(self.GRID) + 0.5) * size / self.GRID
        self._grid = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)

    def remember(self, pixels: np.ndarray, xy: np.ndarray) -> list[Any]:
        grey = self._grey(pixels)
        return [[self._describe(grey, xy, w * s, d) for w in self.WINDOWS] for d in ROTATIONS for s in SCALES]

    def look(self, pixels: np.ndarray) -> Any:
        grey = self._grey(pixels)
        return [self._describe(grey, self._grid, w, 0.0) for w in self.WINDOWS]

    def compare(self, memory: Any, seen: Any) -> np.ndarray:
        same = np.mean([point @ field.T for point, field in zip(memory, seen, strict=True)], 0)
        return same.reshape(-1, self.GRID, self.GRID)

    def _describe(self, grey: np.ndarray, xy: np.ndarray, window: float, degrees: float) -> np.ndarray:
        """(N, 128), each row of unit length. OpenCV's `size` is a sixth of the window: 4 bins of 1.5 times the size each."""
        points = [self._cv2.KeyPoint(float(x) - 0.5, float(y) - 0.5, window * self.size / 6, degrees) for x, y in xy]
        _, found = self._sift.compute(grey, points)
        return np.sqrt(found / np.maximum(found.sum(1, keepdims=True), 1e-6))

    def _grey(self, pixels: np.ndarray) -> np.ndarray:
        return self._cv2.cvtColor(np.ascontiguousarray(pixels), self._cv2.COLOR_RGB2GRAY)


class Template(Matcher):
    """Normalised cross-correlation of a grey patch around each support point, at each rotation and scale."""

    base = "template"
    PATCH = 0.2  # side, of the crop's

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._cv2 = opencv(self.base)
        self._half = max(round(size * self.PATCH / 2), 2)

    def remember(self, pixels: np.ndarray, xy: np.ndarray) -> list[Any]:
        return [[self._patch(pixels, p, d, s) for p in xy] for d in ROTATIONS for s in SCALES]

    def look(self, pixels: np.ndarray) -> Any:
        edge = self._half  # so that the map has one value for each pixel of the crop
        return self._cv2.copyMakeBorder(self._grey(pixels), edge, edge, edge, edge, self._cv2.BORDER_REPLICATE)

    def compare(self, memory: Any, seen: Any) -> np.ndarray:
        maps = [self._cv2.matchTemplate(seen, patch, self._cv2.TM_CCOEFF_NORMED) for patch in memory]
        flat = np.array(
            [patch.std() < 1 for patch in memory]
        )  # nothing to recognise: OpenCV would call all places equal to it
        return np.where(flat[:, None, None], 0.0, np.nan_to_num(np.stack(maps)))

    def _patch(self, pixels: np.ndarray, xy: np.ndarray, degrees: float, scale: float) -> np.ndarray:
        side = 2 * self._half + 1
        return self._grey(warp(pixels, similarity_crop(xy, side / scale, side, degrees)))

    def _grey(self, pixels: np.ndarray) -> np.ndarray:
        return self._cv2.cvtColor(np.ascontiguousarray(pixels), self._cv2.COLOR_RGB2GRAY)


def opencv(wanted: str) -> Any:
    """The module cv2; InvalidInput with the package's name where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise InvalidInput(
            f"The baseline {wanted} needs OpenCV, which is not installed. "
            "Install it (pip install opencv-python-headless), or use --baseline correlation."
        ) from None
    return cv2
