"""compat.nerfacc: boxes and grids, against rays that are walked cell by cell in Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dreamfusion_fast.compat.nerfacc import ray_aabb_intersect, traversal, traverse_grids
from dreamfusion_fast.compat.nerfacc.grid import _enlarge_aabb, _query

INF = math.inf


def rays(rng, n, dtype=torch.float64, spread=1.5):
    """Origins in and around a box of half edge 1, unit directions, some along an axis."""
    o = spread * torch.randn(n, 3, generator=rng, dtype=torch.float64)
    d = 0.7 * torch.rand(n, 3, generator=rng, dtype=torch.float64) - 0.35 - o
    d[::5, 1] = 0
    o[::5, 1] *= 0.3
    d[:1] = torch.tensor([1.0, 0.0, 0.0])
    return o.to(dtype), (d / d.norm(dim=-1, keepdim=True)).to(dtype)


def nested(levels, box=(-1.0, -1.1, -0.9, 1.0, 0.9, 1.2)):
    return torch.stack([_enlarge_aabb(torch.tensor(box).double(), 2**i) for i in range(levels)])


def slab(o, d, box, near=-INF, far=INF):
    """Entry and exit of one ray and box; None for a miss."""
    low, high = -INF, INF
    for k in range(3):
        if d[k] == 0:
            if not box[k] <= o[k] <= box[k + 3]:
                return None
            continue
        one, other = sorted([(box[k] - o[k]) / d[k], (box[k + 3] - o[k]) / d[k]])
        low, high = max(low, one), min(high, other)
    return (max(low, near), min(high, far)) if low <= high and high > 0 else None


def smallest(point, boxes):
    """The first of nested boxes that holds the point."""
    for i, box in enumerate(boxes):
        if all(box[k] <= point[k] < box[k + 3] for k in range(3)):
            return i
    return None


def pieces(o, d, boxes, binaries, near, far):
    """[(start, end, occupied), ...] of one ray, between planes of the smallest grid around."""
    shape = binaries.shape[1:]
    cuts = {near, far}
    for box in boxes:
        for k in range(3):
            for i in range(shape[k] + 1):
                if d[k]:
                    cuts.add((box[k] + (box[k + 3] - box[k]) * i / shape[k] - o[k]) / d[k])
    cuts = sorted(t for t in cuts if near <= t <= far)
    found, before = [], None
    for a, b in itertools.pairwise(cuts):
        middle = [o[k] + d[k] * (a + b) / 2 for k in range(3)]
        level = smallest(middle, boxes)
        if level is None or b - a < 1e-9:
            continue
        box = boxes[level]
        share = [(middle[k] - box[k]) / (box[k + 3] - box[k]) for k in range(3)]
        cell = (level, *[int(share[k] * shape[k]) for k in range(3)])
        if cell == before:  # a plane of another grid
            found[-1] = (found[-1][0], b, found[-1][2])
        else:
            found.append((a, b, bool(binaries[cell])))
        before = cell
    return found


def walk(o, d, boxes, binaries, near, far, step, cone, limit=0):
    """Samples (start, end) of one ray, and where it stops: one cell after the other."""
    samples, t, first = [], near, True
    for a, b, occupied in pieces(o, d, boxes, binaries, near, min(far, 1e3)):
        if limit and len(samples) >= limit:
            break
        if step <= 0:
            if occupied:
                samples.append((a, b))
            t = b
            continue
        for target in ([a] if first else []) + ([] if occupied else [b]):
            dt = max(step, t * cone)
            while t + dt / 2 < target:
                t += dt
        first = False
        while occupied and t + max(step, t * cone) / 2 < b and not 0 < limit <= len(samples):
            end = t + max(step, t * cone)
            samples.append((t, end))
            t = end
    return samples, t


def check_walk(got, o, d, boxes, binaries, near, far, step, cone, limit=0, tolerance=1e-9):
    intervals, samples, ends = got
    want = [
        walk(*map(torch.Tensor.tolist, (a, b)), boxes.tolist(), binaries, n, f, step, cone, limit)
        for a, b, n, f in zip(o, d, near.tolist(), far.tolist(), strict=True)
    ]
    counts = [len(w) for w, _ in want]
    assert sum(counts) > 20
    assert samples.packed_info[:, 1].tolist() == counts
    assert (
        samples.packed_info[:, 0] == samples.packed_info[:, 1].cumsum(0) - samples.packed_info[:, 1]
    ).all()
    flat = torch.tensor([x for w, _ in want for x in w], dtype=o.dtype)
    close = {"rtol": 0, "atol": tolerance}
    valid = samples.is_valid
    torch.testing.assert_close(intervals.vals[intervals.is_left], flat[:, 0], **close)
    torch.testing.assert_close(intervals.vals[intervals.is_right], flat[:, 1], **close)
    torch.testing.assert_close(samples.vals[valid], flat.mean(1), **close)
    index = torch.arange(len(o)).repeat_interleave(torch.tensor(counts))
    assert samples.ray_indices[valid].equal(index)
    assert intervals.ray_indices[intervals.is_left].equal(index)
    assert intervals.ray_indices[intervals.is_right].equal(index)
    torch.testing.assert_close(ends, torch.tensor([t for _, t in want], dtype=o.dtype), **close)


@pytest.mark.parametrize("near,far,miss", [(-INF, INF, INF), (0.5, 2.0, -7.0)])
def test_boxes_against_slabs(rng, near, far, miss):
    o, d = rays(rng, 97)
    corner = torch.rand(7, 3, generator=rng, dtype=torch.float64) - 0.5
    boxes = torch.cat([corner, corner + torch.rand(7, 3, generator=rng)], -1)
    t_mins, t_maxs, hits = ray_aabb_intersect(o, d, boxes, near, far, miss)
    assert hits.any() and not hits.all()
    for i in range(97):
        for j in range(7):
            want = slab(o[i].tolist(), d[i].tolist(), boxes[j].tolist(), near, far)
            assert hits[i, j] == (want is not None)
            got = (t_mins[i, j].item(), t_maxs[i, j].item())
            assert got == pytest.approx(want or (miss, miss), abs=1e-12)


def test_boxes_at_their_edges():
    o = torch.tensor([[-2.0, 0, 0], [-2, 1, 0], [-2, 1.01, 0], [2, 0, 0], [0, 0, 0], [1, 0, 0]])
    d = torch.tensor([[1.0, 0, 0]]).repeat(6, 1)
    box = torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    t_mins, t_maxs, hits = ray_aabb_intersect(o, d, box)
    assert hits[:, 0].tolist() == [True, True, False, False, True, False]
    assert t_mins[[0, 1, 4], 0].tolist() == [1, 1, -1]
    assert t_maxs[[0, 1, 4], 0].tolist() == [3, 3, 1]
    assert [len(x) for x in ray_aabb_intersect(o[:0], d[:0], box)] == [0, 0, 0]
    assert ray_aabb_intersect(o, d, box[:0])[2].shape == (6, 0)


# One cube of an even number of cells goes to our march; the others go cell by cell.
GRIDS = {"cube": (1, (6, 6, 6)), "box": (1, (5, 4, 7)), "nested": (3, (4, 4, 4))}


@pytest.mark.parametrize("step,cone", [(0.07, 0.0), (0.05, 0.06), (0.0, 0.0)])
@pytest.mark.parametrize("grid", GRIDS)
def test_steps_against_a_walk(device, rng, monkeypatch, grid, step, cone):
    levels, shape = GRIDS[grid]
    corners = (-1.0, -1.25, -0.75, 1.0, 0.75, 1.25 if grid == "cube" else 1.5)
    boxes = nested(levels, corners)
    binaries = torch.rand(levels, *shape, generator=rng) < 0.5
    o, d = rays(rng, 23)
    near = 0.5 * torch.rand(23, generator=rng, dtype=torch.float64)
    far = torch.where(torch.rand(23, generator=rng) < 0.5, 2.0, 1e10).double()
    marched = []
    march = traversal.ops.march
    monkeypatch.setattr(traversal.ops, "march", lambda *a, **k: marched.append(1) or march(*a, **k))
    got = traverse_grids(
        *(x.to(device) for x in (o, d, binaries, boxes, near, far)), step_size=step, cone_angle=cone
    )
    assert bool(marched) == (grid == "cube" and step > 0 and cone == 0)
    got = [move(x) for x in got]
    check_walk(got, o, d, boxes, binaries, near, far, step, cone)


def move(x):
    if isinstance(x, torch.Tensor):
        return x.cpu()
    return type(x)(**{k: v if v is None else v.cpu() for k, v in vars(x).items()})


@pytest.mark.parametrize("step,cone", [(0.07, 0.0), (0.05, 0.06), (0.0, 0.0)])
@pytest.mark.parametrize("grid", ["cube", "nested"])
def test_limit_mask_and_room(rng, grid, step, cone):
    levels, shape = GRIDS[grid]
    boxes, binaries = nested(levels, (-1.0,) * 3 + (1.0,) * 3), torch.rand(levels, *shape) < 0.7
    o, d = rays(rng, 19)
    near, far = torch.zeros(19).double(), torch.full((19,), 1e10).double()
    options = {"step_size": step, "cone_angle": cone}
    whole = traverse_grids(o, d, binaries, boxes, **options)
    check_walk(
        traverse_grids(o, d, binaries, boxes, traverse_steps_limit=3, **options),
        o, d, boxes, binaries, near, far, step, cone, limit=3,
    )  # fmt: skip
    # In rounds of 3 samples a ray, as nerfacc's example of rendering does, all samples come again.
    found, mask, planes = [], torch.ones(19, dtype=torch.bool), None
    for _ in range(200):
        intervals, samples, planes = traverse_grids(
            o, d, binaries, boxes, near_planes=planes, traverse_steps_limit=3, over_allocate=True,
            rays_mask=mask, **options,
        )  # fmt: skip
        assert len(samples.vals) == 3 * mask.sum() == len(intervals.vals) // 2
        ray = samples.ray_indices[samples.is_valid]
        assert mask[ray].all() and ray.bincount(minlength=19).equal(samples.packed_info[:, 1])
        t0, t1 = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
        found.append(torch.stack([ray.double(), t0, t1], -1))
        mask = samples.packed_info[:, 1] == 3
        if not mask.any():
            break
    assert not mask.any()
    found = torch.cat(found)
    found = found[torch.sort(found[:, 0], stable=True).indices]
    intervals, samples, _ = whole
    want = [samples.ray_indices, intervals.vals[intervals.is_left]]
    want.append(intervals.vals[intervals.is_right])
    torch.testing.assert_close(
        found, torch.stack([x.double() for x in want], -1), atol=1e-9, rtol=0
    )


def test_edges_are_shared_where_steps_touch():
    binaries = torch.tensor([True, True, False, True]).reshape(1, 4, 1, 1)
    boxes = torch.tensor([[0.0, 0, 0, 4, 1, 1]])
    o, d = torch.tensor([[-1.0, 0.5, 0.5]]), torch.tensor([[1.0, 0, 0]])
    for step, want in ((0.0, [1, 3, 3, 4, 5]), (0.5, [1, 1.5, 2, 2.5, 3, 4, 4.5, 5])):
        intervals, samples, end = traverse_grids(o, d, binaries, boxes, step_size=step)
        want = [1, 2, 3, 4, 5] if step == 0 else want
        assert intervals.vals.tolist() == want
        assert intervals.packed_info.tolist() == [[0, len(want)]] and end.tolist() == [5]
    assert intervals.is_left.tolist() == [True] * 4 + [False, True, True, False]
    assert intervals.is_right.tolist() == [False] + [True] * 4 + [False, True, True]
    assert samples.vals.tolist() == [1.25, 1.75, 2.25, 2.75, 4.25, 4.75]
    assert samples.packed_info.tolist() == [[0, 6]] and samples.is_valid.all()


def test_float32_agrees_up_to_cells_at_whose_sides_rounding_decides(rng):
    """By march and cell by cell (a cone that never matters), with all cells occupied."""
    o, d = rays(rng, 211, torch.float32)
    binaries, boxes = (
        torch.ones(1, 16, 16, 16, dtype=torch.bool),
        nested(1, (-1.0,) * 3 + (1.0,) * 3).float(),
    )
    marched = traverse_grids(o, d, binaries, boxes, step_size=0.011)
    walked = traverse_grids(o, d, binaries, boxes, step_size=0.011, cone_angle=1e-9)
    a, b = marched[1].packed_info[:, 1], walked[1].packed_info[:, 1]
    assert marched[1].vals.dtype == torch.float32 and a.sum() > 2000
    assert (a - b).abs().max() <= 2 and (a != b).float().mean() < 0.02
    same = a == b
    torch.testing.assert_close(marched[2][same], walked[2][same], rtol=0, atol=1e-5)


def test_nothing_to_find():
    boxes, empty = nested(2), torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    o, d = torch.zeros(3, 3).double(), torch.eye(3).double()
    for binaries, rays_o, rays_d in ((empty, o, d), (~empty, o + 50, d), (~empty, o[:0], d[:0])):
        for options in ({}, {"cone_angle": 0.1}, {"step_size": 0.0}, {"traverse_steps_limit": 2}):
            intervals, samples, end = traverse_grids(rays_o, rays_d, binaries, boxes, **options)
            assert intervals.vals.shape == samples.vals.shape == (0,)
            assert samples.packed_info.tolist() == [[0, 0]] * len(rays_o)
            assert end.shape == (len(rays_o),)


def test_points_in_nested_grids(rng):
    data = torch.rand(3, 4, 4, 4, generator=rng)
    boxes = nested(3)
    x = 4 * torch.rand(101, 3, generator=rng, dtype=torch.float64) * boxes[0, 3:] - 2 * boxes[0, 3:]
    values, inside = _query(x, data, boxes[0])
    for i in range(101):
        level = smallest(x[i].tolist(), boxes.tolist())
        assert bool(inside[i]) == (level is not None)
        if level is not None:
            share = (x[i] - boxes[level, :3]) / (boxes[level, 3:] - boxes[level, :3])
            assert values[i] == data[(level, *(share * 4).long().tolist())]


def test_bad_arguments_are_named():
    o, d, boxes = torch.zeros(3, 3), torch.ones(3, 3), nested(1).float()
    binaries = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    for name, change in {
        "rays_o": {"rays_o": o.half()},
        "rays_d": {"rays_d": d[:2]},
        "binaries": {"binaries": binaries.float()},
        "aabbs": {"aabbs": boxes[:, :5]},
        "near_planes": {"near_planes": torch.zeros(4)},
        "far_planes": {"far_planes": torch.zeros(4)},
        "rays_mask": {"rays_mask": torch.ones(4, dtype=torch.bool)},
        "cone_angle": {"cone_angle": -1.0},
        "step_size": {"step_size": None},
        "traverse_steps_limit": {"over_allocate": True},
    }.items():
        arguments = {"rays_o": o, "rays_d": d, "binaries": binaries, "aabbs": boxes} | change
        with pytest.raises(ValueError, match=f"argument `{name}`: expected .*, got "):
            traverse_grids(**arguments)
    with pytest.raises(ValueError, match=r"argument `step_size`: expected at most .* steps"):
        traverse_grids(o, d, binaries, boxes * 1e6, step_size=1e-4)
