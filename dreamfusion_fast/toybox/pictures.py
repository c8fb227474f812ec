"""Training pictures of the toybox: views traced once, coloured, lit, captioned at random."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import camera
from ..config import CameraConfig
from . import renderer, world
from .shapes import OBJECTS

SIZE = 64  # pixels; traced at twice that and box filtered


def pinhole_rays(cameras: camera.Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions (B, size, size, 3) through the pixels' centres."""
    from ..ops import reference

    return reference.generate_rays(cameras.c2w, cameras.focal * size, size, size)


def traced_views(name: str, n: int, seed: int, cameras: CameraConfig) -> dict[str, Tensor]:
    """n views of one object, as tensors keyed part, normal, depth (renderer.GBuffer's), c2w, focal,
    elevation, azimuth (camera.Cameras')."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    drawn = camera.sample(n, cameras, generator)
    rays_o, rays_d = pinhole_rays(drawn, 2 * SIZE)
    chunks = [renderer.trace(name, o, d) for o, d in zip(rays_o.split(16), rays_d.split(16))]
    views = {k: torch.cat([getattr(c, k) for c in chunks]) for k in ("part", "normal", "depth")}
    return views | vars(drawn)


@dataclass
class Batch:
    """Pictures as training takes them: images (n, 3, 64, 64) in [0, 1], their n prompts, and the
    cameras that took them."""

    images: Tensor
    prompts: list[str]
    cameras: camera.Cameras


class Pictures:
    """An endless source of (images, prompts) drawn from `views_per_object` views, traced from
    random `cameras`."""

    def __init__(
        self,
        views_per_object: int,
        seed: int,
        cameras: CameraConfig,
        objects: list[str] | None = None,
    ):
        self.objects = objects or list(OBJECTS)
        views = [traced_views(o, views_per_object, seed, cameras) for o in self.objects]
        self.per_object = views_per_object
        self.views = {k: torch.cat([v[k] for v in views]) for k in views[0]}
        self.colours = list(world.COLOURS)
        self.palettes = {
            (c, o): renderer.palette(o, rgb)
            for o in self.objects
            for c, rgb in world.COLOURS.items()
        }
        self.clay = torch.tensor(world.CLAY).expand(256, 3)

    def draw(
        self, n: int, generator: torch.Generator, held_out: bool = False, clay: float = 0.15
    ) -> Batch:
        """n pictures. `held_out` draws from the pairs that training never sees instead of from the
        others; `clay` is the textureless share."""
        index = torch.randint(len(self.views["part"]), (n,), generator=generator)
        u = torch.rand(n, 4, generator=generator)
        cameras = self.cameras(index)
        seen = cameras.view_index().tolist()
        palettes, prompts = [], []
        for i in range(n):
            name = self.objects[int(index[i]) // self.per_object]
            choices = [c for c in self.colours if world.is_held_out(c, name) == held_out]
            colour = choices[int(u[i, 0] * len(choices))]
            textureless = bool(u[i, 1] < clay)
            palettes.append(self.clay if textureless else self.palettes[colour, name])
            view = camera.VIEWS[seen[i]]
            prompts.append(_caption(colour, name, view, textureless, u[i, 2:].tolist()))
        ambient = torch.where(u[:, 1] < clay + 0.35, 0.1, 1.0)
        images = self.render(index, torch.stack(palettes), ambient, generator)
        flip = torch.rand(n, generator=generator) < 0.5  # the world is symmetric in y
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return Batch(images, prompts, _where(flip, camera.mirrored(cameras), cameras))

    def cameras(self, index: Tensor) -> camera.Cameras:
        """Of the views `index` (n,)."""
        return camera.Cameras(
            *(self.views[k][index] for k in ("c2w", "focal", "elevation", "azimuth"))
        )

    def render(
        self,
        index: Tensor,
        palettes: Tensor,
        ambient: Tensor,
        generator: torch.Generator,
        background: Tensor | None = None,
    ) -> Tensor:
        """Shade the views `index` (n,) with the paper's light, so much of it ambient, (n,), before
        `background` (3,) or, by default, random ones."""
        n = len(index)
        v = {k: self.views[k][index] for k in ("part", "normal", "depth")}
        cameras = self.cameras(index)
        rays_o, rays_d = pinhole_rays(cameras, 2 * SIZE)
        points = rays_o + v["depth"].float()[..., None] * rays_d
        toward = F.normalize(cameras.c2w[:, :, 3] + torch.randn(n, 3, generator=generator), dim=-1)
        light = toward * (0.8 + 0.7 * torch.rand(n, 1, generator=generator))
        if background is None:
            background = _backgrounds(n, generator)
        return renderer.shade(v["part"], v["normal"], points, palettes, background, light, ambient)


def _where(chosen: Tensor, a: camera.Cameras, b: camera.Cameras) -> camera.Cameras:
    """a's cameras where `chosen` (n,), else b's."""
    return camera.Cameras(
        *(
            torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x, y)
            for x, y in zip(vars(a).values(), vars(b).values())
        )
    )


def _caption(colour: str, name: str, view: str, textureless: bool, u: list[float]) -> str:
    if textureless:
        text = world.caption(world.CLAY_TEMPLATE, name)
    elif u[0] < 0.05:
        text = world.caption(world.PLAIN_TEMPLATE, name)
    else:  # half the captions take the canonical form
        other = int((u[0] - 0.5) / 0.5 * len(world.TEMPLATES)) if u[0] > 0.5 else 0
        text = world.caption(world.TEMPLATES[other], name, colour)
    return world.with_view(text, view) if u[1] < 0.85 else text


def _backgrounds(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2 SIZE, 2 SIZE, 3): a plain colour, or for one in four a vertical gradient."""
    top = torch.rand(n, 1, 1, 3, generator=generator)
    grey = torch.rand(n, 1, 1, 1, generator=generator)
    kind = torch.rand(n, 1, 1, 1, generator=generator)
    top = torch.where(kind < 0.3, grey.expand_as(top), top)
    bottom = torch.where(kind > 0.75, torch.rand(n, 1, 1, 3, generator=generator), top)
    ramp = torch.linspace(0, 1, 2 * SIZE)[None, :, None, None]
    return (top + ramp * (bottom - top)).expand(n, 2 * SIZE, 2 * SIZE, 3)
