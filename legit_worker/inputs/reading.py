"""The arguments of a task, read item by item.

In: JSON from any client. Out: typed items. An error names the place of its item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from legit_worker.errors import InvalidInputError, shown
from legit_worker.inputs.binary import bytes_of
from legit_worker.inputs.images import image_of
from legit_worker.inputs.limits import Limits
from legit_worker.inputs.texts import text_of
from legit_worker.inputs.types import ImageBytes, PreparedText, Text


def items_of(value: Any, name: str, read: Callable[[Any], Any], limits: Limits) -> list[Any]:
    """Read each item of a list, or the one item. Raises `InvalidInputError`."""
    items = value if isinstance(value, list) else [value]
    limits.check_count(items, name)
    return [at(index, value, read, item) for index, item in enumerate(items)]


def at(index: int, value: Any, read: Callable[[Any], Any], item: Any) -> Any:
    """Return `read(item)`. If `value` is a list, an error names the item's place."""
    try:
        return read(item)
    except InvalidInputError as error:
        if isinstance(value, list):
            raise InvalidInputError(f"item {index}: {error}") from None
        raise


def texts_of(value: Any, name: str, limits: Limits) -> list[Text]:
    """Read a text or a list of texts. Raises `InvalidInputError`."""
    return items_of(value, name, lambda item: text_of(item, limits.max_characters), limits)


def texts_or_prepared(value: Any, name: str, limits: Limits) -> list[Text | PreparedText]:
    """The same, each a text or a result of `prep_text`. Raises `InvalidInputError`.

    The pieces of a text may be more than the items of a list, if they have no more tokens than it may have characters.
    """
    if is_chunks(value) and len(value) > limits.max_items:
        pieces = [at(index, value, PreparedText.from_json, item) for index, item in enumerate(value)]
        check_pieces(pieces, name, limits)
        return list(pieces)

    def read(item: Any) -> Text | PreparedText:
        return PreparedText.from_json(item) if isinstance(item, dict) else text_of(item, limits.max_characters)

    return items_of(value, name, read, limits)


def check_pieces(pieces: list[PreparedText], name: str, limits: Limits) -> None:
    """Raise `InvalidInputError` if the pieces of one text are too many."""
    tokens = sum(len(piece.ids) for piece in pieces)
    if len(pieces) > limits.max_items and tokens > limits.max_characters:
        raise InvalidInputError(
            f"{name} has {len(pieces)} pieces of {tokens} tokens in all, and one text may have {limits.max_items} "
            f"pieces, or {limits.max_characters} tokens: send several tasks"
        )


def images_of(value: Any, name: str, limits: Limits) -> list[ImageBytes]:
    """Read an image in base64, or a list of images. Decodes no pixels. Raises `InvalidInputError`."""
    pixels = count = 0

    def read(item: Any) -> ImageBytes:
        nonlocal pixels, count
        if not isinstance(item, str) or not item:
            raise InvalidInputError(f"expected an image as base64, got {type(item).__name__}")
        image, size = image_of(bytes_of(item, limits.max_image_bytes), limits)
        pixels, count = pixels + size, count + 1
        limits.check_pixels(pixels, count)
        return image

    images = items_of(value, name, read, limits)
    if not isinstance(value, list):
        return images
    return [replace(one, place=f"item {index}: ") for index, one in enumerate(images)]


def is_chunks(item: Any) -> bool:
    """Tell whether the item is the pieces of one text, as `prep_text` returns them with `chunk_tokens`."""
    return isinstance(item, list) and bool(item) and all(isinstance(piece, dict) for piece in item)


def check_counts(**counts: Any) -> None:
    """Raise `InvalidInputError` for a count that is no whole number."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise InvalidInputError(f"{name} must be a whole number, got {shown(count)}")
