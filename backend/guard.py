"""Connections to checked addresses only, within one total deadline: the ground that `images.py` stands on.

A name is resolved once, every address it has is checked, and the connection goes to a checked address: an answer of
the name server that changes in between (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from kptllm_core.errors import InvalidInput, Unavailable

Resolver = Callable[[str, int], list[str]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Services that hand secrets to whoever asks from inside a cloud. Some of them look like public or private addresses.
_METADATA = {
    ipaddress.ip_address(text) for text in ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")
}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Deadline:
    """One time limit for everything done inside `with Deadline(seconds) as deadline:`.

    When it is over, the sockets it watches are shut down, so that a blocked read ends at once, even one that is fed a
    byte a second. `expired` then tells why it ended.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expired = False
        self._end = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for watched in self._sockets:
                watched.close()
            self._sockets.clear()

    def left(self) -> float:
        """Seconds that are left. Raises TimeoutError when there are none."""
        seconds = self._end - time.monotonic()
        if seconds <= 0 or self.expired:
            self.expired = True
            raise TimeoutError
        return seconds

    def watch(self, connection: socket.socket) -> None:
        """Shut this connection down when time is over. A duplicate is kept: it outlives the wrapping into TLS."""
        with self._lock:
            self._sockets.append(connection.dup())
        self.left()

    def _expire(self) -> None:
        self.expired = True
        with self._lock:
            for watched in self._sockets:
                with suppress(OSError):  # it may be closed at the other end already
                    watched.shutdown(socket.SHUT_RDWR)


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system's resolver gives them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(
    host: str, port: int, deadline: Deadline, *, trusted: bool = False, resolver: Resolver = resolve
) -> socket.socket:
    """A connection to a checked address of `host`.

    trusted: the host was named in the configuration, so that private and loopback addresses are fine.
    Raises InvalidInput for an address that is not allowed, Unavailable when nobody answers, TimeoutError.
    """
    addresses = _resolve_within(host, port, deadline, resolver)
    for address in addresses:
        why = forbidden(address, trusted=trusted, literal=address == host.strip("[]"))
        if why:
            raise InvalidInput(
                f"The host {host} has a {why} address, and such addresses are not fetched from. If images come from "
                f"there on purpose, add {host}:{port} to IMAGE_HOSTS."
            )
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), timeout=min(deadline.left(), 5.0))
        except TimeoutError:
            deadline.left()
            continue
        except OSError:
            continue
        connection.settimeout(deadline.left())
        deadline.watch(connection)
        return connection
    raise Unavailable(f"The host {host} does not answer on port {port}. Is it running and reachable from here?")


def forbidden(address: str, *, trusted: bool, literal: bool) -> str | None:
    """Why an address is not connected to, in a word or two; None when it may be.

    trusted hosts may have private and loopback addresses; link-local, metadata and other special ones only when the
    configuration names the very address (literal).
    """
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    inner = _embedded(ip)
    if inner is not None:
        return forbidden(str(inner), trusted=trusted, literal=literal)
    special = None
    if ip in _METADATA:
        special = "cloud metadata"
    elif ip.is_link_local:
        special = "link-local"
    elif ip.is_unspecified or ip.is_multicast or (ip.is_reserved and not ip.is_loopback):
        special = "reserved"
    if trusted:
        return None if literal else special
    if special is None and (not ip.is_global or (ip.version == 6 and ip.is_site_local)):
        special = "loopback" if ip.is_loopback else "private or reserved"
    return special


def _embedded(ip: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for, where it is a mapped or translated one."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def _resolve_within(host: str, port: int, deadline: Deadline, resolver: Resolver) -> list[str]:
    """The resolver's answer, or TimeoutError: the system's one knows no time limit, so it runs in a thread."""
    answer: list[list[str] | BaseException] = []

    def ask() -> None:
        try:
            answer.append(resolver(host, port))
        except Exception as error:  # noqa: BLE001 - told to the waiting thread
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(deadline.left())
    if not answer:
        deadline.left()
    if not answer or isinstance(answer[0], BaseException) or not answer[0]:
        raise Unavailable(
            f"The host name {host} is not known here. Check its spelling, and this machine's name server."
        )
    return answer[0]
