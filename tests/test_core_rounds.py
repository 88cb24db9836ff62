"""The core as it is shipped, with the tiny model: predictions, a real round, kills in the middle of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from jsonschema import Draft202012Validator

from kptllm_core.dataset import Sample, load_coco

ROOT = Path(__file__).resolve().parents[1]


class RunningCore:
    """`python -m kptllm_core serve --model tiny` on a folder; may be killed and started again."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url, self.folder, self.port = f"http://127.0.0.1:{port}", folder, port
        self.session = requests.Session()
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / "output.txt"

    def start(self) -> None:
        with self.output.open("ab") as file:
            self.process = subprocess.Popen([sys.executable, "-m", "kptllm_core", "serve", "--model", "tiny", "--port", str(self.port),
                                             "--data", str(self.folder / "data")], cwd=ROOT, stdout=file, stderr=file,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        end = time.monotonic() + 120
        while True:
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            try:
                if self.session.get(f"{self.url}/health", timeout=5).json()["status"] == "UP":
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.1)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def post(self, path: str, body: dict[str, Any], status: int = 200) -> Any:
        answer = self.session.post(self.url + path, json=body, timeout=120)
        assert answer.status_code == status, answer.text
        return answer.json()

    def upload(self, samples: list[Sample]) -> None:
        for sample in samples:
            data = sample.image_path.read_bytes()
            assert self.session.put(f"{self.url}/images/{sha(sample)}", data=data, timeout=30).status_code == 201

    def job(self, job: str) -> dict[str, Any]:
        return dict(self.session.get(f"{self.url}/rounds/{job}", timeout=30).json())

    def wait(self, job: str, ready: Callable[[dict[str, Any]], bool], seconds: float = 300) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not ready(now := self.job(job)):
            assert time.monotonic() < end and now["state"] != "failed", (now, self.trainer_log(job))
            time.sleep(0.1)
        return now

    def trainer_log(self, job: str) -> str:
        path = self.folder / "data" / "rounds" / job / "trainer.log"
        return path.read_text() if path.exists() else ""


def sha(sample: Sample) -> str:
    return hashlib.sha256(sample.image_path.read_bytes()).hexdigest()


def labelled(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{"image": sha(s), "keypoints": s.keypoints.to_json(), "group": ""} for s in samples]


def trainers(job: str) -> list[psutil.Process]:
    """The trainer processes of a round, without the helpers that they start."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "kptllm_core.trainer" in words and any(w.endswith(job) for w in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            try:
                if os.getsid(process.pid) == process.pid:  # helpers belong to the session of their trainer
                    found.append(process)
            except ProcessLookupError:
                continue
    return found


@pytest.fixture
def core(tmp_path: Path, port: int) -> Iterator[RunningCore]:
    running = RunningCore(port, tmp_path)
    running.start()
    yield running
    if running.process and running.process.poll() is None:
        running.stop()
    text = running.output.read_text()
    assert "Traceback" not in text, text


@pytest.fixture
def ask(coco_folder: Path, core: RunningCore) -> dict[str, Any]:
    """A round on rendered insects, all images uploaded."""
    samples = load_coco(coco_folder).samples
    core.upload(samples)
    return {"name": "tiny+p1+r1", "schema": samples[0].schema.to_json(), "parent": None, "train": labelled(samples[:10]),
            "heldout": labelled(samples[10:14]), "support": labelled(samples[:3]), "seconds": None, "steps": 20, "seed": 0}  # fmt: skip


@pytest.mark.slow
def test_a_round_changes_the_predictions(core: RunningCore, ask: dict[str, Any], coco_folder: Path) -> None:
    samples = load_coco(coco_folder).samples
    query = {"schema": ask["schema"], "support": ask["support"][:1], "queries": [{"image": sha(s)} for s in samples[14:]]}
    base = core.post("/predict", {**query, "adapter": None})
    assert all("keypoints" in r for r in base["results"]), base
    text = core.post("/predict", {**query, "support": [], "prompt": "text"})
    assert all(r["keypoints"]["names"] == ask["schema"]["names"] for r in text["results"])
    named = core.post("/name", {"image": sha(samples[0]), "xy": [[5, 5], [20, 20]], "candidates": ask["schema"]["names"]})
    assert len(named["names"]) == 2 and {n["name"] for n in named["names"]} <= set(ask["schema"]["names"])

    job = core.post("/rounds", ask, 202)["job"]
    core.wait(job, lambda now: now["state"] == "running" and now["step"] > 0)
    begin = time.perf_counter()
    assert core.session.get(f"{core.url}/health", timeout=5).json()["training"] == job
    assert time.perf_counter() - begin < 1
    assert all(p.nice() == 10 for p in trainers(job))
    done = core.wait(job, lambda now: now["state"] == "done")
    components = json.loads((ROOT / "kptllm_core" / "openapi.json").read_text())["components"]
    Draft202012Validator({"$ref": "#/components/schemas/Job", "components": components}).validate(done)
    result = done["result"]
    assert result["adapter"] == ask["name"] and result["train_images"] == 10 and result["heldout_images"] == 4 and result["skipped"] == []
    for score in (result["before"], result["after"]):
        assert {"0.05", "0.1"} <= set(score["pck"]) and score["nme"] > 0 and score["points"] > 0
    (adapter,) = core.session.get(f"{core.url}/adapters", timeout=5).json()["adapters"]
    assert adapter["name"] == ask["name"] and adapter["base"] == base["base"]

    after = core.post("/predict", {**query, "adapter": ask["name"]})
    again = core.post("/predict", {**query, "adapter": None})
    assert again == base != after and after["adapter"] == ask["name"]
    second = core.post("/rounds", {**ask, "name": "tiny+p1+r2", "parent": ask["name"], "steps": 5}, 202)["job"]
    done = core.wait(second, lambda now: now["state"] == "done")
    assert done["result"]["before"]["pck"] == pytest.approx(result["after"]["pck"]), "the parent scores as it did when it was new"

    weights = core.folder / "data" / "adapters" / "tiny+p1+r2" / "adapter.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    refused = core.post("/predict", {**query, "adapter": "tiny+p1+r2"}, 409)
    assert refused["error"]["code"] == "artifact" and "damaged" in refused["error"]["message"]
    assert core.post("/predict", {**query, "adapter": ask["name"]}) == after


@pytest.mark.slow
def test_a_round_survives_kills_of_the_trainer_and_of_the_core(core: RunningCore, ask: dict[str, Any]) -> None:
    job = core.post("/rounds", {**ask, "steps": 60}, 202)["job"]
    core.wait(job, lambda now: now["step"] > 3)
    (first,) = trainers(job)
    first.kill()
    core.wait(job, lambda now: any(p.pid != first.pid for p in trainers(job)))
    core.wait(job, lambda now: now["state"] == "running")

    core.kill()
    end = time.monotonic() + 10
    while trainers(job):
        assert time.monotonic() < end, "the trainer outlives its core"
        time.sleep(0.05)
    core.start()
    assert core.post("/rounds", {**ask, "steps": 60}, 202)["job"] == job, "the same request, the same job"
    core.wait(job, lambda now: now["state"] == "running" and bool(trainers(job)))
    assert len(trainers(job)) == 1

    core.stop()  # gently: the state is saved
    assert not trainers(job)
    core.start()
    done = core.wait(job, lambda now: now["state"] == "done")
    assert done["result"]["steps"] == 60 and done["reason"] is None
    log = core.trainer_log(job)
    assert "Traceback" not in log, log
    assert not list((core.folder / "data" / "rounds" / job).glob(".adapter*"))


@pytest.mark.slow
def test_sigterm_during_training_is_prompt_and_resumes(core: RunningCore, ask: dict[str, Any]) -> None:
    job = core.post("/rounds", {**ask, "steps": 40}, 202)["job"]
    core.wait(job, lambda now: now["step"] > 5)
    at = core.job(job)["step"]
    begin = time.monotonic()
    assert core.process
    core.process.send_signal(signal.SIGTERM)
    assert core.process.wait(40) == 0 and time.monotonic() - begin < 25
    state = json.loads((core.folder / "data" / "rounds" / job / "state.json").read_text())
    assert state["state"] == "queued" and state["accidents"] == 0
    core.start()
    core.wait(job, lambda now: now["state"] == "running" and now["step"] >= at)
    assert core.wait(job, lambda now: now["state"] == "done")["result"]["steps"] == 40
    metrics = json.loads((core.folder / "data" / "adapters" / ask["name"] / "metrics.json").read_text())
    assert metrics["resumed"] is True


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_core_with_a_sentence(tmp_path: Path, port: int) -> None:
    model = tmp_path / "tiny"
    shutil.copytree(ROOT / "kptllm_core" / "presets" / "tiny", model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    found = subprocess.run([sys.executable, "-m", "kptllm_core", "serve", "--model", str(model), "--port", str(port),
                            "--data", str(tmp_path / "data")], cwd=ROOT, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert found.returncode == 2 and "is damaged" in found.stderr and "Traceback" not in found.stderr
