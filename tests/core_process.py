"""A core whose model takes a stated time for each batch: what is tested with it is everything around the model.

As a program: `python tests/core_process.py PORT FOLDER SECONDS` serves it, as `python -m kptllm_core serve` serves a model.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kptllm_core.engine import Engine
from kptllm_core.errors import ArtifactError
from kptllm_core.jobs import JobQueue
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.routes import Core
from kptllm_core.serve import serve
from kptllm_core.store import AdapterStore, ImageStore


class TimedPredictor:
    """Puts point i at (i, i) + the mean colour, after `seconds`. `trouble` may raise for the images that it dislikes."""

    base, device = "timed-00000000", "cpu"

    def __init__(self, seconds: float = 0.0, trouble: Callable[[list[np.ndarray]], None] = lambda images: None) -> None:
        self.seconds, self.trouble = seconds, trouble
        self.adapter: Path | None = None
        self.switched: list[str | None] = []
        self.batches: list[int] = []
        self.inside = threading.Lock()

    def use_adapter(self, folder: Path | None) -> None:
        if folder is not None and not (folder / "adapter.json").is_file():
            raise ArtifactError(f"{folder.name} is damaged.")
        self.adapter = folder
        self.switched.append(None if folder is None else folder.name)

    def predict(self, images: list[np.ndarray], schema: KeypointSchema, **options: Any) -> list[KeypointSet]:
        assert self.inside.acquire(blocking=False), "two threads on one device"
        try:
            time.sleep(self.seconds)
            self.batches.append(len(images))
            self.trouble(images)
            count = len(schema)
            return [KeypointSet(schema.names, np.arange(count)[:, None].repeat(2, 1) + image.mean(), np.full(count, 2)) for image in images]
        finally:
            self.inside.release()

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
