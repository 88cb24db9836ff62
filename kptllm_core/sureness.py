"""How likely is a found box right? Two witnesses, what the head said of the box and how sure its points are, through a logistic
function (Platt scaling) that is fitted on rendered kinds after a training: see `calibrate.py`. numpy only.

A box is right if it overlaps a true one by half and no surer box does. Each kind of search has weights of its own, since a window
that shows a part of an object deceives in another way than a whole image does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kptllm_core.finder import needs_windows
from kptllm_core.keypoints import KeypointSet

KINDS = ("whole", "windows", "names")  # examples that fill their images; small ones, sought in windows; no example at all
NEARLY = 0.99  # only what a person drew is certain
LEAST = 1e-4  # of a witness, before its logarithm is taken
PRIOR = 1.0  # of the fit, in boxes: weights stay small where there are few
Weights = Sequence[float]
"""Constant, weight of the logarithm of the head's score, of that of the points' trust."""


def search_kind(share: float | None) -> str:
    """How objects are sought that take this share of the support's images; None without support."""
    return "names" if share is None else "windows" if needs_windows(share) else "whole"


def trust(points: KeypointSet) -> float:
    """Mean score over all points; those that are said to be absent count 0."""
    return float((points.score * points.placed).mean())


def witnesses(seen: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """(N,) scores of boxes and trust in their points → (N, 3) as `Weights` weigh them."""
    logs = [np.log(np.clip(np.asarray(v, np.float64), LEAST, 1.0)) for v in (seen, trusted)]
    return np.stack([np.ones(len(logs[0])), *logs], -1)


def sureness(seen: float, trusted: float, weights: Weights) -> float:
    """0…1 of a box that was found."""
    told = witnesses(np.array([seen]), np.array([trusted])) @ np.asarray(weights)
    return min(float(1 / (1 + np.exp(-told[0]))), NEARLY)


def least_seen(least: float, weights: Weights) -> float:
    """The head's score below which no box is as sure as `least`, however sure its points: nobody need look for these."""
    constant, own, _ = weights
    if least <= 0 or own <= 0:
        return 0.0
    return float(min(np.exp((np.log(least / max(1 - least, 1e-6)) - constant) / own), 1.0))


def fit(seen: np.ndarray, trusted: np.ndarray, right: np.ndarray, steps: int = 50) -> list[float]:
    """Weights by maximum likelihood with a small prior (Newton's method). right: (N,) bool. A witness never speaks against itself: one
    that would get a negative weight is left out."""
    x, y = witnesses(seen, trusted), np.asarray(right, np.float64)
    used = np.ones(3, bool)
    while True:
        weights = np.zeros(3)
        for _ in range(steps):
            chance = 1 / (1 + np.exp(-(x @ weights)))
            slope = x.T @ (y - chance) - PRIOR * weights * [0, 1, 1]
            curve = (x * (chance * (1 - chance) + 1e-9)[:, None]).T @ x + PRIOR * np.diag([1e-6, 1, 1])
            weights[used] += np.linalg.solve(curve[np.ix_(used, used)], slope[used])
        if (weights[1:] >= 0).all():
            return [round(float(w), 4) for w in weights]
        used[1:] &= weights[1:] >= 0
