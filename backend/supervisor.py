"""One foreground command for all processes of the product: `python -m backend`.

    supervisor ──┬── core      python -m kptllm_core serve  (not with CORE_URL: then it runs elsewhere)  ── trainer
                 └── backend   gunicorn, a few processes of backend.app

A single thread: it passes the children's output on, line by line with their name before it, restarts those that ended or
hang, and on SIGTERM or SIGINT stops all of them together. One that refuses what it was told, and never worked, would
refuse it each time: then everything ends, and its words come last. Should it be killed itself, the kernel kills its children.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from backend.settings import Settings
from kptllm_core.errors import Unavailable

STOP_SECONDS = 30.0  # all children must have ended by then; those that did not are killed
STEADY_SECONDS = 60.0  # a child that lived so long starts with a short pause again
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the 1st, 2nd, … restart
PROBE_SECONDS = 5.0
HUNG_PROBES = 6  # so many probes without an answer, and a child that had answered before is taken for hung
STARTING_SECONDS = 600.0  # time for the first answer: a model may have to be loaded
MISTAKEN = 2  # exit code of a child whose last line explains what it was told wrongly: a model, a device, a folder
NOT_FOR_THE_CORE = ("LABEL_STUDIO_API_KEY", "BASIC_AUTH_PASS", "WEBHOOK_SECRET", "DATABASE_URL")
_PR_SET_PDEATHSIG = 1
log = logging.getLogger(__name__)


@dataclass
class Child:
    """A process to keep alive. health: URL that answers while it is well, or None."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    health: str | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float | None = 0.0  # monotonic; None while it runs
    failures: int = 0
    probe_at: float = 0.0
    answered: bool = False
    worked: bool = False  # in this life or an earlier one
    silent: int = 0
    rest: bytes = field(default=b"", repr=False)  # output of a line that is not complete yet
    last: str = field(default="", repr=False)  # line that was printed for it


def children(settings: Settings, environment: Mapping[str, str]) -> list[Child]:
    """The processes that these settings ask for."""
    found = []
    if not settings.core_url:
        beside = (
            settings.data_dir.parent / "core" if settings.data_dir.name == "backend" else settings.data_dir / "core"
        )
        data = environment.get("KPTLLM_DATA") or str(beside)
        command = [sys.executable, "-m", "kptllm_core", "serve", "--model", settings.model, "--device", settings.device,
                   "--host", "127.0.0.1", "--port", str(settings.core_port), "--data", data,
                   "--images-gb", f"{settings.core_image_bytes / 1e9:g}"]  # fmt: skip
        public = {name: value for name, value in environment.items() if name not in NOT_FOR_THE_CORE}
        found.append(Child("core", command, public, f"{settings.core_address}/health"))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    near = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
    shared = Path("/dev/shm")  # noqa: S108 - gunicorn's heartbeat file; a disk that stalls must not look like a hung worker
    command = [sys.executable, "-m", "gunicorn", "backend.app:application()", "--bind", f"{host}:{settings.port}",
               "--worker-class", "gthread", "--workers", str(settings.web_workers), "--threads", str(settings.web_threads),
               "--timeout", "120", "--graceful-timeout", "25", "--keep-alive", "5", "--no-control-socket",
               "--log-level", settings.log_level.lower(), *(["--worker-tmp-dir", str(shared)] if shared.is_dir() else [])]  # fmt: skip
    found.append(Child("backend", command, environment, f"http://{near}:{settings.port}/health"))
    return found


class Supervisor:
    def __init__(self, kids: list[Child], out: IO[str] | None = None, pauses: tuple[float, ...] = PAUSES,
                 stop_seconds: float = STOP_SECONDS, probe_seconds: float = PROBE_SECONDS) -> None:  # fmt: skip
        self.kids, self.out, self.pauses = kids, out or sys.stderr, pauses
        self.stop_seconds, self.probe_seconds = stop_seconds, probe_seconds
        self._selector = selectors.DefaultSelector()
        self._stopping: int | None = None
        self._mistaken: tuple[Child, str] | None = None  # who cannot start, and its words
        self._width = max(len(k.name) for k in kids)

    def run(self) -> int:
        """Until a signal says stop. 0 after an orderly end, 1 when a child had to be killed for it, MISTAKEN when one cannot start."""
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        old = {s: signal.signal(s, self._signalled) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        old_fd = signal.set_wakeup_fd(wake.fileno())
        self._selector.register(woken, selectors.EVENT_READ, None)
        try:
            while self._stopping is None and self._mistaken is None:
                for child in self.kids:
                    self._look_after(child)
                self._listen(0.25, woken)
            code = self._stop(woken)
            if self._mistaken is None:
                return code
            self._print(*self._mistaken)  # once more, below what the others said while they stopped
            return code or MISTAKEN
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, handler)
            for child in self.kids:
                if child.process is not None and child.process.poll() is None:
                    self._signal(child, signal.SIGKILL)
            self._selector.close()
            wake.close()
            woken.close()

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = number

    def _look_after(self, child: Child) -> None:
        """Start it, see that it ended, see that it hangs."""
        now = time.monotonic()
        if child.process is None:
            if child.restart_at is not None and now >= child.restart_at:
                self._start(child)
            return
        code = child.process.poll()
        if code is not None:
            self._ended(child, code, now)
        elif child.health is not None and now >= child.probe_at:
            child.probe_at = now + self.probe_seconds
            if state := _health(child.health):
                child.answered, child.silent = True, 0
                child.worked |= state != "LOADING"
                return
            child.silent += 1
            slow_start = not child.answered and now - child.started > STARTING_SECONDS
            if (child.answered and child.silent >= HUNG_PROBES) or slow_start:
                self._say(child, f"does not answer {child.health}; it is killed and started anew")
                self._signal(child, signal.SIGKILL)

    def _start(self, child: Child) -> None:
        parent = os.getpid()
        child.process = subprocess.Popen(
            child.command, env=dict(child.environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only the supervisor, which stops its children in order
            preexec_fn=lambda: _die_with(parent),  # safe: this process has a single thread
        )  # fmt: skip
        assert child.process.stdout is not None
        os.set_blocking(child.process.stdout.fileno(), False)
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)
        child.started = time.monotonic()
        child.restart_at, child.answered, child.silent, child.probe_at = None, False, 0, child.started + 1.0
        self._say(child, f"started, process {child.process.pid}")

    def _ended(self, child: Child, code: int, now: float) -> None:
        self._drain(child)
        self._signal(child, signal.SIGKILL)  # what it may have left behind in its group
        if code == MISTAKEN and not child.worked:
            child.process, child.restart_at, self._mistaken = None, None, (child, child.last)
            self._say(child, "cannot start, for the reason above; everything stops")
            return
        child.failures = 0 if now - child.started > STEADY_SECONDS else child.failures + 1
        pause = self.pauses[min(child.failures, len(self.pauses) - 1)]
        child.process, child.restart_at = None, now + pause
        self._say(child, f"ended ({_cause(code)}); it is started anew in {pause:g} s")

    def _stop(self, woken: socket.socket) -> int:
        """SIGTERM to all at once: they finish what is in flight."""
        alive = [c for c in self.kids if c.process is not None]
        for child in alive:
            self._signal(child, signal.SIGTERM, group=False)
        deadline = time.monotonic() + self.stop_seconds
        killed = False
        while alive and not killed:
            self._listen(0.1, woken)
            alive = [c for c in alive if c.process is not None and c.process.poll() is None]
            if alive and time.monotonic() > deadline:
                killed = True
                for child in alive:
                    self._say(child, f"did not end within {self.stop_seconds:g} s; killed")
        for child in self.kids:
            if child.process is not None:
                self._signal(child, signal.SIGKILL)
                child.process.wait()
                self._drain(child)
        return 1 if killed else 0

    def _signal(self, child: Child, number: signal.Signals, group: bool = True) -> None:
        """To the child, or to all of its process group. An ended one takes none."""
        assert child.process is not None
        try:
            if group:
                os.killpg(child.process.pid, number)
            else:
                child.process.send_signal(number)
        except ProcessLookupError:
            log.debug("%s left nothing behind", child.name)

    # ------------------------------------------------------------ output

    def _listen(self, seconds: float, woken: socket.socket) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                woken.recv(64)
            else:
                self._read(key.data)

    def _read(self, child: Child) -> bool:
        """Pass on what a child wrote. False when there is no more for now."""
        assert child.process is not None and child.process.stdout is not None
        try:
            data = os.read(child.process.stdout.fileno(), 65536)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(child.process.stdout)
            child.process.stdout.close()
            return False
        *lines, child.rest = (child.rest + data).split(b"\n")
        if len(child.rest) > 65536:
            lines, child.rest = [*lines, child.rest], b""
        for line in lines:
            self._print(child, line.decode("utf-8", "replace"))
        return True

    def _drain(self, child: Child) -> None:
        """The last words of a child that ended."""
        pipe = child.process.stdout if child.process is not None else None
        while pipe is not None and not pipe.closed and self._read(child):
            continue
        if pipe is not None and not pipe.closed:  # a grandchild still holds the other end
            self._selector.unregister(pipe)
            pipe.close()
        if child.rest:
            self._print(child, child.rest.decode("utf-8", "replace"))
            child.rest = b""

    def _say(self, child: Child, text: str) -> None:
        self._print(child, f"[{text}]")

    def _print(self, child: Child, line: str) -> None:
        child.last = line
        try:
            self.out.write(f"{child.name:<{self._width}} | {line}\n")
            self.out.flush()
        except OSError:
            self._stopping = self._stopping or signal.SIGHUP  # nobody reads us any more


def _health(url: str) -> str:
    """How a child says that it is ("UP" where it does not say); empty if it does not answer."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=2.0) as answer:
            said = json.load(answer) if answer.status == 200 else {}
            return str(said.get("status", "UP")) if isinstance(said, dict) else "UP"
    except urllib.error.HTTPError as error:
        return "UP" if error.code < 500 else ""
    except json.JSONDecodeError:
        return "UP"
    except (OSError, ValueError):
        return ""


def _die_with(parent: int) -> None:
    """In the child, before it becomes its program: the kernel kills it when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended meanwhile


def _cause(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def port_is_free(host: str, port: int) -> None:
    """Unavailable, in words, when somebody listens there already."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Unavailable(f"Port {port} on {host} cannot be used ({error.strerror}). Stop what runs there, or set another PORT "
                              "(CORE_PORT for the core).") from None  # fmt: skip


def supervise(settings: Settings, environment: Mapping[str, str]) -> int:
    """Run the product until it is told to stop; the exit code."""
    port_is_free(settings.host, settings.port)
    if not settings.core_url:
        port_is_free("127.0.0.1", settings.core_port)
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.basic_auth_user:
        log.warning("Anybody who reaches %s:%d sees images and labels, and may change what serves. Set BASIC_AUTH_USER and BASIC_AUTH_PASS, here "
                    "and at the model in Label Studio.", settings.host, settings.port)  # fmt: skip
    return Supervisor(children(settings, environment)).run()
