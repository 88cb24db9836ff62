"""Bytes → pixels: the one place where image files are opened. Pillow and numpy only.

Every image is read as a browser shows it: EXIF orientation applied, first frame, transparency on white, 16 bit scaled
to 8 bit. Sizes are checked on the header, before a pixel is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from kptllm_core.errors import ImageError, InvalidInput, TooLarge
from kptllm_core.geometry import Crop
from kptllm_core.keypoints import KeypointSet, Visibility

MAX_PIXELS = 100_000_000
STRIP = 256  # rows
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "MPO", "PPM")
PAPER = (124, 116, 104)  # what lies outside an image, in a crop: the mean colour of photographs
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Kept(OrderedDict[str, np.ndarray]):
    """Decoded images by a name, the most recently used ones, up to `max_bytes` of them. For one thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes

    def find(self, key: str) -> np.ndarray | None:
        """(H, W, 3) uint8, or None."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)

    def keep(self, key: str, image: np.ndarray) -> None:
        if image.nbytes <= self.max_bytes:
            self[key] = image
            spare = sum(i.nbytes for i in self.values()) - self.max_bytes
            while spare > 0:
                spare -= self.popitem(last=False)[1].nbytes


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the oriented image, from the header alone. Raises ImageError or TooLarge."""
    image = _open(data, max_pixels)
    return (image.height, image.width) if _orientation(image) in _SIDEWAYS else image.size


def read_image(source: bytes | str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8 RGB of the oriented image. Raises ImageError or TooLarge with what was found."""
    if not isinstance(source, bytes):
        path = Path(source)
        try:
            source = path.read_bytes()
        except OSError as error:
            raise ImageError(f"Cannot read the image {path}: {error.strerror or error}.") from None
    image = _open(source, max_pixels)
    turn = _TURNS.get(_orientation(image))
    try:
        image.load()
        return np.ascontiguousarray(_to_rgb(image if turn is None else image.transpose(turn)))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow raises many kinds for damaged bytes
        raise ImageError(f"The image ({image.format or 'unknown format'}, {len(source)} bytes) is damaged or cut short: {error}.") from None


def warp(image: np.ndarray, crop: Crop) -> np.ndarray:
    """(H, W, 3) uint8 → the crop (S, S, 3) uint8, mean grey outside. Large images are reduced first, so that nothing aliases."""
    factor = max(int(1 / max(crop.scale, 1e-6) / 1.5), 1)
    corners = crop.to_image(np.array([[0, 0], [0, crop.size], [crop.size, 0], [crop.size, crop.size]]))
    # Only what the crop shows is copied, with a margin for the pixels between which it falls, in whole blocks of what is reduced.
    low = np.clip(np.floor(corners.min(0) / factor - 2) * factor, 0, None).astype(int)
    high = np.clip(np.ceil(corners.max(0) / factor + 2) * factor, 0, image.shape[1::-1]).astype(int)
    if (high <= low).any():
        return np.full((crop.size, crop.size, 3), PAPER, np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]]))
    matrix = crop.matrix.copy()
    matrix[:, 2] += matrix[:, :2] @ low
    if factor > 1:
        picture = picture.reduce(factor)
        matrix = matrix * np.array([[factor, factor, 1.0]])
    inverse = np.linalg.inv(np.concatenate([matrix, [[0.0, 0.0, 1.0]]]))[:2]
    size = (crop.size, crop.size)
    return np.asarray(picture.transform(size, Image.Transform.AFFINE, tuple(inverse.flatten()), Image.Resampling.BILINEAR, fillcolor=PAPER))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("The image is empty (0 bytes). Upload it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"The image has too many pixels: {error}.") from None
    except Exception:  # noqa: BLE001 - Pillow raises many kinds for bad bytes
        raise ImageError(f"Not an image ({len(data)} bytes, starting with {data[:8]!r}). Expected one of {', '.join(FORMATS)}.") from None
    if image.width * image.height > max_pixels:
        raise TooLarge(f"The image has {image.width} × {image.height} pixels; at most {max_pixels:,} are allowed. Scale it down.")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's 1…8: how the pixels are to be turned once they are loaded. Those of a TIFF, and its size, are turned by then. What XMP says, which
    Pillow would take where EXIF says nothing, no browser heeds."""
    if image.format == "TIFF":
        return 1
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return int(exif.get(0x0112, 1))
    except Exception:  # noqa: BLE001 - a broken EXIF block is no reason to refuse an image
        return 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        rows = [slice(start, start + STRIP) for start in range(0, len(values), STRIP)]  # a float of each pixel at once may be too much
        high = max((np.nan_to_num(values[part]).max(initial=0) for part in rows), default=0)
        # Integers of 16 bit have one scale whatever is in them; floats have none, so their range decides.
        top = 65535.0 if image.mode != "F" or high > 255 else 255.0 if high > 1 else 1.0
        rgb = np.empty((*values.shape, 3), np.uint8)
        for part in rows:
            rgb[part] = np.clip(np.nan_to_num(values[part].astype(np.float64)) / top * 255.0, 0, 255).astype(np.uint8)[..., None]
        return rgb
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, rgba)
    return np.asarray(image.convert("RGB"))


def cut_image(image: np.ndarray, points: KeypointSet, axis: int, before: bool, share: float) -> tuple[np.ndarray, KeypointSet]:
    """The image (H, W, 3) without what lies beyond a line through the object, as at the border of a photograph, and what is left.

    `share` of the box's side along `axis` (0 x, 1 y) goes, at its start (`before`) or its end. Points there are absent; the box
    is what remains of it. InvalidInput without a box.
    """
    if points.box is None:
        raise InvalidInput("An object without a box cannot be cut: nobody knows how large it is.")
    start, side = float(points.box[axis]), float(points.box[axis + 2])
    line = int(np.clip(round(start + side * (share if before else 1 - share)), 1, image.shape[1 - axis] - 1))
    left = np.array([*points.box[:2], *(points.box[:2] + points.box[2:])], np.float64)
    left[axis], left[axis + 2] = (line, start + side) if before else (start, line)
    gone = points.xy[:, axis] < line if before else points.xy[:, axis] >= line
    shift = np.zeros(2)
    shift[axis] = line if before else 0
    box = np.array([*(left[:2] - shift), *np.maximum(left[2:] - left[:2], 1.0)])
    visibility = np.where(gone & points.placed, Visibility.ABSENT, points.visibility)
    kept = slice(line, None) if before else slice(0, line)
    image = image[:, kept] if axis == 0 else image[kept]
    return np.ascontiguousarray(image), KeypointSet(points.names, points.xy - shift, visibility, points.score, box)
