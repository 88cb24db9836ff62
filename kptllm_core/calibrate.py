"""How likely is a box right that the model found? Fits `ModelConfig.sureness` of a checkpoint: the `calibrate` command.

Rendered kinds that no training has seen: images that one object fills, and scenes of none to twelve, searched as serving does, with
examples and by names alone (only that boxes too faint to be shown are not left out: they take part when two objects claim a point, and in
who leads whom). Each half of the kinds tells how well the other half's fit holds. Only `config.json` changes; the weights, and what was
trained on them, stay valid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kptllm_core import metrics
from kptllm_core.checkpoint import load_checkpoint, save_config
from kptllm_core.config import SEARCHES, ModelConfig, model_folder
from kptllm_core.crowds import hits
from kptllm_core.errors import InvalidInput
from kptllm_core.finder import COUNTED, FAINT
from kptllm_core.instances import box_iou
from kptllm_core.keypoints import KeypointSet
from kptllm_core.predictor import Example, Predictor
from kptllm_core.sureness import WITNESSES, Weights, fit, sureness, trust, witnesses
from kptllm_core.synthetic import Category

SIZE = 384  # of the images, pixels
CROWD = 12  # objects of a scene at most
FEW = 4  # the same, where names alone tell what to look for
NONE = 1 / 6  # share of the images without an object, where one fills the others
SEED = 2027  # kinds are drawn from it: others than training draws


def scenes(kind: str, number: int, images: int) -> Iterator[tuple[Category, list[Example], np.ndarray, list[KeypointSet]]]:
    """(category, support, image, true objects) of one rendered category, for one kind of search."""
    rng = np.random.default_rng([SEED, SEARCHES.index(kind), number])
    category = Category.sample(rng)

    def draw(least: int) -> tuple[np.ndarray, list[KeypointSet]]:
        if kind != "whole":
            return category.scene(rng, SIZE, SIZE, int(rng.integers(least, (FEW if kind == "names" else CROWD) + 1)))
        if not least and rng.random() < NONE:
            return category.scene(rng, SIZE, SIZE, 0)
        image, points = category.render(rng, SIZE)
        return image, [points]

    support: list[Example] = []
    while kind != "names" and len(support) < 1 + number % 5:
        image, found = draw(1)
        support += [Example(image, found[0])] if found[0].placed.any() else []
    for _ in range(images):
        yield (category, support, *draw(0))


@dataclass(frozen=True)
class Fitted:
    """What one kind of search gave. Errors are calibration errors on kinds that had no part in the fit; None: there was nothing to fit."""

    weights: list[float]
    boxes: int
    right: float
    error_before: float | None = None
    error: float | None = None


def evidence(predictor: Predictor, kind: str, number: int, images: int) -> np.ndarray:
    """(N, 5): the witnesses of each box found in one category's images, and whether it was right."""
    rows = [np.zeros((0, 2 + WITNESSES))]
    for category, support, image, truth in scenes(kind, number, images):
        (found,) = predictor.predict_objects([image], category.schema, support, least=0.0, most=COUNTED)
        boxes = np.array([i.keypoints.box for i in found], np.float64).reshape(-1, 4)
        true = np.array([t.box for t in truth], np.float64).reshape(-1, 4)
        told = witnesses(np.array([i.seen for i in found]), np.array([trust(i.keypoints) for i in found]))
        rows.append(np.column_stack([told, hits(np.array([i.score for i in found]), box_iou(boxes, true))]))
    return np.concatenate(rows)


def calibrate(predictor: Predictor, categories: int, images: int) -> dict[str, Fitted]:
    """Of each kind of search. Each half of the categories judges what the other half fits; what is kept is fitted on all."""
    told: dict[str, Fitted] = {}
    with tqdm(total=len(SEARCHES) * categories, unit=" kind", desc="calibrate", disable=None) as bar:
        for kind in SEARCHES:
            rows = []
            for number in range(categories):
                rows.append(evidence(predictor, kind, number, images))
                bar.update()
            told[kind] = _fitted(np.concatenate(rows[::2]), np.concatenate(rows[1::2]), predictor.model.config.sureness[kind])
    return told


def _fitted(one: np.ndarray, other: np.ndarray, before: Weights) -> Fitted:
    """From the evidence of two halves. Nothing is fitted where a half has no right box, or no wrong one."""
    every = np.concatenate([one, other])
    found = Fitted(list(before), len(every), float(every[:, -1].mean()) if len(every) else 0.0)
    if not all(0 < half[:, -1].sum() < len(half) for half in (one, other)):
        return found
    judged = np.concatenate([sureness(b[:, :-1], fit(a[:, :-1], a[:, -1])) for a, b in ((one, other), (other, one))])
    error = _error(judged, np.concatenate([other, one])[:, -1])
    error_before = _error(sureness(every[:, :-1], before), every[:, -1])
    return replace(found, weights=fit(every[:, :-1], every[:, -1]), error_before=error_before, error=error)


def _error(scores: np.ndarray, right: np.ndarray) -> float | None:
    counted = scores >= FAINT
    return metrics.calibration_error(scores[counted], right[counted])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, or preset, whose config.json is written")
    parser.add_argument("--categories", type=int, default=48, metavar="N", help="rendered kinds for each kind of search (default: %(default)s)")
    parser.add_argument("--images", type=int, default=3, metavar="N", help="of each of them (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")


def run(args: argparse.Namespace) -> int:
    """Fits, says how well it holds on other kinds, and writes. Raises KptError."""
    for name, least in (("categories", 2), ("images", 1)):
        if getattr(args, name) < least:
            raise InvalidInput(f"--{name} {getattr(args, name)} is too small. Expected at least {least}.")
    folder = Path(model_folder(args.model))
    predictor = Predictor(load_checkpoint(folder))
    told = calibrate(predictor, args.categories, args.images)
    for kind, found in told.items():
        share = f"{kind}: {found.boxes} boxes, {found.right:.0%} right"
        if found.error is None:
            print(f"{share}; nothing to fit, the weights stay.", file=sys.stderr)
            continue
        before = "–" if found.error_before is None else f"{found.error_before:.3f}"
        print(f"{share}; calibration error on other kinds {before} → {found.error:.3f}; weights {found.weights}")
    if not args.dry_run:
        save_config(folder, replace(ModelConfig.load(folder), sureness={kind: found.weights for kind, found in told.items()}))
        print(f"Wrote {folder / 'config.json'}.")
    return 0
