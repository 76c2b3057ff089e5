"""Requests for models, and what follows: loads, evictions, and each request's model."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from budgets import Limited

from legit_worker.batching.costmodel import CostModel
from legit_worker.device.devices import Device
from legit_worker.device.simulated import simulated_device
from legit_worker.errors import ModelLoadError
from legit_worker.models import residency
from legit_worker.models.budget import Unbounded
from legit_worker.models.handle import outcome
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.loader import NotNowError, Orders
from legit_worker.models.registry import Registry
from legit_worker.models.residency import BLOCKED_SECONDS, Residency
from legit_worker.models.shelf import Shelf
from legit_worker.models.simulated import SimulatedModel
from legit_worker.models.slot import Slot
from legit_worker.settings import ModelSettings


class ByHand:
    """A loader whose loads end when the test says so."""

    def __init__(self) -> None:
        self.loading: deque[tuple[Slot, Orders]] = deque()
        #: Every load so far.
        self.loads: list[str] = []

    def start(self, slot: Slot, orders: Orders) -> None:
        self.loading.append((slot, orders))
        self.loads.append(slot.alias)

    def end(self) -> None:
        """The oldest load."""
        slot, orders = self.loading.popleft()
        try:
            orders.check_room(slot)
        except NotNowError as error:
            orders.failed(slot, error)
            return
        orders.sized(slot, 10)
        own = SimulatedModel()
        orders.loaded(slot, LoadedModel(slot.alias, "simulated", own, Device("cpu"), slot.activations, orders), 1.0)

    def fail(self, error: BaseException) -> None:
        """The oldest load."""
        slot, orders = self.loading.popleft()
        orders.failed(slot, error)

    def clear_device(self) -> None:
        pass

    def restart(self) -> None:
        pass


class Scene:
    """Models of 10 bytes, a budget, a loader by hand, and a clock of the test's own."""

    def __init__(self, budget: int | None, most: int | None = None, count: int = 3, **more: dict[str, Any]) -> None:
        self.now = 100.0
        self.budget = Limited(budget, most)
        self.loader = ByHand()
        aliases = [f"m{number}" for number in range(count)]
        specs = {alias: ModelSettings(kind="simulated", **more.get(alias, {})) for alias in aliases}
        self.slots = {alias: Slot(alias=alias, spec=spec, size=10) for alias, spec in specs.items()}
        self.residency = Residency(self.slots.values(), self.budget, self.loader, Shelf(0), lambda: self.now)

    def ask(self, alias: str, *, must: bool = False) -> Any:
        return self.residency.request(self.slots[alias], must=must)

    def use(self, alias: str) -> Any:
        """Ask for a model that can be had, and keep it."""
        request = self.ask(alias)
        while not request.future.done():
            self.loader.end()
        assert request.future.result() is self.slots[alias].model
        return request

    def touch(self, *aliases: str) -> None:
        for alias in aliases:
            self.now += 1
            self.residency.release(self.use(alias))

    @property
    def resident(self) -> list[str]:
        return [alias for alias, slot in self.slots.items() if slot.is_resident]


def test_the_least_recently_used_model_makes_room() -> None:
    scene = Scene(budget=20)
    scene.touch("m0", "m1", "m0", "m2")
    assert scene.resident == ["m0", "m2"]
    scene.touch("m1")
    assert scene.resident == ["m1", "m2"]
    assert scene.loader.loads == ["m0", "m1", "m2", "m1"]


def test_a_pinned_model_stays() -> None:
    scene = Scene(budget=20, m0={"pin": True})
    scene.touch("m0", "m1", "m2", "m1", "m2")
    assert "m0" in scene.resident
    assert scene.slots["m0"].loads == 1


def test_a_model_in_use_stays_until_it_is_released() -> None:
    scene = Scene(budget=10)
    held = scene.use("m0")
    waiting = scene.ask("m1")
    assert not scene.loader.loading
    scene.residency.release(held)
    scene.loader.end()
    assert waiting.future.result(timeout=0) is scene.slots["m1"].model
    assert scene.resident == ["m1"]


def test_one_load_serves_all_who_wait() -> None:
    scene = Scene(budget=10)
    requests = [scene.ask("m0") for _ in range(5)]
    scene.loader.end()
    assert all(request.future.done() for request in requests)
    assert scene.slots["m0"].users == 5


def test_a_model_in_constant_use_gives_way_in_the_end_and_is_asked_for_again() -> None:
    scene = Scene(budget=10)
    held = scene.use("m0")
    other = scene.ask("m1")
    served = 0
    while True:
        following = scene.ask("m0")
        scene.residency.release(held)
        if not following.future.done():  # it drains: who asks now waits behind the other
            break
        held, served = following, served + 1
        scene.now += 0.1
        scene.residency.review()
    scene.loader.end()
    assert other.future.done()
    assert served > 4
    scene.residency.release(other)
    scene.now += 60
    scene.residency.review()
    scene.loader.end()
    assert following.future.done()


def test_who_does_not_wait_any_more_gets_nothing_and_holds_up_nobody() -> None:
    scene = Scene(budget=10)
    held = scene.use("m0")
    gone = scene.ask("m1")
    scene.residency.release(gone)
    scene.residency.release(held)
    scene.touch("m2")
    assert scene.loader.loads == ["m0", "m2"]
    assert [slot.users for slot in scene.slots.values()] == [0, 0, 0]


def test_who_must_not_wait_gets_its_model_over_the_limit() -> None:
    scene = Scene(budget=10)
    scene.use("m0")
    must = scene.ask("m1", must=True)
    scene.loader.end()
    assert must.future.done()
    assert scene.resident == ["m0", "m1"]


def test_a_model_that_can_never_fit_is_an_error_that_names_the_sizes() -> None:
    scene = Scene(budget=15, m0={"pin": True})
    scene.touch("m0")
    request = scene.ask("m1")
    with pytest.raises(ModelLoadError, match=r"'m1' has weights of 10 bytes.*15 bytes"):
        outcome(request)
    scene.residency.release(request)
    scene.touch("m0")
    assert scene.slots["m1"].users == 0


def test_a_passing_dip_of_memory_is_waited_out_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(budget=5, most=100)
    request = scene.ask("m0")
    for _ in range(3):
        scene.now += BLOCKED_SECONDS
        scene.residency.review()
    assert not request.future.done()
    assert caplog.text.count("model 'm0' has waited") == 1
    scene.budget.now = 100
    scene.now += 1
    scene.residency.review()
    scene.loader.end()
    assert request.future.result(timeout=0)


def test_a_failed_load_is_the_answer_for_all_who_waited_and_tried_again_later() -> None:
    scene = Scene(budget=10)
    requests = [scene.ask("m0") for _ in range(2)]
    scene.loader.fail(ModelLoadError("no such weights"))
    for request in [*requests, scene.ask("m0")]:
        with pytest.raises(ModelLoadError, match="no such weights"):
            outcome(request)
        scene.residency.release(request)
    scene.now += 60
    scene.touch("m0")
    assert scene.loader.loads == ["m0", "m0"]


def test_an_idle_model_goes_after_its_keep_alive_and_others_stay() -> None:
    scene = Scene(None, m0={"keep_alive": 5}, m1={"keep_alive": 60}, m2={"keep_alive": 0, "pin": True})
    scene.touch("m0", "m1", "m2")
    held = scene.use("m0")
    scene.now += 10
    scene.residency.evict_idle()
    assert scene.resident == ["m0", "m1", "m2"]
    scene.residency.release(held)
    scene.now += 10
    scene.residency.evict_idle()
    assert scene.resident == ["m1", "m2"]


def test_a_model_does_not_go_before_those_who_waited_for_it_had_it() -> None:
    scene = Scene(budget=10)
    first, second = scene.ask("m0"), scene.ask("m1")
    scene.residency.free(tries=1)
    scene.loader.end()
    assert first.future.done()
    assert not second.future.done()
    scene.residency.free(tries=1)
    assert scene.resident == ["m0"]
    scene.residency.release(first)
    scene.loader.end()
    assert second.future.done()
    assert scene.loader.loads == ["m0", "m1"]


def test_whoever_hears_of_a_model_may_ask_for_the_next() -> None:
    """A done-callback runs outside of the lock."""
    scene = Scene(budget=20)
    first = scene.ask("m0")
    more: list[Any] = []
    first.future.add_done_callback(lambda _: more.append(scene.ask("m1")))
    scene.loader.end()
    scene.loader.end()
    assert more[0].future.done()


def test_questions_change_nothing() -> None:
    scene = Scene(budget=30)
    scene.touch("m0", "m1")
    scene.budget.now = 5
    assert scene.residency.report() == {
        "budget": 5,
        "weights": 20,
        "reserve": 0,
        "host_cache": 0,
        "waiting": 0,
    }
    assert scene.residency.room_for_batches() == 10
    assert scene.resident == ["m0", "m1"]
    scene.residency.watch()
    assert scene.resident == []


def test_a_budget_that_shrinks_evicts_what_nobody_uses() -> None:
    scene = Scene(budget=30)
    held = scene.use("m0")
    scene.touch("m1", "m2")
    scene.budget.now = 20
    scene.residency.watch()
    assert scene.resident == ["m0", "m2"]
    scene.residency.release(held)


def test_a_request_that_could_not_be_made_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weights: int) -> int:
        raise OSError("NVML")

    scene = Scene(budget=10)
    with monkeypatch.context() as broken:
        broken.setattr(scene.budget, "bytes", refuse)
        with pytest.raises(OSError, match="NVML"):
            scene.ask("m0")
    scene.touch("m0")
    assert scene.slots["m0"].users == 0


def test_a_forked_child_has_what_was_there_and_loads_the_rest_anew() -> None:
    scene = Scene(budget=30)
    scene.use("m0")
    scene.ask("m1")
    scene.loader.loading.clear()
    scene.residency.restart()
    assert [slot.state for slot in scene.slots.values()] == ["resident", "unloaded", "unloaded"]
    assert scene.slots["m0"].users == 0
    scene.touch("m0", "m1")


class Shared:
    """A device of two workers: each knows what is left by the other."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.workers: list[Scene] = []

    def of(self, scene: Scene) -> SharedBudget:
        self.workers.append(scene)
        return SharedBudget(self, scene)


class SharedBudget(Unbounded):
    """One worker's part in it."""

    def __init__(self, shared: Shared, scene: Scene) -> None:
        self.shared = shared
        self.scene = scene

    def bytes(self, weights: int) -> int:
        others = (one for one in self.shared.workers if one is not self.scene)
        return self.shared.total - 10 * sum(len(one.resident) for one in others)


def test_a_load_counts_again_once_it_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers find the same room, one after the other begins to fill it, and there is not room for both."""
    shared, scenes = Shared(total=15), [Scene(budget=15), Scene(budget=15)]
    for scene in scenes:
        monkeypatch.setattr(scene.budget, "bytes", shared.of(scene).bytes)
    requests = [scene.ask("m0") for scene in scenes]
    for scene in scenes:
        scene.loader.end()
    assert [request.future.done() for request in requests] == [True, False]
    assert [scene.slots["m0"].state for scene in scenes] == ["resident", "unloaded"]
    scenes[0].residency.release(requests[0])
    scenes[0].residency.free(tries=1)
    scenes[1].now += 1
    scenes[1].residency.review()
    scenes[1].loader.end()
    assert requests[1].future.done()


# With a loader's threads.


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
    assert request.future.result(timeout=20) is subject.get(alias).model
    return request


def touch(subject: Registry, *aliases: str) -> None:
    for alias in aliases:
        subject.residency.release(use(subject, alias))


def resident(subject: Registry) -> list[str]:
    return [alias for alias, entry in subject.slots.items() if entry.is_resident]


def test_threads_that_ask_at_once_never_overdraw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated device would refuse, and a load fail."""
    ledger = simulated_device().ledger
    monkeypatch.setattr(ledger, "total", ledger.used + 20)
    subject = registry(budget=20, count=6, load_seconds=0.002)
    failures: list[BaseException] = []

    def ask(order: Sequence[int]) -> None:
        try:
            for number in order:
                touch(subject, f"m{number}")
        except BaseException as error:
            failures.append(error)

    askers = [threading.Thread(target=ask, args=([(n * k) % 6 for n in range(12)],)) for k in (1, 5, 7)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(timeout=60)
    assert not failures
    assert all(entry.users == 0 for entry in subject.slots.values())


class Turns(Limited):
    """Notes when a load has its turn."""

    def __init__(self) -> None:
        super().__init__(100)
        self.turns: list[str] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.turns.append("begin")
        yield
        self.turns.append("end")


def test_whoever_still_has_an_evicted_model_does_not_keep_its_weights() -> None:
    """A queue of the engine does, until the next item comes."""
    subject = registry(budget=10)
    request = use(subject, "m0")
    model = request.future.result()
    weights = weakref.ref(model.model)
    subject.residency.release(request)
    touch(subject, "m1")
    assert weights() is None
    assert not model.is_lost(RuntimeError("of its last batch"))


def test_a_load_takes_its_turn_on_the_device() -> None:
    budget = Turns()
    subject = Registry({"m0": ModelSettings(kind="simulated", path="0,0,10")}, lambda: "cpu", budget)
    touch(subject, "m0")
    assert budget.turns == ["begin", "end"]


# What batches need beside the weights.


def test_there_is_room_for_batches_beside_the_weights_and_a_model_makes_it() -> None:
    """Each has 10 bytes and batches that take 3 a unit; a reserve of a batch of 16 times 256."""
    reserve = round(1.2 * 3 * 16 * 256)
    path = {"path": "0,0,10,0,3"}
    subject = registry(budget=25 + reserve, m0=path, m1=path, m2=path)
    touch(subject, "m0", "m1")
    assert subject.get("m0").reserve == pytest.approx(reserve, rel=0.01)
    assert subject.residency.room_for_batches() == 5 + reserve
    touch(subject, "m2")
    assert resident(subject) == ["m1", "m2"]
    assert subject.residency.report()["reserve"] == subject.get("m2").reserve


def test_weights_come_first_where_there_is_not_room_for_both() -> None:
    path = {"path": "0,0,10,0,3"}
    subject = registry(budget=105, m0=path, m1=path)
    touch(subject, "m0", "m1")
    held = use(subject, "m0")
    assert resident(subject) == ["m0"]
    assert subject.residency.room_for_batches() == 95
    model = held.future.result()
    assert model.largest_cost(5) == 25  # 95 bytes, 3 a unit, 1.2 for the unforeseen: five items of five
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


def movable(budget: int, host_cache: int, cached: int = 0, **more: Any) -> Registry:
    """Three of them, whose sizes are known from an earlier load."""
    gone.clear()
    specs = {alias: ModelSettings(kind=f"{__name__}:Movable", **more) for alias in ("m0", "m1", "m2")}
    subject = Registry(specs, lambda: "simulated", Caching(budget, cached), host_cache)
    for entry in subject.slots.values():
        entry.size = 10
    return subject


def moves(subject: Registry, alias: str) -> list[str]:
    request = use(subject, alias)
    subject.residency.release(request)
    found: list[str] = request.future.result().model.moves
    return found


class Unfit(Movable):
    """A model whose weights are there when its load fails."""

    def sample(self, cost: int) -> Any:
        raise ValueError("no sample")


def test_a_model_that_fails_after_its_weights_were_read_is_unloaded() -> None:
    gone.clear()
    subject = Registry({"m0": ModelSettings(kind=f"{__name__}:Unfit")}, lambda: "simulated", Caching(20, 0))
    request = subject.residency.request(subject.get("m0"))
    with pytest.raises(ModelLoadError, match="no sample"):
        request.future.result(timeout=10)
    assert gone == [["made m0", "load simulated", "unload"]]


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


def test_what_ran_out_of_use_is_not_kept() -> None:
    subject = movable(budget=10, host_cache=20, keep_alive=0)
    touch(subject, "m0")
    subject.residency.evict_idle()
    assert moves(subject, "m0") == ["made m0", "load simulated"]


# Memory for a batch that ran out of it.


class Caching(Limited):
    """A device whose allocator keeps something for later, once."""

    def __init__(self, now: int, cached: int = 0) -> None:
        super().__init__(now)
        self.cached = cached

    def give_back(self) -> int:
        came, self.cached = self.cached, 0
        return came


def test_an_item_that_never_fits_costs_the_cache_first_and_then_one_idle_model_a_try_which_wait_on_the_host() -> None:
    subject = movable(budget=30, host_cache=30, cached=5)
    touch(subject, "m0", "m1")
    held = use(subject, "m2")
    subject.residency.free()
    assert resident(subject) == ["m0", "m1", "m2"]
    subject.residency.free(tries=1)
    assert resident(subject) == ["m1", "m2"]
    assert subject.shelf.used == 10
    for tries in range(2, 8):
        subject.residency.free(tries=tries)
    assert resident(subject) == ["m2"]
    assert not gone
    subject.residency.release(held)
    assert moves(subject, "m0") == ["made m0", "load simulated", "to cpu", "to simulated"]


def test_a_batch_that_lacks_bytes_is_given_those_and_no_more() -> None:
    subject = movable(budget=35, host_cache=30)
    touch(subject, "m0", "m1")
    held = use(subject, "m2")
    subject.residency.free(needed=12)
    assert resident(subject) == ["m1", "m2"]
    subject.residency.free(needed=100)
    assert resident(subject) == ["m1", "m2"], "all that is idle would not be enough"
    subject.residency.release(held)


def test_a_host_without_room_forgets_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Movable, device: str) -> None:
        raise MemoryError

    monkeypatch.setattr(Movable, "to", refuse)
    subject = movable(budget=10, host_cache=20)
    touch(subject, "m0", "m1")
    assert subject.shelf.used == 0
    assert gone == [["made m0", "load simulated", "unload"]]
    assert moves(subject, "m0") == ["made m0", "load simulated"]


def test_the_devices_allocator_is_held_to_the_budget_or_to_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "LEAST_ROOM", 5)
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
    budget.now = budget.ever = 12
    subject.residency.watch()
    assert budget.limit == 10 + 5, "what batches would like is no reason to pass the operator's limit"
    subject.get("m0").size = 0
    subject.residency.watch()
    assert budget.limit is None, "nobody knows what its weights take"
    subject.residency.release(first)


def test_who_needs_the_room_of_a_model_waits_for_the_thread_that_moves_it() -> None:
    moving, may_end, shelf = threading.Event(), threading.Event(), Shelf(100)

    class Slow(Movable):
        def to(self, device: str) -> None:
            moving.set()
            may_end.wait(10)
            super().to(device)

    own = Slow("m")
    model = LoadedModel("m", "own", own, simulated_device(), CostModel(), Scene(None).residency)
    shelf.put("m", model, 10)
    threads = [threading.Thread(target=shelf.move) for _ in range(2)]
    threads[0].start()
    assert moving.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive()
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert shelf.used == 10


def test_a_model_that_becomes_garbage_late_is_gone_before_the_next_load() -> None:
    """In a cycle, as what a failed task had: Python's collector has looked in vain before."""

    own: Any = SimulatedModel()
    own.itself = own
    shelf, gone, holders = Shelf(0), weakref.ref(own), [own]
    shelf.forget(LoadedModel("m", "own", own, Device("cpu"), CostModel(), Scene(None).residency))
    del own
    gc.disable()
    try:
        threading.Timer(0.7, holders.clear).start()
        shelf.clear_device()
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_that_is_to_leave_takes_no_request_until_it_has_left() -> None:
    scene = Scene(None)
    held = scene.use("m0")
    scene.residency.unload(scene.slots["m0"])
    assert (scene.slots["m0"].state, scene.slots["m0"].is_leaving) == ("draining", True)
    later = scene.ask("m0")
    assert not later.future.done()
    scene.residency.release(held)
    scene.loader.end()
    assert later.future.done()
    assert scene.loader.loads == ["m0", "m0"]
    assert not scene.slots["m0"].is_leaving


def test_a_model_in_use_leaves_though_nobody_waits_for_its_memory() -> None:
    scene = Scene(None)
    held = scene.use("m0")
    scene.residency.unload(scene.slots["m0"])
    scene.residency.review()
    scene.residency.release(held)
    assert scene.slots["m0"].state == "unloaded"


def test_a_pinned_model_is_not_unloaded_and_one_that_was_to_leave_is_pinned() -> None:
    scene = Scene(budget=10, m0={"pin": True})
    scene.touch("m0")
    scene.residency.unload(scene.slots["m0"])
    assert scene.resident == ["m0"]
    scene.residency.pin(scene.slots["m0"], False)
    held = scene.use("m0")
    scene.residency.unload(scene.slots["m0"])
    scene.residency.want(scene.slots["m0"])
    scene.residency.pin(scene.slots["m0"], True)
    scene.residency.release(held)
    assert scene.resident == ["m0"]
    assert isinstance(scene.ask("m1").future.exception(), ModelLoadError)
    scene.residency.pin(scene.slots["m0"], False)
    scene.use("m1")
    assert scene.resident == ["m1"]


def test_the_next_look_is_when_a_model_may_be_idle_or_now_if_somebody_waits() -> None:
    scene = Scene(10, m0={"keep_alive": 5}, m2={"keep_alive": 1, "pin": True})
    assert scene.residency.next_look() is None
    scene.touch("m0")
    assert scene.residency.next_look() == 5
    scene.now += 2
    assert scene.residency.next_look() == 3
    held = scene.use("m0")
    scene.ask("m1")
    assert scene.residency.next_look() == 0
    scene.residency.release(held)
    scene.loader.end()
    assert scene.residency.next_look() is None
