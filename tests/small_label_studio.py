"""Label Studio's API over tasks in memory, for what posts predictions and annotations there."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from email.parser import BytesParser
from typing import Any

from backend_world import CONFIG, World, picture
from small_server import Answer, Request, SmallServer, reply


class SmallLabelStudio:
    """`before[method, path]` may answer instead (or do something, and return None). Ids count up from 1."""

    def __init__(self, server: SmallServer, config: str = CONFIG) -> None:
        self.server = server
        self.project = {"id": 1, "title": "Dogs", "label_config": config, "model_version": ""}
        self.tasks: dict[int, dict[str, Any]] = {}
        self.before: dict[tuple[str, str], Callable[[Request], Answer | None]] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self._lock = threading.RLock()
        self._last = {"prediction": 0, "annotation": 0}
        self._unique: set[str] = set()
        server.routes["*"] = self._answer

    def add(self, count: int = 1, **more: Any) -> list[int]:
        """Tasks with an image each that is there to be fetched."""
        ids = []
        for _ in range(count):
            number = len(self.tasks) + 1
            self.server.routes[f"/data/upload/1/{number}.png"] = Answer(body=picture(number))
            self._put(number, {"image": f"/data/upload/1/{number}.png"}, **more)
            ids.append(number)
        return ids

    def _put(self, number: int, data: dict[str, Any], **more: Any) -> None:
        self.tasks[number] = {"id": number, "project": 1, "data": data, "annotations": [], "predictions": [], "updated_at": "", **more}

    def predict(self, task: int, version: str, result: list[Any] | None = None) -> int:
        """Store a prediction, as Label Studio does with the answer of /predict."""
        with self._lock:
            self._last["prediction"] += 1
            stored = {"id": self._last["prediction"], "task": task, "model_version": version, "result": result or [], "score": 0.0}
            self.tasks[task]["predictions"].append(stored)
            return int(stored["id"])

    def annotate(self, task: int, result: list[Any], **more: Any) -> dict[str, Any]:
        with self._lock:
            self._last["annotation"] += 1
            number = self._last["annotation"]
            stamp = f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}.{number:06}Z"
            stored = {"id": number, "task": task, "result": result, "was_cancelled": False, "ground_truth": False, "completed_by": 1,
                      "created_at": stamp, "updated_at": stamp, **more}  # fmt: skip
            self.tasks[task]["annotations"].append(stored)
            self.tasks[task]["updated_at"] = stamp
            return stored

    def versions(self) -> dict[int, list[str]]:
        """Task → the versions of its predictions, sorted."""
        return {number: sorted(p["model_version"] for p in task["predictions"]) for number, task in self.tasks.items()}

    # ------------------------------------------------------------ the wire

    def _answer(self, request: Request) -> Answer:
        self.calls[request.method, request.path] += 1
        found = next((work for (method, path), work in list(self.before.items())
                      if method == request.method and request.path.startswith(path)), None)  # fmt: skip
        told = found(request) if found else None
        return told if told is not None else self.usual(request)

    def usual(self, request: Request) -> Answer:
        parts = [p for p in request.path.split("/") if p][1:]
        with self._lock:
            match (request.method, parts):
                case ("GET", ["projects", "1"]):
                    return reply(self.project)
                case ("PATCH", ["projects", "1"]):
                    self.project |= request.json()
                    return reply(self.project)
                case ("GET", ["tasks"]):
                    return reply({"tasks": self._listed(request)})
                case ("POST", ["predictions"]):
                    body = request.json()
                    if body["task"] not in self.tasks:
                        return reply({"task": [f'Invalid pk "{body["task"]}" - object does not exist.']}, 400)
                    number = self.predict(body["task"], body["model_version"], body["result"])
                    return reply({"id": number}, 201)
                case ("DELETE", ["predictions", number]):
                    for task in self.tasks.values():
                        left = [p for p in task["predictions"] if p["id"] != int(number)]
                        if len(left) < len(task["predictions"]):
                            task["predictions"] = left
                            return Answer(204)
                    return reply({"detail": "Not found."}, 404)
                case ("POST", ["tasks", number, "annotations"]):
                    body = request.json()
                    unique = body.pop("unique_id", "")
                    if unique and unique in self._unique:
                        return reply({"detail": "Annotation with this unique id already exists"}, 409)
                    self._unique.add(unique)
                    return reply(self.annotate(int(number), body.pop("result"), **body), 201)
                case ("POST", ["projects", "1", "import"]):
                    return reply({"task_ids": self._imported(request)}, 201)
        return reply({"detail": "Not found."}, 404)

    def _listed(self, request: Request) -> list[dict[str, Any]]:
        """Of the filters those that the backend uses."""
        query, found = json.loads(request.query["query"][0]), list(self.tasks.values())
        for item in query["filters"]["items"]:
            column, operator, value = item["filter"].removeprefix("filter:tasks:"), item["operator"], item["value"]
            submitted = {t["id"]: sum(not a["was_cancelled"] for a in t["annotations"]) for t in found}
            keep: dict[tuple[str, str], Callable[[dict[str, Any]], bool]] = {
                ("id", "greater"): lambda t, v=value: t["id"] > v,
                ("id", "in_list"): lambda t, v=value: t["id"] in v,
                ("total_annotations", "equal"): lambda t, v=value, n=submitted: n[t["id"]] == v,
                ("total_annotations", "greater"): lambda t, v=value, n=submitted: n[t["id"]] > v,
                ("updated_at", "greater"): lambda t, v=value: t["updated_at"] > v,
            }
            found = [t for t in found if keep[column, operator](t)]
        return sorted(found, key=lambda t: t["id"])[: int(request.query["page_size"][0])]

    def _imported(self, request: Request) -> list[int]:
        """Tasks as JSON, or uploaded files, whose names Label Studio changes."""
        kind = request.headers.get("Content-Type", "")
        ids = []
        if kind.startswith("application/json"):
            for body in request.json():
                ids.append(max(self.tasks, default=0) + 1)
                self._put(ids[-1], body["data"])
            return ids
        message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + request.body)
        for part in message.get_payload():
            ids.append(max(self.tasks, default=0) + 1)
            path = f"/data/upload/1/{ids[-1]:08x}-{str(part.get_filename()).replace(' ', '_')}"
            self.server.routes[path] = Answer(body=part.get_payload(decode=True))
            self._put(ids[-1], {"image": path})
        return ids


def label_studio_of(world: World, config: str = CONFIG) -> SmallLabelStudio:
    return SmallLabelStudio(world.studio, config)
