from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptllm_core.errors import InvalidInput, KptError, SchemaError, TooLarge
from kptllm_core.messages import MAX_QUERIES, NameRequest, PredictRequest, Query, RoundRequest, parse_json

A, B, C = "a" * 64, "b" * 64, "c" * 64
SCHEMA = {"names": ["nose", "tail"], "skeleton": [[0, 1]]}
POINTS = {"names": ["tail", "nose"], "xy": [[1, 2], [3, 4]], "visibility": [2, 1]}


def predict_body(**changes: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "support": [{"image": A, "keypoints": POINTS}], "queries": [{"image": B}], **changes}


def round_body(**changes: Any) -> dict[str, Any]:
    return {"name": "nano+p1+r1", "schema": SCHEMA, "train": [{"image": A, "keypoints": POINTS, "group": "g"}],
            "heldout": [{"image": B, "keypoints": POINTS}], "seconds": 180, **changes}  # fmt: skip


def test_points_follow_the_order_of_the_schema_by_name() -> None:
    asked = PredictRequest.from_json(predict_body(queries=[{"image": B, "box": [1, 2, 3, 4], "fixed": {**POINTS, "names": ["tail", "nose"]}}]))
    keypoints = asked.support[0].keypoints
    assert keypoints.names == ("nose", "tail") and keypoints.xy.tolist() == [[3, 4], [1, 2]] and keypoints.visibility.tolist() == [1, 2]
    assert asked.images() == [A, B] and asked.prompt == "auto" and asked.adapter is None
    (query,) = asked.queries
    assert isinstance(query, Query) and query.box is not None and query.box.tolist() == [1, 2, 3, 4]
    assert query.fixed is not None and query.fixed.names == ("nose", "tail")


def test_an_unusable_query_is_kept_as_its_error() -> None:
    wrong = [{"image": "nonsense"}, {"image": B, "box": [0, 0, 0, 5]}, {"image": B, "box": [0, 0, 1e40, 5]}, {"image": B, "box": "x"}, 7,
             {"image": B, "fixed": [1]}, {"image": B, "fixed": {**POINTS, "names": ["a", "b"]}},
             {"image": B, "boks": None}, {"image": B, "box": [0, 0, True, 5]}]  # fmt: skip
    asked = PredictRequest.from_json(predict_body(queries=[*wrong, {"image": B}]))
    assert [isinstance(q, InvalidInput) for q in asked.queries] == [True] * len(wrong) + [False]


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"schema": {"names": []}}, SchemaError, "no keypoints"),
    ({"schema": {"names": ["x" * 501]}}, SchemaError, "1…500 characters"),
    ({"schema": {"names": [str(i) for i in range(257)]}}, SchemaError, "at most 256"),
    ({"schema": {"names": ["a", "b"], "skeleton": [[0, 1e999]]}}, SchemaError, "no index"),
    ({"support": [{"image": A, "keypoints": {**POINTS, "names": ["ear", "nose"]}}]}, SchemaError, "'ear' is not in the schema"),
    ({"support": [{"image": A, "keypoints": {**POINTS, "names": None}}]}, InvalidInput, "list of names"),
    ({"support": [{"image": A, "keypoints": {**POINTS, "xy": [[1, 2]]}}]}, InvalidInput, r"support\[0\]: xy must be numbers of shape"),
    ({"support": [{"image": A, "keypoints": {**POINTS, "xy": [[1, 1e300], [0, 0]]}}]}, InvalidInput, "not finite"),
    ({"support": [{"image": A, "keypoints": {**POINTS, "visibility": [2, 2**63]}}]}, InvalidInput, "visibility"),
    ({"support": [{"image": A, "keypoints": POINTS}] * 51}, TooLarge, "at most 50"),
    ({"queries": [{"image": A}] * (MAX_QUERIES + 1)}, TooLarge, "at most 1000"),
    ({"prompt": "telepathic"}, InvalidInput, "auto, visual, text, both"),
    ({"prompt": "visual", "support": []}, InvalidInput, "needs support examples"),
    ({"adapter": "../../x"}, InvalidInput, "adapter's name"),
    ({"adaptor": None}, InvalidInput, r"unknown: \['adaptor'\]"),
])  # fmt: skip
def test_a_wrong_predict_request_says_what_was_expected(change: dict[str, Any], error: type[KptError], says: str) -> None:
    with pytest.raises(error, match=says):
        PredictRequest.from_json(predict_body(**change))


@pytest.mark.parametrize(("change", "says"), [
    ({"train": []}, "Expected at least one"),
    ({"heldout": [{"image": B, "keypoints": {**POINTS, "visibility": [0, 3]}}]}, "none with a placed point"),
    ({"heldout": [{"image": A, "keypoints": POINTS}]}, "in train and in heldout"),
    ({"support": [{"image": B, "keypoints": POINTS}]}, "in support and in heldout"),
    ({"seconds": None}, "Give seconds, steps or both"),
    ({"seconds": 0}, "more than 0"),
    ({"seconds": "180"}, "finite number"),
    ({"steps": 1.5}, "whole number"),
    ({"seed": -1}, "seed"),
    ({"name": "a/b"}, "adapter's name"),
    ({"parent": "nano+p1+r1"}, "cannot also be the name"),
])  # fmt: skip
def test_a_wrong_round_says_what_was_expected(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        RoundRequest.from_json(round_body(**change))


def test_the_content_hash_is_of_the_meaning() -> None:
    plain = RoundRequest.from_json(round_body())
    swapped = {"names": ["nose", "tail"], "xy": [[3, 4], [1, 2]], "visibility": [1, 2]}
    same = RoundRequest.from_json(round_body(parent=None, seed=0, support=[], train=[{"image": A, "keypoints": swapped, "group": "g"}]))
    assert plain.content_hash() == same.content_hash() != RoundRequest.from_json(round_body(seed=1)).content_hash()
    assert RoundRequest.from_json(plain.to_json()).content_hash() == plain.content_hash()
    assert plain.images() == [A, B]


def test_name_requests() -> None:
    asked = NameRequest.from_json({"image": A, "xy": [[1, 2.5]], "candidates": ["nose"]})
    assert asked.xy.tolist() == [[1, 2.5]] and asked.box is None and asked.candidates == ["nose"]
    for change in ({"xy": []}, {"xy": [[1]]}, {"xy": [[1, None]]}, {"candidates": []}, {"candidates": [""]}, {"image": 5}):
        with pytest.raises(InvalidInput):
            NameRequest.from_json({"image": A, "xy": [[1, 2]], **change})


@pytest.mark.parametrize("data", [b"", b"{", b"NaN", b'{"a": -Infinity}', b"[" * 200_000, b'"\\ud800"', b'{"\\uDC00": 1}', b"\xff", b"1" * 5000])
def test_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_json(data)


def test_good_json_is_read() -> None:
    assert parse_json('{"ü": ["\\ud83d\\ude00", 1e3]}'.encode()) == {"ü": ["😀", 1000]}


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([A, POINTS, SCHEMA])
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)
PATHS = [("schema",), ("schema", "names"), ("schema", "skeleton"), ("schema", "category"), ("train",), ("train", 0), ("train", 0, "image"),
         ("train", 0, "keypoints"), ("train", 0, "keypoints", "names"), ("train", 0, "keypoints", "xy"), ("train", 0, "keypoints", "score"),
         ("train", 0, "keypoints", "box"), ("train", 0, "group"), ("heldout",), ("support",), ("seconds",), ("steps",), ("seed",),
         ("name",), ("parent",)]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATHS), anything)
def test_whatever_is_sent_the_answer_is_a_sentence(path: tuple[Any, ...], value: Any) -> None:
    body = json.loads(json.dumps(round_body()))
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        RoundRequest.from_json(body)
    except KptError as error:
        assert error.status in (400, 413) and len(error.message) < 3000
