"""The benchmarks' cases: each op and its plain-torch twin on the inputs of a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.limits import SIZES, Size
from dreamfusion_fast import camera, ops
from dreamfusion_fast.ops import reference

EARLY_STOP = 1e-3
DECAY, THRESHOLD = 0.8, 0.1  # of the occupancy grid
ADAM = (1e-2, 0.9, 0.99, 1e-15)  # lr, betas, eps


@dataclass
class Case:
    """op(*tensors) and twin(*tensors): tensors, a tuple of them, or None (the tensors change).
    `forward` and `backward` are names of bench/model.py's kernels; without the second, only the
    forward pass is of interest."""

    op: Callable
    twin: Callable
    tensors: tuple
    forward: str
    backward: str | None = None
    half: bool = False
    comparable: bool = True  # the results of op and twin are the same numbers


@dataclass
class Scene:
    """Rays through a solid ball, and their samples: positions of a step, in its order."""

    size: Size  # with the true average number of samples
    c2w: Tensor
    focal: Tensor
    rays: tuple[Tensor, Tensor, Tensor, Tensor]  # origins, directions, near, far
    bitfield: Tensor
    step: float
    capacity: int
    samples: ops.Samples

    @property
    def unit(self) -> Tensor:
        """Positions in the unit cube of the hash encoding."""
        return self.samples.positions / (2 * self.size.field.radius) + 0.5

    def march(self, module):
        """march of `module` (ops or reference) with the scene's settings."""
        radius, g = self.size.field.radius, self.size.occupancy_resolution
        return lambda *rays: tuple(
            module.march(*rays, self.bitfield, g, radius, self.step, self.capacity, 7)
        )


def scene(size: Size, device: torch.device) -> Scene:
    """Made on the CPU, by the CPU kernels, then moved."""
    radius, g = size.field.radius, size.occupancy_resolution
    azimuths = [360.0 * i / size.views for i in range(size.views)]
    cameras = camera.orbit(azimuths, 15.0, 1.4, 1.0)
    focal = cameras.focal * size.pixels
    o, d = (x.reshape(-1, 3) for x in ops.generate_rays(cameras.c2w.contiguous(), focal,
                                                          size.pixels, size.pixels))  # fmt: skip
    near, far = ops.ray_sphere_intersect(o, d, radius)
    step = float((far - near).mean()) / size.bins
    bitfield = _ball(o, d, near, far, size)
    counted = ops.march(o, d, near, far, bitfield, g, radius, step, 1, 7).count
    capacity = -(-int(counted) // 128) * 128
    samples = ops.march(o, d, near, far, bitfield, g, radius, step, capacity, 7)
    true = dataclasses.replace(size, samples=int(counted) / size.rays)
    moved = [tuple(x.to(device) for x in group) for group in ((o, d, near, far), samples)]
    return Scene(true, cameras.c2w.contiguous().to(device), focal.to(device), moved[0],
                 bitfield.to(device), step, capacity, ops.Samples(*moved[1]))  # fmt: skip


def _ball(o, d, near, far, size: Size) -> Tensor:
    """Bits of the cells in the ball that holds the wanted share of all bins."""
    u = (torch.arange(16) + 0.5) / 16
    t = near[:, None] + u * (far - near)[:, None]
    distance = (o[:, None] + t[..., None] * d[:, None]).norm(dim=-1).flatten()
    radius = distance[:: max(1, len(distance) // 100_000)].quantile(size.samples / size.bins)
    g = size.occupancy_resolution
    points = ops.occupancy_points(g, size.field.radius, 0)
    ema, bits = torch.zeros(g**3), torch.zeros(g**3 // 8, dtype=torch.uint8)
    ops.occupancy_update(ema, bits, (points.norm(dim=-1) < radius).float(), 0.0, 0.5)
    return bits


# One block a stem, alphabetical: case name -> Case.


def adam_step(s: Scene, device, half: bool) -> Case:
    """The field's two tensors, as in a step."""
    counts = sum(s.size.level_rows) * s.size.field.features, ops.mlp_parameters(s.size.widths)
    tensors, copies = [], []
    for n in counts:
        param, grad = (torch.randn(n, device=device) for _ in range(2))
        averages = [torch.zeros(n, device=device) for _ in range(2)]
        counters = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]
        tensors += [param, grad, *averages, *counters]
        copies.append(param.half())

    def op(*a):
        for i, copy in enumerate(copies):
            options = {"param_half": copy} if half else {}
            ops.adam_step(*a[6 * i : 6 * i + 6], *ADAM, **options)

    def twin(*a):
        for i, copy in enumerate(copies):
            reference.adam_step(*a[6 * i : 6 * i + 6], *ADAM)
            if half:
                copy.copy_(a[6 * i])

    return Case(op, twin, tuple(tensors), "adam_step", half=half)


def composite(s: Scene, device, half: bool) -> Case:
    n = s.capacity
    sigma = (20 * torch.rand(n, device=device)).requires_grad_()
    rgb = torch.rand(n, s.size.channels, device=device).requires_grad_()
    rest = s.samples.t, s.samples.dt, s.samples.packed
    return Case(lambda a, b: ops.composite(a, b, *rest, EARLY_STOP)[:3],
                lambda a, b: reference.composite(a, b, *rest, EARLY_STOP)[:3],
                (sigma, rgb), "composite_forward", "composite_backward")  # fmt: skip


def composite_lit(s: Scene, device, half: bool) -> Case:
    """A light beside each camera; half of the views textureless."""
    n, views = s.capacity, s.size.views
    sigma = (20 * torch.rand(n, device=device)).requires_grad_()
    albedo = torch.rand(n, 3, device=device).requires_grad_()
    gradient = (20 * torch.randn(n, 3, device=device)).requires_grad_()
    textures = torch.arange(views, device=device)[:, None] % 2
    constants = torch.tensor([[0.1, 0.9]], device=device).expand(views, 2)
    light = s.c2w[:, :, 3] + 0.3 * torch.randn(views, 3, device=device)
    shading = torch.cat((light, constants, textures, 1 - textures), 1)
    rest = s.samples.t, s.samples.dt, s.samples.packed, *s.rays[:2], shading, EARLY_STOP
    return Case(lambda *x: _but_weights(ops.composite_lit(*x, *rest)),
                lambda *x: _but_weights(reference.composite_lit(*x, *rest)),
                (sigma, albedo, gradient), "composite_lit_forward",
                "composite_lit_backward")  # fmt: skip


def _but_weights(results: tuple) -> tuple:
    return *results[:3], *results[4:]


def frequency_encode(s: Scene, device, half: bool) -> Case:
    x = s.rays[1].clone().requires_grad_()
    return Case(lambda x: ops.frequency_encode(x, s.size.frequencies),
                lambda x: reference.frequency_encode(x, s.size.frequencies),
                (x,), "frequency_encode_forward", "frequency_encode_backward")  # fmt: skip


def generate_rays(s: Scene, device, half: bool) -> Case:
    side = s.size.pixels
    return Case(lambda c, f: ops.generate_rays(c, f, side, side),
                lambda c, f: reference.generate_rays(c, f, side, side),
                (s.c2w, s.focal), "generate_rays")  # fmt: skip


def hash_encode(s: Scene, device, half: bool) -> Case:
    f, rows = s.size.field, sum(s.size.level_rows)
    table = ((2 * torch.rand(rows, f.features, device=device) - 1) * 0.1).requires_grad_()
    settings = {**s.size.grid, "interpolation": f.interpolation, "count": s.samples.count}
    options = {"table_half": table.detach().half()} if half else {}
    return Case(lambda x, t: ops.hash_encode(x, t, **settings, **options),
                lambda x, t: reference.hash_encode(x, t.half() if half else t, **settings),
                (s.unit, table), "hash_encode_forward", "hash_encode_backward",
                half)  # fmt: skip


def march(s: Scene, device, half: bool) -> Case:
    """Any order of rays on a GPU: not comparable."""
    return Case(s.march(ops), s.march(reference), s.rays, "march", comparable=False)


def mlp(s: Scene, device, half: bool) -> Case:
    widths, activation = s.size.widths, s.size.field.activation
    dtype = torch.float16 if half else torch.float32
    x = torch.randn(s.capacity, widths[0], device=device).to(dtype).requires_grad_()
    params = 0.1 * torch.randn(ops.mlp_parameters(widths), device=device)
    params = params.to(dtype).float().requires_grad_()
    count = s.samples.count
    options = {"params_half": params.detach().half()} if half else {}
    return Case(lambda x, p: ops.mlp(x, p, widths, activation, count=count, **options),
                lambda x, p: reference.mlp(x, p.to(dtype), widths, activation, count=count),
                (x, params), "mlp_forward", "mlp_backward", half)  # fmt: skip


def occupancy_points(s: Scene, device, half: bool) -> Case:
    g, bound = s.size.occupancy_resolution, s.size.field.radius
    seed = torch.tensor([7], device=device)
    return Case(lambda seed: ops.occupancy_points(g, bound, seed),
                lambda seed: reference.occupancy_points(g, bound, seed, device=device),
                (seed,), "occupancy_points")  # fmt: skip


def occupancy_update(s: Scene, device, half: bool) -> Case:
    ema, density = torch.rand(2, s.size.occupancy_resolution**3, device=device).unbind()
    return Case(lambda *a: ops.occupancy_update(*a, DECAY, THRESHOLD),
                lambda *a: reference.occupancy_update(*a, DECAY, THRESHOLD),
                (ema, torch.zeros_like(s.bitfield), density), "occupancy_update")  # fmt: skip


def radiance(s: Scene, device, half: bool) -> Case:
    width = s.size.widths[-1]
    out = torch.randn(s.capacity, width, device=device, dtype=torch.half if half else None)
    p = torch.rand(s.capacity, 3, device=device) - 0.5
    blob = dict(bias=-2.0, blob_density=5.0, blob_size=0.2)
    return Case(lambda o: ops.radiance(o, p, **blob, count=s.samples.count)[:2],
                lambda o: reference.radiance(o.float(), p, **blob, count=s.samples.count)[:2],
                (out.requires_grad_(),), "radiance_forward", "radiance_backward", half)  # fmt: skip


def ray_sphere_intersect(s: Scene, device, half: bool) -> Case:
    radius = s.size.field.radius
    return Case(lambda o, d: ops.ray_sphere_intersect(o, d, radius),
                lambda o, d: reference.ray_sphere_intersect(o, d, radius),
                s.rays[:2], "ray_sphere_intersect")  # fmt: skip


def spherical_harmonics(s: Scene, device, half: bool) -> Case:
    dirs = torch.nn.functional.normalize(torch.randn(s.capacity, 3, device=device), dim=-1)
    return Case(lambda d: ops.spherical_harmonics(d, s.size.degree),
                lambda d: reference.spherical_harmonics(d, s.size.degree),
                (dirs.requires_grad_(),), "spherical_harmonics_forward",
                "spherical_harmonics_backward")  # fmt: skip


CASES = {
    f.__name__: f
    for f in (adam_step, composite, composite_lit, frequency_encode, generate_rays, hash_encode,
              march, mlp, occupancy_points, occupancy_update, radiance, ray_sphere_intersect,
              spherical_harmonics)
}  # fmt: skip
HALF = ("adam_step", "hash_encode", "mlp", "radiance")


def build(name: str, size: str, device: torch.device, half: bool = False) -> tuple[Case, Scene]:
    torch.manual_seed(0)
    s = scene(SIZES[size], device)
    return CASES[name](s, device, half), s
