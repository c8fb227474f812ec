"""compat.nerfacc: scans, rendering, resampling, lenses, against loops and closed formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dreamfusion_fast.compat import nerfacc
from dreamfusion_fast.compat.nerfacc import volrend

COUNTS = [3, 0, 1, 17, 0, 8, 8, 1, 0]  # samples a ray: none, one, a power of two, a prime


@pytest.fixture
def packed(device):
    counts = torch.tensor(COUNTS, device=device)
    return torch.stack([counts.cumsum(0) - counts, counts], -1)


def ray_of(packed):
    return torch.arange(len(packed), device=packed.device).repeat_interleave(packed[:, 1])


def samples(packed, dtype=torch.float64, scale=1.0):
    """Ascending intervals with gaps in between, and densities."""
    n = int(packed[:, 1].sum())
    edges = torch.rand(2 * n, dtype=torch.float64).cumsum(0).to(dtype) * 0.3
    t0, t1 = edges.view(n, 2).unbind(-1)
    sigma = scale * torch.rand(n, dtype=dtype)
    return tuple(x.contiguous().to(packed.device) for x in (t0, t1, sigma))


def composited(t0, t1, sigma):
    """(weight, transmittance, alpha) of each sample of one ray: one after the other."""
    rows, through = [], 1.0
    for a, b, s in zip(t0.tolist(), t1.tolist(), sigma.tolist(), strict=True):
        alpha = 1 - math.exp(-s * (b - a))
        rows.append((through * alpha, through, alpha))
        through *= 1 - alpha
    return rows


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---- scans --------------------------------------------------------------------------------------
def scan(values, product, exclusive):
    total, out = (1.0 if product else 0.0), []
    for x in values:
        before = total
        total = total * x if product else total + x
        out.append(before if exclusive else total)
    return out


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_scans_against_loops(device, seed, packed, product, exclusive):
    function = getattr(
        nerfacc, f"{'exclusive' if exclusive else 'inclusive'}_{'prod' if product else 'sum'}"
    )
    x = torch.rand(sum(COUNTS), dtype=torch.float64) + 0.5
    x[5] = 0.0  # a product's gradient there is not 0
    want = [y for part in x.split(COUNTS) for y in scan(part.tolist(), product, exclusive)]
    want = torch.tensor(want, dtype=torch.float64)
    x = x.to(device)
    close(function(x, packed), want)
    close(function(x, packed.int()), want)
    close(function(x, indices=ray_of(packed)), want)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, packed), leaf)
    assert torch.autograd.gradgradcheck(lambda x: function(x, packed), leaf)
    rows = x.view(2, 19)
    even = torch.tensor([[0, 19], [19, 19]], device=device)
    close(function(x, even), function(rows).flatten().cpu())
    swapped = torch.tensor([[19, 19], [0, 0], [3, 16]], device=device)  # any order, and a hole
    close(function(x, swapped)[3:], torch.cat([function(x[3:19]), function(x[19:])]).cpu())
    alone = torch.tensor([[i, 1] for i in range(3)], device=device)  # what is of no chunk
    close(function(x, swapped)[:3], function(x[:3], alone).cpu())
    assert function(x[:0], packed[:0]).shape == function(x[:0], indices=packed[:0, 0]).shape == (0,)
    close(function(x[:0], torch.zeros_like(packed)), torch.zeros(0))


def test_an_infinity_stays_in_its_chunk(device):
    x = torch.tensor([1.0, math.inf, math.nan, 2.0], device=device)
    packed = torch.tensor([[0, 2], [2, 1], [3, 1]], device=device)
    assert nerfacc.exclusive_sum(x, packed).tolist() == [0, 1, 0, 0]
    assert nerfacc.inclusive_sum(x, packed).tolist()[3] == 2


def test_pack_info(device):
    index = torch.tensor([0, 2, 2, 2, 5], device=device)
    assert nerfacc.pack_info(index, 7)[:, 1].tolist() == [1, 0, 3, 0, 0, 1, 0]
    assert nerfacc.pack_info(index)[:, 0].tolist() == [0, 1, 1, 4, 4, 4]
    assert nerfacc.pack_info(index[:0], 2).tolist() == [[0, 0], [0, 0]]
    assert nerfacc.pack_info(index[:0]).shape == (0, 2)


# ---- rendering ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_weights_against_a_loop(device, seed, packed, dtype, tolerance):
    t0, t1, sigma = samples(packed, dtype, scale=20.0)
    parts = zip(t0.split(COUNTS), t1.split(COUNTS), sigma.split(COUNTS), strict=True)
    want = torch.tensor([row for part in parts for row in composited(*part)], dtype=dtype).T
    for how in ({"packed_info": packed}, {"ray_indices": ray_of(packed), "n_rays": 9}):
        got = nerfacc.render_weight_from_density(t0, t1, sigma, **how)
        close(torch.stack(got), want, tolerance)
        close(
            torch.stack(nerfacc.render_transmittance_from_density(t0, t1, sigma, **how)),
            want[1:],
            tolerance,
        )
        alphas = got[2]
        close(torch.stack(nerfacc.render_weight_from_alpha(alphas, **how)), want[:2], tolerance)
        close(nerfacc.render_transmittance_from_alpha(alphas, **how), want[1], tolerance)
        prefix = torch.rand_like(sigma)
        got = nerfacc.render_weight_from_density(t0, t1, sigma, prefix_trans=prefix, **how)
        close(got[0], want[0] * prefix.cpu(), tolerance)
        close(got[1], want[1] * prefix.cpu(), tolerance)
        options = {"early_stop_eps": 0.3, "alpha_thre": 0.4}
        visible = (want[1] >= 0.3) & (want[2] >= 0.4)
        assert visible.any() and not visible.all()
        got = nerfacc.render_visibility_from_density(t0, t1, sigma, **how, **options)
        assert got.cpu().equal(visible)
        assert nerfacc.render_visibility_from_alpha(alphas, **how, **options).equal(got)
        seen = nerfacc.render_visibility_from_alpha(alphas, **how, early_stop_eps=0.3)
        assert seen.cpu().equal(want[1] >= 0.3)


def field(rgbs, values):
    return lambda t_starts, t_ends, ray_indices: (rgbs, values)


@pytest.mark.parametrize("composited_by", ["kernel", "torch"])
def test_rendering_against_a_loop(device, seed, packed, monkeypatch, composited_by):
    if composited_by == "torch":
        monkeypatch.setattr(volrend, "_composite_takes", lambda *args: False)
    t0, t1, sigma = samples(packed, scale=5.0)
    rgb, ray = torch.rand(len(sigma), 3, dtype=torch.float64, device=device), ray_of(packed)
    background = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64, device=device)
    colours, opacities, depths, extras = nerfacc.rendering(
        t0, t1, ray, 9, rgb_sigma_fn=field(rgb, sigma), render_bkgd=background
    )
    assert set(extras) == {"weights", "trans", "alphas", "sigmas", "rgbs"}
    parts = zip(*(x.split(COUNTS) for x in (t0, t1, sigma, rgb)), strict=True)
    for r, (a, b, s, c) in enumerate(parts):
        rows = torch.tensor(composited(a, b, s), dtype=torch.float64).view(-1, 3)
        w, opacity = rows[:, 0], rows[:, 0].sum()
        colour = (w[:, None] * c.cpu()).sum(0) + background.cpu() * (1 - opacity)
        close(colours[r], colour)
        close(opacities[r], opacity[None])
        close(depths[r], (w * (a + b).cpu() / 2).sum()[None] / max(opacity, 1e-300))
        mine = (ray == r).cpu()
        close(torch.stack([extras[k].cpu()[mine] for k in ("weights", "trans", "alphas")]), rows.T)
    whole = nerfacc.rendering(t0, t1, ray, 9, rgb_sigma_fn=field(rgb, sigma), expected_depths=False)
    close(whole[2], (depths * opacities).cpu())
    by_alpha = nerfacc.rendering(
        t0, t1, ray, 9, rgb_alpha_fn=field(rgb, extras["alphas"]), render_bkgd=background
    )
    assert set(by_alpha[3]) == {"weights", "trans", "alphas", "rgbs"}
    for a, b in zip(by_alpha[:3], (colours, opacities, depths), strict=True):
        close(a, b.cpu())


@pytest.mark.parametrize("kind", ["sigma", "alpha"])
def test_packed_is_batched(device, seed, kind):
    """Results and gradients of 5 rays of 7 samples, in both forms."""
    even = torch.tensor([[7 * i, 7] for i in range(5)], device=device)
    t0, t1, values = samples(even)
    rgb = torch.rand(35, 3, dtype=torch.float64, device=device)
    values, rgb = values.requires_grad_(), rgb.requires_grad_()
    cotangents = [torch.rand(5, n, dtype=torch.float64, device=device) for n in (3, 1, 1)]
    results = []
    for batched in (False, True):
        shape = (5, 7) if batched else (35,)
        function = {f"rgb_{kind}_fn": field(rgb.view(*shape, 3), values.view(shape))}
        where = {} if batched else {"ray_indices": ray_of(even), "n_rays": 5}
        out = nerfacc.rendering(t0.view(shape), t1.view(shape), **where, **function)
        extra = sum((out[3][k].flatten() ** 2).sum() for k in ("weights", "trans", "alphas"))
        loss = sum((a * b).sum() for a, b in zip(out, cotangents, strict=False)) + extra
        results.append([*out[:3], *torch.autograd.grad(loss, [values, rgb])])
    for a, b in zip(*results, strict=True):
        close(a, b.cpu(), 1e-10)


def test_gradients_in_float64(device, seed, packed):
    t0, t1, sigma = samples(packed, scale=3.0)
    rgb, ray = torch.rand(len(sigma), 3, dtype=torch.float64, device=device), ray_of(packed)
    inputs = tuple(x.requires_grad_() for x in (t0, t1, sigma, rgb))

    def density(t0, t1, sigma, rgb):
        out = nerfacc.rendering(t0, t1, ray, 9, rgb_sigma_fn=field(rgb, sigma))
        return *out[:3], out[3]["weights"], out[3]["trans"], out[3]["alphas"]

    def opacity(t0, t1, sigma, rgb):
        return nerfacc.rendering(t0, t1, ray, 9, rgb_alpha_fn=field(rgb, sigma / 4))[:3]

    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradcheck(opacity, inputs)
    weights = sigma.detach().requires_grad_()
    args = (weights, t0, t1)
    assert torch.autograd.gradcheck(lambda *x: nerfacc.distortion(*x, ray, 9), args)
    assert torch.autograd.gradcheck(
        lambda w, v: nerfacc.accumulate_along_rays(w, v, ray, 9), (weights, rgb)
    )


def test_an_opaque_background(device):
    """A last sample of infinite density, as unbounded scenes have it."""
    t0 = torch.tensor([[0.0, 1, 2], [0, 1, 2]], device=device)
    sigma = torch.tensor([[0.5, 1, math.inf], [0, 0, math.inf]], device=device, requires_grad=True)
    rgb = torch.ones(2, 3, 3, device=device)
    ray = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    for shape, where in (((2, 3), {}), ((6,), {"ray_indices": ray, "n_rays": 2})):
        function = field(rgb.view(*shape, 3), sigma.view(shape))
        t = t0.view(shape)
        colours, opacities, _, _ = nerfacc.rendering(t, t + 1, rgb_sigma_fn=function, **where)
        close(opacities, torch.ones(2, 1), 1e-6)
        (gradient,) = torch.autograd.grad(colours.sum(), sigma)
        assert gradient[:, :2].isfinite().all()


def test_no_samples(device):
    none, ray = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)

    def never(*args):
        raise AssertionError("called for no samples")

    for function in ({"rgb_sigma_fn": never}, {"rgb_alpha_fn": never}):
        out = nerfacc.rendering(
            none, none, ray, 4, render_bkgd=torch.ones(3, device=device), **function
        )
        assert out[0].tolist() == [[1.0] * 3] * 4 and out[1].tolist() == [[0.0]] * 4
        assert out[2].tolist() == [[0.0]] * 4
    assert nerfacc.rendering(none, none, ray, 0, rgb_sigma_fn=never)[0].shape == (0, 3)


def test_accumulate_along_rays(device, seed, packed):
    w = torch.rand(38, dtype=torch.float64, device=device)
    v = torch.rand(38, 5, dtype=torch.float64, device=device)
    order = torch.randperm(38, device=device)  # samples in any order
    ray = ray_of(packed)[order]
    want = torch.stack([(w[ray == r, None] * v[ray == r]).sum(0) for r in range(9)]).cpu()
    close(nerfacc.accumulate_along_rays(w, v, ray, 9), want)
    total = torch.full((9, 5), 2.0, dtype=torch.float64, device=device)
    volrend.accumulate_along_rays_(w, v, ray, total)
    close(total, want + 2)
    batched = nerfacc.accumulate_along_rays(w.view(2, 19), v.view(2, 19, 5))
    volrend.accumulate_along_rays_(w.view(2, 19), v.view(2, 19, 5), None, batched)
    close(
        batched,
        2 * torch.stack([(w[i : i + 19, None] * v[i : i + 19]).sum(0) for i in (0, 19)]).cpu(),
    )
    close(nerfacc.accumulate_along_rays(w.view(2, 19)), w.view(2, 19).sum(1, keepdim=True).cpu())


def test_distortion_against_all_pairs(device, seed, packed):
    t0, t1, w = samples(packed)
    want = []
    for a, b, x in zip(*(y.cpu().split(COUNTS) for y in (t0, t1, w)), strict=True):
        m = (a + b) / 2
        pairs = (x[:, None] * x * (m[:, None] - m).abs()).sum()
        want.append(pairs + (x**2 * (b - a)).sum() / 3)
    close(nerfacc.distortion(w, t0, t1, ray_of(packed), 9), torch.stack(want)[:, None], 1e-10)
