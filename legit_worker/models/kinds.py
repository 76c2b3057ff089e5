"""The built-in kinds that embed, on sentence-transformers: `embed`, `image`, `sparse`. `reranker.py` has the other one.

In: texts, images, pairs. Out: numpy arrays with the values, shapes and dtypes that sentence-transformers gives.

The library's own code preprocesses each item alone, in its task. A batch is the items' features, padded together, and
`forward` is the library's own. So a batch computes for an item what `encode` computes for this item alone. No model
calls the engine: `plan_encode` and `plan_predict` say which items a call has, and how their outputs become its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from numpy.typing import NDArray

from legit_worker import golden
from legit_worker.device.cuda import move, tf32, to_device
from legit_worker.device.devices import Launch
from legit_worker.errors import InvalidInputError
from legit_worker.inputs.types import PreparedText
from legit_worker.models.backend import Backend, pictures
from legit_worker.models.features import (
    Prepared,
    Prompted,
    as_the_library_takes_them,
    can_be_padded,
    characters,
    check_text,
    collate,
    cost_of,
    dense_rows,
    identity_of,
    key_of,
    largest,
    sparse_rows,
    to_numpy,
)
from legit_worker.models.modalities import AsText, check_image, with_pixels
from legit_worker.models.options import refuse
from legit_worker.models.preparing import Aside
from legit_worker.models.prompts import first_prompt, named_prompt
from legit_worker.models.protocol import Plan
from legit_worker.models.requirements import is_missing_folder
from legit_worker.models.revision import revision_of
from legit_worker.models.shortway import (
    ShortWay,
    has_several_tokenizers,
    leaves_out_prompts,
    minds_task,
    short_way,
    without_prompt_length,
)
from legit_worker.prep.images import Edge, resize_of


class SentenceModel:
    """What the four kinds share. The loader thread reads the weights; all other methods run where the tasks run."""

    #: What a comparison of backends must know: whether rows are scores that rank, and whether inputs are pictures.
    is_ranking = takes_pictures = False

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        revision: str | None = None,
        backend: str = "torch",
        cache_dir: Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`options`: more arguments of the library's constructor, as `loader.library_options` gives them."""
        self._path = path
        self._dtype = "float32" if dtype == "tf32" else dtype
        self._precision = tf32 if dtype == "tf32" else nullcontext
        self._revision = revision
        self._options = dict(options or {})
        self._backend = Backend(backend, dtype, cache_dir)
        self._model: Any = None
        self._as_text: Callable[[Any], Any] = lambda value: value
        self._tokenize: ShortWay | None = None
        self._aside = Aside()
        self._limit: int | None = None
        self._computes_in = ""
        self._commit: str | None = None
        self._ways: dict[int, ShortWay] = {}
        self._minds_task = False
        self._leaves_out_prompts = False
        self._has_several_tokenizers = False

    def load(self, device: str) -> None:
        """Read the weights from the path, or from the local cache, and put them on `device`."""
        if is_missing_folder(self._path):
            # The library would take the path for a name on the Hub, and complain about its characters.
            raise FileNotFoundError(f"there is no folder {self._path}")
        dtype = self._backend.dtype_to_read(self._dtype)
        more = {**self._options.pop("model_kwargs", {}), **({"dtype": dtype} if dtype else {})}
        self._model = self._open(
            self._path, device="cpu", revision=self._revision, model_kwargs=more or None, **self._options
        ).eval()
        move(self._model, device)
        self._as_text = AsText(self._model)
        self._tokenize = short_way(self._model)
        self._limit = self._model.max_seq_length
        self._minds_task = minds_task(self._model)
        self._leaves_out_prompts = leaves_out_prompts(self._model)
        self._has_several_tokenizers = has_several_tokenizers(self._model)
        floats = (one.dtype for one in self._model.parameters() if one.is_floating_point())
        self._computes_in = (
            "tf32" if self._precision is tf32 else str(next(floats, torch.float32)).removeprefix("torch.")
        )
        self._backend.choose(device, self)
        self._commit = revision_of(self._path, self._revision)

    @property
    def backend(self) -> dict[str, str]:
        """What computes it, and why, as `inspect stats` shows it."""
        return self._backend.report()

    def computed_by(self, items: Sequence[Prompted], result: Any, precision: str | None) -> dict[str, Any]:
        """What an index must know of a call's result: see `docs/result-routing.md`."""
        graphs = self._backend.graphs
        prompts = {item.prompt or None for item in items}
        return {
            "revision": self._commit,
            "dimensions": self._dimensions(result, precision),
            "dtype": precision if precision not in (None, "float32") else graphs.dtype if graphs else self._computes_in,
            "prompt": prompts.pop() if len(prompts) == 1 else None,
            "backend": "openvino" if graphs else "torch",
        }

    def _dimensions(self, result: Any, precision: str | None) -> int | None:
        """How many numbers each row of a result has; None if these are no vectors."""
        return None

    def _open(self, path: str, **options: Any) -> Any:
        raise NotImplementedError

    def to(self, device: str) -> None:
        """Move the weights."""
        move(self._model, device)

    def unload(self) -> None:
        """Free the weights' memory now: the library's objects are in cycles, and failed tasks may hold this one."""
        self._backend.unload()
        self._model.to("meta")

    def sample(self, cost: int) -> Any:
        """A text of about `cost` tokens."""
        return "a " * cost

    def memory(self) -> int:
        """Bytes of its parameters and buffers, or of its graphs."""
        if self._backend.graphs is not None:
            return self._backend.graphs.memory
        tensors = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def preprocess(self, item: Any) -> Prepared:
        """Tokenize or resize one input. Raises `InvalidInputError` if the input is not of this model's kind."""
        prompted = item if isinstance(item, Prompted) else Prompted(item, None)
        if isinstance(prompted.input, PreparedText):
            features = self._of_ids(prompted.input, prompted)
            return Prepared(features, len(prompted.input.ids), "text")
        self._check(prompted.input)
        prompt, task, way = prompted.prompt, prompted.task, self._way(prompted.limit)
        if way is not None and isinstance(prompted.input, str) and not task and (way.takes_prompts or not prompt):
            text = (prompt or "") + prompted.input
            features = self._aside.run(functools.partial(way, text), way.reads(text))
            return Prepared(features, len(features["input_ids"]), "text")
        features = self._features_of_one(prompted)
        if self._has_several_tokenizers or not can_be_padded(features):
            key = ("raw", prompt, task, prompted.limit)
            return Prepared({}, max(1, len(str(prompted.input).split())), key, task, prompted)
        return Prepared(features, cost_of(features), (task, key_of(features)), task)

    def _way(self, limit: int | None) -> ShortWay | None:
        """The short way of a text that is read up to this limit."""
        if self._tokenize is None or limit is None or limit == self._limit:
            return self._tokenize
        if limit not in self._ways:
            self._ways[limit] = replace(self._tokenize, limit=limit)
        return self._ways[limit]

    def _features_of_one(self, one: Prompted) -> dict[str, Any]:
        """The input's features, as the library gives them. Reads a long text only as far as it changes them."""
        way = self._way(one.limit) if isinstance(one.input, str) and not one.task else None
        for start in (one.input,) if way is None else way.beginnings(one.input):
            read = functools.partial(self._features_of, [start], one.prompt, one.task, one.limit)
            # `forward` uses several tokenizers, too: never on two threads at once.
            features = self._aside.run(read, 0 if self._has_several_tokenizers else characters(start))
            if way is not None and len(features["input_ids"][0]) == way.limit:
                break
        return features

    def _features_of(
        self, inputs: list[Any], prompt: str | None, task: str | None, limit: int | None = None
    ) -> dict[str, Any]:
        with _limited(self._model, limit):
            features = self._model.preprocess(list(map(self._as_text, inputs)), prompt=prompt, **_if_any(task))
        return dict(features) if self._leaves_out_prompts else without_prompt_length(features)

    def _of_ids(self, prepared: PreparedText, prompted: Prompted) -> dict[str, Any]:
        if self._tokenize is None or prompted.task or (prepared.prompt and not self._tokenize.takes_prompts):
            raise InvalidInputError(
                "this model, its prompt or its task needs the text itself: send it without prep_text"
            )
        if (prepared.prompt or "") != (prompted.prompt or ""):
            raise InvalidInputError(
                f"the text was prepared with the prompt {prepared.prompt or ''!r}, and the prompt here is "
                f"{prompted.prompt or ''!r}: give prep_text and embed_text the same one"
            )
        return self._tokenize.of_ids(prepared, prompted.limit)

    def _check(self, value: Any) -> None:
        """A text, a dict that has one, or two texts that are read as one."""
        match value:
            case {"text": text} if len(value) == 1:
                check_text(text)
            case list() | tuple() if len(value) == 2:
                for part in value:
                    check_text(part)
            case _:
                check_text(value)

    def prompts(self) -> dict[str, str]:
        """Its prompts by name."""
        return dict(self._model.prompts)

    def max_seq_length(self) -> int | None:
        """The most tokens that it reads; None if there is no limit."""
        return self._limit

    def cost(self, item: Prepared) -> int:
        """Tokens of a text; for an image, its numbers in units of `NUMBERS_PER_COST`."""
        return item.cost

    def batch_key(self, item: Prepared) -> Hashable:
        """Inputs share a batch if their modality, their image size and their prompt length are equal."""
        return item.key

    def identity(self, item: Prepared) -> Hashable:
        """Texts with the same tokens have the same output."""
        return identity_of(item.features)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Prepared]) -> torch.Tensor | Launch:
        """Compute one row per item, as the model's last module gives it: shape `[n, dim]`."""
        features = self._features(batch)
        if self._backend.graphs is not None:
            return self._backend.graphs.launch(features, len(batch))
        with self._precision():
            return self.compute(to_device(features, self._model.device), batch[0].task)

    def compute(self, features: dict[str, Any], task: str | None = None) -> torch.Tensor:
        """The rows of a batch's features, by torch."""
        return self._output(self._model(features, **_if_any(task)))

    def trial_inputs(self) -> list[list[Any]]:
        """Each kind of input that it takes, short and long ones."""
        return [golden.texts()]

    def _output(self, features: dict[str, Any]) -> torch.Tensor:
        embeddings: torch.Tensor = features["sentence_embedding"]
        return embeddings

    def postprocess(self, output: torch.Tensor) -> Any:
        """Make one row a numpy array. A plan's `finish` does the rest, for all rows of a call together."""
        return to_numpy(output)

    def _features(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        if batch[0].raw is not None:
            inputs = [item.raw.input for item in batch if item.raw]
            return self._features_of(inputs, batch[0].raw.prompt, batch[0].task, batch[0].raw.limit)
        return collate([item.features for item in batch], self._model.tokenizer)

    def _items(
        self,
        inputs: Any,
        prompt_name: str | None,
        prompt: str | None,
        task: str | None = None,
        limit: int | None = None,
    ) -> tuple[list[Prompted], bool]:
        """The call's items, and whether it has a single input, whose result is no list."""
        is_single = self._model.is_singular_input(inputs)
        items = [inputs] if is_single else list(inputs)
        chosen = prompt if prompt is not None else self._named_prompt(prompt_name or self._model.default_prompt_name)
        is_told = prompt is not None or prompt_name is not None or task is not None
        task = task if self._minds_task else None

        def prompted(one: Any) -> Prompted:
            knows = isinstance(one, PreparedText) and one.prompt is not None and not is_told
            return Prompted(one, one.prompt if knows else chosen, task, limit)

        return list(map(prompted, items)), is_single

    def _named_prompt(self, name: str | None) -> str | None:
        return named_prompt(self._model.prompts, name)


class Embedding(SentenceModel):
    """What the kinds that give vectors share. Arguments and results are the library's, as numpy arrays."""

    #: Each kind's own.
    plan_encode: Callable[..., Plan]

    def _dimensions(self, result: Any, precision: str | None) -> int | None:
        """A binary row has eight dimensions in each number."""
        each = 8 if precision in ("binary", "ubinary") else 1
        return int(result.shape[-1]) * each or None if hasattr(result, "shape") else None

    def plan_encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Plan:
        """As `plan_encode`, with the prompt for queries, and the model's own way for them if it has one."""
        name = prompt_name if prompt is not None else prompt_name or first_prompt(self._model.prompts, "query")
        return self.plan_encode(inputs, name, prompt, task="query", **options)

    def plan_encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Plan:
        """The same for documents."""
        name = prompt_name if prompt is not None else prompt_name or first_prompt(self._model.prompts, "document")
        return self.plan_encode(inputs, name, prompt, task="document", **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> NDArray[Any]:
        """Compare each vector with each, by the model's own function: shape `[n, m]`."""
        return self._compare(self._model.similarity, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> NDArray[Any]:
        """Compare the first vectors, the second ones, and so on: shape `[n]`."""
        return self._compare(self._model.similarity_pairwise, embeddings1, embeddings2)

    def _compare(self, function: Callable[[Any, Any], torch.Tensor], *embeddings: Any) -> NDArray[Any]:
        return to_numpy(function(*map(as_the_library_takes_them, embeddings)).cpu())

    def get_embedding_dimension(self) -> Any:
        """Length of the vectors; None if the library does not know it."""
        return self._model.get_embedding_dimension()


class TextEmbedding(Embedding):
    """Kind `embed`: dense vectors of texts, as `SentenceTransformer.encode` gives them."""

    def _open(self, path: str, **options: Any) -> Any:
        return sentence_transformers.SentenceTransformer(path, **options)

    def plan_encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        precision: str | None = "float32",
        task: str | None = None,
        max_seq_length: int | None = None,
        **others: Any,
    ) -> Plan:
        """`Handle.encode` describes the arguments; shape `[dim]` for one input, `[n, dim]` for a list."""
        refuse(others, "encode", truncate_dim=truncate_dim)
        items, is_single = self._items(inputs, prompt_name, prompt, task, max_seq_length)

        def finish(rows: list[Any]) -> Any:
            dimension = truncate_dim or self._model.truncate_dim
            vectors = dense_rows(rows, dimension, normalize=normalize_embeddings, precision=precision)
            return vectors[0] if is_single else vectors

        return items, finish

    def check_length(self, item: Prompted) -> None:
        """Raise `InvalidInputError`, with both numbers, if the model would cut the text."""
        text = item.input
        if isinstance(text, PreparedText):
            if text.cut:
                raise InvalidInputError("the text was cut by prep_text: split it with chunk_tokens")
            return
        check_text(text)
        own = getattr(self._model[0], f"{item.task}_length", None)
        limit = own or item.limit or self._limit
        tokenizer = self._model.tokenizer
        if limit is None or tokenizer is None:
            return
        text = (item.prompt or "") + text
        way = self._way(limit)
        for start in (text,) if way is None else way.beginnings(text):
            count = functools.partial(tokenizer, start, truncation=False, verbose=False)
            length = len(self._aside.run(count, len(start))["input_ids"])
            if length > limit:
                raise InvalidInputError(
                    f"the text has {length if start == text else f'over {length}'} tokens and the model takes {limit}: "
                    f"shorten it, split it, or pass truncate=True to embed its first {limit}"
                )


class ImageEmbedding(TextEmbedding):
    """Kind `image`: vectors of images, and of texts if the model takes both, as CLIP does."""

    takes_pictures = True

    #: The size that the model wants.
    _edge: Edge | None = None

    def load(self, device: str) -> None:
        """As the other kinds."""
        super().load(device)
        self._edge = resize_of(self._path, self._revision)

    def preprocess(self, item: Any) -> Prepared:
        """A `PIL.Image.Image`, `ImageBytes`, a text, or a dict of both. A string is never an address to read from."""
        prompted = item if isinstance(item, Prompted) else Prompted(item, None)
        return super().preprocess(replace(prompted, input=with_pixels(prompted.input, self._edge)))

    def sample(self, cost: int) -> Any:
        """An image of any size: the model's processor resizes it."""
        from PIL import Image

        return Image.new("RGB", (256, 256))

    def trial_inputs(self) -> list[list[Any]]:
        """Pictures, and texts if it takes texts, too."""
        return [pictures(), *(super().trial_inputs() if "text" in self._model.modalities else [])]

    def _check(self, value: Any) -> None:
        check_image(value)


class SparseEmbedding(Embedding):
    """Kind `sparse`: SPLADE-like vectors, one weight per word of the vocabulary."""

    def _open(self, path: str, **options: Any) -> Any:
        return sentence_transformers.SparseEncoder(path, **options)

    def _output(self, features: dict[str, Any]) -> torch.Tensor:
        rows = super()._output(features)
        return rows.to_dense() if rows.layout is not torch.strided else rows

    def postprocess(self, output: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The values that are not zero, and their places."""
        row = to_numpy(output)
        places = row.nonzero()[0]
        return places, row[places]

    def plan_encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        max_active_dims: int | None = None,
        task: str | None = None,
        max_seq_length: int | None = None,
        **others: Any,
    ) -> Plan:
        """The result is a `scipy.sparse.csr_array` of shape `[n, vocabulary]`, with one row for one text."""
        refuse(others, "encode", max_active_dims=max_active_dims)
        items, _ = self._items(inputs, prompt_name, prompt, task, max_seq_length)
        most = max_active_dims or self._model.max_active_dims

        def finish(rows: list[Any]) -> Any:
            kept = [largest(places, values, most) for places, values in rows]
            return sparse_rows(kept, self._model.get_embedding_dimension())

        return items, finish


@contextmanager
def _limited(library: Any, limit: int | None) -> Iterator[None]:
    """Have the library read this many tokens of each text. Used by one thread at a time."""
    if limit is None:
        yield
        return
    before, library.max_seq_length = library.max_seq_length, limit
    try:
        yield
    finally:
        library.max_seq_length = before


def _if_any(task: str | None) -> dict[str, str]:
    """The library's argument: modules that know no task are not given one."""
    return {} if task is None else {"task": task}
