"""What an error of Redis says: that the server is away, that a key takes nothing now, or that the command is refused.

In: an error of redis-py. Out: the error as the lanes take it.
"""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from legit_worker.routing.delivery import AwayError, NotNowError

#: Redis refuses every write with these codes while it is full, is a replica, can't save, loads its data, runs a long
#: script, or its cluster or a promotion is under way.
TAKES_NOTHING = frozenset(
    ("OOM", "READONLY", "MISCONF", "LOADING", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN", "UNBLOCKED")
)

#: Redis refuses a write to one key with these codes while a cluster moves it.
NOT_THIS_KEY = frozenset(("MOVED", "ASK", "TRYAGAIN"))

#: What redis-py and Redis put before the code of the error that they report.
_BEFORE_CODE = re.compile(r".*(?:caused error|because of): ", re.DOTALL)

#: The codes of errors that redis-py takes away from their text.
_CODES = {
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
    BusyLoadingError: "LOADING",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    AskError: "MOVED",
    TryAgainError: "TRYAGAIN",
}


def judged(error: Exception) -> Exception:
    """Return what a Redis error says of its delivery: `NotNowError`, or the error. Raises `AwayError`."""
    code = _code(error)
    if code in TAKES_NOTHING or isinstance(error, RedisConnectionError):
        raise AwayError(f"{type(error).__name__}: {error}") from error
    return NotNowError(f"{type(error).__name__}: {error}") if code in NOT_THIS_KEY else error


def _code(error: Exception) -> str:
    known = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    return known or _BEFORE_CODE.sub("", str(error)).partition(" ")[0].rstrip(":")
