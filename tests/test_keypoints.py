"""The value types: what they refuse, and that JSON brings them back."""

from __future__ import annotations

import numpy as np
import pytest

from kptllm_core.errors import InvalidInput, SchemaError
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility, symmetric_pairs


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("left_eye", "right_eye", "nose"), ((0, 1),)),
        (("eyeL", "eyeR", "forelegR1", "forelegL1", "forelegL2"), ((0, 1), (2, 3))),
        (("eye (left)", "eye (right)"), ((0, 1),)),
        (("LShoulder", "RShoulder"), ()),  # one word: no side can be read off safely
        (("head", "tail"), ()),
        (("oeil gauche", "oeil droit"), ((0, 1),)),
        (("patte gauche", "patte droite", "main droit"), ((0, 1),)),
        (("left_eye_l", "left_eye_r", "right_eye_l", "right_eye_r"), ((0, 3), (1, 2))),
    ],
)
def test_symmetric_pairs_are_read_from_names(names: tuple[str, ...], pairs: tuple[tuple[int, int], ...]) -> None:
    assert symmetric_pairs(names) == pairs


def test_a_mirror_is_its_own_inverse() -> None:
    schema = KeypointSchema(("a", "left_b", "right_b"), symmetric=((1, 2),))
    assert schema.mirror().tolist() == [0, 2, 1]
    assert schema.mirror()[schema.mirror()].tolist() == [0, 1, 2]


def test_pairs_that_share_a_point_leave_a_mirror_a_permutation() -> None:
    schema = KeypointSchema(("a", "b", "c", "d"), symmetric=((0, 1), (0, 2), (1, 3), (2, 3)))
    assert schema.mirror().tolist() == [1, 0, 3, 2]


def test_a_set_without_points_knows_none_of_them() -> None:
    nothing = KeypointSet((), np.zeros((0, 2)), np.zeros(0)).reorder(("a", "b"))
    assert nothing.names == ("a", "b") and not nothing.placed.any()


@pytest.mark.parametrize("bad", [(), ("a", "a")])
def test_a_schema_without_or_with_double_names_is_refused(bad: tuple[str, ...]) -> None:
    with pytest.raises(SchemaError):
        KeypointSchema(bad)


def test_an_unknown_name_says_which_are_known() -> None:
    with pytest.raises(SchemaError, match=r"'ear' is not in the schema. Known: nose, tail"):
        KeypointSchema(("nose", "tail")).index("ear")


def test_json_brings_both_back() -> None:
    schema = KeypointSchema(("nose", "léft ear"), "cat", ((0, 1),))
    points = KeypointSet(schema.names, np.array([[1.25, 2], [3, 4]]), np.array([2, 3]), np.array([0.5, 0.25]), np.array([0, 0, 9, 9]))
    assert KeypointSchema.from_json(schema.to_json()) == schema
    again = KeypointSet.from_json(points.to_json())
    assert again.to_json() == points.to_json()
    assert again.visibility.tolist() == [Visibility.VISIBLE, Visibility.ABSENT]


def test_reordering_keeps_points_with_their_names() -> None:
    points = KeypointSet(("a", "b"), np.array([[1.0, 1], [2, 2]]), np.array([2, 1]))
    swapped = points.reorder(("b", "c", "a"))
    assert swapped.xy[[0, 2]].tolist() == [[2, 2], [1, 1]]
    assert swapped.visibility.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "change", [{"xy": [[1, 2]]}, {"xy": [[1, float("nan")], [0, 0]]}, {"visibility": [7, 2]}, {"score": [1]}, {"box": [1, 2]}, {"extra": 1}]
)
def test_bad_sets_are_refused(change: dict[str, object]) -> None:
    good = {"names": ["a", "b"], "xy": [[1, 2], [3, 4]], "visibility": [2, 2]}
    with pytest.raises(InvalidInput):
        KeypointSet.from_json({**good, **change})


def test_a_ragged_list_is_said_to_be_one() -> None:
    with pytest.raises(InvalidInput, match="xy must be numbers of shape"):
        KeypointSet.from_json({"names": ["a", "b"], "xy": [[1, 2], [3]], "visibility": [2, 2]})
