"""A small model's forward pass on a CPU as TorchScript: torch's own operators in their order, without Python between.

In: a torch module and some texts' features; later batches of features. Out: the same rows as the module's.

Python's part is 5 of the 14 ms that MiniLM takes for one text, and needs the interpreter lock before each of a hundred
operators. Without it, a batch runs on another thread as if it was alone (`device.streams`).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from legit_worker.backends.closeness import LATE, tells, too_far
from legit_worker.backends.graphs import Features, Rows, quietly, tensors_of
from legit_worker.backends.unpadded import Compute, without_padding
from legit_worker.device.memory import is_out_of_memory
from legit_worker.errors import BackendError, is_of_handler, said

logger = logging.getLogger(__name__)

#: The most weights beside tables. MiniLM has 11 million, and a model of BERT's size 85: it would gain too little, and
#: its trace takes long.
MOST_WEIGHTS = 50_000_000

#: The most tokens of a text in a batch that is computed so: no longer one is compared at the load.
MOST_TOKENS = 512

#: Which batches are compared with torch's, and each how many after them: a module may choose its way by its input.
COMPARED, COMPARED_EACH = (1, 8, 64), 512


def trace(
    module: torch.nn.Module,
    compute: Compute,
    collate: Callable[[Sequence[Features]], dict[str, Any]],
    texts: Sequence[Features],
    *,
    name: str,
) -> Traced:
    """Return the module as TorchScript, and without padding if it allows that; a large one only without padding.

    Raises `BackendError` if that would gain little, or computes something else, and what the module and torch's trace
    raise.

    `compute` uses `module`. `collate` joins texts' features, padded. `texts`: short and long ones. `name`: the model's,
    for the log.
    """
    by_length = sorted(map(_shortened, texts), key=_length)
    unpadded = without_padding(module, compute)
    if (weights := _weights(module)) > MOST_WEIGHTS:
        if unpadded is None:
            raise BackendError(f"with {weights} weights it would gain little")
        shorter = by_length[: 1 + len(by_length) // 2]  # long ones would take seconds
        with quietly(), torch.no_grad():
            batch = collate([shorter[0], shorter[len(shorter) // 2], shorter[-1]])
            rows = Rows(module, unpadded, batch).eval()
            found = ByPython(rows, compute, batch, _length(by_length[-1]), name=name, key="", pads=False)
            found.check(batch)
        return found
    if unpadded is not None:
        try:
            return _trace(module, unpadded, compute, collate, by_length, name=name)
        except Exception as error:
            logger.debug("model %s: TorchScript computes padding: %s", name, said(error))
    return _trace(module, compute, compute, collate, by_length, name=name)


def _trace(
    module: torch.nn.Module,
    way: Compute,
    compute: Compute,
    collate: Callable[[Sequence[Features]], dict[str, Any]],
    by_length: Sequence[Features],
    *,
    name: str,
) -> Traced:
    """Trace `way`, and compare its rows with those of `compute`. Raises `BackendError`, and what those raise."""
    pads = way is compute
    with quietly(), torch.no_grad():
        example = collate([by_length[len(by_length) // 4], by_length[len(by_length) // 2]])
        compute(dict(example))  # some modules note a dimension in their first batch
        rows, tensors = Rows(module, way, example).eval(), tuple(tensors_of(example).values())
        key = f"{name} {module} {next(module.parameters()).dtype} {pads}"
        kept = _kept[key]
        script = kept.pop() if kept else None
        if script is None:
            script = torch.jit.trace(rows, tensors, check_trace=False)  # type: ignore[no-untyped-call]
        else:
            _fill(script, rows)
        traced = Traced(script, compute, example, _length(by_length[-1]), name=name, key=key, pads=pads)
        try:
            for batch in (by_length[:1], by_length[:8], [by_length[0], by_length[-1]]):
                traced.check(collate(batch))
        except Exception:
            traced.unload()  # the next load's comparisons refuse it again, and take no more memory
            raise
    return traced


#: Of models that have left memory, without their weights: torch keeps 10 MiB of each trace for good. The next load of
#: such a model takes its own again, and compares its rows as any load does.
_kept: defaultdict[str, list[Any]] = defaultdict(list)


def _fill(script: Any, rows: torch.nn.Module | None) -> None:
    """Give a trace the weights of the same module that was loaded anew, or none."""
    source = script if rows is None else rows
    named = [*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        path, _, last = name.rpartition(".")
        setattr(script.get_submodule(path), last, torch.empty(0) if rows is None else tensor)


def _weights(module: torch.nn.Module) -> int:
    """How many there are, each of which a token needs: all but those of tables."""
    tables = {
        id(weight) for part in module.modules() if isinstance(part, torch.nn.Embedding) for weight in part.parameters()
    }
    return sum(weight.numel() for weight in module.parameters() if id(weight) not in tables)


def _shortened(text: Features) -> Features:
    return {name: _first(value) for name, value in text.items()}


def _first(value: Any) -> Any:
    if isinstance(value, list):
        return value[:MOST_TOKENS]
    return value[:, :MOST_TOKENS] if isinstance(value, torch.Tensor) else value


def _length(text: Features) -> int:
    ids = text["input_ids"]
    return len(ids) if isinstance(ids, list) else int(ids.shape[-1])


class Traced:
    """One model's. Any thread may have it `compute`, also several at once."""

    #: In the log.
    called = "TorchScript"

    def __init__(
        self, script: Any, compute: Compute, example: Features, longest: int, *, name: str, key: str, pads: bool
    ) -> None:
        """`example`: the features of the trace."""
        self._script, self._compute, self._name, self._key = script, compute, name, key
        self._tensors = list(tensors_of(example))
        self._others = self._without_tensors(example)
        #: Whether all texts of a batch take as long as its longest one.
        self.pads = pads
        #: The most tokens of a text that it is known to compute.
        self.longest = longest
        # Batches so far, and the number of the next one that is compared.
        self._batches, self._due = 0, COMPARED[0]
        #: Why torch computes all batches by now.
        self.obstacle = ""

    def __repr__(self) -> str:
        return f"<Traced {self._name}, up to {self.longest} tokens{self.obstacle and f', no more: {self.obstacle}'}>"

    def takes(self, features: Features) -> bool:
        """Whether it computes batches of this kind, if no text is too long."""
        return (
            not self.obstacle
            and len(features) == len(self._tensors) + len(self._others)
            and all(isinstance(features.get(tensor), torch.Tensor) for tensor in self._tensors)
            and self._without_tensors(features) == self._others
        )

    def _without_tensors(self, features: Features) -> Mapping[str, str]:
        """What a trace has for good."""
        return {name: str(value) for name, value in features.items() if name not in self._tensors}

    def report(self) -> dict[str, Any]:
        """For `inspect stats`: what is so, or why it is no more."""
        state = self.obstacle or True
        return {"torchscript": state} if self.pads else {"torchscript": state, "unpadded": state}

    def unload(self) -> None:
        """Let go of the weights. It computes no batch any more."""
        _fill(self._script, None)
        _kept[self._key].append(self._script)

    @property
    def computes_beside(self) -> bool:
        """Whether another thread may compute the next batch, beside tasks."""
        return not self.obstacle

    @property
    def is_due(self) -> bool:
        """Whether the next batch is compared with the module's rows.

        Not beside tasks: the module's Python would wait for the interpreter lock, and find the defaults that they set.
        """
        return self._batches + 1 >= self._due

    def rows(self, features: dict[str, Any]) -> torch.Tensor:
        """The rows of a batch that it takes. Raises what the module itself raises for this batch."""
        if not self.is_due:
            return self.compute(features)
        rows, expected = self.compute(features), self._compute(dict(features))
        later = (number for number in COMPARED if number > self._batches)
        self._due = min(later, default=self._batches + COMPARED_EACH)
        if (distance := too_far(expected, rows)) is not None:
            reason = f"rows differ by {distance:.1e}"
            logger.warning(LATE, self._name, COMPARED_EACH, reason)
            self._give_up(reason)
        return expected

    def compute(self, features: dict[str, Any]) -> torch.Tensor:
        """The same without a comparison."""
        self._batches += 1
        try:
            return self._run(features)
        except Exception as error:
            if is_out_of_memory(error) or is_of_handler(error):
                raise
            expected = self._compute(features)
            self._give_up(f"{type(error).__name__}: {said(error)}")  # not if the batch itself can't be computed
            return expected

    def check(self, features: dict[str, Any]) -> None:
        """Raise `BackendError` if the rows of this batch are not the module's."""
        expected, rows = self._compute(dict(features)), self._run(features)
        if not tells(expected):
            raise BackendError("its rows are not finite, or all zero")
        if (distance := too_far(expected, rows)) is not None:
            raise BackendError(f"rows of {tuple(features['input_ids'].shape)} tokens differ by {distance:.1e}")

    def _run(self, features: Features) -> torch.Tensor:
        # Otherwise torch makes other plans for the shapes that it sees first.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            rows: torch.Tensor = self._script(*(features[name] for name in self._tensors))
        return rows

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        logger.info("model %s: %s computes no more of its batches: %s", self._name, self.called, reason)


class ByPython(Traced):
    """A large model's batches without padding, by its own Python. The main thread computes them."""

    called = "the way without padding"
    computes_beside = False

    def report(self) -> dict[str, Any]:
        """For `inspect stats`."""
        return {"unpadded": self.obstacle or True}

    def unload(self) -> None:
        """Nothing is kept."""

    def _run(self, features: Features) -> torch.Tensor:
        if features["attention_mask"].all():  # the module itself computes no padding either
            return self._compute(dict(features))
        rows: torch.Tensor = self._script(*(features[name] for name in self._tensors))
        return rows
