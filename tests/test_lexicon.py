"""The lexicon: every name of the data is known in many forms, and each form reads back to the same point."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import kptllm_core.lexicon
from kptllm_core.language import plain_words
from kptllm_core.lexicon import LANGUAGES, STYLES, lexicon

TABLES = sorted(Path(kptllm_core.lexicon.__file__).parent.glob("*.tsv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_tables_are_whole(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows[0] == ["en", "synonyms", *LANGUAGES, "where"]
    assert all(len(row) == len(rows[0]) and row[0] == row[0].strip().lower() for row in rows[1:])
    assert len({row[0] for row in rows}) == len(rows)
    assert sum(not row[2] for row in rows) == 0, "every concept has a German name"


@pytest.mark.parametrize(
    "name",
    ["left_eye", "LeftEye", "eye (left)", "l_eye", "linkes Auge", "ojo izquierdo", "œil gauche", "左眼", "левый глаз", "left oculus"],
)
def test_one_point_in_many_forms_is_one_point(name: str) -> None:
    assert lexicon().canonical(name) == "left eye"


def test_unknown_words_stay_and_numbers_keep_their_place() -> None:
    assert lexicon().canonical("frobnicator_3") == "frobnicator 3"
    assert lexicon().canonical("forelegR2") == "right foreleg 2"
    assert lexicon().canonical("???") == "???"


def test_what_is_written_in_another_language_reads_back() -> None:
    """Some words mean two parts (hip and thigh in Russian), so not all can; almost all of simple parts do."""
    rng = np.random.default_rng(0)
    parts = ["nose", "left ear", "right eye", "left knee", "wrist", "beak tip", "tail base", "thorax", "antenna tip", "chin tip"]
    back = [lexicon().canonical(lexicon().write(p, s, rng)) == lexicon().canonical(p) for p in parts for s in (*LANGUAGES, "synonyms")]
    assert np.mean(back) > 0.9


def test_a_description_keeps_the_side() -> None:
    text = lexicon().write("right_front_hoof", "where", np.random.default_rng(0))
    assert "right" in text.split() and len(text.split()) > 4


def test_every_style_gives_words_for_any_name() -> None:
    rng = np.random.default_rng(0)
    assert {lexicon().style(rng) for _ in range(500)} == set(STYLES)
    for style in STYLES:
        assert lexicon().write("zork_7", style, rng) == plain_words("zork_7")


def test_the_names_of_rendered_categories_have_synonyms() -> None:
    from kptllm_core.synthetic import Category

    rng = np.random.default_rng(0)
    names = {n for seed in range(40) for n in Category.from_seed(seed).schema.names}
    other = [lexicon().write(n, "synonyms", rng) != plain_words(n) for n in names]
    assert np.mean(other) > 0.4
