"""Which version serves: roll back, pin, a new base, changed names; which adapters are kept; two versions side by side."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import select, update
from sqlalchemy.orm import Session

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no test shall wait for within its time
from backend import judge_routes
from backend.prune import prune
from backend.tables import Event, Group, Project, Task, Version
from backend_world import BAD, CONFIG, GOOD, World, world


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, round_every=1000, keep_adapters=1) as made:
        made.keeper._next_prune = float("inf")  # when a test says so
        yield made


def post(here: World, path: str, status: int = 200, **more: Any) -> dict[str, Any]:
    answer = here.client.post(path, **more)
    assert answer.status_code == status, answer.get_data(as_text=True)
    return dict(answer.get_json())


def play(here: World, *tasks: int) -> str:
    """Label, train, decide; the name of the version."""
    here.label(*tasks)
    return str(here.play_round()["model_version"])


def adapters(here: World) -> set[str]:
    return {str(a["name"]) for a in here.services.core.adapters()}


def events(here: World, action: str) -> list[dict[str, Any]]:
    with here.services.journal.reading() as session:
        return [e.about for e in session.scalars(select(Event).where(Event.action == action))]


# ---------------------------------------------------------------- roll back and pin


def test_rolling_back_is_one_call_and_goes_back_step_by_step(here: World) -> None:
    zero = here.setup().get_json()["model_version"]
    first = play(here, *range(1, 13))
    second = play(here, *range(13, 18))
    assert here.status()["previous"] == first
    answer = post(here, "/projects/1/rollback")
    assert answer["model_version"] == first == here.setup().get_json()["model_version"]
    assert second in answer["message"]
    version = next(v for v in here.status()["versions"] if v["model_version"] == second)
    assert version["promoted"] is False and "Rolled back by a person" in version["reason"]
    assert post(here, "/rollback?project=1")["model_version"].startswith("timed-00000000+r0+s7.")
    assert post(here, "/projects/1/rollback")["model_version"] == zero
    refused = post(here, "/projects/1/rollback", 409)
    assert "no version before" in refused["error"]["message"]
    assert [e["by"] for e in events(here, "ROLLBACK")] == ["person"] * 3
    assert post(here, f"/projects/1/versions/{second}/activate")["model_version"] == second  # nothing is lost


def test_a_roll_back_is_of_the_version_that_was_seen(here: World) -> None:
    play(here, *range(1, 13))
    seen = play(here, *range(13, 18))
    body = {"from": seen}
    before = post(here, "/projects/1/rollback", json=body)["model_version"]
    refused = post(here, "/projects/1/rollback", 409, json=body)["error"]["message"]  # pressed twice
    assert f"'{seen}' serves no more, '{before}' does. Nothing was changed" in refused
    assert here.status()["model_version"] == before
    assert "name of the version" in post(here, "/projects/1/rollback", 400, json={"from": 5})["error"]["message"]
    assert post(here, "/projects/1/rollback", json={})["model_version"] != before


def test_what_a_person_chose_keeps_its_training_when_the_config_changes(here: World) -> None:
    """Pinned, or rolled back to, although its round was not promoted."""
    here.label(*range(1, 13))
    here.figures = (GOOD, BAD)
    refused = str(here.play_round()["model_version"])
    more = CONFIG.replace("<Label", '<Label value="paw"/><Label', 1)
    post(here, f"/projects/1/versions/{refused}/pin")
    version = next(v for v in here.status()["versions"] if v["model_version"] == refused)
    assert version["promoted"] is True and version["reason"].startswith("Not promoted: ") and version["reason"].endswith("Pinned by a person.")

    def as_before(session: Session) -> None:  # what an older backend wrote
        session.execute(update(Version).where(Version.name == refused).values(promoted=False))

    here.services.journal.write(as_before)
    here.setup(more)
    assert here.services.journal.active("1").adapter == "timed-00000000+p1+r1"
    here.services.journal.write(as_before)
    here.setup(CONFIG)
    assert here.status()["model_version"] == refused
    # A roll back, too, leads to what was its parent.
    here.figures = (BAD, GOOD)
    here.services.journal.write(as_before)
    post(here, "/projects/1/unpin")
    play(here, *range(13, 18))
    assert post(here, "/projects/1/rollback")["model_version"] == refused
    assert next(v for v in here.status()["versions"] if v["model_version"] == refused)["promoted"] is True


def test_a_pinned_version_serves_until_it_is_unpinned(here: World) -> None:
    first = play(here, *range(1, 13))
    assert post(here, f"/projects/1/versions/{first}/pin")["pinned"] is True
    assert here.status()["pinned"] == first
    job = post_round(here, *range(13, 18))
    assert job["promoted"] is False
    assert job["message"].startswith(f"Not promoted: {first} is pinned. Without the pin: Promoted: better")
    assert here.setup().get_json()["model_version"] == first
    assert post(here, "/projects/1/unpin") == {
        "model_version": first, "pinned": False, "message": f"{first} serves until a better one comes.",
    }  # fmt: skip
    assert here.status()["pinned"] is None
    assert play(here, *range(18, 23)) == here.setup().get_json()["model_version"] != first


def post_round(here: World, *tasks: int) -> dict[str, Any]:
    here.label(*tasks)
    return here.play_round()


def test_a_pin_holds_the_examples_too_and_what_was_due_comes_afterwards(here: World) -> None:
    here.label(1)
    name = here.setup().get_json()["model_version"]
    post(here, f"/projects/1/versions/{name}/pin")
    here.label(2, 3, 4, 5)
    assert here.setup().get_json()["model_version"] == name
    assert "+s5." in post(here, "/projects/1/unpin")["model_version"]


@pytest.mark.parametrize("why", ["another", "names"])
def test_what_makes_a_pin_impossible_releases_it_and_is_noted(here: World, why: str) -> None:
    here.label(*range(1, 6))
    name = here.setup().get_json()["model_version"]
    post(here, f"/projects/1/versions/{name}/pin")
    if why == "another":
        post(here, "/projects/1/versions/timed-00000000+r0+s0.f1951d/activate")
    else:
        here.setup(CONFIG.replace('"nose"', '"muzzle"'))
    assert here.status()["pinned"] is None
    assert len(events(here, "UNPINNED")) == 1


def test_a_version_that_nobody_knows_or_that_cannot_serve_is_refused(here: World) -> None:
    first = play(here, *range(1, 13))
    assert post(here, "/projects/1/versions/none/pin", 404)["error"]["code"] == "not_found"
    here.setup(CONFIG.replace('"nose"', '"muzzle"'))
    assert "other keypoint names" in post(here, f"/projects/1/versions/{first}/pin", 409)["error"]["message"]
    assert post(here, "/projects/99/rollback", 404)["error"]["code"] == "not_found"
    assert here.client.post("/rollback").status_code == 400


# ---------------------------------------------------------------- which adapters are kept


def test_old_adapters_are_deleted_but_none_that_may_be_needed(here: World) -> None:
    names = [play(here, *range(1, 13))]
    post(here, f"/projects/1/versions/{names[0]}/pin")
    post(here, "/projects/1/unpin")
    for start in (13, 18, 23, 28):
        names.append(play(here, *range(start, start + 5)))
    made = [f"timed-00000000+p1+r{n}" for n in range(1, 6)]
    assert prune(here.services, "1") == made[:2], "r5 serves, r4 served before, and r3 is its parent"
    assert adapters(here) == set(made[2:])
    assert prune(here.services, "1") == []
    pruned = [v["model_version"] for v in here.status()["versions"] if v["pruned"]]
    assert pruned == names[:2]
    refused = post(here, f"/projects/1/versions/{names[0]}/activate", 409)
    assert "deleted to save space" in refused["error"]["message"]
    assert here.predict(here.task(90))[0]["model_version"] == names[-1]


def test_a_pinned_adapter_is_kept_however_old(here: World) -> None:
    first = play(here, *range(1, 13))
    post(here, f"/projects/1/versions/{first}/pin")
    for start in (13, 18, 23):
        play(here, *range(start, start + 5))
    assert prune(here.services, "1") == ["timed-00000000+p1+r2", "timed-00000000+p1+r3"]
    assert adapters(here) == {"timed-00000000+p1+r1", "timed-00000000+p1+r4"}


def test_a_prune_that_was_cut_off_is_finished_later(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (1, 13, 18, 23):
        play(here, *range(start, start + (12 if start == 1 else 5)))

    def killed(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(here.services.core, "delete_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(here.services, "1")
    monkeypatch.undo()
    assert "timed-00000000+p1+r1" in adapters(here)
    assert prune(here.services, "1") == ["timed-00000000+p1+r1"]


def test_adapters_of_somebody_else_are_left_alone(here: World) -> None:
    folder = here.folder / "other"
    folder.mkdir()
    (folder / "adapter.json").write_text("{}")
    here.core.adapters.publish(folder, "timed-00000000+p1+r77")
    play(here, *range(1, 13))
    prune(here.services, "1")
    assert "timed-00000000+p1+r77" in adapters(here)


# ---------------------------------------------------------------- another base


def test_a_new_base_serves_the_examples_at_once_and_retrains_every_project(here: World) -> None:
    first = play(here, *range(1, 13))
    for task in range(101, 113):
        here.webhook("ANNOTATION_CREATED", project=2, annotation=here.annotation(task), task=here.task(task))
    here.client.post("/projects/2/setup", json={"project": "2", "schema": CONFIG})
    here.predictor.base = "timed-11111111"  # type: ignore[misc]
    here.keeper._next_core = 0.0
    here.keeper._see_core()
    status = here.status()
    assert status["model_version"].startswith("timed-11111111+r0+s") and status["retrain"] == "timed-11111111"
    assert here.client.get("/projects/2/status").get_json()["retrain"] is None, "it never had an adapter"
    here.tick_until(lambda: here.status()["model_version"].startswith("timed-11111111+r2+"))
    assert here.status()["job"]["asked_by"] == "the core now runs timed-11111111"
    assert here.status()["retrain"] is None
    here.predictor.base = "timed-00000000"  # type: ignore[misc]
    here.keeper._see_core()
    assert here.status()["model_version"] == first, "an adapter of that base is still there"
    assert here.status()["retrain"] is None


def test_a_round_for_the_old_base_begins_anew_on_the_new_one(here: World) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 30.0
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] == "running")
    here.predictor.base = "timed-11111111"  # type: ignore[misc]
    here.train_seconds = 0.0
    here.keeper._see_core()
    here.tick_until(lambda: here.status()["job"]["state"] == "done")
    assert here.status()["model_version"].startswith("timed-11111111+r2+")


# ---------------------------------------------------------------- changed names


def test_what_no_longer_fits_is_set_aside_and_named(here: World) -> None:
    trained = play(here, *range(1, 13))
    assert here.status()["set_aside"] == {"adapters": [], "labels": {}, "images": [], "examples": []}
    here.label(20, labels=("nose",))
    here.setup(CONFIG.replace('"nose"', '"muzzle"'))
    aside = here.status()["set_aside"]
    assert aside["adapters"] == [{"model_version": trained, "unknown": ["nose"], "new": ["muzzle"]}]
    assert aside["labels"] == {"kp:image": {"nose": 13}}
    assert aside["images"] == [20]
    here.setup(CONFIG)
    assert here.status()["set_aside"]["labels"] == {}


def test_a_point_that_was_added_later_is_not_absent_in_what_was_said_before(here: World) -> None:
    absent = CONFIG.replace('toName="image"', 'toName="image" model_missing="absent"')
    more = absent.replace('<Label value="nose"/>', '<Label value="nose"/><Label value="paw"/>')
    for task, config, labels in (
        (1, absent, ("nose", "tail", "ear")), (2, absent, ("nose", "tail")), (3, more, ("nose", "tail")), (4, more, ("paw",)), (5, more, ("ear",)),
    ):  # fmt: skip
        here.webhook("ANNOTATION_CREATED", config, annotation=here.annotation(task, labels=labels), task=here.task(task))
    seen = {
        e["task"]: dict(zip(p["names"], p["visibility"], strict=True))
        for e in here.services.journal.active("1").support
        for p in [e["controls"]["kp:image"]["keypoints"]]
    }
    assert seen[1] == {"nose": 2, "paw": 0, "tail": 2, "ear": 2}
    assert seen[2] == {"nose": 2, "paw": 0, "tail": 2, "ear": 3}
    assert seen[3]["paw"] == 3, "whoever was asked for it and did not place it says that it is not there"


# ---------------------------------------------------------------- when rounds start


def test_a_burst_of_corrections_starts_one_round_when_it_has_come_to_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    with world(tmp_path, round_quiet_seconds=5.0) as here:
        monkeypatch.setattr("backend.rounds.time.monotonic", lambda: now[0])
        for start in (1, 25, 40):
            here.label(*range(start, start + 24))
            here.rounds.start_if_due("1")
            now[0] += 4.0
        assert here.status()["job"] is None
        now[0] += 2.0
        here.rounds.start_if_due("1")
        assert here.status()["job"]["asked_by"] == "63 new corrections"
        here.rounds.cancel(here.status()["job"]["job"])
        for start in range(100, 400, 20):  # somebody who never rests does not hold it up for ever
            here.label(*range(start, start + 20))
            here.rounds.start_if_due("1")
            now[0] += 4.9
        assert here.status()["job"]["state"] == "requested"


def test_rounds_of_several_projects_queue_for_the_one_device(here: World) -> None:
    here.train_seconds = 60.0
    for project, first in ((1, 1), (2, 101)):
        for task in range(first, first + 12):
            here.webhook("ANNOTATION_CREATED", project=project, annotation=here.annotation(task), task=here.task(task))
        here.webhook("START_TRAINING", project=project)

    def job(project: int) -> dict[str, Any]:
        return dict(here.client.get(f"/projects/{project}/status").get_json()["job"])

    here.tick_until(lambda: "waits for 1 round of other projects" in job(2)["message"])
    assert job(1)["state"] == "running"
    here.train_seconds = 0.0
    here.client.post(f"/projects/1/jobs/{job(1)['job']}/cancel")
    here.tick_until(lambda: job(2)["state"] == "done")
    assert job(1)["state"] == "cancelled" and job(2)["promoted"]


def test_a_round_that_is_cancelled_while_it_is_sent_does_not_go_on_at_the_core(here: World) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 30.0
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] == "prepared")
    send = here.services.core.start_round

    def meanwhile(*args: Any, **more: Any) -> dict[str, Any]:
        answer = send(*args, **more)
        here.rounds.cancel(here.status()["job"]["job"])
        return answer

    here.services.core.start_round = meanwhile  # type: ignore[method-assign]
    here.keeper.train()
    assert here.status()["job"]["state"] == "cancelled"
    (sent,) = here.core.jobs._jobs.values()
    assert sent.cancelled.is_set() or sent.state == "cancelled"


def test_images_of_one_video_cannot_judge_themselves(here: World) -> None:
    for n in range(1, 13):
        task = here.task(n)
        task["data"]["video"] = "v1"
        here.webhook("ANNOTATION_CREATED", annotation=here.annotation(n), task=task)
    job = here.play_round()
    assert job["state"] == "failed"
    assert "The 12 images are in 1 groups" in job["message"] and "of other groups" in job["message"]


# ---------------------------------------------------------------- side by side


def test_two_versions_side_by_side_on_the_same_held_out_images(here: World) -> None:
    here.figures = (BAD, GOOD)
    name = play(here, *range(1, 13))
    path = "/projects/1/compare"
    empty = here.client.get(path).get_json()
    assert empty["b"]["model_version"] == name and empty["a"]["model_version"].startswith("timed-00000000+r0+s7")
    assert empty["heldout"] == len(empty["images"]) == 5
    post(here, path, 202)
    here.tick_until(lambda: here.client.get(path).get_json()["compared"] == 5)
    told = here.client.get(f"{path}?a={empty['a']['model_version'].replace('+', '%2B')}&limit=3").get_json()
    assert told["pending"] == 0 and len(told["images"]) == 3
    with here.services.journal.reading() as session:
        judges = {int(g.group[5:]) for g in session.scalars(select(Group).where(Group.use == "heldout"))}
    for image in told["images"]:
        assert image["task"] in judges
        shown = image["controls"]["kp:image"]
        assert shown["size"] == [64, 48]
        assert shown["truth"][0]["names"] == shown["a"][0]["names"] == shown["b"][0]["names"]
        assert 0 <= image["a"]["pck"] <= 1 and image["b"]["error"] > 0
        answer = here.client.get(image["image"])
        assert answer.mimetype == "image/jpeg" and Image.open(io.BytesIO(answer.data)).size == (64, 48)
    assert told["controls"]["kp:image"]["names"] == ["nose", "tail", "ear"]


def test_pictures_leave_threads_for_others_and_are_kept_by_the_browser(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here.label(1)
    path = "/projects/1/tasks/1/image"
    assert here.client.get(path).headers["Cache-Control"] == "private, max-age=600"
    monkeypatch.setattr(judge_routes, "MOMENT", 0.05)
    places = here.app.extensions["picture_places"]
    with places, places:
        busy = here.client.get(path)
    assert busy.status_code == 503 and int(busy.headers["Retry-After"]) > 0 and busy.headers["Cache-Control"] == "no-store"
    assert "Other pictures are being made" in busy.get_json()["error"]["message"]
    assert here.client.get(path + "?control=none").status_code == 404  # and gives its place back
    assert [here.client.get(path).status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/projects/1/compare?a=none", 404), ("/projects/1/compare?limit=x", 400), ("/projects/9/compare", 404), ("/compare", 400),
        ("/projects/1/tasks/999/image", 404), ("/projects/1/tasks/1/image?control=x", 404), ("/projects/1/tasks/1/image?side=1", 400),
        ("/projects/1/tasks/1/image?side=99999999", 400), ("/projects/1/comparisons", 200), ("/projects/1/prequential", 200),
        ("/jobs?project=1", 200),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_told_in_words(here: World, path: str, status: int) -> None:
    here.label(1)
    answer = here.client.get(path)
    assert answer.status_code == status, answer.get_data(as_text=True)
    if status != 200:
        assert answer.get_json()["error"]["message"]


def test_the_first_config_that_is_seen_makes_nothing_later(here: World) -> None:
    here.label(1)
    with here.services.journal.reading() as session:
        assert session.get_one(Project, "1").names_since == {}
        assert session.get_one(Task, ("1", 1)).images
