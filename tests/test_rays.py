import math

import pytest
import torch
from conftest import check_op, check_registration, check_threads

from dreamfusion_fast.ops import generate_rays, ray_box_intersect, ray_sphere_intersect, reference

RAYS = ("generate_rays", generate_rays, reference.generate_rays)
SPHERE = ("ray_sphere_intersect", ray_sphere_intersect, reference.ray_sphere_intersect)
BOX = ("ray_box_intersect", ray_box_intersect, reference.ray_box_intersect)
INTERSECT = pytest.mark.parametrize("op", [SPHERE, BOX], ids=["sphere", "box"])


def cameras(rng, b, dtype=torch.float64, device="cpu"):
    c2w = torch.randn(b, 3, 4, dtype=torch.float64, generator=rng)
    focal = 20 + 20 * torch.rand(b, dtype=torch.float64, generator=rng)
    return [x.to(device, dtype).requires_grad_() for x in (c2w, focal)]


def rays(rng, *shape, dtype=torch.float64, device="cpu"):
    """Origins in and around [-1, 1]³, directions of lengths around 1."""
    o, d = torch.randn(2, *shape, 3, dtype=torch.float64, generator=rng)
    return [x.to(device, dtype).requires_grad_() for x in (1.2 * o, d)]


# ---- generate_rays ------------------------------------------------------------------------------
@pytest.mark.parametrize("b, height, width", [(1, 64, 64), (3, 17, 31), (2, 1, 1), (0, 4, 4)])
def test_generate_twin(device, dtype, b, height, width, rng):
    check_op(*RAYS, *cameras(rng, b, dtype, device), height, width)


def test_generate_directions(device):
    """The middle of an image looks along -back; columns go right, rows go down."""
    c2w = torch.eye(4, device=device)[None, :3].contiguous()
    c2w[0, :, 3] = torch.tensor([1.0, 2.0, 3.0])
    o, d = generate_rays(c2w, torch.full((1,), 1.5, device=device), 3, 3)
    assert (o == c2w[0, :, 3]).all() and o.is_contiguous()
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(1, 3, 3, device=device))
    assert d[0, 1, 1].tolist() == [0, 0, -1]
    assert d[0, 1, 2, 0] > 0 and d[0, 0, 1, 1] > 0


def test_generate_gradcheck(device, rng):
    inputs = cameras(rng, 2, device=device)
    assert torch.autograd.gradcheck(lambda *x: generate_rays(*x, 3, 5), inputs)


def test_generate_gradient_of_one_result(device, rng):
    c2w, focal = cameras(rng, 2, device=device)
    (grad,) = torch.autograd.grad(generate_rays(c2w, focal, 3, 5)[0].sum(), c2w)
    assert torch.equal(grad[..., 3], torch.full_like(grad[..., 3], 15))


# ---- intersections ------------------------------------------------------------------------------
@INTERSECT
@pytest.mark.parametrize("min_distance", [0.0, 0.4])
def test_intersect_twin(op, device, dtype, min_distance, rng):
    o, d = rays(rng, 1543, dtype=dtype, device=device)
    near, far = op[1](o, d, 1.0, min_distance)
    assert (near[far > 0] >= min_distance).all() and (far >= near).all()
    assert 100 < (far > 0).sum() < 1500
    check_op(*op, o, d, 1.0, min_distance)


@INTERSECT
def test_intersect_points_lie_on_the_surface(op, device, rng):
    o, d = rays(rng, 1000, device=device)
    near, far = op[1](o, d, 0.9)
    size = (lambda p: p.norm(dim=-1)) if op is SPHERE else (lambda p: p.abs().amax(-1))
    for t, hit in ((near, near > 0), (far, far > 0)):
        points = (o + t[:, None] * d)[hit]
        torch.testing.assert_close(size(points), torch.full_like(t[hit], 0.9))


@INTERSECT
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (1024,), (1025,), (2, 3, 5)])
def test_intersect_edge_sizes(op, device, dtype, shape, rng):
    o, d = rays(rng, *shape, dtype=dtype, device=device)
    near, far = op[1](o, d, 1.0)
    assert near.shape == far.shape == shape
    check_op(*op, o, d, 1.0)


@INTERSECT
def test_intersect_gradcheck(op, device, rng):
    o, d = rays(rng, 40, device=device)
    near, far = op[1](o, d, 1.0)  # differences need room: off the edges, and off the clamp
    clear = (o.abs() - 1).abs().amin(-1) > 0.01
    clear &= ((far - near) > 0.1) | (far == 0)
    clear &= torch.stack([op[1](o, d, s)[1] == 0 for s in (0.98, 1.02)]).sum(0) != 1
    inputs = [x.detach()[clear].requires_grad_() for x in (o, d)]
    assert len(inputs[0]) > 5
    for min_distance in (0.0, 0.3):
        assert torch.autograd.gradcheck(lambda *x: op[1](*x, 1.0, min_distance), inputs)  # noqa: B023


@INTERSECT
def test_intersect_known(op, device, dtype):
    inf, nan = math.inf, math.nan
    cases = [  # origin, direction, near, far of the unit sphere and cube, from distance 0.25 on
        ((-3, 0, 0), (1, 0, 0), 2, 4),
        ((-3, 0, 0), (2, 0, 0), 1, 2),
        ((0, 0, 0), (0, -1, 0), 0.25, 1),
        ((0, 0, 3), (0, 0, 1), 0, 0),
        ((0, 2, 3), (0, 0, -1), 0, 0),
        ((0, 0, 0.9), (0, 0, 1), 0, 0),  # ends before 0.25
        ((0, 0, 0.5), (-0.0, 0.0, 1), 0.25, 0.5),
        ((nan, 0, 0), (1, 0, 0), nan, nan),
        ((0, 0, 0), (0, nan, 1), nan, nan),
        ((0, inf, 0), (0, 1, 0), nan, nan),
        ((0, 0, 0), (0, 0, 0), nan, nan),
    ]
    o, d, near, far = (torch.tensor(x, device=device, dtype=dtype) for x in zip(*cases))
    for function in op[1:]:
        got = torch.stack(function(o, d, 1.0, 0.25))
        torch.testing.assert_close(got, torch.stack((near, far)), equal_nan=True)


def test_sphere_far_away(device):
    """The closest point keeps its digits where the quadratic formula would lose them."""
    o = torch.tensor([[-3000.0, 0.6, 0.0]], device=device)
    near, far = ray_sphere_intersect(o, torch.tensor([[1.0, 0, 0]], device=device), 1.0)
    assert abs(near.item() - 2999.2) < 1e-3 and abs(far.item() - 3000.8) < 1e-3


# ---- all ----------------------------------------------------------------------------------------
def test_thread_count_does_not_matter(rng):
    c2w, focal = cameras(rng, 2, torch.float32)
    weight = torch.randn(2, 33, 21, 3, generator=rng)
    check_threads(
        lambda: torch.autograd.grad((generate_rays(c2w, focal, 33, 21)[1] * weight).sum(), c2w)
    )
    o, d = rays(rng, 5000, dtype=torch.float32)
    check_threads(lambda: torch.autograd.grad(ray_box_intersect(o, d, 1.0)[1].sum(), (o, d)))


def test_registration(rng):
    device = torch.device("cpu")
    inputs = cameras(rng, 2, torch.float32, device)
    check_registration("generate_rays", generate_rays, *inputs, 3, 5)
    inputs = rays(rng, 9, dtype=torch.float32, device=device)
    check_registration("ray_sphere_intersect", ray_sphere_intersect, *inputs, 1.0, 0.1)
    check_registration("ray_box_intersect", ray_box_intersect, *inputs, 1.0, 0.1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"c2w": torch.zeros(2, 4, 4)}, ValueError, r"`c2w`: .* \(B, 3, 4\), got float32 \(2, 4,"),
        ({"focal": torch.ones(3)}, ValueError, r"`focal`: .* \(2,\), got float32 \(3,\)"),
        ({"focal": torch.ones(2).double()}, TypeError, "`focal`: expected float32 tensor"),
        ({"height": 0}, ValueError, "`height`: expected 1 to 65536, got 0"),
        ({"width": 70000}, ValueError, "`width`: expected 1 to 65536, got 70000"),
    ],
)
def test_generate_bad_input(change, error, message):
    arguments = {"c2w": torch.zeros(2, 3, 4), "focal": torch.ones(2), "height": 4, "width": 4}
    with pytest.raises(error, match=message):
        generate_rays(**{**arguments, **change})


@INTERSECT
@pytest.mark.parametrize(
    "index, value, error, message",
    [
        (0, torch.zeros(5, 2), ValueError, r"`rays_o`: .* \(..., 3\), got float32 \(5, 2\)"),
        (0, torch.zeros(5, 3).half(), TypeError, "`rays_o`: expected float32 or float64"),
        (1, torch.zeros(4, 3), ValueError, r"`rays_d`: .* \(5, 3\), got float32 \(4, 3\)"),
        (1, torch.zeros(3, 5).T, ValueError, r"`rays_d`: .* pass rays_d.contiguous\(\)"),
        (2, 0.0, ValueError, "(`radius`|`bound`): expected 1e-18 to 1e"),
        (2, math.nan, ValueError, "(`radius`|`bound`): .* got nan"),
        (3, -1.0, ValueError, "`min_distance`: expected 0 to"),
    ],
)
def test_intersect_bad_input(op, index, value, error, message):
    arguments = [torch.zeros(5, 3), torch.ones(5, 3), 1.0, 0.0]
    arguments[index] = value
    with pytest.raises(error, match=message):
        op[1](*arguments)
