"""The paper's own field: values, gradients of the density, and their derivatives."""

import math

import pytest
import torch

from dreamfusion_fast.config import FieldConfig
from dreamfusion_fast.field import LOG_DENSITY_MAX, Field, make_field
from dreamfusion_fast.field_paper import PaperField, blob

TINY = dict(name="paper", n_frequencies=3, width=8, blocks=2)


def field(device, dtype=torch.float64, **settings) -> PaperField:
    """As after training: nothing is zero, all frequencies are seen."""
    rng = torch.Generator().manual_seed(0)
    f = make_field(FieldConfig(**{**TINY, **settings}), rng)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    f.set_progress(torch.tensor([1.0]))
    return f.to(device, dtype)


def points(rng, device, n=20, dtype=torch.float64):
    return (torch.rand(n, 3, generator=rng, dtype=torch.float64) - 0.5).to(device, dtype)


@pytest.mark.parametrize("kind", ["gaussian", "magic3d"])
def test_untrained_scene_is_the_blob(device, kind, rng):
    config = FieldConfig(name="paper", blob=kind)
    f, x = make_field(config, rng).to(device), points(rng, device, dtype=torch.float32)
    sigma, albedo, gradient = f(x, normals=True)
    log_density = (blob(x, config) + config.density_bias).clamp(max=LOG_DENSITY_MAX)
    torch.testing.assert_close(sigma.log(), log_density, rtol=1e-5, atol=1e-5)
    assert torch.equal(albedo, torch.full_like(albedo, 0.5))
    inward = (gradient * x).sum(-1) / gradient.norm(dim=-1) / x.norm(dim=-1)
    torch.testing.assert_close(inward, torch.full_like(inward, -1.0))


def test_is_as_large_as_the_paper_s(rng):
    f = make_field(FieldConfig(name="paper"), rng)
    layers = [m for m in f.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in layers] == [48] + 11 * [128]
    assert [m.out_features for m in layers] == 11 * [128] + [4]
    assert sum(isinstance(m, torch.nn.LayerNorm) for m in f.modules()) == 4


def test_blobs_by_hand(device):
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.4], [0.0, 0.0, 0.25]], device=device)
    want = [5.0, 5.0 * math.exp(-0.25 / 0.08), 5.0 * math.exp(-0.0625 / 0.08)]
    torch.testing.assert_close(blob(x, FieldConfig()), torch.tensor(want, device=device))
    got = blob(x, FieldConfig(blob="magic3d"))
    torch.testing.assert_close(
        got, torch.tensor([10.0, 0.0, 5.0], device=device), atol=1e-4, rtol=0
    )


def test_blob_has_derivatives_at_the_centre(device):
    for kind in ("gaussian", "magic3d"):
        x = torch.zeros(1, 3, device=device, requires_grad=True)
        value = blob(x, FieldConfig(blob=kind)).sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        assert torch.equal(gradient, torch.zeros_like(x))
        assert torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()


def test_density_has_a_ceiling_its_gradient_has_not(device, rng):
    low, high = field(device), field(device, density_bias=50.0)
    x = points(rng, device)
    sigma, _, gradient = high(x, normals=True)
    torch.testing.assert_close(sigma, torch.full_like(sigma, math.exp(LOG_DENSITY_MAX)))
    torch.testing.assert_close(gradient, low(x, normals=True)[2])


@pytest.mark.parametrize("kind", ["gaussian", "magic3d"])
def test_gradient_is_the_finite_difference(device, kind, rng):
    f, x, eps = field(device, blob=kind), points(rng, device), 1e-5
    want = [
        (f(x + step)[0].log() - f(x - step)[0].log()) / (2 * eps)
        for step in eps * torch.eye(3, dtype=x.dtype, device=device)
    ]
    _, _, gradient = f(x, normals=True)
    torch.testing.assert_close(gradient, torch.stack(want, -1), rtol=1e-6, atol=1e-6)


def test_float32_is_float64_but_for_its_digits(device, rng):
    x = points(rng, device)
    exact = field(device)(x, normals=True)
    for a, b in zip(field(device, torch.float32)(x.float(), normals=True), exact, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize("name", ["stem.weight", "blocks.1.first.bias", "norms.1.weight"])
def test_gradcheck(device, name, rng):
    """Of all results by parameters of each kind: the gradient's are of second order."""
    f, x = field(device), points(rng, device, 2)

    def results(parameter):
        return torch.func.functional_call(f, {name: parameter}, (x,), {"normals": True})

    assert torch.autograd.gradcheck(results, f.get_parameter(name))


def test_gradcheck_of_positions(device, rng):
    f, x = field(device), points(rng, device, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: f(x, normals=True), x)


def test_a_loss_on_the_gradient_reaches_every_parameter(device, rng):
    """But those of colour, and the constants behind the last nonlinearity."""
    f = field(device)
    f(points(rng, device), normals=True)[2].square().sum().backward()
    without = {n for n, p in f.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"head.bias", "blocks.1.second.bias"} and not f.head.weight.grad[1:].any()


def test_without_autograd_the_same_detached(device, rng):
    f, x = field(device), points(rng, device)
    want = f(x, normals=True)
    with torch.no_grad():
        got = f(x, normals=True)
    assert all(w.requires_grad and not g.requires_grad for g, w in zip(got, want, strict=True))
    torch.testing.assert_close(got, tuple(w.detach() for w in want))
    assert not x.requires_grad and f(x)[2] is None


def test_rows_past_count_are_nothing_s(device, rng):
    f, x = field(device), points(rng, device)
    count = torch.tensor([7], dtype=torch.int32, device=device)
    for some, whole in zip(f(x, count, normals=True), f(x, normals=True), strict=True):
        torch.testing.assert_close(some[:7], whole[:7])
        assert some.isfinite().all()


def test_latents(device, rng):
    f, x = field(device, channels=4), points(rng, device)
    f.to_rgb.normal_()
    f.rgb_bias.fill_(0.5)
    latents = f(x, latent=True)[1]
    assert latents.shape == (20, 4) and latents.is_contiguous()
    want = (latents @ f.to_rgb.T + f.rgb_bias).clamp(0.0, 1.0)
    torch.testing.assert_close(f(x)[1], want)


def test_spread_is_annealed_in_place(device, rng):
    f, x = field(device, spread=(0.5, 0.1)), points(rng, device)
    place = f.spread.data_ptr()
    for share, want in [(0.0, 0.5), (1 / 6, 0.3), (1 / 3, 0.1), (1.0, 0.1)]:
        f.set_progress(torch.tensor([share]))
        assert f.spread.item() == pytest.approx(want)
    assert f.spread.data_ptr() == place and "spread" in f.state_dict()
    sharp = f(x)[1]
    f.set_progress(torch.tensor([0.0]))
    assert not torch.allclose(f(x)[1], sharp)
    f.spread.fill_(50.0)  # no frequency is left: albedo is the same everywhere
    wide = f(x)[1]
    torch.testing.assert_close(wide, wide[:1].expand_as(wide))
    assert not torch.allclose(sharp, sharp[:1].expand_as(sharp))


def test_random_numbers_are_the_generator_s(rng):
    state = torch.get_rng_state()
    a, b, c = (make_field(FieldConfig(**TINY), torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.stem.weight, b.stem.weight)
    assert not torch.equal(a.stem.weight, c.stem.weight)
    assert all(p.isfinite().all() for p in a.parameters())


def test_make_field(rng):
    assert type(make_field(FieldConfig(), rng)) is Field
    f = make_field(FieldConfig(**TINY), rng)
    assert type(f) is PaperField and f.half_copies() == {} and f.refresh_half() is None
    with pytest.raises(ValueError, match=r"`field\.name`: expected hash or paper, got 'mip'"):
        make_field(FieldConfig(name="mip"), rng)
    with pytest.raises(ValueError, match="`half`: expected false with the paper's field"):
        make_field(FieldConfig(**TINY, half=True), rng)
    with pytest.raises(ValueError, match="`blob`: expected gaussian or magic3d, got 'cube'"):
        make_field(FieldConfig(**TINY, blob="cube"), rng)(torch.zeros(1, 3))
