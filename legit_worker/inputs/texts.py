"""Texts from strangers.

In: any value. Out: `Text`, or `InvalidInputError`.
"""

from __future__ import annotations

import math
from typing import Any
from unicodedata import category

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.types import Text

#: The kinds of characters that show nothing: all white space, controls, and invisible marks such as a zero-width space,
#: a byte order mark or a change of direction.
INVISIBLE = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})


def text_of(value: Any, most: int) -> Text:
    """Check a text of at most `most` characters. Raises `InvalidInputError`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInputError(f"expected text, got {value}, which is not even a finite number")
    if not isinstance(value, str):
        raise InvalidInputError(f"expected text, got {type(value).__name__}: send a string")
    if len(value) > most:
        raise InvalidInputError(f"the text has {len(value)} characters and one may have {most}: split it")
    if is_blank(value):
        raise InvalidInputError("the text is empty: send at least one word")
    check_unicode(value)
    return Text(value)


def is_blank(text: str) -> bool:
    """Tell whether no character of the text shows anything."""
    return all(category(character) in INVISIBLE for character in text)


def check_unicode(text: str) -> None:
    """Raise `InvalidInputError` if UTF-8 can't encode the text."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the text is not valid Unicode: {error}") from None
