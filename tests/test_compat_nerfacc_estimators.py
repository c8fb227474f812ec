"""compat.nerfacc: OccGridEstimator and PropNetEstimator, against loops and closed formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dreamfusion_fast.compat.nerfacc import OccGridEstimator, PropNetEstimator, RayIntervals
from dreamfusion_fast.compat.nerfacc.estimators.prop_net import (
    _pdf_loss,
    _transform_stot,
    get_proposal_requires_grad_fn,
)

AABB = [-1.0, -2.0, -1.0, 1.0, 2.0, 1.5]


# ---- occupancy ----------------------------------------------------------------------------------
def test_buffers_are_named_and_shaped_as_in_checkpoints():
    grid = OccGridEstimator(AABB, resolution=[4, 5, 6], levels=2)
    state = grid.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "resolution": (torch.int32, (3,)),
        "aabbs": (torch.float32, (2, 6)),
        "occs": (torch.float32, (240,)),
        "binaries": (torch.bool, (2, 4, 5, 6)),
    }
    assert state["aabbs"].tolist() == [AABB, [-2.0, -4.0, -2.25, 2.0, 4.0, 2.75]]
    state["binaries"][1, 2, 3, 4] = True
    other = OccGridEstimator(torch.zeros(6), resolution=torch.tensor([4, 5, 6]), levels=2)
    other.load_state_dict(state, strict=True)
    assert other.binaries[1, 2, 3, 4] and other.aabbs.equal(grid.aabbs)
    assert OccGridEstimator(AABB, 3).binaries.shape == (1, 3, 3, 3)
    assert PropNetEstimator().state_dict() == {}


def density(x):
    """(N, 1), known at each point."""
    return (1 + x[:, :1]).clamp(min=0) * 0.02


def test_warm_up_looks_at_each_cell_once(device, seed):
    grid = OccGridEstimator(AABB, [4, 5, 6], levels=2).to(device)
    occs = torch.linspace(0, 0.06, 240)
    grid.occs = occs.clone().to(device)
    points = []

    def evaluate(x):
        points.append(x.cpu())
        return density(x)

    grid.update_every_n_steps(5, evaluate, n=16)
    assert not points
    grid.update_every_n_steps(16, evaluate, occ_thre=0.03, ema_decay=0.5, n=16)
    want, cell = [], 0
    for level, box in enumerate(grid.aabbs.tolist()):
        assert len(points[level]) == 120
        for x in range(4):
            for y in range(5):
                for z in range(6):
                    point = points[level][cell % 120].tolist()
                    for k, (i, n) in enumerate(((x, 4), (y, 5), (z, 6))):
                        share = (point[k] - box[k]) / (box[k + 3] - box[k]) * n
                        assert i - 1e-4 <= share <= i + 1 + 1e-4  # each cell in its order
                    want.append(max(occs[cell].item() * 0.5, max(1 + point[0], 0) * 0.02))
                    cell += 1
    torch.testing.assert_close(grid.occs.cpu(), torch.tensor(want), rtol=1e-5, atol=1e-7)
    threshold = min(0.03, sum(want) / 240)
    assert grid.binaries.flatten().tolist() == [w > threshold for w in grid.occs.tolist()]
    assert 0 < grid.binaries.sum() < 240


def test_later_a_quarter_at_random_and_the_occupied(device, seed):
    grid = OccGridEstimator(AABB, 8, levels=2).to(device)
    grid.occs[:] = 1.0
    grid.occs[:100] = -1.0
    grid.binaries[1, :2] = True  # 128 of 512 cells: not more than a quarter, so each of them
    seen = []

    def evaluate(x):
        seen.append(len(x))
        return torch.zeros(len(x), 1, device=device)

    grid.update_every_n_steps(256, evaluate, ema_decay=0.5)
    assert seen[1] == 128 + 128 and 60 < seen[0] < 128  # those of -1 were left out
    occs = grid.occs.view(2, 512).cpu()
    assert (occs[0, :100] == -1).all() and (occs[1, :128] == 0.5).all()
    # Cells that came up twice decayed once; some were left alone.
    assert set(occs[:, 128:].flatten().tolist()) == {0.5, 1.0}
    # The threshold is the lesser of 0.01 and the mean of what is not negative.
    assert grid.binaries.flatten().cpu().equal(occs.flatten() > 0.01)
    grid.eval()
    with pytest.raises(RuntimeError, match="train"):
        grid.update_every_n_steps(0, evaluate)


def test_marked_cells_are_not_in_the_mean(device):
    grid = OccGridEstimator(AABB, 2).to(device)
    grid.occs[:] = torch.tensor([-1.0, -1, -1, -1, 0.001, 0.002, 0.004, 0.005])
    grid.update_every_n_steps(0, lambda x: 0 * x[:, :1], ema_decay=1.0)
    assert grid.binaries.flatten().tolist() == [False] * 6 + [True] * 2
    assert (grid.occs[:4] == -1).all()


def test_invisible_cells_against_a_loop(device):
    grid = OccGridEstimator(AABB, [5, 4, 3], levels=2).to(device)
    K = torch.tensor([[[40.0, 0, 33], [0, 45, 20], [0, 0, 1]]])
    c, s = math.cos(0.4), math.sin(0.4)
    poses = [
        [[c, 0, s, -1.6], [0, 1, 0, 0.2], [-s, 0, c, -3.0]],
        [[1, 0, 0, 0.3], [0, 0, -1, 3.1], [0, 1, 0, -0.4]],
    ]
    poses = torch.tensor(poses)
    grid.mark_invisible_cells(K.to(device), poses.to(device), 64, 40, near_plane=2.2, chunk=7)
    want = []
    for box in grid.aabbs.tolist():
        for x in range(5):
            for y in range(4):
                for z in range(3):
                    unit = (x / 4, y / 3, z / 2)
                    p = [box[k] + unit[k] * (box[k + 3] - box[k]) for k in range(3)]
                    want.append(mark(p, K[0].tolist(), poses.tolist(), 64, 40, 2.2))
    assert grid.occs.tolist() == want and set(want) == {0.0, -1.0}


def mark(p, K, poses, width, height, near):
    seen = False
    for pose in poses:
        delta = [p[i] - pose[i][3] for i in range(3)]
        x, y, z = (sum(pose[i][j] * delta[i] for i in range(3)) for j in range(3))
        u, v = K[0][0] * x / z + K[0][2], K[1][1] * y / z + K[1][2]
        if z >= 0 and 0 <= u < width and 0 <= v < height:
            if z < near:
                return -1.0
            seen = True
    return 0.0 if seen else -1.0


def test_sampling_drops_what_is_not_seen(device, seed):
    """One ray through 8 cells of length 1, steps of 1: weights, thresholds, planes."""
    grid = OccGridEstimator([0.0, 0, 0, 8, 1, 1], [8, 1, 1]).to(device)
    grid.binaries[0, 1:] = True
    grid.occs[:] = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1])
    o = torch.tensor([[-1.0, 0.5, 0.5], [-1.0, 5, 0.5]], device=device)
    d = torch.tensor([[1.0, 0, 0]] * 2, device=device)
    sigmas = torch.tensor([0.5, 3.0, 0.01, 3.0, 3.0, 3.0, 1.0])

    def fn(t_starts, t_ends, ray_indices):
        assert (ray_indices == 0).all()
        return sigmas.to(device)[(t_starts - 2).long()]

    options = {"render_step_size": 1.0}
    ray, t0, t1 = grid.sampling(o, d, **options)
    assert ray.tolist() == [0] * 7 and t0.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert t1.tolist() == [3, 4, 5, 6, 7, 8, 9]
    # Transmittance: 1, 0.61, 0.030, 0.030, 0.0015, ...; opacities 0.39, 0.95, 0.01, 0.95, ...
    alphas = 1 - torch.exp(-sigmas)
    for name, function in (
        ("sigma_fn", fn),
        ("alpha_fn", lambda *args: 1 - torch.exp(-fn(*args))),
    ):
        _, t0, _ = grid.sampling(o, d, **{name: function}, **options, early_stop_eps=0.01)
        assert t0.tolist() == [2, 3, 4, 5]
        _, t0, _ = grid.sampling(
            o, d, **{name: function}, **options, early_stop_eps=0.01, alpha_thre=0.1
        )
        assert t0.tolist() == [2, 3, 5] and alphas[2] < 0.1
        _, t0, _ = grid.sampling(o, d, **{name: function}, **options, early_stop_eps=0.0)
        assert len(t0) == 7
    _, t0, t1 = grid.sampling(o, d, near_plane=3.0, far_plane=6.0, **options)
    assert t0.tolist() == [3, 4, 5]
    t_min, t_max = torch.tensor([4.0, 0], device=device), torch.tensor([7.0, 9], device=device)
    _, t0, t1 = grid.sampling(o, d, far_plane=6.0, t_min=t_min, t_max=t_max, **options)
    assert t0.tolist() == [4, 5]
    starts = [grid.sampling(o, d, stratified=True, **options)[1][0].item() for _ in range(20)]
    assert all(1.5 <= t < 2.5 for t in starts) and max(starts) - min(starts) > 0.3
    grid.occs[:] = 0.001  # the mean of occs holds alpha_thre down
    _, t0, _ = grid.sampling(o, d, fn, **options, early_stop_eps=0.01, alpha_thre=0.1)
    assert t0.tolist() == [2, 3, 4, 5]
    grid.binaries[:] = False
    assert [len(x) for x in grid.sampling(o, d, fn, **options)] == [0, 0, 0]


def test_arguments_of_old_versions_are_named():
    with pytest.raises(ValueError, match="contraction_type"):
        OccGridEstimator(AABB, contraction_type=None)
    with pytest.raises(TypeError, match="`near`"):
        OccGridEstimator(AABB, near=1.0)
    for name, change in {"resolution": {"resolution": [2, 3]}, "levels": {"levels": 0}}.items():
        with pytest.raises(ValueError, match=f"argument `{name}`"):
            OccGridEstimator(AABB, **change)
    with pytest.raises(ValueError, match="argument `roi_aabb`"):
        OccGridEstimator([0, 1])
    grid = OccGridEstimator(AABB, 4)
    with pytest.raises(ValueError, match=r"argument `occ_eval_fn\(\)`"):
        grid.update_every_n_steps(0, lambda x: x)


# ---- proposals ----------------------------------------------------------------------------------
def test_distances_of_either_kind():
    s = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert _transform_stot("uniform", s, 2.0, 6.0).tolist() == [2, 3, 6]
    assert _transform_stot("lindisp", s, 2.0, 8.0).tolist() == pytest.approx([2, 1 / 0.40625, 8])
    with pytest.raises(ValueError, match="argument `sampling_type`"):
        _transform_stot("log", s, 2.0, 8.0)


def test_samples_go_where_the_density_is(device):
    """A wall from 3 to 4 between 2 and 6: all but its share of the samples end there."""
    estimator = PropNetEstimator().to(device)

    def wall(t_starts, t_ends):
        middle = (t_starts + t_ends) / 2
        return 50.0 * ((middle > 3) & (middle < 4))

    t0, t1 = estimator.sampling([wall], [64], 16, 5, 2.0, 6.0, sampling_type="uniform")
    assert t0.shape == t1.shape == (5, 16) and t0[:, 1:].equal(t1[:, :-1])
    # Nothing gets through: the first interval, 3 to 3.0625, has 1 - exp(-50 / 16) of the weight.
    middle = (t0 + t1) / 2
    assert ((middle > 2.9) & (middle < 3.2)).all()
    empty = estimator.sampling([lambda a, b: 0 * a], [8], 4, 3, 2.0, 6.0, "uniform")
    assert empty[0].shape == (3, 4) and (empty[0] >= 2).all() and (empty[1] <= 6).all()
    assert not estimator.prop_cache
    with pytest.raises(ValueError, match="argument `prop_samples`"):
        estimator.sampling([wall], [], 4, 3, 2.0, 6.0)


def test_loss_against_a_loop(device, rng):
    t = torch.rand(3, 8, generator=rng, dtype=torch.float64).sort().values
    key = torch.rand(3, 6, generator=rng, dtype=torch.float64).sort().values
    cdf, key_cdf = (
        torch.rand(x.shape, generator=rng, dtype=torch.float64).sort().values for x in (t, key)
    )
    want = torch.zeros(3, 7, dtype=torch.float64)
    for r in range(3):
        edges = key[r].tolist()
        for i in range(7):
            low, high = t[r, i].item(), t[r, i + 1].item()
            left = max([j for j in range(5) if edges[j] <= low], default=0)
            right = min([j for j in range(6) if edges[j] > high], default=5)
            w, bound = cdf[r, i + 1] - cdf[r, i], key_cdf[r, right] - key_cdf[r, left]
            want[r, i] = max(0, w - bound) ** 2 / (w + 1e-7)
    assert (want > 0).any() and (want == 0).any()
    arguments = [x.to(device) for x in (t, cdf, key, key_cdf)]
    got = _pdf_loss(
        RayIntervals(arguments[0]), arguments[1], RayIntervals(arguments[2]), arguments[3]
    )
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)
    packed = torch.tensor([[0, 8], [8, 8], [16, 8]], device=device)
    left = torch.tensor(([True] * 7 + [False]) * 3, device=device)
    query = RayIntervals(arguments[0].flatten(), packed, is_left=left, is_right=left.roll(1))
    keys = RayIntervals(
        arguments[2].flatten(), torch.tensor([[0, 6], [6, 6], [12, 6]], device=device)
    )
    flat = _pdf_loss(query, arguments[1].flatten(), keys, arguments[3].flatten())
    torch.testing.assert_close(flat.view(3, 7).cpu(), want, rtol=1e-10, atol=1e-12)


def test_proposals_learn_the_field(device, seed):
    """A density a bin, trained by nothing but the estimator: the loss falls to near nothing."""
    raw = torch.zeros(16, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    estimator = PropNetEstimator(optimizer, scheduler).to(device)

    def proposal(t_starts, t_ends):
        return torch.nn.functional.softplus(raw)[((t_starts + t_ends) * 8).long().clamp(max=15)]

    losses = []
    for _ in range(60):
        t0, t1 = estimator.sampling(
            [proposal], [32], 32, 4, 0.0, 1.0, "uniform", stratified=True, requires_grad=True
        )
        assert len(estimator.prop_cache) == 2
        depth = ((t1.clamp(0.5, 0.75) - t0.clamp(0.5, 0.75)) * 20).cumsum(1)
        trans = torch.exp(-torch.cat([torch.zeros_like(depth[:, :1]), depth[:, :-1]], 1))
        losses.append(estimator.update_every_n_steps(trans, requires_grad=True, loss_scaler=10.0))
    assert losses[-1] < 0.2 * losses[0] and not estimator.prop_cache
    assert raw[8:10].min() > raw[:7].max()  # 7 lies next to the wall
    assert estimator.update_every_n_steps(trans) == 0.0 and scheduler.last_epoch == 61
    assert estimator.compute_loss(trans).item() == 0
    with pytest.raises(RuntimeError, match="requires_grad"):
        estimator.update_every_n_steps(trans, requires_grad=True)


def test_how_often_proposals_learn():
    """Always at first; one in six, one more than the target, in the end."""
    learn = get_proposal_requires_grad_fn(target=5.0, num_steps=100)
    steps = [learn(i) for i in range(700)]
    assert steps[:4] == [False, True, True, True]
    gaps = [i for i, x in enumerate(steps) if x and i > 200]
    assert {b - a for a, b in itertools.pairwise(gaps)} == {6}
