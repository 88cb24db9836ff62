"""The effort meter: what was accepted, moved, added, deleted, from region ids, origins and the prediction as it was served."""

from __future__ import annotations

import numpy as np
import pytest

from backend.effort import Drawn, Image, Work, assisted, started_from, summary, table, work_by_origin, work_on
from backend.matching import pair_up, size_of
from kptllm_core.keypoints import KeypointSet
from label_config.annotations import LabelledObject

NAMES = ("nose", "tail", "ear")


def points(*xy: tuple[float, float] | None, box: tuple[float, ...] | None = (0, 0, 100, 50)) -> KeypointSet:
    return KeypointSet(NAMES, [p or (0, 0) for p in xy], [2 if p else 0 for p in xy], box=box)


def drawn(*xy: tuple[float, float] | None, mark: str = "a") -> Drawn:
    found = points(*xy)
    return Drawn(found, {n: f"{mark}{n}" for n, there in zip(NAMES, found.placed, strict=True) if there})


def labelled(*xy: tuple[float, float] | None, origin: str = "prediction-changed", mark: str = "a") -> LabelledObject:
    found = points(*xy)
    there = found.placed
    return LabelledObject(
        found,
        tuple(origin if t else None for t in there),
        tuple(f"{mark}{n}" if t else None for n, t in zip(NAMES, there, strict=True)),
        None,
    )


def test_points_are_accepted_moved_added_and_deleted() -> None:
    shown = [drawn((10, 10), (50, 20), None)]
    assert work_on(shown, [labelled((12, 10), (60, 20), None)]) == Work(accepted=1, nudged=1, moved=1)
    assert work_on(shown, [labelled((10, 10), None, (5, 5))]) == Work(accepted=1, nudged=1, added=1, deleted=1)
    assert work_on(shown, [labelled((10, 10), (50, 20), None, origin="prediction")]) == Work(accepted=2)
    assert work_on(shown, []) == Work(deleted=2)
    assert work_on([], [labelled((1, 1), None, None, origin="manual")]) == Work(added=1)


def test_the_tolerance_is_a_share_of_the_objects_size() -> None:
    shown, truth = [drawn((10, 10), None, None)], [labelled((16, 10), None, None)]
    assert work_on(shown, truth, 0.05).moved == 1
    assert work_on(shown, truth, 0.07).moved == 0


def test_points_that_were_not_drawn_cost_a_click() -> None:
    hidden = Drawn(points((10, 10), (50, 20), None), {"nose": "anose"})
    assert work_on([hidden], [labelled((10, 10), (50, 20), None)]) == Work(accepted=1, nudged=1, added=1)


def test_an_object_is_followed_by_its_regions_wherever_it_is_moved() -> None:
    shown = [drawn((10, 10), (20, 10), None, mark="a"), drawn((80, 40), (90, 40), None, mark="b")]
    truth = [labelled((82, 42), (92, 42), None, mark="a"), labelled((80, 40), (90, 40), None, mark="b")]
    assert work_on(shown, truth) == Work(accepted=2, nudged=2, moved=2)
    assert started_from(shown, truth)
    assert not started_from(shown, [labelled((1, 1), None, None, mark="z")])


def test_without_the_prediction_origins_tell_what_they_can() -> None:
    mixed = LabelledObject(points((1, 1), (2, 2), (3, 3)), ("prediction", "prediction-changed", "manual"), (None,) * 3, None)
    assert work_by_origin([mixed]) == Work(accepted=1, moved=1, added=1, deleted=None)
    assert assisted([mixed])
    by_hand = labelled((1, 1), None, None, origin="manual")
    assert work_by_origin([by_hand]) == Work(added=1)
    assert not assisted([by_hand])


def test_clicks_saved_are_against_one_click_per_point() -> None:
    images = [
        Image(1, 1, Work(accepted=8, nudged=1, moved=1, added=1, deleted=1), True, "v1", 0, seconds=10.0, at=1.0),
        Image(2, 2, Work(accepted=10), True, "v2", 1, seconds=4.0, at=2.0),
    ]
    told = summary(images)
    assert (told["points"], told["clicks"], told["clicks_by_hand"], told["clicks_saved"]) == (20, 4, 20, 16)
    assert told["saved_share"] == 0.8
    assert told["moved_share"] == pytest.approx(1 / 19, abs=1e-4)
    assert told["seconds_per_image"] == 7.0
    assert told["per_image"]["clicks"] == 2.0
    assert [row["version"] for row in table(images, "version")] == ["v1", "v2"]
    assert [row["moved"] for row in table(images, "round")] == [1, 0]


def test_nothing_labelled_is_told_without_numbers() -> None:
    told = summary([])
    assert told["images"] == told["clicks"] == 0
    assert told["saved_share"] is None and told["seconds_per_image"] is None


def test_objects_are_paired_by_place_each_once() -> None:
    left, right = points((10, 10), (20, 10), None, box=None), points((80, 10), (90, 10), None, box=None)
    assert sorted(pair_up([left, right], [right, left])) == [(0, 1), (1, 0)]
    far = points((500, 500), (510, 500), None, box=None)
    assert set(pair_up([left, right], [far, left])) == {(0, 1), (1, None), (None, 0)}
    assert pair_up([left], [far]) == [(0, 0)]  # the only object on both sides


def test_a_single_point_has_a_size_of_its_own() -> None:
    one = KeypointSet(("tip",), np.array([[5.0, 5.0]]), np.array([2]))
    assert size_of(one, (640, 480)) == 64.0
    assert size_of(points((0, 0), (100, 0), None, box=None)) == pytest.approx(120.0)
