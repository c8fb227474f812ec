"""Dr.Jit, LLVM backend: every op traced once and frozen (dr.freeze), gradients by its own reverse
mode. Vectors are arrays of components, as Dr.Jit likes them. Results and gradients are evaluated
together, lest the forward pass of what is linear is removed as dead code."""

from __future__ import annotations

import functools
import itertools
import math

import drjit as dr
import numpy as np
from drjit.llvm.ad import Array2f, Array3f, Float, TensorXf, UInt32

from bench.task import TASKS
from bench.tasks import ADAM, FIELD_SETTINGS

FLAT = ("table", "params", "packed", "bitfield", "c2w", "shading")  # gathered from, or reshaped


def start(name: str) -> str:
    Float(1.0) + dr.arange(Float, 3)  # raises where there is no LLVM
    dr.eval(dr.arange(Float, 3))
    return dr.__version__


def load(name: str, x: np.ndarray):
    """Components of float arrays (n, k), a matrix as a tensor, others flat."""
    if x.dtype != np.float32:
        return UInt32(padded(x.astype(np.uint32)))
    if x.ndim == 2 and not name.startswith(FLAT):
        return [Float(padded(column)) for column in x.T]
    return Float(padded(x))


def padded(x: np.ndarray) -> np.ndarray:
    """A flat copy with memory behind it: Dr.Jit works on NumPy's own memory, by whole vectors, also
    beyond its end, and crashes where a page ends there."""
    memory = np.empty(x.size + 64, x.dtype)
    memory[: x.size] = x.ravel()
    return memory[: x.size]


def prepare(op: str, arrays: dict, settings: dict, backward: bool):
    task, last = TASKS[op], []
    given = {k: load(k, x) for k, x in arrays.items()}
    if op == "mlp":
        given["x"] = TensorXf(padded(arrays["x"]), arrays["x"].shape)
    cotangents = [given.pop(f"g{i}") for i in range(len(arrays)) if f"g{i}" in arrays]
    if op == "mlp" and cotangents:
        cotangents = [TensorXf(padded(arrays["g0"]), arrays["g0"].shape)]
    function = functools.partial(FUNCTIONS[op], s=settings)

    def both(a, cotangents):
        if not backward:
            return function(a), []
        inputs = {k: a[k] for k in task.gradients}
        results, grads = pull(lambda x: function(a | x), inputs, cotangents)
        return results, [grads[k] for k in task.gradients]

    frozen, changing = dr.freeze(both), STATE.get(op, {})

    def call():
        results, grads = frozen(given, cotangents)
        dr.eval(results, grads)
        dr.sync_thread()
        last[:] = [*results, *grads]
        given.update((k, last[i]) for k, i in changing.items())

    return call, lambda: [_plain(x) for x in last]


def _plain(x) -> np.ndarray:
    """(n,) or (n, k); race.py compares flat."""
    if isinstance(x, Float | UInt32 | TensorXf):
        return np.array(x)
    return np.stack([np.array(c) for c in x], -1)


def pull(function, inputs: dict, cotangents):
    """Results of function(inputs), and the gradients of the inputs."""
    inputs = {k: _fresh(x) for k, x in inputs.items()}
    dr.enable_grad(inputs)
    results = function(inputs)
    for result, cotangent in zip(results, cotangents):
        for r, c in zip(_parts(result), _parts(cotangent)):
            dr.set_grad(r, c)
            dr.enqueue(dr.ADMode.Backward, r)
    dr.traverse(dr.ADMode.Backward)
    return dr.detach(list(results)), {k: dr.grad(x) for k, x in inputs.items()}


def _parts(x) -> list:
    return [x] if isinstance(x, Float | TensorXf) else list(x)


def _fresh(x):
    """Detached copies, whose gradients start from nothing."""
    return [dr.detach(c) for c in x] if isinstance(x, list) else dr.detach(x)


def release() -> None:
    dr.flush_kernel_cache()
    dr.flush_malloc_cache()


# One function a task, of arrays and settings, to a tuple of results.


def adam(a, s):
    return _adam(a["param"], a["grad"], a["exp_avg"], a["exp_avg_sq"], a["step"], s)


def _adam(param, grad, m, v, step, s):
    finite, t = dr.all(dr.isfinite(grad)), Float(step) + 1
    m2 = s["beta1"] * m + (1 - s["beta1"]) * grad
    v2 = s["beta2"] * v + (1 - s["beta2"]) * grad * grad
    size = s["lr"] / (1 - dr.exp(t * math.log(s["beta1"])))
    scale = dr.sqrt(1 - dr.exp(t * math.log(s["beta2"])))
    p2 = param - size * m2 / (dr.sqrt(v2) / scale + s["eps"])
    return tuple(dr.select(finite, x, y) for x, y in ((p2, param), (m2, m), (v2, v)))


def composite(a, s):
    rows = _rows(a["packed"], s["longest"])
    return _composite(a["sigma"], a["rgb"], a["t"], a["dt"], *rows, s)


def _rows(packed, longest):
    """Samples' rows, a block of `longest` a ray, and which of them there are."""
    index = dr.arange(UInt32, dr.width(packed) // 2 * longest)
    ray = index // longest
    i = index - ray * longest
    return dr.gather(UInt32, packed, 2 * ray) + i, i < dr.gather(UInt32, packed, 2 * ray + 1)


def _composite(sigma, values, t, dt, row, valid, s):
    longest, n = s["longest"], dr.width(t)
    delta = dr.gather(Float, sigma, row, valid) * dr.gather(Float, dt, row, valid)
    T = dr.exp(-dr.block_prefix_sum(delta, longest))
    w = dr.select(valid & (T >= s["early_stop"]), T * (1 - dr.exp(-delta)), 0)
    weights = dr.zeros(Float, n)
    dr.scatter(weights, w, row, valid)
    colour = [dr.block_sum(w * dr.gather(Float, v, row, valid), longest) for v in values]
    depth = dr.block_sum(w * dr.gather(Float, t, row, valid), longest)
    return colour, dr.block_sum(w, longest), depth, weights


def composite_lit(a, s):
    row, valid = _rows(a["packed"], s["longest"])
    rays = dr.width(a["packed"]) // 2
    ray = dr.arange(UInt32, rays * s["longest"]) // s["longest"]
    view = ray // (rays // (dr.width(a["shading"]) // 7))
    light = [dr.gather(Float, a["shading"], 7 * view + k) for k in range(7)]
    o, d = (Array3f([dr.gather(Float, x, ray) for x in a[k]]) for k in ("rays_o", "rays_d"))
    g, albedo = (Array3f([dr.gather(Float, x, row, valid) for x in a[k]])
                 for k in ("gradient", "albedo"))  # fmt: skip
    t, delta = (dr.gather(Float, a[k], row, valid) for k in ("t", "sigma"))
    delta = delta * dr.gather(Float, a["dt"], row, valid)
    normal = -g * dr.rsqrt(dr.squared_norm(g) + 1e-6)
    facing = dr.dot(normal, dr.normalize(Array3f(light[:3]) - (o + t * d)))
    colour = (light[5] * albedo + light[6]) * (light[3] + light[4] * _relu(facing))
    T = dr.exp(-dr.block_prefix_sum(delta, s["longest"]))
    w = dr.select(valid & (T >= s["early_stop"]), T * (1 - dr.exp(-delta)), 0)
    weights = dr.zeros(Float, dr.width(a["t"]))
    dr.scatter(weights, w, row, valid)
    against = dr.square(_relu(dr.dot(normal, d)))

    def over(x):
        return dr.block_sum(x, s["longest"])

    return ([over(w * c) for c in colour], over(w), over(w * t), weights,
            [over(w * c) for c in normal], over(dr.detach(w) * against))  # fmt: skip


def _relu(x):
    return dr.select(x > 0, x, 0)  # dr.maximum is more than LLVM 14 can do with AVX-512


def frequency_encode(a, s):
    angles = [2.0**k * x for k in range(s["n_frequencies"]) for x in a["x"]]
    pairs = [dr.sincos(angle) for angle in angles]
    return ([p[0] for p in pairs] + [p[1] for p in pairs],)


def hash_encode(a, s):
    return (_hash_encode(a["x"], a["table"], s),)


def hash_encode_inputs(a, s):
    return hash_encode(a, s)


def _hash_encode(x, table, s):
    x, out = [dr.select(c > 0, dr.select(c < 1, c, 1), 0) for c in x], []
    for resolution, start, end in zip(s["resolutions"], s["starts"], s["starts"][1:]):
        pos = [c * resolution for c in x]
        cell = [UInt32(c) for c in pos]
        cell = [dr.select(c < resolution, c, resolution - 1) for c in cell]
        w = [p - Float(c) for p, c in zip(pos, cell)]
        w = [u * u * (3 - 2 * u) for u in w] if s["interpolation"] == "smoothstep" else w
        side = resolution + 1
        dense = side**3 <= end - start
        steps = (1, side, side**2) if dense else (1, 2654435761, 805459861)
        keys = [(c * k, (c + 1) * k) for c, k in zip(cell, steps)]
        features = Array2f(0)
        for corner in itertools.product((0, 1), repeat=3):
            u, v, t = (keys[d][c] for d, c in enumerate(corner))
            row = u + v + t if dense else (u ^ v ^ t) & (end - start - 1)
            weight = math.prod(w[d] if c else 1 - w[d] for d, c in enumerate(corner))
            features += weight * dr.gather(Array2f, table, start + row)
        out += [features.x, features.y]
    return out


def _mix32(h):
    h = (h ^ (h >> 16)) * UInt32(0x7FEB352D)
    h = (h ^ (h >> 15)) * UInt32(0x846CA68B)
    return h ^ (h >> 16)


def _uniform(seed, a, b):
    """The kernels' random numbers of two counters."""
    h = _mix32(_mix32(UInt32((seed + 0x9E3779B9) & 0xFFFFFFFF)) ^ UInt32(seed >> 32))
    return Float(_mix32(_mix32(h ^ a) ^ b) >> 8) * 2.0**-24


def march(a, s):
    return _march(a["rays_o"], a["rays_d"], a["near"], a["far"], a["bitfield"], s)


def _march(o, d, near, far, bitfield, s):
    """All bins of all rays, of which those in set cells are kept."""
    g, bins, capacity, rays = s["resolution"], s["bins"], s["capacity"], dr.width(near)
    index = dr.arange(UInt32, rays * bins)
    ray = index // bins
    i = index - ray * bins
    o, d = ([dr.gather(Float, c, ray) for c in x] for x in (o, d))
    near, far = dr.gather(Float, near, ray), dr.gather(Float, far, ray)
    begin = near + Float(i) * s["step"]
    left = far - begin
    dt = dr.select(left < s["step"], left, s["step"])
    t = begin + _uniform(s["seed"], ray, i) * dt
    p = [b + t * v for b, v in zip(o, d)]
    cell = [dr.floor((c + s["bound"]) * (g / (2 * s["bound"]))) for c in p]
    kept = left > 0
    for c in cell:
        kept &= (c >= 0) & (c < g)
    x, y, z = (UInt32(dr.select(kept, c, 0)) for c in cell)
    cell = (x * g + y) * g + z
    kept &= (dr.gather(UInt32, bitfield, cell >> 3, kept) >> (cell & 7)) & 1 == 1
    one = dr.select(kept, UInt32(1), UInt32(0))
    counts = dr.block_sum(one, bins)
    starts = dr.prefix_sum(counts)
    row = dr.gather(UInt32, starts, ray) + dr.block_prefix_sum(one, bins)
    kept &= row < capacity
    found = [dr.zeros(Float, capacity) for _ in range(5)]
    for target, value in zip(found, (*p, t, dt)):
        dr.scatter(target, value, row, kept)
    return found[:3], *found[3:], [starts, counts], dr.sum(counts)


def mlp(a, s):
    return (_mlp(a["x"], a["params"], s),)


def _mlp(h, params, s):
    """h (n, width), a tensor."""
    start = 0
    for n_in, n_out in itertools.pairwise(s["widths"]):
        h = _relu(h) if start else h
        index = start + dr.arange(UInt32, n_in * n_out)
        h = h @ TensorXf(dr.gather(Float, params, index), (n_out, n_in)).T
        start += n_out * n_in
    return h


def occupancy(a, s):
    g, ema, density = s["resolution"], a["ema"], a["density"]
    index = dr.arange(UInt32, g**3)
    cells = index // (g * g), index // g % g, index % g
    points = [(Float(c) + _uniform(s["seed"], index, UInt32(k))) * (2 * s["bound"] / g) - s["bound"]
              for k, c in enumerate(cells)]  # fmt: skip
    old, new = dr.select(ema > 0, ema * s["decay"], 0), dr.select(density > 0, density, 0)
    ema = dr.select(old > new, old, new)
    mean = dr.mean(ema)
    limit = dr.select(mean < s["threshold"], mean, s["threshold"])
    bits = dr.select(ema > limit, UInt32(1), UInt32(0))
    return points, ema, dr.block_sum(bits << (index & 7), 8)


def radiance(a, s):
    return _radiance(a["out"], a["positions"], s)


def _radiance(out, p, s):
    square = sum(c * c for c in p)
    log_density = out[0] + s["blob_density"] * dr.exp(square * (-0.5 / s["blob_size"] ** 2))
    log_density += s["bias"]
    sigma = dr.exp(dr.select(log_density < s["ceiling"], log_density, s["ceiling"]))
    return sigma, [1 / (1 + dr.exp(-c)) for c in out[1:]]


def generate_rays(a, s):
    height, width = s["height"], s["width"]
    index = dr.arange(UInt32, dr.width(a["focal"]) * height * width)
    view, pixel = index // (height * width), index % (height * width)
    f = dr.gather(Float, a["focal"], view)
    x = (Float(pixel % width) + (0.5 - 0.5 * width)) / f
    y = -(Float(pixel // width) + (0.5 - 0.5 * height)) / f
    m = [[dr.gather(Float, a["c2w"], 12 * view + 4 * i + j) for j in range(4)] for i in range(3)]
    d = dr.normalize(Array3f([r[0] * x + r[1] * y - r[2] for r in m]))
    return [r[3] for r in m], [d.x, d.y, d.z]


def render(a, s):
    rays = (a[k] for k in ("rays_o", "rays_d", "near", "far"))
    return _render(_march(*rays, a["bitfield"], s), a["table"], a["params"], s)


def _render(samples, table, params, s):
    p, t, dt, packed, _ = dr.detach(samples)
    x = [c * (0.5 / s["bound"]) + 0.5 for c in p]
    n, width = dr.width(t), s["widths"][0]
    features = dr.ravel(dr.llvm.ad.ArrayXf(_hash_encode(x, table, s)))
    h = _mlp(TensorXf(features, (n, width)), params, s)
    rows = dr.arange(UInt32, n)
    out = [dr.gather(Float, h.array, 4 * rows + k) for k in range(4)]
    sigma, rgb = _radiance(out, p, FIELD_SETTINGS)
    row, valid = _blocks(packed, s["longest"])
    return _composite(sigma, rgb, t, dt, row, valid, s)[:3]


def _blocks(packed, longest):
    """As _rows, of starts and counts apart."""
    starts, counts = packed
    index = dr.arange(UInt32, dr.width(starts) * longest)
    ray = index // longest
    i = index - ray * longest
    return dr.gather(UInt32, starts, ray) + i, i < dr.gather(UInt32, counts, ray)


def spherical_harmonics(a, s):
    x, y, z = a["dirs"]
    out, c, sine = [None] * s["degree"] ** 2, Float(1), Float(0)
    for m in range(s["degree"]):
        ratio = math.prod((2 * k - 1) / (2 * k) for k in range(1, m + 1))
        norm = math.sqrt((2 * m + 1) / (4 * math.pi) * ratio * (2 if m else 1))
        q, below = Float((-1) ** m * norm), Float(0)
        for n in range(m, s["degree"]):
            out[n * n + n - m], out[n * n + n + m] = q * sine, q * c
            up = math.sqrt((4 * (n + 1) ** 2 - 1) / ((n + 1) ** 2 - m * m))
            down = math.sqrt((n * n - m * m) / (4 * n * n - 1)) if n else 0.0
            q, below = up * (z * q - down * below), q
        c, sine = x * c - y * sine, x * sine + y * c
    return ([v + 0 * x for v in out],)


def step(a, s):
    o, d = generate_rays(a, s)
    middle = -sum(x * y for x, y in zip(o, d))
    gap = s["bound"] ** 2 - sum(dr.square(x + middle * y) for x, y in zip(o, d))
    half, hit = dr.sqrt(dr.select(gap > 0, gap, 1)), gap > 0
    near = dr.select(hit, dr.select(middle > half, middle - half, 0), 0)
    far = dr.select(hit, middle + half, 0)
    samples = _march(o, d, near, far, a["bitfield"], s)

    def colour(x):
        return _render(samples, x["table"], x["params"], s)[:1]

    _, grads = pull(colour, {k: a[k] for k in ("table", "params")}, [a["grad_colour"]])
    found = [
        _adam(a[k], grads[k], *(a[f"{k}_{x}"] for x in ("exp_avg", "exp_avg_sq", "step")), ADAM)
        for k in ("table", "params")
    ]
    return [state[i] for i in range(3) for state in found]


FUNCTIONS = {f.__name__: f for f in (
    adam, composite, composite_lit, frequency_encode, generate_rays, hash_encode,
    hash_encode_inputs, march, mlp, occupancy, radiance, render, spherical_harmonics,
    step)}  # fmt: skip
# Arrays that a call leaves changed for the next one: which of its results they become.
STATE = {"adam": {"param": 0, "exp_avg": 1, "exp_avg_sq": 2}, "occupancy": {"ema": 1},
         "step": {"table": 0, "params": 1, "table_exp_avg": 2, "params_exp_avg": 3,
                  "table_exp_avg_sq": 4, "params_exp_avg_sq": 5}}  # fmt: skip
OPS = {op: functools.partial(prepare, op) for op in FUNCTIONS}
