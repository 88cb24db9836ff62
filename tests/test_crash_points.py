"""The core's disk, killed at every system call that changes it: an upload, a round's submission, the publishing of its adapter."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kptllm_core.jobs import JobQueue
from kptllm_core.messages import RoundRequest
from kptllm_core.store import AdapterStore, ImageStore

ROOT = Path(__file__).resolve().parents[1]
CALLS = ("fsync", "rename", "link", "mkdir", "unlink", "write")
IMAGES = (b"first", b"second")
TRAINER = """
import json, sys
from pathlib import Path
run = Path(sys.argv[1])
(run / "adapter").mkdir(exist_ok=True)
(run / "adapter" / "adapter.json").write_text('{"base": "tiny-00000000"}')
(run / "result.json").write_text('{"adapter": "a+r1"}')
"""


def request() -> RoundRequest:
    keypoints = {"names": ["tip"], "xy": [[1, 2]], "visibility": [2]}
    train, heldout = ([{"image": hashlib.sha256(data).hexdigest(), "keypoints": keypoints}] for data in IMAGES)
    return RoundRequest.from_json({"name": "a+r1", "schema": {"names": ["tip"]}, "seconds": 5, "train": train, "heldout": heldout})


def everything(folder: Path) -> str:
    """Uploads, asks for a round and runs it, as a core does, each step where an earlier core left off. The job's end."""
    images, adapters = ImageStore(folder / "images"), AdapterStore(folder / "adapters")
    queue = JobQueue(folder / "rounds", images, adapters, command=lambda run: [sys.executable, "-S", "-c", TRAINER, str(run)])
    for data in IMAGES:
        images.put(hashlib.sha256(data).hexdigest(), data)
    job = queue.submit(request(), "tiny-00000000", "tiny", "cpu")
    queue._run(job)
    return job.state


def check(folder: Path) -> None:
    """What must hold after a kill at any point."""
    images, adapters = ImageStore(folder / "images"), AdapterStore(folder / "adapters")
    for data in IMAGES:
        sha = hashlib.sha256(data).hexdigest()
        assert sha not in images or images.read(sha) == data
    queue = JobQueue(folder / "rounds", images, adapters)
    rounds = list((folder / "rounds").iterdir())
    assert len(rounds) <= 1 and all(queue.get(p.name).folder == p for p in rounds), "whole or absent"
    assert {p.name for p in adapters.folder.iterdir()} <= {"a+r1"}
    assert not [p for p in (folder / "images").glob("*/*") if p.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_at_any_call_loses_nothing_and_the_next_start_finishes(call: str, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (Debian: apt-get install strace)")
    for number in range(1, 200):
        folder = tmp_path / str(number)
        code = f"from pathlib import Path; from tests.test_crash_points import everything; everything(Path({str(folder)!r}))"
        done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}",
                               sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)  # fmt: skip
        if "ptrace" in done.stderr and "not permitted" in done.stderr:
            pytest.skip("strace may not trace here")
        if folder.exists():
            check(folder)
        assert everything(folder) == "done"
        check(folder)
        if done.returncode == 0:
            assert number > 1, f"{call} was never called"
            return
        assert done.returncode in (-9, 137), done.stderr
    raise AssertionError("never finished")
