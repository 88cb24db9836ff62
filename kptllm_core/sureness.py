"""How likely is a found box right? Three witnesses go through a logistic function (Platt scaling) that is fitted on rendered kinds after a
training (`calibrate.py`): what the head said of the box, how sure its points are, and its lead, since a kind that looks strange to the
model is seen faintly everywhere, but most clearly where it is. numpy only.

A box is right if it overlaps a true one by half and no surer box does. Each kind of search has weights of its own, since a window
that shows a part of an object deceives in another way than a whole image does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kptllm_core.finder import needs_windows
from kptllm_core.keypoints import KeypointSet

NEARLY = 0.99  # only what a person drew is certain
LEAST = 1e-4  # of a witness, before its logarithm is taken
PRIOR = 1.0  # of the fit, in boxes: weights stay small where there are few
WITNESSES = 3
LEAD = 1.0  # at most, either way: a factor e
Weights = Sequence[float]
"""Constant, weight of the logarithm of the head's score, of that of the points' trust, of the lead."""


def search_kind(share: float | None) -> str:
    """How objects are sought that take this share of the support's images; None without support."""
    return "names" if share is None else "windows" if needs_windows(share) else "whole"


def trust(points: KeypointSet) -> float:
    """Mean score over all points; those that are said to be absent count 0."""
    return float((points.score * points.placed).mean())


def witnesses(seen: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """The boxes of one image: (N,) the head's scores, (N,) trust in their points → (N, 4) as `Weights` weigh them.

    The lead is that over the surest other box (score times trust, logarithm), at most `LEAD`.
    """
    logs = [np.log(np.clip(np.asarray(v, np.float64), LEAST, 1.0)) for v in (seen, trusted)]
    own = logs[0] + logs[1]
    others = np.where(np.eye(len(own), dtype=bool), -np.inf, own[None]).max(1, initial=-np.inf)
    return np.stack([np.ones(len(own)), *logs, np.clip(own - others, -LEAD, LEAD)], -1)


def sureness(told: np.ndarray, weights: Weights) -> np.ndarray:
    """(N, 4) witnesses → (N,) 0…1."""
    return np.minimum(1 / (1 + np.exp(-(told @ np.asarray(weights)))), NEARLY)


def least_seen(least: float, weights: Weights, surest: float = 0.0) -> float:
    """The head's score below which no box is as sure as `least`, however sure its points: nobody need look for these.

    surest: score times trust of the surest box so far, over which those to come have no great lead; 0 before the first.
    """
    constant, own, _, lead = weights
    if least <= 0 or own <= 0:
        return 0.0
    wanted = np.log(least / max(1 - least, 1e-6)) - constant
    ahead, level, behind = (wanted - lead * LEAD) / own, (wanted + lead * np.log(max(surest, LEAST**2))) / (own + lead), (wanted + lead * LEAD) / own
    return float(min(np.exp(max(ahead, min(level, behind))), 1.0))


def fit(told: np.ndarray, right: np.ndarray, steps: int = 50) -> list[float]:
    """Weights by maximum likelihood with a small prior (Newton's method). told: (N, 4) witnesses; right: (N,) bool. A witness never speaks
    against itself: those that would get a negative weight are left out."""
    x, y = told, np.asarray(right, np.float64)
    used, prior = np.ones(1 + WITNESSES, bool), PRIOR * np.array([0.0] + [1.0] * WITNESSES)
    while True:
        weights = np.zeros(1 + WITNESSES)
        for _ in range(steps):
            chance = 1 / (1 + np.exp(-(x @ weights)))
            slope = x.T @ (y - chance) - prior * weights
            curve = (x * (chance * (1 - chance) + 1e-9)[:, None]).T @ x + np.diag(np.maximum(prior, 1e-6))
            weights[used] += np.linalg.solve(curve[np.ix_(used, used)], slope[used])
        if (weights[1:] >= 0).all():
            return [round(float(w), 4) for w in weights]
        used[1:] &= weights[1:] >= 0
