"""The queue with small real trainers: shell-size Python programs that keep the trainer's contract with files and exit codes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kptllm_core import jobs
from kptllm_core.errors import ArtifactError, Conflict, DataError, NotFound
from kptllm_core.jobs import PARTS, JobQueue
from kptllm_core.messages import RoundRequest
from kptllm_core.store import AdapterStore, ImageStore, write_json

FINISH = """
(run / "adapter").mkdir(exist_ok=True)
(run / "adapter" / "config.json").write_text('{"base": "tiny-00000000"}')
(run / "result.json").write_text(json.dumps({"adapter": json.loads((run / "run.json").read_text())["name"]}))
"""
SLEEP = "(run / 'progress.json').write_text('{\"phase\": \"training\", \"step\": 3, \"steps\": 9}'); time.sleep(60)"
COUNT = "with open(run / 'starts', 'a') as f: f.write('x')\nstarts = len((run / 'starts').read_text())\n"


def program(body: str) -> Callable[[Path], list[str]]:
    code = f"import json, os, signal, sys, time\nfrom pathlib import Path\nrun = Path(sys.argv[1])\n{COUNT}\n{body}"
    return lambda folder: [sys.executable, "-S", "-c", code, str(folder)]


class Core:
    """Stores and queue on one folder, as a core process has them."""

    def __init__(self, folder: Path, body: str, **options: float) -> None:
        self.images = ImageStore(folder / "images")
        self.adapters = AdapterStore(folder / "adapters")
        self.queue = JobQueue(folder / "rounds", self.images, self.adapters, command=program(body), **options)  # type: ignore[arg-type]

    def ask(self, name: str, images: str = "ab", parent: str | None = None, seed: int = 0) -> RoundRequest:
        def labelled(letter: str) -> dict[str, object]:
            data = letter.encode()
            self.images.put(sha256(data).hexdigest(), data)
            return {"image": sha256(data).hexdigest(), "keypoints": {"names": ["tip"], "xy": [[1, 2]], "visibility": [2]}}

        return RoundRequest.from_json({"name": name, "schema": {"names": ["tip"]}, "parent": parent, "seconds": 5, "seed": seed,
                                       "train": [labelled(images[0])], "heldout": [labelled(images[1])]})  # fmt: skip

    def submit(self, name: str, **options: object) -> str:
        return self.queue.submit(self.ask(name, **options), "tiny-00000000", "tiny", "cpu").id  # type: ignore[arg-type]

    def wait(self, job: str, *states: str, seconds: float = 15) -> dict[str, object]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.queue.get(job).to_json()
            if found["state"] in states:
                return found
            time.sleep(0.02)
        raise AssertionError(f"still {found}")


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Callable[..., Core]]:
    made: list[Core] = []

    def make(body: str, **options: float) -> Core:
        made.append(Core(tmp_path, body, **options))
        return made[-1]

    yield make
    for each in made:
        each.queue.stop()


def started(core: Core, job: str, count: int = 1) -> None:
    path = core.queue.get(job).folder / "starts"
    end = time.monotonic() + 10
    while not path.exists() or path.stat().st_size < count:
        assert time.monotonic() < end, "the trainer did not start"
        time.sleep(0.02)


def test_a_round_goes_from_the_queue_to_a_published_adapter(core: Callable[..., Core]) -> None:
    it = core(FINISH)
    job = it.submit("a+r1")
    assert it.queue.get(job).to_json()["state"] == "queued" and it.queue.queued == 1 and it.queue.running is None
    asked = it.queue.get(job).images()
    it.queue.start()
    done = it.wait(job, "done")
    assert done["result"] == {"adapter": "a+r1"} and done["reason"] is None
    assert "a+r1" in it.adapters and it.queue.queued == 0 and it.queue.running is None
    folder = it.queue.get(job).folder
    assert {p.name for part in PARTS for p in (folder / part / "images").iterdir()} == asked


def test_a_published_adapter_is_no_failed_round_though_the_disk_refuses_to_note_its_end(
    core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = core(FINISH)
    job = it.submit("a+r1")

    def write(path: Path, data: dict[str, Any]) -> None:
        if data["state"] == "done":
            raise DataError("no space left on device")
        write_json(path, data)

    monkeypatch.setattr(jobs, "write_json", write)
    it.queue.start()
    assert it.wait(job, "done")["result"] == {"adapter": "a+r1"}
    assert "a+r1" in it.adapters


def test_the_same_request_is_one_job_and_a_name_has_one_owner(core: Callable[..., Core]) -> None:
    it = core(FINISH)
    job = it.submit("a+r1")
    assert it.submit("a+r1") == job
    with pytest.raises(Conflict, match="belongs to round"):
        it.submit("a+r1", seed=1)
    it.queue.start()
    it.wait(job, "done")
    assert it.submit("a+r1") == job
    with pytest.raises(Conflict, match="belongs to round"):
        it.submit("a+r1", seed=1)
    with pytest.raises(ArtifactError, match="'b' is not here"):
        it.submit("a+r2", parent="b")
    it.queue.delete_adapter("a+r1")
    assert it.submit("a+r1", seed=1) != job
    with pytest.raises(NotFound):
        it.queue.get("nonsense")


def test_images_of_unfinished_rounds_stay_and_a_missing_one_leaves_no_job(core: Callable[..., Core], tmp_path: Path) -> None:
    it = core(SLEEP)
    job = it.submit("a")
    asked = it.queue.get(job).images()
    it.images.max_bytes = 1
    request = it.ask("b", images="xy")
    assert not it.images.missing(asked), "evicted though a round needs it"
    assert it.images.missing(request.images())
    with pytest.raises(NotFound, match="not in the core's store"):
        it.queue.submit(request, "tiny-00000000", "tiny", "cpu")
    assert [p.name for p in (tmp_path / "rounds").iterdir()] == [job]
    it.queue.cancel(job)
    assert it.images.missing(asked), "free to go once the round is over"


def test_a_killed_trainer_is_started_again_three_times(core: Callable[..., Core]) -> None:
    it = core("if starts < 4: os.kill(os.getpid(), signal.SIGKILL)\n" + FINISH)
    it.queue.start()
    assert it.wait(it.submit("a"), "done", "failed")["state"] == "done"


def test_a_trainer_that_always_dies_fails_with_the_reason(core: Callable[..., Core]) -> None:
    it = core("os.kill(os.getpid(), signal.SIGKILL)")
    it.queue.start()
    job = it.submit("a")
    failed = it.wait(job, "failed")
    assert "died 4 times" in str(failed["reason"]) and "SIGKILL" in str(failed["reason"])
    assert (it.queue.get(job).folder / "starts").stat().st_size == 4
    assert it.submit("a") == job, "the same request is answered with what became of it"
    assert it.submit("a", seed=1) != job, "and another one may use the name"


def test_a_trainer_that_gives_up_says_why_and_is_not_tried_again(core: Callable[..., Core]) -> None:
    it = core("(run / 'failure.json').write_text('{\"message\": \"The loss became NaN.\"}'); sys.exit(1)")
    it.queue.start()
    job = it.submit("a")
    assert it.wait(job, "failed")["reason"] == "The loss became NaN."
    assert (it.queue.get(job).folder / "starts").stat().st_size == 1


def test_an_exit_without_a_result_is_a_failure(core: Callable[..., Core]) -> None:
    it = core("pass")
    it.queue.start()
    assert "without a result" in str(it.wait(it.submit("a"), "failed")["reason"])


def test_rounds_run_one_after_the_other_and_can_be_cancelled(core: Callable[..., Core]) -> None:
    it = core(SLEEP)
    it.queue.start()
    first, second = it.submit("a"), it.submit("b")
    started(it, first)
    running = it.wait(first, "running")
    assert it.queue.running == first and it.queue.queued == 1
    end = time.monotonic() + 5
    while running["step"] != 3 and time.monotonic() < end:
        running = it.queue.get(first).to_json()
    assert (running["step"], running["steps"], running["phase"]) == (3, 9, "training")
    it.queue.cancel(second)
    assert it.wait(second, "cancelled")["reason"] == "Cancelled before it began."
    it.queue.cancel(first)
    it.wait(first, "cancelled")
    assert it.queue.cancel(first).state == "cancelled"
    assert not (it.queue.get(second).folder / "starts").exists()


def test_a_trainer_that_ignores_sigterm_is_killed_with_its_children(core: Callable[..., Core]) -> None:
    it = core("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
              "pid = os.fork() or (time.sleep(60), os._exit(0))\n(run / 'child').write_text(str(pid))\n" + SLEEP, grace=0.3)  # fmt: skip
    it.queue.start()
    job = it.submit("a")
    started(it, job)
    child = it.queue.get(job).folder / "child"
    while not child.exists() or not child.read_text():
        time.sleep(0.02)
    it.queue.cancel(job)
    it.wait(job, "cancelled")
    assert not alive(int(child.read_text()))


def test_a_trainer_that_hangs_is_taken_for_dead(core: Callable[..., Core]) -> None:
    it = core("if starts == 1: os.kill(os.getpid(), signal.SIGSTOP)\n" + FINISH, hung=0.5)
    it.queue.start()
    job = it.submit("a")
    it.wait(job, "done")
    assert it.queue.get(job).accidents == 1


def test_stopping_keeps_the_round_for_the_next_start(core: Callable[..., Core]) -> None:
    it = core("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n" + SLEEP)
    it.queue.start()
    job = it.submit("a")
    started(it, job)
    it.queue.stop()
    assert it.queue.get(job).state == "queued"
    again = core(FINISH)
    again.queue.start()
    assert again.wait(job, "done")["result"] == {"adapter": "a"} and again.queue.get(job).accidents == 0


@pytest.mark.parametrize("left", ["nothing", "result", "published", "half-made job"])
def test_a_core_killed_at_any_point_carries_on(core: Callable[..., Core], tmp_path: Path, left: str) -> None:
    it = core(FINISH)
    job = it.submit("a")
    folder = it.queue.get(job).folder
    write_json(folder / "state.json", {"state": "running", "reason": None, "accidents": 0})
    if left in ("result", "published"):
        write_json(folder / "result.json", {"adapter": "a"})
        (folder / "adapter").mkdir()
    if left == "published":
        it.adapters.publish(folder / "adapter", "a")
    if left == "half-made job":
        (tmp_path / "rounds" / ".new-1" / "train").mkdir(parents=True)
    again = core(FINISH)
    assert again.queue.get(job).state == "queued" and not list((tmp_path / "rounds").glob(".new-*"))
    again.images.max_bytes = 1
    again.ask("other", images="xy")
    assert not again.images.missing(again.queue.get(job).images()), "pinned again"
    again.queue.start()
    assert again.wait(job, "done")["result"] == {"adapter": "a"} and "a" in again.adapters
    assert (folder / "starts").exists() == (left not in ("result", "published"))


def test_an_adapter_is_not_deleted_from_under_a_round(core: Callable[..., Core]) -> None:
    it = core(FINISH)
    (it.adapters.folder / "a").mkdir()
    job = it.submit("b", parent="a")
    with pytest.raises(Conflict, match="starts from the adapter 'a'"):
        it.queue.delete_adapter("a")
    it.queue.cancel(job)
    it.queue.delete_adapter("a")


def test_old_snapshots_let_go_of_their_images(core: Callable[..., Core]) -> None:
    it = core(FINISH)
    it.queue.start()
    jobs = [it.submit(f"r{n}") for n in range(5)]
    for job in jobs:
        it.wait(job, "done")
    it.queue.stop()  # what comes after the last one's end is through then, too
    kept = [(it.queue.get(job).folder / "train").exists() for job in jobs]
    assert kept == [False, False, True, True, True]


def test_finished_rounds_hold_no_labels_and_old_failures_go(core: Callable[..., Core], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "KEEP_FAILED", 2)
    it = core("(run / 'failure.json').write_text(json.dumps({'message': 'no'})); sys.exit(1)")
    it.queue.start()
    asked = []
    for n in range(4):
        asked.append(it.submit(f"r{n}"))
        it.wait(asked[-1], "failed")
    assert not {*PARTS} & it.queue.get(asked[3]).run.keys() and it.queue.submit(it.ask("r3"), "tiny-00000000", "tiny", "cpu").id == asked[3]
    with pytest.raises(NotFound):
        it.queue.get(asked[1])
    assert sorted(p.name for p in (tmp_path / "rounds").iterdir()) == sorted(asked[2:])
    again = core(FINISH)
    assert again.queue.get(asked[2]).state == "failed" and not {*PARTS} & again.queue.get(asked[2]).run.keys()


def test_the_trainer_gets_no_token(core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE_TOKEN", "canary")
    it = core("(run / 'env').write_text(json.dumps(dict(os.environ)))\n" + FINISH)
    it.queue.start()
    job = it.submit("a")
    it.wait(job, "done")
    env = json.loads((it.queue.get(job).folder / "env").read_text())
    assert "canary" not in str(env) and env["PYTHONPATH"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
