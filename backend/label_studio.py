"""The calls of Label Studio's REST API that we use (written against 1.23, each one tried there).

Traps of that API are written down where the call is that avoids them. How a call is made, signed, repeated and
refused is in `transport.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from backend.transport import Json, Transport
from kptllm_core.errors import NotFound


class LabelStudio(Transport):
    """One Label Studio and one user's token; see Transport for the constructor.

    Every method raises a KptError: Unauthorized, NotFound, InvalidInput, TooLarge or Unavailable.
    """

    # ---- who and what -------------------------------------------------------------------------------------------
    def me(self) -> Json:
        """The user whom the token belongs to."""
        return self._object("GET", "/api/current-user/whoami")

    def version(self) -> str:
        """Label Studio's release, such as 1.23.2."""
        return str(self._object("GET", "/api/version").get("release", ""))

    def projects(self) -> Iterator[Json]:
        """All projects that the user may see, the newest first."""
        for page in count(1):
            found = self._object("GET", "/api/projects/", params={"page": page, "page_size": 100})
            yield from found["results"]
            if not found.get("next"):
                return

    def project(self, project: int) -> Json:
        return self._object("GET", f"/api/projects/{project:d}/")

    def create_project(self, title: str, label_config: str, **more: Any) -> Json:
        return self._object("POST", "/api/projects/", body={"title": title, "label_config": label_config, **more})

    def update_project(self, project: int, **changes: Any) -> Json:
        return self._object("PATCH", f"/api/projects/{project:d}/", body=changes)

    def delete_project(self, project: int) -> None:
        self._json("DELETE", f"/api/projects/{project:d}/")

    def set_project_model_version(self, project: int, version: str) -> Json:
        """Which predictions annotators see: a backend's title (asked live) or a version that predictions carry."""
        return self.update_project(project, model_version=version)

    # ---- tasks and annotations ----------------------------------------------------------------------------------
    def import_tasks(self, project: int, tasks: Sequence[Json]) -> list[int]:
        """Add tasks (with `data`, and perhaps `annotations` and `predictions`); their ids."""
        path = f"/api/projects/{project:d}/import"
        return list(self._object("POST", path, params={"return_task_ids": "true"}, body=list(tasks))["task_ids"])

    def upload(self, project: int, files: Sequence[tuple[str, bytes]]) -> list[int]:
        """Upload images as (file name, content), one task each; the task ids."""
        # Of several files under one field name Label Studio keeps only the last, without a word.
        parts = [(f"file{number}", (name, content)) for number, (name, content) in enumerate(files)]
        path = f"/api/projects/{project:d}/import"
        return list(self._object("POST", path, params={"return_task_ids": "true"}, files=parts)["task_ids"])

    def tasks(
        self,
        project: int,
        *,
        annotated: bool = False,
        unlabelled: bool = False,
        after: int = 0,
        updated_after: datetime | None = None,
        ids: Sequence[int] | None = None,
        page_size: int = 100,
    ) -> Iterator[Json]:
        """All tasks in the order of their ids, with annotations, predictions and drafts; data as it was imported.

        annotated: only those with an annotation; unlabelled: only those without a submitted one. after: only ids above it.
        updated_after: only those changed since (a deleted annotation counts as a change of its task).
        Pages continue behind the last id seen, so tasks that are deleted meanwhile hide none.
        """
        wanted: list[Json] = []
        if annotated:
            wanted.append(_filter("total_annotations", "greater", "Number", 0))
        if unlabelled:
            wanted.append(_filter("total_annotations", "equal", "Number", 0))
        if updated_after is not None:
            stamp = updated_after.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # without .%f it answers 500
            wanted.append(_filter("updated_at", "greater", "Datetime", stamp))
        for group in (
            [None] if ids is None else [list(ids[at : at + page_size]) for at in range(0, len(ids), page_size)]
        ):
            last = after
            while True:
                items = [*wanted, _filter("id", "greater", "Number", last)]
                if group is not None:
                    items.append(_filter("id", "in_list", "Number", group))
                query = {"filters": {"conjunction": "and", "items": items}, "ordering": ["tasks:id"]}
                params = {
                    "project": project,
                    "page": 1,
                    "page_size": page_size,
                    "fields": "all",
                    "resolve_uri": "false",
                }
                page = self._object("GET", "/api/tasks/", params={**params, "query": json.dumps(query)})["tasks"]
                yield from page
                if len(page) < page_size:
                    break
                last = page[-1]["id"]

    def task(self, task: int, project: int | None = None) -> Json:
        """One task, with all that belongs to it. Name the project whenever it is known.

        Without it Label Studio's own call is used, which asks the ML backend for a prediction before it answers when
        the task has none yet: a backend that calls it while predicting waits for itself.
        """
        if project is None:
            return self._object("GET", f"/api/tasks/{task:d}/", params={"resolve_uri": "false"})
        for found in self.tasks(project, ids=[task]):
            return found
        raise NotFound(f"Label Studio has no task {task} in project {project}. It may have been deleted.", task=task)

    def update_task(self, task: int, **changes: Any) -> Json:
        """Change a task. `data` is replaced as a whole, and kept as it is sent: send data as it was imported."""
        return self._object("PATCH", f"/api/tasks/{task:d}/", params={"resolve_uri": "false"}, body=changes)

    def annotations(self, task: int) -> list[Json]:
        """The submitted annotations of a task; skipped ones are left out."""
        return self._list("GET", f"/api/tasks/{task:d}/annotations/")

    def annotate(self, task: int, result: list[Json], **more: Any) -> Json:
        return self._object("POST", f"/api/tasks/{task:d}/annotations/", body={"result": result, **more})

    def update_annotation(self, annotation: int, **changes: Any) -> Json:
        return self._object("PATCH", f"/api/annotations/{annotation:d}/", body=changes)

    def delete_annotation(self, annotation: int) -> None:
        self._json("DELETE", f"/api/annotations/{annotation:d}/")

    # ---- predictions --------------------------------------------------------------------------------------------
    def predictions(self, project: int | None = None, *, task: int | None = None) -> list[Json]:
        """The stored predictions of a project, or of one task."""
        return self._list("GET", "/api/predictions/", params={"project": project} if task is None else {"task": task})

    def create_prediction(self, task: int, result: list[Json], *, score: float, model_version: str) -> Json:
        body = {"task": task, "result": result, "score": score, "model_version": model_version}
        return self._object("POST", "/api/predictions/", body=body)

    def delete_prediction(self, prediction: int) -> None:
        """Gone already is as good."""
        try:
            self._json("DELETE", f"/api/predictions/{prediction:d}/")
        except NotFound:
            return

    def retrieve_predictions(self, project: int, tasks: Sequence[int] | None = None) -> Json:
        """The Data Manager's *Retrieve Predictions*, for these tasks or for all. Answers when all are stored."""
        chosen = {"all": True, "excluded": []} if tasks is None else {"all": False, "included": list(tasks)}
        params = {"id": "retrieve_tasks_predictions", "project": project}
        body = {"selectedItems": chosen}
        return self._object("POST", "/api/dm/actions/", params=params, body=body, seconds=600.0)

    # ---- the ML backend and its webhook -------------------------------------------------------------------------
    def ml_backends(self, project: int) -> list[Json]:
        """The ML backends of a project, with state and error_message of their last call.

        /api/ml is not used for it: it calls every backend anew and so wipes the message of a failed training.
        """
        params = {"extended": "true", "include_live_models": "true"}
        live = self._object("GET", f"/api/projects/{project:d}/model-versions/", params=params).get("live")
        return list(live or [])

    def attach_backend(
        self, project: int, url: str, title: str, *, interactive: bool = True, user: str = "", password: str = ""
    ) -> Json:
        """Add an ML backend. Label Studio itself calls its /health and /setup before it says yes."""
        body = _backend(project, url, title, interactive, user, password)
        return self._object("POST", "/api/ml/", body=body, seconds=60.0)

    def update_backend(
        self,
        backend: int,
        project: int,
        url: str,
        title: str,
        *,
        interactive: bool = True,
        user: str = "",
        password: str = "",
    ) -> Json:
        """Change an ML backend. All of it is sent: a PATCH without url and project is answered with 500."""
        body = _backend(project, url, title, interactive, user, password)
        return self._object("PATCH", f"/api/ml/{backend:d}", body=body, seconds=60.0)

    def rename_backend(self, model: Json, project: int, title: str) -> Json:
        """Give an ML backend (as `ml_backends` tells it) another title; its login stays. Label Studio calls its /health and /setup first.

        A project that shows the model by its title is taken along by Label Studio itself.
        """
        body = {"project": project, "url": model["url"], "title": title}
        if model.get("auth_method") == "BASIC_AUTH":  # an empty password stands for the one that is stored
            body |= {"auth_method": "BASIC_AUTH", "basic_auth_user": model.get("basic_auth_user") or "", "basic_auth_pass": ""}
        return self._object("PATCH", f"/api/ml/{model['id']:d}", body=body, seconds=60.0)

    def detach_backend(self, backend: int) -> None:
        """Remove an ML backend. Its webhook stays alive until it is deleted, too."""
        self._json("DELETE", f"/api/ml/{backend:d}")

    def train(self, backend: int, project: int) -> Json:
        """*Start training*. The answer is always 200, so this is the backend's entry, with state and error_message."""
        self._json("POST", f"/api/ml/{backend:d}/train", body={}, seconds=150.0)
        return next((entry for entry in self.ml_backends(project) if entry.get("id") == backend), {})

    def versions(self, backend: int) -> list[str]:
        """The model versions that the ML backend names."""
        return [str(version) for version in self._object("GET", f"/api/ml/{backend:d}/versions")["versions"]]

    def ask_interactively(self, backend: int, task: int, context: Json) -> Json:
        """What a smart tool's click in the labelling page does: `data` is the prediction, `errors` says why not."""
        path = f"/api/ml/{backend:d}/interactive-annotating"
        return self._object("POST", path, body={"task": task, "context": context}, seconds=150.0)

    def webhooks(self, project: int) -> list[Json]:
        return self._list("GET", "/api/webhooks/", params={"project": project})

    def create_webhook(self, project: int, url: str, headers: dict[str, str] | None = None) -> Json:
        """A webhook for all actions of a project, with payload; `headers` go with every event."""
        body = {"project": project, "url": url, "send_payload": True, "send_for_all_actions": True}
        return self._object("POST", "/api/webhooks/", body={**body, "headers": headers or {}})

    def update_webhook(self, webhook: int, **changes: Any) -> Json:
        return self._object("PATCH", f"/api/webhooks/{webhook:d}/", body=changes)

    def delete_webhook(self, webhook: int) -> None:
        self._json("DELETE", f"/api/webhooks/{webhook:d}/")

    # ---- files --------------------------------------------------------------------------------------------------
    def add_local_files(self, project: int, folder: Path | str) -> int:
        """Add a folder of Label Studio's machine (strictly below its document root) and import it; files found."""
        body = {"project": project, "path": str(folder), "use_blob_urls": True}
        storage = self._object("POST", "/api/storages/localfiles", body=body)
        path = f"/api/storages/localfiles/{storage['id']:d}/sync"
        return int(self._object("POST", path, body={}, seconds=150.0).get("last_sync_count") or 0)

    @staticmethod
    def presign(task: int, uri: str) -> str:
        """The path at Label Studio that serves, or redirects to, an s3://, gs:// or azure-blob:// object of a task."""
        return f"/tasks/{task:d}/presign/?fileuri={base64.urlsafe_b64encode(uri.encode()).decode()}"

    def fetch(self, path: str, limit: int = 50_000_000) -> bytes:
        """The bytes behind a path of Label Studio, at most `limit` of them. Images go through `ImageFetcher`."""
        return self._send("GET", path, limit=limit)[0]


def _backend(project: int, url: str, title: str, interactive: bool, user: str, password: str) -> Json:
    body: Json = {"project": project, "url": url, "title": title, "is_interactive": interactive, "auth_method": "NONE"}
    if user:  # an empty basic_auth_pass would be answered with 500
        body |= {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
    return body


def _filter(column: str, operator: str, kind: str, value: Any) -> Json:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}
