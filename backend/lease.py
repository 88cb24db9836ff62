"""Work that only one process may do at a time, over all processes that share the journal: whoever holds its lease does it.

A lease needs no clock but each process's own monotonic one: its owner counts `beat` up; whoever has seen the same beat
for LEASE_SECONDS may take it. So neither a clock that jumps nor a killed owner can stop the work for longer than that.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable

from sqlalchemy.orm import Session

from backend.services import Services
from backend.tables import Lease
from kptllm_core.errors import KptError

log = logging.getLogger(__name__)
LEASE_SECONDS = 10.0
BEAT_SECONDS = 2.0  # how often an owner calls `hold`


class JournalLease:
    """`hold()` is called again and again; True while this process has the lease."""

    def __init__(
        self, services: Services, name: str, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.journal, self.name, self.seconds, self.clock = services.journal, name, seconds, clock
        self.owner = secrets.token_hex(8)
        self._seen: tuple[str, int] | None = None
        self._seen_at = 0.0

    def hold(self) -> bool:
        with self.journal.reading() as session:  # the usual case of those who only watch writes nothing
            row = session.get(Lease, self.name)
        if row is not None and row.owner != self.owner:
            if self._seen != (row.owner, row.beat):
                self._seen, self._seen_at = (row.owner, row.beat), self.clock()
                return False
            if self.clock() - self._seen_at < self.seconds:
                return False
        return self.journal.write(self._take)

    def _take(self, session: Session) -> bool:
        row = session.get(Lease, self.name, with_for_update=True)
        if row is None:
            session.add(Lease(name=self.name, owner=self.owner, beat=1))
        elif row.owner == self.owner or (row.owner, row.beat) == self._seen:
            row.owner, row.beat = self.owner, row.beat + 1
        else:
            return False  # another one was first
        return True

    def release(self) -> None:
        def give_back(session: Session) -> None:
            row = session.get(Lease, self.name)
            if row is not None and row.owner == self.owner:
                session.delete(row)

        self.journal.write(give_back)


class Heart:
    """Keeps a lease that is held, in a thread of its own, for as long as the `with` block works. `lost`: another has it now."""

    def __init__(self, lease: JournalLease, beat: float = BEAT_SECONDS) -> None:
        self.lost = threading.Event()
        self._lease, self._beat = lease, beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heart-{lease.name}", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost.is_set():
            try:
                self._lease.release()
            except KptError as error:
                log.info("the lease %s was not given back: %s", self._lease.name, error.message)

    def _run(self) -> None:
        held_at = time.monotonic()
        while not self._stop.wait(self._beat):
            try:
                held = self._lease.hold()
            except KptError as error:
                log.warning("the lease %s: %s", self._lease.name, error.message)
                held = time.monotonic() - held_at < self._lease.seconds  # so long nobody else may take it
            else:
                held_at = time.monotonic()
            if not held:
                self.lost.set()
                return
