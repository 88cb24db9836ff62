"""The core as a process: `python -m kptllm_core serve`. Starts, listens, stops gently.

Many threads answer (routes.py); the device has one lock (engine.py); training has a process of its own (jobs.py, trainer.py).
No torch is loaded here: the model comes in a thread of its own, and /health answers meanwhile.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer

from kptllm_core.config import model_folder, preset_names
from kptllm_core.engine import Engine
from kptllm_core.errors import Conflict, InvalidInput, Unavailable
from kptllm_core.jobs import JobQueue
from kptllm_core.routes import MAX_ROUND_BYTES, Core, create_app
from kptllm_core.store import MAX_IMAGE_BYTES, AdapterStore, ImageStore

if TYPE_CHECKING:
    from kptllm_core.predictor import Predictor

log = logging.getLogger(__name__)

DRAIN_SECONDS = 30.0  # for requests in flight after SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m kptllm_core serve`."""
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder (default: nano)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=9091, help="port to listen on (default: 9091)")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KPTLLM_DATA") or ".data/core"), metavar="DIR",
                        help="where images, adapters and rounds are kept (default: KPTLLM_DATA or .data/core)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=24, help="requests answered at the same time (default: 24)")
    parser.add_argument("--images-gb", type=float, default=10.0, metavar="GB",
                        help="size of the image store; the least recently used go first (default: 10)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C. Raises KptError when the model cannot be loaded, the port or the folder is taken."""
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise InvalidInput(f"LOG_LEVEL is one of DEBUG, INFO, WARNING, ERROR; found {level}.")
    logging.basicConfig(level=level, format="%(asctime)s core %(levelname)s %(message)s")
    if not 1 <= args.threads <= 1000 or args.images_gb <= 0 or not 0 <= args.port < 65536:
        raise InvalidInput("--threads is 1…1000, --images-gb more than 0 and --port 0…65535.")
    token = os.environ.get("CORE_TOKEN", "")
    if not re.fullmatch(r"[!-~]*", token):
        raise InvalidInput("CORE_TOKEN holds spaces or characters beyond ASCII, which no header carries. Choose letters, digits and signs.")
    if not token and args.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("Anybody who reaches %s:%d may use this core. Set CORE_TOKEN here and in the backend.", args.host, args.port)
    folder = model_folder(args.model)
    model = args.model if args.model in preset_names() else str(folder.resolve())
    with owned(args.data):
        data = args.data.resolve()
        images, adapters = ImageStore(data / "images", int(args.images_gb * 1e9)), AdapterStore(data / "adapters")
        engine = Engine(lambda: load(model, args.device), images, adapters)
        core = Core(images, adapters, engine, JobQueue(data / "rounds", images, adapters), model, args.device, token)
        serve(core, args.host, args.port, args.threads)
    return 0


def load(model: str, device: str) -> Predictor:
    """Imports torch, and takes its time."""
    from kptllm_core.predictor import load_predictor

    return load_predictor(model, device=device)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The data folder belongs to one core at a time. Conflict if another one runs on it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another core is running on the folder {folder}. Stop it, or give this one its own --data.") from None
        yield


def serve(core: Core, host: str, port: int, threads: int) -> None:
    """Answers requests at once, loads the model beside them, and stops gently: see `drain`. Raises what loading raises."""
    stopping = threading.Event()
    failures: list[BaseException] = []
    sockets: dict[int, wasyncore.dispatcher] = {}
    try:
        server = waitress.create_server(create_app(core), map=sockets, host=host, port=port, threads=threads, ident="kptllm-core",
                                        max_request_body_size=max(MAX_ROUND_BYTES, MAX_IMAGE_BYTES) + 1, channel_timeout=120,
                                        channel_request_lookahead=1, connection_limit=500, asyncore_use_poll=True)  # fmt: skip
    except OSError as error:
        raise Unavailable(f"Cannot listen on {host}:{port}: {error.strerror or error}. Stop what uses it, or choose another --port.") from None

    def begin() -> None:
        try:
            core.engine.load()
            core.jobs.start()
        except BaseException as error:  # noqa: BLE001 - raised again where the process ends
            failures.append(error)
            stopping.set()

    def stop(number: int, _: object) -> None:
        log.info("%s: finishing the requests in flight.", signal.Signals(number).name)
        stopping.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)  # the second one ends it at once

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    log.info("Listening on http://%s:%s; loading the model %s.", host, getattr(server, "effective_port", port), core.model)
    threading.Thread(target=begin, name="load", daemon=True).start()
    try:
        while not stopping.is_set():
            wasyncore.loop(timeout=0.2, use_poll=True, map=sockets, count=1)
        ending = threading.Thread(target=core.jobs.stop, name="stop rounds", daemon=True)
        ending.start()
        drain(sockets, DRAIN_SECONDS)
        server.task_dispatcher.shutdown(timeout=1)
        ending.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        wasyncore.close_all(sockets)
    if failures:
        raise failures[0]


def drain(sockets: dict[int, wasyncore.dispatcher], seconds: float) -> None:
    """No new connection; every request that has begun to arrive is answered and sent, as far as the time allows."""
    for listening in [s for s in sockets.values() if isinstance(s, BaseWSGIServer)]:
        wasyncore.dispatcher.close(listening)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        channels = [s for s in sockets.values() if isinstance(s, HTTPChannel)]
        for channel in channels:
            if not channel.requests and channel.request is None and not channel.total_outbufs_len:
                channel.handle_close()
        if not any(isinstance(s, HTTPChannel) for s in sockets.values()):
            return
        wasyncore.loop(timeout=0.1, use_poll=True, map=sockets, count=1)
    log.warning("Some requests did not end within %.0f s; dropped.", seconds)
