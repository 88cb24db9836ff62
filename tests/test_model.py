"""What the architecture promises: one pass for K points equals K passes, order does not matter, adapters come and go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kptllm_core.adapters import AdapterSwitch, adapter_state, add_lora
from kptllm_core.checkpoint import load_checkpoint
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.decoder import Answer, peak, robust_fit, similarity_fit
from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import similarity_crop
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.language import write_questions
from kptllm_core.model import Asked, KptLLM, block_mask, packed
from kptllm_core.passes import Passes
from kptllm_core.predictor import Example, Predictor, load_predictor
from kptllm_core.synthetic import Category

SAME = 2e-3  # pixels: what float32 sums in another order may differ by


@pytest.fixture(scope="module")
def scene() -> tuple[KeypointSchema, list[Example]]:
    rng = np.random.default_rng(3)
    category = Category.sample(rng)
    return category.schema, [Example(*category.render(rng, 128)) for _ in range(4)]


def shuffled(schema: KeypointSchema, order: np.ndarray) -> KeypointSchema:
    return KeypointSchema(tuple(schema.names[i] for i in order), schema.category)


@pytest.mark.parametrize("prompt", ["visual", "text", "both"])
def test_one_pass_for_all_points_equals_one_pass_for_each(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]], prompt: str) -> None:
    schema, examples = scene
    image, box = examples[2].image, examples[2].keypoints.box
    support = [] if prompt == "text" else examples[:2]

    def ask(names: tuple[str, ...]) -> np.ndarray:
        return predictor.predict([image], schema, support, [box], prompt, asked=names)[0].xy

    # Every point but one is asked in one pass: a partial question, so the refinement over the complete schema stays out.
    names = schema.names[:-1]
    together = ask(names)
    apart = np.concatenate([ask((n,)) for n in names])
    assert np.abs(together - apart).max() < SAME


@pytest.mark.parametrize("prompt", ["visual", "text", "both"])
def test_the_order_of_points_changes_nothing(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]], prompt: str) -> None:
    schema, examples = scene
    order = np.random.default_rng(1).permutation(len(schema))
    mixed = shuffled(schema, order)
    support = [] if prompt == "text" else examples[:2]
    turned = [Example(e.image, e.keypoints.reorder(mixed.names)) for e in support]
    for box in (examples[2].keypoints.box, None):
        straight = predictor.predict([examples[2].image], schema, support, [box], prompt)[0]
        other = predictor.predict([examples[2].image], mixed, turned, [box], prompt)[0]
        assert np.abs(other.reorder(schema.names).xy - straight.xy).max() < SAME
        assert np.allclose(other.reorder(schema.names).score, straight.score, atol=1e-4)


def test_the_order_of_shots_changes_nothing(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]]) -> None:
    schema, examples = scene
    a, b = (predictor.predict([examples[3].image], schema, shots, [examples[3].keypoints.box])[0] for shots in (examples[:3], examples[2::-1]))
    assert np.abs(a.xy - b.xy).max() < SAME


def test_images_in_a_batch_do_not_see_each_other(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]]) -> None:
    schema, examples = scene
    images, boxes = [e.image for e in examples[1:]], [e.keypoints.box for e in examples[1:]]
    batch = predictor.predict(images, schema, examples[:1], boxes)
    alone = [predictor.predict([i], schema, examples[:1], [b])[0] for i, b in zip(images, boxes, strict=True)]
    assert max(np.abs(x.xy - y.xy).max() for x, y in zip(batch, alone, strict=True)) < SAME


def test_a_click_is_a_hard_constraint(predictor: Predictor, scene: tuple[KeypointSchema, list[Example]]) -> None:
    schema, examples = scene
    target = examples[2]
    click = np.zeros((len(schema), 2), np.float32)
    click[1] = target.keypoints.xy[1]
    state = np.full(len(schema), Visibility.NOT_LABELLED)
    state[1] = Visibility.VISIBLE
    fixed = KeypointSet(schema.names, click, state)
    free, held = (predictor.predict([target.image], schema, examples[:1], [target.keypoints.box], fixed=[f])[0] for f in (None, fixed))
    assert np.abs(held.xy[1] - click[1]).max() < 1e-2
    assert np.abs(held.xy - free.xy).max() > 0


def test_questions_are_packed_without_their_padding() -> None:
    place, used = packed(torch.tensor([[2, 0, 3], [1, 1, 0]]), 4)
    assert place[0].tolist() == [0, 1, 8, 9, 10] and used[0].all()
    assert place[1, :2].tolist() == [0, 4] and used[1].tolist() == [True, True, False, False, False]
    mask = block_mask(1, torch.ones(2, 0, dtype=torch.bool), place // 4, used)[0, 0]
    assert mask[1:, 0].all() and mask[2, 1] and not mask[1, 2] and not mask[3:, 1:3].any() and mask[5, 3:6].all()


def test_lora_leaves_base_weights_untouched_and_an_adapter_comes_back(tmp_path: Path, coco_folder: Path, tiny_model: str,
                                                                     scene: tuple[KeypointSchema, list[Example]]) -> None:  # fmt: skip
    from kptllm_core.checkpoint import ADAPTER, load_checkpoint
    from kptllm_core.loop import Recipe
    from kptllm_core.train import ADAPT, train_adapter

    schema, examples = scene
    untouched = load_checkpoint(tiny_model).model.state_dict()
    loaded = load_checkpoint(tiny_model)
    recipe = Recipe(**{**vars(ADAPT), "workers": 0})
    metrics = train_adapter(tiny_model, [coco_folder], tmp_path / "adapter", steps=4, recipe=recipe, loaded=loaded)
    assert metrics["steps"] == 4
    assert (tmp_path / "adapter" / ADAPTER).stat().st_size < 8_000_000
    after = {k.replace(".base_layer", ""): v for k, v in loaded.model.state_dict().items()}
    frozen = [k for k in untouched if k.startswith("llm.")]
    assert len(frozen) > 15
    assert all(torch.equal(untouched[k], after[k]) for k in frozen)
    assert any("lora_B" in k and v.abs().max() > 0 for k, v in after.items())

    def predict(predictor: Predictor) -> KeypointSet:
        return predictor.predict([examples[2].image], schema, examples[:1], [examples[2].keypoints.box])[0]

    fresh = load_predictor(tiny_model, device="cpu")
    base = predict(fresh)
    fresh.use_adapter(tmp_path / "adapter")
    adapted = predict(fresh)
    assert np.abs(adapted.xy - base.xy).max() > 0
    second = load_predictor(tiny_model, tmp_path / "adapter", device="cpu")
    assert np.array_equal(predict(second).xy, adapted.xy)
    fresh.use_adapter(None)
    assert np.array_equal(predict(fresh).xy, base.xy)


def test_an_empty_adapter_is_the_base(tiny_model: str) -> None:
    from kptllm_core.checkpoint import load_checkpoint

    model = load_checkpoint(tiny_model).model
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        before = model.encode(images)
    add_lora(model)
    AdapterSwitch(model)
    model.eval()
    with torch.inference_mode():
        after = model.encode(images)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(adapter_state(model)) > 50


def test_a_soft_argmax_finds_what_a_gaussian_hides() -> None:
    at = torch.tensor([[[0.31, 0.72], [0.5, 0.1]]])
    cells = (torch.arange(40) + 0.5) / 40
    heat = -800 * ((cells[None, :] - at[..., 0, None, None]) ** 2 + (cells[:, None] - at[..., 1, None, None]) ** 2)
    assert (peak(heat) - at).abs().max() < 0.25 / 40


def test_the_layout_is_fitted_to_a_turned_object() -> None:
    rng = np.random.default_rng(0)
    layout = rng.random((6, 2))
    angle = np.deg2rad(70)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    there = (layout - 0.5) @ turn.T * 0.7 + 0.4
    wrong = there.copy()
    wrong[2] += 0.3
    weight = np.ones(6)
    weight[2] = 0
    put = [torch.tensor(a, dtype=torch.float32)[None] for a in (layout, wrong, weight)]
    assert np.abs(similarity_fit(*put)[0].numpy() - there).max() < 0.02
    put[2] = torch.ones(1, 6)  # nobody says which point is wrong
    plain, robust = (np.abs(fit(*put)[0].numpy() - there).max() for fit in (similarity_fit, robust_fit))
    assert robust < 0.05 < plain


def test_one_point_alone_is_expected_where_it_was_found() -> None:
    one = torch.tensor([[[0.3, 0.6]]])
    torch.testing.assert_close(robust_fit(torch.full((1, 1, 2), 0.5), one, torch.ones(1, 1)), one)


def test_backbones_of_transformers_load_from_their_own_format(tmp_path: Path) -> None:
    """The real loading path of the larger presets, on small checkpoints saved in the same format."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = AutoModel.from_config(AutoConfig.for_model("dinov2", **sizes, patch_size=14, image_size=56))
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                                num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    vision.save_pretrained(tmp_path / "vision")
    llm.bfloat16().save_pretrained(tmp_path / "llm")  # as most of the hub's are
    small = ModelConfig.load(model_folder("tiny"))
    config = ModelConfig(**{**vars(small), "name": "mixed", "vision": {"type": "transformers", "hub": str(tmp_path / "vision")},
                            "llm": {"hub": str(tmp_path / "llm")}})  # fmt: skip
    model = KptLLM(config, 600).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.vision.backbone.layernorm.weight, vision.layernorm.weight)
    with torch.inference_mode():
        features = model.encode(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8))
        xy = torch.rand(2, 1, 5, 2)
        support = model.support(model.show([features], xy, torch.ones(2, 1, 5, dtype=torch.bool)))
        heat = model.locate(features, support, torch.zeros(2, 5, model.dim), model.correlate(features, support))
    assert [tuple(f.shape[-2:]) for f in features] == [(16, 16), (8, 8), (4, 4)]
    # Before any training, correlation alone finds each point in its own image.
    assert (peak(heat) - xy[:, 0]).norm(dim=-1).median() < 0.15


def test_more_questions_than_a_pass_holds_are_answered_the_same(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_checkpoint(tiny_model)
    names = ["nose", "left front paw", "tail", "ear", "eye", "neck", "hoof"]
    asked = Asked.of(write_questions(found.tokenizer, names, [True] * 7), 2, torch.device("cpu"))
    with torch.inference_mode():
        features = found.model.encode(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8))
        support = found.model.support(found.model.show([features], torch.rand(2, 1, 7, 2), torch.ones(2, 1, 7, dtype=torch.bool)))
        whole = found.model.ask(features, support, support.token, asked)
        monkeypatch.setattr("kptllm_core.model.MAX_TOKENS", 3 * asked.tokens.shape[-1])
        parts = found.model.ask(features, support, support.token, asked)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_point_that_the_others_expect_beyond_the_border_is_absent(tiny_model: str) -> None:
    """But a person's click is never overruled, and two others do not tell how the object is turned."""
    predictor, names = load_predictor(tiny_model), ["nose", "tail", "ear", "paw"]
    crop, image = similarity_crop(np.array([32.0, 32.0]), 64.0, predictor.size), np.zeros((64, 64, 3), np.uint8)
    expected = torch.tensor([[[-0.1, 0.5], [0.5, 1.1], [0.5, 0.5], [0.2, 0.2]]])
    told = Answer(torch.full((1, 4, 2), 0.5), torch.zeros(1, 4, 4, 4), torch.tensor([0.0, 9.0, 0.0]).expand(1, 4, 3),
                  torch.zeros(1, 4), expected, torch.ones(1, 4))  # fmt: skip
    points = predictor.passes.set_of(names, told, 0, crop, image, np.array([False, True, False, False]), True)
    assert points.visibility.tolist() == [Visibility.ABSENT, *[Visibility.VISIBLE] * 3]
    few = predictor.passes.set_of(names[:3], Answer(*(t[:, :3] for t in told)), 0, crop, image, np.zeros(3, bool), True)
    assert (few.visibility == Visibility.VISIBLE).all()


@pytest.mark.parametrize(("count", "taught", "said"), [(3, False, Visibility.VISIBLE), (3, True, Visibility.ABSENT), (4, False, Visibility.ABSENT)])
def test_whether_one_of_few_points_is_absent_only_a_round_teaches(tiny_model: str, count: int, taught: bool, said: Visibility) -> None:
    predictor = load_predictor(tiny_model)
    crop, image = similarity_crop(np.array([32.0, 32.0]), 64.0, predictor.size), np.zeros((64, 64, 3), np.uint8)
    middle = torch.full((1, count, 2), 0.5)
    states = torch.tensor([0.0, 1.0, 9.0]).expand(1, count, 3)
    told = Answer(middle, torch.zeros(1, count, 4, 4), states, torch.zeros(1, count), middle, torch.ones(1, count))
    points = predictor.passes.set_of(["nose", "tail", "ear", "paw"][:count], told, 0, crop, image, np.zeros(count, bool), taught)
    assert (points.visibility == said).all()


def test_one_point_is_named_by_the_whole_image_and_points_apart_by_what_is_around_them(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[float] = []
    monkeypatch.setattr(Passes, "encode", lambda self, images, crops, real=Passes.encode: sides.extend(self.size / c.scale for c in crops)
                        or real(self, images, crops))  # fmt: skip
    image = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    for xy in ([[100, 100]], [[100, 100], [103, 104]], [[50, 50], [150, 100]]):
        assert len(predictor.name_points(image, np.array(xy), candidates=["nose", "tail"])) == len(xy)
    predictor.name_points(image, np.array([[100, 100]]), box=np.array([80, 80, 40, 40]))
    assert sides == pytest.approx([300, 300, 150, 50])


def test_many_names_are_chosen_from_some_at_a_time(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    names = ["nose", "tail", "left front paw", "wing tip", "eye"]
    at_once = predictor.name_points(image, np.array([[10, 10], [70, 80]]), candidates=names)
    monkeypatch.setattr("kptllm_core.naming.NAMES", 2)
    in_parts = predictor.name_points(image, np.array([[10, 10], [70, 80]]), candidates=names)
    assert [n for n, _ in in_parts] == [n for n, _ in at_once]
    assert [c for _, c in in_parts] == pytest.approx([c for _, c in at_once], abs=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tiny_model: str) -> None:
    with pytest.raises(InvalidInput, match="torch finds no CUDA here"):
        load_predictor(tiny_model, device="cuda")
