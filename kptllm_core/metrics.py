"""What the figures mean: pure functions of distances, scores and names. numpy only; knows neither images nor models.

A *pair* is one query object predicted from one support set. Its distances are those of the points that count, as (n,)
float in units of max(w, h) of the object's true box; `distances` below is a sequence of such arrays, one for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

THRESHOLDS = (0.02, 0.05, 0.1, 0.2)  # of the reports
OKS_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's .50:.05:.95
MAX_DETECTIONS = 20  # of one image and category that count for AP, as in COCO
MPCK_THRESHOLDS = (0.05, 0.10, 0.15, 0.20, 0.25)
MISSED = 1.0  # distance of a point for which no position was predicted: one whole object
EASY_COPY = 0.5  # categories that copying solves to this share at 0.1 say nothing about skill
AP10K_SIGMAS = np.array(
    [.025, .025, .026, .035, .035, .079, .072, .062, .079, .072, .062, .107, .087, .089, .107, .087, .089]
)  # fmt: skip


def normalised_distance(predicted: np.ndarray, true: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(…, 2) predicted and true positions in pixels, (4,) true box x, y, w, h → (…) distance / max(w, h)."""
    size = max(float(box[2]), float(box[3]), 1.0)
    return np.linalg.norm(np.asarray(predicted, np.float64) - np.asarray(true, np.float64), axis=-1) / size


def pck(distances: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """(N,) share of each pair's points that lie strictly nearer than `threshold`; a pair without any point scores 0."""
    return np.array([float(np.mean(d < threshold)) if len(d) else 0.0 for d in distances])


def mean_pck(distances: Sequence[np.ndarray], threshold: float) -> float:
    """Mean over the points of a pair, then over the pairs; 0 without pairs."""
    return float(pck(distances, threshold).mean()) if len(distances) else 0.0


def mpck(distances: Sequence[np.ndarray]) -> float:
    """Mean of PCK over .05, .10, .15, .20, .25."""
    return float(np.mean([mean_pck(distances, t) for t in MPCK_THRESHOLDS]))


def auc(distances: Sequence[np.ndarray]) -> float:
    """Σ PCK@(i/20) / 20 for i = 0…19: area under the PCK curve up to one object size."""
    return float(np.mean([mean_pck(distances, i / 20) for i in range(20)]))


def nme(distances: Sequence[np.ndarray]) -> float | None:
    """Mean normalised distance, over the points of a pair, then over the pairs that have points; None if none has."""
    means = [float(np.mean(d)) for d in distances if len(d)]
    return float(np.mean(means)) if means else None


def oks(predicted: np.ndarray, true: np.ndarray, labelled: np.ndarray, area: float, sigmas: np.ndarray) -> float:
    """COCO's object keypoint similarity.

    predicted, true: (K, 2) pixels; labelled: (K,) bool, v > 0; area: pixels²; sigmas: (K,), k = 2σ.
    0 without labelled points.
    """
    if not np.any(labelled):
        return 0.0
    squared = ((np.asarray(predicted, np.float64) - np.asarray(true, np.float64)) ** 2).sum(-1)
    similarity = np.exp(-squared / (2 * max(area, 1e-9) * (2 * np.asarray(sigmas, np.float64)) ** 2))
    return float(similarity[np.asarray(labelled, bool)].mean())


def average_precision(images: Sequence[tuple[np.ndarray, np.ndarray]], threshold: float, most: int = MAX_DETECTIONS) -> float | None:
    """COCO's average precision at one threshold of similarity; None without true objects.

    images: for each image of one category, the scores (D,) of what was predicted and its similarity (D, G) with each true object:
    `oks` of the points, or the overlap (IoU) of the boxes. Of an image the `most` surest predictions count.
    In each image the surest prediction takes its best free object first; one that finds none at `threshold` or above is
    wrong. Precision is made monotone and averaged at the recalls 0, .01 … 1.
    """
    total = sum(similarity.shape[1] for _, similarity in images)
    if not total:
        return None
    scores: list[float] = []
    right: list[bool] = []
    for score, similarity in images:
        free = np.ones(similarity.shape[1], bool)
        for row in np.argsort(-np.asarray(score), kind="stable")[:most]:
            scores.append(float(score[row]))
            candidates = np.where(free, similarity[row], -1.0)
            best = int(candidates.argmax()) if len(candidates) else -1
            right.append(best >= 0 and bool(candidates[best] >= threshold))
            if right[-1]:
                free[best] = False
    hits = np.array(right, bool)[np.argsort(-np.array(scores), kind="stable")].cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    first = np.searchsorted(hits / total, np.linspace(0, 1, 101))  # where each recall is first reached
    return float(np.concatenate([precision, [0.0]])[np.minimum(first, len(precision))].mean())


def mean_ap(images: Sequence[tuple[np.ndarray, np.ndarray]], most: int = MAX_DETECTIONS) -> float | None:
    """Mean of `average_precision` over .50:.05:.95: the AP of COCO (boxes or points) and AP-10K, for one category."""
    found = [average_precision(images, t, most) for t in OKS_THRESHOLDS]
    return None if found[0] is None else float(np.mean([f for f in found if f is not None]))


def calibration_error(score: np.ndarray, hit: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error: mean |share of hits − mean score| over equal bins of score, weighted by their points.

    score: (N,) in 0…1, the stated probability; hit: (N,) bool, whether it came true. None without points.
    """
    score, hit = np.asarray(score, np.float64), np.asarray(hit, np.float64)
    if not len(score):
        return None
    index = np.clip((score * bins).astype(int), 0, bins - 1)
    gap = np.bincount(index, hit, bins) - np.bincount(index, score, bins)
    return float(np.abs(gap).sum() / len(score))


def bootstrap_interval(values: np.ndarray, query: Sequence[object], stratum: Sequence[object] | None = None,
                       *, level: float = 0.95, samples: int = 1000, seed: int = 0) -> list[float] | None:  # fmt: skip
    """[low, high] of the mean of `values`, by resampling queries with all their pairs, within each stratum (category).

    values: (N,), one for each pair; query, stratum: (N,) hashable. A query that was drawn into many episodes is one
    observation, not many: resampling pairs would give intervals that are far too narrow. None without values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return None
    strata = list(stratum) if stratum is not None else [0] * len(values)
    rng = np.random.default_rng(seed)
    total, count = np.zeros(samples), np.zeros(samples)
    for name in dict.fromkeys(strata):
        rows = [i for i, s in enumerate(strata) if s == name]
        number = {q: j for j, q in enumerate(dict.fromkeys(query[i] for i in rows))}
        index = np.array([number[query[i]] for i in rows])
        size = len(number)
        weight = rng.multinomial(size, np.full(size, 1 / size), samples)  # (samples, queries)
        total += weight @ np.bincount(index, values[rows], size)
        count += weight @ np.bincount(index, minlength=size)
    low, high = np.quantile(total / count, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def skill(pck_at_01: Mapping[str, float], copy_at_01: Mapping[str, float | None]) -> float | None:
    """Mean of (PCK − copy) / (1 − copy) over the categories whose copy PCK@0.1 is below 0.5; None if there is none."""
    gains = [
        (pck_at_01[name] - copy) / (1 - copy)
        for name, copy in copy_at_01.items()
        if copy is not None and copy < EASY_COPY
    ]
    return float(np.mean(gains)) if gains else None


def naming_accuracy(predicted: Sequence[str], true: Sequence[str], rule: Callable[[str], str]) -> float | None:
    """Share of points whose predicted name is the true one: both read alike by `rule`. None without points."""
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predicted names for {len(true)} points")
    if not true:
        return None
    return float(np.mean([rule(p) == rule(t) for p, t in zip(predicted, true, strict=True)]))
