"""Fetched images on disk: named by a hash, written atomically, checked when read, the least recently used go first."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)
_DIGEST = 32  # bytes of SHA-256 in front of the content


class ImageCache:
    """At most `limit` bytes below `folder`; several processes may share it. A limit of 0 keeps nothing.

    It stands in nobody's way: when the disk is full or unreadable, it says so in the log and holds nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._unseen = limit  # bytes written since the folder was last measured; so the first write measures it
        self._lock = threading.Lock()

    def get(self, key: str, max_age: float | None = None) -> bytes | None:
        """What was put under `key`, at most `max_age` seconds ago."""
        path = self._path(key)
        try:
            data, fetched = path.read_bytes(), path.stat().st_mtime
        except OSError:
            return None
        fresh = max_age is None or 0 <= time.time() - fetched <= max_age
        content = data[_DIGEST:]
        if not fresh or hashlib.sha256(content).digest() != data[:_DIGEST]:
            with contextlib.suppress(OSError):  # another process was faster
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path, (time.time(), fetched))  # access time: last used; modification time: fetched
        return content

    def put(self, key: str, content: bytes) -> None:
        if len(content) + _DIGEST > self._limit:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(content).digest())
                    file.write(content)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink()
                raise
            self._make_room(len(content) + _DIGEST)
        except OSError as error:
            log.warning("The image cache in %s cannot be written (%s); going on without.", self._folder, error.strerror)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self._folder / name[:2] / name

    def _make_room(self, added: int) -> None:
        """Measure the folder once in a while and delete what was not used for longest."""
        with self._lock:
            self._unseen += added
            if self._unseen < self._limit // 20:
                return
            self._unseen = 0
            found = []
            for path in self._folder.glob("*/*"):
                with contextlib.suppress(OSError):
                    facts = path.stat()
                    found.append((facts.st_atime, facts.st_size, path))
            used = sum(size for _, size, _ in found)
            if used <= self._limit:
                return
            for _, size, path in sorted(found, key=lambda entry: entry[0]):
                if used <= 0.9 * self._limit:
                    return
                with contextlib.suppress(OSError):
                    path.unlink()
                    used -= size
