"""Images of a data set ↔ tasks of Label Studio, by their names.

Label Studio puts eight hex digits before the name of an uploaded file and changes blanks and odd characters in it; storages and
URLs keep folders. So names are compared from their end, and as many folders as are needed to tell two images apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from backend.formats.labels import LabelledImage

_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
Parts = tuple[str, ...]


def parts_of(address: str) -> Parts:
    """The folders and the name that a task's image has: of a URL, an upload, a local file or a storage's object."""
    split = urlsplit(address)
    path = parse_qs(split.query).get("d", [""])[0] if "/data/local-files" in split.path else unquote(split.path)
    parts = tuple(part for part in path.replace("\\", "/").split("/") if part)
    if parts and "/data/upload/" in split.path:
        return (_UPLOADED.sub("", parts[-1]),)
    return parts


def upload_name(image: LabelledImage, unique: bool) -> str:
    """What a file is called when it is uploaded: with its folder where its name alone is not unique in the data set."""
    parts = _own_parts(image)
    return parts[-1] if unique or len(parts) < 2 else f"{parts[-2]}_{parts[-1]}"


class Matcher:
    """Finds things by an image's name. `found` is given (key, address) pairs; a key may be a task's id or a file's path."""

    def __init__(self, found: Iterable[tuple[object, str]]) -> None:
        self._by_name: dict[str, list[tuple[object, Parts]]] = defaultdict(list)
        self._by_frame: dict[int, list[tuple[object, Parts]]] = defaultdict(list)
        for key, address in found:
            parts = tuple(_plain(part) for part in parts_of(address))
            if not parts:
                continue
            for name in {parts[-1], _stem(parts[-1])}:
                self._by_name[name].append((key, parts))
            digits = re.findall(r"\d+", _stem(parts[-1]))
            if digits:
                self._by_frame[int(digits[-1])].append((key, parts))

    def find(self, image: LabelledImage, unique: bool = True) -> tuple[object | None, str]:
        """(key, "") of the one that it is; (None, why not) else, with "" for why when there simply is none."""
        if image.frame is not None:
            return self._frame(image)
        wanted = tuple(_plain(part) for part in _own_parts(image))
        if not wanted:
            return None, "it has no name"
        found = self._by_name.get(wanted[-1], [])
        if not unique:  # an upload whose name carries its folder says most
            joined = _plain(upload_name(image, False))
            found = self._by_name.get(joined) or [f for f in found if any(_common(f[1], wanted))]
        return _best(found, wanted)

    def _frame(self, image: LabelledImage) -> tuple[object | None, str]:
        found = self._by_frame.get(image.frame if image.frame is not None else -1, [])
        video = _plain(PurePosixPath(image.name).stem)
        if video and len(found) > 1:
            whole = re.compile(rf"(?<![0-9A-Za-z]){re.escape(video.replace('_', ' '))}(?![0-9A-Za-z])")
            found = [f for f in found if any(whole.search(part.replace("_", " ")) or video in (part, _stem(part)) for part in f[1])]
        if len(found) > 1:
            return None, f"{len(found)} images have the number {image.frame}: {', '.join('/'.join(f[1]) for f in found[:3])}"
        return (found[0][0], "") if found else (None, "")


def not_unique(images: Iterable[LabelledImage]) -> set[str]:
    """Names that several images of a data set share, apart from their folders."""
    count: dict[str, int] = defaultdict(int)
    for image in images:
        if _own_parts(image):
            count[_plain(_own_parts(image)[-1])] += 1
    return {name for name, times in count.items() if times > 1}


def is_unique(image: LabelledImage, shared: set[str]) -> bool:
    return not _own_parts(image) or _plain(_own_parts(image)[-1]) not in shared


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES and p.is_file())


def _best(found: list[tuple[object, Parts]], wanted: Parts) -> tuple[object | None, str]:
    """Of those with the right name the one that shares most folders with `wanted`."""
    if len(found) < 2:
        return (found[0][0], "") if found else (None, "")
    shared = [(sum(1 for _ in _common(parts, wanted)), key, parts) for key, parts in found]
    most = max(s for s, _, _ in shared)
    best = [(key, parts) for s, key, parts in shared if s == most]
    if len(best) > 1:
        return None, f"{len(best)} images are called that: {', '.join('/'.join(parts) for _, parts in best[:3])}"
    return best[0][0], ""


def _common(a: Parts, b: Parts) -> Iterable[str]:
    """Folders that two names share, from the end, the names themselves left aside (they may differ in their extension)."""
    for x, y in zip(reversed(a[:-1]), reversed(b[:-1]), strict=False):
        if x != y:
            return
        yield x


def _own_parts(image: LabelledImage) -> Parts:
    """Folders and name of the image itself; of a video's frame those of its file, if there is one."""
    if image.frame is not None:
        return image.path.parts[-2:] if image.path is not None else ()
    return tuple(part for part in PurePosixPath(image.name).parts if part not in ("/", ".", ".."))


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if name.lower().endswith(_IMAGE_SUFFIXES) else name


def _plain(part: str) -> str:
    """As Label Studio stores a file's name: blanks become underscores, odd characters go."""
    return re.sub(r"[^-\w.]", "", part.strip().replace(" ", "_"))
