"""`render` against the ops it is made of, one after the other, all samples at once."""

import pytest
import torch
from conftest import assert_close
from test_march import CPU, scene

from dreamfusion_fast.ops import (
    Grid,
    Rays,
    composite_samples,
    march,
    radiance,
    render,
    visible_samples,
)

STEP, EARLY_STOP = 0.05, 0.02


class Fog:
    """A field of a few parameters, dense enough for rays to stop early; C channels."""

    def __init__(self, rng, dtype, device, channels=3):
        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=rng).to(device, dtype)

        self.density, self.colour = draw(3, 4), draw(3, channels)
        self.parameters = [self.density.requires_grad_(), self.colour.requires_grad_()]
        self.offset, self.rows = 1.5, []

    def __call__(self, x, count):
        self.rows.append(len(x))
        waves = torch.sin(2.0 * x @ self.density)
        log_density = self.offset + 1.2 * waves.sum(1)
        valid = (torch.arange(len(x), device=x.device) < count).to(x.dtype)
        gradient = 2.4 * torch.cos(2.0 * x @ self.density) @ self.density.T
        return log_density.exp() * valid, torch.sigmoid(x @ self.colour), gradient


def rays_and_grid(rng, n, dtype, device):
    o, d, near, far, bits, g, bound = scene(rng, n, 16, dtype, device, filled=0.6)
    d = torch.nn.functional.normalize(d, dim=-1)
    far = near + (far - near).clamp(-1.0, 3.0)
    return Rays(o, d, near, far), Grid(bits, g, bound, STEP)


def shading_of(views, dtype, device):
    rows = [[1.0, 2.0, 0.5, 0.1, 0.9, k % 2, 1 - k % 2] for k in range(views)]
    return torch.tensor(rows, dtype=dtype, device=device)


def unfused(query, rays, grid, seed, jitter=True, shading=None):
    samples = march(*rays, *grid, 1 << 15, seed, jitter)
    colour, opacity, depth, _, *light = composite_samples(query, samples, rays, EARLY_STOP, shading)
    return colour, opacity, depth, *light


def compare(query, parameters, rays, grid, rows, seed=5, jitter=True, shading=None):
    got = render(
        query, parameters, rays, grid, seed, jitter, EARLY_STOP, shading, rows
    )  # fmt: skip
    want = unfused(query, rays, grid, seed, jitter, shading)
    assert got.count.item() == march(*rays, *grid, 1, seed, jitter).count.item()
    mine = [x for x in got if x is not None and x.is_floating_point()]
    cotangents = [torch.randn_like(x) for x in want]
    for a, b in zip(mine, want, strict=True):
        assert_close("render", a, b)
    for a, b in zip(
        torch.autograd.grad(mine, parameters, cotangents),
        torch.autograd.grad(want, parameters, cotangents),
        strict=True,
    ):
        assert_close("render", a, b)
    return got


@pytest.mark.parametrize("rows", [1, 500, 1 << 20])
@pytest.mark.parametrize("lit", [False, True])
def test_same_as_its_parts(device, dtype, rows, lit, rng):
    rays, grid = rays_and_grid(rng, 66, dtype, device)
    query = Fog(rng, dtype, device)
    compare(
        query,
        query.parameters,
        rays,
        grid,
        rows,
        shading=shading_of(3, dtype, device) if lit else None,
    )


@pytest.mark.parametrize("n", [0, 1, 7])
def test_edge_sizes(device, dtype, n, rng):
    rays, grid = rays_and_grid(rng, n, dtype, device)
    query = Fog(rng, dtype, device, channels=11)
    compare(query, query.parameters, rays, grid, 100, jitter=False)


def test_rays_without_samples(device, rng):
    rays, grid = rays_and_grid(rng, 9, torch.float32, device)
    rays = rays._replace(far=rays.near - 1.0)
    query = Fog(rng, torch.float32, device)
    got = compare(query, query.parameters, rays, grid, 100)
    assert not got.count.any() and not got.opacity.any()


def test_backward_leaves_out_what_the_early_stop_hides(rng):
    rays, grid = rays_and_grid(rng, 300, torch.float32, CPU)
    query = Fog(rng, torch.float32, CPU)
    query.offset = 4.0
    out = render(query, query.parameters, rays, grid, 1, True, EARLY_STOP, rows=600)
    forward = query.rows
    query.rows = []
    out.colour.sum().backward()
    kept, again = forward[: -len(query.rows)], forward[-len(query.rows) :]
    assert max(forward) <= 600 and sum(kept) <= 600 < sum(kept) + again[0]
    assert 1 < len(again) == len(query.rows) and sum(query.rows) < 0.8 * sum(again)


def test_nothing_is_kept_without_gradients(rng):
    rays, grid = rays_and_grid(rng, 40, torch.float32, CPU)
    query = Fog(rng, torch.float32, CPU)
    modes = []

    def watched(x, count):
        modes.append(torch.is_grad_enabled())
        return query(x, count)

    with torch.no_grad():
        render(watched, query.parameters, rays, grid, 1)
    for p in query.parameters:
        p.requires_grad_(False)
    render(watched, query.parameters, rays, grid, 1)
    assert modes and not any(modes)


def test_backward_twice(rng):
    """The second time nothing is kept any more."""
    rays, grid = rays_and_grid(rng, 60, torch.float32, CPU)
    query = Fog(rng, torch.float32, CPU)
    out = render(query, query.parameters, rays, grid, 1, True, EARLY_STOP)
    first = torch.autograd.grad(out.colour.sum(), query.parameters, retain_graph=True)
    n = len(query.rows)
    second = torch.autograd.grad(out.colour.sum(), query.parameters)
    assert len(query.rows) == 2 * n
    for a, b in zip(first, second, strict=True):
        assert_close("render", a, b)


def test_visible_samples(device, rng):
    """By hand: a loop over rays whose rows follow no order."""
    packed = torch.tensor([[5, 4], [0, 3], [9, 0], [3, 2], [0, 0]], dtype=torch.int32)
    weights = torch.tensor([0.6, 0.39, 0.0, 0.2, 0.0, 0.5, 0.0, 0.495, 0.0])
    opacity = torch.tensor([0.995, 0.99, 0.0, 0.2, 0.0])
    got = visible_samples(weights, opacity, packed, EARLY_STOP)
    assert got.dtype == torch.int32 and got.tolist() == [3, 2, 0, 2, 0]
    assert visible_samples(weights, opacity, packed, 0.0).tolist() == [4, 3, 0, 2, 0]


def test_gradcheck(rng):
    rays, grid = rays_and_grid(rng, 12, torch.float64, CPU)
    query = Fog(rng, torch.float64, CPU)

    def function(density, colour):
        query.density, query.colour = density, colour
        return tuple(render(query, [density, colour], rays, grid, 3, rows=40)[:3])

    assert torch.autograd.gradcheck(function, [p.double() for p in query.parameters])


def test_only_what_is_asked_for(rng):
    rays, grid = rays_and_grid(rng, 20, torch.float32, CPU)
    query = Fog(rng, torch.float32, CPU)
    query.density.requires_grad_(False)
    unused = torch.zeros(3, requires_grad=True)
    out = render(query, [*query.parameters, unused], rays, grid, 3, rows=100)
    out.colour.sum().backward()
    assert query.colour.grad.any() and query.density.grad is None and unused.grad is None


def test_a_parameter_that_was_written_to_is_refused(rng):
    rays, grid = rays_and_grid(rng, 20, torch.float32, CPU)
    query = Fog(rng, torch.float32, CPU)
    out = render(query, query.parameters, rays, grid, 3, rows=100)
    with torch.no_grad():
        query.colour += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.colour.sum().backward()


def test_gradient_descends_twice_is_refused(rng):
    rays, grid = rays_and_grid(rng, 20, torch.float32, CPU)
    query = Fog(rng, torch.float32, CPU)
    out = render(query, query.parameters, rays, grid, 3, rows=100)
    incoming = torch.ones_like(out.colour, requires_grad=True)
    (grad,) = torch.autograd.grad(out.colour, query.colour, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_ops_of_a_field(device, rng):
    """radiance, which makes sigma of a network's rows, as a query."""
    rays, grid = rays_and_grid(rng, 30, torch.float32, device)
    weights = torch.randn(3, 4, generator=rng).to(device).requires_grad_()

    def query(x, count):
        return radiance(x @ weights, x, -1.0, 8.0, "gaussian", 5.0, 0.2, count=count)

    compare(query, [weights], rays, grid, 200)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 0}, "`rows`: expected 1 to 2147483647, got 0"),
        ({"bins": -1}, "`bins`: expected 0 to 1048576, got -1"),
        ({"bins": 1}, "`bins`: too small: .* samples, room for 20"),
        ({"early_stop": 2.0}, "`early_stop`: expected 0 to 1, got 2"),
        ({"shading": torch.zeros(3, 7)}, "`shading`: expected a row a view, .* 20 rays, got 3"),
    ],
)
def test_bad_input(change, message, rng):
    rays, grid = rays_and_grid(rng, 20, torch.float32, CPU)
    # From the middle of a full cube, so that for every seed a ray has 20 samples.
    rays = rays._replace(o=0 * rays.o, near=torch.zeros(20), far=torch.ones(20))
    grid = grid._replace(bitfield=torch.full_like(grid.bitfield, 255))
    query = Fog(rng, torch.float32, CPU)
    with pytest.raises(ValueError, match=message):
        render(query, query.parameters, rays, grid, 3, **change)
