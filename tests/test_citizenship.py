"""Every op keeps torch's rules: one table of example calls, tests/op_table.py, one test a rule."""

import copy
import pickle
from unittest import mock

import numpy as np
import op_table
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dreamfusion_fast import ops
from dreamfusion_fast.config import FieldConfig
from dreamfusion_fast.field import make_field
from dreamfusion_fast.ops import _backend

CASES = op_table.cases()
SMOOTH = [name for name, (_, _, differentiable) in CASES.items() if differentiable]
IN_PLACE = ["adam_step", "occupancy_update"]
NO_OPS = {"Adam", "Samples", "has_half", "hash_table_rows", "mlp_parameters"}  # of ops.__all__
TWICE = ("frequency_encode", "hash_encode", "mlp")
NAMESPACE = torch.ops.dreamfusion_fast


def case(name, dtype=torch.float64):
    """The op as a function of tensors alone, and tensors for it."""
    function, tensors, _ = CASES[name]
    return lambda *t: function(ops, *t), [t.to(dtype) for t in tensors]


def as_tuple(x) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def assert_all(compare, got, want):
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        assert compare(a, b), (a, b)


def energy(op):
    """A number of the op's results that weighs every element differently."""

    def function(*tensors):
        results = [r for r in as_tuple(op(*tensors)) if r.is_floating_point()]
        return sum(
            (r.square() * torch.linspace(1, 2, r.numel()).to(r.dtype).reshape(r.shape)).sum()
            for r in results
        )

    return function


def gradients(function, tensors, create_graph=False):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, create_graph=create_graph)


class Recorder(TorchDispatchMode):
    """Notes how the registered ops are called: op -> arguments of the latest call."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "dreamfusion_fast":
            self.calls[op] = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        return op(*args, **(kwargs or {}))


def recorded() -> dict:
    """Calls of the registered ops that the table's cases, and their gradients, lead to."""
    with Recorder() as recorder:
        for name in CASES:
            op, tensors = case(name)
            if name in SMOOTH:
                gradients(energy(op), tensors)
            else:
                op(*tensors)
    return {op._schema.name.partition("::")[2]: (op, args) for op, args in recorder.calls.items()}


CALLS = recorded()


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {n.partition("::")[2] for n in names if n.startswith("dreamfusion_fast::")}


# ---- registration -------------------------------------------------------------------------------
def test_the_table_has_every_op():
    assert set(CASES) == set(ops.__all__) - NO_OPS
    assert set(CALLS) == registered()


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, registration of autograd, fake tensors, and the op under aot_autograd."""
    op, args = CALLS[name]
    stem, _, order = name.rpartition("_")
    smooth = name in SMOOTH or (order == "backward" and stem in TWICE)
    args = [
        a.detach().requires_grad_(smooth and a.is_floating_point())
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", CASES)
def test_compile(name):
    """One graph, whose results and gradients are those of the eager call."""
    op, tensors = case(name)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_all(torch.equal, compiled(*tensors), op(*tensors))
    if name in SMOOTH:
        got, want = (gradients(energy(f), tensors) for f in (compiled, op))
        assert_all(torch.equal, got, want)


# ---- autocast -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PLACE])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_means_float32(name, lower):
    op, tensors = case(name, torch.float32)
    if name == "occupancy_points":
        pytest.skip("it has no tensors to cast")
    rounded = [t.to(lower) for t in tensors]
    want = op(*(t.float() for t in rounded))
    with torch.autocast("cpu", lower):
        got = op(*rounded)
        assert_all(torch.equal, op(*(t.float() for t in rounded)), want)
    assert_all(torch.equal, got, want)
    with pytest.raises(TypeError, match="expected float32 or float64 tensor"):
        op(*rounded)
    if name in SMOOTH:
        with torch.autocast("cpu", lower):
            got = gradients(energy(op), rounded)
        want = gradients(energy(op), [t.float() for t in rounded])
        assert_all(torch.equal, got, [g.to(lower) for g in want])


@pytest.mark.parametrize("name", IN_PLACE)
def test_autocast_copies_no_argument_that_is_written(name):
    op, tensors = case(name, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got bfloat16"):
        op(*tensors)
