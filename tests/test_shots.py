"""Of many examples each query is shown those that look most like it, and no query decides for another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.predictor import Example, Predictor
from kptllm_core.shots import NEAREST, TURNS, Shots
from kptllm_core.support import turned, usual_margin
from kptllm_core.synthetic import Category

SAME = 2e-3  # pixels


@pytest.fixture(scope="module")
def scene() -> tuple[KeypointSchema, list[Example]]:
    rng = np.random.default_rng(5)
    category = Category.sample(rng)
    return category.schema, [Example(*category.render(rng, 96)) for _ in range(14)]


def shots(looks: list[float], known: list[list[bool]]) -> Shots:
    """Two points; a shot's token, descriptor and place say which one it is. looks: an angle each."""
    angle = torch.tensor(looks)
    count = len(looks)
    number = torch.arange(count, dtype=torch.float32).view(1, count, 1, 1).expand(1, count, 2, 1)
    look = torch.stack([angle.cos(), angle.sin()], -1)[None]
    return Shots(number, (number, number, number), number.expand(1, count, 2, 2), torch.tensor(known)[None], look)


def test_few_shots_are_all_shown() -> None:
    few = shots([0.1 * i for i in range(NEAREST)], [[True, True]] * NEAREST)
    assert few.nearest(torch.ones(3, 2)) is few


def test_each_query_and_point_gets_the_most_alike_that_know_it() -> None:
    angles = [i * 2 * np.pi / 8 for i in range(8)]  # all around, so that their spread is the same in each direction
    known = [[True, i % 2 == 0] for i in range(8)]
    found = shots(angles, known).nearest(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    chosen = found.token[..., 0].long()
    assert set(chosen[0, :, 0].tolist()) == {0, 1, 2, 6, 7} and set(chosen[1, :, 0].tolist()) == {2, 3, 4, 5, 6}
    assert {int(s) for s, k in zip(chosen[0, :, 1], found.known[0, :, 1], strict=True) if k} == {0, 2, 4, 6}
    assert found.known[..., 0].all() and found.known[..., 1].sum(1).tolist() == [4, 4]
    assert torch.equal(found.xy[..., 0], found.token[..., 0]) and torch.equal(found.descriptor[2], found.token)


def test_each_image_is_shown_once_in_its_most_alike_turn_unless_it_is_hardly_more_alike() -> None:
    quarter = np.pi / 2
    two = shots([0.0, quarter, 2 * quarter, 3 * quarter], [[True, True]] * 4)._replace(turns=2)
    east, north = [1.0, 0.0], [0.0, 1.0]
    found = two.nearest(torch.tensor([east, north, [1.0, 1.05]]))
    images, turn = found.token[:, :, 0, 0].long() // 2, found.token[:, :, 0, 0].long() % 2
    assert [set(row) for row in images.tolist()] == [{0, 1}] * 3, "both images, whatever they look like"
    of_first = [dict(zip(i, t, strict=True))[0] for i, t in zip(images.tolist(), turn.tolist(), strict=True)]
    assert of_first == [0, 1, 0], "hardly more alike does not surpass the handicap"
    assert torch.equal(two.upright().token[0, :, 0, 0], torch.tensor([0.0, 2.0]))


def test_a_turned_crop_holds_all_points_where_the_image_turned_them(scene: tuple[KeypointSchema, list[Example]]) -> None:
    example = scene[1][0]
    points, box = example.keypoints, example.keypoints.box
    for degrees in TURNS:
        crop = turned(box, points, 160, degrees)
        inside = crop.to_crop(points.xy[points.placed]) / 160
        assert inside.min() > -1e-6 and inside.max() < 1 + 1e-6
        axis = crop.to_crop(np.array([[1.0, 0.0]])) - crop.to_crop(np.array([[0.0, 0.0]]))
        assert np.rad2deg(np.arctan2(axis[0, 1], axis[0, 0])) % 360 == pytest.approx(degrees, abs=1e-6)


def test_an_image_among_the_examples_is_shown_itself(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]]) -> None:
    """So it is answered as well as if it were the only example, or nearly; with all fourteen blurred together it is not."""
    schema, examples = scene
    asked = examples[::3]

    def error(support: list[Example], example: Example) -> float:
        (found,) = predictor.predict([example.image], schema, support, [example.keypoints.box], "visual")
        return float(np.linalg.norm(found.xy - example.keypoints.xy, axis=1)[example.keypoints.placed].mean())

    many = np.mean([error(examples, e) for e in asked])
    others = np.mean([error([o for o in examples if o is not e], e) for e in asked])
    assert many < others


def test_neither_the_order_nor_the_batch_nor_how_many_are_far_away_changes_anything(
    predictor: Predictor, scene: tuple[KeypointSchema, list[Example]]
) -> None:
    schema, examples = scene
    images, boxes, support = [e.image for e in examples[:3]], [e.keypoints.box for e in examples[:3]], examples[3:]
    together = predictor.predict(images, schema, support, boxes, "both")
    for image, box, one in zip(images, boxes, together, strict=True):
        (alone,) = predictor.predict([image], schema, support[::-1], [box], "both")
        assert np.abs(alone.xy - one.xy).max() < SAME


def test_a_point_that_one_example_has_is_shown_whatever_that_looks_like(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]]) -> None:
    schema, examples = scene
    rare = np.zeros(len(schema.names), bool)
    rare[0] = True

    def hide(e: Example) -> Example:
        p = e.keypoints
        return Example(e.image, KeypointSet(p.names, p.xy, np.where(rare, 0, p.visibility), box=p.box))

    support = [examples[1], *map(hide, examples[2:])]
    query = examples[0]
    (found,) = predictor.predict([query.image], schema, support, [query.keypoints.box], "visual", asked=[schema.names[0]])
    (alone,) = predictor.predict([query.image], schema, [examples[1]], [query.keypoints.box], "visual", asked=[schema.names[0]])
    assert np.abs(found.xy - alone.xy).max() < 0.2 * max(query.keypoints.box[2:])


def test_a_point_outside_its_box_is_shown_where_it_is() -> None:
    points = KeypointSet(("body", "tail"), np.array([[50, 50], [170, 50]]), np.array([2, 2]), box=np.array([0, 0, 100, 100]))
    for degrees in TURNS:
        xy = turned(points.box, points, 64, degrees).to_crop(points.xy)
        assert ((xy >= -1e-6) & (xy <= 64 + 1e-6)).all()


def test_an_example_with_one_point_does_not_stretch_the_boxes_of_all() -> None:
    whole = KeypointSet(("a", "b"), np.array([[20, 50], [80, 50]]), np.array([2, 2]), box=np.array([14, 44, 72, 12]))
    sparse = KeypointSet(("a", "b"), whole.xy, np.array([2, 0]), box=whole.box)
    told = usual_margin([whole] * 4, [whole.box] * 4)
    assert told == pytest.approx([0.1] * 4)
    assert usual_margin([whole, sparse, whole, sparse, whole], [whole.box] * 5) == pytest.approx(told)
    assert (usual_margin([sparse], [sparse.box]) > 1).all()  # nothing else is known


def test_support_sets_stay_encoded_up_to_so_many_bytes(
    predictor: Predictor, scene: tuple[KeypointSchema, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, examples = scene
    read: list[int] = []
    lazy = [Example(lambda e=e: read.append(1) or e.image, e.keypoints, str(i)) for i, e in enumerate(examples[:4])]
    predictor._prompt(schema, lazy[:2], "both")
    predictor._prompt(schema, lazy[2:], "both")
    predictor._prompt(schema, lazy[:2], "both")
    assert len(read) == 4
    monkeypatch.setattr("kptllm_core.predictor.MAX_SUPPORT_BYTES", 1)
    predictor._prompt(schema, lazy[:3], "both")
    assert len(predictor._supports) == 1 and len(read) == 7
