"""Insects and the like from above, and hands: figures that lie flat, any rotation in the image being natural.

Frame: ahead (or the fingers) is +y, the viewer looks at the back from +z; the subject's right is +x.
"""

from __future__ import annotations

import numpy as np

from kptllm_core.synthetic.figures import SIDES, sample_paint, swing, towards, vary
from kptllm_core.synthetic.solids import Mark, Model, Paint, Template, View


def insect(rng: np.random.Generator) -> Template:
    """An insect, spider or crab with random proportions."""
    pairs = int(rng.choice([3, 3, 3, 4, 4, 5]))
    shape = {
        "head": rng.uniform(0.09, 0.18),
        "thorax": rng.uniform(0.1, 0.24),
        "abdomen": rng.uniform(0.12, 0.3),
        "abdomen_long": rng.uniform(0.3, 0.9),
        "thorax_long": rng.uniform(0.15, 0.4),
        "leg": rng.uniform(0.45, 1.1),
        "antenna": rng.uniform(0.15, 0.7),
        "thick": rng.uniform(0.014, 0.04),
        "wing": rng.uniform(0.5, 1.1) * (rng.random() < 0.4),
        "wing_open": rng.uniform(10, 80),
        "knee": rng.uniform(0.35, 0.6),
    }
    paints = {
        "head": sample_paint(rng, 1, 0.2),
        "thorax": sample_paint(rng, 0, 0.6),
        "abdomen": sample_paint(rng, int(rng.choice([0, 2])), 0.95),
        "leg": sample_paint(rng, 3, 0.4),
        "wing": sample_paint(rng, 4, 0.7),
        "eye": Paint(5),
    }
    names = {3: ("front", "middle", "hind")}.get(pairs, tuple(str(i + 1) for i in range(pairs)))
    word = (
        ("insect", "bug", "fly", "beetle")[int(rng.integers(4))]
        if pairs == 3
        else ("spider", "crab")[int(rng.integers(2))]
    )
    any_roll = float(rng.choice([0.15, 0.3, 0.9]))
    return _crawler(word, shape, paints, names, View((0.0,), 18.0, 0.0, 22.0, any_roll=any_roll, roll_spread=18.0))


def beetle() -> Template:
    """The fixed, well-recognisable beetle of the sample images: red wing cases with dark spots."""
    spots = [
        Mark("spot", t, s, z, 1)
        for t, s, z in (
            (0.22, 0.48, 0.2),
            (0.22, -0.48, 0.2),
            (0.5, 0.52, 0.24),
            (0.5, -0.52, 0.24),
            (0.76, 0.42, 0.19),
            (0.76, -0.42, 0.19),
        )
    ]
    seam = Mark("seam", 0.5, 0.0, 0.03, 1)
    paints = {
        "head": Paint(1),
        "thorax": Paint(3, (Mark("spot", 0.5, 0.6, 0.22, 4), Mark("spot", 0.5, -0.6, 0.22, 4))),
        "abdomen": Paint(0, (seam, *spots)),
        "leg": Paint(3),
        "wing": Paint(4),
        "eye": Paint(4),
    }
    shape = {
        "head": 0.12,
        "thorax": 0.19,
        "abdomen": 0.27,
        "abdomen_long": 0.62,
        "thorax_long": 0.2,
        "leg": 0.62,
        "antenna": 0.34,
        "thick": 0.026,
        "wing": 0.0,
        "wing_open": 0.0,
        "knee": 0.5,
    }
    view = View((0.0,), 14.0, 0.0, 14.0, any_roll=0.0, roll_spread=18.0, roll_limit=35.0)
    return _crawler("insect", shape, paints, ("front", "middle", "hind"), view, fewer=True)


def _crawler(
    word: str, p: dict[str, float], paints: dict[str, Paint], legs: tuple[str, ...], view: View, fewer: bool = False
) -> Template:
    u = np.linspace(-0.72, 1.0, 12)  # an egg's outline, closed by a small round end
    egg = ((u - u[0]) / (u[-1] - u[0]), np.maximum(np.sqrt(np.maximum(1 - u**2, 0)) * (1.06 - 0.1 * u), 0.12))

    def build(r: np.random.Generator) -> Model:
        m = Model()
        fat, long = vary(r, 1, 0.09), vary(r, 1, 0.08)
        thorax, abdomen, head = p["thorax"] * fat, p["abdomen"] * vary(r, fat, 0.06), p["head"] * vary(r, 1, 0.07)
        half = p["thorax_long"] / 2 * long
        front = np.array([0.0, half, 0.0])
        bend = swing(r, 0, 4)
        tail_way = towards(-90 + bend)
        start = np.array([0.0, -half - abdomen * 0.35, 0.0])
        tip = start + p["abdomen_long"] * long * tail_way
        leg, thick = p["leg"] * vary(r, 1, 0.1), p["thick"] * vary(r, 1, 0.1)
        spread = np.linspace(52, -44, len(legs))
        tips: dict[str, tuple[np.ndarray, int]] = {}
        for number, name in enumerate(legs):
            stance = swing(r, 0, 6)
            for side, x in SIDES:
                root = np.array([x * thorax * 0.8, half * 0.8 * (1 - 2 * number / max(len(legs) - 1, 1)), -0.05])
                way = spread[number] + stance + swing(r, 0, 10)
                angle = np.deg2rad(way)
                step = np.array([x * np.cos(angle), np.sin(angle), 0.05])
                bow = np.deg2rad(way + (-1 if number >= len(legs) / 2 else 1) * swing(r, 32, 10))
                knee = root + leg * p["knee"] * step
                foot = knee + leg * (1 - p["knee"]) * np.array([x * np.cos(bow), np.sin(bow), -0.2])
                upper = m.tube([root, knee], [thick * 1.3, thick], paints["leg"], up=(0, 1, 0), lift=-0.3)
                lower = m.tube([knee, foot], [thick, thick * 0.6], paints["leg"], up=(0, 1, 0), lift=-0.3)
                stem = f"{side}_{name}_leg"
                if not fewer:
                    m.point(f"{stem}_base", root, upper)
                    m.point(f"{stem}_knee", knee, upper, lower)
                    m.link("thorax", f"{stem}_base", f"{stem}_knee", f"{stem}_tip")
                else:
                    m.link("thorax", f"{stem}_tip")
                tips[f"{stem}_tip"] = (foot, lower)
        t = np.linspace(0, 1, 10)
        profile = np.interp(t, *egg) * abdomen
        abdomen_id = m.tube(start + t[:, None] * (tip - start), profile, paints["abdomen"], up=(1, 0, 0), flat=0.6)
        thorax_id = m.tube(
            [-front * 0.9, front * 0.0, front * 0.9],
            np.array([0.85, 1.0, 0.7]) * thorax,
            paints["thorax"],
            up=(1, 0, 0),
            flat=0.7,
            lift=0.25,
        )
        nod = swing(r, 90, 7)
        skull = front + (thorax * 0.45 + head * 0.75) * towards(nod)
        across = towards(nod - 90)
        feelers = {}
        for side, x in SIDES:
            way = nod - x * swing(r, 32, 9)
            base = skull + head * 0.6 * towards(nod) + across * x * head * 0.3
            middle = base + p["antenna"] / 2 * towards(way)
            end = middle + p["antenna"] / 2 * vary(r, 1, 0.1) * towards(way - x * swing(r, 22, 12))
            tube_id = m.tube([base, middle, end], [thick * 0.7, thick * 0.55, thick * 0.5], paints["leg"], lift=-0.05)
            feelers[side] = (base, end, tube_id)
        head_id = m.tube(
            [skull - across * head * 0.2, skull + across * head * 0.2], head, paints["head"], up=(0, 1, 0), lift=0.3
        )
        mouth = skull + head * 0.85 * towards(nod)
        m.point("head", skull if fewer else mouth, head_id)
        for side, x in SIDES:
            eye = skull + across * x * head * 0.8 + head * 0.35 * towards(nod) + np.array([0, 0, 0.03])
            m.point(f"{side}_eye", eye, m.ball(eye, head * 0.27, paints["eye"], lift=0.36))
        for side, (base, end, tube_id) in feelers.items():
            if not fewer:
                m.point(f"{side}_antenna_base", base, tube_id, head_id)
            m.point(f"{side}_antenna_tip", end, tube_id)
            m.link("head", f"{side}_antenna_tip")
        m.point("thorax", [0, 0, 0], thorax_id)
        if not fewer:
            m.point("waist", start, abdomen_id, thorax_id)
        m.point("abdomen_tip", tip + 0.05 * abdomen * tail_way, abdomen_id)
        m.link("head", "thorax", "abdomen_tip")
        if p["wing"]:
            opened = swing(r, p["wing_open"], 9)
            for side, x in SIDES:
                root = np.array([x * thorax * 0.55, half * 0.3, 0.03])
                angle = np.deg2rad(-90 + opened)
                end = root + p["wing"] * vary(r, 1, 0.06) * np.array([x * np.cos(angle), np.sin(angle), 0.1])
                wing_id = m.tube(
                    [root, root * 0.6 + end * 0.4, root * 0.25 + end * 0.75, end],
                    np.array([0.25, 0.8, 1.0, 0.45]) * abdomen * 0.75,
                    paints["wing"],
                    up=(x, 0.5, 0),
                    flat=0.2,
                    lift=0.28,
                )
                m.point(f"{side}_wing_base", root, wing_id, thorax_id)
                m.point(f"{side}_wing_tip", end, wing_id)
                m.link(f"{side}_wing_base", f"{side}_wing_tip")
        for title, (xyz, part) in tips.items():
            m.point(title, xyz, part)
        return m

    return Template(word, build, view)


def hand(rng: np.random.Generator) -> Template:
    """A hand (or paw) with three to five fingers, palm or back, fingers spread or bent."""
    count = int(rng.choice([3, 4, 5, 5, 5]))
    fingers = ("thumb", "index", "middle", "ring", "pinky")[:count]
    lengths = (
        np.array([0.45, 0.62, 0.68, 0.62, 0.48])[:count] * rng.uniform(0.7, 1.25) * np.exp(rng.normal(0, 0.08, count))
    )
    thick, palm, fan = rng.uniform(0.05, 0.11), rng.uniform(0.42, 0.62), rng.uniform(8, 22)
    skin, nail, sleeve = sample_paint(rng, 0, 0.2), Paint(int(rng.choice([0, 4]))), sample_paint(rng, 2, 0.8)
    joints = (("mcp", "pip", "tip"), ("base", "middle", "tip"), ("knuckle", "joint", "tip"))[int(rng.integers(3))]

    def build(r: np.random.Generator) -> Model:
        m = Model()
        wide, long = vary(r, 1, 0.1), vary(r, 1, 0.08)
        wrist = np.zeros(3)
        cuff = m.tube([wrist - (0, 0.35, 0), wrist - (0, 0.12, 0)], 0.17 * wide, sleeve, up=(1, 0, 0), lift=0.05)
        arm = m.tube([wrist - (0, 0.15, 0), wrist], 0.13 * wide, skin, up=(1, 0, 0), flat=0.7)
        m.tube(
            [wrist, wrist + (0, palm * 0.45, 0), wrist + (0, palm * 0.8, 0)],
            np.array([0.15, 0.23, 0.24]) * wide,
            skin,
            up=(1, 0, 0),
            flat=0.4,
        )
        m.point("wrist", wrist, arm, arm + 1, cuff)
        open_hand = swing(r, fan, 7)
        curl = abs(swing(r, 0, 40))
        for k, name in enumerate(fingers):
            side = k - (count - 1) / 2 if name != "thumb" else -count / 2
            angle = 90 - side * open_hand - (0 if name != "thumb" else -32)
            root = wrist + (
                np.array([side * 0.125 * wide, palm * long * (1 - 0.02 * side**2), 0])
                if name != "thumb"
                else np.array([-0.17 * wide, palm * 0.35, 0.05])
            )
            bend = np.deg2rad(curl * r.uniform(0.3, 1.0) * (0.6 if name == "thumb" else 1))
            turn, place, ids = swing(r, 0, 4), root, []
            places = [root]
            for share, more in ((0.45, 0.5), (0.31, 1.0), (0.24, 1.5)):
                step = lengths[k] * long * share
                flat = towards(angle + turn)
                place = place + step * (np.cos(bend * more) * flat + np.array([0, 0, np.sin(bend * more)]))
                places.append(place)
            for low, high, size in zip(places, places[1:], (1.0, 0.9, 0.8), strict=False):
                ids.append(
                    m.tube(
                        [low, high],
                        [thick * size * wide, thick * size * 0.92 * wide],
                        skin,
                        lift=0.02 + (0.05 if name == "thumb" else 0),
                    )
                )
            ids.append(m.ball(places[-1], thick * 0.55, nail, lift=0.08))
            m.point(f"{name}_{joints[0]}", places[0], ids[0], arm + 1)
            m.point(f"{name}_{joints[1]}", places[1], ids[0], ids[1])
            m.point(f"{name}_dip" if joints[0] == "mcp" else f"{name}_joint_2", places[2], ids[1], ids[2])
            m.point(f"{name}_{joints[2]}", places[3], ids[3], ids[2])
            m.link("wrist", *list(m.points)[-4:])
        return m

    return Template("hand", build, View((0.0, 180.0), 30.0, 0.0, 25.0, any_roll=0.35, roll_spread=25.0))


def crawler(rng: np.random.Generator) -> Template:
    """A mouse, lizard or frog from above: a body that bends, four legs, perhaps a long tail."""
    u = rng.uniform
    word = ("mouse", "lizard", "rodent", "frog", "animal from above")[int(rng.integers(5))]
    long, wide, neck, head, snout = u(0.5, 0.9), u(0.12, 0.26), u(0.1, 0.25), u(0.1, 0.19), u(0.1, 0.26)
    tail, thin, ear, leg, thick = u(0.2, 1.1), u(0.015, 0.05), u(0.04, 0.12), u(0.16, 0.5), u(0.03, 0.06)
    coat, head_paint, legs, ears = (
        sample_paint(rng, 0, 0.7),
        sample_paint(rng, int(rng.choice([0, 0, 2])), 0.2),
        Paint(int(rng.choice([0, 3]))),
        Paint(int(rng.choice([1, 2]))),
    )
    tail_paint, any_roll = sample_paint(rng, int(rng.choice([0, 3])), 0.4), float(rng.choice([0.2, 0.9]))

    def build(r: np.random.Generator) -> Model:
        m = Model()
        fat, size, curve = wide * vary(r, 1, 0.12), long * vary(r, 1, 0.1), swing(r, 0, 22)
        hips, way = np.array([0.0, -size / 2, 0.0]), 90 - curve / 2
        spine = [hips]
        for k in range(4):
            spine.append(spine[-1] + size / 4 * towards(way + curve * k / 4))
        front = way + curve
        skull = spine[-1] + neck * towards(front + swing(r, 0, 12))
        nod = front + swing(r, 0, 16)
        nose = skull + snout * vary(r, 1, 0.08) * towards(nod)
        limb = leg * vary(r, 1, 0.1)
        for end, at, turn in (("hind", 0, -55.0), ("front", 3, 25.0)):
            base_way = way + curve * at / 4
            for side, x in SIDES:
                root = spine[at] + x * fat * 0.6 * towards(base_way - 90) - (0, 0, fat * 0.3)
                out = base_way - x * (90 - turn + swing(r, 0, 22))
                knee = root + limb * 0.5 * towards(out)
                paw = knee + limb * 0.5 * towards(out + x * swing(r, 45, 20) * np.sign(turn))
                part = m.tube([root, knee, paw], [thick * 1.2, thick, thick * 0.6], legs, lift=-0.2)
                foot = m.ball(paw, thick * 0.9, legs, lift=-0.15)
                m.point(f"{side}_{end}_paw", paw, foot, part)
                m.link("body_center", f"{side}_{end}_paw")
        place, tail_way = hips - fat * 0.6 * towards(way), way + 180.0
        tail_points, bend = [place], swing(r, 0, 32)
        for _ in range(4):
            tail_way += bend
            place = place + tail / 4 * towards(tail_way)
            tail_points.append(place)
        tail_id = m.tube(tail_points, np.linspace(1.3, 0.5, 5) * thin, tail_paint, up=(1, 0, 0), lift=-0.1)
        body = m.tube(spine, np.array([0.85, 1.05, 1.0, 0.85, 0.7]) * fat, coat, up=(1, 0, 0), flat=0.8)
        head_id = m.tube(
            [spine[-1], skull, nose], np.array([0.95, 1.0, 0.25]) * head, head_paint, up=(1, 0, 0), flat=0.8, lift=0.05
        )
        for side, x in SIDES:
            root = skull + x * head * 0.85 * towards(nod - 90) - 0.2 * head * towards(nod)
            m.point(f"{side}_ear", root, m.ball(root, ear, ears, lift=0.1))
            eye = skull + x * head * 0.55 * towards(nod - 90) + 0.45 * snout * towards(nod)
            m.point(f"{side}_eye", eye, m.ball(eye, head * 0.14, Paint(5), lift=0.12))
        nose_id = m.ball(nose, head * 0.2, Paint(3), lift=0.1)
        for name, xyz, ids in (
            ("nose", nose, (nose_id, head_id)),
            ("neck", spine[-1], (head_id, body)),
            ("body_center", spine[2], (body,)),
            ("tail_base", tail_points[0], (body, tail_id)),
            ("tail_middle", tail_points[2], (tail_id,)),
            ("tail_tip", tail_points[-1], (tail_id,)),
        ):
            m.point(name, xyz, *ids)
        m.link("nose", "neck", "body_center", "tail_base", "tail_middle", "tail_tip")
        return m

    return Template(word, build, View((0.0,), 16.0, 0.0, 16.0, any_roll=any_roll, roll_spread=20.0))
