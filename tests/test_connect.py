"""Attaching a project: every step that can fail says what to do; running it again changes nothing. The real one, too."""

from __future__ import annotations

import argparse
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend import connect
from backend.demo.services import Login
from backend.label_studio import LabelStudio
from kptllm_core.errors import InvalidInput
from small_server import Answer, Request, SmallServer, certificate_for, no_proxies, reply  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_proxies", "bare_environment")
CANARY = "canarytoken0123456789"
CONFIG = (
    '<View><Image name="image" value="$image"/><KeyPointLabels name="kp" toName="image">'
    '<Label value="nose"/><Label value="tail"/></KeyPointLabels></View>'
)
RESERVED = {"detail": "URL resolves to a reserved network address (block: 127.0.0.0/8)"}


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "LABEL_STUDIO_URL",
        "LABEL_STUDIO_API_KEY",
        "LABEL_STUDIO_CA",
        "BASIC_AUTH_USER",
        "BASIC_AUTH_PASS",
        "WEBHOOK_SECRET",
    ]
    for name in names:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def backend() -> Iterator[SmallServer]:
    """Answers the four calls of attaching as the backend does; `login`, when set, is demanded."""
    with SmallServer() as server:
        server.routes["*"] = reply({"status": "UP", "degraded": None, "model_version": "v1", "versions": ["v1"]})
        yield server


@pytest.fixture
def studio(backend: SmallServer) -> Iterator[SmallServer]:
    """Answers the calls of `connect` as a Label Studio in which all is well does. Tests break one of them."""
    url = f"{backend.url}/projects/7"
    model = {"id": 3, "url": url, "title": "KptLLM", "state": "CO", "model_version": "v1"}
    project = {"id": 7, "title": "Mice", "task_number": 5, "label_config": CONFIG, "model_version": "KptLLM"}
    with SmallServer() as server:
        server.routes |= {
            "/api/version": reply({"release": "1.23.2"}),
            "/api/current-user/whoami": reply({"email": "a@b.c"}),
            "/api/projects/7/": reply(project | {"show_collab_predictions": True}),
            "/api/projects/7/model-versions/": reply({"static": [], "live": []}),
            "/api/ml/": reply(model, 201),
            "/api/ml/3": reply(model),
            "/api/webhooks/": lambda request: reply([] if request.method == "GET" else {"id": 1}),
        }
        yield server


def run(studio: str, backend: str, *more: str, project: int = 7) -> int:
    parser = argparse.ArgumentParser()
    connect.add_arguments(parser)
    options = ["--url", studio, "--token", CANARY, "--project", str(project), "--backend-url", backend, *more]
    return connect.run(parser.parse_args(options))


def test_when_all_is_well(studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(studio.url, backend.url) == 0
    told = capsys.readouterr().out
    assert "✗" not in told and CANARY not in told
    for words in (
        "Label Studio 1.23.2",
        "a@b.c",
        "'Mice', 5 tasks",
        "2 keypoints: nose, tail",
        "version v1",
        "webhook",
    ):
        assert words in told
    attached = next(request for request in studio.requests if request.path == "/api/ml/")
    assert attached.json()["url"] == f"{backend.url}/projects/7" and attached.json()["is_interactive"] is True
    assert run(studio.url, backend.url + "/projects/7/", "--no-interactive") == 0
    assert studio.requests[-1].method == "GET"  # the settings were right: nothing to change


BREAKS: list[tuple[str, Answer, list[str]]] = [
    ("/api/version", Answer(body=b"<html>"), ["instead of JSON"]),
    ("/api/current-user/whoami", reply({"detail": "Invalid token."}, 401), ["legacy token", "Personal Access Token"]),
    ("/api/projects/7/", reply({"detail": "No Project matches"}, 404), ["No Project matches", "may not see it"]),
    ("/api/projects/7/", reply({"label_config": "<View/>", "title": "x"}), ["label config cannot be used"]),
    ("/api/ml/", reply(RESERVED, 403), ["ML_BLOCK_LOCAL_IP=false", "SSRF_PROTECTION_ENABLED=false", "private address"]),
    (
        "/api/ml/",
        reply(
            {"validation_errors": {"non_field_errors": ["Can't connect to ML backend x, health check failed."]}}, 400
        ),
        ["cannot reach the backend", "inside a container", "From here it answers"],
    ),
    (
        "/api/ml/",
        reply(
            {"validation_errors": {"non_field_errors": ["Able to connect, but authentication parameters were"]}}, 400
        ),
        ["login is wrong or missing", "--basic-user"],
    ),
    (
        "/api/ml/",
        reply({"validation_errors": {"non_field_errors": ["doesn't look like a valid ML backend. Reason: 400"]}}, 400),
        ["/setup", "Reason: 400"],
    ),
    ("/api/ml/", reply({"id": 3, "state": "ER", "error_message": "boom"}, 201), ["not connected", "boom"]),
    ("/api/ml/", reply({"detail": "no permission"}, 403), ["no permission", "Use the token of a member"]),
    ("/api/webhooks/", reply(RESERVED, 403), ["no webhooks", "SSRF_PROTECTION_ENABLED=false"]),
    ("/api/webhooks/", reply({"detail": "odd"}, 400), ["webhook cannot be set up", "odd"]),
]


@pytest.mark.parametrize(("path", "answer", "words"), BREAKS)
def test_each_step_that_fails_says_what_to_do(
    studio: SmallServer,
    backend: SmallServer,
    capsys: pytest.CaptureFixture[str],
    path: str,
    answer: Answer,
    words: list[str],
) -> None:
    studio.routes[path] = answer
    assert run(studio.url, backend.url) == 1
    told = capsys.readouterr().out
    failed = [line for line in told.splitlines() if line.startswith("✗")]
    assert len(failed) == 1 and "run this again" in told and CANARY not in told
    for word in words:
        assert word in told


def test_a_refusal_that_took_effect_all_the_same(
    studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """With SSRF_PROTECTION_ENABLED alone Label Studio stores the model, stumbles over its webhook, and answers 403."""

    def attach(request: Request) -> Answer:
        stored = request.json() | {"id": 3}
        studio.routes["/api/projects/7/model-versions/"] = reply({"live": [stored]})
        return reply(RESERVED, 403)

    studio.routes["/api/ml/"] = attach
    studio.routes["/api/webhooks/"] = lambda request: reply([] if request.method == "GET" else {"id": 1})
    assert run(studio.url, backend.url) == 0
    assert "Label Studio has the model now" in capsys.readouterr().out


def test_nobody_at_label_studios_address(backend: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("http://127.0.0.1:1", backend.url) == 1
    assert "Connection refused" in capsys.readouterr().out


def test_addresses_that_were_exchanged_or_are_the_same(studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    for status in (404, 401):  # without and with basic auth
        backend.routes["/api/version"] = Answer(status)
        for other in (studio.url, backend.url):
            assert run(backend.url, other) == 1
            assert "is a backend like this one, not Label Studio. Give Label Studio's address with --url" in capsys.readouterr().out
    studio.routes["/projects/7/health"] = reply({"status": "UP"})  # as Label Studio answers there
    for same in (studio.url, studio.url.replace("127.0.0.1", "localhost")):
        assert run(studio.url, same) == 1
        told = capsys.readouterr().out
        assert "is Label Studio, not this backend. Give this backend's address with --backend-url" in told and "The backend answers" not in told


def test_https_where_there_is_none(studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(studio.url.replace("http:", "https:"), backend.url) == 1
    assert "speaks no https. Give its address with http://" in capsys.readouterr().out
    assert run(studio.url, backend.url.replace("http:", "https:")) == 1
    assert "speaks no https. Give its address with http:// (--backend-url)" in capsys.readouterr().out


def test_http_where_https_is_spoken(studio: SmallServer, backend: SmallServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SmallServer(certificate=certificate_for("127.0.0.1", tmp_path)) as secured:
        plain = secured.url.replace("https:", "http:")
        assert run(plain, backend.url) == 1
        assert f"What answers at {plain} speaks https. Give its address with https:// (--url)" in capsys.readouterr().out
        assert run(studio.url, plain) == 1
        assert f"What answers at {plain} speaks https. Give its address with https:// (--backend-url)" in capsys.readouterr().out


def test_settings_of_the_project_are_mended(
    studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"show_collab_predictions": False, "model_version": "older", "evaluate_predictions_automatically": True}
    studio.routes["/api/projects/7/"] = reply({"title": "x", "label_config": CONFIG} | wrong)
    assert run(studio.url, backend.url) == 0
    changed = studio.requests[-1]
    assert changed.method == "PATCH" and changed.json() == {
        "show_collab_predictions": True,
        "model_version": "KptLLM",
        "evaluate_predictions_automatically": False,
    }
    assert "instead of 'older'" in capsys.readouterr().out


def test_a_backend_that_is_reachable_for_label_studio_only(
    studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a compose network the names of services mean nothing outside; Label Studio's own view counts."""
    assert run(studio.url, "http://backend.invalid:9090") == 0
    assert "Label Studio reaches it, and that is what counts" in capsys.readouterr().out
    down = {"non_field_errors": ["health check failed"]}
    studio.routes["/api/ml/"] = reply({"validation_errors": down}, 400)
    assert run(studio.url, "http://127.0.0.1:1") == 1
    assert "does not answer at http://127.0.0.1:1 from here: is it running?" in capsys.readouterr().out


def test_another_server_at_the_backends_address(
    studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.routes["*"] = Answer(404)
    assert run(studio.url, backend.url) == 0
    assert "answers 404, not as this backend does" in capsys.readouterr().out


def test_what_is_degraded_is_told(
    studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.routes["*"] = reply({"status": "UP", "degraded": {"core": "It does not answer."}})
    assert run(studio.url, backend.url) == 0
    assert "– It says that something is missing (core): It does not answer." in capsys.readouterr().out


def test_basic_auth(studio: SmallServer, backend: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    right = "Basic " + base64.b64encode(f"me:{CANARY}".encode()).decode()
    backend.routes["/projects/7/versions"] = lambda request: (
        reply({"versions": []}) if request.headers.get("Authorization") == right else Answer(401)
    )
    assert run(studio.url, backend.url) == 1
    assert "wants basic auth, and none was given" in capsys.readouterr().out
    assert run(studio.url, backend.url, "--basic-user", "me", "--basic-pass", "wrong") == 1
    assert "not the right one" in capsys.readouterr().out
    assert run(studio.url, backend.url, "--basic-user", "me", "--basic-pass", CANARY) == 0
    told = capsys.readouterr().out
    assert "signed with Authorization" in told and CANARY not in told
    made = next(r for r in studio.requests if r.path == "/api/webhooks/" and r.method == "POST")
    assert made.json()["headers"] == {"Authorization": right}
    model = [r for r in studio.requests if r.path == "/api/ml/"][-1].json()
    assert (model["auth_method"], model["basic_auth_user"], model["basic_auth_pass"]) == ("BASIC_AUTH", "me", CANARY)


def test_options_come_from_the_environment_too(
    studio: SmallServer, backend: SmallServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LABEL_STUDIO_URL", studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", CANARY)
    monkeypatch.setenv("WEBHOOK_SECRET", "hush")
    parser = argparse.ArgumentParser()
    connect.add_arguments(parser)
    assert connect.run(parser.parse_args(["--project", "7", "--backend-url", backend.url])) == 0
    assert studio.requests[1].headers["Authorization"] == f"Token {CANARY}"
    made = next(r for r in studio.requests if r.path == "/api/webhooks/" and r.method == "POST")
    assert made.json()["headers"] == {"X-Webhook-Secret": "hush"} and "hush" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        ["--backend-url", "backend:9090"],
        ["--backend-url", "http://b/projects/8"],
        ["--basic-user", "x"],
        ["--url", "nonsense"],
    ],
)
def test_options_that_cannot_be_used(studio: SmallServer, backend: SmallServer, more: list[str]) -> None:
    with pytest.raises(InvalidInput):
        run(studio.url, backend.url, *more)
    assert not studio.requests


# ---- the real Label Studio ------------------------------------------------------------------------------------------
@pytest.mark.label_studio
def test_on_the_real_one(
    label_studio_server: tuple[str, Login], backend: SmallServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url, login = label_studio_server
    studio = LabelStudio(url, login.token)
    project = studio.create_project("Connect", CONFIG, show_collab_predictions=False)["id"]
    studio.upload(project, [("a.jpg", b"x")])
    target = f"{backend.url}/projects/{project}"

    def attach(*more: str) -> str:
        options = ["--token", login.token, *more]
        assert run(url, backend.url, *options, project=project) == 0, capsys.readouterr().out
        return capsys.readouterr().out

    def state() -> tuple[list[Any], list[Any], Any]:
        models = [(m["url"], m["title"], m["is_interactive"], m["auth_method"]) for m in studio.ml_backends(project)]
        hooks = [(h["url"], h["headers"], h["is_active"]) for h in studio.webhooks(project)]
        found = studio.project(project)
        return models, hooks, (found["show_collab_predictions"], found["model_version"])

    attach()
    assert state() == (
        [(target, "KptLLM", True, "NONE")],
        [(f"{target}/webhook", {}, True)],
        (True, "KptLLM"),
    )
    before = studio.ml_backends(project)[0]["id"], studio.webhooks(project)[0]["id"]
    told = attach("--no-interactive", "--basic-user", "me", "--basic-pass", "pw")
    assert "had the model already" in told and "that was there" in told
    assert state()[:2] == (
        [(target, "KptLLM", False, "BASIC_AUTH")],
        [(f"{target}/webhook", {"Authorization": "Basic bWU6cHc="}, True)],
    )
    assert before == (studio.ml_backends(project)[0]["id"], studio.webhooks(project)[0]["id"])

    # A webhook that was switched off, doubled, and one left over from a backend that was deleted
    studio.update_webhook(before[1], is_active=False)
    studio.create_webhook(project, f"{target}/webhook")
    studio.create_webhook(project, f"http://127.0.0.1:9/projects/{project}/webhook")
    foreign = studio.create_webhook(project, "http://127.0.0.1:9/somebody-elses")
    told = attach("--webhook-secret", "hush")
    assert "2 old webhooks" in told
    assert sorted(hook["id"] for hook in studio.webhooks(project)) == sorted([before[1], foreign["id"]])
    assert studio.webhooks(project)[0]["is_active"]

    # Attached by hand without the project's path: repaired, not doubled
    studio.detach_backend(before[0])
    studio.attach_backend(project, backend.url, "By hand")
    told = attach()
    assert state()[0] == [(target, "By hand", True, "NONE")] and studio.project(project)["model_version"] == "By hand"

    # An event arrives, signed
    seen: list[Request] = []
    backend.routes[f"/projects/{project}/webhook"] = lambda request: (seen.append(request), reply({}))[1]
    studio.annotate(next(studio.tasks(project))["id"], [])
    assert seen[0].json()["action"] == "ANNOTATION_CREATED" and seen[0].headers["X-Webhook-Secret"] == "hush"
    studio.delete_project(project)
