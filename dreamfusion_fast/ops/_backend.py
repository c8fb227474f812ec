"""What every op needs once: registration, the kernel module of a device, argument checks."""

from __future__ import annotations

import functools
import inspect
from itertools import zip_longest

import torch  # first: the kernels then share torch's OpenMP runtime and its thread setting

from .. import _cpu
from ._autograd import SUPPORTED, Derivative, autograd_kernel, vmap_rule

try:
    from .. import _cuda
except ImportError:  # built only where there is a GPU, see CMakeLists.txt
    _cuda = None

lib = torch.library.Library("dreamfusion_fast", "FRAGMENT")

FLOATS = (torch.float32, torch.float64)
SCALARS = (*FLOATS, torch.float16)


_derivatives: dict[str, Derivative] = {}


def on_its_device(kernel):
    """The kernel, launched on the device of its first tensor, whichever is the current one."""

    @functools.wraps(kernel)
    def run(*args):
        for x in args:
            if isinstance(x, torch.Tensor):
                break
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return kernel(*args)
        return kernel(*args)

    return run


def settled(device: torch.device | str) -> torch.device:
    """The device with its number: tensors on "cuda" say that they are on "cuda:0"."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def register(schema: str, kernel, fake) -> None:
    """Register an op: its schema, the function that runs it on CPU and CUDA, and its fake. It has
    no derivative until `register_backward`; an op that only writes into its arguments never."""
    name = lib.define(schema, tags=torch.Tag.pt2_compliant_tag)
    lib.impl(name, kernel, "CPU")
    kernel = on_its_device(kernel)
    lib.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"dreamfusion_fast::{name}", fake, lib=lib)
    op = getattr(torch.ops.dreamfusion_fast, name).default
    if SUPPORTED and op._schema.returns:
        _derivatives[name] = Derivative(name)
        autograd = autograd_kernel(op, kernel, _derivatives[name])
        lib.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"dreamfusion_fast::{name}", vmap_rule(op), lib=lib)


def register_backward(name: str, backward, save) -> None:
    """Set the derivative of op `name`: `save` keeps tensors, `backward` uses them."""
    if SUPPORTED:
        _derivatives[name].backward, _derivatives[name].save = backward, save
    else:
        full = f"dreamfusion_fast::{name}"
        torch.library.register_autograd(full, backward, setup_context=save, lib=lib)


def autocast(half: str | None = None):
    """The ops' one rule for torch.autocast: inside it they work in float32. Tensors of lower
    precision are cast up, but for float16 copies (arguments *_half), of which the caller decides:
    beside such a copy the argument named `half` is cast to float16, as the op then wants it. Ops
    that write into their arguments have no such rule: they would write into a copy."""

    def decorate(function):
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def op(*args, **kwargs):
            if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                given = {**kwargs, **dict(zip(names, args))}
                copied = any(k.endswith("_half") and v is not None for k, v in given.items())
                wanted = {k: torch.float32 for k in names if not k.endswith("_half")}
                wanted |= {half: torch.float16} if copied and half else {}
                args = [_cast(v, wanted.get(k)) for k, v in zip_longest(names[: len(args)], args)]
                kwargs = {k: _cast(v, wanted.get(k)) for k, v in kwargs.items()}
            return function(*args, **kwargs)

        # A code object of its own: torch.compile counts a function's recompilations by it.
        op.__code__ = op.__code__.replace(co_name=function.__name__)
        return op

    return decorate


def _cast(value, dtype: torch.dtype | None):
    """A tensor for which torch.autocast is on and which has less than float64, as dtype."""
    if dtype is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    on = torch.is_autocast_enabled(value.device.type) and value.dtype != torch.float64
    return value.to(dtype) if on else value


def kernels(tensor: torch.Tensor):
    """The compiled module for the tensor's device."""
    if tensor.device.type == "cpu":
        return _cpu
    if _cuda is None:
        raise RuntimeError(
            "dreamfusion_fast was built without CUDA kernels: move the tensors to the CPU, or "
            "reinstall with nvcc on the PATH: pip install . -C cmake.define.DF_CUDA=ON"
        )
    return _cuda


def has_half(tensor: torch.Tensor) -> bool:
    """Whether the kernels of the tensor's device work in float16: table_half, params_half,
    param_half."""
    return kernels(tensor).has_half


def stream(tensor: torch.Tensor) -> int:
    """The address of the current CUDA stream of the tensor's device; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def ptr(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data, 0 for None. Keep the tensor in a variable until the call
    is over: `ptr(torch.empty(n))` frees the memory under the kernel."""
    return 0 if tensor is None else tensor.data_ptr()


def scalar(tensor: torch.Tensor) -> int:
    """The number by which the kernel modules know the tensor's dtype."""
    return SCALARS.index(tensor.dtype)


def check_tensor(name, tensor, dtype=FLOATS, shape=None, device=None, optional=False) -> None:
    """Raise unless the argument is a contiguous tensor of one of the dtypes, and of this shape
    and device where given. A shape is a tuple: a number must match, a letter stands for any
    number, and a leading "..." for any leading dimensions."""
    if optional and tensor is None:
        return
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{_expected(name, dtypes, shape)}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{_expected(name, dtypes, shape)}, got {_describe(tensor)}")
    if shape is not None and not _fits(tuple(tensor.shape), shape):
        raise ValueError(f"{_expected(name, dtypes, shape)}, got {_describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"argument `{name}`: expected a tensor on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"argument `{name}`: expected a contiguous tensor, got strides {tensor.stride()}: "
            f"pass {name}.contiguous()"
        )


def check_count(count: torch.Tensor | None, device: torch.device) -> None:
    """The number of valid rows of packed samples: int32 (1,), or None for all rows."""
    check_tensor("count", count, torch.int32, (1,), device, optional=True)


def check_range(name: str, value, low, high) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"argument `{name}`: expected {low} to {high}, got {value}")


def _fits(actual: tuple, shape: tuple) -> bool:
    if shape and shape[0] == "...":
        shape = shape[1:]
        actual = actual[len(actual) - len(shape) :] if len(actual) >= len(shape) else (None,)
    if len(actual) != len(shape):
        return False
    for a, s in zip(actual, shape):
        if a != s and not isinstance(s, str):
            return False
    return True


def _expected(name: str, dtypes: tuple, shape: tuple | None) -> str:
    kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    where = "" if shape is None else f" of shape {_shape(shape)}"
    return f"argument `{name}`: expected {kinds} tensor{where}"


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {_shape(tensor.shape)}"


def _shape(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
