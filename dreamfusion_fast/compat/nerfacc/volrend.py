"""Volume rendering of samples that are flat, (all_samples,), or batched, (n_rays, n_samples).

With the density σ of a sample and the length δ of its interval: alpha α = 1 - exp(-σ δ),
transmittance T_i = Π_(j<i) (1 - α_j), weight w_i = T_i α_i. Flat samples say which ray they belong
to by `packed_info`, (n_rays, 2) start and count, or by `ray_indices`, (all_samples,), in which the
samples of a ray follow each other. All of it is differentiable; the visibilities are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import ops
from ...ops._backend import FLOATS
from ._checks import expect, expect_index
from .pack import pack_info
from .scan import exclusive_prod, exclusive_sum


def rendering(
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    rgb_sigma_fn: Callable | None = None,
    rgb_alpha_fn: Callable | None = None,
    render_bkgd: Tensor | None = None,
    expected_depths: bool = True,
) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Evaluate a field at samples and composite them.

    Args:
        t_starts, t_ends: (all_samples,) or (n_rays, n_samples), where each sample's interval
            starts and ends.
        ray_indices: (all_samples,) integers, for flat samples.
        n_rays: for flat samples.
        rgb_sigma_fn: (t_starts, t_ends, ray_indices) -> colours (..., 3), densities (...). Not
            called for no samples. Goes before rgb_alpha_fn if both are given.
        rgb_alpha_fn: the same with opacities for densities.
        render_bkgd: (3,) or (n_rays, 3), seen where opacity is below 1.
        expected_depths: divide depths by opacities. (After 0.5.3, which always does.)
    Returns:
        colours (n_rays, 3), opacities (n_rays, 1), depths (n_rays, 1), and a dict of the samples'
        "weights", "trans", "alphas", "rgbs", and "sigmas" where they were densities.
    """
    expect(t_ends.shape == t_starts.shape, "t_ends", f"shape {tuple(t_starts.shape)}", t_ends)
    if ray_indices is not None:
        like = ray_indices.shape == t_starts.shape
        expect(like, "ray_indices", f"shape {tuple(t_starts.shape)}", ray_indices)
        expect(n_rays is not None, "n_rays", "a number beside ray_indices", n_rays)
    function = rgb_alpha_fn if rgb_sigma_fn is None else rgb_sigma_fn
    expect(function is not None, "rgb_sigma_fn", "a function here or in rgb_alpha_fn", None)
    name = "rgb_alpha_fn" if rgb_sigma_fn is None else "rgb_sigma_fn"
    if t_starts.shape[0]:
        rgbs, values = function(t_starts, t_ends, ray_indices)
    else:
        rgbs, values = t_starts.new_empty((*t_starts.shape, 3)), torch.empty_like(t_starts)
    expect(rgbs.shape[-1] == 3, f"{name}()[0]", "three channels", rgbs)
    expect(values.shape == t_starts.shape, f"{name}()[1]", f"{tuple(t_starts.shape)}", values)

    extras = {"rgbs": rgbs}
    if rgb_sigma_fn is not None:
        extras["sigmas"] = values
        extras["weights"], extras["trans"], extras["alphas"] = render_weight_from_density(
            t_starts, t_ends, values, ray_indices=ray_indices, n_rays=n_rays
        )
    else:
        extras["alphas"] = values
        extras["weights"], extras["trans"] = render_weight_from_alpha(
            values, ray_indices=ray_indices, n_rays=n_rays
        )
    t_mids = (t_starts + t_ends) / 2
    if rgb_sigma_fn is not None and _composite_takes(rgbs, values, t_mids, ray_indices):
        colours, opacities, depths, extras["weights"] = ops.composite(
            values.contiguous(), rgbs.contiguous(), t_mids.contiguous(),
            (t_ends - t_starts).contiguous(), pack_info(ray_indices, n_rays).int(),
        )  # fmt: skip
        opacities, depths = opacities[:, None], depths[:, None]
    else:
        weights = extras["weights"]
        colours = accumulate_along_rays(weights, rgbs, ray_indices, n_rays)
        opacities = accumulate_along_rays(weights, None, ray_indices, n_rays)
        depths = accumulate_along_rays(weights, t_mids[..., None], ray_indices, n_rays)
    if expected_depths:
        depths = depths / opacities.clamp_min(torch.finfo(rgbs.dtype).eps)
    if render_bkgd is not None:
        colours = colours + render_bkgd * (1.0 - opacities)
    return colours, opacities, depths, extras


def _composite_takes(rgbs, sigmas, t_mids, ray_indices) -> bool:
    """Whether our kernel composites these samples: packed, of one dtype, rays in order."""
    if ray_indices is None or not 0 < len(t_mids) < 2**31 or rgbs.ndim != 2:
        return False
    one_dtype = rgbs.dtype == sigmas.dtype == t_mids.dtype and rgbs.dtype in FLOATS
    return one_dtype and bool((ray_indices[1:] >= ray_indices[:-1]).all())


def _transmittance(scan, values, packed_info, ray_indices, prefix_trans) -> Tensor:
    if packed_info is None and ray_indices is not None:
        expect_index("ray_indices", ray_indices, "(all_samples,)")
        _check_grouped(ray_indices)
        trans = scan(values, indices=ray_indices)
    else:
        trans = scan(values, packed_info)
    return trans if prefix_trans is None else trans * prefix_trans


def _check_grouped(ray_indices: Tensor) -> None:
    change = ray_indices[1:] - ray_indices[:-1]
    if bool((change >= 0).all()):
        return
    runs = int((change != 0).sum()) + 1
    rays = len(torch.unique(ray_indices))
    expect(runs == rays, "ray_indices", "samples of a ray next to each other", f"{runs} runs of "
           f"{rays} rays")  # fmt: skip


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """T, like alphas. Is there a prefix_trans, like alphas, it is a factor: the transmittance in
    front of the samples. n_rays is not needed and is not looked at."""
    return _transmittance(exclusive_prod, 1 - alphas, packed_info, ray_indices, prefix_trans)


def render_transmittance_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """T and α, like sigmas. A density may be infinite."""
    depth = sigmas * (t_ends - t_starts)

    def scan(values, *args, **kwargs):
        return torch.exp(-exclusive_sum(values, *args, **kwargs))

    trans = _transmittance(scan, depth, packed_info, ray_indices, prefix_trans)
    return trans, 1.0 - torch.exp(-depth)


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """w and T, like alphas."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return trans * alphas, trans


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """w, T and α, like sigmas."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return trans * alphas, trans, alphas


@torch.no_grad()
def render_visibility_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Booleans like alphas: T >= early_stop_eps and, where alpha_thre > 0, α >= alpha_thre."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


@torch.no_grad()
def render_visibility_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Booleans like sigmas: see `render_visibility_from_alpha`."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


def _visible(trans: Tensor, alphas: Tensor, early_stop_eps: float, alpha_thre: float) -> Tensor:
    visible = trans >= early_stop_eps
    return visible & (alphas >= alpha_thre) if alpha_thre > 0 else visible


def accumulate_along_rays(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> Tensor:
    """Σ w values along each ray.

    Args:
        weights: (all_samples,) beside ray_indices, else (n_rays, n_samples).
        values: (all_samples, D) or (n_rays, n_samples, D); None: ones, D = 1.
        ray_indices: (all_samples,) integers, in any order.
        n_rays: beside ray_indices.
    Returns:
        (n_rays, D), 0 for rays without samples; differentiable with respect to weights and values.
    """
    weighted = _weighted(weights, values)
    if ray_indices is None:
        return weighted.sum(dim=-2)
    expect(n_rays is not None, "n_rays", "a number beside ray_indices", n_rays)
    expect(weights.ndim == 1, "weights", "a flat tensor beside ray_indices", weights)
    outputs = weighted.new_zeros((n_rays, weighted.shape[-1]))
    return outputs.index_add(0, ray_indices, weighted)


def accumulate_along_rays_(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    outputs: Tensor | None = None,
) -> None:
    """Add what `accumulate_along_rays` returns to outputs, (n_rays, D), in place."""
    weighted = _weighted(weights, values)
    width = weighted.shape[-1]
    fits = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[-1] == width
    expect(fits, "outputs", f"tensor of shape (n_rays, {width})", outputs)
    if ray_indices is None:
        outputs.add_(weighted.sum(dim=-2))
    else:
        expect(weights.ndim == 1, "weights", "a flat tensor beside ray_indices", weights)
        outputs.index_add_(0, ray_indices, weighted)


def _weighted(weights: Tensor, values: Tensor | None) -> Tensor:
    if values is None:
        return weights[..., None]
    fits = values.ndim == weights.ndim + 1 and values.shape[:-1] == weights.shape
    expect(fits, "values", f"shape {(*weights.shape, 'D')}", values)
    return weights[..., None] * values
