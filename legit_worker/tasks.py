"""The built-in tasks, and their aliases.

In: JSON, from any client. Out: JSON. Bad input is refused before it reaches a batch, with `InvalidInputError`, and
never retried.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery

from legit_worker.errors import InvalidInputError
from legit_worker.models.handle import Handle
from legit_worker.models.protocol import ImageFile
from legit_worker.settings import Settings

logger = logging.getLogger(__name__)

#: Items in one task. More is better sent as several tasks: they share batches anyway, and one bad item fails fewer.
MAX_ITEMS = 2048

#: Characters in one text: some forty times what the longest models take. Tokenizing is the one step whose time grows
#: with what a client sends.
MAX_CHARACTERS = 1_000_000

#: Bytes in one encoded image, before base64.
MAX_IMAGE_BYTES = 32 * 2**20

#: Pixels in one image: a large camera's. A file of half a megabyte can claim a hundred times as many.
MAX_IMAGE_PIXELS = 64_000_000


def embed_text(text: Any, model: str | None = None, normalize: bool | None = None, truncate: bool = True) -> Any:
    """Embed a text, or a list of texts.

    `model=None` is the one configured model of kind `embed`; `normalize=None` leaves the length to the model;
    `truncate=False` refuses a text that the model would cut. Returns floats, `[dim]` or `[n, dim]`. Raises
    `InvalidInputError`, `UnknownModelError`, `ModelLoadError`.
    """
    handle = Handle(model, "embed")
    texts = _items(text, "text", _check_text)
    if not truncate:
        for index, item in enumerate(texts):
            _at(index, text, handle.check_length, item)
    return _plain(handle.encode(text, **_normalizing(normalize)))


def embed_image(image: Any, model: str | None = None, normalize: bool | None = None) -> Any:
    """Embed an image, or a list of images, each as base64 of a file that Pillow reads.

    Arguments, result and errors as for `embed_text`, with kind `image`.
    """
    handle = Handle(model, "image")
    images = _items(image, "image", _open_image)
    return _plain(handle.encode(images if isinstance(image, list) else images[0], **_normalizing(normalize)))


def rerank(
    query: Any, documents: Any, model: str | None = None, top_k: int | None = None
) -> list[dict[str, int | float]]:
    """Score documents against a query, best first.

    `model=None` is the one configured model of kind `rerank`; `top_k=None` returns all. Returns
    `[{"index": place in documents, "score": float}]`. Raises as `embed_text` does.
    """
    _check_text(query)
    if not isinstance(documents, list):
        raise InvalidInputError(f"documents must be a list of texts, got {type(documents).__name__}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InvalidInputError(f"top_k must be a whole number of at least 1, got {top_k!r}")
    texts = _items(documents, "documents", _check_text)
    scores = Handle(model, "rerank").predict([(query, text) for text in texts])
    if scores.ndim != 1:
        raise InvalidInputError(f"model {model!r} gives {scores.shape[1]} scores per pair: it classifies, not ranks")
    best = sorted(enumerate(_plain(scores)), key=lambda pair: -pair[1])[:top_k]
    return [{"index": index, "score": score} for index, score in best]


BUILT_IN: dict[str, Callable[..., Any]] = {"embed_text": embed_text, "embed_image": embed_image, "rerank": rerank}


def register(app: Celery, chosen: Settings) -> None:
    """Add the built-in tasks and their aliases to an app. Twice is as good as once."""
    labels = {source.value for source in chosen.app_from if source.kind == "kwarg"}
    for name, function in BUILT_IN.items():
        _register(app, f"legit_worker.{name}", function, dict.fromkeys(labels))
        for alias, renames in chosen.tasks.get(name, {}).items():
            _register(app, alias, function, {**dict.fromkeys(labels), **(renames or {})})


def _register(app: Celery, name: str, function: Callable[..., Any], renames: Mapping[str, str | None]) -> None:
    """One task, unless the app has it. `renames`: the function's name for a caller's argument, None to drop it."""

    if name in app.tasks:
        if not hasattr(app.tasks[name], "is_legit_worker"):
            logger.warning("%s is a task of the project's own, which keeps the name: no alias was made", name)
        return

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        named = ((renames.get(key, key), value) for key, value in kwargs.items())
        return function(*args, **{key: value for key, value in named if key is not None})

    # Celery would refuse, at the client, arguments that only the rename makes right.
    # Nor should other apps of the process get the task, as Celery would have it by default.
    app.task(name=name, typing=False, lazy=False, shared=False, is_legit_worker=True)(run)


def _items(value: Any, name: str, check: Callable[[Any], Any]) -> list[Any]:
    """The items of a list, or the one item, each as `check` returns it. Raises `InvalidInputError`."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InvalidInputError(f"{name} is an empty list: send at least one item")
    if len(items) > MAX_ITEMS:
        raise InvalidInputError(f"{name} has {len(items)} items and one task takes {MAX_ITEMS}: send several tasks")
    return [_at(index, value, check, item) for index, item in enumerate(items)]


def _at(index: int, value: Any, check: Callable[[Any], Any], item: Any) -> Any:
    """`check(item)`, whose error names the item's place where there is more than one."""
    try:
        return check(item)
    except InvalidInputError as error:
        if isinstance(value, list):
            raise InvalidInputError(f"item {index}: {error}") from None
        raise


def _check_text(text: Any) -> str:
    if isinstance(text, float) and not math.isfinite(text):
        raise InvalidInputError(f"expected text, got {text}, which is not even a finite number")
    if not isinstance(text, str):
        raise InvalidInputError(f"expected text, got {type(text).__name__}: send a string")
    if not text.strip():
        raise InvalidInputError("the text is empty: send at least one word")
    if len(text) > MAX_CHARACTERS:
        raise InvalidInputError(f"the text has {len(text)} characters and one may have {MAX_CHARACTERS}: split it")
    return text


def _open_image(image: Any) -> ImageFile:
    """The image file in a base64 string, its head read and its pixels not yet."""
    from PIL import Image

    if not isinstance(image, str) or not image:
        raise InvalidInputError(f"expected an image as base64, got {type(image).__name__}")
    if len(image) > MAX_IMAGE_BYTES * 4 / 3:
        raise InvalidInputError(f"the image has over {MAX_IMAGE_BYTES} bytes, the most that one may have: resize it")
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(image, validate=True)))
    except (binascii.Error, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"the image can't be read: {error}") from None
    if opened.width * opened.height > MAX_IMAGE_PIXELS:
        raise InvalidInputError(
            f"the image has {opened.width} x {opened.height} pixels and one may have {MAX_IMAGE_PIXELS}: resize it"
        )
    return ImageFile(opened)


def _normalizing(normalize: bool | None) -> dict[str, bool]:
    return {} if normalize is None else {"normalize_embeddings": bool(normalize)}


def _plain(values: Any) -> Any:
    """An array as JSON-safe lists. Raises `InvalidInputError` where the model gave no finite number."""
    import numpy as np

    if not np.isfinite(values).all():
        raise InvalidInputError("the model's result is not finite for this input")
    return values.tolist()
