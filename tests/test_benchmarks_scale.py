"""benchmarks/scale.py: the work around predictions stays small however many there are, because indexes answer what is asked often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import event

from backend.reports import Reports
from backend.review import ask_for_predictions
from backend.rounds import Rounds
from backend.services import Services
from backend.settings import Settings
from benchmarks import scale
from label_config.schema import parse


def test_every_work_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    monkeypatch.setattr("sys.argv", ["scale.py", "--images", "40", "--images", "60", "--out", str(out)])
    scale.main()
    rows = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows
    assert [row["images"] for row in rows] == [40, 60] and all(value > 0 for row in rows for value in row.values())


def test_what_the_keeper_asks_each_second_reads_no_prediction(tmp_path: Path) -> None:
    """SQLite says that it never goes through all rows, which are large: at most through an index that has all that is asked for."""
    services = Services.make(Settings.from_env({"DATA_DIR": str(tmp_path)}))
    journal = services.journal
    scale.fill(journal, parse(scale.CONFIG), 300, 30, scale.np.random.default_rng(0))
    asked: list[tuple[str, object]] = []
    engine = journal._reading
    listen = event.listens_for(engine, "before_cursor_execute")
    listen(lambda connection, cursor, statement, parameters, context, many: asked.append((statement, parameters)))
    Reports(services)._state(scale.PROJECT)
    Rounds(services).start_if_due(scale.PROJECT)
    ask_for_predictions(journal, scale.PROJECT)
    looks = [(statement, parameters) for statement, parameters in asked if "predictions" in statement and statement.startswith("SELECT")]
    assert len(looks) >= 4
    with engine.connect() as connection:
        plans = [
            row[3]
            for statement, parameters in looks
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            if "predictions" in row[3] and "SELECT predictions.id, predictions.project" not in statement
        ]
    through_all = [plan for plan in plans if "SCAN" in plan or ("(project=?)" in plan and "predictions_made" not in plan)]
    assert plans and not through_all, through_all
    journal.close()
