"""Real spherical harmonics of directions."""

from __future__ import annotations

import torch

from ._backend import (
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


@autocast()
def spherical_harmonics(
    dirs: torch.Tensor, degree: int, count: torch.Tensor | None = None
) -> torch.Tensor:
    """Evaluate the real spherical harmonics of the first `degree` bands.

    Component l² + l + m has band l and order m, in the order and with the signs of instant-ngp
    (Müller et al. 2022, tiny-cuda-nn). A polynomial in the vector as given: directions are
    expected to have unit length and are not normalised. NaN in, NaN out (but for the constant).

    Args:
        dirs: (N, 3) float32 or float64, directions.
        degree: number of bands, 1 to 8.
        count: (1,) int32 on the same device, number of valid rows; the others are zero.
    Returns:
        (N, degree²), dtype of dirs; differentiable once with respect to dirs.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_tensor("dirs", dirs, shape=("N", 3))
    check_range("degree", degree, 1, 8)
    check_count(count, dirs.device)
    return torch.ops.dreamfusion_fast.spherical_harmonics(dirs, degree, count)


def _forward(dirs, degree, count):
    out = dirs.new_empty(dirs.shape[0], degree**2)
    kernels(dirs).spherical_harmonics_forward(
        scalar(dirs), ptr(dirs), ptr(out), ptr(count), dirs.shape[0], degree, stream(dirs)
    )
    return out


def _backward(grad_out, dirs, degree, count):
    grad = torch.empty_like(dirs)
    kernels(dirs).spherical_harmonics_backward(
        scalar(dirs), ptr(dirs), ptr(grad_out), ptr(grad), ptr(count), dirs.shape[0], degree,
        stream(dirs),
    )  # fmt: skip
    return grad


def _save(ctx, inputs, output):
    dirs, ctx.degree, count = inputs
    ctx.save_for_backward(dirs, count)


def _differentiate(ctx, grad_out):
    dirs, count = ctx.saved_tensors
    backward = torch.ops.dreamfusion_fast.spherical_harmonics_backward
    return backward(grad_out.contiguous(), dirs, ctx.degree, count), None, None


register(
    "spherical_harmonics(Tensor dirs, SymInt degree, Tensor? count) -> Tensor",
    _forward,
    lambda dirs, degree, count: dirs.new_empty(dirs.shape[0], degree**2),
)
register(
    "spherical_harmonics_backward(Tensor grad_out, Tensor dirs, SymInt degree, Tensor? count)"
    " -> Tensor",
    _backward,
    lambda grad_out, dirs, degree, count: torch.empty_like(dirs),
)
register_backward("spherical_harmonics", _differentiate, _save)
