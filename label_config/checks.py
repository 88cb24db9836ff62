"""Is a prediction what Label Studio will really show? The SDK's own validation, and what it lets through.

The SDK accepts negative and infinite positions, empty label lists, points without width (which the front end cannot draw),
parents that do not exist, ids that collide, a model_version of None (such predictions cannot be deleted again).
"""

from __future__ import annotations

import json
import math
from typing import Any

from kptllm_core.errors import InvalidInput
from label_config.markup import children_of, parse_xml, wire_of

BOXES = ("rectanglelabels", "rectangle")


def check_prediction(config: str, prediction: Any, sdk: bool = True) -> None:
    """InvalidInput with every finding if the prediction breaks a rule; None if it is good.

    config: the label config's XML. sdk: ask label_studio_sdk too, where it is installed.
    """
    problems = _problems(config, prediction)
    if sdk and not problems:
        problems = _sdk_problems(config, prediction)
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise InvalidInput(f"Label Studio would not show this prediction as meant: {'; '.join(problems[:10])}{more}")


def _sdk_problems(config: str, prediction: Any) -> list[str]:
    try:
        from label_studio_sdk.label_interface import LabelInterface
    except ImportError:
        return []
    try:
        return [str(e) for e in LabelInterface(config).validate_prediction(prediction, return_errors=True)]
    except Exception as error:  # noqa: BLE001 - the SDK raises many unrelated types for configs that it cannot read
        return [f"the SDK cannot read the label config: {error}"]


def _problems(config: str, prediction: Any) -> list[str]:
    if not isinstance(prediction, dict) or not isinstance(prediction.get("result"), list):
        return ["it is no object with a list 'result'"]
    problems = []
    if not (isinstance(prediction.get("model_version"), str) and prediction["model_version"]):
        problems.append(f"model_version is {prediction.get('model_version')!r}; expected a non-empty string")
    if not _within(prediction.get("score"), 0, 1):
        problems.append(f"score is {prediction.get('score')!r}; expected 0…1")
    try:
        json.dumps(prediction, allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f"it is not plain JSON: {error}")
    tags = _tags(config)
    seen: dict[str, tuple[str, dict[str, Any]]] = {}  # id → type and value of the region that took it
    regions = [(i, r) for i, r in enumerate(prediction["result"]) if isinstance(r, dict)]
    if len(regions) < len(prediction["result"]):
        problems.append("the result holds entries that are no objects")
    parents = {r["id"] for _, r in regions if isinstance(r.get("id"), str) and r.get("type") in BOXES}
    for i, region in regions:
        if region.get("type") != "relation":
            problems += [f"region {i}: {text}" for text in _region_problems(region, tags, seen, parents)]
    return problems


def _tags(config: str) -> dict[str, tuple[str, set[str], set[str]]]:
    """name → type, names of its objects, and its labels as the wire carries them."""
    root = parse_xml(config)
    found = {}
    for element in root.iter():
        if element.get("name") and element.get("toName"):
            children = [*children_of(element, "label"), *children_of(element, "choice")]
            labels = {wire_of(c) for c in children}
            objects = {part.strip() for part in element.get("toName", "").split(",")}
            found[element.get("name", "")] = (str(element.tag).lower(), objects, labels)
    return found


def _region_problems(region: dict[str, Any], tags: dict[str, tuple[str, set[str], set[str]]],
                     seen: dict[str, tuple[str, dict[str, Any]]], parents: set[str]) -> list[str]:  # fmt: skip
    value, kind, region_id = region.get("value"), region.get("type"), region.get("id")
    if not isinstance(value, dict):
        return ["no value"]
    if not (isinstance(region_id, str) and region_id):
        return ["no id; a per-region choice and a parentID need one"]
    problems = []
    known = tags.get(str(region.get("from_name")))
    if known is None:
        return [f"from_name '{region.get('from_name')}' is not in the config ({', '.join(tags)})"]
    if region.get("to_name") not in known[1]:
        problems.append(
            f"to_name '{region.get('to_name')}' is not what '{region['from_name']}' labels ({', '.join(known[1])})"
        )
    if kind != known[0]:
        problems.append(f"type '{kind}' does not fit the tag ({known[0]})")
    if region_id in seen:
        owner, place = seen[region_id]
        same = all(value.get(key) == place.get(key) for key in ("x", "y", "width"))
        if kind != "choices" or owner == "choices" or not same:
            problems.append(f"id '{region_id}' is taken by a region before it")
    else:
        seen[region_id] = (str(kind), value)
        if kind == "choices":
            problems.append(f"choice without the region that it belongs to: id '{region_id}'")
    parent = region.get("parentID")
    if parent is not None and (parent not in parents or parent == region_id):
        problems.append(f"parentID '{parent}' is no box of this prediction")
    if "score" in region and not _within(region["score"], 0, 1):
        problems.append(f"score is {region['score']!r}; expected 0…1")
    for key in ("original_width", "original_height"):
        if not (isinstance(region.get(key), int) and region[key] > 0):
            problems.append(f"{key} is {region.get(key)!r}; expected pixels")
    if region.get("image_rotation") != 0:
        problems.append("image_rotation must be 0")
    for key in ("x", "y", "width", *(("height",) if kind in BOXES else ())):
        if not _within(value.get(key), 0, 100):
            problems.append(f"{key} is {value.get(key)!r}; expected 0…100")
    if kind == "keypointlabels":
        if "height" in value:
            problems.append("a keypoint has no height (the front end would take it for a rectangle)")
        if value.get("width") == 0:
            problems.append("width is 0; the point would be invisible")
    if isinstance(kind, str) and (kind.endswith("labels") or kind == "choices"):
        labels = value.get(kind)
        if not (isinstance(labels, list) and labels and all(isinstance(n, str) for n in labels)):
            problems.append(f"{kind} is {labels!r}; expected at least one label")
        elif unknown := [n for n in labels if n not in known[2]]:
            problems.append(f"label '{unknown[0]}' is not in '{region['from_name']}': {', '.join(sorted(known[2]))}")
    return problems


def _within(value: Any, low: float, high: float) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )
