"""Every correction is first an examination: how far off was what was predicted for this image before anyone trained on it?

A prediction counts for its version if the version cannot have learned from the image: the first thing that a person said about
it (annotations.id) is newer than the newest that the version knew (`versions.upto`). So it does not matter when it is scored.

A caution: whoever starts from a prediction leaves points where they are that are near enough, so a version that was shown
looks better than one that was not. Differences within LET_PASS therefore count as none where two versions are compared, and
images that were served without a prediction are as good as any.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend.database import parts
from backend.intake import control_key
from backend.journal import Journal
from backend.matching import distances, pair_up, size_of
from backend.served import first_sayings
from backend.tables import Annotation, Predicted, Project, Version
from backend.versions import candidates_of, labelled
from kptllm_core.keypoints import KeypointSet
from label_config.annotations import read_result
from label_config.schema import LabelConfig, parse

NEAR = 0.05  # of the object's size: a point farther off must be moved
LET_PASS = 0.02  # of the object's size: what a person who starts from a prediction may leave as it is
MISSED = 1.0  # distance of a point without a prediction, and the largest there is: one whole object
BATCH = 200  # predictions per transaction


def measure(config: LabelConfig, result: list[Any], controls: dict[str, Any]) -> dict[str, Any] | None:
    """What a prediction (`Predicted.controls`) is worth against an annotation's result; None if that places no point.

    {"points", "near": those within NEAR, "moved": the others, "pck": near / points, "error": mean distance, "beyond": mean
    distance beyond LET_PASS}, distances in shares of the object's size, at most MISSED.
    """
    gaps: list[float] = []
    for control in config.controls:
        predicted = controls.get(control_key(control)) or {"objects": [], "size": None}
        size = predicted["size"]
        truth = [o.keypoints for o in read_result(control, result, *(size or (None, None))).objects]
        found = [KeypointSet.from_json(o) for o in predicted["objects"]]
        for i, j in pair_up(truth, found, size):
            if i is not None:
                gaps += _gaps(truth[i], None if j is None else found[j], size)
    if not gaps:
        return None
    apart = np.minimum(np.array(gaps), MISSED)
    near = int((apart < NEAR).sum())
    return {
        "points": len(gaps),
        "near": near,
        "moved": len(gaps) - near,
        "pck": round(near / len(gaps), 5),
        "error": round(float(apart.mean()), 5),
        "beyond": round(float(np.maximum(apart - LET_PASS, 0).mean()), 5),
    }


def _gaps(truth: KeypointSet, predicted: KeypointSet | None, size: list[int] | None) -> list[float]:
    """Distance of each placed point of the truth; MISSED where there is no prediction."""
    if predicted is None:
        return [MISSED] * int(truth.placed.sum())
    apart = distances(truth, predicted, size_of(truth, size))[truth.placed]
    return [MISSED if np.isnan(gap) else float(gap) for gap in apart]


def unjudged(session: Session, project: str) -> int:
    """How many predictions of labelled images wait for `score_new`; told by indexes alone, since it is asked all the time."""
    mine = select(func.count()).where(Predicted.project == project)
    said = select(Annotation.task).where(*labelled(project))
    made = session.scalar(mine.where(Predicted.controls.is_not(None), Predicted.task.in_(said))) or 0
    return made - (session.scalar(mine.where(Predicted.judged.is_not(None))) or 0)


def score_new(journal: Journal, project: str) -> int:
    """Score the predictions whose image was labelled, or labelled anew, since the last call. Returns how many."""
    with journal.reading() as session:
        row = session.get(Project, project)
        if row is None or not row.label_config:
            return 0
        config = parse(row.label_config)
        speaks = {c.task: c.row for c in candidates_of(session, project)}
        columns = select(Predicted.id, Predicted.task, Predicted.judged).where(Predicted.project == project, Predicted.controls.is_not(None))
        said = columns.where(Predicted.task.in_(select(Annotation.task).where(*labelled(project))))
        rows = {row for query in (said, columns.where(Predicted.judged.is_not(None))) for row in session.execute(query)}
        due = sorted(n for n, task, judged in rows if speaks.get(task) != judged)
    for part in parts(due, BATCH):
        journal.write(partial(_score, config=config, speaks=speaks, rows=part))
    return len(due)


def _score(session: Session, config: LabelConfig, speaks: dict[int, int], rows: list[int]) -> None:
    for prediction in session.scalars(select(Predicted).where(Predicted.id.in_(rows))):
        annotation = session.get(Annotation, speaks.get(prediction.task, 0))
        prediction.judged = annotation.id if annotation else None
        prediction.figures = (
            measure(config, annotation.result, prediction.controls) if annotation and prediction.controls else None
        )


def report(journal: Journal, project: str) -> dict[str, Any]:
    """What each version was worth on images that it cannot have learned from, the newest version first.

    {"near", "versions": [{"model_version", "round", "images", "shown", "points", "pck@0.05", "error", "moved", "moved_share"}]}:
    `pck@0.05` and `error` are means over images, `moved` counts points that had to be moved, `shown` images whose annotator saw
    the prediction.
    """
    with journal.reading() as session:
        versions = session.scalars(select(Version).where(Version.project == project).order_by(Version.id.desc())).all()
        first = first_sayings(session, project)
        columns = select(Predicted.version, Predicted.task, Predicted.shadow, Predicted.known, Predicted.figures)
        rows = session.execute(columns.where(Predicted.project == project, Predicted.judged.is_not(None))).all()
    found: dict[int, list[tuple[bool, dict[str, Any]]]] = {}
    upto = {v.id: v.upto for v in versions}
    for version, task, shadow, known, figures in rows:
        if figures and first.get(task, 0) > upto.get(version, 0):
            found.setdefault(version, []).append((not shadow and known < first[task], figures))
    return {"near": NEAR, "versions": [_summary(v, found[v.id]) for v in versions if v.id in found]}


def _summary(version: Version, scored: list[tuple[bool, dict[str, Any]]]) -> dict[str, Any]:
    points, moved = (sum(f[key] for _, f in scored) for key in ("points", "moved"))
    return {
        "model_version": version.name,
        "round": version.round,
        "images": len(scored),
        "shown": sum(shown for shown, _ in scored),
        "points": points,
        "pck@0.05": round(float(np.mean([f["pck"] for _, f in scored])), 5),
        "error": round(float(np.mean([f["error"] for _, f in scored])), 5),
        "moved": moved,
        "moved_share": round(moved / points, 5),
    }
