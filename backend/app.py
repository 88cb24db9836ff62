"""The backend's HTTP face: routes and wiring only. Every project's routes also answer below /projects/<id>.

What Label Studio calls: /health, /setup, /predict, /webhook, /train, /versions, /job_status, /metrics. What people and
programs call: /projects/<id>/status, …/versions/<version>/activate, …/jobs/<job>/cancel; their page is page.py.
"""

from __future__ import annotations

import atexit
import hmac
import json
import logging
import re
import threading
from typing import Any
from urllib.parse import SplitResult, urlsplit

from flask import Blueprint, Flask, Response, current_app, g, jsonify, request
from werkzeug.exceptions import HTTPException

from backend import current, prelabel, webhooks
from backend.connect import SECRET_HEADER
from backend.insight_routes import insight
from backend.intake import project_of
from backend.judge_routes import PICTURE_PLACES, judging
from backend.keeper import Keeper
from backend.model import KptLLMBackend
from backend.page import POLICY, error_page, is_page, pages
from backend.prediction import failed
from backend.reports import Reports
from backend.services import Services
from backend.settings import Settings
from backend.status import health_report, job_state, metrics_text, project_list, project_status, version_state
from backend.versions import unknown_project
from kptllm_core.errors import InvalidInput, KptError, NotFound, SchemaError, TooLarge, Unauthorized, Unavailable

log = logging.getLogger(__name__)
MAX_BODY = 64 * 2**20  # bytes; all tasks of a project come in one /predict
BUTTON_BYTES = 4 * 2**20  # what Label Studio sends when its button is pressed: the project, with its label config
KEPT_FREE = 3  # threads that no prediction takes, so that /health, /setup and /webhook are answered at once
PRIVATE_NAMES = (".localhost", ".local", ".internal")  # that nobody can register
wire = Blueprint("wire", __name__)


class Forbidden(KptError):
    """What no login would change: a browser must not be made to ask for one."""

    code, status = "forbidden", 403


def create_app(services: Services) -> Flask:
    """The WSGI application. Starts nothing and calls nobody."""
    app = Flask("backend", template_folder="pages", static_folder=None, root_path=__file__.rpartition("/")[0])
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.extensions["services"], app.extensions["rounds"] = KptLLMBackend.connect(services)
    app.extensions["places"] = threading.BoundedSemaphore(max(services.settings.web_threads - KEPT_FREE, 1))
    app.extensions["picture_places"] = threading.BoundedSemaphore(PICTURE_PLACES)
    app.register_blueprint(wire)
    app.register_blueprint(wire, name="project", url_prefix="/projects/<project>")
    app.register_blueprint(judging)
    app.register_blueprint(judging, name="project_judging", url_prefix="/projects/<project>")
    app.register_blueprint(insight)
    app.register_blueprint(insight, name="project_insight", url_prefix="/projects/<project>")
    app.register_blueprint(pages)
    app.extensions["reports"] = Reports(services)
    app.before_request(admit)
    app.after_request(_finish)
    app.register_error_handler(KptError, _told)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _internal)
    return app


def application() -> Flask:
    """For gunicorn: the application of this process's environment, with the background work."""
    settings = Settings.from_env()
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # at DEBUG it writes addresses, which may carry signatures
    services = Services.make(settings)
    app = create_app(services)
    keeper = Keeper(services, app.extensions["rounds"])
    keeper.start()
    atexit.register(keeper.stop)
    return app


# ---------------------------------------------------------------- what Label Studio calls


@wire.get("/health")
def health(project: str | None = None) -> Response:
    return jsonify(health_report(current.services()))


@wire.post("/setup")
def setup(project: str | None = None) -> Response:
    body = _body()
    label_config = body.get("schema") or body.get("label_config")
    if not isinstance(label_config, str):
        raise InvalidInput("/setup needs the label config under 'schema'.")
    backend = KptLLMBackend(_project(project, body), label_config)
    return jsonify(model_version=backend.model_version)


@wire.post("/predict")
def predict(project: str | None = None) -> Response:
    body = _body()
    tasks, label_config, params = body.get("tasks"), body.get("label_config"), body.get("params")
    if not isinstance(tasks, list):
        raise InvalidInput(f"/predict needs a list under 'tasks'; found {type(tasks).__name__}.")
    if label_config is not None and not isinstance(label_config, str):
        raise InvalidInput("label_config is the XML of the label config, as text.")
    number = _project(project, body)
    label_config = label_config or current.services().journal.label_config(number)
    if not label_config:
        raise unknown_project(number)
    backend = KptLLMBackend(number, label_config)
    context = params.get("context") if isinstance(params, dict) else None
    places: threading.BoundedSemaphore = current_app.extensions["places"]
    if not places.acquire(blocking=False):
        busy = Unavailable("All places for predictions are taken at the moment; ask again in a minute.")
        results = [failed(backend.model_version, busy) for _ in tasks]
        if not isinstance(context, dict):
            _repeat_later(number, tasks, results)
        return jsonify(results=results)
    try:
        results = backend.predict(tasks, context if isinstance(context, dict) else None)
    finally:
        places.release()
    if not isinstance(context, dict):
        _repeat_later(number, tasks, results)
    return jsonify(results=results)


@wire.post("/webhook")
def webhook(project: str | None = None) -> tuple[Response, int]:
    body = _body()
    action = body.get("action")
    if not isinstance(action, str) or not action:
        raise InvalidInput("A webhook names what happened under 'action'.")
    about = body.get("project")
    if project is None and about is None:
        # A webhook without payload: Label Studio's API is asked about every project.
        for known in project_list(current.services()):
            current.services().journal.sweep_soon(known["project"])
        return jsonify(status="ok", message="no payload; it will be fetched"), 200
    backend = _backend_of_webhook(_project(project, body), about)
    answer = backend.fit(action, body)
    return jsonify(answer), 201 if answer.get("job") else 200


@wire.post("/train")
def train(project: str | None = None) -> tuple[Response, int]:
    """The older form of *Start training*; its annotations are in the journal already."""
    answer = _backend_of_webhook(_project(project, _body()), None).fit("START_TRAINING", {})
    return jsonify(answer), 201 if answer["job"] else 200


@wire.get("/versions")
def versions(project: str | None = None) -> Response:
    """The names, the one that serves first. Label Studio names no project here: without one, those of all; with one also, under
    `details`, what is known of each, the newest first: whether it serves, whether it was promoted, and why."""
    asked = project or request.args.get("project")
    journal = current.services().journal
    if not asked:
        names = [v.name for p in project_list(current.services()) for v in reversed(journal.versions(p["project"]))]
        return jsonify(versions=list(dict.fromkeys(names)))
    active, known = journal.active(project_of(asked)), journal.versions(project_of(asked))[::-1]
    names = [active.name, *(v.name for v in known)]
    return jsonify(versions=list(dict.fromkeys(names)), details=[version_state(v, active.id) for v in known])


@wire.post("/job_status")
def job_status(project: str | None = None) -> tuple[Response, int]:
    body = _body()
    try:
        return jsonify(job_state(current.rounds().get(str(body.get("job"))))), 200
    except NotFound as error:
        return jsonify(error=error.to_json(), job_status="removed"), 410


@wire.get("/metrics")
def metrics(project: str | None = None) -> Response:
    return Response(metrics_text(current.services(), current.rounds()), content_type="text/plain; version=0.0.4; charset=utf-8")


# ---------------------------------------------------------------- what people call


@wire.get("/status")
def status(project: str | None = None) -> Response:
    if project is None:
        return jsonify(projects=project_list(current.services()))
    return jsonify(project_status(current.services(), current.rounds(), project_of(project)))


@wire.post("/versions/<path:version>/activate")
def activate(version: str, project: str | None = None) -> Response:
    """Promotion by hand and rollback: the same call."""
    number = _project(project, {})
    active = current.services().journal.activate(number, version, "Activated by hand.")
    current.services().journal.log_event(number, "ACTIVATE", {"version": version})
    return jsonify(model_version=active.name, message=f"{active.name} serves from now on.")


@wire.post("/jobs/<job>/cancel")
def cancel(job: str, project: str | None = None) -> Response:
    if project is not None and current.rounds().get(job).project != project_of(project):
        raise NotFound(f"Project {project_of(project)} has no job '{job}'.")
    return jsonify(job_state(current.rounds().cancel(job)))


@wire.get("/prelabel")
def prelabel_status(project: str | None = None) -> Response:
    """{"prelabel": the run asked for last, "again": what an outage left to do}, each None if there is none."""
    return jsonify(prelabel.project_prelabels(current.services(), _project(project, dict(request.args))))


@wire.post("/prelabel")
def prelabel_start(project: str | None = None) -> tuple[Response, int]:
    """Predict all unlabelled tasks in the background. `{"replace": true}`: older versions' predictions go."""
    body = _body() if request.content_length else {}
    replace = body.get("replace", False)
    if not isinstance(replace, bool):
        raise InvalidInput(f"'replace' is {str(replace)[:40]!r}; expected true or false.")
    run = prelabel.start(current.services(), _project(project, body), replace, "asked for on the page")
    return jsonify(prelabel.prelabel_state(current.services(), run)), 202


@wire.post("/prelabel/cancel")
def prelabel_cancel(project: str | None = None) -> Response:
    body = _body() if request.content_length else {}
    return jsonify(prelabel.prelabel_state(current.services(), prelabel.cancel(current.services(), _project(project, body))))


# ---------------------------------------------------------------- admission and limits


def admit() -> None:
    """Basic auth where it is configured, on everything but /health; the secret header on webhooks; no foreign pages' forms."""
    settings = current.services().settings
    _refuse_foreign_pages(settings)
    endpoint = str(request.endpoint or "")
    if endpoint.endswith(".health") or (settings.basic_auth_user and _basic_auth_fits(settings)):
        return
    sent = request.headers.get(SECRET_HEADER, "")
    if endpoint.endswith(".webhook") and (sent or not settings.basic_auth_user):
        secret = settings.webhook_secret or webhooks.made_up(current.services())
        if secret and hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), secret.encode()):
            return
        # Nothing is parsed for whoever has no login where one is needed.
        always = bool(settings.webhook_secret or settings.basic_auth_user)
        if secret and (always or webhooks.signed(current.services(), _project_of_webhook())):
            # Label Studio's button *Start training* is no webhook of its own and carries no header; it brings no data either.
            button = not settings.basic_auth_user and not sent and int(request.content_length or 0) < BUTTON_BYTES
            if button and _body().get("action") == "START_TRAINING":
                return
            raise Unauthorized(
                f"The webhook lacks the header {SECRET_HEADER} with the right value (WEBHOOK_SECRET, or what the backend made up). With a "
                "token the backend puts it there by itself within a minute; `python -m backend connect` does, too."
            )
    if settings.basic_auth_user:
        raise Unauthorized(
            "Basic auth is needed here: BASIC_AUTH_USER and BASIC_AUTH_PASS, also in Label Studio's model settings."
        )


def _project_of_webhook() -> str | None:
    """The project that an event is about, before anything of it is believed; None where it names none that could be."""
    named = (request.view_args or {}).get("project")
    about = _body().get("project") if named is None else named
    try:
        return project_of(about)
    except InvalidInput:
        return None


def _basic_auth_fits(settings: Settings) -> bool:
    sent = request.authorization
    if sent is None or sent.type != "basic":
        return False
    user, word = (str(v or "").encode("utf-8", "surrogateescape") for v in (sent.username, sent.password))
    right_user = hmac.compare_digest(user, settings.basic_auth_user.encode())
    right_word = hmac.compare_digest(word, settings.basic_auth_pass.encode())
    return right_user and right_word


def _refuse_foreign_pages(settings: Settings) -> None:
    """A browser sends along its login also when another site's page makes it post here. Where there is no login, that page may also
    lead the name of its own host to this machine (DNS rebinding): so nobody may call us by a name that a stranger can have."""
    origin, public = request.headers.get("Origin"), _address(settings.public_url)
    if request.method != "POST" or origin is None:  # no browser: Label Studio may call us by any name
        return
    here = _address("//" + request.headers.get("Host", ""))
    if _address(origin).netloc not in {here.netloc, public.netloc} - {""}:
        raise Forbidden(
            f"A page of {origin[:100]} may not post here. If it is this backend's own page, behind a proxy, set PUBLIC_URL to its address "
            "in the browser, and restart the backend."
        )
    name = here.hostname or ""
    ours = "." not in name or name.endswith(PRIVATE_NAMES) or name in (settings.host.lower(), public.hostname)
    if not (settings.basic_auth_user or ours or re.fullmatch(r"[0-9.]+", name)):
        raise Forbidden(
            f"The backend has no login, and so takes nothing that is sent to the name {name[:100]}, which might be a stranger's. If it is "
            f"the backend's, set PUBLIC_URL to http://{name[:100]}, or BASIC_AUTH_USER and BASIC_AUTH_PASS, and restart it."
        )


def _address(url: str) -> SplitResult:
    """The parts of an address, in small letters; all empty for what is none."""
    try:
        return urlsplit(url.lower())
    except ValueError:
        return urlsplit("")


def _body() -> dict[str, Any]:
    """The request's JSON object. TooLarge, or InvalidInput for what is no strict JSON."""
    if "body" not in g:
        g.body = strict_json(request.get_data(cache=False))
    found: dict[str, Any] = g.body
    return found


def strict_json(data: bytes) -> dict[str, Any]:
    """Without NaN, lone surrogates, numbers beyond 64 bits, or a depth that breaks a parser."""

    def no_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"{digits[:24]} is beyond 64 bits")
        return int(digits)

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"{text[:24]} is too large a number")
        return value

    try:
        value = json.loads(data.decode(), parse_constant=no_constant, parse_int=whole, parse_float=number)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
        if not isinstance(value, dict):
            raise ValueError("expected an object")
        return value
    except UnicodeEncodeError:
        raise InvalidInput("The JSON holds half a character (a lone surrogate). Send whole UTF-8 characters.") from None
    except RecursionError:
        raise InvalidInput("The JSON is nested too deeply.") from None
    except ValueError as error:
        raise InvalidInput(f"The body is no JSON object: {str(error)[:200]}.") from None


def _project(project: str | None, body: dict[str, Any]) -> str:
    """The project of the path, or of the body. InvalidInput where both name one and they differ: neither can be trusted then."""
    named = body.get("project")
    if project is None:
        return project_of(named)
    found = project_of(project)
    if named is not None and project_of(named) != found:
        raise InvalidInput(
            f"The address is that of project {found}, but the body is about project {project_of(named)}. In Label Studio each "
            f"project needs a model of its own: python -m backend connect --project {project_of(named)} adds it."
        )
    return found


def _repeat_later(project: str, tasks: list[Any], results: list[dict[str, Any]]) -> None:
    """Remember which tasks go away with an empty prediction now. Not being able to must not cost the others theirs."""
    try:
        prelabel.again(current.services(), project, prelabel.to_repeat(tasks, results))
    except KptError as error:
        log.warning("project %s: empty predictions will stay as they are: %s", project, error.message)


def _backend_of_webhook(project: str, about: Any) -> KptLLMBackend:
    """With the label config that the event brings; a config that cannot be used must not lose the event."""
    config = about.get("label_config") if isinstance(about, dict) else None
    if not isinstance(config, str):
        known = current.services().journal.label_config(project)
        config = known or None
    try:
        return KptLLMBackend(project, config)
    except SchemaError as error:
        log.warning("project %s: %s", project, error.message)
        return KptLLMBackend(project)


# ---------------------------------------------------------------- answers


def _finish(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _told(error: KptError) -> tuple[Response, int]:
    response = Response(error_page(error)) if is_page() else jsonify(error=error.to_json())
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = 'Basic realm="keypoint backend", charset="UTF-8"'
    if "retry_after" in error.details:  # seconds
        response.headers["Retry-After"] = str(error.details["retry_after"])
    if error.status >= 500:
        log.error("%s %s: %s", request.method, request.path, error.message)
    return response, error.status


def _http_error(error: HTTPException) -> tuple[Response, int]:
    status = error.code or 500
    if status == 413:
        return _told(TooLarge(f"The request is larger than {MAX_BODY:,} bytes. Send fewer tasks at once."))
    if status < 400:
        return Response(status=status, headers=error.get_response().headers), status
    code = {400: "invalid_input", 404: "not_found", 405: "method_not_allowed"}.get(status, "http")
    return jsonify(error={"code": code, "message": str(error.description)}), status


def _internal(error: Exception) -> tuple[Response, int]:
    if isinstance(error, RecursionError):  # it could be read, but not be written down again
        return _told(InvalidInput("The JSON is nested too deeply."))
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return jsonify(error={"code": "internal", "message": "The backend failed on this request. Its log says more."}), 500
