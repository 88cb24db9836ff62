"""The images of the demo: rendered ones, or a folder of the user's with COCO keypoints beside it.

Knows files and truth; knows nothing of Label Studio's server.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kptllm_core.dataset import Sample, load_coco
from kptllm_core.errors import DataError, KptError
from kptllm_core.imaging import image_size
from kptllm_core.keypoints import KeypointSchema, KeypointSet, symmetric_pairs
from label_config.schema import KeypointControl, parse
from label_config.writer import config_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # those of the core's formats that Label Studio takes as uploads


@dataclass(frozen=True)
class Picture:
    """One image of the demo. `truth` is in pixels, in the order of the schema, with its box; None where nobody labelled."""

    path: Path
    width: int
    height: int
    truth: KeypointSet | None = None
    group: str = ""


@dataclass(frozen=True)
class Material:
    """What a project is made from. `config` is the label config; `control` its first keypoint control."""

    title: str
    config: str
    pictures: tuple[Picture, ...]

    @property
    def control(self) -> KeypointControl:
        return parse(self.config).controls[0]

    @property
    def labelled(self) -> list[Picture]:
        return [picture for picture in self.pictures if picture.truth is not None]


def render(folder: Path, count: int, seed: int) -> None:
    """`count` images of an insect that no model has seen, with exact keypoints: images/ and annotations.json."""
    from kptllm_core.synthetic import write_dataset  # here, since a user's own images need no painter

    write_dataset(folder, "insect", count, seed)


def rendered(folder: Path, count: int, seed: int) -> Material:
    """The demo's own project. Images that an earlier run left in `folder` are written again."""
    render(folder, count, seed)
    return from_folder(folder / "images", folder / "annotations.json", None)


def from_folder(images: Path, labels: Path | None, config: Path | None, names: Sequence[str] = ()) -> Material:
    """The user's own images. Labels give truth and, without a config, the names of the points, unless these are given.

    Raises DataError or SchemaError with what was found and what is expected.
    """
    if not images.is_dir():
        raise DataError(f"IMAGES={images} is not a folder. Name a folder with {', '.join(SUFFIXES)} files.")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"IMAGES={images} holds no images. Expected files with {', '.join(SUFFIXES)}.")
    samples = _samples(labels, images) if labels else []
    if config:
        xml = config.read_text(encoding="utf-8")
    else:
        xml = config_of(samples[0].schema if samples else KeypointSchema(tuple(names), symmetric=symmetric_pairs(names)))
    schema = parse(xml).controls[0].schema
    truth = _truth(samples, schema)
    if labels and not any(path.name in truth for path in files):
        raise DataError(f"{labels} describes none of the images in {images} with points that the label config knows "
                        f"({', '.join(schema.names)}). Its file names must be those of the images, and an image must show one object.")  # fmt: skip
    pictures, unusable = list[Picture](), list[str]()
    for path in files:
        try:
            width, height = image_size(path.read_bytes())
        except KptError as error:  # one of many must not end the rest
            unusable.append(f"{path.name}: {error.message}")
            continue
        known = truth.get(path.name)
        points = known.keypoints.reorder(schema.names) if known else None
        pictures.append(Picture(path, width, height, points, known.group if known else path.name))
    if not pictures:
        raise DataError(f"None of the {len(files)} images in {images} can be used. {unusable[0]}")
    for reason in unusable:
        print(f"Left out {reason}", file=sys.stderr)
    return Material(f"Demo: {schema.category}", xml, tuple(pictures))


def choose(pictures: Sequence[Picture], count: int, seed: int = 0) -> list[Picture]:
    """`count` of the pictures from as many groups as possible (frames of one video are one group), in a fixed order."""
    rng = random.Random(seed)
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    queues = [rng.sample(members, len(members)) for members in groups.values()]
    rng.shuffle(queues)
    rounds = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    return rounds[:count]


def _samples(labels: Path, images: Path) -> list[Sample]:
    """The annotated objects of the kind that most annotations show, read as the core reads any COCO folder."""
    if not labels.is_file():
        raise DataError(f"LABELS={labels} is not a file. Expected COCO keypoints: annotations.json.")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(labels, Path(folder) / "annotations.json")
        Path(folder, "images").symlink_to(images.resolve())
        try:
            kinds = load_coco(folder).by_category()
        except KptError as error:
            theirs = error.message.replace(str(Path(folder, "annotations.json")), str(labels)).replace(str(Path(folder, "images")), str(images))
            raise DataError(f"LABELS={labels}: {theirs}") from None
    if not kinds:
        raise DataError(f"LABELS={labels} holds no annotation with keypoints.")
    return max(kinds.values(), key=len)


def _truth(samples: list[Sample], schema: KeypointSchema) -> dict[str, Sample]:
    """File name → its object, for images that show exactly one: the demo labels one object in each image, and says what it leaves out."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.image_path.name, []).append(sample)
    single = {name: found[0] for name, found in by_name.items() if len(found) == 1}
    if several := len(by_name) - len(single):
        which = "1 image with several objects comes" if several == 1 else f"{several} images with several objects come"
        print(f"{which} without labels: the demo's project holds one object an image. `python -m backend import` brings them into a project whose "
              "label config has a box.", file=sys.stderr)  # fmt: skip
    return {name: sample for name, sample in single.items() if sample.keypoints.reorder(schema.names).placed.any()}
