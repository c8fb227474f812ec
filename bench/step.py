"""One training step without guidance, rays to Adam: by the ops, by their twins, as a CUDA graph.

    python bench/step.py [--size paper|toybox|tiny] [--device cuda|cpu]

The gradient of the picture is random, as if it came from a diffusion model. Prints one line of
JSON a variant, after ANSWER.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import cases
from bench.limits import SIZES
from bench.processes import ANSWER
from bench.timing import SECONDS, Clock
from bench.worker import text
from dreamfusion_fast import ops
from dreamfusion_fast.graph import Captured
from dreamfusion_fast.ops import reference


class Step:
    """Table, MLP and their optimizer's state; __call__ makes one step in place."""

    def __init__(self, module, size: str, device: torch.device, half: bool):
        torch.manual_seed(0)
        self.scene, self.module, self.half = cases.scene(SIZES[size], device), module, half
        s, f = self.scene.size, self.scene.size.field
        table = (2 * torch.rand(sum(s.level_rows), f.features, device=device) - 1) * 1e-4
        weights = [torch.randn(o * i, device=device) * (2 / i) ** 0.5
                   for i, o in itertools.pairwise(s.widths)]  # fmt: skip
        self.params = [x.requires_grad_() for x in (table, torch.cat(weights))]
        self.copies = [x.detach().half() for x in self.params] if half else [None, None]
        self.state = [[torch.zeros_like(x) for _ in range(2)]
                      + [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]
                      for x in self.params]  # fmt: skip
        self.grad = torch.randn(s.rays, s.channels, device=device)
        self.scale = 128.0 if half else 1.0

    def __call__(self) -> None:
        s, m = self.scene.size, self.module
        o, d = (x.reshape(-1, 3) for x in m.generate_rays(self.scene.c2w, self.scene.focal,
                                                            s.pixels, s.pixels))  # fmt: skip
        near, far = m.ray_sphere_intersect(o, d, s.field.radius)
        positions, t, dt, packed, count = self.scene.march(m)(o, d, near, far)
        out = self._field(positions / (2 * s.field.radius) + 0.5, count).float()
        sigma, rgb = out[:, 0].clamp(max=8).exp(), out[:, 1:].sigmoid()
        colour = m.composite(sigma, rgb, t, dt, packed, cases.EARLY_STOP)[0]
        grads = torch.autograd.grad(colour, self.params, self.scale * self.grad)
        for param, grad, copy, state in zip(self.params, grads, self.copies, self.state):
            options = {} if copy is None else {"param_half": copy}
            m.adam_step(param, grad, *state, *cases.ADAM, grad_scale=self.scale, **options)

    def _field(self, x, count):
        (table, weights), f = self.params, self.scene.size.field
        halves = [{"table_half": self.copies[0]}, {"params_half": self.copies[1]}]
        first, second = halves if self.half else ({}, {})
        h = self.module.hash_encode(x, table, **self.scene.size.grid, count=count,
                                    interpolation=f.interpolation, **first)  # fmt: skip
        return self.module.mlp(h, weights, self.scene.size.widths, f.activation, count=count,
                               **second)  # fmt: skip


def graph_of(step: Step) -> Captured:
    """The step, as one CUDA graph; raises where it cannot be captured."""
    captured = Captured(step, step.grad.device)
    for _ in range(Captured.WARM_UP + 1):
        captured()
    captured.scene = step.scene
    return captured


def throughput(step, device: torch.device, steps: int) -> float:
    """Wall microseconds a step, one after another, the host's share included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return 1e6 * (time.perf_counter() - start) / steps


def variants(size: str, device: torch.device) -> dict:
    """Name -> (precision, function that makes a step)."""
    found = {
        "ops": ("fp32", lambda: Step(ops, size, device, False)),
        "twins": ("fp32", lambda: Step(reference, size, device, False)),
    }
    if device.type == "cuda":
        found["ops graph"] = ("fp32", lambda: graph_of(Step(ops, size, device, False)))
        found["ops half"] = ("half", lambda: Step(ops, size, device, True))
        found["ops half graph"] = ("half", lambda: graph_of(Step(ops, size, device, True)))
    return found


def measure(name, precision, make, size, device, seconds) -> dict:
    row = {"variant": name, "precision": precision, "size": size}
    try:
        step = make()
        samples = getattr(step, "scene", None)
        row.update(Clock(device, seconds).measure(step))
        row["wall_us"] = throughput(step, device, max(3, row["repeats"] // 2))
        return row | ({"samples_per_ray": samples.size.samples} if samples else {})
    except Exception as problem:
        return {**row, "error": text(problem)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one measurement")
    options = parser.parse_args()
    device = torch.device(options.device)
    for name, (precision, make) in variants(options.size, device).items():
        row = measure(name, precision, make, options.size, device, options.seconds)
        print(ANSWER + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
