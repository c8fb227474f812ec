"""The plain-torch twin of every op: specification, oracle of the tests, baseline of the benches.

Same names, arguments and results as the public ops; any float dtype, any device, differentiable.
"""

from __future__ import annotations

import itertools
import math

import torch

from .hash_encode import hash_table_rows

# One block a stem, alphabetical.


# ---- common.h -----------------------------------------------------------------------------------
def _mix32(h: torch.Tensor) -> torch.Tensor:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def uniform01(seed: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The kernels' random float32 in [0, 1) for a 64-bit seed and two 32-bit counters (int64
    tensors that broadcast). Products wrap modulo 2^64, which keeps their low 32 bits right."""
    a, b = torch.broadcast_tensors(a, b)
    h = _mix32(torch.full_like(a, (seed + 0x9E3779B9) & 0xFFFFFFFF))
    h = _mix32(h ^ ((seed >> 32) & 0xFFFFFFFF))
    return (_mix32(_mix32(h ^ a) ^ b) >> 8).to(torch.float32) * 2.0**-24


def mask_rows(x: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """Zero in place of the rows from `count` on (packed samples)."""
    if count is None:
        return x
    valid = torch.arange(x.shape[0], device=x.device) < count
    return torch.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def gradient_of(function, grad_out, x):
    """The gradient of x given that of function(x), itself differentiable."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, grad_out, create_graph=True)[0]


# ---- rays ---------------------------------------------------------------------------------------
def generate_rays(c2w, focal, height, width):
    """Pixel (row i, column j) looks along R ((j + 1/2 - W/2)/f, -(i + 1/2 - H/2)/f, -1),
    normalised, where [R | o] = c2w."""
    rows = torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5 - 0.5 * height
    cols = torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5 - 0.5 * width
    y, x = torch.meshgrid(-rows, cols, indexing="ij")
    f = focal[:, None, None]
    camera = torch.stack((x / f, y / f, -torch.ones_like(x / f)), dim=-1)
    world = torch.einsum("bij,bhwj->bhwi", c2w[:, :, :3], camera)
    rays_d = world / world.norm(dim=-1, keepdim=True)
    return c2w[:, None, None, :, 3].expand_as(rays_d), rays_d


def ray_sphere_intersect(rays_o, rays_d, radius, min_distance=0.0):
    """The roots of |o + t d| = radius, from the point of the ray closest to the centre."""
    dd = rays_d.square().sum(-1)
    middle = -(rays_o * rays_d).sum(-1) / dd
    gap = radius**2 - (rays_o + middle[..., None] * rays_d).square().sum(-1)
    half = (torch.where(gap <= 0, 1.0, gap) / dd).sqrt()
    return _limit_interval(middle - half, middle + half, gap <= 0, min_distance)


def ray_box_intersect(rays_o, rays_d, bound, min_distance=0.0):
    """Between the latest entry into and the earliest exit from a slab; an axis along which the
    ray does not move has it inside for ever or never."""
    still = rays_d == 0
    d = torch.where(still, 1.0, rays_d)
    planes = torch.stack(((-bound - rays_o) / d, (bound - rays_o) / d))
    low = torch.where(still, -math.inf, planes.amin(0)).max(-1).values
    high = torch.where(still, math.inf, planes.amax(0)).min(-1).values
    outside = (still & (rays_o.abs() > bound)).any(-1)
    bad = still.all(-1) | ~(rays_o + rays_d).isfinite().all(-1)
    high = torch.where(bad, math.nan, high)
    return _limit_interval(low, high, outside & ~bad, min_distance)


def _limit_interval(near, far, miss, min_distance):
    miss = miss | (far <= near) | (far <= min_distance)
    near = torch.where(far.isnan(), far, near.clamp(min=min_distance))
    return torch.where(miss, 0.0, near), torch.where(miss, 0.0, far)


# ---- adam ---------------------------------------------------------------------------------------
@torch.no_grad()
def adam_step(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    skipped,
    lr,
    beta1,
    beta2,
    eps,
    grad_scale=1.0,
    param_half=None,
    rate=None,
    loss_scale=None,
):
    """In place: Adam (algorithm 1), or only `skipped` + 1 if any gradient is not finite."""
    if rate is not None:
        lr = lr * rate.double()
    if loss_scale is not None:
        grad_scale = grad_scale * loss_scale.double()
    g = (grad * (1 / grad_scale)).to(grad)
    finite = g.isfinite().all()
    t = step.double().squeeze() + 1
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    step_size, correction2 = lr / (1 - beta1**t), 1 - beta2**t
    p = param - step_size.to(g) * m / (v.sqrt() / correction2.sqrt().to(g) + eps)
    for old, new in ((param, p), (exp_avg, m), (exp_avg_sq, v), (step, step + 1)):
        old.copy_(torch.where(finite, new, old))
    skipped += ~finite


# ---- composite ----------------------------------------------------------------------------------
def composite(sigma, rgb, t, dt, packed, early_stop=0.0):
    """Weights T alpha, T the product of what the samples in front let through, on a table with a
    row for each ray, and sums of what they weigh."""
    samples, rows = len(sigma), _rows_of_rays(packed, len(sigma))
    s, t, rgb = (_with_no_row(x)[rows] for x in (sigma * dt, t, rgb))
    behind = (-s).exp().cumprod(1)
    T = torch.cat((torch.ones_like(behind[:, :1]), behind[:, :-1]), 1)
    w = torch.where((rows < samples) & ~(T < early_stop), T * -torch.expm1(-s), 0.0)
    weights = sigma.new_zeros(samples + 1).index_put((rows,), w)[:-1]
    return (w[..., None] * rgb).sum(1), w.sum(1), (w * t).sum(1), weights


def _rows_of_rays(packed, samples):
    """The rows of each ray (R, longest), filled up with `samples`: no such row."""
    start, count = packed.long().unbind(-1)
    start = start.clamp(0, samples)
    count = count.clamp(min=0).minimum(samples - start)[:, None]
    column = torch.arange(int(count.max()) if len(count) else 0, device=packed.device)
    return torch.where(column < count, start[:, None] + column, samples)


def _with_no_row(x):
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))


NORMAL_EPS = 1e-3  # per scene unit


def normals(gradient):
    """-g / sqrt(|g|² + EPS²): against the gradient, of length 1, or 0 where there is none."""
    return -gradient * (gradient.square().sum(-1, keepdim=True) + NORMAL_EPS**2).rsqrt()


def shade(albedo, normal, positions, shading):
    """(k albedo + b) (a + d max(0, n · to_light)) for rows l, a, d, k, b of each position."""
    light, ambient, diffuse, texture, base = shading.split((3, 1, 1, 1, 1), -1)
    way = light - positions
    length = way.norm(dim=-1, keepdim=True)
    to_light = way / torch.where(length == 0, 1.0, length)
    facing = (normal * to_light).sum(-1, keepdim=True)
    return (texture * albedo + base) * (ambient + diffuse * facing.relu())


def composite_lit(
    sigma, albedo, gradient, t, dt, packed, rays_o, rays_d, shading, early_stop=0.0
):  # fmt: skip
    """Shade each sample by its ray's row, then composite colours, normals and penalties."""
    rows, view = _rows_of_rays(packed, len(sigma)), len(packed) // len(shading)
    ray = torch.full((len(sigma) + 1,), len(packed), device=sigma.device)
    ray[rows] = torch.arange(len(packed), device=sigma.device)[:, None]
    per_ray = rays_o, rays_d, shading.repeat_interleave(view, 0)
    o, d, light = (_with_no_row(x.detach())[ray[:-1]] for x in per_ray)
    normal = normals(gradient)
    colour = shade(albedo, normal, o + t.detach()[:, None] * d, light)
    out = composite(sigma, torch.cat((colour, normal), -1), t, dt, packed, early_stop)
    against = (normal * d).sum(-1, keepdim=True).relu().square()
    constant = (x.detach() for x in (t, dt))
    orientation = composite(sigma.detach(), against, *constant, packed, early_stop)[0]
    return out[0][:, :3], *out[1:], out[0][:, 3:], orientation[:, 0]


# ---- frequency_encode ---------------------------------------------------------------------------
def frequency_encode(x, n_frequencies, variance=None, count=None):
    """Columns: sin(2^l x_d) at l D + d, then cos(2^l x_d), damped by exp(-4^l variance / 2)."""
    x = mask_rows(x, count)
    scale = 2.0 ** torch.arange(n_frequencies, dtype=x.dtype, device=x.device)
    angle = (scale[:, None] * x[:, None, :]).flatten(1)
    out = torch.cat([angle.sin(), angle.cos()], -1)
    if variance is not None:
        damping = (-0.5 * scale**2 * mask_rows(variance, count)[:, None]).exp()
        out = out * damping.repeat_interleave(x.shape[1], -1).repeat(1, 2)
    return mask_rows(out, count)


def frequency_encode_gradient(grad_out, x, n_frequencies, variance=None, count=None):
    """Sines turn into cosines, cosines into minus sines, times 2^l."""
    sine, cosine = frequency_encode(x, n_frequencies, variance, count).chunk(2, -1)
    grad_sine, grad_cosine = mask_rows(grad_out, count).chunk(2, -1)
    scale = 2.0 ** torch.arange(n_frequencies, dtype=x.dtype, device=x.device)
    terms = (grad_sine * cosine - grad_cosine * sine).unflatten(1, (n_frequencies, x.shape[1]))
    return (scale[:, None] * terms).sum(1)


# ---- hash_encode --------------------------------------------------------------------------------
def hash_encode(
    x, table, n_levels, base_resolution, finest_resolution, log2_table_size,
    interpolation="linear", count=None, *, scales=None,
):  # fmt: skip
    """Level by level: the cell, its eight corners' rows, and their weighted sum."""
    layout = hash_table_rows(n_levels, base_resolution, finest_resolution, log2_table_size, scales)
    x = mask_rows(x, count)
    out = []
    for level, (resolution, start, end) in enumerate(zip(layout[0], layout[1], layout[1][1:])):
        if scales is None:
            pos, side = x.clamp(0, 1) * resolution, resolution + 1
            cell = pos.detach().nan_to_num(resolution).floor().clamp(max=resolution - 1)
        else:
            pos, side = x * float(torch.tensor(scales[level])) + 0.5, resolution
            cell = pos.detach().floor()
        w = pos - cell
        if interpolation == "smoothstep":
            w = w * w * (3 - 2 * w)
        dense = side**3 <= end - start
        steps = (1, side, side**2) if dense else (1, 2654435761, 805459861)
        cell = cell.nan_to_num(-(2.0**30)).clamp(-(2.0**30), 2.0**30).long()
        keys = [(k * s, (k + 1) * s) for k, s in zip(cell.unbind(-1), steps)]
        features = 0
        for i, j, k in itertools.product((0, 1), repeat=3):
            u, v, t = keys[0][i], keys[1][j], keys[2][k]
            row = (u + v + t if dense else u ^ v ^ t) % 2**32 % (end - start)
            parts = [w[:, d] if c else 1 - w[:, d] for d, c in enumerate((i, j, k))]
            features = features + (parts[0] * parts[1] * parts[2])[:, None] * table[start + row]
        out.append(features)
    return mask_rows(torch.cat(out, -1), count)


def hash_encode_gradient(grad_out, x, table, *layout, **options):
    return gradient_of(lambda x: hash_encode(x, table, *layout, **options), grad_out, x)


# ---- march --------------------------------------------------------------------------------------
@torch.no_grad()
def march(
    rays_o, rays_d, near, far, bitfield, resolution, bound, step, capacity, seed, jitter=True,
    limit=None, first_ray=0,
):  # fmt: skip
    """Every bin of every ray, one after another: near + (i + u) step, kept if its cell is set."""
    step = near.new_tensor(step)  # a tensor, for rounding like the kernels
    bins = ((far - near) / step).ceil().clamp(min=0)[:, None]
    i = torch.arange(int(bins.max()) if len(bins) else 0, device=near.device)
    ray = first_ray + torch.arange(len(near), device=near.device)[:, None]
    u = uniform01(int(seed), ray, i).to(near) if jitter else near.new_tensor(0.5)
    start = near[:, None] + i.to(near) * step
    dt = torch.minimum(far[:, None] - start, step).clamp(min=0)
    t = start + u * dt
    positions = rays_o[:, None] + t[..., None] * rays_d[:, None]
    cell = ((positions + bound) * (resolution / (2 * bound))).floor()
    inside = ((cell >= 0) & (cell < resolution)).all(-1) & (i < bins)
    x, y, z = cell.clamp(0, resolution - 1).long().unbind(-1)
    index = (x * resolution + y) * resolution + z
    kept = inside & (bitfield[index >> 3] >> (index & 7) & 1).bool()
    if limit is not None:
        kept &= kept.cumsum(1) <= limit[:, None]
    ends = kept.sum(1).cumsum(0)
    starts = ends - kept.sum(1)
    fits = ends <= capacity
    kept &= fits[:, None]
    out = [x.new_zeros(capacity, *x.shape[2:]) for x in (positions, t, dt)]
    for full, x in zip(out, (positions, t, dt), strict=True):
        full[: kept.sum()] = x[kept]
    packed = torch.stack((starts.clamp(max=capacity), kept.sum(1)), -1).int()
    return *out, packed, ends[-1:].int() if len(ends) else packed.new_zeros(1)


# ---- mlp ----------------------------------------------------------------------------------------
def mlp(x, params, widths, activation="relu", bias=False, count=None):
    """Linear layers from one array of parameters; the last has no activation."""
    h, start = mask_rows(x, count), 0
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        if i > 0:
            h = getattr(torch.nn.functional, activation)(h)
        weight = params[start : start + n_out * n_in].reshape(n_out, n_in)
        start += n_out * n_in
        h = torch.nn.functional.linear(h, weight, params[start : start + n_out] if bias else None)
        start += n_out * bias
    return mask_rows(h, count)


def mlp_gradient(grad_out, x, params, *shape, **options):
    return gradient_of(lambda x: mlp(x, params, *shape, **options), grad_out, x)


# ---- occupancy ----------------------------------------------------------------------------------
def occupancy_points(resolution, bound, seed, dtype=torch.float32, device=None):
    """((x, y, z) + u) 2 bound / G - bound for cell (x G + y) G + z."""
    g = torch.arange(resolution, device=device)
    cells = torch.cartesian_prod(g, g, g)
    index = torch.arange(resolution**3, device=device)[:, None]
    u = uniform01(int(seed), index, torch.arange(3, device=device))
    return (cells + u.to(dtype)) * (2 * bound / resolution) - bound


@torch.no_grad()
def occupancy_update(ema, bitfield, density, decay, threshold):
    """In place: ema = max(ema decay, density); bits where it is above min(threshold, mean)."""
    decayed, found = (torch.where(x > 0, x, 0.0) for x in (ema * decay, density))
    ema.copy_(torch.maximum(decayed, found))
    bits = ema.double() > ema.double().mean().clamp(max=threshold)
    bitfield.copy_((bits.reshape(-1, 8) << torch.arange(8, device=ema.device)).sum(-1))


# ---- radiance -----------------------------------------------------------------------------------
def radiance(
    out, positions, bias=0.0, ceiling=8.0, blob="gaussian", blob_density=0.0, blob_size=1.0,
    raw=False, of_x=None, scale=1.0, count=None,
):  # fmt: skip
    square = positions.detach().square().sum(-1, keepdim=True)
    if blob == "gaussian":
        added = blob_density * (-square / (2 * blob_size**2)).exp()
        of_blob = -added / blob_size**2 * positions.detach()
    else:
        distance = square.sqrt()
        added = blob_density * (1 - distance / blob_size)
        toward = torch.where(distance > 0, positions.detach() / distance, 0.0)
        of_blob = -blob_density / blob_size * toward
    log_density = out[:, 0] + added[:, 0] + bias
    sigma = log_density.clamp(max=ceiling).exp()
    values = out[:, 1:] if raw else out[:, 1:].sigmoid()
    gradient = positions.new_zeros(0, 3) if of_x is None else scale * of_x + of_blob
    if of_x is not None:
        gradient = mask_rows(gradient, count)
    return mask_rows(sigma, count), mask_rows(values, count), gradient


# ---- spherical_harmonics ------------------------------------------------------------------------
def spherical_harmonics(dirs, degree, count=None):
    """Component l² + l + m: q_l|m|(z) times Re (m >= 0) or Im (m < 0) of (x + iy)^|m|, where
    q_lm (1 - z²)^(m/2) is the normalised associated Legendre polynomial with (-1)^m."""
    x, y, z = mask_rows(dirs, count).unbind(-1)
    out = [None] * degree**2
    c, s = torch.ones_like(x), torch.zeros_like(x)
    for m in range(degree):
        ratio = math.prod((2 * k - 1) / (2 * k) for k in range(1, m + 1))
        norm = math.sqrt((2 * m + 1) / (4 * math.pi) * ratio * (2 if m else 1))
        q, below = torch.full_like(x, (-1) ** m * norm), torch.zeros_like(x)
        for l in range(m, degree):  # noqa: E741
            out[l * l + l - m], out[l * l + l + m] = q * s, q * c
            a = math.sqrt((4 * (l + 1) ** 2 - 1) / ((l + 1) ** 2 - m * m))
            b = math.sqrt((l * l - m * m) / (4 * l * l - 1)) if l else 0.0
            q, below = a * (z * q - b * below), q
        c, s = x * c - y * s, x * s + y * c
    return mask_rows(torch.stack(out, -1), count)
