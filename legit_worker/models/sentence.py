"""What the built-in kinds on sentence-transformers share. `kinds.py` and its neighbours have each kind's own.

In: texts, images, pairs. Out: numpy arrays with the values, shapes and dtypes that sentence-transformers gives.

The library's own code preprocesses each item alone, in its task. A batch is the items' features, padded together, and
`forward` is the library's own. So a batch computes for an item what `encode` computes for this item alone. No model
calls the engine: `plan_encode` and `plan_predict` say which items a call has, and how their outputs become its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from legit_worker import golden
from legit_worker.backends.traced import Traced
from legit_worker.device.cuda import move, tf32, to_device
from legit_worker.device.devices import Launch
from legit_worker.device.linear import bytes_in_file
from legit_worker.inputs.types import PreparedText
from legit_worker.models.backend import Backend
from legit_worker.models.features import (
    Patches,
    Prepared,
    Prompted,
    as_lists,
    can_be_padded,
    check_text,
    collate,
    cost_of,
    identity_of,
    is_tokens,
    key_of,
    patches_of,
    to_numpy,
)
from legit_worker.models.lengths import config_of, routes
from legit_worker.models.padding import TRIED, Compute, minds_padding
from legit_worker.models.prompts import named_prompt
from legit_worker.models.requirements import is_missing_folder
from legit_worker.models.revision import revision_of
from legit_worker.models.tokenizing import Tokenizing, check_vocabulary, if_any


class SentenceModel:
    """What the built-in kinds share. The loader thread reads the weights; all other methods run where the tasks run."""

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
        *,
        cuda_graphs: bool = False,
        torchscript: bool = False,
    ) -> None:
        """`options`: more arguments of the library's constructor, as `loader.library_options` gives them."""
        #: The folder of the weights, or their name on the Hub and the revision there.
        self.path, self.revision = path, revision
        self._dtype = "float32" if dtype == "tf32" else dtype
        self._precision = tf32 if dtype == "tf32" else nullcontext
        self._options = dict(options or {})
        self._backend = Backend(backend, dtype, cache_dir, records=cuda_graphs, traces=torchscript)
        #: The library's own model; None before it is loaded.
        self.library: Any = None
        self._texts: Any = None
        self._patches = Patches()
        self._minds_padding: bool | None = None
        self._computes_in = ""
        self._commit: str | None = None

    def load(self, device: str) -> None:
        """Read the weights from the path, or from the local cache, and put them on `device`."""
        if is_missing_folder(self.path):
            # The library would take the path for a name on the Hub, and complain about its characters.
            raise FileNotFoundError(f"there is no folder {self.path}")
        dtype = self._backend.dtype_to_read(self._dtype)
        more = {**self._options.pop("model_kwargs", {}), **({"dtype": dtype} if dtype else {})}
        self.library = self._open(
            self.path, device="cpu", revision=self.revision, model_kwargs=more or None, **self._options
        ).eval()
        check_vocabulary(getattr(self.library, "tokenizer", None))  # not every first module has one
        move(self.library, device)
        self._texts = Tokenizing(self.library)
        self._patches = patches_of(config_of(routes(self.library)[0]))
        floats = (one.dtype for one in self.library.parameters() if one.is_floating_point())
        self._computes_in = (
            "tf32" if self._precision is tf32 else str(next(floats, torch.float32)).removeprefix("torch.")
        )
        self._backend.choose(device, self)
        self._backend.moved(device, self)
        self._backend.trace(device, self)
        self._commit = revision_of(self.path, self.revision)

    @property
    def backend(self) -> dict[str, Any]:
        """What computes it, and why, as `inspect stats` shows it."""
        return self._backend.report()

    def computed_by(self, items: Sequence[Prompted], result: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """What an index must know of the result of a call with these options: see `docs/result-routing.md`."""
        precision = options.get("precision")
        graphs = self._backend.graphs
        prompts = {item.prompt or None for item in items}
        return {
            "revision": self._commit,
            "dimensions": self._dimensions(result, options),
            "dtype": precision if precision not in (None, "float32") else graphs.dtype if graphs else self._computes_in,
            "prompt": prompts.pop() if len(prompts) == 1 else None,
            "backend": "openvino" if graphs else "torch",
        }

    def _dimensions(self, result: Any, options: Mapping[str, Any]) -> int | None:
        """How many numbers each row of a result has; None if these are no vectors."""
        return None

    def _open(self, path: str, **options: Any) -> Any:
        raise NotImplementedError

    def to(self, device: str) -> None:
        """Move the weights."""
        move(self.library, device)
        self._backend.moved(device, self)

    def unload(self) -> None:
        """Free the weights' memory now: the library's objects are in cycles, and failed tasks may hold this one."""
        self._backend.unload()
        self.library.to("meta")

    def sample(self, cost: int) -> Any:
        """A text of about `cost` tokens."""
        return "a " * cost

    def memory(self) -> int:
        """Bytes of its parameters and buffers, or of its graphs."""
        if self._backend.graphs is not None:
            return self._backend.graphs.memory
        tensors = {id(tensor): tensor for tensor in (*self.library.parameters(), *self.library.buffers())}
        held: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return held - bytes_in_file(self.library)

    def preprocess(self, item: Any) -> Prepared:
        """Tokenize or resize one input. Raises `InvalidInputError` if the input is not of this model's kind."""
        prompted = item if isinstance(item, Prompted) else Prompted(item, None)
        if isinstance(prompted.input, PreparedText):
            features = self._texts.of_ids(prompted.input, prompted)
            return Prepared(features, len(prompted.input.ids), "text")
        self._check(prompted.input)
        short = self._texts.by_short_way(prompted)
        if short is not None:
            return Prepared(short, len(short["input_ids"]), "text")
        features, task = self._texts.by_the_library(prompted), prompted.task
        if self._texts.has_several or not can_be_padded(features):
            key = ("raw", prompted.prompt, task, prompted.limit)
            return Prepared({}, cost_of(features, self._patches), key, task, prompted)
        return Prepared(features, cost_of(features, self._patches), (task, key_of(features)), task)

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
        return dict(self.library.prompts)

    def max_seq_length(self) -> int | None:
        """The most tokens that it reads; None if there is no limit."""
        limit: int | None = self._texts.limit
        return limit

    def check_limit(self, limit: int) -> None:
        """Raise `LimitError` if it can't read texts of this many tokens."""
        self._texts.check_limit(limit)

    def learn_padding(self, compute: Compute) -> None:
        """Find out once whether its rows depend on padding. `compute` computes batches of this model."""
        if self._minds_padding is None:
            trials = [self.preprocess(item) for item in self.trial_inputs()[-1][:TRIED]]
            self._minds_padding = minds_padding(self.path, trials, compute)

    def cost(self, item: Prepared) -> int:
        """Tokens of a text, patches of an image: see `cost_of`."""
        return item.cost

    def batch_key(self, item: Prepared) -> Hashable:
        """Inputs share a batch if their modality, their image size and their prompt length are equal.

        So are their lengths if the model's rows depend on padding. One that is padded never shares
        a batch with one that is not.
        """
        return (item.key, item.cost) if self._minds_padding else (item.key, self.pads(item))

    def identity(self, item: Prepared) -> Hashable:
        """Texts with the same tokens have the same output."""
        return identity_of(item.features)

    def pads(self, item: Prepared) -> bool:
        """Whether the item's batch is padded to its longest item, and that is computed."""
        traced = self._backend.traced
        return traced is None or traced.pads or bool(traced.obstacle) or not _is_traced(traced, item)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Prepared]) -> torch.Tensor | Launch:
        """Compute one row per item, as the model's last module gives it: shape `[n, dim]`."""
        if self._backend.graphs is not None:
            return self._backend.graphs.launch(self._features(batch), len(batch))
        if (found := self._traced(batch)) is not None:
            traced, features = found
            return traced.rows(features)
        with self._precision():
            rows = self._recorded(batch)
            if rows is not None:
                return rows
            return self.compute(to_device(self._features(batch), self.library.device), batch[0].task)

    @property
    def computes_beside(self) -> bool:
        """Whether `computation` may give something."""
        if self._backend.graphs is not None:
            return self._backend.graphs.computes_beside
        return self._backend.traced is not None and self._backend.traced.computes_beside

    def computation(self, batch: Sequence[Prepared]) -> Callable[[], torch.Tensor | Launch] | None:
        """What computes this batch's rows on any thread; None if `forward` must."""
        if self._backend.graphs is not None:
            return self._backend.graphs.computation(self._features(batch))
        traced = self._backend.traced
        found = None if traced is None or traced.is_due or not traced.computes_beside else self._traced(batch)
        return None if found is None else functools.partial(_infer, *found)

    def _traced(self, batch: Sequence[Prepared]) -> tuple[Traced, dict[str, Any]] | None:
        """What computes this batch as TorchScript, and its features; None if nothing does."""
        traced = self._backend.traced
        if traced is None or not _is_traced(traced, max(batch, key=self.cost)):
            return None
        features = self._features(batch)
        return (traced, features) if traced.takes(features) else None

    def _recorded(self, batch: Sequence[Prepared]) -> torch.Tensor | None:
        """The rows of a batch by a CUDA graph, or those of a batch that is to become one; None if it has none."""
        recorded, first = self._backend.recorded, batch[0]
        if recorded is None or first.task is not None or not is_tokens(first.features):
            return None
        return recorded.rows([as_lists(item.features) for item in batch], self.library.device)

    def compute(self, features: dict[str, Any], task: str | None = None) -> torch.Tensor:
        """The rows of a batch's features, by torch."""
        return self.output(self.library(features, **if_any(task)))

    def trial_inputs(self) -> list[list[Any]]:
        """Each kind of input that it takes, short and long ones."""
        return [golden.texts()]

    def output(self, features: dict[str, Any]) -> torch.Tensor:
        """One row per item, in the features that the library's modules have filled."""
        embeddings: torch.Tensor = features["sentence_embedding"]
        return embeddings

    def postprocess(self, output: torch.Tensor) -> Any:
        """Make one row a numpy array. A plan's `finish` does the rest, for all rows of a call together."""
        return to_numpy(output)

    def _features(self, batch: Sequence[Prepared]) -> dict[str, Any]:
        if batch[0].raw is not None:
            inputs = [item.raw.input for item in batch if item.raw]
            features: dict[str, Any] = self._texts.of_batch(
                inputs, batch[0].raw.prompt, batch[0].task, batch[0].raw.limit
            )
            return features
        return collate([item.features for item in batch], self.library.tokenizer)

    def _items(
        self,
        inputs: Any,
        prompt_name: str | None,
        prompt: str | None,
        task: str | None = None,
        limit: int | None = None,
        *,
        is_told: bool = True,
    ) -> tuple[list[Prompted], bool]:
        """The call's items, and whether it has a single input, whose result is no list."""
        self._texts.check_limit(limit)
        inputs = _without_arrays(inputs)
        is_single = self.library.is_singular_input(inputs)
        items = [inputs] if is_single else list(inputs)
        name = self.library.default_prompt_name if prompt_name is None else prompt_name
        chosen = prompt if prompt is not None else self._named_prompt(name)
        task = task if self._texts.minds_task else None

        def prompted(one: Any) -> Prompted:
            knows = isinstance(one, PreparedText) and one.prompt is not None and not is_told
            return Prompted(one, one.prompt if knows else chosen, task, limit)

        return list(map(prompted, items)), is_single

    def _named_prompt(self, name: str | None) -> str | None:
        return named_prompt(self.library.prompts, name)


def _is_traced(traced: Traced, item: Prepared) -> bool:
    """Whether TorchScript computes a batch of such items, if it computes any."""
    return item.task is None and item.raw is None and item.cost <= traced.longest and is_tokens(item.features)


@torch.inference_mode()
def _infer(traced: Traced, features: dict[str, Any]) -> torch.Tensor:
    return traced.compute(features)


def _without_arrays(value: Any) -> Any:
    """Make lists of an array of texts, or of pairs of texts. Other arrays, such as pixels, stay."""
    is_of_texts = isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "OU"
    return value.tolist() if is_of_texts else value
