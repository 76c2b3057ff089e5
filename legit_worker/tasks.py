"""The built-in tasks, and their aliases.

In: JSON, from any client. Out: JSON. A task refuses bad input with `InvalidInputError` before it reaches a batch, and
never retries it.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

from celery import Celery

from legit_worker import settings
from legit_worker.errors import InvalidInputError
from legit_worker.models.handle import Handle
from legit_worker.models.preparing import each
from legit_worker.models.protocol import ImageFile
from legit_worker.prep import processes, sources
from legit_worker.prep.images import MAX_BYTES, open_image, pixels, resize_of, shrink
from legit_worker.prep.texts import PreparedText, tokenizer_of
from legit_worker.settings import Settings

logger = logging.getLogger(__name__)

#: The most items in one task. Several tasks are better: they share batches anyway, and a bad item fails fewer others.
MAX_ITEMS = 2048

#: The most characters in one text: about forty times what the longest models take. The time of tokenizing grows with
#: the text, even if the model then cuts it.
MAX_CHARACTERS = 1_000_000


def embed_text(text: Any, model: str | None = None, normalize: bool | None = None, truncate: bool = True) -> Any:
    """Embed a text, a result of `prep_text`, or a list of these.

    `model=None` is the one configured model of kind `embed`; `normalize=None` leaves the vector's length to the model;
    `truncate=False` refuses a text that the model would cut. Returns floats, `[dim]` or `[n, dim]`. Raises
    `InvalidInputError`, `UnknownModelError`, `ModelLoadError`.
    """
    if isinstance(text, list) and text and all(map(_is_chunks, text)):
        rows = iter(embed_text([piece for pieces in text for piece in pieces], model, normalize, truncate))
        return [[next(rows) for _ in pieces] for pieces in text]
    handle = Handle(model, "embed")
    texts = _items(text, "text", _check_prepared)
    if not truncate:
        for index, item in enumerate(texts):
            _at(index, text, handle.check_length, item)
    return _plain(handle.encode(texts if isinstance(text, list) else texts[0], **_normalizing(normalize)))


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
    `[{"index": place in documents, "score": float}]`. Raises the errors of `embed_text`.
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


def prep_text(text: Any, model: str | None = None, chunk_tokens: int | None = None, overlap: int = 0) -> Any:
    """Tokenize a text, or each text of a list. `embed_text` gives the result the same vector as the text.

    `chunk_tokens` splits each text into a list of pieces. A piece has at most this many tokens, special ones included,
    and begins with the last `overlap` tokens of the piece before. Never touches a device, and never loads the model.
    If the tokenizer can't be read without the model, returns the text unchanged. Raises `InvalidInputError`,
    `UnknownModelError`.
    """
    slot = Handle(model, "embed").slot
    spec, texts = slot.spec, _items(text, "text", _check_text)
    tokenizer = tokenizer_of(spec.path, spec.revision) if spec.path and spec.kind == "embed" else None
    if tokenizer is None:
        if chunk_tokens is not None:
            raise InvalidInputError(f"model {model!r} has no tokenizer.json that could be read: chunk_tokens needs it")
        return text
    if chunk_tokens is None:
        done: list[Any] = each(lambda item: tokenizer.prepare(item).to_json(), texts, slot.alias)
    else:
        _check_counts(chunk_tokens=chunk_tokens, overlap=overlap)
        cut = functools.partial(tokenizer.chunks, tokens=chunk_tokens, overlap=overlap)
        done = each(lambda item: [piece.to_json() for piece in cut(item)], texts, slot.alias)
    return done if isinstance(text, list) else done[0]


def prep_image(image: Any, model: str | None = None) -> Any:
    """Fetch, decode and resize an image, or each image of a list, for `embed_image`. Returns base64 of a PNG.

    `image` is base64 of a file that Pillow reads, a path under one of `LEGIT_WORKER_PREP_ROOTS`, or a URL on one of
    `LEGIT_WORKER_PREP_HOSTS`. Never touches a device, and never loads the model. Raises `InvalidInputError`,
    `UnknownModelError`.
    """
    spec = Handle(model, "image").slot.spec
    edge = resize_of(spec.path, spec.revision) if spec.path and spec.kind == "image" else None
    done = _items(image, "image", lambda item: processes.run(_prepare_image, item, _limits(), edge, size=_size(item)))
    return done if isinstance(image, list) else done[0]


def _prepare_image(image: Any, limits: sources.Limits, edge: tuple[int, int] | None) -> str:
    return base64.b64encode(shrink(sources.read(image, limits), edge)).decode()


def _size(image: Any) -> int:
    """Return the bytes that one image takes on its way to a helper and back."""
    return len(image) if isinstance(image, str) and not sources.is_remote(image) else MAX_BYTES


@functools.cache
def _limits() -> sources.Limits:
    chosen = settings.load()
    return sources.Limits(
        max_bytes=MAX_BYTES,
        roots=chosen.prep_roots,
        hosts=chosen.prep_hosts,
        allow_private=chosen.prep_private,
    )


BUILT_IN: dict[str, Callable[..., Any]] = {
    "embed_text": embed_text,
    "embed_image": embed_image,
    "rerank": rerank,
    "prep_text": prep_text,
    "prep_image": prep_image,
}


#: An argument with this name, or a task's name with this part, tells which built-in task a message may mean.
SIGNS = {"rerank": "rerank", "documents": "rerank", "image": "embed_image", "text": "embed_text", "embed": "embed_text"}


def suggest_alias(name: str, message: Any, **_: Any) -> None:
    """Log how to make an unknown name the alias of the built-in task that its message seems to mean.

    Celery's signal `task_unknown` calls this.
    """
    arguments = _argument_names(message)
    built_in = next((task for sign, task in SIGNS.items() if sign in arguments or sign in name.lower()), None)
    if built_in is None:
        return
    known = signature(BUILT_IN[built_in]).parameters
    renames = {argument: "…" for argument in arguments if argument not in known}
    logger.warning(
        "no task here is called %r. If it is legit_worker.%s by another name, set LEGIT_WORKER_TASKS__%s='%s'%s",
        *(name, built_in, built_in.upper(), json.dumps({name: renames}, ensure_ascii=False)),
        f", with {' or '.join(known)}, or null, in place of each …" if renames else "",
    )


def _argument_names(message: Any) -> list[str]:
    """Return the keyword arguments' names, in any version of Celery's protocol; none if the body can't be read."""
    with suppress(Exception):
        payload = message.payload
        return sorted(map(str, payload["kwargs"] if isinstance(payload, Mapping) else payload[1]))
    return []


def register(app: Celery, chosen: Settings) -> None:
    """Add the built-in tasks and their aliases to an app. A second call changes nothing."""
    labels = {source.value for source in chosen.app_from if source.kind == "kwarg"}
    for name, function in BUILT_IN.items():
        _register(app, f"legit_worker.{name}", function, dict.fromkeys(labels))
        for alias, renames in chosen.tasks.get(name, {}).items():
            _register(app, alias, function, {**dict.fromkeys(labels), **(renames or {})})


def _register(app: Celery, name: str, function: Callable[..., Any], renames: Mapping[str, str | None]) -> None:
    """Add one task unless the app has it. `renames`: the function's name for a caller's argument, None to drop it."""
    if name in app.tasks:
        if not hasattr(app.tasks[name], "is_legit_worker"):
            logger.warning("the project has a task %s: it keeps the name, and there is no alias of this name", name)
        return

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        named = ((renames.get(key, key), value) for key, value in kwargs.items())
        return function(*args, **{key: value for key, value in named if key is not None})

    # typing: Celery would refuse arguments at the client, before they are renamed.
    # shared: by default Celery gives a task to every app of the process.
    app.task(name=name, typing=False, lazy=False, shared=False, acks_late=True, is_legit_worker=True)(run)


def _items(value: Any, name: str, check: Callable[[Any], Any]) -> list[Any]:
    """Check each item of a list, or the one item, and return the results. Raises `InvalidInputError`."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InvalidInputError(f"{name} is an empty list: send at least one item")
    if len(items) > MAX_ITEMS:
        raise InvalidInputError(f"{name} has {len(items)} items and one task takes {MAX_ITEMS}: send several tasks")
    return [_at(index, value, check, item) for index, item in enumerate(items)]


def _at(index: int, value: Any, check: Callable[[Any], Any], item: Any) -> Any:
    """Return `check(item)`. If `value` is a list, an error names the item's place."""
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


def _is_chunks(item: Any) -> bool:
    """Tell whether the item is the pieces of one text, as `prep_text` returns them with `chunk_tokens`."""
    return isinstance(item, list) and bool(item) and all(isinstance(piece, dict) for piece in item)


def _check_prepared(text: Any) -> Any:
    return PreparedText.from_json(text) if isinstance(text, dict) else _check_text(text)


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise InvalidInputError(f"{name} must be a whole number, got {count!r}")


def _open_image(image: Any) -> Any:
    """Read an image in base64. A helper decodes it; without helpers, only its head is read now."""
    if not isinstance(image, str) or not image:
        raise InvalidInputError(f"expected an image as base64, got {type(image).__name__}")
    if len(image) > MAX_BYTES * 4 / 3:
        raise InvalidInputError(f"the image has over {MAX_BYTES} bytes, the most that one may have: resize it")
    try:
        file = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"the image can't be read: {error}") from None
    if processes.helpers() is None:
        return ImageFile(open_image(file))
    from PIL import Image

    return Image.frombytes("RGB", *processes.run(pixels, file, size=len(file)))


def _normalizing(normalize: bool | None) -> dict[str, bool]:
    return {} if normalize is None else {"normalize_embeddings": bool(normalize)}


def _plain(values: Any) -> Any:
    """Return an array as lists for JSON. Raises `InvalidInputError` if a number is not finite."""
    import numpy as np

    if not np.isfinite(values).all():
        raise InvalidInputError("the model's result is not finite for this input")
    return values.tolist()
