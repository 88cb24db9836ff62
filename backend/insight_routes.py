"""Routes about people's work: effort, anchoring, agreement, what to label next, quality of the labels. Wiring only.

    GET  /effort                     points accepted, moved, added, deleted; seconds; clicks saved; by round and by version
    GET  /anchoring                  images with a prediction against those whose prediction was withheld (UNAIDED_SHARE)
    GET  /agreement                  how far apart people are who labelled the same images, per keypoint
    GET  /calibration                the reliability diagram: what the model's score means in this project
    GET  /next?limit=                unlabelled tasks, the most informative first
    GET  /quality?kind=&least=&limit=    labels that look wrong, the surest first, with all that a picture needs
    POST /quality/dismiss            {"finding": id}: a reviewer says that the label is right
    POST /quality/mark?kind=&least=  write the findings into the tasks' data in Label Studio, where they can be filtered for

Each also answers below /projects/<id>; without it, the project is named by ?project=.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify, request

from backend import current, review
from backend.intake import project_of
from backend.quality import KINDS
from kptllm_core.errors import InvalidInput

insight = Blueprint("insight", __name__)
LIMIT = 50


@insight.get("/effort")
def effort(project: str | None = None) -> Response:
    return jsonify(current.reports().get("effort", _project(project)))


@insight.get("/anchoring")
def anchoring(project: str | None = None) -> Response:
    return jsonify(current.reports().get("anchoring", _project(project)))


@insight.get("/agreement")
def agreement(project: str | None = None) -> Response:
    return jsonify(current.reports().get("agreement", _project(project)))


@insight.get("/calibration")
def calibration(project: str | None = None) -> Response:
    return jsonify(current.reports().get("calibration", _project(project)))


@insight.get("/next")
def what_next(project: str | None = None) -> Response:
    report = current.reports().get("next", _project(project))
    return jsonify({**report, "tasks": report["tasks"][: _whole("limit", LIMIT)]})


@insight.get("/quality")
def quality(project: str | None = None) -> Response:
    return jsonify(_chosen(_project(project)))


@insight.post("/quality/dismiss")
def dismiss(project: str | None = None) -> Response:
    number = _project(project)
    body: Any = request.get_json(silent=True)
    review.dismiss(current.services().journal, number, body.get("finding") if isinstance(body, dict) else None)
    return jsonify(message="It is not told again until that annotation changes.")


@insight.post("/quality/mark")
def mark(project: str | None = None) -> Response:
    number = _project(project)
    done = review.mark(current.services(), number, _chosen(number, least=review.SURE)["findings"])
    said = f"{done['tasks']} tasks carry the field '{review.FIELD}' in Label Studio's Data Manager now; filter or sort by it."
    return jsonify({**done, "field": review.FIELD, "message": said})


def _chosen(project: str, least: float = 0.0) -> dict[str, Any]:
    """The quality report with the findings that were asked for by ?kind=, ?least= and ?limit=. least: unless another is asked for."""
    report = review.without_dismissed(current.services().journal, project, current.reports().get("quality", project))
    kind, asked = request.args.get("kind"), request.args.get("least", str(least))
    if kind and kind not in KINDS:
        raise InvalidInput(f"kind is {kind[:40]!r}; expected one of {', '.join(KINDS)}.")
    try:
        lowest = float(asked)
    except ValueError:
        raise InvalidInput(f"least is {asked[:40]!r}; expected a confidence from 0 to 1.") from None
    found = [f for f in report["findings"] if (not kind or f["kind"] == kind) and f["confidence"] >= lowest]
    return {**report, "findings": found[: _whole("limit", review.KEPT)]}


def _project(project: str | None) -> str:
    return project_of(project if project is not None else request.args.get("project"))


def _whole(name: str, default: int) -> int:
    value = request.args.get(name, str(default))
    if not value.isdecimal() or len(value) > 6:
        raise InvalidInput(f"{name} is {value[:40]!r}; expected a whole number.")
    return int(value)
