"""Images in, KeypointSets out, in pixels of the original image. What serving, evaluation and the command line all use."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kptllm_core import finder
from kptllm_core.adapters import AdapterSwitch
from kptllm_core.checkpoint import Checkpoint, load_adapter, load_checkpoint
from kptllm_core.claims import Taken, claims, yielded
from kptllm_core.decoder import Answer, Support, peak
from kptllm_core.errors import InvalidInput
from kptllm_core.finder import FAINT, Found, needs_windows
from kptllm_core.geometry import (
    Crop,
    box_of_points,
    clip_box,
    clip_to_image,
    crop_of_box,
    crop_of_image,
)
from kptllm_core.imaging import warp
from kptllm_core.instances import MOST, box_iou, distinct
from kptllm_core.keypoints import SHOWN, KeypointSchema, KeypointSet, Visibility
from kptllm_core.language import write_questions
from kptllm_core.lexicon import lexicon
from kptllm_core.model import Asked
from kptllm_core.naming import choose_names, write_names
from kptllm_core.objective import RARE
from kptllm_core.support import Example, Prepared, margin_of, support_key, usable_box, usual_points, with_margin
from kptllm_core.sureness import Weights, least_seen, search_kind, sureness, trust, witnesses
from kptllm_core.vision import grid_positions

__all__ = ["Example", "Instance", "Predictor", "load_predictor"]

PROMPTS = ("auto", "visual", "text", "both")
MAX_SHOTS = 10
BATCH = 8  # crops in one pass; after so many found boxes the next ones are judged by the surest so far
TELLING = 4  # points of an object from which on the others tell of one where it must be
SAME_AS_GIVEN = 0.5  # overlap (IoU) with a drawn box from which on a found one is the same object
GONE = 20.0  # logits below a heatmap's least: nothing pulls a point there
DRAWN = 2  # rank of an object that a person drew: it keeps the points that others claim; found ones have 1 if they are sure enough, else 0
SAME_SETTLED = 0.5  # the same, of boxes that lie where their points are
SAME_LARGE = 0.3  # the same, of a rough box and the one found by an object's points in the whole image
MAX_WINDOWS = 25  # in which one object alone is looked for


class Instance(NamedTuple):
    """One object of an image. keypoints: with its box. score: 0…1, how likely the box is a true one's (overlaps it by half, and no
    surer box does); 1 if a person drew it. seen: 0…1, what the head that finds boxes said of this one."""

    keypoints: KeypointSet
    score: float
    seen: float = 1.0


def load_predictor(model: str | Path, adapter: str | Path | None = None, device: str = "auto", untrained: bool = False) -> Predictor:
    """A preset ("nano", "tiny") or a checkpoint folder, and perhaps an adapter. ArtifactError says what is wrong with a file."""
    predictor = Predictor(load_checkpoint(model, untrained), device)
    if adapter is not None:
        predictor.use_adapter(adapter)
    return predictor


def check_boxes(boxes: Iterable[np.ndarray]) -> None:
    """InvalidInput for a box (x, y, w, h) without an area."""
    for box in boxes:
        if not (np.isfinite(box).all() and box[2] > 0 and box[3] > 0):
            raise InvalidInput(f"The box {np.asarray(box).tolist()} has no area. Expected x, y, width, height in pixels.")


class Predictor:
    """One resident model. Not thread-safe: one caller at a time."""

    def __init__(self, checkpoint: Checkpoint, device: str = "auto") -> None:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        self.model = checkpoint.model.to(self.device).eval()
        self.tokenizer = checkpoint.tokenizer
        self.base = checkpoint.base
        self.adapter: str | None = None
        self._switch: AdapterSwitch | None = None
        self._weights = self.base
        self._supports: OrderedDict[str, Prepared] = OrderedDict()

    @property
    def size(self) -> int:
        """Side of the model's crops, pixels."""
        return self.model.config.image_size

    def use_adapter(self, folder: str | Path | None) -> None:
        """Switches to an adapter, or back to the base with None. ArtifactError on a mismatch; then nothing changes."""
        if folder is None and self._switch is None:
            return
        tensors = None if folder is None else load_adapter(folder, self.base).tensors
        self._switch = self._switch or AdapterSwitch(self.model)
        self._switch.put(tensors)
        self.model.eval()
        self.adapter = None if folder is None else Path(folder).name
        self._weights = self.base if folder is None else hashlib.sha256((Path(folder) / "manifest.json").read_bytes()).hexdigest()

    def predict(self, images: Sequence[np.ndarray], schema: KeypointSchema, support: Sequence[Example] = (),
                boxes: Sequence[np.ndarray | None] | None = None, prompt: str = "auto", asked: Sequence[str] | None = None,
                fixed: Sequence[KeypointSet | None] | None = None) -> list[KeypointSet]:  # fmt: skip
        """The points of one object in each image.

        images: (H, W, 3) uint8 each. boxes: (x, y, w, h) in pixels each; None finds the object in the whole image.
        prompt: "visual" looks at the support, "text" reads the names, "both" does both; "auto" is both where there is
        support, else text. asked: some of the names; the answer then comes before the points of the object have
        corrected each other. fixed: points that are given (a person's click) and that the others must agree with.
        Returns one KeypointSet for each image, in the schema's order (or that of `asked`), with its box.
        """
        boxes = [None] * len(images) if boxes is None else list(boxes)
        fixed = [None] * len(images) if fixed is None else list(fixed)
        if not len(images) == len(boxes) == len(fixed):
            raise InvalidInput(f"{len(images)} images came with {len(boxes)} boxes and {len(fixed)} sets of fixed points.")
        check_boxes([b for b in boxes if b is not None])
        prepared, named = self._prompted(schema, support, prompt)
        with torch.inference_mode():
            order = None if asked is None else [schema.index(n) for n in asked]
            found = [b if b is not None else self._find(i, schema, prepared, named) for i, b in zip(images, boxes, strict=True)]
            return self._points(images, found, schema, prepared, named, order, fixed)

    def _points(self, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray | None], schema: KeypointSchema, prepared: Prepared | None,
                named: bool, order: list[int] | None = None, fixed: Sequence[KeypointSet | None] | None = None,
                taken: Sequence[Taken] | None = None) -> list[KeypointSet]:  # fmt: skip
        crops = [self._crop(i, b) for i, b in zip(images, boxes, strict=True)]
        tight = prepared.tight if prepared else None
        sets: list[KeypointSet] = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            sets += self._answer(images[part], crops[part], schema, tight, named, order, fixed and fixed[part], taken and taken[part])
        return [self._finish(*item, prepared) for item in zip(sets, boxes, images, strict=True)]

    def predict_objects(self, images: Sequence[np.ndarray], schema: KeypointSchema, support: Sequence[Example] = (),
                        boxes: Sequence[np.ndarray | None] | None = None, prompt: str = "auto", find: bool = True,
                        least: float = SHOWN, most: int = MOST) -> list[list[Instance]]:  # fmt: skip
        """The points of every object in each image, any number of them, also none: those that were given a box first.

        boxes: (N, 4) x, y, w, h in pixels for each image, as people drew them: used as they are. find: look for the others, too,
        and answer with at most `most`, whose score is at least `least`. The rest is as in `predict`, but that names of a kind are not read to
        find it by before a round has taught them. Where objects lie on each other, no point is used by two of them.
        """
        given = [np.zeros((0, 4)) if b is None else np.asarray(b, np.float64).reshape(-1, 4) for b in boxes or [None] * len(images)]
        for own in given:
            check_boxes(own)
        prepared, named = self._prompted(schema, support, prompt)
        faint = max(least_seen(least, self._weights_of(prepared)), FAINT)
        answers: list[list[Instance]] = []
        for image, own in zip(images, given, strict=True):
            found = Found(np.zeros((0, 4)), np.zeros(0))
            if find:
                found = self._search(image, schema, prepared, named, faint)
                found = self._settled(image, schema, prepared, named, found, least)
            drawn, others = self._objects(image, own, found, schema, prepared, named, least, most)
            answers.append(drawn + sorted((i for i in others if i.score >= least), key=lambda i: -i.score))
        return answers

    def _objects(self, image: np.ndarray, own: np.ndarray, found: Found, schema: KeypointSchema, prepared: Prepared | None, named: bool,
                 least: float, most: int) -> tuple[list[Instance], list[Instance]]:  # fmt: skip
        """Objects in boxes that a person drew, and in up to `most` others. A found box of a drawn object is that object: all that is left of
        it is its lead over the others, so that drawing one changes no other's score."""
        overlap = box_iou(found.boxes, own)
        same = overlap.max(1, initial=0) >= SAME_AS_GIVEN
        new, twice = np.flatnonzero(~same)[:most], np.flatnonzero(same)
        seen = found.score[np.concatenate([new, twice])]
        whose = [*range(len(own), len(own) + len(new)), *(overlap[twice].argmax(1).tolist() if len(own) else ())]

        def sure(sets: Sequence[KeypointSet]) -> np.ndarray:
            told = witnesses(seen, np.array([trust(sets[i]) for i in whose]))
            return sureness(told, self._weights_of(prepared))[: len(new)]

        boxes = np.concatenate([own, found.boxes[new]])
        with torch.inference_mode():
            sets = self._points([image] * len(boxes), list(boxes), schema, prepared, named)
            sets = self._apart(image, boxes, sets, [DRAWN] * len(own) + (sure(sets) >= least).astype(int).tolist(), schema, prepared, named)
        others = zip(sets[len(own) :], sure(sets).tolist(), found.score[new].tolist(), strict=True)
        return [Instance(points, 1.0) for points in sets[: len(own)]], [Instance(*item) for item in others]

    def _weights_of(self, prepared: Prepared | None) -> Weights:
        return self.model.config.sureness[search_kind(prepared.share if prepared else None)]

    def _apart(self, image: np.ndarray, boxes: np.ndarray, sets: list[KeypointSet], rank: Sequence[int], schema: KeypointSchema,
               prepared: Prepared | None, named: bool) -> list[KeypointSet]:  # fmt: skip
        """The points of objects that lie on each other, so that none is used by two: who loses a point looks for it elsewhere, once."""
        claimed = claims(sets, rank)
        again = [i for i, claim in enumerate(claimed) if claim]
        if not again:
            return sets
        apart = self._points([image] * len(again), [boxes[i] for i in again], schema, prepared, named, taken=[claimed[i] for i in again])
        moved = dict(zip(again, apart, strict=True))
        return yielded([moved.get(i, points) for i, points in enumerate(sets)], rank)

    def _settled(self, image: np.ndarray, schema: KeypointSchema, prepared: Prepared | None, named: bool, found: Found, least: float) -> Found:
        """Boxes moved to where the points in them say that the object is, each object once. Fainter ones than any that can be as
        sure as `least` beside the surest are left out. Without support nobody knows how far an object reaches beyond its points, and the boxes stay.

        An object as large as its image is found best by its points in the whole image: that box stands for the one it overlaps.
        """
        if not len(found.boxes) or prepared is None:
            return found
        named = self._named_search(prepared, named)
        weights = self._weights_of(prepared)
        sets: list[KeypointSet] = []
        trusted: np.ndarray = np.zeros(0)
        with torch.inference_mode():
            while len(sets) < len(found.boxes):
                if found.score[len(sets)] < least_seen(least, weights, float((found.score[: len(sets)] * trusted).max(initial=0))):
                    break
                some = found.boxes[len(sets) : len(sets) + BATCH]
                sets += self._points([image] * len(some), list(some), schema, prepared, named)
                trusted = np.array([trust(s) for s in sets])
            boxes = np.stack([self._around(s, prepared, image, least=1.0) for s in sets])
            boxes = np.where(np.isfinite(boxes).all(1, keepdims=True), boxes, found.boxes[: len(sets)])
            rough = None if needs_windows(prepared.share) else self._find(image, schema, prepared, named)
        if rough is not None:
            same = box_iou(rough[None], boxes)[0]
            boxes[same.argmax()] = rough if same.max() > SAME_LARGE else boxes[same.argmax()]
        index = distinct(boxes, found.score[: len(sets)], SAME_SETTLED)
        return Found(boxes[index], found.score[index])

    def find_objects(self, image: np.ndarray, schema: KeypointSchema, support: Sequence[Example] = (), prompt: str = "auto",
                     least: float = SHOWN) -> Found:  # fmt: skip
        """Boxes of all objects of one image, the surest first."""
        return self._search(image, schema, *self._prompted(schema, support, prompt), least)

    def _prompted(self, schema: KeypointSchema, support: Sequence[Example], prompt: str) -> tuple[Prepared | None, bool]:
        """The support set where it is looked at, and whether names are read. InvalidInput for a prompt that cannot be."""
        if prompt not in PROMPTS:
            raise InvalidInput(f"Unknown prompt '{prompt}'. Expected one of {', '.join(PROMPTS)}.")
        if prompt in ("visual", "both") and not support:
            raise InvalidInput(f"A {prompt} prompt needs support examples; none were given. Label an image, or ask by text.")
        if len(support) > MAX_SHOTS:
            raise InvalidInput(f"{len(support)} support examples were given; at most {MAX_SHOTS} are used together.")
        with torch.inference_mode():
            return self._prepare(schema, support) if support and prompt != "text" else None, prompt != "visual"

    def _named_search(self, prepared: Prepared | None, named: bool) -> bool:
        """Whether names help to find objects: where nothing is shown, and once a round has taught them. Before that, names of a kind that the
        model never saw mislead more than they tell (docs/experiments.md)."""
        return named and (prepared is None or self.adapter is not None)

    def _search(self, image: np.ndarray, schema: KeypointSchema, prepared: Prepared | None, named: bool, least: float) -> Found:
        tight, share = (prepared.tight, prepared.share) if prepared else (None, None)
        named = self._named_search(prepared, named)

        def detect(crops: Sequence[Crop]) -> tuple[np.ndarray, np.ndarray]:
            boxes, scores = [], []
            with torch.inference_mode():
                for start in range(0, len(crops), BATCH):
                    part = crops[start : start + BATCH]
                    features = self.model.encode(self._pixels([image] * len(part), part))
                    whole = tight.repeat(len(part)) if tight is not None else self.model.no_support(len(part), len(schema), self.device)
                    words = [lexicon().canonical(n) for n in schema.names] if named else [None] * len(schema)
                    asked = Asked.of(write_questions(self.tokenizer, words, [tight is not None] * len(schema)), len(part), self.device)
                    found = self.model.detect(features, whole, asked._replace(prompted=asked.prompted & whole.known))
                    boxes.append(found.boxes.cpu().numpy())
                    scores.append(found.score.sigmoid().cpu().numpy())
            return np.concatenate(boxes), np.concatenate(scores)

        return finder.find(detect, image.shape[1], image.shape[0], share, self.size, least)

    def name_points(self, image: np.ndarray, xy: np.ndarray, box: np.ndarray | None = None,
                    candidates: Sequence[str] | None = None) -> list[tuple[str, float]]:  # fmt: skip
        """The third task: what are the points at xy (K, 2), in pixels, called?

        candidates: choose among these names; otherwise the model writes one freely. Returns (name, probability) each.
        """
        xy = np.asarray(xy, np.float32).reshape(-1, 2)
        box = box_of_points(xy, 0.1) if box is None else box
        crop = crop_of_box(box, self.size)
        with torch.inference_mode():
            features = self.model.encode(self._pixels([image], [crop]))
            places = torch.from_numpy(crop.to_crop(xy) / self.size).float().clamp(0, 1)[None].to(self.device)
            tokens = self.model.extractor(features, places)
            if candidates:
                return choose_names(self.model, self.tokenizer, features, tokens, list(candidates))
            return write_names(self.model, self.tokenizer, features, tokens)

    def _crop(self, image: np.ndarray, box: np.ndarray | None) -> Crop:
        return crop_of_image(image.shape[1], image.shape[0], self.size) if box is None else crop_of_box(box, self.size)

    def _prepare(self, schema: KeypointSchema, support: Sequence[Example]) -> Prepared:
        key = support_key(self._weights, schema, support)
        if key in self._supports:
            self._supports.move_to_end(key)
            return self._supports[key]
        points = [e.keypoints.reorder(schema.names) for e in support]
        if not any(p.placed.any() for p in points):
            raise InvalidInput("No support example has a labelled point of this schema. Label at least one.")
        boxes = [usable_box(p, e.image) for p, e in zip(points, support, strict=True)]
        images = [e.image for e in support]
        tight = self._support(images, points, [crop_of_box(b, self.size) for b in boxes])
        whole = self._support(images, points, [crop_of_image(i.shape[1], i.shape[0], self.size) for i in images])
        margins = [margin_of(p, b) for p, b in zip(points, boxes, strict=True) if p.placed.any()]
        shares = [max(b[2], b[3]) / max(i.shape[:2]) for b, i in zip(boxes, images, strict=True)]
        prepared = Prepared(tight, whole, np.mean(margins, 0), float(np.median(shares)), usual_points(points))
        self._supports[key] = prepared
        if len(self._supports) > 32:
            self._supports.popitem(last=False)
        return prepared

    def _support(self, images: Sequence[np.ndarray], points: Sequence[KeypointSet], crops: Sequence[Crop]) -> Support:
        features = self.model.encode(self._pixels(images, crops))
        xy = np.stack([np.clip(c.to_crop(p.xy) / self.size, 0, 1) for c, p in zip(crops, points, strict=True)])
        known = torch.from_numpy(np.stack([p.placed for p in points]))[None].to(self.device)
        shots = [features.pick(slice(s, s + 1)) for s in range(len(images))]
        return self.model.support(shots, torch.from_numpy(xy).float()[None].to(self.device), known)

    def _find(self, image: np.ndarray, schema: KeypointSchema, prepared: Prepared | None, named: bool) -> np.ndarray | None:
        """A rough box of the object in the whole image, or None if the whole image serves as well."""
        height, width = image.shape[:2]
        support = prepared.whole if prepared else None
        crops = [crop_of_image(width, height, self.size)]
        sets = self._answer([image], crops, schema, support, named)
        if prepared is not None and needs_windows(prepared.share):
            crops = finder.windows(width, height, prepared.share * max(width, height) * finder.WINDOW, self.size, MAX_WINDOWS)
            for start in range(0, len(crops), BATCH):
                part = crops[start : start + BATCH]
                sets += self._answer([image] * len(part), part, schema, prepared.tight, named)
        box = self._around(max(sets, key=trust), prepared, image, 0.15 * max(width, height) if len(schema) == 1 else 1.0)
        return box if np.isfinite(box).all() else None

    def _around(self, points: KeypointSet, prepared: Prepared | None, image: np.ndarray, least: float) -> np.ndarray:
        """(4,) a box around the usual points that are not much less sure than most; not a number where they are too few.

        least: longer side of the points' hull, pixels, if it has none."""
        there = points.placed & prepared.usual if prepared is not None else points.placed
        sure = there & (points.score >= 0.5 * np.median(points.score[there])) if there.any() else there
        if sure.sum() < min(2, len(points)):
            return np.full(4, np.nan)
        margin = prepared.margin if prepared is not None else np.full(4, 0.1)
        box = clip_box(with_margin(points.xy[sure], margin, least), image.shape[1], image.shape[0])
        return box if min(box[2], box[3]) > 1 else np.full(4, np.nan)

    def _answer(self, images: Sequence[np.ndarray], crops: Sequence[Crop], schema: KeypointSchema, support: Support | None, named: bool,
                order: list[int] | None = None, fixed: Sequence[KeypointSet | None] | None = None,
                taken: Sequence[Taken] | None = None) -> list[KeypointSet]:  # fmt: skip
        """One pass over some crops → points in image pixels."""
        model, batch = self.model, len(images)
        features = model.encode(self._pixels(images, crops))
        whole = support.repeat(batch) if support is not None else model.no_support(batch, len(schema), self.device)
        index = torch.tensor(range(len(schema)) if order is None else order, device=self.device)
        names = [schema.names[int(i)] for i in index]
        part = whole if order is None else whole.select(index)
        words = [lexicon().canonical(n) for n in names] if named else [None] * len(names)
        questions = write_questions(self.tokenizer, words, [support is not None] * len(names))
        asked = Asked.of(questions, batch, self.device)
        asked = asked._replace(prompted=asked.prompted & part.known)
        _, state = model.ask(features, whole, part.token, asked)
        planes = model.correlate(features, part)
        heat = model.locate(features, part, state, planes)
        for row, claimed in enumerate(taken or ()):
            self._leave(heat[row], claimed, crops[row])
        if order is not None and len(order) < len(schema):
            return [self._plain(names, heat[i], crops[i]) for i in range(batch)]
        clicks = self._clicks(fixed, crops, names)
        answer = model.refine(heat, planes, features, part, state, asked.valid, **clicks)
        given = clicks["fixed"].cpu().numpy() if clicks else np.zeros((batch, len(names)), bool)
        return [self._set(names, answer, i, crops[i], images[i], given[i]) for i in range(batch)]

    def _leave(self, heat: Tensor, claimed: Taken, crop: Crop) -> None:
        """Where other objects have a point, (K, H, W) heat is taken away."""
        height, width = heat.shape[-2:]
        cells = (grid_positions(height, width, heat.device) * self.size).view(height, width, 2)
        for point, places in claimed.items():
            for x, y, reach in places:
                x, y = crop.to_crop(np.array([[x, y]]))[0]
                near = (cells - torch.tensor([x, y], device=heat.device)).norm(dim=-1) < max(reach * crop.scale, self.size / width)
                heat[point][near] = heat[point].min() - GONE

    def _clicks(self, fixed: Sequence[KeypointSet | None] | None, crops: Sequence[Crop], names: list[str]) -> dict[str, Tensor]:
        if fixed is None or all(f is None for f in fixed):
            return {}
        sets = [f.reorder(tuple(names)) if f is not None else None for f in fixed]
        given = np.stack([s.placed if s is not None else np.zeros(len(names), bool) for s in sets])
        xy = np.stack([c.to_crop(s.xy) / self.size if s is not None else np.zeros((len(names), 2)) for s, c in zip(sets, crops, strict=True)])
        return {"fixed": torch.from_numpy(given).to(self.device), "fixed_xy": torch.from_numpy(xy).float().to(self.device)}

    def _set(self, names: list[str], answer: Answer, row: int, crop: Crop, image: np.ndarray, given: np.ndarray) -> KeypointSet:
        """A point that nobody placed and that the others expect beyond the image's border is absent, wherever something alike was found.
        With fewer than three others there is no telling how the object is turned."""
        xy = crop.to_image(answer.xy[row].cpu().numpy() * self.size)
        seen = answer.visibility[row].float().cpu() - torch.tensor(RARE).log()  # what training counted twice counts once here
        visibility = seen.argmax(-1).numpy() + 1
        expected = crop.to_image(answer.anchor[row].cpu().numpy() * self.size)
        beyond = ((expected < 0) | (expected > image.shape[1::-1])).any(1)
        visibility[beyond & ~given & (len(names) >= TELLING)] = Visibility.ABSENT
        return KeypointSet(tuple(names), xy, visibility, answer.confidence[row].sigmoid().cpu().numpy())

    def _plain(self, names: list[str], heat: Tensor, crop: Crop) -> KeypointSet:
        xy = crop.to_image(peak(heat[None])[0].cpu().numpy() * self.size)
        sure = heat.flatten(1).softmax(-1).amax(-1).cpu().numpy()
        return KeypointSet(tuple(names), xy, np.full(len(names), Visibility.VISIBLE), sure)

    def _finish(self, points: KeypointSet, box: np.ndarray | None, image: np.ndarray, prepared: Prepared | None) -> KeypointSet:
        """Points moved onto the image, and a box around them where none was given or found."""
        height, width = image.shape[:2]
        xy = clip_to_image(points.xy, width, height)
        if box is None and points.placed.any():
            margin = prepared.margin if prepared is not None else np.full(4, 0.1)
            box = clip_box(with_margin(xy[points.placed], margin, 1.0), width, height)
        return KeypointSet(points.names, xy, points.visibility, points.score, box)

    def _pixels(self, images: Sequence[np.ndarray], crops: Sequence[Crop]) -> Tensor:
        stack = np.stack([warp(i, c) for i, c in zip(images, crops, strict=True)])
        return torch.from_numpy(stack).permute(0, 3, 1, 2).to(self.device)
