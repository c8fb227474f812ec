"""The toybox's objects: signed distance functions made of coloured primitives.

Frame: z is up, +x is the front, lengths are scene units, every object fits the ball of radius
0.655 around the origin and is symmetric about the xz plane (a prompt says "side view", not left or
right). Each primitive is an exact signed distance or a lower bound of it, so sphere tracing is
safe; see Hart, "Sphere tracing" (1996).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OBJECT_RADIUS = 0.655  # scene units: no surface point lies outside this ball (the train: 0.6539)
MAIN = None  # a part painted in the colour that the prompt names

RGB = tuple[float, float, float]
BLACK: RGB = (0.06, 0.06, 0.07)
WHITE: RGB = (0.95, 0.95, 0.93)
GREY: RGB = (0.55, 0.56, 0.58)
WOOD: RGB = (0.50, 0.30, 0.14)
SKY: RGB = (0.62, 0.84, 0.95)
ORANGE: RGB = (0.98, 0.50, 0.08)
YELLOW: RGB = (1.00, 0.85, 0.20)
GREEN: RGB = (0.16, 0.50, 0.16)
RED: RGB = (0.85, 0.10, 0.10)
CREAM: RGB = (0.96, 0.88, 0.70)


@dataclass(frozen=True)
class Part:
    """One primitive: `distance` maps points (N, 3) to signed distances (N,)."""

    distance: Callable[[Tensor], Tensor]
    colour: RGB | None = MAIN


def _vec(values, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def ellipsoid(centre, radii, colour=MAIN, mirror=False) -> Part:
    """An axis-aligned ellipsoid; a bound that is exact for a sphere."""
    smallest = min(radii)

    def distance(p: Tensor) -> Tensor:
        q = (_mirrored(p, mirror) - _vec(centre, p)) / _vec(radii, p)
        k0 = q.norm(dim=-1)
        k1 = (q / _vec(radii, p)).norm(dim=-1).clamp_min(1e-9)
        # Near the surface k0 (k0 - 1) / k1 has unit slope; deep inside, a plain bound.
        return torch.where(k0 > 0.5, k0 * (k0 - 1.0) / k1, (k0 - 1.0) * smallest)

    return Part(distance, colour)


def sphere(centre, radius, colour=MAIN, mirror=False) -> Part:
    return ellipsoid(centre, (radius, radius, radius), colour, mirror)


def box(centre, half, colour=MAIN, mirror=False, rounding=0.015) -> Part:
    """An axis-aligned box of half extents `half`, edges rounded by `rounding`."""

    def distance(p: Tensor) -> Tensor:
        q = (_mirrored(p, mirror) - _vec(centre, p)).abs() - (_vec(half, p) - rounding)
        return q.clamp_min(0.0).norm(dim=-1) + q.amax(dim=-1).clamp_max(0.0) - rounding

    return Part(distance, colour)


def cone(a, b, radius_a, radius_b, colour=MAIN, mirror=False) -> Part:
    """A capped cone from `a` to `b`; equal radii make a cylinder."""

    def distance(p: Tensor) -> Tensor:
        return _capped_cone(_mirrored(p, mirror), a, b, radius_a, radius_b)

    return Part(distance, colour)


def cup(a, b, radius_a, radius_b, colour=MAIN, wall=0.035) -> Part:
    """A capped cone from `a` (bottom) to `b` (rim), hollow and open at `b`."""
    inner = [
        ai + wall * (bi - ai) / sum((y - x) ** 2 for x, y in zip(a, b)) ** 0.5
        for ai, bi in zip(a, b)
    ]
    beyond = [bi + (bi - ai) * 0.1 for ai, bi in zip(a, b)]

    def distance(p: Tensor) -> Tensor:
        hole = _capped_cone(p, inner, beyond, radius_a - wall, radius_b - wall)
        return torch.maximum(_capped_cone(p, a, b, radius_a, radius_b), -hole)

    return Part(distance, colour)


def torus(centre, axis, major, minor, colour=MAIN, mirror=False) -> Part:
    """A torus around coordinate axis `axis` (0, 1 or 2)."""

    def distance(p: Tensor) -> Tensor:
        q = _mirrored(p, mirror) - _vec(centre, p)
        along = q[:, axis]
        across = (q.square().sum(-1) - along.square()).clamp_min(0.0).sqrt() - major
        return (across.square() + along.square()).sqrt() - minor

    return Part(distance, colour)


def capsule(a, b, radius, colour=MAIN, mirror=False) -> Part:
    """All points within `radius` of the segment from `a` to `b`."""

    def distance(p: Tensor) -> Tensor:
        pa, ba = _mirrored(p, mirror) - _vec(a, p), _vec(b, p) - _vec(a, p)
        h = ((pa @ ba) / (ba @ ba)).clamp(0.0, 1.0)
        return (pa - h[:, None] * ba).norm(dim=-1) - radius

    return Part(distance, colour)


def _mirrored(p: Tensor, mirror: bool) -> Tensor:
    return torch.stack((p[:, 0], p[:, 1].abs(), p[:, 2]), -1) if mirror else p


def _capped_cone(p: Tensor, a, b, ra: float, rb: float) -> Tensor:
    """Distance to the solid of revolution of the trapezoid (0,0) (ra,0) (rb,h) (0,h)."""
    a, b = _vec(a, p), _vec(b, p)
    height = (b - a).norm()
    axis = (b - a) / height
    y = (p - a) @ axis
    x = (p - a - y[:, None] * axis).norm(dim=-1)
    # Distance to the caps, then to the slanted side, in the half plane (x, y).
    cap_radius = torch.where(y < 0.5 * height, torch.full_like(y, ra), torch.full_like(y, rb))
    cap_x = (x - cap_radius).clamp_min(0.0)
    cap_y = (y - 0.5 * height).abs() - 0.5 * height
    slope_x, slope_y = rb - ra, height
    h = ((x - ra) * slope_x + y * slope_y) / (slope_x**2 + slope_y**2)
    h = h.clamp(0.0, 1.0)
    side = ((x - ra - h * slope_x).square() + (y - h * slope_y).square()).sqrt()
    outside = torch.minimum(side, (cap_x.square() + cap_y.square()).sqrt())
    inside = (cap_y < 0.0) & ((x - ra) * slope_y < y * slope_x)
    return torch.where(inside, -outside, outside)


def _cylinder(z0, z1, radius, colour=MAIN, x=0.0, y=0.0, mirror=False) -> Part:
    return cone((x, y, z0), (x, y, z1), radius, radius, colour, mirror)


def _legs(x, y, z0, z1, radius, colour) -> list[Part]:
    return [_cylinder(z0, z1, radius, colour, x=s * x, y=y, mirror=True) for s in (1, -1)]


OBJECTS: dict[str, list[Part]] = {
    "ball": [sphere((0, 0, 0), 0.42), torus((0, 0, 0), 2, 0.405, 0.045, WHITE)],
    "cube": [box((0, 0, 0), (0.33, 0.33, 0.33))],
    "donut": [
        torus((0, 0, 0.05), 2, 0.29, 0.155),
        torus((0, 0, -0.02), 2, 0.29, 0.165, CREAM),
    ],
    "mug": [
        cup((0.06, 0, -0.32), (0.06, 0, 0.32), 0.27, 0.27, wall=0.045),
        torus((-0.26, 0, 0.0), 1, 0.16, 0.04),
    ],
    "snowman": [
        sphere((0, 0, -0.26), 0.25, WHITE),
        sphere((0, 0, 0.10), 0.18, WHITE),
        sphere((0, 0, 0.33), 0.13, WHITE),
        _cylinder(0.42, 0.54, 0.10),
        _cylinder(0.41, 0.44, 0.16),
        torus((0, 0, 0.22), 2, 0.115, 0.045),
        cone((0.10, 0, 0.33), (0.30, 0, 0.31), 0.04, 0.005, ORANGE),
        sphere((0.11, 0.05, 0.37), 0.025, BLACK, mirror=True),
        sphere((0.175, 0, 0.12), 0.025, BLACK),
    ],
    "table": [
        _cylinder(0.12, 0.22, 0.46),
        *_legs(0.27, 0.27, -0.40, 0.14, 0.05, WOOD),
    ],
    "chair": [
        box((0.02, 0, -0.03), (0.25, 0.25, 0.055)),
        box((-0.22, 0, 0.25), (0.05, 0.25, 0.27)),
        *_legs(0.20, 0.20, -0.46, -0.05, 0.045, WOOD),
    ],
    "car": [
        box((0, 0, -0.06), (0.50, 0.22, 0.11), rounding=0.05),
        box((-0.06, 0, 0.10), (0.25, 0.19, 0.11), SKY, rounding=0.05),
        box((-0.06, 0, 0.19), (0.21, 0.17, 0.035), rounding=0.03),
        *[
            cone((s * 0.29, 0.15, -0.17), (s * 0.29, 0.25, -0.17), 0.11, 0.11, BLACK, mirror=True)
            for s in (1, -1)
        ],
        sphere((0.485, 0.13, -0.04), 0.05, YELLOW, mirror=True),
    ],
    "mushroom": [
        ellipsoid((0, 0, 0.12), (0.42, 0.42, 0.26)),
        cone((0, 0, -0.42), (0, 0, 0.08), 0.15, 0.12, CREAM),
        *[
            sphere((0.30 * c, 0.30 * s, 0.27), 0.07, WHITE, mirror=s != 0)
            for c, s in ((1, 0), (-1, 0), (0.2, 0.98))
        ],
        sphere((0, 0, 0.36), 0.07, WHITE),
    ],
    "house": [
        box((0, 0, -0.17), (0.30, 0.30, 0.22), CREAM),
        cone((0, 0, 0.04), (0, 0, 0.44), 0.46, 0.03),
        box((0.30, 0, -0.25), (0.03, 0.08, 0.14), WOOD),
        box((0.30, 0.19, -0.10), (0.02, 0.06, 0.06), SKY, mirror=True),
        box((-0.18, 0, 0.28), (0.06, 0.06, 0.14), RED),
    ],
    "rocket": [
        cone((0, 0, -0.30), (0, 0, 0.20), 0.16, 0.16),
        cone((0, 0, 0.19), (0, 0, 0.52), 0.16, 0.01, RED),
        cone((0, 0, -0.42), (0, 0, -0.28), 0.14, 0.08, GREY),
        box((0, 0.22, -0.28), (0.05, 0.10, 0.13), RED, mirror=True),
        box((-0.22, 0, -0.28), (0.10, 0.05, 0.13), RED),
        sphere((0.13, 0, 0.05), 0.075, SKY),
    ],
    "tree": [
        cone((0, 0, -0.50), (0, 0, -0.10), 0.09, 0.07, WOOD),
        cone((0, 0, -0.24), (0, 0, 0.18), 0.40, 0.10),
        cone((0, 0, 0.02), (0, 0, 0.36), 0.30, 0.06),
        cone((0, 0, 0.24), (0, 0, 0.53), 0.20, 0.01),
    ],
    "teapot": [
        ellipsoid((0, 0, -0.06), (0.29, 0.29, 0.24)),
        cone((0.20, 0, -0.08), (0.50, 0, 0.16), 0.08, 0.035),
        torus((-0.31, 0, -0.02), 1, 0.14, 0.035),
        _cylinder(0.14, 0.19, 0.15, BLACK),
        sphere((0, 0, 0.23), 0.055, BLACK),
    ],
    "fish": [
        ellipsoid((0.08, 0, 0), (0.36, 0.15, 0.24)),
        cone((-0.20, 0, 0), (-0.47, 0, 0.0), 0.03, 0.17, ORANGE),
        ellipsoid((0.04, 0, 0.24), (0.17, 0.03, 0.12), ORANGE),
        ellipsoid((0.06, 0.17, -0.06), (0.10, 0.10, 0.035), ORANGE, mirror=True),
        sphere((0.31, 0.09, 0.06), 0.055, WHITE, mirror=True),
        sphere((0.345, 0.105, 0.065), 0.032, BLACK, mirror=True),
    ],
    "robot": [
        box((0, 0, -0.05), (0.15, 0.20, 0.20)),
        box((0, 0, 0.30), (0.14, 0.16, 0.12), GREY),
        sphere((0.14, 0.07, 0.33), 0.04, YELLOW, mirror=True),
        box((0.135, 0, 0.24), (0.02, 0.08, 0.02), BLACK),
        capsule((0, 0.27, 0.08), (0.06, 0.29, -0.20), 0.055, GREY, mirror=True),
        _cylinder(-0.50, -0.22, 0.07, GREY, y=0.10, mirror=True),
        _cylinder(0.40, 0.48, 0.02, RED),
        sphere((0, 0, 0.50), 0.04, RED),
    ],
    "boat": [
        ellipsoid((0, 0, -0.20), (0.50, 0.21, 0.16)),
        box((0, 0, -0.11), (0.38, 0.17, 0.05), WOOD),
        _cylinder(-0.15, 0.50, 0.03, WOOD, x=0.05),
        cone((-0.12, 0, -0.02), (0.02, 0, 0.48), 0.17, 0.02, WHITE),
    ],
    "lamp": [
        _cylinder(-0.46, -0.40, 0.22, BLACK),
        _cylinder(-0.42, 0.10, 0.04, BLACK),
        cone((0, 0, 0.02), (0, 0, 0.42), 0.36, 0.18),
        sphere((0, 0, 0.02), 0.09, YELLOW),
    ],
    "duck": [
        ellipsoid((-0.06, 0, -0.16), (0.36, 0.25, 0.22)),
        sphere((0.18, 0, 0.18), 0.19),
        cone((0.32, 0, 0.16), (0.48, 0, 0.14), 0.085, 0.05, ORANGE),
        sphere((0.30, 0.10, 0.25), 0.035, BLACK, mirror=True),
        cone((-0.34, 0, -0.12), (-0.50, 0, 0.02), 0.10, 0.02),
    ],
    "cactus": [
        capsule((0, 0, -0.20), (0, 0, 0.38), 0.13),
        capsule((0, 0.10, 0.0), (0, 0.30, 0.02), 0.07, mirror=True),
        capsule((0, 0.30, 0.02), (0, 0.30, 0.20), 0.07, mirror=True),
        cone((0, 0, -0.50), (0, 0, -0.22), 0.17, 0.24, (0.72, 0.36, 0.20)),
        sphere((0, 0, 0.50), 0.05, (0.98, 0.45, 0.65)),
    ],
    "apple": [
        ellipsoid((0, 0, -0.04), (0.38, 0.38, 0.36)),
        _cylinder(0.28, 0.48, 0.03, WOOD),
        ellipsoid((0.12, 0, 0.43), (0.13, 0.07, 0.035), GREEN),
    ],
    "airplane": [
        capsule((-0.38, 0, 0), (0.38, 0, 0), 0.11),
        box((0.05, 0.26, 0.0), (0.12, 0.26, 0.03), WHITE, mirror=True),
        box((-0.42, 0.12, 0.03), (0.07, 0.12, 0.025), WHITE, mirror=True),
        box((-0.42, 0, 0.17), (0.07, 0.025, 0.13), RED),
        ellipsoid((0.34, 0, 0.06), (0.10, 0.08, 0.07), SKY),
    ],
    "train": [
        cone((-0.05, 0, 0.0), (0.42, 0, 0.0), 0.16, 0.16),
        box((-0.28, 0, 0.08), (0.18, 0.19, 0.26)),
        box((-0.28, 0, 0.36), (0.21, 0.22, 0.03), BLACK),
        cone((0.27, 0, 0.12), (0.27, 0, 0.36), 0.05, 0.08, BLACK),
        box((0, 0, -0.18), (0.45, 0.17, 0.04), GREY),
        *[
            cone((x, 0.12, -0.26), (x, 0.21, -0.26), 0.11, 0.11, RED, mirror=True)
            for x in (-0.29, 0.0, 0.29)
        ],
        sphere((0.43, 0, 0.05), 0.06, YELLOW),
    ],
    "bed": [
        box((0.02, 0, -0.12), (0.46, 0.28, 0.09)),
        box((-0.30, 0, 0.0), (0.11, 0.20, 0.06), WHITE, rounding=0.04),
        box((-0.46, 0, 0.02), (0.035, 0.29, 0.24), WOOD),
        box((0.47, 0, -0.10), (0.03, 0.29, 0.14), WOOD),
        *_legs(0.42, 0.24, -0.32, -0.18, 0.04, WOOD),
    ],
    "ghost": [
        capsule((0, 0, 0.0), (0, 0, 0.22), 0.27),
        cone((0, 0, -0.46), (0, 0, 0.02), 0.36, 0.27),
        ellipsoid((0.25, 0.10, 0.24), (0.05, 0.055, 0.08), BLACK, mirror=True),
        ellipsoid((0.27, 0, 0.06), (0.04, 0.07, 0.05), BLACK),
        sphere((0.08, 0.32, 0.02), 0.09, mirror=True),
    ],
    "bicycle": [
        *[torus((x, 0, -0.13), 1, 0.22, 0.04, BLACK) for x in (0.34, -0.34)],
        *[sphere((x, 0, -0.13), 0.06, GREY) for x in (0.34, -0.34)],
        capsule((-0.02, 0, -0.13), (-0.14, 0, 0.20), 0.035),  # seat tube
        capsule((-0.11, 0, 0.14), (0.24, 0, 0.18), 0.035),  # top tube
        capsule((-0.02, 0, -0.13), (0.24, 0, 0.16), 0.035),  # down tube
        capsule((-0.02, 0, -0.13), (-0.34, 0, -0.13), 0.03),  # chain stay
        capsule((-0.11, 0, 0.14), (-0.34, 0, -0.13), 0.03),  # seat stay
        capsule((0.22, 0, 0.30), (0.34, 0, -0.13), 0.035),  # fork
        capsule((0.20, 0, 0.31), (0.20, 0.22, 0.33), 0.03, GREY, mirror=True),
        ellipsoid((-0.15, 0, 0.24), (0.13, 0.07, 0.04), WOOD),
    ],
    "ship": [
        ellipsoid((0, 0, -0.30), (0.50, 0.17, 0.15)),
        box((-0.36, 0, -0.20), (0.11, 0.12, 0.10)),
        box((0.05, 0, -0.21), (0.36, 0.13, 0.04), WOOD),
        capsule((0.38, 0, -0.24), (0.58, 0, -0.12), 0.025, WOOD),
        _cylinder(-0.20, 0.52, 0.025, WOOD, x=0.20),
        _cylinder(-0.20, 0.46, 0.025, WOOD, x=-0.14),
        box((0.23, 0, 0.04), (0.025, 0.24, 0.13), WHITE),
        box((0.23, 0, 0.33), (0.025, 0.18, 0.11), WHITE),
        box((-0.11, 0, 0.04), (0.025, 0.22, 0.12), WHITE),
        box((-0.11, 0, 0.30), (0.025, 0.16, 0.10), WHITE),
        box((-0.20, 0, 0.43), (0.07, 0.02, 0.04), RED),
    ],
    "lighthouse": [
        ellipsoid((0, 0, -0.46), (0.34, 0.30, 0.13), GREY),
        cone((0, 0, -0.44), (0, 0, 0.22), 0.19, 0.115),
        cone((0, 0, -0.21), (0, 0, -0.07), 0.168, 0.152, WHITE),
        cone((0, 0, 0.06), (0, 0, 0.18), 0.138, 0.125, WHITE),
        _cylinder(0.21, 0.26, 0.18, BLACK),
        _cylinder(0.25, 0.40, 0.09, YELLOW),
        cone((0, 0, 0.39), (0, 0, 0.55), 0.14, 0.01, RED),
        box((0.17, 0, -0.30), (0.03, 0.06, 0.09), WOOD),
        box((-0.24, 0, -0.29), (0.12, 0.11, 0.10), CREAM),
        box((-0.24, 0, -0.17), (0.14, 0.13, 0.03), RED),
    ],
}


def signed_distance(name: str, points: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance to object `name` and the part that is nearest.

    points: (N, 3), scene units. Returns distance (N,) (negative inside) and part index (N,) int64.
    """
    distances = torch.stack([part.distance(points) for part in OBJECTS[name]])
    return distances.min(dim=0)


def occupancy(name: str, points: Tensor) -> Tensor:
    """True where `points` (N, 3) lie inside the solid: the ground truth of volume IoU."""
    return signed_distance(name, points)[0] < 0.0
