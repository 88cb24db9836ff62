"""What do many keypoints cost? K keypoints in one pass against K passes of one, and the growth from K = 1 to K = 68.

    python benchmarks/one_pass.py [--model nano]

Both go through the Predictor as serving does, with the true box given and the support set cached. `ratio` is the time of
17 calls that ask one point each over one call that asks all 17 of the same object; `k17_over_k1` and `k68_over_k1` compare
whole objects of 17 and 68 points with one of a single point. Each time is the fastest of interleaved rounds: whatever
else the machine does only adds to it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kptllm_core.errors import KptError
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.predictor import Example, Predictor, load_predictor

SIDE = 384  # pixels of the images; what is in them does not matter for time


def measure(predictor: Predictor, repeats: int) -> dict[str, float]:
    """Seconds of each way to ask: the fastest of `repeats`."""
    rng = np.random.default_rng(0)
    ways: dict[str, Callable[[], object]] = {}
    for count in (1, 17, 68):
        schema = KeypointSchema(tuple(f"point {i}" for i in range(count)))
        points = KeypointSet(
            schema.names, rng.uniform(0.2, 0.8, (count, 2)) * SIDE, np.full(count, 2), box=np.array([40, 40, 300, 300])
        )
        support = [Example(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8), points)]
        query = [rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)]

        def ask(
            names: list[str],
            schema: KeypointSchema = schema,
            support: list[Example] = support,
            query: list[np.ndarray] = query,
        ) -> None:
            predictor.predict(query, schema, support=support, boxes=[np.array([40.0, 40.0, 300.0, 300.0])], asked=names)

        ways[f"one pass, K = {count}"] = lambda ask=ask, schema=schema: ask(list(schema.names))  # type: ignore[misc]
        if count == 17:
            ways["17 passes of one"] = lambda ask=ask, schema=schema: [ask([name]) for name in schema.names]  # type: ignore[misc]
    for way in ways.values():
        way()  # warms up, and fills the cache of support features
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    return {name: min(values) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; the fastest counts (default: %(default)s)")
    args = parser.parse_args()
    try:
        predictor = load_predictor(args.model, device=args.device)
        seconds = measure(predictor, max(args.repeats, 1))
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    print(f"{predictor.base} on {predictor.device}")
    for name, value in seconds.items():
        print(f"{name:>18}  {value * 1000:8.1f} ms")
    one, many, most = (seconds[f"one pass, K = {k}"] for k in (1, 17, 68))
    figures = {"ratio": seconds["17 passes of one"] / many, "k17_over_k1": many / one, "k68_over_k1": most / one}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
