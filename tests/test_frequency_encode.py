import math

import pytest
import torch
from conftest import check_op, check_registration, check_threads

from dreamfusion_fast.ops import frequency_encode, frequency_encode_gradient, reference

OP = ("frequency_encode", frequency_encode, reference.frequency_encode)
GRADIENT = (
    "frequency_encode_gradient",
    frequency_encode_gradient,
    reference.frequency_encode_gradient,
)


def points(rng, n, dims, dtype=torch.float64, device="cpu"):
    x = torch.empty(n, dims, dtype=torch.float64).uniform_(-4, 4, generator=rng)
    return x.to(device, dtype).requires_grad_()


def variances(rng, n, dtype=torch.float64, device="cpu"):
    """From 0.02: below, high frequencies make gradients of the variance as large as 4^l."""
    v = torch.empty(n, dtype=torch.float64).uniform_(0.02, 0.5, generator=rng)
    return v.to(device, dtype).requires_grad_()


def cotangent(rng, x, n_frequencies):
    g = torch.randn(x.shape[0], 2 * n_frequencies * x.shape[1], generator=rng, dtype=torch.float64)
    return g.to(x.device, x.dtype).requires_grad_()


@pytest.mark.parametrize("dims, n_frequencies", [(1, 1), (3, 5), (4, 3), (50, 3)])
@pytest.mark.parametrize("integrated", [False, True])
def test_twin(device, dtype, dims, n_frequencies, integrated, rng):
    x = points(rng, 521, dims, dtype, device)
    variance = variances(rng, 521, dtype, device) if integrated else None
    check_op(*OP, x, n_frequencies, variance)


def test_twin_at_high_frequencies(device, dtype, rng):
    check_op(*OP, points(rng, 211, 3, dtype, device).detach(), 24)


def test_large_and_special_values(device, dtype, rng):
    special = [0.0, -0.0, math.pi, 1e5, -1.5e7, 1e9, -1e30, math.inf, -math.inf, math.nan]
    x = torch.tensor(special, dtype=dtype, device=device)[:, None]
    check_op(*OP, x, 1)
    check_op(*OP, x.T.contiguous(), 1)


def test_accuracy_for_angles_of_any_size(device, dtype, rng):
    """Up to the dtype's largest, against Python's sine and cosine."""
    exponent = torch.empty(4000, dtype=torch.float64).uniform_(-30, 1, generator=rng)
    exponent[::2] *= (-127 if dtype == torch.float32 else -1023) / 30
    x = torch.exp2(exponent) * torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(1000)
    near = torch.arange(-300, 300, dtype=torch.float64) * (math.pi / 4)  # where signs change
    x = torch.cat((x, near, near * 2**20)).to(dtype)[:, None]
    x = x[x.isfinite()][:, None]
    want = torch.tensor(
        [[math.sin(v), math.cos(v)] for v in x.flatten().tolist()], dtype=torch.float64
    )
    got = frequency_encode(x.to(device), 1).cpu()
    assert (got - want).abs().max() < 2 * torch.finfo(dtype).eps


def test_order_of_columns(device):
    x = torch.tensor([[0.3, -0.7]], device=device)
    angle = [0.3, -0.7, 0.6, -1.4]
    want = [math.sin(a) for a in angle] + [math.cos(a) for a in angle]
    torch.testing.assert_close(frequency_encode(x, 2), torch.tensor([want], device=device))


def test_integrated_is_the_mean_over_a_gaussian(device, rng):
    x, variance = points(rng, 1, 2).detach(), torch.tensor([0.09], dtype=torch.float64)
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * nodes**2)
    samples = x + variance.sqrt() * nodes[:, None]
    mean = (weight[:, None] * reference.frequency_encode(samples, 4)).sum(0) / weight.sum()
    got = frequency_encode(x.to(device), 4, variance.to(device)).cpu()
    torch.testing.assert_close(got[0], mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("integrated", [False, True])
def test_gradcheck(device, integrated, rng):
    x = points(rng, 3, 2, device=device)
    inputs = (x, 3, variances(rng, 3, device=device) if integrated else None)
    assert torch.autograd.gradcheck(frequency_encode, inputs)


@pytest.mark.parametrize("dims, n_frequencies", [(1, 1), (3, 5), (50, 3)])
@pytest.mark.parametrize("integrated", [False, True])
def test_gradient_twin(device, dtype, dims, n_frequencies, integrated, rng):
    x = points(rng, 131, dims, dtype, device)
    variance = variances(rng, 131, dtype, device) if integrated else None
    check_op(*GRADIENT, cotangent(rng, x, n_frequencies), x, n_frequencies, variance)


def test_gradient_is_that_of_the_encoding(device, rng):
    x, variance = points(rng, 23, 3, device=device), variances(rng, 23, device=device)
    g = cotangent(rng, x, 4)
    (want,) = torch.autograd.grad(frequency_encode(x, 4, variance), x, g)
    assert torch.equal(frequency_encode_gradient(g, x, 4, variance), want)


@pytest.mark.parametrize("integrated", [False, True])
def test_gradient_gradcheck(device, integrated, rng):
    x = points(rng, 3, 2, device=device)
    variance = variances(rng, 3, device=device) if integrated else None
    inputs = (cotangent(rng, x, 3), x, 3, variance)
    assert torch.autograd.gradcheck(frequency_encode_gradient, inputs)


@pytest.mark.parametrize("integrated", [False, True])
def test_gradgradcheck(device, integrated, rng):
    """Through the gradient of the variance, too."""
    x = points(rng, 3, 2, device=device)
    inputs = (x, 3, variances(rng, 3, device=device) if integrated else None)
    assert torch.autograd.gradgradcheck(frequency_encode, inputs)


def test_second_derivative_of_the_variance_alone(device, rng):
    """Nothing but grad_variance is used: the kernel gets no gradient of grad_x."""
    results = []
    for function in (frequency_encode, reference.frequency_encode):
        rng.manual_seed(1)
        x, variance = points(rng, 7, 3, device=device), variances(rng, 7, device=device)
        out = function(x, 4, variance).square().sum()
        (first,) = torch.autograd.grad(out, variance, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (x, variance)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [0, 1, 7, 256, 257])
@pytest.mark.parametrize("valid", [None, 0, 1, 3, 2000])
@pytest.mark.parametrize("integrated", [False, True])
def test_edge_sizes(device, dtype, n, valid, integrated, rng):
    variance = variances(rng, n, dtype, device) if integrated else None
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*OP, points(rng, n, 3, dtype, device), 4, variance, count)


@pytest.mark.parametrize("n", [0, 1, 42, 43, 257])
@pytest.mark.parametrize("valid", [None, 0, 3, 2000])
def test_gradient_edge_sizes(device, dtype, n, valid, rng):
    x, variance = points(rng, n, 3, dtype, device), variances(rng, n, dtype, device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*GRADIENT, cotangent(rng, x, 4), x, 4, variance, count)


def test_no_dimensions(device):
    x, variance = torch.zeros(5, 0, device=device), torch.ones(5, device=device).requires_grad_()
    out = frequency_encode(x, 3, variance)
    assert out.shape == (5, 0)
    (grad,) = torch.autograd.grad(out.sum(), variance, create_graph=True)
    assert not grad.any()
    assert not torch.autograd.grad(grad.sum(), variance)[0].any()


def test_thread_count_does_not_matter(rng):
    x, variance = points(rng, 2000, 3, torch.float32), variances(rng, 2000, torch.float32)
    check_threads(
        lambda: torch.autograd.grad(frequency_encode(x, 5, variance).exp().sum(), (x, variance))
    )
    g = cotangent(rng, x, 5)
    check_threads(
        lambda: torch.autograd.grad(
            frequency_encode_gradient(g, x, 5, variance).exp().sum(), (g, x, variance)
        )
    )


def test_registration(rng):
    device = torch.device("cpu")
    x, variance = points(rng, 9, 3, device=device), variances(rng, 9, device=device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    check_registration("frequency_encode", frequency_encode, x, 3, None, None)
    check_registration("frequency_encode", frequency_encode, x, 3, variance, count)


@pytest.mark.parametrize("integrated", [False, True])
def test_gradient_registration(integrated, rng):
    device = torch.device("cpu")
    x, variance, count = points(rng, 9, 3, device=device), None, None
    if integrated:
        variance = variances(rng, 9, device=device)
        count = torch.tensor([4], dtype=torch.int32, device=device)
    inputs = (cotangent(rng, x, 3), x, 3, variance, count)
    check_registration("frequency_encode_backward", frequency_encode_gradient, *inputs)
    u, q = torch.ones_like(x), torch.ones(9, dtype=x.dtype, device=device)
    for wanted in ([True, True, integrated], [True, False, False]):
        rest = u, q if integrated else None, *inputs, wanted
        rest = [t.detach() if isinstance(t, torch.Tensor) else t for t in rest]
        torch.library.opcheck(torch.ops.dreamfusion_fast.frequency_encode_second.default, rest)


@pytest.mark.parametrize(
    "x, n_frequencies, variance, error, message",
    [
        (torch.zeros(4), 3, None, ValueError, r"`x`: .* \(N, D\), got float32 \(4,\)"),
        (torch.zeros(4, 3).half(), 3, None, TypeError, r"`x`: .* got float16 \(4, 3\)"),
        (torch.zeros(4, 3), 0, None, ValueError, "`n_frequencies`: expected 1 to 24, got 0"),
        (torch.zeros(4, 3), 3, torch.zeros(3), ValueError, r"`variance`: .* \(4,\), got .* \(3,\)"),
        (torch.zeros(4, 3), 3, torch.zeros(4).double(), TypeError, r"`variance`: expected float32"),
    ],
)
def test_bad_input(x, n_frequencies, variance, error, message):
    with pytest.raises(error, match=message):
        frequency_encode(x, n_frequencies, variance)


@pytest.mark.parametrize(
    "grad_out, error, message",
    [
        (torch.zeros(4, 12), ValueError, r"`grad_out`: .* \(4, 18\), got float32 \(4, 12\)"),
        (torch.zeros(4, 18).double(), TypeError, r"`grad_out`: expected float32"),
        (torch.zeros(18, 4).T, ValueError, r"`grad_out`: expected a contiguous tensor"),
    ],
)
def test_gradient_bad_input(grad_out, error, message):
    with pytest.raises(error, match=message):
        frequency_encode_gradient(grad_out, torch.zeros(4, 3), 3)
    with pytest.raises(ValueError, match="`n_frequencies`: expected 1 to 24, got 25"):
        frequency_encode_gradient(grad_out, torch.zeros(4, 3), 25)
