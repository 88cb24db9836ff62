"""Measures a checkpoint on held-out folders and writes the table into its model card.

    python benchmarks/model_card.py --data DIR [--data DIR …] [--model nano] [--episodes 40] [--queries 5]

For each folder: 1-shot PCK with given and with found boxes, beside the copy baseline and the same architecture untrained.
The numbers come from `evaluate`, from the shipped files. They go between the markers of the card (README.md beside the
weights), with the command that repeats them. Interrupted, it goes on: finished reports are kept in --reports.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kptllm_core.config import model_folder
from kptllm_core.errors import KptError
from kptllm_core.evaluate import Options, evaluate, load_categories
from kptllm_core.predictor import load_predictor

START, END = "<!-- measured: start -->", "<!-- measured: end -->"
RUNS = ((False, "given"), (False, "found"), (True, "given"), (True, "found"))  # untrained, boxes


def report(model: str, folder: Path, untrained: bool, options: Options, keep: Path) -> dict[str, Any]:
    """One report, from the folder of finished ones if it is there for the same weights."""
    predictor = load_predictor(model, untrained=untrained)
    path = keep / f"{predictor.base}-{folder.name}-{options.boxes}-{options.episodes}x{options.queries}.json"
    if not path.is_file():
        keep.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(evaluate(predictor, load_categories([folder]), options)))
    return json.loads(path.read_text())


def table(reports: dict[str, dict[tuple[bool, str], dict[str, Any]]]) -> list[str]:
    """Markdown: a row for each folder."""
    lines = ["| category | pairs | copy @.1 | untrained @.1 given / found | **@.1 given** (95 %) | @.05 / @.2 given | **@.1 found** (95 %) "
             "| calibration error | s / image |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in reports.items():
        given, found = runs[False, "given"], runs[False, "found"]
        bare = [runs[True, b]["pck"]["0.1"] for b in ("given", "found")]
        ranges = ["{:.2f} ({:.2f}–{:.2f})".format(r["pck"]["0.1"], *r["pck_ci"]["0.1"]) for r in (given, found)]
        lines.append(f"| {name} | {given['pairs']} | {given['copy_pck']['0.1']:.2f} | {bare[0]:.2f} / {bare[1]:.2f} | {ranges[0]} "
                     f"| {given['pck']['0.05']:.2f} / {given['pck']['0.2']:.2f} | {ranges[1]} | {given['calibration_error']:.2f} "
                     f"| {given['seconds_per_image']:.2f} |")  # fmt: skip
    counted = [r[False, "given"] for r in reports.values() if r[False, "given"]["copy_pck"]["0.1"] < 0.5]
    skill = [(r["pck"]["0.1"] - r["copy_pck"]["0.1"]) / (1 - r["copy_pck"]["0.1"]) for r in counted]
    if skill:
        mean = sum(skill) / len(skill)
        lines += ["", f"Skill over copying, 1-shot, given boxes, mean over the {len(skill)} categories with copy@.1 below 0.5: **{mean:.2f}**."]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", action="append", type=Path, required=True, metavar="DIR")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--reports", type=Path, default=Path("runs/reports"), metavar="DIR")
    args = parser.parse_args()
    reports: dict[str, dict[tuple[bool, str], dict[str, Any]]] = {}
    try:
        for folder in args.data:
            for untrained, boxes in RUNS:
                options = Options(shots=1, episodes=args.episodes, queries=args.queries, boxes=boxes)
                reports.setdefault(folder.name, {})[untrained, boxes] = report(args.model, folder, untrained, options, args.reports)
        base = load_predictor(args.model).base
    except KptError as error:
        print(error.message, file=sys.stderr)
        return 2
    sizes = f"--episodes {args.episodes} --queries {args.queries}"
    lines = [f"Weights `{base}`; {args.episodes} episodes × {args.queries} queries for each category, prompt `both`, seed 1.",
             "Repeat a figure with", "", f"    python -m kptllm_core evaluate --model {args.model} --shots 1 {sizes} --boxes given --data DIR",
             "", *table(reports)]  # fmt: skip
    card = model_folder(args.model) / "README.md"
    text = card.read_text()
    before, rest = text.split(START)
    card.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1])
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
