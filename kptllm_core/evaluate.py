"""How good is a model? The published protocol → report.json and a table. Uses the Predictor exactly as serving does.

`evaluate` is the whole thing; `score_predictor` is the small one that training rounds use on held-out images. Both go
through `predict_and_measure`. The baseline `CopyPredictor` looks at no pixel and stands beside every figure.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from kptllm_core import metrics, report
from kptllm_core.dataset import Sample, load_coco
from kptllm_core.draw import contact_sheet
from kptllm_core.errors import DataError, ImageError, InvalidInput, TooLarge
from kptllm_core.imaging import read_image
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.protocol import (
    BOXES,
    Category,
    Episode,
    Query,
    box_handed,
    draw_episodes,
    draw_query,
    shuffled,
    stream,
    true_box,
    turn,
)
from kptllm_core.report import Measured, NamedPoint, Pair

Draw = Callable[[str, list[Any], list[Any], KeypointSchema], None]  # category, [(image, truth)], [(image, predicted, truth)], schema
PROMPTS = ("visual", "text", "both")
TASKS = ("detect", "name")
BATCH = 16  # images handed to the predictor at once by `score_predictor`


class PointPredictor(Protocol):
    """What is needed of a predictor to measure it: `kptllm_core.predictor.Predictor` and `CopyPredictor` have it."""

    base: str

    def predict(self, images: list[np.ndarray], schema: KeypointSchema, support: Sequence[Example] = (),
                boxes: Sequence[np.ndarray | None] | None = None, prompt: str = "auto",
                asked: list[str] | None = None) -> list[KeypointSet]: ...  # fmt: skip


class CopyPredictor:
    """The baseline: each support point at the same offset from the query box's centre, in units of max(w, h).

    With several supports the offsets' mean; without a box the whole image is taken as the box. It looks at no pixel.
    """

    base = "copy"

    def predict(self, images: list[np.ndarray], schema: KeypointSchema, support: Sequence[Example] = (),
                boxes: Sequence[np.ndarray | None] | None = None, prompt: str = "auto",
                asked: list[str] | None = None) -> list[KeypointSet]:  # fmt: skip
        if not support:
            raise InvalidInput("Copying needs at least one support example.")
        names = tuple(asked) if asked is not None else schema.names
        offsets, placed = [], []
        for example in support:
            points = example.keypoints.reorder(names)
            box = true_box(example.keypoints)
            offsets.append((points.xy - (box[:2] + box[2:] / 2)) / max(box[2:].max(), 1.0))
            placed.append(points.placed)
        known = np.array(placed)  # (shots, K)
        mean = (np.array(offsets) * known[..., None]).sum(0) / np.maximum(known.sum(0), 1)[:, None]
        visibility = np.where(known.any(0), Visibility.VISIBLE, Visibility.NOT_LABELLED)
        results = []
        for image, box in zip(images, boxes or [None] * len(images), strict=True):
            where = np.array([0, 0, image.shape[1], image.shape[0]]) if box is None else np.asarray(box, np.float64)
            xy = where[:2] + where[2:] / 2 + mean * max(where[2:].max(), 1.0)
            results.append(KeypointSet(names, xy, visibility, known.mean(0), where))
        return results


@dataclass(frozen=True)
class Options:
    """How to evaluate; stands in the report as it was used."""

    shots: int = 1  # support objects of an episode
    episodes: int = 200  # per category
    queries: int = 15  # per episode
    seed: int = 1  # of everything random
    prompt: str = "both"  # what the model is shown: visual, text or both
    boxes: str = "given"  # the query's true box, a jittered one, or none (the object must be found)
    rotate: bool = False  # turn each query by a random angle
    task: str = "detect"  # detect points, or name points that are given

    def __post_init__(self) -> None:
        for value, allowed, flag in ((self.prompt, PROMPTS, "--prompt"), (self.boxes, BOXES, "--boxes"), (self.task, TASKS, "--task")):
            if value not in allowed:
                raise InvalidInput(f"{flag} {value} is not known. Expected one of: {', '.join(allowed)}.")
        least = 0 if self.prompt == "text" or self.task == "name" else 1
        for name, minimum in (("shots", least), ("episodes", 1), ("queries", 1), ("seed", 0)):
            number, flag = getattr(self, name), f"--{name}"
            if number < minimum:
                why = " (0 is possible with --prompt text only)" if name == "shots" else ""
                raise InvalidInput(f"{flag} {number} is too small. Expected at least {minimum}{why}.")
        if self.shots > 10:
            raise InvalidInput(f"--shots {self.shots} is too many. A prompt holds at most 10 support examples.")


def measure(predicted: KeypointSet, truth: KeypointSet, counted: np.ndarray) -> Measured:
    """Distances and scores of the `counted` (K,) points of the truth. A point without a predicted position is `MISSED`."""
    predicted = predicted.reorder(truth.names)
    distance = metrics.normalised_distance(predicted.xy, truth.xy, true_box(truth))
    distance = np.where(predicted.visibility == Visibility.NOT_LABELLED, metrics.MISSED, distance)
    names = tuple(name for name, counts in zip(truth.names, counted, strict=True) if counts)
    return Measured(names, distance[counted], predicted.score[counted].astype(np.float64))


def predict_and_measure(predictor: PointPredictor, images: list[np.ndarray], truths: list[KeypointSet], schema: KeypointSchema,
                        support: Sequence[Example], boxes: Sequence[np.ndarray | None], prompt: str = "auto",
                        counted_in: Sequence[KeypointSet] = ()) -> tuple[list[Measured], list[KeypointSet]]:  # fmt: skip
    """The one scoring path. Points count that are placed in the truth and in every set of `counted_in` (the supports)."""
    predicted = predictor.predict(images, schema, support=support, boxes=list(boxes), prompt=prompt)
    shared = np.ones(len(truths[0]) if truths else 0, bool)
    for other in counted_in:
        shared = shared & other.reorder(truths[0].names).placed
    return [measure(p, t, t.placed & shared) for p, t in zip(predicted, truths, strict=True)], predicted


def score_predictor(predictor: PointPredictor, samples: Sequence[tuple[np.ndarray, KeypointSet]], schema: KeypointSchema,
                    support: Sequence[Example], boxes: str = "found") -> dict[str, Any]:  # fmt: skip
    """The accuracy on labelled images as serving would answer them: every placed point counts, objects without any are left out.

    samples: (image (H, W, 3) uint8, truth) each; boxes: `found` hands over no box, `given` the true one.
    Returns {"pck": {"0.02", …}, "nme": float or None without points, "points": n, "images": n}.
    """
    if boxes not in ("found", "given"):
        raise InvalidInput(f"boxes '{boxes}' is not known. Expected found or given.")
    useful = [(image, truth.reorder(schema.names)) for image, truth in samples if truth.reorder(schema.names).placed.any()]
    measured: list[Measured] = []
    for start in range(0, len(useful), BATCH):
        images, truths = (list(part) for part in zip(*useful[start : start + BATCH], strict=True))
        handed = [box_handed(true_box(t), boxes, (0, 0, 0)) for t in truths]
        measured += predict_and_measure(predictor, images, truths, schema, support, handed)[0]
    distances = [m.distance for m in measured]
    return {"pck": report.pck_table(distances), "nme": metrics.nme(distances),
            "points": sum(map(len, distances)), "images": len(distances)}  # fmt: skip


def evaluate(predictor: Predictor, categories: Sequence[Category], options: Options, draw: Draw | None = None) -> dict[str, Any]:
    """The report of a model on some categories. `draw` gets the first readable episode of each."""
    run = _naming if options.task == "name" else _detection
    return {"base": predictor.base, **run(predictor, categories, options, draw), "arguments": asdict(options)}


def _detection(predictor: PointPredictor, categories: Sequence[Category], options: Options, draw: Draw | None) -> dict[str, Any]:
    pairs: list[Pair] = []
    unreadable: set[str] = set()
    undrawn = {c.name for c in categories} if draw else set()
    seconds = 0.0
    plan = [(category, episode) for category in categories for episode in _episodes(category, options)]
    for category, episode in _progress(plan):
        schema = shuffled(category.schema, episode.order)
        support = [(image, truth) for image, truth, _ in _read(map(_upright, episode.support), schema, unreadable)]
        queries = _read(episode.queries, schema, unreadable)
        if len(support) < len(episode.support) or not queries:
            continue
        images, truths, asked = (list(part) for part in zip(*queries, strict=True))
        shown = [Example(image, truth) for image, truth in support]
        boxes = [box_handed(true_box(t), options.boxes, q.jitter) for t, q in zip(truths, asked, strict=True)]
        begin = time.perf_counter()
        model, predicted = predict_and_measure(predictor, images, truths, schema, () if options.prompt == "text" else shown, boxes,
                                               options.prompt, counted_in=[e.keypoints for e in shown])  # fmt: skip
        seconds += time.perf_counter() - begin
        copy: Sequence[Measured | None] = [None] * len(truths)
        if shown:
            copy = predict_and_measure(CopyPredictor(), images, truths, schema, shown, [true_box(t) for t in truths],
                                       counted_in=[e.keypoints for e in shown])[0]  # fmt: skip
        pairs += [Pair(category.name, q.index, mine, copied) for q, mine, copied in zip(asked, model, copy, strict=True)]
        if draw and category.name in undrawn:
            undrawn.remove(category.name)
            draw(category.name, support, list(zip(images, predicted, truths, strict=True)), schema)
    if not pairs:
        raise DataError(f"None of the {len(unreadable)} images could be read. Check the folder 'images'.")
    return report.detection(pairs, seconds / len(pairs), sorted(unreadable))


def _naming(predictor: Predictor, categories: Sequence[Category], options: Options, draw: Draw | None) -> dict[str, Any]:
    """Each placed point of up to episodes × queries objects is named: among all names, then among the category's own."""
    points: list[NamedPoint] = []
    unreadable: set[str] = set()
    plan = [(category, query) for category in categories for query in _objects(category, options)]
    seconds = 0.0
    for category, query in _progress(plan):
        for image, truth, _ in _read([query], category.schema, unreadable):
            box = box_handed(true_box(truth), options.boxes, query.jitter)
            xy, true = truth.xy[truth.placed], [n for n, p in zip(truth.names, truth.placed, strict=True) if p]
            begin = time.perf_counter()
            free = predictor.name_points(image, xy, box=box)
            seconds += time.perf_counter() - begin
            closed = predictor.name_points(image, xy, box=box, candidates=list(category.schema.names))
            points += [NamedPoint(category.name, t, f[0], c[0]) for t, f, c in zip(true, free, closed, strict=True)]
    if not points:
        raise DataError("There is no labelled point in a readable image. Check the folder.")
    return report.naming(points, seconds / max(len(plan) - len(unreadable), 1), sorted(unreadable))


def _episodes(category: Category, options: Options) -> list[Episode]:
    draw = partial(draw_episodes, category, episodes=options.episodes, queries=options.queries, seed=options.seed, rotate=options.rotate)
    try:
        return draw(shots=options.shots)
    except DataError:
        if options.prompt != "text" or options.shots == 0:
            raise
        return draw(shots=0)  # text prompts need no support; only copy goes without


def _objects(category: Category, options: Options) -> list[Query]:
    rng = stream(category.name, options.seed)
    count = min(options.episodes * options.queries, len(category.samples))
    chosen = rng.choice(len(category.samples), size=count, replace=False)
    return [draw_query(category.samples[i], int(i), rng, options.rotate) for i in chosen]


def _upright(sample: Sample) -> Query:
    return Query(sample, -1, 0.0, (0.0, 0.0, 0.0))


def _read(queries: Iterable[Query], schema: KeypointSchema, unreadable: set[str]) -> list[tuple[np.ndarray, KeypointSet, Query]]:
    """(image, truth in the order of the schema, query) of each; images that cannot be read are noted and left out."""
    found = []
    for query in queries:
        path = query.sample.image_path
        try:
            image = _image(path)
        except (ImageError, TooLarge) as error:
            if str(path) not in unreadable:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            unreadable.add(str(path))
            continue
        turned, truth = turn(image, query.sample.keypoints.reorder(schema.names), query.degrees)
        found.append((turned, truth, query))
    return found


@lru_cache(maxsize=512)
def _image(path: Path) -> np.ndarray:
    return read_image(path)


def _progress(plan: Sequence[tuple[Category, Any]]) -> Iterator[tuple[Category, Any]]:
    with tqdm(plan, unit=" episode", disable=None) as bar:
        for category, item in bar:
            bar.set_description(category.name, refresh=False)
            yield category, item


def load_categories(folders: Sequence[Path], support: Path | None = None) -> list[Category]:
    """The categories of COCO folders, with the supports of another folder if one is named. DataError says what is missing."""
    pool = _by_category(support) if support else {}
    found: dict[str, Category] = {}
    for folder in folders:
        for name, samples in _by_category(folder).items():
            supports = _matching(name, samples[0].schema, pool, support) if support else samples
            key = name if name not in found else f"{folder.name}/{name}"
            if key in found:
                raise DataError(f"Category '{name}' of {folder} is given twice. Name each folder once.")
            found[key] = Category(key, samples[0].schema, samples, supports)
    return list(found.values())


def _by_category(folder: Path) -> dict[str, list[Sample]]:
    """The usable objects (at least one placed point) of each category of a folder."""
    grouped: dict[str, list[Sample]] = {}
    for sample in load_coco(folder).samples:
        if sample.keypoints.placed.any():
            grouped.setdefault(sample.category, []).append(sample)
    if not grouped:
        raise DataError(f"{folder} has no object with a labelled keypoint. Expected COCO keypoints in annotations.json.")
    return grouped


def _matching(name: str, schema: KeypointSchema, pool: dict[str, list[Sample]], folder: Path | None) -> list[Sample]:
    """The supports for a category: of the same name, else the only category there if it has the same points."""
    samples = pool.get(name) or (next(iter(pool.values())) if len(pool) == 1 else [])
    if not samples or not set(schema.names) & set(samples[0].schema.names):
        raise DataError(f"The support folder {folder} has no category '{name}' with any of its points. Found: {', '.join(pool)}.")
    return samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m kptllm_core evaluate`."""
    default = Options()
    add = parser.add_argument
    add("--model", default="nano", help="preset (nano, tiny) or checkpoint folder (default: %(default)s)")
    add("--untrained", action="store_true", help="random weights of the same architecture: what the training is worth")
    add("--adapter", type=Path, metavar="DIR", help="LoRA adapter folder made for this model")
    add("--data", type=Path, metavar="DIR", action="append", required=True, help="folder with annotations.json and images/; may be repeated")
    add("--support", type=Path, metavar="DIR", help="draw the support examples from this folder (default: from --data)")
    add("--shots", type=int, default=default.shots, metavar="N", help="support objects of an episode, 1 to 10 (default: %(default)s)")
    add("--episodes", type=int, default=default.episodes, metavar="N", help="episodes per category (default: %(default)s)")
    add("--queries", type=int, default=default.queries, metavar="N", help="queries per episode (default: %(default)s)")
    add("--seed", type=int, default=default.seed, metavar="N", help="of everything random (default: %(default)s)")
    add("--prompt", choices=PROMPTS, default=default.prompt, help="what the model is shown (default: %(default)s)")
    add("--boxes", choices=BOXES, default=default.boxes,
        help="given: the true box, as in the protocol; jittered: moved and scaled a little; found: none, as in serving (default: %(default)s)")
    add("--rotate", action="store_true", help="turn each query in the plane by a random angle")
    add("--task", choices=TASKS, default=default.task, help="detect: find the points; name: name given points (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--draw", type=Path, metavar="DIR", help="also write one picture per category: supports, predicted and true points")
    add("--out", type=Path, metavar="FILE", default=Path("report.json"), help="the report (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say; writes the report, prints the table. Raises KptError."""
    options = Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
    categories = load_categories(args.data, args.support)
    predictor = load_predictor(args.model, adapter=args.adapter, device=args.device, untrained=args.untrained)
    draw = partial(write_sheet, args.draw) if args.draw else None
    result = evaluate(predictor, categories, options, draw)
    result["arguments"] |= {"model": str(args.model), "untrained": args.untrained, "adapter": _text(args.adapter),
                            "data": [str(d) for d in args.data], "support": _text(args.support), "device": args.device}  # fmt: skip
    report.write_json(args.out, result)
    print(report.table(result), f"The report is in {args.out}.", sep="\n")  # noqa: T201 - the command's answer
    return 0


def write_sheet(folder: Path, name: str, support: list[Any], queries: list[Any], schema: KeypointSchema) -> None:
    """One picture of an episode: `folder`/<category>.png with its supports and at most four queries."""
    folder.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.-]+", "_", name)
    Image.fromarray(contact_sheet(support, queries[:4], schema)).save(folder / f"{safe}.png")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
