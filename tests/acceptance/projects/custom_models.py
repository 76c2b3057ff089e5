"""A user's own models, named in settings as `module:Class`. Only those that say so import anything of torch.

In: strings. Out: strings that say what happened.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import legit_worker
from legit_worker.errors import InvalidInputError


class Upper:
    """The smallest model: five methods, and a batch of strings in capitals."""

    def load(self, device: str) -> None:
        """Nothing to read."""
        self.device = device

    def preprocess(self, item: Any) -> Any:
        """As it came."""
        return item

    def cost(self, item: Any) -> int:
        """One per character."""
        return max(1, len(item))

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Capitals."""
        return [item.upper() for item in batch]

    def postprocess(self, output: Any) -> Any:
        """As it is."""
        return output


class Ending(Upper):
    """Raises what no model should, in the method that an item names: `preprocess exit`."""

    errors: ClassVar[dict[str, BaseException]] = {
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "memory": MemoryError("too large"),
    }

    def _may_end(self, method: str, item: str) -> Any:
        where, _, how = item.lower().partition(" ")
        if where == method:
            raise type(self.errors[how])(*self.errors[how].args)
        return item

    def preprocess(self, item: Any) -> Any:
        """As it came."""
        return self._may_end("preprocess", item)

    def cost(self, item: Any) -> int:
        """One per character."""
        return super().cost(self._may_end("cost", item))

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Capitals."""
        return super().forward([self._may_end("forward", item) for item in batch])

    def postprocess(self, output: Any) -> Any:
        """As it is."""
        return self._may_end("postprocess", output)


class Laborious(Upper):
    """Takes a fiftieth of a second to prepare each item."""

    def preprocess(self, item: Any) -> Any:
        """As it came, later, and says so."""
        time.sleep(0.02)
        print("prepared an item", flush=True)
        return item


class Nested(Upper):
    """Asks another model what it says to an item, before the item is in a batch."""

    def preprocess(self, item: Any) -> Any:
        """Items that begin with a model's name and a colon go to this model first."""
        alias, colon, rest = item.partition(":")
        return legit_worker.model(alias).map([rest])[0] + "!" if colon else item


class Nosy(Upper):
    """Calls another model in the method that an item names, where a task can't wait."""

    def _ask(self, method: str, *items: Any) -> None:
        if method in items:
            legit_worker.model("upper").map(["text"])

    def cost(self, item: Any) -> int:
        """Raises `LegitWorkerError` for the item `cost`."""
        self._ask("cost", item)
        return super().cost(item)

    def batch_key(self, item: Any) -> None:
        """Raises `LegitWorkerError` for the item `batch_key`."""
        self._ask("batch_key", item)

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Raises `LegitWorkerError` for the item `forward`."""
        self._ask("forward", *batch)
        return super().forward(batch)

    def postprocess(self, output: Any) -> Any:
        """Raises `LegitWorkerError` for the item `postprocess`."""
        self._ask("postprocess", output.lower())
        return output


class NosyLoader(Upper):
    """Calls another model while it loads."""

    def load(self, device: str) -> None:
        """Raises `LegitWorkerError`."""
        legit_worker.model("upper").map(["text"])


class Planned(Upper):
    """Has an `encode` of its own."""

    def plan_encode(self, inputs: Any, ending: str = "") -> tuple[list[Any], Any]:
        """One string, or a list of strings."""
        is_single = isinstance(inputs, str)

        def finish(outputs: list[Any]) -> Any:
            whole = [output + ending for output in outputs]
            return whole[0] if is_single else whole

        return ([inputs] if is_single else inputs), finish


class Padded(Planned):
    """Gives the length of each item; NaN if a batch pads an item, and for an item that begins with `bad`."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """One number for each item."""
        import numpy as np

        longest = max(map(len, batch))
        lengths = [len(item) if len(item) == longest and item[:3] != "bad" else np.nan for item in batch]
        return [np.array([length, len(batch)], dtype=np.float32) for length in lengths]

    def plan_encode(self, inputs: Any) -> tuple[list[Any], Any]:
        """Shape `[n, 2]`, or `[2]` for one string."""
        import numpy as np

        is_single = isinstance(inputs, str)
        return [inputs] if is_single else inputs, lambda rows: rows[0] if is_single else np.stack(rows)


class Picky(Upper):
    """Refuses items that begin with `bad`, before they reach a batch."""

    def preprocess(self, item: Any) -> Any:
        """Raises `InvalidInputError`."""
        if item.startswith("bad"):
            raise InvalidInputError(f"{item!r} is not to this model's taste")
        return item


class PoisonError(Exception):
    """A batch had an item that can't be computed."""


class Poisoned(Upper):
    """Fails the whole batch when one of its items begins with `poison`, as a kernel would."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Raises `PoisonError`."""
        poison = [item for item in batch if item.startswith("poison")]
        if poison:
            raise PoisonError(f"{poison[0]} can't be computed")
        return super().forward(batch)


class Violent(Upper):
    """Raises what would end a process, in the method and as the item says: `forward interrupt`."""

    def _raise_for(self, method: str, item: str) -> None:
        errors: dict[str, BaseException] = {
            "exit": SystemExit(3),
            "interrupt": KeyboardInterrupt("by a model"),
            "memory": MemoryError("no room"),
            "other": GeneratorExit(),
        }
        where, _, how = item.partition(" ")
        if where == method:
            raise errors[how]

    def preprocess(self, item: Any) -> Any:
        """As it came, or not at all."""
        self._raise_for("preprocess", item)
        return item

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As they came, or none of them."""
        for item in batch:
            self._raise_for("forward", item)
        return list(batch)

    def postprocess(self, output: Any) -> Any:
        """Capitals, or nothing."""
        self._raise_for("postprocess", output)
        return output.upper()


class Stormy(Upper):
    """Its device is out of memory for every third batch, at random, and for any batch with an item that says `huge`."""

    def __init__(self) -> None:
        self._draw = random.Random(3)

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Raises what torch raises."""
        if self._draw.random() < 1 / 3 or any(item.startswith("huge") for item in batch):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(batch)


class Unloadable(Upper):
    """Has no weights."""

    def load(self, device: str) -> None:
        """Raises `FileNotFoundError`."""
        raise FileNotFoundError("weights.bin is not there")


class SlowToLoad(Upper):
    """Takes its time to load, while other models keep serving and tasks gather; and some time for each batch."""

    def load(self, device: str) -> None:
        """Two seconds."""
        time.sleep(2)

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Says that it starts, and then takes long enough to do something to the worker."""
        print(f"computes {len(batch)} items", flush=True)
        time.sleep(0.5)
        return super().forward(batch)


class Gated(Upper):
    """Loads once the test makes a file: until then its tasks are parked."""

    def load(self, device: str) -> None:
        """Look until it is there."""
        while not Path(os.environ["PROJECT_GATE"]).exists():
            time.sleep(0.05)


class Reports(Upper):
    """Says where it was called, and with how many."""

    def load(self, device: str) -> None:
        """Notes the thread."""
        self.loaded_by = threading.current_thread().name

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """The batch's size and the thread, for each item."""
        thread = threading.current_thread().name
        return [{"item": item, "batch": len(batch), "thread": thread, "loaded_by": self.loaded_by} for item in batch]


class Slow(Upper):
    """A fiftieth of a second per item, and few items in a batch, so that many tasks are in flight for a while."""

    def cost(self, item: Any) -> int:
        """So large that few fit into one batch."""
        return 2048

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As the others, later."""
        time.sleep(0.02 * len(batch))
        return super().forward(batch)


class Even(Slow):
    """As slow, and no bound on a batch but the time that the user set. Tasks gather while it loads."""

    def load(self, device: str) -> None:
        """A second."""
        time.sleep(1)

    def cost(self, item: Any) -> int:
        """The same for each: one."""
        return 1

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Says how many there are."""
        print(f"computes {len(batch)} items", flush=True)
        return super().forward(batch)


class Counting(Upper):
    """Says how many items each batch has."""

    def cost(self, item: Any) -> int:
        """So small that all that waits is one batch."""
        return 1

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As the others."""
        print(f"computes {len(batch)} items", flush=True)
        return super().forward(batch)


class Launching(Counting):
    """Takes a second for any batch, however many items it has."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As the others, later."""
        time.sleep(1)
        return super().forward(batch)


class Heavy(Counting):
    """Takes a tenth of a second for each item, and nothing for the launch."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As the others, later."""
        time.sleep(0.1 * len(batch))
        return super().forward(batch)


class Forgetful(Upper):
    """Returns one output too few."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """All but the last."""
        return super().forward(batch)[:-1]


class Alive(Upper):
    """Tells how many of its kind were in memory at once, at the most."""

    everywhere: ClassVar[weakref.WeakSet[Alive]] = weakref.WeakSet()
    most = 0

    def load(self, device: str) -> None:
        """One more."""
        Alive.everywhere.add(self)
        alive = list(Alive.everywhere)  # one that is just being freed still counts in its length
        Alive.most = max(Alive.most, len(alive))

    def memory(self) -> int:
        """As many bytes as there are models that fit."""
        return 1

    def forward(self, batch: Sequence[str]) -> list[int]:
        """The same for each item."""
        if "a bad task" in batch:
            raise ValueError(Alive.most)
        return [Alive.most for _ in batch]


class InTorch(SlowToLoad):
    """Gives what torch makes, in a batch and when an item is prepared. Imports torch."""

    def preprocess(self, item: Any) -> Any:
        """With what torch made."""
        return [item, *self._made()]

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """With what torch makes now."""
        return [[*item[1:], *self._made()] for item in batch]

    def _made(self) -> list[str]:
        import torch

        tensor = torch.ones(2)
        return [str(tensor.device), str(tensor.dtype), torch.get_float32_matmul_precision(), type(tensor).__name__]


class Drawing(SlowToLoad):
    """Draws random numbers in its load, its trial batches and its batches of many. Imports torch."""

    def load(self, device: str) -> None:
        """As a module whose weights are set at random."""
        super().load(device)
        self._draw()

    def sample(self, cost: int) -> str:
        """An item of that cost."""
        self._draw()
        return "x" * cost

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As a dropout would."""
        if len(batch) > 1:
            self._draw()
        return list(batch)

    @staticmethod
    def _draw() -> None:
        import numpy as np
        import torch

        random.random(), np.random.rand(), torch.rand(1)


class DrawingToo(Drawing):
    """Another one."""
