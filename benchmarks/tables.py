"""Findings → the Markdown of a model card. Pure functions of reports; what was not measured is a dash.

The names of evaluations ("1-shot", "5-shot" …) are those of the plan in `model_card.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kptllm_core.ablation import ABLATIONS
from kptllm_core.finder import COUNTED
from kptllm_core.keypoints import SHOWN
from kptllm_core.metrics import EASY_COPY
from kptllm_core.report import INSTANCES

Report = dict[str, Any]
Cells = Sequence[str]
NONE = "–"
BASELINES = ("untrained", "correlation", "sift", "template")
PROMPTED = ("visual", "text", "both")
ROUND_50 = ("dlc_horse_walk", "glue_tubes", "dpk_fly")
PRECISE, NAMED_ELSEWHERE = "fly_wing", "dpk_fly"
CURVE_ROWS = 8


@dataclass
class Findings:
    """Everything that was measured of one checkpoint.

    evaluations: [folder][evaluation] → report of `evaluate`; naming: [folder of training] → report of `--task name`;
    rounds: [folder][labels] and recipes: [recipe][folder] → result of `rounds.py`; latency: seconds by way to ask.
    """

    base: str
    bytes: int
    evaluations: dict[str, dict[str, Report]] = field(default_factory=dict)
    naming: dict[str, Report] = field(default_factory=dict)
    rounds: dict[str, dict[int, Report]] = field(default_factory=dict)
    recipes: dict[str, dict[str, Report]] = field(default_factory=dict)
    latency: Report | None = None
    trained: Sequence[str] = ()  # folders that were
    curve: Sequence[Report] = ()

    @property
    def counted(self) -> list[str]:
        """The folders that copying does not solve: those that skill is about."""
        found = {name: _copy(reports.get("1-shot")) for name, reports in self.evaluations.items()}
        return [name for name, copy in found.items() if copy is not None and copy < EASY_COPY]

    def skill(self, evaluation: str) -> float | None:
        """Mean of (PCK@0.1 - copy) / (1 - copy) over all of `counted`, against copying under the same conditions."""
        gains = []
        for name in self.counted:
            report = self.evaluations[name].get(evaluation)
            copy = _copy(report)
            if report is None or copy is None:
                return None
            gains.append((report["pck"]["0.1"] - copy) / (1 - copy))
        return _mean(gains)


@dataclass(frozen=True)
class Target:
    """A promise and what came of it. `less`: smaller is better."""

    text: str
    floor: float | None
    aim: float
    value: float | None
    detail: str = ""
    less: bool = False

    @property
    def reached(self) -> str:
        if self.value is None:
            return NONE
        sign = -1 if self.less else 1
        for name, limit in (("aim", self.aim), ("floor", self.floor)):
            if limit is not None and sign * self.value >= sign * limit:
                return name
        return "**no**"


def targets(found: Findings) -> list[Target]:
    """What the project set out to reach, in its own order."""
    one = {n: r["1-shot"] for n, r in found.evaluations.items() if _copy(r.get("1-shot")) is not None}
    over = {n: r["pck"]["0.1"] - r["copy_pck"]["0.1"] for n, r in one.items()}
    text = found.evaluations.get(NAMED_ELSEWHERE, {}).get("text", {"pck": {}})["pck"].get("0.1")
    naming = {n: r["naming_accuracy"] for n, r in found.naming.items()}
    twenty = {n: _after(found, n, 20, "0.1") for n in found.counted}
    fifty = {n: _after(found, n, 50, "0.05") for n in ROUND_50}
    recalled = {n: float(r[20]["after"]["objects"]["recall50"]) for n, r in found.rounds.items() if "objects" in r.get(20, {}).get("after", {})}
    fast = found.latency["seconds"]["one pass, K = 17"] * 1000 if found.latency else None
    on = f"{found.latency['threads']} threads" if found.latency else ""
    return [
        Target("skill, 1-shot, both prompts", 0.35, 0.80, found.skill("1-shot")),
        Target("the same, queries rotated at random", 0.25, 0.75, found.skill("rotated")),
        Target("the same, 5-shot, upright", 0.45, 0.85, found.skill("5-shot")),
        Target("PCK@0.1 after a LoRA round on 20 labelled images", 0.80, 0.95, _whole_mean(twenty), _each(twenty)),
        Target("worst category: 1-shot PCK@0.1 minus copy", -0.02, 0.20, min(over.values(), default=None), _each(over)),
        Target("PCK@0.05 after a LoRA round on 50", 0.70, 0.92, _whole_mean(fifty), _each(fifty)),
        Target(f"{PRECISE}, PCK@0.02 after a LoRA round on 20", 0.60, 0.95, _after(found, PRECISE, 20, "0.02")),
        Target(f"text alone, PCK@0.1 ({NAMED_ELSEWHERE})", 0.30, 0.80, text),
        Target("naming accuracy, unseen groups of training categories, open set", 0.80, 0.95,
               _whole_mean(naming), _each(naming)),
        Target("objects found (recall at 0.5) after a LoRA round on 20, least", 0.80, 0.95, min(recalled.values(), default=None),
               _each(recalled)),
        Target("latency, 17 points, support cached, ms", None, 100, fast, on, less=True),
        Target("checkpoint, MB", 15, 10, found.bytes / 1e6, less=True),
    ]  # fmt: skip


def card(found: Findings) -> list[str]:
    """All tables, with their headings."""
    parts = (
        ("Targets", targets_table(found), "Skill is (PCK@0.1 − copy) / (1 − copy), copy under the same conditions, mean over the "
         f"categories with copy@.1 below 0.5 in 1-shot: {', '.join(found.counted) or 'none'}."),
        ("One labelled example", accuracy_table(found), "*Copy* looks at no pixel: it puts the support's points at the same place "
         "of the true box. *Given*: the object's crop; *found*: the whole image, as serving gets it. Intervals: 95 %."),
        ("Turned, more examples, one prompt alone", conditions_table(found), "PCK@0.1, boxes given, copy under the same conditions in brackets."),
        ("Baselines", baselines_table(found), "PCK@0.1, 1-shot, boxes given: upright / queries rotated at random. *Untrained*: the same "
         "architecture with random weights; *correlation*: nearest feature of this model; SIFT and template matching: OpenCV."),
        ("Without a part", ablations_table(found), "PCK@0.1, 1-shot, boxes given, the part switched off in the trained model (`evaluate "
         "--without`): what this model leans on, not what a model trained without it could do."),
        ("Occluded and absent points", visibility_table(found), "1-shot, boxes given. *Cut*: a third of each query's object is cut off, as "
         "by the border of a photograph. *Unseen groups*: of a training set whose people marked what is occluded."),
        ("All objects of whole images", objects_table(found), "`evaluate --task instances --shots 5 --episodes 6 --queries 5`, no box is given. "
         f"Box AP50, box AP (0.5 to 0.95), recall at an overlap of 0.5 by the boxes that a person is shown (score of {SHOWN:g}, at most {COUNTED}), "
         "the wrong ones among these for each image (*extra*), OKS-AP of the points that come with the boxes (σ 0.05), and the calibration "
         "error of the boxes' scores (*calib.*), for each prompt. Rendered scenes hold 0 to 12 objects of kinds that were never seen. Sets in "
         "*italics* were trained on."),
        ("Naming", naming_table(found), "Groups of the training sets that `held_out` names (the recipe above says which runs left them "
         "out). Open set: any name may be written; names "
         "are the same by the rule of `kptllm_core.language.plain_words`."),
        ("A LoRA round", rounds_table(found), "Before → after, boxes given, up to twenty of the labelled images as support, on images "
         "of other groups; objects found as in the table above. Repeat one with `python benchmarks/rounds.py --data DIR --labels N`."),
        ("Recipes of a round", recipes_table(found), "Twenty labelled images, boxes given, after the round; `benchmarks/recipes.json`."),
        ("Time and size", latency_table(found), "Support cached, box given, fastest of some rounds (`benchmarks/one_pass.py`)."),
        ("Curve", curve_table(found), "Running means over the training's own batches; *watched*: PCK on a category that was never trained on."),
    )  # fmt: skip
    lines: list[str] = []
    for title, table, note in parts:
        if table:
            lines += [f"### {title}", "", *table, "", note, ""]
    return lines[:-1]


def targets_table(found: Findings) -> list[str]:
    rows = []
    for t in targets(found):
        value = NONE if t.value is None else _figure(t.value)
        floor = NONE if t.floor is None else _figure(t.floor)
        rows.append((t.text, floor, _figure(t.aim), f"**{value}**", t.reached, t.detail))
    return markdown(("", "floor", "aim", "measured", "reached", ""), rows)


def accuracy_table(found: Findings) -> list[str]:
    rows = []
    for name, reports in found.evaluations.items():
        one, box = reports.get("1-shot"), reports.get("found")
        if one is None:
            continue
        finer = " / ".join(f"{one['pck'][at]:.2f}" for at in ("0.02", "0.05", "0.2"))
        rows.append((name, str(one["pairs"]), _number(_copy(one)), f"**{_ranged(one)}**", finer, _ranged(box),
                     f"{one['calibration_error']:.2f}", f"{one['seconds_per_image']:.2f}"))  # fmt: skip
    head = ("category", "pairs", "copy @.1", "**1-shot @.1**", "@.02 / @.05 / @.2", "found @.1", "calibration error",
            "s / image")  # fmt: skip
    return markdown(head, rows)


def conditions_table(found: Findings) -> list[str]:
    names = ("rotated", "5-shot", "one wrong", "text", "visual")
    rows = [
        (name, *(_with_copy(reports.get(n)) for n in names))
        for name, reports in found.evaluations.items()
        if any(n in reports for n in names)
    ]
    if rows:
        rows.append(("**skill**", *(_number(found.skill(n)) for n in names)))
    return markdown(("category", "rotated", "5-shot", "5-shot, one labelled wrongly", "text alone", "visual alone"), rows)


def baselines_table(found: Findings) -> list[str]:
    rows = []
    for name, reports in found.evaluations.items():
        if any(b in reports for b in BASELINES):
            upright, turned = reports.get("1-shot"), reports.get("rotated")
            cells = [f"{_number(_copy(upright))} / {_number(_copy(turned))}"]
            cells += [f"{_pck(reports.get(b))} / {_pck(reports.get(f'rotated {b}'))}" for b in BASELINES]
            rows.append((name, *cells, f"**{_pck(upright)} / {_pck(turned)}**"))
    return markdown(("category", "copy", "untrained", "correlation", "SIFT", "template", "this model"), rows)


def ablations_table(found: Findings) -> list[str]:
    plain = [f"without {part}" for part in ABLATIONS]
    rows = [
        (name, *(_pck(reports.get(c)) for c in ("1-shot", *plain)))
        for name, reports in found.evaluations.items()
        if any(c in reports for c in plain)
    ]
    return markdown(("category", "complete", *plain), rows)


def visibility_table(found: Findings) -> list[str]:
    """What the model says of points that are absent, occluded or visible."""
    rows = []
    for name, reports in found.evaluations.items():
        for how in ("cut", "unseen groups"):
            told = reports.get(how, {}).get("visibility", {})
            for true in ("absent", "occluded", "visible"):
                if row := told.get(true):
                    total = sum(row.values())
                    shares = (f"{row.get(said, 0) / total:.2f}" for said in ("absent", "occluded", "visible"))
                    rows.append((name, how, true, str(total), *shares))
    return markdown(("category", "images", "the point is", "points", "said: absent", "occluded", "visible"), rows)


def objects_table(found: Findings) -> list[str]:
    """How well all objects of an image are found, with each prompt."""
    rows = []
    for name, reports in found.evaluations.items():
        if any(f"objects {p}" in reports for p in PROMPTED):
            told = [reports.get(f"objects {p}") for p in PROMPTED]
            first = next(r for r in told if r)
            seen = [sum(c[key] for c in first["per_category"].values()) for key in ("images", "objects")]
            figures = (" / ".join(_number(r.get(key) if r else None) for key in INSTANCES) for r in told)
            rows.append((f"*{name}*" if name in found.trained else name, f"{seen[1]} on {seen[0]}", *figures))
    return markdown(("category", "objects on images", *(f"{p}: AP50 / AP / recall / extra / OKS-AP / calib." for p in PROMPTED)), rows)


def naming_table(found: Findings) -> list[str]:
    rows: list[Cells] = [
        (n, str(r["points"]), _number(r["naming_accuracy"]), _number(r["naming_accuracy_closed"]))
        for n, r in found.naming.items()
    ]
    if len(rows) > 1:
        reports = list(found.naming.values())
        total = sum(r["points"] for r in reports)
        for title, weight in (("mean over categories", [1 / len(reports)] * len(reports)),
                              ("over all points", [r["points"] / total for r in reports])):  # fmt: skip
            means = (sum(w * r[key] for w, r in zip(weight, reports, strict=True))
                     for key in ("naming_accuracy", "naming_accuracy_closed"))  # fmt: skip
            rows.append((f"*{title}*", str(total), *(_number(m) for m in means)))
    return markdown(("training category", "points", "open set", "among its own names"), rows)


def rounds_table(found: Findings) -> list[str]:
    rows = []
    for name, by_labels in found.rounds.items():
        for labels, r in sorted(by_labels.items()):
            apart = "" if r["groups_apart"] else " (of the same group)"
            rows.append((name, str(labels), f"{r['objects']}{apart}", *(_gain(r, at) for at in ("0.02", "0.05", "0.1")), _recalled(r),
                         f"{r['steps']} / {r['seconds']:.0f} s / {r['threads']}"))  # fmt: skip
    return markdown(("category", "labels", "scored objects", "@.02", "@.05", "@.1 (95 % after)", "objects found: recall; extra; calib.",
                     "steps / time / threads"), rows)  # fmt: skip


def recipes_table(found: Findings) -> list[str]:
    folders = list(dict.fromkeys(f for by_folder in found.recipes.values() for f in by_folder))
    rows = []
    for name, by_folder in found.recipes.items():
        cells = []
        for folder in folders:
            r = by_folder.get(folder)
            after = r and r["after"]["given"]["pck"]
            cells.append(f"{after['0.05']:.2f} / {after['0.1']:.2f} ({r['steps']} steps)" if r and after else NONE)
        rows.append((name, *cells))
    return markdown(("recipe", *(f"{f} @.05 / @.1" for f in folders)), rows)


def latency_table(found: Findings) -> list[str]:
    if found.latency is None:
        return []
    rows = [(way, f"{seconds * 1000:.0f} ms") for way, seconds in found.latency["seconds"].items()]
    on = f"{found.latency['threads']} threads, {found.latency['device']}"
    return markdown(("asked", on), [*rows, ("checkpoint on disk", f"{found.bytes / 1e6:.1f} MB")])


def curve_table(found: Findings) -> list[str]:
    """Some rows of the training's curve, evenly apart, the last one among them."""
    trained = [c for c in found.curve if "loss" in c]
    if not trained:
        return []
    count = min(CURVE_ROWS, len(trained))
    picked = [trained[round((i + 1) * len(trained) / count) - 1] for i in range(count)]
    rows = []
    for entry in picked:
        watched = [c["watch"] for c in found.curve if "watch" in c and c["step"] <= entry["step"]]
        rows.append((str(entry["step"]), f"{entry['seconds'] / 60:.0f}", f"{entry['loss']:.2f}", _number(entry.get("pck")),
                     _number(watched[-1] if watched else None)))  # fmt: skip
    return markdown(("step", "minutes", "loss", "PCK, training", "PCK, watched"), rows)


def markdown(head: Cells, rows: Iterable[Cells]) -> list[str]:
    """A table; nothing at all without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines] if lines else []


def _after(found: Findings, folder: str, labels: int, at: str) -> float | None:
    result = found.rounds.get(folder, {}).get(labels)
    return None if result is None else float(result["after"]["given"]["pck"][at])


def _gain(result: Report, at: str) -> str:
    before, after = result["before"]["given"]["pck"][at], result["after"]["given"]["pck"][at]
    low, high = result["after"]["given"]["pck_ci"][at]
    return f"{before:.2f} → **{after:.2f}**" + (f" ({low:.2f}–{high:.2f})" if at == "0.1" else "")


def _recalled(result: Report) -> str:
    before, after = (result[when].get("objects") for when in ("before", "after"))
    if not before or not after:
        return NONE
    return (f"{_number(before['recall50'])} → **{_number(after['recall50'])}**; {before['extra']:.1f} → {after['extra']:.1f}; "
            f"{_number(before.get('calibration'))} → {_number(after.get('calibration'))}")  # fmt: skip


def _whole_mean(values: Mapping[str, float | None]) -> float | None:
    """The mean, if every value was measured: a mean over the easy ones would flatter."""
    known = [v for v in values.values() if v is not None]
    return _mean(known) if len(known) == len(values) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _each(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


def _copy(report: Report | None) -> float | None:
    return None if report is None or report["copy_pck"] is None else float(report["copy_pck"]["0.1"])


def _pck(report: Report | None) -> str:
    return NONE if report is None else f"{report['pck']['0.1']:.2f}"


def _ranged(report: Report | None) -> str:
    if report is None:
        return NONE
    low, high = report["pck_ci"]["0.1"]
    return f"{report['pck']['0.1']:.2f} ({low:.2f}–{high:.2f})"


def _with_copy(report: Report | None) -> str:
    return NONE if report is None else f"{_ranged(report)} [{_number(_copy(report))}]"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}".replace("-", "−")


def _figure(value: float) -> str:
    """0.35, −0.02, 15, 12.6, 61."""
    if abs(value) >= 2 and (abs(value) >= 20 or value == int(value)):
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 2 else _number(value)
