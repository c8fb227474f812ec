"""Proposal networks (mip-NeRF 360, Barron et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._checks import expect
from ..data_specs import RayIntervals
from ..pdf import importance_sampling, searchsorted
from ..volrend import render_transmittance_from_density
from .base import AbstractEstimator


class PropNetEstimator(AbstractEstimator):
    """Samples by the weights that small density networks propose.

    Args:
        optimizer, scheduler: of the proposal networks, for `update_every_n_steps`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.prop_cache: list = []

    @torch.no_grad()
    def sampling(
        self,
        prop_sigma_fns: list[Callable],
        prop_samples: list[int],
        num_samples: int,
        n_rays: int,
        near_plane: float,
        far_plane: float,
        sampling_type: Literal["uniform", "lindisp"] = "lindisp",
        stratified: bool = False,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Sample uniformly, then by the density of one proposal network after the other.

        Args:
            prop_sigma_fns: (t_starts, t_ends) -> densities, all (n_rays, n); in order.
            prop_samples: n of each of them.
            num_samples: samples in the end.
            near_plane, far_plane: where rays start and end: numbers, or tensors that broadcast.
            sampling_type: distances are uniform in t, or in 1 / t.
            stratified: shift the samples of each ray at random.
            requires_grad: keep what `update_every_n_steps` and `compute_loss` need.
        Returns:
            t_starts, t_ends: (n_rays, num_samples).
        """
        n = len(prop_sigma_fns)
        expect(len(prop_samples) == n, "prop_samples", f"{n} numbers", len(prop_samples))
        cdfs = torch.tensor([0.0, 1.0], device=self.device).repeat(n_rays, 1)
        intervals = RayIntervals(vals=cdfs)
        for function, count in zip(prop_sigma_fns, prop_samples, strict=True):
            intervals, _ = importance_sampling(intervals, cdfs, count, stratified)
            t = _transform_stot(sampling_type, intervals.vals, near_plane, far_plane)
            with torch.set_grad_enabled(requires_grad):
                sigmas = function(t[..., :-1], t[..., 1:])
                shape = (n_rays, count)
                expect(sigmas.shape == shape, "prop_sigma_fns[...]()", f"shape {shape}", sigmas)
                trans, _ = render_transmittance_from_density(t[..., :-1], t[..., 1:], sigmas)
                cdfs = _cdfs(trans)
                if requires_grad:
                    self.prop_cache.append((intervals, cdfs))
        intervals, _ = importance_sampling(intervals, cdfs, num_samples, stratified)
        if requires_grad:
            self.prop_cache.append((intervals, None))
        t = _transform_stot(sampling_type, intervals.vals, near_plane, far_plane)
        return t[..., :-1], t[..., 1:]

    @torch.enable_grad()
    def compute_loss(self, trans: Tensor, loss_scaler: float = 1.0) -> Tensor:
        """How much of the field's weights the proposed ones do not cover; 0 if nothing was kept.

        Args:
            trans: (n_rays, num_samples), transmittance of the last samples; a constant here.
        """
        if not self.prop_cache:
            return torch.zeros((), device=self.device)
        intervals, _ = self.prop_cache.pop()
        cdfs = _cdfs(trans).detach()
        loss = 0.0
        while self.prop_cache:
            loss = loss + _pdf_loss(intervals, cdfs, *self.prop_cache.pop()).mean()
        return loss * loss_scaler

    @torch.enable_grad()
    def update_every_n_steps(
        self, trans: Tensor, requires_grad: bool = False, loss_scaler: float = 1.0
    ) -> float:
        """One step of the optimizer, if requires_grad, and of the scheduler. The loss (0.0)."""
        if requires_grad:
            return self._update(trans, loss_scaler)
        if self.scheduler is not None:
            self.scheduler.step()
        return 0.0

    @torch.enable_grad()
    def _update(self, trans: Tensor, loss_scaler: float = 1.0) -> float:
        if not self.prop_cache:
            raise RuntimeError("nothing to learn from: call sampling(requires_grad=True) before")
        expect(self.optimizer is not None, "optimizer", "an optimizer at construction", None)
        loss = self.compute_loss(trans, loss_scaler)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()


def get_proposal_requires_grad_fn(
    target: float = 5.0, num_steps: int = 1000
) -> Callable[[int], bool]:
    """A function of the step: whether the proposal networks are to learn in it. One in `target`
    steps from num_steps on, more often before. It counts its calls: once a step."""
    since = 0

    def proposal_requires_grad_fn(step: int) -> bool:
        nonlocal since
        learn = since > min(step / num_steps, 1.0) * target
        since = 1 if learn else since + 1
        return learn

    return proposal_requires_grad_fn


def _cdfs(trans: Tensor) -> Tensor:
    """The CDF at all edges, (n_rays, n + 1), where nothing gets through the last sample."""
    return 1.0 - torch.cat([trans, torch.zeros_like(trans[:, :1])], dim=-1)


def _transform_stot(
    transform_type: Literal["uniform", "lindisp"],
    s_vals: Tensor,
    t_min: float | Tensor,
    t_max: float | Tensor,
) -> Tensor:
    """From [0, 1] to [t_min, t_max]: linear in t, or in 1 / t."""
    if transform_type == "uniform":
        return s_vals * t_max + (1 - s_vals) * t_min
    expect(transform_type == "lindisp", "sampling_type", "'uniform' or 'lindisp'", transform_type)
    return 1 / (s_vals * (1 / t_max) + (1 - s_vals) * (1 / t_min))


def _pdf_loss(
    segments_query: RayIntervals,
    cdfs_query: Tensor,
    segments_key: RayIntervals,
    cdfs_key: Tensor,
    eps: float = 1e-7,
) -> Tensor:
    """max(0, w - w')² / (w + eps) of each query interval: its weight w, and the weight w' of the
    key intervals that touch it. Batched, or flat with is_left and is_right (and packed_info)."""
    left, right = searchsorted(segments_key, segments_query)
    if segments_query.vals.ndim > 1:
        w = cdfs_query[..., 1:] - cdfs_query[..., :-1]
        left, right = left[..., :-1], right[..., 1:]
    else:
        is_left, is_right = segments_query.is_left, segments_query.is_right
        expect(is_left is not None, "segments_query.is_left", "a mask for flat edges", None)
        expect(is_right is not None, "segments_query.is_right", "a mask for flat edges", None)
        w = cdfs_query[is_right] - cdfs_query[is_left]
        left, right = left[is_left], right[is_right]
    bound = cdfs_key.gather(-1, right) - cdfs_key.gather(-1, left)
    return (w - bound).clamp(min=0) ** 2 / (w + eps)
