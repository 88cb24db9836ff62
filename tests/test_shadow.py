"""The second judge: corrections score versions, the version before predicts in the shadow, and comes back if it was better."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no test shall wait for within its time
from backend.shadow import pairs_of, running
from backend.tables import Comparison, Predicted
from backend_world import CONFIG, World, world
from kptllm_core.keypoints import KeypointSet
from small_server import Answer

R1 = "timed-00000000+p1+r1"


class Aimed:
    """Predicts what World.annotation says, `off[adapter]` pixels beside it."""

    def __init__(self, here: World) -> None:
        self.off: dict[str | None, float] = {}
        self.asked: list[str | None] = []
        self.predictor = here.predictor
        here.predictor.predict = self.predict  # type: ignore[method-assign]

    def predict(self, images: list[np.ndarray], schema: Any, **options: Any) -> list[KeypointSet]:
        name = self.predictor.adapter.name if self.predictor.adapter else None
        self.asked += [name] * len(images)
        xy = np.stack([6.4 + 12.8 * np.arange(len(schema)) + self.off.get(name, 0.0), np.full(len(schema), 24.0)], 1)
        return [KeypointSet(schema.names, xy, np.full(len(schema), 2)) for _ in images]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, shadow_images=20, round_every=1000) as made:
        yield made


def promoted(here: World) -> Aimed:
    """A project whose first round was promoted."""
    aimed = Aimed(here)
    here.label(*range(1, 13))
    assert here.play_round()["promoted"] is True
    aimed.asked.clear()
    return aimed


def correct(here: World, *tasks: int) -> None:
    """Tasks are opened, so that they are predicted, and then labelled."""
    here.predict(*[here.task(t) for t in tasks])
    here.label(*tasks)


def comparisons(here: World) -> list[dict[str, Any]]:
    return list(here.client.get("/projects/1/comparisons").get_json()["comparisons"])


def scores(here: World) -> dict[str, dict[str, Any]]:
    return {v["model_version"]: v for v in here.client.get("/projects/1/prequential").get_json()["versions"]}


def test_a_version_that_is_worse_on_the_next_images_is_rolled_back_and_says_why(here: World) -> None:
    before = here.setup().get_json()["model_version"]
    aimed = promoted(here)
    after = here.status()["model_version"]
    aimed.off[R1] = 10.0
    correct(here, *range(50, 59))
    here.tick_until(lambda: scores(here).get(after, {}).get("images") == 9)
    assert here.status()["model_version"] == after, "nine images are too few"
    assert here.status()["comparison"]["state"] == "running"
    correct(here, 59)
    here.tick_until(lambda: comparisons(here)[0]["state"] != "running")
    (comparison,) = comparisons(here)
    status = here.status()
    assert comparison["state"] == "rolled_back"
    assert status["model_version"] == comparison["previous"] != after
    assert "was better on the same 10 images PCK@0.05 0.000 against 1.000" in comparison["reason"]
    assert comparison["figures"]["pck@0.05"]["interval"] == [-1.0, -1.0]
    version = next(v for v in status["versions"] if v["model_version"] == after)
    assert version["promoted"] is False and "Rolled back to" in version["reason"]
    listed = here.client.get("/projects/1/versions").get_json()
    assert listed["versions"][0] == comparison["previous"] and listed["details"] == status["versions"][::-1]
    assert status["comparison"] is None
    assert here.predict(here.task(70))[0]["model_version"] == comparison["previous"]
    assert before != after
    assert {scores(here)[n]["pck@0.05"] for n in (after, comparison["previous"])} == {0.0, 1.0}
    assert scores(here)[comparison["previous"]]["shown"] == 0 < scores(here)[after]["shown"]


def test_a_version_that_is_better_or_no_worse_stays(here: World) -> None:
    aimed = promoted(here)
    after = here.status()["model_version"]
    aimed.off[None] = 10.0
    correct(here, *range(50, 60))
    here.tick_until(lambda: comparisons(here)[0]["state"] != "running")
    assert comparisons(here)[0]["state"] == "kept" and "Kept: better on the same 10 images" in comparisons(here)[0]["reason"]
    assert here.status()["model_version"] == after
    asked = aimed.asked.count(None)
    correct(here, *range(60, 70))
    for _ in range(5):
        here.turn()
    assert aimed.asked.count(None) == asked == 10, "once it is decided the version before is asked no more"


def test_versions_that_are_alike_are_looked_at_until_the_images_are_used_up(here: World) -> None:
    aimed = promoted(here)
    aimed.off[R1] = 0.5  # within what a person lets pass
    correct(here, *range(50, 60))
    here.tick_until(lambda: bool(comparisons(here)[0]["figures"]))
    assert comparisons(here)[0]["state"] == "running" and "Not decided yet" in comparisons(here)[0]["reason"]
    correct(here, *range(60, 75))
    here.tick_until(lambda: comparisons(here)[0]["state"] != "running")
    assert comparisons(here)[0]["reason"].startswith("Kept: not worse on the same 20 images")
    assert aimed.asked.count(None) == 20, "the version before predicts as many as are needed, and no more"


def test_frames_of_one_video_count_as_one_image(here: World) -> None:
    aimed = promoted(here)
    after = here.status()["model_version"]
    aimed.off[R1] = 10.0
    for n in range(50, 70):
        frame = here.task(n)
        frame["data"]["video"] = "a" if n < 60 else f"b{n // 2}"
        here.predict(frame)
        here.webhook("ANNOTATION_CREATED", annotation=here.annotation(n), task=frame)
        if n == 62:
            here.tick_until(lambda: scores(here).get(after, {}).get("images") == 13)
            assert comparisons(here)[0]["figures"] is None, "thirteen images, but three groups"
    here.tick_until(lambda: comparisons(here)[0]["state"] != "running")
    reason = comparisons(here)[0]["reason"]
    assert reason.startswith("Kept: too few groups (videos, subjects) to tell, fewer than 10, on the same 20 images of 6 groups PCK@0.05")
    assert here.status()["model_version"] == after


def test_only_images_whose_annotator_saw_the_version_or_none_count(here: World) -> None:
    promoted(here)
    names = [v["model_version"] for v in here.status()["versions"]]
    here.client.post(f"/projects/1/versions/{names[-2]}/activate")  # the comparison ends: a person decided
    assert comparisons(here)[0]["state"] == "ended" and "serves now" in comparisons(here)[0]["reason"]
    here.predict(here.task(50))
    here.label(13, *range(14, 20))
    assert here.play_round()["promoted"] is True
    here.label(50, 51)  # 50 was seen under another version, 51 without any

    def compared() -> list[int]:
        with here.services.journal.reading() as session:
            comparison = running(session, "1")
            return [task for task, _ in pairs_of(session, comparison, 20)] if comparison else []

    here.tick_until(lambda: bool(compared()))
    here.turn()
    assert compared() == [51]


def rows(here: World) -> list[Predicted]:
    with here.services.journal.reading() as session:
        return list(session.scalars(select(Predicted)))


def test_what_a_version_may_have_learned_never_scores_it(here: World) -> None:
    Aimed(here)
    here.label(*range(1, 13))
    here.predict(here.task(1))  # labelled before, and an example or trained on soon
    after = here.play_round()["model_version"]
    here.predict(here.task(1), here.task(2))
    here.label(1, second=3)
    for _ in range(3):
        here.turn()
    assert after not in scores(here)
    correct(here, 30)
    here.turn()
    assert scores(here)[after]["images"] == 1


def test_an_annotation_that_changes_is_scored_anew_and_a_deleted_one_no_more(here: World) -> None:
    Aimed(here)
    correct(here, 5)
    here.turn()
    (first,) = scores(here).values()
    assert (first["images"], first["shown"], first["points"], first["moved"], first["pck@0.05"]) == (1, 1, 3, 0, 1.0)
    here.label(5, second=20)  # 20 % of the width is half of the object
    here.turn()
    (second,) = scores(here).values()
    assert second["moved"] == 3 and second["error"] == pytest.approx(12.8 / 30.72, abs=0.01)
    here.webhook("ANNOTATIONS_DELETED", annotations=[{"id": 1005}])
    here.turn()
    assert scores(here) == {}


def test_when_the_configs_names_change_what_was_scored_is_scored_by_the_new_ones(here: World) -> None:
    Aimed(here)
    correct(here, 5)
    here.turn()
    (before,) = scores(here).values()
    here.webhook("PROJECT_UPDATED", config=CONFIG.replace('"ear"', '"paw"'))
    assert scores(here) == {}
    here.turn()
    (after,) = scores(here).values()
    assert (before["points"], after["points"]) == (3, 2)


def test_a_prediction_that_comes_behind_its_label_is_scored_too(here: World) -> None:
    Aimed(here)
    here.label(1)
    here.label(2)
    here.label(3)  # the version knows the first two
    here.keeper.shadows.step("1")
    here.predict(here.task(3))
    here.keeper.shadows.step("1")
    assert [v["images"] for v in scores(here).values()] == [1]


def test_the_shadow_waits_while_somebody_waits_for_the_core(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    aimed = promoted(here)
    correct(here, 50)
    monkeypatch.setattr(type(here.core.engine), "waiting", property(lambda self: 3))
    for _ in range(3):
        here.turn()
    assert None not in aimed.asked
    monkeypatch.undo()
    here.tick_until(lambda: aimed.asked.count(None) == 1)


def test_images_that_cannot_be_had_do_not_stop_the_judge(here: World) -> None:
    aimed = promoted(here)
    aimed.off[R1] = 10.0
    here.label(*range(50, 62))  # shown to nobody: both versions predict in the shadow
    here.studio.routes["/data/upload/1/50.png"] = Answer(404)
    here.tick_until(lambda: comparisons(here)[0]["state"] != "running")
    assert comparisons(here)[0]["state"] == "rolled_back"
    failed = [r for r in rows(here) if r.error]
    assert {r.task for r in failed} == {50}


def test_a_restart_in_the_middle_of_a_comparison_loses_nothing(here: World) -> None:
    aimed = promoted(here)
    aimed.off[R1] = 10.0
    correct(here, *range(50, 56))
    here.turn()
    here.services.journal.close()
    here.start()
    correct(here, *range(56, 60))
    here.tick_until(lambda: comparisons(here)[0]["state"] != "running")
    assert comparisons(here)[0]["state"] == "rolled_back"
    with here.services.journal.reading() as session:
        assert len(session.scalars(select(Comparison)).all()) == 1


def test_a_round_that_runs_while_its_parent_is_rolled_back_begins_anew(here: World) -> None:
    aimed = promoted(here)
    aimed.off[R1] = 10.0
    here.train_seconds = 30.0
    here.webhook("START_TRAINING")
    here.tick_until(lambda: here.status()["job"]["state"] == "running")
    first = here.status()["job"]
    assert here.client.get("/projects/1/jobs").get_json()["jobs"][0]["job"] == first["job"]
    here.train_seconds = 0.0
    correct(here, *range(50, 60))
    here.tick_until(lambda: here.status()["job"]["state"] == "done", 30)
    jobs = here.client.get("/projects/1/jobs").get_json()["jobs"]
    assert [j["state"] for j in jobs] == ["done", "cancelled", "done"]
    assert "serves now instead of" in jobs[1]["message"] and "Another round starts from there" in jobs[1]["message"]
    with here.services.journal.reading() as session:
        assert session.scalars(select(Comparison)).all()[0].state == "rolled_back"


def test_shadows_can_be_switched_off(tmp_path: Path) -> None:
    with world(tmp_path, shadow_images=0) as here:
        aimed = promoted(here)
        aimed.off[R1] = 10.0
        correct(here, *range(50, 62))
        for _ in range(3):
            here.turn()
        assert comparisons(here) == [] and None not in aimed.asked
