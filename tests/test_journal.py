"""The journal: one effect per saying, the newest wins, support sets freeze at their steps, nothing acknowledged is lost."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend import split
from backend.intake import annotation_row, id_of, project_of, task_row, updated_us
from backend.journal import Journal
from backend.served import keep_served
from backend.tables import Annotation, Group, Predicted
from backend_world import CONFIG, WITH_BOX, region
from journal_database import journal_url, on_sqlite
from kptllm_core.errors import ArtifactError, Conflict, InvalidInput, NotFound, Unavailable
from label_config.schema import parse

LABELS = ("nose", "tail", "ear")
COPIED = [{k: v for k, v in region("nose", 10.0, 10.0).items() if k != "origin"}]  # as it was predicted
FIRST = "nano-0+r0+s0.f1951d"  # under CONFIG, before anything was labelled


@pytest.fixture
def url(tmp_path: Path) -> str:
    return journal_url(tmp_path / "deep")


@pytest.fixture
def journal(url: str) -> Iterator[Journal]:
    made = Journal(url)
    made.observe("1", CONFIG, "nano-0")
    yield made
    made.close()


def body(task: int, number: int = 0, second: int = 0, labels: tuple[str, ...] = LABELS, **more: Any) -> dict[str, Any]:
    result = [region(label, 10.0 + 10 * i + second, 50.0) for i, label in enumerate(labels)]
    return {"id": number or task + 1000, "result": result, "updated_at": f"2026-01-01T00:00:{second:02}Z", **more}


def record(journal: Journal, *bodies: tuple[int, dict[str, Any]], config: str = CONFIG, **data: Any) -> int:
    parsed = parse(config)
    tasks = [task_row("1", {"id": t, "data": {"image": f"/data/upload/1/{t}.png", **data}}, parsed) for t, _ in bodies]
    return journal.record("1", tasks, [annotation_row("1", b, t, parsed) for t, b in bodies], parsed)


def current(journal: Journal) -> dict[int, Annotation]:
    with journal.reading() as session:
        return {a.annotation: a for a in session.scalars(select(Annotation).where(Annotation.current))}


@on_sqlite
def test_the_file_is_safe_against_power_loss(journal: Journal, url: str) -> None:
    with journal.reading() as session:
        assert session.connection().exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert session.connection().exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_the_same_saying_twice_has_one_effect(journal: Journal) -> None:
    assert record(journal, (1, body(1))) == 1
    before = journal.active("1").name
    assert record(journal, (1, body(1))) == 0
    assert journal.active("1").name == before
    with journal.reading() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 1


def test_the_newest_updated_at_wins_in_whatever_order_they_come(journal: Journal) -> None:
    for number, order in enumerate(itertools.permutations((1, 2, 3)), 1):
        for second in order:
            record(journal, (number, body(number, second=second)))
        assert current(journal)[number + 1000].updated_us == updated_us("2026-01-01T00:00:03Z")


def test_a_deletion_is_a_tombstone_that_late_webhooks_do_not_lift(journal: Journal) -> None:
    record(journal, (1, body(1)), (2, body(2)))
    assert journal.delete_annotations("1", [1001, 77]) == 2
    assert journal.delete_annotations("1", [1001, 77]) == 0
    record(journal, (1, body(1, second=9)), (7, body(7, number=77)))
    assert {n for n, a in current(journal).items() if not a.deleted} == {1002}
    assert [c.task for c in journal.candidates("1")] == [2]


def test_what_the_api_shows_lifts_a_tombstone_when_it_is_newer(journal: Journal) -> None:
    config = parse(CONFIG)
    record(journal, (1, body(1, second=1)))
    journal.delete_annotations("1", [1001])
    assert journal.record("1", [], [annotation_row("1", body(1, second=1), 1, config)], config, seen=True) == 0
    assert current(journal)[1001].deleted
    journal.record("1", [], [annotation_row("1", body(1, second=2), 1, config)], config, seen=True)
    assert not current(journal)[1001].deleted


def test_a_correction_that_came_behind_a_tombstone_counts_once_the_api_shows_it(journal: Journal) -> None:
    config = parse(CONFIG)
    record(journal, (1, body(1, second=1)))
    journal.delete_annotations("1", [1001])
    assert record(journal, (1, body(1, second=5))) == 1  # a webhook: it may be a late one
    assert current(journal)[1001].deleted
    for new in (1, 0):
        assert journal.record("1", [], [annotation_row("1", body(1, second=5), 1, config)], config, seen=True) == new
    assert not current(journal)[1001].deleted and [c.task for c in journal.candidates("1")] == [1]


@pytest.mark.parametrize("deletion_is_told", ["before", "after"])
def test_annotations_that_label_studio_moves_to_another_task_are_kept(journal: Journal, deletion_is_told: str) -> None:
    """The Data Manager's Remove Duplicated Tasks: the annotation of task 2 goes to task 1 as it is, and task 2 is deleted."""
    config = parse(CONFIG)
    record(journal, (1, body(1)), (2, body(2)))
    if deletion_is_told == "before":
        assert journal.delete_tasks("1", [2]) == 1
    assert journal.record("1", [], [annotation_row("1", body(2), 1, config)], config, seen=True) == 1
    if deletion_is_told == "after":
        assert journal.delete_tasks("1", [2]) == 0
    found = current(journal)[1002]
    assert found.task == 1 and not found.deleted and found.counts
    assert journal.record("1", [], [annotation_row("1", body(2), 1, config)], config, seen=True) == 0
    for _ in range(2):  # and may be deleted, and come back, as any other
        assert journal.delete_annotations("1", [1002]) == 1
        assert [c.task for c in journal.candidates("1")] == [1] and current(journal)[1002].deleted
        assert journal.record("1", [], [annotation_row("1", body(2), 3, config)], config, seen=True) == 1
        assert {c.task for c in journal.candidates("1")} == {1, 3}
        assert journal.record("1", [], [annotation_row("1", body(2), 1, config)], config, seen=True) == 1


def test_more_annotations_go_at_once_than_a_statement_names(journal: Journal) -> None:
    record(journal, *((task, body(task)) for task in range(1, 31)))
    assert journal.delete_annotations("1", [*range(1001, 1021), *range(5000, 6200)]) == 1220
    assert [c.task for c in journal.candidates("1")] == list(range(21, 31))


def test_deleted_tasks_take_their_annotations_along(journal: Journal) -> None:
    record(journal, (1, body(1)), (2, body(2)))
    assert journal.delete_tasks("1", [1]) == 1
    assert [c.task for c in journal.candidates("1")] == [2]


def test_deleted_tasks_take_their_predictions_along_also_where_nobody_labelled_them(journal: Journal) -> None:
    record(journal, (1, body(1)))
    keep_served(journal, journal.active("1"), {1: ({}, 0.5), 2: ({}, 0.5), 3: ({}, 0.5)})
    assert journal.delete_tasks("1", [1, 2]) == 1
    with journal.reading() as session:
        assert session.scalars(select(Predicted.task)).all() == [3]


@pytest.mark.parametrize(
    ("more", "counts"),
    [({}, True), ({"was_cancelled": True}, False), ({"is_draft": True}, False), ({"last_action": "prediction"}, False),
     ({"last_action": "updated"}, True), ({"labels": ()}, True),
     ({"parent_prediction": 5, "lead_time": None, "result": COPIED}, False), ({"parent_prediction": 5, "lead_time": None}, True),
     ({"parent_prediction": 5, "lead_time": 3.5, "result": COPIED}, True)],
)  # fmt: skip
def test_which_annotations_count(journal: Journal, more: dict[str, Any], counts: bool) -> None:
    record(journal, (1, body(1, **more)))
    row = current(journal)[1001]
    assert row.counts is counts
    assert bool(row.why_not) is not counts
    assert bool(journal.candidates("1")) is (counts and more.get("labels") != ())


def test_ground_truth_speaks_for_its_image_then_the_newest(journal: Journal) -> None:
    record(
        journal,
        (1, body(1, 5, second=1, ground_truth=True)),
        (1, body(1, 6, second=9)),
        (2, body(2, 7, second=1)),
        (2, body(2, 8, second=2)),
    )
    rows = {a.id: a.annotation for a in current(journal).values()}
    assert [rows[c.row] for c in journal.candidates("1")] == [5, 8]


def test_the_support_set_changes_at_1_2_5_10_images_only(journal: Journal) -> None:
    names = [journal.active("1").name]
    for task in range(1, 23):
        record(journal, (task, body(task)))
        record(journal, (task, body(task, second=5)))  # a correction of it changes nothing that serves
        names.append(journal.active("1").name)
    assert names[0] == FIRST
    changed = [at for at in range(1, 23) if names[at] != names[at - 1]]
    assert changed == [1, 2, 5, 10]
    shown = [int(n.split("+s")[1].split(".")[0]) for n in names]
    assert shown == [0, 1, 2, 2, 2, *[5] * 18]  # of ten images five judge from now on, so that there are no more examples than before
    assert all(split.MADE_HERE.fullmatch(n) for n in names)
    assert len(journal.versions("1")) == 5


def test_a_step_that_is_reached_again_chooses_anew(journal: Journal) -> None:
    record(journal, (1, body(1)))
    first = journal.active("1")
    journal.delete_annotations("1", [1001])
    assert journal.active("1").name == first.name
    record(journal, (2, body(2)))
    assert [e["task"] for e in journal.active("1").support] == [2]


def test_from_ten_images_on_some_are_held_out_and_are_no_examples(journal: Journal) -> None:
    for task in range(1, 11):
        record(journal, (task, body(task)))
    with journal.reading() as session:
        heldout = {g.group for g in session.scalars(select(Group).where(Group.use == split.HELDOUT))}
    assert len(heldout) == 5
    assert not heldout & {f"task={e['task']}" for e in journal.active("1").support}


def test_an_annotation_that_cannot_be_used_takes_no_examples_place(journal: Journal) -> None:
    twice = [region("nose", 10.0, 10.0), region("nose", 90.0, 10.0, id="other")]
    record(journal, (1, body(1, result=twice * 3)), (2, body(2)))
    assert [e["task"] for e in journal.active("1").support] == [2]
    record(journal, *((n, body(n)) for n in (3, 4, 5, 6)))
    assert len(journal.active("1").support) == 5


def test_examples_are_kept_by_name_and_in_pixels(journal: Journal) -> None:
    record(journal, (3, body(3)))
    entry = journal.active("1").support[0]
    assert entry["task"] == 3
    example = entry["controls"]["kp:image"]
    assert example["image"] == "/data/upload/1/3.png"
    assert dict(zip(example["keypoints"]["names"], example["keypoints"]["xy"], strict=True))["tail"] == [12.8, 24.0]


def test_a_reordered_config_serves_on_and_points_keep_their_names(journal: Journal) -> None:
    record(journal, (1, body(1)))
    before = journal.active("1")
    swapped = CONFIG.replace('<Label value="nose"/><Label value="tail"/>', '<Label value="tail"/><Label value="nose"/>')
    assert journal.observe("1", swapped, "nano-0").name == before.name
    record(journal, (2, body(2)), config=swapped)
    entries = {e["task"]: e["controls"]["kp:image"]["keypoints"] for e in journal.active("1").support}
    by_name = [dict(zip(p["names"], p["xy"], strict=True)) for p in entries.values()]
    assert entries[2]["names"] == ["tail", "nose", "ear"]
    assert by_name[0] == by_name[1]


def test_a_renamed_point_loses_its_labels_and_never_takes_anothers_place(journal: Journal) -> None:
    record(journal, (1, body(1)))
    before = journal.active("1").name
    after = journal.observe("1", CONFIG.replace('"nose"', '"muzzle"'), "nano-0")
    points = after.support[0]["controls"]["kp:image"]["keypoints"]
    assert dict(zip(points["names"], points["visibility"], strict=True)) == {"muzzle": 0, "tail": 2, "ear": 2}
    assert after.name != before


def test_annotations_that_were_on_their_way_are_read_by_the_config_as_it_is_now(journal: Journal) -> None:
    more = CONFIG.replace('<Label value="nose"/>', '<Label value="nose"/><Label value="paw"/>')
    journal.observe("1", more, "nano-0")
    assert record(journal, (1, body(1, labels=("paw",))), config=CONFIG) == 1  # who brings it heard of the config before
    assert [(c.task, c.points) for c in journal.candidates("1")] == [(1, 1)]
    assert current(journal)[1001].fits


def test_a_config_of_other_names_has_no_examples_until_it_is_undone(journal: Journal) -> None:
    record(journal, (1, body(1)))
    before = journal.active("1").name
    other = CONFIG.replace("nose", "a").replace("tail", "b").replace('"ear"', '"c"')
    named_otherwise = journal.observe("1", other, "nano-0").name
    assert named_otherwise.startswith("nano-0+r0+s0.") and named_otherwise != FIRST  # it answers something else
    assert journal.candidates("1") == []
    assert journal.observe("1", CONFIG, "nano-0").name == before


@pytest.mark.parametrize("changed", [WITH_BOX, CONFIG.replace('value="nose"', 'value="nose" alias="n"')], ids=["box", "label"])
def test_what_changes_the_regions_of_a_prediction_is_another_version(journal: Journal, changed: str) -> None:
    assert journal.active("1").name == FIRST
    after = journal.observe("1", changed, "nano-0").name
    assert after.startswith("nano-0+r0+s0.") and after != FIRST
    assert journal.observe("1", CONFIG, "nano-0").name == FIRST


def test_colours_change_nothing(journal: Journal) -> None:
    record(journal, (1, body(1)))
    before = journal.active("1").name
    assert (
        journal.observe("1", CONFIG.replace('value="nose"', 'value="nose" background="red"'), "nano-0").name == before
    )


def test_another_base_is_another_version_with_the_same_examples(journal: Journal) -> None:
    record(journal, (1, body(1)))
    after = journal.observe("1", CONFIG, "nano-1")
    assert after.name.startswith("nano-1+r0+s1.")
    assert after.adapter is None
    assert "nano-0" in after.reason


def test_activation_by_hand_and_back(journal: Journal) -> None:
    record(journal, (1, body(1)))
    first, now = (v.name for v in journal.versions("1"))
    journal.activate("1", first, "Activated by hand.")
    assert journal.active("1").name == first
    journal.activate("1", now, "Activated by hand.")
    assert journal.active("1").name == now
    with pytest.raises(NotFound, match="no version 'x'"):
        journal.activate("1", "x", "")
    journal.set_fact("core", {"base": "other-1"})
    with pytest.raises(Conflict, match="other-1"):
        journal.activate("1", first, "")


def test_unknown_projects_are_named_with_the_way_to_connect_them(journal: Journal) -> None:
    with pytest.raises(NotFound, match="connect"):
        journal.active("99")


def test_annotations_without_a_size_wait_for_their_image(journal: Journal) -> None:
    said = body(1)
    for r in said["result"]:
        del r["original_width"], r["original_height"]
    record(journal, (1, said))
    assert journal.active("1").name == FIRST
    ((task, address),) = journal.support_waits_for("1")
    journal.note_file("1", task.task, address, {"sha256": "0" * 64, "width": 200, "height": 100})
    journal.retry_support("1")
    points = journal.active("1").support[0]["controls"]["kp:image"]["keypoints"]
    assert points["xy"][0] == [20.0, 50.0]
    assert journal.support_waits_for("1") == []


def test_an_image_that_cannot_be_had_does_not_block_the_others(journal: Journal) -> None:
    said = body(1)
    for r in said["result"]:
        del r["original_width"], r["original_height"]
    record(journal, (1, said), (2, body(2)))
    journal.note_file("1", 1, "/data/upload/1/1.png", {"error": "404"})
    journal.retry_support("1")
    assert [e["task"] for e in journal.active("1").support] == [2]


def test_groups_of_a_video_stay_together() -> None:
    candidates = [split.Candidate(i, i, f"video={i % 5}", 3) for i in range(20)]
    uses = split.assign("1", candidates, {}, everything=True)
    assert set(uses) == {f"video={i}" for i in range(5)}
    assert list(uses.values()).count(split.HELDOUT) == 2  # eight images, since one video would be four


def test_a_use_is_decided_once_and_the_share_is_kept() -> None:
    uses: dict[str, str] = {}
    for count in (10, 12, 40, 100, 400):
        candidates = [split.Candidate(i, i, f"task={i}", 3) for i in range(count)]
        new = split.assign("1", candidates, uses, everything=True)
        assert not set(new) & set(uses)
        uses |= new
        assert sum(u == split.HELDOUT for u in uses.values()) == split.quota(count)
    assert [split.quota(n) for n in (10, 25, 26, 100)] == [5, 5, 6, 20]
    assert split.assign("1", candidates, {}, True) == split.assign("1", list(reversed(candidates)), {}, True)


def test_which_adapters_fit_a_changed_config() -> None:
    names = {"kp:image": ["a", "b"]}
    assert split.adapter_fits(["b", "a"], names)
    assert split.adapter_fits(["a"], names)
    assert split.adapter_fits(["a", "b", "c"], names)
    assert not split.adapter_fits(["a", "c"], names)
    assert split.adapter_fits([], names)


@pytest.mark.parametrize(
    ("value", "project"), [("12.1699", "12"), (12, "12"), ({"id": 12, "title": "x"}, "12"), ("abc", "abc")]
)
def test_projects_are_read_as_label_studio_writes_them(value: object, project: str) -> None:
    assert project_of(value) == project


@pytest.mark.parametrize("value", [None, "", "../x", True, [], {"id": None}, "a b", "x" * 65, {}])
def test_what_is_no_project_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput, match="expected Label Studio's project id"):
        project_of(value)


@pytest.mark.parametrize("value", [None, -1, 2**63, True, "x", 1.5, {}])
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput):
        id_of(value, "task")


def test_times_of_every_form_are_compared_in_utc() -> None:
    assert (
        updated_us("2026-01-01T01:00:00+01:00")
        == updated_us("2026-01-01T00:00:00Z")
        == updated_us("2026-01-01T00:00:00")
    )
    assert updated_us(None) == updated_us("yesterday") == updated_us("9999999") == 0


@on_sqlite
def test_a_locked_database_is_waited_for(url: str, journal: Journal, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "deep/journal.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(1.2, lambda: other.execute("COMMIT")).start()
    started = time.monotonic()
    assert record(journal, (1, body(1))) == 1
    assert time.monotonic() - started > 1.0
    other.close()


@on_sqlite
def test_a_database_that_stays_locked_is_told_in_words(url: str, tmp_path: Path) -> None:
    journal = Journal(url, patience=0.1)
    other = sqlite3.connect(tmp_path / "deep/journal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        journal.log_event("1", "TEST")
    assert journal.base() is None  # reading goes on
    other.execute("ROLLBACK")
    other.close()


@on_sqlite
def test_a_writer_that_hangs_holds_up_another_thread_for_so_long_only(url: str) -> None:
    journal, writes, go_on = Journal(url, patience=0.2), threading.Event(), threading.Event()

    def work(session: Session) -> None:
        session.get(Group, ("1", "g"))
        writes.set()
        go_on.wait(20)

    hangs = threading.Thread(target=lambda: journal.write(work))
    hangs.start()
    assert writes.wait(10)
    with pytest.raises(Unavailable, match="locked"):
        journal.log_event("1", "TEST")
    go_on.set()
    hangs.join()
    journal.log_event("1", "TEST")


def test_a_value_that_many_change_at_once_keeps_what_each_put_there(journal: Journal) -> None:
    def change(who: str) -> None:
        for _ in range(10):
            journal.change_fact("all", lambda value: value | {who: value.get(who, 0) + 1})

    threads = [threading.Thread(target=change, args=(who,)) for who in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.fact("all") == {"a": 10, "b": 10, "c": 10}


def test_many_threads_and_journals_write_at_once(url: str, journal: Journal) -> None:
    journals = [journal, Journal(url)]
    threads = [
        threading.Thread(
            target=lambda at=at: [record(journals[at % 2], (t, body(t))) for t in range(at * 10, at * 10 + 10)]
        )
        for at in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.candidates("1")) == 40
    assert len(journal.versions("1")) == 4


WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
from test_journal import Journal, record, body
journal = Journal(sys.argv[1])
for number in range(100000):
    record(journal, (number, body(number)))
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(url: str, journal: Journal) -> None:
    acknowledged: list[int] = []
    offset = 0
    for _ in range(2):
        here = Path(__file__).parent
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(here), str(here.parent)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            acknowledged.append(int(line))
            if len(acknowledged) >= offset + 15 + random.randrange(10):
                os.kill(process.pid, signal.SIGKILL)
                break
        acknowledged += [int(line) for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        offset = len(acknowledged)
    tasks = {c.task for c in journal.candidates("1")}
    assert set(acknowledged) <= tasks
    assert len(tasks - set(acknowledged)) <= 1
    assert journal.active("1").name.startswith("nano-0+r0+s5.")


def test_boxes_and_json_come_back_as_they_went_in(journal: Journal) -> None:
    journal.observe("1", WITH_BOX, "nano-0")
    said = body(1, result=[{"from_name": "größe", "n": 1e-7, "text": "\u0000ü\U0001f600", "deep": [[{}]]}])
    record(journal, (1, said), config=WITH_BOX)
    assert current(journal)[1001].result == json.loads(json.dumps(said["result"]))


def test_a_journal_of_a_later_form_is_left_alone(journal: Journal, url: str) -> None:
    journal.set_fact("schema", {"version": 99})
    with pytest.raises(ArtifactError, match="form 99"):
        Journal(url)


def test_every_table_can_be_made_in_postgresql() -> None:
    from sqlalchemy.dialects import postgresql
    from sqlalchemy.schema import CreateTable

    for table in Annotation.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))


def test_a_missing_database_driver_is_told_with_the_remedy() -> None:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidInput, match="pip install"):
            Journal("postgresql://u:p@127.0.0.1:1/x")
    else:
        with pytest.raises(Unavailable):
            Journal("postgresql://u:p@127.0.0.1:1/x", patience=0.1)
