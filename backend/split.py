"""Which labelled images judge, which teach, which are shown as support examples. Pure functions.

THE RULE. An image is used for one thing only, decided once for its whole group (images of one video or subject: the task's
`group`, `video` or `subject`, else each task by itself). A *held-out* image judges new versions; it is never trained on and
never shown as an example, and that stays so for ever, however the project grows or shrinks, also when the task is moved to
another group, or its picture comes back in another task (held_out.py).

- Below ten labelled images there is nothing to judge, since nothing is trained: all may be support examples, and those that
  were examples once are for teaching for ever.
- From ten on a fifth is held out, at least five. Which ones: undecided groups in the order of a hash of project and group,
  until the number is reached. So of ten images five judge, and the other five teach and are the examples; the share falls
  as labels come in (5 of 15, 5 of 25) and is a fifth from 25 on. Fewer than five would make the judgement a matter of luck:
  one point more or less of a single image would decide.
- A round that finds fewer than five (all images of one video, say) says so and does not train.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from label_config.schema import LabelConfig

STEPS = (1, 2, 5, 10)  # labelled images at which the support set is chosen anew
MAX_SUPPORT = 20  # examples that a round chooses; each image is shown the most alike of them
HELDOUT_SHARE = 0.2
MIN_HELDOUT = 5
TRAIN, HELDOUT = "train", "heldout"
RETRY = "+retry"  # ends the model_version of an empty prediction that is worth asking for again
MADE_HERE = re.compile(r".+\+r\d+\+s\d+(\.[0-9a-f]{6})?(\+retry)?")  # a model_version of ours, of whatever base


@dataclass(frozen=True)
class Candidate:
    """The annotation that speaks for a labelled image: ground truth first, then the newest."""

    row: int  # annotations.id
    task: int
    group: str
    points: int
    ground_truth: bool = False


def group_alone(task: int) -> str:
    """The group of a task that names none; `versions.heldout_tasks` says the same in SQL."""
    return f"task={task}"


def step_of(labelled: int) -> int:
    """The largest of STEPS that the number of labelled images has reached, 0 before the first."""
    return max((s for s in STEPS if s <= labelled), default=0)


def rank(project: str, group: str) -> float:
    """0…1, the same for ever: its order decides who is held out and, among equals, who is a support example."""
    return int.from_bytes(hashlib.sha256(f"{project}/{group}".encode()).digest()[:8], "big") / 2**64


def quota(images: int) -> int:
    """How many of so many labelled images are held out."""
    return max(MIN_HELDOUT, math.ceil(HELDOUT_SHARE * images))


def assign(project: str, candidates: list[Candidate], uses: dict[str, str], everything: bool) -> dict[str, str]:
    """Uses of the groups that have none yet. What `uses` says already stays.

    Groups of the lowest rank are held out until the quota of images is reached. `everything`: all others become
    training groups; otherwise they stay open.
    """
    images: dict[str, int] = {}
    for candidate in candidates:
        images[candidate.group] = images.get(candidate.group, 0) + 1
    judged = sum(n for group, n in images.items() if uses.get(group) == HELDOUT)
    wanted = quota(len(candidates))
    new: dict[str, str] = {}
    for group in sorted((g for g in images if g not in uses), key=lambda g: rank(project, g)):
        if judged < wanted:
            new[group] = HELDOUT
            judged += images[group]
        elif everything:
            new[group] = TRAIN
    return new


def too_few(train: list[Candidate], heldout: list[Candidate]) -> str:
    """Why a round cannot be: what there is, what is needed, what helps."""
    images, groups = len(train) + len(heldout), len({c.group for c in train + heldout})
    together = f" The {images} images are in {groups} groups (videos, subjects), which stay together." if groups < images else ""
    return (
        f"{len(train)} images to train on and {len(heldout)} to judge by, which were never shown to the model; at least "
        f"{MIN_HELDOUT} must judge.{together} Label {max(MIN_HELDOUT - len(heldout), 1)} more{' of other groups' if together else ''}."
    )


def support_order(project: str, candidates: list[Candidate], uses: dict[str, str]) -> list[Candidate]:
    """Who is to be a support example first: ground truth, then the most complete, then by rank. Held-out ones never are."""
    free = [c for c in candidates if uses.get(c.group) != HELDOUT]
    return sorted(free, key=lambda c: (not c.ground_truth, -c.points, rank(project, c.group), c.task))


def version_name(base: str, round_number: int, support: list[Any], config: LabelConfig) -> str:
    """`nano-1a2b3c4d+r2+s5.9f31ab`: base, round, size and content of the support set.

    The content includes what is asked for (names, their labels, boxes), so that a label config that changes predictions is a new version,
    too; the order of the names changes none.
    """
    shown = [
        [
            entry["task"],
            control,
            example["image"],
            sorted(zip(points["names"], points["xy"], points["visibility"], strict=True)),
        ]
        for entry in support
        for control, example in sorted(entry["controls"].items())
        for points in [example["keypoints"]]
    ]
    asked = [
        [c.from_name, c.to_name, sorted(zip(c.schema.names, c.labels, strict=True)), c.box and [c.box.from_name, c.box.labels]]
        for c in config.controls
    ]
    meaning = json.dumps([shown, asked])
    return f"{base}+r{round_number}+s{len(support)}.{hashlib.sha256(meaning.encode()).hexdigest()[:6]}"


def adapter_fits(trained: list[Any], names: dict[str, Any]) -> bool:
    """Whether an adapter may serve a label config: names were only added, or only removed.

    Where some vanished and others appeared, a point may have been renamed to mean something else: the adapter is set
    aside. The order never matters, since points go by their names everywhere.
    """
    now = {name for control in names.values() for name in control}
    return not trained or set(trained) <= now or now <= set(trained)
