"""Episodes → a batch of tensors → the loss. `L_LM + 2·L_position` of the paper, with heatmaps, visibility and confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kptllm_core.decoder import Support
from kptllm_core.episodes import Episode
from kptllm_core.instances import instances_loss
from kptllm_core.keypoints import Visibility
from kptllm_core.language import Questions, write_questions
from kptllm_core.lexicon import lexicon
from kptllm_core.model import Asked, KptLLM
from kptllm_core.vision import Features

SIGMA = 1.0  # of a heatmap's target, cells
NEAR = 0.1  # a point is right if it lies within this share of the object's size
PROMPTS = ("both", "visual", "text")
PROMPT_SHARE = (0.4, 0.3, 0.3)
RARE = (2.0, 1.0, 2.0)  # weights of occluded, visible and absent points: who is told that a point is absent need not look for it
WRONG_SHOT = 0.15  # share of queries with three or more shots of which one shows something else

Batch = dict[str, Tensor]


def collate(episodes: Sequence[Episode], tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator,
            share: Sequence[float] = PROMPT_SHARE, renaming: float = 0.0) -> Batch:  # fmt: skip
    """Every view of every episode is a query with the other views as support (a random number of them).

    share: of the PROMPTS. renaming: share of episodes whose names are written in another style of the lexicon than the
    canonical one. Of many shots one may be of another episode.

    images (B, 3, S, S) uint8; xy (B, K, 2), visibility (B, K), valid (B, K): the query's points, padded to K;
    size (B,); shots (B, V-1) indices into the batch, shot_on (B, V-1); tokens, prompted, length: the questions;
    named (B, K); canonical (B,): whether names stand as the lexicon has them; called, called_length: the same questions with
    the names of the data, which the model learns to say; clicked (B, K): points that are given, as by a person's click.
    """
    views = episodes[0].images.shape[0]
    count = max(e.xy.shape[1] for e in episodes)
    rows: list[dict[str, Any]] = []
    for number, episode in enumerate(episodes):
        k = episode.xy.shape[1]
        prompt = "visual" if episode.names is None else rng.choice(PROMPTS, p=share)
        renamed = prompt != "visual" and rng.random() < renaming
        questions = write_questions(tokenizer, _written(episode, prompt, renamed, rng), [prompt != "text"] * k)
        called = write_questions(tokenizer, episode.names or [None] * k, [True] * k)
        for view in range(views):
            others = [number * views + v for v in rng.permutation(views) if v != view]
            shots = 0 if prompt == "text" else int(rng.integers(1, views))
            if shots >= 3 and len(episodes) > 1 and rng.random() < WRONG_SHOT:
                other = (number + int(rng.integers(1, len(episodes)))) % len(episodes)
                others[0] = other * views + view
            rows.append({"questions": questions, "called": called, "shots": others, "shot_on": [i < shots for i in range(views - 1)],
                         "valid": [True] * k + [False] * (count - k), "canonical": not renamed})  # fmt: skip
    tokens, prompted, length, named = _padded([r["questions"] for r in rows], count, tokenizer.pad_token_id)
    called_tokens, _, called_length, called_named = _padded([r["called"] for r in rows], count, tokenizer.pad_token_id)
    lines, points = (len(rows), count), [e.xy.shape[1] for e in episodes]
    xy, visibility = np.zeros((*lines, 2), np.float32), np.zeros(lines, np.int64)
    for number, (episode, k) in enumerate(zip(episodes, points, strict=True)):
        part = slice(number * views, (number + 1) * views)
        xy[part, :k], visibility[part, :k] = episode.xy, episode.visibility
    arrays = {
        "images": np.concatenate([e.images for e in episodes]).transpose(0, 3, 1, 2), "xy": xy, "visibility": visibility,
        "size": np.concatenate([e.size for e in episodes]), "shots": np.array([r["shots"] for r in rows]),
        "shot_on": np.array([r["shot_on"] for r in rows]), "valid": np.array([r["valid"] for r in rows]), "tokens": tokens,
        "prompted": prompted, "length": length, "named": named, "canonical": np.array([r["canonical"] for r in rows]),
        "called": called_tokens, "called_length": called_length, "called_named": called_named,
        "clicked": (rng.random((len(rows), 1)) < 0.2) & (rng.random(lines) < 0.15),
        **_scenes(episodes, views),
    }  # fmt: skip
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}


def _scenes(episodes: Sequence[Episode], views: int) -> dict[str, np.ndarray]:
    """Whole images in which the objects of an episode are to be found: as its first view's question, with its support.

    scenes (N, 3, S, S) uint8; scene_boxes (N, M, 4); scene_count (N,) boxes that are real; scene_row (N,) the view's row.
    """
    found = [(n * views, e.scene) for n, e in enumerate(episodes) if e.scene is not None]
    size = episodes[0].images.shape[1]
    most = max((len(s.boxes) for _, s in found), default=0)
    boxes = np.zeros((len(found), max(most, 1), 4), np.float32)
    for i, (_, scene) in enumerate(found):
        boxes[i, : len(scene.boxes)] = scene.boxes
    images = np.array([s.image for _, s in found], np.uint8).reshape(-1, size, size, 3)
    return {"scenes": images.transpose(0, 3, 1, 2), "scene_boxes": boxes, "scene_count": np.array([len(s.boxes) for _, s in found], np.int64),
            "scene_row": np.array([row for row, _ in found], np.int64)}  # fmt: skip


def _written(episode: Episode, prompt: str, renamed: bool, rng: np.random.Generator) -> list[str | None]:
    """An episode's names as a question has them: none at all, the canonical ones, or all in one other style."""
    if episode.names is None or prompt == "visual":
        return [None] * episode.xy.shape[1]
    style = lexicon().style(rng)
    return [lexicon().write(n, style, rng) if renamed else lexicon().canonical(n) for n in episode.names]


def _padded(questions: Sequence[Questions], count: int, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Questions of several images in one: tokens (B, count, T), prompted, length and named (B, count)."""
    width = max(q.tokens.shape[1] for q in questions)
    tokens = np.full((len(questions), count, width), pad, np.int64)
    prompted, length, named = (np.zeros((len(questions), count), t) for t in (bool, np.int64, bool))
    for i, q in enumerate(questions):
        k, t = q.tokens.shape
        tokens[i, :k, :t], prompted[i, :k], length[i, :k], named[i, :k] = q.tokens, q.prompted, q.length, q.named
    return tokens, prompted, length, named


def placed(visibility: Tensor) -> Tensor:
    """True where a point has a position."""
    return (visibility == Visibility.VISIBLE) | (visibility == Visibility.OCCLUDED)


def loss_of(model: KptLLM, batch: Batch, naming: int = 8) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch and its parts. The first `naming` views also name their own points."""
    xy, visibility, valid = batch["xy"], batch["visibility"], batch["valid"]
    features = model.encode(batch["images"])
    shots = [features.pick(batch["shots"][:, s]) for s in range(batch["shots"].shape[1])]
    known = (placed(visibility) & valid)[batch["shots"]] & batch["shot_on"].unsqueeze(-1)
    support = model.support(model.show(shots, xy[batch["shots"]], known))
    asked = Asked(batch["tokens"], batch["prompted"] & support.known, batch["length"], valid)
    states, state = model.ask(features, support, support.token, asked)
    planes = model.correlate(features, support)
    heat = model.locate(features, support, state, planes)
    answer = model.refine(heat, planes, features, support, state, valid, fixed=batch["clicked"] & placed(visibility) & valid, fixed_xy=xy)

    findable = support.known | batch["named"]
    weight = (placed(visibility) & valid & findable).float() * torch.where(visibility == Visibility.OCCLUDED, 0.5, 1.0)
    weight = weight / weight.sum().clamp(min=1)
    target = heat_target(xy, heat.shape[-2], heat.shape[-1])
    free = weight * ~(batch["clicked"] & placed(visibility))
    far = (answer.xy - xy).norm(dim=-1)
    right = (far.detach() < NEAR * batch["size"].unsqueeze(-1)).float()
    classes = visibility - 1
    judged = valid & findable & (classes >= 0)
    identified = batch["named"] & batch["canonical"][:, None] & batch["prompted"] & support.known & valid
    rare = torch.tensor(RARE, device=xy.device)
    parts = {
        "heat": (weight * cross_entropy(heat, target)).sum(),
        "match": match_loss(planes, xy, weight * support.known),
        "refined": (free * cross_entropy(answer.heat, target)).sum(),
        "position": (free * (answer.xy - xy).abs().sum(-1)).sum(),
        "expected": (weight * ((answer.anchor - xy).norm(dim=-1) / answer.reach + 2 * answer.reach.log())).sum(),
        "words": words_loss(model, states, batch["tokens"], batch["length"], identified),
        "visibility": F.cross_entropy(answer.visibility[judged], classes[judged], rare) if judged.any() else heat.sum() * 0,
        "confidence": (weight * F.binary_cross_entropy_with_logits(answer.confidence, right, reduction="none")).sum(),
    }
    if naming:
        parts["naming"] = naming_loss(model, features, batch, naming)
    parts["instances"] = scenes_loss(model, support, asked, batch) if len(batch["scenes"]) else heat.sum() * 0
    weights = {"heat": 0.5, "match": 0.15, "refined": 1.0, "position": 2.0, "expected": 0.1, "words": 0.25, "naming": 1.5, "visibility": 0.2,
               "confidence": 0.3, "instances": 0.5}  # fmt: skip
    total = torch.stack([weights[k] * v.float() for k, v in parts.items()]).sum()
    with torch.no_grad():
        scores = {k: float(v.detach()) for k, v in parts.items()}
        scores["pck"] = float((free * right).sum() / free.sum().clamp(min=1e-6))
    return total, scores


def naming_loss(model: KptLLM, features: Features, batch: Batch, count: int) -> Tensor:
    """The third task: the image itself, and the place of a point in it; what is it called?"""
    rows = torch.nonzero(batch["called_named"].any(1)).flatten()
    rows = rows[:: max(len(rows) // count, 1)][:count]
    if not len(rows):
        return features.fine.sum() * 0
    xy, some = batch["xy"][rows], features.pick(rows)
    shown = placed(batch["visibility"][rows]) & batch["valid"][rows]
    token = model.extractor(some, xy)
    empty = model.no_support(len(rows), 1, xy.device)
    asked = Asked(batch["called"][rows], shown, batch["called_length"][rows], batch["valid"][rows])
    states, _ = model.ask(some, empty, token, asked)
    return words_loss(model, states, batch["called"][rows], batch["called_length"][rows], shown & batch["called_named"][rows])


def scenes_loss(model: KptLLM, support: Support, asked: Asked, batch: Batch) -> Tensor:
    """The fourth task: where in a whole image are the objects that have these points?"""
    row = batch["scene_row"]
    some = Support(support.token[row], tuple(d[row] for d in support.descriptor), *(t[row] for t in support[2:]))  # type: ignore[arg-type]
    features = model.encode(batch["scenes"])
    found = model.detect(features, some, Asked(*(t[row] for t in asked)))
    return instances_loss(found, batch["scene_boxes"], batch["scene_count"], *features.middle.shape[-2:])


def match_loss(planes: list[Tensor], xy: Tensor, weight: Tensor) -> Tensor:
    """Each scale's correlation by itself should peak at the point: it teaches the encoder what corresponds, and nothing else.

    planes: (B, K, groups, H, W) at each scale; xy, weight: (B, K, 2), (B, K).
    """
    far = [cross_entropy(p.float().sum(2), heat_target(xy, *p.shape[-2:])) for p in planes]
    return torch.stack([(weight * f).sum() for f in far]).sum()


def words_loss(model: KptLLM, states: Tensor, tokens: Tensor, length: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy of the name's tokens, <keypoint> included, after <is>. rows: (B, K) bool, which segments count."""
    slot = torch.arange(tokens.shape[-1] - 1, device=tokens.device)
    told = rows.unsqueeze(-1) & (slot >= Questions.IS_SLOT) & (slot < length.unsqueeze(-1) - 1)
    if not told.any():
        return states.sum() * 0
    return F.cross_entropy(model.words(states[:, :, :-1][told]).float(), tokens[:, :, 1:][told])


def heat_target(xy: Tensor, height: int, width: int) -> Tensor:
    """(B, K, 2) in 0…1 → (B, K, H, W) Gaussians that sum to 1."""
    x = torch.arange(width, device=xy.device) + 0.5
    y = torch.arange(height, device=xy.device) + 0.5
    across = (-(x - xy[..., :1] * width).square() / (2 * SIGMA**2)).softmax(-1)
    down = (-(y - xy[..., 1:] * height).square() / (2 * SIGMA**2)).softmax(-1)
    return down.unsqueeze(-1) * across.unsqueeze(-2)


def cross_entropy(heat: Tensor, target: Tensor) -> Tensor:
    """(B, K, H, W) logits and target → (B, K)."""
    return -(target.flatten(2) * heat.float().flatten(2).log_softmax(-1)).sum(-1)
