"""How often is the model right when it says that it is sure? A monotone map from its score to that share, and its diagram.

Pure functions of (score, hit, group). A *hit* is a predicted point that a person would not move: within the tolerance of the
effort meter. The map is isotonic regression: nothing is assumed but that a higher score means a better point. Few data are
helped out by a prior, which says what the score itself says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10  # of the diagram
PRIOR = 20.0  # points' worth of belief in the score as it is, spread evenly over 0…1
KNOTS = 20  # of the map
TILT = 0.01  # of the score itself: where the data tell no difference, the higher score still ranks higher
ENOUGH = 30  # points below which there is no map
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Calibration:
    """A monotone map 0…1 → 0…1, linear between its knots."""

    score: tuple[float, ...] = (0.0, 1.0)
    share: tuple[float, ...] = (0.0, 1.0)
    points: int = 0  # that it was fitted on; 0: the score as it is

    def __call__(self, score: np.ndarray | float) -> np.ndarray:
        """(…,) raw scores → the share of points with such a score that need no correction."""
        return np.interp(np.asarray(score, np.float64), self.score, self.share)

    def to_json(self) -> dict[str, Any]:
        return {
            "score": [round(v, 5) for v in self.score],
            "share": [round(v, 5) for v in self.share],
            "points": self.points,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Calibration:
        """What `to_json` wrote; the identity for an empty one."""
        return cls(tuple(data["score"]), tuple(data["share"]), int(data["points"])) if data else cls()


def fit(score: np.ndarray, hit: np.ndarray) -> Calibration:
    """Isotonic regression of (N,) hits on (N,) scores, with the prior; the identity for fewer than ENOUGH points."""
    score, hit = np.asarray(score, np.float64), np.asarray(hit, np.float64)
    if len(score) < ENOUGH:
        return Calibration()
    index = np.clip((score * KNOTS).astype(int), 0, KNOTS - 1)
    middle = (np.arange(KNOTS) + 0.5) / KNOTS
    weight = np.bincount(index, minlength=KNOTS) + PRIOR / KNOTS
    x = (np.bincount(index, score, KNOTS) + middle * PRIOR / KNOTS) / weight
    share = _pool((np.bincount(index, hit, KNOTS) + middle * PRIOR / KNOTS) / weight, weight)
    share = (1 - TILT) * share + TILT * x
    return Calibration((0.0, *map(float, x), 1.0), (float(share[0]), *map(float, share), float(share[-1])), len(score))


def _pool(share: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Pool adjacent violators: the nearest rising values to `share` (K,), weighted."""
    blocks: list[tuple[float, float, int]] = []  # weight, Σ weight · share, how many
    for y, w in zip(share, weight, strict=True):
        block = (float(w), float(w * y), 1)
        while blocks and blocks[-1][1] / blocks[-1][0] >= block[1] / block[0]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    return np.concatenate([np.full(count, total / w) for w, total, count in blocks])


def reliability(score: np.ndarray, hit: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """The diagram's data: per bin of score its mean, the share of hits with a 95 % interval, and the number of points.

    `error` is the expected calibration error, the mean gap between score and share, weighted by points; None without points.
    """
    score, hit = np.asarray(score, np.float64), np.asarray(hit, np.float64)
    index = np.clip((score * bins).astype(int), 0, bins - 1)
    rows = []
    for i in range(bins):
        mine = index == i
        if mine.any():
            low, high = _wilson(float(hit[mine].sum()), int(mine.sum()))
            mean, share = float(score[mine].mean()), float(hit[mine].mean())
            row = {"score": mean, "share": share, "low": low, "high": high}
            rows.append({k: round(v, 4) for k, v in row.items()} | {"points": int(mine.sum())})
    error = sum(abs(r["score"] - r["share"]) * r["points"] for r in rows) / len(score) if len(score) else None
    return {"bins": rows, "points": len(score), "error": None if error is None else round(error, 4)}


def cross_validated(score: np.ndarray, hit: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(N,) calibrated scores, each from a map fitted without its group's fold: what the map is worth on other videos or subjects.

    group: (N,) of its image (`Task.group`).
    """
    score, hit = np.asarray(score, np.float64), np.asarray(hit, np.float64)
    fold = np.unique(group, return_inverse=True)[1] % FOLDS if len(score) else np.zeros(0, int)
    found = score.copy()
    for i in range(FOLDS):
        mine = fold == i
        if mine.any():
            found[mine] = fit(score[~mine], hit[~mine])(score[mine])
    return found


def _wilson(hits: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    share, wide = hits / count, z * z / count
    centre = (share + wide / 2) / (1 + wide)
    half = z / (1 + wide) * float(np.sqrt(share * (1 - share) / count + wide / (4 * count)))
    return max(centre - half, 0.0), min(centre + half, 1.0)
