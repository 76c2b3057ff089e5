"""The built-in tasks, and their aliases.

In: JSON, from any client. Out: JSON. A task refuses bad input with `InvalidInputError` before it reaches a batch, and
never retries it: `inputs/` is the border.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

from celery import Celery

from legit_worker import apps, settings
from legit_worker.errors import InvalidInputError
from legit_worker.inputs.images import image_of
from legit_worker.inputs.limits import Limits, limits_of
from legit_worker.inputs.reading import at, check_counts, images_of, is_chunks, items_of, texts_of, texts_or_prepared
from legit_worker.inputs.texts import text_of
from legit_worker.inputs.types import Pair
from legit_worker.models.handle import Handle
from legit_worker.models.preparing import each
from legit_worker.prep import processes, sources
from legit_worker.prep.images import resize_of, shrink
from legit_worker.prep.texts import tokenizer_of
from legit_worker.settings import Settings

logger = logging.getLogger(__name__)

#: The most items in one task, unless `LEGIT_WORKER_MAX_ITEMS` says otherwise.
MAX_ITEMS: int = Settings.model_fields["max_items"].default


def embed_text(text: Any, model: str | None = None, normalize: bool | None = None, truncate: bool = True) -> Any:
    """Embed a text, a result of `prep_text`, or a list of these.

    `model=None` is the one configured model of kind `embed`; `normalize=None` leaves the vector's length to the model;
    `truncate=False` refuses a text that the model would cut. Returns floats, `[dim]` or `[n, dim]`. Raises
    `InvalidInputError`, `UnknownModelError`, `ModelLoadError`.
    """
    if isinstance(text, list) and text and all(map(is_chunks, text)):
        rows = iter(embed_text([piece for pieces in text for piece in pieces], model, normalize, truncate))
        return [[next(rows) for _ in pieces] for pieces in text]
    handle = Handle(model, "embed")
    texts = texts_or_prepared(text, "text", _limits())
    if not truncate:
        for index, item in enumerate(texts):
            at(index, text, handle.check_length, item)
    vectors = handle.encode(texts if isinstance(text, list) else texts[0], **_normalizing(normalize))
    return _plain(vectors, isinstance(text, list))


def embed_image(image: Any, model: str | None = None, normalize: bool | None = None) -> Any:
    """Embed an image, or a list of images, each as base64 of a file of one of `LEGIT_WORKER_IMAGE_FORMATS`.

    Arguments, result and errors as for `embed_text`, with kind `image`.
    """
    handle = Handle(model, "image")
    images = images_of(image, "image", _limits())
    vectors = handle.encode(images if isinstance(image, list) else images[0], **_normalizing(normalize))
    return _plain(vectors, isinstance(image, list))


def rerank(
    query: Any, documents: Any, model: str | None = None, top_k: int | None = None
) -> list[dict[str, int | float]]:
    """Score documents against a query, best first.

    `model=None` is the one configured model of kind `rerank`; `top_k=None` returns all. Returns
    `[{"index": place in documents, "score": float}]`. Raises the errors of `embed_text`.
    """
    limits = _limits()
    question = text_of(query, limits.max_characters)
    if not isinstance(documents, list):
        raise InvalidInputError(f"documents must be a list of texts, got {type(documents).__name__}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InvalidInputError(f"top_k must be a whole number of at least 1, got {top_k!r}")
    texts = texts_of(documents, "documents", limits)
    scores = Handle(model, "rerank").predict([Pair(question, text) for text in texts])
    if scores.ndim != 1:
        raise InvalidInputError(f"model {model!r} gives {scores.shape[1]} scores per pair: it classifies, not ranks")
    best = sorted(enumerate(_plain(scores, True)), key=lambda pair: -pair[1])[:top_k]
    return [{"index": index, "score": score} for index, score in best]


def prep_text(text: Any, model: str | None = None, chunk_tokens: int | None = None, overlap: int = 0) -> Any:
    """Tokenize a text, or each text of a list. `embed_text` gives the result the same vector as the text.

    `chunk_tokens` splits each text into a list of pieces. A piece has at most this many tokens, special ones included,
    and begins with the last `overlap` tokens of the piece before. Never touches a device, and never loads the model.
    If the tokenizer can't be read without the model, returns the text unchanged. Raises `InvalidInputError`,
    `UnknownModelError`.
    """
    slot = Handle(model, "embed").slot
    spec, texts = slot.spec, texts_of(text, "text", _limits())
    tokenizer = tokenizer_of(spec.path, spec.revision) if spec.path and spec.kind == "embed" else None
    if tokenizer is None:
        if chunk_tokens is not None:
            raise InvalidInputError(f"model {model!r} has no tokenizer.json that could be read: chunk_tokens needs it")
        return text
    if chunk_tokens is None:
        done: list[Any] = each(lambda item: tokenizer.prepare(item).to_json(), texts, slot.alias)
    else:
        check_counts(chunk_tokens=chunk_tokens, overlap=overlap)
        cut = functools.partial(tokenizer.chunks, tokens=chunk_tokens, overlap=overlap)
        done = each(lambda item: [piece.to_json() for piece in cut(item)], texts, slot.alias)
    return done if isinstance(text, list) else done[0]


def prep_image(image: Any, model: str | None = None) -> Any:
    """Fetch, decode and resize an image, or each image of a list, for `embed_image`. Returns base64 of a PNG.

    `image` is base64 of a file of one of `LEGIT_WORKER_IMAGE_FORMATS`, a path under one of `LEGIT_WORKER_PREP_ROOTS`,
    or a URL on one of `LEGIT_WORKER_PREP_HOSTS`. Never touches a device, and never loads the model. Raises
    `InvalidInputError`, `UnknownModelError`.
    """
    spec, limits = Handle(model, "image").slot.spec, _limits()
    edge = resize_of(spec.path, spec.revision) if spec.path and spec.kind == "image" else None
    where = _where(limits.max_image_bytes)
    sizes: list[int] = []

    def prepare(item: Any) -> str:
        prepared, size = processes.run(_prepare_image, item, where, limits, edge, size=_size(item, limits))
        sizes.append(size)
        limits.check_pixels(sum(sizes), len(sizes))
        return str(prepared)

    done = items_of(image, "image", prepare, limits)
    return done if isinstance(image, list) else done[0]


def _prepare_image(source: Any, where: sources.Limits, limits: Limits, edge: tuple[int, int] | None) -> tuple[str, int]:
    """Return base64 of the prepared file, and the number of pixels that the original has."""
    image, size = image_of(sources.read(source, where), limits)
    return base64.b64encode(shrink(image, edge)).decode(), size


def _size(image: Any, limits: Limits) -> int:
    """Return the bytes that one image takes on its way to a helper and back."""
    return len(image) if isinstance(image, str) and not sources.is_remote(image) else limits.max_image_bytes


_chosen = functools.cache(settings.load)


def _limits() -> Limits:
    """Return the limits of the current task's app."""
    chosen = _chosen()
    return _limits_of(apps.of_current_task(chosen) if chosen.apps else "")


@functools.cache
def _limits_of(app: str) -> Limits:
    return limits_of(_chosen(), app)


def _where(max_bytes: int) -> sources.Limits:
    """Return where files may be read from."""
    chosen = _chosen()
    return sources.Limits(
        max_bytes=max_bytes, roots=chosen.prep_roots, hosts=chosen.prep_hosts, allow_private=chosen.prep_private
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


def _normalizing(normalize: bool | None) -> dict[str, bool]:
    return {} if normalize is None else {"normalize_embeddings": bool(normalize)}


def _plain(values: Any, is_list: bool) -> Any:
    """Return an array as lists for JSON. If a number is not finite, raise `InvalidInputError` with its item's place."""
    import numpy as np

    finite = np.isfinite(values)
    if not finite.all():
        whose = f"item {finite.reshape(len(finite), -1).all(axis=1).argmin()}: " if is_list else ""
        raise InvalidInputError(f"{whose}the model's result is not finite for this input")
    return values.tolist()
