"""What people say about the version that serves: roll back, pin, unpin.

A pinned version serves until a person says otherwise: rounds go on and are judged, but nothing is promoted, rolled back or
chosen anew by itself. Only what makes the pinned version impossible releases a pin: another base, names that it does not
know, an adapter that the core cannot use.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.journal import Journal
from backend.tables import Event, Project, Version
from backend.versions import advance, cannot_serve, lock_project, promote, unknown_project
from kptllm_core.errors import Conflict, NotFound


def roll_back(journal: Journal, project: str, seen: str | None = None) -> tuple[Version, str]:
    """Serve the version before again; (it, what happened in words). Conflict when there is none that can serve.

    seen: the version that is to be rolled back, as a person saw it serve. Conflict if another one serves by now: the button was pressed
    twice, a colleague was first, or a round was promoted in between.
    """

    def change(session: Session) -> tuple[Version, str]:
        row, now = _serving(session, project)
        if seen not in (None, now.name):
            raise Conflict(f"'{seen}' serves no more, '{now.name}' does. Nothing was changed; roll back from there if you still want to.")
        target = previous_of(session, row, now)
        if target is None:
            raise Conflict(f"There is no version before '{now.name}' that can serve project {project} as it is now.")
        said = f"Rolled back by a person to {target.name}."
        now.promoted, now.reason = False, f"{now.reason} {said}".strip()[-2000:]
        session.add(
            Event(project=project, action="ROLLBACK", about={"from": now.name, "to": target.name, "by": "person"})
        )
        promote(session, row, target, said)
        return target, f"{target.name} serves again; {now.name} is kept, and can be activated."

    return journal.write(change)


def pin(journal: Journal, project: str, name: str) -> Version:
    """Serve this version and nothing else until `unpin`. NotFound, or Conflict if it cannot serve."""

    def change(session: Session) -> Version:
        row, _ = _serving(session, project)
        version = named(session, project, name)
        problem = cannot_serve(session, row, version)
        if problem:
            raise Conflict(f"'{name}' {problem}.")
        row.pinned = None
        promote(session, row, version, "Pinned by a person.")
        row.pinned = version.id
        session.add(Event(project=project, action="PINNED", about={"version": name}))
        return version

    return journal.write(change)


def unpin(journal: Journal, project: str) -> Version:
    """Let better versions serve again; the one that serves now goes on until then."""

    def change(session: Session) -> Version:
        row, now = _serving(session, project)
        if row.pinned is not None:
            row.pinned = None
            session.add(Event(project=project, action="UNPINNED", about={"version": now.name, "why": "by a person"}))
            advance(session, row, None)  # a support set may have been due meanwhile
        return session.get_one(Version, row.active_version)

    return journal.write(change)


def previous_of(session: Session, row: Project, version: Version) -> Version | None:
    """The version to go back to: the one that served when this one was made, else the newest earlier one that was promoted."""
    earlier = select(Version).where(Version.project == row.id, Version.id < version.id).order_by(Version.id.desc())
    found = list(session.scalars(earlier))
    found.sort(key=lambda v: (v.name != version.parent, not v.promoted, -v.id))
    usable = [v for v in found if (v.promoted or v.name == version.parent) and not cannot_serve(session, row, v)]
    return usable[0] if usable else None


def named(session: Session, project: str, name: str) -> Version:
    """A version by its name. NotFound with where to look."""
    version = session.scalar(select(Version).where(Version.project == project, Version.name == name))
    if version is None:
        raise NotFound(f"Project {project} has no version '{name}'. GET /projects/{project}/versions lists them.")
    return version


def pin_state(session: Session, row: Project) -> dict[str, Any]:
    """{"pinned": name or None, "previous": the version that a roll back leads to, or None}."""
    now = session.get(Version, row.active_version) if row.active_version else None
    pinned = session.get(Version, row.pinned) if row.pinned else None
    target = previous_of(session, row, now) if now else None
    return {"pinned": pinned.name if pinned else None, "previous": target.name if target else None}


def _serving(session: Session, project: str) -> tuple[Project, Version]:
    """The project, locked, and the version that serves it. NotFound if it was never seen."""
    if session.get(Project, project) is None:
        raise unknown_project(project)
    row = lock_project(session, project)
    version = session.get(Version, row.active_version) if row.active_version else None
    if version is None:
        raise unknown_project(project)
    return row, version
