"""Requests to the core. Images go by the hash of their bytes: what the core has is never sent again.

Every failure is one of kptllm_core.errors with a sentence: Unavailable when the core is down, hung or overloaded; otherwise
what the core itself said. No call waits longer than it was told to.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import requests

from kptllm_core import errors
from kptllm_core.errors import (
    Conflict,
    InvalidInput,
    KptError,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from kptllm_core.keypoints import KeypointSchema, KeypointSet

CONNECT_SECONDS = 2.0
REMEMBERED = 20_000  # hashes of images that the core is known to have
_BY_CODE = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KptError)}
_BY_STATUS = {400: InvalidInput, 401: Unauthorized, 403: Unauthorized, 404: NotFound, 409: Conflict, 413: TooLarge}
Loader = Callable[[str], bytes]  # hash → the image's bytes


@dataclass(frozen=True)
class Query:
    """One object to predict: an image by its hash, and the object's box (x, y, w, h, pixels) or None for the whole image.

    fixed: points that a person placed and that the others must agree with."""

    image: str
    box: Sequence[float] | None = None
    fixed: KeypointSet | None = None


@dataclass(frozen=True)
class AllObjects:
    """All objects of an image to predict: those whose boxes (x, y, w, h, pixels) people drew, and with `find` the others, too, whose
    score is at least `least`; None: the core decides."""

    image: str
    boxes: Sequence[Sequence[float]] = ()
    find: bool = True
    least: float | None = None


class Instance(NamedTuple):
    """One of all objects of an image. score: 0…1, how likely its box overlaps a true one by half; 1 if a person drew it."""

    keypoints: KeypointSet
    score: float


Size = tuple[int, int]  # of an image: width, height


@dataclass(frozen=True)
class Answer:
    """results: one per query, in order: the points (of AllObjects: the instances, those with a given box first, in its order)
    with the image's size, or why there are none."""

    base: str
    adapter: str | None
    results: list[tuple[KeypointSet, Size] | tuple[list[Instance], Size] | KptError]


def image_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class CoreClient:
    """May be used from any thread."""

    def __init__(self, url: str, token: str = "", seconds: float = 90.0) -> None:
        """seconds: the longest that a call may take altogether, unless it is told otherwise."""
        self.url, self._token, self._seconds = url.rstrip("/"), token, seconds
        self._local = threading.local()
        self._there: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def health(self, seconds: float = 2.0) -> dict[str, Any]:
        """{"base", "device", "training", "queue"}. The core answers at once, also while it computes."""
        answer = self._json("GET", "/health", deadline=time.monotonic() + seconds)
        if answer.get("base") is None and answer.get("status") == "LOADING":
            raise Unavailable(f"The core at {self.url} is still loading the model.", code="loading")
        if not isinstance(answer.get("base"), str):
            raise self._odd("/health", answer)
        return answer

    def predict(
        self,
        schema: KeypointSchema,
        support: Sequence[tuple[str, KeypointSet]],
        queries: Sequence[Query | AllObjects],
        load: Loader,
        adapter: str | None = None,
        prompt: str = "auto",
        seconds: float | None = None,
    ) -> Answer:
        """Keypoints of every query. `load` is asked for the bytes of those images that the core does not have."""
        body = {
            "schema": schema.to_json(),
            "adapter": adapter,
            "prompt": prompt,
            "support": [{"image": image, "keypoints": points.to_json()} for image, points in support],
            "queries": [_query(q) for q in queries],
        }
        images = [image for image, _ in support] + [q.image for q in queries]
        answer = self._with_images("/predict", body, images, load, self._deadline(seconds))
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != len(queries) or not isinstance(answer.get("base"), str):
            raise self._odd("/predict", answer)
        return Answer(answer["base"], answer.get("adapter"), [self._result(r) for r in results])

    def name(self, image: str, xy: Sequence[Sequence[float]], load: Loader, box: Sequence[float] | None = None,
             candidates: Sequence[str] | None = None, seconds: float | None = None) -> list[tuple[str, float]]:  # fmt: skip
        """Name and probability of points (K, 2) that are given by their position in pixels."""
        body = {"image": image, "xy": [[float(v) for v in p] for p in xy], "box": None if box is None else [float(v) for v in box],
                "candidates": None if candidates is None else list(candidates)}  # fmt: skip
        answer = self._with_images("/name", body, [image], load, self._deadline(seconds))
        try:
            return [(str(n["name"]), float(n["score"])) for n in answer["names"]]
        except (KeyError, TypeError, ValueError):
            raise self._odd("/name", answer) from None

    # ------------------------------------------------------------ rounds

    def start_round(self, body: dict[str, Any], load: Loader, seconds: float = 600.0) -> dict[str, Any]:
        """POST /rounds with its snapshot. Sending the same again returns the same job."""
        images = [item["image"] for key in ("support", "train", "heldout") for item in body[key]]
        answer = self._with_images("/rounds", body, images, load, self._deadline(seconds))
        if not isinstance(answer.get("job"), str):
            raise self._odd("/rounds", answer)
        return answer

    def round(self, job: str) -> dict[str, Any]:
        """State, progress and result of a round. NotFound when the core does not know it (any more)."""
        return self._json("GET", f"/rounds/{quote(job, safe='')}", deadline=self._deadline(10))

    def cancel_round(self, job: str) -> None:
        self._json("DELETE", f"/rounds/{quote(job, safe='')}", deadline=self._deadline(10))

    def adapters(self) -> list[dict[str, Any]]:
        return list(self._json("GET", "/adapters", deadline=self._deadline(10)).get("adapters", []))

    def delete_adapter(self, name: str) -> None:
        self._json("DELETE", f"/adapters/{quote(name, safe='')}", deadline=self._deadline(10))

    # ------------------------------------------------------------ images

    def upload(self, images: Sequence[str], load: Loader, deadline: float) -> None:
        """Make sure that the core has these images; sends only what it lacks."""
        with self._lock:
            unknown = [i for i in dict.fromkeys(images) if i not in self._there]
        if not unknown:
            return
        answer = self._json("POST", "/images/missing", {"images": unknown}, deadline=deadline)
        missing = answer.get("missing")
        if not isinstance(missing, list):
            raise self._odd("/images/missing", answer)
        for image in unknown:
            if image in missing:
                self._send("PUT", f"/images/{image}", deadline, data=load(image))
            with self._lock:
                self._there[image] = None
                self._there.move_to_end(image)
                while len(self._there) > REMEMBERED:
                    self._there.popitem(last=False)

    def _with_images(
        self, path: str, body: dict[str, Any], images: Sequence[str], load: Loader, deadline: float
    ) -> dict[str, Any]:
        """POST after the images were sent. The core's store forgets the least recently used: then they are sent once more."""
        missed = 0
        while True:
            self.upload(images, load, deadline)
            try:
                return self._json("POST", path, body, deadline=deadline)
            except Conflict as error:
                missing = error.details.get("missing")
                missed += 1
                if error.details.get("code") != "missing_images" or not isinstance(missing, list) or missed > 3:
                    raise
                with self._lock:
                    for image in missing:
                        self._there.pop(str(image), None)
            except Unavailable as error:
                # Its queue is full for the moment, or the model is loading: a place comes free within seconds.
                if error.details.get("code") not in ("busy", "loading") or time.monotonic() + 1.0 > deadline:
                    raise
                time.sleep(0.5)

    # ------------------------------------------------------------ the wire

    def _deadline(self, seconds: float | None) -> float:
        return time.monotonic() + (self._seconds if seconds is None else seconds)

    def _json(self, method: str, path: str, body: Any = None, *, deadline: float) -> dict[str, Any]:
        answer = self._send(method, path, deadline, json=body)
        try:
            value = answer.json()
        except ValueError:
            raise self._odd(path, answer.text) from None
        if not isinstance(value, dict):
            raise self._odd(path, value)
        return value

    def _send(self, method: str, path: str, deadline: float, **content: Any) -> requests.Response:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"The core at {self.url} did not answer {path} in time. It is busy; try again later.", in_time=False)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            answer = self._session().request(
                method,
                self.url + path,
                headers=headers,
                timeout=(min(CONNECT_SECONDS, left), left),
                allow_redirects=False,
                **content,
            )
        except requests.Timeout:
            raise Unavailable(
                f"The core at {self.url} did not answer {path} within {left:.0f} s: it hangs or is busy.", in_time=False
            ) from None
        except requests.RequestException as error:
            kind = type(error).__name__
            raise Unavailable(
                f"The core at {self.url} cannot be reached ({kind}). One that `python -m backend` started comes back by "
                "itself in some seconds; for one elsewhere check CORE_URL and its log."
            ) from None
        if answer.status_code >= 300:
            raise self._error(path, answer)
        return answer

    def _session(self) -> requests.Session:
        """One per thread: a Session is not made for several. Proxies of the environment are not for the core."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.trust_env = False
        return session

    def _error(self, path: str, answer: requests.Response) -> KptError:
        try:
            said = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            said = {}
        said = said if isinstance(said, dict) else {}
        if answer.status_code in (401, 403):
            return Unauthorized(
                f"The core at {self.url} refuses CORE_TOKEN ({answer.status_code}). Give both the same token."
            )
        message = str(said.get("message") or f"The core at {self.url} answered {path} with HTTP {answer.status_code}.")
        code = str(said.get("code") or "")
        kind = _BY_CODE.get(code) or _BY_STATUS.get(answer.status_code) or Unavailable
        return kind(message, **{k: v for k, v in said.items() if k != "message"})

    def _result(self, result: Any) -> tuple[KeypointSet, Size] | tuple[list[Instance], Size] | KptError:
        if isinstance(result, dict) and isinstance(result.get("error"), dict):
            said = result["error"]
            return _BY_CODE.get(str(said.get("code")), KptError)(str(said.get("message") or "the core gave no reason"))
        try:
            width, height = (int(v) for v in result["size"])
            if "objects" in result:
                found = [Instance(KeypointSet.from_json(o["keypoints"]), float(o["score"])) for o in result["objects"]]
                return found, (width, height)
            return KeypointSet.from_json(result["keypoints"]), (width, height)
        except (KeyError, TypeError, ValueError, InvalidInput):
            return self._odd("/predict", result)

    def _odd(self, path: str, answer: Any) -> Unavailable:
        return Unavailable(f"The core at {self.url} answered {path} with something else than agreed: {str(answer)[:200]}. "
                             "Do the core and the backend have the same version?")  # fmt: skip


def _query(query: Query | AllObjects) -> dict[str, Any]:
    if isinstance(query, AllObjects):
        boxes = [[float(v) for v in box] for box in query.boxes]
        return {"image": query.image, "objects": {"boxes": boxes, "find": query.find, "least": query.least}}
    box = None if query.box is None else [float(v) for v in query.box]
    return {"image": query.image, "box": box, "fixed": None if query.fixed is None else query.fixed.to_json()}
