"""Images in, KeypointSets out, in pixels of the original image. What serving, evaluation and the command line all use."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from kptllm_core.adapters import AdapterSwitch
from kptllm_core.checkpoint import Checkpoint, load_adapter, load_checkpoint
from kptllm_core.errors import InvalidInput
from kptllm_core.finder import Found
from kptllm_core.geometry import box_of_points
from kptllm_core.instances import MOST
from kptllm_core.keypoints import SHOWN, KeypointSchema, KeypointSet
from kptllm_core.messages import MAX_SUPPORT
from kptllm_core.naming import choose_names, write_names
from kptllm_core.objects import ImageObjects, Instance
from kptllm_core.passes import Passes
from kptllm_core.support import Example, Prepared, Prompt, support_key

__all__ = ["Example", "Instance", "Predictor", "load_predictor"]

PROMPTS = ("auto", "visual", "text", "both")
MAX_SUPPORTS = 32  # support sets that stay encoded at most
MAX_SUPPORT_BYTES = 256 * 2**20  # of these together, but for the newest
SMALL = 0.1  # of the image's longer side: points that lie closer together do not tell how far their object reaches


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
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InvalidInput(f"The device {name} was asked for; torch finds no CUDA here. Use cpu or auto, or install a torch with CUDA.")
        self.device = torch.device(name)
        self.model = checkpoint.model.to(self.device).eval()
        self.tokenizer = checkpoint.tokenizer
        self.passes = Passes(self.model, self.tokenizer, self.device)
        self.base = checkpoint.base
        self.adapter: str | None = None
        self._switch: AdapterSwitch | None = None
        self._weights = self.base
        self._supports: OrderedDict[str, Prepared] = OrderedDict()

    @property
    def size(self) -> int:
        """Side of the model's crops, pixels."""
        return self.passes.size

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
        how = self._prompt(schema, support, prompt)
        order = None if asked is None else [schema.index(n) for n in asked]
        found = [b if b is not None else ImageObjects(self.passes, i, how).rough() for i, b in zip(images, boxes, strict=True)]
        return self.passes.points(images, found, how, order, fixed)

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
        how = self._prompt(schema, support, prompt)
        answers: list[list[Instance]] = []
        for image, own in zip(images, given, strict=True):
            objects = ImageObjects(self.passes, image, how)
            found = objects.find(least, most, len(own)) if find else Found(np.zeros((0, 4)), np.zeros(0))
            drawn, others = objects.read(own, found, least, most)
            answers.append(drawn + sorted((i for i in others if i.score >= least), key=lambda i: -i.score))
        return answers

    def find_objects(self, image: np.ndarray, schema: KeypointSchema, support: Sequence[Example] = (), prompt: str = "auto",
                     least: float = SHOWN, most: int = MOST) -> Found:  # fmt: skip
        """Boxes of up to `most` objects of one image, the surest first, as the head that finds them says."""
        return ImageObjects(self.passes, image, self._prompt(schema, support, prompt)).search(least, most)

    @torch.inference_mode()
    def name_points(self, image: np.ndarray, xy: np.ndarray, box: np.ndarray | None = None,
                    candidates: Sequence[str] | None = None) -> list[tuple[str, float]]:  # fmt: skip
        """The third task: what are the points at xy (K, 2), in pixels, called?

        box: of the object; without one it is told by points that lie apart, else the whole image is looked at. candidates: choose among
        these names; otherwise the model writes one freely. Returns (name, probability) each.
        """
        xy = np.asarray(xy, np.float32).reshape(-1, 2)
        if box is None and np.ptp(xy, 0).max() > SMALL * max(image.shape[:2]):
            box = box_of_points(xy, 0.1)
        crop = self.passes.crop(image, box)
        features = self.passes.encode([image], [crop])
        places = torch.from_numpy(crop.to_crop(xy) / self.size).float().clamp(0, 1)[None].to(self.device)
        tokens = self.model.extractor(features, places)
        if candidates:
            return choose_names(self.model, self.tokenizer, features, tokens, list(candidates))
        return write_names(self.model, self.tokenizer, features, tokens)

    def _prompt(self, schema: KeypointSchema, support: Sequence[Example], prompt: str) -> Prompt:
        """InvalidInput for a prompt that cannot be."""
        if prompt not in PROMPTS:
            raise InvalidInput(f"Unknown prompt '{prompt}'. Expected one of {', '.join(PROMPTS)}.")
        if prompt in ("visual", "both") and not support:
            raise InvalidInput(f"A {prompt} prompt needs support examples; none were given. Label an image, or ask by text.")
        if len(support) > MAX_SUPPORT:
            raise InvalidInput(f"{len(support)} support examples were given; expected at most {MAX_SUPPORT}.")
        shown = self._prepare(schema, support) if support and prompt != "text" else None
        return Prompt(schema, shown, named=prompt != "visual", taught=self.adapter is not None)

    def _support_bytes(self) -> int:
        return sum(p.tight.nbytes + p.whole.nbytes for p in self._supports.values())

    def _prepare(self, schema: KeypointSchema, support: Sequence[Example]) -> Prepared:
        key = support_key(self._weights, schema, support)
        if key not in self._supports:
            self._supports[key] = self.passes.prepare(schema, support)
            while len(self._supports) > 1 and (len(self._supports) > MAX_SUPPORTS or self._support_bytes() > MAX_SUPPORT_BYTES):
                self._supports.popitem(last=False)
        self._supports.move_to_end(key)
        return self._supports[key]
