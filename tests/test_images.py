"""Fetching images: every kind of address, and everything a hostile server or task can do. Real servers, loopback only."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend import images as images_module
from backend.guard import forbidden
from backend.image_cache import ImageCache
from backend.images import ImageFetcher
from backend.label_studio import LabelStudio
from backend.settings import Settings
from kptllm_core.errors import ImageError, InvalidInput, KptError, NotFound, TooLarge, Unauthorized, Unavailable
from small_server import Answer, Request, SmallServer, certificate_for, no_proxies  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_proxies")
CANARY = "canarytoken0123456789"
UPLOAD = "/data/upload/1/a.jpg"


def picture(size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(buffer, kind)
    return buffer.getvalue()


PICTURE = picture()


@pytest.fixture
def studio() -> Iterator[SmallServer]:
    """Stands where Label Studio stands: 127.0.0.1, and serves one upload."""
    with SmallServer() as server:
        server.routes[UPLOAD] = Answer(body=PICTURE)
        yield server


@pytest.fixture
def foreign() -> Iterator[SmallServer]:
    """A host that nobody named."""
    with SmallServer("127.0.0.2") as server:
        server.routes["*"] = Answer(body=PICTURE)
        yield server


@pytest.fixture
def fetcher(studio: SmallServer, tmp_path: Path) -> Callable[..., ImageFetcher]:
    def make(**changes: Any) -> ImageFetcher:
        resolver = {"resolver": changes.pop("resolver")} if "resolver" in changes else {}
        usual: dict[str, Any] = {"data_dir": tmp_path, "label_studio_url": studio.url, "image_seconds": 1.0}
        settings = Settings(**(usual | changes))
        client = LabelStudio(settings.label_studio_url, CANARY, settings.label_studio_ca, pause=0.01)
        return ImageFetcher(settings, client, **resolver)

    return make


def answering(text: bytes, pause: float = 0.0, then: bytes = b"") -> Answer:
    def write(out: Any) -> None:
        out.write(text)
        while then:
            out.write(then)
            time.sleep(pause)

    return Answer(raw=write)


# ---- the kinds of addresses -----------------------------------------------------------------------------------------
def test_an_upload_is_fetched_with_the_token_and_kept(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer
) -> None:
    images = fetcher()
    assert images.fetch(UPLOAD) == PICTURE
    assert images.fetch(studio.url + UPLOAD) == PICTURE
    assert fetcher().fetch(UPLOAD) == PICTURE  # another process finds it on disk
    assert len(studio.requests) == 1
    assert studio.requests[0].headers["Authorization"] == f"Token {CANARY}"


def test_names_with_blanks_and_umlauts(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    studio.routes["/data/upload/1/f%20%C3%BC.jpg"] = Answer(body=PICTURE)
    assert fetcher().fetch("/data/upload/1/f ü.jpg") == PICTURE
    assert fetcher(image_cache_bytes=0).fetch("/data/upload/1/f%20%C3%BC.jpg") == PICTURE


def test_local_files_are_fetched_but_not_kept_for_ever(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer
) -> None:
    studio.routes["/data/local-files/"] = lambda request: Answer(
        body=PICTURE if request.query == {"d": ["sub/a b.jpg"]} else b""
    )
    images = fetcher()
    assert images.fetch("/data/local-files/?d=sub/a b.jpg") == PICTURE
    assert images.fetch("/data/local-files/?d=sub/a b.jpg") == PICTURE
    assert len(studio.requests) == 1
    for path in images._cache._folder.glob("*/*"):
        os.utime(path, (time.time(), time.time() - 700))
    images.fetch("/data/local-files/?d=sub/a b.jpg")
    assert len(studio.requests) == 2


def test_label_studio_below_a_path(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    studio.routes["/ls" + UPLOAD] = Answer(body=PICTURE)
    images = fetcher(label_studio_url=studio.url + "/ls")
    assert images.fetch(UPLOAD) == images.fetch("/ls" + UPLOAD) == PICTURE
    with pytest.raises(InvalidInput, match="neither at Label Studio"):  # beside the path is not Label Studio
        images.fetch(studio.url + UPLOAD)
    assert studio.paths() == ["/ls" + UPLOAD]


def test_label_studios_other_address(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    with pytest.raises(InvalidInput, match="LABEL_STUDIO_PUBLIC_URL"):
        fetcher().fetch("https://labels.example.org" + UPLOAD)
    images = fetcher(label_studio_public_url="https://labels.example.org")
    assert images.fetch("https://labels.example.org" + UPLOAD) == PICTURE


@pytest.mark.parametrize("scheme", ["s3", "gs", "azure-blob"])
def test_storages_go_through_label_studio(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer, scheme: str
) -> None:
    target = f"{foreign.url}/k.jpg?X-Signature=secret"
    studio.routes["/tasks/7/presign/"] = Answer(303, headers={"Location": target})
    images = fetcher(image_hosts=(foreign.host,))
    assert images.fetch(f"{scheme}://bucket/k.jpg", 7) == PICTURE
    assert studio.requests[0].headers["Authorization"] == f"Token {CANARY}"
    assert "Authorization" not in foreign.requests[0].headers
    with pytest.raises(InvalidInput, match="no task is known"):
        images.fetch(f"{scheme}://bucket/k.jpg")
    with pytest.raises(NotFound):  # another task has to be allowed to see it by itself
        images.fetch(f"{scheme}://bucket/k.jpg", 8)


def test_a_presigned_host_needs_no_list_but_a_public_address(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer
) -> None:
    studio.routes["/tasks/7/presign/"] = Answer(303, headers={"Location": f"{foreign.url}/k.jpg?sig=secret"})
    with pytest.raises(InvalidInput, match=r"loopback address.*IMAGE_HOSTS") as caught:
        fetcher().fetch("s3://bucket/k.jpg", 7)
    assert "secret" not in caught.value.message and not foreign.requests


def test_the_presigned_host_may_not_redirect_on(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer
) -> None:
    studio.routes["/tasks/7/presign/"] = Answer(303, headers={"Location": f"http://127.0.0.1:{studio.port}/hop"})
    studio.routes["/hop"] = Answer(302, headers={"Location": foreign.url + "/k.jpg"})
    with pytest.raises(InvalidInput, match="neither at Label Studio"):
        fetcher().fetch("s3://bucket/k.jpg", 7)
    assert not foreign.requests


def test_hosts_of_the_list(fetcher: Callable[..., ImageFetcher], foreign: SmallServer) -> None:
    assert fetcher(image_hosts=(foreign.host,)).fetch(foreign.url + "/a.jpg") == PICTURE
    assert "Authorization" not in foreign.requests[0].headers
    for hosts in ((), ("127.0.0.2",), ("127.0.0.2:1",), ("*.0.0.2:1",), ("example.org",)):
        with pytest.raises(InvalidInput, match=f"add {foreign.host} to IMAGE_HOSTS"):
            fetcher(image_hosts=hosts).fetch(foreign.url + "/b.jpg")
    assert len(foreign.requests) == 1


def test_wildcards_name_subdomains_only(fetcher: Callable[..., ImageFetcher], foreign: SmallServer) -> None:
    images = fetcher(image_hosts=(f"*.example.org:{foreign.port}",), resolver=lambda host, port: ["127.0.0.2"])
    assert images.fetch(f"http://a.example.org:{foreign.port}/x.jpg") == PICTURE
    for host in ("example.org", "badexample.org", "a.example.org.evil.net"):
        with pytest.raises(InvalidInput):
            images.fetch(f"http://{host}:{foreign.port}/x.jpg")


# ---- what a task may not say ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd\x00.jpg",
        "etc/passwd",
        "C:\\images\\a.jpg",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.jpg",
        "gopher://127.0.0.1/a",
        "//127.0.0.2/a.jpg",
        "/data/upload/../../api/users",
        "/data/upload/%2e%2e/%2e%2e/api/users",
        "/data/upload/%252e%252e/a.jpg",
        "/data/upload/1/..%2fa.jpg",
        "/data/local-files/?d=../secret.jpg",
        "/data/local-files/?d=%2e%2e/secret.jpg",
        "/data/local-files/?d=a/%252e%252e/secret.jpg",
        "/data/upload/1/" + "ü" * 9_000,
        "/data/upload/1/a.jpg\r\nHost: x",
        "/data/upload/1/\ud800.jpg",
        "http://user:pw@127.0.0.1/a.jpg",
        "http://[::1/a.jpg",
        "http://127.0.0.1:99999/a.jpg",
        "http:///a.jpg",
        "",
        "   ",
        None,
        7,
        ["/data/upload/1/a.jpg"],
        {"url": "x"},
    ],
)
def test_refused_without_a_request(fetcher: Callable[..., ImageFetcher], studio: SmallServer, value: object) -> None:
    studio.routes["*"] = Answer(404)
    with pytest.raises((InvalidInput, NotFound)) as caught:
        fetcher().fetch(value)
    assert all(request.path == "//127.0.0.2/a.jpg" for request in studio.requests)  # a path like any other
    assert "Authorization" not in {name for request in studio.requests for name in request.headers}
    assert len(caught.value.message) < 600 and CANARY not in caught.value.message


@pytest.mark.parametrize(
    "host", ["127.0.0.2", "127.1", "2130706434", "0x7f000002", "[::ffff:127.0.0.2]", "localhost", "169.254.169.254"]
)
def test_private_addresses_in_all_spellings(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer, host: str
) -> None:
    """Even when Label Studio itself hands the address out."""
    studio.routes["/tasks/1/presign/"] = Answer(302, headers={"Location": f"http://{host}:{foreign.port}/a.jpg"})
    with pytest.raises((InvalidInput, Unavailable)):
        fetcher().fetch("s3://b/a.jpg", 1)
    assert not foreign.requests


@pytest.mark.parametrize(
    ("address", "public", "named", "literal"),
    [
        ("93.184.216.34", True, True, True),
        ("2606:2800:220:1:248:1893:25c8:1946", True, True, True),
        ("127.0.0.1", False, True, True),
        ("10.1.2.3", False, True, True),
        ("192.168.0.1", False, True, True),
        ("172.16.0.1", False, True, True),
        ("100.64.0.1", False, True, True),
        ("::1", False, True, True),
        ("fd12::1", False, True, True),
        ("fe80::1%eth0", False, False, True),
        ("::ffff:10.0.0.1", False, True, True),
        ("::ffff:169.254.169.254", False, False, True),
        ("2002:7f00:1::", False, True, True),
        ("64:ff9b::7f00:1", False, True, True),
        ("169.254.169.254", False, False, True),
        ("168.63.129.16", False, False, True),
        ("100.100.100.200", False, False, True),
        ("fd00:ec2::254", False, False, True),
        ("0.0.0.0", False, False, True),
        ("255.255.255.255", False, False, True),
        ("224.0.0.1", False, False, True),
        ("ff02::1", False, False, True),
        ("240.0.0.1", False, False, True),
        ("192.0.2.1", False, True, True),
    ],
)
def test_which_addresses_are_forbidden(address: str, public: bool, named: bool, literal: bool) -> None:
    assert (forbidden(address, trusted=False, literal=True) is None) == public
    assert (forbidden(address, trusted=True, literal=False) is None) == named
    assert (forbidden(address, trusted=True, literal=True) is None) == literal


def test_dns_rebinding_changes_nothing(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer
) -> None:
    """A name that is public when asked first and loopback when asked again: it is asked once per connection."""
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        if host != "storage.example.org":
            return [host]
        asked.append(host)
        return ["192.0.2.1" if len(asked) == 1 else "127.0.0.2"]

    target = f"http://storage.example.org:{foreign.port}/a.jpg"
    studio.routes["/tasks/1/presign/"] = Answer(303, headers={"Location": target})
    images = fetcher(resolver=rebinding)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="address"):
            images.fetch("s3://b/a.jpg", 1)
    assert len(asked) == 2 and not foreign.requests


def test_one_bad_address_among_good_ones_is_enough(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer
) -> None:
    studio.routes["/tasks/1/presign/"] = Answer(303, headers={"Location": f"http://s.example.org:{foreign.port}/a"})
    both = {"s.example.org": ["93.184.216.34", "127.0.0.2"]}
    with pytest.raises(InvalidInput, match="loopback"):
        fetcher(resolver=lambda host, port: both.get(host, [host])).fetch("s3://b/a.jpg", 1)
    assert not foreign.requests


def test_the_checked_address_is_the_one_connected_to(
    fetcher: Callable[..., ImageFetcher], foreign: SmallServer
) -> None:
    """The name need not exist for anybody but the injected resolver: nothing else resolves it."""
    images = fetcher(image_hosts=(f"images.invalid:{foreign.port}",), resolver=lambda host, port: ["127.0.0.2"])
    assert images.fetch(f"http://images.invalid:{foreign.port}/a.jpg") == PICTURE
    assert foreign.requests[0].headers["Host"] == f"images.invalid:{foreign.port}"


def test_a_slow_name_server_does_not_hold_us(fetcher: Callable[..., ImageFetcher]) -> None:
    def slow(host: str, port: int) -> list[str]:
        time.sleep(5)
        return [host]

    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"within 0\.3 seconds"):
        fetcher(resolver=slow, image_seconds=0.3).fetch(UPLOAD)
    assert time.monotonic() - start < 3.0


# ---- redirects and the token ----------------------------------------------------------------------------------------
def test_a_redirect_to_a_foreign_host_is_not_followed(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer
) -> None:
    for status in (301, 302, 303, 307, 308):
        studio.routes[UPLOAD] = Answer(status, headers={"Location": foreign.url + "/a.jpg"})
        with pytest.raises(InvalidInput, match="neither at Label Studio"):
            fetcher().fetch(UPLOAD)
    assert not foreign.requests


def test_the_token_stays_at_home_when_a_redirect_is_followed(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, foreign: SmallServer
) -> None:
    studio.routes[UPLOAD] = Answer(302, headers={"Location": foreign.url + "/a.jpg"})
    assert fetcher(image_hosts=(foreign.host,)).fetch(UPLOAD) == PICTURE
    assert "Authorization" not in foreign.requests[0].headers and CANARY not in str(foreign.requests)


def test_no_token_for_other_paths_of_label_studio(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    studio.routes["/static/a.jpg"] = studio.routes["/api/users"] = Answer(body=PICTURE)
    assert fetcher().fetch("/static/a.jpg") == fetcher().fetch("/api/users") == PICTURE
    assert all("Authorization" not in request.headers for request in studio.requests)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/", "data:image/png;base64,AAAA", "/a/../b", "", "http://[bad"]
)
def test_redirects_to_nonsense(fetcher: Callable[..., ImageFetcher], studio: SmallServer, location: str) -> None:
    studio.routes[UPLOAD] = Answer(302, headers={"Location": location})
    with pytest.raises(KptError):
        fetcher().fetch(UPLOAD)
    assert len(studio.requests) <= 4


def test_redirects_in_a_circle_end(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    studio.routes[UPLOAD] = Answer(302, headers={"Location": UPLOAD})
    with pytest.raises(Unavailable, match="redirects"):
        fetcher().fetch(UPLOAD)
    assert len(studio.requests) == 4


def test_a_login_page_is_a_missing_token(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    studio.routes[UPLOAD] = Answer(302, headers={"Location": "/user/login/?next=/data"})
    with pytest.raises(Unauthorized, match="LABEL_STUDIO_API_KEY"):
        fetcher().fetch(UPLOAD)


def test_a_private_authority_and_no_step_down_to_http(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, tmp_path: Path
) -> None:
    pem = certificate_for("127.0.0.1", tmp_path)
    with SmallServer(certificate=pem) as secure:
        secure.routes[UPLOAD] = Answer(body=PICTURE)
        secure.routes["/data/upload/1/down.jpg"] = Answer(302, headers={"Location": studio.url + UPLOAD})
        with pytest.raises(Unavailable, match="LABEL_STUDIO_CA"):
            fetcher(label_studio_url=secure.url).fetch(UPLOAD)
        images = fetcher(label_studio_url=secure.url, label_studio_ca=pem)
        assert images.fetch(UPLOAD) == PICTURE
        with pytest.raises(InvalidInput, match="https to http"):
            images.fetch("/data/upload/1/down.jpg")
        assert not studio.requests


def test_a_personal_token_is_renewed(studio: SmallServer, tmp_path: Path) -> None:
    given: list[str] = []

    def refresh(request: Request) -> Answer:
        given.append(f"access{len(given)}")
        return Answer(body=b'{"access": "%s"}' % given[-1].encode())

    studio.routes["/api/token/refresh/"] = refresh
    studio.routes[UPLOAD] = lambda request: (
        Answer(body=PICTURE) if request.headers["Authorization"] == "Bearer access1" else Answer(401)
    )
    settings = Settings(data_dir=tmp_path, label_studio_url=studio.url)
    assert ImageFetcher(settings, LabelStudio(studio.url, "eyJh.b.c")).fetch(UPLOAD) == PICTURE
    assert given == ["access0", "access1"]


# ---- servers that misbehave -----------------------------------------------------------------------------------------
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        answering(HEAD + b"Content-Length: 100000\r\n\r\n", 0.1, b"x"),
        answering(HEAD + b"\r\n", 0.1, b"x"),
        answering(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", 0.1, b"1\r\nx\r\n"),
        answering(b"HTTP/1.1 200 OK\r\nX-Slow: ", 0.1, b"a"),
        answering(b"", 0.1, b"H"),
        answering(b"", 0.05, b"HTTP/1.1 100 Continue\r\n\r\n"),
        answering(HEAD + b"Content-Length: 9\r\n\r\n", 3.0, b"\xff"),
    ],
    ids=["body", "unframed", "chunks", "header", "status", "continue", "stalled"],
)
def test_a_trickling_server_has_one_time_limit(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, answer: Answer
) -> None:
    studio.routes[UPLOAD] = answer
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"within 0.5 seconds \(IMAGE_SECONDS\)"):
        fetcher(image_seconds=0.5).fetch(UPLOAD)
    assert time.monotonic() - start < 3.0
    studio.routes[UPLOAD] = Answer(body=PICTURE)
    assert fetcher().fetch(UPLOAD) == PICTURE  # nothing of it was kept


def test_many_slow_hops_share_the_time_limit(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    def slow(request: Request) -> Answer:
        time.sleep(0.3)
        return Answer(302, headers={"Location": UPLOAD})

    studio.routes[UPLOAD] = slow
    with pytest.raises(Unavailable, match=r"within 0\.5 seconds"):
        fetcher(image_seconds=0.5).fetch(UPLOAD)


def test_endless_and_large_bodies(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    limit = {"image_max_bytes": 100_000, "image_seconds": 5.0}
    studio.routes[UPLOAD] = answering(HEAD + b"\r\n", 0.0, PICTURE * 50)
    with pytest.raises(TooLarge, match="100,000"):
        fetcher(**limit).fetch(UPLOAD)
    studio.routes[UPLOAD] = answering(HEAD + b"Content-Length: 50000000000\r\n\r\n", 0.1, b"x")
    start = time.monotonic()
    with pytest.raises(TooLarge):
        fetcher(**limit).fetch(UPLOAD)
    assert time.monotonic() - start < 3.0  # on the header, before the body


def test_a_gzip_bomb(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    bomb = gzip.compress(bytes(30_000_000))
    assert len(bomb) < 50_000
    studio.routes[UPLOAD] = Answer(body=bomb, headers={"Content-Encoding": "gzip"})
    with pytest.raises(TooLarge):
        fetcher(image_max_bytes=100_000).fetch(UPLOAD)


def test_an_image_packed_by_its_storage(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    studio.routes[UPLOAD] = Answer(body=gzip.compress(PICTURE), headers={"Content-Encoding": "gzip"})
    assert fetcher(image_cache_bytes=0).fetch(UPLOAD) == PICTURE
    studio.routes[UPLOAD] = Answer(body=gzip.compress(PICTURE)[:-9], headers={"Content-Encoding": "gzip"})
    with pytest.raises(ImageError, match="incomplete"):
        fetcher().fetch(UPLOAD)
    for coding, body in (("gzip", PICTURE), ("br", PICTURE)):
        studio.routes[UPLOAD] = Answer(body=body, headers={"Content-Encoding": coding})
        with pytest.raises(ImageError):
            fetcher().fetch(UPLOAD)


@pytest.mark.parametrize(
    "head", [b"Content-Length: 5000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1000\r\n"], ids=["length", "chunked"]
)
def test_a_short_body_is_an_error_and_not_kept(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, head: bytes
) -> None:
    studio.routes[UPLOAD] = answering(HEAD + head + PICTURE)
    images = fetcher()
    with pytest.raises(ImageError, match="incomplete"):
        images.fetch(UPLOAD)
    studio.routes[UPLOAD] = Answer(body=PICTURE)
    assert images.fetch(UPLOAD) == PICTURE


@pytest.mark.parametrize(("body", "requests"), [(PICTURE, 1), (PICTURE[:-20], 2)], ids=["whole", "cut"])
def test_a_body_without_a_known_end_is_kept_if_every_pixel_is_there(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, body: bytes, requests: int
) -> None:
    studio.routes[UPLOAD] = answering(HEAD + b"Connection: close\r\n\r\n" + body)
    images = fetcher()
    assert images.fetch(UPLOAD) == images.fetch(UPLOAD) == body
    assert len(studio.requests) == requests


COST = """
import resource, sys
from backend.images import _decodes
jpeg = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert _decodes(jpeg) and not _decodes(jpeg[:-2000])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_whether_a_large_image_is_whole_costs_little(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(picture((6000, 5000)))  # 90 MB as RGB
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", COST, tmp_path / "large.jpg"], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # kB; 400,000 with all its pixels as RGB


def test_one_image_at_a_time_is_looked_at(tmp_path: Path) -> None:
    with images_module._DECODING:
        other = threading.Thread(target=images_module._decodes, args=(PICTURE,))
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join(5.0)
    assert not other.is_alive()


@pytest.mark.parametrize("body", [b"", b"<html>login</html>", b"\x89PNG\r\n\x1a\n", b'{"detail": "no"}'])
def test_what_is_no_image_is_refused_and_not_kept(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, body: bytes
) -> None:
    studio.routes[UPLOAD] = Answer(body=body)
    images = fetcher()
    for _ in range(2):
        with pytest.raises(ImageError, match=r"data/upload/1/a\.jpg"):
            images.fetch(UPLOAD)
    assert len(studio.requests) == 2


def test_a_pixel_bomb_is_refused_on_its_header(fetcher: Callable[..., ImageFetcher], studio: SmallServer) -> None:
    buffer = io.BytesIO()
    Image.new("1", (16_000, 12_000)).save(buffer, "PNG")
    studio.routes[UPLOAD] = Answer(body=buffer.getvalue())
    with pytest.raises(TooLarge):
        fetcher().fetch(UPLOAD)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (404, NotFound, "is not there"),
        (500, NotFound, "is not there"),  # what Label Studio answers for an upload that it does not know
        (401, Unauthorized, "LABEL_STUDIO_API_KEY"),
        (403, Unauthorized, "LABEL_STUDIO_API_KEY"),
        (429, Unavailable, "later"),
        (503, Unavailable, "later"),
        (204, ImageError, "instead of an image"),
        (206, ImageError, "instead of an image"),
        (418, ImageError, "instead of an image"),
    ],
)
def test_statuses(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer, status: int, kind: type[KptError], words: str
) -> None:
    studio.routes[UPLOAD] = Answer(status, headers={"X-Echo": CANARY})
    with pytest.raises(kind, match=words) as caught:
        fetcher().fetch(UPLOAD)
    assert CANARY not in str(caught.value.to_json())


@pytest.mark.parametrize(("status", "words"), [(403, "LOCAL_FILES_SERVING_ENABLED"), (404, "no Local Files storage")])
def test_local_files_that_are_not_served(fetcher: Callable[..., ImageFetcher], studio: SmallServer, status: int, words: str) -> None:
    studio.routes["/data/local-files/"] = Answer(status)
    with pytest.raises(KptError, match=words):
        fetcher().fetch("/data/local-files/?d=flies/1.png")


@pytest.mark.parametrize(
    "text", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 999999 what\r\n\r\n", HEAD + b"A: " + b"b" * 70_000]
)
def test_answers_that_are_no_http(fetcher: Callable[..., ImageFetcher], studio: SmallServer, text: bytes) -> None:
    studio.routes[UPLOAD] = answering(text)
    with pytest.raises((Unavailable, ImageError)):
        fetcher().fetch(UPLOAD)


def test_nobody_there(fetcher: Callable[..., ImageFetcher]) -> None:
    with pytest.raises(Unavailable, match="does not answer on port 1"):
        fetcher(label_studio_url="http://127.0.0.1:1").fetch(UPLOAD)
    with pytest.raises(Unavailable, match="not known"):
        fetcher(label_studio_url="http://no-such-host.invalid", image_seconds=5.0).fetch(UPLOAD)


# ---- a proxy of the environment -------------------------------------------------------------------------------------
def test_by_way_of_a_proxy(
    fetcher: Callable[..., ImageFetcher], foreign: SmallServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy resolves names, so only hosts that the configuration names are asked for."""
    monkeypatch.setenv("HTTP_PROXY", f"http://user:pass@{foreign.host}")
    assert fetcher(label_studio_url="http://labels.invalid:8080").fetch(UPLOAD) == PICTURE
    seen = foreign.requests[0]
    assert seen.headers["Host"] == "labels.invalid:8080" and seen.headers["Proxy-Authorization"] == "Basic dXNlcjpwYXNz"
    foreign.routes["*"] = Answer(303, headers={"Location": "http://storage.invalid/k.jpg"})
    with pytest.raises(InvalidInput, match=r"Behind a proxy.*IMAGE_HOSTS"):
        fetcher(label_studio_url="http://labels.invalid:8080").fetch("s3://b/k.jpg", 1)
    monkeypatch.setenv("HTTPS_PROXY", f"http://{foreign.host}")
    foreign.routes["*"] = Answer(407)
    with pytest.raises(Unavailable, match=r"refused the way to labels\.invalid:443"):
        fetcher(label_studio_url="https://labels.invalid").fetch(UPLOAD)
    assert foreign.requests[-1].method == "CONNECT" and CANARY not in str(foreign.requests[-1])


# ---- the cache ------------------------------------------------------------------------------------------------------
def test_another_users_token_or_address_has_a_cache_of_its_own(studio: SmallServer, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, label_studio_url=studio.url)
    for token in ("one", "two"):
        assert ImageFetcher(settings, LabelStudio(studio.url, token)).fetch(UPLOAD) == PICTURE
    assert len(studio.requests) == 2
    studio.routes[UPLOAD] = Answer(403)
    with pytest.raises(Unauthorized):
        ImageFetcher(settings, LabelStudio(studio.url, "three")).fetch(UPLOAD)


def test_cache_names_are_hashes_and_damage_is_noticed(
    fetcher: Callable[..., ImageFetcher], studio: SmallServer
) -> None:
    images = fetcher()
    images.fetch(UPLOAD)
    (path,) = images._cache._folder.glob("*/*")
    assert len(path.name) == 64 and set(path.name) <= set("0123456789abcdef")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert images.fetch(UPLOAD) == PICTURE and len(studio.requests) == 2
    path.write_bytes(b"")
    assert images.fetch(UPLOAD) == PICTURE and len(studio.requests) == 3


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, 10_000)
    for number in range(8):
        cache.put(str(number), bytes(1_000))
        for path in tmp_path.glob("*/*"):
            facts = path.stat()
            os.utime(path, (facts.st_atime - 10, facts.st_mtime))
    assert cache.get("0") is not None  # used again just now
    for number in range(8, 12):
        cache.put(str(number), bytes(1_000))
    assert cache.get("0") is not None and cache.get("1") is None and cache.get("11") is not None
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 10_000
    cache.put("big", bytes(20_000))
    assert cache.get("big") is None


def test_a_cache_that_cannot_be_written_stands_in_nobodys_way(
    fetcher: Callable[..., ImageFetcher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").write_text("a file where the folder should be")
    assert fetcher().fetch(UPLOAD) == PICTURE
    assert "cannot be written" in caplog.text and CANARY not in caplog.text
