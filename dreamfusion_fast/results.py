"""Results of an evaluation: one row a run, statistics a variant, tables and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .checkpoint import write_atomically

NONE = "–"  # of what a run does not have
_MARGIN = 16  # pixels of a line of text in the overview


@dataclass
class Result:
    """One evaluated run. iou, f_score, ssim, view_error, precision (R-Precision, colour),
    same_colour and same_object (the same among prompts that share the colour, the object), geometry
    (the same, textureless) in [0, 1]; psnr: dB; chamfer: scene units; normals: mean cosine in
    [-1, 1]; fronts: 1 is right; seconds: of generation; guide_judges: the judge of R-Precision was
    the guide, too; note: why a number is missing. See metrics."""

    prompt: str
    held_out: bool
    iou: float | None
    precision: float
    seconds: float
    variant: str = "full"
    seed: int = 0
    chamfer: float | None = None
    normals: float | None = None
    fronts: int | None = None
    view_error: float | None = None
    geometry: float | None = None
    note: str = ""
    f_score: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    same_colour: float | None = None
    same_object: float | None = None
    guide_judges: bool = False

    def line(self) -> str:
        return (
            f"{self.prompt}: IoU {_number(self.iou, '.3f')}, F-score "
            f"{_number(self.f_score, '.3f')}, PSNR {_number(self.psnr, '.1f')} dB, R-Precision "
            f"{self.precision:.0%}, {self.seconds:.1f} s" + (f" ({self.note})" if self.note else "")
        )


Value = Callable[[Result], float | None]
JUDGED = ("precision", "precision_trained", "precision_held_out", "same_colour", "same_object",
          "geometry")  # fmt: skip  # columns that a judge decides
COLUMNS: dict[str, tuple[str, Value]] = {  # key: (title, value of a run; None leaves it out)
    "iou": ("IoU", lambda r: r.iou),
    "f_score": ("F-score", lambda r: r.f_score),
    "psnr": ("PSNR", lambda r: r.psnr),
    "ssim": ("SSIM", lambda r: r.ssim),
    "chamfer": ("Chamfer", lambda r: r.chamfer),
    "normals": ("normals", lambda r: r.normals),
    "one_front": ("one front", lambda r: None if r.fronts is None else float(r.fronts == 1)),
    "view_error": ("view error", lambda r: r.view_error),
    "precision": ("R-Prec. colour", lambda r: r.precision),
    "precision_trained": ("trained", lambda r: None if r.held_out else r.precision),
    "precision_held_out": ("held out", lambda r: r.precision if r.held_out else None),
    "same_colour": ("same colour", lambda r: r.same_colour),
    "same_object": ("same object", lambda r: r.same_object),
    "geometry": ("R-Prec. geometry", lambda r: r.geometry),
    "seconds": ("seconds", lambda r: r.seconds),
}


@dataclass
class Spread:
    """mean and std over n runs (std: None for one run); seeds: standard deviation over the seeds of
    one prompt, averaged over prompts (None where all have one seed)."""

    n: int
    mean: float | None
    std: float | None
    seeds: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return NONE
        around = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:.3f}{around}" + (
            "" if self.seeds is None else f" (seeds {self.seeds:.3f})"
        )


def spread(results: list[Result], value: Value) -> Spread:
    """Of one column, over the runs that have it."""
    by_prompt: dict[str, list[float]] = {}
    for r in results:
        if value(r) is not None:
            by_prompt.setdefault(r.prompt, []).append(value(r))
    values = [v for group in by_prompt.values() for v in group]
    within = [statistics.stdev(group) for group in by_prompt.values() if len(group) > 1]
    return Spread(
        len(values),
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
        statistics.fmean(within) if within else None,
    )


def by_variant(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.variant, []).append(r)
    return groups


def summary(results: list[Result]) -> dict[str, dict[str, Spread]]:
    """variant -> column -> its spread."""
    return {
        variant: {key: spread(rows, value) for key, (_title, value) in COLUMNS.items()}
        for variant, rows in by_variant(results).items()
    }


def means(results: list[Result]) -> str:
    """One line: how many runs, and the means that matter most."""
    names = {
        "mean_iou": "iou",
        "mean_f_score": "f_score",
        "mean_psnr": "psnr",
        "r_precision_trained": "precision_trained",
        "r_precision_held_out": "precision_held_out",
        "mean_seconds": "seconds",
    }
    values = {k: spread(results, COLUMNS[column][1]).mean for k, column in names.items()}
    parts = [f"objects {len(results)}", *(f"{k} {_number(v, '.3f')}" for k, v in values.items())]
    return ", ".join(parts)


def markdown(results: list[Result], truth: dict[str, float]) -> str:
    """The variants as a table with footnotes, then the runs. truth: metrics.true_geometry's."""
    titles = [title for title, _value in COLUMNS.values()]
    lines = [_row("variant", "runs", *titles), "|---" * (2 + len(titles)) + "|"]
    for variant, columns in summary(results).items():
        rows = by_variant(results)[variant]
        guided = any(r.guide_judges for r in rows)
        cells = [
            f"({x})" if guided and key in JUDGED and x.mean is not None else x
            for key, x in columns.items()
        ]
        lines.append(_row(variant, len(rows), *cells))
    lines += ["", *_footnotes(results, truth), ""]
    lines += [
        "| variant | prompt | seed | pair | IoU | F-score | PSNR | SSIM | Chamfer | normals | "
        "fronts | view error | R-Precision | same colour | same object | geometry | seconds | "
        "note |",
        "|---" * 18 + "|",
        *(_run_row(r) for r in results),
        "",
        *(f"{variant}: {means(rows)}" for variant, rows in by_variant(results).items()),
    ]
    return "\n".join(lines) + "\n"


def _footnotes(results: list[Result], truth: dict[str, float]) -> list[str]:
    measured = spread(results, COLUMNS["one_front"][1]).n
    missing = sum(r.chamfer is None for r in results)
    notes = [
        "Mean ± standard deviation over runs; (seeds): over the seeds of one prompt, averaged.",
        "Trained, held out: R-Precision of pairs that the prior's training saw, and did not see.",
        "F-score of surface points that some camera sees, at 2 % of the object's longest side; "
        "PSNR (dB) and SSIM of 24 fixed views of the albedo against the true object's.",
        "Chamfer in scene units, about 0.003 for the same surface.",
        "Same colour, same object: R-Precision among the prompts that share the colour, and among "
        "those that share the object.",
        "One front: share of runs that show the front exactly once (others: several, as Janus, or "
        f"none), of the {measured} runs whose true object has a front that differs from its back.",
        f"R-Precision, geometry: the true shapes themselves have "
        f"{statistics.fmean(truth.values()):.3f} (chance: {1 / len(truth):.3f}).",
    ]
    if any(r.guide_judges for r in results):
        notes.append("In parentheses: the judge of these figures was the guide, too.")
    if missing:
        notes.append(
            f"No surface: {missing} runs, left out of Chamfer and normals; see their note."
        )
    return [f"- {note}" for note in notes]


def _run_row(r: Result) -> str:
    return _row(
        r.variant,
        r.prompt,
        r.seed,
        "held out" if r.held_out else "trained",
        _number(r.iou, ".3f"),
        _number(r.f_score, ".3f"),
        _number(r.psnr, ".1f"),
        _number(r.ssim, ".3f"),
        _number(r.chamfer, ".4f"),
        _number(r.normals, ".3f"),
        NONE if r.fronts is None else r.fronts,
        _number(r.view_error, ".0%"),
        f"{r.precision:.0%}",
        _number(r.same_colour, ".0%"),
        _number(r.same_object, ".0%"),
        _number(r.geometry, ".0%"),
        f"{r.seconds:.1f}",
        r.note,
    )


def _row(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def write(results: list[Result], truth: dict[str, float], settings: dict, base: Path) -> str:
    """Write <base>.md and <base>.json; returns the former's text. settings: by variant."""
    table = markdown(results, truth)
    stored = {
        "summary": {v: {k: asdict(s) for k, s in c.items()} for v, c in summary(results).items()},
        "settings": settings,
        "true_geometry": truth,
        "results": [asdict(r) for r in results],
    }
    base.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", table), (".json", json.dumps(stored, indent=1))):
        path = base.with_name(base.name + suffix)
        write_atomically(path, lambda p, text=text: p.write_text(text))
    return table


def overview(pictures: dict[tuple[str, str], Path], path: Path) -> None:
    """PNG of all objects (rows) and variants (columns), with their names.

    pictures: (prompt, variant) to a PNG; all have the same size; a missing one leaves grey.
    """
    prompts = list(dict.fromkeys(p for p, _ in pictures))
    variants = list(dict.fromkeys(v for _, v in pictures))
    images = {key: np.asarray(Image.open(p).convert("RGB")) for key, p in pictures.items()}
    h, w, _ = next(iter(images.values())).shape
    sheet = Image.new("RGB", (w * len(variants), _MARGIN + (h + _MARGIN) * len(prompts)), "grey")
    draw = ImageDraw.Draw(sheet)
    for column, variant in enumerate(variants):
        draw.text((column * w + 2, 2), variant, fill="white")
    for row, prompt in enumerate(prompts):
        top = _MARGIN + row * (h + _MARGIN)
        draw.text((2, top + 2), prompt, fill="white")
        for column, variant in enumerate(variants):
            if (prompt, variant) in images:
                cell = Image.fromarray(images[prompt, variant])
                sheet.paste(cell, (column * w, top + _MARGIN))
    write_atomically(path, sheet.save)
