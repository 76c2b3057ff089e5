"""What a task holds: `legit_worker.model("minilm")`.

In: texts, pairs, images, or any items. Out: what sentence-transformers would return for them, or one output each.

A call is a straight line: have the model in memory, plan, compute, finish. This module computes in the calling thread;
inside a ModelPool, the pool parks the task and lets its items share batches with others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from legit_worker import parking
from legit_worker.batching.costmodel import CostModel
from legit_worker.batching.packer import pack
from legit_worker.device import randoms
from legit_worker.errors import InvalidInputError, LimitError, ModelLoadError
from legit_worker.models import caretaker, fence
from legit_worker.models.finite import with_second_try
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.methods import is_in_another_call, leave
from legit_worker.models.options import LACKS, SET_BY
from legit_worker.models.policy import Request
from legit_worker.models.preparing import prepare, take_turns
from legit_worker.models.prompts import CALLS, filled
from legit_worker.models.protocol import Plan
from legit_worker.models.registry import default_registry
from legit_worker.models.residency import Residency
from legit_worker.models.slot import Named, Slot
from legit_worker.models.views import in_own_memory

#: Padded cost units per batch if no engine measures what is best: on CPU, smaller batches waste less.
DIRECT_BUDGET = 4096

#: Seconds between two looks whether there is room for a model by now.
REVIEW_SECONDS = 0.25


#: Computes items with a loaded model: preprocesses, computes and postprocesses them; one output each, in order.
Compute = Callable[[LoadedModel, list[Any]], list[Any]]


def compute_directly(model: LoadedModel, items: list[Any]) -> list[Any]:
    """Call the model in the calling thread, in batches of even length and equal batch key."""
    prepared = prepare(model, items)
    outputs: list[Any] = [None] * len(items)
    for batch in _batches(model, prepared):
        launch = model.compute([prepared[index] for index in batch])
        for index, output in zip(batch, launch.outputs, strict=True):
            outputs[index] = output
    return [model.postprocess(output) for output in outputs]


def _batches(model: LoadedModel, prepared: list[Any]) -> Iterable[list[int]]:
    by_key: dict[Any, list[int]] = {}
    for index, item in enumerate(prepared):
        by_key.setdefault(model.batch_key(item), []).append(index)
    for indexes in by_key.values():
        costs = [model.cost(prepared[index]) for index in indexes]
        for cut in pack(costs, DIRECT_BUDGET, CostModel()):
            yield [indexes[position] for position in cut]


def _computed(model: LoadedModel, items: list[Any]) -> list[Any]:
    """Compute items as this process does, and those whose outputs are not finite once more, each alone."""

    def alone(item: Any) -> Any:
        take_turns(model.alias)
        return compute_directly(model, [item])[0]

    return with_second_try(items, _compute(model, items), alone)


def _handed_out(model: LoadedModel, items: list[Any]) -> list[Any]:
    """The same, for code that may keep one output for long."""
    return list(map(in_own_memory, _computed(model, items)))


_compute: Compute = compute_directly


def use_compute(compute: Compute) -> None:
    """Have every handle of this process compute like this from now on."""
    global _compute
    _compute = compute


# A child that a task forks has no loop that would compute for it.
os.register_at_fork(after_in_child=lambda: use_compute(compute_directly))


@contextmanager
def use(slot: Slot, residency: Residency) -> Iterator[LoadedModel]:
    """Wait until the model is in memory, where it stays while the block runs. Raises `ModelLoadError`."""
    with leave(slot.alias), parking.serving():
        model = residency.take(slot)
        if model is not None:
            try:
                yield model
            finally:
                residency.give_back(slot)
                caretaker.watch(residency)
            return
        request = residency.request(slot, must=parking.is_pressing() or is_in_another_call())
        try:
            if not request.future.done():
                _wait_for_load(request, residency)
            yield outcome(request)
        finally:
            residency.release(request)
            caretaker.watch(residency)


def _wait_for_load(request: Request, residency: Residency) -> None:
    def look() -> None:
        wait([request.future], timeout=REVIEW_SECONDS)
        residency.review()

    # A load and its trial batches may draw random numbers.
    resume = None if parking.keeps_tasks_apart() else randoms.suspend(use)
    try:
        parking.wait(request.future, f"model {request.slot.alias} to load", drive=look, loads=request.slot.alias)
    finally:
        if resume is not None:
            resume()


def outcome(request: Request) -> LoadedModel:
    """What came of a request that is done. Raises `ModelLoadError`, `DeviceLostError`."""
    error = request.future.exception()
    if error is not None:
        # One of its own for each asker: tasks that share an exception would share its traceback.
        raise type(error)(*error.args) from error.__cause__
    return request.future.result()


#: The alias of the model that the current task called last; None if it called none.
last_called: ContextVar[str | None] = ContextVar("legit_worker_last_called", default=None)


#: What computed its result, as `LoadedModel.computed_by` tells; None if no model has.
last_computed: ContextVar[dict[str, Any] | None] = ContextVar("legit_worker_last_computed", default=None)


def forget_calls() -> None:
    """A task begins: it has called no model."""
    last_called.set(None)
    last_computed.set(None)


class Handle:
    """A model by its alias. Holds no weights, reads no settings until it is used, and may be kept for good."""

    def __init__(self, alias: str | None, kind: str = "embed") -> None:
        self._alias = alias
        self._kind = kind

    def __repr__(self) -> str:
        return f"<Handle {'the one of kind ' + self._kind if self._alias is None else self._alias}>"

    @property
    def named(self) -> Named:
        """The alias, as configured. Raises `UnknownModelError`, also if the task's app may not use it."""
        registry = default_registry()
        named = registry.only(self._kind) if self._alias is None else registry.find(self._alias)
        fence.check(named.alias)
        if last_called.get() != named.alias:
            last_called.set(named.alias)
            last_computed.set(None)
        return named

    @property
    def slot(self) -> Slot:
        """The model that the alias means. Raises as `named` does."""
        return self.named.slot

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
        """Length of the model's vectors, None if it does not know. Loads the model if it is not there yet."""
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

    def rank(
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Score documents against a query, best first, as `CrossEncoder.rank` does. Takes `predict`'s options.

        Returns `[{"corpus_id": place in documents, "score": float}]`, with `"text"` if documents are asked for. Raises
        `ValueError` for a model with several scores per pair, and as `encode` does.
        """
        scores = self.predict([(query, document) for document in documents], **options)
        if scores.ndim != 1:
            raise ValueError("rank() takes a model with one score per pair: use predict() with pairs instead")
        found = [{"corpus_id": place, "score": score} for place, score in enumerate(scores.tolist())]
        if return_documents:
            found = [row | {"text": document} for row, document in zip(found, documents, strict=True)]
        return sorted(found, key=lambda row: row["score"], reverse=True)[:top_k]

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's scores, in their order. Loads the model if it is not there yet."""
        labels: list[str] = self._ask("labels")
        return labels

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts by name. Loads the model if it is not there yet."""
        prompts: dict[str, str] = self._ask("prompts")
        return prompts

    @property
    def max_seq_length(self) -> int | None:
        """The most tokens of a text that are read; None if there is no limit. Loads the model likewise."""
        limit: int | None = self.named.spec.max_seq_length or self._ask("max_seq_length")
        return limit

    def get_max_seq_length(self) -> int | None:
        """The library's other name for it."""
        return self.max_seq_length

    def __getattr__(self, name: str) -> Any:
        """Raise `AttributeError`, with the reason if the library's objects have this attribute."""
        reason = f": {LACKS[name]}" if name in LACKS else ""
        raise AttributeError(f"a handle has no {name}{reason}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise `AttributeError` for what would change the library's object. A test may put its own methods here."""
        if not name.startswith("_") and not callable(getattr(type(self), name, None)):
            reason = SET_BY.get(name, "give the call an option, or the alias a setting")
            raise AttributeError(f"{name} of a handle can't be set, since other tasks have the same model: {reason}")
        super().__setattr__(name, value)

    def map(self, items: Iterable[Any]) -> list[Any]:
        """One output per item, in order, for a model of any kind; items as its `preprocess` takes them."""
        items = list(items)  # a generator's code is the task's own
        with self._use() as model:
            outputs = _handed_out(model, items)
            last_computed.set(model.computed_by([], None, {}))
            return outputs

    def check_length(self, text: Any, **options: Any) -> None:
        """Raise `InvalidInputError` if the model would cut the text. Models without a limit take any.

        `options` are the options of `encode`, and `task`: the prompt counts, too.
        """
        with self._use() as model:
            take_turns(model.alias)
            if model.has("check_length"):
                call = CALLS.get(options.pop("task", None) or "", "encode")
                call, inputs, chosen = filled(self.named.spec, call, (text,), options)
                items, _ = _planned(self.named, model, call, inputs, chosen)
                model.alone("check_length", *items)

    def _call(self, name: str, *inputs: Any, **options: Any) -> Any:
        named = self.named
        if "sentences" in options:  # the library's name for it until version 6
            options["inputs"] = options.pop("sentences")
        call, places, chosen = filled(named.spec, name, inputs, options)
        with use(named.slot, default_registry().residency) as model:
            items, finish = _planned(named, model, call, places, chosen)
            # A built-in kind's `finish` copies the outputs.
            result = finish((_handed_out if model.is_own else _computed)(model, items))
            told = model.computed_by(items, result, chosen)
            last_computed.set(told)
            if options.get("truncate_dim") is None:
                _check_dimensions(named, told["dimensions"])
            return result

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Call a method that computes no batch."""
        with self._use() as model:
            return model.alone(name, *arguments)

    def _use(self) -> AbstractContextManager[LoadedModel]:
        return use(self.slot, default_registry().residency)


def _check_dimensions(named: Named, has: int | None) -> None:
    """Raise `ModelLoadError` if the alias asks for longer vectors than its model gives."""
    asked = named.spec.dimensions
    if asked is not None and has is not None and has < asked:
        raise ModelLoadError(
            f"model {named.alias!r} can't have DIMENSIONS={asked}: its vectors have {has} numbers, so ask for no more"
        )


def _check_prompt(named: Named, model: LoadedModel, chosen: dict[str, Any]) -> None:
    """Raise `ModelLoadError` if the alias asks for a prompt that its model lacks."""
    name = named.spec.prompt_name
    if name is not None and chosen.get("prompt_name") == name and name not in (known := model.alone("prompts")):
        raise ModelLoadError(f"model {named.alias!r} can't have PROMPT_NAME={name}: its prompts are {sorted(known)}")


def _planned(named: Named, model: LoadedModel, call: str, inputs: list[Any], chosen: dict[str, Any]) -> Plan:
    """Plan a call. Raises `ModelLoadError` if the alias has a limit or a prompt that its model can't have."""
    try:
        return model.plan(call)(*inputs, **chosen)
    except InvalidInputError:
        _check_prompt(named, model, chosen)
        raise
    except LimitError as error:
        limit = chosen.get("max_seq_length")
        if limit != named.spec.max_seq_length:
            raise InvalidInputError(f"model {named.alias!r} can't have max_seq_length={limit}: {error}") from None
        raise ModelLoadError(f"model {named.alias!r} can't have MAX_SEQ_LENGTH={limit}: {error}") from None
