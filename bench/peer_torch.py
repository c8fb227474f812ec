"""Ours and what torch itself offers: the contenders ours, ours-1-thread, ours-unfused, eager (the
plain-torch twins) and compiled (torch.compile of these). On the GPU where there is one."""

from __future__ import annotations

import ctypes
import functools
import os
from types import SimpleNamespace

import torch

from bench import task, tasks
from dreamfusion_fast import _cpu, ops
from dreamfusion_fast.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNFUSED = SimpleNamespace(**{k: getattr(ops, k) for k in ops.__all__ if k not in tasks.FUSED})
MODULES = {"ours": ops, "ours-1-thread": ops, "ours-unfused": UNFUSED, "eager": reference,
           "compiled": reference}  # fmt: skip
LIBC = ctypes.CDLL(None)
chosen = {"name": "eager"}


def start(name: str, keep: bool = True) -> str:
    """keep: freed memory, as a training run on a CPU does, eager torch's as ours."""
    if name == "ours-1-thread" and (os.environ.get("OMP_NUM_THREADS"), DEVICE.type) != ("1", "cpu"):
        raise RuntimeError(f"one thread of a CPU: expected OMP_NUM_THREADS=1, no {DEVICE.type}")
    chosen["name"] = name
    if keep and DEVICE.type == "cpu":
        _cpu.keep_memory()
    return torch.__version__


def prepare(op: str, arrays: dict, settings: dict, backward: bool):
    made, name = task.TASKS[op], chosen["name"]
    tensors = {k: torch.from_numpy(x).to(DEVICE) for k, x in arrays.items()}
    inputs = [tensors[k].requires_grad_() for k in made.gradients if backward]
    cotangents = [tensors[f"g{i}"] for i in range(len(tensors)) if f"g{i}" in tensors]
    function, last = functools.partial(made.run, MODULES[name]), []
    if name == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)

    def call():
        last.clear()  # give the last results' memory back before the next ones are made
        with torch.set_grad_enabled(backward):
            results = function(tensors, settings)
            results = results if isinstance(results, tuple) else (results,)
            pairs = [(x, g) for x, g in zip(results, cotangents) if x.requires_grad]
            grads = torch.autograd.grad(*_columns(pairs, inputs)) if backward else ()
        last.extend(x.detach() for x in (*results, *grads))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return call, lambda: [x.cpu().numpy() for x in last]


def _columns(pairs, inputs):
    outputs, cotangents = zip(*pairs)
    return outputs, inputs, cotangents


OPS = {op: functools.partial(prepare, op) for op in task.TASKS}


def release() -> None:
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def flush() -> None:
    """Empty a GPU's L2."""
    if DEVICE.type == "cuda":
        torch.empty(256 << 20, dtype=torch.int8, device=DEVICE).zero_()
        torch.cuda.synchronize()
