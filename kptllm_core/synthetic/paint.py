"""Colours, backgrounds, drawing and camera artefacts. numpy and Pillow only; tuned for a few milliseconds per image."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from kptllm_core.synthetic.solids import Shape

SUPER = 2  # supersampling while drawing
_BANK = 512
_NATURAL = {  # two colours of a ground that looks like something
    "leaf": ((0.22, 0.45, 0.16), (0.62, 0.78, 0.35)), "paper": ((0.93, 0.91, 0.86), (0.72, 0.70, 0.64)),
    "wood": ((0.55, 0.36, 0.20), (0.82, 0.64, 0.42)), "sand": ((0.82, 0.72, 0.54), (0.55, 0.45, 0.32)),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How the images of a category look, beside its shape."""

    palette: np.ndarray  # (n, 3) rgb 0…1
    grey: bool = False
    recolour: bool = False  # instances come in any hue, as cars do
    tint: float = 0.08  # how much the colours of instances differ otherwise
    grain: float = 0.15  # strength of the texture on the object
    grain_cells: float = 8.0  # cells of that texture over the image
    backgrounds: tuple[str, ...] = ("cloud", "ramp", "plain", "stripes", "tiles")
    clutter: int = 8  # at most so many random shapes behind the object
    scene: np.ndarray | None = None  # (m, 3) colours of the background, where the category has its own place
    artefacts: float = 1.0  # scale of blur, noise and compression
    occluders: float = 0.25  # share of images with something in front


@lru_cache(maxsize=1)
def _bank() -> tuple[list[Image.Image], np.ndarray]:
    """Fractal noise fields (L, 512 px) and one field of white noise: made once, cut differently each time."""
    rng = np.random.default_rng(7)
    fields = []
    for decay in (0.5, 0.6, 0.75, 0.9):
        total = np.zeros((_BANK, _BANK), np.float32)
        for octave in range(7):
            grid = Image.fromarray(rng.random((2 << octave, 2 << octave), np.float32).astype(np.float32))
            total += np.asarray(grid.resize((_BANK, _BANK), Image.Resampling.BICUBIC)) * decay**octave
        low, high = np.percentile(total, [1, 99])
        fields.append(Image.fromarray((np.clip((total - low) / (high - low), 0, 1) * 255).astype(np.uint8)))
    return fields, rng.normal(0, 1, (_BANK, _BANK, 3)).astype(np.float32)


def noise(rng: np.random.Generator, width: int, height: int, part: float = 0.5) -> np.ndarray:
    """(height, width) float32 0…1: a random cut of `part` of a noise field; a greater part has finer detail."""
    fields, _ = _bank()
    side = int(np.clip(part, 0.05, 1.0) * _BANK)
    x, y = rng.integers(0, _BANK - side + 1, 2)
    cut = fields[int(rng.integers(len(fields)))].resize(
        (width, height), Image.Resampling.BILINEAR, (x, y, x + side, y + side)
    )
    return np.asarray(cut, np.float32) / 255.0


def palette(rng: np.random.Generator, count: int, grey: bool) -> np.ndarray:
    """(count, 3) rgb 0…1 with visible contrast between neighbours."""
    hue = (rng.random() + np.cumsum(rng.choice([0.03, 0.08, 0.35, 0.5], count))) % 1.0
    light = np.where(np.arange(count) % 2 == 0, rng.uniform(0.5, 0.95, count), rng.uniform(0.1, 0.4, count))
    if rng.random() < 0.35:
        light = 1.05 - light
    strength = rng.uniform(0.0, 0.25 if rng.random() < 0.3 else 0.9, count) * (0.0 if grey else 1.0)
    wheel = np.clip(np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return light[:, None] * (1 - strength[:, None] * (1 - wheel))


def instance_palette(rng: np.random.Generator, style: Look) -> np.ndarray:
    """The palette of one instance: brightness, warmth and, for some categories, hue differ."""
    colours = style.palette
    if style.recolour and not style.grey:
        angle = rng.uniform(0, 2 * np.pi)
        axis = 1 / 3 * (1 - np.cos(angle)) + np.cos(angle) * np.eye(3)
        cross = np.sqrt(1 / 3) * np.sin(angle) * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
        colours = colours @ (axis + cross).T
    gain = np.exp(rng.normal(0, style.tint, 3) * (0.0 if style.grey else 1.0) + rng.normal(0, style.tint))
    return np.clip(colours * gain + rng.normal(0, style.tint * 0.3, (len(colours), 1)), 0.02, 1.0)


def background(rng: np.random.Generator, width: int, height: int, style: Look) -> np.ndarray:
    """(height, width, 3) float32 0…255."""
    kind = style.backgrounds[int(rng.integers(len(style.backgrounds)))]
    if style.scene is not None:
        colours = np.clip(style.scene[:3] + rng.normal(0, 0.04, (3, 1)), 0, 1)
    else:
        colours = rng.random((3, 3)) ** rng.choice([0.6, 1.0, 1.7]) if rng.random() < 0.7 else palette(rng, 3, False)
        if style.grey or rng.random() < 0.1:
            colours = np.repeat(colours.mean(1, keepdims=True), 3, 1)
    ys, xs = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    if kind in _NATURAL and style.scene is None:
        colours = np.clip(np.array(_NATURAL[kind]) * np.exp(rng.normal(0, 0.12, 3)) * np.exp(rng.normal(0, 0.15)), 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)  # not numpy's: those would make everything float64
    slope = xs * cos + ys * sin
    if kind == "cloud":
        mix = noise(rng, width, height, rng.choice([0.15, 0.4, 0.9]))
        mix = np.clip((mix - 0.5) * rng.uniform(0.6, 2.5) + 0.5, 0, 1)
    elif kind == "ramp":
        mix = np.clip(slope * 0.4 + 0.5, 0, 1) + 0.15 * noise(rng, width, height, 0.9)
    elif kind == "stripes":
        wave = np.sin(slope * rng.uniform(4, 40) + 2 * noise(rng, width, height, 0.2))
        mix = np.clip(wave * float(rng.choice([1.0, 6.0])) * 0.5 + 0.5, 0, 1)
    elif kind == "tiles":
        other = -xs * sin + ys * cos
        step = rng.uniform(3, 9)
        mix = (((slope * step).astype(np.int8) + (other * step).astype(np.int8)) % 2) * np.float32(
            rng.uniform(0.2, 0.9)
        )
    elif kind == "leaf":  # a big leaf with veins
        side = -xs * sin + ys * cos
        vein = np.abs((slope * 5 + np.abs(side) * 3.0) % 1.0 - 0.5) < 0.035
        mix = 0.5 * noise(rng, width, height, 0.5) + 0.35 * (vein | (np.abs(side) < 0.025))
    elif kind == "wood":
        mix = np.clip(0.5 + 0.5 * np.sin(slope * 9 + 7 * noise(rng, width, height, 0.3)), 0, 1) * 0.6
    elif kind in ("paper", "sand"):
        mix = (0.35 if kind == "paper" else 0.9) * noise(rng, width, height, 1.0)
    else:
        mix = 0.3 * noise(rng, width, height, 0.9) * np.float32(rng.random())
    base, top = (colours[k].astype(np.float32) * 255 for k in (0, 1))
    canvas = base + mix.astype(np.float32)[..., None] * (top - base)
    shapes = int(rng.integers(0, style.clutter + 1)) if style.clutter and rng.random() < 0.6 else 0
    if not shapes:
        return canvas
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(shapes):
        rgb = tuple(
            int(v)
            for v in np.clip(rng.random(3) if rng.random() < 0.5 and not style.grey else np.full(3, rng.random()), 0, 1)
            * 255
        )
        _blob(rng, draw, rng.uniform(0, [width, height]), rng.uniform(0.04, 0.3) * max(width, height), rgb)
    return np.asarray(image, np.float32)


def _blob(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, rgb: tuple[int, ...]
) -> None:
    """A random polygon, ellipse or thick line."""
    kind = rng.integers(3)
    if kind == 0:
        around = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
        corners = centre + radius * np.stack([np.cos(around), np.sin(around)], 1) * rng.uniform(
            0.4, 1, (len(around), 1)
        )
        draw.polygon(corners.ravel().tolist(), fill=rgb)
    elif kind == 1:
        rx, ry = radius * rng.uniform(0.3, 1, 2)
        draw.ellipse([centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry], fill=rgb)
    else:
        way = rng.uniform(-2, 2, (3, 2)) * radius
        draw.line(
            (centre + np.cumsum(way, 0)).ravel().tolist(), fill=rgb, width=max(1, int(radius * 0.25)), joint="curve"
        )


class Canvas:
    """Where objects are drawn: colours, and which part of which object is in front at each pixel."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        size = (width * SUPER, height * SUPER)
        self._colour, self._owner = Image.new("RGB", size), Image.new("I", size)
        self._draw_colour, self._draw_owner = ImageDraw.Draw(self._colour), ImageDraw.Draw(self._owner)

    def shapes(self, shapes: list[Shape], scale: float, shift: np.ndarray, first: int) -> None:
        """Draw from back to front; part i gets the number first + i ≥ 1 in the owner map."""
        for shape in shapes:
            for depth, layer in enumerate(shape.layers):
                # a pixel's centre is an integer for Pillow and a half for us
                flat = ((layer.points * scale + shift) * SUPER - 0.5).ravel().tolist()
                rgb = tuple(int(v * 255) for v in layer.rgb)
                if layer.width is None:
                    self._draw_colour.polygon(flat, fill=rgb)
                else:
                    self._draw_colour.line(
                        flat, fill=rgb, width=max(1, round(layer.width * scale * SUPER)), joint="curve"
                    )
                if depth == 0:
                    self._draw_owner.polygon(flat, fill=first + shape.part)

    def occlude(self, rng: np.random.Generator, centre: np.ndarray, radius: float, grey: bool) -> None:
        """Something foreign in front, number −1 in the owner map."""
        rgb = tuple(int(v * 255) for v in (np.full(3, rng.random()) if grey else rng.random(3)))
        state = rng.bit_generator.state
        _blob(rng, self._draw_colour, centre * SUPER, radius * SUPER, rgb)
        rng.bit_generator.state = state
        _blob(rng, self._draw_owner, centre * SUPER, radius * SUPER, -1)  # type: ignore[arg-type]

    def owner(self) -> np.ndarray:
        """(height × 2, width × 2) int32: 0 nothing, −1 an occluder, else the number of the part."""
        return np.asarray(self._owner)

    def compose(self, rng: np.random.Generator, behind: np.ndarray, style: Look, light: np.ndarray) -> np.ndarray:
        """(H, W, 3) float32 0…255: the objects with grain, soft shading and a shadow on the background `behind`."""
        mask = Image.fromarray((self.owner() != 0).astype(np.uint8) * 255)
        alpha = np.asarray(mask.reduce(SUPER), np.float32)[..., None] / 255.0
        colour = np.asarray(self._colour.reduce(SUPER), np.float32)  # black outside: already multiplied by alpha
        small = mask.reduce(SUPER * 4).filter(ImageFilter.GaussianBlur(2.0))
        soft = np.asarray(small, np.float32) / 255.0
        gy, gx = np.gradient(soft)
        shade = Image.fromarray(
            (1.0 - (gx * light[0] + gy * light[1]) * np.float32(rng.uniform(0.2, 1.6))).astype(np.float32)
        )
        relief = np.asarray(shade.resize((self.width, self.height), Image.Resampling.BILINEAR))
        if style.grain:
            grain = noise(rng, self.width, self.height, style.grain_cells / 16.0) - 0.5
            relief = relief * (1.0 + 2.0 * style.grain * grain)
        if rng.random() < 0.5:
            move = -light * rng.uniform(0.5, 3.0)
            dark = small.transform(small.size, Image.Transform.AFFINE, (1, 0, -move[0], 0, 1, -move[1]))
            shadow = np.asarray(dark.resize((self.width, self.height), Image.Resampling.BILINEAR), np.float32)[
                ..., None
            ]
            behind = behind * (1.0 - shadow * np.float32(rng.uniform(0.1, 0.6) / 255.0))
        return behind * (1.0 - alpha) + colour * relief[..., None]


def finish(rng: np.random.Generator, canvas: np.ndarray, style: Look) -> np.ndarray:
    """(H, W, 3) uint8: light falling off, contrast, blur, sensor noise and compression."""
    height, width = canvas.shape[:2]
    angle, fall = rng.uniform(0, 2 * np.pi), np.float32(rng.uniform(0, 0.35))
    ys, xs = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    ramp = 1.0 + fall * (xs * math.cos(angle) + ys * math.sin(angle))
    contrast, bright = np.float32(np.exp(rng.normal(0, 0.15))), np.float32(rng.normal(0, 12))
    canvas = (canvas * ramp[..., None] - 128.0) * contrast + (128.0 + bright)
    if style.grey:
        canvas = np.repeat(canvas.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.6 * style.artefacts:
        _, white = _bank()
        y, x = rng.integers(0, _BANK, 2)
        grains = np.take(np.take(white, np.arange(y, y + height) % _BANK, 0), np.arange(x, x + width) % _BANK, 1)
        if style.grey or rng.random() < 0.3:
            grains = grains[..., :1]
        canvas = canvas + grains * np.float32(rng.gamma(1.5, 4.0))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if rng.random() < 0.35 * style.artefacts:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.4)) * width / 192))
    if rng.random() < 0.15 * style.artefacts:
        ratio = rng.uniform(0.45, 0.9)
        image = image.resize((int(width * ratio), int(height * ratio)), Image.Resampling.BILINEAR).resize(
            (width, height), Image.Resampling.BILINEAR
        )
    if rng.random() < 0.35 * style.artefacts:
        store = io.BytesIO()
        image.save(store, "JPEG", quality=int(rng.integers(25, 90)))
        image = Image.open(store)
    return np.array(image)
