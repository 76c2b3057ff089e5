"""The arguments of a task, read item by item.

In: JSON from any client. Out: typed items. An error names the place of its item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from legit_worker.errors import InvalidInputError, shown
from legit_worker.inputs.images import bytes_of, image_of
from legit_worker.inputs.limits import Limits
from legit_worker.inputs.options import wording_of
from legit_worker.inputs.texts import text_of
from legit_worker.inputs.types import ImageBytes, PreparedText, Text, TextAndImage


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
        pieces = [at(index, value, partial(_prepared, limits=limits), item) for index, item in enumerate(value)]
        check_pieces(pieces, name, limits)
        return list(pieces)

    def read(item: Any) -> Text | PreparedText:
        return _prepared(item, limits) if isinstance(item, dict) else text_of(item, limits.max_characters)

    return items_of(value, name, read, limits)


def _prepared(item: Any, limits: Limits) -> PreparedText:
    """Read a result of `prep_text`, whose prompt is bound as a task's own."""
    prepared = PreparedText.from_json(item)
    wording_of(None, None, prepared.prompt, limits.max_characters)
    return prepared


def check_pieces(pieces: list[PreparedText], name: str, limits: Limits) -> None:
    """Raise `InvalidInputError` if the pieces of one text are too many."""
    tokens = sum(len(piece.ids) for piece in pieces)
    if len(pieces) > limits.max_items and tokens > limits.max_characters:
        raise InvalidInputError(
            f"{name} has {len(pieces)} pieces of {tokens} tokens in all, and one text may have {limits.max_items} "
            f"pieces, or {limits.max_characters} tokens: send several tasks"
        )


def images_or_both_of(value: Any, name: str, limits: Limits) -> list[ImageBytes | TextAndImage]:
    """Read an image in base64, or `{"text": text, "image": image}`, or a list of these. Decodes no pixels.

    Raises `InvalidInputError`.
    """
    images = _Images(limits, is_list=isinstance(value, list))

    def read(item: Any) -> ImageBytes | TextAndImage:
        if not isinstance(item, dict):
            return images.read(item)
        if item.keys() != {"text", "image"}:
            raise InvalidInputError(
                f'expected an image as base64, or {{"text": …, "image": …}}, got dict with '
                f"{shown(sorted(map(str, item)))}"
            )
        return {"text": text_of(item["text"], limits.max_characters), "image": images.read(item["image"])}

    return items_of(value, name, read, limits)


class _Images:
    """Reads the images of one task, and counts their pixels."""

    def __init__(self, limits: Limits, *, is_list: bool) -> None:
        self._limits, self._is_list = limits, is_list
        self._pixels = self._count = 0

    def read(self, item: Any) -> ImageBytes:
        """Raises `InvalidInputError`."""
        if not isinstance(item, str):
            raise InvalidInputError(f"expected an image as base64, got {type(item).__name__}")
        if not item:
            raise InvalidInputError("the image is empty: send a file as base64")
        image, size = image_of(bytes_of(item, self._limits.max_image_bytes), self._limits)
        self._pixels, self._count = self._pixels + size, self._count + 1
        self._limits.check_pixels(self._pixels, self._count)
        return replace(image, place=f"item {self._count - 1}: ") if self._is_list else image


def is_chunks(item: Any) -> bool:
    """Tell whether the item is the pieces of one text, as `prep_text` returns them with `chunk_tokens`."""
    return isinstance(item, list) and bool(item) and all(isinstance(piece, dict) for piece in item)


def check_counts(**counts: Any) -> None:
    """Raise `InvalidInputError` for a count that is no whole number."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise InvalidInputError(f"{name} must be a whole number, got {shown(count)}")
