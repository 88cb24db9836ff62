"""What the annotator sees: label configs, templates for them, and regions as Label Studio draws them.

    schema.py       label config (XML) → KeypointSchema, tags, thresholds
    regions.py      KeypointSets in pixels → Label Studio's regions in per cent
    annotations.py  … and back: what a person drew → KeypointSets
    checks.py       would Label Studio show this prediction as meant?
    writer.py       KeypointSchema → label config
    markup.py       reading XML safely
    templates/      configs to start from: person, face, hand, animal, insect, rigid object, several objects

Knows nothing of HTTP, of the journal or of the model: no torch, no Flask; of kptllm_core only value types, geometry, errors.
"""

from __future__ import annotations

from pathlib import Path

from kptllm_core.errors import NotFound

TEMPLATES = Path(__file__).parent / "templates"


def template_names() -> list[str]:
    """The names that `load_template` takes."""
    return sorted(path.stem for path in TEMPLATES.glob("*.xml"))


def load_template(name: str) -> str:
    """The XML of a label config template; NotFound with the known names if there is none."""
    if name not in template_names():
        raise NotFound(f"There is no template '{name}'. Known: {', '.join(template_names())}.")
    return (TEMPLATES / f"{name}.xml").read_text(encoding="utf-8")
