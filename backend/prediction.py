"""One /predict: tasks → images → core → regions. N tasks give N results, whatever happens to one of them.

Images are fetched a few at a time and ahead of the core, which gets them in small portions, so that the time that Label Studio
waits is used up to its end, and what was not reached is said to be worth asking for again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from backend import split
from backend.anchoring import is_unaided
from backend.core_client import AllObjects, Instance, Query, image_hash
from backend.examples import on_image
from backend.intake import control_key
from backend.interactive import Drawing, as_drawn, drawn_in, recall, remember
from backend.lookalikes import look_of
from backend.ranking import Ranker
from backend.served import control_row
from backend.services import Services, is_passing
from backend.tables import Task, Version
from kptllm_core.errors import ArtifactError, InvalidInput, KptError, NotFound, Unavailable
from kptllm_core.imaging import image_size
from kptllm_core.keypoints import KeypointSet
from label_config.annotations import DrawnBox, read_result
from label_config.regions import to_regions
from label_config.schema import KeypointControl, LabelConfig

log = logging.getLogger(__name__)
CHUNK = 8  # tasks per request to the core
FINDING = 1  # … where an image may have many objects, which takes seconds
FETCHERS = 4  # images fetched at a time
Json = dict[str, Any]
Fetched = tuple[bytes, str | None]  # an image, and what it looks like


def failed(model_version: str, error: KptError) -> Json:
    """The empty prediction of a task that failed."""
    version = model_version + (split.RETRY if is_passing(error) else "")
    return {"result": [], "score": 0.0, "model_version": version, "error": error.to_json()}


@dataclass
class _Item:
    """One control's image in one task."""

    task: int  # index into the tasks
    control: KeypointControl
    sha: str = ""
    boxes: list[DrawnBox] = field(default_factory=list)
    objects: list[KeypointSet] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)  # of the objects, that they are there; None: their points tell
    size: tuple[int, int] = (1, 1)
    answered: bool = False  # by the core, if only that there is no object
    error: KptError | None = None
    drawing: Drawing | None = None

    def queries(self, drawn: bool) -> list[Query | AllObjects]:
        """All objects where the config has a box for each to be told apart by, those that people drew and perhaps the others, else one; while
        a person draws, what was drawn on.

        None where the config wants boxes of a person, and nobody drew one. Boxes without a control for them come from a version whose
        config still had one.
        """
        if self.drawing:
            return list(self.drawing.queries(self.sha))
        boxes = [[float(v) for v in b.box] for b in self.boxes]
        find = self.control.finds_all and not drawn
        if find or (boxes and self.control.box is not None):  # together, so that no point is used by two
            return [AllObjects(self.sha, boxes, find, self.control.found_threshold)]
        if boxes:
            return [Query(self.sha, box) for box in boxes]
        return [Query(self.sha)] if self.control.box is None or self.control.find_objects else []

    def add(self, found: KeypointSet | list[Instance]) -> None:
        """What the core answered to one of the queries."""
        self.answered = True
        if isinstance(found, KeypointSet):
            self.objects.append(found)
            self.scores.append(1.0 if self.boxes else None)
        else:
            self.objects += [o.keypoints for o in found]
            self.scores += [o.score for o in found]


class Prediction:
    """One call of predict: so many tasks under one version. `run` raises ArtifactError when the core refuses that version."""

    def __init__(
        self,
        services: Services,
        project: str,
        config: LabelConfig,
        version: Version,
        tasks: list[Json],
        context: Json | None,
        deadline: float,
        boxes: dict[int, dict[str, list[list[float]]]] | None = None,
    ) -> None:
        """context: `{"result": [regions]}` drawn with a smart tool, or None. deadline: monotonic seconds.

        boxes: task → control → (x, y, w, h) in pixels that the model is given instead of what the task's regions say.
        """
        self.services, self.project, self.config, self.version = services, project, config, version
        self.tasks, self.deadline, self.given = tasks, deadline, boxes
        self.drawn = drawn_in(context)
        self.chunk = FINDING if any(c.box is not None for c in config.controls) else CHUNK
        self.bytes: dict[str, bytes] = {}  # of the present chunk, by hash
        self.support_places: dict[str, tuple[Task, str]] = {}  # hash → where to fetch it again
        self.lost: set[str] = set()  # support images that are not to be had now
        self.made: dict[int, tuple[Json, float]] = {}  # task → what is remembered of its prediction (served.py), and its score
        self.looks: dict[int, str] = {}  # task → what its image looks like
        self.withheld: set[int] = set()  # tasks that are answered with nothing, to see what people do without (anchoring.py)
        self.ranker = Ranker(services.journal, services.looks, project)

    def run(self) -> list[Json]:
        results: list[Json] = []
        supports = {control_key(c): self._support(c) for c in self.controls()}
        gave_up: KptError | None = None
        with ThreadPoolExecutor(FETCHERS) as pool:
            ahead = self._fetch(pool, 0)
            for start in range(0, len(self.tasks), self.chunk):
                fetched, ahead = ahead, {} if gave_up else self._fetch(pool, start + self.chunk)
                count = len(self.tasks[start : start + self.chunk])
                if gave_up is None and time.monotonic() > self.deadline - 1.0:
                    gave_up = Unavailable("No time was left for this task; ask for the rest again.")
                if gave_up is None:
                    try:
                        results += self._chunk(start, count, fetched, supports)
                        continue
                    except Unavailable as error:  # the core: no use in trying it with the other tasks, too
                        gave_up = error
                        log.warning("project %s: %d tasks without prediction: %s", self.project,
                                    len(self.tasks) - start, error.message)  # fmt: skip
                results += [failed(self.version.name, gave_up) for _ in range(count)]
            for future in ahead.values():
                future.cancel()
        if self.drawn:  # what a person drew stays, whatever became of the question
            drawn = [region for control in self.controls() for region in as_drawn(control, self.drawn)]
            results = [r | {"result": drawn} if r.get("error") and not r["result"] else r for r in results]
        return results

    def controls(self) -> Sequence[KeypointControl]:
        """Those that what was drawn belongs to; all of them if nothing was."""
        names = {r.get("from_name") for r in self.drawn}
        own = [c for c in self.config.controls if {c.from_name, c.box.from_name if c.box else c.from_name} & names]
        return own or self.config.controls

    def _fetch(self, pool: ThreadPoolExecutor, start: int) -> dict[tuple[int, str], Future[Fetched]]:
        """Begin to fetch the images of the tasks from `start` on: (index, URL) → bytes and look to come."""
        futures = {}
        for at, task in enumerate(self.tasks[start : start + self.chunk], start):
            data = task.get("data") if isinstance(task, dict) else None
            for url in {c.image_of(data) for c in self.controls()} if isinstance(data, dict) else ():
                if url:
                    number = task.get("id")
                    number = number if isinstance(number, int) and not isinstance(number, bool) else None
                    futures[at, url] = pool.submit(self._fetched, url, number)
        return futures

    def _fetched(self, url: str, task: int | None) -> Fetched:
        data = self.services.images.fetch(url, task)
        return data, None if self.drawn else look_of(data)

    def _chunk(
        self, start: int, count: int, fetched: dict[tuple[int, str], Future[Fetched]], supports: dict[str, Any]
    ) -> list[Json]:
        self.bytes = {}
        items: list[_Item] = []
        for at in range(start, start + count):
            items += [self._item(at, control, fetched, supports[control_key(control)]) for control in self.controls()]
        for control in self.controls():
            mine = [i for i in items if i.control is control and i.error is None]
            asked = [(item, query) for item in mine for query in item.queries(bool(self.drawn))]
            if asked:
                self._ask(control, asked, supports[control_key(control)])
        self.ranker.see(self.looks)
        return [self._told(at, [i for i in items if i.task == at]) for at in range(start, start + count)]

    def _item(
        self, at: int, control: KeypointControl, fetched: dict[tuple[int, str], Future[Fetched]], support: list[tuple[str, KeypointSet]]
    ) -> _Item:
        item = _Item(at, control)
        task = self.tasks[at]
        try:
            data = task.get("data") if isinstance(task, dict) else None
            url = control.image_of(data) if isinstance(data, dict) else None
            if url is None:
                if isinstance(data, dict) and control.image_key in data:
                    kind = type(data[control.image_key]).__name__
                    raise InvalidInput(f"The task's '{control.image_key}' is of type {kind}; expected the address of one image.")
                found = ", ".join(map(str, list(data)[:10])) if isinstance(data, dict) else "no data"
                raise InvalidInput(f"The task has no image under '{control.image_key}'. Found: {found}.")
            image, look = fetched[at, url].result(timeout=max(self.deadline - time.monotonic(), 0.1))
            if look is not None and _is_id(task.get("id")):
                self.looks.setdefault(task["id"], look)
            item.sha, item.size = image_hash(image), image_size(image)
            self.bytes[item.sha] = image
            item.drawing = self._drawing(item, support)
            item.boxes = [] if item.drawing else self._boxes(task, control, item.size)
        except TimeoutError:
            item.error = Unavailable("No time was left to fetch the image; ask again.")
        except KptError as error:
            item.error = error
        except Exception:  # one task of N, whatever is wrong with it, leaves the others theirs
            log.exception("project %s: a task cannot be read", self.project)
            item.error = InvalidInput("The task cannot be read; the backend's log says why.")
        return item

    def _boxes(self, task: Json, control: KeypointControl, size: tuple[int, int]) -> list[DrawnBox]:
        """The objects' boxes: those of the newest annotation, draft, or another model's prediction."""
        if self.given is not None:
            given = self.given.get(task["id"], {}).get(control_key(control), [])
            return [DrawnBox(np.array(box, np.float64), "", None, None) for box in given]
        annotations = [a for a in _list(task.get("annotations")) if a.get("was_cancelled") is not True]
        annotations.sort(key=lambda a: (a.get("ground_truth") is True, str(a.get("updated_at") or "")), reverse=True)
        others = [
            p
            for p in _list(task.get("predictions"))
            if not split.MADE_HERE.fullmatch(str(p.get("model_version") or ""))
        ]
        drafts = sorted(_list(task.get("drafts")), key=lambda d: str(d.get("updated_at") or ""), reverse=True)
        for source in (*annotations, *drafts, *others):
            result = source.get("result")
            read = read_result(control, result, *size) if isinstance(result, list) else None
            for problem in read.problems if read else ():
                log.info("project %s, task %s: %s", self.project, task.get("id"), problem)
            if read and read.boxes:
                return list(read.boxes)
        return []

    def _ask(
        self, control: KeypointControl, asked: list[tuple[_Item, Query | AllObjects]], support: list[tuple[str, KeypointSet]]
    ) -> None:
        """Fill in the objects of the items. Raises Unavailable and ArtifactError, which concern all tasks."""
        while True:
            shown = [s for s in support if s[0] not in self.lost]
            known_lost = len(self.lost)
            left = self.deadline - time.monotonic()
            try:
                queries = [query for _, query in asked]
                answer = self.services.core.predict(
                    control.schema, shown, queries, self._load, self.version.adapter, seconds=left
                )
                break
            except KptError as error:
                if error.details.get("image") in {sha for sha, _ in shown}:
                    self.lost.add(str(error.details["image"]))  # the core cannot read it
                if len(self.lost) > known_lost:
                    log.warning("project %s: a support example is left out: %s", self.project, error.message)
                    continue
                if isinstance(error, (Unavailable, ArtifactError)):
                    raise
                for item, _ in asked:  # what this control was asked with cannot be used
                    item.error = error
                return
        if answer.base != self.version.base:
            raise ArtifactError(
                f"The core runs {answer.base}; the version {self.version.name} was made for {self.version.base}."
            )
        for (item, _), result in zip(asked, answer.results, strict=True):
            if isinstance(result, KptError):
                item.error = result
            else:
                item.add(result[0])
                item.size = result[1]

    def _told(self, at: int, items: list[_Item]) -> Json:
        try:
            return self._result(at, items)
        except Exception:  # as in _item
            log.exception("project %s: what was found cannot be told", self.project)
            return failed(self.version.name, KptError("The prediction cannot be told; the backend's log says why."))

    def _result(self, at: int, items: list[_Item]) -> Json:
        """A task's prediction; empty with the reason if nothing of it worked."""
        regions: list[Json] = []
        kept: Json = {}
        for item in items:
            if item.drawing and item.objects:
                answered = item.drawing.answer(item.objects)
                remember(self.services.journal, self.project, self.tasks[at], item.drawing.marked(answered))
                regions += answered
            elif item.answered:
                known = [b.label for b in item.boxes] if len(item.boxes) <= len(item.objects) else []
                labels = known + [None] * (len(item.objects) - len(known))  # those whose box was given come first
                drawn = to_regions(item.control, item.objects, *item.size, box_labels=labels, scores=item.scores)
                kept[control_key(item.control)] = control_row(
                    item.control, item.objects, [b.box for b in item.boxes], item.size, drawn, item.scores
                )
                regions += drawn
        errors = [i.error for i in items if i.error is not None]
        for error in errors:
            task = self.tasks[at].get("id") if isinstance(self.tasks[at], dict) else None
            log.warning("project %s, task %s: %s", self.project, task, error.message)
        if errors and not regions:
            return failed(self.version.name, errors[0])
        number = self.tasks[at].get("id")
        score = self.ranker.score(number if _is_id(number) else None, kept)
        if kept and not errors and not self.drawn and _is_id(number):
            self.made[number] = kept, score
            if self.given is None and is_unaided(self.project, number, self.services.settings.unaided_share):
                self.withheld.add(number)
                regions = []
        return {"result": regions, "score": score, "model_version": self.version.name}

    def _drawing(self, item: _Item, support: list[tuple[str, KeypointSet]]) -> Drawing | None:
        """What was drawn with a smart tool on the image of an item. InvalidInput says why it cannot be used."""
        if not self.drawn:
            return None
        task, control = self.tasks[item.task], item.control

        def named(place: np.ndarray) -> str | None:
            """A click without a label: the model says which point it is."""
            try:
                xy = [[float(v) for v in place]]
                ((name, _),) = self.services.core.name(item.sha, xy, self._load, None, control.schema.names, seconds=10.0)
            except KptError as error:
                log.warning("project %s: a click without a label could not be named: %s", self.project, error.message)
                return None
            return control.label_of(name) if name in control.schema.names else None

        return Drawing.of(control, self.drawn, task, item.size, support, named, recall(self.services.journal, self.project, task))

    # ------------------------------------------------------------ support

    def _support(self, control: KeypointControl) -> list[tuple[str, KeypointSet]]:
        """The frozen examples of a control by the hash of their image; one whose image is not to be had is left out."""
        examples = []
        for entry in self.version.support:
            labelled = entry["controls"].get(control_key(control))
            if not labelled or not KeypointSet.from_json(labelled["keypoints"]).reorder(control.schema.names).placed.any():
                continue
            try:
                facts = self._support_image(entry["task"], labelled["image"])
                points = on_image(labelled, facts)
                if points is None:
                    raise InvalidInput("its image is turned by 90° against the one that it was labelled on. Label it again.")
                examples.append((facts["sha256"], points.reorder(control.schema.names)))
            except KptError as error:
                log.warning("project %s: the support example of task %s cannot be used: %s", self.project,
                            entry["task"], error.message)  # fmt: skip
        return examples

    def _support_image(self, number: int, url: str) -> Json:
        """{"sha256", "width", "height"} of a support image; it is fetched when it was never seen."""
        project = self.project
        with self.services.journal.reading() as session:
            task = session.get(Task, (project, number))
        if task is None:
            raise NotFound(f"Task {number} is not known any more.")
        facts = task.files.get(url, {})
        if "sha256" not in facts:
            sha, data = self.services.image(project, task, url)
            facts = {"sha256": sha, **dict(zip(("width", "height"), image_size(data), strict=True))}
        self.support_places[facts["sha256"]] = (task, url)
        return facts

    def _load(self, sha: str) -> bytes:
        """The bytes that the core asks for."""
        if sha in self.bytes:
            return self.bytes[sha]
        task, url = self.support_places[sha]
        try:
            found, data = self.services.image(self.project, task, url)
            if found != sha:
                raise NotFound(f"The support image of task {task.task} was replaced by another one.")
        except KptError:
            self.lost.add(sha)
            raise
        return data


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _list(value: Any) -> list[Json]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
