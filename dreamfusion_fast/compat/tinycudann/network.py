"""tiny-cuda-nn's networks: fully connected layers without biases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch

from ...ops import mlp
from ...ops._backend import has_half, kernels
from .config import Settings
from .part import next_multiple
from .pcg32 import Pcg32, uniform

ALIGNMENT = 16  # of inputs and outputs
SHARPNESS = 10.0  # of Squareplus and Softplus: nearer to ReLU than their definition

ACTIVATIONS = {
    "None": lambda x: x,
    "ReLU": torch.relu,
    "LeakyReLU": lambda x: torch.nn.functional.leaky_relu(x, 0.01),
    "SiLU": torch.nn.functional.silu,
    "Exponential": torch.exp,
    "Sine": torch.sin,
    "Sigmoid": torch.sigmoid,
    "Squareplus": lambda x: 0.5 * (x + (x * x + 4 / SHARPNESS**2).sqrt()),
    "Softplus": lambda x: torch.nn.functional.softplus(x, SHARPNESS, 60.0),
    "Tanh": torch.tanh,
}
FUSED = {"ReLU": "relu", "SiLU": "silu"}  # hidden activations of our op
FULLY_FUSED = ("FullyFusedMLP", "MegakernelMLP")
PLAIN = ("CutlassMLP", "MLP")


class Mlp:
    """h_(l+1) = activation(W_l h_l), the last with output_activation.

    Parameters are W_0 (n_neurons, n_input_dims), the square ones, then the last (outputs padded to
    a multiple of 16, n_neurons), row by row. Padded outputs are not computed: their rows come last.

    ReLU and SiLU run on `ops.mlp`, fused; the others in plain torch.

    Args:
        n_input_dims: inputs, padded.
        n_output_dims: outputs, not padded.
        config: network_config.
    Raises:
        TypeError, ValueError: a value's type or range is wrong.
    """

    def __init__(self, n_input_dims: int, n_output_dims: int, config: Mapping):
        settings = Settings(config, "network_config")
        otype = settings.choice("otype", "MLP", FULLY_FUSED + PLAIN)
        fully_fused = otype in FULLY_FUSED
        self.otype = "FullyFusedMLP" if fully_fused else "CutlassMLP"
        self.n_neurons = settings.integer("n_neurons", 128)
        if fully_fused and self.n_neurons not in (16, 32, 64, 128):
            raise ValueError(
                "config `network_config.n_neurons`: expected 16, 32, 64 or 128 for FullyFusedMLP "
                f"(any number for CutlassMLP), got {self.n_neurons}"
            )
        self.n_hidden = settings.integer("n_hidden_layers", 5, 1 if fully_fused else 0)
        names = tuple(ACTIVATIONS)
        self.activation = settings.choice("activation", "ReLU", names)
        self.output_activation = settings.choice("output_activation", "None", names)
        settings.only("feedback_alignment", False, "tiny-cuda-nn no longer has it")
        settings.close()
        self.widths = [n_input_dims, *[self.n_neurons] * self.n_hidden, n_output_dims]
        self.shapes = [(o, i) for i, o in itertools.pairwise(self.widths)]
        self.n_used = sum(o * i for o, i in self.shapes)
        self.shapes[-1] = (next_multiple(n_output_dims, ALIGNMENT), self.shapes[-1][1])
        self.n_params = sum(o * i for o, i in self.shapes)

    def initialise(self, generator: Pcg32) -> list[np.ndarray]:
        """Xavier's uniform distribution, or SIREN's (Sitzmann et al. 2020) for Sine."""
        bounds = [math.sqrt(np.float32(6) / np.float32(i + o)) for o, i in self.shapes]
        if self.activation == "Sine":
            bounds = [math.sqrt(np.float32(6) / np.float32(i)) for _, i in self.shapes]
            bounds[0] = np.float32(30) / np.float32(self.widths[0])
        return [uniform(generator, o * i, b) for (o, i), b in zip(self.shapes, bounds)]

    def __call__(self, x: torch.Tensor, params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Apply the network.

        Args:
            x: (N, n_input_dims) of dtype, contiguous.
            params: (n_params,) float32 or float64.
            dtype: that of params, or float16.
        Returns:
            (N, n_output_dims) of dtype.
        """
        used, half = params[: self.n_used], dtype == torch.float16
        if not self._fits(x, half):
            h = self._apply_layers(x, used.to(dtype))
        else:
            copy = used.detach().half() if half else None
            activation = FUSED.get(self.activation, "relu")  # the latter: there is no hidden layer
            h = mlp(x, used, self.widths, activation, params_half=copy)
        if self.output_activation == "None":
            return h
        return ACTIVATIONS[self.output_activation](h.to(params.dtype)).to(dtype)

    def _fits(self, x: torch.Tensor, half: bool) -> bool:
        """Whether our op takes it."""
        if self.n_hidden and self.activation not in FUSED:
            return False
        if max(self.widths) > 256 or self.n_hidden > 31:
            return False
        if not half:
            return True
        shape = self.widths, False, self.activation == "SiLU"
        return self.n_hidden > 0 and has_half(x) and kernels(x).mlp_half_fits(shape)

    def _apply_layers(self, h: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        start = 0
        for i, (n_in, n_out) in enumerate(itertools.pairwise(self.widths)):
            if i > 0:
                h = ACTIVATIONS[self.activation](h)
            weight = params[start : start + n_out * n_in].view(n_out, n_in)
            h = torch.nn.functional.linear(h, weight)
            start += n_out * n_in
        return h

    def hyperparams(self) -> dict:
        return {
            "otype": self.otype,
            "activation": self.activation,
            "output_activation": self.output_activation,
            "n_neurons": self.n_neurons,
            "n_hidden_layers": self.n_hidden,
        }
