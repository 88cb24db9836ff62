"""Several objects in one image, through the backend: rounds, judges, ranking, and what people are told of labels that are not clear."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no test shall wait for within its time
from backend.calibration import Calibration
from backend.prequential import MISSED, measure, score_new
from backend.ranking import compare, expected_right
from backend.served import control_row
from backend.tables import Job, Predicted
from backend_world import WITH_BOX, World, rectangle, region, world
from kptllm_core.keypoints import KeypointSet
from label_config.regions import to_regions
from label_config.schema import parse

CONTROL = parse(WITH_BOX).controls[0]
LABELS = CONTROL.schema.names


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        made.webhook("PROJECT_UPDATED", config=WITH_BOX)
        yield made


def dog(at: float, name: str) -> list[dict[str, Any]]:
    """A box with three points."""
    points = [region(label, at + 2 + i, 10 + i, parentID=name, id=f"{name}-{label}") for i, label in enumerate(LABELS)]
    return [rectangle(at, 5, 20, 20, id=name), *points]


def label(here: World, task: int, result: list[dict[str, Any]]) -> None:
    answer = here.webhook("ANNOTATION_CREATED", WITH_BOX, annotation=here.annotation(task) | {"result": result}, task=here.task(task))
    assert answer.status_code == 200, answer.get_data(as_text=True)


def as_set(at: float, box: bool = True) -> KeypointSet:
    """The same in pixels of the image of 64 × 48."""
    xy = [((at + 2 + i) * 0.64, (10 + i) * 0.48) for i in range(3)]
    return KeypointSet(LABELS, xy, [2, 2, 2], [0.8] * 3, [at * 0.64, 2.4, 12.8, 9.6] if box else None)  # type: ignore[arg-type]


def test_a_round_learns_and_judges_every_object_with_its_box(here: World) -> None:
    here.webhook("ANNOTATIONS_CREATED", WITH_BOX, task=[here.task(t) for t in range(1, 13)],
                 annotation=[here.annotation(t) | {"result": [*dog(0, "a"), *dog(40, "b"), rectangle(70, 60, 20, 30, id="c"),
                                                              region("nose", 95, 95)]} for t in range(1, 13)])  # fmt: skip
    assert here.play_round()["state"] == "done"
    with here.services.journal.reading() as session:
        snapshot = session.scalars(select(Job)).one().snapshot or {}
    images = {item["image"] for item in snapshot["train"] + snapshot["heldout"]}
    assert len(images) == 12
    for image in images:
        found = [i["keypoints"] for i in snapshot["train"] + snapshot["heldout"] if i["image"] == image]
        boxes = [None if k["box"] is None else [round(v, 1) for v in k["box"]] for k in found]
        assert boxes == [[0, 2.4, 12.8, 9.6], [25.6, 2.4, 12.8, 9.6], None, [44.8, 28.8, 12.8, 14.4]]
        assert [k["visibility"] for k in found] == [[2, 2, 2], [2, 2, 2], [2, 0, 0], [0, 0, 0]]


def test_labels_that_are_not_clear_are_told_to_people(here: World) -> None:
    label(here, 1, [*dog(0, "a"), *dog(10, "b"), region("ear", 15, 20)])
    label(here, 2, dog(0, "a"))
    told = here.client.get("/projects/1/quality").get_json()["unused"]
    assert [(u["task"], u["control"]) for u in told] == [(1, "kp:image")] and "lies in 2 boxes" in told[0]["said"]
    wanted = {"Accept": "text/html"}
    page = here.client.get("/projects/1/view/labels", headers=wanted).get_data(as_text=True)
    assert "Labels that could not be used" in page and "lies in 2 boxes" in page and "data?task=1" in page
    page = here.client.get("/projects/1/", headers=wanted).get_data(as_text=True)
    assert "1 label could not be used" in page
    here.webhook("PROJECT_UPDATED", WITH_BOX.replace('"ear"', '"paw"'))
    assert [u["task"] for u in here.client.get("/projects/1/quality").get_json()["unused"]] == []


def test_judges_see_each_object_and_those_that_were_missed(here: World) -> None:
    config, result = parse(WITH_BOX), [*dog(0, "a"), *dog(40, "b")]

    def worth(*objects: KeypointSet) -> dict[str, Any]:
        found = measure(config, result, {"kp:image": control_row(CONTROL, objects, [], (64, 48))})
        assert found is not None
        return found

    assert worth(as_set(40), as_set(0))["pck"] == 1.0
    assert worth(as_set(40), as_set(80))["near"] == 3 and worth(as_set(40))["error"] == pytest.approx(MISSED / 2)
    assert worth() == worth() | {"points": 6, "near": 0, "error": MISSED}


def row(objects: list[KeypointSet], scores: list[float]) -> dict[str, Any]:
    drawn = to_regions(CONTROL, objects, 64, 48, scores=scores)
    return {"kp:image": control_row(CONTROL, objects, [], (64, 48), drawn, scores)}


def test_a_point_is_as_sure_as_its_object() -> None:
    """What people need not touch: a point of an object that is there by 0.5 counts half."""
    plain = Calibration()
    assert expected_right(plain, row([as_set(0)], [1.0])) == pytest.approx(float(plain(0.8)))
    two = expected_right(plain, row([as_set(0), as_set(40)], [1.0, 0.5]))
    assert two == pytest.approx((float(plain(0.8)) + float(plain(0.4))) / 2)
    assert expected_right(plain, row([], [])) == 0.0
    old = {"kp:image": {key: value for key, value in row([as_set(0)], [0.5])["kp:image"].items() if key != "scores"}}
    assert expected_right(plain, old) == pytest.approx(float(plain(0.8)))  # as rows of before the score of objects were


def test_an_object_that_nobody_labelled_was_wrong_by_its_own_score() -> None:
    found = compare(parse(WITH_BOX), dog(0, "a"), row([as_set(0), as_set(60)], [0.9, 0.25]), 0.1)
    assert [(round(score, 4), right) for score, right in found] == [(0.72, True)] * 3 + [(0.2, False)] * 3


def test_finding_nothing_is_an_answer_that_is_judged(here: World) -> None:
    """The image of task 0 is so dark that the model sees nothing in it; a person does."""
    (prediction,) = here.predict(here.task(0), config=WITH_BOX)
    assert prediction["result"] == []
    label(here, 0, dog(0, "a"))
    score_new(here.services.journal, "1")
    with here.services.journal.reading() as session:
        (made,) = session.scalars(select(Predicted).where(Predicted.task == 0)).all()
    assert made.error == "" and made.figures is not None
    assert (made.figures["points"], made.figures["near"], made.figures["error"]) == (3, 0, MISSED)
