"""Words: one reading of many spellings, and segments that are written and read back."""

from __future__ import annotations

import pytest

from kptllm_core.config import model_folder
from kptllm_core.language import KEYPOINT, MAX_NAME_TOKENS, load_tokenizer, plain_words, read_name, write_questions


@pytest.mark.parametrize("name", ["left_eye", "LeftEye", "eye (left)", "l_eye", "eyeL", "Eye-Left", "left eye", "LEye"])
def test_one_point_reads_the_same_however_it_is_spelled(name: str) -> None:
    assert plain_words(name) == "left eye"


def test_numbers_and_other_scripts_stay() -> None:
    assert plain_words("forelegR1") == "right foreleg 1"
    assert plain_words("左目") == "左目"
    assert plain_words("vein_landmark_12") == "vein landmark 12"
    assert plain_words("??") == "??"


@pytest.mark.parametrize("name", ["right hind paw", "œil", "左目", "x"])
def test_a_written_name_reads_back(name: str, tiny_model: str) -> None:
    tokenizer = load_tokenizer(model_folder(tiny_model))
    questions = write_questions(tokenizer, [name, None], [True, False])
    assert questions.named.tolist() == [True, False]
    assert questions.length[1] == 4  # <ask> <none> <is> <keypoint>
    assert read_name(tokenizer, questions.tokens[0, 3:].tolist()) == name
    assert questions.tokens[0, questions.length[0] - 1] == tokenizer.convert_tokens_to_ids(KEYPOINT)


def test_a_very_long_name_is_cut(tiny_model: str) -> None:
    tokenizer = load_tokenizer(model_folder(tiny_model))
    assert write_questions(tokenizer, ["q " * 500], [True]).length[0] == 4 + MAX_NAME_TOKENS
