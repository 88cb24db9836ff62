"""A core whose model takes a stated time for each batch: what is tested with it is everything around the model.

As a program: `python tests/core_process.py PORT FOLDER SECONDS` serves it, as `python -m kptllm_core serve` serves a model.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kptllm_core.engine import Engine
from kptllm_core.errors import ArtifactError
from kptllm_core.jobs import JobQueue
from kptllm_core.keypoints import SHOWN, KeypointSchema, KeypointSet
from kptllm_core.routes import Core
from kptllm_core.serve import serve
from kptllm_core.store import AdapterStore, ImageStore

DARK = 2.5  # mean of the pixels of images in which there is nothing


class Instance(NamedTuple):
    """As kptllm_core.predictor has it, without torch."""

    keypoints: KeypointSet
    score: float


class TimedPredictor:
    """Puts point i at (i, i) + the mean colour, after `seconds`. `trouble` may raise for the images that it dislikes. It looks at the support
    once, as the model does."""

    base, device = "timed-00000000", "cpu"

    def __init__(self, seconds: float = 0.0, trouble: Callable[[list[np.ndarray]], None] = lambda images: None) -> None:
        self.seconds, self.trouble = seconds, trouble
        self.adapter: Path | None = None
        self.switched: list[str | None] = []
        self.batches: list[int] = []
        self.inside = threading.Lock()
        self.shown: set[str] = set()

    def use_adapter(self, folder: Path | None) -> None:
        if folder is not None and not (folder / "adapter.json").is_file():
            raise ArtifactError(f"{folder.name} is damaged.")
        self.adapter = folder
        self.switched.append(None if folder is None else folder.name)

    def predict(self, images: list[np.ndarray], schema: KeypointSchema, support: Any = (), **options: Any) -> list[KeypointSet]:
        for example in support:
            if example.key not in self.shown:
                assert example.image.ndim == 3
                self.shown.add(example.key)
        return self._points(images, schema)

    def _points(self, images: list[np.ndarray], schema: KeypointSchema) -> list[KeypointSet]:
        assert self.inside.acquire(blocking=False), "two threads on one device"
        try:
            time.sleep(self.seconds)
            self.batches.append(len(images))
            self.trouble(images)
            count = len(schema)
            return [KeypointSet(schema.names, np.arange(count)[:, None].repeat(2, 1) + image.mean(), np.full(count, 2)) for image in images]
        finally:
            self.inside.release()

    def predict_objects(self, images: list[np.ndarray], schema: KeypointSchema, boxes: list[np.ndarray], find: bool = True,
                        least: float = SHOWN, **options: Any) -> list[list[Instance]]:  # fmt: skip
        """Those with a box, then, in images brighter than DARK, two more, left and right of the middle."""
        answers = []
        for image, given in zip(images, boxes, strict=True):
            height, width = image.shape[:2]
            halves = [np.array([x, 0.0, width / 2, height]) for x in (0.0, width / 2)] if find and image.mean() > DARK else []
            every = [(box, 1.0) for box in given] + [(box, score) for box, score in zip(halves, (0.8, 0.4), strict=False) if score >= least]
            (points,) = self._points([image], schema)
            answers.append([Instance(replace(points, box=box), score) for box, score in every])
        return answers

    def name_points(self, image: np.ndarray, xy: np.ndarray, **options: Any) -> list[tuple[str, float]]:
        return [("nose", 0.5)] * len(xy)


def core_on(folder: Path, predictor: TimedPredictor, **options: Any) -> Core:
    """Stores, engine and queue; the model is not loaded and no round runs yet."""
    images, adapters = ImageStore(folder / "images"), AdapterStore(folder / "adapters")
    load: Any = options.pop("load", lambda: predictor)
    engine = Engine(load, images, adapters, **options)
    return Core(images, adapters, engine, JobQueue(folder / "rounds", images, adapters), "timed", "cpu")


if __name__ == "__main__":
    serve(core_on(Path(sys.argv[2]), TimedPredictor(float(sys.argv[3]))), "127.0.0.1", int(sys.argv[1]), threads=24)
