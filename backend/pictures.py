"""A task's image for the page: small, and re-encoded, so that a browser gets a JPEG and nothing else."""

from __future__ import annotations

import io

from PIL import Image

from backend.intake import control_key, task_row
from backend.services import Services
from backend.tables import Task
from kptllm_core.errors import InvalidInput, NotFound
from kptllm_core.imaging import read_image
from label_config.schema import parse

LONGEST = 640  # pixels of the longer side, unless asked otherwise
LARGEST = 2048
SMALLEST = 16


def task_picture(services: Services, project: str, task: int, control: str | None = None, side: int = LONGEST) -> bytes:
    """The image of a task as JPEG, at most `side` pixels wide and high. control: `kp:image`; None: the first one's.

    NotFound, InvalidInput, and whatever fetching it raises.
    """
    if not SMALLEST <= side <= LARGEST:
        raise InvalidInput(f"side is {side}; expected {SMALLEST} to {LARGEST} pixels.")
    label_config = services.journal.label_config(project)
    with services.journal.reading() as session:
        row = session.get(Task, (project, task))
    if row is None and label_config and services.has_token and project.isdigit():  # nobody labelled it yet
        row = task_row(project, services.label_studio.task(task, int(project)), parse(label_config))
    if row is None or row.deleted or not label_config:
        raise NotFound(
            f"Project {project} has no task {task} here. Without LABEL_STUDIO_API_KEY only labelled tasks are known."
        )
    controls = {control_key(c): c for c in parse(label_config).controls}
    if control is not None and control not in controls:
        raise NotFound(f"The label config has no control '{control[:100]}'. Known: {', '.join(controls)}.")
    url = row.images.get((controls[control] if control else next(iter(controls.values()))).image_key)
    if not url:
        raise NotFound(f"Task {task} has no image there.")
    pixels = read_image(services.image(project, row, url)[1])
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
