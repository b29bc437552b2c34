"""Token ids of what people typed: no text of theirs becomes a control token."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=8)
def _control_words(tokenizer: Any) -> re.Pattern:
    """What the tokenizer would read as a control token though it does not call it special, like ``<think>``.

    Those are marked off by punctuation; words and white space that were added to a vocabulary are ordinary text.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    marked = [re.escape(word) for word in added if re.fullmatch(r"[^\w\s].*[^\w\s]", word, re.DOTALL)]
    return re.compile("|".join(sorted(marked, key=len, reverse=True)) or r"(?!)")


def plain_ids(tokenizer: Any, *texts: str, **kwargs: Any) -> list[int]:
    """Token ids of a text, or of a text pair, in which ``</s>`` or ``<|im_end|>`` is text like any other.

    What the tokenizer adds of its own (BOS, CLS, SEP) is added as ever, and texts without such words get the ids they
    always got.

    Args:
        tokenizer: a transformers tokenizer.
        kwargs: for the tokenizer, e.g. ``add_special_tokens``.
    """
    words = _control_words(tokenizer)
    broken = [words.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) for text in texts]
    return list(tokenizer(*broken, split_special_tokens=True, **kwargs).input_ids)
