"""What a long training says of itself: its PCK on categories that it is not trained on, and a picture of its curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kptllm_core.dataset import load_coco
from kptllm_core.episodes import Augmentation, Labelled
from kptllm_core.model import KptLLM
from kptllm_core.objective import collate, loss_of

STILL = Augmentation(upright=1.0, anyway=0.0, loose=0.0, colour=0.0, flip=0.0, cut=0.0, covered=0.0)
BATCHES, EPISODES = 8, 4  # of two views each: one is the other's support
ONLY_BOTH = (1.0, 0.0, 0.0)


class Watch:
    """The same 1-shot episodes each time, drawn once from each folder's categories."""

    def __init__(self, folders: Sequence[Path], tokenizer: Any, size: int, device: torch.device) -> None:
        self.device = device
        self.batches = []
        for folder in folders:
            rng = np.random.default_rng(0)
            source = Labelled(load_coco(folder).samples, STILL, max_points=40)
            for _ in range(BATCHES):
                batch = collate([source.episode(rng, 2, size) for _ in range(EPISODES)], tokenizer, rng, ONLY_BOTH)
                self.batches.append(batch | {"clicked": torch.zeros_like(batch["clicked"])})

    @torch.no_grad()
    def score(self, model: KptLLM, weights: dict[str, Tensor]) -> float:
        """Mean PCK@0.1 of a model with other weights put on it for the time being."""
        held = {n: p.detach().clone() for n, p in model.named_parameters() if n in weights}
        parameters = dict(model.named_parameters())
        model.eval()
        for name in held:
            parameters[name].copy_(weights[name])
        try:
            scores = [loss_of(model, {k: v.to(self.device) for k, v in b.items()}, naming=0)[1]["pck"] for b in self.batches]
        finally:
            for name, value in held.items():
                parameters[name].copy_(value)
        return float(np.mean(scores))


def draw_curve(curve: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and PCK@0.1 over steps, as a picture. curve: what `metrics.json` holds under that name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, keys, title in ((axes[0], ("loss",), "loss"), (axes[1], ("pck", "watch"), "PCK@0.1")):
        for key in keys:
            points = [(c["step"], c[key]) for c in curve if key in c]
            if points:
                label = {"pck": "training episodes (harder)", "watch": "watched categories, 1 shot"}.get(key, key)
                axis.plot(*zip(*points, strict=True), marker="o" if key == "watch" else None, label=label)
        axis.set(title=title, xlabel="steps")
        axis.grid(alpha=0.3)
    if axes[1].lines:
        axes[1].legend()
    figure.savefig(path, dpi=110)
