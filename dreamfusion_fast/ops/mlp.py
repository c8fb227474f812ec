"""Multilayer perceptron: fully connected layers, fused."""

from __future__ import annotations

import itertools

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


def mlp_parameters(widths: list[int], bias: bool = False) -> int:
    """Number of parameters of an `mlp` of these widths.

    Args:
        widths: inputs, hidden layers, outputs: 2 to 33 numbers, 1 to 256 each.
        bias: whether layers have one.
    Raises:
        ValueError: the number of widths or one of them is out of range.
    """
    if not 2 <= len(widths) <= 33:
        raise ValueError(f"argument `widths`: expected 2 to 33 numbers, got {len(widths)}")
    for width in widths:
        check_range("widths", width, 1, 256)
    return sum((i + bool(bias)) * o for i, o in itertools.pairwise(widths))


@autocast("x")
def mlp(
    x: torch.Tensor,
    params: torch.Tensor,
    widths: list[int],
    activation: str = "relu",
    bias: bool = False,
    count: torch.Tensor | None = None,
    params_half: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply fully connected layers: h₀ = x, h_(l+1) = act(W_l h_l + b_l), the last without act.

    The hidden activation is relu, max(z, 0), or silu, z / (1 + exp(-z)). Backward computes hidden
    values again: nothing of theirs is stored. Gradients do not depend on the number of threads;
    one that is not asked for is not computed. relu has no gradient at zero. NaN goes through.

    With float16 x (CUDA only) it runs on tensor cores: values and gradients of x and of hidden
    values are float16, sums and the gradient of params float32. float16 ends at 65504 and begins
    to lose digits at 6e-5: scale the loss so that gradients lie between. It needs a hidden layer,
    widths of at most 128, and parameters that fit in a GPU block's shared memory: about 40000.

    Args:
        x: (N, inputs) float32 or float64, or float16 with params_half.
        params: (mlp_parameters(widths, bias),) like x, float32 if x is float16: W_0 (out, in) row
            by row, then b_0 (out) if bias, then W_1 and so on.
        widths: inputs, hidden layers, outputs: 2 to 33 numbers, 1 to 256 each; multiples of 8 are
            fastest.
        activation: "relu" or "silu", of the hidden layers.
        bias: whether layers have one.
        count: (1,) int32 on the same device, number of valid rows of x; the others give zero.
        params_half: float16 copy of params, with float16 x only. It is read in place of params,
            which receives the gradient: keep the two equal (Adam's half_copies do).
    Returns:
        (N, outputs), dtype of x; differentiable with respect to x and params, and once more
        through the gradient of x (not through that of params, nor in float16).
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check(x, params, widths, activation, bias, count, params_half)
    return torch.ops.dreamfusion_fast.mlp(x, params, widths, activation, bias, count, params_half)


@autocast()
def mlp_gradient(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    params: torch.Tensor,
    widths: list[int],
    activation: str = "relu",
    bias: bool = False,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x, given that of `mlp`'s output.

    What torch.autograd.grad(out, x, grad_out, create_graph=True) gives, without the gradient of
    params that autograd would compute beside it.

    Args:
        grad_out: (N, outputs) like x.
        x, ...: as for `mlp`, float32 or float64.
    Returns:
        (N, inputs), dtype of x; differentiable once with respect to grad_out, x and params.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check(x, params, widths, activation, bias, count, None)
    check_tensor("grad_out", grad_out, x.dtype, (x.shape[0], widths[-1]), x.device)
    return torch.ops.dreamfusion_fast.mlp_backward(
        grad_out, x, params, widths, activation, bias, count, None, True, False
    )[0]


def _check(x, params, widths, activation, bias, count, params_half):
    n_params = mlp_parameters(widths, bias)
    check_tensor("x", x, FLOATS if params_half is None else torch.float16, ("N", widths[0]))
    if params_half is None:
        check_tensor("params", params, x.dtype, (n_params,), x.device)
    else:
        check_tensor("params", params, torch.float32, (n_params,), x.device)
        check_tensor("params_half", params_half, torch.float16, (n_params,), x.device)
        if not kernels(x).has_half:
            raise ValueError(
                f"argument `params_half`: expected None on {x.device}: it is for CUDA only"
            )
    if activation not in ("relu", "silu"):
        raise ValueError(f'argument `activation`: expected "relu" or "silu", got "{activation}"')
    check_count(count, x.device)


def _empty(x, params, widths, activation, bias, count, params_half):
    return x.new_empty(x.shape[0], widths[-1])


def _forward(x, params, widths, activation, bias, count, params_half):
    shape = widths, bias, activation == "silu"
    if params_half is not None and not kernels(x).mlp_half_fits(shape):
        raise ValueError(
            "argument `widths`: expected, for float16, one hidden layer or more, widths of at most"
            f" 128 and about 40000 parameters, got {list(widths)}"
        )
    out = _empty(x, params, widths, activation, bias, count, params_half)
    kernels(x).mlp_forward(
        scalar(x), ptr(x), ptr(params if params_half is None else params_half), ptr(out),
        ptr(count), x.shape[0], shape, stream(x),
    )  # fmt: skip
    return out


def _empty_grads(
    grad_out, x, params, widths, activation, bias, count, params_half, needs_x, needs_params
):
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    return grad_x, torch.empty_like(params) if needs_params else params.new_empty(0)


def _backward(
    grad_out, x, params, widths, activation, bias, count, params_half, needs_x, needs_params
):
    grad_x, grad_params = _empty_grads(
        grad_out, x, params, widths, activation, bias, count, params_half, needs_x, needs_params
    )
    shape = widths, bias, activation == "silu"
    size = kernels(x).mlp_workspace(scalar(x), x.shape[0], shape, needs_params, False)
    workspace = params.new_empty(size)
    kernels(x).mlp_backward(
        scalar(x), ptr(x), ptr(params if params_half is None else params_half), ptr(grad_out),
        ptr(grad_x) if needs_x else 0, ptr(grad_params) if needs_params else 0, ptr(workspace),
        ptr(count), x.shape[0], shape, stream(x),
    )  # fmt: skip
    return grad_x, grad_params


def _empty_second(
    tangent, grad_out, x, params, widths, activation, bias, count, needs_grad_out, needs_x,
    needs_params,
):  # fmt: skip
    wanted = (grad_out, needs_grad_out), (x, needs_x), (params, needs_params)
    return tuple(torch.empty_like(t) if needed else t.new_empty(0) for t, needed in wanted)


def _second(
    tangent, grad_out, x, params, widths, activation, bias, count, needs_grad_out, needs_x,
    needs_params,
):  # fmt: skip
    needs = needs_grad_out, needs_x, needs_params
    grads = _empty_second(
        tangent, grad_out, x, params, widths, activation, bias, count, *needs
    )  # fmt: skip
    shape = widths, bias, activation == "silu"
    size = kernels(x).mlp_workspace(scalar(x), x.shape[0], shape, needs_params, True)
    workspace = x.new_empty(size)
    kernels(x).mlp_second(
        scalar(x), *map(ptr, (x, params, grad_out, tangent)),
        *(ptr(t) if needed else 0 for t, needed in zip(grads, needs)), ptr(workspace), ptr(count),
        x.shape[0], shape, stream(x),
    )  # fmt: skip
    return grads


def _save(ctx, inputs, output):
    x, params, *ctx.settings, count, params_half = inputs
    ctx.save_for_backward(x, params, count, params_half)


def _differentiate(ctx, grad_out):
    x, params, count, params_half = ctx.saved_tensors
    needs_x, needs_params = ctx.needs_input_grad[:2]
    grad_x, grad_params = torch.ops.dreamfusion_fast.mlp_backward(
        grad_out.contiguous(), x, params, *ctx.settings, count, params_half, needs_x, needs_params
    )
    grads = grad_x if needs_x else None, grad_params if needs_params else None
    return *grads, *[None] * 5


def _save_backward(ctx, inputs, output):
    grad_out, x, params, *ctx.settings, count, params_half, needs_x, needs_params = inputs
    ctx.made = needs_x, needs_params
    ctx.save_for_backward(grad_out, x, params, count)
    ctx.half = params_half is not None
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, tangent, params_tangent):
    """The derivatives of ⟨grad_x, tangent⟩."""
    if params_tangent is not None and ctx.made[1]:
        raise RuntimeError("mlp: the gradient of params cannot be differentiated, that of x can")
    if ctx.half:
        raise RuntimeError("mlp: in float16 it can be differentiated once")
    if tangent is None or not ctx.made[0]:
        return (None,) * 10
    grad_out, x, params, count = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    second = torch.ops.dreamfusion_fast.mlp_second(
        tangent.contiguous(), grad_out, x, params, *ctx.settings, count, *needs
    )
    return *(g if needed else None for g, needed in zip(second, needs)), *[None] * 7


register(
    "mlp(Tensor x, Tensor params, SymInt[] widths, str activation, bool bias, Tensor? count,"
    " Tensor? params_half) -> Tensor",
    _forward,
    _empty,
)
_INPUTS = (
    "Tensor grad_out, Tensor x, Tensor params, SymInt[] widths, str activation, bool bias,"
    " Tensor? count"
)
register(
    f"mlp_backward({_INPUTS}, Tensor? params_half, bool needs_x, bool needs_params)"
    " -> (Tensor, Tensor)",
    _backward,
    _empty_grads,
)
register(
    f"mlp_second(Tensor tangent, {_INPUTS}, bool needs_grad_out, bool needs_x, bool needs_params)"
    " -> (Tensor, Tensor, Tensor)",
    _second,
    _empty_second,
)
register_backward("mlp", _differentiate, _save)
register_backward("mlp_backward", _differentiate_backward, _save_backward)
