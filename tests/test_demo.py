"""The parts of the demo that need no server: samples, corrections, figures, ports; and that it stops what it started."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from backend.demo import services
from backend.demo.__main__ import _options as options_of
from backend.demo.measure import pck
from backend.demo.project import corrected, names_of
from backend.demo.samples import Material, Picture, choose, from_folder, rendered
from backend.demo.services import ROOT, Login, Service, alone_in, free_port, label_studio_executable, wait_until
from kptllm_core.errors import Conflict, DataError, Unavailable
from kptllm_core.keypoints import Visibility
from label_config.regions import from_result, to_regions
from label_config.schema import parse


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return rendered(tmp_path_factory.mktemp("samples"), 6, seed=3)


def test_rendered_images_come_with_truth_and_a_config_that_names_their_points(material: Material) -> None:
    assert len(material.labelled) == 6
    for picture in material.labelled:
        assert picture.truth is not None
        assert picture.truth.names == material.control.schema.names
        assert (picture.width, picture.height) == (384, 384)


def test_a_users_folder_may_be_labelled_in_part(material: Material, tmp_path: Path) -> None:
    folder = material.pictures[0].path.parent
    data = json.loads((folder.parent / "annotations.json").read_text())
    data["annotations"] = data["annotations"][:2]
    (tmp_path / "some.json").write_text(json.dumps(data))
    found = from_folder(folder, tmp_path / "some.json", None)
    assert (len(found.pictures), len(found.labelled)) == (6, 2)


def test_images_with_several_objects_are_tasks_without_truth(material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = material.pictures[0].path.parent
    data = json.loads((folder.parent / "annotations.json").read_text())
    data["annotations"].append(data["annotations"][0] | {"id": 99})
    (tmp_path / "more.json").write_text(json.dumps(data))
    assert len(from_folder(folder, tmp_path / "more.json", None).labelled) == 5
    assert "1 image with several objects comes without labels" in capsys.readouterr().err


def test_bad_labels_are_told_by_the_name_that_the_user_gave(material: Material, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"images": 3}')
    with pytest.raises(DataError) as told:
        from_folder(material.pictures[0].path.parent, tmp_path / "mine.json", None)
    assert str(tmp_path / "mine.json") in str(told.value) and "annotations.json" not in str(told.value)


def test_pictures_keep_their_names_unless_label_studio_would_change_them(material: Material) -> None:
    picture = material.pictures[0]
    pictures = [replace(picture, path=Path("x") / name) for name in ("a.jpg", "b c.jpg", "b_c.jpg", "fly (2).png", "y" * 70 + ".png")]
    assert names_of(pictures) == ["a.jpg", "image-00001.jpg", "image-00002.jpg", "fly (2).png", "image-00004.png"]


def test_a_users_own_config_decides_which_points_there_are(material: Material, tmp_path: Path) -> None:
    folder = material.pictures[0].path.parent
    (tmp_path / "config.xml").write_text(
        '<View><Image name="i" value="$image"/><KeyPointLabels name="k" toName="i">'
        '<Label value="thorax"/><Label value="head"/></KeyPointLabels></View>'
    )
    found = from_folder(folder, folder.parent / "annotations.json", tmp_path / "config.xml")
    truth = found.labelled[0].truth
    assert truth is not None
    assert truth.names == ("thorax", "head")


def test_names_alone_make_a_config(material: Material) -> None:
    found = from_folder(material.pictures[0].path.parent, None, None, ["head", "left_wing", "right_wing"])
    assert not found.labelled and found.control.schema.names == ("head", "left_wing", "right_wing")
    assert found.control.schema.symmetric == ((1, 2),)


def test_one_bad_image_is_left_out_by_its_name_and_the_others_are_used(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"None of the 1 images .* broken\.jpg: Not an image"):
        from_folder(tmp_path, None, None, ("head",))
    shutil.copy(material.pictures[0].path, tmp_path)
    found = from_folder(tmp_path, None, None, ("head",))
    assert [picture.path.name for picture in found.pictures] == [material.pictures[0].path.name]
    assert "Left out broken.jpg: Not an image" in capsys.readouterr().err


def test_a_config_without_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(["--config", "a.xml"])
    assert "--config goes with --images" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--images", "here", "--config", "a.xml"), ("--images", "here", "--labels", "a.json")])
def test_names_go_with_images_alone(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(["--names", "head,tail", *more])
    assert "--names goes with --images" in capsys.readouterr().err


def test_images_need_to_know_the_points(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(["--images", "here"])
    assert "--names head,tail" in capsys.readouterr().err


def test_a_call_is_told_by_all_that_makes_its_project(tmp_path: Path) -> None:
    calls = {options_of(words).call for words in ([], ["--images", str(tmp_path), "--names", "a,b"], ["--images", str(tmp_path), "--names", "a, c"],
                                                  ["--images", str(tmp_path), "--config", "a.xml"], ["--model", "tiny"])}  # fmt: skip
    assert calls == {"make demo", f"make demo IMAGES={tmp_path} NAMES=a,b", f"make demo IMAGES={tmp_path} NAMES=a,c",
                     f"make demo IMAGES={tmp_path} CONFIG={Path('a.xml').resolve()}"}  # fmt: skip


def test_what_cannot_be_used_is_told_in_words(material: Material, tmp_path: Path) -> None:
    folder = material.pictures[0].path.parent
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    other = json.loads((folder.parent / "annotations.json").read_text())
    for image in other["images"]:
        image["file_name"] = "other_" + image["file_name"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    for images, labels, words in (
        (tmp_path / "nowhere", None, "not a folder"),
        (tmp_path / "empty", None, "no images"),
        (folder, tmp_path / "nowhere.json", "not a file"),
        (folder, tmp_path / "bad.json", "COCO"),
        (folder, tmp_path / "other.json", "none of the images"),
    ):
        with pytest.raises(DataError, match=words):
            from_folder(images, labels, None)


@pytest.mark.parametrize(("name", "images", "single"), [("dlc_reaching_mouse", 55, 55), ("glue_tubes", 134, 42)])
def test_real_images_are_read_with_their_truth(shared_keypoints: Path, name: str, images: int, single: int) -> None:
    folder = shared_keypoints / name
    found = from_folder(folder / "images", folder / "annotations.json", None)
    assert (len(found.pictures), len(found.labelled)) == (images, single)


def test_choosing_takes_from_every_group_before_it_takes_twice_from_one() -> None:
    pictures = [Picture(Path(f"{group}{n}.jpg"), 9, 9, None, group) for group in "abc" for n in range(4)]
    chosen = choose(pictures, 6)
    assert sorted(picture.group for picture in chosen) == list("aabbcc")
    assert chosen == choose(pictures, 6)
    assert len(choose(pictures, 99)) == 12


def test_a_correction_keeps_the_ids_of_the_prediction_and_tells_the_truth(material: Material) -> None:
    control, picture = material.control, material.labelled[0]
    assert picture.truth is not None
    truth = replace(picture.truth, visibility=np.where(np.arange(len(picture.truth)) == 1, 1, 2))
    moved = replace(truth, xy=truth.xy + np.float32(9), visibility=np.where(np.arange(len(truth)) == 0, 3, 2))
    prediction = to_regions(control, moved, 384, 384)
    told = to_regions(control, truth, 384, 384)
    result = corrected(prediction, told)
    (back,) = from_result(control, result, 384, 384)
    np.testing.assert_allclose(back.xy[back.placed], truth.xy[truth.placed], atol=0.01)
    assert back.visibility.tolist() == from_result(control, told, 384, 384)[0].visibility.tolist()
    ids = {region["id"] for region in prediction}
    points = [region for region in result if region["type"] == "keypointlabels"]
    assert [region["id"] in ids for region in points] == [False] + [True] * (len(points) - 1)
    assert all(region["origin"] == "prediction-changed" for region in points[1:])


def test_a_correction_of_a_box_keeps_its_points_together() -> None:
    control = parse(
        '<View><Image name="i" value="$image"/><KeyPointLabels name="k" toName="i"><Label value="a"/><Label value="b"/>'
        '</KeyPointLabels><RectangleLabels name="k_bbox" toName="i"><Label value="thing"/></RectangleLabels></View>'
    ).controls[0]
    from kptllm_core.keypoints import KeypointSet

    truth = KeypointSet(("a", "b"), np.array([[10, 10], [60, 60]]), np.array([2, 2]), box=np.array([5, 5, 60, 60]))
    prediction = to_regions(control, replace(truth, xy=truth.xy + np.float32(5)), 100, 100)
    result = corrected(prediction, to_regions(control, truth, 100, 100))
    (box,) = [region["id"] for region in result if region["type"] == "rectanglelabels"]
    assert box == next(region["id"] for region in prediction if region["type"] == "rectanglelabels")
    assert {region["parentID"] for region in result if region["type"] == "keypointlabels"} == {box}


def test_pck_counts_points_that_were_not_drawn_as_missed(material: Material) -> None:
    control, picture = material.control, material.labelled[0]
    truth = picture.truth
    assert truth is not None
    exact = to_regions(control, truth, 384, 384)
    assert pck(control, [(picture, exact)]) == {"0.05": 1.0, "0.1": 1.0, "0.2": 1.0}
    assert pck(control, [(picture, [])]) == {"0.05": 0.0, "0.1": 0.0, "0.2": 0.0}
    first = int(np.flatnonzero(truth.placed)[0])
    hidden = truth.visibility.copy()
    hidden[first] = Visibility.ABSENT
    without = to_regions(control, replace(truth, visibility=hidden), 384, 384)
    placed = int(truth.placed.sum())
    assert pck(control, [(picture, without)])["0.1"] == pytest.approx((placed - 1) / placed, abs=1e-4)


def test_the_login_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    login = Login.of(tmp_path)
    assert Login.of(tmp_path) == login
    assert stat.S_IMODE((tmp_path / "login.json").stat().st_mode) == 0o600
    assert len(login.token) == 40


def test_a_busy_port_is_not_taken() -> None:
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert free_port(taken) not in (0, taken)
    assert free_port(0) > 0


def test_one_demo_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(Conflict, match="Another demo"), alone_in(tmp_path):
        pass


def test_a_service_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    service = Service("It", [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], os.environ, tmp_path / "log")
    with pytest.raises(Unavailable, match="the reason"):
        service.start(lambda: False, 30)


def test_a_service_is_stopped_even_if_it_does_not_want_to(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    service = Service("It", [sys.executable, "-c", deaf], os.environ, tmp_path / "log")
    service.start(lambda: "up" in (tmp_path / "log").read_text(), 30)
    assert service.process is not None
    pid = service.process.pid
    service.stop(0.2)
    assert not psutil.pid_exists(pid)


def test_waiting_is_told_and_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(services, "SIGN", 0.2)
    service = Service("It", [sys.executable, "-c", "import time; time.sleep(99)"], os.environ, tmp_path / "log")
    service.start(lambda: True, 5)
    with pytest.raises(Unavailable, match="did not answer"):
        wait_until(lambda: False, service, 0.7)
    assert f"still waiting for It (0 s); its log: {tmp_path / 'log'}" in capsys.readouterr().err
    service.stop()


def running_demo(folder: Path, model: str) -> tuple[subprocess.Popen[bytes], str]:
    """`make demo` until it waits for a person, and what it said."""
    if label_studio_executable() is None:
        pytest.skip("no Label Studio: `make setup` installs it into .labelstudio/venv, or set LABEL_STUDIO_BIN")
    said = folder / "out"
    with said.open("w") as out:
        demo = subprocess.Popen(
            [sys.executable, "-m", "backend.demo", "--model", model, "--folder", str(folder / "demo")],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    end = time.monotonic() + 500
    while "Ctrl-C stops everything" not in said.read_text():
        assert demo.poll() is None, said.read_text()
        assert time.monotonic() < end, said.read_text()
        time.sleep(1)
    return demo, said.read_text()


@pytest.mark.slow
@pytest.mark.label_studio
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_demo_stops_everything_that_it_started(how: signal.Signals, tiny_model: str, tmp_path: Path) -> None:
    demo, _ = running_demo(tmp_path, tiny_model)
    family = psutil.Process(demo.pid).children(recursive=True)
    assert len(family) >= 4, "Label Studio, supervisor, core and backend"
    demo.send_signal(how)
    code = demo.wait(60)
    _, alive = psutil.wait_procs(family, 40)
    assert not alive, f"still there after {how.name}: {[p.cmdline()[:4] for p in alive]}"
    if how != signal.SIGKILL:
        assert code == 0
        assert "Stopped." in (tmp_path / "out").read_text()


@pytest.mark.slow
@pytest.mark.label_studio
def test_the_same_call_goes_on_with_its_project(tiny_model: str, tmp_path: Path) -> None:
    projects = []
    for said in ("Making the project", "Going on with the project"):
        demo, out = running_demo(tmp_path, tiny_model)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
        assert said in out
        projects.append(re.search(r"/projects/(\d+)/data", out))
    assert projects[0] and projects[1] and projects[0][1] == projects[1][1]
