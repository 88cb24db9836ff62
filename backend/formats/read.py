"""Which reader reads what."""

from __future__ import annotations

from pathlib import Path

from backend.formats.coco import read_coco
from backend.formats.dlc import read_dlc
from backend.formats.labels import LabelledSet
from backend.formats.sleap import read_sleap
from backend.formats.yolo import read_yolo
from kptllm_core.errors import DataError, InvalidInput

FORMATS = ("coco", "dlc", "sleap", "yolo")


def read_labels(kind: str, path: Path, names: list[str] | None = None) -> LabelledSet:
    """Read labels of one of FORMATS. names: of the keypoints, for formats whose files do not name them (yolo). Raises DataError."""
    if not path.exists():
        raise DataError(f"There is no {path}. Expected the labels in the format {kind}.")
    if names is not None and kind != "yolo":
        raise InvalidInput(f"--names is for yolo only; the files of {kind} name their keypoints. To map names use --rename OLD=NEW.")
    if kind == "yolo":
        found = read_yolo(path, names)
    else:
        found = {"coco": read_coco, "dlc": read_dlc, "sleap": read_sleap}[kind](path)
    if not found.images:
        raise DataError(f"{path} holds no labelled point. {' '.join(found.notes)}".strip())
    return found
