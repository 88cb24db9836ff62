"""KeypointSchema → label config: what `make demo` gives a project whose points come from a COCO file.

Left points are blue, right ones orange, the others green, so that a swapped pair is seen at a glance. The first points get hotkeys
that Label Studio does not use itself; 0 marks the selected point as hidden. `schema.parse(config_of(s))` gives `s` back.
"""

from __future__ import annotations

import colorsys
import json
import re
from xml.sax.saxutils import quoteattr

from kptllm_core.errors import SchemaError
from kptllm_core.keypoints import KeypointSchema, symmetric_pairs

# Label Studio 1.23 has b e h k m o p r u v w for its tools and regions, shift+1, shift+2 and shift+r for the view.
_FREE = "qtasdfgzxcyijln"
HOTKEYS = (*"123456789", *_FREE, *(f"shift+{key}" for key in _FREE))
OCCLUDED_HOTKEY = "0"
_LEFT, _RIGHT, _MIDDLE = (0.52, 0.66), (0.02, 0.12), (0.25, 0.42)  # ranges of hue, 0…1
_LEFT_WORDS = {"left", "l", "links", "gauche", "izquierda", "izquierdo"}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def config_of(schema: KeypointSchema, box: bool = False) -> str:
    """A label config for these points on `$image`; with `box` also rectangles, for several objects in an image.

    SchemaError for names that XML cannot hold or that Label Studio could not tell apart.
    """
    for name in (*schema.names, schema.category):
        if not name.strip() or _NO_XML.search(name):
            raise SchemaError(
                f"The name {name!r} cannot stand in a label config: it is blank or holds control characters."
            )
    attributes = {"name": "keypoints", "toName": "image", "strokeWidth": "3", "opacity": "0.9"}
    if not box:
        attributes["model_category"] = schema.category
    if schema.skeleton:
        attributes["model_skeleton"] = _pairs_text(schema, schema.skeleton)
    if set(schema.symmetric) != set(symmetric_pairs(schema.names)):
        attributes["model_symmetric"] = _pairs_text(schema, schema.symmetric)
    lines = ["<View>", _tag("Image", {"name": "image", "value": "$image", "zoom": "true", "zoomControl": "true"}, 1)]
    if box:
        lines += [
            _tag("RectangleLabels", {"name": "keypoints_bbox", "toName": "image"}, 1, closed=False),
            _tag("Label", {"value": schema.category, "background": "#7a7a7a", "hotkey": HOTKEYS[-1]}, 2),
            "  </RectangleLabels>",
        ]
    lines.append(_tag("KeyPointLabels", attributes, 1, closed=False))
    for i, (name, colour) in enumerate(zip(schema.names, colours(schema), strict=True)):
        label = {"value": name, "model_index": str(i), "background": colour}
        if i < len(HOTKEYS) - box:
            label["hotkey"] = HOTKEYS[i]
        lines.append(_tag("Label", label, 2))
    choices = {"name": "visibility", "toName": "image", "perRegion": "true", "choice": "single"}
    lines += [
        "  </KeyPointLabels>",
        _tag("Choices", choices, 1, closed=False),
        _tag("Choice", {"value": "occluded", "hotkey": OCCLUDED_HOTKEY}, 2),
        "  </Choices>",
        "</View>",
        "",
    ]
    return "\n".join(lines)


def colours(schema: KeypointSchema) -> list[str]:
    """`#rrggbb` per point: blues on the left, oranges on the right, greens for what has no side."""
    side: dict[int, tuple[float, float]] = {}
    for a, b in schema.symmetric:
        swapped = bool(
            _LEFT_WORDS & set(re.findall(r"[^\W\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", schema.names[b]).lower()))
        )
        side[a], side[b] = (_RIGHT, _LEFT) if swapped else (_LEFT, _RIGHT)
    found = []
    for i in range(len(schema)):
        low, high = side.get(i, _MIDDLE)
        alike = [j for j in range(len(schema)) if side.get(j, _MIDDLE) == (low, high)]
        at = alike.index(i)
        hue = low + (high - low) * at / max(len(alike) - 1, 1)
        red, green, blue = colorsys.hls_to_rgb(hue, 0.42 if at % 2 else 0.52, 0.9)  # neighbours differ in lightness too
        found.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    return found


def _pairs_text(schema: KeypointSchema, pairs: tuple[tuple[int, int], ...]) -> str:
    """`a-b,c-d`, or JSON where a name holds what separates them; the inverse of reading `model_skeleton`."""
    named = [(schema.names[a], schema.names[b]) for a, b in pairs]
    plain = all(name == name.strip() and not set(name) & set("-,;[") for pair in named for name in pair)
    return ",".join(f"{a}-{b}" for a, b in named) if plain else json.dumps(named, ensure_ascii=False)


def _tag(tag: str, attributes: dict[str, str], depth: int, closed: bool = True) -> str:
    text = " ".join(f"{key}={quoteattr(value)}" for key, value in attributes.items())
    return f"{'  ' * depth}<{tag} {text}{'/' if closed else ''}>"
