"""Predictions for many tasks at once, which no time limit can cut off: runs, their states, how they are asked for and cancelled.

Label Studio's own *Retrieve Predictions* waits for one answer to all tasks, and gives up after 100 seconds. Here the backend
posts predictions itself, in the background (prelabel_work.py), and what became of each task is a row of the journal:

    waiting ──> posting ──> posted          it has its prediction
       │  └─ trouble: tried again, at growing intervals; at last `failed`, with the reason
       └──> there | labelled | gone         nothing to do: it has a prediction of this version already, a person was first, it was deleted

A run of kind `unlabelled` is what a person asks for: every task that nobody labelled. One of kind `again` gathers by itself
the tasks that were given an empty prediction during an outage, and replaces those.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from backend.services import Services
from backend.split import RETRY
from backend.tables import Prelabel, PrelabelTask
from kptllm_core.errors import InvalidInput, NotFound

UNLABELLED, AGAIN = "unlabelled", "again"
RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
WAITING, POSTING, POSTED, THERE, LABELLED, GONE = "waiting", "posting", "posted", "there", "labelled", "gone"
UNSETTLED = (WAITING, POSTING)
SHOWN_FAILURES = 20
Json = dict[str, Any]


def start(services: Services, project: str, replace: bool = False, asked_by: str = "") -> Prelabel:
    """Ask for a run over all unlabelled tasks; the unfinished one if there is one, which `replace` is added to.

    replace: predictions of this backend's older versions are deleted where a new one was posted.
    """
    check_project(services, project)

    def change(session: Session) -> Prelabel:
        run = _open_run(session, project, UNLABELLED, asked_by)
        run.replace = run.replace or replace
        return run

    return services.journal.write(change)


def again(services: Services, project: str, tasks: Collection[int]) -> None:
    """These tasks are given an empty prediction now, because a service is down: they get a real one when it is back."""
    if not tasks or not (project.isdigit() and services.has_token):
        return

    def change(session: Session) -> None:
        run = _open_run(session, project, AGAIN, "predictions that were empty during an outage")
        run.listed = True
        rows = session.execute(select(PrelabelTask.task, PrelabelTask.state).where(PrelabelTask.run == run.id))
        known = {row[0]: row[1] for row in rows}
        for task in set(tasks):
            if task not in known:
                session.add(PrelabelTask(run=run.id, task=task, state=WAITING, attempts=0, message=""))
            elif known[task] not in UNSETTLED:
                same = (PrelabelTask.run == run.id, PrelabelTask.task == task)
                session.execute(update(PrelabelTask).where(*same).values(state=WAITING, attempts=0))

    services.journal.write(change)


def to_repeat(tasks: list[Any], results: list[Json]) -> list[int]:
    """The ids of those tasks whose empty prediction is worth asking for again."""
    return [
        task["id"]
        for task, result in zip(tasks, results, strict=True)
        if str(result.get("model_version")).endswith(RETRY)
        and isinstance(task, dict)
        and isinstance(task.get("id"), int)
        and not isinstance(task["id"], bool)
    ]


def cancel(services: Services, project: str) -> Prelabel:
    """End the project's run. What it posted stays. NotFound if there never was one."""
    run = latest(services, project)
    if run is None:
        raise NotFound(f"Project {project} has no prelabel run to cancel.")
    finish(services, run.id, CANCELLED, "cancelled by a person; what was posted stays")
    return get(services, run.id)


def get(services: Services, run: str) -> Prelabel:
    with services.journal.reading() as session:
        row = session.get(Prelabel, run)
    if row is None:
        raise NotFound(f"There is no prelabel run '{run}'.")
    return row


def latest(services: Services, project: str) -> Prelabel | None:
    """The run that a person asked for last."""
    with services.journal.reading() as session:
        query = select(Prelabel).where(Prelabel.project == project, Prelabel.kind == UNLABELLED)
        return session.scalars(query.order_by(Prelabel.created_at.desc()).limit(1)).first()


def open_runs(services: Services) -> list[str]:
    """What is still to be worked on, what a person asked for first."""
    with services.journal.reading() as session:
        query = select(Prelabel.id).where(Prelabel.open_key.is_not(None))
        return list(session.scalars(query.order_by(Prelabel.kind.desc(), Prelabel.created_at)))


def finish(services: Services, run: str, state: str, message: str) -> bool:
    """End a run, unless it is done while tasks wait that were added just now. Whether it is at its end."""

    def change(session: Session) -> bool:
        row = session.get_one(Prelabel, run)
        waiting = select(func.count()).where(PrelabelTask.run == run, PrelabelTask.state.in_(UNSETTLED))
        if row.open_key is None:
            return True
        if state == DONE and session.scalar(waiting):
            return False
        row.state, row.open_key, row.message, row.finished_at = state, None, message, time.time()
        return True

    return services.journal.write(change)


def check_project(services: Services, project: str) -> None:
    """InvalidInput where Label Studio's API cannot be used for this project."""
    if not services.has_token:
        raise InvalidInput(
            "The backend has no token for Label Studio, so it can post no predictions there. Set LABEL_STUDIO_API_KEY "
            "(a personal access token) for the backend and start it again."
        )
    if not project.isdigit():
        raise InvalidInput(f"The project is {project!r}; expected Label Studio's project id, a number such as 12.")


def _open_run(session: Session, project: str, kind: str, asked_by: str) -> Prelabel:
    """The unfinished run of that kind, or a new one. What is known of the tasks of earlier ones is forgotten then."""
    key = f"{project}:{kind}"
    run = session.scalar(select(Prelabel).where(Prelabel.open_key == key))
    if run is None:
        earlier = select(Prelabel.id).where(Prelabel.project == project, Prelabel.kind == kind)
        session.execute(delete(PrelabelTask).where(PrelabelTask.run.in_(earlier)))
        run = Prelabel(
            id=secrets.token_hex(8), project=project, kind=kind, open_key=key, state=RUNNING, replace=False, listed=False, cursor=0,
            asked_by=asked_by, message="waiting for its turn", created_at=time.time(),
        )  # fmt: skip
        session.add(run)
        session.flush()
    return run


def prelabel_state(services: Services, run: Prelabel) -> Json:
    """Everything about a run, as JSON. `total` grows until `listed`."""
    with services.journal.reading() as session:
        per_state = select(PrelabelTask.state, func.count()).where(PrelabelTask.run == run.id).group_by(PrelabelTask.state)
        counts = {row[0]: int(row[1]) for row in session.execute(per_state)}
        bad = select(PrelabelTask).where(PrelabelTask.run == run.id, PrelabelTask.state == FAILED).order_by(PrelabelTask.task)
        failures = [{"task": t.task, "message": t.message} for t in session.scalars(bad.limit(SHOWN_FAILURES))]
    total = sum(counts.values())
    waiting = sum(counts.get(s, 0) for s in UNSETTLED)
    active = run.open_key is not None
    eta = waiting / run.per_second if active and run.listed and run.per_second else None
    return {
        "prelabel": run.id,
        "project": run.project,
        "kind": run.kind,
        "state": run.state,
        "active": active,
        "replace": run.replace,
        "listed": run.listed,
        "total": total,
        "finished": total - waiting,
        "waiting": waiting,
        "posted": counts.get(POSTED, 0),
        "there_already": counts.get(THERE, 0),
        "labelled_meanwhile": counts.get(LABELLED, 0),
        "gone": counts.get(GONE, 0),
        "failed": counts.get(FAILED, 0),
        "failures": failures,
        "per_second": run.per_second,
        "eta_seconds": eta,
        "message": run.message,
        "asked_by": run.asked_by,
        "created_at": run.created_at,
        "finished_at": run.finished_at,
    }


def project_prelabels(services: Services, project: str) -> Json:
    """{"prelabel": the last run a person asked for, or None, "again": the unfinished one after an outage, or None}."""
    run = latest(services, project)
    with services.journal.reading() as session:
        repeated = session.scalar(select(Prelabel).where(Prelabel.open_key == f"{project}:{AGAIN}"))
    return {
        "prelabel": prelabel_state(services, run) if run else None,
        "again": prelabel_state(services, repeated) if repeated else None,
    }
