"""Which images look alike: a cheap perceptual hash, computed when an image is fetched.

The hash is 256 bits, one for each of 16 × 16 neighbouring pairs of pixels of a tiny grey picture: is the right one brighter?
Scaling, compression and brightness leave it (nearly) as it is.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from PIL import Image
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from backend.database import parts
from backend.journal import Journal
from backend.tables import Look
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


def packed(looks: Sequence[str]) -> np.ndarray:
    """(N, 4) uint64: the hashes' bits, 64 to a word."""
    return np.frombuffer(bytes.fromhex("".join(looks)), np.uint64).reshape(len(looks), BITS // 64)


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, 4), (M, 4) → (N, M) uint16: how many bits differ."""
    found = np.empty((len(one), len(others)), np.uint16)
    for row, look in zip(found, one, strict=True):
        np.bitwise_count(look ^ others).sum(1, dtype=np.uint16, out=row)
    return found


def threshold(looks: np.ndarray, sample: int = 200) -> float:
    """Below how many bits two images of this project are near-duplicates. looks: (N, 4)."""
    some = looks[np.linspace(0, len(looks) - 1, min(len(looks), sample)).astype(int)]
    apart = distances(some, some)[np.triu_indices(len(some), 1)]
    usual = float(np.median(apart)) if len(apart) else BITS / 2
    return max(min(ALIKE, SHARE * usual), 1.0)


class Bands:
    """Finds near-duplicates among many looks without comparing each with each.

    Looks that differ in fewer than `near` bits agree in at least one of so many parts of the bits (the pigeonhole principle, as in
    multi-index hashing: Norouzi et al. 2012); only such are compared. A part is spread over the whole picture.
    """

    def __init__(self, near: float) -> None:
        self._near = near
        count = math.ceil(near)
        spread = np.arange(BITS) % count == np.arange(count)[:, None]
        self._masks = np.packbits(spread, axis=1).view(np.uint64)  # (count, 4)
        self._kept: list[dict[int, list[int]]] = [{} for _ in range(count)]  # per part: what its bits are → rows

    def repeats(self, looks: np.ndarray, first: int) -> dict[int, int]:
        """Row → the nearest near-duplicate before it that repeats none itself. looks: (N, 4); rows before `first` repeat none."""
        keys = [self._keys(looks & mask) for mask in self._masks]
        found: dict[int, int] = {}
        for at in range(len(looks)):
            mine = [kept.setdefault(key[at], []) for kept, key in zip(self._kept, keys, strict=True)]
            others = list(dict.fromkeys(chain.from_iterable(mine))) if at >= first else []
            apart = distances(looks[at : at + 1], looks[others])[0] if others else np.zeros(0)
            if others and apart.min() < self._near:
                found[at] = others[int(apart.argmin())]
                continue
            for rows in mine:
                rows.append(at)
        return found

    @staticmethod
    def _keys(words: np.ndarray) -> list[int]:
        """(N, 4) → N numbers, the same for the same words. Others may share one: what agrees is compared anyway."""
        mixed = words * np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64)
        return [int(k) for k in np.bitwise_xor.reduce(mixed ^ (mixed >> np.uint64(29)), axis=1)]


def note_looks(session: Session, project: str, looks: Mapping[int, str]) -> None:
    """Remember the looks of tasks' images; an image that was replaced looks different from now on."""
    known: dict[int, str] = {}
    for part in parts(looks):
        query = select(Look.task, Look.look).where(Look.project == project, Look.task.in_(part))
        known |= {task: look for task, look in session.execute(query).all()}  # noqa: C416 - as in uses_of
    for task, look in looks.items():
        if known.get(task) == look:
            continue
        if task in known:
            session.execute(delete(Look).where(Look.project == project, Look.task == task))
        session.add(Look(project=project, task=task, look=look))


@dataclass(frozen=True, eq=False)
class _Known:
    """The looks of a project, by rising task."""

    last: int = 0  # looks.id up to which they were read
    tasks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,)
    looks: np.ndarray = field(default_factory=lambda: np.zeros((0, BITS // 64), np.uint64))  # (N, 4)

    def among(self, tasks: Iterable[int]) -> np.ndarray:
        """The rows of those of these tasks that are known, in their order."""
        wanted = np.fromiter(tasks, np.int64)
        rows = np.searchsorted(self.tasks, wanted)
        there = rows < len(self.tasks)
        there[there] = self.tasks[rows[there]] == wanted[there]
        return rows[there]

    def plus(self, looks: Mapping[int, str], last: int | None = None) -> _Known:
        """With further looks, which replace older ones of their tasks."""
        tasks = np.concatenate([self.tasks, np.fromiter(looks, np.int64)])
        order = np.argsort(tasks, kind="stable")
        order = order[np.append(np.diff(tasks[order]) != 0, True)]
        table = np.concatenate([self.looks, packed(list(looks.values()))])
        return _Known(self.last if last is None else last, tasks[order], table[order])


class Lookalikes:
    """The looks of all projects in this process's memory; only what is new is read from the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def has(self, project: str, task: int) -> bool:
        return len(self._of(project).among([task])) > 0

    def _of(self, project: str) -> _Known:
        with self._lock:
            known = self._known.get(project, _Known())
            with self._journal.reading() as session:
                new = self._read(session, project, known.last)
                known = known.plus(*new) if new[0] else known
                if len(known.tasks) != session.scalar(select(func.count()).select_from(Look).where(Look.project == project)):
                    new = self._read(session, project, 0)  # some went
                    known = _Known().plus(*new) if new[0] else _Known()
            self._known[project] = known
            return known

    @staticmethod
    def _read(session: Session, project: str, after: int) -> tuple[dict[int, str], int]:
        """(task → look, the last looks.id) of what was noted later."""
        query = select(Look.id, Look.task, Look.look).where(Look.project == project, Look.id > after).order_by(Look.id)
        rows = session.execute(query).all()
        return {task: look for _, task, look in rows}, rows[-1][0] if rows else after

    def repeats(self, project: str, looks: Mapping[int, str], labelled: Iterable[int]) -> set[int]:
        """Which of these tasks (task → look) show what another task shows that is labelled, or that comes first.

        Of several alike that nobody labelled, the one with the smallest number is no repetition, whoever is asked about when.
        """
        if not looks:
            return set()
        known = self._of(project).plus(looks)
        done = np.zeros(len(known.tasks), bool)
        done[known.among(labelled)] = True
        asked = np.array(list(looks))[:, None]
        near = distances(packed(list(looks.values())), known.looks) < threshold(known.looks)
        twins = near & (known.tasks != asked) & (done | (known.tasks < asked))
        return {int(task) for task, found in zip(asked[:, 0], twins.any(1), strict=True) if found}

    def in_order(self, project: str, tasks: Sequence[int], labelled: Iterable[int]) -> dict[int, int]:
        """Task → the task that it repeats: one that is labelled, or one before it in this order. Of those whose looks are known."""
        known = self._of(project)
        first = known.among(labelled)
        rows = np.concatenate([first, known.among(tasks)])
        if len(rows) == len(first):
            return {}
        found = Bands(threshold(known.looks)).repeats(known.looks[rows], len(first))
        number = known.tasks[rows]
        return {int(number[at]): int(number[other]) for at, other in found.items()}
