"""From features and `<keypoint>` states to positions: heatmap, position, visibility, confidence.

Correlation locates, the LLM modulates. Three steps:
1. `Correlation`: what lies under the support's points is compared with every place of the query, at three scales.
2. `HeatmapHead`: those maps, the support's layout and the LLM's answer (through a gate that starts at zero) → one heatmap
   for each point, independent of which other points are asked.
3. `Refinement`: the points of one object, all together, correct each other. Permutation-equivariant: no parameter knows
   a point's number. A point fixed by a person's click enters as a hard constraint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kptllm_core.config import ModelConfig
from kptllm_core.prompts import Under, sample
from kptllm_core.vision import Attention, Features, cell_centres, position_code

WINDOW = 3  # cells on each side of the peak that the soft-argmax weighs
VISIBILITY_CLASSES = 3  # occluded, visible, absent: `Visibility` minus one


class Support(NamedTuple):
    """What the support images say of K points, S shots.

    token: (B, K, D) prompt tokens. descriptor: three (B, S, K, C). weight: (B, S, K) attention over shots.
    known: (B, K) bool. layout: (B, K, 2) mean position in the support crops, 0…1.
    """

    token: Tensor
    descriptor: tuple[Tensor, Tensor, Tensor]
    weight: Tensor
    known: Tensor
    layout: Tensor

    def select(self, index: Tensor) -> Support:
        """The same support, asked for fewer points. index: (K',)."""
        fine, middle, coarse = (d[:, :, index] for d in self.descriptor)
        return Support(self.token[:, index], (fine, middle, coarse), self.weight[:, :, index], self.known[:, index], self.layout[:, index])

    def repeat(self, batch: int) -> Support:
        """One support set for a batch of query images."""
        token, weight, known, layout, fine, middle, coarse = (
            t.expand(batch, *t.shape[1:]) for t in (self.token, self.weight, self.known, self.layout, *self.descriptor)
        )
        return Support(token, (fine, middle, coarse), weight, known, layout)


class Answer(NamedTuple):
    """xy: (B, K, 2) in 0…1 of the query crop. heat: (B, K, H, W) logits. visibility: (B, K, 3) logits over occluded,
    visible, absent. confidence: (B, K) logit that the point lies within a tenth of the object's size. anchor: (B, K, 2),
    where the other points expect this one, and reach: (B, K), how far from there it may be (scale of a Laplace distribution)."""

    xy: Tensor
    heat: Tensor
    visibility: Tensor
    confidence: Tensor
    anchor: Tensor
    reach: Tensor


class Correlation(nn.Module):
    """Grouped cosine similarity of support descriptors with every place of the query's maps."""

    def __init__(self, channels: tuple[int, int, int], groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.project = nn.ModuleList([nn.Conv2d(c, c, 1) for c in channels])
        self.sharpness = nn.Parameter(torch.full((3, groups), 4.0))

    def describe(self, features: Features) -> Features:
        """Descriptor maps; each group of channels has unit length."""
        return Features(*[self._unit(p(f), 1) for p, f in zip(self.project, features, strict=True)])

    def sample(self, maps: Features, xy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Descriptors at xy (B, K, 2) of each map: three (B, K, C)."""
        fine, middle, coarse = (self._unit(sample(m, xy), 2) for m in maps)
        return fine, middle, coarse

    def forward(self, maps: Features, support: Support) -> list[Tensor]:
        """→ for each scale (B, K, groups, H, W): similarity, combined over shots by their weights in the log domain."""
        planes = []
        for level, (field, point) in enumerate(zip(maps, support.descriptor, strict=True)):
            field = field.unflatten(1, (self.groups, -1))
            point = point.unflatten(-1, (self.groups, -1))
            same = torch.einsum("bskgc,bgcxy->bskgxy", point.to(field.dtype), field)
            if same.shape[1] == 1:
                fused = same[:, 0]
            else:
                weight = (support.weight.float() + 1e-6).log()[..., None, None, None]
                fused = (torch.logsumexp(8.0 * same.float() + weight, 1) / 8.0).to(same.dtype)
            scale = support.known.float()[:, :, None, None, None] * self.sharpness[level][:, None, None]
            planes.append(fused * scale.to(fused.dtype))
        return planes

    def _unit(self, x: Tensor, dim: int) -> Tensor:
        return F.normalize(x.float().unflatten(dim, (self.groups, -1)), dim=dim + 1).flatten(dim, dim + 1).to(x.dtype)


class HeatmapHead(nn.Module):
    """Correlation planes, layout and the LLM's answer → heatmap logits. Works on each point by itself.

    A trunk at an eighth of the crop's size sees far; a thin layer at a quarter makes it precise.
    """

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        fine, width = config.features[0], config.head_width
        groups = self.groups = config.correlation_groups
        self.answer = nn.Linear(dim, fine)
        self.answer_field = nn.Conv2d(fine, fine, 1)
        self.gate = nn.Parameter(torch.zeros(groups))
        self.open = nn.Conv2d(4 * groups + 3, 2 * width, 3, padding=1)
        self.wide = nn.ModuleList([nn.Conv2d(2 * width, 2 * width, 3, padding=d, dilation=d) for d in (1, 2, 4)])
        self.up = nn.Conv2d(2 * width, width, 1)
        self.close = nn.Conv2d(width + 2 * groups, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 1)
        # What a model that was never trained answers with: the correlations' sum, and a little of the layout.
        self.direct_high = nn.Parameter(torch.ones(2 * groups))
        self.direct_low = nn.Parameter(torch.cat([torch.zeros(2 * groups), torch.ones(2 * groups), torch.tensor([0.0, 0.5, 0.0])]))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, fine: Tensor, planes: list[Tensor], support: Support, state: Tensor) -> Tensor:
        """fine: (B, C, H, W), planes: three (B, K, G, ·, ·), state: (B, K, D) → (B, K, H, W) logits."""
        query = F.normalize(self.answer(state).float().unflatten(-1, (self.groups, -1)), dim=-1)
        field = F.normalize(self.answer_field(fine).float().unflatten(1, (self.groups, -1)), dim=2)
        answer = torch.einsum("bkgc,bgchw->bkghw", query.to(fine.dtype), field.to(fine.dtype))
        answer = answer * self.gate[:, None, None].to(answer.dtype)
        near, middle, far = (p.flatten(0, 1) for p in planes)
        layout = layout_planes(support, *middle.shape[-2:]).flatten(0, 1).to(middle.dtype)
        high = _channels_last(torch.cat([near, answer.to(near.dtype).flatten(0, 1)], 1))
        low = _channels_last(torch.cat([F.avg_pool2d(high, 2), middle, _double(far), layout], 1))
        x = F.gelu(self.open(low))
        for conv in self.wide:
            x = x + F.gelu(conv(x))
        x = torch.cat([_double(self.up(x)), high.to(x.dtype)], 1)
        heat = self.out(F.relu(self.close(x)))
        direct = F.conv2d(high, self.direct_high.to(high.dtype)[None, :, None, None])
        direct = direct + _double(F.conv2d(low, self.direct_low.to(low.dtype)[None, :, None, None]))
        return (heat.float() + direct.float()).squeeze(1).unflatten(0, state.shape[:2])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _double(x: Tensor) -> Tensor:
    """Twice the height and width. Channels last: five times as fast on a CPU."""
    return F.interpolate(_channels_last(x), scale_factor=2, mode="bilinear", align_corners=False)


def layout_planes(support: Support, height: int, width: int) -> Tensor:
    """(B, K, 3, H, W): a narrow and a wide bell around the place of the point in the support, and whether there is one."""
    device = support.layout.device
    y, x = cell_centres(height, device)[:, None], cell_centres(width, device)
    far = (x - support.layout[..., 0, None, None]).square() + (y - support.layout[..., 1, None, None]).square()
    known = support.known.float()[..., None, None]
    return torch.stack([torch.exp(-far / (2 * 0.06**2)) * known, torch.exp(-far / (2 * 0.2**2)) * known, known.expand_as(far)], 2)


class Refinement(nn.Module):
    """Self-attention among all points of one object, biased by their geometry: heatmap × what the other points expect."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        width, heads = config.refine_width, config.refine_heads
        self.under = Under(config.features)
        self.enter = nn.Linear(3 * 64 + sum(config.features) + 2 * dim + 13, width)
        self.bias = nn.Sequential(nn.Linear(9, 32), nn.GELU(), nn.Linear(32, heads))
        self.layers = nn.ModuleList([Attention(width, heads, expand=2) for _ in range(config.refine_layers)])
        self.norm = nn.LayerNorm(width)
        self.move = nn.Linear(width, 2)
        self.reach = nn.Linear(width, 1)
        self.pull = nn.Parameter(torch.ones(()))
        self.visibility = nn.Linear(width, VISIBILITY_CLASSES)
        self.confidence = nn.Linear(width, 1)
        for layer in (self.move, self.reach):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.reach.bias, -1.6)  # a reach of a fifth of the crop

    def forward(self, heat: Tensor, planes: list[Tensor], features: Features, support: Support, state: Tensor, asked: Tensor,
                fixed: Tensor | None = None, fixed_xy: Tensor | None = None) -> Answer:  # fmt: skip
        """heat: (B, K, H, W). planes: three (B, K, G, ·, ·).

        asked: (B, K) bool, False for padding. fixed: (B, K) bool with fixed_xy (B, K, 2) in 0…1.
        """
        xy = peak(heat)
        if fixed is not None and fixed_xy is not None:
            xy = torch.where(fixed.unsqueeze(-1), fixed_xy, xy)
        else:
            fixed = torch.zeros_like(asked)
        flat = heat.flatten(2).float()
        chance = flat.softmax(-1)
        sure = chance.amax(-1)
        spread = -(chance * chance.clamp(min=1e-9).log()).sum(-1) / 8
        at, trust = xy.detach(), sure.detach()
        # A given point counts as the surest found one: were it to count for more, the fit would turn and scale about it alone.
        weight = torch.where(fixed, trust.amax(-1, keepdim=True), trust) * asked * support.known
        expected = robust_fit(support.layout, at, weight)
        expected = torch.where(support.known.unsqueeze(-1), expected, at)
        under = self.under(features, at)
        numbers = [sure, spread, flat.amax(-1) / 10, support.known.float(), fixed.float(), *likeness(planes, at)]
        scalars = torch.cat([torch.stack(numbers, -1), (expected - at) * 4], -1)
        codes = [position_code(p, 64) for p in (at, support.layout, expected)]
        x = self.enter(torch.cat([*codes, under.float(), support.token.float(), state.float(), scalars], -1))
        mask = self.bias(_pairs(at, support.layout, expected)).permute(0, 3, 1, 2)
        mask = mask.masked_fill(~asked[:, None, None, :], -1e4)
        for layer in self.layers:
            x = layer(x, mask=mask)
        x = self.norm(x)
        anchor = expected + 0.5 * self.move(x).float().tanh()
        reach = 0.02 + F.softplus(self.reach(x).float().squeeze(-1))
        height, width = heat.shape[-2:]
        y, x_cells = cell_centres(height, heat.device)[:, None], cell_centres(width, heat.device)
        far = (x_cells - anchor[..., 0, None, None]).square() + (y - anchor[..., 1, None, None]).square()
        refined = heat.float() - self.pull * (far + 1e-6).sqrt() / reach[..., None, None]
        xy = torch.where(fixed.unsqueeze(-1), xy, peak(refined))
        return Answer(xy, refined, self.visibility(x).float(), self.confidence(x).float().squeeze(-1), anchor, reach)


class Decoder(nn.Module):
    """The three steps."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.correlation = Correlation(config.features, config.correlation_groups)
        self.head = HeatmapHead(config, dim)
        self.refinement = Refinement(config, dim)


def peak(heat: Tensor) -> Tensor:
    """Soft-argmax in a window around the highest cell: sub-cell positions. (B, K, H, W) → (B, K, 2) in 0…1."""
    height, width = heat.shape[-2:]
    heat = heat.float()
    best = heat.flatten(2).argmax(-1)
    row, column = best // width, best % width
    offsets = torch.arange(-WINDOW, WINDOW + 1, device=heat.device)
    rows, columns = row[..., None] + offsets, column[..., None] + offsets
    inside = ((rows >= 0) & (rows < height))[..., :, None] & ((columns >= 0) & (columns < width))[..., None, :]
    index = rows.clamp(0, height - 1)[..., :, None] * width + columns.clamp(0, width - 1)[..., None, :]
    values = heat.flatten(2).gather(2, index.flatten(2)).unflatten(2, index.shape[2:])
    share = values.masked_fill(~inside, -1e4).flatten(2).softmax(-1).unflatten(2, index.shape[2:])
    x = (share.sum(-2) * (columns + 0.5)).sum(-1) / width
    y = (share.sum(-1) * (rows + 0.5)).sum(-1) / height
    return torch.stack([x, y], -1)


def likeness(planes: list[Tensor], at: Tensor) -> list[Tensor]:
    """How alike the support's points and the query's places are, at each scale: (B, K) at the place `at` (B, K, 2), and at best."""
    found = []
    for plane in planes:
        mean = plane.detach().float().mean(2)
        here = sample(mean.flatten(0, 1).unsqueeze(1), at.flatten(0, 1).unsqueeze(1)).view(at.shape[:2])
        found += [here, mean.flatten(2).amax(-1)]
    return found


def similarity_fit(layout: Tensor, xy: Tensor, weight: Tensor) -> Tensor:
    """Where the other points expect each point: the support's layout, moved, turned and scaled to fit the positions found.

    Weighted least squares in closed form, each point left out of its own fit. layout, xy: (B, K, 2), weight: (B, K) ≥ 0 →
    (B, K, 2). A small prior towards 'unturned' keeps one or two points stable.
    """
    own = torch.eye(weight.shape[1], device=weight.device)
    weight = weight.unsqueeze(1) * (1 - own) + 1e-6
    share = (weight / weight.sum(-1, keepdim=True)).unsqueeze(-1)  # (B, K fits, K points, 1)
    layout, xy = layout.unsqueeze(1), xy.unsqueeze(1)
    from_centre, to_centre = (layout * share).sum(2), (xy * share).sum(2)
    a, b = layout - from_centre.unsqueeze(2), xy - to_centre.unsqueeze(2)
    prior = 1e-3
    real = (share * a * b).sum((2, 3)) + prior
    imaginary = (share[..., 0] * (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])).sum(2)
    norm = (share * a.square()).sum((2, 3)) + prior
    real, imaginary = (real / norm).unsqueeze(-1), (imaginary / norm).unsqueeze(-1)
    a = layout.squeeze(1) - from_centre
    return torch.cat([a[..., :1] * real - a[..., 1:] * imaginary, a[..., :1] * imaginary + a[..., 1:] * real], -1) + to_centre


def robust_fit(layout: Tensor, xy: Tensor, weight: Tensor) -> Tensor:
    """The same, with points that lie far from where the others expect them counting less (one reweighted step)."""
    far = (similarity_fit(layout, xy, weight) - xy).norm(dim=-1)
    return similarity_fit(layout, xy, weight / (1 + (far / 0.1).square()))


def _pairs(at: Tensor, layout: Tensor, expected: Tensor) -> Tensor:
    """(B, K, K, 9): how two points lie to each other here, in the support, and where the fit expects them."""
    here, there, fit = (p.unsqueeze(2) - p.unsqueeze(1) for p in (at, layout, expected))
    length = torch.stack([here.norm(dim=-1), there.norm(dim=-1), (here - fit).norm(dim=-1)], -1)
    return torch.cat([here, there, fit, length], -1) * 2
