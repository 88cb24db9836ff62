"""Labels of other tools in Label Studio: the right points on the right images, once, and in the journal as what people said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

import label_files
from backend.formats.labels import LabelledImage, LabelledPoint, LabelledSet, LabelledThing
from backend.formats.read import read_labels
from backend.import_match import Matcher, image_files, is_unique, not_unique, parts_of, upload_name
from backend.import_names import Target, map_names, parse_rename
from backend.importing import Importer, annotation_id, region_ids, regions_of
from backend.tables import Annotation
from backend_world import CONFIG, WITH_BOX, World, picture, region, world
from kptllm_core.errors import InvalidInput, SchemaError, Unavailable
from label_config.annotations import read_result
from label_config.regions import check_prediction
from label_config.schema import parse
from small_label_studio import SmallLabelStudio, label_studio_of
from small_server import Answer, Request, reply

TOKEN = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "world", label_studio_api_key=TOKEN) as made:
        made.services.label_studio._pause = 0.01
        yield made


@pytest.fixture
def studio(here: World) -> SmallLabelStudio:
    return label_studio_of(here, WITH_BOX)


def importer(here: World, kind: str, path: Path, config: str = WITH_BOX, **more: Any) -> Importer:
    labels = read_labels(kind, path)
    targets, _ = map_names(parse(config), labels.names())
    return Importer(here.services, 1, parse(config), labels, targets, **more)


def bring(here: World, kind: str, path: Path, **more: Any) -> tuple[int, Importer]:
    work = importer(here, kind, path, **more)
    return work.carry_out(work.plan()), work


def said(here: World) -> list[Annotation]:
    with here.services.journal.reading() as session:
        return list(session.scalars(select(Annotation).where(Annotation.current, ~Annotation.deleted).order_by(Annotation.task)))


def objects(studio: SmallLabelStudio, task: int, config: str = WITH_BOX) -> list[dict[str, tuple[float, float, int]]]:
    """What a person sees there: name → x, y in pixels, visibility."""
    (annotation,) = studio.tasks[task]["annotations"]
    check_prediction(config, {"result": annotation["result"], "score": 1.0, "model_version": "import"})
    read = read_result(parse(config).controls[0], annotation["result"])
    assert read.problems == ()
    return [{n: (round(float(x), 2), round(float(y), 2), int(v)) for n, (x, y), v in
             zip(o.keypoints.names, o.keypoints.xy, o.keypoints.visibility, strict=True) if v in (1, 2)} for o in read.objects]  # fmt: skip


# ---------------------------------------------------------------- the whole way


def test_coco_into_an_empty_project_and_a_second_run(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    file = label_files.coco(tmp_path)
    made, work = bring(here, "coco", file)
    assert made == 2
    assert [t["data"]["image"].rpartition("-")[2] for t in studio.tasks.values()] == ["a.png", "b.png"]
    assert objects(studio, 1) == [{"nose": (10, 12, 2), "tail": (20.5, 24, 2), "ear": (30, 36, 2)}]
    assert objects(studio, 2) == [{"nose": (11, 13, 2), "ear": (31, 37, 2)}]  # this config has no way to say hidden
    assert all(row.counts and row.points == n and row.why_not == "" for row, n in zip(said(here), (3, 2), strict=True))
    assert said(here)[0].origins == {"manual": 3}
    assert here.status()["labelled"] == 2
    again = importer(here, "coco", file)
    plan = again.plan()
    assert (plan.there, plan.annotate, plan.create, plan.left_out) == (2, {}, [], {})
    assert again.carry_out(plan) == 0
    assert len(said(here)) == 2
    ((note, count),) = work.notes.items()
    assert note.startswith("hidden points became visible ones") and '<Choice value="occluded"/>' in note and count == 1


def test_tasks_that_are_there_are_matched_by_name(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    for number, name in ((1, "/data/upload/1/0a1b2c3d-b.png"), (2, "/data/local-files/?d=dogs/a.png")):
        studio._put(number, {"image": name})
        here.studio.routes[name.partition("?")[0]] = Answer(body=picture(number))
    made, _ = bring(here, "coco", label_files.coco(tmp_path))
    assert made == 2
    assert len(studio.tasks) == 2
    assert set(objects(studio, 1)[0]) == {"nose", "ear"}
    assert set(objects(studio, 2)[0]) == {"nose", "tail", "ear"}


def test_a_person_was_there_first(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    studio._put(1, {"image": "/data/upload/1/0a1b2c3d-a.png"})
    studio.annotate(1, [region("nose", 10, 10)])
    file = label_files.coco(tmp_path)
    plan = importer(here, "coco", file).plan()
    assert "labelled already" in plan.left_out["a.png"]
    assert len(importer(here, "coco", file, even_labelled=True).plan().annotate) == 1


def test_dlc_with_equal_names_in_two_videos(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    project = label_files.dlc(tmp_path)
    bring(here, "dlc", project)
    names = [t["data"]["image"].rpartition("/")[2].partition("-")[2] for t in studio.tasks.values()]
    assert sorted(names) == ["mouse1_img000.png", "mouse2_img000.png"]
    one = names.index("mouse1_img000.png") + 1
    assert objects(studio, one) == [{"nose": (10.5, 12.5, 2), "tail": (20.5, 24.5, 2)}]
    assert objects(studio, 3 - one) == [{"nose": (2, 3, 2), "tail": (4, 5, 2), "ear": (6, 7, 2)}]
    assert importer(here, "dlc", project).plan().there == 2
    for task in studio.tasks.values():  # deleted by a person: names alone must do
        task["annotations"].clear()
    studio._unique.clear()
    plan = importer(here, "dlc", project).plan()
    assert (len(plan.annotate), plan.create) == (2, [])


def test_sleap_frames_find_their_images_by_number(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    studio._put(1, {"image": "/data/upload/1/0a1b2c3d-fly_0017.png"})
    here.studio.routes["/data/upload/1/0a1b2c3d-fly_0017.png"] = Answer(body=picture(1))
    label_files.images(tmp_path / "frames", "fly_0003.png", "fly_0099.png")
    made, work = bring(here, "sleap", label_files.sleap_csv(tmp_path), images=tmp_path / "frames")
    assert made == 2
    assert objects(studio, 1) == [{"nose": (11.5, 13.5, 2)}]
    assert studio.tasks[2]["data"]["image"].endswith("-fly_0003.png")
    assert work.notes["boxes were drawn around the points, since the data set has none"] == 2


def test_two_csvs_with_the_same_frames_are_two_videos(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    for kind in ("flies", "bees"):
        file = label_files.sleap_csv(tmp_path)
        file.rename(tmp_path / f"{kind}.csv")
        label_files.images(tmp_path / kind, f"{kind}_0003.png", f"{kind}_0017.png")
        assert bring(here, "sleap", tmp_path / f"{kind}.csv", images=tmp_path / kind)[0] == 2
    names = [t["data"]["image"].rpartition("-")[2] for t in studio.tasks.values()]
    assert names == ["flies_0003.png", "flies_0017.png", "bees_0003.png", "bees_0017.png"]
    for kind in ("flies", "bees"):
        assert importer(here, "sleap", tmp_path / f"{kind}.csv", images=tmp_path / kind).plan().there == 2


def test_what_an_earlier_version_imported_is_there(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    """A CSV's frames had no video's name then."""
    file = label_files.sleap_csv(tmp_path)
    for number, frame in ((1, 3), (2, 17)):
        studio._put(number, {"image": f"/data/upload/1/0a1b2c3d-fly_{frame:04}.png"})
        studio.annotate(number, [region("nose", 1, 1, id=next(region_ids(1, named("", frame))))])
    assert importer(here, "sleap", file).plan().there == 2
    studio.tasks[1]["annotations"], studio.tasks[2]["annotations"] = studio.tasks[2]["annotations"], []
    plan = importer(here, "sleap", file).plan()  # another image's annotation does not count
    assert (plan.there, list(plan.annotate)) == (0, [2]) and "labelled already" in plan.left_out["frame 3 of video.csv"]


def test_images_that_have_the_same_id_are_both_annotated(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    """Two videos of one name: the file's name alone tells frames apart."""
    label_files.images(tmp_path, "one/a_0003.png", "two/b_0003.png")
    config = parse(WITH_BOX)
    labels = LabelledSet([LabelledImage("v.mp4", image(None, ("nose", x, 9)).things, tmp_path / name, frame=3)
                          for x, name in ((5, "one/a_0003.png"), (6, "two/b_0003.png"))])  # fmt: skip
    work = Importer(here.services, 1, config, labels, target())
    assert work.carry_out(work.plan()) == 2
    assert [objects(studio, task)[0]["nose"][:2] for task in (1, 2)] == [(5, 9), (6, 9)]
    again = Importer(here.services, 1, config, labels, target())
    assert again.plan().there == 2
    assert again._annotate(2, labels.images[1], is_new=False) is False  # known by the annotation that the task has
    assert studio._unique == {str(annotation_id(1, labels.images[0])), str(annotation_id(1, labels.images[0], 2))}


def test_a_task_that_shows_an_image_of_another_shape_is_left_out(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    for number, size in ((1, (48, 48)), (2, (128, 96))):
        studio._put(number, {"image": f"/data/upload/1/0a1b2c3d-{'ab'[number - 1]}.png"})
        here.studio.routes[f"/data/upload/1/0a1b2c3d-{'ab'[number - 1]}.png"] = Answer(body=picture(number, size))
    work = importer(here, "coco", label_files.coco(tmp_path))
    plan = work.plan()
    assert work.carry_out(plan) == 1
    assert plan.left_out == {"a.png": "its labels are for an image of 64 × 48 pixels, but it has 48 × 48"}
    (nose, *_) = (r["value"] for r in studio.tasks[2]["annotations"][0]["result"] if r["type"] == "keypointlabels")
    assert (nose["x"], nose["y"]) == pytest.approx((100 * 11 / 64, 100 * 13 / 48))  # the same picture in another resolution


def test_objects_with_a_box_alone_become_rectangles(here: World, tmp_path: Path) -> None:
    boxed = {"image_id": 1, "category_id": 1, "bbox": [32, 24, 16, 12], "keypoints": [0] * 9}
    posed = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 40], "keypoints": [10, 12, 2, 0, 0, 0, 0, 0, 0]}
    file = label_files.coco(tmp_path, [boxed | {"id": 1}, posed | {"id": 2}, boxed | {"id": 3, "image_id": 2}])
    studio = label_studio_of(here, WITH_BOX)
    assert bring(here, "coco", file)[0] == 2
    assert objects(studio, 1) == [{"nose": (10, 12, 2)}] and objects(studio, 2) == []
    read = [read_result(parse(WITH_BOX).controls[0], studio.tasks[task]["annotations"][0]["result"]).boxes for task in (1, 2)]
    assert [[b.box.tolist() for b in boxes] for boxes in read] == [[[0, 0, 30, 40], [32, 24, 16, 12]], [[32, 24, 16, 12]]]
    assert importer(here, "coco", file).plan().there == 2


def test_boxes_alone_are_counted_where_the_label_config_has_no_box_control(here: World, tmp_path: Path) -> None:
    label_studio_of(here)
    boxed = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [32, 24, 16, 12]}
    posed = {"id": 2, "image_id": 1, "category_id": 1, "keypoints": [10, 12, 2, 0, 0, 0, 0, 0, 0]}
    work = importer(here, "coco", label_files.coco(tmp_path, [boxed, posed, boxed | {"id": 3, "image_id": 2}]), CONFIG)
    plan = work.plan()
    assert work.carry_out(plan) == 1
    assert work.notes == {"objects have a box and no point, and were left out, since no box control goes with 'kp'": 2}
    assert plan.left_out == {"b.png": "none of its points can be placed"}


def test_yolo_with_two_objects_and_a_hidden_point(here: World, tmp_path: Path) -> None:
    config = WITH_BOX.replace("</View>", '<Choices name="hidden" toName="image" perRegion="true"><Choice value="occluded"/></Choices></View>')
    studio = label_studio_of(here, config)
    work = importer(here, "yolo", label_files.yolo(tmp_path), config)
    work.carry_out(work.plan())
    assert work.notes == Counter()
    dogs = objects(studio, 1, config)
    assert dogs[0] == dogs[1] == {"nose": (6.4, 9.6, 2), "tail": (19.2, 19.2, 1), "ear": (32, 28.8, 2)}
    boxes = [b.box.tolist() for b in read_result(parse(config).controls[0], studio.tasks[1]["annotations"][0]["result"]).boxes]
    assert boxes == [pytest.approx([19.2, 9.6, 25.6, 28.8]), pytest.approx([6.4, 4.8, 12.8, 9.6])]


def test_several_objects_without_a_box_control_are_left_out_with_the_remedy(here: World, tmp_path: Path) -> None:
    label_studio_of(here)
    work = importer(here, "yolo", label_files.yolo(tmp_path), CONFIG)
    plan = work.plan()
    assert work.carry_out(plan) == 1
    assert '<RectangleLabels name="kp_bbox"' in plan.left_out["images/train/a.png"]


def test_new_tasks_by_address(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        here.studio.routes[f"/data/local-files/{name}"] = Answer(body=picture(1))
    bring(here, "coco", label_files.coco(tmp_path), image_url=f"{here.studio.url}/data/local-files/")
    assert [t["data"]["image"] for t in studio.tasks.values()] == [f"{here.studio.url}/data/local-files/{n}" for n in ("a.png", "b.png")]
    assert len(said(here)) == 2


def test_new_tasks_by_address_show_images(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    label_files.images(tmp_path / "frames", "sub/fly_0003.png")
    work = importer(here, "sleap", label_files.sleap_csv(tmp_path), images=tmp_path / "frames", image_url="https://h/frames/")
    plan = work.plan()
    work.carry_out(plan)
    assert [t["data"]["image"] for t in studio.tasks.values()] == ["https://h/frames/fly_0003.png"]  # not the video
    assert list(plan.left_out) == ["frame 17 of video.csv"]
    file = label_files.yolo(tmp_path / "yolo")
    for name in ("train/a.png", "val/b.png"):
        (tmp_path / "yolo" / "images" / name).unlink()
    plan = importer(here, "yolo", file, image_url="https://h/").plan()
    assert plan.create == [] and "'labels/train/a' does not end as images do" in plan.left_out["labels/train/a"]


def test_interrupted_anywhere_a_second_run_completes_it(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    file = label_files.coco(tmp_path)
    for call, times in ((("POST", "/api/projects/1/import"), 1), (("POST", "/api/tasks/"), 2)):
        left = [times]

        def lose(request: Request, left: list[int] = left) -> Answer | None:
            """Done, and the answer is lost."""
            left[0] -= 1
            if left[0]:
                return None
            studio.usual(request)
            return Answer(raw=lambda out: None)

        studio.before = {call: lose}
        with pytest.raises(Unavailable):
            bring(here, "coco", file)
    studio.before.clear()
    bring(here, "coco", file)
    assert len(studio.tasks) == 2
    assert [len(t["annotations"]) for t in studio.tasks.values()] == [1, 1]
    assert len(said(here)) == 2


def test_one_that_label_studio_refuses_leaves_the_others_alone(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    studio.before["POST", "/api/tasks/1/"] = lambda request: reply({"detail": "no"}, 400)
    work = importer(here, "coco", label_files.coco(tmp_path))
    plan = work.plan()
    assert work.carry_out(plan) == 1
    assert list(plan.left_out) == ["a.png"]


# ---------------------------------------------------------------- where the points lie


def image(size: tuple[int, int] | None, *points: tuple[str, float, float], box: Any = None, relative: bool = False) -> LabelledImage:
    return LabelledImage("a.png", (LabelledThing({n: LabelledPoint(x, y) for n, x, y in points}, box),), None, size, relative)


def target(config: str = WITH_BOX) -> dict[str, Target]:
    (control,) = parse(config).controls
    return {"": Target(control, {n: n for n in control.schema.names}, "dog")}


def test_labels_of_another_resolution_are_scaled_and_of_another_shape_refused() -> None:
    notes: Counter[str] = Counter()
    result = regions_of(1, image((640, 480), ("nose", 100, 100), box=(0, 0, 320, 240)), (64, 48), target(), notes)
    (found,) = read_result(parse(WITH_BOX).controls[0], result).objects
    assert found.keypoints.xy[0].tolist() == pytest.approx([10, 10])
    assert found.box is not None and found.box.box.tolist() == pytest.approx([0, 0, 32, 24])
    for size, words in (((48, 64), "turned by 90°"), ((100, 48), "are for an image of 100 × 48 pixels, but it has 64 × 48")):
        with pytest.raises(InvalidInput, match=words):
            regions_of(1, image(size, ("nose", 1, 1)), (64, 48), target(), notes)


def test_points_outside() -> None:
    notes: Counter[str] = Counter()
    result = regions_of(1, image(None, ("nose", 64.5, 20), ("tail", 300, 20)), (64, 48), target(), notes)
    points = [r for r in result if r["type"] == "keypointlabels"]
    assert [(r["value"]["keypointlabels"], r["value"]["x"]) for r in points] == [(["nose"], 100.0)]
    assert notes["points lie outside their image and were left out"] == 1
    with pytest.raises(InvalidInput, match="none of its points"):
        regions_of(1, image(None, ("tail", 300, 20)), (64, 48), target(), notes)


def test_thresholds_for_predictions_do_not_hide_labels() -> None:
    config = WITH_BOX.replace('name="kp"', 'name="kp" model_add_bboxes="false" model_score_threshold="1" model_point_threshold="1"')
    result = regions_of(1, image(None, ("nose", 6, 20), box=(0, 0, 9, 30)), (64, 48), target(config), Counter())
    assert [r["type"] for r in result] == ["rectanglelabels", "keypointlabels"]
    assert not any("score" in r for r in result)


# ---------------------------------------------------------------- names


def test_names_that_are_the_same_but_for_their_spelling() -> None:
    found, remarks = map_names(parse(WITH_BOX), {"Dog": ["Nose", "TAIL", "ear"]})
    assert found["Dog"].points == {"Nose": "nose", "TAIL": "tail", "ear": "ear"}
    assert found["Dog"].box_label == "dog"
    assert remarks == ["Renamed: Nose → nose, TAIL → tail."]


def test_unknown_names_are_listed_with_what_can_be_done() -> None:
    with pytest.raises(SchemaError) as caught:
        map_names(parse(CONFIG), {"dog": ["nose", "tails", "left paw"]})
    for words in ("These points of 'dog' are not in the label config's 'kp': tails, left paw.", "It has nose, tail, ear.",
                  "--rename tails=tail", '<Label value="left paw"/>', "--skip-unknown"):  # fmt: skip
        assert words in caught.value.message
    found, remarks = map_names(parse(CONFIG), {"dog": ["nose", "tails", "left paw"]}, skip_unknown=True, rename={"tails": "tail"})
    assert found["dog"].points == {"nose": "nose", "tails": "tail"}
    assert "left paw" in remarks[0]
    with pytest.raises(SchemaError):  # nothing would be left
        map_names(parse(CONFIG), {"dog": ["x"]}, skip_unknown=True)


def test_two_names_for_one_label() -> None:
    with pytest.raises(SchemaError, match="nose and snout would both become 'nose'"):
        map_names(parse(CONFIG), {"": ["nose", "snout"]}, rename={"snout": "nose"})


TWO = """<View><Image name="image" value="$image"/>
<KeyPointLabels name="dogs" toName="image"><Label value="nose"/></KeyPointLabels>
<KeyPointLabels name="cats" toName="image"><Label value="nose"/></KeyPointLabels>
<RectangleLabels name="boxes" toName="image"><Label value="dogs"/><Label value="cats"/></RectangleLabels></View>"""


def test_which_control_a_category_belongs_to() -> None:
    found, _ = map_names(parse(TWO), {"dogs": ["nose"], "cat": ["nose"]}, rename={"cat": "cats"})
    assert [t.control.from_name for t in found.values()] == ["dogs", "cats"]
    assert [t.box_label for t in found.values()] == ["dogs", "cats"]
    with pytest.raises(SchemaError, match="--control NAME"):
        map_names(parse(TWO), {"bird": ["nose"]})
    with pytest.raises(SchemaError, match="no KeyPointLabels named 'birds'"):
        map_names(parse(TWO), {"bird": ["nose"]}, control="birds")


def test_which_label_a_box_gets() -> None:
    config = parse(WITH_BOX.replace('<Label value="dog"/>', '<Label value="dog"/><Label value="puppy"/>'))
    assert map_names(config, {"Puppy": ["nose"]})[0]["Puppy"].box_label == "puppy"
    with pytest.raises(SchemaError, match="--rename wolf=LABEL"):
        map_names(config, {"wolf": ["nose"]})
    assert map_names(config, {"wolf": ["nose"]}, rename={"wolf": "dog"})[0]["wolf"].box_label == "dog"


def test_rename_pairs() -> None:
    assert parse_rename(["a=b", "left ear = ear_l"]) == {"a": "b", "left ear": "ear_l"}
    for bad in ("a", "=b", "a="):
        with pytest.raises(SchemaError):
            parse_rename([bad])


# ---------------------------------------------------------------- which image is which


@pytest.mark.parametrize(
    ("address", "parts"),
    [("/data/upload/3/0a1b2c3d-img_1.png", ("img_1.png",)), ("/data/local-files/?d=set/video%201/img 1.png", ("set", "video 1", "img 1.png")),
     ("s3://bucket/a/b.jpg", ("a", "b.jpg")), ("https://host/x/b%C3%A4r.jpg?sig=1", ("x", "bär.jpg")), ("", ())],
)  # fmt: skip
def test_names_in_addresses(address: str, parts: tuple[str, ...]) -> None:
    assert parts_of(address) == parts


def named(name: str, frame: int | None = None) -> LabelledImage:
    return LabelledImage(name, (), frame=frame)


def test_matching_by_name() -> None:
    """Without a data set whose folders are those of the tasks, folders only tell equal names apart."""
    tasks = Matcher([(1, "/data/upload/1/0a1b2c3d-my_photo_1.jpg"), (2, "s3://b/v1/img1.png"), (3, "s3://b/v2/img1.png"), (4, "s3://b/v1/img2.png"),
                     (5, "/data/upload/1/0a1b2c3d-v3_img1.png"), (6, "https://h/a.png"), (7, "https://h/b/a.png")])  # fmt: skip
    assert tasks.find(named("my photo (1).jpg")) == (1, "")  # that is what Label Studio makes of it
    assert tasks.find(named("my photo 1.jpg")) == (1, "")
    assert tasks.find(named("elsewhere/img2.png")) == (4, "")
    assert tasks.find(named("labels/img2")) == (4, "")  # without its extension
    assert tasks.find(named("data/v2/img1.png"), unique=False) == (3, "")
    assert tasks.find(named("data/v3/img1.png"), unique=False) == (5, "")
    assert tasks.find(named("data/v4/img1.png"), unique=False) == (None, "")  # a third folder's: none of these
    assert tasks.find(named("img1.png"))[1].startswith("2 images are called that")
    assert tasks.find(named("b/a.png")) == (7, "")
    assert tasks.find(named(""))[0] is None


def test_an_image_in_another_folder_is_another_image() -> None:
    tasks = [(1, "/data/local-files/?d=data/videoB/img017.png"), (2, "s3://b/videoA/img018.png"), (3, "https://h/data/img019.png")]
    images = [named(f"data/videoA/img{number:03}.png") for number in (17, 18, 19)]
    found = [Matcher(tasks, images).find(one) for one in images]
    assert found == [(None, "the task's image lies in another folder: data/videoB/img017.png"), (2, ""), (3, "")]
    assert Matcher(tasks[:1], [named("elsewhere/img017.png")]).find(named("elsewhere/img017.png")) == (1, "")  # folders say nothing there


def test_names_as_an_upload_changes_them_are_those_of_uploads_only() -> None:
    tasks = Matcher([(1, "s3://b/img1.jpg"), (2, "/data/upload/1/0a1b2c3d-img2.jpg"), (3, "s3://b/a b(1).jpg"), (4, "s3://b/ba\u0308r.jpg")])
    assert tasks.find(named("img(1).jpg")) == (None, "")
    assert tasks.find(named("img(2).jpg")) == (2, "")
    assert tasks.find(named("a b(1).jpg")) == (3, "") and tasks.find(named("a_b1.jpg")) == (None, "")
    assert tasks.find(named("b\u00e4r.jpg")) == (4, "")


def test_matching_by_frame(tmp_path: Path) -> None:
    images = [named("fly1.mp4", 3), named("fly2.mp4", 3), named("fly3.mp4", 9), named("", 3)]
    tasks = Matcher([(1, "s3://b/fly1/frame_0003.png"), (2, "s3://b/fly2/frame_0003.png"), (3, "s3://b/fly1/x7_0004.png"),
                     (4, "/data/upload/1/0a1b2c3d-fly10_0009.png"), (5, "/data/upload/1/0a1b2c3d-fly1_0009.png")], images)  # fmt: skip
    assert tasks.find(named("fly2.mp4", 3)) == (2, "")
    assert tasks.find(named("fly1.mp4", 9)) == (5, "")
    assert tasks.find(named("fly3.mp4", 9)) == (None, "")
    assert tasks.find(named("fly2.mp4", 4)) == (None, "")  # the only image of that number is one of fly1
    assert tasks.find(named("", 4)) == (3, "")
    assert tasks.find(named("", 3))[1].startswith("2 images have the number 3")
    assert tasks.find(named("", 5)) == (None, "")
    known = LabelledImage("fly1.mp4", (), tmp_path / "x7_0004.png", frame=3)
    assert tasks.find(known) == (3, "")  # its file says more than its number


def test_whose_frame_a_name_says(tmp_path: Path) -> None:
    addresses = [(1, "/data/upload/1/0a1b2c3d-my_fly_0009.png"), (2, "/data/upload/1/0a1b2c3d-a_0009.png"), (3, "s3://b/my fly_2/0010.png")]
    two = Matcher(addresses, [named("my fly.mp4", 9), named("my fly_2.mp4", 9)])
    assert two.find(named("my fly.mp4", 9)) == (1, "")
    assert two.find(named("my fly.mp4", 10)) == (None, "") and two.find(named("my fly_2.mp4", 10)) == (3, "")
    none = Matcher(addresses[1:], [named("bee.mp4", 9)])  # no name says any of these videos
    assert none.find(named("bee.mp4", 9)) == (2, "")


def test_names_for_uploads(tmp_path: Path) -> None:
    images = [named("v1/a.png"), named("v2/a.png"), named("v2/b.png")]
    shared = not_unique(images)
    assert [upload_name(i, is_unique(i, shared)) for i in images] == ["v1_a.png", "v2_a.png", "b.png"]
    label_files.images(tmp_path, "x/1.png", "y/2.JPG")
    (tmp_path / "notes.txt").write_text("")
    assert [p.name for p in image_files(tmp_path)] == ["1.png", "2.JPG"]


# ---------------------------------------------------------------- the command


def test_the_command(here: World, studio: SmallLabelStudio, tmp_path: Path) -> None:
    file = label_files.coco(tmp_path)
    given = {"LABEL_STUDIO_URL": here.settings.label_studio_url, "LABEL_STUDIO_API_KEY": TOKEN, "CORE_URL": here.settings.core_url,
             "DATA_DIR": str(here.settings.data_dir), "DATABASE_URL": here.settings.database_url}  # fmt: skip

    def run(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "backend", "import", str(file), "--format", "coco", "--project", "1", *more]
        return subprocess.run(words, env={**os.environ, **given, **variables}, capture_output=True, text=True, timeout=120)

    dry = run("--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "2 tasks are new" in dry.stdout
    assert not studio.tasks
    done = run()
    assert done.returncode == 0, done.stderr
    assert "2 annotations made. The backend's journal knows 2 labelled images" in done.stdout
    assert here.status()["labelled"] == 2
    file.write_text(json.dumps(json.loads(file.read_text()) | {"categories": [{"id": 1, "name": "dog", "keypoints": ["snout", "tail", "ear"]}]}))
    refused = run()
    assert refused.returncode == 1
    assert "--rename OLD=NEW" in refused.stderr and "snout" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "2 are in the project already" in run("--rename", "snout=nose").stdout
    assert "LABEL_STUDIO_API_KEY" in run(LABEL_STUDIO_API_KEY="").stderr
