"""hash_encode with scales: tiny-cuda-nn's levels."""

import itertools
import math

import pytest
import torch
from conftest import assert_close, check_op, check_registration, check_threads

from dreamfusion_fast.ops import (
    _backend,
    hash_encode,
    hash_encode_gradient,
    hash_table_rows,
    reference,
)

OP = ("hash_encode", hash_encode, reference.hash_encode)
SECOND = ("hash_encode_second", hash_encode_gradient, reference.hash_encode_gradient)
SCALES = [1.5, 7.0, 12.25, 30.0]  # dense, dense with points beyond its end, hashed, hashed
GRID = (4, 3, 31, 9)
WAYS = ["linear", "smoothstep"]


def make(rng, n, dtype=torch.float64, device="cpu", features=2):
    """Points inside and around the unit cube, multiples of 2^-12: s x + 1/2 is exact, with a fused
    multiply-add and without, so that all find the same cell."""
    x = (torch.rand(n, 3, dtype=torch.float64, generator=rng) * 6144 - 1024).round() / 4096
    rows = hash_table_rows(*GRID, SCALES)[1][-1]
    table = torch.randn(rows, features, dtype=torch.float64, generator=rng)
    return [t.to(device, dtype).requires_grad_() for t in (x, table)]


def encode_by_hand(x, table, interpolation):
    """One point, in float64, from tiny-cuda-nn's definition."""
    offsets, out = hash_table_rows(*GRID, SCALES)[1], []
    for scale, start, end in zip(SCALES, offsets, offsets[1:]):
        side, sums = math.ceil(scale) + 1, [0.0] * table.shape[1]
        pos = [scale * value + 0.5 for value in x]
        for corner in itertools.product((0, 1), repeat=3):
            weight, vertex = 1.0, []
            for p, c in zip(pos, corner):
                f = p - math.floor(p)
                f = f * f * (3 - 2 * f) if interpolation == "smoothstep" else f
                weight *= f if c else 1 - f
                vertex.append((math.floor(p) + c) % 2**32)
            i, j, k = vertex
            if side**3 <= end - start:
                row = (i + j * side + k * side * side) % 2**32 % (end - start)
            else:
                row = (i ^ j * 2654435761 ^ k * 805459861) % 2**32 % (end - start)
            sums = [s + weight * float(v) for s, v in zip(sums, table[start + row])]
        out += sums
    return out


@pytest.mark.parametrize("way", WAYS)
def test_by_hand(device, way, rng):
    x, table = make(rng, 40, device=device)
    want = [encode_by_hand(point, table.detach().cpu(), way) for point in x.tolist()]
    got = hash_encode(x, table, *GRID, way, scales=SCALES)
    torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=got.dtype))


def test_rows():
    assert hash_table_rows(*GRID, SCALES) == ([3, 8, 14, 31], [0, 32, 544, 1056, 1568])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_twin(device, dtype, features, way, rng):
    x, table = make(rng, 311, dtype, device, features)
    check_op(*OP, x, table, *GRID, way, scales=SCALES)
    grad_out = torch.randn(311, 4 * features).to(x).requires_grad_()
    check_op(*SECOND, grad_out, x, table, *GRID, way, scales=SCALES)


@pytest.mark.parametrize("n, valid", [(0, None), (1, 1), (65, 64), (4097, 4096)])
def test_edge_sizes(device, dtype, n, valid, rng):
    x, table = make(rng, n, dtype, device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*OP, x, table, *GRID, "linear", count, scales=SCALES)


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(device, way, rng):
    """Away from the cells' faces, where the gradient jumps; one level is dense, one hashed."""
    x, table = make(rng, 3, device=device)
    x = ((x.detach() * 64).round() / 64 + 0.1 / 7).requires_grad_()
    table = table.detach()[:64].requires_grad_()

    def encode(x, table):
        return hash_encode(x, table, 2, 3, 14, 5, way, scales=[1.5, 12.25])

    assert torch.autograd.gradcheck(encode, (x, table), atol=1e-4)
    assert torch.autograd.gradgradcheck(encode, (x, table), atol=1e-4)


def test_default_is_no_scales(device, rng):
    """The same grid with scales of whole cells differs by the half cell, nothing else."""
    x = torch.rand(50, 3, dtype=torch.float64, generator=rng).to(device)
    table = torch.randn(512, 2, dtype=torch.float64, generator=rng).to(device)
    plain = hash_encode(x, table, 1, 7, 7, 9)
    staggered = hash_encode(x - 0.5 / 7, table, 1, 8, 8, 9, scales=[7.0])
    torch.testing.assert_close(plain, staggered)


def test_nan_infinity_and_far_points_stay_in_bounds(device, dtype, rng):
    x, table = make(rng, 8, dtype, device)
    with torch.no_grad():
        x[:5, 1] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30], dtype=dtype)
    out = hash_encode(x, table, *GRID, scales=SCALES)
    hash_encode_gradient(torch.ones_like(out), x, table, *GRID, scales=SCALES).sum().backward()
    assert out[:3].isnan().all() and out[3:].isfinite().all()
    check_op(*OP, x, table, *GRID, scales=SCALES)


def test_half(device, rng):
    """Against the float64 twin at the rounded table."""
    x, table = make(rng, 300, torch.float32, device)
    if not _backend.kernels(x).has_half:
        return
    half = table.detach().half()
    got = hash_encode(x, table, *GRID, table_half=half, scales=SCALES)
    inputs = [t.detach().double().requires_grad_() for t in (x, half)]
    want = reference.hash_encode(*inputs, *GRID, scales=SCALES)
    assert_close("hash_encode_half", got, want.half())
    cotangent = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, table), cotangent)
    for a, b in zip(grads, torch.autograd.grad(want, inputs, cotangent.double())):
        assert_close("hash_encode", a, b.float())


def test_thread_count_does_not_matter(rng):
    x, table = make(rng, 9001, torch.float32)

    def grads():
        out = hash_encode(x, table, *GRID, scales=SCALES)
        return torch.autograd.grad(out.square().sum(), (x, table))

    check_threads(grads)


def test_registration(rng):
    device = torch.device("cpu")
    x, table = make(rng, 9, torch.float32, device)
    inputs = x, table, *GRID, "linear", None, None, SCALES
    check_registration("hash_encode", hash_encode, *inputs)
    grad_out = torch.randn(9, 8).to(x).requires_grad_()
    torch.library.opcheck(
        torch.ops.dreamfusion_fast.hash_encode_backward.default,
        (grad_out, *inputs[:-1], True, True, SCALES),
    )


X, TABLE = torch.rand(4, 3), torch.zeros(64, 2)


@pytest.mark.parametrize(
    "grid, scales, message",
    [
        ((1, 4, 4, 6), [3.0, 6.0], "`scales`: expected 1 numbers, got 2"),
        ((1, 0, 0, 6), [-1.0], r"`scales`: expected more than -1, to 2\^20, got -1.0"),
        ((1, 4, 4, 6), [math.nan], r"`scales`: expected more than -1, to 2\^20, got nan"),
        ((1, 5, 4, 6), [3.0], "`base_resolution`: expected 4 to 4, got 5"),
        ((1, 4, 5, 6), [3.0], "`finest_resolution`: expected 4 to 4, got 5"),
        ((1, 5, 5, 7), [3.5], r"`table`: .* \(128, F\), got float32 \(64, 2\)"),
    ],
)
def test_bad_input(grid, scales, message):
    with pytest.raises(ValueError, match=message):
        hash_encode(X, TABLE, *grid, scales=scales)
