"""What people and programs are told about projects, versions and rounds: plain values made from the journal. Asks nobody."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend import shadow
from backend.fitting import set_aside
from backend.rounds import Rounds
from backend.services import Services
from backend.serving import pin_state
from backend.tables import Annotation, Comparison, Job, Project, Version
from backend.versions import heldout_tasks, unknown_project
from kptllm_core.errors import KptError

# Label Studio counts `queued` and `started` as running.
_LABEL_STUDIO_STATES = {
    "requested": "queued",
    "prepared": "queued",
    "running": "started",
    "done": "finished",
    "cancelled": "canceled",
}


def health_report(services: Services) -> dict[str, Any]:
    """UP, always, with what is degraded and why: from what the keeper saw last, and a short look at the core itself."""
    degraded = {}
    try:
        core, label_studio = services.journal.fact("core"), services.journal.fact("label_studio")
        seen, why = services.core_watch.glance()
        if why or not (seen or core.get("up", True)):
            degraded["core"] = why or core.get("message")
        if not label_studio.get("up", True):
            degraded["label_studio"] = label_studio.get("message")
        base = core.get("base")
    except KptError as error:
        degraded["journal"], base = error.message, None
    return {"status": "UP", "model_class": "KptLLMBackend", "base": base, "degraded": degraded or None}


def project_list(services: Services) -> list[dict[str, Any]]:
    with services.journal.reading() as session:
        rows = session.scalars(select(Project).order_by(func.length(Project.id), Project.id)).all()  # 2 before 11
        names = {
            v.id: v.name
            for v in session.scalars(select(Version).where(Version.id.in_([r.active_version for r in rows])))
        }
    return [
        {"project": r.id, "title": r.title, "labelled": r.labelled, "model_version": names.get(r.active_version or 0)}
        for r in rows
    ]


def project_status(services: Services, rounds: Rounds, project: str) -> dict[str, Any]:
    """Everything about one project. NotFound if it was never seen."""
    settings = services.settings
    with services.journal.reading() as session:
        row = session.get(Project, project)
        if row is None:
            raise unknown_project(project)
        active = session.get(Version, row.active_version) if row.active_version else None
        heldout = session.scalar(select(func.count()).select_from(heldout_tasks(project).subquery())) or 0
        pinned, aside = pin_state(session, row), set_aside(session, row)
        running = shadow.running(session, project)
        comparison = comparison_state(session, running) if running else None
    job = rounds.latest(project)
    missing = max(settings.min_train - row.labelled, 0)
    return {
        "project": row.id,
        "title": row.title,
        "model_version": active.name if active else None,
        "labelled": row.labelled,
        "heldout": heldout,
        "min_train": settings.min_train,
        "round_every": settings.round_every,
        "new_corrections": rounds.new_corrections(project),
        "message": f"{missing} more labelled images until the first training round; until then the examples alone are used."
        if missing else "",
        "support": [entry["task"] for entry in active.support] if active else [],
        "controls": row.names,
        "job": job_state(job) if job else None,
        "versions": [version_state(v, row.active_version) for v in services.journal.versions(project)],
        "label_studio_follows": row.move_to is None,
        **pinned,
        "comparison": comparison,
        "set_aside": aside,
        "retrain": row.retrain,
    }  # fmt: skip


def version_state(version: Version, active: int | None) -> dict[str, Any]:
    return {
        "model_version": version.name,
        "active": version.id == active,
        "promoted": version.promoted,
        "reason": version.reason,
        "base": version.base,
        "round": version.round,
        "adapter": version.adapter,
        "support": len(version.support),
        "parent": version.parent,
        "pruned": version.pruned,
        "before": version.before,
        "after": version.after,
        "seconds": version.seconds,
        "created_at": version.created_at,
    }


def comparison_list(services: Services, project: str) -> list[dict[str, Any]]:
    """Every promoted version against the one before it, the newest first."""
    with services.journal.reading() as session:
        query = select(Comparison).where(Comparison.project == project).order_by(Comparison.id.desc())
        return [comparison_state(session, found) for found in session.scalars(query)]


def comparison_state(session: Session, comparison: Comparison) -> dict[str, Any]:
    """state: running | kept | rolled_back | ended. figures: of the last look, see judges.verdict; None before the first."""
    names = {v.id: v.name for v in session.scalars(select(Version).where(Version.id.in_((comparison.version, comparison.previous))))}
    return {
        "version": names.get(comparison.version),
        "previous": names.get(comparison.previous),
        "state": comparison.state,
        "reason": comparison.reason,
        "figures": comparison.figures,
        "started_at": comparison.started_at,
        "ended_at": comparison.ended_at,
    }


def job_state(job: Job) -> dict[str, Any]:
    """`job_status` is Label Studio's word, the rest is ours."""
    return {
        "job": job.id,
        "job_status": _LABEL_STUDIO_STATES.get(job.state, "failed"),
        "state": job.state,
        "message": job.message,
        "asked_by": job.trigger,
        "round": job.round,
        "progress": job.progress,
        "train_images": job.images.get("train"),
        "heldout_images": job.images.get("heldout"),
        "snapshot_hash": job.snapshot_hash or None,  # of everything that it trains on and is judged by
        "model_version": job.version,
        "promoted": job.promoted,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
    }


def metrics_text(services: Services, rounds: Rounds) -> str:
    """Prometheus text, the same from every web worker because it comes from the journal."""
    with services.journal.reading() as session:
        counts = {
            "projects": session.scalar(select(func.count()).select_from(Project)),
            "annotations": session.scalar(select(func.count()).select_from(Annotation)),
            "labelled_images": session.scalar(select(func.sum(Project.labelled))),
            "versions": session.scalar(select(func.count()).select_from(Version)),
        }
        jobs = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
    lines = []
    for name, value in counts.items():
        lines += [f"# TYPE kptllm_backend_{name} gauge", f"kptllm_backend_{name} {value or 0}"]
    lines.append("# TYPE kptllm_backend_rounds gauge")
    lines += [f'kptllm_backend_rounds{{state="{state}"}} {count}' for state, count in jobs]
    core, label_studio = services.journal.fact("core"), services.journal.fact("label_studio")
    for name, fact in (("core", core), ("label_studio", label_studio)):
        lines += [f"# TYPE kptllm_backend_{name}_up gauge", f"kptllm_backend_{name}_up {int(bool(fact.get('up')))}"]
    return "\n".join(lines) + "\n"
