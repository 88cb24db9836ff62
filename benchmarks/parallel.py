"""Independent measurements, in worker processes of one thread each.

Two such workers on two cores finish sooner than one with two threads: the operators of a small model are too short to share.
Where the time itself is measured, ask for one job: it then runs here, with all threads.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from kptllm_core.errors import KptError
from kptllm_core.trainer import die_with

Item = TypeVar("Item")


def run_each(function: Callable[[Item], None], items: Mapping[str, Item], jobs: int = 1) -> dict[str, str]:
    """Calls `function` (of a module, so that it can be sent) with each item; tells each end on stderr.

    Returns {name: message} of those that failed; the others are not kept from their turn.
    """
    failed: dict[str, str] = {}
    begin = time.monotonic()
    for number, (name, message) in enumerate(_results(function, items, jobs), 1):
        end = "done" if message is None else f"failed: {message}"
        print(f"[{number}/{len(items)}, {time.monotonic() - begin:.0f} s] {name}: {end}", file=sys.stderr, flush=True)
        if message is not None:
            failed[name] = message
    return failed


def _results(
    function: Callable[[Item], None], items: Mapping[str, Item], jobs: int
) -> Iterator[tuple[str, str | None]]:
    if jobs <= 1 or len(items) <= 1:
        for name, item in items.items():
            yield name, _attempt(function, item)
        return
    with _one_thread_each(), _pool(min(jobs, len(items))) as pool:
        names: dict[Future[str | None], str] = {
            pool.submit(_attempt, function, item): name for name, item in items.items()
        }
        for future in as_completed(names):
            lost = future.exception()  # a worker that was killed, for want of memory perhaps
            yield names[future], future.result() if lost is None else f"{type(lost).__name__}: {lost}"


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker, (os.getpid(),))


def _attempt(function: Callable[[Item], None], item: Item) -> str | None:
    try:
        function(item)
    except KptError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 - one measurement that fails is told and leaves the others their turn
        return f"{type(error).__name__}: {error}"
    return None


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it in silence; what it had finished is on disk
    die_with(parent)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """OpenMP reads the number of its threads when a process starts: set here for the workers alone."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
