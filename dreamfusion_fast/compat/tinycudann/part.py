"""What the encodings of tiny-cuda-nn have in common: their width, and how it is padded."""

from __future__ import annotations

import math

import numpy as np
import torch

from .pcg32 import Pcg32


def next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


class InputPart:
    """An encoding of n_input_dims numbers by `width`, and by constants up to `padded` of them.

    Parameters are passed in, (n_params,), so that a module holds them all in one array.
    """

    filler = 1.0  # what padded columns hold
    filler_first = False  # whether they come before the others
    alignment = 1  # columns start at a multiple of it

    def __init__(self, n_input_dims: int, width: int, n_params: int = 0):
        self.n_input_dims, self.width, self.n_params = n_input_dims, width, n_params
        self.padded = width

    def align(self, alignment: int) -> None:
        """Pad to a multiple of `alignment`, and of the encoding's own."""
        self.pad_to(next_multiple(self.padded, math.lcm(alignment, self.alignment)))

    def pad_to(self, width: int) -> None:
        self.padded = width

    def initialise(self, generator: Pcg32) -> list[np.ndarray]:
        """Initial parameters, float32, in pieces."""
        return []

    def encode(self, x: torch.Tensor, params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Encode.

        Args:
            x: (N, n_input_dims) float32 or float64, contiguous.
            params: (n_params,) like x.
            dtype: of the result.
        Returns:
            (N, padded).
        """
        found = self.encode(x, params, dtype)
        if self.padded == self.width:
            return found
        filler = found.new_full((len(x), self.padded - self.width), self.filler)
        return torch.cat((filler, found) if self.filler_first else (found, filler), -1)

    def hyperparams(self) -> dict:
        raise NotImplementedError
