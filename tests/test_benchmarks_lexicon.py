"""benchmarks/lexicon.py: what the lexicon reads back is asked by its canonical name; without it the model sees what was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lexicon import STYLES, main, unread, written
from kptllm_core import passes


def test_names_of_a_style_stay_different_and_numbers_say_nothing() -> None:
    names = ("left eye", "right eye", "nose", "tail_base")
    for style in STYLES:
        assert len(set(written(names, style, np.random.default_rng(0)))) == 4
    assert written(names, "de", np.random.default_rng(0))[2].lower() == "nase"
    assert written(names, "numbers", np.random.default_rng(0))[3] == "point 3"


def test_only_while_it_lasts_no_name_is_read() -> None:
    with unread():
        assert passes.lexicon().canonical("Nase") == "nase"
    assert passes.lexicon().canonical("Nase") == "nose"


def test_every_style_is_asked_read_and_raw(coco_folder: Path, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lexicon.json"
    call = ["--data", str(coco_folder), "--model", tiny_model, "--queries", "1", "--out", str(out)]
    assert main([*call, "--part", "all"]) == 0
    (found,) = json.loads(out.read_text(encoding="utf-8")).values()
    assert tuple(found) == STYLES
    assert found["canonical"]["changed"] == 0 and found["canonical"]["read"] == found["canonical"]["raw"]
    assert found["numbers"]["changed"] == 1
    assert main(["--data", str(tmp_path), "--model", tiny_model]) == 2
    assert capsys.readouterr().err.startswith("error: ")
