"""What to label next: how much of a prediction a person is likely to leave as it is, and which images repeat others.

The score of a prediction, which Label Studio stores and sorts by, is the expected share of its points that need no correction:
the mean of the points' calibrated scores, 0 where nothing was found. A repetition of an image that is labelled, or comes first, is
moved half of the way to 1. So in the Data Manager *ascending* prediction score puts the most informative tasks first.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend import split
from backend.calibration import Calibration, cross_validated, fit, reliability
from backend.database import parts
from backend.intake import control_key
from backend.journal import Journal
from backend.lookalikes import Lookalikes
from backend.matching import distances, pair_up, size_of
from backend.served import Controls, first_sayings
from backend.tables import Annotation, Predicted, Project, Task, Version
from backend.versions import candidates_of, labelled, unknown_project, uses_of
from kptllm_core.errors import KptError
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.annotations import read_result
from label_config.schema import LabelConfig, parse

log = logging.getLogger(__name__)
IMAGES = 400  # the newest ones, that calibration is fitted on
LISTED = 500  # tasks that are told
SHORTLIST = 2000  # tasks whose predictions are read for that
PLACED = (int(Visibility.OCCLUDED), int(Visibility.VISIBLE))


# ---------------------------------------------------------------- the score of one prediction


def expected_right(calibration: Calibration, controls: Controls) -> float:
    """0…1: the share of a prediction's points that need no correction; a point that is not drawn counts as one that does.

    0 where nothing was found or drawn.
    """
    shares: list[float] = []
    for control in controls.values():
        drawn = control.get("drawn") or []
        for i, (points, there) in enumerate(zip(control["objects"], certainties(control), strict=True)):
            shown = drawn[i] if i < len(drawn) else {}
            for name, seen, score in zip(points["names"], points["visibility"], points["score"], strict=True):
                if seen in PLACED:
                    shares.append(float(calibration(score * there)) if name in shown else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def certainties(control: Mapping[str, Any]) -> list[float]:
    """Of what served.control_row kept, also before it kept them: per object, how sure the model is that it is there.

    A point is right only if its object is there: what counts as its score, and is calibrated, is the product of both.
    """
    return [float(s) for s in control.get("scores") or [1.0] * len(control["objects"])]


def rank_score(share: float, repeats: bool) -> float:
    """What Label Studio is told; see the top of this file."""
    return round(0.5 + share / 2 if repeats else share, 4)


def calibration_of(journal: Journal, project: str) -> Calibration:
    """The map that was fitted last (`refresh`)."""
    return Calibration.from_json(journal.fact(fact_name("calibration", project)).get("map") or {})


class Ranker:
    """The scores of one request's predictions. Where the journal cannot be asked, the model's own scores stand."""

    def __init__(self, journal: Journal, looks: Lookalikes, project: str) -> None:
        self._journal, self._looks, self._project = journal, looks, project
        self._calibration: Calibration | None = None
        self._labelled: set[int] = set()
        self._repeats: dict[int, bool] = {}

    def see(self, looks: Mapping[int, str]) -> None:
        """Find out which of these tasks (task → look) repeat others."""
        new = {task: look for task, look in looks.items() if task not in self._repeats}
        try:
            self._begin()
            found = self._looks.repeats(self._project, new, self._labelled)
        except KptError as error:
            log.warning("project %s: predictions are not ranked among each other: %s", self._project, error.message)
            found = set()
        self._repeats |= {task: task in found for task in new}

    def score(self, task: int | None, controls: Controls) -> float:
        share = expected_right(self._calibration or Calibration(), controls)
        return rank_score(share, self._repeats.get(task, False) if task is not None else False)

    def _begin(self) -> None:
        if self._calibration is None:
            self._calibration = calibration_of(self._journal, self._project)
            with self._journal.reading() as session:
                self._labelled = set(
                    session.scalars(select(Annotation.task).where(*labelled(self._project)).distinct())
                )


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True, eq=False)
class Judged:
    """Predicted points of images that their version had not learned from. (N,) score, hit, image (its task), group of images."""

    score: np.ndarray
    hit: np.ndarray
    image: np.ndarray
    group: np.ndarray
    heldout: int  # of these images, so many are held out


def judged_points(session: Session, project: str, config: LabelConfig, tolerance: float) -> Judged:
    """Points of the version that serves first, then of the newest ones, of the images that are held out, or were predicted before
    anyone had labelled them."""
    said, uses = first_sayings(session, project), uses_of(session, project)
    speaks = {c.task: c for c in candidates_of(session, project)}
    upto = dict(session.execute(select(Version.id, Version.upto).where(Version.project == project)).all())
    columns = select(Predicted.id, Predicted.task, Predicted.version).where(
        Predicted.project == project, Predicted.controls.is_not(None)
    )
    rows: dict[int, int] = {}  # task → predictions.id
    heldout = 0
    serves = Predicted.version == session.get_one(Project, project).active_version
    for number, task, version in session.execute(columns.order_by(serves.desc(), Predicted.version.desc(), Predicted.id.desc())):
        kept_apart = task in speaks and uses.get(speaks[task].group) == split.HELDOUT
        if task in rows or task not in speaks or not (kept_apart or said.get(task, 0) > upto.get(version, 0)):
            continue
        rows[task] = number
        heldout += kept_apart
        if len(rows) == IMAGES:
            break
    score, hit, image, group = [], [], [], []
    for task, number in rows.items():
        controls = session.get_one(Predicted, number).controls or {}
        annotation = session.get_one(Annotation, speaks[task].row)
        for s, h in compare(config, annotation.result, controls, tolerance):
            score.append(s)
            hit.append(h)
            image.append(task)
            group.append(speaks[task].group)
    return Judged(np.array(score, np.float64), np.array(hit, bool), np.array(image, np.int64), np.array(group, str), heldout)


def compare(config: LabelConfig, result: list[Any], controls: Controls, tolerance: float) -> list[tuple[float, bool]]:
    """(score, whether a person would leave it) of each point that was predicted. Points that nobody labelled say nothing.

    On an object that nobody labelled every point is wrong.
    """
    found: list[tuple[float, bool]] = []
    for control in config.controls:
        kept = controls.get(control_key(control))
        if kept is None:
            continue
        truth = [o.keypoints for o in read_result(control, result, *kept["size"]).objects]
        predicted = [KeypointSet.from_json(o) for o in kept["objects"]]
        there = certainties(kept)
        for i, j in pair_up(truth, predicted, kept["size"]):
            if j is None:
                continue
            points = predicted[j]
            if i is None:
                found += [(float(s) * there[j], False) for s in points.score[points.placed]]
                continue
            near = distances(points, truth[i], size_of(truth[i], kept["size"])) <= tolerance  # NaN: not near
            absent = truth[i].reorder(points.names).visibility == Visibility.ABSENT
            told = points.placed & (truth[i].reorder(points.names).placed | absent)
            found += [(float(s) * there[j], bool(n)) for s, n, t in zip(points.score, near, told, strict=True) if t]
    return found


def refresh(journal: Journal, project: str, tolerance: float) -> bool:
    """Fit the calibration anew if there are new annotations or predictions; True if that was so."""
    with journal.reading() as session:
        row = session.get(Project, project)
        if row is None or not row.label_config:
            return False
        newest = session.scalar(select(func.max(Annotation.id)).where(Annotation.project == project)) or 0
        made = session.scalar(select(func.max(Predicted.made_at)).where(Predicted.project == project)) or 0.0
        state = [newest, made, row.active_version, row.config_hash, tolerance]
        if journal.fact(fact_name("calibration", project)).get("state") == state:
            return False
        judged = judged_points(session, project, parse(row.label_config), tolerance)
    journal.set_fact(
        fact_name("calibration", project), {"map": fit(judged.score, judged.hit).to_json(), "state": state}
    )
    return True


def calibration_report(journal: Journal, project: str, tolerance: float) -> dict[str, Any]:
    """The reliability diagram: what the model's score means here, before and after calibration.

    `calibrated` is measured on groups of images that the map was not fitted on (five folds); `map` is the one in use.
    """
    with journal.reading() as session:
        row = session.get(Project, project)
        if row is None:
            raise unknown_project(project)
        judged = (
            judged_points(session, project, parse(row.label_config), tolerance)
            if row.label_config
            else Judged(*(np.zeros(0),) * 4, 0)
        )
    after = cross_validated(judged.score, judged.hit, judged.group)
    return {
        "project": project,
        "tolerance": tolerance,
        "images": len(np.unique(judged.image)),
        "heldout_images": judged.heldout,
        "raw": reliability(judged.score, judged.hit),
        "calibrated": reliability(after, judged.hit),
        "map": fit(judged.score, judged.hit).to_json(),
    }


def fact_name(what: str, project: str) -> str:
    """The name of a fact about a project, within what the journal's column holds."""
    name = f"{what}:{project}"
    return name if len(name) <= 64 else f"{what}:{hashlib.sha256(project.encode()).hexdigest()[:40]}"


# ---------------------------------------------------------------- the list


def what_next(journal: Journal, looks: Lookalikes, project: str, limit: int = LISTED) -> dict[str, Any]:
    """The unlabelled tasks, the most informative first, near-duplicates last. Only tasks that were predicted can be ranked.

    Ranked by the present calibration; of more than SHORTLIST tasks only those that had the lowest scores when they were predicted.
    """
    calibration = calibration_of(journal, project)
    with journal.reading() as session:
        row = session.get(Project, project)
        if row is None:
            raise unknown_project(project)
        taught = set(session.scalars(select(Annotation.task).where(*labelled(project)).distinct()))
        # Somebody has dealt with it: also an image that was skipped, or submitted without any point.
        spoken = (Annotation.project == project, Annotation.current, ~Annotation.deleted)
        done = set(session.scalars(select(Annotation.task).where(*spoken).distinct()))
        gone = set(session.scalars(select(Task.task).where(Task.project == project, Task.deleted)))
        columns = select(Predicted.task, Predicted.version, Predicted.score, Predicted.id)
        made = columns.where(Predicted.project == project, Predicted.controls.is_not(None))
        newest: dict[int, tuple[int, float, int]] = {}  # the prediction of the version that serves, where there is one
        for task, v, score, number in session.execute(made.order_by(Predicted.task, Predicted.version)):
            if task not in newest or newest[task][0] != row.active_version:
                newest[task] = v, score, number
        names = {v.id: v.name for v in session.scalars(select(Version).where(Version.project == project))}
        waiting = sorted(newest.keys() - done - gone, key=lambda t: (newest[t][1], t))
        shares = _shares(session, calibration, {newest[t][2]: t for t in waiting[:SHORTLIST]})
    order = [*sorted(shares, key=lambda t: (shares[t][0], t)), *waiting[SHORTLIST:]]
    repeats = looks.in_order(project, order, taught)
    ranked = sorted(shares, key=lambda t: (rank_score(shares[t][0], t in repeats), t))
    return {
        "project": project,
        "order": "ascending prediction score: the most informative task first",
        "unlabelled": len(order),
        "nothing_found": sum(not found for _, found in shares.values()) + sum(not newest[t][1] for t in waiting[SHORTLIST:]),
        "near_duplicates": len(repeats),
        "tasks": [
            {
                "task": task,
                "score": rank_score(share := shares[task][0], task in repeats),
                "expected_right": round(share, 4),
                "model_version": names.get(newest[task][0]),
                "like": repeats.get(task),
                "why": _why(*shares[task], repeats.get(task)),
            }
            for task in ranked[:limit]
        ],
    }


def _shares(session: Session, calibration: Calibration, predictions: Mapping[int, int]) -> dict[int, tuple[float, bool]]:
    """predictions.id → task: per task what is expected to be right of its prediction, and whether anything was found."""
    found: dict[int, tuple[float, bool]] = {}
    for part in parts(predictions):
        query = select(Predicted.id, Predicted.controls).where(Predicted.id.in_(part))
        for number, controls in session.execute(query):
            found[predictions[number]] = expected_right(calibration, controls), _found(controls)
    return found


def _found(controls: Mapping[str, Any]) -> bool:
    return any(drawn for control in controls.values() for drawn in control.get("drawn") or [])


def _why(share: float, found: bool, like: int | None) -> str:
    said = f"about {share:.0%} of its points need no correction" if found else "nothing was found in it"
    return said[0].upper() + said[1:] + (f"; it shows nearly the same as task {like}." if like is not None else ".")
