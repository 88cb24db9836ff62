"""What does a large project cost the backend? Fills a journal with made-up predictions and labels, and times what is done with it.

    python benchmarks/scale.py [--images 1000 --images 10000] [--labelled 0.1] [--out scale.json]

No image is read and no model is asked: it is the work around them that is measured, which has to be small beside theirs however many
images a project has. Times are the fastest of three, in milliseconds; reports, which are made in the background, are made once.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backend.effort_report import effort
from backend.intake import annotation_row, control_key
from backend.journal import Journal
from backend.lookalikes import BITS
from backend.prequential import score_new
from backend.ranking import Ranker, calibration_report, refresh, what_next
from backend.reports import Reports
from backend.review import ask_for_predictions, quality_report
from backend.rounds import Rounds
from backend.served import control_row, keep_served
from backend.services import Services
from backend.settings import Settings
from backend.status import project_status
from backend.tables import Annotation, Look, Predicted, Task, Version
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.regions import to_regions
from label_config.schema import LabelConfig, parse

PROJECT = "1"
NAMES = tuple(f"point {i + 1}" for i in range(17))
SIZE = (640, 480)
CONFIG = f"""<View><Image name="image" value="$image"/><KeyPointLabels name="kp" toName="image">
{"".join(f'<Label value="{name}"/>' for name in NAMES)}</KeyPointLabels></View>"""
CHUNK = 8
BATCH = 5000
Json = dict[str, Any]


def fill(journal: Journal, config: LabelConfig, images: int, labelled: int, rng: np.random.Generator) -> Version:
    """A project of so many predicted images, the first ones labelled, each a little beside its prediction."""
    version = journal.observe(PROJECT, CONFIG, "nano-00000000", "large")
    for start in range(0, images, BATCH):
        tasks = range(start + 1, min(start + BATCH, images) + 1)
        rows: list[Any] = []
        for task in tasks:
            controls, result = predicted(config, rng)
            rows.append(Task(project=PROJECT, task=task, group=f"task={task}", images={"image": f"/{task}.jpg"}, files={}, deleted=False))
            rows.append(Predicted(project=PROJECT, task=task, version=version.id, controls=controls, score=float(rng.random())))
            rows.append(Look(project=PROJECT, task=task, look=rng.bytes(BITS // 8).hex()))
            if task <= labelled:
                rows.append(annotation(config, task, result, rng))
        journal.write(methodcaller("add_all", rows))
    journal.record(PROJECT, [], [annotation(config, 1, predicted(config, rng)[1], rng, number=images + 1)], config)
    return journal.active(PROJECT)


def predicted(config: LabelConfig, rng: np.random.Generator) -> tuple[Json, list[Json]]:
    """What is kept of a prediction, and its regions."""
    (control,) = config.controls
    xy = rng.uniform(0.1, 0.9, (len(NAMES), 2)) * SIZE
    points = KeypointSet(NAMES, xy, np.full(len(NAMES), Visibility.VISIBLE), rng.uniform(0.2, 1.0, len(NAMES)))
    regions = to_regions(control, points, *SIZE)
    return {control_key(control): control_row(control, [points], [], SIZE, regions)}, regions


def annotation(config: LabelConfig, task: int, result: list[Json], rng: np.random.Generator, number: int | None = None) -> Annotation:
    moved = [r | {"value": r["value"] | {"x": min(r["value"]["x"] + float(rng.exponential(1.0)), 100.0)}} for r in result]
    body = {"id": number or task, "task": task, "result": moved, "updated_at": "2026-01-01T00:00:00Z", "completed_by": 1}
    return annotation_row(PROJECT, body, task, config)


def measure(folder: Path, images: int, share: float, told: Callable[[str], None]) -> Json:
    """Milliseconds of everything, for a project of so many images."""
    rng = np.random.default_rng(0)
    config = parse(CONFIG)
    settings = Settings.from_env({"DATA_DIR": str(folder)})
    services = Services.make(settings)
    journal = services.journal
    try:
        told(f"{images} images: filling the journal")
        version = fill(journal, config, images, int(images * share), rng)
        rounds, reports = Rounds(services), Reports(services)
        score_new(journal, PROJECT)
        new = images + 10

        def rank() -> None:
            ranker = Ranker(journal, services.looks, PROJECT)
            ranker.see({new + i: rng.bytes(BITS // 8).hex() for i in range(CHUNK)})

        def keep() -> None:
            nonlocal new
            new += CHUNK
            looks = {new + i: rng.bytes(BITS // 8).hex() for i in range(CHUNK)}
            keep_served(journal, version, {task: (predicted(config, rng)[0], 0.5) for task in looks}, looks)

        def look() -> None:
            reports._state(PROJECT)
            rounds.start_if_due(PROJECT)

        def arrive() -> None:
            nonlocal new
            new += 1
            journal.record(PROJECT, [], [annotation(config, 2, predicted(config, rng)[1], rng, number=new)], config)

        reports.turn(PROJECT)
        services.looks.has(PROJECT, 1)
        work: dict[str, tuple[Callable[[], object], int]] = {
            "rank 8 new predictions": (rank, 3),
            "keep 8 new predictions": (keep, 3),
            "an annotation arrives": (arrive, 3),
            "the keeper looks, nothing is new": (look, 3),
            "the keeper looks, something is": (lambda: ask_for_predictions(journal, PROJECT), 3),
            "a project's state": (lambda: project_status(services, rounds, PROJECT), 3),
            "report: what next": (lambda: what_next(journal, services.looks, PROJECT), 1),
            "report: calibration": (lambda: calibration_report(journal, PROJECT, settings.tolerance), 1),
            "fit the calibration": (lambda: refresh(journal, PROJECT, settings.tolerance), 1),
            "report: effort": (lambda: effort(journal, PROJECT, settings.tolerance), 1),
            "report: quality": (lambda: quality_report(journal, PROJECT), 1),
        }
        found: Json = {"images": images}
        for name, (call, times) in work.items():
            told(f"{images} images: {name}")
            taken = []
            for _ in range(times):
                begin = time.perf_counter()
                call()
                taken.append(1000 * (time.perf_counter() - begin))
            found[name] = round(min(taken), 1)
        return found | {"MB of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    finally:
        journal.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, action="append", help="of a project; may be given several times")
    parser.add_argument("--labelled", type=float, default=0.1, metavar="SHARE")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for images in given.images or [1000, 10000]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), images, given.labelled, lambda text: print(text, file=sys.stderr)))
    for name in rows[0]:
        print(f"{name:34}" + "".join(f"{row[name]:>12}" for row in rows))
    text = json.dumps(rows)
    if given.out:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
