"""Many tasks, and labels of other tools, with the real Label Studio: prelabel, interrupted twice; import, run twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from backend.demo.samples import Material, rendered
from backend.label_studio import LabelStudio
from backend.split import MADE_HERE
from end_to_end.conftest import Stack
from label_config.annotations import read_result
from label_config.regions import check_prediction
from label_config.schema import parse

pytestmark = pytest.mark.label_studio


def gunicorn_workers() -> list[psutil.Process]:
    """The backend's processes that answer requests and work in the background: children of gunicorn's master."""
    found = [p for p in psutil.Process().children(recursive=True) if "backend.app:application()" in p.cmdline()]
    return [p for p in found if p.parent() in found]


def by_score(stack: Stack, project: int) -> list[tuple[int, float | None]]:
    """(task, prediction score) as the Data Manager lists them when it is told to sort by that, ascending."""
    query = {"filters": {"conjunction": "and", "items": []}, "ordering": ["tasks:predictions_score"]}
    asked = {"project": project, "fields": "all", "page_size": 10_000, "query": json.dumps(query), "include": "id,predictions_score"}
    login = {"Authorization": f"Token {stack.login.token}"}
    answer = requests.get(f"{stack.label_studio}/api/tasks/", params=asked, headers=login, timeout=300)
    return [(t["id"], t["predictions_score"]) for t in answer.json()["tasks"]]


@pytest.mark.parametrize("count", [48, pytest.param(1000, marks=pytest.mark.slow)])
def test_prelabel_killed_twice_ends_with_one_prediction_per_task(stack: Stack, tmp_path: Path, count: int) -> None:
    tour = stack.tour(rendered(tmp_path / "insects", count, seed=3))
    route = tour.status_url.removesuffix("/status") + "/prelabel"
    project = tour.project.id

    def state() -> dict[str, Any]:
        answer = requests.get(route, timeout=30)
        return dict(answer.json()["prelabel"] or {}) if answer.ok else {}

    def wait_for(done: Callable[[dict[str, Any]], bool], seconds: float = 3600.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            try:
                found = state()
            except requests.RequestException:  # no worker lives at this moment
                found = {}
            if found and done(found):
                return found
            assert time.monotonic() < end, f"it never came: {found}"
            time.sleep(0.1)

    # The command begins, and is killed; the backend goes on; its processes are killed; gunicorn's new ones go on.
    command = subprocess.Popen([sys.executable, "-m", "backend", "prelabel", "--project", str(project)], env=stack.environment)
    wait_for(lambda s: s["posted"] >= count // 6)
    command.send_signal(signal.SIGKILL)
    command.wait()
    first = state()
    assert first["active"]
    wait_for(lambda s: s["posted"] > max(first["posted"], count // 3))
    for process in gunicorn_workers():
        process.kill()
    done = wait_for(lambda s: not s["active"])
    assert (done["state"], done["failed"], done["finished"], done["total"]) == ("done", 0, count, count), done

    predictions = tour.project.label_studio.predictions(project)
    assert Counter(p["task"] for p in predictions) == Counter(tour.project.tasks.values())
    assert {p["model_version"] for p in predictions} == {tour.version}
    for prediction in predictions[:20]:
        told = {key: prediction[key] for key in ("result", "score", "model_version")}
        check_prediction(tour.project.material.config, told, sdk=True)

    assert tour.status()["label_studio_follows"] is True
    listed = by_score(stack, project)
    told = {p["task"]: p["score"] for p in predictions}
    assert [score for _, score in listed] == pytest.approx(sorted(told.values())) and {t for t, _ in listed} == set(told)
    assert [score for _, score in listed] == pytest.approx([told[t] for t, _ in listed])

    # Asked for again there is nothing to do; another one's version beside it stays, an older one of ours goes when asked to.
    task = next(iter(tour.project.tasks.values()))
    older = "nano-00000000+r1+s5.000000"
    assert MADE_HERE.fullmatch(older)
    for version in (older, "another-model"):
        tour.project.label_studio.create_prediction(task, [], score=0.0, model_version=version)
    assert requests.post(route, json={"replace": True}, timeout=30).status_code == 202
    assert wait_for(lambda s: not s["active"])["there_already"] == count
    assert {p["model_version"] for p in tour.project.label_studio.predictions(task=task)} == {tour.version, "another-model"}


CONFIG = """<View><Image name="image" value="$image"/>
<KeyPointLabels name="kp" toName="image">{labels}</KeyPointLabels>
<RectangleLabels name="kp_bbox" toName="image"><Label value="insect"/></RectangleLabels></View>"""


def test_import_twice_and_what_label_studio_and_the_journal_then_hold(
    stack: Stack, insects: Callable[[int], Material], tmp_path: Path
) -> None:
    material = insects(7)
    coco = Path(material.pictures[0].path).parent.parent / "annotations.json"
    categories = json.loads(coco.read_text())["categories"]
    labels = "".join(f'<Label value="{name}"/>' for name in categories[0]["keypoints"])
    client = LabelStudio(stack.label_studio, stack.login.token)
    config = CONFIG.format(labels=labels)
    project = int(client.create_project("Imported", config)["id"])
    client.upload(project, [("some where-" + p.path.name, p.path.read_bytes()) for p in material.pictures[:1]])
    client.upload(project, [(p.path.name, p.path.read_bytes()) for p in material.pictures[:3]])
    words = [sys.executable, "-m", "backend", "import", str(coco), "--format", "coco", "--project", str(project)]
    first = subprocess.run(words, env=stack.environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "0 are in the project already, 3 tasks get an annotation, 4 tasks are new" in first.stdout
    assert "7 annotations made. The backend's journal knows 7 labelled images" in first.stdout
    second = subprocess.run(words, env=stack.environment, capture_output=True, text=True, timeout=300)
    assert "7 are in the project already" in second.stdout, second.stdout + second.stderr
    tasks = list(client.tasks(project))
    assert sorted(len(t["annotations"]) for t in tasks) == [0] + [1] * 7

    truth = {p.path.name: p.truth for p in material.pictures}
    (control,) = parse(config).controls
    for task in tasks:
        name = task["data"]["image"].rpartition("/")[2].partition("-")[2]
        for annotation in task["annotations"]:
            read = read_result(control, annotation["result"])
            assert read.problems == ()
            (found,), expected = read.objects, truth[name]
            assert expected is not None
            expected = expected.reorder(control.schema.names)
            assert (found.keypoints.placed == expected.placed).all()
            assert abs(found.keypoints.xy - expected.xy)[expected.placed].max() < 0.05
    status = requests.get(f"{stack.backend}/projects/{project}/status", timeout=30).json()
    assert status["labelled"] == 7
