"""What do many objects cost, and large images? All objects at once against the single-object predictor once per object.

    python benchmarks/instances.py [--model nano] [--objects 1,4,16,64] [--sides 384,768,1536,3072]

*Search*: one look for all objects of the image, in windows; the encoding of a window serves boxes and heatmaps alike. *Points*: all objects,
whose boxes are known, together. *Once each, boxes known*: the same objects one call after the other. *Once each*: a call without a
box for each object, which encodes and searches the whole image every time; that is what there was without a search for all. Support is
cached. Then the search alone on growing images whose objects stay as large in pixels, with the windows that it looked at and the memory
that the process needed at most. Each time is the fastest of interleaved rounds. The last line is JSON: `ratio_N` is once each over all at once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kptllm_core import finder
from kptllm_core.errors import KptError
from kptllm_core.keypoints import KeypointSet
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.synthetic import Category

SIDE = 640  # pixels of the image with many objects
OBJECT = 80  # pixels of an object in growing images
NAIVE = 4  # calls without a box that are timed; the time of all objects is theirs, extrapolated


def costs(predictor: Predictor, counts: list[int], repeats: int) -> dict[int, dict[str, float]]:
    """Seconds of each way, for each number of objects; what the boxes hold does not matter for time."""
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(8)
    image = category.render(rng, SIDE)[0]
    found = {}
    for count in counts:
        across = int(np.ceil(count**0.5))
        side = SIDE / across
        boxes = np.array([[side * (i % across), side * (i // across), side * 0.9, side * 0.9] for i in range(count)])
        support = [Example(*_shown(category, rng, side))]
        calls = min(count, NAIVE)
        ways: dict[str, Callable[[], object]] = {
            "search": lambda support=support: predictor.find_objects(image, category.schema, support),  # type: ignore[misc]
            "points": lambda support=support, boxes=boxes: predictor.predict_objects(  # type: ignore[misc]
                [image], category.schema, support, [boxes], find=False),
            "once each, boxes known": lambda support=support, boxes=boxes: [  # type: ignore[misc]
                predictor.predict([image], category.schema, support, [box]) for box in boxes],
            "once each": lambda support=support, calls=calls: [  # type: ignore[misc]
                predictor.predict([image], category.schema, support) for _ in range(calls)],
        }  # fmt: skip
        seconds = fastest(ways, repeats)
        found[count] = {**seconds, "once each": seconds["once each"] * count / calls}
    return found


def growth(predictor: Predictor, sides: list[int], repeats: int) -> dict[int, dict[str, float]]:
    """Search in square images, whose objects stay `OBJECT` pixels large: seconds, windows and memory at most (MB)."""
    category, rng = Category.sample(np.random.default_rng(7)), np.random.default_rng(9)
    found = {}
    for side in sides:
        image = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        canvas, points = category.render(rng, OBJECT)
        shown = np.full((side, side, 3), 128, np.uint8)
        shown[:OBJECT, :OBJECT] = canvas
        support = [Example(shown, points)]
        seconds = fastest({"search": lambda image=image, support=support: predictor.find_objects(image, category.schema, support)}, repeats)  # type: ignore[misc]
        windows = finder.windows(side, side, OBJECT * finder.WINDOW, predictor.size)
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


def _shown(category: Category, rng: np.random.Generator, side: float) -> tuple[np.ndarray, KeypointSet]:
    """A support image as large as the query, with one object of the given size."""
    canvas, points = category.render(rng, int(side))
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    image[: canvas.shape[0], : canvas.shape[1]] = canvas
    return image, points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--objects", default="1,4,16,64", help="numbers of objects in an image (default: %(default)s)")
    parser.add_argument("--sides", default="384,768,1536,3072", help="sides of growing images, pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest counts (default: %(default)s)")
    args = parser.parse_args()
    try:
        predictor = load_predictor(args.model, device=args.device)
        many = costs(predictor, [int(n) for n in args.objects.split(",")], args.repeats)
        large = growth(predictor, [int(n) for n in args.sides.split(",")], args.repeats)
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    print(f"{predictor.base} on {predictor.device}; milliseconds")
    print(f"{'objects':>8}{'search':>10}{'points':>10}{'all at once':>14}{'once each, boxes known':>26}{'once each':>12}")
    for count, t in many.items():
        whole = t["search"] + t["points"]
        cells = [t["search"], t["points"], whole, t["once each, boxes known"], t["once each"]]
        print(f"{count:>8}" + "".join(f"{v * 1000:>{w}.0f}" for v, w in zip(cells, (10, 10, 14, 26, 12), strict=True)))
    print(f"{'image':>8}{'search':>10}{'windows':>10}{'MB at most':>14}")
    for side, t in large.items():
        print(f"{side:>8}{t['search'] * 1000:>10.0f}{t['windows']:>10.0f}{t['MB']:>14.0f}")
    print(json.dumps({f"ratio_{n}": round(t["once each"] / (t["search"] + t["points"]), 3) for n, t in many.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
