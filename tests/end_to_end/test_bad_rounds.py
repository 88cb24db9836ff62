"""Bad rounds, with the real model, trainer, core and backend: each of the two judges finds the one that it is there for.

A round on shuffled labels is worse on the held-out images, and does not serve. A round on labels that agree with each other, but
not with what people mean, passes there: the held-out images are labelled in the same way. The next images show it.
"""

from __future__ import annotations

import html
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from backend.demo.samples import render
from backend.journal import Journal
from backend.judges import LOOK_EVERY
from backend.split import TRAIN
from backend.versions import candidates_of, uses_of
from benchmarks import effort
from benchmarks.replay import AT_ONCE, Log, Player, playing
from benchmarks.studio import Studio
from journal_database import journal_url
from kptllm_core.keypoints import symmetric_pairs

pytestmark = pytest.mark.slow
IMAGES = 60  # of which 20 are examples, 12 judge, and 28 are left to be spoilt
FIRST, NEXT = 12, 20  # images before the first round; images after a promotion by which it is judged again
SECONDS, LONGER = 20, 60  # of training; the more of it, the less is left to luck before the judge, who has few images
PATIENCE = 600.0
Json = dict[str, Any]


@contextmanager
def project(folder: Path, model: str, images: int, seconds: int = SECONDS) -> Iterator[Player]:
    """A backend with a project of so many rendered insects; in the same folder it goes on where it was."""
    render(folder / "insects", images, seed=3)
    material = effort.material_of(folder / "insects")
    log = Log(folder / "state" / "replay.jsonl", {})
    settings = {"MODEL": model, "ROUND_SECONDS": str(seconds), "SHADOW_IMAGES": str(NEXT),
                "DATABASE_URL": journal_url(folder / "state" / "backend")}  # fmt: skip
    with (
        Studio(material.title, material.config, [p.path for p in material.pictures]) as studio,
        playing(folder / "state", studio, material.pictures, 0.05, log, settings) as player,
    ):
        yield player


def label(player: Player, images: int) -> None:
    for _ in range(images):
        player.label()


def status(player: Player) -> Json:
    return player._call("GET", "/projects/1/status")


def test_a_round_on_shuffled_labels_is_not_promoted(tmp_path: Path, tiny_model: str) -> None:
    with project(tmp_path, tiny_model, IMAGES) as player:
        label(player, IMAGES)
        good = player.train(0, lambda _job: None)
        assert good["promoted"], good["reason"]
        assert status(player)["model_version"] == good["version"]

        rng = random.Random(3)
        shuffled = taught(tmp_path / "state" / "backend") - set(status(player)["support"])
        assert len(shuffled) > 10
        tell_renamed(player, shuffled, lambda names: dict(zip(names, rng.sample(names, len(names)), strict=True)))
        assert status(player)["model_version"] == good["version"], "the examples are as they were"

        bad = player.train(1, lambda _job: None)
        assert bad["promoted"] is False, bad["reason"]
        assert bad["reason"].startswith("Not promoted: worse"), bad["reason"]
        assert bad["train_images"] + bad["heldout_images"] == IMAGES
        assert status(player)["model_version"] == good["version"]
        (prediction,) = player.predict([0])
        assert prediction["model_version"] == good["version"]


def test_a_version_that_passes_the_held_out_judge_and_is_worse_on_the_next_images_is_rolled_back(tmp_path: Path, tiny_model: str) -> None:
    """Somebody goes over all labels and takes left and right as a viewer sees them; then the others go on as before."""
    images = FIRST + 2 * NEXT
    with project(tmp_path, tiny_model, images) as player:
        label(player, FIRST)
        good = player.train(0, lambda _job: None)
        assert good["promoted"], good["reason"]
        correct(player, FIRST, NEXT)
        assert judged(player)["state"] == "kept", judged(player)["reason"]

        label(player, FIRST + NEXT - player.labelled())
    with project(tmp_path, tiny_model, images, LONGER) as player:
        tell_renamed(player, set(range(1, FIRST + NEXT + 1)), mirrored)
        for number in (1, 2, 3):
            bad = player.train(number, lambda _job: None)
            if bad["promoted"]:
                break
        assert bad["reason"].startswith("Promoted: better"), bad["reason"]
        assert status(player)["model_version"] == bad["version"]
        assert status(player)["comparison"]["previous"] == good["version"]

        correct(player, FIRST + NEXT, NEXT)
        comparison = judged(player)
        assert (comparison["state"], comparison["version"], comparison["previous"]) == ("rolled_back", bad["version"], good["version"])
        assert comparison["reason"].startswith(f"Rolled back to {good['version']}, which was better on the same"), comparison["reason"]
        assert comparison["figures"]["error"]["version"] > comparison["figures"]["error"]["previous"]

        # Programs, the page, and whoever opens the next task are told the same.
        assert status(player)["model_version"] == good["version"]
        versions = player._call("GET", "/projects/1/versions")
        assert versions["versions"][0] == good["version"]
        told = next(v for v in versions["details"] if v["model_version"] == bad["version"])
        assert not told["promoted"]
        assert told["reason"].startswith("Promoted: better")
        assert told["reason"].endswith(comparison["reason"])
        page = requests.get(f"{player.url}/projects/1/view/versions", timeout=60)
        page.raise_for_status()
        assert html.escape(comparison["reason"]) in page.text
        (prediction,) = player.predict([0])
        assert prediction["model_version"] == good["version"]


def mirrored(names: list[str]) -> dict[str, str]:
    """Each name → the one on the other side."""
    pairs = [(names[a], names[b]) for a, b in symmetric_pairs(tuple(names))]
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


def judged(player: Player) -> Json:
    """The comparison of the version that was promoted last with the one before."""
    return dict(player._call("GET", "/projects/1/comparisons")["comparisons"][0])


def correct(player: Player, after: int, images: int) -> None:
    """The next images, ten at a time: so often the version that was promoted last is compared with the one before."""
    while player.labelled() < after + images and judged(player)["state"] == "running":
        for _ in range(LOOK_EVERY // AT_ONCE):
            player.predict_and_correct(after + images)
        end = time.monotonic() + PATIENCE
        while (found := judged(player))["state"] == "running" and (found["figures"] or {}).get("images", 0) < player.labelled() - after:
            assert time.monotonic() < end, f"{found} {player.service.log_end()}"
            time.sleep(0.5)


def taught(data: Path) -> set[int]:
    """The tasks that rounds train on."""
    opened = Journal(journal_url(data))
    with opened.reading() as session:
        uses = uses_of(session, "1")
        tasks = {c.task for c in candidates_of(session, "1") if uses[c.group] == TRAIN}
    opened.close()
    return tasks


def tell_renamed(player: Player, tasks: set[int], rename: Callable[[list[str]], dict[str, str]]) -> None:
    """The same places under other names: `rename` says for a label's names which become which."""
    for task in sorted(tasks):
        changed = json.loads(json.dumps(player.log.of("image")[task - 1]["annotation"]))
        points = [r["value"] for r in changed["result"] if r["type"] == "keypointlabels"]
        new = rename([name for value in points for name in value["keypointlabels"]])
        for value in points:
            value["keypointlabels"] = [new.get(name, name) for name in value["keypointlabels"]]
        changed["updated_at"] = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        player.studio.store(changed)
        player._tell(changed)
