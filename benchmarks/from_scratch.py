"""The usual way, to compare with: a heatmap network for one project, trained from scratch on its labelled images.

As in DeepLabCut: whole images, one score map for each point, and at each of its cells the way from there to the point; turned,
scaled, shifted and recoloured copies while training. Unlike there the network does not start from ImageNet's weights: none
can be had offline, and so it is a small one, a U-Net of about 1.2 million parameters, as suits the time it gets on a CPU.

A point whose score stays below a cutoff is not drawn. The cutoff is the one that costs least on the images trained on: no cutoff
suits all sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from kptllm_core.keypoints import KeypointSet, Visibility

SIDE = 256  # pixels: the longest side of an image; the rest is black
STRIDE = 4  # pixels per cell
CELLS = SIDE // STRIDE
NEAR = 10.0  # pixels: cells so near to a point say how far it is
SPREAD = 7.0  # pixels: standard deviation of a point on its score map
WIDTHS = (24, 48, 96, 128)
BATCH = 8
RATE = 2e-3
TURN, SCALE, SHIFT = math.radians(30), 1.3, 0.1
CUTOFFS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
Cost = Callable[[KeypointSet, KeypointSet], int]
"""What correcting a prediction costs: (truth, predicted) → actions."""


class Network(nn.Module):
    """(B, 3, SIDE, SIDE) → logits (B, K, CELLS, CELLS) and ways (B, K, 2, CELLS, CELLS), x then y, in units of NEAR."""

    def __init__(self, points: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, WIDTHS[0], 2), _block(WIDTHS[0], WIDTHS[1], 2))
        self.down = nn.ModuleList([_block(a, b, 2) for a, b in zip(WIDTHS[1:], (*WIDTHS[2:], WIDTHS[-1]), strict=True)])
        self.same = nn.ModuleList([_block(b, b) for b in (*WIDTHS[2:], WIDTHS[-1])])
        ups = list(zip((WIDTHS[-1], *WIDTHS[:1:-1]), WIDTHS[:0:-1], strict=True))
        self.up = nn.ModuleList([_block(a + b, b) for a, b in ups])
        self.head = nn.Conv2d(WIDTHS[1], 3 * points, 1)
        with torch.no_grad():
            self.head.get_parameter("bias")[:points] = -4.0  # most cells hold no point

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(images)
        kept = []
        for down, same in zip(self.down, self.same, strict=True):
            kept.append(x)
            x = same(down(x))
        for up, skip in zip(self.up, reversed(kept), strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
        found = self.head(x)
        points = found.shape[1] // 3
        return found[:, :points], found[:, points:].unflatten(1, (points, 2))


def _block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(8, after), nn.ReLU(True))


@dataclass(frozen=True, eq=False)
class HeatmapModel:
    """A trained network with what belongs to it."""

    names: tuple[str, ...]
    network: Network
    cutoff: float
    steps: int
    seconds: float

    def predict(self, image: np.ndarray) -> KeypointSet:
        """image: (H, W, 3) uint8 → the object's points in pixels of it; those below the cutoff are absent."""
        return _shown(self.names, *_locate(self.network, image), self.cutoff)


def fit(
    images: Sequence[np.ndarray],
    truths: Sequence[KeypointSet],
    seconds: float,
    cost: Cost,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda _step, _share: None,
    device: str = "cpu",
) -> HeatmapModel:
    """Trains for so many seconds. images: (H, W, 3) uint8; truths: one object each; progress(step, share of the time).

    device: as everywhere, "auto" takes a GPU where there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pixels = torch.stack([_framed(image) for image in images]).to(device)
    scales = np.array([_scale(image) for image in images])[:, None, None]
    xy = torch.from_numpy(np.stack([t.xy for t in truths]) * scales).float().to(device)
    there = torch.from_numpy(np.stack([t.placed for t in truths])).to(device)
    network = Network(xy.shape[1]).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-4)
    steps, order = 0, rng.permutation(len(images))
    while (share := (time.monotonic() - begun) / seconds) < 1.0 or not steps:
        if len(order) < BATCH:
            order = np.concatenate([order, *(rng.permutation(len(images)) for _ in range(-(-BATCH // len(images))))])
        chosen, order = torch.from_numpy(order[:BATCH]).to(device), order[BATCH:]
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((steps + 1) / 20, 0.5 * (1 + math.cos(math.pi * min(share, 1.0))) + 0.01)
        batch, points = _augmented(pixels[chosen].float() / 255 - 0.5, xy[chosen])
        logits, ways = network(batch)
        loss = _loss(logits, ways, points, there[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
        progress(steps, min(share, 1.0))
    network.eval()
    spent = time.monotonic() - begun
    names = truths[0].names
    found = [_locate(network, image) for image in images[:50]]
    costs = [sum(cost(t, _shown(names, *f, cutoff)) for t, f in zip(truths, found, strict=False)) for cutoff in CUTOFFS]
    return HeatmapModel(names, network, CUTOFFS[int(np.argmin(costs))], steps, spent)


def _scale(image: np.ndarray) -> float:
    return SIDE / max(image.shape[:2])


def _framed(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 → (3, SIDE, SIDE) uint8, scaled, in the top left corner."""
    height, width = (max(round(n * _scale(image)), 1) for n in image.shape[:2])
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    frame[:height, :width] = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(frame).permute(2, 0, 1).contiguous()


def _augmented(images: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, SIDE, SIDE) and (B, K, 2) pixels, turned, scaled, shifted and recoloured, each image by chance."""
    count = len(images)

    def chance(*shape: int) -> Tensor:
        """-1…1"""
        return (torch.rand(count, *shape) * 2 - 1).to(images.device)

    angle, size, shift = chance() * TURN, torch.exp(chance() * math.log(SCALE)), chance(2) * SHIFT * SIDE
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    there = turn * size[:, None, None]
    back = turn.transpose(1, 2) / size[:, None, None]
    theta = torch.cat([back, -(back @ shift[:, :, None]) / (SIDE / 2)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 0.5, grid, align_corners=False)
    contrast, light = (1 + chance(n, 1, 1) * 0.3 for n in (1, 3))
    points = (xy - SIDE / 2) @ there.transpose(1, 2) + SIDE / 2 + shift[:, None]
    return (moved * contrast * light).clamp(0, 1) - 0.5, points


def _centres() -> Tensor:
    """(CELLS, CELLS, 2) pixels: x then y of each cell's centre."""
    line = (torch.arange(CELLS) + 0.5) * STRIDE
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], -1)


def _loss(logits: Tensor, ways: Tensor, xy: Tensor, there: Tensor) -> Tensor:
    """Score maps: cross-entropy with a bump at each point; ways: Huber loss, near points only. Points that are not there have none."""
    to_point = xy[:, :, None, None] - _centres().to(xy.device)  # (B, K, CELLS, CELLS, 2)
    squared = to_point.square().sum(-1)
    bump = torch.exp(-squared / (2 * SPREAD**2)) * there[:, :, None, None]
    near = (squared < NEAR**2) & there[:, :, None, None]
    score = F.binary_cross_entropy_with_logits(logits, bump, reduction="sum") / max(int(there.sum()), 1)
    gap = F.smooth_l1_loss(ways.permute(0, 1, 3, 4, 2), to_point / NEAR, reduction="none").sum(-1)
    return score + 5.0 * (gap * near).sum() / max(int(near.sum()), 1)


@torch.no_grad()
def _locate(network: Network, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 → (K, 2) pixels of that image, (K,) scores 0…1. Cells beyond the image do not count."""
    frame = _framed(image)[None].to(next(network.parameters()).device)
    logits, ways = (found.cpu() for found in network(frame.float() / 255 - 0.5))
    height, width = (-(-round(n * _scale(image)) // STRIDE) for n in image.shape[:2])
    scores = logits[0, :, :height, :width].sigmoid().flatten(1)
    best, cell = scores.max(1)
    row, column = cell // width, cell % width
    way = ways[0][torch.arange(len(best)), :, row, column]
    place = _centres()[row, column] + way.clamp(-1, 1) * NEAR
    return (place / _scale(image)).numpy(), best.numpy()


def _shown(names: tuple[str, ...], xy: np.ndarray, score: np.ndarray, cutoff: float) -> KeypointSet:
    return KeypointSet(names, xy, np.where(score >= cutoff, Visibility.VISIBLE, Visibility.ABSENT), score)
