"""What the tests share. Nothing here imports torch or starts a process before a test asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backend.demo.services import Login, answers, free_port, label_studio, label_studio_executable

if TYPE_CHECKING:
    from kptllm_core.predictor import Predictor

ROOT = Path(__file__).resolve().parents[1]
SHARED_KEYPOINTS = ROOT.parent / "shared" / "keypoints"
ARTIFACTS = ROOT / ".data" / "test-artifacts"


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """A folder that stays after the tests, for pictures that a person looks at."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    return ARTIFACTS


@pytest.fixture(scope="session")
def shared_keypoints() -> Path:
    """Real images with keypoints, which lie beside some checkouts and are no part of this repository."""
    if not SHARED_KEYPOINTS.is_dir():
        pytest.skip("the folder ../shared/keypoints with real images is not beside this checkout")
    return SHARED_KEYPOINTS


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """The preset of some 100,000 parameters that serves the tests: same code as `nano`, weights in the repository."""
    return "tiny"


@pytest.fixture(scope="module")
def predictor(tiny_model: str) -> Predictor:
    """The model itself, of the process; one for each file, since some change it for a while."""
    from kptllm_core.predictor import load_predictor

    return load_predictor(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO keypoints folder (annotations.json, images/) of 16 rendered insects."""
    from backend.demo.samples import render

    folder = tmp_path_factory.mktemp("coco") / "insects"
    render(folder, 16, seed=11)
    return folder


@pytest.fixture
def port() -> int:
    """A free port on 127.0.0.1."""
    return free_port()


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """Paths of chromium and chromedriver."""
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(found):
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    return str(found[0]), str(found[1])


@pytest.fixture(scope="session")
def label_studio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Login]]:
    """The address and the login of a real Label Studio 1.23.2, started for this session of tests."""
    executable = label_studio_executable()
    if executable is None:
        pytest.skip("no Label Studio: `make setup` installs it into .labelstudio/venv, or set LABEL_STUDIO_BIN")
    folder = tmp_path_factory.mktemp("label-studio")
    login, at = Login.of(folder), free_port()
    service = label_studio(executable, folder / "data", login, at)
    service.start(answers(f"http://127.0.0.1:{at}/health"), 300)
    yield f"http://127.0.0.1:{at}", login
    service.stop()
