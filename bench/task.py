"""What a task of `make bench` is, and what contenders get of it; the tasks are in tasks.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

import numpy as np
import torch

from bench.limits import Size
from dreamfusion_fast import ops

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """`make(size)` gives arrays and settings, `run(m, arrays, settings)` the results: a tensor or
    a tuple. With `gradients`, names of arrays, there is also a forward+backward pass. `flops` of
    (arrays, settings, backward) counts operations: 1 for an addition or multiplication, SPECIAL
    for exp, sin, division or root. `gathers` counts random 8-byte reads: pairs (number, bytes of
    the table). Contenders agree where no number of a result differs by more than `tolerance` of
    the largest one, but for a share of `outliers`: in the second call, or, if the op works
    `in_place` and each call goes on from the last one, in the first. It is raced at `sizes`, and if
    `forward`, also without gradients."""

    name: str
    make: Callable[[Size], tuple[Arrays, dict]]
    run: Callable
    gradients: tuple[str, ...] = ()
    flops: Callable[[Arrays, dict, bool], float] = lambda a, s, backward: 0.0
    gathers: Callable[[Arrays, dict, bool], list] = lambda a, s, backward: []
    tolerance: float = 1e-4
    outliers: float = 0.0
    in_place: bool = False
    sizes: tuple[str, ...] = ("small", "paper", "large")
    forward: bool = True


TASKS: dict[str, Task] = {}


def task(name: str | None = None, **options):
    """Register the decorated `make` with its options as a Task."""

    def register(make):
        made = Task(name or make.__name__, make, **options)
        TASKS[made.name] = made
        return make

    return register


@dataclass
class Problem:
    """One task at one size: what contenders are given."""

    task: Task
    arrays: Arrays  # with the cotangents g0, g1, ... of the float results
    settings: dict
    result_bytes: int

    def work(self, backward: bool) -> dict:
        """Bytes: each array read once, each result written once, and for the backward pass the
        same again with gradients. Operations and random reads as the task counts them."""
        inputs = {k: x for k, x in self.arrays.items() if k[0] != "g" or not k[1:].isdigit()}
        moved = sum(x.nbytes for x in inputs.values()) + self.result_bytes
        if backward:
            moved *= 2
        a, s = self.arrays, self.settings
        return {"bytes": moved, "flops": self.task.flops(a, s, backward),
                "gathers": self.task.gathers(a, s, backward)}  # fmt: skip


def build(name: str, size: Size) -> Problem:
    """Made on the CPU from seed 0; one run of ours tells the results' shapes."""
    torch.manual_seed(0)
    made = TASKS[name]
    arrays, settings = made.make(size)
    arrays = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    with torch.no_grad():
        copies = {k: torch.from_numpy(x.copy()) for k, x in arrays.items()}
        results = made.run(ops, copies, settings)
    results = results if isinstance(results, tuple) else (results,)
    if made.gradients:
        arrays |= {f"g{i}": torch.randn_like(x).numpy() for i, x in enumerate(results)}
    return Problem(made, arrays, settings, sum(x.nbytes for x in results))


# ---- counted work -------------------------------------------------------------------------------
def mlp_flops(n: int, widths: list[int], backward: bool) -> float:
    """Backward: both products of each layer; hidden values are counted once, kept or not."""
    layers = sum(i * o for i, o in itertools.pairwise(widths))
    return 2.0 * n * layers * (3 if backward else 1)


def hash_flops(n: int, s: dict, backward: bool) -> float:
    features = s["grid"]["n_levels"]
    return n * features * (72 + 16 * 2) * (2.0 if backward else 1.0)


def hash_gathers(n: int, s: dict, backward: bool, inputs: bool = False) -> list:
    """Eight corners a point and level, read; in the backward pass also added to, and, for the
    gradient of the inputs, read again."""
    levels = [8 * (b - a) for a, b in itertools.pairwise(s["starts"])]
    return [(8.0 * n * (1 + backward * (1 + inputs)), size) for size in levels]
