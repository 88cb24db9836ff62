"""The figures against small cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kptllm_core import metrics


def test_distance_is_in_units_of_the_longer_side() -> None:
    distance = metrics.normalised_distance(
        np.array([[13.0, 4.0], [10.0, 0.0]]), np.array([[10.0, 0.0], [10.0, 0.0]]), np.array([0, 0, 20, 50])
    )
    assert distance == pytest.approx([0.1, 0.0])


def test_pck_is_strict_and_averages_points_before_pairs() -> None:
    pairs = [np.array([0.0, 0.1, 0.3]), np.array([0.05])]
    assert metrics.pck(pairs, 0.1) == pytest.approx([1 / 3, 1.0])  # 0.1 itself is not nearer than 0.1
    assert metrics.mean_pck(pairs, 0.1) == pytest.approx(2 / 3)  # not 2 of 4 points


def test_a_pair_without_shared_points_scores_zero_but_has_no_distance() -> None:
    pairs = [np.array([0.0]), np.array([])]
    assert metrics.mean_pck(pairs, 0.2) == 0.5
    assert metrics.nme(pairs) == 0.0
    assert metrics.nme([np.array([])]) is None
    assert metrics.mean_pck([], 0.2) == 0.0


def test_mpck_and_auc_of_one_point() -> None:
    pairs = [np.array([0.12])]
    assert metrics.mpck(pairs) == pytest.approx(3 / 5)  # .15, .20, .25
    assert metrics.auc(pairs) == pytest.approx(17 / 20)  # i/20 above .12 from i = 3 to 19
    assert metrics.auc([np.array([0.0])]) == pytest.approx(19 / 20)  # strict: nothing is nearer than 0


def test_oks_is_one_on_the_point_and_falls_with_distance_over_size() -> None:
    true = np.array([[10.0, 10.0], [20.0, 20.0]])
    sigmas = np.array([0.05, 0.05])
    labelled = np.array([True, True])
    assert metrics.oks(true, true, labelled, 100.0, sigmas) == 1.0
    off = true + np.array([[0.0, 0.0], [0.0, 1.0]])
    expected = (1 + np.exp(-1 / (2 * 100 * 0.1**2))) / 2
    assert metrics.oks(off, true, labelled, 100.0, sigmas) == pytest.approx(expected)
    assert metrics.oks(off, true, np.array([True, False]), 100.0, sigmas) == 1.0
    assert metrics.oks(off, true, np.array([False, False]), 100.0, sigmas) == 0.0
    assert len(metrics.AP10K_SIGMAS) == 17


def test_calibration_error_of_honest_and_of_boasting_scores() -> None:
    rng = np.random.default_rng(0)
    score = rng.uniform(size=20_000)
    assert metrics.calibration_error(score, rng.uniform(size=20_000) < score) < 0.02
    assert metrics.calibration_error(np.full(10, 0.95), np.arange(10) < 5) == pytest.approx(0.45)
    assert metrics.calibration_error(np.array([1.0]), np.array([True])) == 0.0
    assert metrics.calibration_error(np.array([]), np.array([])) is None


def test_the_interval_covers_the_mean_at_the_stated_rate() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        values = rng.binomial(1, 0.6, 80).astype(float)
        low, high = metrics.bootstrap_interval(values, list(range(80)), samples=400, seed=trial)
        covered += low <= 0.6 <= high
    assert 87 <= covered <= 100


def test_repeated_draws_of_one_query_do_not_narrow_the_interval() -> None:
    values = np.array([0.0, 1.0] * 10)
    once = metrics.bootstrap_interval(values, list(range(20)))
    often = metrics.bootstrap_interval(np.tile(values, 50), list(range(20)) * 50)
    assert often == pytest.approx(once)
    pairs_alone = metrics.bootstrap_interval(np.tile(values, 50), list(range(1000)))
    assert pairs_alone[1] - pairs_alone[0] < (once[1] - once[0]) / 3


def test_the_interval_resamples_within_categories() -> None:
    values = np.array([0.0] * 30 + [1.0] * 30)
    kinds = ["a"] * 30 + ["b"] * 30
    assert metrics.bootstrap_interval(values, list(range(60)), kinds) == [0.5, 0.5]  # categories do not vary
    assert metrics.bootstrap_interval(np.array([0.25]), ["only"]) == [0.25, 0.25]
    assert metrics.bootstrap_interval(np.array([]), []) is None


def test_skill_leaves_out_what_copying_solves() -> None:
    assert metrics.skill({"horse": 0.7, "wing": 0.2}, {"horse": 0.4, "wing": 0.9}) == pytest.approx(0.5)
    assert metrics.skill({"horse": 0.7, "fly": 0.1}, {"horse": 0.4, "fly": 0.1}) == pytest.approx(0.25)
    assert metrics.skill({"wing": 1.0}, {"wing": 0.5}) is None  # 0.5 is not below 0.5
    assert metrics.skill({"wing": 1.0}, {"wing": None}) is None


def test_naming_accuracy() -> None:
    assert metrics.naming_accuracy(["Tail", "paw"], ["tail", "foot"], str.lower) == 0.5
    assert metrics.naming_accuracy([], [], str) is None
    with pytest.raises(ValueError, match="1 predicted names for 2 points"):
        metrics.naming_accuracy(["a"], ["a", "b"], str)


def image(scores: list[float], *similarity: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(scores), np.array(similarity, float).reshape(len(scores), -1)


def test_average_precision_ranks_by_score() -> None:
    right, wrong = image([0.9], [0.8]), image([0.3], [0.2])
    assert metrics.average_precision([right], 0.5) == 1.0
    assert metrics.average_precision([right], 0.85) == 0.0
    # Of two objects the surer one is right: precision 1 up to recall 0.5, that is at 51 of the 101 recalls.
    assert metrics.average_precision([right, wrong], 0.5) == pytest.approx(51 / 101)
    # The surer one is wrong: precision 1/2 at recall 0.5, and that is the best there is further left, too.
    assert metrics.average_precision([image([0.1], [0.8]), wrong], 0.5) == pytest.approx(0.5 * 51 / 101)


def test_each_object_is_taken_once_and_its_best_first() -> None:
    twice = image([0.9, 0.8], [0.7], [0.9])  # both predictions mean the only object; the surer one takes it
    assert metrics.average_precision([twice], 0.5) == 1.0  # the second is wrong, but only after full recall
    assert metrics.average_precision([twice], 0.8) == 0.5
    crossed = image([0.9, 0.8], [0.6, 0.9], [0.7, 0.95])
    assert metrics.average_precision([crossed], 0.5) == 1.0  # the first takes the second object, the second the first
    many = image([0.5] * 25, *[[0.0]] * 24, [0.9])
    assert metrics.average_precision([many], 0.5) == 0.0  # only the first twenty count


def test_mean_ap_is_the_mean_over_ten_thresholds() -> None:
    assert metrics.OKS_THRESHOLDS[0] == 0.5 and metrics.OKS_THRESHOLDS[-1] == 0.95 and len(metrics.OKS_THRESHOLDS) == 10
    assert metrics.mean_ap([image([0.9], [0.72])]) == pytest.approx(0.5)  # right from .50 to .70
    assert metrics.mean_ap([image([1.0], [1.0])]) == 1.0
    assert metrics.mean_ap([]) is None
    assert metrics.mean_ap([(np.zeros(0), np.zeros((0, 2)))]) == 0.0  # two objects, nothing predicted
