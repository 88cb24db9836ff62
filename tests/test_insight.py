"""Effort, anchoring, ranking, agreement and label quality over a backend: from what Label Studio sends to what the routes tell."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend import ranking
from backend.anchoring import Look, anchoring, is_unaided
from backend.calibration import Calibration
from backend.reports import Reports
from backend.tables import Predicted
from backend_world import CONFIG, World, region, world
from label_config.schema import parse
from small_server import Answer, Request, reply

LEFT_RIGHT = CONFIG.replace('"tail"', '"left_ear"').replace('"ear"', '"right_ear"')


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, min_train=100) as made:
        made.setup()
        yield made


def noise(seed: int) -> bytes:
    """A picture that looks like no other, of the size that the world's regions tell; dark, so that points fall on it."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 60, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def task(here: World, number: int, seed: int | None = None) -> dict[str, Any]:
    here.studio.routes[f"/data/upload/1/{number}.png"] = Answer(body=noise(number if seed is None else seed))
    return here.task(number)


def get(here: World, path: str) -> dict[str, Any]:
    answer = here.client.get(f"/projects/1{path}")
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert here.client.get(f"{path}{'&' if '?' in path else '?'}project=1").status_code == 200
    return dict(answer.get_json())


def submit(here: World, number: int, result: list[dict[str, Any]], about: dict[str, Any] | None = None, **more: Any) -> None:
    body = {
        "id": 1000 + number,
        "task": number,
        "result": result,
        "completed_by": 1,
        "updated_at": "2026-01-01T00:00:00Z",
    }
    answer = here.webhook("ANNOTATION_CREATED", annotation=body | more, task=about or here.task(number))
    assert answer.status_code == 200


def edited(prediction: dict[str, Any], moved: dict[str, float], without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What an annotator who started from a prediction sends: the same region ids, and what became of them."""
    result = []
    for r in prediction["result"]:
        label = r["value"]["keypointlabels"][0]
        if label not in without:
            value = {**r["value"], "x": r["value"]["x"] + moved.get(label, 0.0)}
            result.append({**r, "value": value, "origin": "prediction-changed" if label in moved else "prediction"})
    return result


# ---------------------------------------------------------------- effort


def test_effort_from_the_first_prediction_to_the_submitted_annotation(here: World) -> None:
    (first,) = here.predict(task(here, 1))
    submit(here, 1, edited(first, {"tail": 20.0}, without=("ear",)), parent_prediction=5, lead_time=12.5)
    (second,) = here.predict(task(here, 2))
    submit(here, 2, [*edited(second, {}), region("ear", 1.0, 1.0)][:3], parent_prediction=6, lead_time=3.5)
    submit(here, 3, [region("nose", 10.0, 10.0), region("tail", 20.0, 20.0)], lead_time=9.0)
    told = get(here, "/effort")
    assert told["stale"] is False
    assert {k: told["assisted"][k] for k in ("images", "accepted", "moved", "added", "deleted", "clicks", "clicks_saved")} == {
        "images": 2, "accepted": 4, "moved": 1, "added": 0, "deleted": 1, "clicks": 2, "clicks_saved": 3,
    }  # fmt: skip
    assert told["assisted"]["seconds_per_image"] == 8.0
    assert (told["by_hand"]["images"], told["by_hand"]["clicks"], told["by_hand"]["clicks_saved"]) == (1, 2, 0)
    assert told["by_hand"]["seconds_per_point"] == 4.5
    # The first annotation made a support set, hence a version of its own for the second task.
    assert [row["version"] for row in told["versions"]] == [first["model_version"], second["model_version"]]
    assert [row["moved"] for row in told["versions"]] == [1, 0]
    assert told["rounds"][0]["images"] == 2
    assert [r["task"] for r in told["recent"]] == [1, 2, 3]


def test_a_prediction_made_after_the_annotation_is_not_what_it_came_from(here: World) -> None:
    submit(here, 1, [region("nose", 10.0, 10.0)])
    here.predict(task(here, 1))
    submit(here, 1, [region("nose", 12.0, 10.0)], updated_at="2026-01-01T00:01:00Z")
    told = get(here, "/effort")
    assert told["assisted"]["images"] == 0 and told["by_hand"]["added"] == 1


def test_a_copied_annotation_counts_nowhere(here: World) -> None:
    submit(here, 1, [region("nose", 10.0, 10.0)], parent_annotation=7)
    assert get(here, "/effort")["all"]["images"] == 0


def test_origins_speak_where_no_prediction_is_known(here: World) -> None:
    submit(
        here, 1, [region("nose", 1.0, 1.0, origin="prediction"), region("tail", 2.0, 2.0, origin="prediction-changed")]
    )
    told = get(here, "/effort")["assisted"]
    assert (told["accepted"], told["moved"], told["deleted"]) == (1, 1, None)


# ---------------------------------------------------------------- anchoring


def test_a_share_of_tasks_is_served_empty_and_held_against_the_others(tmp_path: Path) -> None:
    with world(tmp_path, min_train=100, unaided_share=0.5) as here:
        here.setup()
        numbers = list(range(1, 31))
        withheld = {n for n in numbers if is_unaided("1", n, 0.5)}
        assert 8 < len(withheld) < 22
        assert {n for n in numbers if is_unaided("1", n, 0.05)} < withheld  # a larger share only adds to them
        for n in numbers:
            (prediction,) = here.predict(task(here, n))
            assert (prediction["result"] == []) == (n in withheld)
            assert "error" not in prediction and not prediction["model_version"].endswith("+retry")
            if n in withheld:
                submit(here, n, [region("nose", 90.0, 90.0), region("tail", 5.0, 5.0)], lead_time=20.0)
            else:
                submit(here, n, edited(prediction, {}), parent_prediction=n, lead_time=5.0)
        told = get(here, "/anchoring")
        assert (told["withheld"]["images"], told["shown"]["images"]) == (len(withheld), 30 - len(withheld))
        assert told["difference"]["distance"]["low"] > 0 > told["difference"]["near"]["high"]
        assert told["shown"]["near"] == 1.0
        assert "anchored" in told["said"]
        assert told["withheld"]["seconds_per_image"] == 20.0
        # Where nobody was shown anything, nobody was helped.
        assert get(here, "/effort")["by_hand"]["images"] == len(withheld)
        # A smart tool asks for what it drew: it is always answered.
        number = next(iter(withheld))
        drawn = {"result": [{**region("nose", 10.0, 10.0), "is_positive": True}]}
        assert here.predict(task(here, number), context=drawn)[0]["result"]


def test_a_video_is_one_sample_of_what_people_lean_on(here: World) -> None:
    rng = np.random.default_rng(0)
    looks = [Look(n, n % 2 == 0, rng.uniform(0.0, 0.1, 4) + 0.02 * (n % 2 == 0), None) for n in range(200)]
    alone = anchoring(looks, 0.05, {n: f"task={n}" for n in range(200)})["difference"]["distance"]
    by_video = anchoring(looks, 0.05, {n: f"video={n // 20}" for n in range(200)})["difference"]["distance"]
    assert alone["mean"] == by_video["mean"] and alone != by_video
    told = anchoring(looks, 0.05, {n: f"video={n // 50}" for n in range(200)})
    assert told["difference"] is None and "of different videos or subjects" in told["said"]


def test_without_both_kinds_no_difference_is_told(here: World) -> None:
    told = get(here, "/anchoring")
    assert told["difference"] is None and "0 images" in told["said"] and told["share"] == 0.0


# ---------------------------------------------------------------- what to label next


def test_the_least_sure_come_first_and_repetitions_last(here: World) -> None:
    here.predict(*(task(here, n) for n in (1, 2, 3)))
    here.predict(task(here, 4, seed=2))  # shows what task 2 shows
    told = get(here, "/next")
    assert told["unlabelled"] == 4 and told["near_duplicates"] == 1
    assert told["tasks"][-1]["task"] == 4 and told["tasks"][-1]["like"] == 2
    assert "nearly the same as task 2" in told["tasks"][-1]["why"]
    submit(here, 2, [region("nose", 10.0, 10.0)])
    told = get(here, "/next?limit=1")
    assert told["unlabelled"] == 3 and len(told["tasks"]) == 1


def test_what_somebody_has_dealt_with_or_deleted_is_not_asked_for_again(here: World) -> None:
    here.predict(*(task(here, n) for n in range(1, 6)))
    assert get(here, "/next")["unlabelled"] == 5
    submit(here, 1, [])
    submit(here, 2, [], was_cancelled=True)
    submit(here, 3, [region("nose", 10.0, 10.0)])
    here.webhook("ANNOTATIONS_DELETED", annotations=[{"id": 1003}])
    assert {t["task"] for t in get(here, "/next")["tasks"]} == {3, 4, 5}
    here.webhook("TASKS_DELETED", tasks=[{"id": 4}])  # nobody ever labelled it
    assert {t["task"] for t in get(here, "/next")["tasks"]} == {3, 5}


def test_of_many_tasks_only_the_first_are_read_and_all_are_counted(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here.predict(*(task(here, n) for n in range(1, 7)))

    def score(session: Session) -> None:
        for row in session.scalars(select(Predicted)):
            row.score = {2: 0.0, 5: 0.1}.get(row.task, 0.9)
            if row.task == 2:
                row.controls = {}

    here.services.journal.write(score)
    monkeypatch.setattr(ranking, "SHORTLIST", 3)
    told = ranking.what_next(here.services.journal, here.services.looks, "1")
    assert [t["task"] for t in told["tasks"]] == [2, 1, 5]  # 1 and 5 are equally sure by the present calibration
    assert told["unlabelled"] == 6 and told["nothing_found"] == 1
    monkeypatch.setattr(ranking, "SHORTLIST", 0)
    told = ranking.what_next(here.services.journal, here.services.looks, "1")
    assert told["tasks"] == [] and told["unlabelled"] == 6 and told["nothing_found"] == 1


def test_scores_sort_ascending_in_label_studio(here: World) -> None:
    sure, repeated = here.predict(task(here, 1), task(here, 2, seed=1))
    assert sure["score"] == 1.0  # the small model of these tests is sure of everything
    here.services.journal.set_fact(
        "calibration:1", {"map": Calibration((0.0, 1.0), (0.0, 0.4), 100).to_json(), "state": []}
    )
    first, second = here.predict(task(here, 1), task(here, 2, seed=1))
    assert first["score"] == 0.4 and second["score"] == 0.7
    submit(here, 2, [region("nose", 10.0, 10.0)])
    assert here.predict(task(here, 1))[0]["score"] == 0.7  # now it repeats a labelled one
    assert repeated["model_version"] == sure["model_version"]


def test_nothing_found_ranks_first() -> None:
    hidden = {
        "kp:image": {"objects": [{"names": ["a"], "xy": [[1, 1]], "visibility": [2], "score": [0.9]}], "drawn": []}
    }
    shown = {"kp:image": {**hidden["kp:image"], "drawn": [{"a": "r1"}]}}
    assert ranking.expected_right(Calibration(), {}) == ranking.expected_right(Calibration(), hidden) == 0.0
    assert ranking.expected_right(Calibration(), shown) == 0.9
    assert ranking.rank_score(0.0, False) < ranking.rank_score(0.3, False) < ranking.rank_score(0.3, True) <= 1.0


def test_calibration_is_fitted_on_images_that_the_version_had_not_learned_from(here: World) -> None:
    for n in range(1, 21):
        (prediction,) = here.predict(task(here, n))
        submit(here, n, edited(prediction, {"nose": 30.0, "tail": -30.0}), parent_prediction=n)
    here.keeper.tick()
    told = get(here, "/calibration")
    assert told["images"] == 20
    assert told["raw"]["points"] == 60 and told["raw"]["error"] > 0.5
    assert told["calibrated"]["error"] < 0.2
    # The map that the keeper fitted is in use: a third of the points needs no correction.
    assert 0.2 < here.predict(task(here, 90))[0]["score"] < 0.5


def test_calibration_is_judged_on_other_videos(here: World) -> None:
    for n in range(1, 21):
        video = task(here, n)
        video["data"]["video"] = "all of one"
        (prediction,) = here.predict(video)
        submit(here, n, edited(prediction, {"nose": 30.0, "tail": -30.0}), about=video)
    told = get(here, "/calibration")
    assert told["raw"]["points"] == 60 and told["calibrated"] == told["raw"], "there is no other video to fit the map on"


def test_what_the_version_that_serves_predicted_is_ranked_and_calibrated(here: World) -> None:
    """It may be an older one: after a roll back."""
    here.predict(task(here, 1), task(here, 2), task(here, 3))
    first = here.status()["model_version"]
    submit(here, 9, [region("nose", 10.0, 10.0)])
    (later,) = here.predict(task(here, 1))
    here.client.post(f"/projects/1/versions/{first}/pin")
    assert later["model_version"] != first == get(here, "/next")["tasks"][0]["model_version"]

    def change(session: Session) -> None:
        for row in session.scalars(select(Predicted).where(Predicted.task == 1)):
            row.controls = {key: {**c, "scores": [0.25 * row.version]} for key, c in (row.controls or {}).items()}

    here.services.journal.write(change)
    submit(here, 1, [region("nose", 10.0, 10.0)])
    with here.services.journal.reading() as session:
        served, other = sorted(r.version for r in session.scalars(select(Predicted).where(Predicted.task == 1)))
        judged = ranking.judged_points(session, "1", parse(CONFIG), 0.05)
    assert served < other and set(judged.score) == {0.25 * served} and set(judged.group) == {"task=1"}


# ---------------------------------------------------------------- agreement


def test_disagreement_per_keypoint_of_tasks_with_several_annotations(here: World) -> None:
    for number, (who, x) in enumerate(((1, 10.0), (2, 30.0))):
        result = [region("nose", x, 50.0), region("tail", 90.0, 50.0)]
        submit(here, 1, result, id=50 + number, completed_by=who)
    submit(here, 2, [region("nose", 10.0, 10.0)])
    told = get(here, "/agreement")["controls"]["kp:image"]
    assert (told["images"], told["annotators"]) == (1, 2)
    assert told["points"]["tail"]["median"] == 0.0 and told["points"]["nose"]["median"] > 0.2
    assert told["points"]["ear"]["pairs"] == 0


def test_copies_and_what_nobody_made_are_no_second_opinion(here: World) -> None:
    result = [region("nose", 10.0, 50.0)]
    submit(here, 1, result)
    submit(here, 1, result, id=50, completed_by=2, parent_annotation=1001)
    submit(here, 1, [region("nose", 30.0, 50.0)], id=51, completed_by=None)
    assert get(here, "/agreement")["controls"]["kp:image"]["images"] == 0
    submit(here, 1, result, id=52, completed_by=3)
    assert get(here, "/agreement")["controls"]["kp:image"]["all"]["pairs"] == 1


# ---------------------------------------------------------------- label quality


def faces(here: World, count: int, wrong: tuple[int, ...]) -> None:
    """Labelled triangles of a nose and two ears; on the wrong ones the ears have each other's names."""
    rng = np.random.default_rng(0)
    for n in range(1, count + 1):
        x, y, size = rng.uniform(30, 70), rng.uniform(30, 70), rng.uniform(10, 25)
        ears = [(x - size, y - size), (x + size, y - size)]
        left, right = ears[::-1] if n in wrong else ears
        spots = {"nose": (x, y), "left_ear": left, "right_ear": right}
        answer = here.webhook(
            "ANNOTATION_CREATED",
            config=LEFT_RIGHT,
            annotation={
                "id": 1000 + n,
                "result": [region(k, *v) for k, v in spots.items()],
                "updated_at": "2026-01-01T00:00:00Z",
            },
            task=task(here, n),
        )
        assert answer.status_code == 200


def test_exchanged_labels_are_listed_with_all_that_a_picture_needs(tmp_path: Path) -> None:
    with world(tmp_path, min_train=100) as here:
        here.setup(LEFT_RIGHT)
        faces(here, 40, wrong=(7, 30))
        told = get(here, "/quality?kind=swapped")
        assert {f["task"] for f in told["findings"]} == {7, 30}
        assert told["checked"] == 40 and told["counts"] == {"swapped": 2}
        finding = told["findings"][0]
        assert finding["control"] == "kp:image" and set(finding["points"]) == {"left_ear", "right_ear"}
        assert set(finding["picture"]["labelled"]) == {"nose", "left_ear", "right_ear"}
        assert get(here, "/quality?kind=far_off")["findings"] == []
        assert here.client.get("/projects/1/quality?kind=odd").status_code == 400
        # A reviewer knows better; until the label changes.
        done = here.client.post("/projects/1/quality/dismiss", json={"finding": finding["id"]})
        assert done.status_code == 200
        told = get(here, "/quality")
        assert [f["task"] for f in told["findings"]] == [({7, 30} - {finding["task"]}).pop()] and told["dismissed"] == 1
        assert here.client.post("/projects/1/quality/dismiss", json={"finding": 5}).status_code == 400
        assert here.client.post("/projects/9/quality/dismiss", json={"finding": "a" * 16}).status_code == 404


def test_findings_are_marked_in_label_studio_and_taken_away_again(tmp_path: Path) -> None:
    with world(tmp_path, min_train=100, label_studio_api_key="a" * 40) as here:
        here.setup(LEFT_RIGHT)
        faces(here, 40, wrong=(7,))
        bodies = {
            n: {
                "id": n,
                "data": {"image": f"/data/upload/1/{n}.png", "group": "a"},
                "updated_at": "2026-01-01T00:00:00Z",
            }
            for n in range(1, 41)
        }
        here.serve_api(list(bodies.values()))

        def change(request: Request) -> Answer:
            number = int(request.path.rstrip("/").rpartition("/")[2])
            bodies[number]["data"] = request.json()["data"]
            return reply(bodies[number])

        for n in bodies:
            here.studio.routes[f"/api/tasks/{n}/"] = change
        done = here.client.post("/projects/1/quality/mark").get_json()
        assert (done["marked"], done["cleared"], done["field"]) == (1, 0, "label_check")
        assert bodies[7]["data"]["label_check"].startswith("swapped: left_ear, right_ear (")
        assert bodies[7]["data"]["group"] == "a"
        requests = len(here.studio.requests)
        again = here.client.post("/projects/1/quality/mark").get_json()
        assert again["marked"] == 0 and len(here.studio.requests) == requests  # nothing changed: nobody is asked
        here.client.post("/projects/1/quality/dismiss", json={"finding": get(here, "/quality")["findings"][0]["id"]})
        assert here.client.post("/projects/1/quality/mark").get_json()["cleared"] == 1
        assert "label_check" not in bodies[7]["data"]


def test_more_findings_are_marked_than_a_page_shows(tmp_path: Path) -> None:
    with world(tmp_path, min_train=100, label_studio_api_key="a" * 40) as here:
        here.setup()
        submit(here, 1, [region("nose", 10.0, 10.0)])
        get(here, "/quality")
        kept = here.services.journal.fact("report-quality:1")
        finding = {"kind": "far_off", "points": ["nose"], "confidence": 0.9}
        found = [{**finding, "id": f"{n:016}", "task": 7 if n < 350 else 8} for n in range(351)]
        here.services.journal.set_fact("report-quality:1", {**kept, "report": {**kept["report"], "findings": found}})
        bodies = [{"id": n, "data": {"image": f"/data/upload/1/{n}.png"}, "updated_at": "2026-01-01T00:00:00Z"} for n in (7, 8)]
        here.serve_api(bodies)
        for body in bodies:
            here.studio.routes[f"/api/tasks/{body['id']}/"] = reply(body)
        assert here.client.post("/projects/1/quality/mark").get_json()["marked"] == 2


def test_marking_without_a_token_is_refused_in_words(here: World) -> None:
    answer = here.client.post("/projects/1/quality/mark")
    assert answer.status_code == 400 and "LABEL_STUDIO_API_KEY" in answer.get_json()["error"]["message"]


def test_predictions_that_quality_control_lacks_are_made_in_the_shadow(here: World) -> None:
    for n in (1, 2, 3):
        task(here, n)
    here.label(1, 2, 3)
    assert get(here, "/quality")["with_prediction"] == 0

    def made() -> int:
        with here.services.journal.reading() as session:
            return len(session.scalars(select(Predicted.id).where(Predicted.controls.is_not(None))).all())

    here.tick_until(lambda: made() == 3)
    assert get(here, "/quality")["with_prediction"] == 3


# ---------------------------------------------------------------- reports


def test_reports_are_kept_and_made_anew_when_something_changed(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    kinds = {"effort": lambda services, project: made.append(project) or {"n": len(made)}}
    monkeypatch.setattr("backend.reports.KINDS", kinds)
    reports = Reports(here.services)
    assert reports.get("effort", "1") == {"n": 1, "stale": False} == reports.get("effort", "1")
    here.label(1)
    assert reports.get("effort", "1") == {"n": 2, "stale": False}
    # A slow one is given as it was, and the keeper makes it anew.
    kept = here.services.journal.fact("report-effort:1")
    here.services.journal.set_fact("report-effort:1", {**kept, "seconds": 5.0})
    here.label(2)
    assert reports.get("effort", "1") == {"n": 2, "stale": True}
    reports.turn("1")
    assert reports.get("effort", "1") == {"n": 3, "stale": False}
    # One that was quick on few images need not be so on many more, as after an import.
    monkeypatch.setattr("backend.reports.FEW", 3)
    here.label(*range(3, 8))
    assert reports.get("effort", "1") == {"n": 3, "stale": True}
    Reports(here.services).turn("1")
    assert reports.get("effort", "1") == {"n": 4, "stale": False}


def test_unknown_projects_and_odd_limits_are_told(here: World) -> None:
    for path in ("effort", "anchoring", "agreement", "calibration", "next", "quality"):
        assert here.client.get(f"/projects/99/{path}").status_code == 404
    assert here.client.get("/projects/1/next?limit=-1").status_code == 400
    assert here.client.get("/projects/1/quality?least=much").status_code == 400
