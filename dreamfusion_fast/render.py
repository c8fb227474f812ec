"""From cameras to pictures: rays, march, field, composite, background."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .camera import Cameras
from .config import RenderConfig
from .field import Environment, Field
from .ops import (
    composite,
    generate_rays,
    march,
    occupancy_points,
    occupancy_update,
    ray_sphere_intersect,
)

GREY = 0.5  # the fixed background
CAPACITY_STEP = 1 << 14  # sample buffers grow in steps of so many rows


@dataclass
class Rendering:
    """image (B, 3, H, W) in [0, 1]; opacity (B, H, W) in [0, 1]; depth (B, H, W) = sum of w t,
    scene units; count (1,) int32, samples wanted; capacity, samples there was room for."""

    image: Tensor
    opacity: Tensor
    depth: Tensor
    count: Tensor
    capacity: int


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
        seed: int,
        background: Tensor | None = None,
        size: int | None = None,
        jitter: bool = True,
    ) -> Rendering:
        """Render B cameras. background: (B, 3) or (3,) colours in [0, 1]; without it the
        environment map, or grey. size: side of the picture, pixels. seed: of the samples' jitter
        (stratified if `jitter`, else bin centres)."""
        size = size or self.config.image_size
        n = len(cameras.focal)
        rays_o, rays_d = generate_rays(cameras.c2w, cameras.focal * size, size, size)
        rays_o, rays_d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
        radius = self.field.config.radius
        near, far = ray_sphere_intersect(rays_o, rays_d, radius)
        samples = self._march(rays_o, rays_d, near, far, seed, jitter)
        sigma, albedo = self.field(samples.positions, samples.count)
        # Place of shading: albedo becomes lit colour here, once normals exist.
        colour, opacity, depth, _ = composite(
            sigma, albedo, samples.t, samples.dt, samples.packed, self.config.early_stop
        )
        behind = self._background(background, rays_d, n, size)
        picture = colour + (1.0 - opacity[:, None]) * behind
        image = picture.reshape(n, size, size, 3).permute(0, 3, 1, 2).contiguous()
        return Rendering(
            image,
            opacity.reshape(n, size, size),
            depth.reshape(n, size, size),
            samples.count,
            self.capacity,
        )

    def _background(self, colour: Tensor | None, rays_d: Tensor, n: int, size: int) -> Tensor:
        if colour is not None:
            return colour.expand(n, 3).repeat_interleave(size * size, 0)
        if self.environment is not None:
            return self.environment(rays_d)
        return rays_d.new_full((1, 3), GREY)

    def _march(self, rays_o, rays_d, near, far, seed: int, jitter: bool):
        """Samples of all rays. On the CPU, where reading the count waits for nothing, the buffer
        follows the need; on a GPU it keeps its size, and Rendering tells what was lost."""

        def samples():
            return march(
                rays_o,
                rays_d,
                near,
                far,
                self.bitfield,
                self.config.occupancy_resolution,
                self.field.config.radius,
                self.config.step,
                self.capacity,
                seed,
                jitter,
            )

        found = samples()
        if rays_o.device.type == "cpu":
            wanted, room = int(found.count), self.capacity
            if wanted > room or wanted < room // 2:
                self.fit_capacity(wanted)
            if wanted > room:
                return samples()
        return found

    def fit_capacity(self, count: int) -> None:
        """Make room for `count` samples and a quarter more."""
        self.capacity = -(-count * 5 // (4 * CAPACITY_STEP)) * CAPACITY_STEP or CAPACITY_STEP

    @torch.no_grad()
    def update_occupancy(self, seed: int, decay: float | None = None) -> None:
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
