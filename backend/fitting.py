"""The label config changed: what does not fit it any more, by name, for people to see.

Points go by their names everywhere, so nothing that is set aside here can end up under a wrong index; it is only not used.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend import split
from backend.intake import control_key
from backend.tables import Annotation, Project, Version
from backend.versions import labelled, spoken
from label_config.schema import parse

SHOWN = 50  # entries of each list


def set_aside(session: Session, row: Project) -> dict[str, Any]:
    """{"adapters": [{"model_version", "unknown": names that it learned and the config lacks, "new": names it never learned}],
    "labels": {control: {label: points}} that the config lacks, "images": tasks of which nothing can be used, "examples": tasks
    that were examples until the config changed}; all empty when everything fits."""
    nothing: dict[str, Any] = {"adapters": [], "labels": {}, "images": [], "examples": []}
    if not row.label_config:
        return nothing
    config = parse(row.label_config)
    versions = list(session.scalars(select(Version).where(Version.project == row.id).order_by(Version.id.desc())))
    adapters: dict[str, Any] = {}
    now = {name for names in row.names.values() for name in names}
    for version in versions:
        if version.adapter and not version.pruned and not split.adapter_fits(version.trained_names, row.names):
            learned = set(map(str, version.trained_names))
            entry = {"model_version": version.name, "unknown": sorted(learned - now), "new": sorted(now - learned)}
            adapters.setdefault(version.adapter, entry)
    known = {control_key(c): c for c in config.controls}
    unknown: dict[str, Counter[str]] = {}
    strangers: set[int] = set()  # tasks with a label that the config lacks
    misfits = (*spoken(row.id), ~Annotation.fits)
    for task, labels in session.execute(select(Annotation.task, Annotation.labels).where(*misfits)):
        for key, counts in labels.items():
            control = known.get(key)
            for label, count in counts.items():
                if control is None or control.name_of(label) is None:
                    unknown.setdefault(key, Counter())[label] += int(count)
                    strangers.add(task)
    asked = select(Annotation.task).where(*misfits)
    usable = set(session.scalars(select(Annotation.task).where(*labelled(row.id), Annotation.task.in_(asked))))
    before = next((v for v in versions if v.config_hash != row.config_hash), None)
    active = next((v for v in versions if v.id == row.active_version), None)
    shown = {entry["task"] for entry in active.support} if active else set()
    examples = [e["task"] for e in before.support if e["task"] in strangers - shown] if before else []
    return {
        "adapters": list(adapters.values())[:SHOWN],
        "labels": {key: dict(found.most_common(SHOWN)) for key, found in unknown.items()},
        "images": sorted(strangers - usable)[:SHOWN],
        "examples": sorted(examples),
    }
