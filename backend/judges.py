"""The two judges of a version, as pure functions: the held-out images before it serves, the next images after it does.

`decide` is the rule of promotion, `verdict` the rule of staying. They stand here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

JUDGED_BY = ("0.05", "0.1")  # PCK thresholds of the held-out judge
CONFIDENCE = 0.95  # that a version which is no worse is not rolled back, over all looks and both figures
LOOK_EVERY = 10  # groups of images; also the fewest that a version is rolled back on
_EPS = 1e-9


# ---------------------------------------------------------------- held-out images


def decide(before: dict[str, Any] | None, after: dict[str, Any] | None, images: int = 0) -> tuple[bool, str]:
    """Whether a new version serves, and why, from the figures of both on the held-out images.

    It serves unless it is worse: the mean of PCK@0.05 and PCK@0.1 must not be lower than the previous version's, and
    where it is the same the mean error must not be larger. Without complete figures it does not serve.
    """
    old, new = _figures(before), _figures(after)
    if old is None or new is None:
        which = "previous" if old is None else "new"
        return (
            False,
            f"Not promoted: the figures of the {which} version on the held-out images are missing or no numbers.",
        )
    told = (
        f"on {images} held-out images ({int((after or {}).get('points') or 0)} points) PCK@0.1 {old['0.1']:.3f} → {new['0.1']:.3f}, "
        f"PCK@0.05 {old['0.05']:.3f} → {new['0.05']:.3f}, mean error {old['nme']:.3f} → {new['nme']:.3f} of the object's size"
    )
    was, now = (sum(f[t] for t in JUDGED_BY) / len(JUDGED_BY) for f in (old, new))
    if now > was + _EPS:
        return True, f"Promoted: better {told}."
    if now < was - _EPS:
        return False, f"Not promoted: worse {told}."
    if new["nme"] <= old["nme"] + _EPS:
        return True, f"Promoted: as good as before {told}."
    return False, f"Not promoted: the same PCK but a larger error {told}."


def _figures(score: dict[str, Any] | None) -> dict[str, float] | None:
    try:
        figures = {t: float(score["pck"][t]) for t in JUDGED_BY} | {"nme": float(score["nme"])}  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    return figures if all(math.isfinite(v) for v in figures.values()) else None


# ---------------------------------------------------------------- the next images


@dataclass(frozen=True)
class Pair:
    """One image that both versions predicted: its figures (prequential.measure) under the promoted version and the previous.

    group: of images that are no independent samples, such as those of one video or subject (`Task.group`).
    """

    version: dict[str, Any]
    previous: dict[str, Any]
    group: str


def verdict(pairs: Sequence[Pair], most: int) -> tuple[str, dict[str, Any], str]:
    """("previous" | "version" | "", figures, in words): which of the two is better on these images, "" if that cannot be said.

    One of them is better when the confidence interval of a paired difference (PCK@0.05, or mean error beyond what people let
    pass) excludes zero and that of the other figure does not do so in the other direction. Frames of one video resemble each
    other, so the sample is the groups, each with the mean of its images; an image without a group is one by itself. It is
    looked at every LOOK_EVERY groups, and when `most` images are there; fewer groups than that say nothing. The intervals are
    wide enough that both figures and all looks together err in 1 - CONFIDENCE of the cases.
    """
    looks = max(most // LOOK_EVERY, 1)
    level = 1 - (1 - CONFIDENCE) / (2 * looks)
    groups = by_group(pairs)
    pck, error, beyond = (_paired(groups, figure, level) for figure in ("pck", "error", "beyond"))
    error |= {"difference": beyond["difference"], "interval": beyond["interval"]}
    figures = {"images": len(pairs), "groups": len(groups), "level": round(level, 5), "pck@0.05": pck, "error": error}
    # A positive difference of PCK, and a negative one of the error, speak for the promoted version.
    gain, loss = _sign(pck["interval"]), -_sign(beyond["interval"])
    better = "version" if gain + loss > 0 else "previous" if gain + loss < 0 else ""
    if len(groups) < LOOK_EVERY:
        better = ""
    together = f" of {len(groups)} groups" if len(groups) < len(pairs) else ""
    said = (
        f"on the same {len(pairs)} images{together} PCK@0.05 {pck['version']:.3f} against {pck['previous']:.3f} of the version before "
        f"(difference {_signed(pck)}), mean error {error['version']:.3f} against {error['previous']:.3f} (difference {_signed(beyond)} "
        f"beyond what people let pass); {100 * level:.1f} % intervals"
    )
    return better, figures, said


def by_group(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs of each group, in the order of their first images."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.group, []).append(pair)
    return list(found.values())


def interval_of(differences: Sequence[float], level: float) -> list[float]:
    """[low, high] of the mean of paired differences, by Student's t. Fewer than two say nothing: everything is possible."""
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        return [-math.inf, math.inf]
    half = t_quantile((1 + level) / 2, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [float(values.mean()) - half, float(values.mean()) + half]


@lru_cache(maxsize=256)
def t_quantile(share: float, degrees: int) -> float:
    """The value that a t-distributed number stays below with probability `share`; by integration over its angle."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees - 1)  # t = sqrt(degrees) tan(angle)
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(share, cumulative / cumulative[-1], angle)))


def _paired(groups: Sequence[Sequence[Pair]], figure: str, level: float) -> dict[str, Any]:
    """Means over the groups, and the interval of their difference. figure: which of `prequential.measure`."""
    version = [float(np.mean([p.version[figure] for p in group])) for group in groups]
    previous = [float(np.mean([p.previous[figure] for p in group])) for group in groups]
    differences = [a - b for a, b in zip(version, previous, strict=True)]
    low, high = interval_of(differences, level)
    known = math.isfinite(low)
    return {
        "version": _mean(version),
        "previous": _mean(previous),
        "difference": _mean(differences),
        "interval": [round(low, 5), round(high, 5)] if known else None,
    }


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 5) if len(values) else 0.0


def _sign(interval: list[float] | None) -> int:
    if interval is None:
        return 0
    return int(interval[0] > _EPS) - int(interval[1] < -_EPS)


def _signed(paired: dict[str, Any]) -> str:
    low, high = paired["interval"] or (math.nan, math.nan)
    return f"{paired['difference']:+.3f}, {low:+.3f} … {high:+.3f}"
