"""Where are the objects? Prompt-conditioned boxes in a whole image, any number of them, also none.

One more reading of what the keypoint model computes anyway: the encoded image, the correlation with what lies under the support's
points, the heatmaps, the LLM's answer. Every cell of the middle map says how likely an object's centre lies there and how far
its four sides are (anchor-free, as FCOS: Tian et al., ICCV 2019); the score learns the overlap that its box reaches with a
true one (quality focal loss: Li et al., NeurIPS 2020), so that it means something. No parameter knows a category or a point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kptllm_core.config import ModelConfig
from kptllm_core.vision import Features, cell_centres, group_norm

SCENE_LOOK = 32  # channels of the image itself
SIDE = 0.15  # of the crop: how far a side is before anything is learned
CENTRE = 0.2  # of a box's width and height, on each side of its centre: cells there answer for it
SAME = 0.6  # overlap (IoU) from which on two boxes are the same object
MOST = 100  # objects of one image


class Detected(NamedTuple):
    """boxes: (B, h · w, 4) left, top, right, bottom in 0…1 of the crop, one for each cell; score: (B, h · w) logits."""

    boxes: Tensor
    score: Tensor


class Instances(nn.Module):
    """Correlation planes, heatmaps and the LLM's answer, of all points together → boxes."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        middle, width = config.features[1], config.instance_width
        groups = self.groups = config.correlation_groups
        self.object = nn.Linear(dim, middle)
        self.field = nn.Conv2d(middle, middle, 1)
        self.gate = nn.Parameter(torch.full((groups,), 2.0))
        self.look = nn.Sequential(group_norm(middle), nn.Conv2d(middle, SCENE_LOOK, 1))
        self.open = nn.Conv2d(5 * groups + 2 + SCENE_LOOK, width, 3, padding=1)
        self.wide = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 4)])
        self.norms = nn.ModuleList([group_norm(width) for _ in self.wide])
        self.out = nn.Conv2d(width, 5, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.out.bias[0], -4.0)  # type: ignore[index]

    def forward(self, features: Features, planes: list[Tensor], heat: Tensor, state: Tensor, asked: Tensor) -> Detected:
        """planes: three (B, K, G, ·, ·), heat: (B, K, H, W), state: (B, K, D), asked: (B, K) bool, False for padding."""
        near, middle, far = (p.float() for p in planes)
        share = asked.float() / asked.float().sum(1, keepdim=True).clamp(min=1)
        mean = lambda x: torch.einsum("bk...,bk->b...", x, share)  # noqa: E731
        told = F.normalize(self.object(mean(state.float())).unflatten(-1, (self.groups, -1)), dim=-1)
        field = F.normalize(self.field(features.middle).float().unflatten(1, (self.groups, -1)), dim=2)
        answer = torch.einsum("bgc,bgchw->bghw", told, field) * self.gate[:, None, None]
        chance = (heat.flatten(2).log_softmax(-1) + 6.0).clamp(min=-6.0).unflatten(2, heat.shape[-2:]) / 4
        best = chance.masked_fill(~asked[..., None, None], -3.0).amax(1, keepdim=True)
        chance = F.max_pool2d(torch.cat([mean(chance).unsqueeze(1), best], 1), 2)
        most = middle.masked_fill(~asked[..., None, None, None], -1e4).amax(1)
        parts = [F.max_pool2d(mean(near), 2), mean(middle), most, _double(mean(far)), answer, chance, self.look(features.middle.contiguous()).float()]
        x = F.gelu(self.open(torch.cat(parts, 1)))
        for norm, conv in zip(self.norms, self.wide, strict=True):
            x = x + F.gelu(norm(conv(x)))
        raw = self.out(x).float()
        height, width = raw.shape[-2:]
        y, columns = cell_centres(height, raw.device)[:, None], cell_centres(width, raw.device)
        left, top, right, bottom = (SIDE * raw[:, 1:].clamp(-4, 3).exp()).unbind(1)
        boxes = torch.stack([columns - left, y - top, columns + right, y + bottom], -1)
        return Detected(boxes.flatten(1, 2), raw[:, 0].flatten(1))


def assign(boxes: Tensor, count: Tensor, height: int, width: int) -> Tensor:
    """Which object a cell answers for: (B, M, 4) boxes in 0…1, (B,) how many of them are real → (B, h · w) index, -1 for none.

    Cells in the middle of a box, or the one that holds its centre; where boxes lie on each other the smallest has it.
    """
    y, x = torch.meshgrid(cell_centres(height, boxes.device), cell_centres(width, boxes.device), indexing="ij")
    cells = torch.stack([x, y], -1).flatten(0, 1)  # (N, 2)
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    centre = boxes[..., :2] + size / 2
    reach = torch.maximum(CENTRE * size, torch.tensor([0.5 / width, 0.5 / height], device=boxes.device))
    inside = ((cells[:, None] - centre[:, None]).abs() <= reach[:, None] + 1e-6).all(-1)  # (B, N, M)
    real = torch.arange(boxes.shape[1], device=boxes.device) < count.clamp(min=0).unsqueeze(-1)
    area = torch.where(inside & real[:, None], size.prod(-1)[:, None], torch.inf)
    least, index = area.min(-1) if boxes.shape[1] else (area.new_full(area.shape[:2], torch.inf), area.new_zeros(area.shape[:2]).long())
    return torch.where(least.isfinite(), index, -1)


def instances_loss(found: Detected, boxes: Tensor, count: Tensor, height: int, width: int) -> Tensor:
    """boxes: (B, M, 4) in 0…1; count: (B,). Overlap of the boxes (GIoU) where there are objects, and the score everywhere."""
    index = assign(boxes, count, height, width)
    here = index >= 0
    quality = torch.zeros_like(found.score)
    total = here.sum().clamp(min=1)
    apart = found.score.sum() * 0
    if here.any():
        true = boxes.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))[here]
        same, wider = overlap(found.boxes[here], true)
        apart = (1 - wider).sum() / total
        quality[here] = same.detach().clamp(0, 1)
    chance = found.score.sigmoid()
    score = (quality - chance).square() * F.binary_cross_entropy_with_logits(found.score, quality, reduction="none")
    return apart + score.sum() / total


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of (…, 4) boxes, pair by pair."""
    area = [(b[..., 2] - b[..., 0]).clamp(min=0) * (b[..., 3] - b[..., 1]).clamp(min=0) for b in (one, other)]
    inner = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0).prod(-1)
    union = (area[0] + area[1] - inner).clamp(min=1e-9)
    hull = (torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])).prod(-1).clamp(min=1e-9)
    same = inner / union
    return same, same - (hull - union) / hull


def box_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, 4) and (M, 4) boxes x, y, w, h → (N, M)."""
    one, other = np.asarray(one, np.float64).reshape(-1, 4), np.asarray(other, np.float64).reshape(-1, 4)
    start = np.maximum(one[:, None, :2], other[None, :, :2])
    end = np.minimum(one[:, None, :2] + one[:, None, 2:], other[None, :, :2] + other[None, :, 2:])
    inner = np.clip(end - start, 0, None).prod(-1)
    return inner / np.maximum(one[:, None, 2:].prod(-1) + other[None, :, 2:].prod(-1) - inner, 1e-9)


def distinct(boxes: np.ndarray, score: np.ndarray, same: float = SAME, most: int = MOST) -> np.ndarray:
    """Non-maximum suppression: indices of the boxes (N, 4) x, y, w, h that stand for an object each, the surest first."""
    kept: list[int] = []
    for i in np.argsort(-score, kind="stable"):
        if len(kept) == most:
            break
        if not kept or box_iou(boxes[i], boxes[kept]).max() < same:
            kept.append(int(i))
    return np.array(kept, int)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
