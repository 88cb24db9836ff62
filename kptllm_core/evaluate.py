"""How good is a model? Runs the protocol over categories → report.json and a table: the `evaluate` command.

Draws episodes (`protocol.py`), asks the Predictor exactly as serving does (`scoring.py`), sums up (`report.py`). The
copy baseline stands beside every figure.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from kptllm_core import report
from kptllm_core.dataset import Sample
from kptllm_core.draw import contact_sheet
from kptllm_core.episodes import Images
from kptllm_core.errors import DataError, ImageError, InvalidInput, TooLarge
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.protocol import (
    BOXES,
    Category,
    Episode,
    Query,
    box_handed,
    draw_episodes,
    draw_query,
    load_categories,
    shuffled,
    stream,
    true_box,
    turn,
    with_box,
)
from kptllm_core.report import Measured, NamedPoint, Pair
from kptllm_core.scoring import CopyPredictor, Question, predict_and_measure, score_predictor

__all__ = ["CopyPredictor", "Options", "add_arguments", "evaluate", "load_categories", "run", "score_predictor"]

Answered = tuple[np.ndarray, KeypointSet, KeypointSet]  # image, predicted, truth
Draw = Callable[[str, KeypointSchema, list[Example], list[Answered]], None]  # category, its schema, support, queries
PROMPTS = ("visual", "text", "both")
TASKS = ("detect", "name")
DECODED = 512  # images kept in memory


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
        for value, allowed, flag in (
            (self.prompt, PROMPTS, "--prompt"),
            (self.boxes, BOXES, "--boxes"),
            (self.task, TASKS, "--task"),
        ):
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


def evaluate(
    predictor: Predictor, categories: Sequence[Category], options: Options, draw: Draw | None = None
) -> dict[str, Any]:
    """The report of a model on some categories. `draw` gets the first readable episode of each."""
    run = _naming if options.task == "name" else _detection
    return {"base": predictor.base, **run(predictor, categories, options, draw), "arguments": asdict(options)}


def _detection(
    predictor: Predictor, categories: Sequence[Category], options: Options, draw: Draw | None
) -> dict[str, Any]:
    pairs: list[Pair] = []
    reader = _Reader()
    undrawn = {c.name for c in categories} if draw else set()
    seconds = 0.0
    plan = [(category, episode) for category in categories for episode in _episodes(category, options)]
    for category, episode in _progress(plan):
        schema = shuffled(category.schema, episode.order)
        support = [Example(image, truth) for image, truth, _ in reader.read(map(_upright, episode.support), schema)]
        queries = reader.read(episode.queries, schema)
        if len(support) < len(episode.support) or not queries:
            continue
        questions = [Question(i, t, box_handed(true_box(t), options.boxes, q.jitter)) for i, t, q in queries]
        shown = [] if options.prompt == "text" else support
        begin = time.perf_counter()
        model, predicted = predict_and_measure(predictor, questions, schema, shown, options.prompt, support)
        seconds += time.perf_counter() - begin
        copy: Sequence[Measured | None] = [None] * len(queries)
        if support:
            boxed = [Question(i, t, true_box(t)) for i, t, _ in queries]
            copy = predict_and_measure(CopyPredictor(), boxed, schema, support, counted_in=support)[0]
        for (_, _, query), mine, copied in zip(queries, model, copy, strict=True):
            pairs.append(Pair(category.name, query.index, mine, copied))
        if draw and category.name in undrawn:
            undrawn.remove(category.name)
            draw(
                category.name,
                schema,
                support,
                [(q.image, p, q.truth) for q, p in zip(questions, predicted, strict=True)],
            )
    if not pairs:
        raise DataError(f"None of the {len(reader.unreadable)} images could be read. Check the folder 'images'.")
    return report.detection(pairs, seconds / len(pairs), sorted(reader.unreadable))


def _naming(
    predictor: Predictor, categories: Sequence[Category], options: Options, draw: Draw | None
) -> dict[str, Any]:
    """Names each placed point of up to episodes × queries objects: among all names, then among the category's own."""
    points: list[NamedPoint] = []
    reader = _Reader()
    seconds, images = 0.0, 0
    for category, query in _progress([(c, q) for c in categories for q in _objects(c, options)]):
        own = list(category.schema.names)
        for image, truth, _ in reader.read([query], category.schema):
            box = box_handed(true_box(truth), options.boxes, query.jitter)
            xy = truth.xy[truth.placed]
            true = [name for name, placed in zip(own, truth.placed, strict=True) if placed]
            begin = time.perf_counter()
            free = predictor.name_points(image, xy, box=box)
            seconds, images = seconds + time.perf_counter() - begin, images + 1
            closed = predictor.name_points(image, xy, box=box, candidates=own)
            points += [NamedPoint(category.name, t, f[0], c[0]) for t, f, c in zip(true, free, closed, strict=True)]
    if not points:
        raise DataError(f"None of the {len(reader.unreadable)} images could be read. Check the folder 'images'.")
    return report.naming(points, seconds / images, sorted(reader.unreadable))


def _episodes(category: Category, options: Options) -> list[Episode]:
    draw = partial(
        draw_episodes,
        category,
        episodes=options.episodes,
        queries=options.queries,
        seed=options.seed,
        rotate=options.rotate,
    )
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


class _Reader:
    """Reads and turns images, keeping the last ones decoded; those that cannot be read are noted and left out."""

    def __init__(self) -> None:
        self.unreadable: set[str] = set()
        self._images = Images(DECODED)

    def read(self, queries: Iterable[Query], schema: KeypointSchema) -> list[tuple[np.ndarray, KeypointSet, Query]]:
        """(image, truth in the order of the schema, query) of each that can be read."""
        found = []
        for query in queries:
            path = str(query.sample.image_path)
            if path in self.unreadable:
                continue
            try:
                image = self._images.read(query.sample)
            except (ImageError, TooLarge) as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                self.unreadable.add(path)
                continue
            truth = with_box(query.sample.keypoints.reorder(schema.names), image)
            found.append((*turn(image, truth, query.degrees), query))
        return found


def _progress(plan: Sequence[tuple[Category, Any]]) -> Iterator[tuple[Category, Any]]:
    with tqdm(plan, unit=" episode", disable=None) as bar:
        for category, item in bar:
            bar.set_description(category.name, refresh=False)
            yield category, item


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m kptllm_core evaluate`."""
    default = Options()
    add = parser.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    add("--model", default="nano", help="preset (nano, tiny) or checkpoint folder (default: %(default)s)")
    add("--untrained", action="store_true", help="random weights of the same architecture: what the training is worth")
    add("--adapter", **folder, help="LoRA adapter folder made for this model")
    add("--data", **folder, action="append", required=True, help="folder to evaluate on; may be repeated")
    add("--support", **folder, help="draw the support examples from this folder (default: from --data)")
    add(
        "--shots", **number, default=default.shots, help="support objects of an episode, 1 to 10 (default: %(default)s)"
    )
    add("--episodes", **number, default=default.episodes, help="episodes per category (default: %(default)s)")
    add("--queries", **number, default=default.queries, help="queries per episode (default: %(default)s)")
    add("--seed", **number, default=default.seed, help="of everything random (default: %(default)s)")
    add("--prompt", choices=PROMPTS, default=default.prompt, help="what the model is shown (default: %(default)s)")
    add("--boxes", choices=BOXES, default=default.boxes, help="the query's true box, as in the protocol; or moved and "
        "scaled a little; or none: the object must be found, as in serving (default: %(default)s)")  # fmt: skip
    add("--rotate", action="store_true", help="turn each query in the plane by a random angle")
    add("--task", choices=TASKS, default=default.task, help="find points, or name given ones (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--draw", **folder, help="also write a picture per category: supports, predicted and true points")
    add("--out", type=Path, metavar="FILE", default=Path("report.json"), help="the report (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say; writes the report, prints the table. Raises KptError."""
    options = Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
    categories = load_categories(args.data, args.support)
    report.check_writable(args.out)
    predictor = load_predictor(args.model, adapter=args.adapter, device=args.device, untrained=args.untrained)
    draw = partial(write_sheet, args.draw) if args.draw else None
    result = evaluate(predictor, categories, options, draw)
    result["arguments"] |= {
        "model": str(args.model),
        "untrained": args.untrained,
        "adapter": _text(args.adapter),
        "data": [str(d) for d in args.data],
        "support": _text(args.support),
        "device": args.device,
    }
    report.write_json(args.out, result)
    print(report.table(result), f"The report is in {args.out}.", sep="\n")  # noqa: T201 - the command's answer
    return 0


def write_sheet(
    folder: Path, name: str, schema: KeypointSchema, support: list[Example], queries: list[Answered]
) -> None:
    """One picture of an episode: `folder`/<category>.png with its supports and at most four queries."""
    target = folder / (re.sub(r"[^\w.-]+", "_", name) + ".png")
    sheet = contact_sheet([(e.image, e.keypoints) for e in support], queries[:4], schema)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(target)
    except OSError as error:
        raise DataError(f"Cannot write {target}: {error.strerror}. Choose another --draw.") from None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
