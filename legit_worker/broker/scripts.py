"""Scripts that run on the Redis server.

In: a script's text. Out: its answer, from a server that may have to be told the text first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from redis import Redis
from redis.exceptions import NoScriptError


@dataclass(frozen=True)
class Script:
    """One script. It runs by its checksum, so that a user needs no more rights than kombu's scripts need."""

    text: str

    @cached_property
    def sha1(self) -> str:
        """The name by which the server knows the script."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: Redis, keys: Sequence[str], *arguments: Any) -> Any:
        """Run the script once."""
        try:
            return client.evalsha(self.sha1, len(keys), *keys, *arguments)
        except NoScriptError:
            client.script_load(self.text)
            return client.evalsha(self.sha1, len(keys), *keys, *arguments)

    def run_each(self, client: Redis, calls: Iterable[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        """Run the script with the keys and arguments of each call, in one round trip."""
        calls = list(calls)
        pipe = client.pipeline(transaction=False)
        for attempt in (1, 2):
            for keys, arguments in calls:
                pipe.evalsha(self.sha1, len(keys), *keys, *arguments)
            try:
                answers: list[Any] = pipe.execute()
            except NoScriptError:  # none of the calls has run
                if attempt == 2:
                    raise
                client.script_load(self.text)
            else:
                break
        return answers
