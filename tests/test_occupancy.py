import math

import pytest
import torch
from conftest import assert_close, check_threads

from dreamfusion_fast.ops import march, occupancy_points, occupancy_update, reference


def state(rng, n, dtype=torch.float32, device="cpu"):
    """ema, bitfield, density: mostly empty space."""
    ema, density = torch.randn(2, n, dtype=torch.float64, generator=rng).exp()
    density *= torch.rand(n, generator=rng) < 0.3
    bits = torch.randint(0, 256, (n // 8,), generator=rng)
    return ema.to(device, dtype), bits.to(device, torch.uint8), density.to(device, dtype)


def check(tensors, *settings):
    got, want = [t.clone() for t in tensors], [t.clone() for t in tensors]
    assert occupancy_update(*got, *settings) is None
    reference.occupancy_update(*want, *settings)
    assert all(torch.equal(a, b) for a, b in zip(got[:2], want[:2], strict=True))
    return got


# ---- occupancy_points ---------------------------------------------------------------------------
@pytest.mark.parametrize("resolution, bound", [(2, 1.0), (16, 0.3), (34, 2.5)])
def test_points_twin(device, dtype, resolution, bound, seed):
    got = occupancy_points(resolution, bound, seed, dtype, device)
    want = reference.occupancy_points(resolution, bound, seed, dtype, device)
    assert_close("occupancy_points", got, want)


def test_points_lie_in_their_cells(device):
    points = occupancy_points(16, 0.5, 3, torch.float64, device)
    cell = ((points + 0.5) * 16).floor().long()
    index = (cell[:, 0] * 16 + cell[:, 1]) * 16 + cell[:, 2]
    assert torch.equal(index, torch.arange(16**3, device=device))
    inside = (points + 0.5) * 16 - cell
    assert (inside.mean(0) - 0.5).abs().max() < 0.05


def test_points_seed(device):
    tensor = torch.tensor([5], device=device)
    one = occupancy_points(8, 1.0, tensor)
    assert one.device == tensor.device
    assert torch.equal(one, occupancy_points(8, 1.0, 5, device=device))
    assert not torch.equal(one, occupancy_points(8, 1.0, 6, device=device))


# ---- occupancy_update ---------------------------------------------------------------------------
@pytest.mark.parametrize("n", [8, 16, 512, 16384, 16392, 46**3])
@pytest.mark.parametrize("threshold", [0.0, 0.5, math.inf])
def test_update_twin(device, dtype, n, threshold, rng):
    check(state(rng, n, dtype, device), 0.95, threshold)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_update_decay(device, decay, rng):
    check(state(rng, 4096, device=device), decay, 0.1)


def test_update_is_the_minimum_of_threshold_and_mean(device):
    density = torch.zeros(8, device=device)
    density[:3] = torch.tensor([1.0, 2.0, 5.0])  # mean 1
    for threshold, byte in ((0.5, 7), (10.0, 6)):
        ema, bits = torch.zeros(8, device=device), torch.zeros(1, dtype=torch.uint8, device=device)
        occupancy_update(ema, bits, density, 0.9, threshold)
        assert bits.item() == byte and torch.equal(ema, density)


def test_update_nan_negative_and_infinite(device, dtype, rng):
    ema, bits, density = state(rng, 64, dtype, device)
    ema[3], density[5], density[6], density[7] = math.nan, math.nan, -1.0, math.inf
    ema[9] = density[9] = math.nan
    ema, bits, _ = check((ema, bits, density), 0.9, 0.5)
    assert not ema.isnan().any() and ema[9] == 0 and bits[0] >> 7 == 1


def test_update_of_nothing_clears_the_bits(device):
    ema, bits = torch.zeros(64, device=device), torch.full((8,), 255, dtype=torch.uint8)
    bits = bits.to(device)
    occupancy_update(ema, bits, torch.zeros(64, device=device), 0.9, 0.01)
    assert not bits.any()


def test_march_finds_the_points(device):
    """The two agree about where a cell lies: rays through the points of the occupied cells."""
    g, step = 16, 1e-3
    points = occupancy_points(g, 1.0, 1, torch.float64, device)
    density = (points.norm(dim=-1) < 0.4).double()
    ema, bits = torch.zeros_like(density), torch.zeros(g**3 // 8, dtype=torch.uint8, device=device)
    occupancy_update(ema, bits, density, 0.95, 0.5)
    d = torch.nn.functional.normalize(torch.ones_like(points), dim=-1)
    near = torch.zeros(g**3, dtype=torch.float64, device=device)
    out = march(points, d, near, near + step, bits, g, 1.0, step, g**3, 1, False)
    agree = (out.packed[:, 1] > 0) == (density > 0)
    assert agree.double().mean() > 0.99  # the sample is half a step on, perhaps in the next cell


# ---- both ---------------------------------------------------------------------------------------
def test_thread_count_does_not_matter(rng):
    tensors = state(rng, 64**3)

    def run():
        out = [t.clone() for t in tensors]
        occupancy_update(*out, 0.95, 10.0)
        return tuple(out)

    check_threads(run)
    check_threads(lambda: occupancy_points(32, 1.0, 4))


def test_registration(rng):
    device = torch.device("cpu")
    tensor = torch.tensor([3], device=device)
    op = torch.ops.dreamfusion_fast.occupancy_points.default
    torch.library.opcheck(op, (4, 1.0, tensor, torch.float64))
    compiled = torch.compile(occupancy_points, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(4, 1.0, tensor), occupancy_points(4, 1.0, tensor))
    tensors = state(rng, 64, device=device)
    torch.library.opcheck(torch.ops.dreamfusion_fast.occupancy_update.default, (*tensors, 0.9, 0.5))
    want, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
    occupancy_update(*want, 0.9, 0.5)
    torch.compile(occupancy_update, fullgraph=True, backend="aot_eager")(*got, 0.9, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"resolution": 5}, ValueError, "`resolution`: expected an even number, got 5"),
        ({"resolution": 0}, ValueError, "`resolution`: expected 2 to 1024, got 0"),
        ({"bound": 0.0}, ValueError, "`bound`: expected 1e-18"),
        ({"seed": "a"}, TypeError, "`seed`: expected int or int64 tensor .* got str"),
        ({"dtype": torch.float16}, TypeError, "`dtype`: expected float32 or float64, got torch.f"),
    ],
)
def test_points_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        occupancy_points(**{"resolution": 4, "bound": 1.0, "seed": 1, **change})


@pytest.mark.parametrize(
    "index, value, error, message",
    [
        (0, torch.zeros(9), ValueError, "`ema`: expected a multiple of 8 up to 2.30 cells, got 9"),
        (0, torch.zeros(0), ValueError, "`ema`: expected a multiple of 8 .* got 0"),
        (0, torch.zeros(4, 4), ValueError, r"`ema`: .* \(N,\), got float32 \(4, 4\)"),
        (1, torch.zeros(3).byte(), ValueError, r"`bitfield`: .* \(2,\), got uint8 \(3,\)"),
        (1, torch.zeros(2), TypeError, "`bitfield`: expected uint8"),
        (2, torch.zeros(16).double(), TypeError, "`density`: expected float32"),
        (2, torch.zeros(8), ValueError, r"`density`: .* \(16,\), got float32 \(8,\)"),
        (3, 1.1, ValueError, "`decay`: expected 0 to 1, got 1.1"),
        (4, math.nan, ValueError, "`threshold`: expected 0 to inf, got nan"),
    ],
)
def test_update_bad_input(index, value, error, message):
    arguments = [torch.zeros(16), torch.zeros(2, dtype=torch.uint8), torch.zeros(16), 0.9, 0.5]
    arguments[index] = value
    with pytest.raises(error, match=message):
        occupancy_update(*arguments)
