"""The images of a round: fetched before the snapshot is taken, so that their bytes are known, and again when they are sent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from sqlalchemy import select

from backend import split
from backend.services import Services, is_passing
from backend.tables import Annotation, Task
from kptllm_core.errors import KptError, NotFound
from label_config.annotations import read_result
from label_config.schema import LabelConfig

log = logging.getLogger(__name__)


def usable_images(
    services: Services,
    project: str,
    config: LabelConfig,
    candidates: list[split.Candidate],
    least: int,
    tell: Callable[[str], None],
) -> tuple[list[split.Candidate], list[str]]:
    """Make sure that the bytes of every labelled image are known; returns who can be used, and why others cannot.

    Raises passing trouble when it touches so many that the round had better wait: a tenth, or all but fewer than `least`.
    """
    usable, left_out, passing = [], [], 0
    for at, candidate in enumerate(candidates, 1):
        try:
            if _fetch(services, project, config, candidate):
                usable.append(candidate)
            else:
                left_out.append(f"task {candidate.task}: no image, or no point that the label config knows")
        except KptError as error:
            passing += is_passing(error)
            enough = len(candidates) - len(left_out) - 1 >= least
            if is_passing(error) and (passing > len(candidates) // 10 or not enough):
                raise
            log.warning("project %s: task %s is left out of the round: %s", project, candidate.task, error.message)
            left_out.append(f"task {candidate.task}: {error.message}")
        if at % 10 == 0:
            tell(f"fetching images: {at} of {len(candidates)}")
    return usable, left_out


def _fetch(services: Services, project: str, config: LabelConfig, candidate: split.Candidate) -> bool:
    """Whether the annotation has an object on an image whose bytes are known now."""
    with services.journal.reading() as session:
        task = session.get(Task, (project, candidate.task))
        result = session.get_one(Annotation, candidate.row).result
    found = False
    for control in config.controls:
        url = task.images.get(control.image_key) if task else None
        if task and url and read_result(control, result, 1, 1).objects:
            if "sha256" not in task.files.get(url, {}):
                services.image(project, task, url)
            found = True
    return found


def image_loader(services: Services, project: str) -> Callable[[str], bytes]:
    """Hash of an image of the snapshot → its bytes, fetched again; NotFound when other bytes are there now."""

    @cache
    def places() -> dict[str, list[tuple[Task, str]]]:
        found: dict[str, list[tuple[Task, str]]] = {}
        said = select(Annotation.task).where(Annotation.project == project)
        with services.journal.reading() as session:
            for task in session.scalars(select(Task).where(Task.project == project, Task.task.in_(said))):
                for url, facts in task.files.items():
                    found.setdefault(facts.get("sha256", ""), []).append((task, url))
        return found

    def load(sha: str) -> bytes:
        for task, url in places().get(sha, ()):
            found, data = services.image(project, task, url)
            if found == sha:
                return data
        raise NotFound(f"The image {sha[:12]}… of the snapshot is not to be had any more. Start the round again.")

    return load
