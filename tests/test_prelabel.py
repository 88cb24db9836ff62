"""Batch pre-annotation: one prediction per task and version, whatever is interrupted when."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from backend import prelabel
from backend.prelabel_work import MAX_ATTEMPTS, PrelabelWork, sort_out
from backend.tables import PrelabelTask
from backend_world import CONFIG, World, region, world
from kptllm_core.errors import InvalidInput, Unavailable
from small_label_studio import SmallLabelStudio, label_studio_of, picture
from small_server import Answer, Request, reply

TOKEN = "0123456789abcdef0123456789abcdef01234567"
VERSION = "timed-0+r0+s0.f1951d"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, label_studio_api_key=TOKEN) as made:
        made.services.label_studio._pause = 0.01
        yield made


@pytest.fixture
def studio(here: World) -> SmallLabelStudio:
    return label_studio_of(here)


def work(here: World, stop: threading.Event | None = None, **more: Any) -> PrelabelWork:
    worker = PrelabelWork(here.services, **({"pause": 0.01, "again_seconds": 0.0} | more))
    worker.turn(stop or threading.Event())
    return worker


def state(here: World) -> dict[str, Any]:
    return dict(here.client.get("/projects/1/prelabel").get_json()["prelabel"])


def ask(here: World, **body: Any) -> dict[str, Any]:
    answer = here.client.post("/projects/1/prelabel", json=body)
    assert answer.status_code == 202, answer.get_data(as_text=True)
    return dict(answer.get_json())


def test_every_unlabelled_task_gets_one_prediction_and_a_second_run_none(here: World, studio: SmallLabelStudio) -> None:
    studio.add(11)
    studio.annotate(3, [region("nose", 10, 10)])
    studio.annotate(4, [], was_cancelled=True)
    assert ask(here)["state"] == "running"
    work(here)
    done = state(here)
    assert (done["state"], done["posted"], done["labelled_meanwhile"], done["failed"]) == ("done", 9, 1, 0)
    version = here.services.journal.active("1").name
    assert studio.versions() == {n: [] if n in (3, 4) else [version] for n in range(1, 12)}
    assert all(p["result"] for t in studio.tasks.values() for p in t["predictions"])
    ask(here)
    work(here)
    assert state(here)["there_already"] == 9
    assert studio.calls["POST", "/api/predictions/"] == 9


def test_asking_twice_is_one_run_and_replace_is_added(here: World, studio: SmallLabelStudio) -> None:
    first, second = ask(here), ask(here, replace=True)
    assert first["prelabel"] == second["prelabel"]
    assert second["replace"] is True
    assert here.client.post("/projects/1/prelabel", json={"replace": "yes"}).status_code == 400
    assert here.client.post("/projects/1/prelabel").status_code == 202  # without a body


def test_more_tasks_than_a_page_holds(here: World, studio: SmallLabelStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.prelabel_work.PAGE", 5)
    studio.add(13)
    ask(here)
    work(here)
    assert state(here)["posted"] == 13
    assert all(len(v) == 1 for v in studio.versions().values())


def test_older_versions_are_replaced_only_when_asked_to(here: World, studio: SmallLabelStudio) -> None:
    studio.add(3)
    for task in studio.tasks:
        studio.predict(task, "nano-1a2b3c4d+r1+s5.9f31ab", [region("nose", 1, 1)])
        studio.predict(task, "somebody-elses-model", [region("nose", 1, 1)])
    ask(here)
    work(here)
    version = here.services.journal.active("1").name
    assert all(v == sorted(["nano-1a2b3c4d+r1+s5.9f31ab", "somebody-elses-model", version]) for v in studio.versions().values())
    ask(here, replace=True)
    work(here)
    assert all(v == sorted(["somebody-elses-model", version]) for v in studio.versions().values())
    assert studio.calls["POST", "/api/predictions/"] == 3


def test_a_version_that_comes_to_serve_in_the_middle_replaces_what_was_posted(here: World, studio: SmallLabelStudio) -> None:
    studio.add(9)

    def promote(request: Request) -> None:
        if studio.calls["POST", "/api/predictions/"] == 4:
            here.services.journal.record("1", *labelled(here, 50))

    studio.before["POST", "/api/predictions/"] = promote
    ask(here, replace=True)
    work(here)
    version = here.services.journal.active("1").name
    assert "+s1." in version
    assert all(v == [version] for v in studio.versions().values())


def labelled(here: World, task: int) -> tuple[Any, Any]:
    from backend.intake import annotation_row, task_row
    from label_config.schema import parse

    config = parse(CONFIG)
    return [task_row("1", here.task(task), config)], [annotation_row("1", here.annotation(task), task, config)]


@pytest.mark.parametrize("arrives", [True, False], ids=["answer lost", "request lost"])
def test_a_post_whose_answer_is_lost_is_looked_for_before_it_is_repeated(here: World, studio: SmallLabelStudio, arrives: bool) -> None:
    studio.add(6)
    lost: list[int] = []

    def lose(request: Request) -> Answer | None:
        if len(lost) >= 3:
            return None
        lost.append(request.json()["task"])
        if arrives:
            studio.usual(request)
        return Answer(raw=lambda out: None)  # the connection just ends

    studio.before["POST", "/api/predictions/"] = lose
    ask(here)
    work(here)
    assert state(here)["failed"] == 0
    assert all(len(v) == 1 for v in studio.versions().values())
    assert studio.calls["POST", "/api/predictions/"] == (6 if arrives else 9)


def test_label_studio_may_have_stored_one_itself_meanwhile(here: World, studio: SmallLabelStudio) -> None:
    """It asks /predict when a task is opened: two are on their way at a time, one stays."""
    studio.add(4)

    def meanwhile(request: Request) -> None:
        studio.predict(request.json()["task"], request.json()["model_version"], [region("nose", 1, 1)])

    studio.before["POST", "/api/predictions/"] = meanwhile
    ask(here)
    work(here)
    assert all(len(v) == 1 for v in studio.versions().values())
    assert state(here)["posted"] == 4


def test_one_bad_image_fails_alone_and_says_why(here: World, studio: SmallLabelStudio) -> None:
    studio.add(5)
    here.studio.routes["/data/upload/1/2.png"] = Answer(404)
    here.studio.routes["/data/upload/1/3.png"] = Answer(503)
    ask(here)
    work(here)
    done = state(here)
    assert (done["state"], done["posted"], done["failed"]) == ("done", 3, 2)
    assert [f["task"] for f in done["failures"]] == [2, 3]
    assert "is not there (404)" in done["failures"][0]["message"]
    with here.services.journal.reading() as session:
        attempts = {row[0]: row[1] for row in session.execute(select(PrelabelTask.task, PrelabelTask.attempts))}
    assert attempts[2] == 1
    assert attempts[3] == MAX_ATTEMPTS
    assert studio.versions()[2] == studio.versions()[3] == []
    here.studio.routes["/data/upload/1/3.png"] = here.studio.routes["/data/upload/1/1.png"]
    ask(here)  # a new run takes up what failed
    work(here)
    assert (state(here)["posted"], state(here)["there_already"], state(here)["failed"]) == (1, 3, 1)


def test_a_task_deleted_meanwhile(here: World, studio: SmallLabelStudio) -> None:
    studio.add(4)

    def delete(request: Request) -> None:
        studio.tasks.pop(2, None)

    studio.before["POST", "/api/predictions/"] = delete
    ask(here)
    work(here, concurrency=1)
    done = state(here)
    assert (done["state"], done["posted"], done["gone"]) == ("done", 3, 1)


def test_cancel_and_progress(here: World, studio: SmallLabelStudio) -> None:
    studio.add(30)

    def cancel(request: Request) -> None:
        if studio.calls["POST", "/api/predictions/"] == 9:
            running = state(here)
            assert running["active"] and running["listed"] and running["total"] == 30
            assert 0 < running["finished"] < 30
            assert here.client.post("/projects/1/prelabel/cancel").get_json()["state"] == "cancelled"

    studio.before["POST", "/api/predictions/"] = cancel
    ask(here)
    work(here)
    assert state(here)["state"] == "cancelled"
    posted = studio.calls["POST", "/api/predictions/"]
    assert posted <= 9 + 8  # those already on their way
    studio.before.clear()
    ask(here)
    work(here)
    assert state(here)["state"] == "done"
    assert all(len(v) == 1 for v in studio.versions().values())


def test_while_the_core_is_down_the_run_waits_and_counts_no_attempt(here: World, studio: SmallLabelStudio) -> None:
    studio.add(3)
    ask(here)
    here.stop_core()
    stop = threading.Event()
    worker = PrelabelWork(here.services, pause=0.01)
    thread = threading.Thread(target=worker.turn, args=(stop,))
    thread.start()
    until(lambda: worker.trouble is not None)
    stop.set()
    thread.join()
    waiting = state(here)
    assert waiting["active"] and waiting["message"].startswith("waiting: The core")
    with here.services.journal.reading() as session:
        assert set(session.scalars(select(PrelabelTask.attempts))) <= {0}
    assert here.client.get("/health").get_json()["degraded"]["core"]


def test_an_image_that_ends_the_core_fails_after_some_attempts_and_the_others_go_on(
    here: World, studio: SmallLabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = studio.add(6)
    sha = hashlib.sha256(picture(tasks[2])).hexdigest()
    really, ended = here.services.core.predict, 0

    def predict(schema: Any, support: Any, queries: Any, *args: Any, **options: Any) -> Any:
        nonlocal ended
        if any(query.image == sha for query in queries):
            ended += 1
            here.stop_core()
            threading.Timer(0.1, here.restart_core).start()
            raise Unavailable("The core is gone.")
        return really(schema, support, queries, *args, **options)

    monkeypatch.setattr(here.services.core, "predict", predict)
    ask(here)
    work(here, concurrency=1)
    found = state(here)
    assert ended == MAX_ATTEMPTS and found["state"] == "done" and found["failed"] == 1
    assert [bool(v) for v in studio.versions().values()] == [task != tasks[2] for task in tasks]


def test_label_studio_down_in_the_middle(here: World, studio: SmallLabelStudio) -> None:
    studio.add(12)
    down = [False]

    def trouble(request: Request) -> Answer | None:
        if studio.calls["POST", "/api/predictions/"] == 5 and not down[0]:
            down[0] = True
            threading.Timer(0.3, studio.before.clear).start()
            for call in (("GET", "/api/"), ("POST", "/api/"), ("DELETE", "/api/")):
                studio.before[call] = lambda request: reply({"detail": "locked"}, 500)
        return reply({"detail": "locked"}, 500) if down[0] else None

    studio.before["POST", "/api/predictions/"] = trouble
    ask(here)
    work(here)
    assert state(here)["state"] == "done"
    assert all(len(v) == 1 for v in studio.versions().values())


def test_what_an_outage_left_empty_is_replaced_when_things_work_again(here: World, studio: SmallLabelStudio) -> None:
    studio.add(4)
    here.setup()
    here.keeper._see_core()
    here.stop_core()
    answers = here.predict(*(studio.tasks[n] for n in (1, 2, 3)))
    assert all(a["model_version"].endswith("+retry") for a in answers)
    for number, answer in zip((1, 2, 3), answers, strict=True):
        studio.predict(number, answer["model_version"])
    studio.annotate(3, [region("nose", 10, 10)])
    here.predict(studio.tasks[1])  # asked for again: still one task
    assert here.client.get("/projects/1/prelabel").get_json()["again"]["waiting"] == 3
    assert state_or_none(here) is None
    here.restart_core()
    work(here)
    version = here.services.journal.active("1").name
    assert studio.versions() == {1: [version], 2: [version], 3: [], 4: []}
    assert here.client.get("/projects/1/prelabel").get_json()["again"] is None


def state_or_none(here: World) -> Any:
    return here.client.get("/projects/1/prelabel").get_json()["prelabel"]


def test_clicks_of_a_smart_tool_are_not_stored_and_so_not_repeated(here: World, studio: SmallLabelStudio) -> None:
    studio.add(1)
    here.setup()
    here.stop_core()
    here.predict(studio.tasks[1], context={"result": [region("nose", 10, 10)]})
    assert here.client.get("/projects/1/prelabel").get_json()["again"] is None


def test_without_a_token_it_says_what_to_set(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        answer = here.client.post("/projects/1/prelabel", json={})
        assert answer.status_code == 400
        assert "LABEL_STUDIO_API_KEY" in answer.get_json()["error"]["message"]
        here.setup()
        here.stop_core()
        here.predict(here.task(1))  # leaves no trace, and does not fail
        with pytest.raises(InvalidInput):
            prelabel.start(here.services, "1")
    assert here.client.post("/projects/1/prelabel/cancel").status_code in (404, 503)


def test_only_one_process_works_on_a_run(here: World, studio: SmallLabelStudio) -> None:
    studio.add(2)
    ask(here)
    run = prelabel.open_runs(here.services)[0]
    first, second = PrelabelWork(here.services), PrelabelWork(here.services)
    from backend.lease import JournalLease

    other = JournalLease(here.services, f"prelabel:{run}")
    assert other.hold()
    first.turn(threading.Event())
    second.turn(threading.Event())
    assert studio.calls["POST", "/api/predictions/"] == 0
    other.release()
    first.turn(threading.Event())
    assert studio.calls["POST", "/api/predictions/"] == 2


def test_what_is_deleted() -> None:
    def p(number: int, version: str, result: Any = ("x",)) -> dict[str, Any]:
        return {"id": number, "model_version": version, "result": list(result)}

    now, old = "nano-0+r2+s5.9f31ab", "nano-0+r1+s5.000000"
    all_of_them = [p(9, now), p(3, now), p(1, old), p(2, now + "+retry", ()), p(4, "other"), p(5, now + "+retry"), p(6, "")]
    assert sort_out(all_of_them, now, replace=False) == (3, [2, 9])
    assert sort_out(all_of_them, now, replace=True) == (3, [1, 2, 5, 9])
    assert sort_out([p(1, old)], now, replace=True) == (None, [])  # nothing is taken away before something is there


def until(done: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


# ---------------------------------------------------------------- processes that are killed

WORKER = """
import sys, threading
from backend import prelabel
from backend.model import KptLLMBackend
from backend.prelabel_work import PrelabelWork
from backend.services import Services
from backend.settings import Settings
services = Services.make(Settings.from_env())
KptLLMBackend.connect(services)
run = prelabel.start(services, "1")
work = PrelabelWork(services, pause=0.05, lease_seconds=0.3)
while prelabel.get(services, run.id).open_key is not None:
    work.turn(threading.Event(), run.id)
    threading.Event().wait(0.1)
"""


def environment(here: World) -> dict[str, str]:
    given = {"LABEL_STUDIO_URL": here.settings.label_studio_url, "LABEL_STUDIO_API_KEY": TOKEN, "CORE_URL": here.settings.core_url,
             "DATA_DIR": str(here.settings.data_dir), "DATABASE_URL": here.settings.database_url}  # fmt: skip
    return {**os.environ, **given}


def test_killed_at_random_moments_it_ends_with_one_prediction_per_task(here: World, studio: SmallLabelStudio) -> None:
    studio.add(60)
    slow = random.Random(7)

    def hesitate(request: Request) -> Answer | None:
        """Half of the time before it is stored, half of the time between that and the answer: kills fall into both."""
        if slow.random() < 0.5:
            time.sleep(0.03)
            return None
        answer = studio.usual(request)
        time.sleep(0.03)
        return answer

    studio.before["POST", "/api/predictions/"] = hesitate
    kills = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", WORKER], env=environment(here))
        already = studio.calls["POST", "/api/predictions/"]
        wanted = already + slow.randint(3, 17)
        while process.poll() is None and (kills >= 3 or studio.calls["POST", "/api/predictions/"] < wanted):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0
    assert kills == 3
    done = state(here)
    assert (done["state"], done["failed"], done["finished"]) == ("done", 0, 60)
    assert all(len(v) == 1 for v in studio.versions().values())


def test_the_command(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    studio.add(3)
    here.studio.routes["/data/upload/1/2.png"] = Answer(404)
    words = [sys.executable, "-m", "backend", "prelabel", "--project", "1"]

    def run(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, *more], env=environment(here) | variables, capture_output=True, text=True, timeout=120)

    here.services.journal.observe("1", CONFIG, here.services.see_core())
    done = run("--replace")
    assert done.returncode == 1, done.stderr
    assert "2 predictions posted, 1 failed" in done.stdout
    assert "task 2: " in done.stdout
    assert [len(v) for v in studio.versions().values()] == [1, 0, 1]
    assert state(here)["replace"] is True
    assert run("--status").returncode == 1
    assert run("--cancel").stdout.startswith("Project 1, done: ")
    refused = run(LABEL_STUDIO_API_KEY="")
    assert refused.returncode == 1
    assert "LABEL_STUDIO_API_KEY" in refused.stderr
    assert "Traceback" not in refused.stderr
    refused = run("--replace", DATABASE_URL=f"sqlite:///{tmp_path}/other.db")
    assert refused.returncode == 1
    assert "knows nothing of project 1" in refused.stderr
    studio.project["model_version"] = version = here.services.journal.active("1").name
    refused = run(DATABASE_URL=f"sqlite:///{tmp_path}/other.db")
    assert refused.returncode == 1
    assert f"knows nothing of project 1, which {version} serves" in refused.stderr
    here.stop_core()
    refused = run()
    assert refused.returncode == 1
    assert "The core at" in refused.stderr


def test_the_command_learns_first_what_was_labelled_while_no_backend_ran(here: World, studio: SmallLabelStudio) -> None:
    labelled, _ = studio.add(2)
    studio.annotate(labelled, [region("nose", 30, 40), region("tail", 60, 50)])
    done = subprocess.run([sys.executable, "-m", "backend", "prelabel", "--project", "1"], env=environment(here), capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert studio.versions()[2] == [here.services.journal.active("1").name]
    assert here.services.journal.candidates("1")


def test_the_command_says_that_it_waits(here: World, studio: SmallLabelStudio) -> None:
    studio.add(1)
    studio.before["GET", "/api/projects/1/"] = lambda request: time.sleep(0.7)

    def refuse_once(request: Request) -> Answer:
        del studio.before["POST", "/api/predictions/"]
        return Answer(503)

    studio.before["POST", "/api/predictions/"] = refuse_once
    code = "import sys; from backend import __main__, prelabel_command as p; p.SIGN_SECONDS = 0.3; sys.exit(__main__.main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "prelabel", "--project", "1"]
    done = subprocess.run(words, env=environment(here), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"Waiting for Label Studio at {here.studio.url} and the core at {here.settings.core_url} … (0 s)" in done.stderr
    assert f"s: Label Studio at {here.studio.url} answered POST /api/predictions/ with 503" in done.stderr.partition("Nothing has moved for ")[2]


def test_the_command_interrupted_leaves_the_run_open(here: World, studio: SmallLabelStudio) -> None:
    studio.add(40)
    studio.before["POST", "/api/predictions/"] = lambda request: time.sleep(0.05)
    words = [sys.executable, "-m", "backend", "prelabel", "--project", "1"]
    process = subprocess.Popen(words, env=environment(here), stderr=subprocess.PIPE, text=True)
    until(lambda: studio.calls["POST", "/api/predictions/"] >= 5 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "The run stays open" in said
    assert state(here)["active"]
    studio.before.clear()
    work(here)  # the lease was given back: no waiting
    assert state(here)["state"] == "done"
    assert all(len(v) == 1 for v in studio.versions().values())
