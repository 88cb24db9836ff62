"""Ultralytics YOLO pose: data.yaml, images/ and, beside them, labels/ with a text file per image (https://docs.ultralytics.com/datasets/pose/).

    class cx cy w h  x1 y1 [v1]  x2 y2 [v2] …      one line per object; all as fractions of the image's width and height

Label Studio's YOLO export has no data.yaml: its notes.json names the classes, and the points, but these in the order of the label
config and not of the lines, which is that of model_index.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from backend.formats.labels import OCCLUDED, VISIBLE, LabelledImage, LabelledPoint, LabelledSet, LabelledThing
from kptllm_core.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
HOW = (
    "Name them in data.yaml (kpt_names: {0: [nose, left_eye, …]}) or with --names nose,left_eye,…; --names config takes the "
    "label config's own order."
)


def read_yolo(path: Path, names: list[str] | None = None) -> LabelledSet:
    """path: data.yaml, or the folder that holds it. names: of the keypoints, when data.yaml does not name them. Raises DataError."""
    file = next((p for p in (path / "data.yaml", path / "data.yml") if p.is_file()), path / "data.yaml") if path.is_dir() else path
    if not file.is_file() and (file.parent / "notes.json").is_file():
        return _read(file, _label_studio(file.parent / "notes.json", names), names)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). Expected the data.yaml of a YOLO pose data set.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no YAML: {str(error)[:200]}.") from None
    return _read(file, data, names)


def _label_studio(notes: Path, names: list[str] | None) -> dict[str, Any]:
    """The data.yaml that Label Studio's export lacks."""
    try:
        classes = {int(c["id"]): (str(c["name"]), c.get("keypoints") or []) for c in json.loads(notes.read_text(encoding="utf-8"))["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{notes} does not name classes as Label Studio's YOLO export does ({type(error).__name__} {error}).") from None
    count = max((len(points) for _, points in classes.values()), default=0)
    if not count:
        raise DataError(f"{notes} names no keypoints, so this is no export of a project with KeyPointLabels and boxes.")
    if names is None:
        raise DataError(f"{notes} does not say in which order the lines hold the {count} points: it is that of model_index in the label config. "
                        "Give it: --names config takes the label config's own order.")  # fmt: skip
    return {"names": {number: name for number, (name, _) in classes.items()}, "kpt_shape": [count, 3]}


def _read(file: Path, data: Any, names: list[str] | None) -> LabelledSet:
    if not isinstance(data, dict) or "kpt_shape" not in data:
        raise DataError(f"{file} has no kpt_shape, so it is no YOLO *pose* data set. Expected e.g. kpt_shape: [17, 3].")
    shape = data["kpt_shape"]
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape) and shape[0] > 0 and shape[1] in (2, 3)):
        raise DataError(f"{file}: kpt_shape is {shape!r}; expected [number of points, 2 or 3].")
    classes = _classes(file, data.get("names"))
    points = {number: _point_names(file, data, number, shape[0], names) for number in classes}
    images, notes, seen = [], [], set()
    for label in _label_files(file, data):
        if label.resolve() not in seen:
            seen.add(label.resolve())
            things = _things(label, classes, points, shape[1])
            if things:
                picture = _image_beside(label)
                shown = picture or label.with_suffix("")
                inside = shown.resolve().is_relative_to(file.parent.resolve())
                name = shown.resolve().relative_to(file.parent.resolve()).as_posix() if inside else shown.name
                images.append(LabelledImage(name, things, picture, relative=True))
    if not seen:
        raise DataError(f"{file}: no label files. Expected folders labels/ beside the images/ that train, val and test name.")
    if len(seen) > len(images):
        notes.append(f"{len(seen) - len(images)} label files hold no object")
    return LabelledSet(images, notes)


def _classes(file: Path, names: Any) -> dict[int, str]:
    found = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(found, dict) or not found or not all(isinstance(k, int) for k in found):
        raise DataError(f"{file}: 'names' must say what each class is called, as in names: {{0: person}}; found {str(names)[:80]}.")
    return {number: str(name) for number, name in found.items()}


def _point_names(file: Path, data: dict[str, Any], number: int, count: int, given: list[str] | None) -> list[str]:
    told = data.get("kpt_names", data.get("keypoint_names"))
    told = told.get(number) if isinstance(told, dict) else told
    names = given if given is not None else told
    if not names:
        raise DataError(f"{file} does not say what its {count} keypoints are called. {HOW}")
    if not isinstance(names, list) or len(names) != count or len(set(map(str, names))) != count:
        raise DataError(f"{file} has {count} keypoints, but {len(names)} names for them: {', '.join(map(str, names))[:200]}. {HOW}")
    return [str(name) for name in names]


def _label_files(file: Path, data: dict[str, Any]) -> list[Path]:
    """Of every split. A data set's `path` may be that of another machine: then what lies beside data.yaml counts. Where `../images` is not
    there, `images` is meant: so exports name folders that lie beside data.yaml, and so Ultralytics reads them."""
    roots = [r for r in (file.parent / str(data.get("path") or "."), file.parent) if r.is_dir()]
    found: list[Path] = []
    for part in ("train", "val", "test"):
        given = data.get(part)
        for entry in given if isinstance(given, list) else [given]:
            for root in roots if entry else ():
                place = root / str(entry)
                place = place if place.exists() else root / str(entry).removeprefix("../")
                if place.is_dir():
                    found += sorted(_labels_of(place).rglob("*.txt"))
                elif place.is_file():
                    lines = _text(place).split("\n")
                    found += [t for line in lines if line.strip() and (t := _labels_of(place.parent / line.strip()).with_suffix(".txt")).is_file()]
    return found or sorted(p for root in roots for p in (root / "labels").rglob("*.txt"))


def _labels_of(place: Path) -> Path:
    """…/images/… → …/labels/…, the last such folder, as Ultralytics does; images/ and labels/ may also lie within each split."""
    parts = list(place.parts)
    at = [n for n, part in enumerate(parts) if part == "images"]
    if at:
        parts[at[-1]] = "labels"
        return Path(*parts)
    return place / "labels" if (place / "labels").is_dir() else place


def _image_beside(label: Path) -> Path | None:
    parts = list(label.parts)
    at = [n for n, part in enumerate(parts[:-1]) if part == "labels"]
    if at:
        parts[at[-1]] = "images"
    stem = Path(*parts).with_suffix("")
    for suffix in SUFFIXES:
        for found in (stem.with_name(stem.name + suffix), stem.with_name(stem.name + suffix.upper())):
            if found.is_file():
                return found
    return None


def _things(label: Path, classes: dict[int, str], points: dict[int, list[str]], dimensions: int) -> tuple[LabelledThing, ...]:
    things = []
    for number, line in enumerate(_text(label).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{label}, line {number}"
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            raise DataError(f"{where} holds something else than numbers: {line[:80]!r}.") from None
        if not all(map(math.isfinite, values)):
            raise DataError(f"{where} holds numbers that are none.")
        kind = int(values[0])
        if kind != values[0] or kind not in classes:
            raise DataError(f"{where} is of class {line.split()[0]}; data.yaml names {', '.join(map(str, classes))}.")
        names = points[kind]
        if len(values) != 5 + dimensions * len(names):
            hint = " It holds a box only: is this a detection data set?" if len(values) == 5 else ""
            raise DataError(f"{where} has {len(values)} numbers; expected 5 + {dimensions} × {len(names)} (kpt_shape).{hint}")
        placed = {}
        for at, name in enumerate(names):
            x, y, *v = values[5 + dimensions * at : 5 + dimensions * (at + 1)]
            seen = int(v[0]) if v else VISIBLE
            if seen in (OCCLUDED, VISIBLE) and (v or x > 0 or y > 0):  # without v, (0, 0) says that there is none
                if max(x, y) > 1.5 or min(x, y) < -0.5:
                    raise DataError(f"{where}: '{name}' lies at ({x:g}, {y:g}); expected fractions of the image, 0…1, not pixels.")
                placed[name] = LabelledPoint(x, y, seen)
        cx, cy, w, h = values[1:5]
        box = (cx - w / 2, cy - h / 2, w, h) if w > 0 and h > 0 else None
        if placed or box:
            things.append(LabelledThing(placed, box, classes[kind]))
    return tuple(things)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from None
