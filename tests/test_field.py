"""The field: densities and colours, and what float16 leaves of them."""

import math

import pytest
import torch
from test_train import Orange, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from dreamfusion_fast.config import FieldConfig
from dreamfusion_fast.field import LOG_DENSITY_MAX, Field
from dreamfusion_fast.field_paper import blob as blob_of
from dreamfusion_fast.ops import Adam, has_half, reference
from dreamfusion_fast.train import Trainer

SMALL = dict(n_levels=3, base_resolution=4, finest_resolution=16, log2_table_size=9, hidden=16)


def field(device, **settings) -> Field:
    """With features of size 1, as after training."""
    f = Field(FieldConfig(**SMALL, **settings), torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        f.table.mul_(1e4)
    f.refresh_half()
    return f


def points(rng, device, n=200):
    return (torch.rand(n, 3, generator=rng) - 0.5).to(device)


def test_density_is_a_blob_in_fog_at_first(device):
    f = Field(FieldConfig(**SMALL), torch.Generator().manual_seed(0)).to(device)
    sigma, albedo, _ = f(torch.tensor([[0.0, 0.0, 0.0], [0.7, 0.0, 0.0]], device=device))
    c = f.config
    want = [c.blob_density + c.density_bias, c.density_bias]
    torch.testing.assert_close(sigma.log(), torch.tensor(want, device=device), rtol=0.01, atol=0.02)
    torch.testing.assert_close(albedo, torch.full_like(albedo, 0.5), rtol=0.01, atol=0.01)


def test_density_has_a_ceiling(device):
    f = field(device, density_bias=50.0)
    sigma, _, _ = f(torch.zeros(1, 3, device=device))
    assert sigma.item() == pytest.approx(math.exp(LOG_DENSITY_MAX), rel=1e-5)


def test_rows_past_count_are_nothing_s(device, rng):
    f, x = field(device), points(rng, device)
    count = torch.tensor([7], dtype=torch.int32, device=device)
    sigma, albedo, _ = f(x, count)
    whole = f(x)
    assert torch.equal(sigma[:7], whole[0][:7]) and torch.equal(albedo[:7], whole[1][:7])


@pytest.mark.parametrize("channels", [3, 4, 12])
def test_half_is_float32_but_for_its_digits(device, channels, rng):
    """Values and gradients; where there is no float16, float32 is used, to the bit."""
    plain, half = field(device, channels=channels), field(device, channels=channels, half=True)
    x = points(rng, device)
    results = []
    for f in (plain, half):
        sigma, values, _ = f(x, latent=True)
        (sigma.log().sum() + values.square().sum()).backward()
        results.append((sigma.log(), values, f.weights.grad, f.table.grad))
    if not has_half(x):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        return
    for a, b in zip(*results, strict=True):  # some roundings to 2^-11, of sums of up to 200
        assert (a - b).abs().max() < 0.02 * a.abs().max()
        assert not torch.equal(a, b)


def test_the_optimizer_keeps_the_copies(device, rng):
    f = field(device, half=True)
    if not has_half(f.table):
        return
    adam = Adam(f.parameters(), lr=0.01, half_copies=f.half_copies())
    sigma, albedo, _ = f(points(rng, device))
    (128.0 * (sigma.log().sum() + albedo.sum())).backward()
    adam.step(grad_scale=128.0)
    for master, copy in f.half_copies().items():
        assert torch.equal(master.detach().half(), copy) and master.grad.any()
    assert adam.skipped() == 0 and "table_half" not in f.state_dict()


def test_a_run_in_half(device, tmp_path):
    """Against one in float32: the same picture of the guidance, within what noise does."""
    config = tiny(steps=6)
    config.field.half = True
    if not has_half(torch.zeros(1, device=device)):
        with pytest.raises(ValueError, match="config `half`: expected false, as the kernels on"):
            Trainer(config, tmp_path, Orange(), device)
        return
    rows = list(Trainer(config, tmp_path / "half", Orange(), device).run())
    plain = list(Trainer(tiny(steps=6), tmp_path / "plain", Orange(), device).run())
    assert rows[-1]["updates_skipped"] == 0
    for a, b in zip(rows, plain, strict=True):
        assert a["sds"] == pytest.approx(b["sds"], rel=0.05)
        assert a["mean_opacity"] == pytest.approx(b["mean_opacity"], rel=0.05)


@pytest.mark.parametrize("blob", ["gaussian", "magic3d"])
@pytest.mark.parametrize("channels", [3, 4])
def test_gradient_of_log_density(device, blob, channels, rng):
    """Against differences of it; without kinks of relu or of linear interpolation."""
    f = field(device, blob=blob, channels=channels, activation="silu", density_bias=-9.0)
    x, h = points(rng, device), 1e-3
    gradient = f(x, normals=True)[2]
    for axis in range(3):
        step = h * torch.eye(3, device=device)[axis]
        high, low = (f((x + sign * step).contiguous())[0].log() for sign in (1, -1))
        error = (gradient[:, axis] - (high - low) / (2 * h)).abs()
        assert error.max() < 0.03 * gradient.abs().max()
        assert error.median() < 1e-3 * gradient.abs().max()


def test_gradient_is_the_same_without_autograd(device, rng):
    f, x = field(device), points(rng, device)
    count = torch.tensor([150], dtype=torch.int32, device=device)
    want = f(x, count, normals=True)[2]
    with torch.no_grad():
        got = f(x, count, normals=True)[2]
    assert torch.equal(got, want) and want.requires_grad and not got.requires_grad
    assert f(x, count)[2] is None


def test_gradient_reaches_all_parameters(device, rng):
    """Autograd's own, of the twin's field in float64, for a loss on the gradient."""
    f, x = field(device), points(rng, device)
    of_loss = torch.randn(x.shape, generator=rng).to(device)
    f(x, normals=True)[2].backward(of_loss)
    table, weights = (p.detach().double().requires_grad_() for p in (f.table, f.weights))
    y = x.double().requires_grad_()
    features = reference.hash_encode(y / 1.5 + 0.5, table, **f.grid, interpolation="smoothstep")
    log_density = reference.mlp(features, weights, f.widths)[:, 0] + blob_of(y, f.config)
    (gradient,) = torch.autograd.grad(log_density.sum(), y, create_graph=True)
    gradient.backward(of_loss.double())
    for got, want in ((f.table.grad, table.grad), (f.weights.grad, weights.grad)):
        assert (got - want.float()).abs().max() < 1e-3 * want.abs().max()


def test_levels_come_in_one_after_another(device, rng):
    f, x = field(device, coarse_levels=1, levels_until=0.5), points(rng, device)
    shares = []
    for share in (0.0, 0.25, 0.5, 1.0):
        f.set_progress(torch.tensor([share], device=device))
        shares.append(f.level_share.view(3, 2)[:, 0].tolist())
    assert shares == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    whole = field(device)
    for a, b in zip(f(x, normals=True), whole(x, normals=True), strict=True):
        assert torch.equal(a, b)


class SecondOrders(TorchDispatchMode):
    """Which derivatives mlp_second was asked for: of grad_out, x, params."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "dreamfusion_fast::mlp_second":
            self.asked.append(args[-3:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_relus_second_order_of_zeros_is_not_made(activation, rng):
    f, x = field("cpu", activation=activation), points(rng, "cpu")
    with SecondOrders() as orders:
        f(x, normals=True)[2].square().sum().backward()
    assert [asked[1] for asked in orders.asked] == [activation == "silu"]
    assert f.weights.grad.abs().max() > 0 and f.table.grad.abs().max() > 0
