"""Errors in one line: the argument, what was expected, what came."""

from __future__ import annotations

import torch

from ...ops._backend import FLOATS


def expect(condition: bool, name: str, expected: str, got) -> None:
    """Raise ValueError naming the argument unless the condition holds."""
    if not condition:
        if isinstance(got, torch.Tensor):
            got = f"{str(got.dtype).removeprefix('torch.')} tensor of shape {tuple(got.shape)}"
        raise ValueError(f"argument `{name}`: expected {expected}, got {got}")


def expect_float(name: str, tensor: torch.Tensor, shape: tuple, expected: str) -> None:
    """A float32 or float64 tensor; a shape's None stands for any number."""
    fits = (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in FLOATS
        and tensor.ndim == len(shape)
        and all(want is None or got == want for got, want in zip(tensor.shape, shape, strict=True))
    )
    expect(fits, name, f"float32 or float64 tensor of shape {expected}", tensor)


def expect_index(name: str, tensor: torch.Tensor, expected: str) -> None:
    """A flat tensor of integers."""
    fits = (
        isinstance(tensor, torch.Tensor)
        and tensor.ndim == 1
        and tensor.dtype in (torch.int64, torch.int32)
    )
    expect(fits, name, f"int64 tensor of shape {expected}", tensor)


def expect_packed(name: str, packed_info: torch.Tensor) -> None:
    """Start and count a ray."""
    fits = (
        isinstance(packed_info, torch.Tensor)
        and packed_info.ndim == 2
        and packed_info.shape[1] == 2
        and packed_info.dtype in (torch.int64, torch.int32)
    )
    expect(fits, name, "int64 tensor of shape (n_rays, 2)", packed_info)
