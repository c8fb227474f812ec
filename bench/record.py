"""The results file of the CPU suite, as bench/report.py and bench/compare.py read it.

{"version": 1, "date", "machine": {...}, "limits": {...}, "rows": [...],
 "absent": [{contender, reason}]}
A row: op, contender, size, direction, dtype; warm and cold, each {median_ms, p20_ms, p80_ms} or
null (not timed); repeats, bytes, flops, percent_of_limit, limit; equal (null: no results), error,
noisy (null: not timed). One with `curve` and `at` is a point of a growth curve; `stages`,
{name: ms}, says what a step is made of; `problem`, why a row was not timed. Keys beyond these are
let through; one missing is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

VERSION = 1
OURS = "ours"  # what the other contenders are compared with
TOP = ("version", "date", "machine", "limits", "rows", "absent")
MACHINE = ("cpu", "cores", "threads", "commit")
LIMITS = ("fma_gflops", "read_gbs", "gather")
KEY = ("op", "contender", "size", "direction", "dtype")
ROW = (*KEY, "warm", "cold", "repeats", "bytes", "flops", "percent_of_limit", "limit", "equal",
       "error", "noisy")  # fmt: skip
TIMES = ("median_ms", "p20_ms", "p80_ms")
CACHES = ("warm", "cold")


class Spread(NamedTuple):
    """A number and the bounds that the 20th and 80th percentiles give it."""

    middle: float
    low: float
    high: float
    noisy: bool = False  # of a row that is

    def __truediv__(self, other: Spread) -> Spread:
        """The widest bounds that both spreads allow."""
        return Spread(self.middle / other.middle, self.low / other.high, self.high / other.low,
                      self.noisy or other.noisy)  # fmt: skip


def load(path: str | Path) -> dict:
    """A results file of version VERSION. Raises ValueError: what of it is wrong."""
    return check(read(path), str(path))


def read(path: str | Path) -> dict:
    """What lies in the file, which need not be of this version."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a results file, got {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected one JSON object, got {type(record).__name__}")
    return record


def check(record: dict, name: str) -> dict:
    """The record, if it is complete. Raises ValueError with the name, expected and actual."""
    if record.get("version") != VERSION:
        raise ValueError(f"{name}: `version`: expected {VERSION}, got {record.get('version')}")
    _need(record, TOP, name)
    _need(record["machine"], MACHINE, f"{name}: machine")
    _need(record["limits"], LIMITS, f"{name}: limits")
    seen = set()
    for i, row in enumerate(record["rows"]):
        where = f"{name}: rows[{i}]"
        _need(row, ROW, where)
        for cache in CACHES:
            if row[cache] is not None:
                _need(row[cache], TIMES, f"{where}: {cache}")
                if not all(math.isfinite(t) and t > 0 for t in map(row[cache].get, TIMES)):
                    raise ValueError(f"{where}: {cache}: expected times > 0, got {row[cache]}")
        if key(row) in seen:
            raise ValueError(f"{where}: expected one row of {describe(row)}, got another")
        seen.add(key(row))
    for i, peer in enumerate(record["absent"]):
        _need(peer, ("contender", "reason"), f"{name}: absent[{i}]")
    return record


def _need(value, keys: Iterable[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    if missing := [k for k in keys if k not in value]:
        raise ValueError(f"{where}: expected `{'`, `'.join(missing)}`, got {', '.join(value)}")


def key(row: dict) -> tuple:
    """What two rows of one measurement have in common."""
    return tuple(row[k] for k in KEY)


def case(row: dict) -> tuple:
    """What the rows of all contenders of one comparison have in common."""
    return tuple(row[k] for k in KEY if k != "contender")


def describe(row: dict) -> str:
    return " ".join(str(row[k]) for k in KEY)


def times(row: dict, cache: str = "warm") -> Spread | None:
    """Milliseconds; None where the row was not timed."""
    found = row[cache]
    return found and Spread(*(found[k] for k in TIMES), bool(row["noisy"]))


def speedups(rows: list[dict]) -> dict[tuple, dict[str, Spread]]:
    """For each case, how many times ours is faster than each contender that was timed, warm."""
    own = {case(row): times(row) for row in rows if row["contender"] == OURS and times(row)}
    found: dict[tuple, dict[str, Spread]] = {}
    for row in rows:
        if row["contender"] != OURS and times(row) and case(row) in own:
            found.setdefault(case(row), {})[row["contender"]] = times(row) / own[case(row)]
    return found


def unequal(row: dict) -> bool:
    """Whether it gave other results than ours; not: whether it gave none."""
    return row["equal"] is False


def contenders(rows: list[dict]) -> list[str]:
    """Ours first, the others as they come."""
    return list(dict.fromkeys([OURS, *(row["contender"] for row in rows)]))
