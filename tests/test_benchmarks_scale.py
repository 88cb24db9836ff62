"""benchmarks/scale.py: the work around predictions stays small however many there are, because indexes answer what is asked often."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from backend.reports import Reports
from backend.review import ask_for_predictions
from backend.rounds import Rounds
from backend.services import Services
from backend.settings import Settings
from backend.status import project_status
from benchmarks import scale
from label_config.schema import parse


def test_every_work_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    monkeypatch.setattr("sys.argv", ["scale.py", "--images", "40", "--images", "60", "--out", str(out)])
    scale.main()
    rows = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows
    assert [row["images"] for row in rows] == [40, 60] and all(value > 0 for row in rows for value in row.values())


def plans(services: Services, work: Callable[[], object], table: str, whole: bool = False) -> list[str]:
    """SQLite's plan for everything that a work reads of a table. whole: also of rows that are asked for whole (the ORM's)."""
    asked: list[tuple[str, object]] = []
    engine = services.journal._reading
    listen = event.listens_for(engine, "before_cursor_execute")
    listen(lambda connection, cursor, statement, parameters, context, many: asked.append((statement, parameters)))
    work()
    looks = [(s, p) for s, p in asked if s.startswith("SELECT") and (whole or not s.startswith(f"SELECT {table}.id, {table}.project"))]
    with engine.connect() as connection:
        rows = [row[3] for s, p in looks for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {s}", p)]
    return [plan for plan in rows if f" {table} " in plan]


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Services]:
    services = Services.make(Settings.from_env({"DATA_DIR": str(tmp_path)}))
    scale.fill(services.journal, parse(scale.CONFIG), 300, 30, scale.np.random.default_rng(0))
    yield services
    services.journal.close()


def test_what_the_keeper_asks_each_second_reads_no_prediction(filled: Services) -> None:
    """SQLite says that it never goes through all rows, which are large: at most through an index that has all that is asked for."""

    def look() -> None:
        Reports(filled)._state(scale.PROJECT)
        Rounds(filled).start_if_due(scale.PROJECT)
        ask_for_predictions(filled.journal, scale.PROJECT)

    found = plans(filled, look, "predictions")
    through_all = [plan for plan in found if "SCAN" in plan or ("(project=?)" in plan and "predictions_made" not in plan)]
    assert len(found) >= 4 and not through_all, through_all


def test_a_look_at_a_project_reads_no_annotation_but_what_does_not_fit(filled: Services) -> None:
    found = plans(filled, lambda: project_status(filled, Rounds(filled), scale.PROJECT), "annotations")
    reads = [plan for plan in found if "COVERING" not in plan]
    assert len(found) >= 3 and all("misfit_annotations" in plan for plan in reads), reads


def test_an_annotation_that_comes_or_goes_reads_its_own_states_alone(filled: Services) -> None:
    config = parse(scale.CONFIG)
    row = scale.annotation(config, 2, scale.predicted(config, scale.np.random.default_rng(1))[1], scale.np.random.default_rng(1))

    def work() -> None:
        assert filled.journal.record(scale.PROJECT, [], [row], config) == 1
        assert filled.journal.delete_annotations(scale.PROJECT, [3, 4]) == 2

    found = plans(filled, work, "annotations", whole=True)
    reads = [plan for plan in found if "COVERING" not in plan and "annotation=?" not in plan]
    assert len(found) >= 6 and not reads, reads
