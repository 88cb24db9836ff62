"""python -m kptllm_core COMMAND: the core's command line. Each command is a module with `add_arguments` and `run`.

Only the module of the command that was asked is imported, so that --help does not wait for torch. Whatever goes wrong
is told in one line on stderr with exit code 2; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from kptllm_core.errors import KptError


@dataclass(frozen=True)
class Command:
    """module: where it lives; summary: its line in the list of commands; examples: shown below its flags."""

    module: str
    summary: str
    examples: str


COMMANDS = {
    "predict": Command(
        "kptllm_core.predict", "find keypoints in a folder of images, from examples or from names",
        """examples:
  # five labelled examples show what to find
  python -m kptllm_core predict --support labelled --shots 5 --images photos --out predictions.json --draw pictures
  # no example at all: names alone
  python -m kptllm_core predict --names nose,left_eye,right_eye --images photos --out predictions.json
  # a project's adapter on the embedded model
  python -m kptllm_core predict --adapter runs/flies --support labelled --images photos

The results are a COCO keypoints list: image_id, file_name, category_id, keypoints [x, y, v, …] in pixels, score,
keypoint_scores, bbox. v is 2 visible, 1 hidden, 3 absent. An unreadable image has an empty list and an "error".""",
    ),
    "evaluate": Command(
        "kptllm_core.evaluate", "measure a model on labelled images by the MP-100 protocol",
        """examples:
  python -m kptllm_core evaluate --data horses --shots 1 --out report.json
  # as serving does: no box is given, five shots; and three folders in one report
  python -m kptllm_core evaluate --data horses --data tubes --data flies --shots 5 --boxes found
  # what the training is worth; what layout alone cannot do
  python -m kptllm_core evaluate --untrained --data horses
  python -m kptllm_core evaluate --rotate --data horses
  # naming given points, in the tenth of all groups that pretraining leaves out
  python -m kptllm_core evaluate --task name --part heldout --data faces --data hands
  # the same episodes for plain matching of features, SIFT, or patches, instead of the model
  python -m kptllm_core evaluate --baseline correlation --data horses
  python -m kptllm_core evaluate --baseline sift --rotate --data horses
  python -m kptllm_core evaluate --baseline template --shots 5 --data horses
  # how much the trained model leans on a part: switched off for the test
  python -m kptllm_core evaluate --without identify --data horses
  python -m kptllm_core evaluate --without llm --without refinement --data horses
  # the published protocols, for whoever has these data sets
  python -m kptllm_core evaluate --protocol mp100 --annotations mp100_split1_test.json --images mp100/images
  python -m kptllm_core evaluate --protocol ap10k --annotations ap10k-test-split1.json --images ap10k/data --prompt text --shots 0

PCK@a is the share of points nearer than a × max(w, h) of the true box; only points labelled in the query and in all
supports count, a pair without any scores 0. "copy" puts the support's points at the same place of the query's true box;
skill is the mean of (PCK@0.1 - copy) / (1 - copy) over the categories whose copy is below 0.5. Intervals (95 %) are
bootstrapped over query objects.

Names: the model writes one freely (named), or chooses among the category's own (closed). Two names are the same if their
plain words are: case is ignored; punctuation, camel case and the border between letters and digits separate words; l and r
(lft, rgt, lt, rt) read left and right, which come first. Synonyms and another order of the other words are wrong.

mp100: 200 episodes × (shots + 15 queries) of each class by Python's generator with seed 1, boxes cut to the image, the
points' order shuffled; PCK at .05 … .25, their mean, AUC and NME. ap10k: every object once; AP by OKS with AP-10K's
sigmas and PCK@0.1, means over species. Deviations are listed in the report.""",
    ),
    "train": Command(
        "kptllm_core.train", "pretrain a model, or train a LoRA adapter from a few labelled images",
        """examples:
  # an adapter from your own labelled images
  python -m kptllm_core train --lora --data labelled --out runs/flies
  # pretraining on several folders; --resume continues where it stopped
  python -m kptllm_core train --model nano --data people --data hands --out runs/nano
  python -m kptllm_core train --model nano --data people --data hands --out runs/nano --resume""",
    ),
    "calibrate": Command(
        "kptllm_core.calibrate", "fit how sure a found box is, on rendered kinds; after a pretraining",
        """examples:
  python -m kptllm_core calibrate --model runs/nano
  python -m kptllm_core calibrate --model nano --dry-run""",
    ),
    "serve": Command(
        "kptllm_core.serve", "answer over HTTP: one resident model, an adapter per project",
        """examples:
  python -m kptllm_core serve --port 9091
  python -m kptllm_core serve --model nano --host 127.0.0.1 --port 9091 --data .data/core""",
    ),
}  # fmt: skip

OVERVIEW = """\
Keypoints from a few labelled examples, from their names, or both.

DIR is a folder with annotations.json (COCO keypoints) and images/ beside it."""


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only `command` gets its flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m kptllm_core", description=OVERVIEW, formatter_class=raw,
                                     epilog="python -m kptllm_core COMMAND --help explains a command, with examples.")  # fmt: skip
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, entry in COMMANDS.items():
        summary = entry.summary[0].upper() + entry.summary[1:] + "."
        sub = subparsers.add_parser(
            name, help=entry.summary, description=summary, epilog=entry.examples, formatter_class=raw
        )
        if name == command:
            module = importlib.import_module(entry.module)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake that the message explains, 1 a defect of ours, 130 stopped by Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser(next((a for a in argv if not a.startswith("-")), None)).parse_args(argv)
        return int(args.run(args))
    except KptError as error:
        return _fail(error.message, 2)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader of our output left; nothing more to say
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except Exception as error:  # noqa: BLE001 - the last resort: a sentence, never a traceback
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f" at {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
        return _fail(f"unexpected {type(error).__name__}{place}: {error}. Please report this.", 1)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
