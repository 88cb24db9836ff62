"""One prediction against one truth, and the baseline beside it. The one path by which the product scores itself.

`evaluate.py` (the protocol) and training rounds (held-out images) both go through `predict_and_measure`, which asks the
Predictor exactly as serving does. The baseline `CopyPredictor` looks at no pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kptllm_core import metrics, report
from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.protocol import box_handed, true_box, with_box
from kptllm_core.report import Measured

if TYPE_CHECKING:
    from kptllm_core.predictor import Example

BATCH = 16  # images handed to the predictor at once by `score_predictor`


class PointPredictor(Protocol):
    """What is needed of a predictor to measure it: `kptllm_core.predictor.Predictor` and `CopyPredictor` have it."""

    base: str

    def predict(
        self,
        images: list[np.ndarray],
        schema: KeypointSchema,
        support: Sequence[Example] = (),
        boxes: Sequence[np.ndarray | None] | None = None,
        prompt: str = "auto",
        asked: list[str] | None = None,
    ) -> list[KeypointSet]: ...


class CopyPredictor:
    """The baseline: each support point at the same offset from the query box's centre, in units of max(w, h).

    With several supports the offsets' mean; without a box the whole image is taken as the box. It looks at no pixel.
    """

    base = "copy"

    def predict(
        self,
        images: list[np.ndarray],
        schema: KeypointSchema,
        support: Sequence[Example] = (),
        boxes: Sequence[np.ndarray | None] | None = None,
        prompt: str = "auto",
        asked: list[str] | None = None,
    ) -> list[KeypointSet]:
        if not support:
            raise InvalidInput("Copying needs at least one support example.")
        names = tuple(asked) if asked is not None else schema.names
        offsets, placed = [], []
        for example in support:
            points = example.keypoints.reorder(names)
            box = true_box(with_box(example.keypoints, example.image))
            offsets.append((points.xy - (box[:2] + box[2:] / 2)) / max(box[2:].max(), 1.0))
            placed.append(points.placed)
        known = np.array(placed)  # (shots, K)
        mean = (np.array(offsets) * known[..., None]).sum(0) / np.maximum(known.sum(0), 1)[:, None]
        visibility = np.where(known.any(0), Visibility.VISIBLE, Visibility.NOT_LABELLED)
        results = []
        for image, given in zip(images, boxes or [None] * len(images), strict=True):
            where = np.array([0, 0, *image.shape[1::-1]]) if given is None else np.asarray(given, np.float64)
            xy = where[:2] + where[2:] / 2 + mean * max(where[2:].max(), 1.0)
            results.append(KeypointSet(names, xy, visibility, known.mean(0), where))
        return results


@dataclass(frozen=True, eq=False)
class Question:
    """An image (H, W, 3) uint8, what is true in it, and the box (4,) that the predictor is told, or None."""

    image: np.ndarray
    truth: KeypointSet
    box: np.ndarray | None


def measure(predicted: KeypointSet, truth: KeypointSet, counted: np.ndarray, drawn: bool = False) -> Measured:
    """Distances and scores of the `counted` (K,) points of the truth. A point that was given no position is `MISSED`; if only
    `drawn` ones count, so is one that is said to be absent, wherever it would be."""
    predicted = predicted.reorder(truth.names)
    distance = metrics.normalised_distance(predicted.xy, truth.xy, true_box(truth))
    missed = ~predicted.placed if drawn else predicted.visibility == Visibility.NOT_LABELLED
    distance = np.where(missed, metrics.MISSED, distance)
    names = tuple(name for name, counts in zip(truth.names, counted, strict=True) if counts)
    return Measured(names, distance[counted], predicted.score[counted].astype(np.float64))


def predict_and_measure(
    predictor: PointPredictor,
    questions: Sequence[Question],
    schema: KeypointSchema,
    support: Sequence[Example],
    prompt: str = "auto",
    counted_in: Sequence[Example] = (),
    drawn: bool = False,
) -> tuple[list[Measured], list[KeypointSet]]:
    """What a predictor answers, and how far off it is. A point counts if it is placed in the truth and in `counted_in`. drawn: see `measure`."""
    predicted = predictor.predict(
        [q.image for q in questions], schema, support=support, boxes=[q.box for q in questions], prompt=prompt
    )
    measured = []
    for points, question in zip(predicted, questions, strict=True):
        counted = question.truth.placed
        for example in counted_in:
            counted = counted & example.keypoints.reorder(question.truth.names).placed
        measured.append(measure(points, question.truth, counted, drawn))
    return measured, predicted


def score_predictor(
    predictor: PointPredictor,
    samples: Sequence[tuple[np.ndarray, KeypointSet]],
    schema: KeypointSchema,
    support: Sequence[Example],
    boxes: str = "found",
    drawn: bool = False,
) -> dict[str, Any]:
    """The accuracy on labelled images as serving would answer them. drawn: a point that serving would not draw is missed.

    Every placed point of the truth counts; objects without any are left out. The unit is the truth's box, see `with_box`.
    samples: (image (H, W, 3) uint8, truth) each; boxes: `found` hands over no box, `given` the true one.
    Returns {"pck": {"0.02", "0.05", "0.1", "0.2"}, "nme": float or None without points, "points": n, "images": n}.
    """
    if boxes not in ("found", "given"):
        raise InvalidInput(f"boxes '{boxes}' is not known. Expected found or given.")
    ordered = [(image, truth.reorder(schema.names)) for image, truth in samples]
    truths = [(image, with_box(truth, image)) for image, truth in ordered if truth.placed.any()]
    questions = [Question(image, truth, box_handed(true_box(truth), boxes)) for image, truth in truths]
    measured: list[Measured] = []
    for start in range(0, len(questions), BATCH):
        measured += predict_and_measure(predictor, questions[start : start + BATCH], schema, support, drawn=drawn)[0]
    distances = [m.distance for m in measured]
    points = sum(map(len, distances))
    return {
        "pck": report.pck_table(distances),
        "nme": metrics.nme(distances),
        "points": points,
        "images": len(distances),
    }
