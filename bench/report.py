"""One self-contained page, and its pictures, of a results file of `make bench`.

    python bench/report.py RESULT.json [--out DIR]     # DIR/report.html, DIR/*.png

DIR is RESULT without .json if it is not given. Needs matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import base64
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

from bench.record import (
    CACHES,
    KEY,
    OURS,
    Spread,
    case,
    contenders,
    load,
    speedups,
    times,
    unequal,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2a41; max-width: 1180px; margin: 2em auto;
       padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .5em; } h1 { margin-top: 0; font-size: 1.7em; }
img { max-width: 100%; display: block; margin: 1em 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #e4e4e4; text-align: right;
         white-space: nowrap; }
th { border-bottom: 2px solid #8a8d91; vertical-align: bottom; }
th.text, td.text { text-align: left; } td.long { white-space: normal; min-width: 12em; }
tr.ours td { font-weight: 600; } tr.unequal td { background: #fbe3e4; }
tr.noisy td { background: #fdf3d8; } small { color: #5c6370; }
"""
CAPTIONS = {
    "overview": "The first size of each op. Medians of the others over ours; the whisker spans "
    "what both spreads allow: their 20th over our 80th percentile to their 80th over our 20th.",
    "roofline": "Filled: ours, crosses: others. Operations and bytes are counted from the "
    "definition, not by hardware. A point above the line works on data that stays in cache.",
    "growth": "Medians of warm calls; the band reaches from the 20th to the 80th percentile.",
    "stages": "Measured by stage; percentages of their sum.",
}
NAMES = ("contender", "size", "pass", "dtype")
HEAD = (*NAMES, "warm, ms", "cold, ms", "ours faster", "% of limit", "MB, Mflop", "error",
        "repeats", "remarks")  # fmt: skip
TEXT = dict.fromkeys(("op", "contender", "size", "pass", "dtype", "what", "limit"), "text")
TEXT |= dict.fromkeys(("remarks", "reason", "value"), "text long")  # others: numbers, to the right


def table(head, rows: list[list], classes: list[str] | None = None) -> str:
    """HTML of a table of texts; a cell that is a pair has its second text small, below."""
    kinds = [f' class="{TEXT[name]}"' if name in TEXT else "" for name in head]
    lines = ["<tr>" + "".join(f"<th{k}>{escape(h)}</th>" for h, k in zip(head, kinds)) + "</tr>"]
    for row, name in zip(rows, classes or [""] * len(rows), strict=True):
        cells = "".join(f"<td{k}>{_cell(c)}</td>" for c, k in zip(row, kinds, strict=True))
        lines.append(f'<tr class="{name}">{cells}</tr>' if name else f"<tr>{cells}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(content) -> str:
    if isinstance(content, tuple):
        return f"{escape(content[0])}<br><small>{escape(content[1])}</small>"
    return escape(str(content))


def number(x, digits: int = 3) -> str:
    """Few digits, never an exponent for a time."""
    return "–" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def reach(spread: Spread) -> str:
    return f"{number(spread.low)} to {number(spread.high)}"


def faster(ratio: Spread) -> tuple[str, str]:
    return f"{number(ratio.middle)}×", reach(ratio) + ", noisy" * ratio.noisy


def remarks(row: dict) -> list[str]:
    """What a reader must know of a row before believing it."""
    found = []
    if unequal(row):
        found.append(f"other results than ours (error {number(row['error'])}): not timed")
    elif not times(row):
        found.append(f"not timed: {row.get('problem') or 'no reason given'}")
    return [*found, "noisy: spread over 30 %"] if row["noisy"] else found


def machine(record: dict) -> str:
    """The machine and its measured limits."""
    limits = record["limits"]
    gathers = ", ".join(f"{g['g_per_s']:.3g} ({size(g['bytes'])})" for g in limits["gather"])
    rows = [[name, value] for name, value in record["machine"].items()]
    versions = [f"{name} {value}" for name, value in record.get("contenders", {}).items()]
    rows += [["contenders", ", ".join(versions)]] if versions else []
    rows += [["multiply-adds, measured", f"{limits['fma_gflops']:.4g} GFLOP/s"],
             ["sequential reads, measured", f"{limits['read_gbs']:.4g} GB/s"],
             ["random 8-byte reads by table size, measured", f"{gathers} G/s"]]  # fmt: skip
    return table(["what", "value"], rows)


def size(n: int) -> str:
    return f"{n >> 20} MB" if n >= 1 << 20 else f"{n >> 10} KB"


def summary(rows: list[dict]) -> str:
    """Ours, and how many times it is faster than each contender: a line a case."""
    rows = [row for row in rows if not row.get("curve")]
    others, found, lines = contenders(rows)[1:], speedups(rows), []
    doubtful = {(case(r), r["contender"]): "unequal" if unequal(r) else "failed"
                for r in rows if not times(r)}  # fmt: skip
    for row in rows:
        if row["contender"] != OURS or not times(row):
            continue
        ratios = found.get(case(row), {})
        cells = [faster(ratios[name]) if name in ratios else doubtful.get((case(row), name), "–")
                 for name in others]  # fmt: skip
        lines.append([row["op"], row["size"], row["direction"], row["dtype"],
                      (number(times(row).middle), reach(times(row)) + ", noisy" * times(row).noisy),
                      (number(row["percent_of_limit"]), row["limit"] or "–"), *cells])  # fmt: skip
    head = ["op", "size", "pass", "dtype", "ours, ms", "% of limit", *others]
    return table(head, lines)


def doubts(record: dict) -> str:
    """Unequal, failed and noisy rows and absent contenders: each said plainly."""
    rows, parts = record["rows"], []
    for title, kind, chosen in (
        ("Other results than ours: not timed", "unequal", [r for r in rows if unequal(r)]),
        ("Failed: not timed", "unequal", [r for r in rows if not unequal(r) and not times(r)]),
        ("Noisy: spread over 30 %", "noisy", [r for r in rows if r["noisy"]]),
    ):
        lines = [[r["op"], *map(r.get, KEY[1:]), "; ".join(remarks(r))] for r in chosen]
        text = table(("op", *NAMES, "remarks"), lines, [kind] * len(lines))
        parts += [f"<h3>{title}</h3>", text if lines else "<p>None.</p>"]
    absent = [[p["contender"], p["reason"]] for p in record["absent"]]
    text = table(["contender", "reason"], absent) if absent else "<p>None.</p>"
    return "\n".join([*parts, "<h3>Absent contenders</h3>", text])


def line(row: dict, found: dict) -> list:
    """A row as HEAD has it."""
    spreads = [times(row, cache) for cache in CACHES]
    cells = [(number(s.middle), reach(s)) if s else "–" for s in spreads]
    ratio = found.get(case(row), {}).get(row["contender"])
    work = tuple(number(row[k] and row[k] * 1e-6) for k in ("bytes", "flops"))
    return [*map(row.get, KEY[1:]), *cells, faster(ratio) if ratio else "–",
            (number(row["percent_of_limit"]), row["limit"] or "–"), work,
            number(row["error"], 2), row["repeats"], "; ".join(remarks(row))]  # fmt: skip


def memory(record: dict) -> str:
    """Peak memory of render and of the single ops, where it was measured."""
    rows = [[r["contender"], f"{r['pixels']}²", number(r.get("samples")), number(r.get("peak_mb")),
             r.get("problem", "")] for r in record.get("memory", ())]  # fmt: skip
    head = ["contender", "pixels", "samples", "peak, MB", "remarks"]
    title = "<h2>Memory of a rendering, forward and backward</h2>\n"
    return title + table(head, rows) if rows else ""


def every_row(rows: list[dict]) -> str:
    """A table for each op."""
    found, parts = speedups(rows), []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        classes = ["unequal" if not times(r) else "noisy" if r["noisy"] else
                   "ours" if r["contender"] == OURS else "" for r in chosen]  # fmt: skip
        parts += [f"<h3>{escape(op)}</h3>", table(HEAD, [line(r, found) for r in chosen], classes)]
    return "\n".join(parts)


def page(record: dict, pictures: dict[str, bytes]) -> str:
    """The whole page. pictures: name to PNG."""
    m, rows = record["machine"], record["rows"]
    title = f"dreamfusion_fast: benchmarks on {m['cpu']}, {m['cores']} cores"
    counts = [sum(map(unequal, rows)), sum(not unequal(r) and not times(r) for r in rows),
              sum(bool(r["noisy"]) for r in rows)]  # fmt: skip
    lead = (f"{len(rows)} rows, threads: {m['threads']}, commit {m['commit']}, {record['date']}. "
            f"Gave other results and were not timed: {counts[0]}. Failed: {counts[1]}. "
            f"Noisy: {counts[2]}. Contenders absent: {len(record['absent'])}.")  # fmt: skip
    images = "\n".join(
        f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        + (f"<p><small>{CAPTIONS[name]}</small></p>" if name in CAPTIONS else "")
        for name, png in pictures.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
<h2>In short</h2>
<p>Milliseconds of ours, its percentage of the machine's measured limit, and how many times it is
faster than each contender. Warm cache, where more than 100 % is possible; small: 20 to 80 %, and
what both spreads allow.</p>
{summary(rows)}
<h2>What to doubt</h2>
{doubts(record)}
<h2>Pictures</h2>
{images}
{memory(record)}
<h2>Machine</h2>
{machine(record)}
<h2>Every row</h2>
{every_row(rows)}
</body></html>
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the page (RESULT without .json)")
    options = parser.parse_args(arguments)
    try:
        record = load(options.result)
        from bench import plots  # here: matplotlib may be absent
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"{error}") from None
    out = options.out or options.result.with_suffix("")
    out.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(record)
    for name, png in pictures.items():
        (out / f"{name}.png").write_bytes(png)
    (out / "report.html").write_text(page(record, pictures))
    print(f"{out / 'report.html'}: {len(record['rows'])} rows, {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
