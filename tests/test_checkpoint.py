"""Folders that explain themselves: whole or absent, checked by hash, refused with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kptllm_core.checkpoint import (
    ADAPTER,
    WEIGHTS,
    load_adapter,
    load_checkpoint,
    publish,
    save_adapter,
    save_checkpoint,
)
from kptllm_core.config import PRESETS, ModelConfig, preset_names
from kptllm_core.errors import ArtifactError


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: str) -> Path:
    from kptllm_core.adapters import add_lora

    loaded = load_checkpoint(tiny_model)
    add_lora(loaded.model)
    save_adapter(tmp_path / "a1", loaded.model, {"base": loaded.base}, {"steps": 0})
    return tmp_path / "a1"


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_one_flipped_bit_anywhere_is_found(adapter: Path, tiny_model: str, share: float) -> None:
    base = load_checkpoint(tiny_model).base
    assert load_adapter(adapter, base).base == base
    flip(adapter / ADAPTER, share)
    with pytest.raises(ArtifactError, match="damaged"):
        load_adapter(adapter, base)


def test_another_base_is_refused_by_name(adapter: Path) -> None:
    with pytest.raises(ArtifactError, match=r"was made for the base tiny-.* this is nano-00000000"):
        load_adapter(adapter, "nano-00000000")


@pytest.mark.parametrize("missing", [ADAPTER, "manifest.json", "adapter.json"])
def test_a_missing_file_is_named(adapter: Path, missing: str, tiny_model: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        load_adapter(adapter, load_checkpoint(tiny_model).base)


def test_a_pickle_is_never_read(adapter: Path, tiny_model: str) -> None:
    import hashlib
    import pickle

    data = pickle.dumps({"weights": 1})
    (adapter / ADAPTER).write_bytes(data)
    manifest = json.loads((adapter / "manifest.json").read_text())
    manifest[ADAPTER] = hashlib.sha256(data).hexdigest()
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="safetensors"):
        load_adapter(adapter, load_checkpoint(tiny_model).base)


def test_a_checkpoint_comes_back_and_names_its_weights(tmp_path: Path, tiny_model: str) -> None:
    loaded = load_checkpoint(tiny_model)
    save_checkpoint(tmp_path / "copy", loaded.model, loaded.tokenizer, {})
    assert load_checkpoint(tmp_path / "copy").base == loaded.base  # the same bytes, the same name
    (tmp_path / "copy" / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        load_checkpoint(tmp_path / "copy")
    assert load_checkpoint(tmp_path / "copy", untrained=True).base == "tiny-untrained"


def test_unknown_models_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"No model .giant.\. Known presets: .*nano"):
        load_checkpoint("giant")
    shutil.copytree(PRESETS / "tiny", tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    (tmp_path / "t" / "config.json").write_text(json.dumps({**config, "colour": 1}))
    with pytest.raises(ArtifactError, match="unknown keys: colour"):
        ModelConfig.load(tmp_path / "t")


def test_publishing_is_whole_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    publish(folder, lambda new: (new / "a").write_text("1"))

    def fails(new: Path) -> None:
        (new / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(folder, fails)
    assert (folder / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    folder.rename(tmp_path / ".x.123.old")  # where a kill between two renames leaves it
    with pytest.raises(OSError, match="disk full"):
        publish(folder, fails)
    assert (folder / "a").read_text() == "1"
    publish(folder, lambda new: (new / "a").write_text("3"))
    assert (folder / "a").read_text() == "3" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", [n for n in preset_names() if (PRESETS / n / WEIGHTS).is_file()])
def test_shipped_weights_are_whole_and_small(name: str) -> None:
    loaded = load_checkpoint(name)
    assert sum(f.stat().st_size for f in loaded.folder.iterdir()) < 15_000_000
    assert loaded.base.startswith(f"{name}-")
