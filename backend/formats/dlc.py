"""DeepLabCut: CollectedData_<scorer>.csv, or the .h5 beside it, as the labelling tool saves them in labeled-data/<video>/.

    scorer,,,me,me,…                three or four header rows (`individuals` in projects with several animals), then one row per
    bodyparts,,,snout,snout,…       image: its path in one or three cells, then x and y of every point, empty where there is none
    coords,,,x,y,…
    labeled-data,mouse1,img017.png,103.5,88.2,…
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from backend.formats.labels import HALF, LabelledImage, LabelledPoint, LabelledSet, LabelledThing
from kptllm_core.errors import DataError

SINGLE = "single"  # the individual that holds points which no animal owns
Column = tuple[str, str, str]  # individual ("" in projects with one animal), body part, x or y


def read_dlc(path: Path) -> LabelledSet:
    """path: a CollectedData file, .csv or .h5, or a folder below which they lie (a DeepLabCut project). Raises DataError.

    DeepLabCut draws and labels with the centre of the first pixel at (0, 0).
    """
    files = sorted(path.rglob("CollectedData_*.csv")) if path.is_dir() else [path]
    if not files:
        more = " There are .h5 files: name one of them." if list(path.rglob("CollectedData_*.h5")) else ""
        raise DataError(f"{path} holds no CollectedData_<scorer>.csv. Expected a DeepLabCut project, or such a file.{more}")
    images: dict[str, LabelledImage] = {}
    notes = []
    for file in files:
        rows = _rows_of_h5(file) if file.suffix.lower() in (".h5", ".hdf5", ".hdf") else _rows_of_csv(file)
        empty = again = 0
        for name, cells in rows:
            things = _things(file, name, cells)
            empty += not things
            again += bool(things) and name in images
            if things:
                beside = file.parent / Path(name).name
                images[name] = LabelledImage(name, things, beside if beside.is_file() else None)
        if empty:
            notes.append(f"{empty} images in {file.name} have no point")
        if again:
            notes.append(f"{again} images are labelled in several files, by several scorers: what {file.name} says is taken")
    return LabelledSet(list(images.values()), notes)


def _rows_of_csv(file: Path) -> list[tuple[str, list[tuple[Column, Any]]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            lines = [line for line in csv.reader(text) if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}.") from None
    heads = {line[0].strip(): line for line in lines[:4] if line[0].strip() in ("scorer", "individuals", "bodyparts", "coords")}
    if not {"bodyparts", "coords"} <= set(heads):
        raise DataError(f"{file} is no CollectedData file of DeepLabCut: its first rows must be scorer, bodyparts and coords.")
    coords = [cell.strip() for cell in heads["coords"]]
    first = next((at for at, cell in enumerate(coords) if cell in ("x", "y")), len(coords))
    if "likelihood" in coords:
        raise DataError(f"{file} holds what DeepLabCut predicted for a video (it has likelihoods). Expected what people labelled: "
                        "labeled-data/<video>/CollectedData_<scorer>.csv.")  # fmt: skip
    if any(len(line) < len(coords) for line in heads.values()):
        told = ", ".join(f"{head} {len(line)}" for head, line in heads.items())
        raise DataError(f"{file}: the rows at its head have different numbers of cells ({told}). Was it cut off, or edited by hand?")
    individuals = heads.get("individuals")
    columns: list[Column] = [
        (individuals[at].strip() if individuals else "", heads["bodyparts"][at].strip(), coords[at]) for at in range(first, len(coords))
    ]
    rows = []
    for number, line in enumerate(lines[len(heads) :], len(heads) + 1):
        if len(line) < first + len(columns):
            raise DataError(f"{file}: row {number} has {len(line)} cells; expected {first + len(columns)}.")
        rows.append((_image_name(line[:first]), list(zip(columns, line[first:], strict=False))))
    return rows


def _rows_of_h5(file: Path) -> list[tuple[str, list[tuple[Column, Any]]]]:
    try:
        pandas = importlib.import_module("pandas")
        importlib.import_module("tables")
    except ImportError as error:
        raise DataError(
            f"Reading {file.name} needs pandas and tables ({error.name} is not installed). DeepLabCut saves the same labels as "
            f"{file.with_suffix('.csv').name} beside it: name that file, or pip install pandas tables."
        ) from None
    try:
        frame = pandas.read_hdf(file)
    except Exception as error:  # noqa: BLE001 - pandas and tables raise many kinds for files that are none of theirs
        raise DataError(f"{file} cannot be read as a table of DeepLabCut: {str(error)[:200]}.") from None
    levels = list(frame.columns.names)
    if not {"bodyparts", "coords"} <= set(levels):
        raise DataError(f"{file} has the column levels {levels}; expected scorer, bodyparts and coords of DeepLabCut.")

    def level(column: Sequence[Any], name: str) -> str:
        return str(column[levels.index(name)]) if name in levels else ""

    columns: list[Column] = [(level(c, "individuals"), level(c, "bodyparts"), level(c, "coords")) for c in frame.columns]
    return [
        (_image_name(index if isinstance(index, tuple) else (index,)), list(zip(columns, row, strict=True)))
        for index, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)
    ]


def _image_name(cells: Iterable[Any]) -> str:
    return "/".join(part for cell in cells for part in str(cell).strip().replace("\\", "/").split("/") if part)


def _things(file: Path, name: str, cells: list[tuple[Column, Any]]) -> tuple[LabelledThing, ...]:
    places: dict[str, dict[str, dict[str, float]]] = {}
    for (individual, part, axis), cell in cells:
        value = _number(file, name, part, cell)
        if axis in ("x", "y") and value is not None:
            places.setdefault(individual, {}).setdefault(part, {})[axis] = value
    things = {
        individual: {part: LabelledPoint(at["x"] + HALF, at["y"] + HALF) for part, at in parts.items() if len(at) == 2}
        for individual, parts in places.items()
    }
    animals = {individual for (individual, _, _), _ in cells} - {SINGLE}  # of the whole file: on this image some may be missing
    alone = things.pop(SINGLE, {}) if len(animals) == 1 and animals & things.keys() else {}
    return tuple(LabelledThing({**points, **alone}) for points in things.values() if points)


def _number(file: Path, name: str, part: str, cell: Any) -> float | None:
    text = str(cell).strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{file}: '{part}' of {name} is {text[:40]!r}; expected a number of pixels, or nothing.") from None
    return value if math.isfinite(value) else None
