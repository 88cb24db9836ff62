"""Objects in whole images, measured: rendered scenes with none to many objects, through `evaluate --task instances`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kptllm_core.__main__ import main
from kptllm_core.crowds import Scene, draw_support, figures, hits, summary
from kptllm_core.dataset import load_coco
from kptllm_core.errors import DataError
from kptllm_core.keypoints import KeypointSet
from kptllm_core.predictor import Instance
from kptllm_core.synthetic import Category, write_dataset

NAMES = ("nose", "tail")


def an_object(x: float, y: float, side: float = 40.0) -> KeypointSet:
    return KeypointSet(NAMES, np.array([[x + 5, y + 5], [x + side - 5, y + side - 5]]), np.full(2, 2), box=np.array([x, y, side, side]))


def test_all_found_none_found_and_too_many_found() -> None:
    truth = [an_object(0, 0), an_object(100, 100)]
    right = Scene("fish", truth, [Instance(t, 0.9) for t in truth])
    found = figures([right])
    assert found["recall50"] == found["box_ap50"] == found["oks_ap"] == 1.0 and found["box_ap"] == pytest.approx(1.0)
    half = Scene("fish", truth, [Instance(truth[0], 0.9), Instance(an_object(300, 300), 0.95)])
    assert figures([half])["recall50"] == 0.5 and figures([half])["box_ap50"] < 0.5
    beside = Scene("fish", truth, [Instance(an_object(8, 0), 0.9)])
    assert figures([beside])["recall50"] == 0.5 and figures([beside])["box_ap"] < figures([beside])["box_ap50"]
    twice = Scene("fish", truth, [Instance(t, s) for t, s in zip([*truth, truth[0], truth[1]], (0.9, 0.8, 0.4, 0.1), strict=True)])
    assert figures([twice])["extra"] == 1.0 and figures([right])["extra"] == 0.0  # the fourth is not shown
    unsure = Scene("fish", truth, [Instance(t, 0.1) for t in truth])
    assert figures([unsure])["recall50"] == 0.0 and figures([unsure])["box_ap50"] == 1.0
    assert figures([right])["calibration"] == pytest.approx(0.1) and figures([twice])["calibration"] == pytest.approx((0.1 + 0.2 + 0.4 + 0.1) / 4)
    nothing = figures([Scene("fish", [], [Instance(truth[0], 0.9)]), Scene("fish", [], [])])
    assert nothing["recall50"] is None and nothing["extra"] == 0.5
    both = summary([right, Scene("bird", truth, [])])
    assert both["recall50"] == 0.5 and both["per_category"]["fish"]["recall50"] == 1.0


def test_of_two_boxes_on_one_object_the_surer_is_right() -> None:
    iou = np.array([[0.9, 0.0], [0.6, 0.0], [0.0, 0.4]])
    assert hits(np.array([0.3, 0.8, 0.9]), iou).tolist() == [False, True, False]
    assert hits(np.array([0.5]), np.zeros((1, 0))).tolist() == [False] and hits(np.zeros(0), np.zeros((0, 2))).tolist() == []


def test_a_support_folder_of_hard_links_shows_no_asked_image(tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", Category.sample(np.random.default_rng(5)), 4, seed=1, size=64)
    shutil.copytree(tmp_path / "scenes", tmp_path / "links", copy_function=os.link)
    asked, pool = (load_coco(tmp_path / name).samples for name in ("scenes", "links"))
    drawn = draw_support(pool, [asked[:3]], 1, np.random.default_rng(0), same_pool=False)
    assert [s.image_path.name for s in drawn] == [asked[3].image_path.name]
    with pytest.raises(DataError, match="1 objects are left"):
        draw_support(pool, [asked[:3]], 2, np.random.default_rng(0), same_pool=False)


def test_rendered_scenes_are_evaluated_from_a_folder(tmp_path: Path) -> None:
    category = Category.sample(np.random.default_rng(5))
    write_dataset(tmp_path / "scenes", category, 12, seed=1, size=128, objects=(0, 3))
    data = load_coco(tmp_path / "scenes")
    counts = [sum(s.image_path == p for s in data.samples) for p in {s.image_path for s in data.samples}]
    assert max(counts) > 1 and data.empty and len(counts) + len(data.empty) == 12
    out = tmp_path / "report.json"
    flags = ["evaluate", "--model", "tiny", "--task", "instances", "--data", str(tmp_path / "scenes"), "--shots", "2", "--episodes", "3",
             "--queries", "2", "--out", str(out)]  # fmt: skip
    for prompt in ("visual", "text", "both"):
        assert main([*flags, "--prompt", prompt]) == 0
        told = json.loads(out.read_text())
        assert {"box_ap50", "box_ap", "recall50", "oks_ap"} <= set(told) and told["arguments"]["task"] == "instances"
        (one,) = told["per_category"].values()
        assert one["images"] == 6 and 0 <= told["recall50"] <= 1
