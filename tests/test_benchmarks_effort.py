"""The replay's arithmetic, its log, its little Label Studio, and the network that it is compared with. No process is started."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from backend.demo.samples import render
from backend.label_studio import LabelStudio
from benchmarks import effort
from benchmarks.corrections import Corrections, by_hand, corrections, running_effort, stretches, total
from benchmarks.replay import Log
from benchmarks.studio import Studio
from kptllm_core.errors import DataError, InvalidInput
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.schema import parse

NAMES = ("a", "b", "c", "d")
HERE, HIDDEN, GONE, UNKNOWN = Visibility.VISIBLE, Visibility.OCCLUDED, Visibility.ABSENT, Visibility.NOT_LABELLED


def points(xy: list[tuple[float, float]], seen: tuple[int, ...], box: tuple[float, ...] | None = None) -> KeypointSet:
    return KeypointSet(NAMES, np.array(xy, float), np.array(seen), box=None if box is None else np.array(box))


TRUTH = points([(0, 0), (100, 0), (0, 50), (0, 0)], (HERE, HIDDEN, HERE, UNKNOWN), box=(0, 0, 100, 50))


def test_each_point_that_is_not_as_it_should_be_costs_one_action() -> None:
    predicted = points([(5, 0), (100, 5.1), (0, 0), (7, 7)], (HERE, HERE, GONE, HERE))
    assert corrections(TRUTH, predicted, 0.05) == Corrections(points=3, moved=1, missing=1, wrong=1)
    assert corrections(TRUTH, predicted, 0.052) == Corrections(points=3, moved=0, missing=1, wrong=1)
    assert corrections(TRUTH, TRUTH, 0.05) == Corrections(points=3)
    assert corrections(TRUTH, None, 0.05) == by_hand(TRUTH) == Corrections(points=3, missing=3)


def test_without_a_box_the_points_say_how_large_the_object_is() -> None:
    truth = points([(0, 0), (40, 0), (0, 80), (0, 0)], (HERE, HERE, HERE, GONE))
    assert corrections(truth, points([(0, 9), (40, 0), (0, 80), (0, 0)], (HERE, HERE, HERE, GONE)), 0.05).moved == 1


def test_shares_and_effort() -> None:
    parts = [Corrections(4, missing=4), Corrections(4, moved=1), Corrections(2, wrong=3)]
    assert total(parts) == Corrections(10, 1, 4, 3)
    assert total(parts).share == 0.8
    assert total([]).share is None
    assert parts[2].share == 1.5  # worse than nothing
    assert running_effort(parts) == pytest.approx([1.0, 5 / 8, 0.8])
    assert parts[1].to_json() == {"moved_share": 0.25, "points": 4, "moved": 1, "missing": 0, "wrong": 0}


def test_stretches_cover_what_follows_the_examples() -> None:
    assert stretches(5, [15, 30], 40) == [(5, 15), (15, 30), (30, 40)]
    assert effort.fitting_rounds([15, 30, 60, 100], 5, 100) == [15, 30, 60]
    with pytest.raises(DataError, match="15"):
        effort.fitting_rounds([15, 30], 5, 15)
    for rounds, examples in (([8, 20], 5), ([15, 15], 5), ([15, 30], 15), ([15], 0)):
        with pytest.raises(InvalidInput, match="--rounds"):
            effort.fitting_rounds(rounds, examples, 100)


@pytest.fixture
def finished(tmp_path: Path) -> Log:
    """A replay of 15 images with 10 points each: 2 examples, a round after 10, and nothing wrong after it."""
    log = Log(tmp_path / "state" / "replay.jsonl", {"seed": 0})
    for at in range(15):
        counts = Corrections(10, missing=10) if at < 2 else Corrections(10, moved=5) if at < 10 else Corrections(10)
        log.add({"image": {"task": at + 1, "version": None if at < 2 else "m+r0+s2", "counts": vars(counts)}})
    log.add({"round": {"images": 10, "seconds": 3.0, "promoted": True}})
    log.add({"baseline": {"images": 10, "seconds": 3.0, "counts": [vars(Corrections(10, moved=8))] * 5}})
    return log


def test_the_report_of_a_finished_replay(finished: Log, tmp_path: Path) -> None:
    found = effort.account_of(finished, 2, [10])
    assert found["effort"] == pytest.approx((2 * 10 + 8 * 5) / 150)
    assert found["baseline_effort"] == pytest.approx((10 * 10 + 5 * 8) / 150, abs=1e-4)
    assert found["before_rounds"]["moved_share"] == 0.5
    (made,) = found["rounds"]
    assert (made["images"], made["moved_share"], made["seconds"], made["next_images"]) == (10, 0.0, 3.0, 5)
    assert found["baseline_rounds"][0]["moved_share"] == 0.8
    assert "counts" not in found["baseline_rounds"][0]
    assert len(found["curves"]["effort"]) == len(found["curves"]["baseline_effort"]) == 15
    effort.draw({**found, "data": "set", "tolerance": 0.05}, tmp_path / "effort.png")
    assert (tmp_path / "effort.png").stat().st_size > 10_000


def test_a_log_goes_on_behind_its_last_whole_line(finished: Log) -> None:
    with finished.file.open("ab") as file:
        file.write(b'{"round": {"images"')
    again = Log(finished.file, {"seed": 0})
    assert again.lines == finished.lines
    again.add({"round": {"images": 20}})
    assert [r["images"] for r in Log(finished.file, {"seed": 0}).of("round")] == [10, 20]
    with pytest.raises(InvalidInput, match="other settings \\(seed\\)"):
        Log(finished.file, {"seed": 1})


def test_the_small_label_studio_answers_the_backends_client(tmp_path: Path) -> None:
    render(tmp_path, 3, seed=1)
    material = effort.material_of(tmp_path)
    assert parse(material.config).controls[0].missing == "absent"
    with Studio("Insects", material.config, [p.path for p in material.pictures]) as studio:
        client = LabelStudio(studio.url, "0" * 40)
        assert client.project(1)["label_config"] == material.config
        assert [t["id"] for t in client.tasks(1)] == [1, 2, 3]
        assert [t["id"] for t in client.tasks(1, page_size=2)] == [1, 2, 3]
        assert list(client.tasks(1, annotated=True)) == []
        for result in ([], [{"id": "r"}]):
            studio.store({"id": 7, "task": 2, "result": result, "updated_at": "2026-05-05T00:00:00.000000Z"})
        (task,) = client.tasks(1, annotated=True)
        assert task["id"] == 2
        assert task["annotations"][0]["result"] == [{"id": "r"}]
        assert [t["id"] for t in client.tasks(1, unlabelled=True)] == [1, 3]
        client.update_project(1, model_version="x")
        assert client.project(1)["model_version"] == "x"
        assert studio.get(task["data"]["image"], {}) == material.pictures[1].path.read_bytes()
        assert studio.get("/data/upload/1/4.png", {}) is None


def test_the_network_from_scratch_learns_and_answers_in_pixels_of_the_image() -> None:
    import torch

    from benchmarks.from_scratch import _augmented, fit

    # A copy that is turned and scaled carries its points along.
    images, xy = torch.full((6, 3, 256, 256), -0.5), 60 + 136 * torch.rand(6, 1, 2, generator=torch.Generator().manual_seed(0))
    for image, (x, y) in zip(images, xy[:, 0].int().tolist(), strict=True):
        image[:, y - 2 : y + 3, x - 2 : x + 3] = 0.5
    torch.manual_seed(1)
    moved, where = _augmented(images, xy.floor() + 0.5)
    for image, (x, y) in zip(moved, where[:, 0].tolist(), strict=True):
        rows, columns = torch.where(image.sum(0) > image.sum(0).min() + 0.5)
        assert abs(float(columns.float().mean()) + 0.5 - x) < 1.0
        assert abs(float(rows.float().mean()) + 0.5 - y) < 1.0

    # One step: the answer lies within the image, whatever its shape is.
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    truth = KeypointSet(("a", "b"), np.array([(10, 20), (80, 50)]), np.array([2, 0]))
    told: list[int] = []
    model = fit([picture] * 2, [truth] * 2, 0.01, lambda t, p: corrections(t, p, 0.05).actions, 0, lambda s, _: told.append(s))
    found = model.predict(picture)
    assert told
    assert found.names == ("a", "b")
    assert (found.xy >= -10).all()
    assert (found.xy <= (100, 70)).all()


def test_options_are_checked_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="15,x"):
        effort._numbers("15,x")
    with pytest.raises(argparse.ArgumentTypeError, match=r"0\.9"):
        effort._share("0.9")
    assert effort.main(["--data", str(tmp_path), "--out", str(tmp_path / "effort.json")]) == 2
    assert "not a folder" in capsys.readouterr().err
    render(tmp_path / "few", 4, seed=1)
    assert effort.main(["--data", str(tmp_path / "few"), "--out", str(tmp_path / "effort.json")]) == 2
    assert "has 4 images" in capsys.readouterr().err
