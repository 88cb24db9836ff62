"""Measures a checkpoint from its shipped files and writes the tables into its model card.

    python benchmarks/model_card.py --data DIR [--data DIR …] [--trained DIR …] [--model nano] [--jobs 2]
    python benchmarks/model_card.py --data DIR … --only baselines --only naming
    python benchmarks/model_card.py --data DIR … --pictures runs/pictures

--data: labelled folders of categories that were never trained on. --trained: folders that were, whose unseen groups are
named. Every single measurement is kept in --reports, named by the weights and what was asked, so an interrupted run goes
on where it was, and a new checkpoint begins anew; new code does not, so give it another --reports. The card (README.md
beside the weights, between its two markers) is written from all that is there, also when --only restricts what is measured
now. Evaluations run in --jobs processes of one thread; times and LoRA rounds are measured afterwards, one at a time, with
all threads: leave the machine to them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import one_pass, rounds, tables
from benchmarks.parallel import run_each
from kptllm_core import evaluate, report
from kptllm_core.ablation import ABLATIONS
from kptllm_core.checkpoint import load_checkpoint
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.dataset import held_out, load_coco
from kptllm_core.errors import DataError, InvalidInput, KptError
from kptllm_core.keypoints import Visibility
from kptllm_core.predictor import load_predictor
from kptllm_core.synthetic import Category, write_dataset

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- measured: start -->", "<!-- measured: end -->"
EVALUATIONS: dict[str, dict[str, tuple[str, ...]]] = {  # table → name → flags of `python -m kptllm_core evaluate`
    "accuracy": {
        "1-shot": (), "found": ("--boxes", "found"), "rotated": ("--rotate",), "5-shot": ("--shots", "5"),
        "text": ("--prompt", "text"), "visual": ("--prompt", "visual"), "one wrong": ("--shots", "5", "--wrong", "1"),
    },
    "visibility": {
        "cut": ("--cut",),
    },
    "baselines": {
        f"{turned}{name}": (*(flags if name == "untrained" else ("--baseline", name)), *(("--rotate",) if turned else ()))
        for name, flags in zip(tables.BASELINES, (("--untrained",), (), (), ()), strict=True) for turned in ("", "rotated ")
    },
    "objects": {
        f"objects {prompt}": ("--task", "instances", "--shots", "5", "--prompt", prompt, "--episodes", "6") for prompt in tables.PROMPTED
    },
    "ablations": {f"without {part}": ("--without", part) for part in ABLATIONS},
}  # fmt: skip
NAMING = ("--task", "name", "--part", "heldout")
TABLES = (*EVALUATIONS, "naming", "latency", "rounds", "recipes")
LABELS = (10, 20, 50)
SCENES = (6, 12, 384)  # rendered kinds with several objects, images of each, pixels
LEAST_SCORED = 10  # images that a round must leave to be scored, and objects with occluded points worth a row
RECIPES_ON = ("dlc_horse_walk", "dpk_fly")  # two kinds: animals in motion, one animal in one place
OPEN = ("glue_tubes", "dpk_fly")  # sets whose pictures may lie in the repository; renderings may, too
IGNORED = ("runs", "artifacts", ".data")  # folders of the repository that nobody commits


@dataclass(frozen=True)
class Measurement:
    """One call of `python -m kptllm_core evaluate`. base: whose report it must be, or None for what has no weights."""

    flags: tuple[str, ...]
    base: str | None
    file: Path


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and where the results are kept."""

    model: str
    base: str
    crop: int  # side of the model's crops, pixels
    data: tuple[Path, ...]
    trained: tuple[Path, ...]
    reports: Path
    episodes: int
    queries: int
    seconds: float
    seed: int
    recipes: dict[str, dict[str, Any]]

    @property
    def scenes(self) -> Path:
        return self.reports.parent / "rendered_scenes"

    def evaluation(self, folder: Path, name: str, flags: tuple[str, ...]) -> Measurement:
        """Classical matching knows no weights: its reports serve every checkpoint whose crops are as large."""
        owner = f"classical{self.crop}" if name.endswith(("sift", "template")) else self.base
        size = f"{self.episodes}x{self.queries}" + (f"-{rounds.found_by(self.model)}" if name.startswith("objects") else "")
        file = self.reports / f"{owner}-{folder.name}-{name.replace(' ', '-')}-{size}.json"
        data = [part for kind in (sorted(folder.glob("kind_*")) or [folder]) for part in ("--data", str(kind))]
        call = ("--model", self.model, *data, "--episodes", str(self.episodes), "--queries", str(self.queries),
                *flags, "--out", str(file))  # fmt: skip
        return Measurement(call, None if "--baseline" in flags or "--untrained" in flags else self.base, file)

    def evaluations(self) -> Iterator[tuple[str, str, Path, Measurement]]:
        """(table, name, folder, measurement) of all."""
        for table, named in EVALUATIONS.items():
            for folder in (*self.data, *([self.scenes] if table == "objects" else ())):
                for name, flags in named.items():
                    yield table, name, folder, self.evaluation(folder, name, flags)
        for folder in self.trained:
            samples = load_coco(folder).samples
            unseen = held_out(s.group for s in samples)
            marked = [s for s in samples if s.group in unseen and (s.keypoints.visibility == Visibility.OCCLUDED).any()]
            if len({s.image_path for s in samples}) < len(samples):  # several objects on an image
                for name, flags in EVALUATIONS["objects"].items():
                    yield "objects", name, folder, self.evaluation(folder, name, flags)
            if len(marked) >= LEAST_SCORED:
                yield "visibility", "unseen groups", folder, self.evaluation(folder, "unseen groups", ("--part", "heldout"))
            if unseen:
                yield "naming", "naming", folder, self.evaluation(folder, "naming", NAMING)

    def rounds(self) -> Iterator[tuple[str, rounds.Round]]:
        """(name of the recipe or "", round). The shipped recipe comes first, on every folder that is large enough."""
        plain = partial(rounds.Round, self.model, self.base, seconds=self.seconds, seed=self.seed)
        for folder in self.data:
            images = len({s.image_path for s in evaluate.load_categories([folder])[0].samples})
            for labels in LABELS:
                if images - labels >= LEAST_SCORED:
                    yield "", plain(folder, labels)
        for name, recipe in self.recipes.items():
            for folder in self.data:
                if folder.name in RECIPES_ON:
                    yield name, plain(folder, 20, recipe=json.dumps(recipe))

    @property
    def latency(self) -> Path:
        return self.reports / f"{self.base}-latency.json"


def measure(task: Measurement) -> None:
    """Runs the command here, in silence. KptError if the weights are no longer those that were asked for."""
    parser = argparse.ArgumentParser("evaluate")
    evaluate.add_arguments(parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            evaluate.run(parser.parse_args(task.flags))
    except SystemExit:
        raise InvalidInput(f"{' '.join(task.flags)}: {said.getvalue().strip().splitlines()[-1]}") from None
    found = json.loads(task.file.read_text())["base"]
    if task.base is not None and not found.startswith(task.base):
        task.file.unlink()
        raise KptError(f"The weights are now {found}; {task.base} was to be measured. Start again.")


def measure_latency(model: str, file: Path, repeats: int = 9) -> None:
    """Writes the fastest times of `one_pass.py`."""
    predictor = load_predictor(model)
    seconds = one_pass.measure(predictor, repeats)
    report.write_json(file, {"seconds": seconds, "threads": torch.get_num_threads(), "device": str(predictor.device)})


def render_scenes(target: Path) -> None:
    """Kinds that were never seen, with 0 to 12 objects an image; kept from run to run."""
    kinds, images, size = SCENES
    for number in range(kinds):
        folder = target / f"kind_{number}"
        if not (folder / "annotations.json").is_file():
            write_dataset(folder, Category.sample(np.random.default_rng([2026, number])), images, seed=number, size=size, objects=(0, 12))


def run(plan: Plan, only: Sequence[str], jobs: int) -> dict[str, str]:
    """Measures what is missing. Returns {measurement: why it failed}."""
    if "objects" in only:
        render_scenes(plan.scenes)
    tasks = {f"{folder.name} {name}": m for table, name, folder, m in plan.evaluations() if table in only}
    failed = run_each(measure, {n: m for n, m in tasks.items() if not m.file.is_file()}, jobs)
    if "latency" in only and not plan.latency.is_file():
        failed |= run_each(partial(measure_latency, plan.model), {"latency": plan.latency})
    trained: dict[Path, tuple[str, rounds.Round]] = {}  # by file: the shipped recipe stands in both tables
    for recipe, one in plan.rounds():
        file = one.file(plan.reports)
        if ("recipes" if recipe else "rounds") in only and not file.is_file():
            trained.setdefault(file, (f"{one.folder.name} round on {one.labels}{recipe and f', {recipe}'}", one))
    return failed | run_each(partial(rounds.measure, reports=plan.reports), dict(trained.values()))


def collect(plan: Plan) -> tables.Findings:
    """Everything that has been measured of these weights."""
    folder = model_folder(plan.model)
    size = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    found = tables.Findings(plan.base, size, trained=tuple(folder.name for folder in plan.trained))
    for table, name, data, task in plan.evaluations():
        if task.file.is_file():
            result = json.loads(task.file.read_text())
            if table == "naming":
                found.naming[data.name] = result
            else:
                found.evaluations.setdefault(data.name, {})[name] = result
    for recipe, one in plan.rounds():
        if (file := one.file(plan.reports)).is_file():
            result = json.loads(file.read_text())
            if recipe:
                found.recipes.setdefault(recipe, {})[one.folder.name] = result
            else:
                found.rounds.setdefault(one.folder.name, {})[one.labels] = result
    if plan.latency.is_file():
        found.latency = json.loads(plan.latency.read_text())
    if (file := folder / "metrics.json").is_file():
        found.curve = json.loads(file.read_text()).get("curve", [])
    return found


def write_card(plan: Plan, found: tables.Findings) -> Path:
    """Puts the tables between the markers of the model's README. DataError if it has none."""
    path = model_folder(plan.model) / "README.md"
    text = path.read_text() if path.is_file() else ""
    if not (START in text and END in text.split(START)[1]):
        raise DataError(f"{path} has no place for the tables. Write the lines {START} and {END} into it.")
    sizes = f"--episodes {plan.episodes} --queries {plan.queries}"
    lines = [f"Weights `{plan.base}`; {plan.episodes} episodes × {plan.queries} queries for each category, prompt `both` unless said, "
             "seed 1. Repeat a figure with", "",
             f"    python -m kptllm_core evaluate --model {plan.model} --shots 1 {sizes} --boxes given --data DIR", "",
             *tables.card(found)]  # fmt: skip
    if (path.parent / "curve.png").is_file():
        lines += ["", "![Training curve](curve.png)"]
    before, rest = text.split(START)
    path.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1])
    return path


def draw(plan: Plan, folder: Path) -> None:
    """A picture for each category: one support and four queries, predicted and true points. KptError where it may not lie."""
    for data in plan.data:
        check_place(folder, data)
    for data in plan.data:
        file = plan.reports / f"{plan.base}-{data.name}-pictures.json"
        call = ("--model", plan.model, "--data", str(data), "--episodes", "1", "--queries", "4", "--draw", str(folder), "--out", str(file))
        measure(Measurement(call, plan.base, file))


def check_place(folder: Path, data: Path) -> None:
    """Pictures of images that are not free to be passed on stay out of the repository. InvalidInput for those."""
    target = folder.resolve()
    inside = target.is_relative_to(ROOT) and target.relative_to(ROOT).parts[:1] not in [(name,) for name in IGNORED]
    if inside and data.name not in OPEN and not _rendered(data):
        raise InvalidInput(f"The images of {data.name} may not be passed on, so their pictures may not lie in {folder}. "
                           f"Choose a folder below runs/, or leave out --data {data}.")  # fmt: skip


def _rendered(data: Path) -> bool:
    kinds = json.loads((data / "annotations.json").read_text())["categories"]
    return all(kind.get("supercategory") == "rendered" for kind in kinds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    add("--data", action="append", type=Path, required=True, metavar="DIR", help="folder never trained on; may be repeated")
    add("--trained", action="append", type=Path, default=[], metavar="DIR", help="folder trained on, for naming; may be repeated")
    add("--only", action="append", choices=TABLES, help="measure for this table; may be repeated (default: all)")
    add("--episodes", type=int, default=40, help="of each category (default: %(default)s)")
    add("--queries", type=int, default=5, help="of each episode (default: %(default)s)")
    add("--seconds", type=float, default=rounds.SECONDS, help="of a round's training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the rounds (default: %(default)s)")
    add("--recipes", type=Path, default=ROOT / "benchmarks" / "recipes.json", metavar="FILE", help="recipes of rounds to compare")
    add("--jobs", type=int, default=2, help="processes that evaluate (default: %(default)s)")
    add("--reports", type=Path, default=Path("runs/reports"), metavar="DIR", help="results (default: %(default)s)")
    add("--pictures", type=Path, metavar="DIR", help="draw one picture of each category there, and measure nothing")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        crop = ModelConfig.load(model_folder(args.model)).image_size
        plan = Plan(
            args.model, load_checkpoint(args.model).base, crop, tuple(args.data), tuple(args.trained), args.reports,
            args.episodes, args.queries, args.seconds, args.seed, rounds.read_recipes(args.recipes),
        )  # fmt: skip
        if args.pictures:
            draw(plan, args.pictures)
            return 0
        failed = run(plan, args.only or TABLES, args.jobs)
        found = collect(plan)
        print("\n".join(tables.targets_table(found)))
        print(f"The tables are in {write_card(plan, found)}.")
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where it was.", file=sys.stderr)
        return 130
    for name, message in failed.items():
        print(f"not measured: {name}: {message}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
