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
GRID = (4, 3, 21, 9)  # dense, dense, hashed, hashed
WAYS = ["linear", "smoothstep"]


def make(rng, n, grid=GRID, features=2, dtype=torch.float64, device="cpu", reach=0.05):
    """Points in the unit cube and up to `reach` outside, and a table."""
    x = torch.rand(n, 3, dtype=torch.float64, generator=rng) * (1 + 2 * reach) - reach
    rows = hash_table_rows(*grid)[1][-1]
    table = torch.randn(rows, features, dtype=torch.float64, generator=rng)
    return [t.to(device, dtype).requires_grad_() for t in (x, table)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_twin(device, dtype, features, way, rng):
    x, table = make(rng, 1543, features=features, dtype=dtype, device=device)
    check_op(*OP, x, table, *GRID, way)


@pytest.mark.parametrize("grid", [(1, 1, 1, 3), (1, 7, 9, 12), (3, 5, 5, 3), (16, 16, 512, 14)])
def test_grids(device, dtype, grid, rng):
    check_op(*OP, *make(rng, 300, grid, dtype=dtype, device=device), *grid)


def test_faces_and_corners_of_cells(device, dtype):
    """Where the cell is a choice: the cube's faces and the cells' own."""
    ticks = torch.tensor([-1.0, 0.0, 1 / 3, 0.5, 1.0, 2.0, math.inf], dtype=dtype, device=device)
    x = torch.cartesian_prod(ticks, ticks, ticks).requires_grad_()
    rows = hash_table_rows(3, 6, 24, 10)[1][-1]
    table = torch.randn(rows, 2, dtype=dtype, device=device, requires_grad=True)
    check_op(*OP, x, table, 3, 6, 24, 10)


def test_value_at_a_vertex_is_the_row(device):
    table = torch.arange(64.0, device=device).reshape(64, 1)
    x = torch.tensor([[1, 2, 3], [3, 0, 1]], device=device) / 3
    assert hash_encode(x, table, 1, 3, 3, 6).flatten().tolist() == [1 + 4 * (2 + 12), 3 + 16]
    table = torch.arange(32.0, device=device).reshape(32, 1)
    want = [(i ^ (2654435761 * j) ^ (805459861 * k)) % 32 for i, j, k in ((1, 2, 3), (3, 0, 1))]
    assert hash_encode(x, table, 1, 3, 3, 5).flatten().tolist() == want


def test_rows():
    resolutions, offsets = hash_table_rows(8, 16, 1024, 16)
    assert resolutions[0] == 16 and resolutions[-1] == 1024 and resolutions == sorted(resolutions)
    assert offsets[:3] == [0, 4920, 4920 + 27000] and offsets[-1] - offsets[-2] == 2**16


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(device, way, rng):
    x, table = make(rng, 5, (3, 2, 6, 5), device=device)
    assert torch.autograd.gradcheck(lambda *a: hash_encode(*a, 3, 2, 6, 5, way), (x, table))


@pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 4096, 4097])
@pytest.mark.parametrize("valid", [None, 0, 1, 3, 5000])
def test_edge_sizes(device, dtype, n, valid, rng):
    x, table = make(rng, n, dtype=dtype, device=device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*OP, x, table, *GRID, "linear", count)


def test_only_one_gradient(device, rng):
    x, table = make(rng, 100, device=device)
    both = torch.autograd.grad(hash_encode(x, table, *GRID).square().sum(), (x, table))
    (of_x,) = torch.autograd.grad(hash_encode(x, table.detach(), *GRID).square().sum(), x)
    (of_table,) = torch.autograd.grad(hash_encode(x.detach(), table, *GRID).square().sum(), table)
    assert torch.equal(both[0], of_x)
    assert_close("hash_encode", both[1], of_table)  # on CUDA in no fixed order


@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_any_start_of_a_row(device, features, rng):
    """Kernels that read vectors meet tensors that start anywhere."""
    x, table = make(rng, 50, features=features, dtype=torch.float32, device=device)
    shifted = table.new_empty(table.numel() + 1)[1:].view_as(table).copy_(table.detach())
    assert torch.equal(hash_encode(x, shifted, *GRID), hash_encode(x, table, *GRID))
    cotangent = x.new_ones(50 * 4 * features + 1)[1:].view(50, -1)
    (got,) = torch.autograd.grad(hash_encode(x, table, *GRID), table, cotangent)
    (want,) = torch.autograd.grad(hash_encode(x, table, *GRID).sum(), table)
    assert_close("hash_encode", got, want)


def cotangent(x, table, levels):
    return torch.randn(len(x), levels * table.shape[1]).to(x).requires_grad_()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_second_order_twin(device, dtype, features, way, rng):
    x, table = make(rng, 203, features=features, dtype=dtype, device=device)
    check_op(*SECOND, cotangent(x, table, 4), x, table, *GRID, way)


@pytest.mark.parametrize("way", WAYS)
def test_second_order_gradcheck(device, way, rng):
    x, table = make(rng, 5, (3, 2, 6, 5), device=device)
    g, grid = cotangent(x, table, 3), (3, 2, 6, 5, way)
    assert torch.autograd.gradcheck(lambda *a: hash_encode_gradient(*a, *grid), (g, x, table))
    assert torch.autograd.gradgradcheck(lambda *a: hash_encode(*a, *grid), (x, table))


@pytest.mark.parametrize("n, valid", [(0, None), (1, 1), (65, 0), (65, 64), (4097, 4096)])
def test_second_order_edge_sizes(device, dtype, n, valid, rng):
    x, table = make(rng, n, dtype=dtype, device=device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*SECOND, cotangent(x, table, 4), x, table, *GRID, "smoothstep", count)


def test_second_order_only_one_gradient(device, rng):
    x, table = make(rng, 100, device=device)
    g = cotangent(x, table, 4)
    every = torch.autograd.grad(hash_encode_gradient(g, x, table, *GRID).square().sum(), (g, x))
    (of_g,) = torch.autograd.grad(
        hash_encode_gradient(g, x.detach(), table.detach(), *GRID).square().sum(), g
    )
    assert torch.equal(every[0], of_g)


def test_second_order_half(device, rng):
    """Features and their gradients in float16, as the first order is tested."""
    x, table = make(rng, 300, dtype=torch.float32, device=device)
    if not _backend.kernels(x).has_half:
        return
    with torch.no_grad():
        x.mul_(2**16).round_().div_(2**16)
    half, g = table.detach().half(), cotangent(x, table, 4).detach().half().requires_grad_()
    got = hash_encode_gradient(g, x, table, *GRID, "smoothstep", None, half)
    inputs = [t.detach().double().requires_grad_() for t in (g, x, half)]
    want = reference.hash_encode_gradient(*inputs, *GRID, "smoothstep")
    assert_close("hash_encode_second", got, want.float())
    tangent = torch.randn_like(got)
    grads = torch.autograd.grad(got, (g, x, table), tangent)
    of_g, *wanted = torch.autograd.grad(want, inputs, tangent.double())
    torch.testing.assert_close(grads[0], of_g.half(), rtol=1e-3, atol=1e-3)
    for a, b in zip(grads[1:], wanted, strict=True):
        assert_close("hash_encode_second", a, b.float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("n, valid", [(0, None), (1543, None), (300, 70)])
def test_half(device, features, way, n, valid, rng):
    """Against the float64 twin at the rounded table; where there is no half, it is refused."""
    x, table = make(rng, n, features=features, dtype=torch.float32, device=device)
    half = table.detach().half()
    if not _backend.kernels(x).has_half:
        with pytest.raises(ValueError, match="`table_half`: expected None on cpu, got a tensor"):
            hash_encode(x, table, *GRID, table_half=half)
        return
    with torch.no_grad():  # multiples of 2^-16: N x is exact, so both find the same cell
        x.mul_(2**16).round_().div_(2**16)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    got = hash_encode(x, table, *GRID, way, count, half)
    inputs = [t.detach().double().requires_grad_() for t in (x, half)]
    want = reference.hash_encode(*inputs, *GRID, way, count)
    assert got.dtype == torch.float16
    assert_close("hash_encode_half", got, want.half())
    cotangent = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, table), cotangent)
    wanted = torch.autograd.grad(want, inputs, cotangent.double())
    for a, b in zip(grads, wanted, strict=True):
        assert_close("hash_encode", a, b.float())


def test_half_registration(device, rng):
    x, table = make(rng, 9, dtype=torch.float32, device=device)
    if _backend.kernels(x).has_half:
        inputs = x, table, *GRID, "linear", None, table.detach().half()
        check_registration("hash_encode", hash_encode, *inputs)


@pytest.mark.parametrize("way", WAYS)
def test_nan_is_propagated_and_stays_in_bounds(device, dtype, way, rng):
    x, table = make(rng, 70, dtype=dtype, device=device)
    with torch.no_grad():
        x[2] = torch.tensor([0.3, math.nan, 0.7])
        x[3] = torch.tensor([math.nan, math.nan, math.nan])
        x[4] = torch.tensor([-0.1, math.nan, 1.1])  # no gradient, not even NaN, where clamped
    out = hash_encode(x, table, *GRID, way)
    hash_encode_gradient(cotangent(x, table, 4), x, table, *GRID, way).sum().backward()
    assert out[2:5].isnan().all() and out[[0, 1, *range(5, 70)]].isfinite().all()
    check_op(*OP, x, table, *GRID, way)


def test_a_table_row_of_its_own(device, rng):
    """A NaN in one row reaches only the points that use it."""
    x, table = make(rng, 500, (1, 8, 8, 12), device=device, reach=0)
    table = table.detach().clone()
    table[0] = math.nan
    bad = (x < 1 / 8).all(-1)
    assert torch.equal(hash_encode(x, table, 1, 8, 8, 12).isnan().any(-1), bad)


def test_thread_count_does_not_matter(rng):
    for grid in (GRID, (1, 6, 6, 9)):
        x, table = make(rng, 9001, grid, dtype=torch.float32)

        def grads(x=x, table=table, grid=grid):
            return torch.autograd.grad(hash_encode(x, table, *grid).square().sum(), (x, table))

        g = cotangent(x, table, grid[0])

        def second(x=x, table=table, grid=grid, g=g):
            gradient = hash_encode_gradient(g, x, table, *grid)
            return torch.autograd.grad(gradient.square().sum(), (g, x, table))

        check_threads(grads)
        check_threads(second)


def test_registration(rng):
    device = torch.device("cpu")
    x, table = make(rng, 9, dtype=torch.float32, device=device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    check_registration("hash_encode", hash_encode, x, table, *GRID, "linear", None, None)
    check_registration("hash_encode", hash_encode, x, table, *GRID, "smoothstep", count, None)
    g = cotangent(x, table, 4)
    inputs = g, x, table, *GRID, "smoothstep", count, None
    torch.library.opcheck(
        torch.ops.dreamfusion_fast.hash_encode_backward.default, (*inputs, True, True)
    )
    compiled = torch.compile(hash_encode_gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), hash_encode_gradient(*inputs))


X, TABLE = torch.rand(4, 3), torch.zeros(64, 2)
HALF = X, TABLE, 1, 3, 3, 6, "linear", None


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X.int(), TABLE, 1, 3, 3, 6), TypeError, r"`x`: .* \(N, 3\), got int32 \(4, 3\)"),
        ((X[:, :2], TABLE, 1, 3, 3, 6), ValueError, r"`x`: .* \(N, 3\), got float32 \(4, 2\)"),
        ((X, TABLE.double(), 1, 3, 3, 6), TypeError, "`table`: expected float32 .* got float64"),
        ((X, TABLE, 1, 4, 4, 7), ValueError, r"`table`: .* \(128, F\), got float32 \(64, 2\)"),
        ((X, torch.zeros(64, 3), 1, 3, 3, 6), ValueError, "`table`: expected 1, 2, 4 or 8 .* 3"),
        ((X, TABLE, 0, 3, 3, 6), ValueError, "`n_levels`: expected 1 to 32, got 0"),
        ((X, TABLE, 1, 0, 3, 6), ValueError, "`base_resolution`: expected 1 to 1048576, got 0"),
        ((X, TABLE, 2, 3, 2, 6), ValueError, "`finest_resolution`: expected 3 to .*, got 2"),
        ((X, TABLE, 1, 3, 3, 2), ValueError, "`log2_table_size`: expected 3 to 28, got 2"),
        ((X, TABLE, 1, 3, 3, 6, "cubic"), ValueError, '`interpolation`: .* got "cubic"'),
        ((X, TABLE, 1, 3, 3, 6, "linear", torch.ones(1)), TypeError, "`count`: expected int32"),
        ((*HALF, TABLE), TypeError, r"`table_half`: expected float16 .* \(64, 2\), got float32"),
        ((*HALF, TABLE[1:].half()), ValueError, r"`table_half`: .* got float16 \(63, 2\)"),
        ((X.double(), TABLE.double(), *HALF[2:], TABLE.half()), TypeError, "got torch.float64"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        hash_encode(*arguments)


def test_points_beyond_one_scratch(rng):
    """More points than one scratch of the CPU kernels holds (32,768 of 256 features): each point's
    results are those of a call of its own part."""
    grid, n = (32, 2, 64, 10), 33_000
    x = torch.rand(n, 3, generator=rng)
    table = torch.rand(hash_table_rows(*grid)[1][-1], 8, generator=rng)
    weights = torch.rand(n, 256, generator=rng)

    def gradients(part):
        points, rows = x[part].requires_grad_(), table.clone().requires_grad_()
        out = hash_encode(points, rows, *grid)
        (out * weights[part]).sum().backward()
        return out.detach(), points.grad, rows.grad

    whole, low, high = (gradients(slice(*p)) for p in ((0, n), (0, 20_000), (20_000, n)))
    assert torch.equal(whole[0], torch.cat((low[0], high[0])))
    assert torch.equal(whole[1], torch.cat((low[1], high[1])))
    torch.testing.assert_close(whole[2], low[2] + high[2], rtol=1e-4, atol=1e-3)
