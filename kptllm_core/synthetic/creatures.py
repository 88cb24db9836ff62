"""Birds and fish from the side, and random trees of limbs that resemble nothing; frames as in `figures`."""

from __future__ import annotations

import numpy as np

from kptllm_core.synthetic.figures import SIDES, sample_paint, swing, towards, vary
from kptllm_core.synthetic.solids import Model, Paint, Template, View


def bird(rng: np.random.Generator) -> Template:
    """A bird from the side, standing or swimming, wing folded."""
    u = rng.uniform
    plump, neck, neck_up, head, beak, leg, tail, wing = (
        u(0.2, 0.36),
        u(0.1, 0.6),
        u(30, 85),
        u(0.1, 0.19),
        u(0.08, 0.4),
        u(0.15, 0.7),
        u(0.2, 0.7),
        u(0.5, 0.85),
    )
    body_paint, head_paint, wing_paint, tail_paint = (
        sample_paint(rng, 0),
        sample_paint(rng, int(rng.choice([0, 2])), 0.4),
        sample_paint(rng, 1),
        sample_paint(rng, 3, 0.4),
    )
    tail_up, crest = u(-30, 25), rng.random() < 0.3

    def build(r: np.random.Generator) -> Model:
        m = Model()
        fat, pitch = plump * vary(r, 1, 0.1), swing(r, 18, 12)
        half = 0.36 * towards(pitch)
        body = m.tube([-half, half * 0.1, half], np.array([0.55, 1.0, 0.75]) * fat, body_paint)
        base = -half * 1.25
        tip = base - tail * vary(r, 1, 0.12) * towards(pitch + swing(r, -tail_up, 10))
        tail_id = m.tube([base, tip], [fat * 0.35, fat * 0.3], tail_paint, flat=1.6, lift=-0.03)
        start = half * 1.15
        skull = start + neck * vary(r, 1, 0.12) * towards(swing(r, neck_up, 14)) + (0.02, fat * 0.5, 0)
        m.tube([start, (start + skull) / 2, skull], [fat * 0.65, head * 0.8, head * 0.7], head_paint)
        look_down = swing(r, -6, 14)
        head_id = m.ball(skull, head, head_paint, lift=0.02)
        point = skull + (head * 0.8 + beak * vary(r, 1, 0.1)) * towards(look_down)
        beak_id = m.tube(
            [skull + head * 0.75 * towards(look_down), point], [head * 0.42, head * 0.08], Paint(4), lift=0.03
        )
        eye = skull + head * 0.38 * towards(look_down + 45)
        eye_id = m.ball(eye, head * 0.2, Paint(5), lift=0.3)
        for name, xyz, ids in (
            ("beak_tip", point, (beak_id,)),
            ("eye", eye, (eye_id,)),
            ("head_top", skull + head * 0.85 * towards(look_down + 90), (head_id,)),
            ("nape", skull + head * 0.85 * towards(look_down + 170), (head_id,)),
            ("breast", half * 0.9 + fat * 0.6 * towards(pitch - 60), (body,)),
            ("back", half * 0.1 + fat * 0.85 * towards(pitch + 90), (body,)),
            ("belly", half * 0.1 - fat * 0.85 * towards(pitch + 90), (body,)),
            ("tail_base", base, (tail_id, body)),
            ("tail_tip", tip, (tail_id,)),
        ):
            m.point(name, xyz, *ids)
        if crest:
            top = skull + head * 1.9 * towards(look_down + swing(r, 120, 8))
            m.point(
                "crest_tip",
                top,
                m.tube([skull + head * 0.8 * towards(look_down + 100), top], [head * 0.35, 0.015], Paint(4)),
            )
        droop, length = swing(r, 0, 10), wing * vary(r, 1, 0.1)
        for side, z in SIDES:
            root = half * 0.55 + np.array([0, fat * 0.3, z * fat * 0.85])
            end = root - length * towards(pitch + droop) + np.array([0, 0, z * 0.03])
            wing_id = m.tube(
                [root, (root + end) / 2, end], np.array([0.5, 0.62, 0.12]) * fat, wing_paint, flat=0.3, lift=0.05 * z
            )
            m.point(f"{side}_wing_root", root, wing_id)
            m.point(f"{side}_wing_tip", end, wing_id)
            hip = np.array([0.0, -fat * 0.7, z * fat * 0.4])
            knee = hip + leg * 0.4 * vary(r, 1, 0.1) * towards(swing(r, -100, 14))
            foot = knee + leg * 0.6 * towards(swing(r, -84, 14))
            leg_id = m.tube([hip, knee, foot], [0.035, 0.022, 0.02], Paint(4), lift=0.02 * z - 0.05)
            toe = m.tube([foot, foot + (0.09, -0.015, 0)], 0.02, Paint(4), lift=0.02 * z - 0.04)
            m.point(f"{side}_knee", knee, leg_id)
            m.point(f"{side}_foot", foot, leg_id, toe)
            m.link(f"{side}_wing_root", f"{side}_wing_tip")
            m.link("belly", f"{side}_knee", f"{side}_foot")
        m.link("beak_tip", "eye", "nape", "back", "tail_base", "tail_tip")
        return m

    return Template("bird", build, View((0.0, 180.0), 30.0, 3.0, 10.0, any_roll=0.12))


def fish(rng: np.random.Generator) -> Template:
    """A fish from the side."""
    u = rng.uniform
    deep, deep_at, tail, fork, fin, fin_at, slim = (
        u(0.12, 0.36),
        u(0.35, 0.6),
        u(0.16, 0.36),
        u(0.0, 0.7),
        u(0.06, 0.28),
        u(0.3, 0.6),
        u(0.03, 0.07),
    )
    body_paint, fin_paint = sample_paint(rng, 0, 0.95), Paint(int(rng.choice([1, 2, 4])))

    def build(r: np.random.Generator) -> Model:
        m = Model()
        t = np.linspace(0, 1, 9)
        bend = swing(r, 0, 0.16)
        spine = np.stack([0.6 - 1.2 * t, bend * (t - 0.4) ** 2, 0.15 * swing(r, 0, 1) * (t - 0.4) ** 2], 1)
        height = deep * vary(r, 1, 0.1)
        radii = np.interp(
            t, [0, deep_at * 0.4, deep_at, 0.85, 1], np.array([0.25, 0.8, 1.0, 0.4, slim / height]) * height
        )
        edge = lambda i, up: spine[i] + np.array([0, up * radii[i], 0])  # noqa: E731
        back_fin, rear = int(fin_at * 8), min(int(fin_at * 8) + 2, 7)
        crest = edge(back_fin, 0.9) + np.array([-0.1, fin * vary(r, 1, 0.15), 0])
        dorsal = m.plate([edge(back_fin - 1, 0.7), crest, edge(rear, 0.9), edge(rear, 0.3)], fin_paint, lift=-0.3)
        belly = edge(6, -0.8) + np.array([-0.08, -fin * 0.8 * vary(r, 1, 0.15), 0])
        anal = m.plate([edge(5, -0.6), belly, edge(7, -0.8), edge(7, 0.0)], fin_paint, lift=-0.3)
        end, spread = spine[-1], tail * vary(r, 1, 0.12)
        upper, lower = end + spread * towards(swing(r, 140, 6)), end + spread * towards(swing(r, 220, 6))
        notch = (upper + lower) / 2 * (1 - fork) + end * fork
        caudal = m.plate([end + (0.08, slim, 0), upper, notch, lower, end + (0.08, -slim, 0)], fin_paint, lift=-0.3)
        body = m.tube(spine, radii, body_paint, flat=0.4)
        eye = spine[1] + np.array([0.02, radii[1] * 0.35, 0])
        m.ball(eye, height * 0.17, Paint(4), lift=0.4)
        eye_id = m.ball(eye, height * 0.1, Paint(5), lift=0.5)
        root = spine[3] - (0, radii[3] * 0.3, 0)
        flap = root + fin * 0.9 * towards(swing(r, 200, 20))
        side = m.plate(
            [root + (0.04, 0.03, 0), flap + (0, 0.05, 0), flap, root - (0, 0.05, 0)], Paint(fin_paint.colour), lift=0.35
        )
        for name, xyz, part in (
            ("mouth", spine[0] + (radii[0] * 0.8, 0, 0), body),
            ("eye", eye, eye_id),
            ("gill", spine[2], body),
            ("dorsal_fin_base", edge(back_fin - 1, 0.9), body),
            ("dorsal_fin_tip", crest, dorsal),
            ("pectoral_fin_tip", flap, side),
            ("anal_fin_tip", belly, anal),
            ("tail_base", end, body),
            ("tail_fin_upper_tip", upper, caudal),
            ("tail_fin_lower_tip", lower, caudal),
            ("tail_fin_middle", notch, caudal),
        ):
            m.point(name, xyz, part)
        m.link("mouth", "eye", "gill", "tail_base", "tail_fin_upper_tip")
        m.link("tail_base", "tail_fin_lower_tip")
        m.link("dorsal_fin_base", "dorsal_fin_tip")
        return m

    return Template("fish", build, View((0.0, 180.0), 28.0, 0.0, 12.0, roll_spread=18.0, any_roll=0.25))


def limbs(rng: np.random.Generator) -> Template:
    """A random tree of limbs on a body, some in symmetric pairs: creatures, plants and machines that nobody has seen."""
    count, paired = int(rng.integers(3, 9)), rng.random() < 0.4
    word, part, end = (
        ("creature", "arm", "tip"),
        ("plant", "branch", "tip"),
        ("machine", "arm", "end"),
        ("creature", "leg", "foot"),
        ("starfish", "arm", "tip"),
    )[int(rng.integers(5))]
    length, width = rng.uniform(0.15, 0.5), rng.uniform(0.1, 0.3)
    body_paint, head = sample_paint(rng, 0, 0.9), rng.random() < 0.6
    angles = (
        np.sort(rng.permutation(12)[:count] * 30.0 + rng.uniform(-9, 9, count))
        if not paired
        else np.linspace(35, 150, (count + 1) // 2)
    )
    chains = []
    for angle in angles:
        bones = int(rng.integers(1, 4))
        paint = sample_paint(rng, int(rng.integers(0, 6)), 0.7)
        chains.append(
            (
                angle,
                rng.uniform(0.2, 0.6, bones),
                np.cumsum(rng.uniform(-50, 50, bones)) * (np.arange(bones) > 0),
                rng.uniform(0.03, 0.09),
                paint,
                rng.random() < 0.5,
                int(rng.integers(6)),
            )
        )
    joints = ("joint", "elbow", "knee", "node")[int(rng.integers(4))]
    stiff = rng.uniform(3, 16)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        fat = vary(r, width, 0.12)
        top = np.array([0, length * vary(r, 1, 0.12), 0])
        body = m.tube([-top, top * 0.0, top], np.array([0.8, 1.0, 0.9]) * fat, body_paint, up=(1, 0, 0))
        m.point("body_center", [0, 0, 0], body)
        m.point("body_top", top, body)
        m.point("body_bottom", -top, body)
        m.link("body_top", "body_center", "body_bottom")
        if head:
            skull = top + (0, fat * 1.1, 0)
            m.point("head", skull, m.ball(skull, fat * 0.8, Paint(2), lift=0.1))
            m.ball(skull + (0.3 * fat, 0.2 * fat, 0), fat * 0.18, Paint(5), lift=0.2)
        for number, (angle, bones, bends, thick, paint, knob, knob_colour) in enumerate(chains, 1):
            lengths = bones * np.exp(np.clip(r.normal(0, 0.12, len(bones)), -0.25, 0.25))
            for side, sign in (("left_", -1.0), ("right_", 1.0)) if paired else (("", 1.0),):
                way = np.deg2rad(angle + swing(r, 0, stiff))
                place = np.array([np.sin(way) * fat * 0.8 * sign, np.cos(way) * (length * 0.8 + fat * 0.5), 0])
                name = f"{side}{part}_{number}"
                previous, tube_id = f"{name}_base", body
                base = place
                ids = []
                for k, (bone, bend) in enumerate(zip(lengths, bends, strict=True)):
                    turn = np.deg2rad(angle + bend + swing(r, 0, stiff * (1 + k)))
                    after = place + bone * np.array([np.sin(turn) * sign, np.cos(turn), swing(r, 0, 0.12)])
                    tube_id = m.tube(
                        [place, after],
                        np.array([1.0, 0.8]) * thick * 0.85**k,
                        paint,
                        up=(sign, 0.3, 0),
                        lift=-0.05 + 0.002 * k,
                    )
                    ids.append(tube_id)
                    if k == 0:
                        m.point(previous, base, tube_id, body)
                    last = k == len(lengths) - 1
                    title = (
                        f"{name}_{end}"
                        if last
                        else f"{name}_{joints}"
                        if len(lengths) == 2
                        else f"{name}_{joints}_{k + 1}"
                    )
                    m.point(title, after, tube_id)
                    m.link(previous, title)
                    place, previous = after, title
                if knob:
                    knob_id = m.ball(place, thick * 1.5, Paint(knob_colour), lift=0.01)
                    m.points[previous] = (place, (knob_id, tube_id))
                for title, later in zip(
                    [n for n in m.points if n.startswith(f"{name}_{joints}")], ids[1:], strict=False
                ):
                    m.points[title] = (m.points[title][0], (*m.points[title][1], later))
        return m

    turns = rng.random() < 0.4
    return Template(word, build, View((0.0,), 28.0, 0.0, 22.0, any_roll=0.6 if turns else 0.12, roll_spread=15.0))
