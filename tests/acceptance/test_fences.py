"""`APPS__<APP>__MODELS` and `NO_APP_MODELS`: which app may use which model, under every pool and in every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import CUSTOM, SIMULATED, StartWorker, Worker

from legit_worker.errors import UnknownModelError

FENCED = {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_APPS__SHOP__MODELS": "upper"}


def ask(worker: Worker, task: str, *args: Any, app: str | None) -> Any:
    return worker.answer(worker.client.send_task(task, args, headers={} if app is None else {"app": app}))


@pytest.mark.parametrize("pool", ["solo", "prefork", "threads"])
def test_an_app_keeps_to_its_models_under_every_pool(start_worker: StartWorker, pool: str) -> None:
    environment = SIMULATED | CUSTOM | FENCED | {"LEGIT_WORKER_NO_APP_MODELS": "other"}
    worker = start_worker("project", "--concurrency=1", pool=f"--pool={pool}", environment=environment)
    assert ask(worker, "one", "text", "upper", app="shop") == "TEXT"
    with pytest.raises(UnknownModelError, match=r"'shop'.*'sim', only upper: see LEGIT_WORKER_APPS__SHOP__MODELS"):
        ask(worker, "one", "text", "sim", app="shop")
    for nobody in (None, "elsewhere"):
        assert ask(worker, "one", "text", "other", app=nobody)
        with pytest.raises(UnknownModelError, match=r"names no app.*'upper', only other: see LEGIT_WORKER_NO_APP_MOD"):
            ask(worker, "one", "text", "upper", app=nobody)


def test_a_thread_of_a_tasks_own_names_no_app(start_worker: StartWorker) -> None:
    environment = SIMULATED | CUSTOM | FENCED | {"LEGIT_WORKER_NO_APP_MODELS": "none"}
    worker = start_worker("project", environment=environment)
    with pytest.raises(UnknownModelError, match=r"names no app.*'sim', nor any other"):
        ask(worker, "in_threads", ["a", "b"], app="shop")


def test_prep_tasks_keep_to_them_too(start_worker: StartWorker, tiny_paths: dict[str, Path]) -> None:
    variables = {f"LEGIT_WORKER_MODELS__{alias}__PATH": str(tiny_paths["embed"]) for alias in ("UPPER", "BERT")}
    environment = FENCED | variables | {"LEGIT_WORKER_ROLE": "prep"}
    worker = start_worker("prep", "--concurrency=1", pool=None, environment=environment)
    assert ask(worker, "legit_worker.prep_text", "a text", "upper", app="shop")["ids"]
    with pytest.raises(UnknownModelError, match="'shop' may not use model 'bert'"):
        ask(worker, "legit_worker.prep_text", "a text", "bert", app="shop")
    assert ask(worker, "legit_worker.prep_text", "a text", "bert", app=None)["ids"]
