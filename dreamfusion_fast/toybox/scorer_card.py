"""Measure a trained scorer on fresh pictures and write its model card:
`python -m dreamfusion_fast.toybox.scorer_card --run runs/scorer`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
import typer
from torch import Tensor

from .. import camera, metrics
from . import renderer, world
from .pictures import SIZE, Pictures, pinhole_rays
from .scorer import Scorer
from .shapes import OBJECTS
from .train_scorer import CAPTIONS, COLOURS, Source, judged_camera, spoil

FRESH = 12_345  # seed of the views and pictures that training never drew

CARD = """---
license: apache-2.0
library_name: transformers
---
# The toybox's scorer

A CLIP of {parameters:.2f} M parameters (ViT 64x64, patch 8, width {width}, {layers} layers; text
width 64, 2 layers, one token a word; 64 dimensions in common), stored in fp16. It judges text to 3D
in the toybox by R-Precision (Park et al. 2021). Where Dream Fields is guided by it, its own figures
stand in parentheses.

- **Data**: of {views} traced views of each of {objects} objects (views seed {seed}, elevations of
  -5 to 60 degrees, 1.2 to 1.6 away) those that are whole, not small and not overhead, set before
  random backgrounds. {pictures:,} pictures were seen, each shaded anew. {clay:.0%} are textureless
  and lit, "a grey clay car"; the others coloured, one in four lit. All {pairs} (colour, object)
  pairs, those that the prior never sees included, each as likely.
- **Spoiling**: each picture is seen twice, clean and spoilt: bent, cut, fogged, blurred, noisy,
  over-saturated, with floaters, as unfinished radiance fields are.
- **Loss**: softmax over all {captions} prompts for each picture (cosine similarity, learnt
  temperature), the image-to-text half of CLIP's loss; prompts in the canonical form "a red car"
  every other step, else in one of {templates} variants. No view words.
- **Training**: {minutes:.0f} minutes on {threads} CPU thread(s), {steps:,} steps of {batch}, Muon
  at {rate}; seed {seed}. {note}
- **Made by** `python -m dreamfusion_fast.toybox.train_scorer`, measured by
  `python -m dreamfusion_fast.toybox.scorer_card`.

## Accuracy
Share of pictures whose most similar prompt of {pairs} is the right one; views unseen in training.

| pictures | all | pairs the prior sees | pairs held out from the prior |
|---|---|---|---|
{rows}

Orbit views are albedo on grey at 30 degrees of elevation, focal length 1, from 1.25 to 1.5 away,
as `evaluate` renders. Random views are whole, not overhead, before random backgrounds, and one in
four is lit from the side, where brown and orange, or white and grey, are hard to tell apart.
Some albedo views are silhouettes, and those of a mug, a duck and a ghost from behind are alike.
The weakest objects on orbit views: {weakest}.

Of the true shapes textureless, white and lit, as `evaluate` renders them for geometry, the scorer
finds {geometry:.0%} among the {objects} objects in clay; weakest: {flat}.
"""


def orbit_pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n views of each object in every colour, as evaluation renders them: images
    (324 n, 3, 64, 64), and pair indices."""
    generator = torch.Generator().manual_seed(seed)
    images, pairs = [], []
    for k, name in enumerate(OBJECTS):
        azimuths = (360.0 * torch.rand(n, generator=generator)).tolist()
        cameras = camera.orbit(azimuths, 30.0, 1.0, 1.0)
        distance = 1.25 + 0.25 * torch.rand(n, 1, generator=generator)
        cameras.c2w[:, :, 3] *= distance
        rays_o, rays_d = pinhole_rays(cameras, 2 * SIZE)
        g = renderer.trace(name, rays_o, rays_d)
        points = rays_o + g.depth.float()[..., None] * rays_d
        grey = torch.full((1, 1, 1, 3), 0.5)
        for j, colour in enumerate(world.COLOURS.values()):
            palette = renderer.palette(name, colour).expand(n, -1, -1)
            light, ambient = cameras.c2w[:, :, 3], torch.ones(n)
            images.append(renderer.shade(g.part, g.normal, points, palette, grey, light, ambient))
            pairs += [k * len(world.COLOURS) + j] * n
    return torch.cat(images).clamp(0, 1), torch.tensor(pairs)


def measure(scorer: Scorer, n_views: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Accuracies (all, seen, held out) by kind of picture; and by object on orbit views."""
    generator = torch.Generator().manual_seed(FRESH)
    orbit, orbit_pair = orbit_pictures(n_views, FRESH)
    source = Source(Pictures(6 * n_views, FRESH, judged_camera()), clay=0.0)
    drawn = [source.draw(64, generator) for _ in range(len(orbit) // 64)]
    clean, caption = (torch.cat(x) for x in zip(*drawn))
    name, colour = caption // len(COLOURS), caption % len(COLOURS)
    pair = name * len(world.COLOURS) + colour
    clean = clean.clamp(0, 1)
    sets = {
        "orbit views": (orbit, orbit_pair),
        "orbit views, spoilt": (spoil(orbit, generator), orbit_pair),
        "random views": (clean, pair),
        "random views, spoilt": (spoil(clean, generator), pair),
    }
    prompts = [world.prompt(c, o) for c, o in world.all_pairs()]
    held_out = torch.tensor([world.is_held_out(c, o) for c, o in world.all_pairs()])
    rows, by_object = {}, {}
    for kind, (images, truth) in sets.items():
        right = (scorer.similarities(images, prompts).argmax(1) == truth).float()
        unseen = held_out[truth]
        rows[kind] = [float(r.mean()) for r in (right, right[~unseen], right[unseen])]
        if kind == "orbit views":
            of = truth // len(world.COLOURS)
            by_object = {name: float(right[of == k].mean()) for k, name in enumerate(OBJECTS)}
    return rows, by_object


def main(run: Path = Path("runs/scorer"), views: int = 8, threads: int = 2, note: str = "") -> None:
    """Measure RUN/scorer on fresh pictures, and write its README.md. NOTE: on the training."""
    torch.set_num_threads(threads)
    folder = run / "scorer"
    scorer = Scorer(folder)
    rows, by_object = measure(scorer, views)
    config = json.loads((run / "config.json").read_text())
    last = json.loads((run / "curve.jsonl").read_text().splitlines()[-1])
    weakest = sorted(by_object, key=by_object.get)[:4]
    geometry = metrics.true_geometry(scorer)
    card = CARD.format(
        parameters=sum(p.numel() for p in scorer.model.parameters()) / 1e6,
        views=config["views_per_object"],
        width=config["width"],
        layers=config["layers"],
        rate=config["learning_rate"],
        objects=len(OBJECTS),
        pairs=len(world.all_pairs()),
        templates=len(world.TEMPLATES),
        pictures=last["pictures"],
        steps=last["step"],
        minutes=last["minutes"],
        seed=config["seed"],
        batch=config["batch"],
        note=note,
        clay=config["clay"],
        captions=len(CAPTIONS),
        geometry=statistics.fmean(geometry.values()),
        flat=", ".join(f"{o} {geometry[o]:.0%}" for o in sorted(geometry, key=geometry.get)[:4]),
        threads=config["threads"],
        rows="\n".join(
            f"| {k} | " + " | ".join(f"{v:.1%}" for v in r) + " |" for k, r in rows.items()
        ),
        weakest=", ".join(f"{o} {by_object[o]:.0%}" for o in weakest),
    )
    (folder / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    typer.run(main)
