"""Volume rendering of packed samples."""

from __future__ import annotations

import torch

from ._backend import (
    check_range,
    check_tensor,
    kernels,
    ptr,
    register,
    register_backward,
    scalar,
    stream,
)


def composite(
    sigma: torch.Tensor,
    rgb: torch.Tensor,
    t: torch.Tensor,
    dt: torch.Tensor,
    packed: torch.Tensor,
    early_stop: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Composite the samples of each ray, front to back (NeRF, Mildenhall et al. 2020, eq. 3).

    α_i = 1 - exp(-σ_i δ_i), T_i = Π_(j<i) (1 - α_j), w_i = T_i α_i with δ = dt;
    colour = Σ w_i rgb_i, opacity = Σ w_i, depth = Σ w_i t_i. A background b is blended outside:
    colour + (1 - opacity) b.

    Samples with T_i < early_stop have weight 0 and no gradient, and their effect on the others'
    gradient is left out. Rows that belong to no ray likewise. A start or count in `packed` that
    points out of the arrays is clamped to them; rays must not share rows. A negative density is
    used as it is: the ray then gains light. NaN goes through to its ray.

    Args:
        sigma: (S,) float32 or float64, density per unit of dt, from 0.
        rgb: (S, C) like sigma, C from 1 to 8.
        t: (S,) like sigma, distances, for the depth.
        dt: (S,) like sigma, lengths of the samples' intervals.
        packed: (R, 2) int32, start and count of each ray's samples, as `march` makes it.
        early_stop: transmittance below which a ray ends, 0 (never) to 1.
    Returns:
        colour (R, C), opacity (R,), depth (R,), weights (S,): differentiable once, each of them,
        with respect to sigma, rgb, t and dt.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_tensor("sigma", sigma, shape=("S",))
    s = sigma.shape[0]
    check_tensor("rgb", rgb, sigma.dtype, (s, "C"), sigma.device)
    if not 1 <= rgb.shape[1] <= 8:
        raise ValueError(f"argument `rgb`: expected 1 to 8 channels, got {rgb.shape[1]}")
    check_tensor("t", t, sigma.dtype, (s,), sigma.device)
    check_tensor("dt", dt, sigma.dtype, (s,), sigma.device)
    check_tensor("packed", packed, torch.int32, ("R", 2), sigma.device)
    check_range("early_stop", early_stop, 0, 1)
    return torch.ops.dreamfusion_fast.composite(sigma, rgb, t, dt, packed, early_stop)


def _sizes(rgb, packed):
    return packed.shape[0], rgb.shape[0], rgb.shape[1]


def _empty(sigma, rgb, t, dt, packed, early_stop):
    rays, _, channels = _sizes(rgb, packed)
    per_ray = [sigma.new_empty(shape) for shape in ((rays, channels), (rays,), (rays,))]
    return *per_ray, torch.empty_like(sigma)


def _forward(sigma, rgb, t, dt, packed, early_stop):
    out = _empty(sigma, rgb, t, dt, packed, early_stop)
    kernels(sigma).composite_forward(
        scalar(sigma), *map(ptr, (sigma, rgb, t, dt, packed, *out)), *_sizes(rgb, packed),
        early_stop, stream(sigma),
    )  # fmt: skip
    return out


def _empty_grads(
    grad_colour, grad_opacity, grad_depth, grad_weights, sigma, rgb, t, dt, packed, weights,
    early_stop, distances,
):  # fmt: skip
    rows = sigma.shape[0] if distances else 0
    return torch.empty_like(sigma), torch.empty_like(rgb), t.new_empty(rows), t.new_empty(rows)


def _backward(
    grad_colour, grad_opacity, grad_depth, grad_weights, sigma, rgb, t, dt, packed, weights,
    early_stop, distances,
):  # fmt: skip
    incoming = (grad_colour, grad_opacity, grad_depth, grad_weights)
    inputs = (sigma, rgb, t, dt, packed)
    grads = _empty_grads(*incoming, *inputs, weights, early_stop, distances)
    wanted = grads if distances else (*grads[:2], None, None)
    kernels(sigma).composite_backward(
        scalar(sigma), *map(ptr, (*inputs, *incoming, weights, *wanted)),
        *_sizes(rgb, packed), early_stop, stream(sigma),
    )  # fmt: skip
    return grads


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[3])
    ctx.early_stop = inputs[5]
    ctx.distances = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *grads):
    grads = [None if g is None else g.contiguous() for g in grads]
    backward = torch.ops.dreamfusion_fast.composite_backward
    sigma, rgb, t, dt = backward(*grads, *ctx.saved_tensors, ctx.early_stop, ctx.distances)
    distances = (t, dt) if ctx.distances else (None, None)
    return sigma, rgb, *distances, None, None


_INPUTS = "Tensor sigma, Tensor rgb, Tensor t, Tensor dt, Tensor packed"
register(
    f"composite({_INPUTS}, float early_stop) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _empty
)
register(
    "composite_backward(Tensor? grad_colour, Tensor? grad_opacity, Tensor? grad_depth,"
    f" Tensor? grad_weights, {_INPUTS}, Tensor weights, float early_stop, bool distances)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_grads,
)
register_backward("composite", _differentiate, _save)
