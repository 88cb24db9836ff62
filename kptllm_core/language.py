"""Words: normalising keypoint names, the tokenizer, writing questions and reading answers. Imports no torch.

One question is a short segment of tokens; its answer is the state of its last token:

    <ask>  PROMPT  <is>  left  front  paw  <keypoint>

PROMPT is the slot that a prompt token takes (or <none>). After <is> the model says what the point is (identify), and
<keypoint> then locates it (detect). A name that is known is written there; one that is unknown is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, ASK, NONE, IS, KEYPOINT = "<pad>", "<ask>", "<none>", "<is>", "<keypoint>"
SPECIAL = (PAD, ASK, NONE, IS, KEYPOINT)
MAX_NAME_TOKENS = 24
_SIDES = {"l": "left", "r": "right", "lft": "left", "rgt": "right", "lt": "left", "rt": "right"}


def plain_words(name: str) -> str:
    """A keypoint's name as plain words: `forelegR1` → `right foreleg 1`, `eye_(left)` → `left eye`, `LShoulder` → `left shoulder`.

    Sides come first, so that the same point reads the same however a project spells it. This is also the string rule of
    the naming accuracy: two names are equal if their plain words are.
    """
    spaced = re.sub(r"([a-z\d])([A-Z])", r"\1 \2", name)
    spaced = re.sub(r"\b([LR])([A-Z][a-z])", r"\1 \2", spaced)
    words = [_SIDES.get(w, w) for w in re.findall(r"[^\W\d_]+|\d+", spaced.lower())]
    sides = [w for w in words if w in ("left", "right")]
    return " ".join(sides + [w for w in words if w not in ("left", "right")]) or name.strip().lower()


def train_tokenizer(names: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` entries, learned from names; any unicode text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(names, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or of a hub model, with our special tokens added where they are missing."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in SPECIAL if t != PAD]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


@dataclass(frozen=True)
class Questions:
    """K segments of T tokens for one image.

    tokens: (K, T) int64, padded at the end.
    prompted: (K,) bool, whether slot 1 takes a prompt token.
    length: (K,) int64, tokens used; the last one is <keypoint>.
    named: (K,) bool, whether the name is written out.
    """

    tokens: np.ndarray
    prompted: np.ndarray
    length: np.ndarray
    named: np.ndarray

    PROMPT_SLOT = 1
    IS_SLOT = 2


def write_questions(tokenizer: PreTrainedTokenizerBase, names: Sequence[str | None], prompted: Sequence[bool]) -> Questions:
    """One segment for each point. A name of None is left for the model to identify. Names are cut at 24 tokens."""
    special = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL if t != PAD}
    rows = []
    for name, has_prompt in zip(names, prompted, strict=True):
        words = tokenizer(plain_words(name), add_special_tokens=False)["input_ids"][:MAX_NAME_TOKENS] if name is not None else []
        rows.append([special[ASK], special[ASK] if has_prompt else special[NONE], special[IS], *words, special[KEYPOINT]])
    width = max(len(r) for r in rows)
    tokens = np.full((len(rows), width), tokenizer.pad_token_id, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return Questions(tokens, np.asarray(prompted, bool), np.array([len(r) for r in rows], np.int64), np.array([n is not None for n in names]))


def read_name(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The words that the model generated between <is> and <keypoint>."""
    end = tokenizer.convert_tokens_to_ids(KEYPOINT)
    words = list(tokens)
    words = words[: words.index(end)] if end in words else words
    return tokenizer.decode(words, skip_special_tokens=True).strip()
