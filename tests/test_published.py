"""The published protocols on small files in the data sets' own formats, with rendered images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kptllm_core import metrics
from kptllm_core.__main__ import main
from kptllm_core.errors import DataError
from kptllm_core.evaluate import Options, evaluate
from kptllm_core.keypoints import KeypointSet
from kptllm_core.protocol import Category
from kptllm_core.published import ap10k_episodes, departures, load_published, mp100_episodes
from kptllm_core.report import remarks, table
from kptllm_core.scoring import CopyPredictor
from kptllm_core.synthetic import Category as Rendered

SIDE = 96
AP10K_NAMES = ("L_Eye", "R_Eye", "Nose", "Neck", "Root of tail", "L_Shoulder", "L_Elbow", "L_F_Paw", "R_Shoulder", "R_Elbow",
               "R_F_Paw", "L_Hip", "L_Knee", "L_B_Paw", "R_Hip", "R_Knee", "R_B_Paw")  # fmt: skip


def write(folder: Path, kinds: list[dict[str, Any]], objects: list[dict[str, Any]]) -> tuple[Path, Path]:
    """An annotation file and its folder of images. objects: kind, points (K, 2), image (H, W, 3) and what they override."""
    images, annotations = [], []
    for number, item in enumerate(objects):
        picture, points = item.pop("image"), np.asarray(item.pop("points"))
        low, high = points.min(0), points.max(0)
        name = item.pop("file", f"{kinds[item['category_id'] - 1]['name']}/{number:04d}.jpg")
        if picture is not None:
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / "images" / name)
            images.append({"id": 100 + number, "file_name": name, "width": SIDE, "height": SIDE})
        size = (high - low).tolist()
        flat = np.concatenate([points, np.full((len(points), 1), 2)], 1).flatten().tolist()
        annotations.append({"id": number, "image_id": images[-1]["id"], "keypoints": flat, "bbox": [*low.tolist(), *size], "iscrowd": 0,
                            "num_keypoints": len(points), "area": size[0] * size[1]} | item)  # fmt: skip
    path = folder / "split.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": kinds}))
    return path, folder / "images"


def mp100_folder(folder: Path, count: int = 8, **override: Any) -> tuple[Path, Path]:
    """Two rendered categories with `count` objects each and different points."""
    rng = np.random.default_rng(0)
    kinds, objects = [], []
    for number, seed in enumerate((3, 14), 1):
        rendered = Rendered.from_seed(seed)
        kinds.append(
            {"id": number, "name": f"kind{number}", "keypoints": list(rendered.schema.names), "skeleton": []} | override
        )
        for _ in range(count):
            image, found = rendered.render(rng, SIDE)
            objects.append({"category_id": number, "image": image, "points": np.clip(found.xy, 0, SIDE)})
    return write(folder, kinds, objects)


def ap10k_folder(
    folder: Path, counts: tuple[int, ...] = (5, 3, 1), noise: float = 0.0, **override: Any
) -> tuple[Path, Path]:
    """Species that share AP-10K's points; the first object of the first species has a second one in its image."""
    rng = np.random.default_rng(1)
    layout = rng.uniform(0, 1, (17, 2))
    kinds = [
        {"id": i + 1, "name": f"species{i + 1}", "keypoints": list(AP10K_NAMES)} | override for i in range(len(counts))
    ]
    objects: list[dict[str, Any]] = []
    for number, count in enumerate(counts, 1):
        for i in range(count):
            points = rng.uniform(5, 30, 2) + layout * rng.uniform(40, 60) + rng.normal(0, 1, (17, 2)) * noise
            image = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            objects.append({"category_id": number, "image": image, "points": points})
            if number == 1 and i == 0:
                objects.append({"category_id": number, "image": None, "points": layout * 20 + 70})
    return write(folder, kinds, objects)


def drawn(plan: list[tuple[Category, Any]]) -> list[tuple[str, list[int], list[int]]]:
    numbers = {id(s): i for category, _ in plan for i, s in enumerate(category.samples)}
    return [(c.name, [numbers[id(s)] for s in e.support], [q.index for q in e.queries]) for c, e in plan]


def test_mp100_draws_the_pairs_of_the_published_code(tmp_path: Path) -> None:
    categories = load_published("mp100", *mp100_folder(tmp_path), named=True)
    assert [(c.name, len(c.samples)) for c in categories] == [("kind1", 8), ("kind2", 8)]
    plan = mp100_episodes(categories, shots=2, episodes=3, queries=4, seed=1)
    state = random.getstate()
    random.seed(1)  # the protocol: one stream over all classes, samples without replacement
    expected = []
    for name in ("kind1", "kind2"):
        for _ in range(3):
            objects = random.sample(range(8), 6)
            expected.append((name, objects[:2], objects[2:]))
    random.setstate(state)
    assert drawn(plan) == expected
    assert len({tuple(e.order) for _, e in plan if len(e.order) == len(categories[0].schema)}) > 1
    again = mp100_episodes(categories, shots=2, episodes=3, queries=4, seed=1)
    assert [e.order.tolist() for _, e in again] == [e.order.tolist() for _, e in plan]
    with pytest.raises(DataError, match=r"'kind1' has 8 objects; an episode of MP-100 takes 1 supports and 15 queries"):
        mp100_episodes(categories, shots=1, episodes=1, queries=15, seed=1)


def test_what_counts_and_where_it_lies_is_as_published(tmp_path: Path) -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    points = np.array([[20.0, 20.0], [60.0, 50.0]])
    kinds = [{"id": 1, "name": "a", "keypoints": ["tip", "tip"]}, {"id": 2, "name": "a"}, {"id": 3, "name": "none"}]
    usable = {"category_id": 1, "image": image, "points": points}
    left_out = [
        {"iscrowd": 1},
        {"num_keypoints": 0},
        {"keypoints": [0] * 6},
        {"bbox": [95.5, 0, 10, 10]},
        {"bbox": [0, 0, 0, 9]},
        {"area": 0},
    ]
    objects = [
        {**usable, "bbox": [-10, 5, 60, 200]},
        *({**usable, **odd} for odd in left_out),
        {**usable, "category_id": 2},
    ]
    file, images = write(tmp_path, kinds, [dict(o) for o in objects])
    found = load_published("mp100", file, images, named=False)
    assert [c.name for c in found] == ["a (1)", "a (2)"] and [len(c.samples) for c in found] == [1, 1]
    first = found[0].samples[0]
    assert first.keypoints.box == pytest.approx([0, 5, 59, 90])  # cut at 0, made a pixel smaller, cut at the last pixel
    assert first.keypoints.names == ("tip", "tip 2") and found[1].schema.names == ("point 1", "point 2")
    with pytest.raises(DataError, match=r"category 'a' has 0 names for 2 points. Use --prompt visual"):
        load_published("mp100", file, images, named=True)
    data = json.loads(file.read_text())
    data["categories"] = [{"id": i, "name": "cat", "keypoints": AP10K_NAMES} for i in (1, 2)]
    data["annotations"] = [data["annotations"][0] | {"keypoints": [9, 9, 1] * 17}]
    file.write_text(json.dumps(data))
    box = load_published("ap10k", file, images, named=True)[0].samples[0].keypoints.box
    assert box == pytest.approx([0, 5, 60, 90])  # AP-10K's code does not take the pixel off


def test_mp100_report(tmp_path: Path) -> None:
    categories = load_published("mp100", *mp100_folder(tmp_path), named=True)
    report = evaluate(CopyPredictor(), categories, Options(protocol="mp100", episodes=2, queries=3))
    assert report["pairs"] == 12 and list(report["published"]) == [
        *("PCK@0.05", "PCK@0.1", "PCK@0.15", "PCK@0.2", "PCK@0.25"),
        *("mPCK", "AUC", "NME"),
    ]
    assert report["published"]["PCK@0.2"] == report["pck"]["0.2"] and report["published"]["mPCK"] == report["mpck"]
    assert report["departures"] == ["--episodes 2 instead of 200", "--queries 3 instead of 15"]
    said = remarks(report)
    assert said[0].startswith("mp100, 1-shot, prompt both: PCK@0.05 ") and "Not comparable" in said[1]
    assert "AP" not in table(report).splitlines()[0].split()
    assert json.loads(json.dumps(report)) == report


def test_ap10k_asks_every_object_once_with_supports_from_other_images(tmp_path: Path) -> None:
    categories = load_published("ap10k", *ap10k_folder(tmp_path), named=True)
    sizes = {"shots": 1, "episodes": 200, "queries": 15, "seed": 1}
    plan, left_out = ap10k_episodes(categories, **sizes)
    asked = [(category.name, q.index) for category, episode in plan for q in episode.queries]
    assert sorted(asked) == [("species1", i) for i in range(6)] + [("species2", i) for i in range(3)]
    for _, episode in plan:
        assert len(episode.support) == 1
        assert not {s.image_id for s in episode.support} & {q.sample.image_id for q in episode.queries}
    assert left_out == {"species3": "1 images are too few for 1 supports beside the queries"}
    text, none = ap10k_episodes(categories, **sizes, required=False)
    assert sum(len(e.queries) for _, e in text) == 10 and none == {}
    with pytest.raises(DataError, match="No species has enough images for 9 supports"):
        ap10k_episodes(categories, **sizes | {"shots": 9})


def test_ap10k_figures(tmp_path: Path) -> None:
    categories = load_published("ap10k", *ap10k_folder(tmp_path), named=True)
    exact = evaluate(CopyPredictor(), categories, Options(protocol="ap10k"))
    assert exact["published"] == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "PCK@0.1": 1.0}
    assert exact["departures"] == ["1 objects were left out"] and "species3" in exact["left_out"]
    assert table(exact).splitlines()[0].split()[-1] == "AP"
    assert [line.split()[-1] for line in table(exact).splitlines()[1:]] == ["1.000"] * 3
    loose = load_published("ap10k", *ap10k_folder(tmp_path / "b", (12, 8), noise=4.0), named=True)
    report = evaluate(CopyPredictor(), loose, Options(protocol="ap10k"))
    assert 0 < report["published"]["AP"] < report["published"]["AP50"] < 1 and report["departures"] == []
    each = [c["published"] for c in report["per_category"].values()]
    for key, value in report["published"].items():
        assert value == pytest.approx(np.mean([s[key] for s in each]))  # species weigh the same
    assert remarks(report)[0].startswith("ap10k, 1-shot, prompt both: AP 0.")


class OneOff(CopyPredictor):
    """Right but for one point, which is off by the root of a fiftieth of the object's area."""

    def __init__(self, name: str) -> None:
        self.name = name

    def predict(self, *args: Any, **more: Any) -> list[KeypointSet]:
        moved = []
        for found in super().predict(*args, **more):
            assert found.box is not None
            shift = (
                np.array([[np.sqrt(0.02 * found.box[2] * found.box[3]), 0.0]])
                * (np.array(found.names) == self.name)[:, None]
            )
            moved.append(KeypointSet(found.names, found.xy + shift, found.visibility, found.score, found.box))
        return moved


@pytest.mark.parametrize(
    ("name", "sigma", "expected"),
    [("L_Eye", 0.025, 0.9), ("L_Shoulder", 0.079, 1.0)],  # OKS (16 + e^-4) / 17 = 0.942, and (16 + e^-0.4) / 17 = 0.98
)
def test_ap10k_sigmas_follow_the_names_through_the_shuffled_order(
    name: str, sigma: float, expected: float, tmp_path: Path
) -> None:
    categories = load_published("ap10k", *ap10k_folder(tmp_path), named=True)[:2]
    assert metrics.AP10K_SIGMAS[AP10K_NAMES.index(name)] == sigma
    report = evaluate(OneOff(name), categories, Options(protocol="ap10k"))
    assert report["published"]["AP"] == pytest.approx(expected)


def test_what_keeps_a_run_from_being_comparable() -> None:
    told = {"boxes": "given", "rotate": False, "episodes": 200, "queries": 15, "seed": 1, "shots": 5}
    assert departures("mp100", told, 0) == []
    assert departures("mp100", told | {"shots": 0}, 0) == ["--shots 0 instead of 1 or 5"]  # by names alone: other pairs, and all points count
    assert departures("ap10k", told | {"boxes": "found", "rotate": True}, 2) == [
        "--boxes found",
        "--rotate",
        "2 objects were left out",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "has no list images"),
        (lambda d: d.update(annotations=None), "has no list annotations"),
        (lambda d: d["annotations"][3].update(keypoints=[1, 2]), r"annotation 3: it has 2 numbers; expected 3 × \d+"),
        (lambda d: d["annotations"][3].update(keypoints=["a", 2, 2]), "annotation 3: "),
        (lambda d: d["annotations"][3].update(bbox=[1, 2]), "annotation 3: ValueError"),
        (lambda d: d["annotations"][3].update(bbox=None), "annotation 3: TypeError"),
        (lambda d: d["annotations"][3].update(image_id=7), "annotation 3 names an image or a category"),
        (lambda d: d["annotations"][3].pop("category_id"), "not in the format of mp100: KeyError 'category_id'"),
        (lambda d: d["images"][3].pop("width"), "annotation 3: KeyError 'width'"),
        (
            lambda d: d["images"][3].update(file_name="../x.jpg"),
            "annotation 3: the file name '../x.jpg' leaves the folder",
        ),
        (lambda d: d["images"][3].update(file_name="gone.jpg"), r"1 of 16 images are not below .*, gone.jpg first"),
        (lambda d: d.update(categories=[7]), "not in the format of mp100"),
        (lambda d: d.update(annotations=[]), "no object with a box and a labelled point"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, change: Any, message: str) -> None:
    file, images = mp100_folder(tmp_path)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match=message):
        load_published("mp100", file, images, named=True)


def test_missing_files_and_other_sets_are_told(tmp_path: Path) -> None:
    file, images = mp100_folder(tmp_path)
    with pytest.raises(DataError, match=r"--images .* is no folder"):
        load_published("mp100", file, tmp_path / "no", named=True)
    with pytest.raises(DataError, match=r"--annotations .* does not exist"):
        load_published("mp100", tmp_path / "no.json", images, named=True)
    with pytest.raises(DataError, match=r"category 'kind1' has \d+ points.*In AP-10K all share the same 17"):
        load_published("ap10k", file, images, named=True)
    file.write_text("[1]")
    with pytest.raises(DataError, match="has no list images and no list annotations"):
        load_published("mp100", file, images, named=True)
    file.write_text("{")
    with pytest.raises(DataError, match="no readable JSON"):
        load_published("mp100", file, images, named=True)


@pytest.mark.parametrize("protocol", ["mp100", "ap10k"])
def test_the_command_with_a_real_model(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, images = mp100_folder(tmp_path, 6) if protocol == "mp100" else ap10k_folder(tmp_path, (4, 3))
    flags = ["evaluate", "--model", "tiny", "--protocol", protocol, "--annotations", str(file), "--images", str(images)]
    flags += ["--episodes", "1", "--queries", "4", "--out", str(tmp_path / "report.json")]
    assert main(flags) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["arguments"]["protocol"] == protocol and report["arguments"]["annotations"] == str(file)
    assert f"{protocol}, 1-shot, prompt both: " in capsys.readouterr().out
    assert all(0 <= v <= 1 for v in report["published"].values())
    assert main([*flags, "--prompt", "text", "--shots", "0"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["copy_pck"] is None
    assert main([*flags, "--task", "name"]) == 0
    assert 0 <= json.loads((tmp_path / "report.json").read_text())["naming_accuracy"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "There is nothing to evaluate on"),
        (["--data", "x", "--images", "y"], "belong to --protocol"),
        (["--protocol", "mp100", "--annotations", "x"], "takes --annotations FILE and --images DIR"),
        (["--protocol", "ap10k", "--annotations", "x", "--images", "y", "--data", "z"], "neither --data nor --support"),
    ],
)
def test_flags_that_do_not_fit_together(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", "tiny", *flags]) == 2
    assert message in capsys.readouterr().err
