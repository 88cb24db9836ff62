"""What every reader of labels gives: images, the objects on them, and what could not be used.

Positions are pixels of the image as in kptllm_core.keypoints: the corner of the image is (0, 0), the centre of its first pixel
(0.5, 0.5). Tools that put the centre of the first pixel at (0, 0) are moved by HALF when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HALF = 0.5  # pixel
OCCLUDED, VISIBLE = 1, 2  # COCO's v; a point that is not labelled is left out


@dataclass(frozen=True)
class LabelledPoint:
    x: float
    y: float
    visibility: int = VISIBLE


@dataclass(frozen=True)
class LabelledThing:
    """One object. points: by the names of the data set. box: x, y, w, h; None where the tool has no boxes."""

    points: dict[str, LabelledPoint]
    box: tuple[float, float, float, float] | None = None
    category: str = ""


@dataclass(frozen=True)
class LabelledImage:
    """name: what the data set calls it, with "/" between folders; the extension may be missing. path: the file, where it is there.

    size: width and height that the data set states. relative: positions are fractions of the image's width and height, not pixels.
    frame: the number of the frame, where the data set names a video (`name`) and no image.
    """

    name: str
    things: tuple[LabelledThing, ...]
    path: Path | None = None
    size: tuple[int, int] | None = None
    relative: bool = False
    frame: int | None = None

    @property
    def shown(self) -> str:
        """For messages."""
        return self.name if self.frame is None else f"frame {self.frame} of {self.name or 'the video'}"


@dataclass
class LabelledSet:
    """notes: in words, what was found and left aside."""

    images: list[LabelledImage]
    notes: list[str] = field(default_factory=list)

    def names(self) -> dict[str, list[str]]:
        """Category → the names of its points, in the order in which they appear."""
        found: dict[str, dict[str, None]] = {}
        for image in self.images:
            for thing in image.things:
                found.setdefault(thing.category, {}).update(dict.fromkeys(thing.points))
        return {category: list(names) for category, names in found.items()}
