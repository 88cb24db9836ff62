"""A real Label Studio with this product beside it, once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from backend.connect import Connection
from backend.demo.project import DemoProject
from backend.demo.samples import Material, rendered
from backend.demo.services import LOOPBACK, Login, answers, free_port, product
from backend.demo.tour import Tour
from backend.label_studio import LabelStudio
from journal_database import journal_url

ROUND_SECONDS = 8


@dataclass(frozen=True)
class Stack:
    """Addresses of what runs."""

    label_studio: str
    login: Login
    backend: str
    environment: dict[str, str]  # for `python -m backend …` beside it

    def tour(self, material: Material) -> Tour:
        """A new project with these images, connected to the backend."""
        client = LabelStudio(self.label_studio, self.login.token)
        project = DemoProject(client, material)
        assert Connection(client, project.id, self.backend).make()
        (entry,) = client.ml_backends(project.id)
        return Tour(project, f"{self.backend}/projects/{project.id}/status", int(entry["id"]), print)


@contextmanager
def product_beside(server: tuple[str, Login], model: str, folder: Path) -> Iterator[Stack]:
    """The product with this model beside that Label Studio."""
    url, login = server
    port, core = free_port(), free_port()
    backend = f"http://{LOOPBACK}:{port}"
    data = {"DATA_DIR": str(folder / "backend"), "DATABASE_URL": journal_url(folder / "backend")}
    service = product(folder, {
        "LABEL_STUDIO_URL": url, "LABEL_STUDIO_API_KEY": login.token, "HOST": LOOPBACK, "PORT": str(port),
        "CORE_PORT": str(core), "CORE_URL": "", "MODEL": model, "ROUND_SECONDS": str(ROUND_SECONDS), **data,
    })  # fmt: skip
    service.start(answers(f"{backend}/health", "base"), 300)
    beside = {"LABEL_STUDIO_URL": url, "LABEL_STUDIO_API_KEY": login.token, "CORE_URL": f"http://{LOOPBACK}:{core}", **data}
    yield Stack(url, login, backend, {**os.environ, **beside})
    service.stop()


@pytest.fixture(scope="session")
def stack(
    label_studio_server: tuple[str, Login], tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    with product_beside(label_studio_server, tiny_model, tmp_path_factory.mktemp("product")) as made:
        yield made


@pytest.fixture
def insects(tmp_path: Path) -> Callable[[int], Material]:
    """So many rendered images with their truth."""
    return lambda count: rendered(tmp_path / "insects", count, seed=5)
