"""Labels that look wrong: planted exchanges are found, true labels are left alone, each with words and a confidence."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest

from backend import quality
from backend.evidence import START, Subject, Weights, weigh
from backend.pairs import PairModel
from backend.quality import FAR_OFF, MISNAMED, MISSING, SWAPPED, find
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility

NAMES = ("nose", "tail", "left_eye", "right_eye", "left_paw", "right_paw", "left_foot", "right_foot")
SCHEMA = KeypointSchema(NAMES, "cat", (), ((2, 3), (4, 5), (6, 7)))
TURNED = {NAMES[i]: NAMES[j] for a, b in SCHEMA.symmetric for i, j in ((a, b), (b, a))}  # left for right and right for left
REST = np.array([[0, -4], [0, 5], [-1, -3.5], [1, -3.5], [-2, -1], [2, -1], [-2, 4], [2, 4]], float)


def cat(rng: np.random.Generator) -> np.ndarray:
    """(8, 2) pixels: paws and feet wander, the whole is turned, scaled and moved."""
    xy = REST + rng.normal(0, [[0.15]] * 4 + [[0.5]] * 4, (8, 2))
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return xy @ turn.T * rng.uniform(8, 20) + rng.uniform(100, 300, 2)


def subjects(count: int = 60, predict: bool = False, noise: float = 2.0, seed: int = 0) -> list[Subject]:
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        xy = cat(rng)
        predicted = (
            KeypointSet(NAMES, xy + rng.normal(0, noise, xy.shape), np.full(8, 2), np.full(8, 0.9)) if predict else None
        )
        found.append(Subject(n, 1000 + n, KeypointSet(NAMES, xy, np.full(8, 2)), f"task={n}", predicted, 0, (400, 400)))
    return found


def changed(subject: Subject, order: dict[str, str] | None = None, shift: dict[str, tuple[float, float]] | None = None,
            without: tuple[str, ...] = ()) -> Subject:  # fmt: skip
    """With points under other names (name → whose place it takes), moved by pixels, or left out."""
    old = subject.labelled
    xy, seen = old.xy.copy(), old.visibility.copy()
    for name, source in (order or {}).items():
        xy[old.names.index(name)] = old.xy[old.names.index(source)]
    for name, by in (shift or {}).items():
        xy[old.names.index(name)] += by
    for name in without:
        seen[old.names.index(name)] = Visibility.NOT_LABELLED
    return Subject(
        subject.task, subject.annotation, KeypointSet(NAMES, xy, seen), subject.group, subject.predicted, 0, (400, 400)
    )


def test_true_labels_are_left_alone() -> None:
    assert find(subjects(), SCHEMA) == []
    assert find(subjects(predict=True), SCHEMA) == []
    assert find([], SCHEMA) == []


@pytest.mark.parametrize("predict", [False, True])
def test_an_exchanged_pair_is_found_and_told(predict: bool) -> None:
    cats = subjects(predict=predict)
    cats[7] = changed(cats[7], {"left_eye": "right_eye", "right_eye": "left_eye"})
    cats[20] = changed(cats[20], {"left_foot": "right_foot", "right_foot": "left_foot"})
    found = find(cats, SCHEMA)
    assert {(f.subject.task, f.kind, f.points) for f in found} == {
        (7, SWAPPED, ("left_eye", "right_eye")),
        (20, SWAPPED, ("left_foot", "right_foot")),
    }
    told = found[0].to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["confidence"] > 0.9
    first, second = told["points"]
    assert told["picture"]["suggested"][first] == told["picture"]["labelled"][second]
    assert told["picture"]["size"] == [400, 400]
    assert "exchanged" in told["reason"] and ("the model" in told["reason"]) == predict


def test_a_whole_object_the_wrong_way_round_is_one_finding() -> None:
    cats = subjects()
    cats[3] = changed(cats[3], TURNED)
    (found,) = find(cats, SCHEMA)
    assert (found.subject.task, found.kind, len(found.points)) == (3, SWAPPED, 6)
    assert "as a whole" in found.reason


@pytest.mark.parametrize("count", [10, 20])
def test_the_layout_tells_what_the_model_says_nothing_of(count: int) -> None:
    """All other objects have predictions that fit, so that the layout is not needed for them: it is believed all the same."""
    for seed in range(5):
        cats = subjects(count, predict=True, seed=seed)
        cats[3] = dataclasses.replace(changed(cats[3], TURNED), predicted=None)
        assert [(f.subject.task, f.kind, len(f.points)) for f in find(cats, SCHEMA)] == [(3, SWAPPED, 6)], seed


def test_a_mirrored_object_is_found_though_the_model_has_none_of_its_points_there() -> None:
    found = []
    for seed in range(10):
        cats = subjects(10, predict=True, seed=seed)
        labelled = cats[3].labelled
        xy = labelled.xy.copy()
        xy[:, 0] = 2 * xy[:, 0].mean() - xy[:, 0]
        cats[3] = dataclasses.replace(cats[3], labelled=KeypointSet(NAMES, xy, labelled.visibility))
        found += [f for f in find(cats, SCHEMA) if f.kind == SWAPPED and len(f.points) == 6]
    assert {f.subject.task for f in found} == {3} and len(found) >= 7


def test_two_points_that_are_no_pair_are_misnamed() -> None:
    cats = subjects()
    cats[5] = changed(cats[5], {"nose": "tail", "tail": "nose"})
    assert [(f.subject.task, f.kind, set(f.points)) for f in find(cats, SCHEMA)] == [(5, MISNAMED, {"nose", "tail"})]


def test_a_point_under_the_name_of_a_missing_one() -> None:
    cats = [changed(c, without=("right_paw",)) if c.task % 2 else c for c in subjects(predict=True)]
    truth = cats[9].predicted
    assert truth is not None
    step = truth.xy[5] - truth.xy[4]
    cats[9] = changed(cats[9], shift={"left_paw": (float(step[0]), float(step[1]))})
    (found,) = [f for f in find(cats, SCHEMA) if f.kind != MISSING]
    assert (found.subject.task, found.kind, found.points) == (9, SWAPPED, ("left_paw", "right_paw"))
    assert "'left_paw' seems to be 'right_paw'" in found.reason


def test_a_point_far_off_is_told_with_its_better_place() -> None:
    cats = subjects(predict=True)
    cats[11] = changed(cats[11], shift={"nose": (70.0, 60.0)})
    (found,) = find(cats, SCHEMA)
    assert (found.subject.task, found.kind, found.points) == (11, FAR_OFF, ("nose",))
    predicted = cats[11].predicted
    assert predicted is not None
    assert np.linalg.norm(np.array(found.suggested["nose"]) - predicted.xy[0]) < 20


def test_missing_points_need_the_model_to_see_them() -> None:
    with_model, without = subjects(predict=True), subjects()
    for cats in (with_model, without):
        cats[2] = changed(cats[2], without=("tail",))
    assert [(f.subject.task, f.kind, f.points) for f in find(with_model, SCHEMA)] == [(2, MISSING, ("tail",))]
    assert find(with_model, SCHEMA, absent_is_said=True) == []
    assert find(without, SCHEMA) == []


def test_where_points_are_often_not_there_none_is_said_to_be_left_out() -> None:
    """The model sees everything everywhere; a tenth of the points were not placed, since they are hidden. One more is nothing that stands out."""
    rng = np.random.default_rng(1)
    for count in (10, 60):
        cats = [changed(c, without=tuple(n for n in NAMES if rng.random() < 0.1)) for c in subjects(count, predict=True)]
        assert [f for f in find(cats, SCHEMA) if f.kind == MISSING] == []
    cats = subjects(10, predict=True)
    cats[4] = changed(cats[4], without=("tail",))
    (found,) = find(cats, SCHEMA)  # nothing else is ever missing in this project
    assert found.points == ("tail",) and found.confidence > 0.8


def test_one_labelled_image_says_nothing() -> None:
    assert find(subjects(1), SCHEMA) == []
    assert find(subjects(1, predict=True), SCHEMA) == []


def test_the_model_alone_finds_exchanges_where_few_are_labelled() -> None:
    cats = subjects(4, predict=True)
    cats[1] = changed(cats[1], {"left_paw": "right_paw", "right_paw": "left_paw"})
    assert [(f.subject.task, f.points) for f in find(cats, SCHEMA)] == [(1, ("left_paw", "right_paw"))]


def test_many_objects_cost_time_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "AT_ONCE", 60 * len(NAMES) ** 2)
    peaks = []
    for count in (60, 240):
        cats = subjects(count, predict=True)
        cats[7] = changed(cats[7], {"left_eye": "right_eye", "right_eye": "left_eye"})
        tracemalloc.start()
        found = find(cats, SCHEMA)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [(f.subject.task, f.points) for f in found] == [(7, ("left_eye", "right_eye"))]
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_of_the_sets_of_exchanged_pairs_only_what_they_say_is_kept() -> None:
    cost = np.ones((20, 20)) - np.eye(20)
    verdict = PairModel(None, cost, [(2 * n, 2 * n + 1) for n in range(10)]).judge(0, Weights(START, 0.02), Weights(START, 0.005))
    arrays = [getattr(verdict, f.name) for f in dataclasses.fields(verdict)]
    assert sum(a.nbytes if a.base is None else a.base.nbytes for a in arrays if isinstance(a, np.ndarray)) < 1000
    assert verdict.anything < 0.5 and not verdict.likeliest.any()


def test_a_witness_who_guesses_gets_no_weight() -> None:
    rng = np.random.default_rng(0)
    good = -np.abs(rng.normal(6, 2, 400)) * np.where(rng.random(400) < 0.03, -1, 1)
    weights = weigh(np.stack([good, rng.normal(0, 6, 400)], 1))
    assert weights.worth[0] > 0.4 and weights.worth[1] < 0.15
    assert 0.01 < weights.wrong < 0.06
