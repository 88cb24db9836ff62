"""Curves and diagrams as places on a canvas: numbers in, coordinates out, and the same numbers as rows of a table. Pure functions.

The templates (pages/_charts.html) draw what is made here as SVG. Values are shares, 0 at the bottom, 1 (or a little more where a
value is larger) at the top; x is the number of the round. No series is told from another by its colour alone: each has
a mark and a stroke of its own, and its name stands at its end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 680.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 160.0, 16.0, 46.0  # margins; at the right stand the names of the series, see pages/page.css
APART = 17.0  # between two names, so that they can be read
MOST_TICKS = 12
MOST_LINES = 8  # of the grid, above its foot
Json = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One series. values: (round, share, what a person reads about it, whether its mark is filled)."""

    name: str
    kind: str  # how it is drawn: see pages/page.css
    values: Sequence[tuple[int, float, str, bool]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Level:
    """A horizontal line to read the others against."""

    name: str
    kind: str
    share: float


def curve(lines: Sequence[Line], levels: Sequence[Level] = ()) -> Json | None:
    """Everything that a drawing of curves over rounds needs; None where there is no value at all."""
    lines = [line for line in lines if line.values]
    if not lines:
        return None
    rounds = sorted({r for line in lines for r, *_ in line.values})
    highest = max([1.0, *(v for line in lines for _, v, *_ in line.values), *(level.share for level in levels)])
    rise = 0.25  # between two lines of the grid
    while highest > MOST_LINES * rise:
        rise *= 2
    lines_up = math.ceil(highest / rise - 1e-9)
    top = lines_up * rise
    first, last = rounds[0], rounds[-1]

    def x(number: int) -> float:
        share = (number - first) / (last - first) if last > first else 1.0  # a single round stands beside the names
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(share: float) -> float:
        return round(HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM), 1)

    drawn, names = [], []
    for line in lines:
        values = sorted(line.values, key=lambda v: v[0])
        marks = [{"x": x(r), "y": y(v), "said": said, "filled": filled} for r, v, said, filled in values]
        path = "M" + " L".join(f"{m['x']} {m['y']}" for m in marks)
        drawn.append({"name": line.name, "kind": line.kind, "path": path, "marks": marks})
        names.append({"name": line.name, "kind": line.kind, "y": marks[-1]["y"]})
    flat = [{"name": level.name, "kind": level.kind, "y": y(level.share), "share": level.share} for level in levels]
    names += [{"name": f"{level['name']}", "kind": level["kind"], "y": level["y"]} for level in flat]
    every = math.ceil((last - first + 1) / MOST_TICKS)
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM,
        "grid": [{"y": y(i * rise), "text": f"{i * rise:.0%}"} for i in range(lines_up + 1)],
        "ticks": [{"x": x(n), "text": str(n)} for n in range(first, last + 1, every)],
        "axis": "round" if first else "round (0: only the examples)",
        "lines": drawn, "levels": flat, "names": _spread(names),
    }  # fmt: skip


def _spread(names: list[Json]) -> list[Json]:
    """Names moved apart where they would lie on each other, as little as possible, within the canvas."""
    ordered = sorted(names, key=lambda n: n["y"])
    for above, below in itertools.pairwise(ordered):
        below["y"] = max(below["y"], above["y"] + APART)
    floor = HEIGHT - BOTTOM
    for name in reversed(ordered):
        name["y"] = round(min(name["y"], floor), 1)
        floor = name["y"] - APART
    return ordered


# ---------------------------------------------------------------- the two curves of a project


def accuracy(status: Json, prequential: Json, agreement: Json) -> Json:
    """{"chart", "rows", "floor"}: PCK@0.05 of each round, on the held-out images and on the next ones, under the people's own.

    status: of project_status; the others: the reports of these names.
    """
    trained = {v["round"]: v for v in status["versions"] if v["after"]}
    round_of = {v["model_version"]: v["round"] for v in status["versions"]}
    rows: dict[int, Json] = {}
    for number, version in trained.items():
        if not rows and version["before"]:  # rounds before it may have failed: what it started from need not be the one before
            start = round_of.get(version["parent"], 0)
            rows[start] = {"round": start, "heldout": _pck(version["before"]), "serves": True}
        rows[number] = {"round": number, "heldout": _pck(version["after"]), "serves": version["promoted"]}
    for number, (share, images) in _next_images(prequential["versions"]).items():
        rows.setdefault(number, {"round": number, "heldout": None, "serves": True}).update(next=share, images=images)
    ordered = [rows[n] for n in sorted(rows)]
    floor = people(agreement)
    heldout = [(r["round"], r["heldout"], _point(r, "heldout"), r["serves"]) for r in ordered if r["heldout"] is not None]
    later = [(r["round"], r["next"], _point(r, "next"), True) for r in ordered if r.get("next") is not None]
    lines = [Line("held-out images", "judge", heldout), Line("the next images", "next", later)]
    levels = [Level("two people agree", "floor", floor["pck"])] if floor else []
    return {"chart": curve(lines, levels), "rows": ordered, "floor": floor}


def people(agreement: Json) -> Json | None:
    """How well two people agree: {"pck", "mean", "images", "pairs"} over all controls; None where nobody labelled an image twice."""
    found = [c for c in agreement["controls"].values() if c["all"]["pairs"]]
    pairs = sum(c["all"]["pairs"] for c in found)
    if not pairs:
        return None
    mean = {key: sum(get(c["all"]) * c["all"]["pairs"] for c in found) / pairs for key, get in _AGREED.items()}
    return {**{k: round(v, 4) for k, v in mean.items()}, "images": max(c["images"] for c in found), "pairs": pairs}


def people_by_point(agreement: Json) -> list[Json]:
    """How far apart people are at each point, the worst first: [{"point", "control", "pairs", "mean", "p90", "pck", "one_only"}], of
    the points that two people labelled, or that only one of them did."""
    rows = [
        {"point": name, "control": control, "pairs": p["pairs"], "mean": p["mean"], "p90": p["p90"],
         "pck": p["pck"]["0.05"] if p["pck"] else None, "one_only": p["one_only"]}
        for control, found in agreement["controls"].items()
        for name, p in found["points"].items()
        if p["pairs"] or p["one_only"]
    ]  # fmt: skip
    return sorted(rows, key=lambda r: -math.inf if r["mean"] is None else -r["mean"])


_AGREED = {"pck": lambda figures: float(figures["pck"]["0.05"]), "mean": lambda figures: float(figures["mean"])}


def effort(report: Json) -> Json:
    """{"chart", "rows"}: clicks of each round as a share of those that labelling by hand takes, and of points that were moved."""
    rows = sorted((r for r in report["rounds"] if r["saved_share"] is not None), key=lambda r: r["round"])
    clicks = [
        (r["round"], 1 - r["saved_share"], f"round {r['round']}: {1 - r['saved_share']:.0%} of the clicks, {r['images']} images", True)
        for r in rows
    ]
    moved = [
        (r["round"], r["moved_share"], f"round {r['round']}: {r['moved_share']:.0%} of the predicted points were moved", True)
        for r in rows
        if r["moved_share"] is not None
    ]
    lines = [Line("clicks needed", "judge", clicks), Line("points moved", "next", moved)]
    return {"chart": curve(lines, [Level("all by hand", "floor", 1.0)]), "rows": rows}


def reliability(report: Json, side: float = 260.0) -> Json | None:
    """The reliability diagram (calibration.reliability) on a square: {"series": [{"kind", "name", "marks"}], "side"}."""
    series = []
    for key, kind, name in (("raw", "next", "the model's own score"), ("calibrated", "judge", "calibrated")):
        marks = [
            {
                "x": round(b["score"] * side, 1), "y": round((1 - b["share"]) * side, 1),
                "low_y": round((1 - b["low"]) * side, 1), "high_y": round((1 - b["high"]) * side, 1), "filled": True,
                "said": f"score {b['score']:.2f}: {b['share']:.0%} of {b['points']} points needed no correction", **b,
            }
            for b in report[key]["bins"]
        ]  # fmt: skip
        path = "M" + " L".join(f"{m['x']} {m['y']}" for m in marks)
        series.append({"kind": kind, "name": name, "marks": marks, "path": path, "error": report[key]["error"]})
    return {"side": side, "series": series} if report["raw"]["points"] else None


def _pck(figures: Json) -> float | None:
    try:
        value = float(figures["pck"]["0.05"])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _point(row: Json, key: str) -> str:
    said = f"round {row['round']}: {row[key]:.0%} of the points right"
    if key == "next":
        return f"{said}, mean over {row['images']} images before anyone trained on them"
    return f"{said} on held-out images{'' if row['serves'] else '; it was not promoted, or rolled back'}"


def _next_images(versions: list[Json]) -> dict[int, tuple[float, int]]:
    """Round → (mean PCK@0.05, images) over its versions, which differ in their examples only."""
    found: dict[int, list[tuple[float, int]]] = {}
    for version in versions:
        found.setdefault(version["round"], []).append((version["pck@0.05"], version["images"]))
    total = {number: sum(n for _, n in values) for number, values in found.items()}
    return {n: (sum(p * k for p, k in values) / total[n], total[n]) for n, values in found.items() if total[n]}
