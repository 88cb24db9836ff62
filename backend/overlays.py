"""What is drawn over a task's image on the page: points, the lines between them, and how far apart two sayings are. Pure functions.

A drawing is {"size": (w, h) of the image in pixels, "view": the part that is shown, "unit": a length that looks the same on every
image, "rings": people's points, "dots": the model's, "gaps": lines from one to the other, "bones": lines of a skeleton,
"crosses": where a point would rather be}. Points are {"x", "y", "name", "strong"}. pages/_pictures.html draws it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from backend.matching import pair_up
from kptllm_core.keypoints import KeypointSet

UNIT = 160.0  # a unit is this part of the longer side of what is shown
MARGIN = 0.45  # around an object that is looked at closely, in shares of its size
Json = dict[str, Any]


def versus(size: Sequence[int], truth: list[Json], predicted: list[Json], skeleton: Sequence[Sequence[str]]) -> Json:
    """A version's answer over the truth. truth, predicted: keypoint sets as JSON; skeleton: pairs of names, of which an older
    answer may lack some."""
    people = [KeypointSet.from_json(o) for o in truth]
    model = [KeypointSet.from_json(o) for o in predicted]
    drawing = _empty(size)
    for o in people:
        drawing["rings"] += _points(o)
    for o in model:
        drawing["dots"] += _points(o)
        drawing["bones"] += _bones(_by_name(_points(o)), skeleton)
    for i, j in pair_up(people, model, (int(size[0]), int(size[1]))):
        if i is not None and j is not None:
            there = _by_name(_points(model[j]))
            drawing["gaps"] += [_line(p, there[p["name"]]) for p in _points(people[i]) if p["name"] in there]
    return drawing


def example(size: Sequence[int], points: Json, skeleton: Iterable[Sequence[str]] = ()) -> Json:
    """One labelled object, as the model is shown it. skeleton: as in `versus`."""
    drawing = _empty(size)
    drawing["rings"] = _points(KeypointSet.from_json(points))
    drawing["bones"] = _bones(_by_name(drawing["rings"]), skeleton)
    return drawing


def suspicion(finding: Json) -> Json | None:
    """A finding of quality control, near enough to be judged; None where the image's size is not known."""
    picture = finding["picture"]
    if not picture["size"]:
        return None
    doubted, drawing = set(finding["points"]), _empty(picture["size"])
    rings = [{"x": x, "y": y, "name": n, "strong": n in doubted} for n, (x, y) in picture["labelled"].items()]
    crosses = [{"x": x, "y": y, "name": n, "strong": True} for n, (x, y) in picture["suggested"].items()]
    at = _by_name(rings)
    drawing |= {"rings": rings, "crosses": crosses, "bones": _bones(at, finding["skeleton"])}
    drawing["gaps"] = [_line(at[c["name"]], c) for c in crosses if c["name"] in at]
    return _closer(drawing, [*rings, *crosses])


def _empty(size: Sequence[int]) -> Json:
    width, height = float(size[0]), float(size[1])
    view = {"x": 0.0, "y": 0.0, "w": width, "h": height}
    drawing: Json = {"size": (width, height), "view": view, "unit": round(max(width, height) / UNIT, 3)}
    return drawing | {key: [] for key in ("rings", "dots", "crosses", "gaps", "bones")}


def _closer(drawing: Json, points: list[Json]) -> Json:
    """Show the points with some room around them, at least a quarter of the image, in the image's own shape."""
    width, height = drawing["size"]
    xs, ys = [p["x"] for p in points], [p["y"] for p in points]
    if not xs:
        return drawing
    room = MARGIN * max(max(xs) - min(xs), max(ys) - min(ys), 1.0)
    share = max((max(xs) - min(xs) + 2 * room) / width, (max(ys) - min(ys) + 2 * room) / height, 0.25)
    share = min(share, 1.0)
    w, h = share * width, share * height
    x = min(max((min(xs) + max(xs) - w) / 2, 0.0), width - w)
    y = min(max((min(ys) + max(ys) - h) / 2, 0.0), height - h)
    view = {"x": round(x, 1), "y": round(y, 1), "w": round(w, 1), "h": round(h, 1)}
    return drawing | {"view": view, "unit": round(max(w, h) / UNIT, 3)}


def _points(o: KeypointSet) -> list[Json]:
    places = zip(o.names, o.xy, o.placed, strict=True)
    return [{"x": round(float(p[0]), 1), "y": round(float(p[1]), 1), "name": n, "strong": False} for n, p, seen in places if seen]


def _by_name(points: list[Json]) -> dict[str, Json]:
    return {p["name"]: p for p in points}


def _bones(at: dict[str, Json], pairs: Iterable[Sequence[str]]) -> list[Json]:
    return [_line(at[a], at[b]) for a, b in pairs if a in at and b in at]


def _line(a: Json, b: Json) -> Json:
    return {"x1": a["x"], "y1": a["y"], "x2": b["x"], "y2": b["y"]}
