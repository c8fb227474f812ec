"""How `traverse_grids` finds the steps of rays: by `march` where it can, else cell by cell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ._checks import expect

ENTRIES = 1 << 22  # of a table of cells that is held at once
MOST = 2**31 - 1  # steps
NEARLY = 1e-6  # a plane so close to an end of a ray's way through a grid is not crossed


class Rays(NamedTuple):
    """Rays with the sorted entries and exits of m grids."""

    o: Tensor  # (R, 3)
    d: Tensor  # (R, 3)
    near: Tensor  # (R,)
    far: Tensor  # (R,)
    t_sorted: Tensor  # (R, 2 m)
    t_indices: Tensor  # (R, 2 m)
    hits: Tensor  # (R, m)


class Steps(NamedTuple):
    """Flat, ray by ray. Of two steps that touch, the end and the start are the same number."""

    ray: Tensor  # (S,) int64
    t0: Tensor  # (S,) float64
    t1: Tensor  # (S,) float64
    end: Tensor  # (R,) float64, where each ray stopped


def traverse(rays: Rays, binaries, aabbs, step: float, cone: float, limit: int) -> Steps:
    """The steps of rays in occupied cells, `limit` a ray at most (0: all): see `traverse_grids`.

    Distances are float64, so that rounding decides as little as it can.
    """
    rays = rays._replace(near=rays.near.double(), far=rays.far.double())
    level, start, stop = _segments(rays)
    if step > 0 and cone == 0:
        bins = _bins(stop - start, step)
        expect(int(bins.sum()) <= MOST, "step_size", f"at most {MOST} steps", f"{step}: more")
        if _march_fits(rays, binaries, aabbs, bins):
            ray, index = _march(rays, binaries, aabbs, step, start[:, 0], stop[:, 0])
            return _lattice(rays, ray, index, step, limit, _last(start, stop))
    table = 3 * (max(binaries.shape[1:]) + 1) * len(binaries) + 4 * len(binaries)
    chunk = max(1, ENTRIES // table)
    parts = []
    for i in range(0, max(1, len(rays.o)), chunk):
        part = Rays(*(x[i : i + chunk] for x in rays))
        spans = tuple(x[i : i + chunk] for x in (level, start, stop))
        steps = _by_cells(part, binaries, aabbs, spans, step, cone, limit)
        parts.append(steps._replace(ray=steps.ray + i))
    return Steps(*map(torch.cat, zip(*parts, strict=True)))


def _segments(rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """The grid that counts between neighbours of t_sorted, and from where to where: (R, 2 m - 1).
    Nothing counts in a segment that stops where it starts."""
    m = rays.hits.shape[1]
    entering = rays.t_indices < m
    grid = rays.t_indices % m
    level = torch.where(entering[:, :-1], grid[:, :-1], grid[:, 1:])
    counts = rays.hits.gather(1, grid[:, :-1]) & rays.hits.gather(1, level)
    counts &= entering[:, :-1] | ~entering[:, 1:]  # else a gap: out of one, not yet in the next
    t = rays.t_sorted.double()
    start = torch.maximum(t[:, :-1], rays.near[:, None])
    stop = torch.minimum(t[:, 1:], rays.far[:, None])
    counts &= start < stop
    return level, torch.where(counts, start, 0), torch.where(counts, stop, 0)


def _last(start: Tensor, stop: Tensor) -> Tensor:
    """Where the last segment of each ray stops, (R,); -inf for none."""
    return torch.where(stop > start, stop, -torch.inf).amax(1)


def _bins(t: Tensor, step: Tensor | float) -> Tensor:
    """How many steps from 0 on have their middle before t."""
    return torch.ceil(t / step - 0.5).clamp(min=0)


# ---- all steps of one length --------------------------------------------------------------------
def _lattice(rays: Rays, ray: Tensor, index: Tensor, step: float, limit: int, last) -> Steps:
    """Steps by their number from the near plane."""
    end = rays.near + _bins(last - rays.near, step) * step
    if limit:
        ray, index, full = _first(ray, index, limit, len(end))
        t = rays.near + (index.new_zeros(len(end)).index_put_((ray,), index) + 1) * step
        end = torch.where(full, t, end)
    near = rays.near[ray]
    return Steps(ray, near + index * step, near + (index + 1) * step, end)


def _first(ray: Tensor, values: Tensor, limit: int, n: int):
    """The first `limit` rows of each ray, and the rays that have as many or more."""
    counts = torch.bincount(ray, minlength=n)
    place = torch.arange(len(ray), device=ray.device) - (counts.cumsum(0) - counts)[ray]
    kept = place < limit
    return ray[kept], values[kept], counts >= limit


def _march_fits(rays: Rays, binaries: Tensor, aabbs: Tensor, bins: Tensor) -> bool:
    """Whether `march` knows the grid: one, of an even number of cells a side, a cube."""
    m, x, y, z = binaries.shape
    if not (m == 1 and x == y == z and x % 2 == 0 and x <= 1024 and len(bins)):
        return False
    edges = (aabbs[0, 3:] - aabbs[0, :3]).tolist()
    rounding = 4 * torch.finfo(aabbs.dtype).eps * float(aabbs.abs().max())
    cube = min(edges) > 0 and max(edges) - min(edges) <= rounding
    return cube and float(bins.max()) < 2**20 - 1


def _march(rays: Rays, binaries: Tensor, aabbs: Tensor, step: float, start: Tensor, stop: Tensor):
    """Ray and number (float64) of the steps whose middle is in an occupied cell, in order."""
    before, behind = _bins(start - rays.near, step), _bins(stop - rays.near, step)
    bins = (behind - before).clamp(min=0)
    near = rays.near + before * step
    center, bound = (aabbs[0, :3] + aabbs[0, 3:]) / 2, float(aabbs[0, 3] - aabbs[0, 0]) / 2
    dtype = rays.o.dtype
    near, index = near.to(dtype), before
    # March cuts the last bin at far: half a bin more, and what lies there is dropped below.
    far = near + (bins + 0.5).to(dtype) * step
    far = torch.where(bins > 0, far, near)
    arguments = (
        (rays.o - center.to(dtype)).contiguous(), rays.d.contiguous(), near, far,
        pack_bits(binaries[0]), binaries.shape[1], bound, step,
    )  # fmt: skip
    capacity = min(max(int(bins.sum()), 1), ENTRIES)
    samples = ops.march(*arguments, capacity, 0, jitter=False)
    if int(samples.count) > capacity:
        samples = ops.march(*arguments, int(samples.count), 0, jitter=False)
    first, counts = samples.packed.long().unbind(-1)
    ray = torch.repeat_interleave(counts)  # CUDA serves rays in any order
    place = torch.arange(len(ray), device=ray.device) - (counts.cumsum(0) - counts)[ray]
    number = torch.floor(((samples.t[first[ray] + place] - near[ray]) / step).double())
    kept = number < bins[ray]
    return ray[kept], (index[ray] + number)[kept]


def pack_bits(binary: Tensor) -> Tensor:
    """(G, G, G) bool to (G³ / 8,) uint8, bit c % 8 of byte c / 8 for cell c."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=binary.device)
    return (binary.reshape(-1, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


# ---- cell by cell -------------------------------------------------------------------------------
def _by_cells(rays: Rays, binaries, aabbs, spans, step: float, cone: float, limit: int) -> Steps:
    a, b, occupied, known = _cells(rays, binaries, aabbs, *spans)
    last = _last(*spans[1:])
    if step <= 0:
        ray, at = (occupied & known).nonzero().unbind(-1)
        end = torch.where(last > -torch.inf, last, rays.near)
        if limit:
            ray, at, full = _first(ray, at, limit, len(end))
            end = torch.where(full, end.index_put((ray,), b[ray, at]), end)
        return Steps(ray, a[ray, at], b[ray, at], end)
    if cone == 0:
        low, high = _bins(a - rays.near[:, None], step), _bins(b - rays.near[:, None], step)
        counts = torch.where(occupied & known, high - low, 0).long().flatten()
        row = torch.repeat_interleave(counts)
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        return _lattice(rays, row // a.shape[1], low.flatten()[row] + place, step, limit, last)
    return _growing(rays, a, b, occupied, known, step, cone, limit)


def _cells(rays: Rays, binaries: Tensor, aabbs: Tensor, level, start, stop):
    """The pieces [a, b] of rays between planes of the grid that counts, (R, K), in order: whether
    the cell there is occupied, and whether there is one. Pieces without any may lie between."""
    o, d = rays.o.double(), rays.d.double()
    size = torch.tensor(binaries.shape[1:], device=o.device)
    bounds = [torch.where(stop > start, t, torch.inf) for t in (start, stop)]
    for i, box in enumerate(aabbs.double()):
        counts = (level == i) & (stop > start)
        for axis in range(3):
            plane = torch.linspace(
                0, 1, binaries.shape[axis + 1] + 1, dtype=torch.float64, device=o.device
            )
            plane = box[axis] + plane * (box[axis + 3] - box[axis])
            t = (plane - o[:, axis, None]) / d[:, axis, None]  # infinite or NaN where parallel
            inside = torch.zeros_like(t, dtype=torch.bool)
            for s in counts.any(0).nonzero()[:, 0].tolist():
                low, high = start[:, s, None] + NEARLY, stop[:, s, None] - NEARLY
                inside |= counts[:, s, None] & (t > low) & (t < high)
            bounds.append(torch.where(inside, t, torch.inf))
    t = torch.cat(bounds, 1).sort(1).values
    t = t[:, : max(2, int(t.isfinite().sum(1).max()) if len(t) else 0)]
    a, b = t[:, :-1], t[:, 1:]
    known = b.isfinite() & (b > a)
    middle = torch.where(known, (a + b) / 2, 0)
    grid = torch.full_like(middle, -1, dtype=torch.int64)
    for s in range(level.shape[1]):
        inside = (middle >= start[:, s, None]) & (middle < stop[:, s, None])
        grid = torch.where(inside, level[:, s, None], grid)
    known &= grid >= 0
    grid = grid.clamp(min=0)
    box = aabbs.double()[grid]
    point = o[:, None] + middle[..., None] * d[:, None]
    cell = torch.floor((point - box[..., :3]) / (box[..., 3:] - box[..., :3]) * size).long()
    x, y, z = torch.minimum(cell.clamp(min=0), size - 1).unbind(-1)
    return a, b, binaries[grid, x, y, z], known


def _growing(rays: Rays, a, b, occupied, known, step: float, cone: float, limit: int) -> Steps:
    """Steps that grow with distance: every ray's next cell at a time."""
    t, count = rays.near.clone(), torch.zeros_like(rays.near, dtype=torch.int64)
    fresh = torch.ones_like(count, dtype=torch.bool)  # coming out of a gap
    found = [(count[:0], t[:0], t[:0])]

    def skip(t, to, where):
        dt = (t * cone).clamp(min=step)
        return torch.where(where, t + _bins(torch.where(where, to - t, 0), dt) * dt, t)

    for i in range(a.shape[1]):
        open_ = known[:, i] & (count < limit) if limit else known[:, i]
        t = skip(t, a[:, i], open_ & fresh)
        t = skip(t, b[:, i], open_ & ~occupied[:, i])
        going = open_ & occupied[:, i]
        while True:
            dt = (t * cone).clamp(min=step)
            going = going & (t + dt / 2 < b[:, i])
            ray = going.nonzero()[:, 0]
            if not len(ray):
                break
            found.append((ray, t[ray], (t + dt)[ray]))
            t, count = torch.where(going, t + dt, t), count + going
            if limit:
                going = going & (count < limit)
        fresh = torch.where(known[:, i], False, fresh | (b[:, i] > a[:, i]))
    ray, t0, t1 = map(torch.cat, zip(*found, strict=True))
    order = torch.sort(ray, stable=True).indices
    return Steps(ray[order], t0[order], t1[order], t)
