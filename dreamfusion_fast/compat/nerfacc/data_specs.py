"""What samplers return: edges of intervals, and samples, of each ray."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RaySamples:
    """Distances of samples.

    Fields:
        vals: (n_rays, n_samples), or flat, (all_samples,).
        packed_info: (n_rays, 2) int64, start and count of each ray's samples; for flat vals.
        ray_indices: (all_samples,) int64, the ray of each; for flat vals.
        is_valid: (all_samples,) bool, false in room that no sample took (see `traverse_grids`).
    """

    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_valid: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device


@dataclass
class RayIntervals:
    """Edges of intervals. Two that touch share an edge, which then is a left and a right one.

    Fields:
        vals: (n_rays, n_edges), or flat, (all_edges,).
        packed_info: (n_rays, 2) int64, start and count of each ray's edges; for flat vals.
        ray_indices: (all_edges,) int64, the ray of each; for flat vals.
        is_left, is_right: (all_edges,) bool, whether an interval starts or ends there. As many
            are left as right: vals[is_left] and vals[is_right] are where the intervals start and
            end. For flat vals.
    """

    vals: Tensor
    packed_info: Tensor | None = None
    ray_indices: Tensor | None = None
    is_left: Tensor | None = None
    is_right: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device
