"""benchmarks/clicks.py: the figures that it prints are those of the points that nobody gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.clicks import main
from kptllm_core.errors import DataError


def test_every_count_and_choice_of_clicks_is_measured(coco_folder: Path, tiny_model: str, tmp_path: Path) -> None:
    out = tmp_path / "clicks.json"
    assert main(["--data", str(coco_folder), "--model", tiny_model, "--queries", "2", "--shots", "1", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text(encoding="utf-8")).values()
    assert set(found) == {"1 random", "1 worst", "3 random", "3 worst"}
    for figures in found.values():
        assert figures["nme"] > 0 and figures["change"] == pytest.approx(figures["nme_given"] - figures["nme"], abs=2e-4)
    # Without its worst points an object looks better before anybody clicks.
    assert found["3 worst"]["nme"] < found["1 worst"]["nme"]


def test_more_queries_than_there_are_samples_are_refused(coco_folder: Path, tiny_model: str) -> None:
    with pytest.raises(DataError, match="expected at least 1003"):
        main(["--data", str(coco_folder), "--model", tiny_model, "--queries", "1000"])
