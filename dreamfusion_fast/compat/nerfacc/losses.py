"""The distortion loss (mip-NeRF 360, Barron et al. 2022, eq. 15)."""

from __future__ import annotations

from torch import Tensor

from ._checks import expect
from .scan import exclusive_sum
from .volrend import accumulate_along_rays


def distortion(
    weights: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, n_rays: int
) -> Tensor:
    """Σ_ij w_i w_j |m_i - m_j| + 1/3 Σ_i w_i² δ_i of each ray, in linear time.

    m is the middle of a sample's interval and δ its length. (After 0.5.3.)

    Args:
        weights, t_starts, t_ends: (n_samples,), along each ray in the order of distances.
        ray_indices: (n_samples,) integers, the samples of a ray next to each other.
    Returns:
        (n_rays, 1), differentiable.
    """
    for name, x in (("t_starts", t_starts), ("t_ends", t_ends), ("ray_indices", ray_indices)):
        expect(x.shape == weights.shape, name, f"shape {tuple(weights.shape)}", x)
    middle = (t_starts + t_ends) / 2
    before = exclusive_sum(weights, indices=ray_indices)
    moment = exclusive_sum(weights * middle, indices=ray_indices)
    loss = 2 * weights * (middle * before - moment) + weights**2 * (t_ends - t_starts) / 3
    return accumulate_along_rays(loss, None, ray_indices, n_rays)
