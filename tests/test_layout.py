"""Examples tell where in its box a point may lie, and whether objects are turned against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.layout import layout_prior, may_be_turned, turn_between
from kptllm_core.predictor import Example, Predictor
from kptllm_core.shots import TURNS
from kptllm_core.synthetic import Category

SHAPE = np.array([[10.0, 20.0], [60.0, 25.0], [40.0, 70.0]])
CELLS = 20


def at(xy: np.ndarray, visibility: tuple[int, ...] = (2, 2, 2)) -> KeypointSet:
    return KeypointSet(("a", "b", "c"), xy, np.array(visibility))


def turned(degrees: float) -> KeypointSet:
    """Clockwise as people see it: y points down."""
    angle = np.deg2rad(degrees)
    return at(SHAPE @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * 3 + 200)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 170.0, -100.0])
def test_the_turn_between_two_objects_is_told_whatever_their_size_and_place(degrees: float) -> None:
    assert turn_between(at(SHAPE), turned(degrees)) == pytest.approx(degrees, abs=1e-3)
    two = at(turned(degrees).xy, (2, 0, 2))  # by the points that both have
    assert turn_between(at(SHAPE), two) == pytest.approx(degrees, abs=1e-3)


def test_one_point_tells_no_turn() -> None:
    assert turn_between(at(SHAPE, (2, 2, 0)), at(SHAPE, (0, 2, 2))) is None
    assert turn_between(at(SHAPE), at(np.full((3, 2), 5.0))) is None


def test_objects_may_be_turned_unless_all_examples_stand_alike() -> None:
    assert may_be_turned([at(SHAPE)]), "one example tells nothing"
    assert may_be_turned([at(SHAPE, (2, 0, 0)), at(SHAPE, (2, 0, 0))]), "nor do two of one point"
    assert may_be_turned([at(SHAPE), turned(15)]), "two may stand alike by chance"
    assert not may_be_turned([at(SHAPE), turned(15), turned(-15)])
    assert may_be_turned([at(SHAPE), turned(15), turned(90)])


def prior(places: list[list[list[float]]], known: list[list[bool]] | None = None) -> torch.Tensor:
    """(K, CELLS, CELLS) of one query. places: (S, K, 2)."""
    xy = torch.tensor(places)[None]
    given = torch.ones(xy.shape[:3], dtype=torch.bool) if known is None else torch.tensor(known)[None]
    return layout_prior(xy, given, CELLS, CELLS)[0]


def fall(plane: torch.Tensor, cells: int = 6) -> float:
    """By how much it is less likely so many cells beside the middle."""
    return float(plane[10, 10] - plane[10, 10 + cells])


def test_the_more_alike_the_examples_the_narrower_the_place() -> None:
    one = prior([[[0.525, 0.525]]])
    alike = prior([[[0.525, 0.525]]] * 5)
    apart = prior([[[0.525 + dx, 0.525 + dy]] for dx, dy in ((0, 0), (0.3, 0), (-0.3, 0), (0, 0.3), (0, -0.3))])
    assert 0 < fall(one[0]) < fall(alike[0]) / 3
    assert fall(apart[0]) < fall(alike[0]) / 3
    assert all((p.flatten() - p.max() <= 0).all() and p[0, 10, 10] == p.max() for p in (one, alike)), "it peaks where the examples have it"


def test_two_examples_do_not_tell_how_much_objects_differ() -> None:
    alike, apart = prior([[[0.525, 0.525]]] * 2), prior([[[0.475, 0.525]], [[0.575, 0.525]]])
    assert fall(alike[0]) == pytest.approx(fall(apart[0]), rel=0.1)


def test_a_point_that_moves_does_not_widen_one_that_stays_for_long() -> None:
    stays, moves = [0.525, 0.525], [[0.2, 0.2], [0.8, 0.3], [0.3, 0.8], [0.7, 0.7], [0.525, 0.525]]
    found = prior([[stays, place] for place in moves * 4])
    assert fall(found[0]) > 3 * fall(found[1])


def test_two_places_are_both_likely_and_what_lies_between_is_not() -> None:
    """As a paw's on a lever and in the air; a mean would be wrong every time."""
    found = prior([[[0.225, 0.525]], [[0.825, 0.525]]] * 8)[0]
    assert found[10, 4] == pytest.approx(float(found[10, 16]), abs=1e-4)
    assert found[10, 4] > found[10, 10] + 0.5


def test_a_wrong_example_among_five_does_not_move_the_place() -> None:
    found = prior([[[0.525, 0.525]]] * 4 + [[[0.9, 0.1]]])[0]
    assert found.argmax() == 10 * CELLS + 10


def test_where_no_example_has_the_point_nothing_is_said_and_other_points_are_as_without_it() -> None:
    places = [[[0.3, 0.3], [0.7, 0.7]], [[0.35, 0.3], [0.1, 0.9]]]
    some = prior(places, [[True, False], [True, False]])
    assert torch.equal(some[1], torch.zeros(CELLS, CELLS))
    assert torch.allclose(some[0], prior([[p[0]] for p in places])[0], atol=1e-6)
    one_of_two = prior(places, [[True, True], [True, False]])
    assert one_of_two.isfinite().all() and one_of_two[1].argmax() == 13 * CELLS + 13


def test_the_order_of_examples_and_points_does_not_matter() -> None:
    xy = torch.rand(1, 5, 4, 2, generator=torch.Generator().manual_seed(3))
    known = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(4)) > 0.3
    shots, points = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    mixed = layout_prior(xy[:, shots][:, :, points], known[:, shots][:, :, points], CELLS, CELLS)
    assert torch.allclose(mixed, layout_prior(xy, known, CELLS, CELLS)[:, points], atol=1e-4)


def test_examples_that_stand_alike_are_encoded_as_they_stand_and_others_in_all_turns(predictor: Predictor) -> None:
    rng = np.random.default_rng(8)
    category = Category.sample(rng)
    image, points = category.render(rng, 96)
    quarter = np.rot90(image).copy()  # counterclockwise
    beside = KeypointSet(points.names, np.stack([points.xy[:, 1], 96 - points.xy[:, 0]], 1), points.visibility)
    upright = Example(image, KeypointSet(points.names, points.xy, points.visibility))

    def turns(*examples: Example) -> int:
        return predictor.passes.prepare(category.schema, examples).tight.turns

    assert turns(upright, upright, upright) == 1
    assert turns(upright) == turns(upright, Example(quarter, beside)) == len(TURNS)


def test_neither_the_box_of_a_single_point_nor_a_whole_image_nor_a_box_that_was_found_tells_anything(predictor: Predictor) -> None:
    rng = np.random.default_rng(9)
    category = Category.sample(rng)
    pairs = [category.render(rng, 96) for _ in range(4)]
    images, plain = [pairs[0][0]], replace(predictor.passes, by_layout=False)

    def differs(names: tuple[str, ...], box: np.ndarray | None, exact: bool = True) -> bool:
        examples = [Example(image, KeypointSet(names, (p := points.reorder(names)).xy, p.visibility)) for image, points in pairs[1:]]
        how = predictor._prompt(KeypointSchema(names), examples, "visual")
        one, other = (passes.points(images, [box], how, exact=[exact])[0] for passes in (predictor.passes, plain))
        return not np.array_equal(one.xy, other.xy)

    box = np.array([10.0, 10.0, 70.0, 70.0])
    assert differs(category.schema.names, box)
    assert not differs(category.schema.names, box, exact=False)
    assert not differs(category.schema.names[:1], box)
    assert not differs(category.schema.names, None)


def test_objects_that_are_found_are_found_without_layouts_and_a_drawn_box_is_read_with_them(predictor: Predictor) -> None:
    rng = np.random.default_rng(10)
    category = Category.sample(rng)
    pairs = [category.render(rng, 96) for _ in range(4)]
    examples = [Example(image, points) for image, points in pairs[1:]]
    asked: list[list[bool]] = []
    points = predictor.passes.points

    def listen(*args: object, **more: object) -> list[KeypointSet]:
        asked.append(list(more["exact"]))  # type: ignore[call-overload]
        return points(*args, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(predictor.passes), "points", lambda _, *args, **more: listen(*args, **more))
        predictor.predict_objects([pairs[0][0]], category.schema, examples, least=0.0)
        assert asked and not any(map(any, asked))
        asked.clear()
        predictor.predict_objects([pairs[0][0]], category.schema, examples, [np.array([[10.0, 10.0, 70.0, 70.0]])], find=False)
        assert asked[0] == [True]
