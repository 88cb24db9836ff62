"""Which adapters are kept. THE POLICY: of each project the newest KEEP_ADAPTERS, and besides them every adapter

- of the version that serves, of the pinned one, and of the one that a roll back leads to or that served before;
- that is in a running comparison, or that an unfinished round starts from;
- of the parent of any of these.

All others are deleted from the core. Their versions stay in the list with their figures, marked `pruned`, and cannot serve any
more. What a cancelled or failed round may have left at the core goes, too. Adapters that this journal did not order are left
alone: a core may serve several backends.
"""

from __future__ import annotations

import logging

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from backend import shadow
from backend.services import Services
from backend.serving import previous_of
from backend.tables import Job, Project, Version
from kptllm_core.errors import Conflict, NotFound

log = logging.getLogger(__name__)


def prune(services: Services, project: str) -> list[str]:
    """Delete what the policy does not keep; returns the names. May be called at any time, and repeated after a kill."""

    def mark(session: Session) -> set[str]:
        row = session.get_one(Project, project, with_for_update=True)
        doomed = _doomed(session, row, services.settings.keep_adapters)
        where = (Version.project == project, Version.adapter.in_(doomed), ~Version.pruned)
        if session.scalar(select(Version.id).where(*where).limit(1)) is not None:
            session.execute(update(Version).where(*where).values(pruned=True))
        return doomed

    with services.journal.reading() as session:  # the usual case deletes nothing, and asks nobody
        row = session.get(Project, project)
        if row is None or not _doomed(session, row, services.settings.keep_adapters):
            return []
    there = {str(adapter["name"]) for adapter in services.core.adapters()}
    deleted = []
    for name in sorted(services.journal.write(mark) & there):  # by now it can no longer serve
        try:
            services.core.delete_adapter(name)
        except (NotFound, Conflict) as error:
            log.info("project %s: the adapter %s is not deleted: %s", project, name, error.message)
            continue
        deleted.append(name)
    if deleted:
        log.info("project %s: adapters deleted: %s", project, ", ".join(deleted))
    return deleted


def kept(session: Session, row: Project, newest: int) -> set[str]:
    """The adapters of a project that the policy keeps; newest: KEEP_ADAPTERS."""
    versions = list(session.scalars(select(Version).where(Version.project == row.id).order_by(Version.id.desc())))
    by_id, by_name = {v.id: v for v in versions}, {v.name: v for v in versions}
    roots = {row.active_version, row.pinned}
    if row.active_version in by_id:
        before = previous_of(session, row, by_id[row.active_version])
        roots.add(before.id if before else None)
    comparison = shadow.running(session, row.id)
    if comparison is not None:
        roots |= {comparison.version, comparison.previous}
    job = session.scalar(select(Job).where(Job.open_key == row.id))
    if job is not None:
        roots.add(job.parent)
    held = [by_id[n] for n in roots if n in by_id]
    held += [by_name[v.parent] for v in held if v.parent in by_name]
    latest = list(dict.fromkeys(v.adapter for v in versions if v.adapter and not v.pruned))[:newest]
    return {v.adapter for v in held if v.adapter} | set(latest)


def _doomed(session: Session, row: Project, newest: int) -> set[str]:
    """Adapters that go, deleted already or not: those of versions that are not kept, and of rounds that ended without one."""
    mine = set(session.scalars(select(Version.adapter).where(Version.project == row.id, Version.adapter.is_not(None))))
    ended = select(Job.adapter).where(
        Job.project == row.id, Job.core_job.is_not(None), Job.version.is_(None), Job.state.in_(("cancelled", "failed"))
    )
    left = set(session.scalars(ended)) - mine
    return {str(name) for name in (mine - kept(session, row, newest)) | left if name}
