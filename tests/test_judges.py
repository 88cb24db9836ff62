"""The rule of staying: what a paired comparison of two versions says, and what it does not. The rule of promotion: test_rounds.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from backend.judges import LOOK_EVERY, Pair, interval_of, t_quantile, verdict


def image(pck: float, error: float) -> dict[str, Any]:
    return {"pck": pck, "error": error, "beyond": max(error - 0.02, 0.0)}


def pairs(version: list[tuple[float, float]], previous: list[tuple[float, float]], each: int = 1) -> list[Pair]:
    """each: how many images, one after the other, are one group."""
    both = zip(version, previous, strict=True)
    return [Pair(image(*a), image(*b), f"video={n // each}") for n, (a, b) in enumerate(both)]


@pytest.mark.parametrize(
    ("share", "degrees", "value"),
    [(0.975, 9, 2.262157), (0.995, 1, 63.656741), (0.95, 30, 1.697261), (0.975, 1000, 1.962339), (0.5, 4, 0.0)],
)
def test_students_t_is_that_of_the_tables(share: float, degrees: int, value: float) -> None:
    assert t_quantile(share, degrees) == pytest.approx(value, abs=2e-4 * max(value, 1))


def test_an_interval_of_one_image_says_nothing() -> None:
    assert interval_of([0.3], 0.95) == [-math.inf, math.inf]
    assert verdict(pairs([(0.0, 1.0)], [(1.0, 0.0)]), 40)[0] == ""
    assert verdict([], 40)[1]["images"] == 0


def test_a_clear_difference_is_seen_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    good = [(float(p), 0.03) for p in rng.uniform(0.7, 1.0, 12)]
    bad = [(float(p), 0.12) for p in rng.uniform(0.1, 0.5, 12)]
    better, figures, said = verdict(pairs(bad, good), 40)
    assert better == "previous"
    assert figures["images"] == 12 and figures["pck@0.05"]["interval"][1] < 0 < figures["error"]["interval"][0]
    assert "on the same 12 images" in said and "99.4 % intervals" in said
    assert verdict(pairs(good, bad), 40)[0] == "version"


def test_frames_of_one_video_are_one_sample() -> None:
    """Twelve videos that differ by chance, ten frames each, which are alike: as frames they are told apart, as videos they are not."""
    by_video = np.linspace(-0.1, 0.2, 12)
    version, previous = [(0.5, 0.1)] * 120, [(0.5 + float(d), 0.1) for d in by_video.repeat(10)]
    assert verdict(pairs(version, previous), 120)[0] == "previous"
    better, figures, said = verdict(pairs(version, previous, each=10), 120)
    assert better == "" and (figures["images"], figures["groups"]) == (120, 12)
    assert figures["pck@0.05"]["difference"] == pytest.approx(-by_video.mean(), abs=1e-4)
    assert "on the same 120 images of 12 groups PCK@0.05" in said


def test_fewer_groups_than_a_look_takes_decide_nothing() -> None:
    good, bad = [(1.0, 0.0)] * 40, [(0.0, 0.5)] * 40
    assert verdict(pairs(bad, good, each=5), 40)[0] == "" != verdict(pairs(bad, good, each=4), 40)[0]


def test_what_people_let_pass_is_no_difference() -> None:
    assert verdict(pairs([(1.0, 0.0)] * 40, [(1.0, 0.019)] * 40), 40)[0] == ""
    assert verdict(pairs([(1.0, 0.0)] * 40, [(1.0, 0.03)] * 40), 40)[0] == "version"


def test_figures_that_contradict_each_other_decide_nothing() -> None:
    assert verdict(pairs([(0.5, 0.04)] * 10, [(1.0, 0.045)] * 10), 40)[0] == ""


def test_a_difference_that_is_chance_does_not_stand_against_one_that_is_none() -> None:
    """Few points are near under either version; under the new one the others are twice as far off, on every image."""
    rng = np.random.default_rng(2)
    near = rng.choice([0.0, 1 / 13, 2 / 13, 3 / 13], (2, 20))
    version = [(float(p), float(e)) for p, e in zip(near[0] + 0.02, rng.normal(0.30, 0.02, 20), strict=True)]
    previous = [(float(p), float(e)) for p, e in zip(near[1], rng.normal(0.15, 0.03, 20), strict=True)]
    better, figures, _ = verdict(pairs(version, previous), 20)
    low, high = figures["pck@0.05"]["interval"]
    assert low < 0 < figures["pck@0.05"]["difference"] < high
    assert better == "previous"


def test_versions_that_are_alike_are_rarely_told_apart_however_often_one_looks() -> None:
    """Over all looks together no more than one in twenty; measured here on 400 comparisons of versions that differ by chance."""
    rng, wrong, most = np.random.default_rng(1), 0, 40
    for _ in range(400):
        draw = rng.uniform(0, 0.15, (2, most, 8))  # 8 points each; about a third of them within 0.05
        figures = [[(float((g < 0.05).mean()), float(g.mean())) for g in one] for one in draw]
        made = pairs(*figures)
        wrong += any(verdict(made[:n], most)[0] == "previous" for n in range(LOOK_EVERY, most + 1, LOOK_EVERY))
    assert wrong / 400 < 0.05
