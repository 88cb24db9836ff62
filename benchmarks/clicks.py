"""What a click is worth to the other points: their error with no, one and three points given at their true place.

    python benchmarks/clicks.py --data ../shared/keypoints/dpk_fly ../shared/keypoints/dlc_horse_walk --queries 60

Given are points at random, and those that the model had worst, as a person would choose them. The error is the mean distance of
the points that are not given, in units of the box's longer side (NME), beside the same points' error without clicks; `pck` counts
those within a tenth. `sem` is the standard error of the difference over images. Boxes are the labelled ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kptllm_core.dataset import Sample, load_coco
from kptllm_core.errors import DataError
from kptllm_core.keypoints import KeypointSet, Visibility
from kptllm_core.metrics import normalised_distance
from kptllm_core.predictor import Example, Predictor, load_predictor

CLICKS = (1, 3)
CHOICES = ("random", "worst")
LEAST = 6  # points that an image must have
NEAR = 0.1


def measure(predictor: Predictor, samples: Sequence[Sample], queries: int, shots: int, seed: int) -> dict[str, dict[str, float]]:
    """"1 random", "3 worst", … → nme and pck of the other points before and after. DataError when there are too few samples."""
    usable = [s for s in samples if s.keypoints.box is not None and s.keypoints.placed.sum() >= LEAST]
    if len(usable) < queries + shots:
        raise DataError(f"{len(usable)} samples have a box and {LEAST} points or more; expected at least {queries + shots}. Ask fewer queries.")
    rng = np.random.default_rng(seed)
    usable = [usable[i] for i in rng.permutation(len(usable))]
    rows: dict[str, list[list[float]]] = {}
    for sample in usable[:queries]:
        shown = [usable[queries + i] for i in rng.choice(len(usable) - queries, shots, replace=False)]
        support = [Example(s.read(), s.keypoints) for s in shown]
        for key, row in _one(predictor, sample, support, rng):
            rows.setdefault(key, []).append(row)
    return {key: _summary(np.array(found)) for key, found in rows.items()}


def _one(predictor: Predictor, sample: Sample, support: Sequence[Example], rng: np.random.Generator) -> Iterator[tuple[str, list[float]]]:
    """Error and share within reach of the points that are not given, before and after."""
    image, truth = sample.read(), sample.keypoints
    assert truth.box is not None
    placed = np.flatnonzero(truth.placed)

    def errors(given: KeypointSet | None) -> np.ndarray:
        (found,) = predictor.predict([image], sample.schema, support, [truth.box], fixed=[given])
        return normalised_distance(found.xy, truth.xy, np.asarray(truth.box))

    before = errors(None)
    for count in CLICKS:
        for choice in CHOICES:
            given = rng.choice(placed, count, replace=False) if choice == "random" else placed[np.argsort(-before[placed])[:count]]
            state = np.full(len(truth.names), Visibility.NOT_LABELLED)
            state[given] = Visibility.VISIBLE
            after = errors(KeypointSet(truth.names, truth.xy, state))
            others = np.setdiff1d(placed, given)
            yield f"{count} {choice}", [v for e in (before[others], after[others]) for v in (float(e.mean()), float((e < NEAR).mean()))]


def _summary(rows: np.ndarray) -> dict[str, float]:
    """rows: (N, 4) nme and pck before, nme and pck after."""
    change = rows[:, 2] - rows[:, 0]
    named = dict(zip(("nme", "pck", "nme_given", "pck_given"), rows.mean(0), strict=True))
    figures = named | {"change": change.mean(), "sem": change.std() / len(change) ** 0.5, "better": (change < 0).mean()}
    return {name: round(float(value), 4) for name, value in figures.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/clicks.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with COCO keypoints")
    parser.add_argument("--model", default="nano", help="a preset or a checkpoint folder")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args(arguments)
    predictor = load_predictor(options.model)
    report: dict[str, Any] = {}
    for folder in options.data:
        samples = max(load_coco(folder).by_category().values(), key=len)
        report[folder.name] = found = measure(predictor, samples, options.queries, options.shots, options.seed)
        for key, f in found.items():
            print(f"{folder.name:20} {key:9} NME {f['nme']:.4f} -> {f['nme_given']:.4f} ({f['change']:+.4f} ± {f['sem']:.4f}), "
                  f"PCK@{NEAR} {f['pck']:.3f} -> {f['pck_given']:.3f}, better in {f['better']:.0%}")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
