"""Texts and images, for a library that guesses what its inputs are.

In: a loaded sentence-transformers model, and inputs. Out: the same inputs in a form that says what each is. If a string
looks like the address of a picture, a sound or a film, a multimodal model fetches it, or reads the file.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modality import infer_modality

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.types import ImageBytes
from legit_worker.models.features import check_text, what
from legit_worker.models.methods import away
from legit_worker.prep.images import Edge, decoded

#: What an input may be made of.
PARTS = {"text", "image"}

#: What a model may take besides media: texts, and conversations, which this package never sends.
HARMLESS = {"text", "message"}


def check_image(value: Any) -> None:
    """Raise `InvalidInputError` if `value` is neither an image in pixels, nor a text, nor a dict of such parts."""
    from PIL.Image import Image

    parts = value if isinstance(value, dict) else {"image" if isinstance(value, Image) else "text": value}
    if not parts or not parts.keys() <= PARTS:
        raise InvalidInputError(f"expected an image, a text, or a dict of both, got {what(value)}")
    if "text" in parts:
        check_text(parts["text"])
    if "image" in parts and not isinstance(parts["image"], Image):
        raise InvalidInputError(f"expected an image, got {what(parts['image'])}")


def with_pixels(value: Any, edge: Edge | None) -> Any:
    """Decode the images in an input. Called in a model's method: others may come into it, since a helper may decode."""
    if isinstance(value, dict):
        return {name: with_pixels(part, edge) for name, part in value.items()}
    if hasattr(value, "__array_interface__") and not hasattr(value, "getpixel") and not isinstance(value, str):
        return _of_array(value)  # a text of numpy is an array, too
    if not isinstance(value, ImageBytes):
        return value
    with away():
        return decoded(value, edge)


def _of_array(value: Any) -> Any:
    """Make an image of a numpy array. The library guesses of other arrays which of their axes is which."""
    from PIL import Image

    if value.dtype != "uint8" or value.ndim != 3 or value.shape[2] != 3:
        raise InvalidInputError(
            f"an image as an array has the shape [height, width, 3] and the dtype uint8, and this one has "
            f"{list(value.shape)} and {value.dtype}: give a PIL.Image.Image"
        )
    return Image.fromarray(value)


class AsText:
    """Marks the texts among one model's inputs."""

    def __init__(self, model: Any) -> None:
        """`model`: the library's object. One text is tried with it."""
        self._model = model
        modalities = set(model.modalities)
        self._guesses = not modalities <= HARMLESS
        self._takes_marks = self._guesses and _takes_marks(model)
        # The two texts of a pair become messages, of which the library guesses again, unless these are flat strings.
        formatter = getattr(model[0], "input_formatter", None)
        self._marks_pairs = "message" in modalities and getattr(formatter, "message_format", "") != "flat"

    def __call__(self, value: Any) -> Any:
        """Return the input as the library takes it for what it is. Raises `InvalidInputError` if there is no way."""
        if isinstance(value, str):
            return self._marked(value) if self._guesses else value
        if isinstance(value, list | tuple) and self._marks_pairs:
            return tuple({"text": part} for part in value)
        return value

    def _marked(self, text: str) -> Any:
        if self._takes_marks:
            return {"text": text}
        if infer_modality(text, self._model.modalities) != "text":
            raise InvalidInputError(f"this model would take the text {text[:40]!r} for the address of a file")
        return text


def _takes_marks(model: Any) -> bool:
    """Tell whether the model's first module takes a text that is marked as one."""
    try:
        model.preprocess([{"text": "A text."}])
    except Exception:  # a module that takes plain strings alone, behind a router
        return False
    return True
