"""LoRA on one resident base: which layers it touches, what an adapter holds, and switching between adapters.

As in the paper: LoRA on the LLM, everything else is tuned fully; a vision backbone from a hub gets LoRA too, since it is
large. Weights under LoRA never change; those of the parts that do (encoder, prompts, decoder) are kept aside and put back.
"""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from kptllm_core.errors import ArtifactError
from kptllm_core.model import KptLLM

FULL = ("decoder.", "extractor.", "shots.", "prompt_token.", "echo.", "image_tokens.", "vision.", "instances.")
"""Prefixes of the parts that an adapter holds whole, where LoRA does not take them."""
_LORA = re.compile(r"^(llm\.(?!.*(lm_head|embed)).*|vision\.backbone\..*)$")


def add_lora(model: KptLLM) -> None:
    """Puts LoRA slots (B = 0, so nothing changes yet) on the LLM's linear layers and on a hub's vision backbone. Idempotent."""
    if has_lora(model):
        return
    targets = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)) and _LORA.match(name)]
    training = model.training
    inject_adapter_in_model(LoraConfig(r=model.config.lora_rank, lora_alpha=model.config.lora_alpha, target_modules=targets), model)
    model.train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_belongs(name))


def has_lora(model: KptLLM) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def adapter_state(model: KptLLM) -> dict[str, Tensor]:
    """The tensors that an adapter holds: LoRA matrices and the small parts whole, by name."""
    return {name: value.detach() for name, value in model.state_dict().items() if _belongs(name)}


class AdapterSwitch:
    """Holds a base's own small parts, and puts an adapter's tensors on the model or takes them off."""

    def __init__(self, model: KptLLM) -> None:
        self.model = model
        add_lora(model)
        self.base = {name: torch.zeros_like(v) if "lora_B" in name else v.clone() for name, v in adapter_state(model).items()}

    @torch.no_grad()
    def put(self, tensors: dict[str, Tensor] | None) -> None:
        """Activates an adapter; None is the base alone. ArtifactError if names or shapes differ; then nothing changed."""
        tensors = self.base if tensors is None else tensors
        if set(tensors) != set(self.base):
            raise ArtifactError(f"The adapter holds {len(tensors)} tensors, {len(self.base)} expected. It was made for another model.")
        for name, value in tensors.items():
            if value.shape != self.base[name].shape:
                raise ArtifactError(f"The adapter's {name} has shape {tuple(value.shape)}, expected {tuple(self.base[name].shape)}.")
        state = self.model.state_dict()
        for name, value in tensors.items():
            state[name].copy_(value)


def _belongs(name: str) -> bool:
    return "lora_" in name or (name.startswith(FULL) and not _LORA.match(name))
