"""Requests to the core: images once, errors in words, no call longer than told. Real HTTP on loopback."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.core_client import AllObjects, CoreClient, Query, image_hash
from backend_world import World, picture, world
from kptllm_core.errors import ArtifactError, ImageError, InvalidInput, KptError, NotFound, Unauthorized, Unavailable
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from small_server import Answer, Request, SmallServer, reply

SCHEMA = KeypointSchema(("nose", "tail"))
IMAGES = {image_hash(p): p for p in (picture(n) for n in range(4))}
SHAS = list(IMAGES)
EXAMPLE = KeypointSet(("nose", "tail"), [[1, 2], [3, 4]], [2, 2])  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


@pytest.fixture
def client(here: World) -> CoreClient:
    return CoreClient(here.settings.core_address)


def test_predictions_come_back_in_order_with_their_size(client: CoreClient) -> None:
    answer = client.predict(SCHEMA, [(SHAS[0], EXAMPLE)], [Query(s) for s in SHAS[1:]], IMAGES.__getitem__)
    assert answer.base == "timed-00000000"
    assert [r[1] for r in answer.results if not isinstance(r, KptError)] == [(64, 48)] * 3
    first, second = (r[0].xy[0, 0] for r in answer.results[:2] if not isinstance(r, KptError))
    assert first < second


def test_one_object_and_all_objects_in_one_request(client: CoreClient) -> None:
    asked = [Query(SHAS[0]), AllObjects(SHAS[1], [[1, 2, 30, 40]]), AllObjects(SHAS[2], find=False)]
    one, several, none = client.predict(SCHEMA, [], asked, IMAGES.__getitem__).results
    assert not isinstance(one, KptError) and isinstance(one[0], KeypointSet)
    assert not isinstance(several, KptError) and isinstance(several[0], list)
    assert [o.score for o in several[0]] == [1.0, 0.8, 0.4]
    assert several[0][0].keypoints.box is not None and several[0][0].keypoints.box.tolist() == [1, 2, 30, 40]
    assert none == ([], (64, 48))


def test_an_image_is_sent_once(here: World, client: CoreClient) -> None:
    for _ in range(2):
        client.predict(SCHEMA, [(SHAS[0], EXAMPLE)], [Query(SHAS[1])], IMAGES.__getitem__)
    assert sum(method == "PUT" for method, _ in here.core_requests) == 2
    other = CoreClient(here.settings.core_address)  # another worker asks what is missing, and sends nothing
    other.predict(SCHEMA, [(SHAS[0], EXAMPLE)], [Query(SHAS[1])], IMAGES.__getitem__)
    assert sum(method == "PUT" for method, _ in here.core_requests) == 2


def test_what_the_core_forgot_is_sent_again(here: World, client: CoreClient) -> None:
    client.predict(SCHEMA, [], [Query(SHAS[0])], IMAGES.__getitem__)
    for path in (here.folder / "core/images").rglob(SHAS[0]):
        path.unlink()
    here.core.images._drop(SHAS[0])
    here.core.engine._pixels._kept.clear()
    answer = client.predict(SCHEMA, [], [Query(SHAS[0])], IMAGES.__getitem__)
    assert not isinstance(answer.results[0], KptError)


def test_a_bad_image_fails_alone(client: CoreClient) -> None:
    images = {**IMAGES, image_hash(b"no image"): b"no image"}
    answer = client.predict(SCHEMA, [], [Query(SHAS[0]), Query(image_hash(b"no image"))], images.__getitem__)
    good, bad = answer.results
    assert not isinstance(good, KptError)
    assert isinstance(bad, ImageError)
    assert "Not an image" in bad.message


def test_the_cores_own_words_and_kinds_come_through(client: CoreClient) -> None:
    with pytest.raises(ArtifactError, match="'nope' is not here"):
        client.predict(SCHEMA, [], [Query(SHAS[0])], IMAGES.__getitem__, adapter="nope")
    with pytest.raises(InvalidInput, match="prompt 'visual' needs support"):
        client.predict(SCHEMA, [], [Query(SHAS[0])], IMAGES.__getitem__, prompt="visual")
    with pytest.raises(NotFound):
        client.round("nope")


def test_names_of_points(client: CoreClient) -> None:
    assert client.name(SHAS[0], [[1, 2], [3, 4]], IMAGES.__getitem__) == [("nose", 0.5), ("nose", 0.5)]


def test_health_and_adapters(client: CoreClient) -> None:
    assert client.health()["base"] == "timed-00000000"
    assert client.adapters() == []


def test_a_core_that_is_down_is_named_with_its_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(Unavailable, match=f"{url} cannot be reached.*check CORE_URL"):
        CoreClient(url).health()


def test_a_core_that_hangs_costs_no_more_than_the_time_given() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        client = CoreClient(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(Unavailable, match="hangs or is busy"):
            client.predict(SCHEMA, [], [Query(SHAS[0])], IMAGES.__getitem__, seconds=0.3)
        assert time.monotonic() - started < 1.0


def test_a_full_queue_is_waited_for() -> None:
    calls: list[Request] = []

    def predict(request: Request) -> Answer:
        calls.append(request)
        if len(calls) == 1:
            return reply({"error": {"code": "busy", "message": "full"}}, 503)
        return reply({"base": "b", "adapter": None, "results": []})

    with SmallServer() as server:
        server.routes["/predict"] = predict
        assert CoreClient(server.url).predict(SCHEMA, [], [], IMAGES.__getitem__).base == "b"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Answer(200, b"<html>"), Unavailable, "something else than agreed"),
        (reply([1]), Unavailable, "something else than agreed"),
        (reply({"base": "b", "results": [1, 2]}), Unavailable, "something else than agreed"),
        (Answer(500, b"Traceback (most recent call last)"), Unavailable, "HTTP 500"),
        (Answer(302, b"", {"Location": "http://127.0.0.2/"}), Unavailable, "HTTP 302"),
        (reply({"error": {"code": "unauthorized", "message": "x"}}, 401), Unauthorized, "CORE_TOKEN"),
        (reply({"error": "text"}, 400), InvalidInput, "HTTP 400"),
    ],
)
def test_odd_answers_are_told_and_never_followed(answer: Answer, kind: type[KptError], words: str) -> None:
    with SmallServer() as server:
        server.routes["/predict"] = answer
        server.routes["/images/missing"] = reply({"missing": []})
        with pytest.raises(kind, match=words) as caught:
            CoreClient(server.url, "canary").predict(SCHEMA, [], [Query(SHAS[0])], IMAGES.__getitem__)
        assert "canary" not in caught.value.message
        assert server.requests[-1].headers["Authorization"] == "Bearer canary"
