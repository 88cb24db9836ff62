"""Annotations of Label Studio → objects in pixels: what a person drew, read back without guessing.

`read_result` gives the objects, their boxes and, in words, everything that could not be used; `from_result` and `boxes_in` only
the objects and the boxes. Rotating the *view* in Label Studio (`image_rotation`) leaves the coordinates in the unrotated image, so
it is not applied here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import clip_box, from_percent
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.checks import BOXES
from label_config.schema import KeypointControl

UNKNOWN = "which is not in"  # said of a label that the config lacks (any more)
SAME_PLACE = 1e-3  # per cent: two regions closer than this are one point drawn twice
ROUNDING = 0.5  # per cent: a point that lies no farther outside of the image is meant to lie on its edge
Region = dict[str, Any]


@dataclass(frozen=True)
class DrawnBox:
    """A rectangle of a person (or of the task). box: (4,) float64 x, y, w, h, pixels, upright hull if it was rotated."""

    box: np.ndarray
    region_id: str
    label: str | None
    origin: str | None


@dataclass(frozen=True)
class LabelledObject:
    """The points of one object as a person left them; the tuples follow the order of `keypoints.names`."""

    keypoints: KeypointSet
    origins: tuple[str | None, ...]  # "manual", "prediction" (accepted as it was), "prediction-changed"; None: no point
    region_ids: tuple[str | None, ...]
    box: DrawnBox | None


@dataclass(frozen=True)
class ReadResult:
    objects: tuple[LabelledObject, ...]
    boxes: tuple[DrawnBox, ...]  # all boxes of the control, with and without points
    problems: tuple[str, ...]  # what could not be used, in words; nothing is dropped without an entry here


def from_result(
    control: KeypointControl, result: list[Any], width: int | None = None, height: int | None = None
) -> list[KeypointSet]:
    """The objects that a person labelled; see `read_result` for what could not be used."""
    return [o.keypoints for o in read_result(control, result, width, height).objects]


def boxes_in(
    control: KeypointControl, result: list[Any], width: int | None = None, height: int | None = None
) -> list[np.ndarray]:
    """(4,) x, y, w, h in pixels of every box of this control that a person drew."""
    return [b.box for b in read_result(control, result, width, height).boxes]


def read_result(
    control: KeypointControl, result: list[Any], width: int | None = None, height: int | None = None
) -> ReadResult:
    """Regions of an annotation (or of an interactive context) → objects in pixels.

    width, height: of the image as it was loaded; without them the regions' own original_width/height serve.
    A point belongs to the region its parentID leads to, else to the box that it is related to (or to the object of the points that it is
    related to), else to the one box that holds it, else to the image's only object. A label that is left twice in one object, and
    a point that lies in several boxes or is tied to several, is reported and not used; one that lies in no box is kept as an object
    without a box, and reported. Where `model_missing` is "absent", no object is said to lack what such a point may be.
    """
    if not isinstance(result, list):
        raise InvalidInput(f"An annotation's result is a list of regions; found {type(result).__name__}.")
    problems = _Problems()
    regions = [r for r in result if isinstance(r, dict)]
    if len(regions) < len(result):
        problems.append(f"{len(result) - len(regions)} entries of the result are no regions")
    boxes = [b for r in regions if (b := _read_box(control, r, width, height, problems))]
    hidden = {read_id(r) for r in regions if _is_hidden(control, r)} - {""}
    points = [p for r in regions for p in _read_points(control, r, width, height, hidden, problems)]
    parents = {read_id(r): read_id(r, "parentID") for r in regions if r.get("type") != "choices" and read_id(r)}
    by_id = {b.region_id: b for b in boxes}
    groups = _grouped(points, parents, _relations(regions), boxes, problems)
    objects = [_object(control, members, by_id.get(group), problems) for group, members in groups.items() if members]
    objects = [o for o in objects if o.keypoints.placed.any()]
    if control.missing == "absent":  # beside boxes, points without one may be of any object, and lack nothing themselves
        objects = [_lacking(o, problems.names) if o.box or not boxes else o for o in objects]
    return ReadResult(tuple(objects), tuple(boxes), tuple(problems))


class _Problems(list[str]):
    """What could not be used, in words. `names`: of points whose object is not known, so that each may have them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def unclear(self, names: Collection[str], problem: str) -> None:
        self.names.update(names)
        self.append(problem)


@dataclass(frozen=True)
class _Point:
    name: str
    xy: tuple[float, float]  # pixels
    percent: tuple[float, float]
    hidden: bool
    region_id: str
    parent: str  # "" if none
    origin: str | None


def _read_points(control: KeypointControl, region: Region, width: int | None, height: int | None, hidden: set[str],
                 problems: _Problems) -> list[_Point]:  # fmt: skip
    """The points that a region names: none if it is not of this control or cannot be used, several if it carries several labels."""
    if region.get("from_name") != control.from_name or region.get("to_name", control.to_name) != control.to_name:
        return []
    if region.get("type") != "keypointlabels":
        return []
    value, region_id = region.get("value"), read_id(region)
    labels = value.get("keypointlabels") if isinstance(value, dict) else None
    where = f"keypoint region {region_id or 'without id'}"
    if not isinstance(value, dict) or not isinstance(labels, list) or not labels:
        problems.append(f"{where} has no label; it was not used")
        return []
    if region.get("is_positive") is False:
        problems.append(f"{where} is a negative click; it was not used")
        return []
    names = [name for label in labels if (name := control.name_of(str(label)))]
    percent = _numbers(value, ("x", "y"))
    size = _image_size(region, width, height)
    if percent is None or not all(-ROUNDING <= p <= 100.0 + ROUNDING for p in percent):
        problems.unclear(names, f"{where} lies at ({value.get('x')!r}, {value.get('y')!r}); expected 0…100 per cent; it was not used")
        return []
    if isinstance(size, str):
        problems.unclear(names, f"{where} {size}; it was not used")
        return []
    percent = tuple(min(max(p, 0.0), 100.0) for p in percent)
    x, y = from_percent(np.array(percent), *size)
    found = []
    for label in dict.fromkeys(str(label) for label in labels):
        name = control.name_of(label)
        if name is None:
            problems.append(
                f"{where} has the label '{label}', {UNKNOWN} '{control.from_name}': {', '.join(control.shown)}"
            )
            continue
        found.append(_Point(name, (float(x), float(y)), (percent[0], percent[1]), region_id in hidden, region_id,
                            read_id(region, "parentID"), _text(region.get("origin"))))  # fmt: skip
    return found


def _read_box(
    control: KeypointControl, region: Region, width: int | None, height: int | None, problems: list[str]
) -> DrawnBox | None:
    box = control.box
    if box is None or region.get("from_name") != box.from_name or region.get("to_name", box.to_name) != box.to_name:
        return None
    if region.get("type") not in BOXES:
        return None
    value = region["value"] if isinstance(region.get("value"), dict) else {}
    where = f"box region {read_id(region) or 'without id'}"
    labels = value.get("rectanglelabels") or value.get("labels")
    label = next((str(n) for n in labels if n in box.labels), None) if isinstance(labels, list) else None
    if labels and box.labels and label is None:
        return None  # a box of another kind of object, which shares the control
    numbers = _numbers(value, ("x", "y", "width", "height"))
    size = _image_size(region, width, height)
    if numbers is None or isinstance(size, str):
        problems.append(
            f"{where} {size if isinstance(size, str) else 'has no finite x, y, width and height'}; it was not used"
        )
        return None
    turn = _numbers(value, ("rotation",)) if value.get("rotation") is not None else (0.0,)
    if turn is None:
        problems.append(f"{where} has the rotation {value.get('rotation')!r}, which is no number; it was not used")
        return None
    hull = clip_box(_upright(np.array(numbers), turn[0], *size), *size)
    if not (numbers[2] > 0 and numbers[3] > 0 and hull[2] > 0 and hull[3] > 0):
        problems.append(
            f"{where} has no area on the image: {', '.join(f'{n:g}' for n in numbers)} per cent; it was not used"
        )
        return None
    return DrawnBox(
        hull, read_id(region) or f"unnamed box at {numbers[0]:g},{numbers[1]:g}", label, _text(region.get("origin"))
    )


def _upright(percent: np.ndarray, degrees: float, width: int, height: int) -> np.ndarray:
    """(4,) x, y, w, h in per cent, turned by Label Studio clockwise about the top left corner → (4,) pixels of the hull."""
    corner, far = from_percent(np.array([percent[:2], percent[:2] + percent[2:]]), width, height)
    if degrees % 360 == 0:
        return np.concatenate([corner, far - corner])
    angle = math.radians(degrees)
    right = (far[0] - corner[0]) * np.array([math.cos(angle), math.sin(angle)])
    down = (far[1] - corner[1]) * np.array([-math.sin(angle), math.cos(angle)])
    corners = corner + np.array([0 * right, right, down, right + down])
    return np.concatenate([corners.min(0), corners.max(0) - corners.min(0)])


def _is_hidden(control: KeypointControl, region: Region) -> bool:
    if control.occluded is None or region.get("from_name") != control.occluded or region.get("type") != "choices":
        return False
    value = region.get("value")
    choices = value.get("choices") if isinstance(value, dict) else None
    return isinstance(choices, list) and any(
        control.occluded_choice in (c, *(c if isinstance(c, list) else ())) for c in choices
    )


def _relations(regions: list[Region]) -> dict[str, set[str]]:
    """Region id → ids of the regions that a person related to it, in whatever direction."""
    found: dict[str, set[str]] = {}
    for region in regions:
        ends = read_id(region, "from_id"), read_id(region, "to_id")
        if region.get("type") == "relation" and all(ends):
            found.setdefault(ends[0], set()).add(ends[1])
            found.setdefault(ends[1], set()).add(ends[0])
    return found


def _grouped(points: list[_Point], parents: dict[str, str], relations: dict[str, set[str]], boxes: list[DrawnBox],
             problems: _Problems) -> dict[str, list[_Point]]:  # fmt: skip
    """Id of the box (or of whatever the points hang on; "": nothing) → the points of that object."""
    groups: dict[str, list[_Point]] = {b.region_id: [] for b in boxes}
    known = frozenset(groups)
    gone = set(parents.values()) - {"", *parents}
    orphans: dict[str, list[_Point]] = {}  # of the groups those that hang on a region which is gone
    above = [_box_above(point, parents, known) for point in points]
    settled = {point.region_id: box for point, box in zip(points, above, strict=True) if box}
    links = {region: set(others) for region, others in relations.items()}
    for child, parent in parents.items():
        if parent:
            links.setdefault(child, set()).add(parent)
            links.setdefault(parent, set()).add(child)
    outside = []
    for point, box in zip(points, above, strict=True):
        inside = [b for b in boxes if _holds(b, point)]
        if box:
            tied, fellows = {box} | (relations.get(point.region_id, set()) & known), set()
        else:
            reached = _reached(point.region_id, links, known | settled.keys())
            tied, fellows = {settled.get(r, r) for r in reached} & known, reached - known - settled.keys()
        if len(tied) > 1:
            problems.unclear([point.name], f"'{point.name}' ({point.region_id}) is tied to {len(tied)} boxes; keep one parent or relation; "
                             "it was not used")  # fmt: skip
        elif tied:
            groups[tied.pop()].append(point)
        elif fellows:
            group = min(fellows | {point.region_id})
            groups.setdefault(group, []).append(point)
            if fellows & gone:
                orphans[group] = groups[group]
        elif len(inside) == 1:
            groups[inside[0].region_id].append(point)
        elif inside:
            problems.unclear([point.name], f"'{point.name}' ({point.region_id}) lies in {len(inside)} boxes; drag it onto its box in "
                             "Label Studio's region list")  # fmt: skip
        else:
            outside.append(point)
    _adopt(orphans, groups, boxes)
    for parent in sorted(gone & {p.parent for p in points}):
        children = ", ".join(f"'{p.name}' ({p.region_id})" for p in points if p.parent == parent)
        problems.append(f"{children}: the parent '{parent}' is no region of this annotation; what hangs on it counts as one object, in the one box "
                        "that holds it if that has none of these points; drag them onto their box in Label Studio's region list")  # fmt: skip
    # Points beside the image's only box are still that object's, unless it has one of them already: then they are another one's, all of them.
    names, own = [p.name for p in outside], groups[boxes[0].region_id] if len(boxes) == 1 else None
    if own is not None and len(set(names)) == len(names) and not {p.name for p in own} & set(names):
        own += outside
    elif outside:
        groups.setdefault("", []).extend(outside)
        problems += [f"'{p.name}' ({p.region_id}) lies in no box: it counts as an object without one; draw its box, or drag it onto its box in "
                     "Label Studio's region list" for p in outside if boxes]  # fmt: skip
    if boxes:
        problems.names.update(p.name for group in groups.keys() - known for p in groups[group])
    return groups


def _adopt(orphans: dict[str, list[_Point]], groups: dict[str, list[_Point]], boxes: list[DrawnBox]) -> None:
    """Gives groups whose parent is gone to the one box that holds them, unless it then had a point twice."""
    for box in boxes:
        held = [group for group, points in orphans.items() if [b.region_id for b in boxes if all(_holds(b, p) for p in points)] == [box.region_id]]
        together = groups[box.region_id] + [p for group in held for p in orphans[group]]
        if len({p.name for p in together}) == len(together):
            groups[box.region_id] = together
            for group in held:
                del groups[group]


def _holds(box: DrawnBox, point: _Point) -> bool:
    (x, y), (left, top, width, height) = point.xy, box.box
    return bool(left <= x <= left + width and top <= y <= top + height)


def _box_above(point: _Point, parents: dict[str, str], boxes: Collection[str]) -> str:
    """The nearest box that a point hangs on through its parents; "" if there is none."""
    at, seen = point.parent, set()
    while at and at not in boxes and at not in seen:
        seen.add(at)
        at = parents.get(at, "")
    return at if at in boxes else ""


def _reached(region: str, links: dict[str, set[str]], ends: Collection[str]) -> set[str]:
    """The regions that links lead to from here; not beyond `ends`."""
    seen, ahead = {region}, [region]
    while ahead:
        at = ahead.pop()
        if at not in ends:
            ahead += links.get(at, set()) - seen
            seen |= links.get(at, set())
    return seen - {region}


def _object(
    control: KeypointControl, members: list[_Point], box: DrawnBox | None, problems: _Problems
) -> LabelledObject:
    names = control.schema.names
    xy, visibility = np.zeros((len(names), 2)), np.zeros(len(names), np.int8)
    origins: list[str | None] = [None] * len(names)
    ids: list[str | None] = [None] * len(names)
    for i, name in enumerate(names):
        found = [p for p in members if p.name == name]
        if not found:
            continue
        first = found[0]
        if any(max(abs(a - b) for a, b in zip(p.percent, first.percent, strict=True)) > SAME_PLACE for p in found):
            hint = "" if box else " (several objects need a box each, and the points their box as parent)"
            problems.unclear([name], f"'{name}' was placed {len(found)} times on one object; none was used{hint}")
            continue
        xy[i] = first.xy
        visibility[i] = Visibility.OCCLUDED if any(p.hidden for p in found) else Visibility.VISIBLE
        origins[i], ids[i] = first.origin, first.region_id
    keypoints = KeypointSet(names, xy, visibility, box=None if box is None else box.box)
    return LabelledObject(keypoints, tuple(origins), tuple(ids), box)


def _lacking(found: LabelledObject, unclear: Collection[str]) -> LabelledObject:
    """The object where what nobody placed is not there, save the points that are unclear in this image."""
    points = found.keypoints
    lacks = ~points.placed & [name not in unclear for name in points.names]
    return replace(found, keypoints=replace(points, visibility=np.where(lacks, Visibility.ABSENT, points.visibility)))


def read_id(region: Region, key: str = "id") -> str:
    """An id as text without the "#annotation" that the front end adds to parents; "" if there is none."""
    value = region.get(key)
    return str(value).partition("#")[0] if isinstance(value, (str, int)) else ""


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _numbers(value: Region, keys: tuple[str, ...]) -> tuple[float, ...] | None:
    """The finite numbers under these keys; None if one is missing or is something else."""
    found = [value.get(key) for key in keys]
    if all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in found
    ):  # NaN < 1e9 is False
        return tuple(float(v) for v in found if v is not None)
    return None


def _image_size(region: Region, width: int | None, height: int | None) -> tuple[int, int] | str:
    """Width and height that a region's per cent refer to; a sentence if they are not known or contradict the image."""
    own = said_size(region)
    if width is None or height is None:
        return own or "does not say how large its image is (original_width, original_height)"
    if own and is_turned(own, (width, height)):
        return (f"was drawn on an image of {own[0]} × {own[1]}, but the image has {width} × {height}: "
                "one of them is turned by 90°, so the place is not known")  # fmt: skip
    return width, height


def said_size(region: Region) -> tuple[int, int] | None:
    """Width and height of the image as a region tells them (original_width, original_height)."""
    own = _numbers(region, ("original_width", "original_height"))
    return (round(own[0]), round(own[1])) if own and min(own) >= 1 else None


def told_size(control: KeypointControl, result: list[Any]) -> tuple[int, int] | None:
    """Width and height of the control's image as the first of its regions tells them that does; None if none does."""
    own = (r for r in result if isinstance(r, dict) and r.get("to_name", control.to_name) == control.to_name)
    return next((size for region in own if (size := said_size(region))), None)


def is_turned(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) can only be of the same image if one of them is turned by 90°."""
    return abs(one[0] / one[1] * other[0] / other[1] - 1) < 0.02 < abs(other[0] / other[1] - 1)
