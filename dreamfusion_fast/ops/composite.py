"""Volume rendering of packed samples: as they are, or lit by a light a view."""

from __future__ import annotations

import torch

from ._backend import (
    autocast,
    check_range,
    check_tensor,
    kernels,
    ptr,
    register,
    register_backward,
    scalar,
    stream,
)


@autocast()
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
    _check_samples(sigma, t, dt, packed, early_stop)
    check_tensor("rgb", rgb, sigma.dtype, (sigma.shape[0], "C"), sigma.device)
    if not 1 <= rgb.shape[1] <= 8:
        raise ValueError(f"argument `rgb`: expected 1 to 8 channels, got {rgb.shape[1]}")
    return torch.ops.dreamfusion_fast.composite(sigma, rgb, t, dt, packed, early_stop)


def _check_samples(sigma, t, dt, packed, early_stop) -> None:
    check_tensor("sigma", sigma, shape=("S",))
    check_tensor("t", t, sigma.dtype, tuple(sigma.shape), sigma.device)
    check_tensor("dt", dt, sigma.dtype, tuple(sigma.shape), sigma.device)
    check_tensor("packed", packed, torch.int32, ("R", 2), sigma.device)
    check_range("early_stop", early_stop, 0, 1)


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


# ---- lit ----------------------------------------------------------------------------------------
@autocast()
def composite_lit(
    sigma: torch.Tensor,
    albedo: torch.Tensor,
    gradient: torch.Tensor,
    t: torch.Tensor,
    dt: torch.Tensor,
    packed: torch.Tensor,
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    shading: torch.Tensor,
    early_stop: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """Shade the samples of each ray and composite them, in one pass (DreamFusion, section 3.1).

    With the weights w of `composite`, position p = rays_o + t rays_d, and the light position l,
    ambient a, diffuse d, texture k and base b of the ray's view:

    n = -g / √(|g|² + EPS²), EPS = 1e-3 per scene unit: the paper's normal -∇τ / |∇τ| wherever the
    density has a direction, 0 where it has none;
    c = (k albedo + b) (a + d max(0, n · (l - p) / |l - p|)), without the diffuse term at p = l;
    colour = Σ w c, opacity = Σ w, depth = Σ w t, normal = Σ w n (not normalised),
    orientation = Σ stopgrad(w) max(0, n · rays_d)² (Ref-NeRF, Verbin et al. 2022, eq. 11).

    k = 1, b = 0 shows the albedo; k = 0, b = 1 is white, textureless; a = 1, d = 0 unlit.
    Early stop, rows of no ray, `packed`, negative densities and NaN: as in `composite`.

    Args:
        sigma: (S,) float32 or float64, density per unit of dt, from 0.
        albedo: (S, 3) like sigma.
        gradient: (S, 3) like sigma, gradient of the log density by position, per scene unit. (That
            of the density has the same direction; EPS then is in its unit.)
        t: (S,) like sigma, distances.
        dt: (S,) like sigma, lengths of the samples' intervals.
        packed: (R, 2) int32, start and count of each ray's samples, as `march` makes it.
        rays_o, rays_d: (R, 3) like sigma, origins and directions. Directions must be unit vectors:
            neither checked nor normalised.
        shading: (B, 7) like sigma, rows l_x, l_y, l_z, a, d, k, b; l in scene units. B from 1,
            divides R: ray r belongs to view r B // R.
        early_stop: transmittance below which a ray ends, 0 (never) to 1.
    Returns:
        colour (R, 3), opacity (R,), depth (R,), weights (S,), normal (R, 3), orientation (R,):
        differentiable once, each of them, with respect to sigma, albedo, gradient, t and dt; but
        p is a constant to t, and max(0, x) has derivative 0 at 0. No gradient reaches rays_o,
        rays_d and shading.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check_samples(sigma, t, dt, packed, early_stop)
    rays = packed.shape[0]
    like = sigma.dtype, (sigma.shape[0], 3), sigma.device
    check_tensor("albedo", albedo, *like)
    check_tensor("gradient", gradient, *like)
    check_tensor("rays_o", rays_o, sigma.dtype, (rays, 3), sigma.device)
    check_tensor("rays_d", rays_d, sigma.dtype, (rays, 3), sigma.device)
    check_tensor("shading", shading, sigma.dtype, ("B", 7), sigma.device)
    views = shading.shape[0]
    if views == 0 or rays % views:
        raise ValueError(
            f"argument `shading`: expected a row a view, their number from 1 and a divisor of the"
            f" {rays} rays, got {views}"
        )
    return torch.ops.dreamfusion_fast.composite_lit(
        sigma, albedo, gradient, t, dt, packed, rays_o, rays_d, shading, early_stop
    )


def _lit_sizes(sigma, packed, shading):
    return packed.shape[0], sigma.shape[0], 3, packed.shape[0] // shading.shape[0]


def _lit_empty(sigma, albedo, gradient, t, dt, packed, rays_o, rays_d, shading, early_stop):
    rays = packed.shape[0]
    colour, normal = (sigma.new_empty(rays, 3) for _ in range(2))
    opacity, depth, orientation = (sigma.new_empty(rays) for _ in range(3))
    return colour, opacity, depth, torch.empty_like(sigma), normal, orientation


def _lit_forward(*inputs):
    *tensors, early_stop = inputs
    sigma, packed, shading = tensors[0], tensors[5], tensors[8]
    out = _lit_empty(*inputs)
    kernels(sigma).composite_lit_forward(
        scalar(sigma), *map(ptr, (*tensors, *out)), *_lit_sizes(sigma, packed, shading),
        early_stop, stream(sigma),
    )  # fmt: skip
    return out


def _lit_empty_grads(*arguments):
    sigma, albedo, gradient, t = arguments[6:10]
    rows = sigma.shape[0] if arguments[-1] else 0
    return *map(torch.empty_like, (sigma, albedo, gradient)), t.new_empty(rows), t.new_empty(rows)


def _lit_backward(*arguments):
    *tensors, early_stop, distances = arguments
    incoming, inputs, weights = tensors[:6], tensors[6:15], tensors[15]
    sigma, packed, shading = inputs[0], inputs[5], inputs[8]
    grads = _lit_empty_grads(*arguments)
    wanted = grads if distances else (*grads[:3], None, None)
    kernels(sigma).composite_lit_backward(
        scalar(sigma), *map(ptr, (*inputs, *incoming, weights, *wanted)),
        *_lit_sizes(sigma, packed, shading), early_stop, stream(sigma),
    )  # fmt: skip
    return grads


def _lit_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], output[3])
    ctx.early_stop = inputs[9]
    ctx.distances = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    ctx.set_materialize_grads(False)


def _lit_differentiate(ctx, *grads):
    grads = [None if g is None else g.contiguous() for g in grads]
    backward = torch.ops.dreamfusion_fast.composite_lit_backward
    *grads, t, dt = backward(*grads, *ctx.saved_tensors, ctx.early_stop, ctx.distances)
    distances = (t, dt) if ctx.distances else (None, None)
    return *grads, *distances, *[None] * 5


_LIT_INPUTS = (
    "Tensor sigma, Tensor albedo, Tensor gradient, Tensor t, Tensor dt, Tensor packed,"
    " Tensor rays_o, Tensor rays_d, Tensor shading"
)
register(
    f"composite_lit({_LIT_INPUTS}, float early_stop)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _lit_forward,
    _lit_empty,
)
register(
    "composite_lit_backward(Tensor? grad_colour, Tensor? grad_opacity, Tensor? grad_depth,"
    " Tensor? grad_weights, Tensor? grad_normal, Tensor? grad_orientation,"
    f" {_LIT_INPUTS}, Tensor weights, float early_stop, bool distances)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _lit_backward,
    _lit_empty_grads,
)
register_backward("composite_lit", _lit_differentiate, _lit_save)
