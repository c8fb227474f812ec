"""The ops under torch.func: right or refused, never silently wrong."""

import subprocess
import sys

import pytest
import torch
from op_table import CASES, IN_PLACE, SMOOTH, TWICE, as_tuple, assert_all, case, energy, gradients


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


def test_vmap_of_nothing_is_refused():
    op, tensors = case("spherical_harmonics")
    with pytest.raises(ValueError, match="expected a batch of 1 or more from vmap, got 0"):
        torch.func.vmap(op)(tensors[0].new_empty(0, 5, 3))


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


def test_another_torch_has_its_own_way(tmp_path):
    """Where torch lacks the names that ops/_autograd.py needs, ops are differentiated by
    torch.library: all but torch.func."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, torch._functorch.utils as utils\n"
        "del utils.enable_single_level_autograd_function\n"
        "from dreamfusion_fast.ops import _autograd, mlp, reference\n"
        "assert not _autograd.SUPPORTED\n"
        "x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)\n"
        "params = torch.randn(4 * 3 + 2 * 4, dtype=torch.float64, requires_grad=True)\n"
        "assert torch.autograd.gradcheck(lambda x, p: mlp(x, p, [3, 4, 2]), (x, params))\n"
    )
    subprocess.run([sys.executable, program], check=True)
