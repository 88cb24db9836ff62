"""The core's routes: limits, errors as JSON, metrics. `openapi.json` describes them.

Images travel once, by their SHA-256; everything else is JSON. Nothing here starts anything: that is serve.py.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask, Response, g, jsonify, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from werkzeug.exceptions import HTTPException

from kptllm_core.engine import Engine, Gone
from kptllm_core.errors import Conflict, InvalidInput, KptError, NotFound, TooLarge, Unauthorized, Unavailable
from kptllm_core.jobs import JobQueue
from kptllm_core.messages import NameRequest, PredictRequest, RoundRequest, parse_json
from kptllm_core.store import AdapterStore, ImageStore, check_adapter_name, check_sha

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 8 * 2**20
MAX_ROUND_BYTES = 128 * 2**20


@dataclass
class Core:
    """All that the routes need."""

    images: ImageStore
    adapters: AdapterStore
    engine: Engine
    jobs: JobQueue
    model: str = "nano"
    device: str = "auto"
    token: str = field(default="", repr=False)
    metrics: Metrics = field(default_factory=lambda: Metrics())


class Metrics:
    """What Prometheus reads. Each app has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("kptllm_core_requests", "Requests.", ["route", "method", "status"], registry=self.registry)
        self.seconds = Histogram("kptllm_core_request_seconds", "Time to answer.", ["route"], registry=self.registry,
                                 buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120))  # fmt: skip
        self.predicted = Counter("kptllm_core_images_predicted", "Queries answered with keypoints.", registry=self.registry)
        self.refused = Counter("kptllm_core_query_errors", "Queries answered with an error, by code.", ["code"], registry=self.registry)

    def watch(self, core: Core) -> None:
        for name, text, read in (
            ("model_ready", "1 once the model is loaded.", lambda: core.engine.ready),
            ("queue_length", "Requests that use the device or wait for it.", lambda: core.engine.waiting),
            ("training_running", "1 while a round trains.", lambda: core.jobs.running is not None),
            ("rounds_queued", "Rounds that wait for their turn.", lambda: core.jobs.queued),
            ("image_store_bytes", "Bytes of the stored images.", lambda: core.images.total_bytes),
        ):
            Gauge(f"kptllm_core_{name}", text, registry=self.registry).set_function(read)


def create_app(core: Core) -> Flask:
    """The WSGI application. Starts nothing."""
    app = Flask("kptllm_core", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config["MAX_CONTENT_LENGTH"] = MAX_JSON_BYTES
    app.url_map.merge_slashes = False  # a strange path is not found, rather than redirected
    core.metrics.watch(core)

    @app.before_request
    def admit() -> None:
        g.begin = time.perf_counter()
        if core.token and request.endpoint != "health":
            check_token(request.headers.get("Authorization", ""), core.token)

    @app.after_request
    def count(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "other"
        seconds = time.perf_counter() - g.begin
        method = request.method if request.url_rule else "other"
        core.metrics.requests.labels(route, method, response.status_code).inc()
        core.metrics.seconds.labels(route).observe(seconds)
        log.log(logging.INFO if method in ("POST", "DELETE") else logging.DEBUG, "%s %s: %d in %.3f s", method, route, response.status_code, seconds)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/health")
    def health() -> Response:
        ready = core.engine.ready
        return jsonify(status="UP" if ready else "LOADING", base=core.engine.predictor.base if ready else None,
                       device=str(core.engine.predictor.device) if ready else core.device,
                       training=core.jobs.running, queue=core.jobs.queued, waiting=core.engine.waiting)  # fmt: skip

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response((Path(__file__).parent / "openapi.json").read_bytes(), mimetype="application/json")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(core.metrics.registry), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.put("/images/<sha>")
    def put_image(sha: str) -> tuple[Response, int]:
        check_sha(sha)
        request.max_content_length = core.images.max_image_bytes
        if (request.content_length or 0) > core.images.max_image_bytes:
            raise TooLarge(f"The image has {request.content_length:,} bytes; at most {core.images.max_image_bytes:,} are allowed. Scale it down.")
        core.images.put(sha, request.get_data(cache=False))
        return jsonify(image=sha), 201

    @app.post("/images/missing")
    def missing_images() -> Response:
        body = json_body()
        shas = body.get("images") if isinstance(body, dict) else None
        if not isinstance(shas, list):
            raise InvalidInput("Expected {\"images\": [SHA-256, …]}.")
        return jsonify(missing=core.images.missing(map(check_sha, shas)))

    @app.post("/predict")
    def predict() -> Response:
        asked = PredictRequest.from_json(json_body())
        with needs(core.images, asked.images()):
            results = core.engine.predict(asked, gone=request.environ.get("waitress.client_disconnected", lambda: False))
        for result in results:
            if "error" in result:
                core.metrics.refused.labels(result["error"]["code"]).inc()
            else:
                core.metrics.predicted.inc()
        return jsonify(base=core.engine.predictor.base, adapter=asked.adapter, results=results)

    @app.post("/name")
    def name() -> Response:
        asked = NameRequest.from_json(json_body())
        with needs(core.images, [asked.image]):
            names = core.engine.name_points(asked)
        return jsonify(names=[{"name": name, "score": round(float(score), 4)} for name, score in names])

    @app.post("/rounds")
    def start_round() -> tuple[Response, int]:
        asked = RoundRequest.from_json(json_body(MAX_ROUND_BYTES))
        with needs(core.images, asked.images()):
            job = core.jobs.submit(asked, core.engine.predictor.base, core.model, core.device)
        return jsonify(job.to_json()), 202

    @app.get("/rounds/<job>")
    def round_state(job: str) -> Response:
        return jsonify(core.jobs.get(job).to_json())

    @app.delete("/rounds/<job>")
    def cancel_round(job: str) -> Response:
        return jsonify(core.jobs.cancel(job).to_json())

    @app.get("/adapters")
    def adapters() -> Response:
        return jsonify(adapters=core.adapters.list())

    @app.delete("/adapters/<name>")
    def delete_adapter(name: str) -> Response:
        core.jobs.delete_adapter(check_adapter_name(name))
        return jsonify(deleted=name)

    @app.errorhandler(KptError)
    def told(error: KptError) -> tuple[Response, int]:
        response = jsonify(error=error.to_json())
        if isinstance(error, Unavailable):
            response.headers["Retry-After"] = "2"
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        return response, error.status

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int]:
        status = error.code or 500
        if status == 413:
            return told(TooLarge(f"The request is larger than the {request.max_content_length or 0:,} bytes that this route takes. Split it."))
        code = {400: "invalid_input", 404: "not_found", 405: "method_not_allowed"}.get(status, "http")
        return jsonify(error={"code": code, "message": f"{error.description} GET /openapi.json lists the routes."}), status

    @app.errorhandler(Gone)
    def hung_up(_: Gone) -> tuple[Response, int]:
        return jsonify(error={"code": "gone", "message": "The client hung up."}), 499

    @app.errorhandler(Exception)
    def internal(error: Exception) -> tuple[Response, int]:
        log.error("%s %s failed.", request.method, request.url_rule, exc_info=error)
        return jsonify(error={"code": "internal", "message": "The core failed on this request. Its log says more."}), 500

    return app


def json_body(limit: int = MAX_JSON_BYTES) -> Any:
    """The request's JSON, at most `limit` bytes of it."""
    if request.mimetype != "application/json":  # also keeps forms of foreign web pages out
        raise InvalidInput(f"Send JSON with the header Content-Type: application/json; found {request.mimetype or 'none'}.")
    request.max_content_length = limit
    return parse_json(request.get_data(cache=False))


def check_token(header: str, token: str) -> None:
    """Unauthorized unless the header is `Bearer <token>`; takes the same time wherever it differs."""
    if not hmac.compare_digest(header.encode("latin-1", "replace"), f"Bearer {token}".encode()):
        raise Unauthorized("This core wants the header Authorization: Bearer <CORE_TOKEN>. Give its clients the same CORE_TOKEN.")


@contextmanager
def needs(images: ImageStore, shas: Iterable[str]) -> Iterator[None]:
    """Keeps these images here while the request is answered. Conflict `missing_images` with those to upload first."""
    held = set(shas)
    with images.in_use(held):
        missing = images.missing(sorted(held))
        try:
            if not missing:
                yield
        except NotFound as error:
            if "image" not in error.details:
                raise
            missing = [str(error.details["image"])]  # damaged on disk, which showed only now
        if missing:
            raise Conflict(f"{len(missing)} images are not here. PUT each to /images/<sha256>, then ask again.",
                           code="missing_images", missing=missing)  # fmt: skip
