"""From cameras to pictures: rays, march, field, composite, background."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .camera import Cameras
from .config import RenderConfig
from .field import Environment, Field
from .ops import (
    Samples,
    composite,
    generate_rays,
    march,
    occupancy_points,
    occupancy_update,
    ray_sphere_intersect,
)

MAX_CHANNELS = 8  # of composite
GREY = 0.5  # the fixed background
CAPACITY_STEP = 1 << 14  # sample buffers grow in steps of so many rows


@dataclass
class Rendering:
    """image (B, 3, H, W) in [0, 1], or latents; opacity (B, H, W) in [0, 1]; depth (B, H, W)
    = sum of w t, scene units; count (1,) int32, samples wanted; capacity, samples that fit;
    weights (capacity,) of the samples; samples, see ops.Samples."""

    image: Tensor
    opacity: Tensor
    depth: Tensor
    count: Tensor
    capacity: int
    weights: Tensor
    samples: Samples


class Renderer(nn.Module):
    """Renders a field through an occupancy grid, which it keeps up to date."""

    def __init__(self, field: Field, config: RenderConfig, generator: torch.Generator):
        super().__init__()
        self.field, self.config = field, config
        cells = config.occupancy_resolution**3
        self.register_buffer("occupancy", torch.zeros(cells))
        self.register_buffer("bitfield", torch.full((cells // 8,), 255, dtype=torch.uint8))
        self.environment = None
        if config.background == "environment":
            self.environment = Environment(config.environment_frequencies, generator)
        self.capacity = CAPACITY_STEP

    def forward(
        self,
        cameras: Cameras,
        seed: int | Tensor,
        background: Tensor | None = None,
        size: int | None = None,
        jitter: bool = True,
        latent: bool = False,
    ) -> Rendering:
        """Render B cameras. background: (B, 3) or (3,) colours in [0, 1]; without it the
        environment map, or grey. size: side of the picture, pixels. seed: of the samples' jitter
        (stratified if `jitter`, else bin centres). latent: the picture's channels are the field's
        latents, and those of the background, which must be given (B, channels)."""
        size = size or self.config.image_size
        n = len(cameras.focal)
        rays = self._rays(cameras, size)
        samples = self._march(*rays, seed, jitter, self.capacity)
        sigma, albedo = self.field(samples.positions, samples.count, latent)
        # Place of shading: albedo becomes lit colour here, once normals exist.
        colour, opacity, depth, weights = self._composite(sigma, albedo, samples)
        behind = self._background(background, rays[1], n, size)
        picture = colour + (1.0 - opacity[:, None]) * behind
        image = picture.reshape(n, size, size, -1).permute(0, 3, 1, 2).contiguous()
        return Rendering(
            image,
            opacity.reshape(n, size, size),
            depth.reshape(n, size, size),
            samples.count,
            self.capacity,
            weights,
            samples,
        )

    def _composite(self, sigma, values, samples: Samples) -> tuple[Tensor, ...]:
        """Any number of channels, as many at a time as the op takes."""
        rest = samples.t, samples.dt, samples.packed, self.config.early_stop
        parts = [composite(sigma, v.contiguous(), *rest) for v in values.split(MAX_CHANNELS, 1)]
        return torch.cat([colour for colour, *_ in parts], 1), *parts[0][1:]

    def _rays(self, cameras: Cameras, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Origins and directions (R, 3) through all pixels; distances in and out of the sphere."""
        rays_o, rays_d = generate_rays(cameras.c2w, cameras.focal * size, size, size)
        rays_o, rays_d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
        return rays_o, rays_d, *ray_sphere_intersect(rays_o, rays_d, self.field.config.radius)

    def _background(self, colour: Tensor | None, rays_d: Tensor, n: int, size: int) -> Tensor:
        if colour is not None:
            return colour.expand(n, -1).repeat_interleave(size * size, 0)
        if self.environment is not None:
            return self.environment(rays_d)
        return rays_d.new_full((1, 3), GREY)

    def _march(self, rays_o, rays_d, near, far, seed, jitter: bool, capacity: int) -> Samples:
        c = self.config
        return march(
            rays_o, rays_d, near, far, self.bitfield, c.occupancy_resolution,
            self.field.config.radius, c.step, capacity, seed, jitter,
        )  # fmt: skip

    def make_room(self, cameras: Cameras, seed: int | Tensor) -> None:
        """Fit the capacity to what these cameras need. Waits for the device."""
        rays = self._rays(cameras, self.config.image_size)
        self.fit_capacity(int(self._march(*rays, seed, True, 1).count))

    def fit_capacity(self, count: int) -> bool:
        """Make room for `count` samples and half as many more, if there is less than `count` or
        more than three times that. Whether the capacity has changed: a captured graph is then
        out of date."""
        if count <= self.capacity <= max(3 * count, CAPACITY_STEP):
            return False
        self.capacity = -(-count * 3 // (2 * CAPACITY_STEP)) * CAPACITY_STEP or CAPACITY_STEP
        return True

    @torch.no_grad()
    def update_occupancy(self, seed: int | Tensor, decay: float | None = None) -> None:
        """Refresh the grid from one random point in each cell (instant-ngp, appendix E.2)."""
        c = self.config
        points = occupancy_points(
            c.occupancy_resolution, self.field.config.radius, seed, device=self.occupancy.device
        )
        sigma, _ = self.field(points)
        occupancy_update(
            self.occupancy,
            self.bitfield,
            sigma,
            c.occupancy_decay if decay is None else decay,
            c.occupancy_threshold,
        )
