"""The embedded prior's U-Net on a CPU: layout, precision, compiled or not, side by side.

python bench/guidance_cpu.py [--views 4] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch

from dreamfusion_fast import camera, guidance
from dreamfusion_fast.guidance.protocol import conditions_of


def contenders(views: int) -> dict:
    """name -> function() that makes the U-Net's predictions for both halves of guidance."""
    made = {}
    for name, dtype, layout, compiled in (
        ("float32", "fp32", torch.contiguous_format, False),
        ("float32, channels last", "fp32", torch.channels_last, False),
        ("bfloat16, channels last", "bf16", torch.channels_last, False),
        ("float32, channels last, compiled", "fp32", torch.channels_last, True),
        ("bfloat16, channels last, compiled", "bf16", torch.channels_last, True),
    ):
        guide = guidance.load("toybox", "cpu", dtype)
        guide.unet.to(memory_format=layout)
        if compiled:
            guide.unet.compile(dynamic=False)
        torch.manual_seed(0)
        size, channels = guide.unet.config.sample_size, guide.unet.config.in_channels
        z = torch.randn(2 * views, channels, size, size).to(guide.dtype)
        z, t = z.contiguous(memory_format=layout), torch.full((2 * views,), 500)
        text = guide.embed(["a red car"] * 2 * views)
        cameras = camera.orbit([0.0] * views, 20.0, 1.4, 1.0)
        made[name] = partial(guide.predict, z, t, conditions_of(text, cameras, 2))
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    o = parser.parse_args()
    made, seconds = contenders(o.views), {}
    want = None
    for name, predict in made.items():
        began = time.perf_counter()
        out = predict().float()
        want = out if want is None else want
        error = ((out - want).norm() / want.norm()).item()
        print(f"{name}: first call {time.perf_counter() - began:.1f} s, differs by {error:.1e}")
    for k in range(o.rounds):
        order = list(made) if k % 2 else list(made)[::-1]
        for name in order:
            began = time.perf_counter()
            made[name]()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    first = statistics.median(next(seconds[n] for n in made))
    for name in made:
        ms = sorted(1e3 * s for s in seconds[name])
        low, high = ms[len(ms) // 5], ms[-1 - len(ms) // 5]
        print(
            f"{name:35}{statistics.median(ms):7.1f} ms ({low:.1f} to {high:.1f}),"
            f" {1e3 * first / statistics.median(ms):.2f} times the first"
        )


if __name__ == "__main__":
    main()
