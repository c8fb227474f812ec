"""Multiresolution hash encoding of points."""

from __future__ import annotations

import math

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


def hash_table_rows(
    n_levels: int,
    base_resolution: int,
    finest_resolution: int,
    log2_table_size: int,
    scales: list[float] | None = None,
) -> tuple[list[int], list[int]]:
    """Lay out the levels of `hash_encode` in one table.

    Level l has N_l = base (finest / base)^(l / (L - 1)) cells a side, rounded to the nearest
    integer (a single level: N_0 = base), and min((N_l + 1)³, 2^log2_table_size) rows, rounded up
    to a multiple of 8. With scales s_l it has N_l = ⌈s_l⌉ + 1 vertices a side, and N_l³ stands in
    place of (N_l + 1)³.

    Args:
        n_levels: number of levels L, 1 to 32.
        base_resolution: N_0, 1 to 2^20.
        finest_resolution: N_(L-1), base_resolution to 2^20.
        log2_table_size: logarithm of the most rows a level may have, 3 to 28.
        scales: None, or L numbers above -1 and up to 2^20; the resolutions are then N_0, N_(L-1).
    Returns:
        resolutions: L numbers N_l.
        offsets: L + 1 numbers, the first row of each level and, last, the table's number of rows.
    Raises:
        ValueError: an argument's range is wrong.
    """
    check_range("n_levels", n_levels, 1, 32)
    check_range("log2_table_size", log2_table_size, 3, 28)
    if scales is None:
        check_range("base_resolution", base_resolution, 1, 2**20)
        check_range("finest_resolution", finest_resolution, base_resolution, 2**20)
        ratio, steps = finest_resolution / base_resolution, max(1, n_levels - 1)
        resolutions = [round(base_resolution * ratio ** (i / steps)) for i in range(n_levels)]
    else:
        resolutions = _resolutions(scales, n_levels, base_resolution, finest_resolution)
    offsets = [0]
    for resolution in resolutions:
        side = resolution + 1 if scales is None else resolution
        offsets.append(offsets[-1] + (min(side**3, 2**log2_table_size) + 7) // 8 * 8)
    return resolutions, offsets


def _resolutions(scales, n_levels, base, finest):
    if len(scales) != n_levels:
        raise ValueError(f"argument `scales`: expected {n_levels} numbers, got {len(scales)}")
    for scale in scales:
        if not -1 < scale <= 2**20:
            raise ValueError(f"argument `scales`: expected more than -1, to 2^20, got {scale}")
    resolutions = [math.ceil(scale) + 1 for scale in scales]
    check_range("base_resolution", base, resolutions[0], resolutions[0])
    check_range("finest_resolution", finest, resolutions[-1], resolutions[-1])
    return resolutions


@autocast()
def hash_encode(
    x: torch.Tensor,
    table: torch.Tensor,
    n_levels: int,
    base_resolution: int,
    finest_resolution: int,
    log2_table_size: int,
    interpolation: str = "linear",
    count: torch.Tensor | None = None,
    table_half: torch.Tensor | None = None,
    scales: list[float] | None = None,
) -> torch.Tensor:
    """Interpolate learnt features of L grids, hashed where they are large.

    instant-ngp's encoding (Müller et al. 2022, section 3). On level l a point x, clamped to the
    unit cube, lies at N_l x (no offset of half a cell, unlike tiny-cuda-nn), in the cell
    c = min(⌊N_l x⌋, N_l - 1) with fraction f = N_l x - c. Its F features are those of the cell's
    eight corners, weighted by Π_d (f_d or 1 - f_d), with "smoothstep" f² (3 - 2f) in place of f.
    Corner (i, j, k) is row i + (N_l + 1) (j + (N_l + 1) k) of its level if all (N_l + 1)³ fit in
    2^log2_table_size rows, else row (i ⊕ 2654435761 j ⊕ 805459861 k) mod 2^log2_table_size.
    `hash_table_rows` has N_l and each level's first row.

    With scales s_l the levels are tiny-cuda-nn's, which are staggered: x, not clamped, lies at
    s_l x + 1/2, in the cell ⌊s_l x + 1/2⌋, and N_l = ⌈s_l⌉ + 1 stands in place of N_l + 1; rows of
    levels that are not hashed are taken modulo 2^32, then modulo the level's number of them.

    The gradient of x is that of the cell c on its faces too, and, without scales, zero outside the
    cube. A NaN coordinate makes the point's features NaN. On the CPU gradients do not depend on the
    number of threads; on CUDA the table's is summed in no fixed order.

    Args:
        x: (N, 3) float32 or float64.
        table: (rows, F) like x, F one of 1, 2, 4, 8; rows as `hash_table_rows` says.
        n_levels: number of levels L, 1 to 32.
        base_resolution: cells a side of the coarsest level, 1 to 2^20.
        finest_resolution: cells a side of the finest level, base_resolution to 2^20.
        log2_table_size: logarithm of the most rows a level may have, 3 to 28.
        interpolation: "linear" or "smoothstep".
        count: (1,) int32 on the same device, number of valid rows of x; the others give zero.
        table_half: float16 copy of table, CUDA only, with float32 x and table. It is read in
            table's place, and the gradients are those at its values.
        scales: None, or L numbers above -1 and up to 2^20, of which float32 is used.
    Returns:
        (N, L F), dtype of x or, with table_half, float16; level by level; differentiable twice
        with respect to x and table.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check(
        x, table, n_levels, base_resolution, finest_resolution, log2_table_size, interpolation,
        count, table_half, scales,
    )  # fmt: skip
    return torch.ops.dreamfusion_fast.hash_encode(
        x, table, n_levels, base_resolution, finest_resolution, log2_table_size, interpolation,
        count, table_half, scales,
    )  # fmt: skip


@autocast("grad_out")
def hash_encode_gradient(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    n_levels: int,
    base_resolution: int,
    finest_resolution: int,
    log2_table_size: int,
    interpolation: str = "linear",
    count: torch.Tensor | None = None,
    table_half: torch.Tensor | None = None,
    scales: list[float] | None = None,
) -> torch.Tensor:
    """The gradient of x, given that of `hash_encode`'s output: Jᵀ grad_out, J = ∂ out / ∂ x.

    What torch.autograd.grad(out, x, grad_out, create_graph=True) gives, without the gradient of
    the table that autograd would compute beside it.

    Args:
        grad_out: (N, L F), dtype of hash_encode's output.
        x, ...: as for `hash_encode`.
    Returns:
        (N, 3), dtype of x; differentiable once with respect to grad_out, x and table.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check(
        x, table, n_levels, base_resolution, finest_resolution, log2_table_size, interpolation,
        count, table_half, scales,
    )  # fmt: skip
    dtype = x.dtype if table_half is None else torch.float16
    shape = x.shape[0], n_levels * table.shape[1]
    check_tensor("grad_out", grad_out, dtype, shape, x.device)
    return torch.ops.dreamfusion_fast.hash_encode_backward(
        grad_out, x, table, n_levels, base_resolution, finest_resolution, log2_table_size,
        interpolation, count, table_half, True, False, scales,
    )[0]  # fmt: skip


def _check(x, table, n_levels, base, finest, log2_size, interpolation, count, table_half, scales):
    check_tensor("x", x, shape=("N", 3))
    _, offsets = hash_table_rows(n_levels, base, finest, log2_size, scales)
    check_tensor("table", table, x.dtype, (offsets[-1], "F"), x.device)
    if table.shape[1] not in (1, 2, 4, 8):
        raise ValueError(f"argument `table`: expected 1, 2, 4 or 8 columns, got {table.shape[1]}")
    if interpolation not in ("linear", "smoothstep"):
        raise ValueError(
            f'argument `interpolation`: expected "linear" or "smoothstep", got "{interpolation}"'
        )
    check_count(count, x.device)
    if table_half is not None:
        _check_half(table_half, x, table)


def _check_half(table_half, x, table):
    check_tensor("table_half", table_half, torch.float16, tuple(table.shape), x.device)
    if x.dtype != torch.float32:
        raise TypeError(f"argument `table_half`: expected float32 x and table, got {x.dtype}")
    if not kernels(x).has_half:
        raise ValueError(f"argument `table_half`: expected None on {x.device}, got a tensor")


def _aligned(tensor):
    """The tensor, or a copy if it starts inside 16 bytes, which CUDA's kernels read in one go."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _levels(n_levels, base, finest, log2_size, scales):
    """What the kernels are told of the levels."""
    rows = hash_table_rows(n_levels, base, finest, log2_size, scales)
    return *rows, [] if scales is None else scales


def _empty(
    x, table, n_levels, base, finest, log2_size, interpolation, count, table_half, scales=None
):
    dtype = x.dtype if table_half is None else table_half.dtype
    return x.new_empty((x.shape[0], n_levels * table.shape[1]), dtype=dtype)


def _forward(
    x, table, n_levels, base, finest, log2_size, interpolation, count, table_half, scales=None
):
    out = _empty(x, table, n_levels, base, finest, log2_size, interpolation, count, table_half)
    table = _aligned(table if table_half is None else table_half)
    kernels(x).hash_encode_forward(
        scalar(table), ptr(x), ptr(table), ptr(out), ptr(count), x.shape[0], n_levels,
        table.shape[1], interpolation == "smoothstep",
        bool(scales), _levels(n_levels, base, finest, log2_size, scales), stream(x),
    )  # fmt: skip
    return out


def _empty_grads(
    grad_out, x, table, n_levels, base, finest, log2_size, interpolation, count, table_half,
    needs_x, needs_table, scales=None,
):  # fmt: skip
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    return grad_x, torch.empty_like(table) if needs_table else x.new_empty(0)


def _backward(
    grad_out, x, table, n_levels, base, finest, log2_size, interpolation, count, table_half,
    needs_x, needs_table, scales=None,
):  # fmt: skip
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    grad_table = torch.empty_like(table) if needs_table else x.new_empty(0)
    table, grad_out = _aligned(table if table_half is None else table_half), _aligned(grad_out)
    kernels(x).hash_encode_backward(
        scalar(table), ptr(x), ptr(table), ptr(grad_out), ptr(grad_x) if needs_x else 0,
        ptr(grad_table) if needs_table else 0, ptr(count), x.shape[0], n_levels, table.shape[1],
        interpolation == "smoothstep", bool(scales),
        _levels(n_levels, base, finest, log2_size, scales),
        stream(x),
    )  # fmt: skip
    return grad_x, grad_table


def _empty_second(
    tangent, grad_out, x, table, n_levels, base, finest, log2_size, interpolation, count,
    table_half, needs_grad_out, needs_x, needs_table, scales=None,
):  # fmt: skip
    wanted = (grad_out, needs_grad_out), (x, needs_x), (table, needs_table)
    return tuple(torch.empty_like(t) if needed else t.new_empty(0) for t, needed in wanted)


def _second(
    tangent, grad_out, x, table, n_levels, base, finest, log2_size, interpolation, count,
    table_half, needs_grad_out, needs_x, needs_table, scales=None,
):  # fmt: skip
    needs = needs_grad_out, needs_x, needs_table
    grads = _empty_second(
        tangent, grad_out, x, table, n_levels, base, finest, log2_size, interpolation, count,
        table_half, *needs,
    )  # fmt: skip
    features = table.shape[1]
    table, grad_out = _aligned(table if table_half is None else table_half), _aligned(grad_out)
    kernels(x).hash_encode_second(
        scalar(table), *map(ptr, (x, table, grad_out, tangent)),
        *(ptr(t) if needed else 0 for t, needed in zip(grads, needs)), ptr(count), x.shape[0],
        n_levels, features, interpolation == "smoothstep",
        bool(scales), _levels(n_levels, base, finest, log2_size, scales), stream(x),
    )  # fmt: skip
    return grads


def _save(ctx, inputs, output):
    x, table, *ctx.settings, count, table_half, ctx.scales = inputs
    ctx.save_for_backward(x, table, count, table_half)


def _differentiate(ctx, grad_out):
    x, table, count, table_half = ctx.saved_tensors
    needs_x, needs_table = ctx.needs_input_grad[:2]
    grad_x, grad_table = torch.ops.dreamfusion_fast.hash_encode_backward(
        grad_out.contiguous(), x, table, *ctx.settings, count, table_half, needs_x, needs_table,
        ctx.scales,
    )  # fmt: skip
    grads = grad_x if needs_x else None, grad_table if needs_table else None
    return *grads, *[None] * 8


def _save_backward(ctx, inputs, output):
    grad_out, x, table, *ctx.settings, count, table_half = inputs[:-3]
    ctx.needs_x, ctx.needs_table, ctx.scales = inputs[-3:]
    ctx.save_for_backward(grad_out, x, table, count, table_half)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, tangent, table_tangent):
    """The derivatives of ⟨grad_x, tangent⟩ + ⟨grad_table, table_tangent⟩: the latter is
    ⟨hash_encode(x, table_tangent), grad_out⟩."""
    grad_out, x, table, count, table_half = ctx.saved_tensors
    needs, rest = ctx.needs_input_grad[:3], (*ctx.settings, count)
    ops, grads = torch.ops.dreamfusion_fast, [None] * 3
    if tangent is not None and ctx.needs_x:
        second = ops.hash_encode_second(
            tangent.contiguous(), grad_out, x, table, *rest, table_half, *needs, ctx.scales
        )
        grads = [g if needed else None for g, needed in zip(second, needs)]
    if table_tangent is not None and ctx.needs_table:
        table_tangent = table_tangent.contiguous()
        if needs[0]:
            found = ops.hash_encode(x, table_tangent, *rest, None, ctx.scales).to(grad_out.dtype)
            grads[0] = found if grads[0] is None else grads[0] + found
        if needs[1]:
            found, _ = ops.hash_encode_backward(
                grad_out.to(x.dtype), x, table_tangent, *rest, None, True, False, ctx.scales
            )
            grads[1] = found if grads[1] is None else grads[1] + found
    return *grads, *[None] * 10


register(
    "hash_encode(Tensor x, Tensor table, SymInt n_levels, SymInt base_resolution,"
    " SymInt finest_resolution, SymInt log2_table_size, str interpolation, Tensor? count,"
    " Tensor? table_half, float[]? scales=None) -> Tensor",
    _forward,
    _empty,
)
_INPUTS = (
    "Tensor grad_out, Tensor x, Tensor table, SymInt n_levels, SymInt base_resolution,"
    " SymInt finest_resolution, SymInt log2_table_size, str interpolation, Tensor? count,"
    " Tensor? table_half"
)
register(
    f"hash_encode_backward({_INPUTS}, bool needs_x, bool needs_table, float[]? scales=None)"
    " -> (Tensor, Tensor)",
    _backward,
    _empty_grads,
)
register(
    f"hash_encode_second(Tensor tangent, {_INPUTS}, bool needs_grad_out, bool needs_x,"
    " bool needs_table, float[]? scales=None) -> (Tensor, Tensor, Tensor)",
    _second,
    _empty_second,
)
register_backward("hash_encode", _differentiate, _save)
register_backward("hash_encode_backward", _differentiate_backward, _save_backward)
