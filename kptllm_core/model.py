"""KptLLM: the parts around a causal LLM. Nothing but tensors; images and names are the predictor's business.

The K questions of an image share one prefix: the query image's tokens and the complete support set. Behind it lie K short
segments; a block mask lets each see the prefix and itself, and positions start again for each, so one pass for K points
answers as K passes of one would (the paper's way), at hardly more than the cost of one.

    prefix: [image tokens] [one prompt token for each support point, all at one position: a set has no order]
    segment k: <ask> PROMPT_k <is> name… <keypoint>
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kptllm_core.config import ModelConfig
from kptllm_core.decoder import Answer, Decoder, Support
from kptllm_core.instances import Detected, Instances
from kptllm_core.language import Questions
from kptllm_core.prompts import PromptFeatureExtractor, ShotAttention
from kptllm_core.shots import Shots, look_of
from kptllm_core.vision import Features, build_encoder

MAX_TOKENS = 2048  # of all questions in one pass: its mask grows with their square


class Asked(NamedTuple):
    """Questions as tensors. tokens: (B, K, T); prompted, valid: (B, K) bool; length: (B, K)."""

    tokens: Tensor
    prompted: Tensor
    length: Tensor
    valid: Tensor

    @classmethod
    def of(cls, questions: Questions, batch: int, device: torch.device) -> Asked:
        """The same questions for each image of a batch."""
        arrays = (questions.tokens, questions.prompted, questions.length, np.ones(len(questions.length), bool))
        return cls(*(torch.from_numpy(a).to(device).expand(batch, *a.shape) for a in arrays))


class KptLLM(nn.Module):
    """All parts of one model. `vocabulary` is the tokenizer's length, special tokens included."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vision: nn.Module = build_encoder(config.vision, config.features)
        self.llm = build_llm(config.llm, vocabulary)
        dim = self.dim = int(self.llm.config.hidden_size)
        """Width of the LLM."""
        self.image_tokens = nn.Sequential(nn.LayerNorm(config.features[2]), nn.Linear(config.features[2], dim))
        self.extractor = PromptFeatureExtractor(config.features, dim, config.prompt_layers, config.prompt_heads)
        self.shots = ShotAttention(dim)
        self.prompt_token = nn.Linear(dim, dim)
        self.echo = nn.Linear(dim, dim)  # of the prompt in all tokens behind it: from scratch, attention hardly finds it
        nn.init.normal_(self.echo.weight, std=0.01)
        nn.init.zeros_(self.echo.bias)
        self.decoder = Decoder(config, dim)
        self.instances = Instances(config, dim)

    def encode(self, images: Tensor) -> Features:
        """(B, 3, S, S) uint8 or 0…255 → feature maps."""
        return self.vision(images)

    def show(self, features: list[Features], xy: Tensor, known: Tensor) -> Shots:
        """S support images for each of B queries. features: S items with batch B; xy: (B, S, K, 2) in 0…1; known: (B, S, K) bool."""
        correlation = self.decoder.correlation
        tokens = torch.stack([self.extractor(f, xy[:, s]) for s, f in enumerate(features)], 1)
        parts = [correlation.sample(correlation.describe(f), xy[:, s]) for s, f in enumerate(features)]
        fine, middle, coarse = (torch.stack(level, 1) for level in zip(*parts, strict=True))
        return Shots(tokens, (fine, middle, coarse), xy, known, torch.stack([look_of(f) for f in features], 1))

    def support(self, shots: Shots) -> Support:
        """What the shots say together."""
        weight, known = self.shots(shots.token, shots.known), shots.known.any(1)
        token = (shots.token * weight.unsqueeze(-1).to(shots.token.dtype)).sum(1)
        layout = torch.where(known.unsqueeze(-1), (shots.xy * weight.unsqueeze(-1)).sum(1), 0.5)
        return Support(token, shots.descriptor, weight, known, layout)

    def no_support(self, batch: int, count: int, device: torch.device) -> Support:
        """The support of a question by name alone."""
        fine, middle, coarse = (torch.zeros(batch, 1, count, c, device=device) for c in self.config.features)
        unknown = torch.zeros(batch, count, dtype=torch.bool, device=device)
        return Support(torch.zeros(batch, count, self.dim, device=device), (fine, middle, coarse),
                       torch.zeros(batch, 1, count, device=device), unknown, torch.full((batch, count, 2), 0.5, device=device))  # fmt: skip

    def ask(self, features: Features, prefix: Support, prompts: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """One pass for K questions.

        prefix: the complete support set. prompts: (B, K, D) prompt tokens of the asked points.
        Returns the states of all tokens (B, K, T, D) and those of `<keypoint>` (B, K, D).
        """
        batch, count, width = asked.tokens.shape
        most = max(MAX_TOKENS // width, 1)
        if count > most:  # segments never see each other, so more passes answer the same
            some = [slice(start, start + most) for start in range(0, count, most)]
            parts = [self.ask(features, prefix, prompts[:, s], Asked(*(t[:, s] for t in asked))) for s in some]
            return torch.cat([states for states, _ in parts], 1), torch.cat([last for _, last in parts], 1)
        embed = self.llm.get_input_embeddings()
        image = self.image_tokens(F.avg_pool2d(features.coarse, 2).flatten(2).transpose(1, 2))
        set_tokens = self.prompt_token(prefix.token) * prefix.known.unsqueeze(-1)
        words = embed(asked.tokens)
        slot = torch.arange(width, device=words.device)
        at_prompt = ((slot == Questions.PROMPT_SLOT) & asked.prompted.unsqueeze(-1)).unsqueeze(-1)
        behind = ((slot >= Questions.IS_SLOT) & asked.prompted.unsqueeze(-1)).unsqueeze(-1)
        prompt, echo = (layer(prompts).unsqueeze(2).to(words.dtype) for layer in (self.prompt_token, self.echo))
        words = torch.where(at_prompt, prompt, words) + torch.where(behind, echo, 0.0)
        place, used = packed(asked.length, width)
        words = words.flatten(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, words.shape[-1]))
        sequence = torch.cat([image.to(words.dtype), set_tokens.to(words.dtype), words], 1)

        n_image, n_set = image.shape[1], set_tokens.shape[1]
        start = n_image + 1
        position = torch.cat([torch.arange(n_image, device=words.device), torch.full((n_set,), n_image, device=words.device)])
        position = torch.cat([position.expand(batch, -1), start + place % width], 1)
        mask = block_mask(n_image, prefix.known, place // width, used)
        bias = torch.zeros(mask.shape, dtype=sequence.dtype, device=words.device).masked_fill(~mask, torch.finfo(sequence.dtype).min)
        hidden = self.llm.base_model(inputs_embeds=sequence, attention_mask=bias, position_ids=position, use_cache=False).last_hidden_state
        hidden = hidden[:, n_image + n_set :] * used.unsqueeze(-1).to(hidden.dtype)
        states = hidden.new_zeros(batch, count * width, hidden.shape[-1]).scatter(1, place.unsqueeze(-1).expand_as(hidden), hidden)
        states = states.unflatten(1, (count, width))
        last = (asked.length - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, states.shape[-1])
        return states, states.gather(2, last).squeeze(2)

    def words(self, states: Tensor) -> Tensor:
        """(…, D) states → (…, V) logits of the next token."""
        return self.llm.get_output_embeddings()(states)

    def correlate(self, features: Features, support: Support) -> list[Tensor]:
        """What lies under the support's points against every place: (B, K, groups, H, W) at each scale."""
        return self.decoder.correlation(self.decoder.correlation.describe(features), support)

    def locate(self, features: Features, support: Support, state: Tensor, planes: list[Tensor]) -> Tensor:
        """Heatmap logits (B, K, H, W) of the asked points, each independent of the others."""
        return self.decoder.head(features.fine, planes, support, state)

    def refine(self, heat: Tensor, planes: list[Tensor], features: Features, support: Support, state: Tensor, asked: Tensor,
               **fixed: Any) -> Answer:  # fmt: skip
        """All points of one object together; see `Refinement`."""
        return self.decoder.refinement(heat, planes, features, support, state, asked, **fixed)

    def detect(self, features: Features, support: Support, asked: Asked) -> Detected:
        """Boxes of the objects that have the asked points, in whole images. What the points' part computes is taken as it is."""
        _, state = self.ask(features, support, support.token, asked)
        planes = self.correlate(features, support)
        heat = self.locate(features, support, state, planes)
        return self.instances(features, [p.detach() for p in planes], heat.detach(), state, asked.valid)


def packed(length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Segments without their padding, one behind the other: what an LLM pass costs is then what was asked.

    length: (B, K) of K segments of `width` slots. Returns place (B, L): which of the K · width slots stands there, in order, and
    used (B, L): False where a row has fewer than the longest.
    """
    used = (torch.arange(width, device=length.device) < length.unsqueeze(-1)).flatten(1)
    place = (~used).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(used.sum(-1).max())]
    return place, used.gather(1, place)


def block_mask(n_image: int, known: Tensor, segment: Tensor, used: Tensor) -> Tensor:
    """(B, 1, L, L) bool, True = may look. known: (B, M) of the support set. segment, used: (B, T) of the tokens behind it, each
    segment's in their order. Every row sees at least itself."""
    batch, device = known.shape[0], known.device
    prefix = n_image + known.shape[1]
    total = prefix + segment.shape[1]
    mask = torch.zeros(batch, total, total, dtype=torch.bool, device=device)
    mask[:, :n_image, :n_image] = torch.ones(n_image, n_image, device=device).tril().bool()
    mask[:, n_image:, :n_image] = True
    mask[:, n_image:, n_image:prefix] = known[:, None, :]
    own = (segment.unsqueeze(2) == segment.unsqueeze(1)) & used.unsqueeze(1)
    mask[:, prefix:, prefix:] = own.tril()
    mask |= torch.eye(total, dtype=torch.bool, device=device)
    return mask.unsqueeze(1)


def build_llm(config: dict[str, Any], vocabulary: int) -> Any:
    """A causal LLM from a hub name or from a transformers config, with room for the tokenizer's vocabulary."""
    values = dict(config)
    if "hub" in values:
        llm = AutoModelForCausalLM.from_pretrained(values["hub"], dtype=torch.float32)
    else:
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), vocab_size=vocabulary, **values))
    if llm.get_input_embeddings().weight.shape[0] < vocabulary:
        llm.resize_token_embeddings(vocabulary)
    return llm
