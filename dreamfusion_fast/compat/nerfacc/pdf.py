"""Searching in, and sampling from, the distributions along rays.

Batched values hold a ray a row, (..., n). Flat ones, (all,), need their `packed_info`.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from ._checks import expect, expect_packed
from .data_specs import RayIntervals, RaySamples


@torch.no_grad()
def searchsorted(
    sorted_sequence: RayIntervals | RaySamples, values: RayIntervals | RaySamples
) -> tuple[Tensor, Tensor]:
    """The neighbours of values among the sorted ones of the same ray.

    sorted[left] <= value < sorted[right], where right = left + 1. A value below all, or not below
    the last, is treated as one within: left = right = first, or left = last - 1, right = last.

    Args:
        sorted_sequence: ascending along each ray; at least one a ray where values are.
        values: of the same number of rays, flat or batched whatever sorted_sequence is.
    Returns:
        left, right: int64 like values.vals. For batched values they count from the start of a
        row, for flat ones from the start of sorted_sequence.vals.flatten().
    """
    start, count = _rows("sorted_sequence", sorted_sequence)
    ray = _ray_of_each("values", values)
    rays = _rows("values", values)[0]
    expect(len(rays) == len(start), "values", f"{len(start)} rays, as sorted_sequence", len(rays))
    first, last = start[ray], (start + count)[ray] - 1
    expect(
        bool((last >= first).all()), "sorted_sequence", "an entry for each ray of values", "none"
    )
    query = values.vals.flatten()
    above = _upper_bound(sorted_sequence.vals.flatten(), first, last, query)
    left, right = torch.maximum(above - 1, first), above
    if values.vals.ndim > 1:
        left, right = left - first, right - first
    return left.view(values.vals.shape), right.view(values.vals.shape)


@torch.no_grad()
def importance_sampling(
    intervals: RayIntervals,
    cdfs: Tensor,
    n_intervals_per_ray: Tensor | int,
    stratified: bool = False,
) -> tuple[RayIntervals, RaySamples]:
    """Sample each ray by the inverse of its piecewise linear CDF, and put intervals around them.

    Sample i of n of a ray is where the CDF is cdf_first + (i + u) (cdf_last - cdf_first) / n, with
    u = 1/2 or, stratified, one uniform number a ray; in the middle of an edge's neighbours where
    the CDF is flat. Intervals end half way between samples; the outer ones are as wide on either
    side of their sample, but stay within the edges of the ray. A single sample's interval is all of
    its ray. No gradient.

    Args:
        intervals: edges, ascending along each ray; at least one a ray that is sampled.
        cdfs: like intervals.vals, the CDF at the edges.
        n_intervals_per_ray: an int for all rays, or (n_rays,) integers, 0 for none.
    Returns:
        intervals and samples, in the dtype of intervals.vals: for an int batched, (..., n + 1) and
        (..., n); for a tensor flat, with packed_info, ray_indices, is_left and is_right.
    """
    start, count = _rows("intervals", intervals)
    shape = tuple(intervals.vals.shape)
    expect(cdfs.shape == intervals.vals.shape, "cdfs", f"shape {shape}", cdfs)
    batched = not isinstance(n_intervals_per_ray, Tensor)
    if batched:
        n = operator.index(n_intervals_per_ray)
        expect(n >= 1, "n_intervals_per_ray", "1 or more", n)
        counts = torch.full_like(start, n)
    else:
        counts = n_intervals_per_ray
    fits = counts.shape == start.shape and not counts.is_floating_point()
    expect(fits, "n_intervals_per_ray", f"int or int64 tensor ({len(start)},)", counts)
    counts = counts.long()
    expect(bool((counts >= 0).all()), "n_intervals_per_ray", "0 or more", "less")
    expect(bool(((count > 0) | (counts == 0)).all()), "intervals", "an edge for each ray", "none")

    vals, cdf = intervals.vals.flatten(), cdfs.flatten()
    ray = torch.repeat_interleave(counts)
    begin = counts.cumsum(0) - counts  # of each ray's samples
    place = torch.arange(len(ray), device=ray.device) - begin[ray]
    first, last = start[ray], (start + count)[ray] - 1
    bias = torch.rand(len(start), dtype=cdf.dtype, device=cdf.device)[ray] if stratified else 0.5
    step = (cdf[last] - cdf[first]) / counts[ray]
    t = _invert(cdf, vals, first, last, cdf[first] + (place + bias) * step)
    edges = _edges_around(t, ray, place, counts, vals[first], vals[last])
    if batched:
        lead = shape[:-1] if len(shape) > 1 else (len(start),)
        return RayIntervals(edges.vals.view(*lead, n + 1)), RaySamples(t.view(*lead, n))
    packed = torch.stack([begin, counts], -1)
    return edges, RaySamples(t, packed, ray, torch.ones_like(ray, dtype=torch.bool))


def _rows(name: str, spec: RayIntervals | RaySamples) -> tuple[Tensor, Tensor]:
    """Start and count of each ray's entries in the flattened vals."""
    vals = spec.vals
    if vals.ndim > 1:
        n = vals.shape[-1]
        rows = vals.numel() // n if n else vals.shape[:-1].numel()
        start = torch.arange(rows, device=vals.device) * n
        return start, torch.full_like(start, n)
    expect_packed(f"{name}.packed_info", spec.packed_info)
    start, count = spec.packed_info.long().unbind(-1)
    inside = bool(((start >= 0) & (count >= 0) & (start + count <= len(vals))).all())
    expect(inside, f"{name}.packed_info", f"chunks within {len(vals)} values", "one outside")
    return start, count


def _ray_of_each(name: str, spec: RayIntervals | RaySamples) -> Tensor:
    """The row of each of the flattened vals."""
    if spec.vals.ndim > 1 or spec.ray_indices is None:
        start, count = _rows(name, spec)
        ray = torch.repeat_interleave(count)
        total, n = len(ray), spec.vals.numel()
        expect(total == n, f"{name}.packed_info", f"counts that sum to {n}", total)
        place = torch.arange(total, device=ray.device) - (count.cumsum(0) - count)[ray]
        return torch.empty_like(ray).scatter_(0, start[ray] + place, ray)
    return spec.ray_indices.long()


def _upper_bound(keys: Tensor, first: Tensor, last: Tensor, query: Tensor) -> Tensor:
    """The first place in [first, last) whose key is above the query; last if none is."""
    low, high = first, last
    for _ in range(int((last - first).max()).bit_length() if len(query) else 0):
        middle = (low + high) // 2
        above = keys[middle] > query
        searching = low < high
        high = torch.where(searching & above, middle, high)
        low = torch.where(searching & ~above, middle + 1, low)
    return low


def _invert(cdf: Tensor, vals: Tensor, first: Tensor, last: Tensor, u: Tensor) -> Tensor:
    """Where the piecewise linear CDF through (vals, cdf) is u."""
    right = _upper_bound(cdf, first, last, u)
    left = torch.maximum(right - 1, first)
    width = cdf[right] - cdf[left]
    flat = width < 1e-10
    share = torch.where(flat, 0.5, (u - cdf[left]) / torch.where(flat, 1, width))
    return vals[left] + share * (vals[right] - vals[left])


def _edges_around(t, ray, place, counts, lowest, highest) -> RayIntervals:
    """The edges half way between the samples t of each ray, and one beyond either end."""
    n_edges = counts + (counts > 0)
    begin = n_edges.cumsum(0) - n_edges
    is_first, is_last = place == 0, place == counts[ray] - 1
    gap = torch.zeros_like(t)  # to the sample before
    gap[1:] = t[1:] - t[:-1]
    gap = torch.where(is_first, torch.cat([gap[1:], gap[:1]]), gap)  # of a first one: behind it
    alone = is_first & is_last
    left = torch.where(is_first, torch.maximum(t - gap / 2, lowest), t - gap / 2)
    left = torch.where(alone, lowest, left)
    right = torch.where(alone, highest, torch.minimum(t + gap / 2, highest))
    at = begin[ray] + place
    total = len(t) + int((counts > 0).sum())
    vals = t.new_empty(total).scatter_(0, at, left)
    vals[at[is_last] + 1] = right[is_last]
    is_left = torch.zeros(total, dtype=torch.bool, device=t.device)
    is_left[at] = True
    is_right = torch.zeros_like(is_left)
    is_right[at + 1] = True
    packed = torch.stack([begin, n_edges], -1)
    return RayIntervals(vals, packed, torch.repeat_interleave(n_edges), is_left, is_right)
