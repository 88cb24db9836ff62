"""What happened, durably: annotations, versions, jobs (tables.py). SQLite with WAL and synchronous=FULL, PostgreSQL by URL.

Every change is one transaction that is either acknowledged and kept, or absent; a locked database is waited for. So any
process may be killed at any moment, and what follows from the stored rows is the same for all web workers. Annotations
are only ever added: idempotent by (annotation, updated_at, hash of the result), the newest updated_at is the current one,
and a deletion is a tombstone that ends an annotation's history.

What a change means for the version that serves is in versions.py.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import delete, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from backend import split
from backend.database import Turn, make_engines, parts, unavailable, worth_repeating
from backend.held_out import regroup
from backend.intake import names_of, names_since, reading
from backend.migrate import bring_up_to_date
from backend.tables import Annotation, Base, Event, Fact, Look, Predicted, Project, Task, Version
from backend.versions import (
    advance,
    candidates_of,
    cannot_serve,
    change_base,
    freeze,
    lock_project,
    newest_annotation,
    promote,
    recount,
    serve,
    sizes_missing,
    still_taught,
    unknown_project,
)
from kptllm_core.errors import ArtifactError, Conflict, NotFound
from label_config.schema import LabelConfig, parse

log = logging.getLogger(__name__)
T = TypeVar("T")
SCHEMA = 1  # of tables.py; a journal of a later one is left alone


class Journal:
    """One per process; its methods may be called from any thread."""

    def __init__(self, url: str, patience: float = 20.0) -> None:
        """patience: seconds for which a locked database is waited for before Unavailable is raised."""
        self.patience = patience
        self._reading, self._writing = make_engines(url, patience)
        self._turn = Turn(self._writing.url, patience)
        self.write(self._open)

    @staticmethod
    def _open(session: Session) -> None:
        """Make the tables of a new journal, or what an older one lacks; refuse one that a later version of this software wrote."""
        bring_up_to_date(session.connection(), Base.metadata)
        schema = session.get(Fact, "schema")
        if schema is None:
            session.add(Fact(name="schema", value={"version": SCHEMA}))
        elif schema.value["version"] > SCHEMA:
            raise ArtifactError(
                f"The journal has the form {schema.value['version']}, this version knows forms up to {SCHEMA}. "
                "Use the later version that wrote it, or another DATA_DIR."
            )

    def close(self) -> None:
        self._writing.dispose()
        self._turn.close()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session on one consistent state; what is changed in it is lost."""
        try:
            with Session(self._reading, expire_on_commit=False) as session:
                yield session
        except SQLAlchemyError as error:
            raise unavailable(error) from error

    def write(self, change: Callable[[Session], T]) -> T:
        """Run `change` in one transaction and return what it returns. It may run more than once: another writer was first."""
        deadline = time.monotonic() + self.patience
        attempt = 0
        while True:
            try:
                with self._turn.take(), Session(self._writing, expire_on_commit=False) as session, session.begin():
                    return change(session)
            except DBAPIError as error:
                if not worth_repeating(error, attempt) or time.monotonic() > deadline:
                    raise unavailable(error) from error
                attempt += 1
                time.sleep(random.uniform(0.005, 0.05) * min(attempt, 8))

    # ------------------------------------------------------------ what is served

    def base(self) -> str | None:
        """The core's base as it was last seen, None if no core ever answered."""
        return self.fact("core").get("base")

    def fact(self, name: str) -> dict[str, Any]:
        with self.reading() as session:
            row = session.get(Fact, name)
            return dict(row.value) if row else {}

    def set_fact(self, name: str, value: dict[str, Any]) -> None:
        """Remember a value for all processes; nothing is written when nothing changed."""
        if self.fact(name) != value:
            self.write(lambda session: session.merge(Fact(name=name, value=value)))

    def change_fact(self, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Remember what `change` makes of the value; no other change comes in between."""

        def work(session: Session) -> None:
            row = session.get(Fact, name)
            session.merge(Fact(name=name, value=change(dict(row.value) if row else {})))

        self.write(work)

    def observe(self, project: str, label_config: str, base: str, title: str | None = None) -> Version:
        """The version that serves the project under this label config and this base; writes only when something changed."""
        with self.reading() as session:
            row = session.get(Project, project)
            version = session.get(Version, row.active_version) if row and row.active_version else None
            same_title = title is None or (row is not None and row.title == title)
            if row and version and row.label_config == label_config and version.base == base and same_title:
                return version
        config = parse(label_config)

        def change(session: Session) -> Version:
            row = lock_project(session, project)
            row.title = row.title if title is None else title
            changed = row.config_hash != config.hash
            names = names_of(config)
            if names != row.names:  # what predictions were worth is measured anew, by the points that are asked for now
                judged = (Predicted.project == project, Predicted.judged.is_not(None))
                session.execute(update(Predicted).where(*judged).values(judged=None, figures=None))
            row.names_since = names_since(row.names, row.names_since or {}, names, newest_annotation(session))
            row.label_config, row.config_hash, row.names = label_config, config.hash, names
            if changed:
                row.sweep_due = True  # tasks may show other images now
                recount(session, row, config)
            version = session.get(Version, row.active_version) if row.active_version else None
            if version is None or version.base != base:
                reason = "first version" if version is None else f"the core now runs {base} instead of {version.base}"
                return change_base(session, row, base, reason)
            if changed:
                taught = still_taught(session, row, version)
                why = "the label config changed"
                if version.adapter and taught is not version:
                    why += f"; the adapter of round {version.round} was trained on other names and is set aside"
                if taught is not None and taught is not version:
                    why += f"; that of round {taught.round} fits again"
                return freeze(session, row, base, taught, row.step, why)
            return version

        return self.write(change)

    def active(self, project: str) -> Version:
        """The version that serves. NotFound if the project was never seen."""
        with self.reading() as session:
            row = session.get(Project, project)
            version = session.get(Version, row.active_version) if row and row.active_version else None
        if version is None:
            raise unknown_project(project)
        return version

    def label_config(self, project: str) -> str:
        """The label config as it was last seen, empty if never."""
        with self.reading() as session:
            row = session.get(Project, project)
            return row.label_config if row else ""

    def versions(self, project: str) -> list[Version]:
        """Every version, the oldest first."""
        with self.reading() as session:
            return list(session.scalars(select(Version).where(Version.project == project).order_by(Version.id)))

    def activate(self, project: str, name: str, reason: str) -> Version:
        """Serve this version from now on: a promotion by hand, or a rollback. NotFound, or Conflict if it cannot serve."""

        def change(session: Session) -> Version:
            row = lock_project(session, project)
            version = session.scalar(select(Version).where(Version.project == project, Version.name == name))
            if version is None:
                raise NotFound(
                    f"Project {project} has no version '{name}'. GET /projects/{project}/versions lists them."
                )
            problem = cannot_serve(session, row, version)
            if problem:
                raise Conflict(f"'{name}' {problem}.")
            promote(session, row, version, reason)
            return version

        return self.write(change)

    def set_aside(self, project: str, version: Version, why: str) -> None:
        """The core cannot use this version's adapter: serve the newest promoted version without it, else the bare base."""

        def change(session: Session) -> None:
            row = lock_project(session, project)
            if row.active_version != version.id:
                return  # another request was first
            usable = None
            for other in session.scalars(select(Version).where(Version.project == project).order_by(Version.id)):
                if other.adapter == version.adapter:
                    other.promoted, other.reason = False, f"{other.reason} Set aside: {why}".strip()[-2000:]
                elif other.promoted and other.base == version.base and not cannot_serve(session, row, other):
                    usable = other
            if usable is None:
                freeze(session, row, version.base, None, row.step, f"{version.name} was set aside: {why}"[:2000])
            else:
                serve(session, row, usable, f"{version.name} was set aside: {why}"[:2000])

        self.write(change)

    # ------------------------------------------------------------ annotations

    def record(self, project: str, tasks: list[Task], annotations: list[Annotation], config: LabelConfig | None = None,
               seen: bool = False) -> int:  # fmt: skip
        """Store what a webhook or a sweep brought; returns how many annotations were new. Repetitions change nothing.

        seen: Label Studio's API showed these annotations just now, so a newer state than a tombstone's ends the tombstone.
        """
        if not tasks and not annotations:
            return 0

        def change(session: Session) -> int:
            row = lock_project(session, project)
            for task in tasks:
                _keep_task(session, task)
            now = config
            if row.label_config and (config is None or config.hash != row.config_hash):  # it changed while these were on their way
                now = parse(row.label_config)
                for annotation in annotations:
                    annotation.points, annotation.fits = reading(annotation.labels, now)
            added = sum(_keep_annotation(session, annotation, seen) for annotation in annotations)
            if added:
                advance(session, row, now)
            return added

        return self.write(change)

    def delete_annotations(self, project: str, annotations: list[int]) -> int:
        """Tombstones, also for annotations never heard of (their creation may still be on its way). Returns how many were new."""

        def change(session: Session, part: list[int]) -> int:
            row = lock_project(session, project)
            mine = (Annotation.project == project, Annotation.annotation.in_(part))
            columns = (Annotation.annotation, Annotation.task, Annotation.updated_us, Annotation.deleted)
            newest = {number: rest for number, *rest in session.execute(select(*columns).where(*mine, Annotation.current))}
            # Of an annotation that came back from one (see _seen_again).
            old = {(t.annotation, t.updated_us): t for t in session.scalars(select(Annotation).where(*mine, Annotation.deleted))}
            dead = {number: newest.get(number, (0, 0, False)) for number in part}
            dead = {number: last for number, last in dead.items() if not last[2]}
            session.execute(update(Annotation).where(*mine, Annotation.annotation.in_(dead)).values(current=False))
            for number, (task, updated, _) in dead.items():
                if (number, updated) in old:
                    old[number, updated].current = True
                    continue
                session.add(Annotation(project=project, annotation=number, task=task, deleted=True, counts=False, why_not="deleted",
                                       updated_us=updated, result_hash="deleted", points=0, fits=True, current=True))  # fmt: skip
            if dead:
                advance(session, row, None)
            return len(dead)

        return sum(self.write(partial(change, part=part)) for part in parts(annotations))

    def delete_tasks(self, project: str, tasks: list[int]) -> int:
        """Tasks that were deleted take their annotations and predictions with them. Returns how many annotations that were."""

        def change(session: Session, part: list[int]) -> list[int]:
            session.execute(update(Task).where(Task.project == project, Task.task.in_(part)).values(deleted=True))
            for of_task in (Look, Predicted):  # also of tasks that were never labelled, of which there is no other row
                session.execute(delete(of_task).where(of_task.project == project, of_task.task.in_(part)))
            found = select(Annotation.annotation).where(
                Annotation.project == project, Annotation.task.in_(part), Annotation.current, ~Annotation.deleted
            )
            return list(session.scalars(found))

        return sum(self.delete_annotations(project, self.write(partial(change, part=part))) for part in parts(tasks))

    def candidates(self, project: str) -> list[split.Candidate]:
        """One annotation per labelled image: those that training, judging and support examples come from."""
        with self.reading() as session:
            return candidates_of(session, project)

    def log_event(self, project: str, action: str, about: dict[str, Any] | None = None) -> None:
        self.write(lambda session: session.add(Event(project=project, action=action, about=about or {})))

    def sweep_soon(self, project: str) -> None:
        """Something arrived without its content: Label Studio's API is asked at the next occasion."""

        def change(session: Session) -> None:
            row = lock_project(session, project)
            row.sweep_due = True

        self.write(change)

    def swept(self, project: str) -> None:
        """What was missed has been looked for."""

        def change(session: Session) -> None:
            row = lock_project(session, project)
            row.sweep_due, row.swept_at = False, time.time()

        self.write(change)

    def note_file(self, project: str, task: int, url: str, facts: dict[str, Any]) -> None:
        """Remember which bytes stand behind a task's image: {"sha256", "width", "height"}, or {"error"} in words."""

        def change(session: Session) -> None:
            row = session.get(Task, (project, task))
            if row is not None and row.files.get(url) != facts:
                row.files = {**row.files, url: facts}

        self.write(change)

    def support_waits_for(self, project: str) -> list[tuple[Task, str]]:
        """Images (task, URL) whose size must be known before a support set that is due can be chosen."""
        with self.reading() as session:
            row = session.get_one(Project, project)
            due = split.step_of(row.labelled) > row.step and row.label_config and row.pinned is None
            return sizes_missing(session, project, parse(row.label_config)) if due else []

    def retry_support(self, project: str) -> None:
        """Choose the support set that waited for the size of an image."""
        self.write(lambda session: advance(session, lock_project(session, project), None))


# ---------------------------------------------------------------- inside a transaction


def _keep_task(session: Session, task: Task) -> None:
    known = session.get(Task, (task.project, task.task))
    if known is None:
        session.add(
            Task(project=task.project, task=task.task, group=task.group, images=task.images, files={}, deleted=False)
        )
    elif task.images:
        if known.images != task.images:
            known.images = task.images
        if known.group != task.group:
            regroup(session, known, task.group)


def _keep_annotation(session: Session, row: Annotation, seen: bool) -> bool:
    """Add a state unless it is known, and mark the newest one. True if it was new. seen: see Journal.record."""
    states = _states(row.project, row.annotation)
    same = (Annotation.updated_us == row.updated_us, Annotation.result_hash == row.result_hash)
    known = session.scalar(select(Annotation).where(*states, *same))
    newest = session.scalar(select(Annotation).where(*states, Annotation.current))
    if known is not None:
        return seen and _seen_again(known, newest, row)
    copy = {c.key: getattr(row, c.key) for c in Annotation.__table__.columns if c.key not in ("id", "received_at")}
    late = newest is not None and (
        newest.updated_us > row.updated_us or (newest.deleted and (not seen or newest.updated_us == row.updated_us))
    )
    if newest is not None and not late:
        newest.current = False
    session.add(Annotation(**{**copy, "current": not late}))
    session.flush()
    return True


def _seen_again(known: Annotation, newest: Annotation | None, shown: Annotation) -> bool:
    """Label Studio's API shows a state that the journal has. True if that changes something.

    *Remove Duplicated Tasks* moves annotations to another task, without a new updated_at, and deletes theirs: then they are there, not
    deleted. And a webhook may have brought the state that a tombstone hid until the API showed it, too.
    """
    moved = known.task != shown.task
    if newest is not None and newest is not known:
        if not newest.deleted or not (moved or newest.updated_us < known.updated_us):
            return False
        newest.current, known.current = False, True
    elif not moved:
        return False
    known.task, known.points, known.fits = shown.task, shown.points, shown.fits
    return True


def _states(project: str, annotation: int) -> tuple[Any, ...]:
    return Annotation.project == project, Annotation.annotation == annotation
