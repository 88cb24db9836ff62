"""The compose files and the Dockerfiles, as far as they can be checked without a Docker engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = ("backend/Dockerfile", "kptllm_core/Dockerfile")
SECRETS = ("PASSWORD", "PASS", "TOKEN", "API_KEY", "SECRET")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"])


@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]])
def test_docker_compose_accepts_the_files(files: list[str]) -> None:
    command = shutil.which("docker-compose")
    if command is None:
        pytest.skip("docker-compose is not installed (Debian: apt-get install docker-compose)")
    arguments = [word for name in files for word in ("-f", name)]
    done = subprocess.run([command, *arguments, "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == {"label-studio", "backend", "core"}


def test_no_secret_stands_in_the_compose_file(services: dict[str, Any]) -> None:
    """What is secret comes from the environment, with an empty default."""
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if variable.endswith(SECRETS):
                assert re.fullmatch(r"\$\{\w+:-\}", value), f"{name}: {variable} has a value in the file"


def test_every_service_is_watched_and_keeps_its_data(services: dict[str, Any]) -> None:
    volumes = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    for name, service in services.items():
        assert service["healthcheck"]["test"], f"{name} has no health check"
        assert [volume.split(":")[0] for volume in service["volumes"]] == [f"{name}-data"]
        assert f"{name}-data" in volumes
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes port {port} to every network"


def test_label_studio_may_reach_the_backend(services: dict[str, Any]) -> None:
    """With either of the two left on, it refuses the backend, or silently sends no webhooks."""
    label_studio = services["label-studio"]
    assert label_studio["image"].endswith("label-studio:1.23.2")
    assert label_studio["environment"]["ML_BLOCK_LOCAL_IP"] == "false"
    assert label_studio["environment"]["SSRF_PROTECTION_ENABLED"] == "false"


def test_the_backend_gets_only_settings_that_exist(services: dict[str, Any]) -> None:
    from backend.settings import Settings

    known = {setting.name for setting in Settings.describe()}
    assert set(services["backend"]["environment"]) <= known


def test_the_core_is_started_with_options_that_exist(services: dict[str, Any]) -> None:
    command = [word.replace("${MODEL:-nano}", "nano") for word in services["core"]["command"]]
    assert command[:4] == ["python", "-m", "kptllm_core", "serve"]
    done = subprocess.run(
        [sys.executable, *command[1:4], "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for option in (word for word in command if word.startswith("--")):
        assert option in done.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_copied_path_exists(dockerfile: str, services: dict[str, Any]) -> None:
    assert dockerfile in {service["build"]["dockerfile"] for service in services.values() if "build" in service}
    text = (ROOT / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    copies = [shlex.split(line)[1:] for line in text.splitlines() if re.match(r"(COPY|ADD)\s", line)]
    assert copies, "a Dockerfile that copies nothing"
    ignored = {line.strip() for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()}
    for words in copies:
        if any(word.startswith("--from") for word in words):
            continue
        for source in [word for word in words if not word.startswith("--")][:-1]:
            assert list(ROOT.glob(source.rstrip("/"))), f"{dockerfile} copies {source}, which does not exist"
            assert source.strip("/").split("/")[0] not in ignored, f"{dockerfile} copies {source}, which .dockerignore leaves out"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_containers_do_not_run_as_root_and_install_pinned_versions(dockerfile: str) -> None:
    text = (ROOT / dockerfile).read_text(encoding="utf-8")
    assert re.search(r"^USER\s+(?!root|0\b)", text, re.MULTILINE), f"{dockerfile} runs as root"
    assert "requirements" in text, f"{dockerfile} installs from no requirements file"


def test_the_backends_container_holds_no_torch() -> None:
    text = (ROOT / "requirements/backend.txt").read_text(encoding="utf-8")
    names = {re.split(r"[=<>\[ ]", line)[0].lower() for line in text.splitlines() if line and line[0] not in "#-"}
    assert not names & {"torch", "transformers", "peft"}
    assert "requirements/backend.txt" in (ROOT / "backend/Dockerfile").read_text(encoding="utf-8")
