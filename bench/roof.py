"""The machine's measured limits: multiply-adds, reads, random reads by table size.

    python bench/roof.py

prints them; `make bench` measures them first.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

import numpy as np
import torch

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread")
NAMES = {"fma": "multiply-adds", "read": "memory", "gather": "random reads"}


def measure(threads: int | None = None, scale: float = 1.0) -> dict:
    """Limits of the GPU, if there is one, else of the CPU: fma_gflops, read_gbs, and gather, rows
    of bytes and g_per_s. scale: of the work, for tests. Raises RuntimeError without a g++."""
    if torch.cuda.is_available() and threads is None:
        return gpu_limits()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("bench/roof.cpp: expected a C++ compiler, got no g++ (or $CXX)")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "roof"
        subprocess.run([compiler, *FLAGS, SOURCE, "-o", binary], check=True)
        count = threads or len(os.sched_getaffinity(0))
        found = subprocess.run([binary, str(count), str(scale)], check=True, capture_output=True)
    return {**json.loads(found.stdout), "threads": count}


def gpu_limits() -> dict:
    """float32 products of matrices without TF32, and a sum over a gibibyte; gathers: none."""
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.rand(8192, 8192, device="cuda")
    big = torch.rand(1 << 28, device="cuda")

    def seconds(call) -> float:
        found = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        return min(found)

    return {"fma_gflops": 2e-9 * 8192**3 / seconds(lambda: x @ x),
            "read_gbs": 1e-9 * big.nbytes / seconds(big.sum), "gather": []}  # fmt: skip


def gather_rate(limits: dict, size: float) -> float:
    """Random reads a second of a table of `size` bytes, between the measured sizes by logarithms;
    of smaller and larger ones as of the smallest and largest measured."""
    points = [(math.log(g["bytes"]), math.log(1e9 * g["g_per_s"])) for g in limits["gather"]]
    return math.exp(np.interp(math.log(size), *zip(*points))) if points else math.inf


def floor(work: dict, limits: dict) -> tuple[float, str | None]:
    """Seconds that the work cannot undercut, and the name of the limit. work: bytes, flops,
    gathers (number, bytes of the table)."""
    reads = sum(n / gather_rate(limits, size) for n, size in work["gathers"])
    times = {"fma": work["flops"] * 1e-9 / limits["fma_gflops"],
             "read": work["bytes"] * 1e-9 / limits["read_gbs"], "gather": reads}  # fmt: skip
    largest = max(times, key=times.get)
    return times[largest], NAMES[largest]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
