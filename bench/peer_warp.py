"""Warp: the hash encoding, a kernel over points; its gradient by Warp's generated adjoint. On a CPU
Warp runs one thread."""

import numpy as np
import warp as wp


def start(name: str) -> str:
    wp.config.quiet = True
    wp.init()
    return f"{wp.config.version} {wp.get_device()}"


@wp.func
def row_of(i: wp.uint32, j: wp.uint32, k: wp.uint32, side: wp.uint32, rows: wp.uint32):
    """The row of a corner in its level."""
    found = i + side * (j + side * k)
    if side * side * side > rows:
        found = (i ^ (j * wp.uint32(2654435761)) ^ (k * wp.uint32(805459861))) & (
            rows - wp.uint32(1)
        )
    return wp.int32(found)


@wp.func
def part(w: float, upper: int):
    if upper == 1:
        return w
    return 1.0 - w


@wp.kernel
def encode(x: wp.array(dtype=wp.vec3), table: wp.array(dtype=wp.vec2),
           resolutions: wp.array(dtype=int), starts: wp.array(dtype=int),
           smooth: int, out: wp.array2d(dtype=wp.vec2)):  # fmt: skip
    point, level = wp.tid()
    n, start = resolutions[level], starts[level]
    side, rows = wp.uint32(n + 1), wp.uint32(starts[level + 1] - start)
    p = x[point] * float(n)
    limit = float(n) - 1.0
    a = wp.clamp(wp.floor(p[0]), 0.0, limit)
    b = wp.clamp(wp.floor(p[1]), 0.0, limit)
    c = wp.clamp(wp.floor(p[2]), 0.0, limit)
    u, v, w = p[0] - a, p[1] - b, p[2] - c
    if smooth == 1:
        u, v, w = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v), w * w * (3.0 - 2.0 * w)
    f = wp.vec2(0.0, 0.0)
    for k in range(8):
        i, j, m = k % 2, (k // 2) % 2, k // 4
        row = row_of(wp.uint32(a) + wp.uint32(i), wp.uint32(b) + wp.uint32(j),
                     wp.uint32(c) + wp.uint32(m), side, rows)  # fmt: skip
        f += part(u, i) * part(v, j) * part(w, m) * table[start + row]
    out[point, level] = f


def hash_encode(arrays: dict, settings: dict, backward: bool):
    x, levels = wp.array(arrays["x"], dtype=wp.vec3), len(settings["resolutions"])
    table = wp.array(arrays["table"], dtype=wp.vec2, requires_grad=backward)
    out = wp.empty((len(x), levels), dtype=wp.vec2, requires_grad=backward)
    layout = [wp.array(settings[k], dtype=int) for k in ("resolutions", "starts")]
    smooth = int(settings["interpolation"] == "smoothstep")
    cotangent = backward and wp.array(arrays["g0"].reshape(len(x), levels, 2), dtype=wp.vec2)
    inputs = [x, table, *layout, smooth]

    def call():
        wp.launch(encode, (len(x), levels), inputs, [out])
        if backward:
            table.grad.zero_()
            wp.copy(out.grad, cotangent)
            wp.launch(encode, (len(x), levels), inputs, [out], adjoint=True,
                      adj_inputs=[None, table.grad, None, None, None],
                      adj_outputs=[out.grad])  # fmt: skip
        wp.synchronize()

    def outputs():
        features = out.numpy().reshape(len(x), -1)
        return [features, np.array(table.grad.numpy())] if backward else [features]

    return call, outputs


OPS = {"hash_encode": hash_encode}
