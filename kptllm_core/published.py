"""The published protocols of two public data sets, for people who have them: MP-100 and AP-10K.

Neither comes with this product. Each is one COCO-like annotation file and a folder of images (with sub-folders in MP-100):

    mp100   many categories, each with its own points; episodes of supports and queries, PCK of the pairs (Xu et al., ECCV 2022)
    ap10k   many animals that share 17 points; every object is asked once, its box given; OKS-AP (Yu et al., NeurIPS 2021)

Which objects count, how their boxes are cut to the image and, for MP-100, in which order they are drawn is as in the
evaluation code that published figures come from, so that the same numbers of the generator give the same pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kptllm_core import metrics
from kptllm_core.dataset import Sample
from kptllm_core.errors import DataError, InvalidInput
from kptllm_core.keypoints import KeypointSchema, KeypointSet, symmetric_pairs
from kptllm_core.protocol import Category, Episode, Query, draw_query, stream
from kptllm_core.report import Pair

PUBLISHED = ("mp100", "ap10k")
MP100_RULES = {"episodes": 200, "queries": 15, "seed": 1}  # of each class; 1 or 5 shots
ORDER_SEED = 0  # of the keypoints' order

Plan = list[tuple[Category, Episode]]


@dataclass(frozen=True, eq=False)
class AnnotatedSample(Sample):
    """With what OKS takes as the object's size."""

    area: float
    """Pixels², the annotation's, else its box's."""


def load_published(protocol: str, annotations: Path, images: Path, named: bool) -> list[Category]:
    """The categories of an MP-100 or AP-10K file, in its order. DataError says what is wrong, and where.

    named: whether the points' names will be shown to the model; then each category must have them.
    """
    data = _read(annotations)
    if not images.is_dir():
        raise DataError(
            f"--images {images} is no folder. Expected the one that the file names in {annotations.name} start from."
        )
    try:
        categories = _categories(data, images, protocol, named)
    except DataError as error:
        raise DataError(f"{annotations}: {error.message}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotations} is not in the format of {protocol}: {type(error).__name__} {error}. "
                        "Expected COCO keypoints: images, annotations with bbox and keypoints, categories.") from None  # fmt: skip
    _check_images(categories, images)
    return categories


def _categories(data: dict[str, Any], folder: Path, protocol: str, named: bool) -> list[Category]:
    kinds = {c["id"]: c for c in data["categories"]}
    images = {i["id"]: i for i in data["images"]}
    by_image: dict[Any, list[dict[str, Any]]] = {i: [] for i in images}
    for annotation in data["annotations"]:
        if annotation["image_id"] not in images or annotation["category_id"] not in kinds:
            raise DataError(
                f"annotation {annotation.get('id')} names an image or a category that the file does not have."
            )
        by_image[annotation["image_id"]].append(annotation)
    found: dict[Any, list[AnnotatedSample]] = {i: [] for i in kinds}
    schemas: dict[Any, KeypointSchema] = {}
    for number, told in by_image.items():  # in the order of the images, as the published code goes
        for annotation in told:
            try:
                box = _usable_box(annotation, images[number], 1 if protocol == "mp100" else 0)
                if box is not None:
                    kind = annotation["category_id"]
                    if kind not in schemas:
                        schemas[kind] = _schema(kinds[kind], len(annotation["keypoints"]) // 3, named)
                    found[kind].append(_sample(annotation, images[number], folder, schemas[kind], box))
            except (KeyError, TypeError, ValueError, InvalidInput) as error:
                what = str(error) if isinstance(error, InvalidInput) else f"{type(error).__name__} {error}"
                raise DataError(f"annotation {annotation.get('id')}: {what}") from None
    categories = [_category(schemas[i], samples, i, schemas) for i, samples in found.items() if samples]
    if not categories:
        raise DataError("it has no object with a box and a labelled point.")
    if protocol == "ap10k":
        _check_ap10k(categories)
    return categories


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"--annotations {path} does not exist. Expected the annotation file of a split, as the data set ships it."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON: {error}.") from None
    missing = [
        k
        for k in ("images", "annotations", "categories")
        if not isinstance(data, dict) or not isinstance(data.get(k), list)
    ]
    if missing:
        raise DataError(
            f"{path} has no list {' and no list '.join(missing)}. Expected COCO keypoints: images, annotations, categories."
        )
    return data


def _usable_box(annotation: dict[str, Any], image: dict[str, Any], less: int) -> np.ndarray | None:
    """(4,) the box cut to the image, or None for what the published code leaves out: crowds, empty boxes, unlabelled objects.

    less: by how many pixels the published code of the data set makes width and height smaller before it cuts.
    """
    if (
        annotation.get("iscrowd")
        or "bbox" not in annotation
        or not annotation.get("keypoints")
        or max(annotation["keypoints"]) == 0
    ):
        return None
    if annotation.get("num_keypoints") == 0 or annotation.get("area", 1) <= 0:
        return None
    x, y, w, h = (float(v) for v in annotation["bbox"])
    x0, y0 = max(0.0, x), max(0.0, y)
    x1 = min(image["width"] - 1.0, x0 + max(0.0, w - less))
    y1 = min(image["height"] - 1.0, y0 + max(0.0, h - less))
    return np.array([x0, y0, x1 - x0, y1 - y0]) if x1 > x0 and y1 > y0 else None


def _schema(kind: dict[str, Any], count: int, named: bool) -> KeypointSchema:
    """The points of a category. Names that are given twice are numbered; where there are none, `point 1` … stand in."""
    names = [str(n).strip() for n in kind.get("keypoints") or []]
    if len(names) != count or not all(names):
        if named:
            raise DataError(
                f"category '{kind['name']}' has {len(names)} names for {count} points. Use --prompt visual, which needs none."
            )
        names = [f"point {i + 1}" for i in range(count)]
    unique = tuple(n if n not in names[:i] else f"{n} {names[: i + 1].count(n)}" for i, n in enumerate(names))
    return KeypointSchema(unique, str(kind["name"]), symmetric=symmetric_pairs(unique))


def _sample(
    annotation: dict[str, Any], image: dict[str, Any], folder: Path, schema: KeypointSchema, box: np.ndarray
) -> AnnotatedSample:
    points = np.asarray(annotation["keypoints"], np.float64)
    if points.size != 3 * len(schema):
        raise DataError(
            f"it has {points.size} numbers; expected 3 × {len(schema)} (x, y, v), as '{schema.category}' has elsewhere."
        )
    points = points.reshape(-1, 3)
    name = Path(str(image["file_name"]))
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"the file name {str(name)!r} leaves the folder of images.")
    keypoints = KeypointSet(schema.names, points[:, :2], np.minimum(points[:, 2], 2).astype(np.int8), box=box)
    return AnnotatedSample(image_path=folder / name, image_id=image["id"], width=int(image["width"]), height=int(image["height"]),
                           schema=schema, keypoints=keypoints, group=str(image["id"]),
                           area=float(annotation.get("area") or box[2] * box[3]))  # fmt: skip


def _category(
    schema: KeypointSchema, samples: list[AnnotatedSample], number: Any, schemas: dict[Any, KeypointSchema]
) -> Category:
    twice = sum(s.category == schema.category for s in schemas.values()) > 1
    return Category(f"{schema.category} ({number})" if twice else schema.category, schema, samples, samples)


def _check_ap10k(categories: Sequence[Category]) -> None:
    expected = len(metrics.AP10K_SIGMAS)
    for category in categories:
        if len(category.schema) != expected or category.schema.names != categories[0].schema.names:
            raise DataError(
                f"category '{category.name}' has {len(category.schema)} points ({', '.join(category.schema.names[:3])} …). "
                f"In AP-10K all share the same {expected}. For other sets of points use --data or --protocol mp100."
            )


def _check_images(categories: Sequence[Category], folder: Path) -> None:
    wanted = dict.fromkeys(s.image_path for c in categories for s in c.samples)
    missing = [p for p in wanted if not p.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(wanted)} images are not below {folder}, {missing[0].relative_to(folder)} first. The figures "
                        "of the protocol need all of them: complete the folder, or name another with --images.")  # fmt: skip


def mp100_episodes(
    categories: Sequence[Category], *, shots: int, episodes: int, queries: int, seed: int, rotate: bool = False
) -> Plan:
    """MP-100's test pairs: for each category `episodes` draws of shots + queries objects, one stream of numbers for all.

    Supports and queries of an episode are different objects, though perhaps of one image. Points come in a shuffled order.
    """
    draws = random.Random(seed)
    order = np.random.RandomState(ORDER_SEED)
    turns = np.random.default_rng(seed)
    plan: Plan = []
    for category in categories:
        count = len(category.samples)
        if count < shots + queries:
            raise DataError(f"Category '{category.name}' has {count} objects; an episode of MP-100 takes {shots} supports and {queries} queries "
                            "of each. Lower --queries (the figures are then not comparable), or use the split's whole file.")  # fmt: skip
        for _ in range(episodes):
            drawn = draws.sample(range(count), shots + queries)
            asked = [draw_query(category.samples[i], i, turns, rotate) for i in drawn[shots:]]
            support = tuple(category.samples[i] for i in drawn[:shots])
            plan.append((category, Episode(support, tuple(asked), order.permutation(len(category.schema)))))
    return plan


def ap10k_episodes(categories: Sequence[Category], *, shots: int, episodes: int, queries: int, seed: int, rotate: bool = False,
                   required: bool = True) -> tuple[Plan, dict[str, str]]:  # fmt: skip
    """Every object once, `queries` at a time, each time with `shots` new supports from other images of its species.

    At most `episodes` times `queries` objects of a species. required: False if the supports are not shown to the model.
    Returns the plan and the species that were left out because they have too few images, with the reason.
    """
    plan: Plan = []
    left_out: dict[str, str] = {}
    for category in categories:
        rng = stream(category.name, seed)
        samples = category.samples
        mixed = [int(i) for i in rng.permutation(len(samples))]
        size = min(queries, (len(samples) + 1) // 2) if shots else queries
        parts = [mixed[i : i + size] for i in range(0, len(mixed), size)][:episodes]
        drawn = []
        for part in parts:
            shown = {samples[i].image_id for i in part}
            others = [i for i in rng.permutation(len(samples)) if samples[i].image_id not in shown]
            support = tuple(samples[i] for i in others[:shots]) if len(others) >= shots else ()
            if required and len(support) < shots:
                break
            asked: list[Query] = [draw_query(samples[i], i, rng, rotate) for i in part]
            drawn.append((category, Episode(support, tuple(asked), rng.permutation(len(category.schema)))))
        if len(drawn) == len(parts):
            plan += drawn
        else:
            left_out[category.name] = (
                f"{len({s.image_id for s in samples})} images are too few for {shots} supports beside the queries"
            )
    if not plan:
        raise DataError(
            f"No species has enough images for {shots} supports beside its queries. Lower --shots, or ask by text."
        )
    return plan, left_out


def mp100_figures(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """The figures of MP-100's tables, as shares."""
    distances = [p.model.distance for p in pairs]
    table = {f"PCK@{t}": metrics.mean_pck(distances, t) for t in metrics.MPCK_THRESHOLDS}
    return {**table, "mPCK": metrics.mpck(distances), "AUC": metrics.auc(distances), "NME": metrics.nme(distances)}


def ap10k_figures(
    pairs: Sequence[Pair], names: Sequence[str]
) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
    """AP-10K's figures: means over species, and those of each. names: the 17 points in the file's order, as its sigmas are.

    An object's score, by which AP ranks, is the mean score of its points.
    """
    sigma = dict(zip(names, metrics.AP10K_SIGMAS, strict=True))
    images: dict[str, dict[Any, list[Pair]]] = {}
    for pair in pairs:
        assert pair.sample is not None
        images.setdefault(pair.category, {}).setdefault(pair.sample.image_id, []).append(pair)
    species = {}
    for name, by_image in images.items():
        graded = [_graded(group, sigma) for group in by_image.values()]
        distances = [p.model.distance for group in by_image.values() for p in group]
        species[name] = {"AP": metrics.mean_ap(graded), "AP50": metrics.average_precision(graded, 0.5),
                         "AP75": metrics.average_precision(graded, 0.75), "PCK@0.1": metrics.mean_pck(distances, 0.1)}  # fmt: skip
    keys = ("AP", "AP50", "AP75", "PCK@0.1")
    return {k: float(np.mean([s[k] for s in species.values() if s[k] is not None])) for k in keys}, species


def _graded(pairs: Sequence[Pair], sigma: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Of the objects of one species in one image: their scores (D,) and the OKS (D, D) of each prediction with each truth."""
    similarity = np.zeros((len(pairs), len(pairs)))
    for row, one in enumerate(pairs):
        for column, other in enumerate(pairs):
            assert one.predicted is not None and other.truth is not None and isinstance(other.sample, AnnotatedSample)
            xy = one.predicted.reorder(other.truth.names).xy
            sigmas = np.array([sigma[n] for n in other.truth.names])
            similarity[row, column] = metrics.oks(xy, other.truth.xy, other.truth.placed, other.sample.area, sigmas)
    return np.array([float(p.predicted.score.mean()) if p.predicted is not None else 0.0 for p in pairs]), similarity


def departures(protocol: str, told: dict[str, Any], unasked: int) -> list[str]:
    """In which ways a run is not the published protocol; empty if it is.

    told: the options that were used. unasked: pairs (MP-100) or objects (AP-10K) of the protocol that have no answer.
    """
    found = [f"--boxes {told['boxes']}"] if told["boxes"] != "given" else []
    found += ["--rotate"] if told["rotate"] else []
    if protocol == "mp100":
        found += [f"--{k} {told[k]} instead of {v}" for k, v in MP100_RULES.items() if told[k] != v]
        found += [f"--shots {told['shots']} instead of 1 or 5"] if told["shots"] not in (1, 5) else []
    if unasked:
        found.append(f"{unasked} {'pairs' if protocol == 'mp100' else 'objects'} were left out")
    return found
