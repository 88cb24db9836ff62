"""The class contract: N tasks in, N results out; versions, boxes, clicks, support; whatever fails, and for whom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from backend.model import KptLLMBackend
from backend.tables import Predicted
from backend_world import CONFIG, WITH_BOX, World, picture, placed, rectangle, world
from kptllm_core.errors import InvalidInput, SchemaError, Unavailable
from kptllm_core.keypoints import KeypointSet
from label_config.checks import check_prediction
from small_server import Answer


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def asked(here: World) -> list[dict[str, Any]]:
    """Record what the model is asked; its answers stay what they are."""
    calls: list[dict[str, Any]] = []
    real = here.predictor.predict

    def predict(images: list[np.ndarray], schema: Any, **options: Any) -> list[KeypointSet]:
        calls.append({"schema": schema, "images": len(images), **options})
        return real(images, schema, **options)

    really_all = here.predictor.predict_objects

    def predict_objects(images: list[np.ndarray], schema: Any, boxes: Any, **options: Any) -> list[list[Any]]:
        calls.append({"schema": schema, "images": len(images), "boxes": list(boxes[0]), **options})
        return really_all(images, schema, boxes, **options)

    here.predictor.predict = predict  # type: ignore[method-assign]
    here.predictor.predict_objects = predict_objects  # type: ignore[method-assign]
    return calls


def test_every_prediction_stands_before_both_judges(here: World) -> None:
    (prediction,) = here.predict(here.task(1))
    check_prediction(CONFIG, prediction)
    assert set(placed(prediction)) == {"nose", "tail", "ear"}
    assert prediction["model_version"] == here.setup().get_json()["model_version"] == "timed-00000000+r0+s0.f1951d"


def test_a_core_that_was_never_seen_lends_the_models_name(here: World) -> None:
    here.stop_core()
    assert here.setup().get_json()["model_version"] == "timed+r0+s0.f1951d"
    (prediction,) = here.predict(here.task(1))
    assert prediction["model_version"] == "timed+r0+s0.f1951d+retry"


def test_a_batch_survives_each_kind_of_bad_task(here: World) -> None:
    here.studio.routes["/data/upload/1/bad.png"] = Answer(body=b"no image")
    bad: list[Any] = [
        {"id": 7, "data": {"image": "/data/upload/1/404.png"}},
        {"id": 8, "data": {"image": "/data/upload/1/bad.png"}},
        {"id": 9, "data": {}},
        {"id": 10},
        "task",
        None,
        {"id": 11, "data": {"image": "/etc/passwd"}},
        {"id": 12, "data": {"image": "http://169.254.169.254/x.png"}},
        {"id": [], "data": {"image": {"a": 1}}},
    ]
    tasks = [here.task(1), *bad, here.task(2) | {"id": [2]}]
    results = here.predict(*tasks)
    assert len(results) == len(tasks)
    assert [bool(r["result"]) for r in results] == [True, *[False] * len(bad), True]
    version = here.setup().get_json()["model_version"]
    for result in results[1:-1]:
        assert result["score"] == 0.0
        assert result["error"]["message"]
        assert result["model_version"] == version


def test_more_tasks_than_one_request_holds_keep_their_order(here: World) -> None:
    results = here.predict(*[here.task(n) for n in (5, 250, *range(10, 28))])
    xs = [placed(r)["nose"][0] for r in results]
    assert xs.index(max(xs)) == 1
    assert xs[2:] == sorted(xs[2:])


def test_no_annotation_yet_means_text_alone_then_examples_serve(here: World) -> None:
    calls = asked(here)
    here.predict(here.task(50))
    assert calls[-1]["support"] == []
    assert calls[-1]["prompt"] == "auto"
    here.label(1, 2)
    (prediction,) = here.predict(here.task(50))
    support = calls[-1]["support"]
    assert prediction["model_version"].split("+s")[1].startswith("2.")
    assert {e.keypoints.names for e in support} == {("nose", "tail", "ear")}
    assert np.allclose(support[0].keypoints.xy, [(6.4, 24.0), (19.2, 24.0), (32.0, 24.0)])


@pytest.mark.parametrize(("said", "known"), [((128, 96), True), ((640, 120), True), ((96, 128), False)])
def test_an_example_that_is_wrong_about_its_images_size(here: World, said: tuple[int, int], known: bool) -> None:
    """Programs write annotations, too. Per cent are per cent of the image as it is, unless it is turned."""
    calls = asked(here)
    annotation = here.annotation(1)
    for drawn in annotation["result"]:
        drawn["original_width"], drawn["original_height"] = said
    here.webhook("ANNOTATION_CREATED", annotation=annotation, task=here.task(1))
    here.predict(here.task(50))
    support = calls[-1]["support"]
    assert len(support) == known
    if known:
        assert np.allclose(support[0].keypoints.xy, [(6.4, 24.0), (19.2, 24.0), (32.0, 24.0)])
        assert here.client.get("/projects/1/", headers={"Accept": "text/html"}).status_code == 200


def test_an_example_whose_image_is_gone_is_left_out(here: World) -> None:
    calls = asked(here)
    here.label(1, 2)
    here.studio.routes["/data/upload/1/1.png"] = Answer(404)
    (prediction,) = here.predict(here.task(50))
    assert prediction["result"]
    assert len(calls[-1]["support"]) == 1


def test_label_studio_down_predictions_go_on_without_the_examples_that_are_lost(here: World) -> None:
    here.label(1)
    (before,) = here.predict(here.task(50))
    for sha in list(here.core.images._sizes):
        here.core.images._drop(sha)
    here.services.core._there.clear()
    here.core.engine._pixels._kept.clear()
    shutil.rmtree(here.settings.data_dir / "images")
    here.studio.routes["/data/upload/1/1.png"] = Answer(503)
    (after,) = here.predict(here.task(50))
    assert after["result"]
    assert after["model_version"] == before["model_version"]


def test_the_boxes_of_the_newest_annotation_are_the_objects(here: World) -> None:
    calls = asked(here)
    old = {"id": 1, "result": [rectangle(0, 0, 10, 10)], "updated_at": "2026-01-01T00:00:00Z"}
    new = {
        "id": 2,
        "result": [rectangle(25, 25, 50, 50), rectangle(1, 2, 10, 10)],
        "updated_at": "2026-01-02T00:00:00Z",
    }
    skipped = {"id": 3, "result": [rectangle(5, 5, 5, 5)], "updated_at": "2026-01-03T00:00:00Z", "was_cancelled": True}
    (prediction,) = here.predict(here.task(1, annotations=[old, new, skipped]), config=WITH_BOX)
    boxes = [None if b is None else [round(float(v), 2) for v in b] for b in calls[-1]["boxes"]]
    assert boxes == [[16.0, 12.0, 32.0, 24.0], [0.64, 0.96, 6.4, 4.8]] and calls[-1]["find"] is True
    assert [r["score"] for r in boxes_of(prediction)] == [1.0, 1.0, 0.8, 0.4]  # two drawn, two found
    check_prediction(WITH_BOX, prediction)
    only = WITH_BOX.replace('<KeyPointLabels name="kp"', '<KeyPointLabels model_find_objects="false" name="kp"')
    (prediction,) = here.predict(here.task(1, annotations=[old, new, skipped]), config=only)
    assert [r["score"] for r in boxes_of(prediction)] == [1.0, 1.0]
    assert calls[-1]["find"] is False and len(calls[-1]["boxes"]) == 2  # asked together: no point is used by two


def test_boxes_that_cannot_be_used_are_told(here: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    calls = asked(here)
    turned = rectangle(50, 25, 50, 50, id="turned")
    turned["value"]["rotation"] = 90
    drawn = [rectangle(10, 10, 0, 10, id="flat"), rectangle(110, 110, 10, 10, id="out"), turned]
    here.predict(here.task(1, annotations=[{"id": 1, "result": drawn, "updated_at": "2026-01-01T00:00:00Z"}]), config=WITH_BOX)
    ((x, y, w, h),) = calls[-1]["boxes"]  # the upright box around the turned one
    assert [x, y, w, h] == pytest.approx([8.0, 12.0, 24.0, 32.0], abs=1e-3)
    assert all(any(name in message for message in caplog.messages) for name in ("flat", "out"))


def boxes_of(prediction: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in prediction["result"] if r["type"] == "rectanglelabels"]


def test_every_found_object_is_a_box_with_its_points(here: World) -> None:
    (prediction,) = here.predict(here.task(1), config=WITH_BOX)
    check_prediction(WITH_BOX, prediction)
    left, right = boxes_of(prediction)
    assert [(b["score"], b["value"]["x"], b["value"]["width"]) for b in (left, right)] == [(0.8, 0, 50), (0.4, 50, 50)]
    parents = [r["parentID"] for r in prediction["result"] if r["type"] == "keypointlabels"]
    assert parents == [left["id"]] * 3 + [right["id"]] * 3
    (draft,) = here.predict(here.task(1, drafts=[{"result": [rectangle(10, 10, 20, 20)]}]), config=WITH_BOX)
    assert [b["score"] for b in boxes_of(draft)] == [1.0, 0.8, 0.4]


def test_objects_below_the_threshold_were_not_found(here: World) -> None:
    config = WITH_BOX.replace('<KeyPointLabels name="kp"', '<KeyPointLabels model_score_threshold="0.5" name="kp"')
    drawn = {"id": 1, "result": [rectangle(25, 25, 50, 50)], "updated_at": "2026-01-01T00:00:00Z"}
    (prediction,) = here.predict(here.task(1, annotations=[drawn]), config=config)
    assert [b["score"] for b in boxes_of(prediction)] == [1.0, 0.8]
    (kept,) = kept_rows(here)
    assert kept["kp:image"]["scores"] == [1.0, 0.8] and len(kept["kp:image"]["objects"]) == 2
    assert kept["kp:image"]["boxes"] == [[16.0, 12.0, 32.0, 24.0]]  # what it was given, not what it found


def kept_rows(here: World) -> list[dict[str, Any]]:
    with here.services.journal.reading() as session:
        return [row.controls or {} for row in session.scalars(select(Predicted).order_by(Predicted.id))]


# The image of task 0 is so dark that the model sees nothing in it.


def test_an_image_without_objects_is_an_empty_prediction_and_no_error(here: World) -> None:
    (prediction,) = here.predict(here.task(0), config=WITH_BOX)
    assert prediction["result"] == [] and prediction["score"] == 0.0 and "error" not in prediction
    assert prediction["model_version"] == here.setup(WITH_BOX).get_json()["model_version"]  # Label Studio does not ask again
    (kept,) = kept_rows(here)
    assert kept["kp:image"]["objects"] == [] and kept["kp:image"]["size"] == [64, 48]


def test_five_hundred_drawn_boxes_are_answered_and_more_are_refused_in_words(here: World) -> None:
    for count in (500, 501):
        crowd = [rectangle(i % 90, i // 90, 5, 5, id=f"b{i}") for i in range(count)]
        task = here.task(0, annotations=[{"id": 1, "result": crowd, "updated_at": "2026-01-01T00:00:00Z"}])
        (prediction,) = here.predict(task, config=WITH_BOX)
        if count == 500:
            assert len(boxes_of(prediction)) == 500
        else:
            assert prediction["result"] == [] and "at most 500" in prediction["error"]["message"]


def test_without_boxes_to_draw_one_object_is_predicted(here: World) -> None:
    config = WITH_BOX.replace('<KeyPointLabels name="kp"', '<KeyPointLabels model_add_bboxes="false" name="kp"')
    (prediction,) = here.predict(here.task(1), config=config)
    assert [r["type"] for r in prediction["result"]] == ["keypointlabels"] * 3


def test_our_own_earlier_boxes_are_no_truth_but_another_models_are(here: World) -> None:
    calls = asked(here)
    ours = {"result": [rectangle(0, 0, 10, 10)], "model_version": "nano-12345678+r2+s5.9f31ab"}
    here.predict(here.task(1, predictions=[ours]), config=WITH_BOX)
    assert calls[-1]["boxes"] == []
    detector = {"result": [rectangle(50, 50, 50, 50)], "model_version": "yolo"}
    here.predict(here.task(1, predictions=[ours, detector]), config=WITH_BOX)
    assert [float(v) for v in calls[-1]["boxes"][0]] == [32.0, 24.0, 32.0, 24.0]


def test_objects_are_not_looked_for_where_people_draw_the_boxes(here: World) -> None:
    config = WITH_BOX.replace('<KeyPointLabels name="kp"', '<KeyPointLabels model_find_objects="false" name="kp"')
    (prediction,) = here.predict(here.task(1), config=config)
    assert prediction["result"] == []
    assert "error" not in prediction


@pytest.mark.parametrize(
    "context", [{}, {"result": None}, {"result": [None, 1]}, {"result": [{}]}, "x", {"result": [{"value": []}]}, {"result": [{"from_name": ["kp"]}]}]
)
def test_odd_contexts_do_no_harm(here: World, context: Any) -> None:
    assert here.predict(here.task(1), context=context)[0]["result"]


def test_two_controls_on_two_images_are_asked_apart(here: World) -> None:
    config = """<View><Image name="front" value="$front"/><Image name="back" value="$back"/>
    <KeyPointLabels name="a" toName="front"><Label value="nose"/></KeyPointLabels>
    <KeyPointLabels name="b" toName="back"><Label value="tail"/><Label value="hip"/></KeyPointLabels></View>"""
    here.task(1)
    here.task(2)
    both = {"id": 9, "data": {"front": "/data/upload/1/1.png", "back": "/data/upload/1/2.png"}}
    one = {"id": 10, "data": {"front": "/data/upload/1/1.png", "back": "/data/upload/1/404.png"}}
    first, second = here.predict(both, one, config=config)
    assert {(r["from_name"], r["to_name"]) for r in first["result"]} == {("a", "front"), ("b", "back")}
    assert {r["from_name"] for r in second["result"]} == {"a"}
    check_prediction(config, first)


def test_a_dead_core_gives_empty_results_that_are_asked_for_again(here: World) -> None:
    here.setup()
    here.keeper.tick()
    version = here.setup().get_json()["model_version"]
    here.stop_core()
    results = here.predict(*[here.task(n) for n in range(20)])
    assert len(results) == 20
    assert all(r["result"] == [] and r["score"] == 0.0 for r in results)
    assert {r["model_version"] for r in results} == {version + "+retry"}
    assert "cannot be reached" in results[0]["error"]["message"]
    assert here.setup().get_json()["model_version"] == version


def test_no_time_left_is_said_and_not_overrun(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.model.PREDICT_SECONDS", 2.0)
    here.predictor.seconds = 0.7
    results = here.predict(*[here.task(n) for n in range(60)])
    done = [bool(r["result"]) for r in results]
    assert len(results) == 60
    assert done[0] and not done[-1]
    assert results[-1]["model_version"].endswith("+retry")


def test_an_adapter_that_the_core_refuses_is_set_aside_and_the_previous_version_serves(here: World) -> None:
    here.label(*range(1, 13))
    before = here.setup().get_json()["model_version"]
    assert here.play_round()["promoted"] is True
    promoted = here.setup().get_json()["model_version"]
    assert "+r1+" in promoted
    for path in (here.folder / "core/adapters").rglob("adapter.json"):
        path.unlink()
    here.core.engine._active = object()
    (prediction,) = here.predict(here.task(50))
    assert prediction["result"]
    now = here.setup().get_json()["model_version"]
    assert prediction["model_version"] == now
    assert "+r0+" in now
    assert before
    (row,) = [v for v in here.status()["versions"] if v["model_version"] == promoted]
    assert not row["promoted"]
    assert "Set aside" in row["reason"]


def test_one_odd_answer_on_the_way_to_the_core_demotes_nothing(here: World) -> None:
    here.label(*range(1, 13))
    assert here.play_round()["promoted"] is True
    trained = here.setup().get_json()["model_version"]
    real, odd = here._server.app, iter([True])

    def once(environ: Any, start: Any) -> Any:
        if environ["PATH_INFO"] == "/predict" and next(odd, False):
            start("200 OK", [("Content-Type", "text/html")])
            return [b"<html>please log in</html>"]
        return real(environ, start)

    here._server.app = once
    (prediction,) = here.predict(here.task(50))
    assert prediction["model_version"] == f"{trained}+retry" and "than agreed" in prediction["error"]["message"]
    (prediction,) = here.predict(here.task(50))
    assert prediction["model_version"] == trained and prediction["result"]


def test_a_task_that_breaks_the_code_leaves_the_others_theirs(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.prediction.image_size", lambda data: 1 / 0 if data == picture(2) else (64, 48))
    monkeypatch.setattr("backend.prediction.control_row", lambda *_: 1 / 0)
    first, second = here.predict(here.task(1), here.task(2))
    assert "cannot be told" in first["error"]["message"] and "cannot be read" in second["error"]["message"]


def test_a_core_with_another_base_makes_another_version(here: World) -> None:
    here.label(1)
    here.keeper.tick()
    here.predictor.base = "timed-11111111"  # type: ignore[misc]
    (prediction,) = here.predict(here.task(50))
    assert prediction["result"]
    assert prediction["model_version"].startswith("timed-11111111+r0+s1.")


def test_the_class_keeps_label_studio_mls_contract(here: World) -> None:
    backend = KptLLMBackend(project_id="1", label_config=CONFIG)
    backend.setup()
    assert backend.get("model_version") == backend.model_version == "timed-00000000+r0+s0.f1951d"
    assert backend.has("model_version")
    (prediction,) = backend.predict([here.task(1)], context={}, login=None, password=None)
    assert prediction["result"]
    answer = backend.fit("ANNOTATION_CREATED", {"annotation": here.annotation(1), "task": here.task(1)}, job_id=1)
    assert answer == {"status": "ok", "new": 1}
    json.dumps(backend.fit("START_TRAINING", {}))
    with pytest.raises(InvalidInput):
        KptLLMBackend(project_id=None, label_config=CONFIG)
    with pytest.raises(SchemaError):
        KptLLMBackend(project_id="1", label_config="<View/>")


def test_it_subclasses_label_studio_mls_base_where_that_is_installed(tmp_path: Path) -> None:
    """The real package is on no index; what counts is that its init_app's issubclass holds and its routes' calls work."""
    import subprocess
    import sys

    package = tmp_path / "label_studio_ml"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(
        "class LabelStudioMLBase:\n    def __init__(self, *a, **k):\n        raise AssertionError('ours is used')\n"
    )
    code = "from label_studio_ml.model import LabelStudioMLBase as B; from backend.model import KptLLMBackend as K; print(issubclass(K, B))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; {code}"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    ("event", "data", "new"),
    [
        ("ANNOTATION_CREATED", lambda w: {"annotation": w.annotation(1), "task": w.task(1)}, 1),
        (
            "ANNOTATIONS_CREATED",
            lambda w: {"annotation": [w.annotation(1), w.annotation(2)], "task": [w.task(1), w.task(2)]},
            2,
        ),
        ("ANNOTATION_UPDATED", lambda w: {"annotation": w.annotation(1) | {"task": {"id": 1}}, "task": w.task(1)}, 1),
        (
            "ANNOTATION_CREATED",
            lambda w: {"annotation": {k: v for k, v in w.annotation(1).items() if k != "task"}, "task": w.task(1)},
            1,
        ),
        ("ANNOTATIONS_CREATED", lambda w: {"annotations": [w.annotation(1)], "tasks": [w.task(1)]}, 1),
        ("ANNOTATION_CREATED", lambda w: {}, 0),
        ("ANNOTATION_CREATED", lambda w: {"annotation": {"id": 5}}, 0),
        ("ANNOTATION_CREATED", lambda w: {"annotation": [1, None, "x"]}, 0),
    ],
)
def test_events_of_every_form_are_stored_or_left_to_the_sweep(here: World, event: str, data: Any, new: int) -> None:
    here.setup()
    answer = here.webhook(event, **data(here))
    assert answer.status_code == 200
    assert answer.get_json()["new"] == new
    assert here.status()["labelled"] == new


def test_deletions_by_ids_of_every_form(here: World) -> None:
    here.label(1, 2, 3)
    assert here.webhook("ANNOTATIONS_DELETED", annotations=[{"id": 1001}]).get_json()["deleted"] == 1
    assert here.webhook("ANNOTATION_DELETED", annotation={"id": 1002}).get_json()["deleted"] == 1
    assert here.webhook("TASKS_DELETED", tasks=[{"id": 3}]).get_json()["deleted"] == 1
    assert here.webhook("ANNOTATIONS_DELETED", annotations=[]).status_code == 400
    assert here.status()["labelled"] == 0


def test_below_min_train_the_answer_says_so(here: World) -> None:
    here.label(1, 2, 3)
    answer = here.webhook("START_TRAINING").get_json()
    assert answer["job"] is None
    assert "3 of 10 labelled images" in answer["message"]


def test_unavailable_is_one_of_ours() -> None:
    assert Unavailable.status == 503
    assert picture(1) != picture(2)
