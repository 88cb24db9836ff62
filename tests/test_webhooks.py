"""The secret on Label Studio's webhook: who puts it there, and what is refused without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no test shall wait for within its time
from backend.connect import SECRET_HEADER
from backend_world import CONFIG, World, world
from small_server import Request, reply

OURS, OTHER = "http://backend/webhook", "https://other.example/hook"


class Hooks:
    """Label Studio's webhooks of project 1."""

    def __init__(self, here: World) -> None:
        self.hooks: list[dict[str, Any]] = [{"id": 1, "url": OTHER, "headers": {}}, {"id": 2, "url": OURS, "headers": {"X-Theirs": "1"}}]
        here.serve_api([])
        here.studio.routes["/api/webhooks/"] = lambda _: reply(self.hooks)
        for hook in self.hooks:
            here.studio.routes[f"/api/webhooks/{hook['id']}/"] = self.change

    def change(self, request: Request) -> Any:
        hook = next(h for h in self.hooks if request.path.endswith(f"/{h['id']}/"))
        hook |= request.json()
        return reply(hook)

    @property
    def secret(self) -> str:
        return str(self.hooks[1]["headers"].get(SECRET_HEADER, ""))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, label_studio_api_key="0" * 40) as made:
        made.setup()
        yield made


def send(here: World, secret: str | None = None, action: str = "ANNOTATION_CREATED", path: str = "/webhook", project: int = 1) -> int:
    body = {"action": action, "project": {"id": project, "label_config": CONFIG}, "annotation": here.annotation(1), "task": here.task(1)}
    headers = {} if secret is None else {SECRET_HEADER: secret}
    return int(here.client.post(path, json=body, headers=headers).status_code)


def sweep(here: World) -> None:
    here.keeper._next_sweep = 0.0
    here.turn()


def test_the_backend_signs_its_webhook_and_demands_the_secret_from_then_on(here: World) -> None:
    studio = Hooks(here)
    assert send(here) == 200, "no webhook has it yet"
    sweep(here)
    assert len(studio.secret) >= 32 and studio.hooks[1]["headers"]["X-Theirs"] == "1"
    assert studio.hooks[0]["headers"] == {}, "nobody else is told"
    for path in ("/webhook", "/projects/1/webhook"):
        assert [send(here, secret, path=path) for secret in (None, "", "x", studio.secret)] == [401, 401, 401, 200]
    assert send(here, action="START_TRAINING") == 200, "Label Studio's button carries no header"
    assert send(here, project=2) == 200, "another project, whose webhook nobody signed"
    here.start()  # a restart: the secret is kept
    assert [send(here), send(here, studio.secret)] == [401, 200]
    assert all(studio.secret not in here.client.get(path).get_data(as_text=True) for path in ("/projects/1/status", "/projects/1/", "/metrics"))


def test_a_webhook_that_was_made_anew_is_signed_by_the_next_sweep(here: World) -> None:
    studio = Hooks(here)
    sweep(here)
    secret, studio.hooks[1]["headers"] = studio.secret, {}
    sweep(here)
    assert studio.secret == secret
    here.studio.requests.clear()
    sweep(here)
    assert not [r for r in here.studio.requests if r.method == "PATCH" and "webhooks" in r.path]


def test_the_secret_of_the_settings_comes_first(tmp_path: Path) -> None:
    with world(tmp_path, label_studio_api_key="0" * 40, webhook_secret="of-ours") as here:
        here.setup()
        studio = Hooks(here)
        assert send(here) == 401
        sweep(here)
        assert studio.secret == "of-ours"
        assert send(here, "of-ours") == 200


def test_with_basic_auth_a_signed_webhook_needs_no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world(tmp_path, label_studio_api_key="0" * 40, basic_auth_user="me", basic_auth_pass="word") as here:
        here.client.post("/setup", json={"project": "1", "schema": CONFIG}, auth=("me", "word"))
        studio = Hooks(here)
        assert send(here) == 401
        sweep(here)
        assert [send(here), send(here, "x"), send(here, studio.secret)] == [401, 401, 200]
        assert send(here, action="START_TRAINING") == 401, "with basic auth the button brings the login"
        monkeypatch.setattr("backend.app.strict_json", lambda _: pytest.fail("parsed for somebody without a login"))
        assert [send(here), send(here, "x")] == [401, 401]


def test_without_a_webhook_of_ours_nothing_is_demanded(here: World) -> None:
    studio = Hooks(here)
    del studio.hooks[1]
    sweep(here)
    assert send(here) == 200
