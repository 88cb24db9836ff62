"""Support images, encoded one by one, and which of them a query is shown: those that look most like it.

Attention over the shots weighs them against each other, not against the query. So beyond a few they blur what they say, the more the more
they differ; chosen for each query, more of them say more (docs/experiments.md, "Which examples should a query see?").
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kptllm_core.vision import Features

NEAREST = 5
CELLS = 4  # along each side of a look


class Shots(NamedTuple):
    """S support images of K points; one row (B = 1) for any query, or one for each of B queries.

    token: (B, S, K, D) prompt tokens. descriptor: three (B, S, K, C). xy: (B, S, K, 2) in the support crops, 0…1. known: (B, S, K) bool.
    look: (B, S, L) what the crops look like.
    """

    token: Tensor
    descriptor: tuple[Tensor, Tensor, Tensor]
    xy: Tensor
    known: Tensor
    look: Tensor

    def nearest(self, look: Tensor) -> Shots:
        """For each query and each point, of the shots that know it, the `NEAREST` whose crops look most like the query's; all where there
        are no more. look: (B, L) of the queries. The scale of each feature is its spread over the shots."""
        if self.known.shape[1] <= NEAREST:
            return self
        mean, spread = self.look.mean(1, keepdim=True), self.look.std(1, keepdim=True) + 1e-6
        ours, theirs = (F.normalize((x - mean) / spread, dim=-1) for x in (self.look, look.unsqueeze(1)))
        alike = (ours * theirs).sum(-1, keepdim=True).masked_fill(~self.known, -2.0)
        order = alike.topk(NEAREST, 1).indices

        def take(x: Tensor) -> Tensor:
            index = order.unsqueeze(-1).expand(*order.shape, x.shape[-1])
            return x.expand(len(order), *x.shape[1:]).gather(1, index)

        fine, middle, coarse = (take(d) for d in self.descriptor)
        known = take(self.known.unsqueeze(-1)).squeeze(-1)
        return Shots(take(self.token), (fine, middle, coarse), take(self.xy), known, self.look)


def look_of(features: Features) -> Tensor:
    """(B, L): what crops look like, roughly and where."""
    return F.adaptive_avg_pool2d(features.coarse.detach().float(), CELLS).flatten(1)
