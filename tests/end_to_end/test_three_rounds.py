"""Three rounds in a real Label Studio: label, predict, correct, train, decide, again; nothing is lost and nothing gets worse in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import requests

from backend.demo.samples import Material
from backend.demo.tour import Tour
from backend.rounds import decide
from end_to_end.conftest import Stack
from label_config.regions import check_prediction

pytestmark = [pytest.mark.slow, pytest.mark.label_studio]
EXAMPLES, ROUNDS, REST = 5, (12, 17, 22), 3


def test_three_rounds(stack: Stack, insects: Callable[[int], Material]) -> None:
    tour = stack.tour(insects(ROUNDS[-1] + REST))
    pictures = list(tour.project.material.pictures)
    tour.label(pictures[:EXAMPLES])
    labelled, heldout, decided = EXAMPLES, 0, []
    for number, until in enumerate(ROUNDS, 1):
        chosen = pictures[labelled:until]
        assert len(tour.predict(chosen)) == len(chosen)
        tour.correct(chosen, until)
        labelled, before = until, tour.version

        job, version = tour.train(900)
        assert job["round"] == number
        assert job["train_images"] + job["heldout_images"] == until, "every correction is used, and for one thing only"
        assert job["heldout_images"] >= max(heldout, 5)
        heldout = job["heldout_images"]
        promoted, reason = decide(version["before"], version["after"], heldout)
        assert version["promoted"] == promoted
        assert version["reason"].startswith(reason)
        decided.append((job["model_version"], promoted))
        tour.wait_until_serves(job["model_version"] if promoted else before)

    # What came of each round can be read afterwards, the newest first.
    jobs = told(tour, "/jobs")["jobs"]
    assert [(j["model_version"], j["promoted"]) for j in jobs] == decided[::-1]
    assert {j["state"] for j in jobs} == {"done"}
    status = told(tour, "/status")
    assert status["labelled"] == ROUNDS[-1]
    assert status["new_corrections"] == 0

    # Label Studio's own records say what people did: examples by hand, the others from predictions.
    told_effort = told(tour, "/effort")
    assert told_effort["all"]["images"] == ROUNDS[-1]
    assert told_effort["by_hand"]["images"] == EXAMPLES
    assert told_effort["assisted"]["images"] == ROUNDS[-1] - EXAMPLES

    # The rest is predicted by what serves now, as Label Studio can show it.
    serving = tour.version
    assert len(tour.predict(pictures[-REST:])) == REST
    stored = [p for p in tour.project.label_studio.predictions(tour.project.id) if p["model_version"] == serving]
    assert {p["task"] for p in stored} >= {tour.project.tasks[p.path] for p in pictures[-REST:]}
    for prediction in stored:
        shown = {key: prediction[key] for key in ("result", "score", "model_version")}
        check_prediction(tour.project.material.config, shown, sdk=True)


def told(tour: Tour, path: str) -> dict[str, Any]:
    answer = requests.get(tour.status_url.removesuffix("/status") + path, timeout=60)
    answer.raise_for_status()
    return dict(answer.json())
