"""Environment → one frozen `Settings`. Nothing else in the backend reads environment variables.

Every setting is declared once, with its default, its reader and the sentence that documents it (`Settings.describe()`,
`Settings.table()`). A value that cannot be used stops the start with the variable's name, what was found, what was
expected and how to fix it; the value of a secret is never repeated, neither there nor in `repr`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kptllm_core.errors import InvalidInput

_HOST = re.compile(
    r"(?=.{1,253}$)(?:\*\.)?[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_](?:[a-z0-9_-]{0,62}))*\.?", re.IGNORECASE
)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Setting:
    """One documented environment variable: its name, the default as text, the documentation, and whether it is "
    "secret."""

    name: str
    default: str
    doc: str
    secret: bool


class _Bad(ValueError):
    """What was expected instead of the value at hand; becomes InvalidInput with the variable's name."""


def _about(read: Callable[[str], Any], doc: str) -> dict[str, Any]:
    """Metadata of a setting: `read` turns the variable's text into the value or raises _Bad. A secret has "
    "repr=False."""
    return {"read": read, "doc": doc}


def _text(value: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise _Bad("text on one line, without control characters")
    return value


def _latin(value: str) -> str:
    """A secret that travels in an HTTP header."""
    if not _text(value).isascii() or " " in value:
        raise _Bad("ASCII characters without blanks (was something else pasted along?)")
    return value


def _url(value: str) -> str:
    """An http(s) base URL, without a slash at the end; a path (`https://host/ls`) is kept."""
    try:
        parts = urlsplit(_text(value))
        port_ok = parts.port is None or 0 < parts.port < 65536
    except ValueError:
        raise _Bad("a URL such as http://127.0.0.1:8080 or https://example.org/label-studio") from None
    if parts.username is not None or parts.password is not None:
        raise _Bad("a URL without a user name and password in it")
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not port_ok
        or parts.query
        or parts.fragment
        or " " in value
    ):
        raise _Bad("a URL such as http://127.0.0.1:8080 or https://example.org/label-studio")
    return value.rstrip("/")


def _database(value: str) -> str:
    if not _text(value).startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        raise _Bad("sqlite:///relative/path.db, sqlite:////absolute/path.db or postgresql://user:password@host/name")
    return value


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", value) or not least <= int(value) <= most:
            raise _Bad(f"a whole number from {least} to {most}")
        return int(value)

    return read


def _none_or(least: int, most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if value == "0":
            return 0
        try:
            return _whole(least, most)(value)
        except _Bad:
            raise _Bad(f"0 for none, or a whole number from {least} to {most}") from None

    return read


def _share(least: float, most: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        if not re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,6}", value) or not least <= float(value) <= most:
            raise _Bad(f"a share from {least:g} to {most:g}, for example 0.05")
        return float(value)

    return read


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def read(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not least <= float(value) <= most:
            raise _Bad(f"a number of seconds from {least:g} to {most:g}")
        return float(value)

    return read


def _bytes(least: int, most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        found = re.fullmatch(r"([0-9]{1,15})\s*([a-z]{0,3})", value, re.IGNORECASE)
        if not found or found[2].lower() not in _UNITS or not least <= int(found[1]) * _UNITS[found[2].lower()] <= most:
            raise _Bad(f"a number of bytes from {least:,} to {most:,}, for example 50MB")
        return int(found[1]) * _UNITS[found[2].lower()]

    return read


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        for choice in choices:
            if value.lower() == choice.lower():
                return choice
        raise _Bad(f"one of {', '.join(choices)}")

    return read


def _file(value: str) -> Path:
    path = Path(_text(value)).expanduser()
    if not path.is_file():
        raise _Bad("the path of a PEM file that exists and can be read")
    return path


def _folder(value: str) -> Path:
    path = Path(_text(value)).expanduser()
    if path.exists() and not path.is_dir():
        raise _Bad("a folder (it may not exist yet), not a file")
    return path


def _image_hosts(value: str) -> tuple[str, ...]:
    """`host`, `host:port`, `*.domain`, an IPv4 address or `[ipv6]`, separated by commas; lower case."""
    hosts = []
    for entry in (part.strip().lower() for part in _text(value).split(",")):
        if not entry:
            continue
        found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{1,5}))?", entry)
        name, port = (found[1], found[2]) if found else ("", None)
        try:
            is_ipv6 = name.startswith("[") and name.endswith("]") and ipaddress.IPv6Address(name[1:-1]) is not None
        except ValueError:
            is_ipv6 = False
        if not (is_ipv6 or _HOST.fullmatch(name)) or (port is not None and not 0 < int(port) < 65536):
            raise _Bad(
                "host names separated by commas, such as images.example.org, images.example.org:8443, "
                "*.example.org or "
                f"10.0.0.5 (the entry {entry!r} is none; no http:// and no path)"
            )
        hosts.append(entry)
    return tuple(dict.fromkeys(hosts))


@dataclass(frozen=True)
class Settings:
    """All that the backend can be told from outside. `Settings.from_env(os.environ)` reads and checks it."""

    label_studio_url: str = field(
        default="http://127.0.0.1:8080",
        metadata=_about(
            _url, "Address of Label Studio, as this backend reaches it. A path is kept: `https://host/ls/`."
        ),
    )
    label_studio_public_url: str = field(
        default="",
        metadata=_about(
            _url,
            "Address of the same Label Studio in the browser, when it is another: the page's links lead there, and images "
            "named by it are fetched from LABEL_STUDIO_URL.",
        ),
    )
    label_studio_api_key: str = field(
        default="",
        repr=False,
        metadata=_about(
            _latin,
            "Token of a Label Studio user who may see the projects: a personal access token, or a legacy token. "
            "Without it images in Label Studio and missed corrections cannot be fetched.",
        ),
    )
    label_studio_ca: Path | None = field(
        default=None,
        metadata=_about(
            _file,
            "PEM file with the certificate authority that signed Label Studio's certificate, when that is a "
            "private one.",
        ),
    )
    core_url: str = field(
        default="",
        metadata=_about(
            _url, "Address of a core that runs elsewhere. Empty: `python -m backend` starts its own on 127.0.0.1."
        ),
    )
    core_port: int = field(
        default=9091, metadata=_about(_whole(1, 65535), "Port of the core that `python -m backend` starts.")
    )
    core_token: str = field(
        default="",
        repr=False,
        metadata=_about(_latin, "Token that the core demands; the same value is set for the core."),
    )
    host: str = field(
        default="127.0.0.1",
        metadata=_about(_text, "Address to listen on. `0.0.0.0` lets other machines in: then set the basic auth, too."),
    )
    port: int = field(default=9090, metadata=_about(_whole(1, 65535), "Port to listen on."))
    public_url: str = field(
        default="",
        metadata=_about(
            _url,
            "Address of this backend in the browser, when a proxy stands before it (`https://keypoints.example.org`): without it the page's "
            "buttons may be refused. Needed for them also without a login, when the page has a full domain name.",
        ),
    )
    data_dir: Path = field(
        default=Path(".data/backend"), metadata=_about(_folder, "Folder for the journal and the image cache.")
    )
    database_url: str = field(
        default="",
        repr=False,
        metadata=_about(_database, "The journal's database. Empty: SQLite, `journal.db` in DATA_DIR."),
    )
    basic_auth_user: str = field(
        default="",
        metadata=_about(
            _text,
            "User name that Label Studio must send (set it there, too, at Model → Authenticate with). Only "
            "together with BASIC_AUTH_PASS.",
        ),
    )
    basic_auth_pass: str = field(
        default="", repr=False, metadata=_about(_text, "Password that goes with BASIC_AUTH_USER.")
    )
    webhook_secret: str = field(
        default="",
        repr=False,
        metadata=_about(
            _latin,
            "A webhook that brings no basic auth is accepted only with the header `X-Webhook-Secret` of this value. The backend puts "
            "it on Label Studio's webhook itself when it has a token, and makes a secret up where none is set.",
        ),
    )
    model: str = field(
        default="nano", metadata=_about(_text, "The model: a preset's name (`nano`, `tiny`) or a checkpoint folder.")
    )
    device: str = field(
        default="auto", metadata=_about(_text, "Where the model computes: `auto`, `cpu`, `cuda` or `cuda:1`.")
    )
    round_every: int = field(
        default=20,
        metadata=_about(_whole(1, 100_000), "A training round starts by itself after this many new corrections."),
    )
    min_train: int = field(
        default=10,
        metadata=_about(_whole(2, 100_000), "Labelled images that a project needs before its first training round; with fewer than 10 "
                        "too few are left to judge by, and the round says so."),
    )
    round_seconds: float = field(
        default=180.0, metadata=_about(_seconds(1, 604_800), "Time for training in a round, in seconds.")
    )
    round_quiet_seconds: float = field(
        default=5.0,
        metadata=_about(
            _seconds(0, 3_600),
            "A round that starts by itself waits until no correction came for so many seconds, twelve times as long at the "
            "most: a bulk import starts one round, not many.",
        ),
    )
    shadow_images: int = field(
        default=40,
        metadata=_about(
            _none_or(10, 10_000),
            "Images labelled after a promotion that the version before predicts, too, unseen; it comes back by itself if it was "
            "better. 0: none.",
        ),
    )
    keep_adapters: int = field(
        default=5,
        metadata=_about(
            _whole(0, 100_000),
            "How many of the newest adapters are kept for each project. Those that serve, are pinned, served just before, are "
            "being compared or are trained from stay anyway; all others are deleted.",
        ),
    )
    tolerance: float = field(
        default=0.05,
        metadata=_about(
            _share(0.001, 0.5),
            "How far from its place a point may lie and still be right, in shares of the object's size: what counts as moved, and "
            "what a prediction's score promises.",
        ),
    )
    unaided_share: float = field(
        default=0.0,
        metadata=_about(
            _share(0.0, 0.5),
            "Share of tasks, chosen by a hash, that are served without predictions, to see how much people lean on them: 0.05 is "
            "enough. 0: none.",
        ),
    )
    sweep_seconds: float = field(
        default=45.0,
        metadata=_about(
            _seconds(1, 86_400),
            "How often annotations that no webhook brought are looked for in Label Studio, in seconds.",
        ),
    )
    image_hosts: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _image_hosts,
            "Hosts other than Label Studio that images may come from, separated by commas: `images.example.org` "
            "(ports 80 and 443), `images.example.org:8443`, `*.example.org`, `10.0.0.5`.",
        ),
    )
    image_seconds: float = field(
        default=10.0,
        metadata=_about(_seconds(0.1, 600), "Time for fetching one image, everything included, in seconds."),
    )
    image_max_bytes: int = field(
        default=50_000_000,
        metadata=_about(_bytes(1_000, 2 * 10**9), "Largest image file that is fetched, in bytes (`50MB` works)."),
    )
    core_image_bytes: int = field(
        default=10_000_000_000,
        metadata=_about(
            _bytes(1_000_000, 10**15),
            "Disk space for the images of the core that `python -m backend` starts (`50GB` works). All images of a round must fit.",
        ),
    )
    image_cache_bytes: int = field(
        default=2_000_000_000,
        metadata=_about(
            _bytes(0, 10**15),
            "Disk space for fetched images in DATA_DIR (`2GB` works); the least recently used go first. 0: none.",
        ),
    )
    web_workers: int = field(default=2, metadata=_about(_whole(1, 64), "Processes that answer requests."))
    web_threads: int = field(default=8, metadata=_about(_whole(1, 256), "Threads in each of these processes."))
    log_level: str = field(
        default="INFO",
        metadata=_about(
            _one_of("DEBUG", "INFO", "WARNING", "ERROR"), "How much is logged: DEBUG, INFO, WARNING or ERROR."
        ),
    )

    def __post_init__(self) -> None:
        if bool(self.basic_auth_user) != bool(self.basic_auth_pass):
            here, missing = (
                ("BASIC_AUTH_USER", "BASIC_AUTH_PASS")
                if self.basic_auth_user
                else ("BASIC_AUTH_PASS", "BASIC_AUTH_USER")
            )
            raise InvalidInput(
                f"{here} is set, but {missing} is not: the backend would be open to everybody although a login was "
                "wanted, so it does not "
                f"start. Set {missing}, too, or remove {here}.",
                variable=missing,
            )
        if ":" in self.basic_auth_user:
            raise InvalidInput(
                "BASIC_AUTH_USER contains a colon, which HTTP basic auth cannot carry in a user name. Choose one "
                "without.",
                variable="BASIC_AUTH_USER",
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check every setting, by default from this process's environment. Raises InvalidInput.

        An empty variable counts as not set.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            name = item.name.upper()
            value = environ.get(name, "").strip()
            if not value:
                continue
            try:
                values[item.name] = item.metadata["read"](value)
            except (_Bad, OSError) as error:
                hidden = not item.repr or "@" in value  # a URL with a password in it
                found = "a value that is not shown here" if hidden else repr(value[:200])
                expected = error if isinstance(error, _Bad) else f"something that can be read ({error.strerror})"
                raise InvalidInput(
                    f"{name} holds {found}; expected {expected}. Correct {name}, or remove it to use the default "
                    f"({_shown(item)}).",
                    variable=name,
                ) from None
        return cls(**values)

    @property
    def journal_url(self) -> str:
        """DATABASE_URL, or the SQLite file in DATA_DIR."""
        return self.database_url or f"sqlite:///{self.data_dir / 'journal.db'}"

    @property
    def core_address(self) -> str:
        """Where the core answers: CORE_URL, or the one that `python -m backend` starts."""
        return self.core_url or f"http://127.0.0.1:{self.core_port}"

    @classmethod
    def describe(cls) -> list[Setting]:
        """Every environment variable that is read, in the order of declaration."""
        return [
            Setting(item.name.upper(), _shown(item), item.metadata["doc"], not item.repr)
            for item in dataclasses.fields(cls)
        ]

    @classmethod
    def table(cls) -> str:
        """The documentation as a Markdown table."""
        rows = [f"| `{setting.name}` | {setting.default} | {setting.doc} |" for setting in cls.describe()]
        return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def _shown(item: dataclasses.Field[Any]) -> str:
    """The default of a field, as the documentation writes it."""
    if item.default is None or item.default == "" or item.default == ():
        return "empty"
    return f"{item.default:g}" if isinstance(item.default, float) else str(item.default)
