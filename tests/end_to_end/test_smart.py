"""The smart tools in a real browser: what a person points at stays, the rest of that object follows, and nothing is doubled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backend.demo.samples import Material, from_folder, render
from backend.demo.tour import Tour
from end_to_end.browser import labelling_page
from end_to_end.conftest import Stack
from end_to_end.smart_tools import OnPage, SmartTools
from label_config.regions import to_regions
from label_config.writer import HOTKEYS, config_of

pytestmark = [pytest.mark.slow, pytest.mark.label_studio, pytest.mark.browser]
NEAR = 0.5  # per cent of the image
POINT, BOX = "KeyPointTool", "RectangleTool"


@pytest.fixture
def boxed(tmp_path: Path) -> Material:
    """Rendered insects, whose label config has boxes for several of them."""
    folder = tmp_path / "insects"
    render(folder, 5, seed=5)
    schema = from_folder(folder / "images", folder / "annotations.json", None).control.schema
    config = folder / "config.xml"
    config.write_text(config_of(schema, box=True), encoding="utf-8")
    return from_folder(folder / "images", folder / "annotations.json", config)


@pytest.fixture
def tour(stack: Stack, boxed: Material) -> Tour:
    """Two examples, and a prediction for the third picture, whose object somebody else's detector has boxed."""
    made = stack.tour(boxed)
    made.label(boxed.pictures[:2])
    third = boxed.pictures[2]
    assert third.truth is not None
    whole = to_regions(made.project.control, third.truth, third.width, third.height)
    drawn = [r for r in whole if r["type"] == "rectanglelabels"]
    made.project.label_studio.create_prediction(made.project.tasks[third.path], drawn, score=0.9, model_version="a detector")
    made.predict(boxed.pictures[2:])
    return made


@pytest.fixture
def smart(stack: Stack, tour: Tour, chromium: tuple[str, str], tmp_path: Path) -> Iterator[SmartTools]:
    """The third picture with its prediction, the smart tools switched on."""
    with labelling_page(chromium, stack.label_studio, tmp_path / "profile") as page:
        page.log_in(stack.login)
        page.open(tour.project.id, tour.project.tasks[tour.project.material.pictures[2].path], 2)
        tools = SmartTools(page)
        tools.switch("auto-annotation", on=True)
        yield tools


def test_a_click_moves_its_point_and_the_rest_follows(smart: SmartTools, tour: Tour, artifacts: Path) -> None:
    smart.switch("auto-accept", on=True)
    names = tour.project.control.labels
    before = by_label(smart.regions())
    ids = {r.id for r in smart.regions()}
    box = next(r for r in smart.regions() if r.type == "rectangleregion")
    assert set(before) <= set(names) and len(before) > 3 and all(r.parent == box.id for r in before.values())
    first, second = list(before)[:2]

    target = inside(before[first])
    smart.choose(POINT, first, HOTKEYS[names.index(first)])
    smart.click(*target)
    after = by_label(smart.regions())
    smart.page.screenshot(artifacts / "smart-click.png")
    assert {r.id for r in smart.regions()} == ids, "points were added instead of being moved"
    assert {n: (r.id, r.parent) for n, r in after.items()} == {n: (r.id, r.parent) for n, r in before.items()}
    assert far(after[first].place, target) < NEAR and after[first].origin == "prediction-changed"
    assert any(far(after[n].place, before[n].place) > 1e-6 for n in before if n != first), "the other points did not follow"
    assert {r.origin for n, r in after.items() if n != first} == {"prediction"}

    # At once, before the page has saved a draft: the first click still holds.
    smart.choose(POINT, second, HOTKEYS[names.index(second)])
    wanted = inside(after[second])
    smart.click(*wanted)
    last = by_label(smart.regions())
    assert {r.id for r in smart.regions()} == ids
    assert far(last[second].place, wanted) < NEAR and far(last[first].place, target) < NEAR

    # What is submitted is one object with its points, of which the person placed two.
    smart.page.submit()
    task = tour.project.tasks[tour.project.material.pictures[2].path]
    smart.wait(lambda: saved(tour, task), "the annotation was not saved")
    points = [r for r in saved(tour, task) if r["type"] == "keypointlabels"]
    assert {r["parentID"] for r in points} == {box.id}
    assert sorted(r["value"]["keypointlabels"][0] for r in points if r["origin"] == "prediction-changed") == sorted([first, second])


def test_a_smart_rectangle_gets_the_points_of_its_object(smart: SmartTools, tour: Tour, artifacts: Path) -> None:
    smart.switch("auto-accept", on=True)
    before = smart.regions()
    control = tour.project.control
    assert control.box is not None
    smart.choose(BOX, control.box.labels[0], HOTKEYS[-1])
    smart.drag(5, 5, 45, 40)
    new = [r for r in smart.regions() if r.id not in {b.id for b in before}]
    smart.page.screenshot(artifacts / "smart-rectangle.png")
    (box,) = (r for r in new if r.type == "rectangleregion")
    assert far(box.place, (5, 5)) < NEAR and box.labels == (control.box.labels[0],) and box.origin == "manual"
    points = [r for r in new if r.type == "keypointregion"]
    assert points and {r.parent for r in points} == {box.id} and {len(r.labels) for r in points} == {1}
    assert len({r.labels[0] for r in points}) == len(points) and {r.labels[0] for r in points} <= set(control.labels)
    assert [r for r in smart.regions() if r.id in {b.id for b in before}] == before, "other objects were touched"


def test_without_auto_accept_nothing_happens_before_a_person_accepts(smart: SmartTools, tour: Tour, artifacts: Path) -> None:
    smart.switch("auto-accept", on=False)
    names = tour.project.control.labels
    before = by_label(smart.regions())
    first, second = list(before)[:2]
    places = {}
    for name in (first, second):
        smart.choose(POINT, name, HOTKEYS[names.index(name)])
        places[name] = inside(before[name])
        smart.click(*places[name])
    assert {r.id for r in smart.suggestions()} >= {before[first].id, before[second].id}
    smart.page.screenshot(artifacts / "smart-suggestions.png")
    smart.accept()
    smart.wait(lambda: not smart.suggestions(), "the suggestions are still there")
    after = by_label(smart.regions())
    assert {n: r.id for n, r in after.items()} == {n: r.id for n, r in before.items()}
    assert all(far(after[n].place, places[n]) < NEAR for n in places), "a click was lost"


def by_label(regions: list[OnPage]) -> dict[str, OnPage]:
    found = [r for r in regions if r.type == "keypointregion"]
    assert len({r.labels for r in found}) == len(found), f"a label is there twice: {found}"
    return {r.labels[0]: r for r in found}


def inside(point: OnPage) -> tuple[float, float]:
    """Some per cent nearer to the image's centre."""
    return point.x + (4.0 if point.x < 50 else -4.0), point.y + (3.0 if point.y < 50 else -3.0)


def far(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def saved(tour: Tour, task: int) -> list[dict]:  # type: ignore[type-arg]
    return [r for a in tour.project.label_studio.annotations(task) for r in a["result"]]
