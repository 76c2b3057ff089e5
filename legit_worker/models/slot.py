"""What is known of one configured model, loaded or not. Data only: `policy` has what changes it.

In: the settings of a model. Out: its state, its bytes, its times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from legit_worker.batching.costmodel import BYTES_PRIOR, ENOUGH, CostModel
from legit_worker.models.loaded import MARGIN, RESERVE, LoadedModel
from legit_worker.settings import ModelSettings

#: `unloaded` → `loading` → `resident` → `unloaded`, or `loading` → `failed`. `draining` is in memory and takes no new
#: requests.
State = Literal["unloaded", "loading", "resident", "draining", "failed"]


@dataclass(eq=False, kw_only=True, repr=False)
class Slot:
    """One model in memory. `Residency` alone changes it, under its lock; whoever reads it without may be late."""

    #: Its name: the first alias of these weights.
    alias: str
    spec: ModelSettings
    #: All aliases of these weights.
    aliases: tuple[str, ...] = ()
    #: Bytes of its weights: as its files have them, and once it was loaded as they are in memory.
    size: int = 0
    state: State = "unloaded"
    #: Requests that have it now.
    users: int = 0
    #: When a request last got it or gave it back, and when it was last loaded. Seconds of `monotonic`, as `failed_at`.
    used_at: float = 0.0
    loaded_at: float = 0.0
    #: What its last load took, reading and moving alone, and how often it was loaded.
    load_seconds: float = 0.0
    loads: int = 0
    #: How often it left memory.
    evictions: int = 0
    #: Whether it may leave memory only when an operator says so: `PIN`, until an operator pins or unpins it.
    is_pinned: bool = False
    #: Whether it is to leave memory once nobody has it, since an operator said so.
    is_leaving: bool = False
    #: There while it is resident or draining.
    model: LoadedModel | None = None
    #: Why and when its last load failed.
    error: BaseException | None = None
    failed_at: float = 0.0
    #: Bytes of activations that a batch takes: measured at the load, and corrected by the batches that ran.
    activations: CostModel = field(default_factory=lambda: CostModel(BYTES_PRIOR, enough=ENOUGH))
    #: Whether trial batches measured them.
    is_calibrated: bool = False

    def __post_init__(self) -> None:
        self.is_pinned = self.is_pinned or self.spec.pin

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.alias} ({self.spec.kind}): {self.state}>"

    @property
    def is_resident(self) -> bool:
        """Whether its weights are in memory."""
        return self.state in ("resident", "draining")

    @property
    def is_loading(self) -> bool:
        """Whether its weights are being read, or are the next to be."""
        return self.state == "loading"

    @property
    def is_idle(self) -> bool:
        """Whether it may leave memory: it is there, nobody has it, and it is not pinned."""
        return self.is_resident and not self.users and not self.is_pinned

    @property
    def reserve(self) -> int:
        """Bytes to have beside the weights for its batches; 0 until it was loaded and measured once."""
        return int(MARGIN * self.activations.predict(*RESERVE)) if self.activations.is_known else 0


@dataclass(frozen=True, slots=True)
class Named:
    """One alias: the model that it means, and the settings of its own."""

    alias: str
    spec: ModelSettings
    slot: Slot
