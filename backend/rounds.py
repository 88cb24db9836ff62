"""Training rounds: when they start, what they train on, whether their result serves.

    requested ── snapshot taken, images fetched ──> prepared ── sent to the core ──> running ──> done | failed | cancelled

A job is a row of the journal and every step of it may be repeated: the snapshot is stored before it is sent, the core
takes the same round twice for one, and the decision is one transaction. So a kill anywhere loses nothing. `Rounds.step`
is called by the keeper (keeper.py), in one process at a time.

The rule of promotion stands in `decide`, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from backend import split
from backend.services import Services, is_passing
from backend.snapshot import round_body
from backend.sweep import sweep
from backend.tables import Annotation, Job, Project, Task, Version
from backend.versions import candidates_of, decide_uses, freeze_version, support_entries, uses_of
from kptllm_core.errors import Conflict, InvalidInput, KptError, NotFound
from label_config.annotations import read_result
from label_config.schema import LabelConfig, parse

log = logging.getLogger(__name__)
FINISHED = ("done", "failed", "cancelled")
JUDGED_BY = ("0.05", "0.1")  # PCK thresholds


def decide(before: dict[str, Any] | None, after: dict[str, Any] | None, images: int = 0) -> tuple[bool, str]:
    """Whether a new version serves, and why, from the figures of both on the held-out images.

    It serves unless it is worse: the mean of PCK@0.05 and PCK@0.1 must not be lower than the previous version's, and
    where it is the same the mean error must not be larger. Without complete figures it does not serve.
    """
    old, new = _figures(before), _figures(after)
    if old is None or new is None:
        which = "previous" if old is None else "new"
        return (
            False,
            f"Not promoted: the figures of the {which} version on the held-out images are missing or no numbers.",
        )
    told = (
        f"on {images} held-out images ({int((after or {}).get('points') or 0)} points) PCK@0.1 {old['0.1']:.3f} → {new['0.1']:.3f}, "
        f"PCK@0.05 {old['0.05']:.3f} → {new['0.05']:.3f}, mean error {old['nme']:.3f} → {new['nme']:.3f} of the object's size"
    )
    was, now = (sum(f[t] for t in JUDGED_BY) / len(JUDGED_BY) for f in (old, new))
    if now > was + 1e-9:
        return True, f"Promoted: better {told}."
    if now < was - 1e-9:
        return False, f"Not promoted: worse {told}."
    if new["nme"] <= old["nme"] + 1e-9:
        return True, f"Promoted: as good as before {told}."
    return False, f"Not promoted: the same PCK but a larger error {told}."


def _figures(score: dict[str, Any] | None) -> dict[str, float] | None:
    try:
        figures = {t: float(score["pck"][t]) for t in JUDGED_BY} | {"nme": float(score["nme"])}  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    return figures if all(math.isfinite(v) for v in figures.values()) else None


class Rounds:
    """The rounds of all projects."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.journal, self.settings = services.journal, services.settings

    # ------------------------------------------------------------ asking

    def start(self, project: str, asked_by: str) -> tuple[Job | None, str]:
        """Ask for a round; the unfinished one if there is one. (None, why not) below MIN_TRAIN labelled images."""

        def change(session: Session) -> tuple[Job | None, str]:
            row = session.get(Project, project, with_for_update=True)
            running = session.scalar(select(Job).where(Job.open_key == project))
            if running is not None:
                return running, f"Round {running.round} is not finished yet: {running.message or running.state}."
            labelled = row.labelled if row else 0
            if row is None or labelled < self.settings.min_train:
                return None, (f"{labelled} of {self.settings.min_train} labelled images: too few for a training round. "
                              "Until then predictions come from the support examples alone. Label some more.")  # fmt: skip
            rounds = session.scalar(select(func.max(Job.round)).where(Job.project == project)) or 0
            job = Job(id=secrets.token_hex(8), project=project, open_key=project, state="requested", trigger=asked_by, round=rounds + 1,
                      upto=_newest(session, project), support=[], progress={}, message="waiting for its turn")  # fmt: skip
            session.add(job)
            return job, f"Round {job.round} starts with {labelled} labelled images."

        return self.journal.write(change)

    def new_corrections(self, project: str) -> int:
        """Annotations that count and that no round has seen yet."""
        with self.journal.reading() as session:
            seen = session.scalar(select(func.max(Job.upto)).where(Job.project == project)) or 0
            query = select(func.count()).select_from(Annotation)
            query = query.where(
                Annotation.project == project, Annotation.current, Annotation.counts, Annotation.points > 0
            )
            return session.scalar(query.where(Annotation.id > seen)) or 0

    def start_if_due(self, project: str) -> None:
        """ROUND_EVERY new corrections start a round by themselves."""
        new = self.new_corrections(project)
        if new >= self.settings.round_every and len(self.journal.candidates(project)) >= self.settings.min_train:
            _, said = self.start(project, f"{new} new corrections")
            log.info("project %s: %s", project, said)

    def get(self, job: str) -> Job:
        with self.journal.reading() as session:
            row = session.get(Job, job)
        if row is None:
            raise NotFound(f"There is no job '{job}'.")
        return row

    def open_jobs(self) -> list[str]:
        with self.journal.reading() as session:
            return list(session.scalars(select(Job.id).where(Job.open_key.is_not(None)).order_by(Job.created_at)))

    def latest(self, project: str) -> Job | None:
        with self.journal.reading() as session:
            query = select(Job).where(Job.project == project).order_by(Job.created_at.desc(), Job.round.desc())
            return session.scalars(query.limit(1)).first()

    def cancel(self, job: str) -> Job:
        """End a round without a result. What was served before serves on."""
        row = self.get(job)
        if row.core_job and row.open_key:
            try:
                self.services.core.cancel_round(row.core_job)
            except KptError as error:
                log.warning("round %s: the core did not hear of the cancellation: %s", row.adapter, error.message)
        self._finish(job, "cancelled", "cancelled by a person")
        return self.get(job)

    # ------------------------------------------------------------ one step

    def step(self, job_id: str) -> None:
        """Move a round on as far as it goes now. Passing trouble is noted in its message; any other ends it."""
        job = self.get(job_id)
        try:
            if job.state == "requested":
                self._prepare(job)
            elif job.state == "prepared":
                self._send(job)
            elif job.state == "running":
                self._watch(job)
        except KptError as error:
            if is_passing(error):
                self._update(job_id, message=f"waiting: {error.message}")
            else:
                self._finish(job_id, "failed", error.message)

    def _prepare(self, job: Job) -> None:
        """Take the snapshot: which annotations, which images, who is held out."""
        base = self.services.see_core()
        if self.services.has_token and job.project.isdigit():
            try:
                sweep(self.services, job.project)
            except KptError as error:
                log.warning(
                    "project %s, round %s: what webhooks missed is not known: %s", job.project, job.round, error.message
                )
        with self.journal.reading() as session:
            row = session.get_one(Project, job.project)
            version = session.get(Version, row.active_version) if row.active_version else None
            label_config = row.label_config
            upto = _newest(session, job.project)
            candidates = candidates_of(session, job.project)
        if version is None or version.base != base:
            version = self.journal.observe(job.project, label_config, base)
        config = parse(label_config)
        usable, left_out = self._fetch(job, config, candidates)
        if len(usable) < self.settings.min_train:
            raise InvalidInput(
                f"Only {len(usable)} of {self.settings.min_train} needed labelled images can be used. {_list(left_out)}"
            )

        def change(session: Session) -> dict[str, str]:
            uses = uses_of(session, job.project)
            return uses | decide_uses(session, job.project, usable, uses, everything=True)

        uses = self.journal.write(change)
        heldout = [c for c in usable if uses[c.group] == split.HELDOUT]
        train = [c for c in usable if uses[c.group] == split.TRAIN]
        if len(heldout) < split.MIN_HELDOUT or not train:
            more = split.MIN_HELDOUT - len(heldout)
            raise InvalidInput(f"{len(train)} images to train on and {len(heldout)} to judge by, which were never shown to the model; at "
                               f"least {split.MIN_HELDOUT} must judge. Label {max(more, 1)} more.")  # fmt: skip
        with self.journal.reading() as session:
            order = split.support_order(job.project, train, uses)
            support = [entry for entry, _ in support_entries(session, job.project, config, order, split.MAX_SUPPORT)]
            snapshot = round_body(session, job, config, version, train, heldout, support, self.settings.round_seconds)
        text = json.dumps(snapshot, sort_keys=True)
        used = f"{len(train)} images to train on, {len(heldout)} held out"
        self._update(job.id, "requested", state="prepared", adapter=snapshot["name"], parent=version.id, upto=upto, snapshot=snapshot,
                     snapshot_hash=hashlib.sha256(text.encode()).hexdigest(), support=support, config_hash=config.hash,
                     message=f"{used}. {_list(left_out)}".strip())  # fmt: skip

    def _fetch(
        self, job: Job, config: LabelConfig, candidates: list[split.Candidate]
    ) -> tuple[list[split.Candidate], list[str]]:
        """Make sure that the bytes of every labelled image are known; returns who can be used, and why others cannot.

        Raises passing trouble when it touches so many that the round had better wait.
        """
        usable, left_out, passing = [], [], 0
        for at, candidate in enumerate(candidates, 1):
            try:
                if self._fetch_one(job.project, config, candidate):
                    usable.append(candidate)
                else:
                    left_out.append(f"task {candidate.task}: no image, or no point that the label config knows")
            except KptError as error:
                passing += is_passing(error)
                enough = len(candidates) - len(left_out) - 1 >= self.settings.min_train
                if is_passing(error) and (passing > len(candidates) // 10 or not enough):
                    raise
                log.warning("round %s: task %s is left out: %s", job.round, candidate.task, error.message)
                left_out.append(f"task {candidate.task}: {error.message}")
            if at % 10 == 0:
                self._update(job.id, message=f"fetching images: {at} of {len(candidates)}")
        return usable, left_out

    def _fetch_one(self, project: str, config: LabelConfig, candidate: split.Candidate) -> bool:
        """Whether the annotation has an object on an image whose bytes are known now."""
        with self.journal.reading() as session:
            task = session.get(Task, (project, candidate.task))
            result = session.get_one(Annotation, candidate.row).result
        found = False
        for control in config.controls:
            url = task.images.get(control.image_key) if task else None
            if task and url and read_result(control, result, 1, 1).objects:
                if "sha256" not in task.files.get(url, {}):
                    self.services.image(project, task, url)
                found = True
        return found

    def _send(self, job: Job) -> None:
        """Hand the snapshot to the core, which takes the same one twice for one."""
        assert job.snapshot is not None
        try:
            answer = self.services.core.start_round(job.snapshot, lambda sha: self._bytes(job.project, sha))
        except Conflict:
            # Another round of that name: this journal is younger than the core's data. Take the next free number.
            taken = [str(a.get("name", "")).rpartition("+r") for a in self.services.core.adapters()]
            prefix = str(job.snapshot["name"]).rpartition("+r")[0]
            number = max([int(n) for p, _, n in taken if p == prefix and n.isdigit()] + [job.round]) + 1
            snapshot = job.snapshot | {"name": f"{prefix}+r{number}"}
            self._update(job.id, "prepared", round=number, adapter=snapshot["name"], snapshot=snapshot)
            return
        self._update(job.id, "prepared", state="running", core_job=answer["job"])

    def _bytes(self, project: str, sha: str) -> bytes:
        """An image of the snapshot, fetched again; NotFound when other bytes are there now."""
        with self.journal.reading() as session:
            for task in session.scalars(select(Task).where(Task.project == project)):
                for url, facts in task.files.items():
                    if facts.get("sha256") == sha:
                        found, data = self.services.image(project, task, url)
                        if found == sha:
                            return data
        raise NotFound(f"The image {sha[:12]}… of the snapshot is not to be had any more. Start the round again.")

    def _watch(self, job: Job) -> None:
        try:
            state = self.services.core.round(job.core_job or "")
        except NotFound:  # the core lost its data: send it again
            self._update(job.id, "running", state="prepared", core_job=None)
            return
        progress = {k: state.get(k) for k in ("step", "steps", "loss", "eta_seconds")}
        if state.get("state") in ("queued", "running"):
            self._update(
                job.id,
                "running",
                progress=progress,
                message="training" if state["state"] == "running" else "queued at the core",
            )
        elif state.get("state") == "done" and isinstance(state.get("result"), dict):
            self._conclude(job, state["result"], progress)
        else:
            ended = "cancelled" if state.get("state") == "cancelled" else "failed"
            self._finish(
                job.id, ended, str(state.get("reason") or f"the core reports {state.get('state')!r} and no reason")
            )

    def _conclude(self, job: Job, result: dict[str, Any], progress: dict[str, Any]) -> None:
        """Decide, make the version, move the pointer: one transaction."""
        before, after = result.get("before"), result.get("after")
        snapshot = job.snapshot or {}
        promoted, reason = decide(before, after, int(result.get("heldout_images") or 0))

        def change(session: Session) -> None:
            row = session.get_one(Project, job.project, with_for_update=True)
            current = session.get_one(Job, job.id)
            if current.state in FINISHED:
                return
            parent = session.get_one(Version, job.parent)
            names = list(snapshot["schema"]["names"])
            serves, why = promoted, reason
            if row.config_hash != job.config_hash and not split.adapter_fits(names, row.names):
                serves, why = False, f"Not promoted: the label config's names changed while the round ran. {reason}"
            adapter = {"name": job.adapter, "round": job.round, "names": names, "base": parent.base}
            version = freeze_version(session, job.project, parent, adapter, job.support, job=job.id, reason=why, before=before, after=after,
                                     seconds=result.get("seconds"), promoted=serves)  # fmt: skip
            if serves:
                row.active_version, row.move_to = version.id, version.name
            current.state, current.open_key, current.finished_at = "done", None, time.time()
            current.version, current.promoted, current.message, current.progress = version.name, serves, why, progress

        self.journal.write(change)
        log.info("project %s, round %s: %s", job.project, job.round, self.get(job.id).message)

    def _update(self, job_id: str, only_in: str | None = None, **changes: Any) -> None:
        """Change a job unless it was finished (or left the state `only_in`) meanwhile."""

        def change(session: Session) -> None:
            row = session.get_one(Job, job_id)
            if row.state not in FINISHED and only_in in (None, row.state):
                for name, value in changes.items():
                    setattr(row, name, value)

        self.journal.write(change)

    def _finish(self, job_id: str, state: str, message: str) -> None:
        self._update(job_id, state=state, open_key=None, finished_at=time.time(), message=message)
        log.info("round %s: %s: %s", job_id, state, message)


def _newest(session: Session, project: str) -> int:
    return session.scalar(select(func.max(Annotation.id)).where(Annotation.project == project)) or 0


def _list(left_out: list[str]) -> str:
    return (
        f"Left out: {'; '.join(left_out[:5])}{f' and {len(left_out) - 5} more' if len(left_out) > 5 else ''}."
        if left_out
        else ""
    )
