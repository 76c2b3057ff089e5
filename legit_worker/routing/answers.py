"""What an error of Redis means for a delivery: the server is away, a key takes nothing now, or the command is refused.

In: an error of redis-py. Out: the error as the lanes take it.
"""

from __future__ import annotations

from redis.exceptions import ConnectionError as RedisConnectionError

from legit_worker.redis_errors import NOT_THIS_KEY, TAKES_NOTHING, code_of
from legit_worker.routing.delivery import AwayError, NotNowError


def judged(error: Exception) -> Exception:
    """Return what a Redis error says of its delivery: `NotNowError`, or the error. Raises `AwayError`."""
    code = code_of(error)
    if code in TAKES_NOTHING or isinstance(error, RedisConnectionError):
        raise AwayError(f"{type(error).__name__}: {error}") from error
    return NotNowError(f"{type(error).__name__}: {error}") if code in NOT_THIS_KEY else error
