"""Rounds: what they are made of, the decision, kills and lost answers, sweeps, and Label Studio moved along."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from backend import keeper, split
from backend import sweep as sweeping
from backend.judges import decide
from backend.lease import JournalLease
from backend.snapshot import merged_schema
from backend.sweep import sweep
from backend.tables import Annotation, Group, Job, Project
from backend_world import BAD, CONFIG, GOOD, World, world
from kptllm_core.errors import Unavailable
from label_config.schema import parse
from small_server import Answer


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def job_row(here: World) -> Job:
    with here.services.journal.reading() as session:
        return session.scalars(select(Job).order_by(Job.round.desc())).all()[0]


def set_job(here: World, **values: Any) -> None:
    here.services.journal.write(lambda session: session.execute(update(Job).values(**values)))


# ---------------------------------------------------------------- the decision


def score(low: float, high: float, nme: float = 0.1) -> dict[str, Any]:
    return {"pck": {"0.02": 0.0, "0.05": low, "0.1": high, "0.2": 1.0}, "nme": nme, "points": 42}


@pytest.mark.parametrize(
    ("before", "after", "promoted", "words"),
    [
        (
            score(0.4, 0.6),
            score(0.5, 0.6),
            True,
            "Promoted: better on 3 held-out images (42 points) PCK@0.1 0.600 → 0.600, PCK@0.05 0.400 → 0.500",
        ),
        (score(0.4, 0.6), score(0.4, 0.5), False, "Not promoted: worse"),
        (score(0.4, 0.6), score(0.3, 0.7), True, "as good as before"),
        (score(0.4, 0.6), score(0.4, 0.6, 0.2), False, "larger error"),
        (score(0.4, 0.6), score(0.5, 0.7, 0.3), True, "mean error 0.100 → 0.300"),
        (None, score(0.4, 0.6), False, "previous version"),
        (score(0.4, 0.6), None, False, "new version"),
        (score(0.4, 0.6), {"pck": {"0.05": 1}}, False, "new version"),
        (score(0.4, 0.6), score(float("nan"), 0.6), False, "no numbers"),
        (score(0.4, 0.6), score(0.5, 0.6, None), False, "no numbers"),  # type: ignore[arg-type]
    ],
)
def test_the_rule_of_promotion(before: Any, after: Any, promoted: bool, words: str) -> None:
    serves, reason = decide(before, after, 3)
    assert serves is promoted
    assert words in reason


# ---------------------------------------------------------------- a round from start to end


def test_a_better_round_serves_and_says_why(here: World) -> None:
    here.label(*range(1, 13))
    before = here.setup().get_json()["model_version"]
    job = here.play_round()
    status = here.status()
    assert job["state"] == "done" and job["promoted"] is True
    assert (job["train_images"], job["heldout_images"]) == (7, 5)
    assert job["snapshot_hash"] == hashlib.sha256(json.dumps(job_row(here).snapshot, sort_keys=True).encode()).hexdigest()
    assert "Promoted: better on 5 held-out images" in job["message"]
    after = here.setup().get_json()["model_version"]
    assert after == job["model_version"] == status["model_version"]
    assert after.startswith("timed-00000000+r1+s7.")
    version = status["versions"][-1]
    assert version["active"] and version["before"] == BAD and version["after"] == GOOD
    assert version["adapter"] == "timed-00000000+p1+r1" and version["parent"] == before
    (prediction,) = here.predict(here.task(50))
    assert prediction["model_version"] == after
    assert here.predictor.switched[-1] == "timed-00000000+p1+r1"
    versions = here.client.get("/projects/1/versions").get_json()["versions"]
    assert versions[0] == after and before in versions


def test_a_worse_round_is_kept_and_does_not_serve_until_a_person_says_so(here: World) -> None:
    here.figures = (GOOD, BAD)
    here.label(*range(1, 13))
    before = here.setup().get_json()["model_version"]
    job = here.play_round()
    assert job["promoted"] is False
    assert here.setup().get_json()["model_version"] == before
    answer = here.client.post(f"/projects/1/versions/{job['model_version']}/activate")
    assert answer.get_json()["model_version"] == job["model_version"] == here.setup().get_json()["model_version"]
    here.client.post(f"/projects/1/versions/{before}/activate")
    assert here.setup().get_json()["model_version"] == before


def test_held_out_images_judge_for_ever_and_are_never_shown(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    first = {i["image"] for i in job_row(here).snapshot["heldout"]}  # type: ignore[index]
    here.label(*range(13, 41))
    assert here.play_round()["round"] == 2
    snapshot = job_row(here).snapshot
    assert snapshot is not None
    judged, taught, shown = ({i["image"] for i in snapshot[k]} for k in ("heldout", "train", "support"))
    assert first < judged and (len(first), len(judged)) == (5, 8)
    assert not judged & taught and not judged & shown
    assert len(taught) == 32 and len(shown) == 20
    assert snapshot["parent"] == "timed-00000000+p1+r1"
    support = {e["task"] for e in here.services.journal.active("1").support}
    with here.services.journal.reading() as session:
        heldout = {int(g.group[5:]) for g in session.scalars(select(Group).where(Group.use == split.HELDOUT))}
    assert not support & heldout


def test_the_same_picture_under_two_tasks_never_judges_what_it_taught(here: World) -> None:
    for task in range(1, 13):
        here.studio.routes[f"/data/upload/1/{task}.png"] = Answer(
            body=(here.task(1), here.studio.routes["/data/upload/1/1.png"])[1].body
        )  # type: ignore[union-attr]
    here.label(*range(1, 13))
    job = here.play_round()
    assert job["state"] == "failed"
    assert "train" in job["message"]


def test_a_second_start_joins_the_first(here: World) -> None:
    here.label(*range(1, 11))
    first = here.webhook("START_TRAINING")
    second = here.webhook("START_TRAINING")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.get_json()["job"] == second.get_json()["job"]
    assert "not finished yet" in second.get_json()["message"]
    assert here.client.post("/job_status", json={"job": first.get_json()["job"]}).get_json()["job_status"] == "queued"


def test_enough_corrections_start_a_round_by_themselves(here: World) -> None:
    here.label(*range(1, 20))
    here.keeper.tick()
    assert here.status()["job"] is None
    assert here.status()["new_corrections"] == 19
    here.label(20)
    here.tick_until(lambda: (here.status()["job"] or {}).get("state") == "done")
    assert here.status()["job"]["asked_by"] == "20 new corrections"
    assert here.status()["new_corrections"] == 0
    here.label(20, second=7)  # a correction of what was labelled counts, too
    assert here.status()["new_corrections"] == 1


def test_images_that_cannot_be_had_are_left_out_with_the_reason(here: World) -> None:
    here.label(*range(1, 15))
    here.studio.routes["/data/upload/1/3.png"] = Answer(404)
    here.studio.routes["/data/upload/1/4.png"] = Answer(body=b"no image")
    here.webhook("START_TRAINING")
    here.keeper.train()
    message = here.status()["job"]["message"]
    assert "Left out: task 3:" in message and "task 4:" in message
    job = here.play_round()
    assert job["train_images"] + job["heldout_images"] == 12


def test_too_few_usable_images_end_the_round_in_words(here: World) -> None:
    here.label(*range(1, 11))
    here.studio.routes["/data/upload/1/3.png"] = Answer(404)
    job = here.play_round()
    assert job["state"] == "failed"
    assert "Only 9 of 10 needed labelled images can be used. Left out: task 3:" in job["message"]
    assert here.client.post("/job_status", json={"job": job["job"]}).get_json()["job_status"] == "failed"


def test_an_annotation_deleted_before_the_round_is_not_in_it(here: World) -> None:
    here.label(*range(1, 17))
    here.webhook("ANNOTATIONS_DELETED", annotations=[{"id": 1005}])
    job = here.play_round()
    assert job["train_images"] + job["heldout_images"] == 15


def test_a_config_that_changed_meanwhile_keeps_the_result_from_serving(here: World) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 0.5
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] == "running")
    here.setup(CONFIG.replace('"nose"', '"muzzle"'))
    here.tick_until(lambda: here.status()["job"]["state"] == "done")
    job = here.status()["job"]
    assert job["promoted"] is False
    assert "names changed while the round ran" in job["message"]
    refused = here.client.post(f"/projects/1/versions/{job['model_version']}/activate")
    assert refused.status_code == 409
    assert "other keypoint names" in refused.get_json()["error"]["message"]


def test_an_adapter_of_other_names_is_set_aside_and_comes_back_with_them(here: World) -> None:
    here.label(*range(1, 13))
    trained = here.play_round()["model_version"]
    renamed = here.setup(CONFIG.replace('"nose"', '"muzzle"')).get_json()["model_version"]
    assert "+r0+" in renamed
    assert "set aside" in here.status()["versions"][-1]["reason"]
    here.label(20, labels=("tail", "ear"))
    assert here.setup(CONFIG).get_json()["model_version"] == trained


def test_an_adapter_that_a_person_put_aside_does_not_come_back_by_a_change_of_the_config(here: World) -> None:
    here.label(*range(1, 13))
    untrained = here.setup().get_json()["model_version"]
    here.play_round()
    assert here.client.post(f"/projects/1/versions/{untrained}/activate").status_code == 200
    more = CONFIG.replace('<Label value="nose"/>', '<Label value="nose"/><Label value="paw"/>')
    assert "+r0+" in here.setup(more).get_json()["model_version"]


def test_a_failed_trainer_is_told_and_the_next_round_gets_another_number(here: World) -> None:
    here.label(*range(1, 13))
    here.core.jobs._command = lambda folder: [
        "python3", "-c", f"import json; open({str(folder / 'failure.json')!r}, 'w').write(json.dumps(dict(message='The loss became NaN.'))); exit(1)"
    ]  # fmt: skip
    before = here.setup().get_json()["model_version"]
    job = here.play_round()
    assert (job["state"], job["message"]) == ("failed", "The loss became NaN.")
    assert here.setup().get_json()["model_version"] == before
    here.core.jobs._command = here._train
    assert here.play_round()["model_version"].startswith("timed-00000000+r2+")


def test_a_running_round_can_be_cancelled(here: World) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 30.0
    here.webhook("START_TRAINING")
    here.tick_until(lambda: (here.status()["job"]["progress"] or {}).get("step") == 1)
    assert here.status()["job"]["progress"]["eta_seconds"] == 1.0
    job = here.status()["job"]["job"]
    assert here.client.post(f"/projects/1/jobs/{job}/cancel").get_json()["state"] == "cancelled"
    deadline = time.monotonic() + 10
    while here.core.jobs.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert here.core.jobs.running is None


# ---------------------------------------------------------------- kills and lost answers


@pytest.mark.parametrize("state", ["requested", "prepared", "running"])
def test_a_restart_anywhere_goes_on_with_the_same_round(here: World, state: str) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 0.3
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] == state)
    here.services.journal.close()
    here.start()
    here.tick_until(lambda: here.status()["job"]["state"] == "done")
    assert here.status()["job"]["promoted"] is True
    assert len(here.core.jobs._jobs) == 1


def test_an_answer_that_was_lost_is_asked_for_again_and_nothing_runs_twice(here: World) -> None:
    here.label(*range(1, 13))
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] == "running")
    set_job(here, state="prepared", core_job=None)  # killed between the core's answer and the commit
    here.tick_until(lambda: here.status()["job"]["state"] == "done")
    assert len(here.core.jobs._jobs) == 1


def test_a_decision_that_was_taken_is_not_taken_twice(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    versions = here.status()["versions"]
    row = job_row(here)
    here.rounds._conclude(row, {"before": GOOD, "after": BAD}, {})
    assert here.status()["versions"] == versions


def test_a_core_that_lost_its_data_gets_the_snapshot_again(here: World) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 30.0
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.core.jobs.running is not None)
    here.core.jobs.cancel(here.core.jobs.running or "")
    here.tick_until(lambda: not here.core.jobs.running)
    here.core.jobs._jobs.clear()
    set_job(here, state="running", open_key="1", core_job="gone", finished_at=None)
    here.train_seconds = 0.0
    here.tick_until(lambda: here.status()["job"]["state"] == "done")
    assert here.status()["job"]["promoted"] is True


def test_a_core_that_is_down_is_waited_for(here: World) -> None:
    here.label(*range(1, 13))
    here.setup()
    here.stop_core()
    here.webhook("START_TRAINING")
    here.keeper.train()
    job = here.status()["job"]
    assert job["state"] == "requested"
    assert "waiting: The core" in job["message"]
    health = here.client.get("/health").get_json()
    assert health["status"] == "UP" and "cannot be reached" in health["degraded"]["core"]


def test_a_young_journal_takes_a_free_number_at_an_old_core(here: World) -> None:
    here.label(*range(1, 13))
    folder = here.folder / "old"
    folder.mkdir()
    (folder / "adapter.json").write_text("{}")
    here.core.adapters.publish(folder, "timed-00000000+p1+r1")
    assert here.play_round()["model_version"].startswith("timed-00000000+r2+")


# ---------------------------------------------------------------- leases


def test_one_holds_the_lease_and_another_takes_it_when_the_heart_stops(here: World) -> None:
    now = [0.0]
    first, second = (JournalLease(here.services, "x", 10.0, clock=lambda: now[0]) for _ in range(2))
    assert first.hold() and not second.hold()
    now[0] = 9.0
    assert first.hold() and not second.hold()
    now[0] = 18.0
    assert not second.hold()
    now[0] = 19.5
    assert second.hold() and not first.hold()
    second.release()
    assert first.hold()


def test_a_released_lease_is_free_at_once_and_only_the_owner_releases(here: World) -> None:
    first, second = JournalLease(here.services, "x"), JournalLease(here.services, "x")
    assert first.hold()
    second.release()
    assert not second.hold()
    first.release()
    assert second.hold()


def keep_until_done(here: World, seconds: float) -> None:
    """Starts the keeper's threads and waits for the end of the round."""
    here.keeper.start()
    deadline = time.monotonic() + seconds
    while here.status()["job"]["state"] != "done" and time.monotonic() < deadline:
        time.sleep(0.1)


def test_the_keepers_threads_do_the_work_by_themselves(here: World) -> None:
    here.label(*range(1, 13))
    here.webhook("START_TRAINING")
    keep_until_done(here, seconds=20)
    here.keeper.stop()
    assert here.status()["job"]["promoted"] is True


def test_sweeps_go_on_while_a_round_fetches_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with with_token(tmp_path, sweep_seconds=0.2) as here:
        here.serve_api([])
        here.setup()
        here.label(*range(1, 13))
        fetched, swept = threading.Event(), threading.Event()
        monkeypatch.setattr("backend.rounds.usable_images", lambda *_: fetched.wait(20) and None)
        monkeypatch.setattr("backend.rounds.sweep", lambda *_: 0)
        here.rounds.start("1", "a test")
        here.keeper.start()
        monkeypatch.setattr(keeper, "sweep_all", lambda *_: swept.set())
        assert swept.wait(10) and here.status()["job"]["state"] == "requested"
        fetched.set()
        here.keeper.stop()


def test_the_keepers_threads_outlive_a_journal_that_is_gone_for_a_moment(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PAUSE_SECONDS", 0.1)
    really, failures = here.services.journal.reading, 0

    def reading() -> Any:
        nonlocal failures
        if threading.current_thread().name in ("keeper-_hands", "keeper-_coach", "keeper-_backstage") and failures < 6:
            failures += 1
            raise Unavailable("The journal cannot be read.")
        return really()

    monkeypatch.setattr(here.services.journal, "reading", reading)
    here.label(*range(1, 13))
    here.webhook("START_TRAINING")
    keep_until_done(here, seconds=30)
    alive = [thread.is_alive() for thread in here.keeper._threads]
    here.keeper.stop()
    assert failures == 6 and alive == [True] * 5 and here.status()["job"]["promoted"] is True


def test_a_round_whose_images_do_not_fit_the_core_ends_in_words(here: World) -> None:
    here.label(*range(1, 13))
    here.core.images.max_bytes = 200
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] in ("failed", "done"))
    job = here.status()["job"]
    assert job["state"] == "failed" and "CORE_IMAGE_BYTES" in job["message"]


# ---------------------------------------------------------------- Label Studio


def with_token(folder: Path, **more: Any) -> Any:
    return world(folder, label_studio_api_key="0" * 40, **more)


def stored(here: World, *tasks: int, second: int = 0) -> list[dict[str, Any]]:
    """Tasks with annotations as the API shows them."""
    return [
        here.task(t, annotations=[here.annotation(t, second=second)], updated_at=f"2026-01-01T00:00:{t:02}.000000Z")
        for t in tasks
    ]


def test_a_sweep_finds_what_no_webhook_brought(tmp_path: Path) -> None:
    with with_token(tmp_path) as here:
        tasks = stored(here, 1, 2)
        here.serve_api(tasks)
        here.setup()
        here.keeper.tick()
        assert here.status()["labelled"] == 2
        assert here.status()["title"] == "Dogs"
        assert here.client.get("/health").get_json()["degraded"] is None
        assert sweep(here.services, "1") == 0
        here.webhook("ANNOTATION_CREATED", annotation=here.annotation(1), task=here.task(1))
        with here.services.journal.reading() as session:
            assert (
                len(session.scalars(select(Annotation)).all()) == 2
            )  # the webhook that came late after all changed nothing


def test_a_sweep_asks_for_changes_only_and_sees_deletions(tmp_path: Path) -> None:
    with with_token(tmp_path) as here:
        tasks = stored(here, 1, 2, 3)
        here.serve_api(tasks)
        here.setup()
        sweep(here.services, "1")
        tasks[0]["annotations"] = []
        tasks[0]["updated_at"] = "2026-01-01T01:00:00.000000Z"
        here.studio.requests.clear()
        assert sweep(here.services, "1") == 1
        assert here.status()["labelled"] == 2
        (listing,) = [r for r in here.studio.requests if r.path == "/api/tasks/"]
        assert "updated_at" in listing.query["query"][0]
        del tasks[1]  # a deleted task leaves no trace: the sweep over all finds it
        assert sweep(here.services, "1") == 0
        here.services.journal.set_fact("sweep:1", here.services.journal.fact("sweep:1") | {"all_at": 0.0})
        assert sweep(here.services, "1") == 1
        assert here.status()["labelled"] == 1


def test_an_annotation_without_a_result_keeps_no_sweep_from_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Label Studio keeps what a program posts: `result` may be null there."""
    with with_token(tmp_path) as here:
        tasks = stored(here, 1, 2, 3)
        tasks[0]["annotations"] = [here.annotation(1) | {"id": 91, "result": None}]
        tasks[1]["annotations"].append(here.annotation(2) | {"id": 92, "result": "none"})
        here.serve_api(tasks)
        here.setup()
        assert sweep(here.services, "1") == 3
        assert here.status()["labelled"] == 2
        assert "task 2: an annotation is left out" in caplog.text


def test_the_trouble_of_one_project_leaves_the_others_their_sweep(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[str] = []

    def sweep_one(services: Any, project: str) -> int:
        if project in failing:
            raise Unavailable(f"project {project} does not answer")
        swept.append(project)
        return 0

    monkeypatch.setattr(sweeping, "sweep", sweep_one)
    failing = {"1"}
    with pytest.raises(Unavailable, match="project 1"):
        sweeping.sweep_all(here.services, ["1", "2", "3"])
    assert swept == ["2", "3"]
    failing, swept[:] = {"2", "3"}, []
    with pytest.raises(Unavailable, match="project 3"):  # the second in a row: it is Label Studio itself
        sweeping.sweep_all(here.services, ["1", "2", "3", "4"])
    assert swept == ["1"]


def test_an_event_without_content_makes_the_sweep_come_soon(tmp_path: Path) -> None:
    with with_token(tmp_path) as here:
        tasks = stored(here, 1)
        here.serve_api(tasks)
        here.setup()
        here.keeper.tick()
        tasks += stored(here, 5)
        here.client.post("/webhook", json={"action": "ANNOTATION_CREATED"})
        here.tick_until(lambda: here.status()["labelled"] == 2)
        assert here.status()["labelled"] == 2


def test_label_studio_down_or_refusing_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    with with_token(tmp_path) as here:
        here.studio.routes["/api/projects/1/"] = Answer(401)
        here.label(*range(1, 13))
        here.webhook("START_TRAINING")
        here.tick_until(lambda: here.status()["job"]["state"] == "done")
        degraded = here.client.get("/health").get_json()["degraded"]
        assert "401" in degraded["label_studio"] or "token" in degraded["label_studio"].lower()
        assert here.predict(here.task(50))[0]["result"]


def test_the_same_trouble_is_logged_once(here: World, caplog: pytest.LogCaptureFixture) -> None:
    here.stop_core()
    for _ in range(3):
        here.keeper._next_core = 0.0
        here.keeper.tick()
    assert caplog.text.count("the core: The core at") == 1


# ---------------------------------------------------------------- what a snapshot holds


def test_controls_with_points_of_the_same_name_share_them() -> None:
    config = parse("""<View><Image name="i" value="$image"/>
    <KeyPointLabels name="a" toName="i"><Label value="left_eye"/><Label value="right_eye"/></KeyPointLabels>
    <KeyPointLabels name="b" toName="i"><Label value="tail"/><Label value="left_eye"/></KeyPointLabels></View>""")
    schema = merged_schema(config)
    assert schema.names == ("left_eye", "right_eye", "tail")
    assert schema.symmetric == ((0, 1),)


def test_a_snapshot_speaks_of_names_and_pixels_of_the_image_as_it_is(here: World) -> None:
    config = CONFIG.replace('<Label value="nose"/><Label value="tail"/>', '<Label value="tail"/><Label value="nose"/>')
    here.label(*range(1, 13))
    here.setup(config)
    here.play_round()
    snapshot = job_row(here).snapshot
    assert snapshot is not None
    assert snapshot["schema"]["names"] == ["tail", "nose", "ear"]
    for item in snapshot["train"] + snapshot["heldout"]:
        points = dict(zip(item["keypoints"]["names"], item["keypoints"]["xy"], strict=True))
        assert points == {"nose": [6.4, 24.0], "tail": [19.2, 24.0], "ear": [32.0, 24.0]}
    assert copy.deepcopy(snapshot)["seed"] == 1


def test_waiting_is_for_passing_trouble_only() -> None:
    from backend.services import is_passing

    assert is_passing(Unavailable("x"))
    assert Project.__tablename__ == "projects"


def test_a_round_learns_first_what_webhooks_missed(tmp_path: Path) -> None:
    with with_token(tmp_path) as here:
        here.label(*range(1, 11))
        tasks = stored(here, *range(1, 13))
        here.serve_api(tasks)
        here.keeper._next_sweep = here.keeper._next_due_sweep = float("inf")
        job = here.play_round()
        assert job["train_images"] + job["heldout_images"] == 12
