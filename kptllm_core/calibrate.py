"""How likely is a box right that the model found? Fits `ModelConfig.sureness` of a checkpoint: the `calibrate` command.

Rendered kinds that no training has seen: images that one object fills, and scenes of none to twelve, searched as serving does, with
examples and by names alone. Half of the kinds fit the weights, the other half tell how well they hold. Only `config.json` changes; the
weights, and what was trained on them, stay valid.
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
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.crowds import hits
from kptllm_core.errors import InvalidInput
from kptllm_core.finder import COUNTED, FAINT
from kptllm_core.instances import box_iou
from kptllm_core.keypoints import KeypointSet
from kptllm_core.predictor import Example, Predictor
from kptllm_core.sureness import KINDS, Weights, fit, sureness, trust
from kptllm_core.synthetic import Category

SIZE = 384  # of the images, pixels
CROWD = 12  # objects of a scene at most
FEW = 4  # the same, where names alone tell what to look for
SEED = 2027  # kinds are drawn from it: others than training draws


def scenes(kind: str, number: int, images: int) -> Iterator[tuple[Category, list[Example], np.ndarray, list[KeypointSet]]]:
    """(category, support, image, true objects) of one rendered category, for one kind of search."""
    rng = np.random.default_rng([SEED, KINDS.index(kind), number])
    category = Category.sample(rng)

    def draw(least: int) -> tuple[np.ndarray, list[KeypointSet]]:
        if kind == "whole":
            image, points = category.render(rng, SIZE)
            return image, [points]
        return category.scene(rng, SIZE, SIZE, int(rng.integers(least, (FEW if kind == "names" else CROWD) + 1)))

    support: list[Example] = []
    while kind != "names" and len(support) < 1 + number % 5:
        image, found = draw(1)
        support += [Example(image, found[0])] if found[0].placed.any() else []
    for _ in range(images):
        yield (category, support, *draw(0))


@dataclass(frozen=True)
class Fitted:
    """What one kind of search gave. Errors are calibration errors on the kinds that fitted nothing; None: there was nothing to fit."""

    weights: list[float]
    boxes: int
    right: float
    error_before: float | None = None
    error: float | None = None


def evidence(predictor: Predictor, kind: str, number: int, images: int) -> np.ndarray:
    """(N, 3): what the head said, trust in the points, and whether it was right, of each box found in one category's images."""
    rows = [np.zeros((0, 3))]
    for category, support, image, truth in scenes(kind, number, images):
        (found,) = predictor.predict_objects([image], category.schema, support, least=0.0, most=COUNTED)
        boxes = np.array([i.keypoints.box for i in found], np.float64).reshape(-1, 4)
        true = np.array([t.box for t in truth], np.float64).reshape(-1, 4)
        right = hits(np.array([i.score for i in found]), box_iou(boxes, true))
        rows.append(np.array([(i.seen, trust(i.keypoints), r) for i, r in zip(found, right, strict=True)], np.float64).reshape(-1, 3))
    return np.concatenate(rows)


def calibrate(predictor: Predictor, categories: int, images: int) -> dict[str, Fitted]:
    """Of each kind of search; every other category fits, the rest judge."""
    told: dict[str, Fitted] = {}
    with tqdm(total=len(KINDS) * categories, unit=" kind", desc="calibrate", disable=None) as bar:
        for kind in KINDS:
            rows = []
            for number in range(categories):
                rows.append(evidence(predictor, kind, number, images))
                bar.update()
            own, others = np.concatenate(rows[::2]), np.concatenate(rows[1::2])
            before = predictor.model.config.sureness[kind]
            told[kind] = Fitted(before, len(own), float(own[:, 2].mean()) if len(own) else 0.0)
            if 0 < told[kind].right < 1:
                weights = fit(own[:, 0], own[:, 1], own[:, 2])
                told[kind] = replace(told[kind], weights=weights, error_before=_error(others, before), error=_error(others, weights))
    return told


def _error(rows: np.ndarray, weights: Weights) -> float | None:
    scores = np.array([sureness(seen, trusted, weights) for seen, trusted, _ in rows])
    counted = scores >= FAINT
    return metrics.calibration_error(scores[counted], rows[counted, 2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder, or preset, whose config.json is written")
    parser.add_argument("--categories", type=int, default=16, metavar="N", help="rendered kinds for each kind of search (default: %(default)s)")
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
        print(f"{share}; calibration error on other kinds {found.error_before:.3f} → {found.error:.3f}; weights {found.weights}")
    if not args.dry_run:
        save_config(folder, replace(ModelConfig.load(folder), sureness={kind: found.weights for kind, found in told.items()}))
        print(f"Wrote {folder / 'config.json'}.")
    return 0
