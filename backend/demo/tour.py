"""The tour: label a few, predict the rest, correct, train, decide, predict again; and what of it can be measured.

Everything goes through Label Studio's own API, as a person's clicks do; only the figures of the decision are read from
the backend's status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from backend.demo.measure import pck
from backend.demo.project import DemoProject
from backend.demo.samples import Picture, choose
from backend.judges import decide
from kptllm_core.errors import DataError, KptError, Unavailable

EXAMPLES = 5
CORRECTED = 12
MEASURED = 48  # at most so many images are measured: enough for a figure, and some minutes on a CPU
LATE = 120.0  # seconds: a webhook takes a moment, and a lost one is found by the sweep within a minute
Json = dict[str, Any]


@dataclass(frozen=True)
class Tour:
    """One project on its way. `status_url` is the backend's status of this project; `ml_backend` its id in Label Studio."""

    project: DemoProject
    status_url: str
    ml_backend: int
    say: Callable[[str], None]

    @property
    def version(self) -> str:
        """The model_version that serves, as Label Studio hears it."""
        versions = self.project.label_studio.versions(self.ml_backend)
        if not versions:
            raise Unavailable("The backend names no version.")
        return versions[0]

    def status(self) -> Json:
        """The backend's account of this project."""
        try:
            answer = requests.get(self.status_url, timeout=30, proxies={"http": "", "https": ""})
            answer.raise_for_status()
            return dict(answer.json())
        except requests.RequestException as error:
            raise Unavailable(f"The backend does not tell the project's status: {error}.") from None

    def label(self, pictures: Sequence[Picture]) -> None:
        """Annotates them with their truth, and waits until they serve as examples."""
        self.say(f"Labelling {len(pictures)} images, as a person would ...")
        self.project.label(pictures)
        self._wait_for_labelled(len(pictures))

    def predict(self, pictures: Sequence[Picture]) -> dict[str, list[Json]]:
        """*Retrieve Predictions*; → picture name → regions, for those that the version that serves has answered."""
        version = self.version
        self.say(f"Predicting {len(pictures)} images with {version} ...")
        started = time.monotonic()
        self.project.predict(pictures)
        found = self.project.predictions(version)
        names = {self.project.tasks[picture.path]: picture.path.name for picture in pictures}
        predicted = {names[task]: result for task, result in found.items() if task in names}
        self.say(f"  {len(predicted)} of {len(pictures)} came back in {time.monotonic() - started:.0f} s.")
        return predicted

    def correct(self, pictures: Sequence[Picture], labelled: int) -> None:
        """Corrects their predictions to the truth, and waits until the backend knows of all `labelled` images."""
        self.say(f"Correcting the predictions of {len(pictures)} images ...")
        self.project.correct(pictures)
        self._wait_for_labelled(labelled)

    def train(self, seconds: float) -> tuple[Json, Json]:
        """*Start training* in Label Studio; waits for the decision. The job's account and the new version's."""
        before = self.status().get("job")
        entry = self.project.label_studio.train(self.ml_backend, self.project.id)
        if entry.get("error_message"):
            raise Unavailable(f"Label Studio could not start the training: {entry['error_message']}")
        self._wait("a training round begins", LATE, lambda: self.status().get("job") != before)
        told = ""
        end = time.monotonic() + seconds
        while True:
            job = self.status()["job"]
            if job["state"] in ("done", "failed", "cancelled"):
                break
            told = self._tell(job, told)
            if time.monotonic() > end:
                raise Unavailable(f"The round did not end within {seconds:.0f} s. Its state is {job['state']}: {job['message']}")
            time.sleep(1.0)
        if job["state"] != "done":
            raise Unavailable(f"The round {job['state']}: {job['message']}")
        made = [v for v in self.status()["versions"] if v["model_version"] == job["model_version"]]
        if not made:
            raise DataError(f"The round made {job['model_version']}, which the backend does not list.")
        return job, made[0]

    def _tell(self, job: Json, told: str) -> str:
        """Says what a round is doing when that has changed."""
        step, steps = job["progress"].get("step"), job["progress"].get("steps")
        share = f", {100 * step // steps // 20 * 20} %" if step and steps else ""
        text = f"  {job['message'] or job['state']}{share}"
        if text != told:
            self.say(text)
        return text

    def wait_until_serves(self, version: str) -> None:
        """Until Label Studio hears that this version serves."""
        self._wait(f"{version} serves", LATE, lambda: self.version == version)

    def _wait_for_labelled(self, count: int) -> None:
        self._wait(f"the backend knows {count} labelled images", LATE, lambda: self.status()["labelled"] >= count)

    def _wait(self, what: str, seconds: float, done: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise Unavailable(f"Waited {seconds:.0f} s in vain until {what}.")
            time.sleep(0.5)


def once(tour: Tour, round_seconds: float) -> Json:
    """The whole tour. The report as the README describes it; a KptError says which part did not happen.

    Measured are images that nobody labels: they are in neither the support set nor the training set nor the held-out
    set of the round. `pck_before` is that of the version that served when the round began, `pck_after` of what serves
    after the decision.
    """
    labelled = tour.project.material.labelled
    if len(labelled) <= CORRECTED:
        raise DataError(f"The tour needs more than {CORRECTED} images with truth (LABELS, one object in each); found {len(labelled)}.")
    chosen = choose(labelled, CORRECTED + MEASURED)
    examples, corrected, measured = chosen[:EXAMPLES], chosen[EXAMPLES:CORRECTED], chosen[CORRECTED:]

    tour.label(examples)
    first = tour.predict(corrected + measured)
    tour.say(f"  PCK on {len(measured)} images that nobody labels: {_score(tour, measured, first)}")
    tour.correct(corrected, CORRECTED)
    serving = tour.version
    before = _score(tour, measured, tour.predict(measured))
    tour.say(f"  with {CORRECTED} labelled images, before the round: {before}")

    tour.say("Start training ...")
    job, version = tour.train(round_seconds)
    tour.say(f"  {version['reason']}")
    tour.wait_until_serves(version["model_version"] if job["promoted"] else serving)
    again = tour.predict(measured)
    after = _score(tour, measured, again)
    tour.say(f"  after the round: {after}")
    report = {
        "tasks": len(tour.project.tasks),
        "predicted": sum(bool(result) for result in first.values()),
        "round": {"from": serving, "to": version["model_version"], "promoted": bool(job["promoted"]),
                  "reason": version["reason"], "seconds": version["seconds"]},
        "pck_before": before,
        "pck_after": after,
        "predictions_of_new_version": len(again) if job["promoted"] else 0,
    }  # fmt: skip
    _check(report, version, job, len(corrected + measured), len(measured))
    return report


def _score(tour: Tour, pictures: Sequence[Picture], found: dict[str, list[Json]]) -> dict[str, float]:
    return pck(tour.project.control, [(picture, found.get(picture.path.name, [])) for picture in pictures])


def _check(report: Json, version: Json, job: Json, asked: int, measured: int) -> None:
    """Did all of it happen, and does the decision follow from its figures? A KptError says what did not."""
    if report["predicted"] < asked:
        raise _Unfinished(f"Only {report['predicted']} of {asked} images got points from the examples.", report)
    if report["round"]["from"] == report["round"]["to"]:
        raise _Unfinished("The round made no new version.", report)
    follows, _ = decide(version["before"], version["after"], job["heldout_images"] or 0)
    if follows != report["round"]["promoted"]:
        raise _Unfinished(f"The decision does not follow from its figures {version['before']} and {version['after']}.", report)
    if report["round"]["promoted"] and report["predictions_of_new_version"] < measured:
        raise _Unfinished(f"Only {report['predictions_of_new_version']} of {measured} images were predicted by the new version.", report)


class _Unfinished(KptError):
    """The tour came to its end, but not all of it happened; `details` holds the report."""

    code = "tour"

    def __init__(self, message: str, report: Json) -> None:
        super().__init__(message, report=report)
