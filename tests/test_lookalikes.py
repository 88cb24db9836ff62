"""Perceptual hashes: the same picture under compression and scale is alike, another one is not; repeats are told once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.journal import Journal
from backend.lookalikes import Lookalikes, bits, distances, look_of, note_looks, threshold
from journal_database import journal_url


def picture(seed: int, size: tuple[int, int] = (320, 240), kind: str = "PNG", dot: bool = False, **options: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    if dot:
        image.paste((255, 0, 0), (10, 10, 16, 16))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def look(data: bytes) -> str:
    found = look_of(data)
    assert found is not None and len(found) == 64
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(journal_url(tmp_path))
    yield made
    made.close()


def test_compression_and_scale_leave_a_picture_alike_and_another_is_not() -> None:
    same = [picture(1), picture(1, kind="JPEG", quality=30), picture(1, (640, 480)), picture(1, dot=True)]
    others = [picture(n) for n in range(2, 12)]
    table = bits([look(d) for d in same + others])
    apart = distances(table, table)
    near = threshold(table)
    assert (apart[:4, :4] < near).all()
    assert (apart[:4, 4:] > near).all()


def test_bytes_that_are_no_image_have_no_look() -> None:
    assert look_of(b"nothing") is None
    assert look_of(b"") is None


def test_a_fixed_camera_makes_only_the_very_same_alike() -> None:
    frames = np.repeat(bits([look(picture(1))]), 40, axis=0).copy()
    for n in range(40):
        frames[n, n : n + 4] ^= 1  # a small thing moves through the picture
    assert threshold(frames) < 4


def test_of_several_alike_the_first_is_no_repetition(journal: Journal) -> None:
    looks = {number: look(picture(seed)) for number, seed in ((1, 1), (2, 2), (3, 1), (4, 3), (5, 2), (6, 9), (7, 10))}
    journal.write(lambda session: note_looks(session, "1", looks))
    known = Lookalikes(journal)
    assert known.repeats("1", looks, labelled=[]) == {3, 5}
    assert known.repeats("1", {1: looks[1]}, labelled=[3]) == {1}  # a labelled one says it all, whatever its number
    assert known.in_order("1", [5, 2, 1, 4], labelled=[3]) == {2: 5, 1: 3}


def test_only_new_looks_are_read_and_replaced_ones_are_found(journal: Journal) -> None:
    known = Lookalikes(journal)
    journal.write(lambda session: note_looks(session, "1", {1: look(picture(1))}))
    assert set(known.of("1")) == {1}
    journal.write(lambda session: note_looks(session, "1", {1: look(picture(2)), 2: look(picture(3))}))
    assert known.of("1") == {1: look(picture(2)), 2: look(picture(3))}
    assert known.of("2") == {}
