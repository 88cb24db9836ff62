"""The templates are configs that Label Studio accepts, that parse makes sense of, and whose keys and colours serve a person."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from kptllm_core.errors import NotFound, SchemaError
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from label_config import load_template, template_names
from label_config.checks import check_prediction
from label_config.regions import to_prediction
from label_config.schema import parse
from label_config.writer import HOTKEYS, OCCLUDED_HOTKEY, config_of

# Label Studio 1.23's own keys on an image (its keymap): a label that took one would switch tools instead.
TAKEN = {"b", "e", "h", "k", "m", "o", "p", "r", "u", "v", "w", "[", "]", "shift+r", "shift+1", "shift+2"}
CONFIGS = {name: load_template(name) for name in template_names()} | {
    "written": config_of(KeypointSchema(("top <left>", 'a "quoted" & odd one'), "thing", ((0, 1),))),
    "written with boxes": config_of(KeypointSchema(tuple(f"p{i}" for i in range(60)), "thing"), box=True),
}


def test_there_is_one_for_each_kind_of_object() -> None:
    assert template_names() == ["animal", "face", "hand", "insect", "person", "rigid_object", "several_objects"]
    with pytest.raises(NotFound, match=r"'../x'.*Known: animal, face"):
        load_template("../x")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sdk_accepts_config_and_predictions(name: str) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    interface(CONFIGS[name]).validate()
    config = parse(CONFIGS[name])
    (kp,) = config.controls
    count = len(kp.schema)
    xy = np.random.default_rng(0).random((count, 2)) * [300, 200]
    found = KeypointSet(kp.schema.names, xy, [1, 2] * (count // 2) + [2] * (count % 2), np.full(count, 0.5))
    check_prediction(CONFIGS[name], to_prediction(config, [(kp, found)], 300, 200, "v"))


@pytest.mark.parametrize("name", template_names())
def test_what_the_parser_makes_of_it(name: str) -> None:
    config = parse(CONFIGS[name])
    (kp,) = config.controls
    assert (
        config.notes == ()
        and kp.occluded == "visibility"
        and kp.image_key == "image"
        and kp.schema.category != "object"
    )
    sided = [n for n in kp.schema.names if n.startswith(("left_", "right_"))]
    assert 2 * len(kp.schema.symmetric) == len(sided)
    reached = {0}
    for _ in kp.schema.names:
        reached |= {i for pair in kp.schema.skeleton for i in pair if reached & set(pair)}
    assert len(reached) == len(kp.schema), "the skeleton leaves points out"
    assert (kp.box is not None) == (name == "several_objects") == kp.find_objects
    index = [e.get("model_index") for e in ElementTree.fromstring(CONFIGS[name]).iter("Label") if e.get("model_index")]
    assert index == [str(i) for i in range(len(kp.schema))]


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_colours(name: str) -> None:
    root = ElementTree.fromstring(CONFIGS[name])
    keys = [key for e in root.iter() if (key := e.get("hotkey"))]
    assert len(keys) == len(set(keys)) and not TAKEN & set(keys) and OCCLUDED_HOTKEY in keys
    assert len(keys) >= min(20, len(parse(CONFIGS[name]).controls[0].schema))
    colours = [e.get("background", "") for e in root.iter("Label")]
    assert len(set(colours)) == len(colours) and all(re.fullmatch("#[0-9a-f]{6}", c) for c in colours)


@pytest.mark.parametrize("name", template_names())
def test_left_is_blue_and_right_is_orange(name: str) -> None:
    for label in ElementTree.fromstring(CONFIGS[name]).iter("Label"):
        red, blue = (int(label.get("background", "")[i : i + 2], 16) for i in (1, 5))
        side = label.get("value", "").partition("_")[0]
        assert (blue > red) if side == "left" else (red > blue) if side == "right" else True


def test_the_keys_are_free_and_unique() -> None:
    assert len(set(HOTKEYS)) == len(HOTKEYS) and not ({*TAKEN, OCCLUDED_HOTKEY} & set(HOTKEYS))


def test_camel_case_sides_get_their_colours() -> None:
    root = ElementTree.fromstring(config_of(KeypointSchema(("eyeR", "eyeL"), symmetric=((0, 1),))))
    right, left = (label.get("background", "") for label in root.iter("Label"))
    assert int(left[5:7], 16) > int(left[1:3], 16) and int(right[1:3], 16) > int(right[5:7], 16)


@pytest.mark.parametrize("name", ["a\x00b", " ", "\ud800", "\ufffe"])
def test_names_that_no_config_can_hold(name: str) -> None:
    with pytest.raises(SchemaError, match="cannot stand in a label config"):
        config_of(KeypointSchema((name, "b")))
