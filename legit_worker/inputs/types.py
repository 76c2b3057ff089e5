"""What has passed the border. Data only.

In: values that `reading` has checked. Out: types that say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from legit_worker.errors import InvalidInputError, shown

#: The key that marks a prepared text, and the version of its form.
MARK, VERSION = "prepared", 1


class Text(str):
    """A text that was checked: it is not blank, is valid Unicode, and has no more characters than one may have."""

    __slots__ = ()


class Pair(NamedTuple):
    """Two texts, of which a reranker scores the second against the first."""

    query: Text
    document: Text


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image's file. Its head was read; its pixels are decoded when its turn comes, and are not kept."""

    file: bytes
    #: The formats that it may have, as Pillow names them. Its own is among them.
    formats: tuple[str, ...]
    #: What an error calls it: `item 3: ` for one of a list.
    place: str = ""

    def decode(self) -> Any:
        """A `PIL.Image.Image` in RGB, turned as its camera noted, on white. Raises `InvalidInputError`."""
        from legit_worker.inputs.images import decode

        return decode(self)


class TextAndImage(TypedDict):
    """A text and an image that are one input, as sentence-transformers takes them."""

    text: Text
    image: ImageBytes


@dataclass(frozen=True, slots=True)
class PreparedText:
    """A text's token ids."""

    #: Special tokens included.
    ids: tuple[int, ...]
    #: The fingerprint of the tokenizer that made them.
    tokenizer: str
    #: Whether the text was longer than the model takes, so that these ids are only its beginning.
    cut: bool = False
    #: What stands before the text, and is among these ids; None: whoever prepared the text knew of no prompt.
    prompt: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Write the JSON that `prep_text` returns."""
        prompted = {} if self.prompt is None else {"prompt": self.prompt}
        return {MARK: VERSION, "ids": list(self.ids), "tokenizer": self.tokenizer, "cut": self.cut, **prompted}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PreparedText:
        """Read the JSON of `to_json`, from any sender. Raises `InvalidInputError`."""
        match value:
            case {"prepared": 1, "ids": [_, *_] as ids, "tokenizer": str(tokenizer), "cut": bool(cut)} if all(
                type(number) is int and number >= 0 for number in ids
            ) and isinstance(prompt := value.get("prompt"), str | None):
                return cls(tuple(ids), tokenizer, cut, prompt)
        raise InvalidInputError(
            f"expected text, or what prep_text returns, got dict with {shown(sorted(map(str, value)))}"
        )
