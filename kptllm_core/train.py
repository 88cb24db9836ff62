"""One loop: pretraining, or LoRA on a project's corrections. `python -m kptllm_core train`.

Both can be stopped at any moment and resumed: the state (weights, averages, optimizer, step) is written every minute, as one
safetensors file, whole or not at all. The budget is in seconds or in steps; the learning rate falls as it is used up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from kptllm_core import checkpoint as store
from kptllm_core.adapters import AdapterSwitch, adapter_state, add_lora
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.curve import Watch, draw_curve
from kptllm_core.dataset import Sample, held_out, load_coco
from kptllm_core.episodes import Augmentation, Images, Labelled, Rendered, SelfPairs, Source
from kptllm_core.errors import ArtifactError, DataError, InvalidInput, KptError
from kptllm_core.language import plain_words, train_tokenizer
from kptllm_core.lexicon import lexicon
from kptllm_core.model import KptLLM
from kptllm_core.objective import Batch, collate, loss_of
from kptllm_core.report import check_writable

MIN_LABELLED = 2
SAVE_EVERY = 60.0  # seconds
GATE = 2.0  # a gate at zero spares a pretrained model the noise of a new LLM path; from scratch it only starves that path of gradient
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


PRETRAIN = Recipe(wide=0.25, naming=12, renaming=0.4)
ADAPT = Recipe(seconds=150, episodes=2, max_points=24, rate=3e-3, full_rate=0.3, decay=0.01, warmup=20, average=0.98, naming=0, scenes=0.5)


class Batches(IterableDataset):
    """An endless stream of batches from a mix of sources. `parts` of them make one step."""

    def __init__(self, sources: Sequence[tuple[Source, float]], tokenizer: Any, recipe: Recipe, size: int, start: int, parts: int = 1) -> None:
        self.sources, self.tokenizer, self.recipe, self.size, self.start = sources, tokenizer, recipe, size, start
        self.episodes = max(recipe.episodes // parts, 1)

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.recipe.seed, self.start, 0 if info is None else info.id])
        shares = np.array([s for _, s in self.sources])
        while True:
            more = 2 if self.episodes > 1 and rng.random() < self.recipe.wide else 1
            picked = rng.choice(len(self.sources), self.episodes // more, p=shares / shares.sum())
            episodes = [self.sources[i][0].episode(rng, self.recipe.views * more, self.size) for i in picked]
            episodes = [e if rng.random() < self.recipe.scenes else replace(e, scene=None) for e in episodes]
            yield collate(episodes, self.tokenizer, rng, renaming=self.recipe.renaming)


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
            scores = self._step(pool, [next(batches) for _ in range(self.parts)])
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
                self.save()
                saved = time.monotonic()
            if publish is not None and time.monotonic() - published > PUBLISH_EVERY:
                publish()
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
        save_file({k: v.cpu() for k, v in tensors.items()}, new, metadata={"note": json.dumps(note)})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self.state_file)

    def resume(self) -> bool:
        """Reads the state if there is one. InvalidInput if it belongs to another run."""
        if not self.state_file.is_file():
            return False
        with safe_open(self.state_file, "pt") as file:
            note = json.loads(file.metadata()["note"])
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


def pretrain(model: str | Path, data: Sequence[Path], out: Path, recipe: Recipe, resume: bool = False,
             rendered: float = 0.4, self_pairs: float = 0.2, progress: Progress | None = None,
             should_stop: Callable[[], bool] | None = None, start: Path | None = None,
             watch: Sequence[Path] = ()) -> dict[str, Any] | None:  # fmt: skip
    """Trains a preset on labelled folders and rendered categories, from nothing or from the weights of `start` (a checkpoint
    of the same sizes); writes a checkpoint to `out` and returns its metrics, or None if it was stopped (then --resume goes
    on). Without `data` it trains on renderings alone.

    Groups that `held_out` names are left out. watch: folders of categories that are not trained on; their PCK is noted
    along the way, and the checkpoint that is published is the one that was best there.
    """
    config = ModelConfig.load(model_folder(model))
    samples = [s for folder in data for s in _seen(load_coco(folder).samples)]
    state = _state_file(out)
    tokenizer = train_tokenizer(_texts(samples), 1024 if config.name == "tiny" else 4096)
    torch.manual_seed(recipe.seed)
    device = best_device()
    built = KptLLM(config, len(tokenizer)).to(device)
    nn.init.constant_(built.decoder.head.gate, GATE)
    before = store.load_checkpoint(start) if start is not None else None
    if before is not None:
        take_over(built, tokenizer, before)
    about = {"model": config.name, "adapter": False, "data": data_hash(data), "start": before.base if before else None, "words": len(tokenizer)}
    loop = Loop(built, recipe, state, device, about)
    resumed = loop.resume() if resume else False
    images, shape = Images(), Augmentation()
    sources: list[tuple[Source, float]] = [(Rendered(shape, recipe.max_points), rendered),
                                           (SelfPairs(samples, shape, recipe.max_points, images), self_pairs)]  # fmt: skip
    if samples:
        sources.append((Labelled(samples, shape, recipe.max_points, images), 1 - rendered - self_pairs))
    batches = _stream(sources, tokenizer, recipe, config.image_size, loop.step, loop.parts)
    watched = Watch(watch, tokenizer, config.image_size, device) if watch else None
    best = max((c["watch"] for c in loop.curve if "watch" in c), default=-1.0)

    def publish() -> dict[str, Any]:
        nonlocal best
        if watched is not None:
            score = watched.score(built, loop.average)
            loop.curve.append({"step": loop.step, "seconds": round(loop.spent, 1), "watch": round(score, 4)})
            if score < best and (out / "metrics.json").is_file():
                return dict(json.loads((out / "metrics.json").read_text()))
            best = max(best, score)
        metrics = {"steps": loop.step, "seconds": round(loop.spent, 1), "resumed": resumed, "finished": loop.used >= 1, "recipe": asdict(recipe),
                   "start": before.base if before else None,
                   "data": [f.name for f in data], "images": len({s.image_path for s in samples}), "curve": loop.curve}  # fmt: skip
        store.save_checkpoint(out, built, tokenizer, metrics, {**built.state_dict(), **loop.average})
        draw_curve(loop.curve, out / "curve.png")
        return metrics

    return publish() if loop.run(batches, progress, should_stop, publish) else None


def train_adapter(base: str | Path, data: Sequence[Path], out: Path, *, parent: Path | None = None,
                  seconds: float | None = None, steps: int | None = None, seed: int = 0, resume: bool = False,
                  progress: Progress | None = None, should_stop: Callable[[], bool] | None = None,
                  recipe: Recipe = ADAPT, loaded: store.Checkpoint | None = None) -> dict[str, Any]:  # fmt: skip
    """A LoRA adapter from labelled folders (one category, at least 2 images), published whole at `out`.

    parent: an adapter to start from. The budget is `seconds` or `steps` (150 s if neither is given). Raises DataError for too few
    labels, Interrupted-like InvalidInput if stopped (resume=True then goes on where it was).
    """
    samples = [s for folder in data for s in load_coco(folder).samples]  # an object without points is still no background
    labelled = [s for s in samples if s.keypoints.placed.any()]
    if len({s.image_path for s in labelled}) < MIN_LABELLED:
        raise DataError(f"{len(labelled)} labelled images found; a round needs at least {MIN_LABELLED}. Label more.")
    if seconds is not None or steps is not None:
        recipe = Recipe(**{**asdict(recipe), "seconds": seconds, "steps": steps})
    recipe = Recipe(**{**asdict(recipe), "seed": seed})
    found = loaded or store.load_checkpoint(base)
    device = best_device()
    model = found.model.to(device)
    torch.manual_seed(seed)
    add_lora(model)
    switch = AdapterSwitch(model)
    if parent is not None:
        switch.put(store.load_adapter(parent, found.base).tensors)
    about = {"model": found.base, "adapter": True, "parent": parent.name if parent else None, "data": data_hash(data)}
    loop = Loop(model, recipe, _state_file(out), device, about)
    resumed = loop.resume() if resume else False
    shape = Augmentation(upright=0.7, anyway=0.05, loose=0.35, colour=0.7, cut=0.1, covered=0.15)
    images = Images()
    sources: list[tuple[Source, float]] = [(Labelled(samples, shape, recipe.max_points, images), 1 - recipe.self_pairs),
                                           (SelfPairs(samples, shape, recipe.max_points, images), recipe.self_pairs)]  # fmt: skip
    batches = _stream(sources, found.tokenizer, recipe, model.config.image_size, loop.step, loop.parts)
    if not loop.run(batches, progress, should_stop):
        raise InvalidInput(f"The round was stopped at step {loop.step}. Its state is kept; resume to go on.")
    model.eval()
    metrics = {"steps": loop.step, "seconds": round(loop.spent, 1), "resumed": resumed, "images": len({s.image_path for s in labelled}),
               "objects": len(labelled), "recipe": asdict(recipe), "curve": loop.curve}  # fmt: skip
    info = {"base": found.base, "parent": parent.name if parent else None, "schema": samples[0].schema.to_json(), "data": data_hash(data)}
    weights = {**adapter_state(model), **loop.average}
    store.save_adapter(out, model, info, metrics, weights)
    shutil.rmtree(loop.state_file.parent, ignore_errors=True)
    return metrics


def take_over(model: KptLLM, tokenizer: Any, before: store.Checkpoint) -> None:
    """Gives a new model the weights of an earlier one. A word piece that is new begins as the mean of its old pieces.

    ArtifactError if a part has another size.
    """
    old, new = before.model.state_dict(), model.state_dict()
    for name, value in old.items():
        if "embed_tokens" in name or "lm_head" in name:
            known = before.tokenizer.get_vocab()
            rows = []
            for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
                text = tokenizer.convert_tokens_to_string([token])
                pieces = [known[token]] if token in known else before.tokenizer(text, add_special_tokens=False)["input_ids"]
                rows.append(value[pieces].mean(0))
            new[name].copy_(torch.stack(rows))
        elif name not in new or new[name].shape != value.shape:
            raise ArtifactError(f"{before.base} has a part {name} of size {tuple(value.shape)}; the model to train has none like it. "
                                "Start from a checkpoint of the same preset, or from nothing.")  # fmt: skip
        else:
            new[name].copy_(value)


def _seen(samples: Sequence[Sample]) -> list[Sample]:
    """Without the groups that pretraining never sees."""
    unseen = held_out(s.group for s in samples)
    return [s for s in samples if s.group not in unseen]


def data_hash(folders: Sequence[Path]) -> str:
    """SHA-256 over the annotation files: what a version was trained on."""
    return hashlib.sha256(b"".join((Path(f) / "annotations.json").read_bytes() for f in folders)).hexdigest()


def _state_file(out: Path) -> Path:
    """Beside the folder that it makes, since that one is replaced whole."""
    return out.with_name(f".{out.name}.state") / "state.safetensors"


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on GPUs, and on processors with matrix units for it."""
    return device.type == "cuda" or bool(torch.cpu._is_amx_tile_supported())


def _attention(device: torch.device) -> list[SDPBackend]:
    """On CPUs the plain formula is faster to differentiate than the fused one, at our lengths."""
    return [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _stream(sources: Sequence[tuple[Source, float]], tokenizer: Any, recipe: Recipe, size: int, start: int, parts: int = 1) -> Iterator[Batch]:
    stream = Batches(sources, tokenizer, recipe, size, start, parts)
    ahead = 4 if recipe.workers else None
    return iter(DataLoader(stream, batch_size=None, num_workers=recipe.workers, prefetch_factor=ahead, worker_init_fn=_leave_signals))


def _leave_signals(_: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides when it ends, and takes its workers along."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _texts(samples: Sequence[Sample]) -> list[str]:
    """What the tokenizer learns words from: the lexicon, names of the data and of rendered categories."""
    from kptllm_core.synthetic import Category

    rng = np.random.default_rng(0)
    names = [n for s in {s.schema for s in samples} for n in s.names]
    names += [n for _ in range(600) for n in Category.sample(rng).schema.names]
    return [*lexicon().texts(), *(plain_words(n) for n in names)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", help="preset or checkpoint folder (default: nano)")
    parser.add_argument("--data", action="append", type=Path, default=[], metavar="DIR",
                        help="folder with annotations.json and images/; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the checkpoint or adapter goes")
    parser.add_argument("--lora", action="store_true", help="train an adapter on the model's weights, from a few labelled images")
    parser.add_argument("--start", type=Path, metavar="DIR", help="begin with this checkpoint's weights, instead of from nothing")
    parser.add_argument("--watch", action="append", type=Path, default=[], metavar="DIR",
                        help="folder that is not trained on: the checkpoint that is best there is the one published; may be repeated")  # fmt: skip
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--parent", type=Path, metavar="DIR", help="with --lora: the adapter to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the state that an earlier run left")
    parser.add_argument("--seconds", type=float, help="budget of training time (default: 3600, with --lora 150)")
    parser.add_argument("--steps", type=int, help="budget of steps, instead of seconds")
    parser.add_argument("--episodes", type=int, help="episodes in a batch")
    parser.add_argument("--workers", type=int, help="processes that prepare batches")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """The command line: a progress bar; Ctrl-C or SIGTERM saves the state and exits with 3."""
    stopped: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopped.append(number))
    for flag in ("seconds", "steps", "episodes", "rate"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise InvalidInput(f"--{flag} {value} is not possible. Expected more than 0.")
    for folder in args.data:
        for sample in {s.image_path: s for s in load_coco(folder).samples}.values():
            sample.check()
    check_writable(args.out)
    bar = tqdm(unit="step", desc=f"train {args.out.name}", dynamic_ncols=True)

    def progress(now: dict[str, Any]) -> None:
        bar.total = now["steps"]
        bar.n = now["step"]
        bar.set_postfix(loss=now["loss"], pck=now["pck"], left=f"{now['eta_seconds']:.0f}s", refresh=False)
        bar.refresh() if bar.n % 10 == 0 or bar.n == bar.total else None

    changes = {k: v for k, v in {"episodes": args.episodes, "workers": args.workers, "rate": args.rate}.items() if v is not None}
    start = ADAPT if args.lora else PRETRAIN
    told = args.seconds is not None or args.steps is not None
    budget = (args.seconds, args.steps) if told else (start.seconds or 3600.0, None)
    recipe = Recipe(**{**asdict(start), **changes, "seed": args.seed, "seconds": budget[0], "steps": budget[1]})
    if args.lora:
        if not args.data:
            raise InvalidInput("--lora needs --data DIR: the folder with the labelled images.")
        try:
            metrics: dict[str, Any] | None = train_adapter(
                args.model, args.data, args.out, parent=args.parent, seconds=budget[0], steps=budget[1], seed=args.seed,
                resume=args.resume, progress=progress, should_stop=lambda: bool(stopped), recipe=recipe,
            )  # fmt: skip
        except InvalidInput:
            if not stopped:
                raise
            metrics = None
    else:
        metrics = pretrain(args.model, args.data, args.out, recipe, args.resume, progress=progress, should_stop=lambda: bool(stopped),
                           start=args.start, watch=args.watch)  # fmt: skip
    bar.close()
    if metrics is None:
        again = [a for a in sys.argv[1:] if a != "--resume"]
        print(f"Stopped. Go on with: python -m kptllm_core {shlex.join([*again, '--resume'])}", file=sys.stderr)
        return 3
    print(f"Wrote {args.out}: {metrics['steps']} steps in {metrics['seconds']:.0f} s.")
    return 0
