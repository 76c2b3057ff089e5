"""A task's request to a model, while the task waits for it.

In: items, chunk by chunk, from the task. Out: one output per item, or the first error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from legit_worker.pool.clock import Clock


@dataclass(eq=False, kw_only=True)
class Call:
    """One `encode`, `predict` or `map`, between park and resume. Lives on the main thread."""

    #: The app the task works for, `""` where none is configured: the unit of fairness.
    app: str
    #: How many items it will have in all.
    size: int
    #: With no more items queued than this, the call can take its next chunk.
    low_water: int
    #: Called when the task may have something to do: take the outputs or the error, or bring more items.
    on_progress: Callable[[], None]
    #: The task's: told which batches hold its items.
    clock: Clock = field(default_factory=Clock)
    #: The model's `postprocess`: at once, since an output may hold on to its whole batch.
    postprocess: Callable[[Any], Any] = lambda output: output
    outputs: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    #: Items handed to the engine and not yet computed.
    queued: int = 0
    computed: int = 0
    #: Set by `FairQueue`: how far this call's items reach in its app's virtual time.
    finish_tag: float = 0.0

    def __post_init__(self) -> None:
        self.outputs = [None] * self.size

    def __repr__(self) -> str:
        state = repr(self.error) if self.error else f"{self.computed} of {self.size} computed, {self.queued} queued"
        return f"<Call for {self.app or 'no app'}: {state}>"

    @property
    def needs_items(self) -> bool:
        """Few enough items are queued to bring the next chunk."""
        return self.queued <= self.low_water

    def deliver(self, index: int, output: Any) -> None:
        """One output came out of a batch."""
        try:
            self.outputs[index] = self.postprocess(output)
        except Exception as error:
            self.fail(error)
        else:
            self.queued -= 1
            self.computed += 1

    def fail(self, error: BaseException) -> None:
        """One item could not be computed: the call ends with the first such error."""
        self.error = self.error or error
        self.queued -= 1
