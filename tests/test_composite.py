import math

import pytest
import torch
from conftest import check_op, check_registration, check_threads

from dreamfusion_fast.ops import composite, reference

OP = ("composite", composite, reference.composite)


def samples(rng, counts, channels=3, dtype=torch.float64, device="cpu", gap=0):
    """sigma, rgb, t, dt that want gradients, and packed, with `gap` rows of no ray after each."""
    counts = torch.as_tensor(counts)
    starts = (counts + gap).cumsum(0) - counts - gap
    n = int((counts + gap).sum())
    sigma, dt = torch.rand(2, n, dtype=torch.float64, generator=rng)
    sigma = 30 * sigma * (sigma > 0.3)  # some exactly empty
    rgb = torch.rand(n, channels, dtype=torch.float64, generator=rng)
    t = 4 * torch.rand(n, dtype=torch.float64, generator=rng).sort().values
    tensors = [x.to(device, dtype).requires_grad_() for x in (sigma, rgb, t, 0.01 + 0.05 * dt)]
    return *tensors, torch.stack((starts, counts), -1).int().to(device)


def ragged(rng, rays, longest=140):
    counts = torch.randint(0, longest, (rays,), generator=rng)
    counts[1::4] = 0
    counts[2::8] = 64  # a block
    return counts


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("gap", [0, 3])
def test_twin(device, dtype, channels, gap, rng):
    check_op(*OP, *samples(rng, ragged(rng, 139), channels, dtype, device, gap))


@pytest.mark.parametrize("early_stop", [1e-3, 0.3, 1.0])
def test_early_stop(device, dtype, early_stop, rng):
    inputs = samples(rng, ragged(rng, 67), 3, dtype, device)
    check_op(*OP, *inputs, early_stop)
    sigma, _, _, dt, packed = inputs
    weights = composite(*inputs, early_stop)[3]
    for start, count in packed.tolist():
        rows = slice(start, start + count)
        in_front = (sigma * dt)[rows].cumsum(0) - (sigma * dt)[rows]
        assert not weights[rows][(-in_front).exp() < 0.99 * early_stop].any()


@pytest.mark.parametrize("last", [0, 30, 31, 32, 63, 64, 95])
def test_early_stop_around_a_chunk(device, dtype, last):
    """What stops the ray is the sample in front: `last` is the last one that is lit."""
    sigma = torch.zeros(97, device=device, dtype=dtype)
    sigma[last:] = 2
    one = torch.ones_like(sigma)
    rgb = torch.linspace(0.1, 1, 97, device=device, dtype=dtype)[:, None].contiguous()
    packed = torch.tensor([[0, 97]], dtype=torch.int32, device=device)
    sigma.requires_grad_()
    weights = composite(sigma, rgb, one, one, packed, 0.2)[3]
    assert weights.nonzero().flatten().tolist() == [last]
    check_op(*OP, sigma, rgb, one, one, packed, 0.2)


@pytest.mark.parametrize("gap", [0, 3])
def test_rays_in_any_order(device, dtype, gap, rng):
    """As the GPU's march leaves them: their rows follow no order of the rays."""
    *inputs, packed = samples(rng, ragged(rng, 41), 3, dtype, device, gap)
    order = torch.randperm(len(packed), generator=rng).to(device)
    check_op(*OP, *inputs, packed[order], 1e-3)


@pytest.mark.parametrize("output", [0, 1, 2, 3])
def test_gradient_of_one_output(device, output, rng):
    inputs = samples(rng, [5, 0, 3], device=device)
    want = torch.autograd.grad(reference.composite(*inputs)[output].square().sum(), inputs[:1])
    got = torch.autograd.grad(composite(*inputs)[output].square().sum(), inputs[:1])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("early_stop", [0.0, 0.05])
@pytest.mark.parametrize("gap", [0, 2])
def test_gradcheck(device, early_stop, gap, rng):
    *inputs, packed = samples(rng, [5, 0, 1, 9], 2, device=device, gap=gap)
    assert torch.autograd.gradcheck(lambda *x: composite(*x, packed, early_stop), inputs)


@pytest.mark.parametrize("counts", [[], [0], [1], [0, 0, 0], [64], [65], [1] * 128, [2] * 129])
def test_edge_sizes(device, dtype, counts, rng):
    check_op(*OP, *samples(rng, torch.tensor(counts, dtype=torch.long), 3, dtype, device))


def test_no_rays_for_the_samples(device, dtype, rng):
    *inputs, packed = samples(rng, [5, 3], 3, dtype, device)
    check_op(*OP, *inputs, packed[:0])
    assert not composite(*inputs, packed[:0])[3].any()


@pytest.mark.parametrize("depth", [0.0, 1e-20, 1e-6, 1.0, 80.0, 87.5, 120.0, 1e4])
def test_optical_depths(device, dtype, depth):
    """Accurate for thin and dense samples, and finite, as are the gradients."""
    sigma = torch.full((3,), 2 * depth, device=device, dtype=dtype, requires_grad=True)
    half, rgb = sigma.detach() * 0 + 0.5, torch.ones(3, 1, device=device, dtype=dtype)
    packed = torch.tensor([[0, 3]], dtype=torch.int32, device=device)
    colour, opacity, _, weights = composite(sigma, rgb, half, half, packed)
    want = torch.tensor([math.exp(-depth * i) * -math.expm1(-depth) for i in range(3)])
    torch.testing.assert_close(weights.cpu(), want.to(dtype), rtol=1e-6, atol=1e-37)
    (grad,) = torch.autograd.grad(opacity.sum() + 2 * colour.sum(), sigma)
    want = torch.full((3,), 1.5 * math.exp(-3 * depth), dtype=dtype)
    torch.testing.assert_close(grad.cpu(), want, rtol=1e-5, atol=1e-7)


def test_hidden_samples_have_accurate_gradients(device):
    """Behind an optical depth of 23, where 1 - opacity has no digits left in float32."""
    results = []
    for dtype in (torch.float32, torch.float64):
        sigma = torch.tensor([23.0, 0.5, 0.25, 0.125], device=device, dtype=dtype)
        rgb = torch.tensor([[0.1], [0.9], [0.3], [0.7]], device=device, dtype=dtype)
        one = torch.ones_like(sigma)
        packed = torch.tensor([[0, 4]], dtype=torch.int32, device=device)
        sigma.requires_grad_()
        results += torch.autograd.grad(composite(sigma, rgb, one, one, packed)[0].sum(), sigma)
    torch.testing.assert_close(results[0].double()[1:], results[1][1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("row", [(-3, 5), (8, 5), (2, -1), (5, 2**31 - 1), (2**31 - 1, 7), (10, 1)])
def test_packed_is_clamped(device, dtype, row, rng):
    inputs = samples(rng, [4, 6], 3, dtype, device)
    packed = torch.tensor([row], dtype=torch.int32, device=device)
    check_op(*OP, *inputs[:4], packed)


def test_nan_stays_in_its_ray(device, rng):
    inputs = samples(rng, [4, 6, 5], 3, torch.float32, device)
    with torch.no_grad():
        inputs[0][5] = math.nan
    colour, opacity, depth, _ = composite(*inputs)
    assert colour[1].isnan().all() and opacity[1].isnan() and depth[1].isnan()
    assert all(x[[0, 2]].isfinite().all() for x in (colour, opacity, depth))
    (grad,) = torch.autograd.grad(colour.sum(), inputs[0])
    assert grad[4:10].isnan().all() and grad[:4].isfinite().all() and grad[10:].isfinite().all()


def test_thread_count_does_not_matter(rng):
    inputs = samples(rng, ragged(rng, 700), 3, torch.float32, gap=1)

    def run():
        out = composite(*inputs, 1e-3)
        loss = sum(x.square().sum() for x in out)
        return *out, *torch.autograd.grad(loss, inputs[:4])

    check_threads(run)


def test_registration(rng):
    device = torch.device("cpu")
    inputs = samples(rng, [4, 0, 5], 3, torch.float32, device, gap=1)
    check_registration("composite", composite, *inputs, 0.01)
    fixed = [x.detach() if i in (2, 3) else x for i, x in enumerate(inputs)]
    check_registration("composite", composite, *fixed, 0.01)


def test_compiled_backward(device, rng):
    """With some outputs unused, whose gradients then do not exist."""
    inputs = samples(rng, [4, 0, 5], 3, torch.float32, device)
    compiled = torch.compile(composite, fullgraph=True, backend="aot_eager")
    want, got = (
        torch.autograd.grad(f(*inputs)[0].sum(), inputs[:2]) for f in (composite, compiled)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "index, value, error, message",
    [
        (0, torch.zeros(9, 1), ValueError, r"`sigma`: .* \(S,\), got float32 \(9, 1\)"),
        (0, torch.zeros(9).half(), TypeError, "`sigma`: expected float32 or float64"),
        (1, torch.zeros(8, 3), ValueError, r"`rgb`: .* \(9, C\), got float32 \(8, 3\)"),
        (1, torch.zeros(9, 0), ValueError, "`rgb`: expected 1 to 8 channels, got 0"),
        (1, torch.zeros(9, 9), ValueError, "`rgb`: expected 1 to 8 channels, got 9"),
        (2, torch.zeros(9).double(), TypeError, "`t`: expected float32"),
        (3, torch.zeros(18)[::2], ValueError, r"`dt`: .* pass dt.contiguous\(\)"),
        (4, torch.zeros(2, 2), TypeError, "`packed`: expected int32"),
        (4, torch.zeros(2, 3).int(), ValueError, r"`packed`: .* \(R, 2\), got int32 \(2, 3\)"),
        (5, 1.5, ValueError, "`early_stop`: expected 0 to 1, got 1.5"),
    ],
)
def test_bad_input(index, value, error, message, rng):
    arguments = [x.detach() for x in samples(rng, [4, 5], 3, torch.float32)] + [0.0]
    arguments[index] = value
    with pytest.raises(error, match=message):
        composite(*arguments)
