"""March, field and composite as one op in bounded memory.

Rays go through in batches. The first are kept for backward, as many as have the samples of one
batch together; backward makes the others' again, and only those that the early stop let count.
Memory is what two batches need, however many rays there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import check_range
from .composite import composite, composite_lit
from .march import Samples, march

MAX_CHANNELS = 8  # of composite
STOP_SLACK = 1e-5  # opacities are sums: a ray this near to its early stop is taken as going on

# (positions (N, 3), count (1,) int32) -> sigma (N,), values (N, C), gradient (N, 3) or None
Query = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


class Rays(NamedTuple):
    """Origins and directions (R, 3); near and far (R,); arguments of `march`."""

    o: Tensor
    d: Tensor
    near: Tensor
    far: Tensor


class Grid(NamedTuple):
    """The occupancy grid and the bins, as `march` takes them."""

    bitfield: Tensor
    resolution: int
    bound: float
    step: float


class Composited(NamedTuple):
    """Sums over each ray's samples, as `composite` or `composite_lit` gives them, and the number of
    samples (1,) int32. normal and orientation: None without light."""

    colour: Tensor  # (R, C)
    opacity: Tensor  # (R,)
    depth: Tensor  # (R,)
    count: Tensor  # (1,) int32
    normal: Tensor | None = None  # (R, 3)
    orientation: Tensor | None = None  # (R,)


def composite_samples(
    query: Query, samples: Samples, rays: Rays, early_stop: float, shading: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Colour, opacity, depth and weights, of any number of channels; with shading (as
    `composite_lit` takes it) also normal and orientation."""
    sigma, values, gradient = query(samples.positions, samples.count)
    rest = samples.t, samples.dt, samples.packed
    if shading is not None:
        return composite_lit(
            sigma, values, gradient, *rest, rays.o, rays.d, shading, early_stop
        )  # fmt: skip
    split = [
        composite(sigma, part.contiguous(), *rest, early_stop)
        for part in values.split(MAX_CHANNELS, 1)
    ]
    return torch.cat([colour for colour, *_ in split], 1), *split[0][1:]


def visible_samples(weights: Tensor, opacity: Tensor, packed: Tensor, early_stop: float) -> Tensor:
    """How many samples of each ray come before its early stop, (R,) int32: those with a gradient.

    Args:
        weights: (S,) of the samples, and opacity: (R,), as `composite` gives them.
        packed: (R, 2) int32, start and count of each ray's samples.
        early_stop: as given to `composite`.
    """
    start, count = packed.long().unbind(1)
    rows = torch.arange(1, len(weights) + 1, device=weights.device)
    last = torch.where(weights != 0, rows, 0).cummax(0).values  # the last one to count, up to a row
    last = torch.cat((last.new_zeros(1), last))[start + count] - start
    ended = opacity > 1.0 - early_stop + STOP_SLACK
    return torch.where(ended, last.clamp(min=0), count).int()


def render(
    query: Query,
    parameters: Sequence[Tensor],
    rays: Rays,
    grid: Grid,
    seed: int | Tensor,
    jitter: bool = True,
    early_stop: float = 0.0,
    shading: Tensor | None = None,
    rows: int = 1 << 19,
    bins: int | None = None,
) -> Composited:
    """Volume rendering of a field (NeRF, Mildenhall et al. 2020, eq. 3) in bounded memory.

    The same numbers as march, query and composite one after the other, by batches of so many rays
    that their samples cannot be more than `rows`; gradients sum the batches in their order. Nothing
    waits for a GPU if `bins` is given.

    Args:
        query: the field, called as query(positions (N, 3), count (1,) int32); rows past count are
            of no ray. Returns sigma (N,) per scene unit, values (N, C), and, needed with shading,
            the gradient of log density by position (N, 3), else anything. Must give the same when
            backward calls it again.
        parameters: the tensors that query depends on and that may get gradients.
        rays: origins, directions, near and far, as `march` takes them: no gradient reaches them.
        grid: occupancy grid and bins, as `march` takes them.
        seed: of the jitter, as for `march`.
        jitter: place samples at random in their bins, or in the middle.
        early_stop: transmittance below which a ray ends, 0 (never) to 1.
        shading: (B, 7), light of each of B views, as `composite_lit` takes it. None: as they are.
        rows: samples a batch has room for, at least, and that are kept for backward, at most; 1 to
            2^31 - 1.
        bins: the most samples that any ray can have; None: counted here. Where a GPU is told too
            few, some rays have no samples; the CPU raises ValueError.
    Returns:
        Composited: differentiable once with respect to parameters.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    rays, grid = Rays(*rays), Grid(*grid)
    check_range("rows", rows, 1, 2**31 - 1)
    if bins is None:
        spans = ((rays.far - rays.near) / grid.step).clamp(min=0.0)
        bins = math.ceil(float(spans.max())) if len(spans) else 0
    check_range("bins", bins, 0, 1 << 20)
    if shading is not None and (len(shading) == 0 or len(rays.o) % len(shading)):
        raise ValueError(
            f"argument `shading`: expected a row a view, their number from 1 and a divisor of the"
            f" {len(rays.o)} rays, got {len(shading)}"
        )
    kept = rows if torch.is_grad_enabled() else 0
    plan = _Plan(query, rays, grid, seed, jitter, early_stop, shading, rows, max(bins, 1), kept)
    return Composited(*_Batched.apply(plan, *parameters))


@dataclass
class _Plan:
    """What to render, and how to share it out into batches."""

    query: Query
    rays: Rays
    grid: Grid
    seed: int | Tensor
    jitter: bool
    early_stop: float
    shading: Tensor | None
    rows: int
    bins: int
    kept_rows: int  # samples that may be kept for backward

    def batches(self) -> list[tuple[int, int]]:
        """Ranges of rays. With light none reaches from one view into the next: rays of a view share
        its light."""
        n, size = len(self.rays.o), max(1, self.rows // self.bins)
        views = 1 if self.shading is None else len(self.shading)
        per_view = n // views
        starts = [
            view * per_view + first
            for view in range(views)
            for first in range(0, max(per_view, 1), size)
        ]
        return list(zip(starts, [*starts[1:], n]))

    def batch(self, begin: int, end: int, limit: Tensor | None):
        """Samples of rays [begin, end), and what composite_samples makes of them."""
        rays = Rays(*(x[begin:end] for x in self.rays))
        capacity = max(1, (end - begin) * self.bins)
        samples = march(
            *rays, *self.grid, capacity, self.seed, self.jitter, limit=limit, first_ray=begin
        )
        samples = trimmed(samples)
        shading = self.shading
        if shading is not None:
            view = begin * len(shading) // max(1, len(self.rays.o))
            shading = shading[view : view + 1]
        return samples, composite_samples(self.query, samples, rays, self.early_stop, shading)


def trimmed(samples: Samples) -> Samples:
    """Without the rows of no ray on the CPU, where reading the count waits for nothing; never less
    than one row."""
    if samples.count.device.type != "cpu":
        return samples
    count, capacity = int(samples.count), len(samples.t)
    if count > capacity:
        raise ValueError(f"argument `bins`: too small: {count} samples, room for {capacity}")
    rows = max(1, count)
    whole = samples.positions[:rows], samples.t[:rows], samples.dt[:rows]
    return Samples(*whole, samples.packed, samples.count)


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *parameters: Tensor):
        results, kept, limits, count = [], [], [], 0
        backward = plan.kept_rows > 0 and any(ctx.needs_input_grad)
        room = plan.kept_rows if backward else 0
        for begin, end in plan.batches():
            with torch.set_grad_enabled(room > 0):
                samples, outputs = plan.batch(begin, end, None)
            colour, opacity, depth, weights, *light = (x.detach() for x in outputs)
            results.append((colour, opacity, depth, *light))
            count = count + samples.count
            fits = len(samples.t) <= room
            room = room - len(samples.t) if fits else 0
            kept.append(outputs if fits else None)
            limit = None  # of the samples that backward makes again
            if backward and not fits:
                limit = visible_samples(weights, opacity, samples.packed, plan.early_stop)
            limits.append(limit)
        ctx.plan, ctx.kept, ctx.limits = plan, kept, limits
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        colour, opacity, depth, *light = (torch.cat(parts) for parts in zip(*results))
        return colour, opacity, depth, count, *light

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_colour, grad_opacity, grad_depth, _count, *grad_light):
        parameters, plan = ctx.saved_tensors, ctx.plan  # raises if one has been written to since
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[1:]) if needed]
        incoming = grad_colour, grad_opacity, grad_depth, None, *grad_light  # None: weights
        total: list[Tensor | None] = [None] * len(wanted)
        for i, (begin, end) in enumerate(plan.batches()):
            outputs, ctx.kept[i] = ctx.kept[i], None  # its graph serves once
            if outputs is None:
                with torch.enable_grad():
                    _, outputs = plan.batch(begin, end, ctx.limits[i])
            pairs = [
                (out, grad[begin:end])
                for out, grad in zip(outputs, incoming)
                if grad is not None and out.requires_grad
            ]
            if not pairs or not wanted:
                continue
            results, grads = zip(*pairs)
            found = torch.autograd.grad(results, wanted, grads, allow_unused=True)
            for k, grad in enumerate(found):
                if grad is not None:
                    total[k] = grad if total[k] is None else total[k].add_(grad)
        found = iter(total)
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
