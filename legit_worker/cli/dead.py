"""`celery legit dead` and `celery legit results`: dead letters, shown, sent again, dropped."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import click
from celery.bin.base import handle_preload_options
from rich.console import Console
from rich.table import Column

from legit_worker.cli import legit
from legit_worker.cli.base import Command, as_json_option, minute, new_table, reach, safe, taken_queues

#: Dead letters in a table, if nobody says how many.
SHOWN = 100


@legit.group()
def dead() -> None:
    """Dead letters: messages that nobody can finish or read, and results that did not reach their app's queue.

    WHAT is a task's id, an app, or a kind: poisoned, unreadable, results.
    """


@dead.command("list", cls=Command)
@click.argument("what", nargs=-1)
@click.option("--limit", type=click.IntRange(min=1), help="The most letters to show; by default 100, with --json all.")
@as_json_option
@click.pass_context
@handle_preload_options
def list_dead(ctx: click.Context, what: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Show the dead letters, oldest first of each kind."""
    letters = _dead_letters(ctx)
    if as_json:
        click.echo(json.dumps([letter.summary() for letter in islice(letters.letters(*_named(what)), limit)]))
        return
    table = new_table(Column("id", no_wrap=True), "kind", "task", "since")
    for letter in islice(letters.letters(*_named(what)), limit or SHOWN):
        table.add_row(*map(safe, (letter.id, letter.kind, letter.task or "", minute(letter.at))))
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
                click.echo(safe(f"{name}: {value}"))
        if content is not None:
            click.echo(safe(json.dumps(content, indent=2, ensure_ascii=False)))
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
    letters = _dead_letters(ctx)
    outcome = letters.replay(*_chosen(what, is_all), queue=queue)
    if outcome.done and queue and not any(queue in names for names in taken_queues(ctx.obj.app).values()):
        seen = f"no worker that answers takes tasks from {queue}: `{ctx.find_root().info_name} legit queues` shows"
        click.echo(safe(f"{seen} which are read"), err=True)
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


@legit.group()
def results() -> None:
    """Dead letters of apps: results that did not reach their queue. `celery legit dead` does the same for all kinds."""


@results.command("list", cls=Command)
@click.argument("app", required=False)
@as_json_option
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
    table = new_table(ids, "task", "status", "finished at") if app else new_table("app", "dead letters")
    for row in found if app else found.items():
        table.add_row(*map(safe, _letter(row) if app else row))
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

    reach(ctx.obj.app)
    return DeadLetters(ctx.obj.app, settings.load(enabled_by_default=True))
