"""Sphere tracing of the toybox's objects, and shading of what was hit.

Tracing (slow, geometry only) and shading (fast: colour, light, background) are two functions, so
that one traced view serves as many training pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import MAIN, OBJECT_RADIUS, OBJECTS, RGB, signed_distance

_STEPS, _HIT = 64, 2e-3  # sphere tracing: most steps, and the distance that counts as a hit


@dataclass
class GBuffer:
    """What B views of one object hit. part: (B, H, W) uint8, 255 where nothing was hit;
    normal: (B, H, W, 3) int8 (unit normal times 127); depth: (B, H, W) float16, scene units."""

    part: Tensor
    normal: Tensor
    depth: Tensor


def trace(name: str, rays_o: Tensor, rays_d: Tensor) -> GBuffer:
    """Find the first surface of object `name` along unit-length rays (B, H, W, 3)."""
    shape = rays_o.shape[:-1]
    o, d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
    middle = -(o * d).sum(-1)
    half = (OBJECT_RADIUS**2 - (o.square().sum(-1) - middle.square())).clamp_min(0.0).sqrt()
    t, far = (middle - half).clamp_min(0.0), middle + half
    part = torch.full(t.shape, 255, dtype=torch.uint8)
    normal = torch.zeros((len(t), 3), dtype=torch.int8)
    alive = ((half > 0) & (far > 0)).nonzero()[:, 0]
    for _ in range(_STEPS):
        if not len(alive):
            break
        points = o[alive] + t[alive, None] * d[alive]
        distance, nearest = signed_distance(name, points)
        hit = distance < _HIT
        part[alive[hit]] = nearest[hit].to(torch.uint8)
        t[alive] += torch.where(hit, torch.zeros_like(distance), distance)
        alive = alive[~hit & (t[alive] < far[alive])]
    struck = (part != 255).nonzero()[:, 0]
    if len(struck):
        normal[struck] = _normals(name, o[struck] + t[struck, None] * d[struck])
    return GBuffer(part.reshape(shape), normal.reshape(*shape, 3), t.reshape(shape).half())


def _normals(name: str, points: Tensor) -> Tensor:
    """Central differences of the distance, on a tetrahedron's corners; as int8."""
    corners = torch.tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], dtype=points.dtype)
    gradient = sum(c * signed_distance(name, points + 1e-3 * c)[0][:, None] for c in corners)
    return (F.normalize(gradient, dim=-1) * 127).round().to(torch.int8)


def palette(name: str, main: RGB) -> Tensor:
    """(256, 3) albedo of each part index; rows that no part uses are zero."""
    table = torch.zeros(256, 3)
    for i, part in enumerate(OBJECTS[name]):
        table[i] = torch.tensor(main if part.colour is MAIN else part.colour)
    return table


def shade(
    part: Tensor,
    normal: Tensor,
    points: Tensor,
    palettes: Tensor,
    background: Tensor,
    light: Tensor,
    ambient: Tensor,
    diffuse: Tensor | None = None,
) -> Tensor:
    """Lambertian shading (paper, section 3.1) at trace resolution, then a 2x2 box filter.

    part (B, H, W) uint8; normal (B, H, W, 3) int8; points (B, H, W, 3); palettes (B, 256, 3) in
    [0, 1]; background (B, H, W, 3) or broadcastable; light (B, 3) position; ambient (B,) in [0, 1]:
    1 renders albedo alone, 0.1 the paper's lit mode; diffuse (B,), by default the rest to 1.
    Returns images (B, 3, H/2, W/2) in [0, 1].
    """
    b = torch.arange(len(part))[:, None, None]
    albedo = palettes[b, part.long()]
    n = normal.to(albedo.dtype) / 127
    to_light = F.normalize(light[:, None, None] - points, dim=-1)
    facing = (n * to_light).sum(-1, keepdim=True).clamp_min(0.0)
    strengths = ambient, 1.0 - ambient if diffuse is None else diffuse
    a, d = (x[:, None, None, None] for x in strengths)
    lit = albedo * (a + d * facing)
    image = torch.where((part == 255)[..., None], background, lit)
    return F.avg_pool2d(image.permute(0, 3, 1, 2), 2).contiguous()
