"""OpenCV's lens distortion, undone by Newton's method. No gradients, as in the original."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import expect


@torch.no_grad()
def opencv_lens_undistortion(
    uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10
) -> Tensor:
    """Undo OpenCV's rational and tangential distortion.

    A point is done when both components of a step are below eps, or when the Jacobian's determinant
    is, before the step.

    Args:
        uv: (..., 2) float, distorted image points on the plane z = 1.
        params: (N,) or (..., N), N of k1, k2, p1, p2, k3, k4, k5, k6: 0, 1, 2, 4 or all 8.
        iters: steps at most.
    Returns:
        like uv.
    """
    expect(uv.shape[-1:] == (2,), "uv", "shape (..., 2)", uv)
    n = params.shape[-1]
    expect(n in (0, 1, 2, 4, 8), "params", "0, 1, 2, 4 or 8 of them", params)
    if n == 0:
        return uv
    params = torch.nn.functional.pad(params, (0, 8 - n)).expand(*uv.shape[:-1], 8)
    x, y = uv.unbind(-1)
    going = torch.ones_like(x, dtype=torch.bool)
    for _ in range(iters):
        fx, fy, jacobian = _residual(x, y, uv, params)
        fx_x, fx_y, fy_x, fy_y = jacobian
        det = fx_x * fy_y - fx_y * fy_x
        going = going & ~(det.abs() < eps)
        det = torch.where(going, det, 1)
        dx, dy = (fy * fx_y - fx * fy_y) / det, (fx * fy_x - fy * fx_x) / det
        x, y = torch.where(going, x + dx, x), torch.where(going, y + dy, y)
        going = going & ~((dx.abs() < eps) & (dy.abs() < eps))
        if not going.any():
            break
    return torch.stack([x, y], -1)


def _residual(x: Tensor, y: Tensor, uv: Tensor, params: Tensor):
    """Distorted (x, y) less uv, and its derivatives by x and by y."""
    k1, k2, p1, p2, k3, k4, k5, k6 = params.unbind(-1)
    r = x * x + y * y
    over, under = 1 + r * (k1 + r * (k2 + r * k3)), 1 + r * (k4 + r * (k5 + r * k6))
    d_over, d_under = k1 + r * (2 * k2 + r * 3 * k3), k4 + r * (2 * k5 + r * 3 * k6)
    radial = over / under
    slope = 2 * (d_over * under - over * d_under) / under**2  # times x or y: d radial by it
    distorted = _opencv_lens_distortion(torch.stack([x, y], -1), params)
    fx, fy = (distorted - uv).unbind(-1)
    cross = slope * x * y + 2 * p1 * x + 2 * p2 * y
    fx_x = radial + slope * x * x + 2 * p1 * y + 6 * p2 * x
    fy_y = radial + slope * y * y + 2 * p2 * x + 6 * p1 * y
    return fx, fy, (fx_x, cross, cross, fy_y)


@torch.no_grad()
def opencv_lens_undistortion_fisheye(
    uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10
) -> Tensor:
    """Undo OpenCV's fisheye distortion.

    Angles above 90 degrees are cut to that. Points nearer than eps to the centre go to the centre.

    Args:
        uv: (..., 2) float, distorted image points.
        params: (4,) or (..., 4), k1 to k4.
        eps: of a step in radians, below which a point is done. iters: steps at most.
    Returns:
        like uv; NaN where iters steps were not enough, or the angle changed its sign.
    """
    expect(uv.shape[-1:] == (2,), "uv", "shape (..., 2)", uv)
    expect(params.shape[-1:] == (4,), "params", "shape (4,) or (..., 4)", params)
    k = params.double().expand(*uv.shape[:-1], 4).unbind(-1)
    target = uv.double().norm(dim=-1).clamp(max=math.pi / 2)
    theta = target.clone()
    done = target <= eps
    for _ in range(iters):
        s = theta * theta
        value = theta * (1 + s * (k[0] + s * (k[1] + s * (k[2] + s * k[3])))) - target
        slope = 1 + s * (3 * k[0] + s * (5 * k[1] + s * (7 * k[2] + s * 9 * k[3])))
        move = value / slope
        theta = torch.where(done, theta, theta - move)
        done = done | (move.abs() < eps)
    near = target <= eps
    scale = torch.where(near, 0, theta.tan() / torch.where(near, 1, target))
    scale = torch.where(done & (theta >= 0), scale, torch.nan)
    return uv * scale[..., None].to(uv.dtype)


def _opencv_lens_distortion(uv: Tensor, params: Tensor) -> Tensor:
    """Distort points (..., 2) by k1, k2, p1, p2, k3, k4, k5, k6, (..., 8)."""
    k1, k2, p1, p2, k3, k4, k5, k6 = params.unbind(-1)
    u, v = uv.unbind(-1)
    r = u * u + v * v
    radial = (1 + r * (k1 + r * (k2 + r * k3))) / (1 + r * (k4 + r * (k5 + r * k6)))
    du = 2 * p1 * u * v + p2 * (r + 2 * u * u)
    dv = 2 * p2 * u * v + p1 * (r + 2 * v * v)
    return torch.stack([u * radial + du, v * radial + dv], -1)


def _opencv_lens_distortion_fisheye(uv: Tensor, params: Tensor, eps: float = 1e-10) -> Tensor:
    """Distort points (..., 2) by the fisheye's k1 to k4, (..., 4)."""
    k1, k2, k3, k4 = params.unbind(-1)
    r = uv.norm(dim=-1)
    s = torch.atan(r) ** 2
    theta = torch.atan(r) * (1 + s * (k1 + s * (k2 + s * (k3 + s * k4))))
    return uv * (theta / r.clamp(min=eps))[..., None]
