import itertools
import math

import pytest
import torch
from conftest import assert_close, check_op, check_registration, check_threads

from dreamfusion_fast.ops import _backend, mlp, mlp_gradient, mlp_parameters, reference

OP = ("mlp", mlp, reference.mlp)
SECOND = ("mlp_second", mlp_gradient, reference.mlp_gradient)
SHAPES = [
    ([32, 32, 4], False),
    ([32, 64, 64, 4], True),
    ([16, 128, 16], False),
    ([3, 5], True),
    ([1, 1, 1], True),
    ([7, 13, 9, 11, 3], True),
    ([256, 256, 255], False),
]


def make(rng, n, widths, bias=False, dtype=torch.float64, device="cpu"):
    """Rows of size 1, and parameters that keep it so."""
    x = torch.randn(n, widths[0], dtype=torch.float64, generator=rng)
    params = torch.randn(mlp_parameters(widths, bias), dtype=torch.float64, generator=rng)
    start = 0
    for n_in, n_out in itertools.pairwise(widths):
        params[start : start + n_in * n_out] *= n_in**-0.5
        start += (n_in + bias) * n_out
    return [t.to(device, dtype).requires_grad_() for t in (x, params)]


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("widths, bias", SHAPES)
def test_twin(device, dtype, widths, bias, activation, rng):
    x, params = make(rng, 203, widths, bias, dtype, device)
    with torch.no_grad():  # sums are then exact, and relu's kinks on the same side in the twin
        for t in (x, params):
            t.copy_((8 * t).round() / 8)
    check_op(*OP, x, params, widths, activation, bias)


def test_against_linear_layers(device, rng):
    layers = torch.nn.Sequential(
        torch.nn.Linear(20, 24), torch.nn.SiLU(), torch.nn.Linear(24, 3)
    ).to(device)
    params = torch.cat([p.flatten() for p in layers.parameters()])
    x = torch.randn(50, 20, generator=rng).to(device)
    torch.testing.assert_close(mlp(x, params, [20, 24, 3], "silu", True), layers(x))


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("widths", [[3, 2], [3, 6, 2], [2, 5, 4, 3]])
def test_gradcheck(device, widths, activation, rng):
    x, params = make(rng, 4, widths, True, device=device)
    assert torch.autograd.gradcheck(lambda *a: mlp(*a, widths, activation, True), (x, params))


def cotangent(x, widths):
    return torch.randn(len(x), widths[-1]).to(x).requires_grad_()


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("widths, bias", SHAPES)
def test_second_order_twin(device, dtype, widths, bias, activation, rng):
    x, params = make(rng, 70, widths, bias, dtype, device)
    with torch.no_grad():  # relu's kinks on the same side in the twin
        for t in (x, params):
            t.copy_((8 * t).round() / 8)
    check_op(*SECOND, cotangent(x, widths), x, params, widths, activation, bias)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("widths", [[3, 2], [3, 6, 2], [2, 5, 4, 3]])
def test_second_order_gradcheck(device, widths, activation, rng):
    x, params = make(rng, 4, widths, True, device=device)
    shape = widths, activation, True
    assert torch.autograd.gradcheck(
        lambda *a: mlp_gradient(*a, *shape), (cotangent(x, widths), x, params)
    )
    assert torch.autograd.gradgradcheck(lambda x: mlp(x, params.detach(), *shape), x)


@pytest.mark.parametrize("n, valid", [(0, None), (1, 1), (129, 0), (130, 129), (1025, 1000)])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_second_order_edge_sizes(device, dtype, activation, n, valid, rng):
    x, params = make(rng, n, [9, 16, 5], True, dtype, device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*SECOND, cotangent(x, [5]), x, params, [9, 16, 5], activation, True, count)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_second_order_only_one_gradient(device, activation, rng):
    widths = [9, 16, 12, 5]
    x, params = make(rng, 300, widths, device=device)
    inputs = [cotangent(x, widths), x, params]

    def grads(*wanted):
        used = [t if k in wanted else t.detach() for k, t in enumerate(inputs)]
        out = mlp_gradient(*used, widths, activation).square().sum()
        return torch.autograd.grad(out, [inputs[k] for k in wanted], allow_unused=True)

    every = grads(0, 1, 2)
    for k in range(3):
        assert torch.equal(grads(k)[0], every[k])


def test_second_order_refusals(device, rng):
    x, params = make(rng, 5, [3, 4, 2], device=device)
    (of_params,) = torch.autograd.grad(mlp(x, params, [3, 4, 2]).sum(), params, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of params cannot be differentiated"):
        of_params.sum().backward()


@pytest.mark.parametrize("n", [0, 1, 7, 128, 129, 1024, 1025])
@pytest.mark.parametrize("valid", [None, 0, 1, 130, 5000])
def test_edge_sizes(device, dtype, n, valid, rng):
    x, params = make(rng, n, [9, 16, 5], True, dtype, device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*OP, x, params, [9, 16, 5], "silu", True, count)


def test_many_chunks(device, rng):
    """More rows than 64 chunks of the smallest size hold."""
    x, params = make(rng, 70001, [2, 3, 1], device=device)
    check_op(*OP, x, params, [2, 3, 1])


def test_many_layers(device, dtype, rng):
    widths = [8] * 33
    check_op(*OP, *make(rng, 40, widths, dtype=dtype, device=device), widths, "silu")


def test_only_one_gradient(device, rng):
    widths = [9, 16, 16, 5]
    x, params = make(rng, 300, widths, device=device)
    both = torch.autograd.grad(mlp(x, params, widths).square().sum(), (x, params))
    (of_x,) = torch.autograd.grad(mlp(x, params.detach(), widths).square().sum(), x)
    (of_params,) = torch.autograd.grad(mlp(x.detach(), params, widths).square().sum(), params)
    assert torch.equal(both[0], of_x) and torch.equal(both[1], of_params)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_is_propagated(device, dtype, activation, rng):
    x, params = make(rng, 70, [9, 16, 5], dtype=dtype, device=device)
    with torch.no_grad():
        x[2, 1] = math.nan
    out = mlp(x, params, [9, 16, 5], activation)
    assert out[2].isnan().all() and out[[0, 1, *range(3, 70)]].isfinite().all()
    check_op(*OP, x, params, [9, 16, 5], activation)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_large_values(device, dtype, activation):
    """silu and its derivative far from zero, where exp(-z) overflows or vanishes."""
    x = torch.tensor([-1e4, -100.0, -90.0, -0.0, 0.0, 30.0, 100.0, 1e4], dtype=dtype, device=device)
    params = torch.ones(2, dtype=dtype, device=device)
    check_op(*OP, x[:, None].requires_grad_(), params.requires_grad_(), [1, 1, 1], activation)


def test_thread_count_does_not_matter(rng):
    x, params = make(rng, 9001, [9, 16, 5], True, torch.float32)
    check_threads(
        lambda: torch.autograd.grad(
            mlp(x, params, [9, 16, 5], "silu", True).square().sum(), (x, params)
        )
    )
    g, shape = cotangent(x, [5]), ([9, 16, 5], "silu", True)
    check_threads(
        lambda: torch.autograd.grad(
            mlp_gradient(g, x, params, *shape).square().sum(), (g, x, params)
        )
    )


def test_registration(rng):
    device = torch.device("cpu")
    x, params = make(rng, 9, [9, 16, 5], True, torch.float32, device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    check_registration("mlp", mlp, x, params, [9, 16, 5], "relu", True, None, None)
    check_registration("mlp", mlp, x, params, [9, 16, 5], "silu", True, count, None)
    inputs = cotangent(x, [5]), x, params, [9, 16, 5], "silu", True, count
    torch.library.opcheck(
        torch.ops.dreamfusion_fast.mlp_backward.default, (*inputs, None, True, False)
    )
    compiled = torch.compile(mlp_gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), mlp_gradient(*inputs))


# Widths, bias, activation, rows. With relu, no more hidden layers than leave its kinks exact.
HALF_SHAPES = [
    ([32, 32, 4], False, "relu", 203),
    ([32, 64, 64, 4], True, "relu", 203),
    ([16, 128, 16], False, "silu", 70),
    ([7, 13, 9, 11, 3], True, "silu", 203),
    ([5, 16, 2], True, "relu", 203),
    ([128, 24, 64], True, "silu", 70),  # more squares of the gradient than a block's slots
    ([20, 128, 128, 3], True, "silu", 40),  # two warps a block
    ([128, 128, 128, 16], False, "relu", 20),  # one warp
]


def check_half(rng, n, widths, bias, activation, device, count=None, offset=0):
    """float16 against the float64 twin at the rounded inputs; where there is none, it is refused.
    offset: numbers by which x is off its alignment."""
    x, params = make(rng, n + offset, widths, bias, torch.float32, device)
    with torch.no_grad():
        params.copy_((8 * params).round() / 8)
        x = ((8 * x).round() / 8).half().flatten()[offset : offset + n * widths[0]]
    x = x.view(n, widths[0]).requires_grad_()
    half = params.detach().half()
    if not _backend.kernels(x).has_half:
        with pytest.raises(ValueError, match="`params_half`: expected None on cpu"):
            mlp(x, params, widths, activation, bias, count, half)
        return
    inputs = [t.detach().double().requires_grad_() for t in (x, half)]
    got = mlp(x, params, widths, activation, bias, count, half)
    want = reference.mlp(*inputs, widths, activation, bias, count)
    assert got.dtype == torch.float16
    assert_close("mlp_half", got.float(), want.float())
    cotangent = torch.randn_like(got) * max(1, n / 200) ** -0.5  # sums as of 200 rows
    got_grads = torch.autograd.grad(got, (x, params), cotangent)
    want_grads = torch.autograd.grad(want, inputs, cotangent.double())
    assert [g.dtype for g in got_grads] == [torch.float16, torch.float32]
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_close("mlp_half", a.float(), b.float())


@pytest.mark.parametrize("widths, bias, activation, n", HALF_SHAPES)
def test_half(device, widths, bias, activation, n, rng):
    check_half(rng, n, widths, bias, activation, device)


@pytest.mark.parametrize("n", [0, 1, 16, 129])
@pytest.mark.parametrize("valid", [None, 0, 1, 100, 5000])
def test_half_edge_sizes(device, n, valid, rng):
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_half(rng, n, [9, 16, 5], True, "silu", device, count)


def test_half_many_tiles(device, rng):
    """More rows than all blocks together take at a time, forward and backward."""
    check_half(rng, 131200, [2, 16, 1], True, "relu", device)


@pytest.mark.parametrize("offset", [1, 2])
def test_half_off_alignment(device, offset, rng):
    check_half(rng, 20, [8, 16, 4], False, "relu", device, offset=offset)


def test_half_sums_beyond_half(device):
    """Sums that pass 65504, the largest float16, on their way to something smaller."""
    x = torch.full((20, 64), 200.0, dtype=torch.float16, device=device)
    first = torch.full((16, 64), 200.0, device=device)
    first[:, 32:] = -199.5
    params = torch.cat((first.flatten(), torch.full((16,), 1 / 16, device=device)))
    if _backend.kernels(x).has_half:
        got = mlp(x, params, [64, 16, 1], params_half=params.half())
        torch.testing.assert_close(got, torch.full_like(got, 3200))


def test_half_only_one_gradient(device, rng):
    widths = [9, 16, 16, 5]
    x, params = make(rng, 70, widths, dtype=torch.float32, device=device)
    x, half = x.detach().half().requires_grad_(), params.detach().half()
    if not _backend.kernels(x).has_half:
        return
    both = torch.autograd.grad(mlp(x, params, widths, params_half=half).sum(), (x, params))
    of_x = torch.autograd.grad(mlp(x, params.detach(), widths, params_half=half).sum(), x)
    of_params = torch.autograd.grad(mlp(x.detach(), params, widths, params_half=half).sum(), params)
    assert_close("mlp_half", both[0].float(), of_x[0].float())
    assert_close("mlp_half", both[1], of_params[0])


def test_half_registration(device, rng):
    x, params = make(rng, 9, [9, 16, 5], True, torch.float32, device)
    if _backend.kernels(x).has_half:
        half = params.detach().half()
        inputs = x.detach().half().requires_grad_(), params, [9, 16, 5], "relu", True, None, half
        check_registration("mlp", mlp, *inputs)


@pytest.mark.parametrize("widths", [[3, 5], [3, 200, 2], [129, 16, 2], [64, *[128] * 4, 2]])
def test_half_that_does_not_fit(device, widths, rng):
    x, params = make(rng, 5, widths, dtype=torch.float32, device=device)
    if _backend.kernels(x).has_half:
        with pytest.raises(ValueError, match="`widths`: expected, for float16, one hidden layer"):
            mlp(x.detach().half(), params, widths, params_half=params.detach().half())


X, PARAMS = torch.rand(4, 3), torch.zeros(14)
HALF = X, PARAMS, [3, 2, 4], "relu", False, None


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X.int(), PARAMS, [3, 2, 4]), TypeError, r"`x`: .* \(N, 3\), got int32 \(4, 3\)"),
        ((X, PARAMS, [4, 2, 3]), ValueError, r"`x`: .* \(N, 4\), got float32 \(4, 3\)"),
        ((X, PARAMS.double(), [3, 2, 4]), TypeError, "`params`: expected float32 .* got float64"),
        ((X, PARAMS, [3, 2, 5]), ValueError, r"`params`: .* \(16,\), got float32 \(14,\)"),
        ((X, PARAMS, [3, 2, 4], "relu", True), ValueError, r"`params`: .* \(20,\)"),
        ((X, PARAMS, [3]), ValueError, "`widths`: expected 2 to 33 numbers, got 1"),
        ((X, PARAMS, [3, 300, 4]), ValueError, "`widths`: expected 1 to 256, got 300"),
        ((X, PARAMS, [3, 2, 4], "tanh"), ValueError, '`activation`: expected .*, got "tanh"'),
        ((X, PARAMS, [3, 2, 4], "relu", False, torch.ones(1)), TypeError, "`count`: expected int"),
        ((X.half(), PARAMS, [3, 2, 4]), TypeError, "`x`: expected float32 or float64 .* float16"),
        ((*HALF, PARAMS.half()), TypeError, "`x`: expected float16 .* got float32"),
        ((X.half(), *HALF[1:], PARAMS), TypeError, "`params_half`: expected float16 .* float32"),
        (
            (X.half(), *HALF[1:], PARAMS[1:].half()),
            ValueError,
            r"`params_half`: .* float16 \(13,\)",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        mlp(*arguments)
