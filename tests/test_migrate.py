"""Journals of older releases: what they lack is added, what they hold stays."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import inspect

from backend.journal import Journal
from backend.migrate import bring_up_to_date
from backend.tables import Base, Project, Version
from journal_database import execute, journal_url

OLD = """
CREATE TABLE projects (id VARCHAR(64) NOT NULL, title TEXT NOT NULL, label_config TEXT NOT NULL, config_hash VARCHAR(64) NOT NULL,
  names JSON NOT NULL, active_version BIGINT, labelled INTEGER NOT NULL, step INTEGER NOT NULL, move_to TEXT, sweep_due BOOLEAN NOT NULL,
  swept_at FLOAT, created_at FLOAT NOT NULL, PRIMARY KEY (id));
CREATE TABLE versions (id INTEGER NOT NULL, project VARCHAR(64) NOT NULL, name TEXT NOT NULL, base TEXT NOT NULL, round INTEGER NOT NULL,
  adapter TEXT, trained_names JSON NOT NULL, support JSON NOT NULL, config_hash VARCHAR(64) NOT NULL, parent TEXT, job VARCHAR(40),
  promoted BOOLEAN NOT NULL, reason TEXT NOT NULL, before JSON, after JSON, seconds FLOAT, created_at FLOAT NOT NULL, PRIMARY KEY (id),
  CONSTRAINT one_version UNIQUE (project, name));
CREATE TABLE facts (name VARCHAR(64) NOT NULL, value JSON NOT NULL, PRIMARY KEY (name));
INSERT INTO facts VALUES ('schema', '{"version": 1}');
INSERT INTO projects VALUES ('7', 'Dogs', '', '', '{}', 1, 3, 2, NULL, FALSE, NULL, 1.0);
INSERT INTO versions VALUES (1, '7', 'nano-0+r0+s0', 'nano-0', 0, NULL, '[]', '[]', '', NULL, NULL, TRUE, 'first', NULL, NULL, NULL, 1.0);
"""


def test_a_journal_of_an_older_release_is_brought_up_to_date_and_keeps_what_it_holds(tmp_path: Path) -> None:
    url = journal_url(tmp_path)
    execute(url, *OLD.strip().removesuffix(";").split(";\n"))
    for _ in range(2):  # the second opening finds nothing to do
        journal = Journal(url)
        assert journal.active("7").name == "nano-0+r0+s0"
        with journal.reading() as session:
            project, version = session.get_one(Project, "7"), session.get_one(Version, 1)
            assert (project.title, project.pinned, project.retrain) == ("Dogs", None, None)
            assert (version.upto, version.pruned) == (0, False)
            found = inspect(session.connection())
            for table in Base.metadata.sorted_tables:
                assert {c["name"] for c in found.get_columns(table.name)} >= {c.name for c in table.columns}
                assert {i["name"] for i in found.get_indexes(table.name)} >= {i.name for i in table.indexes}
        journal.close()


def test_what_was_added_is_told_and_only_once(tmp_path: Path) -> None:
    journal = Journal(journal_url(tmp_path))
    assert journal.write(lambda session: bring_up_to_date(session.connection(), Base.metadata)) == []
    journal.write(lambda session: session.connection().exec_driver_sql("ALTER TABLE versions DROP COLUMN pruned"))
    assert journal.write(lambda session: bring_up_to_date(session.connection(), Base.metadata)) == ["versions.pruned"]
    journal.close()
