"""What speaks for another name, or another place, of a labelled point: ratios of likelihood from several witnesses.

Two witnesses: the *layout* (how the points lie to each other on the project's other labelled images, layout.py), and the
*model* (where a prediction for the same object has its points). Neither is trusted as it is: `weigh` learns from the
project's own labels, most of which are right, how much each one's word is worth there. Pure functions on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.layout import MIN_OBJECTS, Layout, covariance, folds, normalised
from backend.matching import size_of
from kptllm_core.keypoints import KeypointSchema, KeypointSet

FREEDOM = 3.0  # of Student's t for distances: models and people make large errors now and then
LEAST_SCALE = 0.005  # of the object's size: nobody places points more exactly
RAYLEIGH = 1.1774  # median of a two-dimensional normal distance, in standard deviations
WITNESSES = ("layout", "model")
START = np.array([0.7, 0.7])  # what a witness's word is worth before anything is known
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Subject:
    """A labelled object and, where there is one, what the model predicts for it. Both in the order of the schema's names."""

    task: int
    annotation: int
    labelled: KeypointSet
    group: str
    predicted: KeypointSet | None = None
    number: int = 0  # which object of the annotation
    image: tuple[int, int] | None = None

    @property
    def size(self) -> float:
        return size_of(self.labelled, self.image)


@dataclass(frozen=True, eq=False)
class Witnesses:
    """The evidence on N objects of K points.

    z: (N, K) complex layouts; unit: (N,) shares of the object's size per unit of z; placed: (N, K); cost: (N, K, K) −log likelihood of the labelled
    point i if it were the model's point j, 0 where there is no such prediction; gap: (N, K) distance to the model's point of the
    same name in shares of the object's size, NaN without; trust: (N, K) score of the model's points; fold: (N,).
    """

    z: np.ndarray
    unit: np.ndarray
    placed: np.ndarray
    cost: np.ndarray
    gap: np.ndarray
    trust: np.ndarray
    fold: np.ndarray

    @classmethod
    def of(cls, subjects: Sequence[Subject], schema: KeypointSchema) -> Witnesses:
        count = len(schema)
        xy = np.array([s.labelled.xy for s in subjects], np.float64).reshape(-1, count, 2)
        placed = np.array([s.labelled.placed for s in subjects], bool).reshape(-1, count)
        size = np.array([s.size for s in subjects])
        none = KeypointSet(schema.names, np.zeros((count, 2)), np.zeros(count))
        predicted = [s.predicted or none for s in subjects]
        there = np.array([p.placed for p in predicted], bool).reshape(-1, count)
        trust = np.array([p.score for p in predicted], np.float64).reshape(-1, count) * there
        where = np.array([p.xy for p in predicted], np.float64).reshape(-1, count, 2)
        apart = np.linalg.norm(xy[:, :, None] - where[:, None], axis=-1) / size[:, None, None]
        gap = np.where(placed & there, np.einsum("nii->ni", apart), np.nan)
        cost = distance_cost(apart, scale_of(gap)) * (placed[:, :, None] & there[:, None]) * trust[:, None]
        z, unit = normalised(xy, placed)
        return cls(z, unit / size, placed, cost, gap, trust, folds([s.group for s in subjects]))

    def covariances(self, z: np.ndarray) -> dict[int, np.ndarray]:
        """Fold → covariance of the layouts of all other folds; empty for too few objects."""
        found = {}
        for fold in np.unique(self.fold):
            others = self.fold != fold
            if others.sum() >= MIN_OBJECTS:
                found[int(fold)] = covariance(z[others], self.placed[others])
        return found


def scale_of(gap: np.ndarray) -> np.ndarray:
    """(K,) standard deviation of each point's distances (N, K; NaN: none), robust, drawn towards that of all points."""
    known = np.isfinite(gap)
    count = known.sum(0)
    middle = np.array([np.median(gap[known[:, k], k]) if count[k] else 0.0 for k in range(gap.shape[1])])
    overall = float(np.median(gap[known])) if known.any() else LEAST_SCALE
    return np.maximum(np.sqrt((count * middle**2 + 5 * overall**2) / (count + 5)) / RAYLEIGH, LEAST_SCALE)


def distance_cost(distance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """−log density of a distance in the plane under Student's t of this scale, up to a constant of the scale."""
    return (FREEDOM / 2 + 1) * np.log1p(distance**2 / (FREEDOM * scale**2))


def exchange_evidence(layout: Layout | None, cost: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(P, 2) log-likelihood ratios for exchanging the names of points rows[p] and columns[p]: by the layout, by the model.

    cost: (K, K), see Witnesses. Points that the layout does not have get no evidence from it.
    """
    own = cost.diagonal()
    found = np.zeros((len(rows), 2))
    found[:, 1] = own[rows] + own[columns] - cost[rows, columns] - cost[columns, rows]
    if layout is not None:
        place = np.full(len(cost), -1)
        place[layout.index] = np.arange(len(layout.index))
        both = (place[rows] >= 0) & (place[columns] >= 0)
        found[both, 0] = layout.exchanges(place[rows[both]], place[columns[both]])
    return found


@dataclass(frozen=True, eq=False)
class Weights:
    """What each witness's word is worth, and the share of labels that are wrong."""

    worth: np.ndarray
    wrong: float

    def odds(self, evidence: np.ndarray) -> np.ndarray:
        """(…, 2) evidence → (…) log odds that the label is wrong."""
        return evidence @ self.worth + np.log(self.wrong / (1 - self.wrong))

    def confidence(self, evidence: np.ndarray) -> np.ndarray:
        return logistic(self.odds(evidence))


def logistic(x: np.ndarray | float) -> Any:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -50, 50)))


def weigh(
    evidence: np.ndarray, wrong: float = 0.02, strength: float = 50.0, belief: float = 3.0, steps: int = 25
) -> Weights:
    """Learn the weights from the evidence (M, 2) against M labels, of which most are right but nobody knows which are not.

    If a label were exchanged, the evidence would have the opposite sign: so each label is an example of both kinds, and the
    weights are those of a symmetric logistic regression with a share of wrong labels, found by expectation–maximisation. A
    witness who errs as often as not gets no weight. wrong, strength: the share expected beforehand, and its weight in labels;
    belief: the same for START.
    """
    worth, share = START.copy(), wrong
    for _ in range(steps):
        weights = Weights(worth, share)
        guilty = weights.confidence(evidence)  # (M,)
        share = float((guilty.sum() + wrong * strength) / (len(evidence) + strength))
        share = min(max(share, 1e-4), 0.2)
        for _ in range(
            3
        ):  # Newton: maximise Σ guilty·log σ(w·x) + (1 − guilty)·log σ(−w·x) − |w − START|² / 2 · belief
            chance = logistic(evidence @ worth)
            slope = evidence.T @ (guilty - chance) - belief * (worth - START)
            curve = (evidence * (chance * (1 - chance))[:, None]).T @ evidence + belief * np.eye(evidence.shape[1])
            worth = np.clip(worth + np.linalg.solve(curve, slope), 0.0, 3.0)
    return Weights(worth, share)
