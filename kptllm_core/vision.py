"""Image encoder: an image → feature maps at a quarter, an eighth and a sixteenth of its size.

Either our own small hierarchical encoder (convolutions, then a few transformer layers), or any vision transformer of
transformers with a small pyramid on top. Both give the same `Features`.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

FINE_STRIDE, MIDDLE_STRIDE, COARSE_STRIDE = 4, 8, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """fine: (B, C4, H/4, W/4), middle: (B, C8, H/8, W/8), coarse: (B, C16, H/16, W/16)."""

    fine: Tensor
    middle: Tensor
    coarse: Tensor

    def pick(self, index: Any) -> Features:
        """A selection along the batch."""
        return Features(self.fine[index], self.middle[index], self.coarse[index])

    def repeat(self, batch: int) -> Features:
        """One image's maps for a batch."""
        return Features(*(m.expand(batch, -1, -1, -1) for m in self))


def build_encoder(config: dict[str, Any], channels: tuple[int, int, int]) -> nn.Module:
    """The encoder that a preset names."""
    values = dict(config)
    kind = values.pop("type", "hierarchical")
    return TransformersEncoder(channels, **values) if kind == "transformers" else HierarchicalEncoder(channels, **values)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 or 0…255 float → zero mean, unit deviation."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(3, 1, 1) * 255
    return (images.float() - mean) / std


def position_code(xy: Tensor, dim: int) -> Tensor:
    """Sines and cosines of positions. xy: (…, 2) in 0…1 → (…, dim); dim is a multiple of 4."""
    frequency = 2.0 ** torch.linspace(0, 6, dim // 4, device=xy.device) * torch.pi
    angle = xy.float().unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def cell_centres(count: int, device: torch.device) -> Tensor:
    """(count,) centres of cells along one side, in 0…1."""
    return (torch.arange(count, device=device) + 0.5) / count


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height·width, 2) centres of cells, x then y, in 0…1."""
    y, x = torch.meshgrid(cell_centres(height, device), cell_centres(width, device), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


class Residual(nn.Module):
    """Two 3 × 3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))


class Attention(nn.Module):
    """A pre-norm transformer layer over (B, N, D): attention to itself or to `memory`, then an MLP."""

    def __init__(self, dim: int, heads: int, expand: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, expand * dim), nn.Linear(expand * dim, dim)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """mask: broadcasts to (B, heads, N, M); bool (True = may look) or a bias."""
        y = self.norm1(x)
        query = self._split(self.query(y))
        key, value = (self._split(t) for t in self.key_value(y if memory is None else memory).chunk(2, -1))
        mask = mask.to(query.dtype) if mask is not None and mask.dtype != torch.bool else mask
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Pyramid(nn.Module):
    """Top-down fusion: coarse context flows into the fine maps (Lin et al., CVPR 2017)."""

    def __init__(self, widths: tuple[int, int, int], channels: tuple[int, int, int]) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.coarse = nn.Conv2d(widths[2], coarse, 1)
        self.middle_in, self.middle_up = nn.Conv2d(widths[1], middle, 1), nn.Conv2d(coarse, middle, 1)
        self.middle = nn.Conv2d(middle, middle, 3, padding=1)
        self.fine_in, self.fine_up = nn.Conv2d(widths[0], fine, 1), nn.Conv2d(middle, fine, 1)
        self.fine = nn.Conv2d(fine, fine, 3, padding=1)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Features:
        c = self.coarse(coarse)
        m = self.middle_in(middle) + _resize(self.middle_up(c), middle)
        m = m + self.middle(F.gelu(m))
        f = self.fine_in(fine) + _resize(self.fine_up(m), fine)
        return Features(f + self.fine(F.gelu(f)), m, c)


class HierarchicalEncoder(nn.Module):
    """Our own: convolutions at strides 4 and 8, transformer layers at stride 16, a pyramid back down."""

    def __init__(self, channels: tuple[int, int, int], widths: tuple[int, ...] = (32, 64, 128, 192), depths: tuple[int, ...] = (2, 3),
                 layers: int = 4, heads: int = 6) -> None:  # fmt: skip
        super().__init__()
        stem, fine, middle, coarse = widths
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), group_norm(stem), nn.GELU(), nn.Conv2d(stem, fine, 3, 2, 1))
        self.fine = nn.Sequential(*[Residual(fine) for _ in range(depths[0])])
        self.to_middle = nn.Sequential(group_norm(fine), nn.Conv2d(fine, middle, 3, 2, 1))
        self.middle = nn.Sequential(*[Residual(middle) for _ in range(depths[1])])
        self.to_coarse = nn.Sequential(group_norm(middle), nn.Conv2d(middle, coarse, 3, 2, 1))
        self.coarse = nn.ModuleList([Attention(coarse, heads) for _ in range(layers)])
        self.pyramid = Pyramid((fine, middle, coarse), channels)

    def forward(self, images: Tensor) -> Features:
        fine = self.fine(self.stem(normalise(images).contiguous(memory_format=torch.channels_last)))
        middle = self.middle(self.to_middle(fine))
        coarse = self.to_coarse(middle)
        height, width = coarse.shape[-2:]
        tokens = coarse.flatten(2).transpose(1, 2)
        tokens = tokens + position_code(grid_positions(height, width, tokens.device), tokens.shape[-1]).to(tokens.dtype)
        for layer in self.coarse:
            tokens = layer(tokens)
        return self.pyramid(fine, middle, tokens.transpose(1, 2).unflatten(2, (height, width)))


class TransformersEncoder(nn.Module):
    """Any vision transformer of transformers (DINOv2, SigLIP, CLIP …) with the same pyramid.

    Its patch tokens are the coarse map; finer maps are the tokens scaled up beside a small convolutional stem, which sees
    the detail that patches blur.
    """

    def __init__(self, channels: tuple[int, int, int], hub: str | None = None, config: dict[str, Any] | None = None, stem: int = 32) -> None:
        super().__init__()
        if hub is not None:
            self.backbone = AutoModel.from_pretrained(hub, dtype=torch.float32)
        else:
            values = dict(config or {})
            self.backbone = AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        self.backbone = getattr(self.backbone, "vision_model", self.backbone)
        settings = self.backbone.config
        self.patch = int(settings.patch_size)
        width = int(settings.hidden_size)
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1), nn.GELU(), nn.Conv2d(stem, stem, 3, 2, 1), nn.GELU())
        self.to_middle = nn.Sequential(nn.Conv2d(stem, 2 * stem, 3, 2, 1), nn.GELU())
        self.pyramid = Pyramid((stem, 2 * stem, width), channels)

    def forward(self, images: Tensor) -> Features:
        images = normalise(images)
        fine = self.stem(images)
        grid = images.shape[-1] // COARSE_STRIDE
        patches = F.interpolate(images, size=(grid * self.patch, grid * self.patch), mode="bilinear", antialias=True)
        extra = {"interpolate_pos_encoding": True} if _interpolates(self.backbone) else {}
        tokens = self.backbone(pixel_values=patches, **extra).last_hidden_state
        tokens = tokens[:, -grid * grid :]  # class and register tokens come first
        return self.pyramid(fine, self.to_middle(fine), tokens.transpose(1, 2).unflatten(2, (grid, grid)))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _interpolates(backbone: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
