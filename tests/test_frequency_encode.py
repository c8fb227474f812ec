import math

import pytest
import torch
from conftest import check_op, check_registration, check_threads

from dreamfusion_fast.ops import frequency_encode, reference

OP = ("frequency_encode", frequency_encode, reference.frequency_encode)


def points(rng, n, dims, dtype=torch.float64, device="cpu"):
    x = torch.empty(n, dims, dtype=torch.float64).uniform_(-4, 4, generator=rng)
    return x.to(device, dtype).requires_grad_()


def variances(rng, n, dtype=torch.float64, device="cpu"):
    """From 0.02: below, high frequencies make gradients of the variance as large as 4^l."""
    v = torch.empty(n, dtype=torch.float64).uniform_(0.02, 0.5, generator=rng)
    return v.to(device, dtype).requires_grad_()


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


@pytest.mark.parametrize("n", [0, 1, 7, 256, 257])
@pytest.mark.parametrize("valid", [None, 0, 1, 3, 2000])
@pytest.mark.parametrize("integrated", [False, True])
def test_edge_sizes(device, dtype, n, valid, integrated, rng):
    variance = variances(rng, n, dtype, device) if integrated else None
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*OP, points(rng, n, 3, dtype, device), 4, variance, count)


def test_no_dimensions(device):
    assert frequency_encode(torch.zeros(5, 0, device=device), 3).shape == (5, 0)


def test_thread_count_does_not_matter(rng):
    x, variance = points(rng, 2000, 3, torch.float32), variances(rng, 2000, torch.float32)
    check_threads(
        lambda: torch.autograd.grad(frequency_encode(x, 5, variance).exp().sum(), (x, variance))
    )


def test_registration(device, rng):
    x, variance = points(rng, 9, 3, device=device), variances(rng, 9, device=device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    check_registration("frequency_encode", frequency_encode, x, 3, None, None)
    check_registration("frequency_encode", frequency_encode, x, 3, variance, count)


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
