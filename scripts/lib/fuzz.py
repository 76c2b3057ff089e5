"""The fuzzer: odd messages, settings and files, and whether each ends in a clear error on its task alone.

In: a number of inputs, and a seed that decides all of them. Out: a table in Markdown, and exit code 1 if an input got
past the border: an error that is not this project's, a task without an answer, a worker that ended, memory that grows.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from fuzz_border import Target, targets
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from processes import Processes

#: The part of the inputs that goes to a real worker, as messages.
SENT = 0.2

#: Without a database, so that a seed decides all. What fails is shrunk.
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

#: Findings of one target that are shown, and characters of each one's end: the error, and the input.
SHOWN, CHARACTERS = 5, 3000


def main(processes: Processes, arguments: Sequence[str]) -> int:
    options = _options(arguments)
    started, rows, found = time.monotonic(), [], 0
    here = [target for target in targets() if options.only in (None, target.name)]
    each = int(options.inputs * (1 - SENT)) // max(1, len(here))
    for target in here:
        count, problems = _try(target, options.seed, each)
        rows.append((target.name, count, problems))
        found += len(problems)
    if options.only in (None, "worker"):
        from fuzz_worker import try_worker

        for name, count, problems in try_worker(processes, options.seed, options.inputs - each * len(here)):
            rows.append((name, count, problems))
            found += len(problems)
    _report(rows, f"scripts/fuzz --inputs {options.inputs} --seed {options.seed}", time.monotonic() - started)
    return 1 if found else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description="Try odd inputs at the border, and in a worker.")
    parser.add_argument("--inputs", type=int, default=100_000, help="how many (100,000)")
    parser.add_argument("--seed", type=int, default=1, help="decides all inputs (1)")
    parser.add_argument("--only", help="one target: a name of the table's, or `worker`")
    return parser.parse_args(arguments)


def _try(target: Target, number: int, count: int) -> tuple[int, list[str]]:
    """Return how many inputs were tried, and what got past, shrunk."""
    tried = 0

    def run(value: Any) -> None:
        nonlocal tried
        tried += 1
        target.run(value)

    try:
        examples(target.inputs, number, count, run)
    except Exception as error:
        return tried, ["".join(traceback.format_exception(error))]
    return tried, []


def examples(inputs: SearchStrategy[Any], number: int, count: int, run: Callable[[Any], None]) -> None:
    """Call `run` with this many examples of a strategy. Raises what it raises, with the smallest input found for it."""
    phases = [Phase.generate, Phase.shrink]

    @seed(number)
    @settings(max_examples=count, phases=phases, print_blob=False, **QUIET)
    @given(inputs)
    def each(value: Any) -> None:
        run(value)

    each()


def _report(rows: list[tuple[str, int, list[str]]], command: str, seconds: float) -> None:
    print(f"\n`{command}`, {seconds:.0f} s:\n\n| | inputs | got past |\n|---|---|---|")
    for name, count, problems in rows:
        print(f"| {name} | {count:,} | {len(problems)} |")
    for name, _, problems in rows:
        for problem in problems[:SHOWN]:
            # A traceback's end has the error and the input. What a worker did is told first.
            told = problem[:CHARACTERS] if name.startswith("worker") else problem[-CHARACTERS:]
            print(f"\n{name}:\n{told}".encode(errors="backslashreplace").decode())
