"""Did ours get slower? Two results of `make bench`, row by row.

    python bench/compare.py BASE.json [NEW.json] [--force]

NEW is the newest other result beside BASE if it is not given. A row is faster or slower where its
20 to 80 % spread lies wholly below or above the base's, and the medians differ by more than LEAST;
else it is the same. The other contenders, which did not change, show how far the machine did.
Exits with 1 if a row of ours got slower or is no longer timed, and with 2 if the results are of
another version or another machine (compared all the same with --force) or cannot be read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

from bench.record import CACHES, OURS, VERSION, Spread, check, describe, key, read, times

LEAST = 0.02  # smaller changes of the median are the same, however narrow the spreads
SAME_MACHINE = ("cpu", "cores", "threads")
# failed: in both, no longer timed; lost, gained: in one of the two only
VERDICTS = ("slower", "failed", "faster", "lost", "gained", "same")


class Change(NamedTuple):
    row: str
    cache: str
    verdict: str  # one of VERDICTS
    ratio: float | None  # new / base, medians
    base: Spread | None  # ms
    new: Spread | None


def verdict(base: Spread, new: Spread) -> str:
    """faster, slower, or same within the spreads."""
    if abs(new.middle / base.middle - 1) <= LEAST:
        return "same"
    return "slower" if new.low > base.high else "faster" if new.high < base.low else "same"


def changes(base: dict, new: dict, ours: bool = True) -> list[Change]:
    """Rows that either result timed, of ours or of the others, warm and cold."""
    before, after = ({key(r): r for r in record["rows"] if (r["contender"] == OURS) == ours}
                     for record in (base, new))  # fmt: skip
    found = []
    for k in dict.fromkeys((*before, *after)):
        for cache in CACHES:
            a, b = (times(rows[k], cache) if k in rows else None for rows in (before, after))
            name = describe((before if k in before else after)[k])
            if a and b:
                found.append(Change(name, cache, verdict(a, b), b.middle / a.middle, a, b))
            elif a or b:
                kind = "gained" if b else "failed" if k in after else "lost"
                found.append(Change(name, cache, kind, None, a, b))
    return found


def differences(base: dict, new: dict) -> list[str]:
    """Why the two should not be compared."""
    found = [f"version: {name} has {record.get('version')}, this compares {VERSION}"
             for name, record in (("BASE", base), ("NEW", new))
             if record.get("version") != VERSION]  # fmt: skip
    a, b = base.get("machine", {}), new.get("machine", {})
    return found + [f"machine: {name}: BASE has {a.get(name)}, NEW has {b.get(name)}"
                    for name in SAME_MACHINE if a.get(name) != b.get(name)]  # fmt: skip


def table(found: list[Change]) -> str:
    """What needs a look first."""
    lines = [("verdict", "row", "cache", "base, ms", "new, ms", "new / base")]
    for c in sorted(found, key=lambda c: VERDICTS.index(c.verdict)):
        spreads = [f"{s.middle:.4g} ({s.low:.4g} to {s.high:.4g})" if s else "–"
                   for s in (c.base, c.new)]  # fmt: skip
        ratio = f"{c.ratio:.3f}" if c.ratio else "–"
        lines.append((c.verdict, c.row, c.cache, *spreads, ratio))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines)


def overall(found: list[Change], others: list[Change]) -> str:
    """The counts, and how far ours and the others moved on average."""
    counts = Counter(c.verdict for c in found)
    text = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "nothing to compare"
    result = "SLOWER" if counts["slower"] or counts["failed"] else "not slower"
    for name, chosen in (("ours", found), ("other contenders, that is the machine", others)):
        ratios = [c.ratio for c in chosen if c.ratio]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            text += f"; {name}: {mean:.3f} times the base's time (geometric mean)"
    return f"Overall {result}: {text}."


def newest_beside(base: Path) -> Path:
    """The last other result of the folder, by its name, which begins with its date."""
    found = sorted(p for p in base.parent.glob("*.json") if p.resolve() != base.resolve())
    if not found:
        raise ValueError(f"{base.parent}: expected another result than {base.name} (or NEW=...)")
    return found[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--force", action="store_true", help="compare what should not be compared")
    options = parser.parse_args(arguments)
    try:
        new_path = options.new or newest_beside(options.base)
        base, new = read(options.base), read(new_path)
        unlike = differences(base, new)
        if unlike and not options.force:
            print("Not compared (--force would):\n" + "\n".join(unlike), file=sys.stderr)
            return 2
        for record, path in ((base, options.base), (new, new_path)):
            check({**record, "version": VERSION}, str(path))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = changes(base, new)
    print(f"BASE {options.base}: {about(base)}\nNEW  {new_path}: {about(new)}")
    print("".join(f"Forced, though: {line}\n" for line in unlike))
    print(table(found) + "\n\n" + overall(found, changes(base, new, ours=False)))
    return any(c.verdict in ("slower", "failed") for c in found)


def about(record: dict) -> str:
    limits = "{fma_gflops:.4g} GFLOP/s, {read_gbs:.4g} GB/s".format(**record["limits"])
    return f"commit {record['machine']['commit']}, {record['date']}, measured limits {limits}"


if __name__ == "__main__":
    sys.exit(main())
