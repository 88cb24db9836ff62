"""The resident model and the one lock around its device. Between the HTTP face and the Predictor; knows neither HTTP nor tensors.

A request waits for the device at most behind `max_waiting` others, and holds it for one batch of images at a time, so that
large requests and small ones take turns. An image that is asked for all its objects is a batch of its own: as long as its
windows and objects make it, and their numbers are bounded (finder.MAX_WINDOWS, messages.MAX_BOXES, instances.MOST). While one
batch is on the device, the next one is decoded; never more, so that many requests do not need much memory. Support images are
decoded one by one, when they are to be encoded. An unusable query never fails the others.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kptllm_core.errors import ArtifactError, ImageError, InvalidInput, KptError, TooLarge, Unavailable
from kptllm_core.imaging import Kept, read_image
from kptllm_core.keypoints import KeypointSet
from kptllm_core.messages import Labelled, NameRequest, Objects, PredictRequest, Query
from kptllm_core.store import AdapterStore, ImageStore

if TYPE_CHECKING:  # loading it loads torch, which is for the thread that loads the model
    from kptllm_core.predictor import Example, Instance, Predictor

log = logging.getLogger(__name__)

BATCH = 4  # images predicted under one hold of the lock
T = TypeVar("T")


class Gone(Exception):
    """The client hung up; nobody reads the answer."""


class Spoilt(Exception):
    """What all queries share cannot be used, and why."""

    def __init__(self, reason: KptError) -> None:
        self.reason = reason


class Engine:
    """Predictions for many threads from one Predictor. `load` makes the Predictor; it runs in a thread of its own."""

    def __init__(self, load: Callable[[], Predictor], images: ImageStore, adapters: AdapterStore, *,
                 batch: int = BATCH, max_waiting: int = 16, decoded_bytes: int = 256 * 2**20) -> None:  # fmt: skip
        self.images, self.adapters, self.batch = images, adapters, batch
        self._load = load
        self._pixels = DecodedImages(images, decoded_bytes)
        self._device = threading.Lock()
        self._places = threading.Semaphore(max_waiting)
        self._batches = Turns(2)
        self._max_waiting, self._inside, self._count = max_waiting, 0, threading.Lock()
        self._predictor: Predictor | None = None
        self._active: object = None  # identity of the adapter that the Predictor holds now

    def load(self) -> None:
        """Loads the model; returns when it answers. Raises what `load_predictor` raises."""
        predictor = self._load()
        with self._device:
            self._predictor = predictor
        log.info("Model %s is ready on %s.", predictor.base, predictor.device)

    @property
    def ready(self) -> bool:
        return self._predictor is not None

    @property
    def predictor(self) -> Predictor:
        """Unavailable while the model is loading."""
        if self._predictor is None:
            raise Unavailable("The model is still loading. Try again in a few seconds.", code="loading")
        return self._predictor

    @property
    def waiting(self) -> int:
        """Requests that use the device or wait for it."""
        return self._inside

    def predict(self, request: PredictRequest, gone: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        """One entry per query, in order: {"keypoints", "size": [w, h]}, {"objects": [{"keypoints", "score"}], "size"} where all
        were asked for, or {"error"}. Raises what spoils all of them."""
        with self._place():
            results: list[dict[str, Any]] = []
            for start in range(0, len(request.queries), self.batch):
                with self._batches:
                    if gone():
                        raise Gone
                    results += self._predict_batch(request, request.queries[start : start + self.batch])
            return results

    def name_points(self, request: NameRequest) -> list[tuple[str, float]]:
        """The name and its probability for each point."""
        with self._place(), self._batches:
            image = self._pixels.get(request.image)
            with self._device, _memory_errors():
                self._activate(None)
                return self.predictor.name_points(image, request.xy, box=request.box, candidates=request.candidates)

    def _predict_batch(self, request: PredictRequest, queries: Sequence[Query | InvalidInput | TooLarge]) -> list[dict[str, Any]]:
        support = self._examples(request.support)
        results: list[dict[str, Any]] = [{} for _ in queries]
        ready: list[tuple[int, np.ndarray, Query]] = []  # place in the batch, its pixels, what was asked
        for at, query in enumerate(queries):
            try:
                if not isinstance(query, Query):
                    raise query
                image = self._pixels.get(query.image)
                query.check_on(image.shape[1], image.shape[0])
                ready.append((at, image, query))
            except (InvalidInput, TooLarge, Unavailable) as error:  # the last: no memory to decode it
                results[at] = {"error": error.to_json()}
        single = [r for r in ready if r[2].objects is None]
        answers: list[tuple[int, np.ndarray, KeypointSet | list[Instance] | KptError]] = []
        points = self._predict(request, support, [image for _, image, _ in single], [query for _, _, query in single])
        answers += [(at, image, answer) for (at, image, _), answer in zip(single, points, strict=True)]
        answers += [(at, image, self._predict_objects(request, support, image, q.objects)) for at, image, q in ready if q.objects is not None]
        for at, image, answer in answers:
            size = [image.shape[1], image.shape[0]]
            if isinstance(answer, KptError):
                results[at] = {"error": answer.to_json()}
            elif isinstance(answer, KeypointSet):
                results[at] = {"keypoints": answer.to_json(), "size": size}
            else:
                found = [{"keypoints": o.keypoints.to_json(), "score": round(float(o.score), 4)} for o in answer]
                results[at] = {"objects": found, "size": size}
        return results

    def _predict(self, request: PredictRequest, support: list[Example], images: list[np.ndarray],
                 queries: list[Query]) -> list[KeypointSet | KptError]:  # fmt: skip
        """The whole batch at once; where that fails, each image alone, so that only the guilty one has an error."""
        if not images:
            return []
        answers = self._on_device(request, len(images), lambda: list(self.predictor.predict(
            images, request.schema, support=support, boxes=[q.box for q in queries], prompt=request.prompt,
            fixed=[q.fixed for q in queries])))  # fmt: skip
        if not isinstance(answers, KptError):
            return list(answers)
        if len(images) == 1:
            return [answers]
        log.warning("A batch of %d images failed (%s); each is tried alone.", len(images), answers.message)
        give_back()
        return [answer for i in range(len(images)) for answer in self._predict(request, support, images[i : i + 1], queries[i : i + 1])]

    def _predict_objects(self, request: PredictRequest, support: list[Example], image: np.ndarray, asked: Objects) -> list[Instance] | KptError:
        least: dict[str, Any] = {} if asked.least is None else {"least": asked.least}
        return self._on_device(request, 1, lambda: self.predictor.predict_objects(
            [image], request.schema, support=support, boxes=[asked.boxes], prompt=request.prompt, find=asked.find, **least)[0])  # fmt: skip

    def _on_device(self, request: PredictRequest, images: int, predict: Callable[[], T]) -> T | KptError:
        """What `predict` returns with the device to itself, or why its images have no answer. Raises what spoils all of them: ArtifactError, or
        what is wrong with the support."""
        try:
            with self._device, _memory_errors():
                self._activate(request.adapter)
                return predict()
        except ArtifactError:
            raise
        except Spoilt as spoilt:
            raise bare(spoilt.reason) from None
        except KptError as error:
            return bare(error)
        except Exception:
            log.exception("Predicting %d image(s) failed.", images)
            return KptError("The model failed on this image. The core's log says more.", code="internal")

    def _activate(self, name: str | None) -> None:
        """Switches the Predictor to an adapter, or to the bare base. The caller holds the device."""
        folder = None if name is None else self.adapters.path(name)
        wanted: object = None
        if folder is not None:
            try:
                status = folder.stat()
            except FileNotFoundError:
                raise ArtifactError(f"The adapter '{name}' was deleted a moment ago.", adapter=name) from None
            wanted = (name, status.st_ino, status.st_mtime_ns)  # one that was deleted and made anew is another one
        if self._active != wanted:
            self._active = object()  # unknown, should the switch fail half-way
            self.predictor.use_adapter(folder)
            self._active = wanted

    def _examples(self, support: Sequence[Labelled]) -> list[Example]:
        if not support:
            return []
        from kptllm_core.predictor import Example

        return [Example(partial(self._support_pixels, item.image), item.keypoints, item.image) for item in support]

    def _support_pixels(self, sha: str) -> np.ndarray:
        """Read one by one, and only while they are not encoded: fifty photographs at a time would need more memory than there may be. They are
        not kept, since they would drive out the images that are asked for."""
        try:
            return self._pixels.read(sha)
        except (ImageError, TooLarge) as error:
            raise Spoilt(type(error)(f"The support image {sha} cannot be used: {error.message}", image=sha)) from None
        except KptError as error:
            raise Spoilt(error) from None

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place in the queue for the device; Unavailable when the queue is full or the model is still loading."""
        self.predictor  # noqa: B018 - raises while loading
        if not self._places.acquire(blocking=False):
            raise Unavailable(f"{self._max_waiting} requests are waiting for the device already. Try again in a few seconds.", code="busy")
        with self._count:
            self._inside += 1
        try:
            yield
        finally:
            with self._count:
                self._inside -= 1
            self._places.release()


class Turns:
    """`places` that are handed over in the order of arrival; a plain lock may go to the same thread again and again."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


class DecodedImages:
    """The last used images as (H, W, 3) uint8, up to `max_bytes` of them."""

    def __init__(self, images: ImageStore, max_bytes: int) -> None:
        self._images, self._kept = images, Kept(max_bytes)
        self._lock = threading.Lock()

    def get(self, sha: str) -> np.ndarray:
        """Raises NotFound, ImageError or TooLarge."""
        with self._lock:
            known = self._kept.find(sha)
        if known is not None:
            return known
        pixels = self.read(sha)
        with self._lock:
            self._kept.keep(sha, pixels)
        return pixels

    def read(self, sha: str) -> np.ndarray:
        """As `get`, past those that are kept."""
        with _memory_errors():
            return read_image(self._images.read(sha))


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Out of memory, on the host or on the GPU, becomes a sentence; what was taken is given back."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back()
        raise Unavailable("The core ran out of memory on this input. Send smaller images or fewer support examples, or use a "
                          "smaller preset.", code="out_of_memory") from error  # fmt: skip


def give_back() -> None:
    """The GPU memory that torch keeps and nobody uses."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def bare(error: KptError) -> KptError:
    """Without its traceback and its causes, which hold all that the failed call had in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, torch's CUDA and torch's CPU kinds of it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
