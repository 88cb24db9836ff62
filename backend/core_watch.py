"""Whether the core answers at this moment, for /health: asked at once, and not for long.

The keeper asks the core every few seconds and gives it time; what it saw last stands in the journal. A core that died since then
shows here: its connections are refused immediately. One that only is slow at this moment is not called dead; the keeper decides.
"""

from __future__ import annotations

import threading
import time

from backend.core_client import CoreClient
from kptllm_core.errors import KptError

GLANCE_SECONDS = 0.2  # what /health waits for it, once in KEPT_SECONDS
ASK_SECONDS = 1.0  # when the question itself is given up
KEPT_SECONDS = 1.0  # for so long an answer is good


class CoreWatch:
    """One per process; may be used from any thread. At most one question is on its way at a time."""

    def __init__(self, core: CoreClient) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._asking: threading.Thread | None = None
        self._waited = -KEPT_SECONDS  # monotonic time
        self._seen: tuple[float, str | None] = (-KEPT_SECONDS, None)  # monotonic time, and why it does not answer

    def glance(self) -> tuple[bool, str | None]:
        """(True, None): it answers. (True, why): it is down. (False, None): that cannot be said in so short a time."""
        with self._lock:
            if time.monotonic() - self._seen[0] < KEPT_SECONDS:
                return True, self._seen[1]
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(target=self._ask, name="core-watch", daemon=True)
                self._asking.start()
            asking, waited = self._asking, time.monotonic() - self._waited < KEPT_SECONDS
        if not waited:
            asking.join(GLANCE_SECONDS)
        with self._lock:
            fresh = time.monotonic() - self._seen[0] < KEPT_SECONDS
            if not fresh and not waited:
                self._waited = time.monotonic()
            return fresh, self._seen[1] if fresh else None

    def _ask(self) -> None:
        why: str | None = None
        try:
            self._core.health(ASK_SECONDS)
        except KptError as error:
            if error.details.get("in_time") is False:
                return
            why = error.message
        with self._lock:
            self._seen = time.monotonic(), why
