"""kombu's own integration suite for Redis, run through this project's transport.

The suite comes from kombu's sdist, of the release that is installed, and runs in a temporary folder on a server of its
own. Two of its tests watch for `BRPOP` itself, which is not what a reserving channel waits with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import kombu
import pytest
from needs import missing
from ownserver import Server

#: Seconds for the whole suite. It needs 130.
SUITE_SECONDS = 900

#: These hold a pending `BRPOP` against the prefetch count. Here the script has answered by then, and a bell waits.
EXCEPTIONS = (
    "t/integration/test_redis_brpop_qos.py::test_hub_pauses_pending_brpop_until_ack[message]",
    "t/integration/test_redis_brpop_qos.py::test_drain_events_resumes_pending_brpop_without_resending",
)

#: Has every connection of the suite reserve, before its modules are imported.
CONFTEST = """
import kombu, kombu.connection
from legit_worker.broker.redis import ReservingConnection
kombu.Connection = kombu.connection.Connection = ReservingConnection
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


def test_kombus_own_tests_pass_through_this_transport(suite: Path, server: Server) -> None:
    address = urlsplit(server.url)
    files = [str(path.relative_to(suite)) for path in sorted(suite.glob("t/integration/test_redis*.py"))]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *(f"--deselect={name}" for name in EXCEPTIONS),
            *files,
        ],
        cwd=suite,
        env=os.environ | {"REDIS_HOST": str(address.hostname), "REDIS_6379_TCP": str(address.port)},
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
