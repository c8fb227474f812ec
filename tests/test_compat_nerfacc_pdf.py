"""compat.nerfacc: resampling, searching and lenses, against loops; bad arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dreamfusion_fast.compat import nerfacc
from dreamfusion_fast.compat.nerfacc import RayIntervals, RaySamples, cameras


# ---- distributions along rays -------------------------------------------------------------------
def invert(cdf, vals, u):
    """Where a piecewise linear CDF is u, by looking at one piece after the other."""
    for i in range(len(cdf) - 1):
        if u < cdf[i + 1] or i == len(cdf) - 2:
            width = cdf[i + 1] - cdf[i]
            share = 0.5 if width < 1e-10 else (u - cdf[i]) / width
            return vals[i] + share * (vals[i + 1] - vals[i])
    return vals[0]


def resample(vals, cdf, n, bias=0.5):
    """Samples of one ray and the edges around them."""
    t = [invert(cdf, vals, cdf[0] + (i + bias) * (cdf[-1] - cdf[0]) / n) for i in range(n)]
    if n == 1:
        return t, [vals[0], vals[-1]]
    inner = [(a + b) / 2 for a, b in itertools.pairwise(t)]
    first, last = t[0] - (t[1] - t[0]) / 2, t[-1] + (t[-1] - t[-2]) / 2
    return t, [max(first, vals[0]), *inner, min(last, vals[-1])]


def distribution(rng, counts):
    """Flat edges and their CDF, a ray each; some of the CDF flat."""
    vals = [torch.rand(n, generator=rng, dtype=torch.float64).sort().values for n in counts]
    cdfs = []
    for n in counts:
        steps = torch.rand(n, generator=rng, dtype=torch.float64)
        steps[n // 2 : n // 2 + 2] = 0
        cdfs.append(steps.cumsum(0))
    return vals, cdfs


def packed_of(counts):
    counts = torch.tensor(counts)
    return torch.stack([counts.cumsum(0) - counts, counts], -1)


def test_importance_sampling_against_a_loop(device, rng):
    counts = [9, 2, 17, 1, 5]
    vals, cdfs = distribution(rng, counts)
    flat = RayIntervals(torch.cat(vals).to(device), packed_of(counts).to(device))
    cdf = torch.cat(cdfs).to(device)
    for n in (1, 2, 11):
        want = [resample(v.tolist(), c.tolist(), n) for v, c in zip(vals, cdfs, strict=True)]
        edges, samples = nerfacc.importance_sampling(flat, cdf, n)
        close(samples.vals, [w[0] for w in want])
        close(edges.vals, [w[1] for w in want])
        row = RayIntervals(vals[2].view(1, 1, 17).to(device))  # batched, more than one dimension
        edges, samples = nerfacc.importance_sampling(row, cdfs[2].view(1, 1, 17).to(device), n)
        close(samples.vals, [[want[2][0]]])
        close(edges.vals, [[want[2][1]]])
    numbers = torch.tensor([4, 0, 1, 0, 7], device=device)  # another number a ray
    edges, samples = nerfacc.importance_sampling(flat, cdf, numbers)
    want = [
        resample(v.tolist(), c.tolist(), n) if n else ([], [])
        for v, c, n in zip(vals, cdfs, numbers.tolist(), strict=True)
    ]
    close(samples.vals, [x for w in want for x in w[0]])
    close(edges.vals, [x for w in want for x in w[1]])
    assert samples.packed_info.tolist() == packed_of([4, 0, 1, 0, 7]).tolist()
    assert edges.packed_info.tolist() == packed_of([5, 0, 2, 0, 8]).tolist()
    assert samples.ray_indices.tolist() == [0] * 4 + [2] + [4] * 7
    assert edges.ray_indices.tolist() == [0] * 5 + [2] * 2 + [4] * 8
    assert edges.vals[edges.is_left].shape == edges.vals[edges.is_right].shape == (12,)
    left = [x for w in want for x in w[1][:-1]]
    close(edges.vals[edges.is_left], left)


def close(got, want):
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-12)


def test_stratified_samples_shift_together(device, seed):
    """By one number a ray: the CDF of the samples has equal steps, which begin anywhere."""
    cdf = torch.linspace(0, 1, 9, dtype=torch.float64, device=device).repeat(500, 1)
    _, samples = nerfacc.importance_sampling(RayIntervals(cdf**2), cdf, 4, stratified=True)
    # The CDF at t is linear between the squares of multiples of 1/8.
    i = torch.floor(samples.vals.sqrt() * 8).clamp(max=7)
    low, high = (i / 8) ** 2, ((i + 1) / 8) ** 2
    u = (i + (samples.vals - low) / (high - low)) / 8
    bias = u[:, 0] * 4
    torch.testing.assert_close(u, (torch.arange(4, device=device) + bias[:, None]) / 4)
    assert 0 <= bias.min() < 0.05 and 0.95 < bias.max() <= 1
    assert 0.4 < bias.mean() < 0.6


def neighbours(keys, x):
    right = next((i for i, k in enumerate(keys[:-1]) if k > x), len(keys) - 1)
    return max(right - 1, 0), right


@pytest.mark.parametrize("keys_flat", [False, True])
@pytest.mark.parametrize("values_flat", [False, True])
def test_searchsorted_against_a_loop(device, rng, keys_flat, values_flat):
    counts = [5, 1, 0, 8] if keys_flat else [6] * 4
    queries = [3, 4, 0, 13] if values_flat else [7] * 4
    if keys_flat and not values_flat:
        counts[2] = 2
    keys, _ = distribution(rng, counts)
    values = [2 * torch.rand(n, generator=rng, dtype=torch.float64) - 0.5 for n in queries]
    values[0][:1] = keys[0][1]  # equal to a key: that is the left one

    def spec(rows, flat, kind):
        if not flat:
            return kind(torch.stack(rows).to(device))
        return kind(torch.cat(rows).to(device), packed_of([len(r) for r in rows]).to(device))

    left, right = nerfacc.searchsorted(
        spec(keys, keys_flat, RayIntervals), spec(values, values_flat, RaySamples)
    )
    want, start = [], 0
    for k, v in zip(keys, values, strict=True):
        offset = start if values_flat else 0
        want += [[i + offset for i in neighbours(k.tolist(), x)] for x in v.tolist()]
        start += len(k)
    assert left.flatten().tolist() == [w[0] for w in want]
    assert right.flatten().tolist() == [w[1] for w in want]
    assert left.shape == right.shape == ((20,) if values_flat else (4, 7))


def test_no_rays():
    none = RayIntervals(torch.zeros(0, 3))
    edges, samples = nerfacc.importance_sampling(none, none.vals, 4)
    assert edges.vals.shape == (0, 5) and samples.vals.shape == (0, 4)
    assert nerfacc.searchsorted(none, none)[0].shape == (0, 3)
    flat = RayIntervals(torch.zeros(0), torch.zeros(0, 2, dtype=torch.int64))
    edges, samples = nerfacc.importance_sampling(flat, flat.vals, torch.zeros(0, dtype=torch.int64))
    assert edges.vals.shape == samples.vals.shape == edges.is_left.shape == (0,)
    assert edges.device == torch.device("cpu") == samples.device


# ---- lenses -------------------------------------------------------------------------------------
def distort(x, y, k1=0, k2=0, p1=0, p2=0, k3=0, k4=0, k5=0, k6=0):
    """OpenCV's formula, in Python's floats."""
    r = x * x + y * y
    radial = (1 + k1 * r + k2 * r**2 + k3 * r**3) / (1 + k4 * r + k5 * r**2 + k6 * r**3)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x),
        y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y,
    )


def distort_fisheye(x, y, k1, k2, k3, k4):
    r = math.hypot(x, y)
    a = math.atan(r)
    scale = a * (1 + k1 * a**2 + k2 * a**4 + k3 * a**6 + k4 * a**8) / r
    return x * scale, y * scale


@pytest.mark.parametrize("n", [0, 1, 2, 4, 8])
def test_undistortion_undoes_opencv(device, rng, n):
    points = 1.2 * torch.rand(31, 2, generator=rng, dtype=torch.float64) - 0.6
    params = 0.04 * torch.rand(31, n, generator=rng, dtype=torch.float64) - 0.02
    pairs = list(zip(points.tolist(), params.tolist(), strict=True))
    uv = torch.tensor([distort(*xy, *p) for xy, p in pairs], dtype=torch.float64)
    # Four steps are enough only with the true Jacobian.
    got = cameras.opencv_lens_undistortion(uv.to(device), params.to(device), 1e-12, 4)
    torch.testing.assert_close(got.cpu(), points, rtol=0, atol=1e-11)
    one = cameras.opencv_lens_undistortion(uv.view(31, 1, 2).to(device), params[3].to(device))
    torch.testing.assert_close(one[3, 0].cpu(), points[3], rtol=0, atol=1e-8)
    padded = torch.nn.functional.pad(params, (0, 8 - n))
    torch.testing.assert_close(cameras._opencv_lens_distortion(points, padded), uv)


def test_undistortion_undoes_a_fisheye(device, rng):
    points = 4 * torch.rand(31, 2, generator=rng, dtype=torch.float64) - 2
    params = 0.02 * torch.rand(31, 4, generator=rng, dtype=torch.float64) - 0.01
    pairs = list(zip(points.tolist(), params.tolist(), strict=True))
    uv = torch.tensor([distort_fisheye(*xy, *p) for xy, p in pairs], dtype=torch.float64)
    got = cameras.opencv_lens_undistortion_fisheye(uv.to(device), params.to(device), 1e-12, 20)
    torch.testing.assert_close(got.cpu(), points, rtol=0, atol=1e-10)
    # A last step of 1e-5 leaves the square of it, with the true derivative.
    got = cameras.opencv_lens_undistortion_fisheye(uv.to(device), params.to(device), 1e-5)
    torch.testing.assert_close(got.cpu(), points, rtol=0, atol=1e-8)
    torch.testing.assert_close(cameras._opencv_lens_distortion_fisheye(points, params), uv)
    center = torch.zeros(1, 2, device=device)
    none = torch.zeros(4, device=device)
    assert cameras.opencv_lens_undistortion_fisheye(center, none).tolist() == [[0, 0]]
    bad = torch.tensor([-50.0, 0, 0, 0], device=device)  # no angle is mapped there
    assert cameras.opencv_lens_undistortion_fisheye(center + 0.4, bad).isnan().all()


# ---- bad arguments ------------------------------------------------------------------------------
def test_bad_arguments_are_named():
    x, packed = torch.rand(4), torch.tensor([[0, 2], [2, 2]])
    index, none = torch.tensor([0, 0, 1, 1]), (lambda *args: (torch.rand(4, 2), x))
    spec = RayIntervals(x, packed)
    calls = {
        "packed_info": [
            lambda: nerfacc.inclusive_sum(x, packed + 1),
            lambda: nerfacc.inclusive_sum(x, packed - 1),
            lambda: nerfacc.exclusive_prod(x, packed.float()),
            lambda: nerfacc.exclusive_sum(x, torch.tensor([[0, 4], [0, 4]])),
        ],
        "inputs": [lambda: nerfacc.inclusive_sum(torch.rand(2, 4), packed)],
        "indices": [
            lambda: nerfacc.inclusive_prod(x, packed, index),
            lambda: nerfacc.inclusive_prod(x, indices=index[:3]),
        ],
        "ray_indices": [
            lambda: nerfacc.pack_info(index.float()),
            lambda: nerfacc.rendering(x, x, index[:3], 2, none),
            lambda: nerfacc.render_weight_from_alpha(x, ray_indices=torch.tensor([0, 1, 0, 1])),
        ],
        "n_rays": [
            lambda: nerfacc.rendering(x, x, index, rgb_sigma_fn=none),
            lambda: nerfacc.accumulate_along_rays(x, None, index),
        ],
        "rgb_sigma_fn": [lambda: nerfacc.rendering(x, x, index, 2)],
        r"rgb_sigma_fn\(\)\[0\]": [lambda: nerfacc.rendering(x, x, index, 2, none)],
        "t_ends": [
            lambda: nerfacc.rendering(x, x[:3], index, 2, none),
            lambda: nerfacc.distortion(x, x, x[:3], index, 2),
        ],
        "values": [
            lambda: nerfacc.accumulate_along_rays(x, x, index, 2),
            lambda: nerfacc.searchsorted(spec, RayIntervals(torch.rand(3, 4))),
        ],
        "weights": [lambda: nerfacc.accumulate_along_rays(torch.rand(2, 2), None, index, 2)],
        "cdfs": [lambda: nerfacc.importance_sampling(spec, x[:3], 4)],
        "n_intervals_per_ray": [
            lambda: nerfacc.importance_sampling(spec, x, 0),
            lambda: nerfacc.importance_sampling(spec, x, torch.tensor([1, 2, 3])),
            lambda: nerfacc.importance_sampling(spec, x, torch.tensor([1, -2])),
        ],
        "intervals.packed_info": [lambda: nerfacc.importance_sampling(RayIntervals(x), x, 4)],
        "uv": [lambda: cameras.opencv_lens_undistortion(x[:3], x)],
        "params": [
            lambda: cameras.opencv_lens_undistortion(x[:2], x[:3]),
            lambda: cameras.opencv_lens_undistortion_fisheye(x[:2], x[:3]),
        ],
    }
    for name, tries in calls.items():
        for call in tries:
            with pytest.raises(ValueError, match=f"^argument `{name}`: expected .*, got "):
                call()
