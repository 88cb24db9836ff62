"""SLEAP: the analysis CSV that it exports, or a project (.slp), which is HDF5.

CSV: `track,frame_idx,instance.score,nose.x,nose.y,nose.score,…`, one row per instance; empty where a node is not there.
.slp: `metadata` (its attribute json names the nodes), `videos_json`, and the tables `frames`, `instances`, `points`.

Both name frames of videos, not images: LabelledImage.frame. SLEAP puts the centre of the first pixel at (0, 0).
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

from backend.formats.labels import HALF, LabelledImage, LabelledPoint, LabelledSet, LabelledThing
from kptllm_core.errors import DataError

USER = 0  # instances.instance_type: made by a person; 1 is a prediction
CORNER_FORMAT = 1.1  # before it SLEAP put the corner of the first pixel at (0, 0)
EXPORT = "In SLEAP: File → Export Analysis CSV…, or on a command line: sleap-convert --format analysis.csv labels.slp"


def read_sleap(path: Path) -> LabelledSet:
    """path: an analysis CSV or a .slp file. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected an analysis CSV of SLEAP or a .slp file.")
    return _read_slp(path) if path.suffix.lower() == ".slp" else _read_csv(path)


def _read_csv(file: Path) -> LabelledSet:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            table = csv.DictReader(text)
            columns = [c for c in table.fieldnames or [] if c]
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}.") from None
    nodes = [c[:-2] for c in columns if c.endswith(".x") and c[:-2] + ".y" in columns]
    if "frame_idx" not in columns or not nodes:
        raise DataError(f"{file} is no analysis CSV of SLEAP: it needs frame_idx and, for each node, <node>.x and <node>.y. {EXPORT}")
    frames: dict[tuple[str, int], list[LabelledThing]] = {}
    for number, row in enumerate(rows, 2):
        try:
            frame = int(float(row["frame_idx"]))
            points = {}
            for node in nodes:
                x, y = _number(row[node + ".x"]), _number(row[node + ".y"])
                if x is not None and y is not None:
                    points[node] = LabelledPoint(x + HALF, y + HALF)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{file}: row {number} holds something else than numbers: {error}.") from None
        if points:
            frames.setdefault((str(row.get("video") or ""), frame), []).append(LabelledThing(points))
    own = _video_of(file)
    images = [LabelledImage(video or own, tuple(things), frame=frame) for (video, frame), things in frames.items()]
    return LabelledSet(images, ["an analysis CSV does not say which instances a person labelled: all of them are taken as labels"])


def _video_of(file: Path) -> str:
    """What stands for the video's name where the CSV tells none: the file's, or what SLEAP puts into that,
    <project>.<number>_<video>.analysis.csv."""
    found = re.fullmatch(r".+\.\d+_(.+)\.analysis(\.\w+)", file.name)
    return found[1] + found[2] if found else file.name


def _read_slp(file: Path) -> LabelledSet:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise DataError(
            f"{file.name} is HDF5, and h5py, which reads it, is not installed. Either pip install h5py, or import the CSV. {EXPORT}"
        ) from None
    try:
        with h5py.File(file, "r") as data:
            metadata = json.loads(data["metadata"].attrs["json"])
            version = float(data["metadata"].attrs.get("format_id", 1.0))
            videos = [json.loads(v) for v in data["videos_json"][()]]
            frames, instances, points = (data[name][()] for name in ("frames", "instances", "points"))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read as a project of SLEAP: {str(error)[:200]}. Or import the CSV. {EXPORT}") from None
    half = HALF if version >= CORNER_FORMAT else 0.0
    images, predicted = [], 0
    try:
        all_nodes = [str(node["name"]) for node in metadata["nodes"]]
        skeletons = [[all_nodes[node["id"]] for node in skeleton["nodes"]] for skeleton in metadata["skeletons"]]
        for frame in frames:
            things = []
            for instance in instances[int(frame["instance_id_start"]) : int(frame["instance_id_end"])]:
                if int(instance["instance_type"]) != USER:
                    predicted += 1
                    continue
                own = points[int(instance["point_id_start"]) : int(instance["point_id_end"])]
                placed = _placed(skeletons[int(instance["skeleton"])], own, half)
                if placed:
                    things.append(LabelledThing(placed))
            if things:
                images.append(_image(file, videos[int(frame["video"])], int(frame["frame_idx"]), tuple(things)))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file} is not a project of SLEAP as expected: {type(error).__name__} {error}. Or import the CSV. {EXPORT}") from None
    return LabelledSet(images, [f"{predicted} instances were predicted by SLEAP, not labelled"] if predicted else [])


def _placed(nodes: list[str], points: Any, half: float) -> dict[str, LabelledPoint]:
    """The points that SLEAP itself learns from: one that is marked as not visible keeps some position, which means nothing."""
    placed = {}
    for node, point in zip(nodes, points, strict=True):
        x, y = float(point["x"]), float(point["y"])
        if bool(point["visible"]) and math.isfinite(x) and math.isfinite(y):
            placed[node] = LabelledPoint(x + half, y + half)
    return placed


def _image(file: Path, video: dict[str, Any], frame: int, things: tuple[LabelledThing, ...]) -> LabelledImage:
    """A frame of a video, or of a list of images, which then has the image's name."""
    backend = video.get("backend") if isinstance(video.get("backend"), dict) else video
    names = (backend or {}).get("filenames")
    if isinstance(names, list) and 0 <= frame < len(names):
        name = str(names[frame]).replace("\\", "/")
        found = [p for p in (Path(name), file.parent / Path(name).name) if p.is_file()]
        return LabelledImage(re.sub(r"^([A-Za-z]:)?/+", "", name), things, found[0] if found else None)
    name = str((backend or {}).get("filename") or video.get("filename") or "").replace("\\", "/")
    return LabelledImage(name.rpartition("/")[2] if name != "." else "", things, frame=frame)


def _number(cell: Any) -> float | None:
    text = str(cell or "").strip()
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None
