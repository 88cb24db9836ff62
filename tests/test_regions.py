"""Predictions to Label Studio's regions and people's regions back, judged by the SDK and by our stricter checks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.checks import check_prediction
from label_config.regions import boxes_in, from_result, read_result, to_prediction, to_regions
from label_config.schema import KeypointControl, LabelConfig, parse

NAMES = ("nose", "left_eye", "right_eye")
W, H = 640, 480


def config_xml(attributes: str = "", alias: str = "") -> str:
    return f"""<View><Image name="image" value="$image"/>
      <RectangleLabels name="kp_bbox" toName="image"><Label value="mouse"/><Label value="rat"/></RectangleLabels>
      <KeyPointLabels name="kp" toName="image" {attributes}><Label value="nose" {alias}/><Label value="left_eye"/>
      <Label value="right_eye"/></KeyPointLabels>
      <Choices name="vis" toName="image" perRegion="true"><Choice value="occluded"/><Choice value="fine"/></Choices></View>"""


WITH_BOX = config_xml()
NO_BOX = WITH_BOX.replace("RectangleLabels", "EllipseLabels")


def one(xml: str) -> tuple[LabelConfig, KeypointControl]:
    config = parse(xml)
    return config, config.controls[0]


def points(xy: Any, visibility: Any = (2, 2, 2), score: Any = (0.9, 0.8, 0.7), box: Any = None) -> KeypointSet:
    return KeypointSet(NAMES, xy, visibility, score, box)


XY = [[64.0, 96.0], [320.0, 240.0], [576.5, 400.25]]


def test_a_region_is_exactly_what_the_front_end_writes() -> None:
    config, kp = one(NO_BOX)
    regions = to_regions(kp, points(XY), W, H, new_id=iter(("k1", "k2", "k3")).__next__)
    assert regions[0] == {
        "id": "k1", "from_name": "kp", "to_name": "image", "type": "keypointlabels", "original_width": 640, "original_height": 480,
        "image_rotation": 0, "score": 0.9, "value": {"x": 10.0, "y": 20.0, "width": 0.5, "keypointlabels": ["nose"]},
    }  # fmt: skip
    assert [r["value"]["keypointlabels"] for r in regions] == [["nose"], ["left_eye"], ["right_eye"]]
    assert regions[2]["value"]["x"] == 576.5 / 6.4
    prediction = to_prediction(config, [(kp, points(XY))], W, H, "v1")
    assert prediction["score"] == 0.8 and prediction["model_version"] == "v1"
    check_prediction(NO_BOX, prediction)


def test_objects_are_boxes_with_their_points_as_children() -> None:
    config, kp = one(WITH_BOX)
    two = [points(XY, box=[32, 48, 320, 240]), points(np.array(XY) - 20)]
    prediction = to_prediction(config, [(kp, two)], W, H, "v1")
    check_prediction(WITH_BOX, prediction)
    boxes = [r for r in prediction["result"] if r["type"] == "rectanglelabels"]
    assert boxes[0]["value"] == {
        "x": 5.0,
        "y": 10.0,
        "width": 50.0,
        "height": 50.0,
        "rotation": 0,
        "rectanglelabels": ["mouse"],
    }
    assert boxes[0]["from_name"] == "kp_bbox" and boxes[1]["value"]["x"] == pytest.approx(
        44 / 6.4
    )  # the hull of the points
    children = [r["parentID"] for r in prediction["result"] if r["type"] == "keypointlabels"]
    assert children == [boxes[0]["id"]] * 3 + [boxes[1]["id"]] * 3
    labelled = to_regions(kp, two, W, H, box_labels=["rat", None])
    assert [r["value"]["rectanglelabels"][0] for r in labelled if "rectanglelabels" in r["value"]] == ["rat", "mouse"]


def test_boxes_are_not_drawn_where_the_config_says_so_or_cannot() -> None:
    _, kp = one(config_xml('model_add_bboxes="false"'))
    regions = to_regions(kp, points(XY, box=[1, 1, 50, 50]), W, H)
    assert [r["type"] for r in regions] == ["keypointlabels"] * 3 and not any("parentID" in r for r in regions)
    _, kp = one(WITH_BOX)
    alone = to_regions(kp, points(XY, (2, 0, 3)), W, H)  # the hull of a single point has no area
    assert [r["type"] for r in alone] == ["keypointlabels"] and "parentID" not in alone[0]
    _, kp = one(NO_BOX)
    best = to_regions(kp, [points(XY, score=(0.1, 0.1, 0.1)), points(XY)], W, H)
    assert [r["score"] for r in best] == [0.9, 0.8, 0.7]  # without boxes, two objects could not be told apart
    plain = WITH_BOX.replace("RectangleLabels", "Rectangle").replace('<Label value="mouse"/><Label value="rat"/>', "")
    config, kp = one(plain)
    prediction = to_prediction(config, [(kp, points(XY))], W, H, "v")
    assert prediction["result"][0]["type"] == "rectangle" and "rectanglelabels" not in prediction["result"][0]["value"]
    check_prediction(plain, prediction)


def test_thresholds_absence_and_the_edge_of_the_image() -> None:
    _, kp = one(
        NO_BOX.replace('toName="image" >', 'toName="image" model_point_threshold="0.75" model_score_threshold="0.5">')
    )
    assert (kp.point_threshold, kp.score_threshold) == (0.75, 0.5)
    assert [r["score"] for r in to_regions(kp, points(XY), W, H)] == [0.9, 0.8]
    assert to_regions(kp, points(XY, score=(0.4, 0.5, 0.4)), W, H) == []
    _, kp = one(NO_BOX)
    assert len(to_regions(kp, points(XY, (3, 0, 2)), W, H)) == 1
    assert to_regions(kp, points(XY, (3, 0, 3)), W, H) == to_regions(kp, [], W, H) == []
    out = to_regions(kp, points([[-5, 700], [640, 480], [1e6, -1e6]]), W, H)
    assert [(r["value"]["x"], r["value"]["y"]) for r in out] == [(0, 100), (100, 100), (100, 0)]


def test_point_size_is_in_pixels_of_the_image() -> None:
    _, kp = one(config_xml('model_point_size="8"'))
    assert to_regions(kp, points(XY), W, H)[1]["value"]["width"] == 1.25
    assert to_regions(kp, points(np.array(XY) / 200), 3, 3)[1]["value"]["width"] == 100.0


def test_hidden_points_carry_the_choice_of_their_region() -> None:
    config, kp = one(WITH_BOX)
    prediction = to_prediction(config, [(kp, points(XY, (1, 2, 2)))], W, H, "v")
    nose, choice = prediction["result"][1:3]
    assert choice["id"] == nose["id"] and choice["parentID"] == nose["parentID"]
    assert (choice["type"], choice["from_name"]) == ("choices", "vis")
    assert choice["value"] == {**{k: nose["value"][k] for k in ("x", "y", "width")}, "choices": ["occluded"]}
    check_prediction(WITH_BOX, prediction)
    _, silent = one(WITH_BOX.replace("occluded", "blurred"))
    assert len(to_regions(silent, points(XY, (1, 2, 2)), W, H)) == 4


def test_the_wire_carries_the_alias_and_both_are_read() -> None:
    xml = config_xml(alias='alias="N"')
    config, kp = one(xml)
    prediction = to_prediction(config, [(kp, points(XY))], W, H, "v")
    assert prediction["result"][1]["value"]["keypointlabels"] == ["N"]
    check_prediction(xml, prediction)
    by_value = copy.deepcopy(prediction)
    by_value["result"][1]["value"]["keypointlabels"] = ["nose"]
    with pytest.raises(InvalidInput, match="'nose' is not in 'kp'"):
        check_prediction(xml, by_value)
    for drawn in (prediction, by_value):
        assert from_result(kp, drawn["result"])[0].placed.all()


def test_a_prediction_is_of_its_own_config() -> None:
    config, _ = one(WITH_BOX)
    _, other = one(NO_BOX)
    with pytest.raises(InvalidInput, match="not in this label config"):
        to_prediction(config, [(other, points(XY))], W, H, "v")
    empty = to_prediction(config, [], W, H, "v")
    assert empty == {"result": [], "score": 0.0, "model_version": "v"}
    check_prediction(WITH_BOX, empty)


sizes = st.integers(1, 20_000)
unit = st.floats(0, 1, width=32)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[KeypointSet], int, int]:
    width, height = draw(sizes), draw(sizes)
    found = []
    for _ in range(draw(st.integers(1, 4))):
        xy = np.array(draw(st.lists(st.tuples(unit, unit), min_size=3, max_size=3))) * [width, height]
        visibility = draw(st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3))
        found.append(points(xy, visibility, draw(st.lists(unit, min_size=3, max_size=3)), [0, 0, width, height]))
    return found, width, height


@given(scenes())
@settings(max_examples=60, deadline=None)
def test_pixels_to_per_cent_and_back(scene: tuple[list[KeypointSet], int, int]) -> None:
    objects, width, height = scene
    config, kp = one(WITH_BOX)
    prediction = to_prediction(config, [(kp, objects)], width, height, "v")
    check_prediction(WITH_BOX, prediction, sdk=False)
    read = read_result(kp, prediction["result"], width, height)
    assert read.problems == () and len(read.objects) == len(objects)
    for before, after in zip(objects, read.objects, strict=True):
        np.testing.assert_allclose(after.keypoints.xy, before.xy, rtol=1e-6, atol=1e-6 * max(width, height))
        np.testing.assert_array_equal(after.keypoints.visibility, before.visibility)
        np.testing.assert_allclose(after.keypoints.box, before.box, rtol=1e-6)
    again = to_regions(kp, [o.keypoints for o in read.objects], width, height)
    flat = [r["value"].get(k) for r in prediction["result"] for k in ("x", "y")]
    np.testing.assert_allclose([r["value"].get(k) for r in again for k in ("x", "y")], flat, rtol=1e-6, atol=1e-5)


@given(scenes())
@settings(max_examples=25, deadline=None)
def test_every_prediction_passes_the_sdk(scene: tuple[list[KeypointSet], int, int]) -> None:
    pytest.importorskip("label_studio_sdk")
    objects, width, height = scene
    for xml, found in ((WITH_BOX, objects), (NO_BOX, objects[:1])):
        config, kp = one(xml)
        check_prediction(xml, to_prediction(config, [(kp, found)], width, height, "v"))


# ---------------------------------------------------------------- what people draw


def region(label: Any, x: Any = 10.0, y: Any = 20.0, **more: Any) -> dict[str, Any]:
    labels = label if isinstance(label, list) else [label]
    base = {"id": f"r{next(_ids)}", "from_name": "kp", "to_name": "image", "type": "keypointlabels", "original_width": W,
            "original_height": H, "image_rotation": 0, "value": {"x": x, "y": y, "width": 0.4, "keypointlabels": labels}}  # fmt: skip
    return {**base, **more}


_ids = itertools.count()


def rectangle(region_id: str, x: Any, y: Any, w: Any, h: Any, rotation: Any = 0, **more: Any) -> dict[str, Any]:
    return {"id": region_id, "from_name": "kp_bbox", "to_name": "image", "type": "rectanglelabels", "original_width": W, "original_height": H,
            "value": {"x": x, "y": y, "width": w, "height": h, "rotation": rotation, "rectanglelabels": ["mouse"]}, **more}  # fmt: skip


def hidden(of: dict[str, Any], choice: str = "occluded") -> dict[str, Any]:
    place = {k: v for k, v in of["value"].items() if k != "keypointlabels"}
    return {**of, "from_name": "vis", "type": "choices", "value": {**place, "choices": [choice]}}


def test_points_of_one_object_without_boxes() -> None:
    _, kp = one(NO_BOX)
    nose, eye = region("nose", 10, 20, origin="prediction"), region("left_eye", 50, 50, origin="prediction-changed")
    (found,) = read_result(kp, [nose, eye, hidden(eye), hidden(nose, "fine")]).objects
    assert found.keypoints.xy.tolist() == [[64, 96], [320, 240], [0, 0]]
    assert found.keypoints.visibility.tolist() == [Visibility.VISIBLE, Visibility.OCCLUDED, Visibility.NOT_LABELLED]
    assert found.origins == ("prediction", "prediction-changed", None)
    assert found.region_ids == (nose["id"], eye["id"], None) and found.box is None


def test_a_point_that_is_not_placed_is_absent_only_where_the_config_says_so() -> None:
    _, kp = one(config_xml('model_missing="absent"'))
    twice = [region("left_eye", 1, 1), region("left_eye", 9, 9)]
    (found,) = from_result(kp, [region("nose"), *twice])
    assert found.visibility.tolist() == [Visibility.VISIBLE, Visibility.NOT_LABELLED, Visibility.ABSENT]
    assert from_result(kp, []) == from_result(kp, [rectangle("b", 0, 0, 9, 9)]) == []


A, B = rectangle("a", 0, 0, 50, 50), rectangle("b", 20, 20, 60, 60)
UNCLEAR = {
    "in several boxes": [region("nose", 30, 30)],
    "in no box": [region("nose", 90, 90)],
    "tied to several": [region("nose", 5, 5, id="n"), {"type": "relation", "from_id": "n", "to_id": "a"},
                        {"type": "relation", "from_id": "n", "to_id": "b"}],
    "outside of the image": [region("nose", 5, 101)],
    "drawn on a turned image": [region("nose", 5, 5, original_width=H, original_height=W)],
    "twice on an object": [region("nose", 5, 5, parentID="a"), region("nose", 9, 9, parentID="a")],
    "the parent is gone": [region("nose", 90, 90, parentID="x")],
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_no_object_lacks_a_point_that_is_not_clear(name: str) -> None:
    _, kp = one(config_xml('model_missing="absent"'))
    eyes = [region("left_eye", 5, 5, parentID="a"), region("left_eye", 70, 70, parentID="b")]
    read = read_result(kp, [A, B, *eyes, *UNCLEAR[name]], W, H)
    told = {o.box.region_id: o.keypoints.visibility.tolist() for o in read.objects if o.box}
    assert told == {box: [Visibility.NOT_LABELLED, Visibility.VISIBLE, Visibility.ABSENT] for box in "ab"}
    assert read.problems and all((o.keypoints.visibility != Visibility.ABSENT).all() for o in read.objects if not o.box)


def test_a_point_at_the_edge_is_not_lost_by_rounding() -> None:
    _, kp = one(NO_BOX)
    read = read_result(kp, [region("nose", -0.5, 100.5), region("left_eye", 100.0001, -1e-9)])
    assert read.problems == () and read.objects[0].keypoints.xy[:2].tolist() == [[0, H], [W, 0]]


def test_the_loaded_image_decides_on_pixels() -> None:
    _, kp = one(NO_BOX)
    assert from_result(kp, [region("nose")], 1280, 960)[0].xy[0].tolist() == [128, 192]
    nameless = region("nose", original_width=None)
    assert from_result(kp, [nameless], 100, 50)[0].xy[0].tolist() == [10, 10]
    assert "how large its image is" in read_result(kp, [nameless]).problems[0]
    turned = read_result(kp, [region("nose")], H, W)
    assert turned.objects == () and "turned by 90°" in turned.problems[0]
    assert from_result(kp, [region("nose", image_rotation=90)])[0].xy[0].tolist() == [
        64,
        96,
    ]  # the view is turned, not the image


def test_groups_by_parent_by_box_and_beside_it() -> None:
    _, kp = one(WITH_BOX)
    a, b = rectangle("a", 0, 0, 30, 30), rectangle("b", 50, 50, 30, 30)
    by_parent = [region("nose", 55, 55, parentID="a"), region("nose", 5, 5, parentID="b#77")]
    found = read_result(kp, [a, b, *by_parent])
    assert [o.box.region_id for o in found.objects if o.box] == ["a", "b"] and found.problems == ()
    assert found.objects[0].keypoints.xy[0].tolist() == pytest.approx([352, 264])
    by_place = read_result(kp, [a, region("nose", 55, 55), b, region("left_eye", 5, 5), region("right_eye", 45, 45)])
    assert [(o.box.region_id if o.box else None, o.keypoints.visibility.tolist()) for o in by_place.objects] == [
        ("a", [0, 2, 0]), ("b", [2, 0, 0]), (None, [0, 0, 2])]  # fmt: skip
    beside = read_result(kp, [a, region("nose", 5, 5), region("left_eye", 40, 40), region("nose", 90, 90)])
    assert [o.keypoints.visibility.tolist() for o in beside.objects] == [[2, 0, 0], [2, 2, 0]]  # the stray eye goes with the stray nose
    assert beside.objects[0].box is not None and beside.objects[1].box is None and len(beside.problems) == 2
    alone = read_result(kp, [a, region("nose", 5, 5), region("left_eye", 40, 40)])
    assert [o.keypoints.visibility.tolist() for o in alone.objects] == [[2, 2, 0]] and alone.problems == ()
    twice = read_result(kp, [a, region("nose", 5, 5), region("nose", 6, 6), region("left_eye", 40, 40)])
    assert [o.keypoints.visibility.tolist() for o in twice.objects] == [[0, 2, 0]] and len(twice.problems) == 1


def test_a_point_in_several_boxes_is_reported() -> None:
    _, kp = one(WITH_BOX)
    read = read_result(
        kp,
        [
            rectangle("a", 0, 0, 50, 50),
            rectangle("b", 20, 20, 50, 50),
            region("nose", 30, 30),
            region("left_eye", 5, 5),
        ],
    )
    assert "'nose'" in read.problems[0] and "2 boxes" in read.problems[0]
    assert [o.keypoints.visibility.tolist() for o in read.objects] == [[0, 2, 0]]


def test_parents_that_are_points_chains_loops_or_gone() -> None:
    _, kp = one(WITH_BOX)
    first, second = region("nose", 5, 5), region("nose", 80, 80)
    read = read_result(
        kp,
        [
            first,
            second,
            region("left_eye", 9, 9, parentID=first["id"]),
            region("left_eye", 90, 90, parentID=second["id"]),
        ],
    )
    assert [o.keypoints.visibility.tolist() for o in read.objects] == [[2, 2, 0], [2, 2, 0]] and read.problems == ()
    chain = read_result(
        kp,
        [
            rectangle("a", 0, 0, 9, 9),
            region("nose", 50, 50, id="n", parentID="a"),
            region("left_eye", 60, 60, parentID="n"),
        ],
    )
    assert len(chain.objects) == 1 and chain.objects[0].box is not None
    gone = read_result(kp, [region("nose", 1, 1, parentID="x"), region("nose", 2, 2, parentID="y")])
    assert len(gone.objects) == 2
    loop = [region("nose", 1, 1, id="p", parentID="q"), region("left_eye", 1, 2, id="q", parentID="p")]
    assert len(read_result(kp, loop).objects) >= 1


def test_points_whose_parent_is_gone_go_to_the_box_that_holds_them() -> None:
    _, kp = one(WITH_BOX)
    a, b = rectangle("a", 0, 0, 40, 40), rectangle("b", 50, 50, 40, 40)
    eyes = [region("left_eye", 5, 5, parentID="x"), region("right_eye", 9, 9, parentID="x")]

    def seen(*regions: dict[str, Any]) -> list[tuple[str | None, list[int]]]:
        read = read_result(kp, list(regions))
        assert "the parent 'x' is no region of this annotation" in read.problems[0]
        return [(o.box.region_id if o.box else None, o.keypoints.visibility.tolist()) for o in read.objects]

    assert seen(a, b, *eyes) == [("a", [0, 2, 2])]
    assert seen(a, b, *eyes, region("nose", 20, 20)) == [("a", [2, 2, 2])]
    assert seen(a, b, *eyes, region("left_eye", 20, 20)) == [("a", [0, 2, 0]), (None, [0, 2, 2])]  # it has such a point
    assert seen(a, b, *eyes, region("nose", 60, 60, parentID="x")) == [(None, [2, 2, 2])]  # no box holds them all
    assert seen(a, rectangle("c", 0, 0, 45, 45), *eyes) == [(None, [0, 2, 2])]  # two do
    assert seen(a, *eyes, region("left_eye", 6, 6, parentID="y")) == [(None, [0, 2, 2]), (None, [0, 2, 0])]  # two may be its points


def relation(one: str, other: str) -> dict[str, Any]:
    return {"type": "relation", "from_id": one, "to_id": other, "direction": "right"}


def test_relations_tie_points_to_boxes_and_to_each_other() -> None:
    _, kp = one(WITH_BOX)
    a, b = rectangle("a", 0, 0, 60, 60), rectangle("b", 20, 20, 60, 60)
    nose, eye, far = region("nose", 30, 30, id="n"), region("left_eye", 40, 40, id="e"), region("nose", 90, 90, id="f")
    by_relation = read_result(kp, [a, b, nose, eye, far, relation("a", "n"), relation("e", "n"), relation("f", "b")])
    assert by_relation.problems == ()
    assert [(o.box.region_id if o.box else None, o.keypoints.visibility.tolist()) for o in by_relation.objects] == [
        ("a", [2, 2, 0]), ("b", [2, 0, 0])]  # fmt: skip
    fellow = read_result(kp, [a, b, nose | {"parentID": "a"}, eye, relation("n", "e")])  # of a point that has a parent
    assert fellow.problems == () and [o.keypoints.visibility.tolist() for o in fellow.objects] == [[2, 2, 0]]
    pair = read_result(one(NO_BOX)[1], [nose, eye, far, relation("n", "e"), relation("f", "f")])
    assert [o.keypoints.visibility.tolist() for o in pair.objects] == [[2, 2, 0], [2, 0, 0]] and pair.problems == ()


def test_points_that_are_tied_to_two_boxes_are_reported() -> None:
    _, kp = one(WITH_BOX)
    a, b, nose = rectangle("a", 0, 0, 60, 60), rectangle("b", 20, 20, 60, 60), region("nose", 5, 5, id="n")
    eye = region("left_eye", 70, 70, id="e")
    for ties in ([relation("n", "a"), relation("n", "b")], [relation("n", "b")]):
        read = read_result(kp, [a, b, nose if len(ties) == 2 else nose | {"parentID": "a"}, eye, *ties])
        assert len(read.problems) == 1 and "'nose' (n) is tied to 2 boxes" in read.problems[0]
        assert [o.keypoints.visibility.tolist() for o in read.objects] == [[0, 2, 0]]


def test_a_point_in_no_box_is_kept_and_reported() -> None:
    _, kp = one(WITH_BOX)
    read = read_result(kp, [rectangle("a", 0, 0, 30, 30), rectangle("b", 50, 50, 30, 30), region("nose", 40, 40)])
    assert "'nose'" in read.problems[0] and "lies in no box" in read.problems[0]
    assert [(o.box, o.keypoints.visibility.tolist()) for o in read.objects] == [(None, [2, 0, 0])]


def test_a_label_twice_on_one_object_is_not_guessed() -> None:
    _, kp = one(NO_BOX)
    read = read_result(kp, [region("nose", 10, 10), region("nose", 70, 70), region("left_eye", 1, 1)])
    assert read.objects[0].keypoints.visibility.tolist() == [0, 2, 0]
    assert "'nose' was placed 2 times" in read.problems[0] and "box" in read.problems[0]
    same = read_result(kp, [region("nose", 10, 10), region("nose", 10, 10)])
    assert same.problems == () and same.objects[0].keypoints.visibility[0] == Visibility.VISIBLE


def test_one_region_may_carry_several_labels() -> None:
    _, kp = one(NO_BOX)
    (found,) = from_result(kp, [region(["nose", "left_eye", "nose"], 10, 20)])
    assert found.visibility.tolist() == [2, 2, 0] and found.xy[0].tolist() == found.xy[1].tolist()


UNUSABLE = {
    "no label": (region([]), "no label"),
    "labels are a string": (region("nose", value={"x": 1, "y": 1, "keypointlabels": "nose"}), "no label"),
    "unknown label": (region("tail"), "'tail', which is not in 'kp': nose, left_eye, right_eye"),
    "not a word": (region([None]), "'None'"),
    "negative": (region("nose", -0.51), "-0.51"),
    "above 100": (region("nose", 10, 100.51), "100.51"),
    "nan": (region("nose", float("nan")), "nan"),
    "infinite": (region("nose", 10, float("inf")), "inf"),
    "text": (region("nose", "10"), "'10'"),
    "true": (region("nose", True), "True"),
    "huge": (region("nose", 10**400), "expected 0…100"),
    "no x": (region("nose", value={"y": 1, "keypointlabels": ["nose"]}), "None"),
    "no value": (region("nose", value=None), "no label"),
    "no size": (region("nose", original_width=0), "how large"),
    "negative click": (region("nose", is_positive=False), "negative click"),
    "no dict": ("text", "are no regions"),
    "box of no area": (rectangle("b", 5, 5, 0, 9), "no area"),
    "box outside": (rectangle("b", 120, 5, 10, 9), "no area"),
    "box of negative width": (rectangle("b", 50, 50, -10, 9), "no area"),
    "box with nan": (rectangle("b", float("nan"), 5, 1, 9), "no finite"),
    "box turned by words": (rectangle("b", 5, 5, 9, 9, "much"), "'much'"),
    "box without value": (rectangle("b", 5, 5, 9, 9, value=None), "no finite"),
    "box without size": (rectangle("b", 5, 5, 9, 9, original_height="x"), "how large"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_reported_and_the_rest_is_kept(name: str) -> None:
    _, kp = one(WITH_BOX)
    bad, said = UNUSABLE[name]
    read = read_result(kp, [bad, region("right_eye", 50, 50)])
    assert len(read.problems) == 1 and said in read.problems[0]
    assert [o.keypoints.visibility.tolist() for o in read.objects] == [[0, 0, 2]]


def test_regions_of_other_tags_are_none_of_ours() -> None:
    _, kp = one(WITH_BOX)
    others = [
        region("nose", from_name="other"), region("nose", to_name="second"), region("nose", type="choices"),
        {"type": "relation", "from_id": "a", "to_id": "b"}, {"type": "choices", "from_name": "vis", "value": {"choices": ["occluded"]}},
        rectangle("z", 1, 1, 1, 1, from_name="else"), {}, region("nose", from_name=None), region("nose", id=["x"], from_name=["kp"]),
    ]  # fmt: skip
    assert read_result(kp, others) == read_result(kp, [])
    with pytest.raises(InvalidInput, match="list of regions"):
        read_result(kp, {"result": []})  # type: ignore[arg-type]


def test_width_and_ids_may_be_missing() -> None:
    _, kp = one(WITH_BOX)
    bare = region("nose", 50, 50, value={"x": 50, "y": 50, "keypointlabels": ["nose"]})
    del bare["id"]
    box = rectangle("b", 40, 40, 20, 20)
    del box["id"], box["value"]["rotation"]
    (found,) = read_result(kp, [box, bare]).objects
    assert found.keypoints.visibility[0] == Visibility.VISIBLE and found.box is not None


def test_boxes_in_pixels() -> None:
    _, kp = one(WITH_BOX)
    assert [b.tolist() for b in boxes_in(kp, [rectangle("a", 10, 20, 50, 50), region("nose")])] == [[64, 96, 320, 240]]
    turned = boxes_in(kp, [rectangle("a", 50, 50, 25, 10, 90)])[0]  # about its top left corner, clockwise, in pixels
    assert turned.tolist() == pytest.approx([320 - 48, 240, 48, 160])
    clipped = boxes_in(kp, [rectangle("a", 90, 90, 25, 25)], 100, 100)[0]
    assert clipped.tolist() == pytest.approx([90, 90, 10, 10])
    assert boxes_in(one(NO_BOX)[1], [rectangle("a", 10, 20, 50, 50)]) == []
    unlabelled = rectangle("a", 10, 20, 50, 50)
    unlabelled["value"]["rectanglelabels"] = []
    assert len(boxes_in(kp, [unlabelled])) == 1


def test_a_shared_box_control_gives_each_kind_its_boxes() -> None:
    config = parse("""<View><Image name="image" value="$image"/>
      <RectangleLabels name="box" toName="image"><Label value="cat"/><Label value="dog"/></RectangleLabels>
      <KeyPointLabels name="cat" toName="image"><Label value="a"/></KeyPointLabels>
      <KeyPointLabels name="dog" toName="image"><Label value="b"/></KeyPointLabels></View>""")
    place = {"x": 1, "y": 1, "width": 9, "height": 9}
    drawn = [rectangle(n, 1, 1, 9, 9, from_name="box", value={**place, "rectanglelabels": [n]}) for n in ("cat", "dog")]
    assert [[b.region_id for b in read_result(c, drawn).boxes] for c in config.controls] == [["cat"], ["dog"]]


KEYS = ["id", "from_name", "to_name", "type", "value", "x", "y", "width", "keypointlabels", "parentID", "origin"]
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["kp", "image", "nose"])
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8)
)


@given(JUNK)
@settings(max_examples=80, deadline=None)
def test_nothing_that_json_can_hold_breaks_the_reader(junk: Any) -> None:
    _, kp = one(WITH_BOX)
    found = [
        junk,
        *(region("nose", **{key: junk}) for key in ("id", "parentID", "type", "value", "origin", "original_width")),
    ]
    if isinstance(junk, dict):
        found += [{**region("nose"), **junk}, region("nose", value={"keypointlabels": ["nose"], **junk})]
    found += [{**rectangle("a", 1, 1, 5, 5), "value": junk}, {**hidden(region("nose")), "value": junk, "id": junk}]
    read_result(kp, found)


# ---------------------------------------------------------------- the judge


def good() -> dict[str, Any]:
    config, kp = one(WITH_BOX)
    return to_prediction(config, [(kp, points(XY, (1, 2, 2)))], W, H, "v")


def spoil(path: str, value: Any) -> dict[str, Any]:
    prediction = good()
    *steps, last = path.split(".")
    at: Any = prediction
    for step in steps:
        at = at[int(step)] if isinstance(at, list) else at[step]
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return prediction


# good(): 0 box, 1 nose, 2 nose's choice, 3 left_eye, 4 right_eye
SPOILED = [
    ("model_version", None, "model_version is None"), ("model_version", "", "model_version is ''"), ("score", float("nan"), "score is nan"),
    ("score", 2, "score is 2"), ("result", None, "list 'result'"), ("result.1.value.x", -1.0, "x is -1.0"),
    ("result.1.value.y", float("inf"), "y is inf"), ("result.1.value.x", "5", "x is '5'"), ("result.1.value.width", KeyError, "width is None"),
    ("result.1.value.width", 0, "width is 0"), ("result.1.value.height", 0.5, "no height"),
    ("result.1.value.keypointlabels", [], "at least one label"),
    ("result.1.value.keypointlabels", ["tail"], "'tail' is not in 'kp'"), ("result.1.from_name", "kq", "'kq' is not in the config"),
    ("result.1.to_name", "img", "'img' is not what"), ("result.1.type", "keypoint", "does not fit"), ("result.1.id", KeyError, "no id"),
    ("result.3.parentID", "nobody", "'nobody' is no box"), ("result.1.score", 1.5, "score is 1.5"), ("result.3.original_width", 0, "original_width"),
    ("result.3.image_rotation", 90, "image_rotation"), ("result.2.value.x", 11.0, "is taken"), ("result.2.id", "other", "without the region"),
    ("result.2.value.choices", ["gone"], "'gone' is not in 'vis'"), ("result.1.value", None, "no value"),
    ("result.0.value.width", 101, "width is 101"),
    ("result.0.value.height", KeyError, "height is None"), ("result.0.id", "b", "is no box"), ("result.1", 7, "no objects"),
    ("result.1.meta", {1, 2}, "not plain JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), SPOILED, ids=[f"{p}={v}" for p, v, _ in SPOILED])
def test_the_judge_refuses(path: str, value: Any, said: str) -> None:
    check_prediction(WITH_BOX, good(), sdk=False)
    prediction = spoil(path, value) if not path.endswith(".1") else {**good(), "result": [*good()["result"], value]}
    with pytest.raises(InvalidInput, match=said.replace("(", r"\(")):
        check_prediction(WITH_BOX, prediction, sdk=False)


def test_the_judge_refuses_ids_that_collide() -> None:
    prediction = good()
    prediction["result"][3]["id"] = prediction["result"][4]["id"]
    with pytest.raises(InvalidInput, match="is taken"):
        check_prediction(WITH_BOX, prediction)
    with pytest.raises(InvalidInput, match="no object"):
        check_prediction(WITH_BOX, [prediction])


def test_the_sdk_is_asked_too() -> None:
    pytest.importorskip("label_studio_sdk")
    rating = WITH_BOX.replace("</View>", '<Number name="n" toName="image" perRegion="true"/></View>')
    config, kp = one(rating)
    prediction = to_prediction(config, [(kp, points(XY))], W, H, "v")
    check_prediction(rating, prediction)
    prediction["result"].append({"type": "relation", "from_id": "no", "to_id": "where"})
    check_prediction(rating, prediction, sdk=False)
    with pytest.raises(InvalidInput, match=r"(?i)relation"):
        check_prediction(rating, prediction)
