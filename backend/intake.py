"""What a webhook or Label Studio's API says about tasks and annotations → rows of the journal. Pure functions.

Here it is decided which annotations count: those that a person made or confirmed. Not the cancelled ones, not drafts, not
those that Label Studio made from predictions by itself ("Create annotations from predictions").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np

from backend.split import group_alone
from backend.tables import Annotation, Task
from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSet, Visibility
from label_config.schema import KeypointControl, LabelConfig

MAX_ID = 2**63
PROJECT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
GROUP_KEYS = ("group", "video", "subject")  # a task's data may say which images belong together


def project_of(value: object) -> str:
    """`"12.1699000000"`, `12` or `{"id": 12}` → `"12"`. InvalidInput with what was found."""
    if isinstance(value, dict):
        value = value.get("id")
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        found = str(value).split(".", 1)[0]
        if PROJECT_ID.fullmatch(found):
            return found
    raise InvalidInput(f"The project is {_short(value)}; expected Label Studio's project id, a number such as 12.")


def id_of(value: object, what: str) -> int:
    """A Label Studio id: a whole number from 0 to 2^63 − 1. InvalidInput names `what`."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_ID:
        raise InvalidInput(f"The {what} is {_short(value)}; expected a whole number from 0 to 2^63 - 1.")
    return value


def updated_us(value: object) -> int:
    """Label Studio's `2024-05-05T12:34:56.123456Z` → microseconds since 1970; 0 if it says nothing that can be read."""
    try:
        moment = datetime.fromisoformat(str(value))
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except (ValueError, OverflowError, OSError):
        return 0


def control_key(control: KeypointControl) -> str:
    """What the journal calls a control; several may share a from_name on different images."""
    return f"{control.from_name}:{control.to_name}"


def names_of(config: LabelConfig) -> dict[str, list[str]]:
    """Control → the names of its points, in order."""
    return {control_key(c): list(c.schema.names) for c in config.controls}


def names_since(old: dict[str, Any], since: dict[str, Any], new: dict[str, Any], newest: int) -> dict[str, Any]:
    """`Project.names_since` after the config's names changed from `old` to `new`; newest: annotations.id of the last saying."""
    if not old:
        return {}  # the first config that was seen: what was said before was said under it, as far as anybody knows
    found = {}
    for key, names in new.items():
        asked, known = old.get(key, []), since.get(key, {})
        found[key] = {n: at for n in names if (at := known.get(n, 0) if n in asked else newest)}
    return found


def as_asked(points: KeypointSet, since: dict[str, Any], said: int) -> KeypointSet:
    """An object's points as annotations.id `said` means them: where `model_missing` is "absent", a point that was added to the
    config later is not absent but not labelled: nobody was asked for it. since: of its control."""
    unasked = np.array([since.get(name, 0) >= said for name in points.names], bool) & (points.visibility == Visibility.ABSENT)
    if not unasked.any():
        return points
    seen = np.where(unasked, Visibility.NOT_LABELLED, points.visibility)
    return KeypointSet(points.names, points.xy, seen, points.score, points.box)


def task_row(project: str, body: dict[str, Any], config: LabelConfig | None) -> Task:
    """A task as a webhook or the API describes it. InvalidInput without a usable id. No images without a usable config."""
    data = body.get("data")
    data = data if isinstance(data, dict) else {}
    task = id_of(body.get("id"), "task's id")
    images = {c.image_key: url for c in (config.controls if config else ()) if (url := c.image_of(data))}
    group = next(
        (f"{k}={data[k]}" for k in GROUP_KEYS if isinstance(data.get(k), (str, int)) and data[k] != ""), group_alone(task)
    )
    if len(group) > 200:
        group = hashlib.sha256(group.encode()).hexdigest()
    return Task(project=project, task=task, group=group, images=images, files={}, deleted=False)


def annotation_row(project: str, body: dict[str, Any], task: int, config: LabelConfig | None) -> Annotation:
    """An annotation as a webhook or the API describes it; `result` is kept as it came. InvalidInput if it is none.

    Label Studio also stores annotations without any result (null), which a program may have made: they do not count.
    """
    result, why_not = body.get("result"), _why_not(body)
    if result is None:
        result, why_not = [], why_not or "it has no result"
    if not isinstance(result, list):
        raise InvalidInput(f"An annotation's result is {_short(result)}; expected a list of regions.")
    regions = [r for r in result if isinstance(r, dict)]
    labels = _labels(regions)
    points, fits = reading(labels, config)
    ground_truth = body.get("ground_truth") is True
    meaning = json.dumps([result, bool(why_not), ground_truth], sort_keys=True)
    lead_time = body.get("lead_time")
    by = body.get("completed_by")
    return Annotation(
        project=project,
        annotation=id_of(body.get("id"), "annotation's id"),
        task=task,
        updated_us=updated_us(body.get("updated_at") or body.get("created_at")),
        result_hash=hashlib.sha256(meaning.encode()).hexdigest(),
        result=result,
        labels=labels,
        points=points,
        fits=fits,
        origins=dict(Counter(str(r.get("origin") or "unknown") for r in regions if r.get("type") == "keypointlabels")),
        counts=not why_not,
        why_not=why_not,
        ground_truth=ground_truth,
        completed_by=str(by.get("id") if isinstance(by, dict) else by or "")[:200],
        lead_time=float(lead_time) if isinstance(lead_time, (int, float)) and abs(lead_time) < 1e12 else None,
        parent_prediction=_parent(body.get("parent_prediction")),
        parent_annotation=_parent(body.get("parent_annotation")),
        deleted=False,
        current=True,
    )


def reading(labels: dict[str, Any], config: LabelConfig | None) -> tuple[int, bool]:
    """What the present config makes of an annotation's labels: how many points it knows, and whether these are all."""
    if config is None:
        return 0, False
    by_key = {control_key(control): control for control in config.controls}
    counts = [(by_key.get(key), label, int(count)) for key, found in labels.items() for label, count in found.items()]
    points = sum(count for control, label, count in counts if control and control.name_of(label) is not None)
    return points, points == sum(count for _, _, count in counts)


def _why_not(body: dict[str, Any]) -> str:
    """Empty if the annotation counts, else the reason in words."""
    if body.get("was_cancelled") is True:
        return "skipped (cancelled) by the annotator"
    if body.get("is_draft") is True or body.get("was_postponed") is True:
        return "a draft that nobody submitted yet"
    regions = [r for r in body.get("result") or [] if isinstance(r, dict)]
    # The Data Manager's "Create annotations from predictions" copies the regions as they are. Where a person submits a
    # prediction, the page says how long it took (lead_time) and where each region comes from (origin).
    untouched = body.get("parent_prediction") is not None and body.get("lead_time") is None
    if body.get("last_action") == "prediction" or (untouched and not any(r.get("origin") for r in regions)):
        return "made from a prediction by Label Studio, confirmed by nobody"
    return ""


def _labels(regions: list[dict[str, Any]]) -> dict[str, Any]:
    """Control → {label: how often}, of keypoint regions."""
    found: dict[str, Counter[str]] = {}
    for region in regions:
        value = region.get("value")
        labels = value.get("keypointlabels") if isinstance(value, dict) else None
        if region.get("type") == "keypointlabels" and isinstance(labels, list):
            key = f"{region.get('from_name')}:{region.get('to_name')}"
            found.setdefault(key, Counter()).update(str(label) for label in labels)
    return {key: dict(count) for key, count in found.items()}


def _parent(value: object) -> int | None:
    """The id of what an annotation began as; Label Studio sends none for most, and nothing depends on it."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ID else None


def _short(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]
