"""Every op keeps torch's rules: registration, torch.compile, modules, DLPack, streams.

The calls are those of tests/op_table.py. test_autocast.py and test_functorch.py have the rest.
"""

import copy
import pickle
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from op_table import CASES, IN_PLACE, SMOOTH, TWICE, assert_all, case, energy, gradients
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import overhead
from dreamfusion_fast import ops
from dreamfusion_fast.config import FieldConfig
from dreamfusion_fast.field import make_field
from dreamfusion_fast.ops import _backend

NO_OPS = {"Adam", "Samples", "has_half", "hash_table_rows", "mlp_parameters"}  # of ops.__all__
# Made of the ops, and no ops to torch:
COMPOSED = {"Composited", "Grid", "Rays", "composite_samples", "render", "visible_samples"}


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
    assert set(CASES) == set(ops.__all__) - NO_OPS - COMPOSED
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
    torch._dynamo.reset()  # all cases are one line of code to it: a limit of recompilations
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_all(torch.equal, compiled(*tensors), op(*tensors))
    if name in SMOOTH:
        got, want = (gradients(energy(f), tensors) for f in (compiled, op))
        assert_all(torch.equal, got, want)


@pytest.mark.parametrize("name", [n for n in CASES if n not in (*IN_PLACE, "occupancy_points")])
def test_strides_are_refused_by_the_arguments_name(name):
    op, tensors = case(name)
    for i, t in enumerate(tensors):
        spread = torch.stack([t, t], -1)[..., 0]
        with pytest.raises(ValueError, match=r"`\w+`: expected a contiguous tensor, got strides"):
            op(*tensors[:i], spread, *tensors[i + 1 :])


def test_raw_ops_without_a_derivative_say_so():
    op, args = CALLS["march"]
    positions, *_ = op(args[0].requires_grad_(), *args[1:])
    with pytest.raises(RuntimeError, match="march: it has no derivative"):
        positions.sum().backward()


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_ops_write_into_leaves_and_tell_autograd(name):
    """A parameter is updated although it requires a gradient; what autograd saved before of it is
    known to have changed."""
    op, tensors = case(name)
    want = op(*tensors)[0]
    leaf = tensors[0].clone().requires_grad_()
    squared = leaf.square().sum()  # keeps the leaf
    with mock.patch.object(torch.Tensor, "clone", lambda t: t):
        got = op(leaf, *tensors[1:])[0]
    assert got is leaf and torch.equal(leaf, want) and leaf.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


# ---- modules, other libraries, streams ----------------------------------------------------------
@pytest.fixture
def field():
    config = FieldConfig(n_levels=2, finest_resolution=16, log2_table_size=6, hidden=8)
    return make_field(config, torch.Generator().manual_seed(0))


@pytest.fixture
def positions(rng):
    return torch.rand(6, 3, generator=rng) - 0.5


def test_functional_call_of_a_field(field, positions):
    other = {name: 2 * p.detach() for name, p in field.named_parameters()}

    def density(parameters, x):
        return torch.func.functional_call(field, parameters, (x,))[0].log().sum()

    got = torch.func.grad(density)(other, positions)
    for name, p in field.named_parameters():
        p.data.copy_(other[name])
    want = torch.autograd.grad(field(positions)[0].log().sum(), list(field.parameters()))
    assert_all(torch.equal, [got[name] for name, _ in field.named_parameters()], want)
    each = torch.func.vmap(torch.func.grad(density), (None, 0))(other, positions[:, None])
    assert torch.allclose(each["weights"].sum(0), got["weights"], atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_fields_are_copied_and_pickled(field, positions, copied):
    other = copied(field)
    assert_all(torch.equal, other(positions)[:2], field(positions)[:2])
    with torch.no_grad():
        other.table.add_(1.0)
        assert not torch.equal(other(positions)[1], field(positions)[1])


@pytest.mark.parametrize("normals", [False, True])
def test_a_field_is_compiled_and_autocast(field, positions, normals):
    torch._dynamo.reset()

    def loss(f):
        sigma, albedo, gradient = f(positions, normals=normals)
        return sigma.log().sum() + albedo.sum() + (gradient.square().sum() if normals else 0.0)

    want = torch.autograd.grad(loss(field), list(field.parameters()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_all(torch.allclose, torch.autograd.grad(compiled(field), list(field.parameters())), want)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss(field), list(field.parameters()))
    assert_all(torch.equal, got, want)


def test_numpy_arrays_go_in_and_out_without_a_copy():
    """By DLPack, as those of JAX and CuPy do."""
    x = np.random.default_rng(0).random((4, 3), dtype=np.float32)
    tensor = torch.from_dlpack(x)
    assert tensor.data_ptr() == x.ctypes.data
    with mock.patch.object(_backend._cpu, "spherical_harmonics_forward") as kernel:
        encoded = ops.spherical_harmonics(tensor, 2)
    _, address, *_ = kernel.call_args.args
    assert address == x.ctypes.data
    encoded = ops.spherical_harmonics(tensor, 2)
    result = np.from_dlpack(encoded)
    assert result.ctypes.data == encoded.data_ptr()
    assert np.array_equal(result, encoded.numpy())


def test_kernels_are_given_torchs_current_stream():
    """The address is read for the tensor's device, at each call."""
    on_gpu = mock.Mock(is_cuda=True, device=torch.device("cuda", 1))
    streams = iter((mock.Mock(cuda_stream=0x1234), mock.Mock(cuda_stream=0x5678)))
    with mock.patch.object(
        torch.cuda, "current_stream", side_effect=lambda _: next(streams)
    ) as ask:
        assert [_backend.stream(on_gpu), _backend.stream(on_gpu)] == [0x1234, 0x5678]
    ask.assert_called_with(torch.device("cuda", 1))
    assert _backend.stream(torch.zeros(1)) == 0


def test_overhead_is_measured_in_every_way():
    medians = overhead.measure(overhead.ways(), calls=2, rounds=2)
    assert set(medians) == set(overhead.ways()) and all(m > 0 for m in medians.values())
    assert [line.split()[0] for line in overhead.table(medians).splitlines()[1:]] == [
        "kernel", "autograd.Function", "op",
    ]  # fmt: skip
