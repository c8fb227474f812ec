"""Density and colour from a network's outputs."""

from __future__ import annotations

import torch

from ._backend import (
    FLOATS,
    autocast,
    check_count,
    check_range,
    check_tensor,
    kernels,
    ptr,
    register,
    register_backward,
    scalar,
    stream,
)

LARGEST = 1e6


@autocast()
def radiance(
    out: torch.Tensor,
    positions: torch.Tensor,
    bias: float = 0.0,
    ceiling: float = 8.0,
    blob: str = "gaussian",
    blob_density: float = 0.0,
    blob_size: float = 1.0,
    raw: bool = False,
    of_x: torch.Tensor | None = None,
    scale: float = 1.0,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make density and colour of what a field's network gives (DreamFusion, section 3.1 and A.2).

    log σ = min(out₀ + blob(p) + bias, ceiling); values = sigmoid(out₁ ..), or out₁ .. if raw. The
    blob is "gaussian", λ exp(-|p|² / (2 s²)) (A.2), or "cone", λ (1 - |p| / s) (Magic3D), with
    λ = blob_density and s = blob_size. Given of_x, the gradient of out₀ with respect to
    x = scale p + constant, the gradient of log σ, without its ceiling, with respect to p is
    scale of_x + ∂ blob / ∂ p. NaN goes through; at the ceiling there is no gradient.

    Args:
        out: (N, 1 + C) float32, float64 or, on CUDA, float16, C at least 1.
        positions: (N, 3) p, dtype of out, float32 if that is float16; it gets no gradient.
        bias: added to the logarithm.
        ceiling: of the logarithm of density, at most 80.
        blob: "gaussian" or "cone".
        blob_density: λ.
        blob_size: s, above 0.
        raw: values are out₁ .. themselves.
        of_x: (N, 3) like positions, or None.
        scale: of x by p.
        count: (1,) int32 on the same device, number of valid rows; the others give zero.
    Returns:
        sigma (N,), values (N, C), gradient (N, 3), or (0, 3) without of_x: dtype of positions,
        differentiable once with respect to out and of_x.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_tensor("out", out, (*FLOATS, torch.float16), ("N", "1 + C"))
    if out.shape[1] < 2:
        raise ValueError(f"argument `out`: expected 2 columns or more, got {out.shape[1]}")
    if out.dtype == torch.float16 and not kernels(out).has_half:
        raise ValueError(f"argument `out`: expected float32 or float64 on {out.device}, got half")
    wide = torch.float32 if out.dtype == torch.float16 else out.dtype
    like = (wide, (out.shape[0], 3), out.device)
    check_tensor("positions", positions, *like)
    check_tensor("of_x", of_x, *like, optional=True)
    if blob not in ("gaussian", "cone"):
        raise ValueError(f'argument `blob`: expected "gaussian" or "cone", got "{blob}"')
    check_range("bias", bias, -LARGEST, LARGEST)
    check_range("ceiling", ceiling, -80, 80)
    check_range("blob_density", blob_density, -LARGEST, LARGEST)
    check_range("blob_size", blob_size, 1e-6, LARGEST)
    check_count(count, out.device)
    return torch.ops.dreamfusion_fast.radiance(
        out, positions, of_x, bias, ceiling, blob == "cone", blob_density, blob_size, raw, scale,
        count,
    )  # fmt: skip


def _empty(out, positions, of_x, bias, ceiling, cone, density, size, raw, scale, count):
    n, width = out.shape
    rows = 0 if of_x is None else n
    return tuple(positions.new_empty(shape) for shape in ((n,), (n, width - 1), (rows, 3)))


def _forward(out, positions, of_x, bias, ceiling, cone, density, size, raw, scale, count):
    made = _empty(out, positions, of_x, bias, ceiling, cone, density, size, raw, scale, count)
    sigma, values, gradient = made
    kernels(out).radiance_forward(
        scalar(out), *map(ptr, (out, positions, of_x, sigma, values)),
        0 if of_x is None else ptr(gradient), ptr(count), out.shape[0], out.shape[1] - 1, cone,
        raw, bias, ceiling, density, size, scale, stream(out),
    )  # fmt: skip
    return made


def _empty_grads(
    grad_sigma, grad_values, grad_gradient, out, sigma, values, ceiling, raw, scale, count,
    needs_of_x,
):  # fmt: skip
    rows = len(out) if needs_of_x else 0
    return torch.empty_like(out), sigma.new_empty(rows, 3)


def _backward(
    grad_sigma, grad_values, grad_gradient, out, sigma, values, ceiling, raw, scale, count,
    needs_of_x,
):  # fmt: skip
    incoming = grad_sigma, grad_values, grad_gradient
    grads = _empty_grads(*incoming, out, sigma, values, ceiling, raw, scale, count, needs_of_x)
    kernels(out).radiance_backward(
        scalar(out), *map(ptr, (*incoming, sigma, values, grads[0])),
        ptr(grads[1]) if needs_of_x else 0, ptr(count), *values.shape, raw, ceiling, scale,
        stream(out),
    )  # fmt: skip
    return grads


def _save(ctx, inputs, output):
    out, _, _, _, ctx.ceiling, _, _, _, ctx.raw, ctx.scale, count = inputs
    ctx.save_for_backward(out, *output[:2], count)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *grads):
    out, sigma, values, count = ctx.saved_tensors
    needs_of_x = ctx.needs_input_grad[2]
    grads = [None if g is None else g.contiguous() for g in grads]
    grad_out, grad_of_x = torch.ops.dreamfusion_fast.radiance_backward(
        *grads, out, sigma, values, ctx.ceiling, ctx.raw, ctx.scale, count, needs_of_x
    )
    return grad_out, None, grad_of_x if needs_of_x else None, *[None] * 8


register(
    "radiance(Tensor out, Tensor positions, Tensor? of_x, float bias, float ceiling, bool cone,"
    " float density, float size, bool raw, float scale, Tensor? count)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _empty,
)
register(
    "radiance_backward(Tensor? grad_sigma, Tensor? grad_values, Tensor? grad_gradient, Tensor out,"
    " Tensor sigma, Tensor values, float ceiling, bool raw, float scale, Tensor? count,"
    " bool needs_of_x) -> (Tensor, Tensor)",
    _backward,
    _empty_grads,
)
register_backward("radiance", _differentiate, _save)
