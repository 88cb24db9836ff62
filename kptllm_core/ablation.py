"""Switching off, at test time, what the paper and this product say is worth having: one part of a loaded model, for a while.

The weights stay those of a model that was trained with the part, so a figure says how much this model leans on it, not how
good a model trained without it would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kptllm_core.decoder import peak
from kptllm_core.errors import InvalidInput
from kptllm_core.keypoints import KeypointSchema, KeypointSet
from kptllm_core.predictor import Example, Predictor
from kptllm_core.scoring import PointPredictor

ABLATIONS = {
    "identify": "names are not written into the questions, so nothing says what a point is before it is looked for",
    "extractor": "the prompt token is the pooled local feature; the cross-attention to the support image is skipped",
    "llm": "the gate through which the LLM's answer enters the heatmap is shut",
    "refinement": "positions are the heatmaps' peaks; the points of an object do not correct each other",
    "layout": "the examples' layouts do not tell where a point may lie",
}


@contextmanager
def without(predictor: Predictor, parts: Sequence[str]) -> Iterator[PointPredictor]:
    """The predictor without some parts, as long as the context lasts. Nothing on disk changes.

    While it lasts, `predictor` itself lacks them, too (but for identify). InvalidInput names an unknown part.
    """
    unknown = sorted(set(parts) - set(ABLATIONS))
    if unknown:
        raise InvalidInput(f"--without {', '.join(unknown)} is not known. Expected one of: {', '.join(ABLATIONS)}.")
    with ExitStack() as stack:
        if set(parts) - {"identify"}:
            # Support sets that were encoded with all parts must not be used without, nor the other way round.
            predictor._supports.clear()
            stack.callback(predictor._supports.clear)
        for part, switch in (("extractor", _pooled), ("llm", _shut), ("refinement", _straight)):
            if part in parts:
                stack.enter_context(switch(predictor.model))
        if "layout" in parts:
            stack.callback(setattr, predictor, "passes", predictor.passes)
            predictor.passes = replace(predictor.passes, by_layout=False)
        yield Unnamed(predictor) if "identify" in parts else predictor


class Unnamed:
    """Asks a predictor without telling it the points' names."""

    def __init__(self, predictor: Predictor) -> None:
        self.base = predictor.base
        self._predictor = predictor

    def predict(
        self,
        images: list[np.ndarray],
        schema: KeypointSchema,
        support: Sequence[Example] = (),
        boxes: Sequence[np.ndarray | None] | None = None,
        prompt: str = "auto",
        asked: list[str] | None = None,
    ) -> list[KeypointSet]:
        if prompt == "text" or not support:
            raise InvalidInput(
                "Without names there is nothing to ask by text. Use --prompt both or visual, with support examples."
            )
        return self._predictor.predict(images, schema, support, boxes, "visual", asked)


@contextmanager
def _pooled(model: Any) -> Iterator[None]:
    layers = model.extractor.layers
    model.extractor.layers = nn.ModuleList()
    try:
        yield
    finally:
        model.extractor.layers = layers


@contextmanager
def _shut(model: Any) -> Iterator[None]:
    gate = model.decoder.head.gate
    opened = gate.detach().clone()
    try:
        with torch.no_grad():
            gate.zero_()
        yield
    finally:
        with torch.no_grad():
            gate.copy_(opened)


@contextmanager
def _straight(model: Any) -> Iterator[None]:
    """Visibility and confidence stay the refinement's: they have no other source."""

    def unrefined(module: nn.Module, arguments: tuple[Any, ...], answer: Any) -> Any:
        return answer._replace(xy=peak(arguments[0]))

    hook = model.decoder.refinement.register_forward_hook(unrefined)
    try:
        yield
    finally:
        hook.remove()
