"""What do many objects cost, and large images? All objects at once against the single-object predictor once per object.

    python benchmarks/instances.py [--model nano] [--objects 1,4,16,64] [--sides 384,768,1536,3072] [--repeats 3]

The image really holds so many objects of one kind. *Search*: one look for all of them, in windows; the encoding of a window serves boxes and
heatmaps alike. *All at once*: what serving does, that is the search, the points of what was found, twice (boxes move to where their points
are), and points that two objects claim; *found* are those that it would show. *Boxes known*: the true boxes together, without a search.
*Once each*: a call of the single-object predictor without a box for each object, which encodes and searches the whole image every time; that
is what there was without a search for all; *once each, boxes known*: the same with the true boxes. Support is cached.

Then the search alone on growing images whose objects stay as large in pixels, smallest first, with the windows that it looked at and the memory
that the process has needed so far. Each time is the fastest of interleaved rounds. The last line is JSON: `ratio_N` is once each over
all at once, `known_N` the same with known boxes.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kptllm_core import finder
from kptllm_core.errors import KptError
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.synthetic import Category

SIDE = 640  # pixels of the image with many objects
OBJECT = 100  # pixels of the picture of an object in growing images; itself it is somewhat smaller
NAIVE = 4  # calls without a box that are timed; the time of all objects is theirs, extrapolated


def crowd(category: Category, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, Example]:
    """An image with objects in rows, their boxes (N, 4), and a support image with one of that size."""
    across = int(np.ceil(count**0.5))
    side = SIDE // across
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    shown, boxes = image.copy(), []
    for number in range(count):
        x, y = side * (number % across), side * (number // across)
        image[y : y + side, x : x + side], points = category.render(rng, side)
        boxes.append(np.asarray(points.object_box()) + [x, y, 0, 0])
    shown[:side, :side], points = category.render(rng, side)
    return image, np.array(boxes), Example(shown, points)


def costs(predictor: Predictor, counts: list[int], repeats: int) -> dict[int, dict[str, float]]:
    """Seconds of each way, for each number of objects, and how many were found."""
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(8)
    found = {}
    for count in counts:
        image, boxes, example = crowd(category, rng, count)
        some = boxes[:NAIVE]
        once = partial(predictor.predict, schema=category.schema, support=[example])
        every = partial(predictor.predict_objects, [image], category.schema, [example])
        ways: dict[str, Callable[[], object]] = {
            "search": partial(predictor.find_objects, image, category.schema, [example]),
            "all at once": every,
            "boxes known": partial(every, [boxes], find=False),
            "once each": lambda: [once([image]) for _ in some],  # noqa: B023 (called in this turn)
            "once each, boxes known": lambda: [once([image], boxes=[box]) for box in some],  # noqa: B023
        }
        seconds = fastest(ways, repeats)
        seconds |= {name: seconds[name] * count / len(some) for name in ("once each", "once each, boxes known")}
        found[count] = {**seconds, "found": len(every()[0])}
    return found


def growth(predictor: Predictor, sides: list[int], repeats: int) -> dict[int, dict[str, float]]:
    """Search in square images, whose objects stay as large in pixels: seconds, windows and memory at most (MB)."""
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(9)
    canvas, points = category.render(rng, OBJECT)
    extent = float(max(np.asarray(points.object_box())[2:]))
    found = {}
    for side in sides:
        image = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        shown = np.full((side, side, 3), 128, np.uint8)
        shown[:OBJECT, :OBJECT] = canvas
        support = [Example(shown, points)]
        seconds = fastest({"search": lambda image=image, support=support: predictor.find_objects(image, category.schema, support)}, repeats)  # type: ignore[misc]
        windows = finder.windows(side, side, extent * finder.WINDOW, predictor.size) if finder.needs_windows(extent / side) else []
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found[side] = {**seconds, "windows": len(windows) + 1, "MB": memory}
    return found


def fastest(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The first call warms up, and fills the cache of support features."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: min(values) for name, values in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--objects", default="1,4,16,64", help="numbers of objects in an image (default: %(default)s)")
    parser.add_argument("--sides", default="384,768,1536,3072", help="sides of growing images, pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest counts (default: %(default)s)")
    args = parser.parse_args(arguments)
    sides = sorted(int(n) for n in args.sides.split(","))
    if sides[0] < OBJECT:
        parser.error(f"an image of {sides[0]} pixels does not hold an object of {OBJECT}; choose larger --sides")
    try:
        predictor = load_predictor(args.model, device=args.device)
        large = growth(predictor, sides, args.repeats)  # first: memory is never given back
        many = costs(predictor, [int(n) for n in args.objects.split(",")], args.repeats)
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    print(f"{predictor.base} on {predictor.device}; milliseconds")
    columns = ("search", "all at once", "boxes known", "once each, boxes known", "once each")
    print("".join(f"{name:>{len(name) + 3}}" for name in ("objects", "found", *columns)))
    for count, t in many.items():
        cells = [count, t["found"], *(t[name] * 1000 for name in columns)]
        print("".join(f"{value:>{len(name) + 3}.0f}" for name, value in zip(("objects", "found", *columns), cells, strict=True)))
    print(f"{'image':>8}{'search':>10}{'windows':>10}{'MB at most':>14}")
    for side, t in large.items():
        print(f"{side:>8}{t['search'] * 1000:>10.0f}{t['windows']:>10.0f}{t['MB']:>14.0f}")
    ratios = {f"ratio_{n}": t["once each"] / t["all at once"] for n, t in many.items()}
    ratios |= {f"known_{n}": t["once each, boxes known"] / t["boxes known"] for n, t in many.items()}
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
