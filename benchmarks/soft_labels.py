"""Do confident predictions on unlabelled images help as soft labels? Two rounds on the same few labels, with and without them.

    python benchmarks/soft_labels.py --data DIR [--labels 10] [--unlabelled 40] [--least 0.8] [--seconds 120] [--model nano]

A first round on --labels images; its adapter predicts --unlabelled others (with their true boxes), and points whose confidence is at
least --least become labels. A second round from that adapter then trains on the labels alone, and another on both, as long as the
other. All three are scored on images that none of them saw. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import rounds
from kptllm_core.checkpoint import load_checkpoint
from kptllm_core.dataset import Sample, load_coco, write_coco
from kptllm_core.errors import KptError
from kptllm_core.keypoints import KeypointSet, Visibility
from kptllm_core.predictor import Example, Predictor
from kptllm_core.train import train_adapter

NEAR = 0.1


def measure(model: str, folder: Path, labels: int, unlabelled: int, least: float, seconds: float, seed: int) -> dict[str, Any]:
    """PCK after the first round, and after a second one with and without soft labels; how many there were, and how many were right."""
    data = load_coco(folder)
    samples, schema = [s for s in data.samples if s.keypoints.placed.any()], data.schema
    both, others, _ = rounds.split(samples, labels + unlabelled, seed)
    order = np.random.default_rng(seed).permutation(sorted({s.image_path for s in both}))
    labelled = [s for s in both if s.image_path in set(order[:labels])]
    rest = [s for s in both if s.image_path not in set(order[:labels])]
    support = [Example(s.read(), s.keypoints, str(s.image_path)) for s in labelled[: rounds.SUPPORT]]
    predictor = Predictor(load_checkpoint(model))
    found: dict[str, Any] = {"folder": folder.name, "labels": labels, "unlabelled": len(rest), "base": predictor.base}
    with tempfile.TemporaryDirectory() as work:
        own = rounds.write_subset(Path(work) / "own", folder, labelled)

        def round_(name: str, folders: Sequence[Path], parent: Path | None) -> None:
            target = Path(work) / name
            train_adapter(model, folders, target, parent=parent, seconds=seconds, seed=seed)
            predictor.use_adapter(target)
            found[name] = rounds._scores(predictor, others, schema, support, ("given",))["given"]["pck"]

        round_("first", [own], None)
        soft = [_soft(predictor, s, support, least) for s in rest]
        told = [(s, p) for s, p in zip(rest, soft, strict=True) if p.placed.any()]
        (Path(work) / "soft").mkdir()
        (Path(work) / "soft" / "images").symlink_to((folder / "images").resolve())
        write_coco(Path(work) / "soft", schema, [(s.image_path.name, s.width, s.height, p, s.group) for s, p in told])
        right = [_right(p, s) for s, p in told]
        found["soft"] = sum(int(p.placed.sum()) for _, p in told)
        found["right"] = float(np.concatenate(right).mean()) if right else None
        round_("labels again", [own], Path(work) / "first")
        if told:
            round_("with soft labels", [own, Path(work) / "soft"], Path(work) / "first")
    return found


def _soft(predictor: Predictor, sample: Sample, support: Sequence[Example], least: float) -> KeypointSet:
    (points,) = predictor.predict([sample.read()], sample.schema, support, [sample.keypoints.object_box()])
    sure = points.placed & (points.score >= least)
    return replace(points, visibility=np.where(sure, points.visibility, Visibility.NOT_LABELLED))


def _right(points: KeypointSet, sample: Sample) -> np.ndarray:
    """Of the soft labels whose true place is known: which lie within a tenth of the object's size."""
    known = points.placed & sample.keypoints.placed
    box = sample.keypoints.object_box()
    assert box is not None
    return np.asarray(np.linalg.norm(points.xy - sample.keypoints.xy, axis=1)[known] < NEAR * max(box[2], box[3]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    add("--data", type=Path, required=True, metavar="DIR", help="labelled folder of one category")
    add("--labels", type=int, default=10, help="labelled images (default: %(default)s)")
    add("--unlabelled", type=int, default=40, help="images whose labels are not looked at (default: %(default)s)")
    add("--least", type=float, default=0.8, help="confidence of a soft label (default: %(default)s)")
    add("--seconds", type=float, default=120.0, help="of each round (default: %(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        found = measure(args.model, args.data, args.labels, args.unlabelled, args.least, args.seconds, args.seed)
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    for name in ("first", "labels again", "with soft labels"):
        if name in found:
            print(f"{name:>18}: " + ", ".join(f"@{at} {found[name][at]:.3f}" for at in ("0.05", "0.1")))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
