"""A Label Studio project of the demo: its images as tasks, the truth as people's annotations, predictions read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from backend.database import parts
from backend.demo.samples import Material, Picture
from backend.import_match import parts_of, stored_name
from backend.label_studio import LabelStudio
from kptllm_core.errors import DataError
from label_config.regions import to_regions

LONG = 60  # characters of a file's name that Label Studio may shorten
AT_ONCE = 8  # images in one upload, and tasks in one /predict: an answer later than 100 s is thrown away
Region = dict[str, Any]


class DemoProject:
    """The project `id` in Label Studio. `tasks[picture.path]` is the task that shows a picture."""

    def __init__(self, label_studio: LabelStudio, material: Material) -> None:
        """Creates the project and uploads every picture."""
        self.label_studio, self.material, self.control = label_studio, material, material.control
        self.id = int(label_studio.create_project(material.title, material.config)["id"])
        named = dict(zip(names_of(material.pictures), material.pictures, strict=True))
        for chunk in parts(named.items(), AT_ONCE):
            label_studio.upload(self.id, [(name, picture.path.read_bytes()) for name, picture in chunk])
        shown = {stored_name(name): picture.path for name, picture in named.items()}
        self.tasks = {shown[name]: task for name, task in self._uploaded() if name in shown}
        if len(self.tasks) != len(material.pictures):
            raise DataError(f"Label Studio made {len(self.tasks)} tasks of {len(material.pictures)} images.")

    def _uploaded(self) -> Iterable[tuple[str, int]]:
        for task in self.label_studio.tasks(self.id):
            address = self.control.image_of(task["data"])
            if address:
                yield parts_of(address)[-1], int(task["id"])

    def label(self, pictures: Iterable[Picture]) -> None:
        """Annotates pictures with their truth, as a person who started from an empty image."""
        for picture in pictures:
            self.label_studio.annotate(self.tasks[picture.path], self._truth(picture), lead_time=30.0)

    def correct(self, pictures: Iterable[Picture]) -> None:
        """Annotates pictures with their truth, as a person who moved the points of the prediction where they belong."""
        for picture in pictures:
            task = self.tasks[picture.path]
            predictions = self.label_studio.predictions(task=task)
            if not predictions:
                self.label([picture])
                continue
            newest = max(predictions, key=lambda prediction: int(prediction["id"]))
            result = corrected(newest["result"], self._truth(picture))
            self.label_studio.annotate(task, result, parent_prediction=newest["id"], lead_time=12.0)

    def predict(self, pictures: Sequence[Picture]) -> None:
        """*Retrieve Predictions* for these pictures, some tasks at a time. Those that have one of this version keep it."""
        for at in range(0, len(pictures), AT_ONCE):
            self.label_studio.retrieve_predictions(self.id, [self.tasks[p.path] for p in pictures[at : at + AT_ONCE]])

    def predictions(self, version: str) -> dict[int, list[Region]]:
        """Task → the regions of its newest prediction by that model version."""
        found = sorted(self.label_studio.predictions(self.id), key=lambda prediction: int(prediction["id"]))
        return {int(p["task"]): p["result"] for p in found if p["model_version"] == version}

    def _truth(self, picture: Picture) -> list[Region]:
        if picture.truth is None:
            raise DataError(f"{picture.path.name} has no truth.")
        regions = to_regions(self.control, picture.truth, picture.width, picture.height)
        # People's regions have no score, and a line that says who made them.
        return [{k: v for k, v in region.items() if k != "score"} | {"origin": "manual"} for region in regions]


def names_of(pictures: Sequence[Picture]) -> list[str]:
    """What each picture is uploaded as: its file's name, by which `import` and `export` know it; a number where that would not do, since
    Label Studio changes odd characters and shortens long names."""
    times = Counter(stored_name(picture.path.name) for picture in pictures)
    fit = [times[stored_name(p.path.name)] == 1 and len(p.path.name) <= LONG for p in pictures]
    return [p.path.name if fits else f"image-{number:05d}{p.path.suffix}" for number, (p, fits) in enumerate(zip(pictures, fit, strict=True))]


def corrected(prediction: Sequence[Region], truth: Sequence[Region]) -> list[Region]:
    """The truth, told with the regions of the prediction: a point that was predicted keeps its id and is marked as moved."""
    predicted = {_what(region): str(region["id"]) for region in prediction if region["type"] != "choices"}
    known = {
        region["id"]: predicted[_what(region)]
        for region in truth
        if region["type"] != "choices" and _what(region) in predicted  # a choice has the id of the point it is about
    }
    regions = []
    for region in truth:
        moved = dict(region)
        if region["id"] in known:
            moved |= {"id": known[region["id"]], "origin": "prediction-changed"}
        if "parentID" in region:
            moved["parentID"] = known.get(region["parentID"], region["parentID"])
        regions.append(moved)
    return regions


def _what(region: Region) -> tuple[str, str, str]:
    """One object in each image: control, type and label say which region it is."""
    kind = str(region["type"])
    return str(region["from_name"]), kind, ",".join(map(str, region["value"].get(kind) or ()))
