"""Simple solids in three dimensions, their projection, and the painter's order. numpy only.

Object frame: y up, z towards a viewer who looks from the front, x to that viewer's right; lengths in arbitrary units.
`flatten` turns a Model into flat outlines (`Shape`) in image axes (x right, y down) at unit scale; scaling and shifting
them onto a canvas is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

_CAP = np.deg2rad([30.0, 60.0, 90.0, 120.0, 150.0])
_LIGHT_STEPS = ((1.0, 0.0, 0.78), (0.78, 0.18, 1.0), (0.42, 0.36, 1.18))  # width, shift towards the light, brightness


@dataclass(frozen=True)
class Mark:
    """A marking on a tube: `stripe` (t ± size along it), `belly` (below s), `seam` (a line along
    it at s) or `spot` at (t, s) of radius size × width; t and s are the shares of length and half width."""

    kind: str
    t: float
    s: float
    size: float
    colour: int


@dataclass(frozen=True)
class Paint:
    """Which colour of the category's palette, and the markings, the same in each instance."""

    colour: int
    marks: tuple[Mark, ...] = ()


@dataclass(eq=False)
class Tube:
    """A bent limb or body: points (n ≥ 2, 3), radii (n,). `flat` scales the radius at right angles to `up`."""

    points: np.ndarray
    radii: np.ndarray
    paint: Paint
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)
    flat: float = 1.0
    lift: float = 0.0


@dataclass(eq=False)
class Detail:
    """Something drawn on a plate: a polygon (width None) or a line of `width`, points (n, 3)."""

    points: np.ndarray
    colour: int
    width: float | None = None


@dataclass(eq=False)
class Plate:
    """A flat polygon, points (n, 3). `normal`: culled when it looks away. `group`: index of its box in Model.boxes."""

    points: np.ndarray
    paint: Paint
    details: list[Detail] = field(default_factory=list)
    normal: tuple[float, float, float] | None = None
    group: int = -1
    lift: float = 0.0


@dataclass(eq=False)
class Model:
    """One instance in the object frame. points: name → (xyz, indices of the parts on which the point is seen)."""

    parts: list[Tube | Plate] = field(default_factory=list)
    points: dict[str, tuple[np.ndarray, tuple[int, ...]]] = field(default_factory=dict)
    links: list[tuple[str, str]] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)  # each (2, 3): low and high corner, for exact ordering

    def tube(self, points: object, radii: object, paint: Paint, **kind: object) -> int:
        xyz = np.asarray(points, np.float64)
        widths = np.broadcast_to(np.asarray(radii, np.float64), (len(xyz),))
        self.parts.append(Tube(xyz, widths, paint, **kind))  # type: ignore[arg-type]
        return len(self.parts) - 1

    def ball(self, centre: object, radius: float, paint: Paint, **kind: object) -> int:
        xyz = np.asarray(centre, np.float64)
        return self.tube([xyz, xyz + 1e-4], radius, paint, **kind)

    def plate(self, points: object, paint: Paint, **kind: object) -> int:
        self.parts.append(Plate(np.asarray(points, np.float64), paint, **kind))  # type: ignore[arg-type]
        return len(self.parts) - 1

    def point(self, name: str, xyz: object, *seen_on: int) -> None:
        self.points[name] = (np.asarray(xyz, np.float64), seen_on)

    def link(self, *names: str) -> None:
        self.links.extend(pairwise(names))


@dataclass(frozen=True)
class View:
    """From where a category is seen, degrees: yaw around y (one of `yaws`), pitch (camera above), roll in the image."""

    yaws: tuple[float, ...] = (0.0,)
    yaw_spread: float = 20.0
    pitch: float = 0.0
    pitch_spread: float = 12.0
    roll: float = 0.0
    any_roll: float = 0.15  # share of instances with any rotation in the image
    roll_spread: float = 12.0
    roll_limit: float = 45.0


@dataclass(frozen=True)
class Template:
    """A kind of object: `build` makes one instance of it. All instances have the same point names."""

    word: str
    build: Callable[[np.random.Generator], Model]
    view: View
    colours: int = 8


@dataclass(frozen=True)
class Camera:
    """rotation (3, 3); `linear` (2, 2) shears the image; perspective: relative enlargement per unit towards the viewer."""

    rotation: np.ndarray
    linear: np.ndarray
    perspective: float

    def project(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n, 3) → (n, 2) image axes, (n,) depth (greater is nearer), (n,) enlargement."""
        turned = xyz @ self.rotation.T
        grow = 1.0 / np.maximum(1.0 - self.perspective * turned[:, 2], 0.3)
        flat = turned[:, :2] * grow[:, None] * (1.0, -1.0)
        return flat @ self.linear.T, turned[:, 2], grow


def look(rng: np.random.Generator, view: View) -> Camera:
    """A camera within the limits of `view`."""
    yaw = view.yaws[int(rng.integers(len(view.yaws)))] + float(np.clip(rng.normal(0, 0.5), -1, 1)) * view.yaw_spread
    pitch = view.pitch + float(np.clip(rng.normal(0, 0.5), -1, 1)) * view.pitch_spread
    roll = view.roll + float(np.clip(rng.normal(0, view.roll_spread), -view.roll_limit, view.roll_limit))
    if rng.random() < view.any_roll:
        roll = rng.uniform(-180, 180)
    a, b, c = np.deg2rad([yaw, pitch, roll])
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    turn_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    stretch = np.exp(rng.normal(0, 0.06))
    linear = np.array([[stretch, rng.normal(0, 0.06)], [rng.normal(0, 0.03), 1.0 / stretch]])
    return Camera(turn_z @ turn_x @ turn_y, linear, float(rng.uniform(0.0, 0.16)))


@dataclass(eq=False)
class Layer:
    """points (n, 2), rgb 0…1; width None: a filled polygon, else a line."""

    points: np.ndarray
    rgb: np.ndarray
    width: float | None = None


@dataclass(eq=False)
class Shape:
    """One part as drawn: `layers[0]` is its outline, the others lie on it."""

    part: int
    order: float
    layers: list[Layer]


def flatten(model: Model, camera: Camera, palette: np.ndarray, light: np.ndarray) -> list[Shape]:
    """The parts of a model as flat shapes from back to front. palette: (n, 3) rgb 0…1; light: (2,) towards the light."""
    ranks = _order_boxes(model.boxes, camera.rotation) if model.boxes else None
    shapes = []
    for index, part in enumerate(model.parts):
        shape = _tube(part, camera, palette, light) if isinstance(part, Tube) else _plate(part, camera, palette, light)
        if shape is None:
            continue
        order, layers = shape
        if ranks is not None:
            order = (ranks[part.group] if isinstance(part, Plate) and part.group >= 0 else len(ranks)) * 1000.0 + order
        shapes.append(Shape(index, order, layers))
    return sorted(shapes, key=lambda s: s.order)


def _tube(part: Tube, camera: Camera, palette: np.ndarray, light: np.ndarray) -> tuple[float, list[Layer]]:
    centre, depth, grow = camera.project(part.points)
    along = np.gradient(centre, axis=0)
    tangent = along / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)[:, None]
    if np.abs(along).max() < 1e-3 * part.radii.max():
        tangent = np.tile([1.0, 0.0], (len(centre), 1))
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    up = camera.rotation @ np.asarray(part.up)
    if (normal @ (up[:2] * (1.0, -1.0))).sum() < 0:  # so that s > 0 is always the side of `up`: marks keep their place
        normal = -normal
    width = part.radii * grow
    if part.flat != 1.0:
        axis = part.points[-1] - part.points[0]
        side = np.cross(axis, part.up)
        side = camera.rotation @ (side / max(np.linalg.norm(side), 1e-9))
        tall = normal @ (up[:2] * (1.0, -1.0))
        wide = normal @ (side[:2] * (1.0, -1.0))
        width = width * np.sqrt(np.maximum(tall**2 + (part.flat * wide) ** 2, 0.02))
    base = palette[part.paint.colour % len(palette)]
    tilt = normal @ light
    layers = []
    thick = width.max() > 0.035
    for size, shift, bright in _LIGHT_STEPS if thick else _LIGHT_STEPS[:2]:
        outline = _outline(centre + normal * (width * tilt * shift)[:, None], width * size, normal, tangent)
        layers.append(Layer(outline, np.clip(base * bright, 0, 1)))
    stations = np.linspace(0.0, 1.0, len(centre))
    for mark in part.paint.marks:
        points = _mark(mark, stations, centre, normal, tangent, width)
        layers.append(Layer(points, palette[mark.colour % len(palette)]))
    return float(depth.mean()) + part.lift, layers


def _outline(centre: np.ndarray, width: np.ndarray, normal: np.ndarray, tangent: np.ndarray) -> np.ndarray:
    """Left side, round end, right side back, round start."""
    cos, sin = np.cos(_CAP)[:, None], np.sin(_CAP)[:, None]
    end = centre[-1] + width[-1] * (cos * normal[-1] + sin * tangent[-1])
    start = centre[0] + width[0] * (-cos * normal[0] - sin * tangent[0])
    side = normal * width[:, None]
    return np.concatenate([centre + side, end, (centre - side)[::-1], start])


def _mark(
    mark: Mark, stations: np.ndarray, centre: np.ndarray, normal: np.ndarray, tangent: np.ndarray, width: np.ndarray
) -> np.ndarray:
    def at(t: np.ndarray, s: np.ndarray) -> np.ndarray:
        spot = np.stack([np.interp(t, stations, centre[:, k]) for k in (0, 1)], -1)
        across = np.stack([np.interp(t, stations, normal[:, k] * width) for k in (0, 1)], -1)
        return spot + across * s[..., None]

    if mark.kind == "stripe":
        low, high = max(mark.t - mark.size, 0.0), min(mark.t + mark.size, 1.0)
        return at(np.array([low, low, low, high, high, high]), np.array([-1.0, 0.0, 1.0, 1.0, 0.0, -1.0]) * 0.97)
    if mark.kind in ("belly", "seam"):
        t = np.linspace(0.02, 0.98, 6)
        low, high = (-0.98, mark.s) if mark.kind == "belly" else (mark.s - mark.size, mark.s + mark.size)
        return at(np.concatenate([t, t[::-1]]), np.concatenate([np.full(6, low), np.full(6, high)]))
    middle = at(np.array(mark.t), np.array(mark.s))
    around = np.linspace(0.0, 2 * np.pi, 9)[:-1]
    radius = float(np.interp(mark.t, stations, width)) * mark.size
    return middle + radius * np.stack([np.cos(around), np.sin(around)], 1)


def _plate(part: Plate, camera: Camera, palette: np.ndarray, light: np.ndarray) -> tuple[float, list[Layer]] | None:
    flat, depth, _ = camera.project(part.points)
    normal = np.asarray(part.normal if part.normal is not None else (0.0, 0.0, 1.0)) @ camera.rotation.T
    if part.normal is not None and normal[2] <= 0.01 + camera.perspective * 0.5 * np.hypot(normal[0], normal[1]) * 0.2:
        return None
    bright = 0.72 + 0.3 * abs(normal[2]) + 0.25 * float(normal[:2] * (1.0, -1.0) @ light)
    layers = [Layer(flat, np.clip(palette[part.paint.colour % len(palette)] * bright, 0, 1))]
    for detail in part.details:
        points, _, grow = camera.project(detail.points)
        rgb = np.clip(palette[detail.colour % len(palette)] * bright, 0, 1)
        layers.append(Layer(points, rgb, None if detail.width is None else detail.width * float(grow.mean())))
    return float(depth.mean()) + part.lift, layers


def _order_boxes(boxes: list[np.ndarray], rotation: np.ndarray) -> np.ndarray:
    """Rank of each axis-aligned box from back to front. Two boxes that do not overlap are separated along some axis."""
    low, high = np.stack([b[0] for b in boxes]), np.stack([b[1] for b in boxes])
    towards = rotation[2]  # the direction to the viewer, in the object frame
    count = len(boxes)
    gap = low[None, :] - high[:, None]  # (a, b, axis): b lies beyond a
    gap = np.where(np.abs(towards) > 1e-3, gap, -np.inf)
    beyond = np.where(gap >= -1e-6, np.sign(towards), 0.0)
    front = (beyond > 0).any(2) & ~(beyond < 0).any(2) | (beyond < 0).any(2).T & ~(beyond > 0).any(2).T  # b over a
    unclear = ~(front | front.T)
    centre = ((low + high) / 2) @ towards
    front |= unclear & (centre[None, :] > centre[:, None])
    ranks, left = np.zeros(count, int), list(range(count))
    for rank in range(count):
        behind = [i for i in left if not any(front[j, i] for j in left if j != i)]
        chosen = min(behind or left, key=lambda i: centre[i])
        ranks[chosen] = rank
        left.remove(chosen)
    return ranks
