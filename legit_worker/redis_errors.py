"""What an error of a Redis server says.

In: an error of redis-py, which has classes for some codes and then takes the code off the text. Out: the code at its
start, and whether this user may not run the command.
"""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

#: A server refuses every write with these codes while it is full, is a replica or becomes one, can't save, loads its
#: data, runs a long script, or while its cluster or a promotion is under way.
TAKES_NOTHING = frozenset(
    ("OOM", "READONLY", "MISCONF", "LOADING", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN", "UNBLOCKED")
)

#: A server refuses a write to one key with these codes while a cluster moves it.
NOT_THIS_KEY = frozenset(("MOVED", "ASK", "TRYAGAIN"))

#: Parts of a server's answer, in lower case, to a command that it does not have or that this user may not run. Redis
#: raises no `NoPermissionError` inside a script.
FORBIDDEN = ("unknown command", "unknown subcommand", "can't run this command", "acl failure in script")

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


def is_forbidden(error: object) -> bool:
    """Tell whether a server does not have a command, or does not let this user run it, or not on this key."""
    if not isinstance(error, ResponseError):
        return False
    return isinstance(error, NoPermissionError) or any(part in str(error).lower() for part in FORBIDDEN)
