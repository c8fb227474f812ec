"""Nested occupancy grids (instant-ngp, Müller et al. 2022, appendix E.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import expect
from ..grid import _enlarge_aabb, traverse_grids
from ..volrend import render_visibility_from_alpha, render_visibility_from_density
from .base import AbstractEstimator


class OccGridEstimator(AbstractEstimator):
    """Skips the cells that a field left empty.

    Args:
        roi_aabb: six numbers, lower and upper corner of the finest grid.
        resolution: cells a side, one number or three.
        levels: grids, each with a box twice as large as the one before.
    Buffers (the state dict): resolution (3,) int32, aabbs (levels, 6), binaries (levels, x, y, z)
        bool, and occs (levels x y z,), the decaying maximum of occupancies (-1: never sampled).
    """

    DIM: int = 3

    def __init__(
        self,
        roi_aabb: list | tuple | Tensor,
        resolution: int | list | tuple | Tensor = 128,
        levels: int = 1,
        **kwargs,
    ) -> None:
        super().__init__()
        if "contraction_type" in kwargs:
            raise ValueError("argument `contraction_type`: nerfacc itself dropped it in 0.4.0")
        if kwargs:
            raise TypeError(f"argument `{next(iter(kwargs))}`: OccGridEstimator has none such")
        if isinstance(resolution, int):
            resolution = [resolution] * self.DIM
        if not isinstance(resolution, Tensor):
            resolution = torch.tensor(resolution, dtype=torch.int32)
        expect(resolution.shape == (3,), "resolution", "one number or three", resolution)
        if not isinstance(roi_aabb, Tensor):
            roi_aabb = torch.tensor(roi_aabb, dtype=torch.float32)
        expect(roi_aabb.shape == (6,), "roi_aabb", "six numbers", roi_aabb)
        expect(levels >= 1, "levels", "1 or more", levels)
        cells = resolution.tolist()
        self.levels = levels
        self.cells_per_lvl = cells[0] * cells[1] * cells[2]
        self.register_buffer("resolution", resolution)
        self.register_buffer(
            "aabbs", torch.stack([_enlarge_aabb(roi_aabb, 2**i) for i in range(levels)])
        )
        self.register_buffer("occs", torch.zeros(levels * self.cells_per_lvl))
        self.register_buffer("binaries", torch.zeros([levels, *cells], dtype=torch.bool))
        coords = torch.cartesian_prod(*[torch.arange(n) for n in cells])
        self.register_buffer("grid_coords", coords, persistent=False)
        self.register_buffer("grid_indices", torch.arange(self.cells_per_lvl), persistent=False)

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        sigma_fn: Callable | None = None,
        alpha_fn: Callable | None = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        cone_angle: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The samples of rays in occupied cells, and of those the visible ones.

        Args:
            rays_o, rays_d: (n_rays, 3).
            sigma_fn: (t_starts, t_ends, ray_indices) -> densities, all (n_samples,). Given it or
                alpha_fn (opacities; sigma_fn goes first), samples are dropped where transmittance
                is below early_stop_eps, or opacity below the least of alpha_thre and the mean of
                occs.
            near_plane, far_plane: where all rays start and end.
            t_min, t_max: (n_rays,), where each does, within the planes.
            render_step_size, cone_angle: see `traverse_grids`.
            stratified: start each ray up to one step later, at random.
        Returns:
            ray_indices (n_samples,) int64, t_starts, t_ends (n_samples,). No gradient.
        """
        near = torch.full_like(rays_o[..., 0], near_plane)
        far = torch.full_like(rays_o[..., 0], far_plane)
        if t_min is not None:
            near = torch.maximum(near, t_min)
        if t_max is not None:
            far = torch.minimum(far, t_max)
        if stratified:
            near = near + torch.rand_like(near) * render_step_size
        intervals, samples, _ = traverse_grids(
            rays_o, rays_d, self.binaries, self.aabbs, near_planes=near, far_planes=far,
            step_size=render_step_size, cone_angle=cone_angle,
        )  # fmt: skip
        t_starts = intervals.vals[intervals.is_left]
        t_ends = intervals.vals[intervals.is_right]
        found = (samples.ray_indices, t_starts, t_ends)
        function = alpha_fn if sigma_fn is None else sigma_fn
        if function is None or not (alpha_thre > 0 or early_stop_eps > 0):
            return found
        values = torch.empty_like(t_starts)
        if len(t_starts):
            values = function(t_starts, t_ends, samples.ray_indices)
        name = "alpha_fn()" if sigma_fn is None else "sigma_fn()"
        expect(values.shape == t_starts.shape, name, f"shape {tuple(t_starts.shape)}", values)
        options = {
            "packed_info": samples.packed_info,
            "early_stop_eps": early_stop_eps,
            "alpha_thre": min(alpha_thre, self.occs.mean().item()),
        }
        if sigma_fn is None:
            visible = render_visibility_from_alpha(values, **options)
        else:
            visible = render_visibility_from_density(t_starts, t_ends, values, **options)
        return tuple(x[visible] for x in found)

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable,
        occ_thre: float = 1e-2,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Update the grids if n divides step.

        occ = max(occ ema_decay, occ_eval_fn(random point of the cell)); a cell is occupied if its
        occ > min(occ_thre, mean of all that are not negative). From warmup_steps on a quarter of
        the cells of each grid are looked at, at random, and as many occupied ones at most.

        Args:
            occ_eval_fn: (N, 3) points -> (N, 1) occupancies, say density times step size.
        Raises:
            RuntimeError: the module is in evaluation mode.
        """
        if not self.training:
            raise RuntimeError("update_every_n_steps is for training: call train() first")
        if step % n == 0:
            self._update(step, occ_eval_fn, occ_thre, ema_decay, warmup_steps)

    @torch.no_grad()
    def mark_invisible_cells(
        self,
        K: Tensor,
        c2w: Tensor,
        width: int,
        height: int,
        near_plane: float = 0.0,
        chunk: int = 32**3,
    ) -> None:
        """Set occs to -1 for cells that no camera sees, or that are too near to one; others to 0.

        A camera sees a cell if the cell's corner in the grid of x / (resolution - 1) projects into
        its picture from a depth of 0 and near_plane on; below near_plane it is too near.

        Args:
            K: (N, 3, 3) or (1, 3, 3) intrinsics, pixels. c2w: (N, 3, 4) or (N, 4, 4), x right,
                y down, z forward. chunk: cells at a time.
        """
        fits = K.ndim == 3 and K.shape[1:] == (3, 3) and len(K) in (1, len(c2w))
        expect(fits, "K", "shape (N, 3, 3) or (1, 3, 3)", K)
        fits = c2w.ndim == 3 and tuple(c2w.shape[1:]) in ((3, 4), (4, 4))
        expect(fits, "c2w", "shape (N, 3, 4) or (N, 4, 4)", c2w)
        w2c = c2w[:, :3, :3].transpose(1, 2)
        for level, cells in enumerate(self._get_all_cells()):
            low, high = self.aabbs[level].split(3)
            for part in cells.split(chunk):
                unit = self.grid_coords[part] / (self.resolution - 1)
                world = low + unit * (high - low)  # (n, 3)
                camera = w2c @ (world.T[None] - c2w[:, :3, 3:])  # (N, 3, n)
                u, v, depth = (K @ camera).unbind(1)
                u, v = u / depth, v / depth
                shown = (depth >= 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                seen = (shown & (depth >= near_plane)).any(0)
                too_near = (shown & (depth < near_plane)).any(0)
                marks = torch.where(seen & ~too_near, 0.0, -1.0)
                self.occs[level * self.cells_per_lvl + part] = marks

    def _get_all_cells(self) -> list[Tensor]:
        """Of each grid the cells that may be sampled."""
        occs = self.occs.view(self.levels, -1)
        return [self.grid_indices[occs[level] >= 0] for level in range(self.levels)]

    def _sample_uniform_and_occupied_cells(self, n: int) -> list[Tensor]:
        """Of each grid n random cells, those of them that may be sampled, and up to n occupied."""
        chosen = []
        for level, occs in enumerate(self.occs.view(self.levels, -1)):
            uniform = torch.randint(self.cells_per_lvl, (n,), device=self.device)
            occupied = self.binaries[level].flatten().nonzero()[:, 0]
            if n < len(occupied):
                pick = torch.randint(len(occupied), (n,), device=self.device)
                occupied = occupied[pick]
            chosen.append(torch.cat([uniform[occs[uniform] >= 0], occupied]))
        return chosen

    @torch.no_grad()
    def _update(
        self,
        step: int,
        occ_eval_fn: Callable,
        occ_thre: float = 0.01,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
    ) -> None:
        """See `update_every_n_steps`. Of a cell drawn twice the greater occupancy stays."""
        if step < warmup_steps:
            chosen = self._get_all_cells()
        else:
            chosen = self._sample_uniform_and_occupied_cells(self.cells_per_lvl // 4)
        for level, cells in enumerate(chosen):
            coords = self.grid_coords[cells]
            unit = (coords + torch.rand_like(coords, dtype=torch.float32)) / self.resolution
            low, high = self.aabbs[level].split(3)
            occ = occ_eval_fn(low + unit * (high - low))
            fits = occ.shape in ((len(cells), 1), (len(cells),))
            expect(fits, "occ_eval_fn()", f"shape ({len(cells)}, 1)", occ)
            at = level * self.cells_per_lvl + cells
            new = torch.maximum(self.occs[at] * ema_decay, occ.view(-1).to(self.occs.dtype))
            self.occs.scatter_reduce_(0, at, new, "amax", include_self=False)
        mean = self.occs[self.occs >= 0].mean()
        self.binaries = (self.occs > mean.clamp(max=occ_thre)).view(self.binaries.shape)
