"""From cameras to pictures: rays, march, field, light, composite, background."""

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
    composite_lit,
    generate_rays,
    march,
    occupancy_points,
    occupancy_update,
    ray_sphere_intersect,
)

MAX_CHANNELS = 8  # of composite
TINY = 1e-30  # density whose logarithm is taken, at least: rows past the count have 0
CAPACITY_STEP = 1 << 14  # sample buffers grow in steps of so many rows


@dataclass
class Rendering:
    """image (B, 3, H, W) in [0, 1], or latents; opacity (B, H, W) in [0, 1]; depth (B, H, W)
    = sum of w t, scene units; weights (S,) w of the samples; capacity, samples that fit. With
    light also normal (B, 3, H, W) = sum of w n, and orientation (B, H, W), the sum over a ray's
    samples of w max(0, n·d)² for the orientation loss."""

    image: Tensor
    opacity: Tensor
    depth: Tensor
    weights: Tensor
    samples: Samples
    capacity: int
    normal: Tensor | None = None
    orientation: Tensor | None = None


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
        self.learned = nn.Parameter(torch.zeros(3)) if config.background == "learned" else None
        backdrop = torch.tensor(config.backdrop)
        self.register_buffer("backdrop", backdrop, persistent=False)
        self.capacity = CAPACITY_STEP

    def forward(
        self,
        cameras: Cameras,
        seed: int | Tensor,
        background: Tensor | None = None,
        size: int | None = None,
        jitter: bool = True,
        latent: bool = False,
        shading: Tensor | None = None,
    ) -> Rendering:
        """Render B cameras. background: (B, 3) or (3,) colours in [0, 1]; without it the
        environment map, or the learned, or the solid colour. size: side of the picture, pixels.
        seed: of the samples' jitter (stratified if `jitter`, else bin centres). latent: the
        picture's channels are the field's latents, and those of the background, which must be
        given (B, channels). shading: (B, 7) as `shading.sample` makes it, how each view is lit;
        None: albedo, and no normals."""
        size = size or self.config.image_size
        n = len(cameras.focal)
        rays = rays_o, rays_d, *_ = self._rays(cameras, size)
        samples = self._march(*rays, seed, jitter, self.capacity)
        sigma, albedo, gradient = self._query(samples, latent, shading is not None)
        if shading is None:
            colour, opacity, depth, weights = self._composite(sigma, albedo, samples)
            of_light = ()
        else:
            colour, opacity, depth, weights, *of_light = composite_lit(
                sigma, albedo, gradient, samples.t, samples.dt, samples.packed, rays_o, rays_d,
                shading, self.config.early_stop,
            )  # fmt: skip
        behind = self._background(background, rays_d, n, size)
        image = colour + (1.0 - opacity[:, None]) * behind

        def as_pictures(x: Tensor) -> Tensor:
            if x.ndim == 1:
                return x.reshape(n, size, size)
            return x.reshape(n, size, size, -1).permute(0, 3, 1, 2).contiguous()

        pictures = [as_pictures(x) for x in (image, opacity, depth)]
        return Rendering(*pictures, weights, samples, self.capacity, *map(as_pictures, of_light))

    def _query(self, samples: Samples, latent: bool, normals: bool):
        """Density, albedo and, with `normals`, the gradient of log density at the samples."""
        x, count, c = samples.positions, samples.count, self.config
        if not normals or c.normals == "analytic":
            return self.field(x, count, latent, normals)
        steps = c.epsilon * torch.eye(3, device=x.device)
        ends = [
            [
                self.field((x + sign * step).contiguous(), count)[0].clamp(min=TINY).log()
                for sign in (1, -1)
            ]
            for step in steps
        ]
        gradient = torch.stack([high - low for high, low in ends], 1) / (2.0 * c.epsilon)
        return *self.field(x, count, latent)[:2], gradient.contiguous()

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
        return self.backdrop.expand(1, 3) if self.learned is None else self.learned.sigmoid()[None]

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
        sigma = self.field(points)[0]
        occupancy_update(
            self.occupancy,
            self.bitfield,
            sigma,
            c.occupancy_decay if decay is None else decay,
            c.occupancy_threshold,
        )
