"""A project with some weeks of work behind it, for the page: beetles on leaves, a model that gets better, people who correct it."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from werkzeug.serving import make_server

from backend_world import World, world
from kptllm_core.keypoints import KeypointSet
from small_label_studio import SmallLabelStudio
from small_server import Answer

WIDTH, HEIGHT = 320, 240
NAMES = ("head", "left_wing", "right_wing", "tail")
BEETLES = """<View><Image name="image" value="$image"/>
<KeyPointLabels name="kp" toName="image" model_skeleton="head-left_wing,head-right_wing,left_wing-tail,right_wing-tail">
<Label value="head"/><Label value="left_wing"/><Label value="right_wing"/><Label value="tail"/></KeyPointLabels></View>"""
SHAPE = np.array([(0, -1.0), (-0.55, 0.15), (0.55, 0.15), (0, 1.0)])
OFF = {None: 0.10, "timed-00000000+p1+r1": 0.05, "timed-00000000+p1+r2": 0.028}  # of each adapter, in shares of the object


def beetle(number: int) -> tuple[np.ndarray, bytes]:
    """(4, 2) its points in pixels, and its image as PNG."""
    rng = np.random.default_rng(number)
    size, turn = rng.uniform(38, 62), rng.uniform(-0.9, 0.9)
    middle = np.array([rng.uniform(90, WIDTH - 90), rng.uniform(85, HEIGHT - 85)])
    ground = rng.integers(0, 36, (6, 8, 3)) + rng.integers([40, 70, 40], [90, 125, 70])
    image = Image.fromarray(ground.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)

    def at(points: Any) -> np.ndarray:
        c, s = np.cos(turn), np.sin(turn)
        return np.asarray(points, float) * size @ np.array([[c, s], [-s, c]]) + middle

    round_ = np.linspace(0, 2 * np.pi, 40)
    body = at(np.stack([0.55 * np.sin(round_), 0.15 + 0.85 * np.cos(round_)], 1))
    head = at(np.stack([0.24 * np.sin(round_), -0.8 + 0.24 * np.cos(round_)], 1))
    colour = tuple(int(v) for v in rng.integers([150, 40, 20], [220, 110, 60]))
    for leg in (-0.3, 0.15, 0.6):
        draw.line([tuple(p) for p in at([(-0.95, leg - 0.15), (0.95, leg - 0.15)])], fill=(24, 20, 18), width=3)
    draw.polygon([tuple(p) for p in body], fill=colour)
    draw.polygon([tuple(p) for p in head], fill=(30, 26, 24))
    draw.line([tuple(p) for p in at([(0, -0.6), (0, 0.98)])], fill=(30, 26, 24), width=2)
    file = io.BytesIO()
    image.save(file, "PNG")
    return at(SHAPE), file.getvalue()


class Beetles:
    """Plays Label Studio, its people, and a model that is off by so much with each adapter."""

    def __init__(self, here: World) -> None:
        self.here, self.points, self.known = here, {}, {}
        self.adapter = here.predictor
        self.studio = SmallLabelStudio(here.studio, BEETLES)
        here.predictor.predict = self.predict  # type: ignore[method-assign]
        here.webhook("PROJECT_UPDATED", config=BEETLES)

    def task(self, number: int, look: int | None = None) -> dict[str, Any]:
        points, data = beetle(number if look is None else look)
        self.points[number] = points
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        self.known[hashlib.sha256(pixels.tobytes()).hexdigest()] = points
        path = f"/data/upload/1/{number}.png"
        self.here.studio.routes[path] = Answer(body=data)
        if number not in self.studio.tasks:
            self.studio._put(number, {"image": path})
        return {"id": number, "project": 1, "data": {"image": path}}

    def predict(self, images: list[np.ndarray], schema: Any, **options: Any) -> list[KeypointSet]:
        name = self.adapter.adapter.name if self.adapter.adapter else None
        found = []
        for image in images:
            key = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
            rng = np.random.default_rng(int(key[:8], 16))
            near = self.known[key] + rng.normal(0, OFF.get(name, 0.03) * 100, (4, 2))
            order = [NAMES.index(n) for n in schema.names]
            found.append(KeypointSet(schema.names, near[order], np.full(4, 2), rng.uniform(0.5, 0.98, 4)))
        return found

    def label(self, *numbers: int, wrong: bool = False, by: int = 1, off: float = 0.0, lead_time: float = 38.0) -> None:
        """A person labels from nothing."""
        for n in numbers:
            task = self.task(n)
            names = (NAMES[0], NAMES[2], NAMES[1], NAMES[3]) if wrong else NAMES
            result = [region(name, xy + off, f"m{n}{name}") for name, xy in zip(names, self.points[n], strict=True)]
            self._submit(task, result, by, lead_time)

    def correct(self, *numbers: int, lead_time: float = 11.0) -> None:
        """A person opens predicted tasks and moves what is too far off."""
        for n in numbers:
            task = self.task(n)
            (prediction,) = self.here.predict(task, config=BEETLES)
            result = []
            for r in prediction["result"]:
                name = r["value"]["keypointlabels"][0]
                true, there = self.points[n][NAMES.index(name)], np.array([r["value"]["x"] * WIDTH, r["value"]["y"] * HEIGHT]) / 100
                moved = np.linalg.norm(true - there) > 5
                result.append(region(name, true if moved else there, r["id"], "prediction-changed" if moved else "prediction"))
            self._submit(task, result, 1, lead_time, parent_prediction=n)

    def open(self, *numbers: int, look: int | None = None) -> None:
        """A person opens tasks, which are predicted, and goes away. look: show the image of that task."""
        self.here.predict(*[self.task(n, look) for n in numbers], config=BEETLES)

    def _submit(self, task: dict[str, Any], result: list[Any], by: int, seconds: float, **more: Any) -> None:
        annotation = self.studio.annotate(task["id"], result, completed_by=by, lead_time=seconds, **more)
        answer = self.here.webhook("ANNOTATION_CREATED", config=BEETLES, annotation=annotation, task=task)
        assert answer.status_code == 200, answer.get_data(as_text=True)

    def round(self, before: float, after: float) -> dict[str, Any]:
        """A round whose judge sees these shares of points within 5 per cent."""
        self.here.figures = figures(before), figures(after)
        return self.here.play_round()

    def settle(self) -> None:
        """Let the keeper make what it wants to make in the shadow."""
        idle = 0
        while idle < 3:
            self.here.keeper.tick()
            idle = 0 if self.here.keeper.rehearse() else idle + 1


def figures(share: float) -> dict[str, Any]:
    return {"pck": {"0.05": share, "0.1": min(share + 0.2, 1.0)}, "nme": round(0.12 - share / 10, 3), "points": 20}


def region(name: str, xy: Any, number: str, origin: str = "manual") -> dict[str, Any]:
    return {"id": number, "from_name": "kp", "to_name": "image", "type": "keypointlabels", "origin": origin,
            "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0,
            "value": {"x": 100 * float(xy[0]) / WIDTH, "y": 100 * float(xy[1]) / HEIGHT, "width": 0.8, "keypointlabels": [name]}}  # fmt: skip


@contextmanager
def beetles(folder: Path, **changes: Any) -> Iterator[Beetles]:
    with world(folder, **({"round_every": 1000, "label_studio_api_key": "a" * 40} | changes)) as here:
        yield Beetles(here)


def some_weeks(made: Beetles) -> None:
    """Two promoted rounds, one that was not, a label that is exchanged, two people on some images, images that wait."""
    made.label(*range(1, 25))
    made.label(25, wrong=True)
    made.label(3, 5, 8, 9, by=2, off=1.3)
    made.round(0.31, 0.62)
    made.correct(*range(30, 42))
    made.round(0.60, 0.84)
    made.correct(*range(50, 58), lead_time=7.0)
    made.round(0.84, 0.71)
    made.open(*range(70, 78))
    made.open(78, look=70)
    made.settle()


@contextmanager
def served(made: Beetles) -> Iterator[str]:
    """The page at an address that a browser opens, and a keeper at work."""
    server = make_server("127.0.0.1", 0, made.here.app, threaded=True)
    stop = threading.Event()

    def keep(work: Callable[[], object]) -> None:
        while not stop.wait(0.2):
            work()

    keeper = made.here.keeper
    hands = [threading.Thread(target=keep, args=(work,), daemon=True) for work in (keeper.tick, keeper.train, keeper.rehearse)]
    for thread in (*hands, threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)):
        thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop.set()
        for thread in hands:
            thread.join(20)
        server.shutdown()

