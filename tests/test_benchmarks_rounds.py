"""What a round is worth, measured: who is labelled and who is scored, recipes, and one small round on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rounds
from benchmarks.parallel import run_each
from kptllm_core import adapters
from kptllm_core.adapters import adapter_state, add_lora
from kptllm_core.checkpoint import load_checkpoint
from kptllm_core.dataset import Sample, load_coco
from kptllm_core.errors import DataError, InvalidInput
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.synthetic import write_dataset

SCHEMA = KeypointSchema(("a", "b"), "thing")


def objects(groups: int, each: int, per_image: int = 1) -> list[Sample]:
    points = KeypointSet(SCHEMA.names, np.zeros((2, 2)), np.full(2, 2))
    images = [(g, i) for g in range(groups) for i in range(each)]
    return [Sample(Path(f"{g}-{i}.jpg"), 100 * g + i, 10, 10, SCHEMA, points, f"video {g}") for g, i in images for _ in range(per_image)]


def paths(samples: list[Sample]) -> set[Path]:
    return {s.image_path for s in samples}


def test_labelled_and_scored_images_share_no_group() -> None:
    samples = objects(groups=50, each=6)
    fewer: set[Path] = set()
    scored = []
    for labels in (10, 20, 50):
        train, score, apart = rounds.split(samples, labels, seed=0)
        assert apart
        assert len(paths(train)) == labels
        assert len(paths(score)) == rounds.SCORED
        assert not {s.group for s in train} & {s.group for s in score}
        assert len({s.group for s in train}) == min(labels, 25)  # as varied as can be, and half of the groups left
        assert fewer < paths(train)
        fewer = paths(train)
        scored.append(paths(score))
    assert scored[0] == scored[1] == scored[2]
    assert paths(rounds.split(samples, 10, seed=1)[0]) != paths(rounds.split(samples, 10, seed=0)[0])


def test_images_stay_whole_and_small_sets_are_used_up() -> None:
    train, score, apart = rounds.split(objects(groups=12, each=1, per_image=3), 10, seed=0)
    assert (len(train), len(score), apart) == (30, 6, True)
    train, score, apart = rounds.split(objects(groups=1, each=8), 5, seed=0)  # one video: its frames must do
    assert (len(train), len(score), apart) == (5, 3, False)
    assert not paths(train) & paths(score)
    with pytest.raises(DataError, match="8 labelled images; 8 to train on leave none"):
        rounds.split(objects(groups=1, each=8), 8, seed=0)


def test_a_recipe_names_what_it_changes(tiny_model: str) -> None:
    one = rounds.Round(tiny_model, "tiny-0", Path("flies"), 20, recipe='{"rate": 0.5, "lora_rank": 2}')
    assert (one.settings.rate, one.settings.seconds) == (0.5, rounds.SECONDS)
    same = rounds.Round(tiny_model, "tiny-0", Path("flies"), 20)
    assert one.file(Path("r")) != same.file(Path("r"))
    assert same.file(Path("r")).name.startswith("tiny-0-flies-round20-150s-seed0-")
    with pytest.raises(InvalidInput, match="A recipe has no speed"):
        _ = rounds.Round(tiny_model, "tiny-0", Path("flies"), 20, recipe='{"speed": 1}').settings


def test_the_shipped_list_of_recipes_can_be_used(tiny_model: str) -> None:
    for recipe in rounds.read_recipes(Path(rounds.__file__).with_name("recipes.json")).values():
        assert rounds.Round(tiny_model, "tiny-0", Path("flies"), 20, recipe=json.dumps(recipe)).settings.seconds
        checkpoint = rounds.configured(load_checkpoint(tiny_model), recipe)
        before = adapters.FULL
        with rounds.tuned(recipe):
            add_lora(checkpoint.model)
            held = adapter_state(checkpoint.model)
        assert before == adapters.FULL
        ranks = {value.shape[0] for name, value in held.items() if "lora_A" in name}
        assert ranks == {recipe.get("lora_rank", load_checkpoint(tiny_model).model.config.lora_rank)}
        if recipe.get("full") == []:
            assert all("lora_" in name for name in held)


def test_one_round(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "insects", "insect", 9, seed=2, size=80)
    recipe = tmp_path / "recipes.json"
    recipe.write_text('{"two steps": {"steps": 2, "workers": 0, "episodes": 1}}')
    command = ["--model", tiny_model, "--data", str(tmp_path / "insects"), "--labels", "4", "--ablate", str(recipe),
               "--found", "--reports", str(tmp_path / "reports")]  # fmt: skip
    assert rounds.main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("two steps insects, 4 labels; given: @0.02 ")
    assert "5 objects on 5 images; 2 steps in " in said
    (file,) = (tmp_path / "reports").iterdir()
    result = json.loads(file.read_text())
    assert result["shots"] == 4
    for when in ("before", "after"):
        for how in ("given", "found"):
            low, high = result[when][how]["pck_ci"]["0.1"]
            assert 0 <= low <= result[when][how]["pck"]["0.1"] <= high <= 1
    stamp = file.stat().st_mtime_ns
    assert rounds.main(command) == 0  # found done, not done again
    assert file.stat().st_mtime_ns == stamp
    assert rounds.main([*command[:6], "--recipe", '{"speed": 1}', *command[8:]]) == 2
    assert "A recipe has no speed" in capsys.readouterr().err
    assert rounds.main([*command[:4], "--labels", "9", "--reports", str(tmp_path / "reports")]) == 2
    assert "leave none to score" in capsys.readouterr().err


def test_a_subset_holds_the_annotations_of_its_images(tmp_path: Path) -> None:
    write_dataset(tmp_path / "insects", "insect", 5, seed=2, size=64)
    samples = load_coco(tmp_path / "insects").samples
    part = load_coco(rounds.write_subset(tmp_path / "part", tmp_path / "insects", samples[1:3])).samples
    assert [s.image_id for s in part] == [samples[1].image_id, samples[2].image_id]
    assert part[0].read().shape == (64, 64, 3)


def raise_for(number: int) -> None:
    if number == 2:
        raise DataError("two is too many")
    if number == 3:
        raise ZeroDivisionError("three")


def test_a_measurement_that_fails_leaves_the_others_their_turn(capsys: pytest.CaptureFixture[str]) -> None:
    items = {"one": 1, "two": 2, "three": 3, "four": 4}
    assert run_each(raise_for, items) == {"two": "two is too many", "three": "ZeroDivisionError: three"}
    assert "four: done" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_answer_as_one_process_does() -> None:
    items = {"one": 1, "two": 2, "three": 3, "four": 4}
    assert run_each(raise_for, items, jobs=2) == run_each(raise_for, items)
