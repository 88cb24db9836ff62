"""Two people on the same image: how far apart they are, point by point."""

from __future__ import annotations

from backend.agreement import Reading, disagreement
from kptllm_core.keypoints import KeypointSet

NAMES = ("nose", "tail")


def reading(task: int, who: str, nose: tuple[float, float], tail: tuple[float, float] | None) -> Reading:
    points = KeypointSet(NAMES, [nose, tail or (0, 0)], [2, 2 if tail else 0], box=(0, 0, 100, 50))
    return Reading(task, who, (points,), (200, 100))


def test_the_distance_between_people_per_point() -> None:
    told = disagreement(
        [reading(1, "a", (10, 10), (50, 10)), reading(1, "b", (13, 14), (50, 10)), reading(2, "a", (1, 1), None)], NAMES
    )
    assert (told["images"], told["annotators"]) == (1, 2)
    assert told["points"]["nose"]["median"] == 0.05
    assert told["points"]["tail"]["pck"] == {"0.02": 1.0, "0.05": 1.0, "0.1": 1.0}
    assert told["all"]["pairs"] == 2


def test_a_point_that_only_one_placed_is_counted() -> None:
    told = disagreement([reading(1, "a", (10, 10), None), reading(1, "b", (10, 10), (50, 10))], NAMES)
    assert told["points"]["tail"] == {"pairs": 0, "mean": None, "median": None, "p90": None, "pck": None, "one_only": 1}


def test_the_same_person_twice_says_nothing() -> None:
    told = disagreement([reading(1, "a", (10, 10), (50, 10)), reading(1, "a", (90, 10), (50, 10))], NAMES)
    assert told["images"] == 0 and told["all"]["pairs"] == 0
