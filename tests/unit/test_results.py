"""Results in groups: whatever the server answers, each write ends stored or refused, and none for another's sake."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from redis.exceptions import BusyLoadingError, NoPermissionError, NoScriptError, OutOfMemoryError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from legit_worker.results import patience, writer
from legit_worker.results.conditional import MOST_LOOKS, SHA1, STORE, digest
from legit_worker.results.writer import Group, Writer
from legit_worker.results.writes import Rider, Write, is_away

#: Seconds for what takes milliseconds.
SOON = 20


class Server:
    """A Redis server, and a client of it."""

    def __init__(self) -> None:
        self.values: dict[bytes, Any] = {}
        self.lists: dict[str, list[bytes]] = {}
        self.published: list[bytes] = []
        self.is_there = True
        #: By command and key, what it answers instead.
        self.errors: dict[tuple[str, Any], Exception] = {}
        #: Keys over which it breaks the connection.
        self.breaks_over: set[Any] = set()
        self.round_trips = 0
        self.scripts: set[str] = set()
        #: What others store between this client's look and its script, each time.
        self.between: list[bytes] = []
        self.connection_pool = self

    def disconnect(self) -> None:
        """Nothing to close."""

    def fail(self) -> None:
        raise RedisConnectionError("nobody there")

    def ping(self) -> bool:
        self._answer()
        return True

    def mget(self, keys: Iterable[bytes]) -> list[Any]:
        self._answer()
        if ("MGET", None) in self.errors:
            raise self.errors["MGET", None]
        return [self.values.get(key) for key in keys]

    def pipeline(self, transaction: bool) -> Pipeline:
        assert not transaction
        return Pipeline(self)

    def _answer(self) -> None:
        if not self.is_there:
            raise RedisConnectionError("nobody there")
        self.round_trips += 1

    def run(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        self._answer()
        if self.breaks_over.intersection(part for command in commands for part in command[1:4]):
            raise RedisConnectionError("Connection closed by server.")
        return [self._run(*command) for command in commands]

    def _run(self, name: str, key: Any, *rest: Any) -> Any:
        if (name, key) in self.errors:
            return self.errors[name, key]
        match name:
            case "SCRIPT LOAD":
                self.scripts.add(SHA1)
            case "EVALSHA":
                return self._store(*rest[1:]) if key in self.scripts else NoScriptError("No matching script.")
            case "GET":
                return self.values.get(key)
            case "SET" | "SETEX":
                self.values[key] = rest[-1]
            case "PUBLISH":
                self.published.append(key)
            case "RPUSH":
                self.lists.setdefault(key, []).append(rest[-1])
        return True

    def _store(self, key: bytes, found: str, expires: int | str, value: bytes) -> Any:
        """What the script does."""
        for change in self.between[:1]:
            self.values[key] = change
        del self.between[:1]
        if digest(self.values.get(key)) != found:
            return 0
        answers = [self._run("SET", key, value), self._run("PUBLISH", key, value)]
        return next((answer for answer in answers if isinstance(answer, Exception)), 1)


class Pipeline:
    """A pipeline of it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._commands: list[tuple[Any, ...]] = []

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing to give back."""

    def execute_command(self, *command: Any) -> None:
        self._commands.append(command)

    def get(self, key: bytes) -> None:
        self._commands.append(("GET", key))

    def execute(self, raise_on_error: bool) -> list[Any]:
        assert not raise_on_error
        return self._server.run(self._commands) if self._commands else []


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FIRST_RETRY", 0.001)
    monkeypatch.setattr(writer, "LAST_RETRY", 0.005)


def start(server: Server) -> Writer:
    return Writer("server", lambda: server, lambda value: json.loads(value)["status"] == "SUCCESS")


def write(key: str, status: str = "SUCCESS", riders: Iterable[Rider] = (), note: str = "") -> Write:
    value = json.dumps({"status": status, "note": note}).encode()
    return Write(key=key.encode(), value=value, is_success=status == "SUCCESS", riders=list(riders))


def join(to: Writer, *writes: Write) -> list[Group]:
    """Have them in groups, all in one if the thread has nothing else to do."""
    with to._lock:
        group = Group()
        group.writes.extend(writes)
        to._groups.put(group)
    return [group]


def store(to: Writer, *writes: Write) -> None:
    for group in join(to, *writes):
        group.done.result(SOON)


def test_a_group_takes_two_round_trips() -> None:
    server = Server()
    writes = [write(str(number)) for number in range(100)]
    store(start(server), *writes)
    assert server.values == {one.key: one.value for one in writes}
    assert server.published == [one.key for one in writes]
    assert server.round_trips == 2


def test_a_success_that_is_stored_stays() -> None:
    server = Server()
    good, bad = write("a"), write("a", "FAILURE")
    store(start(server), good)
    store(start(server), bad)
    assert server.values == {b"a": good.value}
    assert bad.is_stored
    assert bad.error is None


def test_a_success_in_the_same_group_stays() -> None:
    server = Server()
    good, bad = write("a"), write("a", "FAILURE")
    store(start(server), write("a", "STARTED"), good, bad)
    assert server.values == {b"a": good.value}


def test_a_success_that_came_after_the_look_stays() -> None:
    server = Server()
    good, bad = write("a"), write("a", "RETRY")
    server.between = [good.value]
    store(start(server), bad)
    assert server.values == {b"a": good.value}
    assert server.published == []
    assert bad.is_stored


def test_what_came_after_the_look_and_is_no_success_is_replaced() -> None:
    server = Server()
    late = write("a", "FAILURE")
    server.between = [write("a", "STARTED").value]
    store(start(server), late)
    assert server.values == {b"a": late.value}
    assert server.published == [b"a"]


def test_states_of_one_task_in_one_group_keep_their_order() -> None:
    server = Server()
    states = [write("a", status) for status in ("STARTED", "RETRY", "STARTED", "FAILURE")]
    to = start(server)
    store(to, write("b", "STARTED"))  # the server knows the script from here on
    trips = server.round_trips
    store(to, *states)
    assert server.values[b"a"] == states[-1].value
    assert server.published == [b"b", *[b"a"] * 4]
    assert server.round_trips == trips + 2


def test_states_of_one_task_keep_their_order_if_their_group_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who may not store the first part's results makes it wait, and the next group's are tried beside it."""
    monkeypatch.setattr(writer, "MOST_WRITES", 2)
    server = Server()
    server.errors |= {("SET", key): FORBIDDEN[0] for key in (b"a", b"b")}
    to = start(server)
    first = write("a"), write("b"), write("c", "RETRY"), write("d")
    groups = join(to, *first) + join(to, last := write("c", "FAILURE"))
    for group in groups:
        group.done.result(SOON)
    assert server.values == {b"c": last.value, b"d": first[3].value}
    assert [one.error for one in first] == [FORBIDDEN[0], FORBIDDEN[0], None, None]


def test_all_parts_of_a_group_wait_if_one_is_refused_and_the_server_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MOST_WRITES", 2)
    server = Server()
    server.errors |= {("SET", key): FORBIDDEN[0] for key in (b"a", b"b")}
    server.errors["SET", b"c"] = OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    to = start(server)
    writes = [write(key) for key in "abc"]
    (group,) = join(to, *writes)
    while to.away_since is None:
        threading.Event().wait(0.001)
    server.errors.clear()
    group.done.result(SOON)
    assert server.values == {one.key: one.value for one in writes}


def test_a_state_that_is_tried_again_does_not_replace_a_later_one_if_there_are_no_scripts() -> None:
    class Full(Server):
        def _run(self, name: str, key: Any, *rest: Any) -> Any:
            if name == "SET" and not self.values:
                self.values[b"other"] = b""
                return OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
            return super()._run(name, key, *rest)

    server = Full()
    to = start(server)
    to._runs_scripts = False
    store(to, write("a", "RETRY"), last := write("a", "FAILURE"))
    assert server.values[b"a"] == last.value


def test_a_server_that_was_started_anew_is_told_the_script_again() -> None:
    server = Server()
    to = start(server)
    store(to, write("a", "STARTED"))
    server.scripts.clear()
    last = write("a", "FAILURE")
    store(to, last)
    assert server.values == {b"a": last.value}


@pytest.mark.parametrize("refused", ["EVALSHA", "SCRIPT LOAD"])
def test_a_user_who_may_run_no_script_stores_without_it(refused: str, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    key = SHA1 if refused == "EVALSHA" else STORE
    server.errors[refused, key] = NoPermissionError("this user has no permissions")
    to = start(server)
    first, second = write("a", "FAILURE"), write("b", "FAILURE")
    store(to, first)
    trips = server.round_trips
    store(to, second)
    assert server.values == {b"a": first.value, b"b": second.value}
    assert server.round_trips == trips + 2
    assert caplog.text.count("runs no script") == 1


def test_a_server_whose_reads_are_old_is_not_asked_for_ever() -> None:
    server = Server()
    server.between = [write("a", "STARTED", note=str(number)).value for number in range(2 * MOST_LOOKS)]
    last = write("a", "FAILURE")
    store(start(server), last)
    assert server.values == {b"a": last.value}


def test_a_state_that_was_stored_before_the_connection_broke_is_told() -> None:
    """The commands of a large group are cut in their middle. Celery's serializer makes text."""
    server, text = Server(), json.dumps({"status": "SUCCESS"})
    server.values[b"a"] = text.encode()
    store(start(server), Write(key=b"a", value=text, is_success=True))
    assert server.published == [b"a"]


def test_what_is_not_readable_is_not_overwritten() -> None:
    server = Server()
    server.values[b"a"] = b"{"
    one, other = write("a"), write("b")
    store(start(server), one, other)
    assert isinstance(one.error, ValueError)
    assert server.values == {b"a": b"{", b"b": other.value}


@pytest.mark.parametrize("command", ["SET", "PUBLISH"])
def test_a_refused_write_does_not_harm_the_others(command: str) -> None:
    server = Server()
    server.errors[command, b"1"] = NoPermissionError("this user has no permissions")
    writes = [write(str(number)) for number in range(3)]
    store(start(server), *writes)
    assert [one.error is None for one in writes] == [True, False, True]


#: What a server says to a user who may not, or if it does not have the command.
FORBIDDEN = [NoPermissionError("this user has no permissions"), ResponseError("unknown command 'SET', with args: ")]


@pytest.mark.parametrize("error", FORBIDDEN, ids=["may not", "has not"])
@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE"])
@pytest.mark.parametrize("command", ["SET", "PUBLISH"])
def test_results_wait_while_their_user_may_store_none(
    command: str, status: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.errors |= {(command, key): error for key in (b"a", b"b", b"c")}
    to = start(server)
    writes = [write(key, status) for key in "abc"]
    groups = join(to, *writes[:2])
    while to.away_since is None:
        threading.Event().wait(0.001)
    groups += join(to, writes[2])
    trips = server.round_trips
    while server.round_trips < trips + 20:
        threading.Event().wait(0.001)
    assert not any(group.done.done() for group in groups)
    server.errors.clear()
    for group in groups:
        group.done.result(SOON)
    assert server.values == {one.key: one.value for one in writes}
    assert {b"a", b"b", b"c"} <= set(server.published)
    assert to.away_since is None
    assert caplog.text.count("takes no results, for") == 1
    assert "runs no script" not in caplog.text


def test_results_wait_while_their_user_may_not_look() -> None:
    server = Server()
    server.errors |= {("MGET", None): FORBIDDEN[0], ("GET", b"a"): FORBIDDEN[0]}
    to = start(server)
    (group,) = join(to, one := write("a"))
    while to.away_since is None:
        threading.Event().wait(0.001)
    server.errors.clear()
    group.done.result(SOON)
    assert server.values == {b"a": one.value}


def test_a_lone_result_is_refused_for_its_own_sake_once_another_one_is_stored() -> None:
    server = Server()
    server.errors["SET", b"a"] = FORBIDDEN[0]
    to = start(server)
    (first,) = join(to, one := write("a"))
    while to.away_since is None:
        threading.Event().wait(0.001)
    assert one.error is None
    store(to, other := write("b"))
    first.done.result(SOON)
    assert one.error is FORBIDDEN[0]
    assert other.error is None
    assert to.away_since is None


def test_a_refused_rider_leaves_the_result_and_the_other_riders_alone() -> None:
    server = Server()
    server.errors["RPUSH", "bad"] = ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
    good, bad = Rider([("RPUSH", "good", b"x")]), Rider([("RPUSH", "bad", b"x")])
    one = write("a", riders=[bad, good])
    store(start(server), one)
    assert one.is_stored
    assert (good.is_done, bad.is_done) == (True, False)
    assert server.lists == {"good": [b"x"]}


def test_what_the_server_can_not_take_now_it_is_given_again_and_nothing_else() -> None:
    server = Server()
    server.errors["RPUSH", "full"] = OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    late = Rider([("RPUSH", "queue", b"x"), ("RPUSH", "full", b"y")])
    to = start(server)
    (group,) = join(to, write("a", riders=[late]), write("b"))
    while to.away_since is None:
        threading.Event().wait(0.001)
    assert not group.done.done()
    del server.errors["RPUSH", "full"]
    group.done.result(SOON)
    assert server.lists == {"queue": [b"x"], "full": [b"y"]}
    assert server.published == [b"a", b"b"]
    assert to.away_since is None


def test_all_wait_for_a_server_that_comes_back() -> None:
    server = Server()
    server.is_there = False
    to = start(server)
    (group,) = join(to, write("a"), write("b"))
    while to.away_since is None:
        threading.Event().wait(0.001)
    server.is_there = True
    group.done.result(SOON)
    assert set(server.values) == {b"a", b"b"}


def test_a_result_waits_for_a_server_that_is_away_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    server = Server()
    server.is_there = False

    def wait(self: Writer, error: Exception, seconds: float) -> None:
        pauses.append(seconds)
        server.is_there = len(pauses) > 2000

    monkeypatch.setattr(Writer, "_wait", wait)
    late = write("late")
    groups = join(start(server), late)
    groups[0].done.result(SOON)
    assert late.is_stored
    assert late.error is None
    assert pauses[0] == writer.FIRST_RETRY
    assert set(pauses[10:]) == {writer.LAST_RETRY}


def test_the_log_says_again_that_a_server_takes_no_results(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "SAID_SECONDS", 0.02)
    server = Server()
    server.is_there = False
    (group,) = join(start(server), write("a"))
    deadline = time.monotonic() + SOON
    while caplog.text.count("takes no results, for") < 3 and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    server.is_there = True
    group.done.result(SOON)
    assert caplog.text.count("nobody there") >= 3


def test_a_write_over_which_the_server_breaks_the_connection_fails_alone() -> None:
    server = Server()
    server.breaks_over = {b"huge"}
    writes = [write("a"), write("huge"), write("b")]
    store(start(server), *writes)
    assert set(server.values) == {b"a", b"b"}
    assert [one.error is None for one in writes] == [True, False, True]


@pytest.mark.parametrize("error", [RedisConnectionError("Connection closed by server."), BusyLoadingError("loading")])
def test_a_lone_write_waits_for_a_server_that_comes_back_at_any_moment(error: Exception) -> None:
    """Between a try and the look whether the server answers, too: the server comes back then, and goes again."""
    server = Server()
    server.errors["MGET", None] = error
    pings = itertools.count()
    server.ping = lambda: next(pings) % 4 == 3 or bool(server.fail())  # type: ignore[method-assign]
    (group,) = join(start(server), one := write("a"))
    while next(pings) < 10 * writer.MOST_BREAKS and server.round_trips < 10 * writer.MOST_BREAKS:
        threading.Event().wait(0.001)
    server.errors.clear()
    group.done.result(SOON)
    assert one.error is None
    assert server.values == {b"a": one.value}


def test_results_wait_for_a_server_that_breaks_its_connections_and_whose_user_may_not_ping() -> None:
    server = Server()
    server.errors["MGET", None] = RedisConnectionError("Connection closed by server.")

    def ping() -> bool:
        server.errors.clear()
        raise FORBIDDEN[0]

    server.ping = ping  # type: ignore[method-assign]
    store(start(server), one := write("a"))
    assert one.error is None
    assert server.values == {b"a": one.value}


def test_results_wait_for_a_server_that_answers_and_takes_nothing_yet() -> None:
    """However often it says so: it breaks no connection."""
    server = Server()
    server.errors["MGET", None] = ResponseError("BUSY Redis is busy running a script.")
    to = start(server)
    (group,) = join(to, write("a"))
    while server.round_trips < 3 * writer.MOST_BREAKS:
        threading.Event().wait(0.001)
    assert not group.done.done()
    server.errors.clear()
    group.done.result(SOON)
    assert set(server.values) == {b"a"}
    assert to.away_since is None


def test_a_state_that_is_refused_and_that_nobody_waits_for_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.errors["SET", b"a"] = ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
    to = start(server)
    to.store(write("a", "RETRY"), waits=False)
    store(to, write("b"))
    assert "refuses the state of b'a'" in caplog.text


def test_a_user_who_may_not_read_many_keys_at_once_reads_them_one_by_one() -> None:
    server = Server()
    server.errors["MGET", None] = NoPermissionError("this user has no permissions to run the 'mget' command")
    server.values[b"a"] = write("a").value
    one, other = write("a", "FAILURE"), write("b")
    store(start(server), one, other)
    assert server.values == {b"a": write("a").value, b"b": other.value}


def test_a_read_gives_the_value() -> None:
    server = Server()
    server.values[b"a"] = b"value"
    found, missing = Write(key=b"a", is_read=True), Write(key=b"b", is_read=True)
    store(start(server), found, missing)
    assert (found.value, missing.value) == (b"value", None)
    assert server.published == []


@pytest.mark.parametrize(
    ("error", "later"),
    [
        (OSError("no route"), True),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), True),
        (ResponseError("CLUSTERDOWN The cluster is down"), True),
        (ResponseError("UNBLOCKED force unblock from blocking operation"), True),
        (ResponseError("WRONGTYPE Operation against a key"), False),
        (NoPermissionError("this user has no permissions"), False),
        (True, False),
    ],
)
def test_some_errors_mean_that_the_server_may_take_it_later(error: object, later: bool) -> None:
    assert is_away(error) is later
