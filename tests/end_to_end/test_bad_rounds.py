"""A round on shuffled labels, with the real model, trainer and core: it ends, it is judged, and it does not serve.

The other judge, which rolls a promoted version back that is worse on the next images, is tested in test_shadow.py.
"""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backend.demo.samples import render
from backend.journal import Journal
from backend.split import TRAIN
from backend.versions import candidates_of, uses_of
from benchmarks import effort
from benchmarks.replay import Log, Player, playing
from benchmarks.studio import Studio

pytestmark = pytest.mark.slow
IMAGES = 32
SECONDS = 20
Json = dict[str, Any]


def test_a_round_on_shuffled_labels_is_not_promoted(tmp_path: Path, tiny_model: str) -> None:
    render(tmp_path / "insects", IMAGES, seed=3)
    material = effort.material_of(tmp_path / "insects")
    log = Log(tmp_path / "state" / "replay.jsonl", {})
    settings = {"MODEL": tiny_model, "ROUND_SECONDS": str(SECONDS)}
    with (
        Studio(material.title, material.config, [p.path for p in material.pictures]) as studio,
        playing(tmp_path / "state", studio, material.pictures, 0.05, log, settings) as player,
    ):
        for _ in range(IMAGES):
            player.label()
        good = player.train(0, lambda _job: None)
        assert good["promoted"], good["reason"]
        status = player._call("GET", "/projects/1/status")
        assert status["model_version"] == good["version"]

        shuffled = taught(tmp_path / "state" / "backend" / "journal.db") - set(status["support"])
        assert len(shuffled) > 10
        for task in shuffled:
            tell_shuffled(player, log.of("image")[task - 1]["annotation"])
        assert player._call("GET", "/projects/1/status")["model_version"] == good["version"], "the examples are as they were"

        bad = player.train(1, lambda _job: None)
        assert bad["promoted"] is False, bad["reason"]
        assert bad["reason"].startswith("Not promoted: worse"), bad["reason"]
        assert bad["train_images"] + bad["heldout_images"] == IMAGES
        status = player._call("GET", "/projects/1/status")
        assert status["model_version"] == good["version"]
        (prediction,) = player.predict([0])
        assert prediction["model_version"] == good["version"]


def taught(journal: Path) -> set[int]:
    """The tasks that rounds train on."""
    opened = Journal(f"sqlite:///{journal}")
    with opened.reading() as session:
        uses = uses_of(session, "1")
        tasks = {c.task for c in candidates_of(session, "1") if uses[c.group] == TRAIN}
    opened.close()
    return tasks


def tell_shuffled(player: Player, annotation: Json) -> None:
    """The same places under each other's names, otherwise in each image."""
    changed = json.loads(json.dumps(annotation))
    points = [r for r in changed["result"] if r["type"] == "keypointlabels"]
    labels = [r["value"]["keypointlabels"] for r in points]
    random.Random(annotation["task"]).shuffle(labels)
    for region, label in zip(points, labels, strict=True):
        region["value"]["keypointlabels"] = label
    changed["updated_at"] = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    player.studio.store(changed)
    player._tell(changed)
