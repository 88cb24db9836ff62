"""What versions predicted is remembered: what a person saw, what was asked for in the shadow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from backend.served import ask_shadow, first_sayings, keep_shadow
from backend.tables import Predicted
from backend_world import WITH_BOX, World, placed, rectangle, world


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def rows(here: World) -> dict[int, Predicted]:
    with here.services.journal.reading() as session:
        return {r.task: r for r in session.scalars(select(Predicted))}


def test_what_is_served_is_remembered_with_its_version_and_its_regions(here: World) -> None:
    here.label(1, 2)
    (answer,) = here.predict(here.task(5))
    row = rows(here)[5]
    assert row.version == here.services.journal.active("1").id and not row.shadow and row.known == 2
    kept = (row.controls or {})["kp:image"]
    assert kept["size"] == [64, 48] and kept["boxes"] == []
    (points,), (drawn,) = kept["objects"], kept["drawn"]
    ids = {r["value"]["keypointlabels"][0]: r["id"] for r in answer["result"]}
    assert drawn == ids and set(ids) == {"nose", "tail", "ear"}
    assert points["xy"][0][0] == pytest.approx(placed(answer)["nose"][0] * 0.64, abs=0.01)


def test_a_prediction_after_the_correction_does_not_replace_what_was_seen(here: World) -> None:
    here.predict(here.task(5))
    here.predict(here.task(5))
    first = rows(here)[5]
    here.label(5)
    here.services.journal.activate("1", "timed-00000000+r0+s0.f1951d", "")
    here.predict(here.task(5))
    assert len(rows(here)) == 1
    assert (rows(here)[5].made_at, rows(here)[5].known) == (first.made_at, 0)
    with here.services.journal.reading() as session:
        assert first_sayings(session, "1") == {5: 1} and first_sayings(session, "1", [6]) == {}


def test_smart_tools_and_failures_are_not_remembered(here: World) -> None:
    here.predict(here.task(5), config=WITH_BOX, context={"result": [rectangle(10, 10, 50, 50)]})
    here.predict({"id": 6, "data": {}})
    assert rows(here) == {}


def test_boxes_that_the_model_was_given_are_remembered(here: World) -> None:
    annotated = here.task(5, annotations=[{"result": [rectangle(25, 25, 50, 50)], "updated_at": "2026-01-01"}])
    here.predict(annotated, config=WITH_BOX)
    assert (rows(here)[5].controls or {})["kp:image"]["boxes"] == [[16.0, 12.0, 32.0, 24.0]]


def test_a_shadow_is_asked_for_once_and_filled_in_once(here: World) -> None:
    here.label(1)
    journal = here.services.journal
    version = journal.active("1")
    here.predict(here.task(5))
    assert journal.write(lambda session: ask_shadow(session, version, [5, 6, 6, 7])) == 2
    assert journal.write(lambda session: ask_shadow(session, version, [5, 6, 7])) == 0
    row = rows(here)[6]
    assert row.shadow and row.controls is None
    for score in (0.5, 0.7):
        journal.write(lambda session, score=score: keep_shadow(session, row.id, {"kp:image": {}}, score))
    assert rows(here)[6].score == 0.5
    here.predict(here.task(7))  # shown to a person after all
    assert rows(here)[7].shadow is False and rows(here)[7].controls
