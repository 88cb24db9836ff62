"""The model card: its tables say what was measured and nothing else, and one command fills them on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model_card, tables
from benchmarks.tables import Findings, Target
from kptllm_core.config import model_folder
from kptllm_core.dataset import held_out
from kptllm_core.errors import InvalidInput
from kptllm_core.synthetic import write_dataset


def report(pck: float, copy: float | None = 0.2) -> dict[str, Any]:
    at = ("0.02", "0.05", "0.1", "0.2")
    return {"pairs": 8, "pck": dict.fromkeys(at, pck), "pck_ci": {key: [pck - 0.1, pck + 0.1] for key in at},
            "copy_pck": None if copy is None else dict.fromkeys(at, copy), "calibration_error": 0.1,
            "seconds_per_image": 0.05}  # fmt: skip


def a_round(after: float) -> dict[str, Any]:
    scores = {when: {"given": report(pck)} for when, pck in (("before", 0.3), ("after", after))}
    return {"groups_apart": True, "objects": 90, "steps": 100, "seconds": 180.0, "threads": 2, **scores}


def value(found: Findings, text: str) -> Target:
    (target,) = (t for t in tables.targets(found) if text in t.text)
    return target


def test_skill_counts_what_copying_does_not_solve_and_wants_all_of_it() -> None:
    found = Findings("tiny-0", 290_000, {"dpk_fly": {"1-shot": report(0.6), "rotated": report(0.1, 0.1)},
                                         "glue_tubes": {"1-shot": report(0.2, 0.0)},
                                         "fly_wing": {"1-shot": report(0.9, 1.0)}})  # fmt: skip
    assert found.counted == ["dpk_fly", "glue_tubes"]
    assert found.skill("1-shot") == pytest.approx((0.5 + 0.2) / 2)
    assert found.skill("rotated") is None  # glue is missing: no mean over the rest
    assert value(found, "1-shot, both").reached == "floor"
    assert value(found, "worst category").value == pytest.approx(-0.1)
    assert value(found, "worst category").reached == "**no**"
    assert value(found, "checkpoint").reached == "aim"
    assert value(found, "latency").reached == value(found, "naming").reached == tables.NONE
    found.evaluations["glue_tubes"]["rotated"] = report(0.4, 0.2)
    assert found.skill("rotated") == pytest.approx(0.125)


def test_rounds_count_when_every_category_was_measured() -> None:
    found = Findings("tiny-0", 0, {"dpk_fly": {"1-shot": report(0.6)}, "glue_tubes": {"1-shot": report(0.2)}})
    found.rounds = {"dpk_fly": {20: a_round(0.9), 50: a_round(0.8)}, "fly_wing": {20: a_round(0.97)}}
    assert value(found, "PCK@0.1 after").value is None
    assert value(found, "PCK@0.1 after").detail == "dpk_fly 0.90, glue_tubes –"
    found.rounds["glue_tubes"] = {20: a_round(0.8)}
    assert value(found, "PCK@0.1 after").value == pytest.approx(0.85)
    assert value(found, "fly_wing").reached == "aim"
    text = "\n".join(tables.card(found))
    assert "| dpk_fly | 50 | 90 | 0.30 → **0.80** | 0.30 → **0.80** | 0.30 → **0.80** (0.70–0.90) | – | 100 / 180 s / 2 |" in text


def test_what_was_not_measured_has_no_table() -> None:
    lines = tables.card(Findings("tiny-0", 290_000))
    assert [line for line in lines if line.startswith("#")] == ["### Targets"]
    assert any("| checkpoint, MB | 15 | 10 | **0.29** | aim |" in line for line in lines)


def test_naming_is_the_mean_of_its_categories() -> None:
    naming = {"faces": {"points": 300, "naming_accuracy": 0.9, "naming_accuracy_closed": 1.0},
              "flies": {"points": 100, "naming_accuracy": 0.5, "naming_accuracy_closed": 0.6}}  # fmt: skip
    found = Findings("tiny-0", 0, naming=naming)
    assert value(found, "naming").value == pytest.approx(0.7)
    assert "| *over all points* | 400 | 0.80 | 0.90 |" in tables.naming_table(found)


def test_objects_of_whole_images_have_a_table_and_a_target() -> None:
    kind = {"images": 6, "objects": 9}
    asked = {"box_ap50": 0.5, "box_ap": 0.25, "recall50": 0.75, "extra": 2.0, "oks_ap": None, "calibration": 0.1,
             "per_category": {"tube": kind, "fish": kind}}
    after = {"before": {"objects": {"recall50": 0.4, "extra": 1.0}}, "after": {"objects": {"recall50": 0.9, "extra": 0.5}}}
    points = {"given": {"pck": dict.fromkeys(("0.02", "0.05", "0.1"), 0.5), "pck_ci": dict.fromkeys(("0.02", "0.05", "0.1"), (0.4, 0.6))}}
    done = {"groups_apart": True, "objects": 9, "steps": 1, "seconds": 1.0, "threads": 2, **{k: {**v, **points} for k, v in after.items()}}
    found = Findings("tiny-0", 0, evaluations={"glue_tubes": {"objects both": asked}}, rounds={"glue_tubes": {20: done}})
    none = " / ".join("–" * 6)
    assert f"| glue_tubes | 18 on 12 | {none} | {none} | 0.50 / 0.25 / 0.75 / 2.00 / – / 0.10 |" in tables.objects_table(found)
    assert any("0.40 → **0.90**" in line for line in tables.rounds_table(found))
    assert value(found, "objects found").value == 0.9


def test_the_curve_keeps_its_end_and_what_was_watched() -> None:
    curve = [{"step": s, "seconds": 60.0 * s, "loss": 10 - s / 100, "pck": 0.5} for s in range(1, 101)]
    curve += [{"step": 40, "seconds": 2400.0, "watch": 0.31}]
    lines = tables.curve_table(Findings("tiny-0", 0, curve=curve))
    assert len(lines) == 2 + tables.CURVE_ROWS
    assert lines[2] == "| 12 | 12 | 9.88 | 0.50 | – |"
    assert lines[-1] == "| 100 | 100 | 9.00 | 0.50 | 0.31 |"


def test_one_command_fills_the_card_and_goes_on(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "model", tmp_path / "insects"
    shutil.copytree(model_folder(tiny_model), model)
    write_dataset(data, "insect", 9, seed=3, size=80)
    command = ["--model", str(model), "--data", str(data), "--episodes", "1", "--queries", "2", "--jobs", "1",
               "--reports", str(tmp_path / "reports")]  # fmt: skip
    assert model_card.main([*command, "--only", "latency"]) == 2
    assert "has no place for the tables" in capsys.readouterr().err
    card = model / "README.md"
    card.write_text(f"# Mine\n{model_card.START}\nold\n{model_card.END}\n## Limits\n")
    assert model_card.main([*command, "--only", "accuracy", "--only", "latency"]) == 0
    text = card.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("## Limits\n")
    assert "old" not in text
    for title in ("Targets", "One labelled example", "Turned, more examples, one prompt alone", "Time and size", "Curve"):
        assert f"### {title}\n" in text
    assert "### Baselines" not in text
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "reports").iterdir()}
    assert len(kept) == len(model_card.EVALUATIONS["accuracy"]) + 1
    (tmp_path / "recipes.json").write_text('{"one step": {"steps": 1}}')
    again = [*command, "--recipes", str(tmp_path / "recipes.json")]
    assert model_card.main([*again, "--only", "accuracy", "--only", "recipes"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "reports").iterdir()} == kept
    assert card.read_text() == text


def test_evaluate_knows_every_flag_of_the_plan(tmp_path: Path) -> None:
    import argparse

    from kptllm_core import evaluate

    write_dataset(tmp_path / "b", "insect", 1, seed=1, size=32)
    unseen = next(f"video {i}" for i in range(1000) if held_out([f"video {i}"]))
    annotations = tmp_path / "b" / "annotations.json"
    annotations.write_text(annotations.read_text().replace("render_0001", unseen))
    plan = model_card.Plan("tiny", "tiny-0", 64, (tmp_path / "a",), (tmp_path / "b",), tmp_path / "r", 1, 1, 1.0, 0, {})
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    files = set()
    for _, _, _, measurement in plan.evaluations():
        assert parser.parse_args(measurement.flags).out == measurement.file
        files.add(measurement.file)
    assert len(files) == len(list(plan.evaluations())) == sum(map(len, model_card.EVALUATIONS.values())) + len(tables.PROMPTED) + 1


def test_pictures_of_images_that_are_not_ours_stay_out_of_the_repository(tmp_path: Path, tiny_model: str) -> None:
    data = tmp_path / "insects"
    write_dataset(data, "insect", 9, seed=3, size=80)
    model_card.check_place(model_card.ROOT / "docs", data)  # rendered
    kinds = json.loads((data / "annotations.json").read_text())
    kinds["categories"][0].pop("supercategory")
    (data / "annotations.json").write_text(json.dumps(kinds))
    for place in (model_card.ROOT, model_card.ROOT / "docs"):
        with pytest.raises(InvalidInput, match="may not be passed on"):
            model_card.check_place(place, data)
    model_card.check_place(model_card.ROOT / "runs" / "pictures", data)
    model_card.check_place(tmp_path, data)
    model_card.check_place(model_card.ROOT / "docs", data.rename(tmp_path / "glue_tubes"))
    data = tmp_path / "glue_tubes"
    assert model_card.main(["--model", tiny_model, "--data", str(data), "--pictures", str(tmp_path / "pictures"),
                            "--reports", str(tmp_path / "reports")]) == 0  # fmt: skip
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_what_is_said_of_absent_points_is_a_row_for_each_truth() -> None:
    told = {"absent": {"visible": 3, "absent": 1}, "visible": {"visible": 5}}
    found = tables.Findings("tiny-0", 0, evaluations={"fly": {"cut": {"visibility": told}}})
    lines = tables.visibility_table(found)
    assert [line.split(" | ")[2:] for line in lines[2:]] == [["absent", "4", "0.25", "0.00", "0.75 |"], ["visible", "5", "0.00", "0.00", "1.00 |"]]
    assert tables.visibility_table(tables.Findings("tiny-0", 0)) == []
