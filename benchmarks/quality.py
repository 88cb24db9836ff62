"""Are wrong labels found? Plants mistakes in a folder of true labels, and counts which are found and what else is said.

    python benchmarks/quality.py --data DIR [--kind swapped] [--share 0.05] [--model nano|none] [--shots 5] [--out quality.json]

`swapped`: a share of the pairs of left and right exchange their names, each by chance; `misnamed`: on a share of the objects two
points that are no pair do; `one_sided`: of a pair one is taken away and the other gets its name; `far_off`: on a share of the
objects one point is moved by 0.3 to 0.6 of the object's size; `left_out`: on a share of the objects one point is taken away. Each kind is
planted in a copy of its own; findings of points left out count for that kind alone.

Who bears witness is told apart: the layout of the other labelled images, the model's predictions (from --shots examples, by the
true boxes; perhaps with an adapter), both together, and the naming task (--naming), which asks the model for the name of each
labelled point. Precision is the share of findings that name a planted mistake, recall the share of planted mistakes that are
named; `images` counts whole images instead. `as_is` is what is said about the labels as they are: every one of them a false
alarm, or a mistake of the data. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backend.evidence import Subject
from backend.quality import MISSING, Finding, find
from kptllm_core.dataset import Sample, load_coco
from kptllm_core.draw import draw_keypoints
from kptllm_core.errors import DataError, KptError
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.protocol import true_box, with_box

KINDS = ("swapped", "misnamed", "one_sided", "far_off", "left_out")
LEVELS = (0.5, 0.8, 0.9)
BATCH = 16
Mistake = tuple[int, frozenset[str]]  # subject, and the points that it is about


def plant(
    samples: Sequence[Sample], kind: str, share: float, rng: np.random.Generator
) -> tuple[list[KeypointSet], set[Mistake], int]:
    """(the labels with mistakes in them, the mistakes, how many there could have been)."""
    schema, planted, found, chances = samples[0].schema, set(), [], 0
    pairs = {frozenset(p) for p in schema.symmetric}
    for n, sample in enumerate(samples):
        points = sample.keypoints
        xy, seen = points.xy.copy(), points.visibility.copy()
        placed = np.flatnonzero(points.placed)
        both = [(a, b) for a, b in schema.symmetric if points.placed[a] and points.placed[b]]
        others = [(a, b) for a in placed for b in placed if a < b and frozenset((a, b)) not in pairs]
        chances += len(both) if kind == "swapped" else 1
        if kind == "swapped":
            for a, b in both:
                if rng.random() < share:
                    xy[[a, b]] = xy[[b, a]]
                    planted.add((n, frozenset((schema.names[a], schema.names[b]))))
        elif kind == "misnamed" and others and rng.random() < share:
            a, b = others[rng.integers(len(others))]
            xy[[a, b]] = xy[[b, a]]
            planted.add((n, frozenset((schema.names[a], schema.names[b]))))
        elif kind == "one_sided" and both and rng.random() < share:
            a, b = both[rng.integers(len(both))]
            xy[a], seen[b] = xy[b], Visibility.NOT_LABELLED
            planted.add((n, frozenset((schema.names[a], schema.names[b]))))
        elif kind == "far_off" and len(placed) and rng.random() < share:
            k, angle = int(rng.choice(placed)), rng.uniform(0, 2 * np.pi)
            size = float(max(true_box(with_box(points, np.zeros((sample.height, sample.width, 3), np.uint8)))[2:]))
            xy[k] += np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.3, 0.6) * size
            planted.add((n, frozenset((schema.names[k],))))
        elif kind == "left_out" and len(placed) and rng.random() < share:
            k = int(rng.choice(placed))
            seen[k] = Visibility.NOT_LABELLED
            planted.add((n, frozenset((schema.names[k],))))
        found.append(KeypointSet(points.names, xy, seen, points.score, points.box))
    return found, planted, chances


def subjects(
    samples: Sequence[Sample], labels: Sequence[KeypointSet], predicted: Sequence[KeypointSet | None]
) -> list[Subject]:
    return [
        Subject(n, n, label, sample.group, guess, 0, (sample.width, sample.height))
        for n, (sample, label, guess) in enumerate(zip(samples, labels, predicted, strict=True))
    ]


def named_in(finding: Finding) -> set[Mistake]:
    """What a finding says is wrong, as planted mistakes are told."""
    n, points = finding.subject.task, finding.points
    if finding.kind in ("far_off", MISSING):
        return {(n, frozenset(points))}
    return {(n, frozenset(points[i : i + 2])) for i in range(0, len(points), 2)}


def concerned(findings: Sequence[Finding], kind: str) -> list[Finding]:
    """Those that such planted mistakes may bring."""
    return [f for f in findings if (f.kind == MISSING) == (kind == "left_out")]


def score(findings: Sequence[Finding], planted: set[Mistake]) -> list[dict[str, Any]]:
    """Precision and recall at each of LEVELS. A point called far off that was exchanged is no false alarm, nor a hit."""
    touched = {(n, name) for n, names in planted for name in names}
    rows = []
    for level in LEVELS:
        told = [f for f in findings if f.confidence >= level]
        hits = [f for f in told if named_in(f) & planted]
        near = [f for f in told if f not in hits and any((f.subject.task, p) in touched for p in f.points)]
        counted = len(told) - len(near)
        found = {m for f in told for m in named_in(f)} & planted
        images, wrong = {f.subject.task for f in told}, {n for n, _ in planted}
        rows.append(
            {
                "level": level,
                "findings": len(told),
                "precision": _share(len(hits), counted),
                "recall": _share(len(found), len(planted)),
                "image_precision": _share(len(images & wrong), len(images)),
                "image_recall": _share(len(images & wrong), len(wrong)),
            }
        )
    return rows


def by_naming(
    names: Sequence[Sequence[tuple[str, float]]], labels: Sequence[KeypointSet], schema: KeypointSchema
) -> set[Mistake]:
    """The pairs whose points the naming task calls by each other's names. names: of each object's placed points, in order."""
    found = set()
    for n, (told, points) in enumerate(zip(names, labels, strict=True)):
        called = dict(zip(np.flatnonzero(points.placed), told, strict=True))
        for a, b in schema.symmetric:
            if a in called and b in called and (called[a][0], called[b][0]) == (schema.names[b], schema.names[a]):
                found.add((n, frozenset((schema.names[a], schema.names[b]))))
    return found


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def predictions(args: argparse.Namespace, samples: Sequence[Sample]) -> list[KeypointSet | None]:
    """The model's answer for every object but the examples, from their true labels, by the true boxes."""
    from kptllm_core.predictor import Example, load_predictor

    predictor = load_predictor(args.model, args.adapter, args.device)
    rng = np.random.default_rng(args.seed)
    groups = list(dict.fromkeys(s.group for s in samples))
    shown = [next(s for s in samples if s.group == groups[i]) for i in rng.permutation(len(groups))[: args.shots]]
    support = [Example(s.read(), s.keypoints) for s in shown]
    found: list[KeypointSet | None] = [None] * len(samples)
    asked = [n for n, s in enumerate(samples) if all(s is not e for e in shown)]
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        images = [samples[n].read() for n in part]
        boxes = [true_box(with_box(samples[n].keypoints, i)) for n, i in zip(part, images, strict=True)]
        for n, points in zip(part, predictor.predict(images, samples[0].schema, support, boxes), strict=True):
            found[n] = points
    return found


def names_of(
    args: argparse.Namespace, samples: Sequence[Sample], labels: Sequence[KeypointSet]
) -> list[list[tuple[str, float]]]:
    """The naming task on every placed point, choosing among the names of the schema."""
    from kptllm_core.predictor import load_predictor

    predictor = load_predictor(args.model, args.adapter, args.device)
    found = []
    for sample, points in zip(samples, labels, strict=True):
        image = sample.read()
        box = true_box(with_box(points, image))
        found.append(predictor.name_points(image, points.xy[points.placed], box, sample.schema.names))
    return found


def draw(folder: Path, samples: Sequence[Sample], findings: Sequence[Finding], planted: set[Mistake]) -> None:
    """The surest findings as pictures: as labelled, and as suggested; the file's name says whether it was planted."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, finding in enumerate(findings[:24]):
        sample, points = samples[finding.subject.task], finding.subject.labelled
        only = [name in finding.points for name in points.names]
        xy = np.array([finding.suggested.get(n, p) for n, p in zip(points.names, points.xy, strict=True)])
        there = np.array([name in finding.suggested for name in points.names])
        suggested = KeypointSet(points.names, xy, np.where(there, 2, 0))
        labelled = KeypointSet(points.names, points.xy, np.where(only, points.visibility, 0), box=points.box)
        image = sample.read()
        sheet = [draw_keypoints(image, p, sample.schema) for p in (labelled, suggested)]
        truth = "planted" if named_in(finding) & planted else "not-planted"
        name = f"{number:02}-{finding.kind}-{finding.confidence:.2f}-{truth}.jpg"
        Image.fromarray(np.concatenate(sheet, 1)).save(folder / name, quality=85)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with annotations.json and images/")
    parser.add_argument("--kind", choices=KINDS, default="swapped")
    parser.add_argument("--share", type=float, default=0.05, help="of pairs, or objects (default: %(default)s)")
    parser.add_argument("--images", type=int, default=0, help="so many objects only, drawn by chance (0: all)")
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder; none: the layout alone")
    parser.add_argument("--adapter", help="folder of an adapter, as a round leaves it")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--naming", action="store_true", help="ask the naming task, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", type=Path, help="folder for pictures of the findings")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        report = run(args)
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    samples = load_coco(args.data).samples
    rng = np.random.default_rng(args.seed)
    if args.images and len(samples) > args.images:
        samples = [samples[i] for i in sorted(rng.permutation(len(samples))[: args.images])]
    schema = samples[0].schema
    if not schema.symmetric and args.kind in ("swapped", "one_sided"):
        raise DataError(f"{args.data} has no pairs of left and right points. Choose --kind misnamed or far_off.")
    labels, planted, chances = plant(samples, args.kind, args.share, rng)
    nothing: list[KeypointSet | None] = [None] * len(samples)
    predicted = nothing if args.model == "none" else predictions(args, samples)
    report: dict[str, Any] = {
        "data": args.data.name, "kind": args.kind, "objects": len(samples), "planted": len(planted), "of": chances,
        "seed": args.seed, "model": args.model, "shots": args.shots, "adapter": bool(args.adapter), "witnesses": {},
    }  # fmt: skip
    ways = {"layout": (nothing, True)}
    if args.model != "none":
        ways |= {"model": (predicted, False), "both": (predicted, True)}
    for name, (told, layout) in ways.items():
        begin = time.perf_counter()
        findings = concerned(find(subjects(samples, labels, told), schema, use_layout=layout), args.kind)
        seconds = time.perf_counter() - begin
        as_is = concerned(find(subjects(samples, [s.keypoints for s in samples], told), schema, use_layout=layout), args.kind)
        rows = score(findings, planted)
        report["witnesses"][name] = {
            "levels": rows,
            "as_is": len(as_is),
            "seconds": round(seconds, 2),
        }
        for row in rows:
            print(f"{name:>7}  " + "  ".join(f"{k} {v}" for k, v in row.items()))
    if args.draw:
        draw(args.draw, samples, findings, planted)
    if args.naming and args.model != "none":
        said = by_naming(names_of(args, samples, labels), labels, schema)
        report["witnesses"]["naming"] = {
            "precision": _share(len(said & planted), len(said)),
            "recall": _share(len(said & planted), len(planted)),
            "findings": len(said),
        }
        print(f" naming  {report['witnesses']['naming']}")
    return report


if __name__ == "__main__":
    sys.exit(main())
