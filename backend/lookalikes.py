"""Which images look alike: a cheap perceptual hash, computed when an image is fetched.

The hash is 256 bits, one for each of 16 × 16 neighbouring pairs of pixels of a tiny grey picture: is the right one brighter?
Scaling, compression and brightness leave it (nearly) as it is.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

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


def note_looks(session: Session, project: str, looks: Mapping[int, str]) -> None:
    """Remember the looks of tasks' images; an image that was replaced looks different from now on."""
    tasks = list(looks)
    known: dict[int, str] = {}
    for at in range(0, len(tasks), 500):
        query = select(Look.task, Look.look).where(Look.project == project, Look.task.in_(tasks[at : at + 500]))
        known |= {task: look for task, look in session.execute(query).all()}  # noqa: C416 - as in uses_of
    for task, look in looks.items():
        if known.get(task) == look:
            continue
        if task in known:
            session.execute(delete(Look).where(Look.project == project, Look.task == task))
        session.add(Look(project=project, task=task, look=look))


class Lookalikes:
    """The looks of all projects in this process's memory; only what is new is read from the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known: dict[str, tuple[int, dict[int, str]]] = {}  # project → (the last looks.id, task → look)
        self._lock = threading.Lock()

    def of(self, project: str) -> dict[int, str]:
        """Task → look."""
        with self._lock:
            last, known = self._known.get(project, (0, {}))
            with self._journal.reading() as session:
                query = select(Look.id, Look.task, Look.look).where(Look.project == project, Look.id > last)
                for number, task, look in session.execute(query.order_by(Look.id)):
                    last, known[task] = number, look
            self._known[project] = last, known
            return dict(known)

    def repeats(self, project: str, looks: Mapping[int, str], labelled: Iterable[int]) -> set[int]:
        """Which of these tasks (task → look) show what another task shows that is labelled, or that comes first.

        Of several alike that nobody labelled, the one with the smallest number is no repetition, whoever is asked about when.
        """
        if not looks:
            return set()
        known = self.of(project) | dict(looks)
        tasks = np.array(list(known))
        table = bits(list(known.values()))
        done = np.isin(tasks, list(labelled))
        apart = distances(bits(list(looks.values())), table)
        near = apart < threshold(table)
        asked = np.array(list(looks))[:, None]
        twins = near & (tasks[None] != asked) & (done[None] | (tasks[None] < asked))
        return {int(task) for task, found in zip(asked[:, 0], twins.any(1), strict=True) if found}

    def in_order(self, project: str, tasks: Sequence[int], labelled: Iterable[int]) -> dict[int, int]:
        """Task → the task that it repeats: one that is labelled, or one before it in this order. All must have looks."""
        known = self.of(project)
        first = [t for t in labelled if t in known]
        if not tasks:
            return {}
        sequence = [*first, *tasks]
        table = bits([known[t] for t in sequence])
        near = threshold(bits(list(known.values())))
        kept = list(range(len(first)))
        found: dict[int, int] = {}
        for at in range(len(first), len(sequence)):
            apart = distances(table[at : at + 1], table[kept])[0] if kept else np.zeros(0)
            if len(apart) and apart.min() < near:
                found[sequence[at]] = sequence[kept[int(apart.argmin())]]
            else:
                kept.append(at)
        return found
