"""`celery legit validate`, as its user sees it.

In: the options. Out: a table and the wrong rows, or JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from celery import Celery
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from legit_worker import golden, settings
from legit_worker.errors import SettingsError
from legit_worker.settings import ModelSettings
from legit_worker.validation import reference
from legit_worker.validation.comparison import MEASURED, Comparison, Finding, Tolerance
from legit_worker.validation.library import CLASSES, Library
from legit_worker.validation.reference import Reference, ValidationError
from legit_worker.validation.run import Outcome, validate

#: The most wrong rows that are listed for each path. JSON has them all.
MAX_LISTED = 20

#: The most characters of a text that a row shows.
SHOWN = 48


def main(
    app: Celery,
    project: str,
    *,
    alias: str,
    against: Path | None,
    target: Path | None,
    texts: Path | None,
    min_cosine: float | None,
    max_difference: float | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Run the command. Returns the exit code: 0 if all agree or a file was made, 1 for a difference, 2 for an error."""
    if (against is None) == (target is None) or (texts and not target):
        raise click.UsageError("give either --against FILE, or --make-reference FILE, which --texts FILE belongs to")
    try:
        alias, model = configured(alias)
        if target:
            make_reference(model, target, texts)
            return 0
        assert against
        known = reference.read(against)
        tolerance = tolerance_of(model, known, min_cosine, max_difference)
        return 0 if compare_with(app, project, alias, model, known, tolerance, timeout, as_json=as_json) else 1
    except ValidationError as error:
        click.echo(f"Error: {error}", err=True)
        return 2


def configured(name: str) -> tuple[str, ModelSettings]:
    """Return the alias and settings of the model that this name means. Raises `ValidationError`."""
    try:
        models = settings.load(enabled_by_default=True).models
    except SettingsError as error:
        raise ValidationError(str(error)) from None
    alias = next((alias for alias in models if settings.fold(alias) == settings.fold(name)), None)
    if alias is None:
        known = ", ".join(sorted(models)) or "none"
        raise ValidationError(f"no model is called {name!r}; configured: {known}. Set {settings.path_variable(name)}")
    if models[alias].kind not in CLASSES:
        raise ValidationError(
            f"model {alias!r} is of kind {models[alias].kind!r}, for which sentence-transformers has no answers to "
            f"compare with: it has them for {', '.join(CLASSES)}"
        )
    precision = models[alias].precision
    if precision in ("int8", "uint8"):
        raise ValidationError(
            f"model {alias!r} has PRECISION={precision}, whose scale is taken from the vectors of one task, and texts "
            "are compared one by one: compare an alias of the same model without PRECISION"
        )
    return alias, models[alias]


def make_reference(model: ModelSettings, path: Path, texts: Path | None) -> None:
    """Write a reference file."""
    if not os.access(path.parent, os.W_OK):
        raise ValidationError(f"{path.parent} is no folder that can be written to")
    chosen = reference.read_texts(texts) if texts else golden.texts()
    library = Library(model, reference.dtype_of(model))
    with _progress() as progress:
        made = progress.track(library.rows(chosen), total=None, description="answers by the library")
        rows = reference.write(path, made, model, library.dtype)
        progress.update(progress.task_ids[0], total=rows, refresh=True)
    click.echo(
        f"{path}: {rows} inputs and their answers by {CLASSES[model.kind]} in {library.dtype}, one by one, on the CPU"
    )


def tolerance_of(
    model: ModelSettings, known: Reference, min_cosine: float | None, max_difference: float | None
) -> Tolerance:
    """Return what the user said, and else what was measured for the type in which the model computes."""
    dtype = str(known.origin.get("computed_in", "float32"))
    if model.dtype not in (None, "auto"):
        dtype = model.dtype
    measured = MEASURED.get(dtype, MEASURED["float32"])
    return Tolerance(
        min_cosine=measured.min_cosine if min_cosine is None else min_cosine,
        max_difference=measured.max_difference if max_difference is None else max_difference,
    )


def compare_with(
    app: Celery,
    project: str,
    alias: str,
    model: ModelSettings,
    known: Reference,
    tolerance: Tolerance,
    patience: float,
    *,
    as_json: bool,
) -> bool:
    """Compare, and print how well the answers agree. Returns whether all agree."""
    notes = reference.differences(known, model)
    with _progress(quiet=as_json) as progress:
        bar = progress.add_task("answers of a worker, which loads the model first", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        outcome = validate(app, project, alias, known, tolerance, patience, tell)
    if as_json:
        click.echo(json.dumps(_as_json(alias, known, tolerance, notes, outcome)))
    else:
        _print(alias, known, tolerance, notes, outcome)
    return outcome.agrees


def _progress(*, quiet: bool = False) -> Progress:
    """Return a bar that is shown on a terminal, and is gone at its end. Elsewhere nothing is shown."""
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _as_json(alias: str, known: Reference, tolerance: Tolerance, notes: list[str], outcome: Outcome) -> dict[str, Any]:
    paths = {path: asdict(comparison) for path, comparison in outcome.comparisons.items()}
    for figures in paths.values():
        for finding in figures["findings"]:
            finding["text"] = _start(str(known.rows[finding["row"] - 1]))
    return {
        "model": alias,
        "agrees": outcome.agrees,
        "tolerance": asdict(tolerance),
        "notes": notes,
        "skipped": outcome.skipped,
        "batches": outcome.batches,
        "items": outcome.items,
        "backend": outcome.backend,
        "paths": paths,
    }


def _print(alias: str, known: Reference, tolerance: Tolerance, notes: list[str], outcome: Outcome) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(_table(alias, known, outcome))
    for note in notes:
        console.print(f"note: {escape(note)}")
    for path, reason in outcome.skipped.items():
        console.print(f"{path}: skipped, {reason}")
    for path, comparison in outcome.comparisons.items():
        for line in _listed(path, comparison, known):
            console.print(escape(line))
    console.print(_verdict(tolerance, outcome, known))


def _table(alias: str, known: Reference, outcome: Outcome) -> Table:
    title = f"{alias}: {len(known.rows)} inputs by {len(outcome.comparisons)} paths"
    if outcome.batches:
        title += f", {outcome.items} items in {outcome.batches} batches by {outcome.backend}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("path", "rows", "worst cosine", "mean cosine", "most off", "length off", "order", "wrong"):
        table.add_column(heading, justify="left" if heading == "path" else "right")
    for path, comparison in outcome.comparisons.items():
        table.add_row(path, *_cells(comparison))
    return table


def _cells(comparison: Comparison) -> Iterator[str]:
    yield f"{comparison.compared} of {comparison.rows}"
    for cosine in (comparison.worst_cosine, comparison.mean_cosine):
        yield "" if cosine is None else f"{cosine:.6f}"
    for difference in (comparison.max_difference, comparison.max_norm_difference):
        yield "" if difference is None else f"{difference:.1e}"
    yield "right" if comparison.in_order else "wrong"
    yield str(len(comparison.findings))


def _listed(path: str, comparison: Comparison, known: Reference) -> Iterator[str]:
    for finding in comparison.findings[:MAX_LISTED]:
        yield f"{path}, row {finding.row}, {_start(str(known.rows[finding.row - 1]))!r}: {_described(finding)}"
    if len(comparison.findings) > MAX_LISTED:
        yield f"{path}: and {len(comparison.findings) - MAX_LISTED} more, which --json shows"


def _described(finding: Finding) -> str:
    if finding.difference is None:
        return finding.problem
    cosine = "" if finding.cosine is None else f"cosine {finding.cosine:.6f}, "
    return f"{finding.problem} ({cosine}largest difference {finding.difference:.2e})"


def _start(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _verdict(tolerance: Tolerance, outcome: Outcome, known: Reference) -> str:
    cosine = "the same order" if known.form.ranks else f"cosine at least {tolerance.min_cosine:g}"
    within = f"{cosine}, differences at most {tolerance.max_difference:g}"
    if outcome.agrees:
        return f"All agree with the reference: {within}."
    wrong = sum(len(comparison.findings) for comparison in outcome.comparisons.values())
    return f"{wrong} rows differ from the reference, or are missing: {within}."
