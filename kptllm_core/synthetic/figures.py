"""Articulated figures with the proportions of their own: four-legged animals from the side, people from the front.

Each function draws a category's proportions from its generator and returns a Template whose `build` poses one instance.
Side view frame: the animal looks towards +x, its right side is +z. Front view frame: it looks towards +z, its left is +x.
"""

from __future__ import annotations

import numpy as np

from kptllm_core.synthetic.solids import Mark, Model, Paint, Template, View

SIDES = (("left", -1.0), ("right", 1.0))


def vary(rng: np.random.Generator, value: float, amount: float = 0.1) -> float:
    """The value of one instance: log-normal around the category's, at most two deviations off."""
    return float(value * np.exp(np.clip(rng.normal(0, amount), -2 * amount, 2 * amount)))


def swing(rng: np.random.Generator, degrees: float, spread: float) -> float:
    """An angle of one instance."""
    return float(degrees + np.clip(rng.normal(0, spread), -2 * spread, 2 * spread))


def towards(degrees: float, side: float = 0.0) -> np.ndarray:
    """Unit-length step in the x-y plane, 0° along x, 90° up, leaning `side` out of it."""
    angle = np.deg2rad(degrees)
    return np.array([np.cos(angle), np.sin(angle), side])


def sample_paint(rng: np.random.Generator, colour: int, busy: float = 0.7) -> Paint:
    """A colour and, with probability `busy`, markings."""
    marks: list[Mark] = []
    other = colour + int(rng.integers(1, 4))
    if rng.random() < busy:
        kind = rng.integers(4)
        if kind == 0:
            marks = [
                Mark("stripe", float(t), 0, float(rng.uniform(0.02, 0.07)), other)
                for t in rng.uniform(0.08, 0.95, int(rng.integers(1, 7)))
            ]
        elif kind == 1:
            spots = int(rng.integers(2, 9))
            marks = [
                Mark(
                    "spot",
                    float(rng.uniform(0.08, 0.92)),
                    float(rng.uniform(-0.6, 0.7)),
                    float(rng.uniform(0.15, 0.4)),
                    other,
                )
                for _ in range(spots)
            ]
        elif kind == 2:
            marks = [Mark("stripe", float(rng.choice([0.12, 0.88])), 0, 0.12, other)]
        else:
            marks = [Mark("belly", 0, float(rng.uniform(-0.6, 0.1)), 0, other)]
    return Paint(colour, tuple(marks))


def quadruped(rng: np.random.Generator) -> Template:
    """A four-legged animal from the side."""
    u = rng.uniform
    chest, waist, rump = u(0.16, 0.34), u(0.12, 0.3), u(0.15, 0.32)
    leg, thick, neck, neck_up, head, snout = (
        u(0.35, 1.15),
        u(0.035, 0.09),
        u(0.12, 0.7),
        u(5, 75),
        u(0.14, 0.3),
        u(0.4, 0.75),
    )
    tail, tail_up, ear, floppy, horn = u(0.1, 0.9), u(-70, 50), u(0.08, 0.3), rng.random() < 0.4, rng.random() < 0.25
    knee, foot = (("knee", "hoof"), ("knee", "paw"), ("elbow", "foot"), ("knee", "foot"))[int(rng.integers(4))]
    hind = ("hind", "back")[int(rng.integers(2))]
    body_paint, head_paint = sample_paint(rng, 0), sample_paint(rng, int(rng.choice([0, 0, 2])), 0.4)
    leg_paints = {
        "front": sample_paint(rng, int(rng.choice([0, 0, 1, 2])), 0.5),
        hind: sample_paint(rng, int(rng.choice([0, 0, 1, 2])), 0.5),
    }
    foot_paint, tail_paint, ear_paint, eye_paint = (
        Paint(3),
        sample_paint(rng, int(rng.choice([0, 4])), 0.5),
        Paint(int(rng.choice([0, 4]))),
        Paint(5),
    )
    word = ("four-legged animal", "quadruped", "animal")[int(rng.integers(3))]

    def build(r: np.random.Generator) -> Model:
        m = Model()
        fat, long = vary(r, 1, 0.1), vary(r, 1, 0.08)
        back = (
            np.array([-0.5 * long, vary(r, 0.03, 0.5), 0]),
            np.array([0.0, -0.02, 0]),
            np.array([0.5 * long, 0.02, 0]),
        )
        bend = swing(r, 0, 0.05)
        spine = [back[0], back[1] + (0, bend, 0), back[2]]
        body = m.tube(spine, np.array([rump, waist, chest]) * fat, body_paint, flat=0.8)
        m.point("withers", back[2] + (-0.05, chest * fat * 0.85, 0), body)
        m.point("back_middle", spine[1] + (0, waist * fat * 0.85, 0), body)
        m.point("belly_middle", spine[1] - (0, waist * fat * 0.85, 0), body)
        base = back[0] + np.array([-rump * fat * 0.85, rump * fat * 0.35, 0])
        wag = swing(r, tail_up, 30)
        step = tail * vary(r, 1, 0.15) / 2
        middle = base + step * towards(180 - wag, swing(r, 0, 0.3))
        tip = middle + step * towards(180 - wag + swing(r, 20, 30), swing(r, 0, 0.3))
        tail_id = m.tube([base, middle, tip], np.array([1.0, 0.8, 0.5]) * thick * 0.7, tail_paint, lift=-0.02)
        m.point("tail_base", base, body, tail_id)
        m.point("tail_tip", tip, tail_id)
        m.link("withers", "back_middle", "tail_base", "tail_tip")
        length, lean = leg * vary(r, 1, 0.12), thick * vary(r, 1, 0.12)
        for end, root, radius, bow in (("front", spine[2], chest, -12.0), (hind, spine[0], rump, 22.0)):
            low = length * (0.52 if end == "front" else 0.5)
            for side, z in SIDES:
                hip = root + np.array([0.0, -radius * fat * 0.35, z * radius * fat * 0.62])
                first = swing(r, -90 + (6 if end == "front" else 12), 17)
                second = first - abs(swing(r, bow, 14)) * np.sign(bow) * (-1 if end == "front" else 1)
                joint = hip + (low + radius * 0.3) * towards(first, z * 0.05)
                down = joint + (length - low) * towards(second, z * 0.02)
                upper = m.tube(
                    [hip, (hip + joint) / 2, joint], [lean * 2.2, lean * 1.6, lean], leg_paints[end], lift=z * 0.01
                )
                lower = m.tube(
                    [joint, down],
                    [lean, lean * 0.75],
                    Paint(leg_paints[end].colour, leg_paints[end].marks),
                    lift=z * 0.01,
                )
                toe = m.tube(
                    [down, down + np.array([lean * 1.1, -lean * 0.3, 0])], lean, foot_paint, lift=z * 0.01 + 0.005
                )
                m.point(
                    f"{side}_{end}_shoulder" if end == "front" else f"{side}_hip",
                    hip,
                    upper,
                    *([body] if z == 0 else []),
                )
                m.point(f"{side}_{end}_{knee}", joint, upper, lower)
                m.point(f"{side}_{end}_{foot}", down, lower, toe)
                m.link(
                    f"{side}_{end}_shoulder" if end == "front" else f"{side}_hip",
                    f"{side}_{end}_{knee}",
                    f"{side}_{end}_{foot}",
                )
        up = swing(r, neck_up, 18)
        start = spine[2] + np.array([chest * 0.5, chest * 0.35, 0]) * fat
        poll = start + neck * vary(r, 1, 0.12) * towards(up, swing(r, 0, 0.08)) + (0.05, 0.05, 0)
        neck_id = m.tube(
            [start, (start + poll) / 2, poll], [chest * 0.7 * fat, chest * 0.5 * fat + 0.03, head * 0.55], head_paint
        )
        nod = swing(r, -25, 16)
        skull, mouth = poll, poll + head * 1.5 * vary(r, 1, 0.1) * towards(nod, swing(r, 0, 0.12))
        head_id = m.tube(
            [skull, (skull + mouth) / 2, mouth],
            np.array([0.62, 0.5, 0.5 * snout]) * head,
            head_paint,
            flat=0.8,
            lift=0.03,
        )
        nose = m.ball(mouth + 0.3 * snout * head * towards(nod + 20), head * 0.16, Paint(3), lift=0.06)
        m.point("nose", mouth + 0.3 * snout * head * towards(nod + 20), nose)
        m.point("neck_base", start, neck_id)
        m.link("nose", "neck_base", "withers")
        for side, z in SIDES:
            eye = skull + 0.45 * (mouth - skull) + head * 0.22 * towards(nod + 90) + np.array([0, 0, z * head * 0.45])
            eye_id = m.ball(eye, head * 0.11, eye_paint, lift=0.04 if z > 0 else 0.02)
            m.point(f"{side}_eye", eye, eye_id)
            root = skull + head * 0.45 * towards(nod + 110) + np.array([0, 0, z * head * 0.4])
            way = towards(swing(r, nod + (230 if floppy else 115), 12), z * 0.45)
            ear_id = m.tube(
                [root, root + way * ear * 0.5, root + way * ear],
                [ear * 0.18, ear * 0.3, ear * 0.08],
                ear_paint,
                lift=0.04,
            )
            m.point(f"{side}_ear_base", root, ear_id, head_id)
            m.point(f"{side}_ear_tip", root + way * ear, ear_id)
            if horn:
                way = towards(swing(r, nod + 95, 5), z * 0.5) * ear * 1.3
                horn_id = m.tube([root, root + way], [0.03, 0.012], Paint(4), lift=0.03)
                m.point(f"{side}_horn_tip", root + way, horn_id)
        return m

    return Template(word, build, View((0.0, 180.0), 38.0, 5.0, 12.0, any_roll=0.12))


def person(rng: np.random.Generator) -> Template:
    """A figure on two legs, from the front or from behind."""
    u = rng.uniform
    torso, shoulder, hip, arm, leg = u(0.5, 0.75), u(0.18, 0.32), u(0.11, 0.24), u(0.5, 0.85), u(0.55, 1.0)
    thick, head, wide = u(0.04, 0.085), u(0.11, 0.26), u(0.85, 1.3)
    shirt, trousers, sleeve, hair = (
        sample_paint(rng, 0),
        sample_paint(rng, 2, 0.4),
        sample_paint(rng, int(rng.choice([0, 4])), 0.4),
        Paint(1),
    )
    skin, shoe, long_hair, spread = Paint(4), Paint(3), rng.random() < 0.4, u(0, 40)
    tip = ("hand", "wrist")[int(rng.integers(2))], ("foot", "ankle")[int(rng.integers(2))]

    def build(r: np.random.Generator) -> Model:
        m, thighs = Model(), []
        size, fat = vary(r, 1, 0.08), vary(r, wide, 0.12)
        lean = swing(r, 90, 9)
        pelvis = np.zeros(3)
        neck = torso * size * towards(lean, swing(r, 0, 0.1))
        across = towards(lean - 90)
        chest = neck - min(shoulder * 0.75 * fat, torso * 0.6) * towards(lean)  # its round end reaches up to the neck
        radii = np.array([hip, (hip + shoulder) * 0.42, shoulder * 0.8]) * fat
        body = m.tube([pelvis, (pelvis + chest) / 2, chest], radii, shirt, up=tuple(across), flat=0.6)
        m.tube(
            [neck * 0.92 - across * shoulder * fat * 0.8, neck * 0.92 + across * shoulder * fat * 0.8],
            thick * 1.4,
            shirt,
            lift=-0.01,
        )
        m.point("neck", neck, body, body + 1, body + 2)
        m.point("pelvis", pelvis, body)
        m.tube([neck * 0.85, neck * 1.12], thick * 1.1, skin)
        tilt = swing(r, lean, 12)
        skull = neck + head * 1.25 * towards(tilt)
        h = head * vary(r, 1, 0.06)
        face_side = towards(tilt - 90)
        if long_hair:
            m.tube([skull + h * 0.2 * towards(tilt), skull - h * 1.3 * towards(tilt)], [h * 1.1, h], hair, lift=-0.1)
        scalp = m.tube([skull, skull + h * 0.3 * towards(tilt) + (0, 0, -0.1 * h)], h, hair, lift=-0.02)
        head_id = m.tube(
            [skull - h * 0.2 * towards(tilt) + (0, 0, h * 0.25), skull + h * 0.05 * towards(tilt) + (0, 0, h * 0.25)],
            [h * 0.75, h * 0.82],
            skin,
        )
        m.point("head_top", skull + h * 1.1 * towards(tilt), scalp)
        nose = skull - h * 0.2 * towards(tilt) + (0, 0, h * 1.1)
        m.point("nose", nose, m.ball(nose, h * 0.14, skin, lift=0.01), head_id)
        m.point("chin", skull - h * 0.85 * towards(tilt) + (0, 0, h * 0.3), head_id)
        for side, x in (("left", 1.0), ("right", -1.0)):
            eye = skull + face_side * x * h * 0.36 + h * 0.08 * towards(tilt) + (0, 0, h * 0.85)
            m.point(f"{side}_eye", eye, m.ball(eye, h * 0.12, Paint(5)))
            ear = skull + face_side * x * h * 0.95
            m.point(f"{side}_ear", ear, m.ball(ear, h * 0.2, skin, lift=-0.01), head_id)
            root = neck * 0.92 + across * x * shoulder * fat
            first = swing(r, -90 + x * spread, 40)
            bend = x * abs(swing(r, 25, 45))
            half = arm * size / 2
            elbow = root + half * towards(first, swing(r, 0.1, 0.25))
            hand = elbow + half * towards(first + bend, abs(swing(r, 0.1, 0.3)))
            upper = m.tube([root, elbow], np.array([1.25, 1.0]) * thick * fat, sleeve, up=(0, 0, 1), lift=0.02)
            lower = m.tube([elbow, hand], np.array([0.95, 0.7]) * thick * fat, skin, lift=0.03)
            palm = m.ball(hand, thick * 1.05, skin, lift=0.04)
            m.point(f"{side}_shoulder", root, upper, body)
            m.point(f"{side}_elbow", elbow, upper, lower)
            m.point(f"{side}_{tip[0]}", hand, palm, lower)
            m.link("neck", f"{side}_shoulder", f"{side}_elbow", f"{side}_{tip[0]}")
            joint = pelvis + across * x * hip * fat * 0.75
            first = swing(r, -90 + x * 8, 20)
            knee = joint + leg * size / 2 * towards(first, swing(r, 0.1, 0.2))
            ankle = knee + leg * size / 2 * towards(swing(r, first * 0.6 - 36, 15), -abs(swing(r, 0, 0.2)))
            upper = m.tube([joint, knee], np.array([1.7, 1.2]) * thick * fat, trousers, up=(0, 0, 1), lift=-0.02)
            thighs.append(upper)
            lower = m.tube([knee, ankle], np.array([1.2, 0.8]) * thick * fat, trousers, up=(0, 0, 1), lift=-0.01)
            toe = m.tube([ankle, ankle + (x * thick * 0.5, -thick * 0.6, thick * 1.8)], thick * 0.95, shoe)
            m.point(f"{side}_hip", joint, upper, body)
            m.point(f"{side}_knee", knee, upper, lower)
            m.point(f"{side}_{tip[1]}", ankle, lower, toe)
            m.link("pelvis", f"{side}_hip", f"{side}_knee", f"{side}_{tip[1]}")
        m.points["pelvis"] = (pelvis, (body, *thighs))
        m.link("head_top", "neck", "pelvis")
        m.link("left_eye", "nose", "right_eye")
        return m

    yaws = ((0.0,), (0.0, 0.0, 180.0))[int(rng.integers(2))]
    return Template(
        ("person", "figure", "doll", "robot")[int(rng.integers(4))], build, View(yaws, 40.0, 2.0, 12.0, any_roll=0.12)
    )
