"""What was drawn with a smart tool → one query to the core, and what Label Studio's page is answered.

docs/interactive.md tells what the page sends and does, as it was seen. In short: the context holds what was drawn, last, behind the
page's other regions of the same label; a region that comes back under an id of the page moves that region there, under another id
it is added; and what was drawn is taken away unless it comes back under its own id.

One call is about one object: the one whose box was drawn, or that a clicked point belongs to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from backend import split
from backend.core_client import Query
from backend.effort import PREDICTED
from backend.journal import Journal
from backend.ranking import fact_name
from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import box_of_points, clip_box, from_percent
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.annotations import DrawnBox, LabelledObject, read_id, read_result
from label_config.checks import BOXES
from label_config.regions import random_id, to_regions
from label_config.schema import KeypointControl

REMEMBERED_SECONDS = 15.0  # the page saves its draft every five seconds
NEAR = 0.5  # of a box's longer side: so far outside of it a click may still be meant for that object
Json = dict[str, Any]
Support = Sequence[tuple[str, KeypointSet]]


def drawn_in(context: Any) -> list[Json]:
    """The regions of an interactive context (`{"result": [regions]}`); smart keypoints with their label where others have it."""
    result = context.get("result") if isinstance(context, dict) else None
    return [_plain(r) for r in _list(result) if isinstance(r.get("from_name"), str)]


def as_drawn(control: KeypointControl, regions: Sequence[Json]) -> list[Json]:
    """What a person drew, alone: the answer when the model has none, so that it does not vanish from the page."""
    region = _last(control, regions)
    if region is None:
        return []
    read = read_result(control, [region])
    return [_cleaned(region)] if read.objects or read.boxes else []


@dataclass(eq=False)
class Drawing:
    """What a person drew on one image of one control, and the object that it is about. Positions in pixels, (K,) by the schema."""

    control: KeypointControl
    size: tuple[int, int]
    box: np.ndarray | None = None  # (4,) x, y, w, h; None: the core looks for the object
    box_region: Json | None = None  # as it is on the page; None: the answer brings one where the config has a box control
    box_is_new: bool = False  # it must come back, so that it stays
    ids: dict[str, str] = field(default_factory=dict)  # name → its region on the page
    origins: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, np.ndarray] = field(default_factory=dict)  # name → where a person put it
    kept: set[str] = field(default_factory=set)  # of these, what stands on the page, and stays as it is
    hidden: set[str] = field(default_factory=set)  # what is marked as occluded on the page
    absent: str | None = None  # a negative click: the object has none
    clicked: np.ndarray | None = None
    around: np.ndarray | None = None  # (4,) a second place to look for the object

    @classmethod
    def of(
        cls,
        control: KeypointControl,
        regions: Sequence[Json],
        task: Json,
        size: tuple[int, int],
        support: Support,
        name: Callable[[np.ndarray], str | None],
        remembered: Mapping[str, Json],
    ) -> Drawing | None:
        """regions: of the context. name: what the model calls the point at (2,). remembered: `recall`. None: nothing was drawn
        here. InvalidInput says why it cannot be used."""
        new = _last(control, regions)
        if new is None:
            return None
        page, sure = _page(control, new, [r for r in regions if r is not new], task, remembered)
        new = new | {"id": str(new.get("id") or random_id())}
        made = cls(control, size)
        if new["type"] == "keypointlabels":
            made._click(new, page, sure, support, name)
        else:
            made._rectangle(new, page, sure)
        return made

    def queries(self, image: str) -> list[Query]:
        """image: its hash. With a second place to look at, two: `answer` takes the one that fits."""
        names, fixed = self.control.schema.names, None
        if self.fixed:
            xy, state = np.zeros((len(names), 2)), np.full(len(names), Visibility.NOT_LABELLED)
            for name, place in self.fixed.items():
                xy[names.index(name)], state[names.index(name)] = place, Visibility.VISIBLE
            fixed = KeypointSet(names, xy, state)
        boxes = [self.box] if self.around is None else [self.box, self.around]
        return [Query(image, None if b is None else [float(v) for v in b], fixed) for b in boxes]

    def _rectangle(self, new: Json, page: Mapping[str, Json], sure: set[str]) -> None:
        alone = read_result(self.control, [new], *self.size)
        if not alone.boxes:
            why = "; ".join(alone.problems) or "its label is not one of this control's"
            raise InvalidInput(f"The rectangle cannot be used: {why}. Draw one over the object.")
        read = read_result(self.control, [*page.values(), new], *self.size)
        (box,) = (b for b in read.boxes if b.region_id == alone.boxes[0].region_id)
        self._take(box, next((o for o in read.objects if o.box is box), None), {**page, box.region_id: new}, sure)

    def _click(self, new: Json, page: Mapping[str, Json], sure: set[str], support: Support,
               name: Callable[[np.ndarray], str | None]) -> None:  # fmt: skip
        value = new["value"]
        percent = [value.get("x"), value.get("y")]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 100 for v in percent):
            raise InvalidInput(f"The click lies at {percent} per cent of the image; expected 0…100. Click on the image.")
        place = from_percent(np.array(percent), *self.size)
        label = value["keypointlabels"][0] if value["keypointlabels"] else name(place)
        clicked = self.control.name_of(label)
        if clicked is None:
            raise InvalidInput(f"The click has the label {label!r}; expected one of '{self.control.from_name}': "
                               f"{', '.join(self.control.shown)}. Choose a label, then click.")  # fmt: skip
        read = read_result(self.control, list(page.values()), *self.size)
        box, held = _object_at(self.control, clicked, place, read.boxes, read.objects)
        self._take(box, held, page, sure)
        self.kept.discard(clicked)
        self.fixed.pop(clicked, None)
        if new.get("is_positive") is False:
            if self.control.box is not None and box is None:
                raise InvalidInput("The negative click lies on no object. Click on one that has a box.")
            self.absent = clicked
            return
        self.fixed[clicked] = self.clicked = place
        self.origins[clicked] = "prediction-changed" if self.origins.get(clicked) in PREDICTED else "manual"
        self.ids.setdefault(clicked, new["id"])
        if self.box is None:
            around = _around(clicked, place, support, self.size)
            if self.control.box is None:
                self.around = around  # in case that the object which is found is another one
            else:
                self.box = around  # a new object begins at the click

    def _take(self, box: DrawnBox | None, held: LabelledObject | None, page: Mapping[str, Json], sure: set[str]) -> None:
        """The object on the page that is asked about: its box, its points' ids, and what of it a person placed."""
        if box is not None:
            self.box, self.box_region = box.box, page[box.region_id]
            self.box_is_new = box.region_id not in sure
        if held is None:
            return
        points = held.keypoints
        for i in np.flatnonzero(points.placed):
            name, region_id = points.names[i], held.region_ids[i]
            if not region_id:
                continue
            region, origin = page[region_id], held.origins[i] or "manual"
            self.ids[name], self.origins[name] = region_id, origin
            if points.visibility[i] == Visibility.OCCLUDED:
                self.hidden.add(name)
            if origin != "prediction":
                self.fixed[name] = points.xy[i]
                if "is_positive" not in region and (box is None or region.get("parentID")):
                    self.kept.add(name)

    # ------------------------------------------------------------ what is answered

    def answer(self, found: Sequence[KeypointSet]) -> list[Json]:
        """found: what `queries` brought. Regions of the object, without the points that a person placed before: they stand on the
        page as they are."""
        points = found[0]
        if len(found) > 1 and self.clicked is not None and not _holds(points.object_box(), self.clicked):
            points = found[1]
        names = points.names
        xy, visibility, score = points.xy.copy(), points.visibility.copy(), points.score.copy()
        for i, point in enumerate(names):
            if point in self.fixed:
                xy[i], score[i] = self.fixed[point], 1.0
                visibility[i] = Visibility.OCCLUDED if point in self.hidden else Visibility.VISIBLE
            elif point == self.absent:
                visibility[i] = Visibility.ABSENT
        box = self.box if self.box_region else None  # where nobody drew one, it is the hull of the points
        control = replace(self.control, score_threshold=0.0)  # a person says that there is an object
        made = to_regions(control, KeypointSet(names, xy, visibility, score, box), *self.size)
        regions = [_cleaned(self.box_region)] if self.box_region and self.box_is_new else []
        parent = {"parentID": self.box_region["id"]} if self.box_region else {}
        renamed: dict[str, Json] = {}
        for region in made:
            name = self.control.name_of((region["value"].get("keypointlabels") or [None])[0])
            if region["type"] == "keypointlabels" and name is not None and name not in self.kept:
                origin = self.origins[name] if name in self.fixed else "prediction"
                renamed[region["id"]] = {"id": self.ids.get(name, region["id"]), "origin": origin, **parent}
                regions.append(region | renamed[region["id"]])
            elif region["type"] == "choices" and region["id"] in renamed:  # hidden
                regions.append(region | renamed[region["id"]])
            elif region["type"] not in ("keypointlabels", "choices") and not self.box_region:
                regions.append(region | {"origin": "prediction"})
        return regions

    def marked(self, regions: Sequence[Json]) -> list[Json]:
        """The answer as `remember` wants it: what a person put there in these seconds is still a click."""
        clicks = {self.ids[n] for n in self.fixed if n not in self.kept}
        return [r | ({"is_positive": True} if r["id"] in clicks else {}) for r in regions if r["type"] != "choices"]


# ---------------------------------------------------------------- between two saved drafts


def remember(journal: Journal, project: str, task: Json, regions: Sequence[Json]) -> None:
    """Keeps what was answered until the page's next draft tells: two clicks within seconds may be about one object.

    Beside each region stands where the page was known to have it before: a draft that still says so has not heard of the answer.
    """
    number, now = str(task.get("id")), time.time()
    told = {_key(r): r for source in reversed(_sources(task)) for r in source}

    def add(before: Json) -> Json:
        kept = {k: v for k, v in before.items() if now - v["at"] < REMEMBERED_SECONDS}
        known = kept[number]["regions"] if number in kept else {}
        new = {r["id"]: {"region": r, "was": known.get(r["id"], {"was": _at(told.get(r["id"]))})["was"]} for r in regions}
        return kept | {number: {"at": now, "regions": known | new}}

    journal.change_fact(fact_name("drawn", project), add)


def recall(journal: Journal, project: str, task: Json) -> dict[str, Json]:
    """Region id → {"region", "was"} of the last seconds' answers for a task."""
    kept = journal.fact(fact_name("drawn", project)).get(str(task.get("id")))
    return dict(kept["regions"]) if kept and time.time() - kept["at"] < REMEMBERED_SECONDS else {}


# ---------------------------------------------------------------- the page


def _page(control: KeypointControl, new: Json, others: Sequence[Json], task: Json,
          remembered: Mapping[str, Json]) -> tuple[dict[str, Json], set[str]]:  # fmt: skip
    """What the page shows, as far as it is known, by id; and the ids that it is sure to have.

    It is that draft, annotation or prediction which shares most regions with the context, with the answers since then, and with the
    context, which is right. A click that is not accepted yet keeps its mark.
    """
    drafts, context = len(_list(task.get("drafts"))), {_key(r) for r in others}
    best: list[Json] = []
    most = -1
    for at, source in enumerate(_sources(task)):
        same = {_key(r) for r in source if r.get("from_name") == new.get("from_name") and _label(r) == _label(new)}
        if at >= drafts and same - context:
            continue  # regions of this label that the page does not have: it shows another annotation. A draft may be late
        shared = len({_key(r) for r in source} & context)
        if shared > most:
            best, most = source, shared
    page = {_key(r): r for r in best if r.get("is_positive") is not False}
    sure = set(page) | {_key(r) for r in others}
    for region_id, entry in remembered.items():
        if _at(page.get(region_id)) == entry["was"]:
            page[region_id] = entry["region"]
    for region in others:
        was = page.get(_key(region), {})
        click = {"is_positive": True} if was.get("is_positive") and _at(was) == _at(region) else {}
        page[_key(region)] = region | click
    page.pop(_key(new), None)
    return {k: r for k, r in page.items() if read_id(r)}, sure  # what a program made without ids cannot be told apart, nor moved


def _sources(task: Json) -> list[list[Json]]:
    """Regions of the task's drafts, annotations, and predictions of ours, the newest of each first."""
    own = [p for p in _list(task.get("predictions")) if split.MADE_HERE.fullmatch(str(p.get("model_version") or ""))]
    annotations = [a for a in _list(task.get("annotations")) if a.get("was_cancelled") is not True]
    found = []
    for kind in (_list(task.get("drafts")), annotations, own):
        found += sorted(kind, key=lambda e: str(e.get("updated_at") or e.get("created_at") or ""), reverse=True)
    return [[{"origin": "prediction"} | r if "model_version" in e else r for r in _list(e.get("result"))] for e in found]


def _object_at(control: KeypointControl, name: str, place: np.ndarray, boxes: Sequence[DrawnBox],
               objects: Sequence[LabelledObject]) -> tuple[DrawnBox | None, LabelledObject | None]:  # fmt: skip
    """The object that a click on `name` is about: whose box holds it; of several, the one whose own such point is nearest. Beside
    all boxes it may correct a point that strayed. None: no object of the page."""
    if control.box is None or not boxes:
        return None, max(objects, key=lambda o: int(o.keypoints.placed.sum()), default=None)
    by_box = {o.box.region_id: o for o in objects if o.box is not None}

    def gap(box: DrawnBox) -> float:
        held = by_box.get(box.region_id)
        i = control.schema.index(name)
        return float(np.linalg.norm(held.keypoints.xy[i] - place)) if held and held.keypoints.placed[i] else np.inf

    fitting = [b for b in boxes if _holds(b.box, place)]
    fitting = fitting or [b for b in boxes if _holds(b.box, place, NEAR) and np.isfinite(gap(b))]
    if not fitting:
        return None, None
    box = min(fitting, key=lambda b: (gap(b), b.box[2] * b.box[3]))
    return box, by_box.get(box.region_id)


def _around(name: str, place: np.ndarray, support: Support, size: tuple[int, int]) -> np.ndarray | None:
    """(4,) the box that an object of the usual size has when its `name` lies at `place`; None without examples."""
    boxes, shares = [], []
    for _, points in support:
        box = points.box if points.box is not None else box_of_points(points.xy[points.placed], 0.1)
        if min(box[2:]) > 0:
            boxes.append(box[2:])
            i = points.names.index(name)
            shares.append((points.xy[i] - box[:2]) / box[2:] if points.placed[i] else np.array([0.5, 0.5]))
    if not boxes:
        return None
    sides = np.median(boxes, 0)
    box = clip_box(np.concatenate([place - np.median(shares, 0) * sides, sides]), *size)
    return box if min(box[2:]) > 0 else None


def _holds(box: np.ndarray | None, place: np.ndarray, margin: float = 0.0) -> bool:
    if box is None:
        return False
    reach = margin * max(box[2:])
    return bool((place >= box[:2] - reach).all() and (place <= box[:2] + box[2:] + reach).all())


def _last(control: KeypointControl, regions: Sequence[Json]) -> Json | None:
    """What was drawn: the newest click, else the newest region."""
    boxes = control.box.from_name if control.box else None
    own = [r for r in regions if isinstance(r.get("value"), dict) and (
        (r.get("type") == "keypointlabels" and r.get("from_name") == control.from_name)
        or (r.get("type") in BOXES and r.get("from_name") == boxes))]  # fmt: skip
    return next((r for r in reversed(own) if "is_positive" in r), own[-1] if own else None)


def _plain(region: Json) -> Json:
    """A smart keypoint as any other region: it carries its label in value.labels."""
    value = region.get("value")
    if isinstance(value, dict) and region.get("type") in ("keypoint", "keypointlabels"):
        labels = value.get("keypointlabels") or value.get("labels")
        labels = labels if isinstance(labels, list) else []
        return {**region, "type": "keypointlabels", "value": {**value, "keypointlabels": labels}}
    return region


def _cleaned(region: Json) -> Json:
    """A drawn region as the page keeps it: no longer a question."""
    value = {k: v for k, v in region["value"].items() if k != "labels"}
    rest = {k: v for k, v in region.items() if k not in ("is_positive", "value")}
    return {**rest, "value": value, "origin": region.get("origin") or "manual"}


def _label(region: Json) -> Any:
    value = region.get("value")
    found = (value.get("keypointlabels") or value.get("rectanglelabels")) if isinstance(value, dict) else None
    return found[0] if isinstance(found, list) and found else None


def _key(region: Json) -> str:
    """A choice has the id of the point that it is about."""
    key = read_id(region)
    return f"{key} choices" if region.get("type") == "choices" else key


def _at(region: Json | None) -> list[Any] | None:
    value = region.get("value") if region else None
    return [value.get("x"), value.get("y")] if isinstance(value, dict) else None


def _list(value: Any) -> list[Json]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
