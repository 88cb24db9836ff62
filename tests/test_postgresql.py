"""The journal on PostgreSQL: what is only true there. Where TEST_DATABASE_URL is set, all journals of the suite are there, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from backend.database import json_text
from backend.journal import Journal
from backend.tables import Event, Project
from journal_database import journal_url, on_postgresql
from kptllm_core.errors import Unavailable


@pytest.fixture
def url(tmp_path: Path) -> str:
    return journal_url(tmp_path)


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    made = Journal(url)
    yield made
    made.close()


@on_postgresql
def test_there_is_one_writer_at_a_time_and_it_reads_what_is_true(url: str, journal: Journal) -> None:
    """Two transactions that each read, wait and write: with less than a turn each, one would undo the other."""
    journal.write(lambda session: session.add(Project(id="1", labelled=0)))

    def count(session: Session) -> None:
        row = session.get_one(Project, "1")
        before = row.labelled
        time.sleep(0.01)
        row.labelled = before + 1

    others = [Journal(url) for _ in range(3)]
    threads = [threading.Thread(target=lambda j=j: [j.write(count) for _ in range(10)]) for j in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with journal.reading() as session:
        assert session.get_one(Project, "1").labelled == 30
    for other in others:
        other.close()


@on_postgresql
def test_a_reader_sees_one_state(url: str, journal: Journal) -> None:
    with journal.reading() as session:
        before = list(session.scalars(select(Event.id)))
        journal.log_event("1", "MEANWHILE")
        assert list(session.scalars(select(Event.id))) == before
    with journal.reading() as session:
        assert len(list(session.scalars(select(Event.id)))) == len(before) + 1


@on_postgresql
def test_a_writer_that_hangs_is_waited_for_and_then_told_of(url: str, journal: Journal) -> None:
    impatient = Journal(url, patience=0.5)
    held, free = threading.Event(), threading.Event()

    def hang(session: Session) -> None:
        session.add(Event(project="1", action="HANG"))
        session.flush()
        held.set()
        free.wait(20)

    thread = threading.Thread(target=journal.write, args=(hang,))
    thread.start()
    held.wait(5)
    with pytest.raises(Unavailable, match="lock timeout"):
        impatient.log_event("1", "TEST")
    assert impatient.base() is None  # reading goes on
    threading.Timer(0.2, free.set).start()
    impatient.patience = 20
    impatient.log_event("1", "TEST")
    thread.join()
    impatient.close()


@on_postgresql
def test_connections_that_the_server_ended_are_made_anew(journal: Journal) -> None:
    attempts: list[int] = []

    def cut(session: Session) -> None:
        attempts.append(len(attempts))
        session.add(Event(project="1", action="CUT"))
        session.flush()
        if len(attempts) == 1:
            with Journal.reading(journal) as other:
                other.execute(text("select pg_terminate_backend(:pid)"), {"pid": session.scalar(text("select pg_backend_pid()"))})

    journal.write(cut)
    with journal.reading() as session:
        assert len(list(session.scalars(select(Event.id).where(Event.action == "CUT")))) == 1
    assert len(attempts) == 2


@on_postgresql
def test_what_its_text_cannot_hold_is_left_out(journal: Journal) -> None:
    odd: dict[str, Any] = {"nul": "a\0b", "half": "\ud800x", "nan": float("nan"), "whole": "\U0001f600", "deep": [float("inf"), {"ü": 1.5}]}
    journal.log_event("1", "ODD\0", odd)
    journal.set_fact("odd", odd)
    assert journal.fact("odd") == {"nul": "a\0b", "half": "�x", "nan": None, "whole": "\U0001f600", "deep": [None, {"ü": 1.5}]}
    with journal.reading() as session:
        assert session.scalar(select(Event.action)) == "ODD"


HANGER = """
import sys, time
sys.path[:0] = sys.argv[2:]
from backend.journal import Journal
from backend.tables import Event
def hang(session):
    session.add(Event(project="1", action="HALF"))
    session.flush()
    print("half", flush=True)
    time.sleep(60)
Journal(sys.argv[1]).write(hang)
"""


@on_postgresql
def test_a_writer_killed_in_the_middle_leaves_nothing_and_hands_its_turn_on(url: str, journal: Journal) -> None:
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen([sys.executable, "-c", HANGER, url, root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    journal.log_event("1", "NEXT")
    with journal.reading() as session:
        assert list(session.scalars(select(Event.action))) == ["NEXT"]


def test_json_that_every_database_takes() -> None:
    assert json_text({"a": [1, 1.5, None, "ü", "\U0001f600"]}) == '{"a": [1, 1.5, null, "\\u00fc", "\\ud83d\\ude00"]}'
    assert json_text([float("nan"), -float("inf"), "NaN"]) == '[null, null, "NaN"]'
    assert json_text(["\ud800", "a\\ud800"]) == '["\\ufffd", "a\\\\ud800"]'
