"""How a call to Label Studio is made: signed, repeated where that is safe, and refused in words.

- Legacy tokens travel as `Token …`; a personal access token is a refresh JWT that buys an access token for about five
  minutes, which travels as `Bearer …` and is renewed in time. Which of the two it is shows in the token's form.
- A token goes to Label Studio's own scheme, host, port and path only. Redirects away from there are not followed.
- Every call has time limits. Calls that may be repeated are, with growing pauses, after 429, 5xx or a lost connection.
- Proxies are those of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), as everywhere in `requests`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from kptllm_core.errors import InvalidInput, KptError, NotFound, TooLarge, Unauthorized, Unavailable

MAX_ANSWER = 256 * 2**20  # bytes; a page of 100 tasks with all their annotations stays far below
_AGAIN = (429, 500, 502, 503, 504)  # 500 too: Label Studio on SQLite answers so while its database is locked
_ACCOUNT = "Label Studio → Account & Settings → Personal Access Token"
_SWITCHES = "Label Studio → Organization → API Tokens Settings"
_PORTS = {"http": 80, "https": 443}

Json = dict[str, Any]


class Transport:
    """One Label Studio and one user's token. Safe to share between threads.

    url: base address, with a path where Label Studio lives below one. token: legacy or personal, "" for none.
    ca: PEM file of a private certificate authority. tries: attempts in all; pause: seconds before the second one,
    doubled each time. Every method raises a KptError: Unauthorized, NotFound, InvalidInput, TooLarge or Unavailable.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        ca: Path | str | None = None,
        *,
        tries: int = 4,
        pause: float = 0.3,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self.origin = origin_of(self.url)
        if "@" in urlsplit(self.url).netloc or "?" in self.url or "#" in self.url:
            raise InvalidInput("Label Studio's address may hold no user name, password, ? or #: http://host:8080/path.")
        self.ca = _readable_ca(ca) if ca else None
        self._token = _Token(token.strip())
        self._tries, self._pause, self._sleep = max(1, tries), pause, sleep
        self._timeout = (connect_timeout, timeout)
        self._session = requests.Session()
        # Label Studio sets a session cookie even on calls with a token; sent back, it would bring CSRF checks with it.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=4, pool_maxsize=16))

    def __repr__(self) -> str:
        return f"LabelStudio({self.url!r}, {self._token.kind} token)"

    def owns(self, url: str) -> bool:
        """Whether a URL has Label Studio's scheme, host and port and lies below its path: the token may go there."""
        try:
            parts, base = urlsplit(url), urlsplit(self.url)
            same = origin_of(url) == self.origin and parts.username is None and parts.password is None
        except (ValueError, InvalidInput):
            return False
        path = parts.path or "/"
        return same and (not base.path or path == base.path or path.startswith(base.path + "/")) and not climbs(path)

    def authorization(self, *, renew: bool = False) -> str | None:
        """The value of the Authorization header; None without a token. May ask Label Studio for a new access token."""
        return self._token.header(self._access, renew=renew)

    @property
    def renewable(self) -> bool:
        """Whether a refused Authorization header is worth renewing: only personal access tokens are."""
        return self._token.kind == "personal"

    @property
    def identity(self) -> str:
        """A hash that differs for every address and token: what one user may see is not for another."""
        return hashlib.sha256(f"{self.url}\n{self._token.fingerprint}".encode()).hexdigest()

    # ---- how a call is made -------------------------------------------------------------------------------------
    def _object(self, method: str, path: str, **more: Any) -> Json:
        return self._expect(dict, method, path, **more)

    def _list(self, method: str, path: str, **more: Any) -> list[Json]:
        return self._expect(list, method, path, **more)

    def _expect(self, kind: type, method: str, path: str, **more: Any) -> Any:
        answer = self._json(method, path, **more)
        if not isinstance(answer, kind):
            raise Unavailable(f"{self.url}{path} answered with a {type(answer).__name__}; expected a {kind.__name__}.")
        return answer

    def _json(self, method: str, path: str, **more: Any) -> Any:
        content, media = self._send(method, path, **more)
        if not content.strip():
            return {}
        try:
            return json.loads(content)
        except ValueError:
            raise Unavailable(
                f"{self.url}{path} answered with {media or 'something'} instead of JSON. Is {self.url} the address of "
                f"Label Studio, with the path below which it lives (https://host/path)?"
            ) from None

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Json | None = None,
        body: Any = None,
        files: Any = None,
        seconds: float | None = None,
        limit: int = MAX_ANSWER,
        signed: bool = True,
        repeat: bool | None = None,
        tries: int | None = None,
    ) -> tuple[bytes, str]:
        """One call, repeated where that is safe; (content, media type) of a good answer."""
        repeat = method in ("GET", "PATCH", "DELETE") if repeat is None else repeat
        url, renewed, attempt, hops = self.url + path, False, 1, 0
        while True:
            header = self.authorization() if signed else None
            again, wait = False, 0.0
            try:
                response = self._session.request(
                    method,
                    url,
                    params=params,
                    json=body,
                    files=files,
                    auth=_Signed(header),
                    verify=self.ca,
                    timeout=(self._timeout[0], seconds or self._timeout[1]),
                    allow_redirects=False,
                    stream=True,
                )
                with response:
                    content = _read(response, limit, (seconds or self._timeout[1]) * 2)
            except requests.RequestException as cause:
                error: KptError = self._unreachable(cause)
                # A connection that was never made carried nothing: that may be repeated whatever the call was.
                again = (repeat or _never_made(cause)) and not _hopeless(cause)
            else:
                status, media = response.status_code, response.headers.get("Content-Type", "").split(";")[0]
                if 200 <= status < 300:
                    return content, media
                if 300 <= status < 400:
                    url, params = self._redirected(method, url, response.headers.get("Location", ""), hops), None
                    hops += 1
                    continue
                if status == 401 and signed and self.renewable and not renewed:
                    self.authorization(renew=True)
                    renewed = True
                    continue
                if status == 404 and method == "DELETE" and attempt > 1:
                    return b"", ""  # the attempt whose answer was lost had done it
                error = self._refused(status, method, path, content)
                again = status in _AGAIN and (repeat or status == 429)
                wait = _retry_after(response.headers.get("Retry-After", ""))
            if not again or attempt >= (tries or self._tries):
                raise error
            self._sleep(max(wait, self._pause * 2 ** (attempt - 1) * random.uniform(0.7, 1.3)))
            attempt += 1

    def _access(self, refresh: str) -> str:
        """A new access token for a personal access token."""
        try:
            # Short, because whoever fetches an image waits for it within its own time limit.
            content, _ = self._send(
                "POST",
                "/api/token/refresh/",
                body={"refresh": refresh},
                signed=False,
                repeat=True,
                seconds=4.0,
                tries=2,
                limit=100_000,
            )
            access = json.loads(content)["access"]
        except Unauthorized:
            raise Unauthorized(
                f"Label Studio at {self.url} does not accept the personal access token: it is wrong, cut short, "
                f"revoked or too old. Create a new one at {_ACCOUNT} and copy it completely (it is shown once)."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise Unavailable(
                f"{self.url}/api/token/refresh/ did not answer as Label Studio does. Is it one?"
            ) from None
        return str(access)

    def _redirected(self, method: str, url: str, location: str, hops: int) -> str:
        """Where to go on, when that is Label Studio itself; otherwise an error that says what to set."""
        target = urljoin(url, location)
        parts = urlsplit(target)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if "/user/login" in parts.path:
            raise Unauthorized(
                f"Label Studio at {self.url} asks for a login at {shown}: the token was not accepted. {_HELP}"
            )
        if method == "GET" and hops < 3 and location and self.owns(target):
            return target
        raise Unavailable(
            f"{self.url} redirects to {shown}. The token is not sent there. If Label Studio lives there, set its "
            f"address (LABEL_STUDIO_URL, or --url) to that, without the part that is Label Studio's own."
        )

    def _unreachable(self, cause: requests.RequestException) -> KptError:
        text = str(cause)
        if no_tls(cause):
            return Unavailable(f"What answers at {self.url} speaks no https. Give its address with http://.")
        if isinstance(cause, requests.exceptions.SSLError):
            return Unavailable(
                f"The certificate of {self.url} was not accepted ({_reason(text)}). When a private authority signed "
                f"it, name its PEM file (LABEL_STUDIO_CA, or --ca)."
            )
        if isinstance(cause, requests.exceptions.ProxyError):
            return Unavailable(
                f"The proxy on the way to {self.url} failed. Look at HTTPS_PROXY, HTTP_PROXY and NO_PROXY."
            )
        if isinstance(cause, requests.Timeout):
            return Unavailable(f"Label Studio at {self.url} did not answer in time. It may be busy: try again later.")
        why = "its name is not known" if "NameResolution" in text or "resolve" in text else "no connection"
        return Unavailable(
            f"Label Studio at {self.url} cannot be reached ({why}: {_reason(text)}). Is it running, and is that its "
            f"address as seen from here?"
        )

    def _refused(self, status: int, method: str, path: str, content: bytes) -> KptError:
        said = self._token.hide(_says(content))
        facts: dict[str, Any] = {"label_studio_status": status, "label_studio_says": said}
        what = f"Label Studio at {self.url} answered {method} {path} with {status}" + (f": {said}" if said else "")
        if status == 401:
            return Unauthorized(self._token.advice(self.url, said), **facts)
        if status == 403:
            return Unauthorized(f"{what}. The token's user may not do that here. Use the token of a member.", **facts)
        if status == 404:
            return NotFound(f"{what}. It does not exist, or the token's user may not see it.", **facts)
        if status == 413:
            return TooLarge(f"{what}. Send less at once.", **facts)
        if status in _AGAIN or status >= 500:
            return Unavailable(f"{what}. Its log says more; trying again later may help.", **facts)
        return InvalidInput(f"{what}.", **facts)


_HELP = f"Use a personal access token: {_ACCOUNT}."


class _Token:
    """A token of either kind; knows how to become an Authorization header."""

    def __init__(self, token: str) -> None:
        if not token.isascii() or any(ord(letter) <= 32 for letter in token):
            raise InvalidInput(f"Label Studio's token may hold neither blanks nor letters beyond ASCII. {_HELP}")
        self._token, self._access, self._until = token, "", 0.0
        self._lock = threading.Lock()
        self.fingerprint = hashlib.sha256(token.encode()).hexdigest()
        is_jwt = token.startswith("ey") and "." in token
        self.kind = "no" if not token else "personal" if is_jwt else "legacy"

    def header(self, buy: Callable[[str], str], *, renew: bool) -> str | None:
        if self.kind == "no":
            return None
        if self.kind == "legacy":
            return f"Token {self._token}"
        with self._lock:
            if renew or not self._access or time.monotonic() >= self._until:
                self._access = buy(self._token)
                self._until = time.monotonic() + 0.8 * _lifetime(self._access)
            return f"Bearer {self._access}"

    def hide(self, text: str) -> str:
        for secret in (self._token, self._access):
            text = text.replace(secret, "…") if secret else text
        return text

    def advice(self, url: str, said: str) -> str:
        """What a 401 means for this kind of token."""
        if self.kind == "no":
            return (
                f"Label Studio at {url} wants a token, and none was given (LABEL_STUDIO_API_KEY, or --token). {_HELP}"
            )
        if self.kind == "personal":
            return (
                f"Label Studio at {url} does not accept personal access tokens, or not this one ({said}). Create a new "
                f"one ({_ACCOUNT}), or let an owner switch them on: {_SWITCHES} → Personal Access Tokens."
            )
        if "legacy" in said and "disabled" in said:
            return (
                f"Label Studio at {url} has legacy tokens switched off, and the given token is one. {_HELP} Or let an "
                f"owner switch legacy tokens on: {_SWITCHES} → Legacy Tokens."
            )
        return f"Label Studio at {url} does not know the given legacy token ({said}). Is it complete? {_HELP}"


class _Signed(AuthBase):
    """Sets our header, or none; being there, it keeps `requests` from taking a login out of ~/.netrc."""

    def __init__(self, header: str | None) -> None:
        self._header = header

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._header:
            request.headers["Authorization"] = self._header
        return request


def origin_of(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an http(s) URL, lower case, with the default port filled in. Raises InvalidInput."""
    try:
        parts: SplitResult = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        scheme, host, port = "", "", None
    if scheme not in _PORTS or not host:
        raise InvalidInput("Not an address: expected http:// or https:// and a host name.")
    return scheme, host, port or _PORTS[scheme]


def _readable_ca(ca: Path | str) -> str:
    """The path of a PEM file, once it has been read: a bad one is told at the start, not at the first call."""
    try:
        ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"The certificate authority in {ca} cannot be read ({error.strerror or 'not PEM'}). Expected a PEM file "
            f"with at least one certificate (LABEL_STUDIO_CA, or --ca)."
        ) from None
    return str(ca)


def climbs(path: str) -> bool:
    """Whether a URL's path has a `..` or `.` in it, in whatever encoding, or a backslash."""
    for _ in range(4):
        if "\\" in path or any(part in (".", "..") for part in path.split("/")):
            return True
        decoded = unquote(path)
        if decoded == path:
            return False
        path = decoded
    return True  # encoded four times over: nobody means well with that


def _read(response: requests.Response, limit: int, seconds: float) -> bytes:
    """The body, at most `limit` bytes (decoded) and not much longer than `seconds`."""
    until, content = time.monotonic() + seconds, bytearray()
    while True:
        try:
            # read1 comes back after each packet: a server that trickles cannot hold us beyond the limit.
            piece = response.raw.read1(65536, decode_content=True)
        except urllib3.exceptions.ReadTimeoutError as cause:
            raise requests.ReadTimeout(str(cause)) from None
        except (urllib3.exceptions.HTTPError, OSError) as cause:
            raise requests.ConnectionError(str(cause)) from None
        if not piece:
            return bytes(content)
        content += piece
        if len(content) > limit:
            path = urlsplit(response.url).path
            raise TooLarge(f"The answer of {path} is larger than the {limit:,} bytes allowed.")
        if time.monotonic() > until:
            raise requests.ReadTimeout("the answer took too long")


def _says(content: bytes) -> str:
    """What Label Studio says in the body of an error, in one line without HTML."""
    try:
        answer = json.loads(content)
    except ValueError:
        return ""
    parts: list[str] = []
    if isinstance(answer, dict):
        detail, fields = answer.get("detail"), answer.get("validation_errors")
        if isinstance(fields, dict):
            for name, texts in fields.items():
                said = "; ".join(str(text) for text in texts) if isinstance(texts, list) else str(texts)
                parts.append(said if name == "non_field_errors" else f"{name}: {said}")
        elif detail:
            parts.append(str(detail))
    return " ".join(re.sub(r"<[^>]*>", "", " · ".join(parts)).split())[:600].rstrip(".")


def _reason(text: str) -> str:
    """The short part of an urllib3 message: behind the last `Errno`, or the quoted cause."""
    found = re.findall(r"(?:\[Errno -?\d+\] |certificate verify failed: |: )([A-Za-z][^:()'\"\[\]]{4,80})", text)
    return found[-1].strip() if found else "no further reason given"


def no_tls(cause: requests.RequestException) -> bool:
    """Whether https was asked of a server that speaks plain http."""
    return any(words in str(cause) for words in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"))


def _never_made(cause: requests.RequestException) -> bool:
    """Whether the connection failed before anything was sent."""
    return isinstance(cause, requests.ConnectTimeout) or "NewConnectionError" in str(cause)


def _hopeless(cause: requests.RequestException) -> bool:
    """A certificate does not become valid by trying again."""
    return isinstance(cause, (requests.exceptions.SSLError, requests.exceptions.InvalidURL))


def _retry_after(value: str) -> float:
    return min(float(value), 10.0) if value.isascii() and value.isdigit() else 0.0


def _lifetime(jwt: str) -> float:
    """Seconds that an access token is good for, from its own two stamps; the clocks need not agree."""
    try:
        payload = jwt.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return min(max(float(claims["exp"]) - float(claims["iat"]), 1.0), 86_400.0)
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return 60.0
