"""Which objects does an image show, and which points has each? Boxes of `finder` move to where their points are, each object is
kept once, and objects that lie on each other share no point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from kptllm_core import finder
from kptllm_core.claims import Taken, claims, yielded
from kptllm_core.finder import FAINT, Found, needs_windows
from kptllm_core.geometry import clip_box
from kptllm_core.instances import MOST, box_iou, distinct
from kptllm_core.keypoints import KeypointSet
from kptllm_core.passes import BATCH, Passes
from kptllm_core.support import Prompt
from kptllm_core.sureness import Weights, least_seen, search_kind, sureness, trust, witnesses

SAME_AS_GIVEN = 0.5  # overlap (IoU) with a drawn box from which on a found one is the same object
SAME_SETTLED = 0.5  # the same, of boxes that lie where their points are
SAME_LARGE = 0.3  # the same, of a rough box and the one found by an object's points in the whole image
DRAWN = 2  # rank of an object that a person drew: it keeps the points that others claim; found ones have 1 if they are sure enough, else 0
MAX_WINDOWS = 25  # in which one object alone is looked for
SPARE = 3  # times as many boxes as objects are asked for may be looked at: some turn out to be the same object
JUDGED = 8  # boxes whose points are looked at before those to come are judged by the surest of them: with four its rival was sometimes missing


class Instance(NamedTuple):
    """One object of an image. keypoints: with its box. score: 0…1, how likely the box is a true one's (overlaps it by half, and no
    surer box does); 1 if a person drew it. seen: 0…1, what the head that finds boxes said of this one."""

    keypoints: KeypointSet
    score: float
    seen: float = 1.0


@dataclass(frozen=True, eq=False)
class ImageObjects:
    """The objects of one image, (H, W, 3) uint8, that a prompt asks for."""

    passes: Passes
    image: np.ndarray
    prompt: Prompt

    @property
    def weights(self) -> Weights:
        return self.passes.model.config.sureness[search_kind(self.prompt.share)]

    def search(self, least: float, most: int = MOST) -> Found:
        """Up to `most` boxes to which the head that finds them gives a score of at least `least`, the surest first."""
        height, width = self.image.shape[:2]
        detect = partial(self.passes.detect, self.image, prompt=self.prompt.seeking)
        return finder.find(detect, width, height, self.prompt.share, self.passes.size, least, most)

    def find(self, least: float, most: int, drawn: int) -> Found:
        """Boxes of objects that may be as sure as `least`, each where its points are: enough for `most` beside so many that a person drew."""
        looked_at = min(SPARE * most, MOST) + drawn
        return self._settled(self.search(max(least_seen(least, self.weights), FAINT), looked_at), least)

    def read(self, own: np.ndarray, found: Found, least: float, most: int) -> tuple[list[Instance], list[Instance]]:
        """Objects in boxes that a person drew, (N, 4), and in up to `most` others. A found box of a drawn object is that object: all that is
        left of it is its lead over the others, so that drawing one changes no other's score."""
        overlap = box_iou(found.boxes, own)
        same = overlap.max(1, initial=0) >= SAME_AS_GIVEN
        new, twice = np.flatnonzero(~same)[:most], np.flatnonzero(same)
        seen = found.score[np.concatenate([new, twice])]
        whose = [*range(len(own), len(own) + len(new)), *(overlap[twice].argmax(1).tolist() if len(own) else ())]

        def sure(sets: Sequence[KeypointSet]) -> np.ndarray:
            return sureness(witnesses(seen, np.array([trust(sets[i]) for i in whose])), self.weights)[: len(new)]

        boxes = np.concatenate([own, found.boxes[new]])
        sets = self._points(boxes, self.prompt, [True] * len(own) + [False] * len(new))
        sets = self._apart(boxes, sets, [DRAWN] * len(own) + (sure(sets) >= least).astype(int).tolist())
        others = zip(sets[len(own) :], sure(sets).tolist(), found.score[new].tolist(), strict=True)
        return [Instance(points, 1.0) for points in sets[: len(own)]], [Instance(*item) for item in others]

    def rough(self, prompt: Prompt | None = None) -> np.ndarray | None:
        """A rough box of the one object in the whole image, or None if the whole image serves as well."""
        prompt = prompt or self.prompt
        height, width = self.image.shape[:2]
        shown = prompt.shown
        sets = self.passes.points_of_crops([self.image], [self.passes.crop(self.image, None)], prompt, shown.whole if shown else None)
        if shown is not None and needs_windows(shown.share):
            crops = finder.windows(width, height, shown.share * max(width, height) * finder.WINDOW, self.passes.size, MAX_WINDOWS)
            shots = shown.tight.upright()
            for start in range(0, len(crops), BATCH):
                part = crops[start : start + BATCH]
                sets += self.passes.points_of_crops([self.image] * len(part), part, prompt, shots)
        return self._around(max(sets, key=trust))

    def _points(self, boxes: np.ndarray, prompt: Prompt, drawn: Sequence[bool] = (), taken: Sequence[Taken] | None = None) -> list[KeypointSet]:
        """drawn: which boxes a person drew (default: none). In others the examples' layouts would make an object of whatever is there."""
        return self.passes.points([self.image] * len(boxes), list(boxes), prompt, taken=taken, exact=drawn or [False] * len(boxes))

    def _apart(self, boxes: np.ndarray, sets: list[KeypointSet], rank: Sequence[int]) -> list[KeypointSet]:
        """The points of objects that lie on each other, so that none is used by two: who loses a point looks for it elsewhere, once."""
        claimed = claims(sets, rank)
        again = [i for i, claim in enumerate(claimed) if claim]
        if not again:
            return sets
        drawn = [rank[i] == DRAWN for i in again]
        apart = self._points(boxes[again], self.prompt, drawn, [claimed[i] for i in again])
        moved = dict(zip(again, apart, strict=True))
        return yielded([moved.get(i, points) for i, points in enumerate(sets)], rank)

    def _settled(self, found: Found, least: float) -> Found:
        """Boxes moved to where the points in them say that the object is, each object once. Those that are too faint to be as sure as `least`
        beside the surest, by what this first look tells of it, are left out. Where points do not tell how far their object reaches, the
        boxes stay.

        An object as large as its image is found best by its points in the whole image: that box stands for the one it overlaps.
        """
        if not len(found.boxes) or self.prompt.shown is None or not self.prompt.points_tell_boxes:
            return found
        sets = self._likely_points(found, least)
        boxes = np.stack([box if (around := self._around(s)) is None else around for s, box in zip(sets, found.boxes, strict=False)])
        rough = None if needs_windows(self.prompt.shown.share) else self.rough(self.prompt.seeking)
        if rough is not None:
            same = box_iou(rough[None], boxes)[0]
            boxes[same.argmax()] = rough if same.max() > SAME_LARGE else boxes[same.argmax()]
        index = distinct(boxes, found.score[: len(sets)], SAME_SETTLED, len(sets))
        return Found(boxes[index], found.score[index])

    def _likely_points(self, found: Found, least: float) -> list[KeypointSet]:
        """The points in the boxes, the surest first, until none of the rest can be as sure as `least` beside these."""
        sets: list[KeypointSet] = []
        surest = 0.0
        while len(sets) < len(found.boxes) and found.score[len(sets)] >= least_seen(least, self.weights, surest):
            sets += self._points(found.boxes[len(sets) : len(sets) + JUDGED], self.prompt.seeking)
            surest = max(float(s) * trust(p) for s, p in zip(found.score, sets, strict=False))
        return sets

    def _around(self, points: KeypointSet) -> np.ndarray | None:
        """(4,) a box around the usual points that are not much less sure than most; None where they are too few."""
        there = points.placed & self.prompt.shown.usual if self.prompt.shown else points.placed
        sure = there & (points.score >= 0.5 * np.median(points.score[there])) if there.any() else there
        if sure.sum() < min(2, len(points)):
            return None
        height, width = self.image.shape[:2]
        box = clip_box(self.prompt.box_around(points.xy[sure], width, height), width, height)
        return box if min(box[2], box[3]) > 1 else None
