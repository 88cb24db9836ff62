"""Vehicles, tools that lie flat, printed panels and parts. Left and right are the thing's own; frame as in `furniture`."""

from __future__ import annotations

import numpy as np

from kptllm_core.synthetic.figures import sample_paint, vary
from kptllm_core.synthetic.furniture import box
from kptllm_core.synthetic.solids import Detail, Model, Paint, Plate, Template, View


def vehicle(rng: np.random.Generator) -> Template:
    """Car, van or truck: a body, a cabin, wheels and lamps."""
    kind = ("car", "car", "van", "truck", "bus")[int(rng.integers(5))]
    u = rng.uniform
    length, width, body, cabin, wheel = u(1.5, 2.4), u(0.65, 0.9), u(0.28, 0.45), u(0.25, 0.5), u(0.15, 0.24)
    start, end = {
        "car": (u(-0.75, -0.5), u(0.1, 0.35)),
        "van": (-1.0, u(0.4, 0.7)),
        "bus": (-1.0, 1.0),
        "truck": (u(0.3, 0.5), 1.0),
    }[kind]
    slope, glass, paint, roof = (
        u(0.0, 0.14) if kind != "bus" else 0.0,
        5,
        sample_paint(rng, 0, 0.0),
        Paint(int(rng.choice([0, 2]))),
    )
    bed = kind == "truck"

    def build(r: np.random.Generator) -> Model:
        m = Model()
        half, w, high, top = (
            length * vary(r, 1, 0.08) / 2,
            width * vary(r, 1, 0.06) / 2,
            body * vary(r, 1, 0.1),
            cabin * vary(r, 1, 0.1),
        )
        low = wheel * 0.8
        main = box(m, (-w, low, -half), (w, low + high, half), paint)
        lights = m.parts[5]
        assert isinstance(lights, Plate)
        rear = m.parts[4]
        assert isinstance(rear, Plate)
        y = low + high * 0.62
        for side, x in (("left", 1), ("right", -1)):
            square = np.array([[-0.14, -0.12, 0], [0.14, -0.12, 0], [0.14, 0.12, 0], [-0.14, 0.12, 0]]) * (
                w * 1.3,
                high * 1.2,
                1,
            )
            lights.details.append(Detail(square + (x * w * 0.72, y, half), 4))
            rear.details.append(Detail(square * (0.8, 1.2, 1) + (x * w * 0.78, y, -half), 7))
            m.point(f"{side}_headlight", (x * w * 0.72, y, half), 5)
            m.point(f"{side}_taillight", (x * w * 0.78, y, -half), 4)
            m.point(f"{side}_front_bumper_corner", main[x, -1, 1][0], *main[x, -1, 1][1])
            m.point(f"{side}_back_bumper_corner", main[x, -1, -1][0], *main[x, -1, -1][1])
        lights.details.append(
            Detail(
                np.array(
                    [
                        [-w * 0.45, y - high * 0.2, half],
                        [w * 0.45, y - high * 0.2, half],
                        [w * 0.45, y + high * 0.08, half],
                        [-w * 0.45, y + high * 0.08, half],
                    ]
                ),
                5,
            )
        )
        z0, z1 = start * half, end * half
        inside = 0.92 * w
        roof_box = box(m, (-inside, low + high, z0), (inside, low + high + top, z1), roof)
        for index in range(len(m.parts) - 6, len(m.parts)):
            plate = m.parts[index]
            assert isinstance(plate, Plate)
            up = plate.points[:, 1] > low + high + 1e-6
            plate.points[up, 2] += np.where(plate.points[up, 2] > (z0 + z1) / 2, -slope, slope * 0.6) * 1.6
            if plate.normal is not None and plate.normal[1] == 0:
                ring = plate.points.mean(0) + (plate.points - plate.points.mean(0)) * 0.78
                plate.details.append(Detail(ring, glass))
        for side, x in (("left", 1), ("right", -1)):
            for name, z, more in (("front", 1, -slope * 1.6), ("back", -1, slope * 0.96)):
                place, seen = roof_box[x, 1, z]
                m.point(f"{side}_{name}_roof_corner", place + (0, 0, more), *seen)
        if bed:
            load = box(m, (-w, low + high, -half), (w, low + high + top * 1.4, z0 - 0.05), Paint(1), ("boards", 3))
            m.point("cargo_top_left_back", load[1, 1, -1][0], *load[1, 1, -1][1])
            m.point("cargo_top_right_back", load[-1, 1, -1][0], *load[-1, 1, -1][1])
        around = np.linspace(0, 2 * np.pi, 17)[:-1]
        circle = np.stack([np.zeros(16), np.sin(around), np.cos(around)], 1)
        for side, x in (("left", 1), ("right", -1)):
            for name, along in (("front", 0.62), ("back", -0.6)):
                hub = np.array([x * (w + 0.02), wheel, along * half])
                m.boxes.append(np.stack([hub - (0.015, wheel, wheel), hub + (0.015, wheel, wheel)]))
                details = [Detail(hub + circle * wheel * 0.58, 6), Detail(hub + circle * wheel * 0.18, 5)]
                wheel_id = m.plate(
                    hub + circle * wheel, Paint(5), normal=(x, 0.0, 0.0), group=len(m.boxes) - 1, details=details
                )
                m.point(f"{side}_{name}_wheel", hub, wheel_id)
                m.link(f"{side}_{name}_wheel", f"{side}_{name}_bumper_corner")
            m.link(f"{side}_front_wheel", f"{side}_back_wheel")
            m.link(f"{side}_headlight", f"{side}_front_roof_corner", f"{side}_back_roof_corner", f"{side}_taillight")
        m.link("left_front_roof_corner", "right_front_roof_corner")
        return m

    yaws = tuple(float(v) for v in rng.choice([-140, -90, -50, 0, 50, 90, 140], int(rng.integers(2, 7)), replace=False))
    return Template(kind, build, View(yaws, 25.0, 14.0, 12.0, any_roll=0.04, roll_spread=5.0))


def tool(rng: np.random.Generator) -> Template:
    """Something long that lies flat: tube, bottle, hammer, wrench, knife, brush, lamp arm. Any rotation is natural."""
    kind = ("bottle", "tube", "hammer", "wrench", "knife", "brush", "scissors", "key")[int(rng.integers(8))]
    u = rng.uniform
    long, thick, head = u(0.8, 1.6), u(0.04, 0.12), u(0.15, 0.45)
    profile = np.interp(np.linspace(0, 1, 8), np.sort(rng.random(4)), u(0.5, 1.6, 4))
    handle, end_paint = sample_paint(rng, 0, 0.9), sample_paint(rng, 2, 0.4)
    bend, split = u(-0.15, 0.15) * (rng.random() < 0.4), u(0.22, 0.4)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        size, fat = long * vary(r, 1, 0.1), thick * vary(r, 1, 0.12)
        t = np.linspace(0, 1, 8)
        curve = bend * vary(r, 1, 0.3)
        spine = np.stack([curve * np.sin(t * np.pi), (t - 0.5) * size, 0 * t], 1)
        stop = 0.68 if kind in ("bottle", "tube", "knife", "brush") else 1.0
        body = m.tube(
            spine[t <= stop + 0.05],
            (profile * fat * (2.0 if kind in ("bottle", "tube") else 1.0))[t <= stop + 0.05],
            handle,
            up=(1, 0, 0),
        )
        top, low = spine[-1], spine[0]
        m.point("handle_end" if kind not in ("bottle", "tube") else "bottom_end", low, body)
        m.point("handle_middle" if kind not in ("bottle", "tube") else "body_middle", spine[3], body)
        h = head * vary(r, 1, 0.1)
        if kind in ("bottle", "tube", "brush", "knife"):
            neck = spine[5]
            widths = {"bottle": (0.6, 0.5), "tube": (0.9, 0.35), "brush": (1.6, 2.0), "knife": (1.3, 0.25)}[kind]
            end = neck + (top - neck) * (1 + 0.4 * h)
            part = m.tube(
                [neck, (neck + end) / 2, end],
                np.array([widths[0], sum(widths) / 1.8, widths[1]]) * fat,
                end_paint,
                up=(1, 0, 0),
                lift=0.02,
            )
            names = {
                "bottle": ("neck", "cap_end"),
                "tube": ("cap_base", "cap_end"),
                "brush": ("bristles_base", "bristles_end"),
                "knife": ("blade_base", "blade_tip"),
            }[kind]
            m.point(names[0], neck, body, part)
            m.point(names[1], end, part)
            side = (
                np.array(
                    [
                        widths[1] * fat
                        if kind == "brush"
                        else profile[3] * fat * (2.0 if kind in ("bottle", "tube") else 1.0),
                        0,
                        0,
                    ]
                )
                * 0.9
            )
            where, part_id = (end, part) if kind == "brush" else (spine[3], body)
            m.point("right_side", where + side, part_id)
            m.point("left_side", where - side, part_id)
        elif kind in ("hammer", "key"):
            left, right = top + (-h * split, 0, 0.01), top + (h * (1 - split), 0, 0.01)
            part = m.tube([left, top, right], np.array([1.7, 1.2, 0.8]) * fat, end_paint, up=(0, 1, 0), lift=0.05)
            for name, xyz in (("head_face", left), ("head_center", top), ("head_peen", right)):
                m.point(name, xyz, part, body)
        else:
            opened = np.deg2rad(vary(r, 26, 0.3))
            m.point("joint", top, body)
            for name, sign in (("long_jaw_tip", -1), ("short_jaw_tip", 1)):
                reach = h * (1.0 if sign < 0 else split * 2)
                way = top + reach * np.array([np.sin(opened) * sign, np.cos(opened), 0])
                part = m.tube([top, way], [fat * 1.2, fat * 0.4], end_paint, lift=0.02)
                m.point(name, way, part)
            m.points["joint"] = (top, (body, part, part - 1))
            m.point("hole", low + (0, 0.06, 0), m.ball(low + (0, 0.06, 0), fat * 0.5, Paint(5), lift=0.1))
        m.link(*list(m.points)[:4])
        return m

    return Template(kind, build, View((0.0,), 30.0, 0.0, 30.0, any_roll=0.6, roll_spread=30.0))


def panel(rng: np.random.Generator) -> Template:
    """A printed rectangle, a grid or a random polygon with marks: cards, boards, signs, parts."""
    kind = ("card", "board", "sign", "part", "part")[int(rng.integers(5))]
    u = rng.uniform
    corners = int(rng.integers(4, 10))
    angles = (np.arange(corners) + u(-0.3, 0.3, corners)) * 2 * np.pi / corners
    outline = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1) * u(0.35, 1.0, (corners, 1))
    aspect, cells = u(0.5, 1.0), int(rng.integers(3, 8))
    holes = u(-0.32, 0.32, (int(rng.integers(2, 4)), 2))
    bars, hole_size = u(0.1, 0.9, 3), u(0.05, 0.13)
    paint = Paint(0)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        if kind == "part":
            points = (
                outline * np.exp(np.clip(r.normal(0, 0.07, (corners, 1)), -0.15, 0.15)) * (1.0, vary(r, 1, 0.08), 1.0)
            )
            m.plate(points, paint)
            around = np.linspace(0, 2 * np.pi, 13)[:-1]
            for number, centre in enumerate(holes, 1):
                middle = np.array([*centre, 0.0])
                ring = middle + vary(r, hole_size, 0.12) * np.stack([np.cos(around), np.sin(around), 0 * around], 1)
                m.parts[0].details.append(Detail(ring, 2 * number - 1))  # type: ignore[union-attr]
                m.point(f"hole_{number}", middle, 0)
            for number, xyz in enumerate(points, 1):
                m.point(f"corner_{number}", xyz, 0)
            m.link(*(f"corner_{i + 1}" for i in range(corners)), "corner_1")
            return m
        w, h = 0.5 * vary(r, 1, 0.08), 0.5 * aspect * vary(r, 1, 0.08)
        square = np.array([[-w, h, 0], [w, h, 0], [w, -h, 0], [-w, -h, 0]])
        m.plate(square, paint)
        plate = m.parts[0]
        assert isinstance(plate, Plate)
        for name, xyz in zip(("top_left", "top_right", "bottom_right", "bottom_left"), square, strict=True):
            m.point(f"{name}_corner", xyz, 0)
        if kind == "board":
            for k in range(cells + 1):
                s = 2 * k / cells - 1
                plate.details.append(Detail(np.array([[s * w, -h, 0], [s * w, h, 0]]), 1, 0.012))
                plate.details.append(Detail(np.array([[-w, s * h, 0], [w, s * h, 0]]), 1, 0.012))
            plate.details.append(
                Detail(np.array([[-w, h, 0], [w, h, 0], [w, h * (1 - 2 / cells), 0], [-w, h * (1 - 2 / cells), 0]]), 2)
            )
            s = 1 - 2 / cells
            for name, x, y in (
                ("top_left_inner", -s, s),
                ("top_right_inner", s, s),
                ("bottom_right_inner", s, -s),
                ("bottom_left_inner", -s, -s),
            ):
                m.point(f"{name}_crossing", (x * w, y * h, 0), 0)
        else:
            for number, height in enumerate(sorted(bars, reverse=True), 1):
                y, x = h * (2 * height - 1) * 0.85, w * (0.35 + 0.5 * bars[number - 1])
                plate.details.append(Detail(np.array([[-x, y, 0], [x, y, 0]]), number, 0.05))
                m.point(f"line_{number}_left_end", (-x, y, 0), 0)
                m.point(f"line_{number}_right_end", (x, y, 0), 0)
            plate.details.append(Detail(np.array([[-w * 0.2, h * 0.5, 0], [w * 0.2, h * 0.5, 0], [0, h * 0.95, 0]]), 4))
            m.point("emblem_top", (0, h * 0.95, 0), 0)
        m.link("top_left_corner", "top_right_corner", "bottom_right_corner", "bottom_left_corner", "top_left_corner")
        return m

    return Template(kind, build, View((0.0,), 38.0, 0.0, 38.0, any_roll=0.4 if kind == "part" else 0.15))
