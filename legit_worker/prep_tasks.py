"""The built-in tasks of the prep stage. They load no model, and touch no device.

In: JSON, from any client. Out: JSON that `embed_text` and `embed_image` take.
"""

from __future__ import annotations

import base64
import functools
from typing import Any

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.images import image_of
from legit_worker.inputs.limits import Limits
from legit_worker.inputs.options import form_of, wording_of
from legit_worker.inputs.reading import check_counts, check_pieces, items_of, texts_of
from legit_worker.inputs.types import PreparedText
from legit_worker.models.handle import Handle
from legit_worker.models.preparing import each
from legit_worker.models.prompts import CALLS, chosen_prompt, filled
from legit_worker.prep import processes, sources
from legit_worker.prep.images import resize_of, shrink
from legit_worker.prep.texts import TextTokenizer, tokenizer_of
from legit_worker.settings import ModelSettings
from legit_worker.task_limits import chosen_settings, current_limits


def prep_text(
    text: Any,
    model: str | None = None,
    chunk_tokens: int | None = None,
    overlap: int | None = 0,
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    dimensions: int | None = None,
    precision: str | None = None,
) -> Any:
    """Tokenize a text, or each text of a list. `embed_text` gives the result the same vector as the text.

    `task`, `prompt_name` and `prompt` say what stands before the text, as for `embed_text`, which need not be told.
    `dimensions` and `precision` change no token: they are taken so that both tasks can have the same arguments.
    `chunk_tokens` splits each text into a list of pieces. A piece has at most this many tokens, special ones and the
    prompt included, and begins with the last `overlap` tokens of the piece before. Never touches a device, and never
    loads the model. If the tokenizer can't be read without the model, returns the text unchanged, or refuses to if
    something is to stand before it. Raises `InvalidInputError`, `UnknownModelError`.
    """
    limits, named = current_limits(), Handle(model, "embed").named
    wording = wording_of(task, prompt_name, prompt, limits.max_characters)
    form_of(dimensions, precision, None)
    overlap = overlap or 0
    _check_split(chunk_tokens, overlap)
    spec, texts = named.spec, texts_of(text, "text", limits)
    is_readable = spec.path and spec.kind == "embed" and not spec.processor_kwargs  # which may change the tokenizer
    tokenizer = tokenizer_of(spec.path or "", spec.revision) if is_readable else None
    if tokenizer is None:
        if chunk_tokens is not None:
            raise InvalidInputError(f"model {model!r} has no tokenizer.json that could be read: chunk_tokens needs it")
        if wording:
            raise InvalidInputError(
                f"model {model!r} can't be prepared for {' and '.join(wording)}: send the text itself to embed_text"
            )
        return text
    before = _before(spec, tokenizer, wording)
    if chunk_tokens is None:
        one = functools.partial(tokenizer.prepare, prompt=before, limit=spec.max_seq_length)
        done: list[Any] = each(lambda item: one(item).to_json(), texts, named.alias)
    else:
        cut = functools.partial(
            tokenizer.chunks, tokens=chunk_tokens, overlap=overlap, prompt=before, limit=spec.max_seq_length
        )
        done = each(lambda item: _pieces(cut(item), limits), texts, named.alias)
    return done if isinstance(text, list) else done[0]


def _check_split(chunk_tokens: Any, overlap: Any) -> None:
    """Raise `InvalidInputError` for what makes no pieces."""
    check_counts(overlap=overlap)
    if chunk_tokens is not None:
        check_counts(chunk_tokens=chunk_tokens)
    elif overlap:
        raise InvalidInputError(f"overlap is {overlap}, and the text is not split: set chunk_tokens, too")


def _before(spec: ModelSettings, tokenizer: TextTokenizer, wording: dict[str, str]) -> str | None:
    """Return what stands before a text, as `embed_text` would choose it."""
    call, _, chosen = filled(spec, CALLS.get(wording.get("task", ""), "encode"), (), {**wording, "task": None})
    task = next((name for name, of in CALLS.items() if of == call), None)
    return chosen_prompt(tokenizer.prompts, tokenizer.default, task, chosen.get("prompt_name"), chosen.get("prompt"))


def _pieces(pieces: list[PreparedText], limits: Limits) -> list[dict[str, Any]]:
    check_pieces(pieces, "a text", limits)
    return [piece.to_json() for piece in pieces]


def prep_image(image: Any, model: str | None = None) -> Any:
    """Fetch, decode and resize an image, or each image of a list, for `embed_image`. Returns base64 of a PNG.

    `image` is base64 of a file of one of `LEGIT_WORKER_IMAGE_FORMATS`, a path under one of `LEGIT_WORKER_PREP_ROOTS`,
    or a URL on one of `LEGIT_WORKER_PREP_HOSTS`. Never touches a device, and never loads the model. Raises
    `InvalidInputError`, `UnknownModelError`.
    """
    spec, limits = Handle(model, "image").named.spec, current_limits()
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


def _where(max_bytes: int) -> sources.Limits:
    """Return where files may be read from."""
    chosen = chosen_settings()
    return sources.Limits(
        max_bytes=max_bytes, roots=chosen.prep_roots, hosts=chosen.prep_hosts, allow_private=chosen.prep_private
    )
