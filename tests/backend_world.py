"""A backend with all that it talks to, in one process and on loopback: a small Label Studio, a core, images.

The core is the real one up to its model and its trainer, which tests/core_process.py and `ToyTrainer` stand in for.
"""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.serving import make_server

from backend.app import create_app
from backend.keeper import Keeper
from backend.rounds import Rounds
from backend.services import Services
from backend.settings import Settings
from core_process import TimedPredictor
from journal_database import journal_url
from kptllm_core.engine import Engine
from kptllm_core.jobs import JobQueue
from kptllm_core.routes import Core
from kptllm_core.routes import create_app as create_core_app
from kptllm_core.store import AdapterStore, ImageStore
from small_server import Answer, Request, SmallServer, reply

CONFIG = """<View><Image name="image" value="$image"/>
<KeyPointLabels name="kp" toName="image" smart="true"><Label value="nose"/><Label value="tail"/><Label value="ear"/></KeyPointLabels></View>"""
WITH_BOX = CONFIG.replace(
    "</View>",
    '<RectangleLabels name="kp_bbox" toName="image" smart="true"><Label value="dog"/></RectangleLabels></View>',
)
SIZE = (64, 48)
GOOD = {"pck": {"0.05": 0.6, "0.1": 0.8}, "nme": 0.08, "points": 9}
BAD = {"pck": {"0.05": 0.3, "0.1": 0.5}, "nme": 0.2, "points": 9}

TOY_TRAINER = """
import json, pathlib, sys, time
folder, seconds, before, after = pathlib.Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
run = json.loads((folder / "run.json").read_text())
(folder / "progress.json").write_text(json.dumps({"phase": "training", "step": 1, "steps": 2, "loss": 0.5, "eta_seconds": 1.0}))
time.sleep(seconds)
(folder / "adapter").mkdir(exist_ok=True)
(folder / "adapter" / "adapter.json").write_text(json.dumps({"base": run["base"]}))
result = {"adapter": run["name"], "seconds": seconds, "train_images": len(run["train"]), "heldout_images": len(run["heldout"]),
          "before": before, "after": after}
(folder / "result.new").write_text(json.dumps(result))
(folder / "result.new").rename(folder / "result.json")
"""


def picture(level: int, size: tuple[int, int] = SIZE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level % 256, level // 256, 7)).save(file, "PNG")
    return file.getvalue()


class World:
    """`core_seconds`: how long the model takes for a batch. `figures`: what the next rounds score, before and after."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.predictor = TimedPredictor(changes.pop("core_seconds", 0.0))
        self.figures: tuple[Any, Any] = (BAD, GOOD)
        self.train_seconds = 0.0
        images, adapters = ImageStore(folder / "core/images"), AdapterStore(folder / "core/adapters")
        engine = Engine(lambda: self.predictor, images, adapters)  # type: ignore[arg-type, return-value]
        engine.load()
        self.core = Core(
            images,
            adapters,
            engine,
            JobQueue(folder / "core/rounds", images, adapters, command=self._train),
            "timed",
            "cpu",
        )
        self.core.jobs.start()
        self.core_requests: list[tuple[str, str]] = []
        self._core_app = create_core_app(self.core)
        self._core_app.before_request(self._note)
        self.start_core()
        self.studio = SmallServer().__enter__()
        usual: dict[str, Any] = {
            "data_dir": folder / "backend", "database_url": journal_url(folder / "backend"),
            "core_url": f"http://127.0.0.1:{self._server.server_port}", "model": "timed",
            "label_studio_url": self.studio.url, "round_seconds": 5.0, "image_seconds": 2.0, "round_quiet_seconds": 0.0,
        }  # fmt: skip
        self.settings = Settings(**(usual | changes))
        self.start()

    def start(self) -> None:
        """(Again) a backend on the same data: what a restart after kill -9 finds."""
        self.services = Services.make(self.settings)
        self.app: Flask = create_app(self.services)
        self.rounds: Rounds = self.app.extensions["rounds"]
        self.keeper = Keeper(self.services, self.rounds)
        self.client: FlaskClient = self.app.test_client()

    def _train(self, folder: Path) -> list[str]:
        before, after = (json.dumps(f) for f in self.figures)
        return [sys.executable, "-c", TOY_TRAINER, str(folder), str(self.train_seconds), before, after]

    def _note(self) -> None:
        from flask import request

        self.core_requests.append((request.method, request.path))

    def start_core(self, port: int = 0) -> None:
        self._server = make_server("127.0.0.1", port, self._core_app, threaded=True)
        self._serving = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def restart_core(self) -> None:
        """At the address that it had before `stop_core`."""
        self.start_core(self._server.server_port)

    def stop_core(self) -> None:
        if self._serving:
            self._serving = False
            self._server.shutdown()
            self._server.server_close()

    def close(self) -> None:
        self.keeper._stop.set()
        self.services.journal.close()
        self.core.jobs.stop()
        self.stop_core()
        self.studio.__exit__()

    # ------------------------------------------------------------ what Label Studio would send

    def task(self, number: int, **more: Any) -> dict[str, Any]:
        """A task whose image is there to be fetched."""
        self.studio.routes.setdefault(f"/data/upload/1/{number}.png", Answer(body=picture(number)))
        return {"id": number, "project": 1, "data": {"image": f"/data/upload/1/{number}.png"}, **more}

    def annotation(self, task: int, number: int | None = None, second: int = 0, labels: tuple[str, ...] = ("nose", "tail", "ear"),
                   **more: Any) -> dict[str, Any]:  # fmt: skip
        result = [region(label, 10.0 + 20 * i + second, 50.0) for i, label in enumerate(labels)]
        return {"id": number or 1000 + task, "task": task, "result": result, "completed_by": 1, "was_cancelled": False,
                "ground_truth": False, "updated_at": f"2026-01-01T00:{second:02}:{task % 60:02}.{task:06}Z", **more}  # fmt: skip

    def webhook(self, action: str, config: str | None = CONFIG, project: int = 1, **content: Any) -> Any:
        about = {"id": project, "title": "Dogs"} | ({"label_config": config} if config else {})
        return self.client.post("/webhook", json={"action": action, "project": about, **content})

    def label(self, *tasks: int, **more: Any) -> None:
        """A person labels these tasks; one event, as a bulk action sends it, or a webhook each when there are few."""
        events = [tasks] if len(tasks) > 3 else [(task,) for task in tasks]
        for event in events:
            annotations, about = [self.annotation(t, **more) for t in event], [self.task(t) for t in event]
            answer = self.webhook("ANNOTATIONS_CREATED", annotation=annotations, task=about)
            assert answer.status_code == 200, answer.get_data(as_text=True)

    def setup(self, config: str = CONFIG, project: str = "1.1700000000") -> Any:
        return self.client.post(
            "/setup", json={"project": project, "schema": config, "hostname": "", "access_token": "no"}
        )

    def predict(self, *tasks: dict[str, Any], config: str = CONFIG, context: Any = None) -> list[dict[str, Any]]:
        body = {"tasks": list(tasks), "project": "1.1700000000", "label_config": config, "params": {"context": context}}
        answer = self.client.post("/predict", json=body)
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return list(answer.get_json()["results"])

    def status(self) -> dict[str, Any]:
        return dict(self.client.get("/projects/1/status").get_json())

    def turn(self) -> None:
        """What the keeper's threads do in a second."""
        self.keeper.tick()
        self.keeper.train()
        self.keeper.rehearse()

    def tick_until(self, done: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"it never came: {self.status()}"
            self.turn()
            time.sleep(0.02)

    def play_round(self) -> dict[str, Any]:
        """*Start training*, until it is decided; the job."""
        self.webhook("START_TRAINING", config=None)
        self.tick_until(lambda: self.status()["job"]["state"] in ("done", "failed", "cancelled"))
        return dict(self.status()["job"])

    # ------------------------------------------------------------ a Label Studio with an API

    def serve_api(self, tasks: list[dict[str, Any]], model_version: str = "", live: str = "KptLLM") -> dict[str, Any]:
        """Routes of Label Studio's API over these tasks; returns the project, which PATCH changes. live: the title of our model
        there, empty if it is not attached."""
        project = {"id": 1, "title": "Dogs", "label_config": CONFIG, "model_version": model_version}
        models = [{"id": 5, "title": live, "url": "http://backend", "model_version": "timed-00000000+r0+s0.f1951d"}] if live else []

        def project_call(request: Request) -> Answer:
            if request.method == "PATCH":
                wanted = request.json()["model_version"]
                known = {p["model_version"] for t in tasks for p in t.get("predictions", [])} | {m["title"] for m in models}
                if wanted not in known:
                    return reply({"detail": "Model version doesn't exist"}, 400)
                project["model_version"] = wanted
            return reply(project)

        def model_call(request: Request) -> Answer:
            if project["model_version"] == models[0]["title"]:
                project["model_version"] = request.json()["title"]
            models[0] |= request.json()
            return reply(models[0])

        def task_list(request: Request) -> Answer:
            items = json.loads(request.query["query"][0])["filters"]["items"]
            last = next(i["value"] for i in items if i["operator"] == "greater" and i["filter"].endswith(":id"))
            since = next((i["value"] for i in items if i["filter"].endswith("updated_at")), "")
            annotated = any(i["filter"].endswith("total_annotations") for i in items)
            found = [t for t in tasks if t["id"] > last and str(t.get("updated_at", "")) > since]
            return reply({"tasks": [t for t in found if t.get("annotations") or not annotated]})

        self.studio.routes["/api/projects/1/"] = project_call
        self.studio.routes["/api/projects/1/model-versions/"] = lambda _: reply({"live": models, "static": []})
        self.studio.routes["/api/ml/5"] = model_call
        self.studio.routes["/api/tasks/"] = task_list
        return project


def region(label: str, x: float, y: float, **more: Any) -> dict[str, Any]:
    return {"id": f"r{label}{x}", "from_name": "kp", "to_name": "image", "type": "keypointlabels", "origin": "manual",
            "original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0,
            "value": {"x": x, "y": y, "width": 0.5, "keypointlabels": [label]}, **more}  # fmt: skip


def rectangle(x: float, y: float, w: float, h: float, **more: Any) -> dict[str, Any]:
    return {"id": f"b{x}", "from_name": "kp_bbox", "to_name": "image", "type": "rectanglelabels", "origin": "manual",
            "original_width": SIZE[0], "original_height": SIZE[1], "image_rotation": 0,
            "value": {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": ["dog"]}, **more}  # fmt: skip


@contextmanager
def world(folder: Path, **changes: Any) -> Iterator[World]:
    made = World(folder, **changes)
    try:
        yield made
    finally:
        made.close()


def placed(prediction: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Label → (x, y) in per cent."""
    return {
        r["value"]["keypointlabels"][0]: (r["value"]["x"], r["value"]["y"])
        for r in prediction["result"]
        if r["type"] == "keypointlabels"
    }
