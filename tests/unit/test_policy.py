"""The decision who is in memory: alone, by examples, and against a device that refuses to be overdrawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from traces import FIT, MODELS, even, least_loads, shifting, skewed

from legit_worker.device.devices import Device
from legit_worker.device.simulated import Ledger
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.policy import (
    LOAD_RETRY_AFTER,
    Allowance,
    Plan,
    Request,
    carry_out,
    decide,
    to_drain,
    to_evict,
    weights,
)
from legit_worker.models.simulated import SimulatedModel
from legit_worker.models.slot import Slot
from legit_worker.settings import ModelSettings

FREE, PINNED = ModelSettings(kind="simulated"), ModelSettings(kind="simulated", pin=True)


def slot(alias: str, size: int = 10, **more: Any) -> Slot:
    found = Slot(alias=alias, spec=PINNED if more.pop("pinned", False) else FREE, size=size, **more)
    if found.is_resident:
        found.model = model(found)
    return found


class Alone:
    """Nothing around a model."""

    def room_for_batches(self) -> int | None:
        return None

    def is_loading(self) -> bool:
        return False

    def free(self, needed: int = 0, tries: int = 0) -> None:
        pass


def model(of: Slot) -> LoadedModel:
    return LoadedModel(of.alias, "simulated", SimulatedModel(), Device("cpu"), of.activations, Alone())


slots = st.lists(
    st.builds(
        slot,
        alias=st.uuids().map(str),
        size=st.integers(0, 100),
        state=st.sampled_from(["resident", "draining", "unloaded", "loading"]),
        users=st.integers(0, 2),
        pinned=st.booleans(),
        used_at=st.floats(0, 100),
        loaded_at=st.floats(0, 100),
    ),
    max_size=8,
)


@given(slots, st.integers(0, 200), st.integers(0, 400), st.integers(0, 100))
def test_what_is_evicted_is_unused_unpinned_and_no_more_than_needed(
    found: list[Slot], wanted: int, budget: int, reserved: int
) -> None:
    by_alias = {one.alias: one for one in found}
    used = weights(found) + reserved
    evictable = sum(one.size for one in found if one.is_idle)
    chosen = to_evict(wanted, budget, found, reserved)
    if chosen is None:
        assert used - evictable + wanted > budget
        return
    left = used - sum(by_alias[alias].size for alias in chosen)
    assert left + wanted <= budget
    assert all(by_alias[alias].is_idle for alias in chosen)
    if chosen:
        assert left + by_alias[chosen[-1]].size + wanted > budget
        latest = max(by_alias[alias].used_at for alias in chosen)
        assert all(one.used_at >= latest for one in found if one.alias not in chosen and one.is_idle)


@given(slots, st.integers(0, 200))
def test_without_a_budget_nothing_is_evicted(found: list[Slot], wanted: int) -> None:
    assert to_evict(wanted, None, found) == []


@given(slots, st.integers(0, 200), st.integers(0, 400), st.floats(0, 100))
def test_what_drains_keeps_the_fewest_waiting_and_has_been_there_for_a_while(
    found: list[Slot], wanted: int, budget: int, before: float
) -> None:
    by_alias = {one.alias: one for one in found}
    chosen = to_drain(wanted, budget, found, 0, before)
    for alias in chosen or ():
        assert by_alias[alias].is_resident
        assert not by_alias[alias].is_pinned
        assert by_alias[alias].loaded_at < before or by_alias[alias].state == "draining"
    if chosen is not None:
        assert weights(one for one in found if one.alias not in chosen) + wanted <= budget


def ask(of: Slot, since: float = 0.0, *, must: bool = False) -> Request:
    return Request(slot=of, since=since, must=must)


def bytes_(now: int | None, most: int | None = None) -> Allowance:
    return Allowance(now=now, most=now if most is None else most)


def test_a_decision_changes_nothing() -> None:
    there, wanted = slot("m0", state="resident"), slot("m1")
    plan = decide([there, wanted], [ask(wanted)], bytes_(10), 1.0)
    assert plan == Plan(evict=["m0"], load=["m1"])
    assert (there.state, wanted.state) == ("resident", "unloaded")


def test_a_model_that_has_just_come_is_given_to_those_who_wait_before_it_makes_room() -> None:
    there, wanted = slot("m0", state="resident"), slot("m1")
    first, second = ask(there), ask(wanted)
    assert decide([there, wanted], [second, first], bytes_(10), 0.0) == Plan(serve=[first])


def test_a_passing_dip_of_memory_has_a_request_wait_and_not_fail() -> None:
    wanted = slot("m0", size=50)
    request = ask(wanted)
    assert decide([wanted], [request], bytes_(20, most=100), 1.0) == Plan(blocked=[request])
    assert decide([wanted], [request], bytes_(50, most=100), 2.0) == Plan(load=["m0"])


def test_who_waits_for_other_processes_memory_holds_up_nobody() -> None:
    large, small = slot("m0", size=50), slot("m1")
    requests = [ask(large), ask(small)]
    assert decide([large, small], requests, bytes_(20, most=100), 1.0) == Plan(blocked=requests[:1], load=["m1"])


def test_who_waits_for_this_workers_memory_is_overtaken_by_nobody() -> None:
    used, large, small = slot("m0", users=1, state="resident"), slot("m1", size=20), slot("m2")
    assert decide([used, large, small], [ask(large), ask(small)], bytes_(20), 0.0) == Plan()


def test_what_can_never_be_free_is_an_error_that_names_the_sizes() -> None:
    pinned, wanted = slot("m0", pinned=True, state="resident"), slot("m1")
    request = ask(wanted)
    ((failed, error),) = decide([pinned, wanted], [request], bytes_(15), 0.0).fail
    assert failed is request
    assert "'m1' has weights of 10 bytes" in str(error)
    assert "15 bytes" in str(error)


def test_a_task_that_can_not_wait_gets_its_model_over_the_limit_or_while_it_drains() -> None:
    used, wanted = slot("m0", users=1, state="resident"), slot("m1")
    assert decide([used, wanted], [ask(wanted, must=True)], bytes_(10), 0.0) == Plan(load=["m1"], over=["m1"])
    used.state = "draining"
    must, other = ask(used, must=True), ask(wanted)
    assert decide([used, wanted], [other, must], bytes_(10), 0.0) == Plan(serve=[must])


def test_a_task_that_can_not_wait_overtakes_those_who_wait_for_what_it_holds() -> None:
    """A model's `preprocess` calls another one: its task holds the one while it waits for the other."""
    held, first, nested = slot("m0", users=1, state="resident"), slot("m1", size=20), slot("m2")
    requests = [ask(first), ask(nested, must=True)]
    assert decide([held, first, nested], requests, bytes_(20), 0.0) == Plan(load=["m2"])


def test_a_failed_load_is_the_answer_for_a_while() -> None:
    broken = slot("m0", state="failed", failed_at=5.0, error=OSError("no such weights"))
    waited, later = ask(broken, since=4.0), ask(broken, since=6.0)
    plan = decide([broken], [waited, later], Allowance(), 6.0)
    assert plan.fail == [(waited, broken.error), (later, broken.error)]
    plan = decide([broken], [waited, later], Allowance(), 6.0 + LOAD_RETRY_AFTER)
    assert plan == Plan(fail=[(waited, broken.error)], load=["m0"])


def test_a_model_drains_only_for_somebody_who_waits() -> None:
    drains, wanted = slot("m0", users=1, state="draining"), slot("m1")
    back = ask(drains)
    assert decide([drains, wanted], [ask(wanted), back], bytes_(10), 0.0) == Plan()
    assert decide([drains, wanted], [back], bytes_(10), 0.0) == Plan(reopen=["m0"], serve=[back])


def test_more_drain_for_the_next_request_if_those_that_drain_are_not_enough() -> None:
    """They drained for somebody who does not wait any more."""
    drains, used, wanted = slot("m0", state="draining"), slot("m1", users=1, state="resident"), slot("m2", size=20)
    request = ask(wanted)
    assert decide([drains, used, wanted], [request], bytes_(20), 9.0) == Plan(drain=["m1"])
    used.state, used.users = "draining", 0
    assert decide([drains, used, wanted], [request], bytes_(20), 9.0) == Plan(evict=["m0", "m1"], load=["m2"])


class World:
    """Slots on a device that refuses to be overdrawn, on a clock of its own."""

    def __init__(self, found: list[Slot], total: int) -> None:
        self.slots = {one.alias: one for one in found}
        self.device = Ledger(total)
        self.now = 0.0
        self.waiting: list[Request] = []
        self.served: list[Request] = []
        self.loading: deque[str] = deque()
        self.loads = 0

    def ask(self, alias: str) -> Request:
        request = ask(self.slots[alias], self.now)
        self.waiting.append(request)
        return request

    def release(self, request: Request) -> None:
        self.served.remove(request)
        request.slot.users -= 1
        request.slot.used_at = self.now

    def load_ends(self) -> None:
        found = self.slots[self.loading.popleft()]
        found.state, found.model, found.loaded_at, found.used_at = "resident", model(found), self.now, self.now
        found.load_seconds = 0.1

    def step(self) -> Plan:
        others = self.device.owners.get("others", 0)
        allowed = Allowance(now=self.device.total - others, most=self.device.total)
        plan = decide(self.slots.values(), self.waiting, allowed, self.now)
        for alias in plan.evict:
            assert not self.slots[alias].users, f"{alias} was evicted while it was in use"
            assert not self.slots[alias].is_pinned, f"{alias} was evicted though it is pinned"
        assert not any(request.slot.state == "draining" and not plan.reopen for request in plan.serve)
        for left, _ in carry_out(plan, self.slots, self.now):
            self.device.give_back(left.alias, left.size)
        for alias in plan.load:
            self.device.take(alias, self.slots[alias].size)
        self.loading.extend(plan.load)
        self.loads += len(plan.load)
        self.served += plan.serve
        gone = [*plan.serve, *(request for request, _ in plan.fail)]
        self.waiting = [request for request in self.waiting if request not in gone]
        return plan


SIZES = {"m0": 10, "m1": 20, "m2": 30, "m3": 40, "m4": 60, "large": 95}


class Demand(RuleBasedStateMachine):
    """Anybody asks for anything, others come and go, and loads take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World([slot(alias, size, pinned=alias == "m0") for alias, size in SIZES.items()], total=100)

    @rule(alias=st.sampled_from(sorted(SIZES)))
    def ask(self, alias: str) -> None:
        self.world.ask(alias)

    @precondition(lambda self: self.world.served)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.world.release(data.draw(st.sampled_from(self.world.served)))

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.world.waiting.remove(data.draw(st.sampled_from(self.world.waiting)))

    @precondition(lambda self: self.world.loading)
    @rule()
    def load_ends(self) -> None:
        self.world.load_ends()

    @rule(seconds=st.sampled_from([0.01, 1.0, 60.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(part=st.floats(0, 1))
    def others_grow(self, part: float) -> None:
        self.world.device.take("others", int(part * self.world.device.free))

    @rule()
    def others_go(self) -> None:
        self.world.device.owners.pop("others", None)

    @invariant()
    def whoever_can_have_a_model_has_it(self) -> None:
        for _ in range(2):  # a request that can never be served may have had others drain
            self.world.step()
        last = self.world.step()
        assert last == Plan(blocked=last.blocked), "decisions come to rest"
        for request in self.world.waiting:
            assert request.slot.state != "resident"

    def teardown(self) -> None:
        """Nobody starves, though those who have a model ask for it again as soon as they gave it back."""
        self.others_go()
        starved = list(self.world.waiting)
        for _ in range(60 * len(SIZES)):
            if not set(starved) & set(self.world.waiting):
                return
            self.world.now += 1.0
            for request in list(self.world.served):
                self.world.ask(request.slot.alias)
                self.world.step()
                self.world.release(request)
            self.world.step()
            while self.world.loading:
                self.world.load_ends()
                self.world.step()
        raise AssertionError(f"starved: {[one.slot.alias for one in starved if one in self.world.waiting]}")


Demand.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestDemand = Demand.TestCase


#: Seconds of a load and of a batch, and the items of a batch, in the simulation of a trace.
LOAD, BATCH, ITEMS = 0.1, 0.001, 8


def run(wanted: list[int], window: int) -> int:
    """How many loads it takes to run these tasks, so many of them at a time."""
    world = World([slot(f"m{number}") for number in range(MODELS)], total=10 * FIT)
    tasks = deque(wanted)
    ends = 0.0
    while tasks or world.waiting or world.served:
        while tasks and len(world.waiting) + len(world.served) < window:
            world.ask(f"m{tasks.popleft()}")
        was_loading = bool(world.loading)
        world.step()
        if world.loading and not was_loading:
            ends = world.now + LOAD
        if world.served:
            first = world.served[0].slot
            for request in [one for one in world.served if one.slot is first][:ITEMS]:
                world.release(request)
            world.now += BATCH
        else:
            world.now = max(world.now + BATCH, ends)
        if world.loading and world.now >= ends:
            world.load_ends()
            ends = world.now + LOAD
    return world.loads


@pytest.mark.parametrize("window", [64, 1024])
@pytest.mark.parametrize("trace", [skewed, even, shifting])
def test_swaps_are_few(trace: Callable[[int], list[int]], window: int) -> None:
    wanted = trace(1500)
    assert MODELS <= run(wanted, window) <= 1.5 * least_loads(wanted, FIT)
