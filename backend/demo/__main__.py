"""`python -m backend.demo`, which `make demo` calls."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from backend.connect import Connection
from backend.demo import services
from backend.demo.project import DemoProject
from backend.demo.samples import Material, choose, from_folder, rendered
from backend.demo.tour import EXAMPLES, Tour, once
from backend.label_studio import LabelStudio
from kptllm_core.errors import KptError, NotFound, Unavailable

RENDERED = 24
_STARTED = time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """0 when everything that was asked for happened (or a person stopped the demo), 1 with the reason in words."""
    options = _options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        with services.alone_in(options.folder):
            material = _material(options)
            with _running(options) as (label_studio, backend, login):
                if options.once:
                    report = once(_made(label_studio, backend, material), options.round_seconds * 4 + 300)
                else:
                    project = _earlier(label_studio, backend, options.call, material) or _shown(label_studio, backend, options.call, material)
                    _wait(label_studio.url, backend, project, login, options.folder / "backend.log")
        print(json.dumps(report, ensure_ascii=False), flush=True)
    except KptError as error:
        print(f"\n{error.message}", file=sys.stderr, flush=True)
        if "report" in error.details:
            print(json.dumps(error.details["report"], ensure_ascii=False), flush=True)
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130 if options.once else 0
    return 0


def say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:4.0f} s] {text}", flush=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m backend.demo", description="Label Studio, backend and core on this machine.")
    parser.add_argument("--images", type=Path, help="folder with your own images (default: rendered insects)")
    parser.add_argument("--labels", type=Path, help="COCO keypoints of some or all of these images")
    parser.add_argument("--names", help="names of the points, separated by commas, instead of labels or a config")
    parser.add_argument("--config", type=Path, help="label config (XML); default: made from the labels, else a template")
    parser.add_argument("--once", action="store_true", help="do the whole tour and end; the last line is JSON")
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder (default: nano)")
    parser.add_argument("--round-seconds", type=float, default=120.0, help="time for training in a round (default: 120)")
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: .data/demo, with --once .data/tour)")
    options = parser.parse_args(arguments)
    options.folder = (options.folder or services.ROOT / ".data" / ("tour" if options.once else "demo")).resolve()
    if options.labels and not options.images:
        parser.error("--labels needs --images: the folder with the images that it describes")
    if options.config and not options.images:
        parser.error("--config goes with --images: the folder with the images that it is for")
    options.names = [name.strip() for name in (options.names or "").split(",") if name.strip()]
    if options.images and not (options.labels or options.config or options.names):
        parser.error("--images needs to know the points: give --names head,tail or --labels annotations.json or --config config.xml")
    if options.names and (options.labels or options.config or not options.images):
        parser.error("--names goes with --images, and without --labels and --config, which name the points themselves")
    told = {"IMAGES": options.images, "LABELS": options.labels, "CONFIG": options.config}
    paths = [f"{key}={path.resolve()}" for key, path in told.items() if path]
    options.call = " ".join(["make demo", *paths, *([f"NAMES={','.join(options.names)}"] if options.names else [])])
    return options


def _material(options: argparse.Namespace) -> Material:
    if options.images:
        return from_folder(options.images, options.labels, options.config, options.names)
    return rendered(options.folder / "samples", RENDERED, seed=2026)


@contextmanager
def _running(options: argparse.Namespace) -> Iterator[tuple[LabelStudio, str, services.Login]]:
    """Label Studio and the product, both answering; stopped in the end, whatever happened."""
    executable = services.label_studio_executable()
    if executable is None:
        raise NotFound("There is no Label Studio. `make setup` installs it; LABEL_STUDIO_BIN names one that is there already.")
    if options.once:  # a tour starts from nothing
        for part in ("label-studio", "backend", "core"):
            shutil.rmtree(options.folder / part, ignore_errors=True)
    login = services.Login.of(options.folder)
    at = services.free_port(8080)
    server = services.label_studio(executable, options.folder / "label-studio", login, at)
    url = f"http://{services.LOOPBACK}:{at}"
    try:
        say(f"Starting Label Studio at {url} (half a minute) ...")
        server.start(services.answers(f"{url}/health"), 600)
        port, core = services.free_port(9090), services.free_port(9091)
        backend = f"http://{services.LOOPBACK}:{port}"
        product = services.product(options.folder, {
            "LABEL_STUDIO_URL": url, "LABEL_STUDIO_API_KEY": login.token, "HOST": services.LOOPBACK, "PORT": str(port),
            "CORE_PORT": str(core), "MODEL": options.model, "ROUND_SECONDS": f"{options.round_seconds:g}",
        })  # fmt: skip
        try:
            say(f"Starting backend and core at {backend} ...")
            # Its version names the base once the core has loaded it; until then predictions would be asked for twice.
            product.start(services.answers(f"{backend}/health", "base"), 300)
            yield LabelStudio(url, login.token), backend, login
        finally:
            product.stop()
    finally:
        server.stop()


def _made(label_studio: LabelStudio, backend: str, material: Material) -> Tour:
    """A new project, with the backend attached to it."""
    say(f"Making the project '{material.title}' of {len(material.pictures)} images ...")
    project = DemoProject(label_studio, material)
    return Tour(project, f"{backend}/projects/{project.id}/status", _attached(label_studio, backend, project.id), say)


def _attached(label_studio: LabelStudio, backend: str, project: int) -> int:
    """Attaches the backend to a project, where it listens now; → its id in Label Studio."""
    if not Connection(label_studio, project, backend).make():
        raise Unavailable("The project could not be connected; see above.")
    return next(int(entry["id"]) for entry in label_studio.ml_backends(project) if entry["url"] == f"{backend}/projects/{project}")


def _shown(label_studio: LabelStudio, backend: str, call: str, material: Material) -> int:
    """A new project with a few labelled examples, where there is truth, and predictions for the rest; → its number."""
    tour = _made(label_studio, backend, material)
    examples = choose(material.labelled, EXAMPLES)
    if examples:
        tour.label(examples)
    tour.predict([picture for picture in material.pictures if picture not in examples])
    label_studio.update_project(tour.project.id, description=call)  # by which `_earlier` finds it, since it is whole
    return tour.project.id


def _earlier(label_studio: LabelStudio, backend: str, call: str, material: Material) -> int | None:
    """The number of the project that the same call has made, attached again; None when there is none."""
    found = next((p for p in label_studio.projects() if p.get("description") == call), None)
    if found is None:
        return None
    say(f"Going on with the project '{found['title']}' that `{call}` has made ...")
    more = len(material.pictures) - int(found.get("task_number") or 0)
    if more > 0:
        say(f"  {more} images of the folder are no tasks of it (any more): *Import* in Label Studio adds what is new.")
    _attached(label_studio, backend, int(found["id"]))
    return int(found["id"])


def _wait(url: str, backend: str, project: int, login: services.Login, log: Path) -> NoReturn:
    """Until Ctrl-C."""
    print(
        f"\n  Label Studio   {url}/projects/{project}/data"
        f"\n  login          {login.email}   password  {login.password}"
        f"\n  backend        {backend}/projects/{project}/   (its versions and rounds)"
        "\n\n  Open a task: the points are there. Correct them and press Submit; from 10 labelled images on,"
        "\n  Settings → Model → Start training makes a new version. Ctrl-C stops everything.\n",
        flush=True,
    )
    while True:
        time.sleep(2.0)
        if not services.answers(f"{backend}/health")():
            raise Unavailable(f"The backend at {backend} does not answer any more; its log: {log}.")


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
