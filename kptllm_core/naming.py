"""The third task of the paper: what are given points called? Greedy writing of free names, or a choice among some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kptllm_core.language import MAX_NAME_TOKENS, Questions, read_name, write_questions
from kptllm_core.model import Asked, KptLLM
from kptllm_core.vision import Features

BATCH = 8  # points that choose in one pass
NAMES = 32  # whose words are looked up at a time: each word takes a number for every word that there is
Named = list[tuple[str, float]]
"""(name, probability) of each point."""


def write_names(model: KptLLM, tokenizer: PreTrainedTokenizerBase, features: Features, tokens: Tensor) -> Named:
    """Whatever the model says. features: of one image; tokens: (1, K, D) prompt tokens of the points. All names are written at once."""
    count, device = tokens.shape[1], tokens.device
    empty = model.no_support(1, 1, device)
    start = write_questions(tokenizer, [None] * count, [True] * count)
    written = torch.from_numpy(start.tokens[:, :-1]).to(device)
    chance = torch.zeros(count, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    end = int(start.tokens[0, -1])
    on = torch.ones(1, count, dtype=torch.bool, device=device)
    for _ in range(MAX_NAME_TOKENS + 1):
        asked = Asked(written[None], on, torch.full((1, count), written.shape[1], device=device), on)
        _, state = model.ask(features, empty, tokens, asked)
        value, token = model.words(state[0]).float().log_softmax(-1).max(-1)
        chance = chance + torch.where(ended, 0.0, value)
        written = torch.cat([written, torch.where(ended, end, token)[:, None]], 1)
        ended = ended | (token == end)
        if bool(ended.all()):
            break
    words = written[:, Questions.IS_SLOT + 1 :].tolist()
    return [(read_name(tokenizer, w), float(c.exp())) for w, c in zip(words, chance, strict=True)]


def choose_names(model: KptLLM, tokenizer: PreTrainedTokenizerBase, features: Features, tokens: Tensor, names: Sequence[str]) -> Named:
    """The likeliest of `names` for each point. The rest as in `write_names`."""
    questions = write_questions(tokenizer, names, [True] * len(names))
    chosen: Named = []
    for part in tokens[0].split(BATCH):
        asked = Asked.of(questions, len(part), tokens.device)
        prompts = part[:, None].expand(-1, len(names), -1)
        states, _ = model.ask(features.repeat(len(part)), model.no_support(len(part), 1, tokens.device), prompts, asked)
        told = torch.cat([_told(model, *some) for some in zip(states.split(NAMES, 1), asked.tokens.split(NAMES, 1),
                                                              asked.length.split(NAMES, 1), strict=True)], 1)  # fmt: skip
        chance, best = told.softmax(-1).max(-1)
        chosen += [(names[int(b)], float(c)) for b, c in zip(best, chance, strict=True)]
    return chosen


def _told(model: KptLLM, states: Tensor, tokens: Tensor, length: Tensor) -> Tensor:
    """(B, N) log probability of each name. states: (B, N, T, D); tokens: (B, N, T); length: (B, N)."""
    each = model.words(states[:, :, :-1]).float().log_softmax(-1).gather(-1, tokens[:, :, 1:, None]).squeeze(-1)
    slot = torch.arange(each.shape[-1], device=each.device)
    counts = (slot >= Questions.IS_SLOT) & (slot < length.unsqueeze(-1) - 1)
    return (each * counts).sum(-1)
