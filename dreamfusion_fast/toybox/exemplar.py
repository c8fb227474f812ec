"""Guidance by the exact score of a finite set of pictures: no network, no training.

For pictures x_i the ideal denoiser is E[x0 | z_t] = sum_i softmax_i(-|z_t - alpha x_i|² / 2
sigma²) x_i (Karras et al. 2022, appendix B.3). It is the oracle for tests of the whole loop.
"""

from __future__ import annotations

import zlib

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from . import world
from .pictures import SIZE, Pictures
from .shapes import OBJECTS


class ExemplarGuidance:
    """Exact guidance over `n` pictures of an object per view-dependent prompt.

    The pictures are albedo renderings on `background`. An embedding is the row number of a view's
    set, (B,) int64.
    """

    image_size = SIZE

    def __init__(self, device="cpu", n: int = 4096, seed: int = 0,
                 background: tuple[float, float, float] = (0.5, 0.5, 0.5)):
        self.device, self.n, self.seed = torch.device(device), n, seed
        self.background = torch.tensor(background)
        self.sets: dict[str, Tensor] = {}
        schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)

    def embed(self, prompts: list[str]) -> Tensor:
        """Render each prompt's set of pictures, once. Raises ValueError for a prompt that the
        toybox cannot mean, or that names no colour."""
        for text in prompts:
            if text not in self.sets:
                world.check_prompt(text)
                self._render_sets(text)
        names = list(self.sets)
        return torch.tensor([names.index(p) for p in prompts], device=self.device)

    def _render_sets(self, text: str) -> None:
        colour, name = world.parse(text)
        if colour is None:
            raise ValueError(f"argument `prompt`: expected a colour of {', '.join(world.COLOURS)}, "
                             f"got {text!r}")
        base = text.split(",")[0]
        pictures = Pictures(self.n, self.seed, objects=[name])
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(base.encode()))
        images = [pictures.render(i, pictures.palettes[colour, name].expand(len(i), -1, -1),
                                  torch.zeros(len(i), dtype=torch.bool), generator,
                                  self.background)
                  for i in torch.arange(self.n).split(64)]
        flat = torch.cat(images).flatten(1).to(self.device) * 2.0 - 1.0
        view = pictures.views["view"].to(self.device)
        self.sets[base] = flat
        for k, word in enumerate(world.VIEWS):
            self.sets[world.with_view(base, word)] = flat[view == k]

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, 64, 64) in [0, 1] to [-1, 1]."""
        return image * 2.0 - 1.0

    def decode(self, z: Tensor) -> Tensor:
        return (z + 1.0) / 2.0

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        sets = list(self.sets.values())
        return torch.stack([self._score(z, self.alphas_cumprod[i], sets[k])
                            for z, i, k in zip(z_t, t, embedding.tolist())])

    @staticmethod
    def _score(z: Tensor, alpha2: Tensor, pictures: Tensor) -> Tensor:
        alpha, sigma2 = alpha2.sqrt(), 1.0 - alpha2
        flat = z.flatten()
        # |z - alpha x|² without its part that is the same for all pictures.
        distance = alpha2 * pictures.square().sum(1) - 2.0 * alpha * (pictures @ flat)
        x0 = (torch.softmax(-distance / (2.0 * sigma2), 0) @ pictures).view_as(z)
        return (z - alpha * x0) / sigma2.sqrt()
