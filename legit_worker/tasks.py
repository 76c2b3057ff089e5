"""The built-in tasks, and their aliases.

In: JSON, from any client. Out: JSON. A task refuses bad input with `InvalidInputError` before it reaches a batch, and
never retries it: `inputs/` is the border.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

from celery import Celery, Task

from legit_worker.errors import InvalidInputError, shown
from legit_worker.inputs.limits import Limits
from legit_worker.inputs.options import SCALED, form_of, switch_of, wording_of
from legit_worker.inputs.reading import (
    at,
    images_or_both_of,
    is_chunks,
    items_of,
    texts_of,
    texts_or_prepared,
)
from legit_worker.inputs.texts import text_of
from legit_worker.inputs.types import Pair
from legit_worker.models.finite import check_finite
from legit_worker.models.handle import Handle, last_computed
from legit_worker.models.prompts import CALLS
from legit_worker.prep_tasks import prep_image, prep_text
from legit_worker.settings import Settings, misnamed
from legit_worker.task_limits import current_limits

logger = logging.getLogger(__name__)

#: The most items in one task, unless `LEGIT_WORKER_MAX_ITEMS` says otherwise.
MAX_ITEMS: int = Settings.model_fields["max_items"].default


def embed_text(
    text: Any,
    model: str | None = None,
    normalize: bool | None = None,
    truncate: bool = True,
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    dimensions: int | None = None,
    precision: str | None = None,
) -> Any:
    """Embed a text, a result of `prep_text`, or a list of these.

    `model=None` is the one configured model of kind `embed`; `normalize=None` leaves the vector's length to the model;
    `truncate=False` refuses a text that the model would cut. `task`: `query` or `document` give what the library's
    `encode_query` and `encode_document` give; `prompt_name`, `prompt`, `dimensions` and `precision` are its
    `prompt_name`, `prompt`, `truncate_dim` and `precision`. What is None is as the alias's settings have it. Returns
    numbers, `[dim]` or `[n, dim]`. Raises `InvalidInputError`, `UnknownModelError`, `ModelLoadError`.
    """
    limits, handle = current_limits(), Handle(model, "embed")
    wording = wording_of(task, prompt_name, prompt, limits.max_characters)
    form = form_of(dimensions, precision, normalize)
    may_cut = truncate is not None and switch_of("truncate", truncate)

    def embedded(texts: list[Any], is_list: bool) -> Any:
        if not may_cut:
            for index, item in enumerate(texts):
                at(index, text, functools.partial(handle.check_length, **wording), item)
        return _plain(_encoded(handle, texts if is_list else texts[0], wording, form), is_list)

    if isinstance(text, list) and text and all(map(is_chunks, text)):
        limits.check_count(text, "text")
        cut = [texts_or_prepared(pieces, "text", limits) for pieces in text]
        rows = iter(embedded([piece for pieces in cut for piece in pieces], True))
        return [[next(rows) for _ in pieces] for pieces in cut]
    return embedded(texts_or_prepared(text, "text", limits), isinstance(text, list))


def _encoded(handle: Handle, texts: Any, wording: dict[str, str], form: dict[str, Any]) -> Any:
    """Encode texts as the task says. Raises `InvalidInputError` if one text alone has no scale."""
    call = CALLS.get(wording.get("task", ""), "encode")
    spec = handle.named.spec
    if form.get("precision", spec.precision) in SCALED and (not isinstance(texts, list) or len(texts) < 2):
        raise InvalidInputError(
            f"precision {form.get('precision', spec.precision)} takes its scale from the vectors of one task, and one "
            "vector has none: send several texts, or ask for binary"
        )
    options = {name: value for name, value in wording.items() if name != "task"}
    vectors = getattr(handle, call)(texts, **options, **form)
    _check_dimensions(form.get("truncate_dim"))
    return vectors


def _check_dimensions(asked: int | None) -> None:
    """Raise `InvalidInputError` if a task asks for longer vectors than its model gave. The library gives all it has."""
    has = (last_computed.get() or {}).get("dimensions")
    if asked is not None and has is not None and has < asked:
        raise InvalidInputError(f"dimensions={asked}: this model's vectors have {has} numbers, so ask for no more")


def embed_image(
    image: Any,
    model: str | None = None,
    normalize: bool | None = None,
    dimensions: int | None = None,
    precision: str | None = None,
) -> Any:
    """Embed an image, or a list of images, each as base64 of a file of one of `LEGIT_WORKER_IMAGE_FORMATS`.

    For a model that takes both at once, an input may also be `{"text": text, "image": image}`. Arguments, result and
    errors as for `embed_text`, with kind `image`.
    """
    handle, form = Handle(model, "image"), form_of(dimensions, precision, normalize)
    images = images_or_both_of(image, "image", current_limits())
    vectors = _encoded(handle, images if isinstance(image, list) else images[0], {}, form)
    return _plain(vectors, isinstance(image, list))


def embed_sparse(
    text: Any,
    model: str | None = None,
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    max_active: int | None = None,
) -> Any:
    """Embed a text, or a list of texts, as sparse vectors: `{"indices": [int], "values": [float]}`.

    `max_active` keeps the largest values alone. The other arguments and the errors are the same as with `embed_text`,
    with kind `sparse`.
    """
    if max_active is not None and (type(max_active) is not int or max_active < 1):
        raise InvalidInputError(f"max_active must be a whole number of at least 1, got {shown(max_active)}")
    most = {} if max_active is None else {"max_active_dims": max_active}
    found = _of_texts(
        Handle(model, "sparse"), text, wording_of(task, prompt_name, prompt, current_limits().max_characters), most
    )
    _plain(found.data[None], False)
    rows = [
        {"indices": found.indices[start:end].tolist(), "values": found.data[start:end].tolist()}
        for start, end in zip(found.indptr[:-1], found.indptr[1:], strict=True)
    ]
    return rows if isinstance(text, list) else rows[0]


def embed_multi(
    text: Any,
    model: str | None = None,
    normalize: bool | None = None,
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> Any:
    """Embed a text, or a list of texts, with a vector for each token: `[tokens, dim]`, or a list of these.

    The arguments and errors are the same as with `embed_text`, with kind `multi`.
    """
    wording, form = (
        wording_of(task, prompt_name, prompt, current_limits().max_characters),
        form_of(None, None, normalize),
    )
    found = _of_texts(Handle(model, "multi"), text, wording, form)
    if not isinstance(text, list):
        return _plain(found, False)
    return [at(index, text, functools.partial(_plain, is_list=False), rows) for index, rows in enumerate(found)]


def _of_texts(handle: Handle, text: Any, wording: dict[str, str], options: dict[str, Any]) -> Any:
    """Encode texts as the task says."""
    texts = texts_of(text, "text", current_limits())
    return _encoded(handle, texts if isinstance(text, list) else texts[0], wording, options)


def classify(pair: Any, model: str | None = None, top_k: int | None = None) -> Any:
    """Score each label of a pair of texts, or of a list of pairs, as `CrossEncoder.predict(apply_softmax=True)` does.

    `model=None` is the one configured model of kind `rerank`. Returns `[{"label": name, "score": float}]`, best first,
    for each pair; `top_k=None` returns all. Raises the errors of `embed_text`.
    """
    _check_top_k(top_k)
    limits, is_list = current_limits(), isinstance(pair, list) and bool(pair) and isinstance(pair[0], list)
    pairs = items_of(pair if is_list else [pair], "pair", functools.partial(_pair, limits=limits), limits)
    handle = Handle(model, "rerank")
    scores = handle.predict(pairs, apply_softmax=True)
    rows = _plain(scores if scores.ndim == 2 else scores[:, None], is_list)
    named = [
        [{"label": label, "score": score} for label, score in zip(handle.labels, row, strict=True)] for row in rows
    ]
    best = [sorted(row, key=lambda one: -one["score"])[:top_k] for row in named]
    return best if is_list else best[0]


def _pair(value: Any, limits: Limits) -> Pair:
    if not isinstance(value, list) or len(value) != 2:
        raise InvalidInputError(f"expected a pair of two texts, got {type(value).__name__}")
    return Pair(*(text_of(one, limits.max_characters) for one in value))


def _check_top_k(top_k: Any) -> None:
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise InvalidInputError(f"top_k must be a whole number of at least 1, got {shown(top_k)}")


def rerank(
    query: Any, documents: Any, model: str | None = None, top_k: int | None = None
) -> list[dict[str, int | float]]:
    """Score documents against a query, best first.

    `model=None` is the one configured model of kind `rerank`; `top_k=None` returns all. Returns
    `[{"index": place in documents, "score": float}]`. Raises the errors of `embed_text`.
    """
    limits = current_limits()
    question = text_of(query, limits.max_characters)
    if not isinstance(documents, list):
        raise InvalidInputError(f"documents must be a list of texts, got {type(documents).__name__}")
    _check_top_k(top_k)
    texts = texts_of(documents, "documents", limits)
    scores = Handle(model, "rerank").predict([Pair(question, text) for text in texts])
    if scores.ndim != 1:
        raise InvalidInputError(
            f"model {model!r} gives {scores.shape[1]} scores per pair: it classifies, so use legit_worker.classify"
        )
    best = sorted(enumerate(_plain(scores, True)), key=lambda pair: -pair[1])[:top_k]
    return [{"index": index, "score": score} for index, score in best]


BUILT_IN: dict[str, Callable[..., Any]] = {
    "embed_text": embed_text,
    "embed_image": embed_image,
    "embed_sparse": embed_sparse,
    "embed_multi": embed_multi,
    "rerank": rerank,
    "classify": classify,
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


def check_or_exit(chosen: Settings) -> None:
    """Check at a worker's start. If a name could never work, end the process with a sentence for each."""
    if problems := list(misnamed(chosen)):
        raise SystemExit("legit_worker: " + "\n".join(problems))


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
    def run(self: Task, /, *args: Any, **kwargs: Any) -> Any:
        _check_is_list(self.request.args)
        return function(*args, **_renamed(kwargs, renames))

    # typing: Celery would refuse arguments at the client, before they are renamed.
    # shared: by default Celery gives a task to every app of the process.
    app.task(name=name, bind=True, typing=False, lazy=False, shared=False, acks_late=True, is_legit_worker=True)(run)


def _check_is_list(args: Any) -> None:
    """Raise `InvalidInputError` if a message's `args` are no list. Python would take the keys of an object."""
    if isinstance(args, Mapping | str):
        raise InvalidInputError(
            f"the message's args must be a list, got {type(args).__name__}: send arguments that have names as kwargs"
        )


def _renamed(given: Mapping[str, Any], renames: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a message's arguments by the function's names. Raises `InvalidInputError` for two that are one."""
    found: dict[str, Any] = {}
    for caller, value in given.items():
        own = renames.get(caller, caller)
        if own is None:
            continue
        if own not in found or found[own] is None:
            found[own] = value
        elif value not in (None, found[own]):
            raise InvalidInputError(f"{caller!r} and another argument of this task both stand for {own}: send only one")
    return found


def _plain(values: Any, is_list: bool) -> Any:
    """Return an array as lists for JSON. If a number is not finite, raise `InvalidInputError` with its item's place."""
    check_finite(values, is_list=is_list)
    return values.tolist()
