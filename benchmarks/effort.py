"""How much work is left? Replays a labelled set as a project, with its truth as the annotator, through the real backend.

    python benchmarks/effort.py --data DIR --examples 5 --rounds 15,30,60,100 --tolerance 0.05 --out effort.json

DIR holds annotations.json (COCO keypoints) and images/. The script starts backend and core on free ports, labels the first images by
hand, lets each further one be predicted as a whole (no box is given), counts what a person would have to correct, annotates it
with its truth, and trains when so many images are labelled as --rounds says. What is predicted is always new to the model.

`effort` is the number of points that were placed, moved, added or deleted, per point of all images: 1.0 is labelling by hand, and the
examples count as such. `moved_share` is the same on the images between one round and the next (see corrections.py). Beside
it the same replay for a heatmap network trained from scratch at the same rounds, for the same time (from_scratch.py), before
whose first round everything is labelled by hand: `baseline_effort`.

Only images that show exactly one object are played; COCO's v = 0 is read as "not there". Rounds that leave no next images are left
out. A picture of the curves lies beside --out, and a folder with the state: an interrupted replay goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backend.demo.samples import Material, Picture, choose, from_folder
from backend.demo.services import alone_in
from benchmarks.corrections import Corrections, corrections, running_effort, stretches, total
from benchmarks.replay import Log, Player, counted, playing, read
from benchmarks.studio import Studio
from kptllm_core import report
from kptllm_core.errors import DataError, InvalidInput, KptError

FEWEST = 10  # labelled images in the backend's first round
BASELINE = (
    "A small U-Net with score maps and offsets, trained from scratch in every round on all images labelled so far, for the seconds that "
    "the product's round took; before its first round everything is labelled by hand. It has no pretrained backbone, as DeepLabCut's "
    "has: none can be had offline."
)


def play(player: Player, examples: int, rounds: Sequence[int]) -> None:
    """The whole replay, or what is left of it."""
    count = len(player.pictures)
    with tqdm(total=count, initial=player.labelled(), desc="images labelled", unit="image", smoothing=0.05) as bar:
        while player.labelled() < count:
            trained = len(player.log.of("round"))
            if trained < len(rounds) and player.labelled() == rounds[trained]:
                train(player, rounds[trained], trained)
            before = player.labelled()
            if before < examples:
                player.label()
            else:
                end = next((r for r in rounds if r > before), count)
                player.predict_and_correct(end)
            bar.update(player.labelled() - before)
            bar.set_postfix_str(f"effort so far {running_effort([counted(i) for i in player.log.of('image')])[-1]:.3f}")


def train(player: Player, images: int, number: int) -> None:
    """One round of the product, with a bar of its own."""
    with tqdm(total=1000, desc=f"round {number + 1}", leave=False, bar_format="{l_bar}{bar}| {postfix}") as bar:

        def progress(job: dict[str, Any]) -> None:
            told = job["progress"] or {}
            share = (told.get("step") or 0) / max(told.get("steps") or 0, 1)
            bar.update(max(int(1000 * min(share, 1.0)) - bar.n, 0))
            bar.set_postfix_str(str(job["message"] or job["state"])[:60])

        account = player.train(number, progress)
    player.log.add({"round": {"images": images, **account}})
    tqdm.write(f"Round {number + 1} on {images} images: {account['seconds']:.0f} s of training. {account['reason']}")


def play_baseline(
    log: Log, pictures: Sequence[Picture], rounds: Sequence[int], tolerance: float, seed: int, device: str
) -> None:
    """The same images, the same rounds and seconds, for a heatmap network from scratch."""
    from benchmarks.from_scratch import fit

    done = len(log.of("baseline"))
    for account, (first, end) in list(zip(log.of("round"), stretches(0, rounds, len(pictures))[1:], strict=True))[done:]:
        shown, truths = [read(p) for p in pictures[:first]], [p.truth for p in pictures[:first] if p.truth is not None]
        with tqdm(total=1000, desc=f"from scratch, {first} images", bar_format="{l_bar}{bar}| {postfix}") as bar:

            def progress(steps: int, share: float, bar: tqdm = bar) -> None:
                bar.update(int(1000 * share) - bar.n)
                bar.set_postfix_str(f"{steps} steps")

            model = fit(
                shown, truths, account["seconds"], lambda t, p: corrections(t, p, tolerance).actions, seed, progress, device
            )
        counts = [corrections(p.truth, model.predict(read(p)), tolerance) for p in pictures[first:end] if p.truth is not None]
        about = {"images": first, "seconds": round(model.seconds, 1), "steps": model.steps, "cutoff": model.cutoff}
        log.add({"baseline": {**about, "counts": [vars(c) for c in counts]}})


def account_of(log: Log, examples: int, rounds: Sequence[int]) -> dict[str, Any]:
    """The figures of a finished replay."""
    images = [counted(line) for line in log.of("image")]
    manual = [Corrections(c.points, missing=c.points) for c in images]
    parts = [images[first:end] for first, end in stretches(examples, rounds, len(images))]
    assisted = [Corrections(**c) for line in log.of("baseline") for c in line["counts"]]
    baseline = manual[: len(images) - len(assisted)] + assisted
    found = [{**line, **total(part).to_json(), "next_images": len(part)} for line, part in zip(log.of("round"), parts[1:], strict=True)]
    compared = [
        {**{k: v for k, v in line.items() if k != "counts"}, **total(Corrections(**c) for c in line["counts"]).to_json()}
        for line in log.of("baseline")
    ]
    curves = {"effort": running_effort(images), "baseline_effort": running_effort(baseline)}
    return {
        "effort": round(curves["effort"][-1], 4),
        "baseline_effort": round(curves["baseline_effort"][-1], 4),
        "images": len(images),
        "points": total(images).points,
        "examples": examples,
        "before_rounds": {"images": examples, **total(parts[0]).to_json(), "next_images": len(parts[0])},
        "rounds": found,
        "baseline_rounds": compared,
        "baseline": BASELINE,
        "curves": {name: [round(v, 4) for v in curve] for name, curve in curves.items()},
    }


def draw(result: dict[str, Any], file: Path) -> None:
    """Left: what must be corrected on the images between two rounds. Right: all the work so far."""
    from matplotlib.figure import Figure

    ours, theirs = {"color": "#0072b2", "lw": 2}, {"color": "#b35900", "lw": 2, "ls": "--"}
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends = [r["images"] for r in result["rounds"]] + [result["images"]]
    hand = {"images": 0, "moved_share": 1.0}
    product = [hand, result["before_rounds"], *result["rounds"]]
    for stages, stops, style, name in (
        (product, [result["examples"], *ends], ours, "this product"),
        ([hand, *result["baseline_rounds"]], ends, theirs, "heatmap network from scratch"),
    ):
        edges = [s["images"] for s in stages] + [stops[-1]]
        left.stairs([100 * (s["moved_share"] or 0.0) for s in stages], edges, baseline=None, label=name, **style)
    for name, style in (("effort", ours), ("baseline_effort", theirs)):
        label = f"{'this product' if name == 'effort' else 'heatmap network from scratch'}: {result[name]:.2f}"
        right.plot(range(1, result["images"] + 1), [100 * v for v in result["curves"][name]], label=label, **style)
    for axis, title in ((left, "To correct on the next images"), (right, "All the work so far")):
        for number in ends[:-1]:
            axis.axvline(number, color="0.8", lw=1, zorder=0)
        axis.axhline(100, color="0.5", lw=1, zorder=0)
        axis.set(title=title, xlabel="labelled images (grey lines: training rounds)", ylabel="% of labelling by hand")
        axis.set(xlim=(0, result["images"]), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(f"{result['data']}: {result['images']} images, {result['examples']} examples, a point is right within "
                    f"{result['tolerance']:g} of the object's size")  # fmt: skip
    figure.savefig(file, dpi=130)


def material_of(folder: Path) -> Material:
    """A project over a COCO folder in which a point that nobody placed is not there."""
    found = from_folder(folder / "images", folder / "annotations.json", None)
    config, changed = re.subn("<KeyPointLabels ", '<KeyPointLabels model_missing="absent" ', found.config, count=1)
    assert changed
    return Material(f"Replay of {folder.name}", config, found.pictures)


def fitting_rounds(asked: Sequence[int], examples: int, images: int) -> list[int]:
    """Those that leave next images. InvalidInput where none can be played as asked."""
    if examples < 1 or min(asked) < FEWEST or min(asked) <= examples or list(asked) != sorted(set(asked)):
        raise InvalidInput(f"--rounds {','.join(map(str, asked))} with {examples} examples: expected at least 1 example, and rising numbers of "
                           f"labelled images, of which the first is at least {FEWEST} and above the number of examples.")  # fmt: skip
    kept = [r for r in asked if r < images]
    if not kept:
        raise DataError(f"The set has {images} images with one object each; --rounds begins with {asked[0]}, which leaves none to predict. "
                        "Choose a larger set or earlier rounds.")  # fmt: skip
    return kept


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The replay and its report. Raises KptError."""
    material = material_of(args.data)
    pictures = choose(material.labelled, args.images, args.seed)
    rounds = fitting_rounds(args.rounds, args.examples, len(pictures))
    told = {"data": args.data.name, "annotations": hashlib.sha256((args.data / "annotations.json").read_bytes()).hexdigest()[:16],
            "images": args.images, "rounds": rounds, "examples": args.examples, "tolerance": args.tolerance, "seed": args.seed,
            "model": args.model, "seconds": args.seconds}  # fmt: skip
    folder = args.out.with_suffix(".state").resolve()
    with alone_in(folder, "Another replay works in {folder}. Wait for it, or name another --out."):
        log = Log(folder / "replay.jsonl", told)
        if len(log.of("image")) < len(pictures):
            settings = {"MODEL": args.model, "ROUND_SECONDS": str(args.seconds), "DEVICE": args.device}
            with (
                Studio(material.title, material.config, [p.path for p in pictures]) as studio,
                playing(folder, studio, pictures, args.tolerance, log, settings) as player,
            ):
                play(player, args.examples, rounds)
        play_baseline(log, pictures, rounds, args.tolerance, args.seed, args.device)
    result = account_of(log, args.examples, rounds)
    left_out = {"rounds": [r for r in args.rounds if r not in rounds], "images": len(material.pictures) - len(pictures)}
    versions = [line["version"] for line in log.of("image") if line["version"]]
    about = {"data": args.data.name, "tolerance": args.tolerance, "seed": args.seed, "base": versions[0].partition("+")[0],
             "round_seconds": args.seconds, "left_out": left_out}  # fmt: skip
    return {**{k: result.pop(k) for k in ("effort", "baseline_effort")}, **about, **result}


def main(argv: Sequence[str] | None = None) -> int:
    args = _options(argv)
    try:
        result = run(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(args.out, result)
        draw(result, args.out.with_suffix(".png"))
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    for line in (result["before_rounds"], *result["rounds"]):
        print(f"after {line['images']} images: {100 * line['moved_share']:.1f} % to correct on the next {line['next_images']}")
    print(f"effort {result['effort']:.3f}; heatmap network from scratch {result['baseline_effort']:.3f}; by hand 1. Report: {args.out}")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="labelled folder")
    add("--examples", type=int, default=5, help="images labelled by hand at the start (default: %(default)s)")
    add("--rounds", type=_numbers, default=[15, 30, 60, 100], help="labelled images at each round (default: 15,30,60,100)")
    add("--tolerance", type=_share, default=0.05, help="how far off is right, in shares of the object's size (default: %(default)s)")
    add("--images", type=int, default=300, help="at most so many of the set's are played (default: %(default)s)")
    add("--seconds", type=float, default=180.0, help="of training in a round (default: %(default)s)")
    add("--model", default="nano", help="preset or checkpoint folder (default: %(default)s)")
    add("--device", default="auto", help="where the model computes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the images (default: %(default)s)")
    add("--out", type=Path, default=Path("effort.json"), help="report (default: %(default)s)")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 15,30,60") from None


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0.001 <= value <= 0.5):
        raise argparse.ArgumentTypeError(f"{text} is not between 0.001 and 0.5")
    return value


if __name__ == "__main__":
    sys.exit(main())
