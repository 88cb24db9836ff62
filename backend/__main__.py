"""`python -m backend`: the product in the foreground. `… connect` attaches a Label Studio project, `… demo` is the tour."""

from __future__ import annotations

import argparse
import os
import sys

from backend import connect as connecting
from backend import export_command as exporting
from backend import import_command as importing
from backend import prelabel_command as prelabelling
from backend.settings import Settings
from kptllm_core.errors import KptError


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 after an orderly end, 1 after an error that is told in words, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m backend",
        description="Runs the keypoint backend, and the core unless CORE_URL names one, until Ctrl-C. It is set up by environment "
        "variables, which the README lists.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    connect = commands.add_parser("connect", help="attach a project of an existing Label Studio, each step checked")
    connecting.add_arguments(connect)
    prelabel = commands.add_parser("prelabel", help="predictions for all unlabelled tasks of a project, without a time limit")
    prelabelling.add_arguments(prelabel)
    bring = commands.add_parser("import", help="labels of COCO, DeepLabCut, SLEAP or YOLO files become annotations of a project")
    importing.add_arguments(bring)
    write = commands.add_parser("export", help="what people labelled in a project, as COCO keypoints, several objects apart")
    exporting.add_arguments(write)
    commands.add_parser("demo", help="the whole tour on this machine: Label Studio, backend and core", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "demo":
        from backend.demo.__main__ import main as demo

        return demo(rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    try:
        if options.command == "connect":
            return connecting.run(options)
        if options.command == "import":
            return importing.run(options)
        if options.command == "export":
            return exporting.run(options)
        if options.command == "prelabel":
            return prelabelling.run(options)
        from backend.supervisor import supervise

        return supervise(Settings.from_env(), os.environ)
    except KptError as error:
        print(f"python -m backend: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
