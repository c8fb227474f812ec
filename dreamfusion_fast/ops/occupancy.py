"""The occupancy grid: which cells of a cube are worth a sample."""

from __future__ import annotations

import torch

from ._backend import FLOATS, check_range, check_tensor, kernels, ptr, register, scalar, stream
from .march import LARGEST, SMALLEST, check_resolution, seed_tensor

CHUNK = 1 << 14  # cells that are summed in one go: the order of a sum never depends on threads


def occupancy_points(
    resolution: int,
    bound: float,
    seed: int | torch.Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Pick a random point in each cell of the grid, at which to evaluate the density.

    The point of cell (x, y, z), with index c = (x G + y) G + z and G = resolution, is
    ((x, y, z) + u) 2 bound / G - bound, where u_k = uniform01(seed, c, k).

    Args:
        resolution: G, cells along an edge, even, 2 to 1024.
        bound: the grid covers the cube [-bound, bound]³; above 0.
        seed: int, or int64 tensor (1,), which may change between replays of a CUDA graph.
        dtype: float32 or float64.
        device: of the result; None: that of the seed, the CPU for an int.
    Returns:
        (G³, 3), dtype; in the order of cells.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_resolution(resolution)
    check_range("bound", bound, SMALLEST, LARGEST)
    if dtype not in FLOATS:
        raise TypeError(f"argument `dtype`: expected float32 or float64, got {dtype}")
    if device is None:
        device = seed.device if isinstance(seed, torch.Tensor) else "cpu"
    seed = seed_tensor(seed, torch.device(device))
    return torch.ops.dreamfusion_fast.occupancy_points(resolution, bound, seed, dtype)


def occupancy_update(
    ema: torch.Tensor,
    bitfield: torch.Tensor,
    density: torch.Tensor,
    decay: float,
    threshold: float,
) -> None:
    """Update the grid in place from the density in each cell (instant-ngp, Müller et al. 2022,
    appendix E.2).

    ema = max(ema decay, density); a cell's bit is set if its ema > min(threshold, mean of ema).
    NaN and negative numbers count as 0. Where all cells are equal and below the threshold none
    is above the mean: start training from a bitfield with all bits set.

    Args:
        ema: (G³,) float32 or float64, decaying maximum of the density; changed.
        bitfield: (G³ / 8,) uint8, bit c % 8 of byte c / 8 for cell c; changed.
        density: (G³,) like ema, the density found in each cell.
        decay: factor on ema, 0 to 1.
        threshold: density above which a cell is occupied whatever the mean, from 0.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_tensor("ema", ema, shape=("N",))
    n = ema.shape[0]
    if n % 8 or not 8 <= n <= 2**30:
        raise ValueError(f"argument `ema`: expected a multiple of 8 up to 2^30 cells, got {n}")
    check_tensor("bitfield", bitfield, torch.uint8, (n // 8,), ema.device)
    check_tensor("density", density, ema.dtype, (n,), ema.device)
    check_range("decay", decay, 0, 1)
    check_range("threshold", threshold, 0, float("inf"))
    with torch.no_grad():
        torch.ops.dreamfusion_fast.occupancy_update(ema, bitfield, density, decay, threshold)


def _empty_points(resolution, bound, seed, dtype):
    return seed.new_empty((resolution**3, 3), dtype=dtype)


def _points(resolution, bound, seed, dtype):
    points = _empty_points(resolution, bound, seed, dtype)
    kernels(seed).occupancy_points(
        scalar(points), ptr(seed), ptr(points), resolution, bound, stream(seed)
    )
    return points


def _update(ema, bitfield, density, decay, threshold):
    changed = [x for x in (ema, bitfield) if not x.is_inference()]
    torch.autograd.graph.increment_version(changed)  # autograd then notices the change
    n = ema.shape[0]
    partial = ema.new_empty(-(-n // CHUNK), dtype=torch.float64)
    kernels(ema).occupancy_update(
        scalar(ema), ptr(ema), ptr(bitfield), ptr(density), ptr(partial), n, CHUNK, decay,
        threshold, stream(ema),
    )  # fmt: skip


register(
    "occupancy_points(SymInt resolution, float bound, Tensor seed, ScalarType dtype) -> Tensor",
    _points,
    _empty_points,
)
register(
    "occupancy_update(Tensor(a!) ema, Tensor(b!) bitfield, Tensor density, float decay,"
    " float threshold) -> ()",
    _update,
    lambda *args: None,
)
