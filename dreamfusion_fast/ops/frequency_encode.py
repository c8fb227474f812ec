"""Sines and cosines of coordinates at frequencies that double."""

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
def frequency_encode(
    x: torch.Tensor,
    n_frequencies: int,
    variance: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode coordinates by sin(2^l x) and cos(2^l x), l = 0..L-1, L = n_frequencies.

    NeRF's encoding (Mildenhall et al. 2020, eq. 4) without its factor π. With a variance, the
    integrated encoding (mip-NeRF, Barron et al. 2021, eq. 14) of an isotropic Gaussian: band l is
    multiplied by exp(-4^l variance / 2). Column l D + d holds the sine of coordinate d, column
    (L + l) D + d its cosine (mip-NeRF's order).

    Args:
        x: (N, D) float32 or float64, any range; multiply by π for NeRF's encoding.
        n_frequencies: number of frequencies L, 1 to 24.
        variance: (N,) dtype of x, at least 0, of every coordinate of the row; None: 0.
        count: (1,) int32 on the same device, number of valid rows; the others are zero.
    Returns:
        (N, 2 L D), dtype of x; differentiable twice with respect to x and variance.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check(x, n_frequencies, variance, count)
    return torch.ops.dreamfusion_fast.frequency_encode(x, n_frequencies, variance, count)


@autocast()
def frequency_encode_gradient(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    n_frequencies: int,
    variance: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x, given that of frequency_encode(x, ...): of coordinate d, with a and b the
    gradients of its sines and cosines, the sum over l of
    2^l exp(-4^l variance / 2) (a_l cos(2^l x_d) - b_l sin(2^l x_d)).

    Args:
        grad_out: (N, 2 L D), dtype of x, on the same device.
        x, n_frequencies, variance, count: frequency_encode's.
    Returns:
        (N, D), dtype of x; differentiable once with respect to grad_out, x and variance.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check(x, n_frequencies, variance, count)
    shape = (x.shape[0], 2 * n_frequencies * x.shape[1])
    check_tensor("grad_out", grad_out, x.dtype, shape, x.device)
    return torch.ops.dreamfusion_fast.frequency_encode_backward(
        grad_out, x, n_frequencies, variance, count
    )[0]


def _check(x, n_frequencies, variance, count) -> None:
    check_tensor("x", x, shape=("N", "D"))
    check_range("n_frequencies", n_frequencies, 1, 24)
    check_tensor("variance", variance, x.dtype, (x.shape[0],), x.device, optional=True)
    check_count(count, x.device)


def _empty(x, n_frequencies, variance, count):
    return x.new_empty(x.shape[0], 2 * n_frequencies * x.shape[1])


def _forward(x, n_frequencies, variance, count):
    out = _empty(x, n_frequencies, variance, count)
    kernels(x).frequency_encode_forward(
        scalar(x), ptr(x), ptr(variance), ptr(out), ptr(count), *x.shape, n_frequencies,
        stream(x),
    )  # fmt: skip
    return out


def _empty_grads(grad_out, x, n_frequencies, variance, count):
    return torch.empty_like(x), x.new_empty(0 if variance is None else x.shape[0])


def _backward(grad_out, x, n_frequencies, variance, count):
    grad_x, grad_variance = _empty_grads(grad_out, x, n_frequencies, variance, count)
    kernels(x).frequency_encode_backward(
        scalar(x), ptr(x), ptr(variance), ptr(grad_out), ptr(grad_x),
        0 if variance is None else ptr(grad_variance), ptr(count), *x.shape, n_frequencies,
        stream(x),
    )  # fmt: skip
    return grad_x, grad_variance


def _save(ctx, inputs, output):
    x, ctx.n_frequencies, variance, count = inputs
    ctx.save_for_backward(x, variance, count)


def _differentiate(ctx, grad_out):
    x, variance, count = ctx.saved_tensors
    grad_x, grad_variance = torch.ops.dreamfusion_fast.frequency_encode_backward(
        grad_out.contiguous(), x, ctx.n_frequencies, variance, count
    )
    return grad_x, None, None if variance is None else grad_variance, None


def _empty_seconds(u, q, grad_out, x, n_frequencies, variance, count, wanted):
    pairs = zip((grad_out, x, variance), wanted, strict=True)
    return tuple(torch.empty_like(t) if w else x.new_empty(0) for t, w in pairs)


def _second(u, q, grad_out, x, n_frequencies, variance, count, wanted):
    out = _empty_seconds(u, q, grad_out, x, n_frequencies, variance, count, wanted)
    kernels(x).frequency_encode_second(
        scalar(x), ptr(x), ptr(variance), ptr(grad_out), ptr(u), ptr(q),
        *(ptr(t) if w else 0 for t, w in zip(out, wanted, strict=True)), ptr(count), *x.shape,
        n_frequencies, stream(x),
    )  # fmt: skip
    return out


def _save_backward(ctx, inputs, output):
    grad_out, x, ctx.n_frequencies, variance, count = inputs
    ctx.save_for_backward(grad_out, x, variance, count)
    ctx.set_materialize_grads(False)  # mostly only grad_x is used


def _differentiate_backward(ctx, u, q):
    grad_out, x, variance, count = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = torch.ops.dreamfusion_fast.frequency_encode_second(
        None if u is None else u.contiguous(),
        None if q is None or variance is None else q.contiguous(),
        grad_out, x, ctx.n_frequencies, variance, count, wanted,
    )  # fmt: skip
    grad_grad_out, grad_x, grad_variance = (
        g if w else None for g, w in zip(grads, wanted, strict=True)
    )
    return grad_grad_out, grad_x, None, grad_variance, None


register(
    "frequency_encode(Tensor x, SymInt n_frequencies, Tensor? variance, Tensor? count) -> Tensor",
    _forward,
    _empty,
)
register(
    "frequency_encode_backward(Tensor grad_out, Tensor x, SymInt n_frequencies, Tensor? variance,"
    " Tensor? count) -> (Tensor, Tensor)",
    _backward,
    _empty_grads,
)
# u, q: gradients of frequency_encode_backward's results. Results: of grad_out, x and variance, each
# empty unless wanted.
register(
    "frequency_encode_second(Tensor? u, Tensor? q, Tensor grad_out, Tensor x, SymInt n_frequencies,"
    " Tensor? variance, Tensor? count, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _second,
    _empty_seconds,
)
register_backward("frequency_encode", _differentiate, _save)
register_backward("frequency_encode_backward", _differentiate_backward, _save_backward)
