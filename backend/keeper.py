"""The background work: one thread in each web worker, of which one at a time, over all processes, holds the lease.

It asks the core how it is, moves rounds on, starts those that are due, sweeps through Label Studio, moves its projects along to
the version that serves and keeps the secret on their webhooks. Nothing of that is ever done in a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from sqlalchemy import select
from sqlalchemy.orm import Session

from backend import shown, webhooks
from backend.lease import BEAT_SECONDS, JournalLease
from backend.prelabel_work import PrelabelWork
from backend.prune import prune
from backend.reports import Reports
from backend.rounds import Rounds
from backend.services import Services, is_passing
from backend.shadow import Shadows
from backend.sweep import sweep_all
from backend.tables import Project, Version
from kptllm_core.errors import KptError

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
CORE_SECONDS = 5.0  # how often the core is asked how it is
PAUSE_SECONDS = 15.0  # before something that did not work, or not yet, is tried again
DUE_SECONDS = 2.0  # at least so long between two sweeps for missed events
PRUNE_SECONDS = 60.0  # how often old adapters are looked for
REPEAT_SECONDS = 600.0  # the same trouble is written into the log so often


class Keeper:
    """The threads of one process: a heart that keeps the lease; hands, a coach, a post office and a backstage, that work while it is held."""

    def __init__(self, services: Services, rounds: Rounds) -> None:
        self.services, self.rounds = services, rounds
        self.shadows = Shadows(services)
        self.reports = Reports(services)
        self.lease = JournalLease(services, "keeper")
        self._holds = threading.Event()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=t, name=f"keeper-{t.__name__}", daemon=True)
            for t in (self._heart, self._hands, self._coach, self._post_office, self._backstage)
        ]
        self._next_core = self._next_sweep = self._next_due_sweep = self._next_prune = 0.0
        self._paused: dict[str, float] = {}  # what → monotonic time before which it is not tried again
        self._told: dict[str, tuple[str, float]] = {}  # what → the last trouble, and when it was logged

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(seconds)
        try:
            self.lease.release()
        except KptError as error:
            log.info("the lease was not given back: %s", error.message)

    def _heart(self) -> None:
        while not self._stop.is_set():
            try:
                held = self.lease.hold()
            except Exception as error:  # noqa: BLE001 - whatever it is, this thread must live on and try again
                log.warning("the keeper's lease: %s", error)
                held = False
            (self._holds.set if held else self._holds.clear)()
            self._stop.wait(BEAT_SECONDS)

    def _hands(self) -> None:
        while not self._stop.is_set():
            if self._holds.wait(timeout=1.0) and not self._stop.is_set():
                self._try("the keeper's turn", self.tick)
            self._stop.wait(TICK_SECONDS)

    def _coach(self) -> None:
        """Moves rounds on. Their images are fetched and sent, which may take long: beside the other work."""
        while not self._stop.is_set():
            if self._holds.wait(timeout=1.0) and not self._stop.is_set():
                self._try("the coach's turn", self.train)
            self._stop.wait(TICK_SECONDS)

    def _post_office(self) -> None:
        """Posts predictions, which may take hours: beside the other work."""
        work = PrelabelWork(self.services)
        while not self._stop.is_set():
            if self._holds.wait(timeout=1.0) and not self._stop.is_set():
                self._try("posting predictions", partial(work.turn, self._stop))
            self._stop.wait(TICK_SECONDS)

    def _backstage(self) -> None:
        """Predictions that nobody sees; a slow core holds up nothing else here."""
        made = False

        def work() -> None:
            nonlocal made
            made = self.rehearse()

        while not self._stop.is_set():
            made = False
            if self._holds.wait(timeout=1.0) and not self._stop.is_set():
                self._try("predictions in the shadow", work)
            self._stop.wait(0.1 if made else TICK_SECONDS)

    # ------------------------------------------------------------ the work

    def rehearse(self) -> bool:
        """A few predictions in the shadow for each project. Whether there were any to make."""
        made = False
        for project in self._projects():

            def work(number: str = project.id) -> None:
                nonlocal made
                made = self.shadows.make(number) > 0 or made

            self._try(f"project {project.id}, predictions in the shadow", work)
        return made

    def train(self) -> None:
        """Each open round one step on."""
        for job in self.rounds.open_jobs():
            self._try(f"round {job}", partial(self.rounds.step, job))

    def tick(self) -> None:
        """One turn of the hands' work. No trouble of one part keeps the others from their turn."""
        now = time.monotonic()
        if now >= self._next_core:
            self._next_core = now + CORE_SECONDS
            self._try("the core", self._see_core)
        for project in self._projects():
            self._try(f"project {project.id}", partial(self.rounds.start_if_due, project.id))
            self._try(f"project {project.id}, image sizes", partial(self._learn_sizes, project.id))
            self._try(f"project {project.id}, reports", partial(self.reports.turn, project.id))
            self._try(f"project {project.id}, judging", partial(self.shadows.step, project.id))
            if project.move_to and self.services.has_token and project.id.isdigit():
                what = f"project {project.id}, Label Studio's version"
                self._try(what, partial(self._move_along, project.id, project.move_to))
        if now >= self._next_prune:
            self._next_prune = now + PRUNE_SECONDS
            for project in self._projects():
                self._try(f"project {project.id}, old adapters", partial(prune, self.services, project.id))
        if self.services.has_token:
            self._sweep_in_time(now)

    def _try(self, what: str, work: Callable[[], object]) -> bool:
        """Do it, unless it is to be left alone for a while. Trouble is logged once, not at every turn. True when it worked."""
        now = time.monotonic()
        if now < self._paused.get(what, 0.0):
            return False
        try:
            work()
        except KptError as error:
            said, at = self._told.get(what, ("", 0.0))
            if error.message != said or now > at + REPEAT_SECONDS:
                log.warning("%s: %s", what, error.message)
                self._told[what] = error.message, now
            self._pause(what)
            return False
        except Exception:
            log.exception("%s: the background work failed", what)
            self._pause(what)
            return False
        if self._told.pop(what, None):
            log.info("%s: all is well again", what)
        return True

    def _pause(self, what: str) -> None:
        self._paused[what] = time.monotonic() + (PAUSE_SECONDS if what != "the core" else 0.0)

    def _see_core(self) -> None:
        """When the core runs another base than a project's version was made for, the project gets a version for it."""
        base = self.services.see_core()
        for project in self._projects():
            with self.services.journal.reading() as session:
                version = session.get(Version, project.active_version) if project.active_version else None
            if version is not None and version.base != base:
                self.services.journal.observe(project.id, project.label_config, base)

    def _learn_sizes(self, project: str) -> None:
        """Annotations made by programs may not say how large their image is; the support set waits for that."""
        waiting = self.services.journal.support_waits_for(project)
        for task, url in waiting:
            try:
                self.services.image(project, task, url)
            except KptError as error:
                if is_passing(error):
                    raise
                log.warning("project %s, task %s: %s", project, task.task, error.message)
        if waiting:
            self.services.journal.retry_support(project)

    def _move_along(self, project: str, version: str) -> None:
        if shown.move_along(self.services, project, version):
            self._moved(project, version)
        else:
            self._pause(f"project {project}, Label Studio's version")

    def _moved(self, project: str, version: str) -> None:
        def change(session: Session) -> None:
            row = session.get_one(Project, project)
            if row.move_to == version:
                row.move_to = None

        self.services.journal.write(change)

    def _sweep_in_time(self, now: float) -> None:
        """Over all projects at the start and every SWEEP_SECONDS; in between, over those where something was missed."""
        if now >= self._next_sweep:
            self._next_sweep = now + self.services.settings.sweep_seconds
            projects = [p.id for p in self._projects()]
            swept = self._try("Label Studio", partial(self._sweep, projects))
            for project in projects if swept else ():
                if project.isdigit():
                    self._try(f"project {project}, the secret of its webhook", partial(webhooks.sign, self.services, project))
        due = [p.id for p in self._projects() if p.sweep_due]
        if due and now >= self._next_due_sweep:
            self._next_due_sweep = now + DUE_SECONDS
            self._try("Label Studio", partial(self._sweep, due))

    def _sweep(self, projects: list[str]) -> None:
        try:
            sweep_all(self.services, projects)
        except KptError as error:
            self.services.journal.set_fact("label_studio", {"up": False, "message": error.message})
            raise
        self.services.journal.set_fact("label_studio", {"up": True, "message": ""})

    def _projects(self) -> list[Project]:
        with self.services.journal.reading() as session:
            return list(
                session.scalars(select(Project).where(Project.active_version.is_not(None)).order_by(Project.id))
            )
