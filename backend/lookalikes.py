"""Which images look alike: a cheap perceptual hash, computed when an image is fetched.

The hash is 256 bits, one for each of 16 × 16 neighbouring pairs of pixels of a tiny grey picture: is the right one brighter?
Scaling, compression and brightness leave it (nearly) as it is.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

from kptllm_core.imaging import FORMATS, MAX_PIXELS

SIDE = 16
BITS = SIDE * SIDE
ALIKE = 12  # bits: nearer than this, two images are near-duplicates
SHARE = 0.15  # … of the usual distance in the project: where a fixed camera makes all images alike, only the very same count


def look_of(data: bytes) -> str | None:
    """The hash of an image file, 64 hex digits; None for bytes that are no usable image."""
    with (
        contextlib.suppress(Exception),
        warnings.catch_warnings(),
    ):  # whoever needs the pixels says what is wrong with them
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            return None
        image.draft("L", (8 * SIDE, 8 * SIDE))  # JPEG is decoded at an eighth of its size
        small = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
        return np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()
    return None


def bits(looks: Sequence[str]) -> np.ndarray:
    """(N, 256) uint8 of 0 and 1."""
    packed = np.frombuffer(bytes.fromhex("".join(looks)), np.uint8).reshape(len(looks), BITS // 8)
    return np.unpackbits(packed, axis=1)


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, 256), (M, 256) bits → (N, M) int: how many differ."""
    a, b = one.astype(np.float32), others.astype(np.float32)
    return np.rint(a.sum(1)[:, None] + b.sum(1)[None] - 2 * a @ b.T).astype(int)


def threshold(looks: np.ndarray, sample: int = 200) -> float:
    """Below how many bits two images of this project are near-duplicates. looks: (N, 256) bits."""
    some = looks[np.linspace(0, len(looks) - 1, min(len(looks), sample)).astype(int)]
    apart = distances(some, some)[np.triu_indices(len(some), 1)]
    usual = float(np.median(apart)) if len(apart) else BITS / 2
    return max(min(ALIKE, SHARE * usual), 1.0)
