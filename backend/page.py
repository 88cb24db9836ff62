"""The page for people: what is shown where. Everything comes from the same functions as the JSON routes; nothing is decided here.

    GET  /                                   projects, and how to connect one
    GET  /projects/<id>/                     how it goes: the round, the curves, the examples, predictions in advance
    GET  /projects/<id>/view/versions        every version: serve, pin, roll back, compare
    GET  /projects/<id>/view/compare?a=&b=   two versions on the same held-out images
    GET  /projects/<id>/view/next            what to label next, and what the model's score means
    GET  /projects/<id>/view/labels?kind=    labels that look wrong
    GET  /projects/<id>/view/now             the part of the page that changes by itself
    POST /projects/<id>/start                a training round
    GET  /page/<file>                        style and script, from here and from nowhere else

Whoever asks for application/json gets JSON at the first two addresses. The buttons post to the JSON routes (pages/page.js).
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, jsonify, render_template, request, url_for

from backend import charts, compare, current, overlays, prelabel, review
from backend.examples import on_image
from backend.intake import control_key, project_of
from backend.prequential import report as prequential
from backend.quality import KINDS
from backend.reports import BeingMade
from backend.status import comparison_list, health_report, project_list, project_status
from backend.tables import Project, Task, Version
from kptllm_core.errors import InvalidInput, KptError, NotFound
from label_config.schema import LabelConfig, parse

pages = Blueprint("pages", __name__)
FOLDER = Path(__file__).with_name("pages")
FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
FEW, MANY = 12, 300  # findings, and tasks, on one page
COMPARED = 20  # images
# Nothing from elsewhere, nothing inline.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
KIND_NAMES = {"swapped": "Left and right exchanged", "misnamed": "Wrong name", "far_off": "Far off", "missing": "Left out"}
Json = dict[str, Any]


# ---------------------------------------------------------------- pages


@pages.get("/")
def projects() -> str | Response:
    known = [project_status(current.services(), current.rounds(), p["project"]) for p in project_list(current.services())]
    if wants_json():
        return jsonify(projects=project_list(current.services()), health=health_report(current.services()))
    return _page("projects.html", projects=known, command=connect_command("PROJECT_ID"))


@pages.get("/projects/<project>/")
def overview(project: str) -> str | Response:
    status = _status(project)
    if wants_json():
        return jsonify(status)
    number, journal = status["project"], current.services().journal
    effort, anchoring = current.reports().get("effort", number), current.reports().get("anchoring", number)
    agreement = current.reports().get("agreement", number)
    unused = (_quality(number) or {}).get("unused", [])
    accuracy, people = charts.accuracy(status, prequential(journal, number), agreement), charts.people_by_point(agreement)
    return _page(
        "project.html", status, "overview", accuracy=accuracy, people=people, effort=effort, clicks=charts.effort(effort), anchoring=anchoring,
        examples=support_examples(number), unused=unused, command=connect_command(number), **_now(status),
    )  # fmt: skip


@pages.get("/projects/<project>/view/now")
def now(project: str) -> str:
    status = _status(project)
    return render_template("_now.html", status=status, settings=current.services().settings, **_now(status))


@pages.get("/projects/<project>/view/versions")
def versions(project: str) -> str:
    status = _status(project)
    judged = {v["model_version"]: v for v in prequential(current.services().journal, status["project"])["versions"]}
    found = comparison_list(current.services(), status["project"])
    served = {job.version for job in current.rounds().history(status["project"]) if job.promoted}
    return _page("versions.html", status, "versions", judged=judged, comparisons=found, served=served)


@pages.get("/projects/<project>/view/compare")
def side_by_side(project: str) -> str:
    status = _status(project)
    a, b = request.args.get("a") or None, request.args.get("b") or None
    try:
        told, problem = compare.comparison(current.services().journal, status["project"], a, b, COMPARED), ""
    except NotFound as error:
        told, problem = None, error.message
    shown = _side_by_side(told) if told else []
    lacking = sum(not image["error"] and not (image["a"] and image["b"]) for image in told["images"]) if told else 0
    return _page("compare.html", status, "compare", told=told, problem=problem, shown=shown, lacking=lacking, limit=COMPARED)


@pages.get("/projects/<project>/view/next")
def what_next(project: str) -> str:
    status = _status(project)
    report, calibration = (current.reports().get(name, status["project"]) for name in ("next", "calibration"))
    limit = _limit(FEW)
    return _page("next.html", status, "next", report=report, tasks=report["tasks"][:limit], limit=limit,
                 calibration=calibration, diagram=charts.reliability(calibration))  # fmt: skip


@pages.get("/projects/<project>/view/labels")
def labels(project: str) -> str:
    status = _status(project)
    number = status["project"]
    report, kind, limit = _quality(number), request.args.get("kind") or None, _limit(FEW)
    if kind not in (None, *KINDS):
        raise InvalidInput(f"kind is {str(kind)[:40]!r}; expected one of {', '.join(KINDS)}.")
    found = [f for f in report["findings"] if kind in (None, f["kind"])] if report else []
    shown = [{**f, "drawing": overlays.suspicion(f)} for f in found[:limit]]
    return _page("labels.html", status, "labels", report=report, findings=shown, many=len(found), kind=kind, limit=limit, most=MANY,
                 sure=review.SURE)  # fmt: skip


@pages.post("/projects/<project>/start")
def start(project: str) -> tuple[Response, int]:
    job, said = current.rounds().start(project_of(project), "Start training on the page")
    return jsonify(job=job.id if job else None, message=said), 202 if job else 200


@pages.get("/page/<name>")
def file(name: str) -> Response:
    if name not in FILES:
        raise NotFound(f"The page has no file {name[:60]!r}.")
    response = Response((FOLDER / name).read_bytes(), mimetype=FILES[name])
    response.headers["Cache-Control"] = "private, max-age=31536000, immutable"  # its address changes with its content
    return response


# ---------------------------------------------------------------- what the templates are given


def wants_json() -> bool:
    """Whether whoever asks prefers JSON; a browser, and whoever does not care, gets the page."""
    return request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json"


def is_page() -> bool:
    """Whether this request is a person's, who reads an error on a page."""
    return request.method == "GET" and str(request.endpoint).startswith("pages.") and not wants_json()


def error_page(error: KptError) -> str:
    return render_template("error.html", message=error.message)


def connect_command(project: str) -> str:
    """The command that attaches a Label Studio project to this backend, to be pasted into a shell in the backend's folder. Secrets
    are left to be filled in."""
    settings, python = current.services().settings, Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())  # the environment that `make` makes: nobody has to activate it
    parts = [str(python.relative_to(Path.cwd())) if inside else "python", "-m", "backend", "connect", "--url", settings.label_studio_url]
    parts += ["--token", "YOUR_TOKEN", "--project", project, "--backend-url", request.host_url.rstrip("/")]
    if settings.label_studio_ca:
        parts += ["--ca", str(settings.label_studio_ca)]
    if settings.basic_auth_user:
        parts += ["--basic-user", settings.basic_auth_user, "--basic-pass", "YOUR_PASSWORD"]
    if settings.webhook_secret:
        parts += ["--webhook-secret", "YOUR_SECRET"]
    return shlex.join(parts)


def support_examples(project: str) -> list[Json]:
    """The examples that the serving version is shown: [{"task", "control", "drawing" or None}]."""
    config = _config(project)
    with current.services().journal.reading() as session:
        row = session.get_one(Project, project)
        version = session.get(Version, row.active_version) if row.active_version else None
        skeletons = {control_key(c): _named(c.schema.names, c.schema.skeleton) for c in config.controls} if config else {}
        found = []
        for entry in version.support if version else ():
            task = session.get(Task, (project, entry["task"]))
            for control, shown in entry["controls"].items():
                facts = task.files.get(shown["image"], {}) if task else {}
                size = (facts["width"], facts["height"]) if "width" in facts else None
                points = on_image(shown, facts)
                drawing = overlays.example(size, points.to_json(), skeletons.get(control, ())) if size and points is not None else None
                found.append({"task": entry["task"], "control": control, "drawing": drawing})
    return found


def _side_by_side(told: Json) -> list[Json]:
    """One entry per image and control: {"task", "control", "first": whether it is the image's first, beside which the figures stand,
    since they are of all its controls together, "error", "sides": {"a", "b": {"figures", "drawing"}}}."""
    shown = []
    skeletons = {control: _named(about["names"], about["skeleton"]) for control, about in told["controls"].items()}
    for image in told["images"]:
        for control, saying in image["controls"].items():
            sides = {}
            for side in ("a", "b"):
                there = saying["size"] and saying[side] is not None
                drawing = overlays.versus(saying["size"], saying["truth"], saying[side], skeletons[control]) if there else None
                sides[side] = {"figures": image[side], "drawing": drawing}
            first = control == next(iter(image["controls"]))
            shown.append({"task": image["task"], "control": control, "first": first, "error": image["error"], "sides": sides})
    return shown


def _named(names: Sequence[str], pairs: Iterable[Sequence[int]]) -> list[tuple[str, str]]:
    """A skeleton by name: what was frozen under an older label config may have other names, in another order."""
    return [(names[a], names[b]) for a, b in pairs]


def _quality(project: str) -> Json | None:
    """The report on labels that look wrong; None while it is made for the first time."""
    try:
        report = current.reports().get("quality", project)
    except BeingMade:
        return None
    return review.without_dismissed(current.services().journal, project, report)


def _now(status: Json) -> Json:
    """What changes by itself: the round, predictions in advance."""
    job = status["job"]
    busy = bool(job and job["state"] in ("requested", "prepared", "running"))
    runs = prelabel.project_prelabels(current.services(), status["project"])
    active = any(run and run["active"] for run in runs.values())
    state = [status["model_version"], status["labelled"], status["pinned"], job and (job["job"], job["state"]), active]
    return {
        "busy": busy, "runs": runs, "may_write": current.services().has_token and status["project"].isdigit(),
        "every": 2 if busy or active else 20, "state": hashlib.sha256(repr(state).encode()).hexdigest()[:12],
    }  # fmt: skip


def _page(template: str, status: Json | None = None, view: str = "", **more: Any) -> str:
    services = current.services()
    return render_template(template, status=status, view=view, health=health_report(services), settings=services.settings, **more)


@pages.app_template_global()
def studio(project: str, task: int | None = None) -> str:
    """The address of a project, or of one of its tasks, in Label Studio as the browser reaches it."""
    settings = current.services().settings
    base = (settings.label_studio_public_url or settings.label_studio_url).rstrip("/")
    return f"{base}/projects/{project}/data" + (f"?task={task}" if task is not None else "")


@pages.app_template_global()
def page_file(name: str) -> str:
    """The address of a file of the page, which changes with its content."""
    content = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()[:12]
    return url_for("pages.file", name=name, v=content)


@pages.app_template_filter()
def percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


@pages.app_template_filter()
def seconds(value: float | None) -> str:
    """`2 min 05 s`, `1 h 10 min`."""
    if value is None:
        return "–"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


@pages.app_template_filter()
def moment(value: float | None) -> str:
    """Seconds since 1970 → ISO 8601 in UTC; page.js writes it as the reader's own time."""
    return "" if value is None else datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


pages.add_app_template_filter(KIND_NAMES.get, "kind")


def _status(project: str) -> Json:
    return project_status(current.services(), current.rounds(), project_of(project))


def _config(project: str) -> LabelConfig | None:
    text = current.services().journal.label_config(project)
    return parse(text) if text else None


def _limit(default: int) -> int:
    value = request.args.get("limit", str(default))
    if not value.isdecimal() or not 1 <= int(value[:9]) <= MANY:
        raise InvalidInput(f"limit is {value[:40]!r}; expected a whole number from 1 to {MANY}.")
    return int(value)
