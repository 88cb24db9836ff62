"""The journal's tables. What they mean stands here; what happens to them, in journal.py.

    projects ──< tasks ──< annotations (all that was ever said, one row per saying)
       │ └─< groups        what a group of images is used for: training or judging; decided once
       ├─< versions        every model_version that was ever served or refused, with its figures
       ├─< predictions     what a version predicted for a task: shown to a person, or made in the shadow
       ├─< looks           a perceptual hash of each task's image, so that near-duplicates are told
       ├─< comparisons     a promoted version against the one before it, on the same next images
       ├─< jobs            rounds: asked for, running, finished
       └─< events          what arrived, in order
    facts, leases          single values shared by all processes

Times named `*_at` are seconds since 1970 (wall clock, to be shown); nothing decides by them. `updated_us` is Label
Studio's own `updated_at` in microseconds. New columns and tables may be added (migrate.py adds them to older journals);
none here is derived from another file, so that the journal alone is enough to rebuild everything that is served.

Before and after are told by annotations.id, which grows with every saying: `versions.upto` is the newest one that a version
may have learned from, `predictions.known` the newest one there was when a prediction was made.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

BigKey = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up by itself only for its INTEGER


class Base(DeclarativeBase):
    """The journal's schema."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012 - SQLAlchemy's own form


class Project(Base):
    """A Label Studio project and what serves it."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    title: Mapped[str] = mapped_column(Text, default="")
    label_config: Mapped[str] = mapped_column(Text, default="")
    config_hash: Mapped[str] = mapped_column(String(64), default="")
    names: Mapped[dict[str, Any]] = mapped_column(default=dict)  # control → names of its points, in order
    # control → {name: annotations.id}: added to the config later; what was said until then does not speak of that point
    names_since: Mapped[dict[str, Any]] = mapped_column(default=dict)
    active_version: Mapped[int | None] = mapped_column(BigInteger)  # versions.id; the one pointer to what serves
    labelled: Mapped[int] = mapped_column(Integer, default=0)  # images with at least one point by a person
    step: Mapped[int] = mapped_column(Integer, default=0)  # the largest of 1, 2, 5, 10 that `labelled` has reached
    move_to: Mapped[str | None] = mapped_column(Text)  # Label Studio is still to be moved to this version
    pinned: Mapped[int | None] = mapped_column(BigInteger)  # versions.id that a person pinned; nothing replaces it by itself
    retrain: Mapped[str | None] = mapped_column(Text)  # the base that a round is due for, since the core changed to it
    sweep_due: Mapped[bool] = mapped_column(Boolean, default=True)  # something was missed; do not wait for the minute
    swept_at: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)


class Task(Base):
    """A task's images: where they are and, once they were fetched, which bytes they are."""

    __tablename__ = "tasks"
    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    task: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    group: Mapped[str] = mapped_column(
        "group_name", Text
    )  # images of one group are never split between training and judging
    images: Mapped[dict[str, Any]] = mapped_column(default=dict)  # key in the task's data → URL
    files: Mapped[dict[str, Any]] = mapped_column(default=dict)  # URL → {"sha256", "width", "height"} or {"error"}
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)


class Group(Base):
    """The use of a group, decided once: `train` (support examples, too) or `heldout` (only ever judges)."""

    __tablename__ = "groups"
    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    group: Mapped[str] = mapped_column("group_name", String(300), primary_key=True)
    use: Mapped[str] = mapped_column("used_for", String(16))


class Annotation(Base):
    """One state of one annotation. Rows are only added; `current` marks the newest state of each annotation."""

    __tablename__ = "annotations"
    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    annotation: Mapped[int] = mapped_column(BigInteger)
    task: Mapped[int] = mapped_column(BigInteger)
    updated_us: Mapped[int] = mapped_column(BigInteger)
    result_hash: Mapped[str] = mapped_column(String(64))
    result: Mapped[list[Any]] = mapped_column(default=list)
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)  # control → {label: how often}
    points: Mapped[int] = mapped_column(Integer, default=0)  # points whose label the present config knows
    fits: Mapped[bool] = mapped_column(Boolean, default=False)  # it knows every label; False also where nobody looked yet
    origins: Mapped[dict[str, Any]] = mapped_column(
        default=dict
    )  # manual | prediction | prediction-changed | unknown → how often
    counts: Mapped[bool] = mapped_column(Boolean, default=True)  # made or confirmed by a person
    why_not: Mapped[str] = mapped_column(Text, default="")
    ground_truth: Mapped[bool] = mapped_column(Boolean, default=False)
    completed_by: Mapped[str] = mapped_column(Text, default="")
    lead_time: Mapped[float | None] = mapped_column(Float)
    parent_prediction: Mapped[int | None] = mapped_column(BigInteger)
    parent_annotation: Mapped[int | None] = mapped_column(BigInteger)  # it began as a copy of that one
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)  # a tombstone; it ends this annotation's history
    current: Mapped[bool] = mapped_column(Boolean, default=True)
    received_at: Mapped[float] = mapped_column(Float, default=time.time)
    __table_args__ = (
        UniqueConstraint("project", "annotation", "updated_us", "result_hash", name="one_saying"),
        Index("current_annotations", "project", "current", "task", "counts", "deleted", "points"),
        Index("newest_states", "project", "annotation", "current"),
    )


# Few, and looked for with every look at the project's page (fitting.py).
Index("misfit_annotations", Annotation.project, Annotation.current, Annotation.fits,
      sqlite_where=~Annotation.fits, postgresql_where=~Annotation.fits)  # fmt: skip


class Version(Base):
    """A model_version: base + adapter of a round + frozen support set."""

    __tablename__ = "versions"
    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(Text)
    base: Mapped[str] = mapped_column(Text)
    round: Mapped[int] = mapped_column(Integer, default=0)
    adapter: Mapped[str | None] = mapped_column(Text)
    trained_names: Mapped[list[Any]] = mapped_column(default=list)  # names that the adapter learned
    support: Mapped[list[Any]] = mapped_column(default=list)  # see split.support_example
    config_hash: Mapped[str] = mapped_column(String(64), default="")
    parent: Mapped[str | None] = mapped_column(Text)  # name of the version that served when this one was made
    job: Mapped[str | None] = mapped_column(String(40))
    promoted: Mapped[bool] = mapped_column(Boolean, default=False)
    reason: Mapped[str] = mapped_column(Text, default="")
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    seconds: Mapped[float | None] = mapped_column(Float)
    upto: Mapped[int] = mapped_column(BigInteger, default=0)  # annotations.id up to which it may have learned
    pruned: Mapped[bool] = mapped_column(Boolean, default=False)  # its adapter was deleted (prune.py); it cannot serve
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    __table_args__ = (UniqueConstraint("project", "name", name="one_version"),)


class Predicted(Base):
    """What a version predicted for a task. `shadow`: nobody was shown it; it was made to judge the version."""

    __tablename__ = "predictions"
    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    task: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[int] = mapped_column(BigInteger)  # versions.id
    shadow: Mapped[bool] = mapped_column(Boolean, default=False)
    withheld: Mapped[bool] = mapped_column(Boolean, default=False)  # served empty, to see what people do without (anchoring.py)
    known: Mapped[int] = mapped_column(BigInteger, default=0)  # annotations.id, the newest when it was made
    # control → {"size": [w, h], "boxes": [[x, y, w, h]…] handed to the model, "objects": [keypoint set as JSON…], "scores":
    # [that each is there], "drawn": [{name: region id}…] per object}, in pixels (served.control_row). None: asked for, not made yet
    controls: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    score: Mapped[float] = mapped_column(Float, default=0.0)  # as Label Studio is told
    error: Mapped[str] = mapped_column(Text, default="")  # why it could not be made
    judged: Mapped[int | None] = mapped_column(BigInteger)  # annotations.id that `figures` are measured against
    figures: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # see prequential.measure
    made_at: Mapped[float] = mapped_column(Float, default=time.time)
    __table_args__ = (
        UniqueConstraint("project", "task", "version", name="one_prediction"),
        # The version first: SQLite, which knows no sizes, would else take this one by chance for what "predictions_made" answers.
        Index("predictions_by_version", "version", "project", "shadow"),
    )


# A project may have half a million predictions of some kilobytes each. What is asked again and again is answered from these alone.
_made, _open = Predicted.controls.is_not(None), Predicted.controls.is_(None)
Index("predictions_made", Predicted.project, Predicted.task, Predicted.version, Predicted.score, Predicted.made_at,
      sqlite_where=_made, postgresql_where=_made)  # fmt: skip
Index("predictions_open", Predicted.project, Predicted.error, sqlite_where=_open, postgresql_where=_open)
_judged = Predicted.judged.is_not(None)
Index("predictions_judged", Predicted.project, Predicted.task, Predicted.judged, sqlite_where=_judged, postgresql_where=_judged)


class Look(Base):
    """What a task's image looks like (lookalikes.py): of unlabelled tasks, too, so that near-duplicates are told."""

    __tablename__ = "looks"
    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    task: Mapped[int] = mapped_column(BigInteger)
    look: Mapped[str] = mapped_column(String(64))  # 256 bits in hex
    # Ids are never given out twice, so that whoever has read up to one finds all that is new.
    __table_args__ = (UniqueConstraint("project", "task", name="one_look"), {"sqlite_autoincrement": True})


class Comparison(Base):
    """A promoted version against the one that served before it, on the images that people label next (shadow.py)."""

    __tablename__ = "comparisons"
    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    version: Mapped[int] = mapped_column(BigInteger)  # versions.id of the promoted one
    previous: Mapped[int] = mapped_column(BigInteger)  # versions.id
    state: Mapped[str] = mapped_column(String(16), default="running")  # running | kept | rolled_back | ended
    upto: Mapped[int] = mapped_column(BigInteger, default=0)  # annotations.id at the promotion; later images count
    looks: Mapped[int] = mapped_column(Integer, default=0)  # how often it was looked at so far
    figures: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # of the last look
    reason: Mapped[str] = mapped_column(Text, default="")
    started_at: Mapped[float] = mapped_column(Float, default=time.time)
    ended_at: Mapped[float | None] = mapped_column(Float)


class Job(Base):
    """A round. `open_key` holds the project while it is unfinished: the database itself allows one per project."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    open_key: Mapped[str | None] = mapped_column(String(64), unique=True)
    state: Mapped[str] = mapped_column(String(16))  # requested | prepared | running | done | failed | cancelled
    trigger: Mapped[str] = mapped_column("asked_by", Text, default="")
    round: Mapped[int] = mapped_column(Integer)
    adapter: Mapped[str | None] = mapped_column(Text)
    parent: Mapped[int | None] = mapped_column(BigInteger)  # versions.id that served when the snapshot was taken
    upto: Mapped[int] = mapped_column(BigInteger, default=0)  # annotations.id up to which it knows corrections
    snapshot: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # the body that is sent to the core
    snapshot_hash: Mapped[str] = mapped_column(String(64), default="")
    images: Mapped[dict[str, Any]] = mapped_column(default=dict)  # how many it has: {"train", "heldout"}
    support: Mapped[list[Any]] = mapped_column(default=list)
    config_hash: Mapped[str] = mapped_column(String(64), default="")
    core_job: Mapped[str | None] = mapped_column(Text)
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)  # step, steps, loss, eta_seconds
    message: Mapped[str] = mapped_column(Text, default="")  # what it is doing, or why it ended as it did
    version: Mapped[str | None] = mapped_column(Text)
    promoted: Mapped[bool | None] = mapped_column(Boolean)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    finished_at: Mapped[float | None] = mapped_column(Float)


class Event(Base):
    """Something that arrived: a webhook, a sweep's finding, a person's click. Annotations are stored in their own table."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(BigKey, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    action: Mapped[str] = mapped_column(Text)
    about: Mapped[dict[str, Any]] = mapped_column(default=dict)
    received_at: Mapped[float] = mapped_column(Float, default=time.time)


class Fact(Base):
    """A single value that all processes share: the core's base, the health of Label Studio, …"""

    __tablename__ = "facts"
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Lease(Base):
    """Who does a work that only one process may do. `beat` grows while the owner lives (see keeper.py)."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    beat: Mapped[int] = mapped_column(BigInteger, default=0)


class Prelabel(Base):
    """Predictions that the backend itself posts to Label Studio (prelabel.py). `open_key`: one unfinished run per project and kind."""

    __tablename__ = "prelabels"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # unlabelled: what a person asked for | again: what an outage left empty
    open_key: Mapped[str | None] = mapped_column(String(100), unique=True)
    state: Mapped[str] = mapped_column(String(16))  # running | done | failed | cancelled
    replace: Mapped[bool] = mapped_column("replace_older", Boolean, default=False)
    listed: Mapped[bool] = mapped_column(Boolean, default=False)  # all its tasks are known
    cursor: Mapped[int] = mapped_column("listed_upto", BigInteger, default=0)  # the last task that was listed
    per_second: Mapped[float | None] = mapped_column(Float)  # tasks, as measured lately
    asked_by: Mapped[str] = mapped_column(Text, default="")
    message: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    finished_at: Mapped[float | None] = mapped_column(Float)


class PrelabelTask(Base):
    """One task of such a run."""

    __tablename__ = "prelabel_tasks"
    run: Mapped[str] = mapped_column(String(40), primary_key=True)
    task: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    # waiting | posting (it may have arrived) | posted | there (had one already) | labelled | gone | failed
    state: Mapped[str] = mapped_column(String(16), default="waiting")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    version: Mapped[str | None] = mapped_column(Text)  # model_version of its prediction
    prediction: Mapped[int | None] = mapped_column(BigInteger)  # Label Studio's id of it
    message: Mapped[str] = mapped_column(Text, default="")
    __table_args__ = (Index("prelabel_states", "run", "state"),)
