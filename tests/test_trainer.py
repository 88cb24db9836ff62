from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kptllm_core import trainer
from kptllm_core.dataset import load_coco
from kptllm_core.errors import DataError, KptError
from kptllm_core.evaluate import CopyPredictor
from kptllm_core.jobs import FAILED, STOPPED
from kptllm_core.keypoints import KeypointSet
from kptllm_core.predictor import Example
from kptllm_core.store import read_json, write_json
from kptllm_core.trainer import Round, Stopped, held, pooled, run

ROOT = Path(__file__).resolve().parents[1]


def a_round(folder: Path, images: dict[str, list[bytes]], **changes: Any) -> Path:
    """A round's folder as the queue makes it. Each image has one object; its two points follow the number of the image."""
    asked: dict[str, Any] = {"name": "tiny+p1+r1", "base": "tiny-00000000", "model": "tiny", "device": "cpu", "parent": None, "parent_folder": None,
                             "schema": {"names": ["nose", "tail"], "category": "fish"}, "seconds": None, "steps": 2, "seed": 0}  # fmt: skip
    for part in ("train", "heldout", "support"):
        asked[part] = []
        (folder / part / "images").mkdir(parents=True)
        for number, data in enumerate(images.get(part, [])):
            sha = hashlib.sha256(data).hexdigest()
            (folder / part / "images" / sha).write_bytes(data)
            keypoints = {"names": ["nose", "tail"], "xy": [[number + 1, 2], [7, 5.5]], "visibility": [2, 1], "score": [1, 1], "box": None}
            asked[part].append({"image": sha, "keypoints": keypoints, "group": ""})
    write_json(folder / "run.json", {**asked, **changes})
    write_json(folder / "state.json", {"state": "running", "reason": None, "accidents": 0})
    return folder


def picture(level: int, size: tuple[int, int] = (9, 7), exif: bytes = b"") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_preparing_writes_folders_that_train_by_hand_could_use(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    folder = a_round(tmp_path, {"train": [picture(1), b"damaged", picture(2, exif=turned.tobytes())], "heldout": [picture(3)]})
    skipped = Round(folder).prepare()
    assert [s["image"] for s in skipped] == [hashlib.sha256(b"damaged").hexdigest()] and "Not an image" in skipped[0]["message"]
    samples = load_coco(folder / "train").samples
    assert [(s.width, s.height) for s in samples] == [(9, 7), (7, 9)]
    assert samples[1].read().shape == (9, 7, 3)
    assert samples[0].schema.names == ("nose", "tail") and samples[0].category == "fish"
    assert samples[0].keypoints.xy.tolist() == [[1, 2], [7, 5.5]] and samples[0].keypoints.visibility.tolist() == [2, 1]
    assert len(load_coco(folder / "heldout")) == 1 and len(load_coco(folder / "support")) == 0
    (folder / "train" / "annotations.json").unlink()
    assert Round(folder).prepare() == skipped and not (folder / "train" / "annotations.json").exists(), "done once"


def test_an_object_with_a_point_far_outside_its_image_is_left_out(tmp_path: Path) -> None:
    folder = a_round(tmp_path, {"train": [picture(1), picture(2)], "heldout": [picture(3), picture(4)]})
    asked = read_json(folder / "run.json")
    asked["heldout"][0]["keypoints"]["xy"][0] = [999, 2]
    write_json(folder / "run.json", asked)
    (skipped,) = Round(folder).prepare()
    assert skipped["image"] == asked["heldout"][0]["image"] and "far outside" in skipped["message"]
    assert len(load_coco(folder / "heldout").samples) == 1 and len(load_coco(folder / "train").samples) == 2


def test_a_round_without_a_readable_image_fails_with_the_reason(tmp_path: Path) -> None:
    folder = a_round(tmp_path, {"train": [b"damaged"], "heldout": [picture(3)]})
    assert run(folder, lambda: False) == FAILED
    failure = read_json(folder / "failure.json")
    assert failure["code"] == "data" and "No image of 'train' can be read" in failure["message"]


def test_a_stop_leaves_a_round_that_can_go_on(tmp_path: Path) -> None:
    folder = a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]})
    assert run(folder, lambda: True) == STOPPED
    assert not (folder / "failure.json").exists() and not (folder / "result.json").exists()


@pytest.mark.parametrize(("error", "code", "says"), [
    (MemoryError(), "out_of_memory", "smaller preset"),
    (OSError(28, "No space left on device"), "disk_full", "disk is full"),
    (ZeroDivisionError("internals"), "internal", "trainer.log"),
    (KptError("The loss became nan."), "error", "became nan"),
])  # fmt: skip
def test_every_failure_has_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, says: str) -> None:
    def fail(self: Round) -> None:
        raise error

    monkeypatch.setattr(Round, "prepare", fail)
    folder = a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]})
    assert run(folder, lambda: False) == FAILED
    failure = read_json(folder / "failure.json")
    assert failure["code"] == code and says in failure["message"] and "internals" not in failure["message"]


def test_out_of_memory_is_tried_once_with_a_smaller_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def train(self: Round, out: Path, recipe: Any) -> None:
        sizes.append(recipe.episodes)
        if recipe.episodes > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
        out.mkdir()
        (out / "metrics.json").write_text('{"steps": 2}')

    monkeypatch.setattr(Round, "_train", train)
    folder = a_round(tmp_path / "a", {"train": [picture(1)], "heldout": [picture(3)]})
    assert Round(folder).train() == {"steps": 2} and sizes[0] > 1 == sizes[1] and len(sizes) == 2
    other = a_round(tmp_path / "b", {"train": [picture(1)], "heldout": [picture(3)]})
    write_json(other / "state.json", {"accidents": 2})
    Round(other).train()
    assert sizes[2:] == [1], "after being killed twice it begins with the smaller one"


def test_the_smaller_try_has_the_memory_of_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        pass

    made: list[weakref.ref[Model]] = []

    def train(self: Round, out: Path, recipe: Any) -> None:
        if not made:
            model = Model()
            made.append(weakref.ref(model))
            raise MemoryError
        assert made[0]() is None, "the first try's model is still there"
        out.mkdir()
        (out / "metrics.json").write_text("{}")

    monkeypatch.setattr(Round, "_train", train)
    Round(a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]})).train()
    assert made


def test_a_killed_helper_is_an_accident_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(self: Round, out: Path, recipe: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(Round, "_train", train)
    folder = a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]})
    assert run(folder, lambda: False) not in (0, FAILED, STOPPED) and not (folder / "failure.json").exists()


def test_an_adapter_that_is_there_is_not_trained_again(tmp_path: Path) -> None:
    folder = a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]}, model="no such model")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "metrics.json").write_text('{"steps": 7}')
    assert Round(folder).train() == {"steps": 7}


def test_pooled_scores_are_those_of_all_images_together() -> None:
    from kptllm_core.evaluate import score_predictor
    from kptllm_core.keypoints import KeypointSchema

    schema = KeypointSchema(("a", "b", "c"))
    rng = np.random.default_rng(0)
    image = np.zeros((100, 100, 3), np.uint8)
    truths = [KeypointSet(schema.names, rng.uniform(0, 100, (3, 2)), rng.choice([0, 1, 2], 3), None, np.array([0, 0, 100, 100])) for _ in range(20)]
    support = [Example(image, KeypointSet(schema.names, rng.uniform(0, 100, (3, 2)), np.full(3, 2)))]
    samples = [(image, truth) for truth in truths]
    whole = score_predictor(CopyPredictor(), samples, schema, support)
    parts = pooled([score_predictor(CopyPredictor(), samples[start : start + 7], schema, support) for start in (0, 7, 14)])
    assert parts["points"] == whole["points"] and parts["images"] == whole["images"] and parts["nme"] == pytest.approx(whole["nme"])
    assert parts["pck"] == pytest.approx(whole["pck"])
    with pytest.raises(DataError, match="No held-out image"):
        pooled([])


def test_objects_of_a_crowd_are_judged_with_their_own_box(tmp_path: Path) -> None:
    """Two objects of one image, one alone in another, and one that has only a box."""
    folder = a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3), picture(4)]})
    asked = read_json(folder / "run.json")
    alone, crowd = asked["heldout"]
    others = [{**crowd, "keypoints": {**crowd["keypoints"], "visibility": v, "box": [1, 1, 5, 5]}} for v in ([2, 2], [0, 0])]
    write_json(folder / "run.json", {**asked, "heldout": [alone, crowd, *others]})
    it = Round(folder)
    it.prepare()
    told: list[Any] = []

    class Watched(CopyPredictor):
        def predict(self, images: Any, schema: Any, support: Any = (), boxes: Any = None, prompt: str = "auto", asked: Any = None) -> Any:
            told.extend(None if box is None else [float(v) for v in box] for box in boxes)
            return super().predict(images, schema, support, boxes)

    example = Example(np.zeros((7, 9, 3), np.uint8), KeypointSet(("nose", "tail"), np.array([[1, 2], [7, 5.5]]), np.array([2, 2])))
    figures = it._score(Watched(), [example])  # type: ignore[arg-type]
    assert told == [None, pytest.approx([1.5, 1.5, 6, 4.5]), [1, 1, 5, 5]]  # the hull with its margin, as serving takes it
    assert figures["images"] == 3 and figures["points"] == 6


def test_progress_is_written_at_once_for_a_new_phase_and_then_not_too_often(tmp_path: Path) -> None:
    it = Round(a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]}))
    it.report(phase="training")
    it.report(phase="training", step=1, steps=9, loss=0.5)
    assert read_json(tmp_path / "progress.json") == {"phase": "training"}
    it.report(phase="training", step=9, steps=9, loss=0.25)
    assert read_json(tmp_path / "progress.json") == {"phase": "training", "step": 9, "steps": 9, "loss": 0.25}
    it.should_stop = lambda: True
    it.report(phase="training", step=9)  # training stops by itself, with its state saved
    with pytest.raises(Stopped):
        it.report(phase="scoring")


def test_a_disk_that_is_full_for_a_moment_ends_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = Round(a_round(tmp_path, {"train": [picture(1)], "heldout": [picture(3)]}))
    it.report(phase="training")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "replace", full)
        it.report(phase="training", step=9, steps=9)
    assert read_json(tmp_path / "progress.json") == {"phase": "training"}
    it.report(phase="scoring")
    assert read_json(tmp_path / "progress.json")["phase"] == "scoring"


def test_one_trainer_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from kptllm_core.trainer import held\n" \
           "with held(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(60)"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "True\n"
    with held(tmp_path, seconds=0.2) as mine:
        assert not mine
    other.kill()
    with held(tmp_path, seconds=5) as mine:
        assert mine
    other.wait()
    other.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is signalled by Linux alone")
def test_a_trainer_dies_with_its_core(tmp_path: Path) -> None:
    child = "import os, time; from kptllm_core.trainer import die_with; die_with(int(os.environ['CORE']))\n" \
            "print(os.getpid(), flush=True); time.sleep(60)"  # fmt: skip
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], env={{**os.environ, 'CORE': str(os.getpid())}})"
    core = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert core.stdout
    pid = int(core.stdout.readline())
    core.kill()
    core.wait()
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()
    core.stdout.close()
    orphan = subprocess.run([sys.executable, "-c", child], cwd=ROOT, env={**os.environ, "CORE": "1"}, timeout=30)
    assert orphan.returncode == STOPPED, "a core that is gone already"


def test_a_folder_that_is_no_round_is_said(tmp_path: Path) -> None:
    assert run(tmp_path, lambda: False) == FAILED
    assert "run.json is missing" in json.loads((tmp_path / "failure.json").read_text())["message"]
    assert trainer.FAILED == 1
