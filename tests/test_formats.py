"""Readers of other tools' labels: what their real files say, where the pixels are, and what is wrong with bad ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import label_files
from backend.formats.coco import coco_of
from backend.formats.labels import LabelledImage, LabelledPoint, LabelledSet, LabelledThing
from backend.formats.read import read_labels
from kptllm_core.errors import DataError, InvalidInput


def placed(image: LabelledImage, at: int = 0) -> dict[str, tuple[float, float, int]]:
    return {name: (p.x, p.y, p.visibility) for name, p in image.things[at].points.items()}


def by_name(labels: LabelledSet) -> dict[str, LabelledImage]:
    return {image.name: image for image in labels.images}


# ---------------------------------------------------------------- COCO


def test_coco(tmp_path: Path) -> None:
    labels = read_labels("coco", label_files.coco(tmp_path))
    first, second = labels.images
    assert (first.name, first.size, first.path) == ("a.png", (64, 48), tmp_path / "images" / "a.png")
    assert placed(first) == {"nose": (10, 12, 2), "tail": (20.5, 24, 2), "ear": (30, 36, 2)}
    assert first.things[0].box == (5, 5, 30, 20)
    assert first.things[0].category == "dog"
    assert placed(second) == {"nose": (11, 13, 2), "ear": (31, 37, 1)}
    assert labels.names() == {"dog": ["nose", "tail", "ear"]}


def test_what_is_written_as_coco_is_read_again(tmp_path: Path) -> None:
    one = LabelledThing({"tail": LabelledPoint(20.5, 24.25, 1), "nose": LabelledPoint(10, 12)}, (5, 5, 30, 20), "dog")
    other = LabelledThing({"nose": LabelledPoint(1, 2), "tail": LabelledPoint(4, 8)}, None, "dog")
    boxed = LabelledThing({}, (1, 2, 3, 4), "dog")
    image = LabelledImage("a.png", (one, other, boxed), size=(64, 48))
    data = coco_of({"dog": (["nose", "tail"], [(0, 1)])}, [image, LabelledImage("b.png", (), size=(9, 9))])
    assert [a["num_keypoints"] for a in data["annotations"]] == [2, 2, 0] and data["categories"][0]["skeleton"] == [[1, 2]]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(data))
    (found,) = read_labels("coco", file).images
    assert (found.name, found.size) == ("a.png", (64, 48))
    assert [thing.points for thing in found.things] == [one.points, other.points, {}]
    assert [thing.box for thing in found.things] == [(5, 5, 30, 20), (1, 2, 3, 6), (1, 2, 3, 4)]


def test_coco_leaves_crowds_aside_and_says_so(tmp_path: Path) -> None:
    good = {"id": 1, "image_id": 1, "category_id": 1, "keypoints": [1, 2, 2, 3, 4, 2, 5, 6, 3]}
    nothing = {"id": 3, "image_id": 2, "category_id": 1, "keypoints": [0] * 9, "bbox": [0, 0, 0, 0]}
    labels = read_labels("coco", label_files.coco(tmp_path, [good, good | {"id": 2, "iscrowd": 1}, nothing, good | {"id": 4, "image_id": 99}]))
    assert [len(image.things) for image in labels.images] == [1]
    assert set(placed(labels.images[0])) == {"nose", "tail"}  # 3: the object has no such point
    assert labels.images[0].things[0].box is None
    assert labels.notes[0].startswith("2 annotations are crowds")
    assert "99" in labels.notes[1]


def test_coco_objects_with_a_box_alone(tmp_path: Path) -> None:
    boxed = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 9]}
    labels = read_labels("coco", label_files.coco(tmp_path, [boxed, boxed | {"id": 2, "image_id": 2, "keypoints": [0] * 9}]))
    assert [image.things for image in labels.images] == [(LabelledThing({}, (1, 2, 9, 9), "dog"),)] * 2
    assert labels.names() == {"dog": []} and labels.notes == []


def test_coco_without_a_visible_point_says_how_it_was_read(tmp_path: Path) -> None:
    one = {"id": 1, "image_id": 1, "category_id": 1, "keypoints": [1, 2, 1, 3, 4, 1, 0, 0, 0]}
    assert "every point has v=1, which was read as hidden" in read_labels("coco", label_files.coco(tmp_path, [one])).notes[0]
    assert read_labels("coco", label_files.coco(tmp_path, [one, one | {"keypoints": [1, 2, 1, 3, 4, 2, 0, 0, 0]}])).notes == []


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "no JSON"), ("[]", "no lists 'images'"), ('{"images": [], "annotations": [], "categories": []}', "no category has 'keypoints'"),
     ('{"images": [{}], "annotations": [{"category_id": 1, "keypoints": [1, 2, 2], "image_id": 1}], "categories": [{"id": 1, "keypoints": ["a"]}]}',
      "KeyError 'id'"),
     ('{"images": [], "annotations": [{"id": 7, "category_id": 1, "keypoints": [1, 2]}], "categories": [{"id": 1, "keypoints": ["a"]}]}',
      "annotation 7 has 2 numbers under 'keypoints'; expected 3 × 1"),
     ('{"images": [], "annotations": [{"id": 7, "category_id": 1, "keypoints": [NaN, 2, 2]}], "categories": [{"id": 1, "keypoints": ["a"]}]}',
      "which is no place")],
)  # fmt: skip
def test_bad_coco(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        read_labels("coco", tmp_path)


def test_a_file_name_that_climbs_out_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    file = label_files.coco(tmp_path / "set", images=[{"id": 1, "file_name": "../secret.png"}, {"id": 2, "file_name": str(tmp_path / "secret.png")}])
    assert [image.path for image in read_labels("coco", file).images] == [None, None]


# ---------------------------------------------------------------- DeepLabCut


@pytest.mark.parametrize("cells", [1, 3])
def test_dlc(tmp_path: Path, cells: int) -> None:
    labels = read_labels("dlc", label_files.dlc(tmp_path, cells))
    found = by_name(labels)
    assert set(found) == {"labeled-data/mouse1/img000.png", "labeled-data/mouse2/img000.png"}
    first = found["labeled-data/mouse1/img000.png"]
    assert placed(first) == {"nose": (10.5, 12.5, 2), "tail": (20.5, 24.5, 2)}  # half a pixel: see backend/formats/labels.py
    assert first.path == tmp_path / "labeled-data" / "mouse1" / "img000.png"
    assert labels.notes == ["1 images in CollectedData_me.csv have no point"]


def test_dlc_with_several_scorers_says_whose_labels_are_taken(tmp_path: Path) -> None:
    file = label_files.dlc(tmp_path) / "labeled-data" / "mouse2" / "CollectedData_me.csv"
    file.with_name("CollectedData_you.csv").write_text(file.read_text().replace("1.5,2.5", "7.5,8.5").replace(",me", ",you"))
    labels = read_labels("dlc", tmp_path)
    assert placed(by_name(labels)["labeled-data/mouse2/img000.png"])["nose"] == (8.0, 9.0, 2)
    assert "1 images are labelled in several files, by several scorers: what CollectedData_you.csv says is taken" in labels.notes


def test_dlc_with_several_animals(tmp_path: Path) -> None:
    (image,) = read_labels("dlc", label_files.dlc_animals(tmp_path)).images
    assert [set(thing.points) for thing in image.things] == [{"nose", "tail"}, {"nose"}, {"door"}]


def test_dlc_points_that_no_animal_owns(tmp_path: Path) -> None:
    """They are the animal's where the project has one; an image on which one of two is alone does not say whose they are."""
    file = label_files.dlc_animals(tmp_path)
    rows = [row.split(",") for row in file.read_text().split("\n")]
    rows[-1][7:11] = [""] * 4
    file.write_text("\n".join(map(",".join, rows)))
    (image,) = read_labels("dlc", file).images
    assert [set(thing.points) for thing in image.things] == [{"nose", "tail"}, {"door"}]
    file.write_text("\n".join(",".join(row[:7] + row[11:]) for row in rows))
    (image,) = read_labels("dlc", file).images
    assert [set(thing.points) for thing in image.things] == [{"nose", "tail", "door"}]


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda t: t.replace("ear,ear", "ear"), "different numbers of cells"),
     (lambda t: t.replace("bodyparts", "parts"), "no CollectedData file"), (lambda t: t.replace("12.0", "twelve"), "'nose' of .* is 'twelve'"),
     (lambda t: t.replace("coords,,,x,y", "coords,,,x,likelihood"), "what DeepLabCut predicted"),
     (lambda t: t + "labeled-data,mouse1,img9.png,1,2\n", "row 6 has 5 cells; expected 9"), (lambda t: "", "no CollectedData file")],
)  # fmt: skip
def test_bad_dlc(tmp_path: Path, change: Any, words: str) -> None:
    file = label_files.dlc(tmp_path) / "labeled-data" / "mouse1" / "CollectedData_me.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(DataError, match=words):
        read_labels("dlc", file)


def test_a_dlc_folder_without_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CollectedData_<scorer>\.csv"):
        read_labels("dlc", tmp_path)


def test_dlc_h5_with_and_without_its_library(tmp_path: Path) -> None:
    file = tmp_path / "CollectedData_me.h5"
    if importlib.util.find_spec("tables") is None or importlib.util.find_spec("pandas") is None:
        file.write_bytes(b"")
        with pytest.raises(DataError, match=r"CollectedData_me\.csv beside it"):
            read_labels("dlc", file)
        return
    pandas = importlib.import_module("pandas")
    columns = pandas.MultiIndex.from_product([["me"], ["nose", "tail"], ["x", "y"]], names=["scorer", "bodyparts", "coords"])
    index = pandas.MultiIndex.from_tuples([("labeled-data", "v", "img1.png"), ("labeled-data", "v", "img2.png")])
    table = pandas.DataFrame([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, float("nan"), float("nan")]], index=index, columns=columns)
    table.to_hdf(file, key="df_with_missing", mode="w")
    first, second = read_labels("dlc", file).images
    assert placed(first) == {"nose": (1.5, 2.5, 2), "tail": (3.5, 4.5, 2)}
    assert (second.name, placed(second)) == ("labeled-data/v/img2.png", {"nose": (5.5, 6.5, 2)})
    file.write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_labels("dlc", file)


# ---------------------------------------------------------------- SLEAP


def test_sleap_csv(tmp_path: Path) -> None:
    labels = read_labels("sleap", label_files.sleap_csv(tmp_path))
    assert [image.frame for image in labels.images] == [3, 17]
    assert placed(labels.images[0]) == {"nose": (10.5, 12.5, 2), "tail": (20.5, 24.5, 2)}
    assert placed(labels.images[1]) == {"nose": (11.5, 13.5, 2)}
    assert "does not say which instances a person labelled" in labels.notes[0]


def test_a_sleap_csv_is_called_as_its_video_or_its_file(tmp_path: Path) -> None:
    file = label_files.sleap_csv(tmp_path)
    for name, video in ((file.name, "video.csv"), ("p.v002.001_fly_2.cut.analysis.csv", "fly_2.cut.csv"), ("bees.csv", "bees.csv")):
        assert {image.name for image in read_labels("sleap", file.rename(tmp_path / name)).images} == {video}
        file = tmp_path / name
    head, row, *_ = file.read_text().splitlines()
    file.write_text(f"video,{head}\nwasps.mp4,{row}\n")
    assert [image.name for image in read_labels("sleap", file).images] == ["wasps.mp4"]


def test_bad_sleap_csv(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    for content, words in (("a,b\n1,2\n", "Export Analysis CSV"), ("frame_idx,nose.x,nose.y\n1,x,2\n", "row 2"), ("", "frame_idx")):
        file.write_text(content)
        with pytest.raises(DataError, match=words):
            read_labels("sleap", file)
    with pytest.raises(DataError, match="folder"):
        read_labels("sleap", tmp_path)


def test_slp_with_and_without_its_library(tmp_path: Path) -> None:
    file = tmp_path / "labels.slp"
    if importlib.util.find_spec("h5py") is None:
        file.write_bytes(b"")
        with pytest.raises(DataError, match="Export Analysis CSV"):
            read_labels("sleap", file)
        return
    write_slp(file)
    labels = read_labels("sleap", file)
    first, second = labels.images
    assert (first.name, first.frame, placed(first)) == ("video.mp4", 5, {"nose": (10.5, 12.5, 2)})
    assert (second.name, second.frame) == ("photos/b.png", None)
    assert placed(second) == {"nose": (30.5, 32.5, 2), "tail": (40.5, 42.5, 2)}
    assert labels.notes == ["1 instances were predicted by SLEAP, not labelled"]
    file.write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="cannot be read as a project"):
        read_labels("sleap", file)


def write_slp(file: Path) -> None:
    """The tables of a project as SLEAP 1.3 lays them out: two videos, one of them a list of images; two nodes in the order of the skeleton."""
    import numpy as np

    h5py = importlib.import_module("h5py")
    metadata = {"version": "2.0.0", "nodes": [{"name": "tail", "weight": 1.0}, {"name": "nose", "weight": 1.0}],
                "skeletons": [{"name": "s", "nodes": [{"id": 1}, {"id": 0}], "links": []}], "videos": [], "tracks": []}  # fmt: skip
    videos = [{"backend": {"filename": "C:\\data\\video.mp4"}}, {"backend": {"filename": ".", "filenames": ["/photos/a.png", "/photos/b.png"]}}]
    points = np.zeros(6, [("x", "<f8"), ("y", "<f8"), ("visible", "?"), ("complete", "?")])
    points["x"], points["y"] = [10, 20, 0, 0, 30, 40], [12, 22, 0, 0, 32, 42]
    points["visible"] = [True, False, True, True, True, True]
    instances = np.zeros(3, [("instance_id", "<i8"), ("instance_type", "u1"), ("frame_id", "<u8"), ("skeleton", "<u4"), ("track", "<i4"),
                             ("from_predicted", "<i8"), ("score", "<f4"), ("point_id_start", "<u8"), ("point_id_end", "<u8")])  # fmt: skip
    instances["instance_type"] = [0, 1, 0]
    instances["point_id_start"], instances["point_id_end"] = [0, 0, 4], [2, 2, 6]
    frames = np.zeros(2, [("frame_id", "<u8"), ("video", "<u4"), ("frame_idx", "<u8"), ("instance_id_start", "<u8"), ("instance_id_end", "<u8")])
    frames["video"], frames["frame_idx"] = [0, 1], [5, 1]
    frames["instance_id_start"], frames["instance_id_end"] = [0, 2], [2, 3]
    with h5py.File(file, "w") as data:
        group = data.create_group("metadata")
        group.attrs["json"], group.attrs["format_id"] = np.bytes_(json.dumps(metadata)), 1.2
        data["videos_json"] = [np.bytes_(json.dumps(v)) for v in videos]
        data["frames"], data["instances"], data["points"] = frames, instances, points


# ---------------------------------------------------------------- YOLO


@pytest.mark.parametrize("dimensions", [2, 3])
def test_yolo(tmp_path: Path, dimensions: int) -> None:
    labels = read_labels("yolo", label_files.yolo(tmp_path, dimensions=dimensions).parent)
    found = by_name(labels)
    assert set(found) == {"images/train/a.png", "images/val/b.png"}
    first = found["images/train/a.png"]
    assert first.relative
    assert [round(v, 6) for v in first.things[0].box or ()] == [0.3, 0.2, 0.4, 0.6]
    assert placed(first) == {"nose": (0.1, 0.2, 2), "tail": (0.3, 0.4, 1 if dimensions == 3 else 2), "ear": (0.5, 0.6, 2)}
    assert set(placed(found["images/val/b.png"])) == {"nose", "ear"}
    assert labels.names() == {"dog": ["nose", "tail", "ear"]}


def test_yolo_objects_with_a_box_alone(tmp_path: Path) -> None:
    file = label_files.yolo(tmp_path)
    (tmp_path / "labels" / "val" / "b.txt").write_text("0 0.5 0.5 0.4 0.6 0 0 0 0 0 0 0 0 0\n0 0 0 0 0 0 0 0 0 0 0 0 0 0")
    labels = read_labels("yolo", file)
    (thing,) = by_name(labels)["images/val/b.png"].things
    assert thing.points == {} and thing.box == pytest.approx((0.3, 0.2, 0.4, 0.6)) and labels.notes == []


def test_yolo_folders_that_lie_beside_data_yaml_and_not_above(tmp_path: Path) -> None:
    """As exports write them, and Ultralytics reads them."""
    file = label_files.yolo(tmp_path / "set")
    for part in ("images", "labels"):
        (tmp_path / "set" / part).rename(tmp_path / "set" / f"old-{part}")
        (tmp_path / "set" / "train").mkdir(exist_ok=True)
        (tmp_path / "set" / f"old-{part}" / "train").rename(tmp_path / "set" / "train" / part)
    file.write_text(file.read_text().replace("train: images/train", "train: ../train/images").replace("val: images/val\n", ""))
    assert [image.name for image in read_labels("yolo", file).images] == ["train/images/a.png"]


def test_yolo_whose_points_have_no_names(tmp_path: Path) -> None:
    file = label_files.yolo(tmp_path, kpt_names=False)
    with pytest.raises(DataError, match="does not say what its 3 keypoints are called"):
        read_labels("yolo", file)
    assert read_labels("yolo", file, ["x", "y", "z"]).names() == {"dog": ["x", "y", "z"]}
    with pytest.raises(DataError, match="2 names"):
        read_labels("yolo", file, ["x", "y"])


def test_yolo_labels_without_their_images(tmp_path: Path) -> None:
    file = label_files.yolo(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "val").mkdir()
    labels = read_labels("yolo", file)
    assert {image.name for image in labels.images} == {"labels/train/a", "labels/val/b"}
    assert all(image.path is None for image in labels.images)


@pytest.mark.parametrize(
    ("line", "words"),
    [("0 0.5 0.5 0.4 0.6", "box only"), ("0 0.5 0.5 0.4 0.6 1 2", "has 7 numbers; expected 5"), ("3 0.5 0.5 0.4 0.6", "is of class 3"),
     ("zero 0.5", "something else than numbers"), ("0 0.5 0.5 0.4 0.6 100 200 2 0 0 0 0 0 0", "expected fractions of the image"),
     ("0 0.5 0.5 0.4 nan 0 0 0 0 0 0 0 0 0", "numbers that are none")],
)  # fmt: skip
def test_bad_yolo_labels(tmp_path: Path, line: str, words: str) -> None:
    file = label_files.yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_text(line)
    with pytest.raises(DataError, match=words):
        read_labels("yolo", file)


@pytest.mark.parametrize(
    ("content", "words"),
    [("names: [dog]", "no YOLO \\*pose\\* data set"), ("kpt_shape: 3\nnames: [dog]", "kpt_shape is 3"), ("kpt_shape: [3, 3]", "'names' must say"),
     ("a: [", "no YAML"), ("!!python/object/apply:os.system ['true']", "no YAML")],
)  # fmt: skip
def test_bad_data_yaml(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=words):
        read_labels("yolo", tmp_path)


def test_bytes_that_are_no_text_and_numbers_that_are_none(tmp_path: Path) -> None:
    root = label_files.yolo(tmp_path / "yolo")
    label = next((root if root.is_dir() else root.parent).rglob("*.txt"))
    for content, words in ((b"0 \xa2", "cannot be read as text"), (b"inf" + b" 0.5" * 13, "numbers that are none")):
        label.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_labels("yolo", root)
    file = label_files.sleap_csv(tmp_path / "sleap")
    lines = file.read_text().splitlines()
    at = lines[0].split(",").index("frame_idx")
    cells = lines[1].split(",")
    file.write_text("\n".join([lines[0], ",".join([*cells[:at], "1e400", *cells[at + 1 :]])]))
    with pytest.raises(DataError, match="row 2"):
        read_labels("sleap", file)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no"):
        read_labels("coco", tmp_path / "nothing.json")
    with pytest.raises(InvalidInput, match="--rename"):
        read_labels("coco", label_files.coco(tmp_path), ["a"])
    with pytest.raises(DataError, match="holds no labelled point"):
        read_labels("coco", label_files.coco(tmp_path, []))


def test_label_studios_yolo_export(tmp_path: Path) -> None:
    """It has no data.yaml, and its notes name the points in another order than the lines have them."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.4 0.2 0.1 0.2 2 0.0 0.0 0\n0 0.2 0.2 0.1 0.1 0.15 0.2 2 0.25 0.2 2")
    (tmp_path / "classes.txt").write_text("dog\n")
    notes = tmp_path / "notes.json"
    notes.write_text(json.dumps({"categories": [{"id": 0, "name": "dog", "keypoints": ["tail", "nose"]}], "info": {}}))
    (image,) = read_labels("yolo", tmp_path, ["nose", "tail"]).images
    assert image.relative and [set(thing.points) for thing in image.things] == [{"nose"}, {"nose", "tail"}]
    assert placed(image, 1) == {"nose": (0.15, 0.2, 2), "tail": (0.25, 0.2, 2)} and image.things[0].category == "dog"
    with pytest.raises(DataError, match=r"in which order .* --names config"):
        read_labels("yolo", tmp_path)
    notes.write_text(json.dumps({"categories": [{"id": 0, "name": "dog"}]}))
    with pytest.raises(DataError, match="names no keypoints"):
        read_labels("yolo", tmp_path, ["nose", "tail"])
    notes.write_text("[]")
    with pytest.raises(DataError, match="does not name classes"):
        read_labels("yolo", tmp_path, ["nose", "tail"])
