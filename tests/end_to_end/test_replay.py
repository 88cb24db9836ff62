"""benchmarks/effort.py on rendered insects, with the real backend, core and trainer: interrupted, gone on with, and reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend.demo.samples import render
from backend.demo.services import ROOT

pytestmark = pytest.mark.slow
IMAGES, ROUNDS, EXAMPLES = 26, (10, 18), 5
SECONDS = 900.0


def test_a_replay_that_is_interrupted_goes_on_and_reports(tmp_path: Path, tiny_model: str) -> None:
    render(tmp_path / "insects", IMAGES, seed=3)
    out = tmp_path / "effort.json"
    command = [sys.executable, "benchmarks/effort.py", "--data", str(tmp_path / "insects"), "--out", str(out), "--model", tiny_model,
               "--examples", str(EXAMPLES), "--rounds", ",".join(map(str, (*ROUNDS, IMAGES))), "--seconds", "2"]  # fmt: skip

    # Killed in the middle of its first round.
    journal = tmp_path / "effort.state" / "replay.jsonl"
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + SECONDS
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 1 + ROUNDS[0]:
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < end, (tmp_path / "first.log").read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = journal.read_bytes()

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr + done.stdout
    assert journal.read_bytes().startswith(before), "what was done was done again"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["image"]["task"] for line in lines if "image" in line] == list(range(1, IMAGES + 1))

    report = json.loads(out.read_text())
    assert report["left_out"]["rounds"] == [IMAGES], "a round that leaves nothing to predict"
    assert [r["images"] for r in report["rounds"]] == list(ROUNDS)
    assert [r["images"] for r in report["baseline_rounds"]] == list(ROUNDS)
    for made in report["rounds"]:
        assert made["seconds"] >= 2
        assert made["moved_share"] >= 0
        assert made["train_images"] + made["heldout_images"] == made["images"]
        assert f"+r{report['rounds'].index(made) + 1}+" in made["version"]
    stages = [report["before_rounds"], *report["rounds"]]
    assert sum(s["next_images"] for s in stages) == IMAGES - EXAMPLES
    corrected = sum(s["moved"] + s["missing"] + s["wrong"] for s in stages)
    by_hand = report["points"] - sum(s["points"] for s in stages)
    assert report["effort"] == pytest.approx((by_hand + corrected) / report["points"], abs=1e-3)
    assert 0 < report["baseline_effort"] <= 1.2
    assert out.with_suffix(".png").stat().st_size > 10_000

    # A finished replay is only reported again; one with other settings is refused.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text()) == report
    other = subprocess.run([*command, "--tolerance", "0.1"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert other.returncode == 2
    assert "other settings (tolerance)" in other.stderr
