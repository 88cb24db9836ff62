"""How sure a found box is: the fit, what need not be looked for, and the command that writes it into a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kptllm_core.__main__ import main
from kptllm_core.calibrate import FEW, scenes
from kptllm_core.checkpoint import load_checkpoint
from kptllm_core.config import PRESETS, SEARCHES, ModelConfig
from kptllm_core.errors import ArtifactError
from kptllm_core.keypoints import KeypointSet
from kptllm_core.sureness import LEAD, NEARLY, fit, least_seen, search_kind, sureness, trust, witnesses


def some_boxes(weights: list[float], images: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Witnesses of four boxes in each image, and which are right, drawn by the chances that the weights say."""
    rng = np.random.default_rng(0)
    told = np.concatenate([witnesses(rng.uniform(0.05, 0.9, 4), rng.uniform(0.1, 0.9, 4)) for _ in range(images)])
    return told, rng.random(len(told)) < sureness(told, weights)


def sure(seen: float, trusted: float, weights: list[float]) -> float:
    return float(sureness(witnesses(np.array([seen]), np.array([trusted])), weights)[0])


def test_the_fit_finds_the_chances_that_made_the_data() -> None:
    true = [4.0, 1.5, 3.0, 0.8]
    assert fit(*some_boxes(true)) == pytest.approx(true, rel=0.15)


def test_a_witness_that_speaks_against_itself_is_not_heard() -> None:
    constant, head, points, lead = fit(*some_boxes([0.5, -2.0, 2.0, 0.0]))
    assert head == 0.0 and points == pytest.approx(2.0, rel=0.25) and lead < 0.2 and np.isfinite(constant)


def test_few_and_perfectly_parted_boxes_give_finite_weights() -> None:
    weights = fit(witnesses(np.array([0.1, 0.9]), np.array([0.1, 0.9])), np.array([False, True]))
    assert np.isfinite(weights).all() and max(map(abs, weights)) < 50


def test_the_surest_box_leads_the_others() -> None:
    seen, trusted = np.array([0.5, 0.4, 0.01]), np.array([0.8, 0.8, 0.8])
    assert witnesses(seen, trusted)[:, 3] == pytest.approx([np.log(5 / 4), -np.log(5 / 4), -LEAD])
    assert witnesses(seen[:1], trusted[:1])[0, 3] == LEAD and witnesses(seen[:0], trusted[:0]).shape == (0, 4)


def test_nothing_that_was_found_is_certain() -> None:
    assert sure(1.0, 1.0, [50.0, 1.0, 1.0, 0.0]) == NEARLY
    assert sure(0.0, 0.0, [4.0, 1.0, 1.0, 1.0]) > 0


def test_fainter_boxes_than_these_cannot_become_sure_enough() -> None:
    weights = [3.0, 2.0, 4.0, 0.5]
    edge = least_seen(0.3, weights)
    assert sure(edge, 1.0, weights) == pytest.approx(0.3) and 0 < edge < 1
    assert least_seen(0.0, weights) == 0.0 and least_seen(0.3, [3.0, 0.0, 4.0, 0.0]) == 0.0 and least_seen(0.9, [-50.0, 1.0, 1.0, 1.0]) == 1.0


@pytest.mark.parametrize("surest", [0.01, 0.1, 0.5])
def test_beside_a_sure_box_fainter_ones_need_not_be_looked_at(surest: float) -> None:
    weights = [3.0, 2.0, 4.0, 0.5]
    scores = np.linspace(0.01, 0.99, 981)
    best = [float(sureness(witnesses(np.array([s, surest]), np.ones(2)), weights)[0]) for s in scores]  # with points as sure as can be
    first = scores[np.array(best) >= 0.3][0]
    assert least_seen(0.3, weights, surest) == pytest.approx(first, abs=0.0015) and first >= least_seen(0.3, weights) - 0.0015


def test_the_kind_of_search_follows_from_the_examples() -> None:
    assert [search_kind(share) for share in (None, 0.05, 0.9)] == ["names", "windows", "whole"]


@pytest.mark.parametrize("kind", SEARCHES)
def test_scenes_are_drawn_as_they_are_searched(kind: str) -> None:
    found = list(scenes(kind, 2, 3))
    assert len(found) == 3 and len({len(support) for _, support, _, _ in found}) == 1
    shares = [max(e.keypoints.box[2:]) / 384 for _, support, _, _ in found for e in support]
    assert bool(shares) == (kind != "names")
    if kind == "whole":
        assert all(len(truth) <= 1 for *_, truth in found) and any(len(truth) for *_, truth in found)
    if kind == "names":
        assert all(len(truth) <= FEW for *_, truth in found)


def test_the_command_writes_the_weights_and_changes_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(PRESETS / "nano", tmp_path / "nano")
    before = load_checkpoint(tmp_path / "nano")
    assert main(["calibrate", "--model", str(tmp_path / "nano"), "--categories", "2", "--images", "1"]) == 0
    assert "whole:" in "".join(capsys.readouterr())
    after = load_checkpoint(tmp_path / "nano")
    assert after.base == before.base and set(ModelConfig.load(tmp_path / "nano").sureness) == set(SEARCHES)
    assert (tmp_path / "nano" / "README.md").is_file()
    assert all(np.isfinite(w).all() and len(w) == 4 for w in json.loads((tmp_path / "nano" / "config.json").read_text())["sureness"].values())


def test_too_few_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", "tiny", "--categories", "1"]) == 2
    assert "--categories 1 is too small" in capsys.readouterr().err


def test_trust_counts_absent_points_as_nothing() -> None:
    points = KeypointSet(("a", "b"), np.zeros((2, 2)), np.array([2, 3]), np.array([0.8, 0.9]))
    assert trust(points) == pytest.approx(0.4)


@pytest.mark.parametrize("sureness", [{"whole": [1, 2, 3], "windows": [1, 2, 3, 4], "names": [1, 2, 3, 4]}, {"whole": [1, 2, 3, 4]}])
def test_a_config_with_other_weights_is_refused_in_words(tmp_path: Path, sureness: dict[str, list[float]]) -> None:
    values = json.loads((PRESETS / "nano" / "config.json").read_text()) | {"sureness": sureness}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="4 numbers for each of whole, windows, names"):
        ModelConfig.load(tmp_path)


def test_one_image_in_six_that_an_object_would_fill_has_none() -> None:
    counts = [len(truth) for number in range(20) for *_, truth in scenes("whole", number, 3)]
    assert 3 <= counts.count(0) <= 20 and set(counts) == {0, 1}
