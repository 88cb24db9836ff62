"""The value types that cross every boundary: which points there are, and where they lie.

numpy only: the backend and label_config import this module without loading torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from kptllm_core.errors import InvalidInput, SchemaError
from kptllm_core.geometry import box_of_points

MAX_KEYPOINTS = 256
SHOWN = 0.2  # least score of an object that was found and is drawn: to delete one is a click, to add one takes a box and all its points
_SIDES = (("left", "right"), ("links", "rechts"), ("izquierda", "derecha"), ("izquierdo", "derecho"), ("l", "r"))
_OTHER_SIDE = tuple(
    {a: b for one, other in (*_SIDES, ("gauche", droite)) for a, b in ((one, other), (other, one))} for droite in ("droite", "droit")
)


class Visibility(IntEnum):
    """What is known of a point. The first three are COCO's `v`."""

    NOT_LABELLED = 0
    OCCLUDED = 1
    VISIBLE = 2
    ABSENT = 3  # a person, or the model, says that the object has no such point in this image


@dataclass(frozen=True)
class KeypointSchema:
    """The points of one kind of object, in the order that every array of a project follows."""

    names: tuple[str, ...]
    category: str = "object"
    skeleton: tuple[tuple[int, int], ...] = ()  # pairs of 0-based indices into `names`
    symmetric: tuple[tuple[int, int], ...] = ()  # pairs whose names swap when the image is mirrored

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(str(n) for n in self.names))
        for name in ("skeleton", "symmetric"):
            object.__setattr__(self, name, tuple((int(a), int(b)) for a, b in getattr(self, name)))
        if not self.names:
            raise SchemaError("The schema has no keypoints. Name at least one point.")
        if len(self.names) > MAX_KEYPOINTS:
            raise SchemaError(f"The schema has {len(self.names)} keypoints; at most {MAX_KEYPOINTS} are supported.")
        twice = sorted({n for n in self.names if self.names.count(n) > 1})
        if twice:
            raise SchemaError(f"Keypoint names must be unique; found twice: {', '.join(twice)}.")
        count = len(self.names)
        for a, b in self.skeleton + self.symmetric:
            if not (0 <= a < count and 0 <= b < count and a != b):
                raise SchemaError(f"The pair ({a}, {b}) does not name two different points of 0…{count - 1}.")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Position of a name; SchemaError with the known names if there is none."""
        try:
            return self.names.index(name)
        except ValueError:
            raise SchemaError(f"Label '{name}' is not in the schema. Known: {', '.join(self.names)}.") from None

    def mirror(self) -> np.ndarray:
        """(K,) int: for each point, the point that takes its place in a mirrored image."""
        order = np.arange(len(self))
        for a, b in self.symmetric:
            if order[a] == a and order[b] == b:  # a point has one partner, the first one
                order[a], order[b] = b, a
        return order

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "category": self.category, "skeleton": [list(p) for p in self.skeleton],
                "symmetric": [list(p) for p in self.symmetric]}  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> KeypointSchema:
        if not isinstance(data, dict) or not isinstance(data.get("names"), list):
            raise SchemaError("A schema is an object with a list 'names'.")
        unknown = sorted(set(data) - {"names", "category", "skeleton", "symmetric"})
        if unknown:
            raise SchemaError(f"Unknown keys in the schema: {', '.join(unknown)}.")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise SchemaError(f"The schema cannot be read: {error}.") from None


def symmetric_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Left/right pairs read from the names alone: `left_eye`/`right_eye`, `EyeL`/`EyeR`, `eye (left)`/`eye (right)`, and
    `left_eye_l`/`right_eye_r`: in a mirror every side is the other one. A point with two counterparts has none: which is its is not known."""
    words = [_words(name) for name in names]
    found: dict[tuple[str, ...], int] = {tuple(w): i for i, w in enumerate(words)}
    pairs: set[tuple[int, int]] = set()
    for i, parts in enumerate(words):
        for j in (found.get(tuple(side.get(p, p) for p in parts)) for side in _OTHER_SIDE):
            if j is not None and j != i:
                pairs.add((min(i, j), max(i, j)))
    ends = [i for pair in pairs for i in pair]
    return tuple(pair for pair in sorted(pairs) if all(ends.count(i) == 1 for i in pair))


def _words(name: str) -> list[str]:
    """`forelegR1` → [foreleg, r, 1]; `left_eye` → [left, eye]."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return re.findall(r"[^\W\d_]+|\d+", spaced.lower())


@dataclass(frozen=True, eq=False)
class KeypointSet:
    """The points of one object in one image, in the order of `names`.

    xy: (K, 2) float32, x then y, pixels of the original (EXIF-oriented) image; the top left corner of the image is
        (0, 0) and the centre of its first pixel (0.5, 0.5). Rows that are not labelled or absent may hold anything finite.
    visibility: (K,) int8 of `Visibility`.
    score: (K,) float32 in 0…1, probability that the point lies within a tenth of the object's size; 1 for people's points.
    box: (4,) float32, x, y, width, height in pixels, or None.
    """

    names: tuple[str, ...]
    xy: np.ndarray
    visibility: np.ndarray
    score: np.ndarray = None  # type: ignore[assignment]  # set when built
    box: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.names)
        put = object.__setattr__
        put(self, "names", tuple(self.names))
        put(self, "xy", _array(self.xy, (count, 2), np.float32, "xy"))
        put(self, "visibility", _array(self.visibility, (count,), np.int8, "visibility"))
        put(self, "score", _array(np.ones(count) if self.score is None else self.score, (count,), np.float32, "score"))
        if self.box is not None:
            put(self, "box", _array(self.box, (4,), np.float32, "box"))
        if not np.isin(self.visibility, [v.value for v in Visibility]).all():
            raise InvalidInput("visibility holds values other than 0 (not labelled), 1, 2 and 3 (absent).")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def placed(self) -> np.ndarray:
        """(K,) bool: points that have a position (visible or occluded)."""
        return (self.visibility == Visibility.VISIBLE) | (self.visibility == Visibility.OCCLUDED)

    @property
    def object_score(self) -> float:
        """Mean score over the placed points; 0 if none is placed."""
        return float(self.score[self.placed].mean()) if self.placed.any() else 0.0

    def object_box(self) -> np.ndarray | None:
        """The given box, else the hull of the placed points; None without either. (4,) x, y, w, h."""
        if self.box is not None:
            return self.box
        points = self.xy[self.placed]
        if not len(points):
            return None
        low, high = points.min(0), points.max(0)
        return np.concatenate([low, high - low]).astype(np.float32)

    def usable_box(self, width: int, height: int) -> np.ndarray:
        """A box of some area in an image of that size: the given one, else the padded hull of the placed points, for a single one a tenth of
        the image; without any the whole image. (4,) x, y, w, h."""
        if self.box is not None and min(self.box[2], self.box[3]) > 0:
            return self.box
        points = self.xy[self.placed]
        if not len(points):
            return np.array([0, 0, width, height], np.float32)
        box = box_of_points(points, 0.1)
        return box if max(box[2], box[3]) > 2 else box_of_points(points, 0.05 * max(width, height))

    def reorder(self, names: tuple[str, ...]) -> KeypointSet:
        """The same points in the order of `names`; points that are missing here become NOT_LABELLED, others are dropped."""
        if not self.names:
            return KeypointSet(tuple(names), np.zeros((len(names), 2)), np.zeros(len(names)), np.zeros(len(names)), self.box)
        at = {n: i for i, n in enumerate(self.names)}
        index = np.array([at.get(n, -1) for n in names], dtype=int)
        known = index >= 0
        return KeypointSet(tuple(names), np.where(known[:, None], self.xy[index], 0.0),
                           np.where(known, self.visibility[index], Visibility.NOT_LABELLED),
                           np.where(known, self.score[index], 0.0), self.box)  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "xy": [[round(float(v), 3) for v in p] for p in self.xy],
                "visibility": [int(v) for v in self.visibility], "score": [round(float(s), 4) for s in self.score],
                "box": None if self.box is None else [round(float(v), 3) for v in self.box]}  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> KeypointSet:
        if not isinstance(data, dict):
            raise InvalidInput(f"A keypoint set is an object with names, xy, visibility; found {type(data).__name__}.")
        unknown = sorted(set(data) - {"names", "xy", "visibility", "score", "box"})
        missing = sorted({"names", "xy", "visibility"} - set(data))
        if unknown or missing:
            raise InvalidInput(f"A keypoint set has names, xy, visibility (and score, box). Missing: {missing}; unknown: {unknown}.")
        return cls(**{**data, "names": tuple(map(str, data["names"]))})


def _array(value: Any, shape: tuple[int, ...], dtype: Any, name: str) -> np.ndarray:
    try:
        array = np.array(value, dtype=dtype).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        found = value.shape if isinstance(value, np.ndarray) else f"{str(value)[:60]}"
        raise InvalidInput(f"{name} must be numbers of shape {shape}; found {found}.") from None
    if np.issubdtype(dtype, np.floating) and not np.isfinite(array).all():
        raise InvalidInput(f"{name} holds values that are not finite.")
    array.setflags(write=False)
    return array
