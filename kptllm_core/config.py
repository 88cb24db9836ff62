"""What a model is made of: one dataclass, saved as `config.json` beside the weights. Imports no torch.

Presets differ in these values and in nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kptllm_core.errors import ArtifactError

PRESETS = Path(__file__).parent / "presets"
SEARCHES = ("whole", "windows", "names")  # for objects: examples that fill their images; small ones, sought in windows; no example at all


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of every part. Unknown keys in a file are errors."""

    name: str
    """The preset's name; the first part of every version string."""
    image_size: int = 192
    """Side of the square crops that the model sees, pixels."""
    vision: dict[str, Any] = field(default_factory=lambda: {"type": "hierarchical"})
    """`{"type": "hierarchical", "widths", "depths", "layers", "heads"}` for our own encoder, or `{"type": "transformers",
    "hub": "facebook/dinov2-small"}` or `{"type": "transformers", "config": {"model_type": …}}` for any of transformers'."""
    features: tuple[int, int, int] = (64, 96, 128)
    """Channels of the fine, middle and coarse feature maps."""
    llm: dict[str, Any] = field(default_factory=dict)
    """`{"hub": name}` or a transformers config `{"model_type": "llama", …}` of a causal LLM."""
    prompt_layers: int = 2
    """Cross-attention layers of the prompt feature extractor (the paper's two)."""
    prompt_heads: int = 4
    correlation_groups: int = 4
    """Channel groups that are correlated apart, at each scale."""
    head_width: int = 24
    """Channels of the heatmap head."""
    refine_width: int = 128
    """Width of the refinement over all points of an object."""
    refine_layers: int = 2
    refine_heads: int = 4
    instance_width: int = 64
    """Channels of the head that finds objects in a whole image."""
    sureness: dict[str, list[float]] = field(default_factory=lambda: {k: [10.2, 4.6, 4.6, 0.0] for k in SEARCHES})
    """For each kind of search, how what is known of a found box says how likely it is right (`sureness.py`); fitted after training."""
    lora_rank: int = 16
    """Rank of an adapter's LoRA matrices."""
    lora_alpha: int = 32

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`; ArtifactError names a missing file or an unknown key."""
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ArtifactError(f"No model at {folder}: {path.name} is missing. Known presets: {', '.join(preset_names())}.") from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}.") from None
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ArtifactError(f"{path} has unknown keys: {', '.join(unknown)}. Known: {', '.join(f.name for f in fields(cls))}.")
        values["features"] = tuple(values.get("features", cls.features))
        config = cls(**values)
        if {kind: len(weights) for kind, weights in config.sureness.items()} != dict.fromkeys(SEARCHES, 4):
            raise ArtifactError(f"{path}: sureness has 4 numbers for each of {', '.join(SEARCHES)}. Leave the key out, then run `calibrate`.")
        return config

    def save(self, folder: Path) -> None:
        (Path(folder) / "config.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def preset_names() -> list[str]:
    """Names of the presets in the package."""
    return sorted(p.parent.name for p in PRESETS.glob("*/config.json"))


def model_folder(model: str | Path) -> Path:
    """The folder of a preset or of a checkpoint on disk. ArtifactError if there is neither."""
    folder = PRESETS / str(model) if str(model) in preset_names() else Path(model)
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"No model '{model}'. Known presets: {', '.join(preset_names())}; or give a checkpoint folder.")
    return folder
