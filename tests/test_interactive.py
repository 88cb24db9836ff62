"""Smart tools: what the core is asked about a click or a rectangle, and which regions the page gets; as docs/interactive.md tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend import interactive
from backend_world import CONFIG, WITH_BOX, World, placed, rectangle, region, world
from kptllm_core.keypoints import KeypointSet
from label_config.checks import check_prediction

Region = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


@pytest.fixture
def calls(here: World) -> list[dict[str, Any]]:
    """What the model is asked; its answers stay what they are."""
    noted: list[dict[str, Any]] = []
    real = here.predictor.predict

    def predict(images: list[np.ndarray], schema: Any, **options: Any) -> list[KeypointSet]:
        noted.append({"images": len(images), **options})
        return real(images, schema, **options)

    here.predictor.predict = predict  # type: ignore[method-assign]
    return noted


def click(label: str | None, x: float, y: float, positive: bool = True, **more: Any) -> Region:
    """As Label Studio's smart keypoint tool sends it."""
    labels = [label] if label else []
    value = {"x": x, "y": y, "width": 0.27, "labels": labels, "keypointlabels": labels}
    return {**region("-", x, y), "id": f"click{x}", "value": value, "is_positive": positive, **more}


def point(label: str, x: float, y: float, origin: str = "prediction", **more: Any) -> Region:
    return {**region(label, x, y), "id": label, "origin": origin, **more}


def draw(here: World, *context: Region, config: str = CONFIG, task: int = 1, **about: Any) -> dict[str, Any]:
    (answer,) = here.predict(here.task(task, **about), config=config, context={"result": list(context)})
    boxes = [r for d in about.get("drafts", ()) for r in d["result"] if r["type"] == "rectanglelabels"]
    check_prediction(config, {**answer, "result": boxes + answer["result"]})  # what the page holds then
    return answer


def on_page(*regions: Region) -> dict[str, Any]:
    """A task whose draft holds these."""
    return {"drafts": [{"id": 1, "result": list(regions), "updated_at": "2026-01-01T00:00:00Z"}]}


def by_label(answer: dict[str, Any]) -> dict[str, Region]:
    return {r["value"]["keypointlabels"][0]: r for r in answer["result"] if r["type"] == "keypointlabels"}


def given(call: dict[str, Any], at: int = 0) -> dict[str, list[float]]:
    """The points that the model was told."""
    fixed = call["fixed"][at]
    return {} if fixed is None else {fixed.names[i]: fixed.xy[i].tolist() for i in np.flatnonzero(fixed.placed)}


def doubtful(predict: Any) -> Any:
    """The same model, half sure."""

    def unsure(images: list[np.ndarray], schema: Any, **options: Any) -> list[KeypointSet]:
        return [KeypointSet(p.names, p.xy, p.visibility, np.full(len(p.names), 0.5)) for p in predict(images, schema, **options)]

    return unsure


# ---------------------------------------------------------------- one object in an image


def test_a_click_is_told_to_the_model_and_stays_where_it_is(here: World, calls: list[dict[str, Any]]) -> None:
    found = by_label(draw(here, click("tail", 75.0, 25.0)))
    assert given(calls[-1]) == {"tail": [48.0, 12.0]}
    assert set(found) == {"nose", "tail", "ear"}
    tail = found["tail"]
    assert (tail["value"]["x"], tail["value"]["y"], tail["id"], tail["origin"]) == (75.0, 25.0, "click75.0", "manual")
    assert {found[n]["origin"] for n in ("nose", "ear")} == {"prediction"}
    assert not any("is_positive" in r or "labels" in r["value"] for r in found.values())


def test_a_click_says_that_there_is_an_object_whatever_its_score(here: World) -> None:
    config = CONFIG.replace('name="kp"', 'name="kp" model_score_threshold="0.99"')
    here.predictor.predict = doubtful(here.predictor.predict)  # type: ignore[method-assign]
    assert here.predict(here.task(1), config=config)[0]["result"] == []
    assert set(by_label(draw(here, click("tail", 75.0, 25.0), config=config))) == {"nose", "tail", "ear"}


def test_a_click_without_a_label_is_named_by_the_model(here: World) -> None:
    assert placed(draw(here, click(None, 75.0, 25.0)))["nose"] == (75.0, 25.0)


def test_points_on_the_page_move_and_are_not_doubled(here: World) -> None:
    (shown,) = here.predict(here.task(1))
    ids = {n: r["id"] for n, r in by_label(shown).items()}
    tail = by_label(shown)["tail"] | {"origin": "prediction"}
    moved = by_label(draw(here, tail, click("tail", 75.0, 25.0), predictions=[shown]))
    assert {n: r["id"] for n, r in moved.items()} == ids
    assert moved["tail"]["value"]["x"] == 75.0 and moved["tail"]["origin"] == "prediction-changed"


def test_what_a_person_placed_is_told_to_the_model_and_left_alone(here: World, calls: list[dict[str, Any]]) -> None:
    page = on_page(point("nose", 50, 50, "manual"), point("tail", 20, 20), point("ear", 25, 75, "prediction-changed"))
    found = by_label(draw(here, point("tail", 20, 20), click("tail", 75.0, 25.0), **page))
    assert given(calls[-1]) == {"nose": [32.0, 24.0], "tail": [48.0, 12.0], "ear": [16.0, 36.0]}
    assert {n: r["id"] for n, r in found.items()} == {"tail": "tail"}


def test_the_click_before_holds_although_no_draft_was_saved_since(here: World, calls: list[dict[str, Any]],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    page = on_page(point("nose", 50, 50), point("tail", 20, 20), point("ear", 25, 75))
    draw(here, point("nose", 50, 50), click("nose", 75.0, 25.0), **page)
    both = by_label(draw(here, point("tail", 20, 20), click("tail", 10.0, 10.0), **page))
    assert set(given(calls[-1])) == {"nose", "tail"} and given(calls[-1])["nose"] == [48.0, 12.0]
    assert (both["nose"]["id"], both["nose"]["value"]["x"]) == ("nose", 75.0)

    # The next draft knows better: the person dragged the nose somewhere else.
    later = on_page(point("nose", 60, 60, "prediction-changed"), point("tail", 10, 10, "prediction-changed"), point("ear", 25, 75))
    found = by_label(draw(here, point("ear", 25, 75), click("ear", 90.0, 90.0), **later))
    assert given(calls[-1])["nose"] == pytest.approx([38.4, 28.8], abs=1e-4)
    assert set(found) == {"ear"}

    # And after some seconds a draft that says nothing of it has been undone.
    now = interactive.time.time()
    monkeypatch.setattr(interactive.time, "time", lambda: now + 60.0)
    draw(here, point("tail", 20, 20), click("tail", 10.0, 10.0), **page)
    assert set(given(calls[-1])) == {"tail"}


def test_points_that_were_answered_first_are_moved_by_the_second_click(here: World) -> None:
    first = by_label(draw(here, click("tail", 75.0, 25.0)))
    second = by_label(draw(here, first["nose"], click("nose", 10.0, 10.0)))
    assert {n: r["id"] for n, r in first.items()} == {n: r["id"] for n, r in second.items()}
    assert (second["tail"]["value"]["x"], second["nose"]["value"]["x"]) == pytest.approx((75.0, 10.0))


def test_a_new_annotation_beside_somebody_elses_is_empty(here: World, calls: list[dict[str, Any]]) -> None:
    theirs = {"id": 5, "result": [point("nose", 50, 50, "manual"), point("tail", 20, 20, "manual")], "updated_at": "2026-01-01T00:00:00Z"}
    found = by_label(draw(here, click("tail", 75.0, 25.0), annotations=[theirs]))
    assert set(given(calls[-1])) == {"tail"} and set(found) == {"nose", "tail", "ear"}


def test_the_object_is_looked_for_around_the_click_too(here: World, calls: list[dict[str, Any]]) -> None:
    here.label(1)
    found = draw(here, click("tail", 75.0, 25.0), task=50)
    boxes = {box is None: (box, given(call, at)) for call in calls for at, box in enumerate(call["boxes"])}
    assert boxes[True][1] == boxes[False][1] == {"tail": [48.0, 12.0]}
    x, y, w, h = boxes[False][0]
    assert x <= 48 <= x + w and y <= 12 <= y + h
    assert len(by_label(found)) == 3


# ---------------------------------------------------------------- several objects


BOXES = (rectangle(5, 5, 40, 40, id="left"), rectangle(50, 50, 45, 45, id="right"))


def test_a_click_is_about_the_object_whose_box_holds_it(here: World, calls: list[dict[str, Any]]) -> None:
    page = on_page(*BOXES, point("nose", 60, 60, parentID="right"), {**point("nose", 10, 10, parentID="left"), "id": "other"})
    noses = [r for r in page["drafts"][0]["result"] if r["type"] == "keypointlabels"]
    answer = draw(here, *noses, click("nose", 80.0, 80.0), config=WITH_BOX, **page)
    assert [[float(v) for v in b] for b in calls[-1]["boxes"]] == [[32.0, 24.0, pytest.approx(28.8), pytest.approx(21.6)]]
    assert {r["parentID"] for r in answer["result"]} == {"right"}, "the box stands on the page, and is not sent again"
    assert by_label(answer)["nose"]["id"] == "nose"


def test_a_box_that_a_program_made_without_an_id_is_passed_over(here: World) -> None:
    nameless = {k: v for k, v in rectangle(10, 10, 40, 40).items() if k != "id"}
    for odd in ({}, {"id": 1.5}, {"id": "#"}, {"id": ["x"]}):
        answer = draw(here, click("nose", 20, 20), config=WITH_BOX, annotations=[{"id": 1, "result": [nameless | odd]}])
        assert by_label(answer)["nose"]["value"]["x"] == pytest.approx(20)


def test_in_several_boxes_a_click_corrects_the_nearest_such_point(here: World, calls: list[dict[str, Any]]) -> None:
    over = (rectangle(0, 0, 90, 90, id="big"), rectangle(10, 10, 80, 80, id="small"))
    noses = [{**point("nose", 30, 30, parentID="big"), "id": "a"}, {**point("nose", 80, 80, parentID="small"), "id": "b"}]
    answer = draw(here, *noses, click("nose", 35.0, 35.0), config=WITH_BOX, **on_page(*over, *noses))
    assert by_label(answer)["nose"]["id"] == "a" and {r["parentID"] for r in answer["result"]} == {"big"}


def test_a_point_that_strayed_out_of_its_box_is_still_its_objects(here: World) -> None:
    page = on_page(*BOXES, point("tail", 48, 20, parentID="left"))
    answer = draw(here, point("tail", 48, 20, parentID="left"), click("tail", 47.0, 30.0), config=WITH_BOX, **page)
    assert by_label(answer)["tail"]["id"] == "tail" and {r["parentID"] for r in answer["result"]} == {"left"}


def test_a_click_on_no_object_begins_one_of_the_usual_size(here: World, calls: list[dict[str, Any]]) -> None:
    labelled = [rectangle(0, 0, 50, 50, id="box"), *(point(n, x, 25, "manual", parentID="box") for n, x in (("nose", 10), ("tail", 40)))]
    here.webhook("ANNOTATIONS_CREATED", WITH_BOX, annotation=[here.annotation(1) | {"result": labelled}], task=[here.task(1)])
    answer = draw(here, click("nose", 75.0, 25.0), config=WITH_BOX, task=50, **on_page(rectangle(0, 80, 20, 20, id="far")))
    (box,) = calls[-1]["boxes"]
    assert [float(v) for v in box] == pytest.approx([41.6, 0.0, 22.4, 24.0], abs=0.1), "its nose lies where noses lie in a box, on the image"
    (new,) = (r for r in answer["result"] if r["type"] == "rectanglelabels")
    assert {r["parentID"] for r in by_label(answer).values()} == {new["id"]} != {"far"}

    again = draw(here, by_label(answer)["tail"], click("tail", 90.0, 25.0), config=WITH_BOX, task=50, **on_page())
    assert {r["parentID"] for r in by_label(again).values()} == {new["id"]}, "two clicks within seconds made two objects"


def test_a_smart_rectangle_is_the_box_as_it_is(here: World, calls: list[dict[str, Any]]) -> None:
    drawn = rectangle(25, 25, 50, 50, id="new")
    answer = draw(here, *BOXES, drawn, config=WITH_BOX, **on_page(*BOXES))
    assert [[float(v) for v in b] for b in calls[-1]["boxes"]] == [[16.0, 12.0, 32.0, 24.0]]
    (box,) = (r for r in answer["result"] if r["type"] == "rectanglelabels")
    assert box == drawn
    assert {r["parentID"] for r in by_label(answer).values()} == {"new"} and len(by_label(answer)) == 3


def test_points_that_lay_there_without_a_box_get_the_drawn_one(here: World, calls: list[dict[str, Any]]) -> None:
    answer = draw(here, rectangle(25, 25, 50, 50, id="new"), config=WITH_BOX, **on_page(point("nose", 50, 50, "manual")))
    nose = by_label(answer)["nose"]
    assert (nose["id"], nose["parentID"], nose["value"]["x"]) == ("nose", "new", 50.0)
    assert given(calls[-1]) == {"nose": [32.0, 24.0]}


HIDDEN = WITH_BOX.replace("</View>", '<Choices name="hidden" toName="image" perRegion="true"><Choice value="occluded"/></Choices></View>')


@pytest.mark.parametrize("drawn", [click("nose", 30.0, 30.0), rectangle(25, 25, 50, 50, id="new")], ids=["moved", "sent again"])
def test_a_point_that_a_person_marked_as_hidden_stays_hidden(here: World, drawn: Region) -> None:
    nose = point("nose", 50, 50, "manual")
    hidden = {**nose, "from_name": "hidden", "type": "choices", "value": {"x": 50, "y": 50, "width": 0.5, "choices": ["occluded"]}}
    boxes = [rectangle(20, 20, 60, 60, id="box")] if drawn["type"] == "keypointlabels" else []
    answer = draw(here, drawn, config=HIDDEN, **on_page(*boxes, nose, hidden, point("tail", 60, 60, "manual")))
    (choice,) = (r for r in answer["result"] if r["type"] == "choices")
    assert choice["id"] == by_label(answer)["nose"]["id"] == "nose" and choice["value"]["choices"] == ["occluded"]


def test_a_rotated_rectangle_is_asked_by_its_hull_and_stays_rotated(here: World, calls: list[dict[str, Any]]) -> None:
    drawn = rectangle(50, 25, 25, 50, id="new")
    drawn["value"]["rotation"] = 90
    answer = draw(here, drawn, config=WITH_BOX)
    assert [float(v) for v in calls[-1]["boxes"][0]] == pytest.approx([8.0, 12.0, 24.0, 16.0])
    assert answer["result"][0]["value"]["rotation"] == 90


# ---------------------------------------------------------------- what cannot be used


def test_a_negative_click_removes_its_point_from_the_answer(here: World) -> None:
    assert set(placed(draw(here, click("tail", 75.0, 25.0, positive=False)))) == {"nose", "ear"}


BAD = {
    "outside of the image": (CONFIG, click("tail", 120.0, 25.0), "120.0, 25.0] per cent"),
    "nowhere": (CONFIG, click("tail", float("1e300"), 25.0), "per cent of the image"),
    "an unknown label": (CONFIG, click("wing", 75.0, 25.0), "'wing'; expected one of 'kp': nose, tail, ear"),
    "a rectangle without area": (WITH_BOX, rectangle(25, 25, 0, 50), "no area on the image"),
    "a rectangle outside": (WITH_BOX, rectangle(125, 25, 10, 50), "no area on the image"),
    "a negative click on no object": (WITH_BOX, click("tail", 75.0, 25.0, positive=False), "lies on no object"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_answered_with_nothing_and_a_reason(here: World, case: str) -> None:
    config, drawn, reason = BAD[case]
    (answer,) = here.predict(here.task(1), config=config, context={"result": [drawn]})
    assert answer["result"] == [] and reason in answer["error"]["message"]


@pytest.mark.parametrize("drawn", [click("tail", 75.0, 25.0), rectangle(25, 25, 50, 50)])
def test_what_a_person_drew_stays_when_the_core_is_down(here: World, drawn: Region) -> None:
    here.setup(WITH_BOX)
    here.keeper.tick()
    here.stop_core()
    answer = draw(here, drawn, config=WITH_BOX)
    (kept,) = answer["result"]
    assert (kept["id"], kept["value"]["x"], kept["origin"]) == (drawn["id"], drawn["value"]["x"], "manual")
    assert answer["error"]["code"] == "unavailable" and "is_positive" not in kept
