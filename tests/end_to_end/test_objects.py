"""Several objects in one image, all the way in a real Label Studio: boxes that people drew, predictions grouped by object, seen in a
browser, corrected, exported, and read back as they were labelled."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from backend.connect import Connection
from backend.demo.services import Login
from backend.formats.coco import read_coco
from backend.formats.labels import LabelledSet
from backend.formats.yolo import read_yolo
from backend.label_studio import LabelStudio
from end_to_end.browser import labelling_page
from end_to_end.conftest import Stack, product_beside
from kptllm_core.instances import box_iou
from kptllm_core.keypoints import KeypointSet, Visibility
from kptllm_core.synthetic import insect
from label_config.regions import check_prediction, to_regions
from label_config.schema import parse

pytestmark = [pytest.mark.slow, pytest.mark.label_studio]
ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 480, 360
OBJECTS = """
return window.Htx.annotationStore.selected.regionStore.regions.map(r => ({
    id: r.cleanId, type: r.type, parent: (r.parentID || '').replace(/#.*$/, ''), labels: r.labels ? r.labels.slice() : [],
    x: r.x, y: r.y, width: r.width, height: r.height}))
"""
Json = dict[str, Any]
KIND = insect()
NAMES = KIND.schema.names


def label_config() -> str:
    """As templates/several_objects.xml, of beetles. The labels stand in another order than model_index says, as people add them."""
    order = sorted(range(len(NAMES)), key=lambda i: (i * 7) % len(NAMES))
    labels = "".join(f'<Label value="{NAMES[i]}" model_index="{i}"/>' for i in order)
    return f"""<View><Image name="image" value="$image"/>
      <RectangleLabels name="keypoints_bbox" toName="image" strokeWidth="2" opacity="0.1"><Label value="insect"/></RectangleLabels>
      <KeyPointLabels name="keypoints" toName="image">{labels}</KeyPointLabels>
      <Choices name="visibility" toName="image" perRegion="true" choice="single"><Choice value="occluded"/></Choices></View>"""


CONFIG = label_config()
CONTROL = parse(CONFIG).controls[0]


@pytest.fixture(scope="module")
def nano(label_studio_server: tuple[str, Login], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The model that ships; the tests' own one finds no objects."""
    with product_beside(label_studio_server, "nano", tmp_path_factory.mktemp("nano")) as made:
        yield made


@dataclass(frozen=True)
class Scenes:
    """A project whose task `tasks[i]` shows `truth[i]`."""

    client: LabelStudio
    project: int
    ml_backend: int
    tasks: list[int]
    truth: list[list[KeypointSet]]

    @classmethod
    def make(cls, stack: Stack, counts: list[int], seed: int) -> Scenes:
        """Images of so many beetles each, uploaded to a new project that is connected to the backend."""
        client = LabelStudio(stack.label_studio, stack.login.token)
        project = int(client.create_project("Several objects", CONFIG)["id"])
        rng, files, truth = np.random.default_rng(seed), [], []
        for number, count in enumerate(counts):
            image, found = KIND.scene(rng, WIDTH, HEIGHT, count)
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            files.append((f"scene_{number}.png", file.getvalue()))
            truth.append([hide(points) for points in found])
        tasks = sorted(client.upload(project, files))
        assert Connection(client, project, stack.backend).make()
        return cls(client, project, int(client.ml_backends(project)[0]["id"]), tasks, truth)

    def label(self, at: int) -> None:
        """As a person who begins with an empty image."""
        self.client.annotate(self.tasks[at], by_hand(self.truth[at]), lead_time=60.0)

    def predict(self, *places: int) -> dict[int, Json]:
        """*Retrieve Predictions* for some tasks: place → the prediction by the version that serves."""
        version = self.client.versions(self.ml_backend)[0]
        self.client.retrieve_predictions(self.project, [self.tasks[at] for at in places])
        made = {p["task"]: p for p in self.client.predictions(self.project) if p["model_version"] == version}
        return {at: made[self.tasks[at]] for at in places}

    def wait_for_examples(self, count: int) -> None:
        """Until so many labelled images are shown to the model."""
        deadline = time.monotonic() + 300
        while f"+s{count}." not in self.client.versions(self.ml_backend)[0]:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def export(self, kind: str, folder: Path) -> Path:
        """Label Studio's own export, unpacked."""
        content = self.client.fetch(f"/api/projects/{self.project}/export?exportType={kind}")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder)
        return folder

    def name_of(self, at: int) -> str:
        """The stem of an image's name in exports."""
        return Path(self.client.task(self.tasks[at], self.project)["data"]["image"]).stem


def hide(points: KeypointSet) -> KeypointSet:
    """The first point counts as hidden, so that there is something to lose."""
    visibility = points.visibility.copy()
    visibility[np.flatnonzero(points.placed)[:1]] = Visibility.OCCLUDED
    return replace(points, visibility=visibility)


def by_hand(truth: list[KeypointSet]) -> list[Json]:
    regions = to_regions(CONTROL, truth, WIDTH, HEIGHT)
    return [{k: v for k, v in r.items() if k != "score"} | {"origin": "manual"} for r in regions]


def boxes_alone(truth: list[KeypointSet]) -> list[Json]:
    return [r for r in by_hand(truth) if r["type"] == "rectanglelabels"]


def groups(result: list[Json]) -> dict[str, tuple[Json, list[Json]]]:
    """Box → itself and its points. Every point has a box."""
    found: dict[str, tuple[Json, list[Json]]] = {r["id"]: (r, []) for r in result if r["type"] == "rectanglelabels"}
    for region in result:
        if region["type"] == "keypointlabels":
            found[region["parentID"]][1].append(region)
    return found


def pixels(box: Json) -> np.ndarray:
    value = box["value"]
    return np.array([value["x"] * WIDTH, value["y"] * HEIGHT, value["width"] * WIDTH, value["height"] * HEIGHT]) / 100


def corrected(result: list[Json], truth: list[KeypointSet]) -> list[Json]:
    """What a person makes of a prediction: right boxes and points keep their ids, wrong objects go, missing ones come."""
    mine, left = list(groups(result).values()), by_hand(truth)
    boxes = [r for r in left if r["type"] == "rectanglelabels"]
    known: dict[str, str] = {}  # id in `left` → id of the region that was moved there
    overlap = box_iou(np.array([pixels(b) for b in boxes]), np.array([pixels(b) for b, _ in mine]))
    for i, box in enumerate(boxes):
        if overlap.size and overlap[i].max() > 0.3:
            j = int(overlap[i].argmax())
            overlap[:, j] = 0
            known[box["id"]] = mine[j][0]["id"]
            named = {r["value"]["keypointlabels"][0]: r["id"] for r in mine[j][1]}
            own = [r for r in left if r.get("parentID") == box["id"] and r["type"] == "keypointlabels"]
            known |= {r["id"]: named[label] for r in own if (label := r["value"]["keypointlabels"][0]) in named}
    return [
        r | {"id": known.get(r["id"], r["id"]), "origin": "prediction-changed" if r["id"] in known else "manual"}
        | ({"parentID": known.get(r["parentID"], r["parentID"])} if "parentID" in r else {})
        for r in left
    ]  # fmt: skip


def same_objects(found: LabelledSet, scenes: Scenes, near: float, visibility: bool) -> None:
    """Every object of every image, apart from the others, with its points by name. near: in pixels."""
    images = {Path(image.name).stem: image for image in found.images}
    for at, truth in enumerate(scenes.truth):
        things = images[scenes.name_of(at)].things if truth else ()
        assert len(things) == len(truth)
        scale = np.array([WIDTH, HEIGHT]) if truth and images[scenes.name_of(at)].relative else np.ones(2)
        for expected in truth:
            boxes = [np.array(t.box) * np.tile(scale, 2) for t in things if t.box]
            thing = things[int(np.argmin([np.abs(box - expected.box).max() for box in boxes]))]
            np.testing.assert_allclose(np.array(thing.box) * np.tile(scale, 2), expected.box, atol=near)
            placed = {n: xy for n, xy, p in zip(expected.names, expected.xy, expected.placed, strict=True) if p}
            assert set(thing.points) == set(placed)
            for name, xy in placed.items():
                np.testing.assert_allclose([thing.points[name].x * scale[0], thing.points[name].y * scale[1]], xy, atol=near, err_msg=name)
                if visibility:
                    assert thing.points[name].visibility == expected.visibility[expected.names.index(name)]


@pytest.mark.browser
def test_several_objects_from_boxes_to_exports(nano: Stack, chromium: tuple[str, str], tmp_path: Path, artifacts: Path) -> None:
    scenes = Scenes.make(nano, [2, 3, 3, 0], seed=7)
    client, (_, shown, drawn_on, empty) = scenes.client, scenes.tasks
    scenes.label(0)
    scenes.wait_for_examples(1)

    # Two of three objects have a box by another model, one of three by a person; in the last image there is nothing.
    given = {1: boxes_alone(scenes.truth[1][:2]), 2: boxes_alone(scenes.truth[2][:1])}
    client.create_prediction(shown, given[1], score=0.9, model_version="a detector")
    first = client.annotate(drawn_on, given[2], lead_time=5.0)
    predicted = scenes.predict(1, 2, 3)
    for at, prediction in predicted.items():
        check_prediction(CONFIG, {k: prediction[k] for k in ("result", "score", "model_version")}, sdk=True)
        found = list(groups(prediction["result"]).values())
        for (box, points), known in zip(found, given.get(at, []), strict=False):
            np.testing.assert_allclose(pixels(box), pixels(known), atol=0.01)
            assert box["score"] == 1.0 and points, "the box of a person is used as it is"
        assert len(found) >= len(given.get(at, []))
        for box, points in found[len(given.get(at, [])) :]:
            assert box["score"] < 1.0 and points
        for _, points in found:
            names = [r["value"]["keypointlabels"][0] for r in points]
            assert len(set(names)) == len(names), "a point twice on one object"

    # What a person sees: boxes, and under each its points.
    result = predicted[1]["result"]
    with labelling_page(chromium, nano.label_studio, tmp_path / "profile") as page:
        page.log_in(nano.login)
        page.open(scenes.project, shown, sum(r["type"] == "keypointlabels" for r in result))
        regions = page.driver.execute_script(OBJECTS)
        page.screenshot(artifacts / "several-objects.png")
    boxes = {r["id"]: r for r in regions if r["type"] == "rectangleregion"}
    held = [(boxes[r["parent"]]["x"], r["labels"][0], r["x"]) for r in regions if r["type"] == "keypointregion"]
    expected = [(box["value"]["x"], p["value"]["keypointlabels"][0], p["value"]["x"]) for box, points in groups(result).values() for p in points]
    np.testing.assert_allclose([(a, c) for a, _, c in sorted(held)], [(a, c) for a, _, c in sorted(expected)], atol=0.5)

    # Corrected as a person does, one of them in the annotation that had the box already.
    client.annotate(shown, corrected(result, scenes.truth[1]), parent_prediction=predicted[1]["id"], lead_time=20.0)
    client.update_annotation(first["id"], result=corrected(predicted[2]["result"], scenes.truth[2]), lead_time=20.0)
    client.annotate(empty, [], lead_time=2.0)

    # YOLO pose, from Label Studio itself: objects apart, points in the order of model_index; whether one is hidden is lost there.
    yolo = scenes.export("YOLO", tmp_path / "yolo")
    same_objects(read_yolo(yolo, list(CONTROL.labels)), scenes, near=0.01, visibility=False)

    # COCO keypoints: Label Studio's own export has one object for each image, whatever was labelled; so we write it.
    theirs = read_coco(scenes.export("COCO", tmp_path / "coco") / "result.json")
    assert {len(image.things) for image in theirs.images} == {1}, "Label Studio keeps objects apart now: `backend export` may go"
    ours = tmp_path / "ours" / "annotations.json"
    command = [sys.executable, "-m", "backend", "export", "--project", str(scenes.project), str(ours)]
    done = subprocess.run(command, cwd=ROOT, env=nano.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "8 objects" in done.stdout, done.stdout + done.stderr
    same_objects(read_coco(ours), scenes, near=0.01, visibility=True)

    # The page, too, knows of nothing that is not clear.
    told = requests.get(f"{nano.backend}/projects/{scenes.project}/quality", timeout=60).json()
    assert told["unused"] == [] and told["checked"] == 8


def test_objects_are_found_after_a_few_examples(nano: Stack) -> None:
    """Nobody draws a box: most objects of images that nobody saw before are found, and not much else."""
    scenes = Scenes.make(nano, [1, 2, 3, 2, 3, 4, 1, 5], seed=11)
    for at in range(2):
        scenes.label(at)
    scenes.wait_for_examples(2)
    hit = total = drawn = 0
    for at, prediction in scenes.predict(*range(2, 8)).items():
        found = np.array([pixels(box) for box, _ in groups(prediction["result"]).values()]).reshape(-1, 4)
        true = np.array([t.box for t in scenes.truth[at]])
        hit += int((box_iou(true, found).max(1, initial=0) >= 0.5).sum())
        total, drawn = total + len(true), drawn + len(found)
    assert hit >= 0.5 * total, f"{hit} of {total} objects are found"
    assert drawn <= 2 * total, f"{drawn} boxes for {total} objects"


