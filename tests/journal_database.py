"""Which database the journals of the tests are in: SQLite files, or PostgreSQL where TEST_DATABASE_URL names one.

There each folder of a test has a schema of its own, so that a second journal on the same folder finds what the first one wrote.
All of them are dropped in the end.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

POSTGRESQL = os.environ.get("TEST_DATABASE_URL", "")
_made: set[str] = set()

on_sqlite = pytest.mark.skipif(bool(POSTGRESQL), reason="about SQLite's file, and TEST_DATABASE_URL names another database")
on_postgresql = pytest.mark.skipif(
    not POSTGRESQL,
    reason="TEST_DATABASE_URL is not set (Debian: apt-get install postgresql; pip install -r requirements/postgresql.txt; "
    "then TEST_DATABASE_URL=postgresql://user:password@127.0.0.1/an_empty_database runs the journal's tests there)",
)


def journal_url(folder: Path) -> str:
    """The address of the journal that belongs to a folder."""
    if not POSTGRESQL:
        return f"sqlite:///{folder / 'journal.db'}"
    schema = "test_" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if schema not in _made:
        execute(POSTGRESQL, f'DROP SCHEMA IF EXISTS "{schema}" CASCADE', f'CREATE SCHEMA "{schema}"')
        _made.add(schema)
    return f"{POSTGRESQL}{'&' if '?' in POSTGRESQL else '?'}options={quote(f'-csearch_path={schema}')}"


def execute(url: str, *statements: str) -> None:
    """SQL in one transaction, by nobody's journal."""
    address = make_url(url)
    engine = create_engine(address.set(drivername="postgresql+psycopg") if address.drivername == "postgresql" else address)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@atexit.register
def _drop() -> None:
    for schema in _made:
        execute(POSTGRESQL, f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
