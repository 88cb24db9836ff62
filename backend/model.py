"""label-studio-ml's class contract: setup, predict, fit. Translation only, between Label Studio's JSON and the other parts.

    label config → schema;  task → image bytes → core, with support examples and the active adapter → regions
    webhook → rows of the journal, or a round

`KptLLMBackend` is made anew for each request, as label-studio-ml does it, and costs nothing: what is shared stands in
`Services`. Where label-studio-ml 2.x is installed it subclasses its LabelStudioMLBase, so that it can be hosted there too.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterable
from typing import Any, ClassVar

from backend.intake import annotation_row, id_of, project_of, task_row
from backend.prediction import Json, Prediction, failed
from backend.rounds import Rounds
from backend.served import keep_served
from backend.services import Services
from backend.settings import Settings
from backend.tables import Version
from kptllm_core.errors import ArtifactError, InvalidInput, KptError, Unavailable
from label_config.schema import LabelConfig, parse

try:
    from label_studio_ml.model import LabelStudioMLBase
except ImportError:  # the usual case: the maintained 2.x is on no package index
    LabelStudioMLBase = object

log = logging.getLogger(__name__)
PREDICT_SECONDS = 85.0  # Label Studio hangs up after 100
read_config = functools.lru_cache(maxsize=64)(parse)


class KptLLMBackend(LabelStudioMLBase):
    """A project of Label Studio as the model sees it."""

    services: ClassVar[Services | None] = None
    rounds: ClassVar[Rounds | None] = None
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, project_id: str | None = None, label_config: str | None = None) -> None:
        """label_config: None for what the journal knows. Raises SchemaError if no keypoints can be labelled with it."""
        self.connect()
        self.project_id = project_of(project_id)
        self._label_studio_client = None  # what LabelStudioMLBase would have set
        if label_config is not None:
            self.use_label_config(label_config)
        self.setup()

    @classmethod
    def connect(cls, services: Services | None = None) -> tuple[Services, Rounds]:
        """Use these services; without any, those of the environment, with the background work started (hosted elsewhere)."""
        with cls._making:
            if services is not None:
                cls.services, cls.rounds = services, Rounds(services)
            if cls.services is None or cls.rounds is None:
                from backend.keeper import Keeper

                cls.services = Services.make(Settings.from_env())
                cls.rounds = Rounds(cls.services)
                Keeper(cls.services, cls.rounds).start()
            return cls.services, cls.rounds

    # ------------------------------------------------------------ the contract

    def setup(self) -> None:
        """Nothing to load: the model lives in the core."""

    def use_label_config(self, label_config: str) -> None:
        """Remember the project's label config; the version that serves it is `model_version`."""
        self.config: LabelConfig = read_config(label_config)
        self._label_config = label_config
        services, _ = self.connect()
        self.version: Version = services.journal.observe(self.project_id, label_config, services.base())

    @property
    def model_version(self) -> str:
        """The version that serves: `nano-1a2b3c4d+r2+s5.9f31ab`."""
        if hasattr(self, "version"):
            return self.version.name
        return self.connect()[0].journal.active(self.project_id).name

    @property
    def label_config(self) -> str:
        return self._label_config

    def get(self, key: str) -> Any:
        """label-studio-ml keeps values by key in a cache of its own; ours come from the journal."""
        return {"model_version": self.model_version, "label_config": getattr(self, "_label_config", None)}.get(key)

    def set(self, key: str, value: Any) -> None:
        """Nothing of ours is kept that way."""

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def set_extra_params(self, extra_params: Any) -> None:
        """There are none."""

    def predict(self, tasks: list[Json], context: Json | None = None, **kwargs: Any) -> list[Json]:
        """One prediction per task, in their order, whatever happens to one of them.

        context: what the annotator drew with a smart tool (`{"result": [regions]}`), or None. A task that fails gives
        {"result": [], "score": 0.0, "model_version", "error"}. Where trying again may help (a service is down, no time left), its
        model_version ends in "+retry": Label Studio asks again only for tasks that have no prediction of the present version.
        """
        services, _ = self.connect()
        deadline = time.monotonic() + PREDICT_SECONDS
        for _ in range(3):  # the version may turn out to be unusable, or made for a base that the core no longer runs
            version = self.version
            try:
                prediction = Prediction(services, self.project_id, self.config, version, tasks, context, deadline)
                results = prediction.run()
                self._remember(version, prediction)
                return results
            except ArtifactError as error:
                if not self._replace(version, error):
                    return [failed(version.name, error) for _ in tasks]
        return [
            failed(self.version.name, Unavailable("The version changed again and again; ask once more.")) for _ in tasks
        ]

    def fit(self, event: str, data: Json, **kwargs: Any) -> Json:
        """A webhook: store what it says, or start a round. Answers at once; the work is the keeper's."""
        services, rounds = self.connect()
        journal = services.journal
        if event == "START_TRAINING":
            journal.log_event(self.project_id, event)
            job, said = rounds.start(self.project_id, "Start training in Label Studio")
            return {"status": "ok" if job else "waiting", "job": job.id if job else None, "message": said}
        if event in ("ANNOTATIONS_DELETED", "ANNOTATION_DELETED"):
            gone = journal.delete_annotations(self.project_id, _ids(data, "annotation", event))
            journal.log_event(self.project_id, event, {"deleted": gone})
            return {"status": "ok", "deleted": gone}
        if event == "TASKS_DELETED":
            gone = journal.delete_tasks(self.project_id, _ids(data, "task", event))
            journal.log_event(self.project_id, event, {"annotations": gone})
            return {"status": "ok", "deleted": gone}
        if event in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_UPDATED"):
            return self._annotated(event, data)
        if event == "TASKS_CREATED":
            journal.sweep_soon(self.project_id)  # tasks may be imported with annotations
        return {"status": "ok", "message": f"{event} needs nothing to be done"}

    # ------------------------------------------------------------ inside

    def _annotated(self, event: str, data: Json) -> Json:
        """Annotations of one event, in whatever form they come; what is incomplete is left to the sweep."""
        journal = self.connect()[0].journal
        config = getattr(self, "config", None)
        if config is None and (known := journal.label_config(self.project_id)):
            config = read_config(known)  # the event's own cannot be used: what was labelled counts by the last one that can
        tasks = {t["id"]: t for t in _dicts(data, "task") if isinstance(t.get("id"), int)}
        rows, task_rows, incomplete = [], [], 0
        for body in _dicts(data, "annotation"):
            task = body.get("task")
            task = task.get("id") if isinstance(task, dict) else task
            if task is None and len(tasks) == 1:
                task = next(iter(tasks))
            if not isinstance(body.get("result"), list) or task is None:
                incomplete += 1
                continue
            task = id_of(task, "annotation's task")
            rows.append(annotation_row(self.project_id, body, task, config))
            if task in tasks and tasks[task].get("data"):
                task_rows.append(task_row(self.project_id, tasks[task], config))
        if incomplete or not rows or {r.task for r in rows} - {t.task for t in task_rows}:
            journal.sweep_soon(self.project_id)
        new = journal.record(self.project_id, task_rows, rows, config)
        return {
            "status": "ok",
            "new": new,
            **({"message": f"{incomplete} without content; they will be fetched"} if incomplete else {}),
        }

    def _remember(self, version: Version, prediction: Prediction) -> None:
        """What is served judges its version once a person has corrected it. An annotator does not wait for the journal's sake."""
        try:
            keep_served(
                self.connect()[0].journal, version, prediction.made, prediction.looks, prediction.withheld
            )
        except KptError as error:
            log.warning("project %s: %d predictions are not remembered: %s", self.project_id, len(prediction.made), error.message)

    def _replace(self, version: Version, error: ArtifactError) -> bool:
        """The core refuses the version that serves: serve another one. False if there is none."""
        services, _ = self.connect()
        try:
            base = services.see_core()
        except KptError:
            return False
        if base == version.base and version.adapter is not None:
            services.journal.set_aside(self.project_id, version, error.message)
            log.error("project %s: version %s is set aside: %s", self.project_id, version.name, error.message)
        self.version = services.journal.observe(self.project_id, self._label_config, base)
        return self.version.name != version.name


def _dicts(data: Json, key: str) -> list[Json]:
    """`annotation` or `annotations`, one or a list."""
    values: list[Any] = []
    for name in (key, f"{key}s"):
        value = data.get(name)
        values += value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, dict)]


def _ids(data: Json, key: str, event: str) -> list[int]:
    found: Iterable[Any] = [d.get("id") for d in _dicts(data, key)]
    plain = [
        v
        for name in (key, f"{key}s")
        for v in (data[name] if isinstance(data.get(name), list) else [])
        if isinstance(v, (int, str))
    ]
    ids = [id_of(v, f"{key}'s id in {event}") for v in (*found, *plain)]
    if not ids:
        raise InvalidInput(f'{event} names no {key}s. Expected {{"{key}s": [{{"id": 1}}, …]}}.')
    return ids
