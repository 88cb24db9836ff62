"""Small label files as COCO, DeepLabCut, SLEAP and Ultralytics write them, with their images, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend_world import picture

NAMES = ("nose", "tail", "ear")


def images(folder: Path, *names: str, size: tuple[int, int] = (64, 48)) -> None:
    for level, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(level, size))


def coco(folder: Path, annotations: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """Two images with a dog each; the second one's ear is hidden and its tail not labelled."""
    images(folder / "images", "a.png", "b.png")
    usual = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 20], "keypoints": [10, 12, 2, 20.5, 24, 2, 30, 36, 2], "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [0, 0, 40, 40], "keypoints": [11, 13, 2, 0, 0, 0, 31, 37, 1], "iscrowd": 0},
    ]
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}, {"id": 2, "file_name": "b.png", "width": 64, "height": 48}],
        "annotations": usual if annotations is None else annotations,
        "categories": [{"id": 1, "name": "dog", "keypoints": list(NAMES), "skeleton": [[1, 2]]}],
    } | changes
    file = folder / "person_keypoints.json"
    file.write_text(json.dumps(data))
    return file


def dlc(folder: Path, cells: int = 3) -> Path:
    """A project with two videos of one animal, as the labelling tool saves them; `cells`: 1 as in older releases."""
    for video, rows in (("mouse1", ["10.0,12.0,20.0,24.0,,", ",,,,,"]), ("mouse2", ["1.5,2.5,3.5,4.5,5.5,6.5"])):
        lines = []
        blank = "," * (cells - 1)
        for head, values in (("scorer", ["me"] * 6), ("bodyparts", [n for n in NAMES for _ in "xy"]), ("coords", ["x", "y"] * 3)):
            lines.append(f"{head}{blank},{','.join(values)}")
        for number, row in enumerate(rows):
            parts = ["labeled-data", video, f"img{number:03}.png"]
            lines.append((",".join(parts) if cells == 3 else "\\".join(parts)) + "," + row)
            images(folder / "labeled-data" / video, f"img{number:03}.png")
        (folder / "labeled-data" / video / "CollectedData_me.csv").write_text("\n".join(lines) + "\n")
    return folder


def dlc_animals(folder: Path) -> Path:
    """Two animals, one of them without a tail on the image, and a point that no animal owns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        ["scorer", "", ""] + ["me"] * 10,
        ["individuals", "", ""] + ["a"] * 4 + ["b"] * 4 + ["single"] * 2,
        ["bodyparts", "", "", "nose", "nose", "tail", "tail"] + ["nose", "nose", "tail", "tail", "door", "door"],
        ["coords", "", ""] + ["x", "y"] * 5,
        ["labeled-data", "v", "img1.png", "1", "2", "3", "4", "5", "6", "", "", "7", "8"],
    ]
    file = folder / "CollectedData_me.csv"
    file.write_text("\n".join(",".join(row) for row in rows))
    return file


def sleap_csv(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "labels.v001.000_video.analysis.csv"
    file.write_text(
        "track,frame_idx,instance.score,nose.x,nose.y,nose.score,tail.x,tail.y,tail.score\n"
        "track_0,3,1.0,10.0,12.0,1.0,20.0,24.0,1.0\n"
        "track_0,17,1.0,11.0,13.0,1.0,,,\n"
        "track_1,20,1.0,,,,,,\n"
    )
    return file


def yolo(folder: Path, *, dimensions: int = 3, kpt_names: bool = True) -> Path:
    """Two splits; the first image has two dogs, the other one with a point that is not there."""
    images(folder / "images", "train/a.png", "val/b.png")
    points = "0.1 0.2 2 0.3 0.4 1 0.5 0.6 2" if dimensions == 3 else "0.1 0.2 0.3 0.4 0.5 0.6"
    fewer = "0.1 0.2 2 0 0 0 0.5 0.6 2" if dimensions == 3 else "0.1 0.2 0 0 0.5 0.6"
    for name, lines in (("train/a", [f"0 0.5 0.5 0.4 0.6 {points}", f"0 0.2 0.2 0.2 0.2 {points}"]), ("val/b", [f"0 0.5 0.5 0.4 0.6 {fewer}", ""])):
        (folder / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines))
    names = f"kpt_names:\n  0: [{', '.join(NAMES)}]\n" if kpt_names else ""
    file = folder / "data.yaml"
    file.write_text(f"path: /somewhere/else\ntrain: images/train\nval: images/val\nkpt_shape: [3, {dimensions}]\nnames:\n  0: dog\n{names}")
    return file
