"""Scores become shares that come true; the diagram is told with intervals; few data change little."""

from __future__ import annotations

import numpy as np

from backend.calibration import Calibration, cross_validated, fit, reliability


def overconfident(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    score = rng.random(count)
    return score, rng.random(count) < score**2


def test_the_map_is_monotone_and_finds_the_truth() -> None:
    found = fit(*overconfident(5000))
    grid = np.linspace(0, 1, 101)
    assert (np.diff(found(grid)) >= 0).all()
    assert np.abs(found(grid) - grid**2)[5:95].max() < 0.08


def test_few_points_leave_the_score_as_it_is() -> None:
    assert fit(*overconfident(10))(0.3) == 0.3
    assert abs(float(fit(np.full(30, 0.9), np.zeros(30))(0.9))) < 0.5  # but thirty misses in a row are heard


def test_json_brings_back_the_same_map() -> None:
    found = fit(*overconfident(300))
    again = Calibration.from_json(found.to_json())
    assert np.allclose(found(np.linspace(0, 1, 50)), again(np.linspace(0, 1, 50)), atol=1e-4)
    assert Calibration.from_json({})(0.25) == 0.25


def test_reliability_has_bins_with_intervals_and_the_error() -> None:
    score, hit = overconfident(2000)
    told = reliability(score, hit)
    assert told["points"] == 2000 and len(told["bins"]) == 10
    assert all(row["low"] <= row["share"] <= row["high"] for row in told["bins"])
    assert told["error"] > 0.1
    image = np.arange(2000) // 10
    assert reliability(cross_validated(score, hit, image), hit)["error"] < 0.05
    assert reliability(np.zeros(0), np.zeros(0)) == {"bins": [], "points": 0, "error": None}
