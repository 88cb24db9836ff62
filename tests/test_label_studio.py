"""The client of Label Studio: tokens, retries, redirects and errors on a small server; every call on the real one."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from backend.demo.services import Login
from backend.images import ImageFetcher
from backend.label_studio import LabelStudio
from backend.settings import Settings
from backend.transport import climbs
from kptllm_core.errors import InvalidInput, KptError, NotFound, TooLarge, Unauthorized, Unavailable
from small_server import Answer, Request, SmallServer, certificate_for, no_proxies, reply  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_proxies")
LEGACY = "0123456789abcdef0123456789abcdef01234567"
PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbl90eXBlIjoicmVmcmVzaCJ9.c2lnbmF0dXJl"
WHO = "/api/current-user/whoami"


@pytest.fixture
def server() -> Iterator[SmallServer]:
    with SmallServer() as running:
        running.routes[WHO] = reply({"id": 1})
        yield running


def client(url: str, token: str = LEGACY, **more: Any) -> LabelStudio:
    return LabelStudio(url, token, pause=0.001, **more)


def access_token(seconds: float, number: int = 0) -> str:
    claims = {"iat": 1_000, "exp": 1_000 + seconds, "jti": number}
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJh.{payload}.c2ln{number}"


def failing(times: int, status: int = 503, then: Answer | None = None) -> Callable[[Request], Answer]:
    left = [times]

    def answer(request: Request) -> Answer:
        left[0] -= 1
        return Answer(status) if left[0] >= 0 else then or reply({"id": 1})

    return answer


# ---- tokens ---------------------------------------------------------------------------------------------------------
def test_a_legacy_token(server: SmallServer) -> None:
    assert client(server.url).me() == {"id": 1}
    assert server.requests[0].headers["Authorization"] == f"Token {LEGACY}"


def test_a_personal_token_buys_access_and_renews_it_in_time(server: SmallServer) -> None:
    bought: list[str] = []

    def sell(request: Request) -> Answer:
        assert request.json() == {"refresh": PERSONAL} and "Authorization" not in request.headers
        bought.append(access_token(300 if not bought else 2, len(bought)))
        return reply({"access": bought[-1]})

    server.routes["/api/token/refresh/"] = sell
    studio = client(server.url, PERSONAL)
    for _ in range(3):
        studio.me()
    assert len(bought) == 1 and server.requests[-1].headers["Authorization"] == f"Bearer {bought[0]}"
    server.routes[WHO] = lambda request: (
        reply({"id": 1}) if request.headers["Authorization"] != f"Bearer {bought[0]}" else Answer(401)
    )
    assert studio.me() == {"id": 1} and len(bought) == 2  # refused once, renewed once
    time.sleep(1.7)  # the second one is good for two seconds
    studio.me()
    assert len(bought) == 3


@pytest.mark.parametrize(
    ("token", "detail", "words"),
    [
        ("", "Authentication credentials were not provided.", "none was given"),
        (LEGACY, "Invalid token.", "does not know the given legacy token"),
        (
            LEGACY,
            "Authentication token no longer valid: legacy token authentication has been disabled for this organization",
            r"legacy tokens switched off.*personal access token.*API Tokens Settings → Legacy Tokens",
        ),
        (PERSONAL, "Authentication credentials were not provided.", "does not accept personal access tokens"),
    ],
)
def test_what_a_401_means(server: SmallServer, token: str, detail: str, words: str) -> None:
    server.routes["/api/token/refresh/"] = reply({"access": access_token(300)})
    server.routes[WHO] = reply({"detail": detail}, 401)
    with pytest.raises(Unauthorized, match=words) as caught:
        client(server.url, token).me()
    for secret in (token, access_token(300)):
        assert not secret or secret not in str(caught.value.to_json())


def test_a_personal_token_that_is_refused(server: SmallServer) -> None:
    server.routes["/api/token/refresh/"] = reply({"detail": "Token is invalid"}, 401)
    with pytest.raises(Unauthorized, match="cut short") as caught:
        client(server.url, PERSONAL).me()
    assert PERSONAL not in str(caught.value.to_json()) and server.paths() == ["/api/token/refresh/"]
    server.routes["/api/token/refresh/"] = Answer(body=b"<html>")
    with pytest.raises(Unavailable, match="Is it one"):
        client(server.url, PERSONAL).me()


@pytest.mark.parametrize("token", ["zwei wörter", "tökén", "a\nb"])
def test_a_token_with_strange_letters(token: str) -> None:
    with pytest.raises(InvalidInput, match="ASCII") as caught:
        LabelStudio("http://127.0.0.1", token)
    assert token not in caught.value.message


def test_no_secret_in_repr(server: SmallServer) -> None:
    assert LEGACY not in repr(client(server.url)) and PERSONAL not in repr(client(server.url, PERSONAL))
    assert client(server.url).identity != client(server.url, PERSONAL).identity != client(server.url + "/x").identity


def test_no_login_from_netrc_and_no_cookies(
    server: SmallServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server.routes[WHO] = reply({"id": 1}, **{"Set-Cookie": "sessionid=abc; Path=/"})
    for token in ("", LEGACY):
        studio = client(server.url, token)
        studio.me()
        studio.me()
    assert [request.headers.get("Authorization") for request in server.requests] == [None] * 2 + [f"Token {LEGACY}"] * 2
    assert all("Cookie" not in request.headers for request in server.requests)


# ---- where calls go -------------------------------------------------------------------------------------------------
def test_a_label_studio_below_a_path(server: SmallServer) -> None:
    server.routes["/ls" + WHO] = reply({"id": 2})
    assert client(server.url + "/ls/").me() == {"id": 2}


@pytest.mark.parametrize(
    ("url", "mine"),
    [
        ("https://host/ls/data/upload/a.jpg", True),
        ("https://HOST:443/ls/x", True),
        ("https://host/ls", True),
        ("https://host/lsx/a.jpg", False),
        ("https://host/", False),
        ("http://host/ls/a.jpg", False),
        ("https://host:8443/ls/a.jpg", False),
        ("https://host.evil.net/ls/a", False),
        ("https://u:p@host/ls/a", False),
        ("https://host@evil.net/ls/a", False),
        ("https://host/ls/../x", False),
        ("https://host/ls/%2e%2e/x", False),
        ("//host/ls/a", False),
        ("https://[::1/ls", False),
    ],
)
def test_where_the_token_may_go(url: str, mine: bool) -> None:
    assert LabelStudio("https://host/ls/", LEGACY).owns(url) is mine


@pytest.mark.parametrize(
    ("path", "up"),
    [("/a/b", False), ("/a/..b/c..", False), ("/a/../b", True), ("/./a", True), ("/%2E%2e/a", True), ("/a%5cb", True)],
)
def test_climbing_paths(path: str, up: bool) -> None:
    assert climbs(path) is up


def test_redirects_stay_at_home(server: SmallServer) -> None:
    with SmallServer("127.0.0.2") as foreign:
        foreign.routes["*"] = reply({"id": 9})
        server.routes[WHO] = Answer(301, headers={"Location": foreign.url + WHO + "?secret=1"})
        with pytest.raises(Unavailable, match=f"redirects to {foreign.url}.*token is not sent") as caught:
            client(server.url).me()
        assert "secret" not in caught.value.message and not foreign.requests
        server.routes[WHO] = Answer(302, headers={"Location": WHO + "/"})
        server.routes[WHO + "/"] = reply({"id": 3})
        assert client(server.url).me() == {"id": 3}
        server.routes[WHO] = Answer(302, headers={"Location": "/user/login/?next=/api"})
        with pytest.raises(Unauthorized, match="asks for a login"):
            client(server.url).me()
        server.routes[WHO] = Answer(302, headers={"Location": WHO})
        with pytest.raises(Unavailable):
            client(server.url).me()
        server.routes["/api/projects/"] = Answer(307, headers={"Location": "/api/projects"})
        with pytest.raises(Unavailable):  # a POST is not sent twice
            client(server.url).create_project("title", "<View/>")


@pytest.mark.parametrize("url", ["ftp://host", "host:8080", "http://u:p@host", "http://host/?a=b", "http://[::1", ""])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(InvalidInput):
        LabelStudio(url, LEGACY)


def test_a_private_authority(tmp_path: Path) -> None:
    pem = certificate_for("127.0.0.1", tmp_path)
    with SmallServer(certificate=pem) as server:
        server.routes[WHO] = reply({"id": 4})
        with pytest.raises(Unavailable, match=r"certificate.*LABEL_STUDIO_CA"):
            client(server.url).me()
        assert client(server.url, ca=pem).me() == {"id": 4}
    for bad in (tmp_path / "missing.pem", Path(__file__)):
        with pytest.raises(InvalidInput, match="LABEL_STUDIO_CA"):
            LabelStudio("https://host", LEGACY, bad)


def test_by_way_of_a_proxy(server: SmallServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    assert client("http://labels.invalid:8080").me() == {"id": 1}
    assert server.requests[0].headers["Host"] == "labels.invalid:8080"


# ---- retries and limits ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_reading_is_repeated(server: SmallServer, status: int) -> None:
    server.routes[WHO] = failing(3, status)
    assert client(server.url).me() == {"id": 1}
    server.routes[WHO] = failing(4, status)
    with pytest.raises(Unavailable, match=str(status)):
        client(server.url).me()


def test_pauses_grow_and_heed_the_server(server: SmallServer) -> None:
    pauses: list[float] = []
    server.routes[WHO] = failing(3)
    LabelStudio(server.url, LEGACY, pause=1.0, sleep=pauses.append).me()
    assert len(pauses) == 3 and 0.6 < pauses[0] < 1.4 < pauses[1] < 2.8 <= pauses[2] < 5.3
    server.routes[WHO] = lambda request: (
        reply({}, 429, **{"Retry-After": "7"}) if len(pauses) == 3 else reply({"id": 1})
    )
    LabelStudio(server.url, LEGACY, pause=1.0, sleep=pauses.append).me()
    assert pauses[3] == 7.0


def test_what_is_not_repeated(server: SmallServer) -> None:
    server.routes["/api/projects/"] = Answer(500)
    with pytest.raises(Unavailable):
        client(server.url).create_project("title", "<View/>")
    assert len(server.requests) == 1
    for status, kind in ((400, InvalidInput), (403, Unauthorized), (404, NotFound), (413, TooLarge)):
        server.routes[WHO] = reply({"detail": "because"}, status)
        with pytest.raises(kind, match="because") as caught:
            client(server.url).me()
        assert caught.value.details["label_studio_status"] == status
    assert len(server.requests) == 5


def test_a_post_is_repeated_when_no_connection_was_made() -> None:
    pauses: list[float] = []
    with pytest.raises(Unavailable, match="Connection refused"):
        LabelStudio("http://127.0.0.1:1", LEGACY, sleep=pauses.append).create_project("title", "<View/>")
    assert len(pauses) == 3


def test_a_delete_whose_answer_was_lost(server: SmallServer) -> None:
    server.routes["/api/webhooks/3/"] = failing(1, 502, Answer(404))
    client(server.url).delete_webhook(3)
    server.routes["/api/webhooks/3/"] = Answer(404)
    with pytest.raises(NotFound):
        client(server.url).delete_webhook(3)


def test_nobody_there() -> None:
    for url, words in (
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://no-such-host.invalid", "name is not known"),
    ):
        with pytest.raises(Unavailable, match=words):
            LabelStudio(url, LEGACY, tries=1).me()


def test_time_and_size_are_limited(server: SmallServer) -> None:
    def trickle(out: Any) -> None:
        out.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
        while True:
            out.write(b" ")
            time.sleep(0.05)

    server.routes[WHO] = Answer(raw=trickle)
    start = time.monotonic()
    with pytest.raises(Unavailable, match="in time"):
        client(server.url, timeout=0.2, tries=1).me()
    assert time.monotonic() - start < 3.0
    server.routes[WHO] = Answer(raw=lambda out: time.sleep(0.5))
    with pytest.raises(Unavailable):
        client(server.url, timeout=0.1, tries=1).me()
    server.routes["/x"] = Answer(body=bytes(1000))
    assert client(server.url).fetch("/x", 1000) == bytes(1000)
    with pytest.raises(TooLarge):
        client(server.url).fetch("/x", 999)


def test_a_short_answer_is_no_answer(server: SmallServer) -> None:
    server.routes[WHO] = Answer(raw=lambda out: out.write(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"id": 1}'))
    with pytest.raises(Unavailable):
        client(server.url, tries=1).me()


@pytest.mark.parametrize("body", [b"<html>", b"[1, 2]", b'"text"', b"\xff\xfe"])
def test_not_a_label_studio(server: SmallServer, body: bytes) -> None:
    server.routes[WHO] = Answer(body=body)
    with pytest.raises(Unavailable):
        client(server.url).me()


def test_errors_say_what_label_studio_says_without_html_and_secrets(server: SmallServer) -> None:
    said = {"non_field_errors": [f"No <a href='x'>more</a> {LEGACY}"], "title": ["too short"]}
    server.routes["/api/projects/"] = reply({"detail": "Validation error", "validation_errors": said}, 400)
    with pytest.raises(InvalidInput, match="No more … · title: too short") as caught:
        client(server.url).create_project("x", "<View/>")
    assert LEGACY not in str(caught.value.to_json())


# ---- calls whose form matters ---------------------------------------------------------------------------------------
def test_tasks_go_on_behind_the_last_id(server: SmallServer) -> None:
    """Tasks that are deleted between two pages hide none of the others."""
    stored = list(range(1, 8))

    def page(request: Request) -> Answer:
        query = json.loads(request.query["query"][0])
        items = {item["filter"].split(":")[-1] + item["operator"]: item["value"] for item in query["filters"]["items"]}
        found = [number for number in stored if number > items["idgreater"]][: int(request.query["page_size"][0])]
        stored[:2] = []
        return reply({"tasks": [{"id": number} for number in found]})

    server.routes["/api/tasks/"] = page
    assert [task["id"] for task in client(server.url).tasks(1, page_size=3)] == [1, 2, 3, 4, 5, 6, 7]


def test_each_file_has_a_field_of_its_own(server: SmallServer) -> None:
    server.routes["/api/projects/1/import"] = reply({"task_ids": [1, 2]})
    assert client(server.url).upload(1, [("a.jpg", b"a"), ("b.jpg", b"b")]) == [1, 2]
    assert b'name="file0"; filename="a.jpg"' in server.requests[0].body and b'name="file1"' in server.requests[0].body


# ---- the real Label Studio ------------------------------------------------------------------------------------------
CONFIG = (
    '<View><Image name="image" value="$image"/><KeyPointLabels name="kp" toName="image">'
    '<Label value="nose"/><Label value="tail"/></KeyPointLabels></View>'
)
POINT = {
    "id": "k1", "from_name": "kp", "to_name": "image", "type": "keypointlabels", "original_width": 64,
    "original_height": 48, "image_rotation": 0,
    "value": {"x": 10.0, "y": 20.0, "width": 0.5, "keypointlabels": ["nose"]},
}  # fmt: skip


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (shade, 9, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def personal_token(label_studio_server: tuple[str, Login]) -> str:
    """A personal access token of the real one. A user has one at most, so an older one is revoked first."""
    url, login = label_studio_server
    signed = {"Authorization": f"Token {login.token}"}
    for old in requests.get(f"{url}/api/token/", headers=signed, timeout=10).json():
        revoke = {"refresh": old["token"]}
        requests.post(f"{url}/api/token/blacklist/", json=revoke, headers=signed, timeout=10).raise_for_status()
    return str(requests.post(f"{url}/api/token/", headers=signed, timeout=10).json()["token"])


@pytest.mark.label_studio
def test_every_call_on_the_real_one(
    label_studio_server: tuple[str, Login], personal_token: str, tmp_path: Path
) -> None:
    url, login = label_studio_server
    studio = LabelStudio(url, login.token)
    assert studio.version().startswith("1.") and studio.me()["email"] == login.email
    project = studio.create_project("Every call", CONFIG)["id"]
    assert studio.project(project)["label_config"] == CONFIG
    assert studio.update_project(project, title="Every call, twice")["title"] == "Every call, twice"

    # Tasks, pages and filters
    uploads = studio.upload(project, [(f"f {number} ü.jpg", jpeg(number)) for number in range(3)])
    imported = studio.import_tasks(
        project, [{"data": {"image": "s3://bucket/k.jpg"}}, {"image": "/data/upload/0/no.jpg"}]
    )
    assert len(uploads) == 3 and len(imported) == 2
    everything = list(studio.tasks(project, page_size=2))
    assert [task["id"] for task in everything] == [*uploads, *imported]
    assert everything[3]["data"] == {"image": "s3://bucket/k.jpg"}
    assert [task["id"] for task in studio.tasks(project, ids=imported, page_size=1)] == imported
    assert studio.task(uploads[0], project)["id"] == uploads[0] == studio.task(uploads[0])["id"]
    with pytest.raises(NotFound):
        studio.task(999_999, project)
    with pytest.raises(NotFound):
        list(studio.tasks(999_999))

    # A task's data are changed as a whole; a new field is a column that can be filtered for
    checked = {**everything[3]["data"], "label_check": "swapped: left_ear, right_ear"}
    assert studio.update_task(imported[0], data=checked)["data"] == checked
    assert studio.task(imported[0], project)["data"] == checked
    studio.update_task(imported[0], data=everything[3]["data"])
    assert studio.task(imported[0], project)["data"] == everything[3]["data"]

    # Annotations, and what changed since
    made = studio.annotate(uploads[0], [POINT], lead_time=3.0)
    assert studio.update_annotation(made["id"], result=[POINT, POINT | {"id": "k2"}])["id"] == made["id"]
    assert len(studio.annotations(uploads[0])[0]["result"]) == 2
    (labelled,) = studio.tasks(project, annotated=True)
    assert labelled["id"] == uploads[0] and labelled["annotations"][0]["id"] == made["id"]
    before_delete = datetime.now(UTC)
    assert list(studio.tasks(project, updated_after=before_delete)) == []
    studio.delete_annotation(made["id"])
    assert [task["id"] for task in studio.tasks(project, updated_after=before_delete)] == [uploads[0]]
    assert list(studio.tasks(project, updated_after=before_delete + timedelta(hours=1))) == []

    # Images: uploads in both forms of the token; what is missing is said
    settings = Settings(label_studio_url=url, data_dir=tmp_path)
    personal = LabelStudio(url, personal_token)
    assert personal.me()["email"] == login.email
    for one in (studio, personal):
        fetcher = ImageFetcher(settings, one)
        found = {fetcher.fetch(task["data"]["image"], task["id"]) for task in everything[:3]}
        assert found == {jpeg(number) for number in range(3)}
        for missing in everything[3:]:
            with pytest.raises(NotFound):
                fetcher.fetch(missing["data"]["image"], missing["id"])
    with pytest.raises(Unauthorized):
        ImageFetcher(settings, LabelStudio(url)).fetch(everything[0]["data"]["image"])
    assert studio.fetch(everything[0]["data"]["image"]) in found

    # Predictions, an ML backend and its webhook
    prediction = studio.create_prediction(uploads[1], [POINT | {"score": 0.5}], score=0.5, model_version="by hand")
    assert [one["id"] for one in studio.predictions(project)] == [prediction["id"]]
    assert studio.predictions(task=uploads[0]) == []
    assert studio.set_project_model_version(project, "by hand")["model_version"] == "by hand"
    with pytest.raises(InvalidInput, match="model_version"):
        studio.set_project_model_version(project, "unheard of")
    with SmallServer() as backend:
        backend.routes["*"] = reply({"status": "UP", "model_version": "v1", "versions": ["v1"]})
        predicted = {"result": [POINT], "score": 0.4, "model_version": "v1"}
        backend.routes["/p/predict"] = lambda request: reply({"results": [predicted for _ in request.json()["tasks"]]})
        attached = studio.attach_backend(project, backend.url + "/p", "KptLLM", user="me", password="pw")
        assert backend.requests[-1].headers["Authorization"].startswith("Basic ")
        kept = studio.update_backend(attached["id"], project, backend.url + "/p", "KptLLM", interactive=True)
        assert kept["id"] == attached["id"] and kept["auth_method"] == "NONE"
        assert studio.versions(attached["id"]) == ["v1"]
        (hook,) = studio.webhooks(project)
        assert hook["url"] == backend.url + "/p/webhook"
        assert studio.update_webhook(hook["id"], headers={"X-Test": "1"})["headers"] == {"X-Test": "1"}
        studio.delete_webhook(hook["id"])
        assert studio.create_webhook(project, backend.url + "/p/webhook")["is_active"]
        studio.retrieve_predictions(project, uploads[:2])
        assert len(studio.predictions(project)) == 3
        assert studio.ask_interactively(attached["id"], uploads[0], {"result": []})["data"]["result"]
        assert studio.train(attached["id"], project)["error_message"] is None
        backend.routes["/p/webhook"] = reply({"error": "too few"}, 400)
        assert "400" in studio.train(attached["id"], project)["error_message"]
        studio.detach_backend(attached["id"])
        assert studio.ml_backends(project) == [] and len(studio.webhooks(project)) == 1

    studio.delete_project(project)
    with pytest.raises(NotFound):
        studio.project(project)


@pytest.mark.label_studio
def test_tokens_of_the_real_one(label_studio_server: tuple[str, Login], personal_token: str) -> None:
    url, login = label_studio_server
    token = personal_token
    for wrong in ("f" * 40, token[:-3] + "abc", token.rpartition(".")[0]):
        with pytest.raises(KptError) as caught:
            LabelStudio(url, wrong).me()
        assert isinstance(caught.value, Unauthorized) and wrong not in caught.value.message
    with pytest.raises(Unauthorized, match="none was given"):
        LabelStudio(url).me()
    personal = LabelStudio(url, token)
    switches = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": False}
    personal._object("POST", "/api/jwt/settings", body=switches)
    try:
        with pytest.raises(Unauthorized, match="legacy tokens switched off"):
            LabelStudio(url, login.token).me()
    finally:
        personal._object("POST", "/api/jwt/settings", body=switches | {"legacy_api_tokens_enabled": True})
