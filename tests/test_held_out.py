"""Once held out, held out for ever: whatever happens to groups and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from backend.core_client import image_hash
from backend.tables import Job
from backend_world import World, picture, world
from small_server import Answer


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def snapshots(here: World) -> list[dict[str, set[int]]]:
    """Of each round: which pictures (by their number) it held out, taught, showed."""
    numbers = {image_hash(picture(n)): n for n in range(1, 200)}
    with here.services.journal.reading() as session:
        found = [job.snapshot or {} for job in session.scalars(select(Job).order_by(Job.round))]
    return [{part: {numbers[i["image"]] for i in s.get(part, [])} for part in ("heldout", "train", "support")} for s in found]


def say(here: World, *tasks: int, **data: Any) -> None:
    """These tasks are updated by a person, and their data say more than before."""
    bodies = [here.task(n) for n in tasks]
    for body in bodies:
        body["data"] |= data
    answer = here.webhook("ANNOTATIONS_UPDATED", annotation=[here.annotation(n, second=1) for n in tasks], task=bodies)
    assert answer.status_code == 200


def test_an_image_keeps_its_use_in_a_new_group(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    (first,) = snapshots(here)
    say(here, *range(1, 13), video="a")  # all of them are frames of one video, as it turns out
    here.label(*range(13, 25))
    assert here.play_round()["state"] == "done"
    _, second = snapshots(here)
    assert first["heldout"] <= second["heldout"] and not first["heldout"] & (second["train"] | second["support"])
    assert first["train"] <= second["train"], "nor does what taught become a judge"


def test_a_group_that_nothing_was_decided_about_is_used_as_the_image_that_joins_it(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    (first,) = snapshots(here)
    say(here, *first["heldout"], video="b")
    fresh = range(13, 19)
    here.webhook("ANNOTATIONS_CREATED", annotation=[here.annotation(n) for n in fresh],
                 task=[here.task(n) | {"data": {**here.task(n)["data"], "video": "b"}} for n in fresh])  # fmt: skip
    here.play_round()
    assert set(fresh) | first["heldout"] <= snapshots(here)[1]["heldout"]


def test_unlabelled_tasks_change_their_group_freely(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    held, taught = (min(snapshots(here)[0][part]) for part in ("heldout", "train"))
    say(here, held, video="held")
    say(here, taught, video="taught")
    new = [here.task(n) for n in range(13, 19)]
    for video in ("held", "taught"):  # moved twice before anybody labelled them
        for body in new:
            body["data"]["video"] = video
        here.webhook("ANNOTATIONS_CREATED", annotation=[here.annotation(13, was_cancelled=True)][:0], task=new)
        assert here.webhook("ANNOTATIONS_CREATED", annotation=[here.annotation(99)], task=[here.task(99), *new]).status_code == 200
    here.webhook("ANNOTATIONS_CREATED", annotation=[here.annotation(n) for n in range(13, 19)], task=new)
    here.play_round()
    assert set(range(13, 19)) <= snapshots(here)[1]["train"]


def test_a_picture_that_was_held_out_stays_so_when_its_task_is_deleted_and_imported_anew(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    (first,) = snapshots(here)
    assert here.webhook("TASKS_DELETED", tasks=[{"id": n} for n in range(1, 13)]).status_code == 200
    for n in range(1, 13):
        here.studio.routes[f"/data/upload/1/{100 + n}.png"] = Answer(body=picture(n))
    here.label(*range(101, 113))
    job = here.play_round()
    assert job["state"] == "done"
    _, second = snapshots(here)
    assert second["train"] and not first["heldout"] & (second["train"] | second["support"])
    if first["heldout"] - second["heldout"]:
        with here.services.journal.reading() as session:
            assert session.get_one(Job, job["job"]).images["train"] == len(second["train"])


def test_of_two_tasks_with_the_same_picture_the_later_judges_too_when_the_earlier_does(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    (first,) = snapshots(here)
    again = {100 + n: n for n in first["heldout"]}
    for task, n in again.items():
        here.studio.routes[f"/data/upload/1/{task}.png"] = Answer(body=picture(n))
    here.label(*again)
    assert here.play_round()["state"] == "done"
    assert snapshots(here)[1] == first | {"support": snapshots(here)[1]["support"]}, "nothing new was taught, and nothing old judges"
