from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptllm_core import store as store_module
from kptllm_core.errors import ArtifactError, Conflict, InvalidInput, KptError, NotFound, TooLarge, Unavailable
from kptllm_core.store import AdapterStore, ImageStore, check_adapter_name, read_json, write_json


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: ImageStore, data: bytes) -> str:
    store.put(sha(data), data)
    return sha(data)


def test_an_image_comes_back_and_survives_a_restart(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    name = put(store, b"pixels")
    put(store, b"pixels")
    assert store.read(name) == b"pixels" and len(store) == 1 and store.total_bytes == 6
    again = ImageStore(tmp_path)
    assert again.read(name) == b"pixels" and again.total_bytes == 6


def test_wrong_hash_bad_name_and_size_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, max_image_bytes=10)
    with pytest.raises(InvalidInput, match="SHA-256"):
        store.put(sha(b"a"), b"b")
    with pytest.raises(TooLarge, match="at most 10"):
        store.put(sha(b"x" * 11), b"x" * 11)
    for name in ("../../etc/passwd", "A" * 64, "", "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(InvalidInput, match="64 lower-case"):
            store.put(name, b"")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_least_recently_used_go_first_but_never_those_in_use(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, max_bytes=30)
    a, b, c = (put(store, letter * 10) for letter in (b"a", b"b", b"c"))
    store.read(a)
    d = put(store, b"d" * 10)
    assert store.missing([a, b, c, d]) == [b]
    with store.in_use([a, c]):
        e = put(store, b"e" * 10)
        f = put(store, b"f" * 10)
        assert store.missing([a, c, e, f, d]) == [e, d]
        with store.in_use([a, c, f]):
            g = put(store, b"g" * 10)  # nothing else may go: over the limit rather than lost
            assert store.missing([a, c, f, g]) == []
    assert store.total_bytes <= 30


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, max_bytes=30)
    a, b, c = (put(store, letter * 10) for letter in (b"a", b"b", b"c"))
    for seconds, name in ((1, b), (2, c), (3, a)):
        os.utime(tmp_path / name[:2] / name, (seconds, seconds))
    again = ImageStore(tmp_path, max_bytes=30)
    put(again, b"d" * 10)
    assert again.missing([a, b, c]) == [b]


def test_a_cut_off_write_is_cleaned_up_at_the_next_start(tmp_path: Path) -> None:
    name = put(ImageStore(tmp_path), b"pixels")
    (tmp_path / name[:2] / f".{'0' * 64}.12.tmp").write_bytes(b"pix")
    assert len(ImageStore(tmp_path)) == 1
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_damage_on_disk_is_noticed_and_the_image_asked_for_again(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    name = put(store, b"pixels")
    (tmp_path / name[:2] / name).write_bytes(b"pixelz")
    with pytest.raises(NotFound, match="Upload it again"):
        store.read(name)
    assert store.missing([name, name]) == [name]
    put(store, b"pixels")
    (tmp_path / name[:2] / name).unlink()
    assert store.missing([name]) == [name] and store.total_bytes == 0


def test_a_link_outlives_eviction(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", max_bytes=10)
    name = put(store, b"a" * 10)
    store.link(name, tmp_path / "kept")
    store.link(name, tmp_path / "kept")
    put(store, b"b" * 10)
    assert name not in store and (tmp_path / "kept").read_bytes() == b"a" * 10
    with pytest.raises(NotFound):
        store.link(name, tmp_path / "other")


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", lambda handle: None)
    put(store, b"first")
    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(Unavailable, match="disk is full") as caught:
        store.put(sha(b"second"), b"second")
    assert caught.value.to_json()["code"] == "disk_full"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [sha(b"first")]


def test_many_threads_share_it(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, max_bytes=400)
    failures: list[Exception] = []

    def work(seed: int) -> None:
        try:
            for i in range(15):
                data = b"%04d" % (i * (seed % 3 + 1)) * 5
                put(store, data)
                with store.in_use([sha(data)]):
                    if not store.missing([sha(data)]):
                        store.read(sha(data))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    on_disk = list(tmp_path.glob("*/*"))
    assert store.total_bytes == sum(p.stat().st_size for p in on_disk) <= 400 and len(store) == len(on_disk)


def adapter(folder: Path, base: str = "tiny-00000000") -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "adapter.json", {"base": base})
    return folder


def test_adapters_are_published_whole_listed_and_deleted(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    name = "nano-1a2b3c4d+p3+r2"
    store.publish(adapter(tmp_path / "run" / "adapter"), name)
    assert name in store and store.path(name).is_dir() and not (tmp_path / "run" / "adapter").exists()
    (entry,) = store.list()
    assert entry["name"] == name and entry["base"] == "tiny-00000000" and entry["bytes"] > 0
    with pytest.raises(Conflict, match="exists already"):
        store.publish(adapter(tmp_path / "run" / "adapter"), name)
    with pytest.raises(ArtifactError, match=r"'other' is not here. Known: nano-1a2b3c4d\+p3\+r2"):
        store.path("other")
    store.delete(name)
    assert store.list() == [] and not list((tmp_path / "adapters").iterdir())
    with pytest.raises(NotFound):
        store.delete(name)


@given(st.text(max_size=20) | st.sampled_from(["..", ".", "../x", "a/b", "a\\b", ".hidden", "a\0b", "%2e%2e", "a\n", "x" * 129]))
def test_no_adapter_name_leaves_its_folder(name: str) -> None:
    try:
        check_adapter_name(name)
    except KptError:
        return
    folder = Path("/adapters")
    assert Path(os.path.normpath(folder / name)).parent == folder and "\0" not in name and not name.startswith(".")


def test_json_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert read_json(path) is None
    write_json(path, {"a": 1})
    write_json(path, {"a": 2}, durable=False)
    assert read_json(path) == {"a": 2} and [p.name for p in tmp_path.iterdir()] == ["state.json"]
    path.write_bytes(b"{")
    assert read_json(path) is None
