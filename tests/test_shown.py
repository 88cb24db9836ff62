"""What Label Studio shows beside the version that serves: predictions, and scores to sort by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no test shall wait for within its time
from backend.tables import Event
from backend_world import World, world
from small_server import reply

OLD = "timed-00000000+r0+s2.aaaaaa"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("backend.keeper.PAUSE_SECONDS", 0.0)
    with world(tmp_path, label_studio_api_key="0" * 40) as made:
        yield made


def stored(here: World, *tasks: int) -> list[dict[str, Any]]:
    """Tasks with annotations as the API shows them."""
    return [here.task(t, annotations=[here.annotation(t)], updated_at=f"2026-01-01T00:00:{t:02}.000000Z") for t in tasks]


def title(here: World) -> str:
    (model,) = here.services.label_studio.ml_backends(1)
    return str(model["title"])


def settle(here: World) -> str:
    """Until Label Studio shows what it should; the version that serves."""
    here.setup()
    here.keeper._next_sweep = 0.0
    here.turn()
    here.tick_until(lambda: here.status()["label_studio_follows"])
    return str(here.status()["model_version"])


@pytest.mark.parametrize("shown", ["", "KptLLM", OLD])
def test_the_model_carries_the_name_of_the_version_that_serves(here: World, shown: str) -> None:
    """Under any other title Label Studio has no prediction scores to sort by."""
    project = here.serve_api(stored(here, 1, 2), model_version=shown)
    assert settle(here) == title(here) == project["model_version"]
    here.label(3, 4, 5)
    assert settle(here) == title(here) == project["model_version"]
    here.studio.requests.clear()
    here.keeper._next_sweep = 0.0
    here.turn()
    assert not [r for r in here.studio.requests if r.method == "PATCH"], "all is as it should be: nothing is written"


def test_a_title_that_a_person_gave_stays(here: World) -> None:
    project = here.serve_api(stored(here, 1, 2), model_version="", live="Our model")
    settle(here)
    assert project["model_version"] == title(here) == "Our model"
    here.label(3, 4, 5)
    settle(here)
    assert project["model_version"] == title(here) == "Our model"


def test_other_models_are_left_alone(here: World) -> None:
    project = here.serve_api(stored(here, 1, 2), model_version="yolo-v8")
    settle(here)
    assert (project["model_version"], title(here)) == ("yolo-v8", "KptLLM")
    here.studio.routes["/api/projects/1/model-versions/"] = lambda _: reply(
        {"live": [{"id": 5, "title": "YOLO", "url": "http://other", "model_version": "v8"}], "static": []}
    )
    project["model_version"] = "YOLO"
    here.label(3, 4, 5)
    settle(here)
    assert project["model_version"] == "YOLO"
    assert not [r for r in here.studio.requests if r.path.startswith("/api/ml/")]


def test_without_the_model_attached_a_version_is_shown_once_predictions_of_it_exist(here: World) -> None:
    tasks = stored(here, *range(1, 13))
    project = here.serve_api(tasks, model_version=OLD, live="")
    here.setup()
    here.keeper.tick()
    job = here.play_round()
    assert project["model_version"] == OLD
    assert here.status()["label_studio_follows"] is False
    tasks[0]["predictions"] = [{"model_version": job["model_version"]}]
    here.keeper.tick()
    assert project["model_version"] == job["model_version"]
    assert here.status()["label_studio_follows"] is True


def test_a_project_that_is_pinned_to_an_old_version_later_is_moved_along(here: World) -> None:
    project = here.serve_api(stored(here, 1), model_version="KptLLM")
    now = settle(here)
    project["model_version"] = OLD
    here.keeper._next_sweep = 0.0
    here.tick_until(lambda: project["model_version"] == now)
    with here.services.journal.reading() as session:
        (event,) = session.scalars(select(Event).where(Event.action == "MOVE_ALONG"))
    assert event.about == {"from": OLD, "to": now}
    project["model_version"] = "yolo-v8"  # another model is somebody's own choice
    here.keeper._next_sweep = 0.0
    here.turn()
    here.turn()
    assert project["model_version"] == "yolo-v8"


def test_a_model_that_cannot_be_renamed_just_now_is_asked_all_the_same(here: World) -> None:
    project = here.serve_api(stored(here, 1, 2), model_version="")
    rename = here.studio.routes["/api/ml/5"]
    here.studio.routes["/api/ml/5"] = reply({"non_field_errors": ["Can't connect to ML backend, health check failed."]}, 400)
    here.setup()
    here.turn()
    assert project["model_version"] == "KptLLM" and here.status()["label_studio_follows"] is False
    here.studio.routes["/api/ml/5"] = rename
    assert settle(here) == title(here) == project["model_version"]


def test_the_login_of_a_model_outlasts_its_new_title(here: World) -> None:
    sent: list[dict[str, Any]] = []
    here.studio.routes["/api/ml/5"] = lambda request: (sent.append(request.json()), reply({"id": 5}))[1]
    model = {"id": 5, "url": "http://backend", "auth_method": "BASIC_AUTH", "basic_auth_user": "me"}
    here.services.label_studio.rename_backend(model, 1, "new")
    here.services.label_studio.rename_backend(model | {"auth_method": "NONE"}, 1, "new")
    assert sent[0] == {"project": 1, "url": "http://backend", "title": "new", "auth_method": "BASIC_AUTH", "basic_auth_user": "me",
                       "basic_auth_pass": ""}  # fmt: skip
    assert sent[1] == {"project": 1, "url": "http://backend", "title": "new"}
