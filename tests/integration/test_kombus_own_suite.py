"""kombu's own integration suite for Redis, run through this project's transport.

The suite comes from kombu's sdist, of the release that is installed, and runs in a temporary folder. Its tests sleep
most of the time, so several run at once, each process on a server of its own. Two of its tests watch for `BRPOP`
itself, which is not what a reserving channel waits with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import kombu
import pytest
from needs import missing
from ownserver import Server

#: Seconds for the whole suite. Its tests need 130 one after the other.
SUITE_SECONDS = 900

#: How many of its tests run at once.
AT_ONCE = 5

#: These hold a pending `BRPOP` against the prefetch count. Here the script has answered by then, and a bell waits.
EXCEPTIONS = (
    "t/integration/test_redis_brpop_qos.py::test_hub_pauses_pending_brpop_until_ack[message]",
    "t/integration/test_redis_brpop_qos.py::test_drain_events_resumes_pending_brpop_without_resending",
)

#: Has every connection of the suite reserve, and each process use its own server, before its modules are imported.
CONFTEST = """
import os
import kombu, kombu.connection
from legit_worker.broker.redis import ReservingConnection
kombu.Connection = kombu.connection.Connection = ReservingConnection
if "PYTEST_XDIST_WORKER" in os.environ:
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ["REDIS_6379_TCP"] = os.environ["SERVERS"].split()[number]
"""

#: Of kombu's setup.cfg.
INI = """
[pytest]
python_classes = test_*
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The folder of the unpacked sdist's tests."""
    asked = ["--no-deps", "--no-binary", ":all:", "--dest", str(tmp_path), f"kombu=={kombu.__version__}"]
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", *asked], capture_output=True, text=True, check=False
    )
    if fetched.returncode:
        missing(f"kombu's sdist can't be had: {fetched.stderr[-500:]}")
    (archive,) = tmp_path.glob("kombu-*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.glob("kombu-*") if path.is_dir())
    # Beside the installed kombu, not in front of it.
    (folder / "t").rename(tmp_path / "t")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text(INI)
    return tmp_path


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[list[int]]:
    """Where the servers are."""
    servers = [Server(tmp_path / f"server{number}") for number in range(AT_ONCE)]
    try:
        for server in servers:
            server.start()
        yield [server.port for server in servers]
    finally:
        for server in servers:
            server.end()


def test_kombus_own_tests_pass_through_this_transport(suite: Path, ports: list[int]) -> None:
    # Not those of the run that this test is part of.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = [str(path.relative_to(suite)) for path in sorted(suite.glob("t/integration/test_redis*.py"))]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-n", str(AT_ONCE)),
            *(f"--deselect={name}" for name in EXCEPTIONS),
            *files,
        ],
        cwd=suite,
        env=kept | {"REDIS_HOST": "127.0.0.1", "SERVERS": " ".join(map(str, ports))},
        capture_output=True,
        text=True,
        timeout=SUITE_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-5000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    # Celery's older releases come with an older kombu, whose suite is smaller.
    assert passed
    assert int(passed[1]) > 20
