"""Corrections that no webhook brought: found through Label Studio's API, at the start and then every SWEEP_SECONDS.

Label Studio sends a webhook once and never again, so what happens while the backend is down would be lost. A sweep asks for
the tasks that changed since the last one, by Label Studio's own clock; now and then for all, since deleted tasks leave no
trace. What it finds goes the same way into the journal as a webhook does, so that nothing counts twice.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select

from backend.intake import annotation_row, id_of, task_row, updated_us
from backend.services import Services
from backend.shown import note_shown
from backend.tables import Annotation
from kptllm_core.errors import InvalidInput, KptError, NotFound, SchemaError
from label_config.schema import parse

log = logging.getLogger(__name__)
OVERLAP = timedelta(seconds=5)  # two tasks may carry the same time
ALL_EVERY = 3600.0  # seconds between sweeps over all tasks
BATCH = 100  # tasks per transaction


def sweep(services: Services, project: str) -> int:
    """Bring the journal up to date with Label Studio; returns how many annotations were new or gone. Raises a KptError."""
    journal, label_studio = services.journal, services.label_studio
    number = id_of(project, "project")
    found = label_studio.project(number)
    title, label_config = str(found.get("title") or ""), str(found.get("label_config") or "")
    journal.observe(project, label_config, services.base(), title)
    note_shown(journal, project, found.get("model_version"))
    config = parse(label_config)
    known = journal.fact(f"sweep:{project}")
    since = datetime.fromtimestamp(known["updated_us"] / 1e6, UTC) - OVERLAP if known.get("updated_us") else None
    everything = (
        since is None or time.time() - known.get("all_at", 0.0) > ALL_EVERY or time.time() < known.get("all_at", 0.0)
    )
    newest, changed, seen = int(known.get("updated_us", 0)), 0, []
    begun = time.time()
    batch: list[dict[str, Any]] = []

    def store() -> int:
        rows, there = [], set()
        for t in batch:
            for annotation in t.get("annotations") or []:
                try:
                    there.add(id_of(annotation["id"], "annotation's id"))
                    rows.append(annotation_row(project, annotation, int(t["id"]), config))
                except (InvalidInput, KeyError, TypeError) as error:
                    log.warning("project %s, task %s: an annotation is left out: %s", project, t["id"], error)
        new = journal.record(project, [task_row(project, t, config) for t in batch], rows, config, seen=True)
        return new + _bury(services, project, {int(t["id"]) for t in batch}, there, begun)

    for task in label_studio.tasks(number, annotated=everything, updated_after=None if everything else since):
        newest = max(newest, updated_us(task.get("updated_at")))
        seen.append(int(task["id"]))
        batch.append(task)
        if len(batch) >= BATCH:
            changed += store()
            batch.clear()
    changed += store()
    if everything:
        changed += _bury(services, project, None, set(), begun, keep_tasks=set(seen))
    journal.set_fact(f"sweep:{project}", {"updated_us": newest, "all_at": begun if everything else known["all_at"]})
    if changed:
        journal.log_event(project, "SWEEP", {"changed": changed, "tasks": len(seen)})
        log.info("project %s: a sweep found %d annotations that no webhook had brought", project, changed)
    return changed


def _bury(
    services: Services,
    project: str,
    tasks: set[int] | None,
    there: set[int],
    begun: float,
    keep_tasks: set[int] | None = None,
) -> int:
    """Tombstones for annotations that the journal has and Label Studio has not (any more).

    Only of `tasks` (None: of all but keep_tasks), and only those that were received before the sweep began.
    """
    with services.journal.reading() as session:
        query = select(Annotation.annotation, Annotation.task).where(
            Annotation.project == project, Annotation.current, ~Annotation.deleted, Annotation.received_at < begun
        )
        known = session.execute(query if tasks is None else query.where(Annotation.task.in_(tasks))).all()
    gone = [a for a, t in known if t not in (keep_tasks or set()) and a not in there]
    return services.journal.delete_annotations(project, gone) if gone else 0


def sweep_all(services: Services, projects: list[str]) -> None:
    """Sweep these projects. The trouble of one leaves the others alone: one that Label Studio does not have, or whose config has no keypoints,
    is told in the log; any other trouble is raised in the end, or at once when it is the second in a row, which Label Studio itself has."""
    trouble: KptError | None = None  # of the project before
    failed: KptError | None = None
    for project in projects:
        before, trouble = trouble, None
        try:
            if project.isdigit():
                sweep(services, project)
        except (NotFound, SchemaError, InvalidInput) as error:
            log.info("project %s cannot be swept: %s", project, error.message)
        except KptError as error:
            if before is not None:
                raise
            trouble = failed = error
            continue
        services.journal.swept(project)
    if failed is not None:
        raise failed
