"""The queue of training rounds, on disk: what was asked, how far it is, what came out. One trainer at a time.

    rounds/<job>/run.json        what was asked, with the base and the device; written once
                 state.json      queued → running → done | failed | cancelled; written by this process alone
                 progress.json   written by the trainer, replaced at each step
                 result.json     written by the trainer when all is complete; failure.json when it gave up
                 train, heldout, support: COCO folders, images hard-linked from the store
                 adapter         the new adapter, until it moves to the adapters' folder

After a kill at any point the next start finds every round in one of these states and carries on.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kptllm_core.errors import Conflict, KptError, NotFound
from kptllm_core.messages import RoundRequest
from kptllm_core.store import AdapterStore, ImageStore, disk_error, fsync_folder, read_json, write_json

log = logging.getLogger(__name__)

PARTS = ("train", "heldout", "support")
UNFINISHED = ("queued", "running")
FAILED, STOPPED, LOCKED = 1, 75, 76  # exit codes of the trainer; 0 is success, all others are accidents
MAX_RESTARTS = 3
KEEP_SNAPSHOTS = 3  # finished rounds whose images stay linked, for a look by hand
KEEP_FAILED = 50  # rounds that made no adapter, whose reason stays to be read
GRACE = 20.0  # seconds that a trainer has to save its state
HUNG = 1800.0  # seconds without any progress after which a trainer is taken for dead


@dataclass
class Job:
    """One round. Its fields change under the queue's lock."""

    id: str
    folder: Path
    run: dict[str, Any]  # of a finished round without its labels, which are large
    state: str = "queued"
    reason: str | None = None
    accidents: int = 0  # how often its trainer died
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        return str(self.run["name"])

    @property
    def finished(self) -> bool:
        return self.state not in UNFINISHED

    def images(self) -> set[str]:
        return {item["image"] for part in PARTS for item in self.run[part]}

    def to_json(self) -> dict[str, Any]:
        progress = read_json(self.folder / "progress.json") or {}
        return {"job": self.id, "name": self.name, "state": self.state, "phase": progress.get("phase") if self.state == "running" else None,
                "step": progress.get("step", 0), "steps": progress.get("steps"), "loss": progress.get("loss"),
                "eta_seconds": progress.get("eta_seconds") if self.state == "running" else None, "reason": self.reason,
                "result": read_json(self.folder / "result.json") if self.state == "done" else None}  # fmt: skip


def trainer_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "kptllm_core.trainer", str(folder), "--parent", str(os.getpid())]


class JobQueue:
    """Rounds are run in the order of their arrival, by a thread that lives as long as this process.

    command: the trainer's command line for a round's folder.
    """

    def __init__(self, folder: Path, images: ImageStore, adapters: AdapterStore, *,
                 command: Callable[[Path], list[str]] = trainer_command, grace: float = GRACE, hung: float = HUNG) -> None:  # fmt: skip
        self.folder, self.images, self.adapters = folder, images, adapters
        self._command, self._grace, self._hung = command, grace, hung
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rounds", daemon=True)
        self._jobs: dict[str, Job] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        found = [job for job in map(self._read, folder.iterdir()) if job]
        for job in sorted(found, key=lambda j: j.run["created"]):
            self._jobs[job.id] = job
            if not job.finished:
                self.images.pin(job.images())
                if job.state == "running":
                    log.info("Round %s was interrupted; it goes on.", job.name)
                    job.state = "queued"  # not noted: a full disk must not keep the core from serving, and it would be read so again

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops the trainer, whose state stays resumable, and waits for its end."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(self._grace + 10)

    @property
    def running(self) -> str | None:
        """The id of the round that is training now."""
        return next((j.id for j in list(self._jobs.values()) if j.state == "running"), None)

    @property
    def queued(self) -> int:
        return sum(j.state == "queued" for j in list(self._jobs.values()))

    def get(self, job_id: str) -> Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound(f"There is no round {job_id[:80]!r} here. POST /rounds starts one.") from None

    def submit(self, request: RoundRequest, base: str, model: str, device: str) -> Job:
        """Freezes what the round needs and queues it; durable on return. The same request again gives the same job.

        Conflict if the name is taken by another request; ArtifactError for an unknown parent; NotFound for a missing image.
        """
        content = request.content_hash()
        with self._changed:
            for job in self._jobs.values():
                if job.name == request.name and job.run["content"] == content and job.run["base"] == base:
                    return job
                if job.name == request.name and job.state in (*UNFINISHED, "done"):
                    raise Conflict(f"The name '{request.name}' belongs to round {job.id} ({job.state}), which was asked differently. "
                                   "Choose another name.")  # fmt: skip
            if request.name in self.adapters:
                raise Conflict(f"An adapter named '{request.name}' exists already. Choose another name or delete that one.")
            if request.parent is not None:
                self.adapters.path(request.parent)
            job_id = f"{time.time_ns():x}-{content[:12]}"
            run = {**request.to_json(), "job": job_id, "content": content, "base": base, "model": model, "device": device,
                   "parent_folder": None if request.parent is None else str(self.adapters.path(request.parent).resolve()),
                   "created": time.time_ns()}  # fmt: skip
            folder = self._freeze(job_id, run)
            job = self._jobs[job_id] = Job(job_id, folder, run)
            self.images.pin(job.images())
            self._changed.notify_all()
            return job

    def cancel(self, job_id: str) -> Job:
        """A queued round will not start; a running one is stopped and its work dropped. A finished one stays as it is."""
        job = self.get(job_id)
        with self._changed:
            if job.state == "queued":
                self._finish(job, "cancelled", "Cancelled before it began.")
            elif job.state == "running":
                job.cancelled.set()
        return job

    def delete_adapter(self, name: str) -> None:
        """NotFound; Conflict while an unfinished round starts from it. Its name is free afterwards."""
        with self._changed:
            for job in self._jobs.values():
                if not job.finished and job.run["parent"] == name:
                    raise Conflict(f"The round '{job.name}' ({job.state}) starts from the adapter '{name}'. Cancel it first, or wait for its end.")
            self.adapters.delete(name)
            for job in [j for j in self._jobs.values() if j.name == name and j.finished]:
                del self._jobs[job.id]
                shutil.rmtree(job.folder, ignore_errors=True)

    def _freeze(self, job_id: str, run: dict[str, Any]) -> Path:
        """The round's folder, complete or absent."""
        building = self.folder / f".new-{uuid.uuid4().hex}"
        try:
            for part in PARTS:
                (building / part / "images").mkdir(parents=True)
                for sha in sorted({item["image"] for item in run[part]}):
                    self.images.link(sha, building / part / "images" / sha)
                fsync_folder(building / part / "images")
                fsync_folder(building / part)
            write_json(building / "state.json", {"state": "queued", "reason": None, "accidents": 0})
            write_json(building / "run.json", run)
            building.rename(self.folder / job_id)
            fsync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise disk_error(error) from error
        except KptError:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return self.folder / job_id

    def _read(self, folder: Path) -> Job | None:
        run, state = read_json(folder / "run.json"), read_json(folder / "state.json")
        if not isinstance(run, dict) or not isinstance(state, dict) or not {"name", "content", "base", "created", *PARTS} <= set(run):
            log.error("%s is no round; left alone.", folder)
            return None
        job = Job(folder.name, folder, run, state.get("state", "queued"), state.get("reason"), state.get("accidents", 0))
        job.run = _without_labels(run) if job.finished else run
        return job

    def _set(self, job: Job, state: str, reason: str | None = None) -> None:
        write_json(job.folder / "state.json", {"state": state, "reason": reason, "accidents": job.accidents})
        job.state, job.reason = state, reason

    def _finish(self, job: Job, state: str, reason: str | None = None) -> None:
        """The caller holds the lock."""
        self._set(job, state, reason)
        self.images.unpin(job.images())
        job.run = _without_labels(job.run)
        log.info("Round %s is %s%s", job.name, state, f": {reason}" if reason else ".")
        for leftover in [*job.folder.glob(".adapter*"), *([] if state == "done" else [job.folder / "adapter"])]:
            shutil.rmtree(leftover, ignore_errors=True)
        finished = [j for j in self._jobs.values() if j.finished]
        for old in finished[:-KEEP_SNAPSHOTS]:
            for part in PARTS:
                shutil.rmtree(old.folder / part, ignore_errors=True)
        for old in [j for j in finished if j.state != "done"][:-KEEP_FAILED]:
            del self._jobs[old.id]
            shutil.rmtree(old.folder, ignore_errors=True)

    def _work(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                job = next((j for j in self._jobs.values() if j.state == "queued"), None)
                if job is None:
                    if not self._stopping.is_set():
                        self._changed.wait()
                    continue
            try:
                self._run(job)
            except Exception as error:
                log.exception("Round %s cannot be run.", job.name)
                reason = error.message if isinstance(error, KptError) else "The core failed on this round. Its log says more."
                self._end(job, "failed", reason)

    def _end(self, job: Job, state: str, reason: str | None = None) -> None:
        """A round's end holds even where the disk refuses to note it; the next start finds the same."""
        with self._changed:
            try:
                self._finish(job, state, reason)
            except KptError as error:
                log.error("Round %s is %s, which cannot be noted: %s", job.name, state, error.message)
                job.state, job.reason = state, reason

    def _run(self, job: Job) -> None:
        """From queued to an end, or back to queued when this process stops."""
        with self._changed:
            if job.state != "queued":
                return
            self._set(job, "running")
        (job.folder / "failure.json").unlink(missing_ok=True)
        while True:
            if read_json(job.folder / "result.json"):  # by this trainer, or by one before the core was killed
                self._publish(job)
                return
            code = self._train(job)
            if job.cancelled.is_set():
                with self._changed:
                    self._finish(job, "cancelled", "Cancelled while it ran.")
                return
            if self._stopping.is_set():
                with self._changed:
                    self._set(job, "queued")
                return
            failure = read_json(job.folder / "failure.json")
            if code == FAILED and failure:
                with self._changed:
                    self._finish(job, "failed", failure["message"])
                return
            if code == LOCKED:
                log.warning("Round %s: another trainer still holds it; waiting.", job.name)
                self._stopping.wait(2)
            elif code != 0:
                job.accidents += 1
                if job.accidents > MAX_RESTARTS:
                    raise KptError(f"The trainer died {job.accidents} times, last {_cause(code)}. trainer.log in its folder says more; "
                                   "too little memory is the usual cause.")  # fmt: skip
                log.warning("Round %s: the trainer died (%s); restart %d of %d.", job.name, _cause(code), job.accidents, MAX_RESTARTS)
                with self._changed:
                    self._set(job, "running")
            elif not read_json(job.folder / "result.json"):
                raise KptError("The trainer ended without a result. trainer.log in its folder says more.")

    def _publish(self, job: Job) -> None:
        """Adapter into its place, then the state. Killed between the two, the next start finds the adapter in place."""
        if (job.folder / "adapter").is_dir():
            self.adapters.publish(job.folder / "adapter", job.name)
        elif job.name not in self.adapters:
            raise KptError("The round has a result and no adapter. trainer.log in its folder says more; run the round again.")
        self._end(job, "done")

    def _train(self, job: Job) -> int:
        """One trainer from start to end. Its exit code; minus the signal if one killed it. Nothing of its group is left."""
        package = Path(__file__).resolve().parent.parent
        secrets = {"CORE_TOKEN"}
        env = {key: value for key, value in os.environ.items() if key not in secrets}
        env.update(_visible(str(job.run["device"]), env))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), env.get("PYTHONPATH")]))
        with (job.folder / "trainer.log").open("ab") as output:
            # Its own group, so that it can be killed with all that it starts, and a Ctrl-C here does not reach it.
            process = subprocess.Popen(self._command(job.folder), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                       start_new_session=True, env=env)  # fmt: skip
        deadline = None
        last, since = None, time.monotonic()
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            now = time.monotonic()
            progress = _stamp(job.folder / "progress.json")
            if progress != last:
                last, since = progress, now
            if deadline is None and (job.cancelled.is_set() or self._stopping.is_set()):
                process.terminate()
                deadline = now + self._grace
            if (deadline is not None and now > deadline) or now - since > self._hung:
                log.warning("Round %s: the trainer does not react; killed.", job.name)
                break
            self._stopping.wait(0.1) if deadline is None else time.sleep(0.1)
        try:
            os.killpg(process.pid, signal.SIGKILL)  # also what the trainer may have left behind; it is not reaped yet
        except ProcessLookupError:
            log.debug("Trainer %d left nothing behind.", process.pid)
        return process.wait()


def _without_labels(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in PARTS}


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _visible(device: str, env: dict[str, str]) -> dict[str, str]:
    """What keeps a trainer to the core's device: `cpu` hides every GPU, `cuda:1` all but the second of those visible."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if kind == "cuda" and number.isdigit():
        seen = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return {"CUDA_VISIBLE_DEVICES": seen[int(number)] if int(number) < len(seen) else number}
    return {}


def _cause(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
