"""Two versions side by side on the same held-out images: what each predicts, and what is true. For the page.

`comparison` reads and changes nothing; `want` asks for the predictions that are missing, which the keeper then makes in the
shadow, a few at a time. Held-out images were never shown to any version, so that each of them is a fair example.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np
from sqlalchemy.orm import Session

from backend import split
from backend.intake import control_key
from backend.journal import Journal
from backend.served import ask_shadow, predictions_of
from backend.serving import named, previous_of
from backend.tables import Annotation, Predicted, Project, Version
from backend.versions import candidates_of, cannot_serve, unknown_project, uses_of
from kptllm_core.errors import Conflict, NotFound
from label_config.annotations import read_result
from label_config.schema import LabelConfig, parse

MOST = 60  # images in one answer


def comparison(journal: Journal, project: str, a: str | None, b: str | None, limit: int = 20) -> dict[str, Any]:
    """{"a", "b": a version each, with its means over the images that both predicted; "controls": names and skeleton;
    "images": [{"task", "image": address of its picture, "controls": {control: {"size", "truth", "a", "b"}}, "a", "b": figures,
    "error"}], "heldout", "pending"}.

    a, b: version names; None: the version before, and the one that serves. Points are keypoint sets in pixels of the image;
    the figures are those of prequential.measure. The images on which the versions differ most come first.
    """
    with journal.reading() as session:
        row, pair = _versions(session, project, a, b)
        config = parse(row.label_config)
        tasks, heldout = _heldout(session, project, limit)
        made = {v.id: {r.task: r for r in predictions_of(session, v, [t for t, _ in tasks])} for v in pair}
        images = [_image(session, config, project, t, n, [made[v.id].get(t) for v in pair]) for t, n in tasks]
        problems = [cannot_serve(session, row, v) for v in pair]
    both = [i for i in images if i["a"] and i["b"]]
    images.sort(key=lambda i: -abs(i["a"]["error"] - i["b"]["error"]) if i["a"] and i["b"] else 1.0)
    pending = sum(r.controls is None and not r.error for rows in made.values() for r in rows.values())
    return {
        "a": _about(pair[0], [i["a"] for i in both], problems[0]),
        "b": _about(pair[1], [i["b"] for i in both], problems[1]),
        "controls": {
            control_key(c): {"names": list(c.schema.names), "skeleton": [list(p) for p in c.schema.skeleton]}
            for c in config.controls
        },
        "images": images,
        "compared": len(both),
        "heldout": heldout,
        "pending": pending,
    }


def want(journal: Journal, project: str, a: str | None, b: str | None, limit: int = 20) -> int:
    """Ask for what `comparison` lacks; returns how many predictions that are. Conflict if a version cannot predict (any more)."""

    def change(session: Session) -> int:
        row, pair = _versions(session, project, a, b)
        tasks, _ = _heldout(session, project, limit)
        for version in pair:
            problem = cannot_serve(session, row, version)
            if problem and len(predictions_of(session, version, [t for t, _ in tasks])) < len(tasks):
                raise Conflict(f"'{version.name}' {problem}.")
        return sum(ask_shadow(session, version, [t for t, _ in tasks], again=True) for version in pair)

    return journal.write(change)


def _versions(session: Session, project: str, a: str | None, b: str | None) -> tuple[Project, tuple[Version, Version]]:
    row = session.get(Project, project)
    now = session.get(Version, row.active_version) if row and row.active_version else None
    if row is None or now is None:
        raise unknown_project(project)
    newer = named(session, project, b) if b else now
    older = named(session, project, a) if a else previous_of(session, row, newer)
    if older is None:
        raise NotFound(f"There is no version before '{newer.name}' to compare it with. Name one as 'a'.")
    return row, (older, newer)


def _heldout(session: Session, project: str, limit: int) -> tuple[list[tuple[int, int]], int]:
    """(task, annotations.id) of the first `limit` held-out images, by their rank, so that they stay the same; how many there are."""
    uses = uses_of(session, project)
    found = [c for c in candidates_of(session, project) if uses.get(c.group) == split.HELDOUT]
    found.sort(key=lambda c: (split.rank(project, c.group), c.task))
    return [(c.task, c.row) for c in found[: max(min(limit, MOST), 1)]], len(found)


def _image(session: Session, config: LabelConfig, project: str, task: int, annotation: int,
           made: list[Predicted | None]) -> dict[str, Any]:  # fmt: skip
    result = session.get_one(Annotation, annotation).result
    controls: dict[str, Any] = {}
    for control in config.controls:
        key = control_key(control)
        rows = [(m.controls or {}).get(key) if m else None for m in made]
        size = next((r["size"] for r in rows if r), None)
        truth = read_result(control, result, *(size or (None, None))).objects
        a, b = (r["objects"] if r else None for r in rows)
        controls[key] = {"size": size, "truth": [o.keypoints.to_json() for o in truth], "a": a, "b": b}
    figures = [m.figures if m and m.judged == annotation else None for m in made]
    return {
        "task": task,
        "image": f"/projects/{quote(project)}/tasks/{task}/image",
        "controls": controls,
        "a": figures[0],
        "b": figures[1],
        "error": next((m.error for m in made if m and m.error), ""),
    }


def _about(version: Version, figures: list[dict[str, Any]], problem: str) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        return round(float(np.mean([f[key] for f in figures])), 5) if figures else None

    return {
        "model_version": version.name,
        "round": version.round,
        "pck@0.05": mean("pck"),
        "error": mean("error"),
        "cannot_predict": problem,
    }
