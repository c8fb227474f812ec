import math

import pytest
import torch
from conftest import check_op, check_threads

from dreamfusion_fast.ops import _backend, radiance, reference

OP = ("radiance", radiance, reference.radiance)
BLOBS = [dict(blob="gaussian", blob_density=5.0, blob_size=0.2),
         dict(blob="cone", blob_density=10.0, blob_size=0.5)]  # fmt: skip


def make(rng, n, channels=3, dtype=torch.float64, device="cpu"):
    """Outputs of size 1, positions about the blob, a gradient."""
    sizes = (1 + channels, 1.0), (3, 0.3), (3, 3.0)
    tensors = [s * torch.randn(n, c, dtype=torch.float64, generator=rng) for c, s in sizes]
    out, positions, of_x = (t.to(device, dtype) for t in tensors)
    return out.requires_grad_(), positions, of_x.requires_grad_()


@pytest.mark.parametrize("blob", BLOBS, ids=["gaussian", "cone"])
@pytest.mark.parametrize("channels, raw", [(1, False), (3, False), (12, True)])
def test_twin(device, dtype, blob, channels, raw, rng):
    out, positions, of_x = make(rng, 1543, channels, dtype, device)
    options = dict(bias=-2.0, ceiling=3.0, raw=raw, scale=0.7) | blob
    check_op(*OP, out, positions, **options)
    check_op("radiance", with_gradient, with_gradient_twin, out, positions, of_x, options=options)


def with_gradient(out, positions, of_x, options):
    return radiance(out, positions, of_x=of_x, **options)


def with_gradient_twin(out, positions, of_x, options):
    return reference.radiance(out, positions, of_x=of_x, **options)


@pytest.mark.parametrize("blob", BLOBS, ids=["gaussian", "cone"])
def test_gradcheck(device, blob, rng):
    out, positions, of_x = make(rng, 6, device=device)

    def function(out, of_x):
        return radiance(out, positions, -2.0, 3.0, of_x=of_x, scale=0.7, **blob)

    assert torch.autograd.gradcheck(function, (out, of_x))


@pytest.mark.parametrize("n, valid", [(0, None), (1, 1), (64, 0), (65, 64), (4097, 4096), (7, 9)])
def test_edge_sizes(device, dtype, n, valid, rng):
    out, positions, of_x = make(rng, n, dtype=dtype, device=device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    options = dict(count=count) | BLOBS[0]
    check_op("radiance", with_gradient, with_gradient_twin, out, positions, of_x, options=options)


def test_the_blob_s_gradient_is_its_own(device, rng):
    _, positions, _ = make(rng, 50, device=device)
    positions[0] = 0
    still = torch.zeros(50, 4, device=device, dtype=torch.float64)
    for blob in BLOBS:
        got = radiance(still, positions, ceiling=80.0, of_x=positions * 0, **blob)[2]
        x = positions.clone().requires_grad_()
        if blob["blob"] == "gaussian":
            value = blob["blob_density"] * (-x.square().sum(-1) / (2 * 0.2**2)).exp()
        else:
            value = blob["blob_density"] * (1 - x.norm(dim=-1) / 0.5)
        (want,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_large_values(device, dtype):
    """Where exp overflows or vanishes, and where the ceiling cuts."""
    z = torch.tensor([-1e4, -100.0, -80.0, -0.0, 7.9, 8.1, 100.0, 1e4], dtype=dtype, device=device)
    out = torch.stack((z, z, -z, z), 1).requires_grad_()
    check_op(*OP, out, torch.zeros(8, 3, dtype=dtype, device=device))


def test_nan_is_propagated(device, dtype, rng):
    out, positions, _ = make(rng, 70, dtype=dtype, device=device)
    with torch.no_grad():
        out[2, 0] = out[3, 2] = math.nan
    sigma, values, _ = radiance(out, positions, **BLOBS[0])
    assert sigma[2].isnan() and values[3, 1].isnan()
    assert sigma.isnan().sum() == 1 and values.isnan().sum() == 1


def test_half(device, rng):
    out, positions, of_x = make(rng, 300, dtype=torch.float32, device=device)
    half = out.detach().half().requires_grad_()
    if not _backend.kernels(out).has_half:
        with pytest.raises(ValueError, match="`out`: expected float32 or float64 on cpu, got half"):
            radiance(half, positions)
        return
    got = radiance(half, positions, of_x=of_x, **BLOBS[0])
    rounded = half.detach().float().requires_grad_()
    want = reference.radiance(rounded, positions, of_x=of_x, **BLOBS[0])
    cotangents = [torch.randn_like(x) for x in want]
    grads = [torch.autograd.grad(x, y, cotangents) for x, y in ((got, half), (want, rounded))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0][0], grads[1][0].half(), rtol=1e-3, atol=1e-3)


def test_thread_count_does_not_matter(rng):
    out, positions, of_x = make(rng, 9001, dtype=torch.float32)

    def everything():
        made = radiance(out, positions, of_x=of_x, **BLOBS[0])
        total = sum(x.square().sum() for x in made)
        return *made, *torch.autograd.grad(total, (out, of_x))

    check_threads(everything)


def test_registration(rng):
    device = torch.device("cpu")
    out, positions, of_x = make(rng, 9, dtype=torch.float32, device=device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    inputs = out, positions, of_x, -2.0, 3.0, False, 5.0, 0.2, False, 1.0, count
    torch.library.opcheck(torch.ops.dreamfusion_fast.radiance.default, inputs)

    def function(out, positions, of_x):
        return radiance(out, positions, of_x=of_x, **BLOBS[1])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs[:3]), function(*inputs[:3]), strict=True):
        torch.testing.assert_close(a, b)


OUT, POSITIONS = torch.zeros(4, 4), torch.zeros(4, 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((OUT.int(), POSITIONS), TypeError, "`out`: expected float32 or .* got int32"),
        ((OUT[:, :1].contiguous(), POSITIONS), ValueError, "`out`: expected 2 columns or more"),
        ((OUT, POSITIONS[:3]), ValueError, r"`positions`: .* \(4, 3\), got float32 \(3, 3\)"),
        ((OUT, POSITIONS, 0.0, 90.0), ValueError, "`ceiling`: expected -80 to 80, got 90"),
        ((OUT, POSITIONS, 0.0, 8.0, "cube"), ValueError, '`blob`: .* got "cube"'),
        ((OUT, POSITIONS, 0.0, 8.0, "cone", 1.0, 0.0), ValueError, "`blob_size`: expected 1e-06"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        radiance(*arguments)
