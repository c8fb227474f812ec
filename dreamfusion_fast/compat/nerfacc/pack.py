"""From each sample's ray to each ray's samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import expect_index


@torch.no_grad()
def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """Start and count of each ray's samples.

    Args:
        ray_indices: (n_samples,) integers from 0, samples of a ray next to each other, rays in
            ascending order (the counts are right in any order).
        n_rays: None: one more than the largest index; that of no samples is 0.
    Returns:
        (n_rays, 2), dtype of ray_indices.
    """
    expect_index("ray_indices", ray_indices, "(n_samples,)")
    if n_rays is None:
        n_rays = int(ray_indices.max()) + 1 if ray_indices.numel() else 0
    counts = ray_indices.new_zeros(n_rays)
    counts.index_add_(0, ray_indices, torch.ones_like(ray_indices))
    return torch.stack([counts.cumsum(0, dtype=counts.dtype) - counts, counts], dim=-1)
