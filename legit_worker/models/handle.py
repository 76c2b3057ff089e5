"""What a task holds: `legit_worker.model("minilm")`.

In: texts, pairs, images, or any items. Out: what sentence-transformers would return for them, or one output each.

How the items get computed is the runner's business. This module's own runner calls the model in the calling thread;
inside a ModelPool, the pool's runner parks the task and lets its items share batches with others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from legit_worker.batching.costmodel import CostModel
from legit_worker.batching.packer import pack
from legit_worker.device import randoms
from legit_worker.models.entry import Entry
from legit_worker.models.methods import is_in_another_call, leave
from legit_worker.models.protocol import Model
from legit_worker.models.registry import default_registry
from legit_worker.models.residency import Request

#: Padded cost units per batch where no engine measures what is best: on CPU, smaller batches waste less.
DIRECT_BUDGET = 4096

#: Seconds between two looks whether there is room for a model by now.
REVIEW_SECONDS = 0.25


class Runner(Protocol):
    """How items get computed."""

    def hold(self, entry: Entry) -> AbstractContextManager[Model]:
        """The entry's model, once it is loaded; it stays while the block runs. Raises `ModelLoadError`."""

    def run(self, entry: Entry, items: list[Any]) -> list[Any]:
        """Preprocess, compute and postprocess items of a loaded model; one output each, in order."""


class DirectRunner:
    """Calls the model in the calling thread: under any other pool, eagerly, in a shell.

    `must` says that others, who use models, may not be able to go on before this thread does.
    """

    def __init__(self, *, must: bool = False) -> None:
        self._must = must

    @contextmanager
    def hold(self, entry: Entry) -> Iterator[Model]:
        """Waits for the loader thread."""
        request = entry.residency.request(entry, must=self._must or is_in_another_call())
        try:
            yield self._wait(entry, request)
        finally:
            entry.residency.release(request)

    @staticmethod
    def _wait(entry: Entry, request: Request) -> Model:
        resume = randoms.suspend(DirectRunner)  # a load and its trial batches may draw
        while not request.future.done():
            wait([request.future], timeout=REVIEW_SECONDS)
            entry.residency.review()
        resume()
        return entry.outcome(request.future)

    def run(self, entry: Entry, items: list[Any]) -> list[Any]:
        """All items, in batches of even length and equal batch key."""
        prepared = [entry.preprocess(item) for item in items]
        outputs: list[Any] = [None] * len(items)
        for batch in _batches(entry, prepared):
            for index, output in zip(batch, entry.forward([prepared[index] for index in batch]), strict=True):
                outputs[index] = output
        return [entry.postprocess(output) for output in outputs]


def _batches(entry: Entry, prepared: list[Any]) -> Iterable[list[int]]:
    by_key: dict[Any, list[int]] = {}
    for index, item in enumerate(prepared):
        by_key.setdefault(entry.batch_key(item), []).append(index)
    for indexes in by_key.values():
        costs = [entry.cost(prepared[index]) for index in indexes]
        for cut in pack(costs, DIRECT_BUDGET, CostModel()):
            yield [indexes[position] for position in cut]


#: The alias of the model that the current task called last; None where it called none.
last_called: ContextVar[str | None] = ContextVar("legit_worker_last_called", default=None)

_runner: Runner = DirectRunner()


def use_runner(runner: Runner) -> Runner:
    """From now on, every handle of this process computes through `runner`. Returns the one before."""
    global _runner
    before, _runner = _runner, runner
    return before


# A child that a task forks has neither the loop that would resume it nor the right to the parent's connections.
os.register_at_fork(after_in_child=lambda: use_runner(DirectRunner()) and None)


class Handle:
    """A model by its alias. Holds no weights, reads no settings until it is used, and may be kept for good."""

    def __init__(self, alias: str | None, kind: str = "embed") -> None:
        self._alias = alias
        self._kind = kind

    def __repr__(self) -> str:
        return f"<Handle {self._alias or 'the one of kind ' + self._kind}>"

    @property
    def entry(self) -> Entry:
        """The configured model. Raises `UnknownModelError`."""
        registry = default_registry()
        entry = registry.get(self._alias) if self._alias else registry.only(self._kind)
        last_called.set(entry.alias)
        return entry

    def encode(self, *inputs: Any, **options: Any) -> Any:
        """Embed one text or image, or a list of them: shape `[dim]` or `[n, dim]`, numpy float32.

        Takes the options of `SentenceTransformer.encode` that change the result: `prompt`, `prompt_name`,
        `normalize_embeddings`, `truncate_dim`, `precision`. Those that say how to compute (`batch_size`,
        `show_progress_bar`) are accepted and mean nothing here: the engine decides. A sparse model gives a
        `scipy.sparse.csr_array`. Raises `InvalidInputError`, `UnknownModelError`, `ModelLoadError`.
        """
        return self._call("encode", *inputs, **options)

    def encode_query(self, *inputs: Any, **options: Any) -> Any:
        """Embed queries as `SentenceTransformer.encode_query` does: with the prompt named `query`."""
        return self._call("encode_query", *inputs, **options)

    def encode_document(self, *inputs: Any, **options: Any) -> Any:
        """Embed documents as `SentenceTransformer.encode_document` does: with the prompt named `document`."""
        return self._call("encode_document", *inputs, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compare each vector with each, by the model's own similarity function: numpy float32, shape `[n, m]`.

        The library gives the same numbers as a tensor. Computes here and now, on the CPU.
        """
        return self._ask("similarity", embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compare the first vectors, the second ones, and so on: numpy float32, shape `[n]`."""
        return self._ask("similarity_pairwise", embeddings1, embeddings2)

    def get_embedding_dimension(self) -> int | None:
        """Length of the model's vectors, None if it does not know. Loads the model where it is not there yet."""
        dimension: int | None = self._ask("get_embedding_dimension")
        return dimension

    #: The library's older name.
    get_sentence_embedding_dimension = get_embedding_dimension

    def predict(self, *inputs: Any, **options: Any) -> Any:
        """Score one pair of texts, or a list of them: a float32, or an array of shape `[n]` or `[n, labels]`.

        Takes `activation_fn`, `apply_softmax`, `prompt` and `prompt_name` as `CrossEncoder.predict` does.
        Raises as `encode` does.
        """
        return self._call("predict", *inputs, **options)

    def map(self, items: Iterable[Any]) -> list[Any]:
        """One output per item, in order, for a model of any kind; items as its `preprocess` takes them."""
        items = list(items)  # a generator's code is the task's own
        with self._use() as (_, _, run):
            return run(items)

    def check_length(self, text: str) -> None:
        """Raise `InvalidInputError` if the model would cut the text. Models without a limit take any."""
        with self._use() as (entry, model, _):
            check = getattr(model, "check_length", None)
            if check is not None:
                entry.alone("check_length", check, text)

    def _call(self, name: str, *inputs: Any, **options: Any) -> Any:
        with self._use() as (entry, model, run):
            plan = _method(entry, model, name, "plan_")
            if "sentences" in options:  # the library's name for it until version 6
                options["inputs"] = options.pop("sentences")
            items, finish = plan(*inputs, **options)
            return finish(run(items))

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Call a method that computes no batch."""
        with self._use() as (entry, model, _):
            return entry.alone(name, _method(entry, model, name), *arguments)

    @contextmanager
    def _use(self) -> Iterator[tuple[Entry, Model, Callable[[Iterable[Any]], list[Any]]]]:
        """The model, loaded, which stays while the block runs, and the function that computes items with it."""
        entry, runner = self.entry, _runner
        with leave(entry.alias), runner.hold(entry) as model:
            yield entry, model, lambda items: runner.run(entry, list(items))


def _method(entry: Entry, model: Model, name: str, prefix: str = "") -> Callable[..., Any]:
    method: Callable[..., Any] | None = getattr(model, prefix + name, None)
    if method is None:
        raise TypeError(
            f"model {entry.alias!r} is of kind {entry.spec.kind!r}, which has no {name}(): "
            f"use map(), or a model of another kind, or give its class a method {prefix}{name}()"
        )
    return method
