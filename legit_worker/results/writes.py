"""What a Redis server must be told of tasks' ends, and what its answers mean.

In: writes, a group at a time. Out: for each write, that it is stored, or the server's error; and the writes that the
server could not take now.

Sources: celery.backends.base.BaseKeyValueStoreBackend._store_result and celery.backends.redis.RedisBackend._set
(5.5 to 5.7), whose commands these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from legit_worker.redis_errors import NOT_THIS_KEY, TAKES_NOTHING, code_of, is_forbidden
from legit_worker.results.conditional import MOST_LOOKS, SHA1, STORE, digest

#: One command, as redis-py's `execute_command` takes it.
Command = tuple[Any, ...]

#: Errors that tell that the server does not answer.
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)

#: Looks at the stored bytes of a task: tells whether its state is SUCCESS.
IsSuccess = Callable[[Any], bool]


def is_away(error: object) -> bool:
    """Tell whether an error means that the server may take the same command later."""
    if isinstance(error, ResponseError):
        return code_of(error) in TAKES_NOTHING | NOT_THIS_KEY
    return isinstance(error, AWAY)


@dataclass(eq=False)
class Rider:
    """Commands that go to the server together with a result."""

    #: Those that the server has not taken yet.
    commands: list[Command]
    #: Whether the server refuses one of them, so that they must go another way.
    is_refused: bool = False

    @property
    def is_done(self) -> bool:
        """Whether the server has taken all."""
        return not self.commands and not self.is_refused

    @property
    def is_open(self) -> bool:
        """Whether the server must be asked again."""
        return bool(self.commands) and not self.is_refused

    def learn(self, replies: Sequence[Any]) -> None:
        """Take the server's replies to `commands`, in their order."""
        self.is_refused = any(isinstance(reply, Exception) and not is_away(reply) for reply in replies)
        self.commands = [
            command for command, reply in zip(self.commands, replies, strict=True) if isinstance(reply, Exception)
        ]


@dataclass(eq=False)
class Write:
    """One task's state on its way to the server."""

    key: bytes
    value: bytes | str | None = None
    is_success: bool = False
    #: Seconds until the server forgets the key. None or 0: it keeps the key.
    expires: int | None = None
    riders: Sequence[Rider] = ()
    #: Whether the server is only asked for the value of the key.
    is_read: bool = False
    #: Whether a task waits for it, and hears why the server refuses it.
    is_waited_for: bool = True
    #: Why the server refuses it.
    error: Exception | None = None
    #: Whether the key has this value, or keeps the SUCCESS that it had.
    is_stored: bool = False
    #: What the key must still have, by `digest`. None: whatever it has.
    found: str | None = None
    #: How often the key had another value by the time the server ran the command.
    misses: int = 0
    #: Whether the server must be told the script.
    brings_script: bool = False
    #: Why the server does not run the script, so that the write goes without it.
    refusal: Exception | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server must be asked again."""
        if self.error is not None:
            return False
        return not self.is_stored or any(rider.is_open for rider in self.riders)

    def commands(self) -> list[Command]:
        """Return what the server has not taken yet."""
        if self.error is not None:
            return []
        left = [command for rider in self.riders if rider.is_open for command in rider.commands]
        return left if self.is_stored else [*self._own_commands(), *left]

    def _own_commands(self) -> list[Command]:
        """Store the state, and tell of it."""
        if self.found is not None:
            run = ("EVALSHA", SHA1, 1, self.key, self.found, self.expires or "", self.value)
            return [("SCRIPT LOAD", STORE), run] if self.brings_script else [run]
        store = ("SETEX", self.key, self.expires, self.value) if self.expires else ("SET", self.key, self.value)
        return [store, ("PUBLISH", self.key, self.value)]

    def learn(self, replies: list[Any]) -> None:
        """Take the server's replies to `commands`, in their order."""
        if self.error is not None:
            return
        if not self.is_stored:
            count = len(self._own_commands())
            own, replies = replies[:count], replies[count:]
            if self.found is not None:
                self._learn_of_script(own[-1])
            else:
                errors = [reply for reply in own if isinstance(reply, Exception)]
                self.error = next((error for error in errors if not is_away(error)), None)
                self.is_stored = not errors
        for rider in self.riders:
            if rider.is_open:
                count = len(rider.commands)
                rider.learn(replies[:count])
                replies = replies[count:]

    def _learn_of_script(self, reply: Any) -> None:
        if isinstance(reply, NoScriptError) and not self.brings_script:
            self.brings_script = True
        elif isinstance(reply, Exception):  # the command that goes in its place tells what else is wrong
            self.refusal = None if is_away(reply) else reply
        else:
            self.is_stored = bool(reply)
            self.misses += not self.is_stored


def send(client: Any, writes: Sequence[Write]) -> Exception | None:
    """Give the server all commands of these writes, and note its answers in them.

    Returns an error if the server could not take some of them now. Raises what a broken connection raises.
    """
    commands = [write.commands() for write in writes]
    with client.pipeline(transaction=False) as pipeline:
        for command in (command for own in commands for command in own):
            pipeline.execute_command(*command)
        replies = pipeline.execute(raise_on_error=False)
    start = 0
    for write, own in zip(writes, commands, strict=True):
        write.learn(replies[start : start + len(own)])
        start += len(own)
    _leave_out_earlier(writes)
    return next((reply for reply in replies if is_away(reply)), None)


def _leave_out_earlier(writes: Sequence[Write]) -> None:
    """Have no state tried again if a later one of its task is stored: without the script, it would replace that."""
    stored = set()
    for write in reversed(writes):
        if write.is_stored and not write.is_read:
            stored.add(write.key)
        elif write.error is None and not write.is_read:
            write.is_stored = write.key in stored


def withdraw_refusals(writes: Sequence[Write]) -> Exception | None:
    """Return why this user may store none of these writes, and have them tried again. None if it may store one.

    An operator gives rights to all results, as a rule. If another write was stored, a refusal is for its own key.
    """
    refused = [write for write in writes if is_forbidden(write.error)]
    if not refused or any(write.is_stored for write in writes):
        return None
    error = refused[0].error
    for write in refused:
        write.error = None
    for write in writes:  # a script was refused for the same reason
        write.refusal = None
    return error


def check(client: Any, writes: Sequence[Write], is_success: IsSuccess, *, runs_scripts: bool) -> None:
    """Keep each SUCCESS that is stored already, also by a write of the same group, or stored meanwhile."""
    stored = _read(client, [write.key for write in writes])
    succeeded = set()
    former: dict[bytes, Write] = {}
    for write, value in zip(writes, stored, strict=True):
        try:
            if isinstance(value, Exception):
                raise value
            if write.is_read:
                write.value, write.is_stored = value, True
                continue
            # The last try may have stored this one, and not told of it. The server has bytes, and Celery gives text.
            is_another = bool(value) and digest(value) != digest(write.value)
            write.is_stored = write.key in succeeded or (is_another and is_success(value))
            if not write.is_stored:
                is_free = write.is_success or write.refusal is not None or write.misses >= MOST_LOOKS
                before = former[write.key].value if write.key in former else value
                write.found = digest(before) if runs_scripts and not is_free else None
                former[write.key] = write
        except Exception as error:  # as for Celery, what can't be read must not be overwritten
            write.error = error
        if write.is_success:
            succeeded.add(write.key)


def _read(client: Any, keys: list[bytes]) -> list[Any]:
    """Return the value of each key, or the error that the server gives for it. Raises it if this user may read none."""
    if not keys:
        return []
    try:
        return list(client.mget(keys))
    except ResponseError as error:
        if is_away(error):
            raise
    with client.pipeline(transaction=False) as pipeline:  # this user may run GET, and not MGET
        for key in keys:
            pipeline.get(key)
        values = list(pipeline.execute(raise_on_error=False))
    if all(map(is_forbidden, values)):
        raise values[0]
    return values
