"""What the layouts of the examples tell of another object: where its points may lie, and whether it may be turned against them.

The model saw objects at all angles in training and cannot know that those of a project all stand alike, as specimens in a rig, teeth on X-rays
or portraits do. The examples can (docs/experiments.md, "Do the examples tell where a point may lie?").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from kptllm_core.keypoints import KeypointSet
from kptllm_core.vision import cell_centres

ALIKE = 45.0  # degrees by which objects that stand alike may be turned against each other
USUAL = 0.3  # of the crop: how far, in each direction, a point lies from where one example has it, before there are others to tell
FREEDOM = 4.0  # observations that the spread of all points together counts for in that of each
ENOUGH = 3  # examples that stand alike before that is taken for no chance: of objects at all angles, two do in a quarter of the cases
TRUST = 0.5  # of the prior's logarithm beside the heatmap, whose logits are too sure of kinds that were never seen


def may_be_turned(examples: Sequence[KeypointSet]) -> bool:
    """Whether objects of this kind may be turned against each other: unless there are `ENOUGH` examples, and no two are."""
    angles = [turn_between(a, b) for a, b in combinations(examples, 2)]
    known = [abs(angle) for angle in angles if angle is not None]
    return len(examples) < ENOUGH or not known or max(known) > ALIKE


def turn_between(one: KeypointSet, other: KeypointSet) -> float | None:
    """Degrees, clockwise, by which an object is turned against another, by the points that both have (least squares); None with
    fewer than two such points, or if all lie on one place."""
    both = one.placed & other.placed
    if both.sum() < 2:
        return None
    a, b = (_as_complex(points.xy[both]) for points in (one, other))
    fit = complex((a.conj() * b).sum())
    return float(np.degrees(np.angle(fit))) if abs(fit) > 0 else None


def _as_complex(xy: np.ndarray) -> np.ndarray:
    """(N, 2) → (N,) about their mean."""
    return (xy - xy.mean(0)) @ np.array([1, 1j])


def layout_prior(xy: Tensor, known: Tensor, height: int, width: int) -> Tensor:
    """Where a point may lie, before anybody looks: the logarithm of a density, up to a constant, in units of a heatmap's logits.

    A bell around the place that each example has it at (a kernel density), with Student's tails, since examples are few. It is as wide as
    the examples differ: each point for itself, shrunk towards all points together, and these towards `USUAL`; each example counts
    once there, since its points move together. Fewer than `ENOUGH` do not tell how much they differ. By Scott's rule the bells of many
    examples are narrower.

    xy: (B, S, K, 2) in the examples' crops, 0…1. known: (B, S, K) bool. → (B, K, height, width), zeros where no example has the point.
    """
    has = known.float()
    count = has.sum(1)  # (B, K)
    mean = (xy * has.unsqueeze(-1)).sum(1) / count.clamp(min=1).unsqueeze(-1)
    squares = ((xy - mean.unsqueeze(1)).square().sum(-1) * has).sum(1)
    enough = count >= ENOUGH
    freedom = 2 * (count - 1) * enough  # two coordinates, less their mean
    squares = squares * enough
    told = enough.sum(1, keepdim=True).clamp(min=1)
    together = (USUAL**2 + squares.sum(1, keepdim=True) / told) / (1 + freedom.sum(1, keepdim=True) / told)
    variance = (FREEDOM * together + squares) / (FREEDOM + freedom) * count.clamp(min=1) ** (-1 / 3)
    tails = (FREEDOM + freedom)[:, None, :, None, None]
    y, x = cell_centres(height, xy.device)[:, None], cell_centres(width, xy.device)
    far = (x - xy[..., 0, None, None]).square() + (y - xy[..., 1, None, None]).square()  # (B, S, K, height, width)
    bells = -(tails + 2) / 2 * torch.log1p(far / (tails * variance[:, None, :, None, None]))
    bells = bells.masked_fill(~known[..., None, None], -torch.inf)
    return torch.where(known.any(1)[..., None, None], TRUST * bells.logsumexp(1), 0.0)
