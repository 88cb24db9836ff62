"""Passes of one resident model: images and boxes in, points or boxes of objects out, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kptllm_core.claims import Taken
from kptllm_core.decoder import Answer, Support, peak
from kptllm_core.errors import InvalidInput
from kptllm_core.geometry import Crop, clip_box, clip_to_image, crop_of_box, crop_of_image
from kptllm_core.imaging import warp
from kptllm_core.keypoints import KeypointSchema, KeypointSet, Visibility
from kptllm_core.language import write_questions
from kptllm_core.layout import layout_prior, may_be_turned
from kptllm_core.lexicon import lexicon
from kptllm_core.model import Asked, KptLLM
from kptllm_core.objective import RARE
from kptllm_core.shots import TURNS, Shots, look_of
from kptllm_core.support import Example, Prepared, Prompt, turned, usual_margin, usual_points
from kptllm_core.vision import Features, grid_positions

BATCH = 8  # crops in one pass
TELLING = 4  # points of an object from which on the others tell of one where it must be
GONE = 20.0  # logits below a heatmap's least: nothing pulls a point there


class View(NamedTuple):
    """An example as it is shown: its points in pixels of its image, the crop, and the crop's pixels (S, S, 3) uint8."""

    points: KeypointSet
    crop: Crop
    picture: np.ndarray


@dataclass(frozen=True)
class Passes:
    """The model on crops of images, some at a time. Without gradients."""

    model: KptLLM
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    by_layout: bool = True
    """Whether the examples' layouts tell where a point may lie."""

    @property
    def size(self) -> int:
        """Side of the model's crops, pixels."""
        return self.model.config.image_size

    def crop(self, image: np.ndarray, box: np.ndarray | None) -> Crop:
        """Of a box (x, y, w, h), or of the whole image."""
        return crop_of_image(image.shape[1], image.shape[0], self.size) if box is None else crop_of_box(box, self.size)

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray], crops: Sequence[Crop]) -> Features:
        return self._encode([warp(i, c) for i, c in zip(images, crops, strict=True)])

    @torch.inference_mode()
    def prepare(self, schema: KeypointSchema, support: Sequence[Example]) -> Prepared:
        """Encodes a support set. InvalidInput if nothing of the schema is labelled in it."""
        points = [e.keypoints.reorder(schema.names) for e in support]
        if not any(p.placed.any() for p in points):
            raise InvalidInput("No support example has a labelled point of this schema. Label at least one.")
        turns = TURNS if may_be_turned(points) else TURNS[:1]
        tight, whole, boxes, shares = list[View](), list[View](), list[np.ndarray](), list[float]()
        for example, own in zip(support, points, strict=True):  # one image at a time: fifty photographs would need more memory than there may be
            image = example.image
            height, width = image.shape[:2]
            box = own.usable_box(width, height)
            tight += [View(own, crop, warp(image, crop)) for crop in (turned(box, own, self.size, d) for d in turns)]
            whole.append(View(own, crop := self.crop(image, None), warp(image, crop)))
            boxes.append(box)
            shares.append(max(box[2], box[3]) / max(width, height))
        margin = usual_margin(points, boxes)
        return Prepared(self._shots(tight, len(turns)), self._shots(whole, 1), margin, float(np.median(shares)), usual_points(points))

    @torch.inference_mode()
    def points(self, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray | None], prompt: Prompt, order: list[int] | None = None,
               fixed: Sequence[KeypointSet | None] | None = None, taken: Sequence[Taken] | None = None,
               exact: Sequence[bool] | None = None) -> list[KeypointSet]:  # fmt: skip
        """The points of one object in each box (the whole image for None), moved onto the image, with that box or one around them.

        order: indices of the points that are asked for; fewer than all do not correct each other. fixed: points that are given. taken:
        places that are another object's. exact: which boxes lie as a person would draw them (default: all): only in these the examples'
        layouts tell where points may lie.
        """
        crops = [self.crop(i, b) for i, b in zip(images, boxes, strict=True)]
        sets: list[KeypointSet] = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            framed = [len(prompt.schema) > 1 and box is not None for box in boxes[part]]  # the box of one point is made around it
            if exact is not None:
                framed = [a and b for a, b in zip(framed, exact[part], strict=True)]
            sets += self.points_of_crops(images[part], crops[part], prompt, prompt.tight, order, fixed and fixed[part], taken and taken[part], framed)
        return [self._finish(*item, prompt) for item in zip(sets, boxes, images, strict=True)]

    @torch.inference_mode()
    def points_of_crops(self, images: Sequence[np.ndarray], crops: Sequence[Crop], prompt: Prompt, shots: Shots | None,
                        order: list[int] | None = None, fixed: Sequence[KeypointSet | None] | None = None,
                        taken: Sequence[Taken] | None = None, framed: Sequence[bool] = ()) -> list[KeypointSet]:  # fmt: skip
        """One pass over some crops → points in image pixels. shots: the examples as they are compared with. framed: whether each crop shows
        its object as those of the examples show theirs, so that their layouts tell where its points lie (default: none). The rest is as in
        `points`."""
        model, batch = self.model, len(images)
        features = self.encode(images, crops)
        index = torch.tensor(range(len(prompt.schema)) if order is None else order, device=self.device)
        names = [prompt.schema.names[int(i)] for i in index]
        chosen = self._chosen(shots, features)
        whole = self._support(chosen, batch, len(prompt.schema))
        part = whole if order is None else whole.select(index)
        asked = self._asked(names, prompt.named, part, shots is not None)
        _, state = model.ask(features, whole, part.token, asked)
        planes = model.correlate(features, part)
        heat = model.locate(features, part, state, planes)
        if self.by_layout and any(framed) and chosen is not None:
            prior = layout_prior(chosen.xy, chosen.known, *heat.shape[-2:])[:, index]
            heat = heat + prior * torch.tensor(framed, device=self.device).view(-1, 1, 1, 1)
        for row, claimed in enumerate(taken or ()):
            self._leave(heat[row], claimed, crops[row])
        if order is not None and len(order) < len(prompt.schema):
            return [self._plain(names, heat[i], crops[i]) for i in range(batch)]
        clicks = self._clicks(fixed, crops, names)
        answer = model.refine(heat, planes, features, part, state, asked.valid, **clicks)
        given = clicks["fixed"].cpu().numpy() if clicks else np.zeros((batch, len(names)), bool)
        return [self.set_of(names, answer, i, crops[i], images[i], given[i], prompt.taught) for i in range(batch)]

    @torch.inference_mode()
    def detect(self, image: np.ndarray, crops: Sequence[Crop], prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        """Objects in crops of one image; returns what `finder.Detect` says."""
        boxes, scores = [], []
        shots = prompt.tight.upright() if prompt.tight is not None else None
        for start in range(0, len(crops), BATCH):
            part = crops[start : start + BATCH]
            features = self.encode([image] * len(part), part)
            whole = self._support(self._chosen(shots, features), len(part), len(prompt.schema))
            asked = self._asked(prompt.schema.names, prompt.named, whole, shots is not None)
            found = self.model.detect(features, whole, asked)
            boxes.append(found.boxes.cpu().numpy())
            scores.append(found.score.sigmoid().cpu().numpy())
        return np.concatenate(boxes), np.concatenate(scores)

    def set_of(self, names: Sequence[str], answer: Answer, row: int, crop: Crop, image: np.ndarray, given: np.ndarray,
               taught: bool) -> KeypointSet:  # fmt: skip
        """A point that nobody placed and that the others expect beyond the image's border is absent, wherever something alike was found.
        With fewer than three others there is no telling how the object is turned, and only a round teaches when such a point is absent."""
        xy = crop.to_image(answer.xy[row].cpu().numpy() * self.size)
        seen = answer.visibility[row].float().cpu() - torch.tensor(RARE).log()  # what training counted twice counts once here
        few = len(names) < TELLING
        if few and not taught:
            seen[:, Visibility.ABSENT - 1] = -torch.inf
        visibility = seen.argmax(-1).numpy() + 1
        expected = crop.to_image(answer.anchor[row].cpu().numpy() * self.size)
        beyond = ((expected < 0) | (expected > image.shape[1::-1])).any(1)
        visibility[beyond & ~given & (not few)] = Visibility.ABSENT
        return KeypointSet(tuple(names), xy, visibility, answer.confidence[row].sigmoid().cpu().numpy())

    def _encode(self, pictures: Sequence[np.ndarray]) -> Features:
        return self.model.encode(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self.device))

    def _shots(self, views: Sequence[View], turns: int) -> Shots:
        """views: so many of each example, one after the other."""
        parts = []
        for start in range(0, len(views), BATCH):
            part = views[start : start + BATCH]
            features = self._encode([v.picture for v in part])
            each = [features.pick(slice(s, s + 1)) for s in range(len(part))]
            xy = np.stack([np.clip(v.crop.to_crop(v.points.xy) / self.size, 0, 1) for v in part])
            known = np.stack([v.points.placed for v in part])
            parts.append(self.model.show(each, *(torch.from_numpy(a)[None].to(self.device) for a in (xy.astype(np.float32), known))))
        return Shots.joined(parts, turns)

    def _chosen(self, shots: Shots | None, features: Features) -> Shots | None:
        """Those that each of the queries is shown. features: of the queries."""
        return None if shots is None else shots.nearest(look_of(features))

    def _support(self, chosen: Shots | None, batch: int, count: int) -> Support:
        """What so many queries are shown of so many points."""
        return self.model.no_support(batch, count, self.device) if chosen is None else self.model.support(chosen).repeat(batch)

    def _asked(self, names: Sequence[str], named: bool, part: Support, prompted: bool) -> Asked:
        words = [lexicon().canonical(n) for n in names] if named else [None] * len(names)
        questions = write_questions(self.tokenizer, words, [prompted] * len(names))
        asked = Asked.of(questions, len(part.known), self.device)
        return asked._replace(prompted=asked.prompted & part.known)

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

    def _plain(self, names: list[str], heat: Tensor, crop: Crop) -> KeypointSet:
        xy = crop.to_image(peak(heat[None])[0].cpu().numpy() * self.size)
        sure = heat.flatten(1).softmax(-1).amax(-1).cpu().numpy()
        return KeypointSet(tuple(names), xy, np.full(len(names), Visibility.VISIBLE), sure)

    def _finish(self, points: KeypointSet, box: np.ndarray | None, image: np.ndarray, prompt: Prompt) -> KeypointSet:
        height, width = image.shape[:2]
        xy = clip_to_image(points.xy, width, height)
        if box is None and points.placed.any():
            box = clip_box(prompt.box_around(xy[points.placed], width, height), width, height)
        return KeypointSet(points.names, xy, points.visibility, points.score, box)
