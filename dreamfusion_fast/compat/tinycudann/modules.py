"""The modules of tiny-cuda-nn's torch bindings."""

from __future__ import annotations

import gc
import operator
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from ...ops._backend import has_half
from .encodings import create_encoding
from .network import ALIGNMENT, Mlp
from .pcg32 import Pcg32


def supports_jit_fusion() -> bool:
    """False: kernels are compiled when this package is built."""
    return False


def free_temporary_memory() -> None:
    """Give memory that torch holds for reuse back to the GPU; what tensors occupy stays."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Times(torch.autograd.Function):
    """A gradient times a number, which what is differentiated once more does not see: second
    derivatives, made of gradients that are scaled inside, then leave scaled as the first do."""

    @staticmethod
    def forward(ctx, grad, factor):
        return grad * factor

    @staticmethod
    def backward(ctx, tangent):
        return tangent, None


class _ScaleGradient(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Times.apply(grad, ctx.factor), None


class Module(torch.nn.Module):
    """What the three modules share: all parameters in `params`, float32 (n_params,).

    On CUDA they compute in float16 beside the float32 `params`, as tiny-cuda-nn does; elsewhere in
    float32. `dtype` is the type of the result. Inside, gradients are multiplied by `loss_scale`
    (128 in float16), and divided by it again. Modules are made on the current CUDA device where
    there is one, else on the CPU; `.to(device)` moves them.

    torch.autocast does not change what they do.
    """

    def __init__(self, seed: int = 1337, dtype: torch.dtype | None = None):
        super().__init__()
        self.seed, self._dtype, self._loss_scale = seed, dtype, None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pieces = self._model.initialise(Pcg32(_check_seed(seed)))
        initial = np.concatenate([np.empty(0, np.float32), *pieces])
        self.params = torch.nn.Parameter(torch.from_numpy(initial).to(device))

    @property
    def dtype(self) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return torch.float16 if has_half(self.params) else torch.float32

    @property
    def loss_scale(self) -> float:
        if self._loss_scale is not None:
            return self._loss_scale
        return 128.0 if self.dtype == torch.float16 else 1.0

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._loss_scale = float(value)

    @property
    def jit_fusion(self) -> bool:
        """False; True is answered by a warning, as where tiny-cuda-nn cannot compile."""
        return False

    @jit_fusion.setter
    def jit_fusion(self, value: bool) -> None:
        if value:
            warnings.warn("jit_fusion: not supported, stays False", stacklevel=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute.

        Args:
            x: (N, n_input_dims), any real dtype; it is converted to float32, and moved to the
                device of `params`, with a warning, if it is elsewhere.
        Returns:
            (N, n_output_dims) of `dtype`, differentiable with respect to x and `params`.
        Raises:
            TypeError, ValueError: x is not a real tensor of this shape.
        """
        self._check_input(x)
        if x.device != self.params.device:
            warnings.warn(
                f"input is on {x.device}, the parameters are on {self.params.device}: moved there",
                stacklevel=2,
            )
            x = x.to(self.params.device)
        scale = self.loss_scale
        with torch.autocast(x.device.type, enabled=False):
            x, params = x.to(torch.float32).contiguous(), self.params.to(torch.float32).contiguous()
            if scale == 1:
                return self._model(x, params, self.dtype)
            x, params = _ScaleGradient.apply(x, 1 / scale), _ScaleGradient.apply(params, 1 / scale)
            return _ScaleGradient.apply(self._model(x, params, self.dtype), scale)

    def _check_input(self, x: torch.Tensor) -> None:
        wanted = f"argument `x`: expected a real tensor of shape (N, {self.n_input_dims}), got "
        if not isinstance(x, torch.Tensor):
            raise TypeError(wanted + type(x).__name__)
        if x.is_complex():
            raise TypeError(wanted + str(x.dtype))
        if x.ndim != 2 or x.shape[1] != self.n_input_dims:
            raise ValueError(wanted + str(tuple(x.shape)))

    def extra_repr(self) -> str:
        return (
            f"n_input_dims={self.n_input_dims}, n_output_dims={self.n_output_dims}, "
            f"seed={self.seed}, dtype={self.dtype}, hyperparams={self._model.hyperparams()}"
        )


class _Encoded:
    """An encoding, padded, then a network: the network's parameters come first."""

    def __init__(self, encoding, n_output_dims, network_config):
        encoding.align(ALIGNMENT)
        self.encoding = encoding
        self.network = Mlp(encoding.padded, n_output_dims, network_config)
        self.n_params = self.network.n_params + encoding.n_params

    def initialise(self, generator):
        return self.network.initialise(generator) + self.encoding.initialise(generator)

    def __call__(self, x, params, dtype):
        encoded = self.encoding(x, params[self.network.n_params :], dtype)
        return self.network(encoded, params[: self.network.n_params], dtype)

    def hyperparams(self):
        return {
            "otype": "NetworkWithInputEncoding",
            "encoding": self.encoding.hyperparams(),
            "network": self.network.hyperparams(),
        }


class Encoding(Module):
    """An encoding of inputs.

    Args:
        n_input_dims: columns of the input.
        encoding_config: JSON config, docs/tinycudann.md.
        seed: of the initial parameters, 0 to 2^64 - 1.
        dtype: of the result, float16 or float32; None: float16 on CUDA, else float32.
    Raises:
        TypeError, ValueError: an argument or an entry of the config is wrong or not supported.
    """

    def __init__(
        self,
        n_input_dims: int,
        encoding_config: Mapping,
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ):
        if dtype not in (None, torch.float32, torch.float16):
            raise ValueError(f"argument `dtype`: expected float16, float32 or None, got {dtype}")
        model = create_encoding(_check_dims("n_input_dims", n_input_dims), encoding_config)
        self._model = model
        super().__init__(seed, dtype)
        self.n_input_dims, self.n_output_dims = n_input_dims, model.padded
        self.encoding_config = encoding_config


class NetworkWithInputEncoding(Module):
    """An encoding of inputs, then a network.

    Args:
        n_input_dims: columns of the input.
        n_output_dims: columns of the result.
        encoding_config, network_config: JSON configs, docs/tinycudann.md.
        seed: of the initial parameters, 0 to 2^64 - 1.
    Raises:
        TypeError, ValueError: an argument or an entry of a config is wrong or not supported.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding_config: Mapping,
        network_config: Mapping,
        seed: int = 1337,
    ):
        encoding = create_encoding(_check_dims("n_input_dims", n_input_dims), encoding_config)
        outputs = _check_dims("n_output_dims", n_output_dims)
        self._model = _Encoded(encoding, outputs, network_config)
        super().__init__(seed)
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.encoding_config, self.network_config = encoding_config, network_config


class Network(Module):
    """A network; inputs are padded by ones to a multiple of 16.

    Args:
        n_input_dims: columns of the input.
        n_output_dims: columns of the result.
        network_config: JSON config, docs/tinycudann.md.
        seed: of the initial parameters, 0 to 2^64 - 1.
    Raises:
        TypeError, ValueError: an argument or an entry of the config is wrong or not supported.
    """

    def __init__(
        self, n_input_dims: int, n_output_dims: int, network_config: Mapping, seed: int = 1337
    ):
        identity = {"otype": "Identity"}
        encoding = create_encoding(_check_dims("n_input_dims", n_input_dims), identity)
        outputs = _check_dims("n_output_dims", n_output_dims)
        self._model = _Encoded(encoding, outputs, network_config)
        super().__init__(seed)
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.network_config = network_config


def _check_dims(name: str, value: int) -> int:
    return _check_integer(name, value, 1, 2**31 - 1)


def _check_seed(seed: int) -> int:
    return _check_integer("seed", seed, 0, 2**64 - 1)


def _check_integer(name: str, value: int, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"argument `{name}`: expected an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"argument `{name}`: expected {low} to {high}, got {value}")
    return number
