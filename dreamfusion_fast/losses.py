"""Regularizers beside the SDS gradient, and the schedules of their weights.

All are averaged over views and summed over pixels, as the SDS gradient is (a weight then means the
same at every picture size), and so is each term of DreamFusion's A.2 taken here. Open systems that
average over pixels need their weights divided by the number of pixels. Those of normals count in
steps with light.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import LossConfig, Schedule

NAMES = (
    "opacity",
    "orientation",
    "entropy",
    "distortion",
    "normal_smoothness",
    "transmittance",
)
SCHEDULED = (*NAMES, "transmittance_target")
OPACITY_MARGIN = 1e-5  # of the entropy, from 0 and 1, where its slope is infinite


def weight_at(schedule: Schedule, share: float) -> float:
    """The weight at `share` (0 to 1) of the run: from schedule's start to its end, linearly until
    its third number, constant from there on."""
    start, end, until = schedule
    return start + (end - start) * min(1.0, share / until)


def weights_at(config: LossConfig, share: float) -> Tensor:
    """(7,) float32 at `share` of the run: weights in the order of NAMES, transmittance's target."""
    return torch.tensor([weight_at(getattr(config, name), share) for name in SCHEDULED])


def active(config: LossConfig) -> frozenset[str]:
    """Names of the regularizers that have a weight at some step."""
    return frozenset(name for name in NAMES if any(getattr(config, name)[:2]))


def weighted(terms: dict[str, Tensor], weights: Tensor) -> Tensor:
    """() the sum of the terms, each times its number of weights, see weights_at."""
    return torch.stack([weights[NAMES.index(name)] * x for name, x in terms.items()]).sum()


def check_schedules(config: LossConfig) -> None:
    """Raise ValueError, naming the setting, for a schedule that cannot be followed."""
    for name in SCHEDULED:
        schedule = getattr(config, name)
        numbers = isinstance(schedule, tuple) and len(schedule) == 3
        if not numbers or not all(isinstance(x, (int, float)) for x in schedule):
            raise ValueError(f"config `loss.{name}`: expected (start, end, until), got {schedule}")
        if not all(0 <= weight < math.inf for weight in schedule[:2]):
            raise ValueError(
                f"config `loss.{name}`: expected weights of at least 0, got {schedule[:2]}"
            )
        if not 0 < schedule[2] <= 1:
            raise ValueError(
                f"config `loss.{name}`: expected an end above 0 and up to 1, the share of the run, "
                f"got {schedule[2]}: schedules past the last step never reach their end"
            )


def opacity_penalty(opacity: Tensor) -> Tensor:
    """sqrt(o² + 0.01), which empties space (DreamFusion A.2).

    opacity: (B, ...) in [0, 1]. Returns (), summed over pixels, averaged over views.
    """
    return (opacity.square() + 0.01).sqrt().sum() / len(opacity)


def orientation_penalty(orientation: Tensor) -> Tensor:
    """sum_i stopgrad(w_i) max(0, n_i . v)², which turns visible normals to the camera (R_o of
    Ref-NeRF, Verbin et al. 2022; DreamFusion A.2).

    orientation: (B, ...) at least 0, each ray's sum over its samples, as the renderer gives it.
    Returns (), summed over pixels, averaged over views.
    """
    return orientation.sum() / len(orientation)


def entropy(opacity: Tensor) -> Tensor:
    """-(o log o + (1 - o) log(1 - o)), which makes pixels full or empty (in
    stable-dreamfusion: there in bits).

    opacity: (B, ...), cut to [1e-5, 1 - 1e-5]: beyond, the gradient is 0.
    Returns (), in nats, summed over pixels, averaged over views.
    """
    o = opacity.clamp(OPACITY_MARGIN, 1.0 - OPACITY_MARGIN)
    return (torch.special.entr(o) + torch.special.entr(1.0 - o)).sum() / len(opacity)


def transmittance(opacity: Tensor, target: Tensor) -> Tensor:
    """-min(target, mean of 1 - o), which empties a picture down to a target (Dream Fields, Jain et
    al. 2022, eq. 6).

    opacity: (B, ...) in [0, 1]; target: () in [0, 1].
    Returns (), averaged over pixels, unlike the others, and views.
    """
    return -torch.minimum(target, 1.0 - opacity.flatten(1).mean(1)).mean()


def normal_smoothness(normals: Tensor) -> Tensor:
    """|n_p - n_q|² over all pairs of pixels p, q side by side or one above the other (the
    smoothness of the normal picture in stable-dreamfusion).

    normals: (B, 3, H, W). Returns (), summed over pairs, averaged over views.
    """
    across, down = normals.diff(dim=3), normals.diff(dim=2)
    return (across.square().sum() + down.square().sum()) / len(normals)


def distortion(weights: Tensor, t: Tensor, dt: Tensor, packed: Tensor) -> Tensor:
    """sum_ij w_i w_j |t_i - t_j| + 1/3 sum_i w_i² dt_i of each ray, which draws its weight together
    (mip-NeRF 360, Barron et al. 2022, eq. 15, of distances in scene units).

    With distances ascending the first sum is 2 sum_i w_i (t_i W_i - T_i), where W_i and T_i sum
    w_j and w_j t_j over the ray's samples before i: O(S). The running sums go over all rays, in
    float64: a ray's own sum is the difference of two of them.

    Args:
        weights: (S,) float32 or float64, of composite; differentiable.
        t: (S,) like weights, distances along the ray, ascending within a ray.
        dt: (S,) like weights, widths of the bins.
        packed: (R, 2) integers, each ray's first row and number of rows, as `march` packs them.
            Rows that belong to no ray count for nothing.
    Returns:
        (R,) like weights. Shapes do not depend on numbers: never waits for the device.
    """
    packed = packed.long()
    first, inside = _rows(packed, len(weights))
    w, t, dt = torch.where(inside, weights, 0.0).double(), t.double(), dt.double()
    before, before_t = (_before(x) for x in (w, w * t))
    own, own_t = (x[:-1] - x.index_select(0, first) for x in (before, before_t))
    terms = 2.0 * w * (t * own - own_t) + w.square() * dt / 3.0
    sums = _before(terms)
    ends = packed.cumsum(1).clamp(max=len(weights))  # row after the ray's last in column 1
    return (sums.index_select(0, ends[:, 1]) - sums.index_select(0, ends[:, 0])).to(weights.dtype)


def _before(x: Tensor) -> Tensor:
    """(S + 1,) sums of the rows before each."""
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))


def _rows(packed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For n rows: first row (n,) of the ray that each belongs to, and whether it is in one."""
    start, count = packed.unbind(1)
    slot = torch.where(count > 0, start, n)  # rays without samples: one row further
    marks = torch.zeros(2, n + 1, dtype=torch.int64, device=packed.device)
    marks.index_copy_(1, slot, torch.stack((start, start + count)))
    first, end = marks[:, :n].cummax(1).values
    return first, torch.arange(n, device=packed.device) < end
