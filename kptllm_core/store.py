"""What the core keeps on disk: images by their SHA-256, and adapter folders by their name.

Everything appears whole or not at all: it is written under another name, flushed, renamed, and the folder is flushed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kptllm_core.errors import ArtifactError, Conflict, InvalidInput, KptError, NotFound, TooLarge, Unavailable

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 50 * 2**20
_SHA = re.compile(r"[0-9a-f]{64}")
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")  # also a safe file name: no separator, no leading dot


def check_sha(value: object) -> str:
    """The value if it is a SHA-256 in lower-case hex, else InvalidInput."""
    if not isinstance(value, str) or not _SHA.fullmatch(value):
        raise InvalidInput(f"An image is named by its SHA-256 (64 lower-case hex digits); found {str(value)[:80]!r}.")
    return value


def check_adapter_name(value: object) -> str:
    """The value if it can name an adapter, else InvalidInput."""
    if not isinstance(value, str) or not _ADAPTER.fullmatch(value):
        raise InvalidInput(f"An adapter's name has 1…128 of A-Z a-z 0-9 . _ + - and starts with a letter or digit; found {str(value)[:80]!r}.")
    return value


def fsync_folder(folder: Path) -> None:
    """Makes creations, renames and deletions inside the folder survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Replaces the file: readers see the old or the new content. Not `durable`: without the flushes (progress)."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error) from error
    if durable:
        fsync_folder(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    write_atomically(path, json.dumps(value, allow_nan=False).encode(), durable)


def read_json(path: Path) -> Any | None:
    """The file's JSON; None if there is no such file, or if it is no JSON (a disk's fault, as we write whole files)."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.error("%s cannot be read: %s", path, error)
        return None


def disk_error(error: OSError) -> KptError:
    """What to tell about a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("The core's disk is full. Free some space or lower the limit of its image store.", code="disk_full")
    return Unavailable(f"The core cannot write to its disk: {error.strerror or error}.", code="disk")


class ImageStore:
    """Encoded images by content, at most `max_bytes` of them; the least recently used go first, those in use never.

    Threads may share it. One process at a time owns the folder.
    """

    def __init__(self, folder: Path, max_bytes: int = 10 * 2**30, max_image_bytes: int = MAX_IMAGE_BYTES) -> None:
        self.folder, self.max_bytes, self.max_image_bytes = folder, max_bytes, max_image_bytes
        self._lock = threading.Lock()
        self._in_use: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in folder.glob("*/*"):
            if _SHA.fullmatch(path.name):
                status = path.stat()
                found.append((status.st_mtime, path.name, status.st_size))
            else:
                path.unlink()  # a write that was cut off
        self._sizes: OrderedDict[str, int] = OrderedDict((sha, size) for _, sha, size in sorted(found))
        self._bytes = sum(self._sizes.values())

    @property
    def total_bytes(self) -> int:
        return self._bytes

    def __contains__(self, sha: str) -> bool:
        return sha in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def missing(self, shas: Iterable[str]) -> list[str]:
        """Those that are not here, each once, in the given order. The others count as just used."""
        missing: dict[str, None] = {}
        for sha in shas:
            if not self._touch(sha):
                missing[sha] = None
        return list(missing)

    def put(self, sha: str, data: bytes) -> None:
        """Stores the bytes; durable on return. InvalidInput for another hash; TooLarge; Unavailable (disk)."""
        check_sha(sha)
        if len(data) > self.max_image_bytes:
            raise TooLarge(f"The image has {len(data):,} bytes; at most {self.max_image_bytes:,} are allowed. Scale it down.")
        found = hashlib.sha256(data).hexdigest()
        if found != sha:
            raise InvalidInput(f"These {len(data)} bytes have the SHA-256 {found}, not {sha}: damaged on the way? Send them again.")
        if self._touch(sha):
            return
        path = self._path(sha)
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(exist_ok=True)
                fsync_folder(self.folder)
        except OSError as error:
            raise disk_error(error) from error
        write_atomically(path, data)
        with self._lock:
            if sha not in self._sizes:
                self._sizes[sha] = len(data)
                self._bytes += len(data)
            self._evict(keep=sha)

    def read(self, sha: str) -> bytes:
        """The image's bytes, checked. NotFound if it is not here, or is damaged on disk (then it is dropped)."""
        if self._touch(sha):
            try:
                data = self._path(sha).read_bytes()
            except OSError as error:
                log.error("Image %s cannot be read: %s", sha, error)
                data = b""
            if hashlib.sha256(data).hexdigest() == sha:
                return data
            log.error("Image %s is damaged on disk; dropped.", sha)
            with self._lock:
                self._drop(sha)
        raise NotFound(f"The image {sha} is not in the core's store. Upload it again.", code="missing_image", image=sha)

    def link(self, sha: str, target: Path) -> None:
        """Gives the image a second name, `target`, which outlives its eviction. NotFound, Unavailable (disk)."""
        if not self._touch(sha):
            raise NotFound(f"The image {sha} is not in the core's store. Upload it again.", code="missing_image", image=sha)
        try:
            os.link(self._path(sha), target)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP):
                raise disk_error(error) from error
            write_atomically(target, self.read(sha))  # a file system without hard links

    @contextmanager
    def in_use(self, shas: Iterable[str]) -> Iterator[None]:
        """Within this context these images are not evicted."""
        held = set(shas)
        self.pin(held)
        try:
            yield
        finally:
            self.unpin(held)

    def pin(self, shas: Iterable[str]) -> None:
        """Keeps these images (here or still to come) until `unpin`, which is called once for each `pin`."""
        with self._lock:
            self._in_use.update(set(shas))

    def unpin(self, shas: Iterable[str]) -> None:
        with self._lock:
            self._in_use.subtract(set(shas))
            self._in_use += Counter()  # forget what is at zero
            self._evict()

    def _path(self, sha: str) -> Path:
        return self.folder / sha[:2] / sha

    def _touch(self, sha: str) -> bool:
        """Marks an image as just used, on disk too, so that the order survives a restart. False if it is not here."""
        with self._lock:
            if sha not in self._sizes:
                return False
            try:
                os.utime(self._path(sha))
            except FileNotFoundError:  # somebody cleaned the folder by hand
                self._drop(sha)
                return False
            self._sizes.move_to_end(sha)
            return True

    def _evict(self, keep: str | None = None) -> None:
        if self._bytes <= self.max_bytes:
            return
        for sha in list(self._sizes):
            if sha != keep and not self._in_use[sha]:
                self._drop(sha)
                if self._bytes <= self.max_bytes:
                    return

    def _drop(self, sha: str) -> None:
        self._path(sha).unlink(missing_ok=True)
        self._bytes -= self._sizes.pop(sha, 0)


class AdapterStore:
    """Adapter folders by name. A folder is published complete and never changed afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".deleted-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def __contains__(self, name: str) -> bool:
        return (self.folder / check_adapter_name(name)).is_dir()

    def path(self, name: str) -> Path:
        """The adapter's folder. ArtifactError with the known names if there is none."""
        if name not in self:
            known = ", ".join(self.names()) or "none"
            raise ArtifactError(f"The adapter '{name}' is not here. Known: {known}. Train it, or ask without an adapter.", adapter=name)
        return self.folder / name

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if _ADAPTER.fullmatch(p.name) and p.is_dir())

    def list(self) -> list[dict[str, Any]]:
        """[{"name", "base", "created" (seconds since 1970), "bytes"}], newest first."""
        entries = []
        for name in self.names():
            folder = self.folder / name
            info = read_json(folder / "adapter.json") or {}
            try:
                size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                entries.append({"name": name, "base": info.get("base"), "created": folder.stat().st_mtime, "bytes": size})
            except FileNotFoundError:
                continue  # deleted while we look
        return sorted(entries, key=lambda e: -e["created"])

    def publish(self, source: Path, name: str) -> None:
        """Moves a finished folder here under its name; durable on return. Conflict if the name is taken."""
        target = self.folder / check_adapter_name(name)
        if target.exists():
            raise Conflict(f"An adapter named '{name}' exists already. Choose another name or delete that one.")
        try:
            os.utime(source)
            source.rename(target)
        except OSError as error:
            raise disk_error(error) from error
        fsync_folder(self.folder)
        fsync_folder(source.parent)

    def delete(self, name: str) -> None:
        """NotFound if there is no such adapter. It vanishes at once; its files follow."""
        if name not in self:
            raise NotFound(f"The adapter '{name}' is not here; nothing to delete.", adapter=name)
        doomed = self.folder / f".deleted-{name}-{time.monotonic_ns()}"
        (self.folder / name).rename(doomed)
        fsync_folder(self.folder)
        shutil.rmtree(doomed, ignore_errors=True)
