"""The field: densities and colours, and what float16 leaves of them."""

import math

import pytest
import torch
from test_train import Orange, tiny

from dreamfusion_fast.config import FieldConfig
from dreamfusion_fast.field import LOG_DENSITY_MAX, Field
from dreamfusion_fast.ops import Adam, has_half
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
    sigma, albedo = f(torch.tensor([[0.0, 0.0, 0.0], [0.7, 0.0, 0.0]], device=device))
    c = f.config
    want = [c.blob_density + c.density_bias, c.density_bias]
    torch.testing.assert_close(sigma.log(), torch.tensor(want, device=device), rtol=0.01, atol=0.02)
    torch.testing.assert_close(albedo, torch.full_like(albedo, 0.5), rtol=0.01, atol=0.01)


def test_density_has_a_ceiling(device):
    f = field(device, density_bias=50.0)
    sigma, _ = f(torch.zeros(1, 3, device=device))
    assert sigma.item() == pytest.approx(math.exp(LOG_DENSITY_MAX), rel=1e-5)


def test_rows_past_count_are_nothing_s(device, rng):
    f, x = field(device), points(rng, device)
    count = torch.tensor([7], dtype=torch.int32, device=device)
    sigma, albedo = f(x, count)
    whole = f(x)
    assert torch.equal(sigma[:7], whole[0][:7]) and torch.equal(albedo[:7], whole[1][:7])


@pytest.mark.parametrize("channels", [3, 4, 12])
def test_half_is_float32_but_for_its_digits(device, channels, rng):
    """Values and gradients; where there is no float16, float32 is used, to the bit."""
    plain, half = field(device, channels=channels), field(device, channels=channels, half=True)
    x = points(rng, device)
    results = []
    for f in (plain, half):
        sigma, values = f(x, latent=True)
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
    sigma, albedo = f(points(rng, device))
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
