"""Measure text to 3D against ground truth: `python -m dreamfusion_fast.evaluate toybox`.

For each (colour, object) pair of the toybox one run is made from its prompt, then measured:
volume IoU of the extracted solid with the true shape, and R-Precision by the embedded scorer as
the paper computes it with CLIP (renders at 30 degrees elevation, averaged over azimuths; every
toybox prompt is a distractor). Runs are kept and resumed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from . import camera, checkpoint, export, guidance
from .config import RunConfig, preset
from .toybox import shapes, world
from .toybox.scorer import Scorer
from .train import Trainer

ELEVATION, AZIMUTHS, DISTANCE = 30.0, 8, 1.4  # degrees, views, scene units
GRID = 128  # cells a side for volume IoU


@dataclass
class Result:
    """One evaluated pair. iou, precision in [0, 1]; seconds: of generation."""

    prompt: str
    held_out: bool
    iou: float
    precision: float
    seconds: float


def default_pairs(guide: str) -> list[tuple[str, str]]:
    """The pairs that are measured. exemplar: every third object in a colour of its own; toybox:
    every second object in a colour that training saw, and six others in one it never saw."""
    pairs = []
    for k, name in enumerate(shapes.OBJECTS):
        seen = [c for c in world.COLOURS if not world.is_held_out(c, name)]
        pairs.append((seen[(3 * k) % len(seen)], name))
    if guide == "exemplar":
        return pairs[::3]
    unseen = [next(c for c in world.COLOURS if world.is_held_out(c, o)) for o in shapes.OBJECTS]
    return pairs[::2] + list(zip(unseen, shapes.OBJECTS))[1::4]


def volume_iou(field, radius: float, name: str) -> float:
    """IoU of the field's solid (export.solid, automatic level) with object `name`, in [0, 1]."""
    found, _ = export.solid(export.density_grid(field, GRID, radius))
    axis = torch.from_numpy(export.grid_axis(GRID, radius)).float()
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    true = torch.cat([shapes.occupancy(name, p) for p in points.split(1 << 18)])
    true = true.numpy().reshape(found.shape)
    return float(np.logical_and(found, true).sum() / np.logical_or(found, true).sum())


def precision(renderer, text: str, scorer: Scorer, prompts: list[str]) -> float:
    """Share of the renders at 30 degrees whose most similar prompt is `text`."""
    azimuths = [360.0 * i / AZIMUTHS for i in range(AZIMUTHS)]
    cameras = camera.orbit(azimuths, ELEVATION, DISTANCE, 1.0)
    images = export.render_views(renderer, cameras, scorer.image_size)
    return scorer.r_precision(images, prompts, prompts.index(text))


def evaluate_pair(
    colour: str,
    name: str,
    config: RunConfig,
    folder: Path,
    guide,
    scorer: Scorer,
    tick=lambda: None,
) -> Result:
    """Generate one pair (or go on with, or reuse, its run in `folder`) and measure it."""
    trainer = Trainer(config, folder, guide, resume=True)
    for _ in trainer.run():
        tick()
    with open(folder / "metrics.jsonl") as log:
        seconds = sum(json.loads(line)["seconds"] for line in log)
    prompts = [world.prompt(c, o) for c, o in world.all_pairs()]
    export.contact_sheet(trainer.renderer, folder / "contact_sheet.png")
    return Result(
        config.prompt,
        world.is_held_out(colour, name),
        volume_iou(trainer.renderer.field, config.field.radius, name),
        precision(trainer.renderer, config.prompt, scorer, prompts),
        seconds,
    )


def summary(results: list[Result]) -> dict[str, float]:
    """Means over all, trained and held-out pairs."""

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    return {
        "objects": len(results),
        "mean_iou": mean(r.iou for r in results),
        "r_precision_trained": mean(r.precision for r in results if not r.held_out),
        "r_precision_held_out": mean(r.precision for r in results if r.held_out),
        "mean_seconds": mean(r.seconds for r in results),
    }


def markdown(results: list[Result]) -> str:
    """The results as a table, and the means as a line below it."""
    rows = ["| prompt | pair | IoU | R-Precision | seconds |", "|---|---|---|---|---|"]
    rows += [
        f"| {r.prompt} | {'held out' if r.held_out else 'trained'} | {r.iou:.3f} | "
        f"{r.precision:.0%} | {r.seconds:.1f} |"
        for r in results
    ]
    means = ", ".join(f"{k} {v:.3f}" for k, v in summary(results).items())
    return "\n".join(rows) + f"\n\n{means}\n"


def _pairs(texts: list[str] | None, guide: str) -> list[tuple[str, str]]:
    if not texts:
        return default_pairs(guide)
    pairs = [world.parse(t) for t in texts]
    for text, (colour, _name) in zip(texts, pairs):
        world.check_prompt(text)
        if colour is None:
            raise ValueError(f"argument `--prompt`: expected a colour and an object, got {text!r}")
    return pairs


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Measure text to 3D."""


@app.command()
def toybox(
    guide: Annotated[str, typer.Option("--guidance", help="toybox or exemplar")] = "toybox",
    out: Annotated[Path, typer.Option(help="folder for runs and results")] = Path("runs/evaluate"),
    prompt: Annotated[list[str] | None, typer.Option(help="only this pair; repeatable")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of a run")] = None,
    seed: Annotated[int, typer.Option(help="of every run")] = 0,
) -> None:
    """Generate toybox objects and measure them against their true shapes."""
    if guide not in ("toybox", "exemplar"):
        raise typer.BadParameter(f"expected toybox or exemplar, got {guide!r}")
    prior, scorer = guidance.load(guide), Scorer()
    results, began = [], time.perf_counter()
    console = Console()
    with Progress(console=console) as bar:
        pairs = _pairs(prompt, guide)
        config = preset(guide, seed=seed, **({"steps": steps} if steps else {}))
        task = bar.add_task(guide, total=len(pairs) * config.steps)
        for colour, name in pairs:
            config = preset(guide, seed=seed, **({"steps": steps} if steps else {}))
            config.prompt = world.prompt(colour, name)
            folder = out / guide / f"{colour}-{name}"
            results.append(
                evaluate_pair(
                    colour, name, config, folder, prior, scorer, lambda: bar.advance(task)
                )
            )
            r = results[-1]
            bar.console.print(
                f"{r.prompt}: IoU {r.iou:.3f}, R-Precision {r.precision:.0%}, {r.seconds:.1f} s",
                highlight=False,
            )
    table = markdown(results)
    console.print(table, markup=False, highlight=False)
    console.print(f"total {time.perf_counter() - began:.0f} s")
    rows = {"summary": summary(results), "results": [asdict(r) for r in results]}
    for path, text in ((out / f"{guide}.md", table), (out / f"{guide}.json", json.dumps(rows))):
        checkpoint.write_atomically(path, lambda p, text=text: p.write_text(text))


if __name__ == "__main__":
    app()
