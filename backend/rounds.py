"""Training rounds: when they start, what they train on, whether their result serves.

    requested ── snapshot taken, images fetched ──> prepared ── sent to the core ──> running ──> done | failed | cancelled

A job is a row of the journal and every step of it may be repeated: the snapshot is stored before it is sent, the core
takes the same round twice for one, and the decision is one transaction. So a kill anywhere loses nothing. `Rounds.step`
is called by the keeper (keeper.py), in one process at a time.

The database allows one unfinished round per project; the core trains one at a time on its device, in the order in which they
came. A round whose starting point no longer serves (it was rolled back, or the core runs another base) is begun anew. Whether
a result serves is said by judges.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, defer

from backend import held_out, shadow, split
from backend.judges import decide
from backend.round_images import image_loader, usable_images
from backend.services import Services, is_passing
from backend.snapshot import round_body
from backend.sweep import sweep
from backend.tables import Annotation, Job, Project, Version
from backend.versions import candidates_of, decide_uses, freeze_version, labelled, serve, support_entries, uses_of
from kptllm_core.errors import Conflict, InvalidInput, KptError, NotFound
from label_config.schema import parse

log = logging.getLogger(__name__)
FINISHED = ("done", "failed", "cancelled")
PATIENCE = 12  # times ROUND_QUIET_SECONDS that a round which is due waits at the most
_LIGHT = (defer(Job.snapshot), defer(Job.support))  # both are large


class Rounds:
    """The rounds of all projects."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.journal, self.settings = services.journal, services.settings
        self._waits: dict[str, tuple[int, float, float]] = {}  # project → newest annotation, since when, due since when

    # ------------------------------------------------------------ asking

    def start(self, project: str, asked_by: str) -> tuple[Job | None, str]:
        """Ask for a round; the unfinished one if there is one. (None, why not) below MIN_TRAIN labelled images."""

        def change(session: Session) -> tuple[Job | None, str]:
            row = session.get(Project, project, with_for_update=True)
            running = session.scalar(select(Job).where(Job.open_key == project))
            if running is not None:
                return running, f"Round {running.round} is not finished yet: {running.message or running.state}."
            images = row.labelled if row else 0
            if row is None or images < self.settings.min_train:
                return None, (f"{images} of {self.settings.min_train} labelled images: too few for a training round. "
                              "Until then predictions come from the support examples alone. Label some more.")  # fmt: skip
            rounds = session.scalar(select(func.max(Job.round)).where(Job.project == project)) or 0
            job = Job(id=secrets.token_hex(8), project=project, open_key=project, state="requested", trigger=asked_by, round=rounds + 1,
                      upto=_newest(session, project), support=[], progress={}, message="waiting for its turn")  # fmt: skip
            session.add(job)
            row.retrain = None
            return job, f"Round {job.round} starts with {images} labelled images."

        return self.journal.write(change)

    def new_corrections(self, project: str) -> int:
        """Annotations that count and that no round has seen yet."""
        with self.journal.reading() as session:
            seen = session.scalar(select(func.max(Job.upto)).where(Job.project == project)) or 0
            query = select(func.count()).select_from(Annotation).where(*labelled(project), Annotation.id > seen)
            return session.scalar(query) or 0

    def start_if_due(self, project: str) -> None:
        """A new base, or ROUND_EVERY new corrections, start a round by themselves: the latter once they have come to rest."""
        with self.journal.reading() as session:
            row = session.get(Project, project)
            unfinished = session.scalar(select(Job.id).where(Job.open_key == project))
            newest = _newest(session, project)
        if row is None or unfinished is not None or row.labelled < self.settings.min_train:
            return
        why = f"the core now runs {row.retrain}" if row.retrain else ""
        new = 0 if why else self.new_corrections(project)
        if new >= self.settings.round_every and self._at_rest(project, newest):
            why = f"{new} new corrections"
        if why and len(self.journal.candidates(project)) >= self.settings.min_train:
            _, said = self.start(project, why)
            self._waits.pop(project, None)
            log.info("project %s: %s: %s", project, why, said)

    def _at_rest(self, project: str, newest: int) -> bool:
        """Whether no correction came for ROUND_QUIET_SECONDS, or whether that was waited for long enough."""
        now, quiet = time.monotonic(), self.settings.round_quiet_seconds
        known, since, due = self._waits.get(project, (-1, now, now))
        if known != newest:
            since = now
        self._waits[project] = newest, since, due
        return now - since >= quiet or now - due >= PATIENCE * quiet

    def get(self, job: str) -> Job:
        """A round, as in `latest` and `history` without its snapshot and its support."""
        with self.journal.reading() as session:
            row = session.get(Job, job, options=_LIGHT)
        if row is None:
            raise NotFound(f"There is no job '{job}'.")
        return row

    def open_jobs(self) -> list[str]:
        with self.journal.reading() as session:
            return list(session.scalars(select(Job.id).where(Job.open_key.is_not(None)).order_by(Job.created_at)))

    def latest(self, project: str) -> Job | None:
        with self.journal.reading() as session:
            query = select(Job).where(Job.project == project).order_by(Job.created_at.desc(), Job.round.desc())
            return session.scalars(query.limit(1).options(*_LIGHT)).first()

    def history(self, project: str) -> list[Job]:
        """Every round of a project, the newest first."""
        with self.journal.reading() as session:
            query = select(Job).where(Job.project == project).order_by(Job.round.desc(), Job.created_at.desc())
            return list(session.scalars(query.options(*_LIGHT)))

    def cancel(self, job: str, why: str = "cancelled by a person") -> Job:
        """End a round without a result. What was served before serves on."""
        row = self.get(job)
        if row.core_job and row.open_key:
            try:
                self.services.core.cancel_round(row.core_job)
            except KptError as error:
                log.warning("round %s: the core did not hear of the cancellation: %s", row.adapter, error.message)
        self._finish(job, "cancelled", why)
        return self.get(job)

    # ------------------------------------------------------------ one step

    def step(self, job_id: str) -> None:
        """Move a round on as far as it goes now. Passing trouble is noted in its message; any other ends it."""
        job = self.get(job_id)
        overtaken = self._overtaken(job)
        if overtaken:
            self.cancel(job_id, f"cancelled: {overtaken}. Another round starts from there.")
            self.start(job.project, overtaken)
            return
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

    def _overtaken(self, job: Job) -> str:
        """Why a round that was prepared is of no use any more: its result would be compared with what no longer serves."""
        with self.journal.reading() as session:
            row = session.get(Project, job.project)
            parent = session.get(Version, job.parent) if job.parent else None
            active = session.get(Version, row.active_version) if row and row.active_version else None
        if job.state in FINISHED or parent is None or active is None:
            return ""
        same = (active.adapter, active.base) == (parent.adapter, parent.base)
        return "" if same else f"{active.name} serves now instead of {parent.name}, which the round started from"

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
        usable, left_out = usable_images(
            self.services, job.project, config, candidates, self.settings.min_train, lambda said: self._update(job.id, message=said)
        )
        if len(usable) < self.settings.min_train:
            raise InvalidInput(
                f"Only {len(usable)} of {self.settings.min_train} needed labelled images can be used. {_list(left_out)}"
            )

        def change(session: Session) -> tuple[dict[str, str], set[int]]:
            uses = uses_of(session, job.project)
            uses |= held_out.hold_out_repeats(session, job.project, usable, uses)
            uses |= decide_uses(session, job.project, usable, uses, everything=True)
            held = held_out.pictures(session, job.project)
            teach = [c for c in usable if uses[c.group] == split.TRAIN]
            return uses, {c.task for c in teach if held_out.shows(session, job.project, c, held)}

        uses, repeats = self.journal.write(change)
        heldout = [c for c in usable if uses[c.group] == split.HELDOUT]
        train = [c for c in usable if uses[c.group] == split.TRAIN and c.task not in repeats]
        left_out += [f"task {task}: it shows the same picture as an image that is held out" for task in sorted(repeats)]
        if len(heldout) < split.MIN_HELDOUT or not train:
            raise InvalidInput(f"{split.too_few(train, heldout)} {_list(left_out)}".strip())
        with self.journal.reading() as session:
            order = split.support_order(job.project, train, uses)
            support = [entry for entry, _ in support_entries(session, job.project, config, order, split.MAX_SUPPORT)]
            snapshot = round_body(session, job, config, version, train, heldout, support, self.settings.round_seconds)
        images = {part: len({item["image"] for item in snapshot[part]}) for part in ("train", "heldout")}
        used = f"{len(train)} images to train on, {len(heldout)} held out"
        self._update(job.id, "requested", state="prepared", adapter=snapshot["name"], parent=version.id, upto=upto, snapshot=snapshot, images=images,
                     snapshot_hash=_hash(snapshot), support=support, config_hash=config.hash,
                     message=f"{used}. {_list(left_out)}".strip())  # fmt: skip

    def _send(self, job: Job) -> None:
        """Hand the snapshot to the core, which takes the same one twice for one."""
        with self.journal.reading() as session:
            snapshot = session.scalar(select(Job.snapshot).where(Job.id == job.id))
        assert snapshot is not None
        try:
            answer = self.services.core.start_round(snapshot, image_loader(self.services, job.project))
        except Conflict as error:
            if error.details.get("code") == "missing_images":  # sent, and forgotten again for those sent later
                count = len({item["image"] for part in ("train", "heldout") for item in snapshot[part]})
                raise InvalidInput(f"The {count} images of this round do not fit the core's image store. Give it more room "
                                   "(CORE_IMAGE_BYTES; of a core that runs elsewhere --images-gb), and start again.") from None  # fmt: skip
            # Another round of that name: this journal is younger than the core's data. Take the next free number.
            taken = [str(a.get("name", "")).rpartition("+r") for a in self.services.core.adapters()]
            prefix = str(snapshot["name"]).rpartition("+r")[0]
            number = max([int(n) for p, _, n in taken if p == prefix and n.isdigit()] + [job.round]) + 1
            snapshot = snapshot | {"name": f"{prefix}+r{number}"}
            self._update(job.id, "prepared", round=number, adapter=snapshot["name"], snapshot=snapshot, snapshot_hash=_hash(snapshot))
            return
        self._update(job.id, "prepared", state="running", core_job=answer["job"])
        if self.get(job.id).state in FINISHED:  # cancelled while it was being sent
            self.services.core.cancel_round(answer["job"])

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
                message="training" if state["state"] == "running" else self._queued(job),
            )
        elif state.get("state") == "done" and isinstance(state.get("result"), dict):
            self._conclude(job, state["result"], progress)
        else:
            ended = "cancelled" if state.get("state") == "cancelled" else "failed"
            self._finish(
                job.id, ended, str(state.get("reason") or f"the core reports {state.get('state')!r} and no reason")
            )

    def _queued(self, job: Job) -> str:
        """The core trains one round at a time."""
        with self.journal.reading() as session:
            query = select(func.count()).select_from(Job).where(Job.state == "running", Job.created_at < job.created_at)
            before = session.scalar(query) or 0
        return f"waits for {before} round{'s' if before > 1 else ''} of other projects" if before else "queued at the core"

    def _conclude(self, job: Job, result: dict[str, Any], progress: dict[str, Any]) -> None:
        """Decide, make the version, move the pointer: one transaction."""
        before, after = result.get("before"), result.get("after")
        promoted, reason = decide(before, after, int(result.get("heldout_images") or 0))

        def change(session: Session) -> None:
            row = session.get_one(Project, job.project, with_for_update=True)
            current = session.get_one(Job, job.id)
            if current.state in FINISHED:
                return
            parent, active = session.get_one(Version, job.parent), session.get_one(Version, row.active_version)
            names = list((current.snapshot or {})["schema"]["names"])
            serves, why = promoted, reason
            if row.config_hash != job.config_hash and not split.adapter_fits(names, row.names):
                serves, why = False, f"Not promoted: the label config's names changed while the round ran. {reason}"
            elif (active.adapter, active.base) != (parent.adapter, parent.base):
                serves, why = False, f"Not promoted: {active.name} serves now, not {parent.name}, the other one here. {reason}"
            elif row.pinned is not None:
                serves, why = False, f"Not promoted: {active.name} is pinned. Without the pin: {reason}"
            adapter = {"name": job.adapter, "round": job.round, "names": names, "base": parent.base}
            version = freeze_version(session, job.project, parent, adapter, current.support, job=job.id, reason=why, before=before, after=after,
                                     seconds=result.get("seconds"), promoted=serves, upto=job.upto)  # fmt: skip
            if serves:
                serve(session, row, version, why)
                shadow.begin(session, row, version, active, self.settings.shadow_images)
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


def _hash(snapshot: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(snapshot, sort_keys=True).encode()).hexdigest()


def _list(left_out: list[str]) -> str:
    return (
        f"Left out: {'; '.join(left_out[:5])}{f' and {len(left_out) - 5} more' if len(left_out) > 5 else ''}."
        if left_out
        else ""
    )
