"""The loop of every training: batches, optimizer, running average, schedule, and a state that survives a kill.

A run can be stopped at any moment and resumed: the state (weights, averages, optimizer, step) is written every minute, as one
safetensors file, whole or not at all. The budget is in seconds or in steps; the learning rate falls as it is used up. What is trained,
and on what, is `train.py`'s business.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from kptllm_core.checkpoint import write_tensors
from kptllm_core.episodes import Source
from kptllm_core.errors import InvalidInput, KptError
from kptllm_core.model import KptLLM
from kptllm_core.objective import Batch, collate, loss_of
from kptllm_core.vision import COARSE_STRIDE

log = logging.getLogger(__name__)

SAVE_EVERY = 60.0  # seconds
PUBLISH_EVERY = 600.0  # seconds between the checkpoints that a long pretraining leaves on its way
MAX_PARTS = 4  # threads of a step: each holds the activations of its part
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How one run trains. Saved with what it makes."""

    seconds: float | None = None
    """Budget of training time over all sessions, or None."""
    steps: int | None = None
    """Budget of steps, or None. The first budget that is used up ends the run."""
    episodes: int = 8
    """Episodes in a batch."""
    views: int = 3
    """Views in an episode; each is a query with the others as support."""
    max_points: int = 12
    """Points of an episode at most."""
    rate: float = 1e-3
    """Peak learning rate of AdamW."""
    full_rate: float = 1.0
    """Factor on the rate for the parts that an adapter tunes fully."""
    decay: float = 0.02
    """Weight decay of matrices."""
    warmup: int = 100
    """Steps of linear warm-up."""
    average: float = 0.999
    """Decay of the running average of weights, which is what is saved."""
    naming: int = 8
    """Views in a batch that also name their points."""
    seed: int = 0
    workers: int = 1
    """Processes that prepare batches; 0 prepares them in this one."""
    wide: float = 0.0
    """Share of batches with twice the views in half the episodes: many shots."""
    scenes: float = 1.0
    """Share of episodes that also ask for the boxes of all objects in a whole image."""
    self_pairs: float = 0.0
    """Of a round: share of episodes that show an image and its own warps, with points that nobody labelled."""
    renaming: float = 0.0
    """Share of episodes whose names are written in another style of the lexicon."""
    sides: tuple[float, ...] = (1.0,)
    """Sides of the crops, in shares of the model's own; one is drawn for each step. Small ones cost less, and teach that size is chance."""


class Batches(IterableDataset):
    """An endless stream of batches from a mix of sources. `parts` of them make one step."""

    def __init__(self, sources: Sequence[tuple[Source, float]], tokenizer: Any, recipe: Recipe, size: int, start: int, parts: int = 1) -> None:
        self.sources, self.tokenizer, self.recipe, self.size, self.start = sources, tokenizer, recipe, size, start
        self.parts, self.episodes = parts, max(recipe.episodes // parts, 1)

    def __iter__(self) -> Iterator[Batch]:
        """All parts of a step are alike in size, since none of its threads goes on before the slowest has ended. (One worker makes them;
        several take turns, and a step on a CPU then mixes theirs.)"""
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.recipe.seed, self.start, 0 if info is None else info.id])
        shares = np.array([s for _, s in self.sources])
        while True:
            size = whole_cells(float(rng.choice(self.recipe.sides)) * self.size)
            more = 2 if self.episodes > 1 and rng.random() < self.recipe.wide else 1
            for _ in range(self.parts):
                picked = rng.choice(len(self.sources), self.episodes // more, p=shares / shares.sum())
                episodes = [self.sources[i][0].episode(rng, self.recipe.views * more, size) for i in picked]
                scenes = int(self.recipe.scenes * len(episodes) + rng.random())
                episodes = [e if i < scenes else replace(e, scene=None) for i, e in enumerate(episodes)]
                yield collate(episodes, self.tokenizer, rng, renaming=self.recipe.renaming)


def whole_cells(side: float) -> int:
    """The nearest side of a crop, pixels, of which the encoder makes whole cells; at least two of them."""
    return max(round(side / COARSE_STRIDE), 2) * COARSE_STRIDE


class Loop:
    """Optimizer, running average, schedule and resumable state around `loss_of`.

    On a CPU a step is split over threads, each with a batch of its own and a core to itself: small operators hardly gain from a
    second core inside them. The gradients' mean makes the step.
    """

    def __init__(self, model: KptLLM, recipe: Recipe, state_file: Path, device: torch.device, about: dict[str, Any] | None = None) -> None:
        """about: what the run trains, and on what; a state that was made for something else is not resumed."""
        self.model, self.recipe, self.state_file, self.device = model, recipe, state_file, device
        self.about = about or {}
        self.parts = min(torch.get_num_threads(), MAX_PARTS, recipe.episodes) if device.type == "cpu" else 1
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(self.named, recipe)
        self.average = {n: p.detach().clone() for n, p in self.named.items()}
        self.step, self.spent, self.curve = 0, 0.0, list[dict[str, float]]()

    @property
    def used(self) -> float:
        """Share of the budget that is used up, 0…1."""
        by_steps = self.step / self.recipe.steps if self.recipe.steps else 0.0
        by_time = self.spent / self.recipe.seconds if self.recipe.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)

    def run(self, batches: Iterator[Batch], progress: Progress | None, should_stop: Callable[[], bool] | None,
            publish: Callable[[], Any] | None = None) -> bool:  # fmt: skip
        """Trains until the budget is used up (True) or somebody stops it (False). Raises KptError on a loss that is not finite."""
        threads = torch.get_num_threads()
        if self.parts > 1:
            torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.parts) as pool, sdpa_kernel(_attention(self.device)):
                return self._run(pool, batches, progress, should_stop, publish)
        finally:
            torch.set_num_threads(threads)

    def _run(self, pool: ThreadPoolExecutor, batches: Iterator[Batch], progress: Progress | None, should_stop: Callable[[], bool] | None,
             publish: Callable[[], Any] | None) -> bool:  # fmt: skip
        saved = published = time.monotonic()
        recent: dict[str, float] = {}
        self.model.train()
        while self.used < 1:
            started = time.monotonic()
            try:
                parts = [_next(batches) for _ in range(self.parts)]
            except RuntimeError:
                if should_stop is None or not should_stop():
                    raise
                self.save()  # whoever asked this process to end asked its workers, too
                return False
            scores = self._step(pool, parts)
            self.spent += time.monotonic() - started
            recent = {k: v if k not in recent else recent[k] + 0.05 * (v - recent[k]) for k, v in scores.items()}
            if self.step % 50 == 0:
                self.curve.append({"step": self.step, "seconds": round(self.spent, 1), **{k: round(v, 4) for k, v in recent.items()}})
            if progress is not None:
                steps = max(round(self.step / max(self.used, 1e-9)), self.step)
                left = self.spent / max(self.used, 1e-9) - self.spent
                progress({"step": self.step, "steps": steps, "loss": round(recent["loss"], 4), "eta_seconds": round(left, 1),
                          "pck": round(recent["pck"], 3)})  # fmt: skip
            if time.monotonic() - saved > SAVE_EVERY:
                try:
                    self.save()
                except OSError as error:  # the state before is whole, and there may be room again in a minute
                    log.warning("The state of the training could not be saved: %s", error)
                saved = time.monotonic()
            if publish is not None and time.monotonic() - published > PUBLISH_EVERY:
                try:
                    publish()
                except OSError as error:  # as above
                    log.warning("The checkpoint on the way could not be written: %s", error)
                self.model.train()
                published = time.monotonic()
            if should_stop is not None and should_stop():
                self.save()
                return False
        self.save()
        return True

    def _step(self, pool: ThreadPoolExecutor, batches: list[Batch]) -> dict[str, float]:
        warm = min((self.step + 1) / self.recipe.warmup, 1.0)
        rate = self.recipe.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.used)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        results = list(pool.map(self._gradients, batches))
        scores = {k: sum(s[k] for _, s in results) / len(results) for k in results[0][1]}
        for parameter, *parts in zip(self.named.values(), *(g for g, _ in results), strict=True):
            found = [p for p in parts if p is not None]
            parameter.grad = torch.stack(found).sum(0) / len(parts) if found else None
        nn.utils.clip_grad_norm_(list(self.named.values()), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.named.items():
                self.average[name].lerp_(parameter, 1 - keep)
        return scores

    def _gradients(self, batch: Batch) -> tuple[Sequence[Tensor | None], dict[str, float]]:
        """Of one part of a step. `autograd.grad`, since threads must not add to the same `.grad`."""
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bfloat16(self.device)):
            loss, scores = loss_of(self.model, batch, -(-self.recipe.naming // self.parts))
        if not torch.isfinite(loss.detach()):
            raise KptError(f"The loss became {float(loss.detach())} at step {self.step}; the run stops and the last good version stays. "
                           "Lower the rate or look at the data.")  # fmt: skip
        return torch.autograd.grad(loss, list(self.named.values()), allow_unused=True), {"loss": float(loss.detach()), **scores}

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            tensors["weight/" + name], tensors["average/" + name] = parameter.detach().contiguous(), self.average[name].contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.contiguous()
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        new = self.state_file.with_suffix(".new")
        note = {"step": self.step, "spent": self.spent, "curve": self.curve, "recipe": asdict(self.recipe), "about": self.about}
        write_tensors({k: v.cpu() for k, v in tensors.items()}, new, {"note": json.dumps(note)})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self.state_file)

    def resume(self) -> bool:
        """Reads the state if there is one. InvalidInput if it belongs to another run."""
        try:
            with safe_open(self.state_file, "pt") as file:
                note = json.loads(file.metadata()["note"])
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read (%s); training begins anew.", self.state_file, error)
            return False
        with safe_open(self.state_file, "pt") as file:
            if note["about"] != self.about:
                other = ", ".join(f"{k} {note['about'].get(k)} (now {v})" for k, v in self.about.items() if note["about"].get(k) != v)
                raise InvalidInput(f"The state beside --out is of another run: {other}. Give the same again, or leave out --resume.")
            keys = set(file.keys())
            with torch.no_grad():
                for name, parameter in self.named.items():
                    parameter.copy_(file.get_tensor("weight/" + name))
                    self.average[name].copy_(file.get_tensor("average/" + name))
                    found = {k: file.get_tensor(f"{k}/{name}") for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in keys}
                    if found:
                        self.optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
        self.step, self.spent, self.curve = note["step"], note["spent"], note["curve"]
        return True


def _optimizer(named: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in few groups, each with the `factor` on the rate."""
    adapting = any("lora_" in n for n in named)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        factor = recipe.full_rate if adapting and "lora_" not in name else 1.0
        groups.setdefault((factor, recipe.decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW([{"params": v, "factor": f, "weight_decay": d} for (f, d), v in groups.items()], lr=recipe.rate, betas=(0.9, 0.98))


def stream(sources: Sequence[tuple[Source, float]], tokenizer: Any, recipe: Recipe, size: int, start: int, parts: int = 1) -> Generator[Batch]:
    """Batches without end. To be closed, which ends its workers."""
    batches = Batches(sources, tokenizer, recipe, size, start, parts)
    ahead = 4 if recipe.workers else None
    yield from DataLoader(batches, batch_size=None, num_workers=recipe.workers, prefetch_factor=ahead, worker_init_fn=_leave_signals)


def _next(batches: Iterator[Batch]) -> Batch:
    """A batch. What a worker raises comes with the worker's traceback in its message, the last line of which is for people."""
    try:
        return next(batches)
    except KptError as error:
        last = error.message.strip().splitlines()[-1]
        trouble = type(error)(last.partition(f"{type(error).__name__}: ")[2] or last)
    raise trouble


def _leave_signals(_: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides when it ends, and takes its workers along (by SIGTERM, if need be)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on GPUs, and on processors with instructions for it."""
    return device.type == "cuda" or bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _attention(device: torch.device) -> list[SDPBackend]:
    """On CPUs the plain formula is faster to differentiate than the fused one, at our lengths."""
    return [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
