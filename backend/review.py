"""Quality control of a project's labels: every annotation that counts, beside a prediction, through quality.py.

The prediction that bears witness is, where there is one, of a version that had not learned from the image; best the newest.
Images without any prediction (labels that were imported) are asked for in the shadow, a few at a time.

In Label Studio the findings are a field of the task's data (`mark`), which the Data Manager shows as a column, filters and
sorts: its open-source edition has no comments or reviews, and a prediction in their place would be drawn over the labels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from sqlalchemy import and_, exists, func, select
from sqlalchemy.orm import Session

from backend.database import parts
from backend.evidence import Subject
from backend.intake import control_key
from backend.journal import Journal
from backend.matching import pair_up
from backend.quality import LEAST, Finding, find
from backend.ranking import fact_name
from backend.served import ask_shadow, first_sayings
from backend.services import Services
from backend.split import group_alone
from backend.tables import Annotation, Event, Predicted, Project, Task, Version
from backend.versions import heldout_tasks, labelled, unknown_project
from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSet
from label_config.annotations import UNKNOWN, read_result
from label_config.schema import KeypointControl, parse

log = logging.getLogger(__name__)
FIELD = "label_check"  # of a task's data, in Label Studio
SURE = 0.8  # confidence from which findings are written there, unless another is asked for
DISMISSED = "QUALITY_DISMISSED"
KEPT = 10_000  # findings, and labels that cannot be used, that are kept; the page shows fewer of them at a time
ASKED = 8  # images that predictions are asked for at a time
MOST_ASKED = 400  # images of a version that are asked for at all


def quality_report(journal: Journal, project: str, least: float = LEAST) -> dict[str, Any]:
    """{"findings": [quality.Finding.to_json() and "id", "control", "skeleton"…], "checked": objects, "unused": [{"task", "annotation",
    "control", "said"}]: what of the labels could not be used as it is, such as a point that may belong to two objects}."""
    with journal.reading() as session:
        row = session.get(Project, project)
        if row is None:
            raise unknown_project(project)
        config = parse(row.label_config) if row.label_config else None
        unused: list[dict[str, Any]] = []
        subjects = {control_key(c): _subjects(session, project, c, unused) for c in config.controls} if config else {}
    told: list[dict[str, Any]] = []
    for control in config.controls if config else ():
        mine = subjects[control_key(control)]
        states = {(s.task, s.annotation): state for s, state in mine}
        told += [_told(f, control, states) for f in find([s for s, _ in mine], control.schema, control.missing == "absent", least)]
    told.sort(key=lambda f: -f["confidence"])
    return {
        "project": project,
        "checked": sum(len(found) for found in subjects.values()),
        "with_prediction": sum(s.predicted is not None for found in subjects.values() for s, _ in found),
        "findings": told[:KEPT],
        "unused": unused[:KEPT],
    }


def without_dismissed(journal: Journal, project: str, report: dict[str, Any]) -> dict[str, Any]:
    """A quality report with only the findings that no reviewer has dismissed, all of them, and their "counts" by kind."""
    with journal.reading() as session:
        events = session.scalars(select(Event).where(Event.project == project, Event.action == DISMISSED))
        gone = {str(event.about.get("finding")) for event in events}
    kept = [f for f in report["findings"] if f["id"] not in gone]
    kinds = [f["kind"] for f in kept]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return {**report, "counts": counts, "dismissed": len(report["findings"]) - len(kept), "findings": kept}


def dismiss(journal: Journal, project: str, finding: object) -> None:
    """A reviewer says that the label is right: this is not told again, until the annotation changes."""
    if not (isinstance(finding, str) and len(finding) == 16 and finding.isalnum()):
        raise InvalidInput("'finding' is the id of a finding, as /quality lists it: 16 letters and digits.")
    with journal.reading() as session:
        if session.get(Project, project) is None:
            raise unknown_project(project)
    journal.log_event(project, DISMISSED, {"finding": finding})


# ---------------------------------------------------------------- what is looked at


def _subjects(session: Session, project: str, control: KeypointControl, unused: list[dict[str, Any]]) -> list[tuple[Subject, int]]:
    """Every labelled object of a control, with the annotations.id of the state that it was read from. `unused` gets what cannot be read."""
    said = select(Annotation.task).where(*labelled(project))
    tasks = {t.task: t for t in session.scalars(select(Task).where(Task.project == project, Task.task.in_(said)))}
    witness = _witnesses(session, project)
    found: list[tuple[Subject, int]] = []
    for row in session.scalars(select(Annotation).where(*labelled(project)).order_by(Annotation.task, Annotation.id)):
        task = tasks.get(row.task)
        made = (witness.get(row.task) or {}).get(control_key(control))
        facts = task.files.get(task.images.get(control.image_key, ""), {}) if task else {}
        size = tuple(made["size"]) if made else (facts["width"], facts["height"]) if "width" in facts else None
        read = read_result(control, row.result, *(size or (None, None)))
        about = {"task": row.task, "annotation": row.annotation, "control": control_key(control)}
        # What the config lacks is told by name, not by region: fitting.set_aside.
        unused += [about | {"said": problem} for problem in read.problems if UNKNOWN not in problem]
        truth = [o.keypoints for o in read.objects]
        predicted = [KeypointSet.from_json(o).reorder(control.schema.names) for o in made["objects"]] if made else []
        partners = {i: j for i, j in pair_up(truth, predicted, size) if i is not None and j is not None}
        for i, points in enumerate(truth):
            subject = Subject(
                task=row.task,
                annotation=row.annotation,
                labelled=points,
                group=task.group if task else group_alone(row.task),
                predicted=predicted[partners[i]] if i in partners else None,
                number=i,
                image=(int(size[0]), int(size[1])) if size else None,
            )
            found.append((subject, row.id))
    return found


def _witnesses(session: Session, project: str) -> dict[int, dict[str, Any]]:
    """Task → the controls of the prediction that bears witness."""
    said = first_sayings(session, project)
    upto = {v: u for v, u in session.execute(select(Version.id, Version.upto).where(Version.project == project)).all()}  # noqa: C416
    columns = select(Predicted.id, Predicted.task, Predicted.version).where(
        Predicted.project == project, Predicted.controls.is_not(None)
    )
    best: dict[int, tuple[bool, int, int]] = {}
    for number, task, version in session.execute(columns).all():
        if task in said:
            unseen = said[task] > upto.get(version, 0)
            best[task] = max(best.get(task, (False, 0, 0)), (unseen, version, number))
    found: dict[int, dict[str, Any]] = {}
    for part in parts(number for _, _, number in best.values()):
        for row in session.scalars(select(Predicted).where(Predicted.id.in_(part))):
            found[row.task] = row.controls or {}
    return found


def _told(finding: Finding, control: KeypointControl, states: dict[tuple[int, int], int]) -> dict[str, Any]:
    """A finding as JSON. Its id changes with the annotation's state, so that a dismissal holds for what was looked at."""
    subject = finding.subject
    meaning = [
        states[subject.task, subject.annotation],
        subject.number,
        control_key(control),
        finding.kind,
        finding.points,
    ]
    number = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]
    names = control.schema.names
    skeleton = [[names[a], names[b]] for a, b in control.schema.skeleton]
    return {"id": number, "control": control_key(control), **finding.to_json(), "skeleton": skeleton}


# ---------------------------------------------------------------- predictions that are missing


def ask_for_predictions(journal: Journal, project: str) -> int:
    """Ask, a few at a time, for what calibration and quality control lack; returns for how many images.

    That is the active version's answer for the held-out images, which calibration stands on, and any answer at all for the other
    labelled ones.
    """
    with journal.reading() as session:
        row = session.get(Project, project)
        version = session.get(Version, row.active_version) if row and row.active_version else None
        if row is None or version is None or version.pruned:
            return 0
        mine = Predicted.project == project
        if session.scalar(select(Predicted.id).where(mine, Predicted.controls.is_(None), Predicted.error == "").limit(1)) is not None:
            return 0  # the last ones first
        asked = session.scalar(select(func.count()).where(mine, Predicted.shadow, Predicted.version == version.id)) or 0
        count = max(min(ASKED, MOST_ASKED - asked), 0)
        here = and_(mine, Predicted.task == Annotation.task)
        unseen = heldout_tasks(project).where(~exists().where(here, Predicted.version == version.id))
        heldout = session.scalars(unseen.order_by(Annotation.task).limit(count)).all()
        never = select(Annotation.task).where(*labelled(project), ~exists().where(here)).distinct()
        others = session.scalars(never.order_by(Annotation.task).limit(count)).all()
    wanted: list[int] = list(dict.fromkeys([*heldout, *others]))[:count]
    if not wanted:
        return 0
    return journal.write(lambda session: ask_shadow(session, session.get_one(Version, version.id), wanted))


# ---------------------------------------------------------------- in Label Studio


def mark(services: Services, project: str, findings: list[dict[str, Any]]) -> dict[str, int]:
    """Write each task's findings into its data in Label Studio, and take away those that are no more. Raises a KptError.

    The field reads `swapped: left_ear, right_ear (97 %)`; to filter for it: *label_check* *contains* `swapped`, or *is empty: no*.
    """
    if not services.has_token or not project.isdigit():
        raise InvalidInput("Label Studio cannot be written to without a token. Set LABEL_STUDIO_API_KEY, and restart.")
    texts: dict[int, list[str]] = {}
    for finding in findings:
        said = f"{finding['kind']}: {', '.join(finding['points'])} ({finding['confidence']:.0%})"
        texts.setdefault(finding["task"], []).append(said)
    wanted = {task: "; ".join(said) for task, said in texts.items()}
    marks: dict[str, str] = dict(services.journal.fact(fact_name("marks", project)).get("tasks", {}))
    changed = {task: text for task, text in wanted.items() if marks.get(str(task)) != text}
    changed |= {int(task): "" for task in marks if int(task) not in wanted}
    done = 0
    try:
        for task in services.label_studio.tasks(int(project), ids=sorted(changed)) if changed else ():
            number = int(task["id"])
            if number not in changed:
                continue
            data = {key: value for key, value in task["data"].items() if key != FIELD}
            text = changed[number]
            services.label_studio.update_task(number, data=data | ({FIELD: text} if text else {}))
            if text:
                marks[str(number)] = text
                done += 1
            else:
                marks.pop(str(number), None)
    finally:  # what was done is known, so that marking again goes on from there
        services.journal.set_fact(fact_name("marks", project), {"tasks": marks})
    log.info("project %s: %d tasks marked in Label Studio", project, done)
    return {"marked": done, "cleared": len(changed) - len(set(changed) & set(wanted)), "tasks": len(wanted)}
