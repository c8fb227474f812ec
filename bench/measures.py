"""What the measures of `evaluate toybox` say of results whose worth is known:

    python bench/measures.py "red car" "green chair" [--run runs/car ...] [--out measures.md]

The true object, the true object cut in half along its plane of symmetry, the object without its
smaller parts, and finished runs of the same prompts, a row each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamfusion_fast import export, metrics
from dreamfusion_fast.config import FieldConfig, RenderConfig
from dreamfusion_fast.render import Renderer
from dreamfusion_fast.toybox import renderer as true_renderer
from dreamfusion_fast.toybox import shapes, surfaces, world
from dreamfusion_fast.train import load_renderer

DENSE, STEP = 400.0, 0.01  # density of a solid; scene units


class Solid(nn.Module):
    """A field that is a toybox object: opaque inside and empty outside, in its colours.

    keep: points (N, 3) and their parts (N,) to booleans (N,), what of the object is there."""

    def __init__(self, colour: str, name: str, keep):
        super().__init__()
        self.config, self.name, self.keep = FieldConfig(), name, keep
        self.palette = true_renderer.palette(name, world.COLOURS[colour])

    def forward(self, positions: Tensor, count=None, latent=False, normals=False):
        distance, part = shapes.signed_distance(self.name, positions)
        inside = (distance < 0.0) & self.keep(positions, part)
        sigma, albedo = torch.where(inside, DENSE, 0.0), self.palette[part]
        return (sigma, albedo) if count is None and not normals else (sigma, albedo, None)


def solids(colour: str, name: str) -> dict[str, Renderer]:
    """The whole object, its half, and what is left of it without its smaller parts."""
    large = _largest_part(name)
    kept = {
        "true": lambda p, part: torch.ones_like(part, dtype=torch.bool),
        "its half, y > 0": lambda p, part: p[:, 1] > 0.0,
        "its largest part alone": lambda p, part: part == large,
    }
    made = {}
    for label, keep in kept.items():
        config = RenderConfig(step=STEP)
        renderer = Renderer(Solid(colour, name, keep), config, torch.Generator().manual_seed(0))
        made[label] = renderer  # its occupancy grid is full
    return made


def _largest_part(name: str) -> int:
    points = (torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 0.66
    distance, part = shapes.signed_distance(name, points)
    return int(torch.bincount(part[distance < 0.0]).argmax())


def row(label: str, renderer: Renderer, colour: str, name: str) -> str:
    """One line of the table."""
    field, step = renderer.field, renderer.config.step
    radius = field.config.radius
    mesh = export.mesh(field, radius, metrics.GRID, step=step)
    true = surfaces.true_mesh(name)
    iou = metrics.volume_iou(field, radius, name, step)
    psnr, ssim = metrics.pictures(renderer, colour, name)
    f_score, chamfer = metrics.f_score(mesh, true), metrics.surfaces(mesh, true)[0]
    return (
        f"| {world.prompt(colour, name)} | {label} | {iou:.3f} | {f_score:.3f} | {chamfer:.4f} "
        f"| {psnr:.1f} | {ssim:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", nargs="+", help='e.g. "red car"')
    parser.add_argument("--run", nargs="*", type=Path, default=[], help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="also write the table here")
    o = parser.parse_args()
    lines = [
        "| object | what | IoU | F-score | Chamfer | PSNR | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for text in o.prompts:
        world.check_prompt(text)
        colour, name = world.parse(text)
        if colour is None:
            sys.exit(f"error: argument `prompts`: expected a colour and an object, got {text!r}")
        results = solids(colour, name)
        for folder in o.run:
            if world.parse(_prompt(folder)) == (colour, name):
                results[str(folder.parent.name + "/" + folder.name)] = load_renderer(folder)
        for label, renderer in results.items():
            lines.append(row(label, renderer, colour, name))
            print(lines[-1], flush=True)
    if o.out:
        o.out.write_text("\n".join(lines) + "\n")


def _prompt(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["prompt"]


if __name__ == "__main__":
    main()
