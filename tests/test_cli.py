"""The command line as a person uses it: results, help, and one sentence for every mistake."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kptllm_core import predict as predict_module
from kptllm_core.__main__ import COMMANDS, main
from kptllm_core.dataset import write_coco
from kptllm_core.keypoints import KeypointSchema, KeypointSet

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = KeypointSchema(("nose", "left_ear", "right_ear", "tail"), "mouse", ((0, 1), (0, 2), (0, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small images with an object each. The third object has one point only, the fifth all but one."""
    where = tmp_path_factory.mktemp("mice")
    (where / "images").mkdir()
    rng = np.random.default_rng(4)
    items = []
    for i in range(6):
        pixels = rng.integers(90, 120, (80, 100, 3), dtype=np.uint8)
        xy = rng.uniform(15, 65, (4, 2))
        for x, y in xy.astype(int):
            pixels[y - 3 : y + 4, x - 3 : x + 4] = (230, 200, 40)
        Image.fromarray(pixels).save(where / "images" / f"mouse {i}.png")
        visibility = {2: [0, 0, 0, 2], 4: [2, 1, 2, 0]}.get(i, [2, 2, 2, 2])
        items.append((f"mouse {i}.png", 100, 80, KeypointSet(SCHEMA.names, xy, np.array(visibility)), f"m{i}"))
    write_coco(where, SCHEMA, items)
    return where


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistaken command answers with."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said and "Traceback" not in said
    return said


def predict(folder: Path, out: Path, *argv: object) -> list[dict]:
    arguments = ["predict", "--model", "tiny", "--images", folder, "--out", out / "predictions.json", *argv]
    assert main([str(a) for a in arguments]) == 0
    return json.loads((out / "predictions.json").read_text())


def test_predict_from_examples_writes_coco_results(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = predict(folder / "images", tmp_path, "--support", folder, "--shots", 2, "--draw", tmp_path / "pictures")
    assert [r["image_id"] for r in results] == [1, 2, 3, 4, 5, 6]
    assert [r["file_name"] for r in results] == [f"mouse {i}.png" for i in range(6)]
    for result in results:
        assert set(result) == {"image_id", "file_name", "category_id", "keypoints", "score", "keypoint_scores", "bbox"}
        x, y, v = np.array(result["keypoints"]).reshape(4, 3).T
        assert (np.abs(x - 50) <= 80).all() and (np.abs(y - 40) <= 80).all()  # near the image; its edge is no wall
        assert set(v) <= {1, 2, 3}
        assert len(result["keypoint_scores"]) == 4 and all(0 <= s <= 1 for s in result["keypoint_scores"])
        assert len(result["bbox"]) == 4 and 0 <= result["score"] <= 1
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [f"mouse {i}.png.png" for i in range(6)]
    assert "6 of 6 images predicted by tiny-" in capsys.readouterr().out


def test_predict_from_names_alone_and_a_choice_of_names(folder: Path, tmp_path: Path) -> None:
    by_name = predict(folder / "images", tmp_path, "--names", "nose, left eye,tail tip")
    assert all(len(r["keypoints"]) == 9 for r in by_name)
    everything = predict(folder / "images", tmp_path, "--support", folder)
    chosen = predict(folder / "images", tmp_path, "--support", folder, "--names", "tail,nose")
    assert all(len(r["keypoints"]) == 6 and len(everything[0]["keypoints"]) == 12 for r in chosen)


def test_predict_keeps_the_ids_of_a_coco_folder(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = json.loads((copy / "annotations.json").read_text())
    for ids in ([101, 102, 103, 104, 105, 106], ["a", "7", "c", "d", "e", "f"]):
        for image, number in zip(data["images"], ids, strict=True):
            image["id"] = number
        (copy / "annotations.json").write_text(json.dumps(data))
        assert [r["image_id"] for r in predict(copy, tmp_path, "--names", "nose")] == ids


def test_no_pictures_are_promised_where_none_are_made(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ("evaluate", "--model", "tiny", "--data", folder, "--draw", tmp_path / "pictures", "--out", tmp_path / "report.json")
    assert "--task name has no such picture" in fails(capsys, *call, "--task", "name")
    assert "--task instances has no such picture" in fails(capsys, *call, "--task", "instances")


def test_an_unreadable_image_costs_only_itself(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    whole = predict(images, tmp_path, "--names", "nose,tail")
    (images / "mouse 1.png").write_bytes(b"<html>")
    (images / "mouse 3.png").write_bytes((images / "mouse 3.png").read_bytes()[:60])
    (images / "notes.txt").write_text("no image")
    results = predict(images, tmp_path, "--names", "nose,tail")
    assert [bool(r["keypoints"]) for r in results] == [True, False, True, False, True, True]
    assert results[1]["keypoint_scores"] == [] and results[1]["score"] == 0 and "Not an image" in results[1]["error"]
    assert results[4] == whole[4]
    said = capsys.readouterr().err
    assert "skipped mouse 1.png: Not an image" in said and "skipped mouse 3.png" in said
    for path in images.iterdir():
        path.write_bytes(b"")
    arguments = ["predict", "--model", "tiny", "--names", "a", "--images", images, "--out", tmp_path / "none.json"]
    assert main([str(a) for a in arguments]) == 2
    assert "error: None of the 6 images could be read" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "none.json").read_text())) == 6


def test_what_is_done_is_kept_when_predicting_ends_early(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def stop(source: Any) -> Any:
        if source.name == "mouse 5.png":
            raise KeyboardInterrupt
        return read(source)

    read = predict_module._open
    monkeypatch.setattr(predict_module, "_open", stop)
    monkeypatch.setattr(predict_module, "BATCH", 2)
    out = tmp_path / "predictions.json"
    assert main(["predict", "--model", "tiny", "--images", str(folder / "images"), "--names", "nose", "--out", str(out)]) == 130
    assert [r["file_name"] for r in json.loads(out.read_text())] == [f"mouse {i}.png" for i in range(4)]


def test_mistakes_of_predict_are_told_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ("--images", folder / "images")
    (tmp_path / "empty").mkdir()
    assert "Give --names" in fails(capsys, "predict", *images)
    assert "--names is empty" in fails(capsys, "predict", *images, "--names", " , ")
    assert "--prompt visual needs examples" in fails(capsys, "predict", *images, "--names", "a", "--prompt", "visual")
    assert "is missing" in fails(capsys, "predict", "--images", tmp_path / "no", "--names", "a")
    assert "is a file" in fails(capsys, "predict", "--images", folder / "annotations.json", "--names", "a")
    assert "has no images" in fails(capsys, "predict", "--images", tmp_path / "empty", "--names", "a")
    assert "no annotations.json" in fails(capsys, "predict", *images, "--support", tmp_path / "empty")
    unknown = fails(capsys, "predict", *images, "--support", folder, "--names", "nose,wing")
    assert "'wing' is not in the schema. Known: nose, left_ear, right_ear, tail" in unknown
    assert "unique; found twice: a" in fails(capsys, "predict", *images, "--names", "a,b,a")
    assert "Expected 1 to 50" in fails(capsys, "predict", *images, "--support", folder, "--shots", 51)
    assert "Known: mouse" in fails(capsys, "predict", *images, "--support", folder, "--category", "rat")
    assert "no-such-model" in fails(capsys, "predict", *images, "--names", "a", "--model", "no-such-model")
    assert (
        "adapter"
        in fails(capsys, "predict", *images, "--names", "a", "--model", "tiny", "--adapter", tmp_path / "no").lower()
    )
    (tmp_path / "block").write_text("a file")
    out = tmp_path / "block" / "out.json"
    assert str(out) in fails(capsys, "predict", *images, "--names", "a", "--model", "tiny", "--out", out)


def test_evaluate_writes_the_report_and_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "report.json"
    flags = [
        "--model",
        "tiny",
        "--shots",
        "2",
        "--episodes",
        "2",
        "--queries",
        "3",
        "--seed",
        "3",
        "--prompt",
        "both",
        "--boxes",
        "found",
        "--rotate",
    ]
    assert main(["evaluate", *flags, "--data", str(folder), "--out", str(out), "--draw", str(tmp_path / "sheets")]) == 0
    report = json.loads(out.read_text())
    assert report["pairs"] == 6 and report["base"].startswith("tiny-")
    wanted = {"shots": 2, "episodes": 2, "queries": 3, "seed": 3, "prompt": "both", "boxes": "found", "rotate": True}
    wanted |= {
        "task": "detect",
        "model": "tiny",
        "untrained": False,
        "adapter": None,
        "data": [str(folder)],
        "support": None,
    }
    assert wanted.items() <= report["arguments"].items()
    assert list(report["pck"]) == list(report["pck_ci"]) == list(report["copy_pck"]) == ["0.02", "0.05", "0.1", "0.2"]
    assert report["seconds_per_image"] > 0 and 0 <= report["calibration_error"] <= 1
    said = capsys.readouterr().out
    assert "mouse" in said and "PCK@0.1" in said and str(out) in said
    assert (tmp_path / "sheets" / "mouse.png").is_file()
    again = tmp_path / "again.json"
    assert main(["evaluate", *flags, "--data", str(folder), "--out", str(again)]) == 0
    second = json.loads(again.read_text())
    assert {**second, "seconds_per_image": 0} == {**report, "seconds_per_image": 0}


@pytest.mark.parametrize(
    "flags", [["--untrained"], ["--prompt", "text"], ["--prompt", "visual"], ["--boxes", "jittered"]]
)
def test_evaluate_in_other_ways(folder: Path, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "report.json"
    small = ["--model", "tiny", "--episodes", "1", "--queries", "2", "--data", str(folder), "--support", str(folder)]
    assert main(["evaluate", *small, *flags, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["pairs"] == 2


def test_evaluate_naming(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert main(["evaluate", "--model", "tiny", "--task", "name", "--data", str(folder), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["points"] == 4 * 4 + 1 + 3
    assert 0 <= report["naming_accuracy"] <= 1 and 0 <= report["naming_accuracy_closed"] <= 1


def test_mistakes_of_evaluate_are_told_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("evaluate", "--model", "tiny", "--data", folder)
    assert "no annotations.json" in fails(capsys, "evaluate", "--data", tmp_path)
    assert "--shots 0 is too small" in fails(capsys, *data, "--shots", 0)
    assert "6 usable objects" in fails(capsys, *data, "--shots", 6)
    assert "no annotations.json" in fails(capsys, *data, "--support", tmp_path)
    (tmp_path / "annotations.json").write_text("{")
    assert "no readable JSON" in fails(capsys, "evaluate", "--data", tmp_path)


@pytest.mark.parametrize("argv", [["predict"], ["nonsense"], [], ["evaluate", "--data", "x", "--boxes", "none"]])
def test_wrong_usage_exits_with_two(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_explains_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m kptllm_core {command}" in said and "examples:" in said and "default:" in said


def test_overview_comes_without_loading_torch() -> None:
    script = "import sys; from kptllm_core.__main__ import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"
    assert all(name in done.stdout for name in COMMANDS)


def test_a_defect_of_ours_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: object) -> int:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("kptllm_core.predict.run", broken)
    assert main(["predict", "--images", "x"]) == 1
    said = capsys.readouterr().err
    assert (
        said
        == f"error: unexpected ZeroDivisionError at test_cli.py:{broken.__code__.co_firstlineno + 1}: division by zero. Please report this.\n"
    )


def test_one_pass_benchmark_ends_with_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["one_pass.py", "--model", "tiny", "--repeats", "1"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "benchmarks" / "one_pass.py"), run_name="__main__")
    assert exit_.value.code == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"ratio", "k17_over_k1", "k68_over_k1"}
    assert figures["ratio"] > 2  # 17 passes cost more than one; how much more depends on the machine's load


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seconds", "-1"], "--seconds -1.0 is not possible"),
        (["--steps", "0"], "--steps 0 is not possible"),
        (["--out", "/proc/adapter"], "Choose another --out"),
    ],
)
def test_training_that_cannot_be_done_is_refused_before_it_starts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    arguments = ["train", "--model", "tiny", "--lora", "--data", str(folder), "--out", str(tmp_path / "a"), *flags]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
