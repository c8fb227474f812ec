"""Light and shading of each view (section 3.1 and A.2 of the paper): one row of numbers a view.

A row holds light position l (3), ambient a, diffuse d, texture k, base b; a point mu of albedo rho
and normal n has the colour (k rho + b) (a + d max(0, n . (l - mu) / |l - mu|)). So k = 1, b = 0 is
the albedo, lit or not, and k = 0, b = 1 is white: textureless.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import Cameras
from .config import ShadingConfig

MODES = ("lit", "textureless", "albedo")
RAISED = 0.3  # of the camera's distance: what lies below stays darker, and shows its form
FIXED_AMBIENT, FIXED_DIFFUSE = 0.3, 0.7  # brighter in the shade than what is trained on


def sample(
    cameras: Cameras, config: ShadingConfig, share: float, generator: torch.Generator
) -> Tensor:
    """Draw the light and the kind of shading of each view (A.2).

    The light's direction is that of N(p, I), p the camera's position, its distance from the origin
    uniform. Until config.ambient_until of the run all views are unlit (a = 1, d = 0); then a view
    is lit with probability config.lit, and a lit one textureless with config.textureless.

    Args:
        cameras: B of them, on the host.
        config: probabilities and strengths.
        share: of the run, 0 to 1, that is done.
        generator: draws the same count of numbers at any share.
    Returns:
        (B, 7) float32 rows, light positions in scene units.
    """
    n = len(cameras.focal)
    direction = cameras.c2w[:, :, 3] + torch.randn(n, 3, generator=generator)
    low, high = config.light_distance
    distance = low + (high - low) * torch.rand(n, 1, generator=generator)
    chance = torch.rand(2, n, generator=generator)
    lit = (chance[0] < config.lit) & (share >= config.ambient_until)
    textureless = lit & (chance[1] < config.textureless)
    return _rows(
        distance * F.normalize(direction, dim=-1),
        torch.where(lit, config.ambient, 1.0),
        torch.where(lit, config.diffuse, 0.0),
        textureless,
        config.white,
    )


def is_lit(rows: Tensor) -> Tensor:
    """(B,) bool: rows (B, 7) with diffuse light, for which normals are needed."""
    return rows[:, 4] > 0


def is_textureless(rows: Tensor) -> Tensor:
    """(B,) bool: rows (B, 7) without the field's own albedo."""
    return rows[:, 5] == 0


def fixed(cameras: Cameras, mode: str, white: float = 1.0) -> Tensor:
    """Rows (B, 7) for pictures to look at, on the cameras' device: "lit" by a light above the
    camera, the same "textureless" (albedo `white`), or the plain "albedo". ValueError for others.
    """
    if mode not in MODES:
        raise ValueError(f"argument `mode`: expected one of {', '.join(MODES)}, got {mode!r}")
    position = cameras.c2w[:, :, 3].clone()
    position[:, 2] += RAISED * position.norm(dim=-1)
    plain = position.new_ones(len(position))
    unlit = mode == "albedo"
    return _rows(
        position,
        plain if unlit else FIXED_AMBIENT * plain,
        0.0 * plain if unlit else FIXED_DIFFUSE * plain,
        plain.bool() if mode == "textureless" else ~plain.bool(),
        white,
    )


def _rows(light: Tensor, ambient: Tensor, diffuse: Tensor, textureless: Tensor, white) -> Tensor:
    texture, base = (~textureless).to(light.dtype), white * textureless.to(light.dtype)
    return torch.cat((light, torch.stack((ambient, diffuse, texture, base), 1)), 1)
