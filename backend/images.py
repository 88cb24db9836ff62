"""Fetching the images that tasks name, safely. Whoever may import writes a task's data: nothing in it is trusted.

| value in the task | where it is fetched | token |
|---|---|---|
| `/data/upload/…`, `/data/local-files/?d=…`, `/storage-data/…` | Label Studio | yes |
| `s3://…`, `gs://…`, `azure-blob://…` | Label Studio's presign route, then the storage host it names | first hop only |
| `http(s)://` Label Studio's own address | Label Studio | for the routes above only |
| `http(s)://` a host in IMAGE_HOSTS | there | no |

Everything else is refused, file paths above all. Redirects are followed by hand, each hop checked like the first.
"""

from __future__ import annotations

import http.client
import io
import re
import ssl
import threading
import warnings
import zlib
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urljoin, urlsplit

from PIL import Image

from backend.guard import Deadline, Resolver, request, resolve
from backend.image_cache import ImageCache
from backend.label_studio import LabelStudio
from backend.settings import Settings
from backend.transport import climbs, origin_of
from kptllm_core.errors import ImageError, InvalidInput, KptError, NotFound, TooLarge, Unauthorized, Unavailable
from kptllm_core.imaging import FORMATS, image_size

MAX_ADDRESS = 8_000  # characters
MAX_HOPS = 4  # requests for one image, redirects included
CHANGEABLE_SECONDS = 600.0  # how long an image is kept that its owner may replace; uploads never change
_STORAGES = ("s3://", "gs://", "azure-blob://")
_SIGNED_ROUTES = re.compile(
    r"/(?:data/upload/|data/local-files/|storage-data/uploaded/|(?:tasks|projects)/\d+/(?:presign|resolve)/)"
)
_STORAGE_ROUTES = re.compile(r"/(?:tasks|projects)/\d+/(?:presign|resolve)/")
_DECODING = threading.Lock()  # one image at a time: the largest that are allowed take hundreds of megabytes each


@dataclass(frozen=True)
class _Place:
    """Where a value is fetched: the URL, the cache key, and whether what lies there can never change."""

    url: str
    key: str
    lasting: bool


class ImageFetcher:
    """Fetches images for tasks. `client` tells where Label Studio is and signs; `resolver` looks host names up."""

    def __init__(self, settings: Settings, client: LabelStudio, *, resolver: Resolver = resolve) -> None:
        self._client, self._resolver = client, resolver
        self._seconds, self._limit = settings.image_seconds, settings.image_max_bytes
        self._public_url = settings.label_studio_public_url
        self._hosts = [_allowed(entry) for entry in settings.image_hosts]
        self._cache = ImageCache(settings.data_dir / "images", settings.image_cache_bytes)

    def fetch(self, value: object, task_id: int | None = None) -> bytes:
        """The bytes of the image that a task's data names; their header has been checked.

        task_id is needed for storage addresses (s3:// …), which Label Studio resolves for a task. Raises a KptError:
        InvalidInput (an address that is not fetched), NotFound, Unauthorized, TooLarge, ImageError, Unavailable.
        """
        place = self._locate(value, task_id)
        cached = self._cache.get(place.key, None if place.lasting else CHANGEABLE_SECONDS)
        if cached is not None:
            return cached
        data, complete = self._download(place.url)
        try:
            image_size(data)
        except KptError as error:
            raise type(error)(f"{_shown(place.url)}: {error.message}", **error.details) from None
        if complete or _decodes(data):  # Label Studio itself sends uploads without their length
            self._cache.put(place.key, data)
        return data

    # ---- from a value to an address -----------------------------------------------------------------------------
    def _locate(self, value: object, task_id: int | None) -> _Place:
        if not isinstance(value, str):
            raise InvalidInput(f"The task holds {type(value).__name__} where an image's address was expected.")
        text, ours = value.strip(), self._client.url
        if len(text) > MAX_ADDRESS:
            raise InvalidInput(
                f"The image's address is {len(text):,} characters long; at most {MAX_ADDRESS:,} are read."
            )
        if not text or "\\" in text or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text):
            raise InvalidInput("The image's address is empty, or has a backslash or control characters in it.")
        if text.lower().startswith(_STORAGES):
            if task_id is None:
                raise InvalidInput(
                    f"{text.partition('?')[0]!r} is resolved by Label Studio for a task, but no task is known."
                )
            return self._place(ours + self._client.presign(task_id, text), f"{task_id} {text}")
        if text.startswith("/") and not text.startswith("//"):
            below = urlsplit(ours).path
            return self._place(ours + (text.removeprefix(below) if text.startswith(below + "/") else text))
        if self._public_url and text.startswith(self._public_url + "/"):
            return self._place(ours + text.removeprefix(self._public_url))
        if text.lower().startswith(("http://", "https://")):
            return self._place(text)
        raise InvalidInput(
            f"{text[:100]!r} is no address that images are fetched from. Expected a file uploaded to Label Studio "
            f"(/data/upload/…), one of its local files (/data/local-files/?d=…), s3://, gs://, azure-blob://, http:// "
            f"or https://. File paths are never read."
        )

    def _place(self, url: str, key: str = "") -> _Place:
        """Refuses paths that climb, once for all kinds."""
        try:
            url = _quoted(url)
            parts = urlsplit(url)
            origin_of(url)
        except (ValueError, InvalidInput):
            raise InvalidInput(f"{url[:100]!r} is no address that can be fetched from.") from None
        given = [value for name, value in parse_qsl(parts.query) if name in ("d", "filepath")]
        if climbs(parts.path) or any(climbs(value) for value in given):
            raise InvalidInput(f"{_shown(url)}: the address climbs out of its folder (`..`). It is not fetched.")
        lasting = self._client.owns(url) and self._route(url).startswith("/data/upload/")
        return _Place(url, f"{self._client.identity} {key or url}", lasting)

    def _route(self, url: str) -> str:
        """The path of a URL below Label Studio's own path."""
        return urlsplit(url).path.removeprefix(urlsplit(self._client.url).path)

    # ---- from an address to bytes -------------------------------------------------------------------------------
    def _download(self, url: str) -> tuple[bytes, bool]:
        """(the bytes, whether it is certain that they are all)."""
        with Deadline(self._seconds) as deadline:
            try:
                return self._follow(url, deadline)
            except (OSError, http.client.HTTPException, ValueError, zlib.error) as error:
                if deadline.expired or isinstance(error, TimeoutError):
                    raise Unavailable(
                        f"{_shown(url)} did not arrive within {self._seconds:g} seconds (IMAGE_SECONDS)."
                    ) from None
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise Unavailable(
                        f"{_shown(url)}: the certificate is not valid ({error.verify_message}). For Label Studio "
                        f"behind a private authority set LABEL_STUDIO_CA."
                    ) from None
                if isinstance(error, (http.client.IncompleteRead, zlib.error)):
                    raise ImageError(f"{_shown(url)} came incomplete or damaged. Trying again may help.") from None
                raise Unavailable(f"{_shown(url)} cannot be fetched: the connection broke or made no sense.") from None

    def _follow(self, url: str, deadline: Deadline) -> tuple[bytes, bool]:
        resolved_by_label_studio = renewed = False
        for _ in range(MAX_HOPS):
            own, named = self._client.owns(url), self._is_named(url)
            if not (own or named or resolved_by_label_studio):
                way_out = f"If images come from there on purpose, add {urlsplit(url).netloc} to IMAGE_HOSTS."
                if _SIGNED_ROUTES.search(urlsplit(url).path):
                    way_out = "If that is the same Label Studio, set LABEL_STUDIO_PUBLIC_URL to its address there."
                raise InvalidInput(
                    f"{_shown(url)} lies neither at Label Studio ({self._client.url}) nor on a host in IMAGE_HOSTS. "
                    f"{way_out}"
                )
            signed = own and _SIGNED_ROUTES.match(self._route(url)) is not None
            authorization = self._client.authorization() if signed else None
            connection = request(
                url,
                deadline,
                trusted=own or named,
                authorization=authorization,
                ca=self._client.ca if own else None,
                resolver=self._resolver,
            )
            try:
                answer = connection.getresponse()
                if answer.status == 200:
                    return self._read(url, answer, deadline)
                if answer.status == 401 and signed and self._client.renewable and not renewed:
                    self._client.authorization(renew=True)
                    renewed = True
                    continue
                if answer.status not in (301, 302, 303, 307, 308):
                    raise self._refused(url, answer.status, own)
                target = _quoted(urljoin(url, answer.getheader("Location") or ""))
            finally:
                connection.close()
            resolved_by_label_studio = signed and _STORAGE_ROUTES.match(self._route(url)) is not None
            self._check_hop(url, target)
            url = target
        raise Unavailable(f"{_shown(url)}: more than {MAX_HOPS - 1} redirects. It is not followed any further.")

    def _check_hop(self, url: str, target: str) -> None:
        if "/user/login" in urlsplit(target).path:
            raise self._refused(url, 401, self._client.owns(url))
        if urlsplit(target).scheme not in ("http", "https") or climbs(urlsplit(target).path):
            raise InvalidInput(f"{_shown(url)} redirects to something that is not fetched.")
        down = urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http"
        if down and not self._is_named(target):
            raise InvalidInput(
                f"{_shown(url)} redirects from https to http ({_shown(target)}). That is followed to hosts in "
                f"IMAGE_HOSTS only."
            )

    def _is_named(self, url: str) -> bool:
        """Whether the host is on the allow-list; an entry without a port means the ports 80 and 443."""
        _, host, port = origin_of(url)
        return any(
            (host == name or (name.startswith("*.") and host.endswith(name[1:])))
            and (port == at if at else port in (80, 443))
            for name, at in self._hosts
        )

    def _read(self, url: str, answer: http.client.HTTPResponse, deadline: Deadline) -> tuple[bytes, bool]:
        """The decoded body, below the cap on the way and unpacked; and whether its end was certain."""
        too_large = TooLarge(f"{_shown(url)} is larger than the {self._limit:,} bytes allowed (IMAGE_MAX_BYTES).")
        if answer.length is not None and answer.length > self._limit:
            raise too_large
        framed, coding = (
            answer.chunked or answer.length is not None,
            (answer.getheader("Content-Encoding") or "").lower(),
        )
        if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ImageError(
                f"{_shown(url)} is packed with {coding[:20]!r}, which was not asked for. Serve images unpacked."
            )
        unpack = zlib.decompressobj(wbits=47) if coding not in ("", "identity") else None  # 47: gzip or zlib
        raw, data = 0, bytearray()
        while piece := answer.read(65536):
            deadline.left()
            raw += len(piece)
            while piece:
                data += piece if unpack is None else unpack.decompress(piece, max(1, self._limit + 1 - len(data)))
                piece = b"" if unpack is None else unpack.unconsumed_tail
                if raw > self._limit or len(data) > self._limit:
                    raise too_large
        if deadline.expired:
            raise TimeoutError
        if answer.length or (unpack is not None and not unpack.eof):
            raise ImageError(f"{_shown(url)} came incomplete: the connection ended early. Trying again may help.")
        return bytes(data), framed or unpack is not None

    def _refused(self, url: str, status: int, own: bool) -> KptError:
        shown = _shown(url)
        if own and status == 403 and local_file(url):
            return Unauthorized(
                f"{shown}: Label Studio answers 403. It serves local files only if it was started with LOCAL_FILES_SERVING_ENABLED=true, and "
                f"to a token (LABEL_STUDIO_API_KEY) of a user who may see them."
            )
        if own and status in (401, 403):
            return Unauthorized(
                f"{shown}: Label Studio answers {status}. The token (LABEL_STUDIO_API_KEY) is missing, not valid, or of "
                f"a user who may not see it. `python -m backend connect` says which."
            )
        if status in (401, 403):
            return Unauthorized(f"{shown} answers {status}. Images are fetched from there without a login.")
        # For a file that it does not know Label Studio answers 500, and for one outside the document root, too.
        if status in (404, 410) or (own and status == 500 and _SIGNED_ROUTES.match(self._route(url))):
            stored = "is it in no Local Files storage of its project" if local_file(url) else "its storage disconnected"
            return NotFound(f"{shown} is not there ({status}). Was the file deleted, or {stored}?")
        if status == 429 or status >= 500:
            return Unavailable(f"{shown} answers {status}. Trying again later may help.")
        return ImageError(f"{shown} answers {status} instead of an image.")


def _allowed(entry: str) -> tuple[str, int | None]:
    """(host, port or None) of an entry of IMAGE_HOSTS, checked when the settings were read."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]+))?", entry)
    name, port = (found[1], found[2]) if found else (entry, None)
    return name.strip("[]").rstrip("."), int(port) if port else None


def _quoted(url: str) -> str:
    """A URL as it travels: ASCII, no fragment, the host name in its IDNA form. Raises ValueError."""
    parts = urlsplit(url)
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
    return parts._replace(
        netloc=netloc, path=path, query=quote(parts.query, safe="/%:@!$&'()*+,;=~?"), fragment=""
    ).geturl()


def _decodes(data: bytes) -> bool:
    """Whether every pixel is there. Of a JPEG all bytes are read, and an eighth of its rows and columns made, in grey."""
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its header has been checked
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.draft("L", (1, 1))
            image.load()
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - Pillow raises many kinds for damaged bytes
            return False
    return True


def local_file(url: str) -> str:
    """The path that the address of one of Label Studio's local files tells in its query; "" for other addresses."""
    parts = urlsplit(url)
    return dict(parse_qsl(parts.query)).get("d", "") if parts.path.endswith("/data/local-files/") else ""


def _shown(url: str) -> str:
    """A URL for messages and logs: without login and query, which may hold signatures; local files keep their name."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    name = local_file(url)
    text = f"{parts.scheme}://{host}{unquote(parts.path)}" + (f"?d={name}" if name else "")
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300])
