"""JAX: every op as a jitted function, gradients by its own reverse mode (jax.vjp)."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bench.task import TASKS
from bench.tasks import ADAM, FIELD_SETTINGS

jax.config.update("jax_enable_x64", False)


def start(name: str) -> str:
    return f"{jax.__version__} {jax.devices()[0].platform}"


def prepare(op: str, arrays: dict, settings: dict, backward: bool):
    task, last = TASKS[op], []
    given = {k: jnp.asarray(x) for k, x in arrays.items()}
    cotangents = tuple(given.pop(f"g{i}") for i in range(len(arrays)) if f"g{i}" in arrays)
    function = functools.partial(FUNCTIONS[op], s=settings)

    def both(a, cotangents):
        chosen = {k: a[k] for k in task.gradients}
        results, pull = jax.vjp(lambda x: function(a | x), chosen)
        (grads,) = pull(cotangents)
        return *results, *(grads[k] for k in task.gradients)

    jitted = jax.jit(both if backward else lambda a, _: function(a))
    changing = STATE.get(op, {})

    def call():
        last[:] = jax.block_until_ready(jitted(given, cotangents))
        given.update((k, last[i]) for k, i in changing.items())

    return call, lambda: [np.asarray(x) for x in last]


def release() -> None:
    jax.clear_caches()


# One function a task, of arrays and settings, to a tuple of results.


def adam(a, s):
    return _adam(a["param"], a["grad"], a["exp_avg"], a["exp_avg_sq"], a["step"], s)


def _adam(param, grad, m, v, step, s):
    finite, t = jnp.isfinite(grad).all(), step[0] + 1.0
    m2 = s["beta1"] * m + (1 - s["beta1"]) * grad
    v2 = s["beta2"] * v + (1 - s["beta2"]) * grad * grad
    size, scale = s["lr"] / (1 - s["beta1"] ** t), jnp.sqrt(1 - s["beta2"] ** t)
    p2 = param - size * m2 / (jnp.sqrt(v2) / scale + s["eps"])
    return tuple(jnp.where(finite, x, y) for x, y in ((p2, param), (m2, m), (v2, v)))


def composite(a, s):
    columns, valid = _rows(a["packed"], len(a["t"]), s["longest"])
    return _composite(a["sigma"], a["rgb"], a["t"], a["dt"], columns, valid, s["early_stop"])


def _rows(packed, samples, longest):
    """The samples of each ray (R, longest), and which of them there are."""
    i = jnp.arange(longest)
    rows, valid = packed[:, :1] + i, i < packed[:, 1:]
    return jnp.where(valid, rows, samples), valid


def _composite(sigma, rgb, t, dt, rows, valid, early_stop):
    def of(x):
        return x.at[rows].get(mode="fill", fill_value=0)

    s = of(sigma * dt)
    T = jnp.exp(s - jnp.cumsum(s, 1))
    w = jnp.where(valid & (T >= early_stop), T * -jnp.expm1(-s), 0.0)
    weights = jnp.zeros_like(sigma).at[rows].set(w, mode="drop")
    return (w[..., None] * of(rgb)).sum(1), w.sum(1), (w * of(t)).sum(1), weights


def composite_lit(a, s):
    rows, valid = _rows(a["packed"], len(a["t"]), s["longest"])
    view = len(a["packed"]) // len(a["shading"])
    ray = jnp.zeros(len(a["t"]), jnp.int32).at[rows].set(
        jnp.arange(len(rows), dtype=jnp.int32)[:, None], mode="drop")  # fmt: skip
    o, d, light = a["rays_o"][ray], a["rays_d"][ray], a["shading"][ray // view]
    g = a["gradient"]
    normal = -g * jax.lax.rsqrt((g * g).sum(-1, keepdims=True) + 1e-6)
    way = light[:, :3] - (o + a["t"][:, None] * d)
    to_light = way * jax.lax.rsqrt((way * way).sum(-1, keepdims=True))
    facing = (normal * to_light).sum(-1, keepdims=True)
    colour = light[:, 5:6] * a["albedo"] + light[:, 6:7]
    colour = colour * (light[:, 3:4] + light[:, 4:5] * jax.nn.relu(facing))
    against = jnp.square(jax.nn.relu((normal * d).sum(-1, keepdims=True)))
    values = jnp.concatenate((colour, normal), -1)
    out = _composite(a["sigma"], values, a["t"], a["dt"], rows, valid, s["early_stop"])
    w = jax.lax.stop_gradient(out[3])
    orientation = (w[:, None] * against).at[rows].get(mode="fill", fill_value=0).sum((1, 2))
    return out[0][:, :3], *out[1:], out[0][:, 3:], orientation


def frequency_encode(a, s):
    scale = 2.0 ** jnp.arange(s["n_frequencies"], dtype=jnp.float32)
    angle = (scale[:, None] * a["x"][:, None, :]).reshape(len(a["x"]), -1)
    return (jnp.concatenate((jnp.sin(angle), jnp.cos(angle)), -1),)


def hash_encode(a, s):
    return (_hash_encode(a["x"], a["table"], s),)


def hash_encode_inputs(a, s):
    return hash_encode(a, s)


def _hash_encode(x, table, s):
    x, out = jnp.clip(x, 0, 1), []
    for resolution, start, end in zip(s["resolutions"], s["starts"], s["starts"][1:]):
        pos = x * resolution
        cell = jnp.minimum(jnp.floor(pos), resolution - 1)
        w = pos - cell
        w = w * w * (3 - 2 * w) if s["interpolation"] == "smoothstep" else w
        side, cell = resolution + 1, cell.astype(jnp.uint32)
        dense = side**3 <= end - start
        steps = (1, side, side**2) if dense else (1, 2654435761, 805459861)
        keys = [(cell[:, d] * jnp.uint32(k), (cell[:, d] + 1) * jnp.uint32(k))
                for d, k in enumerate(steps)]  # fmt: skip
        features = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            u, v, t = (keys[d][c] for d, c in enumerate(corner))
            row = u + v + t if dense else (u ^ v ^ t) & jnp.uint32(end - start - 1)
            weight = math.prod(w[:, d] if c else 1 - w[:, d] for d, c in enumerate(corner))
            features = features + weight[:, None] * table[start + row]
        out.append(features)
    return jnp.concatenate(out, -1)


def _mix32(h):
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def _uniform(seed, a, b):
    """The kernels' random numbers of two counters."""
    h = _mix32(_mix32(jnp.uint32((seed + 0x9E3779B9) & 0xFFFFFFFF)) ^ jnp.uint32(seed >> 32))
    h = _mix32(_mix32(h ^ a) ^ b)
    return (h >> 8).astype(jnp.float32) * 2.0**-24


def march(a, s):
    return _march(a["rays_o"], a["rays_d"], a["near"], a["far"], a["bitfield"], s)[:5]


def _march(o, d, near, far, bitfield, s):
    """All bins of all rays, of which those in set cells are kept; rows of rays and their mask
    after the op's results."""
    g, step, capacity = s["resolution"], jnp.float32(s["step"]), s["capacity"]
    i, ray = jnp.arange(s["bins"])[None], jnp.arange(len(near))[:, None]
    u = _uniform(s["seed"], ray.astype(jnp.uint32), i.astype(jnp.uint32))
    begin = near[:, None] + i * step
    dt = jnp.maximum(jnp.minimum(far[:, None] - begin, step), 0)
    t = begin + u * dt
    p = o[:, None] + t[..., None] * d[:, None]
    cell = jnp.floor((p + s["bound"]) * (g / (2 * s["bound"])))
    inside = ((cell >= 0) & (cell < g)).all(-1) & (i < jnp.ceil((far - near) / step)[:, None])
    x, y, z = (cell.astype(jnp.int32).clip(0, g - 1)[..., k] for k in range(3))
    index = (x * g + y) * g + z
    kept = inside & (((bitfield[index >> 3] >> (index & 7).astype(jnp.uint8)) & 1) == 1)
    counts = kept.sum(1)
    ends = jnp.cumsum(counts)
    kept = kept & (ends <= capacity)[:, None]
    row = jnp.where(kept, jnp.cumsum(kept.ravel()).reshape(kept.shape) - 1, capacity)

    def pack(x):
        empty = jnp.zeros((capacity, *x.shape[2:]), x.dtype)
        return empty.at[row].set(x, mode="drop")

    packed = jnp.stack((jnp.minimum(ends - counts, capacity), counts), -1)
    results = *map(pack, (p, t, dt)), packed.astype(jnp.int32), ends[-1:].astype(jnp.int32)
    return *results, row, kept


def mlp(a, s):
    return (_mlp(a["x"], a["params"], s),)


def _mlp(h, params, s):
    start = 0
    for n_in, n_out in itertools.pairwise(s["widths"]):
        h = getattr(jax.nn, s["activation"])(h) if start else h
        h = h @ params[start : start + n_out * n_in].reshape(n_out, n_in).T
        start += n_out * n_in
    return h


def occupancy(a, s):
    g, ema, density = s["resolution"], a["ema"], a["density"]
    index = jnp.arange(g**3, dtype=jnp.uint32)
    cells = jnp.stack((index // (g * g), index // g % g, index % g), -1)
    u = _uniform(s["seed"], index[:, None], jnp.arange(3, dtype=jnp.uint32))
    points = (cells + u) * (2 * s["bound"] / g) - s["bound"]
    ema = jnp.maximum(jnp.where(ema > 0, ema * s["decay"], 0), jnp.where(density > 0, density, 0))
    bits = ema > jnp.minimum(ema.mean(), s["threshold"])
    weights = jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8)
    return points, ema, (bits.reshape(-1, 8) * weights).sum(-1).astype(jnp.uint8)


def radiance(a, s):
    return _radiance(a["out"], a["positions"], s)


def _radiance(out, p, s):
    blob = s["blob_density"] * jnp.exp(-(p * p).sum(-1) / (2 * s["blob_size"] ** 2))
    sigma = jnp.exp(jnp.minimum(out[:, 0] + blob + s["bias"], s["ceiling"]))
    return sigma, jax.nn.sigmoid(out[:, 1:])


def generate_rays(a, s):
    height, width = s["height"], s["width"]
    rows, columns = jnp.arange(height) + 0.5 - height / 2, jnp.arange(width) + 0.5 - width / 2
    y, x = jnp.meshgrid(-rows, columns, indexing="ij")
    f = a["focal"][:, None, None]
    camera = jnp.stack((x / f, y / f, -jnp.ones_like(x / f)), -1)
    world = jnp.einsum("bij,bhwj->bhwi", a["c2w"][:, :, :3], camera, precision="highest")
    d = world / jnp.sqrt((world * world).sum(-1, keepdims=True))
    return jnp.broadcast_to(a["c2w"][:, None, None, :, 3], d.shape), d


def render(a, s):
    rays = (a[k] for k in ("rays_o", "rays_d", "near", "far"))
    return _render(*rays, a["bitfield"], a["table"], a["params"], s)


def _render(o, d, near, far, bitfield, table, params, s):
    p, t, dt, packed, _, _, _ = _march(o, d, near, far, bitfield, s)
    out = _mlp(_hash_encode(p / (2 * s["bound"]) + 0.5, table, s), params, s)
    sigma, rgb = _radiance(out, p, FIELD_SETTINGS)
    rows, valid = _rows(packed, len(t), s["longest"])
    return _composite(sigma, rgb, t, dt, rows, valid, s["early_stop"])[:3]


def spherical_harmonics(a, s):
    x, y, z = (a["dirs"][:, k] for k in range(3))
    out, c, sine = [None] * s["degree"] ** 2, jnp.ones_like(x), jnp.zeros_like(x)
    for m in range(s["degree"]):
        ratio = math.prod((2 * k - 1) / (2 * k) for k in range(1, m + 1))
        norm = math.sqrt((2 * m + 1) / (4 * math.pi) * ratio * (2 if m else 1))
        q, below = jnp.full_like(x, (-1) ** m * norm), jnp.zeros_like(x)
        for n in range(m, s["degree"]):
            out[n * n + n - m], out[n * n + n + m] = q * sine, q * c
            up = math.sqrt((4 * (n + 1) ** 2 - 1) / ((n + 1) ** 2 - m * m))
            down = math.sqrt((n * n - m * m) / (4 * n * n - 1)) if n else 0.0
            q, below = up * (z * q - down * below), q
        c, sine = x * c - y * sine, x * sine + y * c
    return (jnp.stack(out, -1),)


def step(a, s):
    o, d = (x.reshape(-1, 3) for x in generate_rays(a, s))
    middle = -(o * d).sum(-1)
    gap = s["bound"] ** 2 - jnp.square(o + middle[:, None] * d).sum(-1)
    half, hit = jnp.sqrt(jnp.where(gap > 0, gap, 1.0)), gap > 0
    near = jnp.where(hit, jnp.maximum(middle - half, 0), 0.0)
    far = jnp.where(hit, middle + half, 0.0)

    def colour(table, params):
        return _render(o, d, near, far, a["bitfield"], table, params, s)[0]

    grads = jax.vjp(colour, a["table"], a["params"])[1](a["grad_colour"])
    (table, m0, v0), (params, m1, v1) = (
        _adam(a[k], g, *(a[f"{k}_{x}"] for x in ("exp_avg", "exp_avg_sq", "step")), ADAM)
        for k, g in zip(("table", "params"), grads)
    )
    return table, params, m0, m1, v0, v1


FUNCTIONS = {f.__name__: f for f in (
    adam, composite, composite_lit, frequency_encode, generate_rays, hash_encode,
    hash_encode_inputs, march, mlp, occupancy, radiance, render, spherical_harmonics,
    step)}  # fmt: skip
# Arrays that a call leaves changed for the next one: which of its results they become.
STATE = {"adam": {"param": 0, "exp_avg": 1, "exp_avg_sq": 2}, "occupancy": {"ema": 1},
         "step": {"table": 0, "params": 1, "table_exp_avg": 2, "params_exp_avg": 3,
                  "table_exp_avg_sq": 4, "params_exp_avg_sq": 5}}  # fmt: skip
OPS = {op: functools.partial(prepare, op) for op in FUNCTIONS}
