"""`celery legit …`: an operator's questions to the workers.

In: `celery -A PROJECT`. The answers come by the project's broker. Out: tables for people, in 80 columns, or JSON with
`--json`. If a command fails, it prints one sentence on stderr and sets an exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
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

#: Dead letters in a table, if nobody says how many.
SHOWN = 100

#: How `doctor` marks a finding: a character and its colour.
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}


class Command(CeleryCommand):
    """A command that reports an error in one sentence, instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises `UsageError` without a project, and `ClickException` for errors that it expects."""
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
    """Return the command's words after `celery`."""
    return ctx.command_path.partition(" ")[2]


def _reach(app: Celery) -> None:
    """Raise at once if the broker is away."""
    from legit_worker.routing.wires import reach

    with app.connection_for_read() as connection:
        reach(connection)


@click.group(name="legit", help="Look into legit_worker's workers.")
def legit() -> None:
    """Group the commands. Celery finds this by the entry point `celery.commands`."""


@legit.command(cls=Command)
@click.option("--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for workers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
@handle_preload_options
def status(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Show each worker's window, batches and models. Exit code 1 if no ModelPool answers."""
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
    """Compare a worker's vectors, by every result format, with the vectors of SentenceTransformer.encode.

    Starts a private worker on a private queue. Exit code 1 if vectors differ, 2 if they can't be compared.
    """
    from legit_worker.validation.command import main

    ctx.exit(main(ctx.obj.app, str(ctx.find_root().params["app"] or ctx.obj.app.main), **options))


@legit.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a list.")
@click.pass_context
@handle_preload_options
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at settings, versions, broker, models, GPUs, the prep role and batches, and say what to do.

    Exit code 1 if a check fails.
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
def dead() -> None:
    """Dead letters: messages that nobody can finish or read, and results that did not reach their app's queue.

    WHAT is a task's id, an app, or a kind: poisoned, unreadable, results.
    """


@dead.command("list", cls=Command)
@click.argument("what", nargs=-1)
@click.option("--limit", type=click.IntRange(min=1), help="The most letters to show; by default 100, of JSON all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
@handle_preload_options
def list_dead(ctx: click.Context, what: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Show the dead letters, oldest first of each kind."""
    letters = _dead_letters(ctx)
    if as_json:
        click.echo(json.dumps([letter.summary() for letter in islice(letters.letters(*_named(what)), limit)]))
        return
    table = _table(Column("id", no_wrap=True), "kind", "task", "since")
    for letter in islice(letters.letters(*_named(what)), limit or SHOWN):
        table.add_row(*map(_safe, (letter.id, letter.kind, letter.task or "", _minute(letter.at))))
    if table.rows:
        Console().print(table)
    counts = ", ".join(f"{count} {name}" for name, count in letters.totals().items())
    click.echo(f"in all: {counts}" if counts else "no dead letters")


@dead.command(cls=Command)
@click.argument("what", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one letter a line.")
@click.pass_context
@handle_preload_options
def show(ctx: click.Context, what: tuple[str, ...], as_json: bool) -> None:
    """Show all that is known of dead letters: why they are here, and what they hold."""
    for letter in _dead_letters(ctx).letters(*_named(what)):
        details = letter.details()
        if as_json:
            click.echo(json.dumps(details))
            continue
        content = details.pop("content")
        for name, value in details.items():
            if value is not None:
                click.echo(_safe(f"{name}: {value}"))
        if content is not None:
            click.echo(_safe(json.dumps(content, indent=2, ensure_ascii=False)))
        click.echo()


def _what(command: Any) -> Any:
    """Let a command take letters: named ones, or with `--all` every one."""
    command = click.option("--all", "is_all", is_flag=True, help="Take every dead letter.")(command)
    return click.argument("what", nargs=-1)(command)


@dead.command("replay", cls=Command)
@_what
@click.option("--queue", help="Where messages go, in place of the queue that they came from.")
@click.pass_context
@handle_preload_options
def replay_dead(ctx: click.Context, what: tuple[str, ...], is_all: bool, queue: str | None) -> None:
    """Send dead letters again: messages to their queue, results to their app. Exit code 1 if one could not be sent.

    A letter is deleted only when its server has it.
    """
    outcome = _dead_letters(ctx).replay(*_chosen(what, is_all), queue=queue)
    _report(f"{outcome.done} sent again", outcome)


@dead.command("drop", cls=Command)
@_what
@click.pass_context
@handle_preload_options
def drop_dead(ctx: click.Context, what: tuple[str, ...], is_all: bool) -> None:
    """Delete dead letters."""
    outcome = _dead_letters(ctx).drop(*_chosen(what, is_all))
    _report(f"{outcome.done} dropped", outcome)


def _chosen(what: tuple[str, ...], is_all: bool) -> tuple[str, ...]:
    """Return the words that select letters. None of them selects all, which needs a word of its own."""
    if bool(what) == is_all:
        raise click.UsageError("name ids, apps or kinds (poisoned, unreadable, results), or give --all")
    return _named(what)


def _named(what: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words as they are meant: an app's name, but not an id, may be in upper case."""
    from legit_worker import settings

    apps = settings.load(enabled_by_default=True).apps
    return tuple(word.lower() if word.lower() in apps else word for word in what)


def _report(done: str, outcome: Any) -> None:
    """Say what was done. Raises `ClickException` if something was not."""
    if outcome.kept:
        raise click.ClickException(f"{done}, {outcome.why}")
    click.echo(done)


def _safe(text: Any) -> Text:
    """Return what a stranger may have written as text that moves no cursor, and is no markup."""
    return Text("".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in str(text)))


def _minute(at: str | None) -> str:
    return str(at or "")[:16].replace("T", " ")


@legit.group()
def results() -> None:
    """Dead letters: routed results that did not reach their app's queue. `celery legit dead` has these and others."""


@results.command("list", cls=Command)
@click.argument("app", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
@handle_preload_options
def list_results(ctx: click.Context, app: str | None, as_json: bool) -> None:
    """Show an app's dead letters, or the number of each app's."""
    letters = _dead_letters(ctx)
    found: Any = letters.counts()
    if app:
        found = [letter.content for letter in letters.letters(letters.known_app(app.lower())) if letter.content]
    if as_json:
        click.echo(json.dumps(found))
        return
    # People copy ids, so the table never cuts them.
    ids = Column("task id", no_wrap=True)
    table = _table(ids, "task", "status", "finished at") if app else _table("app", "dead letters")
    for row in found if app else found.items():
        table.add_row(*map(_safe, _letter(row) if app else row))
    if not app and not found:
        click.echo("no app is configured: set LEGIT_WORKER_APPS__<APP>__RESULT_ROUTING=on", err=True)
    else:
        Console().print(table)


def _letter(envelope: dict[str, Any]) -> list[str]:
    """Return a row of the table, with the time in whole seconds."""
    return [envelope["id"], envelope["task"], envelope["status"], str(envelope["finished_at"])[:19].replace("T", " ")]


@results.command(cls=Command)
@click.argument("app")
@click.pass_context
@handle_preload_options
def replay(ctx: click.Context, app: str) -> None:
    """Send an app's dead letters to its queue again. Exit code 1 if one could not be sent."""
    letters = _dead_letters(ctx)
    outcome = letters.replay(letters.known_app(app.lower(), configured=True))
    _report(f"{outcome.done} sent again", outcome)


@results.command(cls=Command)
@click.argument("app")
@click.pass_context
@handle_preload_options
def drop(ctx: click.Context, app: str) -> None:
    """Delete an app's dead letters."""
    letters = _dead_letters(ctx)
    click.echo(f"{letters.drop(letters.known_app(app.lower())).done} dropped")


def _dead_letters(ctx: click.Context) -> Any:
    from legit_worker import settings
    from legit_worker.routing.dead import DeadLetters

    _reach(ctx.obj.app)
    return DeadLetters(ctx.obj.app, settings.load(enabled_by_default=True))


def _table(*columns: Column | str) -> Table:
    """Return a table without lines between its columns, which folds long words."""
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


#: The columns of a worker's models. Numbers are aligned on the right.
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
    """Draw the device's memory as a bar, by owner. If its size is unknown, draw the worker's budget."""
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
    """Return name, bytes and the bar's character of each part of the device's memory."""
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
