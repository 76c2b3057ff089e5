"""A model's small batches of texts as CUDA graphs, one for each shape.

In: batches of texts, and what computes them by torch. Out: the same rows, with a launch that is one call.

A graph fits one shape. So a batch is padded to the next of few shapes: with padding beside its tokens, and with copies
of its first row. Torch computes the first batch of a shape, and loads the kernels. The second is recorded, and compared
with torch's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from legit_worker.device.capture import Recorder, Recording
from legit_worker.device.cuda import to_device
from legit_worker.device.memory import is_out_of_memory, let_go
from legit_worker.errors import said

logger = logging.getLogger(__name__)

#: Lengths in tokens, a third to a half apart: a batch is padded to the next one.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

#: The most padded tokens of a recorded batch: for a larger one the GPU takes longer than the launch. The memory for one
#: of this many is set aside for batches anyway, see `loaded.RESERVE`.
MOST_TOKENS = 4096

#: The most shapes of a model that are known. Batches of one kind have 79. The length of a prompt may make a kind, and
#: each call may name another prompt.
MOST_SHAPES = 256

#: How far a graph's rows may be from torch's, relative to the largest number, by the bytes of a number. Torch may take
#: another kernel for a batch without padding.
TOLERANCES = {8: 1e-3, 4: 1e-3, 2: 3e-2}

#: A text's features: lists with a number for each token, and values that are the same for every text.
Features = Mapping[str, Any]


#: The names of a text's features, and the values that are no tensors: a graph has them for good.
Kind = tuple[tuple[str, str], ...]


class Shape(NamedTuple):
    """The size of a batch's tensors."""

    rows: int
    length: int
    kind: Kind = ()


@dataclass
class _Known:
    """What is known of a shape."""

    #: Seconds of the main thread for torch's launch.
    launch_seconds: float
    recording: Recording | None = None
    #: The GPU takes longer than such a launch, so that less padding is worth more than a short launch.
    is_slow: bool = False


class RecordedBatches:
    """One model's. `forward` asks it, while no other thread launches a batch."""

    def __init__(
        self,
        recorder: Recorder,
        compute: Callable[[dict[str, Any]], torch.Tensor],
        collate: Callable[[Sequence[Features], int], dict[str, Any]],
        longest: int,
    ) -> None:
        """`compute`: from features on the GPU to rows. `collate`: joins texts' features, padded to a length.

        `longest`: the most tokens of one text.
        """
        self._recorder, self._compute, self._collate, self._longest = recorder, compute, collate, longest
        self._shapes: LRUCache[Shape, _Known] = LRUCache(MOST_SHAPES)
        #: Whether a text has the same row with padding and without.
        self._pads = False
        #: Why nothing is recorded any more.
        self.obstacle = ""

    def __repr__(self) -> str:
        return f"<RecordedBatches of {len(self)} shapes{self.obstacle and f', none any more: {self.obstacle}'}>"

    def __len__(self) -> int:
        return sum(known.recording is not None for known in self._shapes.values())

    def forget(self) -> None:
        """Let go of all recordings: their memory is needed, or the weights leave their addresses."""
        self._shapes.clear()

    def rows(self, texts: Sequence[Features], device: torch.device) -> torch.Tensor | None:
        """The rows of a batch; None if torch is to compute it as it is. Raises what `compute` raises."""
        if self.obstacle or not self._recorder.may_replay:
            return None
        shape = shape_of(len(texts), max(len(text["input_ids"]) for text in texts), self._longest)
        if shape is None:
            return None
        shape = shape._replace(kind=_kind_of(texts[0]))
        if self._is_slow(shape) or not self._can_pad(texts[0], device):
            return None
        features = self._collate([*texts, *[texts[0]] * (shape.rows - len(texts))], shape.length)
        return self._of_shape(shape, features, device)[: len(texts)]

    def _can_pad(self, text: Features, device: torch.device) -> bool:
        """Compare a text's first half, alone and padded beside the text. Once for a model; it waits for the GPU."""
        if self._pads or self.obstacle:
            return self._pads
        length = len(text["input_ids"])
        half = {name: value[: (length + 1) // 2] if isinstance(value, list) else value for name, value in text.items()}
        try:
            alone = self._compute(to_device(self._collate([half], 0), device))
            padded = self._compute(to_device(self._collate([half, text], min(length + 8, self._longest)), device))[:1]
            difference = _difference(alone, padded[:, : alone.shape[1]])
            self._pads = difference <= _tolerance(alone)
            reason = f"the rows of a text with padding and without differ by {difference:.1e}"
        except Exception as error:
            reason = _reason(error)
            let_go(error)
        if not self._pads:
            self._give_up(reason)
        return self._pads

    def _is_slow(self, shape: Shape) -> bool:
        known = self._shapes.get(shape)
        if known is None:
            return False
        if known.recording is not None and (known.recording.seconds or 0.0) > known.launch_seconds:
            known.recording, known.is_slow = None, True
        return known.is_slow

    def _of_shape(self, shape: Shape, features: dict[str, Any], device: torch.device) -> torch.Tensor:
        known = self._shapes.get(shape)
        if known is not None and known.recording is not None:
            replayed: torch.Tensor = known.recording.replay(features)
            return replayed
        features = to_device(features, device)
        start = perf_counter()
        rows = self._compute(dict(features))
        seconds = perf_counter() - start
        if known is None:
            self._shapes[shape] = _Known(seconds)
        else:
            known.launch_seconds = min(seconds, known.launch_seconds)
            self._record(shape, known, features, rows)
        return rows

    def _record(self, shape: Shape, known: _Known, features: dict[str, Any], rows: torch.Tensor) -> None:
        """Record this shape, if a graph gives these rows, too, for these features. It waits for the GPU."""
        inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        try:
            recording = self._recorder.record(self, lambda own: self._compute({**features, **own}), inputs)
            if recording is None:
                return
            difference = _difference(rows, recording.replay(inputs))
        except Exception as error:
            self._give_up(_reason(error))
            let_go(error)
            return
        if difference <= _tolerance(rows):
            known.recording = recording
        else:
            self._give_up(f"the rows of {shape.rows} texts of {shape.length} tokens differ by {difference:.1e}")

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        self.forget()
        logger.info("batches are not recorded as CUDA graphs: %s", reason)


def shape_of(count: int, length: int, longest: int) -> Shape | None:
    """The shape to which a batch of texts is padded; None if it is too large to be recorded."""
    rows = 1 << (count - 1).bit_length()
    fitting = (most for bucket in LENGTHS if (most := min(bucket, longest)) >= length)
    shape = Shape(rows, next(fitting, MOST_TOKENS + 1))
    return shape if shape.rows * shape.length <= MOST_TOKENS else None


def _kind_of(text: Features) -> Kind:
    return tuple((name, "" if isinstance(value, list) else str(value)) for name, value in sorted(text.items()))


def _reason(error: Exception) -> str:
    return "no memory is left" if is_out_of_memory(error) else f"{type(error).__name__}: {said(error)}"


def _tolerance(rows: torch.Tensor) -> float:
    return TOLERANCES.get(rows.element_size(), TOLERANCES[2])


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest one, relative to the largest number."""
    expected, found = expected.float(), found.float()
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))
