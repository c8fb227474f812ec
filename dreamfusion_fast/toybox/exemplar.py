"""Guidance by the exact score of a finite set of pictures: no network, no training.

For pictures x_i the ideal denoiser is E[x0 | z_t] = sum_i softmax_i(-|z_t - alpha x_i|² / 2
sigma²) x_i (Karras et al. 2022, appendix B.3). The pictures are those of the prompt's true object
from the very camera that is guided, under several lights: the oracle for tests of the whole loop,
and what SDS can reach when the prior knows everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from ..camera import Cameras
from . import renderer, world
from .pictures import SIZE, pinhole_rays


class ExemplarGuidance:
    """Exact guidance towards one toybox object, for the cameras given by set_cameras.

    Args:
        device: where scores are computed.
        lights: pictures of each view beside the plain albedo, each lit from another place.
    """

    image_size = SIZE

    def __init__(self, device="cpu", lights: int = 2):
        self.device, self.lights = torch.device(device), lights
        schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)
        self.pictures: Tensor | None = None  # (B, lights + 1, 3 * 64 * 64) in [-1, 1]

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
        return torch.zeros(len(prompts), 1, device=self.device)

    def set_cameras(self, cameras: Cameras, background: Tensor, generator: torch.Generator) -> None:
        """Render the pictures of B cameras, before `background` (B, 3) colours in [0, 1]."""
        rays_o, rays_d = pinhole_rays(cameras, 2 * SIZE)
        g = renderer.trace(self.name, rays_o, rays_d)
        points = rays_o + g.depth.float()[..., None] * rays_d
        n = len(rays_o)
        pictures = []
        for k in range(self.lights + 1):
            toward = cameras.c2w[:, :, 3] + torch.randn(n, 3, generator=generator)
            pictures.append(
                renderer.shade(
                    g.part,
                    g.normal,
                    points,
                    self.palette.expand(n, -1, -1),
                    background[:, None, None],
                    1.2 * F.normalize(toward, dim=-1),
                    torch.full((n,), 0.4 if k else 1.0),
                )
            )
        stacked = torch.stack(pictures, 1).flatten(2)
        self.pictures = stacked.to(self.device) * 2.0 - 1.0

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, 64, 64) in [0, 1] to [-1, 1]."""
        return image * 2.0 - 1.0

    def predict(self, z_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        """The exact noise, z_t (B, 3, 64, 64), t (B,)."""
        noise = exact_noise(z_t.flatten(1), self.alphas_cumprod[t], self.pictures)
        return noise.view_as(z_t)


def exact_noise(z: Tensor, alpha2: Tensor, pictures: Tensor) -> Tensor:
    """E[eps | z_t] over equally likely pictures. z (B, D), alpha2 (B,), pictures (B, K, D)."""
    alpha, sigma2 = alpha2.sqrt()[:, None], 1.0 - alpha2[:, None]
    distance = (z[:, None] - alpha[..., None] * pictures).square().sum(-1)
    share = torch.softmax(-distance / (2.0 * sigma2), dim=1)
    x0 = (share[..., None] * pictures).sum(1)
    return (z - alpha * x0) / sigma2.sqrt()
