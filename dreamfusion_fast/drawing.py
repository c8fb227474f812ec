"""What is random or scheduled in a step, drawn on the host from the seed and the step alone.

The rest of the step then runs on the device without asking the host for anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import camera, losses, sds, shading
from .config import RunConfig
from .guidance.protocol import Conditions, conditions_of
from .optimizers import rate_share
from .prompting import Prompts


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF_FFFF)


@dataclass
class Draw:
    """What is random or scheduled in one pass, on the device. seeds: (2,) int64, of the samples and
    of the noise; t: (B,), None without diffusion; shading: (B, 7), see shading.sample, of which any
    row is `lit`; conditions: of all predictions; negative_weights: see prompting.Prompts; rate:
    (1,), factor of the learning rates; losses: (7,), see losses.weights_at; progress: (1,), share
    of the run."""

    cameras: camera.Cameras
    background: Tensor | None
    seeds: Tensor
    t: Tensor | None
    shading: Tensor
    lit: bool
    conditions: Conditions
    negative_weights: Tensor | None
    rate: Tensor
    losses: Tensor
    progress: Tensor

    def copy_(self, other: Draw) -> None:
        """Take the other's numbers, in the same places."""
        mine, others = (
            [*vars(x.cameras).values(), *x.conditions.tensors(), *vars(x).values()]
            for x in (self, other)
        )
        for old, new in zip(mine, others, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new, non_blocking=True)
        self.lit = other.lit


class Drawing:
    """Makes Draws.

    Args:
        config: of the run.
        guidance: is told what comes, if it has set_cameras.
        prompts, schedule: choose embeddings and t; schedule None: no diffusion.
        colour_map: matrix and bias from colours to the guidance's latents, if those are rendered.
        device: where a Draw lies.
    """

    def __init__(
        self,
        config: RunConfig,
        guidance,
        prompts: Prompts,
        schedule: sds.Schedule | None,
        colour_map: tuple[Tensor, Tensor] | None,
        device: torch.device,
    ):
        self.config, self.guidance, self.prompts = config, guidance, prompts
        self.schedule, self.colour_map, self.device = schedule, colour_map, device
        self.takes_camera = getattr(guidance.guide, "takes_camera", False)
        if config.guidance.camera and not self.takes_camera:
            raise ValueError(
                "config `guidance.camera`: expected false, as the guidance's network takes no "
                "camera (a prior that was trained on words alone?), got true"
            )

    def __call__(self, step: int, generator: torch.Generator) -> Draw:
        c, share = self.config, step / self.config.steps
        cameras = camera.sample(c.views, c.camera, generator)
        background = None
        if c.render.background == "random":  # random colours tell the model what is transparent
            background = torch.rand(c.views, 3, generator=generator)
        if self.colour_map is not None:
            matrix, bias = self.colour_map
            background = background @ matrix.T + bias
        light = shading.sample(cameras, c.shading, share, generator)
        if hasattr(self.guidance.guide, "set_cameras"):
            self.guidance.set_cameras(cameras, background, generator, light)
        t = None if self.schedule is None else self.schedule.draw(c.views, share, generator)
        text, negative_weights = self.prompts(cameras, shading.is_textureless(light))
        there = cameras.to(self.device)
        conditions = Conditions(text)
        if self.takes_camera:
            told = c.guidance.camera is not False
            conditions = conditions_of(
                text, there, len(text) // c.views, told, self.guidance.unconditional_camera
            )
        return Draw(
            there,
            None if background is None else self._there(background),
            self.seeds(generator, 2),
            None if t is None else self._there(t),
            self._there(light),
            bool(shading.is_lit(light).any()),
            conditions,
            negative_weights,
            self._there(torch.tensor([rate_share(step, c)])),
            self._there(losses.weights_at(c.loss, share)),
            self._there(torch.tensor([share])),
        )

    def seeds(self, generator: torch.Generator, n: int) -> Tensor:
        """(n,) int64."""
        return self._there(torch.randint(2**62, (n,), generator=generator))

    def _there(self, x: Tensor) -> Tensor:
        """On the device, without waiting for what it does: the host may draw steps ahead."""
        return x.to(self.device, non_blocking=True)
