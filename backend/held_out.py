"""Held out once, held out for ever: also when a task is moved to another group, and when its picture comes back in another task.

What a group is used for is decided once (split.py). But a task's data may name another group later: the image keeps its use, to judge
or to teach. And tasks may be deleted and imported anew: a picture that was ever held out is never taught.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend import split
from backend.tables import Annotation, Group, Task


def regroup(session: Session, task: Task, group: str) -> None:
    """The task's data name another group now. An image that was labelled keeps its use: it takes it along into a group that has
    none yet, and does not join one of another use."""
    old, new = (session.get(Group, (task.project, name)) for name in (task.group, group))
    said = select(Annotation.id).where(Annotation.project == task.project, Annotation.task == task.task).limit(1)
    if old is not None and session.scalar(said) is not None:
        if new is not None and new.use != old.use:
            return
        if new is None:
            session.add(Group(project=task.project, group=group, use=old.use))
            session.flush()  # the next task may join it
    task.group = group


def pictures(session: Session, project: str) -> set[str]:
    """The hashes of all images that are held out, those of deleted tasks, too."""
    same = (Group.project == Task.project) & (Group.group == Task.group)
    query = select(Task.files).join(Group, same).where(Task.project == project, Group.use == split.HELDOUT)
    return {sha for files in session.scalars(query) for sha in _hashes(files)}


def hold_out_repeats(session: Session, project: str, candidates: list[split.Candidate], uses: dict[str, str]) -> dict[str, str]:
    """Hold out, and remember, the undecided groups with a picture that is held out already; returns what was decided now."""
    held = pictures(session, project)
    new = {c.group: split.HELDOUT for c in candidates if c.group not in uses and shows(session, project, c, held)}
    session.add_all(Group(project=project, group=group, use=use) for group, use in new.items())
    session.flush()
    return new


def shows(session: Session, project: str, candidate: split.Candidate, held: set[str]) -> bool:
    """Whether an image shows one of these pictures. Its bytes must have been fetched."""
    task = session.get(Task, (project, candidate.task))
    return task is not None and not held.isdisjoint(_hashes(task.files))


def _hashes(files: dict[str, dict[str, str]]) -> list[str]:
    return [facts["sha256"] for facts in files.values() if "sha256" in facts]
