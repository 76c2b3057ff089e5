"""A model's small batches of texts as CUDA graphs, one for each shape.

In: batches of texts, and what computes them by torch. Out: the same rows, with a launch that is one call.

A graph fits one shape. So a batch is padded to the next of few shapes: with padding beside its tokens, and with copies
of its first row. Torch computes the first batches of a shape, until their launches have taken as long as a recording
takes. The next one is recorded, and compared with torch's, and so are some of its replays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from legit_worker.backends.closeness import LATE, difference, tells, tolerance, too_far
from legit_worker.device.capture import Recorder, Recording
from legit_worker.device.cuda import to_device
from legit_worker.device.memory import is_out_of_memory, let_go
from legit_worker.errors import is_of_handler, said

logger = logging.getLogger(__name__)

#: Lengths in tokens, a third to a half apart: a batch is padded to the next one.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

#: The most padded tokens of a recorded batch: for a larger one the GPU takes longer than the launch. The memory for one
#: of this many is set aside for batches anyway, see `loaded.RESERVE`.
MOST_TOKENS = 4096

#: The most shapes of a model that are known. Batches of one kind have 79. The length of a prompt may make a kind, and
#: each call may name another prompt.
MOST_SHAPES = 256

#: Which replays of a graph are compared with torch, and each how many after them. What a graph reads may change later.
COMPARED, COMPARED_EACH = (8, 64), 512

#: The most items of a module's list or dict that is searched for tensors: a vocabulary has none.
MOST_ITEMS = 1000

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

    #: Seconds of the main thread for torch's launch, the shortest one.
    launch_seconds: float = inf
    #: Seconds of torch's launches since the last try to record.
    spent: float = 0.0
    recording: Recording | None = None
    replays: int = 0
    #: What the recording reads beside weights. A module may drop it, and the memory would be another's.
    read: Sequence[torch.Tensor] = ()
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
        *,
        module: torch.nn.Module | None = None,
        name: str = "a model",
    ) -> None:
        """`compute`: from features on the GPU to rows. `collate`: joins texts' features, padded to a length.

        `longest`: the most tokens of one text. `module`: what `compute` calls. `name`: for the log.
        """
        self._recorder, self._compute, self._collate, self._longest = recorder, compute, collate, longest
        self._module, self._name = module, name
        self._shapes: LRUCache[Shape, _Known] = LRUCache(MOST_SHAPES)
        #: Whether a text has the same row with padding and without.
        self._pads = False
        #: Seconds of the main thread for a recording: the shortest one.
        self._price = 0.0
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
        known = self._shapes.setdefault(shape, _Known())
        if self._is_slow(known) or not self._can_pad(texts[0], device):
            return None
        if known.recording is None and known.spent <= self._price:
            return self._by_torch(known, self._collate(texts, 0), device)
        features = self._collate([*texts, *[texts[0]] * (shape.rows - len(texts))], shape.length)
        rows = self._recorded if known.recording is None else self._replayed
        return rows(shape, known, features, device)[: len(texts)]

    def _can_pad(self, text: Features, device: torch.device) -> bool:
        """Compare a text's first half, alone and padded beside the text. Once for a model; it waits for the GPU."""
        if self._pads or self.obstacle:
            return self._pads
        length = len(text["input_ids"])
        half = {name: value[: (length + 1) // 2] if isinstance(value, list) else value for name, value in text.items()}
        try:
            alone = self._compute(to_device(self._collate([half], 0), device))
            if not tells(alone):
                return False  # the next text may
            padded = self._compute(to_device(self._collate([half, text], min(length + 8, self._longest)), device))[:1]
            distance = difference(alone, padded[:, : alone.shape[1]])
            self._pads = distance <= tolerance(alone)
            reason = f"the rows of a text with padding and without differ by {distance:.1e}"
        except Exception as error:
            reason = _reason(error)
            let_go(error)
        if not self._pads:
            self._give_up(reason)
        return self._pads

    def _is_slow(self, known: _Known) -> bool:
        if known.recording is not None and (known.recording.seconds or 0.0) > known.launch_seconds:
            known.recording, known.read, known.is_slow = None, (), True
        return known.is_slow

    def _by_torch(self, known: _Known, features: dict[str, Any], device: torch.device) -> torch.Tensor:
        features = to_device(features, device)
        start = perf_counter()
        rows = self._compute(features)
        seconds = perf_counter() - start
        known.launch_seconds, known.spent = min(seconds, known.launch_seconds), known.spent + seconds
        return rows

    def _recorded(self, shape: Shape, known: _Known, features: dict[str, Any], device: torch.device) -> torch.Tensor:
        """Torch's rows. A graph is recorded if it gives them, too, for these features. It waits for the GPU."""
        features = to_device(features, device)
        rows = self._compute(dict(features))
        inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        start = perf_counter()
        try:
            read = list(_read_by(self._module))
            recording = self._recorder.record(self, lambda own: self._compute({**features, **own}), inputs)
            if recording is None:
                return rows
            if not tells(rows):
                known.spent = 0.0  # other texts may
                return rows
            distance = too_far(rows, recording.replay(inputs))
        except Exception as error:
            self._failed(known, error, perf_counter() - start)
            return rows
        if distance is None:
            known.recording, known.read, known.replays = recording, read, 1
            seconds = perf_counter() - start
            self._price = min(seconds, self._price or seconds)
        else:
            self._give_up(_differs(shape, distance))
        return rows

    def _failed(self, known: _Known, error: Exception, seconds: float) -> None:
        """A recording failed. If it lacked memory, the next try comes later, and the one after it still later."""
        if is_out_of_memory(error):
            known.spent, self._price = 0.0, 2 * max(seconds, self._price)
            logger.info("model %s: no memory is left for a CUDA graph; a later batch tries again", self._name)
        else:
            self._give_up(_reason(error))
        let_go(error)

    def _replayed(self, shape: Shape, known: _Known, features: dict[str, Any], device: torch.device) -> torch.Tensor:
        """A graph's rows. Torch's if these are to be compared, or if the graph fails."""
        assert known.recording is not None
        rows: torch.Tensor | None = None
        try:
            rows = known.recording.replay(features)
        except Exception as error:
            if is_out_of_memory(error) or is_of_handler(error):
                raise  # without memory, the batch is tried again without graphs
            self._give_up(_reason(error))
            let_go(error)
        known.replays += 1
        if rows is not None and known.replays not in COMPARED and known.replays % COMPARED_EACH:
            return rows
        expected = self._compute(to_device(features, device))
        if rows is not None and (distance := too_far(expected, rows)) is not None:
            logger.warning(LATE, self._name, COMPARED_EACH, _differs(shape, distance))
            self._give_up(_differs(shape, distance))
        return expected

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        self.forget()
        logger.info("model %s: batches are not recorded as CUDA graphs: %s", self._name, reason)


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


def _differs(shape: Shape, distance: float) -> str:
    return f"the rows of {shape.rows} texts of {shape.length} tokens differ by {distance:.1e}"


def _read_by(module: torch.nn.Module | None) -> Iterator[torch.Tensor]:
    """The tensors that a module keeps beside its weights, such as tables of positions, which may grow with a length.

    Each is another tensor on the same memory, which stays while the caller has it.
    """
    for part in () if module is None else module.modules():
        yield from _tensors([value for name, value in vars(part).items() if name not in ("_parameters", "_modules")])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, dict | list | tuple) and len(value) <= MOST_ITEMS:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
