"""`celery legit …`: what an operator asks a worker.

In: `celery -A PROJECT`, whose broker the answers come by. Out: tables for people, in 80 columns, or JSON with `--json`.
What can't be done is one sentence on stderr, and an exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from celery import Celery
from celery.bin.base import CeleryCommand, handle_preload_options
from kombu.exceptions import OperationalError
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

#: Characters of the bar that shows memory.
BAR = 40

#: Seconds for the broker to answer.
BROKER_SECONDS = 5

#: How `doctor` marks what it found: a character and its colour.
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}


class Command(CeleryCommand):
    """A command that says what stands in its way in one sentence, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click's. Raises `UsageError` without a project, `ClickException` for what is known to go wrong."""
        from legit_worker.errors import LegitWorkerError

        if not ctx.find_root().params.get("app"):
            raise click.UsageError(f"name the project: celery -A yourproject {_spelled(ctx)}")
        with ctx.obj.app.connection_for_read() as connection:
            away = (OperationalError, *connection.connection_errors)
        try:
            return super().invoke(ctx)
        except LegitWorkerError as error:
            raise click.ClickException(str(error)) from None
        except away as error:
            seen = str(error).rstrip(".")
            raise click.ClickException(
                f"the broker {connection.as_uri()} does not answer: {seen}. Start it, or correct its URL"
            ) from None


def _spelled(ctx: click.Context) -> str:
    """The command's words after `celery`."""
    return ctx.command_path.partition(" ")[2]


def _reach(app: Celery) -> None:
    """Raises what the broker's absence raises, at once: Celery itself would try again for long."""
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, timeout=BROKER_SECONDS, interval_start=0)


@click.group(name="legit", help="Look into legit_worker's workers.")
def legit() -> None:
    """The group that Celery finds by the entry point `celery.commands`."""


@legit.command(cls=Command)
@click.option("--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for workers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Show each worker's window, batches and models. Exit code 1 where no ModelPool answers."""
    _reach(ctx.obj.app)
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


@legit.command(cls=Command)
@click.option("--model", "alias", required=True, help="The alias of a model of kind embed.")
@click.option("--against", type=click.Path(path_type=Path), help="Compare a worker's vectors with this file's.")
@click.option("--make-reference", "target", type=click.Path(path_type=Path), help="Write such a file, by no worker.")
@click.option("--texts", type=click.Path(path_type=Path), help="Your own texts for it, one per line.")
@click.option("--min-cosine", type=float, default=0.9999, show_default=True, help="The least that agrees.")
@click.option("--max-difference", type=float, default=1e-3, show_default=True, help="Of any number, and of the length.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds to wait for the next answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
@handle_preload_options
def validate(ctx: click.Context, **options: Any) -> None:
    """Compare a worker's vectors, by every result format, with those of SentenceTransformer.encode.

    Starts a worker of its own for that, on a queue of its own. Exit code 1 where they differ, 2 where they could not be
    compared.
    """
    from legit_worker.validation.command import main

    ctx.exit(main(ctx.obj.app, str(ctx.find_root().params["app"] or ctx.obj.app.main), **options))


@legit.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a list.")
@click.pass_context
@handle_preload_options
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at settings, versions, broker, models, GPUs, the prep role and batches, and say what to do.

    Exit code 1 where something fails.
    """
    from legit_worker.doctor.checks import examine

    found = []
    for step in examine(ctx.obj.app):
        if isinstance(step, str):
            if not as_json:
                click.echo(step)
            continue
        found.append(step)
        if not as_json:
            mark, colour = MARKS[step.level]
            lines = Table.grid(Column(width=3), Column(overflow="fold"), padding=(0, 1, 0, 0))
            lines.add_row(Text(f"  {mark}", style=colour), Text(step.seen))
            if step.fix:
                lines.add_row("", Text(f"→ {step.fix}"))
            Console(highlight=False).print(lines)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found]))
    ctx.exit(int(any(finding.level == "failure" for finding in found)))


@legit.group()
def results() -> None:
    """Dead letters: routed results that an app's queue did not take."""


@results.command("list", cls=Command)
@click.argument("app", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
@handle_preload_options
def list_results(ctx: click.Context, app: str | None, as_json: bool) -> None:
    """Show an app's dead letters, or how many each app has."""
    letters = _dead_letters(ctx)
    found: Any = letters.envelopes(app.lower()) if app else letters.counts()
    if as_json:
        click.echo(json.dumps(found))
        return
    # Ids are to be copied: they are never cut.
    ids = Column("task id", no_wrap=True)
    table = _table(ids, "task", "status", "finished at") if app else _table("app", "dead letters")
    for row in found if app else found.items():
        table.add_row(*(_letter(row) if app else map(str, row)))
    if not app and not found:
        click.echo("no app is configured: set LEGIT_WORKER_APPS__<APP>__RESULT_ROUTING=on", err=True)
    else:
        Console().print(table)


def _letter(envelope: dict[str, Any]) -> list[str]:
    """A row of the table; the time without its fraction."""
    return [envelope["id"], envelope["task"], envelope["status"], str(envelope["finished_at"])[:19].replace("T", " ")]


@results.command(cls=Command)
@click.argument("app")
@click.pass_context
@handle_preload_options
def replay(ctx: click.Context, app: str) -> None:
    """Send an app's dead letters to its queue again. Exit code 1 where the queue's server does not answer."""
    click.echo(f"{_dead_letters(ctx).replay(app.lower())} sent again")


@results.command(cls=Command)
@click.argument("app")
@click.pass_context
@handle_preload_options
def drop(ctx: click.Context, app: str) -> None:
    """Forget an app's dead letters."""
    click.echo(f"{_dead_letters(ctx).drop(app.lower())} dropped")


def _dead_letters(ctx: click.Context) -> Any:
    from legit_worker import settings
    from legit_worker.routing.dead import DeadLetters

    _reach(ctx.obj.app)
    return DeadLetters(ctx.obj.app, settings.load(enabled_by_default=True))


def _table(*columns: Column | str) -> Table:
    """One that fits: no lines between columns, and long words are folded."""
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


#: The columns of a worker's models; numbers stand on the right.
WORDS = ("model", "state")
NUMBERS = ("MiB", "loads", "batches", "items", "mean", "padding", "seconds")


def _print(name: str, pool: dict[str, Any]) -> None:
    table = _table(*WORDS, *(Column(heading, justify="right") for heading in NUMBERS))
    table.title = f"{name}: {pool['in_flight']} of {pool['window']} tasks in flight, {pool['parked']} parked"
    table.caption = _memory(pool)
    table.title_justify = table.caption_justify = "left"
    for alias, model in pool["models"].items():
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
    """Who has what of the device's memory, as a bar of all of it, or of what this worker may take of it."""
    memory = pool["memory"]
    if memory["budget"] is None:
        return Text(f"weights: {_mib(memory['weights'])}, no limit")
    parts = [(name, size, character) for name, size, character in _parts(pool["models"], memory) if size > 0]
    whole = max(1, sum(size for _, size, _ in parts))
    ends = [round(BAR * sum(size for _, size, _ in parts[: number + 1]) / whole) for number in range(len(parts))]
    bar = "".join(
        character * (end - start) for (_, _, character), start, end in zip(parts, [0, *ends], ends, strict=False)
    )
    legend = ", ".join(f"{character} {name} {_mib(size)}" for name, size, character in parts)
    more = f"; on the host {_mib(memory['host_cache'])}" if memory["host_cache"] else ""
    waiting = f"; {memory['waiting']} tasks wait for room" if memory["waiting"] else ""
    return Text(f"{bar}\n{legend}; this worker may take {_mib(memory['budget'])}{more}{waiting}")


def _parts(models: dict[str, Any], memory: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and the character that stands for it; together they are the whole device."""
    free = memory.get("free", memory["budget"] - memory["weights"])
    headroom = min(memory.get("headroom", 0), free)
    reserve = min(memory["reserve"], free - headroom)
    yield "others", memory.get("others", 0), "▒"
    for alias, model in models.items():
        yield alias, model["weights"] if model["state"] == "resident" else 0, "█"
    yield "reserve for batches", reserve, "▓"
    yield "headroom", headroom, "·"
    yield "free", free - headroom - reserve, "░"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
