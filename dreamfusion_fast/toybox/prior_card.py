"""Ship a trained prior: `python -m dreamfusion_fast.toybox.prior_card runs/prior`.

Copies the pipeline folder to dreamfusion_fast/toybox/prior and writes its model card: data, seed,
training curve, denoising error on fresh pictures, and samples.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import typer
from diffusers import DDIMScheduler
from torch import Tensor

from .. import camera, export
from ..camera import Cameras
from ..config import toybox_camera
from ..guidance import DiffusersGuidance
from ..guidance.protocol import conditions_of
from . import PRIOR, load_prior, world
from .pictures import Pictures

SAMPLED = ("a red car", "a blue bicycle", "a green chair", "a yellow ship")
SIDES = ((0.0, 15.0), (50.0, 15.0), (90.0, 15.0), (180.0, 15.0), (300.0, 40.0), (30.0, 75.0))
FRESH_SEED = 2**20  # training never traces views with this seed


@torch.no_grad()
def sample(guide: DiffusersGuidance, prompts: list[str], cameras: Cameras, told: bool,
           scale: float, steps: int, generator: torch.Generator) -> Tensor:  # fmt: skip
    """Draw a picture (3, S, S) in [0, 1] for each prompt and camera, by DDIM (Song et al. 2021)
    with guidance (1 + scale) eps_cond - scale eps_uncond. told: whether the network knows the
    cameras. Returns (B, 3, S, S)."""
    alphas = torch.cat((guide.alphas_cumprod.new_ones(1), guide.alphas_cumprod))
    scheduler = DDIMScheduler(trained_betas=(1 - alphas[1:] / alphas[:-1]).tolist())
    scheduler.set_timesteps(steps)
    cond = guide.embed(prompts)
    text = torch.cat((cond, guide.embed([""]).expand_as(cond)))
    both = conditions_of(text, cameras, 2, told)
    z = guide.encode(torch.zeros(len(prompts), 3, guide.image_size, guide.image_size))
    z = torch.randn(z.shape, generator=generator)
    for t in scheduler.timesteps:
        at = torch.full((2 * len(z),), int(t))
        eps_cond, eps_uncond = guide.predict_noise(torch.cat((z, z)), at, both).chunk(2)
        z = scheduler.step((1 + scale) * eps_cond - scale * eps_uncond, t, z).prev_sample
    return guide.decode(z).clamp(0.0, 1.0)


@torch.no_grad()
def denoising_error(
    guide: DiffusersGuidance, pictures: Pictures, held_out: bool, told: bool
) -> list[float]:
    """Mean squared error of the clean picture that the network guesses, in [-1, 1], at t = 300, 600
    and 900, on 240 pictures of fresh views. told: whether it knows their cameras."""
    generator = torch.Generator().manual_seed(1)
    errors = []
    for step in (300, 600, 900):
        parts = []
        for _ in range(4):
            batch = pictures.draw(60, generator, held_out=held_out, clay=0.0)
            z = guide.encode(batch.images)
            noise = torch.randn(z.shape, generator=generator)
            t = torch.full((len(z),), step)
            alpha2 = guide.alphas_cumprod[step]
            z_t = alpha2.sqrt() * z + (1 - alpha2).sqrt() * noise
            conditions = conditions_of(guide.embed(batch.prompts), batch.cameras, 1, told)
            predicted = guide.predict_noise(z_t, t, conditions)
            parts.append((predicted - noise).square().mean() * (1 - alpha2) / alpha2)
        errors.append(float(torch.stack(parts).mean()))
    return errors


def card(config: dict, curve: list[dict], errors: dict[str, list[float]]) -> str:
    """The model card, Markdown."""
    every = max(1, len(curve) // 12)
    kept = curve[::every] + ([curve[-1]] if (len(curve) - 1) % every else [])
    rows = [f"| {r['step']} | {r['pictures']} | {r['loss']:.4f} |" for r in kept]
    held_out = ", ".join(f"{c} {o}" for c, o in world.all_pairs() if world.is_held_out(c, o))
    tested = [f"| {k} | " + " | ".join(f"{e:.4f}" for e in v) + " |" for k, v in errors.items()]
    return "\n".join([
        "# The toybox prior", "",
        "A 64x64 pixel diffusion model, conditioned on words and on the camera, in diffusers' own "
        "format (UNet2DConditionModel on the 4-fold pixel-unshuffled picture, with the camera as "
        "its class embedding of type projection; CLIPTextModel; v-prediction; cosine schedule "
        "shifted to more noise), trained from scratch by "
        "`python -m dreamfusion_fast.toybox.train_prior` on pictures that "
        "`dreamfusion_fast/toybox` renders. It knows nothing of any real picture.", "",
        "![samples](samples.png)", "",
        "Samples (CFG 3, DDIM, 25 steps) of " + ", ".join(SAMPLED) + ", a row each, from six "
        "cameras: azimuth and elevation "
        + ", ".join(f"{a:.0f}° {e:.0f}°" for a, e in SIDES)
        + ". The last row is the first without the camera: by words alone.", "",
        "## Training", "", "```", json.dumps(config, indent=1), "```", "",
        "| step | pictures | v loss |", "|---|---|---|", *rows, "",
        "## Error of the guessed clean picture, fresh views", "",
        "Mean squared, of colours in [-1, 1].", "",
        "| pairs | t = 300 | t = 600 | t = 900 |", "|---|---|---|---|", *tested, "",
        "## Pairs held out of training", "", held_out + ".", ""])  # fmt: skip


def samples(guide: DiffusersGuidance) -> Tensor:
    """Pictures of SAMPLED from SIDES, told the camera; then of the first one by words alone."""
    views = [camera.orbit([a], e, 1.4, 1.0) for a, e in SIDES]
    cameras = Cameras(*(torch.cat(x) for x in zip(*(vars(v).values() for v in views))))
    words = [world.VIEWS[i] for i in cameras.view_index().tolist()]
    rows = [(text, True) for text in SAMPLED] + [(SAMPLED[0], False)]
    return torch.cat([
        sample(guide, [world.with_view(text, view) for view in words], cameras, told, 3.0, 25,
               torch.Generator().manual_seed(0))
        for text, told in rows
    ])  # fmt: skip


def main(run: Path) -> None:
    """Ship the prior that lies in RUN."""
    shutil.rmtree(PRIOR, ignore_errors=True)
    shutil.copytree(run / "pipeline", PRIOR)
    guide, pictures = load_prior(), Pictures(10, FRESH_SEED, toybox_camera())
    errors = {
        f"{'held out' if held_out else 'trained'}, {'camera' if told else 'words alone'}":
            denoising_error(guide, pictures, held_out, told)
        for told in (True, False) for held_out in (False, True)
    }  # fmt: skip
    export.write_png(export.tiled(samples(guide), len(SIDES)), PRIOR / "samples.png")
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    curve = list({row["step"]: row for row in rows}.values())  # a resumed run repeats some steps
    config = json.loads((run / "config.json").read_text())
    (PRIOR / "README.md").write_text(card(config, sorted(curve, key=lambda r: r["step"]), errors))
    typer.echo(f"wrote {PRIOR}: {errors}")


if __name__ == "__main__":
    typer.run(main)
