"""benchmarks/instances.py: images that hold what they are said to hold, and a line for each number and size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.instances import SIDE, crowd, main
from kptllm_core.instances import box_iou
from kptllm_core.synthetic import Category


def test_a_crowd_has_so_many_objects_side_by_side() -> None:
    image, boxes, example = crowd(Category.sample(np.random.default_rng(1)), np.random.default_rng(2), 5)
    assert image.shape == (SIDE, SIDE, 3) and boxes.shape == (5, 4) and example.image.shape == image.shape
    assert (box_iou(boxes, boxes) > 0.05).sum() == 5 and (boxes[:, :2] + boxes[:, 2:] <= SIDE + 1).all()


def test_every_number_and_size_is_measured(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", tiny_model, "--objects", "1,2", "--sides", "160,128", "--repeats", "1"]) == 0
    *told, last = capsys.readouterr().out.splitlines()
    assert set(json.loads(last)) == {"ratio_1", "ratio_2", "known_1", "known_2"} and all(v > 0 for v in json.loads(last).values())
    assert [line.split()[0] for line in told[2:]] == ["1", "2", "image", "128", "160"]
    assert main(["--model", "no such model"]) == 2
