"""What a call costs beside its arithmetic: `python bench/overhead.py`.

Four points go through one small op, spherical_harmonics, in three ways: the kernel by addresses, a
plain torch.autograd.Function around it, and the registered op, which checks its arguments and is
known to torch.compile, torch.func, torch.autocast and the dispatcher. Microseconds of CPU time,
medians of rounds in which the ways take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dreamfusion_fast import _cpu, ops

DEGREE, CALLS, ROUNDS = 3, 500, 21


class Plain(torch.autograd.Function):
    """The least that makes the kernel differentiable."""

    @staticmethod
    def forward(ctx, dirs):
        ctx.save_for_backward(dirs)
        out = dirs.new_empty(len(dirs), DEGREE**2)
        _cpu.spherical_harmonics_forward(
            0, dirs.data_ptr(), out.data_ptr(), 0, len(dirs), DEGREE, 0
        )
        return out

    @staticmethod
    def backward(ctx, grad_out):
        (dirs,) = ctx.saved_tensors
        grad = torch.empty_like(dirs)
        _cpu.spherical_harmonics_backward(
            0, dirs.data_ptr(), grad_out.data_ptr(), grad.data_ptr(), 0, len(dirs), DEGREE, 0
        )
        return grad


def ways(n: int = 4) -> dict:
    """(way, pass) -> function without arguments. The kernel's own backward is a second call."""
    dirs = torch.nn.functional.normalize(torch.ones(n, 3), dim=-1)
    leaf, out, grad = dirs.clone().requires_grad_(), torch.empty(n, DEGREE**2), torch.ones(n, 3)
    ones = torch.ones_like(out)
    into = 0, dirs.data_ptr(), out.data_ptr(), 0, n, DEGREE, 0
    back = 0, dirs.data_ptr(), ones.data_ptr(), grad.data_ptr(), 0, n, DEGREE, 0

    def kernel(kept=(dirs, out, grad, ones)):  # the addresses' owners
        _cpu.spherical_harmonics_forward(*into)

    def kernel_twice():
        kernel()
        _cpu.spherical_harmonics_backward(*back)

    def op(x):
        return ops.spherical_harmonics(x, DEGREE)

    def both(function):
        return lambda: torch.autograd.grad(function(leaf), leaf, ones)

    return {
        ("kernel", "forward"): kernel,
        ("kernel", "both"): kernel_twice,
        ("autograd.Function", "forward"): lambda: Plain.apply(leaf),
        ("autograd.Function", "both"): both(Plain.apply),
        ("op", "no gradient"): lambda: op(dirs),
        ("op", "forward"): lambda: op(leaf),
        ("op", "both"): both(op),
    }


def measure(functions: dict, calls: int = CALLS, rounds: int = ROUNDS) -> dict:
    """key -> median microseconds a call."""
    times: dict = {key: [] for key in functions}
    for _ in range(rounds + 1):
        for key, function in functions.items():
            began = time.process_time()
            for _ in range(calls):
                function()
            times[key].append((time.process_time() - began) / calls * 1e6)
    return {key: statistics.median(values[1:]) for key, values in times.items()}  # one warm-up


def table(medians: dict) -> str:
    passes = ("no gradient", "forward", "both")
    rows = [f"{'µs a call':20} {passes[0]:>12} {passes[1]:>12} {'+ backward':>12}"]
    for way in dict.fromkeys(way for way, _ in medians):
        cells = [medians.get((way, each)) for each in passes]
        rows.append(
            f"{way:20} " + " ".join(f"{'' if c is None else f'{c:.1f}':>12}" for c in cells)
        )
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(measure(ways())))
