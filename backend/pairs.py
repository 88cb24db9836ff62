"""Which pairs of left and right points of an object have each other's names? All of them are weighed together.

A wrong pair makes its neighbours look wrong, too: knees that are exchanged, or are it the ankles? So no pair is judged alone:
sets of exchanged pairs are compared with each other, and a pair's probability is that of all sets that contain it. Where two
explanations are as good as each other, the probability is shared between them, and so it is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backend.evidence import Pair, Weights
from backend.layout import Layout

FLIP = 3.5  # log odds against a pair being exchanged, before any evidence; and …
FLIP_ALL = 5.0  # … against all left and right points of an object at once
ALL_SETS = 10  # pairs up to which every set is looked at; with more, those near the likeliest ones


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the P pairs of one object look like.

    likeliest: (P,) bool, the likeliest set of exchanged pairs; odds: its log odds against none. Probabilities: each: (P,) that this
    pair is exchanged while most others are not; anything: that something is exchanged; all_at_once: that the object as a whole is
    the wrong way round. evidence: (P, 2) for each pair being exchanged, the others being as in the likeliest set; whole: (2,) for
    all being exchanged at once.
    """

    subject: int
    pairs: list[Pair]
    likeliest: np.ndarray
    odds: float
    each: np.ndarray
    anything: float
    all_at_once: float
    evidence: np.ndarray
    whole: np.ndarray


class PairModel:
    """The evidence on all sets of one object's pairs: quadratic in the set, so that thousands are weighed at once."""

    def __init__(self, layout: Layout | None, cost: np.ndarray, pairs: Sequence[Pair]) -> None:
        """cost: (K, K), see evidence.Witnesses; pairs: both points placed."""
        self.layout, self.pairs = layout, list(pairs)
        rows, columns = (np.array(side) for side in zip(*pairs, strict=True))
        own = cost.diagonal()
        self.by_model = own[rows] + own[columns] - cost[rows, columns] - cost[columns, rows]  # (P,)
        if layout is not None:
            place = np.full(len(cost), -1)
            place[layout.index] = np.arange(len(layout.index))
            a, b = place[rows], place[columns]
            step = np.zeros((len(layout.index), len(self.pairs)), complex)
            step[a, np.arange(len(a))] = layout.z[b] - layout.z[a]
            step[b, np.arange(len(b))] = layout.z[a] - layout.z[b]
            pulled = layout.precision @ step
            self._now = layout.squared
            self._slope = 2 * (layout.z.conj() @ pulled).real  # (P,)
            self._bend = (step.conj().T @ pulled).real  # (P, P)

    def evidence(self, sets: np.ndarray) -> np.ndarray:
        """(S, P) bool → (S, 2) log-likelihood ratios of each set being exchanged against none."""
        chosen = sets.astype(np.float64)
        found = np.zeros((len(sets), 2))
        found[:, 1] = chosen @ self.by_model
        if self.layout is not None:
            squared = self._now + chosen @ self._slope + np.einsum("sp,pq,sq->s", chosen, self._bend, chosen)
            found[:, 0] = self.layout.energy(self._now) - self.layout.energy(squared)
        return found

    def judge(self, subject: int, weights: Weights, whole: Weights) -> Verdict:
        """weights: of the witnesses on single pairs; whole: on the object as a whole being the wrong way round.

        Where the whole is not believed to be so, sets of more than half of the pairs are left out: in many kinds of object
        they look like the mirror image of the true explanation.
        """
        count = len(self.pairs)
        turned = np.ones((1, count), bool)
        everything = self.evidence(turned)[0]
        sets = self._sets(weights)
        if float(whole.confidence(everything)) < 0.5 and count > 1:
            sets = sets[sets.sum(1) <= count / 2]
        odds = self._odds(sets, weights)
        chance = np.exp(odds - odds.max())
        chance /= chance.sum()
        most = sets.sum(1) > max(count / 2, 1)  # a single pair is no object that is turned
        likeliest = sets[int(odds.argmax())].copy()  # of all sets nothing else is kept
        others = likeliest ^ np.eye(count, dtype=bool)  # each with one pair the other way
        change = self.evidence(others) - self.evidence(likeliest[None])
        return Verdict(
            subject, self.pairs, likeliest, float(odds.max()), each=chance[~most] @ sets[~most], anything=float(1 - chance[~sets.any(1)].sum()),
            all_at_once=float(chance[most].sum()), evidence=np.where(likeliest[:, None], -change, change), whole=everything,
        )  # fmt: skip

    def _odds(self, sets: np.ndarray, weights: Weights) -> np.ndarray:
        """(S,) log odds of each set against none."""
        count, chosen = len(self.pairs), sets.sum(1)
        prior = FLIP * chosen if count == 1 else np.minimum(FLIP * chosen, FLIP_ALL + FLIP * (count - chosen))
        return self.evidence(sets) @ weights.worth - prior

    def _sets(self, weights: Weights) -> np.ndarray:
        """(S, P) the sets that are worth comparing."""
        count = len(self.pairs)
        if count <= ALL_SETS:
            return np.array(list(itertools.product((False, True), repeat=count)), bool)
        starts = [np.zeros(count, bool), np.ones(count, bool)]
        for start in list(starts):
            best = start
            for _ in range(count):  # greedily, one pair after the other
                near = np.vstack([best[None], best ^ np.eye(count, dtype=bool)])
                k = int(self._odds(near, weights).argmax())
                if k == 0:
                    break
                best = near[k]
            starts.append(best)
        one = np.eye(count, dtype=bool)
        two = np.array([one[a] | one[b] for a, b in itertools.combinations(range(count), 2)], bool)
        steps = np.vstack([np.zeros((1, count), bool), one, two])
        return np.unique(np.concatenate([start ^ steps for start in starts]), axis=0)
