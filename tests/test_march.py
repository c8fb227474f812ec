import math

import pytest
import torch
from conftest import check_registration, check_threads

from dreamfusion_fast import _cpu
from dreamfusion_fast.ops import Samples, _backend, march, ray_box_intersect, reference

CPU = torch.device("cpu")


def scene(rng, n, resolution=16, dtype=torch.float32, device=CPU, bound=1.0, filled=0.2):
    """Rays around and into the cube, and a grid with blobs of occupied cells."""
    o, d = torch.randn(2, n, 3, dtype=torch.float64, generator=rng)
    d[: n // 8, 1] = 0  # along the walls of cells
    d[: n // 16, 2] = 0
    o[: n // 32, 1] = 0
    o = (2 * bound * o / o.norm(dim=-1, keepdim=True)).to(device, dtype)
    d = (d - 0.4 * o.cpu()).to(device, dtype)
    o[n // 2 :: 5] *= 0.2  # from within
    near, far = ray_box_intersect(o, d, 1.1 * bound)
    return o, d, near, far, grid(rng, resolution, filled).to(device), resolution, bound


def grid(rng, resolution, filled):
    """Blobs of cells; the corner's is always there, unless nothing is."""
    blob = 4 if resolution > 8 else 1
    coarse = torch.rand([-(-resolution // blob)] * 3, generator=rng) < filled
    coarse[0, 0, 0] = filled > 0
    for axis in range(3):
        coarse = coarse.repeat_interleave(blob, axis).narrow(axis, 0, resolution)
    return (coarse.reshape(-1, 8).long() << torch.arange(8)).sum(-1).to(torch.uint8)


def on_cuda(tensor):
    """CUDA's kernels, emulated or not: there rays come in any order."""
    return _backend.kernels(tensor).has_half


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def in_order(samples):
    """The samples moved to where they lie if rays come in their order; first it is checked that
    the rows in use come first, each of them in use once, and that all others are zero."""
    start, count = samples.packed.long().T
    ends = count.cumsum(0)
    rows = (start - ends + count).repeat_interleave(count) + torch.arange(
        int(count.sum()), device=count.device
    )
    assert torch.equal(rows.sort().values, torch.arange(len(rows), device=rows.device))
    assert not any(x[len(rows) :].any() for x in samples[:3])
    moved = [torch.cat((x[rows], x[len(rows) :])) for x in samples[:3]]
    packed = torch.stack((ends - count, count), -1).int()
    return Samples(*moved, packed, samples.count)


def check(*inputs):
    """Bit for bit what the twin says, which tries every bin."""
    got, want = march(*inputs), reference.march(*inputs)
    if on_cuda(inputs[0]):
        assert_same(in_order(got), in_order(Samples(*want)))
    else:
        assert_same(got, want)
    return got


def check_overflow(inputs, capacity, *options):
    """On CUDA any rays may be left out, but each has all its samples or none, and those that have
    none would have reached past the end from the start that is given."""
    if not on_cuda(inputs[0]):
        return check(*inputs, capacity, *options)
    got, all_of_them = march(*inputs, capacity, *options), march(*inputs, 1 << 16, *options)
    start, count = got.packed.long().T
    wanted = all_of_them.packed.long()[:, 1]
    none = count < wanted
    assert not count[none].any() and (start[none] + wanted[none] > capacity).all()
    assert got.count.item() == wanted.sum()
    kept, ordered = in_order(all_of_them), in_order(got)
    rows = (~none).repeat_interleave(wanted)
    for a, b in zip(ordered[:3], kept[:3], strict=True):
        assert torch.equal(a[: count.sum()], b[: len(rows)][rows])
    return got


@pytest.mark.parametrize("resolution, step", [(2, 0.02), (6, 0.3), (16, 0.013), (64, 0.05)])
@pytest.mark.parametrize("jitter", [True, False])
def test_twin(device, dtype, resolution, step, jitter, rng, seed):
    inputs = scene(rng, 1009, resolution, dtype, device)
    out = check(*inputs, step, 100000, seed, jitter)
    assert 100 < out.count.item() < 100000


@pytest.mark.parametrize("filled", [0.0, 1.0])
@pytest.mark.parametrize("bound", [0.37, 11.0])
def test_empty_and_full_grid(device, dtype, filled, bound, rng):
    inputs = scene(rng, 301, 8, dtype, device, bound, filled)
    out = check(*inputs, 0.05 * bound, 40000, 7)
    assert (out.count.item() > 0) == (filled > 0)


def test_samples_are_where_they_should_be(device, rng):
    o, d, near, far, *rest = scene(rng, 200, device=device, dtype=torch.float64)
    out = march(o, d, near, far, *rest, 0.05, 20000, 3)
    total = out.count.item()
    out = in_order(out) if on_cuda(o) else out
    start, count = out.packed.long().T
    assert torch.equal(start, count.cumsum(0) - count) and count.sum() == total
    ray = torch.arange(200, device=device).repeat_interleave(count)
    assert (out.t[:total] >= near[ray]).all() and (out.t[:total] <= far[ray]).all()
    assert (out.dt[:total] <= 0.05).all() and (out.positions[:total].abs() <= 1).all()
    torch.testing.assert_close(out.positions[:total], o[ray] + out.t[:total, None] * d[ray])
    same = ray[1:] == ray[:-1]
    assert (out.t[1:total] > out.t[: total - 1])[same].all()
    assert not any(x[total:].any() for x in out[:3])


def test_widths_add_up(device):
    """A full grid and a ray inside: the bins tile [near, far], the last one cut."""
    o, d = torch.zeros(1, 3, device=device), torch.tensor([[0, 0, 1.0]], device=device)
    near, far = (torch.tensor([x], device=device) for x in (0.1, 0.78))
    full = torch.full((64,), 255, dtype=torch.uint8, device=device)
    out = check(o, d, near, far, full, 8, 1.0, 0.1, 10, 1, False)
    assert out.count.item() == 7
    torch.testing.assert_close(out.dt[:7].sum(), far[0] - near[0])
    torch.testing.assert_close(out.t[6], torch.tensor(0.74, device=device))


@pytest.mark.parametrize("spare", [-1, 0, 1, "half", "one"])
def test_overflow(device, dtype, spare, rng):
    inputs = scene(rng, 97, 16, dtype, device)
    total = march(*inputs, 0.05, 1 << 16, 5).count.item()
    capacity = {"one": 1, "half": total // 2}.get(spare) or total + spare
    out = check_overflow((*inputs, 0.05), capacity, 5)
    assert out.count.item() == total
    assert (out.packed.sum(1) <= capacity).all() and (out.packed >= 0).all()
    assert (out.packed[:, 1].sum() == total) == (capacity >= total)


@pytest.mark.parametrize("n", [0, 1, 7, 64, 65])
def test_edge_sizes(device, dtype, n, rng):
    check(*scene(rng, n, 4, dtype, device), 0.05, 5000, 1)


def test_empty_rays(device, dtype, rng):
    o, d, near, far, *rest = scene(rng, 50, 8, dtype, device)
    far[::2] = near[::2] - 1
    out = check(o, d, near, far, *rest, 0.05, 5000, 1)
    assert not out.packed[::2, 1].any() and out.packed[1::2, 1].any()


def test_many_bins_and_near_below_zero(device, dtype, rng):
    o, d, near, far, *rest = scene(rng, 5, 8, dtype, device)
    check(o, d, near - 10, far + 30, *rest, 0.001, 100000, 1)


def test_seed(device, rng):
    inputs = scene(rng, 100, device=device)
    one = in_order(march(*inputs, 0.05, 10000, 2**40 + 1))
    tensor = torch.tensor([2**40 + 1], device=device)
    assert_same(one, in_order(march(*inputs, 0.05, 10000, tensor)))
    assert not torch.equal(one.t, in_order(march(*inputs, 0.05, 10000, 1)).t)
    check(*inputs, 0.05, 10000, -3)


def test_instruction_sets_agree(rng):
    inputs, before = scene(rng, 3000, 32), _cpu.isa()
    results = []
    for isa in _cpu.isas():
        _cpu.use_isa(isa)
        results.append(march(*inputs, 0.02, 200000, 9))
    _cpu.use_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_thread_count_does_not_matter(rng):
    inputs = scene(rng, 3000, 32)
    check_threads(lambda: tuple(march(*inputs, 0.02, 10000, 9)))


def test_no_gradient(device, rng):
    o, *rest = scene(rng, 9, device=device)
    assert not any(x.requires_grad for x in march(o.requires_grad_(), *rest, 0.1, 100, 1))


def test_registration(rng):
    device = torch.device("cpu")
    inputs = scene(rng, 9, device=device)
    tensor = torch.tensor([3], device=device)
    check_registration("march", march, *inputs, 0.1, 100, tensor, True)
    compiled = torch.compile(march, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs, 0.1, 100, 3), march(*inputs, 0.1, 100, 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rays_o", (0.0, math.nan, 1.0), r"`rays_o`: .* got \(0, nan, 1\) for ray 70"),
        ("rays_d", (0.0, math.inf, 1.0), r"`rays_d`: .* got \(0, inf, 1\) for ray 70"),
        ("rays_d", (0.0, 0.0, 0.0), r"`rays_d`: .* non-zero length, got \(0, 0, 0\) for ray 70"),
        ("near", math.nan, "`near`: expected numbers, got nan for ray 70"),
        ("far", math.nan, "`far`: expected numbers, got nan for ray 70"),
        ("far", math.inf, "`far`: expected at most 1048576 steps of 0.05 .* got inf for ray 70"),
        ("far", 1e6, r"`far`: expected at most .* got 1e\+06 for ray 70"),
    ],
)
def test_bad_rays(device, dtype, name, value, message, rng):
    """The CPU names the first; CUDA, which nobody waits for, gives them no samples."""
    inputs = scene(rng, 5000, dtype=dtype, device=device)
    rays = [x.clone() for x in inputs[:4]]
    bad = [70, 71, 4000]
    rays[("rays_o", "rays_d", "near", "far").index(name)][bad] = rays[0].new_tensor(value)
    if not on_cuda(rays[0]):
        with pytest.raises(ValueError, match=message):
            march(*rays, *inputs[4:], 0.05, 100, 1)
        return
    got = in_order(march(*rays, *inputs[4:], 0.05, 1 << 16, 1))
    assert not got.packed[bad, 1].any()
    near, far = inputs[2:4]
    far[bad] = near[bad]
    assert_same(got, in_order(march(*inputs, 0.05, 1 << 16, 1)))


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("rays_o", torch.zeros(3), ValueError, r"`rays_o`: .* \(R, 3\), got float32 \(3,\)"),
        ("rays_d", torch.ones(4, 3).double(), TypeError, "`rays_d`: expected float32"),
        ("near", torch.zeros(5), ValueError, r"`near`: .* \(4,\), got float32 \(5,\)"),
        ("far", torch.zeros(4, 1), ValueError, r"`far`: .* \(4,\), got float32 \(4, 1\)"),
        ("bitfield", torch.zeros(64), TypeError, "`bitfield`: expected uint8"),
        ("resolution", 10, ValueError, r"`bitfield`: .* \(125,\), got uint8 \(64,\)"),
        ("resolution", 7, ValueError, "`resolution`: expected an even number, got 7"),
        ("resolution", 2048, ValueError, "`resolution`: expected 2 to 1024"),
        ("bound", -1.0, ValueError, "`bound`: expected 1e-18"),
        ("step", 0.0, ValueError, "`step`: expected 1e-18 .* got 0.0"),
        ("step", math.nan, ValueError, "`step`: .* got nan"),
        ("capacity", 0, ValueError, "`capacity`: expected 1 to 2147483647, got 0"),
        ("seed", torch.zeros(1), TypeError, "`seed`: expected int64 tensor"),
        ("seed", 0.5, TypeError, "`seed`: expected int or int64 tensor .* got float"),
        ("limit", torch.zeros(3).int(), ValueError, r"`limit`: .* \(4,\), got int32 \(3,\)"),
        ("limit", torch.zeros(4), TypeError, "`limit`: expected int32"),
        ("first_ray", -1, ValueError, "`first_ray`: expected 0 to 4294967292, got -1"),
    ],
)
def test_bad_input(name, value, error, message):
    arguments = {
        "rays_o": torch.zeros(4, 3), "rays_d": torch.ones(4, 3), "near": torch.zeros(4),
        "far": torch.ones(4), "bitfield": torch.zeros(64, dtype=torch.uint8), "resolution": 8,
        "bound": 1.0, "step": 0.1, "capacity": 100, "seed": 1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        march(**{**arguments, name: value})


def test_limit(device, dtype, rng):
    """A ray has its nearest samples, as many as it may have; none where that is none."""
    inputs = scene(rng, 203, 16, dtype, device)
    limit = torch.randint(-1, 5, (203,), generator=rng).int().to(device)
    limit[::7] = 2**31 - 1
    out = check(*inputs, 0.05, 1 << 14, 3, True, limit)
    every = march(*inputs, 0.05, 1 << 14, 3).packed[:, 1]
    assert torch.equal(out.packed[:, 1], torch.minimum(every, limit.clamp(min=0)))


def test_parts_are_jittered_as_the_whole(device, rng):
    *rays, bits, g, bound = scene(rng, 101, device=device)
    whole = in_order(march(*rays, bits, g, bound, 0.05, 1 << 14, 3))
    part = [x[40:] for x in rays]
    got = in_order(march(*part, bits, g, bound, 0.05, 1 << 14, 3, first_ray=40))
    rows = int(got.count)
    assert rows and torch.equal(got.t[:rows], whole.t[: whole.count][-rows:])
    assert_same(got, reference.march(*part, bits, g, bound, 0.05, 1 << 14, 3, first_ray=40))
