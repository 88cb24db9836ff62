"""`python -m backend prelabel`: predictions for all unlabelled tasks of a project, with a progress bar.

Works on the run itself, unless a running backend has begun with it: then it shows how that one gets on. Interrupted, by
Ctrl-C or a kill, the run stays open; the same command, or the backend, goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from backend import prelabel, split
from backend.model import KptLLMBackend
from backend.prelabel_work import CONCURRENCY, PrelabelWork
from backend.services import Services
from backend.settings import Settings
from backend.sweep import sweep
from kptllm_core.errors import InvalidInput, KptError, Unauthorized

SHOW_SECONDS = 0.3
SIGN_SECONDS = 30.0  # after which a wait is told, and told again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command. Everything else comes from the backend's environment variables."""
    parser.description = (
        "Predicts every task of a Label Studio project that nobody labelled, and posts the predictions there. No time limit "
        "cuts it off, and it can be interrupted at any moment: called again it goes on, and no task gets two predictions of a "
        "version. Needs the same environment variables as the backend, and a core that runs."
    )
    add = parser.add_argument
    add("--project", type=int, required=True, help="the project's number, as in /projects/7/")
    add("--replace", action="store_true", help="delete predictions of this backend's older versions where a new one was posted")
    add("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="batches at a time, 1 to 16 (default: %(default)s)")
    add("--patience", type=float, default=600.0, metavar="SECONDS", help="give up when nothing worked for so long (default: %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--status", action="store_true", help="only say how the last run stands")
    only.add_argument("--cancel", action="store_true", help="end the run that is under way; what was posted stays")


def run(args: argparse.Namespace) -> int:
    """0 when every task has its prediction, 1 when some have none or the run did not end, 130 after Ctrl-C."""
    if not 1 <= args.concurrency <= 16:
        raise InvalidInput(f"--concurrency is {args.concurrency}; expected 1 to 16.")
    services = Services.make(Settings.from_env())
    project = str(args.project)
    try:
        if args.status or args.cancel:
            if args.cancel:
                prelabel.cancel(services, project)
            last = prelabel.latest(services, project)
            if last is None:
                print(f"Project {project} has had no prelabel run yet.")
                return 0
            return _report(prelabel.prelabel_state(services, last))
        prelabel.check_project(services, project)
        # What is wrong with address, token or number is best said before all else.
        with _waiting_for(f"Label Studio at {services.settings.label_studio_url} and the core at {services.settings.core_address}"):
            shown = str(services.label_studio.project(args.project).get("model_version") or "")
            services.see_core()
        served = bool(split.MADE_HERE.fullmatch(shown))
        if (args.replace or served) and not services.journal.label_config(project):
            raise InvalidInput(
                f"The journal of these settings (DATA_DIR={services.settings.data_dir}) knows nothing of project {project}"
                + (f", which {shown} serves" if served else "")
                + ". So worse predictions could take the place of better ones. Set DATA_DIR or DATABASE_URL as the backend has them"
                + ("." if served else ", or leave out --replace.")
            )
        with _waiting_for(f"what was labelled meanwhile, from Label Studio at {services.settings.label_studio_url}"):
            sweep(services, project)  # what was labelled while no backend ran serves as examples, too
        asked = prelabel.start(services, project, args.replace, "python -m backend prelabel")
        return _watch(services, asked.id, args.concurrency, args.patience)
    finally:
        services.journal.close()


@contextmanager
def _waiting_for(what: str) -> Iterator[None]:
    """Says every SIGN_SECONDS that it still waits."""
    done, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(SIGN_SECONDS):
            print(f"Waiting for {what} … ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)

    threading.Thread(target=tell, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(services: Services, run_id: str, concurrency: int, patience: float) -> int:
    """Work and show how far it is, until the run is finished or nothing works any more."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    KptLLMBackend.connect(services)
    work, stop = PrelabelWork(services, concurrency=concurrency), threading.Event()
    interrupted = threading.Event()
    broken: list[BaseException] = []

    def turns() -> None:
        try:
            while not stop.is_set():
                work.turn(stop, run_id)
                stop.wait(1.0)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            broken.append(error)

    def interrupt(*_: Any) -> None:
        interrupted.set()

    old = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    worker = threading.Thread(target=turns, name="prelabel", daemon=True)
    worker.start()
    moved = told = time.monotonic()
    seen = (-1, -1)
    try:
        with tqdm(unit="task", desc=f"project {prelabel.get(services, run_id).project}", dynamic_ncols=True, disable=None) as bar:
            while True:
                state = prelabel.prelabel_state(services, prelabel.get(services, run_id))
                _show(bar, state)
                if (state["total"], state["finished"]) != seen:
                    moved = told = time.monotonic()
                    seen = (state["total"], state["finished"])
                elif time.monotonic() - told > SIGN_SECONDS:
                    told = time.monotonic()
                    bar.write(f"Nothing has moved for {told - moved:.0f} s: {state['message'].removeprefix('waiting: ')}", file=sys.stderr)
                if not state["active"] or interrupted.is_set() or broken:
                    break
                trouble = work.trouble
                if trouble is not None and (isinstance(trouble, Unauthorized) or time.monotonic() - moved > patience):
                    broken.append(trouble)
                    break
                time.sleep(SHOW_SECONDS)
    finally:
        stop.set()
        if interrupted.is_set():
            print("Stopping after the tasks that are being predicted …", file=sys.stderr)
        worker.join(100.0)
        for number, handler in old.items():
            signal.signal(number, handler)
    if broken and isinstance(broken[0], KptError):
        print(f"{broken[0].message}\nThe run stays open: the same command goes on with it.", file=sys.stderr)
        return 1
    if broken:
        raise broken[0]
    if state["active"]:
        print("The run stays open: the same command goes on with it, and so does the backend when it runs; --cancel ends it.", file=sys.stderr)
        return 130
    return _report(state)


def _show(bar: tqdm[Any], state: dict[str, Any]) -> None:
    bar.total = state["total"]
    bar.n = state["finished"]
    bar.set_postfix_str(state["message"][:60] if state["message"].startswith("waiting") else f"failed {state['failed']}", refresh=False)
    bar.refresh()


def _report(state: dict[str, Any]) -> int:
    """What became of a run, in words."""
    print(f"Project {state['project']}, {state['state']}: {state['message']}")
    if state["active"]:
        print(f"{state['finished']} of {state['total']}{'' if state['listed'] else ' (still listing)'} tasks are done.")
    for failure in state["failures"]:
        print(f"  task {failure['task']}: {failure['message']}")
    if state["failed"]:
        print("Calling it again tries the failed ones anew.")
    return 0 if state["state"] in ("running", "done", "cancelled") and not state["failed"] else 1
