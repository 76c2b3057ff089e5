"""`celery legit top`: what all workers do, once a second.

In: each worker's `inspect stats`, the lengths of their queues, the dead letters. Out: one frame after the other on a
terminal; one frame if the output is no terminal. Rates are between two looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import click
from celery import Celery
from celery.bin.base import handle_preload_options
from kombu.exceptions import OperationalError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from legit_worker.cli import legit
from legit_worker.cli.base import SECONDS, Command, mib, new_table, reach, safe

#: Columns of a bar.
BAR = 20

#: Columns of a picture.
PICTURE = 100

#: The fonts that rich has a picture fetch.
FONTS = re.compile(r"@font-face \{[^}]*\}\s*")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at everything."""

    #: Seconds of `monotonic`.
    at: float = field(default_factory=monotonic)
    #: By worker: what `inspect stats` tells, of those with a ModelPool.
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Messages that wait, by queue.
    queues: dict[str, int] = field(default_factory=dict)
    #: Dead letters, by kind.
    dead: dict[str, int] = field(default_factory=dict)
    #: Why there is nothing.
    error: str = ""


@legit.command(cls=Command)
@click.option("--once", is_flag=True, help="Print one frame and end, as always if the output is no terminal.")
@click.option("--timeout", type=SECONDS, default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--svg", type=click.Path(path_type=Path), help="Print one frame, and write it to this file as a picture.")
@click.pass_context
@handle_preload_options
def top(ctx: click.Context, once: bool, timeout: float, svg: Path | None) -> None:
    """Show all workers live: throughput, waits, batches, models, apps, queues, dead letters. Ctrl-C ends it.

    With --once, the exit code is 1 if no worker with ModelPool answers.
    """
    app = ctx.obj.app
    reach(app)
    console = Console(record=svg is not None, width=PICTURE if svg is not None else None)
    if console.is_terminal and not once and svg is None:
        _watch(app, console, timeout)
        return
    before = look(app, timeout)
    sleep(max(0.0, timeout - (monotonic() - before.at)))
    now = look(app, timeout)
    console.print(frame(now, before))
    if svg is not None:
        # Without rich's fonts, which come from another server.
        svg.write_text(FONTS.sub("", console.export_svg(title="celery legit top")))
    ctx.exit(int(not now.workers))


def _watch(app: Celery, console: Console, timeout: float) -> None:
    """Draw until Ctrl-C. A terminal that changes its size has the next frame in the new one."""
    before = Sample()
    with suppress(KeyboardInterrupt), Live(Text("looking for workers …"), console=console, screen=True) as live:
        while True:
            now = look(app, timeout)
            live.update(frame(now, before), refresh=True)
            before = now if now.workers else before
            sleep(max(0.0, timeout - (monotonic() - now.at)))


def look(app: Celery, timeout: float) -> Sample:
    """Ask everybody once. Raises nothing if the broker is away: it may come back."""
    at = monotonic()
    with app.connection_for_read() as connection:
        away = (OperationalError, *connection.connection_errors)
    try:
        inspect = app.control.inspect(timeout=timeout)
        stats = inspect.stats() or {}
        workers = {name: told for name, told in sorted(stats.items()) if "window" in told.get("pool", {})}
        # The limit, or Celery would wait for the whole time though all have answered.
        asked = app.control.inspect(list(workers), timeout=timeout, limit=len(workers))
        takes = asked.active_queues() if workers else None
        names = {queue["name"] for found in (takes or {}).values() for queue in found}
        return Sample(at=at, workers=workers, queues=_lengths(app, names), dead=_dead(app))
    except away as error:
        return Sample(at=at, error=f"the broker does not answer: {error}")


def _lengths(app: Celery, names: set[str]) -> dict[str, int]:
    """Count the messages that wait in these queues. Redis has no queue that is empty."""
    found = dict.fromkeys(sorted(names), 0)
    with app.connection_for_read() as connection:
        for name in found:
            with suppress(*connection.channel_errors), connection.channel() as channel:
                found[name] = channel.queue_declare(name, passive=True).message_count
    return found


def _dead(app: Celery) -> dict[str, int]:
    from legit_worker import settings
    from legit_worker.errors import LegitWorkerError
    from legit_worker.routing.dead import DeadLetters

    with suppress(LegitWorkerError):
        return DeadLetters(app, settings.load(enabled_by_default=True)).totals()
    return {}


def frame(now: Sample, before: Sample) -> RenderableType:
    """Draw one look, with the rates since the one before."""
    if not now.workers:
        return Panel(Text(now.error or "no worker with ModelPool answered"), title="celery legit top")
    parts: list[RenderableType] = [_workers(now, before)]
    parts += [_models(name, told) for name, told in now.workers.items()]
    parts.append(Group(*map(safe, _lines(now))))
    return Panel(Group(*parts), title="celery legit top", title_align="left")


def _workers(now: Sample, before: Sample) -> Table:
    numbers = ("tasks/s", "items/s", "batch", "wait", "worst", "parked")
    table = new_table("worker", "in flight", *(Column(heading, justify="right") for heading in numbers))
    for name, told in now.workers.items():
        pool, rate = told["pool"], _Since(told, before.workers.get(name), now.at - before.at)
        table.add_row(
            safe(name),
            _bar(pool["in_flight"], pool["window"], str(pool["in_flight"])),
            *(f"{value:,.1f}" for value in (rate.tasks, rate.items, rate.batch)),
            *(f"{seconds:.2f} s" for seconds in (rate.wait, pool["worst_recent_wait_seconds"])),
            str(pool["parked"]),
        )
    return table


class _Since:
    """One worker's rates since the look before."""

    def __init__(self, told: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> None:
        pool, past = told["pool"], (before or told)["pool"]
        tasks = sum(told["total"].values()) - sum((before or told)["total"].values())
        items, batches = pool["items"] - past["items"], pool["batches"] - past["batches"]
        #: In a second.
        self.tasks, self.items = tasks / max(seconds, 0.001), items / max(seconds, 0.001)
        #: Items in a batch.
        self.batch = items / batches if batches > 0 else 0.0
        #: Seconds that a task waited.
        self.wait = (pool["waited_seconds"] - past["waited_seconds"]) / tasks if tasks > 0 else 0.0


def _models(worker: str, told: dict[str, Any]) -> Table:
    """A worker's models: their share of its memory as a bar, and what they computed."""
    pool = told["pool"]
    whole = pool["memory"].get("total") or pool["memory"]["budget"]
    own = {alias: model for alias, model in pool["models"].items() if "shares" not in model}
    whole = whole or sum(model["weights"] for model in own.values())
    numbers = (Column(heading, justify="right") for heading in ("MiB", "items", "mean", "padding", "loads"))
    table = new_table("model", "state", "memory", *numbers)
    table.title, table.title_justify = safe(f"{worker}: {_memory(pool['memory'])}"), "left"
    for alias, model in own.items():
        has = model["weights"] if model["state"] in ("resident", "draining") else 0
        table.add_row(
            safe(alias),
            model["state"],
            _bar(has, whole),
            mib(model["weights"]).removesuffix(" MiB"),
            *(str(model.get(key, 0)) for key in ("items", "mean_batch")),
            f"{model.get('waste', 0):.0%}",
            str(model["loads"]),
        )
    return table


def _memory(memory: dict[str, Any]) -> str:
    bound = "no limit" if memory["budget"] is None else f"of {mib(memory['budget'])}"
    waiting = f", {memory['waiting']} calls wait for memory" if memory["waiting"] else ""
    return f"weights {mib(memory['weights'])}, {bound}{waiting}"


def _bar(part: float, whole: float, text: str = "") -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(ProgressBar(total=max(whole, 1), completed=part, width=BAR), text)
    return grid


def _lines(now: Sample) -> Iterator[str]:
    """Yield the last lines: what belongs to no worker alone."""
    apps: dict[str, int] = {}
    for told in now.workers.values():
        for app, count in told["pool"].get("apps", {}).items():
            apps[app] = apps.get(app, 0) + count
    yield f"apps     {_counts({app or 'none': count for app, count in apps.items()}) or 'no task runs'}"
    yield f"queues   {_counts(now.queues) or 'unknown'}"
    yield f"dead     {_counts(now.dead) or 'no dead letters'}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
