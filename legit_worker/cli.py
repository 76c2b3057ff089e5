"""`celery legit …`: what an operator asks a worker.

In: `celery -A PROJECT`, whose broker the answers come by. Out: tables for people, or JSON with `--json`.
"""

from __future__ import annotations

import json
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options
from rich.console import Console
from rich.table import Table


@click.group(name="legit", help="Look into legit_worker's workers.")
def legit() -> None:
    """The group that Celery finds by the entry point `celery.commands`."""


@legit.command(cls=CeleryCommand)
@click.option("--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for workers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Show each worker's window, batches and models. Exit code 1 where no ModelPool answers."""
    replies = ctx.obj.app.control.inspect(timeout=timeout).stats() or {}
    pools = {name: stats["pool"] for name, stats in replies.items() if "window" in stats.get("pool", {})}
    if as_json:
        click.echo(json.dumps(pools))
    else:
        for name, pool in pools.items():
            _print(name, pool)
    if not pools:
        others = f"; {len(replies)} workers with other pools did" if replies else ""
        click.echo(f"no worker with ModelPool answered within {timeout} s{others}", err=True)
        ctx.exit(1)


def _print(name: str, pool: dict[str, Any]) -> None:
    table = Table(title=f"{name}: {pool['in_flight']} of {pool['window']} tasks in flight, {pool['parked']} parked")
    for heading in ("model", "kind", "state", "batches", "items", "items/batch", "padding", "seconds"):
        table.add_column(heading, justify="left" if heading in ("model", "kind", "state") else "right")
    for alias, model in pool["models"].items():
        table.add_row(
            alias,
            model["kind"],
            model["state"],
            *(str(model.get(key, "")) for key in ("batches", "items", "mean_batch")),
            f"{model['waste']:.1%}" if "waste" in model else "",
            str(model.get("forward_seconds", "")),
        )
    Console().print(table)
