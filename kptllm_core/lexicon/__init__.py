"""What points are called: synonyms, ten languages and where they lie. The tables beside this file are its data.

A name is read as a chain of known phrases: `left hind paw` = left + hind + paw. Each phrase has a canonical English form,
other names, translations and perhaps a description, so that a chain can be read in any of them and written in any of
them. Training writes names in many ways; asking by text reads them back to the canonical one. Imports no torch.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kptllm_core.language import plain_words

LANGUAGES = ("de", "fr", "es", "it", "pt", "nl", "pl", "ru", "zh", "ja")
STYLES = ("synonyms", "where", *LANGUAGES)
"""In which a name can be written, besides the canonical one."""
_SHARE = np.array([0.5, 0.2] + [0.03] * len(LANGUAGES))
_UNSPACED = ("zh", "ja")
_LONGEST = 6  # words of a phrase


@dataclass(frozen=True)
class Phrase:
    """A part or a modifier. forms: its names in each style, the canonical English one under "en"."""

    forms: dict[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.forms["en"][0]


class Lexicon:
    """All phrases, found by any of their forms."""

    def __init__(self, phrases: list[Phrase]) -> None:
        self.phrases = phrases
        self._found: dict[str, dict[str, Phrase]] = {}
        for phrase in phrases:
            for style, forms in phrase.forms.items():
                book = self._found.setdefault("en" if style == "synonyms" else style, {})
                for form in forms:
                    book.setdefault(plain_words(form), phrase)
        for phrase in phrases:  # a canonical name always means itself, whatever else uses the word
            self._found["en"][plain_words(phrase.name)] = phrase

    def canonical(self, name: str) -> str:
        """The plain English words of a name in any known form; other names come back as their plain words."""
        words = plain_words(name)
        for style in ("en", *LANGUAGES):
            chain = self._read(words, style)
            if chain and all(isinstance(p, Phrase) or p.isdigit() for p in chain):
                return plain_words(" ".join(p.name if isinstance(p, Phrase) else p for p in chain))
        chain = self._read(words, "en")
        return plain_words(" ".join(p.name if isinstance(p, Phrase) else p for p in chain))

    def style(self, rng: np.random.Generator) -> str:
        """A style at random."""
        return STYLES[int(rng.choice(len(STYLES), p=_SHARE / _SHARE.sum()))]

    def write(self, name: str, style: str, rng: np.random.Generator) -> str:
        """A name in another style; the plain words where the style has none for it."""
        plain = plain_words(name)
        chain = self._read(plain, "en")
        if style == "where":
            return self._describe(chain) or plain
        written = []
        for part in chain:
            forms = part.forms.get(style, ()) if isinstance(part, Phrase) else (part,)
            if isinstance(part, Phrase) and style == "synonyms":
                forms = (*forms, part.name)
            if not forms or (isinstance(part, str) and style != "synonyms" and not part.isdigit()):
                return plain
            written.append(forms[int(rng.integers(len(forms)))])
        if style not in ("synonyms", *_UNSPACED) and rng.random() < 0.5:
            written = written[1:] + written[:1]  # adjectives follow their noun as often as not
        return ("" if style in _UNSPACED else " ").join(written)

    def texts(self) -> Iterator[str]:
        """Everything that is written in the tables: what a tokenizer learns from."""
        for phrase in self.phrases:
            for forms in phrase.forms.values():
                yield from forms

    def _describe(self, chain: list[Phrase | str]) -> str:
        """The description of the chain's part, with the words around it in front."""
        at = next((i for i in reversed(range(len(chain))) if isinstance(chain[i], Phrase) and chain[i].forms.get("where")), None)  # type: ignore[union-attr]
        if at is None:
            return ""
        words = [p.name if isinstance(p, Phrase) else p for i, p in enumerate(chain) if i != at]
        return " ".join([*words, chain[at].forms["where"][0]])  # type: ignore[union-attr]

    def _read(self, words: str, style: str) -> list[Phrase | str]:
        """The longest known phrases of plain words, from the left; unknown words stay words."""
        book = self._found.get(style, {})
        left = words.split()
        chain: list[Phrase | str] = []
        while left:
            for count in range(min(_LONGEST, len(left)), 0, -1):
                phrase = book.get(" ".join(left[:count]))
                if phrase is not None:
                    break
            chain.append(phrase if phrase is not None else left[0])
            left = left[count if phrase is not None else 1 :]
        return self._unspaced(words, book) or chain if style in _UNSPACED and " " not in words else chain

    def _unspaced(self, text: str, book: dict[str, Phrase]) -> list[Phrase | str]:
        """A chain in a script without spaces, or nothing if a rest is left."""
        chain: list[Phrase | str] = []
        while text:
            count = next((n for n in range(len(text), 0, -1) if text[:n] in book or (n == 1 and text[0].isdigit())), 0)
            if not count:
                return []
            chain.append(book.get(text[:count], text[:count]))
            text = text[count:]
        return chain


@cache
def lexicon() -> Lexicon:
    """The tables of the package, read once."""
    phrases = []
    for path in sorted(Path(__file__).parent.glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                forms = {style: tuple(f.strip() for f in (row[style] or "").split("|") if f.strip()) for style in ("en", *STYLES)}
                phrases.append(Phrase({style: found for style, found in forms.items() if found}))
    return Lexicon(phrases)
