"""`celery legit status`: what each worker does, and what its memory holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
from celery.bin.base import handle_preload_options
from rich.console import Console
from rich.table import Column
from rich.text import Text

from legit_worker.cli import legit
from legit_worker.cli.base import Command, as_json_option, mib, new_table, reach, safe, timeout_option

#: Characters of the bar that shows memory.
BAR = 40

#: What to do if nobody answers, and if only workers without ModelPool do.
NOBODY = "is one running? A longer --timeout waits for a busy one"
OTHERS = "{} with another pool did. Start a worker with LEGIT_WORKER_ENABLED=1 and --pool=solo"


@legit.command(cls=Command)
@timeout_option
@as_json_option
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Show each worker's window, batches and models. Exit code 1 if no ModelPool answers."""
    reach(ctx.obj.app)
    replies = ctx.obj.app.control.inspect(timeout=timeout).stats() or {}
    pools = {name: stats["pool"] for name, stats in replies.items() if "window" in stats.get("pool", {})}
    if as_json:
        click.echo(json.dumps(pools))
    else:
        for name, pool in pools.items():
            _print(name, pool)
    if not pools:
        seen = f"no worker with ModelPool answered within {timeout} s"
        click.echo(f"{seen}; {OTHERS.format(len(replies)) if replies else NOBODY}", err=True)
        ctx.exit(1)


#: The columns of a worker's models. Numbers are aligned on the right.
WORDS = ("model", "state")
NUMBERS = ("MiB", "loads", "batches", "items", "mean", "padding", "seconds")


def _print(name: str, pool: dict[str, Any]) -> None:
    table = new_table(*WORDS, *(Column(heading, justify="right") for heading in NUMBERS))
    table.title = f"{name}: {pool['in_flight']} of {pool['window']} tasks in flight, {pool['parked']} parked"
    table.caption = _memory(pool)
    table.title_justify = table.caption_justify = "left"
    for alias, model in pool["models"].items():
        if "shares" in model:
            table.add_row(safe(alias), safe(f"as {model['shares']}"))
            continue
        table.add_row(
            alias,
            model["state"],
            f"{model['weights'] / 2**20:,.0f}",
            str(model["loads"]),
            *(str(model.get(key, "")) for key in ("batches", "items", "mean_batch")),
            f"{model['waste']:.1%}" if "waste" in model else "",
            str(model.get("forward_seconds", "")),
        )
    Console().print(table)


def _memory(pool: dict[str, Any]) -> Text:
    """Draw the device's memory as a bar, by owner. If its size is unknown, draw the worker's budget."""
    memory = pool["memory"]
    if memory["budget"] is None:
        return Text(f"weights: {mib(memory['weights'])}, no limit")
    parts = [(name, size, character) for name, size, character in _parts(pool["models"], memory) if size > 0]
    whole = max(1, sum(size for _, size, _ in parts))
    ends = [round(BAR * sum(size for _, size, _ in parts[: number + 1]) / whole) for number in range(len(parts))]
    bar = "".join(
        character * (end - start) for (_, _, character), start, end in zip(parts, [0, *ends], ends, strict=False)
    )
    legend = ", ".join(f"{character} {name} {mib(size)}" for name, size, character in parts)
    more = f"; on the host {mib(memory['host_cache'])}" if memory["host_cache"] else ""
    waiting = f"; {memory['waiting']} tasks wait for room" if memory["waiting"] else ""
    return Text(f"{bar}\n{legend}; this worker may take {mib(memory['budget'])}{more}{waiting}")


def _parts(models: dict[str, Any], memory: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Return name, bytes and the bar's character of each part of the device's memory."""
    free = memory.get("free", memory["budget"] - memory["weights"])
    headroom = min(memory.get("headroom", 0), free)
    reserve = min(memory["reserve"], free - headroom)
    yield "others", memory.get("others", 0), "▒"
    for alias, model in models.items():
        yield alias, model.get("weights", 0) if model["state"] == "resident" else 0, "█"
    yield "reserve for batches", reserve, "▓"
    yield "headroom", headroom, "·"
    yield "free", free - headroom - reserve, "░"
