"""The built-in kinds that give one vector: `embed`, `image`, `sparse`. Others are in `multivector.py`, `reranker.py`.

In: texts and images. Out: numpy arrays with the values, shapes and dtypes that sentence-transformers gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import sentence_transformers
import torch
from numpy.typing import NDArray

from legit_worker import golden
from legit_worker.errors import InvalidInputError
from legit_worker.models.features import (
    Prepared,
    Prompted,
    as_the_library_takes_them,
    dense_rows,
    largest,
    sparse_rows,
    to_numpy,
)
from legit_worker.models.modalities import check_image, with_pixels
from legit_worker.models.options import refuse
from legit_worker.models.prompts import first_prompt
from legit_worker.models.protocol import Plan
from legit_worker.models.sentence import SentenceModel
from legit_worker.prep.images import Edge, resize_of


class Embedding(SentenceModel):
    """What the kinds that give vectors share. Arguments and results are the library's, as numpy arrays."""

    #: Each kind's own.
    plan_encode: Callable[..., Plan]

    def _dimensions(self, result: Any, options: Mapping[str, Any]) -> int | None:
        """A binary row has eight dimensions in each number. The last number may be filled up."""
        if not hasattr(result, "shape"):
            return None
        if options.get("precision") not in ("binary", "ubinary"):
            return int(result.shape[-1]) or None
        with self.library.truncate_embeddings(options.get("truncate_dim") or self.library.truncate_dim):
            most = self.get_embedding_dimension()
        return min([8 * int(result.shape[-1]), *filter(None, [most])]) or None

    def plan_encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Plan:
        """As `plan_encode`, with the prompt for queries, and the model's own way for them if it has one."""
        return self._plan_for("query", inputs, prompt_name, prompt, options)

    def plan_encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **options: Any
    ) -> Plan:
        """The same for documents."""
        return self._plan_for("document", inputs, prompt_name, prompt, options)

    def _plan_for(
        self, task: str, inputs: Any, name: str | None, prompt: str | None, options: Mapping[str, Any]
    ) -> Plan:
        if name is None and prompt is None:
            name = first_prompt(self.library.prompts, task)
        return self.plan_encode(inputs, name, prompt, task=task, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> NDArray[Any]:
        """Compare each vector with each, by the model's own function: shape `[n, m]`."""
        return self._compare(self.library.similarity, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> NDArray[Any]:
        """Compare the first vectors, the second ones, and so on: shape `[n]`."""
        return self._compare(self.library.similarity_pairwise, embeddings1, embeddings2)

    def _compare(self, function: Callable[[Any, Any], torch.Tensor], *embeddings: Any) -> NDArray[Any]:
        return to_numpy(function(*map(as_the_library_takes_them, embeddings)).cpu())

    def get_embedding_dimension(self) -> Any:
        """Length of the vectors; None if the library does not know it."""
        return self.library.get_embedding_dimension()


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
        is_told: bool = True,
        **others: Any,
    ) -> Plan:
        """`Handle.encode` describes the arguments; shape `[dim]` for one input, `[n, dim]` for a list.

        `is_told`: whether the caller says what stands before the texts; if not, a prepared text has its own prompt.
        """
        refuse(others, "encode", truncate_dim=truncate_dim, max_seq_length=max_seq_length)
        items, is_single = self._items(inputs, prompt_name, prompt, task, max_seq_length, is_told=is_told)

        def finish(rows: list[Any]) -> Any:
            dimension = truncate_dim or self.library.truncate_dim
            vectors = dense_rows(rows, dimension, normalize=normalize_embeddings, precision=precision)
            return vectors[0] if is_single else vectors

        return items, finish

    def check_length(self, item: Prompted) -> None:
        """Raise `InvalidInputError`, with both numbers, if the model would cut the text."""
        self._texts.check_length(item)


class ImageEmbedding(TextEmbedding):
    """Kind `image`: vectors of images, and of texts if the model takes both, as CLIP does."""

    takes_pictures = True

    #: The size that the model wants.
    _edge: Edge | None = None

    def load(self, device: str) -> None:
        """As the other kinds."""
        super().load(device)
        self._edge = resize_of(self.path, self.revision)

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
        return [golden.pictures(), *(super().trial_inputs() if "text" in self.library.modalities else [])]

    def _check(self, value: Any) -> None:
        check_image(value)
        parts = sorted(value) if isinstance(value, dict) else ["text" if isinstance(value, str) else "image"]
        if not self.library.supports(parts[0] if len(parts) == 1 else tuple(parts)):
            known = (one if isinstance(one, str) else " with ".join(one) for one in self.library.modalities)
            raise InvalidInputError(
                f"this model takes no {' with '.join(parts)} as one input: it takes {', '.join(known)}"
            )


class SparseEmbedding(Embedding):
    """Kind `sparse`: SPLADE-like vectors, one weight per word of the vocabulary."""

    def _open(self, path: str, **options: Any) -> Any:
        return sentence_transformers.SparseEncoder(path, **options)

    def output(self, features: dict[str, Any]) -> torch.Tensor:
        """The rows, with their zeros."""
        rows = super().output(features)
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
        others.pop("save_to_cpu", None)
        if not others.pop("convert_to_sparse_tensor", True):
            raise ValueError(
                "dense rows are refused: the result is a scipy.sparse.csr_array; its toarray() has the zeros"
            )
        refuse(others, "encode", max_active_dims=max_active_dims, max_seq_length=max_seq_length)
        items, _ = self._items(inputs, prompt_name, prompt, task, max_seq_length)
        most = max_active_dims or self.library.max_active_dims

        def finish(rows: list[Any]) -> Any:
            kept = [largest(places, values, most) for places, values in rows]
            return sparse_rows(kept, self.library.get_embedding_dimension())

        return items, finish
