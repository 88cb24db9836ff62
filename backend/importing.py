"""Labels that exist already → annotations in Label Studio, and from there, as what people said, into the journal.

Each image of a data set is matched with a task by its name; where there is none, one is made. May be interrupted and run again:
an annotation carries an id that follows from its project and image, which Label Studio takes only once, and the ids of its regions
follow from them, too, so that a second run finds what is there. Where another task has that id (of an image with the same name in
another data set), it follows from the task as well.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np

from backend.formats.labels import OCCLUDED, LabelledImage, LabelledSet, LabelledThing
from backend.import_match import Matcher, image_files, is_image, is_unique, not_unique, upload_name
from backend.import_names import Target
from backend.intake import control_key
from backend.services import Services
from backend.sweep import sweep
from backend.transport import Json
from kptllm_core.errors import InvalidInput, KptError
from kptllm_core.imaging import image_size
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.regions import box_region, to_regions
from label_config.schema import LabelConfig

NAMESPACE = uuid.UUID("5c6ae2f0-9c0e-5a27-8b0c-3f6f5c1f7a52")
AT_ONCE, BYTES_AT_ONCE = 20, 20_000_000  # files in one upload
OUTSIDE = 0.02  # of the image: a point farther outside was not labelled on this image
MARGIN = 0.1  # of its larger side, around the points of an object that comes without a box


@dataclass
class Plan:
    """What is to be done with each image. `left_out`: image → why, in words."""

    annotate: dict[int, LabelledImage] = field(default_factory=dict)  # task → image
    create: list[LabelledImage] = field(default_factory=list)
    there: int = 0  # imported by an earlier run
    left_out: dict[str, str] = field(default_factory=dict)


class Importer:
    """One data set into one project."""

    def __init__(
        self,
        services: Services,
        project: int,
        config: LabelConfig,
        labels: LabelledSet,
        targets: dict[str, Target],
        *,
        images: Path | None = None,
        image_url: str = "",
        even_labelled: bool = False,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """images: folder with the image files. image_url: new tasks show this address followed by the image's name; else files are
        uploaded. even_labelled: also annotate tasks that a person labelled already. progress: (what, done, of how many)."""
        self.services, self.label_studio = services, services.label_studio
        self.project, self.config, self.targets = project, config, targets
        self.image_url, self.even_labelled, self.progress = image_url, even_labelled, progress
        self.shared = not_unique(labels.images)
        files = self._files(images, labels)
        self.labels = [self._with_file(image, files) for image in labels.images]
        self.shared = not_unique(self.labels)
        self.urls: dict[int, str] = {}  # task → its image
        self.notes: Counter[str] = Counter()

    # ------------------------------------------------------------ which image is which task

    def plan(self) -> Plan:
        """Looks at every task of the project; changes nothing."""
        plan = Plan()
        keys = {target.control for target in self.targets.values()}
        regions: dict[str, int] = {}
        labelled: set[int] = set()
        for task in self.label_studio.tasks(self.project):
            number, data = int(task["id"]), task.get("data") or {}
            url = next((u for control in keys if (u := control.image_of(data))), None)
            if url:
                self.urls[number] = url
            for annotation in task.get("annotations") or []:
                if not annotation.get("was_cancelled"):
                    labelled.add(number)
                regions.update({str(r["id"]): number for r in annotation.get("result") or [] if isinstance(r, dict) and "id" in r})
        matcher = Matcher(self.urls.items(), self.labels)
        for image in self.labels:
            found, why = matcher.find(image, is_unique(image, self.shared))
            task_id = found if isinstance(found, int) else None
            if why:
                plan.left_out[image.shown] = why
            elif self._is_there(image, task_id, regions):
                plan.there += 1
            elif task_id is None:
                self._plan_new(plan, image)
            elif task_id in plan.annotate:
                plan.left_out[image.shown] = f"task {task_id} is taken for {plan.annotate[task_id].shown} already"
            elif task_id in labelled and not self.even_labelled:
                plan.left_out[image.shown] = f"task {task_id} is labelled already (--even-labelled adds a second annotation)"
            else:
                plan.annotate[task_id] = image
        return plan

    def _is_there(self, image: LabelledImage, task: int | None, regions: dict[str, int]) -> bool:
        """Whether an earlier run brought it to its task; where its name finds none (any more), to any. Frames of a CSV had no name in earlier
        versions. regions: id → task."""
        if task is None:
            return next(region_ids(self.project, image)) in regions
        earlier = [image, replace(image, name="")] if image.frame is not None else [image]
        firsts = [next(region_ids(self.project, one, also)) for one in earlier for also in (None, task)]
        return any(regions.get(first) == task for first in firsts)

    def _plan_new(self, plan: Plan, image: LabelledImage) -> None:
        name = _name_in_url(image)
        if self.image_url and name and not is_image(name):
            plan.left_out[image.shown] = (
                f"no task shows it, and '{name}' does not end as images do, so --image-url makes no address of it (--images FOLDER alone uploads "
                "its file)"
            )
        elif name if self.image_url else image.path:
            plan.create.append(image)
        else:
            plan.left_out[image.shown] = "no task shows it, and its file is not there (--images FOLDER names where the images are)"

    @staticmethod
    def _files(folder: Path | None, labels: LabelledSet) -> Matcher | None:
        if folder is None:
            return None
        files = image_files(folder)
        if not files:
            raise InvalidInput(f"--images {folder}: there is no image below that folder.")
        return Matcher(((file, quote(f"{folder.name}/{file.relative_to(folder).as_posix()}")) for file in files), labels.images)

    def _with_file(self, image: LabelledImage, files: Matcher | None) -> LabelledImage:
        if files is None or image.path is not None:
            return image
        found, _ = files.find(image, is_unique(image, self.shared))
        return replace(image, path=found) if isinstance(found, Path) else image

    # ------------------------------------------------------------ doing it

    def carry_out(self, plan: Plan) -> int:
        """Makes the tasks and the annotations, then brings the journal up to date; how many annotations were made."""
        todo = dict(plan.annotate)
        for number, image in self._create(plan):
            todo[number] = image
        made = 0
        for done, (number, image) in enumerate(todo.items(), 1):
            try:
                made += self._annotate(number, image, is_new=number not in plan.annotate)
            except KptError as error:
                if error.status >= 500 or error.status == 401:
                    raise  # Label Studio is down or refuses: the others would fare no better
                plan.left_out[image.shown] = error.message
            self.progress("annotations", done, len(todo))
        sweep(self.services, str(self.project))
        return made

    def _create(self, plan: Plan) -> Iterator[tuple[int, LabelledImage]]:
        """(task, image) of the tasks that are made."""
        if self.image_url:
            key = next(iter(self.targets.values())).control.image_key
            tasks = [{"data": {key: self.image_url.rstrip("/") + "/" + quote(_name_in_url(image))}} for image in plan.create]
            for at in range(0, len(tasks), 100):
                numbers = self.label_studio.import_tasks(self.project, tasks[at : at + 100])
                for number, task, image in zip(numbers, tasks[at : at + 100], plan.create[at : at + 100], strict=True):
                    self.urls[number] = task["data"][key]
                    yield number, image
                self.progress("new tasks", min(at + 100, len(tasks)), len(tasks))
            return
        done = 0
        for chunk in _portions(plan.create):
            files = [(upload_name(image, is_unique(image, self.shared)), content) for image, content in chunk]
            numbers = self.label_studio.upload(self.project, files)
            control = next(iter(self.targets.values())).control
            shown = {int(t["id"]): control.image_of(t["data"]) or "" for t in self.label_studio.tasks(self.project, ids=numbers)}
            self.urls.update(shown)
            matcher = Matcher(shown.items())
            for image, _ in chunk:
                found, why = matcher.find(LabelledImage(upload_name(image, is_unique(image, self.shared)), ()))
                if isinstance(found, int):
                    yield found, image
                else:
                    plan.left_out[image.shown] = f"Label Studio made no task of its file ({why or 'it is not among the new tasks'})"
            done += len(chunk)
            self.progress("new tasks", done, len(plan.create))

    def _annotate(self, task: int, image: LabelledImage, is_new: bool) -> bool:
        """Whether an annotation was made now; False if Label Studio has it already. Raises InvalidInput for what cannot be placed."""
        size = self._size(task, image, is_new)
        for also in (None, task):
            result = regions_of(self.project, image, size, self.targets, Counter() if also else self.notes, also)
            try:
                self.label_studio.annotate(task, result, unique_id=str(annotation_id(self.project, image, also)))
            except KptError as error:
                if error.details.get("label_studio_status") != 409:
                    raise
                if self._holds(task, result):
                    return False
            else:
                return True
        return False

    def _holds(self, task: int, result: list[Json]) -> bool:
        """Whether an annotation of the task has one of these regions."""
        ids = {region["id"] for region in result}
        annotations = [a for found in self.label_studio.tasks(self.project, ids=[task]) for a in found.get("annotations") or []]
        return any(r.get("id") in ids for a in annotations for r in a.get("result") or [] if isinstance(r, dict))

    def _size(self, task: int, image: LabelledImage, is_new: bool) -> tuple[int, int]:
        """Width and height of the image as it is shown: of the file, else of what the task's address gives. Raises InvalidInput where these
        differ in shape: then the task, unless it `is_new`, shows another picture."""
        own = None if image.path is None else image_size(image.path.read_bytes())
        if own and is_new:
            return own
        try:
            shown = image_size(self.services.images.fetch(self.urls.get(task), task))
        except KptError as error:
            if own:
                return own
            if image.size is None:
                raise InvalidInput(f"its size is not known: {error.message}") from None
            self.notes["images could not be fetched; the size that the data set states was taken"] += 1
            return image.size
        if own:
            _scale(LabelledImage(image.name, (), size=own), shown)
        return own or shown


def regions_of(
    project: int, image: LabelledImage, size: tuple[int, int], targets: dict[str, Target], notes: Counter[str], task: int | None = None
) -> list[Json]:
    """The annotation's result for an image of `size`. Raises InvalidInput where the labels do not fit it; counts remarks in `notes`.
    task: as in annotation_id."""
    things = [(thing, targets[thing.category]) for thing in image.things]
    per_control: dict[str, list[tuple[LabelledThing, Target]]] = {}
    for thing, target in things:
        per_control.setdefault(control_key(target.control), []).append((thing, target))
    scale = _scale(image, size)
    ids = region_ids(project, image, task)
    result: list[Json] = []
    for members in per_control.values():
        control = replace(members[0][1].control, add_bboxes=True, score_threshold=0.0, point_threshold=0.0)
        placed = [(_keypoints(thing, target, size, scale, notes), target.box_label) for thing, target in members]
        boxes = [(points, label) for points, label in placed if points.box is not None and not points.placed.any()]
        placed = [(points, label) for points, label in placed if points.placed.any()]
        if control.box is None and len(placed) > 1:
            raise InvalidInput(
                f"it shows {len(placed)} objects, and '{control.from_name}' can label one: add a box control to the label config "
                f'(<RectangleLabels name="{control.from_name}_bbox" toName="{control.to_name}"><Label value="object"/></RectangleLabels>)'
            )
        result += to_regions(control, [p for p, _ in placed], *size, new_id=lambda: next(ids), box_labels=[label for _, label in placed])
        if control.box is not None:
            alone = [box_region(control, points, label, 1.0, *size, lambda: next(ids)) for points, label in boxes]
            result += [region for region in alone if region]
            if None in alone:
                notes["boxes lie outside their image and were left out"] += alone.count(None)
        elif boxes:
            notes[f"objects have a box and no point, and were left out, since no box control goes with '{control.from_name}'"] += len(boxes)
    if not result:
        raise InvalidInput("none of its points can be placed")
    return [{k: v for k, v in region.items() if k != "score"} | {"origin": "manual"} for region in result]


def _scale(image: LabelledImage, size: tuple[int, int]) -> tuple[float, float]:
    """What positions are multiplied with. InvalidInput where the labels belong to an image of another shape."""
    if image.relative:
        return float(size[0]), float(size[1])
    if image.size is None or image.size == size:
        return 1.0, 1.0
    x, y = size[0] / image.size[0], size[1] / image.size[1]
    if abs(x / y - 1) < 0.01:
        return x, y  # the same picture in another resolution
    turned = ": it is turned by 90° (EXIF), so where the points lie is not known" if size == image.size[::-1] else ""
    raise InvalidInput(f"its labels are for an image of {image.size[0]} × {image.size[1]} pixels, but it has {size[0]} × {size[1]}{turned}")


def _keypoints(
    thing: LabelledThing, target: Target, size: tuple[int, int], scale: tuple[float, float], notes: Counter[str]
) -> KeypointSet:
    """The object in pixels of the image. Its box: as given, else the hull of its points and a margin."""
    names = target.control.schema.names
    xy, visibility = np.zeros((len(names), 2)), np.zeros(len(names), np.int8)
    bounds = np.array(size, float)
    for name, point in thing.points.items():
        if name not in target.points:
            continue
        at = names.index(target.points[name])
        place = np.array([point.x * scale[0], point.y * scale[1]])
        if ((place < -OUTSIDE * bounds) | (place > (1 + OUTSIDE) * bounds)).any():
            notes["points lie outside their image and were left out"] += 1
            continue
        xy[at] = np.clip(place, 0.0, bounds)
        visibility[at] = Visibility.OCCLUDED if point.visibility == OCCLUDED else Visibility.VISIBLE
        if visibility[at] == Visibility.OCCLUDED and target.control.occluded is None:
            notes["hidden points became visible ones, since the label config has no per-region Choices for them "
                  '(<Choices name="hidden" toName="…" perRegion="true"><Choice value="occluded"/></Choices>)'] += 1  # fmt: skip
    box = None
    if thing.box is not None:
        box = np.array(thing.box) * np.array([*scale, *scale])
    elif (visibility > 0).any():
        low, high = xy[visibility > 0].min(0), xy[visibility > 0].max(0)
        margin = MARGIN * max(float((high - low).max()), 0.1 * float(bounds.min()))
        low, high = np.clip(low - margin, 0.0, bounds), np.clip(high + margin, 0.0, bounds)
        box = np.concatenate([low, high - low])
        if target.control.box is not None:
            notes["boxes were drawn around the points, since the data set has none"] += 1
    return KeypointSet(names, xy, visibility, box=box)


def _name_in_url(image: LabelledImage) -> str:
    """What follows --image-url: the image's name, of a frame that of its file; "" if it has none."""
    if image.frame is None:
        return image.name
    return "" if image.path is None else image.path.name


def annotation_id(project: int, image: LabelledImage, task: int | None = None) -> uuid.UUID:
    """The same for the same image in the same project, whenever it is imported. task: where another one has that id, the image's own."""
    place = f"{project}/{image.name}" + ("" if image.frame is None else f"#{image.frame}")
    return uuid.uuid5(NAMESPACE, place if task is None else f"{place}@{task}")


def region_ids(project: int, image: LabelledImage, task: int | None = None) -> Iterator[str]:
    """Ids of an image's regions, one after the other. task: as in annotation_id."""
    seed, number = annotation_id(project, image, task).hex, 0
    while True:
        yield hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:10]
        number += 1


def _portions(images: Sequence[LabelledImage]) -> Iterator[list[tuple[LabelledImage, bytes]]]:
    """Images with their files' content, as many as one upload takes."""
    chunk: list[tuple[LabelledImage, bytes]] = []
    for image in images:
        assert image.path is not None
        content = image.path.read_bytes()
        if chunk and (len(chunk) == AT_ONCE or sum(len(c) for _, c in chunk) + len(content) > BYTES_AT_ONCE):
            yield chunk
            chunk = []
        chunk.append((image, content))
    if chunk:
        yield chunk


def told(plan: Plan, notes: Counter[str]) -> list[str]:
    """Remarks in words: what was left out, why, and how often."""
    lines = [f"{count} {what}." for what, count in notes.items()]
    reasons = Counter(plan.left_out.values())
    for image, why in list(plan.left_out.items())[:10]:
        lines.append(f"Left out: {image}: {why}.")
    if len(plan.left_out) > 10:
        lines.append(f"… and {len(plan.left_out) - 10} more ({len(reasons)} reasons).")
    return lines
