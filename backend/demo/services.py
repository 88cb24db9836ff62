"""The processes of the demo and of the end-to-end tests: a real Label Studio, and this product beside it.

Each runs in a session of its own, so that Ctrl-C reaches the demo alone, which then stops them in order; if the demo
itself is killed, the system stops them. Everything listens on 127.0.0.1. Knows nothing of projects or keypoints.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from kptllm_core.errors import Conflict, Unavailable

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
SIGN = 20.0  # seconds after which a wait is told, and told again
EMAIL = "demo@example.com"
_KEEP = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "LD_LIBRARY_PATH")
_PR_SET_PDEATHSIG = 1


def free_port(preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else a port that the system picks. 0 means: let the system pick."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            # A server bound to all addresses leaves this one bindable on some systems: ask, too.
            with socket.socket() as ask:
                if port and ask.connect_ex((LOOPBACK, port)) == 0:
                    continue
            return int(probe.getsockname()[1])
    raise Unavailable("No free port on 127.0.0.1. Stop some servers and try again.")


def label_studio_executable() -> Path | None:
    """LABEL_STUDIO_BIN, else the environment that `make setup` makes; None when there is neither."""
    named = os.environ.get("LABEL_STUDIO_BIN")
    path = Path(named) if named else ROOT / ".labelstudio" / "venv" / "bin" / "label-studio"
    return path if path.is_file() else None


@dataclass(frozen=True)
class Login:
    """Who may enter the demo's Label Studio. Made once per data folder and kept there, readable by its owner only."""

    email: str
    password: str
    token: str

    @classmethod
    def of(cls, folder: Path) -> Login:
        path = folder / "login.json"
        if path.is_file():
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        login = cls(EMAIL, secrets.token_urlsafe(9), secrets.token_hex(20))
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(login)), encoding="utf-8")
        return login


@contextmanager
def alone_in(folder: Path, taken: str = "Another demo runs in {folder}. Stop it with Ctrl-C, or choose another --folder.") -> Iterator[None]:
    """Holds the folder for one process at a time; Conflict, with the words of `taken`, when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(taken.format(folder=folder)) from None
        yield


class Service:
    """One child process with its log file. `start` returns when `ready()` is true; `stop` leaves nothing behind."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.command, self.env, self.log = name, command, dict(env), log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: Callable[[], bool], seconds: float) -> None:
        """Start, and wait until it answers. Unavailable with the log's last lines when it ends or stays silent."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        try:
            wait_until(ready, self, seconds)
        except BaseException:
            self.stop()
            raise

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, seconds: float = 30.0) -> None:
        """SIGTERM to the process, which stops its own children; after `seconds` SIGKILL to all of its group."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.process = None

    def log_end(self) -> str:
        """The last lines of its log, for a message."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"The end of {self.log}:\n  " + "\n  ".join(lines[-12:] or ["(empty)"])


def label_studio(executable: Path, folder: Path, login: Login, port: int) -> Service:
    """A Label Studio with SQLite in `folder`, which lets itself reach backends on loopback. Not started yet."""
    env = {name: os.environ[name] for name in _KEEP if name in os.environ} | {
        "LABEL_STUDIO_USERNAME": login.email, "LABEL_STUDIO_PASSWORD": login.password,
        "LABEL_STUDIO_USER_TOKEN": login.token,
        # Both are needed before it talks to a backend, and sends webhooks, on a loopback address.
        "ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false", "USE_DEFAULT_BANNED_SUBNETS": "false",
        "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "",
        "NO_PROXY": f"{LOOPBACK},localhost", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    command = [
        str(executable), "start", "--no-browser", "--data-dir", str(folder), "--internal-host", LOOPBACK,
        "--port", str(port), "--username", login.email, "--enable-legacy-api-token",
    ]  # fmt: skip
    return Service("Label Studio", command, env, folder.parent / "label-studio.log")


def product(folder: Path, settings: Mapping[str, str]) -> Service:
    """`python -m backend` with these settings: backend and core, under its own supervisor. Not started yet."""
    env = os.environ | {
        "NO_PROXY": f"{LOOPBACK},localhost", "PYTHONUNBUFFERED": "1", "DATA_DIR": str(folder / "backend"), **settings,
    }  # fmt: skip
    return Service("The backend", [sys.executable, "-m", "backend"], env, folder / "backend.log")


def wait_until(ready: Callable[[], bool], service: Service, seconds: float) -> None:
    """Says every SIGN seconds that it still waits. Unavailable, with the end of the service's log, when it ends or is not ready in time."""
    begin = time.monotonic()
    end, sign = begin + seconds, begin + SIGN
    while not ready():
        if time.monotonic() > sign:
            sign += SIGN
            print(f"       still waiting for {service.name} ({time.monotonic() - begin:.0f} s); its log: {service.log}", file=sys.stderr, flush=True)
        if not service.running:
            raise Unavailable(f"{service.name} ended. {service.log_end()}")
        if time.monotonic() > end:
            raise Unavailable(f"{service.name} did not answer within {seconds:.0f} s. {service.log_end()}")
        time.sleep(0.3)


def answers(url: str, key: str | None = None) -> Callable[[], bool]:
    """Does a GET of `url` answer 200, and, with a `key`, does the JSON object that it answers hold something there?"""

    def ask() -> bool:
        try:
            answer = requests.get(url, timeout=5, proxies={"http": "", "https": ""})
            return answer.status_code == 200 and (key is None or bool(answer.json().get(key)))
        except requests.RequestException:
            return False

    return ask


def _die_with_parent() -> None:
    """Runs in the child before exec: SIGTERM when the demo dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
