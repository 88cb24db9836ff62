"""The whole path in a real Label Studio: label, predict, correct, train, decide, switch, predict again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from backend.connect import SECRET_HEADER
from backend.demo.project import DemoProject
from backend.demo.samples import Material
from backend.demo.tour import CORRECTED, EXAMPLES, Tour
from backend.formats.labels import LabelledImage
from backend.import_match import Matcher
from backend.label_studio import LabelStudio
from backend.rounds import decide
from end_to_end.conftest import Stack
from label_config.regions import check_prediction

pytestmark = pytest.mark.label_studio


def test_from_a_new_project_to_predictions_of_a_new_version(stack: Stack, insects: Callable[[int], Material]) -> None:
    material = insects(CORRECTED + 3)
    tour = stack.tour(material)
    pictures = list(material.pictures)
    examples, to_correct, rest = pictures[:EXAMPLES], pictures[EXAMPLES:CORRECTED], pictures[CORRECTED:]
    assert "+r0+s0" in tour.version

    # Five annotations by API: they become the support set, and the version says so.
    tour.label(examples)
    with_examples = tour.version
    assert f"+r0+s{EXAMPLES}." in with_examples

    # Batch predictions, each of which Label Studio would show as meant.
    predicted = tour.predict(to_correct + rest)
    assert len(predicted) == len(to_correct + rest)
    all_predictions_are_valid(tour, with_examples)
    assert all(result for result in predicted.values()), "a prediction without any point"

    # Corrections through Label Studio reach the journal by webhook.
    tour.correct(to_correct, CORRECTED)
    before_round = tour.version

    # Start training → a decision, which follows from its figures and is told in words.
    job, version = tour.train(600)
    assert job["train_images"] + job["heldout_images"] == CORRECTED
    promoted, reason = decide(version["before"], version["after"], job["heldout_images"])
    assert (version["promoted"], version["reason"]) == (promoted, reason)
    assert "PCK@0.1" in reason
    assert "+r1+" in version["model_version"]

    # Forced both ways, whatever was decided: rollback, then promotion.
    tour.wait_until_serves(version["model_version"] if promoted else before_round)
    activate(tour, before_round)
    tour.wait_until_serves(before_round)
    activate(tour, version["model_version"])
    tour.wait_until_serves(version["model_version"])
    assert before_round in tour.project.label_studio.versions(tour.ml_backend)

    # Label Studio asks again since the version is another one, and what it gets carries the new name.
    assert len(tour.predict(rest)) == len(rest)
    all_predictions_are_valid(tour, version["model_version"])
    newest = {p["task"]: p for p in sorted(tour.project.label_studio.predictions(tour.project.id), key=lambda p: p["id"])}
    for picture in rest:
        assert newest[tour.project.tasks[picture.path]]["model_version"] == version["model_version"]

    # The model there carries that name, under which the scores are told; and events without the secret are refused by now.
    studio, project = tour.project.label_studio, tour.project.id
    until(lambda: [m["title"] for m in studio.ml_backends(project)] == [studio.project(project)["model_version"]] == [version["model_version"]])
    until(lambda: all(SECRET_HEADER in hook["headers"] for hook in studio.webhooks(project)))
    event = {"action": "ANNOTATIONS_DELETED", "project": {"id": project}, "annotations": [{"id": 10**9}]}
    address = tour.status_url.removesuffix("/status") + "/webhook"
    until(lambda: requests.post(address, json=event, timeout=30).status_code == 401)
    (hook,) = studio.webhooks(project)
    assert requests.post(address, json=event, headers=hook["headers"], timeout=30).status_code == 200


def until(done: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.5)


def all_predictions_are_valid(tour: Tour, version: str) -> None:
    """By the SDK's LabelInterface, and by our own stricter checks."""
    stored = [p for p in tour.project.label_studio.predictions(tour.project.id) if p["model_version"] == version]
    assert stored
    for prediction in stored:
        told = {key: prediction[key] for key in ("result", "score", "model_version")}
        check_prediction(tour.project.material.config, told, sdk=True)


def activate(tour: Tour, version: str) -> None:
    url = tour.status_url.removesuffix("/status") + f"/versions/{version}/activate"
    answer = requests.post(url, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_version"] == version


def test_too_few_labelled_images_are_told_in_words(stack: Stack, insects: Callable[[int], Material]) -> None:
    tour = stack.tour(insects(2))
    tour.label(tour.project.material.pictures[:1])
    answer = requests.post(tour.status_url.removesuffix("/status") + "/webhook", timeout=30, json={
        "action": "START_TRAINING", "project": {"id": tour.project.id, "label_config": tour.project.material.config},
    })  # fmt: skip
    assert answer.status_code == 200
    assert answer.json()["job"] is None
    assert "10" in answer.json()["message"]


def test_labels_from_elsewhere_find_the_images_that_the_demo_uploaded(
    stack: Stack, insects: Callable[[int], Material], tmp_path: Path
) -> None:
    made = insects(3)
    files = [tmp_path / name for name in ("fly (2).png", "größe & blick.png", "a b.c.png")]
    for picture, file in zip(made.pictures, files, strict=True):
        shutil.copy(picture.path, file)
    pictures = tuple(replace(picture, path=file) for picture, file in zip(made.pictures, files, strict=True))
    client = LabelStudio(stack.label_studio, stack.login.token)
    project = DemoProject(client, replace(made, pictures=pictures))
    shown = {task["id"]: made.control.image_of(task["data"]) or "" for task in client.tasks(project.id)}
    for picture in pictures:
        task = project.tasks[picture.path]
        assert Matcher(shown.items()).find(LabelledImage(picture.path.name, ())) == (task, "")
        assert client.fetch(shown[task]) == picture.path.read_bytes()
