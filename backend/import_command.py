"""`python -m backend import`: labels of COCO, DeepLabCut, SLEAP or YOLO files become annotations in a Label Studio project."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backend.formats.read import FORMATS, read_labels
from backend.import_names import map_names, parse_rename
from backend.importing import Importer, told
from backend.services import Services
from backend.settings import Settings
from kptllm_core.errors import InvalidInput
from label_config.schema import LabelConfig, parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command. Everything else comes from the backend's environment variables."""
    parser.description = (
        "Brings labels that exist already into a Label Studio project as annotations, made by the token's user. Images are matched "
        "with the project's tasks by name; where there is none, one is made. Run again, it adds only what is missing. Needs the same "
        "environment variables as the backend."
    )
    add = parser.add_argument
    add("path", type=Path, help="coco: the JSON file; dlc: CollectedData_*.csv or the project; sleap: analysis CSV or .slp; yolo: data.yaml")
    add("--format", choices=FORMATS, required=True, help="whose files they are")
    add("--project", type=int, required=True, help="the project's number, as in /projects/7/")
    add("--images", type=Path, metavar="FOLDER", help="where the image files are, when not beside the labels; they are uploaded where needed")
    add("--image-url", default="", metavar="URL", help="make new tasks that show this address plus the image's name, instead of uploading files")
    add("--control", metavar="NAME", help="the KeyPointLabels to use, when the label config has several")
    add("--rename", action="append", default=[], metavar="OLD=NEW", help="a point or category of the data set and the label that it is; repeatable")
    add("--names", metavar="A,B,…", help="yolo: what the keypoints are called, in order; `config` for the label config's order")
    add("--skip-unknown", action="store_true", help="leave out points that the label config does not have")
    add("--even-labelled", action="store_true", help="add an annotation to tasks that are labelled already, too")
    add("--dry-run", action="store_true", help="only say what would be done")


def run(args: argparse.Namespace) -> int:
    """0 when every image has its annotation, 1 when some were left out."""
    services = Services.make(Settings.from_env())
    try:
        if not services.has_token:
            raise InvalidInput("Label Studio wants a token: set LABEL_STUDIO_API_KEY (a personal access token) as for the backend.")
        if args.images is not None and not args.images.is_dir():
            raise InvalidInput(f"--images {args.images} is no folder.")
        found = services.label_studio.project(args.project)
        config = parse(str(found.get("label_config") or ""))
        labels = read_labels(args.format, args.path, _names(args.names, config, args.control))
        things = sum(len(image.things) for image in labels.images)
        print(f"{args.path}: {len(labels.images)} labelled images with {things} objects.")
        targets, remarks = map_names(
            config, labels.names(), control=args.control, rename=parse_rename(args.rename), skip_unknown=args.skip_unknown
        )
        for line in (*(f"{note}." for note in labels.notes), *remarks):
            print(f"– {line}")
        return _carry_out(services, args, Importer(
            services, args.project, config, labels, targets,
            images=args.images, image_url=args.image_url, even_labelled=args.even_labelled, progress=_Bars(),
        ))  # fmt: skip
    finally:
        services.journal.close()


def _carry_out(services: Services, args: argparse.Namespace, importer: Importer) -> int:
    plan = importer.plan()
    print(
        f"{plan.there} are in the project already, {len(plan.annotate)} tasks get an annotation, {len(plan.create)} tasks are new, "
        f"{len(plan.left_out)} images are left out."
    )
    made = 0
    if not args.dry_run and (plan.annotate or plan.create):
        made = importer.carry_out(plan)
    for line in told(plan, importer.notes):
        print(f"– {line}")
    if args.dry_run:
        print("Nothing was changed (--dry-run).")
    else:
        labelled = len(services.journal.candidates(str(args.project)))
        print(f"{made} annotations made. The backend's journal knows {labelled} labelled images of project {args.project}.")
    return 1 if plan.left_out else 0


def _names(given: str | None, config: LabelConfig, control: str | None) -> list[str] | None:
    if given is None:
        return None
    if given.strip() != "config":
        return [name.strip() for name in given.split(",") if name.strip()]
    fitting = [c for c in config.controls if control in (None, c.from_name)]
    if len(fitting) != 1:
        raise InvalidInput("--names config needs --control NAME, since the label config has several KeyPointLabels.")
    return list(fitting[0].labels)


class _Bars:
    """A progress bar for each part of the work, one after the other."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = tqdm(total=total, desc=what, disable=None, dynamic_ncols=True)
        self._bars[what].update(done - self._bars[what].n)
        if done == total:
            self._bars.pop(what).close()
