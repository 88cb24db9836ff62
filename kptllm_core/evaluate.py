"""How good is a model? Runs the protocol over categories → report.json and a table: the `evaluate` command.

Draws episodes (`protocol.py`, or those of a public data set: `published.py`), asks the Predictor as serving does (`scoring.py`;
for all objects of an image without leaving out what is too faint to be shown, since average precision reads the whole ranking),
sums up (`report.py`). The copy baseline stands beside every figure. The same episodes can be given to other baselines
(`baselines.py`), and to the model with a part switched off (`ablation.py`).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from kptllm_core import crowds, published, report
from kptllm_core.ablation import without
from kptllm_core.baselines import build_baseline
from kptllm_core.dataset import Sample
from kptllm_core.draw import contact_sheet
from kptllm_core.episodes import Images
from kptllm_core.errors import DataError, ImageError, InvalidInput, TooLarge
from kptllm_core.finder import COUNTED
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.options import Options, add_arguments
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.protocol import (
    Category,
    Episode,
    Query,
    box_handed,
    cut_off,
    draw_episodes,
    draw_query,
    load_categories,
    part_of,
    shuffled,
    spoilt,
    stream,
    true_box,
    turn,
    with_box,
)
from kptllm_core.report import Measured, NamedPoint, Pair
from kptllm_core.scoring import CopyPredictor, PointPredictor, Question, predict_and_measure, score_predictor

__all__ = ["CopyPredictor", "Options", "add_arguments", "evaluate", "load_categories", "run", "score_predictor"]

Answered = tuple[np.ndarray, KeypointSet, KeypointSet]  # image, predicted, truth
Draw = Callable[[str, KeypointSchema, list[Example], list[Answered]], None]  # category, its schema, support, queries


def evaluate(
    predictor: Predictor, categories: Sequence[Category], options: Options, draw: Draw | None = None
) -> dict[str, Any]:
    """The report of a model, or of a baseline in its place. `draw` gets the first readable episode of each category."""
    kept = part_of(categories, options.part)
    with without(predictor, options.without) as asked:
        if options.task == "name":
            found = _naming(predictor, kept, options)
        elif options.task == "instances":
            found = _instances(predictor, kept, options)
        else:
            answers = build_baseline(options.baseline, predictor) if options.baseline else asked
            found = _detection(answers, kept, options, draw)
            asked = answers
    names = {c.name for c in kept}
    dropped = {c.name: f"none of its groups is in --part {options.part}" for c in categories if c.name not in names}
    left_out = {**dropped, **found.pop("left_out", {})}
    return {
        "base": asked.base,
        **found,
        "left_out": left_out,
        "arguments": asdict(options) | {"without": list(options.without)},
    }


def _detection(
    predictor: PointPredictor, categories: Sequence[Category], options: Options, draw: Draw | None
) -> dict[str, Any]:
    pairs: list[Pair] = []
    reader = _Reader()
    undrawn = {c.name for c in categories} if draw else set()
    seconds = 0.0
    plan, left_out = _plan(categories, options)
    for category, episode in _progress(plan):
        schema = shuffled(category.schema, episode.order)
        support = [Example(image, truth) for image, truth, _ in reader.read(map(_upright, episode.support), schema)]
        right = len(support) - options.wrong
        support = [e if i < right else replace(e, keypoints=spoilt(e.keypoints)) for i, e in enumerate(support)]
        queries = reader.read(episode.queries, schema)
        if options.cut:
            cut = ((*cut_off(i, t, q.jitter), q) for i, t, q in queries)
            queries = [(i, t, q) for i, t, q in cut if t.placed.any()]
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
        for (_, truth, query), mine, copied, points in zip(queries, model, copy, predicted, strict=True):
            pairs.append(Pair(category.name, query.index, mine, copied, points, truth, query.sample))
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
    found = report.detection(pairs, seconds / len(pairs), sorted(reader.unreadable))
    if options.protocol != "episodes":
        _add_published(found, pairs, categories, options, sum(len(e.queries) for _, e in plan))
    return {**found, "left_out": left_out}


def _plan(categories: Sequence[Category], options: Options) -> tuple[published.Plan, dict[str, str]]:
    """All episodes, and the categories that cannot have any with the reason."""
    sizes: dict[str, Any] = {
        name: getattr(options, name) for name in ("shots", "episodes", "queries", "seed", "rotate")
    }
    if options.protocol == "mp100":
        return published.mp100_episodes(categories, **sizes), {}
    if options.protocol == "ap10k":
        return published.ap10k_episodes(categories, **sizes, required=options.prompt != "text")
    return [(category, episode) for category in categories for episode in _episodes(category, options)], {}


def _add_published(
    found: dict[str, Any], pairs: Sequence[Pair], categories: Sequence[Category], options: Options, planned: int
) -> None:
    """The figures of a public data set's tables, over all and of each category, and what keeps them from being comparable."""
    if options.protocol == "mp100":
        unasked = planned - len(pairs)
        found["published"] = published.mp100_figures(pairs)
        each = {
            name: published.mp100_figures([p for p in pairs if p.category == name]) for name in found["per_category"]
        }
    else:
        unasked = sum(len(c.samples) for c in categories) - len(pairs)
        found["published"], each = published.ap10k_figures(pairs, categories[0].schema.names)
    for name, figures in each.items():
        found["per_category"][name]["published"] = figures
    found["departures"] = published.departures(options.protocol, asdict(options), unasked)


def _naming(predictor: Predictor, categories: Sequence[Category], options: Options) -> dict[str, Any]:
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


def _instances(predictor: Predictor, categories: Sequence[Category], options: Options) -> dict[str, Any]:
    """All objects of up to episodes × queries whole images, each image asked once with one support set of its episode."""
    scenes: list[crowds.Scene] = []
    reader = _Reader()
    plan = [(c, e) for c in categories for e in _scenes(c, options)]
    begin = time.perf_counter()
    for category, (support, images) in _progress(plan):
        shown = [Example(image, truth) for image, truth, _ in reader.read(map(_upright, support), category.schema)]
        shown = shown if options.prompt != "text" else []
        for samples in images:
            read = reader.read(map(_upright, samples), category.schema)
            if read:
                (found,) = predictor.predict_objects([read[0][0]], category.schema, shown, prompt=options.prompt, least=0.0, most=COUNTED)
                scenes.append(crowds.Scene(category.name, [t for _, t, q in read if q.sample.keypoints.placed.any()], found))
    if not scenes:
        raise DataError(f"None of the {len(reader.unreadable)} images could be read. Check the folder 'images'.")
    return {
        **crowds.summary(scenes),
        "seconds_per_image": (time.perf_counter() - begin) / len(scenes),
        "unreadable": sorted(reader.unreadable),
    }


def _scenes(category: Category, options: Options) -> list[tuple[list[Sample], list[list[Sample]]]]:
    """Support objects, and the whole images that they are asked for: of other groups where there are enough."""
    rng = stream(category.name, options.seed)
    every = crowds.images_of([*category.samples, *category.empty])
    order = rng.permutation(len(every))[: options.episodes * options.queries]
    plan = []
    for start in range(0, len(order), options.queries):
        asked = [every[i] for i in order[start : start + options.queries]]
        support = [] if options.shots == 0 else crowds.draw_support(category.supports, asked, options.shots, rng, category.same_pool)
        plan.append((support, asked))
    return plan


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
        self._images = Images()

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


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say; writes the report, prints the table. Raises KptError."""
    told = {name: getattr(args, name) for name in Options.__dataclass_fields__}
    options = Options(**told | {"without": tuple(dict.fromkeys(args.without or ()))})
    if args.draw and options.task != "detect":
        raise InvalidInput(f"--draw shows supports and the points that are detected; --task {options.task} has no such picture. Leave it out.")
    categories = _load(args, options)
    report.check_writable(args.out)
    predictor = load_predictor(args.model, adapter=args.adapter, device=args.device, untrained=args.untrained)
    draw = partial(write_sheet, args.draw) if args.draw else None
    result = evaluate(predictor, categories, options, draw)
    result["arguments"] |= {
        "model": str(args.model),
        "untrained": args.untrained,
        "adapter": _text(args.adapter),
        "data": [str(d) for d in args.data or ()],
        "support": _text(args.support),
        "annotations": _text(args.annotations),
        "images": _text(args.images),
        "device": args.device,
    }
    report.write_json(args.out, result)
    said = [report.table(result), *report.remarks(result), f"The report is in {args.out}."]
    print("\n".join(said))  # noqa: T201 - the command's answer
    return 0


def _load(args: argparse.Namespace, options: Options) -> list[Category]:
    """The categories that the flags name; each protocol has flags of its own."""
    if options.protocol == "episodes":
        if not args.data:
            raise InvalidInput(
                "There is nothing to evaluate on. Name a folder with --data, or a data set with --protocol, --annotations and --images."
            )
        if args.annotations or args.images:
            raise InvalidInput(
                "--annotations and --images belong to --protocol mp100 or ap10k. Add it, or name folders with --data."
            )
        return load_categories(args.data, args.support)
    if not args.annotations or not args.images or args.data or args.support:
        raise InvalidInput(
            f"--protocol {options.protocol} takes --annotations FILE and --images DIR, and neither --data nor --support."
        )
    named = options.prompt != "visual" or options.task == "name"
    return published.load_published(options.protocol, args.annotations, args.images, named and options.baseline is None)


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
