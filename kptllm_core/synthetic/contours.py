"""Soft outlines: leaves, wings with veins, butterflies and nameless contours, with landmarks on and inside them.

Frame: in the plane z = 0, y up, seen from +z.
"""

from __future__ import annotations

import numpy as np

from kptllm_core.synthetic.figures import sample_paint, swing, vary
from kptllm_core.synthetic.solids import Detail, Model, Paint, Template, View


def spline(points: np.ndarray, closed: bool = True, steps: int = 6) -> np.ndarray:
    """A Catmull-Rom curve through (n, d) points, `steps` samples per piece."""
    p = np.asarray(points, np.float64)
    before, after, next_one = (np.roll(p, k, 0) for k in (1, -1, -2))
    if not closed:
        before[0], after[-1] = p[0], p[-1]
        next_one[-1], next_one[-2] = p[-1], p[-1]
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (q[:, None] for q in (before, p, after, next_one))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    flat = curve.reshape(-1, p.shape[1])
    return flat if closed else np.concatenate([flat[:-steps], p[-1:]])


def flat(x: object, y: object) -> np.ndarray:
    """Coordinates in the plane z = 0, (n, 3)."""
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    return np.stack([x, y, np.zeros_like(x)], -1)


def oval(centre: tuple[float, float], rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
    """(16, 3)"""
    t = np.linspace(0, 2 * np.pi, 17)[:-1]
    x, y = rx * np.cos(t), ry * np.sin(t)
    return flat(centre[0] + x * np.cos(tilt) - y * np.sin(tilt), centre[1] + x * np.sin(tilt) + y * np.cos(tilt))


def leaf(rng: np.random.Generator) -> Template:
    """A leaf: base, tip, the ends of its veins, perhaps lobes."""
    veins = int(rng.integers(2, 6))
    t = np.linspace(0.12, 0.88, veins)
    widths = np.interp(t, [0, rng.uniform(0.25, 0.65), 1], [0.1, rng.uniform(0.2, 0.55), 0.05])
    notch, rise, stem = rng.choice([1.0, 1.0, 0.75, 0.5]), rng.uniform(0.05, 0.2), rng.uniform(0.1, 0.35)
    paint, vein = sample_paint(rng, 0, 0.0), 1
    spots = rng.uniform(-0.6, 0.6, (int(rng.integers(0, 4)), 2))

    def build(r: np.random.Generator) -> Model:
        m = Model()
        fat, bend = vary(r, 1, 0.13), swing(r, 0, 0.1)
        sides: dict[str, list[np.ndarray]] = {"left": [], "right": []}
        line = lambda h: bend * np.sin(np.pi * h)  # noqa: E731
        shift = np.clip(r.normal(0, 0.02, veins), -0.04, 0.04)
        for side, x in (("left", -1.0), ("right", 1.0)):
            for k in range(veins):
                h = t[k] + rise + shift[k]
                end = flat(line(t[k]) + x * widths[k] * vary(r, fat, 0.06), min(h, 0.97))
                sides[side].append(end)
                if k < veins - 1:
                    gap = (t[k] + t[k + 1]) / 2 + rise
                    sides[side].append(
                        flat(line(gap) + x * notch * (widths[k] + widths[k + 1]) / 2 * fat, min(gap, 0.97))
                    )
        tip, base = flat(line(1.0), 1.05), flat(0.0, 0.0)
        outline = spline(np.stack([base, *sides["right"], tip, *sides["left"][::-1]]))
        middle = spline(np.stack([base, flat(line(0.5), 0.5), tip]), closed=False)
        details = [Detail(middle, vein, 0.018)]
        for k in range(veins):
            root = flat(line(t[k]), t[k])
            for side in ("left", "right"):
                details.append(Detail(np.stack([root, sides[side][k * 2]]), vein, 0.011))
        for x, h in spots:
            details.append(Detail(oval((line(0.5 + h / 2) + x * 0.2, 0.5 + h / 2), 0.04, 0.03), 2))
        stalk = flat(swing(r, 0, 0.05), -stem)
        m.tube(np.stack([base, stalk]), 0.018, Paint(vein), up=(1, 0, 0), lift=-0.01)
        m.plate(outline, paint, details=details)
        m.point("tip", tip, 1)
        m.point("base", base, 0, 1)
        m.point("stem_end", stalk, 0)
        m.point("middle", flat(line(0.5), 0.5), 1)
        for k in range(veins):
            m.point(f"vein_{k + 1}_root", flat(line(t[k]), t[k]), 1)
            m.point(f"left_vein_{k + 1}_end", sides["left"][k * 2], 1)
            m.point(f"right_vein_{k + 1}_end", sides["right"][k * 2], 1)
            m.link(f"left_vein_{k + 1}_end", f"vein_{k + 1}_root", f"right_vein_{k + 1}_end")
        m.link("stem_end", "base", "middle", "tip")
        return m

    return Template("leaf", build, View((0.0,), 35.0, 0.0, 30.0, any_roll=0.4, roll_spread=20.0))


def wing(rng: np.random.Generator) -> Template:
    """An insect's wing: a clear membrane, veins, the points where they meet."""
    count = int(rng.integers(3, 6))
    roots = np.linspace(0.08, -0.08, count)
    ends_at = np.sort(rng.uniform(-0.5, 0.5, count))[::-1] + np.linspace(0.35, -0.35, count)
    reach = 1.0 - 0.35 * np.abs(np.linspace(-0.6, 1, count)) + rng.uniform(-0.06, 0.06, count)
    crossings = [(int(rng.integers(count - 1)), float(a)) for a in rng.uniform(0.3, 0.75, int(rng.integers(2, 7)))]
    crossings = [
        (k, a) for i, (k, a) in enumerate(crossings) if all(abs(a - b) > 0.09 or j != k for j, b in crossings[:i])
    ]
    fat, thick, numbered = rng.uniform(0.22, 0.48), rng.uniform(0.010, 0.022), rng.random() < 0.6
    bow = rng.uniform(-0.06, 0.06, count)
    ghost = rng.uniform(0, 0.02)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        wide, long = fat * vary(r, 1, 0.1), vary(r, 1, 0.06)
        veins, ends = [], []
        for k in range(count):
            end = flat(reach[k] * long + r.normal(0, 0.012), np.sin(ends_at[k]) * wide + r.normal(0, 0.008))
            root = flat(0.0, roots[k] * 0.5)
            fan = 1 - 2 * k / (count - 1)  # the first vein bulges up, the last one down: they bound the wing
            bulge = flat(end[0] * 0.5, (end[1] + root[1]) / 2 + bow[k] * (1 - abs(fan)) + fan * wide * 0.32)
            veins.append(spline(np.stack([root, bulge, end]), closed=False, steps=10))
            ends.append(end)
        low, high = veins[-1], veins[0]
        outline = np.concatenate(
            [
                high,
                spline(np.stack([ends[0], *(e + flat(0.02, 0) for e in ends[1:-1]), ends[-1]]), closed=False),
                low[::-1],
            ]
        )
        outline = outline + (outline - outline.mean(0)) * 0.03
        details = [Detail(v, 1, thick * (1.3 if k in (0, 1) else 1.0)) for k, v in enumerate(veins)]
        found = []
        for k, a in crossings:
            a = float(np.clip(a + r.normal(0, 0.015), 0.2, 0.85))
            i, j = int(a * (len(veins[k]) - 1)), int((a + 0.03) * (len(veins[k]) - 1))
            p, q = veins[k][i], veins[k + 1][j]
            details.append(Detail(np.stack([p, q]), 1, thick))
            found += [p, q]
        m.tube(np.stack([flat(-0.12, 0.0), flat(0.02, 0.0)]), 0.05, Paint(2), lift=0.02)
        m.plate(outline + (0, 0, -ghost), Paint(0), details=details)
        named = {"hinge": flat(0.0, 0.0)}
        for k, end in enumerate(ends, 1):
            named[f"vein_{k}_end"] = end
        for k, xyz in enumerate(found, 1):
            named[f"junction_{k}"] = xyz
        for k, (name, xyz) in enumerate(named.items(), 1):
            m.point(f"landmark_{k}" if numbered else name, xyz, 0, 1)
        names = list(m.points)
        for k in range(count):
            m.link(names[0], names[1 + k])
        return m

    return Template("wing", build, View((0.0,) if rng.random() < 0.7 else (0.0, 180.0), 18.0, 0.0, 18.0, any_roll=0.2))


def outline(rng: np.random.Generator) -> Template:
    """A nameless soft shape with landmarks on its outline and inside: teeth, shells, organs, blobs. Symmetric or not."""
    word = ("shape", "tooth", "shell", "organ", "stone", "petal")[int(rng.integers(6))]
    count, paired = int(rng.integers(7, 13)), rng.random() < 0.35
    t = np.linspace(0, 2 * np.pi, count, endpoint=False) + np.pi / 2
    radius = rng.uniform(0.55, 1.0, count)
    if paired:
        radius = (radius + np.roll(radius[::-1], 1)) / 2
    aspect = rng.uniform(0.5, 1.0)
    modes = rng.normal(0, 0.055, (3, count, 2))
    if paired:
        modes = (modes + np.roll(modes[:, ::-1], 1, 1) * (-1, 1)) / 2
    inside = rng.uniform(-0.35, 0.35, (int(rng.integers(2, 6)), 2))
    sizes, kinds = rng.uniform(0.03, 0.12, len(inside)), rng.integers(1, 6, len(inside))
    if paired:
        inside[:, 0] = np.abs(inside[:, 0]) + 0.06
    lines = rng.random() < 0.5
    names = [f"contour_{k + 1}" for k in range(count)]
    if paired:
        names = [
            "top"
            if k == 0
            else "bottom"
            if 2 * k == count
            else f"left_edge_{k}"
            if 2 * k < count
            else f"right_edge_{count - k}"
            for k in range(count)
        ]
    rim = rng.random() < 0.5

    def build(r: np.random.Generator) -> Model:
        m = Model()
        points = np.stack([np.cos(t) * radius * aspect, np.sin(t) * radius], 1)
        points = points + np.tensordot(np.clip(r.normal(0, 1, 3), -2, 2), modes, 1) + r.normal(0, 0.012, points.shape)
        points *= np.exp(np.clip(r.normal(0, 0.08, 2), -0.16, 0.16))
        ring = flat(points[:, 0], points[:, 1])
        curve = spline(ring)
        details = [Detail(np.concatenate([curve, curve[:1]]), 5, 0.02)] if rim else []
        middle = ring.mean(0)
        spots: dict[str, np.ndarray] = {}
        for k, ((x, y), size, colour) in enumerate(zip(inside, sizes, kinds, strict=True), 1):
            for side, sign in (("left_", -1.0), ("right_", 1.0)) if paired else (("", 1.0),):
                centre = (
                    middle + flat(sign * x * aspect * 1.2, y * 1.2) + flat(*np.clip(r.normal(0, 0.015, 2), -0.03, 0.03))
                )
                if lines:
                    details.append(Detail(np.stack([middle, centre]), 5, 0.012))
                details.append(Detail(oval((centre[0], centre[1]), size, size * 0.8), int(colour)))
                spots[f"{side}spot_{k}"] = centre
        m.plate(curve, Paint(0), details=details)
        for name, xyz in zip(names, ring, strict=True):
            m.point(name, xyz * 0.985 + middle * 0.015, 0)
        for name, xyz in spots.items():
            m.point(name, xyz, 0)
        m.link(*names, names[0])
        return m

    return Template(word, build, View((0.0,), 28.0, 0.0, 25.0, any_roll=0.3, roll_spread=18.0))


def butterfly(rng: np.random.Generator) -> Template:
    """A butterfly or moth from above: two pairs of patterned wings on a body."""
    u = rng.uniform
    upper = flat(
        [0.02, u(0.25, 0.5), u(0.6, 1.0), u(0.55, 0.95), 0.3, 0.02],
        [0.15, u(0.5, 0.8), u(0.5, 0.9), u(0.0, 0.3), -0.05, -0.02],
    )
    lower = flat(
        [0.02, 0.3, u(0.45, 0.8), u(0.35, 0.65), u(0.1, 0.3), 0.02],
        [0.02, 0.05, u(-0.3, -0.05), u(-0.75, -0.45), u(-0.6, -0.4), -0.15],
    )
    spots = [
        (bool(rng.random() < 0.5), u(0.2, 0.6, 5), u(0.03, 0.11), int(rng.integers(1, 6)))
        for _ in range(int(rng.integers(1, 5)))
    ]
    body, edge = sample_paint(rng, 3, 0.5), int(rng.choice([0, 1, 5]))
    word = ("butterfly", "moth")[int(rng.integers(2))]
    body_long, thick, feeler = u(0.25, 0.45), u(0.04, 0.08), u(0.2, 0.45)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        stretch = np.array([vary(r, 1, 0.1), vary(r, 1, 0.1), 1.0])
        fold = np.deg2rad(abs(swing(r, 0, 22)))
        shapes = [
            (name, points * stretch * np.exp(np.clip(r.normal(0, 0.05, (6, 1)), -0.1, 0.1)), swing(r, 0, 6))
            for name, points in (("hind", lower), ("front", upper))
        ]
        for side, x in (("left", -1.0), ("right", 1.0)):
            for name, points, turn in shapes:
                a = np.deg2rad(turn)
                spun = points @ np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])
                place = np.stack([x * spun[:, 0] * np.cos(fold), spun[:, 1], np.abs(spun[:, 0]) * np.sin(fold)], 1)
                curve = spline(place)
                details = [
                    Detail(np.concatenate([curve, curve[:1]]), edge, 0.035),
                    Detail(np.stack([place[0], place[2]]), edge, 0.012),
                ]
                named = {f"{side}_{name}_wing_tip": place[2], f"{side}_{name}_wing_corner": place[3]}
                for number, (front, mix, size, colour) in enumerate(spots, 1):
                    if front == (name == "front"):
                        middle = (mix / mix.sum()) @ place[[1, 2, 3, 4, 5]]
                        details.append(
                            Detail(oval((middle[0], middle[1]), size, size * 0.85) + (0, 0, middle[2]), colour)
                        )
                        named[f"{side}_{name}_wing_spot_{number}"] = middle
                part = m.plate(
                    curve, Paint(0 if name == "front" else 2), details=details, lift=0.0 if name == "front" else -0.1
                )
                for title, xyz in named.items():
                    m.point(title, xyz, part)
                m.link("thorax", f"{side}_{name}_wing_tip", f"{side}_{name}_wing_corner")
        nod = swing(r, 0, 0.06)
        tail, head = flat(nod, -body_long), flat(-nod, 0.25)
        trunk = m.tube(
            np.stack([tail, tail * 0.5, flat(0, 0.05), head]),
            np.array([0.4, 0.9, 1.2, 0.7]) * thick,
            body,
            up=(1, 0, 0),
            lift=0.5,
        )
        for side, x in (("left", -1.0), ("right", 1.0)):
            end = head + flat(x * feeler * 0.6 * vary(r, 1, 0.15), feeler)
            m.point(
                f"{side}_antenna_tip",
                end,
                m.tube(
                    np.stack([head, (head + end) / 2 + flat(x * -0.03, 0), end]), [0.01, 0.01, 0.02], Paint(5), lift=0.4
                ),
            )
            m.link("head", f"{side}_antenna_tip")
        m.point("head", head, m.ball(head, thick * 0.9, Paint(5), lift=0.6))
        m.point("thorax", flat(0, 0.05), trunk)
        m.point("abdomen_tip", tail, trunk)
        m.link("head", "thorax", "abdomen_tip")
        return m

    return Template(word, build, View((0.0,), 20.0, 0.0, 20.0, any_roll=0.4, roll_spread=20.0))
