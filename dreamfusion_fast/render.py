"""From cameras to pictures: rays, march, field, light, composite, background."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .camera import Cameras
from .config import RenderConfig
from .field import Environment, Field
from .ops import (
    Composited,
    Grid,
    Rays,
    Samples,
    composite_samples,
    generate_rays,
    march,
    occupancy_points,
    occupancy_update,
    ray_sphere_intersect,
    render,
)

TINY = 1e-30  # density whose logarithm is taken, at least: rows past the count have 0
NO_LIMIT = 2**31 - 1  # of samples
CAPACITY_STEP = 1 << 14  # sample buffers grow in steps of so many rows


@dataclass
class Rendering:
    """image (B, 3, H, W) in [0, 1], or latents; opacity (B, H, W) in [0, 1]; depth (B, H, W)
    = sum of w t, scene units; count (1,) int32, samples demanded; capacity, samples that fit. With
    light also normal (B, 3, H, W) = sum of w n, and orientation (B, H, W), the sum over a ray's
    samples of w max(0, n·d)² for the orientation loss. samples, and their w, weights (S,): None
    where the picture was made in batches, which keep none."""

    image: Tensor
    opacity: Tensor
    depth: Tensor
    count: Tensor
    capacity: int
    normal: Tensor | None = None
    orientation: Tensor | None = None
    samples: Samples | None = None
    weights: Tensor | None = None


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
        keep_samples: bool = False,
    ) -> Rendering:
        """Render B cameras. background: (B, 3) or (3,) colours in [0, 1]; without it the
        environment map, or the learned, or the solid colour. size: side of the picture, pixels.
        seed: of the samples' jitter (stratified if `jitter`, else bin centres). latent: the
        picture's channels are the field's latents, and those of the background, which must be
        given (B, channels). shading: (B, 7) as `shading.sample` makes it, how each view is lit;
        None: albedo, and no normals. keep_samples: also where the capacity is above config.rows,
        from which on pictures are otherwise made in batches (ops.render)."""
        size = size or self.config.image_size
        n = len(cameras.focal)
        rays = self._rays(cameras, size)
        query = partial(self._query, latent=latent, normals=shading is not None)
        of_samples = ()
        if self.batched and not keep_samples:
            out, capacity = self._in_batches(query, rays, seed, jitter, shading), NO_LIMIT
        else:
            samples, capacity = self._march(rays, seed, jitter, self.capacity), self.capacity
            early_stop = self.config.early_stop
            of_rays = composite_samples(query, samples, rays, early_stop, shading)
            colour, opacity, depth, weights, *light = of_rays
            out = Composited(colour, opacity, depth, samples.count, *light)
            of_samples = samples, weights
        behind = self._background(background, rays.d, n, size)
        image = out.colour + (1.0 - out.opacity[:, None]) * behind

        def as_pictures(x: Tensor | None) -> Tensor | None:
            if x is None or x.ndim == 1:
                return x if x is None else x.reshape(n, size, size)
            return x.reshape(n, size, size, -1).permute(0, 3, 1, 2).contiguous()

        pictures = [as_pictures(x) for x in (image, out.opacity, out.depth)]
        light = as_pictures(out.normal), as_pictures(out.orientation)
        return Rendering(*pictures, out.count, capacity, *light, *of_samples)

    @property
    def batched(self) -> bool:
        """Whether there are so many samples that pictures are made in batches."""
        return self.capacity > self.config.rows

    def _in_batches(self, query, rays: Rays, seed, jitter: bool, shading) -> Composited:
        c, radius = self.config, self.field.config.radius
        bins = math.ceil(2.0 * radius / c.step) + 1  # across the bounding sphere
        parameters = list(self.field.parameters())
        return render(
            query, parameters, rays, self._grid(), seed, jitter, c.early_stop, shading, c.rows, bins
        )  # fmt: skip

    def _query(self, x: Tensor, count: Tensor, latent: bool, normals: bool):
        """Density, albedo and, with `normals`, the gradient of log density at the samples."""
        c = self.config
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

    def _rays(self, cameras: Cameras, size: int) -> Rays:
        """Through all pixels, in and out of the bounding sphere."""
        rays_o, rays_d = generate_rays(cameras.c2w, cameras.focal * size, size, size)
        rays_o, rays_d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
        span = ray_sphere_intersect(rays_o, rays_d, self.field.config.radius)
        return Rays(rays_o, rays_d, *span)

    def _grid(self) -> Grid:
        c = self.config
        return Grid(self.bitfield, c.occupancy_resolution, self.field.config.radius, c.step)

    def _background(self, colour: Tensor | None, rays_d: Tensor, n: int, size: int) -> Tensor:
        if colour is not None:
            return colour.expand(n, -1).repeat_interleave(size * size, 0)
        if self.environment is not None:
            return self.environment(rays_d)
        return self.backdrop.expand(1, 3) if self.learned is None else self.learned.sigmoid()[None]

    def _march(self, rays: Rays, seed, jitter: bool, capacity: int) -> Samples:
        return march(*rays, *self._grid(), capacity, seed, jitter)

    def make_room(self, cameras: Cameras, seed: int | Tensor) -> None:
        """Fit the capacity to what these cameras need. Waits for the device."""
        rays = self._rays(cameras, self.config.image_size)
        self.fit_capacity(int(self._march(rays, seed, True, 1).count))

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
