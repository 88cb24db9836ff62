"""What versions predicted, remembered: the rows that prequential.py scores and that two versions are compared by.

A row is one version's answer for one task, in pixels and by name, as the core gave it (before thresholds of the label config
hide points). What was made for a smart tool is not kept: the person had a hand in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend.database import parts
from backend.journal import Journal
from backend.lookalikes import note_looks
from backend.tables import Annotation, Predicted, Version
from backend.versions import newest_annotation
from kptllm_core.keypoints import KeypointSet
from label_config.regions import drawn
from label_config.schema import KeypointControl

log = logging.getLogger(__name__)
Controls = dict[str, Any]  # see tables.Predicted.controls


def control_row(
    control: KeypointControl,
    objects: Sequence[KeypointSet],
    boxes: Iterable[Iterable[float]],
    size: tuple[int, int],
    regions: Sequence[dict[str, Any]] = (),
    scores: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """What is kept of one control. boxes: (x, y, w, h) in pixels that the model was given; regions: as they were drawn; scores:
    per object, that it is there, as `to_regions` takes them.

    `scores` holds for each object how sure the model is that it is there; 1 for the one that was asked for, and where a person
    drew the box. `drawn` holds for each object which point became which region: {name: region id}; {} for an object that was not drawn.
    """
    ids = iter([r["id"] for r in regions if r["type"] == "keypointlabels"])
    sure = list(scores) if scores is not None else [None] * len(objects)
    shown: list[dict[str, str]] = []
    for points, score in zip(objects, sure, strict=True) if regions else ():
        names = [name for name, there in zip(points.names, drawn(control, points, score), strict=True) if there]
        shown.append(dict(zip(names, ids, strict=False)))
    return {
        "size": [int(v) for v in size],
        "boxes": [[round(float(v), 2) for v in box] for box in boxes],
        "objects": [points.to_json() for points in objects],
        "scores": [1.0 if score is None else round(float(score), 4) for score in sure],
        "drawn": shown,
    }


def keep_served(
    journal: Journal,
    version: Version,
    made: dict[int, tuple[Controls, float]],
    looks: Mapping[int, str] | None = None,
    withheld: Collection[int] = (),
) -> int:
    """Remember what Label Studio is given to show: task → (controls, score). Returns how many were kept.

    looks: what the tasks' images look like; withheld: tasks that were answered with nothing (anchoring.py).
    The last answer before a task was labelled is the one a person saw; later ones change nothing.
    """

    def change(session: Session) -> int:
        known = newest_annotation(session)
        note_looks(session, version.project, looks or {})
        rows = {r.task: r for r in predictions_of(session, version, made)}
        spoken = first_sayings(session, version.project, [t for t in made if t in rows])
        kept = 0
        for task, (controls, score) in made.items():
            row = rows.get(task)
            if row is None:
                row = Predicted(project=version.project, task=task, version=version.id)
                session.add(row)
            elif task in spoken and row.controls is not None:
                continue
            row.controls, row.score, row.known, row.shadow, row.error = controls, score, known, False, ""
            row.withheld, row.made_at = task in withheld, time.time()
            row.judged = row.figures = None
            kept += 1
        return kept

    return journal.write(change) if made else 0


def keep_shadow(session: Session, row: int, controls: Controls | None, score: float, error: str = "") -> None:
    """Fill in a row that was asked for (`ask_shadow`), or say why it cannot be made."""
    found = session.get(Predicted, row)
    if found is not None and found.controls is None:
        found.controls, found.score, found.error = controls, score, error
        found.known, found.made_at = newest_annotation(session), time.time()


def ask_shadow(session: Session, version: Version, tasks: Iterable[int], again: bool = False) -> int:
    """Ask for a version's answers to tasks that it never answered; returns for how many. The keeper makes them when it can.

    again: also for those that could not be made when they were asked for before.
    """
    wanted = list(dict.fromkeys(tasks))
    there = {row.task for row in predictions_of(session, version, wanted)}
    if again:
        for row in predictions_of(session, version, wanted):
            row.error = "" if row.controls is None else row.error
    new = [task for task in wanted if task not in there]
    session.add_all(Predicted(project=version.project, task=t, version=version.id, shadow=True) for t in new)
    return len(new)


def predictions_of(session: Session, version: Version, tasks: Iterable[int]) -> list[Predicted]:
    """What a version answered, or is asked, for these tasks."""
    query = select(Predicted).where(Predicted.project == version.project, Predicted.version == version.id)
    return [row for part in parts(tasks) for row in session.scalars(query.where(Predicted.task.in_(part)))]


def first_sayings(session: Session, project: str, tasks: Iterable[int] | None = None) -> dict[int, int]:
    """Task → annotations.id of the first thing that a person said about it and that counts. None: of all tasks."""
    query = (
        select(Annotation.task, func.min(Annotation.id))
        .where(Annotation.project == project, Annotation.counts)
        .group_by(Annotation.task)
    )
    queries = [query] if tasks is None else [query.where(Annotation.task.in_(part)) for part in parts(tasks)]
    return {task: first for each in queries for task, first in session.execute(each)}
