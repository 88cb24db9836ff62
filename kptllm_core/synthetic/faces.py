"""Faces and mouths from the front. They look towards +z, so their left is +x."""

from __future__ import annotations

import numpy as np

from kptllm_core.synthetic.contours import flat, oval, spline
from kptllm_core.synthetic.figures import sample_paint, swing, vary
from kptllm_core.synthetic.solids import Detail, Model, Paint, Plate, Template, View


def face(rng: np.random.Generator) -> Template:
    """A face from the front: a person's, an animal's or a mask's."""
    u = rng.uniform
    long, jaw, eye_y, eye_x, eye, nose, mouth_y, mouth = (
        u(0.9, 1.35),
        u(0.55, 1.0),
        u(0.05, 0.3),
        u(0.28, 0.45),
        u(0.07, 0.16),
        u(0.08, 0.22),
        u(-0.6, -0.4),
        u(0.2, 0.42),
    )
    ears, brows, hair, dense = int(rng.integers(3)), rng.random() < 0.7, rng.random() < 0.6, rng.random() < 0.4
    skin, ear_size, cheeks = sample_paint(rng, 0, 0.0), u(0.12, 0.35), rng.random() < 0.3
    word = ("face", "face", "mask", "animal face")[int(rng.integers(4))]

    def build(r: np.random.Generator) -> Model:
        m = Model()
        wide, tall = vary(r, 0.75, 0.08), long * vary(r, 1, 0.06)
        t = np.linspace(0, 2 * np.pi, 25)[:-1]
        narrow = np.where(np.sin(t) < 0, 1 - (1 - jaw) * np.sin(t) ** 2, 1.0)
        depth = -0.35 * np.ones(24)
        skull = np.stack([np.cos(t) * wide * narrow, np.sin(t) * tall, depth], 1)
        if ears:
            for side, x in (("left", 1.0), ("right", -1.0)):
                root = np.array([x * wide * (0.95 if ears == 1 else 0.6), 0.0 if ears == 1 else tall * 0.75, -0.4])
                tip = root + ear_size * vary(r, 1, 0.1) * np.array([x * 1.0, 0.25 if ears == 1 else 2.0, 0])
                ear_id = m.tube([root, tip], [ear_size * 0.8, ear_size * (0.6 if ears == 1 else 0.15)], skin, lift=-0.3)
                m.point(f"{side}_ear_tip" if ears == 2 else f"{side}_ear", tip, ear_id)
        plate = m.plate(skull, skin)
        head = m.parts[plate]
        assert isinstance(head, Plate)
        if hair:
            top = skull[(np.sin(t) > 0.45)]
            head.details.append(Detail(np.concatenate([top, top[::-1] * (0.8, 0.35, 1) + (0, tall * 0.35, 0)]), 2))
        m.point("chin", skull[18], plate)
        m.point("forehead_top", skull[6], plate)
        if dense:
            for number, index in enumerate((14, 15, 16, 17), 1):
                m.point(f"right_jaw_{number}", skull[index], plate)
                m.point(f"left_jaw_{number}", skull[36 - index if index > 12 else 12], plate)
            m.link("chin", *(f"left_jaw_{k}" for k in (4, 3, 2, 1)))
            m.link("chin", *(f"right_jaw_{k}" for k in (4, 3, 2, 1)))
        spread, size, opened = eye_x * vary(r, 1, 0.06), eye * vary(r, 1, 0.1), abs(vary(r, 0.55, 0.25))
        gaze, brow_up = r.normal(0, 0.25), swing(r, 0, 0.03)
        for side, x in (("left", 1.0), ("right", -1.0)):
            centre = (x * spread, eye_y * tall)
            z = np.array([0, 0, -0.12])
            eye_id = m.plate(
                oval(centre, size, size * opened) + z,
                Paint(4),
                details=[
                    Detail(oval((centre[0] + gaze * size * 0.6, centre[1]), size * 0.45, size * opened * 0.85) + z, 5)
                ],
                lift=0.2,
            )
            m.point(f"{side}_eye_outer_corner", flat(centre[0] + x * size, centre[1]) + z, eye_id, plate)
            m.point(f"{side}_eye_inner_corner", flat(centre[0] - x * size, centre[1]) + z, eye_id, plate)
            m.point(f"{side}_eye_center", flat(*centre) + z, eye_id)
            m.link(f"{side}_eye_inner_corner", f"{side}_eye_outer_corner")
            if brows:
                y = centre[1] + size * 1.5 + brow_up
                arc = (
                    spline(
                        np.stack(
                            [
                                flat(centre[0] - x * size * 1.1, y - 0.02),
                                flat(centre[0], y + 0.03),
                                flat(centre[0] + x * size * 1.3, y - 0.03),
                            ]
                        ),
                        closed=False,
                    )
                    + z
                )
                brow_id = m.tube(arc, 0.025, Paint(2), lift=0.2)
                m.point(f"{side}_eyebrow_inner_end", arc[0], brow_id)
                m.point(f"{side}_eyebrow_outer_end", arc[-1], brow_id)
            if cheeks:
                m.plate(oval((x * wide * 0.6, mouth_y * tall * 0.45), 0.1, 0.08) + z, Paint(3), lift=0.1)
                m.point(f"{side}_cheek", flat(x * wide * 0.6, mouth_y * tall * 0.45) + z, len(m.parts) - 1)
        tip = np.array([0, -0.12 * tall, 0.12])
        nose_id = m.tube(
            [[0, eye_y * tall * 0.8, -0.08], tip],
            [nose * 0.35, nose * 0.8],
            Paint(0 if word == "face" else 3),
            up=(1, 0, 0),
            lift=0.25,
        )
        m.point("nose_tip", tip, nose_id)
        m.point("nose_bridge", [0, eye_y * tall * 0.8, -0.08], nose_id)
        half, gap, smile = mouth * vary(r, 1, 0.12), abs(r.normal(0, 0.06)), swing(r, 0.02, 0.05)
        y = mouth_y * tall
        left, right = np.array([half, y + smile, -0.14]), np.array([-half, y + smile, -0.14])
        top, low = np.array([0, y + 0.06 + gap * 0.3, -0.08]), np.array([0, y - 0.08 - gap, -0.1])
        lips_id = m.plate(
            spline(np.stack([left, top, right, low])),
            Paint(1),
            lift=0.2,
            details=[Detail(spline(np.stack([left, top - (0, 0.05, 0), right, low + (0, 0.06, 0)])), 5)],
        )
        for name, xyz in (
            ("left_mouth_corner", left),
            ("right_mouth_corner", right),
            ("upper_lip_middle", top),
            ("lower_lip_middle", low),
        ):
            m.point(name, xyz, lips_id, plate)
        m.link("left_mouth_corner", "upper_lip_middle", "right_mouth_corner", "lower_lip_middle", "left_mouth_corner")
        return m

    return Template(word, build, View((0.0,), 32.0, 0.0, 20.0, any_roll=0.12, roll_spread=14.0))


def lips(rng: np.random.Generator) -> Template:
    """A mouth close up, open or shut."""
    wide, upper, lower, teeth = (
        rng.uniform(0.8, 1.1),
        rng.uniform(0.1, 0.22),
        rng.uniform(0.12, 0.28),
        rng.random() < 0.5,
    )
    skin, red = Paint(2), Paint(0)

    def build(r: np.random.Generator) -> Model:
        m = Model()
        half, gap, smile = wide * vary(r, 1, 0.1) / 2, abs(r.normal(0, 0.12)), swing(r, 0, 0.05)
        top, low = upper * vary(r, 1, 0.12), lower * vary(r, 1, 0.12)
        corner = {"left": flat(half, smile), "right": flat(-half, smile)}
        x = half * 0.3
        outer = [
            corner["right"],
            flat(-x, gap + top),
            flat(0, gap + top * 0.8),
            flat(x, gap + top),
            corner["left"],
            flat(x, -gap - low),
            flat(-x, -gap - low),
        ]
        inner = [
            corner["right"] * 0.85,
            flat(-x, gap),
            flat(0, gap),
            flat(x, gap),
            corner["left"] * 0.85,
            flat(x, -gap),
            flat(0, -gap),
            flat(-x, -gap),
        ]
        details = [Detail(spline(np.stack(inner)), 5)]
        if teeth and gap > 0.06:
            details.append(Detail(flat([-x, x, x, -x], [gap, gap, gap * 0.5, gap * 0.5]), 4))
        m.plate(oval((0, 0), half * 1.5, half * 1.1), skin, lift=-0.1)
        m.plate(spline(np.stack(outer)), red, details=details)
        for name, xyz in (
            ("right_mouth_corner", corner["right"]),
            ("left_mouth_corner", corner["left"]),
            ("upper_lip_top_right", outer[1]),
            ("upper_lip_top_middle", outer[2]),
            ("upper_lip_top_left", outer[3]),
            ("lower_lip_bottom_left", outer[5]),
            ("lower_lip_bottom_right", outer[6]),
            ("inner_upper_lip_right", inner[1]),
            ("inner_upper_lip_middle", inner[2]),
            ("inner_upper_lip_left", inner[3]),
            ("inner_lower_lip_left", inner[5]),
            ("inner_lower_lip_middle", inner[6]),
            ("inner_lower_lip_right", inner[7]),
        ):
            m.point(name, xyz, 1)
        m.link(
            "right_mouth_corner",
            "upper_lip_top_right",
            "upper_lip_top_middle",
            "upper_lip_top_left",
            "left_mouth_corner",
        )
        m.link("left_mouth_corner", "lower_lip_bottom_left", "lower_lip_bottom_right", "right_mouth_corner")
        return m

    return Template("lips", build, View((0.0,), 25.0, 0.0, 20.0, any_roll=0.1))
