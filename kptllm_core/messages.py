"""What clients send to the core: JSON → checked values. Nothing here looks at a file or at the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np

from kptllm_core.errors import InvalidInput, SchemaError, TooLarge
from kptllm_core.keypoints import MAX_KEYPOINTS, KeypointSchema, KeypointSet
from kptllm_core.store import check_adapter_name, check_sha

MAX_QUERIES = 1000
MAX_SUPPORT = 50  # examples to choose from for each query (shots.py)
MAX_SAMPLES = 20_000
MAX_CANDIDATES = 1000
MAX_NAME = 500
MAX_BOXES = 500  # that people drew in one image: all are answered, or all are refused
PROMPTS = ("auto", "visual", "text", "both")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Labelled:
    """One labelled object. `image`: SHA-256. `keypoints`: in the order of the request's schema. `group`: images that
    belong together (a video, a person) and must not be torn apart."""

    image: str
    keypoints: KeypointSet
    group: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"image": self.image, "keypoints": self.keypoints.to_json(), "group": self.group}


@dataclass(frozen=True, eq=False)
class Objects:
    """All objects of an image. `boxes`: (N, 4) x, y, w, h in pixels of those that people drew; `find`: look for the others, too,
    whose score is at least `least` (0…1); None: as much as a person is usually shown."""

    boxes: np.ndarray
    find: bool = True
    least: float | None = None


@dataclass(frozen=True, eq=False)
class Query:
    """`box`: (4,) x, y, w, h in pixels of the oriented image, or None: find the object. `fixed`: points that are given
    (a person's click) and that the others must agree with. `objects`: asked for all objects of the image instead of for one."""

    image: str
    box: np.ndarray | None = None
    fixed: KeypointSet | None = None
    objects: Objects | None = None

    def check_on(self, width: int, height: int) -> None:
        """InvalidInput if a box has nothing in common with its image."""
        boxes = {} if self.box is None else {"box": self.box}
        boxes |= {f"objects.boxes[{i}]": box for i, box in enumerate(self.objects.boxes if self.objects else ())}
        for name, (x, y, w, h) in boxes.items():
            if not (x < width and y < height and x + w > 0 and y + h > 0):
                raise InvalidInput(f"{name} is {[float(v) for v in (x, y, w, h)]}, which lies outside the image of {width} × {height} pixels. "
                                   "Expected x, y, width, height in pixels of the oriented image.")  # fmt: skip


@dataclass(frozen=True, eq=False)
class PredictRequest:
    schema: KeypointSchema
    adapter: str | None
    prompt: str
    support: tuple[Labelled, ...]
    queries: tuple[Query | InvalidInput | TooLarge, ...]  # an unusable query is answered with its error, beside the others

    @classmethod
    def from_json(cls, body: Any) -> PredictRequest:
        """Raises InvalidInput (SchemaError) or TooLarge when the request as a whole cannot be answered."""
        data = _object(body, "the request", ("schema", "queries"), ("adapter", "prompt", "support"))
        schema = read_schema(data["schema"])
        prompt = data.get("prompt", "auto")
        if prompt not in PROMPTS:
            raise InvalidInput(f"prompt is one of {', '.join(PROMPTS)}; found {_short(prompt)}.")
        adapter = data.get("adapter")
        support = _each(data.get("support", []), "support", MAX_SUPPORT, lambda item, at: _labelled(item, at, schema))
        if prompt in ("visual", "both") and not support:
            raise InvalidInput(f"prompt '{prompt}' needs support examples and there are none. Send support, or ask with prompt 'text'.")
        queries = _each(data["queries"], "queries", MAX_QUERIES, lambda item, at: _query(item, at, schema))
        return cls(schema, None if adapter is None else check_adapter_name(adapter), prompt, support, queries)

    def images(self) -> list[str]:
        return [s.image for s in self.support] + [q.image for q in self.queries if isinstance(q, Query)]


@dataclass(frozen=True, eq=False)
class NameRequest:
    """`xy`: (K, 2) pixels of the oriented image. `candidates`: names to choose from, or None: any."""

    image: str
    xy: np.ndarray
    box: np.ndarray | None
    candidates: list[str] | None

    @classmethod
    def from_json(cls, body: Any) -> NameRequest:
        data = _object(body, "the request", ("image", "xy"), ("box", "candidates"))
        points = _each(data["xy"], "xy", MAX_KEYPOINTS, lambda item, at: _numbers(item, 2, at))
        if not points:
            raise InvalidInput("xy holds no point; send at least one [x, y].")
        candidates = data.get("candidates")
        if candidates is not None:
            candidates = list(_each(candidates, "candidates", MAX_CANDIDATES, _name))
            if not candidates:
                raise InvalidInput("candidates is an empty list; give names to choose from, or null for any name.")
        return cls(check_sha(data["image"]), np.array(points), _box(data.get("box"), "box"), candidates)


@dataclass(frozen=True, eq=False)
class RoundRequest:
    """A LoRA round: train on `train`, then score the parent and the new adapter on `heldout` with `support`."""

    name: str
    schema: KeypointSchema
    parent: str | None
    train: tuple[Labelled, ...]
    heldout: tuple[Labelled, ...]
    support: tuple[Labelled, ...]
    seconds: float | None
    steps: int | None
    seed: int

    @classmethod
    def from_json(cls, body: Any) -> RoundRequest:
        data = _object(body, "the request", ("name", "schema", "train", "heldout"), ("parent", "support", "seconds", "steps", "seed"))
        schema = read_schema(data["schema"])
        sets = {
            key: _each(data.get(key, []), key, limit, lambda item, at: _labelled(item, at, schema))
            for key, limit in (("train", MAX_SAMPLES), ("heldout", MAX_SAMPLES), ("support", MAX_SUPPORT))
        }
        for key in ("train", "heldout"):
            if not any(s.keypoints.placed.any() for s in sets[key]):
                raise InvalidInput(f"{key} has {len(sets[key])} objects and none with a placed point. Expected at least one.")
        for key in ("train", "support"):
            both = sorted({s.image for s in sets[key]} & {s.image for s in sets["heldout"]})
            if both:
                raise InvalidInput(f"{len(both)} images are in {key} and in heldout, which would flatter the score. Hold them out "
                                   f"or use them, not both. The first is {both[0]}.")  # fmt: skip
        seconds, steps = data.get("seconds"), data.get("steps")
        if seconds is not None and not 0 < _number(seconds, "seconds") <= 7 * 86_400:
            raise InvalidInput(f"seconds is more than 0 and at most a week; found {_short(seconds)}.")
        if steps is not None and not 0 < _integer(steps, "steps") <= 10_000_000:
            raise InvalidInput(f"steps is 1…10,000,000; found {_short(steps)}.")
        if seconds is None and steps is None:
            raise InvalidInput("How long may the round take? Give seconds, steps or both.")
        seed = _integer(data.get("seed", 0), "seed")
        if not 0 <= seed < 2**32:
            raise InvalidInput(f"seed is 0…2³² - 1; found {seed}.")
        parent = data.get("parent")
        name = check_adapter_name(data["name"])
        if parent == name:
            raise InvalidInput(f"The parent '{name}' cannot also be the name of the new adapter. Choose another name.")
        return cls(name, schema, None if parent is None else check_adapter_name(parent), sets["train"], sets["heldout"],
                   sets["support"], seconds, steps, seed)  # fmt: skip

    def images(self) -> list[str]:
        return [s.image for part in (self.train, self.heldout, self.support) for s in part]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "schema": self.schema.to_json(), "parent": self.parent,
                **{key: [s.to_json() for s in getattr(self, key)] for key in ("train", "heldout", "support")},
                "seconds": self.seconds, "steps": self.steps, "seed": self.seed}  # fmt: skip

    def content_hash(self) -> str:
        """SHA-256 hex of what was asked, whatever the spelling of the JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def parse_json(data: bytes) -> Any:
    """Strict JSON: no NaN, no lone surrogates, no depth that breaks a parser. InvalidInput otherwise."""
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(data.decode(), parse_constant=refuse)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise InvalidInput("The JSON holds half a character (a lone surrogate). Send whole UTF-8 characters.") from None
    except RecursionError:
        raise InvalidInput("The JSON is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits
        raise InvalidInput(f"The body is no JSON: {_short(str(error))}.") from None


def read_schema(value: Any) -> KeypointSchema:
    try:
        schema = KeypointSchema.from_json(value)
    except OverflowError:
        raise SchemaError("The schema holds a number that is no index.") from None
    for name in (*schema.names, schema.category):
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise SchemaError(f"A name has 1…{MAX_NAME} characters; found {_short(name)}.")
    return schema


def _labelled(item: Any, at: str, schema: KeypointSchema) -> Labelled:
    data = _object(item, at, ("image", "keypoints"), ("group",))
    group = data.get("group", "")
    if not isinstance(group, str) or len(group) > MAX_NAME:
        raise InvalidInput(f"{at}: group is a string of at most {MAX_NAME} characters; found {_short(group)}.")
    return Labelled(check_sha(data["image"]), _points(data["keypoints"], at, schema), group)


def _points(value: Any, at: str, schema: KeypointSchema) -> KeypointSet:
    """A keypoint set in the order of the schema; what it does not name is not labelled."""
    names = value.get("names", []) if isinstance(value, dict) else []
    if isinstance(names, list):
        if len(names) > MAX_KEYPOINTS:
            raise TooLarge(f"{at} has {len(names)} keypoints; at most {MAX_KEYPOINTS} are supported.")
        for name in names:
            schema.index(name)
        if len(set(names)) < len(names):
            raise InvalidInput(f"{at}: a keypoint is named twice.")
    else:
        raise InvalidInput(f"{at}: keypoints.names is a list of names; found {_short(names)}.")
    try:
        with np.errstate(over="ignore"):  # what overflows is refused as not finite
            return KeypointSet.from_json(value).reorder(schema.names)
    except InvalidInput as error:
        raise type(error)(f"{at}: {error.message}") from None
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{at}: the keypoints cannot be read: {_short(str(error))}.") from None


def _query(item: Any, at: str, schema: KeypointSchema) -> Query | InvalidInput | TooLarge:
    try:
        data = _object(item, at, ("image",), ("box", "fixed", "objects"))
        image = check_sha(data["image"])
        if data.get("objects") is not None:
            if data.get("box") is not None or data.get("fixed") is not None:
                raise InvalidInput(f"{at} asks for all objects and has a box or fixed points, which belong to one. Give boxes in objects.boxes.")
            return Query(image, objects=_objects(data["objects"], f"{at}.objects"))
        fixed = None if data.get("fixed") is None else _points(data["fixed"], f"{at}.fixed", schema)
        return Query(image, _box(data.get("box"), f"{at}.box"), fixed)
    except (InvalidInput, TooLarge) as error:
        return error


def _objects(value: Any, at: str) -> Objects:
    data = _object(value, at, (), ("boxes", "find", "least"))
    boxes = data.get("boxes", [])
    if isinstance(boxes, list) and len(boxes) > MAX_BOXES:
        raise TooLarge(f"{at}.boxes has {len(boxes)} boxes; at most {MAX_BOXES} objects of one image can be given. Cut the image into parts.")
    found = _each(boxes, f"{at}.boxes", MAX_BOXES, _given_box)
    find = data.get("find", True)
    if not isinstance(find, bool):
        raise InvalidInput(f"{at}.find is true (look for objects that have no box yet) or false; found {_short(find)}.")
    least = data.get("least")
    if least is not None and not 0 <= _number(least, f"{at}.least") <= 1:
        raise InvalidInput(f"{at}.least is a score from 0 to 1; found {_short(least)}.")
    return Objects(np.array(found, np.float64).reshape(-1, 4), find, least)


def _given_box(value: Any, at: str) -> np.ndarray:
    box = _box(value, at)
    if box is None:
        raise InvalidInput(f"{at} is null; expected [x, y, width, height] in pixels.")
    return box


def _box(value: Any, at: str) -> np.ndarray | None:
    if value is None:
        return None
    box = np.array(_numbers(value, 4, at), np.float32)
    if not np.isfinite(box).all() or not (box[2:] > 0).all():
        raise InvalidInput(f"{at} is [x, y, width, height] in pixels with a positive size; found {_short(value)}.")
    return box


def _object(value: Any, at: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInput(f"{at} is a JSON object; found {_short(value)}.")
    missing = [key for key in required if key not in value]
    unknown = sorted(set(value) - set(required) - set(optional))
    if missing or unknown:
        raise InvalidInput(f"{at} has the keys {', '.join(required + optional)}. Missing: {missing}; unknown: {_short(unknown)}.")
    return value


def _each(value: Any, at: str, limit: int, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise InvalidInput(f"{at} is a list; found {_short(value)}.")
    if len(value) > limit:
        raise TooLarge(f"{at} has {len(value)} entries; at most {limit} are allowed in one request. Split it.")
    return tuple(read(item, f"{at}[{i}]") for i, item in enumerate(value))


def _name(value: Any, at: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise InvalidInput(f"{at} is a name of 1…{MAX_NAME} characters; found {_short(value)}.")
    return value


def _numbers(value: Any, count: int, at: str) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise InvalidInput(f"{at} is a list of {count} numbers; found {_short(value)}.")
    return [_number(v, at) for v in value]


def _number(value: Any, at: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12 and math.isfinite(value):
        return float(value)
    raise InvalidInput(f"{at}: expected a finite number; found {_short(value)}.")


def _integer(value: Any, at: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InvalidInput(f"{at} is a whole number; found {_short(value)}.")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
