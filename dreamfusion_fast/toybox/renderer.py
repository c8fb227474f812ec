"""Ray casting of the toybox's objects, and shading of what was hit.

Tracing (geometry only) and shading (colour, light, background) are two functions, so
that one traced view serves as many training pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import MAIN, OBJECT_RADIUS, OBJECTS, RGB, signed_distance
from .surfaces import first_hits


@dataclass
class GBuffer:
    """What B views of one object hit. part: (B, H, W) uint8, 255 where nothing was hit;
    normal: (B, H, W, 3) int8 (unit normal times 127); depth: (B, H, W) float16, scene units."""

    part: Tensor
    normal: Tensor
    depth: Tensor


def trace(name: str, rays_o: Tensor, rays_d: Tensor) -> GBuffer:
    """Find the first surface of object `name` along unit-length rays (B, H, W, 3), on the CPU."""
    shape = rays_o.shape[:-1]
    o, d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
    middle = -(o * d).sum(-1)
    within = (o.square().sum(-1) - middle.square() < OBJECT_RADIUS**2).nonzero()[:, 0]
    hit, t = first_hits(name, o[within], d[within])
    struck = within[hit]
    depth = torch.zeros(len(o), dtype=torch.float16)
    depth[struck] = t[hit].half()
    points = o[struck] + t[hit, None] * d[struck]
    part = torch.full((len(o),), 255, dtype=torch.uint8)
    normal = torch.zeros((len(o), 3), dtype=torch.int8)
    if len(struck):
        nearest = signed_distance(name, points)[1]
        part[struck] = nearest.to(torch.uint8)
        normal[struck] = _normals(name, points, nearest)
    return GBuffer(part.reshape(shape), normal.reshape(*shape, 3), depth.reshape(shape))


def _normals(name: str, points: Tensor, nearest: Tensor) -> Tensor:
    """Central differences of the nearest part's distance, on a tetrahedron's corners; as int8."""
    corners = torch.tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], dtype=points.dtype)
    gradient = torch.zeros_like(points)
    for i, part in enumerate(OBJECTS[name]):
        of_part = (nearest == i).nonzero()[:, 0]
        p = points[of_part]
        gradient[of_part] = sum(c * part.distance(p + 1e-3 * c)[:, None] for c in corners)
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
