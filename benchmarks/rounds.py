"""What is a round worth? Trains an adapter on N labelled images, scores it on others before and after.

    python benchmarks/rounds.py --data DIR --labels 20 [--seconds 150] [--recipe '{"rate": 0.001}'] [--seed 0] [--model nano]
    python benchmarks/rounds.py --data DIR --labels 20 --ablate benchmarks/recipes.json

--data and --labels may be repeated. Labelled and scored images never share a group (a video, an animal) where there are
groups enough; a round on more labels adds to those of fewer. Up to twenty of the labelled images are the support set, before and after,
as in serving. The time is the training's own, on all cores unless --jobs says otherwise.

A recipe is JSON: fields of `kptllm_core.loop.Recipe` (rate, steps, seconds, episodes …), `lora_rank` and `lora_alpha`,
`full` (prefixes of the parts that are tuned whole) and `lora` (a regular expression of the layers that get LoRA). --ablate
names a file of {"what it is called": recipe}. Finished rounds are kept in --reports, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backend.split import MAX_SUPPORT
from benchmarks.parallel import run_each
from kptllm_core import adapters, crowds, metrics, report
from kptllm_core.checkpoint import Checkpoint, load_checkpoint
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.dataset import Sample, load_coco
from kptllm_core.errors import DataError, InvalidInput, KptError
from kptllm_core.finder import COUNTED
from kptllm_core.keypoints import SHOWN, KeypointSchema
from kptllm_core.loop import Recipe
from kptllm_core.predictor import Example, Predictor
from kptllm_core.scoring import PointPredictor, score_predictor
from kptllm_core.shots import NEAREST
from kptllm_core.train import ADAPT, train_adapter

SCORED = 100  # images at most
SEARCHED = 25  # of them, for all objects that they show
SUPPORT = MAX_SUPPORT  # of the labelled images, as the backend takes
SECONDS = 150.0
CONFIGURED = ("lora_rank", "lora_alpha")
PARTS = ("full", "lora")


@dataclass(frozen=True)
class Round:
    """One round to measure. recipe: JSON of what differs from the shipped recipe."""

    model: str
    base: str  # the name of the model's weights
    folder: Path
    labels: int
    seconds: float = SECONDS
    seed: int = 0
    recipe: str = "{}"
    found: bool = False  # score without boxes, too

    @property
    def settings(self) -> Recipe:
        """The complete recipe. InvalidInput for a field that there is not."""
        changes = json.loads(self.recipe)
        known = {f.name for f in fields(Recipe)} | {*CONFIGURED, *PARTS}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InvalidInput(f"A recipe has no {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
        own = {k: v for k, v in changes.items() if k not in (*CONFIGURED, *PARTS)}
        return Recipe(**{**asdict(ADAPT), "seconds": self.seconds, "seed": self.seed, **own})

    def file(self, reports: Path) -> Path:
        """Where its result is kept: named by all that it depends on."""
        settings = {k: v for k, v in asdict(self.settings).items() if v != getattr(Recipe(), k)}
        rest = {k: v for k, v in json.loads(self.recipe).items() if k in (*CONFIGURED, *PARTS)}
        known = {**settings, **rest, "found by": found_by(self.model), "support": SUPPORT, "nearest": NEAREST}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
        how = f"round{self.labels}-{self.seconds:g}s-seed{self.seed}-{digest}{'-found' if self.found else ''}"
        return reports / f"{self.base}-{self.folder.name}-{how}.json"


def found_by(model: str) -> str:
    """What figures of found objects depend on beside the weights: how sure a box is, and how sure it must be to be shown."""
    told = json.dumps([ModelConfig.load(model_folder(model)).sureness, SHOWN], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:6]


def split(samples: Sequence[Sample], labels: int, seed: int) -> tuple[list[Sample], list[Sample], bool]:
    """The objects on `labels` images, those on up to `SCORED` others, and whether no group is on both sides.

    Labels come from as many groups as there are, up to half of them: people label what differs. DataError for too few images.
    """
    category = samples[0].category
    groups: dict[str, list[Path]] = {}
    for sample in samples:
        images = groups.setdefault(sample.group, [])
        if sample.image_path not in images:
            images.append(sample.image_path)
    rng = np.random.default_rng([seed, zlib.crc32(category.encode())])
    order = [groups[name] for name in rng.permutation(sorted(groups))]
    order = [[images[i] for i in rng.permutation(len(images))] for images in order]
    count = sum(map(len, order))
    if labels >= count:
        raise DataError(
            f"'{category}' has {count} labelled images; {labels} to train on leave none to score. Lower --labels."
        )
    take = min(labels, max(len(order) // 2, 1))
    while sum(map(len, order[:take])) < labels:
        take += 1
    apart = take < len(order)
    train = set(_in_turns(order[:take])[:labels])
    rest = [i for images in (order[take:] if apart else order)[::-1] for i in images if i not in train]
    score = set(rest[:SCORED])  # from the other end, so that they are the same whatever the number of labels
    return [s for s in samples if s.image_path in train], [s for s in samples if s.image_path in score], apart


def _in_turns(groups: Sequence[Sequence[Path]]) -> list[Path]:
    """One of each group, then another of each, until none is left."""
    return [images[i] for i in range(max(map(len, groups), default=0)) for images in groups if i < len(images)]


def measure(task: Round, reports: Path) -> None:
    """Trains and scores one round; its result is in `task.file(reports)`. Raises KptError."""
    recipe, changes, begin = task.settings, json.loads(task.recipe), time.monotonic()
    data = load_coco(task.folder)
    samples, schema = [s for s in data.samples if s.keypoints.placed.any()], data.schema
    labelled, others, apart = split(samples, task.labels, task.seed)
    first = {s.image_path: s for s in reversed(labelled)}
    chosen = np.random.default_rng(task.seed).permutation(sorted(first))[:SUPPORT]
    support = [Example(first[p].read(), first[p].keypoints, str(p)) for p in chosen]
    with tempfile.TemporaryDirectory() as work, tuned(changes):
        snapshot = write_subset(Path(work) / "train", task.folder, labelled)
        predictor = Predictor(configured(load_checkpoint(task.model), changes))
        if predictor.base != task.base:
            raise KptError(f"The weights are now {predictor.base}; the round was to measure {task.base}. Start again.")
        score = partial(_scores, predictor, others, schema, support, ("given", "found") if task.found else ("given",))
        seek = partial(_objects, predictor, samples, others, schema, support)
        before = score() | seek()
        made = train_adapter(
            task.model, [snapshot], Path(work) / "adapter", seed=task.seed, recipe=recipe,
            loaded=configured(load_checkpoint(task.model), changes),
        )  # fmt: skip
        predictor.use_adapter(Path(work) / "adapter")
        after = score() | seek()
    result = {
        "base": task.base, "folder": task.folder.name, "labels": task.labels, "seed": task.seed, "groups_apart": apart,
        "objects": len(others), "images": len({s.image_path for s in others}), "shots": len(support), "changes": changes,
        "recipe": asdict(recipe), "threads": torch.get_num_threads(), "steps": made["steps"], "seconds": made["seconds"],
        "wall_seconds": round(time.monotonic() - begin, 1), "before": before, "after": after,
    }  # fmt: skip
    report.write_json(task.file(reports), result)


def write_subset(target: Path, folder: Path, samples: Sequence[Sample]) -> Path:
    """A folder with the annotations of these samples' images alone, and the images of `folder`."""
    ids = {s.image_id for s in samples}
    data = json.loads((folder / "annotations.json").read_text())
    data["images"] = [i for i in data["images"] if i["id"] in ids]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
    target.mkdir(parents=True)
    (target / "annotations.json").write_text(json.dumps(data))
    (target / "images").symlink_to((folder / "images").resolve())
    return target


def configured(checkpoint: Checkpoint, changes: dict[str, Any]) -> Checkpoint:
    """With the recipe's LoRA rank and alpha."""
    values = {k: v for k, v in changes.items() if k in CONFIGURED}
    checkpoint.model.config = replace(checkpoint.model.config, **values)
    return checkpoint


@contextmanager
def tuned(changes: dict[str, Any]) -> Iterator[None]:
    """While it lasts, adapters hold the parts that the recipe names."""
    before = adapters.FULL, adapters._LORA
    adapters.FULL = tuple(changes.get("full", before[0]))
    adapters._LORA = re.compile(changes["lora"]) if "lora" in changes else before[1]
    try:
        yield
    finally:
        adapters.FULL, adapters._LORA = before


def _scores(
    predictor: PointPredictor,
    samples: Sequence[Sample],
    schema: KeypointSchema,
    support: Sequence[Example],
    boxes: Sequence[str],
) -> dict[str, Any]:
    """{"given": {"pck", "pck_ci"}, …}: each object scored as a round of the product scores it; intervals over images."""
    found: dict[str, Any] = {}
    for how in boxes:
        each = [score_predictor(predictor, [(s.read(), s.keypoints)], schema, support, how) for s in samples]
        images = [str(s.image_path) for s in samples]
        values = {at: np.array([e["pck"][at] for e in each]) for at in each[0]["pck"]}
        interval = {at: metrics.bootstrap_interval(v, images) for at, v in values.items()}
        found[how] = {"pck": {at: float(v.mean()) for at, v in values.items()}, "pck_ci": interval}
    return found


def _objects(predictor: Predictor, samples: Sequence[Sample], others: Sequence[Sample], schema: KeypointSchema,
             support: Sequence[Example]) -> dict[str, Any]:  # fmt: skip
    """{"objects": how well all objects of whole images are found}, on up to `SEARCHED` of the scored images."""
    wanted = list(dict.fromkeys(s.image_path for s in others))[:SEARCHED]
    scenes = []
    for path in wanted:
        there = [s for s in samples if s.image_path == path]
        (found,) = predictor.predict_objects([there[0].read()], schema, support, least=0.0, most=COUNTED)
        scenes.append(crowds.Scene(schema.category, [s.keypoints for s in there], found))
    return {"objects": crowds.figures(scenes)}


def line(result: dict[str, Any]) -> str:
    """A result in one line."""
    parts = [f"{result['folder']}, {result['labels']} labels"]
    for how, after in result["after"].items():
        if how == "objects":
            parts.append(f"objects: recall {result['before'][how]['recall50']:.2f} → {after['recall50']:.2f}, AP50 {after['box_ap50']:.2f}")
            continue
        before = result["before"][how]["pck"]
        gains = (f"@{at} {before[at]:.3f} → {after['pck'][at]:.3f}" for at in ("0.02", "0.05", "0.1"))
        low, high = after["pck_ci"]["0.1"]
        parts.append(f"{how}: {', '.join(gains)} ({low:.3f}–{high:.3f})")
    seen = f"{result['objects']} objects on {result['images']} images"
    parts.append(f"{seen}; {result['steps']} steps in {result['seconds']:.0f} s on {result['threads']} threads")
    return "; ".join(parts)


def read_recipes(file: Path) -> dict[str, dict[str, Any]]:
    """{name: recipe} of an ablation. DataError if the file is anything else."""
    try:
        recipes = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. Expected JSON: {{name: recipe}}.") from None
    if not isinstance(recipes, dict) or not all(isinstance(r, dict) for r in recipes.values()):
        raise DataError(f"{file} is no list of recipes. Expected JSON: {{name: recipe}}, each recipe an object.")
    return recipes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    add("--data", action="append", type=Path, required=True, metavar="DIR", help="labelled folder; may be repeated")
    add("--labels", action="append", type=int, metavar="N", help="labelled images; may be repeated (default: 20)")
    add("--seconds", type=float, default=SECONDS, help="of training (default: %(default)s)")
    recipes = parser.add_mutually_exclusive_group()
    recipes.add_argument("--recipe", default="{}", metavar="JSON", help="what differs from the shipped recipe")
    recipes.add_argument("--ablate", type=Path, metavar="FILE", help="several recipes, with their names")
    add("--seed", type=int, default=0, help="of the choice of labels and of the training (default: %(default)s)")
    add("--found", action="store_true", help="score without boxes, too")
    add("--jobs", type=int, default=1, help="rounds at a time; each then has one thread (default: %(default)s)")
    add("--reports", type=Path, default=Path("runs/reports"), metavar="DIR", help="results (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        named = read_recipes(args.ablate) if args.ablate else {"": _parsed(args.recipe)}
        base = load_checkpoint(args.model).base
        tasks = {}
        for name, recipe in named.items():
            for folder in args.data:
                for labels in args.labels or [20]:
                    task = Round(
                        args.model, base, folder, labels, args.seconds, args.seed, json.dumps(recipe), args.found
                    )
                    tasks[" ".join(filter(None, (name, folder.name, f"{labels} labels")))] = task
        left = {name: task for name, task in tasks.items() if not task.file(args.reports).is_file()}
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    try:
        failed = run_each(partial(measure, reports=args.reports), left, args.jobs)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on with the round that was not finished.", file=sys.stderr)
        return 130
    for name, task in tasks.items():
        if name not in failed:
            called = name.split(task.folder.name)[0]
            print(f"{called}{line(json.loads(task.file(args.reports).read_text()))}")
    return 2 if failed else 0


def _parsed(text: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--recipe is no JSON: {error}. Example: '{{\"rate\": 0.001}}'.") from None
    if not isinstance(recipe, dict):
        raise InvalidInput("--recipe is no JSON object. Example: '{\"rate\": 0.001}'.")
    return recipe


if __name__ == "__main__":
    sys.exit(main())
