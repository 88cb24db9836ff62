"""Rendered kinds of objects with exact keypoints, as many as one likes: what pretraining learns correspondence from.

A `Category` is drawn from a seed: a random template (an animal, a chair, a leaf …) with its own proportions, markings and
way of being photographed. Its instances differ as dogs differ from dogs, while the points correspond. Left and right are
the subject's own. numpy and Pillow only; the same generator state gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import box_of_points, clip_box
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility, symmetric_pairs
from kptllm_core.synthetic import contours, creatures, faces, figures, furniture, insects, rigid
from kptllm_core.synthetic.paint import SUPER, Canvas, Look, background, finish, instance_palette, palette
from kptllm_core.synthetic.solids import Model, Shape, Template, flatten, look

__all__ = ["Category", "insect", "write_dataset"]

MIN_POINTS, MAX_POINTS = 4, 30
_FAMILIES = (  # with the share of each
    (figures.quadruped, 0.14), (figures.person, 0.09), (creatures.bird, 0.06), (creatures.fish, 0.05),
    (creatures.limbs, 0.13), (insects.insect, 0.10), (insects.crawler, 0.07), (insects.hand, 0.05),
    (furniture.composite, 0.14), (rigid.vehicle, 0.06), (rigid.tool, 0.07), (rigid.panel, 0.06),
    (contours.leaf, 0.05), (contours.wing, 0.06), (contours.outline, 0.07), (contours.butterfly, 0.04),
    (faces.face, 0.06), (faces.lips, 0.03),
)  # fmt: skip


class Category:
    """One kind of object. schema: its points; name: unique per seed. Pickles as its seed."""

    def __init__(
        self, template: Template, names: tuple[str, ...], style: Look, name: str, seed: int | None = None
    ) -> None:
        self._template, self._style, self._seed = template, style, seed
        links = template.build(np.random.default_rng(0)).links
        at = {n: i for i, n in enumerate(names)}
        skeleton = tuple(dict.fromkeys((at[a], at[b]) for a, b in links if a in at and b in at))
        self.schema = KeypointSchema(names, template.word, skeleton, symmetric_pairs(names))
        self.name = name

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Category:
        """A new kind of object."""
        return cls.from_seed(int(rng.integers(2**62)))

    @classmethod
    def from_seed(cls, seed: int) -> Category:
        """The kind of object with this number."""
        rng = np.random.default_rng(seed)
        weights = np.array([w for _, w in _FAMILIES])
        family = _FAMILIES[int(rng.choice(len(_FAMILIES), p=weights / weights.sum()))][0]
        template = family(rng)
        names = _choose_names(rng, tuple(template.build(np.random.default_rng(0)).points))
        return cls(template, names, _sample_look(rng, template), f"{template.word}_{seed % 16**8:08x}", seed)

    def __reduce__(self) -> tuple[object, tuple[int | None]]:
        return (_restore, (self._seed,))

    def render(self, rng: np.random.Generator, size: int = 192) -> tuple[np.ndarray, KeypointSet]:
        """One instance: (size, size, 3) uint8 and its points, box = the object's outline as far as it is in the image."""
        image, found = self._draw(rng, size, size, 1, (0.35, 0.9))
        return image, found[0]

    def scene(
        self, rng: np.random.Generator, width: int, height: int, count: int
    ) -> tuple[np.ndarray, list[KeypointSet]]:
        """(height, width, 3) uint8 with `count` (0…12) instances, which may overlap a little, and the points of each."""
        if not 0 <= count <= 12:
            raise InvalidInput(f"A scene holds 0 to 12 objects; asked for {count}.")
        high = 0.9 / max(count, 1) ** 0.5
        return self._draw(rng, width, height, count, (min(0.35, 0.5 * high), high))

    def _draw(
        self, rng: np.random.Generator, width: int, height: int, count: int, sizes: tuple[float, float]
    ) -> tuple[np.ndarray, list[KeypointSet]]:
        style = self._style
        angle = rng.uniform(0.1, 0.9) * np.pi
        light = np.array([np.cos(angle), -np.sin(angle)])  # from above
        behind = background(rng, width, height, style)
        canvas = Canvas(width, height)
        drawn: list[tuple[Model, np.ndarray, np.ndarray]] = []
        for index in range(count):
            model = self._template.build(rng)
            camera = look(rng, self._template.view)
            shapes = flatten(model, camera, instance_palette(rng, style), light)
            box = _bounds(shapes)
            scale = rng.uniform(*sizes) * min(width, height) / max(box[2], box[3])
            corner = _place(rng, box[2:] * scale, (width, height), [b for _, _, b in drawn], count > 1)
            shift = corner - box[:2] * scale
            canvas.shapes(shapes, scale, shift, 1 + index * 1000)
            xyz = np.stack([model.points[n][0] for n in self.schema.names])
            drawn.append((model, camera.project(xyz)[0] * scale + shift, np.concatenate([corner, box[2:] * scale])))
        for _, _, box in drawn:
            if rng.random() < style.occluders:
                canvas.occlude(
                    rng, box[:2] + rng.random(2) * box[2:], rng.uniform(0.06, 0.2) * box[2:].max(), style.grey
                )
        owner = canvas.owner()
        found = [
            self._keypoints(model, xy, box, owner, 1 + i * 1000, (width, height))
            for i, (model, xy, box) in enumerate(drawn)
        ]
        return finish(rng, canvas.compose(rng, behind, style, light), style), found

    def _keypoints(
        self, model: Model, xy: np.ndarray, box: np.ndarray, owner: np.ndarray, first: int, size: tuple[int, int]
    ) -> KeypointSet:
        """A point is visible where one of its parts, or nothing, is in front within a pixel; off the image it is not labelled."""
        state = np.full(len(xy), Visibility.NOT_LABELLED, np.int8)
        inside = np.all((xy >= 0) & (xy < size), axis=1)
        height, width = owner.shape
        for i in np.flatnonzero(inside):
            column, row = (int(v) for v in xy[i] * SUPER)
            around = owner[max(row - 2, 0) : min(row + 3, height), max(column - 2, 0) : min(column + 3, width)]
            parts = model.points[self.schema.names[i]][1]
            seen = owner[row, column] == 0 or any((around == first + p).any() for p in parts)
            state[i] = Visibility.VISIBLE if seen else Visibility.OCCLUDED
        return KeypointSet(self.schema.names, np.where(inside[:, None], xy, 0.0), state, box=clip_box(box, *size))


def _restore(seed: int | None) -> Category:
    return insect() if seed is None else Category.from_seed(seed)


def _bounds(shapes: list[Shape]) -> np.ndarray:
    return box_of_points(np.concatenate([s.layers[0].points for s in shapes]))


def _place(
    rng: np.random.Generator, size: np.ndarray, canvas: tuple[int, int], taken: list[np.ndarray], apart: bool
) -> np.ndarray:
    """Top left corner for a box of `size`: on the image, now and then cut by its edge; with others, where it overlaps least."""
    room = np.array(canvas) - size
    best, least = room / 2, np.inf
    for _ in range(12 if apart else 1):
        corner = rng.random(2) * np.maximum(room, 0) + np.minimum(room, 0) / 2
        if rng.random() < 0.1:
            corner = corner + rng.uniform(-0.25, 0.25, 2) * size
        overlap = 0.0
        for box in taken:
            side = np.minimum(corner + size, box[:2] + box[2:]) - np.maximum(corner, box[:2])
            overlap += float(np.prod(np.maximum(side, 0)))
        if overlap < least:
            best, least = corner, overlap
    return best


def _choose_names(rng: np.random.Generator, pool: tuple[str, ...]) -> tuple[str, ...]:
    """A random subset of the points, in their order; left and right stay together."""
    partner = {a: b for i, j in symmetric_pairs(pool) for a, b in ((pool[i], pool[j]), (pool[j], pool[i]))}
    want = int(rng.integers(min(MIN_POINTS + 3, len(pool)), min(len(pool), MAX_POINTS) + 1))
    chosen: set[str] = set()
    for i in rng.permutation(len(pool)):
        group = {pool[i], partner.get(pool[i], pool[i])}
        if len(chosen | group) <= MAX_POINTS:
            chosen |= group
        if len(chosen) >= want:
            break
    return tuple(n for n in pool if n in chosen)


def _sample_look(rng: np.random.Generator, template: Template) -> Look:
    """How the images of a category are taken: in a laboratory, or anywhere."""
    grey = bool(rng.random() < 0.22)
    lab = rng.random() < 0.35
    colours = palette(rng, template.colours, grey)
    if rng.random() < 0.2:  # hardly any contrast
        colours = colours.mean(0) + (colours - colours.mean(0)) * 0.35
    return Look(
        palette=colours, grey=grey, recolour=bool(rng.random() < 0.2), tint=float(rng.uniform(0.03, 0.25)),
        grain=float(rng.choice([0.0, 0.1, 0.2, 0.35])), grain_cells=float(rng.uniform(3, 16)),
        backgrounds=("plain", "ramp", "paper") if lab else ("cloud", "ramp", "plain", "stripes", "tiles", "cloud", "wood", "leaf", "sand"),
        clutter=2 if lab else 10, scene=palette(rng, 3, grey) if lab and rng.random() < 0.7 else None,
        artefacts=float(rng.uniform(0.4, 1.4)), occluders=float(rng.choice([0.1, 0.25, 0.4])),
    )  # fmt: skip


def insect() -> Category:
    """A beetle with fixed markings: the pleasant kind that the demo shows."""
    template = insects.beetle()
    names = tuple(template.build(np.random.default_rng(0)).points)
    style = Look(
        palette=np.array([[0.72, 0.16, 0.10], [0.10, 0.09, 0.10], [0.95, 0.62, 0.15], [0.20, 0.16, 0.15], [0.93, 0.9, 0.8]]),
        tint=0.10, grain=0.08, grain_cells=10.0, backgrounds=("leaf", "leaf", "paper", "wood", "sand"), clutter=0,
        scene=None, artefacts=0.3, occluders=0.05,
    )  # fmt: skip
    return Category(template, names, style, "insect")


def write_dataset(
    folder: str | Path, category: Category | str, count: int, seed: int, size: int = 384, objects: tuple[int, int] | None = None
) -> None:
    """`count` images as a COCO keypoints folder: annotations.json and images/*.jpg. The kind "insect", or a Category.

    objects: least and most objects of an image (0…12), drawn at random; None: one, which fills it. Raises InvalidInput for an
    unknown kind.
    """
    if isinstance(category, str):
        if category != "insect":
            raise InvalidInput(f"Unknown kind '{category}'. Known: insect. For others give a Category.")
        category = insect()
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number in range(1, count + 1):
        if objects is None:
            image, one = category.render(rng, size)
            found = [one]
        else:
            image, found = category.scene(rng, size, size, int(rng.integers(objects[0], objects[1] + 1)))
        file_name = f"{category.name}_{number:04d}.jpg"
        Image.fromarray(image).save(folder / "images" / file_name, quality=90)
        images.append(
            {"id": number, "file_name": file_name, "width": size, "height": size, "group": f"render_{number:04d}"}
        )
        annotations += [_annotation(points, len(annotations) + i, number) for i, points in enumerate(found, 1)]
    schema = category.schema
    kind = {"id": 1, "name": schema.category, "supercategory": "rendered", "keypoints": list(schema.names),
            "skeleton": [[a + 1, b + 1] for a, b in schema.skeleton]}  # fmt: skip
    data = {
        "info": {"description": "Rendered by kptllm_core.synthetic"},
        "images": images,
        "annotations": annotations,
        "categories": [kind],
    }
    (folder / "annotations.json").write_text(json.dumps(data), encoding="utf-8")


def _annotation(points: KeypointSet, number: int, image: int) -> dict[str, object]:
    assert points.box is not None
    placed = zip(points.xy, points.visibility, strict=True)
    flat = [v for (x, y), s in placed for v in (round(float(x), 2), round(float(y), 2), int(s))]
    box = [round(float(v), 2) for v in points.box]
    return {"id": number, "image_id": image, "category_id": 1, "keypoints": flat, "bbox": box, "iscrowd": 0,
            "num_keypoints": int(points.placed.sum()), "area": round(box[2] * box[3], 2)}  # fmt: skip
