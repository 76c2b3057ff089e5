"""What an error of a Redis server says: the code at its start.

In: an error of redis-py, which has classes for some codes and then takes the code off the text. Out: the code.
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

#: A server refuses every write with these codes while it is full, is a replica or becomes one, can't save, loads its
#: data, runs a long script, or while its cluster or a promotion is under way.
TAKES_NOTHING = frozenset(
    ("OOM", "READONLY", "MISCONF", "LOADING", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN", "UNBLOCKED")
)

#: A server refuses a write to one key with these codes while a cluster moves it.
NOT_THIS_KEY = frozenset(("MOVED", "ASK", "TRYAGAIN"))

#: What redis-py and Redis put before the code of the error that they report.
_BEFORE_CODE = re.compile(r".*(?:caused error|because of): ", re.DOTALL)

_CODES = {
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
    BusyLoadingError: "LOADING",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    AskError: "MOVED",
    TryAgainError: "TRYAGAIN",
}


def code_of(error: Exception) -> str:
    """Return the code of a server's error; for other errors, the first word."""
    known = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    return known or _BEFORE_CODE.sub("", str(error)).partition(" ")[0].rstrip(":")
