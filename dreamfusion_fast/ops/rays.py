"""Camera rays, and where they meet a sphere or a box."""

from __future__ import annotations

import torch

from ._backend import (
    autocast,
    check_range,
    check_tensor,
    kernels,
    ptr,
    register,
    register_backward,
    scalar,
    stream,
)

LARGEST = 1e18  # of a length: its square is still a float32
SMALLEST = 1e-18


@autocast()
def generate_rays(
    c2w: torch.Tensor, focal: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the ray through the centre of every pixel of B pinhole cameras.

    With [R | o] = c2w, the pixel in row i and column j looks from o along
    R ((j + 1/2 - width/2) / focal, -(i + 1/2 - height/2) / focal, -1), normalised.

    Args:
        c2w: (B, 3, 4) float32 or float64, camera to world: columns right, up, back, position.
        focal: (B,) dtype of c2w, focal length in pixels, above 0.
        height: rows of the image, 1 to 65536.
        width: columns of the image, 1 to 65536.
    Returns:
        rays_o (B, height, width, 3), origins; rays_d (B, height, width, 3), unit directions:
        differentiable once with respect to c2w and focal. NaN in, NaN out.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_tensor("c2w", c2w, shape=("B", 3, 4))
    check_tensor("focal", focal, c2w.dtype, (c2w.shape[0],), c2w.device)
    check_range("height", height, 1, 65536)
    check_range("width", width, 1, 65536)
    return torch.ops.dreamfusion_fast.generate_rays(c2w, focal, height, width)


@autocast()
def ray_sphere_intersect(
    rays_o: torch.Tensor, rays_d: torch.Tensor, radius: float, min_distance: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where rays enter and leave the sphere |x| = radius: the roots of |o + t d| = radius.

    Args:
        rays_o: (..., 3) float32 or float64, origins.
        rays_d: (..., 3) like rays_o, directions of any length but 0; t is in units of it.
        radius: of the sphere around the origin, above 0.
        min_distance: near is at least this, and a sphere that ends before it is missed. From 0.
    Returns:
        near (...,), far (...,): differentiable once with respect to rays_o and rays_d. A miss has
        near = far = 0 and no gradient; a clamped near has none. A ray with a NaN or an infinite
        component, or a zero direction, has NaN.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check_rays(rays_o, rays_d, "radius", radius, min_distance)
    return torch.ops.dreamfusion_fast.ray_sphere_intersect(rays_o, rays_d, radius, min_distance)


@autocast()
def ray_box_intersect(
    rays_o: torch.Tensor, rays_d: torch.Tensor, bound: float, min_distance: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where rays enter and leave the cube [-bound, bound]³ (slab method, Kay and Kajiya 1986).

    Args:
        rays_o: (..., 3) float32 or float64, origins.
        rays_d: (..., 3) like rays_o, directions of any length but 0; t is in units of it. Single
            components may be zero.
        bound: half the cube's edge, above 0.
        min_distance: near is at least this, and a cube that ends before it is missed. From 0.
    Returns:
        near (...,), far (...,): differentiable once with respect to rays_o and rays_d. A miss has
        near = far = 0 and no gradient; a clamped near has none. A ray with a NaN or an infinite
        component, or a zero direction, has NaN.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    _check_rays(rays_o, rays_d, "bound", bound, min_distance)
    return torch.ops.dreamfusion_fast.ray_box_intersect(rays_o, rays_d, bound, min_distance)


def _check_rays(rays_o, rays_d, name, size, min_distance):
    check_tensor("rays_o", rays_o, shape=("...", 3))
    check_tensor("rays_d", rays_d, rays_o.dtype, tuple(rays_o.shape), rays_o.device)
    check_range(name, size, SMALLEST, LARGEST)
    check_range("min_distance", min_distance, 0, LARGEST)


# ---- generate_rays ------------------------------------------------------------------------------
def _empty_rays(c2w, focal, height, width):
    shape = (c2w.shape[0], height, width, 3)
    return c2w.new_empty(shape), c2w.new_empty(shape)


def _generate(c2w, focal, height, width):
    rays_o, rays_d = _empty_rays(c2w, focal, height, width)
    kernels(c2w).generate_rays_forward(
        scalar(c2w), ptr(c2w), ptr(focal), ptr(rays_o), ptr(rays_d), *rays_o.shape[:3],
        stream(c2w),
    )  # fmt: skip
    return rays_o, rays_d


def _generate_backward(grad_o, grad_d, c2w, focal):
    b, height, width, _ = grad_o.shape
    partial = c2w.new_empty(b * height, 13)
    grad_c2w, grad_focal = torch.empty_like(c2w), torch.empty_like(focal)
    kernels(c2w).generate_rays_backward(
        scalar(c2w), ptr(c2w), ptr(focal), ptr(grad_o), ptr(grad_d), ptr(partial),
        ptr(grad_c2w), ptr(grad_focal), b, height, width, stream(c2w),
    )  # fmt: skip
    return grad_c2w, grad_focal


def _generate_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _generate_differentiate(ctx, grad_o, grad_d):
    backward = torch.ops.dreamfusion_fast.generate_rays_backward
    return *backward(grad_o.contiguous(), grad_d.contiguous(), *ctx.saved_tensors), None, None


register(
    "generate_rays(Tensor c2w, Tensor focal, SymInt height, SymInt width) -> (Tensor, Tensor)",
    _generate,
    _empty_rays,
)
register(
    "generate_rays_backward(Tensor grad_o, Tensor grad_d, Tensor c2w, Tensor focal)"
    " -> (Tensor, Tensor)",
    _generate_backward,
    lambda grad_o, grad_d, c2w, focal: (torch.empty_like(c2w), torch.empty_like(focal)),
)
register_backward("generate_rays", _generate_differentiate, _generate_save)


# ---- ray_sphere_intersect, ray_box_intersect ----------------------------------------------------
def _empty_hits(rays_o, rays_d, size, min_distance):
    return rays_o.new_empty(rays_o.shape[:-1]), rays_o.new_empty(rays_o.shape[:-1])


def _empty_grads(grad_near, grad_far, rays_o, rays_d, size, min_distance):
    return torch.empty_like(rays_o), torch.empty_like(rays_d)


def _hits(run, rays_o, rays_d, size, min_distance):
    near, far = _empty_hits(rays_o, rays_d, size, min_distance)
    run(
        scalar(rays_o), ptr(rays_o), ptr(rays_d), ptr(near), ptr(far), near.numel(), size,
        min_distance, stream(rays_o),
    )  # fmt: skip
    return near, far


def _hits_backward(run, grad_near, grad_far, rays_o, rays_d, size, min_distance):
    grad_o, grad_d = torch.empty_like(rays_o), torch.empty_like(rays_d)
    run(
        scalar(rays_o), ptr(rays_o), ptr(rays_d), ptr(grad_near), ptr(grad_far), ptr(grad_o),
        ptr(grad_d), grad_near.numel(), size, min_distance, stream(rays_o),
    )  # fmt: skip
    return grad_o, grad_d


def _sphere(rays_o, rays_d, radius, min_distance):
    run = kernels(rays_o).ray_sphere_intersect_forward
    return _hits(run, rays_o, rays_d, radius, min_distance)


def _sphere_backward(grad_near, grad_far, rays_o, rays_d, radius, min_distance):
    run = kernels(rays_o).ray_sphere_intersect_backward
    return _hits_backward(run, grad_near, grad_far, rays_o, rays_d, radius, min_distance)


def _box(rays_o, rays_d, bound, min_distance):
    run = kernels(rays_o).ray_box_intersect_forward
    return _hits(run, rays_o, rays_d, bound, min_distance)


def _box_backward(grad_near, grad_far, rays_o, rays_d, bound, min_distance):
    run = kernels(rays_o).ray_box_intersect_backward
    return _hits_backward(run, grad_near, grad_far, rays_o, rays_d, bound, min_distance)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.numbers = inputs[2:]


def _differentiate(backward):
    def differentiate(ctx, grad_near, grad_far):
        grads = grad_near.contiguous(), grad_far.contiguous()
        return *backward(*grads, *ctx.saved_tensors, *ctx.numbers), None, None

    return differentiate


_SPHERE = "Tensor rays_o, Tensor rays_d, float radius, float min_distance"
_BOX = "Tensor rays_o, Tensor rays_d, float bound, float min_distance"
_GRADS = "Tensor grad_near, Tensor grad_far"
register(f"ray_sphere_intersect({_SPHERE}) -> (Tensor, Tensor)", _sphere, _empty_hits)
register(f"ray_box_intersect({_BOX}) -> (Tensor, Tensor)", _box, _empty_hits)
register(
    f"ray_sphere_intersect_backward({_GRADS}, {_SPHERE}) -> (Tensor, Tensor)",
    _sphere_backward,
    _empty_grads,
)
register(
    f"ray_box_intersect_backward({_GRADS}, {_BOX}) -> (Tensor, Tensor)",
    _box_backward,
    _empty_grads,
)
register_backward(
    "ray_sphere_intersect",
    _differentiate(torch.ops.dreamfusion_fast.ray_sphere_intersect_backward),
    _save,
)
register_backward(
    "ray_box_intersect",
    _differentiate(torch.ops.dreamfusion_fast.ray_box_intersect_backward),
    _save,
)
