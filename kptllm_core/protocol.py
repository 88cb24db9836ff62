"""The MP-100 protocol: which supports, which queries, in which order of keypoints. Drawing only; predicts nothing.

For each category N episodes × (shots + queries), drawn without replacement inside an episode. Each category has a
random stream of its own from the seed, so that its episodes do not depend on the other categories of the run.
Supports never share an image with a query of their episode, and never a group (the video, the person, the rig) either
if the category has more groups than shots: near-duplicates would flatter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kptllm_core.dataset import KeypointDataset, Sample, held_out, load_coco
from kptllm_core.errors import DataError
from kptllm_core.geometry import similarity_crop
from kptllm_core.imaging import cut_image, warp
from kptllm_core.keypoints import KeypointSchema, KeypointSet

BOXES = ("given", "jittered", "found")
PARTS = ("all", "train", "heldout")
CUT = 0.35  # of an object's side: that much is cut off, a point there is absent
JITTER_SHIFT = 0.1  # a jittered box is moved by up to this × max(w, h) on each axis …
JITTER_SCALE = 0.2  # … and scaled by up to e^±this


@dataclass(frozen=True, eq=False)
class Query:
    """One object to predict. `index` is its place in the category's list; it identifies the object over episodes."""

    sample: Sample
    index: int
    degrees: float  # by which the image is turned, clockwise; 0 = upright
    jitter: tuple[float, float, float]  # shift x, shift y, log scale


@dataclass(frozen=True, eq=False)
class Episode:
    """A support set and its queries. `order`: (K,) int, the shuffled order in which the keypoints are asked."""

    support: tuple[Sample, ...]
    queries: tuple[Query, ...]
    order: np.ndarray


@dataclass(frozen=True, eq=False)
class Category:
    """The objects of one kind, and those that supports are drawn from (the same ones, unless a folder was named)."""

    name: str
    schema: KeypointSchema
    samples: Sequence[Sample]
    supports: Sequence[Sample]
    empty: Sequence[Sample] = ()
    """Images without such an object, as objects without a point."""
    unseen: frozenset[str] | None = None
    """The groups of its folder that pretraining never sees; None: as if its samples were the whole folder."""

    @property
    def same_pool(self) -> bool:
        """Whether supports are drawn from the samples; the groups of a folder of its own mean nothing beside theirs."""
        return self.supports is self.samples


def load_categories(folders: Sequence[Path], support: Path | None = None) -> list[Category]:
    """The categories of COCO folders, with the supports of another folder if one is named. Raises DataError."""
    pool = _by_category(load_coco(support)) if support else {}
    found: dict[str, Category] = {}
    for folder in folders:
        data = load_coco(folder)
        unseen = frozenset(held_out(s.group for s in data.samples))
        for name, samples in _by_category(data).items():
            supports = _matching(name, samples[0].schema, pool, support) if support else samples
            key = name if name not in found else f"{folder.name}/{name}"
            if key in found:
                raise DataError(f"Category '{name}' of {folder} is given twice. Name each folder once.")
            found[key] = Category(key, samples[0].schema, samples, supports, data.empty, unseen)
    return list(found.values())


def part_of(categories: Sequence[Category], part: str) -> list[Category]:
    """The categories with `all` their objects, or with those in groups that pretraining sees (`train`) or never sees (`heldout`).

    Supports that come from a folder of their own stay. Categories of which nothing is left are dropped; DataError if none is.
    """
    if part == "all":
        return list(categories)
    found = []
    for category in categories:
        unseen = held_out(s.group for s in category.samples) if category.unseen is None else category.unseen
        samples, empty = (
            [s for s in some if (s.group in unseen) == (part == "heldout")] for some in (category.samples, category.empty)
        )
        if samples:
            found.append(replace(category, samples=samples, empty=empty, supports=samples if category.same_pool else category.supports))
    if not found:
        groups = len({s.group for c in categories for s in c.samples})
        raise DataError(
            f"--part {part} leaves no object: none of the {groups} groups of this data is in it. Use --part all, or other folders."
        )
    return found


def _by_category(data: KeypointDataset) -> dict[str, list[Sample]]:
    """The usable objects (at least one placed point) of each category of a folder."""
    found = data.by_category()
    usable = {name: [s for s in samples if s.keypoints.placed.any()] for name, samples in found.items()}
    if not any(usable.values()):
        raise DataError(
            f"{data.folder} has no object with a labelled keypoint. Expected COCO keypoints in annotations.json."
        )
    return {name: samples for name, samples in usable.items() if samples}


def _matching(name: str, schema: KeypointSchema, pool: dict[str, list[Sample]], folder: Path | None) -> list[Sample]:
    """The supports for a category: of the same name, else the only category there if it has the same points."""
    samples = pool.get(name) or (next(iter(pool.values())) if len(pool) == 1 else [])
    if not samples or not set(schema.names) & set(samples[0].schema.names):
        raise DataError(
            f"The support folder {folder} has no category '{name}' with any of its points. Found: {', '.join(pool)}."
        )
    return samples


def draw_episodes(
    category: Category, *, shots: int, episodes: int, queries: int, seed: int, rotate: bool = False
) -> list[Episode]:
    """The episodes of a category. Fewer queries where it is small; DataError where none is left beside the supports."""
    rng = stream(category.name, seed)
    samples = category.samples
    images = [identity(s.image_path) for s in samples]
    drawn = []
    for _ in range(episodes):
        support = _draw_support(category, shots, rng)
        free = _free_queries(category, images, support)
        if not free:
            spread = "images" if category.same_pool else "images that are not in the support folder"
            raise DataError(
                f"Category '{category.name}' has {len(samples)} usable objects and no query is left beside {shots} "
                f"support objects. Expected more {spread}; add data or lower --shots."
            )
        chosen = rng.choice(free, size=min(queries, len(free)), replace=False)
        drawn.append(
            Episode(
                tuple(support),
                tuple(draw_query(samples[i], int(i), rng, rotate) for i in chosen),
                rng.permutation(len(category.schema)),
            )
        )
    return drawn


def stream(name: str, seed: int) -> np.random.Generator:
    """The random numbers of one category: the same on every machine, independent of other categories."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def draw_query(sample: Sample, index: int, rng: np.random.Generator, rotate: bool) -> Query:
    """Always draws angle and jitter, so that options change neither the episodes nor each other's numbers."""
    degrees, x, y, scale = rng.uniform(-1, 1, 4) * (180.0, JITTER_SHIFT, JITTER_SHIFT, JITTER_SCALE)
    return Query(sample, index, float(degrees) if rotate else 0.0, (float(x), float(y), float(scale)))


def _draw_support(category: Category, shots: int, rng: np.random.Generator) -> list[Sample]:
    """`shots` objects, from different images while there are enough."""
    pool = category.supports
    order = rng.permutation(len(pool))
    if shots > len(pool):
        raise DataError(
            f"Category '{category.name}' has {len(pool)} objects to draw {shots} supports from. Lower --shots or add labelled images."
        )
    first_of_image = {pool[i].image_path: i for i in reversed(order)}
    spread = [i for i in order if first_of_image[pool[i].image_path] == i]
    rest = [i for i in order if first_of_image[pool[i].image_path] != i]
    return [pool[i] for i in (spread + rest)[:shots]]


def _free_queries(category: Category, images: list[tuple[int, int]], support: list[Sample]) -> list[int]:
    """Indices of the samples that may be asked beside these supports. `images`: identity of each sample's image."""
    taken = {identity(s.image_path) for s in support}
    others = [i for i, image in enumerate(images) if image not in taken]
    if not category.same_pool:
        return others
    groups = {s.group for s in support}
    apart = [i for i in others if category.samples[i].group not in groups]
    return apart or others


def identity(path: Path) -> tuple[int, int]:
    """Of the image file; hard links share it, so that a support folder cut from the data does not leak into queries."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}. Restore the image or take it out of annotations.json."
        ) from None
    return status.st_dev, status.st_ino


def shuffled(schema: KeypointSchema, order: np.ndarray) -> KeypointSchema:
    """The same schema with its points in another order; skeleton and symmetric pairs follow."""
    place = np.argsort(order)

    def moved(pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        return tuple((int(place[a]), int(place[b])) for a, b in pairs)

    return KeypointSchema(
        tuple(schema.names[i] for i in order), schema.category, moved(schema.skeleton), moved(schema.symmetric)
    )


def turn(image: np.ndarray, truth: KeypointSet, degrees: float) -> tuple[np.ndarray, KeypointSet]:
    """The image, (H, W, 3) uint8, turned clockwise on a canvas that holds all of it, and its points with it.

    The box becomes a square of side max(w, h) around the turned centre: PCK keeps its unit, and the protocol's crop
    (box → square → × 1.25) is the upright crop turned by the angle. Its hull would be larger and flatter PCK.
    """
    if degrees == 0:
        return image, truth
    height, width = image.shape[:2]
    side = int(np.ceil(np.hypot(width, height)))
    canvas = similarity_crop(np.array([width / 2, height / 2]), side, side, degrees)
    box = true_box(truth)
    size = max(box[2], box[3])
    centre = canvas.to_crop(box[:2] + box[2:] / 2)
    turned = KeypointSet(
        truth.names,
        canvas.to_crop(truth.xy),
        truth.visibility,
        truth.score,
        np.array([*(centre - size / 2), size, size]),
    )
    return warp(image, canvas), turned


def cut_off(image: np.ndarray, truth: KeypointSet, jitter: tuple[float, float, float]) -> tuple[np.ndarray, KeypointSet]:
    """The image without a third of the object (`CUT`), as at the border of a photograph; the side is drawn with the query."""
    across = abs(jitter[0]) >= abs(jitter[1])
    return cut_image(image, replace(truth, box=true_box(truth)), 0 if across else 1, jitter[0 if across else 1] < 0, CUT)

def spoilt(truth: KeypointSet) -> KeypointSet:
    """The object as somebody labels it who is one point off everywhere: each placed point at the place of the next one."""
    xy = truth.xy.copy()
    xy[truth.placed] = np.roll(xy[truth.placed], 1, axis=0)
    return KeypointSet(truth.names, xy, truth.visibility, truth.score, truth.box)


def with_box(truth: KeypointSet, image: np.ndarray) -> KeypointSet:
    """The same object with a box of some area: its own, else the padded hull of its points, as the predictor takes it.

    A single point without a box is given a tenth of the image. DataError for an object with neither box nor points.
    """
    if truth.box is not None and min(truth.box[2:]) > 0:
        return truth
    if not truth.placed.any():
        raise DataError("An object has neither a box nor a labelled point; it cannot be evaluated.")
    return replace(truth, box=truth.usable_box(image.shape[1], image.shape[0]))


def true_box(truth: KeypointSet) -> np.ndarray:
    """(4,) float64 x, y, w, h of an object that went through `with_box`."""
    assert truth.box is not None
    return np.asarray(truth.box, np.float64)


def box_handed(box: np.ndarray, how: str, jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray | None:
    """What the predictor is told of the object's place: the true box, a jittered one, or nothing (`found`)."""
    if how == "found":
        return None
    if how == "given":
        return box
    x, y, scale = jitter
    size = box[2:] * np.exp(scale)
    centre = box[:2] + box[2:] / 2 + np.array([x, y]) * max(box[2:])
    return np.concatenate([centre - size / 2, size])
