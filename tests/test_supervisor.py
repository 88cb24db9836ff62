"""One command for all processes: prefixes, restarts, hung children, stopping together, no orphans. Real processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import requests

from backend.settings import Settings
from backend.supervisor import Child, Supervisor, children, port_is_free, supervise
from backend_world import CONFIG, picture, region
from journal_database import journal_url
from kptllm_core.errors import Unavailable
from small_server import Answer, SmallServer

ROOT = Path(__file__).resolve().parents[1]
FAST = (0.05, 0.1)
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from backend.supervisor import Child, Supervisor
kids = [Child(k["name"], k["command"], {**__import__("os").environ}, k.get("health")) for k in json.loads(sys.argv[2])]
sys.exit(Supervisor(kids, sys.stdout, pauses=(0.05, 0.1), stop_seconds=float(sys.argv[3]), probe_seconds=0.2).run())
"""


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(99)"
GENTLE = """
import signal, sys, time
def end(*_):
    time.sleep(0.5); print('finished'); sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('ready')
time.sleep(99)
"""
PARENT = """
import subprocess, sys, time
print('grandchild', subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).pid)
time.sleep(99)
"""
TALKERS = (
    "print('one'); print('two', end=''); import time; time.sleep(60)",
    "import sys, time; print('x' * 100000); print('err', file=sys.stderr); time.sleep(60)",
)


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


class Running:
    """A supervisor in a process of its own; its output is read as it comes."""

    def __init__(
        self,
        kids: list[dict[str, Any]] | None = None,
        stop_seconds: float = 5.0,
        command: list[str] | None = None,
        **env: str,
    ) -> None:
        command = command or [sys.executable, "-u", "-c", RUN, str(ROOT), json.dumps(kids), str(stop_seconds)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, done: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"it never came:\n{self.text}"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 40.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def run(*args: Any, **more: Any) -> Running:
        started.append(Running(*args, **more))
        return started[-1]

    yield run
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def gone(processes: list[psutil.Process], seconds: float = 10.0) -> bool:
    return not psutil.wait_procs([p for p in processes if p.is_running()], timeout=seconds)[1]


def test_lines_carry_their_childs_name_and_the_last_words_are_not_lost(start: Any) -> None:
    run = start([{"name": "a", "command": python(TALKERS[0])}, {"name": "longer", "command": python(TALKERS[1])}])
    run.until(lambda: "longer | err" in run.text and "a      | one" in run.text)
    assert run.stop() == 0
    assert "a      | two" in run.lines


def test_a_child_that_dies_is_started_anew_with_growing_pauses(start: Any) -> None:
    run = start([{"name": "a", "command": python("raise SystemExit(3)")}])
    run.until(lambda: run.text.count("ended (exit code 3)") >= 3)
    assert re.search(r"started anew in 0.1 s", run.text)
    run.until(lambda: run.text.count("[started") >= 3)
    assert run.stop() == 0


def test_a_child_that_refuses_what_it_was_told_ends_everything(start: Any) -> None:
    run = start([{"name": "a", "command": python("import time; time.sleep(0.5); print('no such model'); raise SystemExit(2)")},
                 {"name": "b", "command": python(GENTLE)}])  # fmt: skip
    assert run.process.wait(20) == 2
    run.until(lambda: run.lines[-1] == "a | no such model")
    assert run.text.count("[started") == 2 and "a | [cannot start" in run.text and "b | finished" in run.lines


@pytest.mark.parametrize("wrong", [{"MODEL": "nowhere"}, {"MODEL": "tiny", "DEVICE": "cuda:7"}, {"MODEL": "tiny", "KPTLLM_DATA": "/proc/nowhere"}])
def test_a_model_device_or_folder_that_is_not_there_ends_the_product_in_words(wrong: dict[str, str], start: Any, tmp_path: Path) -> None:
    run = start(command=[sys.executable, "-u", "-m", "backend"], PORT=str(free_port()), CORE_PORT=str(free_port()), DATA_DIR=str(tmp_path),
                CORE_URL="", DATABASE_URL=journal_url(tmp_path), WEB_WORKERS="1", **wrong)  # fmt: skip
    assert run.process.wait(90) == 2
    run.until(lambda: run.lines[-1].startswith("core    | error:"))
    assert list(wrong.values())[-1] in run.lines[-1] and "Traceback" not in run.text


def test_a_killed_child_comes_back_and_leaves_nothing_behind(start: Any) -> None:
    run = start([{"name": "a", "command": python(PARENT)}])
    run.until(lambda: "grandchild" in run.text)
    before = run.family()
    (child,) = psutil.Process(run.process.pid).children()
    child.kill()
    run.until(lambda: run.text.count("grandchild") == 2)
    assert "killed by SIGKILL" in run.text
    assert gone(before)
    assert run.stop() == 0


SERVER = """
import http.server, threading
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{}')
    def log_message(self, *a): pass
http.server.HTTPServer.allow_reuse_address = True
print('serving')
http.server.ThreadingHTTPServer(('127.0.0.1', PORT), H).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_hung_child_is_killed_and_started_anew(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    run = start(
        [
            {
                "name": "a",
                "command": python(SERVER.replace("PORT", str(port))),
                "health": f"http://127.0.0.1:{port}/health",
            }
        ]
    )
    run.until(lambda: "serving" in run.text)
    time.sleep(1.5)  # it has answered
    (child,) = psutil.Process(run.process.pid).children()
    child.suspend()
    run.until(lambda: "does not answer" in run.text and run.text.count("serving") == 2, 40)
    assert run.stop() == 0


def test_a_child_that_has_worked_is_started_anew_whatever_it_ends_with(start: Any) -> None:
    port = free_port()
    code = SERVER.replace("PORT", str(port)).replace("print('serving')", "print('serving'); threading.Timer(1.5, os._exit, [2]).start()")
    run = start([{"name": "a", "command": python(f"import os{code}"), "health": f"http://127.0.0.1:{port}/health"}])
    run.until(lambda: run.text.count("serving") == 2 and "ended (exit code 2)" in run.text)
    assert run.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_stop_together_and_finish_what_is_in_flight(start: Any, number: signal.Signals) -> None:
    run = start([{"name": n, "command": python(GENTLE)} for n in "ab"])
    run.until(lambda: run.text.count("ready") == 2)
    family = run.family()
    started = time.monotonic()
    assert run.stop(number) == 0
    assert time.monotonic() - started < 4.0
    assert gone(family)
    run.until(lambda: run.text.count("finished") == 2)


def test_who_does_not_stop_in_time_is_killed(start: Any) -> None:
    run = start([{"name": "a", "command": python(DEAF)}],
                stop_seconds=0.5)  # fmt: skip
    run.until(lambda: "ready" in run.text)
    family = run.family()
    assert run.stop() == 1
    assert gone(family)
    assert "did not end within 0.5 s; killed" in run.text


def test_a_killed_supervisor_takes_its_children_along(start: Any) -> None:
    run = start([{"name": n, "command": python(DEAF)}
                 for n in "ab"])  # fmt: skip
    run.until(lambda: run.text.count("ready") == 2)
    family = run.family()
    assert len(family) == 2
    run.stop(signal.SIGKILL)
    assert gone(family)


def test_nobody_reading_its_output_stops_it() -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    assert (
        Supervisor(
            [Child("a", python("print(1); import time; time.sleep(99)"), os.environ)], Closed(), pauses=FAST
        ).run()
        == 0
    )


# ---------------------------------------------------------------- what is supervised


def test_the_core_is_started_unless_it_runs_elsewhere(tmp_path: Path) -> None:
    environment = {"LABEL_STUDIO_API_KEY": "secret", "CORE_TOKEN": "both need it", "PATH": "/bin"}
    settings = Settings(data_dir=tmp_path / "backend", model="tiny")
    core, backend = children(settings, environment)
    assert core.command[1:5] == ["-m", "kptllm_core", "serve", "--model"]
    assert str(tmp_path / "core") in core.command
    assert "LABEL_STUDIO_API_KEY" not in core.environment
    assert core.environment["CORE_TOKEN"] == "both need it"
    assert backend.environment["LABEL_STUDIO_API_KEY"] == "secret"
    assert not any("secret" in word for word in backend.command + core.command)
    (only,) = children(Settings(core_url="http://gpu:9091"), environment)
    assert only.name == "backend"
    assert children(Settings(host="0.0.0.0"), {})[1].health == "http://127.0.0.1:9090/health"


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=rf"Port {port} on 127.0.0.1 cannot be used"):
            port_is_free("127.0.0.1", port)


def test_a_bad_setting_is_told_in_words_and_nothing_starts() -> None:
    done = subprocess.run([sys.executable, "-m", "backend"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "BASIC_AUTH_USER": "me", "BASIC_AUTH_PASS": ""})  # fmt: skip
    assert done.returncode == 1
    assert "BASIC_AUTH_PASS" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_open_door_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda self: 0)
    for host, login, open_door in (("0.0.0.0", "", True), ("0.0.0.0", "me", False), ("127.0.0.1", "", False)):
        caplog.clear()
        settings = Settings.from_env({"HOST": host, "PORT": str(free_port()), "BASIC_AUTH_USER": login, "BASIC_AUTH_PASS": login,
                                      "CORE_URL": "http://127.0.0.1:1"})  # fmt: skip
        assert supervise(settings, {}) == 0
        assert ("BASIC_AUTH_USER" in caplog.text) == open_door


def test_help_and_unknown_words() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "backend", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0 and "connect" in shown.stdout and "demo" in shown.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "backend", "--nope"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert wrong.returncode == 2


def test_the_real_backend_serves_survives_a_kill_and_stops(start: Any, tmp_path: Path) -> None:
    """`python -m backend` under gunicorn, without a core: it answers all the same."""
    port = free_port()
    core = free_port()
    run = start(command=[sys.executable, "-u", "-m", "backend"], PORT=str(port), CORE_URL=f"http://127.0.0.1:{core}", DATA_DIR=str(tmp_path),
                DATABASE_URL=journal_url(tmp_path), WEB_WORKERS="1", LABEL_STUDIO_URL=f"http://127.0.0.1:{core}")  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        try:
            return requests.get(f"{url}/health", timeout=1).status_code == 200
        except requests.RequestException:
            return False

    run.until(up, 60)
    body = {"project": 1, "label_config": CONFIG, "tasks": [{"id": 1, "data": {"image": "/data/upload/1/a.png"}}]}
    (result,) = requests.post(f"{url}/predict", json=body, timeout=30).json()["results"]
    assert result["result"] == []
    assert (
        requests.post(f"{url}/setup", json={"project": 1, "schema": CONFIG}, timeout=5).json()["model_version"]
        == "nano+r0+s0.f1951d"
    )
    worker = max(run.family(), key=lambda p: p.create_time())
    worker.kill()
    run.until(up, 60)
    family = run.family()
    assert run.stop() == 0
    assert gone(family)
    assert "backend | " in run.text and "Traceback" not in run.text


@pytest.mark.slow
def test_the_whole_product_on_tiny_survives_kills_in_the_middle_of_a_round(start: Any, tmp_path: Path) -> None:
    """Backend, core and trainer as they are: killed one after the other while a round trains; nothing is lost."""
    port, core = free_port(), free_port()
    with SmallServer() as studio:
        environment = {"PORT": str(port), "CORE_PORT": str(core), "MODEL": "tiny", "DATA_DIR": str(tmp_path / "backend"), "ROUND_SECONDS": "15",
                       "DATABASE_URL": journal_url(tmp_path / "backend"), "LABEL_STUDIO_URL": studio.url, "CORE_URL": ""}  # fmt: skip
        command = [sys.executable, "-u", "-m", "backend"]
        run = start(command=command, **environment)
        url = f"http://127.0.0.1:{port}"

        def get(path: str) -> dict[str, Any]:
            try:
                return dict(requests.get(url + path, timeout=2).json())
            except (requests.RequestException, ValueError):
                return {}

        def job() -> dict[str, Any]:
            return get("/projects/1/status").get("job") or {}

        run.until(lambda: get("/health").get("base"), 120)
        tasks, annotations = [], []
        for n in range(1, 13):
            studio.routes[f"/data/upload/1/{n}.png"] = Answer(body=picture(n * 20))
            tasks.append({"id": n, "data": {"image": f"/data/upload/1/{n}.png"}})
            result = [region(label, 20.0 + 10 * i + n, 40.0 + n) for i, label in enumerate(("nose", "tail", "ear"))]
            annotations.append({"id": n, "task": n, "result": result, "updated_at": "2026-01-01T00:00:00Z"})
        event = {"project": {"id": 1, "label_config": CONFIG}}
        created = requests.post(
            f"{url}/webhook",
            json={"action": "ANNOTATIONS_CREATED", **event, "annotation": annotations, "task": tasks},
            timeout=10,
        )
        assert created.json()["new"] == 12
        assert (
            requests.post(f"{url}/webhook", json={"action": "START_TRAINING", **event}, timeout=10).status_code == 201
        )

        def trainers() -> list[psutil.Process]:
            return [p for p in run.family() if "kptllm_core.trainer" in " ".join(p.cmdline())]

        run.until(lambda: trainers() and (job().get("progress") or {}).get("step"), 120)
        trainers()[0].kill()
        run.until(lambda: trainers(), 60)
        next(p for p in run.family() if "kptllm_core" in p.cmdline() and "serve" in p.cmdline()).kill()
        run.until(lambda: "core    | [ended" in run.text, 60)
        family = run.family()
        run.stop(signal.SIGKILL)
        assert gone(family)
        run = start(command=command, **environment)
        run.until(lambda: job().get("state") == "done", 240)
        status = get("/projects/1/status")
        assert status["labelled"] == 12
        assert status["job"]["round"] == 1
        assert "held-out images" in status["job"]["message"]
        body = {"project": 1, "label_config": CONFIG, "tasks": tasks}
        results = requests.post(f"{url}/predict", json=body, timeout=100).json()["results"]
        assert len(results) == 12
        assert {r["model_version"] for r in results} == {status["model_version"]}
        assert run.stop() == 0
        assert "Traceback" not in run.text
