"""Which models there are.

In: the settings. Out: one `Entry` per alias, and the `Residency` that decides which of them are in memory.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping

from legit_worker import settings
from legit_worker.device import cuda
from legit_worker.device.simulated import ENDLESS, simulated_device
from legit_worker.errors import UnknownModelError
from legit_worker.models.budget import Budget
from legit_worker.models.entry import Entry, Loader
from legit_worker.models.residency import Residency
from legit_worker.models.shelf import Shelf


class Registry:
    """All configured models. One per process.

    `budget`: how many bytes may be taken, from what weights take now. `host_cache`: bytes for evicted weights.
    """

    def __init__(
        self,
        models: Mapping[str, settings.ModelSettings],
        device: Callable[[], str],
        budget: Callable[[int], int | None] = lambda _: None,
        host_cache: int = 0,
    ) -> None:
        loader = Loader()
        #: Evicted weights that wait in the host's memory.
        self.shelf = Shelf(host_cache)
        #: Gives the name of the device that models are put on.
        self.device = device
        self.entries = {alias: Entry(alias, spec, device, loader, self.shelf) for alias, spec in models.items()}
        self._by_name = {settings.fold(alias): entry for alias, entry in self.entries.items()}
        self.residency = Residency(self.entries.values(), budget, self.shelf)
        for entry in self.entries.values():
            entry.residency = self.residency

    def __repr__(self) -> str:
        return f"<Registry {list(self.entries.values())}>"

    def restart_loader(self) -> None:
        """In a forked child, where no load of the parent's will end: loaded models stay, others can be loaded."""
        loader = Loader()
        for entry in self.entries.values():
            entry.use_loader(loader)
        self.residency.restart()

    def get(self, alias: str) -> Entry:
        """The model that this name means: see `settings.fold`. Raises `UnknownModelError`."""
        entry = self._by_name.get(settings.fold(str(alias)))
        if entry is None:
            raise UnknownModelError(
                f"no model {alias!r} is configured; there are: {self._names()}. "
                f"Set {settings.path_variable(str(alias))} to add it"
            )
        return entry

    def only(self, kind: str) -> Entry:
        """The one model of this kind. Raises `UnknownModelError` where there is none, or more than one."""
        found = [entry for entry in self.entries.values() if entry.spec.kind == kind]
        if len(found) != 1:
            raise UnknownModelError(
                f"model=None means the one model of kind {kind!r}, and {len(found)} are configured; "
                f"there are: {self._names()}. Name one with model="
            )
        return found[0]

    def _names(self) -> str:
        return ", ".join(f"{alias} ({entry.spec.kind})" for alias, entry in self.entries.items()) or "none"


_making_default = threading.Lock()


def default_registry() -> Registry:
    """This process's models, from its settings. Raises `SettingsError`."""
    with _making_default:  # or two threads that ask at once would each load their own
        return _default_registry()


@functools.cache
def _default_registry() -> Registry:
    chosen = settings.load()
    if chosen.device == "simulated" and chosen.vram_limit is not None:
        simulated_device().ledger.total = chosen.vram_limit.of(ENDLESS)
    device = functools.partial(cuda.choose, chosen.device)
    return Registry(chosen.models, device, Budget(chosen), chosen.host_cache.of(0))


def _after_fork() -> None:
    global _making_default
    _making_default = threading.Lock()
    if _default_registry.cache_info().currsize:
        _default_registry().restart_loader()


os.register_at_fork(after_in_child=_after_fork)
