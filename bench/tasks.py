"""What `make bench` measures: each op's inputs, torch function, counted work, and sizes.

A Task is made of plain numpy arrays and settings, so that every contender gets the same files. Its
`run` is torch code: with `m` = dreamfusion_fast.ops it is ours, with ops.reference the eager twin,
compiled it is torch.compile. How to add one: bench/README.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

import numpy as np
import torch

from bench import cases
from bench.limits import PAPER_FIELD, Size
from bench.model import SPECIAL
from bench.task import Arrays, hash_flops, hash_gathers, mlp_flops, task
from dreamfusion_fast import ops
from dreamfusion_fast.config import FieldConfig

FIELD_SETTINGS = {"bias": -2.0, "ceiling": 8.0, "blob_density": 5.0, "blob_size": 0.2}
ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-15}
FUSED = ("render",)  # which ours may have besides the single ops
FREQUENCIES, DEGREE, SEED = 8, 4, 7

SIZES = {
    "small": Size("small", 1, 16, bins=48, samples=24),
    "paper": Size("paper", 1, 64, bins=128, samples=64, field=PAPER_FIELD,
                  occupancy_resolution=128),
    "large": Size("large", 1, 256, bins=128, samples=64, field=PAPER_FIELD,
                  occupancy_resolution=128),
    # No empty space, tables that fit a core's cache, and the narrow network of many a NeRF.
    "compact": Size("compact", 1, 64, bins=64, samples=64,
                    field=FieldConfig(n_levels=8, base_resolution=16, finest_resolution=1024,
                                      log2_table_size=16, hidden=32, hidden_layers=2)),
}  # fmt: skip
AND_COMPACT = ("small", "paper", "large", "compact")


# ---- inputs -------------------------------------------------------------------------------------
def _rand(*shape, low=0.0, high=1.0) -> np.ndarray:
    return (low + (high - low) * torch.rand(*shape)).numpy()


def _randn(*shape) -> np.ndarray:
    return torch.randn(*shape).numpy()


def _samples(size: Size) -> tuple[cases.Scene, dict]:
    """A marched scene, and its samples without the empty rows of the buffer."""
    scene = cases.scene(size, torch.device("cpu"))
    n = int(scene.samples.count)
    names = ("positions", "t", "dt")
    arrays = {k: getattr(scene.samples, k)[:n].numpy() for k in names}
    return scene, arrays | {"packed": scene.samples.packed.numpy()}


def _march(scene: cases.Scene) -> tuple[Arrays, dict]:
    arrays = dict(zip(("rays_o", "rays_d", "near", "far"), (x.numpy() for x in scene.rays)))
    settings = {"resolution": scene.size.occupancy_resolution, "bound": scene.size.field.radius,
                "step": scene.step, "capacity": scene.capacity, "seed": SEED}  # fmt: skip
    bins = float((scene.rays[3] - scene.rays[2]).max()) / scene.step
    longest = int(scene.samples.packed[:, 1].max())
    settings |= {"bins": int(bins) + 1, "longest": longest}  # for peers that need static shapes
    return arrays | {"bitfield": scene.bitfield.numpy()}, settings


def _grid(size: Size) -> tuple[np.ndarray, dict]:
    """The table, and the layout of its levels."""
    resolutions, starts = ops.hash_table_rows(**size.grid)
    table = _rand(starts[-1], size.field.features, low=-0.1, high=0.1)
    layout = {"resolutions": list(resolutions), "starts": list(starts)}
    return table, {"grid": size.grid, "interpolation": size.field.interpolation} | layout


def _network(size: Size) -> tuple[np.ndarray, dict]:
    layers = [_randn(o, i) * (2 / i) ** 0.5 for i, o in itertools.pairwise(size.widths)]
    params = np.concatenate([x.ravel() for x in layers])
    return params, {"widths": size.widths, "activation": size.field.activation}


# One block a stem, alphabetical.


# ---- adam ---------------------------------------------------------------------------------------
def _adam_run(m, a, s):
    """In place; v is far from zero, so that an update does not hang on a gradient's sign."""
    m.adam_step(a["param"], a["grad"], a["exp_avg"], a["exp_avg_sq"], a["step"], a["skipped"], **s)
    return a["param"], a["exp_avg"], a["exp_avg_sq"]


def _adam_state(param: np.ndarray) -> Arrays:
    n = param.shape
    return {"param": param, "exp_avg": _randn(*n) * 0.1, "exp_avg_sq": _rand(*n, low=0.5),
            "step": np.array([100], np.int32), "skipped": np.zeros(1, np.int32)}  # fmt: skip


@task(run=_adam_run, in_place=True,
      flops=lambda a, s, backward: a["param"].size * (13 + 2.0 * SPECIAL))  # fmt: skip
def adam(size):
    """The field's table, flat."""
    n = sum(size.level_rows) * size.field.features
    return _adam_state(_randn(n)) | {"grad": _randn(n)}, dict(ADAM)


# ---- composite ----------------------------------------------------------------------------------
@task(gradients=("sigma", "rgb"), tolerance=2e-3,
      run=lambda m, a, s: m.composite(a["sigma"], a["rgb"], a["t"], a["dt"], a["packed"],
                                      s["early_stop"]),
      flops=lambda a, s, backward: len(a["t"]) * (SPECIAL + 14.0) * (1 + backward))  # fmt: skip
def composite(size):
    scene, arrays = _samples(size)
    n = len(arrays["t"])
    del arrays["positions"]
    arrays |= {"sigma": _rand(n, high=20.0), "rgb": _rand(n, size.channels)}
    return arrays, {"early_stop": cases.EARLY_STOP, "longest": _march(scene)[1]["longest"]}


def _lit_run(m, a, s):
    names = ("sigma", "albedo", "gradient", "t", "dt", "packed", "rays_o", "rays_d", "shading")
    return m.composite_lit(*(a[k] for k in names), s["early_stop"])


@task(gradients=("sigma", "albedo", "gradient"), run=_lit_run, tolerance=2e-3,
      flops=lambda a, s, backward: len(a["t"]) * (3 * SPECIAL + 74.0) * (1 + backward))  # fmt: skip
def composite_lit(size):
    """A light beside the camera, albedo and textureless in equal parts."""
    scene, arrays = _samples(size)
    n = len(arrays["t"])
    del arrays["positions"]
    light = scene.c2w[:, :, 3].numpy() + 0.3 * _randn(size.views, 3)
    constants = np.tile(np.float32([0.1, 0.9, 0.5, 0.5]), (size.views, 1))
    arrays |= {"sigma": _rand(n, high=20.0), "albedo": _rand(n, 3), "gradient": 20 * _randn(n, 3),
               "rays_o": scene.rays[0].numpy(), "rays_d": scene.rays[1].numpy(),
               "shading": np.concatenate((light, constants), 1)}  # fmt: skip
    return arrays, {"early_stop": cases.EARLY_STOP, "longest": _march(scene)[1]["longest"]}


# ---- frequency_encode ---------------------------------------------------------------------------
@task(gradients=("x",), run=lambda m, a, s: m.frequency_encode(a["x"], s["n_frequencies"]),
      flops=lambda a, s, b: a["x"].size * s["n_frequencies"] * (1 + 2.0 * SPECIAL + 4 * b),
      tolerance=1e-3)  # fmt: skip
def frequency_encode(size):
    """Samples' positions, as the paper's field encodes them."""
    return {"x": _samples(size)[1]["positions"]}, {"n_frequencies": FREQUENCIES}


# ---- hash_encode --------------------------------------------------------------------------------
def _hash_run(m, a, s):
    return m.hash_encode(a["x"], a["table"], **s["grid"], interpolation=s["interpolation"])


@task(gradients=("table",), run=_hash_run, sizes=AND_COMPACT,
      flops=lambda a, s, backward: hash_flops(len(a["x"]), s, backward),
      gathers=lambda a, s, backward: hash_gathers(len(a["x"]), s, backward))  # fmt: skip
def hash_encode(size):
    """Positions of samples in the unit cube, ray after ray."""
    positions = _samples(size)[1]["positions"]
    table, settings = _grid(size)
    return {"x": positions / (2 * size.field.radius) + np.float32(0.5), "table": table}, settings


@task(gradients=("table", "x"), run=_hash_run, sizes=("compact",), forward=False, tolerance=1e-3,
      flops=lambda a, s, backward: hash_flops(len(a["x"]), s, backward),
      gathers=lambda a, s, backward: hash_gathers(len(a["x"]), s, backward, True))  # fmt: skip
def hash_encode_inputs(size):
    """hash_encode with the gradient of the positions, too."""
    return hash_encode(size)


# ---- march --------------------------------------------------------------------------------------
def march_run(m, a, s):
    names = ("rays_o", "rays_d", "near", "far", "bitfield")
    return tuple(m.march(*(a[k] for k in names), *(s[k] for k in MARCH)))


MARCH = ("resolution", "bound", "step", "capacity", "seed")


@task(run=march_run, flops=lambda a, s, backward: len(a["near"]) * s["bins"] * 48.0,
      outliers=0.01, tolerance=1e-3)  # fmt: skip
def march(size):
    return _march(cases.scene(size, torch.device("cpu")))


# ---- mlp ----------------------------------------------------------------------------------------
@task(gradients=("x", "params"),
      run=lambda m, a, s: m.mlp(a["x"], a["params"], s["widths"], s["activation"]),
      flops=lambda a, s, b: mlp_flops(len(a["x"]), s["widths"], b), tolerance=1e-3)  # fmt: skip
def mlp(size):
    params, settings = _network(size)
    return {"x": _randn(int(size.rows), size.widths[0]), "params": params}, settings


# ---- occupancy ----------------------------------------------------------------------------------
def _occupancy_run(m, a, s):
    points = m.occupancy_points(s["resolution"], s["bound"], s["seed"])
    m.occupancy_update(a["ema"], a["bitfield"], a["density"], s["decay"], s["threshold"])
    return points, a["ema"], a["bitfield"]


@task(run=_occupancy_run, outliers=1e-4, in_place=True,
      flops=lambda a, s, backward: a["ema"].size * 54.0)  # fmt: skip
def occupancy(size):
    """A point in each cell, and the grid's update by the densities there."""
    g = size.occupancy_resolution
    arrays = {"ema": _rand(g**3), "density": _rand(g**3), "bitfield": np.zeros(g**3 // 8, np.uint8)}
    return arrays, {"resolution": g, "bound": size.field.radius, "seed": SEED,
                    "decay": cases.DECAY, "threshold": 0.7}  # fmt: skip


# ---- radiance -----------------------------------------------------------------------------------
def _radiance_run(m, a, s):
    return tuple(m.radiance(a["out"], a["positions"], **s)[:2])


@task(gradients=("out",), run=_radiance_run,
      flops=lambda a, s, b: len(a["out"]) * (10 + SPECIAL * 5.0 + 16 * b))  # fmt: skip
def radiance(size):
    positions = _samples(size)[1]["positions"]
    return {"out": _randn(len(positions), 4), "positions": positions}, dict(FIELD_SETTINGS)


# ---- rays ---------------------------------------------------------------------------------------
@task(run=lambda m, a, s: m.generate_rays(a["c2w"], a["focal"], s["height"], s["width"]),
      flops=lambda a, s, b: len(a["c2w"]) * s["height"] * s["width"] * (27.0 + SPECIAL),
)  # fmt: skip
def generate_rays(size):
    scene = cases.scene(size, torch.device("cpu"))
    arrays = {"c2w": scene.c2w.numpy(), "focal": scene.focal.numpy()}
    return arrays, {"height": size.pixels, "width": size.pixels}


# ---- spherical_harmonics ------------------------------------------------------------------------
@task(gradients=("dirs",), run=lambda m, a, s: m.spherical_harmonics(a["dirs"], s["degree"]),
      flops=lambda a, s, b: len(a["dirs"]) * s["degree"] ** 2 * (14.0 if b else 6.0))  # fmt: skip
def spherical_harmonics(size):
    dirs = torch.nn.functional.normalize(torch.randn(int(size.rows), 3), dim=-1)
    return {"dirs": dirs.numpy()}, {"degree": DEGREE}


# ---- render, and a step -------------------------------------------------------------------------
def _field(m, a, s):
    """The query of ops.render: positions and count to density and colour."""

    def query(positions, count):
        x = positions / (2 * s["bound"]) + 0.5
        features = m.hash_encode(x, a["table"], **s["grid"], interpolation=s["interpolation"],
                                 count=count)  # fmt: skip
        out = m.mlp(features, a["params"], s["widths"], s["activation"], count=count)
        return m.radiance(out, positions, **FIELD_SETTINGS, count=count)

    return query


def _unfused(m, a, s):
    """Colour, opacity and depth of rays by the single ops of m."""
    positions, t, dt, packed, count = march_run(m, a, s)
    sigma, rgb, _ = _field(m, a, s)(positions, count)
    return m.composite(sigma, rgb, t, dt, packed, s["early_stop"])[:3]


def _render_run(m, a, s):
    """The fused op where m has one, else the single ops."""
    if not hasattr(m, "render"):
        return _unfused(m, a, s)
    rays = [a[k] for k in ("rays_o", "rays_d", "near", "far")]
    grid = a["bitfield"], *(s[k] for k in ("resolution", "bound", "step"))
    return m.render(_field(m, a, s), (a["table"], a["params"]), rays, grid, s["seed"],
                    early_stop=s["early_stop"], bins=s["bins"])[:3]  # fmt: skip


def _render_flops(a, s, backward):
    n = s["count"]
    own = s["bins"] * len(a["near"]) * 48.0 + n * (6 * SPECIAL + 24.0) * (1 + backward)
    return own + hash_flops(n, s, backward) + mlp_flops(n, s["widths"], backward)


def _render_gathers(a, s, backward):
    return hash_gathers(s["count"], s, backward)


@task(gradients=("table", "params"), run=_render_run, flops=_render_flops,
      gathers=_render_gathers, tolerance=5e-3, outliers=1e-3, sizes=AND_COMPACT)  # fmt: skip
def render(size):
    scene = cases.scene(size, torch.device("cpu"))
    arrays, settings = _march(scene)
    table, grid = _grid(size)
    params, network = _network(size)
    settings |= grid | network | {"early_stop": cases.EARLY_STOP, "count": int(scene.samples.count)}
    return arrays | {"table": table, "params": params * np.float32(0.5)}, settings


def _step_run(m, a, s):
    """Rays, render, the gradients of its parameters by a random gradient of the picture, Adam."""
    o, d = (x.reshape(-1, 3) for x in m.generate_rays(a["c2w"], a["focal"], s["height"],
                                                        s["width"]))  # fmt: skip
    near, far = m.ray_sphere_intersect(o, d, s["bound"])
    inputs = a | {"rays_o": o, "rays_d": d, "near": near, "far": far}
    params = [a[k].detach().requires_grad_() for k in ("table", "params")]
    inputs |= dict(zip(("table", "params"), params))
    with torch.enable_grad():
        colour = _unfused(m, inputs, s)[0]
        grads = torch.autograd.grad(colour, params, a["grad_colour"])
    for name, grad in zip(("table", "params"), grads):
        state = [a[f"{name}_{k}"] for k in ("exp_avg", "exp_avg_sq", "step", "skipped")]
        m.adam_step(a[name], grad, *state, **ADAM)
    names = ("", "_exp_avg", "_exp_avg_sq")
    return tuple(a[f"{name}{k}"] for k in names for name in ("table", "params"))


def _step_flops(a, s, backward):
    return _render_flops(a, s, True) + (a["table"].size + a["params"].size) * (13 + 2.0 * SPECIAL)


@task("step", run=_step_run, flops=_step_flops, outliers=1e-3, tolerance=5e-3, in_place=True,
      gathers=lambda a, s, backward: _render_gathers(a, s, True))  # fmt: skip
def step(size):
    """A training step without guidance, from cameras to updated parameters."""
    arrays, settings = render(size)
    more, shape = generate_rays(size)
    for name in ("table", "params"):
        state = _adam_state(arrays[name])
        arrays |= {f"{name}_{k}": x for k, x in state.items() if k != "param"}
    arrays["grad_colour"] = _randn(size.rays, 3)
    return arrays | more, settings | shape


# ---- growth -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Curve:
    """Sizes along which one parameter grows: the value to the size."""

    op: str
    parameter: str
    sizes: dict[int, Size] = field(default_factory=dict)


def _paper(**changes) -> Size:
    return dataclasses.replace(SIZES["paper"], **changes)


def _paper_grid(**changes) -> Size:
    return _paper(field=dataclasses.replace(PAPER_FIELD, **changes))


def curves() -> list[Curve]:
    """Of the hash encoding, and of render, or of composite where render is not there."""
    picture = "render" if hasattr(ops, "render") else "composite"
    return [
        Curve("hash_encode", "points",
              {64 * p * p: _paper(pixels=p) for p in (8, 16, 32, 64, 128)}),
        Curve("hash_encode", "levels", {n: _paper_grid(n_levels=n) for n in (2, 4, 8, 16)}),
        Curve("hash_encode", "log2 table size",
              {n: _paper_grid(log2_table_size=n) for n in (14, 16, 18, 20, 22)}),
        Curve(picture, "rays", {p * p: _paper(pixels=p) for p in (16, 32, 64, 128)}),
        Curve(picture, "samples", {n: _paper(samples=n, bins=2 * n) for n in (8, 16, 32, 64, 128)}),
    ]  # fmt: skip
