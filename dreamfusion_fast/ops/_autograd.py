"""The derivative of a registered op.

torch.library.register_autograd serves eager calls and torch.compile. This serves torch.func too
(grad, vjp, jacrev, vmap of them), refuses derivatives that do not exist, which torch leaves out
with a warning or, in forward mode, without one, and saves a third of a call's overhead
(bench/overhead.py). It leans on what torch's own register_autograd and autograd.Function lean on:
names that another torch may lack, whose register_autograd then has to do (SUPPORTED).
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import forward_ad

try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _after_autograd_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
    )
    from torch._functorch.utils import enable_single_level_autograd_function

    _PLAIN = {DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA)}
    SUPPORTED = hasattr(forward_ad, "_current_level") and hasattr(
        forward_ad, "_set_fwd_grad_enabled"
    )
except (ImportError, AttributeError):
    SUPPORTED = False


class Derivative:
    """How an op is differentiated: `save` keeps tensors, `backward` uses them, both as
    torch.library.register_autograd has them. Until they are set there is no derivative."""

    def __init__(self, name: str):
        self.name = name
        self.save = lambda ctx, inputs, output: None

    def backward(self, ctx, *grads):
        op, _, order = self.name.rpartition("_")
        times = {"backward": "once", "second": "twice"}
        if order in times:
            raise RuntimeError(f"{op}: it can be differentiated {times[order]}, not once more")
        raise RuntimeError(f"{self.name}: it has no derivative")

    def refuse_forward_mode(self, ctx, *tangents):
        raise NotImplementedError(
            f"{self.name}: there is no forward-mode derivative (jvp, jacfwd, hessian): "
            f"use torch.func.vjp, jacrev or, for a Hessian, jacrev of grad"
        )


def autograd_kernel(op: torch._ops.OpOverload, kernel, derivative: Derivative):
    """The function for the op's dispatch key Autograd, with_keyset. `kernel` runs the op."""

    def run(keyset, args):
        below = keyset & _after_autograd_keyset
        if below.raw_repr() in _PLAIN:  # no mode and no transform on the way: not through torch
            return kernel(*args)
        with _outer_levels_on(), _AutoDispatchBelowAutograd():
            return op.redispatch(below, *args)

    def forward(ctx, *args):
        *args, keyset = args
        output = run(keyset, args)
        derivative.save(ctx, args, output)
        return output

    def backward(ctx, *grads):
        found = derivative.backward(ctx, *grads)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    function = type(
        derivative.name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward),
            "jvp": staticmethod(derivative.refuse_forward_mode),
        },
    )

    # Not Function.apply, which hands calls inside torch.func over to it: the dispatcher has done so
    # already, and asks for one level at a time.
    apply = super(torch.autograd.Function, function).apply

    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def call(keyset, *args):
        reverse = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not reverse and forward_ad._current_level < 0:
            return run(keyset, args)
        args += defaults[len(args) :]  # which the dispatcher leaves out
        if not _are_functorch_transforms_active():
            return apply(*args, keyset)
        with enable_single_level_autograd_function():
            return apply(*args, keyset)

    return call


@contextlib.contextmanager
def _outer_levels_on():
    """Below one level of torch.func the outer ones differentiate, though autograd.Function has
    switched derivatives off for its own."""
    if not _are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def vmap_rule(op: torch._ops.OpOverload):
    """The function for torch.library.register_vmap: the op is called for one element of the batch
    after another. (Torch would do the same, with a warning.)"""
    name = op._schema.name.partition("::")[2]

    def rule(info, in_dims, *args):
        if not op._schema.returns:
            raise NotImplementedError(f"{name}: under vmap it cannot write into its arguments")
        if info.batch_size == 0:
            raise ValueError(f"{name}: expected a batch of 1 or more from vmap, got 0")
        results = [op(*_element(i, in_dims, args)) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results)), (0,) * len(results[0])

    return rule


def _element(i: int, in_dims, args) -> list:
    """The arguments for element i of the batch, contiguous as kernels expect them."""
    return [
        a.select(d, i).contiguous() if isinstance(a, torch.Tensor) and d is not None else a
        for a, d in zip(args, in_dims)
    ]
