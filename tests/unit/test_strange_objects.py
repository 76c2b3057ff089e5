"""Objects of a user's own model that raise when they are compared, counted or shown. They fail nobody else's task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from plain import Plain

import legit_worker
from legit_worker.batching.keys import Key, key_of
from legit_worker.errors import LegitWorkerError, said
from legit_worker.testing import Together, run_together, use_models

TEXTS = [f"text {number % 3}" for number in range(12)]


class Touchy:
    """Has the hash of all others, and raises when it is compared with one of them."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        raise RuntimeError("not with that one")


class Arrayed(Touchy):
    """Compares as an array does: number by number."""

    def __eq__(self, other: object) -> Any:
        return True if other is self else np.array([True, False])

    __hash__ = Touchy.__hash__


class Fickle(Touchy):
    """Equals another one only at every second look."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Fickle.looks += 1
        return other is self or Fickle.looks % 2 == 0

    __hash__ = Touchy.__hash__


class Unhashed(Touchy):
    """Loses its hash once somebody has read it."""

    is_read = False

    def __hash__(self) -> int:
        self.is_read, was_read = True, self.is_read
        if was_read:
            raise RuntimeError("no hash any more")
        return 1


class Identified(Plain):
    """Tells by strange objects which items are equal."""

    kind: type[Touchy] = Touchy

    def identity(self, item: str) -> Any:
        """A strange object."""
        return self.kind(item)


class IdentifiedByArrays(Identified):
    """The same."""

    kind = Arrayed


class IdentifiedByUnhashed(Identified):
    """The same."""

    kind = Unhashed


class Keyed(Identified):
    """Tells by the same objects which items share a batch."""

    batch_key = Identified.identity
    identity: Any = None


class KeyedByArrays(Keyed):
    """The same."""

    kind = Arrayed


def called(item: str) -> Any:
    """What a task gets, or its error."""
    try:
        return legit_worker.model("m").map([item])[0]
    except BaseException as error:
        return error


def ran(model: type[Plain], items: Sequence[str] = TEXTS) -> Together:
    with use_models({"m": {"kind": f"{__name__}:{model.__name__}"}}):
        return run_together(called, items)


@pytest.mark.parametrize("model", [Identified, IdentifiedByArrays, IdentifiedByUnhashed, Keyed, KeyedByArrays])
def test_items_whose_keys_raise_when_they_are_compared_are_unlike_all_others(model: type[Plain]) -> None:
    done = ran(model)
    assert done.results == [text.upper() for text in TEXTS]
    assert done.items == {"m": len(TEXTS)}


def test_without_a_pool_such_items_are_computed_too() -> None:
    with use_models({"m": {"kind": f"{__name__}:Keyed"}}):
        assert legit_worker.model("m").map(TEXTS) == [text.upper() for text in TEXTS]


class IdentifiedByFickle(Identified):
    """The same."""

    kind = Fickle


def test_keys_that_change_their_minds_end_nothing() -> None:
    for _ in range(20):
        assert len(ran(IdentifiedByFickle).results) == len(TEXTS)


class Bad(Plain):
    """Fails in its own way for an item that says `bad`."""

    def fails(self) -> Any:
        """The outputs of a batch, or an error."""
        raise NotImplementedError

    def forward(self, batch: Sequence[Any]) -> Any:
        """Capitals, if nobody is bad."""
        return self.fails() if "bad" in batch else super().forward(batch)


class MuteError(RuntimeError):
    """One whose message can't be read."""

    def __str__(self) -> str:
        raise KeyError("message")

    __repr__ = __str__


class Mute(Bad):
    """Raises that."""

    def fails(self) -> Any:
        """No outputs."""
        raise MuteError


class Counted:
    """A list, as far as it is counted; then a task's end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        raise SystemExit(3)


class Ending(Bad):
    """Gives outputs that end the process when they are read."""

    def forward(self, batch: Sequence[Any]) -> Any:
        """One for each item."""
        return Counted(len(batch)) if "bad" in batch else super().forward(batch)


class Uncounted:
    """Outputs that can't be counted."""

    def __len__(self) -> int:
        raise RuntimeError("who knows")


class Unlike(Bad):
    """Gives those."""

    def fails(self) -> Any:
        """No list."""
        return Uncounted()


@pytest.mark.parametrize(("model", "error"), [(Mute, MuteError), (Ending, SystemExit), (Unlike, RuntimeError)])
def test_a_strange_error_or_output_is_the_guilty_tasks_alone(model: type[Plain], error: type[BaseException]) -> None:
    results = ran(model, [*TEXTS, "bad", *TEXTS]).results
    assert isinstance(results.pop(len(TEXTS)), error)
    assert results == [text.upper() for text in TEXTS * 2]


class Nothing(Plain):
    """Forgets to return its outputs."""

    def forward(self, batch: Sequence[Any]) -> Any:
        """Nothing."""


class Lazy(Plain):
    """Gives a generator."""

    def forward(self, batch: Sequence[Any]) -> Any:
        """One output for each item, once somebody asks."""
        return (item.upper() for item in batch)


class Named(Plain):
    """Gives what transformers' models give: tensors by their names, of which there may be as many as items."""

    def forward(self, batch: Sequence[Any]) -> Any:
        """Two of them."""
        return {"last_hidden_state": [item.upper() for item in batch], "pooler_output": None}


class Unordered(Plain):
    """Gives a set."""

    def forward(self, batch: Sequence[Any]) -> Any:
        """As many as there are items."""
        return {item.upper() for item in batch}


@pytest.mark.parametrize(
    ("model", "what"), [(Nothing, "NoneType"), (Lazy, "generator"), (Named, "dict"), (Unordered, "set")]
)
def test_what_is_no_list_of_outputs_is_told(model: type[Plain], what: str) -> None:
    for error in ran(model, ["one", "two"]).results:
        assert isinstance(error, LegitWorkerError)
        assert f"model 'm' gave {what} instead of outputs for a batch of 1 items" in str(error)


def test_a_models_own_attribute_named_backend_means_nothing_here() -> None:
    with use_models({"m": {"kind": f"{__name__}:OnGloo"}}) as registry:
        legit_worker.model("m").map(["text"])
        loaded = registry.get("m").model
        assert loaded is not None
        assert loaded.backend == {}


class OnGloo(Plain):
    """Says so in an attribute of its own."""

    backend = "gloo"


@pytest.mark.parametrize("make", [Touchy, Arrayed, lambda text: (text, 1), lambda text: float("nan")])
def test_a_key_is_equal_to_one_of_the_same_object(make: Callable[[str], Any]) -> None:
    found = make("a")
    assert key_of(found) == key_of(found)
    assert hash(key_of(found)) == hash(key_of(found))
    assert key_of(found) != key_of(Touchy("a"))


@pytest.mark.parametrize("plain", [None, 5, "text", b"bytes", True])
def test_what_is_plain_is_its_own_key(plain: Any) -> None:
    assert key_of(plain) is plain


def test_equal_objects_have_equal_keys() -> None:
    assert key_of((1, "a")) == key_of((1, "a"))
    assert key_of((1, "a")) != key_of((1, "b"))
    assert Key("a") != "a"
    assert repr(key_of(("secret",))) == "<Key of a tuple>"
    with pytest.raises(TypeError):
        key_of(([],))


def test_an_error_that_can_not_tell_its_message_is_told_of_all_the_same() -> None:
    assert said(MuteError()) == "its message can't be read, since its __str__() raises KeyError"
    assert said(ValueError("a")) == "a"
