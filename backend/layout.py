"""How the points of a kind of object lie to each other, learned from the project's own labels. numpy only; pure functions.

An object's K points are a vector of complex numbers x + iy, moved to their mean and scaled to unit spread. Its distribution is
taken as complex Gaussian with mean zero: it has one covariance matrix, which does not change when the object is turned,
which a mirror image does not fit (so left and right are told apart wherever the data tell them apart), and of which the rows
and columns of missing points are simply left out. Heavy tails (Student's t) keep one odd point from deciding everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What few examples cannot know is added to the diagonal: SHRINK × points / objects of the mean variance, within limits.
SHRINK, LEAST_SHRINK, MOST_SHRINK = 0.3, 0.02, 0.1
FREEDOM = 20.0  # degrees of freedom of the tails
REACH = 2.0  # units of spread: a misplaced point lies anywhere on a disc of this radius
MIN_POINTS = 3  # an object with fewer says nothing about its layout
MIN_OBJECTS = 6  # fewer teach nothing


def normalised(xy: np.ndarray, placed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K, 2) pixels and (N, K) bool → (N, K) complex, mean 0 and mean square 1 over the placed points, and (N,) pixels per unit."""
    z = np.where(placed, xy[..., 0] + 1j * xy[..., 1], 0.0)
    count = np.maximum(placed.sum(1, keepdims=True), 1)
    z = np.where(placed, z - z.sum(1, keepdims=True) / count, 0.0)
    unit = np.sqrt((np.abs(z) ** 2).sum(1, keepdims=True) / count)
    return z / np.maximum(unit, 1e-9), np.maximum(unit[:, 0], 1e-9)


def covariance(z: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """(N, K) complex, (N, K) bool → (K, K) Hermitian and positive definite, from the pairs that are there."""
    there = placed.astype(np.float64)
    together = there.T @ there
    found = (z.T @ z.conj()) / np.maximum(together, 1.0)
    # Pairs never seen together say nothing; pairs of different objects may add up to no covariance at all.
    values, vectors = np.linalg.eigh((found + found.conj().T) / 2)
    found = (vectors * np.maximum(values, 0.0)) @ vectors.conj().T
    count = len(found)
    shrink = min(max(SHRINK * count / max(float(np.median(together)), 1.0), LEAST_SHRINK), MOST_SHRINK)
    spread = float(np.trace(found).real) / count
    return found + shrink * max(spread, 1e-6) * np.eye(count)


@dataclass(frozen=True, eq=False)
class Layout:
    """One object under a covariance. index: (n,) the placed points; z: (n,) complex; precision: (n, n) inverse covariance."""

    index: np.ndarray
    z: np.ndarray
    precision: np.ndarray

    @classmethod
    def of(cls, z: np.ndarray, placed: np.ndarray, cov: np.ndarray) -> Layout | None:
        """z, placed: (K,). None for too few points."""
        index = np.flatnonzero(placed)
        if len(index) < MIN_POINTS:
            return None
        return cls(index, z[index], np.linalg.inv(cov[np.ix_(index, index)]))

    def energy(self, squared: np.ndarray | float) -> np.ndarray:
        """−log density of a squared Mahalanobis distance, up to a constant of this object."""
        return (FREEDOM / 2 + len(self.index)) * np.log1p(2 * np.maximum(squared, 0.0) / FREEDOM)

    @property
    def squared(self) -> float:
        return float((self.z.conj() @ self.precision @ self.z).real)

    def exchanges(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(P,) how much likelier the object is with the names of a[p] and b[p] (positions in `index`) exchanged: log ratios."""
        p, z = self.precision, self.z
        pull, own = p @ z, p.diagonal().real
        step = z[b] - z[a]  # what is added to point a
        gain = 2 * (step.conj() * (pull[a] - pull[b])).real
        bend = own[a] + own[b] - 2 * p[a, b].real
        now = float((z.conj() @ pull).real)
        return self.energy(now) - self.energy(now + gain + np.abs(step) ** 2 * bend)

    def exchanged(self, pairs: list[tuple[int, int]]) -> Layout:
        """With the names of these pairs (positions in `index`) exchanged."""
        z = self.z.copy()
        for a, b in pairs:
            z[a], z[b] = z[b], z[a]
        return Layout(self.index, z, self.precision)

    def ratio(self, other: Layout) -> float:
        """How much likelier `other` (the same points under other names) is than this: a log-likelihood ratio."""
        return float(self.energy(self.squared) - self.energy(other.squared))

    def misplaced(self) -> np.ndarray:
        """(n,) how much likelier the object is with this point anywhere instead of where it is: log-likelihood ratios."""
        own = self.precision.diagonal().real
        now = self.squared
        without = now - np.abs(self.precision @ self.z) ** 2 / own  # of the others alone
        return self.energy(now) - self.energy(without) - np.log(REACH**2 * own)

    def residuals(self) -> np.ndarray:
        """(n,) complex: how far each point lies from where the others say it is, in units of the object's spread."""
        return (self.precision @ self.z) / self.precision.diagonal().real


def renamed(layout: Layout, cov: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """(n, m) how much likelier each placed point is under the name of each missing one, the others being as they are."""
    found = np.zeros((len(layout.index), len(missing)))
    for a in range(len(layout.index)):
        others = np.delete(layout.index, a)
        rest, here = np.delete(layout.z, a), layout.z[a]
        inverse = np.linalg.inv(cov[np.ix_(others, others)])
        names = np.concatenate([[layout.index[a]], missing])
        pull = cov[np.ix_(names, others)] @ inverse  # (1 + m, n - 1)
        spread = np.maximum((cov[names, names] - np.einsum("ij,ji->i", pull, cov[np.ix_(others, names)])).real, 1e-9)
        squared = np.abs(here - pull @ rest) ** 2 / spread
        energy = np.log(spread) + (FREEDOM / 2 + 1) * np.log1p(2 * squared / FREEDOM)
        found[a] = energy[0] - energy[1:]
    return found


def folds(groups: list[str], count: int = 10) -> np.ndarray:
    """(N,) fold of each object: those of one group stay together where there are groups enough."""
    names = list(dict.fromkeys(groups))
    if len(names) < 5:
        return np.arange(len(groups)) % count
    place = {name: i % count for i, name in enumerate(names)}
    return np.array([place[g] for g in groups])
