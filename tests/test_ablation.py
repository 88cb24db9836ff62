"""Parts that are switched off change answers, and come back unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kptllm_core.ablation import ABLATIONS, without
from kptllm_core.dataset import load_coco
from kptllm_core.errors import InvalidInput
from kptllm_core.evaluate import Options, evaluate, load_categories
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.predictor import Example, Predictor
from kptllm_core.report import remarks

Scene = tuple[list[np.ndarray], KeypointSchema, list[Example], list[np.ndarray]]


@pytest.fixture(scope="module")
def scene(coco_folder: Path) -> Scene:
    samples = load_coco(coco_folder).samples[:3]
    boxes = [np.asarray(s.keypoints.box) for s in samples[1:]]
    return [s.read() for s in samples[1:]], samples[0].schema, [Example(samples[0].read(), samples[0].keypoints)], boxes


def answers(predictor: Predictor, scene: Scene, *parts: str, prompt: str = "both") -> list[KeypointSet]:
    images, schema, support, boxes = scene
    with without(predictor, parts) as asked:
        return asked.predict(images, schema, support, boxes, prompt)


def same(one: list[KeypointSet], other: list[KeypointSet]) -> bool:
    return all(np.array_equal(a.xy, b.xy) and np.array_equal(a.score, b.score) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("part", list(ABLATIONS))
def test_a_part_matters_while_it_is_off_and_comes_back(part: str, predictor: Predictor, scene: Scene) -> None:
    weights = {name: value.clone() for name, value in predictor.model.state_dict().items()}
    before = answers(predictor, scene)
    assert not same(answers(predictor, scene, part), before)
    assert same(answers(predictor, scene), before)
    after = predictor.model.state_dict()
    assert list(after) == list(weights) and all((after[n] == v).all() for n, v in weights.items())


def test_parts_come_back_after_an_error(predictor: Predictor, scene: Scene) -> None:
    before = answers(predictor, scene)
    with pytest.raises(ZeroDivisionError), without(predictor, list(ABLATIONS)):
        raise ZeroDivisionError
    assert same(answers(predictor, scene), before)


def test_what_each_leaves_as_it_is(predictor: Predictor, scene: Scene) -> None:
    images, schema, support, boxes = scene
    visual = predictor.predict(images, schema, support, boxes, "visual")
    assert same(answers(predictor, scene, "identify"), visual)
    assert same(answers(predictor, scene, "identify", prompt="visual"), visual)
    whole, straight = answers(predictor, scene), answers(predictor, scene, "refinement")
    assert all(np.array_equal(a.score, b.score) for a, b in zip(whole, straight, strict=True))
    assert not np.array_equal(whole[0].xy, straight[0].xy)


def test_mistakes(predictor: Predictor, scene: Scene) -> None:
    with pytest.raises(InvalidInput, match=r"--without decoder is not known. Expected one of: identify, extractor"):
        answers(predictor, scene, "decoder", "llm")
    with pytest.raises(InvalidInput, match="nothing to ask by text"):
        answers(predictor, scene, "identify", prompt="text")


def test_evaluate_says_what_was_off(predictor: Predictor, coco_folder: Path) -> None:
    categories = load_categories([coco_folder])
    report = evaluate(predictor, categories, Options(without=("llm", "refinement"), episodes=1, queries=2))
    assert report["arguments"]["without"] == ["llm", "refinement"] and report["base"] == predictor.base
    assert "The model answered without llm, refinement, though it was trained with it." in remarks(report)
    assert remarks(evaluate(predictor, categories, Options(episodes=1, queries=2))) == []
    named = evaluate(predictor, categories, Options(task="name", without=("extractor",), episodes=1, queries=1))
    assert named["points"] > 0
