"""What an error of Redis says of a delivery, as redis-py gives it on its own, in a pipeline, and from EXEC."""

from __future__ import annotations

from typing import Any

import pytest
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError

from legit_worker.results.writes import is_away
from legit_worker.routing.delivery import AwayError, NotNowError
from legit_worker.routing.wires import judged

AWAY = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "MISCONF Errors writing to the AOF file: No space left on device",
    "LOADING Redis is loading the dataset in memory",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "NOREPLICAS Not enough good replicas to write.",
    "CLUSTERDOWN The cluster is down",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
]

NOT_NOW = ["MOVED 3999 127.0.0.1:6381", "ASK 3999 127.0.0.1:6381", "TRYAGAIN Multiple keys request during rehashing"]

REFUSED = [
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "NOPERM this user has no permissions to access one of the keys used as arguments",
    "BUSYKEY Target key name already exists.",
    "ERR something about OOM, READONLY and MISCONF",
]


def parsed(answer: str, form: str) -> Any:
    """The error as redis-py raises it."""
    if form == "exec":
        answer = f"EXECABORT Transaction discarded because of: {answer}"
    error = BaseParser.parse_error(answer)
    if form == "pipeline":
        shown = "RPUSH key caused error: OOM because of: MISCONF"
        error.args = (f"Command # 1 ({shown}) of pipeline caused error: {error.args[0]}", *error.args[1:])
    return error


FORMS = ["alone", "pipeline", "exec"]


@pytest.mark.parametrize("answer", AWAY)
@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_takes_no_writes_is_away(answer: str, form: str) -> None:
    with pytest.raises(AwayError):
        judged(parsed(answer, form))


@pytest.mark.parametrize("answer", [*AWAY, *NOT_NOW, *REFUSED])
@pytest.mark.parametrize("form", ["alone", "pipeline"])
def test_a_result_waits_for_a_server_that_may_take_it_later(answer: str, form: str) -> None:
    assert is_away(parsed(answer, form)) is (answer not in REFUSED)


@pytest.mark.parametrize("answer", NOT_NOW)
@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_a_cluster_moves_takes_nothing_now(answer: str, form: str) -> None:
    assert isinstance(judged(parsed(answer, form)), NotNowError)


@pytest.mark.parametrize("answer", REFUSED)
@pytest.mark.parametrize("form", FORMS)
def test_anything_else_is_refused(answer: str, form: str) -> None:
    error = parsed(answer, form)
    assert judged(error) is error


@pytest.mark.parametrize(
    "error", [RedisConnectionError("Connection closed by server."), parsed("NOAUTH Authentication required.", "alone")]
)
def test_a_lost_connection_is_away_whatever_else_it_is(error: Exception) -> None:
    with pytest.raises(AwayError):
        judged(error)
