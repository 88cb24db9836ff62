"""The effort meter over the journal: every annotation that counts, beside the prediction that it came from. See effort.py."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend.agreement import Reading, disagreement
from backend.anchoring import Look, anchoring
from backend.database import parts
from backend.effort import Drawn, Image, Work, assisted, started_from, summary, table, work_by_origin, work_on
from backend.intake import control_key
from backend.journal import Journal
from backend.split import group_alone
from backend.tables import Annotation, Predicted, Project, Task, Version
from backend.versions import labelled, unknown_project
from kptllm_core.keypoints import KeypointSet
from label_config.annotations import LabelledObject, read_result
from label_config.schema import LabelConfig, parse

log = logging.getLogger(__name__)
RECENT = 50  # images that are listed one by one


@dataclass(frozen=True, eq=False)
class Measured:
    """An annotation, measured, and for anchoring its distance from the prediction that was made for it, shown or withheld."""

    image: Image
    look: Look | None


def effort(journal: Journal, project: str, tolerance: float) -> dict[str, Any]:
    """All of the effort meter: overall, by round and by version (of assisted images), by hand, and what both differ in.

    `withheld` are images that were served without a prediction; `copied` ones, which began as another annotation, count nowhere.
    `seconds_saved` compares the median of the seconds per point with and without predictions; None without both.
    """
    images = [m.image for m in measured(journal, project, tolerance)]
    helped, by_hand = [i for i in images if i.assisted], [i for i in images if not i.assisted]
    with_help, without = summary(helped), summary(by_hand)
    pace, hand_pace = with_help["seconds_per_point"], without["seconds_per_point"]
    saved = None if pace is None or hand_pace is None else round((hand_pace - pace) * with_help["points"], 1)
    return {
        "project": project,
        "tolerance": tolerance,
        "all": summary(images),
        "assisted": with_help,
        "by_hand": without,
        "seconds_saved": saved,
        "rounds": table(images, "round"),
        "versions": table(images, "version"),
        "recent": [i.to_json() for i in sorted(images, key=lambda i: (i.at, i.annotation))[-RECENT:]],
    }


def anchoring_report(journal: Journal, project: str, tolerance: float, share: float) -> dict[str, Any]:
    """How much people lean on what they are shown: images with a prediction against those whose prediction was withheld."""
    looks = [m.look for m in measured(journal, project, tolerance) if m.look is not None]
    with journal.reading() as session:
        known = dict(session.execute(select(Task.task, Task.group).where(Task.project == project)).all())
    groups = {look.task: known.get(look.task, group_alone(look.task)) for look in looks}
    return {"project": project, "share": share} | anchoring(looks, tolerance, groups)


def agreement_report(journal: Journal, project: str) -> dict[str, Any]:
    """Disagreement between people per keypoint, of every control: the floor of the accuracy curve."""
    config = _config(journal, project)
    readings: dict[str, list[Reading]] = {control_key(c): [] for c in config.controls} if config else {}
    own = (*labelled(project), Annotation.parent_annotation.is_(None), Annotation.completed_by != "")  # no copies, and by somebody
    with journal.reading() as session:
        many = (
            select(Annotation.task)
            .where(*own)
            .group_by(Annotation.task)
            .having(func.count(func.distinct(Annotation.completed_by)) > 1)
        )
        for row in session.scalars(select(Annotation).where(*own, Annotation.task.in_(many))):
            task = session.get(Task, (project, row.task))
            for control in config.controls if config else ():
                facts = task.files.get(task.images.get(control.image_key, ""), {}) if task else {}
                size = (facts["width"], facts["height"]) if "width" in facts else None
                read = read_result(control, row.result, *(size or (None, None)))
                objects = tuple(o.keypoints for o in read.objects)
                readings[control_key(control)].append(Reading(row.task, row.completed_by, objects, size))
    names = {control_key(c): c.schema.names for c in config.controls} if config else {}
    return {"project": project, "controls": {key: disagreement(found, names[key]) for key, found in readings.items()}}


# ---------------------------------------------------------------- annotations beside predictions


def measured(journal: Journal, project: str, tolerance: float) -> list[Measured]:
    """Every annotation that counts, in the order in which the journal heard of it."""
    config = _config(journal, project)
    if config is None:
        return []
    found: list[Measured] = []
    with journal.reading() as session:
        versions = {v.id: v for v in session.scalars(select(Version).where(Version.project == project))}
        first = _first_sayings(session, project)
        numbers = list(session.scalars(select(Annotation.id).where(*labelled(project)).order_by(Annotation.id)))
        for part in parts(numbers):
            rows = session.scalars(select(Annotation).where(Annotation.id.in_(part))).all()
            made = _predictions(session, project, {r.task for r in rows})
            for row in sorted(rows, key=lambda r: r.id):
                if row.parent_annotation is None:
                    found.append(
                        _measure(config, row, made.get(row.task, []), versions, first[row.annotation], tolerance)
                    )
            session.expunge_all()
    return found


def _measure(
    config: LabelConfig,
    row: Annotation,
    predictions: list[Predicted],
    versions: dict[int, Version],
    first: int,
    tolerance: float,
) -> Measured:
    """One annotation. predictions: of its task; first: annotations.id of the first that was heard of this annotation."""
    before = [p for p in predictions if p.known < first]
    # What was shown is told by the regions' ids; where there are none of ours, by the origins and the newest that there was.
    read = {p.id: _objects(config, row, p) for p in before}
    shown = next((p for p in reversed(before) if not p.withheld and _began(read[p.id])), None)
    sizes = _plain(config, row)
    helped = shown is not None or row.parent_prediction is not None or assisted(sizes)
    if shown is None and helped:
        shown = next((p for p in reversed(before) if not p.withheld), None)
    if shown is not None:
        work = sum((work_on(d, o, tolerance, s) for d, o, s in read[shown.id]), Work())
    else:
        work = work_by_origin(sizes)
    version = versions.get(shown.version) if shown else None
    image = Image(
        task=row.task,
        annotation=row.annotation,
        work=work,
        assisted=helped,
        version=version.name if version else None,
        round=version.round if version else None,
        seconds=row.lead_time,
        at=row.received_at,
    )
    compared = shown if helped else next((p for p in reversed(before) if p.withheld), None)
    look = Look.of(row.task, compared.withheld, read[compared.id], row.lead_time) if compared else None
    return Measured(image, look)


def _objects(
    config: LabelConfig, row: Annotation, prediction: Predicted
) -> list[tuple[list[Drawn], list[LabelledObject], tuple[int, int]]]:
    """Per control: what was drawn, what was labelled, and the image's size."""
    found = []
    for control in config.controls:
        kept = (prediction.controls or {}).get(control_key(control))
        if kept is not None:
            drawn = [
                Drawn(KeypointSet.from_json(o), kept["drawn"][i] if i < len(kept["drawn"]) else {})
                for i, o in enumerate(kept["objects"])
            ]
            size = (int(kept["size"][0]), int(kept["size"][1]))
            found.append((drawn, list(read_result(control, row.result, *size).objects), size))
    return found


def _began(read: Iterable[tuple[list[Drawn], list[LabelledObject], tuple[int, int]]]) -> bool:
    return any(started_from(drawn, labelled_objects) for drawn, labelled_objects, _ in read)


def _plain(config: LabelConfig, row: Annotation) -> list[LabelledObject]:
    return [o for control in config.controls for o in read_result(control, row.result).objects]


def _predictions(session: Session, project: str, tasks: set[int]) -> dict[int, list[Predicted]]:
    """Task → what annotators were, or would have been, shown, in the order of making."""
    query = select(Predicted).where(
        Predicted.project == project, Predicted.task.in_(tasks), ~Predicted.shadow, Predicted.controls.is_not(None)
    )
    found: dict[int, list[Predicted]] = {}
    for row in session.scalars(query.order_by(Predicted.known, Predicted.made_at, Predicted.id)):
        found.setdefault(row.task, []).append(row)
    return found


def _first_sayings(session: Session, project: str) -> dict[int, int]:
    """Annotation → annotations.id of its first state."""
    query = select(Annotation.annotation, func.min(Annotation.id)).where(Annotation.project == project)
    return {annotation: number for annotation, number in session.execute(query.group_by(Annotation.annotation)).all()}  # noqa: C416


def _config(journal: Journal, project: str) -> LabelConfig | None:
    with journal.reading() as session:
        row = session.get(Project, project)
    if row is None:
        raise unknown_project(project)
    return parse(row.label_config) if row.label_config else None
