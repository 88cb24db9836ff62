"""A person at the page, in a real browser: start a round, watch its bar, compare two versions, pin, roll back, dismiss a finding.

The first test has everything real: Label Studio, the backend, the core with its model and its trainer. The second goes through all
of the page on a project with some history, where the model and the trainer are played (page_world.py), so that it can say when
the bar moves. The pictures in .data/test-artifacts are to be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no step shall wait for within its time
from backend.demo.samples import Material
from backend.split import MIN_HELDOUT
from end_to_end.conftest import Stack
from end_to_end.reader import Reader, reader
from page_world import Beetles, beetles, figures, served

pytestmark = [pytest.mark.slow, pytest.mark.browser]
EXAMPLES, LABELLED, ROUND_SECONDS = 5, 12, 900.0
PAGES = {"projects": "/", "overview": "/projects/1/"} | {
    name: f"/projects/1/view/{name}" for name in ("versions", "compare", "next", "labels")
}


@pytest.mark.label_studio
def test_a_round_is_started_watched_compared_pinned_and_rolled_back(
    stack: Stack, insects: Callable[[int], Material], chromium: tuple[str, str], tmp_path: Path, artifacts: Path
) -> None:
    tour = stack.tour(insects(LABELLED))
    pictures = list(tour.project.material.pictures)
    tour.label(pictures[:EXAMPLES])
    tour.predict(pictures[EXAMPLES:])
    tour.correct(pictures[EXAMPLES:], LABELLED)
    before, here = tour.version, f"/projects/{tour.project.id}"

    with reader(chromium, stack.backend, artifacts, tmp_path / "profile") as person:
        # The round: its bar moves by itself, in one piece, and the keyboard stays on a button that stays.
        person.open(f"{here}/")
        person.follow_the_bar()
        person.press("#start")
        person.reads("Round 1 starts with 12 labelled images.", "#said")
        person.wait_for("#cancel")
        person.run("window.button = document.getElementById('cancel'); window.button.focus()")
        person.until(lambda: len(person.bar()) >= 2, "the bar moves")
        assert person.run("return document.activeElement === window.button || !window.button.isConnected")
        person.look("real-running")
        long(person).reads("Round 1, done.", "#now")
        moved = person.bar()
        assert moved == sorted(moved)
        (made,) = (v for v in tour.status()["versions"] if v["round"] == 1 and v["after"])
        new = made["model_version"]
        person.reads(f"{new if made['promoted'] else before} serves", "#head")
        person.looks("real-overview")

        # Whatever was decided, the new version serves now, and it is one step back to the other.
        person.open(f"{here}/view/versions")
        if not made["promoted"]:
            person.press(f"[id='activate-{new}']")
        person.reads(f"{new} serves", "#head")
        tour.wait_until_serves(new)

        # Side by side: on each held-out image both versions draw their points, on the same picture.
        person.press("section a[href*='view/compare']")
        person.wait_for("#compared table")
        if person.there("#want"):
            person.press("#want")
        person.until(lambda: sum(n > 0 for p in person.compared() for _, n in p) == 2 * MIN_HELDOUT, "the points of both versions")
        compared = person.compared()
        assert all(one == other for (one, _), (other, _) in compared)
        assert len({address for (address, _), _ in compared}) == MIN_HELDOUT
        assert {before, new} <= set(person.text("#compared").split())
        person.looks("real-compared")

        # Pin, unpin, and back.
        person.open(f"{here}/view/versions")
        person.press("#pin")
        person.reads(f"{new} serves until it is unpinned.", "#said")
        person.reads("pinned", "#head")
        assert tour.status()["pinned"] == new
        person.press("#unpin")
        person.reads(f"{new} serves until a better one comes.", "#said")
        person.press("#rollback")
        person.reads(f"{before} serves again; {new} is kept, and can be activated.", "#said")
        person.reads(f"{before} serves", "#head")
        person.reads(before, ".version.active")
        tour.wait_until_serves(before)
        person.looks("real-versions")
        assert person.complaints() == []


def long(person: Reader) -> Reader:
    """The same person with the patience for a whole round."""
    return Reader(person.driver, person.url, person.folder, ROUND_SECONDS)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Beetles]:
    with beetles(tmp_path / "world") as found:
        found.label(*range(1, 15))
        found.label(15, wrong=True)
        found.label(3, 5, by=2, off=1.5)
        found.round(0.31, 0.62)
        found.correct(*range(30, 34))
        found.open(70, 71)
        found.open(72, look=70)
        found.settle()
        yield found


@pytest.fixture
def person(made: Beetles, chromium: tuple[str, str], tmp_path: Path, artifacts: Path) -> Iterator[Reader]:
    with served(made) as url, reader(chromium, url, artifacts, tmp_path / "profile") as found:
        yield found


def test_every_part_of_the_page_in_light_and_dark_wide_and_narrow(person: Reader) -> None:
    for name, path in PAGES.items():
        person.open(path)
        person.wait_for("h1")
        person.looks(f"page-{name}")
    assert person.complaints() == []


def test_the_page_keeps_itself_up_to_date_and_disturbs_nobody(made: Beetles, person: Reader) -> None:
    here = made.here
    before = here.status()["model_version"]
    made.task(99)
    here.train_seconds, here.figures = 600.0, (figures(0.6), figures(0.8))

    # A round: its bar appears without reloading and moves. What a person holds on to is not taken away.
    person.open("/projects/1/")
    person.run("window.stayed = true; document.querySelector('#replace').click(); document.querySelector('details').open = true")
    person.follow_the_bar()
    person.press("#start")
    person.reads("Round 2 starts with 19 labelled images.", "#said")
    person.until(lambda: person.bar() == [1], "the bar")
    assert person.text("#progress-text") == "Round 2 1 of 2 · 50 %"
    assert person.run("return document.activeElement.matches('section') && document.activeElement.querySelector('#cancel') !== null")
    assert person.run("return document.querySelector('#replace').checked && document.querySelector('details').open")
    person.looks("page-running")
    person.hold("#cancel")
    step(here.folder, 3, 4)
    person.until(lambda: person.bar() == [1, 3], "the bar moves")
    person.release()
    person.reads("Round 2, cancelled.", "#now")

    # The next one ends, and the version serves: the curve is longer, and whoever hears the page is told.
    here.train_seconds = 3.0
    person.press("#start")
    person.reads("Round 3, done.", "#now")
    person.reads("Round 3, done.", "#said")
    after = here.status()["model_version"]
    assert after != before
    person.reads(f"{after} serves", "#head")
    person.until(lambda: person.there("#accuracy-d ~ circle.mark.judge") == 3, "the curve")
    assert person.run("return window.stayed"), "the page was loaded anew"

    # Two versions side by side: what is missing is made when it is asked for, and appears by itself.
    person.open("/projects/1/view/versions")
    person.press("section a[href*='view/compare']")
    person.wait_for("#compared")
    if person.there("#want"):
        person.press("#want")
    person.until(lambda: [[n for _, n in p] for p in person.compared()] == [[4, 4]] * MIN_HELDOUT, "both versions' points")
    person.looks("page-compared")

    # Pin, unpin, roll back. The keyboard stays near, and never on a button that does something else.
    focus = "return document.activeElement.getAttribute('aria-labelledby')"
    person.open("/projects/1/view/versions")
    person.press("#pin")
    person.reads("serves until it is unpinned.", "#said")
    person.wait_for("#unpin")
    assert person.run(focus) == "serving"
    person.press("#unpin")
    person.reads("serves until a better one comes.", "#said")
    person.press("#rollback")
    person.reads(f"{before} serves again; {after} is kept, and can be activated.", "#said")
    assert here.status()["model_version"] == before
    person.reads("rolled back", f"[id='v-{after}']")
    person.reads(before, ".version.active")
    person.reads(f"{before} serves", "#head")
    assert person.run(focus) == "serving", "a second Enter would roll back once more"

    # A finding is dismissed.
    person.open("/projects/1/view/labels")
    person.reads("Left and right exchanged")
    person.press("[id^=dismiss-]")
    person.reads("Nothing looks wrong.")

    # Predictions in advance.
    person.open("/projects/1/")
    person.press("#prelabel-start")
    person.reads("Predicting all unlabelled images.", "#now")
    person.press("#prelabel-cancel")
    person.reads("Cancelled:", "#now")
    assert person.complaints() == []


def step(world: Path, number: int, of: int) -> None:
    """The running trainer is so far."""
    (run,) = (f for f in (world / "core" / "rounds").glob("*/progress.json") if not (f.parent / "result.json").exists())
    fresh = run.with_suffix(".new")
    fresh.write_text(json.dumps({"phase": "training", "step": number, "steps": of, "loss": 0.4, "eta_seconds": 20.0}))
    fresh.rename(run)
