"""The journal's database: SQLite with WAL and synchronous=FULL, or PostgreSQL; both keep the same two promises.

- A reader sees one consistent state: a snapshot (SQLite: WAL; PostgreSQL: REPEATABLE READ).
- There is one writer at a time, over all processes, and it waits for its turn (SQLite: BEGIN IMMEDIATE behind a lock on a file;
  PostgreSQL: an advisory lock that the transaction holds). So what a writer has read is still true when it commits.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from kptllm_core.errors import InvalidInput, Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")
# What SQLite says, and PostgreSQL's codes for serialization failure, deadlock, lock not available, and the end of a connection by its server.
_PASSING = ("locked", "busy", "deadlock", "could not serialize", "already exists", "40001", "40p01", "55p03", "57p01")
_TURN = "select pg_advisory_xact_lock(hashtext('keypoint journal ' || current_schema()))"
_LIMITS = "select set_config('lock_timeout', %s, true), set_config('idle_in_transaction_session_timeout', '60s', true)"


def make_engines(url: str, patience: float) -> tuple[Engine, Engine]:
    """(for reading, for writing), over one pool of connections. patience: seconds that a writer waits for its turn."""
    try:
        address = make_url(url)
    except ArgumentError:
        raise InvalidInput("DATABASE_URL is no address of a database; expected postgresql://user:password@host/name.") from None
    if address.drivername.startswith("sqlite"):
        engine = _sqlite(address)
        return engine, engine.execution_options(kpt_write=True)
    engine = _postgresql(address, patience)
    return engine.execution_options(isolation_level="REPEATABLE READ"), engine.execution_options(kpt_write=True)


class Turn:
    """Whose turn it is to write: threads queue here, processes at a file beside the database.

    SQLite itself keeps out all but one, but lets those who wait sleep up to 0.1 s at a time, by turns of luck.
    """

    def __init__(self, url: URL, patience: float) -> None:
        self._threads, self._patience = threading.Lock(), patience
        self._file: IO[bytes] | None = None
        if url.drivername.startswith("sqlite") and url.database:
            self._file = Path(f"{url.database}.lock").open("ab")  # noqa: SIM115 - open as long as the journal is

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn. Who has it may hang: after so long the database's own lock decides."""
        deadline = time.monotonic() + self._patience
        first = self._threads.acquire(timeout=self._patience)
        held = False
        try:
            while first and self._file is not None and not held and time.monotonic() < deadline:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                except BlockingIOError:
                    time.sleep(0.001)
            yield
        finally:
            if self._file is not None and held:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            if first:
                self._threads.release()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def parts(values: Iterable[T], size: int = 500) -> Iterator[list[T]]:
    """Some values at a time, for `in_`: a statement takes some thousand at most."""
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part


def worth_repeating(error: DBAPIError, attempt: int) -> bool:
    """Whether a transaction that failed so may be run again: somebody else was first, or the connection went."""
    said = f"{error.orig} {getattr(error.orig, 'sqlstate', '')}".lower()
    if error.connection_invalidated:
        return attempt < 3
    return any(word in said for word in _PASSING) or (isinstance(error, IntegrityError) and attempt < 3)


def unavailable(error: SQLAlchemyError) -> Unavailable:
    log.error("journal: %s: %s", type(error).__name__, getattr(error, "orig", error))
    said = str(getattr(error, "orig", "") or type(error).__name__).strip()
    hint = (
        "Free some disk space." if "full" in said.lower() else "Try again; if it stays so, look at the backend's log."
    )
    return Unavailable(f"The journal cannot be used at the moment ({said[:200]}). {hint}")


def _sqlite(address: URL) -> Engine:
    if address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": 0.5}, json_serializer=json_text)

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes the lock at once: a reader that becomes a writer could only fail when another one was first.
        writes = connection.get_execution_options().get("kpt_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(address: URL, patience: float) -> Engine:
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    try:
        from psycopg.types.string import StrDumper

        engine = create_engine(address, pool_pre_ping=True, max_overflow=20, json_serializer=json_text, connect_args={"connect_timeout": 5})
    except ImportError as error:
        raise InvalidInput(
            f"DATABASE_URL names PostgreSQL, whose driver is not there ({error.name or error}). "
            "Install it: pip install -r requirements/postgresql.txt"
        ) from None

    class WithoutNul(StrDumper):
        """PostgreSQL's text holds every character but this one."""

        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", ""))

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.adapters.register_dumper(str, WithoutNul)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("kpt_write"):
            connection.exec_driver_sql(_LIMITS, (f"{patience:g}s",))
            connection.exec_driver_sql(_TURN)

    return engine


def json_text(value: Any) -> str:
    """JSON that every database takes: numbers that are none become null, half characters a question mark."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))
    if "\\ud" in text:  # a pair of surrogates is a character; a single one is none
        characters = json.dumps(json.loads(text), ensure_ascii=False)
        text = json.dumps(json.loads(characters.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")))
    return text
