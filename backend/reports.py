"""Reports that take a while to make: made when something changed, kept in the journal, the same from every web worker.

A request gets the report that is kept if nothing has changed since, or makes it anew if that is quick; a slow one it gets as it
was, with `"stale": true`, and the keeper makes it anew in the background, spending a small part of its time on it. The first
report of quality control on more than FEW images is left to the keeper, too: until then BeingMade is raised.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select

from backend import effort_report, ranking, review
from backend.ranking import fact_name
from backend.services import Services
from backend.tables import Annotation, Predicted, Project
from backend.versions import unknown_project
from kptllm_core.errors import Unavailable

QUICK = 2.0  # seconds: what takes longer is left to the keeper
FEW = 200  # labelled images: of so many every report is quick; of many more than last time nobody knows
SHARE = 0.05  # of the keeper's time, at most
Report = Callable[[Services, str], dict[str, Any]]

KINDS: dict[str, Report] = {
    "effort": lambda s, project: effort_report.effort(s.journal, project, s.settings.tolerance),
    "anchoring": lambda s, project: effort_report.anchoring_report(
        s.journal, project, s.settings.tolerance, s.settings.unaided_share
    ),
    "agreement": lambda s, project: effort_report.agreement_report(s.journal, project),
    "calibration": lambda s, project: ranking.calibration_report(s.journal, project, s.settings.tolerance),
    "quality": lambda s, project: review.quality_report(s.journal, project),
    "next": lambda s, project: ranking.what_next(s.journal, s.looks, project),
}


class BeingMade(Unavailable):
    """A report that there is none of yet; the keeper makes it."""


class Reports:
    """`get` is for requests, `turn` for the keeper."""

    def __init__(self, services: Services) -> None:
        self.services, self.journal = services, services.journal
        self._not_before: dict[tuple[str, str], float] = {}
        self._seen: dict[str, list[Any]] = {}  # project → what there was at its last turn

    def get(self, name: str, project: str) -> dict[str, Any]:
        """A report of KINDS. NotFound for a project that was never seen; BeingMade, see the top."""
        state, images = self._state(project)
        kept = self.journal.fact(fact_name(f"report-{name}", project))
        if kept and kept["state"] != state and _slow(kept, images):
            return {**kept["report"], "stale": True}
        if not kept and name == "quality" and _slow(kept, images):
            raise BeingMade(f"The labels of {images} images are being checked for the first time. Ask again in a minute.", retry_after=60)
        if not kept or kept["state"] != state:
            kept = self._make(name, project, state, images)
        return {**kept["report"], "stale": False}

    def turn(self, project: str) -> None:
        """Fit the calibration, ask for predictions that are missing, and make one report that is missing, or slow and old."""
        state, images = self._state(project)
        if state != self._seen.get(project):
            ranking.refresh(self.journal, project, self.services.settings.tolerance)
            review.ask_for_predictions(self.journal, project)
            self._seen[project] = state
        now = time.monotonic()
        for name in KINDS:
            if now < self._not_before.get((name, project), 0.0):
                continue
            kept = self.journal.fact(fact_name(f"report-{name}", project))
            if not kept or (kept["state"] != state and _slow(kept, images)):
                made = self._make(name, project, state, images)
                self._not_before[name, project] = time.monotonic() + made["seconds"] / SHARE
                return

    def _make(self, name: str, project: str, state: list[Any], images: int) -> dict[str, Any]:
        begin = time.monotonic()
        report = KINDS[name](self.services, project)
        kept = {"report": report, "state": state, "images": images, "seconds": round(time.monotonic() - begin, 3)}
        self.journal.set_fact(fact_name(f"report-{name}", project), kept)
        return kept

    def _state(self, project: str) -> tuple[list[Any], int]:
        """(what changes whenever a report may, how many images are labelled)."""
        with self.journal.reading() as session:
            row = session.get(Project, project)
            if row is None:
                raise unknown_project(project)
            said = session.scalar(select(func.max(Annotation.id)).where(Annotation.project == project))
            mine = Predicted.project == project
            made = session.execute(
                select(func.count(), func.max(Predicted.made_at)).where(mine, Predicted.controls.is_not(None))
            ).one()
            failed = session.scalar(select(func.count()).where(mine, Predicted.controls.is_(None), Predicted.error > ""))  # > uses the index
            active, config, images = row.active_version, row.config_hash, row.labelled
        settings = self.services.settings
        return [said, *made, failed, active, config, settings.tolerance, settings.unaided_share], images


def _slow(kept: dict[str, Any], images: int) -> bool:
    """Whether a report is left to the keeper: it took long last time, or there are many more images than then."""
    return kept.get("seconds", 0.0) > QUICK or images > max(FEW, 2 * kept.get("images", 0))
