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
FREE = [name for name in CASES if name not in IN_PLACE and name != "occupancy_points"]
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
    torch._dynamo.reset()  # all cases are one line of code to it: a limit of recompilations
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_all(torch.equal, compiled(*tensors), op(*tensors))
    if name in SMOOTH:
        got, want = (gradients(energy(f), tensors) for f in (compiled, op))
        assert_all(torch.equal, got, want)


# ---- autocast -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_means_float32(name, lower):
    op, tensors = case(name, torch.float32)
    rounded = [t.to(lower) for t in tensors]
    want = op(*(t.float() for t in rounded))
    with torch.autocast("cpu", lower):
        got = op(*rounded)
        assert_all(torch.equal, op(*(t.float() for t in rounded)), want)
    assert_all(torch.equal, got, want)
    with pytest.raises((TypeError, ValueError), match=r"expected float32 or float64.*got "):
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


def test_autocast_beside_float16_copies(device):
    """Kernels that have float16 are CUDA's, here emulated; the others refuse the copies."""
    grid = 2, 2, 3, 6, "linear", None
    rows, n = ops.hash_table_rows(*grid[:4])[1][-1], ops.mlp_parameters([4, 8, 2])
    shapes = (5, 3), (rows, 2), (5, 4), (n,)
    x, table, grad, params = (torch.rand(shape).to(device) for shape in shapes)
    half = table.half()
    ways = {
        "hash_encode": (lambda x, g: ops.hash_encode(x, table, *grid, half), (x, grad)),
        "grad": (lambda x, g: ops.hash_encode_gradient(g, x, table, *grid, half), (x, grad.half())),
        "mlp": (lambda x, g: ops.mlp(g, params, [4, 8, 2], params_half=params.half()),
                (x, grad.half())),
    }  # fmt: skip
    for op, exact in ways.values():
        if not _backend.kernels(x).has_half:
            with (
                torch.autocast(device.type, torch.float16),
                pytest.raises(ValueError, match="half"),
            ):
                op(x, grad)
            continue
        with torch.autocast(device.type, torch.float16):
            got = op(x, grad)
        assert torch.equal(got, op(*exact))


# ---- torch.func ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PLACE])
def test_vmap(name):
    """Torch calls the op once for each element of the batch, wherever the batch lies."""
    op, tensors = case(name)
    batch = [torch.stack([t, t.flip(0), 0.5 * t]) for t in tensors]
    each = [as_tuple(op(*(b[i] for b in batch))) for i in range(3)]
    want = [torch.stack(results) for results in zip(*each)]
    assert_all(torch.equal, torch.func.vmap(op)(*batch), want)
    last = [b.movedim(0, -1).contiguous() for b in batch]
    tidy = torch.func.vmap(lambda *t: op(*(x.contiguous() for x in t)), in_dims=-1)
    assert_all(torch.equal, tidy(*last), want)
    if name != "occupancy_points" and tensors[0].ndim > 1:
        with pytest.raises(ValueError, match="expected a contiguous tensor"):
            torch.func.vmap(op, in_dims=-1)(*last)


@pytest.mark.parametrize("name", IN_PLACE)
def test_vmap_is_refused_by_ops_that_write_into_their_arguments(name):
    op, tensors = case(name)
    with pytest.raises(NotImplementedError, match=f"{name}: under vmap it cannot write"):
        torch.func.vmap(op)(*(torch.stack([t, t]) for t in tensors))


@pytest.mark.parametrize("name", SMOOTH)
def test_func_grad_and_its_vmap(name):
    op, tensors = case(name)
    every = tuple(range(len(tensors)))
    grad = torch.func.grad(energy(op), every)
    want = gradients(energy(op), tensors)
    assert_all(torch.equal, grad(*tensors), want)
    batch = [torch.stack([t, 0.5 * t]) for t in tensors]
    other = gradients(energy(op), [0.5 * t for t in tensors])
    got = torch.func.vmap(grad)(*batch)
    assert_all(torch.allclose, got, [torch.stack(pair) for pair in zip(want, other)])


@pytest.mark.parametrize("name", SMOOTH)
def test_func_vjp_and_jacrev(name):
    op, tensors = case(name)
    results, pull = torch.func.vjp(lambda *t: as_tuple(op(*t)), *tensors)
    cotangents = tuple(torch.stack([r, r.flip(0).cos()], -1) for r in results)
    got = torch.func.vmap(pull, in_dims=-1)(cotangents)  # gradients come in with odd strides
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = as_tuple(op(*leaves))
    for i in range(2):
        want = torch.autograd.grad(
            outputs, leaves, [c[..., i] for c in cotangents], retain_graph=True
        )
        assert_all(torch.allclose, [g[i] for g in got], want)
    jacobian = torch.func.jacrev(lambda *t: as_tuple(op(*t))[0])(*tensors)
    want = torch.autograd.functional.jacobian(
        lambda t: as_tuple(op(t, *tensors[1:]))[0], tensors[0]
    )
    assert torch.allclose(jacobian, want)


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_right_or_refused(name):
    """Also of torch.func, whose levels are differentiated one inside another."""
    op, tensors = case(name)
    inner, weights = energy(op), torch.linspace(1, 2, tensors[0].numel()).double()

    def by_autograd():
        leaf = tensors[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(inner(leaf, *tensors[1:]), leaf, create_graph=True)
        return torch.autograd.grad((g.flatten() * weights).sum(), leaf)[0]

    def by_func():
        def first(x):
            return (torch.func.grad(inner)(x, *tensors[1:]).flatten() * weights).sum()

        return torch.func.grad(first)(tensors[0])

    if name not in TWICE:
        stem = name.removesuffix("_gradient")
        times = "twice" if stem in TWICE else "once"
        for way in (by_autograd, by_func):
            with pytest.raises(RuntimeError, match=f"{stem}: it can be differentiated {times}"):
                way()
        return
    assert torch.allclose(by_autograd(), by_func(), rtol=1e-12)
    step = 1e-6 * weights.reshape(tensors[0].shape)
    ends = [gradients(inner, [tensors[0] + s, *tensors[1:]])[0] for s in (step, -step)]
    torch.testing.assert_close(by_func(), (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMOOTH)
def test_forward_mode_is_refused(name):
    """Torch would leave the tangents out without a word."""
    op, tensors = case(name)
    with pytest.raises(NotImplementedError, match=r"there is no forward-mode derivative \(jvp, "):
        torch.func.jvp(op, tuple(tensors), tuple(tensors))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, t) for t in tensors]
        with pytest.raises(NotImplementedError, match="is no forward-mode derivative"):
            op(*duals)
        assert_all(torch.equal, op(*tensors), op(*(t.clone() for t in tensors)))


@pytest.mark.parametrize("name", [n for n in CASES if n not in (*SMOOTH, *IN_PLACE)])
def test_what_has_no_derivative_ignores_requires_grad(name):
    op, tensors = case(name)
    got = op(*(t.clone().requires_grad_() for t in tensors))
    assert not any(r.requires_grad for r in as_tuple(got))
    assert_all(torch.equal, got, op(*tensors))
    grad = torch.func.grad(lambda t: as_tuple(op(t, *tensors[1:]))[0].sum())(tensors[0])
    assert torch.equal(grad, torch.zeros_like(tensors[0]))


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
