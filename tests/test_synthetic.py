"""Rendered categories: the points must be right, since a model believes them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from kptllm_core import synthetic
from kptllm_core.errors import InvalidInput
from kptllm_core.imaging import read_image
from kptllm_core.keypoints import Visibility
from kptllm_core.synthetic import Category, insect, write_dataset
from kptllm_core.synthetic.paint import SUPER, Canvas
from kptllm_core.synthetic.solids import flatten, look

SEEDS = range(40)


def test_same_seed_same_bytes() -> None:
    for seed in (3, 14):
        first, second = Category.from_seed(seed), pickle.loads(pickle.dumps(Category.from_seed(seed)))
        assert (first.name, first.schema) == (second.name, second.schema)
        one, points = first.render(np.random.default_rng(5), 96)
        two, same = second.render(np.random.default_rng(5), 96)
        assert np.array_equal(one, two) and np.array_equal(points.xy, same.xy)
        other, _ = first.render(np.random.default_rng(6), 96)
        assert not np.array_equal(one, other)
    sampled = [Category.sample(np.random.default_rng(1)).name for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_every_category_is_usable() -> None:
    words = set()
    for seed in SEEDS:
        category = Category.from_seed(seed)
        schema = category.schema
        words.add(schema.category)
        assert synthetic.MIN_POINTS <= len(schema) <= synthetic.MAX_POINTS
        for a, b in schema.symmetric:
            sides = {schema.names[a].replace("left", "*"), schema.names[b].replace("right", "*")}
            swapped = {schema.names[a].replace("right", "*"), schema.names[b].replace("left", "*")}
            assert len(sides) == 1 or len(swapped) == 1
        for name in schema.names:  # a left point never comes without its right one
            for side, other in (("left", "right"), ("right", "left")):
                assert side not in name.split("_") or name.replace(side, other) in schema.names
        image, found = category.render(np.random.default_rng(seed), 96)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert found.names == schema.names and found.box is not None
        assert 0.2 <= found.box[2:].max() / 96 <= 0.95
        assert (found.xy[found.placed] >= 0).all() and (found.xy[found.placed] <= 96).all()
    assert len(words) >= 12


@pytest.mark.parametrize("family", [f for f, _ in synthetic._FAMILIES], ids=lambda f: f.__name__)
def test_points_lie_on_the_object(family) -> None:
    """Drawn large and without anything in front, each point of each family lies on the silhouette or within 2 % of it."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        template = family(rng)
        model, camera = template.build(rng), look(rng, template.view)
        shapes = flatten(model, camera, rng.random((8, 3)), np.array([0.0, -1.0]))
        box = synthetic._bounds(shapes)
        size = 200
        scale = 0.9 * size / max(box[2], box[3])
        shift = np.array([0.05 * size, 0.05 * size]) - box[:2] * scale
        canvas = Canvas(size, size)
        canvas.shapes(shapes, scale, shift, 1)
        ys, xs = np.nonzero(canvas.owner())
        pixels = np.stack([xs, ys], 1) / SUPER
        for name, (xyz, parts) in model.points.items():
            xy = camera.project(xyz[None])[0][0] * scale + shift
            assert np.abs(pixels - xy).max(1).min() < 0.02 * size, (family.__name__, seed, name)
            assert all(0 <= p < len(model.parts) for p in parts)


def test_all_instances_have_the_same_names() -> None:
    for family, _ in synthetic._FAMILIES:
        template = family(np.random.default_rng(11))
        names = {tuple(template.build(np.random.default_rng(s)).points) for s in range(6)}
        assert len(names) == 1


def test_left_and_right_are_the_subjects_own() -> None:
    """From above and upright, an insect's left is on the image's left; a face's left is on the image's right."""
    category = insect()
    left, right = category.schema.index("left_eye"), category.schema.index("right_eye")
    for seed in range(8):
        _, found = category.render(np.random.default_rng(seed), 128)
        if found.placed[[left, right]].all():
            assert found.xy[left, 0] < found.xy[right, 0]


def test_points_behind_something_are_occluded() -> None:
    rng = np.random.default_rng(0)
    states = np.concatenate([Category.from_seed(s).render(rng, 96)[1].visibility for s in SEEDS])
    assert 0.02 < (states == Visibility.OCCLUDED).mean() < 0.3
    assert (states == Visibility.VISIBLE).mean() > 0.6
    assert not (states == Visibility.ABSENT).any()


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_scene_holds_as_many_as_asked(count: int) -> None:
    image, found = insect().scene(np.random.default_rng(count), 160, 120, count)
    assert image.shape == (120, 160, 3) and len(found) == count
    for one in found:
        assert one.box is not None and one.box[2] <= 160 and one.box[3] <= 120


def test_scene_refuses_other_counts() -> None:
    with pytest.raises(InvalidInput, match="0 to 12"):
        insect().scene(np.random.default_rng(0), 160, 120, 13)


def test_written_dataset_is_coco(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", "insect", 3, seed=1, size=128)
    write_dataset(tmp_path / "b", insect(), 3, seed=1, size=128)
    text = (tmp_path / "a" / "annotations.json").read_text()
    assert text == (tmp_path / "b" / "annotations.json").read_text()
    data = json.loads(text)
    kind = data["categories"][0]
    names = kind["keypoints"]
    assert {"head", "left_eye", "right_eye", "abdomen_tip", "left_antenna_tip"} <= set(names)
    assert all(1 <= i <= len(names) for pair in kind["skeleton"] for i in pair) and kind["skeleton"]
    assert len(data["images"]) == len(data["annotations"]) == 3
    for image, annotation in zip(data["images"], data["annotations"], strict=True):
        assert read_image(tmp_path / "a" / "images" / image["file_name"]).shape == (128, 128, 3)
        assert image["group"] and annotation["image_id"] == image["id"] and len(annotation["bbox"]) == 4
        states = annotation["keypoints"][2::3]
        assert len(annotation["keypoints"]) == 3 * len(names) and set(states) <= {0, 1, 2}
        assert annotation["num_keypoints"] == sum(s > 0 for s in states)


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="Known: insect"):
        write_dataset(tmp_path, "unicorn", 1, seed=0)
