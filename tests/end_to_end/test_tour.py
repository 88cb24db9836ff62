"""`make demo ONCE=1` on real images: the tour comes to its end, and a round makes the predictions better."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.demo.services import ROOT, label_studio_executable

pytestmark = [pytest.mark.slow, pytest.mark.label_studio]


@pytest.mark.parametrize("name", ["dlc_reaching_mouse", "dpk_fly"])
def test_a_round_on_real_images_raises_the_pck(shared_keypoints: Path, tmp_path: Path, name: str) -> None:
    if label_studio_executable() is None:
        pytest.skip("no Label Studio: `make setup` installs it into .labelstudio/venv, or set LABEL_STUDIO_BIN")
    data = shared_keypoints / name
    done = subprocess.run(
        [sys.executable, "-m", "backend.demo", "--once", "--folder", str(tmp_path / "tour"),
         "--images", str(data / "images"), "--labels", str(data / "annotations.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == ["tasks", "predicted", "round", "pck_before", "pck_after", "predictions_of_new_version"]
    assert list(report["round"]) == ["from", "to", "promoted", "reason", "seconds"]
    assert report["round"]["promoted"], report["round"]["reason"]
    assert report["predictions_of_new_version"] > 30
    for threshold in ("0.1", "0.2"):
        assert report["pck_after"][threshold] > report["pck_before"][threshold]
