"""Which models there are.

In: the settings. Out: one `Slot` per alias, and the `Residency` that decides which of them are in memory.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from legit_worker import settings
from legit_worker.device import cpu, cuda
from legit_worker.device.simulated import ENDLESS, simulated_device
from legit_worker.errors import UnknownModelError, shown
from legit_worker.models import forks
from legit_worker.models.budget import Budget, DeviceBudget, Unbounded
from legit_worker.models.loader import Loader
from legit_worker.models.residency import Residency
from legit_worker.models.shelf import Shelf
from legit_worker.models.sizes import estimate
from legit_worker.models.slot import Named, Slot

#: Settings of an alias that its weights have no part in.
PER_ALIAS = frozenset(
    ("pin", "keep_alive", "task", "prompt_name", "prompt", "dimensions", "precision", "normalize", "max_seq_length")
)


class Registry:
    """All configured models. One per process.

    `budget`: how many bytes may be taken; by default, nothing bounds them. `host_cache`: bytes for evicted weights.
    `cache_dir`: where converted models are kept; None is the user's own folder.
    """

    def __init__(
        self,
        models: Mapping[str, settings.ModelSettings],
        device: Callable[[], str],
        budget: Budget | None = None,
        host_cache: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        #: Evicted weights that wait in the host's memory.
        self.shelf = Shelf(host_cache)
        #: Gives the name of the device that models are put on.
        self.device = device
        #: One for each copy of weights, by its first alias.
        self.slots = {slot.alias: slot for slot in map(_slot, copies(models))}
        #: All aliases, by their names in the settings.
        self.aliases = {
            alias: Named(alias, models[alias], slot) for slot in self.slots.values() for alias in slot.aliases
        }
        self._by_name = {settings.fold(alias): named for alias, named in self.aliases.items()}
        loader = Loader(device, self.shelf, cache_dir)
        self.residency = Residency(self.slots.values(), budget or Unbounded(), loader, self.shelf)

    def __repr__(self) -> str:
        return f"<Registry {list(self.slots.values())}>"

    def get(self, alias: str) -> Slot:
        """The model that this name means. Raises `UnknownModelError`."""
        return self.find(alias).slot

    def find(self, alias: str) -> Named:
        """The alias that this name means: see `settings.fold`. Raises `UnknownModelError`."""
        named = self._by_name.get(settings.fold(str(alias)))
        if named is None:
            name = shown(alias)
            is_plain = alias and name == repr(alias) == f"'{alias}'"
            hint = f". Set {settings.path_variable(alias)} to add it" if is_plain else ""
            raise UnknownModelError(f"no model {name} is configured; there are: {self._names()}{hint}")
        return named

    def only(self, kind: str) -> Named:
        """The one alias of this kind. Raises `UnknownModelError` if there is none, or more than one."""
        found = [named for named in self.aliases.values() if named.spec.kind == kind]
        if len(found) != 1:
            new = f"Set LEGIT_WORKER_MODELS__<ALIAS>__PATH, and LEGIT_WORKER_MODELS__<ALIAS>__KIND={kind}, to add one"
            raise UnknownModelError(
                f"model=None means the one model of kind {kind!r}, and {len(found)} are configured; "
                f"there are: {self._names()}. {'Name one with model=' if found else new}"
            )
        return found[0]

    def _names(self) -> str:
        return ", ".join(f"{alias} ({named.spec.kind})" for alias, named in self.aliases.items()) or "none"


def copies(models: Mapping[str, settings.ModelSettings]) -> list[dict[str, settings.ModelSettings]]:
    """Group the aliases that one copy of weights serves, in the settings' order."""
    found: dict[str, dict[str, settings.ModelSettings]] = {}
    for alias, spec in models.items():
        found.setdefault(_weights_of(alias, spec), {})[alias] = spec
    return list(found.values())


def _weights_of(alias: str, spec: settings.ModelSettings) -> str:
    """What decides the weights. A kind that is not built in is told its alias, so each alias is its own."""
    if spec.kind not in settings.KINDS_WITH_PATH:
        return alias
    return json.dumps(spec.model_dump(exclude=set(PER_ALIAS)), sort_keys=True, default=str)


def _slot(group: Mapping[str, settings.ModelSettings]) -> Slot:
    """The slot of one copy. It is pinned if an alias is, and kept as long as the longest `keep_alive` says."""
    alias, spec = next(iter(group.items()))
    times = [one.keep_alive for one in group.values()]
    known = [seconds for seconds in times if seconds is not None]
    merged = {
        "pin": any(one.pin for one in group.values()),
        "keep_alive": max(known) if len(known) == len(times) else None,
    }
    return Slot(alias=alias, spec=spec.model_copy(update=merged), aliases=tuple(group), size=estimate(spec))


_making = threading.Lock()

#: The one that handles and the pool go by, once there is one.
_in_force: Registry | None = None


def default_registry() -> Registry:
    """This process's models: the models of its settings, unless `use` named others.

    Raises `SettingsError`, and `ModelLoadError` in a child that was forked at a bad moment.
    """
    global _in_force
    forks.check()
    with _making:  # or two threads that ask at once would each load their own
        if _in_force is None:
            _in_force = _of_settings()
        return _in_force


def use(registry: Registry | None) -> Registry | None:
    """Have all of this process go by these models; None: by its settings, read again. Returns the models before."""
    global _in_force
    with _making:
        before, _in_force = _in_force, registry
    return before


def _of_settings() -> Registry:
    chosen = settings.load()
    if chosen.device == "simulated" and chosen.vram_limit is not None:
        simulated_device().ledger.total = chosen.vram_limit.of(ENDLESS)
    cuda.show_only(chosen.device)
    device = functools.partial(cuda.choose, chosen.device)
    return Registry(chosen.models, device, DeviceBudget(chosen), chosen.host_cache.of(0), chosen.cache_dir)


def _before_fork() -> None:
    if _in_force is not None:
        forks.hold_imports()
        if _in_force.residency.is_loading():
            forks.wait_for_imports()


def _after_fork() -> None:
    global _making
    _making = threading.Lock()
    forks.restart()
    if _in_force is not None:
        if _in_force.residency.is_loading():
            forks.look_at_child()
        if any(slot.loads for slot in _in_force.slots.values()):
            cpu.compute_on_one_thread()
        _in_force.residency.restart()


os.register_at_fork(before=_before_fork, after_in_parent=forks.go_on, after_in_child=_after_fork)
