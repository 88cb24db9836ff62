"""Work that only one process may do at a time, over all processes that share the journal: whoever holds its lease does it.

A lease needs no clock but each process's own monotonic one: its owner counts `beat` up; whoever has seen the same beat
for LEASE_SECONDS may take it. So neither a clock that jumps nor a killed owner can stop the work for longer than that.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from sqlalchemy.orm import Session

from backend.services import Services
from backend.tables import Lease

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
