"""Names of a data set ↔ labels of a label config: what belongs together, what is unknown and what can be done about it.

A name is only ever taken for a label when both are the same up to case, blanks and underscores, or when the user says so. Nothing
is guessed: a wrong pair would teach the model wrong points without a word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kptllm_core.errors import SchemaError
from label_config.schema import KeypointControl, LabelConfig


@dataclass(frozen=True)
class Target:
    """Where the objects of one category go. points: name in the data set → name in the control's schema; box: its rectangle's label."""

    control: KeypointControl
    points: dict[str, str]
    box_label: str | None


def map_names(
    config: LabelConfig,
    names: Mapping[str, list[str]],
    *,
    control: str | None = None,
    rename: Mapping[str, str] | None = None,
    skip_unknown: bool = False,
) -> tuple[dict[str, Target], list[str]]:
    """({category → Target}, remarks in words). names: category → names of its points.

    control: from_name of the KeyPointLabels to use. rename: name or category of the data set → label. SchemaError lists everything
    that is unknown, unless skip_unknown leaves it out.
    """
    rename = rename or {}
    targets, remarks, unknown = {}, [], []
    for category, own in names.items():
        chosen = _control(config, category, control, rename)
        points: dict[str, str] = {}
        missing = []
        for name in own:
            label = _match(rename.get(name, name), _words(chosen))
            if label is None:
                missing.append(rename.get(name, name))
            else:
                points[name] = label
        taken = [label for label in points.values() if list(points.values()).count(label) > 1]
        if taken:
            both = [name for name, label in points.items() if label == taken[0]]
            raise SchemaError(f"{' and '.join(both)} would both become '{taken[0]}'. Give each its own label with --rename OLD=NEW.")
        if missing and not (skip_unknown and points):
            unknown.append(_complaint(chosen, category, missing))
        elif missing:
            remarks.append(f"Left out, since '{chosen.from_name}' has no such label: {', '.join(missing)}.")
        without = [chosen.label_of(n) for n in chosen.schema.names if n not in points.values()]
        if without and not missing:
            remarks.append(f"The data set has no {', '.join(without)}.")
        changed = [f"{name} → {chosen.label_of(label)}" for name, label in points.items() if name != chosen.label_of(label)]
        if changed:
            remarks.append(f"Renamed: {', '.join(changed)}.")
        targets[category] = Target(chosen, points, _box_label(chosen, category, rename, unknown))
    if unknown:
        raise SchemaError("\n".join(unknown))
    return targets, remarks


def parse_rename(pairs: list[str]) -> dict[str, str]:
    """`["left ear=ear_l", …]` of the command line → a mapping. SchemaError for what is none."""
    found = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (equals and old.strip() and new.strip()):
            raise SchemaError(f"--rename {pair[:60]!r} is no pair; expected OLD=NEW, as in --rename snout=nose.")
        found[old.strip()] = new.strip()
    return found


def _control(config: LabelConfig, category: str, wanted: str | None, rename: Mapping[str, str]) -> KeypointControl:
    known = ", ".join(f"'{c.from_name}' ({c.schema.category})" for c in config.controls)
    if wanted is not None:
        found = [c for c in config.controls if c.from_name == wanted]
        if not found:
            raise SchemaError(f"The label config has no KeyPointLabels named '{wanted}'. It has {known}.")
        return found[0]
    if len(config.controls) == 1:
        return config.controls[0]
    called = _plain(rename.get(category, category))
    fitting = [c for c in config.controls if called in (_plain(c.schema.category), _plain(c.from_name))]
    if len(fitting) != 1:
        raise SchemaError(
            f"The label config has several KeyPointLabels: {known}. Which one '{category or 'the data set'}' belongs to is not clear: "
            f"--control NAME chooses one, --rename {category or 'CATEGORY'}=NAME says it for this category."
        )
    return fitting[0]


def _words(control: KeypointControl) -> dict[str, str]:
    """What a label may be called → the name in the schema. The wire's word wins over the others."""
    words: dict[str, str] = {}
    for spelled in (control.schema.names, control.shown, control.labels):
        words.update(zip(spelled, control.schema.names, strict=True))
    return words


def _match(name: str, words: Mapping[str, str]) -> str | None:
    if name in words:
        return words[name]
    same = {label for word, label in words.items() if _plain(word) == _plain(name)}
    return same.pop() if len(same) == 1 else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _complaint(control: KeypointControl, category: str, missing: list[str]) -> str:
    hints = []
    for name in missing:
        near = difflib.get_close_matches(_plain(name), [_plain(w) for w in control.labels], 1, 0.6)
        if near:
            label = next(w for w in control.labels if _plain(w) == near[0])
            hints.append(f"--rename {_quoted(name)}={_quoted(label)}")
    of = f" of '{category}'" if category else ""
    labels = "".join(f'<Label value="{name}"/>' for name in missing[:3])
    return (
        f"These points{of} are not in the label config's '{control.from_name}': {', '.join(missing)}. It has {', '.join(control.labels)}. "
        f"Choose: say which they are ({' '.join(hints[:4]) or '--rename OLD=NEW'}), add them in Label Studio at Settings → Labeling Interface "
        f"({labels}{'…' if len(missing) > 3 else ''}), or leave them out (--skip-unknown)."
    )


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"\s", word) else word


def _box_label(control: KeypointControl, category: str, rename: Mapping[str, str], unknown: list[str]) -> str | None:
    if control.box is None or not control.box.labels:
        return None
    called = rename.get(category, category)
    found = [label for label in control.box.labels if _plain(label) == _plain(called)]
    if found or len(control.box.labels) == 1:
        return (found or list(control.box.labels))[0]
    unknown.append(
        f"The boxes '{control.box.from_name}' are labelled {', '.join(control.box.labels)}; which of these "
        f"{repr(category) if category else 'the objects of the data set'} is, is not clear. "
        f"Say it: --rename {_quoted(category) if category else 'object'}=LABEL."
    )
    return None
