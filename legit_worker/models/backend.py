"""A built-in kind's backend: what computes its batches, torch or OpenVINO.

In: the operator's choice, and a model that torch has loaded. Out: its graphs, with torch's weights gone; or none, and a
model that torch computes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from legit_worker.backends.choice import Subject, Wanted, choose
from legit_worker.backends.graphs import Graphs
from legit_worker.backends.recorded import RecordedBatches
from legit_worker.backends.traced import Traced, trace
from legit_worker.device.cuda import cuda_device
from legit_worker.device.linear import speed_up_linear_layers
from legit_worker.errors import BackendError, said
from legit_worker.models.features import collate, is_tokens
from legit_worker.models.lengths import positions, routes
from legit_worker.models.shortway import leaves_out_prompts
from legit_worker.prep.texts import model_folder

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from legit_worker.models.sentence import SentenceModel


class Backend:
    """What computes one model. The loader thread chooses it; `graphs` is None while torch computes."""

    def __init__(
        self, name: str, dtype: str | None, cache_dir: Path | None, *, records: bool = False, traces: bool = False
    ) -> None:
        """`records`: whether torch's small batches become CUDA graphs on a GPU. `traces`: TorchScript on a CPU."""
        self._name, self._dtype, self._cache_dir = name, dtype, cache_dir
        self._records, self._traces = records, traces
        self.graphs: Graphs | None = None
        #: Torch's small batches on a GPU; None on a CPU.
        self.recorded: RecordedBatches | None = None
        #: Torch's batches of texts on a CPU, without Python; None on a GPU, and if they can't be.
        self.traced: Traced | None = None
        self._reason = ""

    def dtype_to_read(self, dtype: str | None) -> str | None:
        """The type in which torch reads the weights: to convert them, without another rounding."""
        if self._name == "torch":
            return dtype
        return None if dtype in (None, "auto") else "float32"

    def report(self) -> dict[str, Any]:
        """For `inspect stats`."""
        name = "torch" if self.graphs is None else f"openvino {self.graphs.dtype}"
        found: dict[str, Any] = {"backend": name, **({"backend_reason": self._reason} if self._reason else {})}
        if self.recorded is not None:
            found["cuda_graphs"] = self.recorded.obstacle or len(self.recorded)
        if self.traced is not None:
            found |= self.traced.report()
        return found

    def moved(self, device: str, model: SentenceModel) -> None:
        """Its weights are at other addresses, on this device."""
        self._forget()
        limit = model.max_seq_length()
        if device.startswith("cuda") and self._records and limit is not None:
            library: Any = model.library
            most = positions(routes(library)[0])
            self.recorded = RecordedBatches(
                cuda_device(device).recorder,
                model.compute,
                lambda texts, length: collate(texts, library.tokenizer, length),
                limit if most is None else min(limit, most),
                module=library,
                name=model.path,
            )

    def trace(self, device: str, model: SentenceModel) -> None:
        """Have a small model's batches on a CPU computed without Python, beside tasks. Called once, at its load."""
        if self.graphs is not None:
            self.graphs.divide(wanted=self._traces)
            return
        if not self._traces or device != "cpu":
            return
        try:
            self.traced = _trace(model)
        except Exception as error:  # torch's own forward computes it
            logger.debug("model %s has no TorchScript: %s", model.path, said(error))

    def _forget(self) -> None:
        if self.traced is not None:
            self.traced.unload()
            self.traced = None
        if self.recorded is not None:
            self.recorded.forget()
            self.recorded = None

    def choose(self, device: str, model: SentenceModel) -> None:
        """Find out what computes it, and free torch's weights if that is not torch. Raises `BackendError`."""
        library: Any = model.library
        if self._name == "torch":
            speed_up_linear_layers(library)
            return
        stored = next((one.dtype for one in library.parameters() if one.is_floating_point()), torch.float32)
        library.float()
        folder = model_folder(model.path, model.revision)
        wanted = Wanted(backend=self._name, dtype=self._dtype, cache_dir=self._cache_dir, device=device, folder=folder)
        chosen = choose(wanted, _subject(model, stored))
        self.graphs, self._reason = chosen.graphs, chosen.reason
        if self.graphs is not None:
            library.to("meta")

    def unload(self) -> None:
        """Free the graphs."""
        self.graphs = None
        self._forget()


def _subject(model: SentenceModel, stored: torch.dtype) -> Subject:
    library: Any = model.library
    obstacle = _obstacle(model)
    groups = [] if obstacle else [[model.preprocess(item) for item in inputs] for inputs in model.trial_inputs()]
    if any(len({item.key for item in group}) > 1 for group in groups):
        obstacle = "its inputs have different shapes"
    return Subject(
        kind=type(model).__name__,
        is_ranking=model.is_ranking,
        takes_pictures=model.takes_pictures,
        module=library,
        compute=model.compute,
        finish=model.output,
        groups=[[item.features for item in group] for group in groups],
        collate=lambda items: collate(items, library.tokenizer),
        obstacle=obstacle,
        stored=stored,
        tune=lambda: speed_up_linear_layers(library),
    )


def _obstacle(model: SentenceModel) -> str | None:
    """What an input's features don't tell, and `forward` needs; None if there is nothing."""
    library: Any = model.library
    if "task" in library.get_model_kwargs():
        return "its modules treat queries and documents differently"
    if leaves_out_prompts(library):
        return "its pooling leaves out the prompt, whose length differs"
    if model.preprocess(model.trial_inputs()[0][0]).raw is not None:
        return "its inputs have no rows that can be padded"
    return None


def _trace(model: SentenceModel) -> Traced:
    library: Any = model.library
    if reason := _obstacle(model) or _own_code(library):
        raise BackendError(reason)
    texts = [model.preprocess(item).features for group in model.trial_inputs() for item in group]
    return trace(
        library,
        model.compute,
        lambda items: collate(items, library.tokenizer),
        [features for features in texts if is_tokens(features)],
        name=model.path,
    )


def _own_code(library: Any) -> str | None:
    """Whether a module is of the model's repository: nobody knows what it does for other inputs than a trace's."""
    is_own = any(type(module).__module__.startswith("transformers_modules") for module in library.modules())
    return "its modules are its repository's own" if is_own else None
