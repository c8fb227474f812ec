"""Predictions beside measurements, and gpu_check.py's Markdown."""

from __future__ import annotations

import dataclasses

SPEEDS = ("op", "twin", "compiled")


def add_predictions(record: dict) -> None:
    """Where the card is one of bench/limits.py's: the prediction, and its share of the time."""
    from bench import limits, model  # needs the built package

    card = limits.card_named(record.get("card", ""))
    for row in record.get("benchmarks", []) + record.get("steps", []):
        if card is None or "median_us" not in row or row.get("variant") == "twins":
            continue
        size = dataclasses.replace(limits.SIZES[row["size"]], samples=row["samples_per_ray"])
        half = row["precision"] == "half"
        if "variant" in row:
            predicted = model.predict_step(size, card, half)
        elif row["implementation"] == "op":
            predicted = model.predict(row["kernel"], size, card, half)
        else:
            continue
        row["prediction_us"], row["limit"] = predicted["prediction_us"], predicted["limit"]
        row["percent_of_prediction"] = 100 * row["prediction_us"] / row["median_us"]


def markdown(record: dict) -> str:
    """The whole report."""
    kind = "REHEARSAL on the CPU, no GPU was measured" if record["rehearsal"] else "measured"
    parts = [f"# gpu-check, {kind}: {record.get('card', 'no card')}, {record['date']}",
             "## Stages", _stages(record)]  # fmt: skip
    if record.get("tests"):
        parts += ["## Tests", _tests(record["tests"])]
    if record.get("benchmarks"):
        parts += [f"## Ops ({kind}; the column of predictions is bench/model.py's)",
                  _benchmarks(record["benchmarks"] + record["compile"])]  # fmt: skip
    if record.get("steps"):
        parts += [f"## A step without guidance ({kind})", _steps(record["steps"])]
    if record.get("sds"):
        parts += [f"## SDS around the U-Net ({kind})", "\n".join(record["sds"])]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _stages(record: dict) -> str:
    rows = [[s["stage"], "ok" if s["ok"] else "FAILED", f"{s['seconds']:.0f} s",
             _short(s.get("error", s.get("note", "")))] for s in record["stages"]]  # fmt: skip
    return _table(["stage", "result", "time", "remarks"], rows)


def _tests(tests: dict) -> str:
    rows = [[name, *(t.get(k, 0) for k in ("passed", "failed", "errors", "skipped")),
             f"{t['seconds']:.0f} s", _short(t.get("error", ""))]
            for name, t in tests.items()]  # fmt: skip
    return _table(["tests", "passed", "failed", "errors", "skipped", "time", "remarks"], rows)


def _benchmarks(rows: list[dict]) -> str:
    """One line for each op, size, precision and pass."""
    lines, errors = {}, []
    for row in rows:
        if "error" in row:
            errors.append(row)
        elif "direction" in row:
            key = row["op"], row["size"], row["precision"], row["direction"]
            lines.setdefault(key, {})[row["implementation"]] = row
    head = ["op", "size", "precision", "pass", "op, µs (20 to 80 %)", "twin, µs", "compiled, µs",
            "twin / op", "compiled / op", "prediction, µs", "prediction / op",
            "error"]  # fmt: skip
    text = _table(head, [[*key, *_speeds(found)] for key, found in lines.items()])
    notes = [f"- {r['op']} {r['size']} {r['precision']} {r.get('implementation', '')} "
             f"{r.get('direction', '')}: {_short(r['error'], 200)}" for r in errors]  # fmt: skip
    return text + ("\n\nNot measured:\n" + "\n".join(notes) if notes else "")


def _speeds(found: dict) -> list[str]:
    op, twin, compiled = (found.get(name) for name in SPEEDS)

    def ratio(row):
        return f"{row['median_us'] / op['median_us']:.1f}" if row and op else "–"

    own = f"{op['median_us']:.1f} ({op['p20_us']:.1f} to {op['p80_us']:.1f})" if op else "–"
    others = [f"{row['median_us']:.1f}" if row else "–" for row in (twin, compiled)]
    error = (op or {}).get("relative_error")
    return [own, *others, ratio(twin), ratio(compiled), *_prediction(op),
            "–" if error is None else f"{error:.0e}"]  # fmt: skip


def _prediction(row: dict | None) -> list[str]:
    if not row or "prediction_us" not in row:
        return ["–", "–"]
    return [f"{row['prediction_us']:.1f}, {row['limit']}", f"{row['percent_of_prediction']:.0f} %"]


def _steps(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        if "error" in r:
            lines.append([r["size"], r["variant"], r["precision"], _short(r["error"]), *["–"] * 3])
            continue
        spread = f"{r['median_us']:.0f} ({r['p20_us']:.0f} to {r['p80_us']:.0f})"
        lines.append([r["size"], r["variant"], r["precision"], spread, f"{r['wall_us']:.0f}",
                      *_prediction(r)])  # fmt: skip
    head = ["size", "variant", "precision", "device, µs (20 to 80 %)", "wall, µs a step",
            "prediction, µs", "prediction / device"]  # fmt: skip
    return _table(head, lines)


def _short(text: str, length: int = 100) -> str:
    text = " ".join(str(text).split()).replace("|", "/")
    return text if len(text) <= length else text[:length] + "…"
