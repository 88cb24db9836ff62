"""Perceptual hashes: the same picture under compression and scale is alike, another one is not; repeats are told once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.journal import Journal
from backend.lookalikes import Bands, Lookalikes, distances, look_of, note_looks, packed, threshold
from backend_world import CONFIG
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
    table = packed([look(d) for d in same + others])
    apart = distances(table, table)
    near = threshold(table)
    assert (apart[:4, :4] < near).all()
    assert (apart[:4, 4:] > near).all()


def test_bytes_that_are_no_image_have_no_look() -> None:
    assert look_of(b"nothing") is None
    assert look_of(b"") is None


def test_a_fixed_camera_makes_only_the_very_same_alike() -> None:
    frames = np.repeat(packed([look(picture(1))]), 40, axis=0).copy()
    for n in range(40):
        frames[n, n // 16] ^= np.uint64(0xF << 4 * (n % 16))  # a small thing moves through the picture
    assert threshold(frames) < 4


def test_of_several_alike_the_first_is_no_repetition(journal: Journal) -> None:
    looks = {number: look(picture(seed)) for number, seed in ((1, 1), (2, 2), (3, 1), (4, 3), (5, 2), (6, 9), (7, 10))}
    journal.write(lambda session: note_looks(session, "1", looks))
    known = Lookalikes(journal)
    assert known.repeats("1", looks, labelled=[]) == {3, 5}
    assert known.repeats("1", {1: looks[1]}, labelled=[3]) == {1}  # a labelled one says it all, whatever its number
    assert known.in_order("1", [5, 2, 1, 4], labelled=[3]) == {2: 5, 1: 3}


@pytest.mark.parametrize("near", [1.0, 2.5, 12.0])
def test_the_short_way_finds_what_comparing_each_with_each_finds(near: float) -> None:
    rng = np.random.default_rng(int(near))
    looks = np.frombuffer(rng.bytes(32 * 60), np.uint64).reshape(60, 4)[rng.integers(0, 60, 400)].copy()
    for row in looks:
        for bit in rng.integers(0, 256, rng.integers(0, int(2 * near))):
            row[bit // 64] ^= np.uint64(1 << int(bit) % 64)
    kept, expected = list(range(50)), {}
    apart = distances(looks, looks)
    for at in range(50, 400):
        other = min(kept, key=lambda k: apart[at, k])
        if apart[at, other] < near:
            expected[at] = apart[at, other]
        else:
            kept.append(at)
    found = Bands(near).repeats(looks, 50)
    assert {at: apart[at, other] for at, other in found.items()} == expected
    assert len(expected) > 20 and set(found.values()) <= set(kept)


def test_looks_of_deleted_tasks_go(journal: Journal) -> None:
    journal.observe("1", CONFIG, "nano-00000000")
    looks = {number: look(picture(seed)) for number, seed in ((1, 1), (2, 2), (3, 1))}
    journal.write(lambda session: note_looks(session, "1", looks))
    known, other = Lookalikes(journal), Lookalikes(journal)
    assert known.in_order("1", [1, 2, 3], labelled=[]) == {3: 1}
    journal.delete_tasks("1", [1])
    assert known.in_order("1", [1, 2, 3], labelled=[]) == {} == other.in_order("1", [3], labelled=[1])
    assert not known.has("1", 1) and known.has("1", 3)


def test_only_new_looks_are_read_and_replaced_ones_are_found(journal: Journal) -> None:
    known = Lookalikes(journal)
    journal.write(lambda session: note_looks(session, "1", {1: look(picture(1))}))
    assert known.has("1", 1) and not known.has("1", 2) and not known.has("2", 1)
    journal.write(lambda session: note_looks(session, "1", {1: look(picture(2)), 2: look(picture(3)), 3: look(picture(1)), 4: look(picture(2))}))
    assert known.in_order("1", [1, 2, 3, 4], labelled=[]) == {4: 1}
    assert known.in_order("2", [1, 2, 3, 4], labelled=[]) == {}
