"""Round trips: per cent ↔ pixels ↔ crop ↔ cells, over every cell, and through all eight EXIF orientations."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kptllm_core.geometry import (
    box_of_points,
    cells_to_crop,
    clip_box,
    crop_of_box,
    crop_of_image,
    crop_to_cells,
    from_percent,
    similarity_crop,
    to_percent,
)  # fmt: skip
from kptllm_core.imaging import image_size, read_image, warp

side = st.integers(1, 5000)
place = st.floats(-5000, 5000)


@given(side, side, place, place)
def test_per_cent_and_pixels(width: int, height: int, x: float, y: float) -> None:
    back = from_percent(to_percent(np.array([x, y]), width, height), width, height)
    assert np.allclose(back, [x, y], atol=1e-6)


@given(place, place, st.floats(1, 3000), st.floats(1, 3000), st.floats(-180, 180))
def test_crop_and_image(x: float, y: float, w: float, h: float, degrees: float) -> None:
    crop = crop_of_box(np.array([x, y, w, h]), 160, degrees=degrees)
    points = np.array([[x, y], [x + w / 2, y + h / 2], [x + w, y + h]])
    assert np.allclose(crop.to_image(crop.to_crop(points)), points, atol=1e-4)
    assert np.allclose(crop.to_crop(points[1]), [80, 80], atol=1e-6)
    assert crop.scale == pytest.approx(160 / (max(w, h) * 1.25), rel=1e-6)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_every_cell_comes_back_through_crop_and_per_cent(stride: int) -> None:
    size, width, height = 160, 641, 479
    count = size // stride
    cells = np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1).reshape(-1, 2)
    crop = crop_of_box(np.array([33.0, 21.0, 300.0, 200.0]), size)
    percent = to_percent(crop.to_image(cells_to_crop(cells, stride)), width, height)
    again = crop_to_cells(crop.to_crop(from_percent(percent, width, height)), stride)
    assert np.abs(again - cells).max() < 1e-6  # far below the half cell that is promised


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mark_is_found_where_a_browser_shows_it(orientation: int) -> None:
    """A bright spot, stored in each EXIF orientation, lies at the same per cent of the oriented image, to half a cell."""
    width, height, spot = 240, 160, np.array([60.0, 120.0])
    shown = np.zeros((height, width, 3), np.uint8)
    shown[117:123, 57:63] = 255
    undo = {1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
            5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
            8: [Image.Transpose.ROTATE_270]}[orientation]  # fmt: skip
    stored = Image.fromarray(shown)
    for step in undo:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert image_size(file.getvalue()) == (width, height)
    image = read_image(file.getvalue())
    assert np.array_equal(image, shown)
    crop = crop_of_image(width, height, 160)
    seen = warp(image, crop).astype(float).sum(2)
    seen[seen < 600] = 0
    rows, columns = np.nonzero(seen)
    centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
    percent = to_percent(crop.to_image(centre), width, height)
    assert np.abs(from_percent(percent, width, height) - spot).max() < 4 / crop.scale / 2


@pytest.mark.parametrize("degrees", [0, 30, -90, 170])
def test_the_picture_moves_with_its_points(degrees: float) -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    image[88:93, 148:153] = 255
    crop = similarity_crop(np.array([140.0, 95.0]), 120, 96, degrees)
    seen = warp(image, crop)[..., 0].astype(float)
    seen[seen < 100] = 0
    rows, columns = np.indices(seen.shape)
    found = np.array([(seen * (columns + 0.5)).sum(), (seen * (rows + 0.5)).sum()]) / seen.sum()
    assert np.abs(found - crop.to_crop(np.array([150.5, 90.5]))).max() < 0.75


def test_boxes() -> None:
    assert box_of_points(np.array([[1.0, 2], [5, 4]])).tolist() == [1, 2, 4, 2]
    assert clip_box(np.array([-5.0, 5, 20, 20]), 10, 10).tolist() == [0, 5, 10, 5]
