"""Image files as they come: every mode, damaged, empty, too large."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from kptllm_core.errors import ImageError, TooLarge
from kptllm_core.geometry import similarity_crop
from kptllm_core.imaging import PAPER, image_size, read_image, warp


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


RAMP = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1)))


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("1", "PNG")]
)  # fmt: skip
def test_every_kind_becomes_rgb(mode: str, form: str) -> None:
    data = encoded(RAMP.convert("RGB").convert(mode), form)
    image = read_image(data)
    assert image.shape == (48, 64, 3)
    assert image.dtype == np.uint8
    assert image_size(data) == (64, 48)
    assert int(image[24, 60].mean()) > int(image[24, 4].mean()) + 100  # still dark on the left, bright on the right


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray((np.tile(np.linspace(0, 65535, 64), (48, 1))).astype(np.uint16))
    image = read_image(encoded(deep))
    assert 120 < int(image[0, 32, 0]) < 135
    assert int(image[0, 16, 0]) < int(image[0, 48, 0]) < 200


def test_floats_from_zero_to_one_are_no_black_picture() -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1)))
    image = read_image(encoded(ramp, "TIFF"))
    assert 110 < int(image[0, 32, 0]) < 145


def test_too_little_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_little(image: Image.Image) -> None:
        raise MemoryError

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    monkeypatch.setattr("kptllm_core.imaging._to_rgb", too_little)
    with pytest.raises(MemoryError):
        read_image(file.getvalue())


def test_a_tall_image_of_16_bits_is_read_in_strips() -> None:
    tall = np.linspace(0, 65535, 600 * 3).astype(np.uint16).reshape(600, 3)
    file = io.BytesIO()
    Image.fromarray(tall).save(file, "PNG")
    assert np.array_equal(read_image(file.getvalue())[..., 0], (tall / 65535 * 255).astype(np.uint8))


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    dark = Image.fromarray(np.full((8, 8), 200, np.uint16))
    assert read_image(encoded(dark)).max() < 3


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read_image(encoded(clear)).min() == 255


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"hello", encoded(RAMP)[:70], b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_bytes_that_are_no_whole_image(data: bytes) -> None:
    with pytest.raises(ImageError):
        read_image(data)


def test_a_pixel_bomb_is_refused_on_its_header() -> None:
    data = encoded(Image.new("1", (15000, 9000)))
    with pytest.raises(TooLarge, match="15000 × 9000"):
        image_size(data)
    with pytest.raises(TooLarge):
        read_image(data)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ImageError, match=r"nowhere\.jpg"):
        read_image("nowhere.jpg")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_browsers_do(form: str, orientation: int) -> None:
    """The bright corner of a turned image goes where EXIF says; its size is told from the header alone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:8, :8] = 255
    data = encoded(Image.fromarray(pixels), form, exif=exif)
    image = read_image(data)
    assert image_size(data) == image.shape[1::-1] == ((80, 40) if orientation < 5 else (40, 80))
    height, width = image.shape[:2]
    right, below = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    assert image[height - 4 if below else 4, width - 4 if right else 4].min() > 200
    assert image.mean() < 20


def test_an_image_is_turned_whatever_else_its_exif_holds() -> None:
    """A tag that Pillow cannot write again, as cameras and tools leave them."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x0213, 2, 4, b"abc")  # YCbCrPositioning is a number
    data = encoded(Image.new("RGB", (80, 40)), "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4))
    with pytest.raises(Exception):  # noqa: B017 - what makes it a case at all; Pillow's own way ends in various errors
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image_size(data) == (40, 80) and read_image(data).shape == (80, 40, 3)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_an_orientation_in_xmp_alone_turns_nothing(form: str) -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.new("RGB", (80, 40)), form, xmp=packet)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6, "else there is nothing to guard against"
    assert image_size(data) == (80, 40) and read_image(data).shape == (40, 80, 3)


def test_whatever_pillow_raises_on_damaged_bytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def mangled(self: object) -> None:
        raise TypeError("'str' object cannot be interpreted as an integer")

    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", mangled)
    with pytest.raises(ImageError, match="damaged"):
        read_image(encoded(RAMP, "TIFF"))


def test_a_crop_is_the_same_whether_the_whole_image_is_copied_or_what_it_shows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        image = rng.integers(0, 255, (*rng.integers(5, 500, 2), 3), np.uint8)
        crop = similarity_crop(rng.uniform(-0.3, 1.3, 2) * image.shape[1::-1], float(np.exp(rng.uniform(0, 7))), 64, rng.uniform(0, 360))
        factor = max(int(1 / crop.scale / 1.5), 1)
        whole = Image.fromarray(image).reduce(factor)
        inverse = np.linalg.inv(np.vstack([crop.matrix * [factor, factor, 1], [0, 0, 1]]))[:2]
        expected = whole.transform((64, 64), Image.Transform.AFFINE, tuple(inverse.ravel()), Image.Resampling.BILINEAR, fillcolor=PAPER)
        assert np.abs(warp(image, crop).astype(int) - np.asarray(expected)).max() <= 1
