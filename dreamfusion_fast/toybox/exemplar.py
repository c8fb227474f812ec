"""Guidance by the exact score of a finite set of pictures: no network, no training.

For pictures x_i the ideal denoiser is E[x0 | z_t] = sum_i softmax_i(-|z_t - alpha x_i|² / 2
sigma²) x_i (Karras et al. 2022, appendix B.3). The pictures are those of the prompt's true object
from the very camera that is guided, under several lights: the oracle for tests of the whole loop,
and what SDS can reach when the prior knows everything. A prompt without view words knows less: its
pictures are from all around, at the camera's elevation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from ..camera import Cameras, turned
from ..guidance.protocol import Conditions
from . import renderer, world
from .pictures import SIZE, pinhole_rays

AROUND = 4  # sides of a prompt without view words


class ExemplarGuidance:
    """Exact guidance towards one toybox object, for the cameras given by set_cameras.

    Args:
        device: where scores are computed.
        lights: pictures of each view beside the one lit as the view is, each from another place.
    """

    image_size = SIZE

    def __init__(self, device="cpu", lights: int = 2):
        self.device, self.lights = torch.device(device), lights
        schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)
        self.pictures: Tensor | None = None  # (B, K, 3 * 64 * 64) in [-1, 1]

    def embed(self, prompts: list[str]) -> Tensor:
        """Take the object from the prompts, which must agree on it; the embeddings, (B, 1) zeros,
        say nothing more. Raises ValueError for a prompt that the toybox cannot mean, or that names
        no colour."""
        for text in prompts:
            world.check_prompt(text)
            colour, name = world.parse(text)
            if colour is None:
                raise ValueError(
                    f"argument `prompt`: expected a colour of "
                    f"{', '.join(world.COLOURS)}, got {text!r}"
                )
            self.name, self.palette = name, renderer.palette(name, world.COLOURS[colour])
        self.around = 1 if any("view" in text for text in prompts) else AROUND
        return torch.zeros(len(prompts), 1, device=self.device)

    def set_cameras(
        self,
        cameras: Cameras,
        background: Tensor,
        generator: torch.Generator,
        shading: Tensor | None = None,
    ) -> None:
        """Render the pictures of B cameras, before `background` (B, 3) colours in [0, 1]; shading
        (B, 7) as shading.sample makes it, None: albedo."""
        n, sides = len(cameras.focal), []
        for k in range(self.around):
            sides.append(self._view(turned(cameras, 360.0 * k / self.around), shading, generator,
                                    background[:, None, None]))  # fmt: skip
        self.pictures = torch.cat(sides, 1).reshape(n, -1, 3 * SIZE**2).to(self.device) * 2 - 1

    def _view(self, cameras: Cameras, shading, generator, background) -> Tensor:
        """(B, lights + 1, 3, 64, 64): lit as `shading` says, and from other places."""
        n = len(cameras.focal)
        if shading is None:
            shading = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]).expand(n, 7)
        rays_o, rays_d = pinhole_rays(cameras, 2 * SIZE)
        g = renderer.trace(self.name, rays_o, rays_d)
        points = rays_o + g.depth.float()[..., None] * rays_d
        palettes = shading[:, 5, None, None] * self.palette + shading[:, 6, None, None]
        lights = [(shading[:, :3], shading[:, 3], shading[:, 4])]
        for _ in range(self.lights):
            toward = cameras.c2w[:, :, 3] + torch.randn(n, 3, generator=generator)
            lights.append((1.2 * F.normalize(toward, dim=-1), torch.full((n,), 0.4), None))
        pictures = [
            renderer.shade(g.part, g.normal, points, palettes, background, *light)
            for light in lights
        ]
        return torch.stack(pictures, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, 64, 64) in [0, 1] to [-1, 1]."""
        return image * 2.0 - 1.0

    def predict(self, z_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The exact noise, z_t (B, 3, 64, 64), t (B,); set_cameras said under what conditions."""
        noise = exact_noise(z_t.flatten(1), self.alphas_cumprod[t], self.pictures)
        return noise.view_as(z_t)


def exact_noise(z: Tensor, alpha2: Tensor, pictures: Tensor) -> Tensor:
    """E[eps | z_t] over equally likely pictures. z (B, D), alpha2 (B,), pictures (B, K, D)."""
    alpha, sigma2 = alpha2.sqrt()[:, None], 1.0 - alpha2[:, None]
    distance = (z[:, None] - alpha[..., None] * pictures).square().sum(-1)
    share = torch.softmax(-distance / (2.0 * sigma2), dim=1)
    x0 = (share[..., None] * pictures).sum(1)
    return (z - alpha * x0) / sigma2.sqrt()
