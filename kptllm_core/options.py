"""How to evaluate: the options of a run, what fits together, and the flags of `python -m kptllm_core evaluate`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kptllm_core.ablation import ABLATIONS
from kptllm_core.baselines import BASELINES
from kptllm_core.errors import InvalidInput
from kptllm_core.messages import MAX_SUPPORT
from kptllm_core.protocol import BOXES, PARTS
from kptllm_core.published import PUBLISHED

PROMPTS = ("visual", "text", "both")
TASKS = ("detect", "name", "instances")
PROTOCOLS = ("episodes", *PUBLISHED)


@dataclass(frozen=True)
class Options:
    """How to evaluate; stands in the report as it was used."""

    shots: int = 1  # support objects of an episode
    episodes: int = 200  # per category
    queries: int = 15  # per episode
    seed: int = 1  # of everything random
    prompt: str = "both"  # what the model is shown: visual, text or both
    boxes: str = "given"  # the query's true box, a jittered one, or none (the object must be found)
    rotate: bool = False  # turn each query by a random angle
    cut: bool = False  # cut a third of each query's object off: the points there are absent
    wrong: int = 0  # of the shots, those that are labelled wrongly
    task: str = "detect"  # detect points, name points that are given, or find all objects
    part: str = "all"  # of the groups: those that pretraining sees (train), or never sees (heldout)
    protocol: str = "episodes"  # ours, or that of a public data set
    baseline: str | None = None  # what answers instead of the model
    without: tuple[str, ...] = ()  # parts of the model that are switched off

    def __post_init__(self) -> None:
        for value, allowed, flag in (
            (self.prompt, PROMPTS, "--prompt"),
            (self.boxes, BOXES, "--boxes"),
            (self.task, TASKS, "--task"),
            (self.part, PARTS, "--part"),
            (self.protocol, PROTOCOLS, "--protocol"),
            (self.baseline, (None, *BASELINES), "--baseline"),
            *((part, tuple(ABLATIONS), "--without") for part in self.without),
        ):
            if value not in allowed:
                raise InvalidInput(f"{flag} {value} is not known. Expected one of: {', '.join(filter(None, allowed))}.")
        least = 0 if self.prompt == "text" or self.task == "name" else 1
        for name, minimum in (("shots", least), ("episodes", 1), ("queries", 1), ("seed", 0)):
            number, flag = getattr(self, name), f"--{name}"
            if number < minimum:
                why = " (0 is possible with --prompt text only)" if name == "shots" else ""
                raise InvalidInput(f"{flag} {number} is too small. Expected at least {minimum}{why}.")
        if self.shots > MAX_SUPPORT:
            raise InvalidInput(f"--shots {self.shots} is too many. A prompt holds at most {MAX_SUPPORT} support examples.")
        if not 0 <= self.wrong < max(self.shots, 1):
            raise InvalidInput(f"--wrong {self.wrong} of {self.shots} shots. Expected at least one that is right; lower --wrong.")
        self._check_together()

    def _check_together(self) -> None:
        if self.baseline and self.without:
            raise InvalidInput(
                "--without switches off parts of the model; a --baseline has none of them. Leave one out."
            )
        if self.baseline and (self.task == "name" or self.prompt == "text"):
            raise InvalidInput(
                "A --baseline matches images: it neither names points nor finds them by text. Use --task detect, --prompt both."
            )
        if self.prompt == "text" and "identify" in self.without:
            raise InvalidInput("--prompt text without identify leaves nothing to ask. Use --prompt both.")
        if self.task == "name" and set(self.without) - {"extractor"}:
            raise InvalidInput(
                "--task name uses of these parts only the extractor. Use --without extractor, or --task detect."
            )
        if self.task == "instances" and (self.protocol != "episodes" or self.baseline or self.without or self.rotate or self.cut or self.wrong):
            raise InvalidInput("--task instances looks at whole images as they are. Leave out --protocol, --baseline, --without, --rotate, "
                               "--cut and --wrong.")  # fmt: skip
        if self.task == "instances" and self.boxes != Options.boxes:
            raise InvalidInput(f"--task instances finds the boxes itself; --boxes {self.boxes} means nothing there. Leave it out.")
        if self.protocol != "episodes" and (self.cut or self.wrong):
            raise InvalidInput(f"--cut and --wrong belong to our own episodes; {self.protocol} knows neither. Leave them out.")
        if self.protocol != "episodes" and self.part != "all":
            raise InvalidInput(
                f"--part splits the groups of our folders; {self.protocol} has its own split. Leave --part out."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m kptllm_core evaluate`."""
    default = Options()
    add = parser.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    add("--model", default="nano", help="preset (nano, tiny) or checkpoint folder (default: %(default)s)")
    add("--untrained", action="store_true", help="random weights of the same architecture: what the training is worth")
    add("--adapter", **folder, help="LoRA adapter folder made for this model")
    add("--data", **folder, action="append", help="folder to evaluate on; may be repeated")
    add("--support", **folder, help="draw the support examples from this folder (default: from --data)")
    add("--protocol", choices=PROTOCOLS, default=default.protocol, help="episodes from folders (--data), or the published "
        "protocol of a data set that you have: mp100 or ap10k, with --annotations and --images (default: %(default)s)")  # fmt: skip
    add("--annotations", type=Path, metavar="FILE", help="with --protocol mp100 or ap10k: the split's annotation file")
    add("--images", **folder, help="with --protocol mp100 or ap10k: the folder in which the file's image names start")
    add("--shots", **number, default=default.shots, help=f"support objects of an episode, 1 to {MAX_SUPPORT} (default: %(default)s)")
    add("--episodes", **number, default=default.episodes, help="episodes per category (default: %(default)s)")
    add("--queries", **number, default=default.queries, help="queries per episode (default: %(default)s)")
    add("--seed", **number, default=default.seed, help="of everything random (default: %(default)s)")
    add("--prompt", choices=PROMPTS, default=default.prompt, help="what the model is shown (default: %(default)s)")
    add("--boxes", choices=BOXES, default=default.boxes, help="the query's true box, as in the protocol; or moved and "
        "scaled a little; or none: the object must be found, as in serving (default: %(default)s)")  # fmt: skip
    add("--rotate", action="store_true", help="turn each query in the plane by a random angle")
    add("--cut", action="store_true", help="cut a third off each query's object, as the border of a photograph does: is a point "
        "that is not there said to be absent?")  # fmt: skip
    add("--wrong", **number, default=default.wrong, help="of the shots, how many are labelled wrongly, each point at the place "
        "of another (default: %(default)s)")  # fmt: skip
    add("--task", choices=TASKS, default=default.task, help="find the points of an object, name given ones, or "
        "find all objects of whole images with their points (default: %(default)s)")  # fmt: skip
    add("--part", choices=PARTS, default=default.part, help="only groups that pretraining sees, or the tenth that it never "
        "sees: what naming is measured on (default: %(default)s)")  # fmt: skip
    add("--baseline", choices=BASELINES, help="let this answer instead of the model, on the same crops: plain correlation of the "
        "model's own features, SIFT descriptors, or patches by normalised cross-correlation (the last two need OpenCV)")  # fmt: skip
    parts = "; ".join(f"{name}: {what}" for name, what in ABLATIONS.items())
    add("--without", choices=tuple(ABLATIONS), action="append", help="switch a part off while testing; may be repeated. The "
        f"model was trained with it, so this says how much it leans on it. {parts}")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--draw", **folder, help="also write a picture per category: supports, predicted and true points")
    add("--out", type=Path, metavar="FILE", default=Path("report.json"), help="the report (default: %(default)s)")
