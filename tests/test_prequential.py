"""What a prediction is worth against what a person made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backend.prequential import measure
from backend.served import control_row
from backend_world import CONFIG, WITH_BOX, rectangle, region
from kptllm_core.keypoints import KeypointSet
from label_config.schema import parse

NAMES = ("nose", "tail", "ear")
TRUTH = np.array([[6.4, 24.0], [19.2, 24.0], [32.0, 24.0]])  # pixels of the three regions below; an object of 30.7 pixels
RESULT = [region(name, 10.0 + 20 * i, 50.0) for i, name in enumerate(NAMES)]


def predicted(*objects: Any, config: str = CONFIG, visible: tuple[int, ...] = (2, 2, 2)) -> dict[str, Any]:
    (control,) = parse(config).controls
    sets = [KeypointSet(NAMES, np.array(xy, float), np.array(visible)) for xy in objects]
    return {"kp:image": control_row(control, sets, [], (64, 48))}


def test_points_near_enough_and_points_to_be_moved() -> None:
    found = measure(parse(CONFIG), RESULT, predicted(TRUTH + [[0, 0], [0, 1.0], [0, 6.0]]))
    assert found is not None
    assert (found["points"], found["near"], found["moved"]) == (3, 2, 1)
    assert found["pck"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["error"] == pytest.approx((0 + 1 + 6) / 3 / 30.72, abs=1e-4)
    assert found["beyond"] == pytest.approx((0 + (1 / 30.72 - 0.02) + (6 / 30.72 - 0.02)) / 3, abs=1e-4)


def test_the_order_of_the_names_does_not_matter() -> None:
    (control,) = parse(CONFIG).controls
    turned = KeypointSet(NAMES[::-1], TRUTH[::-1], np.full(3, 2))
    found = measure(parse(CONFIG), RESULT, {"kp:image": control_row(control, [turned], [], (64, 48))})
    assert found is not None and found["error"] == pytest.approx(0.0, abs=1e-4)


def test_a_point_that_was_not_predicted_counts_as_a_whole_object_off() -> None:
    found = measure(parse(CONFIG), RESULT, predicted(TRUTH, visible=(2, 3, 2)))
    assert found is not None and (found["near"], found["error"]) == (2, pytest.approx(1 / 3, abs=1e-4))
    assert measure(parse(CONFIG), RESULT, {}) == {"points": 3, "near": 0, "moved": 3, "pck": 0.0, "error": 1.0, "beyond": 0.98}


def test_a_point_that_a_person_took_away_is_not_asked_for() -> None:
    found = measure(parse(CONFIG), RESULT[:2], predicted(TRUTH))
    assert found is not None and found["points"] == 2
    assert measure(parse(CONFIG), [], predicted(TRUTH)) is None


def test_of_several_objects_each_is_measured_by_its_own() -> None:
    two = [rectangle(5, 40, 40, 20), rectangle(55, 40, 40, 20)]
    result = two + [region(n, x + 10 * i, 50.0, id=f"{n}{x}") for x in (10.0, 60.0) for i, n in enumerate(NAMES)]
    left = np.array([[6.4, 24.0], [12.8, 24.0], [19.2, 24.0]])
    found = measure(parse(WITH_BOX), result, predicted(left + [32.0, 0], left, config=WITH_BOX))
    assert found is not None and (found["points"], found["moved"], found["error"]) == (6, 0, pytest.approx(0.0, abs=1e-4))
    alone = measure(parse(WITH_BOX), result, predicted(left, config=WITH_BOX))
    assert alone is not None and (alone["points"], alone["moved"]) == (6, 3)


def test_labels_that_the_config_does_not_know_any_more_are_left_out() -> None:
    renamed = parse(CONFIG.replace('"nose"', '"muzzle"'))
    found = measure(renamed, RESULT, predicted(TRUTH))
    assert found is not None and (found["points"], found["moved"]) == (2, 0)
