"""A journal made by an older release goes on working: what it lacks of tables.py is added, and nothing else is changed.

The rule for tables.py: tables and columns are only ever added. A new column is either nullable or has a default, which rows
of older releases get here. Whatever needs more than that raises SCHEMA in journal.py.
"""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import Column, Connection, MetaData, Table, inspect, update
from sqlalchemy.exc import CompileError
from sqlalchemy.schema import CreateColumn

from kptllm_core.errors import ArtifactError

log = logging.getLogger(__name__)


def bring_up_to_date(connection: Connection, metadata: MetaData) -> list[str]:
    """Make the tables, columns and indexes that are missing; returns the added columns as `table.column`.

    Runs inside the caller's transaction, so that a journal is brought up to date wholly or not at all.
    """
    old = set(inspect(connection).get_table_names())
    metadata.create_all(connection)
    added = []
    for table in metadata.sorted_tables:
        if table.name not in old:
            continue
        found = inspect(connection)
        there = {column["name"] for column in found.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                _add(connection, table, column)
                added.append(f"{table.name}.{column.name}")
        indexes = {index["name"] for index in found.get_indexes(table.name)}
        for index in table.indexes:
            if index.name not in indexes:
                index.create(connection)
    if added:
        log.info("The journal of an older release was brought up to date: %s.", ", ".join(added))
    return added


def _add(connection: Connection, table: Table, column: Column[Any]) -> None:
    """Add a column and give the rows that are there its default."""
    name = connection.dialect.identifier_preparer.format_table(table)
    loose = Column(column.name, column.type, nullable=True)  # a table with rows takes no NOT NULL column
    Table(table.name, MetaData(), loose)
    try:
        definition = str(CreateColumn(loose).compile(dialect=connection.dialect))
    except CompileError as error:
        raise ArtifactError(
            f"The journal lacks {table.name}.{column.name}, which cannot be added to it: {error}. Use another DATA_DIR."
        ) from None
    connection.exec_driver_sql(f"ALTER TABLE {name} ADD COLUMN {definition}")
    value = _default(column)
    if value is not None:
        connection.execute(update(table).where(column.is_(None)).values({column: value}))


def _default(column: Column[Any]) -> Any:
    """A plain default as it is; of those that are made, only the empty dict and list: no row was made just now."""
    default: Any = column.default
    if default is None:
        return None
    value = default.arg(None) if default.is_callable else default.arg
    return value if not default.is_callable or value in ({}, []) else None
