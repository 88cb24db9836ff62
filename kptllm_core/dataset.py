"""COCO keypoints on disk → samples. A folder holds `annotations.json` and `images/`. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kptllm_core.errors import DataError, ImageError, InvalidInput, TooLarge
from kptllm_core.imaging import image_size, read_image
from kptllm_core.keypoints import KeypointSchema, KeypointSet, symmetric_pairs
from kptllm_core.store import write_json


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated object in one image."""

    image_path: Path
    image_id: int | str
    width: int
    height: int
    schema: KeypointSchema
    keypoints: KeypointSet
    """In pixels; its box is the annotation's."""
    group: str
    """Split key: samples of one group (a video, a person, a specimen) never stand on both sides of a split."""

    @property
    def category(self) -> str:
        return self.schema.category

    def read(self) -> np.ndarray:
        """(H, W, 3) uint8. An error names the file."""
        try:
            return read_image(self.image_path)
        except (ImageError, TooLarge) as error:
            raise type(error)(f"{self.image_path.name}: {error.message}") from None

    def check(self) -> None:
        """Raises what `read` would, from the file's header alone."""
        try:
            image_size(self.image_path.read_bytes())
        except OSError as error:
            raise ImageError(f"Cannot read the image {self.image_path}: {error.strerror or error}.") from None
        except (ImageError, TooLarge) as error:
            raise type(error)(f"{self.image_path.name}: {error.message}") from None


@dataclass(frozen=True)
class KeypointDataset:
    """The samples of one folder."""

    folder: Path
    samples: list[Sample]
    empty: list[Sample]
    """Images on which no object is annotated, as objects without a point; none where the folder has several categories."""

    def __len__(self) -> int:
        return len(self.samples)

    def by_category(self) -> dict[str, list[Sample]]:
        """Samples of each category, in file order."""
        found: dict[str, list[Sample]] = {}
        for sample in self.samples:
            found.setdefault(sample.category, []).append(sample)
        return found

    @property
    def schema(self) -> KeypointSchema:
        """The schema of a folder with one category; DataError if there are several."""
        schemas = {s.schema.category: s.schema for s in self.samples}
        if len(schemas) != 1:
            raise DataError(f"{self.folder} has {len(schemas)} categories ({', '.join(schemas) or 'none'}); expected one.")
        return next(iter(schemas.values()))


def held_out(groups: Iterable[str]) -> set[str]:
    """The groups of a set that pretraining never sees, so that naming can be measured on training categories.

    A tenth of them, chosen by their hashes; of ten or more at least one.
    """
    order = {g: int(hashlib.sha256(g.encode()).hexdigest(), 16) for g in groups}
    chosen = {g for g, number in order.items() if number % 10 == 0}
    return chosen or ({min(order, key=order.__getitem__)} if len(order) >= 10 else set())


def load_coco(folder: str | Path) -> KeypointDataset:
    """Reads `folder/annotations.json`. DataError says what is wrong in the file, and where.

    COCO's v is read as `Visibility`: 0 not labelled, 1 occluded, 2 visible, and (ours) 3 absent. Skeletons are 1-based.
    """
    folder = Path(folder)
    path = folder / "annotations.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder} has no annotations.json. Expected a folder with annotations.json (COCO keypoints) and images/.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON: {error}.") from None
    try:
        schemas = {c["id"]: _placed(folder, f"category {c.get('name')}", schema_of_category, c) for c in data["categories"] if c.get("keypoints")}
        images = {i["id"]: i for i in data["images"]}
        usable = [a for a in data["annotations"] if not a.get("iscrowd") and a.get("keypoints")]
        samples = [_placed(folder, f"annotation {a.get('id')}", _sample, folder, a, images, schemas) for a in usable]
        annotated = {a["image_id"] for a in data["annotations"]}
        bare = [] if len(schemas) != 1 else [i for i in images if i not in annotated]
        empty = [_placed(folder, f"image {i}", _sample, folder, _nothing(images[i], schemas), images, schemas) for i in bare]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is not COCO keypoints: {type(error).__name__} {error}. "
                        "Expected images, annotations, categories with 'keypoints'.") from None  # fmt: skip
    if not schemas:
        raise DataError(f"{path}: no category has 'keypoints'.")
    return KeypointDataset(folder, samples, empty)


def far_outside(points: KeypointSet, width: int, height: int) -> bool:
    """Whether a point cannot belong to an image of that size (0: not known): a mistake in the file, not an object that its border cuts."""
    reach = 2 * max(width, height)
    return bool(reach and points.placed.any() and np.abs(points.xy[points.placed]).max() > reach)


def schema_of_category(category: dict[str, Any]) -> KeypointSchema:
    """A COCO category → schema. Left/right pairs come from `symmetric` (ours, 1-based as the skeleton), else from the names."""
    names = tuple(str(n) for n in category["keypoints"])
    skeleton = tuple((int(a) - 1, int(b) - 1) for a, b in category.get("skeleton") or ())
    told = category.get("symmetric")
    pairs = symmetric_pairs(names) if told is None else tuple((int(a) - 1, int(b) - 1) for a, b in told)
    return KeypointSchema(names, str(category.get("name", "object")), skeleton, pairs)


def write_coco(folder: Path, schema: KeypointSchema, items: Iterable[tuple[str, int, int, KeypointSet, str]]) -> None:
    """The inverse of `load_coco` for one category, so an object without a box gets none. items: (file name, width, height, keypoints,
    group), one for each object."""
    images, annotations = [], []
    for number, (name, width, height, points, group) in enumerate(items, 1):
        images.append({"id": number, "file_name": name, "width": width, "height": height, "group": group})
        points = points.reorder(schema.names)
        flat = [round(float(v), 3) for row, s in zip(points.xy, points.visibility, strict=True) for v in (*row, int(s))]
        box = {} if points.box is None else {"bbox": [round(float(v), 3) for v in points.box], "area": float(np.prod(points.box[2:]))}
        annotations.append({"id": number, "image_id": number, "category_id": 1, "keypoints": flat, "iscrowd": 0,
                            "num_keypoints": int(points.placed.sum()), **box})  # fmt: skip
    skeleton, symmetric = ([[a + 1, b + 1] for a, b in pairs] for pairs in (schema.skeleton, schema.symmetric))
    category = {"id": 1, "name": schema.category, "keypoints": list(schema.names), "skeleton": skeleton, "symmetric": symmetric}
    write_json(folder / "annotations.json", {"images": images, "annotations": annotations, "categories": [category]})


def _placed(folder: Path, where: str, read: Callable[..., Any], *material: Any) -> Any:
    """Calls `read`; what is wrong with the material is said with its place."""
    try:
        return read(*material)
    except DataError:
        raise
    except (InvalidInput, ValueError) as error:
        raise DataError(f"{folder}: {where}: {error}") from None


def _nothing(image: dict[str, Any], schemas: dict[Any, KeypointSchema]) -> dict[str, Any]:
    """An annotation of the whole image, of the only category, without a point."""
    ((kind, schema),) = schemas.items()
    box = [0, 0, image.get("width") or 1, image.get("height") or 1]
    return {"image_id": image["id"], "category_id": kind, "keypoints": [0] * (3 * len(schema)), "bbox": box}


def _sample(folder: Path, annotation: dict[str, Any], images: dict[Any, dict[str, Any]], schemas: dict[Any, KeypointSchema]) -> Sample:
    schema = schemas.get(annotation["category_id"])
    image = images.get(annotation["image_id"])
    if schema is None or image is None:
        raise DataError(f"{folder}: annotation {annotation.get('id')} names an unknown image or category.")
    values = np.asarray(annotation["keypoints"], np.float64)
    if values.size != 3 * len(schema):
        raise DataError(f"{folder}: annotation {annotation.get('id')} has {values.size} numbers; expected 3 × {len(schema)} (x, y, v).")
    values = values.reshape(-1, 3)
    box = annotation.get("bbox")
    usable = box is not None and len(box) == 4 and box[2] > 0 and box[3] > 0
    points = KeypointSet(schema.names, values[:, :2], values[:, 2].astype(np.int8), box=np.asarray(box) if usable else None)
    width, height = int(image.get("width", 0)), int(image.get("height", 0))
    if far_outside(points, width, height):
        raise DataError(f"{folder}: annotation {annotation.get('id')} has a point far outside its image of {width} × {height} pixels.")
    path = folder / "images" / str(image["file_name"])
    if ".." in path.parts[len(folder.parts) :] or Path(str(image["file_name"])).is_absolute():
        raise DataError(f"{folder}: the file name {image['file_name']!r} leaves the folder images/.")
    return Sample(path, image["id"], width, height, schema, points, str(image.get("group", image["id"])))
