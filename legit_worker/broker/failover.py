"""Servers that answer, and can't be used: another took their place, or they refuse to write.

Celery connects anew after the errors that a transport names. Any other answer of a server ends the worker. Here those
answers become errors of the connection, so the worker waits for the server, or finds the one that took its place.

In: answers of Redis, channels that RabbitMQ closes. Out: errors after which Celery connects anew.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from amqp.exceptions import PreconditionFailed, RecoverableConnectionError
from kombu.transport import pyamqp
from kombu.transport import redis as stock
from redis import exceptions

from legit_worker.broker.patience import PatientChannel, PatientTransport
from legit_worker.redis_errors import code_of

#: Codes of a Redis server that another one replaces, or that does not write now: `UNBLOCKED` ends a wait when a
#: server becomes a replica, `MASTERDOWN` comes from a replica without its master, `MISCONF` while the server can't
#: save to its disk, `OOM` while its memory is full, `BUSY` while somebody's script runs for long.
AWAY = ("READONLY", "MASTERDOWN", "OOM", "UNBLOCKED", "MISCONF", "NOREPLICAS", "BUSY")

#: Part of RabbitMQ's answer if an ack is overdue (`consumer_timeout`), or comes for a delivery that it does not know.
TIMED_OUT = ("delivery acknowledgement", "unknown delivery tag")


class FailedOverError(exceptions.ResponseError):
    """The server answers, and can't be used now.

    It is no `redis.ConnectionError`: redis-py would try a transaction again for ever, since the server answers.
    """

    __repr__ = Exception.__repr__  # redis-py's lacks what the server said

    @property
    def is_full(self) -> bool:
        """Whether the server lacks memory, and is otherwise as it was."""
        return str(self).startswith("OOM ")


class ClusterNodeError(exceptions.ResponseError):
    """The server is a node of a Redis Cluster, of which kombu knows nothing."""

    __repr__ = Exception.__repr__

    def __init__(self, error: exceptions.ResponseError) -> None:
        super().__init__(
            f"the broker's Redis is a node of a cluster ({error}), and kombu has no transport for clusters: take a "
            "Redis that is no cluster; Sentinel and several URLs give it another server if it fails"
        )


class InterruptedWriteError(RecoverableConnectionError):
    """A signal's handler has interrupted a write to this connection, and can't write to it."""


class DeliveryTimeoutError(RecoverableConnectionError):
    """RabbitMQ has closed the channel, and delivers its messages again."""


def away(error: exceptions.ResponseError) -> str:
    """Return the word by which a server says that it can't be used now, `""` if it does not.

    A script's error before Redis 7 has the word in its middle, after a minus sign.
    """
    code = code_of(error)
    return code if code in AWAY else next((word for word in AWAY if f"-{word} " in str(error)), "")


@functools.cache
def enduring(transport: Any) -> Any:
    """Return a subclass of a transport for Redis or RabbitMQ, whose connections survive. Others stay as they are."""
    if issubclass(transport, stock.Transport):
        channel = type(transport.Channel.__name__, (EnduringChannel, transport.Channel), {})
        errors = (*transport.connection_errors, FailedOverError)
        return type(transport.__name__, (transport,), {"Channel": channel, "connection_errors": errors})
    if issubclass(transport, pyamqp.Transport):
        former = transport.Connection
        channel = type(former.Channel.__name__, (PatientChannel, _EnduringAmqpChannel, former.Channel), {})
        connection = type(former.__name__, (_InterruptibleAmqpConnection, former), {"Channel": channel})
        return type(transport.__name__, (PatientTransport, transport), {"Connection": connection})
    return transport


class EnduringChannel(stock.Channel):
    """A Redis channel that refuses to open on a server which can't be written to, and closes there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            with self.conn_or_acquire() as client:
                # Changes nothing, and a server that can't write or has no memory refuses it.
                client.zadd(self.unacked_index_key, {"": 0}, xx=True)
        except FailedOverError:
            self.connection.cycle.discard(self)
            self._disconnect_pools()
            raise
        except exceptions.ResponseError:
            pass  # this user may not, or it is no Redis: what needs the command tells

    def close(self) -> None:
        """Close, also if the server lets no queue be deleted: acks would go by a channel that is half open."""
        try:
            super().close()
        except self.connection_errors:
            self.auto_delete_queues.clear()
            super().close()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = super()._connparams(asynchronous)
        params["connection_class"] = _enduring_connection(params["connection_class"])
        return params


def _enduring_connection(connection: type) -> type:
    """Return a subclass of a redis-py connection class, or of kombu's subclass for one channel."""
    return type(connection.__name__, (_EnduringConnection, connection), {})


class _EnduringConnection:
    """Mixed into a redis-py connection class."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Read an answer. Raises `FailedOverError` if the server can't be used now, `ClusterNodeError` if ever."""
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except (exceptions.AskError, exceptions.ClusterCrossSlotError) as error:
            raise ClusterNodeError(error) from error
        except exceptions.ResponseError as error:
            if word := away(error):
                raise FailedOverError(f"{word} {str(error).removeprefix(f'{word} ')}") from error
            raise


class _InterruptibleAmqpConnection:
    """Mixed into a py-amqp connection class. A signal's handler that interrupts a write waits for nothing.

    Celery's handler of `SIGQUIT` cancels the consumers. py-amqp holds a lock while it writes, and the handler runs on
    the thread that has the lock: it would wait for ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make: Any = self.frame_writer_cls  # type: ignore[has-type]
        self.frame_writer_cls = lambda *parts: _refusing_itself(make(*parts))


def _refusing_itself(write: Any) -> Any:
    """Return a writer that raises if its own thread is in the middle of a write."""
    writing: set[int] = set()

    def write_frame(*args: Any) -> Any:
        thread = threading.get_ident()
        if thread in writing:
            raise InterruptedWriteError("a signal came in the middle of a write")
        writing.add(thread)
        try:
            return write(*args)
        finally:
            writing.discard(thread)

    return write_frame


class _EnduringAmqpChannel:
    """Mixed into a py-amqp channel class. If RabbitMQ has taken its messages back, the connection is given up."""

    def _on_close(self, *args: Any) -> None:
        try:
            super()._on_close(*args)  # type: ignore[misc]
        except PreconditionFailed as error:
            if any(part in str(error) for part in TIMED_OUT):
                raise DeliveryTimeoutError(str(error)) from error
            raise
