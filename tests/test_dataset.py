"""COCO folders: read, written, read again; and what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kptllm_core.dataset import load_coco, write_coco
from kptllm_core.errors import DataError, ImageError
from kptllm_core.keypoints import KeypointSchema, KeypointSet


def coco(keypoints: list[object], file_name: str = "x.png", skeleton: list[list[int]] | None = None) -> str:
    """A file with one point in one image."""
    image = {"id": 1, "file_name": file_name, "width": 10, "height": 10}
    annotation = {"id": 5, "image_id": 1, "category_id": 1, "keypoints": keypoints}
    category = {"id": 1, "name": "thing", "keypoints": ["a"], "skeleton": skeleton or []}
    return json.dumps({"images": [image], "annotations": [annotation], "categories": [category]})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    schema = KeypointSchema(("a", "b", "c"), "thing", ((0, 2),), ((1, 2),))
    points = KeypointSet(schema.names, np.array([[1.5, 2], [3, 4], [0, 0]]), np.array([2, 1, 3]), box=np.array([1, 2, 30, 40]))
    write_coco(tmp_path, schema, [("x.jpg", 100, 80, points, "video 7")])
    [sample] = load_coco(tmp_path).samples
    assert sample.schema == schema
    assert sample.group == "video 7"
    assert sample.keypoints.to_json() == points.to_json()
    assert (sample.width, sample.height) == (100, 80)


def test_an_object_without_a_box_is_read_again_without_one(tmp_path: Path) -> None:
    """Else its bare hull would be taken for a box that a person drew."""
    schema = KeypointSchema(("a", "b"))
    points = KeypointSet(schema.names, np.array([[10.0, 10.0], [110.0, 60.0]]), np.array([2, 2]))
    write_coco(tmp_path, schema, [("x.jpg", 200, 80, points, "g")])
    [sample] = load_coco(tmp_path).samples
    assert sample.keypoints.box is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no readable JSON"),
        ("[]", "not COCO keypoints"),
        ('{"images": [], "annotations": [], "categories": []}', "no category has 'keypoints'"),
        (json.dumps({"images": [], "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "keypoints": [1, 2, 2]}],
                     "categories": [{"id": 1, "keypoints": ["a"]}]}), "annotation 5 names an unknown image"),
        (json.dumps({"images": [{"id": 1, "file_name": "x"}], "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "keypoints": [1, 2]}],
                     "categories": [{"id": 1, "keypoints": ["a"]}]}), "has 2 numbers; expected 3 × 1"),
        (coco([1, 2, "x"]), "annotation 5: "),
        (coco([1e9, 2, 2]), "annotation 5 has a point far outside its image of 10 × 10"),
        (coco([1, 2, 2], file_name="../../secret.png"), "leaves the folder"),
        (coco([1, 2, 2], skeleton=[[1, 99]]), "category thing: "),
    ],
)  # fmt: skip
def test_bad_files_are_explained(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(DataError, match=says):
        load_coco(tmp_path)


def test_a_missing_file_says_what_a_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no annotations\.json"):
        load_coco(tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"x")
    (tmp_path / "annotations.json").write_text(coco([1, 2, 2]))
    [sample] = load_coco(tmp_path).samples
    for use in (sample.read, sample.check):
        with pytest.raises(ImageError, match=r"^x\.png: Not an image"):
            use()
