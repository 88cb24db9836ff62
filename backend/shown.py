"""What a project in Label Studio shows beside the version that serves: its predictions, and their scores to sort by.

A project there shows either a model, by its title (it is asked whenever a task without a prediction of its present version is opened), or
a version, by its name (only what is stored). Two things hang on that name. An older version of ours hides all newer predictions. And the
Data Manager's *prediction score* is that of predictions whose version is called exactly as what the project shows: under a model's title
the column is empty. So the model carries the name of the version that serves as its title, unless a person gave it another one.
"""

from __future__ import annotations

import logging

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.connect import TITLE
from backend.journal import Journal
from backend.services import Services
from backend.split import MADE_HERE, RETRY
from backend.tables import Event, Project, Version
from backend.transport import Json
from kptllm_core.errors import InvalidInput

log = logging.getLogger(__name__)


def note_shown(journal: Journal, project: str, shown: object) -> bool:
    """What Label Studio's project shows (`model_version`): if it is an older version of ours, or our model under the title that
    `connect` gives it, the project is to be moved along. True if it is. Other models, and titles of a person's choice, are left alone."""
    if not isinstance(shown, str) or not shown:
        return False

    def change(session: Session) -> bool:
        row = session.get(Project, project)
        now = session.get(Version, row.active_version) if row and row.active_version else None
        if row is None or now is None or row.move_to is not None or shown == now.name:
            return False
        if shown != TITLE:
            if not _is_ours(session, project, shown):
                return False
            session.add(Event(project=project, action="MOVE_ALONG", about={"from": shown, "to": now.name}))
        row.move_to = now.name
        return True

    return journal.write(change)


def move_along(services: Services, project: str, version: str) -> bool:
    """Let Label Studio show this version, which serves. False if it cannot yet: without our model being attached it takes a version
    only once a prediction of it is stored. Raises a KptError."""
    label_studio, number = services.label_studio, int(project)
    shown = str(label_studio.project(number).get("model_version") or "")
    models = sorted(our_models(services, project), key=lambda model: model.get("title") != shown)  # attached twice: the one that is shown
    with services.journal.reading() as session:
        title = str(models[0].get("title") or "") if models else ""
        if shown not in ("", title) and not _is_ours(session, project, shown):
            return True  # somebody's own choice of another model
        named_by_us = title == TITLE or _is_ours(session, project, title)
    if models and named_by_us and title != version:
        shown, title = _rename(services, number, models[0], version, shown), version
    if shown and shown in (version, title):
        return True
    wanted = title if title and not shown else version
    try:
        label_studio.set_project_model_version(number, wanted)
    except InvalidInput:
        return False
    log.info("project %s: Label Studio shows %s now", project, wanted)
    return True


def our_models(services: Services, project: str) -> list[Json]:
    """The ML backends of the project in Label Studio that are this one: what they answered last is a version of this journal."""
    known = {version.name for version in services.journal.versions(project)}
    return [model for model in services.label_studio.ml_backends(int(project)) if model.get("model_version") in known]


def _rename(services: Services, project: int, model: Json, version: str, shown: str) -> str:
    """Give our model the version's name as its title; what the project shows then."""
    try:
        services.label_studio.rename_backend(model, project, version)
    except InvalidInput:
        if not shown:  # Label Studio could not reach the model just now: at least it is the one to be asked
            services.label_studio.set_project_model_version(project, str(model["title"]))
        raise
    return version if shown == model["title"] else shown  # Label Studio takes a project along that shows the title


def _is_ours(session: Session, project: str, name: str) -> bool:
    known = select(Version.id).where(Version.project == project, Version.name == name.removesuffix(RETRY))
    return bool(MADE_HERE.fullmatch(name)) or session.scalar(known) is not None
