"""Plays a project whose truth is known through the real backend: predict the next images, correct them to the truth, train.

`Player` starts `python -m backend` (backend, core, trainer) beside a `Studio` and talks to it as Label Studio does: /predict,
/webhook. The annotator is the truth itself: after measuring what a person would have to correct, each image is annotated with its
true points, in the regions of the prediction.

`Log` is a file to which every finished step is added, and brought to the disk, before the next one begins. An interrupted replay
goes on behind the last of them; the backend has its own journal, and takes an annotation that is told twice for one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import requests

from backend.demo.project import corrected
from backend.demo.samples import Picture
from backend.demo.services import LOOPBACK, Service, answers, free_port, product
from backend.split import RETRY
from benchmarks.corrections import Corrections, by_hand, corrections
from benchmarks.studio import PROJECT, Studio
from kptllm_core.errors import DataError, InvalidInput, Unavailable
from kptllm_core.keypoints import KeypointSet
from label_config.regions import from_result, to_regions
from label_config.schema import KeypointControl, parse

AT_ONCE = 5  # images that are predicted together, before any of them is corrected
ASK_AGAIN = 40  # times, a few seconds apart, while the core is down or busy
START_SECONDS = 600.0  # a model may have to be loaded
DROPPED_SECONDS = 120.0  # that the backend may be away, when it was killed and is started anew
TOKEN = "0" * 40  # Label Studio's token; `Studio` asks nobody for one
EMPTY = ("DATABASE_URL", "BASIC_AUTH_USER", "BASIC_AUTH_PASS", "WEBHOOK_SECRET", "CORE_TOKEN", "CORE_URL", "KPTLLM_DATA",
         "LABEL_STUDIO_PUBLIC_URL", "LABEL_STUDIO_CA", "UNAIDED_SHARE", "IMAGE_HOSTS")  # fmt: skip
Json = dict[str, Any]


class Log:
    """Lines of JSON. A line that a kill cut short is forgotten."""

    def __init__(self, file: Path, settings: Json) -> None:
        """InvalidInput where the file belongs to a replay with other settings."""
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.read_bytes() if file.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        self.lines: list[Json] = [json.loads(line) for line in whole.splitlines()]
        self._out = file.open("ab")
        self._out.truncate(len(whole))
        if not self.lines:
            self.add({"settings": settings})
        found = self.lines[0].get("settings", {})
        if found != settings:
            differs = ", ".join(sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k)))
            raise InvalidInput(f"{file.parent} holds a replay with other settings ({differs}). Remove it, or name another --out.")

    def add(self, line: Json) -> None:
        self._out.write(json.dumps(line).encode() + b"\n")
        self._out.flush()
        os.fsync(self._out.fileno())
        self.lines.append(line)

    def of(self, kind: str) -> list[Json]:
        """The lines that hold `kind`, in order."""
        return [line[kind] for line in self.lines if kind in line]


class Player:
    """One project: `pictures` in the order in which they are labelled; task n shows the n-th."""

    def __init__(self, studio: Studio, pictures: Sequence[Picture], tolerance: float, log: Log, service: Service, url: str) -> None:
        self.studio, self.pictures, self.tolerance, self.log = studio, list(pictures), tolerance, log
        self.service, self.url = service, url
        self.config = str(studio.project["label_config"])
        self.control: KeypointControl = parse(self.config).controls[0]
        self._http = requests.Session()
        self._http.trust_env = False  # it is on this machine: no proxy

    def restore(self) -> None:
        """What was labelled before an interruption: the last annotations may not have been told."""
        for image in self.log.of("image"):
            self.studio.store(image["annotation"])
        for image in self.log.of("image")[-2 * AT_ONCE :]:
            self._tell(image["annotation"])

    def labelled(self) -> int:
        return len(self.log.of("image"))

    def label(self) -> None:
        """The next image, by hand."""
        at = self.labelled()
        self._annotate(at, None, by_hand(self._truth(at)), [])

    def predict_and_correct(self, end: int) -> None:
        """The next images, at most AT_ONCE of them and none from the `end`-th on."""
        chosen = range(self.labelled(), min(self.labelled() + AT_ONCE, end))
        for at, prediction in zip(chosen, self.predict(chosen), strict=True):
            regions = prediction["result"]
            self._annotate(at, str(prediction["model_version"]), self.measure(at, regions), regions)

    def predict(self, chosen: Sequence[int]) -> list[Json]:
        """/predict for these images; asked again while a core that is down or busy answers with empty predictions."""
        body = {"tasks": [self.studio.task(at + 1) for at in chosen], "project": f"{PROJECT}.1", "label_config": self.config,
                "params": {"context": None}}  # fmt: skip
        for attempt in range(ASK_AGAIN):
            results: list[Json] = self._call("POST", "/predict", body)["results"]
            if not any(str(r["model_version"]).endswith(RETRY) for r in results):
                return results
            time.sleep(min(1.0 + attempt, 5.0))
        why = next(r["error"]["message"] for r in results if "error" in r)
        raise Unavailable(f"The backend did not predict, however often it was asked: {why} {self.service.log_end()}")

    def measure(self, at: int, regions: list[Json]) -> Corrections:
        """What a person would have to do to this prediction."""
        picture = self.pictures[at]
        found = from_result(self.control, regions, picture.width, picture.height)
        best = max(found, key=lambda points: int(points.placed.sum()), default=None)
        return corrections(self._truth(at), best, self.tolerance)

    def train(self, number: int, progress: Callable[[Json], None]) -> Json:
        """The round of this number (0 is the first): asked for, unless an earlier replay had, and waited for; its account."""
        known = self._rounds()
        if len(known) <= number:
            answer = self._call("POST", "/webhook", {"action": "START_TRAINING", "project": self._project()})
            if not answer.get("job"):
                raise DataError(f"The backend did not train: {answer.get('message')}")
        begun = time.monotonic()
        while True:
            known = self._rounds(including_failed=True)
            sound = [job for job in known if job["state"] not in ("failed", "cancelled")]
            if len(sound) > number and sound[number]["state"] == "done":
                return self._account(sound[number], time.monotonic() - begun)
            if len(sound) <= number and known[-1]["state"] == "failed":
                raise DataError(f"Round {number + 1} failed: {known[-1]['message']} {self.service.log_end()}")
            progress(known[-1])
            time.sleep(0.5)

    # ------------------------------------------------------------ inside

    def _truth(self, at: int) -> KeypointSet:
        truth = self.pictures[at].truth
        assert truth is not None
        return truth

    def _annotate(self, at: int, version: str | None, counts: Corrections, regions: list[Json]) -> None:
        picture, task = self.pictures[at], at + 1
        true = [{k: v for k, v in region.items() if k != "score"} | {"origin": "manual"}
                for region in to_regions(self.control, self._truth(at), picture.width, picture.height)]  # fmt: skip
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        annotation = {"id": 1000 + task, "task": task, "result": corrected(regions, true), "completed_by": 1, "was_cancelled": False,
                      "ground_truth": False, "created_at": now, "updated_at": now}  # fmt: skip
        line = {"task": task, "file": picture.path.name, "version": version, "counts": vars(counts), "annotation": annotation}
        self.log.add({"image": line})
        self.studio.store(annotation)
        self._tell(annotation)

    def _tell(self, annotation: Json) -> None:
        """Until the backend has acknowledged it."""
        body = {"action": "ANNOTATION_CREATED", "project": self._project(), "task": self.studio.task(annotation["task"])}
        self._call("POST", "/webhook", {**body, "annotation": annotation})

    def _project(self) -> Json:
        return {k: self.studio.project[k] for k in ("id", "title", "label_config")}

    def _rounds(self, including_failed: bool = False) -> list[Json]:
        """The project's rounds, the oldest first."""
        found = self._call("GET", f"/projects/{PROJECT}/jobs")["jobs"][::-1]
        return [job for job in found if including_failed or job["state"] not in ("failed", "cancelled")]

    def _account(self, job: Json, wall_seconds: float) -> Json:
        versions = self._call("GET", f"/projects/{PROJECT}/status")["versions"]
        made = next(v for v in versions if v["model_version"] == job["model_version"])
        return {"seconds": round(float(made["seconds"]), 1), "wall_seconds": round(wall_seconds, 1), "promoted": job["promoted"],
                "version": job["model_version"], "reason": job["message"], "train_images": job["train_images"],
                "heldout_images": job["heldout_images"]}  # fmt: skip

    def _call(self, method: str, path: str, body: Json | None = None) -> Json:
        """A call of the backend, repeated while it is away. Every one of them may be repeated."""
        end = time.monotonic() + DROPPED_SECONDS
        while True:
            try:
                answer = self._http.request(method, self.url + path, json=body, timeout=300)
                if answer.status_code < 500:
                    break
                said = f"{answer.status_code}: {answer.text[:300]}"
            except requests.RequestException as error:
                said = str(error)
            if not self.service.running or time.monotonic() > end:
                raise Unavailable(f"The backend does not answer {path} ({said}). {self.service.log_end()}")
            time.sleep(0.5)
        if answer.status_code >= 400:
            raise DataError(f"The backend refused {path}: {answer.status_code} {answer.text[:500]}")
        found: Json = answer.json()
        return found


@contextmanager
def playing(folder: Path, studio: Studio, pictures: Sequence[Picture], tolerance: float, log: Log,
            settings: dict[str, str]) -> Iterator[Player]:  # fmt: skip
    """A Player over a backend with its data in `folder`, on free ports, which ends with it. settings: of the backend."""
    port, core = free_port(), free_port()
    usual = {
        **dict.fromkeys(EMPTY, ""), "HOST": LOOPBACK, "PORT": str(port), "CORE_PORT": str(core), "LABEL_STUDIO_URL": studio.url,
        "LABEL_STUDIO_API_KEY": TOKEN, "TOLERANCE": str(tolerance), "ROUND_EVERY": "100000",  # rounds come when the replay says
    }  # fmt: skip
    service, url = product(folder, usual | settings), f"http://{LOOPBACK}:{port}"
    service.start(answers(f"{url}/health", "base"), START_SECONDS)
    try:
        player = Player(studio, pictures, tolerance, log, service, url)
        player.restore()
        yield player
    finally:
        service.stop()


def counted(line: Json) -> Corrections:
    return Corrections(**line["counts"])


def read(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8."""
    from kptllm_core.imaging import read_image

    return read_image(picture.path)
