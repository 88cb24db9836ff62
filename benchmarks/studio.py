"""A small server that speaks the part of Label Studio's API that the backend reads: one project, its images, its annotations.

It keeps annotations as Label Studio does: first stored, then told by webhook. So a webhook that was lost is found by the
backend's sweep, in a replay as in life. On 127.0.0.1 only.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kptllm_core.errors import DataError

PROJECT = 1
FIRST = "2026-01-01T00:00:00.000000Z"
Json = dict[str, Any]


class Studio:
    """Tasks 1, 2, … show `images`, in that order. `with Studio(…) as studio:` serves at `studio.url`."""

    def __init__(self, title: str, label_config: str, images: Sequence[Path]) -> None:
        self.project: Json = {"id": PROJECT, "title": title, "label_config": label_config, "model_version": ""}
        self.images = list(images)
        self.annotations: dict[int, list[Json]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Studio:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def store(self, annotation: Json) -> None:
        """Keep an annotation; one of the same id is replaced."""
        with self._lock:
            known = self.annotations.setdefault(int(annotation["task"]), [])
            known[:] = [a for a in known if a["id"] != annotation["id"]] + [annotation]

    def task(self, number: int) -> Json:
        """A task as /predict and webhooks bring it."""
        image = self.images[number - 1]
        return {"id": number, "project": PROJECT, "data": {"image": f"/data/upload/{PROJECT}/{number}{image.suffix}"}}

    # ------------------------------------------------------------ the wire

    def get(self, path: str, query: dict[str, list[str]]) -> Json | bytes | None:
        """What a GET is answered with; None: not found."""
        parts = [p for p in path.split("/") if p]
        match parts:
            case ["data", "upload", _, name] if name.partition(".")[0].isdecimal():
                number = int(name.partition(".")[0])
                return self.images[number - 1].read_bytes() if 0 < number <= len(self.images) else None
            case ["api", "projects", _]:
                return self.project
            case ["api", "projects", _, "model-versions"]:
                return {"live": [], "static": []}
            case ["api", "tasks"]:
                return {"tasks": self._listed(query)}
        return None

    def _listed(self, query: dict[str, list[str]]) -> list[Json]:
        """A page of tasks in the order of their ids, by those filters that the backend uses."""
        with self._lock:
            found = []
            for number in range(1, len(self.images) + 1):
                annotations = list(self.annotations.get(number, []))
                updated = max((a["updated_at"] for a in annotations), default=FIRST)
                found.append({**self.task(number), "annotations": annotations, "predictions": [], "updated_at": updated})
        for item in json.loads(query["query"][0])["filters"]["items"]:
            column, value = item["filter"].removeprefix("filter:tasks:"), item["value"]
            match column, item["operator"]:
                case ("id", "in_list"):
                    found = [t for t in found if t["id"] in value]
                case (("id" | "updated_at") as key, "greater"):
                    found = [t for t in found if t[key] > value]
                case ("total_annotations", "greater" | "equal" as how):
                    found = [t for t in found if (len(t["annotations"]) > value) == (how == "greater")]
                case unknown:
                    raise DataError(f"The backend filters tasks by {unknown}, which this server does not know.")
        return found[: int(query["page_size"][0])]


def _handler(studio: Studio) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            self._answer(studio.get(asked.path, parse_qs(asked.query)))

        def do_PATCH(self) -> None:
            """The backend moves the project along to the version that serves; the replay predicts with that one anyway."""
            studio.project |= json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            self._answer(studio.project)

        def _answer(self, value: Json | bytes | None) -> None:
            found = value if isinstance(value, bytes) else json.dumps(value or {"detail": "Not found."}).encode()
            try:
                self.send_response(200 if value is not None else 404)
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)
            except OSError:
                self.close_connection = True  # the backend was killed, or did not wait

        def log_message(self, *_: Any) -> None:
            """Nothing: the progress bar has the terminal."""

    return Handler
