"""Running sums and products, along the last dimension or within the chunks of a flat tensor.

Flat tensors are scanned by doubling: after step k each entry holds its chunk's last 2^k entries.
An infinity or a NaN stays in its chunk, zeros have their right gradient in products, and autograd
differentiates the result as often as wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import expect, expect_packed


def inclusive_sum(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """out_i = Σ_(j≤i) inputs_j, within each chunk.

    Args:
        inputs: (..., n); or (n,) with one of the next two.
        packed_info: (n_chunks, 2) integers, start and count of each chunk. An entry of no chunk
            is treated as a chunk of its own.
        indices: (n,) integers: runs of equal ones are chunks. (After 0.5.3.)
    Returns:
        like inputs; differentiable.
    Raises:
        ValueError: a chunk points out of inputs, or an argument has another shape.
    """
    if packed_info is None and indices is None:
        return torch.cumsum(inputs, dim=-1)
    rank, longest = _ranks(inputs, packed_info, indices)
    return _inclusive(inputs, rank, longest, torch.add, 0)


def exclusive_sum(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """out_i = Σ_(j<i) inputs_j: as `inclusive_sum`, without the entry itself."""
    if packed_info is None and indices is None:
        first = torch.zeros_like(inputs[..., :1])
        return torch.cumsum(torch.cat([first, inputs[..., :-1]], dim=-1), dim=-1)
    rank, longest = _ranks(inputs, packed_info, indices)
    return _inclusive(_shifted(inputs, 1, rank, 0), rank, longest, torch.add, 0)


def inclusive_prod(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """out_i = Π_(j≤i) inputs_j, within each chunk: see `inclusive_sum`."""
    if packed_info is None and indices is None:
        return torch.cumprod(inputs, dim=-1)
    rank, longest = _ranks(inputs, packed_info, indices)
    return _inclusive(inputs, rank, longest, torch.mul, 1)


def exclusive_prod(
    inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None
) -> Tensor:
    """out_i = Π_(j<i) inputs_j, within each chunk: see `inclusive_sum`."""
    if packed_info is None and indices is None:
        first = torch.ones_like(inputs[..., :1])
        return torch.cumprod(torch.cat([first, inputs[..., :-1]], dim=-1), dim=-1)
    rank, longest = _ranks(inputs, packed_info, indices)
    return _inclusive(_shifted(inputs, 1, rank, 1), rank, longest, torch.mul, 1)


def _shifted(x: Tensor, by: int, rank: Tensor, neutral: float) -> Tensor:
    """Each entry's neighbour `by` places before it in its chunk, or the neutral element."""
    before = torch.cat([x.new_full((min(by, len(x)),), neutral), x[:-by]])
    return torch.where(rank >= by, before, neutral)


def _inclusive(x: Tensor, rank: Tensor, longest: int, combine, neutral: float) -> Tensor:
    by = 1
    while by < longest:
        x = combine(x, _shifted(x, by, rank, neutral))
        by *= 2
    return x


def _ranks(inputs: Tensor, packed_info: Tensor | None, indices: Tensor | None):
    """Each entry's place in its chunk, (n,) from 0, and the length of the longest chunk."""
    expect(
        packed_info is None or indices is None,
        "indices",
        "None beside packed_info",
        "both of them",
    )
    expect(inputs.ndim == 1, "inputs", "a flat tensor, (n,)", inputs)
    if indices is None:
        return _chunk_ranks(inputs, packed_info)
    expect(indices.shape == inputs.shape, "indices", f"shape {tuple(inputs.shape)}", indices)
    place = torch.arange(len(indices), device=indices.device)
    start = torch.zeros_like(place)
    start[1:] = torch.where(indices[1:] != indices[:-1], place[1:], 0)
    rank = place - start.cummax(0).values
    return rank, int(rank.max()) + 1 if len(rank) else 0


def _chunk_ranks(inputs: Tensor, packed_info: Tensor):
    expect_packed("packed_info", packed_info)
    n = len(inputs)
    place = torch.arange(n, device=inputs.device)
    if len(packed_info) == 0:
        return torch.zeros_like(place), 0
    starts, counts = packed_info.long().unbind(-1)
    starts = torch.where(counts > 0, starts, 0)
    lowest, least, end, longest, total = torch.stack(
        [starts.min(), counts.min(), (starts + counts).max(), counts.max(), counts.sum()]
    ).tolist()
    lowest = min(lowest, least)
    expect(lowest >= 0, "packed_info", "starts and counts from 0", lowest)
    expect(end <= n, "packed_info", f"chunks within the {n} inputs", f"one that ends at {end}")
    expect(total <= n, "packed_info", f"counts that sum to at most {n}", total)
    # Empty chunks write to a place behind the last one.
    at = torch.where(counts > 0, starts, n)
    start = place.new_zeros(n + 1).index_put_((at,), starts)[:n].cummax(0).values
    length = place.new_zeros(n + 1).index_put_((at,), counts)[start]
    rank = place - start
    return torch.where(rank < length, rank, 0), longest
