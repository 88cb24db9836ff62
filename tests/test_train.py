"""The training loop: it learns, it can be stopped and resumed, and what it refuses, it refuses in words."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kptllm_core import checkpoint as store
from kptllm_core import loop
from kptllm_core.__main__ import main
from kptllm_core.checkpoint import load_checkpoint, write_tensors
from kptllm_core.dataset import held_out, load_coco
from kptllm_core.episodes import (
    Augmentation,
    Images,
    Labelled,
    Rendered,
    SelfPairs,
    make_episode,
    make_scene,
    structured_points,
)
from kptllm_core.errors import ArtifactError, DataError, InvalidInput, KptError
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.language import train_tokenizer
from kptllm_core.loop import Loop, Recipe, stream, whole_cells
from kptllm_core.model import KptLLM
from kptllm_core.objective import collate, heat_target, loss_of, words_loss
from kptllm_core.train import ADAPT, PRETRAIN, pretrain, take_over, train_adapter

QUICK = Recipe(**{**vars(PRETRAIN), "workers": 0, "episodes": 2, "max_points": 6, "warmup": 2, "naming": 2})
STILL = Augmentation(upright=1.0, anyway=0.0, loose=0.0, colour=0.0, flip=0.0)


def adapt(**changes: object) -> Recipe:
    return Recipe(**{**vars(ADAPT), "workers": 0, "episodes": 1, **changes})  # type: ignore[arg-type]


def test_images_are_kept_up_to_so_many_bytes(coco_folder: Path) -> None:
    samples = load_coco(coco_folder).samples
    each = samples[0].read().nbytes
    images = Images(2 * each)
    first = images.read(samples[0])
    assert images.read(samples[0]) is first
    images.read(samples[1])
    images.read(samples[0])
    images.read(samples[2])  # the second one has to go
    assert images.read(samples[0]) is first and len(images._kept) == 2
    assert Images(each - 1).read(samples[0]).shape == first.shape


def test_what_a_worker_raises_is_told_without_its_traceback(coco_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(coco_folder, tmp_path / "data")
    for path in (data / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    flags = ["--lora", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "a"), "--steps", "1"]
    ended = subprocess.run([sys.executable, "-m", "kptllm_core", "train", *flags], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.count("error: ") == 1 and "damaged or cut short" in ended.stderr


def test_the_points_of_an_episode_stay_on_their_spots() -> None:
    """A coloured dot in the source is under its point in every view, however the view is turned and cropped."""
    image = np.zeros((120, 160, 3), np.uint8)
    xy = np.array([[40.0, 30.0], [120.0, 80.0], [80.0, 60.0]])
    for k, (x, y) in enumerate(xy.astype(int)):
        image[y - 4 : y + 4, x - 4 : x + 4, k] = 255
    points = KeypointSet(("left_a", "right_a", "b"), xy, np.full(3, 2), box=np.array([30, 20, 100, 70]))
    schema = KeypointSchema(points.names)
    plain = Augmentation(upright=0.0, anyway=1.0, loose=0.5, colour=0.0, flip=0.5)
    for seed in range(20):
        episode = make_episode(np.random.default_rng(seed), [(image, points)] * 2, schema, 96, plain, 3, bend=seed % 2 == 0)
        for view in range(2):
            for k in range(3):
                if episode.visibility[view, k] != Visibility.VISIBLE:
                    continue
                channel = {"left_a": 0, "right_a": 1, "b": 2}[episode.names[k]] if episode.names else None
                column, row = np.clip((episode.xy[view, k] * 96).astype(int), 1, 94)
                patch = episode.images[view, row - 1 : row + 2, column - 1 : column + 2].max((0, 1))
                assert (patch[channel] if channel is not None else patch.max()) > 90


def test_a_mirrored_view_swaps_left_and_right() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    points = KeypointSet(("left_ear", "right_ear"), np.array([[10.0, 30], [50, 30]]), np.full(2, 2), box=np.array([0, 0, 64, 64]))
    schema = KeypointSchema(points.names, symmetric=((0, 1),))
    always = Augmentation(upright=1.0, anyway=0.0, loose=0.0, colour=0.0, flip=1.0)
    episode = make_episode(np.random.default_rng(0), [(image, points)], schema, 64, always, 2)
    left, right = (episode.xy[0, episode.names.index(n)] for n in points.names)  # type: ignore[union-attr]
    assert left[0] < right[0]  # mirrored, the ear on the left of the picture is a left one again


def test_points_that_leave_the_crop_are_absent() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    points = KeypointSet(("a", "b"), np.array([[32.0, 32], [600, 32]]), np.full(2, 2), box=np.array([20, 20, 24, 24]))
    episode = make_episode(np.random.default_rng(0), [(image, points)], KeypointSchema(points.names), 64, STILL, 2)
    assert sorted(episode.visibility[0].tolist()) == [Visibility.VISIBLE, Visibility.ABSENT]


def test_all_sources_give_batches_that_a_loss_can_read(coco_folder: Path, tiny_model: str) -> None:
    samples = load_coco(coco_folder).samples
    loaded = load_checkpoint(tiny_model)
    rng = np.random.default_rng(0)
    shape = Augmentation()
    episodes = [s.episode(rng, 3, 64) for s in (Labelled(samples, shape, 6), Rendered(shape, 6), SelfPairs(samples, shape, 6))]
    batch = collate(episodes, loaded.tokenizer, rng)
    assert batch["images"].shape == (9, 3, 64, 64)
    assert all(i // 3 == s // 3 and i != s for i, row in enumerate(batch["shots"].tolist()) for s in row)
    loss, parts = loss_of(loaded.model, batch, naming=2)
    assert torch.isfinite(loss)
    assert set(parts) == {"heat", "match", "refined", "position", "expected", "words", "visibility", "confidence", "naming", "instances", "pck"}


def test_the_target_sums_to_one_around_its_point() -> None:
    target = heat_target(torch.tensor([[[0.5, 0.25]]]), 40, 40)
    assert float(target.sum()) == pytest.approx(1, abs=1e-5)
    assert divmod(int(target.flatten().argmax()), 40)[0] in (9, 10)


def test_words_are_counted_from_is_to_keypoint(tiny_model: str) -> None:
    """A model that is sure of every right token has no loss, wherever the padding lies."""
    loaded = load_checkpoint(tiny_model)
    from kptllm_core.language import write_questions

    q = write_questions(loaded.tokenizer, ["left eye", None], [True, True])
    tokens = torch.from_numpy(q.tokens)[None]

    class Sure:
        def words(self, states: torch.Tensor) -> torch.Tensor:
            return states

    states = torch.nn.functional.one_hot(torch.cat([tokens[:, :, 1:], tokens[:, :, :1]], -1), len(loaded.tokenizer)).float() * 50
    rows = torch.tensor([[True, False]])
    assert float(words_loss(Sure(), states, tokens, torch.from_numpy(q.length)[None], rows)) < 1e-3  # type: ignore[arg-type]


def test_a_few_steps_lower_the_loss_of_a_fixed_batch(tiny_model: str, coco_folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_model, untrained=True)
    recipe = Recipe(**{**vars(QUICK), "steps": 25, "rate": 3e-3})
    batch = next(stream([(Labelled(load_coco(coco_folder).samples, STILL, 6), 1.0)], loaded.tokenizer, recipe, 64, 0))
    batch["clicked"][:] = False
    loop = Loop(loaded.model, recipe, tmp_path / "state.safetensors", torch.device("cpu"))
    losses: list[float] = []
    assert loop.run(repeat(batch), lambda now: losses.append(now["loss"]), None)
    assert losses[-1] < losses[0] - 1


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, tiny_model: str) -> None:
    recipe = Recipe(**{**vars(QUICK), "steps": 6})
    seen: list[int] = []
    stopped = pretrain(tiny_model, [], tmp_path / "out", recipe, progress=lambda now: seen.append(now["step"]), should_stop=lambda: len(seen) == 3)
    assert stopped is None
    assert not (tmp_path / "out").exists()
    metrics = pretrain(tiny_model, [], tmp_path / "out", recipe, resume=True, progress=lambda now: seen.append(now["step"]))
    assert metrics is not None
    assert metrics["resumed"]
    assert seen == [1, 2, 3, 4, 5, 6]
    again = load_checkpoint(tmp_path / "out")
    assert again.base.startswith("tiny-")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 6


def test_crops_differ_in_size_from_step_to_step(tiny_model: str, coco_folder: Path) -> None:
    """All parts of a step have the same; every side is one of which the encoder makes whole cells."""
    recipe = Recipe(**{**vars(QUICK), "episodes": 2, "scenes": 1.0, "sides": (0.5, 1.0, 1.2)})
    batches = stream([(Labelled(load_coco(coco_folder).samples, STILL, 6), 1.0)], load_checkpoint(tiny_model).tokenizer, recipe, 64, 0, 2)
    steps = [(next(batches), next(batches)) for _ in range(12)]
    assert all(one["images"].shape[-1] == other["images"].shape[-1] == other["scenes"].shape[-1] for one, other in steps)
    assert {one["images"].shape[-1] for one, _ in steps} == {32, 64, 80}
    assert [whole_cells(side) for side in (3.0, 96.0, 110.0)] == [32, 96, 112]


def test_a_session_ends_by_itself_and_another_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--model", "tiny", "--out", str(tmp_path / "out"), "--steps", "3", "--episodes", "1", "--workers", "0"]
    assert main([*flags, "--stop-after", "0.001"]) == 3
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*flags, "--resume"]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["resumed"]


def test_the_parts_of_a_step_are_alike(tiny_model: str, coco_folder: Path) -> None:
    recipe = Recipe(**{**vars(QUICK), "episodes": 8, "wide": 0.5, "scenes": 0.5})
    batches = stream([(Labelled(load_coco(coco_folder).samples, STILL, 6), 1.0)], load_checkpoint(tiny_model).tokenizer, recipe, 64, 0, 2)
    seen = [[(b["images"].shape[0], b["shots"].shape[1], len(b["scenes"])) for b in (next(batches), next(batches))] for _ in range(6)]
    assert all(one == other and one[0] == 12 for one, other in seen)
    assert {shots for pair in seen for _, shots, _ in pair} == {2, 5} and {scenes for pair in seen for *_, scenes in pair} == {1, 2}


def test_scenes_show_other_kinds_and_places_without_an_object(coco_folder: Path) -> None:
    samples = load_coco(coco_folder).samples
    others = [replace(s, schema=replace(s.schema, category="other")) for s in samples[8:]]
    rng = np.random.default_rng(0)

    def empty(source: Labelled) -> int:
        return sum(not len(source.episode(rng, 2, 64).scene.boxes) for _ in range(60))  # type: ignore[union-attr]

    assert empty(Labelled(samples[:8], Augmentation(), 6)) == 0  # one kind, which fills its images
    assert 0 < empty(Labelled([*samples[:8], *others], Augmentation(), 6)) < 20
    boxes = [np.array([10.0, 10.0, 40.0, 30.0])]
    drawn = [make_scene(rng, np.zeros((400, 400, 3), np.uint8), boxes, 64, Augmentation()) for _ in range(60)]
    assert 5 < sum(not len(scene.boxes) for scene in drawn) < 25
    assert boxes[0].tolist() == [10, 10, 40, 30]


def test_an_adapter_can_start_from_another(tmp_path: Path, coco_folder: Path, tiny_model: str) -> None:
    first = tmp_path / "first"
    train_adapter(tiny_model, [coco_folder], first, steps=2, recipe=adapt())
    train_adapter(tiny_model, [coco_folder], tmp_path / "second", steps=2, parent=first, recipe=adapt())
    info = json.loads((tmp_path / "second" / "adapter.json").read_text())
    assert info["parent"] == "first"
    assert info["base"] == load_checkpoint(tiny_model).base
    assert len(info["data"]) == 64


def test_a_stopped_round_says_so(tmp_path: Path, coco_folder: Path, tiny_model: str) -> None:
    with pytest.raises(InvalidInput, match="stopped at step 1"):
        train_adapter(tiny_model, [coco_folder], tmp_path / "a", steps=5, recipe=adapt(), should_stop=lambda: True)
    assert not (tmp_path / "a").exists()
    assert train_adapter(tiny_model, [coco_folder], tmp_path / "a", steps=3, recipe=adapt(), resume=True)["resumed"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, coco_folder: Path, tiny_model: str) -> None:
    with pytest.raises(KptError, match="loss became"):
        train_adapter(tiny_model, [coco_folder], tmp_path / "a", steps=60, recipe=adapt(rate=1e30, warmup=1))
    assert not (tmp_path / "a").exists()


def test_a_run_can_begin_with_earlier_weights_and_watch_a_category(tmp_path: Path, coco_folder: Path, tiny_model: str) -> None:
    start = load_checkpoint(tiny_model)
    recipe = Recipe(**{**vars(QUICK), "steps": 1, "rate": 1e-9})
    metrics = pretrain("tiny", [coco_folder], tmp_path / "out", recipe, start=Path(tiny_model), watch=[coco_folder])
    assert metrics is not None and metrics["start"] == start.base
    assert 0 <= metrics["curve"][-1]["watch"] <= 1
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    after = load_checkpoint(tmp_path / "out").model.state_dict()
    for name, value in start.model.state_dict().items():
        if "embed_tokens" not in name and "lm_head" not in name:
            torch.testing.assert_close(after[name], value, atol=2e-3, rtol=2e-3)


def test_a_checkpoint_that_is_worse_on_what_is_watched_is_not_kept_and_that_is_told(
    tmp_path: Path, coco_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter([0.5, 0.1, 0.1])
    monkeypatch.setattr("kptllm_core.curve.Watch.score", lambda *_: next(scores))
    monkeypatch.setattr(loop, "PUBLISH_EVERY", -1.0)
    call = ["train", "--model", "tiny", "--data", str(coco_folder), "--watch", str(coco_folder), "--workers", "0", "--out", str(tmp_path / "out")]
    assert main([*call, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "the watched PCK was 0.100" in said and "stays as it was after 1 steps" in said
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 1


def test_what_an_earlier_training_made_is_replaced_only_on_request(
    tmp_path: Path, coco_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["train", "--lora", "--model", "tiny", "--data", str(coco_folder), "--workers", "0", "--steps", "1", "--out", str(tmp_path / "a")]
    assert main(call) == 0
    made = (tmp_path / "a" / "adapter.safetensors").read_bytes()
    for again in ([], ["--resume"], ["--seed", "1"]):
        assert main([*call, *again]) == 2
        assert "--replace" in capsys.readouterr().err
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == made
    assert main([*call, "--seed", "1", "--replace"]) == 0
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() != made


def test_weights_of_another_size_are_not_taken_over(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="same preset"):
        pretrain("tiny", [], tmp_path / "out", Recipe(**{**vars(QUICK), "steps": 1}), start=Path("nano"))


def test_word_pieces_that_are_new_begin_as_their_old_pieces(tiny_model: str) -> None:
    before = load_checkpoint(tiny_model)
    words = train_tokenizer(["zygomatic arch", "nose"], 400)
    new = KptLLM(before.model.config, len(words))
    take_over(new, words, before)
    old_rows, rows = (m.llm.get_input_embeddings().weight for m in (before.model, new))
    assert torch.equal(rows[words.convert_tokens_to_ids("<keypoint>")], old_rows[before.tokenizer.convert_tokens_to_ids("<keypoint>")])
    pieces = before.tokenizer(" zygomatic", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(rows[words.convert_tokens_to_ids("Ġzygomatic")], old_rows[pieces].mean(0))


def test_groups_that_are_held_out_are_a_tenth() -> None:
    assert 140 < len(held_out(f"group {i}" for i in range(2000))) < 260


def test_of_a_few_groups_one_is_held_out() -> None:
    for start in range(0, 200, 10):
        groups = [f"group {i}" for i in range(start, start + 10)]
        chosen = held_out(groups)
        assert chosen and chosen <= set(groups) and chosen == held_out(reversed(groups))


def test_too_few_labels_are_refused(tmp_path: Path, tiny_model: str) -> None:
    folder = tmp_path / "few"
    (folder / "images").mkdir(parents=True)
    empty = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x", "keypoints": ["a"]}]}
    (folder / "annotations.json").write_text(json.dumps(empty))
    with pytest.raises(DataError, match="at least 2"):
        train_adapter(tiny_model, [folder], tmp_path / "a", steps=1)


def test_an_adapter_is_of_one_category(tmp_path: Path, tiny_model: str, coco_folder: Path) -> None:
    (tmp_path / "images").symlink_to(coco_folder / "images")
    data = json.loads((coco_folder / "annotations.json").read_text())
    data["categories"].append({**data["categories"][0], "id": 99, "name": "another"})
    data["annotations"][0]["category_id"] = 99
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="2 categories: another"):
        train_adapter(tiny_model, [tmp_path], tmp_path / "a", steps=1)


def test_labels_without_a_point_are_refused_in_words(coco_folder: Path) -> None:
    samples = load_coco(coco_folder).samples
    bare = [replace(s, keypoints=KeypointSet(s.keypoints.names, s.keypoints.xy, np.zeros(len(s.keypoints.names), int))) for s in samples]
    with pytest.raises(DataError, match="No object of these folders has a labelled point"):
        Labelled(bare, Augmentation(), 12)


def test_a_checkpoint_on_the_way_that_finds_no_room_does_not_end_a_training(
    tmp_path: Path, coco_folder: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PUBLISH_EVERY", 0.0)
    real, calls = store.save_checkpoint, list[int]()

    def full_at_first(*rest: Any) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*rest)

    monkeypatch.setattr(store, "save_checkpoint", full_at_first)
    metrics = pretrain("tiny", [coco_folder], tmp_path / "out", replace(QUICK, steps=3))
    assert metrics is not None and metrics["steps"] == 3 and len(calls) == 4
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_points_of_a_self_pair_lie_inside_their_window() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (50, 80, 3)).astype(np.uint8)
    xy = structured_points(rng, image, np.array([10.0, 5.0]), 40, 30)
    assert ((xy >= [10, 5]) & (xy <= [50, 45])).all()


def test_a_state_of_another_run_is_not_resumed(tmp_path: Path, coco_folder: Path, tiny_model: str) -> None:
    with pytest.raises(InvalidInput, match="stopped"):
        train_adapter(tiny_model, [coco_folder], tmp_path / "a", steps=5, recipe=adapt(), should_stop=lambda: True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "images").symlink_to(coco_folder / "images")
    data = json.loads((coco_folder / "annotations.json").read_text())
    (other / "annotations.json").write_text(json.dumps({**data, "annotations": data["annotations"][:-1]}))
    with pytest.raises(InvalidInput, match="of another run: data"):
        train_adapter(tiny_model, [other], tmp_path / "a", steps=5, recipe=adapt(), resume=True)
    with pytest.raises(InvalidInput, match=r"of another run: .*adapter"):
        pretrain(tiny_model, [], tmp_path / "a", Recipe(**{**vars(QUICK), "steps": 6}), resume=True)


def test_objects_of_one_point_without_a_box_teach_something() -> None:
    """They have the box that serving gives them, not one without area, in whose crop the point is always the centre."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (200, 300, 3), np.uint8)
    points = KeypointSet(("tip",), np.array([[120, 80]]), np.array([2]))
    episode = make_episode(rng, [(image, points)] * 40, KeypointSchema(("tip",)), 64, replace(STILL, cut=0.0, covered=0.0), 6)
    assert episode.size.min() > 0.1 and np.ptp(episode.xy[:, 0], 0).min() > 0.05


def test_a_state_that_cannot_be_read_is_begun_anew_and_one_that_cannot_be_written_is_told(
    tmp_path: Path, coco_folder: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / ".a.state" / "state.safetensors"
    state.parent.mkdir()
    state.write_bytes(b"cut short")
    monkeypatch.setattr("kptllm_core.loop.SAVE_EVERY", 0.0)
    saves: list[int] = []

    def full(self: Loop, real: Any = Loop.save) -> None:
        saves.append(self.step)
        if self.step == 1:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(Loop, "save", full)
    metrics = train_adapter(tiny_model, [coco_folder], tmp_path / "a", steps=2, recipe=adapt(), resume=True)
    assert (metrics["steps"], metrics["resumed"]) == (2, False) and saves[0] == 1
    assert "training begins anew" in caplog.text and "No space left" in caplog.text
    with pytest.raises(FileNotFoundError):
        write_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere" / "a.safetensors")
