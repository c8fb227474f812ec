"""The arithmetic around the U-Net, ours against the usual lines, eager and compiled:

    python bench/sds.py [--device cuda|cpu] [--views 4] [--channels 4] [--size 64]

Prints medians and ratios of one side-by-side run. On a GPU ours are the two Triton kernels; on a
CPU their twins, whose noise is Philox's, counter by counter, where torch.randn's is sequential.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.timing import Clock
from dreamfusion_fast import sds

SCALE = 99.0
ROUNDS = 5  # of every contender, in turn


def usual(z, t, alphas, weights, prediction):
    """What threestudio and its kin write, for one step."""
    a = alphas[t][:, None, None, None]
    noise = torch.randn_like(z)
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    model_input = torch.cat([z_t] * 2).to(prediction.dtype)
    cond, uncond = prediction.float().chunk(2)
    guided = uncond + (1 + SCALE) * (cond - uncond)
    gradient = weights[t][:, None, None, None] * (guided - noise)
    return model_input, torch.nan_to_num(gradient) / len(z)


def ours(z, t, alphas, weights, prediction, seed, bad):
    noise = None if z.is_cuda else sds.normals(seed, len(z), z[0].numel())
    model_input = sds.perturb(z, t, seed, alphas, 2, prediction.dtype, noise=noise)
    gradient = sds.guide(
        prediction, model_input, t, seed, alphas, weights, bad, SCALE, share=1 / len(z), noise=noise
    )
    return model_input, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    o = parser.parse_args()
    device = torch.device(o.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shape = (o.views, o.channels, o.size, o.size)
    z, prediction = torch.randn(shape, device=device), torch.randn(2 * o.views, *shape[1:])
    prediction = prediction.to(device, dtype)
    alphas = torch.linspace(0.999, 0.001, 1000, device=device)
    step = z, torch.randint(0, 1000, (o.views,), device=device), alphas, 1 - alphas, prediction
    seed = torch.tensor([7], device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    compiled = torch.compile(usual)
    contenders = {
        "ours": lambda: ours(*step, seed, bad),
        "eager": lambda: usual(*step),
        "torch.compile": lambda: compiled(*step),
    }
    times = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            times[name].append(Clock(device, 0.3).measure(call)["median_us"])
    median = {name: sorted(x)[ROUNDS // 2] for name, x in times.items()}
    numbers = z.numel() * (4 + 2 * dtype.itemsize) + z.numel() * (2 * dtype.itemsize + 4)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{card}, {shape}, {numbers} bytes at least\n")
    print("| | median us | x ours |\n|---|---:|---:|")
    for name, us in median.items():
        print(f"| {name} | {us:.0f} | {us / median['ours']:.2f} |")


if __name__ == "__main__":
    main()
