"""Frozen examples: which size of an image their points refer to."""

from __future__ import annotations

from backend.examples import frozen
from backend_world import region
from kptllm_core.keypoints import KeypointSet
from label_config.schema import parse

SIDES = "".join(f'<Image name="{side}" value="${side}"/><KeyPointLabels name="{side}_kp" toName="{side}"><Label value="nose"/></KeyPointLabels>'
                for side in ("left", "right"))  # fmt: skip


def test_the_size_that_an_annotation_states_is_that_of_the_controls_own_image() -> None:
    left, right = parse(f"<View>{SIDES}</View>").controls
    nose = KeypointSet(("nose",), [[5, 5]], [2])
    result = [region("nose", 5, 5, from_name="left_kp", to_name="left", original_width=640, original_height=480),
              region("nose", 5, 5, from_name="right_kp", to_name="right", original_width=100, original_height=300)]  # fmt: skip
    assert [frozen(c, "u", nose, result, {})["size"] for c in (left, right)] == [[640, 480], [100, 300]]
    assert frozen(right, "u", nose, result[:1], {})["size"] is None
    assert frozen(right, "u", nose, result, {"width": 10, "height": 30})["size"] == [10, 30]  # the image itself knows best
