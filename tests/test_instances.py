"""Boxes of objects: which cell answers for which object, what the loss wants, and windows over large images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kptllm_core import objects
from kptllm_core.claims import claims, yielded
from kptllm_core.errors import DataError
from kptllm_core.finder import MAX_WINDOWS, WINDOW, Found, find, windows
from kptllm_core.geometry import Crop
from kptllm_core.instances import Detected, assign, box_iou, distinct, instances_loss, overlap
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.passes import Passes
from kptllm_core.predictor import Example, load_predictor
from kptllm_core.support import usual_points
from kptllm_core.sureness import least_seen
from kptllm_core.synthetic import Category


def test_cells_answer_for_the_object_whose_middle_they_are_in() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.6, 0.6], [0.0, 0.0, 0.0, 0.0]]])
    index = assign(boxes, torch.tensor([2]), 10, 10).view(10, 10)
    assert index[0, 0] == -1 and index[3, 3] == 0 and index[4, 4] == 1 and index[5, 5] == 1  # the smaller one has it
    assert (assign(boxes, torch.tensor([0]), 10, 10) == -1).all()
    tiny = torch.tensor([[[0.51, 0.51, 0.53, 0.53]]])
    assert assign(tiny, torch.tensor([1]), 10, 10).view(10, 10).nonzero().tolist() != []  # however small, one cell has it


def test_the_loss_is_least_for_the_right_boxes_with_sure_scores() -> None:
    true, count = torch.tensor([[[0.2, 0.2, 0.6, 0.7]]]), torch.tensor([1])
    index = assign(true, count, 10, 10)

    def answer(boxes: torch.Tensor, score: torch.Tensor) -> float:
        return float(instances_loss(Detected(boxes, score), true, count, 10, 10))

    right = true.expand(1, 100, 4)
    sure = torch.where(index >= 0, 6.0, -6.0)
    best = answer(right, sure)
    assert best < 0.01 < min(answer(right + 0.1, sure), answer(right, -sure), answer(right, torch.zeros(1, 100)))
    nothing = float(instances_loss(Detected(right, torch.full((1, 100), -6.0)), true, torch.tensor([0]), 10, 10))
    assert nothing < 0.01


def test_overlaps() -> None:
    one = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    other = torch.tensor([[0.5, 0.0, 1.5, 1.0], [2.0, 0.0, 3.0, 1.0]])
    same, wider = overlap(one, other)
    torch.testing.assert_close(same, torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(wider, torch.tensor([1 / 3, -1 / 3]))
    assert box_iou(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 2, 2], [5, 5, 1, 1]])) == pytest.approx(np.array([[1 / 3, 0]]))
    assert box_iou(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)


def test_one_box_for_each_object() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [30, 0, 10, 10], [0, 0, 10, 10]], float)
    assert distinct(boxes, np.array([0.5, 0.9, 0.3, 0.4])).tolist() == [1, 2]
    assert distinct(boxes, np.array([0.5, 0.9, 0.3, 0.4]), most=1).tolist() == [1]


class Square:
    """Detects dark squares: what a perfect head would say of a window."""

    def __init__(self, objects: Sequence[Sequence[float]]) -> None:
        self.objects, self.crops = np.array(objects, float).reshape(-1, 4), 0

    def __call__(self, crops: Sequence[Crop]) -> tuple[np.ndarray, np.ndarray]:
        self.crops += len(crops)
        boxes, scores = [], []
        for crop in crops:
            corners = [crop.to_crop(np.array([[x, y], [x + w, y + h]])).ravel() / crop.size for x, y, w, h in self.objects]
            seen = [max(c[2] - c[0], c[3] - c[1]) for c in corners]
            boxes.append([np.clip(c, 0, 1) for c in corners])
            inside = [c[2] > 0 and c[3] > 0 and c[0] < 1 and c[1] < 1 for c in corners]
            scores.append([float(i) * (0.9 if s > 0.1 else 0.0) for i, s in zip(inside, seen, strict=True)])  # too small is not seen
        count = len(self.objects)
        return np.array(boxes).reshape(len(crops), count, 4), np.array(scores).reshape(len(crops), count)


def test_small_objects_of_a_large_image_are_found_in_windows() -> None:
    objects = [[100, 100, 40, 30], [700, 500, 40, 30], [880, 20, 40, 40], [118, 300, 30, 40]]
    alone = find(Square(objects), 960, 640, None, 160)
    assert len(alone.boxes) == 0
    found = find(Square(objects), 960, 640, 40 / 960, 160)
    assert sorted(map(tuple, found.boxes.round().tolist())) == sorted(map(tuple, objects)) and (found.score == 0.9).all()
    assert isinstance(find(Square([]), 960, 640, 0.5, 160), Found)


def test_the_number_of_windows_is_bounded() -> None:
    bounded = windows(4000, 3000, 20 * WINDOW, 160)
    assert len(bounded) <= MAX_WINDOWS
    corners = np.stack([crop.to_image(np.array([[0.0, 0.0], [160.0, 160.0]])) for crop in bounded])
    assert 20 / (corners[0, 1] - corners[0, 0])[0] * 160 > 16  # what a bee of 20 pixels is in a window of such an image
    for bee in np.random.default_rng(0).uniform(0, [3980, 2980], (200, 2)):
        assert ((corners[:, 0] <= bee + 0.5) & (corners[:, 1] >= bee + 19.5)).all(1).any()  # it lies whole in one of them
    eye = Square([[10, 10, 20, 20]])
    find(eye, 20000, 15000, 0.001, 160)
    assert eye.crops <= MAX_WINDOWS + 1


def test_support_for_scenes_comes_from_elsewhere(tmp_path: Path) -> None:
    from dataclasses import dataclass

    from kptllm_core.crowds import draw_support

    @dataclass(frozen=True)
    class Item:
        image_path: Path
        group: str

    pool = [Item(tmp_path / f"{i}.jpg", f"video {i // 3}") for i in range(12)]
    for item in pool:
        item.image_path.touch()
    rng = np.random.default_rng(0)
    chosen = draw_support(pool, [[pool[0]], [pool[3]]], 4, rng)  # type: ignore[arg-type, list-item]
    assert len(set(chosen)) == 4 and all(c.group in ("video 2", "video 3") for c in chosen)
    assert all(c.image_path.name != "0.jpg" for c in draw_support(pool, [[pool[0]]], 10, rng))  # type: ignore[arg-type, list-item]
    with pytest.raises(DataError, match="11 objects are left"):
        draw_support(pool, [[pool[0]]], 12, rng)  # type: ignore[arg-type, list-item]


def test_a_point_belongs_to_the_surer_object() -> None:
    names = ("nose", "tail")
    one = KeypointSet(names, np.array([[10, 10], [50, 50]], float), np.full(2, 2), np.array([0.9, 0.3]), np.array([0, 0, 60, 60.0]))
    other = KeypointSet(names, np.array([[11, 10], [50, 51]], float), np.full(2, 2), np.array([0.5, 0.8]), np.array([5, 5, 60, 60.0]))
    far = KeypointSet(names, np.array([[10, 10], [50, 50]], float), np.full(2, 2), np.array([0.1, 0.1]), np.array([100, 100, 60, 60.0]))
    taken = claims([one, other, far], [1, 1, 1])
    assert {k: [p[:2] for p in v] for k, v in taken[1].items()} == {0: [(10.0, 10.0)]}
    assert {k: [p[:2] for p in v] for k, v in taken[0].items()} == {1: [(50.0, 51.0)]}
    assert taken[2] == {}  # its box touches none of the others
    left = yielded([one, other, far], [1, 1, 1])
    assert [o.placed.tolist() for o in left] == [[True, False], [False, True], [True, True]]
    assert one.placed.all()
    assert [bool(t) for t in claims([one, other, far], [0, 1, 1])] == [True, False, False]  # the first is too faint to be shown
    assert [o.placed.tolist() for o in yielded([one, other, far], [2, 1, 1])] == [[True, True], [False, False], [True, True]]


def test_what_has_lost_a_point_takes_it_from_nobody() -> None:
    box = np.array([0, 0, 100, 100.0])
    at = [KeypointSet(("nose",), np.array([[x, 10.0]]), np.full(1, 2), np.array([s]), box) for x, s in ((10, 0.9), (13, 0.8), (16, 0.7))]
    assert [bool(o.placed[0]) for o in yielded(at, [1, 1, 1])] == [True, False, True]


def test_no_point_is_used_by_two_objects_that_lie_on_each_other() -> None:
    """Two people draw nearly the same box: by itself each would get the same points."""
    predictor = load_predictor("tiny")
    category, rng = Category.sample(np.random.default_rng(3)), np.random.default_rng(4)
    (shown, points), (image, truth) = category.render(rng, 96), category.render(rng, 96)
    assert truth.box is not None
    boxes = np.stack([truth.box, truth.box + [1, 0, 0, 0], truth.box])
    alone = predictor.predict([image] * 2, category.schema, [Example(shown, points)], list(boxes[:2]))
    assert any(claims(alone, [1, 1]))
    (found,) = predictor.predict_objects([image], category.schema, [Example(shown, points)], [boxes], find=False)
    assert len(found) == 3 and not any(claims([i.keypoints for i in found], [1, 1, 1]))
    assert sum(int(i.keypoints.placed.sum()) for i in found) > len(category.schema)  # the others found other places


def test_drawing_one_object_changes_nothing_about_another() -> None:
    predictor = load_predictor("nano")
    category, rng = Category.sample(np.random.default_rng(5)), np.random.default_rng(6)
    support = [Example(*category.render(rng, 256))]
    image = np.concatenate([category.render(rng, 256)[0] for _ in range(2)], 1)
    (found,) = predictor.predict_objects([image], category.schema, support, least=0.01)
    left = next(i for i in found if i.keypoints.box is not None and i.keypoints.box[[0, 2]].sum() < 256)
    right = next(i for i in found if i.keypoints.box is not None and i.keypoints.box[0] > 256)
    for drawn, other in ((left, right), (right, left)):
        assert drawn.keypoints.box is not None
        (again,) = predictor.predict_objects([image], category.schema, support, [drawn.keypoints.box[None]], least=0.01)
        assert again[0].score == 1.0 and (again[0].keypoints.box == drawn.keypoints.box).all()
        assert any(i.score == pytest.approx(other.score, abs=1e-3) and np.allclose(i.keypoints.box, other.keypoints.box) for i in again[1:])


def test_boxes_too_faint_to_be_shown_cost_no_points(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor("nano")
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(8)
    support = [Example(*category.render(rng, 256))]
    image = np.concatenate([category.render(rng, 256)[0] for _ in range(2)], 1)
    crops: list[int] = []
    really = Passes.points

    def counted(self: Passes, images: Sequence[np.ndarray], *args: Any, **options: Any) -> list[KeypointSet]:
        crops.append(len(images))
        return really(self, images, *args, **options)

    monkeypatch.setattr(Passes, "points", counted)
    (shown,) = predictor.predict_objects([image], category.schema, support)
    few = sum(crops)
    crops.clear()
    monkeypatch.setattr(objects, "least_seen", lambda least, weights, surest=0.0: least_seen(least, weights))  # as if nobody led
    (every,) = predictor.predict_objects([image], category.schema, support)
    assert few < sum(crops) and len(shown) == len(every) > 0
    for one, other in zip(shown, every, strict=True):
        assert one.keypoints.box == pytest.approx(other.keypoints.box) and one.score == pytest.approx(other.score, abs=0.1)


def test_one_point_does_not_tell_how_far_its_object_reaches() -> None:
    predictor = load_predictor("nano")
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(8)
    shown, points = category.render(rng, 256)
    image, _ = category.render(rng, 256)
    one = KeypointSchema(category.schema.names[:1])
    example = Example(shown, KeypointSet(one.names, points.xy[:1], points.visibility[:1], box=points.box))
    (found,) = predictor.predict_objects([image], one, [example], least=0.0)
    assert found and all(min(i.keypoints.box[2:]) > 16 for i in found if i.keypoints.box is not None)
    prompt = predictor._prompt(one, [example], "both")
    assert not prompt.points_tell_boxes and predictor._prompt(category.schema, [Example(shown, points)], "both").points_tell_boxes
    assert not predictor._prompt(category.schema, [], "text").points_tell_boxes


def test_drawn_objects_do_not_use_up_what_may_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor("nano")
    category, rng = Category.sample(np.random.default_rng(3)), np.random.default_rng(4)
    support, (image, truth) = [Example(*category.render(rng, 96))], category.render(rng, 96)
    assert [len(predictor.find_objects(image, category.schema, support, least=0.0, most=most).boxes) for most in (2, 5)] == [2, 5]
    looked_at: list[int] = []
    monkeypatch.setattr(objects.finder, "find", lambda *args: looked_at.append(args[-1]) or Found(np.zeros((0, 4)), np.zeros(0)))
    for drawn, most in ((0, 100), (2, 100), (2, 1)):
        (found,) = predictor.predict_objects([image], category.schema, support, [np.repeat(np.asarray(truth.box)[None], drawn, 0)], most=most)
        assert len(found) == drawn
    assert looked_at == [100, 102, 5]


def test_a_whole_image_is_asked_by_names_alone() -> None:
    predictor = load_predictor("nano")
    category = Category.sample(np.random.default_rng(3))
    image, _ = category.render(np.random.default_rng(4), 96)
    (found,) = predictor.predict_objects([image], category.schema, least=0.0, most=5)
    assert len(found) == 5 and [i.score for i in found] == sorted((i.score for i in found), reverse=True)
    assert predictor.predict_objects([np.full((96, 96, 3), 128, np.uint8)], category.schema, least=0.9) == [[]]
    assert predictor.predict_objects([], category.schema) == []


def test_names_help_to_find_objects_only_once_a_round_has_taught_them() -> None:
    predictor = load_predictor("nano")
    category, rng = Category.sample(np.random.default_rng(3)), np.random.default_rng(4)
    support, (image, _) = [Example(*category.render(rng, 96))], category.render(rng, 96)

    def scores(prompt: str) -> np.ndarray:
        return predictor.find_objects(image, category.schema, support, prompt, least=0.0).score

    assert np.array_equal(scores("both"), scores("visual"))
    assert not predictor._prompt(category.schema, support, "both").taught
    predictor.adapter = "taught"
    assert predictor._prompt(category.schema, support, "both").taught
    assert not np.array_equal(scores("both"), scores("visual"))


def test_points_that_few_examples_have_do_not_stretch_a_box() -> None:
    def example(*states: int) -> KeypointSet:
        return KeypointSet(("nose", "tail", "tongue"), np.zeros((3, 2)), np.array(states))

    often, seldom = example(2, 2, 2), example(2, 2, 0)
    assert usual_points([often, seldom, seldom]).tolist() == [True, True, False]
    assert usual_points([often, often, seldom]).tolist() == [True] * 3
    assert usual_points([example(2, 0, 0), example(0, 2, 0)]).tolist() == [True] * 3  # too few are usual


def test_the_box_of_one_point_is_as_large_as_the_examples() -> None:
    predictor = load_predictor("nano")
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(8)
    shown, points = category.render(rng, 256)
    one = KeypointSchema(category.schema.names[:1])
    box = np.array([*(points.xy[0] - 20), 40, 40])
    example = Example(shown, KeypointSet(one.names, points.xy[:1], points.visibility[:1], box=box))
    (found,) = predictor.predict([category.render(rng, 256)[0]], one, [example])
    assert found.box is not None and max(found.box[2:]) == pytest.approx(40, abs=1)
