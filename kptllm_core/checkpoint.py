"""Self-describing folders: a checkpoint (base weights) or an adapter (what a project learned on top of a base).

    checkpoint/  config.json  model.safetensors (fp16)  tokenizer.json  tokenizer_config.json  metrics.json  manifest.json
    adapter/     adapter.json  adapter.safetensors (fp16)  metrics.json  manifest.json

`manifest.json` holds the SHA-256 of every file, since safetensors has no checksum of its own. Weights are safetensors,
never pickle. Folders are written beside their place and renamed, so that there is a whole one or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kptllm_core.adapters import adapter_state
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.errors import ArtifactError
from kptllm_core.language import load_tokenizer
from kptllm_core.model import KptLLM

WEIGHTS, ADAPTER = "model.safetensors", "adapter.safetensors"
MANIFEST = "manifest.json"  # the last of a folder's files to be written


@dataclass
class Checkpoint:
    """A model in memory. `base` names its weights: preset + first 8 hex digits of their SHA-256."""

    model: KptLLM
    tokenizer: PreTrainedTokenizerBase
    base: str
    folder: Path


def load_checkpoint(model: str | Path, untrained: bool = False) -> Checkpoint:
    """A preset by name, or a folder. ArtifactError says which file is missing, damaged or does not fit.

    untrained: weights as initialised (seed 0), for comparisons.
    """
    folder = model_folder(model)
    config = ModelConfig.load(folder)
    tokenizer = _tokenizer(folder, config)
    torch.manual_seed(0)
    built = KptLLM(config, len(tokenizer)).eval()
    weights = folder / WEIGHTS
    if untrained:
        return Checkpoint(built, tokenizer, f"{config.name}-untrained", folder)
    if not weights.is_file():
        if "hub" not in config.llm:
            raise ArtifactError(f"{folder} has no {WEIGHTS}. Train it with `python -m kptllm_core train --model {config.name} …`, "
                                "or pass --untrained.")  # fmt: skip
        return Checkpoint(built, tokenizer, f"{config.name}-{_digest(folder / 'config.json')[:8]}", folder)
    verify(folder)
    _load_exactly(built, _read(weights), weights)
    return Checkpoint(built, tokenizer, f"{config.name}-{_digest(weights)[:8]}", folder)


def save_checkpoint(folder: Path, model: KptLLM, tokenizer: PreTrainedTokenizerBase, metrics: dict[str, Any],
                    weights: dict[str, Tensor] | None = None) -> None:  # fmt: skip
    """Writes a checkpoint folder whole, replacing one that is there. `weights` stands in for the model's own (an average, say)."""
    state = weights if weights is not None else model.state_dict()
    tied = {"llm.lm_head.weight"} if model.llm.config.tie_word_embeddings else set()
    half = {k: v.detach().cpu().half().contiguous() for k, v in state.items() if k not in tied}

    def write(new: Path) -> None:
        model.config.save(new)
        tokenizer.save_pretrained(str(new))
        write_tensors(half, new / WEIGHTS)
        (new / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        card = folder / "README.md"
        if card.is_file():
            shutil.copy(card, new / card.name)

    publish(folder, write)


def save_config(folder: Path, config: ModelConfig) -> None:
    """Writes a checkpoint's config.json anew, whole or not at all; everything else stays as it is."""

    def write(new: Path) -> None:
        for path in folder.iterdir():
            if path.is_file() and path.name != MANIFEST:
                shutil.copy(path, new / path.name)
        config.save(new)

    verify(folder)
    publish(folder, write)


@dataclass(frozen=True)
class Adapter:
    """What a project learned: tensors by name, and where they belong."""

    name: str
    base: str
    tensors: dict[str, Tensor]
    info: dict[str, Any]


def save_adapter(folder: Path, model: KptLLM, info: dict[str, Any], metrics: dict[str, Any],
                 weights: dict[str, Tensor] | None = None) -> None:  # fmt: skip
    """Writes an adapter folder. `info` must hold `base`; it may hold the schema, hashes of data and config, the parent."""
    state = adapter_state(model) if weights is None else weights
    half = {k: v.detach().cpu().half().contiguous() for k, v in state.items()}

    def write(new: Path) -> None:
        write_tensors(half, new / ADAPTER)
        (new / "adapter.json").write_text(json.dumps(info, indent=1) + "\n")
        (new / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    publish(folder, write)


def load_adapter(folder: str | Path, base: str) -> Adapter:
    """Reads and verifies an adapter for the given base; ArtifactError if it is damaged or was made for another one."""
    folder = Path(folder)
    if not (folder / "adapter.json").is_file():
        raise ArtifactError(f"No adapter at {folder}: adapter.json is missing. Give the folder that `train --lora --out` wrote.")
    verify(folder)
    info = json.loads((folder / "adapter.json").read_text())
    if info.get("base") != base:
        raise ArtifactError(f"The adapter {folder.name} was made for the base {info.get('base')}; this is {base}. "
                            "Train it again on this base, or load its base.")  # fmt: skip
    return Adapter(folder.name, base, _read(folder / ADAPTER), info)


def publish(folder: Path, write: Any) -> None:
    """Calls `write(new folder)`, adds the manifest, flushes everything to disk and puts the folder in its place by rename."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _bring_back(folder)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        write(new)
        files = sorted(p for p in new.iterdir() if p.is_file())
        (new / MANIFEST).write_text(json.dumps({p.name: _digest(p) for p in files if p.name != "README.md"}, indent=1) + "\n")
        for path in new.iterdir():
            path.chmod(0o644)  # another user may serve what this one trained
            _flush(path)
        _flush(new)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _bring_back(folder: Path) -> None:
    """A kill between two renames of `publish` leaves the folder under another name, and none in its place."""
    left = sorted(folder.parent.glob(f".{folder.name}.*.old"), key=lambda p: p.stat().st_mtime)
    if left and not folder.exists():
        left[-1].rename(folder)


def verify(folder: Path) -> None:
    """Compares every file with the manifest; ArtifactError names the first that differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ArtifactError(f"{folder} has no readable manifest.json; its files cannot be trusted. Copy the folder again, whole.") from None
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder} lacks {name}. Copy the folder again, whole.")
        found = _digest(path)
        if found != expected:
            raise ArtifactError(f"{path} is damaged: SHA-256 {found[:12]}…, expected {expected[:12]}…. Copy it again.")


def _tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if "hub" in config.llm:
        return load_tokenizer(config.llm["hub"])
    raise ArtifactError(f"{folder} has no tokenizer.json. Copy the folder again, whole.")


def _load_exactly(model: KptLLM, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads strictly, save for the output embedding where it is the input embedding."""
    try:
        missing, unknown = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    except RuntimeError as error:  # torch's word for shapes that differ
        raise ArtifactError(f"{path} does not fit config.json: {str(error).splitlines()[-1].strip()}") from None
    missing = [k for k in missing if not (k == "llm.lm_head.weight" and model.llm.config.tie_word_embeddings)]
    if missing or unknown:
        raise ArtifactError(f"{path} does not fit config.json: missing {missing[:3]}, unknown {unknown[:3]}. Weights and config belong together.")


def write_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """One safetensors file. Raises OSError, as all that writes does; safetensors itself has an error of its own for a full disk."""
    try:
        save_file(tensors, path, metadata=about)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, os.strerror(int(number[1])) if number else str(error), str(path)) from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is no readable safetensors file: {error}.") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
