"""Which human labels look wrong: exchanged points, wrong names, points far off, points left out. Pure functions, no image is read.

    subjects (what people labelled, what the model predicts) ──> `find` ──> findings, the surest first

Each finding names the points, says why, and carries a confidence that was fitted to the project itself (evidence.py). Objects
are judged one after the other, each by what the *other* images of the project say: first pairs of left and right, which may
be wrong together, then any two names, then single points. Of very many objects some thousand at a time judge each other, so that
their number costs time, and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backend.evidence import (
    START,
    Pair,
    Subject,
    Weights,
    Witnesses,
    distance_cost,
    exchange_evidence,
    logistic,
    scale_of,
    weigh,
)
from backend.layout import Layout, renamed
from backend.pairs import PairModel, Verdict
from kptllm_core.keypoints import KeypointSchema, Visibility

LEAST = 0.5  # confidence below which nothing is reported
PASSES = 2  # the second one learns from labels that the first one has put right
SWAPS = 0.02  # share of pairs expected to be exchanged
WHOLE = 0.005  # share of objects expected to have all left and right points exchanged
CAUTION = 20.0  # what is rare cannot teach much about the witnesses: weigh them nearly as usual
RARE = 0.002  # share of points expected to be exchanged with one that is not their mirror image, or called by its name
FORGOTTEN = 0.02  # share of points expected to be left out though they can be seen
ALIKE = 10.0  # objects that all points together count for in how often one of them is not there
LEAST_ABOVE = 0.2  # of the scores of points that are there: even the surest are no proof
FAR = 0.002  # share of points expected to be far off
OFTEN = 0.8  # a point that fewer objects have is not missed
AT_ONCE = 4_000_000  # objects × points², of which there are some arrays: 9,000 objects of 21 points, 900 of 66
SWAPPED, MISNAMED, FAR_OFF, MISSING = "swapped", "misnamed", "far_off", "missing"
KINDS = (SWAPPED, MISNAMED, FAR_OFF, MISSING)


@dataclass(frozen=True, eq=False)
class Finding:
    """One suspicion. `suggested`: name → (x, y) in pixels where the points would rather be."""

    subject: Subject
    kind: str
    points: tuple[str, ...]
    confidence: float
    reason: str
    suggested: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """With everything that a picture of it needs."""
        labelled = self.subject.labelled
        box = labelled.object_box()
        return {
            "task": self.subject.task,
            "annotation": self.subject.annotation,
            "object": self.subject.number,
            "kind": self.kind,
            "points": list(self.points),
            "confidence": round(self.confidence, 3),
            "reason": self.reason,
            "picture": {
                "labelled": {
                    n: _place(p) for n, p, s in zip(labelled.names, labelled.xy, labelled.placed, strict=True) if s
                },
                "suggested": {n: _place(p) for n, p in self.suggested.items()},
                "box": None if box is None else [round(float(v), 1) for v in box],
                "size": list(self.subject.image) if self.subject.image else None,
            },
        }


def find(
    subjects: Sequence[Subject],
    schema: KeypointSchema,
    absent_is_said: bool = False,
    least: float = LEAST,
    use_layout: bool = True,
) -> list[Finding]:
    """Everything suspicious, the surest first. absent_is_said: a point that was not placed is said to be absent.

    use_layout: False to hear the model alone.
    """
    parts = math.ceil(len(subjects) * len(schema) ** 2 / AT_ONCE)
    found = [f for k in range(parts) for f in _Search(subjects[k::parts], schema, use_layout).run(absent_is_said, least)]
    return sorted(found, key=lambda f: -f.confidence)


class _Search:
    """z and cost are put right as exchanges are found, so that what follows is not misled by them."""

    def __init__(self, subjects: Sequence[Subject], schema: KeypointSchema, use_layout: bool = True) -> None:
        self.subjects, self.schema, self.use_layout = subjects, schema, use_layout
        self.seen = Witnesses.of(subjects, schema)
        self.z, self.cost = self.seen.z.copy(), self.seen.cost.copy()
        self.names = np.tile(np.arange(len(schema)), (len(subjects), 1))  # [n, k]: which labelled point is taken for k
        self.covariances = self.seen.covariances(self.z) if use_layout else {}
        self.by_model = _elsewhere(self.seen.gap) * self.seen.trust

    def run(self, absent_is_said: bool, least: float) -> list[Finding]:
        found = self._swapped() + self._exchanged() + self._renamed() + self._far_off()
        found += [] if absent_is_said else self._missing()
        return [f for f in found if f.confidence >= least]

    def layout(self, n: int) -> Layout | None:
        cov = self.covariances.get(int(self.seen.fold[n]))
        return None if cov is None else Layout.of(self.z[n], self.seen.placed[n], cov)

    def exchange(self, n: int, i: int, j: int) -> None:
        for values in (self.z[n], self.names[n]):
            values[[i, j]] = values[[j, i]]
        self.cost[n][[i, j]] = self.cost[n][[j, i]]

    # ------------------------------------------------------------ left and right

    def _swapped(self) -> list[Finding]:
        weights, whole = Weights(START, SWAPS), Weights(START / 2, WHOLE)
        for _ in range(PASSES):
            verdicts = self._judged(weights, whole)
            if not verdicts:
                return []
            # An object that is the wrong way round is one mistake, not as many as it has pairs: these are right once it is turned.
            # Were each of them counted as one, the witness who tells of it would seem to err, and lose its weight everywhere.
            pairs = np.concatenate([-v.evidence if v.all_at_once >= 0.5 else v.evidence for v in verdicts])
            weights = weigh(pairs, SWAPS, 1 / SWAPS)
            whole = weigh(np.stack([v.whole for v in verdicts]), WHOLE, 1 / WHOLE)
            self._put_right(verdicts)
        verdicts = self._judged(weights, whole)
        self._put_right(verdicts)
        return [f for v in verdicts if v.odds >= self.best_alone(v.subject) for f in self._of_verdict(v)]

    def _judged(self, weights: Weights, whole: Weights) -> list[Verdict]:
        """Of every object with pairs; one model at a time, since each holds points² numbers."""
        models = ((n, self._pairs(n)) for n in range(len(self.subjects)))
        return [model.judge(n, weights, whole) for n, model in models if model is not None]

    def _pairs(self, n: int) -> PairModel | None:
        """The pairs of one object as they were labelled, seen by what the others teach now."""
        placed, cov = self.seen.placed[n], self.covariances.get(int(self.seen.fold[n]))
        pairs = [(a, b) for a, b in self.schema.symmetric if placed[a] and placed[b]]
        layout = None if cov is None else Layout.of(self.seen.z[n], placed, cov)
        return PairModel(layout, self.seen.cost[n], pairs) if pairs else None

    def _put_right(self, verdicts: Sequence[Verdict]) -> None:
        self.z, self.cost = self.seen.z.copy(), self.seen.cost.copy()
        self.names[:] = np.arange(len(self.schema))
        for verdict in verdicts:
            if verdict.anything >= 0.5 and verdict.odds >= self.best_alone(verdict.subject):
                for pair, wrong in zip(verdict.pairs, verdict.likeliest, strict=True):
                    if wrong:
                        self.exchange(verdict.subject, *pair)
        self.covariances = self.seen.covariances(self.z) if self.use_layout else {}

    def _of_verdict(self, verdict: Verdict) -> list[Finding]:
        subject, names = self.subjects[verdict.subject], self.schema.names
        if verdict.all_at_once >= 0.5:
            points = tuple(names[i] for pair in verdict.pairs for i in pair)
            reason = (
                f"The left and right points seem to be exchanged as a whole: {_witnesses(verdict.whole)} the other way round. "
                "Is the object seen from the other side?"
            )
            return [
                Finding(subject, SWAPPED, points, verdict.all_at_once, reason, self._turned(subject, verdict.pairs))
            ]
        each = verdict.each
        found = []
        for k in np.flatnonzero(each >= 0.5):
            a, b = (names[i] for i in verdict.pairs[k])
            reason = f"'{a}' and '{b}' seem to be exchanged: {_witnesses(verdict.evidence[k])} the other way round."
            places = self._turned(subject, [verdict.pairs[k]])
            found.append(Finding(subject, SWAPPED, (a, b), float(each[k]), reason, places))
        if not found and verdict.anything >= LEAST:
            shared = [k for k in np.argsort(-each) if each[k] >= 0.3 * each.max()]
            points = tuple(names[i] for k in shared for i in verdict.pairs[k])
            either = " or ".join(f"'{names[a]}' and '{names[b]}'" for a, b in (verdict.pairs[k] for k in shared))
            reason = f"Either {either} seem to be exchanged: one of these pairs does not fit the others."
            places = self._turned(subject, [verdict.pairs[shared[0]]])
            found.append(Finding(subject, SWAPPED, points, verdict.anything - verdict.all_at_once, reason, places))
        return found

    def _turned(self, subject: Subject, pairs: Sequence[Pair]) -> dict[str, tuple[float, float]]:
        names, xy = self.schema.names, subject.labelled.xy
        return {names[i]: _pair(xy[j]) for a, b in pairs for i, j in ((a, b), (b, a))}

    # ------------------------------------------------------------ other names

    def _exchanged(self) -> list[Finding]:
        """Two points that are no mirror images of each other, with each other's names."""
        mirror = self.schema.mirror()
        odd_ones = [(i, j) for i in range(len(mirror)) for j in range(i) if mirror[i] != j]
        if not odd_ones:
            return []
        rows, columns = (np.array(side) for side in zip(*odd_ones, strict=True))
        both = self.seen.placed[:, rows] & self.seen.placed[:, columns]
        evidence = np.stack(
            [exchange_evidence(self.layout(n), self.cost[n], rows, columns) for n in range(len(self.subjects))]
        )
        known = evidence[both]
        sample = known[np.linspace(0, len(known) - 1, min(len(known), 5000)).astype(int)] if len(known) else known
        weights = Weights(weigh(sample, belief=CAUTION).worth, RARE / len(self.schema))
        found = []
        for n, subject in enumerate(self.subjects):
            odds = np.where(both[n], weights.odds(evidence[n]), -np.inf)
            k = int(odds.argmax())
            if odds[k] > max(0.0, self.best_alone(n)):
                i, j = int(rows[k]), int(columns[k])
                a, b = self.schema.names[i], self.schema.names[j]
                reason = f"'{a}' and '{b}' seem to be exchanged: {_witnesses(evidence[n, k])} the other way round."
                places = {a: _pair(self._xy(n, j)), b: _pair(self._xy(n, i))}
                found.append(Finding(subject, MISNAMED, (a, b), float(logistic(odds[k])), reason, places))
                self.exchange(n, i, j)
        return found

    def _renamed(self) -> list[Finding]:
        """A point under the name of one that nobody placed on this object."""
        evidence, where = [], []
        for n in range(len(self.subjects)):
            layout, missing = self.layout(n), np.flatnonzero(~self.seen.placed[n])
            if layout is None or not len(missing):
                continue
            by_layout = renamed(layout, self.covariances[int(self.seen.fold[n])], missing)
            own = self.cost[n].diagonal()[layout.index]
            by_model = (own[:, None] - self.cost[n][np.ix_(layout.index, missing)]) * (own > 0)[:, None]
            evidence.append(np.stack([by_layout, by_model], -1).reshape(-1, 2))
            where += [(n, int(i), int(j)) for i in layout.index for j in missing]
        if not where:
            return []
        told = np.concatenate(evidence)
        weights = Weights(weigh(told[:: max(len(told) // 5000, 1)], belief=CAUTION).worth, RARE / len(self.schema))
        odds = weights.odds(told)
        mirror, best = self.schema.mirror(), dict[int, int]()
        usual = np.log(SWAPS / weights.wrong)  # left for right is the usual mistake
        for k, (n, i, j) in enumerate(where):
            odds[k] += usual if mirror[i] == j else 0.0
            if odds[k] > max(odds[best[n]] if n in best else 0.0, 0.0):
                best[n] = k
        found = []
        for n, k in best.items():
            if odds[k] < self.best_alone(n):
                continue
            i, j = where[k][1:]
            a, b = self.schema.names[i], self.schema.names[j]
            reason = f"'{a}' seems to be '{b}': {_witnesses(told[k])} under that name."
            kind = SWAPPED if mirror[i] == j else MISNAMED
            place = {b: _pair(self._xy(n, i))}
            found.append(Finding(self.subjects[n], kind, (a, b), float(logistic(odds[k])), reason, place))
        return found

    # ------------------------------------------------------------ single points

    def alone(self, n: int) -> np.ndarray:
        """(K,) log odds that this one point is misplaced, as the labels are taken now; −inf for points that are not there."""
        odds = np.full(len(self.schema), -np.inf)
        there = self.seen.placed[n]
        layout = self.layout(n)
        odds[there] = np.log(FAR) + START[1] * self.by_model[n, there] * (self.names[n, there] == np.flatnonzero(there))
        if layout is not None:
            odds[layout.index] += START[0] * layout.misplaced()
        return odds

    def best_alone(self, n: int) -> float:
        """The best that can be said for one misplaced point: what explains more by names must be likelier than that."""
        return float(self.alone(n).max(initial=-np.inf))

    def _far_off(self) -> list[Finding]:
        """Points that lie elsewhere than the witnesses expect, the worst of an object."""
        found = []
        for n, subject in enumerate(self.subjects):
            odds, layout = self.alone(n), self.layout(n)
            k = int(odds.argmax())
            if not odds[k] > 0 or self.names[n, k] != k:
                continue
            name, predicted = self.schema.names[k], subject.predicted
            by_layout, residual = 0.0, 0j
            if layout is not None:
                at = int(np.flatnonzero(layout.index == k)[0])
                by_layout, residual = float(layout.misplaced()[at]), layout.residuals()[at] * self.seen.unit[n]
            to = subject.labelled.xy[k] - np.array([residual.real, residual.imag]) * subject.size
            far = abs(residual)
            if predicted is not None and predicted.placed[k] and self.by_model[n, k] > 0.5:
                to, far = predicted.xy[k], float(self.seen.gap[n, k])
            told = _witnesses(np.array([by_layout, self.by_model[n, k]]))
            reason = f"'{name}' lies {far:.0%} of the object's size from where it is expected: {told.replace('them', 'it')} elsewhere."
            found.append(Finding(subject, FAR_OFF, (name,), float(logistic(odds[k])), reason, {name: _pair(to)}))
        return found

    def _missing(self) -> list[Finding]:
        """Points that people placed on most other objects, and that the model sees here.

        Forgotten, or really not there? The more often other objects lack the point, and lack points at all, the likelier it is not there. The
        model sees points that are not there, too, only less surely: its score tells by its rank r among those of the objects that have
        the point. Of points that are there any rank is as likely as another, of others their density falls, as 2 (1 - r), but not to nothing.
        """
        score, usual = self.seen.trust, np.flatnonzero(self.seen.placed.mean(0) >= OFTEN)
        lacking = (~self.seen.placed).sum(0)
        anywhere = (lacking[usual].sum() - 0.5) / max(len(self.subjects) * len(usual), 1)  # this one aside, and half a point for luck
        found = []
        for n, k in ((n, k) for n in range(len(self.subjects)) for k in usual if not self.seen.placed[n, k]):
            told = self.subjects[n].predicted
            if told is None or told.visibility[k] != Visibility.VISIBLE:
                continue
            known = score[self.seen.placed[:, k] & (score[:, k] > 0), k]
            above = ((known > told.score[k]).sum() + (known == told.score[k]).sum() / 2 + 0.5) / (len(known) + 1)  # 1 - r
            absent = (lacking[k] - 1 + ALIKE * anywhere) / (len(self.subjects) - 1 + ALIKE)
            odds = np.log(FORGOTTEN / absent) - np.log(2 * max(above, LEAST_ABOVE))
            if odds > 0:
                name, share = self.schema.names[k], 1 - lacking[k] / len(self.subjects)
                reason = f"'{name}' is on {share:.0%} of the labelled objects, and the model sees it here, but it was not placed."
                found.append(Finding(self.subjects[n], MISSING, (name,), float(logistic(odds)), reason, {name: _pair(told.xy[k])}))
        return found

    def _xy(self, n: int, k: int) -> np.ndarray:
        """(2,) where the point now taken for k was labelled."""
        place: np.ndarray = self.subjects[n].labelled.xy[self.names[n, k]]
        return place


def _elsewhere(gap: np.ndarray) -> np.ndarray:
    """(N, K) distances in shares of the object's size → log-likelihood ratio of `anywhere on the object` against `as usual`."""
    scale = scale_of(gap)
    usual = -np.log(2 * np.pi * scale**2) - distance_cost(gap, scale)
    return np.where(np.isfinite(gap), np.clip(-np.log(np.pi) - usual, -2.0, 8.0), 0.0)


def _witnesses(evidence: np.ndarray) -> str:
    """Who says so, as the first half of a sentence that ends in `the other way round`, `elsewhere`, …"""
    layout, model = (value > 0.5 for value in evidence)
    if layout and model:
        return "the other labelled images and the model have them"
    if layout:
        return "the other labelled images have them"
    return "the model has them" if model else "they fit better"


def _pair(xy: np.ndarray) -> tuple[float, float]:
    return float(xy[0]), float(xy[1])


def _place(xy: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(xy[0]), 1), round(float(xy[1]), 1)]
