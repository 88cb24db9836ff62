"""The second judge at work: after a promotion the version before predicts the next images, too, unseen; it comes back if it was better.

Made only for images that a person has labelled since, for so many as the judgement needs (SHADOW_IMAGES), a few at a time, and
only while nobody waits for the core. `judges.verdict` decides; every step is a transaction, so that a kill loses nothing.

Images of one video or subject (`Task.group`) count as one there: with few groups all SHADOW_IMAGES may pass without a judgement.

An image counts if its annotator was shown the promoted version's prediction, or none at all: where another version's was
shown, that one would be flattered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend.intake import control_key
from backend.judges import LOOK_EVERY, Pair, by_group, verdict
from backend.prediction import CHUNK, Prediction
from backend.prequential import score_new, unjudged
from backend.served import ask_shadow, first_sayings, keep_shadow, predictions_of
from backend.services import Services
from backend.tables import Annotation, Comparison, Event, Predicted, Project, Task, Version
from backend.versions import candidates_of, cannot_serve, lock_project, newest_annotation, serve
from kptllm_core.errors import ArtifactError
from label_config.annotations import boxes_in
from label_config.schema import LabelConfig, parse

log = logging.getLogger(__name__)
AT_ONCE = 4  # images for which the core is asked in the shadow
TRIES = 5  # after which a prediction that cannot be had at the moment is given up
SECONDS = 60.0  # the longest that they may take together; an image full of objects takes ten


def begin(session: Session, row: Project, version: Version, previous: Version, images: int) -> None:
    """Compare a version that was just promoted with the one before it, if both can predict. images: SHADOW_IMAGES."""
    if images and version.base == previous.base and version.id != previous.id and not previous.pruned:
        session.add(
            Comparison(project=row.id, version=version.id, previous=previous.id, upto=newest_annotation(session))
        )


def running(session: Session, project: str) -> Comparison | None:
    query = select(Comparison).where(Comparison.project == project, Comparison.state == "running")
    return session.scalars(query.order_by(Comparison.id.desc())).first()


class Shadows:
    """The comparisons of all projects. `step` and `make` are called by the keeper, each in one thread of one process at a time."""

    def __init__(self, services: Services) -> None:
        self.services, self.journal = services, services.journal
        self.images = services.settings.shadow_images
        self._seen: dict[str, tuple[Any, ...]] = {}  # project → what there was when it was last looked at
        self._made: dict[str, int] = {}  # project → how many predictions were made here
        self._tries: dict[int, int] = {}  # predictions.id → how often it could not be had

    def step(self, project: str) -> None:
        """Score what was labelled, want the predictions that the comparison needs, and decide when there are enough."""
        with self.journal.reading() as session:
            said = session.scalar(select(func.max(Annotation.id)).where(Annotation.project == project)) or 0
            comparison, row = running(session, project), session.get_one(Project, project)
            stand = (said, comparison.id if comparison else 0, self._made.get(project, 0), row.config_hash, unjudged(session, project))
        if stand != self._seen.get(project):
            score_new(self.journal, project)
            self._ask(project)
            self._decide(project)
            self._seen[project] = stand

    # ------------------------------------------------------------ the comparison

    def _ask(self, project: str) -> None:
        """Want both versions' predictions of the images that count, and of no others."""
        with self.journal.reading() as session:
            comparison = running(session, project)
            if comparison is None:
                return
            wanted = _next_images(session, comparison, self.images)
            versions = [session.get_one(Version, n) for n in (comparison.version, comparison.previous)]
            missing = {v.id: set(wanted) - {r.task for r in predictions_of(session, v, wanted)} for v in versions}
        if any(missing.values()):
            self.journal.write(lambda session: [ask_shadow(session, v, sorted(missing[v.id])) for v in versions])

    def _decide(self, project: str) -> None:
        def change(session: Session) -> str:
            row = lock_project(session, project)
            comparison = running(session, project)
            if comparison is None:
                return ""
            found = [pair for _, pair in pairs_of(session, comparison, self.images)]
            groups = len(by_group(found))
            if len(found) < self.images and groups < LOOK_EVERY * (comparison.looks + 1):
                return ""
            comparison.looks += 1
            better, comparison.figures, said = verdict(found, self.images)
            if better == "previous":
                return _roll_back(session, row, comparison, said)
            if better == "version" or len(found) >= self.images:
                comparison.state, comparison.ended_at = "kept", time.time()
                few = f"too few groups (videos, subjects) to tell, fewer than {LOOK_EVERY}," if groups < LOOK_EVERY else "not worse"
                comparison.reason = f"Kept: {'better' if better else few} {said}."
                return comparison.reason
            comparison.reason = f"Not decided yet: {said}."
            return ""

        said = self.journal.write(change)
        if said:
            log.info("project %s: %s", project, said)

    # ------------------------------------------------------------ making predictions that nobody waits for

    def make(self, project: str) -> int:
        """Fill in a few of the wanted predictions, those of a comparison first; returns how many. None while somebody waits for
        the core, and only those of a comparison while it trains."""
        with self.journal.reading() as session:
            wanted, needed = self._wanted(session, project)
            if not wanted:
                return 0
            row, version = session.get_one(Project, project), session.get_one(Version, wanted[0].version)
            rows = {r.task: r.id for r in [r for r in wanted if r.version == version.id][:AT_ONCE]}
            config = parse(row.label_config)
            problem = cannot_serve(session, row, version)
            tasks = [_task(session, project, task) for task in rows]
            boxes = {task: boxes_for(session, config, project, task) for task in rows}
        if problem:
            return self._keep(project, rows, {}, dict.fromkeys(rows, f"{version.name} {problem}."))
        core = self.services.core.health()
        if core.get("waiting") or (core.get("training") and not needed):
            return 0
        prediction = Prediction(self.services, project, config, version, tasks, None, time.monotonic() + SECONDS, boxes)
        try:
            results = prediction.run()
        except ArtifactError as error:
            return self._keep(project, rows, {}, dict.fromkeys(rows, error.message))
        failed = {}
        for task, result in zip(rows, results, strict=True):
            if "error" in result:
                self._tries[rows[task]] = self._tries.get(rows[task], 0) + 1
                if (
                    result["model_version"] == version.name or self._tries[rows[task]] >= TRIES
                ):  # else it may be had later
                    failed[task] = str(result["error"]["message"])
            elif task not in prediction.made:
                failed[task] = f"{version.name} was given no box to look into, and the label config lets it find none."
        return self._keep(project, rows, prediction.made, failed)

    def _wanted(self, session: Session, project: str) -> tuple[Sequence[Predicted], bool]:
        """Some of the rows that are asked for and not made, and whether a comparison needs them."""
        query = select(Predicted).where(
            Predicted.project == project, Predicted.controls.is_(None), Predicted.error == ""
        )
        query = query.order_by(Predicted.id).limit(CHUNK)
        comparison = running(session, project)
        if comparison is not None:
            urgent = Predicted.task.in_(_next_images(session, comparison, self.images))
            both = Predicted.version.in_((comparison.version, comparison.previous))
            needed = session.scalars(query.where(urgent, both)).all()
            if needed:
                return needed, True
        return session.scalars(query).all(), False

    def _keep(
        self, project: str, rows: dict[int, int], made: dict[int, tuple[Any, float]], failed: dict[int, str]
    ) -> int:
        def change(session: Session) -> int:
            for task, (controls, score) in made.items():
                keep_shadow(session, rows[task], controls, score)
            for task, why in failed.items():
                keep_shadow(session, rows[task], None, 0.0, why)
            return len(made) + len(failed)

        done = self.journal.write(change)
        self._made[project] = self._made.get(project, 0) + done
        return done


# ---------------------------------------------------------------- inside a transaction


def pairs_of(session: Session, comparison: Comparison, images: int) -> list[tuple[int, Pair]]:
    """(task, figures of both versions) of the images that count and that both have predicted, in the order of labelling."""
    wanted = _next_images(session, comparison, images)
    figures: dict[int, dict[int, dict[str, Any]]] = {}
    for number in (comparison.version, comparison.previous):
        for row in predictions_of(session, session.get_one(Version, number), wanted):
            if row.figures:
                figures.setdefault(row.task, {})[number] = row.figures
    group = {c.task: c.group for c in candidates_of(session, comparison.project)}
    return [
        (task, Pair(both[comparison.version], both[comparison.previous], group[task]))
        for task in wanted
        if len(both := figures.get(task, {})) == 2
    ]


def _next_images(session: Session, comparison: Comparison, images: int) -> list[int]:
    """The first tasks that people labelled after the promotion and that count; see the top."""
    labelled = {c.task for c in candidates_of(session, comparison.project)}
    first = first_sayings(session, comparison.project)
    new = sorted((said, task) for task, said in first.items() if said > comparison.upto and task in labelled)
    new = new[: 10 * images]
    columns = select(Predicted.task, Predicted.version, Predicted.known, Predicted.shadow, Predicted.error).where(
        Predicted.project == comparison.project, Predicted.task.in_([task for _, task in new])
    )
    shown: dict[int, tuple[int, int]] = {}  # task → (known, version) of what its annotator saw
    failed = set()
    for task, version, known, shadow, error in session.execute(columns):
        if not shadow and known < first[task]:
            shown[task] = max(shown.get(task, (-1, 0)), (known, version))
        if error and version in (comparison.version, comparison.previous):
            failed.add(task)
    seen = [task for _, task in new if shown.get(task, (0, comparison.version))[1] == comparison.version]
    return [task for task in seen if task not in failed][:images]


def boxes_for(session: Session, config: LabelConfig, project: str, task: int) -> dict[str, list[list[float]]]:
    """Control → boxes (x, y, w, h) in pixels for a prediction in the shadow: those that the prediction which was shown had, so that
    two versions are asked the same; else those of the person's annotation."""
    shown = select(Predicted).where(
        Predicted.project == project, Predicted.task == task, ~Predicted.shadow, Predicted.controls.is_not(None)
    )
    row = session.scalars(shown.order_by(Predicted.known.desc())).first()
    if row is not None and row.controls:
        return {key: made["boxes"] for key, made in row.controls.items()}
    labelled = [c.row for c in candidates_of(session, project) if c.task == task]
    annotation, about = session.get(Annotation, labelled[0]) if labelled else None, session.get(Task, (project, task))
    boxes = {}
    for control in config.controls if annotation and about else ():
        size = about.files.get(about.images.get(control.image_key, ""), {}) if about else {}
        found = boxes_in(control, annotation.result if annotation else [], size.get("width"), size.get("height"))
        boxes[control_key(control)] = [[float(v) for v in box] for box in found]
    return boxes


def _roll_back(session: Session, row: Project, comparison: Comparison, said: str) -> str:
    """Serve the previous version again, unless something else was decided meanwhile or it cannot."""
    version, previous = (session.get_one(Version, n) for n in (comparison.version, comparison.previous))
    comparison.ended_at = time.time()
    problem = cannot_serve(session, row, previous)
    if row.pinned is not None:
        problem = f"is not served, since {version.name} is pinned"
    if problem:
        comparison.state = "ended"
        comparison.reason = f"{previous.name} was better {said}, but it {problem}."
        return comparison.reason
    comparison.state = "rolled_back"
    comparison.reason = f"Rolled back to {previous.name}, which was better {said}."
    version.promoted, version.reason = False, f"{version.reason} {comparison.reason}"[-2000:]
    session.add(
        Event(project=row.id, action="ROLLBACK", about={"from": version.name, "to": previous.name, "by": "judge"})
    )
    serve(session, row, previous, comparison.reason)
    return comparison.reason


def _task(session: Session, project: str, number: int) -> dict[str, Any]:
    task = session.get(Task, (project, number))
    return {"id": number, "data": dict(task.images) if task else {}}
