"""The table that `celery legit status` prints, and that pages show.

In: what the command printed, or a page shows. Out: the row of the model.
"""

from __future__ import annotations


def assert_batched(printed: str, shown: str) -> None:
    """Both are the same table, but for their numbers, and in both a batch has many items."""
    rows = [_row(printed), _row(shown)]
    assert list(rows[0]) == list(rows[1])
    for row in rows:
        assert int(row["items"]) >= 200
        assert int(row["batches"]) <= int(row["items"]) / 4


def _row(table: str) -> dict[str, str]:
    """The row of the model `minilm`, by the table's heads."""
    lines = [line.split() for line in table.splitlines()]
    heads, row = (next(words for words in lines if words[:1] == [first]) for first in ("model", "minilm"))
    return dict(zip(heads, row, strict=True))
