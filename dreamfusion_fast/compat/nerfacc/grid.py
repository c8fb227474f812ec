"""Rays through boxes and through occupancy grids."""

from __future__ import annotations

import torch
from torch import Tensor

from . import traversal
from ._checks import expect, expect_float
from .data_specs import RayIntervals, RaySamples


@torch.no_grad()
def ray_aabb_intersect(
    rays_o: Tensor,
    rays_d: Tensor,
    aabbs: Tensor,
    near_plane: float = -float("inf"),
    far_plane: float = float("inf"),
    miss_value: float = float("inf"),
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each ray enters and leaves each box (slab method, Kay and Kajiya 1986).

    A box that ends at or before the origin is missed. The planes only cut the result: a box
    behind far_plane is hit, with an entry that is farther than its exit.

    Args:
        rays_o, rays_d: (n_rays, 3), float32 or float64. A component of a direction may be 0.
        aabbs: (m, 6), lower and upper corner.
        near_plane, far_plane: the least entry and the greatest exit.
        miss_value: entry and exit of a miss.
    Returns:
        t_mins, t_maxs: (n_rays, m) like rays_o; hits: (n_rays, m) bool. No gradient.
    """
    expect_float("rays_o", rays_o, (None, 3), "(n_rays, 3)")
    expect_float("rays_d", rays_d, tuple(rays_o.shape), f"{tuple(rays_o.shape)}")
    expect_float("aabbs", aabbs, (None, 6), "(m, 6)")
    inverse = 1 / rays_d[:, None]
    lower, upper = aabbs[:, :3] - rays_o[:, None], aabbs[:, 3:] - rays_o[:, None]
    one, other = lower * inverse, upper * inverse
    # 0 / 0, a ray in the plane of a face: that axis does not bound it.
    entry = torch.minimum(one, other).nan_to_num(
        nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    leave = torch.maximum(one, other).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    t_mins, t_maxs = entry.amax(-1), leave.amin(-1)
    hits = (t_mins <= t_maxs) & (t_maxs > 0)
    t_mins = torch.where(hits, t_mins.clamp(min=near_plane), miss_value)
    t_maxs = torch.where(hits, t_maxs.clamp(max=far_plane), miss_value)
    return t_mins, t_maxs, hits


@torch.no_grad()
def traverse_grids(
    rays_o: Tensor,
    rays_d: Tensor,
    binaries: Tensor,
    aabbs: Tensor,
    near_planes: Tensor | None = None,
    far_planes: Tensor | None = None,
    step_size: float = 1e-3,
    cone_angle: float = 0.0,
    traverse_steps_limit: int | None = None,
    over_allocate: bool = False,
    rays_mask: Tensor | None = None,
    t_sorted: Tensor | None = None,
    t_indices: Tensor | None = None,
    hits: Tensor | None = None,
) -> tuple[RayIntervals, RaySamples, Tensor]:
    """Cut rays into steps, and keep those whose middle lies in an occupied cell.

    Steps begin at a ray's near plane; the one that starts at t is max(step_size, t cone_angle)
    long, but those skipped in an empty cell are all as long as the first of them. With
    step_size <= 0 there is one step for each cell that a ray crosses, from side to side.

    Where grids overlap, the one counts that the ray entered last; after it left that, the one that
    it leaves next. For nested grids that is the smallest around a point.

    Args:
        rays_o, rays_d: (n_rays, 3), float32 or float64.
        binaries: (m, x, y, z) bool, occupied cells of m grids.
        aabbs: (m, 6), the box of each grid, lower and upper corner.
        near_planes, far_planes: (n_rays,), from where to where; None: 0, infinity.
        traverse_steps_limit: samples a ray at most; None, 0 or below: no limit.
        over_allocate: leave room for that many samples of each ray (see Returns).
        rays_mask: (n_rays,) bool; other rays have no samples.
        t_sorted, t_indices: (n_rays, 2 m), entries and exits of `ray_aabb_intersect` in ascending
            order, and which each is, of the m entries and then m exits. hits: (n_rays, m). Computed
            unless all three are given.
    Returns:
        intervals, samples (in the middle of intervals): flat, ray by ray; with over_allocate, room
            for traverse_steps_limit samples (twice as many edges) a ray, in which unused rows have
            is_valid, is_left and is_right False, while packed_info counts the used rows alone.
        (n_rays,) where each ray stopped: a near plane to go on from. No gradient.
    """
    expect_float("rays_o", rays_o, (None, 3), "(n_rays, 3)")
    expect_float("rays_d", rays_d, tuple(rays_o.shape), f"{tuple(rays_o.shape)}")
    fits = isinstance(binaries, Tensor) and binaries.ndim == 4 and binaries.dtype == torch.bool
    expect(fits, "binaries", "bool tensor of shape (m, x, y, z)", binaries)
    expect_float("aabbs", aabbs, (len(binaries), 6), f"({len(binaries)}, 6)")
    n_rays, limit = len(rays_o), max(0, traverse_steps_limit or 0)
    expect(not over_allocate or limit, "traverse_steps_limit", "1 or more for over_allocate", limit)
    expect(step_size is not None, "step_size", "a number", None)
    expect(cone_angle is not None and cone_angle >= 0, "cone_angle", "a number from 0", cone_angle)
    if near_planes is None:
        near_planes = torch.zeros_like(rays_o[:, 0])
    if far_planes is None:
        far_planes = torch.full_like(rays_o[:, 0], torch.inf)
    for name, x in (("near_planes", near_planes), ("far_planes", far_planes)):
        expect_float(name, x, (n_rays,), f"({n_rays},)")
    if rays_mask is None:
        rays_mask = torch.ones_like(near_planes, dtype=torch.bool)
    expect(rays_mask.shape == near_planes.shape, "rays_mask", f"shape ({n_rays},)", rays_mask)
    if t_sorted is None or t_indices is None or hits is None:
        t_mins, t_maxs, hits = ray_aabb_intersect(rays_o, rays_d, aabbs)
        t_sorted, t_indices = torch.sort(torch.cat([t_mins, t_maxs], -1), -1)

    alive = rays_mask.nonzero()[:, 0]
    rays = traversal.Rays(
        rays_o[alive], rays_d[alive], near_planes[alive], far_planes[alive],
        t_sorted[alive], t_indices[alive], hits[alive],
    )  # fmt: skip
    steps = traversal.traverse(rays, binaries, aabbs, step_size, cone_angle, limit)
    ends = near_planes.clone()
    ends[alive] = steps.end.to(ends.dtype)
    ray = alive[steps.ray]
    room = limit if over_allocate else 0
    return *_pack(ray, steps, n_rays, rays_o.dtype, rays_mask if room else None, room), ends


def _pack(ray, steps, n_rays, dtype, mask, room) -> tuple[RayIntervals, RaySamples]:
    """The steps as intervals, in which touching ones share an edge, and as samples."""
    start = torch.ones_like(ray, dtype=torch.bool)
    start[1:] = (ray[1:] != ray[:-1]) | (steps.t0[1:] != steps.t1[:-1])
    edge_ray = torch.repeat_interleave(ray, start + 1)
    right = torch.cumsum(start + 1, 0) - 1  # the place of each step's right edge
    vals = torch.empty(len(edge_ray), dtype=dtype, device=ray.device)
    vals[right], vals[right[start] - 1] = steps.t1.to(dtype), steps.t0[start].to(dtype)
    sides = torch.zeros((2, len(edge_ray)), dtype=torch.bool, device=ray.device)
    sides[0, right - 1] = sides[1, right] = True
    edges, edge_place = _rooms(edge_ray, n_rays, mask, 2 * room)
    samples, place = _rooms(ray, n_rays, mask, room)
    valid = torch.ones_like(ray, dtype=torch.bool)
    middle = ((steps.t0 + steps.t1) / 2).to(dtype)
    return (
        RayIntervals(edge_place(vals), edges, edge_place(edge_ray), *map(edge_place, sides)),
        RaySamples(place(middle), samples, place(ray), place(valid)),
    )


def _rooms(ray: Tensor, n_rays: int, mask: Tensor | None, room: int):
    """packed_info of flat rows, and the function that puts rows into as much room a ray."""
    counts = torch.bincount(ray, minlength=n_rays)
    begin = counts.cumsum(0) - counts
    packed = torch.stack([begin, counts], -1)
    if mask is None:
        return packed, lambda rows: rows
    first = (mask.cumsum(0) - 1) * room
    at = first[ray] + torch.arange(len(ray), device=ray.device) - begin[ray]
    total = int(mask.sum()) * room
    return packed, lambda rows: rows.new_zeros(total).index_put_((at,), rows)


def _enlarge_aabb(aabb: Tensor, factor: float) -> Tensor:
    """The box (6,) with the same centre, `factor` times as large."""
    center, half = (aabb[:3] + aabb[3:]) / 2, (aabb[3:] - aabb[:3]) / 2
    return torch.cat([center - half * factor, center + half * factor])


def _query(x: Tensor, data: Tensor, base_aabb: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the finest of m nested grids at points, and whether any holds the point.

    Args:
        x: (N, 3). data: (m, x, y, z), the box of grid i is 2^i times base_aabb, (6,).
    """
    lower, upper = base_aabb.split(3)
    unit = (x - lower) / (upper - lower) - 0.5
    # frexp writes v = f 2^e with f in [1/2, 1): half of 2^level is the least power above v.
    level = (torch.frexp(unit.abs().amax(-1).clamp(min=0.1))[1].long() + 1).clamp(min=0)
    inside = level < len(data)
    resolution = torch.tensor(data.shape[1:], device=x.device)
    cell = ((unit / 2.0 ** level[:, None] + 0.5) * resolution).long()
    cell = torch.minimum(cell, resolution - 1)
    level = level.clamp(max=len(data) - 1)
    cell = cell.clamp(min=0)
    return data[level, cell[:, 0], cell[:, 1], cell[:, 2]] * inside, inside
