"""`python -m backend export`: what people labelled in a Label Studio project, as COCO keypoints.

Label Studio's own COCO export writes all keypoints of an image as one object, where several then overwrite each other, in whole
pixels, and without the hidden ones. Its YOLO export keeps objects apart (by the parents of the points), so there is none here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from backend.formats.coco import coco_of
from backend.formats.labels import LabelledImage, LabelledPoint, LabelledThing
from backend.images import local_file
from backend.intake import annotation_row
from backend.services import Services
from backend.settings import Settings
from kptllm_core.errors import InvalidInput, KptError
from kptllm_core.imaging import image_size
from label_config.annotations import DrawnBox, ReadResult, read_result, told_size
from label_config.schema import KeypointControl, LabelConfig, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command. Everything else comes from the backend's environment variables."""
    parser.description = (
        "Writes what people labelled in a Label Studio project as COCO keypoints: every object with its own box and points, in the order of "
        "model_index; boxes with several labels become as many categories. Of several annotations of a task the ground truth counts, else the "
        "newest. Needs the same environment variables as the backend."
    )
    parser.add_argument("path", type=Path, help="the JSON file to write; images are named as Label Studio's own exports name them")
    parser.add_argument("--images", type=Path, metavar="DIR", help="also put the images there, under these names: SET/images beside "
                        "SET/annotations.json makes a folder for `python -m kptllm_core train --lora --data SET`")  # fmt: skip
    parser.add_argument("--project", type=int, required=True, help="the project's number, as in /projects/7/")


def run(args: argparse.Namespace) -> int:
    """0 when all labels were written, 1 when some, or the sizes of their images, are not clear; those are told."""
    part = args.path.with_name(f"{args.path.name}.part")
    try:
        args.path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise InvalidInput(f"Nothing can be written to {args.path}: {error.strerror}. Choose another place.") from None
    services = Services.make(Settings.from_env())
    try:
        if not services.has_token:
            raise InvalidInput("Label Studio wants a token: set LABEL_STUDIO_API_KEY (a personal access token) as for the backend.")
        config = parse(str(services.label_studio.project(args.project).get("label_config") or ""))
        problems: list[str] = []
        images = list(labelled_images(services, args.project, config, problems, args.images))
    finally:
        services.journal.close()
    categories = {name: (list(c.labels), list(c.schema.skeleton)) for name, c in _categories(_kinds(config), images).items()}
    part.write_text(json.dumps(coco_of(categories, images)), encoding="utf-8")
    part.replace(args.path)
    print(f"{args.path}: {len(images)} images with {sum(len(image.things) for image in images)} objects.")
    if len(config.controls) > 1 and any(c.box and len(c.box.labels) > 1 for c in config.controls):
        print("– The labels of boxes are not written: with several KeyPointLabels a category says whose points an object has.")
    for problem in problems:
        print(f"– {problem}.")
    return 1 if problems else 0


def labelled_images(services: Services, project: int, config: LabelConfig, problems: list[str],
                    folder: Path | None = None) -> Iterator[LabelledImage]:  # fmt: skip
    """Every labelled task's image with its objects, also those with a box alone and images without any. `problems` gets what is not clear,
    in words. folder: where copies of the images go, if anywhere."""
    controls = _kinds(config)
    taken: dict[str, str] = {}  # name → address
    unseen: list[str] = []  # images of which only the annotation tells the size
    for task in services.label_studio.tasks(project, annotated=True):
        number = int(task["id"])
        rows = [annotation_row(str(project), a, number, config) for a in task.get("annotations") or []]
        counted = sorted((r for r in rows if r.counts), key=lambda r: (r.ground_truth, r.updated_us, r.annotation))
        if not counted:
            continue
        result = counted[-1].result
        read: dict[str, dict[str, ReadResult]] = {}  # address → kind → what it has of that kind
        sizes: dict[str, tuple[int, int]] = {}
        files: dict[str, bytes] = {}
        for kind, control in controls.items():
            url = control.image_of(task["data"])
            if not url:
                continue
            try:
                if url not in sizes:
                    files[url] = services.images.fetch(url, number)
                    sizes[url] = image_size(files[url])
            except KptError as error:
                told = told_size(control, result)
                if told is None:
                    problems.append(f"task {number}: the size of its image is not to be had, so it is left out: {error.message}")
                    continue
                sizes[url] = told
                unseen.append(f"task {number}: {error.message.rstrip('.')}")
            read.setdefault(url, {})[kind] = read_result(control, result, *sizes[url])
            problems += [f"task {number}: {problem}" for problem in read[url][kind].problems]
        for url, kinds in read.items():
            path = _path(url)
            # another image of that name: its folders tell them apart, its task, or a number
            names = chain((path.name, str(path), f"{number}-{path.name}"), (f"{number}-{i}-{path.name}" for i in count(2)))
            name = next(n for n in names if n.strip(".") and taken.setdefault(n, url) == url)
            if folder is not None and url in files:
                _write(folder / name, files[url])
            yield LabelledImage(name, tuple(_things(kinds, controls)), size=sizes[url])
    if unseen:
        problems.append(f"{len(unseen)} images could not be fetched, so the sizes that their annotations state were taken, for example {unseen[0]}")


def _path(url: str) -> PurePosixPath:
    """The file in an address, whose name is what Label Studio's own exports call it; local files tell theirs in the query."""
    path = PurePosixPath((local_file(url) or unquote(urlsplit(url).path)).lstrip("/"))
    return PurePosixPath(*(part for part in path.parts if part != ".."))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}. Choose another --images.") from None


def _kinds(config: LabelConfig) -> dict[str, KeypointControl]:
    """Category → control. Controls whose objects are called the same are told apart by their names."""
    kinds = [c.schema.category for c in config.controls]
    return {k if kinds.count(k) == 1 else f"{k} ({c.from_name})": c for k, c in zip(kinds, config.controls, strict=True)}


def _box_labels(controls: dict[str, KeypointControl]) -> tuple[str, ...]:
    """The labels of boxes, where these are the categories: of the only control, if it has several. Of several controls `import` tells by
    the category which one an object belongs to."""
    found = [c.box.labels for c in controls.values() if c.box]
    return found[0] if found and len(controls) == 1 and len(found[0]) > 1 else ()


def _categories(controls: dict[str, KeypointControl], images: list[LabelledImage]) -> dict[str, KeypointControl]:
    """Every category → control. Beside the labels of boxes the control's own is there only if an object without such a label is."""
    labels, used = _box_labels(controls), {thing.category for image in images for thing in image.things}
    return {name: c for kind, c in controls.items() for name in (*labels, kind) if not labels or name in labels or name in used}


def _things(kinds: dict[str, ReadResult], controls: dict[str, KeypointControl]) -> Iterator[LabelledThing]:
    """The objects of one image. A box that several kinds may use is an object by itself only where none of them has points in it."""
    held = {found.box.region_id for read in kinds.values() for found in read.objects if found.box}
    labels = _box_labels(controls)

    def category(kind: str, box: DrawnBox | None) -> str:
        return box.label if box and box.label in labels else kind

    for kind, read in kinds.items():
        for found in read.objects:
            rows = zip(controls[kind].labels, found.keypoints.xy.astype(float), found.keypoints.visibility, found.keypoints.placed, strict=True)
            points = {label: LabelledPoint(float(xy[0]), float(xy[1]), int(v)) for label, xy, v, placed in rows if placed}
            yield LabelledThing(points, _four(found.box.box) if found.box else None, category(kind, found.box))
        yield from (LabelledThing({}, _four(box.box), category(kind, box)) for box in read.boxes if box.region_id not in held)
        held |= {box.region_id for box in read.boxes}


def _four(box: Any) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in box)
    return x, y, w, h
