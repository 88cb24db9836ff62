"""What is shown to the model: labelled examples, how they are cropped, what their boxes say of new ones, and the prompt that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kptllm_core.geometry import CROP_FACTOR, Crop, box_of_points, crop_of_box
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.shots import Shots

ALONE = 0.15  # of the image's longer side: the side of a box around the only point of a kind of which no example is shown
FAR = 0.75  # of the extent of the points: a box that reaches further beyond them is hardly told by them


@dataclass(frozen=True, eq=False)
class Example:
    """One support example. keypoints in pixels of its image."""

    picture: np.ndarray | Callable[[], np.ndarray]
    """(H, W, 3) uint8, or what reads them: with a key that is done only where the example is not encoded yet."""
    keypoints: KeypointSet
    key: str | None = None
    """What stands for the image where the caller knows it, as its hash does; saves hashing the pixels to find the example again."""

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.picture if isinstance(self.picture, np.ndarray) else self.picture()


@dataclass(frozen=True)
class Prepared:
    """A support set, encoded twice: cropped to its objects, and as whole images (to find the object with)."""

    tight: Shots
    whole: Shots
    margin: np.ndarray
    """(4,) how far the objects' boxes reach beyond their usual points on the left, top, right, bottom; shares of the points' extent. Median."""
    share: float
    """Median of box side over image side."""
    usual: np.ndarray
    """(K,) bool: points that more than half of the examples have, or all if fewer than two are so. What most examples lack, a tongue that is
    seldom out, does not stretch a box."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What an image is asked for: the points of a schema, shown by examples, told by their names, or both."""

    schema: KeypointSchema
    shown: Prepared | None
    named: bool
    taught: bool
    """Whether a round has taught the model this kind."""

    @property
    def seeking(self) -> Prompt:
        """The prompt to find objects by: names help where nothing is shown, and once a round has taught them. Before that, names of a kind
        that the model never saw mislead more than they tell (docs/experiments.md)."""
        return replace(self, named=self.named and (self.shown is None or self.taught))

    @property
    def tight(self) -> Shots | None:
        """As in `Prepared`; None without support."""
        return self.shown.tight if self.shown is not None else None

    @property
    def share(self) -> float | None:
        """As in `Prepared`; None without support."""
        return self.shown.share if self.shown is not None else None

    def box_around(self, xy: np.ndarray, width: int, height: int) -> np.ndarray:
        """(4,) the box of an object with these points, (N, 2), in an image of that size: as far beyond them as those of the examples reach.
        Of kinds with one point: as large as the examples' are."""
        if len(self.schema) == 1:
            return box_of_points(xy, 0.5 * (self.share or ALONE) * max(width, height))
        return with_margin(xy, self.shown.margin if self.shown is not None else np.full(4, 0.1))

    @property
    def points_tell_boxes(self) -> bool:
        """Whether the points of an object tell where its box is: one point does not, nor do eyes that lie close together in a large body."""
        return self.shown is not None and len(self.schema) > 1 and bool((self.shown.margin <= FAR).all())


def support_key(weights: str, schema: KeypointSchema, support: Sequence[Example]) -> str:
    digest = hashlib.sha256(repr((weights, schema.names)).encode())
    for example in support:
        digest.update(repr((example.key or _hash(example.image), example.keypoints.to_json())).encode())
    return digest.hexdigest()


def _hash(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).data).hexdigest()


def usual_points(examples: Sequence[KeypointSet]) -> np.ndarray:
    """(K,) bool; see `Prepared.usual`."""
    usual = np.mean([e.placed for e in examples], 0) > 0.5
    return usual if usual.sum() >= 2 else np.ones(len(usual), bool)


def turned(box: np.ndarray, points: KeypointSet, size: int, degrees: float) -> Crop:
    """The crop around an example's box, turned, and as much wider as its points then need."""
    crop = crop_of_box(box, size, degrees=degrees)
    reach = np.abs(crop.to_crop(points.xy[points.placed]) / size - 0.5).max(initial=0.0)
    return crop_of_box(box, size, CROP_FACTOR * max(2 * reach, 1.0), degrees)


def usual_margin(examples: Sequence[KeypointSet], boxes: Sequence[np.ndarray]) -> np.ndarray:
    """(4,) see `Prepared.margin`. An example with a single usual point tells nothing of an extent, unless all are such."""
    usual = usual_points(examples)
    told = [(e.xy[e.placed & usual], b) for e, b in zip(examples, boxes, strict=True)]
    most = min(max(len(xy) for xy, _ in told), 2)
    return np.median([margin_of(xy, box) for xy, box in told if len(xy) >= most], 0)


def margin_of(xy: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(4,) how far a box reaches beyond points, (N ≥ 1, 2), in shares of their extent."""
    hull = box_of_points(xy)
    side = max(hull[2], hull[3], 1.0)
    reach = np.array([hull[0] - box[0], hull[1] - box[1], box[0] + box[2] - hull[0] - hull[2], box[1] + box[3] - hull[1] - hull[3]])
    return np.clip(reach / side, -0.2, 2.0)


def with_margin(xy: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """(4,) the box that reaches so far beyond points, (N ≥ 1, 2)."""
    hull = box_of_points(xy)
    side = max(hull[2], hull[3], 1.0)
    left, top, right, bottom = margin * side
    return np.array([hull[0] - left, hull[1] - top, hull[2] + left + right, hull[3] + top + bottom])
