"""What the effort meter makes of a real annotator's clicks: the labelling page in a browser, Label Studio, webhook, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from backend.demo.samples import Material
from end_to_end.browser import labelling_page
from end_to_end.conftest import Stack

pytestmark = [pytest.mark.label_studio, pytest.mark.browser]


def test_points_accepted_moved_and_deleted_in_the_browser_are_counted(
    stack: Stack, insects: Callable[[int], Material], chromium: tuple[str, str], tmp_path: Path
) -> None:
    tour = stack.tour(insects(3))
    labelled, shown, _ = tour.project.material.pictures
    tour.label([labelled])
    version = tour.version
    predicted = [r for r in tour.predict([shown])[shown.path.name] if r["type"] == "keypointlabels"]
    names = [r["value"]["keypointlabels"][0] for r in predicted]
    task = tour.project.tasks[shown.path]
    with labelling_page(chromium, stack.label_studio, tmp_path / "profile") as page:
        page.log_in(stack.login)
        page.open(tour.project.id, task, len(predicted))
        page.move(names[0], 40.0 if predicted[0]["value"]["x"] < 50 else -40.0)
        page.delete(names[1])
        page.submit()
        deadline = time.monotonic() + 60
        while (told := effort(stack, tour.project.id))["assisted"]["images"] == 0:
            assert time.monotonic() < deadline, told
            time.sleep(0.5)
    done = told["recent"][-1]
    assert done["task"] == task and done["assisted"] and done["version"] == version
    assert {k: done["work"][k] for k in ("accepted", "nudged", "moved", "added", "deleted", "clicks")} == {
        "accepted": len(predicted) - 2, "nudged": 0, "moved": 1, "added": 0, "deleted": 1, "clicks": 2,
    }  # fmt: skip
    assert done["seconds"] > 0
    assert told["assisted"]["clicks_saved"] == len(predicted) - 1 - 2


def effort(stack: Stack, project: int) -> dict:  # type: ignore[type-arg]
    answer = requests.get(f"{stack.backend}/projects/{project}/effort", timeout=30)
    answer.raise_for_status()
    return dict(answer.json())
