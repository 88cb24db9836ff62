"""What a round is made of: labelled objects by name, in pixels, with the hash of their image. Read from the journal."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from backend import split
from backend.examples import on_image
from backend.intake import as_asked, control_key
from backend.tables import Annotation, Job, Project, Task, Version
from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import MAX_KEYPOINTS, KeypointSchema, KeypointSet
from label_config.annotations import read_result
from label_config.schema import LabelConfig

log = logging.getLogger(__name__)


def round_body(
    session: Session,
    job: Job,
    config: LabelConfig,
    version: Version,
    train: list[split.Candidate],
    heldout: list[split.Candidate],
    support: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The body of POST /rounds. The same bytes under two tasks are never both trained on and held out."""
    schema = merged_schema(config)
    judged = [item for c in heldout for item in _items(session, job.project, config, schema, c)]
    hidden = {item["image"] for item in judged}
    taught = [i for c in train for i in _items(session, job.project, config, schema, c) if i["image"] not in hidden]
    shown = []
    for entry in support:
        task = session.get_one(Task, (job.project, entry["task"]))
        for example in entry["controls"].values():
            facts = task.files.get(example["image"], {})
            points = on_image(example, facts)
            if points is not None and "sha256" in facts and facts["sha256"] not in hidden:
                shown.append({"image": facts["sha256"], "keypoints": points.reorder(schema.names).to_json()})
    return {
        "name": f"{version.base}+p{job.project}+r{job.round}",
        "schema": schema.to_json(),
        "parent": version.adapter,
        "train": taught,
        "heldout": judged,
        "support": shown[: split.MAX_SUPPORT],
        "seconds": seconds,
        "steps": None,
        "seed": job.round,
    }


def merged_schema(config: LabelConfig) -> KeypointSchema:
    """One schema for all controls of a config: a name that several have is one point. SchemaError when it grows too large."""
    if len(config.controls) == 1:
        return config.controls[0].schema
    names = list(dict.fromkeys(n for c in config.controls for n in c.schema.names))
    if len(names) > MAX_KEYPOINTS:
        raise InvalidInput(
            f"The controls have {len(names)} different points together; a round takes at most {MAX_KEYPOINTS}."
        )

    def pairs(kind: str) -> Iterable[tuple[int, int]]:
        for control in config.controls:
            own = control.schema.names
            yield from ((names.index(own[a]), names.index(own[b])) for a, b in getattr(control.schema, kind))

    return KeypointSchema(
        tuple(names), "object", tuple(dict.fromkeys(pairs("skeleton"))), tuple(dict.fromkeys(pairs("symmetric")))
    )


def _items(
    session: Session, project: str, config: LabelConfig, schema: KeypointSchema, candidate: split.Candidate
) -> list[dict[str, Any]]:
    """Every object of an annotation, its points by name, in pixels of the image as it was fetched.

    A box that nobody placed points in goes along without points: an object is there, which finding shall not unlearn.
    """
    annotation, task = session.get_one(Annotation, candidate.row), session.get_one(Task, (project, candidate.task))
    items: list[dict[str, Any]] = []
    held: set[str] = set()
    pointless: dict[str, dict[str, Any]] = {}  # by the box's region, which several controls may share
    since = session.get_one(Project, project).names_since or {}
    for control in config.controls:
        facts = task.files.get(task.images.get(control.image_key, ""), {})
        if "sha256" in facts:
            read = read_result(control, annotation.result, facts["width"], facts["height"])
            for problem in read.problems:
                log.warning("annotation %s, %s: %s", annotation.annotation, control_key(control), problem)
            for found in read.objects:
                points = as_asked(found.keypoints, since.get(control_key(control), {}), annotation.id).reorder(schema.names)
                items.append({"image": facts["sha256"], "keypoints": points.to_json(), "group": candidate.group})
            nothing = KeypointSet(schema.names, np.zeros((len(schema), 2)), np.zeros(len(schema)))
            for box in read.boxes:
                points = replace(nothing, box=box.box)
                pointless[box.region_id] = {"image": facts["sha256"], "keypoints": points.to_json(), "group": candidate.group}
            held |= {found.box.region_id for found in read.objects if found.box}
    return items + [item for region, item in pointless.items() if region not in held]
