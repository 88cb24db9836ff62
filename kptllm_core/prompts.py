"""Prompt encoder and prompt feature extractor: a point in a support image → a prompt token (KptLLM, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kptllm_core.vision import Attention, Features, grid_positions, position_code


def sample(maps: Tensor, xy: Tensor) -> Tensor:
    """Bilinear samples. maps: (B, C, H, W), xy: (B, K, 2) in 0…1 → (B, K, C)."""
    grid = (xy * 2 - 1).unsqueeze(2).to(maps.dtype)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False).squeeze(-1).transpose(1, 2)


class PromptEncoder(nn.Module):
    """MLP over the sine-cosine code of a position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, xy: Tensor) -> Tensor:
        """xy: (…, 2) in 0…1 → (…, dim)."""
        return self.layers(position_code(xy, 64))


class Under(nn.Module):
    """What lies under points: the maps of all scales there, each with a norm, without which the finest drowns all else."""

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(c) for c in channels])

    def forward(self, features: Features, xy: Tensor) -> Tensor:
        """xy: (B, K, 2) in 0…1 → (B, K, sum of channels)."""
        return torch.cat([norm(sample(m, xy)) for norm, m in zip(self.norms, features, strict=True)], -1)


class PromptFeatureExtractor(nn.Module):
    """Cross-attention: the query is the prompt (its position and what lies under it), keys and values the support image.

    The prompt itself is added to what the attention found, each with a norm of its own: else what all points of an image have in
    common outgrows what tells them apart, and the LLM hears which image is meant, but not which point.
    """

    def __init__(self, channels: tuple[int, int, int], dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.encoder = PromptEncoder(dim)
        self.under = Under(channels)
        self.local = nn.Linear(sum(channels), dim)
        self.memory = nn.Sequential(nn.LayerNorm(channels[2]), nn.Linear(channels[2], dim))
        self.where = nn.Linear(64, dim)
        self.layers = nn.ModuleList([Attention(dim, heads, expand=2) for _ in range(layers)])
        self.norm_prompt, self.norm_context = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, features: Features, xy: Tensor) -> Tensor:
        """xy: (B, K, 2) in 0…1 of the support crops → prompt tokens (B, K, dim)."""
        height, width = features.coarse.shape[-2:]
        memory = self.memory(features.coarse.flatten(2).transpose(1, 2))
        memory = memory + self.where(position_code(grid_positions(height, width, xy.device), 64))
        prompt = token = self.encoder(xy) + self.local(self.under(features, xy))
        for layer in self.layers:
            token = layer(token, memory)
        return self.norm_prompt(prompt) + self.norm_context(token)


class ShotAttention(nn.Module):
    """Several support images for one point: attention over the shots, not a mean, so that a wrong one can be ignored."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        """tokens: (B, S, K, D), known: (B, S, K) bool → weights (B, S, K) that sum to 1 where any shot is known, else 0."""
        weight = known.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        score = self.score(torch.cat([tokens, mean.expand_as(tokens)], -1)).squeeze(-1).float()
        score = score.masked_fill(~known, -1e4)
        return score.softmax(1) * known.any(1, keepdim=True)
