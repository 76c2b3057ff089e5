"""Amounts and rates, as settings write them.

In: a text such as `10%`, `4GiB` or `30/m`. Out: a number and its unit, or a `ValueError` that says how to write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Bytes in one of each unit that an amount of memory can be written in.
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

#: The form of an amount. Fifteen digits are a petabyte, and a float holds them exactly.
_AMOUNT = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(%|[a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Amount:
    """An amount of memory: a number of bytes, or a share of the whole."""

    #: As it was written: 4 in `4GiB`, 10 in `10%`.
    number: float
    #: `%`, or a key of `UNITS`.
    unit: str = "B"

    def __str__(self) -> str:
        return f"{self.number:.15g}{self.unit}"

    def of(self, total_bytes: int) -> int:
        """Return bytes, on a device that has `total_bytes`. An amount in bytes may exceed the total."""
        if self.unit == "%":
            return int(total_bytes * self.number / 100)
        return int(self.number * UNITS[self.unit])

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read an amount written as `10%`, `4GiB`, `512 MiB` or `1000000`. Raises `ValueError`."""
        found = _AMOUNT.fullmatch(text)
        units = {unit.lower(): unit for unit in (*UNITS, "%")}
        unit = units.get((found[2] or "B").lower()) if found else None
        if found is None or unit is None:
            raise ValueError(f"should be bytes, a number with {', '.join(UNITS)}, or a share such as 10%")
        amount = cls(float(found[1]), unit)
        if unit == "%" and amount.number > 100:
            raise ValueError(f"{amount} is more than all there is: give at most 100%")
        return amount


#: The form of a rate, as Celery's `rate_limit` has it.
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([smh]))?")


@dataclass(frozen=True)
class Rate:
    """A number of tasks in a second, a minute or an hour."""

    number: float
    #: `s`, `m` or `h`.
    unit: str = "s"

    def __str__(self) -> str:
        return f"{self.number:.15g}/{self.unit}"

    @property
    def per_second(self) -> float:
        """Tasks in a second."""
        return self.number / {"s": 1, "m": 60, "h": 3600}[self.unit]

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read a rate written as `100/s`, `30/m`, `5/h` or `10`, which is in a second. Raises `ValueError`."""
        found = _RATE.fullmatch(text.strip())
        if found is None or float(found[1]) <= 0:
            raise ValueError("should be a number of tasks above 0 in a second, a minute or an hour: 100/s, 30/m or 5/h")
        return cls(float(found[1]), found[2] or "s")
