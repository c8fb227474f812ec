import math

import pytest
import torch
from conftest import assert_close, check_op, check_registration, check_threads
from test_composite import ragged, samples

from dreamfusion_fast.ops import composite, composite_lit, reference

OP = ("composite_lit", composite_lit, reference.composite_lit)
COLOUR, OPACITY, DEPTH, WEIGHTS, NORMAL, ORIENTATION = range(6)


def scene(rng, counts, views=1, dtype=torch.float64, device="cpu", gap=0):
    """Inputs of composite_lit, of which the first five want gradients."""
    sigma, albedo, t, dt, packed = samples(rng, counts, 3, dtype, device, gap)
    rays, n = len(packed), len(sigma)
    gradient, rays_o, rays_d, light = (
        torch.randn(size, 3, dtype=torch.float64, generator=rng).to(device, dtype)
        for size in (n, rays, rays, views)
    )
    rows = torch.rand(views, 4, dtype=torch.float64, generator=rng).to(device, dtype)
    gradient = (20 * gradient).requires_grad_()
    rays_d = torch.nn.functional.normalize(rays_d, dim=-1)
    return sigma, albedo, gradient, t, dt, packed, rays_o, rays_d, torch.cat((light, rows), 1)


def with_shading(inputs, row):
    """The scene with the last of the numbers light, ambient, diffuse, texture, base replaced."""
    shading = inputs[-1].clone()
    shading[:, -len(row) :] = shading.new_tensor(row)
    return *inputs[:-1], shading


def one_sample(gradient, row, device, dtype=torch.float64):
    """An opaque sample at (0, 0, 1), seen from the origin along z."""
    make = {"device": device, "dtype": dtype}
    vectors = torch.tensor([gradient, [0.2, 0.4, 0.6], [0.0] * 3, [0.0, 0.0, 1.0]], **make)
    gradient, albedo, rays_o, rays_d = (x[None].contiguous() for x in vectors)
    sigma, one = torch.full((1,), 1e4, **make), torch.ones(1, **make)
    packed = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    inputs = [x.requires_grad_() for x in (sigma, albedo, gradient)]
    return *inputs, one, one, packed, rays_o, rays_d, torch.tensor([row], **make)


@pytest.mark.parametrize("gap", [0, 3])
def test_twin(device, dtype, gap, rng):
    check_op(*OP, *scene(rng, ragged(rng, 33), 3, dtype, device, gap))


def test_early_stop_in_any_order(device, dtype, rng):
    """And rays whose rows follow no order, as the GPU's march leaves them."""
    inputs = list(scene(rng, ragged(rng, 20), 2, dtype, device, 1))
    inputs[5] = inputs[5][torch.randperm(20, generator=rng).to(device)]
    check_op(*OP, *inputs, 0.3)


@pytest.mark.parametrize("counts", [[], [0], [1], [0, 0, 0], [33], [64, 65], [1] * 5])
def test_edge_sizes(device, dtype, counts, rng):
    check_op(*OP, *scene(rng, torch.tensor(counts, dtype=torch.long), 1, dtype, device))


def test_gradcheck(device, rng):
    """Of all but t, whose derivative leaves out the position, and orientation, whose weights are
    constants."""
    inputs = scene(rng, [5, 0, 1, 9], 2, device=device, gap=1)
    (sigma, albedo, gradient, t, dt), rest = inputs[:5], inputs[5:]

    def lit(sigma, albedo, gradient, dt):
        return composite_lit(sigma, albedo, gradient, t.detach(), dt, *rest, 0.05)

    assert torch.autograd.gradcheck(lambda *x: lit(*x)[:5], (sigma, albedo, gradient, dt))
    fixed = sigma.detach(), albedo.detach(), dt.detach()
    assert torch.autograd.gradcheck(lambda g: lit(*fixed[:2], g, fixed[2])[5], gradient)


def test_gradcheck_of_distances(device, rng):
    """Where nothing depends on the position."""
    inputs = with_shading(scene(rng, [4, 2], device=device), [0.7, 0.0, 0.6, 0.3])
    rest = inputs[5:]
    assert torch.autograd.gradcheck(lambda *x: composite_lit(*x, *rest)[:5], inputs[:5])


@pytest.mark.parametrize("output", range(6))
def test_gradient_of_one_output(device, output, rng):
    inputs = scene(rng, [5, 0, 3], device=device)
    want, got = (
        torch.autograd.grad(
            f(*inputs)[output].square().sum(), inputs[:5], allow_unused=True, materialize_grads=True
        )
        for f in (reference.composite_lit, composite_lit)
    )
    torch.testing.assert_close(got, want)


def test_no_gradient_to_rays_and_shading(device, rng):
    inputs = scene(rng, [5, 3], 2, device=device)
    constants = [x.requires_grad_() for x in inputs[6:]]
    out = sum(x.sum() for x in composite_lit(*inputs[:6], *constants))
    assert torch.autograd.grad(out, constants, allow_unused=True) == (None,) * 3


def test_lambert(device):
    """Light from 60 degrees off the normal; c = (k albedo + b) (a + d cos)."""
    light = [math.sin(math.pi / 3), 0.0, 1 - math.cos(math.pi / 3)]
    inputs = one_sample([0.0, 0.0, 50.0], [*light, 0.1, 0.8, 0.7, 0.2], device)
    out = composite_lit(*inputs)
    want = (0.7 * inputs[1].detach() + 0.2) * (0.1 + 0.8 * 0.5)
    torch.testing.assert_close(out[COLOUR].detach(), want, rtol=1e-9, atol=0)
    normal = torch.tensor([[0.0, 0.0, -1.0]], dtype=torch.float64, device=device)
    torch.testing.assert_close(out[NORMAL].detach(), normal, rtol=1e-9, atol=1e-9)
    assert out[ORIENTATION].item() == 0


def test_unlit_from_behind(device):
    """A surface that faces away from light and camera is ambient, and not as it should be."""
    inputs = one_sample([0.0, 0.0, -50.0], [0.0, 0.0, 0.0, 0.1, 0.9, 1.0, 0.0], device)
    out = composite_lit(*inputs)
    torch.testing.assert_close(out[COLOUR], 0.1 * inputs[1], rtol=1e-9, atol=0)
    assert out[ORIENTATION].item() == pytest.approx(1, rel=1e-8)
    sigma, _, gradient = torch.autograd.grad(
        out[ORIENTATION].sum(), inputs[:3], allow_unused=True, materialize_grads=True
    )
    assert sigma.item() == 0 and gradient[0, 2] < 0


def test_ambient_is_composite(device, dtype, rng):
    inputs = with_shading(scene(rng, ragged(rng, 9), 1, dtype, device), [1.0, 0.0, 1.0, 0.0])
    sigma, albedo, _, *rest = inputs[:6]
    want = composite(sigma, albedo, *rest)
    got = composite_lit(*inputs)
    for a, b in zip(got, want):
        assert_close("composite_lit", a, b)


def test_textureless(device, rng):
    inputs = with_shading(scene(rng, [40, 7], device=device), [0.3, 0.6, 0.0, 1.0])
    colour = composite_lit(*inputs)[COLOUR]
    assert torch.equal(colour[:, 0], colour[:, 1]) and torch.equal(colour[:, 0], colour[:, 2])
    other = composite_lit(inputs[0], inputs[1] + 1, *inputs[2:])[COLOUR]
    assert torch.equal(colour, other)
    assert not torch.autograd.grad(colour.sum(), inputs[1])[0].any()


def test_no_gradient_no_normal(device, dtype, rng):
    """g = 0: normal 0, no diffuse light, and derivatives of -1 / EPS instead of infinite ones."""
    inputs = list(scene(rng, [9, 3], 1, dtype, device))
    inputs[2] = torch.zeros_like(inputs[2]).requires_grad_()
    out = composite_lit(*inputs)
    assert not out[NORMAL].any() and not out[ORIENTATION].any()
    check_op(*OP, *inputs)
    (grad,) = torch.autograd.grad(out[NORMAL].sum(), inputs[2], retain_graph=True)
    want = (-1e3 * out[WEIGHTS])[:, None].expand_as(grad)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(out[COLOUR].sum(), inputs[2])[0].any()  # at the kink


def test_light_at_the_sample(device, dtype):
    inputs = one_sample([0.0, 0.0, 50.0], [0.0, 0.0, 1.0, 0.3, 0.9, 1.0, 0.0], device, dtype)
    torch.testing.assert_close(composite_lit(*inputs)[COLOUR], 0.3 * inputs[1])
    check_op(*OP, *inputs)


def test_a_view_has_its_shading(device, rng):
    """Rays 0 and 1 are of view 0, rays 2 and 3 of view 1."""
    *inputs, shading = scene(rng, [3, 4, 5, 6], 2, device=device)
    shading[:, 3:] = shading.new_tensor([[1, 0, 0, 0.25], [1, 0, 0, 0.5]])
    colour, opacity, *_ = composite_lit(*inputs, shading)
    base = shading.new_tensor([0.25, 0.25, 0.5, 0.5])
    torch.testing.assert_close(colour, (base * opacity)[:, None].expand(4, 3))


def test_nan_stays_in_its_ray(device, rng):
    inputs = scene(rng, [4, 6, 5], 1, torch.float32, device)
    with torch.no_grad():
        inputs[0][4:10] = 3.0
        inputs[2][5] = math.nan
    out = composite_lit(*inputs)
    for i in (COLOUR, NORMAL, ORIENTATION):
        assert out[i][1].isnan().all() and out[i][[0, 2]].isfinite().all()
    assert all(out[i].isfinite().all() for i in (OPACITY, DEPTH, WEIGHTS))
    (grad,) = torch.autograd.grad(out[COLOUR].sum(), inputs[2])
    assert grad[5].isnan().all() and grad[torch.arange(15) != 5].isfinite().all()


def test_thread_count_does_not_matter(rng):
    inputs = scene(rng, ragged(rng, 700), 7, torch.float32, gap=1)

    def run():
        out = composite_lit(*inputs, 1e-3)
        loss = sum(x.square().sum() for x in out)
        return *out, *torch.autograd.grad(loss, inputs[:5])

    check_threads(run)


def test_registration(rng):
    device = torch.device("cpu")
    inputs = scene(rng, [4, 0, 5, 1], 2, torch.float32, device, gap=1)
    check_registration("composite_lit", composite_lit, *inputs, 0.01)
    fixed = [x.detach() if i in (3, 4) else x for i, x in enumerate(inputs)]
    check_registration("composite_lit", composite_lit, *fixed, 0.01)


@pytest.mark.parametrize(
    "index, value, error, message",
    [
        (0, torch.zeros(9).half(), TypeError, "`sigma`: expected float32 or float64"),
        (1, torch.zeros(9, 4), ValueError, r"`albedo`: .* \(9, 3\), got float32 \(9, 4\)"),
        (2, torch.zeros(8, 3), ValueError, r"`gradient`: .* \(9, 3\), got float32 \(8, 3\)"),
        (3, torch.zeros(8), ValueError, r"`t`: .* \(9,\), got float32 \(8,\)"),
        (5, torch.zeros(2, 2), TypeError, "`packed`: expected int32"),
        (6, torch.zeros(9, 3), ValueError, r"`rays_o`: .* \(2, 3\), got float32 \(9, 3\)"),
        (7, torch.zeros(3, 2).T, ValueError, r"`rays_d`: .* pass rays_d.contiguous\(\)"),
        (8, torch.zeros(1, 8), ValueError, r"`shading`: .* \(B, 7\), got float32 \(1, 8\)"),
        (8, torch.zeros(0, 7), ValueError, "`shading`: .* divisor of the 2 rays, got 0"),
        (8, torch.zeros(3, 7), ValueError, "`shading`: .* divisor of the 2 rays, got 3"),
        (9, -0.5, ValueError, "`early_stop`: expected 0 to 1, got -0.5"),
    ],
)
def test_bad_input(index, value, error, message, rng):
    arguments = [x.detach() for x in scene(rng, [4, 5], 1, torch.float32)] + [0.0]
    arguments[index] = value
    with pytest.raises(error, match=message):
        composite_lit(*arguments)
