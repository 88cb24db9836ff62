"""Pictures: marks lie where the points are, and nothing is drawn that is not there."""

from __future__ import annotations

import numpy as np
import pytest

from kptllm_core.draw import colours, contact_sheet, draw_keypoints
from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSchema, KeypointSet

SCHEMA = KeypointSchema(("nose", "left ear", "tail"), "mouse", ((0, 1), (1, 2)))
GREY = np.full((400, 500, 3), 128, np.uint8)


def points(
    *xy: tuple[float, float], visibility: tuple[int, ...] = (2, 2, 2), box: tuple[float, ...] | None = None
) -> KeypointSet:
    return KeypointSet(SCHEMA.names, np.array(xy), np.array(visibility), box=box)  # type: ignore[arg-type]


def changed(drawn: np.ndarray, x: int, y: int, radius: int = 3) -> bool:
    return bool((drawn[y - radius : y + radius + 1, x - radius : x + radius + 1] != 128).any())


def test_points_lie_where_they_are() -> None:
    drawn = draw_keypoints(GREY, points((100, 50), (300, 200), (420, 350)), SCHEMA, names=False)
    assert drawn.shape == GREY.shape and drawn.dtype == np.uint8
    for (x, y), colour in zip([(100, 50), (300, 200), (420, 350)], colours(3), strict=True):
        assert tuple(drawn[y, x]) == colour
    assert not changed(drawn, 100, 350)


def test_absent_and_unlabelled_points_are_not_drawn() -> None:
    drawn = draw_keypoints(GREY, points((100, 50), (300, 200), (420, 350), visibility=(2, 0, 3)), SCHEMA, names=False)
    assert changed(drawn, 100, 50)
    assert not changed(drawn, 300, 200) and not changed(drawn, 420, 350)


def test_truth_is_a_white_cross_joined_to_the_prediction() -> None:
    predicted, truth = points((100, 50), (300, 200), (420, 350)), points((160, 50), (300, 200), (420, 350))
    drawn = draw_keypoints(GREY, predicted, SCHEMA, truth, names=False)
    assert tuple(drawn[50, 160]) == (255, 255, 255)
    assert changed(drawn, 130, 50, 1)


def test_small_images_are_enlarged_and_order_does_not_matter() -> None:
    small = np.full((40, 80, 3), 128, np.uint8)
    predicted = points((10, 10), (40, 20), (70, 30))
    drawn = draw_keypoints(small, predicted, SCHEMA)
    assert drawn.shape == (160, 320, 3)
    assert (drawn == draw_keypoints(small, predicted.reorder(("tail", "nose", "left ear")), SCHEMA)).all()


def test_a_sheet_has_one_tile_per_image_and_shows_small_objects_large() -> None:
    near = points((20, 20), (30, 30), (40, 24), box=(15, 15, 30, 20))
    sheet = contact_sheet([(GREY, near)], [(GREY, near, near), (GREY, near, None)], SCHEMA, tile=200)
    assert sheet.shape == (200 + 36, 3 * 210 + 10, 3)
    tile = sheet[26:226, 10:210]
    assert (
        (tile != 128).any(-1) & (tile != 246).any(-1)
    ).mean() > 0.03  # the object fills its tile although it is tiny


def test_points_outside_the_image_do_no_harm() -> None:
    far = points((-500, -500), (900, 900), (250, 200))
    assert draw_keypoints(GREY, far, SCHEMA).shape == GREY.shape
    assert contact_sheet([], [(GREY, far, None)], SCHEMA).shape[2] == 3


def test_wrong_arrays_are_told_apart() -> None:
    with pytest.raises(InvalidInput, match=r"\(H, W, 3\)"):
        draw_keypoints(np.zeros((5, 5)), None, SCHEMA)
    with pytest.raises(InvalidInput, match="at least one image"):
        contact_sheet([], [], SCHEMA)


def test_neighbouring_colours_differ() -> None:
    palette = np.array(colours(68), float)
    assert np.linalg.norm(np.diff(palette, axis=0), axis=1).min() > 60
