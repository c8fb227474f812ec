"""Taichi: the hash encoding, a parallel loop over points; its gradient a kernel with atomics."""

import numpy as np
import taichi as ti

vec3 = ti.types.vector(3, ti.f32)


def start(name: str) -> str:
    ti.init(arch=ti.cpu, offline_cache=False, log_level=ti.ERROR)
    return ".".join(map(str, ti.__version__))


@ti.func
def row_of(cell, corner, side: ti.u32, rows: ti.u32):
    """The row of a corner of a cell in its level."""
    c = cell + corner
    found = c[0] + side * (c[1] + side * c[2])
    if side * side * side > rows:
        found = (c[0] ^ (c[1] * ti.u32(2654435761)) ^ (c[2] * ti.u32(805459861))) & (rows - 1)
    return found


@ti.kernel
def run(x: ti.types.ndarray(vec3, 1), table: ti.types.ndarray(ti.f32, 2),
        resolutions: ti.types.ndarray(ti.i32, 1), starts: ti.types.ndarray(ti.i32, 1),
        out: ti.types.ndarray(ti.f32, 2), smooth: ti.i32, backward: ti.template()):  # fmt: skip
    """Features of points; backward: `table` receives the gradient for that of `out`."""
    for point in range(x.shape[0]):
        for level in range(resolutions.shape[0]):
            n, start = resolutions[level], starts[level]
            position = ti.math.clamp(x[point], 0.0, 1.0) * n
            base = ti.min(ti.floor(position), n - 1.0)
            w = position - base
            if smooth:
                w = w * w * (3.0 - 2.0 * w)
            cell = ti.cast(base, ti.u32)
            f = ti.Vector([0.0, 0.0])
            for k in ti.static(range(8)):
                corner = ti.Vector([k & 1, k >> 1 & 1, k >> 2], ti.u32)
                weight = 1.0
                for d in ti.static(range(3)):
                    weight *= w[d] if k >> d & 1 else 1.0 - w[d]
                rows = ti.cast(starts[level + 1] - start, ti.u32)
                row = start + ti.cast(row_of(cell, corner, ti.cast(n + 1, ti.u32), rows), ti.i32)
                for c in ti.static(range(2)):
                    if ti.static(backward):
                        table[row, c] += weight * out[point, 2 * level + c]
                    else:
                        f[c] += weight * table[row, c]
            if ti.static(not backward):
                for c in ti.static(range(2)):
                    out[point, 2 * level + c] = f[c]


def hash_encode(arrays: dict, settings: dict, backward: bool):
    layout = [np.array(settings[k], np.int32) for k in ("resolutions", "starts")]
    smooth = int(settings["interpolation"] == "smoothstep")
    x = ti.Vector.ndarray(3, ti.f32, len(arrays["x"]))
    x.from_numpy(arrays["x"])
    table, out, grad, cotangent = (ti.ndarray(ti.f32, shape) for shape in (
        arrays["table"].shape, (len(arrays["x"]), 2 * len(layout[0])), arrays["table"].shape,
        (len(arrays["x"]), 2 * len(layout[0]))))  # fmt: skip
    table.from_numpy(arrays["table"])
    if backward:
        cotangent.from_numpy(arrays["g0"])

    def call():
        run(x, table, *layout, out, smooth, False)
        if backward:
            grad.fill(0.0)
            run(x, grad, *layout, cotangent, smooth, True)
        ti.sync()

    return call, lambda: [out.to_numpy(), *([grad.to_numpy()] if backward else [])]


OPS = {"hash_encode": hash_encode}
