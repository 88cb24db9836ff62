"""Label configs as XML elements: read safely, searched as Label Studio searches them, quoted in messages.

Tags are matched whatever their case, as Label Studio's front end does; attributes as they are written.
"""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from kptllm_core.errors import SchemaError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 100


class _SafeBuilder(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE (and with it every entity) and absurd nesting while the text is being read."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def doctype(self, *_: Any) -> None:
        raise SchemaError(
            "The label config has a DOCTYPE; entities and external files are refused. Remove the <!DOCTYPE …> line."
        )

    def start(self, tag: Any, attrs: Any) -> Element:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SchemaError(f"The label config is nested deeper than {MAX_DEPTH} tags.")
        return super().start(tag, attrs)

    def end(self, tag: Any) -> Element:
        self._depth -= 1
        return super().end(tag)


def parse_xml(config: str) -> Element:
    """The root element; SchemaError for anything that is no plain XML."""
    if not isinstance(config, str) or not config.strip():
        raise SchemaError("The label config is empty; expected XML with <KeyPointLabels> and <Image>.")
    if len(config) > MAX_CHARACTERS:
        raise SchemaError(f"The label config has {len(config)} characters; at most {MAX_CHARACTERS} are read.")
    try:
        parser = ElementTree.XMLParser(target=_SafeBuilder())  # noqa: S314 - refuses DOCTYPE, so no entity can be declared
        return ElementTree.fromstring(config.strip(), parser=parser)  # noqa: S314
    except (ElementTree.ParseError, UnicodeEncodeError, ValueError) as error:
        raise SchemaError(
            f'The label config is no valid XML: {error}. In attributes write &lt; &amp; &quot; for < & ".'
        ) from None


def children_of(element: Element, tag: str) -> list[Element]:
    """All elements of that tag below `element`, at any depth, in the order of the text."""
    return [e for e in element.iter() if e is not element and isinstance(e.tag, str) and e.tag.lower() == tag]


def wire_of(element: Element) -> str:
    """What a Label or Choice is called in annotations and predictions: its alias where it has one, else its value."""
    return element.get("alias") or element.get("value") or ""


def show(element: Element) -> str:
    """The opening tag, for messages: `<KeyPointLabels name="kp" toName="image">`."""
    wanted = ((key, element.get(key)) for key in ("name", "toName", "value"))
    return f"<{element.tag}{''.join(f' {key}=' + chr(34) + value[:60] + chr(34) for key, value in wanted if value)}>"


def flag(element: Element, attribute: str, default: bool) -> bool:
    """`true`/`false` (also 1/0, yes/no) of an attribute."""
    text = element.get(attribute, "").strip().lower()
    if not text:
        return default
    if text not in ("true", "1", "yes", "false", "0", "no"):
        raise SchemaError(f'{show(element)} has {attribute}="{text}"; expected "true" or "false".')
    return text in ("true", "1", "yes")


def number(element: Element, attribute: str, default: float | None) -> float | None:
    """A positive number of an attribute."""
    text = element.get(attribute, "").strip()
    if not text:
        return default
    value = _float(text)
    if value is None or value <= 0:
        raise SchemaError(f'{show(element)} has {attribute}="{text[:40]}"; expected a number above 0.')
    return value


def fraction(element: Element, attribute: str, default: float) -> float:
    """A number from 0 to 1 of an attribute."""
    text = element.get(attribute, "").strip()
    if not text:
        return default
    value = _float(text)
    if value is None or not 0 <= value <= 1:
        raise SchemaError(
            f'{show(element)} has {attribute}="{text[:40]}"; expected a number from 0 to 1, as in {attribute}="0.3".'
        )
    return value


def integer(element: Element, attribute: str, default: int | None) -> int | None:
    """A whole number from 0 of an attribute."""
    text = element.get(attribute, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise SchemaError(f'{show(element)} has {attribute}="{text[:40]}"; expected a whole number from 0.')
    return int(text)


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
