"""What does the lexicon give? Points asked for by text alone, their names written as people of many countries write them.

    python benchmarks/lexicon.py --data DIR [--data DIR …] [--part heldout] [--queries 40] [--seed 0] [--model nano]

Each style of `kptllm_core.lexicon` writes the folder's names: synonyms, a description of where the point lies, ten languages. `read`:
asked as serving does, which reads a known name back to its canonical form; `raw`: the same names given to the model as they are
written, so that it lives on what it learned in training alone. `changed` is the share of names that the style writes otherwise.
PCK@0.1, true boxes, unseen groups of the folder unless --part says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kptllm_core import passes as serving
from kptllm_core.dataset import Sample, held_out, load_coco
from kptllm_core.errors import DataError, KptError
from kptllm_core.keypoints import KeypointSchema
from kptllm_core.language import plain_words
from kptllm_core.lexicon import LANGUAGES, Lexicon, lexicon
from kptllm_core.predictor import Predictor, load_predictor
from kptllm_core.scoring import measure

NEAR = 0.1
STYLES = ("canonical", "synonyms", "where", *LANGUAGES, "numbers")


def written(names: Sequence[str], style: str, rng: np.random.Generator) -> tuple[str, ...]:
    """The names in a style; "numbers" says nothing of what they are. A name that would repeat another stays canonical."""
    found: list[str] = []
    for number, name in enumerate(names):
        plain = lexicon().canonical(name)
        new = plain if style == "canonical" else f"point {number}" if style == "numbers" else lexicon().write(plain, style, rng)
        found.append(plain if new in found else new)
    return tuple(found)


@contextmanager
def unread() -> Iterator[None]:
    """While it lasts, the predictor knows no lexicon: names are asked in their own plain words."""
    with patch.object(serving, "lexicon", lambda: Lexicon([])):
        yield


def pck(predictor: Predictor, samples: Sequence[Sample], schema: KeypointSchema, names: Sequence[str]) -> float:
    """Share of the points within `NEAR` when they are asked for by these names."""
    asked, near = KeypointSchema(tuple(names)), []
    for sample in samples:
        truth = sample.keypoints
        (found,) = predictor.predict([sample.read()], asked, boxes=[truth.box], prompt="text")
        near += (measure(replace(found, names=schema.names), truth, truth.placed).distance <= NEAR).tolist()
    return float(np.mean(near))


def measure_folder(predictor: Predictor, folder: Path, part: str, queries: int, seed: int) -> dict[str, dict[str, float]]:
    """style → {"changed", "read", "raw"}. DataError if no sample with a box is left."""
    data = load_coco(folder)
    unseen = held_out(s.group for s in data.samples)
    usable = [s for s in data.samples if s.keypoints.box is not None and s.keypoints.placed.any() and (part == "all" or s.group in unseen)]
    if not usable:
        raise DataError(f"{folder} has no {part} sample with points in a box. Try --part all.")
    rng = np.random.default_rng(seed)
    samples = [usable[i] for i in rng.permutation(len(usable))[:queries]]
    schema, found = data.schema, {}
    for style in STYLES:
        names = written(schema.names, style, rng)
        same = [plain_words(new) == lexicon().canonical(old) for new, old in zip(names, schema.names, strict=True)]
        found[style] = {"changed": 1 - float(np.mean(same)), "read": pck(predictor, samples, schema, names)}
        with unread():
            found[style]["raw"] = pck(predictor, samples, schema, names)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/lexicon.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="DIR", help="folder with COCO keypoints; may be repeated")
    parser.add_argument("--model", default="nano", help="a preset or a checkpoint folder")
    parser.add_argument("--part", choices=("heldout", "all"), default="heldout", help="of the folder")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args(arguments)
    report = {}
    try:
        predictor = load_predictor(options.model)
        for folder in options.data:
            report[folder.name] = found = measure_folder(predictor, folder, options.part, options.queries, options.seed)
            for style, f in found.items():
                print(f"{folder.name:24} {style:10} changed {f['changed']:.2f}  read {f['read']:.3f}  raw {f['raw']:.3f}", flush=True)
    except KptError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    if options.out:
        options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
