"""Stratified samples along rays, where the occupancy grid says there is something."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._backend import (
    autocast,
    check_range,
    check_tensor,
    kernels,
    ptr,
    register,
    scalar,
    settled,
    stream,
)

EDGE = 8  # cells along the edge of a block that is jumped over when empty
SMALLEST = 1e-18  # of a length: the reciprocal of its square is still a float32
LARGEST = 1e18


class Samples(NamedTuple):
    """Packed samples: rows [start, start + count) of the flat arrays belong to a ray.

    The arrays have `capacity` rows; rows that belong to no ray are zero. `count` is the number of
    samples demanded: above capacity, the rays from the first one on that did not fit have none.
    The CPU serves rays in their order. CUDA serves them in any order, which may change from call
    to call: find a ray's samples through `packed`. Either way the rows in use come first.
    """

    positions: torch.Tensor  # (capacity, 3)
    t: torch.Tensor  # (capacity,) distances along the ray
    dt: torch.Tensor  # (capacity,) widths of the bins
    packed: torch.Tensor  # (R, 2) int32, start and count
    count: torch.Tensor  # (1,) int32


@autocast()
def march(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    bitfield: torch.Tensor,
    resolution: int,
    bound: float,
    step: float,
    capacity: int,
    seed: int | torch.Tensor,
    jitter: bool = True,
    limit: torch.Tensor | None = None,
    first_ray: int = 0,
) -> Samples:
    """Place one sample in each bin of every ray (NeRF, Mildenhall et al. 2020, eq. 2), and keep
    those in occupied cells (instant-ngp, Müller et al. 2022, appendix E.1).

    Bin i of a ray is [near + i step, near + (i + 1) step), the last one cut at far. Its sample lies
    at t = near + i step + u dt, where dt is the bin's width and u = uniform01(seed, ray, i), or
    1/2 without jitter. A sample is kept if the bit of its cell is set; the grid covers the cube
    [-bound, bound)³, outside of which there is nothing. Cell (x, y, z) has index
    (x G + y) G + z, G = resolution, and is bit index % 8 of byte index / 8.

    A ray's samples are in the order of distances, and the same, bit for bit, on every instruction
    set and number of threads and on CUDA. On the CPU rays follow each other in their order; on CUDA
    in any, and when capacity is short it is left open which rays have none. Not differentiable: the
    results require no gradient.

    Args:
        rays_o: (R, 3) float32 or float64, origins.
        rays_d: (R, 3) like rays_o, directions of any length but 0; distances are in units of it.
        near: (R,) like rays_o, where each ray's bins start.
        far: (R,) like rays_o, where they end, at most 2^20 steps on; far <= near: no bins.
        bitfield: (G³ / 8,) uint8, the occupied cells, as `occupancy_update` leaves them.
        resolution: G, even, 2 to 1024.
        bound: half the edge of the cube, above 0.
        step: width of a bin, above 0.
        capacity: rows of the results, 1 to 2^31 - 1.
        seed: of the jitter; an int64 tensor (1,) may be changed between replays of a CUDA graph.
        jitter: place samples at random in their bins, or in the middle.
        limit: (R,) int32, how many samples each ray may have, its nearest ones; None: all.
        first_ray: number of the first ray, 0 to 2^32 - R: a part of the rays is jittered as in a
            call with all of them.
    Returns:
        Samples: positions, t and dt in the dtype of rays_o, packed and count.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
        ValueError: (CPU; on CUDA such rays have no samples) a ray is not finite, its direction is
            zero, its near or far is NaN, or it has more than 2^20 bins.
    """
    check_tensor("rays_o", rays_o, shape=("R", 3))
    n = rays_o.shape[0]
    like = (rays_o.dtype, (n,), rays_o.device)
    check_tensor("rays_d", rays_d, rays_o.dtype, (n, 3), rays_o.device)
    check_tensor("near", near, *like)
    check_tensor("far", far, *like)
    check_resolution(resolution)
    check_tensor("bitfield", bitfield, torch.uint8, (resolution**3 // 8,), rays_o.device)
    check_range("bound", bound, SMALLEST, LARGEST)
    check_range("step", step, SMALLEST, LARGEST)
    check_range("capacity", capacity, 1, 2**31 - 1)
    check_tensor("limit", limit, torch.int32, (n,), rays_o.device, optional=True)
    check_range("first_ray", first_ray, 0, 2**32 - n)
    seed = seed_tensor(seed, rays_o.device)
    with torch.no_grad():
        return Samples(
            *torch.ops.dreamfusion_fast.march(
                rays_o, rays_d, near, far, bitfield, resolution, bound, step, capacity, seed,
                jitter, limit, first_ray,
            )
        )  # fmt: skip


def check_resolution(resolution: int) -> None:
    check_range("resolution", resolution, 2, 1024)
    if resolution % 2:
        raise ValueError(f"argument `resolution`: expected an even number, got {resolution}")


def seed_tensor(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor (1,) on the device, checked."""
    device = settled(device)
    if isinstance(seed, torch.Tensor):
        check_tensor("seed", seed, torch.int64, (1,), device)
        return seed
    if not isinstance(seed, int):
        raise TypeError(
            f"argument `seed`: expected int or int64 tensor of shape (1,), got "
            f"{type(seed).__name__}"
        )
    check_range("seed", seed, -(2**63), 2**63 - 1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _empty(
    rays_o, rays_d, near, far, bitfield, resolution, bound, step, capacity, seed, jitter,
    limit=None, first_ray=0,
):  # fmt: skip
    rows = [rays_o.new_empty(shape) for shape in ((capacity, 3), (capacity,), (capacity,))]
    packed = rays_o.new_empty((rays_o.shape[0], 2), dtype=torch.int32)
    return *rows, packed, rays_o.new_empty((1,), dtype=torch.int32)


def _march(
    rays_o, rays_d, near, far, bitfield, resolution, bound, step, capacity, seed, jitter,
    limit=None, first_ray=0,
):  # fmt: skip
    out = _empty(
        rays_o, rays_d, near, far, bitfield, resolution, bound, step, capacity, seed, jitter
    )
    first = torch.empty_like(near, dtype=torch.int32)
    blocks = bitfield.new_empty((-(-resolution // EDGE)) ** 3)
    counter = seed.new_empty(2)
    kernels(rays_o).march(
        scalar(rays_o),
        *map(ptr, (rays_o, rays_d, near, far, bitfield, seed, limit, *out, first, blocks, counter)),
        rays_o.shape[0], capacity, first_ray, resolution, bound, step, jitter, stream(rays_o),
    )  # fmt: skip
    return out


register(
    "march(Tensor rays_o, Tensor rays_d, Tensor near, Tensor far, Tensor bitfield,"
    " SymInt resolution, float bound, float step, SymInt capacity, Tensor seed, bool jitter,"
    " Tensor? limit=None, SymInt first_ray=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _march,
    _empty,
)
