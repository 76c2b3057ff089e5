"""Sends Celery tasks from asyncio, and awaits their results: thousands at once, with one connection and no threads.

In: a task's name and arguments. Out: its result, or its error. When a result is stored in Redis, it is also published,
on a channel that has the task's id in its name. The ids of this process begin with something of its own, so that one
subscription brings the results of its own tasks, and no others.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from celery import Celery
from celery.states import READY_STATES, SUCCESS
from redis.asyncio import Redis
from redis.exceptions import RedisError

#: What Celery puts before a task's id, for the key of its result and for the channel.
PREFIX = "celery-task-meta-"

#: Seconds between two looks for results that were missed while the connection was down, and until it is tried again.
PAUSE_SECONDS = 2

logger = logging.getLogger(__name__)


class TaskFailedError(Exception):
    """A task has failed. `type` is the name of its error's class."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


class Results:
    """Lives in one event loop, and owns the futures of the tasks whose results are awaited."""

    def __init__(self, broker: str, backend: str) -> None:
        self._celery = Celery(broker=broker)
        # Celery's own backend would subscribe to each result, on a connection that nobody reads here.
        self._celery.backend_cls = "disabled"
        self._redis = Redis.from_url(backend)
        self._own = f"{uuid.uuid4()}."
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def run(self, task: str, /, *args: Any, **kwargs: Any) -> Any:
        """Send a task, and return its result. Raises `TaskFailedError`. `asyncio.wait_for` sets a time limit."""
        task_id = f"{self._own}{next(self._numbers)}"
        future = self._waiting[task_id] = asyncio.get_running_loop().create_future()
        try:
            # Sending takes a thread for less than a millisecond, or for longer if the broker is away.
            await asyncio.to_thread(self._celery.send_task, task, args, kwargs, task_id=task_id)
            return opened(await future)
        finally:
            del self._waiting[task_id]

    async def listen(self) -> None:
        """Take results as they come, until cancelled."""
        await asyncio.gather(self._repeat(self._hear), self._repeat(self._look))

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._attempt(step)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _attempt(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except RedisError as error:
            logger.warning("results do not come at the moment: %s", error)

    async def _hear(self) -> None:
        """Take what is published, until the server goes away."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as channels:
            await channels.psubscribe(f"{PREFIX}{self._own}*")
            async for message in channels.listen():
                self._take(message["data"])

    async def _look(self) -> None:
        """Take what is stored."""
        keys = [PREFIX + task_id for task_id in self._waiting]
        for stored in await self._redis.mget(keys) if keys else ():
            if stored is not None:
                self._take(stored)

    def _take(self, stored: bytes) -> None:
        """A state such as STARTED is no end. An end may come twice."""
        meta = json.loads(stored)
        future = self._waiting.get(meta["task_id"])
        if future and not future.done() and meta["status"] in READY_STATES:
            future.set_result(meta)


def opened(meta: dict[str, Any]) -> Any:
    """The result, or its error raised."""
    if meta["status"] == SUCCESS:
        return meta["result"]
    error = meta["result"]
    raise TaskFailedError(error["exc_type"], " ".join(map(str, error["exc_message"])))
