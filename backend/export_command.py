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
from label_config.annotations import ReadResult, read_result
from label_config.schema import KeypointControl, LabelConfig, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command. Everything else comes from the backend's environment variables."""
    parser.description = (
        "Writes what people labelled in a Label Studio project as COCO keypoints: every object with its own box and points, in the order of "
        "model_index. Of several annotations of a task the ground truth counts, else the newest. Needs the same environment variables as "
        "the backend."
    )
    parser.add_argument("path", type=Path, help="the JSON file to write; images are named as Label Studio's own exports name them")
    parser.add_argument("--project", type=int, required=True, help="the project's number, as in /projects/7/")


def run(args: argparse.Namespace) -> int:
    """0 when all labels were written, 1 when some are not clear; those are told."""
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
        images = list(labelled_images(services, args.project, config, problems))
    finally:
        services.journal.close()
    categories = {kind: (list(c.labels), list(c.schema.skeleton)) for kind, c in _kinds(config).items()}
    part.write_text(json.dumps(coco_of(categories, images)), encoding="utf-8")
    part.replace(args.path)
    print(f"{args.path}: {len(images)} images with {sum(len(image.things) for image in images)} objects.")
    for problem in problems:
        print(f"– {problem}.")
    return 1 if problems else 0


def labelled_images(services: Services, project: int, config: LabelConfig, problems: list[str]) -> Iterator[LabelledImage]:
    """Every labelled task's image with its objects, also those with a box alone and images without any. `problems` gets what is not clear,
    in words."""
    controls = _kinds(config)
    taken: dict[str, str] = {}  # name → address
    for task in services.label_studio.tasks(project, annotated=True):
        number = int(task["id"])
        rows = [annotation_row(str(project), a, number, config) for a in task.get("annotations") or []]
        counted = sorted((r for r in rows if r.counts), key=lambda r: (r.ground_truth, r.updated_us, r.annotation))
        if not counted:
            continue
        result = counted[-1].result
        read: dict[str, dict[str, ReadResult]] = {}  # address → kind → what it has of that kind
        sizes: dict[str, tuple[int, int]] = {}
        for kind, control in controls.items():
            url = control.image_of(task["data"])
            if not url:
                continue
            try:
                if url not in sizes:
                    sizes[url] = _size(result, control) or image_size(services.images.fetch(url, number))
            except KptError as error:
                problems.append(f"task {number}: the size of its image is not to be had, so it is left out: {error.message}")
                continue
            read.setdefault(url, {})[kind] = read_result(control, result, *sizes[url])
            problems += [f"task {number}: {problem}" for problem in read[url][kind].problems]
        for url, kinds in read.items():
            path = _path(url)
            # another image of that name: its folders tell them apart, its task, or a number
            names = chain((path.name, str(path), f"{number}-{path.name}"), (f"{number}-{i}-{path.name}" for i in count(2)))
            name = next(n for n in names if taken.setdefault(n, url) == url)
            yield LabelledImage(name, tuple(_things(kinds, controls)), size=sizes[url])


def _path(url: str) -> PurePosixPath:
    """The file in an address, whose name is what Label Studio's own exports call it; local files tell theirs in the query."""
    return PurePosixPath((local_file(url) or unquote(urlsplit(url).path)).lstrip("/"))


def _kinds(config: LabelConfig) -> dict[str, KeypointControl]:
    """Category → control. Controls whose objects are called the same are told apart by their names."""
    kinds = [c.schema.category for c in config.controls]
    return {k if kinds.count(k) == 1 else f"{k} ({c.from_name})": c for k, c in zip(kinds, config.controls, strict=True)}


def _size(result: list[Any], control: KeypointControl) -> tuple[int, int] | None:
    """Width and height of the control's image as its regions tell them; None without regions."""
    for region in result:
        if isinstance(region, dict) and region.get("to_name") == control.to_name:
            size = region.get("original_width"), region.get("original_height")
            if all(isinstance(v, (int, float)) and v >= 1 for v in size):
                return int(size[0]), int(size[1])  # type: ignore[arg-type]
    return None


def _things(kinds: dict[str, ReadResult], controls: dict[str, KeypointControl]) -> Iterator[LabelledThing]:
    """The objects of one image. A box that several kinds may use is an object by itself only where none of them has points in it."""
    held = {found.box.region_id for read in kinds.values() for found in read.objects if found.box}
    for kind, read in kinds.items():
        for found in read.objects:
            rows = zip(controls[kind].labels, found.keypoints.xy.astype(float), found.keypoints.visibility, found.keypoints.placed, strict=True)
            points = {label: LabelledPoint(float(xy[0]), float(xy[1]), int(v)) for label, xy, v, placed in rows if placed}
            yield LabelledThing(points, _four(found.box.box) if found.box else None, kind)
        yield from (LabelledThing({}, _four(box.box), kind) for box in read.boxes if box.region_id not in held)
        held |= {box.region_id for box in read.boxes}


def _four(box: Any) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in box)
    return x, y, w, h
