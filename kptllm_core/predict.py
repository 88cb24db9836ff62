"""A folder of images in, a COCO keypoints results file out: the `predict` command. One object per image.

An image that cannot be read gets an entry without keypoints and a line on stderr; the others are predicted anyway.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from kptllm_core.dataset import Sample, load_coco
from kptllm_core.draw import draw_keypoints
from kptllm_core.errors import DataError, ImageError, InvalidInput, KptError, TooLarge
from kptllm_core.imaging import read_image
from kptllm_core.keypoints import KeypointSchema, KeypointSet, symmetric_pairs
from kptllm_core.messages import MAX_SUPPORT
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.report import check_writable, write_json

PROMPTS = ("auto", "visual", "text", "both")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
BATCH = 8


@dataclass(frozen=True)
class Source:
    """One image to predict, with the id that its results carry."""

    image_id: int | str
    path: Path
    name: str  # as results and errors call it


def list_images(folder: Path) -> list[Source]:
    """The images of a folder, or of a COCO folder (then with its ids). DataError if it is missing or has none."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is {'a file' if folder.exists() else 'missing'}. Expected a folder of images after --images."
        )
    annotations = folder / "annotations.json"
    if annotations.is_file():
        try:
            images = json.loads(annotations.read_text(encoding="utf-8"))["images"]
            found = [Source(_id(i), folder / "images" / str(i["file_name"]), str(i["file_name"])) for i in images]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{annotations} is no COCO file: {error!r}. Expected a list 'images' with id (a number or a text) and file_name."
            ) from None
    else:
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
        found = [Source(i, path, path.name) for i, path in enumerate(files, 1)]
    if not found:
        raise DataError(f"{folder} has no images. Expected files that end in {', '.join(sorted(SUFFIXES))}.")
    return found


def _id(image: dict[str, Any]) -> int | str:
    """As the file has it, so that results fit its annotations: COCO's ids are numbers, other programs write texts."""
    if isinstance(image["id"], bool) or not isinstance(image["id"], int | str):
        raise TypeError(f"id {image['id']!r}")
    return image["id"]


def choose_support(folder: Path, shots: int, category: str | None) -> list[Sample]:
    """The objects with the most labelled points, from different images where possible. DataError, InvalidInput."""
    if not 1 <= shots <= MAX_SUPPORT:
        raise InvalidInput(f"--shots {shots} is not possible. Expected 1 to {MAX_SUPPORT}.")
    samples = [s for s in load_coco(folder).samples if s.keypoints.placed.any()]
    known = list(dict.fromkeys(s.category for s in samples))
    if not known:
        raise DataError(f"The support folder {folder} has no object with a labelled keypoint.")
    if category is None and len(known) > 1:
        raise InvalidInput(
            f"The support folder {folder} has several categories: {', '.join(known)}. Choose one with --category."
        )
    if category is not None and category not in known:
        raise InvalidInput(f"Category '{category}' is not in {folder}. Known: {', '.join(known)}.")
    usable = [s for s in samples if s.category == (category or known[0])]
    usable.sort(key=lambda s: -int(s.keypoints.placed.sum()))
    best = {s.image_path: s for s in reversed(usable)}  # of each image
    usable.sort(key=lambda s: best[s.image_path] is not s)
    return usable[:shots]


def predict_images(
    predictor: Predictor,
    sources: Sequence[Source],
    schema: KeypointSchema,
    support: Sequence[Example],
    prompt: str,
    asked: list[str] | None,
    category_id: int = 1,
    draw: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One COCO keypoints result for each image, in order."""
    with tqdm(sources, unit=" image", disable=None) as bar:
        for start in range(0, len(sources), BATCH):
            batch = [_open(source) for source in sources[start : start + BATCH]]
            images = [image for image in batch if not isinstance(image, KptError)]
            predicted = iter(
                predictor.predict(images, schema, support=support, prompt=prompt, asked=asked) if images else []
            )
            for source, image in zip(sources[start : start + BATCH], batch, strict=True):
                points = None if isinstance(image, KptError) else next(predicted)
                entry = _result(source, points, category_id)
                if isinstance(image, KptError):
                    entry["error"] = image.message
                elif draw is not None:
                    _draw(draw, source, image, points, schema)
                yield entry
            bar.update(len(batch))


def _open(source: Source) -> np.ndarray | KptError:
    """The image, or the reason why there is none, which is also told at once."""
    try:
        return read_image(source.path)
    except (ImageError, TooLarge) as error:
        tqdm.write(f"skipped {source.name}: {error.message}", file=sys.stderr)
        return error


def _result(source: Source, points: KeypointSet | None, category_id: int) -> dict[str, Any]:
    """COCO's form: keypoints [x, y, v, …] in pixels, v as in annotations (1 hidden, 2 visible, 3 = absent, ours)."""
    entry: dict[str, Any] = {"image_id": source.image_id, "file_name": source.name, "category_id": category_id}
    if points is None:
        return entry | {"keypoints": [], "score": 0.0, "keypoint_scores": [], "bbox": []}
    rows = np.column_stack([points.xy.astype(np.float64).round(2), points.visibility])
    box = points.object_box()
    return entry | {
        "keypoints": [float(v) if i % 3 < 2 else int(v) for i, v in enumerate(rows.ravel())],
        "score": round(points.object_score, 4),
        "keypoint_scores": [round(float(s), 4) for s in points.score],
        "bbox": [] if box is None else [round(float(v), 2) for v in box],
    }


def _draw(folder: Path, source: Source, image: np.ndarray, points: KeypointSet | None, schema: KeypointSchema) -> None:
    target = folder / (source.name.replace("/", "_") + ".png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_keypoints(image, points, schema)).save(target)
    except OSError as error:
        raise DataError(f"Cannot write {target}: {error.strerror}. Choose another --draw.") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m kptllm_core predict`."""
    add = parser.add_argument
    add("--model", default="nano", help="preset (nano, tiny) or checkpoint folder (default: %(default)s)")
    add("--adapter", type=Path, metavar="DIR", help="LoRA adapter folder made for this model")
    add(
        "--images", type=Path, metavar="DIR", required=True, help="folder of images, or COCO folder, whose ids are kept"
    )
    add(
        "--support",
        type=Path,
        metavar="DIR",
        help="folder of labelled examples: annotations.json (COCO keypoints) and images/",
    )
    add(
        "--shots",
        type=int,
        default=5,
        metavar="N",
        help=f"how many of the examples to use, 1 to {MAX_SUPPORT} (default: %(default)s)",
    )
    add("--category", metavar="NAME", help="which category of the support folder, if it has several")
    add(
        "--names",
        metavar="A,B,C",
        help="keypoints to find: all that there are without --support; with it, a choice of the folder's",
    )
    add(
        "--prompt",
        choices=PROMPTS,
        default="auto",
        help="what the model is shown; auto: both with --support, else text (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--draw", type=Path, metavar="DIR", help="also write a picture for each image")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("predictions.json"),
        help="COCO keypoints results (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Predict as the flags say. Raises KptError; also if no image at all could be read."""
    names = [n.strip() for n in args.names.split(",") if n.strip()] if args.names is not None else None
    if names is not None and not names:
        raise InvalidInput("--names is empty. Expected names separated by commas.")
    if args.support is None and not names:
        raise InvalidInput(
            "Nothing says which points to find. Give --names a,b,c, or --support with a folder of labelled examples."
        )
    if args.support is None and args.prompt in ("visual", "both"):
        raise InvalidInput(f"--prompt {args.prompt} needs examples. Give --support DIR, or use --prompt text.")
    sources = list_images(args.images)
    check_writable(args.out)
    chosen = choose_support(args.support, args.shots, args.category) if args.support else []
    if chosen:
        schema = chosen[0].schema
        for name in names or []:
            schema.index(name)
    else:
        schema = KeypointSchema(tuple(names or ()), args.category or "object", (), symmetric_pairs(names or []))
    predictor = load_predictor(args.model, adapter=args.adapter, device=args.device)
    support = [Example(s.read(), s.keypoints) for s in chosen] if args.prompt != "text" else []
    results: list[dict[str, Any]] = []
    try:
        for entry in predict_images(
            predictor, sources, schema, support, args.prompt, names if chosen else None, draw=args.draw
        ):
            results.append(entry)
    finally:  # whatever ended it, hours of work are not lost
        if results:
            write_json(args.out, results)
    unread = [r for r in results if "error" in r]
    done = f"{len(results) - len(unread)} of {len(results)} images predicted by {predictor.base}"
    print(f"{done}; results in {args.out}.")  # noqa: T201 - the command's answer
    if len(unread) == len(results):
        raise DataError(f"None of the {len(results)} images could be read. First: {unread[0]['error']}")
    return 0
