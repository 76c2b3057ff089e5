"""`celery legit queues`: which queue to send a task to, so that a worker with its model gets it."""

from __future__ import annotations

import json
from typing import Any

import click
from celery.bin.base import handle_preload_options
from rich.console import Console

from legit_worker.cli import legit
from legit_worker.cli.base import Command, as_json_option, new_table, reach, safe, taken_queues, timeout_option


@legit.command(cls=Command)
@timeout_option
@as_json_option
@click.pass_context
@handle_preload_options
def queues(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Show each model's queue, which workers have the model by the settings, and who takes tasks from it now."""
    reach(ctx.obj.app)
    takes = taken_queues(ctx.obj.app, timeout)
    models, workers = _chosen(takes, ctx.obj.app.conf.task_default_queue)
    if as_json:
        click.echo(json.dumps({"models": models, "workers": workers, "running": takes}))
        return
    _print("model", ("queue", "workers", "running") if workers else ("queue", "running"), models)
    if workers:
        click.echo()
        _print("worker", ("device", "models"), workers)
    if takes:
        click.echo()
        _print("running", ("queues",), {worker: {"queues": names} for worker, names in takes.items()})
    else:
        click.echo(f"no worker answered within {timeout} s: `running` is unknown", err=True)


def _chosen(takes: dict[str, list[str]], default: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the settings say of each model and of each worker.

    If they name no workers, `routes.by_model` leaves tasks in the default queue, and so does this.
    """
    from legit_worker import settings

    chosen = settings.load(enabled_by_default=True, is_whole=True)
    workers = {
        node: {"device": own.device or chosen.device, "models": settings.models_of(chosen, node)}
        for node, own in chosen.workers.items()
    }
    models = {}
    for alias in chosen.models:
        queue = settings.queue_of(chosen, alias) if workers else default
        having = [node for node, own in workers.items() if alias in own["models"]]
        running = [worker for worker, names in takes.items() if queue in names]
        models[alias] = {"queue": queue, "workers": having, "running": running}
    return models, workers


def _print(first: str, columns: tuple[str, ...], rows: dict[str, Any]) -> None:
    table = new_table(first, *columns)
    for name, row in rows.items():
        values = (row[column] for column in columns)
        table.add_row(
            safe(name), *(safe(", ".join(value) or "nobody" if isinstance(value, list) else value) for value in values)
        )
    Console().print(table)
