"""Support images, encoded one by one and turned; which of them a query is shown: those that look most like it.

Attention over the shots weighs them against each other, not against the query. So beyond a few they blur what they say, the more the more
they differ; chosen for each query, more of them say more. Nor does the model know by itself how an object is turned against its example: the
look tells (docs/experiments.md, "Which examples should a query see?").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kptllm_core.vision import Features

NEAREST = 5  # examples that a query is shown
TURNS = tuple(45.0 * i for i in range(8))  # degrees, by which an example is shown, unless all stand alike
HANDICAP = 0.25  # likeness by which a turned example must surpass the same one as it stands
CELLS = 4  # along each side of a look


class Shots(NamedTuple):
    """S support images of K points, each turned in T ways; one row (B = 1) for any query, or one for each of B queries. The first
    turn of each is as it stands.

    token: (B, S·T, K, D) prompt tokens. descriptor: three (B, S·T, K, C). xy: (B, S·T, K, 2) in the support crops, 0…1.
    known: (B, S·T, K) bool. look: (B, S·T, L) what the crops look like. turns: T.
    """

    token: Tensor
    descriptor: tuple[Tensor, Tensor, Tensor]
    xy: Tensor
    known: Tensor
    look: Tensor
    turns: int = 1

    @classmethod
    def joined(cls, parts: Sequence[Shots], turns: int) -> Shots:
        """The shots of all parts, one after the other."""
        token, descriptor, xy, known, look, _ = zip(*parts, strict=True)
        fine, middle, coarse = (torch.cat(level, 1) for level in zip(*descriptor, strict=True))
        return cls(torch.cat(token, 1), (fine, middle, coarse), torch.cat(xy, 1), torch.cat(known, 1), torch.cat(look, 1), turns)

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(t.nbytes for t in (self.token, *self.descriptor, self.xy, self.known, self.look))

    def upright(self) -> Shots:
        """The images as they stand."""
        fine, middle, coarse = (d[:, :: self.turns] for d in self.descriptor)
        token, xy, known, look = (x[:, :: self.turns] for x in (self.token, self.xy, self.known, self.look))
        return Shots(token, (fine, middle, coarse), xy, known, look)

    def nearest(self, look: Tensor) -> Shots:
        """For each query and each point, of the images that know it, the `NEAREST` that look most like the query's crop, each in that turn
        which does. look: (B, L) of the queries. The scale of each feature is its spread over the shots."""
        count = self.known.shape[1] // self.turns
        if count <= NEAREST and self.turns == 1:
            return self
        mean, spread = self.look.mean(1, keepdim=True), self.look.std(1, keepdim=True) + 1e-6
        ours, theirs = (F.normalize((x - mean) / spread, dim=-1) for x in (self.look, look.unsqueeze(1)))
        alike = (ours * theirs).sum(-1).unflatten(1, (count, self.turns))
        alike[:, :, 1:] -= HANDICAP
        best, turn = alike.max(-1)
        known = self.known[:, :: self.turns]
        order = best.unsqueeze(-1).masked_fill(~known, -2.0 - HANDICAP).topk(min(NEAREST, count), 1).indices  # (B, S', K)
        order = order * self.turns + turn.unsqueeze(-1).expand(-1, -1, order.shape[-1]).gather(1, order)

        def take(x: Tensor) -> Tensor:
            index = order.unsqueeze(-1).expand(*order.shape, x.shape[-1])
            return x.expand(len(order), *x.shape[1:]).gather(1, index)

        fine, middle, coarse = (take(d) for d in self.descriptor)
        return Shots(take(self.token), (fine, middle, coarse), take(self.xy), take(self.known.unsqueeze(-1)).squeeze(-1), self.look)


def look_of(features: Features) -> Tensor:
    """(B, L): what crops look like, roughly and where."""
    return F.adaptive_avg_pool2d(features.coarse.detach().float(), CELLS).flatten(1)
