"""Pairs and named points → the figures of report.json, and the table for people. Knows no model and no image."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kptllm_core import metrics
from kptllm_core.dataset import Sample
from kptllm_core.errors import DataError
from kptllm_core.keypoints import KeypointSet, Visibility
from kptllm_core.language import plain_words

INSTANCES = ("box_ap50", "box_ap", "recall50", "extra", "oks_ap", "calibration")  # figures of `--task instances`
NAMING_RULE = (
    "Two names are the same if their plain words are: case is ignored; punctuation, camel case and the border between "
    "letters and digits separate words; l and r (lft, rgt, lt, rt) read left and right; left and right come first. "
    "Nothing else is forgiven: neither synonyms nor another order of the other words."
)
"""`language.plain_words` in words: the published string rule of the naming accuracy."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The points of one prediction that count.

    names: of the n points; distance: (n,) in units of max(w, h); score: (n,) stated probability of lying within 0.1.
    """

    names: tuple[str, ...]
    distance: np.ndarray
    score: np.ndarray


@dataclass(frozen=True, eq=False)
class Pair:
    """One query of one episode: the model's points and the copy baseline's."""

    category: str
    query: int
    model: Measured
    copy: Measured | None  # None where no support was drawn
    predicted: KeypointSet | None = None  # what OKS needs besides: the prediction, the truth and where they lie
    truth: KeypointSet | None = None
    sample: Sample | None = None


@dataclass(frozen=True)
class NamedPoint:
    """A point given by its position: its name, the model's name for it, and its name among the category's own."""

    category: str
    true: str
    free: str
    closed: str


def pck_table(distances: Sequence[np.ndarray]) -> dict[str, float]:
    """{"0.02": …, "0.05": …, "0.1": …, "0.2": …}, mean over points, then pairs."""
    return {str(t): metrics.mean_pck(distances, t) for t in metrics.THRESHOLDS}


def detection(pairs: Sequence[Pair], seconds_per_image: float, unreadable: Sequence[str]) -> dict[str, Any]:
    """The report of `--task detect`."""
    per_category = {name: _figures(group) for name, group in _grouped(pairs).items()}
    return {
        **_figures(pairs),
        "skill": _skill(per_category),
        "per_category": per_category,
        "per_keypoint": {name: _per_keypoint(group) for name, group in _grouped(pairs).items()},
        "seconds_per_image": seconds_per_image,
        "unreadable": list(unreadable),
    }


def _figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    distances = [p.model.distance for p in pairs]
    copies = [p.copy.distance for p in pairs if p.copy is not None]
    copy = pck_table(copies) if len(copies) == len(pairs) else None
    hits = np.concatenate(distances) < 0.1
    interval = {
        str(t): metrics.bootstrap_interval(
            metrics.pck(distances, t), [p.query for p in pairs], [p.category for p in pairs]
        )
        for t in metrics.THRESHOLDS
    }
    table = pck_table(distances)
    return {
        "pairs": len(pairs),
        "objects": len({(p.category, p.query) for p in pairs}),
        "pck": table,
        "pck_ci": interval,
        "copy_pck": copy,
        "skill": metrics.skill({"": table["0.1"]}, {"": copy["0.1"] if copy else None}),
        "mpck": metrics.mpck(distances),
        "nme": metrics.nme(distances),
        "auc": metrics.auc(distances),
        "calibration_error": metrics.calibration_error(np.concatenate([p.model.score for p in pairs]), hits),
        "visibility": _visibility(pairs),
    }


def _visibility(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """{what is true of a point: {what the model said: points}} over occluded, visible and absent; what has none is left out."""
    said: dict[str, dict[str, int]] = {}
    for pair in pairs:
        if pair.predicted is None or pair.truth is None:
            continue
        found = pair.predicted.reorder(pair.truth.names).visibility
        for true, answer in zip(pair.truth.visibility, found, strict=True):
            if Visibility.NOT_LABELLED not in (true, answer):
                row = said.setdefault(Visibility(true).name.lower(), {})
                name = Visibility(answer).name.lower()
                row[name] = row.get(name, 0) + 1
    return said


def _skill(per_category: dict[str, Any]) -> float | None:
    copy = {name: c["copy_pck"]["0.1"] if c["copy_pck"] else None for name, c in per_category.items()}
    return metrics.skill({name: c["pck"]["0.1"] for name, c in per_category.items()}, copy)


def _per_keypoint(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Of each point: how often it was asked, its PCK and mean distance over all pairs that have it."""
    distances: dict[str, list[float]] = {}
    for pair in pairs:
        for name, distance in zip(pair.model.names, pair.model.distance, strict=True):
            distances.setdefault(name, []).append(float(distance))
    return {
        name: {
            "points": len(d),
            "pck": {str(t): float(np.mean(np.array(d) < t)) for t in metrics.THRESHOLDS},
            "nme": float(np.mean(d)),
        }
        for name, d in sorted(distances.items())
    }


def naming(points: Sequence[NamedPoint], seconds_per_image: float, unreadable: Sequence[str]) -> dict[str, Any]:
    """The report of `--task name`; names are compared by `NAMING_RULE`, which stands in it."""
    grouped = _grouped(points)
    by_name = {category: _grouped(group, "true") for category, group in grouped.items()}
    return {
        **_accuracy(points),
        "per_category": {category: _accuracy(group) for category, group in grouped.items()},
        "per_keypoint": {
            category: {n: _accuracy(g) for n, g in sorted(names.items())} for category, names in by_name.items()
        },
        "naming_rule": NAMING_RULE,
        "seconds_per_image": seconds_per_image,
        "unreadable": list(unreadable),
    }


def _accuracy(points: Sequence[NamedPoint]) -> dict[str, Any]:
    true = [p.true for p in points]
    return {
        "points": len(points),
        "naming_accuracy": metrics.naming_accuracy([p.free for p in points], true, plain_words),
        "naming_accuracy_closed": metrics.naming_accuracy([p.closed for p in points], true, plain_words),
    }


def _grouped(items: Iterable[Any], by: str = "category") -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, by), []).append(item)
    return groups


def table(report: dict[str, Any]) -> str:
    """The report as lines of text: one per category, then all."""
    rows = [*report["per_category"].items()]
    if len(rows) > 1 or not rows:
        rows.append(("all", report))
    if "box_ap" in report:
        return _instances_table(rows)
    naming_task = "naming_accuracy" in report
    head = ["pairs", *(f"PCK@{t}" for t in metrics.THRESHOLDS), "95% @0.1", "copy@0.1", "skill", "NME", "AUC", "calib."]
    head += ["AP"] if "AP" in report.get("published", {}) else []
    if naming_task:
        head = ["points", "named", "closed"]
    cells = [_naming_cells(row) if naming_task else _detection_cells(row) for _, row in rows]
    columns = [["", *(name for name, _ in rows)], *([h, *(c[i] for c in cells)] for i, h in enumerate(head))]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        [columns[0][i].ljust(widths[0]), *(c[i].rjust(w) for c, w in zip(columns[1:], widths[1:], strict=True))]
        for i in range(len(rows) + 1)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _instances_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    width = max(len(name) for name, _ in rows)
    head = " " * width + "".join(f"{k:>13}" for k in INSTANCES)
    return "\n".join([head, *(name.ljust(width) + "".join(f"{_number(row[k]):>13}" for k in INSTANCES) for name, row in rows)])


def _detection_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["pck_ci"]["0.1"]
    copy = row["copy_pck"]["0.1"] if row["copy_pck"] else None
    return [
        str(row["pairs"]),
        *(_number(row["pck"][str(t)]) for t in metrics.THRESHOLDS),
        f"{low:.3f}–{high:.3f}",
        _number(copy),
        _number(row["skill"]),
        _number(row["nme"]),
        _number(row["auc"]),
        _number(row["calibration_error"]),
        *([_number(row["published"]["AP"])] if "AP" in row.get("published", {}) else []),
    ]


def _naming_cells(row: dict[str, Any]) -> list[str]:
    return [str(row["points"]), _number(row["naming_accuracy"]), _number(row["naming_accuracy_closed"])]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader of the table must know besides: what was measured if not the model as it is, and by which rules."""
    told = report["arguments"]
    lines = []
    if told.get("baseline"):
        lines.append(f"These are the figures of the baseline '{told['baseline']}', not of the model.")
    if told.get("without"):
        lines.append(f"The model answered without {', '.join(told['without'])}, though it was trained with it.")
    for name, why in report.get("left_out", {}).items():
        lines.append(f"{name} was left out: {why}.")
    if "naming_rule" in report:
        lines.append(f"Rule of the names: {report['naming_rule']}")
    if "published" in report:
        figures = ", ".join(f"{name} {_number(value)}" for name, value in report["published"].items())
        lines.append(f"{told['protocol']}, {told['shots']}-shot, prompt {told['prompt']}: {figures}.")
        if report["departures"]:
            lines.append(f"Not comparable with published figures: {'; '.join(report['departures'])}.")
    return lines


def check_writable(path: Path) -> None:
    """Before long work: DataError if nothing can be written at `path`."""
    trial = path.with_name(f".{path.name}.trial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror}. Choose another --out.") from None


def write_json(path: Path, data: dict[str, Any] | list[Any]) -> None:
    """Complete or not at all: written beside, then renamed; a list has one item per line. DataError if that fails."""
    part = path.with_name(path.name + ".part")
    if isinstance(data, list):
        text = "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in data) + "\n]\n"
    else:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror}. Choose another --out.") from None
