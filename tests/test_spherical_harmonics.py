import math

import pytest
import torch
from conftest import check_op, check_registration, check_threads

from dreamfusion_fast.ops import reference, spherical_harmonics

OP = ("spherical_harmonics", spherical_harmonics, reference.spherical_harmonics)


def unit(rng, n, dtype=torch.float64, device="cpu"):
    v = torch.randn(n, 3, dtype=torch.float64, generator=rng)
    return (v / v.norm(dim=-1, keepdim=True)).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("degree", range(1, 9))
def test_twin(device, dtype, degree, rng):
    dirs = unit(rng, 1543, dtype, device)
    check_op(*OP, dirs, degree)


def test_against_scipy(device, rng):
    """Complex harmonics of scipy, made real with instant-ngp's signs."""
    special = pytest.importorskip(
        "scipy.special", reason="scipy is not installed: pip install scipy"
    )
    dirs = unit(rng, 50)
    x, y, z = dirs.detach().T.numpy()
    theta, phi = torch.tensor(z).acos().numpy(), torch.atan2(*map(torch.tensor, (y, x))).numpy()
    columns = []
    for l in range(8):  # noqa: E741
        for m in range(-l, l + 1):
            value = torch.tensor(special.sph_harm_y(l, abs(m), theta, phi))  # has (-1)^m already
            part = value.real if m >= 0 else value.imag
            columns.append(part * (math.sqrt(2) if m else 1))
    got = spherical_harmonics(dirs.to(device), 8).cpu()
    torch.testing.assert_close(got, torch.stack(columns, -1), rtol=1e-9, atol=1e-9)


def test_first_components_of_instant_ngp(device):
    x, y, z = 0.48, 0.6, 0.64
    want = [0.28209479, -0.48860251 * y, 0.48860251 * z, -0.48860251 * x, 1.09254843 * x * y,
            -1.09254843 * y * z, 0.94617470 * z * z - 0.31539157, -1.09254843 * x * z,
            0.54627422 * (x * x - y * y)]  # fmt: skip
    got = spherical_harmonics(torch.tensor([[x, y, z]], device=device), 3)
    torch.testing.assert_close(got, torch.tensor([want], device=device))


@pytest.mark.parametrize("degree", range(1, 9))
def test_gradcheck(device, degree, rng):
    dirs = (1.1 * unit(rng, 3).detach()).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: spherical_harmonics(d, degree), (dirs,))


@pytest.mark.parametrize("n", [0, 1, 7, 1024, 1025])
@pytest.mark.parametrize("valid", [None, 0, 1, 3, 2000])
def test_edge_sizes(device, dtype, n, valid, rng):
    dirs = unit(rng, n, dtype, device)
    count = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    check_op(*OP, dirs, 4, count)


def test_nan_is_propagated(device, rng):
    dirs = unit(rng, 5, torch.float32, device).detach()
    dirs[2, 1] = math.nan
    out = spherical_harmonics(dirs, 4)
    assert out[2, 1].isnan() and out[[0, 1, 3, 4]].isfinite().all()


def test_thread_count_does_not_matter(rng):
    dirs = unit(rng, 5000, torch.float32)
    check_threads(lambda: torch.autograd.grad(spherical_harmonics(dirs, 5).square().sum(), dirs))


def test_registration(rng):
    device = torch.device("cpu")
    dirs = unit(rng, 9, torch.float32, device)
    count = torch.tensor([4], dtype=torch.int32, device=device)
    check_registration("spherical_harmonics", spherical_harmonics, dirs, 3, None)
    check_registration("spherical_harmonics", spherical_harmonics, dirs, 3, count)


@pytest.mark.parametrize(
    "dirs, degree, count, error, message",
    [
        ([[1.0, 0, 0]], 3, None, TypeError, "`dirs`: .* got list"),
        (torch.zeros(4, 3).int(), 3, None, TypeError, r"`dirs`: .* \(N, 3\), got int32 \(4, 3\)"),
        (torch.zeros(4, 2), 3, None, ValueError, r"`dirs`: .* \(N, 3\), got float32 \(4, 2\)"),
        (torch.zeros(3, 4).T, 3, None, ValueError, r"`dirs`: .* pass dirs.contiguous\(\)"),
        (torch.zeros(4, 3), 0, None, ValueError, "`degree`: expected 1 to 8, got 0"),
        (torch.zeros(4, 3), 9, None, ValueError, "`degree`: expected 1 to 8, got 9"),
        (
            torch.zeros(4, 3),
            3,
            torch.ones(1),
            TypeError,
            r"`count`: expected int32 .* float32 \(1,",
        ),
    ],
)
def test_bad_input(dirs, degree, count, error, message):
    with pytest.raises(error, match=message):
        spherical_harmonics(dirs, degree, count)
