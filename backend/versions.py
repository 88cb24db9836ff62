"""Which version of a project exists and serves, inside a transaction of the journal. `serve` is the only place that moves the pointer.

The support set is frozen here, as a row of `versions`, and changes only when the number of labelled images reaches 1, 2, 5
or 10, with a round, or when a changed label config no longer fits it.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Select, String, cast, func, select, update
from sqlalchemy.orm import Session

from backend import split
from backend.examples import frozen
from backend.intake import as_asked, control_key, reading
from backend.tables import Annotation, Comparison, Event, Fact, Group, Project, Task, Version
from kptllm_core.errors import NotFound
from label_config.annotations import read_result
from label_config.schema import LabelConfig, parse


def unknown_project(project: str) -> NotFound:
    return NotFound(
        f"Project {project} is not known here. Connect it: python -m backend connect --url … --token … --project {project}"
    )


def lock_project(session: Session, project: str) -> Project:
    """The project's row, locked; made if it is new."""
    row = session.get(Project, project, with_for_update=True)
    if row is None:
        row = Project(
            id=project, title="", label_config="", config_hash="", names={}, labelled=0, step=0, sweep_due=True
        )
        session.add(row)
        session.flush()
    return row


def serve(session: Session, row: Project, version: Version, why: str) -> None:
    """Serve this version from now on. A pin of another one is released, and a comparison that it makes pointless ends."""
    row.move_to = version.name
    if row.active_version == version.id:
        return
    row.active_version = version.id
    if row.pinned not in (None, version.id):
        session.add(Event(project=row.id, action="UNPINNED", about={"why": why}))
        row.pinned = None
    running = (Comparison.project == row.id, Comparison.state == "running", Comparison.version != version.id)
    session.execute(
        update(Comparison)
        .where(*running)
        .values(state="ended", ended_at=time.time(), reason=f"Not decided: {version.name} serves now ({why}).")
    )


def promote(session: Session, row: Project, version: Version, why: str) -> None:
    """Serve a version because a person says so: from now on it counts as promoted, whatever its round was told."""
    version.promoted, version.reason = True, f"{version.reason} {why}".strip()[-2000:]
    serve(session, row, version, why)


def cannot_serve(session: Session, row: Project, version: Version) -> str:
    """Why a version cannot serve the project as it is now, as the rest of a sentence; empty if it can."""
    core = session.get(Fact, "core")
    base = core.value.get("base") if core is not None else None
    if version.pruned:
        return "had an adapter that was deleted to save space (KEEP_ADAPTERS); start a round instead"
    if base not in (None, version.base):
        return f"was made for {version.base}, but the core runs {base}"
    if not split.adapter_fits(version.trained_names, row.names):
        return "was trained on other keypoint names than the label config has now; start a round instead"
    return ""


def still_taught(session: Session, row: Project, version: Version) -> Version | None:
    """The version, which serves now, or, where its adapter does not fit the label config as it is now, the nearest of those that it came
    from whose adapter does: a name that is changed back brings back what was learned. None if there is no such."""
    seen: set[int] = set()
    at: Version | None = version
    while at is not None and at.id not in seen:
        seen.add(at.id)
        trusted = at.promoted or at is version  # what serves needs no other title
        if at.adapter and trusted and at.base == version.base and not cannot_serve(session, row, at):
            return at
        at = session.scalar(select(Version).where(Version.project == row.id, Version.name == at.parent)) if at.parent else None
    return None


def newest_annotation(session: Session) -> int:
    """annotations.id of the newest saying, of whatever project; 0 before the first."""
    return session.scalar(select(func.max(Annotation.id))) or 0


def freeze_version(
    session: Session, project: str, like: Version, adapter: dict[str, Any] | None, support: list[Any], **figures: Any
) -> Version:
    """The version of `like` with another adapter and/or support set; the row of the same name if there is one already.

    adapter: {"name", "round", "names", "base"} of a finished round, or None to keep that of `like`.
    """
    row = lock_project(session, project)
    base = adapter["base"] if adapter else like.base
    number = adapter["round"] if adapter else like.round
    name = split.version_name(base, number, support, parse(row.label_config))
    version = session.scalar(select(Version).where(Version.project == project, Version.name == name))
    if version is None:
        figures.setdefault("upto", newest_annotation(session))
        version = Version(project=project, name=name, base=base, round=number, support=support,
                          adapter=adapter["name"] if adapter else like.adapter,
                          trained_names=adapter["names"] if adapter else like.trained_names,
                          config_hash=row.config_hash, parent=like.name or None, **figures)  # fmt: skip
        session.add(version)
        session.flush()
    return version


def freeze(session: Session, row: Project, base: str, adapter: Version | None, count: int, reason: str) -> Version:
    """Choose the support set anew, make it a version and serve it."""
    config = parse(row.label_config)
    candidates = candidates_of(session, row.id)
    uses = uses_of(session, row.id)
    if count >= split.STEPS[-1]:  # from here on there are enough images to hold some out, before they become examples
        uses |= decide_uses(session, row.id, candidates, uses, everything=False)
    chosen = support_entries(session, row.id, config, split.support_order(row.id, candidates, uses), count)
    decide = {group: split.TRAIN for _, group in chosen if group not in uses}
    session.add_all(Group(project=row.id, group=group, use=use) for group, use in decide.items())
    old = session.get(Version, row.active_version) if row.active_version else None
    like = Version(base=base, round=adapter.round if adapter else 0, adapter=adapter.adapter if adapter else None,
                   trained_names=adapter.trained_names if adapter else [], name=old.name if old else "")  # fmt: skip
    version = freeze_version(session, row.id, like, None, [entry for entry, _ in chosen], promoted=True, reason=reason)
    row.step = split.step_of(row.labelled)
    serve(session, row, version, reason)
    return version


def change_base(session: Session, row: Project, base: str, reason: str) -> Version:
    """Serve the project on another base: the newest version that it had there, else its examples alone.

    A project that was trained before is then due for a round, in which all its corrections teach the new base.
    """
    trained = list(
        session.scalars(
            select(Version)
            .where(Version.project == row.id, Version.adapter.is_not(None))
            .order_by(Version.id.desc())
        )
    )
    for version in trained:
        if version.base == base and version.promoted and not cannot_serve(session, row, version):
            serve(session, row, version, reason)
            row.retrain = None
            return version
    row.retrain = base if trained else None
    return freeze(session, row, base, None, split.step_of(row.labelled), reason)


def decide_uses(
    session: Session, project: str, candidates: list[split.Candidate], uses: dict[str, str], everything: bool
) -> dict[str, str]:
    """Hold out as many groups as are due, and remember it; returns what was decided now."""
    new = split.assign(project, candidates, uses, everything)
    session.add_all(Group(project=project, group=group, use=use) for group, use in new.items())
    return new


def support_entries(
    session: Session, project: str, config: LabelConfig, candidates: list[split.Candidate], count: int
) -> list[tuple[dict[str, Any], str]]:
    """The first `count` usable candidates as frozen examples, each with its group.

    An example is {"task", "annotation", "controls": {control: {"image": URL, "keypoints": …, "size": [w, h] that they refer to}}}.

    One object per image and control, the one with the most points. An annotation without a usable object is left out.
    """
    entries: list[tuple[dict[str, Any], str]] = []
    since = session.get_one(Project, project).names_since or {}
    for candidate in candidates:
        if len(entries) == count:
            break
        annotation = session.get_one(Annotation, candidate.row)
        task = session.get(Task, (project, candidate.task))
        controls = {}
        for control in config.controls:
            url = task.images.get(control.image_key) if task else None
            size = task.files.get(url, {}) if task and url else {}
            objects = read_result(control, annotation.result, size.get("width"), size.get("height")).objects
            if url and objects:
                best = max(objects, key=lambda o: int(o.keypoints.placed.sum())).keypoints
                best = as_asked(best, since.get(control_key(control), {}), annotation.id)
                controls[control_key(control)] = frozen(control, url, best, annotation.result, size)
        if controls:
            entries.append(
                ({"task": candidate.task, "annotation": annotation.annotation, "controls": controls}, candidate.group)
            )
    return entries


def advance(session: Session, row: Project, config: LabelConfig | None) -> None:
    """After annotations came or went: count, and freeze a new support set when a step was reached."""
    session.flush()
    row.labelled = session.scalar(select(func.count(func.distinct(Annotation.task))).where(*labelled(row.id))) or 0
    step = split.step_of(row.labelled)
    version = session.get(Version, row.active_version) if row.active_version else None
    if step <= row.step or version is None or not row.label_config:
        row.step = min(step, row.step)  # fewer than before: the step will be reached again
        return
    if row.pinned is not None:
        return  # chosen anew once the pin is gone
    if sizes_missing(session, row.id, config or parse(row.label_config)):
        return  # the keeper fetches the images, then comes back here
    freeze(session, row, version.base, version, step, f"{row.labelled} labelled image" + "s" * (row.labelled != 1))


def sizes_missing(session: Session, project: str, config: LabelConfig) -> list[tuple[Task, str]]:
    """Images of labelled tasks whose size nobody told: neither the annotation, nor a fetch (which may have failed for good)."""
    missing = []
    keys = {control_key(c): c.image_key for c in config.controls}
    for candidate in candidates_of(session, project):
        task = session.get(Task, (project, candidate.task))
        for region in session.get_one(Annotation, candidate.row).result if task else []:
            key = keys.get(f"{region.get('from_name')}:{region.get('to_name')}") if isinstance(region, dict) else None
            url = task.images.get(key) if task and key else None
            if (
                task
                and url
                and url not in task.files
                and not (region.get("original_width") and region.get("original_height"))
            ):
                missing.append((task, url))
                break
    return missing


def recount(session: Session, row: Project, config: LabelConfig) -> None:
    """The label config changed: which points of the stored annotations does it know?"""
    columns = select(Annotation.id, Annotation.labels, Annotation.points, Annotation.fits).where(
        Annotation.project == row.id, Annotation.current
    )
    for number, labels, *before in session.execute(columns).all():
        points, fits = reading(labels, config)
        if before != [points, fits]:
            session.execute(update(Annotation).where(Annotation.id == number).values(points=points, fits=fits))
    session.flush()
    row.labelled = session.scalar(select(func.count(func.distinct(Annotation.task))).where(*labelled(row.id))) or 0
    row.step = split.step_of(row.labelled)


def candidates_of(session: Session, project: str) -> list[split.Candidate]:
    columns = (Annotation.id, Annotation.task, Task.group, Annotation.points, Annotation.ground_truth)
    query = (
        select(*columns)
        .outerjoin(Task, (Task.project == Annotation.project) & (Task.task == Annotation.task))
        .where(*labelled(project))
        .order_by(Annotation.task, Annotation.ground_truth.desc(), Annotation.updated_us.desc(), Annotation.id.desc())
    )
    best: dict[int, split.Candidate] = {}
    for number, task, group, points, truth in session.execute(query):
        best.setdefault(task, split.Candidate(number, task, group or split.group_alone(task), points, truth))
    return list(best.values())


def heldout_tasks(project: str) -> Select[Any]:
    """The tasks of the labelled images that judge."""
    group = func.coalesce(Task.group, "task=" + cast(Annotation.task, String))
    return (
        select(Annotation.task)
        .outerjoin(Task, (Task.project == Annotation.project) & (Task.task == Annotation.task))
        .join(Group, (Group.project == Annotation.project) & (Group.group == group) & (Group.use == split.HELDOUT))
        .where(*labelled(project))
        .distinct()
    )


def uses_of(session: Session, project: str) -> dict[str, str]:
    rows = session.execute(select(Group.group, Group.use).where(Group.project == project)).all()
    return {group: use for group, use in rows}  # noqa: C416 - rows, which dict() would take for sequences of unknown length


def spoken(project: str) -> tuple[Any, ...]:
    """Annotations that a person made or confirmed, as they are now."""
    return (Annotation.project == project, Annotation.current, Annotation.counts, ~Annotation.deleted)


def labelled(project: str) -> tuple[Any, ...]:
    """Those of them of which something can be used."""
    return (*spoken(project), Annotation.points > 0)
