"""The protocol on small folders whose right answers are known; predictors here are real ones, if simple."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kptllm_core.dataset import held_out, load_coco
from kptllm_core.errors import DataError, InvalidInput
from kptllm_core.evaluate import CopyPredictor, Options, evaluate, load_categories, score_predictor, write_sheet
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.language import plain_words
from kptllm_core.predictor import Example
from kptllm_core.protocol import Category, box_handed, cut_off, draw_episodes, part_of, shuffled, spoilt, turn, with_box
from kptllm_core.report import NAMING_RULE, remarks, table, write_json

NAMES = ("nose", "left_ear", "right_ear", "tail")
LAYOUT = np.array([[0.5, 0.1], [0.3, 0.3], [0.7, 0.35], [0.5, 0.9]])  # of the box; no symmetry


def write_folder(
    folder: Path,
    count: int = 12,
    *,
    groups: int = 0,
    category: str = "mouse",
    noise: float = 0.0,
    seed: int = 0,
    visibility: Any = None,
) -> Path:
    """`count` images with one object each: coloured discs at the points of a layout, at random places and sizes."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        pixels = np.full((90, 120, 3), 200, np.uint8)
        size = rng.uniform(40, 60)
        x, y = rng.uniform(5, 110 - size), rng.uniform(5, 85 - size)
        points = LAYOUT * size + (x, y) + rng.normal(0, noise * size, (4, 2)).clip(-10, 10)
        for k, (px, py) in enumerate(points):
            pixels[int(py) - 1 : int(py) + 2, int(px) - 1 : int(px) + 2] = (50 * k, 90, 250 - 60 * k)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03d}.png")
        seen = [2] * 4 if visibility is None else visibility(i)
        group = f"video {i % groups}" if groups else f"{i:03d}.png"
        images.append({"id": i + 1, "file_name": f"{i:03d}.png", "width": 120, "height": 90, "group": group})
        flat = [v for (px, py), s in zip(points.tolist(), seen, strict=True) for v in (px, py, s)]
        annotations.append(
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 1,
                "bbox": [x, y, size, size],
                "keypoints": flat,
                "area": size * size,
                "iscrowd": 0,
            }
        )
    kind = {"id": 1, "name": category, "keypoints": list(NAMES), "skeleton": [[1, 2], [1, 3], [1, 4]]}
    (folder / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [kind]})
    )
    return folder


class Recorder(CopyPredictor):
    """Copies, and keeps what it was asked; names a point after the nearest one of the layout in its box."""

    base = "recorder"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def predict(
        self,
        images: list[np.ndarray],
        schema: KeypointSchema,
        support: Sequence[Example] = (),
        boxes: Any = None,
        prompt: str = "auto",
        asked: list[str] | None = None,
    ) -> list[KeypointSet]:
        self.calls.append(
            {"images": images, "schema": schema, "support": list(support), "boxes": boxes, "prompt": prompt}
        )
        if support:
            return super().predict(images, schema, support, boxes, prompt, asked)
        unknown = np.full(len(schema), Visibility.NOT_LABELLED)
        return [KeypointSet(schema.names, np.zeros((len(schema), 2)), unknown) for _ in images]

    def name_points(
        self, image: np.ndarray, xy: np.ndarray, box: Any = None, candidates: list[str] | None = None
    ) -> list[tuple[str, float]]:
        names = candidates or ["Nose", "ear (left)", "ear (right)", "paw"]
        nearest = np.linalg.norm((xy - box[:2])[:, None] / box[2:] - LAYOUT, axis=-1).argmin(1)
        return [(names[i], 1.0) for i in nearest]


def episodes_of(folder: Path, **options: Any) -> tuple[Category, list[Any]]:
    category = load_categories([folder])[0]
    return category, draw_episodes(category, **{"shots": 1, "episodes": 20, "queries": 5, "seed": 1} | options)


def signature(episodes: list[Any]) -> list[Any]:
    return [
        ([s.image_id for s in e.support], [(q.index, q.degrees, q.jitter) for q in e.queries], e.order.tolist())
        for e in episodes
    ]


def test_episodes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    _, first = episodes_of(write_folder(tmp_path / "a"))
    other = load_categories([write_folder(tmp_path / "b", category="rat"), tmp_path / "a"])
    again = draw_episodes(other[1], shots=1, episodes=20, queries=5, seed=1)
    assert signature(first) == signature(again)
    assert signature(first) != signature(episodes_of(tmp_path / "a", seed=2)[1])
    assert len({tuple(e.order) for e in first}) > 5  # the order of keypoints is shuffled


def test_an_episode_repeats_nothing_and_keeps_groups_apart(tmp_path: Path) -> None:
    _, episodes = episodes_of(write_folder(tmp_path / "a", 15, groups=5), shots=3)
    for episode in episodes:
        drawn = [s.image_id for s in episode.support] + [q.sample.image_id for q in episode.queries]
        assert len(set(drawn)) == len(drawn)
        assert not {s.group for s in episode.support} & {q.sample.group for q in episode.queries}


def test_small_categories_give_fewer_queries_and_then_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 4)
    assert {len(e.queries) for e in episodes_of(folder, shots=2)[1]} == {2}
    with pytest.raises(DataError, match=r"4 usable objects.*no query is left beside 4.*lower --shots"):
        episodes_of(folder, shots=4)
    with pytest.raises(DataError, match="has 4 objects to draw 5 supports from"):
        episodes_of(folder, shots=5)


def test_one_group_alone_still_separates_images(tmp_path: Path) -> None:
    _, episodes = episodes_of(write_folder(tmp_path / "a", 6, groups=1))
    assert all(len(e.queries) == 5 for e in episodes)


def test_copying_is_perfect_where_layouts_agree_and_as_far_off_as_they_differ(tmp_path: Path) -> None:
    exact = evaluate(CopyPredictor(), load_categories([write_folder(tmp_path / "a")]), Options(episodes=5))
    assert exact["pck"] == {"0.02": 1.0, "0.05": 1.0, "0.1": 1.0, "0.2": 1.0} and exact["nme"] < 1e-5
    assert exact["skill"] is None
    loose = evaluate(
        CopyPredictor(), load_categories([write_folder(tmp_path / "b", 30, noise=0.1)]), Options(episodes=10)
    )
    assert 0.1 < loose["pck"]["0.1"] < 0.5 < loose["pck"]["0.2"]
    assert loose["copy_pck"] == loose["pck"] and loose["skill"] == 0.0


def test_the_report_has_what_is_promised(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / "a", 8, noise=0.1), write_folder(tmp_path / "b", 8, category="rat")]
    options = Options(episodes=3, queries=4)
    report = evaluate(Recorder(), load_categories(folders), options)
    for key in ("pck", "pck_ci", "copy_pck"):
        assert list(report[key]) == ["0.02", "0.05", "0.1", "0.2"]
    assert report["pairs"] == 24 and report["base"] == "recorder"
    assert {"skill", "nme", "auc", "calibration_error", "seconds_per_image", "arguments"} <= set(report)
    assert set(report["per_category"]) == set(report["per_keypoint"]) == {"mouse", "rat"}
    assert report["per_keypoint"]["rat"]["tail"] == {
        "points": 12,
        "pck": {"0.02": 1, "0.05": 1, "0.1": 1, "0.2": 1},
        "nme": pytest.approx(0, abs=1e-5),
    }
    assert report["pck"]["0.1"] == pytest.approx(np.mean([c["pck"]["0.1"] for c in report["per_category"].values()]))
    for threshold, (low, high) in report["pck_ci"].items():
        assert low <= report["pck"][threshold] <= high
    assert report["arguments"]["episodes"] == 3
    write_json(tmp_path / "out" / "report.json", report)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert [line.split()[0] for line in table(report).splitlines()] == ["pairs", "mouse", "rat", "all"]


def test_only_points_seen_in_the_query_and_in_all_supports_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 10, visibility=lambda i: [2, 1, 0, 2] if i % 2 else [0, 0, 2, 2])
    report = evaluate(CopyPredictor(), load_categories([folder]), Options(shots=2, episodes=20))
    assert report["per_keypoint"]["mouse"]["tail"]["points"] == report["pairs"]  # seen everywhere
    assert report["per_keypoint"]["mouse"]["nose"]["points"] < report["pairs"]
    apart = write_folder(tmp_path / "b", 4, groups=2, visibility=lambda i: [2, 2, 0, 0] if i % 2 else [0, 0, 2, 2])
    nothing = evaluate(CopyPredictor(), load_categories([apart]), Options(episodes=4))
    assert nothing["pck"]["0.2"] == nothing["copy_pck"]["0.2"] == 0.0 and nothing["pairs"] == 8
    assert nothing["nme"] is None and nothing["calibration_error"] is None


def test_the_predictor_is_told_what_the_options_say(tmp_path: Path) -> None:
    categories = load_categories([write_folder(tmp_path / "a")])
    true = np.array([s.keypoints.box for s in categories[0].samples])
    calls = {}
    for how in ("given", "jittered", "found"):
        recorder = Recorder()
        evaluate(recorder, categories, Options(episodes=2, queries=3, boxes=how, prompt="visual", shots=2))
        calls[how] = recorder.calls
        assert all(len(c["support"]) == 2 and c["prompt"] == "visual" for c in recorder.calls)
    assert all(np.abs(true - b).max(1).min() < 1e-4 for c in calls["given"] for b in c["boxes"])
    assert all(b is None for c in calls["found"] for b in c["boxes"])
    for given, jittered in zip(calls["given"], calls["jittered"], strict=True):
        assert given["schema"] == jittered["schema"]  # the same episodes
        for box, moved in zip(given["boxes"], jittered["boxes"], strict=True):
            size, shift = max(box[2:]), (moved[:2] + moved[2:] / 2) - (box[:2] + box[2:] / 2)
            assert 0 < abs(shift).max() <= 0.1 * size and 0.8 < moved[2] / box[2] < 1.23 and moved[2] / box[2] != 1


def test_order_of_keypoints_is_shuffled_with_all_that_follows_it(tmp_path: Path) -> None:
    recorder = Recorder()
    categories = load_categories([write_folder(tmp_path / "a")])
    evaluate(recorder, categories, Options(episodes=6, queries=2))
    assert len({c["schema"].names for c in recorder.calls}) > 2
    for call in recorder.calls:
        assert call["support"][0].keypoints.names == call["schema"].names
        assert {tuple(call["schema"].names[i] for i in link) for link in call["schema"].skeleton} == {
            ("nose", n) for n in NAMES[1:]
        }
        assert {frozenset(call["schema"].names[i] for i in pair) for pair in call["schema"].symmetric} == {
            frozenset(NAMES[1:3])
        }


def test_shuffled_is_undone_by_the_inverse_order() -> None:
    schema = KeypointSchema(NAMES, "mouse", ((0, 3),), ((1, 2),))
    order = np.array([2, 0, 3, 1])
    mixed = shuffled(schema, order)
    assert mixed.names == ("right_ear", "nose", "tail", "left_ear")
    assert shuffled(mixed, np.argsort(order)) == schema


def test_text_prompts_see_no_support_and_copy_is_null_without_any(tmp_path: Path) -> None:
    recorder = Recorder()
    folder = write_folder(tmp_path / "a")
    report = evaluate(recorder, load_categories([folder]), Options(episodes=2, prompt="text"))
    assert all(c["support"] == [] and c["prompt"] == "text" for c in recorder.calls)
    assert report["copy_pck"]["0.1"] == 1.0 and report["pck"]["0.2"] == 0.0 and report["nme"] == 1.0
    for options, data in (
        (Options(shots=0, prompt="text", episodes=1), folder),
        (Options(prompt="text", episodes=1), write_folder(tmp_path / "b", 1)),
    ):
        report = evaluate(Recorder(), load_categories([data]), options)
        assert report["copy_pck"] is None and report["skill"] is None and report["pairs"] >= 1
        assert "–" in table(report)


@pytest.mark.parametrize("degrees", [37.0, 90.0, -151.0])
def test_turning_moves_points_with_their_pixels_and_keeps_the_unit(degrees: float) -> None:
    image = np.zeros((80, 130, 3), np.uint8)
    image[20:23, 100:103] = 255  # centre (101.5, 21.5)
    truth = KeypointSet(("dot",), np.array([[101.5, 21.5]]), np.array([2]), box=np.array([80, 10, 40, 20]))
    turned, moved = turn(image, truth, degrees)
    light = turned[..., 0].astype(float)
    light[turned.min(-1) < 125] = 0  # not the fill
    rows, columns = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    centre = np.array([(columns * light).sum(), (rows * light).sum()]) / light.sum()
    assert centre == pytest.approx(moved.xy[0], abs=0.5)
    assert moved.box is not None and moved.box[2:] == pytest.approx([40, 40])
    box_centre = moved.box[:2] + 20
    assert np.linalg.norm(moved.xy[0] - box_centre) == pytest.approx(np.linalg.norm([1.5, 1.5]), abs=1e-3)
    assert turn(image, truth, 0.0)[1] is truth


def test_rotation_turns_queries_only_and_makes_copying_fail(tmp_path: Path) -> None:
    recorder = Recorder()
    report = evaluate(recorder, load_categories([write_folder(tmp_path / "a", 20)]), Options(rotate=True, episodes=5))
    assert report["copy_pck"]["0.1"] < 0.3
    assert all(
        c["support"][0].image.shape == (90, 120, 3) and c["images"][0].shape == (150, 150, 3) for c in recorder.calls
    )


@pytest.mark.parametrize(
    ("jitter", "gone", "box", "shape"),
    [
        ((-0.1, 0, 0), [1], [0, 10, 26, 20], (50, 46)),
        ((0.1, 0, 0), [2], [20, 10, 26, 20], (50, 46)),
        ((0, -0.1, 0), [0], [20, 0, 40, 13], (33, 80)),
        ((0.05, 0.1, 0), [3], [20, 10, 40, 13], (23, 80)),
    ],
)
def test_cutting_off_a_third(jitter: tuple[float, float, float], gone: list[int], box: list[int], shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (50, 80, 3), np.uint8)
    xy = np.array([[40.0, 12.0], [22.0, 20.0], [58.0, 20.0], [40.0, 28.0], [0.0, 0.0]])
    seen = np.array([2, 2, 2, 2, 0])
    truth = KeypointSet(("a", "b", "c", "d", "e"), xy, seen, np.ones(5), np.array([20.0, 10.0, 40.0, 20.0]))
    left, points = cut_off(image, truth, jitter)
    assert left.shape[:2] == shape and points.box is not None and points.box.tolist() == box
    assert [i for i in range(5) if points.visibility[i] == Visibility.ABSENT] == gone
    assert points.visibility[4] == Visibility.NOT_LABELLED  # nobody knows whether it was there
    for (x, y), old in zip(points.xy[points.placed].astype(int), xy[points.placed].astype(int), strict=True):
        assert (left[y, x] == image[old[1], old[0]]).all()


def test_the_report_says_what_was_said_of_points_cut_off(tmp_path: Path) -> None:
    report = evaluate(Recorder(), load_categories([write_folder(tmp_path / "a")]), Options(cut=True, episodes=4, queries=3))
    said = report["visibility"]
    assert set(said) == {"absent", "visible"} and report["arguments"]["cut"] is True
    assert sum(sum(row.values()) for row in said.values()) == 4 * report["pairs"] and set(said["absent"]) == {"visible"}


def test_wrong_labels_among_the_shots(tmp_path: Path) -> None:
    categories = load_categories([write_folder(tmp_path / "a", 20)])
    told = {"shots": 4, "episodes": 4, "queries": 3}
    right, wrong = (evaluate(CopyPredictor(), categories, Options(**told, wrong=n)) for n in (0, 2))
    assert right["pck"]["0.1"] == 1 > wrong["pck"]["0.1"]
    one = KeypointSet(("a", "b", "c"), np.array([[1.0, 1], [2, 2], [3, 3]]), np.array([2, 0, 2]), np.ones(3), None)
    assert spoilt(one).xy.tolist() == [[3, 3], [2, 2], [1, 1]]


def test_supports_from_another_folder_never_meet_themselves(tmp_path: Path) -> None:
    data, support = write_folder(tmp_path / "a", 6), write_folder(tmp_path / "s", 2, seed=9)
    recorder = Recorder()
    report = evaluate(recorder, load_categories([data], support), Options(episodes=3, queries=9, shots=2))
    assert report["pairs"] == 18
    for name in ("000.png", "001.png"):  # a support folder that is cut from the data by hard links
        (support / "images" / name).unlink()
        os.link(data / "images" / name, support / "images" / name)
    assert evaluate(recorder, load_categories([data], support), Options(episodes=3, queries=9, shots=2))["pairs"] == 12
    only = load_categories([support], support)
    with pytest.raises(DataError, match="images that are not in the support folder"):
        evaluate(recorder, only, Options(episodes=1, shots=2))


def test_support_folder_must_know_the_points(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "a", 3)
    other = write_folder(tmp_path / "s", 3, category="rat")
    assert load_categories([data], other)[0].supports[0].category == "rat"  # the only one, with the same points
    text = (other / "annotations.json").read_text()
    for name in NAMES:
        text = text.replace(f'"{name}"', f'"x_{name}"')
    (other / "annotations.json").write_text(text)
    with pytest.raises(DataError, match=r"no category 'mouse' with any of its points. Found: rat"):
        load_categories([data], other)


def test_folders_with_the_same_category_stay_apart(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / "a", 3), write_folder(tmp_path / "b", 3, seed=1)]
    assert [c.name for c in load_categories(folders)] == ["mouse", "b/mouse"]
    with pytest.raises(DataError, match="Name each folder once"):
        load_categories([*folders, folders[1]])


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "a", 6)
    (folder / "images" / "003.png").write_bytes(b"not an image")
    report = evaluate(CopyPredictor(), load_categories([folder]), Options(episodes=12))
    assert [Path(p).name for p in report["unreadable"]] == ["003.png"]
    assert 0 < report["pairs"] < 12 * 5 and report["pck"]["0.1"] == 1.0
    assert capsys.readouterr().err.count("Not an image") == 1
    for i in range(6):
        (folder / "images" / f"{i:03d}.png").write_bytes(b"no")
    fresh = folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="None of the 6 images could be read"):
        evaluate(CopyPredictor(), load_categories([fresh]), Options(episodes=12))


def test_naming_open_and_closed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 5, visibility=lambda i: [2, 2, 1, 2] if i else [2, 0, 0, 2])
    report = evaluate(Recorder(), load_categories([folder]), Options(task="name"))
    assert report["points"] == 18
    assert report["naming_accuracy"] == pytest.approx(13 / 18)  # "paw" for the tail; "ear (left)" is left_ear
    assert report["naming_accuracy_closed"] == 1.0
    assert report["per_keypoint"]["mouse"]["tail"] == {
        "points": 5,
        "naming_accuracy": 0.0,
        "naming_accuracy_closed": 1.0,
    }
    assert table(report).splitlines()[1].split() == ["mouse", "18", "0.722", "1.000"]
    assert report["naming_rule"] == NAMING_RULE and any(NAMING_RULE in line for line in remarks(report))


@pytest.mark.parametrize(
    "names",
    [
        ("left_eye", "LeftEye", "eye (left)", "L eye", "EYE-LEFT", "l_eye", "lft eye"),
        ("foreleg R1", "forelegR1", "right foreleg 1"),
        ("nœud", "NŒUD"),
        ("左目", "左目 "),
    ],
)
def test_names_that_the_published_rule_takes_for_the_same(names: tuple[str, ...]) -> None:
    assert len({plain_words(n) for n in names}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left_eye", "right_eye"),
        ("finger_1", "finger_2"),
        ("paw", "foot"),
        ("eye", "left eye"),
        ("thumb tip", "tip of thumb"),
    ],
)
def test_names_that_it_does_not(one: str, other: str) -> None:
    assert plain_words(one) != plain_words(other)


def test_parts_of_the_groups(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 40)
    everything = load_categories([folder])
    kept = {part: part_of(everything, part)[0] for part in ("all", "train", "heldout")}
    unseen = held_out(s.group for s in kept["all"].samples)
    assert {s.group for s in kept["heldout"].samples} == unseen and 1 < len(kept["heldout"].samples) < 10
    assert not unseen & {s.group for s in kept["train"].samples}
    assert len(kept["train"].samples) + len(kept["heldout"].samples) == len(kept["all"].samples) == 40
    bare = [replace(everything[0], empty=everything[0].samples)]  # images without an object are of groups, too
    assert [s.group in unseen for s in part_of(bare, "heldout")[0].empty] == [True] * len(kept["heldout"].samples)
    assert kept["train"].supports is kept["train"].samples  # supports come from the same part
    named = evaluate(Recorder(), everything, Options(task="name", part="heldout"))
    assert named["points"] == 4 * len(kept["heldout"].samples) and named["arguments"]["part"] == "heldout"
    other = load_categories([folder, write_folder(tmp_path / "b", 3, groups=1, category="rat")], tmp_path / "a")
    assert not held_out(["video 0"])
    assert part_of(other, "heldout")[0].supports is other[0].supports
    report = evaluate(Recorder(), other, Options(part="heldout", episodes=1, queries=2))
    assert list(report["per_category"]) == ["mouse"] and list(report["left_out"]) == ["rat"]
    assert "rat was left out: none of its groups is in --part heldout." in remarks(report)
    with pytest.raises(DataError, match=r"--part heldout leaves no object: none of the 1 groups"):
        evaluate(Recorder(), load_categories([tmp_path / "b"]), Options(part="heldout"))


def test_score_predictor_counts_every_placed_point(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "a", 20, visibility=lambda i: [0, 0, 0, 0] if i == 19 else [2, 2, 1, 0] if i == 18 else [2, 2, 2, 2]
    )
    samples = [(s.read(), s.keypoints) for s in json_samples(folder)]
    schema = KeypointSchema(NAMES, "mouse")
    support = [Example(*samples[0])]
    score = score_predictor(CopyPredictor(), samples[1:], schema, support, boxes="given")
    assert score == {
        "pck": {"0.02": 1.0, "0.05": 1.0, "0.1": 1.0, "0.2": 1.0},
        "nme": pytest.approx(0, abs=1e-5),
        "points": 17 * 4 + 3,
        "images": 18,
    }
    whole = score_predictor(CopyPredictor(), samples[1:], schema, support)
    assert whole["points"] == score["points"] and whole["pck"]["0.1"] < 1.0  # the whole image taken as the box
    less = score_predictor(CopyPredictor(), samples[1:], schema, [Example(*samples[18])], boxes="given")
    assert less["pck"]["0.2"] == pytest.approx((17 * 3 / 4 + 1) / 18)  # the tail is in no support: missed where it is
    assert score_predictor(CopyPredictor(), [], schema, support) == {
        "pck": dict.fromkeys(["0.02", "0.05", "0.1", "0.2"], 0.0),
        "nme": None,
        "points": 0,
        "images": 0,
    }
    with pytest.raises(InvalidInput, match="found or given"):
        score_predictor(CopyPredictor(), [], schema, support, boxes="jittered")


def test_a_point_that_would_not_be_drawn_is_missed_where_drawn_ones_count(tmp_path: Path) -> None:
    """An adapter that calls what is there absent leaves people more to do, wherever it would have put it."""

    class Shy(CopyPredictor):
        def predict(self, *args: Any, **options: Any) -> list[KeypointSet]:
            found = super().predict(*args, **options)
            return [KeypointSet(p.names, p.xy, np.full(len(p), Visibility.ABSENT), p.score, p.box) for p in found]

    samples = [(s.read(), s.keypoints) for s in json_samples(write_folder(tmp_path / "a", 4))]
    asked = (samples[1:], KeypointSchema(NAMES, "mouse"), [Example(*samples[0])], "given")
    assert score_predictor(Shy(), *asked)["pck"]["0.1"] == 1.0
    assert score_predictor(Shy(), *asked, drawn=True)["pck"]["0.1"] == 0.0
    assert score_predictor(CopyPredictor(), *asked, drawn=True)["pck"]["0.1"] == 1.0


def test_a_group_is_held_out_for_the_whole_folder(tmp_path: Path) -> None:
    """Training decides so: a category without one of the folder's unseen groups has none of its own."""
    folder = write_folder(tmp_path / "a", 40, groups=20)
    unseen = held_out(s.group for s in load_coco(folder).samples)
    content = json.loads((folder / "annotations.json").read_text())
    groups = {i["id"]: i["group"] for i in content["images"]}
    content["categories"].append({**content["categories"][0], "id": 2, "name": "rat"})
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 if groups[annotation["image_id"]] in unseen else 2
    (folder / "annotations.json").write_text(json.dumps(content))
    kinds = load_categories([folder])
    assert [c.name for c in part_of(kinds, "heldout")] == ["mouse"] and [c.name for c in part_of(kinds, "train")] == ["rat"]


def json_samples(folder: Path) -> Any:
    from kptllm_core.dataset import load_coco

    return load_coco(folder).samples


def test_copy_averages_supports_and_needs_one() -> None:
    schema = KeypointSchema(("a", "b"))
    image = np.zeros((100, 200, 3), np.uint8)
    one = Example(
        image, KeypointSet(schema.names, np.array([[60, 50], [0, 0]]), np.array([2, 0]), box=np.array([0, 0, 100, 100]))
    )
    two = Example(
        image,
        KeypointSet(schema.names, np.array([[80, 50], [50, 80]]), np.array([2, 2]), box=np.array([0, 0, 100, 100])),
    )
    boxed, whole = CopyPredictor().predict([image, image], schema, [one, two], [np.array([10, 10, 40, 20]), None])
    assert boxed.xy == pytest.approx(np.array([[30 + 0.2 * 40, 20], [30, 20 + 0.3 * 40]]))
    assert whole.xy[0] == pytest.approx([100 + 0.2 * 200, 50])
    assert CopyPredictor().predict([image], schema, [one], asked=["b"])[0].visibility.tolist() == [
        Visibility.NOT_LABELLED
    ]
    with pytest.raises(InvalidInput, match="at least one support"):
        CopyPredictor().predict([image], schema)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shots": 0}, "possible with --prompt text only"),
        ({"shots": 51}, "at most 50"),
        ({"episodes": 0}, "--episodes 0"),
        ({"queries": -1}, "--queries"),
        ({"boxes": "none"}, "given, jittered, found"),
        ({"prompt": "auto"}, "visual, text, both"),
        ({"seed": -1}, "--seed"),
        ({"part": "test"}, "--part test is not known"),
        ({"protocol": "coco"}, "episodes, mp100, ap10k"),
        ({"baseline": "dino"}, "correlation, sift, template"),
        ({"without": ("gate",)}, "--without gate is not known. Expected one of: identify"),
        ({"baseline": "sift", "without": ("llm",)}, "a --baseline has none of them"),
        ({"baseline": "sift", "prompt": "text"}, "nor finds them by text"),
        ({"baseline": "sift", "task": "name"}, "neither names points"),
        ({"prompt": "text", "without": ("identify",)}, "leaves nothing to ask"),
        ({"task": "name", "without": ("llm", "extractor")}, "only the extractor"),
        ({"protocol": "mp100", "part": "train"}, "has its own split"),
        ({"protocol": "ap10k", "cut": True}, "ap10k knows neither"),
        ({"shots": 2, "wrong": 2}, "--wrong 2 of 2 shots"),
        ({"wrong": -1}, "--wrong -1 of 1 shots"),
        ({"task": "instances", "boxes": "found"}, "--boxes found means nothing"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Options(**wrong)


def test_boxes_handed() -> None:
    box = np.array([10.0, 20.0, 40.0, 20.0])
    assert box_handed(box, "given", (0.1, 0.1, 0.1)) is box
    assert box_handed(box, "found", (0, 0, 0)) is None
    assert box_handed(box, "jittered", (0.1, -0.05, np.log(2))) == pytest.approx([-6, 8, 80, 40])


def test_one_picture_per_category(tmp_path: Path) -> None:
    categories = load_categories([write_folder(tmp_path / "a", category="a mouse/rat")])
    sheets: list[str] = []

    def draw(name: str, *rest: Any) -> None:
        sheets.append(name)
        write_sheet(tmp_path / "pictures", name, *rest)

    evaluate(CopyPredictor(), categories, Options(episodes=3, queries=5), draw)
    assert sheets == ["a mouse/rat"]
    assert Image.open(tmp_path / "pictures" / "a_mouse_rat.png").width == 5 * 330 + 10  # one support, four queries


def test_objects_without_a_box_are_measured_by_their_points() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    own = KeypointSet(("a", "b"), np.array([[10, 10], [10, 60]]), np.array([2, 2]), box=np.array([0, 0, 80, 90]))
    assert with_box(own, image) is own
    bare = KeypointSet(own.names, own.xy, own.visibility)
    assert with_box(bare, image).box == pytest.approx([5, 5, 10, 60])  # a line has an area, too
    single = KeypointSet(own.names, own.xy, np.array([2, 0]), box=np.array([10, 10, 0, 0]))
    assert with_box(single, image).box == pytest.approx([0, 0, 20, 20])
    with pytest.raises(DataError, match="neither a box nor a labelled point"):
        with_box(KeypointSet(own.names, own.xy, np.array([0, 3])), image)
    near = Example(image, KeypointSet(("a",), np.array([[101, 50]]), np.array([2])))
    truth = KeypointSet(("a",), np.array([[100, 50]]), np.array([2]))
    score = score_predictor(CopyPredictor(), [(image, truth)], KeypointSchema(("a",)), [near])
    assert score["points"] == 1 and 0 <= score["pck"]["0.1"] <= 1
