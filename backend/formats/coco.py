"""COCO keypoints: one JSON file with images, annotations and categories (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backend.formats.labels import OCCLUDED, VISIBLE, LabelledImage, LabelledPoint, LabelledSet, LabelledThing
from kptllm_core.errors import DataError


def read_coco(path: Path) -> LabelledSet:
    """path: the JSON file, or a folder that holds annotations.json. Raises DataError.

    `v` is 0 for a point that is not labelled, 1 for a hidden one, 2 for a visible one; any other means that there is none. An object may
    have a box alone. Images are looked for beside the file and in `images/` there.
    """
    file = path / "annotations.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). Expected a JSON file with COCO keypoints.") from None
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}. Expected COCO keypoints.") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("images", "annotations", "categories")):
        raise DataError(f"{file} has no lists 'images', 'annotations' and 'categories'. Expected COCO keypoints.")
    try:
        names = {c["id"]: (str(c.get("name") or ""), [str(n) for n in c["keypoints"]]) for c in data["categories"] if c.get("keypoints")}
        if not names:
            raise DataError(f"{file}: no category has 'keypoints'. Export *keypoints* from the tool that wrote it, not boxes or masks.")
        things: dict[Any, list[LabelledThing]] = {}
        without = 0
        for annotation in data["annotations"]:
            thing = _thing(file, annotation, names) if annotation.get("category_id") in names and not annotation.get("iscrowd") else None
            if thing is None or not (thing.points or thing.box):
                without += 1
            else:
                things.setdefault(annotation["image_id"], []).append(thing)
        images = [_image(file, image, things.pop(image["id"])) for image in data["images"] if image["id"] in things]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is not COCO keypoints: {type(error).__name__} {error}.") from None
    notes = [f"{without} annotations are crowds, of categories without keypoints, or have neither a point nor a box"] if without else []
    if {p.visibility for image in images for thing in image.things for p in thing.points.values()} == {OCCLUDED}:
        notes.append("every point has v=1, which was read as hidden, as COCO means it (2 is visible)")
    if things:
        notes.append(f"{len(things)} images that annotations name are not among 'images' (id {', '.join(map(str, list(things)[:3]))} …)")
    return LabelledSet(images, notes)


def coco_of(categories: dict[str, tuple[list[str], list[tuple[int, int]]]], images: Iterable[LabelledImage]) -> dict[str, Any]:
    """The inverse of `read_coco`: objects with points or a box → COCO's JSON. categories: name → points in order, pairs of their
    indices that are joined. Every image needs its size; a box that is missing is the hull of the points."""
    numbers = {name: number for number, name in enumerate(categories, 1)}
    found: dict[str, Any] = {"images": [], "annotations": [], "categories": [
        {"id": numbers[name], "name": name, "supercategory": "", "keypoints": points, "skeleton": [[a + 1, b + 1] for a, b in pairs]}
        for name, (points, pairs) in categories.items()
    ]}  # fmt: skip
    for number, image in enumerate(images, 1):
        width, height = image.size or (0, 0)
        found["images"].append({"id": number, "file_name": image.name, "width": width, "height": height})
        for thing in image.things:
            points = [thing.points.get(name) for name in categories[thing.category][0]]
            xs, ys = ([getattr(p, axis) for p in points if p] for axis in ("x", "y"))
            x, y, w, h = thing.box or (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
            flat = [value for p in points for value in ((round(p.x, 3), round(p.y, 3), p.visibility) if p else (0, 0, 0))]
            found["annotations"].append({
                "id": len(found["annotations"]) + 1, "image_id": number, "category_id": numbers[thing.category], "iscrowd": 0,
                "keypoints": flat, "num_keypoints": len(xs), "bbox": [round(v, 3) for v in (x, y, w, h)], "area": round(w * h, 3),
            })  # fmt: skip
    return found


def _thing(file: Path, annotation: dict[str, Any], names: dict[Any, tuple[str, list[str]]]) -> LabelledThing:
    category, points = names[annotation["category_id"]]
    numbers = annotation.get("keypoints") or []
    where = f"{file}: annotation {annotation.get('id')}"
    if len(numbers) not in (0, 3 * len(points)):
        raise DataError(f"{where} has {len(numbers)} numbers under 'keypoints'; expected 3 × {len(points)} (x, y, v for each point).")
    placed = {}
    for at, name in enumerate(points if numbers else ()):
        x, y, v = (float(n) for n in numbers[3 * at : 3 * at + 3])
        if v in (OCCLUDED, VISIBLE):
            if not (math.isfinite(x) and math.isfinite(y)):
                raise DataError(f"{where}: '{name}' lies at ({x}, {y}), which is no place.")
            placed[name] = LabelledPoint(x, y, int(v))
    box = [float(n) for n in annotation.get("bbox") or ()]
    usable = len(box) == 4 and all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0
    return LabelledThing(placed, (box[0], box[1], box[2], box[3]) if usable else None, category)


def _image(file: Path, image: dict[str, Any], things: list[LabelledThing]) -> LabelledImage:
    name = str(image["file_name"]).replace("\\", "/")
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    found = [p for p in (file.parent / name, file.parent / "images" / name) if inside and p.is_file()]
    size = (int(image["width"]), int(image["height"])) if image.get("width") and image.get("height") else None
    return LabelledImage(name, tuple(things), found[0] if found else None, size)
