"""Which models stay in memory: the policy, and the requests that it serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from budgets import Limited
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.errors import ModelLoadError
from legit_worker.models.budget import Unbounded
from legit_worker.models.registry import Registry
from legit_worker.models.residency import Resident, to_drain, to_evict
from legit_worker.settings import ModelSettings

residents = st.lists(
    st.builds(
        Resident,
        alias=st.uuids().map(str),
        size=st.integers(0, 100),
        users=st.integers(0, 2),
        pinned=st.booleans(),
        used_at=st.floats(0, 100),
        loaded_at=st.floats(0, 100),
    ),
    max_size=8,
)


@given(residents, st.integers(0, 200), st.integers(0, 400), st.integers(0, 100))
def test_what_is_evicted_is_unused_unpinned_and_no_more_than_needed(
    found: list[Resident], wanted: int, budget: int, reserved: int
) -> None:
    by_alias = {one.alias: one for one in found}
    used = sum(one.size for one in found) + reserved
    evictable = sum(one.size for one in found if not one.users and not one.pinned)
    chosen = to_evict(wanted, budget, found, reserved)
    if chosen is None:
        assert used - evictable + wanted > budget
        return
    left = used - sum(by_alias[alias].size for alias in chosen)
    assert left + wanted <= budget
    assert not any(by_alias[alias].users or by_alias[alias].pinned for alias in chosen)
    if chosen:
        assert left + by_alias[chosen[-1]].size + wanted > budget
        latest = max(by_alias[alias].used_at for alias in chosen)
        kept = [one for one in found if one.alias not in chosen and not one.users and not one.pinned]
        assert all(one.used_at >= latest for one in kept)


@given(residents, st.integers(0, 200))
def test_without_a_budget_nothing_is_evicted(found: list[Resident], wanted: int) -> None:
    assert to_evict(wanted, None, found) == []


@given(residents, st.integers(0, 200), st.integers(0, 400), st.floats(0, 100))
def test_what_drains_keeps_the_fewest_waiting_and_has_been_there_for_a_while(
    found: list[Resident], wanted: int, budget: int, before: float
) -> None:
    by_alias = {one.alias: one for one in found}
    chosen = to_drain(wanted, budget, found, 0, before)
    for alias in chosen or ():
        assert not by_alias[alias].pinned
        assert by_alias[alias].loaded_at < before
    if chosen is not None:
        assert sum(one.size for one in found if one.alias not in chosen) + wanted <= budget


# Requests.


def registry(budget: int | None, load_seconds: float = 0.0, count: int = 3, **more: dict[str, Any]) -> Registry:
    """Models `m0`, `m1` … of 10 bytes each."""
    models = {f"m{n}": {"kind": "simulated", "path": f"0,0,10,{load_seconds}"} for n in range(count)}
    for alias, changes in more.items():
        models[alias] = models[alias] | changes
    specs = {alias: ModelSettings(**spec) for alias, spec in models.items()}  # type: ignore[arg-type]
    return Registry(specs, lambda: "cpu", Limited(budget))


def use(subject: Registry, alias: str) -> Any:
    """Ask for a model, wait for it, and keep it. Returns the request."""
    request = subject.residency.request(subject.get(alias))
    deadline = time.monotonic() + 10
    while not request.future.done() and time.monotonic() < deadline:
        subject.residency.review()
        time.sleep(0.005)
    assert request.future.result(timeout=0) is subject.get(alias).model_now
    return request


def touch(subject: Registry, *aliases: str) -> None:
    for alias in aliases:
        subject.residency.release(use(subject, alias))


def resident(subject: Registry) -> list[str]:
    return [alias for alias, entry in subject.entries.items() if entry.is_resident]


def test_the_least_recently_used_model_makes_room() -> None:
    subject = registry(budget=20)
    touch(subject, "m0", "m1", "m0", "m2")
    assert resident(subject) == ["m0", "m2"]
    touch(subject, "m1")
    assert resident(subject) == ["m1", "m2"]
    assert [entry.loads for entry in subject.entries.values()] == [1, 2, 1]


def test_a_pinned_model_stays() -> None:
    subject = registry(budget=20, m0={"pin": True})
    touch(subject, "m0", "m1", "m2", "m1", "m2")
    assert "m0" in resident(subject)
    assert subject.get("m0").loads == 1


def test_a_model_in_use_stays_until_it_is_released() -> None:
    subject = registry(budget=10)
    held = use(subject, "m0")
    waiting = subject.residency.request(subject.get("m1"))
    assert resident(subject) == ["m0"]
    assert not waiting.future.done()
    subject.residency.release(held)
    assert waiting.future.result(timeout=5)
    assert resident(subject) == ["m1"]


def test_a_model_in_constant_use_gives_way_in_the_end() -> None:
    subject = registry(budget=10)
    held = use(subject, "m0")
    other = subject.residency.request(subject.get("m1"))
    deadline = time.monotonic() + 10
    served = 0
    while not other.future.done() and time.monotonic() < deadline:
        following = subject.residency.request(subject.get("m0"))
        subject.residency.release(held)
        subject.residency.review()
        if not following.future.done():  # it drains: who asks now waits behind the other
            break
        held, served = following, served + 1
        time.sleep(0.01)
    assert other.future.result(timeout=5)
    assert served > 10
    subject.residency.release(other)
    assert following.future.result(timeout=5)


def test_who_does_not_wait_any_more_gets_nothing_and_holds_up_nobody() -> None:
    subject = registry(budget=10)
    held = use(subject, "m0")
    gone = subject.residency.request(subject.get("m1"))
    subject.residency.release(gone)
    subject.residency.release(held)
    touch(subject, "m2")
    assert subject.get("m1").loads == 0
    assert [entry.users for entry in subject.entries.values()] == [0, 0, 0]


def test_who_must_not_wait_gets_its_model_over_the_limit() -> None:
    subject = registry(budget=10)
    held = use(subject, "m0")
    must = subject.residency.request(subject.get("m1"), must=True)
    assert must.future.result(timeout=5)
    assert resident(subject) == ["m0", "m1"]
    subject.residency.release(must)
    subject.residency.release(held)


def test_a_model_that_can_never_fit_is_an_error_that_names_the_sizes() -> None:
    subject = registry(budget=15, m0={"pin": True})
    touch(subject, "m0")
    request = subject.residency.request(subject.get("m1"))
    with pytest.raises(ModelLoadError, match=r"'m1' has weights of 10 bytes.*15 bytes"):
        subject.get("m1").outcome(request.future)
    subject.residency.release(request)
    touch(subject, "m0")


def test_an_idle_model_goes_after_its_keep_alive_and_others_stay() -> None:
    subject = registry(budget=None, m0={"keep_alive": 0.05}, m1={"keep_alive": 60}, m2={"keep_alive": 0, "pin": True})
    touch(subject, "m0", "m1", "m2")
    held = use(subject, "m0")
    time.sleep(0.1)
    subject.residency.evict_idle()
    assert resident(subject) == ["m0", "m1", "m2"]
    subject.residency.release(held)
    time.sleep(0.1)
    subject.residency.evict_idle()
    assert resident(subject) == ["m1", "m2"]


def unlocked_loads(subject: Registry) -> Registry:
    """Its loads end while a test has the lock."""
    subject.residency.check_room = lambda entry: None  # type: ignore[method-assign]
    subject.residency.hold = lambda: None  # type: ignore[method-assign]
    return subject


def test_a_model_does_not_go_before_those_who_waited_for_it_had_it() -> None:
    """Its load has ended, and the loader's thread has not yet told so when another model is asked for."""
    subject = unlocked_loads(registry(budget=10))
    with subject.residency._lock:
        first = subject.residency.request(subject.get("m0"))
        deadline = time.monotonic() + 10
        while not subject.get("m0").is_resident and time.monotonic() < deadline:
            time.sleep(0.005)
        second = subject.residency.request(subject.get("m1"))
        assert first.future.done()
        assert not second.future.done()
    subject.residency.release(first)
    assert second.future.result(timeout=5) is subject.get("m1").model_now
    subject.residency.release(second)
    assert [entry.loads for entry in subject.entries.values()] == [1, 1, 0]


def test_a_model_that_went_too_early_comes_back_for_those_who_wait() -> None:
    subject = unlocked_loads(registry(budget=10))
    with subject.residency._lock:
        waiting = subject.residency.request(subject.get("m0"))
        deadline = time.monotonic() + 10
        while not subject.get("m0").is_resident:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        subject.residency.evict_unused()
        assert not waiting.future.done()
    assert waiting.future.result(timeout=5)


def test_threads_that_ask_at_once_never_overdraw() -> None:
    subject = registry(budget=20, count=6, load_seconds=0.002)
    worst, over = 0, threading.Event()

    def watch() -> None:
        nonlocal worst
        while not over.is_set():
            entries = subject.entries.values()
            with subject.residency._lock:
                worst = max(worst, sum(entry.size for entry in entries if entry.is_resident or entry.is_loading))
            time.sleep(0.001)

    def ask(order: Sequence[int]) -> None:
        for number in order:
            touch(subject, f"m{number}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    askers = [threading.Thread(target=ask, args=([(n * k) % 6 for n in range(12)],)) for k in (1, 5, 7)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(timeout=60)
        assert not asker.is_alive()
    over.set()
    watcher.join()
    assert worst <= 20
    assert all(entry.users == 0 for entry in subject.entries.values())


# What batches need beside the weights.


def test_there_is_room_for_batches_beside_the_weights_and_a_model_makes_it() -> None:
    """Each has 10 bytes and batches that take 3 a unit; a reserve of a batch of 16 times 256."""
    reserve = round(1.2 * 3 * 16 * 256)
    path = {"path": "0,0,10,0,3"}
    subject = registry(budget=25 + reserve, m0=path, m1=path, m2=path)
    touch(subject, "m0", "m1")
    assert subject.get("m0").reserve == pytest.approx(reserve, rel=0.01)
    assert subject.residency.room_for_activations() == 5 + reserve
    touch(subject, "m2")
    assert resident(subject) == ["m1", "m2"]
    assert subject.residency.report()["reserve"] == subject.get("m2").reserve


def test_weights_come_first_where_there_is_not_room_for_both() -> None:
    path = {"path": "0,0,10,0,3"}
    subject = registry(budget=105, m0=path, m1=path)
    touch(subject, "m0", "m1", "m0")
    assert resident(subject) == ["m0"]
    assert subject.residency.room_for_activations() == 95
    assert subject.get("m0").largest_cost(5) == 25  # 95 bytes, 3 a unit, 1.2 for the unforeseen: five items of five


def test_a_budget_that_shrinks_evicts_what_nobody_uses() -> None:
    subject = registry(budget=30)
    held = use(subject, "m0")
    touch(subject, "m1", "m2")
    subject.residency._bytes = Limited(20)
    subject.residency.watch()
    assert resident(subject) == ["m0", "m2"]
    subject.residency.release(held)


# Weights that wait in the host's memory.


#: The notes of those that were unloaded.
gone: list[list[str]] = []


class Movable:
    """A model that notes where it was read from and moved to."""

    def __init__(self, alias: str) -> None:
        self.moves = [f"made {alias}"]

    def load(self, device: str) -> None:
        self.moves.append(f"load {device}")

    def to(self, device: str) -> None:
        self.moves.append(f"to {device}")

    def unload(self) -> None:
        self.moves.append("unload")
        gone.append(self.moves)
        raise RuntimeError("which is the model's own affair")

    def memory(self) -> int:
        return 10

    preprocess = cost = forward = postprocess = None


def movable(budget: int, host_cache: int) -> Registry:
    """Three of them, whose sizes are known from an earlier load."""
    gone.clear()
    specs = {alias: ModelSettings(kind=f"{__name__}:Movable") for alias in ("m0", "m1", "m2")}
    subject = Registry(specs, lambda: "simulated", Limited(budget), host_cache)
    for entry in subject.entries.values():
        entry.size = 10
    return subject


def moves(subject: Registry, alias: str) -> list[str]:
    request = use(subject, alias)
    subject.residency.release(request)
    found: list[str] = request.future.result().moves
    return found


def test_evicted_weights_wait_on_the_host_and_come_back_without_being_read_again() -> None:
    subject = movable(budget=10, host_cache=20)
    touch(subject, "m0", "m1")
    assert subject.shelf.used == 10
    assert moves(subject, "m0") == ["made m0", "load simulated", "to cpu", "to simulated"]


def test_the_host_keeps_no_more_than_its_limit_and_the_least_recently_used_go() -> None:
    subject = movable(budget=10, host_cache=10)
    touch(subject, "m0", "m1", "m2")
    assert subject.shelf.used == 10
    assert gone == [["made m0", "load simulated", "to cpu", "unload"]]
    assert moves(subject, "m0") == ["made m0", "load simulated"]


def test_without_a_limit_for_the_host_nothing_is_kept() -> None:
    subject = movable(budget=10, host_cache=0)
    touch(subject, "m0", "m1")
    assert gone == [["made m0", "load simulated", "unload"]]
    assert moves(subject, "m0") == ["made m0", "load simulated"]


def test_what_was_evicted_for_another_reason_than_room_is_not_kept() -> None:
    """It ran out of use, or memory ran out."""
    subject = movable(budget=10, host_cache=20)
    touch(subject, "m0")
    subject.residency.evict_unused()
    assert moves(subject, "m0") == ["made m0", "load simulated"]


def test_a_host_without_room_forgets_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Movable, device: str) -> None:
        raise MemoryError

    monkeypatch.setattr(Movable, "to", refuse)
    subject = movable(budget=10, host_cache=20)
    touch(subject, "m0", "m1")
    assert subject.shelf.used == 0
    assert gone == [["made m0", "load simulated", "unload"]]
    assert moves(subject, "m0") == ["made m0", "load simulated"]


def test_the_devices_allocator_is_held_to_the_budget_or_to_what_is_there() -> None:
    budget = Limited(1000)
    specs = {alias: ModelSettings(kind=f"{__name__}:Movable") for alias in ("m0", "m1")}
    subject = Registry(specs, lambda: "simulated", budget)
    first = use(subject, "m0")
    assert budget.limit == 1000
    subject.get("m0").activations.observe(1, 16 * 256, 100)
    reserve = subject.get("m0").reserve
    assert reserve > 0
    budget.now = 10 + reserve - 1  # others have grown: a batch still finds what it was measured to need
    subject.residency.watch()
    assert budget.limit == 10 + reserve
    subject.get("m0").size = 0
    subject.residency.watch()
    assert budget.limit is None, "nobody knows what its weights take"
    subject.residency.release(first)


class Shared:
    """The budget of two workers on one device, whose loads take turns."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken: dict[int, int] = {}
        self._turn = threading.Lock()

    def of(self, worker: int) -> SharedBudget:
        return SharedBudget(self, worker)


@dataclass
class SharedBudget(Unbounded):
    """One worker's part in it."""

    shared: Shared
    worker: int

    def bytes(self, weights: int) -> int:
        self.shared.taken[self.worker] = weights
        others = sum(size for worker, size in self.shared.taken.items() if worker != self.worker)
        return self.shared.total - others

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.shared._turn:
            yield
            self.shared.taken[self.worker] = 12


def test_a_load_counts_again_once_it_has_its_turn() -> None:
    """Two workers find the same room, one after the other begins to fill it, and there is not room for both."""
    shared = Shared(total=20)
    spec = ModelSettings(kind="simulated", path="0,0,12,0.2")
    workers = [Registry({"m0": spec}, lambda: "cpu", shared.of(number)) for number in range(2)]
    requests = [worker.residency.request(worker.get("m0")) for worker in workers]
    deadline = time.monotonic() + 5
    while not any(request.future.done() for request in requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    assert sorted(worker.get("m0").loads for worker in workers) == [0, 1]
    assert sum(shared.taken.values()) == 12


def test_a_request_that_could_not_be_made_leaves_nothing_behind() -> None:
    class Refusing(Limited):
        def bytes(self, weights: int) -> int:
            raise OSError("NVML")

    subject = registry(budget=10)
    subject.residency._bytes = Refusing(10)
    with pytest.raises(OSError, match="NVML"):
        subject.residency.request(subject.get("m0"))
    subject.residency._bytes = Limited(10)
    touch(subject, "m0")
    assert subject.get("m0").users == 0
