"""`celery legit …`: what an operator asks a worker.

In: `celery -A PROJECT`, whose broker the answers come by. Out: tables for people, or JSON with `--json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

#: Characters of the bar that shows memory.
BAR = 40


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


@legit.command(cls=CeleryCommand)
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


@legit.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a list.")
@click.pass_context
@handle_preload_options
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at settings, versions, broker, models, GPUs, the prep role and batches, and say what to do.

    Exit code 1 where something fails.
    """
    from legit_worker.doctor.checks import examine

    found = []
    for finding in examine(ctx.obj.app):
        found.append(finding)
        if not as_json:
            mark, colour = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}[finding.level]
            click.echo(f"{click.style(mark, fg=colour)} {finding.about}: {finding.seen}")
            if finding.fix:
                click.echo(f"    → {finding.fix}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found]))
    ctx.exit(int(any(finding.level == "failure" for finding in found)))


@legit.group()
def results() -> None:
    """Dead letters: routed results that an app's queue did not take."""


@results.command("list", cls=CeleryCommand)
@click.argument("app", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
@handle_preload_options
def list_results(ctx: click.Context, app: str | None, as_json: bool) -> None:
    """Show an app's dead letters, or how many each app has."""
    with _dead_letters(ctx) as letters:
        found: Any = letters.envelopes(app.lower()) if app else letters.counts()
    if as_json:
        click.echo(json.dumps(found))
        return
    # Ids are to be copied: they are never cut.
    ids = Column("task id", no_wrap=True)
    table = Table(ids, "task", "status", "attempt", "finished at") if app else Table("app", "dead letters")
    for row in found if app else found.items():
        cells = [row[key] for key in ("id", "task", "status", "attempt", "finished_at")] if app else row
        table.add_row(*map(str, cells))
    Console().print(table)


@results.command(cls=CeleryCommand)
@click.argument("app")
@click.pass_context
@handle_preload_options
def replay(ctx: click.Context, app: str) -> None:
    """Send an app's dead letters to its queue again. Exit code 1 where the queue's server does not answer."""
    with _dead_letters(ctx) as letters:
        click.echo(f"{letters.replay(app.lower())} sent again")


@results.command(cls=CeleryCommand)
@click.argument("app")
@click.pass_context
@handle_preload_options
def drop(ctx: click.Context, app: str) -> None:
    """Forget an app's dead letters."""
    with _dead_letters(ctx) as letters:
        click.echo(f"{letters.drop(app.lower())} dropped")


@contextmanager
def _dead_letters(ctx: click.Context) -> Iterator[Any]:
    """What goes wrong is one sentence, and exit code 1."""
    from legit_worker import settings
    from legit_worker.errors import LegitWorkerError
    from legit_worker.routing.dead import DeadLetters

    try:
        yield DeadLetters(ctx.obj.app, settings.load(enabled_by_default=True))
    except LegitWorkerError as error:
        raise click.ClickException(str(error)) from None


def _print(name: str, pool: dict[str, Any]) -> None:
    table = Table(
        title=f"{name}: {pool['in_flight']} of {pool['window']} tasks in flight, {pool['parked']} parked",
        caption=_memory(pool),
    )
    for heading in (
        "model",
        "kind",
        "state",
        "weights",
        "loads",
        "batches",
        "items",
        "items/batch",
        "padding",
        "seconds",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "kind", "state") else "right")
    for alias, model in pool["models"].items():
        table.add_row(
            alias,
            model["kind"],
            model["state"],
            _mib(model["weights"]),
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
