"""Bytes that come as text.

In: a string. Out: its bytes, or `InvalidInputError`. Padded base64 is read, in both alphabets, with line breaks, and
behind a `data:` head.
"""

from __future__ import annotations

import base64
import binascii
import re

from legit_worker.errors import InvalidInputError

#: The longest head of a `data:` URI that is looked for.
HEAD = 256

#: What stands before the bytes in a `data:` URI.
_DATA = re.compile(r"\s*data:[^,]*,", re.IGNORECASE)

#: White space, which stands between lines of base64.
SPACES = b" \t\r\n\v\f"

#: From the alphabet for URLs to the usual one.
USUAL = bytes.maketrans(b"-_", b"+/")


def bytes_of(text: str, most: int) -> bytes:
    """Read at most `most` bytes. Raises `InvalidInputError`."""
    head = _DATA.match(text[:HEAD])
    if head and not head[0].lower().rstrip().endswith(";base64,"):
        raise InvalidInputError("the data: URI is not base64: its head must end in ;base64")
    try:
        raw = text[head.end() if head else 0 :].encode("ascii").translate(USUAL, delete=SPACES)
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"this is not base64: it has the character {text[error.start]!a}") from None
    size = len(raw) // 4 * 3 - raw[-2:].count(b"=")
    if size > most:
        raise InvalidInputError(
            f"the file has over {most} bytes, the most that one may have: it has {size}; resize the image"
        )
    if len(raw) % 4:
        raise InvalidInputError(f"this is not base64 with padding: its {len(raw)} characters are no multiple of 4")
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise InvalidInputError(f"this is not base64: {error}") from None
