"""Trainer, backend and core are killed with -9 at random moments while a project is replayed: no acknowledged annotation is lost.

The backend has no token here, so nothing but the webhooks tells it of annotations: no sweep could repair what was lost.
"""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from backend.demo.samples import render
from backend.journal import Journal
from backend.tables import Annotation
from benchmarks import effort
from benchmarks.replay import Log, Player, playing
from benchmarks.studio import Studio
from journal_database import journal_url

pytestmark = pytest.mark.slow
VICTIMS = {"trainer": "kptllm_core.trainer", "backend": "gunicorn", "core": "kptllm_core serve"}
IMAGES, ROUNDS = 24, [12, 18]


class Killer(threading.Thread):
    """Kills processes below `supervisor` with -9, all of a kind at once: trainer and core each time after a random pause."""

    def __init__(self, supervisor: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.supervisor, self.rng = psutil.Process(supervisor), random.Random(seed)
        self.killed: dict[str, int] = dict.fromkeys(VICTIMS, 0)
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(self.rng.uniform(0.5, 5.0)):
            # A trainer that dies a fourth time in one round is given up, as it should be.
            for name, most in (("trainer", 3), ("core", 1)):
                if self.killed[name] < most and self.rng.random() < 0.7 and self.kill(name):
                    break

    def kill(self, name: str) -> bool:
        """Whether there was one."""
        alive = []
        for process in self.supervisor.children(recursive=True):
            try:
                if VICTIMS[name] in " ".join(process.cmdline()):
                    process.kill()
                    alive.append(process)
            except psutil.NoSuchProcess:
                continue
        self.killed[name] += bool(alive)
        return bool(alive)


@pytest.mark.parametrize("seed", [1])
def test_no_acknowledged_annotation_is_lost(tmp_path: Path, tiny_model: str, seed: int) -> None:
    render(tmp_path / "insects", IMAGES, seed=3)
    material = effort.material_of(tmp_path / "insects")
    folder = tmp_path / "state"
    log = Log(folder / "replay.jsonl", {"seed": seed})
    settings = {"MODEL": tiny_model, "ROUND_SECONDS": "6", "LABEL_STUDIO_API_KEY": "", "DATABASE_URL": journal_url(folder / "backend")}
    acknowledged: list[dict[str, Any]] = []
    with (
        Studio(material.title, material.config, [p.path for p in material.pictures]) as studio,
        playing(folder, studio, material.pictures, 0.05, log, settings) as player,
    ):
        assert player.service.process is not None
        killer = Killer(player.service.process.pid, seed)
        fatal = set(killer.rng.sample(range(IMAGES), 4))
        tell = player._tell

        def told(annotation: dict[str, Any]) -> None:
            """Some webhooks meet a backend that dies while it answers, or just before, or just after."""
            if len(acknowledged) in fatal:
                threading.Timer(killer.rng.uniform(0.0, 0.03), killer.kill, ["backend"]).start()
            tell(annotation)
            acknowledged.append(annotation)

        player._tell = told  # type: ignore[method-assign]
        killer.start()
        try:
            effort.play(player, 5, ROUNDS)
            revised = revise(player, material.pictures[0].path.name, log)
        finally:
            killer.done.set()
            killer.join()
        rounds = log.of("round")
    assert killer.killed["trainer"] >= 1
    assert killer.killed["backend"] >= 1
    assert len(acknowledged) == IMAGES + 1
    assert [r["images"] for r in rounds] == ROUNDS, "every round came to its end"

    latest = {a["id"]: a for a in acknowledged}
    assert latest[revised]["result"] != log.of("image")[0]["annotation"]["result"]
    journal = Journal(journal_url(folder / "backend"))
    with journal.reading() as session:
        kept = {a.annotation: a for a in session.scalars(select(Annotation).where(Annotation.current))}
        assert set(kept) == set(latest)
        for number, annotation in latest.items():
            assert json.dumps(kept[number].result, sort_keys=True) == json.dumps(annotation["result"], sort_keys=True)
            assert kept[number].counts
            assert not kept[number].deleted
    journal.close()


def revise(player: Player, name: str, log: Log) -> int:
    """A person changes the first annotation: the newer one must be the one that stays."""
    line = log.of("image")[0]
    assert line["file"] == name
    changed = json.loads(json.dumps(line["annotation"]))
    changed["result"][0]["value"]["x"] /= 2
    changed["updated_at"] = time.strftime("%Y-%m-%dT%H:%M:%S.999999Z", time.gmtime())
    player.studio.store(changed)
    player._tell(changed)
    return int(changed["id"])
