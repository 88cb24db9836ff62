"""Label config (XML) → which points, in which order, drawn by which tags, with which thresholds.

`parse(config)` takes any Label Studio config that has KeyPointLabels on an Image: several controls, other tags around them,
nested Views, aliases, names in any script. Attributes of the control that mean something here (all optional):

    model_score_threshold   0…1: objects whose score is below it are not drawn (default 0; where all objects are looked for, those
                            that nobody drew a box for need 0.2)
    model_point_threshold   0…1: points whose score is below it are not drawn (default 0)
    model_point_size        diameter of drawn points, pixels of the image (default: 0.5 % of its width)
    model_add_bboxes        "false": the box control is read, but predictions draw no boxes (default "true"); then one object is found
    model_find_objects      "false": only objects whose box a person drew are predicted (default: true with a box control: these as
                            they are, and all the others that are found)
    model_missing           "absent": a point that a person did not place is absent; "unlabelled" (default): it says nothing
    model_skeleton          "head-neck,neck-tail": pairs of labels that are joined
    model_symmetric         "left_eye-right_eye": pairs that swap when the image is mirrored; default: read from the names;
                            empty: none. Labels with "-" or "," in them: see `_pairs`
    model_category          what the object is called (default: the label of its box, else "object")
    smart                   Label Studio's own, and nothing here: "false" takes away the smart tool (docs/interactive.md)

and of each `<Label>`: `model_index` (order of the points, from 0), `alias`, and `predicted_values`: the same word on several
labels is the kind of object (convention of the YOLO backend), otherwise it is what the model calls that point.

The wire carries `alias` where a Label has one, else `value`: Label Studio writes that, and the SDK accepts nothing else.
The model is asked for the predicted_values of the point, else for its `value`, the words that the annotator sees.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from xml.etree.ElementTree import Element

from kptllm_core.errors import SchemaError
from kptllm_core.keypoints import SHOWN, KeypointSchema, symmetric_pairs
from label_config.markup import children_of, flag, fraction, integer, number, parse_xml, show, wire_of

OCCLUDED_WORDS = ("occluded", "hidden", "invisible", "not visible", "verdeckt", "occulté", "oculto")
UNDEFINED = "$undefined$"  # the key under which Label Studio imports plain files, until a config names it

EXAMPLE = """<View>
  <Image name="image" value="$image"/>
  <KeyPointLabels name="kp" toName="image">
    <Label value="nose"/>
    <Label value="left_eye"/>
  </KeyPointLabels>
</View>"""


@dataclass(frozen=True)
class BoxControl:
    """The RectangleLabels (or Rectangle) whose regions are the boxes of the objects."""

    from_name: str
    to_name: str
    labels: tuple[str, ...]  # as the wire carries them; the first is drawn; () for a plain Rectangle
    type: str = "rectanglelabels"


@dataclass(frozen=True)
class KeypointControl:
    """One KeyPointLabels on one Image. `labels[i]` is what the wire calls the point `schema.names[i]`."""

    from_name: str
    to_name: str
    image_value: str  # "$image"
    schema: KeypointSchema
    labels: tuple[str, ...]
    shown: tuple[str, ...]  # `value` of each Label: what the annotator reads
    box: BoxControl | None = None
    occluded: str | None = None  # name of the per-region Choices
    occluded_choice: str = ""  # its choice that means "hidden", as the wire carries it
    missing: str = "unlabelled"
    score_threshold: float = 0.0
    found_threshold: float = SHOWN  # the same for objects that nobody drew a box for
    point_threshold: float = 0.0
    point_size: float | None = None  # pixels; None: half a per cent of the image's width
    add_bboxes: bool = True
    find_objects: bool = False

    @property
    def finds_all(self) -> bool:
        """Whether predictions hold all objects of an image. Their points are told apart by the boxes that are drawn for them."""
        return self.box is not None and self.find_objects and self.add_bboxes

    @property
    def image_key(self) -> str:
        """The key of the task's data that holds the image: `image` for `value="$image"`."""
        return self.image_value.lstrip("$")

    def image_of(self, data: Mapping[str, Any]) -> str | None:
        """The image's address in a task's data; None if there is none. Nested keys (`$a.b`, `$a[0]`) as Label Studio reads them."""
        value: Any = data
        if self.image_key in data:
            value = data[self.image_key]
        else:
            for part in re.findall(r"[^.\[\]]+", self.image_key):
                if isinstance(value, Mapping):
                    value = value.get(part)
                elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                    value = value[int(part)]
                else:
                    value = None
        value = data.get(UNDEFINED) if value is None else value
        return value if isinstance(value, str) and value else None

    def label_of(self, name: str) -> str:
        """What the wire calls a point of the schema."""
        return self.labels[self.schema.index(name)]

    def name_of(self, label: object) -> str | None:
        """The point that a label of the wire means, by alias or value; None if it is not one of ours."""
        for known in (self.labels, self.shown):
            if label in known:
                return self.schema.names[known.index(str(label))]
        return None


@dataclass(frozen=True)
class LabelConfig:
    controls: tuple[KeypointControl, ...]
    notes: tuple[str, ...] = ()  # what was found and left aside, in words

    @cached_property
    def hash(self) -> str:
        """SHA-256 hex of the meaning: which points in which order, how they pair, which tags carry them. Colours, hotkeys,
        layout and thresholds do not enter: they change nothing that was labelled or learned."""
        meaning = [[c.from_name, c.to_name, c.image_value, c.schema.to_json(), c.labels, c.missing, c.occluded, c.occluded_choice,
                    [c.box.from_name, c.box.labels] if c.box else None] for c in self.controls]  # fmt: skip
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def control(self, from_name: str, to_name: str | None = None) -> KeypointControl | None:
        """The control of that name (on that image); None if there is none."""
        return next((c for c in self.controls if c.from_name == from_name and to_name in (None, c.to_name)), None)


def parse(config: str) -> LabelConfig:
    """Read a label config; SchemaError if no keypoints can be labelled with it."""
    root = parse_xml(config)
    images = {e.get("name", ""): e for e in children_of(root, "image")}
    controls: list[KeypointControl] = []
    notes: list[str] = []
    elements = children_of(root, "keypointlabels")
    names = [e.get("name") for e in elements]
    for element in elements:
        if not element.get("name") or not element.get("toName"):
            raise SchemaError(f"{show(element)} needs a name and a toName. For example:\n{EXAMPLE}")
        if names.count(element.get("name")) > 1:
            raise SchemaError(f"Two KeyPointLabels are named '{element.get('name')}'. Give each a name of its own.")
        for to_name in (part.strip() for part in element.get("toName", "").split(",")):
            image = images.get(to_name)
            if image is None:
                notes.append(
                    f"{show(element)} labels '{to_name}', which is no <Image>; images here: {', '.join(images) or 'none'}"
                )
            elif not re.fullmatch(r"\$[\w.\[\]]+", image.get("value", "")):
                notes.append(f'{show(image)} must name one field of the task, as in value="$image"')
            else:
                controls.append(_control(root, element, image, alone=len(elements) == 1))
    if not controls:
        found = f"found {'; '.join(notes)}" if notes else f"found no <KeyPointLabels>{_instead(root)}"
        raise SchemaError(
            f"The label config has no KeyPointLabels on an Image: {found}. A config that works:\n{EXAMPLE}"
        )
    return LabelConfig(tuple(controls), tuple(notes))


def _instead(root: Element) -> str:
    if children_of(root, "keypoint"):
        return ", only <KeyPoint>: use <KeyPointLabels>, whose labels are the points' names"
    tags = sorted({str(e.tag) for e in root.iter() if e.get("toName")})
    return f" among {', '.join(tags)}" if tags else ""


def _control(root: Element, element: Element, image: Element, alone: bool) -> KeypointControl:
    """`alone`: no other KeyPointLabels competes for the boxes."""
    from_name, to_name = element.get("name", ""), image.get("name", "")
    tags = _ordered(element, _labels(element))
    shown = tuple(tag.get("value", "") or wire_of(tag) for tag in tags)
    wire = tuple(wire_of(tag) for tag in tags)
    names, kind = _model_names(tags, shown)
    for what, given in (("value", shown), ("alias", wire), ("predicted_values", names)):
        twice = _twice(given)
        if twice:
            raise SchemaError(
                f"{show(element)} has the {what} '{twice[0]}' on several labels; each point needs its own, as in "
                f'<Label value="{twice[0]}_2"/>. To label several objects keep one Label per point and add a box '
                f'control: <RectangleLabels name="{from_name}_bbox" toName="{to_name}"><Label value="object"/>…'
            )
    kind = element.get("model_category", "").strip() or kind
    box = _box(root, element, to_name, alone, kind)
    category = kind or (box.labels[0] if box and len(box.labels) == 1 else "object")
    words = {word: i for group in (names, wire, shown) for i, word in enumerate(group)}
    if element.get("model_symmetric") is None:
        symmetric = symmetric_pairs(names) or symmetric_pairs(shown)
    else:
        symmetric = _pairs(element, "model_symmetric", words)
        if len({i for pair in symmetric for i in pair}) < 2 * len(symmetric):
            raise SchemaError(
                f"model_symmetric of {show(element)} names a point in two pairs; a point has one mirror image."
            )
    schema = KeypointSchema(names, category, _pairs(element, "model_skeleton", words), symmetric)
    missing = element.get("model_missing", "unlabelled").strip().lower()
    if missing not in ("absent", "unlabelled"):
        raise SchemaError(f'{show(element)} has model_missing="{missing}"; expected "absent" or "unlabelled".')
    occluded, choice = _occluded(root, from_name, to_name)
    return KeypointControl(
        from_name, to_name, image.get("value", ""), schema, wire, shown, box, occluded, choice, missing,
        score_threshold=fraction(element, "model_score_threshold", 0.0),
        found_threshold=fraction(element, "model_score_threshold", SHOWN),
        point_threshold=fraction(element, "model_point_threshold", 0.0),
        point_size=number(element, "model_point_size", None),
        add_bboxes=flag(element, "model_add_bboxes", True),
        find_objects=flag(element, "model_find_objects", box is not None),
    )  # fmt: skip


def _twice(given: Sequence[Any]) -> list[Any]:
    """What is given more than once, in the order of its first time."""
    return [value for value, count in Counter(given).items() if count > 1]


def _labels(element: Element) -> list[Element]:
    labels = [e for e in children_of(element, "label") if wire_of(e).strip()]
    if not labels and element.get("value", "").startswith("$"):
        raise SchemaError(f"{show(element)} takes its labels from each task; write fixed ones down, as in\n{EXAMPLE}")
    if not labels:
        raise SchemaError(f'{show(element)} has no labels. Add one per point inside it: <Label value="nose"/>')
    return labels


def _ordered(element: Element, tags: list[Element]) -> list[Element]:
    """By model_index where given; labels without one follow in the order of the config."""
    index = [integer(tag, "model_index", None) for tag in tags]
    given = [i for i in index if i is not None]
    twice = _twice(given)
    if twice:
        raise SchemaError(f'{show(element)} has model_index="{twice[0]}" on two labels. Number them 0, 1, 2, …')
    last = max(given, default=0) + 1
    keys = [last if i is None else i for i in index]
    return [tags[at] for at in sorted(range(len(tags)), key=keys.__getitem__)]  # stable


def _model_names(tags: list[Element], shown: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """What the model is asked for, and the kind of object if predicted_values says it."""
    given = [tag.get("predicted_values", "").split(",")[0].strip() for tag in tags]
    words = [w for w in given if w]
    if len(set(words)) < len(words) or (len(words) == 1 and tags[given.index(words[0])].get("model_index")):
        return shown, words[0] if len(set(words)) == 1 else ""
    return tuple(g or s for g, s in zip(given, shown, strict=True)), ""


def _box(root: Element, element: Element, to_name: str, alone: bool, kind: str) -> BoxControl | None:
    """`<name>_bbox` by the YOLO backend's convention, else the image's box control. Where several kinds of object share that one,
    the labels that are called like this kind, or like this control, are ours."""
    wanted = f"{element.get('name')}_bbox"
    found = [e for tag in ("rectanglelabels", "rectangle") for e in children_of(root, tag)
             if e.get("name") and to_name in (part.strip() for part in e.get("toName", "").split(","))]  # fmt: skip
    named = [e for e in found if e.get("name") == wanted]
    free = [e for e in found if not _belongs_to_another(root, element, e)]
    if not named and len(free) > 1:
        raise SchemaError(f"Several box controls label '{to_name}': {', '.join(e.get('name', '') for e in free)}. "
                          f'Name the one that holds the points of {show(element)} "{wanted}".')  # fmt: skip
    if not (named or free):
        return None
    box = (named or free)[0]
    tag = str(box.tag).lower()
    labels = tuple(wire_of(e) for e in children_of(box, "label") if wire_of(e))
    if tag == "rectanglelabels" and not labels:
        raise SchemaError(f'{show(box)} has no labels. Add one per kind of object inside it: <Label value="object"/>')
    if not alone and not named:
        ours = tuple(n for n in labels if n.casefold() in {kind.casefold(), element.get("name", "").casefold()})
        labels = ours or labels
    return BoxControl(box.get("name", ""), to_name, labels, tag)


def _belongs_to_another(root: Element, element: Element, box: Element) -> bool:
    return any(
        box.get("name") == f"{e.get('name')}_bbox" for e in children_of(root, "keypointlabels") if e is not element
    )


def _occluded(root: Element, from_name: str, to_name: str) -> tuple[str | None, str]:
    """The per-region Choices that marks hidden points, and its choice that says so."""
    for element in children_of(root, "choices"):
        if not (flag(element, "perRegion", False) and element.get("name") and element.get("toName") == to_name):
            continue
        if element.get("whenTagName", from_name) != from_name or element.get("whenLabelValue"):
            continue  # asked for other regions, or for a single label only
        for choice in children_of(element, "choice"):
            if {choice.get(key, "").strip().casefold() for key in ("value", "alias")} & set(OCCLUDED_WORDS):
                return element.get("name"), wire_of(choice)
    return None, ""


def _pairs(element: Element, attribute: str, words: dict[str, int]) -> tuple[tuple[int, int], ...]:
    """`a-b,c-d` → index pairs. Pairs are separated by "," (or ";" where one stands), the two labels by "-". A label may hold "-"
    itself as long as only one reading gives two known labels. For any other names there is JSON: `[["a-b","c,d"]]`."""
    text = element.get(attribute, "").strip()
    if not text:
        return ()
    if text.startswith("["):
        try:
            ends = [(str(a), str(b)) for a, b in json.loads(text)]
        except (ValueError, TypeError):
            raise SchemaError(
                f'{attribute} of {show(element)} is no JSON list of pairs like [["head","neck"]]: found {text[:80]}'
            ) from None
        unknown = [w for pair in ends for w in pair if w not in words]
    else:
        ends, unknown = [], []
        for chunk in (c.strip() for c in text.split(";" if ";" in text else ",")):
            cuts = [(chunk[: m.start()].strip(), chunk[m.end() :].strip()) for m in re.finditer("-", chunk)]
            known = [(a, b) for a, b in cuts if a in words and b in words]
            if len(known) > 1:
                raise SchemaError(f"'{chunk}' in {attribute} of {show(element)} can be read in {len(known)} ways. "
                                  f'Write JSON instead: {attribute}=\'[["{known[0][0]}","{known[0][1]}"]]\'')  # fmt: skip
            ends += known
            unknown += [chunk] if chunk and not known else []
    if unknown:
        example = "-".join(list(words)[:2])
        raise SchemaError(f"'{unknown[0]}' in {attribute} of {show(element)} does not name known labels. Known: {', '.join(words)}. "
                          f'Expected pairs like {attribute}="{example}".')  # fmt: skip
    pairs = tuple(dict.fromkeys((words[a], words[b]) for a, b in ends))
    if any(a == b for a, b in pairs):
        raise SchemaError(f"{attribute} of {show(element)} pairs a point with itself: {text[:80]}")
    return pairs
