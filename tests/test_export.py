"""`python -m backend export`: what people labelled, several objects apart, as COCO keypoints that can be read again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend import export_command
from backend.formats.coco import read_coco
from backend.import_names import map_names
from backend.services import Services
from backend_world import WITH_BOX, World, rectangle, region, world
from kptllm_core.dataset import load_coco
from kptllm_core.errors import InvalidInput
from label_config.schema import parse
from small_label_studio import SmallLabelStudio, label_studio_of


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "world", label_studio_api_key="0123456789abcdef0123456789abcdef01234567") as made:
        made.services.label_studio._pause = 0.01
        yield made


@pytest.fixture
def studio(here: World) -> SmallLabelStudio:
    config = WITH_BOX
    for label, index in (("nose", 1), ("tail", 0), ("ear", 2)):
        config = config.replace(f'<Label value="{label}"/>', f'<Label value="{label}" model_index="{index}"/>')
    return label_studio_of(here, config)


def export(here: World, path: Path, monkeypatch: pytest.MonkeyPatch, images: Path | None = None) -> int:
    monkeypatch.setattr(Services, "make", lambda settings: here.services)
    return export_command.run(argparse.Namespace(project=1, path=path, images=images))


def dog(at: float, name: str) -> list[dict[str, Any]]:
    nose, tail = (region(label, at + 2 + i, 10 + i, parentID=name, id=f"{name}-{label}") for i, label in enumerate(("nose", "tail")))
    return [rectangle(at, 5, 20, 20, id=name), nose, tail]


def test_objects_are_apart_and_the_ground_truth_counts(here: World, studio: SmallLabelStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    one, skipped, other, _ = studio.add(4)
    studio.annotate(one, [*dog(0, "a"), *dog(40, "b"), rectangle(70, 60, 20, 30, id="c")], ground_truth=True)
    studio.annotate(one, dog(10, "z"))
    studio.annotate(skipped, dog(0, "a"), was_cancelled=True)
    studio.annotate(other, dog(0, "a"))
    assert export(here, tmp_path / "out" / "annotations.json", monkeypatch) == 0
    assert "2 images with 4 objects" in capsys.readouterr().out
    found = read_coco(tmp_path / "out" / "annotations.json")
    first, second = found.images
    assert (first.name, first.size, len(first.things), len(second.things)) == ("1.png", (64, 48), 3, 1)
    assert first.things[0].category == "dog" and first.things[1].box == pytest.approx((25.6, 2.4, 12.8, 9.6))
    assert {n: (p.x, p.y, p.visibility) for n, p in first.things[1].points.items()} == {
        "nose": pytest.approx((26.88, 4.8, 2)), "tail": pytest.approx((27.52, 5.28, 2))}  # fmt: skip
    assert found.names() == {"dog": ["tail", "nose"]}  # in the order of model_index
    assert first.things[2].points == {} and first.things[2].box == pytest.approx((44.8, 28.8, 12.8, 14.4)) and found.notes == []


def test_with_its_images_it_is_a_folder_that_the_core_reads(here: World, studio: SmallLabelStudio, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for task in studio.add(2):
        studio.annotate(task, [*dog(0, "a"), *dog(40, "b")])
    assert export(here, tmp_path / "set" / "annotations.json", monkeypatch, tmp_path / "set" / "images") == 0
    found = load_coco(tmp_path / "set")
    assert len(found.samples) == 4 and len({s.image_path for s in found.samples}) == 2
    for sample in found.samples:
        assert sample.read().shape == (48, 64, 3) and sample.image_path.resolve().is_relative_to(tmp_path / "set" / "images")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="Choose another --images"):
        export(here, tmp_path / "annotations.json", monkeypatch, tmp_path / "file")


def test_labels_that_are_not_clear_are_told(here: World, studio: SmallLabelStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (task,) = studio.add(1)
    studio.annotate(task, [*dog(0, "a"), *dog(10, "b"), region("ear", 15, 20)])
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 1
    assert "task 1: 'ear'" in capsys.readouterr().out
    assert [len(image.things) for image in read_coco(tmp_path / "annotations.json").images] == [2]


def test_images_are_told_apart_and_empty_ones_are_there(here: World, studio: SmallLabelStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    *dogs, empty, lost = studio.add(6)
    places = ["/data/local-files/?d=a/dog 1.png", "https://here/b/dog%201.png", "https://there/b/dog%201.png", "/data/local-files/?d=c/dog 1.png"]
    for task, url in zip([*dogs, lost], [*places, "/data/upload/1/gone.png"], strict=True):
        studio.tasks[task]["data"]["image"] = url
    for task in dogs:
        studio.annotate(task, dog(0, "a"))
    studio.annotate(empty, [])
    studio.annotate(lost, [])
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 1
    told = capsys.readouterr().out
    assert f"task {lost}: the size of its image is not to be had" in told
    assert "4 images could not be fetched, so the sizes that their annotations state were taken, for example task 1: " in told
    found = json.loads((tmp_path / "annotations.json").read_text())
    named = ["dog 1.png", "b/dog 1.png", f"{dogs[2]}-dog 1.png", "c/dog 1.png", f"{empty}.png"]
    assert [i["file_name"] for i in found["images"]] == named
    assert [i["width"] for i in found["images"]] == [64] * 5 and len(found["annotations"]) == 4


def test_a_box_that_two_kinds_share_is_one_object(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = '<KeyPointLabels name="cat" toName="image"><Label value="paw"/></KeyPointLabels>'
    studio = label_studio_of(here, WITH_BOX.replace("</View>", second + "</View>"))
    (task,) = studio.add(1)
    studio.annotate(task, dog(0, "a"))
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 0
    found = json.loads((tmp_path / "annotations.json").read_text())
    assert len(found["categories"]) == 2 and [a["num_keypoints"] for a in found["annotations"]] == [2]


def test_two_images_of_a_task_may_have_one_name(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells them apart stands in the query of their addresses."""
    one = '<Image name="left" value="$left"/><KeyPointLabels name="left_kp" toName="left"><Label value="nose"/></KeyPointLabels>'
    studio = label_studio_of(here, f"<View>{one}{one.replace('left', 'right')}</View>")
    sides = ("left", "right")
    tasks = studio.add(2)
    for task in tasks:
        studio.tasks[task]["data"] = {side: f"https://here/image?id={task}-{side}" for side in sides}
        studio.annotate(task, [region("nose", 5, 5, to_name=side, from_name=f"{side}_kp") for side in sides])
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 1  # they cannot be fetched
    names = [i["file_name"] for i in json.loads((tmp_path / "annotations.json").read_text())["images"]]
    assert len(names) == len(set(names)) == 4


def test_the_size_is_that_of_the_image_and_not_what_a_program_wrote(here: World, studio: SmallLabelStudio, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (task,) = studio.add(1)
    studio.annotate(task, [r | {"original_width": 640, "original_height": 480} for r in dog(0, "a")])
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 0
    (found,) = read_coco(tmp_path / "annotations.json").images
    assert found.size == (64, 48) and found.things[0].points["nose"].x == pytest.approx(0.02 * 64)


def test_the_kinds_of_boxes_are_categories_that_can_be_imported(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WITH_BOX.replace('<Label value="dog"/>', '<Label value="dog"/><Label value="puppy"/>')
    studio = label_studio_of(here, config)
    (task,) = studio.add(1)
    puppy = dog(40, "b")
    puppy[0]["value"]["rectanglelabels"] = ["puppy"]
    studio.annotate(task, [*dog(0, "a"), *puppy])
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 0
    data = json.loads((tmp_path / "annotations.json").read_text())
    assert [(c["name"], c["keypoints"]) for c in data["categories"]] == [(name, ["nose", "tail", "ear"]) for name in ("dog", "puppy")]
    labels = read_coco(tmp_path / "annotations.json")
    assert [thing.category for thing in labels.images[0].things] == ["dog", "puppy"]
    targets, _ = map_names(parse(config), labels.names())
    assert {name: target.box_label for name, target in targets.items()} == {"dog": "dog", "puppy": "puppy"}


def test_an_object_without_a_kind_is_of_the_controls_own(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = label_studio_of(here, WITH_BOX.replace('<Label value="dog"/>', '<Label value="dog"/><Label value="puppy"/>'))
    (task,) = studio.add(1)
    studio.annotate(task, [region("nose", 5, 5)])
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 0
    data = json.loads((tmp_path / "annotations.json").read_text())
    assert [c["name"] for c in data["categories"]] == ["dog", "puppy", "object"] and data["annotations"][0]["category_id"] == 3


def test_beside_other_controls_the_label_of_a_box_is_no_category(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """There the category says which control an object belongs to."""
    second = '<KeyPointLabels name="cat" toName="image"><Label value="paw"/></KeyPointLabels></View>'
    config = WITH_BOX.replace('<Label value="dog"/>', '<Label value="dog"/><Label value="puppy"/>').replace("</View>", second)
    studio = label_studio_of(here, config)
    (task,) = studio.add(1)
    studio.annotate(task, dog(0, "a"))
    assert export(here, tmp_path / "annotations.json", monkeypatch) == 0
    assert "The labels of boxes are not written" in capsys.readouterr().out
    assert read_coco(tmp_path / "annotations.json").names() == {"object (kp)": ["nose", "tail"]}


def test_a_place_that_cannot_be_written_is_told_before_anything_else(here: World, studio: SmallLabelStudio, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="Choose another place"):
        export(here, tmp_path / "file" / "annotations.json", monkeypatch)
    (tmp_path / "taken.json.part").mkdir()
    with pytest.raises(InvalidInput, match="Choose another place"):
        export(here, tmp_path / "taken.json", monkeypatch)
    assert not studio.calls
