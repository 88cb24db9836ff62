"""Cuboids, and what can be composed of them: chairs, tables, shelves, beds, crates, piles.

Frame: front is +z, up is +y. Left and right are the thing's own, as for somebody who sits in it: left is +x.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from kptllm_core.synthetic.figures import vary
from kptllm_core.synthetic.solids import Detail, Model, Paint, Plate, Template, View

Corners = dict[tuple[int, ...], tuple[np.ndarray, tuple[int, ...]]]  # signs of x, y, z → place, faces that meet there
_FACES = (  # axis, sign
    (0, -1), (0, 1), (1, -1), (1, 1), (2, -1), (2, 1),
)  # fmt: skip


def box(m: Model, low: ArrayLike, high: ArrayLike, paint: Paint, pattern: tuple[str, int] | None = None) -> Corners:
    """Add a cuboid; return for each corner (signs of x, y, z) its place and the faces that meet there."""
    lo, hi = np.minimum(low, high).astype(float), np.maximum(low, high).astype(float)
    group = len(m.boxes)
    m.boxes.append(np.stack([lo, hi]))
    middle, half = (lo + hi) / 2, (hi - lo) / 2
    faces = {}
    for axis, sign in _FACES:
        a, b = (k for k in range(3) if k != axis)
        normal = np.zeros(3)
        normal[axis] = sign
        corners = np.zeros((4, 3))
        corners[:, axis] = sign
        corners[:, a], corners[:, b] = (-1, 1, 1, -1), (-1, -1, 1, 1)
        details = []
        if pattern is not None and half[a] > 0.05 and half[b] > 0.05:
            details = _pattern(pattern, corners, a, b, middle, half)
        faces[axis, sign] = m.plate(middle + corners * half, paint, normal=tuple(normal), group=group, details=details)
    return {
        signs: (middle + np.array(signs) * half, tuple(faces[axis, sign] for axis, sign in enumerate(signs)))
        for signs in product((-1, 1), repeat=3)
    }


def _pattern(
    pattern: tuple[str, int], corners: np.ndarray, a: int, b: int, middle: np.ndarray, half: np.ndarray
) -> list[Detail]:
    """Boards, a frame or a cross on one face."""
    kind, colour = pattern

    def line(p: tuple[float, float], q: tuple[float, float]) -> np.ndarray:
        ends = np.repeat(corners[:1], 2, 0)
        ends[:, a], ends[:, b] = (p[0], q[0]), (p[1], q[1])
        return middle + ends * half

    if kind == "boards":
        return [Detail(line((s, -1), (s, 1)), colour, 0.012) for s in (-0.5, 0.0, 0.5)]
    if kind == "frame":
        ring = corners.copy()
        ring[:, [a, b]] *= 0.75
        return [Detail(middle + ring * half, colour)]
    return [Detail(line((-1, -1), (1, 1)), colour, 0.015), Detail(line((-1, 1), (1, -1)), colour, 0.015)]


def composite(rng: np.random.Generator) -> Template:
    """Furniture: chair, table, bench, shelf, bed; or a crate; or a random pile of cuboids."""
    kind = ("chair", "chair", "table", "shelf", "bed", "box", "blocks")[int(rng.integers(7))]
    u = rng.uniform
    wide, deep, tall, thick = u(0.45, 1.1), u(0.4, 0.9), u(0.3, 0.9), u(0.03, 0.1)
    back, arms, mark = u(0.3, 0.9), rng.random() < 0.3, int(rng.choice([0, 1, 2]))
    patterns = [
        None if rng.random() < 0.5 else (("boards", "frame", "cross")[int(rng.integers(3))], int(rng.integers(6)))
        for _ in range(3)
    ]
    colours = [Paint(int(c)) for c in rng.integers(0, 6, 5)]
    piles = [
        (rng.uniform(-0.5, 0.5, 2), rng.uniform(0.15, 0.45, 3), Paint(int(rng.integers(8))))
        for _ in range(int(rng.integers(2, 5)))
    ]
    leg_wide = u(0.02, 0.06)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        w, d, t = wide * vary(r, 1, 0.12) / 2, deep * vary(r, 1, 0.12) / 2, tall * vary(r, 1, 0.12)
        corners = (
            ("left", "front", 1, 1),
            ("right", "front", -1, 1),
            ("left", "back", 1, -1),
            ("right", "back", -1, -1),
        )
        if kind == "blocks":
            level = 0.0
            for number, (at, size, paint) in enumerate(piles, 1):
                half = size * np.exp(np.clip(r.normal(0, 0.1, 3), -0.2, 0.2)) / 2
                at3 = np.array([at[0] * 0.4, level + half[1], at[1] * 0.4])
                place = box(m, at3 - half, at3 + half, paint, patterns[number % 3])
                level += 2 * half[1]
                for side, end, x, z in corners:
                    if end == "front" or number == len(piles):
                        m.point(f"block_{number}_top_{end}_{side}", place[x, 1, z][0], *place[x, 1, z][1])
                    if end == "front":
                        m.point(f"block_{number}_bottom_{end}_{side}", place[x, -1, z][0], *place[x, -1, z][1])
                m.link(
                    f"block_{number}_top_front_left",
                    f"block_{number}_top_front_right",
                    f"block_{number}_bottom_front_right",
                    f"block_{number}_bottom_front_left",
                    f"block_{number}_top_front_left",
                )
            return m
        if kind == "box":
            place = box(m, (-w, 0, -d), (w, t, d), colours[0], patterns[0])
            x0, y0 = w * (0.3 if mark else -0.5), t * 0.55
            label = np.array(
                [
                    [x0 - w * 0.35, y0, d],
                    [x0 + w * 0.35, y0, d],
                    [x0 + w * 0.35, y0 + t * 0.25, d],
                    [x0 - w * 0.35, y0 + t * 0.25, d],
                ]
            )
            front = next(p for p in m.parts if isinstance(p, Plate) and p.normal == (0.0, 0.0, 1.0))
            front.details.append(Detail(label, 3))
            for side, end, x, z in corners:
                for height, y in (("top", 1), ("bottom", -1)):
                    m.point(f"{height}_{end}_{side}_corner", place[x, y, z][0], *place[x, y, z][1])
            m.point("label_center", label.mean(0), m.parts.index(front))
        elif kind == "shelf":
            boards = int(2 + mark)
            high = t * 2
            for side, x in (("left", 1), ("right", -1)):
                place = box(m, (x * w, 0, -d / 2), (x * (w + thick), high, d / 2), colours[0], patterns[0])
                for name, y, z in (("top_front", 1, 1), ("bottom_front", -1, 1), ("top_back", 1, -1)):
                    m.point(f"{side}_{name}", place[x, y, z][0], *place[x, y, z][1])
            for k in range(boards + 1):
                level = high * k / boards - (thick if k == boards else 0)
                place = box(m, (-w, level, -d / 2), (w, level + thick, d / 2), colours[1 + k % 2], None)
                for side, x in (("left", 1), ("right", -1)):
                    m.point(f"board_{k + 1}_{side}_end", place[x, 1, 1][0], *place[x, 1, 1][1])
                m.link(f"board_{k + 1}_left_end", f"board_{k + 1}_right_end")
            m.link("left_top_front", "left_bottom_front")
            m.link("right_top_front", "right_bottom_front")
        else:
            seat = "seat" if kind == "chair" else "mattress" if kind == "bed" else "top"
            raised = t * (0.45 if kind == "bed" else 1.0)
            for side, end, x, z in corners:
                foot = np.array([x * (w - leg_wide), 0, z * (d - leg_wide)])
                place = box(m, foot - (leg_wide, 0, leg_wide), foot + (leg_wide, raised, leg_wide), colours[1])
                seen = tuple(f for c in product((-1, 1), repeat=2) for f in place[c[0], -1, c[1]][1])
                m.point(f"{end}_{side}_leg_end", foot, *seen)
            place = box(
                m, (-w, raised, -d), (w, raised + thick * (2 if kind == "bed" else 1), d), colours[0], patterns[0]
            )
            for side, end, x, z in corners:
                m.point(f"{seat}_{end}_{side}_corner", place[x, 1, z][0], *place[x, 1, z][1])
                m.link(f"{seat}_{end}_{side}_corner", f"{end}_{side}_leg_end")
            m.link(
                *(
                    f"{seat}_{end}_{side}_corner"
                    for end, side in (
                        ("front", "left"),
                        ("front", "right"),
                        ("back", "right"),
                        ("back", "left"),
                        ("front", "left"),
                    )
                )
            )
            if kind in ("chair", "bed"):
                rise = back * vary(r, 1, 0.12) * (0.5 if kind == "bed" else 1.0)
                low = raised + thick * (2 if kind == "bed" else 1)
                rest = box(m, (-w, low, -d), (w, low + rise, -d + thick), colours[2], patterns[1])
                for side, x in (("left", 1), ("right", -1)):
                    m.point(f"back_top_{side}_corner", rest[x, 1, 1][0], *rest[x, 1, 1][1])
                    m.link(f"back_top_{side}_corner", f"{seat}_back_{side}_corner")
                m.link("back_top_left_corner", "back_top_right_corner")
                if arms and kind == "chair":
                    for side, x in (("left", 1), ("right", -1)):
                        arm = box(
                            m,
                            (x * w, low + rise * 0.35, -d + thick),
                            (x * (w - thick), low + rise * 0.35 + thick, d * 0.9),
                            colours[3],
                        )
                        m.point(f"{side}_arm_front", arm[x, 1, 1][0], *arm[x, 1, 1][1])
            else:  # a runner across the table, so that front and back differ
                level = raised + thick
                top = next(p for p in m.parts[::-1] if isinstance(p, Plate) and p.normal == (0.0, 1.0, 0.0))
                top.details.append(
                    Detail(
                        np.array(
                            [[-w, level, d * 0.9], [w, level, d * 0.9], [w, level, d * 0.45], [-w, level, d * 0.45]]
                        ),
                        4,
                    )
                )
        return m

    side = float(rng.choice([-1, 1])) * 25.0
    return Template(
        kind,
        build,
        View((side, -side) if rng.random() < 0.5 else (side,), 28.0, 24.0, 14.0, any_roll=0.05, roll_spread=6.0),
    )
