"""Training material: a few images of one kind of object, warped and coloured at random, with their common points.

Three sources, mixed: labelled images (`Labelled`), rendered categories (`Rendered`), and any image against its own warps
(`SelfPairs`). Each yields `Episode`s of n views; every view serves as a query, with the others as its support. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from kptllm_core.dataset import Sample
from kptllm_core.errors import DataError
from kptllm_core.geometry import CROP_FACTOR, Crop, similarity_crop
from kptllm_core.imaging import PAPER, Kept, cut_image, warp
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.synthetic import Category


@dataclass(frozen=True)
class Episode:
    """n views of one kind of object with K points in common.

    images: (n, S, S, 3) uint8. xy: (n, K, 2) float32 in 0…1 of the crop. visibility: (n, K) of `Visibility`; a point that
    left the crop is ABSENT. size: (n,) longer side of the object's box as a share of the crop. names: K names, or None.
    """

    images: np.ndarray
    xy: np.ndarray
    visibility: np.ndarray
    size: np.ndarray
    names: tuple[str, ...] | None
    scene: Scene | None = None


@dataclass(frozen=True)
class Scene:
    """A whole image, or a window of one, with objects of the episode's kind, and where all of them are.

    image: (S, S, 3) uint8. boxes: (n, 4) float32 left, top, right, bottom in 0…1; n may be 0.
    """

    image: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """How views are warped and coloured. Angles in degrees."""

    upright: float = 0.5
    """Share of episodes that turn by at most 15°."""
    anyway: float = 0.2
    """Share of episodes in which each view turns by any angle; the rest turns by at most 45°."""
    loose: float = 0.25
    """Share of episodes cropped loosely, as a whole image would be."""
    colour: float = 1.0
    """Strength of colour changes, noise and blur."""
    flip: float = 0.5
    """Share of views that are mirrored, left and right names swapped."""
    cut: float = 0.2
    """Share of views that lose up to half of the object, as at the border of a photograph: points there are absent."""
    covered: float = 0.3
    """Share of views in which something lies over a part of the object: points there are occluded."""


class Source(Protocol):
    def episode(self, rng: np.random.Generator, views: int, size: int) -> Episode: ...


class Images:
    """Decoded images, the most recently used ones kept, up to `max_bytes` of them: photographs of cameras have 30 MB and more each."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self._kept = Kept(max_bytes)

    def read(self, sample: Sample) -> np.ndarray:
        key = str(sample.image_path)
        image = self._kept.find(key)
        if image is None:
            image = sample.read()
            self._kept.keep(key, image)
        return image


CROWDED = 8  # objects of a rendered scene at most
STRANGE = 0.1  # share of scenes that show another kind: nothing to be found
CLOSE = 0.4  # share of scenes that are a window around one of the objects, as a search with windows sees them
ASIDE = 0.25  # share of scenes that are such a window anywhere in the image: most of those that a search looks at show no object, or a part
INSIDE = 0.4  # of an object's box: with less of it in a window it is not asked for


class Labelled:
    """People's labels. Categories are drawn evenly in the root of their number of groups, so that persons drown nobody."""

    def __init__(self, samples: Sequence[Sample], augmentation: Augmentation, max_points: int, images: Images | None = None) -> None:
        self.kinds: list[dict[str, list[Sample]]] = []
        self.beside: dict[tuple[str, str], list[KeypointSet]] = {}
        """All objects of a kind in an image, whether or not their points are labelled."""
        for sample in samples:
            if sample.keypoints.object_box() is not None:
                self.beside.setdefault((str(sample.image_path), sample.category), []).append(sample.keypoints)
        for kind in _by_category(samples).values():
            groups: dict[str, list[Sample]] = {}
            for sample in kind:
                if sample.keypoints.placed.any():
                    groups.setdefault(sample.group, []).append(sample)
            if groups:
                self.kinds.append(groups)
        if not self.kinds:
            raise DataError("No object of these folders has a labelled point. Label some, or leave the folders out.")
        weight = np.array([min(len(g), 400) ** 0.5 for g in self.kinds])
        self.weight = weight / weight.sum()
        self.augmentation, self.max_points = augmentation, max_points
        self.images = images or Images()

    def episode(self, rng: np.random.Generator, views: int, size: int) -> Episode:
        groups = self.kinds[rng.choice(len(self.kinds), p=self.weight)]
        keys = list(groups)
        picked = [keys[i] for i in rng.choice(len(keys), views, replace=len(keys) < views)]
        samples = [groups[k][rng.integers(len(groups[k]))] for k in picked]
        pairs = [(self.images.read(s), s.keypoints) for s in samples]
        episode = make_episode(rng, pairs, samples[0].schema, size, self.augmentation, self.max_points)
        strange = len(self.kinds) > 1 and rng.random() < STRANGE
        there = self.kinds[rng.choice(len(self.kinds), p=self.weight)] if strange else groups
        shown = there[list(there)[rng.integers(len(there))]]
        one = shown[rng.integers(len(shown))]
        image = self.images.read(one)
        beside = self.beside.get((str(one.image_path), samples[0].category), [])
        boxes = [np.asarray(b.usable_box(image.shape[1], image.shape[0]), np.float64) for b in beside]
        return replace(episode, scene=make_scene(rng, image, boxes, size, self.augmentation))


class Rendered:
    """A new rendered category each time."""

    def __init__(self, augmentation: Augmentation, max_points: int) -> None:
        self.augmentation, self.max_points = augmentation, max_points

    def episode(self, rng: np.random.Generator, views: int, size: int) -> Episode:
        category = Category.sample(rng)
        pairs = [category.render(rng, size) for _ in range(views)]
        episode = make_episode(rng, pairs, category.schema, size, self.augmentation, self.max_points)
        count = int(rng.integers(0, CROWDED + 1)) if rng.random() < 0.6 else 1
        strange = rng.random() < STRANGE
        shown = Category.sample(rng) if strange else category
        width, height = (int(size * f) for f in rng.uniform(1.0, 1.8, 2))
        image, found = shown.scene(rng, width, height, count)
        boxes = [] if strange else [b for b in (f.object_box() for f in found) if b is not None]
        return replace(episode, scene=make_scene(rng, image, boxes, size, self.augmentation))


class SelfPairs:
    """Any image against its own warps: points are drawn at random where the image has structure; they have no names."""

    def __init__(self, samples: Sequence[Sample], augmentation: Augmentation, max_points: int, images: Images | None = None) -> None:
        self.samples = list(samples)
        self.augmentation = replace(augmentation, upright=0.2, anyway=0.4, flip=0.0)
        self.max_points = max_points
        self.images = images or Images()

    def episode(self, rng: np.random.Generator, views: int, size: int) -> Episode:
        if self.samples and rng.random() < 0.6:
            image = self.images.read(self.samples[rng.integers(len(self.samples))])
        else:
            image = Category.sample(rng).render(rng, size)[0]
        height, width = image.shape[:2]
        side = min(height, width)
        window = side * rng.uniform(0.5, 1.0)
        corner = np.array([rng.uniform(0, width - window), rng.uniform(0, height - window)])
        count = int(rng.integers(4, self.max_points + 1))
        xy = structured_points(rng, image, corner, window, count)
        schema = KeypointSchema(tuple(f"point {i}" for i in range(count)))
        points = KeypointSet(schema.names, xy, np.full(count, Visibility.VISIBLE), box=np.array([*corner, window, window]))
        episode = make_episode(rng, [(image, points)] * views, schema, size, self.augmentation, self.max_points, bend=True)
        return replace(episode, names=None)


def make_episode(rng: np.random.Generator, pairs: Sequence[tuple[np.ndarray, KeypointSet]], schema: KeypointSchema, size: int,
                 augmentation: Augmentation, max_points: int, bend: bool = False) -> Episode:  # fmt: skip
    """Crops, warps and colours each (image, keypoints) and keeps at most `max_points` points, in a random order."""
    draw = rng.random()
    reach = 15.0 if draw < augmentation.upright else 180.0 if draw > 1 - augmentation.anyway else 45.0
    factor = rng.uniform(1.3, 2.6) if rng.random() < augmentation.loose else CROP_FACTOR
    mirror, paired = schema.mirror(), bool(schema.symmetric)
    together = not paired and rng.random() < augmentation.flip / 2
    tint = _tint(rng, augmentation.colour)
    images, places, states, sizes = [], [], [], []
    for image, points in pairs:
        if rng.random() < augmentation.cut:
            image, points = _cut(rng, image, points)
        flip = together or (paired and rng.random() < augmentation.flip)
        box = np.asarray(points.usable_box(image.shape[1], image.shape[0]), np.float64)
        crop = _random_crop(rng, box, size, factor, rng.uniform(-reach, reach), flip)
        picture = warp(image, crop)
        xy = crop.to_crop(points.xy)
        if bend and rng.random() < 0.6:
            picture, xy = _bend(rng, picture, xy)
        visibility = points.visibility.copy()
        if rng.random() < augmentation.covered:
            picture, hidden = _cover(rng, picture, xy)
            visibility[hidden & points.placed] = Visibility.OCCLUDED
        images.append(_colour(rng, picture, tint, augmentation.colour))
        if flip and paired:
            xy, visibility = xy[mirror], visibility[mirror]
        outside = ((xy < 0) | (xy >= size)).any(1) & ((visibility == Visibility.VISIBLE) | (visibility == Visibility.OCCLUDED))
        visibility[outside] = Visibility.ABSENT
        places.append(np.clip(xy / size, 0, 1))
        states.append(visibility)
        sizes.append(max(box[2], box[3]) * crop.scale / size)
    xy, visibility = np.stack(places).astype(np.float32), np.stack(states)
    seen = ((visibility == Visibility.VISIBLE) | (visibility == Visibility.OCCLUDED)).sum(0)
    order = rng.permutation(len(schema))
    order = order[np.argsort(seen[order] == 0, kind="stable")][:max_points]
    names = None if together else tuple(schema.names[i] for i in order)
    return Episode(np.stack(images), xy[:, order], visibility[:, order], np.array(sizes, np.float32), names)


def make_scene(rng: np.random.Generator, image: np.ndarray, boxes: Sequence[np.ndarray], size: int, augmentation: Augmentation) -> Scene:
    """The whole image, or a window around one of its objects or aside, a little turned and coloured, with the boxes that it still holds."""
    height, width = image.shape[:2]
    window, factor = np.array([0.0, 0.0, width, height]), rng.uniform(0.8, 1.15)
    draw = rng.random()
    if len(boxes) and draw < CLOSE + ASIDE:
        window = np.array(boxes[int(rng.integers(len(boxes)))], np.float64)
        if draw < ASIDE:
            window[:2] = rng.random(2) * np.maximum([width, height] - window[2:], 0)
        factor = min(rng.uniform(1.5, 5.0), 1.2 * max(width, height) / max(window[2:].max(), 1.0))
    crop = _random_crop(rng, window, size, factor, rng.uniform(-10, 10), rng.random() < augmentation.flip)
    picture = _colour(rng, warp(image, crop), _tint(rng, augmentation.colour), augmentation.colour)
    kept = []
    for x, y, w, h in boxes:
        corners = crop.to_crop(np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])) / size
        whole = np.concatenate([corners.min(0), corners.max(0)])
        left = np.clip(whole, 0, 1)
        if np.prod(left[2:] - left[:2]) >= INSIDE * max(float(np.prod(whole[2:] - whole[:2])), 1e-9):
            kept.append(left)
    return Scene(picture, np.array(kept, np.float32).reshape(-1, 4))


def structured_points(rng: np.random.Generator, image: np.ndarray, corner: np.ndarray, window: float, count: int) -> np.ndarray:
    """(count, 2) points in a window, drawn by the strength of the image's gradient."""
    tries = corner + rng.random((count * 6, 2)) * window * 0.98
    column, row = np.clip(tries.astype(int).T, 1, [[image.shape[1] - 2], [image.shape[0] - 2]])
    grey = image.astype(np.int32).sum(2)
    strength = np.abs(grey[row, column + 1] - grey[row, column - 1]) + np.abs(grey[row + 1, column] - grey[row - 1, column]) + 8.0
    return tries[rng.choice(len(tries), count, replace=False, p=strength / strength.sum())]


def _random_crop(rng: np.random.Generator, box: np.ndarray, size: int, factor: float, degrees: float, flip: bool) -> Crop:
    side = max(box[2], box[3], 1.0) * factor * np.exp(rng.uniform(-0.15, 0.15))
    room = max(factor - 1.0, 0.05) * 0.4 * max(box[2], box[3])
    centre = box[:2] + box[2:] / 2 + rng.uniform(-room, room, 2)
    crop = similarity_crop(centre, side, size, degrees)
    squeeze = np.diag(np.exp(rng.uniform(-0.12, 0.12, 2))) + np.array([[0, rng.uniform(-0.1, 0.1)], [0, 0]])
    if flip:
        squeeze = squeeze @ np.diag([-1.0, 1.0])
    linear = squeeze @ crop.matrix[:, :2]
    shift = np.array([size / 2, size / 2]) - linear @ centre
    return Crop(np.concatenate([linear, shift[:, None]], 1), size)


def _bend(rng: np.random.Generator, image: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves the picture along a smooth random field; points move with it. xy in pixels."""
    size = image.shape[0]
    waves = [(rng.uniform(0.5, 1.6, 2) * 2 * np.pi / size, rng.uniform(0, 2 * np.pi), rng.uniform(-0.035, 0.035, 2) * size) for _ in range(3)]

    def field(p: np.ndarray) -> np.ndarray:
        """Where the content of a new position comes from."""
        return p + sum(np.sin(p @ k + phase)[..., None] * reach for k, phase, reach in waves)

    step = size // 8
    mesh = []
    for top in range(0, size, step):
        for left in range(0, size, step):
            low, high = min(top + step, size), min(left + step, size)
            quad = field(np.array([[left, top], [left, low], [high, low], [high, top]], np.float64))
            mesh.append(((left, top, high, low), tuple(quad.flatten())))
    bent = Image.fromarray(image).transform((size, size), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=PAPER)
    new = xy.copy()
    for _ in range(8):  # fixed-point inversion: field(new) = xy
        new = new + (xy - field(new))
    return np.asarray(bent), new


def _cut(rng: np.random.Generator, image: np.ndarray, points: KeypointSet) -> tuple[np.ndarray, KeypointSet]:
    """Up to half of the object cut off; as it was where that would leave no point."""
    if points.object_box() is None or min(image.shape[:2]) < 8:
        return image, points
    box = points.usable_box(image.shape[1], image.shape[0])
    cut = cut_image(image, replace(points, box=box), int(rng.integers(2)), bool(rng.integers(2)), rng.uniform(0.15, 0.5))
    return cut if cut[1].placed.any() else (image, points)


def _cover(rng: np.random.Generator, image: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle of one colour, of noise, or of another part of the picture over it; (K,) bool: which points lie under it."""
    size = image.shape[0]
    sides = (size * rng.uniform(0.08, 0.4, 2)).astype(int)
    (row, column), (from_row, from_column) = rng.integers(0, size - sides), rng.integers(0, size - sides)
    draw = rng.random()
    patch: np.ndarray = rng.integers(0, 256, 3, np.uint8)
    if draw < 0.3:
        patch = image[from_row : from_row + sides[0], from_column : from_column + sides[1]].copy()
    elif draw < 0.5:
        patch = np.clip(patch + rng.normal(0, 40, (*sides, 1)), 0, 255).astype(np.uint8)
    covered = image.copy()
    covered[row : row + sides[0], column : column + sides[1]] = patch
    low = np.array([column, row])
    return covered, ((xy >= low) & (xy < low + sides[::-1])).all(1)


def _tint(rng: np.random.Generator, strength: float) -> np.ndarray:
    """A change of colour that all views of an episode share: a camera's."""
    return np.exp(rng.normal(0, 0.1 * strength, 3))


def _colour(rng: np.random.Generator, image: np.ndarray, tint: np.ndarray, strength: float) -> np.ndarray:
    if strength <= 0:
        return image
    x = image.astype(np.float32) / 255
    if rng.random() < 0.1 * strength:
        x = np.repeat(x.mean(2, keepdims=True), 3, 2)
    x = x ** np.float32(np.exp(rng.normal(0, 0.2 * strength)))
    mean = x.mean()
    x = (x - mean) * np.float32(np.exp(rng.normal(0, 0.2 * strength))) + mean + np.float32(rng.normal(0, 0.06 * strength))
    x = x * (tint * np.exp(rng.normal(0, 0.06 * strength, 3))).astype(np.float32)
    if rng.random() < 0.2 * strength:
        x = x + rng.normal(0, rng.uniform(0.005, 0.04), x.shape[:2]).astype(np.float32)[..., None]
    image = (np.clip(x, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.15 * strength:
        small = max(int(image.shape[0] * rng.uniform(0.4, 0.8)), 8)
        picture = Image.fromarray(image)
        image = np.asarray(picture.resize((small, small), Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BILINEAR))
    return image


def _by_category(samples: Sequence[Sample]) -> dict[tuple[str, tuple[str, ...]], list[Sample]]:
    found: dict[tuple[str, tuple[str, ...]], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.category, sample.schema.names), []).append(sample)
    return found
