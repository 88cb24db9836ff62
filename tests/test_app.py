"""The HTTP face: the wire contract, admission, limits; quick answers whatever the core does; a burst of webhooks."""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.serving import make_server

from backend import app as app_module
from backend.app import strict_json
from backend.core_watch import KEPT_SECONDS
from backend_world import CONFIG, World, world
from kptllm_core.errors import InvalidInput, Unavailable
from kptllm_core.messages import parse_json

CANARY = "canary-7f3a9c"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def basic(user: str, word: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()}


# ---------------------------------------------------------------- the wire contract


def test_every_route_answers_below_the_project_too(here: World) -> None:
    here.label(1)
    for prefix, body in (("", {"project": "1.17"}), ("/projects/1", {})):
        assert here.client.get(f"{prefix}/health").get_json()["status"] == "UP"
        version = here.client.post(f"{prefix}/setup", json={**body, "schema": CONFIG}).get_json()["model_version"]
        predicted = here.client.post(
            f"{prefix}/predict", json={**body, "label_config": CONFIG, "tasks": [here.task(1)]}
        ).get_json()
        assert predicted["results"][0]["model_version"] == version
        assert here.client.get(f"{prefix}/versions").get_json()["versions"][0] == version
        assert (
            here.client.post(f"{prefix}/webhook", json={"action": "PROJECT_UPDATED", "project": {"id": 1}}).status_code
            == 200
        )
        assert here.client.post(f"{prefix}/train", json={**body}).status_code == 200
        assert here.client.post(f"{prefix}/job_status", json={"job": "x"}).status_code == 410
        assert "kptllm_backend_labelled_images 1" in here.client.get(f"{prefix}/metrics").get_data(as_text=True)
        assert here.client.get(f"{prefix}/status").status_code == 200


def test_the_path_and_the_body_must_name_the_same_project(here: World) -> None:
    """A project that was given another one's address must not pour its annotations into it."""
    for path, body in (("setup", {"project": "1.17", "schema": CONFIG}), ("predict", {"project": "1.17", "tasks": []}),
                       ("webhook", {"project": {"id": 1}, "action": "ANNOTATION_CREATED"}), ("train", {"project": 1})):  # fmt: skip
        refused = here.client.post(f"/projects/7/{path}", json=body)
        assert refused.status_code == 400, path
        assert "project 7, but the body is about project 1" in refused.get_json()["error"]["message"]
    assert here.client.get("/status").get_json()["projects"] == []
    assert here.client.post("/projects/7/setup", json={"project": "7.17", "schema": CONFIG}).status_code == 200
    assert here.client.post("/projects/7/setup", json={"schema": CONFIG}).status_code == 200
    assert [p["project"] for p in here.client.get("/status").get_json()["projects"]] == ["7"]


def test_a_job_is_cancelled_below_its_own_project_only(here: World) -> None:
    here.setup()
    here.label(*range(1, 13))
    job = here.webhook("START_TRAINING", config=None).get_json()["job"]
    assert here.client.post(f"/projects/2/jobs/{job}/cancel").status_code == 404
    assert here.client.post(f"/projects/1/jobs/{job}/cancel").get_json()["state"] == "cancelled"


def test_predict_without_a_label_config_uses_the_one_that_is_known(here: World) -> None:
    assert here.client.post("/predict", json={"tasks": [], "project": 1}).status_code == 404
    here.setup()
    assert here.client.post("/predict", json={"tasks": [here.task(1)], "project": 1}).get_json()["results"][0]["result"]
    assert here.client.post("/predict", json={"tasks": [], "project": 1}).get_json() == {"results": []}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/predict", {"project": 1}, "list under 'tasks'"),
        ("/predict", {"tasks": {}, "project": 1}, "list under 'tasks'"),
        ("/predict", {"tasks": [], "label_config": CONFIG}, "project is missing"),
        ("/predict", {"tasks": [], "project": 1, "label_config": 5}, "XML"),
        ("/predict", {"tasks": [], "project": 1, "label_config": "<View/>"}, "no KeyPointLabels"),
        (
            "/predict",
            {"tasks": [], "project": 1, "label_config": '<!DOCTYPE x [<!ENTITY a "b">]><View>&a;</View>'},
            "DOCTYPE",
        ),
        ("/setup", {"project": 1}, "'schema'"),
        ("/setup", {"project": "../etc", "schema": CONFIG}, "project id"),
        ("/setup", {"project": 1, "schema": "<View"}, "XML"),
        ("/webhook", {"project": {"id": 1}}, "'action'"),
        ("/webhook", {"action": 5}, "'action'"),
        ("/webhook", {"action": "ANNOTATION_CREATED", "project": {"id": None}}, "project"),
        (
            "/webhook",
            {"action": "ANNOTATION_CREATED", "project": {"id": 1}, "annotation": {"id": -1, "task": 1, "result": []}},
            "annotation's id",
        ),
        ("/webhook", {"action": "TASKS_DELETED", "project": {"id": 1}, "tasks": ["x"]}, "task's id"),
    ],
)
def test_bad_requests_are_told_what_was_found_and_expected(here: World, path: str, body: Any, words: str) -> None:
    answer = here.client.post(path, json=body)
    assert answer.status_code == 400
    assert words in answer.get_json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/predict", 405), ("GET", "/projects/9/status", 404),
                                                        ("GET", "/projects/a%20b/versions", 400),
                                                        ("POST", "/projects/1/versions/x/activate", 404)])  # fmt: skip
def test_wrong_addresses_are_answered_in_json(here: World, method: str, path: str, status: int) -> None:
    answer = here.client.open(path, method=method)
    assert answer.status_code == status
    assert answer.get_json()["error"]["message"]


def test_an_annotation_under_a_broken_config_is_not_lost(here: World) -> None:
    answer = here.webhook("ANNOTATION_CREATED", config="<View/>", annotation=here.annotation(1), task=here.task(1))
    assert answer.get_json()["new"] == 1
    here.setup()
    assert here.status()["labelled"] == 1
    # Also when the config was good before, and is put right without any other change.
    here.webhook("ANNOTATION_CREATED", config="<View/>", annotation=here.annotation(2), task=here.task(2))
    here.setup()
    assert here.status()["labelled"] == 2 and 2 in here.status()["support"]


def test_setup_asks_nobody_and_health_the_core_once_a_second_at_most(here: World) -> None:
    here.setup()
    before = len(here.core_requests)
    for _ in range(3):
        here.setup()
        here.client.get("/health")
        here.client.get("/versions?project=1")
    assert here.core_requests[before:] in ([("GET", "/health")], [("GET", "/health")] * 2)
    assert here.studio.requests == []


def test_health_tells_of_a_dead_core_at_once(here: World) -> None:
    here.keeper._see_core()
    assert here.client.get("/health").get_json()["degraded"] is None
    here.stop_core()
    time.sleep(KEPT_SECONDS)
    health = here.client.get("/health").get_json()
    assert health["status"] == "UP"
    assert "cannot be reached" in health["degraded"]["core"]
    with pytest.raises(Unavailable):
        here.keeper._see_core()
    here.restart_core()
    time.sleep(KEPT_SECONDS)
    assert here.client.get("/health").get_json()["degraded"] is None  # and of one that is back


def test_health_does_not_wait_for_a_core_that_hangs(here: World) -> None:
    here.keeper._see_core()
    hanging = socket.create_server(("127.0.0.1", 0))  # takes connections, never answers
    here.services.core.url = f"http://127.0.0.1:{hanging.getsockname()[1]}"
    for _ in range(3):
        started = time.monotonic()
        assert here.client.get("/health").get_json()["degraded"] is None  # the keeper, who gives it time, decides
        assert time.monotonic() - started < 0.9
    hanging.close()


# ---------------------------------------------------------------- strict JSON


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 200_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"), (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"), (b'{"a": "\\ud800"}', "surrogate"), (b'{"a": 9223372036854775808}', "64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "64 bits"), (b"", "no JSON object"), (b"[]", "expected an object"), (b"\xff\xfe", "no JSON object"),
        (b'{"a"', "no JSON object"),
    ],
)  # fmt: skip
def test_json_that_would_do_harm_is_refused(here: World, data: bytes, words: str) -> None:
    for path in ("/predict", "/setup", "/webhook", "/job_status"):
        answer = here.client.post(path, data=data, content_type="application/json")
        assert answer.status_code == 400, path
        assert words in answer.get_json()["error"]["message"]


def test_depth_that_can_be_read_but_not_kept_is_refused(here: World) -> None:
    here.setup()
    for depth in (100, 300, 500, 700, 900, 980):
        deep = "[" * depth + "]" * depth
        body = f'{{"action": "ANNOTATION_CREATED", "project": {{"id": 1}}, "annotation": {{"id": 1, "task": 1, "result": {deep}}}}}'
        assert here.client.post("/webhook", data=body).status_code in (200, 400)


def test_a_huge_body_is_refused_before_it_is_read(here: World) -> None:
    answer = here.client.post(
        "/predict", content_type="application/json", environ_overrides={"CONTENT_LENGTH": str(10**9)}
    )
    assert answer.status_code == 413
    assert "larger than 67,108,864 bytes" in answer.get_json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
        ["id", "task", "tasks", "data", "image", "annotation", "annotations", "result", "value", "project", "label_config", "params",
         "context", "action", "schema", "x", "keypointlabels", "updated_at", "type", "from_name", "original_width"]), inner, max_size=6),
    max_leaves=15,
)  # fmt: skip


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    body=json_values,
    content=json_values,
    event=st.sampled_from(["ANNOTATION_CREATED", "ANNOTATIONS_DELETED", "TASKS_CREATED", "START_TRAINING", "X"]),
)
def test_no_json_at_all_makes_a_500(here: World, body: Any, content: Any, event: str) -> None:
    shapes = [("/predict", {"tasks": [content], "project": 1, "label_config": CONFIG, "params": {"context": body}}),
              ("/webhook", {"action": event, "project": {"id": 1, "label_config": CONFIG}, "annotation": content, "task": body}),
              ("/webhook", {"action": event, "project": {"id": 1}, "annotations": content, "tasks": body}),
              ("/setup", {"project": content, "schema": body}), ("/job_status", {"job": content}), ("/webhook", body)]  # fmt: skip
    for path, value in shapes:
        answer = here.client.post(path, data=json.dumps(value), content_type="application/json")
        assert answer.status_code in (200, 201, 400, 404, 410), (path, value, answer.get_data(as_text=True))
        if path == "/predict" and answer.status_code == 200:
            assert len(answer.get_json()["results"]) == 1


def test_strict_json_takes_what_is_json() -> None:
    assert strict_json('{"a": "ü😀\\ud83d\\ude00\\u0000", "b": [1.5, -9223372036854775808]}'.encode())["b"] == [
        1.5,
        -(2**63),
    ]
    with pytest.raises(InvalidInput):
        strict_json(b"1")


def test_half_a_character_is_no_json() -> None:
    for data in (b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}'):
        with pytest.raises(InvalidInput):
            strict_json(data)
        with pytest.raises(InvalidInput):
            parse_json(data)


def test_a_task_number_beyond_all_is_refused_in_words(here: World) -> None:
    here.setup()
    answer = here.client.get("/projects/1/tasks/99999999999999999999/image")
    assert answer.status_code == 400 and "2^63" in answer.get_json()["error"]["message"]


# ---------------------------------------------------------------- admission


def test_basic_auth_guards_everything_but_health(tmp_path: Path) -> None:
    with world(tmp_path, basic_auth_user="me", basic_auth_pass=CANARY) as here:
        wrong: list[dict[str, str]] = [{}, basic("me", "x"), basic("x", CANARY), {"Authorization": "Basic ###"},
                                       {"Authorization": f"Bearer {CANARY}"}, {"Authorization": "Basic"},
                                       {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()}]  # fmt: skip
        calls = [("POST", "/setup"), ("POST", "/predict"), ("POST", "/webhook"), ("GET", "/"), ("GET", "/versions"), ("GET", "/metrics"),
                 ("POST", "/projects/1/webhook"), ("POST", "/projects/1/versions/x/activate"), ("GET", "/nope")]  # fmt: skip
        for headers in wrong:
            for method, path in calls:
                answer = here.client.open(path, method=method, json={} if method == "POST" else None, headers=headers)
                assert answer.status_code == 401, (headers, path)
                assert CANARY not in answer.get_data(as_text=True)
        assert here.client.get("/health").status_code == 200
        right = basic("me", CANARY)
        assert here.client.post("/setup", json={"project": 1, "schema": CONFIG}, headers=right).status_code == 200


def test_the_webhook_secret_admits_webhooks_and_start_training_comes_without(tmp_path: Path) -> None:
    with world(tmp_path, webhook_secret=CANARY) as here:
        event = {
            "action": "ANNOTATION_CREATED",
            "project": {"id": 1, "label_config": CONFIG},
            "annotation": here.annotation(1),
        }
        for headers in ({}, {"X-Webhook-Secret": "x"}, {"X-Webhook-Secret": ""}):
            assert here.client.post("/webhook", json=event, headers=headers).status_code == 401
        assert here.client.post("/webhook", json=event, headers={"X-Webhook-Secret": CANARY}).status_code == 200
        assert here.setup().status_code == 200
        assert here.client.post("/webhook", json={"action": "START_TRAINING", "project": {"id": 1}}).status_code == 200
        assert (
            here.client.post(
                "/webhook", json={"action": "START_TRAINING"}, headers={"X-Webhook-Secret": "x"}
            ).status_code
            == 401
        )


def test_with_both_either_admits_a_webhook_and_nothing_else_does(tmp_path: Path) -> None:
    with world(tmp_path, webhook_secret=CANARY, basic_auth_user="me", basic_auth_pass="word") as here:
        event = {"action": "PROJECT_UPDATED", "project": {"id": 1}}
        assert here.client.post("/webhook", json=event).status_code == 401
        assert here.client.post("/webhook", json={"action": "START_TRAINING", "project": {"id": 1}}).status_code == 401
        assert here.client.post("/webhook", json=event, headers={"X-Webhook-Secret": CANARY}).status_code == 200
        assert here.client.post("/webhook", json=event, headers=basic("me", "word")).status_code == 200
        assert here.client.post("/setup", json={}, headers={"X-Webhook-Secret": CANARY}).status_code == 401


def test_another_sites_page_cannot_post_with_a_persons_login(here: World) -> None:
    here.label(1)
    path = f"/projects/1/versions/{here.status()['model_version']}/activate"
    for origin in ("http://evil.example", "http://[", "null", ""):
        refused = here.client.post(path, headers={"Origin": origin})
        assert refused.status_code == 403 and "WWW-Authenticate" not in refused.headers
        assert "PUBLIC_URL" in refused.get_json()["error"]["message"]
    assert here.client.post(path, headers={"Origin": "http://localhost"}).status_code == 200


def test_behind_a_proxy_the_public_address_is_the_pages_own(tmp_path: Path) -> None:
    with world(tmp_path, public_url="https://Keypoints.example.org", basic_auth_user="me", basic_auth_pass="word") as here:
        event = {"action": "PROJECT_UPDATED", "project": {"id": 1, "label_config": CONFIG}}
        for origin, status in (("https://keypoints.example.org", 200), ("https://evil.example.org", 403), ("null", 403)):
            headers = {**basic("me", "word"), "Host": "127.0.0.1:9090", "Origin": origin}
            assert here.client.post("/webhook", json=event, headers=headers).status_code == status, origin


@pytest.mark.parametrize(
    ("host", "settings", "status"),
    [("localhost:9090", {}, 200), ("127.0.0.1:9090", {}, 200), ("192.168.3.4:9090", {}, 200), ("[::1]:9090", {}, 200), ("backend:9090", {}, 200),
     ("my_backend:9090", {}, 200), ("host.docker.internal:9090", {}, 200), ("evil.example:9090", {}, 403), ("127.0.0.1.evil.example", {}, 403),
     ("evil.example", {"public_url": "https://keypoints.example.org"}, 403), ("evil.example", {"basic_auth_user": "me", "basic_auth_pass": "w"}, 200),
     ("keypoints.example.org", {"public_url": "https://keypoints.example.org"}, 200), ("box.example.org:9090", {"host": "box.example.org"}, 200)],
)  # fmt: skip
def test_without_a_login_no_name_that_a_stranger_may_have_is_answered(tmp_path: Path, host: str, settings: dict[str, str], status: int) -> None:
    """DNS rebinding: a page of evil.example has its own name lead to this machine, and then posts to its own name."""
    with world(tmp_path, **settings) as here:
        headers = {"Host": host, **(basic("me", "w") if "basic_auth_user" in settings else {})}
        body = {"action": "PROJECT_UPDATED", "project": {"id": 1}}
        answer = here.client.post("/webhook", json=body, headers=headers | {"Origin": f"http://{host}"})
        assert answer.status_code == status
        assert status == 200 or "PUBLIC_URL" in answer.get_json()["error"]["message"]
        assert here.client.post("/webhook", json=body, headers=headers).status_code == 200, "Label Studio is no browser"


def test_no_secret_and_no_traceback_reaches_a_client_or_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = {"label_studio_api_key": CANARY + "a", "core_token": CANARY + "b", "webhook_secret": CANARY + "c"}
    with world(tmp_path, **secrets) as here:
        said = [
            here.setup().get_data(as_text=True),
            json.dumps(here.predict(here.task(1), here.task(2))),
            here.client.get("/").get_data(as_text=True),
        ]
        here.keeper.tick()
        monkeypatch.setattr(app_module, "health_report", lambda _: 1 / 0)
        monkeypatch.setitem(here.app.config, "PROPAGATE_EXCEPTIONS", False)
        broken = here.client.get("/health")
        assert broken.status_code == 500
        said += [broken.get_data(as_text=True), caplog.text]
        assert "ZeroDivisionError" in caplog.text
        assert not any("Traceback" in text or "ZeroDivision" in text for text in said[:-1])
        assert not any(CANARY in text for text in said)


# ---------------------------------------------------------------- time


@pytest.fixture
def served(here: World) -> Iterator[tuple[World, str]]:
    server = make_server("127.0.0.1", 0, here.app, threaded=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield here, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_health_setup_and_webhooks_answer_at_once_while_predictions_wait(served: tuple[World, str]) -> None:
    here, url = served
    here.setup()
    here.predictor.seconds = 1.5
    places = here.settings.web_threads - app_module.KEPT_FREE
    with ThreadPoolExecutor(places + 1) as pool:
        body = {"tasks": [here.task(1)], "project": 1, "label_config": CONFIG}
        waiting = [pool.submit(requests.post, f"{url}/predict", json=body, timeout=60) for _ in range(places + 1)]
        time.sleep(0.5)
        started = time.monotonic()
        assert requests.get(f"{url}/health", timeout=5).status_code == 200
        assert requests.post(f"{url}/setup", json={"project": 1, "schema": CONFIG}, timeout=5).status_code == 200
        event = {
            "action": "ANNOTATION_CREATED",
            "project": {"id": 1, "label_config": CONFIG},
            "annotation": here.annotation(1),
            "task": here.task(1),
        }
        assert requests.post(f"{url}/webhook", json=event, timeout=5).status_code == 200
        assert time.monotonic() - started < 1.0
        results = [w.result().json()["results"][0] for w in waiting]
    busy = [r for r in results if not r["result"]]
    assert len(busy) == 1
    assert busy[0]["model_version"].endswith("+retry")


def test_a_burst_of_webhooks_is_stored_whole(served: tuple[World, str]) -> None:
    here, url = served
    here.setup()
    about = {"id": 1, "label_config": CONFIG}
    events = [{"action": "ANNOTATION_CREATED", "project": about, "annotation": here.annotation(n % 20, number=n), "task": here.task(n % 20)}
              for n in range(60)]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda e: requests.post(f"{url}/webhook", json=e, timeout=30), events * 2))
    assert {a.status_code for a in answers} == {200}
    assert sum(a.json()["new"] for a in answers) == 60
    assert here.status()["labelled"] == 20
    here.keeper.tick()
    assert here.status()["job"]["round"] == 1
