"""What is trained: a preset from nothing, or LoRA on a project's corrections. `python -m kptllm_core train`.

Both go through the loop of `loop.py`, and can be stopped at any moment and resumed.
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
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from kptllm_core import checkpoint as store
from kptllm_core.adapters import AdapterSwitch, adapter_state, add_lora
from kptllm_core.config import ModelConfig, model_folder
from kptllm_core.curve import Watch, draw_curve
from kptllm_core.dataset import Sample, held_out, load_coco
from kptllm_core.episodes import Augmentation, Images, Labelled, Rendered, SelfPairs, Source
from kptllm_core.errors import ArtifactError, DataError, InvalidInput
from kptllm_core.language import plain_words, train_tokenizer
from kptllm_core.lexicon import lexicon
from kptllm_core.loop import Loop, Progress, Recipe, best_device, stream
from kptllm_core.model import KptLLM
from kptllm_core.report import check_writable

MIN_LABELLED = 2
GATE = 2.0  # a gate at zero spares a pretrained model the noise of a new LLM path; from scratch it only starves that path of gradient
NOISE = 0.05  # by which the PCK of a few dozen watched pairs may lie below the best of several looks without meaning anything


PRETRAIN = Recipe(wide=0.25, naming=12, renaming=0.4, scenes=0.5, sides=(0.6, 0.8, 1.0, 1.2))
FURTHER = replace(PRETRAIN, sides=(0.8, 1.0, 1.2))  # small crops are for the first steps, which are cheap with them
ADAPT = Recipe(seconds=150, episodes=2, max_points=24, rate=3e-3, full_rate=0.3, decay=0.01, warmup=20, average=0.98, naming=0, scenes=0.5)


def pretrain(model: str | Path, data: Sequence[Path], out: Path, recipe: Recipe, resume: bool = False,
             rendered: float = 0.5, self_pairs: float = 0.2, progress: Progress | None = None,
             should_stop: Callable[[], bool] | None = None, start: Path | None = None,
             watch: Sequence[Path] = ()) -> dict[str, Any] | None:  # fmt: skip
    """Trains a preset on labelled folders and rendered categories, from nothing or from the weights of `start` (a checkpoint
    of the same sizes); writes a checkpoint to `out` and returns its metrics, or None if it was stopped (then --resume goes
    on). Without `data` it trains on renderings alone.

    Groups that `held_out` names are left out. watch: folders of categories that are not trained on; their PCK is noted
    along the way, and a checkpoint that is worse there, by more than chance, is not published.
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
    words = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    about = {"model": config.name, "adapter": False, "data": data_hash(data), "start": before.base if before else None, "words": words}
    loop = Loop(built, recipe, state, device, about)
    resumed = loop.resume() if resume else False
    images, shape = Images(), Augmentation()
    sources: list[tuple[Source, float]] = [(Rendered(shape, recipe.max_points), rendered),
                                           (SelfPairs(samples, shape, recipe.max_points, images), self_pairs)]  # fmt: skip
    if samples:
        sources.append((Labelled(samples, shape, recipe.max_points, images), 1 - rendered - self_pairs))
    watched = Watch(watch, tokenizer, config.image_size, device) if watch else None
    best = max((c["watch"] for c in loop.curve if "watch" in c), default=-1.0)

    def publish() -> dict[str, Any]:
        nonlocal best
        if watched is not None:
            score = watched.score(built, loop.average)
            loop.curve.append({"step": loop.step, "seconds": round(loop.spent, 1), "watch": round(score, 4)})
            if score < best - NOISE and (out / "metrics.json").is_file():
                kept = dict(json.loads((out / "metrics.json").read_text()))
                return kept | {"withheld": f"After {loop.step} steps the watched PCK was {score:.3f}, clearly worse than the {best:.3f} it had been"}
            best = max(best, score)
        metrics = {"steps": loop.step, "seconds": round(loop.spent, 1), "resumed": resumed, "finished": loop.used >= 1, "recipe": asdict(recipe),
                   "start": before.base if before else None,
                   "data": [f.name for f in data], "images": len({s.image_path for s in samples}), "curve": loop.curve}  # fmt: skip
        store.save_checkpoint(out, built, tokenizer, metrics, {**built.state_dict(), **loop.average})
        draw_curve(loop.curve, out / "curve.png")
        return metrics

    with closing(stream(sources, tokenizer, recipe, config.image_size, loop.step, loop.parts)) as batches:
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
    images_found = len({s.image_path for s in labelled})
    if images_found < MIN_LABELLED:
        raise DataError(f"{images_found} labelled images found; a round needs at least {MIN_LABELLED}. Label more.")
    kinds = sorted({s.category for s in labelled})
    if len(kinds) > 1:
        raise DataError(f"The labels show {len(kinds)} categories: {', '.join(kinds)}. An adapter is of one; train one for each.")
    if seconds is not None or steps is not None:
        recipe = replace(recipe, seconds=seconds, steps=steps)
    recipe = replace(recipe, seed=seed)
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
    with closing(stream(sources, found.tokenizer, recipe, model.config.image_size, loop.step, loop.parts)) as batches:
        finished = loop.run(batches, progress, should_stop)
    if not finished:
        raise InvalidInput(f"The round was stopped at step {loop.step}. Its state is kept; resume to go on.")
    model.eval()
    metrics = {"steps": loop.step, "seconds": round(loop.spent, 1), "resumed": resumed, "images": images_found,
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
                        help="folder that is not trained on: a checkpoint that is clearly worse there is not published; may be repeated")  # fmt: skip
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--parent", type=Path, metavar="DIR", help="with --lora: the adapter to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the state that an earlier run left")
    parser.add_argument("--replace", action="store_true", help="train anew where --out holds a trained model or adapter already")
    parser.add_argument("--seconds", type=float, help="budget of training time (default: 3600, with --lora 150)")
    parser.add_argument("--steps", type=int, help="budget of steps, instead of seconds")
    parser.add_argument("--episodes", type=int, help="episodes in a batch")
    parser.add_argument("--workers", type=int, help="processes that prepare batches (default: 1, on a GPU one for each further core)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="end this session then, as Ctrl-C does; --resume goes on")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """The command line: a progress bar; Ctrl-C or SIGTERM saves the state and exits with 3."""
    stopped: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopped.append(number))
    for flag in ("seconds", "steps", "episodes", "rate", "stop_after"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise InvalidInput(f"--{flag.replace('_', '-')} {value} is not possible. Expected more than 0.")
    for folder in args.data:
        for sample in {s.image_path: s for s in load_coco(folder).samples}.values():
            sample.check()
    check_writable(args.out)
    if (args.out / store.MANIFEST).is_file() and not args.replace and not (args.resume and _state_file(args.out).is_file()):
        raise InvalidInput(f"{args.out} holds what an earlier training made. Choose another --out, give --replace to train anew in its place, or "
                           "--resume to go on with a training that was stopped.")  # fmt: skip
    bar = tqdm(unit="step", desc=f"train {args.out.name}", dynamic_ncols=True)

    def progress(now: dict[str, Any]) -> None:
        bar.total = now["steps"]
        bar.n = now["step"]
        bar.set_postfix(loss=now["loss"], pck=now["pck"], left=f"{now['eta_seconds']:.0f}s", refresh=False)
        bar.refresh() if bar.n % 10 == 0 or bar.n == bar.total else None

    workers = args.workers if args.workers is not None or best_device().type == "cpu" else max((os.cpu_count() or 2) - 1, 1)
    changes = {k: v for k, v in {"episodes": args.episodes, "workers": workers, "rate": args.rate}.items() if v is not None}
    end = time.monotonic() + (args.stop_after or math.inf)
    should_stop = lambda: bool(stopped) or time.monotonic() > end  # noqa: E731
    usual = ADAPT if args.lora else FURTHER if args.start else PRETRAIN
    told = args.seconds is not None or args.steps is not None
    budget = (args.seconds, args.steps) if told else (usual.seconds or 3600.0, None)
    recipe = replace(usual, **changes, seed=args.seed, seconds=budget[0], steps=budget[1])
    if args.lora:
        if not args.data:
            raise InvalidInput("--lora needs --data DIR: the folder with the labelled images.")
        try:
            metrics: dict[str, Any] | None = train_adapter(
                args.model, args.data, args.out, parent=args.parent, seconds=budget[0], steps=budget[1], seed=args.seed,
                resume=args.resume, progress=progress, should_stop=should_stop, recipe=recipe,
            )  # fmt: skip
        except InvalidInput:
            if not should_stop():
                raise
            metrics = None
    else:
        metrics = pretrain(args.model, args.data, args.out, recipe, args.resume, progress=progress, should_stop=should_stop,
                           start=args.start, watch=args.watch)  # fmt: skip
    bar.close()
    if metrics is None:
        again = [a for a in sys.argv[1:] if a != "--resume"]
        print(f"Stopped. Go on with: python -m kptllm_core {shlex.join([*again, '--resume'])}", file=sys.stderr)
        return 3
    said = f"{metrics['steps']} steps in {metrics['seconds']:.0f} s"
    worse = metrics.get("withheld")
    print(f"{worse}. {args.out} stays as it was after {said}." if worse else f"Wrote {args.out}: {said}.")
    return 0
