"""Random cameras of the paper (section 3.2 and A.2), the nearest-view rule, and fixed orbits.

World frame: z up, +x the object's front. Camera frame: x right, y up, looking along -z (OpenGL).
All sampling draws from one torch.Generator, so a seed fixes a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CameraConfig

OVERHEAD_ELEVATION = 60.0  # degrees: above it a view is "overhead" (A.2)
VIEWS = ("front", "side", "back", "overhead")
POSITION_SCALE = 1.4  # scene units: about how far off the toybox's cameras are
N_NUMBERS = 13  # of `flattened`


@dataclass
class Cameras:
    """B pinhole cameras. c2w: (B, 3, 4) camera-to-world, columns right, up, back, position;
    focal: (B,) in units of the image width; elevation, azimuth: (B,) radians."""

    c2w: Tensor
    focal: Tensor
    elevation: Tensor
    azimuth: Tensor

    def view_index(self) -> Tensor:
        """(B,) int64 index into VIEWS: overhead above 60 degrees, else the nearest azimuth."""
        return view_index(self.elevation, self.azimuth)

    def repeat(self, n: int) -> Cameras:
        """The same B cameras n times, one whole set behind the other."""
        return Cameras(*(x.repeat(n, *[1] * (x.ndim - 1)) for x in vars(self).values()))

    def to(self, device) -> Cameras:
        """On a device, without waiting for it."""
        return Cameras(*(x.to(device, non_blocking=True) for x in vars(self).values()))


def flattened(cameras: Cameras) -> Tensor:
    """(B, 13) numbers of about 1, as a network is told where it looks from: the rows of the 3x4
    camera-to-world matrix, its position over 1.4 scene units, then the focal length in image
    widths. On the cameras' device, without waiting for it."""
    turn, position = cameras.c2w[:, :, :3], cameras.c2w[:, :, 3:] / POSITION_SCALE
    return torch.cat((torch.cat((turn, position), 2).flatten(1), cameras.focal[:, None]), 1)


def mirrored(cameras: Cameras) -> Cameras:
    """The cameras behind a mirror in the plane y = 0: what they see of a world that is symmetric
    there is their picture flipped from left to right."""
    flip = cameras.c2w.new_tensor([1.0, -1.0, 1.0])[:, None]
    columns = cameras.c2w.new_tensor([-1.0, 1.0, 1.0, 1.0])  # right stays right of the picture
    return Cameras(cameras.c2w * flip * columns, cameras.focal, cameras.elevation, -cameras.azimuth)


def view_index(elevation: Tensor, azimuth: Tensor) -> Tensor:
    """The paper's rule: "overhead" above 60 degrees, else front, side or back by azimuth."""
    facing = torch.cos(azimuth)
    limit = math.sqrt(0.5)
    side = torch.where(facing < -limit, 2, 1)
    by_azimuth = torch.where(facing > limit, 0, side)
    return torch.where(elevation > math.radians(OVERHEAD_ELEVATION), 3, by_azimuth)


def sample(n: int, config: CameraConfig, generator: torch.Generator) -> Cameras:
    """Draw n cameras: elevation half uniform in angle and half uniform in area, azimuth uniform,
    distance uniform, then jitter of position, look-at point and up vector (A.2)."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def normal(std: float) -> Tensor:
        return std * torch.randn(n, 3, generator=generator)

    low, high = (math.radians(a) for a in config.elevation)
    by_angle = uniform(low, high)
    by_area = torch.asin(uniform(math.sin(low), math.sin(high)).clamp(-1, 1))
    elevation = torch.where(uniform(0, 1) < 0.5, by_angle, by_area)
    azimuth = uniform(*(math.radians(a) for a in config.azimuth))
    distance = uniform(*config.distance)
    position = distance[:, None] * _on_sphere(elevation, azimuth)
    position = position + uniform(-config.position_jitter, config.position_jitter, 3)
    up = torch.tensor([0.0, 0.0, 1.0]) + normal(config.up_std)
    c2w = look_at(position, normal(config.look_at_std), up)
    return Cameras(c2w, uniform(*config.focal), elevation, azimuth)


def orbit(azimuths: list[float], elevation: float, distance: float, focal: float) -> Cameras:
    """Cameras on a circle around z. azimuths, elevation in degrees; distance in scene units;
    focal in image widths."""
    n = len(azimuths)
    azimuth = torch.deg2rad(torch.tensor(azimuths))
    elevations = torch.full((n,), math.radians(elevation))
    position = distance * _on_sphere(elevations, azimuth)
    up = torch.tensor([0.0, 0.0, 1.0]).expand(n, 3)
    c2w = look_at(position, torch.zeros(n, 3), up)
    return Cameras(c2w, torch.full((n,), focal), elevations, azimuth)


def turned(cameras: Cameras, degrees: float) -> Cameras:
    """The same cameras, moved around the z axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = cameras.c2w.new_tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    azimuth = cameras.azimuth + math.radians(degrees)
    return Cameras(turn @ cameras.c2w, cameras.focal, cameras.elevation, azimuth)


def look_at(position: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """(B, 3, 4) camera-to-world matrices. When `up` is along the view, any right angle is taken."""
    back = F.normalize(position - target, dim=-1)
    right = torch.linalg.cross(up, back)
    fallback = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]).expand_as(back), back)
    right = torch.where(right.norm(dim=-1, keepdim=True) < 1e-4, fallback, right)
    right = F.normalize(right, dim=-1)
    return torch.stack((right, torch.linalg.cross(back, right), back, position), dim=-1)


def _on_sphere(elevation: Tensor, azimuth: Tensor) -> Tensor:
    level = torch.cos(elevation)
    return torch.stack(
        (level * torch.cos(azimuth), level * torch.sin(azimuth), torch.sin(elevation)), -1
    )
