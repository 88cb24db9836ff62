"""Images of a data set ↔ tasks of Label Studio, by their names.

Label Studio puts eight hex digits before the name of an uploaded file and changes blanks and odd characters in it; storages and
URLs keep names and folders as they are. So names are compared from their end, and as many folders as are needed to tell two images apart.
Where folders, or the names of videos, contradict each other, nothing is matched: labels on another picture would teach wrong points.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
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
    parts = tuple(_composed(part) for part in path.replace("\\", "/").split("/") if part)
    if parts and _is_upload(address):
        return (_UPLOADED.sub("", parts[-1]),)
    return parts


def _is_upload(address: str) -> bool:
    return "/data/upload/" in urlsplit(address).path


def upload_name(image: LabelledImage, unique: bool) -> str:
    """What a file is called when it is uploaded: with its folder where its name alone is not unique in the data set."""
    parts = _own_parts(image)
    return parts[-1] if unique or len(parts) < 2 else f"{parts[-2]}_{parts[-1]}"


@dataclass(frozen=True)
class _Known:
    """What an image may be. parts: of its address. video: the one that these name, of the data set's; "" if none."""

    key: object
    parts: Parts
    video: str


class Matcher:
    """Finds things by an image's name. `found` is given (key, address) pairs; a key may be a task's id or a file's path. images: the
    data set's, which tell whether folders and videos say anything here."""

    def __init__(self, found: Iterable[tuple[object, str]], images: Iterable[LabelledImage] = ()) -> None:
        images = list(images)
        longest = sorted(set(map(_video, images)) - {""}, key=lambda video: (-len(video), video))  # fly_2 has fly in it, too
        videos = {video: (_whole(video), _whole(stored_name(video) or video)) for video in longest}
        folders = {folder for image in images if image.frame is None for folder in _own_parts(image)[:-1]}
        self._by_name: dict[str, list[_Known]] = defaultdict(list)
        self._by_upload: dict[str, list[_Known]] = defaultdict(list)  # by the name as Label Studio stores it
        self._by_frame: dict[int, list[_Known]] = defaultdict(list)
        self._names_videos = self._shares_folders = False
        for key, address in found:
            parts, uploaded = parts_of(address), _is_upload(address)
            if not parts:
                continue
            video = next((v for v, whole in videos.items() if whole[uploaded].search("/".join(parts).replace(" ", "_"))), "")
            known = _Known(key, parts, video)
            for name in {parts[-1], _stem(parts[-1])}:
                if uploaded:
                    self._by_upload[stored_name(name)].append(known)
                else:
                    self._by_name[name].append(known)
            digits = re.findall(r"\d+", _stem(parts[-1]))
            if digits:
                self._by_frame[int(digits[-1])].append(known)
            self._names_videos |= bool(video)
            self._shares_folders |= not folders.isdisjoint(parts[:-1])

    def find(self, image: LabelledImage, unique: bool = True) -> tuple[object | None, str]:
        """(key, "") of the one that it is; (None, why not) else, with "" for why when there simply is none.

        A video's frame is known by its file's name or, without a file, by its number. Where names tell videos apart they must name its own.
        """
        wanted, video = _own_parts(image), _video(image)
        if wanted:
            found, same = self._called(wanted[-1]), "are called that"
        elif image.frame is not None:
            found, same = self._by_frame.get(image.frame, []), f"have the number {image.frame}"
        else:
            return None, "it has no name"
        if not unique:  # an upload whose name carries its folder says most
            found = self._called(upload_name(image, False)) or [f for f in found if any(_common(f.parts, wanted))]
        if video and self._names_videos:
            found = [f for f in found if f.video == video]
        return self._best(found, wanted, same)

    def _called(self, name: str) -> list[_Known]:
        return self._by_name.get(name, []) + self._by_upload.get(stored_name(name), [])

    def _best(self, found: list[_Known], wanted: Parts, same: str) -> tuple[object | None, str]:
        """The one that shares most folders with `wanted`, and does not contradict them. same: what they have in common."""
        shared = [sum(1 for _ in _common(f.parts, wanted)) for f in found]
        best = [f for f, count in zip(found, shared, strict=True) if count == max(shared)]
        if len(best) > 1:
            return None, f"{len(best)} images {same}: {', '.join('/'.join(f.parts) for f in best[:3])}"
        if best and self._shares_folders and _contradict(best[0].parts[:-1], wanted[:-1]):
            return None, f"the task's image lies in another folder: {'/'.join(best[0].parts)}"
        return (best[0].key, "") if best else (None, "")


def not_unique(images: Iterable[LabelledImage]) -> set[str]:
    """Names that several images of a data set share, apart from their folders."""
    count: dict[str, int] = defaultdict(int)
    for image in images:
        if _own_parts(image):
            count[stored_name(_own_parts(image)[-1])] += 1
    return {name for name, times in count.items() if times > 1}


def is_unique(image: LabelledImage, shared: set[str]) -> bool:
    return not _own_parts(image) or stored_name(_own_parts(image)[-1]) not in shared


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder."""
    return sorted(p for p in folder.rglob("*") if is_image(p.name) and p.is_file())


def is_image(name: str) -> bool:
    """Whether a name ends as those of images do."""
    return name.lower().endswith(_IMAGE_SUFFIXES)


def _contradict(a: Parts, b: Parts) -> bool:
    """Whether two images of one name lie in different folders, neither of which the other's path leads through."""
    return bool(a and b) and a[-1] not in b and b[-1] not in a


def _common(a: Parts, b: Parts) -> Iterable[str]:
    """Folders that two names share, from the end, the names themselves left aside (they may differ in their extension)."""
    for x, y in zip(reversed(a[:-1]), reversed(b[:-1]), strict=False):
        if x != y:
            return
        yield x


def _own_parts(image: LabelledImage) -> Parts:
    """Folders and name of the image itself; of a video's frame those of its file, if there is one."""
    parts = PurePosixPath(image.name).parts if image.frame is None else image.path.parts[-2:] if image.path is not None else ()
    return tuple(_composed(part) for part in parts if part not in ("/", ".", ".."))


def _video(image: LabelledImage) -> str:
    return "" if image.frame is None else _composed(PurePosixPath(image.name).stem)


def _whole(video: str) -> re.Pattern[str]:
    """Finds a video's name where it is no part of a longer word, in text whose blanks are underscores."""
    return re.compile(rf"(?<![^\W_]){re.escape(video.replace(' ', '_'))}(?![^\W_])")


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if is_image(name) else name


def _composed(name: str) -> str:
    """With ä as one character, where a file system may write it as two."""
    return unicodedata.normalize("NFC", name)


def stored_name(part: str) -> str:
    """As Label Studio stores an uploaded file's name: blanks become underscores, odd characters go."""
    return re.sub(r"[^-\w.]", "", part.strip().replace(" ", "_"))
