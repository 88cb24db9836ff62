"""Baselines on images whose correspondence is known: one rendered object against its own turned picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kptllm_core.baselines import BASELINES, ROTATIONS, build_baseline, opencv, peaks
from kptllm_core.errors import InvalidInput
from kptllm_core.evaluate import Options, evaluate, load_categories
from kptllm_core.geometry import similarity_crop
from kptllm_core.imaging import warp
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.protocol import turn
from kptllm_core.report import remarks
from kptllm_core.scoring import PointPredictor

SIDE = 160
NAMES = ("a", "b", "c", "d", "e")
POINTS = np.array([[62.0, 58.0], [102.0, 61.0], [81.0, 83.0], [60.0, 104.0], [104.0, 99.0]])
CLASSICAL = [name for name in BASELINES if name != "correlation"]


@pytest.fixture(scope="module")
def example() -> Example:
    """Smooth random texture: each place looks different from the others, at several scales."""
    rng = np.random.default_rng(4)
    image = np.zeros((SIDE, SIDE, 3))
    for cells in (8, 16, 40):
        noise = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        image += warp(noise, similarity_crop(np.full(2, cells / 2), cells, SIDE)) / 3
    points = KeypointSet(NAMES, POINTS, np.full(5, 2), box=np.array([40, 40, 80, 80]))
    return Example(image.astype(np.uint8), points)


def found(name: str, predictor: Predictor, example: Example, degrees: float) -> np.ndarray:
    """(K,) distance over the box's side of what a baseline finds in the same image, turned."""
    image, truth = turn(example.image, example.keypoints, degrees)
    if name in CLASSICAL:
        pytest.importorskip("cv2")
    answer = build_baseline(name, predictor).predict([image], KeypointSchema(NAMES), [example], [truth.box])[0]
    assert np.array_equal(answer.box, truth.box) and (answer.score >= 0).all() and (answer.score <= 1).all()
    return np.linalg.norm(answer.xy - truth.xy, axis=1) / 80


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_finds_every_point_in_the_same_picture(name: str, predictor: Predictor, example: Example) -> None:
    distance = found(name, predictor, example, 0.0)
    assert distance.max() < (0.03 if name in CLASSICAL else 0.15)  # a cell of tiny's finest features is 0.08
    assert np.median(distance) < 0.06


@pytest.mark.parametrize("degrees", [30, 100, -75])
@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_ones_find_them_in_the_turned_picture(
    name: str, degrees: int, predictor: Predictor, example: Example
) -> None:
    assert 30 in ROTATIONS and 100 not in ROTATIONS
    assert np.median(found(name, predictor, example, degrees)) < 0.05


def test_correlation_uses_the_features_of_the_model(predictor: Predictor, example: Example) -> None:
    untrained = load_predictor("tiny", untrained=True)
    answers = [
        build_baseline("correlation", p).predict([example.image[::-1].copy()], KeypointSchema(NAMES), [example])[0]
        for p in (predictor, untrained)
    ]
    assert not np.allclose(answers[0].xy, answers[1].xy)


def test_several_shots_fill_each_other_up_and_unknown_points_stay_unknown(
    predictor: Predictor, example: Example
) -> None:
    def only(*seen: int) -> Example:
        visibility = [2 if k in seen else 0 for k in range(5)]
        return Example(example.image, KeypointSet(NAMES, POINTS, np.array(visibility), box=example.keypoints.box))

    matcher: PointPredictor = build_baseline("correlation", predictor)
    box = example.keypoints.box
    answer = matcher.predict([example.image], KeypointSchema(NAMES), [only(0, 1), only(3)], [box])[0]
    assert answer.visibility.tolist() == [2, 2, 0, 2, 0] and answer.score[2] == 0
    whole = matcher.predict([example.image], KeypointSchema(NAMES), [example], [box])[0]
    assert answer.xy[[0, 1, 3]] == pytest.approx(whole.xy[[0, 1, 3]], abs=1e-3)
    few = matcher.predict([example.image], KeypointSchema(NAMES), [example], [box], asked=["e", "a"])[0]
    assert few.names == ("e", "a") and few.xy == pytest.approx(whole.xy[[4, 0]], abs=1e-3)
    assert (few.visibility == Visibility.VISIBLE).all()


def test_without_a_box_the_whole_image_is_searched(predictor: Predictor, example: Example) -> None:
    pytest.importorskip("cv2")
    wide = np.full((160, 320, 3), 128, np.uint8)
    wide[:, 100:260] = example.image
    answer = build_baseline("sift", predictor).predict([wide], KeypointSchema(NAMES), [example])[0]
    assert answer.xy.shape == (5, 2) and (answer.xy[:, 0] <= 320).all() and answer.box is None


def test_peaks_lie_between_cells() -> None:
    y, x = np.mgrid[:20, :30].astype(float)
    maps = np.stack([-((x - 12.3) ** 2) - (y - 7.8) ** 2, -((x - 0.0) ** 2) - (y - 19.0) ** 2, np.zeros_like(x)])
    cells, value = peaks(maps)
    assert cells[0] == pytest.approx([12.3, 7.8], abs=1e-6)
    assert np.abs(cells[1] - [0, 19]).max() <= 0.5 and value[2] == 0.0


def test_what_a_baseline_cannot_do_is_said(
    predictor: Predictor, example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = build_baseline("correlation", predictor)
    for support, prompt in (((), "both"), ((example,), "text")):
        with pytest.raises(InvalidInput, match="It needs support examples"):
            matcher.predict([example.image], KeypointSchema(NAMES), support, prompt=prompt)
    with pytest.raises(InvalidInput, match="correlation, sift, template"):
        build_baseline("orb", predictor)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for name in CLASSICAL:
        with pytest.raises(InvalidInput, match=f"{name} needs OpenCV.*pip install opencv-python-headless"):
            build_baseline(name, predictor)
    with pytest.raises(InvalidInput):
        opencv("sift")


@pytest.mark.parametrize("name", BASELINES)
def test_evaluate_puts_a_baseline_in_the_models_place(name: str, predictor: Predictor, coco_folder: Path) -> None:
    if name in CLASSICAL:
        pytest.importorskip("cv2")
    report = evaluate(predictor, load_categories([coco_folder]), Options(baseline=name, episodes=1, queries=2))
    assert report["arguments"]["baseline"] == name and name in report["base"] and report["pairs"] == 2
    assert any(f"baseline '{name}', not of the model" in line for line in remarks(report))
