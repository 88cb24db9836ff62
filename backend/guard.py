"""GET requests over connections to checked addresses, within one total deadline: what `images.py` stands on.

A name is resolved once, every address it has is checked, and the connection goes to a checked address: an answer of
the name server that changes in between (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import certifi
import requests
from requests.utils import get_auth_from_url, select_proxy

from backend.transport import origin_of
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


def request(
    url: str,
    deadline: Deadline,
    *,
    trusted: bool,
    authorization: str | None = None,
    ca: str | None = None,
    resolver: Resolver = resolve,
) -> http.client.HTTPConnection:
    """Send one GET for an image; the caller reads the answer and closes. Redirects are the caller's business.

    url: quoted, ASCII. Proxies and, without `ca`, certificate authorities are the environment's, as in `requests`.
    Raises InvalidInput (address not allowed), Unavailable, TimeoutError, OSError, http.client.HTTPException.
    """
    parts, (scheme, host, port) = urlsplit(url), origin_of(url)
    if parts.username is not None or parts.password is not None:
        raise InvalidInput(f"An image's address may not hold a user name or password (host {host}).")
    environment = requests.Session().merge_environment_settings(url, {}, None, None, None)
    proxy = select_proxy(url, environment["proxies"])
    name = f"[{host}]" if ":" in host else host
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Host": name if port == (443 if scheme == "https" else 80) else f"{name}:{port}",
        "Accept": "image/*, */*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "User-Agent": "kptllm",
    }
    if proxy:
        raw, login = _through_proxy(proxy, f"{name}:{port}", scheme, deadline, trusted=trusted, resolver=resolver)
        target = f"http://{name}:{port}{target}" if scheme == "http" else target
        headers |= login
    else:
        raw = connect(host, port, deadline, trusted=trusted, resolver=resolver)
    connection = http.client.HTTPConnection(host, port)
    try:
        raw.settimeout(deadline.left())
        if scheme == "https":
            raw = _tls(ca or environment["verify"]).wrap_socket(raw, server_hostname=host)
        connection.sock = raw
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for header, value in headers.items():
            connection.putheader(header, value)
        if authorization:
            connection.putheader("Authorization", authorization)
        connection.endheaders()
    except BaseException:
        raw.close()
        raise
    return connection


def _through_proxy(
    proxy: str, target: str, scheme: str, deadline: Deadline, *, trusted: bool, resolver: Resolver
) -> tuple[socket.socket, dict[str, str]]:
    """A connection by way of the environment's proxy, and the headers that it wants. The proxy resolves names."""
    if not trusted:
        raise InvalidInput(
            f"Behind a proxy the address of {target} cannot be checked. If images come from there on purpose, add "
            f"{target} to IMAGE_HOSTS."
        )
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme != "http" or not urlsplit(proxy).hostname:
        raise Unavailable("Images go through http:// proxies only. Look at HTTP_PROXY, HTTPS_PROXY and NO_PROXY.")
    user, password = get_auth_from_url(proxy)
    login = {"Proxy-Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()} if user else {}
    _, host, port = origin_of(proxy)
    raw = connect(host, port, deadline, trusted=True, resolver=resolver)
    if scheme == "http":
        return raw, login
    try:
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", *(f"{key}: {value}" for key, value in login.items())]
        raw.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = http.client.HTTPResponse(raw, method="CONNECT")
        answer.begin()
        if answer.status != 200:
            raise Unavailable(f"The proxy {host}:{port} refused the way to {target} ({answer.status}).")
    except BaseException:
        raw.close()
        raise
    return raw, {}


@lru_cache(maxsize=8)
def _tls(verify: str | bool) -> ssl.SSLContext:
    """A TLS context for a CA file or folder; True for the usual authorities. Reading them takes a while: kept."""
    if isinstance(verify, str) and Path(verify).is_dir():
        return ssl.create_default_context(capath=verify)
    return ssl.create_default_context(cafile=verify if isinstance(verify, str) else certifi.where())
