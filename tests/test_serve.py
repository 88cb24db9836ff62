from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from PIL import Image

from kptllm_core import routes
from kptllm_core.keypoints import SHOWN
from kptllm_core.messages import MAX_BOXES
from kptllm_core.routes import Core, create_app
from tests.core_process import TimedPredictor, core_on

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = {"names": ["nose", "tail"]}
OPENAPI = json.loads((ROOT / "kptllm_core" / "openapi.json").read_text())


def picture(level: int = 100, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def labelled(data: bytes, **changes: Any) -> dict[str, Any]:
    return {"image": sha(data), "keypoints": {"names": ["nose", "tail"], "xy": [[1, 2], [3, 4]], "visibility": [2, 2]}, **changes}


def upload(client: FlaskClient, *images: bytes) -> None:
    for data in images:
        assert client.put(f"/images/{sha(data)}", data=data).status_code == 201


def until(ready: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def assert_that(value: bool) -> None:
    assert value


def conforms(answer: Any, schema: str) -> None:
    Draft202012Validator({"$ref": f"#/components/schemas/{schema}", "components": OPENAPI["components"]}).validate(answer)


@pytest.fixture
def predictor() -> TimedPredictor:
    return TimedPredictor()


@pytest.fixture
def core(tmp_path: Path, predictor: TimedPredictor) -> Core:
    made = core_on(tmp_path, predictor)
    made.engine.load()
    return made


@pytest.fixture
def client(core: Core) -> FlaskClient:
    return create_app(core).test_client()


def test_the_description_has_every_route_and_no_other(client: FlaskClient) -> None:
    served = {(re.sub(r"<(\w+)>", r"{\1}", rule.rule), method.lower(), rule.endpoint)
              for rule in client.application.url_map.iter_rules() for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}  # fmt: skip
    described = {(path, method, entry["operationId"]) for path, entries in OPENAPI["paths"].items() for method, entry in entries.items()}
    assert served == described
    assert client.get("/openapi.json").get_json() == OPENAPI
    for schema in OPENAPI["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_health_while_loading_and_after(tmp_path: Path, predictor: TimedPredictor) -> None:
    core = core_on(tmp_path, predictor)
    client = create_app(core).test_client()
    answer = client.get("/health").get_json()
    assert answer == {"status": "LOADING", "base": None, "device": "cpu", "training": None, "queue": 0, "waiting": 0}
    refused = client.post("/predict", json={"schema": SCHEMA, "queries": []})
    assert refused.status_code == 503 and refused.get_json()["error"]["code"] == "loading" and refused.headers["Retry-After"]
    core.engine.load()
    answer = client.get("/health").get_json()
    conforms(answer, "Health")
    assert answer["status"] == "UP" and answer["base"] == "timed-00000000"


def test_images_are_stored_by_their_hash(client: FlaskClient, core: Core) -> None:
    one, two = picture(1), picture(2)
    upload(client, one, one)
    assert client.post("/images/missing", json={"images": [sha(two), sha(one)]}).get_json() == {"missing": [sha(two)]}
    wrong = client.put(f"/images/{sha(two)}", data=one)
    assert wrong.status_code == 400 and wrong.get_json()["error"]["code"] == "invalid_input"
    assert client.put("/images/..%2f..%2fetc", data=one).status_code in (400, 404)
    core.images.max_image_bytes = 10
    large = client.put(f"/images/{sha(two)}", data=two)
    assert large.status_code == 413 and "at most 10" in large.get_json()["error"]["message"]
    assert len(core.images) == 1


def test_one_result_per_query_and_errors_stay_with_theirs(client: FlaskClient) -> None:
    good, broken, other = picture(10), b"no image at all", picture(20)
    upload(client, good, broken, other)
    queries = [{"image": sha(good)}, {"image": sha(broken)}, {"image": sha(other), "box": [1, 1, 4, 4], "fixed": None},
               {"image": sha(good), "box": [1, 1, -4, 4]}]  # fmt: skip
    answer = client.post("/predict", json={"schema": SCHEMA, "prompt": "text", "queries": queries}).get_json()
    conforms(answer, "PredictResponse")
    first, second, third, fourth = answer["results"]
    assert first["keypoints"]["xy"] == [[10, 10], [11, 11]] and first["size"] == [8, 6]
    assert second["error"]["code"] == "image" and "Not an image" in second["error"]["message"]
    assert third["keypoints"]["xy"] == [[20, 20], [21, 21]]
    assert fourth["error"]["code"] == "invalid_input" and "queries[3].box" in fourth["error"]["message"]
    assert client.post("/predict", json={"schema": SCHEMA, "queries": []}).get_json()["results"] == []


def test_support_images_are_read_when_they_are_shown_first_and_a_bad_one_spoils_the_request(
    client: FlaskClient, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, broken = picture(10), picture(20), b"no image at all"
    upload(client, one, two, broken)
    read: list[str] = []
    monkeypatch.setattr(core.images, "read", lambda name, real=core.images.read: read.append(name) or real(name))
    body = {"schema": SCHEMA, "queries": [{"image": sha(one)}], "support": [labelled(two)]}
    for _ in range(3):
        assert client.post("/predict", json=body).status_code == 200
    assert read.count(sha(two)) == 1
    refused = client.post("/predict", json={**body, "support": [labelled(two), labelled(broken)]})
    error = refused.get_json()["error"]
    assert refused.status_code == 400 and sha(broken) in error["message"] and error["code"] == "image"


def ask_objects(client: FlaskClient, data: bytes, objects: Any, **more: Any) -> dict[str, Any]:
    queries = [{"image": sha(data), "objects": objects, **more}]
    answer = client.post("/predict", json={"schema": SCHEMA, "prompt": "text", "queries": queries})
    conforms(answer.get_json(), "PredictResponse")
    return dict(answer.get_json()["results"][0])


def test_all_objects_of_an_image_given_ones_first(client: FlaskClient, predictor: TimedPredictor) -> None:
    data = picture(10)
    upload(client, data)
    found = ask_objects(client, data, {"boxes": [[1, 1, 4, 4], [-2, -2, 3, 3]]})
    assert [(o["score"], o["keypoints"]["box"]) for o in found["objects"]] == [
        (1.0, [1, 1, 4, 4]), (1.0, [-2, -2, 3, 3]), (0.8, [0, 0, 4, 6]), (0.4, [4, 0, 4, 6])]  # fmt: skip
    assert found["size"] == [8, 6]
    assert len(ask_objects(client, data, {})["objects"]) == 2
    assert len(ask_objects(client, data, {"boxes": [[1, 1, 4, 4]], "find": False})["objects"]) == 1
    assert [o["score"] for o in ask_objects(client, data, {"boxes": [[1, 1, 4, 4]], "least": 0.5})["objects"]] == [1.0, 0.8]
    assert ask_objects(client, data, None)["keypoints"]["xy"] == [[10, 10], [11, 11]]  # one object, as without the key


def test_an_image_with_no_object_is_answered_with_none(client: FlaskClient) -> None:
    black = picture(0)
    upload(client, black)
    assert ask_objects(client, black, {}) == {"objects": [], "size": [8, 6]}
    assert ask_objects(client, black, {"find": False}) == {"objects": [], "size": [8, 6]}


def test_five_hundred_objects_are_answered_and_no_more(client: FlaskClient) -> None:
    data = picture(0)
    upload(client, data)
    boxes = [[i % 7, i % 5, 1, 1] for i in range(MAX_BOXES)]
    assert len(ask_objects(client, data, {"boxes": boxes})["objects"]) == MAX_BOXES == 500
    refused = ask_objects(client, data, {"boxes": [*boxes, [1, 1, 1, 1]]})["error"]
    assert refused["code"] == "too_large" and "501 boxes; at most 500" in refused["message"]


BAD_OBJECTS: dict[str, tuple[Any, str]] = {
    "no area": ({"boxes": [[1, 1, 2, 2], [1, 1, 0, 3]]}, "objects.boxes[1] is [x, y, width, height] in pixels with a positive size"),
    "negative": ({"boxes": [[1, 1, -3, 3]]}, "positive size"),
    "outside": ({"boxes": [[1, 1, 2, 2], [8, 0, 5, 5]]}, "objects.boxes[1] is [8.0, 0.0, 5.0, 5.0], which lies outside the image of 8 × 6 pixels"),
    "far outside": ({"boxes": [[-9, -9, 5, 5]]}, "outside the image"),
    "not finite": ({"boxes": [[1, 1, 1e39, 2]]}, "finite"),
    "rotated": ({"boxes": [[1, 1, 2, 2, 45]]}, "list of 4 numbers"),
    "null": ({"boxes": [None]}, "objects.boxes[0] is null"),
    "no list": ({"boxes": 5}, "boxes is a list"),
    "find is a word": ({"find": "yes"}, "find is true"),
    "least is too much": ({"least": 1.5}, "least is a score from 0 to 1"),
    "unknown key": ({"box": [1, 1, 2, 2]}, "unknown: ['box']"),
    "no object": ([], "is a JSON object"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_objects_that_cannot_be_asked_for_are_told_in_words(client: FlaskClient, name: str) -> None:
    data = picture(10)
    upload(client, data)
    objects, said = BAD_OBJECTS[name]
    error = ask_objects(client, data, objects)["error"]
    assert error["code"] == "invalid_input" and said in error["message"]


def test_the_box_of_one_object_lies_in_its_image_too(client: FlaskClient) -> None:
    data = picture(10)
    upload(client, data)
    queries = [{"image": sha(data), "box": [9999, 9999, 5, 5]}, {"image": sha(data), "box": [1, 1, 4, 4]}]
    first, second = client.post("/predict", json={"schema": SCHEMA, "prompt": "text", "queries": queries}).get_json()["results"]
    assert first["error"]["code"] == "invalid_input" and "box is [9999.0, 9999.0, 5.0, 5.0], which lies outside" in first["error"]["message"]
    assert "keypoints" in second


def test_what_is_shown_by_default_is_told_as_it_is() -> None:
    least = json.dumps(OPENAPI).split('"find": {')[1].split('"least": ')[1]
    assert f'"default": {SHOWN}' in least[:200]
    assert f"need {SHOWN} without it" in (ROOT / "label_config" / "templates" / "several_objects.xml").read_text()


def test_all_objects_or_one_but_not_both(client: FlaskClient) -> None:
    data = picture(10)
    upload(client, data)
    assert "belong to one" in ask_objects(client, data, {}, box=[1, 1, 2, 2])["error"]["message"]


def test_an_image_on_which_finding_fails_spoils_no_other(client: FlaskClient, predictor: TimedPredictor) -> None:
    def dislikes(images: list[np.ndarray]) -> None:
        if any(image.mean() == 66 for image in images):
            raise RuntimeError("no")

    predictor.trouble = dislikes
    bad, good = picture(66), picture(20)
    upload(client, bad, good)
    queries: list[dict[str, Any]] = [{"image": sha(bad), "objects": {}}, {"image": sha(good), "objects": {}}, {"image": sha(good)}]
    results = client.post("/predict", json={"schema": SCHEMA, "prompt": "text", "queries": queries}).get_json()["results"]
    assert results[0]["error"]["code"] == "internal" and len(results[1]["objects"]) == 2 and "keypoints" in results[2]


def test_missing_images_are_named_once_and_then_it_works(client: FlaskClient, tmp_path: Path) -> None:
    here, missing = picture(1), picture(2)
    upload(client, here)
    body = {"schema": SCHEMA, "queries": [{"image": sha(m)} for m in (missing, here, missing)]}
    answer = client.post("/predict", json=body)
    assert answer.status_code == 409
    assert answer.get_json()["error"]["code"] == "missing_images" and answer.get_json()["error"]["missing"] == [sha(missing)]
    conforms(answer.get_json(), "Error")
    upload(client, missing)
    assert client.post("/predict", json=body).status_code == 200
    third = picture(3)
    upload(client, third)
    (tmp_path / "images" / sha(third)[:2] / sha(third)).write_bytes(b"rotten")
    damaged = client.post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(third)}]})
    assert damaged.status_code == 409 and damaged.get_json()["error"]["missing"] == [sha(third)]


def test_a_batch_that_fails_is_tried_one_by_one(client: FlaskClient, predictor: TimedPredictor) -> None:
    def trouble(images: list[np.ndarray]) -> None:
        if any(image.mean() == 13 for image in images):
            raise ZeroDivisionError("secret detail")
        if any(image.mean() == 14 for image in images) or len(images) > 2:
            raise MemoryError

    predictor.trouble = trouble
    data = [picture(level) for level in (11, 12, 13, 14)]
    upload(client, *data)
    answer = client.post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(d)} for d in data]}).get_json()
    assert [r.get("error", {}).get("code") for r in answer["results"]] == [None, None, "internal", "out_of_memory"]
    assert "secret" not in json.dumps(answer) and predictor.batches == [4, 1, 1, 1, 1]


def test_a_given_set_without_points_is_an_answer_and_no_trouble(client: FlaskClient) -> None:
    data = picture(1)
    upload(client, data)
    fixed = {"names": [], "xy": [], "visibility": []}
    answer = client.post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data), "fixed": fixed}, {"image": sha(data)}]})
    assert answer.status_code == 200 and "keypoints" in answer.get_json()["results"][1]


def test_large_requests_are_cut_into_batches(client: FlaskClient, predictor: TimedPredictor) -> None:
    data = picture(1)
    upload(client, data)
    answer = client.post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data)}] * 19}).get_json()
    assert len(answer["results"]) == 19 and predictor.batches == [4, 4, 4, 4, 3]


def test_adapters_switch_only_when_needed_and_a_bad_one_is_refused(client: FlaskClient, core: Core, predictor: TimedPredictor) -> None:
    data = picture(1)
    upload(client, data)
    for name in ("a+p1+r1", "b"):
        (core.adapters.folder / name).mkdir()
        (core.adapters.folder / name / "adapter.json").write_text('{"base": "timed-00000000"}')
    (core.adapters.folder / "damaged").mkdir()

    def ask(adapter: str | None) -> tuple[int, Any]:
        answer = client.post("/predict", json={"schema": SCHEMA, "adapter": adapter, "queries": [{"image": sha(data)}]})
        return answer.status_code, answer.get_json()

    assert [ask(a)[0] for a in (None, None, "a+p1+r1", "a+p1+r1", "b", None)] == [200] * 6
    assert predictor.switched == ["a+p1+r1", "b", None]
    for name, says in (("damaged", "is damaged"), ("unknown", "Known: a+p1+r1, b")):
        status, body = ask(name)
        assert status == 409 and body["error"]["code"] == "artifact" and says in body["error"]["message"]
    assert ask(None)[0] == 200 and predictor.switched[-1] is None
    listed = client.get("/adapters").get_json()["adapters"]
    assert {a["name"] for a in listed} == {"a+p1+r1", "b", "damaged"} and {a["base"] for a in listed} == {"timed-00000000", None}
    assert client.delete("/adapters/a%2Bp1%2Br1").get_json() == {"deleted": "a+p1+r1"}
    assert client.delete("/adapters/a%2Bp1%2Br1").status_code == 404
    assert client.delete("/adapters/..").status_code in (400, 404)


def test_naming(client: FlaskClient) -> None:
    data = picture(1)
    upload(client, data)
    answer = client.post("/name", json={"image": sha(data), "xy": [[1, 1], [2, 2]]})
    assert answer.get_json() == {"names": [{"name": "nose", "score": 0.5}] * 2}
    assert client.post("/name", json={"image": sha(picture(9)), "xy": [[1, 1]]}).get_json()["error"]["code"] == "missing_images"


def test_rounds_are_queued_once_and_can_be_cancelled(client: FlaskClient) -> None:
    train, heldout = picture(1), picture(2)
    body = {"name": "timed+p1+r1", "schema": SCHEMA, "train": [labelled(train, group="g")], "heldout": [labelled(heldout)], "seconds": 5}
    assert client.post("/rounds", json=body).get_json()["error"]["code"] == "missing_images"
    upload(client, train, heldout)
    answer = client.post("/rounds", json=body)
    job = answer.get_json()
    conforms(job, "Job")
    assert answer.status_code == 202 and job["state"] == "queued" and client.get("/health").get_json()["queue"] == 1
    assert client.post("/rounds", json={**body, "seed": 0}).get_json()["job"] == job["job"]
    conflict = client.post("/rounds", json={**body, "seed": 1})
    assert conflict.status_code == 409 and conflict.get_json()["error"]["code"] == "conflict"
    orphan = client.post("/rounds", json={**body, "name": "x", "parent": "unknown"})
    assert orphan.status_code == 409 and orphan.get_json()["error"]["code"] == "artifact"
    cancelled = client.delete(f"/rounds/{job['job']}").get_json()
    assert cancelled["state"] == "cancelled" == client.get(f"/rounds/{job['job']}").get_json()["state"]
    assert client.get("/rounds/nonsense").status_code == 404


def test_wrong_requests_get_json_errors_and_no_traceback(client: FlaskClient, core: Core, caplog: pytest.LogCaptureFixture) -> None:
    def error(answer: Any, status: int) -> str:
        assert answer.status_code == status, answer.get_data()
        conforms(answer.get_json(), "Error")
        return str(answer.get_json()["error"]["code"])

    assert error(client.get("/nowhere"), 404) == "not_found"
    assert error(client.get("//health"), 404) == "not_found"
    assert error(client.post("/health"), 405) == "method_not_allowed"
    assert error(client.post("/predict", data="{}"), 400) == "invalid_input"
    assert error(client.post("/predict", data=b"[" * 200_000, content_type="application/json"), 400) == "invalid_input"
    assert error(client.post("/predict", data=b'{"schema": NaN}', content_type="application/json"), 400) == "invalid_input"
    assert error(client.post("/predict", json=[]), 400) == "invalid_input"
    assert error(client.post("/predict", json={"schema": {"names": []}, "queries": []}), 400) == "schema"
    assert error(client.post("/predict", json={"schema": SCHEMA, "queries": [{}] * 1001}), 413) == "too_large"
    assert error(client.post("/images/missing", json={"images": 3}), 400) == "invalid_input"
    big = b" " * (routes.MAX_JSON_BYTES + 1)
    assert error(client.post("/predict", data=big, content_type="application/json"), 413) == "too_large"
    with caplog.at_level(logging.ERROR):
        core.images.missing = None  # type: ignore[assignment, method-assign]
        answer = client.post("/images/missing", json={"images": []})
    assert error(answer, 500) == "internal" and b"Traceback" not in answer.data and b"NoneType" not in answer.data
    assert "NoneType" in caplog.text


def test_a_token_opens_all_and_only_health_goes_without(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    core.token = "canary"
    client = create_app(core).test_client()
    with caplog.at_level(logging.DEBUG):
        assert client.get("/health").status_code == 200
        for path in ("/metrics", "/openapi.json", "/adapters", "/nowhere"):
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "canary"}, {"Authorization": "Bearer ünrecht"}):
                answer = client.get(path, headers=header)
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                assert "canary" not in answer.get_data(as_text=True)
        assert client.get("/adapters", headers={"Authorization": "Bearer canary"}).status_code == 200
    assert "canary" not in caplog.text and "canary" not in repr(core)


def test_metrics_count(client: FlaskClient) -> None:
    data = picture(1)
    upload(client, data)
    client.post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data)}, {"image": "x"}]})
    client.get("/nowhere")
    text = client.get("/metrics").get_data(as_text=True)
    for line in ('kptllm_core_requests_total{method="POST",route="/predict",status="200"} 1.0', "kptllm_core_images_predicted_total 1.0",
                 'kptllm_core_query_errors_total{code="invalid_input"} 1.0', "kptllm_core_queue_length 0.0", "kptllm_core_training_running 0.0",
                 "kptllm_core_rounds_queued 0.0", 'route="other"', 'kptllm_core_request_seconds_count{route="/predict"} 1.0'):  # fmt: skip
        assert line in text, line


def test_one_at_a_time_on_the_device_a_bounded_queue_and_health_beside_it(tmp_path: Path) -> None:
    free = threading.Event()
    core = core_on(tmp_path, TimedPredictor(trouble=lambda images: assert_that(free.wait(30))), max_waiting=3)
    core.engine.load()
    app = create_app(core)
    data = picture(1)
    upload(app.test_client(), data)

    def ask(_: int) -> tuple[int, Any]:
        answer = app.test_client().post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data)}]})
        return answer.status_code, answer.get_json()

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, n) for n in range(8)]
        until(lambda: sum(f.done() for f in futures) == 5)
        assert app.test_client().get("/health").get_json()["waiting"] == 3, "health answers while the device is busy"
        free.set()
        answers = [f.result() for f in futures]
    assert sorted(status for status, _ in answers) == [200] * 3 + [503] * 5
    assert {body["error"]["code"] for status, body in answers if status == 503} == {"busy"}
    assert core.engine.waiting == 0 and ask(0)[0] == 200


def test_who_hung_up_is_not_worked_for(core: Core, predictor: TimedPredictor) -> None:
    client = create_app(core).test_client()
    data = picture(1)
    upload(client, data)
    calls = iter([False, True])
    answer = client.post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data)}] * 16},
                         environ_overrides={"waitress.client_disconnected": lambda: next(calls)})  # fmt: skip
    assert answer.status_code == 499 and predictor.batches == [4]


def test_a_small_request_does_not_wait_for_a_large_one(tmp_path: Path) -> None:
    core = core_on(tmp_path, TimedPredictor(0.05))
    core.engine.load()
    app = create_app(core)
    data = picture(1)
    upload(app.test_client(), data)

    def ask(queries: int) -> float:
        assert app.test_client().post("/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data)}] * queries}).status_code == 200
        return time.perf_counter()

    with ThreadPoolExecutor(4) as pool:
        large = [pool.submit(ask, 80) for _ in range(3)]
        time.sleep(0.1)
        small = pool.submit(ask, 1).result()
        assert small < min(f.result() for f in large)


class Process:
    """The server as a process of its own, with the predictor that takes its time."""

    def __init__(self, port: int, folder: Path, seconds: float) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "output.txt"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "core_process.py"), str(port), str(folder / "data"), str(seconds)],
                                            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=file, stderr=file)  # fmt: skip
        self.session = requests.Session()
        end = time.monotonic() + 20
        while not self.up():
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def up(self) -> bool:
        try:
            return bool(self.session.get(f"{self.url}/health", timeout=5).json()["status"] == "UP")
        except requests.ConnectionError:
            return False


@pytest.fixture
def slow(tmp_path: Path, port: int) -> Iterator[Process]:
    server = Process(port, tmp_path, 1.5)
    yield server
    server.process.kill()
    server.process.wait()


def test_over_real_sockets_health_is_instant_and_sigterm_lets_requests_finish(slow: Process) -> None:
    data = picture(1)
    put = slow.session.put(f"{slow.url}/images/{sha(data)}", data=iter([data[:20], data[20:]]), timeout=5)  # chunked
    assert put.status_code == 201
    too_big = slow.session.put(f"{slow.url}/images/{sha(data)}", data=b"0" * (51 * 2**20), timeout=20)
    assert too_big.status_code == 413
    answers: list[requests.Response] = []
    body = {"schema": SCHEMA, "queries": [{"image": sha(data)}]}
    threads = [threading.Thread(target=lambda: answers.append(requests.post(f"{slow.url}/predict", json=body, timeout=20))) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: slow.session.get(f"{slow.url}/health", timeout=5).json()["waiting"] == 2)
    begin = time.perf_counter()
    slow.session.get(f"{slow.url}/health", timeout=5)
    assert time.perf_counter() - begin < 0.5
    slow.process.send_signal(signal.SIGTERM)
    until(lambda: not slow.up(), 1.5)
    assert slow.process.poll() is None, "still answering those in flight"
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200, 200] and slow.process.wait(5) == 0
    assert "Traceback" not in slow.output.read_text()


def test_a_client_that_hangs_up_frees_the_device(slow: Process) -> None:
    data = picture(1)
    assert slow.session.put(f"{slow.url}/images/{sha(data)}", data=data, timeout=5).status_code == 201
    with pytest.raises(requests.Timeout):
        requests.post(f"{slow.url}/predict", json={"schema": SCHEMA, "queries": [{"image": sha(data)}] * 80}, timeout=0.5)
    end = time.monotonic() + 5  # the answer would take 30 s
    while slow.session.get(f"{slow.url}/health", timeout=5).json()["waiting"]:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--model", "gigantic"], "Known presets: .*nano"),
    (["--port", "99999"], "--port 0…65535"),
    ([], "CORE_TOKEN holds spaces"),
])  # fmt: skip
def test_the_command_line_says_what_is_wrong(arguments: list[str], says: str, tmp_path: Path) -> None:
    token = "" if arguments else "two words"
    found = subprocess.run([sys.executable, "-m", "kptllm_core", "serve", "--data", str(tmp_path), *arguments],
                           cwd=ROOT, env={**os.environ, "CORE_TOKEN": token}, capture_output=True, text=True, timeout=30)  # fmt: skip
    assert found.returncode == 2 and re.search(says, found.stderr) and "Traceback" not in found.stderr


def test_a_folder_or_a_port_in_use_is_said(slow: Process, tmp_path: Path) -> None:
    port = slow.url.rpartition(":")[2]
    found = subprocess.run([sys.executable, "-m", "kptllm_core", "serve", "--model", "tiny", "--port", port, "--data", str(tmp_path / "other")],
                           cwd=ROOT, capture_output=True, text=True, timeout=30)  # fmt: skip
    assert found.returncode == 2 and "Cannot listen on" in found.stderr and "choose another --port" in found.stderr


def test_importing_the_server_loads_no_torch() -> None:
    code = "import sys, kptllm_core.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0
