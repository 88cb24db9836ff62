"""The work of a prelabel run (prelabel.py): list the tasks, predict a few at a time, post, look again, until none waits.

Any process may be killed at any moment, and any answer of Label Studio may be lost: what is posted is decided by what Label
Studio shows. Each task is looked at right before it is predicted and again after its prediction was posted; of two
predictions of one version the younger one goes, whoever made it. That a post was begun is in the journal before it is
made, so that after a kill the task is looked at anew and once more at the end, when nothing can be on its way any more.

One process at a time works on a run: it holds the run's lease. Trouble with one image costs that task a few attempts; while the
core or Label Studio is down the whole run waits, and no attempt is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from sqlalchemy import func, select, update

from backend.database import parts
from backend.lease import LEASE_SECONDS, Heart, JournalLease
from backend.model import KptLLMBackend
from backend.prelabel import (
    AGAIN,
    DONE,
    FAILED,
    GONE,
    LABELLED,
    POSTED,
    POSTING,
    THERE,
    UNSETTLED,
    WAITING,
    Json,
    finish,
    get,
    open_runs,
)
from backend.services import Services, is_passing
from backend.split import MADE_HERE, RETRY
from backend.tables import Prelabel, PrelabelTask
from kptllm_core.errors import KptError

log = logging.getLogger(__name__)
BATCH = 4  # tasks per prediction: an annotator who opens a task meanwhile waits for no more than these
CONCURRENCY = 2  # batches at a time: while one is posted, the core predicts the next
MAX_ATTEMPTS = 5
AGAIN_SECONDS = 15.0  # Label Studio stores the empty predictions of an outage some moments after it was given them
LONGEST_PAUSE = 60.0
PAGE = 100


class PrelabelWork:
    """Works on the runs of all projects, in one thread that calls `turn`."""

    def __init__(
        self,
        services: Services,
        *,
        concurrency: int = CONCURRENCY,
        pause: float = 1.0,
        again_seconds: float = AGAIN_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """pause: seconds before the first repetition of anything, doubled each time. lease_seconds: see JournalLease."""
        self.services, self.journal, self.label_studio = services, services.journal, services.label_studio
        self.concurrency, self.pause, self.again_seconds = concurrency, pause, again_seconds
        self.trouble: KptError | None = None  # why the run waits at the moment
        self._lease_seconds = lease_seconds
        self._leases: dict[str, JournalLease] = {}
        self._not_before: dict[int, float] = {}  # task → monotonic time
        self._pace: deque[tuple[float, int]] = deque()  # (monotonic time, tasks settled then), of the last minute
        self._pace_lock = threading.Lock()

    def turn(self, stop: threading.Event, only: str | None = None) -> None:
        """Work on every open run (or on this one) that no other process works on, to its end."""
        runs = [only] if only else open_runs(self.services)
        for run in runs:
            if stop.is_set():
                return
            lease = self._leases.setdefault(run, JournalLease(self.services, f"prelabel:{run}", self._lease_seconds))
            if lease.hold():
                with Heart(lease) as heart:
                    self._work(run, heart.lost, stop)
                del self._leases[run]
        for gone in set(self._leases) - set(runs):
            del self._leases[gone]

    # ------------------------------------------------------------ one run

    def _work(self, run_id: str, lost: threading.Event, stopped: threading.Event) -> None:
        def stop() -> bool:
            return stopped.is_set() or lost.is_set()

        self._not_before.clear()
        self._pace.clear()
        doubtful = (PrelabelTask.run == run_id, PrelabelTask.state == POSTING)
        self.journal.write(
            lambda session: session.execute(
                update(PrelabelTask).where(*doubtful).values(state=WAITING, attempts=PrelabelTask.attempts + 1)
            )
        )
        pause = self.pause
        while not stop():
            done_before = self._settled(run_id)
            try:
                self._begin(run_id)
                if self._to_the_end(run_id, stop, stopped):
                    return
            except KptError as error:
                if not is_passing(error):
                    finish(self.services, run_id, FAILED, error.message)
                    return
                if self.trouble is None or self.trouble.message != error.message:
                    log.warning("prelabel %s waits: %s", run_id, error.message)
                self.trouble = error
                self._note(run_id, f"waiting: {error.message}")
                pause = self.pause if self._settled(run_id) > done_before else min(pause * 2, LONGEST_PAUSE)
                stopped.wait(pause)

    def _begin(self, run_id: str) -> None:
        """Both services are there, and the label config is what Label Studio has now."""
        project = get(self.services, run_id).project
        base = self.services.see_core()
        found = self.label_studio.project(int(project))
        self.journal.observe(project, str(found.get("label_config") or ""), base, str(found.get("title") or ""))

    def _to_the_end(self, run_id: str, stop: Callable[[], bool], sleep: threading.Event) -> bool:
        """List, predict and post. True when the run is finished, False when it was stopped or has more to do."""
        run = get(self.services, run_id)
        if run.open_key is not None and not run.listed:
            self._list(run, stop)
        busy: dict[Future[None], list[int]] = {}
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="prelabel") as pool:
            while not stop():
                run = get(self.services, run_id)
                if run.open_key is None:
                    return True
                taken = {task for tasks in busy.values() for task in tasks}
                unsettled, ready = self._next(run, taken)
                if ready and len(busy) < self.concurrency:
                    busy[pool.submit(self._batch, run, ready)] = ready
                    continue
                if busy:
                    done, _ = wait(busy, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        del busy[future]
                        future.result()
                elif unsettled:
                    sleep.wait(min(self.pause, 0.5))
                else:
                    return self._close(run)
        return False

    def _list(self, run: Prelabel, stop: Callable[[], bool]) -> None:
        """Every unlabelled task becomes a row; continues behind the last one that was listed."""
        version = self.journal.active(run.project).name
        page: list[Json] = []

        def store(last: bool) -> None:
            untidy = {int(t["id"]) for t in page if sort_out(_predictions(t), version, run.replace)[1]}
            rows = {int(t["id"]): None if int(t["id"]) in untidy else _verdict(t, version) for t in page}

            def change(session: Any) -> None:
                row = session.get_one(Prelabel, run.id)
                known = select(PrelabelTask.task).where(PrelabelTask.run == run.id, PrelabelTask.task.in_(list(rows)))
                for task in set(rows) - set(session.scalars(known)):
                    state, message = rows[task] or (WAITING, "")
                    session.add(PrelabelTask(run=run.id, task=task, state=state, message=message, attempts=0,
                                             version=version if state == THERE else None))  # fmt: skip
                row.cursor, row.listed, row.message = max([row.cursor, *rows]), last, "listing the tasks"

            self.journal.write(change)
            page.clear()

        for task in self.label_studio.tasks(int(run.project), unlabelled=True, after=run.cursor, page_size=PAGE):
            page.append(task)
            if len(page) == PAGE:
                store(False)
                if stop():
                    return
        store(True)

    def _next(self, run: Prelabel, taken: set[int]) -> tuple[int, list[int]]:
        """(how many tasks are not settled, the next ones to do): fresh ones together, repeated ones each by itself."""
        unsettled = (PrelabelTask.run == run.id, PrelabelTask.state.in_(UNSETTLED))
        with self.journal.reading() as session:
            count = session.scalar(select(func.count()).where(*unsettled)) or 0
            query = select(PrelabelTask.task, PrelabelTask.attempts).where(*unsettled)
            query = query.order_by(PrelabelTask.attempts, PrelabelTask.task)
            # Postponed ones must not hide those behind them. Of fresh ones a few suffice, unless they are all postponed.
            rows = session.execute(query if run.kind == AGAIN else query.limit(1000)).all()
        now = time.monotonic()
        if run.kind == AGAIN:
            for task, attempts in rows:
                if attempts == 0:
                    self._not_before.setdefault(task, now + self.again_seconds)
        ready = [(t, a) for t, a in rows if t not in taken and self._not_before.get(t, 0.0) <= now]
        if not ready:
            return count, []
        if ready[0][1] > 0:
            return count, [ready[0][0]]
        return count, [task for task, attempts in ready[:BATCH] if attempts == 0]

    # ------------------------------------------------------------ a few tasks

    def _batch(self, run: Prelabel, tasks: list[int]) -> None:
        """Look, predict, post, look again; every task's outcome is in the journal then. Raises passing trouble of a service."""
        version = self.journal.active(run.project).name
        shown = self._look(run.project, tasks)
        outcomes: dict[int, Json] = {}
        wanted: list[Json] = []
        for task in tasks:
            body = shown.get(task)
            verdict = (GONE, "") if body is None else _verdict(body, version)
            if verdict is None and body is not None:
                wanted.append(body)
                continue
            if body is not None:
                self._tidy(body, version, run.replace)
            state, message = verdict or (GONE, "")
            outcomes[task] = {"state": state, "message": message, "version": version if state == THERE else None}
        trouble = self._predict_and_post(run, wanted, outcomes) if wanted else None
        self._record(run, outcomes)
        if trouble is not None:
            raise trouble

    def _predict_and_post(self, run: Prelabel, tasks: list[Json], outcomes: dict[int, Json]) -> KptError | None:
        """Fills in the outcomes of these tasks; returns the trouble when Label Studio took none of them."""
        model = KptLLMBackend(run.project, self.journal.label_config(run.project))
        self.services.see_core()  # raises when it is away: then the run waits, and these tasks with it
        results = model.predict(tasks)
        gone: KptError | None = None
        if all(str(r["model_version"]).endswith(RETRY) for r in results):
            try:
                self.services.see_core()
            except KptError as trouble:
                gone = trouble  # it was there before these images: perhaps one of them ended it, so the attempt counts
        good: dict[int, Json] = {}
        for task, result in zip(tasks, results, strict=True):
            number, error = int(task["id"]), result.get("error")
            if error:
                passing = str(result["model_version"]).endswith(RETRY)
                outcomes[number] = self._failed(run, number, str(error.get("message")), passing)
            else:
                good[number] = result
        marked = (PrelabelTask.run == run.id, PrelabelTask.task.in_(list(good)))
        self.journal.write(lambda session: session.execute(update(PrelabelTask).where(*marked).values(state=POSTING)))
        troubles = []
        for number, result in good.items():
            try:
                made = self.label_studio.create_prediction(
                    number, result["result"], score=result["score"], model_version=result["model_version"]
                )
                outcomes[number] = {"state": POSTED, "message": "", "version": result["model_version"], "prediction": made.get("id")}
            except KptError as error:
                outcomes[number] = self._failed(run, number, error.message, is_passing(error), doubt=True)
                if is_passing(error):
                    troubles.append(error)
        posted = [n for n in good if outcomes[n]["state"] == POSTED]
        for number, body in self._look(run.project, posted).items():
            kept = self._tidy(body, good[number]["model_version"], run.replace)
            outcomes[number]["prediction"] = kept or outcomes[number]["prediction"]
        return gone or (troubles[0] if troubles and len(troubles) == len(good) else None)

    def _look(self, project: str, tasks: Sequence[int]) -> dict[int, Json]:
        """The tasks as Label Studio has them at this moment; those that are gone are missing."""
        if not tasks:
            return {}
        return {int(t["id"]): t for t in self.label_studio.tasks(int(project), ids=tasks, page_size=PAGE)}

    def _tidy(self, task: Json, version: str, replace: bool) -> int | None:
        """Delete what a task has too much of; the id of the prediction of this version that stays, None if there is none."""
        keep, surplus = sort_out(_predictions(task), version, replace)
        for prediction in surplus:
            self.label_studio.delete_prediction(prediction)
        return keep

    def _failed(self, run: Prelabel, task: int, message: str, passing: bool, doubt: bool = False) -> Json:
        """The outcome of an attempt that failed. doubt: it may have worked all the same, so that it must be looked at again."""
        with self.journal.reading() as session:
            attempts = session.get_one(PrelabelTask, (run.id, task)).attempts + 1
        again = attempts < (MAX_ATTEMPTS if passing else 2 if doubt else 1)
        if again:
            self._not_before[task] = time.monotonic() + self.pause * 2**attempts
        else:
            log.warning("prelabel %s, task %s: %s", run.id, task, message)
        return {"state": WAITING if again else FAILED, "attempts": attempts, "message": message}

    def _record(self, run: Prelabel, outcomes: dict[int, Json]) -> None:
        settled = sum(o["state"] not in UNSETTLED for o in outcomes.values())
        per_second = self._measure(settled)
        self.trouble = None if settled else self.trouble

        def change(session: Any) -> None:
            for task, values in outcomes.items():
                session.execute(update(PrelabelTask).where(PrelabelTask.run == run.id, PrelabelTask.task == task).values(**values))
            row = session.get_one(Prelabel, run.id)
            if row.open_key is not None:
                row.per_second, row.message = per_second or row.per_second, "predicting and posting"

        self.journal.write(change)

    def _measure(self, settled: int) -> float | None:
        """Tasks per second over the last minute; None before that can be said."""
        with self._pace_lock:
            now = time.monotonic()
            self._pace.append((now, settled))
            while now - self._pace[0][0] > 60.0:
                self._pace.popleft()
            spent = now - self._pace[0][0]
            return sum(n for _, n in list(self._pace)[1:]) / spent if spent > 0.5 else None

    # ------------------------------------------------------------ the end

    def _close(self, run: Prelabel) -> bool:
        """Nothing waits any more: look once more at what was ever in doubt, and end the run. False if there is more to do."""
        mine, predicted = PrelabelTask.run == run.id, PrelabelTask.state.in_((POSTED, THERE))
        with self.journal.reading() as session:
            doubtful = list(session.scalars(select(PrelabelTask).where(mine, predicted, PrelabelTask.attempts > 0)))
        for part in parts(doubtful, PAGE):
            chunk = {r.task: r for r in part}
            for task, body in self._look(run.project, list(chunk)).items():
                self._tidy(body, chunk[task].version or "", run.replace)
        if run.replace:  # if another version serves since, these are older predictions now
            older = (mine, predicted, PrelabelTask.version.is_distinct_from(self.journal.active(run.project).name))

            def again(session: Any) -> bool:
                found = session.scalar(select(func.count()).where(*older))
                session.execute(update(PrelabelTask).where(*older).values(state=WAITING))
                return bool(found)

            if self.journal.write(again):
                return False
        with self.journal.reading() as session:
            counts = Counter(dict(session.execute(select(PrelabelTask.state, func.count()).where(mine).group_by(PrelabelTask.state)).all()))
        told = [f"{counts[POSTED]} predictions posted"]
        told += [f"{counts[state]} {words}" for state, words in _WORDS.items() if counts[state]]
        ended = finish(self.services, run.id, DONE, ", ".join(told) + ".")
        if ended:
            log.info("prelabel %s of project %s: %s", run.id, run.project, ", ".join(told))
        return ended

    def _settled(self, run_id: str) -> int:
        with self.journal.reading() as session:
            query = select(func.count()).where(PrelabelTask.run == run_id, PrelabelTask.state.not_in(UNSETTLED))
            return session.scalar(query) or 0

    def _note(self, run_id: str, message: str) -> None:
        def change(session: Any) -> None:
            row = session.get_one(Prelabel, run_id)
            if row.open_key is not None:
                row.message = message

        self.journal.write(change)


_WORDS = {
    THERE: "tasks had one already",
    LABELLED: "were labelled or skipped by a person",
    GONE: "were deleted meanwhile",
    FAILED: "failed",
}


def _verdict(task: Json, version: str) -> tuple[str, str] | None:
    """(state, message) of a task that needs no prediction, None for one that does."""
    annotations = [a for a in task.get("annotations") or [] if isinstance(a, dict)]
    if annotations:
        skipped = all(a.get("was_cancelled") is True for a in annotations)
        return LABELLED, "skipped by an annotator" if skipped else "labelled by a person"
    return (THERE, "") if any(p.get("model_version") == version for p in _predictions(task)) else None


def sort_out(predictions: list[Json], version: str, replace: bool) -> tuple[int | None, list[int]]:
    """(id of the prediction of this version that stays, ids of those to delete).

    To delete: all but the oldest of this version; empty ones of an outage; with `replace` those of our other versions, once there
    is one of this version. Other models' predictions are not ours to touch.
    """
    same = sorted(int(p["id"]) for p in predictions if p.get("model_version") == version)
    ours = [p for p in predictions if MADE_HERE.fullmatch(str(p.get("model_version") or "")) and p["model_version"] != version]
    left_by_outage = [p for p in ours if str(p["model_version"]).endswith(RETRY) and not p.get("result")]
    older = [p for p in ours if replace and same]
    surplus = {*same[1:], *(int(p["id"]) for p in (*left_by_outage, *older))}
    return (same[0] if same else None), sorted(surplus)


def _predictions(task: Json) -> list[Json]:
    return [p for p in task.get("predictions") or [] if isinstance(p, dict) and isinstance(p.get("id"), int)]
