"""Routes about versions and rounds: what they are worth, which serves, two of them side by side. Wiring only.

    GET  /prequential                      every version on images that it could not have learned from
    GET  /comparisons                      promoted versions against those before them, on the next images
    GET  /compare?a=&b=&limit=             two versions on the same held-out images, with the truth, point by point
    POST /compare?a=&b=&limit=             make the predictions that this lacks
    GET  /tasks/<task>/image?control=&side=    a task's image as a small JPEG
    GET  /jobs                             all rounds, the newest first
    POST /rollback                         serve the version before again. {"from": version}: only if this one serves now
    POST /versions/<version>/pin, /unpin   serve this one whatever comes; serve what is better again

Each also answers below /projects/<id>; without it, the project is named by ?project=.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

from backend import compare, current, serving, status
from backend.intake import id_of, project_of
from backend.pictures import LONGEST, task_picture
from backend.prequential import report
from kptllm_core.errors import InvalidInput, Unavailable

judging = Blueprint("judging", __name__)
PICTURE_PLACES = 2  # pictures that a process makes at a time: whoever looks at many must not take all its threads
MOMENT, RETRY_AFTER = 2.0, 3  # seconds that a picture waits for a place, and after which it may be asked for again


@judging.get("/prequential")
def prequential(project: str | None = None) -> Response:
    return jsonify(report(current.services().journal, _project(project)))


@judging.get("/comparisons")
def comparisons(project: str | None = None) -> Response:
    return jsonify(comparisons=status.comparison_list(current.services(), _project(project)))


@judging.get("/compare")
def side_by_side(project: str | None = None) -> Response:
    a, b, limit = _asked()
    return jsonify(compare.comparison(current.services().journal, _project(project), a, b, limit))


@judging.post("/compare")
def ask_for_both(project: str | None = None) -> tuple[Response, int]:
    a, b, limit = _asked()
    return jsonify(wanted=compare.want(current.services().journal, _project(project), a, b, limit)), 202


@judging.get("/tasks/<int:task>/image")
def picture(task: int, project: str | None = None) -> Response:
    side, places = _whole("side", LONGEST), current_app.extensions["picture_places"]
    if not places.acquire(timeout=MOMENT):
        raise Unavailable("Other pictures are being made at the moment; ask again in some seconds.", retry_after=RETRY_AFTER)
    try:
        data = task_picture(current.services(), _project(project), id_of(task, "task"), request.args.get("control") or None, side)
    finally:
        places.release()
    return Response(data, mimetype="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


@judging.get("/jobs")
def jobs(project: str | None = None) -> Response:
    rounds = current.rounds()
    return jsonify(jobs=[status.job_state(job) for job in rounds.history(_project(project))])


@judging.post("/rollback")
def rollback(project: str | None = None) -> Response:
    body: Any = request.get_json(silent=True)
    seen = body.get("from") if isinstance(body, dict) else None
    if not isinstance(seen, str | None):
        raise InvalidInput(f"'from' is {str(seen)[:40]!r}; expected the name of the version that serves.")
    version, said = serving.roll_back(current.services().journal, _project(project), seen)
    return jsonify(model_version=version.name, message=said)


@judging.post("/versions/<path:version>/pin")
def pin(version: str, project: str | None = None) -> Response:
    pinned = serving.pin(current.services().journal, _project(project), version)
    return jsonify(model_version=pinned.name, pinned=True, message=f"{pinned.name} serves until it is unpinned.")


@judging.post("/unpin")
def unpin(project: str | None = None) -> Response:
    now = serving.unpin(current.services().journal, _project(project))
    return jsonify(model_version=now.name, pinned=False, message=f"{now.name} serves until a better one comes.")


def _project(project: str | None) -> str:
    return project_of(project if project is not None else request.args.get("project"))


def _asked() -> tuple[str | None, str | None, int]:
    return request.args.get("a") or None, request.args.get("b") or None, _whole("limit", 20)


def _whole(name: str, default: int) -> int:
    value = request.args.get(name, str(default))
    if not value.isdecimal() or len(value) > 6:
        raise InvalidInput(f"{name} is {value[:40]!r}; expected a whole number.")
    return int(value)
