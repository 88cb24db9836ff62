"""One training round as a process: `python -m kptllm_core.trainer RUN_DIR`. jobs.py starts it and reads what it leaves.

prepare (COCO folders from run.json) → train the adapter → score parent and adapter on `heldout` as serving answers → result.json.
Each step starts from what an earlier, killed trainer left. It runs at low priority and dies with the core that started it.
Exit codes: 0 done, 1 given up (failure.json says why), 75 stopped and resumable, 76 another trainer holds this round, 77 an accident:
worth another try.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kptllm_core.dataset import Sample, far_outside, load_coco, write_coco
from kptllm_core.engine import is_out_of_memory
from kptllm_core.errors import ArtifactError, DataError, ImageError, InvalidInput, KptError, TooLarge, Unavailable
from kptllm_core.imaging import read_image
from kptllm_core.jobs import FAILED, LOCKED, PARTS, STOPPED
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.store import disk_error, read_json, write_json

if TYPE_CHECKING:
    from kptllm_core.predictor import Example, Predictor

log = logging.getLogger("kptllm_core.trainer")

LOCK_SECONDS = 10.0  # a killed trainer may take a moment to vanish
SCORED_AT_ONCE = 16  # images
SCORED_BYTES = 256 * 2**20  # of their pixels: with more, no further image is read before these are scored
REPORT_EVERY = 0.25  # seconds between two progress files
ACCIDENT = 77  # exit code: something killed a part of this trainer
SMALL_AFTER = 2  # accidents after which the round goes on with a smaller batch


class Stopped(Exception):
    """Somebody asked this process to end. What is done so far is on disk."""


class Round:
    """The steps of one round in its folder."""

    def __init__(self, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
        run = read_json(folder / "run.json")
        if not isinstance(run, dict):
            raise DataError(f"{folder} is no round: run.json is missing or damaged. POST /rounds makes one.")
        self.folder, self.run, self.should_stop = folder, run, should_stop
        self.schema = KeypointSchema.from_json(run["schema"])
        self._reported = 0.0
        self._progress: dict[str, Any] = {}

    def __call__(self) -> None:
        """Runs what is left to do, and writes result.json. Raises KptError, or Stopped."""
        skipped = self.prepare()
        metrics = self.train()
        before, after = self.score()
        result = {"adapter": self.run["name"], "seconds": metrics["seconds"], "steps": metrics["steps"],
                  "train_images": metrics["images"], "heldout_images": len({s.image_path for s in self._samples("heldout")}),
                  "before": before, "after": after, "skipped": skipped}  # fmt: skip
        write_json(self.folder / "result.json", result)

    def prepare(self) -> list[dict[str, str]]:
        """Writes the annotations of the three folders, without damaged images; returns those, with the reason."""
        done = read_json(self.folder / "skipped.json")
        if isinstance(done, list):
            return done
        skipped: dict[str, str] = {}
        for part in PARTS:
            sizes: dict[str, tuple[int, int]] = {}
            for sha in dict.fromkeys(item["image"] for item in self.run[part]):
                self.report(phase="preparing")
                try:
                    height, width = read_image(self.folder / part / "images" / sha).shape[:2]
                    sizes[sha] = (width, height)
                except (ImageError, TooLarge) as error:
                    skipped[sha] = error.message
            items = []
            for item in self.run[part]:
                sha, points = item["image"], KeypointSet.from_json(item["keypoints"])
                if sha not in sizes:
                    continue
                if far_outside(points, *sizes[sha]):
                    skipped.setdefault(sha, "An object has a point far outside the image.")
                else:
                    items.append((sha, *sizes[sha], points, item["group"] or sha))
            if not items and part != "support":
                raise DataError(f"No image of '{part}' can be read. The first of {len(self.run[part])}: {next(iter(skipped.values()))}")
            write_coco(self.folder / part, self.schema, items)
        found = [{"image": sha, "message": message} for sha, message in skipped.items()]
        write_json(self.folder / "skipped.json", found)
        return found

    def train(self) -> dict[str, Any]:
        """Trains until the budget is used up, from the last saved state on. The metrics that stand beside the adapter."""
        out = self.folder / "adapter"
        if not out.is_dir():
            from kptllm_core.train import ADAPT

            state = read_json(self.folder / "state.json") or {}
            small = replace(ADAPT, episodes=1)
            if not self._fits(out, small if state.get("accidents", 0) >= SMALL_AFTER else ADAPT):
                log.warning("Out of memory; going on with a smaller batch.")
                gc.collect()  # the first try's model, and the process that read its images
                self._train(out, small)
        return json.loads((out / "metrics.json").read_text())

    def _fits(self, out: Path, recipe: Any) -> bool:
        """Trains; False if there was not enough memory. Whoever tries again must not hold the error, which holds all that took it."""
        try:
            self._train(out, recipe)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _train(self, out: Path, recipe: Any) -> None:
        from kptllm_core.checkpoint import load_checkpoint
        from kptllm_core.train import train_adapter

        self.report(phase="training")
        found = load_checkpoint(self.run["model"])
        if found.base != self.run["base"]:
            raise ArtifactError(f"The round was asked for the base {self.run['base']}; the model '{self.run['model']}' is now {found.base}.")
        parent = self.run["parent_folder"]
        try:
            train_adapter(self.run["model"], [self.folder / "train"], out, parent=None if parent is None else Path(parent),
                          seconds=self.run["seconds"], steps=self.run["steps"], seed=self.run["seed"], resume=True, recipe=recipe, loaded=found,
                          progress=lambda now: self.report(phase="training", **now), should_stop=self.should_stop)  # fmt: skip
        except InvalidInput:
            if self.should_stop():
                raise Stopped from None
            raise

    def score(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parent (or the bare base) and the new adapter on `heldout`: whole images, as serving gets them. Where an image shows
        several objects, each is asked for with its own box: which one is meant could not be told otherwise."""
        from kptllm_core.predictor import Example, load_predictor

        self.report(phase="scoring", eta_seconds=None)
        parent = self.run["parent_folder"]
        predictor = load_predictor(self.run["model"], adapter=None if parent is None else Path(parent))
        support = [Example(sample.read, sample.keypoints, str(sample.image_path)) for sample in self._samples("support")]
        before = self._score(predictor, support)
        predictor.use_adapter(self.folder / "adapter")
        return before, self._score(predictor, support)

    def _score(self, predictor: Predictor, support: list[Example]) -> dict[str, Any]:
        """In parts, so that the images of a large project need not fit into memory at once."""
        from kptllm_core.evaluate import score_predictor

        samples = self._samples("heldout")
        objects = Counter(sample.image_path for sample in samples)
        parts = []
        for boxes, asked in (("found", [s for s in samples if objects[s.image_path] == 1]),
                             ("given", [s for s in samples if objects[s.image_path] > 1])):  # fmt: skip
            read: list[tuple[np.ndarray, KeypointSet]] = []
            for sample in asked:
                self.report(phase="scoring")
                read.append((sample.read(), sample.keypoints))
                if sample is asked[-1] or len(read) == SCORED_AT_ONCE or sum(i.nbytes for i, _ in read) > SCORED_BYTES:
                    parts.append(score_predictor(predictor, read, self.schema, support, boxes, drawn=True))
                    read = []
        return pooled(parts)

    def _samples(self, part: str) -> list[Sample]:
        return load_coco(self.folder / part).samples

    def report(self, **now: Any) -> None:
        """Writes progress.json, not too often; raises Stopped between steps of preparing and scoring."""
        if now["phase"] != "training" and self.should_stop():
            raise Stopped
        new_phase = now["phase"] != self._progress.get("phase")
        self._progress.update(now)
        if new_phase or time.monotonic() - self._reported > REPORT_EVERY or now.get("step") == now.get("steps", ""):
            self._reported = time.monotonic()
            try:
                write_json(self.folder / "progress.json", self._progress, durable=False)
            except Unavailable as error:  # a disk that is full for a moment; the next report comes at once
                log.warning("The progress of the round could not be written: %s", error.message)


def pooled(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of several groups of images as if they had been scored together (each object counts the same)."""
    parts = [part for part in parts if part["images"]]
    images = sum(part["images"] for part in parts)
    if not images:
        raise DataError("No held-out image has a placed point that could be scored. Hold out images with labels.")

    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return sum(value(part) * part["images"] for part in parts) / images

    return {"pck": {at: mean(lambda part, at=at: part["pck"][at]) for at in parts[0]["pck"]},  # type: ignore[misc]
            "nme": mean(lambda part: part["nme"]), "points": sum(part["points"] for part in parts), "images": images}  # fmt: skip


@contextmanager
def held(folder: Path, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Whether this process is the one trainer of this round.

    A record lock: it belongs to this process alone, so helper processes that outlive a kill do not keep it.
    """
    with (folder / "lock").open("w") as handle:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                yield False
                return
            yield True
            return


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when the thread that started it ends (Linux). Ends at once if that has happened."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(STOPPED)


def step_back() -> None:
    """Serving comes first: low priority, and the first to go when memory runs out."""
    os.nice(10)
    try:
        Path("/proc/self/oom_score_adj").write_text("500")
    except OSError as error:
        log.debug("The priority under memory pressure cannot be set: %s", error)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kptllm_core.trainer", description="Run one training round. The core starts this.")
    parser.add_argument("folder", type=Path, metavar="RUN_DIR", help="a round's folder, as POST /rounds makes it")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process ends")
    args = parser.parse_args(argv)
    if args.parent is not None:
        die_with(args.parent)
    logging.basicConfig(level="INFO", format="%(asctime)s trainer %(levelname)s %(message)s")
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stops.append(number))
    step_back()
    with held(args.folder) as mine:
        return run(args.folder, lambda: bool(stops)) if mine else LOCKED


def run(folder: Path, should_stop: Callable[[], bool]) -> int:
    """The round, and what to tell of its end."""
    try:
        Round(folder, should_stop)()
        return 0
    except Stopped:
        return STOPPED
    except Exception as error:
        log.exception("The round failed.")
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            return ACCIDENT  # the process that reads images was killed, for want of memory as a rule
        write_json(folder / "failure.json", _reason(error).to_json())
        return FAILED


def _reason(error: Exception) -> KptError:
    if isinstance(error, KptError):
        return error
    if is_out_of_memory(error):
        return Unavailable("Out of memory, with a smaller batch too. Use a smaller preset or free some memory.", code="out_of_memory")
    if isinstance(error, OSError):
        return disk_error(error)
    return KptError("The training failed for a reason of its own. trainer.log in the round's folder says more.", code="internal")


if __name__ == "__main__":
    sys.exit(main())
