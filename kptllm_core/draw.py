"""Points on pictures, to look at: predictions, truth, skeleton; sheets of support and queries. Pillow and numpy only.

A prediction is a filled disc in the point's own colour (fainter when its score is low), a hidden one a ring; the true
position is a white cross, joined to the prediction by a thin line. All has a dark edge, so that it reads on any image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility

EDGE = (20, 20, 20)
TRUTH = (255, 255, 255)
BOX = (255, 210, 60)
PAPER = (246, 246, 244)
INK = (40, 40, 40)
MIN_SIDE = 320  # smaller images are enlarged before drawing, so that marks do not cover them
MAX_NAMES = 24  # beyond this many points names only hide the image

Colour = tuple[int, int, int]
Point = tuple[float, float]


def colours(count: int) -> list[Colour]:
    """`count` colours that neighbours in the order do not share: hues by the golden ratio, two brightnesses."""
    result = []
    for i in range(count):
        red, green, blue = colorsys.hsv_to_rgb((i * 0.618034) % 1.0, 0.85, 1.0 if i % 2 == 0 else 0.8)
        result.append((round(red * 255), round(green * 255), round(blue * 255)))
    return result


def draw_keypoints(
    image: np.ndarray,
    points: KeypointSet | None,
    schema: KeypointSchema,
    truth: KeypointSet | None = None,
    *,
    names: bool = True,
) -> np.ndarray:
    """The image (H, W, 3) uint8 with points, box, and skeleton or truth on it; enlarged by a whole factor if it is small.

    points, truth: in pixels of `image`, in any order of the schema's names; absent and unlabelled points are not drawn.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InvalidInput(
            f"An image to draw on has shape (H, W, 3) and type uint8; found {image.shape} {image.dtype}."
        )
    factor = max(1, -(-MIN_SIDE // max(image.shape[:2])))
    picture = Image.fromarray(image).resize(
        (image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.BICUBIC
    )
    pen = _Pen(picture, factor, schema)
    if points is not None:
        points = points.reorder(schema.names)
        pen.box(points.box)
        if truth is None:
            pen.skeleton(points)
        else:  # lines of the skeleton would look like those of the errors
            pen.errors(points, truth.reorder(schema.names))
        pen.points(points)
    if truth is not None:
        pen.truth(truth.reorder(schema.names))
    if names and points is not None and len(schema) <= MAX_NAMES:
        pen.names(points)
    return np.asarray(picture)


class _Pen:
    """Draws on one enlarged picture; all positions given in pixels of the original image."""

    def __init__(self, picture: Image.Image, factor: int, schema: KeypointSchema) -> None:
        self.draw = ImageDraw.Draw(picture, "RGBA")
        self.factor, self.schema, self.size = factor, schema, picture.size
        self.radius = max(2.5, min(picture.size) / 110)
        self.colours = colours(len(schema))
        self.font = ImageFont.load_default(max(10, round(min(picture.size) / 34)))

    def at(self, xy: np.ndarray) -> Point:
        return float(xy[0]) * self.factor, float(xy[1]) * self.factor

    def box(self, box: np.ndarray | None) -> None:
        if box is not None:
            x, y, w, h = (float(v) * self.factor for v in box)
            self.draw.rectangle((x, y, x + w, y + h), outline=(*BOX, 160), width=max(1, round(self.radius / 3)))

    def skeleton(self, points: KeypointSet) -> None:
        for a, b in self.schema.skeleton:
            if points.placed[a] and points.placed[b]:
                ends = [self.at(points.xy[a]), self.at(points.xy[b])]
                self.draw.line(ends, fill=(*EDGE, 130), width=max(2, round(self.radius)))
                self.draw.line(ends, fill=(255, 255, 255, 190), width=max(1, round(self.radius / 2.5)))

    def errors(self, points: KeypointSet, truth: KeypointSet) -> None:
        for i in np.flatnonzero(points.placed & truth.placed):
            self.draw.line(
                [self.at(points.xy[i]), self.at(truth.xy[i])],
                fill=(*self.colours[i], 220),
                width=max(1, round(self.radius / 2)),
            )

    def points(self, points: KeypointSet) -> None:
        for i in np.flatnonzero(points.placed):
            x, y = self.at(points.xy[i])
            r = self.radius
            opacity = round(110 + 145 * float(np.clip(points.score[i], 0, 1)))
            self.draw.ellipse((x - r - 1, y - r - 1, x + r + 1, y + r + 1), fill=(*EDGE, opacity))
            if points.visibility[i] == Visibility.OCCLUDED:
                self.draw.ellipse(
                    (x - r, y - r, x + r, y + r), outline=(*self.colours[i], opacity), width=max(1, round(r / 2))
                )
            else:
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=(*self.colours[i], opacity))

    def truth(self, truth: KeypointSet) -> None:
        for i in np.flatnonzero(truth.placed):
            x, y = self.at(truth.xy[i])
            r = self.radius
            for colour, width in ((EDGE, max(3, round(r * 0.9))), (TRUTH, max(1, round(r * 0.4)))):
                self.draw.line((x - r, y - r, x + r, y + r), fill=colour, width=width)
                self.draw.line((x - r, y + r, x + r, y - r), fill=colour, width=width)

    def names(self, points: KeypointSet) -> None:
        r = self.radius + 1
        discs = [self.at(points.xy[i]) for i in np.flatnonzero(points.placed)]
        taken = [(x - r, y - r, x + r, y + r) for x, y in discs]  # a name must not hide another point
        for i in np.flatnonzero(points.placed):
            x, y = self.at(points.xy[i])
            left, top, right, bottom = self.draw.textbbox((0, 0), self.schema.names[i], font=self.font)
            width, height, gap = right - left, bottom - top, self.radius + 3
            for dx, dy in (
                (gap, -height / 2),
                (-gap - width, -height / 2),
                (-width / 2, -gap - height),
                (-width / 2, gap),
            ):
                spot = (x + dx, y + dy, x + dx + width, y + dy + height)
                inside = spot[0] >= 0 and spot[1] >= 0 and spot[2] <= self.size[0] and spot[3] <= self.size[1]
                if inside and not any(_overlap(spot, other) for other in taken):
                    taken.append(spot)
                    self.draw.text(
                        (spot[0] - left, spot[1] - top),
                        self.schema.names[i],
                        font=self.font,
                        fill=(255, 255, 255),
                        stroke_width=2,
                        stroke_fill=EDGE,
                    )
                    break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def contact_sheet(
    support: Sequence[tuple[np.ndarray, KeypointSet]],
    queries: Sequence[tuple[np.ndarray, KeypointSet, KeypointSet | None]],
    schema: KeypointSchema,
    tile: int = 320,
) -> np.ndarray:
    """One row: the support examples, then the queries, each on a tile of side `tile` under a caption. (H, W, 3) uint8.

    support: (image, labelled points) each; queries: (image, predicted points, true points or None) each.
    """
    cells: list[tuple[str, np.ndarray, KeypointSet, KeypointSet | None]]
    cells = [(f"support {i + 1}", image, points, None) for i, (image, points) in enumerate(support)]
    cells += [(f"query {i + 1}", image, points, truth) for i, (image, points, truth) in enumerate(queries)]
    if not cells:
        raise InvalidInput("A contact sheet needs at least one image.")
    gap, caption = 10, 26
    sheet = Image.new("RGB", (len(cells) * (tile + gap) + gap, tile + caption + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, (title, image, points, truth) in enumerate(cells):
        x = gap + column * (tile + gap)
        window = _window(image, points, truth)
        cut = image[window[1] : window[3], window[0] : window[2]]
        corner = np.array(window[:2], np.float32)
        drawn = Image.fromarray(
            draw_keypoints(cut, _moved(points, corner), schema, truth and _moved(truth, corner), names=False)
        )
        drawn.thumbnail((tile, tile), Image.Resampling.LANCZOS)
        pen.text((x, 6), title, font=font, fill=INK)
        sheet.paste(drawn, (x + (tile - drawn.width) // 2, caption + (tile - drawn.height) // 2))
    return np.asarray(sheet)


def _window(image: np.ndarray, *sets: KeypointSet | None) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of the image that shows all objects and points with some air around them."""
    height, width = image.shape[:2]
    present = [s for s in sets if s is not None]
    corners = [np.stack([b[:2], b[:2] + b[2:]]) for b in (s.object_box() for s in present) if b is not None]
    spread = np.concatenate(corners + [s.xy[s.placed] for s in present])
    if not len(spread):
        return 0, 0, width, height
    low, high = spread.min(0), spread.max(0)
    centre, half = (low + high) / 2, max(float((high - low).max()) * 0.6, 8.0)
    left, top = (int(max(v, 0)) for v in np.floor(centre - half))
    right, bottom = int(min(centre[0] + half + 1, width)), int(min(centre[1] + half + 1, height))
    return (left, top, right, bottom) if right > left and bottom > top else (0, 0, width, height)


def _moved(points: KeypointSet, corner: np.ndarray) -> KeypointSet:
    """In pixels of a window whose top left corner is `corner` of the image."""
    box = None if points.box is None else np.concatenate([points.box[:2] - corner, points.box[2:]])
    return KeypointSet(points.names, points.xy - corner, points.visibility, points.score, box)
